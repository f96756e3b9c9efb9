//! What happens where all upstreams of a group are busy: who waits, who is
//! next, who is turned away, and what they are told.

use std::time::{Duration, Instant};

use forebay::plugins::hash_token;
use futures_util::future::join_all;

use crate::support::{
    Answer, Connection, Gateway,
    by_hand::{ByHand, Call, delta},
    chat, chat_stream, eventually, group_of, sim, upstream_at,
};

const PATH: &str = "/v1/chat/completions";
/// Whoever is turned away while he would have to wait a minute was not kept waiting.
const AT_ONCE: Duration = Duration::from_secs(5);

/// One upstream by hand that takes one request at a time; `keys` are the group's.
fn one_slot(upstream: &ByHand, keys: &str) -> String {
    format!(
        "{}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
        groups(upstream, keys)
    )
}

fn groups(upstream: &ByHand, keys: &str) -> String {
    let one = format!(
        "      - {{ name: gpu-1, url: \"{}\", concurrent: 1 }}\n",
        upstream.url()
    );
    let keys: String = keys
        .lines()
        .map(|key| format!("    {}\n", key.trim()))
        .collect();
    format!("groups:\n  gpus:\n    local: true\n{keys}    upstreams:\n{one}")
}

/// A keys file with these names; the token of each is its name. What follows a
/// slash is the class.
fn keys_file(names: &[&str]) -> String {
    let mut yaml = String::from("keys:\n");
    for entry in names {
        let (name, class) = entry.split_once('/').unwrap_or((entry, "interactive"));
        let hash = hash_token(name);
        yaml.push_str(&format!(
            "  - {{ name: {name}, sha256: \"{hash}\", class: {class} }}\n"
        ));
    }
    yaml
}

async fn start_with_keys(yaml: &str, names: &[&str]) -> Gateway {
    let yaml = format!("plugins: [ auth: {{ keys_file: keys.yaml }} ]\n{yaml}");
    Gateway::start_with(&yaml, &[("keys.yaml", &keys_file(names))], &[]).await
}

/// A request on its way, known to the upstream by this id.
async fn send(gateway: &Gateway, id: &str, headers: &[(&str, &str)], body: &str) -> Connection {
    let mut connection = Connection::open(gateway.addr).await;
    let mut all = vec![("x-request-id", id)];
    all.extend_from_slice(headers);
    connection
        .request("POST", PATH, &all, body.as_bytes())
        .await;
    connection
}

async fn with_key(gateway: &Gateway, id: &str, key: &str) -> Connection {
    let bearer = format!("Bearer {key}");
    send(gateway, id, &[("authorization", &bearer)], &chat("demo")).await
}

async fn in_line(gateway: &Gateway, class: &str, count: usize) {
    let series = format!("forebay_queue_length{{class=\"{class}\",group=\"gpus\"}}");
    gateway.metric_becomes(&series, count as f64).await;
}

/// The id of the request on a connection.
fn id(call: &Call) -> String {
    let request = call.text();
    let line = request
        .lines()
        .find_map(|line| line.strip_prefix("x-request-id: "));
    line.unwrap().to_owned()
}

/// Answers and closes, so that the next request comes on a connection of its own.
async fn answer(mut call: Call) {
    let body = r#"{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}]}"#;
    call.send(format!(
        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))
    .await;
}

async fn answer_stream(mut call: Call) {
    let end = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n";
    call.send(format!("{head}{}{end}", delta("Hi"))).await;
}

/// Serves one after the other, and returns their ids in order.
async fn serve(upstream: &ByHand, first: Call, more: usize) -> Vec<String> {
    let mut ids = Vec::new();
    answer(first).await;
    for _ in 0..more {
        let call = upstream.accept().await;
        ids.push(id(&call));
        answer(call).await;
    }
    ids
}

fn retry_after(answer: &Answer) -> u64 {
    answer.header("retry-after").unwrap().parse().unwrap()
}

