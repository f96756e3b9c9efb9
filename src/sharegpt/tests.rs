//! Exchanges and the lines that they become.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::*;

const PIXEL: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==";

fn told(endpoint: Endpoint, request: &Value, answer: &Value) -> Vec<Value> {
    let request = request.to_string().into_bytes();
    let answer = answer.to_string().into_bytes();
    let exchange = Exchange {
        endpoint,
        request: &request,
        answer: Received::Whole(&answer),
    };
    lines(&tell(&exchange, &Meta::default(), None).unwrap())
}

fn lines(told: &Told) -> Vec<Value> {
    let bytes = told.lines.iter().map(Line::bytes);
    bytes
        .map(|line| {
            let body = line.strip_suffix(b"\n").unwrap();
            assert!(!body.contains(&b'\n'));
            assert!(read::Captured::read(body).is_some(), "{:?}", told.lines);
            serde_json::from_slice(body).unwrap()
        })
        .collect()
}

fn chat(messages: &Value, answer: &Value) -> Value {
    let request = json!({ "model": "m", "messages": messages });
    let answer = json!({ "id": "c-1", "model": "served", "choices": [
        { "index": 0, "message": answer, "finish_reason": "stop" }
    ] });
    told(Endpoint::ChatCompletions, &request, &answer).remove(0)
}

fn turns(line: &Value) -> Vec<(&str, &str)> {
    let turns = line["conversations"].as_array().unwrap().iter();
    turns
        .map(|turn| {
            assert_eq!(turn.as_object().unwrap().len(), 2);
            (
                turn["from"].as_str().unwrap(),
                turn["value"].as_str().unwrap(),
            )
        })
        .collect()
}

fn streamed(endpoint: Endpoint, request: &Value, events: &[Value]) -> Vec<Value> {
    let mut log = EventLog::default();
    for event in events {
        log.push(event.to_string().as_bytes());
    }
    log.push(b"[DONE]");
    let request = request.to_string().into_bytes();
    let exchange = Exchange {
        endpoint,
        request: &request,
        answer: Received::Events(&log),
    };
    lines(&tell(&exchange, &Meta::default(), None).unwrap())
}

#[test]
fn a_question_and_its_answer_are_a_line() {
    let line = chat(
        &json!([
            { "role": "system", "content": "Be brief." },
            { "role": "developer", "content": [{ "type": "text", "text": "And kind." }] },
            { "role": "user", "content": "Hello" },
        ]),
        &json!({ "role": "assistant", "content": "Hi" }),
    );
    assert_eq!(line["id"], "c-1");
    assert_eq!(line["system"], "Be brief.\n\nAnd kind.");
    assert_eq!(line["tools"], "");
    assert_eq!(line["images"], json!([]));
    assert_eq!(line["meta"]["model"], "m");
    assert_eq!(line["meta"]["answer_model"], "served");
    assert_eq!(line["meta"]["finish_reason"], "stop");
    assert_eq!(turns(&line), [("human", "Hello"), ("gpt", "Hi")]);
}

