//! Clients that send slowly, read slowly, or hold more memory than their share.

use std::time::Duration;

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::interval,
};

use crate::support::{
    Connection, Gateway,
    by_hand::{ByHand, STREAM_HEAD, delta, group_of},
    chat, chat_stream, eventually,
    http::{build, get, post_chat},
    one_group,
    scripted::json,
    sim, soon, upstream_at,
};

const CHAT: &str = "/v1/chat/completions";
const HELD: &str = "forebay_request_bodies_bytes";

fn hits(limit: &str) -> String {
    format!("forebay_limit_hits_total{{limit=\"{limit}\"}}")
}

/// A chat request of exactly this many bytes.
fn chat_of(bytes: usize) -> String {
    let head = r#"{"model":"demo","messages":[{"role":"user","content":"Hello"}],"user":""#;
    format!("{head}{}\"}}", "u".repeat(bytes - head.len() - 2))
}

// --- bodies that come slowly ---

#[tokio::test]
async fn a_body_that_drips_in_gets_408_long_before_its_deadline() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 300ms, body_rate: 10KiB, body_timeout: 50s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let body = chat_of(100_000);
    for framing in ["content-length: 100000", "transfer-encoding: chunked"] {
        let mut connection = Connection::open(gateway.addr).await;
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n");
        connection.send(head.as_bytes()).await;
        if framing.contains("chunked") {
            connection.send(b"186a0\r\n").await;
        }
        let mut tick = interval(Duration::from_millis(10));
        for byte in body.as_bytes() {
            if !connection.try_send(&[*byte]).await
                || !connection.stays_open(Duration::from_millis(5)).await
            {
                break;
            }
            tick.tick().await;
        }
        let answer = connection.answer().await;
        assert_eq!(
            (answer.status, &*answer.error_code()),
            (408, "body_too_slow")
        );
        assert_eq!(answer.header("connection"), Some("close"));
    }
    assert_eq!(gateway.metric(&hits("body_rate")).await, Some(2.0));
    gateway.metric_becomes(HELD, 0.0).await;
    assert!(sim.records().is_empty());
    // A body that keeps the pace takes as long as it needs.
    let mut steady = Connection::open(gateway.addr).await;
    let sent = build("POST", CHAT, &[], body.as_bytes());
    let mut tick = interval(Duration::from_millis(40));
    for piece in sent.chunks(4_000) {
        tick.tick().await;
        steady.send(piece).await;
    }
    assert_eq!(steady.answer().await.status, 200);
}

#[tokio::test]
async fn a_body_that_drips_in_over_http_2_gets_408_too() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 300ms, body_rate: 10KiB, body_timeout: 50s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let sender = crate::h2c::connect(gateway.addr).await;
    let mut ready = sender.clone().ready().await.unwrap();
    let (answer, mut stream) = ready
        .send_request(crate::h2c::request(CHAT, &[]), false)
        .unwrap();
    let mut tick = interval(Duration::from_millis(10));
    let drip = async {
        loop {
            tick.tick().await;
            // Fails when the stream is over; the answer tells.
            stream.send_data(Bytes::from_static(b"{"), false).ok();
        }
    };
    let answer = tokio::select! {
        answer = soon("an answer", answer) => answer.unwrap(),
        () = drip => unreachable!(),
    };
    assert_eq!(answer.status(), 408);
    // The connection goes on.
    assert_eq!(crate::h2c::post(&sender, &chat("demo")).await.status, 200);
    assert_eq!(gateway.metric(&hits("body_rate")).await, Some(1.0));
}

// --- the memory of bodies ---

#[tokio::test]
async fn bodies_share_one_bound_and_a_body_without_room_gets_503() {
    let upstream = ByHand::listen().await;
    let limits = "limits: { body: 3MiB, bodies: 4MiB }\n";
    let gateway = Gateway::start(&format!("{limits}{}", group_of(&upstream.url()))).await;
    let body = chat_of(2_500_000);
    // Kept for another try as long as its request is on its way.
    let mut holder = Connection::open(gateway.addr).await;
    holder.request("POST", CHAT, &[], body.as_bytes()).await;
    let mut call = upstream.accept().await;
    gateway.metric_becomes(HELD, 2_500_000.0).await;
    let max = gateway.metric("forebay_request_bodies_bytes_max").await;
    assert_eq!(max, Some(4_194_304.0));
    let chunked = [
        format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").as_bytes(),
        format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).as_bytes(),
    ]
    .concat();
    for (what, sent) in [
        ("with a length", build("POST", CHAT, &[], body.as_bytes())),
        ("in chunks", chunked),
    ] {
        let mut connection = Connection::open(gateway.addr).await;
        connection.try_send(&sent).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 503, "{what}");
        assert_eq!(answer.error_code(), "gateway_overloaded");
        assert!(answer.header("retry-after").is_some());
        assert_eq!(answer.header("connection"), Some("close"));
    }
    assert_eq!(gateway.metric(&hits("bodies")).await, Some(2.0));
    gateway.metric_becomes(HELD, 2_500_000.0).await;
    // There is room for small ones.
    let mut small = Connection::open(gateway.addr).await;
    small
        .request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    let mut second = upstream.accept().await;
    let whole = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}]}"#;
    let whole = crate::support::scripted::json(200, whole);
    second.send(&whole).await;
    assert_eq!(small.answer().await.status, 200);
    // The room comes back with the end of the request.
    call.send(&whole).await;
    assert_eq!(holder.answer().await.status, 200);
    gateway.metric_becomes(HELD, 0.0).await;
    holder.request("POST", CHAT, &[], body.as_bytes()).await;
    gateway.metric_becomes(HELD, 2_500_000.0).await;
    drop(holder);
    gateway.metric_becomes(HELD, 0.0).await;
}

