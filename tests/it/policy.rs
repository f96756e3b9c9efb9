//! What may be asked, and what may be answered.

use forebay::{config::load, gateway::catalog, sim::Sim};
use serde_json::{Value, json};

use crate::support::{
    Answer, Connection, Gateway, Scripted,
    by_hand::{ByHand, STREAM_HEAD, delta, group_of as one_upstream},
    chat, chat_stream, group_of,
    http::{build, post, post_chat},
    keys::{chat_as, keys},
    one_group,
    scripted::{answer, json as answered},
    sim, upstream_at,
};

/// The YAML of the plugin with these settings, in front of some groups.
fn with_policy(settings: &str, groups: &str) -> String {
    format!("plugins:\n  - auth: none\n  - policy: {settings}\n{groups}")
}

/// A gateway with these settings, and its upstream.
async fn start(settings: &str) -> (Gateway, Sim) {
    let sim = sim("a").await;
    let gateway = Gateway::start(&with_policy(settings, &one_group(&[&sim]))).await;
    (gateway, sim)
}

fn sent(sim: &Sim) -> Value {
    sim.records().last().unwrap().json()
}

async fn say(gateway: &Gateway, messages: Value, more: Value) -> Answer {
    let mut body = json!({ "model": "demo", "messages": messages });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    post_chat(gateway.addr, &body.to_string()).await
}

fn user(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}

/// What a streamed answer says, and its finish reasons.
fn told(answer: &Answer) -> (String, Vec<String>) {
    let (mut said, mut finishes) = (String::new(), Vec::new());
    for event in answer.events().iter().filter(|event| *event != "[DONE]") {
        let event: Value = serde_json::from_str(event).unwrap();
        for choice in event["choices"].as_array().into_iter().flatten() {
            said.push_str(choice["delta"]["content"].as_str().unwrap_or(""));
            finishes.extend(choice["finish_reason"].as_str().map(str::to_owned));
        }
    }
    (said, finishes)
}

#[tokio::test]
async fn dangerous_parameters_never_reach_an_upstream_and_are_told() {
    let (gateway, sim) = start("").await;
    let more = json!({ "chat_template": "{{x}}", "guided_regex": "(a+)+$", "top_k": 3,
        "structured_outputs": { "regex": "x" }, "vllm_xargs": {}, "lora": "/etc/passwd" });
    let answer = say(&gateway, user("hi"), more).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(
        answer.header("x-forebay-dropped-params"),
        Some("chat_template, guided_regex, structured_outputs, vllm_xargs, lora")
    );
    let body = sent(&sim);
    for key in [
        "chat_template",
        "guided_regex",
        "structured_outputs",
        "vllm_xargs",
        "lora",
    ] {
        assert!(body.get(key).is_none(), "{key}");
    }
    assert_eq!(body["top_k"], 3);
    let series = r#"forebay_policy_hits_total{part="parameters",rule="extras"}"#;
    gateway.metric_becomes(series, 5.0).await;

    let streamed = say(
        &gateway,
        user("hi"),
        json!({ "stream": true, "chat_template": "x" }),
    )
    .await;
    assert_eq!(
        streamed.header("x-forebay-dropped-params"),
        Some("chat_template")
    );
    let plain = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(plain.header("x-forebay-dropped-params"), None);
}

#[tokio::test]
async fn a_bound_under_another_name_does_not_get_past_the_limit() {
    let settings = "{ parameters: { limits: { max_tokens: { max: 50, over: lower } } } }";
    let (gateway, sim) = start(settings).await;
    let more = json!({ "max_tokens": 900, "n_predict": 100_000 });
    let answer = say(&gateway, user("hi"), more).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let dropped = answer.header("x-forebay-dropped-params");
    assert_eq!(dropped, Some("n_predict"));
    let sent = sent(&sim);
    assert_eq!(
        (&sent["max_tokens"], &sent["n_predict"]),
        (&json!(50), &Value::Null)
    );
}

