//! A changed configuration is taken while the gateway runs.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::support::{
    Connection, Gateway, chat, chat_stream, eventually,
    gateway::free_port,
    http::{get, post_chat},
    one_group, sim,
};

/// Two seconds are promised; a busy machine gets more.
const SOON: Duration = Duration::from_secs(5);

/// Waits until the answers come from another server.
async fn taken_over(gateway: &Gateway, by: &str) {
    let start = Instant::now();
    eventually(&format!("{by} answers"), async || {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.content().starts_with(by)
    })
    .await;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

fn read(gateway: &Gateway) -> String {
    fs::read_to_string(gateway.config_file()).unwrap()
}

async fn version(gateway: &Gateway) -> u64 {
    let health = get(gateway.admin, "/health").await.json();
    health["config"]["version"].as_u64().unwrap()
}

#[tokio::test]
async fn a_file_written_in_place_is_taken() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&one_group(&[&one])).await;
    taken_over(&gateway, "gpu-1").await;
    let text = read(&gateway).replace(&one.url(), &two.url());
    fs::write(gateway.config_file(), text).unwrap();
    taken_over(&gateway, "gpu-2").await;
}

#[tokio::test]
async fn a_file_renamed_over_the_old_one_is_taken() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&one_group(&[&one])).await;
    gateway.write_config(&one_group(&[&two]));
    taken_over(&gateway, "gpu-2").await;
    // And once more: the folder is watched, not the file that has gone.
    gateway.write_config(&one_group(&[&one]));
    taken_over(&gateway, "gpu-1").await;
}

#[tokio::test]
async fn a_swapped_link_is_taken_as_kubernetes_swaps_it() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&one_group(&[&one])).await;
    let at = |name: &str| gateway.folder.path().join(name);
    let text = read(&gateway);
    for (folder, sim) in [("..v1", &one), ("..v2", &two)] {
        fs::create_dir(at(folder)).unwrap();
        let text = text.replace(&one.url(), &sim.url());
        fs::write(at(folder).join("forebay.yaml"), text).unwrap();
    }
    symlink("..v1", at("..data")).unwrap();
    symlink("..data/forebay.yaml", at("link")).unwrap();
    fs::rename(at("link"), gateway.config_file()).unwrap();
    taken_over(&gateway, "gpu-1").await;
    for (folder, sim) in [("..v2", "gpu-2"), ("..v1", "gpu-1")] {
        symlink(folder, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        taken_over(&gateway, sim).await;
    }
}

#[tokio::test]
async fn sighup_and_post_reload_read_everything_anew() {
    let gpu = sim("gpu-1").await;
    let yaml = one_group(&[&gpu]).replace("url:", "key: file:gpu.key, url:");
    let gateway = Gateway::start_with(&yaml, &[("gpu.key", "key-1")], &[]).await;
    let key = gateway.folder.path().join("gpu.key");
    let sent = async || {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
        gpu.records()
            .pop()
            .unwrap()
            .header("authorization")
            .unwrap()
    };
    assert_eq!(sent().await, "Bearer key-1");
    // The file of a secret is watched, like all others.
    fs::write(&key, "key-2").unwrap();
    eventually("the second key is used", async || {
        sent().await == "Bearer key-2"
    })
    .await;
    let before = version(&gateway).await;
    gateway.signal("HUP");
    gateway.logged("SIGHUP").await;
    eventually("it is read again", async || {
        version(&gateway).await > before
    })
    .await;
    // One that is gone leaves the old one in use, and says so.
    fs::remove_file(&key).unwrap();
    gateway.logged("gpu.key cannot be read").await;
    assert_eq!(sent().await, "Bearer key-2");
    fs::write(&key, "key-3").unwrap();
    assert_eq!(gateway.reload().await.status, 200);
    assert_eq!(sent().await, "Bearer key-3");
}

#[tokio::test]
async fn post_reload_takes_the_file_at_once() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&one_group(&[&one])).await;
    for (sim, name) in [(&two, "gpu-2"), (&one, "gpu-1")] {
        gateway.write_config(&one_group(&[sim]));
        let answer = gateway.reload().await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["reloaded"], true);
        let said = post_chat(gateway.addr, &chat("demo")).await.content();
        assert!(said.starts_with(name), "{said}");
        // Asked again without a change, it reads everything again.
        let before = version(&gateway).await;
        assert_eq!(gateway.reload().await.status, 200);
        assert!(version(&gateway).await > before);
    }
}

