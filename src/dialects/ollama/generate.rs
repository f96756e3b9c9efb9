//! `/v1/completions` → `/api/generate`. As with Ollama's own `/v1`, the prompt
//! goes through the model's template.

use serde_json::{Map, Value};

use super::{
    Draft,
    options::{finish, take},
    size::Size,
};
use crate::dialects::{Call, Unsupported};

pub(super) fn encode(call: &Call<'_>, mut body: Map<String, Value>) -> Result<Draft, Unsupported> {
    if call.request.n > 1 {
        return Err(Unsupported::param(
            "n",
            "this model server gives one answer only",
        ));
    }
    if take(&mut body, "echo") == Some(Value::Bool(true)) {
        return Err(Unsupported::param(
            "echo",
            "this model server does not repeat the prompt",
        ));
    }
    let prompt = match take(&mut body, "prompt") {
        Some(Value::String(prompt)) => prompt,
        Some(Value::Array(mut prompts)) if prompts.len() == 1 => match prompts.pop() {
            Some(Value::String(prompt)) => prompt,
            _ => return Err(not_one_text()),
        },
        _ => return Err(not_one_text()),
    };
    // With an empty prompt, Ollama loads the model and answers nothing.
    if prompt.is_empty() {
        return Err(not_one_text());
    }
    let suffix = take(&mut body, "suffix").and_then(|suffix| match suffix {
        Value::String(suffix) => Some(suffix),
        _ => None,
    });
    let size = Size {
        bytes: prompt.len() + suffix.as_ref().map_or(0, String::len),
        messages: 1,
        images: 0,
    };
    let mut out = Map::new();
    out.insert("model".to_owned(), call.model.into());
    out.insert("prompt".to_owned(), prompt.into());
    if let Some(suffix) = suffix {
        out.insert("suffix".to_owned(), suffix.into());
    }
    // A completion has no place for thoughts.
    out.insert("think".to_owned(), false.into());
    let num_ctx = finish(call, &mut body, size, &mut out);
    Ok(Draft {
        body: out,
        size,
        num_ctx,
        texts: 0,
        base64: false,
    })
}

fn not_one_text() -> Unsupported {
    Unsupported::param(
        "prompt",
        "this model server takes one prompt, as text that is not empty",
    )
}
