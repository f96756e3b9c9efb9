//! Asking upstreams whether they are well: what is asked, what follows, and that
//! it costs and breaks nothing.

use std::time::Duration;

use forebay::sim::{Sim, SimOptions};

use crate::support::{
    Gateway, Scripted, chat, eventually, group_of, group_with,
    http::{get, post_chat},
    scripted::{self, json},
    sim, upstream_at,
};

const OFTEN: &str = "check: { every: 100ms, timeout: 500ms, fall: 3, rise: 2 }";

/// Waits until so many more checks came to this.
async fn checks(gateway: &Gateway, upstream: &str, result: &str, more: f64) {
    let series =
        format!("forebay_health_checks_total{{result=\"{result}\",upstream=\"{upstream}\"}}");
    let before = gateway.metric(&series).await.unwrap_or(0.0);
    eventually(&format!("{more} checks are {result}"), || async {
        gateway.metric(&series).await.unwrap_or(0.0) >= before + more
    })
    .await;
}

fn targets(sim: &Sim) -> Vec<String> {
    let records = sim.records();
    let all = records.iter();
    all.map(|record| format!("{} {}", record.method(), record.target()))
        .collect()
}

#[tokio::test]
async fn each_kind_is_asked_what_costs_it_nothing() {
    for (kind, wanted) in [
        ("vllm", "GET /health"),
        ("llamacpp", "GET /health"),
        ("ollama", "GET /api/version"),
        ("openai", "GET /v1/models"),
        ("generic", "GET /v1/models"),
    ] {
        let only = sim("only").await;
        let upstream = upstream_at("only", &only.url(), &format!("kind: {kind}, key: env:KEY"));
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of("g", "", &[upstream])
                .replace("    upstreams:", &format!("    {OFTEN}\n    upstreams:")),
        );
        let gateway = Gateway::start_with(&yaml, &[], &[("KEY", "sk-canary")]).await;
        checks(&gateway, "only", "good", 3.0).await;
        let targets = targets(&only);
        assert!(targets.iter().all(|target| target == wanted), "{targets:?}");
        let record = &only.records()[0];
        assert!(record.is_check());
        assert!(record.body.is_empty());
        assert_eq!(record.header("connection").as_deref(), Some("close"));
        assert_eq!(
            record.header("authorization").as_deref(),
            Some("Bearer sk-canary")
        );
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
        assert!(!gateway.log().contains("sk-canary"));
    }
}

#[tokio::test]
async fn three_bad_checks_take_it_down_and_two_good_ones_bring_it_back() {
    let (bad, good) = (sim("bad").await, sim("good").await);
    let gateway = Gateway::start(&group_with(&[OFTEN], &[&bad, &good])).await;
    bad.fault("status=500;path=/health").await.unwrap();
    gateway.state_becomes("bad", "down check").await;
    for _ in 0..6 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!((answer.status, answer.upstream()), (200, "good"));
    }
    bad.clear_faults().await;
    gateway.state_becomes("bad", "ready").await;
    assert!(gateway.log().contains("to=down reason=check"));
    let series =
        "forebay_upstream_transitions_total{reason=\"check\",to=\"down\",upstream=\"bad\"}";
    assert_eq!(gateway.metric(series).await, Some(1.0));
}

#[tokio::test]
async fn one_that_stopped_is_down_before_anybody_asks_it_and_back_soon_after_it_is() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&group_with(&[OFTEN], &[&a, &b])).await;
    a.stop().await;
    gateway.state_becomes("a", "down check").await;
    for _ in 0..4 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(
            (answer.upstream(), answer.header("x-forebay-attempts")),
            ("b", Some("1"))
        );
    }
    a.start_again().await.unwrap();
    gateway.state_becomes("a", "ready").await;
}

#[tokio::test]
async fn the_only_one_that_answers_although_its_check_is_broken_is_used_and_shown_as_down() {
    let only = sim("only").await;
    let gateway = Gateway::start(&group_with(&[OFTEN], &[&only])).await;
    only.fault("status=500;path=/health").await.unwrap();
    gateway.state_becomes("only", "down check").await;
    // Until one has tried, the others are turned away.
    eventually("one may try", || async {
        post_chat(gateway.addr, &chat("demo")).await.status == 200
    })
    .await;
    for _ in 0..20 {
        checks(&gateway, "only", "bad", 1.0).await;
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
        assert_eq!(gateway.state("only").await, "down check");
    }
    let log = gateway.log();
    assert_eq!(log.matches("upstream's state changed").count(), 2, "{log}");
}

#[tokio::test]
async fn a_good_check_does_not_undo_a_breaker() {
    let (grey, good) = (sim("grey").await, sim("good").await);
    // Every model call fails; /health is fine.
    grey.fault("status=500").await.unwrap();
    let yaml = group_with(
        &[OFTEN, "breaker: { failures: 3, open: 300s }"],
        &[&grey, &good],
    );
    let gateway = Gateway::start(&yaml).await;
    for _ in 0..6 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    checks(&gateway, "grey", "good", 5.0).await;
    assert_eq!(gateway.state("grey").await, "down breaker");
    let calls = || grey.records().iter().filter(|one| !one.is_check()).count();
    assert_eq!(calls(), 3);
    for _ in 0..6 {
        assert_eq!(
            post_chat(gateway.addr, &chat("demo")).await.upstream(),
            "good"
        );
    }
    assert_eq!(calls(), 3);
}

