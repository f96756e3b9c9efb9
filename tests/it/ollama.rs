//! Upstreams that are spoken to in Ollama's own words: what they are sent, and
//! what the client gets of what they say.

use serde_json::{Value, json};

use crate::support::{
    Answer, Gateway, Scripted,
    by_hand::ByHand,
    chat, chat_stream, eventually,
    http::{Connection, get, post, post_chat},
    scripted::{answer, json as whole},
    sim, upstream_at,
};

/// The head of a stream as Ollama sends it.
const HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";

/// The bytes of a stream of these lines.
fn lines(lines: &[Value]) -> Vec<u8> {
    let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
    answer(200, &[("content-type", "application/x-ndjson")], &body)
}

fn said(text: &str) -> Value {
    json!({ "model": "m", "created_at": "2026-01-01T00:00:00Z", "message": { "role": "assistant", "content": text }, "done": false })
}

fn done() -> Value {
    json!({
        "model": "m", "created_at": "2026-01-01T00:00:00Z",
        "message": { "role": "assistant", "content": "" },
        "done": true, "done_reason": "stop", "total_duration": 9, "load_duration": 1,
        "prompt_eval_count": 11, "eval_count": 2,
    })
}

/// A whole answer to a chat.
fn chatted(text: &str) -> Vec<u8> {
    let mut answer = done();
    answer["message"]["content"] = text.into();
    whole(200, &answer.to_string())
}

/// One Ollama for every model, with further keys.
fn yaml(url: &str, keys: &str) -> String {
    let keys = format!("dialect: ollama{keys}");
    format!(
        "groups:\n  ollama:\n    local: true\n    upstreams:\n{}routes:\n  - {{ model: \"*\", groups: [ollama] }}\n",
        upstream_at("ollama", url, &keys)
    )
}

/// A gateway in front of an upstream that answers every chat so.
async fn with(answer: Vec<u8>, keys: &str) -> (Gateway, Scripted) {
    let ollama = Scripted::by_target(&[("/api/chat", answer)]).await;
    let gateway = Gateway::start(&yaml(&ollama.url(), keys)).await;
    (gateway, ollama)
}

async fn ask(gateway: &Gateway, path: &str, body: &Value) -> Answer {
    post(gateway.addr, path, &[], body.to_string().as_bytes()).await
}

fn last(ollama: &Scripted) -> Value {
    ollama.requests().last().unwrap().json()
}

