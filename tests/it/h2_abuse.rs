//! HTTP/2 clients that keep us busy for nothing: each loses its connection, and
//! nobody else notices.

use std::fs;

use tokio::time::{Duration, Instant};

use crate::support::{
    Gateway, chat, chat_stream,
    frames::{
        CHAT, CONTINUATION, DATA, END_HEADERS, END_STREAM, Field, Frames, GOAWAY, HEADERS, PING,
        PRIORITY, RST_STREAM, SETTINGS, WINDOW_UPDATE, block, chat_on, frame,
    },
    http::post_chat,
    one_group, sim,
};

const IN_FLIGHT: &str = "forebay_requests_in_flight";
const CANCEL: [u8; 4] = [0, 0, 0, 8];
/// What any abuse may cost in memory.
const MEMORY_KIB: usize = 64 * 1024;

fn hits(limit: &str) -> String {
    format!("forebay_limit_hits_total{{limit=\"{limit}\"}}")
}

/// The most memory that a process has had, in KiB.
fn peak_memory(gateway: &Gateway) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

async fn is_unharmed(gateway: &Gateway) {
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    let sender = crate::h2c::connect(gateway.addr).await;
    assert_eq!(crate::h2c::post(&sender, &chat("demo")).await.status, 200);
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
}

/// Floods a connection with these frames, after a request that hangs, and
/// checks that it is closed within `most` of them, in memory that is bounded.
async fn is_closed_within(gateway: &Gateway, what: &str, piece: &[u8], most: usize) {
    let before = peak_memory(gateway);
    let mut attacker = Frames::open(gateway.addr, &[]).await;
    attacker.send(&chat_on(1, &chat("demo"))).await;
    let took = attacker.flood(piece, most).await;
    assert!(took < most, "{what}: it took all {most}");
    let grown = peak_memory(gateway) - before;
    assert!(grown < MEMORY_KIB, "{what}: {grown} KiB");
}

