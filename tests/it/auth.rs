//! Who may ask, and for what: keys, their rights, and those who guess.

use forebay::plugins::hash_token;

use crate::support::{
    Connection, Gateway, chat, chat_stream, eventually,
    http::{ask, get, post, post_chat},
    keys::{bearer, chat_as, keys, token},
    one_group, sim, with_fallback,
};

/// A configuration that asks for keys; failures are counted, never refused.
fn guarded(yaml: &str) -> String {
    format!("plugins:\n  - auth: {{ keys_file: keys.yaml, failures_per_minute: 1000000 }}\n{yaml}")
}

#[tokio::test]
async fn strangers_are_turned_away_before_their_body_is_read() {
    let gpu = sim("gpu-1").await;
    let file = keys(&[("alice", ""), ("old", ", expires: 2020-01-01")]);
    let gateway =
        Gateway::start_with(&guarded(&one_group(&[&gpu])), &[("keys.yaml", &file)], &[]).await;
    let (alice, old) = (bearer("alice"), bearer("old"));
    let cut = alice.strip_suffix('e').unwrap();
    for (header, code) in [
        ("".to_owned(), "missing_api_key"),
        ("authorization: Bearer \r\n".to_owned(), "missing_api_key"),
        (
            "authorization: Bearer fb_wrong\r\n".to_owned(),
            "invalid_api_key",
        ),
        (format!("authorization: {cut}\r\n"), "invalid_api_key"),
        (format!("authorization: {alice}e\r\n"), "invalid_api_key"),
        ("x-api-key: fb_wrong\r\n".to_owned(), "invalid_api_key"),
        (
            "authorization: Basic YWxpY2U6YWxpY2U=\r\n".to_owned(),
            "invalid_api_key",
        ),
        (
            format!("authorization: {alice}\r\nx-api-key: other\r\n"),
            "invalid_api_key",
        ),
        (
            format!("authorization: {alice}\r\nauthorization: {alice}\r\n"),
            "invalid_api_key",
        ),
        (format!("authorization: {old}\r\n"), "expired_api_key"),
    ] {
        let mut connection = Connection::open(gateway.addr).await;
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n{header}content-length: 1000\r\n\r\n"
        );
        connection.send(head.as_bytes()).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 401, "{header:?} {}", answer.text());
        assert_eq!(answer.error_code(), code, "{header:?}");
        assert!(
            answer
                .header("www-authenticate")
                .unwrap()
                .starts_with("Bearer"),
            "{header:?}"
        );
        assert!(!answer.text().contains("fb_"), "{}", answer.text());
    }
    assert_eq!(gpu.connections().total, 0);
    eventually("each has its access line", async || {
        gateway
            .log()
            .matches("status=401 ending=client_error")
            .count()
            == 10
    })
    .await;
}

#[tokio::test]
async fn a_key_is_taken_in_both_spellings_and_never_goes_upstream() {
    let gpu = sim("gpu-1").await;
    let yaml = guarded(&one_group(&[&gpu])).replace("url:", "key: env:GPU_KEY, url:");
    let file = keys(&[("alice", "")]);
    let env = [("GPU_KEY", "the-key-of-the-upstream")];
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &env).await;
    let plain = token("alice");
    for (name, value) in [
        ("authorization", format!("Bearer {plain}")),
        ("Authorization", format!("bearer   {plain}")),
        ("x-api-key", plain.clone()),
        ("X-API-Key", plain.clone()),
    ] {
        let headers = [
            (name, value.as_str()),
            ("cookie", "session=client-secret"),
            ("proxy-authorization", "Basic client-secret"),
        ];
        let body = chat("demo");
        let answer = post(
            gateway.addr,
            "/v1/chat/completions",
            &headers,
            body.as_bytes(),
        )
        .await;
        assert_eq!(answer.status, 200, "{name}: {}", answer.text());
    }
    let records = gpu.records();
    assert_eq!(records.len(), 4);
    for record in records {
        let head = String::from_utf8(record.head.to_vec()).unwrap();
        assert!(!head.contains(&plain), "{head}");
        assert!(!head.contains("client-secret"), "{head}");
        assert_eq!(
            record.header("authorization").as_deref(),
            Some("Bearer the-key-of-the-upstream")
        );
        assert_eq!(record.header("x-api-key"), None);
    }
}

