//! What an operator sees: request ids, headers, metrics, the admin listener,
//! the log.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    process::{Command, Stdio},
};

use crate::support::{
    Connection, Gateway, chat, chat_stream, eventually,
    gateway::free_port,
    http::{ask, get, post, post_chat},
    one_group, sim, with_fallback,
};

/// One scrape.
struct Scrape(Vec<(String, BTreeMap<String, String>, f64)>);

impl Scrape {
    async fn of(gateway: &Gateway) -> Self {
        let answer = get(gateway.admin, "/metrics").await;
        assert_eq!(answer.status, 200);
        let samples = answer.text().lines().filter(|line| !line.starts_with('#'));
        Self(samples.map(sample).collect())
    }

    /// The sum over all series of a family whose labels include these.
    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.0
            .iter()
            .filter(|(family, all, _)| {
                family == name
                    && labels
                        .iter()
                        .all(|(key, value)| all.get(*key).is_some_and(|v| v == value))
            })
            .map(|(_, _, value)| value)
            .sum()
    }

    fn values_of(&self, label: &str) -> BTreeSet<&str> {
        self.0
            .iter()
            .filter_map(|(_, all, _)| all.get(label))
            .map(String::as_str)
            .collect()
    }
}

fn sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let mut pairs = BTreeMap::new();
    let mut rest = labels.strip_suffix('}').unwrap();
    while let Some((key, after)) = rest.split_once("=\"") {
        let (value, after) = after.split_once('"').unwrap();
        pairs.insert(key.to_owned(), value.to_owned());
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    (name.to_owned(), pairs, value.parse().unwrap())
}

async fn recorded(gateway: &Gateway, requests: f64) -> Scrape {
    eventually(&format!("{requests} requests are recorded"), async || {
        Scrape::of(gateway).await.sum("forebay_requests_total", &[]) >= requests
    })
    .await;
    let scrape = Scrape::of(gateway).await;
    assert_eq!(scrape.sum("forebay_requests_total", &[]), requests);
    scrape
}

/// The access lines of a text log.
fn access_lines(log: &str) -> Vec<String> {
    let lines = log.lines().filter(|line| line.contains("forebay::access"));
    lines.map(str::to_owned).collect()
}

#[tokio::test]
async fn a_sane_request_id_is_kept_and_any_other_is_replaced() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let body = chat("demo");
    let long = "a".repeat(500);
    for (sent, kept) in [
        ("my-id_1.2:3", true),
        ("two words", false),
        ("<script>", false),
        (long.as_str(), false),
    ] {
        let headers = [("x-request-id", sent)];
        let answer = post(
            gateway.addr,
            "/v1/chat/completions",
            &headers,
            body.as_bytes(),
        )
        .await;
        let told = answer.header("x-request-id").unwrap();
        assert_eq!(told == sent, kept, "{sent:?} became {told:?}");
        let record = gpu.records().pop().unwrap();
        assert_eq!(record.header("x-request-id").as_deref(), Some(told));
    }
    let unknown = get(gateway.addr, "/nowhere").await;
    let other = get(gateway.addr, "/nowhere").await;
    assert_eq!(unknown.status, 404);
    assert!(unknown.header("x-request-id").unwrap().len() > 16);
    assert_ne!(unknown.header("x-request-id"), other.header("x-request-id"));
}

