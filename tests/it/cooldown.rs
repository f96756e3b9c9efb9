//! Pauses that upstreams ask for, and credentials that are no good.

use crate::support::{
    Gateway, Scripted, chat, group_with,
    http::{ask, get, post, post_chat},
    one_group,
    scripted::json,
    sim, upstream_at,
};

/// The state, and how long it lasts.
async fn state(gateway: &Gateway, upstream: &str) -> (String, f64) {
    let all = get(gateway.admin, "/upstreams").await.json();
    let mut all = all["upstreams"].as_array().unwrap().iter();
    let one = all.find(|one| one["name"] == upstream).unwrap();
    let seconds = one["seconds"].as_f64().unwrap_or(0.0);
    (gateway.state(upstream).await, seconds)
}

#[tokio::test]
async fn each_refusal_leaves_the_upstream_alone_as_long_as_it_means() {
    for (fault, wanted, least, most) in [
        ("status=429;retry_after=7", "cooling rate_limit", 1.0, 7.0),
        (
            "status=429;retry_after=9999",
            "cooling rate_limit",
            1700.0,
            1800.0,
        ),
        ("status=429", "cooling rate_limit", 20.0, 30.0),
        ("status=503;retry_after=60", "cooling overload", 50.0, 60.0),
        ("status=402", "cooling quota", 230.0, 360.0),
        ("status=429;body=quota", "cooling quota", 230.0, 360.0),
        ("status=401", "down key_bad", 230.0, 360.0),
        ("status=403", "down key_bad", 15.0, 36.0),
    ] {
        let (bad, good) = (sim("bad").await, sim("good").await);
        bad.fault(fault).await.unwrap();
        let gateway = Gateway::start(&one_group(&[&bad, &good])).await;
        for _ in 0..6 {
            let answer = post_chat(gateway.addr, &chat("demo")).await;
            assert_eq!((answer.status, answer.upstream()), (200, "good"), "{fault}");
        }
        assert_eq!(bad.records().len(), 1, "{fault}");
        let (state, seconds) = state(&gateway, "bad").await;
        assert_eq!(state, wanted, "{fault}");
        assert!((least..=most).contains(&seconds), "{fault}: {seconds}");
        gateway.logged("upstream's state changed: name=bad").await;
        let (to, reason) = wanted.split_once(' ').unwrap();
        let series = format!(
            "forebay_upstream_transitions_total{{reason=\"{reason}\",to=\"{to}\",upstream=\"bad\"}}"
        );
        assert_eq!(gateway.metric(&series).await, Some(1.0), "{fault}");
    }
}

#[tokio::test]
async fn pauses_without_a_time_double_up_to_cooldown() {
    let only = sim("only").await;
    only.fault("status=429").await.unwrap();
    let gateway = Gateway::start(&group_with(&["cooldown: 1s"], &[&only])).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(
        (answer.status, answer.header("retry-after")),
        (429, Some("1"))
    );
    only.clear_faults().await;
    gateway.state_becomes("only", "ready").await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}

#[tokio::test]
async fn a_bad_key_is_told_the_same_way_whether_the_upstream_is_asked_or_not() {
    for fault in ["status=401", "status=403"] {
        let only = sim("only").await;
        only.fault(fault).await.unwrap();
        let gateway = Gateway::start(&one_group(&[&only])).await;
        for _ in 0..4 {
            let answer = post_chat(gateway.addr, &chat("demo")).await;
            assert_eq!(
                (answer.status, answer.error_code().as_str()),
                (502, "upstream_auth"),
                "{fault}"
            );
        }
        assert_eq!(only.records().len(), 1, "{fault}");
    }
}

#[tokio::test]
async fn no_quota_anywhere_is_no_bad_key_and_says_when_it_is_looked_at_again() {
    for fault in [
        "status=402",
        "status=429;body=quota;retry_after=7",
        "status=400;body=quota",
    ] {
        let (a, b) = (sim("a").await, sim("b").await);
        for one in [&a, &b] {
            one.fault(fault).await.unwrap();
        }
        let gateway = Gateway::start(&one_group(&[&a, &b])).await;
        // Whether they are asked or not.
        for _ in 0..3 {
            let answer = post_chat(gateway.addr, &chat("demo")).await;
            let told = (answer.status, answer.error_code());
            assert_eq!(told, (503, "upstream_quota".to_owned()), "{fault}");
            let wait = answer.header("retry-after").unwrap();
            let wait: u64 = wait.parse().unwrap();
            assert!((200..=300).contains(&wait), "{fault}: {wait}");
        }
        assert_eq!((a.records().len(), b.records().len()), (1, 1), "{fault}");
        assert_eq!(gateway.state("a").await, "cooling quota");
    }
}

#[tokio::test]
async fn who_can_be_asked_again_the_soonest_says_when() {
    let (a, b, c) = (sim("a").await, sim("b").await, sim("c").await);
    a.fault("status=429;retry_after=90").await.unwrap();
    b.fault("status=429;retry_after=20").await.unwrap();
    c.fault("status=402").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&a, &b, &c])).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(
        (answer.status, answer.header("retry-after")),
        (429, Some("20"))
    );
}

