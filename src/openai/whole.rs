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
            let event = json!({ "type": "response.completed", "response": answer });
            put(&mut out, Some("response.completed"), &event);
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
    if let Some(event) = event.as_object_mut() {
        event.insert("usage".to_owned(), usage.clone());
    }
    put(out, None, &event);
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
        let told = events(Endpoint::Responses, &json!({ "id": "r" }), false);
        assert_eq!(told[0]["type"], "response.completed");
        assert_eq!(told[0]["response"]["id"], "r");
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