#[tokio::test]
async fn nine_keys_are_served_in_turn_with_one_that_sends_all_it_can() {
    let upstream = ByHand::listen().await;
    let normal: Vec<String> = (1..=9).map(|nth| format!("normal-{nth}")).collect();
    let mut names: Vec<&str> = normal.iter().map(String::as_str).collect();
    names.push("greedy");
    let yaml = one_slot(&upstream, "queue: { size: 20, wait: 10m }");
    let gateway = start_with_keys(&yaml, &names).await;
    let mut greedy = vec![with_key(&gateway, "holder", "greedy").await];
    let first = upstream.accept().await;
    for nth in 1..=20 {
        greedy.push(with_key(&gateway, &format!("greedy-{nth}"), "greedy").await);
        in_line(&gateway, "interactive", nth).await;
    }
    let mut others = Vec::new();
    for name in &normal {
        others.push(with_key(&gateway, name, name).await);
        // The line is full: each takes the newest place of the greedy one.
        in_line(&gateway, "interactive", 20).await;
    }
    for pushed_out in greedy.drain(12..) {
        let mut pushed_out = pushed_out;
        let answer = pushed_out.answer().await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (429, "queue_full_for_key")
        );
        assert!(retry_after(&answer) >= 1);
    }
    let mut wanted = vec!["greedy-1".to_owned()];
    wanted.extend(normal);
    wanted.extend((2..=11).map(|nth| format!("greedy-{nth}")));
    let mut served = serve(&upstream, first, 20).await;
    // They do not come one after the other: a full line does not show who is in it.
    served[1..10].sort();
    assert_eq!(served, wanted);
    for mut one in others.into_iter().chain(greedy) {
        assert_eq!(one.answer().await.status, 200);
    }
}

#[tokio::test]
async fn interactive_goes_before_batch_and_every_fifth_place_is_for_batch() {
    let upstream = ByHand::listen().await;
    let yaml = one_slot(&upstream, "queue: { size: 20, wait: 10m, batch_wait: 10m }");
    let gateway = start_with_keys(&yaml, &["people", "jobs/batch"]).await;
    let people = ("authorization", "Bearer people");
    let mut all = vec![send(&gateway, "holder", &[people], &chat("demo")).await];
    let first = upstream.accept().await;
    // By the key's class, and by the header.
    all.push(with_key(&gateway, "b1", "jobs").await);
    in_line(&gateway, "batch", 1).await;
    let lowered = [people, ("x-forebay-class", "batch")];
    all.push(send(&gateway, "b2", &lowered, &chat("demo")).await);
    in_line(&gateway, "batch", 2).await;
    for nth in 1..=6 {
        all.push(send(&gateway, &format!("i{nth}"), &[people], &chat("demo")).await);
        in_line(&gateway, "interactive", nth).await;
    }
    let served = serve(&upstream, first, 8).await;
    assert_eq!(served, ["i1", "i2", "i3", "i4", "b1", "i5", "i6", "b2"]);
    for mut one in all {
        assert_eq!(one.answer().await.status, 200);
    }
}

#[tokio::test]
async fn a_class_may_be_lowered_and_never_raised() {
    let upstream = sim("gpu-1").await;
    let yaml = crate::support::one_group(&[&upstream]);
    let gateway = start_with_keys(&yaml, &["people", "jobs/batch"]).await;
    let ask = async |key: &str, class: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [
            ("authorization", bearer.as_str()),
            ("x-forebay-class", class),
        ];
        send(&gateway, "id", &headers, &chat("demo"))
            .await
            .answer()
            .await
    };
    for (key, class) in [
        ("people", "batch"),
        ("people", "interactive"),
        ("jobs", "batch"),
    ] {
        assert_eq!(ask(key, class).await.status, 200, "{key} {class}");
    }
    let raised = ask("jobs", "interactive").await;
    assert_eq!(
        (raised.status, raised.error_code().as_str()),
        (403, "class_not_allowed")
    );
    for wrong in ["urgent", "", "Batch"] {
        let answer = ask("people", wrong).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (400, "invalid_header"),
            "{wrong:?}"
        );
    }
    let wrong = [
        ("authorization", "Bearer people"),
        ("x-forebay-queue-events", "yes"),
    ];
    let answer = send(&gateway, "id", &wrong, &chat("demo"))
        .await
        .answer()
        .await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (400, "invalid_header")
    );
    assert_eq!(upstream.records().len(), 3);
}