#[tokio::test]
async fn an_answer_says_who_gave_it() {
    let (gpu, ollama) = (sim("gpu-1").await, sim("ollama").await);
    let gateway = Gateway::start(&with_fallback(&[&gpu], &ollama)).await;
    let said = async |body: &str| {
        let answer = post_chat(gateway.addr, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        ["upstream", "group", "attempts", "fallback"].map(|name| {
            answer
                .header(&format!("x-forebay-{name}"))
                .unwrap()
                .to_owned()
        })
    };
    assert_eq!(said(&chat("demo")).await, ["gpu-1", "gpus", "1", "0"]);
    assert_eq!(
        said(&chat_stream("demo")).await,
        ["gpu-1", "gpus", "1", "0"]
    );
    gpu.fault("status=503").await.unwrap();
    assert_eq!(said(&chat("demo")).await, ["ollama", "ollama", "2", "1"]);
}

#[tokio::test]
async fn what_is_not_known_with_the_head_comes_as_a_comment() {
    let gpu = sim("gpu-1").await;
    gpu.fault("first_token=500").await.unwrap();
    let yaml = format!("limits: {{ heartbeat: 100ms }}\n{}", one_group(&[&gpu]));
    let gateway = Gateway::start(&yaml).await;
    let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_eq!(answer.header("x-forebay-upstream"), None);
    assert!(answer.header("x-request-id").is_some());
    let comments: Vec<_> = answer
        .text()
        .lines()
        .filter_map(|line| line.strip_prefix(": forebay "))
        .collect();
    let [comment] = comments[..] else {
        panic!("{comments:?}");
    };
    let said: serde_json::Value = serde_json::from_str(comment).unwrap();
    let wanted = serde_json::json!({
        "upstream": "gpu-1", "group": "gpus", "attempts": 1, "fallback": false
    });
    assert_eq!(said, wanted);
    let after = answer.text().split_once(comment).unwrap().1.trim();
    assert_eq!(after, "data: [DONE]");
}

#[tokio::test]
async fn metrics_tell_what_happened() {
    let (gpu, ollama) = (sim("gpu-1").await, sim("ollama").await);
    let yaml = with_fallback(&[&gpu], &ollama);
    let gateway = Gateway::start(&yaml).await;
    let at = gateway.addr;
    let usage = |body: &serde_json::Value| {
        ["prompt_tokens", "completion_tokens"].map(|name| body["usage"][name].as_f64().unwrap())
    };

    let whole = post_chat(at, &chat("demo")).await;
    let [tokens_in, tokens_out] = usage(&whole.json());
    assert!(tokens_in > 0.0 && tokens_out > 0.0);
    assert_eq!(post_chat(at, &chat_stream("demo")).await.status, 200);
    assert_eq!(get(at, "/nowhere").await.status, 404);
    assert_eq!(post_chat(at, "{").await.status, 400);
    gpu.fault("status=500;times=1").await.unwrap();
    assert_eq!(post_chat(at, &chat("demo")).await.upstream(), "ollama");

    let scrape = recorded(&gateway, 5.0).await;
    let sum = |name, labels: &[_]| scrape.sum(name, labels);
    let requests = "forebay_requests_total";
    let chats = ("endpoint", "chat_completions");
    assert_eq!(
        sum(
            requests,
            &[chats, ("outcome", "success"), ("status", "200")]
        ),
        3.0
    );
    assert_eq!(
        sum(requests, &[chats, ("outcome", "success"), ("route", "*")]),
        3.0
    );
    assert_eq!(
        sum(requests, &[("outcome", "client_error"), ("status", "404")]),
        1.0
    );
    assert_eq!(
        sum(
            requests,
            &[chats, ("outcome", "client_error"), ("status", "400")]
        ),
        1.0
    );
    assert_eq!(sum("forebay_errors_total", &[("code", "unknown_url")]), 1.0);
    assert_eq!(sum("forebay_errors_total", &[]), 2.0);
    let tries = "forebay_attempts_total";
    let (at_gpu, at_ollama) = (("upstream", "gpu-1"), ("upstream", "ollama"));
    assert_eq!(
        sum(tries, &[at_gpu, ("verdict", "answered"), ("group", "gpus")]),
        2.0
    );
    assert_eq!(sum(tries, &[at_gpu, ("verdict", "failed")]), 1.0);
    assert_eq!(sum(tries, &[at_ollama, ("verdict", "answered")]), 1.0);
    assert_eq!(sum(tries, &[]), 4.0);
    assert_eq!(
        sum(
            "forebay_failovers_total",
            &[("from", "gpu-1"), ("to", "ollama")]
        ),
        1.0
    );
    assert_eq!(sum("forebay_failovers_total", &[]), 1.0);
    assert_eq!(sum("forebay_attempts_maybe_billed_total", &[at_gpu]), 1.0);
    // The stream counts too: its usage was asked for, although the client did
    // not ask.
    let tokens = "forebay_tokens_total";
    assert_eq!(sum(tokens, &[at_gpu, ("direction", "in")]), 2.0 * tokens_in);
    assert_eq!(
        sum(tokens, &[at_gpu, ("direction", "out")]),
        2.0 * tokens_out
    );
    assert_eq!(sum(tokens, &[at_ollama, ("direction", "out")]), tokens_out);
    assert_eq!(sum("forebay_first_token_seconds_count", &[at_gpu]), 2.0);
    assert_eq!(sum("forebay_first_token_seconds_count", &[at_ollama]), 1.0);
    assert_eq!(sum("forebay_request_seconds_count", &[]), 5.0);
    assert_eq!(sum("forebay_request_seconds_count", &[chats]), 4.0);
    assert_eq!(sum("forebay_requests_in_flight", &[]), 0.0);
    assert_eq!(sum("forebay_upstream_requests_in_flight", &[]), 0.0);
    assert_eq!(
        sum(
            "forebay_build_info",
            &[("version", env!("CARGO_PKG_VERSION"))]
        ),
        1.0
    );
    assert_eq!(sum("forebay_config_last_reload_successful", &[]), 1.0);
    assert!(sum("forebay_body_bytes_total", &[("direction", "in")]) > 0.0);
    assert!(sum("forebay_body_bytes_total", &[("direction", "out")]) > 0.0);
    for (name, ready) in [("gpu-1", 1.0), ("ollama", 1.0)] {
        let state = [("upstream", name), ("state", "ready")];
        assert_eq!(sum("forebay_upstream_state", &state), ready);
    }

    gpu.stop().await;
    assert_eq!(post_chat(at, &chat("demo")).await.upstream(), "ollama");
    ollama.stop().await;
    let nobody = post_chat(at, &chat("demo")).await;
    assert_eq!(nobody.status, 503, "{}", nobody.text());
    let scrape = recorded(&gateway, 7.0).await;
    for name in ["gpu-1", "ollama"] {
        for (state, value) in [
            ("ready", 0.0),
            ("down", 1.0),
            ("cooling", 0.0),
            ("off", 0.0),
        ] {
            let labels = [("upstream", name), ("state", state)];
            assert_eq!(
                scrape.sum("forebay_upstream_state", &labels),
                value,
                "{labels:?}"
            );
        }
    }
    assert!(scrape.sum(tries, &[at_gpu, ("verdict", "not_sent")]) >= 1.0);
    assert_eq!(
        scrape.sum(requests, &[("outcome", "server_error"), ("status", "503")]),
        1.0
    );
    assert_eq!(
        scrape.sum("forebay_errors_total", &[("code", &nobody.error_code())]),
        1.0
    );
}

#[tokio::test]
async fn metrics_tell_of_reloads_and_of_the_configuration_that_is_live() {
    let gpu = sim("gpu-1").await;
    let yaml = one_group(&[&gpu]);
    let gateway = Gateway::start(&yaml).await;
    let hash_of = |scrape: &Scrape| {
        let hashes: Vec<_> = scrape
            .values_of("hash")
            .into_iter()
            .map(str::to_owned)
            .collect();
        assert_eq!(hashes.len(), 1, "{hashes:?}");
        hashes[0].clone()
    };
    let first = hash_of(&Scrape::of(&gateway).await);
    gateway.write_config(&format!("{yaml}# another\n"));
    assert_eq!(gateway.reload().await.status, 200);
    let scrape = Scrape::of(&gateway).await;
    let second = hash_of(&scrape);
    assert_ne!(first, second);
    let health = get(gateway.admin, "/health").await.json();
    assert!(
        health["config"]["hash"]
            .as_str()
            .unwrap()
            .starts_with(&second)
    );
    let reloads = "forebay_config_reloads_total";
    assert_eq!(scrape.sum(reloads, &[("result", "success")]), 1.0);
    assert!(scrape.sum("forebay_config_loaded_timestamp_seconds", &[]) > 1.7e9);

    gateway.write_config("routes: 7\n");
    assert_eq!(gateway.reload().await.status, 422);
    let scrape = Scrape::of(&gateway).await;
    assert_eq!(hash_of(&scrape), second);
    assert!(scrape.sum(reloads, &[("result", "failure")]) >= 1.0);
    assert_eq!(
        scrape.sum("forebay_config_last_reload_successful", &[]),
        0.0
    );
}

#[tokio::test]
async fn requests_in_flight_are_counted_while_they_are() {
    let gpu = sim("gpu-1").await;
    gpu.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let mut connection = Connection::open(gateway.addr).await;
    connection
        .request("POST", "/v1/chat/completions", &[], chat("demo").as_bytes())
        .await;
    gateway
        .metric_becomes("forebay_requests_in_flight", 1.0)
        .await;
    gateway
        .metric_becomes(
            "forebay_upstream_requests_in_flight{group=\"gpus\",upstream=\"gpu-1\"}",
            1.0,
        )
        .await;
    connection.reset();
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
    gateway
        .metric_becomes("forebay_client_closed_total", 1.0)
        .await;
    let scrape = recorded(&gateway, 1.0).await;
    let left = [("outcome", "client_closed"), ("status", "499")];
    assert_eq!(scrape.sum("forebay_requests_total", &left), 1.0);
    assert_eq!(scrape.sum("forebay_upstream_requests_in_flight", &[]), 0.0);
}

#[tokio::test]
async fn nothing_that_a_client_sends_becomes_a_series() {
    let gpu = sim("gpu-1").await;
    let yaml = one_group(&[&gpu]).replace("kind: vllm", "kind: vllm, models: [\"demo*\"]");
    let gateway = Gateway::start(&yaml).await;
    let odd = async |from: usize, to: usize| {
        for n in from..to {
            let id = format!("odd-id-{n}");
            let pin = format!("odd-pin-{n}");
            let path = format!("/odd/path-{n}?odd={n}");
            let model = format!("odd-model-{n}");
            let matching = format!("demo-odd-{n}");
            let key = format!("Bearer odd-key-{n}");
            let headers = [
                ("x-request-id", id.as_str()),
                ("authorization", key.as_str()),
            ];
            let pinned = [("x-forebay-upstream", pin.as_str())];
            ask(gateway.addr, "GET", &path, &headers, b"").await;
            ask(gateway.addr, &format!("ODD{n}"), "/v1/models", &[], b"").await;
            ask(
                gateway.addr,
                "GET",
                &format!("/v1/models/odd-{n}"),
                &[],
                b"",
            )
            .await;
            let chats = "/v1/chat/completions";
            post(gateway.addr, chats, &headers, chat(&model).as_bytes()).await;
            post(gateway.addr, chats, &headers, chat(&matching).as_bytes()).await;
            post(gateway.addr, chats, &pinned, chat("demo").as_bytes()).await;
        }
    };
    // Twice: the second time finds a connection in the pool.
    odd(0, 2).await;
    let before = recorded(&gateway, 12.0).await;
    odd(2, 52).await;
    let after = recorded(&gateway, 312.0).await;
    let series = |scrape: Scrape| -> BTreeSet<_> {
        scrape
            .0
            .into_iter()
            .map(|(name, labels, _)| (name, labels))
            .collect()
    };
    assert_eq!(series(before), series(after));
    let text = get(gateway.admin, "/metrics").await;
    assert!(!text.text().contains("odd"), "{}", text.text());
}

#[tokio::test]
async fn an_upstream_cannot_make_series_either() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for (index, fault) in ["openai", "vllm", "ollama", "quota", "detail", "html"]
        .iter()
        .enumerate()
    {
        gpu.fault(&format!("status=422;body={fault}"))
            .await
            .unwrap();
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert!(answer.status >= 400);
        recorded(&gateway, index as f64 + 1.0).await;
    }
    let scrape = Scrape::of(&gateway).await;
    for code in scrape.values_of("code") {
        assert!(!code.contains(' ') && code.len() < 40, "{code}");
    }
    assert!(scrape.sum("forebay_errors_total", &[("code", "from_upstream")]) >= 1.0);
}

