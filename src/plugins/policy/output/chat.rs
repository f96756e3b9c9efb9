//! The texts of chat and text completions: chunks of a stream, and choices of a
//! whole answer.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{
    read,
    texts::{Fed, Kind, Place, Rules, Texts},
    unreadable,
    walk::{Step, is_label, is_whole, nested, number_of, strings},
};
use crate::{
    error::Result,
    openai::{Endpoint, Frame},
    plugins::{Pass, policy::Hits},
};

/// The names of what is said before the answer.
const REASONING: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];
/// What a message that ends early keeps: the rest is of what nobody may know.
const KEPT: [&str; 6] = [
    "role",
    "content",
    "refusal",
    "reasoning_content",
    "reasoning",
    "thinking",
];
/// Reasoning once more, in a form of its own.
const DETAILS: &str = "reasoning_details";
const FILTERED: &str = "content_filter";
/// The highest number of a choice that is believed.
const CHOICE_MAX: u64 = 1024;

/// What is kept of a stream of chunks.
pub(crate) struct ChatStream {
    texts: Texts,
    /// The ways to the texts beside the answer, to put them back.
    ways: BTreeMap<Place, Vec<Step>>,
    is_chat: bool,
    /// The choices that have not ended.
    open: BTreeSet<u64>,
    /// The first chunk without its choices: what ours are made of.
    head: Map<String, Value>,
}

/// A text of a choice, and what it is.
struct Said<'a> {
    kind: Kind,
    /// Which call.
    nth: u64,
    /// The way to it from the message, where the kind does not say it.
    way: &'a [Step],
    /// Whether it comes in one piece.
    is_whole: bool,
}

impl Said<'_> {
    const fn of(kind: Kind, nth: u64) -> Said<'static> {
        Said {
            kind,
            nth,
            way: &[],
            is_whole: false,
        }
    }
}

/// What a choice of a chunk has become.
enum Came {
    Same,
    Changed,
    /// It ends, and this is the last of its text.
    Denied(Place, String),
}

impl ChatStream {
    pub(crate) fn new(endpoint: Endpoint, n: u32) -> Self {
        Self {
            texts: Texts::default(),
            ways: BTreeMap::new(),
            is_chat: endpoint == Endpoint::ChatCompletions,
            open: (0..u64::from(n)).collect(),
            head: Map::new(),
        }
    }

    pub(crate) fn event(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        event: &Frame,
        data: &[u8],
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        if data == b"[DONE]" {
            let ended = self.texts.end(rules, hits, |_| true);
            if let Some(pass) = self.put_ended(ended, out) {
                return Ok(pass);
            }
            out.push(event.clone());
            return Ok(Pass::On);
        }
        let mut chunk = read(data)?;
        self.learn(&chunk);
        let Some(Value::Array(choices)) = chunk.get_mut("choices") else {
            out.push(event.clone());
            return Ok(Pass::On);
        };
        let mut changed = false;
        for at in 0..choices.len() {
            let Some(choice) = choices.get_mut(at) else {
                break;
            };
            match self.choice(rules, hits, choice, out)? {
                None => return Ok(Pass::End),
                Some(Came::Same) => {}
                Some(Came::Changed) => changed = true,
                Some(Came::Denied(place, text)) => {
                    // The choices before it are fit to go out, this one is told
                    // by chunks of ours.
                    choices.truncate(at);
                    if at > 0 {
                        out.push(event.replaced(chunk.to_string().as_bytes()));
                    }
                    self.put_denied(place, &text, out);
                    return Ok(Pass::End);
                }
            }
        }
        out.push(match changed {
            true => event.replaced(chunk.to_string().as_bytes()),
            false => event.clone(),
        });
        Ok(Pass::On)
    }

    /// Applies the rules to a choice of a chunk; `None` if the stream has ended
    /// with what was held back.
    fn choice(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        choice: &mut Value,
        out: &mut Vec<Frame>,
    ) -> Result<Option<Came>> {
        let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
        if index > CHOICE_MAX {
            return Err(unreadable());
        }
        let ends =
            matches!(choice.get("finish_reason"), Some(Value::String(why)) if !why.is_empty());
        let mut changed = false;
        let mut denied = None;
        let mut ended = Vec::new();
        let mut fail = None;
        let (texts, ways) = (&mut self.texts, &mut self.ways);
        each_text(choice, &mut |said, text| {
            let kind = said.kind;
            let place = Place {
                choice: index,
                kind,
                nth: said.nth,
                way: number_of(said.way),
            };
            if denied.is_some() || fail.is_some() {
                return;
            }
            if !text.is_empty() {
                ended.extend(texts.end_before(rules, hits, place));
                if ended.iter().any(|(_, fed)| fed.denied) {
                    denied = Some((place, String::new()));
                    return;
                }
            }
            if !rules.look_at(kind) {
                return;
            }
            let fed = match said.is_whole {
                true => Ok(rules.apply(hits, kind, text)),
                false => texts.feed(rules, hits, place, text, ends),
            };
            if kind == Kind::Aside && fed.is_ok() {
                ways.entry(place).or_insert_with(|| said.way.to_vec());
            }
            match fed {
                Err(error) => fail = Some(error),
                Ok(Fed {
                    text: new,
                    denied: ends_here,
                }) => {
                    if ends_here {
                        denied = Some((place, new));
                    } else if new != *text {
                        changed = true;
                        *text = new;
                    }
                }
            }
        });
        if let Some(error) = fail {
            return Err(error);
        }
        if ends && denied.is_none() {
            ended.extend(self.texts.end(rules, hits, |place| place.choice == index));
        }
        if self.put_ended(ended, out).is_some() {
            return Ok(None);
        }
        if let Some((place, text)) = denied {
            return Ok(Some(Came::Denied(place, text)));
        }
        if ends {
            self.open.remove(&index);
        } else {
            self.open.insert(index);
        }
        changed |= without_details(rules, choice);
        if changed {
            forget_tokens(choice);
            return Ok(Some(Came::Changed));
        }
        Ok(Some(Came::Same))
    }

