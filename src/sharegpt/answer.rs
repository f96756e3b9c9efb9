//! A whole answer, or the events of a stream → what each choice says.

use std::{borrow::Cow, collections::BTreeMap};

use serde_json::Value;

use super::{
    dialogue::Call,
    events::EventLog,
    lenient::{parse, string, text_of},
    request::{Unreadable, call_of, calls_of, thought_in, thought_of, thought_of_item},
};
use crate::openai::{Endpoint, cursor::Cursor};

/// The most choices of an answer that are kept.
const CHOICES_MAX: usize = 1024;
/// The most calls of a choice that are kept.
const CALLS_MAX: usize = 1024;

/// One choice of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Its words.
    pub text: String,
    /// What else its content has: images, for one.
    pub parts: Vec<Value>,
    /// What was thought before it.
    pub thought: String,
    /// The calls of tools.
    pub calls: Vec<Call>,
    /// Why it ended; empty if nobody said so.
    pub finish_reason: String,
}

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Its id; may be empty.
    pub id: String,
    /// The model that it names; may be empty.
    pub model: String,
    /// The choices by their index.
    pub choices: BTreeMap<u64, Choice>,
}

impl Said {
    /// An answer that never came: one choice without a word.
    pub fn nothing() -> Self {
        Self {
            choices: BTreeMap::from([(0, Choice::default())]),
            ..Self::default()
        }
    }

    /// Reads an answer that is one JSON object.
    ///
    /// # Errors
    /// It is none.
    pub fn of_body(endpoint: Endpoint, body: &[u8]) -> Result<Self, Unreadable> {
        let body: Value = parse(body).ok_or(Unreadable::Json)?;
        if endpoint == Endpoint::Responses {
            return Ok(Self::of_response(&body));
        }
        let mut said = Self::named(&body);
        let choices = body.get("choices").and_then(Value::as_array);
        for (place, choice) in choices.into_iter().flatten().take(CHOICES_MAX).enumerate() {
            let index = choice.get("index").and_then(Value::as_u64);
            let index = index.unwrap_or(place as u64);
            said.choices.insert(index, whole_choice(choice));
        }
        Ok(said)
    }

    /// Reads the events of a stream, also of one that broke off.
    pub fn of_events(endpoint: Endpoint, log: &EventLog) -> Self {
        let mut said = Self::default();
        match endpoint {
            Endpoint::Responses => {
                let mut last = None;
                log.each(|data| last = said.take_response_event(data).or(last.take()));
                // The last event says all of it once more, and surely.
                last.unwrap_or(said)
            }
            _ => {
                log.each(|data| said.take_chunk(data));
                said
            }
        }
    }

    fn named(body: &Value) -> Self {
        let of = |key: &str| body.get(key).map(text_of).unwrap_or_default();
        Self {
            id: of("id"),
            model: of("model"),
            choices: BTreeMap::new(),
        }
    }

    fn of_response(response: &Value) -> Self {
        let mut said = Self::named(response);
        let mut choice = Choice {
            finish_reason: finish_of_response(response).to_owned(),
            ..Choice::default()
        };
        let items = response.get("output").and_then(Value::as_array);
        for item in items.into_iter().flatten().take(CALLS_MAX) {
            match item.get("type").and_then(Value::as_str) {
                Some("message") => {
                    let content = item.get("content").and_then(Value::as_array);
                    for part in content.into_iter().flatten() {
                        choice.text.push_str(text_of_output(part));
                    }
                }
                Some("function_call" | "custom_tool_call") => choice.calls.extend(call_of(item)),
                Some("reasoning") => choice.thought.push_str(&thought_of_item(item)),
                _ => {}
            }
        }
        if choice.finish_reason == "stop" && !choice.calls.is_empty() {
            "tool_calls".clone_into(&mut choice.finish_reason);
        }
        said.choices.insert(0, choice);
        said
    }

