//! An answer that broke off, gone on with elsewhere: what of it is there, how
//! another server is asked for the rest, and how that rest is made to read like
//! the same answer.
//!
//! [`Partial`] collects what the client has been sent, [`Partial::ask`] makes
//! the request for the rest, [`Sequel`] fits the events that come of it.
//! Measured on real servers: a model goes on exactly where it broke off only
//! after a whole token, that is, after a whole delivered event; and many chat
//! templates trim a message, so that it goes out without its trailing white
//! space, which is then owed by the rest.
//!
//! **Invariant:** nothing that the client has is sent to it again, and nothing
//! is asked for that was not delivered: the text of a partial is that of whole
//! events, in their order.

mod ask;
mod chunk;
mod sequel;
#[cfg(test)]
mod tests;

use bytes::Bytes;

pub use sequel::{Heard, Sequel, Unfitting};

use self::{ask::unfit, chunk::Chunk};
use super::{
    ApiRequest, Edit, Endpoint, Frame, Usage, cursor::Cursor, estimate::prompt_tokens, json,
};

/// Why nobody can go on with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Not a stream of chat or of text completions.
    Endpoint,
    /// More than one choice.
    Choices,
    /// Log probabilities or token ids are told, or were asked for.
    Logprobs,
    /// The answer has to follow a grammar.
    Structured,
    /// A tool call has begun, or is forced.
    ToolCall,
    /// A refusal has begun.
    Refusal,
    /// Sound, images, or content that is no plain text.
    NotText,
    /// The prompt is more than one text, or comes back in the answer.
    Prompt,
    /// The client itself began the answer in a way that servers read apart.
    Prefill,
    /// Reasoning has begun, and is not over or is all there is.
    Reasoning,
    /// It has its finish reason.
    Finished,
    /// It is longer than what is remembered of an answer.
    TooLong,
    /// There was no room for it.
    NoRoom,
}

impl Obstacle {
    /// Returns the word for logs: `tool_call`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::Choices => "choices",
            Self::Logprobs => "logprobs",
            Self::Structured => "structured",
            Self::ToolCall => "tool_call",
            Self::Refusal => "refusal",
            Self::NotText => "not_text",
            Self::Prompt => "prompt",
            Self::Prefill => "prefill",
            Self::Reasoning => "reasoning",
            Self::Finished => "finished",
            Self::TooLong => "too_long",
            Self::NoRoom => "no_room",
        }
    }
}

/// What makes the chunks of one answer one, as the first upstream wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Identity {
    id: Option<Bytes>,
    created: Option<Bytes>,
    model: Option<Bytes>,
    fingerprint: Option<Bytes>,
}

/// What the client has of a streamed answer.
#[derive(Debug)]
pub struct Partial {
    endpoint: Endpoint,
    /// The text as JSON writes it, escapes and all, without quotes: so pieces
    /// can be put together without being read.
    text: Vec<u8>,
    /// The most of `text` that is remembered, in bytes.
    text_max: usize,
    obstacle: Option<Obstacle>,
    identity: Option<Identity>,
    has_role: bool,
    /// How many events brought something new: nearly the tokens.
    deltas: u64,
    /// How many of them, at the end, brought nothing but white space.
    blank: u64,
    told: Option<Usage>,
    reasoned: bool,
    /// Whether the last event that brought something brought reasoning.
    is_reasoning: bool,
}

/// What is to be done about an answer that broke off.
#[derive(Debug)]
pub enum Rest {
    /// Ask for the rest.
    Ask(Box<Ask>),
    /// There is no rest: it has as many tokens as the client wished for.
    Nothing,
}

/// How another upstream is asked for the rest.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The client's request with the partial answer in it.
    pub request: ApiRequest,
    /// Whether the upstream must be able to continue; without it the request is
    /// an ordinary one.
    pub continues: bool,
    /// Fits the answer.
    pub sequel: Sequel,
}

impl Ask {
    /// Returns a request that a server refuses if it knows how to go on with an
    /// answer: to end the last message and to go on with it. One that does not
    /// know takes it for an ordinary one, of one token.
    pub fn contradiction(&self) -> Option<ApiRequest> {
        let mut edits = vec![
            Edit::set("add_generation_prompt", &b"true"[..]),
            Edit::set("stream", &b"false"[..]),
            Edit::remove("stream_options"),
            Edit::remove("min_tokens"),
        ];
        edits.extend(self.request.max_tokens_cap(1));
        let raw = self.request.edited(&edits);
        ApiRequest::parse(self.request.endpoint, raw, usize::MAX).ok()
    }
}