/// The events but for the last, `[DONE]`.
#[track_caller]
fn events(answer: &Answer) -> Vec<Value> {
    let mut events = answer.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", answer.text());
    let events = events.iter();
    events
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

// --- there and back ---

#[tokio::test]
async fn a_chat_is_asked_natively_and_answered_as_openai_does() {
    let (gateway, ollama) = with(chatted("hello"), "").await;
    let answer = post_chat(gateway.addr, &chat("llama3.1")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.content(), "hello");
    let body = answer.json();
    assert_eq!(
        (&body["object"], &body["model"]),
        (&json!("chat.completion"), &json!("llama3.1"))
    );
    assert_eq!(
        body["usage"],
        json!({ "prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13 })
    );

    let request = &ollama.requests()[0];
    assert_eq!(request.target(), "/api/chat");
    assert_eq!(
        request.json(),
        json!({
            "model": "llama3.1",
            "messages": [{ "role": "user", "content": "Hello" }],
            "options": { "num_ctx": 2048 },
            "stream": false,
        })
    );
    // Ollama turns away what is addressed to another host than itself.
    let host = format!("host: {}\r\n", ollama.addr);
    assert!(
        request.head.to_lowercase().contains(&host),
        "{}",
        request.head
    );
}

#[tokio::test]
async fn a_stream_of_lines_reaches_the_client_as_events() {
    let (gateway, ollama) = with(lines(&[said("hel"), said("lo"), done()]), "").await;
    let answer = post_chat(gateway.addr, &chat_stream("llama3.1")).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert_eq!(answer.content(), "hello");
    let events = events(&answer);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "stop"
    );
    let id = events[0]["id"].as_str().unwrap();
    assert!(id.starts_with("chatcmpl-") && events.iter().all(|event| event["id"] == id));
    assert!(!answer.text().contains("usage"), "{}", answer.text());
    assert_eq!(last(&ollama)["stream"], true);

    let wants_usage = json!({
        "model": "llama3.1", "stream": true, "stream_options": { "include_usage": true },
        "messages": [{ "role": "user", "content": "Hello" }],
    });
    let answer = ask(&gateway, "/v1/chat/completions", &wants_usage).await;
    let events = self::events(&answer);
    assert_eq!(events.last().unwrap()["usage"]["total_tokens"], 13);
    // Counted for both.
    let tokens = r#"forebay_tokens_total{direction="out",route="*",upstream="ollama"}"#;
    gateway.metric_becomes(tokens, 4.0).await;
}

#[tokio::test]
async fn each_line_is_passed_on_as_soon_as_it_is_whole() {
    let ollama = ByHand::listen().await;
    let gateway = Gateway::start(&yaml(&ollama.url(), "")).await;
    let mut client = Connection::open(gateway.addr).await;
    let body = chat_stream("m");
    client
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    let mut call = ollama.accept().await;
    call.send(HEAD).await;
    let line = format!("{}\n", said("żółć"));
    // Inside a character.
    let (one, other) = line.as_bytes().split_at(line.find('ó').unwrap() + 1);
    call.chunk(one).await;
    call.chunk(other).await;
    client.read_until("żółć").await;
    call.chunk(format!("{}\n", done())).await;
    call.end().await;
    let answer = client.answer().await;
    assert_eq!(answer.content(), "żółć");
}

#[tokio::test]
async fn an_ollama_that_answers_whole_to_a_stream_is_told_as_one() {
    let (gateway, _ollama) = with(chatted("hello"), "").await;
    let answer = post_chat(gateway.addr, &chat_stream("m")).await;
    assert_eq!(answer.content(), "hello");
    events(&answer);
}

#[tokio::test]
async fn tools_pictures_formats_and_thinking_are_translated_both_ways() {
    let mut called = done();
    called["message"] = json!({
        "role": "assistant", "content": "", "thinking": "I should look.",
        "tool_calls": [{ "id": "call_9", "function": { "index": 0, "name": "weather", "arguments": { "city": "Paris" } } }],
    });
    let (gateway, ollama) = with(whole(200, &called.to_string()), "").await;
    let tools = json!([{ "type": "function", "function": { "name": "weather", "parameters": { "type": "object" } } }]);
    let schema = json!({ "type": "object", "properties": { "t": { "type": "number" } } });
    let body = json!({
        "model": "m",
        "messages": [
            { "role": "user", "content": [
                { "type": "text", "text": "Here?" },
                { "type": "image_url", "image_url": { "url": "data:image/png;base64,iVBORw0KGgo=" } },
            ] },
            { "role": "assistant", "content": null, "tool_calls": [
                { "id": "call_1", "type": "function", "function": { "name": "weather", "arguments": "{\"city\":\"Rome\"}" } },
            ] },
            { "role": "tool", "tool_call_id": "call_1", "content": "sun" },
        ],
        "tools": tools, "reasoning_effort": "low",
        "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } },
    });
    let answer = ask(&gateway, "/v1/chat/completions", &body).await;
    let sent = last(&ollama);
    assert_eq!(
        sent["messages"],
        json!([
            { "role": "user", "content": "Here?", "images": ["iVBORw0KGgo="] },
            { "role": "assistant", "content": "", "tool_calls": [
                { "id": "call_1", "function": { "name": "weather", "arguments": { "city": "Rome" } } },
            ] },
            { "role": "tool", "content": "sun", "tool_name": "weather", "tool_call_id": "call_1" },
        ])
    );
    assert_eq!(
        (&sent["tools"], &sent["format"], &sent["think"]),
        (&tools, &schema, &json!("low"))
    );
    let choice = &answer.json()["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["reasoning_content"], "I should look.");
    assert_eq!(
        choice["message"]["tool_calls"],
        json!([{ "id": "call_9", "type": "function", "function": { "name": "weather", "arguments": "{\"city\":\"Paris\"}" } }])
    );
}

#[tokio::test]
async fn embeddings_and_completions_have_their_native_calls() {
    let embedded = json!({ "model": "e", "embeddings": [[0.5, -1.25]], "prompt_eval_count": 3 });
    let generated = json!({ "model": "m", "response": "and so on", "done": true, "done_reason": "length", "prompt_eval_count": 2, "eval_count": 3 });
    let ollama = Scripted::by_target(&[
        ("/api/embed", whole(200, &embedded.to_string())),
        ("/api/generate", whole(200, &generated.to_string())),
    ])
    .await;
    let gateway = Gateway::start(&yaml(&ollama.url(), "")).await;

    let floats = ask(
        &gateway,
        "/v1/embeddings",
        &json!({ "model": "e", "input": "one" }),
    )
    .await;
    assert_eq!(floats.json()["data"][0]["embedding"], json!([0.5, -1.25]));
    assert_eq!(floats.json()["usage"]["prompt_tokens"], 3);
    assert_eq!(last(&ollama)["input"], json!(["one"]));
    let packed = json!({ "model": "e", "input": ["one"], "encoding_format": "base64" });
    let packed = ask(&gateway, "/v1/embeddings", &packed).await;
    assert_eq!(packed.json()["data"][0]["embedding"], "AAAAPwAAoL8=");

    let body = json!({ "model": "m", "prompt": "once", "max_tokens": 3 });
    let completed = ask(&gateway, "/v1/completions", &body).await.json();
    assert_eq!(completed["object"], "text_completion");
    assert_eq!(completed["choices"][0]["text"], "and so on");
    assert_eq!(completed["choices"][0]["finish_reason"], "length");
    assert_eq!(last(&ollama)["options"]["num_predict"], 3);
    let targets: Vec<String> = ollama
        .requests()
        .iter()
        .map(|one| one.target().to_owned())
        .collect();
    assert_eq!(targets, ["/api/embed", "/api/embed", "/api/generate"]);
}

// --- what the configuration bounds ---

#[tokio::test]
async fn the_answer_the_threads_and_the_time_in_memory_are_bounded_in_one_line_each() {
    let keys = ", max_tokens: 1024, num_thread: 6, keep_alive: 30m";
    let (gateway, ollama) = with(chatted("x"), keys).await;
    let mut body: Value = serde_json::from_str(&chat("m")).unwrap();
    for (wish, predicted) in [(None, 1024), (Some(50), 50), (Some(9000), 1024)] {
        if let Some(wish) = wish {
            body["max_completion_tokens"] = wish.into();
        }
        assert_eq!(
            ask(&gateway, "/v1/chat/completions", &body).await.status,
            200
        );
        let sent = last(&ollama);
        assert_eq!(sent["options"]["num_predict"], predicted);
        assert_eq!(sent["options"]["num_thread"], 6);
        assert_eq!(sent["keep_alive"], "30m");
    }
}

#[tokio::test]
async fn the_context_follows_the_prompt_in_powers_of_two_and_does_not_shrink_again() {
    let (gateway, ollama) = with(chatted("x"), ", num_ctx: 20000").await;
    for (words, num_ctx) in [
        (1, 2048),
        (2000, 8192),
        (1, 8192),
        (10_000, 20_000),
        (50_000, 20_000),
    ] {
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "word ".repeat(words) }] });
        assert_eq!(
            ask(&gateway, "/v1/chat/completions", &body).await.status,
            200
        );
        assert_eq!(last(&ollama)["options"]["num_ctx"], num_ctx, "{words}");
    }
    // Another model has a context of its own.
    post_chat(gateway.addr, &chat("other")).await;
    assert_eq!(last(&ollama)["options"]["num_ctx"], 2048);
}