#[test]
fn turns_alternate_whatever_order_messages_came_in() {
    let call = |name: &str| json!([{ "id": "1", "type": "function", "function": { "name": name, "arguments": "{\"a\": 1}" } }]);
    for (messages, expected) in [
        (json!([]), vec![("human", "")]),
        (
            json!([{ "role": "assistant", "content": "Welcome" }]),
            // The answer goes on in the same turn.
            vec![("human", ""), ("gpt", "Welcome\n\nend")],
        ),
        (
            json!([{ "role": "user", "content": "a" }, { "role": "user", "content": "b" }]),
            vec![("human", "a\n\nb")],
        ),
        (
            json!([
                { "role": "user", "content": "a" },
                { "role": "assistant", "content": null, "tool_calls": call("f") },
                { "role": "tool", "content": "1" },
                { "role": "tool", "content": [{ "type": "text", "text": "2" }] },
            ]),
            vec![
                ("human", "a"),
                ("function_call", r#"{"name":"f","arguments":{"a": 1}}"#),
                ("observation", "1\n</tool_response>\n<tool_response>\n2"),
            ],
        ),
        (
            json!([
                { "role": "user", "content": "a" },
                { "role": "assistant", "tool_calls": call("f") },
                { "role": "tool", "content": "1" },
                { "role": "user", "content": "b" },
            ]),
            vec![
                ("human", "a"),
                ("function_call", r#"{"name":"f","arguments":{"a": 1}}"#),
                ("observation", "1\n\nb"),
            ],
        ),
        (
            json!([
                { "role": "user", "content": "a" },
                { "role": "assistant", "content": "let me see" },
                { "role": "assistant", "tool_calls": call("f") },
                { "role": "assistant", "tool_calls": call("g") },
                { "role": "assistant", "content": "done" },
                { "role": "user", "content": "b" },
            ]),
            vec![
                ("human", "a"),
                (
                    "function_call",
                    r#"[{"name":"f","arguments":{"a": 1}},{"name":"g","arguments":{"a": 1}}]"#,
                ),
                ("observation", ""),
                ("gpt", "done"),
                ("human", "b"),
            ],
        ),
        (
            json!([{ "role": "tool", "content": "x" }, { "role": "function", "content": "y" }]),
            vec![("observation", "x\n</tool_response>\n<tool_response>\ny")],
        ),
    ] {
        let line = chat(&messages, &json!({ "content": "end" }));
        let found = turns(&line);
        let is_answer_apart = found.last() == Some(&("gpt", "end"));
        let expected: Vec<_> = expected
            .into_iter()
            .chain(is_answer_apart.then_some(("gpt", "end")))
            .collect();
        assert_eq!(found, expected, "{messages}");
    }
}

#[test]
fn calls_thoughts_and_what_is_said_beside_have_their_places() {
    let line = chat(
        &json!([{ "role": "user", "content": "Weather?" }]),
        &json!({
            "content": "Let me look.",
            "reasoning_content": "need a tool\n",
            "tool_calls": [
                { "function": { "name": "a", "arguments": "{\"big\":12345678901234567890123}" } },
                { "function": { "name": "b\"", "arguments": "no json" } },
                { "function": { "name": "c", "arguments": "" } },
            ],
        }),
    );
    assert_eq!(
        turns(&line)[1],
        (
            "function_call",
            "<think>\nneed a tool\n</think>\n\n[{\"name\":\"a\",\"arguments\":{\"big\":12345678901234567890123}},\
             {\"name\":\"b\\\"\",\"arguments\":\"no json\"},{\"name\":\"c\",\"arguments\":{}}]"
        )
    );
    assert_eq!(line["meta"]["preamble"], "Let me look.");
    let line = chat(
        &json!([
            { "role": "user", "content": "a" },
            { "role": "assistant", "content": "b", "reasoning": "why" },
            { "role": "user", "content": "c" },
        ]),
        &json!({ "content": "d", "reasoning_content": "", "reasoning": "because" }),
    );
    let turns = turns(&line);
    assert_eq!(turns[1].1, "<think>\nwhy\n</think>\n\nb");
    assert_eq!(turns[3].1, "<think>\nbecause\n</think>\n\nd");
}

#[test]
fn parts_that_were_only_thought_are_thoughts() {
    let parts = |thought: &str, text: &str| {
        json!([
            { "type": "thinking", "thinking": [{ "type": "text", "text": thought }] },
            { "type": "text", "text": text },
        ])
    };
    let history = json!([
        { "role": "user", "content": "a" },
        { "role": "assistant", "content": parts("first", "b") },
        { "role": "user", "content": "c" },
    ]);
    let expected = [
        ("human", "a"),
        ("gpt", "<think>\nfirst\n</think>\n\nb"),
        ("human", "c"),
        ("gpt", "<think>\nthen\n</think>\n\nd"),
    ];
    let line = chat(&history, &json!({ "content": parts("then", "d") }));
    assert_eq!(turns(&line), expected);
    let request = json!({ "model": "m", "messages": history });
    let delta = json!({ "choices": [{ "index": 0, "delta": { "content": parts("then", "d") } }] });
    let line = streamed(Endpoint::ChatCompletions, &request, &[delta]).remove(0);
    assert_eq!(turns(&line), expected);
}

#[test]
fn tools_lack_nothing_that_loaders_ask_for() {
    let request = json!({ "model": "m", "messages": [], "tools": [
        { "type": "function", "function": { "name": "a", "strict": true } },
        { "type": "function", "function": { "name": "b", "description": "d",
            "parameters": { "type": "object", "properties": { "x": {} } } } },
        { "type": "web_search" },
        { "type": "function" },
    ] });
    let answer = json!({ "choices": [{ "message": { "content": "x" } }] });
    let line = told(Endpoint::ChatCompletions, &request, &answer).remove(0);
    let tools: Value = serde_json::from_str(line["tools"].as_str().unwrap()).unwrap();
    assert_eq!(
        tools,
        json!([
            { "name": "a", "description": "", "parameters": { "type": "object", "properties": {} } },
            { "name": "b", "description": "d",
              "parameters": { "type": "object", "properties": { "x": {} } } },
        ])
    );
}

#[test]
fn images_become_files_and_marks_that_somebody_wrote_do_not_count() {
    let data = format!("data:image/png;base64,{PIXEL}");
    let request = json!({ "model": "m", "messages": [{ "role": "user", "content": [
        { "type": "text", "text": "an <image> and" },
        { "type": "image_url", "image_url": { "url": data } },
        { "type": "text", "text": "again" },
        { "type": "image_url", "image_url": { "url": data } },
        { "type": "image_url", "image_url": { "url": "https://example.org/a.png" } },
        { "type": "image_url", "image_url": { "url": "data:image/png;base64,!!" } },
        { "type": "image_url", "image_url": { "url": "data:image/../../x;base64,AAAA" } },
        { "type": "input_audio", "input_audio": { "data": "AAAA" } },
    ] }] });
    let answer = json!({ "choices": [{ "message": { "content": "no <video>" } }] });
    let request = request.to_string().into_bytes();
    let answer = answer.to_string().into_bytes();
    let exchange = Exchange {
        endpoint: Endpoint::ChatCompletions,
        request: &request,
        answer: Received::Whole(&answer),
    };
    let told = tell(&exchange, &Meta::default(), None).unwrap();
    assert_eq!(told.images.len(), 2);
    let line = &lines(&told)[0];
    let names: Vec<_> = line["images"].as_array().unwrap().iter().collect();
    assert_eq!(names.len(), 3);
    assert_eq!(names[0], names[1]);
    assert_eq!(names[0], &told.images[0].name);
    assert!(told.images[0].name.ends_with(".png"));
    assert!(told.images[1].name.ends_with(".bin"));
    let turns = turns(line);
    assert_eq!(
        turns[0].1,
        "an &lt;image&gt; and<image>again<image>[image: https://example.org/a.png][image]<image>[audio]"
    );
    assert_eq!(turns[0].1.matches("<image>").count(), names.len());
    assert_eq!(turns[1].1, "no &lt;video&gt;");
}

#[test]
fn a_stream_says_what_its_pieces_say_together() {
    let request = json!({ "model": "m", "messages": [{ "role": "user", "content": "a" }] });
    let chunk = |index: u64, delta: Value, finish: Value| {
        json!({ "id": "c-2", "model": "served", "choices": [
            { "index": index, "delta": delta, "finish_reason": finish } ] })
    };
    let events = [
        chunk(
            0,
            json!({ "role": "assistant", "content": "" }),
            Value::Null,
        ),
        chunk(
            0,
            json!({ "reasoning_content": "h", "reasoning": "h" }),
            Value::Null,
        ),
        chunk(0, json!({ "reasoning_content": "m" }), Value::Null),
        chunk(0, json!({ "content": "a\n\u{2028}" }), Value::Null),
        chunk(1, json!({ "content": "other" }), Value::Null),
        chunk(0, json!({ "content": "\"b\"\u{85}" }), Value::Null),
        chunk(
            1,
            json!({ "tool_calls": [{ "index": 0, "id": "x", "function": { "name": "f", "arguments": "{\"a\"" } }] }),
            Value::Null,
        ),
        chunk(
            1,
            json!({ "tool_calls": [{ "index": 0, "function": { "name": "f", "arguments": ":1}" } }] }),
            Value::Null,
        ),
        chunk(1, json!({}), json!("tool_calls")),
        chunk(0, json!({}), json!("stop")),
        json!({ "choices": [], "usage": { "total_tokens": 3 } }),
    ];
    let lines = streamed(Endpoint::ChatCompletions, &request, &events);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["id"], "c-2-0");
    assert_eq!(
        turns(&lines[0])[1],
        ("gpt", "<think>\nhm\n</think>\n\na\n\u{2028}\"b\"\u{85}")
    );
    assert_eq!(lines[1]["id"], "c-2-1");
    assert_eq!(lines[1]["meta"]["choice"], 1);
    assert_eq!(lines[1]["meta"]["finish_reason"], "tool_calls");
    assert_eq!(lines[1]["meta"]["preamble"], "other");
    assert_eq!(
        turns(&lines[1])[1],
        ("function_call", r#"{"name":"f","arguments":{"a":1}}"#)
    );
}

#[test]
fn what_some_readers_take_for_a_line_end_is_escaped() {
    let line = Line::new(
        "\u{2029}".to_owned(),
        Dialogue {
            system: "a\u{2028}b\u{85}c\nd\u{0}".to_owned(),
            ..Dialogue::default()
        },
        Meta::default(),
    );
    let text = String::from_utf8(line.bytes()).unwrap();
    assert_eq!(
        text.matches(['\n', '\u{2028}', '\u{2029}', '\u{85}'])
            .count(),
        1
    );
    assert!(text.ends_with('\n'));
    let read: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(read["system"], "a\u{2028}b\u{85}c\nd\u{0}");
}

#[test]
fn completions_have_a_line_for_each_prompt_and_choice() {
    let answer = json!({ "id": "t", "choices": [
        { "index": 0, "text": "A" }, { "index": 1, "text": "B" },
        { "index": 2, "text": "C" }, { "index": 3, "text": "D" },
    ] });
    let request = json!({ "model": "m", "prompt": ["a", "b"], "n": 2 });
    let lines = told(Endpoint::Completions, &request, &answer);
    let said: Vec<_> = lines.iter().map(|line| turns(line)[0].1).collect();
    assert_eq!(said, ["a", "a", "b", "b"]);
    let events = [
        json!({ "choices": [{ "index": 0, "text": "on" }] }),
        json!({ "choices": [{ "index": 0, "text": "ce", "finish_reason": "length" }] }),
    ];
    let request = json!({ "model": "m", "prompt": "there was" });
    let line = streamed(Endpoint::Completions, &request, &events).remove(0);
    assert_eq!(turns(&line), [("human", "there was"), ("gpt", "once")]);
    assert_eq!(line["meta"]["finish_reason"], "length");
    let tokens = br#"{"model":"m","prompt":[1,2,3]}"#;
    assert_eq!(
        Asked::read(Endpoint::Completions, tokens),
        Err(Unreadable::Tokens)
    );
}

#[test]
fn responses_are_told_whole_or_as_far_as_they_came() {
    let request = json!({ "model": "m", "instructions": "Be.", "input": [
        { "role": "user", "content": [{ "type": "input_text", "text": "a" },
            { "type": "input_image", "image_url": format!("data:image/png;base64,{PIXEL}") }] },
        { "type": "reasoning", "summary": [{ "type": "summary_text", "text": "look" }] },
        { "type": "function_call", "name": "f", "arguments": "{}", "call_id": "1" },
        { "type": "function_call_output", "call_id": "1", "output": "7" },
    ], "tools": [{ "type": "function", "name": "f", "parameters": null }] });
    let response = json!({ "id": "r", "model": "served", "status": "completed", "output": [
        { "type": "reasoning", "content": [{ "type": "reasoning_text", "text": "so" }] },
        { "type": "message", "content": [{ "type": "output_text", "text": "it is 7" }] },
    ] });
    let expected = [
        ("human", "a<image>"),
        (
            "function_call",
            "<think>\nlook\n</think>\n\n{\"name\":\"f\",\"arguments\":{}}",
        ),
        ("observation", "7"),
        ("gpt", "<think>\nso\n</think>\n\nit is 7"),
    ];
    let line = told(Endpoint::Responses, &request, &response).remove(0);
    assert_eq!(turns(&line), expected);
    assert_eq!(line["system"], "Be.");
    assert_eq!(line["meta"]["finish_reason"], "stop");
    let begun = [
        json!({ "type": "response.created", "response": { "id": "r", "model": "served" } }),
        json!({ "type": "response.output_text.delta", "delta": "it " }),
        json!({ "type": "response.output_text.delta", "delta": "is" }),
    ];
    let partial = streamed(Endpoint::Responses, &request, &begun).remove(0);
    assert_eq!(partial["id"], "r");
    assert_eq!(turns(&partial)[3].1, "it is");
    let mut whole = begun.to_vec();
    whole.push(json!({ "type": "response.completed", "response": response }));
    let line = streamed(Endpoint::Responses, &request, &whole).remove(0);
    assert_eq!(turns(&line), expected);
}

#[test]
fn an_answer_goes_on_with_a_message_that_was_begun() {
    let request = json!({ "model": "m", "continue_final_message": true, "messages": [
        { "role": "user", "content": "a" }, { "role": "assistant", "content": "Once u" } ] });
    let answer = json!({ "choices": [{ "message": { "content": "pon" } }] });
    let line = told(Endpoint::ChatCompletions, &request, &answer).remove(0);
    assert_eq!(turns(&line), [("human", "a"), ("gpt", "Once upon")]);
}

#[test]
fn whatever_an_upstream_sends_becomes_valid_lines_or_none() {
    let request = br#"{"model":"m","messages":[{"role":"user","content":"a"}]}"#;
    let exchange = |answer| Exchange {
        endpoint: Endpoint::ChatCompletions,
        request,
        answer,
    };
    for body in [
        &b"{\"choices\":[{\"message\":{\"content\":\"bad \xff byte\"}}]}"[..],
        b"{\"choices\":[{\"message\":{\"content\":\"half \\ud83d\"}}]}",
    ] {
        let told = tell(&exchange(Received::Whole(body)), &Meta::default(), None).unwrap();
        assert!(turns(&lines(&told)[0])[1].1.contains('\u{fffd}'));
    }
    for body in [&b"{}"[..], b"{\"choices\":[]}", b"{\"choices\":7}", b"no"] {
        assert!(tell(&exchange(Received::Whole(body)), &Meta::default(), None).is_err());
    }
    let mut log = EventLog::default();
    for data in [
        &b"{\"choices\":[{\"delta\":{\"content\":\"\xc3\"}}]}"[..],
        b"{\"choices\":[{\"index\":99999999999999999999,\"delta\":{\"content\":\"x\"}}]}",
        b"{\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":4000000000}]}}]}",
        b"{\"choices\":{\"delta\":7}}",
        b"nonsense",
        b"",
    ] {
        log.push(data);
    }
    let told = tell(&exchange(Received::Events(&log)), &Meta::default(), None).unwrap();
    assert_eq!(turns(&lines(&told)[0])[1], ("gpt", "\u{fffd}x"));
    let told = tell(&exchange(Received::Nothing), &Meta::default(), None).unwrap();
    assert_eq!(turns(&lines(&told)[0])[1], ("gpt", ""));
}