#[tokio::test]
async fn the_metrics_are_as_prometheus_wants_them() {
    let (gpu, ollama) = (sim("gpu-1").await, sim("ollama").await);
    let gateway = Gateway::start(&with_fallback(&[&gpu], &ollama)).await;
    gpu.fault("status=500;times=1").await.unwrap();
    for body in [chat("demo"), chat_stream("demo"), "{".to_owned()] {
        post_chat(gateway.addr, &body).await;
    }
    gateway.reload().await;
    recorded(&gateway, 3.0).await;
    let answer = get(gateway.admin, "/metrics").await;
    assert!(
        answer
            .header("content-type")
            .unwrap()
            .starts_with("text/plain; version=0.0.4")
    );
    check_exposition(answer.text());
    check_with_promtool(answer.text());
}

/// What `promtool check metrics` looks for, as far as it concerns us.
fn check_exposition(text: &str) {
    let (mut families, mut series) = (BTreeSet::new(), BTreeSet::new());
    let (mut family, mut kind, mut helped) = ("", "", "");
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            helped = help.split_once(' ').unwrap().0;
        } else if let Some(declared) = line.strip_prefix("# TYPE ") {
            (family, kind) = declared.split_once(' ').unwrap();
            assert_eq!(helped, family, "no help");
            assert!(families.insert(family), "{family} is there twice");
            assert!(family.starts_with("forebay_"), "{family}");
            assert_eq!(
                kind == "counter",
                family.ends_with("_total"),
                "{family} {kind}"
            );
        } else {
            let (name, labels, value) = sample(line);
            let suffix = name.strip_prefix(family).unwrap();
            let fits = match kind {
                "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
                _ => suffix.is_empty(),
            };
            assert!(fits, "{name} under {family}");
            assert!(value.is_finite() && value >= 0.0, "{line}");
            assert!(series.insert((name, labels)), "twice: {line}");
        }
    }
    assert!(families.len() > 15, "{families:?}");
}

