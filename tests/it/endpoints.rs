//! The six calls to models, whole and streamed.

use forebay::sim::Sim;
use serde_json::{Value, json};

use crate::support::{Answer, Gateway, http::post, one_group, sim, with_fallback};

/// Each endpoint, a small request, and where the answer has what was asked for.
fn calls() -> [(&'static str, Value, &'static str); 6] {
    let messages = json!([{"role": "user", "content": "Hello"}]);
    [
        (
            "/v1/chat/completions",
            json!({"model": "demo", "messages": messages}),
            "/choices/0/message/content",
        ),
        (
            "/v1/completions",
            json!({"model": "demo", "prompt": "Hello"}),
            "/choices/0/text",
        ),
        (
            "/v1/embeddings",
            json!({"model": "demo", "input": ["one", "two"]}),
            "/data/1/embedding/15",
        ),
        (
            "/v1/responses",
            json!({"model": "demo", "input": "Hello"}),
            "/output/0/content/0/text",
        ),
        (
            "/v1/rerank",
            json!({"model": "demo", "query": "one", "documents": ["one", "two"]}),
            "/results/1/relevance_score",
        ),
        (
            "/v1/moderations",
            json!({"model": "demo", "input": "flagged"}),
            "/results/0/flagged",
        ),
    ]
}

async fn ask(gateway: &Gateway, path: &str, body: &Value) -> Answer {
    post(gateway.addr, path, &[], body.to_string().as_bytes()).await
}

#[track_caller]
fn last_target(sim: &Sim) -> String {
    sim.records().last().unwrap().target().to_owned()
}

/// The `event:` name and the data of each event.
fn typed(answer: &Answer) -> Vec<(String, Value)> {
    assert_eq!(
        answer.header("content-type"),
        Some("text/event-stream"),
        "{}",
        answer.text()
    );
    assert!(answer.complete);
    let events = answer.text().trim_end().split("\n\n");
    events
        .map(|event| {
            let field = |name: &str| {
                let line = event.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().trim_start().to_owned()
            };
            (
                field("event:"),
                serde_json::from_str(&field("data:")).unwrap(),
            )
        })
        .collect()
}

#[tokio::test]
async fn each_of_the_six_calls_is_answered_by_its_own_endpoint_upstream() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for (path, body, found) in calls() {
        let answer = ask(&gateway, path, &body).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert_eq!(
            answer.header("content-type"),
            Some("application/json"),
            "{path}"
        );
        assert_eq!(answer.upstream(), "gpu-1", "{path}");
        assert!(
            answer.json().pointer(found).is_some(),
            "{path}: {}",
            answer.text()
        );
        assert_eq!(last_target(&gpu), path);
        let sent = gpu.records().last().unwrap().body.clone();
        assert_eq!(
            sent,
            body.to_string().as_bytes(),
            "{path}: not as the client wrote it"
        );
    }
}

#[tokio::test]
async fn an_answer_is_passed_on_byte_for_byte() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let body = json!({"model": "demo", "input": ["one", "two"], "encoding_format": "base64", "dimensions": 5});
    let through = ask(&gateway, "/v1/embeddings", &body).await;
    let direct = post(
        gpu.addr(),
        "/v1/embeddings",
        &[],
        body.to_string().as_bytes(),
    )
    .await;
    assert_eq!(through.status, 200);
    assert_eq!(through.text(), direct.text());
    assert!(through.json()["data"][0]["embedding"].is_string());
}

#[tokio::test]
async fn each_of_the_six_calls_fails_over() {
    let (gpu, ollama) = (sim("gpu-1").await, sim("ollama-1").await);
    let gateway = Gateway::start(&with_fallback(&[&gpu], &ollama)).await;
    gpu.fault("status=500").await.unwrap();
    for (path, body, found) in calls() {
        let answer = ask(&gateway, path, &body).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert_eq!(answer.upstream(), "ollama-1", "{path}");
        assert_eq!(answer.header("x-forebay-fallback"), Some("1"), "{path}");
        assert!(
            answer.json().pointer(found).is_some(),
            "{path}: {}",
            answer.text()
        );
        assert_eq!(last_target(&ollama), path);
    }
}

#[tokio::test]
async fn each_of_the_six_calls_is_counted_under_its_name() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for (path, body, _) in calls() {
        ask(&gateway, path, &body).await;
        let name = path.trim_start_matches("/v1/").replace('/', "_");
        let series = format!(
            "forebay_requests_total{{endpoint=\"{name}\",outcome=\"success\",route=\"*\",status=\"200\"}}"
        );
        gateway.metric_becomes(&series, 1.0).await;
    }
}

#[tokio::test]
async fn a_stream_of_completions_says_what_the_whole_answer_says() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let whole = json!({"model": "demo", "prompt": "Hello", "max_tokens": 9, "n": 2});
    let mut streamed = whole.clone();
    streamed["stream"] = true.into();
    let whole = ask(&gateway, "/v1/completions", &whole).await;
    let streamed = ask(&gateway, "/v1/completions", &streamed).await;
    assert!(streamed.complete);
    assert_eq!(streamed.events().last().map(String::as_str), Some("[DONE]"));
    assert!(!streamed.text().contains("usage"), "{}", streamed.text());
    assert_eq!(
        gpu.records()[1].json()["stream_options"]["include_usage"],
        true
    );
    for choice in [0_usize, 1] {
        let text: String = streamed
            .events()
            .iter()
            .filter_map(|event| serde_json::from_str::<Value>(event).ok())
            .filter(|chunk| chunk["choices"][0]["index"] == choice)
            .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(
            text,
            whole.json()["choices"][choice]["text"].as_str().unwrap()
        );
        assert!(text.starts_with("gpu-1 answers:"));
    }
}