/// Puts something in place of a secret.
struct Hide;

impl Rewrite for Hide {
    fn rewrite<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if text.contains("secret") {
            Cow::Owned(text.replace("secret", "{\"}"))
        } else {
            Cow::Borrowed(text)
        }
    }
}

#[test]
fn what_clients_and_upstreams_wrote_beside_the_dialogue_can_be_changed_too() {
    let exchange = Exchange {
        endpoint: Endpoint::ChatCompletions,
        request: br#"{"model":"secret","messages":[{"role":"user","content":"a"}]}"#,
        answer: Received::Whole(
            br#"{"model":"my-secret","choices":[{"message":{"content":"b"},"finish_reason":"secret"}]}"#,
        ),
    };
    let meta = Meta {
        error: "the secret".to_owned(),
        ..Meta::default()
    };
    let told = tell(&exchange, &meta, Some(&Hide)).unwrap();
    let bytes = told.lines[0].bytes();
    let line = String::from_utf8(bytes).unwrap();
    assert!(!line.contains("secret"), "{line}");
}

#[test]
fn every_word_of_a_dialogue_can_be_changed_and_calls_stay_calls() {
    let request = json!({ "model": "m",
        "messages": [
            { "role": "system", "content": "secret" },
            { "role": "user", "content": "a secret" },
            { "role": "assistant", "reasoning": "secret", "content": "secret",
              "tool_calls": [{ "function": { "name": "f", "arguments": "{\"secret\":[\"secret\",1]}" } },
                             { "function": { "name": "g", "arguments": "secret" } }] },
            { "role": "tool", "content": "secret" },
        ],
        "tools": [{ "type": "function", "function": { "name": "f", "description": "secret" } }],
    });
    let answer = json!({ "choices": [{ "message": { "content": "the secret" } }] });
    let request = request.to_string().into_bytes();
    let answer = answer.to_string().into_bytes();
    let exchange = Exchange {
        endpoint: Endpoint::ChatCompletions,
        request: &request,
        answer: Received::Whole(&answer),
    };
    let told = tell(&exchange, &Meta::default(), Some(&Hide)).unwrap();
    let line = &lines(&told)[0];
    assert!(!line.to_string().contains("secret"), "{line}");
    let called = turns(line)[1].1;
    let (_, calls) = read::split_thought(called);
    let calls: Value = serde_json::from_str(calls).unwrap();
    assert_eq!(calls[0]["arguments"]["{\"}"][0], "{\"}");
}