    /// Takes a chunk of chat or text completions: what is no chunk says nothing.
    fn take_chunk(&mut self, data: &[u8]) {
        let mut cursor = Cursor::new(data);
        if !cursor.enter_object() {
            return;
        }
        while let Some(key) = cursor.key() {
            match key {
                b"choices" => {
                    if cursor.enter_array() {
                        while cursor.item() {
                            self.take_choice(&mut cursor);
                        }
                    }
                }
                b"id" if self.id.is_empty() => take(&mut self.id, &mut cursor),
                b"model" if self.model.is_empty() => take(&mut self.model, &mut cursor),
                _ => {
                    cursor.skip();
                }
            }
        }
    }

    fn take_choice(&mut self, cursor: &mut Cursor<'_>) {
        let mut index = 0;
        let (mut text, mut delta, mut finish) = (None, None, None);
        if !cursor.enter_object() {
            return;
        }
        while let Some(key) = cursor.key() {
            match key {
                b"index" => index = cursor.integer().unwrap_or(0),
                b"text" => text = cursor.skip(),
                // Some servers end a stream with the whole message.
                b"delta" => delta = cursor.skip(),
                b"finish_reason" => finish = cursor.skip(),
                _ => {
                    cursor.skip();
                }
            }
        }
        if self.choices.len() >= CHOICES_MAX && !self.choices.contains_key(&index) {
            return;
        }
        let choice = self.choices.entry(index).or_default();
        if let Some(text) = text.and_then(string) {
            choice.text.push_str(&text);
        }
        if let Some(delta) = delta {
            choice.take_delta(delta);
        }
        if let Some(finish) = finish.and_then(string).filter(|why| !why.is_empty()) {
            choice.finish_reason = finish.into_owned();
        }
    }

    /// Takes an event of responses; returns the whole if it is the last.
    fn take_response_event(&mut self, data: &[u8]) -> Option<Self> {
        // The many small ones are told apart before they are parsed.
        let mut cursor = Cursor::new(data);
        let mut kind = Cow::Borrowed("");
        let mut delta = None;
        if !cursor.enter_object() {
            return None;
        }
        while let Some(key) = cursor.key() {
            match key {
                b"type" => kind = cursor.skip().and_then(string).unwrap_or_default(),
                b"delta" => delta = cursor.skip().and_then(string),
                _ => {
                    cursor.skip();
                }
            }
        }
        match (&*kind, delta) {
            ("response.output_text.delta" | "response.refusal.delta", Some(delta)) => {
                let choice = self.choices.entry(0).or_default();
                choice.text.push_str(&delta);
            }
            (
                "response.reasoning_text.delta" | "response.reasoning_summary_text.delta",
                Some(delta),
            ) => {
                let choice = self.choices.entry(0).or_default();
                choice.thought.push_str(&delta);
            }
            ("response.output_item.done", _) => {
                let event: Value = parse(data)?;
                let item = event.get("item")?;
                let is_call = item.get("type").and_then(Value::as_str);
                if is_call.is_some_and(|kind| kind.ends_with("_call")) {
                    let calls = &mut self.choices.entry(0).or_default().calls;
                    if calls.len() < CALLS_MAX {
                        calls.extend(call_of(item));
                    }
                }
            }
            ("response.completed" | "response.incomplete", _) => {
                let event: Value = parse(data)?;
                return event.get("response").map(Self::of_response);
            }
            ("response.created", _) if self.id.is_empty() => {
                let event: Value = parse(data)?;
                let named = Self::named(event.get("response")?);
                (self.id, self.model) = (named.id, named.model);
            }
            _ => {}
        }
        None
    }
}

