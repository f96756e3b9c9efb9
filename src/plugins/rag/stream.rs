//! Citations in a stream of chat or text completions: every event passes as it
//! came; before the one with the finish reason come the sources, if they are to
//! be listed, and in the turn for them an event with all annotations.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{
    answer::{Addition, Citing},
    cite::{Reader, Shape},
};
use crate::openai::{Endpoint, Frame};

/// The most answers that are read; `n` is at most that.
const CHOICES_MAX: usize = 128;

/// What is known of a stream so far.
#[derive(Debug, Default)]
pub(super) struct ChatStream {
    choices: BTreeMap<u64, Choice>,
    /// The members of an event that are the same in all.
    frame_of: Option<Map<String, Value>>,
}

#[derive(Debug)]
struct Choice {
    reader: Reader,
    calls_tools: bool,
    ended: bool,
}

impl ChatStream {
    /// Takes an event, and puts out what takes its place.
    pub(super) fn take(
        &mut self,
        citing: &Citing,
        endpoint: Endpoint,
        frame: &Frame,
        out: &mut Vec<Frame>,
    ) {
        let data = frame.data.as_deref().unwrap_or_default();
        if data.trim_ascii() == b"[DONE]" {
            // A server that never says why it ended.
            let missing: Vec<u64> = self.choices.keys().copied().collect();
            for index in missing {
                let addition = self.end(citing, index, "");
                self.put(endpoint, index, &addition, out);
            }
            out.push(frame.clone());
            return;
        }
        let event: Value = serde_json::from_slice(data).unwrap_or_default();
        let choices = event.get("choices").and_then(Value::as_array);
        let mut additions = Vec::new();
        let mut has_content = false;
        for choice in choices.into_iter().flatten() {
            let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
            let delta = choice.get("delta").unwrap_or(choice);
            let text = match endpoint {
                Endpoint::Completions => delta.get("text"),
                _ => delta.get("content"),
            };
            let text = text.and_then(Value::as_str).unwrap_or_default();
            let calls = ["tool_calls", "function_call"]
                .iter()
                .any(|key| is_filled(delta.get(key)));
            self.read(citing, index, text, calls);
            has_content |= !text.is_empty() || calls;
            let end = choice.get("finish_reason").and_then(Value::as_str);
            if let Some(end) = end.filter(|end| !end.is_empty()) {
                additions.push((index, self.end(citing, index, end)));
            }
        }
        if self.frame_of.is_none()
            && let (Some(_), Value::Object(event)) = (choices, &event)
        {
            let mut event = event.clone();
            event.shift_remove("choices");
            event.shift_remove("usage");
            self.frame_of = Some(event);
        }
        additions.retain(|(_, addition)| !addition.is_empty());
        if additions.is_empty() {
            out.push(frame.clone());
            return;
        }
        if !has_content {
            for (index, addition) in &additions {
                self.put(endpoint, *index, addition, out);
            }
            out.push(frame.clone());
            return;
        }
        // The last words and the end in one event: what is added goes between.
        out.push(frame.replaced(words_of(&event).to_string().as_bytes()));
        for (index, addition) in &additions {
            self.put(endpoint, *index, addition, out);
        }
        out.push(frame.replaced(end_of(event, endpoint).to_string().as_bytes()));
    }

    fn read(&mut self, citing: &Citing, index: u64, text: &str, calls_tools: bool) {
        let is_known = self.choices.contains_key(&index);
        if !is_known && self.choices.len() >= CHOICES_MAX {
            return;
        }
        let choice = self.choices.entry(index).or_insert_with(|| Choice {
            reader: citing.reader(),
            calls_tools: false,
            ended: false,
        });
        choice.reader.take(text);
        choice.calls_tools |= calls_tools;
    }