#[tokio::test]
async fn keys_that_are_trusted_may_send_what_others_may_not() {
    let sim = sim("a").await;
    let group = group_of("g", "", &[upstream_at("a", &sim.url(), "kind: vllm")]);
    let yaml = format!(
        "plugins:\n  - auth: {{ keys_file: keys.yaml }}\n  - policy: {{ parameters: {{ trusted: [\"admin-*\"], extras: reject }} }}\n\
         groups:\n{group}routes:\n  - {{ model: \"*\", groups: [g] }}\n"
    );
    let file = keys(&[("alice", ""), ("admin-1", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    let body = chat("demo").replacen('{', r#"{"chat_template":"x","#, 1);
    for (name, status) in [("alice", 400), ("admin-1", 200)] {
        let answer = chat_as(&gateway, name, &body).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        if status == 400 {
            assert_eq!(answer.error_code(), "unsupported_parameter");
            assert_eq!(answer.json()["error"]["param"], "chat_template");
            assert_eq!(sim.records().len(), 0);
        }
    }
    assert_eq!(sent(&sim)["chat_template"], "x");
}

#[tokio::test]
async fn numbers_keep_to_their_range_and_every_other_byte_stays() {
    let upstream = Scripted::always(answered(
        200,
        r#"{"choices":[{"message":{"content":"x"}}]}"#,
    ))
    .await;
    let settings = "{ parameters: { limits: { max_tokens: { max: 100, over: lower }, temperature: { max: 1.5 } }, defaults: { top_p: 0.9 }, force: { user: shared } } }";
    let gateway = Gateway::start(&with_policy(settings, &one_upstream(&upstream.url()))).await;
    let body = r#"{ "model" : "m","seed":123456789012345678901234 ,"max_tokens":5000,"messages":[{"role":"user","content":"\u00e9"}] }"#;
    assert_eq!(post_chat(gateway.addr, body).await.status, 200);
    let came = String::from_utf8(upstream.requests()[0].body.clone()).unwrap();
    let expected = r#"{ "model" : "m","seed":123456789012345678901234 ,"max_tokens":100,"messages":[{"role":"user","content":"\u00e9"}],"top_p":0.9,"user":"shared" }"#;
    assert_eq!(came, expected);
    let hot = chat("m").replacen('{', r#"{"temperature":1.6,"#, 1);
    let answer = post_chat(gateway.addr, &hot).await;
    assert_eq!(answer.error_code(), "invalid_value");
    assert_eq!(answer.json()["error"]["param"], "temperature");
    assert_eq!(upstream.asked(), 1);
}

#[tokio::test]
async fn an_upstream_is_never_told_to_fetch_from_elsewhere() {
    let (gateway, sim) = start("{ media: { hosts: [\"*.example.org\"], data_url: 1KiB } }").await;
    let ask = |url: String| {
        let image = json!({ "type": "image_url", "image_url": { "url": url } });
        say(
            &gateway,
            json!([{ "role": "user", "content": [image] }]),
            json!({}),
        )
    };
    for url in [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "http://127.0.0.1:9100/reload",
        "http://2130706433/",
        "https://cdn.example.org.evil.net/a.png",
    ] {
        let answer = ask(url.to_owned()).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (400, "media_not_allowed"),
            "{url}"
        );
    }
    let large = ask(format!("data:image/png;base64,{}", "A".repeat(2000))).await;
    assert_eq!(
        (large.status, large.error_code().as_str()),
        (413, "media_too_large")
    );
    for part in [
        json!({ "type": "image", "image": "http://169.254.169.254/" }),
        json!({ "type": "image", "image": "/etc/passwd" }),
        json!({ "type": "brand_new", "source": { "from": "file:///etc/passwd" } }),
    ] {
        let messages = json!([{ "role": "user", "content": [part] }]);
        let answer = say(&gateway, messages, json!({})).await;
        assert_eq!(answer.error_code(), "media_not_allowed", "{part}");
        let body = json!({ "model": "demo", "input": [part] }).to_string();
        let answer = post(gateway.addr, "/v1/embeddings", &[], body.as_bytes()).await;
        assert_eq!(answer.error_code(), "media_not_allowed", "{part}");
    }
    assert_eq!(sim.records().len(), 0);
    for url in [
        "https://cdn.example.org/a.png",
        "data:image/png;base64,AAAA",
    ] {
        assert_eq!(ask(url.to_owned()).await.status, 200, "{url}");
    }
}

#[tokio::test]
async fn embeddings_keep_their_2048_inputs() {
    let (gateway, sim) = start("{ context: { limit: 10 } }").await;
    let embed = |count: usize| {
        let inputs: Vec<String> = (0..count).map(|n| format!("text {n}")).collect();
        let body = json!({ "model": "demo", "input": inputs }).to_string();
        async move { post(gateway.addr, "/v1/embeddings", &[], body.as_bytes()).await }
    };
    let answer = embed(2048).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(sent(&sim)["input"].as_array().unwrap().len(), 2048);
    assert_eq!(embed(2049).await.status, 400);
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_refused_with_the_given_tokenizer() {
    let sim = sim("a").await;
    let words = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
        "model":{"type":"WordLevel","vocab":{"[UNK]":0},"unk_token":"[UNK]"}}"#;
    let settings = "{ context: { limit: 50, tokenizers: { \"demo*\": words.json } } }";
    let yaml = with_policy(settings, &one_group(&[&sim]));
    let gateway = Gateway::start_with(&yaml, &[("words.json", words)], &[]).await;
    // 3 for the prompt, 4 for the message, one for each word however long.
    let fits = format!("{} end", "incomprehensible ".repeat(42));
    assert_eq!(say(&gateway, user(&fits), json!({})).await.status, 200);
    let answer = say(&gateway, user(&format!("{fits} more")), json!({})).await;
    assert_eq!(answer.error_code(), "context_length_exceeded");
    let error = &answer.json()["error"];
    assert_eq!(error["param"], "messages");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.starts_with(
            "This model's maximum context length is 50 tokens. However, your messages resulted in"
        ),
        "{message}"
    );
    let answer = say(&gateway, user(&fits), json!({ "max_tokens": 1 })).await;
    assert_eq!(answer.error_code(), "context_length_exceeded");
    assert_eq!(sim.records().len(), 1);
    // Ten megabytes are no reason to count to the end.
    let huge = say(
        &gateway,
        user(&"word \u{2028}\"".repeat(1_000_000)),
        json!({}),
    )
    .await;
    assert_eq!(huge.error_code(), "context_length_exceeded");
}

#[tokio::test]
async fn a_long_conversation_loses_its_oldest_turns() {
    let (gateway, sim) = start("{ context: { limit: 60, over: trim } }").await;
    let long = "x".repeat(80);
    let messages = json!([
        { "role": "system", "content": "Be kind." },
        { "role": "user", "content": long },
        { "role": "assistant", "content": null, "tool_calls": [{ "id": "c", "type": "function", "function": { "name": "f", "arguments": "{}" } }] },
        { "role": "tool", "tool_call_id": "c", "content": long },
        { "role": "assistant", "content": "So it is." },
        { "role": "user", "content": "And now?" },
    ]);
    let answer = say(&gateway, messages.clone(), json!({})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("x-forebay-trimmed"), Some("4"));
    assert_eq!(sent(&sim)["messages"], json!([messages[0], messages[5]]));
    let answer = say(&gateway, user(&"x".repeat(800)), json!({})).await;
    assert_eq!(answer.error_code(), "context_length_exceeded");
}

#[tokio::test]
async fn a_long_prompt_goes_to_the_larger_group() {
    let (small, big) = (sim("small").await, sim("big").await);
    let groups = crate::support::groups_in_order(&[("small", &[&small]), ("big", &[&big])]);
    let settings =
        "{ context: { limit: 20, over: route, route_to: { groups: [big], limit: 200 } } }";
    let gateway = Gateway::start(&with_policy(settings, &groups)).await;
    for (length, upstream) in [(8, "small"), (400, "big")] {
        let answer = say(&gateway, user(&"x".repeat(length)), json!({})).await;
        assert_eq!(answer.upstream(), upstream, "{}", answer.text());
    }
    let answer = say(&gateway, user(&"x".repeat(4000)), json!({})).await;
    assert_eq!(answer.error_code(), "context_length_exceeded");
}

#[tokio::test]
async fn prompts_are_denied_edited_and_begun_and_nothing_of_them_is_logged() {
    let (gateway, sim) = start(
        r#"{ prompt: [
            { name: words, deny: ["(?i)project\\s+nonce"], status: 403, code: secret_project, message: "not in here" },
            { replace: ["colour"], with: "color" },
            { prepend: "Be kind." } ] }"#,
    )
    .await;
    let answer = say(&gateway, user("about PROJECT\nNONCE please"), json!({})).await;
    assert_eq!(answer.status, 403);
    assert_eq!(answer.error_code(), "secret_project");
    assert_eq!(answer.json()["error"]["message"], "not in here");
    assert_eq!(sim.records().len(), 0);
    let series = r#"forebay_policy_hits_total{part="prompt",rule="words"}"#;
    gateway.metric_becomes(series, 1.0).await;

    assert_eq!(say(&gateway, user("a colour"), json!({})).await.status, 200);
    let expected = json!([{ "role": "system", "content": "Be kind." }, { "role": "user", "content": "a color" }]);
    assert_eq!(sent(&sim)["messages"], expected);
    gateway.logged("POST").await;
    assert!(!gateway.log().contains("NONCE"));
}

#[tokio::test]
async fn a_denied_text_is_found_in_pieces_in_names_and_in_tools() {
    let (gateway, sim) = start("{ prompt: [{ deny: [forbidden] }] }").await;
    let text = |text: &str| json!({ "type": "text", "text": text });
    let pieces = json!([{ "role": "user", "content": [text("forb"), text("idden")] }]);
    let named = json!([{ "role": "user", "name": "forbidden", "content": "hi" }]);
    let past = json!([{ "role": "assistant", "content": "forbidden" }]);
    let function = json!({ "name": "f", "description": "does what is forbidden" });
    let tools = json!({ "tools": [{ "type": "function", "function": function }] });
    for (messages, more) in [
        (pieces, json!({})),
        (named, json!({})),
        (past, json!({})),
        (user("hi"), tools),
    ] {
        let answer = say(&gateway, messages, more).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
        assert_eq!(answer.error_code(), "content_policy_violation");
    }
    assert_eq!(sim.records().len(), 0);
    assert_eq!(say(&gateway, user("hi"), json!({})).await.status, 200);
}

#[tokio::test]
async fn no_kind_of_text_of_a_stream_gets_past_a_rule() {
    let event = |event: Value| format!("data: {event}\n\n");
    let chat_events = [
        json!({ "id": "x", "choices": [{ "index": 0, "delta": { "audio": { "transcript": "the co" } } }] }),
        json!({ "id": "x", "choices": [{ "index": 0, "delta": { "audio": { "transcript": "des and a co" } } }] }),
        json!({ "id": "x", "choices": [{ "index": 0, "delta": {}, "finish_reason": "stop" }] }),
    ];
    let delta = |kind: &str, text: &str| json!({ "type": format!("response.{kind}.delta"), "item_id": "i", "output_index": 0, "delta": text });
    let input = json!({ "type": "custom_tool_call", "name": "f", "input": "the codes" });
    let response_events = [
        json!({ "type": "response.created", "response": { "id": "r", "output": [] } }),
        delta("reasoning_summary", "hidden co"),
        delta("reasoning_summary", "des"),
        json!({ "type": "response.reasoning_summary.done", "output_index": 0, "text": "hidden codes" }),
        delta("audio.transcript", "of codes"),
        json!({ "type": "response.output_item.done", "output_index": 1, "item": input }),
        json!({ "type": "response.completed", "response": { "id": "r", "status": "completed", "output": [input] } }),
    ];
    let streamed = |events: &[Value], end: &str| {
        let data: String = events.iter().map(|one| event(one.clone())).collect();
        let headers = [("content-type", "text/event-stream")];
        answer(200, &headers, &format!("{data}{end}"))
    };
    let upstream = Scripted::by_target(&[
        ("/v1/chat", streamed(&chat_events, "data: [DONE]\n\n")),
        ("/v1/responses", streamed(&response_events, "")),
    ])
    .await;
    let settings = "{ output: [{ mask: [codes] }, { deny: [codes], texts: [tools] }] }";
    let gateway = Gateway::start(&with_policy(settings, &one_upstream(&upstream.url()))).await;
    let chat = say(&gateway, user("hi"), json!({ "stream": true })).await;
    let said: String = chat
        .events()
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .filter_map(|event| {
            let text = &event["choices"][0]["delta"]["audio"]["transcript"];
            Some(text.as_str()?.to_owned())
        })
        .collect();
    assert_eq!(said, "the ***** and a co", "{}", chat.text());
    assert_eq!(told(&chat).1, ["stop"]);

    let body = br#"{"model":"m","input":"hi","stream":true}"#;
    let answer = post(gateway.addr, "/v1/responses", &[], body).await;
    assert!(!answer.text().contains("codes"), "{}", answer.text());
    assert!(answer.text().contains("hidden *****"), "{}", answer.text());
    assert!(answer.text().contains("of *****"), "{}", answer.text());
    let events = answer.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["type"], "response.incomplete", "{}", answer.text());
}