#[tokio::test]
async fn a_full_line_turns_the_next_away_at_once() {
    let upstream = ByHand::listen().await;
    let yaml = one_slot(&upstream, "queue: { size: 1, wait: 10m }");
    let gateway = Gateway::start(&yaml).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let first = upstream.accept().await;
    let _second = send(&gateway, "second", &[], &chat("demo")).await;
    in_line(&gateway, "interactive", 1).await;
    let began = Instant::now();
    for body in [chat("demo"), chat_stream("demo")] {
        // Also one that wants comments has a status: no head has gone out.
        let wants = [("x-forebay-queue-events", "1")];
        let answer = send(&gateway, "third", &wants, &body).await.answer().await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (503, "overloaded")
        );
        assert!((1..=600).contains(&retry_after(&answer)));
    }
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    let refused =
        "forebay_queue_refused_total{class=\"interactive\",group=\"gpus\",reason=\"full\"}";
    assert_eq!(gateway.metric(refused).await, Some(2.0));
    assert_eq!(serve(&upstream, first, 1).await, ["second"]);
}

#[tokio::test]
async fn with_no_line_nobody_waits() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&one_slot(&upstream, "queue: { size: 0 }")).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let _first = upstream.accept().await;
    let answer = send(&gateway, "second", &[], &chat("demo"))
        .await
        .answer()
        .await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (503, "overloaded")
    );
}

#[tokio::test]
async fn a_key_that_has_its_share_of_a_full_line_is_told_that_it_is_its_own_fault() {
    let upstream = ByHand::listen().await;
    let yaml = one_slot(&upstream, "queue: { size: 4, wait: 10m }");
    let gateway = start_with_keys(&yaml, &["one", "two"]).await;
    let mut waiting = vec![with_key(&gateway, "holder", "one").await];
    let _first = upstream.accept().await;
    for (nth, key) in ["one", "one", "two", "two"].into_iter().enumerate() {
        waiting.push(with_key(&gateway, "waits", key).await);
        in_line(&gateway, "interactive", nth + 1).await;
    }
    let answer = with_key(&gateway, "too-many", "one").await.answer().await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (429, "queue_full_for_key")
    );
    assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
    assert!(retry_after(&answer) >= 1);
}

#[tokio::test]
async fn who_has_waited_as_long_as_it_may_is_told_so_and_never_reaches_the_upstream() {
    let upstream = ByHand::listen().await;
    let yaml = one_slot(&upstream, "queue: { wait: 300ms, batch_wait: 400ms }");
    let gateway = Gateway::start(&yaml).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let first = upstream.accept().await;
    for class in ["interactive", "batch"] {
        let began = Instant::now();
        let headers = [("x-forebay-class", class)];
        let answer = send(&gateway, "late", &headers, &chat("demo"))
            .await
            .answer()
            .await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (503, "queue_timeout")
        );
        assert!(retry_after(&answer) >= 1);
        assert!(began.elapsed() >= Duration::from_millis(300));
    }
    in_line(&gateway, "interactive", 0).await;
    let _next = send(&gateway, "next", &[], &chat("demo")).await;
    assert_eq!(serve(&upstream, first, 1).await, ["next"]);
    gateway.logged("queued_ms=").await;
}

