//! Both directions, with the exact JSON.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use serde_json::{Value, json};

use super::Ollama;
use crate::{
    config::{KeepAlive, Time, Upstream},
    dialects::{Call, DecodeError, Dialect, Encoded, Unsupported},
    openai::{ApiRequest, Endpoint, Framer, UpstreamError, inspect},
};

const LINE_MAX: usize = 4096;

fn encode_for(
    endpoint: Endpoint,
    body: &Value,
    upstream: &Upstream,
) -> Result<Encoded, Unsupported> {
    let raw = Bytes::from(body.to_string());
    let request = ApiRequest::parse(endpoint, raw, 64).unwrap();
    let call = Call {
        request: &request,
        model: "llama3.1",
        upstream,
        cache_salt: None,
        context: &|tokens| tokens.max(2048).next_power_of_two(),
        event_bytes_max: LINE_MAX,
    };
    Ollama.encode(&call)
}

fn encode(endpoint: Endpoint, body: &Value) -> Encoded {
    encode_for(endpoint, body, &Upstream::default()).unwrap()
}

fn native(encoded: &Encoded) -> Value {
    serde_json::from_slice(&encoded.body).unwrap()
}

/// What a chat with these members, added to a question, is sent as.
fn chat(more: Value) -> Value {
    let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    native(&encode(Endpoint::ChatCompletions, &body))
}

/// What these messages are sent as.
fn messages(messages: Value) -> Result<Value, Unsupported> {
    let body = json!({ "model": "m", "messages": messages });
    let encoded = encode_for(Endpoint::ChatCompletions, &body, &Upstream::default())?;
    Ok(native(&encoded)["messages"].clone())
}

fn refused(endpoint: Endpoint, body: &Value) -> (u16, Option<String>) {
    let error = match encode_for(endpoint, body, &Upstream::default()) {
        Ok(encoded) => panic!("{:?}", encoded.body),
        Err(why) => why.to_error(),
    };
    let param = error.param.map(|param| param.into_owned());
    (error.status.as_u16(), param)
}

// --- requests ---

#[test]
fn a_chat_goes_to_the_native_path_with_its_context() {
    let body = json!({ "model": "m", "stream": true, "messages": [
        { "role": "developer", "content": "be brief" },
        { "role": "user", "name": "ann", "content": "hi" },
    ] });
    let encoded = encode(Endpoint::ChatCompletions, &body);
    assert_eq!(encoded.suffix, "/api/chat");
    assert_eq!(encoded.accept, "application/x-ndjson");
    assert!(encoded.hide_usage);
    assert_eq!(
        native(&encoded),
        json!({
            "model": "llama3.1",
            "messages": [
                { "role": "system", "content": "be brief" },
                { "role": "user", "content": "hi" },
            ],
            "options": { "num_ctx": 2048 },
            "stream": true,
        })
    );
}

#[test]
fn what_the_configuration_says_is_sent() {
    let upstream = Upstream {
        max_tokens: Some(1024),
        num_thread: Some(6),
        keep_alive: Some(KeepAlive::For(Time::secs(1800))),
        ..Upstream::default()
    };
    let body = |more: Value| {
        let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let encoded = encode_for(Endpoint::ChatCompletions, &body, &upstream).unwrap();
        native(&encoded)
    };
    let sent = body(json!({}));
    assert_eq!(
        sent["options"],
        json!({ "num_predict": 1024, "num_ctx": 2048, "num_thread": 6 })
    );
    assert_eq!(sent["keep_alive"], "30m");
    assert_eq!(sent["stream"], false);
    for (wish, num_predict) in [
        (json!({ "max_tokens": 5 }), 5),
        (json!({ "max_completion_tokens": 7 }), 7),
        (json!({ "max_tokens": 4000 }), 1024),
    ] {
        assert_eq!(body(wish)["options"]["num_predict"], num_predict);
    }
    for (keep_alive, sent) in [
        (KeepAlive::Forever(-1), json!(-1)),
        (KeepAlive::Forever(0), json!(0)),
        (KeepAlive::For(Time::secs(90)), json!("1m30s")),
    ] {
        let upstream = Upstream {
            keep_alive: Some(keep_alive),
            ..Upstream::default()
        };
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
        let encoded = encode_for(Endpoint::ChatCompletions, &body, &upstream).unwrap();
        assert_eq!(native(&encoded)["keep_alive"], sent);
    }
}

