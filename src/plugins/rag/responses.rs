//! Citations in a stream of a response: where a text ends come the sources, if
//! they are to be listed, and in the turn for them one event for each annotation;
//! the events that repeat the text say them too, and all later events count on.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Value, json};

use super::{
    answer::{Addition, Citing},
    cite::{Reader, Shape},
};
use crate::openai::Frame;

/// The most parts of text that are read.
const PARTS_MAX: usize = 128;

/// Where a text is: the item of the output, and the part of it.
type Place = (u64, u64);

/// What is known of a stream so far.
#[derive(Debug, Default)]
pub(super) struct ResponseStream {
    parts: BTreeMap<Place, Part>,
    /// How many events were put in.
    added: u64,
}

#[derive(Debug)]
struct Part {
    reader: Reader,
    /// Once its text has ended.
    addition: Option<Addition>,
}

impl ResponseStream {
    /// Takes an event, and puts out what takes its place.
    pub(super) fn take(&mut self, citing: &Citing, frame: &Frame, out: &mut Vec<Frame>) {
        let data = frame.data.as_deref().unwrap_or_default();
        let Ok(mut event) = serde_json::from_slice::<Value>(data) else {
            out.push(frame.clone());
            return;
        };
        let kind = event
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        match kind {
            "response.output_text.delta" => {
                let text = event.get("delta").and_then(Value::as_str);
                if let (Some(place), Some(text)) = (place_of(&event), text)
                    && (self.parts.len() < PARTS_MAX || self.parts.contains_key(&place))
                {
                    let part = self.parts.entry(place).or_insert_with(|| Part {
                        reader: citing.reader(),
                        addition: None,
                    });
                    part.reader.take(text);
                }
            }
            "response.output_text.done" => {
                if let Some(place) = place_of(&event) {
                    self.end(citing, place, &event, out);
                    if let Some(addition) = self.of(place) {
                        append(event.get_mut("text"), &addition.text);
                    }
                }
            }
            "response.content_part.done" => {
                if let Some(addition) = place_of(&event).and_then(|place| self.of(place)) {
                    add_to_part(event.get_mut("part"), addition);
                }
            }
            "response.output_item.done" => {
                let index = number(&event, "output_index");
                self.add_to_item(index, event.get_mut("item"));
            }
            "response.completed" | "response.incomplete" => {
                let output = event
                    .get_mut("response")
                    .and_then(|it| it.get_mut("output"));
                let items = output.and_then(Value::as_array_mut);
                for (index, item) in items.into_iter().flatten().enumerate() {
                    self.add_to_item(u64::try_from(index).ok(), Some(item));
                }
            }
            _ => {}
        }
        if self.added == 0 {
            out.push(frame.clone());
            return;
        }
        self.count_on(&mut event);
        out.push(frame.replaced(event.to_string().as_bytes()));
    }

    /// Returns what was added to a text that has ended.
    fn of(&self, place: Place) -> Option<&Addition> {
        self.parts.get(&place)?.addition.as_ref()
    }

    /// Puts out what is added to a text, before the event that ends it.
    fn end(&mut self, citing: &Citing, place: Place, event: &Value, out: &mut Vec<Frame>) {
        let Some(part) = self
            .parts
            .get_mut(&place)
            .filter(|part| part.addition.is_none())
        else {
            return;
        };
        let addition = citing.addition(&part.reader, Shape::Responses, "");
        part.addition = Some(addition.clone());
        let mut put = |name: &str, more: &[(&str, Value)]| {
            let mut new = json!({ "type": name });
            for key in [
                "sequence_number",
                "item_id",
                "output_index",
                "content_index",
            ] {
                set(
                    &mut new,
                    key,
                    event.get(key).cloned().unwrap_or(Value::Null),
                );
            }
            for (key, value) in more {
                set(&mut new, key, value.clone());
            }
            self.count_on(&mut new);
            self.added += 1;
            out.push(named(name, &new));
        };
        if !addition.text.is_empty() {
            let text = ("delta", json!(addition.text));
            put(
                "response.output_text.delta",
                &[text, ("logprobs", json!([]))],
            );
        }
        for (index, annotation) in addition.annotations.iter().enumerate() {
            let place = ("annotation_index", json!(index));
            let annotation = ("annotation", annotation.clone());
            put(
                "response.output_text.annotation.added",
                &[place, annotation],
            );
        }
    }

    /// Gives an event its number, behind those that were put in.
    fn count_on(&self, event: &mut Value) {
        if let Some(number) = number(event, "sequence_number") {
            let number = number.saturating_add(self.added);
            set(event, "sequence_number", json!(number));
        }
    }

    fn add_to_item(&self, index: Option<u64>, item: Option<&mut Value>) {
        let content = item.and_then(|item| item.get_mut("content"));
        let parts = content.and_then(Value::as_array_mut);
        for (nth, part) in parts.into_iter().flatten().enumerate() {
            let place = index.zip(u64::try_from(nth).ok());
            if let Some(addition) = place.and_then(|place| self.of(place)) {
                add_to_part(Some(part), addition);
            }
        }
    }
}

fn place_of(event: &Value) -> Option<Place> {
    Some((
        number(event, "output_index")?,
        number(event, "content_index")?,
    ))
}

