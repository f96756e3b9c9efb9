//! Lines of JSON → events: each line of Ollama's becomes a chunk of OpenAI's as
//! soon as it is whole.
//!
//! **Invariant:** the same bytes give the same events, however they are cut into
//! pieces; and `[DONE]` follows a line that says `done`, nothing else.

use bytes::{BufMut, BytesMut};
use serde_json::{Map, Value, json};

use super::{Asked, answer::Line};
use crate::{dialects::DecodeError, openai::Endpoint};

/// A stream on its way.
pub(super) struct Stream {
    asked: Asked,
    /// The beginning of every event, up to `"choices":`.
    opening: String,
    /// The line that has begun.
    partial: Vec<u8>,
    line_bytes_max: usize,
    /// Whether the role has been told.
    begun: bool,
    /// How many tools were called so far.
    calls: usize,
    /// It has said `done`, or an error: what follows is not looked at.
    ended: bool,
    /// Tokens of the prompt that were read; 0 until it says so.
    prompt_tokens: u64,
    /// Of those, from a cache.
    cached_tokens: u64,
}

impl Stream {
    pub(super) fn new(asked: &Asked, line_bytes_max: usize) -> Self {
        let object = match asked.endpoint {
            Endpoint::ChatCompletions => "chat.completion.chunk",
            _ => "text_completion",
        };
        let model = Value::from(asked.model.as_str());
        let opening = format!(
            r#"data: {{"id":"{}","object":"{object}","created":{},"model":{model},"choices":"#,
            asked.id, asked.created
        );
        Self {
            asked: asked.clone(),
            opening,
            partial: Vec::new(),
            line_bytes_max,
            begun: false,
            calls: 0,
            ended: false,
            prompt_tokens: 0,
            cached_tokens: 0,
        }
    }

    pub(super) fn is_cut(&self, asked: &Asked) -> bool {
        asked
            .size
            .was_cut(asked.num_ctx, self.prompt_tokens, self.cached_tokens)
    }

    pub(super) fn push(&mut self, piece: &[u8], out: &mut BytesMut) -> Result<(), DecodeError> {
        let mut lines = piece.split(|&byte| byte == b'\n');
        // What follows the last line end is the beginning of the next line.
        let rest = lines.next_back().unwrap_or_default();
        for line in lines {
            if self.partial.is_empty() {
                self.line(line, out)?;
            } else {
                self.hold(line)?;
                let whole = std::mem::take(&mut self.partial);
                self.line(&whole, out)?;
            }
        }
        self.hold(rest)
    }

    pub(super) fn end(&mut self, out: &mut BytesMut) -> Result<(), DecodeError> {
        // The last line may lack its end; if it was cut off, it is no JSON.
        let last = std::mem::take(&mut self.partial);
        self.line(&last, out)
    }

    fn hold(&mut self, piece: &[u8]) -> Result<(), DecodeError> {
        self.check_length(self.partial.len() + piece.len())?;
        if !self.ended {
            self.partial.extend_from_slice(piece);
        }
        Ok(())
    }

    fn check_length(&self, bytes: usize) -> Result<(), DecodeError> {
        if bytes > self.line_bytes_max && !self.ended {
            return Err(DecodeError::TooLong(self.line_bytes_max));
        }
        Ok(())
    }

    fn line(&mut self, line: &[u8], out: &mut BytesMut) -> Result<(), DecodeError> {
        let line = line.trim_ascii();
        if line.is_empty() || self.ended {
            return Ok(());
        }
        self.check_length(line.len())?;
        let mut line = Line::read(line)?;
        if let Some(error) = line.error.take() {
            self.ended = true;
            let error = match error {
                Value::String(message) => {
                    json!({ "message": message, "type": "api_error", "param": null, "code": null })
                }
                other => other,
            };
            out.put_slice(format!("data: {}\n\n", json!({ "error": error })).as_bytes());
            return Ok(());
        }
        match self.asked.endpoint {
            Endpoint::ChatCompletions => self.chat(&mut line, out),
            _ => self.completion(&line, out),
        }
        if line.done {
            self.ended = true;
            self.prompt_tokens = line.prompt_tokens();
            self.cached_tokens = line.cached_tokens();
            self.put(&format!(r#"[],"usage":{}}}"#, line.usage()), out);
            out.put_slice(b"data: [DONE]\n\n");
        }
        Ok(())
    }

    fn chat(&mut self, line: &mut Line, out: &mut BytesMut) {
        if !std::mem::replace(&mut self.begun, true) {
            let role = json!({ "role": "assistant", "content": "" });
            self.put_choice("delta", &role, None, None, out);
        }
        let mut delta = Map::new();
        if let Some(thinking) = line.message.thinking.take() {
            delta.insert("reasoning_content".to_owned(), thinking.into());
        }
        if let Some(content) = line.message.content.take() {
            delta.insert("content".to_owned(), content.into());
        }
        let calls = line.tool_calls(&self.asked, self.calls);
        if !calls.is_empty() {
            self.calls += calls.len();
            delta.insert("tool_calls".to_owned(), calls.into());
        }
        let logprobs = line.logprobs.take();
        if !delta.is_empty() {
            let logprobs = logprobs.as_ref().map(|raw| raw.get());
            self.put_choice("delta", &delta.into(), logprobs, None, out);
        }
        if line.done {
            let reason = line.finish_reason(self.calls > 0);
            self.put_choice("delta", &json!({}), None, Some(reason), out);
        }
    }

    fn completion(&self, line: &Line, out: &mut BytesMut) {
        let text = line.response.as_deref().unwrap_or_default();
        if !text.is_empty() {
            self.put_choice("text", &text.into(), None, None, out);
        }
        if line.done {
            let reason = line.finish_reason(false);
            self.put_choice("text", &"".into(), None, Some(reason), out);
        }
    }

    fn put_choice(
        &self,
        key: &str,
        value: &Value,
        logprobs: Option<&str>,
        finish: Option<&str>,
        out: &mut BytesMut,
    ) {
        let logprobs = match logprobs {
            Some(list) => format!(r#"{{"content":{list}}}"#),
            None => "null".to_owned(),
        };
        let finish = Value::from(finish);
        let rest = format!(
            r#"[{{"index":0,"{key}":{value},"logprobs":{logprobs},"finish_reason":{finish}}}]}}"#
        );
        self.put(&rest, out);
    }

    fn put(&self, rest: &str, out: &mut BytesMut) {
        out.put_slice(self.opening.as_bytes());
        out.put_slice(rest.as_bytes());
        out.put_slice(b"\n\n");
    }
}