#[tokio::test]
async fn what_a_client_only_announces_takes_no_room_from_others() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { body: 3MiB, bodies: 4MiB }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let mut announced = Vec::new();
    for _ in 0..20 {
        let mut connection = Connection::open(gateway.addr).await;
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n{{");
        connection.send(head.as_bytes()).await;
        announced.push(connection);
    }
    gateway
        .metric_becomes("forebay_requests_in_flight", 20.0)
        .await;
    let answer = post_chat(gateway.addr, &chat_of(2_000_000)).await;
    assert_eq!(answer.status, 200);
    drop(announced);
    gateway.metric_becomes(HELD, 0.0).await;
}

/// A whole answer of about this many bytes.
fn answer_of(bytes: usize) -> Vec<u8> {
    let text = "x".repeat(bytes);
    let whole = format!(
        r#"{{"choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}}}}]}}"#
    );
    json(200, &whole)
}

#[tokio::test]
async fn an_answer_that_is_read_whole_counts_and_gets_503_where_there_is_no_room_for_it() {
    let upstream = ByHand::listen().await;
    let limits = "limits: { body: 1MiB, bodies: 1MiB }\n";
    let gateway = Gateway::start(&format!("{limits}{}", group_of(&upstream.url()))).await;
    let body = chat("demo");
    let asking = async || {
        let mut client = Connection::open(gateway.addr).await;
        client.request("POST", CHAT, &[], body.as_bytes()).await;
        (client, upstream.accept().await)
    };
    let at_least = |bytes: f64| {
        let gateway = &gateway;
        async move {
            eventually("the answer counts", || async {
                gateway.metric(HELD).await >= Some(bytes)
            })
            .await;
        }
    };
    let (mut first, mut first_call) = asking().await;
    let whole = answer_of(2_000_000);
    let (begin, rest) = whole.split_at(700_000);
    first_call.send(begin).await;
    at_least(690_000.0).await;
    let (mut second, mut second_call) = asking().await;
    second_call.send(&answer_of(600_000)[..500_000]).await;
    let answer = second.answer().await;
    let code = answer.error_code();
    assert_eq!((answer.status, &*code), (503, "gateway_overloaded"));
    assert!(answer.header("retry-after").is_some());
    // It is told to stop, and it is not its fault.
    second_call.closed().await;
    assert_eq!(gateway.state("gpu-1").await, "ready");
    assert_eq!(gateway.metric(&hits("bodies")).await, Some(1.0));
    let tries = "forebay_attempts_total{group=\"gpus\",upstream=\"gpu-1\",verdict=\"no_room\"}";
    assert_eq!(gateway.metric(tries).await, Some(1.0));
    // Who is alone is served, however long its answer is.
    first_call.send(rest).await;
    assert_eq!(first.answer().await.status, 200);
    gateway.metric_becomes(HELD, 0.0).await;
    drop(first_call);
    // A client that leaves, and an upstream that dies, give it back.
    for is_client in [true, false] {
        let (client, mut call) = asking().await;
        call.send(begin).await;
        at_least(690_000.0).await;
        match is_client {
            true => drop(client),
            false => drop(call),
        }
        gateway.metric_becomes(HELD, 0.0).await;
    }
}

#[tokio::test]
async fn near_the_end_of_its_memory_connections_are_not_kept_and_then_requests_turned_away() {
    let sim = sim("gpu-1").await;
    let yaml = |tight: u8, full: u8| {
        let limits =
            format!("limits: {{ memory: 1GiB, memory_tight: {tight}%, memory_full: {full}% }}\n");
        format!("{limits}{}", one_group(&[&sim]))
    };
    let gateway = Gateway::start(&yaml(99, 100)).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.status, 200);
    assert_ne!(answer.header("connection"), Some("close"));
    assert!(gateway.metric("forebay_memory_bytes").await > Some(1e6));
    assert!(gateway.metric("forebay_memory_bytes_max").await > Some(1e6));

    gateway.write_config(&yaml(0, 100));
    gateway.reload().await;
    eventually("connections are not kept", || async {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        answer.status == 200 && answer.header("connection") == Some("close")
    })
    .await;

    gateway.write_config(&yaml(0, 0));
    gateway.reload().await;
    eventually("requests are turned away", || async {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        answer.status == 503
            && answer.error_code() == "gateway_overloaded"
            && answer.header("retry-after").is_some()
    })
    .await;
    gateway.logged("memory pressure changed: to=full").await;
    assert!(gateway.metric(&hits("memory")).await >= Some(1.0));
    assert_eq!(get(gateway.addr, "/livez").await.status, 200);

    gateway.write_config(&yaml(99, 100));
    gateway.reload().await;
    eventually("all is well", || async {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        answer.status == 200 && answer.header("connection") != Some("close")
    })
    .await;
}