    fn learn(&mut self, chunk: &Value) {
        if !self.head.is_empty() {
            return;
        }
        for key in ["id", "object", "created", "model", "system_fingerprint"] {
            if let Some(value) = chunk.get(key) {
                self.head.insert(key.to_owned(), value.clone());
            }
        }
    }

    /// Puts out what was held back; the end of the stream, if that was denied.
    fn put_ended(&mut self, ended: Vec<(Place, Fed)>, out: &mut Vec<Frame>) -> Option<Pass> {
        for (place, fed) in ended {
            if fed.denied {
                self.put_denied(place, &fed.text, out);
                return Some(Pass::End);
            }
            self.put_text(place, &fed.text, out);
        }
        None
    }

    fn put_text(&self, place: Place, text: &str, out: &mut Vec<Frame>) {
        let index = place.choice;
        let choice = match place.kind {
            Kind::Answer if !self.is_chat => {
                json!({ "index": index, "text": text, "logprobs": null, "finish_reason": null })
            }
            kind => {
                let delta = match kind {
                    Kind::Answer => json!({ "content": text }),
                    Kind::Refusal => json!({ "refusal": text }),
                    Kind::Reasoning(name) => json!({ name: text }),
                    Kind::Aside => match self.ways.get(&place) {
                        Some(way) => nested(way, text),
                        None => json!({}),
                    },
                    Kind::Input => {
                        let custom = json!({ "input": text });
                        json!({ "tool_calls": [{ "index": place.nth, "custom": custom }] })
                    }
                    Kind::Tool => {
                        let function = json!({ "arguments": text });
                        json!({ "tool_calls": [{ "index": place.nth, "function": function }] })
                    }
                };
                json!({ "index": index, "delta": delta, "finish_reason": null })
            }
        };
        out.push(self.chunk(vec![choice]));
    }

    /// Ends every answer that has not ended: the upstream is not asked for more.
    fn put_denied(&mut self, place: Place, text: &str, out: &mut Vec<Frame>) {
        if !text.is_empty() {
            self.put_text(place, text, out);
        }
        self.open.insert(place.choice);
        let choices = std::mem::take(&mut self.open).into_iter().map(|index| {
            if self.is_chat {
                json!({ "index": index, "delta": {}, "finish_reason": FILTERED })
            } else {
                json!({ "index": index, "text": "", "logprobs": null, "finish_reason": FILTERED })
            }
        });
        let chunk = self.chunk(choices.collect());
        out.push(chunk);
    }

    fn chunk(&self, choices: Vec<Value>) -> Frame {
        let mut chunk = self.head.clone();
        chunk.insert("choices".to_owned(), Value::Array(choices));
        Frame::of_data(Value::Object(chunk).to_string().as_bytes())
    }
}

/// Applies the rules to the choices of a whole answer; says whether anything
/// has changed.
pub(crate) fn whole_chat(rules: &Rules, hits: &Hits, answer: &mut Value) -> Result<bool> {
    let Some(Value::Array(choices)) = answer.get_mut("choices") else {
        return Ok(false);
    };
    let mut changed = false;
    for choice in choices {
        let mut altered = false;
        let mut denied = None;
        each_text(choice, &mut |said, text| {
            let kind = said.kind;
            if denied.is_some() {
                // Nothing is said behind the end.
                text.clear();
                return;
            }
            if !rules.look_at(kind) {
                return;
            }
            let fed = rules.apply(hits, kind, text);
            if fed.denied {
                denied = Some(kind);
            }
            altered |= fed.denied || fed.text != *text;
            *text = fed.text;
        });
        altered |= without_details(rules, choice);
        if let (Some(_), Some(choice)) = (denied, choice.as_object_mut()) {
            choice.insert("finish_reason".to_owned(), json!(FILTERED));
            if let Some(Value::Object(message)) = choice.get_mut("message") {
                // A call that nobody may know of, or half of one, is none.
                message.retain(|key, _| KEPT.contains(&key.as_str()));
            }
        }
        if altered {
            forget_tokens(choice);
        }
        changed |= altered;
    }
    Ok(changed)
}