impl Partial {
    /// Begins an answer to this request, of whose text at most `text_max` bytes
    /// (with the escapes of JSON) are remembered.
    pub fn new(request: &ApiRequest, text_max: usize) -> Self {
        Self {
            endpoint: request.endpoint,
            text: Vec::new(),
            text_max,
            obstacle: unfit(request),
            identity: None,
            has_role: false,
            deltas: 0,
            blank: 0,
            told: None,
            reasoned: false,
            is_reasoning: false,
        }
    }

    /// Adds an event that goes to the client; `news` says how many of its
    /// choices bring something new, `usage` what it tells of that.
    pub fn take(&mut self, frame: &Frame, news: u32, usage: Option<Usage>) {
        self.deltas += u64::from(news);
        self.told = usage.or(self.told);
        let (None, Some(data)) = (self.obstacle, &frame.data) else {
            return;
        };
        let chunk = Chunk::read(data);
        if self.identity.is_none() && chunk.is_chunk {
            let keep = |value: Option<&[u8]>| value.map(Bytes::copy_from_slice);
            self.identity = Some(Identity {
                id: keep(chunk.id),
                created: keep(chunk.created),
                model: keep(chunk.model),
                fingerprint: keep(chunk.fingerprint),
            });
        }
        self.has_role |= chunk.role;
        self.obstacle = chunk.obstacle;
        if chunk.reasoning {
            self.reasoned = true;
            self.is_reasoning = true;
            self.blank = 0;
        }
        if let Some(text) = chunk.text {
            self.is_reasoning = false;
            self.blank = if is_blank(text) { self.blank + 1 } else { 0 };
            self.add(text);
        }
        if chunk.finished {
            self.obstacle = self.obstacle.or(Some(Obstacle::Finished));
        }
        if self.obstacle.is_some() {
            self.text = Vec::new();
        }
    }

    /// Adds a JSON string.
    fn add(&mut self, text: &[u8]) {
        let inner = text.strip_prefix(b"\"").unwrap_or(text);
        let inner = inner.strip_suffix(b"\"").unwrap_or(inner);
        if self.text.len() + inner.len() > self.text_max {
            self.obstacle = Some(Obstacle::TooLong);
            return;
        }
        self.text.extend_from_slice(inner);
    }

    /// Returns how much memory the text takes, in bytes. Grows seldom, by more than
    /// is needed.
    pub fn text_bytes(&self) -> usize {
        self.text.capacity()
    }

    /// Forgets the text, for want of room: nobody can go on with it then.
    pub fn forget(&mut self) {
        self.text = Vec::new();
        self.obstacle = self.obstacle.or(Some(Obstacle::NoRoom));
    }

    /// Returns why nobody could go on, if it is known already.
    pub fn obstacle(&self) -> Option<Obstacle> {
        self.obstacle
    }

    /// Returns how many tokens the client has: as the upstream told, or an
    /// event each.
    pub fn tokens(&self) -> u64 {
        let told = self.told.map_or(0, |usage| usage.completion_tokens);
        told.max(self.deltas)
    }

    /// Returns the usage of what the client has: what the upstream told while it
    /// was sending, else an estimate. `request` is the client's.
    pub fn usage(&self, request: &ApiRequest) -> Option<Usage> {
        let mut usage = match self.told {
            Some(told) => told,
            None if self.deltas == 0 => return None,
            None => Usage {
                prompt_tokens: prompt_tokens(request),
                estimated: true,
                ..Usage::default()
            },
        };
        usage.completion_tokens = self.tokens();
        usage.total_tokens = usage.prompt_tokens.saturating_add(usage.completion_tokens);
        (usage.total_tokens > 0).then_some(usage)
    }

    /// Returns whether only a server that knows how to go on can be asked for the
    /// rest, as far as that is known without making that request: `false` if
    /// there may be no rest, or nothing to go on from. `request` is the client's.
    pub fn needs_one_who_knows(&self, request: &ApiRequest) -> bool {
        !is_blank(&self.text) && self.remaining_bounds(request, 0).is_some()
    }