#[tokio::test]
async fn a_second_request_waits_until_the_first_has_its_answer() {
    let ollama = ByHand::listen().await;
    let gateway = Gateway::start(&yaml(&ollama.url(), "")).await;
    let mut first = Connection::open(gateway.addr).await;
    let mut second = Connection::open(gateway.addr).await;
    let in_flight = r#"forebay_upstream_requests_in_flight{group="ollama",upstream="ollama"}"#;
    let body = chat("first");
    first
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    let mut call = ollama.accept().await;
    let body = chat("second");
    second
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    gateway
        .metric_becomes("forebay_requests_in_flight", 2.0)
        .await;
    assert_eq!(gateway.metric(in_flight).await, Some(1.0));
    assert!(
        second
            .stays_open(std::time::Duration::from_millis(50))
            .await
    );
    call.send(chatted("one")).await;
    assert_eq!(first.answer().await.content(), "one");
    // Asked for on the same connection, or on another.
    drop(call);
    let mut call = ollama.accept().await;
    call.send(chatted("two")).await;
    assert_eq!(second.answer().await.content(), "two");
}

#[tokio::test]
async fn what_a_busy_ollama_cannot_be_told_is_not_waited_for() {
    let ollama = ByHand::listen().await;
    let gateway = Gateway::start(&yaml(&ollama.url(), "")).await;
    let mut first = Connection::open(gateway.addr).await;
    let body = chat("first");
    first
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    let mut call = ollama.accept().await;
    // The line of an Ollama is long: a minute.
    let two = json!({ "model": "m", "n": 2, "messages": [{ "role": "user", "content": "hi" }] });
    let refused = ask(&gateway, "/v1/chat/completions", &two).await;
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert_eq!(refused.error_code(), "unsupported_by_upstream");
    call.send(chatted("one")).await;
    assert_eq!(first.answer().await.content(), "one");
}