#[test]
fn every_option_has_its_place() {
    let sent = chat(json!({
        "temperature": 0.2, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 42,
        "stop": "END", "frequency_penalty": 0.5, "presence_penalty": -0.5,
        "repetition_penalty": 1.1, "user": "ann", "logit_bias": { "1": 5 }, "n": 1,
        "options": { "num_ctx": 1_000_000 }, "keep_alive": -1, "temperature_": 1,
    }));
    assert_eq!(
        sent["options"],
        json!({
            "temperature": 0.2, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 42,
            "stop": ["END"], "frequency_penalty": 0.5, "presence_penalty": -0.5,
            "repeat_penalty": 1.1, "num_ctx": 2048,
        })
    );
    let keys: Vec<&String> = sent.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["model", "messages", "options", "stream"]);
    assert_eq!(
        chat(json!({ "stop": ["a", "b"] }))["options"]["stop"],
        json!(["a", "b"])
    );
}

#[test]
fn the_context_follows_the_prompt_the_tools_and_the_answer() {
    let of = |text: &str, more: Value| {
        let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": text }] });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        native(&encode(Endpoint::ChatCompletions, &body))["options"]["num_ctx"].clone()
    };
    assert_eq!(of("hi", json!({})), 2048);
    assert_eq!(of(&"word ".repeat(2000), json!({})), 8192);
    assert_eq!(of("hi", json!({ "max_tokens": 3000 })), 4096);
    let tool = json!({ "type": "function", "function": { "name": "f", "description": "d".repeat(12_000) } });
    assert_eq!(of("hi", json!({ "tools": [tool] })), 8192);
}

#[test]
fn parts_become_text_and_pictures() {
    let sent = messages(json!([{ "role": "user", "content": [
        { "type": "text", "text": "what is" },
        { "type": "image_url", "image_url": { "url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low" } },
        { "type": "image_url", "image_url": "DATA:image/jpeg;BASE64,/9j/" },
        { "type": "text", "text": "this?" },
    ] }]));
    assert_eq!(
        sent.unwrap(),
        json!([{ "role": "user", "content": "what is\nthis?", "images": ["iVBORw0KGgo=", "/9j/"] }])
    );
}

#[test]
fn a_picture_that_would_have_to_be_fetched_is_refused() {
    for url in [
        "https://example.com/cat.png",
        "http://169.254.169.254/latest/",
        "file:///etc/passwd",
        "data:image/png,raw",
        "data:image/png;base64,",
        "cat.png",
    ] {
        let part = json!({ "type": "image_url", "image_url": { "url": url } });
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": [part] }] });
        let wanted = (400, Some("messages".to_owned()));
        assert_eq!(refused(Endpoint::ChatCompletions, &body), wanted, "{url}");
    }
}

#[test]
fn tool_calls_and_what_the_tools_said_are_translated() {
    let sent = messages(json!([
        { "role": "user", "content": "weather?" },
        { "role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [
            { "id": "call_1", "type": "function", "function": { "name": "weather", "arguments": "{\"city\":\"Paris\",\"n\":1.50}" } },
            { "id": "call_2", "type": "function", "function": { "name": "time", "arguments": "" } },
        ] },
        { "role": "tool", "tool_call_id": "call_2", "content": "noon" },
        { "role": "tool", "tool_call_id": "call_1", "content": [{ "type": "text", "text": "rain" }] },
        { "role": "function", "name": "weather", "content": "sun" },
    ]));
    assert_eq!(
        sent.unwrap(),
        json!([
            { "role": "user", "content": "weather?" },
            { "role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
                { "id": "call_1", "function": { "name": "weather", "arguments": { "city": "Paris", "n": 1.50 } } },
                { "id": "call_2", "function": { "name": "time", "arguments": {} } },
            ] },
            { "role": "tool", "content": "noon", "tool_name": "time", "tool_call_id": "call_2" },
            { "role": "tool", "content": "rain", "tool_name": "weather", "tool_call_id": "call_1" },
            { "role": "tool", "content": "sun", "tool_name": "weather" },
        ])
    );
}