#[tokio::test]
async fn a_stream_cut_at_every_byte_is_masked_the_same() {
    let body = format!(
        "{}{}{}data: {{\"choices\":[{{\"index\":0,\"delta\":{{}},\"finish_reason\":\"stop\"}}]}}\n\ndata: [DONE]\n\n",
        delta("my sec"),
        delta("ret is 😀 se"),
        delta("cr"),
    );
    let upstream = ByHand::listen().await;
    let settings = "{ output: [{ mask: [secret] }] }";
    let gateway = Gateway::start(&with_policy(settings, &one_upstream(&upstream.url()))).await;
    let head = STREAM_HEAD.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
    for cut in 1..body.len() {
        let (first, second) = body.as_bytes().split_at(cut);
        let serve = async {
            let mut call = upstream.accept().await;
            call.send(&head).await;
            call.chunk(first).await;
            // Most often they come apart; together they come to the same.
            tokio::task::yield_now().await;
            call.chunk(second).await;
            call.end().await;
        };
        let request = chat_stream("m");
        let (answer, ()) = tokio::join!(post_chat(gateway.addr, &request), serve);
        let (said, finishes) = told(&answer);
        assert_eq!(said, "my ****** is 😀 secr", "{cut}");
        assert_eq!(finishes, ["stop"]);
        assert_eq!(answer.events().last().unwrap(), "[DONE]");
    }
}

