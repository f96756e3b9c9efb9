//! What becomes of an answer to a request that was searched for: its citations
//! as annotations, and the list of sources.
//!
//! Both are added in a turn of their own: the list where the plugin stands, since
//! it is text, which others may have rules about; the annotations behind every
//! edit, since they say where in the text something stands.
//!
//! **Invariant:** the words of the model are never changed, only added to, at
//! their end; a call of a tool, and an answer of a given form, is left as it is.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::{
    cite::{Reader, Shape, annotations, list_of_sources},
    found::Found,
    settings::Sources,
};
use crate::openai::{
    Endpoint,
    cursor::{Cursor, is_something},
    json::{self, Span},
};

/// Ends of an answer that nothing is added to.
const OTHER_ENDS: [&str; 4] = ["tool_calls", "function_call", "content_filter", "error"];

/// What the answer of one request is read for.
#[derive(Clone, Debug)]
pub(super) struct Citing {
    pub(super) found: Arc<Found>,
    pub(super) sources: Sources,
    pub(super) adds: Adds,
}

/// What is added to an answer in one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adds {
    /// The list of sources.
    Sources,
    /// The annotations, of the list too.
    Annotations,
}

/// What is added to one text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Addition {
    /// Text for its end; empty if none.
    pub(super) text: String,
    pub(super) annotations: Vec<Value>,
}

impl Addition {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.annotations.is_empty()
    }
}

impl Citing {
    pub(super) fn reader(&self) -> Reader {
        Reader::new(self.found.sources.len())
    }

    /// Returns what is added to a text that has been read to its end.
    pub(super) fn addition(&self, reader: &Reader, shape: Shape, end: &str) -> Addition {
        let mut addition = Addition::default();
        if reader.is_empty() || OTHER_ENDS.contains(&end) {
            return addition;
        }
        match self.adds {
            Adds::Annotations => addition.annotations = annotations(reader, &self.found, shape),
            Adds::Sources if self.lists(reader) => {
                // Code that was never closed is no reason to leave these out.
                addition.text = reader.end_of_code();
                addition.text.push_str(&list_of_sources(&self.found));
            }
            Adds::Sources => {}
        }
        addition
    }

    fn lists(&self, reader: &Reader) -> bool {
        let wanted = match self.sources {
            Sources::Always => true,
            Sources::WhenUncited => reader.citations.is_empty(),
            Sources::Never => false,
        };
        // Behind nothing but reasoning there is no answer that they are of.
        wanted && !self.found.sources.is_empty() && !reader.is_thinking()
    }

    /// Returns an answer with what is added to it; `None` if nothing changes.
    pub(super) fn whole(&self, endpoint: Endpoint, body: &Bytes) -> Option<Bytes> {
        let mut edits = Vec::new();
        let all = Span {
            start: 0,
            end: body.len(),
        };
        match endpoint {
            Endpoint::ChatCompletions => {
                for choice in items(body, member(body, all, b"choices")?) {
                    self.choice(body, choice, &mut edits);
                }
            }
            Endpoint::Completions => {
                for choice in items(body, member(body, all, b"choices")?) {
                    self.text_choice(body, choice, &mut edits);
                }
            }
            Endpoint::Responses => {
                let is = |at: Span, kind: &str| {
                    let found = member(body, at, b"type").map(|kind| kind.of(body));
                    found.and_then(json::text).as_deref() == Some(kind)
                };
                let details = member(body, all, b"incomplete_details");
                let reason = details.and_then(|details| member(body, details, b"reason"));
                let reason = reason.and_then(|reason| json::text(reason.of(body)));
                if reason.is_some_and(|reason| OTHER_ENDS.contains(&&*reason)) {
                    return None;
                }
                let output = items(body, member(body, all, b"output")?);
                for item in output.into_iter().filter(|item| is(*item, "message")) {
                    let Some(content) = member(body, item, b"content") else {
                        continue;
                    };
                    for part in items(body, content) {
                        if is(part, "output_text") {
                            self.part(body, part, &mut edits);
                        }
                    }
                }
            }
            _ => return None,
        }
        (!edits.is_empty()).then(|| spliced(body, edits))
    }

