//! Whole answers: `/api/chat`, `/api/generate` and `/api/embed` → OpenAI's.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};

use super::{Asked, answer::Line};
use crate::{dialects::DecodeError, openai::Endpoint};

/// A whole answer in OpenAI's words.
pub(super) struct Whole {
    pub(super) body: Bytes,
    /// Whether the prompt was certainly cut.
    pub(super) cut: bool,
}

pub(super) fn of(asked: &Asked, body: &[u8]) -> Result<Whole, DecodeError> {
    if asked.endpoint == Endpoint::Embeddings {
        return embeddings(asked, body);
    }
    let mut line = Line::read(body)?;
    if !line.done {
        return Err(DecodeError::Malformed("an answer that is not done"));
    }
    let (object, choice) = match asked.endpoint {
        Endpoint::ChatCompletions => ("chat.completion", message(asked, &mut line)),
        _ => ("text_completion", text(&line)),
    };
    let answer = json!({
        "id": asked.id,
        "object": object,
        "created": asked.created,
        "model": asked.model,
        "choices": [choice],
        "usage": line.usage(),
    });
    Ok(Whole {
        body: answer.to_string().into(),
        cut: asked
            .size
            .was_cut(asked.num_ctx, line.prompt_tokens(), line.cached_tokens()),
    })
}

fn message(asked: &Asked, line: &mut Line) -> Value {
    let mut calls = line.tool_calls(asked, 0);
    for call in calls.iter_mut().filter_map(Value::as_object_mut) {
        // Only the pieces of a stream are numbered.
        call.shift_remove("index");
    }
    let mut message = Map::new();
    message.insert("role".to_owned(), "assistant".into());
    let content = match line.message.content.take() {
        None if calls.is_empty() => Value::from(""),
        content => content.into(),
    };
    message.insert("content".to_owned(), content);
    if let Some(thinking) = line.message.thinking.take() {
        message.insert("reasoning_content".to_owned(), thinking.into());
    }
    let calls_tools = !calls.is_empty();
    if calls_tools {
        message.insert("tool_calls".to_owned(), calls.into());
    }
    let logprobs = line.logprobs.take();
    let logprobs = logprobs.and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok());
    json!({
        "index": 0,
        "message": message,
        "logprobs": logprobs.map(|content| json!({ "content": content })),
        "finish_reason": line.finish_reason(calls_tools),
    })
}

fn text(line: &Line) -> Value {
    json!({
        "index": 0,
        "text": line.response.as_deref().unwrap_or_default(),
        "logprobs": null,
        "finish_reason": line.finish_reason(false),
    })
}

/// The answer of `/api/embed`; the numbers stay as they are written.
#[derive(Deserialize)]
struct Embedded<'a> {
    #[serde(borrow)]
    embeddings: Vec<&'a RawValue>,
    #[serde(default)]
    prompt_eval_count: Option<u64>,
}

fn embeddings(asked: &Asked, body: &[u8]) -> Result<Whole, DecodeError> {
    let answer: Embedded<'_> = serde_json::from_slice(body)
        .map_err(|_why| DecodeError::Malformed("an answer without embeddings"))?;
    if answer.embeddings.len() != asked.texts {
        return Err(DecodeError::Malformed("not one embedding for each text"));
    }
    let mut out = String::with_capacity(body.len() + 256);
    out.push_str(r#"{"object":"list","data":["#);
    for (index, raw) in answer.embeddings.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        out.push_str(r#"{"object":"embedding","index":"#);
        out.push_str(&index.to_string());
        out.push_str(r#","embedding":"#);
        let numbers: Vec<f32> = serde_json::from_str(raw.get())
            .map_err(|_why| DecodeError::Malformed("an embedding that is no list of numbers"))?;
        if asked.base64 {
            let bytes: Vec<u8> = numbers.iter().flat_map(|one| one.to_le_bytes()).collect();
            out.push('"');
            STANDARD.encode_string(bytes, &mut out);
            out.push('"');
        } else {
            out.push_str(raw.get());
        }
        out.push('}');
    }
    let tokens = answer.prompt_eval_count.unwrap_or(0);
    let model = Value::from(asked.model.as_str());
    out.push_str(&format!(
        r#"],"model":{model},"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}}}"#
    ));
    Ok(Whole {
        body: out.into(),
        // What is too long is refused and not cut.
        cut: false,
    })
}