#[test]
fn messages_that_cannot_be_said_are_refused() {
    for message in [
        json!({ "content": "no role" }),
        json!({ "role": "user", "content": 7 }),
        json!({ "role": "user", "content": [7] }),
        json!({ "role": "user", "content": [{ "text": "no type" }] }),
        json!({ "role": "user", "content": [{ "type": "input_audio", "input_audio": {} }] }),
        json!({ "role": "assistant", "tool_calls": [{ "id": "x" }] }),
        json!({ "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": "not json" } }] }),
        json!({ "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": "[1]" } }] }),
    ] {
        let body = json!({ "model": "m", "messages": [message] });
        let wanted = (400, Some("messages".to_owned()));
        assert_eq!(refused(Endpoint::ChatCompletions, &body), wanted, "{body}");
    }
    let body = json!({ "model": "m", "n": 2, "messages": [{ "role": "user", "content": "x" }] });
    assert_eq!(
        refused(Endpoint::ChatCompletions, &body),
        (400, Some("n".to_owned()))
    );
}

#[test]
fn tools_are_passed_on_as_the_choice_wants() {
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } });
    let both = json!([tool("a"), tool("b")]);
    let sent =
        |choice: Value| chat(json!({ "tools": both, "tool_choice": choice }))["tools"].clone();
    assert_eq!(sent(json!("auto")), both);
    assert_eq!(sent(json!("required")), both);
    assert_eq!(sent(json!("none")), Value::Null);
    let named = json!({ "type": "function", "function": { "name": "b" } });
    assert_eq!(sent(named), json!([tool("b")]));
    let some = json!({ "type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [{ "type": "function", "function": { "name": "a" } }],
    } });
    assert_eq!(sent(some), json!([tool("a")]));
    assert_eq!(sent(json!({ "type": "auto" })), both);
    let old = chat(json!({ "functions": [{ "name": "f" }] }));
    assert_eq!(
        old["tools"],
        json!([{ "type": "function", "function": { "name": "f" } }])
    );
}

#[test]
fn the_format_and_the_thinking_are_said() {
    let format = |format: Value| chat(json!({ "response_format": format }))["format"].clone();
    assert_eq!(format(json!({ "type": "text" })), Value::Null);
    assert_eq!(format(json!({ "type": "json_object" })), "json");
    let schema = json!({ "type": "object", "properties": { "a": { "type": "string" } } });
    let named = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    assert_eq!(format(named), schema);

    let think = |more: Value| chat(more)["think"].clone();
    assert_eq!(think(json!({})), Value::Null);
    assert_eq!(think(json!({ "reasoning_effort": "none" })), false);
    assert_eq!(think(json!({ "reasoning_effort": "minimal" })), "low");
    assert_eq!(think(json!({ "reasoning_effort": "high" })), "high");
    assert_eq!(
        think(json!({ "reasoning": { "effort": "medium" } })),
        "medium"
    );
    assert_eq!(
        think(json!({ "chat_template_kwargs": { "enable_thinking": false } })),
        false
    );
    assert_eq!(think(json!({ "think": true })), true);
}