    fn choice(&self, body: &Bytes, choice: Span, edits: &mut Vec<(Span, Vec<u8>)>) {
        let end = end_of(body, choice);
        let Some(message) = member(body, choice, b"message") else {
            return;
        };
        let calls = [&b"tool_calls"[..], b"function_call"];
        let calls_tools = calls
            .into_iter()
            .filter_map(|key| member(body, message, key))
            .any(|calls| is_something(calls.of(body)));
        if let (false, Some(text)) = (calls_tools, member(body, message, b"content")) {
            let annotated = member(body, message, b"annotations");
            self.text(body, text, annotated, Shape::Chat, &end, edits);
        }
    }

    fn part(&self, body: &Bytes, part: Span, edits: &mut Vec<(Span, Vec<u8>)>) {
        if let Some(text) = member(body, part, b"text") {
            let annotated = member(body, part, b"annotations");
            self.text(body, text, annotated, Shape::Responses, "", edits);
        }
    }

    /// Completions have no annotations: the list is all that can be told.
    fn text_choice(&self, body: &Bytes, choice: Span, edits: &mut Vec<(Span, Vec<u8>)>) {
        let end = end_of(body, choice);
        let Some(at) = member(body, choice, b"text") else {
            return;
        };
        let Some(text) = json::text(at.of(body)) else {
            return;
        };
        let mut reader = self.reader();
        reader.take(&text);
        let addition = self.addition(&reader, Shape::Chat, &end);
        append_text(at, &addition.text, edits);
    }

    fn text(
        &self,
        body: &Bytes,
        at: Span,
        annotated: Option<Span>,
        shape: Shape,
        end: &str,
        edits: &mut Vec<(Span, Vec<u8>)>,
    ) {
        let Some(text) = json::text(at.of(body)) else {
            return;
        };
        let mut reader = self.reader();
        reader.take(&text);
        let addition = self.addition(&reader, shape, end);
        append_text(at, &addition.text, edits);
        if addition.annotations.is_empty() {
            return;
        }
        let list = Value::from(addition.annotations).to_string();
        edits.push(match annotated {
            // What the server has annotated itself stays in front.
            Some(at) if is_something(at.of(body)) && body.get(at.start) == Some(&b'[') => {
                let more = list.replacen('[', ",", 1).into_bytes();
                (
                    Span {
                        start: at.end - 1,
                        end: at.end,
                    },
                    more,
                )
            }
            Some(at) => (at, list.into_bytes()),
            None => {
                let behind = Span {
                    start: at.end,
                    end: at.end,
                };
                (behind, format!(",\"annotations\":{list}").into_bytes())
            }
        });
    }
}

fn append_text(at: Span, text: &str, edits: &mut Vec<(Span, Vec<u8>)>) {
    if text.is_empty() {
        return;
    }
    let quoted = Value::from(text).to_string();
    let inside = quoted.strip_prefix('"').unwrap_or_default();
    let quote = Span {
        start: at.end - 1,
        end: at.end,
    };
    edits.push((quote, inside.as_bytes().to_vec()));
}

/// Returns why a choice ended.
fn end_of(body: &[u8], choice: Span) -> String {
    let end = member(body, choice, b"finish_reason");
    let end = end.and_then(|end| json::text(end.of(body)));
    end.unwrap_or_default().into_owned()
}

/// Returns where a member of an object stands.
fn member(body: &[u8], object: Span, name: &[u8]) -> Option<Span> {
    let mut cursor = Cursor::new(object.of(body));
    if cursor.peek() != Some(b'{') {
        return None;
    }
    cursor.enter_object();
    while let Some(key) = cursor.key() {
        let value = cursor.skip()?;
        if key == name {
            let end = object.start + cursor.offset();
            return Some(Span {
                start: end - value.len(),
                end,
            });
        }
    }
    None
}

/// Returns where the items of a list stand.
fn items(body: &[u8], list: Span) -> Vec<Span> {
    let mut found = Vec::new();
    let mut cursor = Cursor::new(list.of(body));
    if cursor.peek() != Some(b'[') {
        return found;
    }
    cursor.enter_array();
    while cursor.item() {
        let Some(item) = cursor.skip() else { break };
        let end = list.start + cursor.offset();
        found.push(Span {
            start: end - item.len(),
            end,
        });
    }
    found
}