#[tokio::test]
async fn a_cut_prompt_is_reported_to_the_client_the_log_and_the_metrics() {
    let mut cut = done();
    cut["prompt_eval_count"] = 4096.into();
    let ollama = Scripted::by_target(&[("/api/chat", lines(&[said("x"), cut.clone()]))]).await;
    let other = Scripted::by_target(&[("/api/chat", whole(200, &cut.to_string()))]).await;
    let yaml = format!(
        "groups:\n  a:\n    upstreams:\n{}  b:\n    upstreams:\n{}routes:\n  - {{ model: a, groups: [a] }}\n  - {{ model: b, groups: [b] }}\n",
        upstream_at("lines", &ollama.url(), "dialect: ollama, num_ctx: 4096"),
        upstream_at("whole", &other.url(), "dialect: ollama, num_ctx: 4096"),
    );
    let gateway = Gateway::start(&yaml).await;
    let long = "word ".repeat(5000);
    let body = |model: &str, stream: bool| json!({ "model": model, "stream": stream, "messages": [{ "role": "user", "content": long }] });

    let streamed = ask(&gateway, "/v1/chat/completions", &body("a", true)).await;
    events(&streamed);
    let comment = streamed
        .text()
        .lines()
        .find(|line| line.starts_with(": forebay "));
    let comment: Value =
        serde_json::from_str(comment.unwrap().strip_prefix(": forebay ").unwrap()).unwrap();
    assert_eq!(
        (&comment["upstream"], &comment["prompt_cut"]),
        (&json!("lines"), &json!(true))
    );
    let answer = ask(&gateway, "/v1/chat/completions", &body("b", false)).await;
    assert_eq!(answer.header("x-forebay-prompt-cut"), Some("1"));
    for upstream in ["lines", "whole"] {
        let series = format!("forebay_prompts_cut_total{{upstream=\"{upstream}\"}}");
        gateway.metric_becomes(&series, 1.0).await;
        gateway
            .logged(&format!("upstream={upstream} num_ctx_max=4096"))
            .await;
    }

    // A short one is not.
    let answer = post_chat(gateway.addr, &chat("b")).await;
    assert_eq!(answer.header("x-forebay-prompt-cut"), None);
    let answer = post_chat(gateway.addr, &chat_stream("a")).await;
    assert!(!answer.text().contains("prompt_cut"), "{}", answer.text());
}