#[test]
fn a_model_that_cannot_think_is_asked_again_without() {
    let body = br#"{"model":"m","think":"low","messages":[{"role":"user","content":"x"}]}"#;
    let error =
        |message: &str| UpstreamError::read(json!({ "error": message }).to_string().as_bytes());
    let again = Ollama
        .amended(body, &error("\"m\" does not support thinking"))
        .unwrap();
    assert_eq!(
        again,
        r#"{"model":"m","messages":[{"role":"user","content":"x"}]}"#
    );
    assert!(
        Ollama
            .amended(&again, &error("\"m\" does not support thinking"))
            .is_none()
    );
    assert!(
        Ollama
            .amended(body, &error("\"m\" does not support tools"))
            .is_none()
    );
}

#[test]
fn completions_go_to_generate() {
    let encoded = encode(
        Endpoint::Completions,
        &json!({ "model": "m", "prompt": ["def f("], "suffix": "return", "max_tokens": 9 }),
    );
    assert_eq!(encoded.suffix, "/api/generate");
    assert_eq!(
        native(&encoded),
        json!({
            "model": "llama3.1", "prompt": "def f(", "suffix": "return", "think": false,
            "options": { "num_predict": 9, "num_ctx": 2048 }, "stream": false,
        })
    );
    // An empty prompt would load the model, and answer nothing.
    for prompt in [json!([1, 2]), json!(["a", "b"]), json!(""), json!([""])] {
        let body = json!({ "model": "m", "prompt": prompt });
        assert_eq!(
            refused(Endpoint::Completions, &body),
            (400, Some("prompt".to_owned()))
        );
    }
    let body = json!({ "model": "m", "prompt": "x", "echo": true });
    assert_eq!(
        refused(Endpoint::Completions, &body),
        (400, Some("echo".to_owned()))
    );
}

#[test]
fn embeddings_go_to_embed_and_are_never_cut() {
    let encoded = encode(
        Endpoint::Embeddings,
        &json!({ "model": "m", "input": ["a", "b"], "dimensions": 64, "encoding_format": "base64" }),
    );
    assert_eq!(encoded.suffix, "/api/embed");
    assert_eq!(
        native(&encoded),
        json!({
            "model": "llama3.1", "input": ["a", "b"], "truncate": false, "dimensions": 64,
            "options": { "num_ctx": 2048 },
        })
    );
    // Of an empty text Ollama makes no embedding at all.
    for input in [json!([1, 2, 3]), json!(""), json!(["a", ""])] {
        let body = json!({ "model": "m", "input": input });
        assert_eq!(
            refused(Endpoint::Embeddings, &body),
            (400, Some("input".to_owned()))
        );
    }
}

#[test]
fn calls_that_ollama_does_not_have_are_unsupported() {
    for (endpoint, body) in [
        (Endpoint::Responses, json!({ "model": "m", "input": "x" })),
        (
            Endpoint::Rerank,
            json!({ "model": "m", "query": "x", "documents": ["a"] }),
        ),
        (Endpoint::Moderations, json!({ "model": "m", "input": "x" })),
    ] {
        assert_eq!(refused(endpoint, &body), (501, None), "{endpoint}");
    }
}

#[test]
fn only_these_paths_are_ever_called() {
    let chat = json!({ "model": "m", "messages": [{ "role": "user", "content": "x" }] });
    let mut paths = vec![
        encode(Endpoint::ChatCompletions, &chat).suffix,
        encode(
            Endpoint::Completions,
            &json!({ "model": "m", "prompt": "x" }),
        )
        .suffix,
        encode(Endpoint::Embeddings, &json!({ "model": "m", "input": "x" })).suffix,
        Ollama.models_suffix(),
    ];
    paths.sort_unstable();
    assert_eq!(
        paths,
        ["/api/chat", "/api/embed", "/api/generate", "/api/tags"]
    );
}