// --- answers that are read slowly ---

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_upstream_within_little() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let mut client = Connection::open_narrow(gateway.addr).await;
    let body = chat_stream("demo");
    client.request("POST", CHAT, &[], body.as_bytes()).await;
    let mut call = upstream.accept_narrow().await;
    call.send(STREAM_HEAD).await;
    call.say("first").await;
    client.read_until("first").await;
    let event = delta(&"x".repeat(1000));
    let piece = format!("{:x}\r\n{event}\r\n", event.len()).repeat(16);
    let taken = call.fill(piece.as_bytes(), 256 << 20).await;
    // Ours, and what the system keeps on both sides of us.
    assert!(taken < 1 << 20, "{taken} bytes were taken");
    client.reset();
    call.closed().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_its_whole_answer_keeps_no_upstream_from_others() {
    let upstream = ByHand::listen().await;
    let one = upstream_at("gpu-1", &upstream.url(), "kind: vllm, concurrent: 1");
    let gateway = Gateway::start(&format!(
        "groups:\n  gpus:\n    upstreams:\n{one}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n"
    ))
    .await;
    let mut deaf = Connection::open_narrow(gateway.addr).await;
    deaf.request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    let mut call = upstream.accept().await;
    let of = |text: &str| {
        let whole = format!(
            r#"{{"choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}}}}]}}"#
        );
        crate::support::scripted::json(200, &whole)
    };
    call.send(of(&"x".repeat(20_000_000))).await;
    drop(call);
    let mut other = Connection::open(gateway.addr).await;
    other
        .request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    let mut call = upstream.accept().await;
    call.send(of("two")).await;
    assert_eq!(other.answer().await.content(), "two");
    // It still has its answer before it.
    deaf.read_until("xxx").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_the_end_of_a_stream_keeps_no_upstream_from_others() {
    let upstream = ByHand::listen().await;
    let one = upstream_at("gpu-1", &upstream.url(), "kind: vllm, concurrent: 1");
    let gateway = Gateway::start(&format!(
        "groups:\n  gpus:\n    upstreams:\n{one}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n"
    ))
    .await;
    let mut deaf = Connection::open_narrow(gateway.addr).await;
    let body = chat_stream("demo");
    deaf.request("POST", CHAT, &[], body.as_bytes()).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    // More than the system takes for the client, and the end with it.
    let event = delta(&"x".repeat(900_000));
    call.chunk(format!("{event}data: [DONE]\n\n")).await;
    call.end().await;
    drop(call);
    let mut other = Connection::open(gateway.addr).await;
    other
        .request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    let mut call = upstream.accept().await;
    let whole = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"two"}}]}"#;
    call.send(crate::support::scripted::json(200, whole)).await;
    assert_eq!(other.answer().await.content(), "two");
    // It still has its answer before it.
    deaf.read_until("data: [DONE]").await;
}

#[tokio::test]
async fn a_large_answer_over_a_slow_line_takes_as_long_as_it_needs() {
    let upstream = ByHand::listen().await;
    let limits = "limits: { write_timeout: 1s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", group_of(&upstream.url()))).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = socket.connect(gateway.addr).await.unwrap();
    let sent = build(
        "POST",
        CHAT,
        &[("connection", "close")],
        chat("demo").as_bytes(),
    );
    client.write_all(&sent).await.unwrap();
    let mut call = upstream.accept().await;
    let text = "x".repeat(3_000_000);
    let whole = format!(
        r#"{{"choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}}}}]}}"#
    );
    call.send(crate::support::scripted::json(200, &whole)).await;
    // A megabyte a second.
    let mut tick = interval(Duration::from_millis(20));
    let mut read = 0;
    let mut piece = vec![0; 20_000];
    loop {
        tick.tick().await;
        match soon("a piece", client.read_exact(&mut piece)).await {
            Ok(count) => read += count,
            Err(_) => break,
        }
    }
    // The last piece is not full.
    assert!(read + piece.len() > whole.len(), "cut after {read} bytes");
    gateway.logged("status=200 ending=success").await;
}
