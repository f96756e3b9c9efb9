//! Ollama's own API: the one in which the size of the context, the CPU threads
//! and the time that a model stays loaded can be said.
//!
//! - `chat`, `generate`, `embed`: a request in Ollama's words
//! - `options`: what all of them have in common
//! - [`size`]: how many tokens a prompt may be, and whether it was cut
//! - `answer`: what Ollama says, read
//! - `stream`: its lines → OpenAI's events
//! - `whole`: its whole answers → OpenAI's
//!
//! **Invariant:** of Ollama's paths only `/api/chat`, `/api/generate`,
//! `/api/embed` and `/api/tags` are called from here: nothing that pulls, makes
//! or deletes models.
//!
//! What Ollama has no words for and what is said nevertheless: `tool_choice:
//! none` drops the tools, a named one leaves only that tool; `logit_bias`,
//! `parallel_tool_calls`, `user` and the like are left out, as in Ollama's own
//! `/v1`. What would change the answer's shape or sense (`n`, lists of prompts,
//! token ids, pictures that are not in the request) is [`Unsupported`].

mod answer;
mod chat;
mod embed;
mod generate;
mod options;
pub mod size;
mod stream;
#[cfg(test)]
mod tests;
mod whole;

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use serde::Deserialize;
use serde_json::{Map, Value};

use self::{size::Size, stream::Stream};
use super::{Call, DecodeError, Decoder, Dialect, Encoded, Unsupported};
use crate::openai::{Endpoint, UpstreamError};

/// Speaks Ollama's API.
#[derive(Debug)]
pub struct Ollama;

const CHAT: &str = "/api/chat";
const GENERATE: &str = "/api/generate";
const EMBED: &str = "/api/embed";
const TAGS: &str = "/api/tags";

impl Dialect for Ollama {
    fn encode(&self, call: &Call<'_>) -> Result<Encoded, Unsupported> {
        // Checked when it came; deeper than this reader goes it cannot be.
        let body: Map<String, Value> = serde_json::from_slice(&call.request.raw)
            .map_err(|_scanned| Unsupported::param("messages", "the body is nested too deep"))?;
        let (suffix, draft) = match call.request.endpoint {
            Endpoint::ChatCompletions => (CHAT, chat::encode(call, body)?),
            Endpoint::Completions => (GENERATE, generate::encode(call, body)?),
            Endpoint::Embeddings => (EMBED, embed::encode(call, body)?),
            Endpoint::Responses | Endpoint::Rerank | Endpoint::Moderations => {
                return Err(Unsupported::call());
            }
        };
        let request = call.request;
        let body = serde_json::to_vec(&draft.body).expect("a JSON value is always JSON");
        let asked = Asked::new(call, draft);
        Ok(Encoded {
            suffix,
            accept: if request.stream {
                "application/x-ndjson"
            } else {
                "application/json"
            },
            body: body.into(),
            hide_usage: request.stream && request.include_usage != Some(true),
            decoder: Some(Box::new(Reader {
                stream: Stream::new(&asked, call.event_bytes_max),
                asked,
                cut: false,
            })),
        })
    }

    /// A model that cannot think is asked without it: as a fallback for one
    /// that can it is better than an error.
    fn amended(&self, body: &[u8], error: &UpstreamError) -> Option<Bytes> {
        let message = error.message.as_deref()?;
        if !message.contains("does not support thinking") {
            return None;
        }
        let mut body: Map<String, Value> = serde_json::from_slice(body).ok()?;
        body.shift_remove("think")?;
        serde_json::to_vec(&body).ok().map(Bytes::from)
    }

    fn models_suffix(&self) -> &'static str {
        TAGS
    }

    fn read_models(&self, body: &[u8]) -> serde_json::Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Tags {
            // Go writes an empty list as null.
            models: Option<Vec<Tag>>,
        }
        #[derive(Deserialize)]
        struct Tag {
            name: String,
        }
        let tags: Tags = serde_json::from_slice(body)?;
        let models = tags.models.unwrap_or_default();
        Ok(models.into_iter().map(|tag| tag.name).collect())
    }
}

/// A request in Ollama's words, and what of it the answer's reader must know.
struct Draft {
    body: Map<String, Value>,
    size: Size,
    /// The context that it asks for.
    num_ctx: u32,
    /// Of embeddings: how many texts, and whether as base64.
    texts: usize,
    base64: bool,
}

/// What an answer is told as.
#[derive(Clone, Debug)]
struct Asked {
    endpoint: Endpoint,
    /// `chatcmpl-…`; no other answer has it.
    id: String,
    /// Seconds since 1970.
    created: u64,
    /// What the client calls the model.
    model: String,
    size: Size,
    num_ctx: u32,
    texts: usize,
    base64: bool,
}

impl Asked {
    fn new(call: &Call<'_>, draft: Draft) -> Self {
        let endpoint = call.request.endpoint;
        let prefix = match endpoint {
            Endpoint::ChatCompletions => "chatcmpl",
            _ => "cmpl",
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            endpoint,
            id: format!("{prefix}-{:032x}", rand::random::<u128>()),
            created: now.map_or(0, |since| since.as_secs()),
            model: call.request.model.clone(),
            size: draft.size,
            num_ctx: draft.num_ctx,
            texts: draft.texts,
            base64: draft.base64,
        }
    }
}

/// Reads one answer.
struct Reader {
    asked: Asked,
    stream: Stream,
    cut: bool,
}

impl Decoder for Reader {
    fn is_stream(&self, headers: &HeaderMap) -> bool {
        // One line of JSON, as proxies and small servers send it, is read whole.
        headers
            .get(header::CONTENT_TYPE)
            .is_none_or(|kind| !kind.as_bytes().starts_with(b"application/json"))
    }

    fn push(&mut self, piece: &[u8], out: &mut BytesMut) -> Result<(), DecodeError> {
        self.stream.push(piece, out)?;
        self.cut |= self.stream.is_cut(&self.asked);
        Ok(())
    }

    fn end(&mut self, out: &mut BytesMut) -> Result<(), DecodeError> {
        self.stream.end(out)?;
        self.cut |= self.stream.is_cut(&self.asked);
        Ok(())
    }

    fn whole(&mut self, body: &[u8]) -> Result<Bytes, DecodeError> {
        let whole = whole::of(&self.asked, body)?;
        self.cut = whole.cut;
        Ok(whole.body)
    }

    fn prompt_was_cut(&self) -> bool {
        self.cut
    }
}