#[tokio::test]
async fn a_stream_of_responses_is_typed_events_without_a_done() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let body = json!({"model": "demo", "input": "Hello", "stream": true});
    for fault in ["", "newline=crlf;split=3", "newline=cr;bom"] {
        gpu.fault(fault).await.unwrap();
        let answer = ask(&gateway, "/v1/responses", &body).await;
        assert_eq!(answer.status, 200);
        assert!(!answer.text().contains("[DONE]"), "{}", answer.text());
        let events = typed(&answer);
        assert!(
            events.iter().all(|(name, data)| data["type"] == **name),
            "{}",
            answer.text()
        );
        assert_eq!(events[0].0, "response.created");
        let (last, data) = events.last().unwrap();
        assert_eq!(last, "response.completed");
        assert_eq!(
            data["response"]["usage"]["output_tokens"], 24,
            "it is part of the event"
        );
        let text: String = events
            .iter()
            .filter(|(name, _)| name == "response.output_text.delta")
            .map(|(_, data)| data["delta"].as_str().unwrap())
            .collect();
        assert!(text.starts_with("gpu-1 answers:"));
        assert_eq!(
            text,
            data["response"]["output"][0]["content"][0]["text"]
                .as_str()
                .unwrap()
        );
        assert_eq!(
            gpu.records().last().unwrap().body,
            body.to_string().as_bytes()
        );
    }
    gateway.logged("ending=success").await;
    let series = r#"forebay_tokens_total{direction="out",route="*",upstream="gpu-1"}"#;
    gateway.metric_becomes(series, 72.0).await;
}

#[tokio::test]
async fn a_response_that_ends_at_its_token_limit_is_complete() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let body = json!({"model": "demo", "input": "Hello", "stream": true, "max_output_tokens": 3});
    let answer = ask(&gateway, "/v1/responses", &body).await;
    assert_eq!(typed(&answer).last().unwrap().0, "response.incomplete");
    assert!(
        !answer.text().contains("\"code\":\"upstream"),
        "{}",
        answer.text()
    );
    gateway.logged("ending=success").await;
}

#[tokio::test]
async fn a_stream_of_responses_fails_over_until_its_first_delta() {
    let (gpu, ollama) = (sim("gpu-1").await, sim("ollama-1").await);
    let gateway = Gateway::start(&with_fallback(&[&gpu], &ollama)).await;
    let body = json!({"model": "demo", "input": "Hello", "stream": true});
    // created, in_progress, output_item.added, content_part.added say nothing yet.
    for fault in ["die_at=0", "die_at=4", "error_at=4", "empty_stream"] {
        gpu.fault(fault).await.unwrap();
        let answer = ask(&gateway, "/v1/responses", &body).await;
        assert_eq!(answer.upstream(), "ollama-1", "{fault}");
        let events = typed(&answer);
        let created = events.iter().filter(|(name, _)| name == "response.created");
        assert_eq!(created.count(), 1, "{fault}: two beginnings");
        assert_eq!(events.last().unwrap().0, "response.completed", "{fault}");
    }
}

#[tokio::test]
async fn a_stream_of_responses_or_completions_that_breaks_ends_with_an_error_event() {
    let (gpu, ollama) = (sim("gpu-1").await, sim("ollama-1").await);
    let config = with_fallback(&[&gpu], &ollama);
    let config = config.replace("  gpus:\n", "  gpus:\n    takeover: false\n");
    let gateway = Gateway::start(&config).await;
    let responses = json!({"model": "demo", "input": "Hello", "stream": true});
    let completions = json!({"model": "demo", "prompt": "Hello", "stream": true});
    for fault in ["die_at=8", "error_at=8", "die_at=8;how=mid_chunk"] {
        gpu.fault(&format!("{fault};gap=5")).await.unwrap();
        gateway.reset(None).await;
        for (path, body) in [
            ("/v1/responses", &responses),
            ("/v1/completions", &completions),
        ] {
            let answer = ask(&gateway, path, body).await;
            assert!(answer.complete, "{path} {fault}");
            assert_eq!(answer.upstream(), "gpu-1");
            assert!(
                !answer.text().contains("[DONE]"),
                "{path} {fault}: {}",
                answer.text()
            );
            let events = typed(&answer);
            assert_eq!(events.len(), 9, "{path} {fault}: {}", answer.text());
            let errors = events.iter().filter(|(_, data)| !data["error"].is_null());
            assert!(
                errors.clone().count() >= 1,
                "{path} {fault}: {}",
                answer.text()
            );
            let (_, last) = events.last().unwrap();
            assert_eq!(
                last["error"]["code"], "upstream_incomplete",
                "{path} {fault}"
            );
            assert_eq!(last["error"]["type"], "server_error");
        }
    }
    assert!(ollama.records().is_empty());
}

#[tokio::test]
async fn calls_that_cannot_stream_are_answered_whole() {
    let gpu = sim("gpu-1").await;
    let config = one_group(&[&gpu]) + "limits: { heartbeat: 100ms }\n";
    let gateway = Gateway::start(&config).await;
    gpu.fault("header_delay=150ms").await.unwrap();
    for (path, body, found) in calls() {
        if ["/v1/embeddings", "/v1/rerank", "/v1/moderations"].contains(&path) {
            let answer = ask(&gateway, path, &body).await;
            assert_eq!(answer.status, 200, "{path}");
            assert!(answer.header("content-length").is_some(), "{path}");
            assert!(answer.json().pointer(found).is_some(), "{path}");
        }
    }
}
