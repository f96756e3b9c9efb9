//! Where a request goes, and what it looks like when it gets there: strategies,
//! aliases, patterns, rewriting, pins, locality, headers, bytes.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use forebay::sim::{Sim, SimOptions};
use futures_util::future::join_all;

use crate::support::{
    Connection, Gateway, Scripted, chat, chat_stream, eventually, group_of,
    http::{ask, post, post_chat},
    one_group,
    scripted::json,
    sim, upstream_at, with_fallback,
};

/// The YAML of one group over these upstreams, taken for every model.
fn group_with(keys: &str, upstreams: &[String]) -> String {
    format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        group_of("g", keys, upstreams)
    )
}

fn asked(sim: &Sim) -> usize {
    sim.records().len()
}

/// The model that an upstream was asked for, the last time.
fn model_at(sim: &Sim) -> String {
    let records = sim.records();
    records.last().unwrap().json()["model"]
        .as_str()
        .unwrap()
        .to_owned()
}

// --- strategies ---

#[tokio::test]
async fn round_robin_divides_by_weight_to_the_request() {
    let (a, b) = (sim("a").await, sim("b").await);
    let upstreams = [
        upstream_at("a", &a.url(), "weight: 3"),
        upstream_at("b", &b.url(), "weight: 1"),
    ];
    let gateway = Gateway::start(&group_with("strategy: round_robin", &upstreams)).await;
    let mut order = String::new();
    for _ in 0..16 {
        order.push_str(post_chat(gateway.addr, &chat("demo")).await.upstream());
    }
    assert_eq!((asked(&a), asked(&b)), (12, 4));
    // Smooth: never all of one upstream's turns in a row.
    assert!(!order.contains("aaaa"), "{order}");
}

#[tokio::test]
async fn random_divides_by_weight() {
    let (a, b) = (sim("a").await, sim("b").await);
    let upstreams = [
        upstream_at("a", &a.url(), "weight: 3"),
        upstream_at("b", &b.url(), "weight: 1"),
    ];
    let gateway = Gateway::start(&group_with("strategy: random", &upstreams)).await;
    let mut connection = Connection::open(gateway.addr).await;
    let mut order = String::new();
    for _ in 0..240 {
        let body = chat("demo");
        connection
            .request("POST", "/v1/chat/completions", &[], body.as_bytes())
            .await;
        order.push_str(connection.answer().await.upstream());
    }
    // 180 expected with a standard deviation of 6.7: six of them either way.
    assert!((140..=220).contains(&asked(&a)), "{order}");
    assert!(order.contains("bb"), "not in turns: {order}");
}

#[tokio::test]
async fn least_connections_and_its_alias_prefer_the_idle_one() {
    for strategy in ["least_connections", "least_used"] {
        let (a, b) = (sim("a").await, sim("b").await);
        a.fault("hang").await.unwrap();
        b.fault("hang").await.unwrap();
        let upstreams = [
            upstream_at("a", &a.url(), "weight: 2"),
            upstream_at("b", &b.url(), "weight: 1"),
        ];
        let keys = format!("strategy: {strategy}");
        let gateway = Gateway::start(&group_with(&keys, &upstreams)).await;
        let mut waiting = Vec::new();
        for nth in 1..=6 {
            let mut connection = Connection::open(gateway.addr).await;
            let body = chat("demo");
            connection
                .request("POST", "/v1/chat/completions", &[], body.as_bytes())
                .await;
            waiting.push(connection);
            eventually("the request has arrived", || async {
                asked(&a) + asked(&b) == nth
            })
            .await;
        }
        assert_eq!((asked(&a), asked(&b)), (4, 2), "{strategy}");
        // a becomes idle: the next ones are its.
        a.clear_faults().await;
        a.clear_records();
        let before = asked(&b);
        drop(waiting.drain(..));
        for name in ["a", "b"] {
            let series =
                format!("forebay_upstream_requests_in_flight{{group=\"g\",upstream=\"{name}\"}}");
            gateway.metric_becomes(&series, 0.0).await;
        }
        let mut busy = Connection::open(gateway.addr).await;
        let pin = [("x-forebay-upstream", "b")];
        busy.request(
            "POST",
            "/v1/chat/completions",
            &pin,
            chat("demo").as_bytes(),
        )
        .await;
        eventually("b is busy", || async { asked(&b) == before + 1 }).await;
        for _ in 0..4 {
            assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "a");
        }
    }
}