#[tokio::test]
async fn a_model_that_is_being_loaded_is_waited_for_and_told_of() {
    let ollama = ByHand::listen().await;
    let gateway = Gateway::start(&yaml(&ollama.url(), "")).await;
    let mut client = Connection::open(gateway.addr).await;
    let body = chat_stream("m");
    client
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    let mut call = ollama.accept().await;
    // No header until it is loaded.
    gateway.logged("model is being loaded").await;
    let state = |state| {
        format!("forebay_upstream_state{{group=\"ollama\",state=\"{state}\",upstream=\"ollama\"}}")
    };
    gateway.metric_becomes(&state("loading"), 1.0).await;
    let health = get(gateway.addr, "/health").await.json();
    assert_eq!(health["upstreams"][0]["state"], "loading");
    assert_eq!(health["status"], "ok");
    call.send(lines(&[said("at last"), done()])).await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.content().as_str()), (200, "at last"));
    assert_eq!(answer.header("x-forebay-attempts"), Some("1"));
    let failed = r#"forebay_attempts_total{group="ollama",upstream="ollama",verdict="timed_out"}"#;
    assert_eq!(gateway.metric(failed).await, None);
    gateway.metric_becomes(&state("ready"), 1.0).await;
}

// --- what goes wrong ---

#[tokio::test]
async fn both_shapes_of_error_mean_the_same() {
    for (status, error, told, code) in [
        (404, "model 'm' not found", 404, "model_not_found"),
        (
            503,
            "server busy, please try again.  maximum pending requests exceeded",
            502,
            "upstream_overloaded",
        ),
        (
            500,
            "model requires more system memory",
            502,
            "upstream_error",
        ),
        (400, "m does not support tools", 400, ""),
    ] {
        for body in [
            json!({ "error": error }),
            json!({ "error": { "message": error, "type": "api_error", "param": null, "code": null } }),
        ] {
            let (gateway, _ollama) = with(whole(status, &body.to_string()), "").await;
            let answer = post_chat(gateway.addr, &chat("m")).await;
            assert_eq!(
                (answer.status, answer.error_code().as_str()),
                (told, code),
                "{body}"
            );
            if status == 400 {
                assert_eq!(answer.json()["error"]["message"], error);
            }
        }
    }
}

#[tokio::test]
async fn a_model_that_cannot_think_answers_without_thinking() {
    let ollama = ByHand::listen().await;
    let gateway = Gateway::start(&yaml(&ollama.url(), "")).await;
    let mut client = Connection::open(gateway.addr).await;
    let body = json!({ "model": "m", "reasoning_effort": "low", "messages": [{ "role": "user", "content": "x" }] });
    let body = body.to_string();
    client
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    let mut call = ollama.accept().await;
    assert!(call.text().contains(r#""think":"low""#));
    let why = json!({ "error": "\"m\" does not support thinking" });
    call.send(answer(
        400,
        &[
            ("content-type", "application/json"),
            ("connection", "close"),
        ],
        &why.to_string(),
    ))
    .await;
    let mut call = ollama.accept().await;
    assert!(!call.text().contains("think"), "{}", call.text());
    call.send(chatted("hello")).await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.content().as_str()), (200, "hello"));
    assert_eq!(answer.header("x-forebay-attempts"), Some("1"));
}