impl Choice {
    fn take_delta(&mut self, delta: &[u8]) {
        let mut cursor = Cursor::new(delta);
        if !cursor.enter_object() {
            return;
        }
        // Servers that change a name send both for a while.
        let mut thoughts = [None, None, None];
        while let Some(key) = cursor.key() {
            match key {
                b"content" | b"refusal" => self.take_content(cursor.skip()),
                b"reasoning_content" => thoughts[0] = cursor.skip(),
                b"reasoning" => thoughts[1] = cursor.skip(),
                b"thinking" => thoughts[2] = cursor.skip(),
                b"tool_calls" => {
                    let calls = cursor.skip().and_then(parse::<Vec<Value>>);
                    for call in calls.into_iter().flatten() {
                        self.take_call(&call);
                    }
                }
                b"function_call" => {
                    if let Some(call) = cursor.skip().and_then(parse::<Value>) {
                        self.take_call(&serde_json::json!({ "index": 0, "function": call }));
                    }
                }
                b"images" => {
                    let images = cursor.skip().and_then(parse::<Vec<Value>>);
                    self.parts.extend(images.into_iter().flatten());
                }
                _ => {
                    cursor.skip();
                }
            }
        }
        let thought = thoughts
            .into_iter()
            .flatten()
            .filter_map(string)
            .find(|thought| !thought.is_empty());
        if let Some(thought) = thought {
            self.thought.push_str(&thought);
        }
    }

    fn take_content(&mut self, raw: Option<&[u8]>) {
        let Some(raw) = raw else { return };
        if let Some(text) = string(raw) {
            self.text.push_str(&text);
        } else if let Some(parts) = parse::<Vec<Value>>(raw) {
            let parts = Value::Array(parts);
            self.text.push_str(&text_of(&parts));
            self.thought.push_str(&thought_in(&parts));
        }
    }

    /// Takes a piece of a call. Without an index, one with a name begins a new
    /// call and one without goes on with the last.
    fn take_call(&mut self, piece: &Value) {
        let function = piece.get("function").unwrap_or(piece);
        let of = |key: &str| function.get(key).and_then(Value::as_str).unwrap_or("");
        let last = self.calls.len().saturating_sub(1);
        let place = match piece.get("index").and_then(Value::as_u64) {
            Some(index) => usize::try_from(index).unwrap_or(usize::MAX),
            None if of("name").is_empty() => last,
            None => self.calls.len(),
        };
        if place >= CALLS_MAX {
            return;
        }
        while self.calls.len() <= place {
            self.calls.push(Call {
                name: String::new(),
                arguments: String::new(),
            });
        }
        let Some(call) = self.calls.get_mut(place) else {
            return;
        };
        if call.name.is_empty() {
            of("name").clone_into(&mut call.name);
        }
        match function.get("arguments") {
            Some(Value::String(text)) => call.arguments.push_str(text),
            Some(object @ Value::Object(_)) => call.arguments.push_str(&object.to_string()),
            _ => {}
        }
    }
}

fn whole_choice(choice: &Value) -> Choice {
    let of = |key: &str| choice.get(key).unwrap_or(&Value::Null);
    let message = of("message");
    let mut whole = Choice {
        text: text_of(of("text")),
        finish_reason: text_of(of("finish_reason")),
        calls: calls_of(message),
        thought: thought_of(message),
        parts: Vec::new(),
    };
    for key in ["content", "refusal"] {
        whole
            .text
            .push_str(&message.get(key).map(text_of).unwrap_or_default());
    }
    if whole.text.is_empty()
        && let Some(transcript) = message.pointer("/audio/transcript").and_then(Value::as_str)
    {
        transcript.clone_into(&mut whole.text);
    }
    if let Some(images) = message.get("images").and_then(Value::as_array) {
        whole.parts.extend(images.iter().cloned());
    }
    whole
}

/// Returns why a response ended, in the words of chat completions.
fn finish_of_response(response: &Value) -> &str {
    let of = |key: &str| response.get(key).and_then(Value::as_str).unwrap_or("");
    match of("status") {
        "completed" => "stop",
        "incomplete" => match response.pointer("/incomplete_details/reason") {
            Some(Value::String(why)) if why == "content_filter" => "content_filter",
            _ => "length",
        },
        other => other,
    }
}

fn text_of_output(part: &Value) -> &str {
    ["text", "refusal"]
        .into_iter()
        .find_map(|key| part.get(key)?.as_str())
        .unwrap_or("")
}

fn take(into: &mut String, cursor: &mut Cursor<'_>) {
    if let Some(text) = cursor.skip().and_then(string) {
        *into = text.into_owned();
    }
}