#[tokio::test]
async fn floods_of_frames_that_do_nothing_end_their_connection() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    for (what, one) in [
        ("PING", frame(PING, 0, 0, &[0; 8])),
        ("SETTINGS", frame(SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 0])),
        ("empty SETTINGS", frame(SETTINGS, 0, 0, &[])),
        ("PRIORITY", frame(PRIORITY, 0, 3, &[0, 0, 0, 1, 9])),
        ("frames of no kind", frame(0xbb, 0, 0, b"whatever")),
    ] {
        let before = gateway.metric(&hits("http2_flood")).await.unwrap_or(0.0);
        is_closed_within(&gateway, what, &one.repeat(100), 10_000).await;
        let after = gateway.metric(&hits("http2_flood")).await;
        assert_eq!(after, Some(before + 1.0), "{what}");
    }
    gateway.logged("limit=http2_flood client=127.0.0.1").await;
    let lines = gateway.log().matches("limit=http2_flood ").count();
    assert!(lines <= 2, "one line in ten seconds");
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn empty_data_ends_its_connection() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let mut attacker = Frames::open(gateway.addr, &[]).await;
    let header = frame(HEADERS, END_HEADERS, 1, &block(&CHAT));
    attacker.send(&header).await;
    let empty = frame(DATA, 0, 1, &[]);
    let took = attacker.flood(&empty.repeat(100), 10_000).await;
    assert!(took < 10_000, "it took all");
    assert!(sim.records().is_empty());
    assert!(gateway.metric(&hits("http2_error")).await >= Some(1.0));
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn continuation_without_end_ends_its_connection() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let before = peak_memory(&gateway);
    for payload in [block(&[(b"x", &[b'y'; 1000])]).repeat(10), Vec::new()] {
        let mut attacker = Frames::open(gateway.addr, &[]).await;
        attacker.send(&frame(HEADERS, 0, 1, &block(&CHAT))).await;
        let more = frame(CONTINUATION, 0, 1, &payload);
        let took = attacker.flood(&more, 100_000).await;
        assert!(took < 100_000, "it took all");
    }
    assert!(peak_memory(&gateway) - before < MEMORY_KIB);
    assert!(sim.records().is_empty());
    assert!(gateway.metric(&hits("http2_error")).await >= Some(1.0));
    gateway.logged("limit=http2_error client=127.0.0.1").await;
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn a_hundred_thousand_resets_start_few_requests_and_leave_none() {
    let sim = sim("gpu-1").await;
    sim.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let before = peak_memory(&gateway);
    let began = Instant::now();
    let body = chat("demo");
    let (mut resets, mut connections) = (0, 0);
    // Each connection is closed soon; the attacker comes again.
    while resets < 100_000 && began.elapsed() < Duration::from_secs(5) {
        let mut attacker = Frames::open(gateway.addr, &[]).await;
        connections += 1;
        for batch in 0..1000 {
            let mut frames = Vec::new();
            for stream in 0..100 {
                let stream = (batch * 100 + stream) * 2 + 1;
                frames.extend(chat_on(stream, &body));
                frames.extend(frame(RST_STREAM, 0, stream, &CANCEL));
            }
            if !attacker.send(&frames).await {
                break;
            }
            resets += 100;
        }
    }
    assert!(connections > 1, "the first was never closed");
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    sim.wait_for_connections(crate::support::DEADLINE, |now| now.open == 0)
        .await
        .unwrap();
    let asked = sim.records().len();
    assert!(asked <= 100, "{asked} of {resets} went upstream");
    assert!(peak_memory(&gateway) - before < MEMORY_KIB);
    sim.clear_faults().await;
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn resets_one_by_one_are_bounded_and_leave_no_request_upstream() {
    let sim = sim("gpu-1").await;
    sim.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let mut attacker = Frames::open(gateway.addr, &[]).await;
    let mut stream = 1;
    let mut asked = 0;
    // Slowly enough that each request is taken for one.
    loop {
        if !attacker.send(&chat_on(stream, &chat("demo"))).await {
            break;
        }
        tokio::task::yield_now().await;
        if !attacker.send(&frame(RST_STREAM, 0, stream, &CANCEL)).await {
            break;
        }
        asked += 1;
        stream += 2;
        assert!(asked < 2000, "never closed");
    }
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    sim.wait_for_connections(crate::support::DEADLINE, |now| now.open == 0)
        .await
        .unwrap();
    sim.clear_faults().await;
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn a_server_that_is_made_to_reset_gives_its_requests_up() {
    let sim = sim("gpu-1").await;
    sim.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    for (what, bad) in [
        ("an increment of 0", frame(WINDOW_UPDATE, 0, 1, &[0; 4])),
        (
            "a window beyond 31 bits",
            frame(WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff]),
        ),
        ("DATA after the end", frame(DATA, 0, 1, b"x")),
        ("HEADERS after the end", frame(HEADERS, 5, 1, &block(&CHAT))),
        (
            "PRIORITY of itself",
            frame(PRIORITY, 0, 1, &[0, 0, 0, 1, 9]),
        ),
    ] {
        sim.clear_records();
        let mut attacker = Frames::open(gateway.addr, &[]).await;
        attacker.send(&chat_on(1, &chat("demo"))).await;
        sim.wait_for(crate::support::DEADLINE, |records| records.len() == 1)
            .await
            .unwrap();
        attacker.send(&bad).await;
        let answer = loop {
            match attacker.next().await {
                Some(frame) if matches!(frame.kind, RST_STREAM | GOAWAY) => break Some(frame),
                Some(_) => {}
                None => break None,
            }
        };
        drop(answer);
        gateway.metric_becomes(IN_FLIGHT, 0.0).await;
        sim.wait_for_connections(crate::support::DEADLINE, |now| now.open == 0)
            .await
            .unwrap_or_else(|_| panic!("{what}: the upstream works on"));
    }
    // Again and again on one connection: it is closed.
    let mut attacker = Frames::open(gateway.addr, &[]).await;
    let mut stream = 1;
    loop {
        let bad = frame(WINDOW_UPDATE, 0, stream, &[0; 4]);
        let request = frame(HEADERS, END_HEADERS, stream, &block(&CHAT));
        if !attacker.send(&[request, bad].concat()).await {
            break;
        }
        stream += 2;
        assert!(stream < 20_000, "never closed");
    }
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    sim.clear_faults().await;
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn a_header_of_many_references_is_refused_and_costs_no_memory() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let before = peak_memory(&gateway);
    // A window of 0: nothing of the answers can go out.
    let mut attacker = Frames::open(gateway.addr, &[(4, 0)]).await;
    let mut bomb = block(&CHAT);
    // A field of 4 KB into the dynamic table, then 15,000 references to it.
    bomb.extend([0x40, 1, b'x']);
    let large = block(&[(b"", &[b'y'; 3900])]);
    bomb.extend(&large[2..]);
    bomb.extend(vec![0x80 | 62; 15_000]);
    let small = vec![0x80 | 62; 15_000];
    for stream in 0..100 {
        let fields = if stream == 0 {
            bomb.clone()
        } else {
            [block(&CHAT), small.clone()].concat()
        };
        let (first, rest) = fields.split_at(fields.len().min(16_000));
        let id = stream * 2 + 1;
        let mut frames = frame(HEADERS, if rest.is_empty() { 5 } else { 1 }, id, first);
        if !rest.is_empty() {
            frames.extend(frame(CONTINUATION, END_HEADERS, id, rest));
        }
        if !attacker.send(&frames).await {
            break;
        }
    }
    is_unharmed(&gateway).await;
    let grown = peak_memory(&gateway) - before;
    assert!(grown < MEMORY_KIB, "{grown} KiB");
    assert_eq!(sim.records().len(), 2, "only those of good clients");
    drop(attacker);
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
}

#[tokio::test]
async fn a_window_that_never_opens_ends_the_request_on_both_sides() {
    let sim = sim("gpu-1").await;
    sim.fault("tokens=100000;gap=1ms").await.unwrap();
    let limits = "limits: { write_timeout: 500ms }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let before = peak_memory(&gateway);
    let mut attacker = Frames::open(gateway.addr, &[(4, 1000)]).await;
    for stream in 0..50 {
        attacker
            .send(&chat_on(stream * 2 + 1, &chat_stream("demo")))
            .await;
    }
    sim.wait_for(crate::support::DEADLINE, |records| records.len() == 50)
        .await
        .unwrap();
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    sim.wait_for_connections(crate::support::DEADLINE, |now| now.open == 0)
        .await
        .unwrap();
    assert!(peak_memory(&gateway) - before < MEMORY_KIB);
    sim.clear_faults().await;
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn a_connection_owes_its_header_in_time_under_http_2_too() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 500ms }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let header = frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&CHAT));
    let mut silent = Frames::open(gateway.addr, &[]).await;
    let mut pings = Frames::open(gateway.addr, &[]).await;
    pings.send(&frame(PING, 0, 0, &[0; 8])).await;
    let mut half = Frames::open(gateway.addr, &[]).await;
    half.send(&header[..30]).await;
    let mut open = Frames::open(gateway.addr, &[]).await;
    open.send(&frame(HEADERS, 0, 1, &block(&CHAT))).await;
    // After a good request as well.
    let mut later = Frames::open(gateway.addr, &[]).await;
    later.send(&chat_on(1, &chat("demo"))).await;
    assert!(later.answer().await);
    later.send(&frame(HEADERS, 0, 3, &block(&CHAT))).await;
    for attacker in [&mut silent, &mut pings, &mut half, &mut open, &mut later] {
        attacker.ended().await;
    }
    assert_eq!(gateway.metric(&hits("header_timeout")).await, Some(5.0));
    assert_eq!(sim.records().len(), 1);
    // One that has asked and owes nothing is not cut.
    let mut idle = Frames::open(gateway.addr, &[]).await;
    idle.send(&chat_on(1, &chat("demo"))).await;
    assert!(idle.answer().await);
    let closed = tokio::time::timeout(Duration::from_millis(1200), idle.ended()).await;
    assert!(closed.is_err(), "it was closed");
    idle.send(&chat_on(3, &chat("demo"))).await;
    assert!(idle.answer().await);
}