#[tokio::test]
async fn a_model_that_loads_is_loading_and_not_failing() {
    let slow = SimOptions {
        load: Duration::from_millis(1500),
        ..SimOptions::quick("slow")
    };
    let (slow, good) = (Sim::start(slow).await.unwrap(), sim("good").await);
    let gateway = Gateway::start(&group_with(&[OFTEN], &[&slow, &good])).await;
    gateway.state_becomes("slow", "loading").await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.status, answer.upstream()), (200, "good"));
    gateway.state_becomes("slow", "ready").await;
    let series =
        "forebay_upstream_transitions_total{reason=\"check\",to=\"down\",upstream=\"slow\"}";
    assert_eq!(gateway.metric(series).await, None);
}

#[tokio::test]
async fn a_cloud_that_has_no_such_path_or_wants_another_key_is_well() {
    for status in [301, 400, 401, 403, 404, 405, 429] {
        let odd = Scripted::always(json(status, "{}")).await;
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of(
                "g",
                "check: { every: 100ms }",
                &[upstream_at("odd", &odd.url(), "")]
            ),
        );
        let gateway = Gateway::start(&yaml).await;
        checks(&gateway, "odd", "good", 4.0).await;
        assert_eq!(gateway.state("odd").await, "ready", "{status}");
    }
}

#[tokio::test]
async fn where_the_path_is_named_only_2xx_is_good() {
    let odd = Scripted::always(json(404, "{}")).await;
    let keys = "check: { every: 100ms, path: /up, fall: 2 }";
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        group_of("g", "", &[upstream_at("odd", &odd.url(), keys)]),
    );
    let gateway = Gateway::start(&yaml).await;
    gateway.state_becomes("odd", "down check").await;
    assert!(odd.requests()[0].head.starts_with("GET /up HTTP/1.1\r\n"));
}

#[tokio::test]
async fn what_a_reload_adds_is_asked_and_what_it_removes_is_not() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&group_with(&[OFTEN], &[&a])).await;
    checks(&gateway, "a", "good", 1.0).await;
    gateway.write_config(&group_with(&[OFTEN], &[&b]));
    assert_eq!(gateway.reload().await.status, 200);
    checks(&gateway, "b", "good", 1.0).await;
    // One may have been on its way.
    let before = a.records().len();
    checks(&gateway, "b", "good", 10.0).await;
    assert!(a.records().len() <= before + 1);
}

#[tokio::test]
async fn checks_that_nobody_answers_delay_no_others() {
    let good = sim("good").await;
    let mut silent = Vec::new();
    let mut upstreams = vec![upstream_at("good", &good.url(), "")];
    for nth in 0..20 {
        let one = sim(&format!("silent-{nth}")).await;
        one.fault("hang;path=*").await.unwrap();
        upstreams.push(upstream_at(one.name(), &one.url(), ""));
        silent.push(one);
    }
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        group_of("g", "", &upstreams).replace(
            "    upstreams:",
            "    check: { every: 100ms, timeout: 30s }\n    upstreams:"
        ),
    );
    let gateway = Gateway::start(&yaml).await;
    checks(&gateway, "good", "good", 10.0).await;
    // Each is asked once, and holds one connection.
    for one in &silent {
        assert_eq!(one.records().len(), 1);
    }
}

#[tokio::test]
async fn the_state_is_in_health_and_in_the_metrics() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&group_with(&[OFTEN], &[&a, &b])).await;
    a.stop().await;
    gateway.state_becomes("a", "down check").await;
    for addr in [gateway.addr, gateway.admin] {
        let health = get(addr, "/health").await.json();
        assert_eq!(health["status"], "degraded");
        assert_eq!(health["upstreams"][0]["state"], "down");
        assert_eq!(health["upstreams"][0]["reason"], "check");
    }
    let series = "forebay_upstream_state{group=\"gpus\",state=\"down\",upstream=\"a\"}";
    assert_eq!(gateway.metric(series).await, Some(1.0));
}

#[tokio::test]
async fn an_answer_of_any_kind_breaks_nothing() {
    for bytes in [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n".to_vec(),
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n".to_vec(),
        b"HTTP/1.1 503 Whatever\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        scripted::answer(
            500,
            &[("content-type", "text/plain")],
            &"x".repeat(1_000_000),
        ),
    ] {
        let odd = Scripted::always(bytes).await;
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of(
                "g",
                "check: { every: 100ms }",
                &[upstream_at("odd", &odd.url(), "")]
            ),
        );
        let gateway = Gateway::start(&yaml).await;
        checks(&gateway, "odd", "bad", 3.0).await;
        assert!(!gateway.log().contains("panic"), "{}", gateway.log());
    }
}
