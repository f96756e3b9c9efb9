//! A whole answer told as a stream, for an upstream that does not stream
//! although it was asked to: the client waits for events, and reads nothing
//! else.

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::{Value, json};

use super::Endpoint;

/// Returns the events that say what a whole answer says, without the last
/// (`[DONE]`); `None` if the answer is not of the endpoint's kind.
///
/// `want_usage`: whether the client asked for a usage event.
pub fn as_events(endpoint: Endpoint, body: &[u8], want_usage: bool) -> Option<Bytes> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    let mut out = BytesMut::with_capacity(body.len() + 512);
    match endpoint {
        Endpoint::ChatCompletions => {
            for choice in answer.get("choices")?.as_array()? {
                for choice in deltas_of(choice)? {
                    put(
                        &mut out,
                        None,
                        &chunk(&answer, "chat.completion.chunk", &[choice]),
                    );
                }
            }
            put_usage(&mut out, &answer, "chat.completion.chunk", want_usage);
        }
        Endpoint::Completions => {
            let choices = answer.get("choices")?.as_array()?;
            put(&mut out, None, &chunk(&answer, "text_completion", choices));
            put_usage(&mut out, &answer, "text_completion", want_usage);
        }
        Endpoint::Responses => {
            if !answer.is_object() {
                return None;
            }
            put_response(&mut out, answer);
        }
        _ => return None,
    }
    Some(out.freeze())
}

/// The two chunks of a choice: all of its message, then how it ended.
fn deltas_of(choice: &Value) -> Option<[Value; 2]> {
    let index = choice.get("index").cloned().unwrap_or(json!(0));
    let mut delta = choice.get("message")?.clone();
    // Of a stream's tool calls each has its place in the list.
    if let Some(calls) = delta.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for (place, call) in calls.iter_mut().enumerate() {
            if let Some(call) = call.as_object_mut() {
                call.insert("index".to_owned(), json!(place));
            }
        }
    }
    let ended = choice.get("finish_reason").cloned();
    Some([
        json!({ "index": index, "delta": delta, "finish_reason": null }),
        json!({ "index": index, "delta": {}, "finish_reason": ended.unwrap_or(json!("stop")) }),
    ])
}

fn chunk(answer: &Value, object: &str, choices: &[Value]) -> Value {
    let of = |key: &str| answer.get(key).cloned().unwrap_or(Value::Null);
    json!({
        "id": of("id"),
        "object": object,
        "created": of("created"),
        "model": of("model"),
        "choices": choices,
    })
}

fn put_usage(out: &mut BytesMut, answer: &Value, object: &str, wanted: bool) {
    let Some(usage) = answer.get("usage").filter(|_| wanted) else {
        return;
    };
    let mut event = chunk(answer, object, &[]);
    set(&mut event, "usage", usage.clone());
    put(out, None, &event);
}

/// The events of a response as OpenAI's streams have them: begun, each item
/// with its text, then the whole.
fn put_response(out: &mut BytesMut, answer: Value) {
    let mut sequence = 0;
    let mut tell = |name: &str, mut event: Value| {
        set(&mut event, "type", json!(name));
        set(&mut event, "sequence_number", json!(sequence));
        sequence += 1;
        put(out, Some(name), &event);
    };
    let mut begun = answer.clone();
    set(&mut begun, "status", json!("in_progress"));
    set(&mut begun, "output", json!([]));
    set(&mut begun, "usage", Value::Null);
    tell("response.created", json!({ "response": begun }));
    let items = answer.get("output").and_then(Value::as_array);
    for (index, item) in items.into_iter().flatten().enumerate() {
        let of_item = json!({ "output_index": index, "item": item });
        tell("response.output_item.added", of_item.clone());
        let parts = item.get("content").and_then(Value::as_array);
        for (place, part) in parts.into_iter().flatten().enumerate() {
            let Some(text) = part.get("text").and_then(Value::as_str) else {
                continue;
            };
            let id = item.get("id").cloned().unwrap_or(Value::Null);
            let at = json!({ "item_id": id, "output_index": index, "content_index": place });
            let with = |key: &str, value: &str| {
                let mut event = at.clone();
                set(&mut event, key, json!(value));
                event
            };
            tell("response.output_text.delta", with("delta", text));
            tell("response.output_text.done", with("text", text));
        }
        tell("response.output_item.done", of_item);
    }
    let last = match answer.get("status").and_then(Value::as_str) {
        Some("incomplete") => "response.incomplete",
        _ => "response.completed",
    };
    tell(last, json!({ "response": answer }));
}

