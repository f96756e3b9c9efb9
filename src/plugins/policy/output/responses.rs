//! The texts of OpenAI's responses: events of a stream, and items of a whole.
//!
//! A text comes three times in a stream: as deltas, when it is done, and in the
//! response as a whole. The rules see each of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Value, json};

use super::{
    read,
    texts::{Fed, Kind, Place, Rules, Texts},
    walk::{Step, is_label, is_whole, nested, number_of, strings},
};
use crate::{
    error::Result,
    openai::Frame,
    plugins::{Pass, policy::Hits},
};

/// The most of what was let through that is said once more where the answer is
/// ended, in bytes.
const SAID_MAX: usize = 1024 * 1024;
/// The most events that are kept to be written anew.
const KEPT_MAX: usize = 4096;

/// What is kept of a stream of events.
#[derive(Default)]
pub(crate) struct ResponseStream {
    texts: Texts,
    /// The last delta of each text, and where it stood in it, for what is held
    /// back of it.
    last: BTreeMap<Place, (Value, Vec<Step>)>,
    /// The response as it was when it began.
    response: Option<Value>,
    /// What was let through of the answer.
    said: String,
    item: Option<Value>,
}

impl ResponseStream {
    pub(crate) fn event(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        event: &Frame,
        data: &[u8],
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        let mut value = read(data)?;
        let name = value
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let name = name.to_owned();
        // The bytes of a sound are no text; its transcript is one.
        if name.ends_with(".delta") && !name.ends_with("audio.delta") {
            let kind = kind_of_delta(&name);
            return self.delta(rules, hits, kind, event, value, out);
        }
        let ends_all = matches!(&*name, "response.completed" | "response.incomplete");
        let item = number(&value, "output_index");
        if ends_all || name.ends_with(".done") {
            let which = |place: &Place| ends_all || place.choice == item;
            let ended = self.texts.end(rules, hits, which);
            if let Some(pass) = self.put_ended(ended, out) {
                return Ok(pass);
            }
        }
        if self.response.is_none()
            && let Some(response) = value.get("response")
        {
            self.response = Some(response.clone());
        }
        let mut changed = false;
        let mut denied = false;
        each_text(&mut value, &mut |kind, text| {
            if denied || !rules.look_at(kind) {
                return;
            }
            // Each was counted where it came first.
            let fed = rules.apply(&Hits::default(), kind, text);
            changed |= fed.denied || fed.text != *text;
            denied |= fed.denied;
            *text = fed.text;
        });
        if denied {
            self.put_denied(out);
            return Ok(Pass::End);
        }
        out.push(match changed {
            true => {
                forget_tokens(&mut value);
                event.replaced(value.to_string().as_bytes())
            }
            false => event.clone(),
        });
        Ok(Pass::On)
    }

    fn delta(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        kind: Kind,
        event: &Frame,
        mut value: Value,
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        let Some(mut delta) = value.get_mut("delta").map(Value::take) else {
            out.push(event.clone());
            return Ok(Pass::On);
        };
        let (choice, nth) = (
            number(&value, "output_index"),
            number(&value, "content_index") + number(&value, "summary_index"),
        );
        let mut found = Vec::new();
        let (mut changed, mut denied, mut says) = (false, false, false);
        let mut fail = None;
        let texts = &mut self.texts;
        if rules.look_at(kind) {
            strings(&mut delta, &mut Vec::new(), &mut |way, text| {
                if denied || fail.is_some() {
                    text.clear();
                    return;
                }
                let place = Place {
                    choice,
                    kind,
                    nth,
                    way: number_of(way),
                };
                let fed = match is_whole(way) {
                    true => Ok(rules.apply(hits, kind, text)),
                    false => texts.feed(rules, hits, place, text, false),
                };
                match fed {
                    Err(error) => fail = Some(error),
                    Ok(fed) => {
                        changed |= fed.denied || fed.text != *text;
                        denied |= fed.denied;
                        says |= !fed.text.is_empty();
                        *text = fed.text;
                        found.push((place, way.to_vec()));
                    }
                }
            });
        }
        if let Some(error) = fail {
            return Err(error);
        }
        if let (Kind::Answer, Value::String(new)) = (kind, &delta)
            && self.said.len() + new.len() <= SAID_MAX
        {
            self.said.push_str(new);
            self.item = value.get("item_id").cloned();
        }
        if !changed {
            out.push(event.clone());
        } else if says {
            set(&mut value, "delta", delta);
            forget_tokens(&mut value);
            out.push(event.replaced(value.to_string().as_bytes()));
        }
        if denied {
            self.put_denied(out);
            return Ok(Pass::End);
        }
        set(&mut value, "delta", Value::Null);
        forget_tokens(&mut value);
        for (place, way) in found {
            if self.last.len() < KEPT_MAX || self.last.contains_key(&place) {
                self.last.insert(place, (value.clone(), way));
            }
        }
        Ok(Pass::On)
    }

