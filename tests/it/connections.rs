//! The connections to upstreams: pooled, stale, broken, encrypted; and the body
//! that is sent again on each.

use std::time::Duration;

use crate::support::{
    self, Connection, Gateway, Scripted, chat, chat_stream, eventually, group_of,
    http::{Answer, get, post_chat},
    one_group,
    scripted::{json, tls_file},
    sim, upstream_at,
};
use forebay::sim::{Sim, State};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

fn group_with(upstreams: &[String]) -> String {
    format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        group_of("g", "", upstreams)
    )
}

/// The number of each request's connection, in order.
fn connections(sim: &Sim) -> Vec<u64> {
    sim.records()
        .iter()
        .map(|record| record.connection)
        .collect()
}

fn attempts(answer: &Answer) -> &str {
    answer.header("x-forebay-attempts").unwrap_or("")
}

// --- the pool ---

#[tokio::test]
async fn a_connection_is_used_again() {
    let a = sim("a").await;
    let gateway = Gateway::start(&one_group(&[&a])).await;
    // On a busy machine the end of a stream may come too late to wait for.
    eventually("four in a row have one connection", async || {
        for body in [chat("demo"), chat_stream("demo")] {
            assert_eq!(post_chat(gateway.addr, &body).await.status, 200);
        }
        let all = connections(&a);
        let last = all.iter().rev().take(4);
        last.collect::<std::collections::HashSet<_>>().len() == 1 && all.len() >= 4
    })
    .await;
    let all = connections(&a);
    let used = |source: &str| {
        format!("forebay_upstream_connections_total{{source=\"{source}\",upstream=\"a\"}}")
    };
    let made = *all.iter().max().expect("four are there") as f64;
    assert_eq!(gateway.metric(&used("new")).await, Some(made));
    let pooled = all.len() as f64 - made;
    assert_eq!(gateway.metric(&used("pool")).await, Some(pooled));
}

#[tokio::test]
async fn a_connection_is_used_again_after_an_error_that_was_read_whole() {
    let a = sim("a").await;
    let gateway = Gateway::start(&one_group(&[&a])).await;
    for fault in [
        "status=500;times=1",
        "status=400;times=1",
        "refuse_model;times=1",
        "1xx=103;times=1",
        "trailers;times=1",
    ] {
        a.fault(fault).await.unwrap();
        post_chat(gateway.addr, &chat("demo")).await;
    }
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    assert_eq!(connections(&a), [1; 6]);
}

#[tokio::test]
async fn a_connection_is_not_used_again_when_it_may_not_be() {
    for fault in [
        "close",
        "http10",
        "te_cl",
        "duplicate_te",
        "content_length=short",
        "content_length=long",
        "gzip",
        "die_at=3",
        "error_at=2",
    ] {
        for body in [chat("demo"), chat_stream("demo")] {
            let a = sim("a").await;
            a.fault(&format!("{fault};times=1")).await.unwrap();
            let gateway = Gateway::start(&one_group(&[&a])).await;
            post_chat(gateway.addr, &body).await;
            let after = post_chat(gateway.addr, &chat("demo")).await;
            assert_eq!(after.status, 200, "{fault}");
            assert!(
                after.content().starts_with("a answers:"),
                "{fault}: {}",
                after.text()
            );
            let used = connections(&a);
            // An error event is read with the rest of the stream, if it came.
            if fault != "error_at=2" {
                assert_ne!(used.first(), used.last(), "{fault}");
            }
        }
    }
}

