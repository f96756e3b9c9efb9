//! From a request to what is answered when nothing goes wrong: the OpenAI
//! endpoints as vLLM serves them, found by the end of the path, so that any
//! prefix works.
//!
//! Start at [`reply`]. Nothing here waits or writes.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::{
    SimOptions,
    answers::{Answer, Shape, Text, ToolCall, Usage, hash, mix, quoted},
    base64::base64,
    faults::{Continuation, ErrorBody, Fault},
    http::Head,
    ollama,
};

/// The most choices a request may ask for.
const CHOICES_MAX: u64 = 8;
/// The longest vector an embedding may ask for.
const DIMENSIONS_MAX: usize = 4096;

/// What is answered.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) content_type: &'static str,
    /// Further header lines, each with its line end.
    pub(crate) extra: String,
    pub(crate) content: Content,
}

/// The body of a [`Reply`].
#[derive(Debug)]
pub(crate) enum Content {
    /// At once.
    Whole(Vec<u8>),
    /// At once, when so many tokens would have been made.
    Thought(Vec<u8>, usize),
    /// Event by event.
    Events(Box<Answer>),
}

impl Reply {
    pub(super) fn json(status: u16, body: &Json) -> Self {
        Self::whole(status, "application/json", body.to_string().into_bytes())
    }

    pub(super) fn whole(status: u16, content_type: &'static str, body: Vec<u8>) -> Self {
        Self {
            status,
            content_type,
            extra: String::new(),
            content: Content::Whole(body),
        }
    }

    /// vLLM's error: an integer code, and `param` where it is known.
    fn error(status: u16, kind: &str, message: &str, param: Option<&str>) -> Self {
        let error = json!({ "message": message, "type": kind, "param": param, "code": status });
        Self::json(status, &json!({ "error": error }))
    }

    /// Ollama's error: a text.
    pub(super) fn native(status: u16, message: &str) -> Self {
        Self::json(status, &json!({ "error": message }))
    }

    fn bad(message: &str, param: Option<&str>) -> Self {
        Self::error(400, "BadRequestError", message, param)
    }

    /// What is answered to something that is no HTTP.
    pub(crate) fn unreadable(status: u16, why: &str) -> Self {
        Self::whole(
            status,
            "text/plain; charset=utf-8",
            format!("{why}\n").into(),
        )
    }

    /// The answer to a request whose `x-sim` is not understood.
    pub(crate) fn bad_fault(why: &str) -> Self {
        Self::bad(why, Some("x-sim"))
    }

    /// The answer while the line of waiting requests is full.
    pub(crate) fn busy(native: bool) -> Self {
        let message = "server busy, please try again.  maximum pending requests exceeded";
        if native {
            return Self::native(503, message);
        }
        Self::error(503, "ServiceUnavailableError", message, None)
    }

    /// The answer while the model is loading, as llama.cpp gives it.
    pub(crate) fn loading() -> Self {
        Self::error(503, "unavailable_error", "Loading model", None)
    }

    /// The answer that a fault's `status` or `early` asks for, in the shape of
    /// vLLM's errors, or of Ollama's on its `native` paths.
    pub(crate) fn ordered(status: u16, fault: &Fault, native: bool) -> Self {
        let message = format!("the simulator was told to answer {status}");
        let (kind, code) = match status {
            400 | 404 | 413 | 422 => ("invalid_request_error", "invalid_request"),
            401 => ("invalid_request_error", "invalid_api_key"),
            402 | 403 => ("permission_error", "permission_denied"),
            429 => ("requests", "rate_limit_exceeded"),
            _ => ("server_error", "server_error"),
        };
        let mut reply = match fault.body.unwrap_or(if native {
            ErrorBody::Ollama
        } else {
            ErrorBody::Vllm
        }) {
            ErrorBody::Vllm => Self::error(status, kind, &message, None),
            ErrorBody::Openai => {
                let error =
                    json!({ "message": message, "type": kind, "param": null, "code": code });
                Self::json(status, &json!({ "error": error }))
            }
            ErrorBody::Quota => {
                let message =
                    "You exceeded your current quota, please check your plan and billing details.";
                let kind = "insufficient_quota";
                let error =
                    json!({ "message": message, "type": kind, "param": null, "code": kind });
                Self::json(status, &json!({ "error": error }))
            }
            ErrorBody::Ollama => Self::native(status, &message),
            ErrorBody::Detail => Self::json(status, &json!({ "detail": message })),
            ErrorBody::Empty => Self::whole(status, "text/plain; charset=utf-8", Vec::new()),
            ErrorBody::Html => {
                let page = format!(
                    "<html><head><title>{status}</title></head><body><center><h1>{status}</h1></center><hr></body></html>\n"
                );
                Self::whole(status, "text/html", page.into_bytes())
            }
        };
        if let Some(when) = &fault.retry_after {
            reply.extra = format!("retry-after: {when}\r\n");
        }
        if (300..400).contains(&status) {
            reply.extra.push_str("location: /elsewhere\r\n");
        }
        reply
    }