// --- names of models ---

#[tokio::test]
async fn aliases_patterns_and_rewriting_per_group_decide_the_model_that_is_sent() {
    let (a, b, c) = (sim("a").await, sim("b").await, sim("c").await);
    let yaml = format!(
        "aliases: {{ gpt-4o: qwen-72b }}\ngroups:\n{}{}{}routes:\n\
         \x20 - {{ model: \"qwen*\", groups: [one, two], fallback: three, rewrite: {{ two: demo-two, three: demo-three }} }}\n\
         \x20 - {{ model: \"*-mini\", groups: [two] }}\n",
        group_of("one", "", &[upstream_at("a", &a.url(), "")]),
        group_of("two", "", &[upstream_at("b", &b.url(), "")]),
        group_of("three", "", &[upstream_at("c", &c.url(), "")]),
    );
    let gateway = Gateway::start(&yaml).await;
    for sim in [&a, &b, &c] {
        sim.fault("status=503").await.unwrap();
    }
    post_chat(gateway.addr, &chat("gpt-4o")).await;
    assert_eq!(
        [model_at(&a), model_at(&b), model_at(&c)],
        ["qwen-72b", "demo-two", "demo-three"]
    );

    let gateway = Gateway::start(&yaml).await;
    a.clear_records();
    post_chat(gateway.addr, &chat("o1-mini")).await;
    assert_eq!((asked(&a), model_at(&b).as_str()), (0, "o1-mini"));

    let answer = post_chat(gateway.addr, &chat("llama")).await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (404, "model_not_found")
    );
    assert_eq!(answer.json()["error"]["param"], "model");
    assert_eq!(asked(&a), 0);
}

#[tokio::test]
async fn an_upstream_is_asked_only_for_the_models_it_lists() {
    let (a, b) = (sim("a").await, sim("b").await);
    let upstreams = [
        upstream_at("a", &a.url(), "models: [\"qwen*\"]"),
        upstream_at("b", &b.url(), "models: [demo]"),
    ];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    }
    a.fault("status=503").await.unwrap();
    let answer = post_chat(gateway.addr, &chat("qwen3")).await;
    assert_eq!(answer.status, 502);
    assert_eq!((asked(&a), asked(&b)), (1, 4));
    let answer = post_chat(gateway.addr, &chat("llama")).await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (404, "model_not_found")
    );
}

// --- what is sent ---

#[tokio::test]
async fn an_untouched_body_arrives_as_the_bytes_it_came_in() {
    let a = sim("a").await;
    let gateway = Gateway::start(&one_group(&[&a])).await;
    let body = "{ \"seed\" : 123456789012345678901234567890,\r\n\t\"temperature\":1e-0,\"x\\u002dy\":\"\\ud83d\\ude00 \\/ é\",\n \"messages\" : [ { \"content\":\"\\u0048i\\n\" , \"role\":\"user\" } ] , \"model\":\"demo\" }\n";
    let answer = post_chat(gateway.addr, body).await;
    assert_eq!(answer.status, 200);
    assert_eq!(a.records()[0].body, body.as_bytes());
    let length = body.len().to_string();
    assert_eq!(a.records()[0].header("content-length"), Some(length));
}

