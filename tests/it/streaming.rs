//! Streams: nothing is held back, nothing is mixed up, and what goes wrong is
//! either not seen at all or said in one error event.

use std::fs;

use forebay::sim::Sim;
use serde_json::Value;

use crate::support::{
    Answer, Connection, Gateway, Scripted,
    by_hand::{ByHand, STREAM_HEAD, delta, group_of},
    chat, chat_stream, eventually,
    http::{build, post, post_chat},
    one_group, sim, soon,
};

const PING_CHUNK: &str = "8\r\n: ping\n\n\r\n";

/// `gpu-1` in the group `gpus`, and `gpu-2` as its fallback. `more` — further
/// keys of `gpu-1`.
fn pair(first: &str, more: &str, second: &str) -> String {
    format!(
        r#"
groups:
  gpus:
    upstreams:
      - {{ name: gpu-1, url: "{first}", {more} }}
  ollama:
    upstreams:
      - {{ name: gpu-2, url: "{second}" }}
routes:
  - {{ model: "*", groups: [gpus], fallback: ollama }}
"#
    )
}

/// The same, with a group `gpus` whose answers nobody goes on with.
fn without_takeover(config: &str) -> String {
    config.replace("  gpus:\n", "  gpus:\n    takeover: false\n")
}

/// The data of each event, read as the standard says.
fn events(answer: &Answer) -> Vec<String> {
    answer
        .text()
        .split("\n\n")
        .filter_map(|event| {
            let lines: Vec<&str> = event
                .lines()
                .filter_map(|line| line.strip_prefix("data:"))
                .map(|value| value.strip_prefix(' ').unwrap_or(value))
                .collect();
            (!lines.is_empty()).then(|| lines.join("\n"))
        })
        .collect()
}

fn chunks(answer: &Answer) -> Vec<Value> {
    events(answer)
        .iter()
        .filter(|event| *event != "[DONE]")
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

/// What a streamed chat says.
fn said(answer: &Answer) -> String {
    chunks(answer)
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect()
}

#[track_caller]
fn assert_whole(answer: &Answer) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert!(answer.complete, "{}", answer.text());
    let events = events(answer);
    assert_eq!(
        events.last().map(String::as_str),
        Some("[DONE]"),
        "{}",
        answer.text()
    );
    assert_eq!(events.iter().filter(|event| *event == "[DONE]").count(), 1);
    assert!(!answer.text().contains("\"error\""), "{}", answer.text());
}

/// The answer ends with the only error event, in OpenAI's shape, and in good
/// order; returns its code.
#[track_caller]
fn assert_broken_off(answer: &Answer) -> String {
    assert_eq!(answer.status, 200);
    assert!(answer.complete, "{}", answer.text());
    assert!(!answer.text().contains("[DONE]"), "{}", answer.text());
    let chunks = chunks(answer);
    let errors = chunks.iter().filter(|chunk| chunk.get("error").is_some());
    assert_eq!(errors.count(), 1, "{}", answer.text());
    let error = &chunks.last().unwrap()["error"];
    assert_eq!(error["type"], "server_error", "{}", answer.text());
    assert!(error["message"].is_string() && error["param"].is_null());
    error["code"].as_str().unwrap().to_owned()
}

/// The text of the unfaulted answer to [`chat_stream`].
async fn unfaulted(gateway: &Gateway) -> String {
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.content()
}

/// A streaming request on a connection of its own, sent.
async fn asking(gateway: &Gateway) -> Connection {
    let mut client = Connection::open(gateway.addr).await;
    let body = chat_stream("demo");
    client
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    client
}

