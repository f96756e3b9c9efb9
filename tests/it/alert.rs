//! People hear of what is wrong, and of its end.

use std::net::SocketAddr;

use forebay::sim::{Sim, SimOptions};
use serde_json::Value;

use crate::support::{
    Gateway, Scripted, chat, eventually,
    gateway::free_port,
    group_of,
    http::{get, post_chat},
    scripted::json,
    sim, upstream_at,
};

/// Where alerts go, and the gateway that sends them.
async fn start(hook: &Scripted, format: &str, settings: &str, groups: &str) -> Gateway {
    let yaml = format!(
        "plugins:\n  - auth: none\n  - alert: {{ webhooks: [{{ url: env:HOOK, format: {format} }}], source: gate{settings} }}\n{groups}"
    );
    let url = format!("{}/secret-path", hook.url());
    Gateway::start_with(&yaml, &[], &[("HOOK", &url)]).await
}

/// One upstream that nobody listens at, and a fallback.
fn dead_with_fallback(dead: SocketAddr, spare: &Sim) -> String {
    let url = format!("http://{dead}/v1");
    format!(
        "groups:\n{}{}routes:\n  - {{ model: \"*\", groups: [g], fallback: f }}\n",
        group_of("g", "", &[upstream_at("gpu", &url, "")]),
        group_of("f", "", &[upstream_at("spare", &spare.url(), "")]),
    )
}

fn alerts(hook: &Scripted) -> Vec<Value> {
    hook.requests()
        .iter()
        .map(|request| request.json())
        .collect()
}

fn has(hook: &Scripted, kind: &str, state: &str, subject: &str) -> bool {
    alerts(hook).iter().any(|alert| {
        alert["kind"] == kind && alert["state"] == state && alert["subject"] == subject
    })
}

#[tokio::test]
async fn an_upstream_that_is_down_and_the_fallback_in_use_are_told_once_and_so_is_the_end() {
    let (hook, spare) = (Scripted::always(json(200, "{}")).await, sim("spare").await);
    let dead = free_port();
    let groups = dead_with_fallback(dead, &spare);
    let gateway = start(&hook, "json", "", &groups).await;
    for _ in 0..5 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.upstream(), "spare");
    }
    eventually("both are told", async || {
        has(&hook, "down", "firing", "gpu") && has(&hook, "fallback", "firing", "*")
    })
    .await;
    let back = SimOptions {
        listen: dead,
        name: "back".to_owned(),
        ..SimOptions::default()
    };
    let back = Sim::start(back).await.unwrap();
    gateway.reset(None).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.upstream(), "gpu", "{}", back.url());
    eventually("the end is told", async || {
        has(&hook, "down", "recovered", "gpu")
    })
    .await;
    let count = |kind: &str| {
        alerts(&hook)
            .iter()
            .filter(|alert| alert["kind"] == kind && alert["state"] == "firing")
            .count()
    };
    assert_eq!((count("down"), count("fallback")), (1, 1));
    let secret = get(gateway.admin, "/metrics")
        .await
        .text()
        .contains("secret-path")
        || gateway.log().contains("secret-path");
    assert!(!secret, "the URL of a webhook is a secret");
}

#[tokio::test]
async fn slack_reads_its_own_shape_and_who_asked_for_one_kind_hears_of_no_other() {
    let (hook, spare) = (Scripted::always(json(200, "{}")).await, sim("spare").await);
    let groups = dead_with_fallback(free_port(), &spare);
    let gateway = start(
        &hook,
        "slack",
        ", on: [fallback], command: [\"true\"]",
        &groups,
    )
    .await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    eventually("it is told", async || hook.asked() > 0).await;
    let series = r#"forebay_alerts_total{kind="fallback",result="sent"}"#;
    gateway.metric_becomes(series, 1.0).await;
    let told = alerts(&hook);
    assert_eq!(told.len(), 1, "{told:?}");
    let text = told[0]["text"].as_str().unwrap();
    assert!(text.starts_with(":red_circle: gate: fallback *:"), "{text}");
}

#[tokio::test]
async fn a_webhook_that_fails_costs_no_request_anything() {
    let (hook, spare) = (Scripted::always(json(500, "{}")).await, sim("spare").await);
    let groups = dead_with_fallback(free_port(), &spare);
    let gateway = start(&hook, "json", ", on: [down]", &groups).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    gateway
        .metric_becomes(r#"forebay_alerts_total{kind="down",result="failed"}"#, 1.0)
        .await;
    assert_eq!(hook.asked(), 3, "it is tried three times");
}