#[tokio::test]
async fn a_body_is_edited_at_model_max_tokens_and_stream_options_alone() {
    let a = sim("a").await;
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g], rewrite: {{ g: demo }} }}\n",
        group_of("g", "", &[upstream_at("a", &a.url(), "max_tokens: 7")]),
    );
    let gateway = Gateway::start(&yaml).await;
    let before = "{ \"big\":123456789012345678901234567890 , \"model\" : \"\\u0071wen\",\n\"messages\":[{\"role\":\"user\",\"content\":\"\\u0048i\"}], \"max_tokens\" : 900 ,\"stream\": true, \"stream_options\" : {\"x\":1} }";
    let answer = post_chat(gateway.addr, before).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let records = a.records();
    let sent = std::str::from_utf8(&records[0].body).unwrap();
    let json = records[0].json();
    assert_eq!(json["model"], "demo");
    assert_eq!(json["max_tokens"], 7);
    assert_eq!(json["stream_options"]["include_usage"], true);
    assert_eq!(json["stream_options"]["x"], 1);
    for kept in [
        "{ \"big\":123456789012345678901234567890 , \"model\" : ",
        ",\n\"messages\":[{\"role\":\"user\",\"content\":\"\\u0048i\"}], \"max_tokens\" : 7 ,\"stream\": true, \"stream_options\" : {",
    ] {
        assert!(sent.contains(kept), "{kept} not in {sent}");
    }
    // The client asked for no usage, and sees none.
    assert!(!answer.text().contains("\"usage\""), "{}", answer.text());
}

#[tokio::test]
async fn max_tokens_is_capped_per_upstream_and_lower_wishes_are_kept() {
    let a = sim("a").await;
    let upstreams = [upstream_at("a", &a.url(), "max_tokens: 10")];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    let ask = async |extra: &str| {
        let body = chat("demo").replace("}]}", &format!("}}]{extra}}}"));
        assert_eq!(post_chat(gateway.addr, &body).await.status, 200, "{body}");
        a.records().last().unwrap().json()
    };
    assert_eq!(ask("").await["max_tokens"], 10);
    assert_eq!(ask(",\"max_tokens\":5").await["max_tokens"], 5);
    assert_eq!(ask(",\"max_tokens\":11").await["max_tokens"], 10);
    let sent = ask(",\"max_completion_tokens\":99").await;
    assert_eq!(sent["max_completion_tokens"], 10);
    let post = post(
        gateway.addr,
        "/v1/embeddings",
        &[],
        br#"{"model":"demo","input":"x"}"#,
    )
    .await;
    assert_eq!(post.status, 200);
    assert!(a.records().last().unwrap().json()["max_tokens"].is_null());
}

#[tokio::test]
async fn ollama_is_told_max_tokens_in_the_only_spelling_it_understands() {
    let a = sim("a").await;
    let upstreams = [upstream_at("a", &a.url(), "kind: ollama")];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    let body = chat("demo").replace("}]}", "}],\"max_completion_tokens\":3}");
    let answer = post_chat(gateway.addr, &body).await;
    assert_eq!(answer.status, 200);
    assert_eq!(a.records()[0].json()["max_tokens"], 3);
    assert_eq!(answer.content().split(' ').count(), 3);
}

