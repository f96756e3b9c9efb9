//! People hear of what is wrong, and of its end.

use std::net::SocketAddr;

use forebay::sim::{Sim, SimOptions};
use serde_json::Value;

use crate::support::{
    Connection, Gateway, Scripted, chat, chat_stream, eventually,
    gateway::free_port,
    group_of,
    http::{build, get, post_chat},
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
    // The command, too.
    gateway.metric_becomes(series, 2.0).await;
    let told = alerts(&hook);
    assert_eq!(told.len(), 1, "{told:?}");
    let text = told[0]["text"].as_str().unwrap();
    assert!(text.starts_with(":red_circle: gate: fallback *:"), "{text}");
}

/// A gateway with these lists of `alert`, whose webhooks are `env:A` and `env:B`.
async fn start_two(a: &Scripted, b: &Scripted, alerts: &str, groups: &str) -> Gateway {
    let yaml = with_alerts(alerts, groups);
    let urls = [a, b].map(|hook| format!("{}/secret-path", hook.url()));
    Gateway::start_with(&yaml, &[], &[("A", &urls[0]), ("B", &urls[1])]).await
}

fn with_alerts(alerts: &str, groups: &str) -> String {
    format!("plugins:\n  - auth: none\n{alerts}{groups}")
}

fn alert_to(hook: &str) -> String {
    format!("  - alert: {{ webhooks: [{{ url: \"env:{hook}\" }}], on: [down] }}\n")
}

async fn hook() -> Scripted {
    Scripted::always(json(200, "{}")).await
}

#[tokio::test]
async fn every_entry_is_told_everything() {
    let (a, b, spare) = (hook().await, hook().await, sim("spare").await);
    let dead = free_port();
    let groups = dead_with_fallback(dead, &spare);
    let both = alert_to("A") + &alert_to("B");
    let gateway = start_two(&a, &b, &both, &groups).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    eventually("both hear of it", async || {
        has(&a, "down", "firing", "gpu") && has(&b, "down", "firing", "gpu")
    })
    .await;
    let back = SimOptions {
        listen: dead,
        name: "back".to_owned(),
        ..SimOptions::default()
    };
    let _back = Sim::start(back).await.unwrap();
    gateway.reset(None).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    eventually("both hear of its end", async || {
        has(&a, "down", "recovered", "gpu") && has(&b, "down", "recovered", "gpu")
    })
    .await;
    assert_eq!((alerts(&a).len(), alerts(&b).len()), (2, 2));
}

#[tokio::test]
async fn after_a_reload_the_new_receiver_is_told_though_old_streams_live() {
    let (a, b, spare) = (hook().await, hook().await, sim("spare").await);
    let groups = dead_with_fallback(free_port(), &spare);
    // Of one that stays down both are told, the second when it comes.
    let gateway = start_two(&a, &b, &alert_to("A"), &groups).await;
    spare.fault("gap=50;tokens=2000").await.unwrap();
    let mut stream = Connection::open(gateway.addr).await;
    let request = build(
        "POST",
        "/v1/chat/completions",
        &[],
        chat_stream("demo").as_bytes(),
    );
    stream.send(&request).await;
    stream.read_until("chat.completion.chunk").await;
    eventually("the first one hears of it", async || {
        has(&a, "down", "firing", "gpu")
    })
    .await;

    let other = format!("http://{}/v1", free_port());
    let more = groups.replace(
        "routes:\n",
        &format!(
            "{}routes:\n  - {{ model: other, groups: [h], fallback: f, rewrite: {{ h: demo, f: demo }} }}\n",
            group_of("h", "", &[upstream_at("gpu-2", &other, "")])
        ),
    );
    gateway.write_config(&with_alerts(&alert_to("B"), &more));
    assert_eq!(gateway.reload().await.status, 200);
    spare.fault("").await.unwrap();
    assert_eq!(post_chat(gateway.addr, &chat("other")).await.status, 200);
    eventually("the second one hears of both", async || {
        has(&b, "down", "firing", "gpu-2") && has(&b, "down", "firing", "gpu")
    })
    .await;
    assert_eq!(alerts(&a).len(), 1, "{:?}", alerts(&a));
}

#[tokio::test]
async fn what_nobody_could_be_told_is_told_when_he_is_back() {
    let (away, spare) = (free_port(), sim("spare").await);
    let groups = dead_with_fallback(free_port(), &spare);
    let yaml = with_alerts(&alert_to("A"), &groups);
    let url = format!("http://{away}/hook");
    let gateway = Gateway::start_with(&yaml, &[], &[("A", &url)]).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    let failed = r#"forebay_alerts_total{kind="down",result="failed"}"#;
    eventually("it fails more than once", async || {
        gateway
            .metric(failed)
            .await
            .is_some_and(|count| count >= 2.0)
    })
    .await;
    let back = Scripted::always_at(away, json(200, "{}")).await;
    eventually("it is told", async || has(&back, "down", "firing", "gpu")).await;
    gateway
        .metric_becomes(r#"forebay_alerts_total{kind="down",result="sent"}"#, 1.0)
        .await;
    assert_eq!(alerts(&back).len(), 1);
}

#[tokio::test]
async fn a_webhook_that_fails_costs_no_request_anything_and_is_tried_again() {
    let (hook, spare) = (Scripted::always(json(500, "{}")).await, sim("spare").await);
    let groups = dead_with_fallback(free_port(), &spare);
    let gateway = start(&hook, "json", ", on: [down]", &groups).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    eventually("it is tried again", async || hook.asked() >= 3).await;
    gateway.logged("alert not delivered").await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}