    /// The request's own head, as JSON.
    pub(crate) fn echo(head: &Head) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let headers: Vec<[String; 2]> = super::http::header_lines(&head.bytes)
            .map(|(name, value)| [text(name), text(value)])
            .collect();
        let (method, target) = super::http::request_line(&head.bytes);
        Self::json(
            200,
            &json!({ "method": method, "target": target, "headers": headers }),
        )
    }
}

/// A request to a model, as far as the simulator reads it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ask {
    pub(super) model: Option<String>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) max_tokens: Option<u64>,
    pub(super) max_completion_tokens: Option<u64>,
    pub(super) max_output_tokens: Option<u64>,
    pub(super) n: Option<u64>,
    pub(super) messages: Option<Vec<Message>>,
    pub(super) prompt: Json,
    pub(super) input: Json,
    pub(super) tools: Option<Vec<Json>>,
    pub(super) tool_choice: Json,
    pub(super) continue_final_message: Option<bool>,
    pub(super) add_generation_prompt: Option<bool>,
    pub(super) encoding_format: Option<String>,
    pub(super) dimensions: Option<usize>,
    pub(super) query: Option<String>,
    pub(super) documents: Option<Vec<Json>>,
    pub(super) top_n: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Message {
    role: Option<String>,
    pub(super) content: Json,
}

/// Whether a request is for a model, that is, what faults apply to.
pub(crate) fn is_model_call(head: &Head) -> bool {
    head.method() == "POST"
}

/// Returns the answer to a request. `id` — a number no other answer has.
pub(crate) fn reply(
    options: &SimOptions,
    head: &Head,
    body: &[u8],
    fault: &Fault,
    id: u64,
) -> Reply {
    let path = head.path();
    let ends = |end: &str| path.ends_with(end);
    let allowed = options.api_key.as_ref().is_none_or(|key| {
        let given = head.authorization.as_deref().unwrap_or_default();
        given.strip_prefix("Bearer ") == Some(key.as_str())
    });
    match head.method() {
        "GET" | "HEAD" if ends("/health") => Reply::whole(200, "text/plain", Vec::new()),
        "GET" | "HEAD" if path == "/" => Reply::whole(
            200,
            "text/plain; charset=utf-8",
            "the simulator is running\n".into(),
        ),
        "GET" | "HEAD" if ends("/api/version") => {
            Reply::json(200, &json!({ "version": env!("CARGO_PKG_VERSION") }))
        }
        _ if !allowed => Reply::json(401, &json!({ "error": "Unauthorized" })),
        _ if ollama::is_native(path) => ollama::reply(options, head, body, fault, id),
        "GET" | "HEAD" if ends("/models") => {
            let models: Vec<Json> = options.models.iter().map(|model| card(model)).collect();
            Reply::json(200, &json!({ "object": "list", "data": models }))
        }
        "GET" | "HEAD" if path.contains("/models/") => {
            // The id may hold slashes: all after the first `/models/` is it.
            let id = path.split_once("/models/").map_or("", |(_, id)| id);
            let id = percent_decoded(id);
            match options.models.iter().find(|model| **model == id) {
                Some(model) if !fault.refuse_model => Reply::json(200, &card(model)),
                _ => no_model(&id, fault),
            }
        }
        "POST" => {
            let call = [
                ("/chat/completions", Call::Chat),
                ("/completions", Call::Completion),
                ("/embeddings", Call::Embeddings),
                ("/responses", Call::Responses),
                ("/rerank", Call::Rerank),
                ("/moderations", Call::Moderations),
            ];
            match call.into_iter().find(|(end, _)| ends(end)) {
                Some((_, call)) => called(options, call, body, fault, id),
                None => Reply::json(404, &json!({ "detail": "Not Found" })),
            }
        }
        "GET" | "HEAD" => Reply::json(404, &json!({ "detail": "Not Found" })),
        _ => Reply::json(405, &json!({ "detail": "Method Not Allowed" })),
    }
}