#[tokio::test]
async fn a_denied_stream_ends_and_its_upstream_is_closed() {
    let upstream = ByHand::listen().await;
    let settings = "{ output: [{ name: leak, deny: [\"launch codes?\"] }] }";
    let gateway = Gateway::start(&with_policy(settings, &one_upstream(&upstream.url()))).await;
    let mut client = Connection::open(gateway.addr).await;
    let body = chat_stream("m");
    client
        .send(&build("POST", "/v1/chat/completions", &[], body.as_bytes()))
        .await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("here are ").await;
    client.read_until("here are ").await; // nothing of it can be a match
    call.say("the launch").await;
    call.say(" code").await;
    call.say("s: 1234").await;
    let answer = client.answer().await;
    let (said, finishes) = told(&answer);
    assert_eq!(said, "here are the ");
    assert_eq!(finishes, ["content_filter"]);
    assert_eq!(answer.events().last().unwrap(), "[DONE]");
    assert!(answer.complete);
    call.closed().await;
    let series = r#"forebay_policy_hits_total{part="output",rule="leak"}"#;
    gateway.metric_becomes(series, 1.0).await;
}

#[tokio::test]
async fn a_whole_answer_is_cut_where_it_is_denied() {
    let whole = r#"{"id":"x","choices":[{"index":0,"message":{"role":"assistant","content":"the codes are 1"},"finish_reason":"stop"}],"usage":{"total_tokens":7}}"#;
    let upstream = Scripted::always(answered(200, whole)).await;
    let settings = "{ output: [{ deny: [codes] }] }";
    let gateway = Gateway::start(&with_policy(settings, &one_upstream(&upstream.url()))).await;
    let answer = post_chat(gateway.addr, &chat("m")).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "the ");
    assert_eq!(answer["choices"][0]["finish_reason"], "content_filter");
    assert_eq!(answer["usage"]["total_tokens"], 7);
    // The same for a client who wants it as a stream.
    let streamed = post_chat(gateway.addr, &chat_stream("m")).await;
    let (said, finishes) = told(&streamed);
    assert_eq!(
        (said.as_str(), finishes),
        ("the ", vec!["content_filter".to_owned()])
    );
}