#[tokio::test]
async fn nothing_of_who_the_client_is_reaches_an_upstream_and_the_upstreams_own_does() {
    let a = sim("a").await;
    let keys =
        "key: env:KEY, headers: { x-team: search, x-token: env:TOKEN, openai-organization: ours }";
    let upstreams = [upstream_at("a", &a.url(), keys)];
    let env = [("KEY", "upstream-key"), ("TOKEN", "upstream-token")];
    let gateway = Gateway::start_with(&group_with("", &upstreams), &[], &env).await;
    let headers = [
        ("authorization", "Bearer canary"),
        ("x-api-key", "canary"),
        ("api-key", "canary"),
        ("cookie", "session=canary"),
        ("x-forwarded-for", "203.0.113.7"),
        ("x-real-ip", "203.0.113.7"),
        ("forwarded", "for=203.0.113.7"),
        ("via", "1.1 canary"),
        ("user-agent", "canary/1"),
        ("referer", "http://canary/"),
        ("origin", "http://canary"),
        ("openai-organization", "canary"),
        ("openai-project", "canary"),
        ("x-stainless-os", "canary"),
        ("proxy-authorization", "Basic canary"),
        ("x-sim", "status=500"),
        ("x-team", "canary"),
        ("accept-encoding", "gzip"),
        ("connection", "x-canary"),
        ("x-canary", "canary"),
        ("x-request-id", "my-id-1"),
    ];
    let answer = post(
        gateway.addr,
        "/v1/chat/completions",
        &headers,
        chat("demo").as_bytes(),
    )
    .await;
    assert_eq!(answer.status, 200);
    let record = a.records().remove(0);
    let head = String::from_utf8(record.head.to_vec()).unwrap();
    assert!(
        !head.contains("canary") && !head.contains("203.0.113.7"),
        "{head}"
    );
    for (name, value) in [
        ("authorization", "Bearer upstream-key"),
        ("x-team", "search"),
        ("x-token", "upstream-token"),
        ("openai-organization", "ours"),
        ("accept-encoding", "identity"),
        ("content-type", "application/json"),
        ("x-request-id", "my-id-1"),
        ("host", &a.addr().to_string()),
    ] {
        assert_eq!(record.header(name).as_deref(), Some(value), "{head}");
        let times = record
            .headers()
            .iter()
            .filter(|(field, _)| field.eq_ignore_ascii_case(name))
            .count();
        assert_eq!(times, 1, "{name} in {head}");
    }
    assert!(!gateway.log().contains("upstream-key"));
}

#[tokio::test]
async fn accounts_on_one_host_stay_distinct_with_their_paths_and_keys() {
    let cloud = sim("cloud").await;
    let at = |account: &str| format!("http://{}/client/v4/accounts/{account}/ai/v1", cloud.addr());
    let upstreams = [
        upstream_at("account-1", &at("acc1"), "key: env:ONE"),
        upstream_at("account-2", &at("acc2"), "key: env:TWO"),
    ];
    let env = [("ONE", "key-one"), ("TWO", "key-two")];
    let gateway = Gateway::start_with(&group_with("", &upstreams), &[], &env).await;
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    let mut connections: HashMap<u64, String> = HashMap::new();
    for record in cloud.records() {
        let key = record.header("authorization").unwrap();
        let account = if key == "Bearer key-one" {
            "acc1"
        } else {
            "acc2"
        };
        assert_eq!(
            record.target(),
            format!("/client/v4/accounts/{account}/ai/v1/chat/completions")
        );
        // One connection is never used for two accounts.
        assert_eq!(
            connections
                .entry(record.connection)
                .or_insert_with(|| key.clone()),
            &key
        );
    }
    assert_eq!(connections.len(), 2);
}

#[tokio::test]
async fn an_upstream_may_be_named_localhost_and_a_query_is_not_invented() {
    let a = sim("a").await;
    let url = format!("http://localhost:{}/v1/", a.addr().port());
    let gateway = Gateway::start(&group_with("", &[upstream_at("a", &url, "")])).await;
    let path = "/v1/chat/completions?api-version=1";
    let answer = post(gateway.addr, path, &[], chat("demo").as_bytes()).await;
    assert_eq!(answer.status, 200);
    assert_eq!(a.records()[0].target(), "/v1/chat/completions");
    let host = format!("localhost:{}", a.addr().port());
    assert_eq!(a.records()[0].header("host"), Some(host));
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_a_failed_upstream_and_no_reason_not_to_start() {
    let b = sim("b").await;
    let upstreams = [
        upstream_at(
            "nowhere",
            "http://no-such-host.invalid:8000/v1",
            "timeouts: { connect: 1s }",
        ),
        upstream_at("b", &b.url(), ""),
    ];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    for _ in 0..2 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!((answer.status, answer.upstream()), (200, "b"));
    }
    let alone = Gateway::start(&group_with("", &upstreams[..1])).await;
    let answer = post_chat(alone.addr, &chat("demo")).await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (503, "upstream_unavailable")
    );
    assert!(!answer.text().contains("no-such-host"));
}