#[test]
fn the_installed_models_are_listed() {
    let tags = br#"{"models":[{"name":"llama3.1:8b","model":"llama3.1:8b","size":1},{"name":"b:latest"}]}"#;
    assert_eq!(
        Ollama.read_models(tags).unwrap(),
        ["llama3.1:8b", "b:latest"]
    );
    assert!(
        Ollama
            .read_models(br#"{"models":null}"#)
            .unwrap()
            .is_empty()
    );
}

// --- streams ---

const ASK: &str = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

/// Decodes a stream in pieces of this size; the events, and how it ended.
fn decode(
    endpoint: Endpoint,
    ask: &Value,
    lines: &[u8],
    size: usize,
) -> (Vec<String>, Result<(), DecodeError>) {
    let mut decoder = encode(endpoint, ask).decoder.unwrap();
    let mut out = BytesMut::new();
    let mut result = Ok(());
    for piece in lines.chunks(size) {
        result = decoder.push(piece, &mut out);
        if result.is_err() {
            break;
        }
    }
    let result = result.and_then(|()| decoder.end(&mut out));
    let text = String::from_utf8(out.to_vec()).unwrap();
    let events = text.split("\n\n").filter(|event| !event.is_empty());
    (
        events
            .map(|event| event.strip_prefix("data: ").unwrap().to_owned())
            .collect(),
        result,
    )
}

fn chat_events(lines: &str) -> Vec<Value> {
    let ask = serde_json::from_str(ASK).unwrap();
    let (mut events, result) = decode(
        Endpoint::ChatCompletions,
        &ask,
        lines.as_bytes(),
        usize::MAX,
    );
    result.unwrap();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

fn choices(events: &[Value]) -> Vec<Value> {
    events
        .iter()
        .map(|event| event["choices"][0].clone())
        .collect()
}

const LINES: &str = concat!(
    r#"{"model":"llama3.1","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"Grüß"},"done":false}"#,
    "\n",
    r#"{"model":"llama3.1","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":" \"dich\""},"done":false}"#,
    "\n",
    r#"{"model":"llama3.1","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":5,"load_duration":1,"prompt_eval_count":26,"eval_count":3}"#,
    "\n",
);

#[test]
fn a_stream_of_lines_becomes_a_stream_of_chunks() {
    let events = chat_events(LINES);
    let (id, created) = (events[0]["id"].clone(), events[0]["created"].clone());
    assert!(id.as_str().unwrap().starts_with("chatcmpl-"));
    assert!(created.as_u64().unwrap() > 1_700_000_000);
    let chunk = |choice: Value| {
        json!({
            "id": id, "object": "chat.completion.chunk", "created": created, "model": "m",
            "choices": [choice],
        })
    };
    let delta = |delta: Value| {
        chunk(json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": null }))
    };
    assert_eq!(
        events[0],
        delta(json!({ "role": "assistant", "content": "" }))
    );
    assert_eq!(events[1], delta(json!({ "content": "Grüß" })));
    assert_eq!(events[2], delta(json!({ "content": " \"dich\"" })));
    assert_eq!(
        events[3],
        chunk(json!({ "index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop" }))
    );
    assert_eq!(
        events[4],
        json!({
            "id": id, "object": "chat.completion.chunk", "created": created, "model": "m",
            "choices": [],
            "usage": { "prompt_tokens": 26, "completion_tokens": 3, "total_tokens": 29 },
        })
    );
    assert_eq!(events.len(), 5);
    assert_ne!(chat_events(LINES)[0]["id"], id);
}

#[test]
fn every_split_and_line_end_gives_the_same_events() {
    let ask: Value = serde_json::from_str(ASK).unwrap();
    let without_id = |events: Vec<String>| -> Vec<String> {
        let tail = |event: String| {
            event
                .split_once("\"object\"")
                .map_or(event.clone(), |(_, tail)| tail.to_owned())
        };
        events
            .into_iter()
            .map(tail)
            .map(|event| {
                // A second may pass between two of them.
                match event.split_once("\"created\":") {
                    Some((head, rest)) => format!("{head}{}", rest.split_once(',').unwrap().1),
                    None => event,
                }
            })
            .collect()
    };
    let endpoint = Endpoint::ChatCompletions;
    let wanted = without_id(decode(endpoint, &ask, LINES.as_bytes(), usize::MAX).0);
    let crlf = LINES.replace('\n', "\r\n");
    let blank = format!("\n\n{}\n \n", LINES.replace('\n', "\n\n"));
    let open = LINES.trim_end();
    let trailing = format!("{LINES}{{\"error\":\"late\"}}\nrubbish");
    for lines in [LINES, &crlf, &blank, open, &trailing] {
        for size in 1..lines.len() {
            let (events, result) = decode(endpoint, &ask, lines.as_bytes(), size);
            assert_eq!(result, Ok(()), "{size}");
            assert_eq!(without_id(events), wanted, "{size} {lines:?}");
        }
    }
}

#[test]
fn thinking_tool_calls_and_the_end_are_told_as_openai_does() {
    let lines = concat!(
        r#"{"message":{"role":"assistant","content":"","thinking":"so"},"done":false}"#,
        "\n",
        r#"{"message":{"role":"assistant","content":"","tool_calls":[{"id":"call_ab","function":{"index":0,"name":"weather","arguments":{"city":"Paris","n":1.50}}},{"function":{"index":1,"name":"time","arguments":{}}}]},"done":false}"#,
        "\n",
        r#"{"message":{"role":"assistant","content":"","tool_calls":[{"function":{"name":"late","arguments":"{\"a\":1}"}}]},"done":false}"#,
        "\n",
        r#"{"message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}"#,
        "\n",
    );
    let events = chat_events(lines);
    let own = events[0]["id"]
        .as_str()
        .unwrap()
        .strip_prefix("chatcmpl-")
        .unwrap()
        .to_owned();
    let choices = choices(&events);
    assert_eq!(choices[1]["delta"], json!({ "reasoning_content": "so" }));
    let call = |index: usize, id: &str, name: &str, arguments: &str| json!({ "index": index, "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
    assert_eq!(
        choices[2]["delta"]["tool_calls"],
        json!([
            call(0, "call_ab", "weather", r#"{"city":"Paris","n":1.50}"#),
            call(1, &format!("call_{own}_1"), "time", "{}"),
        ])
    );
    assert_eq!(
        choices[3]["delta"]["tool_calls"],
        json!([call(2, &format!("call_{own}_2"), "late", r#"{"a":1}"#)])
    );
    assert_eq!(choices[4]["finish_reason"], "tool_calls");

    let short = r#"{"message":{"content":"x"},"done":true,"done_reason":"length","logprobs":[{"token":"x","logprob":-0.5}]}"#;
    let choices = self::choices(&chat_events(short));
    assert_eq!(choices[1]["delta"]["content"], "x");
    assert_eq!(
        choices[1]["logprobs"],
        json!({ "content": [{ "token": "x", "logprob": -0.5 }] })
    );
    assert_eq!(choices[2]["finish_reason"], "length");
}

#[test]
fn an_error_line_is_an_error_event_and_the_end() {
    let lines = format!(
        "{}\n{}\n{}",
        LINES.lines().next().unwrap(),
        r#"{"error":"an error was encountered while running the model"}"#,
        LINES
    );
    let ask = serde_json::from_str(ASK).unwrap();
    let (events, result) = decode(Endpoint::ChatCompletions, &ask, lines.as_bytes(), 7);
    assert_eq!(result, Ok(()));
    assert_eq!(events.len(), 3);
    let mut framer = Framer::new(LINE_MAX);
    framer.push(&Bytes::from(format!("data: {}\n\n", events[2])));
    let facts = inspect(Endpoint::ChatCompletions, &framer.next().unwrap().unwrap());
    let error = facts.error.unwrap();
    assert_eq!(
        error.message.as_deref(),
        Some("an error was encountered while running the model")
    );
}

#[test]
fn what_is_no_line_breaks_the_stream_and_what_was_before_it_is_told() {
    let first = LINES.lines().next().unwrap();
    let ask = serde_json::from_str(ASK).unwrap();
    let long = format!(r#"{{"message":{{"content":"{}"}}}}"#, "x".repeat(LINE_MAX));
    for (line, why) in [
        ("<html>", "a line that is no JSON object"),
        ("[]", "a line that is no JSON object"),
        (
            r#"{"message":{"content":7}}"#,
            "a line that is no JSON object",
        ),
        (
            r#"{"message":{"content":"torn"#,
            "a line that is no JSON object",
        ),
        (
            r#"{"message":{"content":""},"done":true,"done_reason":"load"}"#,
            "a model was loaded, not asked",
        ),
        (long.as_str(), "a line is longer than 4096 bytes"),
    ] {
        for size in [1, 1000, usize::MAX] {
            let lines = format!("{first}\n{line}\n");
            let (events, result) = decode(Endpoint::ChatCompletions, &ask, lines.as_bytes(), size);
            assert_eq!(result.unwrap_err().to_string(), why);
            assert_eq!(events.len(), 2, "{line}");
        }
    }
}

#[test]
fn a_stream_that_ends_early_has_no_last_event() {
    let first = format!("{}\n", LINES.lines().next().unwrap());
    let ask = serde_json::from_str(ASK).unwrap();
    let (events, result) = decode(Endpoint::ChatCompletions, &ask, first.as_bytes(), 9);
    assert_eq!(result, Ok(()));
    assert!(!events.contains(&"[DONE]".to_owned()));
}

#[test]
fn a_completion_is_streamed_as_text() {
    let lines = concat!(
        r#"{"model":"x","response":"one","done":false}"#,
        "\n",
        r#"{"model":"x","response":"","done":true,"done_reason":"stop","prompt_eval_count":2,"eval_count":1}"#,
        "\n",
    );
    let ask = json!({ "model": "m", "prompt": "p", "stream": true });
    let (events, _) = decode(Endpoint::Completions, &ask, lines.as_bytes(), 5);
    let first: Value = serde_json::from_str(&events[0]).unwrap();
    assert!(first["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(first["object"], "text_completion");
    assert_eq!(first["choices"][0]["text"], "one");
    assert_eq!(events.len(), 4);
}

// --- whole answers ---

fn whole(endpoint: Endpoint, ask: &Value, answer: &Value) -> Result<Value, DecodeError> {
    let mut decoder = encode(endpoint, ask).decoder.unwrap();
    let body = decoder.whole(answer.to_string().as_bytes())?;
    Ok(serde_json::from_slice(&body).unwrap())
}

fn whole_chat(answer: &Value) -> Result<Value, DecodeError> {
    let ask = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
    whole(Endpoint::ChatCompletions, &ask, answer)
}

#[test]
fn what_came_from_a_cache_is_told_as_openai_tells_it() {
    let told = whole_chat(&json!({
        "message": { "role": "assistant", "content": "hello" }, "done": true,
        "done_reason": "stop", "prompt_eval_count": 21, "prompt_eval_cached_count": 16,
    }))
    .unwrap();
    let details = &told["usage"]["prompt_tokens_details"];
    assert_eq!(*details, json!({ "cached_tokens": 16 }));
}

#[test]
fn a_whole_chat_is_a_completion() {
    let mut told = whole_chat(&json!({
        "model": "llama3.1", "created_at": "2026-01-01T00:00:00Z",
        "message": { "role": "assistant", "content": "hello", "thinking": "hm" },
        "done": true, "done_reason": "stop", "prompt_eval_count": 5, "eval_count": 2,
    }))
    .unwrap();
    for key in ["id", "created"] {
        assert!(told.as_object_mut().unwrap().remove(key).is_some());
    }
    assert_eq!(
        told,
        json!({
            "object": "chat.completion", "model": "m",
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": "hello", "reasoning_content": "hm" },
                "logprobs": null,
                "finish_reason": "stop",
            }],
            "usage": { "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7 },
        })
    );
    let told = whole_chat(&json!({
        "message": { "role": "assistant", "content": "", "tool_calls": [{ "function": { "name": "f", "arguments": { "a": 1 } } }] },
        "done": true, "done_reason": "stop",
    }))
    .unwrap();
    let choice = &told["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(
        call["function"],
        json!({ "name": "f", "arguments": "{\"a\":1}" })
    );
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    assert!(call.get("index").is_none());
}

#[test]
fn what_is_no_whole_answer_is_none() {
    for answer in [
        json!({ "message": { "content": "x" }, "done": false }),
        json!({ "message": { "content": "" }, "done": true, "done_reason": "load" }),
        json!({ "message": { "content": 5 }, "done": true }),
        json!([]),
    ] {
        assert!(whole_chat(&answer).is_err(), "{answer}");
    }
}

#[test]
fn embeddings_are_told_as_numbers_and_as_base64() {
    let answer =
        json!({ "model": "e", "embeddings": [[0.5, -1.25], [1e-3, 2]], "prompt_eval_count": 4 });
    let ask =
        |format: &str| json!({ "model": "m", "input": ["a", "b"], "encoding_format": format });
    let told = whole(Endpoint::Embeddings, &ask("float"), &answer).unwrap();
    assert_eq!(
        told,
        json!({
            "object": "list",
            "data": [
                { "object": "embedding", "index": 0, "embedding": [0.5, -1.25] },
                { "object": "embedding", "index": 1, "embedding": [1e-3, 2] },
            ],
            "model": "m",
            "usage": { "prompt_tokens": 4, "total_tokens": 4 },
        })
    );
    let told = whole(Endpoint::Embeddings, &ask("base64"), &answer).unwrap();
    // 0.5 is 0000003f, -1.25 is 0000a0bf, in bytes.
    assert_eq!(told["data"][0]["embedding"], "AAAAPwAAoL8=");
    let few = json!({ "embeddings": [[0.5]] });
    assert!(whole(Endpoint::Embeddings, &ask("float"), &few).is_err());
    let none = json!({ "embeddings": ["x", "y"] });
    assert!(whole(Endpoint::Embeddings, &ask("float"), &none).is_err());
}

#[test]
fn a_cut_prompt_is_noticed_at_the_end() {
    let text = "word ".repeat(4000);
    let ask =
        json!({ "model": "m", "stream": true, "messages": [{ "role": "user", "content": text }] });
    let last = |read: u64| {
        format!(
            "{{\"message\":{{\"content\":\"x\"}},\"done\":true,\"prompt_eval_count\":{read}}}\n"
        )
    };
    for (read, cut) in [(4096, false), (2047, true), (0, false)] {
        // Whole and streamed; 8,192 is what was asked for.
        let mut streamed = encode(Endpoint::ChatCompletions, &ask).decoder.unwrap();
        assert!(!streamed.prompt_was_cut());
        streamed
            .push(last(read).as_bytes(), &mut BytesMut::new())
            .unwrap();
        assert_eq!(streamed.prompt_was_cut(), cut, "{read}");
        let mut whole = encode(Endpoint::ChatCompletions, &ask).decoder.unwrap();
        whole.whole(last(read).as_bytes()).unwrap();
        assert_eq!(whole.prompt_was_cut(), cut, "{read}");
    }
}

#[test]
fn a_whole_answer_to_a_stream_is_known_by_its_type() {
    let ask = serde_json::from_str(ASK).unwrap();
    let decoder = encode(Endpoint::ChatCompletions, &ask).decoder.unwrap();
    let of = |kind: &'static str| {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static(kind));
        decoder.is_stream(&headers)
    };
    assert!(of("application/x-ndjson"));
    assert!(decoder.is_stream(&HeaderMap::new()));
    assert!(!of("application/json; charset=utf-8"));
}