#[tokio::test]
async fn one_forbidden_prompt_takes_no_account_out() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&one_group(&[&a, &b])).await;
    for _ in 0..2 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    for one in [&a, &b] {
        one.fault("status=403;body=empty;times=1").await.unwrap();
    }
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    let told = (answer.status, answer.error_code());
    assert_eq!(told, (403, "request_forbidden".to_owned()));
    for name in ["a", "b"] {
        assert_eq!(gateway.state(name).await, "ready");
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    // Said twice in a row, it is the key.
    a.fault("status=403;body=empty").await.unwrap();
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    }
    assert_eq!(gateway.state("a").await, "down key_bad");
}

#[tokio::test]
async fn accounts_at_one_host_have_each_their_own_state() {
    let cloud = Scripted::always(json(
        429,
        r#"{"error":{"message":"slow down","type":"x","param":null,"code":null}}"#,
    ))
    .await;
    let good = sim("good").await;
    let url = format!("http://{}", cloud.addr);
    let upstreams = [
        upstream_at("account-1", &format!("{url}/1/v1"), ""),
        upstream_at("account-2", &format!("{url}/2/v1"), ""),
        upstream_at("good", &good.url(), ""),
    ];
    let yaml = format!(
        "limits: {{ attempts: 2 }}\ngroups:\n  g:\n    upstreams:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        upstreams.concat()
    );
    let gateway = Gateway::start(&yaml).await;
    post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(gateway.state("account-1").await, "cooling rate_limit");
    // Both were tried; each is told of by itself, and freed by itself.
    assert_eq!(gateway.state("account-2").await, "cooling rate_limit");
    gateway.reset(Some("account-1")).await;
    assert_eq!(gateway.state("account-1").await, "ready");
    assert_eq!(gateway.state("account-2").await, "cooling rate_limit");
}

#[tokio::test]
async fn a_new_key_counts_at_once() {
    let strict = forebay::sim::SimOptions {
        api_key: Some("right".to_owned()),
        ..forebay::sim::SimOptions::quick("strict")
    };
    let strict = forebay::sim::Sim::start(strict).await.unwrap();
    let yaml = |file: &str| {
        format!(
            "groups:\n  g:\n    upstreams:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            upstream_at("strict", &strict.url(), &format!("key: \"file:{file}\""))
        )
    };
    let files = [("old.key", "wrong"), ("new.key", "right")];
    let gateway = Gateway::start_with(&yaml("old.key"), &files, &[]).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 502);
    assert_eq!(gateway.state("strict").await, "down key_bad");
    gateway.write_config(&yaml("new.key"));
    assert_eq!(gateway.reload().await.status, 200);
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}

#[tokio::test]
async fn what_is_drained_gets_nothing_new_and_finishes_what_it_has() {
    let (a, b) = (sim("a").await, sim("b").await);
    a.fault("gap=20").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&a, &b])).await;
    let body = crate::support::chat_stream("demo");
    let mut client = crate::support::Connection::open(gateway.addr).await;
    client
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    client.read_until("data: ").await;
    let drained = post(gateway.admin, "/upstreams/a/drain", &[], b"").await;
    assert_eq!(drained.json()["upstreams"][0]["state"], "draining");
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    }
    let answer = client.answer().await;
    assert_eq!(answer.upstream(), "a");
    assert!(answer.text().contains("[DONE]"), "{}", answer.text());
    // It survives a reload, and is taken back by hand.
    assert_eq!(gateway.reload().await.status, 200);
    assert_eq!(gateway.state("a").await, "draining");
    post(gateway.admin, "/upstreams/a/undrain", &[], b"").await;
    assert_eq!(gateway.state("a").await, "ready");
    let calls = a.records().len();
    post_chat(gateway.addr, &chat("demo")).await;
    post_chat(gateway.addr, &chat("demo")).await;
    assert!(a.records().len() > calls);
}

#[tokio::test]
async fn what_the_configuration_drains_is_not_taken_back_by_hand() {
    let (a, b) = (sim("a").await, sim("b").await);
    let upstreams = [
        upstream_at("a", &a.url(), "drain: true"),
        upstream_at("b", &b.url(), ""),
    ];
    let yaml = format!(
        "groups:\n  g:\n    upstreams:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        upstreams.concat()
    );
    let gateway = Gateway::start(&yaml).await;
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    }
    let answer = post(gateway.admin, "/upstreams/a/undrain", &[], b"").await;
    assert_eq!(answer.status, 409);
    assert_eq!(gateway.state("a").await, "draining");
    for (path, status) in [
        ("/upstreams/nobody/reset", 404),
        ("/upstreams/a/destroy", 404),
        ("/upstreams/a/reset", 200),
    ] {
        assert_eq!(post(gateway.admin, path, &[], b"").await.status, status);
    }
    let got = ask(gateway.admin, "GET", "/upstreams/reset", &[], b"").await;
    assert_eq!(got.status, 405);
}