/// Puts new bytes in place of old ones; the places do not overlap.
fn spliced(body: &[u8], mut edits: Vec<(Span, Vec<u8>)>) -> Bytes {
    edits.sort_by_key(|(at, _)| at.start);
    let more: usize = edits.iter().map(|(_, new)| new.len()).sum();
    let mut out = Vec::with_capacity(body.len() + more);
    let mut from = 0;
    for (at, new) in edits {
        out.extend_from_slice(body.get(from..at.start).unwrap_or_default());
        out.extend_from_slice(&new);
        from = at.end;
    }
    out.extend_from_slice(body.get(from..).unwrap_or_default());
    out.into()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;
    use crate::plugins::rag::retrievers::Hit;

    pub(in super::super) const TURNS: [Adds; 2] = [Adds::Sources, Adds::Annotations];

    pub(in super::super) fn citing(sources: Sources, adds: Adds) -> Citing {
        let hit = |nth: usize| Hit {
            title: format!("T{nth}"),
            url: format!("https://{nth}.test/"),
            snippet: "s".to_owned(),
        };
        Citing {
            found: Arc::new(Found::of(vec![hit(1), hit(2)], 2, 100)),
            sources,
            adds,
        }
    }

    fn whole(endpoint: Endpoint, body: &str, sources: Sources) -> Option<String> {
        let given = Bytes::copy_from_slice(body.as_bytes());
        let mut out = given.clone();
        for adds in TURNS {
            out = citing(sources, adds).whole(endpoint, &out).unwrap_or(out);
        }
        if out == given {
            return None;
        }
        let text = String::from_utf8(out.to_vec()).unwrap();
        serde_json::from_str::<Value>(&text).unwrap();
        Some(text)
    }

    fn chat(message: &str, end: &str) -> Option<String> {
        let body = format!(
            r#"{{"id":"x", "n":1.0e0,"choices":[{{"index":0,"message":{message},"finish_reason":{end}}}],"usage":{{"a":123456789012345678901}}}}"#
        );
        let out = whole(Endpoint::ChatCompletions, &body, Sources::WhenUncited)?;
        assert!(out.starts_with(r#"{"id":"x", "n":1.0e0,"#), "{out}");
        assert!(
            out.ends_with(r#""usage":{"a":123456789012345678901}}"#),
            "{out}"
        );
        let out: Value = serde_json::from_str(&out).unwrap();
        Some(out["choices"][0]["message"].to_string())
    }

    const CITED: &str = r#"[{"type":"url_citation","url_citation":{"start_index":2,"end_index":5,"url":"https://2.test/","title":"T2"}}]"#;

    #[test]
    fn citations_become_annotations_and_nothing_else_changes() {
        assert_eq!(
            chat(r#"{"role":"assistant","content":"é [2]"}"#, r#""stop""#).unwrap(),
            format!(r#"{{"role":"assistant","content":"é [2]","annotations":{CITED}}}"#)
        );
        for empty in ["[]", "[ ]", "null"] {
            let message = format!(r#"{{"content":"é [2]","annotations":{empty},"x":1}}"#);
            assert_eq!(
                chat(&message, r#""length""#).unwrap(),
                format!(r#"{{"content":"é [2]","annotations":{CITED},"x":1}}"#)
            );
        }
        let own = r#"{"content":"é [2]","annotations":[{"type":"own"}]}"#;
        let both: Value = serde_json::from_str(&chat(own, r#""stop""#).unwrap()).unwrap();
        assert_eq!(both["annotations"][0], json!({ "type": "own" }));
        assert_eq!(
            both["annotations"][1]["url_citation"]["url"],
            "https://2.test/"
        );
    }

    #[test]
    fn an_answer_that_cites_nothing_ends_with_the_sources() {
        let out = chat(r#"{"content":"No \"idea\""}"#, r#""stop""#).unwrap();
        let out: Value = serde_json::from_str(&out).unwrap();
        let text = out["content"].as_str().unwrap();
        assert_eq!(
            text,
            "No \"idea\"\n\nSources:\n[1] T1 - https://1.test/\n[2] T2 - https://2.test/"
        );
        for (nth, annotation) in out["annotations"].as_array().unwrap().iter().enumerate() {
            let citation = &annotation["url_citation"];
            let [start, end] = ["start_index", "end_index"]
                .map(|key| usize::try_from(citation[key].as_u64().unwrap()).unwrap());
            let cited: String = text.chars().skip(start).take(end - start).collect();
            assert_eq!(cited, format!("[{}]", nth + 1));
            assert_eq!(citation["url"], format!("https://{}.test/", nth + 1));
        }
        let open = chat(r#"{"content":"```\ncode"}"#, r#""stop""#).unwrap();
        let open: Value = serde_json::from_str(&open).unwrap();
        assert_eq!(open["annotations"].as_array().unwrap().len(), 2);
        let text = open["content"].as_str().unwrap();
        assert!(
            text.starts_with("```\ncode\n```\n\nSources:\n[1]"),
            "{text}"
        );
        assert_eq!(chat(r#"{"content":"<think>so"}"#, r#""length""#), None);
    }

    #[test]
    fn calls_of_tools_and_silence_are_left_alone() {
        for (message, end) in [
            (
                r#"{"content":null,"tool_calls":[{"id":"1"}]}"#,
                r#""tool_calls""#,
            ),
            (
                r#"{"content":"I call [1]","tool_calls":[{"id":"1"}]}"#,
                r#""stop""#,
            ),
            (
                r#"{"content":"I call","tool_calls":null}"#,
                r#""tool_calls""#,
            ),
            (r#"{"content":""}"#, r#""stop""#),
            (r#"{"content":null}"#, "null"),
            (r#"{"content":"x"}"#, r#""content_filter""#),
            (r#"{"content":["x [1]"]}"#, r#""stop""#),
            ("7", "null"),
        ] {
            assert_eq!(chat(message, end), None, "{message}");
        }
        for body in [
            "",
            "{",
            "[]",
            "7",
            "{\"choices\":7}",
            "{\"choices\":[7,{}]}",
        ] {
            let body = Bytes::copy_from_slice(body.as_bytes());
            for adds in TURNS {
                let citing = citing(Sources::Always, adds);
                assert_eq!(citing.whole(Endpoint::ChatCompletions, &body), None);
            }
        }
    }

    #[test]
    fn each_choice_has_its_own() {
        let body = r#"{"choices":[{"message":{"content":"[1]"}},{"message":{"content":"x [2]"}}]}"#;
        let out = whole(Endpoint::ChatCompletions, body, Sources::Never).unwrap();
        let out: Value = serde_json::from_str(&out).unwrap();
        let url =
            |nth: usize| &out["choices"][nth]["message"]["annotations"][0]["url_citation"]["url"];
        assert_eq!(
            (url(0), url(1)),
            (&json!("https://1.test/"), &json!("https://2.test/"))
        );
        let uncited = r#"{"choices":[{"message":{"content":"x"}}]}"#;
        assert_eq!(
            whole(Endpoint::ChatCompletions, uncited, Sources::Never),
            None
        );
        let always = whole(Endpoint::ChatCompletions, body, Sources::Always).unwrap();
        assert_eq!(always.matches("Sources:").count(), 2);
    }

    #[test]
    fn responses_and_completions_have_their_own_shapes() {
        let body = r#"{"output":[{"type":"reasoning","content":[{"type":"output_text","text":"[1]"}]},
            {"type":"message","content":[{"type":"output_text","text":"x [1]","annotations":[]},{"type":"refusal","refusal":"[1]"}]}]}"#;
        let out = whole(Endpoint::Responses, body, Sources::WhenUncited).unwrap();
        let out: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(
            out["output"][1]["content"][0]["annotations"],
            json!([{ "type": "url_citation", "start_index": 2, "end_index": 5, "url": "https://1.test/", "title": "T1" }])
        );
        assert_eq!(out["output"][0]["content"][0].get("annotations"), None);
        let denied = body.replacen(
            '{',
            r#"{"incomplete_details":{"reason":"content_filter"},"#,
            1,
        );
        assert_eq!(whole(Endpoint::Responses, &denied, Sources::Always), None);
        let body = r#"{"choices":[{"text":"y","finish_reason":"stop"}]}"#;
        let out = whole(Endpoint::Completions, body, Sources::WhenUncited).unwrap();
        assert!(out.contains(r#""text":"y\n\nSources:\n[1] T1"#) && !out.contains("annotations"));
    }
}