#[tokio::test]
async fn an_optional_upstream_without_its_variable_is_off() {
    let (a, b) = (sim("a").await, sim("b").await);
    let upstreams = [
        upstream_at("a", &a.url(), "optional: true, key: env:FOREBAY_TEST_UNSET"),
        upstream_at("b", &b.url(), ""),
    ];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    assert!(
        gateway.log().contains("FOREBAY_TEST_UNSET"),
        "{}",
        gateway.log()
    );
    for _ in 0..3 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    }
    // Not even when it is asked for by name, and nobody takes its place.
    let pin = [("x-forebay-upstream", "a")];
    let answer = post(
        gateway.addr,
        "/v1/chat/completions",
        &pin,
        chat("demo").as_bytes(),
    )
    .await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (503, "upstream_unavailable")
    );
    // Not even when nothing else is left.
    b.stop().await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.status, 503);
    assert_eq!((asked(&a), asked(&b)), (0, 3));
}

// --- pins and locality ---

#[tokio::test]
async fn a_pinned_request_is_served_there_only() {
    let (a, b, last) = (sim("a").await, sim("b").await, sim("last").await);
    let gateway = Gateway::start(&with_fallback(&[&a, &b], &last)).await;
    let pinned = async |name: &str, body: &str| {
        let headers = [("x-forebay-upstream", name)];
        post(
            gateway.addr,
            "/v1/chat/completions",
            &headers,
            body.as_bytes(),
        )
        .await
    };
    for _ in 0..4 {
        let answer = pinned("b", &chat("demo")).await;
        assert_eq!((answer.status, answer.upstream()), (200, "b"));
    }
    // The fallback too, and then it is none.
    let answer = pinned("last", &chat("demo")).await;
    assert_eq!(
        (answer.upstream(), answer.header("x-forebay-fallback")),
        ("last", Some("0"))
    );

    for (fault, status) in [
        ("status=503", 502),
        ("status=500", 502),
        ("status=401", 502),
        ("status=429", 429),
        ("reset", 502),
    ] {
        b.fault(fault).await.unwrap();
        for body in [chat("demo"), chat_stream("demo")] {
            let answer = pinned("b", &body).await;
            assert_eq!(answer.status, status, "{fault}");
            answer.error_code();
        }
    }
    b.clear_faults().await;
    b.stop().await;
    for _ in 0..2 {
        let answer = pinned("b", &chat("demo")).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (503, "upstream_unavailable")
        );
    }
    assert_eq!((asked(&a), asked(&last)), (0, 1));

    for name in ["c", "B", "gpus"] {
        let answer = pinned(name, &chat("demo")).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (400, "unknown_upstream")
        );
    }
    assert_eq!(pinned("", &chat("demo")).await.status, 400);
}