#[tokio::test]
async fn who_leaves_the_line_never_reaches_the_upstream_and_delays_nobody() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&one_slot(&upstream, "queue: { wait: 10m }")).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let first = upstream.accept().await;
    let mut waiting = Vec::new();
    for nth in 1..=4 {
        waiting.push(send(&gateway, &format!("w{nth}"), &[], &chat("demo")).await);
        in_line(&gateway, "interactive", nth).await;
    }
    let mut waiting = waiting.into_iter();
    waiting.next().unwrap().reset();
    in_line(&gateway, "interactive", 3).await;
    let mut second = waiting.next().unwrap();
    drop(waiting.next().unwrap());
    in_line(&gateway, "interactive", 2).await;
    assert_eq!(serve(&upstream, first, 2).await, ["w2", "w4"]);
    assert_eq!(second.answer().await.status, 200);
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
    gateway
        .metric_becomes(
            "forebay_upstream_requests_in_flight{group=\"gpus\",upstream=\"gpu-1\"}",
            0.0,
        )
        .await;
}

/// `gpus` by hand, then the other as what `route` says.
fn two_groups(upstream: &ByHand, keys: &str, spare: &forebay::sim::Sim, route: &str) -> String {
    let spare_at = crate::support::upstream_at("spare-1", &spare.url(), "");
    format!(
        "{}{}routes:\n  - {{ model: \"*\", {route} }}\n",
        groups(upstream, keys),
        group_of("spare", "", &[spare_at])
    )
}

#[tokio::test]
async fn who_has_waited_for_spill_after_goes_on_to_the_next_group() {
    let (upstream, spare) = (ByHand::listen().await, sim("spare").await);
    for route in ["groups: [gpus, spare]", "groups: [gpus], fallback: spare"] {
        let yaml = two_groups(&upstream, "spill_after: 300ms", &spare, route);
        let gateway = Gateway::start(&yaml).await;
        let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
        let _first = upstream.accept().await;
        let began = Instant::now();
        let answer = send(&gateway, "spilled", &[], &chat("demo"))
            .await
            .answer()
            .await;
        assert_eq!(
            (answer.status, answer.header("x-forebay-group")),
            (200, Some("spare"))
        );
        assert!(began.elapsed() >= Duration::from_millis(300));
        let spills = "forebay_spills_total{from=\"gpus\",to=\"spare\"}";
        assert_eq!(gateway.metric(spills).await, Some(1.0));
        in_line(&gateway, "interactive", 0).await;
    }
}

#[tokio::test]
async fn from_a_full_line_one_goes_on_to_the_next_group_at_once() {
    let (upstream, spare) = (ByHand::listen().await, sim("spare").await);
    let keys = "spill_after: 1h\nqueue: { size: 0 }";
    let yaml = two_groups(&upstream, keys, &spare, "groups: [gpus, spare]");
    let gateway = Gateway::start(&yaml).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let _first = upstream.accept().await;
    let answer = send(&gateway, "second", &[], &chat("demo"))
        .await
        .answer()
        .await;
    assert_eq!(
        (answer.status, answer.header("x-forebay-group")),
        (200, Some("spare"))
    );
}

#[tokio::test]
async fn nobody_is_spilled_out_of_local() {
    let (upstream, cloud) = (ByHand::listen().await, sim("cloud").await);
    let keys = "spill_after: 100ms\nqueue: { wait: 400ms }";
    let yaml = two_groups(&upstream, keys, &cloud, "groups: [gpus, spare]");
    let gateway = Gateway::start(&yaml).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let _first = upstream.accept().await;
    let local = [("x-forebay-local", "1")];
    let answer = send(&gateway, "local", &local, &chat("demo"))
        .await
        .answer()
        .await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (503, "queue_timeout")
    );
    assert_eq!(cloud.records().len(), 0);
}