/// Asks the real tool where it is installed; `FOREBAY_PROMTOOL` may name it.
fn check_with_promtool(text: &str) {
    let tool = std::env::var_os("FOREBAY_PROMTOOL").unwrap_or_else(|| "promtool".into());
    let started = Command::new(tool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut tool) = started else {
        return;
    };
    tool.stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = tool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}

#[tokio::test]
async fn the_admin_listener_has_three_doors_and_the_data_listener_none_of_them() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for (method, path, status) in [
        ("GET", "/metrics", 200),
        ("GET", "/health", 200),
        ("POST", "/reload", 200),
        ("GET", "/v1/models", 404),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/metrics/", 404),
        ("GET", "//metrics", 404),
        ("GET", "/config", 404),
    ] {
        let answer = ask(gateway.admin, method, path, &[], b"").await;
        assert_eq!(answer.status, status, "{method} {path}");
    }
    assert_eq!(get(gateway.admin, "/reload").await.status / 100, 4);
    for (method, path) in [
        ("GET", "/metrics"),
        ("POST", "/metrics"),
        ("POST", "/reload"),
    ] {
        let answer = ask(gateway.addr, method, path, &[], b"").await;
        assert_eq!(answer.status, 404, "{method} {path}");
        assert!(!answer.text().contains("forebay_"));
    }
    let reloads = "forebay_config_reloads_total{result=\"success\"}";
    assert_eq!(gateway.metric(reloads).await, Some(1.0));
    assert!(gpu.records().is_empty());
}

