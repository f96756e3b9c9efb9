//! What the gateway answers itself: health, what is here, which models there
//! are.

use std::time::Duration;

use forebay::sim::{Sim, SimOptions};

use crate::support::{
    Connection, Gateway, chat, eventually,
    http::{ask, get, post, post_chat},
    one_group,
    scripted::{Scripted, json},
    sim, with_fallback,
};

async fn sim_with(name: &str, models: &[&str]) -> Sim {
    let models = models.iter().map(|model| (*model).to_owned()).collect();
    Sim::start(SimOptions {
        models,
        ..SimOptions::quick(name)
    })
    .await
    .unwrap()
}

/// The ids of `GET /v1/models`, in order.
async fn models(gateway: &Gateway) -> Vec<String> {
    let answer = get(gateway.addr, "/v1/models").await;
    assert_eq!(answer.status, 200);
    let list = answer.json();
    assert_eq!(list["object"], "list");
    let entries = list["data"].as_array().unwrap();
    for entry in entries {
        assert_eq!(entry["object"], "model");
        assert!(
            entry["created"].is_u64() && entry["owned_by"].is_string(),
            "{entry}"
        );
    }
    entries
        .iter()
        .map(|entry| entry["id"].as_str().unwrap().to_owned())
        .collect()
}

fn group(name: &str, sim: &Sim, more: &str) -> String {
    format!(
        "  {name}:\n    local: true\n    upstreams: [ {{ name: {}, url: \"{}\"{more} }} ]\n",
        sim.name(),
        sim.url()
    )
}

fn asked(sim: &Sim) -> usize {
    sim.records()
        .iter()
        .filter(|record| record.target() == "/v1/models")
        .count()
}

#[tokio::test]
async fn the_root_says_what_is_here() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let answer = get(gateway.addr, "/").await;
    assert_eq!(answer.status, 200);
    assert!(answer.header("x-request-id").is_some());
    let body = answer.json();
    assert_eq!(body["name"], "forebay");
    assert_eq!(body["openai_base_url"], "/v1");
    // Everything it names is there.
    let endpoints = body["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 11);
    for endpoint in endpoints {
        let (method, path) = endpoint.as_str().unwrap().split_once(' ').unwrap();
        let path = path.replace("{id}", "demo");
        let answer = ask(gateway.addr, method, &path, &[], b"").await;
        assert_ne!(answer.status, 404, "{method} {path}");
    }
}

#[tokio::test]
async fn health_tells_the_state_of_each_upstream_and_no_address_or_secret() {
    let (first, second) = (sim("gpu-1").await, sim("gpu-2").await);
    let yaml = one_group(&[&first, &second])
        .replace("kind: vllm,", "kind: vllm, key: \"env:FOREBAY_TEST_KEY\",");
    let gateway = Gateway::start_with(&yaml, &[], &[("FOREBAY_TEST_KEY", "a-secret-key")]).await;
    let answer = get(gateway.addr, "/health").await;
    assert_eq!(answer.status, 200);
    let health = answer.json();
    assert_eq!(health["status"], "ok");
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    let states: Vec<_> = health["upstreams"]
        .as_array()
        .unwrap()
        .iter()
        .map(|upstream| {
            (
                upstream["name"].as_str().unwrap(),
                upstream["state"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(states, [("gpu-1", "ready"), ("gpu-2", "ready")]);
    for secret in ["127.0.0.1", "a-secret-key", "FOREBAY_TEST_KEY", "http:"] {
        assert!(
            !answer.text().contains(secret),
            "{secret}: {}",
            answer.text()
        );
    }
    // A dead upstream shows once somebody met it.
    first.stop().await;
    eventually("health says degraded", || async {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
        get(gateway.addr, "/health").await.json()["status"] == "degraded"
    })
    .await;
    let health = get(gateway.addr, "/health").await.json();
    assert_ne!(health["upstreams"][0]["state"], "ready");
    assert_eq!(health["upstreams"][1]["state"], "ready");
}

#[tokio::test]
async fn probes_are_answered_without_a_key() {
    let sim = sim("gpu-1").await;
    let keys = "keys: []\n";
    let yaml = format!(
        "plugins: [ auth: {{ keys_file: keys.yaml }} ]\n{}",
        one_group(&[&sim])
    );
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", keys)], &[]).await;
    for (path, status) in [
        ("/", 200),
        ("/health", 200),
        ("/livez", 200),
        ("/readyz", 200),
        ("/v1/models", 401),
        ("/v1/models/demo", 401),
    ] {
        let answer = get(gateway.addr, path).await;
        assert_eq!(answer.status, status, "{path}");
        if status == 401 {
            answer.error_code();
        }
    }
    assert!(sim.records().is_empty(), "a stranger makes nobody ask");
}

#[tokio::test]
async fn what_is_not_there_is_a_404_in_openais_shape() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let mut connection = Connection::open(gateway.addr).await;
    for path in [
        "/v1",
        "/v1/",
        "/v2/models",
        "/v1/model",
        "/favicon.ico",
        "/health/",
        "/metrics",
        "/reload",
        "/v1/files",
        "/admin",
        "/livez/x",
    ] {
        connection.request("GET", path, &[], b"").await;
        let answer = connection.answer().await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (404, "unknown_url"),
            "{path}"
        );
    }
    assert!(sim.records().is_empty());
}

#[tokio::test]
async fn a_model_is_found_by_its_id_with_slashes_encoded_or_not() {
    let sim = sim_with("gpu-1", &["meta-llama/Llama-3.1-8B", "plain"]).await;
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: meta-llama/Llama-3.1-8B, groups: [gpus] }}\n  - {{ model: plain, groups: [gpus] }}\naliases: {{ fast: plain }}\n",
        group("gpus", &sim, "")
    );
    let gateway = Gateway::start(&yaml).await;
    for (path, id) in [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama%2FLlama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama%2fLlama%2D3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("plain", "plain"),
        ("%70lain?x=1", "plain"),
        ("fast", "fast"),
    ] {
        let answer = get(gateway.addr, &format!("/v1/models/{path}")).await;
        assert_eq!(answer.status, 200, "{path}");
        assert_eq!(answer.json()["id"], id);
        assert_eq!(answer.json()["object"], "model");
    }
    for path in [
        "other",
        "plain/",
        "plain/x",
        "../models",
        "Plain",
        "meta-llama%252FLlama-3.1-8B",
    ] {
        let answer = get(gateway.addr, &format!("/v1/models/{path}")).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (404, "model_not_found"),
            "{path}"
        );
    }
    for path in ["", "%00", "%ff", "a%0d%0ab"] {
        let answer = get(gateway.addr, &format!("/v1/models/{path}")).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (404, "unknown_url"),
            "{path}"
        );
    }
    // The configuration tells all: nobody was asked.
    assert_eq!(
        models(&gateway).await,
        ["meta-llama/Llama-3.1-8B", "plain", "fast"]
    );
    assert!(sim.records().is_empty());
}