#[tokio::test]
async fn who_finds_no_help_in_the_next_group_comes_back_and_waits_on() {
    let (upstream, spare) = (ByHand::listen().await, sim("spare").await);
    let keys = "spill_after: 100ms\nqueue: { wait: 10m }";
    let yaml = two_groups(&upstream, keys, &spare, "groups: [gpus], fallback: spare");
    let gateway = Gateway::start(&yaml).await;
    spare.stop().await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let first = upstream.accept().await;
    let mut client = send(&gateway, "back", &[], &chat("demo")).await;
    let tried = "forebay_attempts_total{group=\"spare\",upstream=\"spare-1\",verdict=\"not_sent\"}";
    gateway.metric_becomes(tried, 1.0).await;
    in_line(&gateway, "interactive", 1).await;
    assert_eq!(serve(&upstream, first, 1).await, ["back"]);
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.upstream()), (200, "gpu-1"));
}

#[tokio::test]
async fn half_an_answer_never_comes_too_late_for_the_line() {
    let (dying, busy) = (ByHand::listen().await, ByHand::listen().await);
    let upstreams = [
        upstream_at("gpu-1", &dying.url(), "kind: vllm, models: [demo]"),
        upstream_at("gpu-2", &busy.url(), "kind: vllm, concurrent: 1"),
    ];
    let config = |wait: &str| {
        let group = group_of("gpus", &format!("queue: {{ wait: {wait} }}"), &upstreams);
        format!("groups:\n{group}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n")
    };
    let gateway = Gateway::start(&config("10m")).await;
    let mut others = vec![send(&gateway, "holder", &[], &chat("other")).await];
    let mut call = busy.accept().await;
    for nth in 1..=6 {
        others.push(send(&gateway, "other", &[], &chat("other")).await);
        in_line(&gateway, "interactive", nth).await;
    }
    // After these the pace is known, and too slow for who comes now.
    for _ in 0..4 {
        answer(call).await;
        call = busy.accept().await;
    }
    gateway.write_config(&config("1ms"));
    assert_eq!(gateway.reload().await.status, 200);
    let mut client = send(&gateway, "half", &[], &chat_stream("demo")).await;
    let mut first = dying.accept().await;
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n";
    first.send(format!("{head}{}", delta("Half"))).await;
    client.read_until("Half").await;
    drop(first);
    let refused = |why: &str| {
        format!(
            "forebay_queue_refused_total{{class=\"interactive\",group=\"gpus\",reason=\"{why}\"}}"
        )
    };
    in_line(&gateway, "interactive", 3).await;
    for _ in 0..3 {
        answer(call).await;
        call = busy.accept().await;
        if id(&call) == "half" {
            break;
        }
    }
    assert_eq!(id(&call), "half");
    answer_stream(call).await;
    assert_eq!(client.answer().await.content(), "HalfHi");
    for why in ["late", "timeout"] {
        assert_eq!(gateway.metric(&refused(why)).await, None, "{why}");
    }
}

#[tokio::test]
async fn addresses_of_one_network_of_ipv6_are_one_client() {
    let upstream = ByHand::listen().await;
    let yaml = one_slot(&upstream, "queue: { size: 2, wait: 10m }");
    let yaml = format!("trusted_proxies: [127.0.0.0/8]\n{yaml}");
    let gateway = Gateway::start(&yaml).await;
    let from = async |id: &str, address: &str| {
        let headers = [("x-forwarded-for", address)];
        send(&gateway, id, &headers, &chat("demo")).await
    };
    let _holder = from("holder", "2001:db8::1").await;
    let first = upstream.accept().await;
    let _second = from("second", "2001:db8::2").await;
    in_line(&gateway, "interactive", 1).await;
    let mut third = from("third", "2001:db8::3").await;
    in_line(&gateway, "interactive", 2).await;
    let _other = from("other", "192.0.2.1").await;
    let answer = third.answer().await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (429, "queue_full_for_key")
    );
    assert_eq!(serve(&upstream, first, 2).await, ["second", "other"]);
}