#[derive(Clone, Copy)]
pub(super) enum Call {
    Chat,
    Completion,
    Embeddings,
    Responses,
    Rerank,
    Moderations,
}

fn called(options: &SimOptions, call: Call, body: &[u8], fault: &Fault, id: u64) -> Reply {
    let ask: Ask = match serde_json::from_slice(body) {
        Ok(ask) => ask,
        Err(error) => return Reply::bad(&format!("the body is no valid request: {error}"), None),
    };
    let model = match (&ask.model, options.models.first()) {
        (Some(model), _) => model.as_str(),
        (None, Some(first)) => first.as_str(),
        (None, None) => "",
    };
    if fault.refuse_model || !options.models.iter().any(|known| known == model) {
        return no_model(model, fault);
    }
    match call {
        Call::Chat | Call::Completion | Call::Responses => {
            match answer(options, call, &ask, model, fault, id) {
                Ok(answer) => spoken(answer, ask.stream == Some(true)),
                Err(reply) => reply,
            }
        }
        Call::Embeddings => embeddings(&ask, model),
        Call::Rerank => rerank(&ask, model, id),
        Call::Moderations => moderations(&ask, model, id),
    }
}

pub(super) fn spoken(answer: Answer, streamed: bool) -> Reply {
    if streamed {
        return Reply {
            status: 200,
            content_type: "text/event-stream; charset=utf-8",
            extra: String::new(),
            content: Content::Events(Box::new(answer)),
        };
    }
    Reply {
        status: 200,
        content_type: "application/json",
        extra: String::new(),
        content: Content::Thought(answer.whole(), answer.tokens_each()),
    }
}