#[tokio::test]
async fn auth_none_lets_everybody_in_and_still_keeps_credentials_back() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&format!("plugins: [ auth: none ]\n{}", one_group(&[&gpu]))).await;
    let headers = [
        ("authorization", "Bearer sk-unused"),
        ("x-api-key", "sk-other"),
    ];
    let body = chat("demo");
    let answer = post(
        gateway.addr,
        "/v1/chat/completions",
        &headers,
        body.as_bytes(),
    )
    .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(post_chat(gateway.addr, &body).await.status, 200);
    let record = gpu.records().remove(0);
    assert_eq!(record.header("authorization"), None);
    assert_eq!(record.header("x-api-key"), None);
}

#[tokio::test]
async fn a_key_sees_and_uses_only_its_models() {
    let gpu = sim("gpu-1").await;
    let yaml = one_group(&[&gpu]).replace(
        "  - { model: \"*\", groups: [gpus] }",
        "  - { model: qwen-1, groups: [gpus] }\n  - { model: llama-1, groups: [gpus] }",
    );
    let file = keys(&[("alice", ", models: [\"qwen*\"]"), ("root", "")]);
    let gateway = Gateway::start_with(
        &guarded(&yaml).replace("kind: vllm", "kind: generic"),
        &[("keys.yaml", &file)],
        &[],
    )
    .await;

    let refused = chat_as(&gateway, "alice", &chat("llama-1")).await;
    assert_eq!(refused.status, 403, "{}", refused.text());
    assert_eq!(refused.error_code(), "model_not_allowed");
    assert_eq!(refused.json()["error"]["param"], "model");
    assert!(gpu.records().is_empty());
    // What the simulator says to a model it does not have is its own affair.
    chat_as(&gateway, "alice", &chat("qwen-1")).await;
    assert_eq!(gpu.records().len(), 1);

    for (name, sees, one) in [
        ("alice", vec!["qwen-1"], 404),
        ("root", vec!["qwen-1", "llama-1"], 200),
    ] {
        let key = bearer(name);
        let headers = [("authorization", key.as_str())];
        let list = ask(gateway.addr, "GET", "/v1/models", &headers, b"").await;
        let body = list.json();
        let ids: Vec<_> = body["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| &m["id"])
            .collect();
        assert_eq!(ids, sees, "{name}");
        let llama = ask(gateway.addr, "GET", "/v1/models/llama-1", &headers, b"").await;
        assert_eq!(llama.status, one, "{name}: {}", llama.text());
    }
}

#[tokio::test]
async fn a_key_held_to_groups_never_leaves_them() {
    let (gpu, ollama) = (sim("gpu-1").await, sim("ollama").await);
    let file = keys(&[
        ("low", ", groups: [ollama]"),
        ("high", ", groups: [gpus]"),
        ("any", ""),
    ]);
    let yaml = guarded(&with_fallback(&[&gpu], &ollama));
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    assert_eq!(
        chat_as(&gateway, "low", &chat("demo")).await.upstream(),
        "ollama"
    );
    assert_eq!(
        chat_as(&gateway, "high", &chat("demo")).await.upstream(),
        "gpu-1"
    );

    gpu.stop().await;
    assert_eq!(
        chat_as(&gateway, "any", &chat("demo")).await.upstream(),
        "ollama"
    );
    ollama.clear_records();
    let answer = chat_as(&gateway, "high", &chat("demo")).await;
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(ollama.records().is_empty());
}

#[tokio::test]
async fn a_local_key_never_leaves_the_premises() {
    let (cloud, ollama) = (sim("cloud-1").await, sim("ollama").await);
    let yaml =
        guarded(&with_fallback(&[&cloud], &ollama)).replacen("local: true", "local: false", 1);
    let file = keys(&[("home", ", local: true"), ("any", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    assert_eq!(
        chat_as(&gateway, "any", &chat("demo")).await.upstream(),
        "cloud-1"
    );
    cloud.clear_records();
    assert_eq!(
        chat_as(&gateway, "home", &chat("demo")).await.upstream(),
        "ollama"
    );
    ollama.stop().await;
    assert_eq!(chat_as(&gateway, "home", &chat("demo")).await.status, 503);
    assert!(cloud.records().is_empty());
}

#[tokio::test]
async fn only_a_key_with_the_right_may_choose_an_upstream() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let file = keys(&[("chooser", ", pin: true"), ("other", "")]);
    let yaml = guarded(&one_group(&[&one, &two]));
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    let body = chat("demo");
    let pinned = async |name: &str| {
        let key = bearer(name);
        let headers = [
            ("authorization", key.as_str()),
            ("x-forebay-upstream", "gpu-2"),
        ];
        post(
            gateway.addr,
            "/v1/chat/completions",
            &headers,
            body.as_bytes(),
        )
        .await
    };
    let refused = pinned("other").await;
    assert_eq!(refused.status, 403, "{}", refused.text());
    assert_eq!(refused.error_code(), "pin_not_allowed");
    assert!(two.records().is_empty());
    for _ in 0..3 {
        assert_eq!(pinned("chooser").await.upstream(), "gpu-2");
    }
    assert!(one.records().is_empty());
}

#[tokio::test]
async fn a_changed_keys_file_is_taken_by_itself() {
    let gpu = sim("gpu-1").await;
    let yaml = guarded(&one_group(&[&gpu]));
    let before = keys(&[("alice", ""), ("bob", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &before)], &[]).await;
    let file = gateway.folder.path().join("keys.yaml");
    assert_eq!(chat_as(&gateway, "bob", &chat("demo")).await.status, 200);
    assert_eq!(chat_as(&gateway, "carol", &chat("demo")).await.status, 401);

    std::fs::write(&file, keys(&[("alice", ""), ("carol", "")])).unwrap();
    eventually("bob is out and carol is in", async || {
        chat_as(&gateway, "bob", &chat("demo")).await.status == 401
            && chat_as(&gateway, "carol", &chat("demo")).await.status == 200
    })
    .await;
    assert_eq!(chat_as(&gateway, "alice", &chat("demo")).await.status, 200);
}

#[tokio::test]
async fn a_broken_keys_file_leaves_the_old_keys_and_says_why() {
    let gpu = sim("gpu-1").await;
    let yaml = guarded(&one_group(&[&gpu]));
    let good = keys(&[("alice", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &good)], &[]).await;
    let file = gateway.folder.path().join("keys.yaml");

    std::fs::write(
        &file,
        "keys:\n  - { name: eve, sha256: \"fb_not_a_hash_but_a_token\" }\n",
    )
    .unwrap();
    gateway
        .metric_becomes("forebay_config_last_reload_successful", 0.0)
        .await;
    assert_eq!(chat_as(&gateway, "alice", &chat("demo")).await.status, 200);
    gateway.logged("expected a SHA-256").await;
    gateway.logged("keys.yaml:2:").await;
    let health = get(gateway.admin, "/health").await.json();
    let reload = &health["config"]["last_reload"];
    assert_eq!(reload["ok"], false);
    let problems = reload["problems"].to_string();
    assert!(problems.contains("expected a SHA-256"), "{problems}");
    assert!(!problems.contains("fb_not_a_hash"), "{problems}");
    assert!(!gateway.log().contains("fb_not_a_hash"));

    std::fs::write(&file, keys(&[("bob", "")])).unwrap();
    eventually("bob is in", async || {
        chat_as(&gateway, "bob", &chat("demo")).await.status == 200
    })
    .await;
    assert_eq!(chat_as(&gateway, "alice", &chat("demo")).await.status, 401);
    gateway
        .metric_becomes("forebay_config_last_reload_successful", 1.0)
        .await;
}

#[tokio::test]
async fn who_guesses_has_to_wait_but_a_valid_key_from_there_does_not() {
    let gpu = sim("gpu-1").await;
    let yaml = guarded(&one_group(&[&gpu])).replace("1000000", "3");
    let file = keys(&[("alice", ""), ("old", ", expires: 2020-01-01")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    for _ in 0..3 {
        assert_eq!(chat_as(&gateway, "guess", &chat("demo")).await.status, 401);
    }
    let answer = chat_as(&gateway, "guess", &chat("demo")).await;
    assert_eq!(answer.status, 429, "{}", answer.text());
    assert_eq!(answer.error_code(), "too_many_auth_failures");
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    // No key is no wrong one.
    assert_eq!(get(gateway.addr, "/v1/models").await.status, 401);
    for _ in 0..3 {
        assert_eq!(chat_as(&gateway, "alice", &chat("demo")).await.status, 200);
    }
    // Who had a key is not guessing, and is told what is the matter.
    assert_eq!(chat_as(&gateway, "old", &chat("demo")).await.status, 401);
    assert_eq!(get(gateway.addr, "/health").await.status, 200);
    gateway
        .metric_becomes("forebay_limit_hits_total{limit=\"auth_failures\"}", 1.0)
        .await;
    assert_eq!(gpu.records().len(), 3);
}

#[tokio::test]
async fn behind_a_trusted_proxy_each_client_has_its_own_failures() {
    let gpu = sim("gpu-1").await;
    let yaml = guarded(&one_group(&[&gpu])).replace("1000000", "1");
    let file = keys(&[("alice", "")]);
    let trusting = format!("trusted_proxies: [127.0.0.0/8]\n{yaml}");
    let gateway = Gateway::start_with(&trusting, &[("keys.yaml", &file)], &[]).await;
    let from = async |gateway: &Gateway, ip: &str| {
        ask(
            gateway.addr,
            "GET",
            "/v1/models",
            &[("x-forwarded-for", ip), ("x-api-key", "a-wrong-key")],
            b"",
        )
        .await
        .status
    };
    assert_eq!(from(&gateway, "198.51.100.7").await, 401);
    assert_eq!(from(&gateway, "198.51.100.7").await, 429);
    // What the client itself put in front of its address changes nothing.
    assert_eq!(from(&gateway, "203.0.113.9, 198.51.100.7").await, 429);
    assert_eq!(from(&gateway, "198.51.100.8").await, 401);
    gateway.logged("client=198.51.100.8").await;

    // Without the setting the header is a stranger's claim.
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    assert_eq!(from(&gateway, "198.51.100.7").await, 401);
    assert_eq!(from(&gateway, "198.51.100.8").await, 429);
    gateway.logged("client=127.0.0.1").await;
    assert!(!gateway.log().contains("client=198.51"));
}

#[tokio::test]
async fn no_credential_is_ever_logged_counted_or_told() {
    let (gpu, other) = (sim("gpu-1").await, sim("gpu-2").await);
    let yaml = format!(
        "log: {{ level: debug }}\n{}",
        guarded(&one_group(&[&gpu, &other]))
    )
    .replace(
        "url:",
        "key: env:GPU_KEY, headers: { x-extra: env:GPU_EXTRA }, url:",
    );
    let file = keys(&[("alice", ", models: [\"demo\"]")]);
    let env = [
        ("GPU_KEY", "sk-upstream-secret-1"),
        ("GPU_EXTRA", "sk-upstream-secret-2"),
    ];
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &env).await;
    let secrets = [
        token("alice"),
        token("wrong"),
        "sk-upstream-secret-1".to_owned(),
        "sk-upstream-secret-2".to_owned(),
    ];

    let mut told = Vec::new();
    for name in ["alice", "wrong"] {
        for headers in [("authorization", bearer(name)), ("x-api-key", token(name))] {
            let headers = [
                (headers.0, headers.1.as_str()),
                ("x-forebay-upstream", "nobody"),
            ];
            for (body, extra) in [
                (chat("demo"), 1),
                (chat_stream("demo"), 1),
                (chat("no"), 1),
                (chat("demo"), 2),
            ] {
                let headers = &headers[..extra];
                told.push(
                    post(
                        gateway.addr,
                        "/v1/chat/completions",
                        headers,
                        body.as_bytes(),
                    )
                    .await,
                );
            }
        }
    }
    for fault in [
        "status=401",
        "status=500",
        "reset",
        "status=400",
        "die_at=1",
    ] {
        gpu.fault(fault).await.unwrap();
        other.fault(fault).await.unwrap();
        told.push(chat_as(&gateway, "alice", &chat("demo")).await);
    }
    told.push(get(gateway.addr, "/health").await);
    told.push(get(gateway.admin, "/metrics").await);
    gateway.reload().await;
    gateway.logged("configuration reloaded").await;

    let answers: Vec<String> = told
        .iter()
        .map(|answer| {
            format!(
                "{:?} {}",
                answer.headers,
                String::from_utf8_lossy(&answer.body)
            )
        })
        .collect();
    assert!(told.iter().any(|answer| answer.status == 200));
    let log = gateway.log();
    assert!(log.contains("DEBUG"), "{log}");
    for secret in &secrets {
        assert!(!log.contains(secret), "{secret} is in the log");
        assert!(
            answers.iter().all(|answer| !answer.contains(secret)),
            "{secret} was told"
        );
    }
    // It is known who asked, by name.
    assert!(log.contains("caller=alice"), "{log}");
}

#[tokio::test]
async fn a_key_may_have_two_tokens_while_one_is_replaced() {
    let gpu = sim("gpu-1").await;
    let file = format!(
        "keys:\n  - {{ name: ci, sha256: [ \"{}\", \"{}\" ] }}\n",
        hash_token(&token("first")),
        hash_token(&token("second"))
    );
    let yaml = guarded(&one_group(&[&gpu]));
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    for (name, status) in [("first", 200), ("second", 200), ("third", 401)] {
        assert_eq!(
            chat_as(&gateway, name, &chat("demo")).await.status,
            status,
            "{name}"
        );
    }
}

#[tokio::test]
async fn what_a_load_balancer_asks_needs_no_key() {
    let gpu = sim("gpu-1").await;
    let file = keys(&[("alice", "")]);
    let yaml = guarded(&one_group(&[&gpu]));
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    for path in ["/", "/health", "/livez", "/readyz"] {
        assert_eq!(get(gateway.addr, path).await.status, 200, "{path}");
    }
    for path in ["/v1/models", "/v1/models/demo"] {
        assert_eq!(get(gateway.addr, path).await.status, 401, "{path}");
    }
    let health = get(gateway.addr, "/health").await;
    assert!(!health.text().contains("127.0.0.1"), "{}", health.text());
}

#[tokio::test]
async fn a_route_with_its_own_list_has_only_that() {
    let gpu = sim("gpu-1").await;
    let yaml = guarded(&one_group(&[&gpu])).replace(
        "routes:\n",
        "routes:\n  - { model: demo, groups: [gpus], plugins: [ { auth: none } ] }\n",
    );
    let file = keys(&[("alice", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    gpu.clear_records();
    for model in ["other", "demo2", "DEMO"] {
        assert_eq!(
            post_chat(gateway.addr, &chat(model)).await.status,
            401,
            "{model}"
        );
    }
    assert_eq!(get(gateway.addr, "/v1/models").await.status, 401);
    assert!(gpu.records().is_empty());
    chat_as(&gateway, "alice", &chat("other")).await;
    assert_eq!(gpu.records().len(), 1);
}

#[tokio::test]
async fn a_key_that_names_an_unknown_group_is_warned_about() {
    let gpu = sim("gpu-1").await;
    let file = keys(&[("alice", ", groups: [gpuz, gpus]")]);
    let yaml = guarded(&one_group(&[&gpu]));
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    gateway
        .logged("\"alice\" may reach the group \"gpuz\"")
        .await;
    assert!(!gateway.log().contains("the group \"gpus\""));
    assert_eq!(chat_as(&gateway, "alice", &chat("demo")).await.status, 200);
    // The key is as it was, but the group has gone: told again.
    gateway.write_config(&yaml.replace("gpus", "gpuz"));
    gateway
        .logged("\"alice\" may reach the group \"gpus\"")
        .await;
}