#[tokio::test]
async fn what_must_stay_local_never_leaves_and_without_local_upstreams_is_403() {
    let (cloud, gpu) = (sim("cloud").await, sim("gpu").await);
    let yaml = format!(
        "groups:\n{}{}routes:\n\
         \x20 - {{ model: both, groups: [cloud, gpus], rewrite: {{ cloud: demo, gpus: demo }} }}\n\
         \x20 - {{ model: private, groups: [gpus, cloud], local: true, rewrite: {{ cloud: demo, gpus: demo }} }}\n\
         \x20 - {{ model: away, groups: [cloud], rewrite: {{ cloud: demo }} }}\n\
         \x20 - {{ model: last, groups: [gpus], fallback: cloud, rewrite: {{ cloud: demo, gpus: demo }} }}\n",
        group_of("cloud", "", &[upstream_at("cloud", &cloud.url(), "")]),
        group_of("gpus", "local: true", &[upstream_at("gpu", &gpu.url(), "")]),
    );
    let gateway = Gateway::start(&yaml).await;
    let local = async |model: &str, value: &str| {
        let headers = [("x-forebay-local", value)];
        post(
            gateway.addr,
            "/v1/chat/completions",
            &headers,
            chat(model).as_bytes(),
        )
        .await
    };
    assert_eq!(local("both", "1").await.upstream(), "gpu");
    assert_eq!(local("both", "true").await.upstream(), "gpu");
    assert_eq!(
        post_chat(gateway.addr, &chat("private")).await.upstream(),
        "gpu"
    );
    // A route's own `local` is not lifted by the client.
    assert_eq!(local("private", "0").await.upstream(), "gpu");
    let answer = local("away", "1").await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (403, "no_local_upstream")
    );
    assert_eq!(local("both", "maybe").await.status, 400);
    let headers = [("x-forebay-local", "1"), ("x-forebay-upstream", "cloud")];
    let answer = post(
        gateway.addr,
        "/v1/chat/completions",
        &headers,
        chat("both").as_bytes(),
    )
    .await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (400, "unknown_upstream")
    );

    // Failover and fallback do not override it.
    gpu.stop().await;
    for _ in 0..2 {
        for model in ["both", "last", "private"] {
            let answer = local(model, "1").await;
            assert_eq!(
                (answer.status, answer.error_code().as_str()),
                (503, "upstream_unavailable")
            );
        }
    }
    assert_eq!(asked(&cloud), 0);
    // It is the restriction that kept it away.
    assert_eq!(local("both", "0").await.upstream(), "cloud");
    assert_eq!(
        post_chat(gateway.addr, &chat("last")).await.upstream(),
        "cloud"
    );
}

// --- slots ---

#[tokio::test]
async fn an_upstream_with_one_slot_gets_one_request_at_a_time_and_all_are_served() {
    let a = sim("a").await;
    a.fault("header_delay=20").await.unwrap();
    let upstreams = [upstream_at("a", &a.url(), "concurrent: 1")];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    let bodies: Vec<String> = (0..8)
        .map(|nth| {
            if nth % 2 == 0 {
                chat("demo")
            } else {
                chat_stream("demo")
            }
        })
        .collect();
    let answers = join_all(bodies.iter().map(|body| post_chat(gateway.addr, body))).await;
    assert!(answers.iter().all(|answer| answer.status == 200));
    let records = a.records();
    assert_eq!(records.len(), 8);
    for pair in records.windows(2) {
        let ended = pair[0].at + pair[0].ended_after.unwrap();
        assert!(
            pair[1].at >= ended,
            "{:?} began before {ended:?}",
            pair[1].at
        );
    }
}

#[tokio::test]
async fn who_leaves_while_waiting_for_a_slot_never_reaches_the_upstream() {
    let a = sim("a").await;
    a.fault("hang;times=1").await.unwrap();
    let upstreams = [upstream_at("a", &a.url(), "concurrent: 1")];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    let path = "/v1/chat/completions";
    let mut first = Connection::open(gateway.addr).await;
    first
        .request("POST", path, &[], chat("demo").as_bytes())
        .await;
    eventually("the first has the slot", || async { asked(&a) == 1 }).await;
    let mut second = Connection::open(gateway.addr).await;
    second
        .request(
            "POST",
            path,
            &[("x-request-id", "the-second")],
            chat("demo").as_bytes(),
        )
        .await;
    let mut third = Connection::open(gateway.addr).await;
    third
        .request(
            "POST",
            path,
            &[("x-request-id", "the-third")],
            chat("demo").as_bytes(),
        )
        .await;
    gateway
        .metric_becomes("forebay_requests_in_flight", 3.0)
        .await;
    drop(second);
    gateway
        .metric_becomes("forebay_requests_in_flight", 2.0)
        .await;
    drop(first);
    assert_eq!(third.answer().await.status, 200);
    let ids: Vec<_> = a
        .records()
        .iter()
        .filter_map(|record| record.header("x-request-id"))
        .collect();
    assert_eq!(ids.len(), 2);
    assert_eq!(ids[1], "the-third");
}

/// A request of this client for this model, on its way.
async fn asking(gateway: &Gateway, model: &str) -> Connection {
    let mut connection = Connection::open(gateway.addr).await;
    let body = chat(model);
    connection
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    connection
}