pub(super) fn answer(
    options: &SimOptions,
    call: Call,
    ask: &Ask,
    model: &str,
    fault: &Fault,
    id: u64,
) -> Result<Answer, Reply> {
    let wanted = ask.n.unwrap_or(1);
    if !(1..=CHOICES_MAX).contains(&wanted) {
        return Err(Reply::bad("n must be from 1 to 8", Some("n")));
    }
    let limit = ask
        .max_completion_tokens
        .or(ask.max_output_tokens)
        .or(ask.max_tokens);
    if limit == Some(0) {
        return Err(Reply::bad(
            "max_tokens must be at least 1",
            Some("max_tokens"),
        ));
    }
    let limit = limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    let (shape, question, prompt_tokens, before) = match call {
        Call::Completion => {
            let prompt = text_of(&ask.prompt);
            let words = count_words(&prompt);
            (Shape::Completion, prompt, words, 0)
        }
        Call::Responses if ask.input.is_string() => {
            let input = text_of(&ask.input);
            let words = count_words(&input);
            (Shape::Responses, input, words, 0)
        }
        Call::Responses => {
            let items: Vec<Message> = Vec::deserialize(&ask.input)
                .map_err(|error| Reply::bad(&format!("input: {error}"), Some("input")))?;
            let (question, words, _) = conversation(&items, false);
            (Shape::Responses, question, words, 0)
        }
        _ => {
            let messages = ask.messages.as_deref().filter(|list| !list.is_empty());
            let messages = messages
                .ok_or_else(|| Reply::bad("messages: at least one is needed", Some("messages")))?;
            let asked = ask.continue_final_message == Some(true);
            if asked && fault.continuation == Some(Continuation::Reject) {
                let why = "extra fields not permitted: continue_final_message";
                return Err(Reply::bad(why, Some("continue_final_message")));
            }
            let goes_on = asked && fault.continuation.is_none();
            if goes_on && ask.add_generation_prompt == Some(true) {
                let why = "continue_final_message and add_generation_prompt exclude each other";
                return Err(Reply::bad(why, Some("continue_final_message")));
            }
            let (question, words, before) = conversation(messages, goes_on);
            (Shape::Chat, question, words, before)
        }
    };
    let natural = fault
        .tokens
        .unwrap_or(options.tokens)
        .saturating_sub(before);
    let stream_usage = ask.stream_options.as_ref();
    let asked =
        |field: fn(&StreamOptions) -> Option<bool>| stream_usage.and_then(field) == Some(true);
    let streamed = ask.stream == Some(true);
    let usage = if fault.no_usage {
        Usage::Hidden
    } else if streamed && (fault.continuous_usage || asked(|o| o.continuous_usage_stats)) {
        Usage::Always
    } else if !streamed || shape == Shape::Responses || asked(|o| o.include_usage) {
        Usage::Last
    } else {
        Usage::Hidden
    };
    Ok(Answer {
        shape,
        id,
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs()),
        model: quoted(model),
        text: Text::new(&options.name, model, &question),
        first_word: before,
        tokens: natural.min(limit),
        truncated: limit < natural,
        choices: match call {
            Call::Responses => 1,
            _ => usize::try_from(wanted).unwrap_or(1),
        },
        tool: match call {
            Call::Chat => tool_call(ask)?,
            _ => None,
        },
        prompt_tokens,
        usage,
        no_counts: fault.no_usage,
    })
}

/// Returns what is asked (the last message of the user), the words of all
/// messages, and the words of the answer that are already there.
fn conversation(messages: &[Message], goes_on: bool) -> (String, usize, usize) {
    let user = |message: &&Message| message.role.as_deref() == Some("user");
    let last_user = messages.iter().rev().find(user).or(messages.last());
    let question = last_user.map_or_else(String::new, |message| text_of(&message.content));
    let words = |message: &Message| count_words(&text_of(&message.content));
    let all = messages.iter().map(words).sum();
    let partial = messages
        .last()
        .filter(|message| goes_on && message.role.as_deref() == Some("assistant"));
    (question, all, partial.map_or(0, words))
}

/// Returns the text of a content: a string, or a list of strings and parts.
pub(super) fn text_of(content: &Json) -> String {
    match content {
        Json::String(text) => text.clone(),
        Json::Array(parts) => {
            let texts: Vec<String> = parts.iter().map(text_of).collect();
            texts.join(" ")
        }
        Json::Object(part) => part.get("text").map(text_of).unwrap_or_default(),
        _ => String::new(),
    }
}

fn count_words(text: &str) -> usize {
    text.split_whitespace().count()
}

fn tool_call(ask: &Ask) -> Result<Option<ToolCall>, Reply> {
    let tools = ask.tools.as_deref().unwrap_or_default();
    let named = ask
        .tool_choice
        .pointer("/function/name")
        .and_then(Json::as_str);
    if ask.tool_choice != "required" && named.is_none() {
        return Ok(None);
    }
    let found = tools
        .iter()
        .map(|tool| &tool["function"])
        .find(|function| named.is_none() || function["name"].as_str() == named);
    let Some(function) = found else {
        let why = "tool_choice names a tool that tools does not have";
        return Err(Reply::bad(why, Some("tool_choice")));
    };
    Ok(Some(ToolCall {
        name: function["name"].as_str().unwrap_or_default().to_owned(),
        arguments: example(&function["parameters"]).to_string(),
    }))
}