#[tokio::test]
async fn what_ollama_cannot_be_told_goes_to_who_can_be_told() {
    let ollama = Scripted::by_target(&[]).await;
    let cloud = sim("cloud").await;
    let groups = format!(
        "groups:\n  ollama:\n    upstreams:\n{}  cloud:\n    upstreams:\n{}",
        upstream_at("ollama", &ollama.url(), "dialect: ollama"),
        upstream_at("cloud", &cloud.url(), "kind: vllm"),
    );
    let yaml = format!(
        "{groups}routes:\n  - {{ model: demo, groups: [ollama, cloud] }}\n  - {{ model: \"*\", groups: [ollama] }}\n"
    );
    let gateway = Gateway::start(&yaml).await;
    let picture =
        json!([{ "type": "image_url", "image_url": { "url": "https://example.test/cat.png" } }]);
    let say = |model: &str, content: &Value, n: u32| json!({ "model": model, "n": n, "messages": [{ "role": "user", "content": content }] });
    for (path, body, status, param) in [
        (
            "/v1/chat/completions",
            say("demo", &picture, 1),
            400,
            json!("messages"),
        ),
        (
            "/v1/chat/completions",
            say("demo", &json!("x"), 2),
            400,
            json!("n"),
        ),
        (
            "/v1/responses",
            json!({ "model": "demo", "input": "x" }),
            501,
            Value::Null,
        ),
        (
            "/v1/rerank",
            json!({ "model": "demo", "query": "x", "documents": ["a"] }),
            501,
            Value::Null,
        ),
    ] {
        let answer = ask(&gateway, path, &body).await;
        assert_eq!((answer.status, answer.upstream()), (200, "cloud"), "{body}");
        let mut alone = body.clone();
        alone["model"] = "only".into();
        let answer = ask(&gateway, path, &alone).await;
        assert_eq!(answer.error_code(), "unsupported_by_upstream");
        assert_eq!(
            (answer.status, &answer.json()["error"]["param"]),
            (status, &param),
            "{body}"
        );
    }
    assert_eq!(ollama.asked(), 0);
}

#[tokio::test]
async fn what_only_the_others_could_be_told_is_not_the_clients_fault_while_they_are_away() {
    let gpu = sim("gpu-1").await;
    gpu.stop().await;
    let ollama = Scripted::by_target(&[]).await;
    let busy = ByHand::listen().await;
    let yaml = format!(
        "groups:\n  away:\n    upstreams:\n{}  busy:\n    queue: {{ size: 0 }}\n    upstreams:\n{}  ollama:\n    upstreams:\n{}routes:\n  - {{ model: away, groups: [away], fallback: ollama }}\n  - {{ model: busy, groups: [busy], fallback: ollama }}\n",
        upstream_at("gpu-1", &gpu.url(), "kind: vllm"),
        upstream_at("gpu-2", &busy.url(), "kind: vllm, concurrent: 1"),
        upstream_at("ollama", &ollama.url(), "dialect: ollama"),
    );
    let gateway = Gateway::start(&yaml).await;
    let mut first = Connection::open(gateway.addr).await;
    first
        .request("POST", "/v1/chat/completions", &[], chat("busy").as_bytes())
        .await;
    let _call = busy.accept().await;
    for model in ["away", "away", "busy"] {
        let body =
            json!({ "model": model, "n": 2, "messages": [{ "role": "user", "content": "x" }] });
        let answer = ask(&gateway, "/v1/chat/completions", &body).await;
        assert!(matches!(answer.status, 429 | 503), "{}", answer.text());
        assert!(answer.header("retry-after").is_some(), "{model}");
    }
    assert_eq!(ollama.asked(), 0);
}

#[tokio::test]
async fn an_error_line_before_the_first_token_costs_the_client_nothing() {
    let failing = Scripted::by_target(&[(
        "/api/chat",
        lines(&[json!({ "error": "an error was encountered" })]),
    )])
    .await;
    let loading = {
        let mut line = done();
        line["done_reason"] = "load".into();
        Scripted::by_target(&[("/api/chat", lines(&[line]))]).await
    };
    let torn = Scripted::by_target(&[("/api/chat", {
        let mut body = said("x").to_string();
        body.truncate(20);
        answer(200, &[("content-type", "application/x-ndjson")], &body)
    })])
    .await;
    for first in [&failing, &loading, &torn] {
        let good = sim("good").await;
        let yaml = format!(
            "groups:\n  one:\n    upstreams:\n{}  two:\n    upstreams:\n{}routes:\n  - {{ model: \"*\", groups: [one, two] }}\n",
            upstream_at("first", &first.url(), "dialect: ollama"),
            upstream_at("good", &good.url(), "kind: vllm"),
        );
        let gateway = Gateway::start(&yaml).await;
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_eq!(answer.upstream(), "good");
        assert!(answer.text().ends_with("data: [DONE]\n\n"));
    }
}