#[tokio::test]
async fn bytes_after_an_answer_are_never_taken_for_the_next() {
    let mut bytes = json(200, r#"{"choices":[],"n":1}"#);
    bytes.extend(json(200, r#"{"choices":[],"n":2,"stolen":true}"#));
    let upstream = Scripted::always(bytes).await;
    let gateway = Gateway::start(&group_with(&[upstream_at("up", &upstream.url(), "")])).await;
    for _ in 0..3 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        if answer.status == 200 {
            assert!(!answer.text().contains("stolen"), "{}", answer.text());
        }
    }
    let used: Vec<u64> = upstream
        .requests()
        .iter()
        .map(|request| request.connection)
        .collect();
    assert!(used.windows(2).all(|pair| pair[0] != pair[1]), "{used:?}");
}

#[tokio::test]
async fn a_stale_connection_costs_one_retry_that_nobody_notices() {
    for stale in ["stale=now", "stale=next"] {
        for body in [chat("demo"), chat_stream("demo")] {
            let (a, b) = (sim("a").await, sim("b").await);
            a.fault(&format!("{stale};times=1")).await.unwrap();
            let gateway = Gateway::start(&one_group(&[&a])).await;
            assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
            let answer = post_chat(gateway.addr, &body).await;
            assert_eq!((answer.status, answer.upstream()), (200, "a"), "{stale}");
            assert_eq!(attempts(&answer), "1", "{stale}");
            assert_eq!(connections(&a), [1, 2], "{stale}");
            let series = "forebay_attempts_total{group=\"gpus\",upstream=\"a\",verdict=\"failed\"}";
            assert_eq!(gateway.metric(series).await, None, "{stale}");
            drop(b);
        }
    }
}

#[tokio::test]
async fn stale_connections_do_not_take_an_upstream_down() {
    let (a, last) = (sim("a").await, sim("last").await);
    a.fault("stale=next").await.unwrap();
    let gateway = Gateway::start(&crate::support::with_fallback(&[&a], &last)).await;
    // Many more than it takes failures in a row to be down.
    for _ in 0..12 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!((answer.upstream(), attempts(&answer)), ("a", "1"));
    }
    assert_eq!(last.records().len(), 0);
}

#[tokio::test]
async fn a_fresh_connection_that_breaks_after_a_stale_one_is_a_failure() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&crate::support::with_fallback(&[&a], &b)).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "a");
    // The pooled connection is reset, and so is the fresh one: not a third.
    a.fault("reset").await.unwrap();
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.upstream(), attempts(&answer)), ("b", "2"));
    assert_eq!(a.records().len(), 3);
}

#[tokio::test]
async fn a_restarted_upstream_is_reached_over_a_new_connection() {
    let a = sim("a").await;
    let gateway = Gateway::start(&one_group(&[&a])).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    a.stop().await;
    a.start_again().await.unwrap();
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.status, attempts(&answer)), (200, "1"));
}

#[tokio::test]
async fn work_that_dies_with_a_pooled_connection_is_no_stale_connection() {
    let (dying, steady) = (sim("dying").await, sim("steady").await);
    let yaml = support::group_with(&["retry_ambiguous: false"], &[&dying, &steady]);
    let gateway = Gateway::start(&yaml).await;
    // Each has a connection in the pool now.
    for _ in 0..2 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    dying.fault("hang").await.unwrap();
    let mut client = Connection::open(gateway.addr).await;
    let body = chat("demo");
    client
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    eventually("it is asked", async || dying.records().len() == 2).await;
    assert!(client.stays_open(Duration::from_millis(1200)).await);
    dying.stop().await;
    let answer = client.answer().await;
    // Perhaps it was done, and it is not to be done twice.
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert_eq!((dying.records().len(), steady.records().len()), (2, 1));
}

#[tokio::test]
async fn an_idle_connection_is_given_up_before_the_server_does() {
    let a = sim("a").await;
    let keys = "timeouts: { idle: 100ms }";
    let gateway = Gateway::start(&group_with(&[upstream_at("a", &a.url(), keys)])).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    eventually("the idle connection is closed", || async {
        a.connections().open == 0
    })
    .await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    assert_eq!(connections(&a), [1, 2]);
}

// --- the body, again ---