#[tokio::test]
async fn an_event_is_forwarded_before_the_next_one_is_sent() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    for word in ["one", "two", "three"] {
        call.say(word).await;
        client.read_until(word).await;
    }
    call.chunk("data: [DONE]\n\n").await;
    call.end().await;
    let answer = client.answer().await;
    assert_whole(&answer);
    assert_eq!(said(&answer), "onetwothree");
    assert_eq!(answer.upstream(), "gpu-1");
    assert_eq!(answer.header("x-forebay-group"), Some("gpus"));
    assert_eq!(answer.header("x-forebay-attempts"), Some("1"));
    assert_eq!(answer.header("x-forebay-fallback"), Some("0"));
    assert!(
        answer.text().lines().all(|line| !line.starts_with(':')),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn every_dialect_of_event_streams_says_the_same() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let expected = unfaulted(&gateway).await;
    for fault in [
        "newline=cr",
        "newline=crlf",
        "bom",
        "comments",
        "multi_data",
        "split=1",
        "split=3",
        "split=7",
        "per_write=5",
        "http10",
        "trailers",
        "newline=cr;bom;comments;multi_data;split=1",
        "newline=crlf;bom;comments;multi_data;split=3",
    ] {
        gpu.fault(fault).await.unwrap();
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_whole(&answer);
        assert!(
            !answer.text().contains('\r') && !answer.text().contains('\u{feff}'),
            "{fault}"
        );
        assert_eq!(said(&answer), expected, "{fault}");
    }
}

#[tokio::test]
async fn characters_survive_being_cut_anywhere() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let text = "zażółć gęślą jaźń 😀 日本語";
    for piece in [1, 2, 3, 5, 11] {
        let mut client = asking(&gateway).await;
        let mut call = upstream.accept().await;
        call.send(STREAM_HEAD).await;
        for bytes in delta(text).into_bytes().chunks(piece) {
            call.chunk(bytes).await;
        }
        call.chunk("data: [DONE]\n\n").await;
        // The connection is not to be used again: the next one is by hand too.
        drop(call);
        let answer = client.answer().await;
        assert_whole(&answer);
        assert_eq!(said(&answer), text);
    }
}

#[tokio::test]
async fn a_stream_that_fails_before_its_first_token_is_never_seen() {
    let (first, second) = (sim("gpu-1").await, sim("gpu-2").await);
    let quick = "timeouts: { first_token: 400ms }";
    let gateway = Gateway::start(&pair(&first.url(), quick, &second.url())).await;
    for fault in [
        "error_at=0",
        "error_at=1",
        "error_at=1;error_then_done",
        "empty_stream",
        "die_at=0",
        "die_at=1",
        "die_at=1;how=rst",
        "die_at=1;how=mid_utf8",
        "die_at=1;how=mid_chunk",
        "stall_at=0",
        "stall_at=1",
        "only_comments=20",
        "hang",
    ] {
        first.fault(fault).await.unwrap();
        gateway.reset(None).await;
        let (before, after) = (first.records().len(), second.records().len());
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_whole(&answer);
        assert_eq!(answer.upstream(), "gpu-2", "{fault}");
        assert_eq!(answer.header("x-forebay-attempts"), Some("2"), "{fault}");
        assert_eq!(answer.header("x-forebay-fallback"), Some("1"), "{fault}");
        assert!(
            said(&answer).starts_with("gpu-2 answers:"),
            "{fault}: {}",
            answer.text()
        );
        let chunks = chunks(&answer);
        assert!(
            chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"]),
            "{fault}"
        );
        let roles = chunks
            .iter()
            .filter(|chunk| chunk["choices"][0]["delta"]["role"].is_string());
        assert_eq!(roles.count(), 1, "{fault}");
        assert_eq!(first.records().len(), before + 1, "{fault}");
        assert_eq!(second.records().len(), after + 1, "{fault}");
        heal(&gateway, &first).await;
    }
}