/// Shows every text of a choice, in the order in which they are said; what has
/// a name that is not known here is behind the others.
fn each_text(choice: &mut Value, see: &mut dyn FnMut(Said<'_>, &mut String)) {
    if let Some(Value::String(text)) = choice.get_mut("text") {
        see(Said::of(Kind::Answer, 0), text);
    }
    for place in ["delta", "message"] {
        let Some(Value::Object(said)) = choice.get_mut(place) else {
            continue;
        };
        for name in REASONING {
            if let Some(value) = said.get_mut(name) {
                inside(value, Kind::Reasoning(name), see);
            }
        }
        for (name, kind) in [("content", Kind::Answer), ("refusal", Kind::Refusal)] {
            if let Some(value) = said.get_mut(name) {
                inside(value, kind, see);
            }
        }
        if let Some(call) = said.get_mut("function_call") {
            parts_of_call(call, "arguments", Kind::Tool, 0, see);
        }
        if let Some(Value::Array(calls)) = said.get_mut("tool_calls") {
            for (at, call) in (0_u64..).zip(calls) {
                let nth = call.get("index").and_then(Value::as_u64).unwrap_or(at);
                each_of_call(call, nth.min(CHOICE_MAX), see);
            }
        }
        for (name, value) in said.iter_mut() {
            let known = REASONING.contains(&name.as_str())
                || matches!(
                    &**name,
                    "content" | "refusal" | "function_call" | "tool_calls" | DETAILS
                );
            if !known && !is_label(name) {
                let mut way = vec![Step::Member(name.clone())];
                strings(value, &mut way, &mut |way, text| {
                    let said = Said {
                        way,
                        is_whole: is_whole(way),
                        ..Said::of(Kind::Aside, 0)
                    };
                    see(said, text);
                });
            }
        }
    }
}

/// Shows a text, or the texts of a list of parts: some servers write their
/// reasoning as parts of the content.
fn inside(value: &mut Value, kind: Kind, see: &mut dyn FnMut(Said<'_>, &mut String)) {
    match value {
        Value::String(text) => see(Said::of(kind, 0), text),
        Value::Array(parts) => parts.iter_mut().for_each(|part| inside(part, kind, see)),
        Value::Object(part) => {
            for (name, value) in part.iter_mut() {
                match &**name {
                    "thinking" => inside(value, Kind::Reasoning("thinking"), see),
                    "text" => inside(value, kind, see),
                    _ if is_label(name) => {}
                    _ => strings(value, &mut Vec::new(), &mut |_, text| {
                        see(whole(kind, 0), text);
                    }),
                }
            }
        }
        _ => {}
    }
}

/// Shows the texts of a call.
fn each_of_call(call: &mut Value, nth: u64, see: &mut dyn FnMut(Said<'_>, &mut String)) {
    let Value::Object(members) = call else {
        return;
    };
    for (name, value) in members.iter_mut() {
        match &**name {
            "function" => parts_of_call(value, "arguments", Kind::Tool, nth, see),
            "custom" => parts_of_call(value, "input", Kind::Input, nth, see),
            _ if is_label(name) => {}
            _ => strings(value, &mut Vec::new(), &mut |_, text| {
                see(whole(Kind::Tool, nth), text);
            }),
        }
    }
}

/// Shows what a call is given, which comes in pieces under `given`, and its name
/// and what else there is of it.
fn parts_of_call(
    call: &mut Value,
    given: &str,
    kind: Kind,
    nth: u64,
    see: &mut dyn FnMut(Said<'_>, &mut String),
) {
    let Value::Object(members) = call else {
        return;
    };
    for (name, value) in members.iter_mut() {
        match value {
            Value::String(text) if name == given => see(Said::of(kind, nth), text),
            _ if is_label(name) => {}
            value => strings(value, &mut Vec::new(), &mut |_, text| {
                see(whole(kind, nth), text);
            }),
        }
    }
}

const fn whole(kind: Kind, nth: u64) -> Said<'static> {
    Said {
        is_whole: true,
        ..Said::of(kind, nth)
    }
}

/// Takes out what says the reasoning once more, if a rule looks at that; says
/// whether there was any.
fn without_details(rules: &Rules, choice: &mut Value) -> bool {
    if !rules.look_at(Kind::Reasoning(DETAILS)) {
        return false;
    }
    let mut removed = false;
    for place in ["delta", "message"] {
        if let Some(Value::Object(said)) = choice.get_mut(place) {
            removed |= said.shift_remove(DETAILS).is_some();
        }
    }
    removed
}

/// The tokens of a text that is not the model's any more would tell what it was.
fn forget_tokens(choice: &mut Value) {
    if let Some(choice) = choice.as_object_mut() {
        if let Some(tokens) = choice.get_mut("logprobs") {
            *tokens = Value::Null;
        }
        choice.shift_remove("token_ids");
    }
}