#[tokio::test]
async fn a_pinned_request_waits_for_its_upstream() {
    let (upstream, free) = (ByHand::listen().await, sim("gpu-2").await);
    let mut yaml = groups(&upstream, "queue: { wait: 10m }");
    yaml.push_str(&crate::support::upstream_at("gpu-2", &free.url(), ""));
    yaml.push_str("routes:\n  - { model: \"*\", groups: [gpus] }\n");
    let gateway = Gateway::start(&yaml).await;
    let pin = [("x-forebay-upstream", "gpu-1")];
    let _holder = send(&gateway, "holder", &pin, &chat("demo")).await;
    let first = upstream.accept().await;
    let mut pinned = send(&gateway, "pinned", &pin, &chat("demo")).await;
    in_line(&gateway, "interactive", 1).await;
    // Who may go anywhere does not wait behind who may not.
    let free_to_go = send(&gateway, "anywhere", &[], &chat("demo"))
        .await
        .answer()
        .await;
    assert_eq!(free_to_go.upstream(), "gpu-2");
    assert_eq!(serve(&upstream, first, 1).await, ["pinned"]);
    assert_eq!(pinned.answer().await.upstream(), "gpu-1");
}

#[tokio::test]
async fn comments_tell_a_stream_that_asked_where_in_line_it_is() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&one_slot(&upstream, "queue: { wait: 10m }")).await;
    let mut others = vec![send(&gateway, "holder", &[], &chat("demo")).await];
    let mut call = upstream.accept().await;
    for nth in 1..=2 {
        others.push(send(&gateway, "other", &[], &chat("demo")).await);
        in_line(&gateway, "interactive", nth).await;
    }
    let wants = [("x-forebay-queue-events", "1")];
    let mut client = send(&gateway, "curious", &wants, &chat_stream("demo")).await;
    for position in [3, 2, 1] {
        let seen = client
            .read_until(&format!(": queued position={position}\n\n"))
            .await;
        assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}");
        answer(call).await;
        call = upstream.accept().await;
    }
    assert_eq!(id(&call), "curious");
    answer_stream(call).await;
    let answer = client.answer().await;
    assert_eq!(answer.content(), "Hi");
    assert_eq!(answer.events().last().unwrap(), "[DONE]");
    let comments = answer.text().matches(": queued position=").count();
    assert_eq!(comments, 3, "{}", answer.text());
}

#[tokio::test]
async fn who_has_waited_for_a_heartbeat_is_told_where_in_line_it_is() {
    let upstream = ByHand::listen().await;
    let yaml = one_slot(&upstream, "queue: { wait: 10m }") + "limits: { heartbeat: 200ms }\n";
    let gateway = Gateway::start(&yaml).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let first = upstream.accept().await;
    let mut client = send(&gateway, "patient", &[], &chat_stream("demo")).await;
    client.read_until(": queued position=1\n\n").await;
    answer(first).await;
    let mut call = upstream.accept().await;
    // Now it is worked on.
    client.read_until(": ping\n\n").await;
    call.send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
        .await;
    call.send(delta("Hi")).await;
    client.read_until("Hi").await;
}

#[tokio::test]
async fn a_deadline_in_line_is_an_error_event_once_the_head_is_out() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&one_slot(&upstream, "queue: { wait: 500ms }")).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let _first = upstream.accept().await;
    let wants = [("x-forebay-queue-events", "1")];
    let mut client = send(&gateway, "late", &wants, &chat_stream("demo")).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 200);
    assert!(
        answer.text().contains(": queued position=1\n\n"),
        "{}",
        answer.text()
    );
    let events = answer.events();
    assert_eq!(events.len(), 1, "{events:?}");
    let event: serde_json::Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!(event["error"]["code"], "queue_timeout");
    assert!(answer.complete);
}