/// Returns a value that fits a JSON Schema, as far as tools' schemas go.
fn example(schema: &Json) -> Json {
    if let Some(first) = schema["enum"].get(0) {
        return first.clone();
    }
    match schema["type"].as_str() {
        Some("string") => "harbor".into(),
        Some("integer" | "number") => 1.into(),
        Some("boolean") => true.into(),
        Some("array") => json!([]),
        Some("null") => Json::Null,
        _ => {
            let properties = schema["properties"].as_object();
            let fields = properties.into_iter().flatten();
            fields
                .map(|(name, schema)| (name.clone(), example(schema)))
                .collect()
        }
    }
}

fn no_model(model: &str, fault: &Fault) -> Reply {
    if fault.body.is_some() || fault.retry_after.is_some() {
        return Reply::ordered(404, fault, false);
    }
    let message = format!("The model `{model}` does not exist.");
    Reply::error(404, "NotFoundError", &message, Some("model"))
}

fn card(model: &str) -> Json {
    json!({ "id": model, "object": "model", "created": 1_700_000_000, "owned_by": "forebay-sim" })
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        let decoded = digits.and_then(|d| u8::from_str_radix(d, 16).ok());
        match (byte, decoded) {
            (b'%', Some(decoded)) => {
                bytes.push(decoded);
                rest = tail.get(2..).unwrap_or_default();
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A number from -1 to 1 that depends on the seed alone.
fn drawn(seed: u64) -> f32 {
    let [a, b, ..] = mix(seed).to_le_bytes();
    f32::from(i16::from_le_bytes([a, b])) / 32768.0
}

/// Returns the vector of each input, and the words of all; or why there are none.
pub(super) fn vectors(ask: &Ask, model: &str) -> Result<(Vec<Vec<f32>>, usize), Reply> {
    let inputs: Vec<String> = match &ask.input {
        Json::String(text) => vec![text.clone()],
        Json::Array(list) if list.iter().any(Json::is_number) => vec![ask.input.to_string()],
        Json::Array(list) if !list.is_empty() => list
            .iter()
            .map(|item| {
                item.as_str()
                    .map_or_else(|| item.to_string(), str::to_owned)
            })
            .collect(),
        _ => {
            let why = "input: a text or a list of texts is needed";
            return Err(Reply::bad(why, Some("input")));
        }
    };
    let dimensions = ask.dimensions.unwrap_or(16);
    if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
        let why = "dimensions must be from 1 to 4096";
        return Err(Reply::bad(why, Some("dimensions")));
    }
    let vector = |text: &String| -> Vec<f32> {
        let seed = hash(hash(0, model.as_bytes()), text.as_bytes());
        (0..dimensions as u64)
            .map(|i| drawn(seed.wrapping_add(i)))
            .collect()
    };
    let words = inputs.iter().map(|text| count_words(text)).sum();
    Ok((inputs.iter().map(vector).collect(), words))
}

fn embeddings(ask: &Ask, model: &str) -> Reply {
    let (vectors, words) = match vectors(ask, model) {
        Ok(vectors) => vectors,
        Err(reply) => return reply,
    };
    let as_base64 = ask.encoding_format.as_deref() == Some("base64");
    let data: Vec<Json> = vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| {
            let embedding = if as_base64 {
                let bytes: Vec<u8> = vector
                    .iter()
                    .flat_map(|number| number.to_le_bytes())
                    .collect();
                base64(&bytes).into()
            } else {
                json!(vector)
            };
            json!({ "object": "embedding", "index": index, "embedding": embedding })
        })
        .collect();
    let usage = json!({ "prompt_tokens": words, "total_tokens": words });
    Reply::json(
        200,
        &json!({ "object": "list", "data": data, "model": model, "usage": usage }),
    )
}

fn rerank(ask: &Ask, model: &str, id: u64) -> Reply {
    let (Some(query), Some(documents)) = (&ask.query, &ask.documents) else {
        return Reply::bad("query and documents are needed", Some("documents"));
    };
    let seed = hash(hash(0, model.as_bytes()), query.as_bytes());
    let mut results: Vec<(f32, usize, String)> = documents
        .iter()
        .enumerate()
        .map(|(index, document)| {
            let text = text_of(document);
            let score = drawn(hash(seed, text.as_bytes())).abs();
            (score, index, text)
        })
        .collect();
    results.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let words: usize = results.iter().map(|(_, _, text)| count_words(text)).sum();
    let results: Vec<Json> = results
        .into_iter()
        .take(ask.top_n.unwrap_or(usize::MAX))
        .map(|(score, index, text)| json!({ "index": index, "document": { "text": text }, "relevance_score": score }))
        .collect();
    let total = words + count_words(query);
    Reply::json(
        200,
        &json!({ "id": format!("rerank-{id:016x}"), "model": model, "usage": { "total_tokens": total }, "results": results }),
    )
}

/// Flags a text that holds the word `flagged`.
fn moderations(ask: &Ask, model: &str, id: u64) -> Reply {
    let inputs = match &ask.input {
        Json::Array(list) => list.iter().map(text_of).collect(),
        Json::String(text) => vec![text.clone()],
        _ => return Reply::bad("input: a text or a list of texts is needed", Some("input")),
    };
    let results: Vec<Json> = inputs
        .iter()
        .map(|text: &String| {
            let flagged = text.split_whitespace().any(|word| word == "flagged");
            let score = if flagged { 0.99 } else { 0.01 };
            json!({
                "flagged": flagged,
                "categories": { "violence": flagged, "hate": false },
                "category_scores": { "violence": score, "hate": 0.01 },
            })
        })
        .collect();
    Reply::json(
        200,
        &json!({ "id": format!("modr-{id:016x}"), "model": model, "results": results }),
    )
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::sim::http::Framing;

    fn ask(target: &str, body: &str) -> Reply {
        let method = if body.is_empty() { "GET" } else { "POST" };
        let head = Head {
            bytes: Bytes::from(format!("{method} {target} HTTP/1.1\r\n\r\n")),
            framing: Framing::Length(0),
            expects_continue: false,
            keep_alive: true,
            fault: None,
            authorization: None,
        };
        reply(
            &SimOptions::quick("sim"),
            &head,
            body.as_bytes(),
            &Fault::default(),
            1,
        )
    }

    fn json(reply: &Reply) -> Json {
        match &reply.content {
            Content::Whole(body) | Content::Thought(body, _) => {
                serde_json::from_slice(body).unwrap()
            }
            Content::Events(_) => panic!("a stream"),
        }
    }

    fn content(reply: &Reply) -> String {
        json(reply)["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    const CHAT: &str = "/v1/chat/completions";

    #[test]
    fn any_prefix_serves_the_same() {
        let body = r#"{"model":"demo","messages":[{"role":"user","content":"hi"}]}"#;
        for path in [
            CHAT,
            "/client/v4/accounts/ID/ai/v1/chat/completions?x=1",
            "/chat/completions",
        ] {
            assert_eq!(ask(path, body).status, 200, "{path}");
        }
        assert_eq!(ask("/v1/chat/completion", body).status, 404);
        assert_eq!(ask("/x/v1/models/demo", "").status, 200);
        assert_eq!(ask("/v1/models/d%65mo", "").status, 200);
    }

    #[test]
    fn an_unknown_model_is_refused_as_vllm_does() {
        let reply = ask(
            CHAT,
            r#"{"model":"nope","messages":[{"role":"user","content":"hi"}]}"#,
        );
        assert_eq!(reply.status, 404);
        let error = &json(&reply)["error"];
        assert_eq!(
            (&error["type"], &error["param"], &error["code"]),
            (&json!("NotFoundError"), &json!("model"), &json!(404))
        );
    }

    #[test]
    fn what_is_malformed_gets_400() {
        for body in [
            "{",
            r#"{"model":7}"#,
            r#"{"model":"demo"}"#,
            r#"{"model":"demo","messages":[]}"#,
            r#"{"messages":[{"role":"user","content":"a"}],"n":9}"#,
            r#"{"messages":[{"role":"user","content":"a"}],"n":0}"#,
            r#"{"messages":[{"role":"user","content":"a"}],"max_tokens":0}"#,
            r#"{"messages":[{"role":"user","content":"a"}],"stream":"yes"}"#,
            r#"{"messages":[{"role":"user","content":"a"}],"continue_final_message":true,"add_generation_prompt":true}"#,
            r#"{"messages":[{"role":"user","content":"a"}],"tools":[],"tool_choice":"required"}"#,
        ] {
            assert_eq!(ask(CHAT, body).status, 400, "{body}");
        }
    }

    #[test]
    fn max_tokens_cuts_the_answer_and_usage_counts_words() {
        let body = r#"{"messages":[{"role":"system","content":"be kind"},{"role":"user","content":[{"type":"text","text":"one two three"}]}],"max_tokens":4}"#;
        let reply = ask(CHAT, body);
        assert_eq!(content(&reply).split(' ').count(), 4);
        let json = json(&reply);
        assert_eq!(json["choices"][0]["finish_reason"], "length");
        assert_eq!(
            json["usage"],
            json!({ "prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9 })
        );
    }

    #[test]
    fn a_continuation_joins_the_partial_at_every_word() {
        let question = r#"{"role":"user","content":"tell me"}"#;
        let whole = content(&ask(CHAT, &format!(r#"{{"messages":[{question}]}}"#)));
        let words: Vec<&str> = whole.split(' ').collect();
        assert_eq!(words.len(), SimOptions::default().tokens);
        for cut in 1..=words.len() {
            let partial = words[..cut].join(" ");
            let body = format!(
                r#"{{"messages":[{question},{{"role":"assistant","content":"{partial}"}}],"continue_final_message":true,"add_generation_prompt":false}}"#
            );
            let rest = content(&ask(CHAT, &body));
            assert_eq!(format!("{partial}{rest}"), whole, "{cut}");
        }
    }

    #[test]
    fn a_required_tool_is_called_with_arguments_that_fit_its_schema() {
        let tools = r#"[{"type":"function","function":{"name":"a"}},{"type":"function","function":{"name":"b","parameters":{"type":"object","properties":{"city":{"type":"string"},"unit":{"enum":["c","f"]}}}}}]"#;
        for (choice, name) in [
            (r#""required""#, "a"),
            (r#"{"type":"function","function":{"name":"b"}}"#, "b"),
        ] {
            let body = format!(
                r#"{{"messages":[{{"role":"user","content":"x"}}],"tools":{tools},"tool_choice":{choice}}}"#
            );
            let json = json(&ask(CHAT, &body));
            let function = &json["choices"][0]["message"]["tool_calls"][0]["function"];
            assert_eq!(function["name"], name);
            if name == "b" {
                assert_eq!(function["arguments"], r#"{"city":"harbor","unit":"c"}"#);
            }
        }
    }

    #[test]
    fn embeddings_are_the_same_as_numbers_and_as_base64() {
        let floats = json(&ask(
            "/v1/embeddings",
            r#"{"input":["a b","c"],"dimensions":4}"#,
        ));
        assert_eq!(floats["usage"]["prompt_tokens"], 3);
        let first: Vec<f32> =
            serde_json::from_value(floats["data"][0]["embedding"].clone()).unwrap();
        let bytes: Vec<u8> = first.iter().flat_map(|n| n.to_le_bytes()).collect();
        let encoded = json(&ask(
            "/v1/embeddings",
            r#"{"input":"a b","dimensions":4,"encoding_format":"base64"}"#,
        ));
        assert_eq!(encoded["data"][0]["embedding"], base64(&bytes));
    }

    #[test]
    fn rerank_sorts_and_moderations_flags() {
        let ranked = json(&ask(
            "/v1/rerank",
            r#"{"query":"q","documents":["a","b",{"text":"c"}],"top_n":2}"#,
        ));
        let results = ranked["results"].as_array().unwrap();
        assert_eq!(results.len(), 2);
        assert!(results[0]["relevance_score"].as_f64() >= results[1]["relevance_score"].as_f64());
        let flags = json(&ask(
            "/v1/moderations",
            r#"{"input":["fine","flagged words"]}"#,
        ));
        assert_eq!(flags["results"][0]["flagged"], false);
        assert_eq!(flags["results"][1]["flagged"], true);
    }
}