#[tokio::test]
async fn an_error_line_after_the_first_token_is_an_error_event_without_done() {
    for end in [r#"{"error":"out of memory at 10.1.2.3"}"#, "rubbish", ""] {
        let body = format!("{}\n{end}\n", said("so far"));
        let stream = answer(200, &[("content-type", "application/x-ndjson")], &body);
        let (gateway, _ollama) = with(stream, "").await;
        let answer = post_chat(gateway.addr, &chat_stream("m")).await;
        assert_eq!(answer.content(), "so far", "{end}");
        let last = answer.events().pop().unwrap();
        let last: Value = serde_json::from_str(&last).unwrap();
        assert_eq!(last["error"]["code"], "upstream_incomplete", "{end}");
        assert!(!answer.text().contains("[DONE]") && !answer.text().contains("10.1.2.3"));
    }
}

#[tokio::test]
async fn a_line_longer_than_an_event_may_be_is_refused() {
    let (gateway, _ollama) = {
        let stream = lines(&[said(&"x".repeat(20_000)), done()]);
        let ollama = Scripted::by_target(&[("/api/chat", stream)]).await;
        let yaml = format!("limits: {{ event: 8KiB }}\n{}", yaml(&ollama.url(), ""));
        (Gateway::start(&yaml).await, ollama)
    };
    let answer = post_chat(gateway.addr, &chat_stream("m")).await;
    assert_eq!(answer.status, 502);
    let hits = r#"forebay_limit_hits_total{limit="event"}"#;
    gateway.metric_becomes(hits, 1.0).await;
}

#[tokio::test]
async fn a_simulated_ollama_says_the_same_in_both_apis_and_dies_like_any_other() {
    let sim = sim("ollama").await;
    let (native, compatible) = (
        upstream_at("native", &sim.url(), "dialect: ollama"),
        upstream_at("compatible", &sim.url(), "kind: ollama"),
    );
    let yaml = format!(
        "groups:\n  a:\n    upstreams:\n{native}  b:\n    upstreams:\n{compatible}routes:\n  - {{ model: a, groups: [a], rewrite: {{ a: demo }} }}\n  - {{ model: b, groups: [b], rewrite: {{ b: demo }} }}\n"
    );
    let gateway = Gateway::start(&yaml).await;
    let whole = post_chat(gateway.addr, &chat("a")).await.content();
    assert_eq!(whole, post_chat(gateway.addr, &chat("b")).await.content());
    let streamed = post_chat(gateway.addr, &chat_stream("a")).await;
    assert_eq!(streamed.content(), whole);
    assert_eq!(sim.records().last().unwrap().target(), "/api/chat");

    for fault in [
        "die_at=3",
        "die_at=3;how=rst",
        "die_at=3;how=mid_chunk",
        "die_at=3;how=mid_utf8+rst",
        "error_at=3",
    ] {
        sim.fault(fault).await.unwrap();
        let answer = post_chat(gateway.addr, &chat_stream("a")).await;
        let said = answer.content();
        assert!(
            !said.is_empty() && whole.starts_with(&said),
            "{fault}: {said}"
        );
        let last: Value = serde_json::from_str(&answer.events().pop().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "upstream_incomplete", "{fault}");
    }
}

// --- as a fallback ---

#[tokio::test]
async fn when_every_gpu_is_down_the_fallback_answers_under_its_own_name() {
    let gpu = sim("gpu-1").await;
    gpu.stop().await;
    let ollama = Scripted::by_target(&[("/api/chat", lines(&[said("here"), done()]))]).await;
    let yaml = format!(
        "groups:\n  gpus:\n    upstreams:\n{}  ollama:\n    upstreams:\n{}routes:\n  - {{ model: \"qwen*\", groups: [gpus], fallback: ollama, rewrite: {{ ollama: \"qwen2.5:7b\" }} }}\n",
        upstream_at("gpu-1", &gpu.url(), "kind: vllm"),
        upstream_at("ollama", &ollama.url(), "dialect: ollama"),
    );
    let gateway = Gateway::start(&yaml).await;
    let answer = post_chat(gateway.addr, &chat_stream("qwen3")).await;
    assert_eq!(answer.content(), "here");
    assert_eq!(answer.header("x-forebay-fallback"), Some("1"));
    assert_eq!(events(&answer)[0]["model"], "qwen3");
    assert_eq!(last(&ollama)["model"], "qwen2.5:7b");
}