fn number(event: &Value, key: &str) -> Option<u64> {
    event.get(key)?.as_u64()
}

fn add_to_part(part: Option<&mut Value>, addition: &Addition) {
    let Some(part) = part.filter(|part| part.get("text").is_some_and(Value::is_string)) else {
        return;
    };
    append(part.get_mut("text"), &addition.text);
    if addition.annotations.is_empty() {
        return;
    }
    let own = part.get_mut("annotations").map(Value::take);
    let mut all = match own {
        Some(Value::Array(own)) => own,
        _ => Vec::new(),
    };
    all.extend(addition.annotations.iter().cloned());
    set(part, "annotations", Value::Array(all));
}

fn append(text: Option<&mut Value>, more: &str) {
    if let Some(Value::String(text)) = text {
        text.push_str(more);
    }
}

fn set(value: &mut Value, key: &str, member: Value) {
    if let Some(members) = value.as_object_mut() {
        members.insert(key.to_owned(), member);
    }
}

/// Makes an event with a name.
fn named(name: &str, event: &Value) -> Frame {
    let data = event.to_string();
    let head = format!("event: {name}\ndata: ");
    let raw = Bytes::from(format!("{head}{data}\n\n"));
    Frame {
        data: Some(raw.slice(head.len()..head.len() + data.len())),
        event: Some(Bytes::copy_from_slice(name.as_bytes())),
        is_comment: false,
        raw,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            answer::tests::{TURNS, citing},
            settings::Sources,
        },
        *,
    };

    fn run(text: &str, sources: Sources) -> Vec<Value> {
        let place = r#""item_id":"i","output_index":0,"content_index":0"#;
        let part = format!(r#"{{"type":"output_text","text":"{text}","annotations":[]}}"#);
        let item = format!(r#"{{"id":"i","type":"message","content":[{part}]}}"#);
        let events = [
            r#"{"type":"response.created","sequence_number":0,"response":{"output":[]}}"#
                .to_owned(),
            format!(
                r#"{{"type":"response.output_text.delta","sequence_number":1,{place},"delta":"{text}"}}"#
            ),
            format!(
                r#"{{"type":"response.output_text.done","sequence_number":2,{place},"text":"{text}"}}"#
            ),
            format!(
                r#"{{"type":"response.content_part.done","sequence_number":3,{place},"part":{part}}}"#
            ),
            format!(
                r#"{{"type":"response.output_item.done","sequence_number":4,"output_index":0,"item":{item}}}"#
            ),
            format!(
                r#"{{"type":"response.completed","sequence_number":5,"response":{{"output":[{item}]}}}}"#
            ),
        ];
        let events = events.iter();
        let mut out: Vec<_> = events
            .map(|event| {
                let event: Value = serde_json::from_str(event).unwrap();
                named(event["type"].as_str().unwrap(), &event)
            })
            .collect();
        for adds in TURNS {
            let citing = citing(sources, adds);
            let mut stream = ResponseStream::default();
            for event in std::mem::take(&mut out) {
                stream.take(&citing, &event, &mut out);
            }
        }
        for frame in &out {
            let event: Value = serde_json::from_slice(frame.data.as_ref().unwrap()).unwrap();
            assert_eq!(
                frame.event.as_deref().unwrap(),
                event["type"].as_str().unwrap().as_bytes()
            );
        }
        let data = |frame: &Frame| serde_json::from_slice(frame.data.as_ref().unwrap()).unwrap();
        out.iter().map(data).collect()
    }

    #[test]
    fn annotations_are_told_where_the_text_ends_and_in_all_that_repeats_it() {
        let out = run("x [2]", Sources::WhenUncited);
        let numbers: Vec<_> = out
            .iter()
            .map(|e| e["sequence_number"].as_u64().unwrap())
            .collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(out[2]["type"], "response.output_text.annotation.added");
        let annotation = json!({
            "type": "url_citation", "start_index": 2, "end_index": 5,
            "url": "https://2.test/", "title": "T2"
        });
        assert_eq!(out[2]["annotation"], annotation);
        assert_eq!(out[2]["item_id"], "i");
        assert_eq!(out[4]["part"]["annotations"][0], annotation);
        assert_eq!(out[5]["item"]["content"][0]["annotations"][0], annotation);
        assert_eq!(
            out[6]["response"]["output"][0]["content"][0]["annotations"][0],
            annotation
        );
    }

    #[test]
    fn the_sources_are_part_of_the_text_wherever_it_is_said() {
        let out = run("x", Sources::WhenUncited);
        let whole: String = out
            .iter()
            .filter(|event| event["type"] == "response.output_text.delta")
            .map(|event| event["delta"].as_str().unwrap())
            .collect();
        assert!(whole.starts_with("x\n\nSources:\n[1] T1"), "{whole}");
        let done = out
            .iter()
            .find(|e| e["type"] == "response.output_text.done")
            .unwrap();
        assert_eq!(done["text"], whole);
        let last = out.last().unwrap();
        assert_eq!(last["response"]["output"][0]["content"][0]["text"], whole);
        assert_eq!(out.len(), 6 + 1 + 2);
    }

    #[test]
    fn without_anything_to_add_the_events_pass_as_they_came() {
        assert_eq!(run("x", Sources::Never).len(), 6);
    }
}