#[tokio::test]
async fn with_an_admin_key_nothing_is_answered_without_it() {
    let gpu = sim("gpu-1").await;
    let admin = free_port();
    let yaml = format!(
        "admin: {{ listen: \"{admin}\", key: env:ADMIN_KEY }}\n{}",
        one_group(&[&gpu])
    );
    let env = [("ADMIN_KEY", "the-admin-key")];
    let gateway = Gateway::start_with(&yaml, &[], &env).await;
    let mut bodies = BTreeSet::new();
    for (method, path) in [
        ("GET", "/metrics"),
        ("GET", "/health"),
        ("POST", "/reload"),
        ("GET", "/"),
        ("GET", "/nowhere"),
    ] {
        for key in [
            "",
            "Bearer",
            "Bearer wrong",
            "Bearer the-admin-ke",
            "the-admin-key",
        ] {
            let headers = [("authorization", key)];
            let answer = ask(
                admin,
                method,
                path,
                &headers[usize::from(key.is_empty())..],
                b"",
            )
            .await;
            assert_eq!(answer.status, 401, "{method} {path} {key:?}");
            bodies.insert(answer.text().to_owned());
        }
        let headers = [("authorization", "Bearer the-admin-key")];
        let answer = ask(admin, method, path, &headers, b"").await;
        assert_eq!(
            answer.status,
            if path == "/nowhere" { 404 } else { 200 },
            "{path}"
        );
        assert!(!answer.text().contains("the-admin-key"));
    }
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert!(!gateway.log().contains("the-admin-key"));
}