#[tokio::test]
async fn a_file_that_says_the_same_is_no_change() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&one_group(&[&one])).await;
    assert_eq!(version(&gateway).await, 1);
    gateway.write_config(&one_group(&[&one]));
    fs::write(gateway.folder.path().join("another.yaml"), "a: 1").unwrap();
    gateway.write_config(&one_group(&[&two]));
    taken_over(&gateway, "gpu-2").await;
    assert_eq!(version(&gateway).await, 2);
}

#[tokio::test]
async fn a_bad_file_leaves_the_old_configuration_and_says_why() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&one_group(&[&one])).await;
    let ok = "forebay_config_last_reload_successful";
    let bad = one_group(&[&two])
        .replace("kind: vllm", "kind: vlm")
        .replace("groups: [gpus]", "groups: [gpuz]");
    gateway.write_config(&bad);
    gateway.metric_becomes(ok, 0.0).await;
    gateway.logged("groups.gpus.upstreams[0].kind").await;
    gateway.logged("routes[0].groups[0]").await;
    for at in [gateway.addr, gateway.admin] {
        let health = get(at, "/health").await.json();
        let last = &health["config"]["last_reload"];
        assert_eq!(last["ok"], false);
        let problems = last["problems"].to_string();
        assert!(problems.contains("upstreams[0].kind"), "{problems}");
        assert_eq!(health["config"]["version"], 1);
    }
    let answer = gateway.reload().await;
    assert_eq!(answer.status, 422, "{}", answer.text());
    let problems = answer.json()["problems"].as_array().unwrap().clone();
    assert_eq!(problems.len(), 2, "{problems:?}");
    for (problem, text) in problems
        .iter()
        .zip(["upstreams[0].kind", "routes[0].groups[0]"])
    {
        let problem = problem.as_str().unwrap();
        assert!(
            problem.contains("forebay.yaml:") && problem.contains(text),
            "{problem}"
        );
    }
    assert!(
        post_chat(gateway.addr, &chat("demo"))
            .await
            .content()
            .starts_with("gpu-1")
    );
    assert!(two.records().is_empty());

    gateway.write_config(&one_group(&[&two]));
    taken_over(&gateway, "gpu-2").await;
    gateway.metric_becomes(ok, 1.0).await;
    let health = get(gateway.admin, "/health").await.json();
    assert_eq!(health["config"]["last_reload"]["ok"], true);
}

#[tokio::test]
async fn going_back_to_what_is_live_ends_the_complaint() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let good = read(&gateway);
    fs::write(gateway.config_file(), "").unwrap();
    gateway
        .metric_becomes("forebay_config_last_reload_successful", 0.0)
        .await;
    fs::remove_file(gateway.config_file()).unwrap();
    gateway.logged("cannot be read").await;
    fs::write(gateway.config_file(), good).unwrap();
    gateway
        .metric_becomes("forebay_config_last_reload_successful", 1.0)
        .await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}

#[tokio::test]
async fn a_stream_ends_untouched_though_its_upstream_is_removed() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    one.fault("gap=40;tokens=20").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&one])).await;
    let mut connection = Connection::open(gateway.addr).await;
    let body = chat_stream("demo");
    connection
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    connection.read_until("gpu-1").await;
    gateway.write_config(&one_group(&[&two]));
    assert_eq!(gateway.reload().await.status, 200);
    assert!(
        post_chat(gateway.addr, &chat("demo"))
            .await
            .content()
            .starts_with("gpu-2")
    );
    assert!(
        !one.records()[0].finished(),
        "the stream was over too early to prove anything"
    );
    let answer = connection.answer().await;
    assert!(answer.complete);
    assert_eq!(answer.events().last().unwrap(), "[DONE]");
    assert_eq!(answer.content().split_whitespace().count(), 20);
    assert!(!answer.text().contains("\"error\""));
    // What is gone is not asked again, and not shown.
    assert_eq!(one.records().len(), 1);
    let metrics = get(gateway.admin, "/metrics").await;
    assert!(
        !metrics
            .text()
            .contains("forebay_upstream_state{group=\"gpus\",state=\"ready\",upstream=\"gpu-1\"}")
    );
}