/// Sets a member of an object; nothing else has members.
fn set(value: &mut Value, key: &str, member: Value) {
    if let Some(members) = value.as_object_mut() {
        members.insert(key.to_owned(), member);
    }
}

fn put(out: &mut BytesMut, name: Option<&str>, event: &Value) {
    if let Some(name) = name {
        out.put_slice(format!("event: {name}\n").as_bytes());
    }
    out.put_slice(format!("data: {event}\n\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(endpoint: Endpoint, body: &Value, want_usage: bool) -> Vec<Value> {
        let events = as_events(endpoint, body.to_string().as_bytes(), want_usage).unwrap();
        let text = std::str::from_utf8(&events).unwrap();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }

    #[test]
    fn a_chat_answer_becomes_its_chunks() {
        let answer = json!({
            "id": "x", "created": 1, "model": "m",
            "choices": [{
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hi",
                    "tool_calls": [{ "id": "c", "function": { "name": "f", "arguments": "{}" } }],
                },
                "finish_reason": "tool_calls",
            }],
            "usage": { "total_tokens": 3 },
        });
        let told = events(Endpoint::ChatCompletions, &answer, true);
        assert_eq!(told.len(), 3);
        assert_eq!(told[0]["object"], "chat.completion.chunk");
        assert_eq!(told[0]["choices"][0]["delta"]["content"], "Hi");
        assert_eq!(told[0]["choices"][0]["delta"]["tool_calls"][0]["index"], 0);
        assert_eq!(told[1]["choices"][0]["finish_reason"], "tool_calls");
        assert_eq!(told[2]["usage"]["total_tokens"], 3);
        assert_eq!(events(Endpoint::ChatCompletions, &answer, false).len(), 2);
    }

    #[test]
    fn completions_and_responses_have_their_own_events() {
        let answer = json!({ "id": "x", "choices": [{ "index": 0, "text": "Hi" }] });
        let told = events(Endpoint::Completions, &answer, false);
        assert_eq!(told[0]["choices"][0]["text"], "Hi");
    }

    #[test]
    fn a_response_is_begun_told_and_completed() {
        let answer = json!({
            "id": "r", "status": "completed",
            "output": [{ "id": "m", "type": "message",
                "content": [{ "type": "output_text", "text": "Hi" }] }],
        });
        let told = events(Endpoint::Responses, &answer, false);
        let types: Vec<_> = told.iter().map(|event| &event["type"]).collect();
        assert_eq!(
            types,
            [
                "response.created",
                "response.output_item.added",
                "response.output_text.delta",
                "response.output_text.done",
                "response.output_item.done",
                "response.completed",
            ]
        );
        assert_eq!(told[0]["response"]["status"], "in_progress");
        assert_eq!(told[2]["delta"], "Hi");
        assert_eq!(told[2]["item_id"], "m");
        assert_eq!(told[5]["response"], answer);
        assert_eq!(told[5]["sequence_number"], 5);
        let cut = json!({ "status": "incomplete" });
        let told = events(Endpoint::Responses, &cut, false);
        assert_eq!(told[1]["type"], "response.incomplete");
        assert_eq!(as_events(Endpoint::Responses, b"[]", false), None);
    }

    #[test]
    fn what_is_no_answer_has_no_events() {
        for body in ["{}", "[]", "<html>", r#"{"choices":[{"index":0}]}"#] {
            assert_eq!(
                as_events(Endpoint::ChatCompletions, body.as_bytes(), false),
                None
            );
        }
    }
}