    fn put_ended(&mut self, ended: Vec<(Place, Fed)>, out: &mut Vec<Frame>) -> Option<Pass> {
        for (place, fed) in ended {
            if let (false, Some((mut value, way))) = (fed.text.is_empty(), self.last.remove(&place))
            {
                if place.kind == Kind::Answer && self.said.len() + fed.text.len() <= SAID_MAX {
                    self.said.push_str(&fed.text);
                }
                set(&mut value, "delta", nested(&way, &fed.text));
                let name = value
                    .get("type")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                let name = name.to_owned();
                out.push(named(&name, &value));
            }
            if fed.denied {
                self.put_denied(out);
                return Some(Pass::End);
            }
        }
        None
    }

    /// Ends the response, which has what was let through.
    fn put_denied(&mut self, out: &mut Vec<Frame>) {
        let mut response = self.response.take().unwrap_or_else(|| json!({}));
        let said = std::mem::take(&mut self.said);
        let item = json!({
            "id": self.item.take(),
            "type": "message",
            "role": "assistant",
            "status": "incomplete",
            "content": [{ "type": "output_text", "text": said, "annotations": [] }],
        });
        filter(&mut response);
        set(&mut response, "output", json!([item]));
        let name = "response.incomplete";
        out.push(named(name, &json!({ "type": name, "response": response })));
    }
}

/// Applies the rules to a whole response; says whether anything has changed.
pub(crate) fn whole_response(rules: &Rules, hits: &Hits, answer: &mut Value) -> Result<bool> {
    let mut changed = false;
    let mut denied = false;
    let Some(Value::Array(items)) = answer.get_mut("output") else {
        return Ok(false);
    };
    let mut kept = 0;
    for item in items.iter_mut() {
        each_item_text(item, &mut |kind, text| {
            if denied {
                text.clear();
                return;
            }
            if !rules.look_at(kind) {
                return;
            }
            let fed = rules.apply(hits, kind, text);
            changed |= fed.denied || fed.text != *text;
            denied |= fed.denied;
            *text = fed.text;
        });
        kept += 1;
        if denied {
            set(item, "status", json!("incomplete"));
            break;
        }
    }
    items.truncate(kept);
    if let Some(Value::String(text)) = answer.get_mut("output_text")
        && !denied
        && rules.look_at(Kind::Answer)
    {
        // Each was counted where it stands first.
        let fed = rules.apply(&Hits::default(), Kind::Answer, text);
        changed |= fed.denied || fed.text != *text;
        denied |= fed.denied;
        *text = fed.text;
    }
    if denied {
        // What stands here only is made of what stands there.
        if let Some(answer) = answer.as_object_mut() {
            answer.shift_remove("output_text");
        }
        filter(answer);
    }
    if changed {
        forget_tokens(answer);
    }
    Ok(changed)
}

/// Returns what an event's name says of its texts; what nobody knows is said
/// beside the answer, and looked at like it.
fn kind_of_delta(name: &str) -> Kind {
    match name {
        "response.output_text.delta" => Kind::Answer,
        "response.refusal.delta" => Kind::Refusal,
        _ if name.contains("reasoning_summary") => Kind::Reasoning("summary"),
        _ => kind_named(name, Kind::Aside),
    }
}

