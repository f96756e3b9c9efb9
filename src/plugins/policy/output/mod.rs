//! Rules about what comes from a model: texts that end the answer, or that are
//! replaced or masked in it.
//!
//! `texts` runs the rules over the texts of one answer, `chat` finds these in
//! chunks and choices, `responses` in OpenAI's responses; `walk` finds what none
//! of them knows by its name. An event in which nothing changes goes on as the
//! bytes it came in.

mod chat;
mod responses;
mod texts;
mod walk;

use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;

pub(super) use self::{
    chat::{ChatStream, whole_chat},
    responses::{ResponseStream, whole_response},
    texts::Rules,
};
use super::Hits;
use crate::{
    error::{Error, Result},
    openai::{Endpoint, Frame},
    plugins::Pass,
};

/// What is kept of a stream.
pub(super) enum Stream {
    /// Chunks of chat or text completions.
    Chat(ChatStream),
    /// Events of responses.
    Responses(ResponseStream),
}

impl Stream {
    /// Begins a stream of an endpoint with so many answers.
    pub(super) fn new(endpoint: Endpoint, n: u32) -> Self {
        match endpoint {
            Endpoint::Responses => Self::Responses(ResponseStream::default()),
            _ => Self::Chat(ChatStream::new(endpoint, n)),
        }
    }

    /// Applies the rules to the next event.
    ///
    /// # Errors
    /// The event cannot be read, so that nobody knows what is in it.
    pub(super) fn event(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        event: &Frame,
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        let data = event.data.as_deref().unwrap_or_default().trim_ascii();
        match self {
            Self::Chat(stream) if !data.is_empty() => stream.event(rules, hits, event, data, out),
            Self::Responses(stream) if data.starts_with(b"{") => {
                stream.event(rules, hits, event, data, out)
            }
            _ => {
                out.push(event.clone());
                Ok(Pass::On)
            }
        }
    }
}

/// Applies the rules to a whole answer; `None` if nothing changes.
///
/// # Errors
/// The answer cannot be read.
pub(super) fn whole(
    rules: &Rules,
    hits: &Hits,
    endpoint: Endpoint,
    body: &[u8],
) -> Result<Option<Bytes>> {
    if !endpoint.streams() {
        return Ok(None); // nothing that a model said
    }
    let mut answer = read(body)?;
    let changed = match endpoint {
        Endpoint::Responses => whole_response(rules, hits, &mut answer)?,
        _ => whole_chat(rules, hits, &mut answer)?,
    };
    Ok(changed.then(|| answer.to_string().into()))
}

fn read(data: &[u8]) -> Result<Value> {
    serde_json::from_slice(data).map_err(|why| unreadable().because(why))
}

fn unreadable() -> Error {
    let message = "the answer of the model server could not be checked";
    Error::new(
        StatusCode::BAD_GATEWAY,
        "server_error",
        "upstream_error",
        message,
    )
}