#[tokio::test]
async fn the_installed_models_are_listed_and_nothing_else_is_ever_called() {
    let tags = json!({ "models": [{ "name": "llama3.1:8b", "model": "llama3.1:8b", "size": 1 }] });
    let ollama = Scripted::by_target(&[
        ("/api/tags", whole(200, &tags.to_string())),
        ("/api/chat", chatted("x")),
        ("/api/version", whole(200, r#"{"version":"0.33.0"}"#)),
        ("/api/ps", whole(200, r#"{"models":[]}"#)),
    ])
    .await;
    // With or without /v1.
    let root = ollama.url().replace("/v1", "");
    let gateway = Gateway::start(&yaml(&root, "")).await;
    let listed = get(gateway.addr, "/v1/models").await.json();
    assert_eq!(listed["data"][0]["id"], "llama3.1:8b");
    post_chat(gateway.addr, &chat("llama3.1:8b")).await;
    for path in [
        "/api/pull",
        "/api/delete",
        "/api/create",
        "/v1/../api/pull",
        "/api/chat",
    ] {
        let answer = post(gateway.addr, path, &[], br#"{"model":"m"}"#).await;
        assert_eq!(answer.status, 404, "{path}");
    }
    eventually("the calls are seen", || async { ollama.asked() >= 2 }).await;
    for request in ollama.requests() {
        let allowed = [
            "/api/chat",
            "/api/generate",
            "/api/embed",
            "/api/tags",
            "/api/ps",
            "/api/show",
            "/api/version",
        ];
        assert!(allowed.contains(&request.target()), "{}", request.target());
    }
}

// --- memory ---

#[tokio::test]
async fn what_is_made_of_a_request_counts_and_is_not_made_where_there_is_no_room_for_it() {
    const HELD: &str = "forebay_request_bodies_bytes";
    let ollama = ByHand::listen().await;
    let limits = "limits: { body: 1MiB, bodies: 1MiB }\n";
    let gateway = Gateway::start(&format!("{limits}{}", yaml(&ollama.url(), ""))).await;
    let text = "x".repeat(400_000);
    let body = chat("demo").replace("Hello", &text);
    let asking = async || {
        let mut client = Connection::open(gateway.addr).await;
        let path = "/v1/chat/completions";
        client.request("POST", path, &[], body.as_bytes()).await;
        client
    };
    let mut first = asking().await;
    let mut call = ollama.accept().await;
    eventually("both are counted", || async {
        let held = gateway.metric(HELD).await.unwrap();
        (800_000.0..900_000.0).contains(&held)
    })
    .await;
    call.send("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
        .await;
    let rest = String::from_utf8(chatted("Hi")).unwrap();
    let (_, rest) = rest.split_once("content-length").unwrap();
    call.send(format!("content-length{rest}")).await;
    assert_eq!(first.answer().await.status, 200);
    gateway.metric_becomes(HELD, 0.0).await;

    let mut holder = Connection::open(gateway.addr).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 300000\r\n\r\n";
    holder.send(head.as_bytes()).await;
    holder.send(&vec![b' '; 299_000]).await;
    gateway.metric_becomes(HELD, 300_000.0).await;
    let answer = asking().await.answer().await;
    let code = answer.error_code();
    assert_eq!((answer.status, &*code), (503, "gateway_overloaded"));
    assert!(answer.header("retry-after").is_some());
    gateway.metric_becomes(HELD, 300_000.0).await;
    drop(holder);
    gateway.metric_becomes(HELD, 0.0).await;
}