    fn end(&mut self, citing: &Citing, index: u64, end: &str) -> Addition {
        match self.choices.get_mut(&index) {
            Some(choice) if !choice.ended => {
                choice.ended = true;
                if choice.calls_tools {
                    return Addition::default();
                }
                citing.addition(&choice.reader, Shape::Chat, end)
            }
            _ => Addition::default(),
        }
    }

    /// Puts out the events of an addition: text first, then what it says.
    fn put(&self, endpoint: Endpoint, index: u64, addition: &Addition, out: &mut Vec<Frame>) {
        let Some(common) = &self.frame_of else {
            return;
        };
        let mut put = |choice: Value| {
            let mut event = common.clone();
            event.insert("choices".to_owned(), json!([choice]));
            let data = Value::Object(event).to_string();
            out.push(Frame::of_data(data.as_bytes()));
        };
        let of_delta =
            |delta: Value| json!({ "index": index, "delta": delta, "finish_reason": null });
        if !addition.text.is_empty() {
            put(match endpoint {
                Endpoint::Completions => {
                    json!({ "index": index, "text": addition.text, "finish_reason": null })
                }
                _ => of_delta(json!({ "content": addition.text })),
            });
        }
        if !addition.annotations.is_empty() && endpoint == Endpoint::ChatCompletions {
            put(of_delta(json!({ "annotations": addition.annotations })));
        }
    }
}

fn is_filled(value: Option<&Value>) -> bool {
    match value {
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(members)) => !members.is_empty(),
        _ => false,
    }
}

/// The event without its end.
fn words_of(event: &Value) -> Value {
    let mut event = event.clone();
    if let Some(members) = event.as_object_mut() {
        members.shift_remove("usage");
    }
    for choice in choices_of(&mut event) {
        choice.insert("finish_reason".to_owned(), Value::Null);
    }
    event
}

/// The event without its words.
fn end_of(mut event: Value, endpoint: Endpoint) -> Value {
    for choice in choices_of(&mut event) {
        match endpoint {
            Endpoint::Completions => choice.insert("text".to_owned(), json!("")),
            _ => choice.insert("delta".to_owned(), json!({})),
        };
        choice.shift_remove("logprobs");
        // Tokens are told with their words.
        choice.shift_remove("token_ids");
    }
    event
}

