//! One dialogue with its answer → one line of JSON.

use std::borrow::Cow;

use memchr::memmem;
use serde::Serialize;

use super::{Dialogue, Rewrite, Tokens};

/// What is known of an exchange beside its words. The fields and their types
/// are the same on every line, since loaders guess the columns from the first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Meta {
    /// The id of the request, as in its answer's `x-request-id`.
    pub request_id: String,
    /// When it ended: RFC 3339 with milliseconds.
    pub ts: String,
    /// Which call it was: `chat_completions`, `completions`, `responses`.
    pub endpoint: String,
    /// The model that the client asked for.
    pub model: String,
    /// The model that the answer names.
    pub answer_model: String,
    /// The upstream that answered; empty if none did.
    pub upstream: String,
    /// Its group.
    pub group: String,
    /// The name of the caller's key; `-` without one.
    pub key: String,
    /// Whether the answer was streamed.
    pub streamed: bool,
    /// The index of the choice.
    pub choice: u64,
    /// Why the answer ended; empty if nobody said so.
    pub finish_reason: String,
    /// How the exchange ended: `success`, `incomplete`, `client_closed`,
    /// `client_error`, `server_error`.
    pub outcome: String,
    /// Whether the answer is not whole.
    pub partial: bool,
    /// The code of the error; empty without one.
    pub error: String,
    /// The status that the client was told.
    pub status: u16,
    /// How often another upstream went on with the answer.
    pub takeovers: u32,
    /// How many tries at upstreams it took.
    pub attempts: u64,
    /// Whether the route's fallback answered.
    pub fallback: bool,
    /// How long it took.
    pub timings: Timings,
    /// The tokens.
    pub usage: Tokens,
    /// What was said beside calls of tools.
    pub preamble: String,
}

impl Meta {
    /// Changes what clients and upstreams wrote. Ids stay: logs have them too.
    pub fn rewrite(&mut self, how: &dyn Rewrite) {
        /// Words of the API: others go by them.
        const ENDS: [&str; 5] = [
            "stop",
            "length",
            "tool_calls",
            "function_call",
            "content_filter",
        ];
        let mut texts = vec![&mut self.model, &mut self.answer_model, &mut self.error];
        if !ENDS.contains(&&*self.finish_reason) {
            texts.push(&mut self.finish_reason);
        }
        for text in texts {
            if let Cow::Owned(changed) = how.rewrite(text) {
                *text = changed;
            }
        }
    }
}

/// How long an exchange took, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Timings {
    /// In line for a free upstream.
    pub queued_ms: u64,
    /// From the header to the first event with content, or to the whole answer;
    /// 0 if there was none.
    pub first_token_ms: u64,
    /// From the header to the end.
    pub total_ms: u64,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The answer's id; with several choices, with the choice's index behind it.
    pub id: String,
    /// The turns, asking and answering in turn.
    pub conversations: Vec<Spoken>,
    /// What the system said.
    pub system: String,
    /// The tools, as a JSON list in a text; empty without any.
    pub tools: String,
    /// The files of the images, in the order of their marks in the turns.
    pub images: Vec<String>,
    /// Everything else.
    pub meta: Meta,
}

/// A turn as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Spoken {
    /// Who: `human`, `gpt`, `function_call`, `observation`.
    pub from: &'static str,
    /// What.
    pub value: String,
}

impl Line {
    /// Makes a line of a dialogue that ends with the answer.
    pub fn new(id: String, dialogue: Dialogue, mut meta: Meta) -> Self {
        meta.preamble = dialogue.preamble;
        Self {
            id,
            conversations: dialogue
                .turns
                .into_iter()
                .map(|turn| Spoken {
                    from: turn.who.as_str(),
                    value: turn.into_value(),
                })
                .collect(),
            system: dialogue.system,
            tools: dialogue.tools,
            images: dialogue.named,
            meta,
        }
    }

    /// Returns the line with its end, ready to be written at once.
    pub fn bytes(&self) -> Vec<u8> {
        // What is quoted is a little longer.
        let said: usize = self.conversations.iter().map(|turn| turn.value.len()).sum();
        let long = said + self.system.len() + self.tools.len();
        let mut json = Vec::with_capacity(1024 + long + long / 8);
        // Strings and numbers always serialise.
        if serde_json::to_writer(&mut json, self).is_err() {
            json.clear();
        }
        let mut line = on_one_line(json);
        line.push(b'\n');
        line
    }
}

/// Escapes what some readers take for the end of a line.
pub fn on_one_line(json: Vec<u8>) -> Vec<u8> {
    const ENDS: [(&str, &[u8]); 3] = [
        ("\u{2028}", b"\\u2028"),
        ("\u{2029}", b"\\u2029"),
        ("\u{85}", b"\\u0085"),
    ];
    ENDS.iter().fold(json, |json, (end, escaped)| {
        if memmem::find(&json, end.as_bytes()).is_none() {
            return json;
        }
        let mut out = Vec::with_capacity(json.len() + 64);
        let mut from = 0;
        for at in memmem::find_iter(&json, end.as_bytes()) {
            out.extend_from_slice(json.get(from..at).unwrap_or_default());
            out.extend_from_slice(escaped);
            from = at + end.len();
        }
        out.extend_from_slice(json.get(from..).unwrap_or_default());
        out
    })
}