#[tokio::test]
async fn every_choice_of_a_denied_stream_ends_and_so_does_a_response() {
    let chat_events = [
        json!({ "id": "x", "choices": [{ "index": 1, "delta": { "content": "fine" } }] }),
        json!({ "id": "x", "choices": [{ "index": 0, "delta": { "reasoning_content": "the codes" } }] }),
        json!({ "id": "x", "choices": [{ "index": 0, "delta": { "content": "never" } }] }),
    ];
    let delta = |text: &str| json!({ "type": "response.output_text.delta", "item_id": "i", "output_index": 0, "content_index": 0, "delta": text });
    let response_events = [
        json!({ "type": "response.created", "response": { "id": "r", "object": "response", "status": "in_progress", "output": [] } }),
        delta("it is the co"),
        delta("des, never"),
    ];
    let streamed = |events: &[Value]| {
        let data: Vec<String> = events
            .iter()
            .map(|event| format!("data: {event}\n\n"))
            .collect();
        answer(
            200,
            &[("content-type", "text/event-stream")],
            &data.concat(),
        )
    };
    let upstream = Scripted::by_target(&[
        ("/v1/chat", streamed(&chat_events)),
        ("/v1/responses", streamed(&response_events)),
    ])
    .await;
    let settings = "{ output: [{ deny: [codes] }] }";
    let gateway = Gateway::start(&with_policy(settings, &one_upstream(&upstream.url()))).await;
    let chat = say(&gateway, user("hi"), json!({ "stream": true, "n": 2 })).await;
    let (said, finishes) = told(&chat);
    assert_eq!(said, "fine", "{}", chat.text());
    assert_eq!(finishes, ["content_filter", "content_filter"]);
    assert!(chat.text().contains("the ") && !chat.text().contains("never"));
    assert_eq!(chat.events().last().unwrap(), "[DONE]");

    let body = br#"{"model":"m","input":"hi","stream":true}"#;
    let answer = post(gateway.addr, "/v1/responses", &[], body).await;
    let events = answer.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["type"], "response.incomplete", "{}", answer.text());
    assert_eq!(last["response"]["id"], "r");
    assert_eq!(
        last["response"]["incomplete_details"]["reason"],
        "content_filter"
    );
    assert_eq!(
        last["response"]["output"][0]["content"][0]["text"],
        "it is the "
    );
    assert!(!answer.text().contains("never") && !answer.text().contains("[DONE]"));
    assert!(answer.text().contains("event: response.incomplete\ndata: "));
}

