//! `/v1/embeddings` → `/api/embed`.
//!
//! A text that is too long is refused by Ollama (`truncate: false`) and not cut:
//! half a text's vector looks like any other.

use serde_json::{Map, Value, json};

use super::{
    Draft,
    options::{place, stay, take},
    size::Size,
};
use crate::dialects::{Call, Unsupported};

pub(super) fn encode(call: &Call<'_>, mut body: Map<String, Value>) -> Result<Draft, Unsupported> {
    let texts: Vec<String> = match take(&mut body, "input") {
        Some(one @ Value::String(_)) => vec![text(one)?],
        Some(Value::Array(list)) => list.into_iter().map(text).collect::<Result<_, _>>()?,
        _ => return Err(no_text()),
    };
    let base64 = match take(&mut body, "encoding_format") {
        None => false,
        Some(Value::String(format)) if format == "float" => false,
        Some(Value::String(format)) if format == "base64" => true,
        Some(_) => {
            let why = "must be float or base64";
            return Err(Unsupported::param("encoding_format", why));
        }
    };
    let size = Size {
        bytes: texts.iter().map(String::len).sum(),
        messages: texts.len(),
        images: 0,
    };
    // Each text is read for itself.
    let longest = Size {
        bytes: texts.iter().map(String::len).max().unwrap_or(0),
        messages: 1,
        images: 0,
    };
    let count = texts.len();
    let truncate = match take(&mut body, "truncate") {
        Some(Value::Bool(wish)) => wish,
        _ => false,
    };
    let mut out = Map::new();
    out.insert("model".to_owned(), call.model.into());
    out.insert("input".to_owned(), json!(texts));
    out.insert("truncate".to_owned(), truncate.into());
    if let Some(dimensions) = take(&mut body, "dimensions") {
        out.insert("dimensions".to_owned(), dimensions);
    }
    let mut options = Map::new();
    let num_ctx = place(call, longest.context(Some(0)), &mut options);
    out.insert("options".to_owned(), options.into());
    stay(call.upstream, &mut out);
    Ok(Draft {
        body: out,
        size,
        num_ctx,
        texts: count,
        base64,
    })
}

fn text(item: Value) -> Result<String, Unsupported> {
    match item {
        // Of an empty text Ollama makes no embedding.
        Value::String(text) if !text.is_empty() => Ok(text),
        _ => Err(no_text()),
    }
}

fn no_text() -> Unsupported {
    Unsupported::param(
        "input",
        "this model server takes texts that are not empty, and no token ids",
    )
}