#[tokio::test]
async fn the_list_has_what_upstreams_behind_a_pattern_say_they_have() {
    let gpu = sim_with("gpu-1", &["qwen-b", "qwen-a", "llama", "hidden"]).await;
    let ollama = sim_with("ollama-1", &["mistral", "qwen-a", "named", "gemma:2b"]).await;
    let yaml = format!(
        "groups:\n{}{}routes:\n\
         \x20 - {{ model: named, groups: [gpus] }}\n\
         \x20 - {{ model: \"qwen*\", groups: [gpus] }}\n\
         \x20 - {{ model: \"*\", groups: [ollama] }}\n",
        group("gpus", &gpu, ""),
        group("ollama", &ollama, ""),
    );
    let gateway = Gateway::start(&yaml).await;
    // What the file names, then by upstream and name; each once. `llama` would
    // be asked of ollama, which did not say that it has it.
    let expected = ["named", "qwen-a", "qwen-b", "gemma:2b", "mistral"];
    assert_eq!(models(&gateway).await, expected);
    assert_eq!(models(&gateway).await, expected);
    // Asked once: the answer is kept, and the connection clean.
    assert_eq!((asked(&gpu), asked(&ollama)), (1, 1));
    let record = ollama.records().pop().unwrap();
    assert_eq!((record.method(), record.target()), ("GET", "/v1/models"));
    assert!(record.body.is_empty());
    assert_eq!(record.header("content-length"), None);
    // Each can be used.
    for model in expected.into_iter().filter(|model| *model != "named") {
        assert_eq!(
            post_chat(gateway.addr, &chat(model)).await.status,
            200,
            "{model}"
        );
        assert_eq!(
            get(gateway.addr, &format!("/v1/models/{model}"))
                .await
                .status,
            200
        );
    }
}

#[tokio::test]
async fn many_who_ask_at_once_make_one_question() {
    let ollama = sim_with("ollama-1", &["mistral"]).await;
    ollama
        .fault("path=/models;header_delay=150ms")
        .await
        .unwrap();
    let gateway = Gateway::start(&one_group(&[&ollama])).await;
    let mut asking = tokio::task::JoinSet::new();
    let addr = gateway.addr;
    for _ in 0..20 {
        asking.spawn(async move { get(addr, "/v1/models").await.json()["data"][0]["id"].clone() });
    }
    while let Some(id) = asking.join_next().await {
        assert_eq!(id.unwrap(), "mistral");
    }
    assert_eq!(asked(&ollama), 1);
}

