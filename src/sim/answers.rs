//! What a simulated model says: text that depends on the question alone, and
//! its shape on the wire, whole or event by event.
//!
//! One token is one word. Word 0 is the simulator's name, word 1 is `answers:`,
//! all others are drawn by a hash of the model's name and the last user message:
//! two simulators differ in the first word only, and any of them can go on with
//! what another began.
//!
//! **Invariant:** an event is rendered when it is sent: a stream costs the same
//! memory whatever its length.

use std::io::Write as _;

use serde_json::{Value as Json, json};

/// No word needs an escape in JSON.
const WORDS: [&str; 64] = [
    "amber", "anchor", "basin", "beacon", "birch", "bridge", "brook", "canal", "cedar", "chalk",
    "cliff", "cloud", "coast", "copper", "coral", "crane", "delta", "drift", "dune", "ember",
    "estuary", "falcon", "fern", "field", "fjord", "flint", "forest", "gorge", "granite", "grove",
    "harbor", "heron", "hill", "inlet", "island", "juniper", "kelp", "lagoon", "lake", "lantern",
    "ledge", "marsh", "meadow", "mill", "moss", "oak", "orchard", "otter", "pebble", "pine",
    "plain", "pond", "quarry", "reef", "ridge", "river", "shore", "slate", "spring", "stone",
    "tide", "valley", "willow", "wind",
];

/// The words of one answer; endless.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    name: String,
    seed: u64,
}

impl Text {
    /// `name` — what word 0 is; white space and what JSON escapes become `-`.
    pub(crate) fn new(name: &str, model: &str, question: &str) -> Self {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '-'
            }
        };
        Self {
            name: name.chars().map(plain).collect(),
            seed: hash(hash(OFFSET, model.as_bytes()), question.as_bytes()),
        }
    }

    /// Writes a word, with the space before it.
    pub(crate) fn push(&self, word: usize, out: &mut Vec<u8>) {
        match word {
            0 => out.extend_from_slice(self.name.as_bytes()),
            1 => out.extend_from_slice(b" answers:"),
            _ => {
                out.push(b' ');
                let drawn = mix(self.seed.wrapping_add(word as u64)) % 64;
                let drawn = usize::try_from(drawn).unwrap_or_default();
                out.extend_from_slice(WORDS.get(drawn).unwrap_or(&"stone").as_bytes());
                if word % 12 == 11 {
                    out.push(b'.');
                }
            }
        }
    }

    fn push_range(&self, first: usize, count: usize, out: &mut Vec<u8>) {
        (first..first + count).for_each(|word| self.push(word, out));
    }
}

const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, closed by a byte that no text holds.
pub(crate) fn hash(seed: u64, bytes: &[u8]) -> u64 {
    let step = |state: u64, &byte: &u8| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    step(bytes.iter().fold(seed, step), &0xff)
}

/// Spreads neighbouring numbers over all 64 bits (the finaliser of SplitMix64).
pub(crate) fn mix(number: u64) -> u64 {
    let number = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Which endpoint's shape an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
    Responses,
    /// Ollama's own: lines of JSON.
    NativeChat,
    NativeGenerate,
}

impl Shape {
    /// Whether it is Ollama's own.
    pub(crate) const fn is_native(self) -> bool {
        matches!(self, Self::NativeChat | Self::NativeGenerate)
    }
}

/// A call of a function instead of text.
#[derive(Clone, Debug)]
pub(crate) struct ToolCall {
    pub(crate) name: String,
    /// The arguments' JSON.
    pub(crate) arguments: String,
}

/// The pieces that a call's arguments are streamed in, in bytes.
const PIECE_BYTES: usize = 8;

impl ToolCall {
    fn pieces(&self) -> usize {
        self.arguments.chars().count().div_ceil(PIECE_BYTES)
    }

    fn piece(&self, index: usize) -> String {
        let chars = self.arguments.chars();
        chars.skip(index * PIECE_BYTES).take(PIECE_BYTES).collect()
    }
}

/// When `usage` is part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    /// Never.
    Hidden,
    /// In a last event without choices.
    Last,
    /// In every event, and in a last one.
    Always,
}