/// Returns what the name of an event, or the type of an item or a part, says of
/// the texts in it.
fn kind_named(name: &str, otherwise: Kind) -> Kind {
    if name.contains("reasoning") {
        Kind::Reasoning("text")
    } else if name.contains("call") || name.contains("tool") || name.contains("mcp") {
        Kind::Tool
    } else {
        otherwise
    }
}

/// Shows every text that an event repeats.
fn each_text(event: &mut Value, see: &mut dyn FnMut(Kind, &mut String)) {
    let name = event
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if name.ends_with("audio.delta") {
        return;
    }
    let kind = kind_named(name, Kind::Answer);
    let Some(members) = event.as_object_mut() else {
        return;
    };
    for (key, value) in members.iter_mut() {
        match &**key {
            "response" => each_of_response(value, see),
            "item" => each_item_text(value, see),
            "part" => part_text(value, kind, see),
            _ if is_label(key) => {}
            _ => all(value, kind, see),
        }
    }
}

/// Of a response only what came of it is the model's: it repeats the request too.
fn each_of_response(response: &mut Value, see: &mut dyn FnMut(Kind, &mut String)) {
    if let Some(Value::Array(items)) = response.get_mut("output") {
        items.iter_mut().for_each(|item| each_item_text(item, see));
    }
    if let Some(Value::String(text)) = response.get_mut("output_text") {
        see(Kind::Answer, text);
    }
}

fn each_item_text(item: &mut Value, see: &mut dyn FnMut(Kind, &mut String)) {
    let name = item.get("type").and_then(Value::as_str).unwrap_or_default();
    if name == "image_generation_call" {
        return; // a picture
    }
    let kind = kind_named(name, Kind::Answer);
    let Some(members) = item.as_object_mut() else {
        return;
    };
    for (key, value) in members.iter_mut() {
        match value {
            Value::Array(parts) if matches!(&**key, "summary" | "content") => {
                parts.iter_mut().for_each(|part| part_text(part, kind, see));
            }
            _ if is_label(key) => {}
            value => all(value, kind, see),
        }
    }
}

fn part_text(part: &mut Value, kind: Kind, see: &mut dyn FnMut(Kind, &mut String)) {
    let name = part.get("type").and_then(Value::as_str).unwrap_or_default();
    let kind = kind_named(name, kind);
    all(part, kind, see);
}

fn all(value: &mut Value, kind: Kind, see: &mut dyn FnMut(Kind, &mut String)) {
    strings(value, &mut Vec::new(), &mut |_, text| see(kind, text));
}

fn filter(response: &mut Value) {
    set(response, "status", json!("incomplete"));
    set(
        response,
        "incomplete_details",
        json!({ "reason": "content_filter" }),
    );
}

/// The tokens of a text that has changed would tell what it was.
fn forget_tokens(value: &mut Value) {
    match value {
        Value::Object(members) => {
            if let Some(tokens) = members.get_mut("logprobs") {
                *tokens = json!([]);
            }
            members.values_mut().for_each(forget_tokens);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_tokens),
        _ => {}
    }
}

fn number(event: &Value, key: &str) -> u64 {
    event
        .get(key)
        .and_then(Value::as_u64)
        .unwrap_or(0)
        .min(1 << 32)
}

/// Sets a member of an object; nothing else has members.
fn set(value: &mut Value, key: &str, member: Value) {
    if let Some(members) = value.as_object_mut() {
        members.insert(key.to_owned(), member);
    }
}

fn named(name: &str, data: &Value) -> Frame {
    let event = Bytes::copy_from_slice(name.as_bytes());
    let mut frame = Frame::of_data(data.to_string().as_bytes());
    frame.raw = [b"event: ", &event[..], b"\n", &frame.raw[..]]
        .concat()
        .into();
    frame.event = Some(event);
    frame
}