#[tokio::test]
async fn half_a_header_under_http_2_keeps_nobody_out() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { connections: 1, header_timeout: 60s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    for (asks_first, ended) in [(false, 1.0), (true, 2.0)] {
        gateway
            .metric_becomes("forebay_client_connections", 0.0)
            .await;
        let mut half = Frames::open(gateway.addr, &[]).await;
        if asks_first {
            half.send(&chat_on(1, &chat("demo"))).await;
            assert!(half.answer().await);
        }
        // Read together: once the ping is answered, the rest is known too.
        let ping = frame(PING, 0, 0, &[0; 8]);
        half.send(&[ping, frame(HEADERS, 0, 3, &block(&CHAT))].concat())
            .await;
        while half.next().await.expect("it is open").kind != PING {}
        let mut newcomer = Frames::open(gateway.addr, &[]).await;
        newcomer.send(&chat_on(1, &chat("demo"))).await;
        assert!(newcomer.answer().await, "asked first: {asks_first}");
        half.ended().await;
        let hits = gateway.metric(&hits("idle_connections")).await;
        assert_eq!(hits, Some(ended));
    }
}

#[tokio::test]
async fn a_dribble_of_header_bytes_is_cut_under_http_2() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 500ms }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let value = [b'y'; 5000];
    let mut fields: Vec<Field<'_>> = CHAT.to_vec();
    fields.push((b"x", &value));
    let header = frame(HEADERS, 5, 1, &block(&fields));
    let mut attacker = Frames::open(gateway.addr, &[]).await;
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let mut sent = 0;
    for byte in header.chunks(1) {
        tick.tick().await;
        if !attacker.send(byte).await {
            break;
        }
        sent += 1;
    }
    assert!(sent < 1000, "{sent} bytes were taken");
    is_unharmed(&gateway).await;
}

#[test]
fn the_h2_crate_has_the_mended_floods() {
    // RUSTSEC-2024-0332, -2025-0070, -2026-0258: floods that are survived above.
    let lock = include_str!("../../Cargo.lock");
    let versions: Vec<&str> = lock
        .split("[[package]]")
        .filter(|package| package.contains("\nname = \"h2\"\n"))
        .filter_map(|package| package.split("version = \"").nth(1)?.split('"').next())
        .collect();
    assert!(!versions.is_empty());
    for version in versions {
        let numbers: Vec<u32> = version
            .split('.')
            .map(|number| number.parse().unwrap())
            .collect();
        assert!(numbers >= vec![0, 4, 16], "h2 {version}");
    }
}