#[tokio::test]
async fn counters_state_and_connections_survive() {
    let (down, up) = (sim("gpu-1").await, sim("gpu-2").await);
    down.stop().await;
    let yaml = one_group(&[&down, &up]);
    let gateway = Gateway::start(&yaml).await;
    for _ in 0..3 {
        assert_eq!(
            post_chat(gateway.addr, &chat("demo")).await.upstream(),
            "gpu-2"
        );
    }
    let requests = "forebay_requests_total{endpoint=\"chat_completions\",outcome=\"success\",route=\"*\",status=\"200\"}";
    let state = "forebay_upstream_state{group=\"gpus\",state=\"down\",upstream=\"gpu-1\"}";
    gateway.metric_becomes(requests, 3.0).await;
    assert_eq!(gateway.metric(state).await, Some(1.0));
    assert_eq!(up.connections().total, 1);

    let another = "routes:\n  - { model: other, groups: [gpus] }\n";
    gateway.write_config(&yaml.replace("routes:\n", another));
    assert_eq!(gateway.reload().await.status, 200);
    assert_eq!(gateway.metric(requests).await, Some(3.0));
    assert_eq!(gateway.metric(state).await, Some(1.0));
    assert_eq!(
        post_chat(gateway.addr, &chat("demo")).await.upstream(),
        "gpu-2"
    );
    gateway.metric_becomes(requests, 4.0).await;
    assert_eq!(up.connections().total, 1);
    assert_eq!(up.records().last().unwrap().nth, 4);
}

#[tokio::test]
async fn a_changed_listener_is_said_to_need_a_restart() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let elsewhere = free_port();
    let text = read(&gateway).replace(&gateway.addr.to_string(), &elsewhere.to_string());
    fs::write(gateway.config_file(), text).unwrap();
    gateway
        .logged("listen has changed: this needs a restart")
        .await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    assert!(tokio::net::TcpStream::connect(elsewhere).await.is_err());
}

#[tokio::test]
async fn the_logs_level_and_its_access_lines_follow_the_file() {
    let gpu = sim("gpu-1").await;
    let yaml = one_group(&[&gpu]);
    let gateway = Gateway::start(&yaml).await;
    let lines = || gateway.log().matches("forebay::access").count();
    // Lines come in order: once a later one is there, an earlier one that is
    // missing will not come.
    get(gateway.addr, "/livez").await;
    gateway.logged("path=/livez").await;
    assert!(!gateway.log().contains("DEBUG"));

    gateway.write_config(&format!("log: {{ access: false, level: debug }}\n{yaml}"));
    gateway.logged("version=2").await;
    eventually("no more access lines", async || {
        let before = lines();
        get(gateway.addr, "/readyz").await;
        gateway.reload().await;
        let marker = format!("version={}", version(&gateway).await);
        gateway.logged(&marker).await;
        lines() == before
    })
    .await;
    gateway.logged("DEBUG").await;

    gateway.write_config(&yaml);
    eventually("access lines again", async || {
        get(gateway.addr, "/health").await;
        gateway.log().contains("path=/health")
    })
    .await;
}

#[tokio::test]
async fn fifty_reloads_under_traffic_fail_no_request() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&one_group(&[&one])).await;
    let (stop, served) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let (stop, served, addr) = (Arc::clone(&stop), Arc::clone(&served), gateway.addr);
            tokio::spawn(async move {
                let mut connection = Connection::open(addr).await;
                let body = if client % 2 == 0 {
                    chat("demo")
                } else {
                    chat_stream("demo")
                };
                while !stop.load(Ordering::Relaxed) {
                    connection
                        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
                        .await;
                    let answer = connection.answer().await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    assert!(answer.complete && !answer.text().contains("\"error\""));
                    served.fetch_add(1, Ordering::Relaxed);
                    if answer.header("connection") == Some("close") {
                        connection = Connection::open(addr).await;
                    }
                }
            })
        })
        .collect();
    let mut seen = 0;
    for round in 0..50 {
        let yaml = one_group([&[&one, &two][..], &[&one], &[&two]][round % 3]);
        gateway.write_config(&format!("{yaml}# {round}\n"));
        assert_eq!(gateway.reload().await.status, 200);
        // At least one request between two reloads.
        eventually("a request is served", async || {
            served.load(Ordering::Relaxed) > seen
        })
        .await;
        seen = served.load(Ordering::Relaxed);
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(version(&gateway).await >= 51);
    assert_eq!(
        gateway
            .metric("forebay_config_reloads_total{result=\"failure\"}")
            .await,
        None
    );
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
    assert!(!one.records().is_empty() && !two.records().is_empty());
}