/// A chat request of about this many bytes, no two blocks of it alike.
fn large(bytes: usize) -> String {
    let block = "All work and no play. ".repeat(180);
    let mut text = String::with_capacity(bytes + block.len());
    for number in 0.. {
        if text.len() >= bytes {
            break;
        }
        text.push_str(&format!("{number} {block}"));
    }
    format!(r#"{{"model":"demo","messages":[{{"role":"user","content":"{text}"}}]}}"#)
}

async fn is_sent_again(bytes: usize, faults: &[&str]) {
    let body = large(bytes);
    for fault in faults {
        let a = sim("a").await;
        a.fault(fault).await.unwrap();
        // Not a simulator: that would count the words of the prompt.
        let b = Scripted::always(json(200, r#"{"choices":[]}"#)).await;
        let upstreams = [
            upstream_at("a", &a.url(), ""),
            upstream_at("b", &b.url(), ""),
        ];
        let gateway = Gateway::start(&group_with(&upstreams)).await;
        // Step by step: a debug build takes its time over 31 MB, and each step
        // has a deadline of its own.
        let mut connection = Connection::open(gateway.addr).await;
        let path = "/v1/chat/completions";
        connection.request("POST", path, &[], body.as_bytes()).await;
        eventually(fault, || async { a.records().len() == 1 }).await;
        eventually("b is asked", || async { b.asked() == 1 }).await;
        let answer = connection.answer().await;
        assert_eq!((answer.status, answer.upstream()), (200, "b"), "{fault}");
        assert_eq!(attempts(&answer), "2", "{fault}");
        let requests = b.requests();
        assert_eq!(requests.len(), 1, "{fault}");
        // Not assert_eq: nobody wants to read the two.
        assert!(requests[0].body == body.as_bytes(), "{fault}");
    }
}

const AFTER: [&str; 4] = [
    "status=503",
    "early=503",
    "reset",
    "early=503;early_then=read",
];

#[tokio::test]
async fn five_megabytes_are_sent_again_to_the_byte() {
    is_sent_again(5 << 20, &AFTER).await;
}

#[tokio::test]
async fn thirty_one_megabytes_are_sent_again_to_the_byte() {
    is_sent_again(31 << 20, &AFTER[..3]).await;
}

#[tokio::test]
async fn a_body_is_sent_again_after_an_upstream_that_never_read_it() {
    // It accepts connections, and that is all.
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", deaf.local_addr().unwrap());
    for megabytes in [1, 9] {
        let b = Scripted::always(json(200, r#"{"choices":[]}"#)).await;
        let keys = "timeouts: { write: 300ms, first_token: 300ms }";
        let upstreams = [
            upstream_at("deaf", &url, keys),
            upstream_at("b", &b.url(), ""),
        ];
        let gateway = Gateway::start(&group_with(&upstreams)).await;
        let body = large(megabytes << 20);
        let answer = post_chat(gateway.addr, &body).await;
        assert_eq!((answer.status, answer.upstream()), (200, "b"));
        assert!(b.requests()[0].body == body.as_bytes());
    }
}

#[tokio::test]
async fn an_early_refusal_of_a_large_body_reaches_the_client_once() {
    for (early, status) in [(413, 413), (400, 400), (401, 502), (429, 429)] {
        let a = sim("a").await;
        a.fault(&format!("early={early};body=openai"))
            .await
            .unwrap();
        let gateway = Gateway::start(&one_group(&[&a])).await;
        let answer = post_chat(gateway.addr, &large(6 << 20)).await;
        assert_eq!(answer.status, status, "{early}: {}", answer.text());
        answer.error_code();
        assert_eq!(a.records().len(), 1);
        assert!(!a.records()[0].body_complete);
    }
}

#[tokio::test]
async fn a_connection_whose_request_was_not_taken_whole_is_not_used_again() {
    let a = sim("a").await;
    a.fault("early=400;early_then=read;times=1").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&a])).await;
    let answer = post_chat(gateway.addr, &large(6 << 20)).await;
    assert_eq!(answer.status, 400);
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.status, 200);
    let records = a.records();
    let used = connections(&a);
    assert!(records[0].body_complete || used[0] != used[1], "{used:?}");
    assert_eq!(records[1].state, State::Finished);
    assert_eq!(records[1].body, chat("demo").as_bytes());
}

// --- TLS ---

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_not_accepted() {
    let upstream = Scripted::over_tls("server", json(200, r#"{"choices":[]}"#)).await;
    let b = sim("b").await;
    let url = format!("https://{}/v1", upstream.addr);
    let gateway = Gateway::start(&group_with(&[upstream_at("up", &url, "")])).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (502, "upstream_tls")
    );
    assert!(!answer.text().to_lowercase().contains("certificate"));
    assert_eq!(gateway.state("up").await, "down tls");
    gateway.logged("reason=tls").await;

    // It was not sent, so the next may be asked freely.
    let upstreams = [upstream_at("up", &url, ""), upstream_at("b", &b.url(), "")];
    let gateway = Gateway::start(&group_with(&upstreams)).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn an_own_authority_beside_the_configuration_is_trusted_and_the_name_still_counts() {
    let upstream = Scripted::over_tls("server", json(200, r#"{"choices":[]}"#)).await;
    let pem = std::fs::read_to_string(tls_file("authority.pem")).unwrap();
    let files = [("authority.pem", pem.as_str())];
    let elsewhere = Scripted::over_tls("elsewhere", json(200, r#"{"choices":[]}"#)).await;
    for (host, at, wanted) in [
        ("127.0.0.1", &upstream, 200),
        ("localhost", &upstream, 200),
        ("127.0.0.1", &elsewhere, 502),
        ("localhost", &elsewhere, 502),
    ] {
        let url = format!("https://{host}:{}/v1", at.addr.port());
        let yaml = group_with(&[upstream_at("up", &url, "tls: { ca: authority.pem }")]);
        let gateway = Gateway::start_with(&yaml, &files, &[]).await;
        for _ in 0..2 {
            let answer = post_chat(gateway.addr, &chat("demo")).await;
            assert_eq!(answer.status, wanted, "{host}");
        }
    }
    assert_eq!(elsewhere.requests().len(), 0);
    // Two requests each, over one connection.
    let used: Vec<u64> = upstream
        .requests()
        .iter()
        .map(|request| request.connection)
        .collect();
    assert_eq!(used.len(), 4);
    assert_eq!((used[0], used[2]), (used[1], used[3]));
}

#[tokio::test]
async fn an_authority_that_did_not_sign_it_does_not_help() {
    let upstream = Scripted::over_tls("server", json(200, r#"{"choices":[]}"#)).await;
    let url = format!("https://{}/v1", upstream.addr);
    let other = include_str!("../../conf/examples/ca.pem");
    let yaml = group_with(&[upstream_at("up", &url, "tls: { ca: other.pem }")]);
    let gateway = Gateway::start_with(&yaml, &[("other.pem", other)], &[]).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 502);
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn a_certificate_is_not_checked_where_that_is_wanted_and_said_aloud() {
    let upstream = Scripted::over_tls("server", json(200, r#"{"choices":[]}"#)).await;
    for host in ["127.0.0.1", "localhost"] {
        let url = format!("https://{host}:{}/v1", upstream.addr.port());
        let gateway = Gateway::start(&group_with(&[upstream_at(
            "up",
            &url,
            "tls: { verify: false }",
        )]))
        .await;
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
        gateway.logged("certificate is not checked: name=up").await;
    }
    let head = &upstream.requests()[0].head;
    assert!(
        head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"),
        "{head}"
    );
}

/// What is wrong with TLS to an upstream, as people are shown.
async fn tls_fault(gateway: &Gateway) -> String {
    let all = get(gateway.admin, "/upstreams").await.json();
    let detail = all["upstreams"][0]["detail"].as_str();
    detail.unwrap_or_default().to_owned()
}

#[tokio::test]
async fn each_failure_of_tls_is_told_as_such_and_shown_with_its_reason() {
    let answer = || json(200, r#"{"choices":[]}"#);
    let (trusted, past) = ("authority.pem", "expired-authority.pem");
    let files: Vec<(&str, String)> = [trusted, past]
        .map(|name| (name, std::fs::read_to_string(tls_file(name)).unwrap()))
        .into();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, pem)| (*name, &**pem)).collect();
    let series = |verdict: &str| {
        format!("forebay_attempts_total{{group=\"g\",upstream=\"up\",verdict=\"{verdict}\"}}")
    };
    for (server, authority, fault) in [
        (
            Scripted::over_tls("expired", answer()).await,
            past,
            "certificate_expired",
        ),
        (
            Scripted::over_tls("elsewhere", answer()).await,
            trusted,
            "certificate_for_another_name",
        ),
        (
            Scripted::over_tls("server", answer()).await,
            past,
            "certificate_not_trusted",
        ),
        (
            Scripted::among_friends(answer()).await,
            trusted,
            "handshake_refused",
        ),
    ] {
        let url = format!("https://127.0.0.1:{}/v1", server.addr.port());
        let keys = format!("tls: {{ ca: {authority} }}");
        let yaml = group_with(&[upstream_at("up", &url, &keys)]);
        let gateway = Gateway::start_with(&yaml, &files, &[]).await;
        let told = post_chat(gateway.addr, &chat("demo")).await;
        let code = told.error_code();
        assert_eq!((told.status, &*code), (502, "upstream_tls"), "{fault}");
        assert_eq!(gateway.state("up").await, "down tls", "{fault}");
        assert_eq!(tls_fault(&gateway).await, fault);
        assert_eq!(gateway.metric(&series("tls")).await, Some(1.0), "{fault}");
        assert_eq!(gateway.metric(&series("not_sent")).await, None, "{fault}");
        gateway.logged("error=upstream_tls").await;
        assert_eq!(server.asked(), 0, "{fault}");
    }
}

#[tokio::test]
async fn a_server_that_speaks_no_tls_is_told_from_one_that_is_not_there() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/v1", listener.local_addr().unwrap());
    let serving = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let said = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
            stream.write_all(said).await.ok();
            while let Ok(1..) = stream.read(&mut [0; 1024]).await {}
        }
    });
    let gateway = Gateway::start(&group_with(&[upstream_at("up", &url, "")])).await;
    let told = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((told.status, &*told.error_code()), (502, "upstream_tls"));
    assert_eq!(tls_fault(&gateway).await, "handshake_failed");
    serving.abort();
}

#[tokio::test]
async fn a_failure_of_tls_costs_nothing_where_another_can_answer_and_is_over_when_it_is_mended() {
    let pem = std::fs::read_to_string(tls_file("authority.pem")).unwrap();
    let upstream = Scripted::over_tls("server", json(200, r#"{"choices":[]}"#)).await;
    let b = sim("b").await;
    let url = format!("https://127.0.0.1:{}/v1", upstream.addr.port());
    let yaml = |tls: &str| {
        group_with(&[
            upstream_at("up", &url, &format!("weight: 1000{tls}")),
            upstream_at("b", &b.url(), ""),
        ])
        .replace("    upstreams:", "    check: { every: 1h }\n    upstreams:")
    };
    let files = [("authority.pem", pem.as_str())];
    let gateway = Gateway::start_with(&yaml(""), &files, &[]).await;
    for _ in 0..20 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!((answer.status, answer.upstream()), (200, "b"));
    }
    // It was found out once, and then known.
    let series = "forebay_attempts_total{group=\"g\",upstream=\"up\",verdict=\"tls\"}";
    assert!(gateway.metric(series).await.unwrap_or_default() <= 1.0);
    assert_eq!(tls_fault(&gateway).await, "certificate_not_trusted");
    gateway.write_config(&yaml(", tls: { ca: authority.pem }"));
    gateway.reload().await;
    eventually("it is used", || async {
        post_chat(gateway.addr, &chat("demo")).await.upstream() == "up"
    })
    .await;
    assert_eq!(tls_fault(&gateway).await, "");
}