#[tokio::test]
async fn a_reload_that_allows_more_at_once_is_felt_by_who_waits() {
    let upstream = ByHand::listen().await;
    let yaml = one_slot(&upstream, "queue: { wait: 10m }");
    let gateway = Gateway::start(&yaml).await;
    let mut holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let first = upstream.accept().await;
    let mut waiting = send(&gateway, "waiting", &[], &chat("demo")).await;
    in_line(&gateway, "interactive", 1).await;
    gateway.write_config(&yaml.replace("concurrent: 1", "concurrent: 2"));
    assert_eq!(gateway.reload().await.status, 200);
    let second = upstream.accept().await;
    assert_eq!(id(&second), "waiting");
    // And one that allows less, by who comes.
    gateway.write_config(&yaml.replace("wait: 10m", "size: 0"));
    assert_eq!(gateway.reload().await.status, 200);
    answer(second).await;
    assert_eq!(waiting.answer().await.status, 200);
    let refused = send(&gateway, "third", &[], &chat("demo"))
        .await
        .answer()
        .await;
    assert_eq!(refused.status, 503);
    answer(first).await;
    assert_eq!(holder.answer().await.status, 200);
}

#[tokio::test]
async fn health_tells_how_many_wait() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&one_slot(&upstream, "queue: { wait: 10m }")).await;
    let _holder = send(&gateway, "holder", &[], &chat("demo")).await;
    let _first = upstream.accept().await;
    let batch = [("x-forebay-class", "batch")];
    let _waiting = send(&gateway, "waiting", &batch, &chat("demo")).await;
    in_line(&gateway, "batch", 1).await;
    let health = crate::support::http::get(gateway.addr, "/health")
        .await
        .json();
    assert_eq!(
        health["queues"],
        serde_json::json!([{ "group": "gpus", "interactive": 0, "batch": 1 }])
    );
}

/// Three times as many clients as places at the upstream and in line, that come
/// again at once: what can be served is, and the others know it at once.
#[tokio::test]
async fn in_overload_the_upstream_is_kept_busy_and_nobody_is_left_in_doubt() {
    const SLOTS: usize = 4;
    const WORK: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_secs(3);
    let gpu = sim("gpu-1").await;
    gpu.fault(&format!("header_delay={}", WORK.as_millis()))
        .await
        .unwrap();
    let yaml =
        crate::support::one_group(&[&gpu]).replace("kind: vllm", "kind: vllm, concurrent: 4");
    let gateway = Gateway::start(&yaml).await;
    let began = Instant::now();
    let clients = (0..36).map(|_| async {
        let (mut served, mut refused) = (0_u32, 0_u32);
        while began.elapsed() < LONG {
            let answer = send(&gateway, "one", &[], &chat("demo"))
                .await
                .answer()
                .await;
            match answer.status {
                200 => served += 1,
                503 => {
                    assert!(
                        ["overloaded", "queue_timeout"].contains(&answer.error_code().as_str())
                    );
                    assert!((1..=5).contains(&retry_after(&answer)));
                    refused += 1;
                    // It comes again, but not in a busy loop.
                    tokio::time::timeout(Duration::from_millis(100), std::future::pending::<()>())
                        .await
                        .ok();
                }
                other => panic!("{other}"),
            }
        }
        (served, refused)
    });
    let all = join_all(clients).await;
    let took = began.elapsed();
    let served: u32 = all.iter().map(|(served, _)| served).sum();
    let refused: u32 = all.iter().map(|(_, refused)| refused).sum();
    assert!(refused > 0);
    // The machine may be busy with other tests; that this much is done shows that
    // the upstream does not stand idle while others are turned away.
    let possible = took.as_secs_f64() / WORK.as_secs_f64() * SLOTS as f64;
    assert!(
        f64::from(served) > possible * 0.25,
        "{served} of {possible}, {refused} refused"
    );
    eventually("all is calm", || async {
        gateway.metric("forebay_requests_in_flight").await == Some(0.0)
    })
    .await;
    let after = send(&gateway, "after", &[], &chat("demo"))
        .await
        .answer()
        .await;
    assert_eq!(after.status, 200);
}
