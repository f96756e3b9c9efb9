//! Every string of a value that a model may have written: what no reader of ours
//! knows by its name is looked at all the same.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde_json::{Map, Value, json};

/// One step on the way to a string.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Into the member of this name.
    Member(String),
    /// Into the item that says of itself that it is this one: more of it may
    /// come in another event.
    Indexed(u64),
    /// Into the item at this place.
    Item(u64),
}

/// The members that say what something is, and never what a model says; or that
/// nobody can read.
const LABELS: [&str; 24] = [
    "b64_json",
    "call_id",
    "container_id",
    "encrypted_content",
    "event_id",
    "expires_at",
    "file_id",
    "finish_reason",
    "format",
    "id",
    "index",
    "item_id",
    "logprobs",
    "object",
    "obfuscation",
    "partial_image_b64",
    "phase",
    "response_id",
    "role",
    "server_label",
    "signature",
    "status",
    "tool_call_id",
    "type",
];

/// Says whether a member is none of what a model says.
pub(super) fn is_label(key: &str) -> bool {
    LABELS.contains(&key)
}

/// Shows every string of a value that may be said, with the way to it, in their
/// order.
pub(super) fn strings(
    value: &mut Value,
    way: &mut Vec<Step>,
    see: &mut dyn FnMut(&[Step], &mut String),
) {
    match value {
        // What a picture or a sound is made of.
        Value::String(text) if text.starts_with("data:") => {}
        Value::String(text) => see(way, text),
        Value::Array(items) => {
            for (at, item) in (0_u64..).zip(items) {
                let named = item.get("index").and_then(Value::as_u64);
                way.push(named.map_or(Step::Item(at), Step::Indexed));
                strings(item, way, see);
                way.pop();
            }
        }
        Value::Object(members) => {
            for (key, value) in members.iter_mut() {
                let is_sound =
                    key == "data" && way.last() == Some(&Step::Member("audio".to_owned()));
                if is_label(key) || is_sound {
                    continue;
                }
                way.push(Step::Member(key.clone()));
                strings(value, way, see);
                way.pop();
            }
        }
        _ => {}
    }
}

/// Returns a value that has nothing but this text, there.
pub(super) fn nested(way: &[Step], text: &str) -> Value {
    way.iter()
        .rev()
        .fold(Value::from(text), |inner, step| match (step, inner) {
            (Step::Member(key), inner) => {
                let mut members = Map::new();
                members.insert(key.clone(), inner);
                Value::Object(members)
            }
            (Step::Indexed(at), Value::Object(mut members)) => {
                members.insert("index".to_owned(), json!(at));
                json!([members])
            }
            (Step::Indexed(_) | Step::Item(_), inner) => json!([inner]),
        })
}

/// Says whether all of a text is there: lists such as those of citations come
/// in one piece.
pub(super) fn is_whole(way: &[Step]) -> bool {
    way.iter().any(|step| matches!(step, Step::Item(_)))
}

/// Returns a number for a way; 0 for none.
pub(super) fn number_of(way: &[Step]) -> u64 {
    if way.is_empty() {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    way.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_string_that_is_said_is_found_and_can_be_put_back() {
        let mut value = json!({ "type": "x", "id": "x", "audio": { "data": "x", "transcript": "a" },
            "new": [{ "index": 7, "deep": ["b"] }, "c"], "url": "data:x", "data": "d" });
        let mut found = Vec::new();
        strings(&mut value, &mut Vec::new(), &mut |way, text| {
            found.push((text.clone(), nested(way, text), number_of(way)));
        });
        let texts: Vec<&str> = found.iter().map(|(text, ..)| &**text).collect();
        assert_eq!(texts, ["a", "b", "c", "d"]);
        assert_eq!(found[0].1, json!({ "audio": { "transcript": "a" } }));
        assert_eq!(
            found[1].1,
            json!({ "new": [{ "deep": ["b"], "index": 7 }] })
        );
        assert!(
            found
                .iter()
                .all(|(.., one)| { found.iter().filter(|(.., other)| one == other).count() == 1 })
        );
    }
}