/// All that is decided about an answer before its first byte.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) shape: Shape,
    pub(crate) id: u64,
    pub(crate) created: u64,
    /// As JSON, quotes included.
    pub(crate) model: String,
    pub(crate) text: Text,
    /// The words that were there before: a continuation begins after them.
    pub(crate) first_word: usize,
    /// The tokens of each choice.
    pub(crate) tokens: usize,
    /// Whether `tokens` is less than the answer's natural length.
    pub(crate) truncated: bool,
    pub(crate) choices: usize,
    pub(crate) tool: Option<ToolCall>,
    pub(crate) prompt_tokens: usize,
    pub(crate) usage: Usage,
    /// Whether Ollama's last line says nothing of tokens.
    pub(crate) no_counts: bool,
}

/// Writes into memory, which cannot fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {
        write!($out, $($arg)*).expect("a Vec takes all that is written")
    };
}

impl Answer {
    /// Returns how many tokens one choice has.
    pub(crate) fn tokens_each(&self) -> usize {
        if self.shape.is_native() && self.tool.is_some() {
            return 1; // whole, in one line
        }
        self.tool
            .as_ref()
            .map_or(self.tokens, |tool| tool.pieces() + 1)
    }

    /// Returns how many events the stream has, the final `[DONE]` not counted.
    pub(crate) fn events(&self) -> usize {
        let (before, after) = self.around();
        before + self.tokens_each() * self.choices + after
    }

    /// The events before the first token and after the last.
    fn around(&self) -> (usize, usize) {
        let usage = usize::from(self.usage != Usage::Hidden);
        match self.shape {
            Shape::Chat => (self.choices, self.choices + usage),
            Shape::Completion => (0, self.choices + usage),
            Shape::Responses => (4, 4),
            Shape::NativeChat | Shape::NativeGenerate => (0, 1),
        }
    }

    /// Returns which event carries the first token.
    pub(crate) fn first_token_event(&self) -> usize {
        self.around().0
    }

    /// Returns how many tokens must have been thought of before this event.
    pub(crate) fn tokens_until(&self, event: usize) -> usize {
        let (before, _) = self.around();
        match event.checked_sub(before) {
            None => 1,
            Some(after) => (after / self.choices.max(1) + 1).min(self.tokens_each()),
        }
    }