#[tokio::test]
async fn an_upstream_that_does_not_tell_costs_the_list_nothing_else() {
    let good = sim_with("gpu-1", &["demo"]).await;
    let mut cases = 0;
    for fault in [
        "path=*;reset",
        "path=*;status=500",
        "path=*;status=404",
        "path=*;status=503;body=html",
        "path=*;gzip",
        "path=*;hang",
    ] {
        let bad = sim_with("ollama-1", &["mistral"]).await;
        bad.fault(fault).await.unwrap();
        let gateway = Gateway::start(&with_fallback(&[&good], &bad)).await;
        assert_eq!(models(&gateway).await, ["demo"], "{fault}");
        // Not asked again at once, and not thought ill of.
        assert_eq!(models(&gateway).await, ["demo"], "{fault}");
        assert!(bad.records().len() <= 1, "{fault}: {:?}", bad.records());
        let health = get(gateway.addr, "/health").await.json();
        assert_eq!(health["status"], "ok", "{fault}");
        cases += 1;
    }
    assert_eq!(cases, 6);
}

#[tokio::test]
async fn a_list_that_makes_no_sense_adds_nothing() {
    let good = sim_with("gpu-1", &["demo"]).await;
    let entry = |id: &str| format!(r#"{{"id":"{id}"}}"#);
    let list = |entries: &[String]| json(200, &format!(r#"{{"data":[{}]}}"#, entries.join(",")));
    let long = "m".repeat(257);
    let huge: Vec<String> = (0..200_000)
        .map(|i| entry(&format!("huge-{i:020}")))
        .collect();
    let many: Vec<String> = (0..10_100).map(|i| entry(&format!("m{i:05}"))).collect();
    let mut cases = 0;
    for (what, answer, count) in [
        ("no JSON", json(200, "<html>"), 1),
        ("another shape", json(200, r#"{"data":7}"#), 1),
        ("no list", json(200, "{}"), 1),
        (
            "names that are none",
            list(&[entry(""), entry("a\\nb"), entry(&long), entry("fine")]),
            2,
        ),
        ("more than 4 MiB", list(&huge), 1),
        ("more than 10,000", list(&many), 10_000),
    ] {
        let odd = Scripted::always(answer).await;
        let yaml = one_group(&[&good]).replace(
            "routes:",
            &format!("      - {{ name: odd, url: \"{}\" }}\nroutes:", odd.url()),
        );
        let gateway = Gateway::start(&yaml).await;
        let listed = models(&gateway).await;
        assert_eq!(listed.len(), count, "{what}");
        assert_eq!(listed[0], "demo", "{what}");
        cases += 1;
    }
    assert_eq!(cases, 6);
}

#[tokio::test]
async fn an_upstream_that_goes_down_keeps_its_models_in_the_list() {
    let ollama = sim_with("ollama-1", &["mistral", "gemma"]).await;
    let gateway = Gateway::start(&one_group(&[&ollama])).await;
    assert_eq!(models(&gateway).await, ["gemma", "mistral"]);
    ollama.stop().await;
    assert_eq!(post_chat(gateway.addr, &chat("gemma")).await.status, 503);
    assert_eq!(models(&gateway).await, ["gemma", "mistral"]);
    // A reload keeps what is known of an upstream that did not change.
    assert_eq!(gateway.reload().await.status, 200);
    assert_eq!(models(&gateway).await, ["gemma", "mistral"]);
}

#[tokio::test]
async fn a_question_carries_the_upstreams_key_and_not_the_clients() {
    let ollama = Sim::start(SimOptions {
        api_key: Some("upstream-key".to_owned()),
        ..SimOptions::quick("ollama-1")
    })
    .await
    .unwrap();
    let yaml =
        one_group(&[&ollama]).replace("kind: vllm,", "kind: vllm, key: \"env:FOREBAY_TEST_KEY\",");
    let gateway = Gateway::start_with(&yaml, &[], &[("FOREBAY_TEST_KEY", "upstream-key")]).await;
    let fields = [("authorization", "Bearer client-key")];
    let answer = ask(gateway.addr, "GET", "/v1/models", &fields, b"").await;
    assert_eq!(answer.json()["data"][0]["id"], "demo");
    let head = ollama.records().pop().unwrap().head;
    let head = String::from_utf8_lossy(&head).into_owned();
    assert!(
        head.contains("Bearer upstream-key") && !head.contains("client-key"),
        "{head}"
    );
    // And nothing of the exchange is held for it.
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
    ollama
        .wait_for(Duration::from_secs(5), |seen| {
            seen.iter().all(|record| record.finished())
        })
        .await
        .unwrap();
    assert_eq!(post(gateway.addr, "/v1/models", &[], b"").await.status, 405);
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    for path in ["/", "/livez", "/readyz", "/health", "/v1/models"] {
        let mut connection = Connection::open(gateway.addr).await;
        let head = format!("HEAD {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        connection.send(head.as_bytes()).await;
        let said = String::from_utf8(connection.rest().await).unwrap();
        assert!(said.starts_with("HTTP/1.1 200 "), "{path}: {said}");
        assert!(said.ends_with("\r\n\r\n"), "{path}: {said}");
        assert_eq!(get(gateway.addr, path).await.status, 200, "{path}");
    }
}
