//! What upstreams are spoken to in: [`DIALECTS`] is the one list.
//!
//! The gateway thinks in OpenAI's format. A [`Dialect`] says a request in the
//! upstream's own words, at its door; a [`Decoder`] turns what the upstream says
//! into OpenAI's events, or into OpenAI's whole answer. The rest of the exchange
//! never knows that anything else was spoken.
//!
//! Nothing here does I/O. To add a dialect: a file beside [`openai`] with a type
//! that implements [`Dialect`], a word in [`config::Dialect`], and a line in the
//! list.
//!
//! **Invariant:** a dialect calls the paths that it names as constants, and no
//! other: what a client sends never becomes part of a path.

pub mod ollama;
pub mod openai;

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};

use crate::{
    config::{self, Upstream},
    error::Error,
    openai::{ApiRequest, UpstreamError},
};

/// Says requests in the words of a kind of upstream, and lists its models.
pub trait Dialect: Send + Sync {
    /// Says a request in the upstream's words. Runs once for every try.
    ///
    /// # Errors
    /// What the upstream has no words for. Another upstream may have them.
    fn encode(&self, call: &Call<'_>) -> Result<Encoded, Unsupported>;

    /// Returns the body to ask with once more if the upstream has refused
    /// (with 400) a wish that can be left out without changing what is asked.
    fn amended(&self, body: &[u8], error: &UpstreamError) -> Option<Bytes> {
        let _ = (body, error);
        None
    }

    /// Returns where the upstream lists its models, as it is appended to the
    /// base URL.
    fn models_suffix(&self) -> &'static str;

    /// Reads the names from that list.
    ///
    /// # Errors
    /// It is no such list.
    fn read_models(&self, body: &[u8]) -> serde_json::Result<Vec<String>>;
}

/// Turns one answer into OpenAI's. Made for one try, used for one answer.
pub trait Decoder: Send {
    /// Returns whether a success with this header is a stream, if a stream was
    /// asked for.
    fn is_stream(&self, headers: &HeaderMap) -> bool;

    /// Takes a piece of a stream, cut anywhere, and appends the events that are
    /// whole with it. Also after an error, what was appended is good.
    ///
    /// # Errors
    /// The stream cannot go on.
    fn push(&mut self, piece: &[u8], out: &mut BytesMut) -> Result<(), DecodeError>;

    /// Notes that the stream has ended, and appends what had waited for more.
    ///
    /// # Errors
    /// As with [`Self::push`].
    fn end(&mut self, out: &mut BytesMut) -> Result<(), DecodeError>;

    /// Turns a whole answer, which is a JSON object and no error.
    ///
    /// # Errors
    /// It is no answer to what was asked.
    fn whole(&mut self, body: &[u8]) -> Result<Bytes, DecodeError>;

    /// Returns whether the upstream has read less of the prompt than it was
    /// sent. Known when the answer is at its end; only if it is certain.
    fn prompt_was_cut(&self) -> bool;
}

/// What is asked, of whom.
pub struct Call<'a> {
    /// The client's request.
    pub request: &'a ApiRequest,
    /// What the model is called there.
    pub model: &'a str,
    /// What the YAML says of the upstream.
    pub upstream: &'a Upstream,
    /// What keeps the caller's prompts apart in the upstream's cache.
    pub cache_salt: Option<&'a str>,
    /// Returns the context to ask for, in tokens, if this many should fit.
    pub context: &'a dyn Fn(u32) -> u32,
    /// The most bytes of an answer that may be held until an event is whole.
    pub event_bytes_max: usize,
}

/// A request in an upstream's words, and how its answer is to be read.
pub struct Encoded {
    /// What is appended to the base URL: `/chat/completions`.
    pub suffix: &'static str,
    /// What the answer should be, for `Accept`.
    pub accept: &'static str,
    /// The body, which is JSON.
    pub body: Bytes,
    /// Whether the answer states usage that the client did not ask for.
    pub hide_usage: bool,
    /// Reads the answer; `None` if that is OpenAI's already.
    pub decoder: Option<Box<dyn Decoder>>,
}

/// What an upstream's dialect has no words for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// What a client is told of it that nobody else could serve: 400 or 501.
    status: StatusCode,
    message: Cow<'static, str>,
    param: Option<&'static str>,
}

impl Unsupported {
    /// A whole call that the upstream does not have.
    pub fn call() -> Self {
        Self {
            status: StatusCode::NOT_IMPLEMENTED,
            message: "the model server does not support this call".into(),
            param: None,
        }
    }

    /// A member of the request that it cannot be told.
    pub fn param(param: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
            param: Some(param),
        }
    }

    /// Returns what the client is told if nobody else could serve it.
    pub fn to_error(&self) -> Error {
        let error = Error::refused(self.status, "unsupported_by_upstream", self.message.clone());
        match self.param {
            Some(param) => error.param(param),
            None => error,
        }
    }
}

/// Why an answer could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A line is longer than an event may be.
    #[error("a line is longer than {0} bytes")]
    TooLong(usize),
    /// It is not what the dialect says; never repeats the answer.
    #[error("{0}")]
    Malformed(&'static str),
}

/// One line of the list.
pub struct Entry {
    /// What it is called in the YAML.
    pub name: config::Dialect,
    /// How it is spoken.
    pub dialect: &'static dyn Dialect,
}

/// Every dialect, the default first.
pub const DIALECTS: &[Entry] = &[
    Entry {
        name: config::Dialect::Openai,
        dialect: &openai::Openai,
    },
    Entry {
        name: config::Dialect::Ollama,
        dialect: &ollama::Ollama,
    },
];

/// Returns the dialect that an upstream is spoken to in.
pub fn of(upstream: &Upstream) -> &'static dyn Dialect {
    let entry = DIALECTS.iter().find(|entry| entry.name == upstream.dialect);
    entry.map_or(&openai::Openai, |entry| entry.dialect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_yaml_has_its_line() {
        for name in [config::Dialect::Openai, config::Dialect::Ollama] {
            let lines = DIALECTS.iter().filter(|entry| entry.name == name);
            assert_eq!(lines.count(), 1, "{name:?}");
        }
        assert_eq!(DIALECTS[0].name, config::Dialect::default());
    }
}