#[tokio::test]
async fn a_page_of_another_site_gets_nothing_from_the_admin_listener() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for (origin, status) in [
        ("http://evil.example", 403),
        ("null", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost", 200),
    ] {
        let headers = [("origin", origin)];
        let answer = ask(gateway.admin, "POST", "/reload", &headers, b"").await;
        assert_eq!(answer.status, status, "{origin}");
    }
    let reloads = "forebay_config_reloads_total{result=\"success\"}";
    assert_eq!(gateway.metric(reloads).await, Some(1.0));
}

#[tokio::test]
async fn a_foreign_name_that_points_here_gets_nothing_from_the_admin_listener() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for (host, status) in [
        ("rebound.example:7071", 403),
        ("127.0.0.1.example", 403),
        ("localhost:7071", 200),
        ("[::1]:7071", 200),
    ] {
        let mut connection = Connection::open(gateway.admin).await;
        let request = format!("GET /health HTTP/1.1\r\nhost: {host}\r\n\r\n");
        connection.send(request.as_bytes()).await;
        assert_eq!(connection.answer().await.status, status, "{host}");
    }
}

/// One request of each kind; returns how many there were.
async fn one_of_each_kind(gateway: &Gateway, gpu: &forebay::sim::Sim) -> usize {
    let at = gateway.addr;
    let secret = r#"{"model":"demo","messages":[{"role":"user","content":"a-secret-prompt"}]}"#;
    let stream = secret.replacen('{', r#"{"stream":true,"#, 1);
    assert_eq!(post_chat(at, secret).await.status, 200);
    assert_eq!(post_chat(at, &stream).await.status, 200);
    assert_eq!(get(at, "/v1/models").await.status, 200);
    assert_eq!(get(at, "/nowhere?a-secret-query").await.status, 404);
    assert_eq!(post_chat(at, "{ a-secret-prompt").await.status, 400);
    let ask_for = |model: &str| chat("demo").replacen("demo", model, 1);
    assert_eq!(
        post_chat(at, &ask_for(r"a\n2026 INFO forged\u001b[31m"))
            .await
            .status,
        400
    );
    assert_eq!(
        post_chat(at, &ask_for(r#"a\" status=200 \u202e\u2028"#))
            .await
            .status,
        404
    );
    assert_eq!(
        get(at, "/\"status=200\"/\u{202e}\u{2028}").await.status,
        404
    );
    gpu.fault("hang").await.unwrap();
    gpu.clear_records();
    let mut connection = Connection::open(at).await;
    connection
        .request("POST", "/v1/chat/completions", &[], secret.as_bytes())
        .await;
    gpu.wait_for(crate::support::DEADLINE, |records| records.len() == 1)
        .await
        .unwrap();
    connection.reset();
    recorded(gateway, 9.0).await;
    9
}

#[tokio::test]
async fn every_request_has_one_access_line() {
    let gpu = sim("gpu-1").await;
    let yaml = format!("log: {{ level: debug }}\n{}", one_group(&[&gpu]));
    let gateway = Gateway::start(&yaml).await;
    let requests = one_of_each_kind(&gateway, &gpu).await;
    gateway.logged("status=499").await;
    let log = gateway.log();
    let lines = access_lines(&log);
    assert_eq!(lines.len(), requests, "{lines:#?}");
    let count = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
    assert_eq!(count(" status=200 ending=success"), 3);
    assert_eq!(count(" status=404 "), 3, "{lines:#?}");
    assert_eq!(count(" status=400 "), 2);
    assert_eq!(count("streamed=true"), 1);
    assert_eq!(count("ending=client_closed"), 1);
    assert_eq!(count("path=/v1/chat/completions"), 6);
    assert_eq!(count("upstream=gpu-1"), 4, "{lines:#?}");
    let ids: BTreeSet<_> = lines
        .iter()
        .map(|line| {
            line.split("request_id=")
                .nth(1)
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
        })
        .collect();
    assert_eq!(ids.len(), requests);
    for secret in ["a-secret-prompt", "a-secret-query", "answers:"] {
        assert!(!log.contains(secret), "{secret}");
    }
    let steers = |c: char| c.is_control() || matches!(c, '\u{202e}' | '\u{2028}');
    assert!(log.chars().all(|c| c == '\n' || !steers(c)));
    assert!(!log.lines().any(|line| line.starts_with("2026 INFO forged")));
}

#[tokio::test]
async fn every_line_of_a_json_log_is_json() {
    let gpu = sim("gpu-1").await;
    let yaml = format!(
        "log: {{ level: debug, format: json }}\n{}",
        one_group(&[&gpu])
    );
    let gateway = Gateway::start(&yaml).await;
    let requests = one_of_each_kind(&gateway, &gpu).await;
    gateway.reload().await;
    gateway.logged("configuration reloaded").await;
    let log = gateway.log();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{why}: {line}")))
        .collect();
    let access: Vec<_> = lines
        .iter()
        .filter(|line| line["target"] == "forebay::access")
        .collect();
    assert_eq!(access.len(), requests);
    for line in &access {
        assert!(
            line["time"].is_string() && line["status"].is_u64(),
            "{line}"
        );
        assert!(
            line["request_id"].is_string() && line["total_ms"].is_u64(),
            "{line}"
        );
    }
    let streamed = access.iter().find(|line| line["streamed"] == true).unwrap();
    assert!(streamed["tokens_out"].as_u64().unwrap() > 0, "{streamed}");
    assert!(
        access
            .iter()
            .any(|line| line["model"] == "a\" status=200 \u{202e}\u{2028}")
    );
}

#[tokio::test]
async fn the_log_file_is_rotated_by_size_and_count() {
    let gpu = sim("gpu-1").await;
    let yaml = format!(
        "log: {{ file: forebay.log, rotate_size: 4KiB, rotate_keep: 2 }}\n{}",
        one_group(&[&gpu])
    );
    let gateway = Gateway::start(&yaml).await;
    let file = |name: &str| gateway.folder.path().join(name);
    // Each line has some 300 bytes.
    for _ in 0..80 {
        get(gateway.addr, "/livez").await;
    }
    // The files hold the end of what standard error has, line for line; while
    // one is renamed they may not.
    let kept = || -> Option<[String; 3]> {
        let names = ["forebay.log.2", "forebay.log.1", "forebay.log"];
        let texts = names.map(|name| fs::read_to_string(file(name)).ok());
        let [Some(a), Some(b), Some(c)] = texts else {
            return None;
        };
        Some([a, b, c])
    };
    eventually("both logs end alike", async || {
        let log = gateway.log();
        access_lines(&log).len() == 80 && kept().is_some_and(|kept| log.ends_with(&kept.concat()))
    })
    .await;
    let kept = kept().unwrap();
    assert!(kept.iter().all(|text| text.len() <= 4096));
    assert!(kept.concat().lines().count() > 20);
    assert!(
        !kept.concat().contains("listens:"),
        "nothing was rotated away"
    );
    assert!(!file("forebay.log.3").exists());
}