/// Lets `gpu-1` answer once, so that its failures do not add up.
async fn heal(gateway: &Gateway, first: &Sim) {
    first.clear_faults().await;
    let pinned = [("x-forebay-upstream", "gpu-1")];
    let answer = post(
        gateway.addr,
        "/v1/chat/completions",
        &pinned,
        chat("demo").as_bytes(),
    )
    .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn a_stream_of_nothing_but_its_end_is_no_answer() {
    let role = r#"data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#;
    let second = sim("gpu-2").await;
    for body in [
        "data: [DONE]\n\n".to_owned(),
        format!("{role}\n\ndata: [DONE]\n\n"),
    ] {
        let bytes = format!("{STREAM_HEAD}{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
        let first = Scripted::always(bytes).await;
        let gateway = Gateway::start(&pair(&first.url(), "", &second.url())).await;
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_whole(&answer);
        assert_eq!(answer.upstream(), "gpu-2");
        assert_eq!(first.requests().len(), 1);
    }
}

#[tokio::test]
async fn comments_without_end_are_no_first_token() {
    let (first, second) = (ByHand::listen().await, sim("gpu-2").await);
    let quick = "timeouts: { first_token: 400ms }";
    let gateway = Gateway::start(&pair(&first.url(), quick, &second.url())).await;
    let mut client = asking(&gateway).await;
    let mut call = first.accept().await;
    call.send(STREAM_HEAD).await;
    // As fast as they are taken: there is always something to read.
    let flood = tokio::spawn(async move {
        let piece = format!(
            "4000\r\n{}\r\n",
            ": keep-alive....\n"
                .repeat(0x4000 / 17 + 1)
                .get(..0x4000)
                .unwrap()
        );
        call.fill(piece.as_bytes(), usize::MAX).await
    });
    let answer = client.answer().await;
    assert_whole(&answer);
    assert_eq!(answer.upstream(), "gpu-2");
    soon("the flood ends", flood).await.unwrap();
}

#[tokio::test]
async fn a_waiting_client_hears_comments_while_failover_goes_on() {
    let (first, second) = (ByHand::listen().await, ByHand::listen().await);
    let config = pair(&first.url(), "", &second.url()) + "limits: { heartbeat: 150ms }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway).await;
    let call = first.accept().await;
    client.read_until(&PING_CHUNK.repeat(2)).await;
    drop(call);
    let mut call = second.accept().await;
    client.read_until(&PING_CHUNK.repeat(3)).await;
    call.send(STREAM_HEAD).await;
    client.read_until(&PING_CHUNK.repeat(4)).await;
    call.say("late").await;
    client.read_until("late").await;
    // The stream pauses: comments again.
    client.read_until(&format!("\n\n\r\n{PING_CHUNK}")).await;
    call.chunk("data: [DONE]\n\n").await;
    call.end().await;
    let answer = client.answer().await;
    assert_whole(&answer);
    assert_eq!(said(&answer), "late");
    assert!(answer.text().starts_with(": ping\n\n"), "{}", answer.text());
    assert!(answer.header("x-request-id").is_some());
    assert_eq!(
        answer.header("x-forebay-upstream"),
        None,
        "not known when the head went out"
    );
    let blocks: Vec<&str> = answer.text().trim_end().split("\n\n").collect();
    let comments = blocks.iter().filter(|block| block.starts_with(": forebay"));
    assert_eq!(comments.count(), 1, "{}", answer.text());
    let before_done = blocks[blocks.len() - 2];
    let who: Value = serde_json::from_str(before_done.strip_prefix(": forebay ").unwrap()).unwrap();
    let expected = serde_json::json!({
        "upstream": "gpu-2", "group": "ollama", "attempts": 2, "fallback": true,
    });
    assert_eq!(who, expected);
}

#[tokio::test]
async fn a_committed_stream_that_pauses_is_kept_alive_by_comments() {
    let upstream = ByHand::listen().await;
    let config = group_of(&upstream.url()) + "limits: { heartbeat: 150ms }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD.to_owned() + "0b\r\ndata: {\"cho")
        .await;
    call.send("\r\n").await;
    call.chunk(delta("one").strip_prefix("data: {\"cho").unwrap())
        .await;
    client.read_until("one").await;
    client.read_until(&PING_CHUNK.repeat(2)).await;
    // Half an event is no reason to be silent, and is not torn by a comment.
    call.chunk("data: {\"choices\":[{\"index\":0,").await;
    client.read_until(&PING_CHUNK.repeat(3)).await;
    call.chunk("\"delta\":{\"content\":\"two\"}}]}\n\ndata: [DONE]\n\n")
        .await;
    call.end().await;
    let answer = client.answer().await;
    assert_whole(&answer);
    assert_eq!(said(&answer), "onetwo");
}

#[tokio::test]
async fn a_final_failure_after_comments_is_one_error_event() {
    let upstream = ByHand::listen().await;
    let config = group_of(&upstream.url()) + "limits: { heartbeat: 150ms }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway).await;
    let call = upstream.accept().await;
    client.read_until(PING_CHUNK).await;
    drop(call);
    let answer = client.answer().await;
    assert_eq!(assert_broken_off(&answer), "upstream_error");
    assert!(answer.text().starts_with(": ping\n\n"), "{}", answer.text());
    gateway.logged("ending=incomplete").await;
    // The connection is in order: it serves the next request.
    client.request("GET", "/livez", &[], b"").await;
    assert_eq!(client.answer().await.status, 200);
}

#[tokio::test]
async fn an_answer_that_is_not_streamed_never_holds_comments() {
    let gpu = sim("gpu-1").await;
    gpu.fault("first_token=300ms").await.unwrap();
    let config = one_group(&[&gpu]) + "limits: { heartbeat: 100ms }\n";
    let gateway = Gateway::start(&config).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.status, 200);
    assert!(answer.header("content-length").is_some());
    assert_eq!(answer.upstream(), "gpu-1");
    assert!(answer.content().starts_with("gpu-1 answers:"));
}

#[tokio::test]
async fn usage_is_asked_of_the_upstream_and_hidden_from_who_did_not_ask() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for fault in [
        "",
        "continuous_usage",
        "continuous_usage;multi_data;newline=crlf",
    ] {
        gpu.fault(fault).await.unwrap();
        for body in [
            chat_stream("demo"),
            chat_stream("demo").replace(
                "\"stream\":true",
                r#""stream":true,"stream_options":{"include_usage":false}"#,
            ),
        ] {
            gpu.clear_records();
            let answer = post_chat(gateway.addr, &body).await;
            assert_whole(&answer);
            assert!(said(&answer).starts_with("gpu-1 answers:"));
            assert!(
                !answer.text().contains("usage"),
                "{fault}: {}",
                answer.text()
            );
            assert!(
                chunks(&answer)
                    .iter()
                    .all(|chunk| chunk["choices"] != serde_json::json!([]))
            );
            assert_eq!(
                gpu.records()[0].json()["stream_options"]["include_usage"],
                true
            );
        }
    }
    // It was for us: tokens are counted.
    gateway.logged("tokens_out=24").await;
    let series = r#"forebay_tokens_total{direction="out",route="*",upstream="gpu-1"}"#;
    gateway.metric_becomes(series, 6.0 * 24.0).await;
}