fn choices_of(event: &mut Value) -> impl Iterator<Item = &mut Map<String, Value>> {
    let choices = event.get_mut("choices").and_then(Value::as_array_mut);
    choices
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
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

    fn run(sources: Sources, endpoint: Endpoint, events: &[&str]) -> Vec<String> {
        let events = events.iter();
        let mut out: Vec<_> = events
            .map(|event| Frame::of_data(event.as_bytes()))
            .collect();
        for adds in TURNS {
            let citing = citing(sources, adds);
            let mut stream = ChatStream::default();
            for event in std::mem::take(&mut out) {
                stream.take(&citing, endpoint, &event, &mut out);
            }
        }
        let data = |frame: &Frame| String::from_utf8(frame.data.clone().unwrap().to_vec()).unwrap();
        out.iter().map(data).collect()
    }

    fn chat(events: &[&str]) -> Vec<String> {
        run(Sources::WhenUncited, Endpoint::ChatCompletions, events)
    }

    fn delta(content: &str) -> String {
        format!(
            r#"{{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{{"index":0,"delta":{{"content":"{content}"}},"finish_reason":null}}],"usage":null}}"#
        )
    }

    const END: &str = r#"{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;

    #[test]
    fn a_citation_that_is_cut_is_annotated_before_the_end() {
        let events = [
            delta("é "),
            delta("["),
            delta("2"),
            delta("]."),
            END.to_owned(),
            "[DONE]".to_owned(),
        ];
        let events: Vec<&str> = events.iter().map(String::as_str).collect();
        let out = chat(&events);
        assert_eq!(out[..4], events[..4]);
        assert_eq!(
            out[4],
            r#"{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"annotations":[{"type":"url_citation","url_citation":{"start_index":2,"end_index":5,"url":"https://2.test/","title":"T2"}}]},"finish_reason":null}]}"#
        );
        assert_eq!(out[5..], events[4..]);
    }

    #[test]
    fn without_a_citation_the_sources_come_before_the_end() {
        let first = delta("No.");
        let out = chat(&[&first, END, "[DONE]"]);
        assert_eq!(out.len(), 5);
        let list: Value = serde_json::from_str(&out[1]).unwrap();
        let text = list["choices"][0]["delta"]["content"].as_str().unwrap();
        assert!(text.starts_with("\n\nSources:\n[1] T1"), "{text}");
        let annotations: Value = serde_json::from_str(&out[2]).unwrap();
        let first = &annotations["choices"][0]["delta"]["annotations"][0]["url_citation"];
        assert_eq!(first["start_index"], 14);
        assert_eq!(out[3..], [END, "[DONE]"]);
    }

    #[test]
    fn words_and_end_in_one_event_are_taken_apart() {
        let last = r#"{"id":"c","choices":[{"index":0,"delta":{"content":"x [1]"},"finish_reason":"length"}],"usage":{"total_tokens":1}}"#;
        let out = chat(&[last]);
        assert_eq!(out.len(), 3, "{out:?}");
        assert_eq!(
            out[0],
            r#"{"id":"c","choices":[{"index":0,"delta":{"content":"x [1]"},"finish_reason":null}]}"#
        );
        assert!(out[1].contains("annotations"));
        assert_eq!(
            out[2],
            r#"{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"length"}],"usage":{"total_tokens":1}}"#
        );
    }

    #[test]
    fn a_stream_without_a_reason_still_has_its_annotations() {
        let first = delta("[1]");
        let out = chat(&[&first, "[DONE]"]);
        assert_eq!(out.len(), 3);
        assert!(out[1].contains("https://1.test/"));
    }

    #[test]
    fn calls_of_tools_silence_and_nonsense_pass_as_they_came() {
        let call = r#"{"choices":[{"index":0,"delta":{"content":"[1]","tool_calls":[{"index":0}]},"finish_reason":null}]}"#;
        for events in [
            vec![call, END, "[DONE]"],
            vec![
                r#"{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"tool_calls"}]}"#,
            ],
            vec![
                r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#,
                END,
            ],
            vec![r#"{"choices":[],"usage":{}}"#, "[DONE]"],
            vec![
                "{",
                "",
                "7",
                "[]",
                "{\"choices\":7}",
                "{\"choices\":[7]}",
                "[DONE]",
            ],
        ] {
            assert_eq!(chat(&events), events);
        }
    }

    #[test]
    fn each_choice_ends_with_its_own() {
        let event = |index: usize, text: &str, end: &str| {
            format!(
                r#"{{"choices":[{{"index":{index},"delta":{{"content":"{text}"}},"finish_reason":{end}}}]}}"#
            )
        };
        let events = [
            event(0, "a [1]", "null"),
            event(1, "bb [2]", "null"),
            event(1, "", r#""stop""#),
            event(0, "", r#""stop""#),
        ];
        let events: Vec<&str> = events.iter().map(String::as_str).collect();
        let out = chat(&events);
        assert_eq!(out.len(), 6);
        assert!(out[2].contains(r#""index":1"#) && out[2].contains(r#""start_index":3"#));
        assert!(out[4].contains(r#""index":0"#) && out[4].contains(r#""start_index":2"#));
    }

    #[test]
    fn completions_get_the_list_alone() {
        let events = [
            r#"{"id":"c","choices":[{"index":0,"text":"x","finish_reason":null}]}"#,
            r#"{"id":"c","choices":[{"index":0,"text":"","finish_reason":"stop"}]}"#,
        ];
        let out = run(Sources::WhenUncited, Endpoint::Completions, &events);
        assert_eq!(out.len(), 3, "{out:?}");
        assert!(out[1].contains(r#""text":"\n\nSources:"#), "{}", out[1]);
    }
}