#[tokio::test]
async fn a_match_over_a_takeover_is_found() {
    let (first, second) = (ByHand::listen().await, ByHand::listen().await);
    let group = group_of(
        "gpus",
        "",
        &[
            upstream_at("a", &first.url(), "kind: vllm, weight: 1000"),
            upstream_at("b", &second.url(), "kind: vllm"),
        ],
    );
    let groups = format!("groups:\n{group}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n");
    let settings = "{ output: [{ mask: [\"secret word\"] }] }";
    let gateway = Gateway::start(&with_policy(settings, &groups)).await;
    let mut client = Connection::open(gateway.addr).await;
    let body = chat_stream("m");
    client
        .send(&build("POST", "/v1/chat/completions", &[], body.as_bytes()))
        .await;
    let (mut dying, other) = tokio::select! {
        call = first.accept() => (call, &second),
        call = second.accept() => (call, &first),
    };
    dying.send(STREAM_HEAD).await;
    dying.say("the sec").await;
    client.read_until("the ").await;
    dying.reset();
    let mut call = other.accept().await;
    // It is told all that came, not what the client has.
    let asked: Value = serde_json::from_slice(call.body()).unwrap();
    assert_eq!(asked["messages"][1]["content"], "the sec");
    call.send(STREAM_HEAD).await;
    call.say("ret word is").await;
    call.chunk("data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n").await;
    call.end().await;
    let (said, finishes) = told(&client.answer().await);
    assert_eq!(said, "the *********** is");
    assert_eq!(finishes, ["stop"]);
}

#[test]
fn mistakes_are_told_with_their_lines_all_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("forebay.yaml");
    let yaml = r#"listen: 127.0.0.1:7070
plugins:
  - policy:
      context:
        limit: 0
      window: -1
      prompt:
        - deny: ["fine", "(?:a{1000}){1000}"]
        - replace: ["("]
        - deny: ["a*"]
      output:
        - mask: ["(a)\\1"]
      media: { data_url: 0B }
groups: {g: {upstreams: [{name: a, url: "http://127.0.0.1:1/v1"}]}}
routes: [{model: "*", groups: [g]}]
"#;
    std::fs::write(&file, yaml).unwrap();
    let problems = load(&file, &catalog()).unwrap_err().to_string();
    for told in [
        "5:",
        "context.limit",
        "6:",
        "window",
        "prompt[0].deny[1]",
        "compiled",
        "prompt[1].replace[0]",
        "prompt[2].deny[0]",
        "an empty text",
        "output[0].mask[0]",
        "media.data_url",
    ] {
        assert!(problems.contains(told), "{told} in {problems}");
    }
}