#[tokio::test]
async fn a_freed_slot_wakes_who_can_use_it_and_not_who_waited_longer_for_another() {
    // Who is not woken looks again once a second.
    const WOKEN: Duration = Duration::from_millis(500);
    let serving = async |name: &str| {
        let mut options = SimOptions::quick(name);
        options.models = vec![format!("demo-{name}")];
        Sim::start(options).await.unwrap()
    };
    let (a, b) = (serving("a").await, serving("b").await);
    let upstreams = [
        upstream_at("a", &a.url(), "models: [demo-a], concurrent: 1"),
        upstream_at("b", &b.url(), "models: [demo-b], concurrent: 1"),
    ];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    let in_flight = "forebay_requests_in_flight";
    for (kept, freed) in [(&a, &b), (&b, &a)] {
        let mut quickest = Duration::MAX;
        // A busy machine may be slow, but not every time.
        for _ in 0..3 {
            for sim in [kept, freed] {
                sim.clear_records();
                sim.fault("hang;times=1").await.unwrap();
            }
            let [to_keep, to_free] = [kept, freed].map(|sim| format!("demo-{}", sim.name()));
            let keeper = asking(&gateway, &to_keep).await;
            let holder = asking(&gateway, &to_free).await;
            eventually("both are held", || async {
                (asked(kept), asked(freed)) == (1, 1)
            })
            .await;
            let mut others = Vec::new();
            for _ in 0..3 {
                others.push(asking(&gateway, &to_keep).await);
            }
            gateway.metric_becomes(in_flight, 5.0).await;
            let mut waiting = asking(&gateway, &to_free).await;
            gateway.metric_becomes(in_flight, 6.0).await;

            let since = Instant::now();
            holder.reset();
            let answer = waiting.answer().await;
            quickest = quickest.min(since.elapsed());
            assert_eq!((answer.status, answer.upstream()), (200, freed.name()));
            assert_eq!(asked(kept), 1, "the others wait on");

            keeper.reset();
            for mut other in others {
                let answer = other.answer().await;
                assert_eq!((answer.status, answer.upstream()), (200, kept.name()));
            }
            gateway.metric_becomes(in_flight, 0.0).await;
        }
        assert!(quickest < WOKEN, "{}: after {quickest:?}", freed.name());
    }
}

#[tokio::test]
async fn the_busy_are_passed_over_for_the_free() {
    let (a, b) = (sim("a").await, sim("b").await);
    a.fault("hang").await.unwrap();
    let upstreams = [
        upstream_at("a", &a.url(), "concurrent: 1"),
        upstream_at("b", &b.url(), ""),
    ];
    let gateway = Gateway::start(&group_with("", &upstreams)).await;
    let mut first = Connection::open(gateway.addr).await;
    first
        .request("POST", "/v1/chat/completions", &[], chat("demo").as_bytes())
        .await;
    eventually("a is busy", || async { asked(&a) == 1 }).await;
    for _ in 0..4 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(
            (answer.upstream(), answer.header("x-forebay-attempts")),
            ("b", Some("1"))
        );
    }
}

// --- what never reaches an upstream ---

#[tokio::test]
async fn what_is_not_on_the_list_never_reaches_an_upstream() {
    let upstream = Scripted::always(json(200, r#"{"choices":[]}"#)).await;
    let gateway = Gateway::start(&group_with("", &[upstream_at("up", &upstream.url(), "")])).await;
    for (method, path) in [
        ("POST", "/v1/files"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/chat/completions"),
        ("POST", "/v1/models"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models/demo"),
        ("GET", "/metrics"),
        ("POST", "/reload"),
    ] {
        let answer = ask(gateway.addr, method, path, &[], chat("demo").as_bytes()).await;
        assert!(
            matches!(answer.status, 404 | 405),
            "{method} {path}: {}",
            answer.status
        );
        answer.error_code();
    }
    assert_eq!(upstream.requests().len(), 0);
}