#[tokio::test]
async fn usage_is_given_once_to_who_asked() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let body = chat_stream("demo").replace(
        "\"stream\":true",
        r#""stream":true,"stream_options":{"include_usage":true}"#,
    );
    let answer = post_chat(gateway.addr, &body).await;
    assert_whole(&answer);
    let chunks = chunks(&answer);
    let with_usage: Vec<&Value> = chunks
        .iter()
        .filter(|chunk| chunk["usage"].is_object())
        .collect();
    assert_eq!(with_usage.len(), 1);
    assert_eq!(with_usage[0]["choices"], serde_json::json!([]));
    assert_eq!(with_usage[0]["usage"]["completion_tokens"], 24);
    assert_eq!(
        gpu.records()[0].body,
        body.as_bytes(),
        "nothing to add: not a byte changed"
    );
}

#[tokio::test]
async fn an_upstream_that_is_not_to_be_asked_for_usage_gets_the_body_untouched() {
    let (first, second) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&pair(&first.url(), "include_usage: false", &second.url())).await;
    let body = r#"{ "model" : "demo", "stream":true, "messages":[{"role":"user","content":"\u0048i"}], "temperature":1e0 }"#;
    let answer = post_chat(gateway.addr, body).await;
    assert_whole(&answer);
    assert_eq!(first.records()[0].body, body.as_bytes());
}