    /// Returns how the rest is asked for. `request` is the client's.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn ask(&self, request: &ApiRequest) -> Result<Rest, Obstacle> {
        if let Some(obstacle) = self.obstacle {
            return Err(obstacle);
        }
        if self.is_reasoning {
            return Err(Obstacle::Reasoning);
        }
        let quoted_text = [b"\"", self.text.as_slice(), b"\""].concat();
        // Half a surrogate pair is no text.
        let text = json::text(&quoted_text).ok_or(Obstacle::NotText)?;
        let (sent, tokens) = match self.endpoint {
            // What is not sent is said once more.
            Endpoint::ChatCompletions => (text.trim_end(), self.tokens() - self.blank),
            // A prompt goes through no template.
            _ => (&*text, self.tokens()),
        };
        let Some(mut edits) = self.remaining_bounds(request, tokens) else {
            return Ok(Rest::Nothing);
        };
        if sent.is_empty() && self.reasoned {
            return Err(Obstacle::Reasoning);
        }
        if !sent.is_empty() {
            match self.endpoint {
                Endpoint::ChatCompletions => edits.extend(ask::with_turn(request, sent)?),
                _ => edits.push(ask::with_prompt(request, sent)?),
            }
        }
        let raw = request.edited(&edits);
        let asked = ApiRequest::parse(self.endpoint, raw, usize::MAX);
        let asked = asked.map_err(|_why| Obstacle::Prompt)?;
        Ok(Rest::Ask(Box::new(Ask {
            request: asked,
            continues: !sent.is_empty(),
            sequel: Sequel::of(self, &text, sent.len(), tokens),
        })))
    }

    /// Lowers every bound on tokens by those that are sent on; `None` if one is
    /// used up by those that were delivered.
    fn remaining_bounds(&self, request: &ApiRequest, had: u64) -> Option<Vec<Edit<'static>>> {
        let mut edits = Vec::new();
        let wish = |key| Cursor::new(request.get(key)?).integer();
        for &key in self.endpoint.token_keys() {
            if let Some(wish) = wish(key) {
                if wish <= self.tokens() {
                    return None;
                }
                let left = wish.saturating_sub(had).to_string();
                edits.push(Edit::set(key, left.into_bytes()));
            }
        }
        if let Some(least) = wish("min_tokens") {
            let left = least.saturating_sub(had).to_string();
            edits.push(Edit::set("min_tokens", left.into_bytes()));
        }
        Some(edits)
    }

    /// Returns the events that end an answer that has all its tokens: the finish
    /// reason `length`, the usage if it is wanted and known, and `[DONE]`.
    /// `request` is the client's.
    pub fn ending(&self, request: &ApiRequest) -> Vec<Frame> {
        let identity = self.identity.clone().unwrap_or_default();
        let mut head = String::from("{");
        for (key, value) in identity.members() {
            if let Some(value) = value {
                let value = String::from_utf8_lossy(value);
                head.push_str(&format!("\"{key}\":{value},"));
            }
        }
        let (object, empty) = match self.endpoint {
            Endpoint::ChatCompletions => ("chat.completion.chunk", r#""delta":{}"#),
            _ => ("text_completion", r#""text":"""#),
        };
        let finish = format!(
            "{head}\"object\":\"{object}\",\"choices\":[{{\"index\":0,{empty},\"finish_reason\":\"length\"}}]}}"
        );
        let mut frames = vec![Frame::of_data(finish.as_bytes())];
        let wanted = request.include_usage == Some(true);
        let usage = self.usage(request).filter(|usage| !usage.estimated);
        if let (true, Some(usage)) = (wanted, usage) {
            let usage = format!(
                "{head}\"object\":\"{object}\",\"choices\":[],\"usage\":{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{}}}}}",
                usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
            );
            frames.push(Frame::of_data(usage.as_bytes()));
        }
        frames.push(Frame::done());
        frames
    }
}

impl Identity {
    fn members(&self) -> [(&'static str, Option<&Bytes>); 4] {
        [
            ("id", self.id.as_ref()),
            ("created", self.created.as_ref()),
            ("model", self.model.as_ref()),
            ("system_fingerprint", self.fingerprint.as_ref()),
        ]
    }
}

/// Says whether a JSON string is nothing but white space.
fn is_blank(text: &[u8]) -> bool {
    let mut rest = text.strip_prefix(b"\"").unwrap_or(text);
    rest = rest.strip_suffix(b"\"").unwrap_or(rest);
    loop {
        rest = match rest {
            [] => return true,
            [b' ', rest @ ..] | [b'\\', b'n' | b'r' | b't', rest @ ..] => rest,
            _ => return false,
        };
    }
}