    /// Returns the text that ends a stream, if its shape has one.
    pub(crate) fn done(&self) -> Option<&'static [u8]> {
        let ends_so = self.shape != Shape::Responses && !self.shape.is_native();
        ends_so.then_some(b"[DONE]")
    }

    /// Writes the JSON of an event; returns its `event:` name, if it has one.
    pub(crate) fn render(&self, event: usize, out: &mut Vec<u8>) -> Option<&'static str> {
        let (before, _) = self.around();
        let content = self.tokens_each() * self.choices;
        if self.shape == Shape::Responses {
            return Some(self.render_typed(event, out));
        }
        if self.shape.is_native() {
            self.render_line(event, out);
            return None;
        }
        let Some(index) = event.checked_sub(before) else {
            self.open(out);
            let content = if self.tool.is_some() { "null" } else { "\"\"" };
            put!(
                out,
                r#""choices":[{{"index":{event},"delta":{{"role":"assistant","content":{content}}},"logprobs":null,"finish_reason":null}}]"#
            );
            self.close(0, out);
            return None;
        };
        self.open(out);
        let choices = self.choices.max(1);
        if index < content {
            let (token, choice) = (index / choices, index % choices);
            put!(out, r#""choices":[{{"index":{choice},"#);
            self.render_token(token, out);
            out.extend_from_slice(br#","logprobs":null,"finish_reason":null}]"#);
            self.close(token + 1, out);
        } else if index < content + choices {
            let (choice, finish) = (index - content, self.finish());
            let delta = match self.shape {
                Shape::Chat => r#""delta":{}"#,
                _ => r#""text":"""#,
            };
            put!(
                out,
                r#""choices":[{{"index":{choice},{delta},"logprobs":null,"finish_reason":"{finish}"}}]"#
            );
            self.close(self.tokens_each(), out);
        } else {
            out.extend_from_slice(br#""choices":[],"#);
            self.push_usage(self.tokens_each(), out);
            out.push(b'}');
        }
        None
    }

    /// Writes an event like any other, whose content is `content` (plain text
    /// that needs no escape).
    pub(crate) fn render_content(&self, content: &[u8], out: &mut Vec<u8>) -> Option<&'static str> {
        if self.shape == Shape::Responses {
            out.extend_from_slice(br#"{"type":"response.output_text.delta","item_id":"msg","output_index":0,"content_index":0,"delta":""#);
            out.extend_from_slice(content);
            out.extend_from_slice(b"\"}");
            return Some("response.output_text.delta");
        }
        if self.shape.is_native() {
            self.open_line(content, None, false, out);
            out.push(b'}');
            return None;
        }
        self.open(out);
        let field: &[u8] = match self.shape {
            Shape::Chat => br#""delta":{"content":""#,
            _ => br#""text":""#,
        };
        out.extend_from_slice(br#""choices":[{"index":0,"#);
        out.extend_from_slice(field);
        out.extend_from_slice(content);
        out.push(b'"');
        if self.shape == Shape::Chat {
            out.push(b'}');
        }
        out.extend_from_slice(br#","logprobs":null,"finish_reason":null}]}"#);
        None
    }

    /// Writes what a token adds: `"delta":{…}` or `"text":"…"`.
    fn render_token(&self, token: usize, out: &mut Vec<u8>) {
        match (&self.tool, self.shape) {
            (Some(tool), _) if token == 0 => {
                let name = quoted(&tool.name);
                put!(
                    out,
                    r#""delta":{{"tool_calls":[{{"index":0,"id":"call_{:016x}","type":"function","function":{{"name":{name},"arguments":""}}}}]}}"#,
                    self.id
                );
            }
            (Some(tool), _) => {
                let piece = quoted(&tool.piece(token - 1));
                put!(
                    out,
                    r#""delta":{{"tool_calls":[{{"index":0,"function":{{"arguments":{piece}}}}}]}}"#
                );
            }
            (None, Shape::Chat) => {
                out.extend_from_slice(br#""delta":{"content":""#);
                self.text.push(self.first_word + token, out);
                out.extend_from_slice(b"\"}");
            }
            (None, _) => {
                out.extend_from_slice(br#""text":""#);
                self.text.push(self.first_word + token, out);
                out.push(b'"');
            }
        }
    }

    fn open(&self, out: &mut Vec<u8>) {
        let (prefix, object) = match self.shape {
            Shape::Chat => ("chatcmpl", "chat.completion.chunk"),
            _ => ("cmpl", "text_completion"),
        };
        put!(
            out,
            r#"{{"id":"{prefix}-{:016x}","object":"{object}","created":{},"model":{},"#,
            self.id,
            self.created,
            self.model
        );
    }

    fn close(&self, tokens: usize, out: &mut Vec<u8>) {
        if self.usage == Usage::Always {
            out.push(b',');
            self.push_usage(tokens, out);
        }
        out.push(b'}');
    }

    fn push_usage(&self, tokens: usize, out: &mut Vec<u8>) {
        let (prompt, completion) = (self.prompt_tokens, tokens * self.choices);
        let total = prompt + completion;
        put!(
            out,
            r#""usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{total}}}"#
        );
    }

    fn finish(&self) -> &'static str {
        match (&self.tool, self.truncated) {
            (Some(_), _) => "tool_calls",
            (None, true) => "length",
            (None, false) => "stop",
        }
    }

    /// Returns all of the text of one choice.
    pub(crate) fn whole_text(&self) -> String {
        let mut out = Vec::new();
        self.text.push_range(self.first_word, self.tokens, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Returns the answer as one JSON body, for a client that does not stream.
    pub(crate) fn whole(&self) -> Vec<u8> {
        if self.shape == Shape::Responses {
            return self.response("completed", true).to_string().into_bytes();
        }
        if self.shape.is_native() {
            return self.whole_line();
        }
        let mut out = Vec::with_capacity(256 + self.tokens * self.choices * 8);
        let (prefix, object) = match self.shape {
            Shape::Chat => ("chatcmpl", "chat.completion"),
            _ => ("cmpl", "text_completion"),
        };
        put!(
            out,
            r#"{{"id":"{prefix}-{:016x}","object":"{object}","created":{},"model":{},"choices":["#,
            self.id,
            self.created,
            self.model
        );
        for choice in 0..self.choices {
            if choice > 0 {
                out.push(b',');
            }
            put!(out, r#"{{"index":{choice},"#);
            match (&self.tool, self.shape) {
                (Some(tool), _) => {
                    let (name, arguments) = (quoted(&tool.name), quoted(&tool.arguments));
                    put!(
                        out,
                        r#""message":{{"role":"assistant","content":null,"tool_calls":[{{"id":"call_{:016x}","type":"function","function":{{"name":{name},"arguments":{arguments}}}}}]}}"#,
                        self.id
                    );
                }
                (None, Shape::Chat) => {
                    out.extend_from_slice(br#""message":{"role":"assistant","content":""#);
                    self.text.push_range(self.first_word, self.tokens, &mut out);
                    out.extend_from_slice(b"\"}");
                }
                (None, _) => {
                    out.extend_from_slice(br#""text":""#);
                    self.text.push_range(self.first_word, self.tokens, &mut out);
                    out.push(b'"');
                }
            }
            put!(
                out,
                r#","logprobs":null,"finish_reason":"{}"}}"#,
                self.finish()
            );
        }
        out.push(b']');
        if self.usage != Usage::Hidden {
            out.push(b',');
            self.push_usage(self.tokens_each(), &mut out);
        }
        out.push(b'}');
        out
    }

    /// The typed events of the Responses API, in the order of its reference.
    fn render_typed(&self, event: usize, out: &mut Vec<u8>) -> &'static str {
        let (tokens, item) = (self.tokens_each(), self.item_id());
        let place = json!({ "item_id": item, "output_index": 0, "content_index": 0 });
        let with = |fields: Json| {
            let mut all = place.clone();
            if let (Some(all), Json::Object(fields)) = (all.as_object_mut(), fields) {
                all.extend(fields);
            }
            all
        };
        let empty = json!({ "type": "output_text", "text": "", "annotations": [] });
        let (name, mut json) = match event.checked_sub(4 + tokens) {
            None if event >= 4 => {
                let mut word = Vec::new();
                self.text.push(self.first_word + event - 4, &mut word);
                let delta = String::from_utf8_lossy(&word);
                (
                    "response.output_text.delta",
                    with(json!({ "delta": delta })),
                )
            }
            None => match event {
                0 => (
                    "response.created",
                    json!({ "response": self.response("in_progress", false) }),
                ),
                1 => (
                    "response.in_progress",
                    json!({ "response": self.response("in_progress", false) }),
                ),
                2 => (
                    "response.output_item.added",
                    json!({ "output_index": 0, "item": self.item("in_progress", false) }),
                ),
                _ => (
                    "response.content_part.added",
                    with(json!({ "part": empty })),
                ),
            },
            Some(0) => (
                "response.output_text.done",
                with(json!({ "text": self.whole_text() })),
            ),
            Some(1) => (
                "response.content_part.done",
                with(json!({ "part": self.part() })),
            ),
            Some(2) => (
                "response.output_item.done",
                json!({ "output_index": 0, "item": self.item("completed", true) }),
            ),
            Some(_) if self.truncated => (
                "response.incomplete",
                json!({ "response": self.response("incomplete", true) }),
            ),
            Some(_) => (
                "response.completed",
                json!({ "response": self.response("completed", true) }),
            ),
        };
        if let Some(fields) = json.as_object_mut() {
            fields.insert("type".to_owned(), name.into());
            fields.insert("sequence_number".to_owned(), event.into());
        }
        put!(out, "{json}");
        name
    }

    fn item_id(&self) -> String {
        format!("msg_{:016x}", self.id)
    }

    fn part(&self) -> Json {
        json!({ "type": "output_text", "text": self.whole_text(), "annotations": [] })
    }

    fn item(&self, status: &str, with_content: bool) -> Json {
        let content = if with_content {
            vec![self.part()]
        } else {
            Vec::new()
        };
        json!({
            "id": self.item_id(), "type": "message", "status": status,
            "role": "assistant", "content": content,
        })
    }

    fn response(&self, status: &str, ended: bool) -> Json {
        let status = if ended && self.truncated {
            "incomplete"
        } else {
            status
        };
        let output = if ended {
            vec![self.item("completed", true)]
        } else {
            Vec::new()
        };
        let why = (ended && self.truncated).then(|| json!({ "reason": "max_output_tokens" }));
        let usage = (ended && self.usage != Usage::Hidden).then(|| {
            json!({
                "input_tokens": self.prompt_tokens,
                "input_tokens_details": { "cached_tokens": 0 },
                "output_tokens": self.tokens,
                "output_tokens_details": { "reasoning_tokens": 0 },
                "total_tokens": self.prompt_tokens + self.tokens,
            })
        });
        let model: Json = serde_json::from_str(&self.model).unwrap_or_default();
        json!({
            "id": format!("resp_{:016x}", self.id), "object": "response",
            "created_at": self.created, "status": status, "error": null,
            "incomplete_details": why, "model": model, "output": output,
            "parallel_tool_calls": true, "tool_choice": "auto", "tools": [], "usage": usage,
        })
    }
}

/// Returns a text as JSON, quotes included.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string is always JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(shape: Shape) -> Answer {
        Answer {
            shape,
            id: 7,
            created: 1,
            model: "\"demo\"".to_owned(),
            text: Text::new("gpu 1", "demo", "hello"),
            first_word: 0,
            tokens: 5,
            truncated: false,
            choices: 1,
            tool: None,
            prompt_tokens: 3,
            usage: Usage::Last,
            no_counts: false,
        }
    }

    fn events(answer: &Answer) -> Vec<Json> {
        (0..answer.events())
            .map(|event| {
                let mut out = Vec::new();
                answer.render(event, &mut out);
                serde_json::from_slice(&out).unwrap()
            })
            .collect()
    }

    #[test]
    fn two_simulators_differ_in_the_first_word_only() {
        let one = answer(Shape::Chat).whole_text();
        let mut other = answer(Shape::Chat);
        other.text = Text::new("gpu-2", "demo", "hello");
        let other = other.whole_text();
        assert_eq!(
            one.split_once(' ').unwrap().1,
            other.split_once(' ').unwrap().1
        );
        assert!(one.starts_with("gpu-1 answers: ") && other.starts_with("gpu-2 "));
        let elsewhere = Text::new("gpu-1", "demo", "goodbye");
        let mut words = Vec::new();
        elsewhere.push_range(0, 5, &mut words);
        assert_ne!(one.as_bytes(), words);
    }

    #[test]
    fn the_deltas_are_the_whole_text_in_every_shape() {
        for shape in [Shape::Chat, Shape::Completion, Shape::Responses] {
            let answer = answer(shape);
            let text: String = events(&answer)
                .iter()
                .filter_map(|event| {
                    event["choices"][0]["delta"]["content"]
                        .as_str()
                        .or(event["choices"][0]["text"].as_str())
                        .or(event["delta"].as_str())
                })
                .collect();
            assert_eq!(text, answer.whole_text(), "{shape:?}");
            assert!(
                answer
                    .whole()
                    .windows(text.len())
                    .any(|w| w == text.as_bytes())
            );
        }
    }

    #[test]
    fn several_choices_take_turns_and_usage_counts_them_all() {
        let mut answer = answer(Shape::Chat);
        answer.choices = 3;
        let events = events(&answer);
        let of = |index: u64| {
            events
                .iter()
                .filter(|e| e["choices"][0]["index"] == index)
                .count()
        };
        assert_eq!([of(0), of(1), of(2)], [7, 7, 7]);
        assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 15);
        assert_eq!(answer.tokens_until(0), 1);
        assert_eq!(answer.tokens_until(3 + 3 * 4), 5);
        assert_eq!(answer.tokens_until(answer.events() - 1), 5);
    }

    #[test]
    fn a_tool_call_arrives_in_pieces_that_join_to_its_arguments() {
        let mut answer = answer(Shape::Chat);
        let arguments = r#"{"city":"amber \"ü\"","n":1}"#;
        answer.tool = Some(ToolCall {
            name: "weather".to_owned(),
            arguments: arguments.to_owned(),
        });
        let events = events(&answer);
        let pieces: Vec<&str> = events
            .iter()
            .filter_map(|e| {
                e["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str()
            })
            .collect();
        assert!(pieces.len() > 3);
        assert_eq!(pieces.concat(), arguments);
        let whole: Json = serde_json::from_slice(&answer.whole()).unwrap();
        let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!(call["arguments"], arguments);
        assert_eq!(whole["choices"][0]["finish_reason"], "tool_calls");
    }

    #[test]
    fn the_responses_stream_is_numbered_and_ends_completed() {
        let events = events(&answer(Shape::Responses));
        for (number, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], number);
        }
        assert_eq!(events[0]["type"], "response.created");
        let last = events.last().unwrap();
        assert_eq!(last["type"], "response.completed");
        assert_eq!(last["response"]["usage"]["total_tokens"], 8);
    }
}