#[tokio::test]
async fn a_stream_that_dies_after_its_first_token_is_kept_and_ends_with_an_error_event() {
    let (first, second) = (sim("gpu-1").await, sim("gpu-2").await);
    let quick = "timeouts: { inter_token: 600ms }";
    let config = pair(&first.url(), quick, &second.url());
    let gateway = Gateway::start(&without_takeover(&config)).await;
    let expected = unfaulted(&gateway).await;
    let words = |count| {
        let words: Vec<&str> = expected.split(' ').take(count).collect();
        words.join(" ")
    };
    let faults = [
        ("die_at=5", 4, "upstream_incomplete"),
        ("die_at=5;how=mid_chunk", 4, "upstream_incomplete"),
        ("die_at=5;how=mid_utf8", 4, "upstream_incomplete"),
        ("die_at=5;how=mid_utf8+mid_chunk", 4, "upstream_incomplete"),
        ("error_at=5", 4, "upstream_incomplete"),
        ("error_at=5;error_then_done", 4, "upstream_incomplete"),
        ("no_done", 24, "upstream_incomplete"),
        ("stall_at=5", 4, "upstream_idle"),
    ];
    for (fault, count, code) in faults {
        first.fault(fault).await.unwrap();
        gateway.reset(None).await;
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_eq!(
            assert_broken_off(&answer),
            code,
            "{fault}: {}",
            answer.text()
        );
        assert_eq!(answer.upstream(), "gpu-1", "{fault}");
        assert_eq!(said(&answer), words(count), "{fault}");
    }
    assert!(second.records().is_empty(), "retried after the first byte");
    assert_eq!(
        first.records().len(),
        faults.len() + 1,
        "retried after the first byte"
    );
    let series = r#"forebay_requests_total{endpoint="chat_completions",outcome="incomplete",route="*",status="200"}"#;
    gateway.metric_becomes(series, faults.len() as f64).await;
    let lines = || gateway.log().matches("ending=incomplete").count();
    eventually("each has its line", async || lines() >= faults.len()).await;
    assert_eq!(lines(), faults.len(), "{}", gateway.log());
}

#[tokio::test]
async fn a_reset_after_the_first_token_ends_with_an_error_event() {
    let (first, second) = (ByHand::listen().await, sim("gpu-2").await);
    let config = without_takeover(&pair(&first.url(), "", &second.url()));
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway).await;
    let mut call = first.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("one").await;
    client.read_until("one").await;
    call.reset();
    let answer = client.answer().await;
    assert_eq!(assert_broken_off(&answer), "upstream_incomplete");
    assert_eq!(said(&answer), "one");
    assert!(second.records().is_empty(), "retried after the first byte");
    gateway.logged("ending=incomplete").await;
}

#[tokio::test]
async fn an_event_larger_than_the_limit_fails_over_before_the_first_token() {
    let (first, second) = (sim("gpu-1").await, sim("gpu-2").await);
    first.fault("huge_event=20000").await.unwrap();
    let config = pair(&first.url(), "", &second.url()) + "limits: { event: 4KiB }\n";
    let gateway = Gateway::start(&config).await;
    let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_whole(&answer);
    assert_eq!(answer.upstream(), "gpu-2");
    assert_eq!(
        gateway
            .metric(r#"forebay_limit_hits_total{limit="event"}"#)
            .await,
        Some(1.0)
    );
}

#[tokio::test]
async fn an_event_larger_than_the_limit_ends_a_committed_stream() {
    let upstream = ByHand::listen().await;
    let config = group_of(&upstream.url()) + "limits: { event: 4KiB }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("one").await;
    call.say(&"x".repeat(5000)).await;
    let answer = client.answer().await;
    assert_eq!(assert_broken_off(&answer), "upstream_incomplete");
    assert_eq!(said(&answer), "one");
    call.closed().await;
}

#[tokio::test]
async fn the_end_of_the_answer_does_not_wait_for_the_end_of_the_body() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("all").await;
    call.chunk("data: [DONE]\n\n").await;
    // No last chunk, and the connection stays open.
    let answer = client.answer().await;
    assert_whole(&answer);
    gateway.logged("ending=success").await;
    call.closed().await;
}

#[tokio::test]
async fn an_upstream_that_closes_right_after_its_last_event_has_answered() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    let done = "data: [DONE]\n\n";
    let one = delta("all");
    call.send(format!(
        "{STREAM_HEAD}{:x}\r\n{one}\r\n{:x}\r\n{done}\r\n",
        one.len(),
        done.len()
    ))
    .await;
    drop(call);
    let answer = client.answer().await;
    assert_whole(&answer);
    assert_eq!(said(&answer), "all");
    gateway.logged("ending=success").await;
}

#[tokio::test]
async fn a_last_event_without_its_blank_line_counts_at_the_end_of_the_body() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    for last in ["data: [DONE]", "data: [DONE]\n", "data: [DONE]\r\n"] {
        let mut client = asking(&gateway).await;
        let mut call = upstream.accept().await;
        call.send(STREAM_HEAD.replace(
            "transfer-encoding: chunked",
            "connection: close\r\ntransfer-encoding: chunked",
        ))
        .await;
        call.say("all").await;
        call.chunk(last).await;
        call.end().await;
        let answer = client.answer().await;
        assert_whole(&answer);
        assert_eq!(said(&answer), "all");
    }
    // Any other event that was not finished was cut off.
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("some").await;
    call.chunk(delta(" more").trim_end()).await;
    call.end().await;
    let answer = client.answer().await;
    assert_broken_off(&answer);
    assert_eq!(said(&answer), "some");
}

// A simulator that never waits leaves no time to anything on its thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_has_an_end_however_lively_it_is() {
    let gpu = sim("gpu-1").await;
    let config = one_group(&[&gpu]) + "limits: { heartbeat: 100ms, stream_timeout: 200ms }\n";
    let gateway = Gateway::start(&config).await;
    for fault in ["gap=20;tokens=1000000", "tokens=100000000"] {
        gpu.fault(fault).await.unwrap();
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_eq!(assert_broken_off(&answer), "stream_timeout", "{fault}");
        assert!(said(&answer).starts_with("gpu-1 answers:"));
    }
}

#[tokio::test]
async fn a_whole_answer_to_who_wanted_a_stream_is_told_as_one() {
    let body =
        r#"{"id":"x","choices":[{"index":0,"message":{"role":"assistant","content":"whole"}}]}"#;
    let upstream = Scripted::always(crate::support::scripted::json(200, body)).await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert_whole(&answer);
    assert_eq!(answer.content(), "whole");
    assert_eq!(answer.upstream(), "gpu-1");
}

#[tokio::test]
async fn an_event_that_is_no_json_fails_over_before_the_first_token() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    let good =
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"x\"}}]}\n\ndata: [DONE]\n\n";
    for nonsense in ["data: {nope\n\n", "data: null\n\n", "data: <html>\n\n"] {
        let bad = Scripted::always(format!("{head}{nonsense}{good}").into_bytes()).await;
        let gpu = sim("gpu-2").await;
        let gateway = Gateway::start(&pair(&bad.url(), "", &gpu.url())).await;
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_whole(&answer);
        assert_eq!(answer.upstream(), "gpu-2", "{nonsense:?}");
        assert!(!answer.text().contains(nonsense.trim_end()));
    }
}

#[tokio::test]
async fn a_whole_answer_after_comments_is_told_as_events() {
    let upstream = ByHand::listen().await;
    let config = group_of(&upstream.url()) + "limits: { heartbeat: 100ms }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    client.read_until(PING_CHUNK).await;
    let body = "{\"choices\":[{\"index\":0,\r\n\"message\":{\"content\":\"whole\"}}]}";
    call.send(crate::support::scripted::json(200, body)).await;
    let answer = client.answer().await;
    assert_whole(&answer);
    assert_eq!(
        chunks(&answer)[0]["choices"][0]["delta"]["content"],
        "whole"
    );
    assert!(
        answer.text().contains(": forebay {\"upstream\":\"gpu-1\""),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_client_of_http_1_0_reads_to_the_end_of_the_connection() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let expected = unfaulted(&gateway).await;
    let mut client = Connection::open(gateway.addr).await;
    let body = chat_stream("demo");
    client
        .send(
            format!(
                "POST /v1/chat/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.header("transfer-encoding"), None);
    assert_eq!(answer.header("content-length"), None);
    assert_whole(&answer);
    assert_eq!(said(&answer), expected);
}

#[tokio::test]
async fn streams_at_the_same_time_do_not_mix() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=2").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let streams: Vec<_> = (0..12)
        .map(|nonce| {
            let addr = gateway.addr;
            tokio::spawn(async move {
                let ask = |body: String| body.replace("Hello", &format!("Hello {nonce}"));
                let streamed = post_chat(addr, &ask(chat_stream("demo"))).await;
                let whole = post_chat(addr, &ask(chat("demo"))).await;
                assert_whole(&streamed);
                assert_eq!(said(&streamed), whole.content());
                said(&streamed)
            })
        })
        .collect();
    let mut texts = Vec::new();
    for stream in streams {
        texts.push(stream.await.unwrap());
    }
    texts.sort();
    texts.dedup();
    assert_eq!(texts.len(), 12, "each question has its own answer");
}

#[tokio::test]
async fn a_slow_reader_slows_the_upstream_down_and_costs_no_memory() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("first").await;
    client.read_until("first").await;
    // From here on the client does not read.
    let event = delta(&"x".repeat(1000));
    let piece = format!("{:x}\r\n{event}\r\n", event.len()).repeat(16);
    let most = 256 << 20;
    let taken = call.fill(piece.as_bytes(), most).await;
    assert!(taken < most, "nobody stopped the upstream");
    let status = fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak_kib: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib < 128 << 10, "{peak}");
    client.reset();
    call.closed().await;
}

// A simulator that never waits leaves no time to anything on its thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_given_up_after_the_write_timeout() {
    let gpu = sim("gpu-1").await;
    gpu.fault("tokens=100000000").await.unwrap();
    let config = one_group(&[&gpu]) + "limits: { write_timeout: 300ms }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway).await;
    client.read_until("answers:").await;
    gateway.logged("status=499 ending=client_closed").await;
    gateway
        .metric_becomes("forebay_client_closed_total", 1.0)
        .await;
    gpu.wait_for(crate::support::DEADLINE, |records| {
        records[0].state == forebay::sim::State::ClientLeft
    })
    .await
    .unwrap();
    // What it was sent does not look complete.
    let rest = client.rest().await;
    assert!(!rest.ends_with(b"0\r\n\r\n"));
}

#[tokio::test]
async fn a_connection_serves_the_next_request_after_a_stream() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let mut client = Connection::open(gateway.addr).await;
    for round in 0..3 {
        let (body, streamed) = match round % 2 {
            0 => (chat_stream("demo"), true),
            _ => (chat("demo"), false),
        };
        client
            .request("POST", "/v1/chat/completions", &[], body.as_bytes())
            .await;
        let answer = client.answer().await;
        assert!(answer.complete && answer.content().starts_with("gpu-1 answers:"));
        assert_eq!(
            streamed,
            answer.header("transfer-encoding") == Some("chunked")
        );
    }
    assert_eq!(
        gpu.connections().total,
        1,
        "the upstream's connection is used again too"
    );
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let mut client = Connection::open(gateway.addr).await;
    let path = "/v1/chat/completions";
    let mut bytes = build(
        "POST",
        path,
        &[("x-request-id", "first")],
        chat_stream("demo").as_bytes(),
    );
    bytes.extend(build(
        "POST",
        path,
        &[("x-request-id", "second")],
        chat("demo").as_bytes(),
    ));
    bytes.extend(build(
        "POST",
        path,
        &[("x-request-id", "third")],
        chat_stream("demo").as_bytes(),
    ));
    client.send(&bytes).await;
    for id in ["first", "second", "third"] {
        let answer = client.answer().await;
        assert_eq!(answer.header("x-request-id"), Some(id));
        assert!(
            answer.complete && answer.content().starts_with("gpu-1 answers:"),
            "{id}"
        );
    }
}

#[tokio::test]
async fn a_next_request_in_the_middle_of_a_stream_cuts_nothing() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    let mut client = asking(&gateway).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("one").await;
    client.read_until("one").await;
    client
        .request("GET", "/livez", &[("x-request-id", "next")], b"")
        .await;
    for word in ["two", "three"] {
        call.say(word).await;
        client.read_until(word).await;
    }
    call.chunk("data: [DONE]\n\n").await;
    call.end().await;
    let answer = client.answer().await;
    assert_whole(&answer);
    assert_eq!(said(&answer), "onetwothree");
    assert_eq!(client.answer().await.header("x-request-id"), Some("next"));
}
