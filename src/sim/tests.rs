//! What each knob looks like on the wire, seen by a raw socket.

use std::{collections::BTreeSet, io, net::SocketAddr, time::Duration};

use serde_json::{Value as Json, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{Fault, Sim, SimOptions, State, faults::KNOBS};

/// Nothing here takes longer unless it is broken.
const DEADLINE: Duration = Duration::from_secs(10);

const CHAT: &str = r#"{"model":"demo","messages":[{"role":"user","content":"hi there"}]}"#;
const STREAM: &str =
    r#"{"model":"demo","messages":[{"role":"user","content":"hi there"}],"stream":true}"#;

async fn sim() -> Sim {
    let options = SimOptions {
        tokens: 6,
        ..SimOptions::quick("sim")
    };
    Sim::start(options).await.unwrap()
}

fn post(body: &str) -> String {
    post_with("", body)
}

fn post_with(headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: sim\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )
}

/// A client that sees bytes.
struct Client {
    stream: TcpStream,
    seen: Vec<u8>,
}

impl Client {
    async fn connect(addr: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(addr).await.unwrap(),
            seen: Vec::new(),
        }
    }

    async fn send(addr: SocketAddr, request: &str) -> Self {
        let mut client = Self::connect(addr).await;
        client.write(request).await;
        client
    }

    async fn write(&mut self, request: &str) {
        self.stream.write_all(request.as_bytes()).await.unwrap();
    }

    async fn read_more(&mut self) -> io::Result<usize> {
        timeout(DEADLINE, self.stream.read_buf(&mut self.seen))
            .await
            .expect("more bytes in time")
    }

    /// Reads until `text` was seen.
    async fn until(&mut self, text: &str) {
        while !self.has(text) {
            let n = self.read_more().await.unwrap();
            assert_ne!(n, 0, "ended before {text:?}: {:?}", self.text());
        }
    }

    /// Forgets what was seen and reads one answer that tells its length.
    async fn answer(&mut self) {
        self.seen.clear();
        self.until("\r\n\r\n").await;
        let head = self.head();
        let length = head.split("content-length: ").nth(1).unwrap();
        let length: usize = length.lines().next().unwrap().parse().unwrap();
        while self.seen.len() < head.len() + 4 + length {
            assert_ne!(self.read_more().await.unwrap(), 0, "{}", self.text());
        }
    }

    /// Reads to the end: whether it was a FIN, or the error it was instead.
    async fn end(&mut self) -> io::Result<()> {
        while self.read_more().await? > 0 {}
        Ok(())
    }

    async fn is_reset(&mut self) -> bool {
        let error = self.end().await.err();
        error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
    }

    fn has(&self, text: &str) -> bool {
        super::http::find(&self.seen, text.as_bytes()).is_some()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    fn head(&self) -> String {
        self.text().split_once("\r\n\r\n").unwrap().0.to_owned()
    }

    /// The body with chunks joined; whether its end was seen.
    fn dechunked(&self) -> (Vec<u8>, bool) {
        let start = super::http::find(&self.seen, b"\r\n\r\n").unwrap() + 4;
        let (mut rest, mut body) = (&self.seen[start..], Vec::new());
        while let Some(line) = super::http::find(rest, b"\r\n") {
            let size = std::str::from_utf8(&rest[..line]).unwrap();
            let size = usize::from_str_radix(size, 16).unwrap();
            rest = &rest[line + 2..];
            if size == 0 {
                return (body, true);
            }
            let Some(data) = rest.get(..size) else {
                body.extend(rest);
                return (body, false);
            };
            body.extend(data);
            rest = &rest[size + 2..];
        }
        (body, false)
    }

    /// The chunks' sizes.
    fn chunks(&self) -> Vec<usize> {
        let start = super::http::find(&self.seen, b"\r\n\r\n").unwrap() + 4;
        let (mut rest, mut sizes) = (&self.seen[start..], Vec::new());
        while let Some(line) = super::http::find(rest, b"\r\n") {
            let size = std::str::from_utf8(&rest[..line]).unwrap();
            let size = usize::from_str_radix(size, 16).unwrap();
            sizes.push(size);
            match rest.get(line + 2 + size + 2..) {
                Some(next) if size > 0 => rest = next,
                _ => break,
            }
        }
        sizes
    }
}

/// The `data:` of each event of a stream with any line ends.
fn events(body: &[u8]) -> Vec<String> {
    let text = std::str::from_utf8(body).unwrap();
    let text = text.trim_start_matches('\u{feff}');
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    text.split("\n\n")
        .filter_map(|event| {
            let lines = event.lines().filter_map(|line| line.strip_prefix("data: "));
            let lines: Vec<&str> = lines.collect();
            (!lines.is_empty()).then(|| lines.join("\n"))
        })
        .collect()
}

fn words(events: &[String]) -> String {
    let jsons = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Json>(event).ok());
    jsons
        .filter_map(|json| {
            json["choices"][0]["delta"]["content"]
                .as_str()
                .map(str::to_owned)
        })
        .collect()
}

/// One streamed request under a fault, read until the stream or the connection
/// ends.
async fn streamed(fault: &str) -> Client {
    let sim = sim().await;
    sim.fault(fault).await.unwrap();
    let mut client = Client::send(sim.addr(), &post_with("Connection: close\r\n", STREAM)).await;
    client.end().await.unwrap();
    client
}

/// One whole request under a fault, read until the connection ends.
async fn whole(fault: &str) -> Client {
    let sim = sim().await;
    sim.fault(fault).await.unwrap();
    let mut client = Client::send(sim.addr(), &post_with("Connection: close\r\n", CHAT)).await;
    client.end().await.unwrap();
    client
}

// --- without a fault

#[tokio::test]
async fn a_stream_is_role_words_finish_and_done() {
    let client = streamed("").await;
    assert!(client.head().starts_with("HTTP/1.1 200 OK"));
    assert!(client.head().contains("content-type: text/event-stream"));
    let (body, ended) = client.dechunked();
    assert!(ended);
    let events = events(&body);
    assert_eq!(events.len(), 1 + 6 + 1 + 1);
    assert!(events[0].contains(r#""delta":{"role":"assistant","content":""}"#));
    assert!(events[7].contains(r#""finish_reason":"stop""#));
    assert_eq!(events[8], "[DONE]");
    assert!(words(&events).starts_with("sim answers: "));
    assert!(!client.has("usage"));
}

#[tokio::test]
async fn usage_comes_last_when_it_is_asked_for() {
    let sim = sim().await;
    let body = STREAM.replace("}]", r#"}],"stream_options":{"include_usage":true}"#);
    let mut client = Client::send(sim.addr(), &post(&body)).await;
    client.until("0\r\n\r\n").await;
    let events = events(&client.dechunked().0);
    let usage: Json = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(
        usage["usage"],
        json!({ "prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8 })
    );
}

#[tokio::test]
async fn a_complete_answer_is_continued_by_nothing() {
    let sim = sim().await;
    let partial =
        r#"},{"role":"assistant","content":"a b c d e f"}],"continue_final_message":true"#;
    let mut client = Client::send(sim.addr(), &post(&STREAM.replace("}]", partial))).await;
    client.until("[DONE]").await;
    let seen = events(&client.dechunked().0);
    assert_eq!((words(&seen).as_str(), seen.len()), ("", 3));
    assert!(seen[1].contains(r#""finish_reason":"stop""#));
}

#[tokio::test]
async fn a_connection_serves_many_requests_also_pipelined_and_chunked() {
    let sim = sim().await;
    let chunked = "POST /x/v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    let mut client = Client::send(sim.addr(), &[&post(CHAT), chunked, &post(CHAT)].concat()).await;
    let answers = |client: &Client| client.text().matches("HTTP/1.1").count();
    while answers(&client) < 3 {
        client.read_more().await.unwrap();
    }
    let records = sim
        .wait_for(DEADLINE, |r| r.len() == 3 && r.iter().all(|r| r.finished()))
        .await
        .unwrap();
    assert_eq!(records.iter().map(|r| r.nth).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(records.iter().all(|r| r.connection == 1));
    assert_eq!(records[1].body, "{}");
    assert_eq!(records[1].raw(), chunked.as_bytes());
    assert_eq!(records[1].status, Some(400));
    assert_eq!(records[0].raw(), post(CHAT).as_bytes());
}

#[tokio::test]
async fn who_expects_100_continue_gets_it_before_sending_the_body() {
    let sim = sim().await;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        CHAT.len()
    );
    let mut client = Client::send(sim.addr(), &head).await;
    client.until("HTTP/1.1 100 Continue\r\n\r\n").await;
    client.write(CHAT).await;
    client.until("chat.completion").await;
}

#[tokio::test]
async fn two_lengths_are_refused_and_recorded() {
    let sim = sim().await;
    let request =
        "POST /v1/x HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc";
    let mut client = Client::send(sim.addr(), request).await;
    client.end().await.unwrap();
    assert!(client.head().starts_with("HTTP/1.1 400"));
    let records = sim.records();
    assert_eq!(
        records[0].header("transfer-encoding").as_deref(),
        Some("chunked")
    );
    assert!(!records[0].body_complete);
}

#[tokio::test]
async fn a_bad_chunk_is_refused_and_recorded_as_it_came() {
    let sim = sim().await;
    let request =
        "POST /v1/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0x1\r\nc\r\n0\r\n\r\n";
    let mut client = Client::send(sim.addr(), request).await;
    client.end().await.unwrap();
    assert!(client.head().starts_with("HTTP/1.1 400"));
    let record = &sim.records()[0];
    assert_eq!(record.raw(), request.as_bytes());
    assert_eq!(
        (&record.body[..], record.body_complete),
        (&b"ab"[..], false)
    );
}

#[tokio::test]
async fn the_rate_sets_the_pace_of_a_stream() {
    let options = SimOptions {
        tokens: 11,
        rate: 100.try_into().ok(),
        first_token: Duration::from_millis(50),
        ..SimOptions::quick("sim")
    };
    let sim = Sim::start(options).await.unwrap();
    let started = Instant::now();
    let mut client = Client::send(sim.addr(), &post(STREAM)).await;
    client.until("content-type").await;
    client.until("[DONE]").await;
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(150), "{took:?}");
    assert!(client.chunks().len() > 2, "{:?}", client.chunks());
}

#[tokio::test]
async fn a_wrong_key_is_refused_but_health_is_open() {
    let options = SimOptions {
        api_key: Some("secret".to_owned()),
        ..SimOptions::quick("sim")
    };
    let sim = Sim::start(options).await.unwrap();
    for (headers, status) in [("", 401), ("Authorization: Bearer secret\r\n", 200)] {
        let mut client = Client::send(sim.addr(), &post_with(headers, CHAT)).await;
        client.until("\r\n\r\n{").await;
        assert!(client.head().contains(&status.to_string()), "{headers}");
    }
    let mut client = Client::send(sim.addr(), "GET /health HTTP/1.1\r\n\r\n").await;
    client.until("HTTP/1.1 200").await;
}

#[tokio::test]
async fn a_loading_model_answers_503() {
    let options = SimOptions {
        load: Duration::from_secs(3600),
        ..SimOptions::quick("sim")
    };
    let sim = Sim::start(options).await.unwrap();
    for request in [post(CHAT), "GET /health HTTP/1.1\r\n\r\n".to_owned()] {
        let mut client = Client::send(sim.addr(), &request).await;
        client.until("Loading model").await;
        assert!(client.head().starts_with("HTTP/1.1 503"));
    }
}

#[tokio::test]
async fn beyond_slots_and_queue_the_server_is_busy() {
    let options = SimOptions {
        slots: 1.try_into().ok(),
        queue: Some(1),
        ..SimOptions::quick("sim")
    };
    let sim = Sim::start(options).await.unwrap();
    sim.fault("times=1;stall_at=1").await.unwrap();
    let mut first = Client::send(sim.addr(), &post(STREAM)).await;
    first.until("assistant").await;
    let mut second = Client::send(sim.addr(), &post(CHAT)).await;
    sim.wait_for(DEADLINE, |r| r.len() == 2).await.unwrap();
    while sim
        .server
        .shared
        .waiting
        .load(std::sync::atomic::Ordering::SeqCst)
        < 1
    {
        tokio::task::yield_now().await;
    }
    let mut third = Client::send(sim.addr(), &post(CHAT)).await;
    third.until("server busy").await;
    drop(first);
    second.until("chat.completion").await;
}

// --- noticing the client

#[tokio::test]
async fn a_client_that_leaves_is_noticed_whatever_the_answer_waits_for() {
    for fault in [
        "hang",
        "first_token=1h",
        "stall_at=2",
        "header_delay=1h",
        "gap=1h",
        "only_comments=1h",
    ] {
        let sim = sim().await;
        sim.fault(fault).await.unwrap();
        let client = Client::send(sim.addr(), &post(STREAM)).await;
        sim.wait_for(DEADLINE, |r| r.len() == 1).await.unwrap();
        assert_eq!(sim.records()[0].state, State::Open, "{fault}");
        drop(client);
        let records = sim
            .wait_for(DEADLINE, |r| r[0].state == State::ClientLeft)
            .await
            .unwrap();
        assert!(records[0].ended_after.unwrap() < DEADLINE);
        sim.wait_for_connections(DEADLINE, |c| c.open == 0)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_is_recorded_as_far_as_it_came() {
    let sim = sim().await;
    let client = Client::send(
        sim.addr(),
        "POST /v1/x HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc",
    )
    .await;
    sim.wait_for_connections(DEADLINE, |c| c.open == 1)
        .await
        .unwrap();
    drop(client);
    let records = sim
        .wait_for(DEADLINE, |r| r.iter().any(|r| r.state == State::ClientLeft))
        .await
        .unwrap();
    assert_eq!(records[0].body, "abc");
    assert!(!records[0].body_complete);
}

// --- connections

#[tokio::test]
async fn stopped_it_refuses_and_cuts_and_started_it_has_the_same_port() {
    let sim = sim().await;
    sim.fault("hang").await.unwrap();
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    sim.wait_for(DEADLINE, |r| r.len() == 1).await.unwrap();
    sim.stop().await;
    assert!(!sim.is_listening());
    client.end().await.unwrap();
    assert_eq!(sim.records()[0].state, State::Cut);
    let refused = TcpStream::connect(sim.addr()).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    sim.clear_faults().await;
    assert!(TcpStream::connect(sim.addr()).await.is_err());
    sim.start_again().await.unwrap();
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    client.until("chat.completion").await;
}

#[tokio::test]
async fn connect_refuse_leaves_open_connections_alone() {
    let sim = sim().await;
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    client.answer().await;
    sim.fault("connect=refuse").await.unwrap();
    assert!(TcpStream::connect(sim.addr()).await.is_err());
    client.write(&post(CHAT)).await;
    client.answer().await;
    sim.clear_faults().await;
    assert!(TcpStream::connect(sim.addr()).await.is_ok());
}

#[tokio::test]
async fn connect_reset_resets_as_many_connections_as_it_was_told() {
    let sim = sim().await;
    sim.fault("connect=reset;times=2").await.unwrap();
    for _ in 0..2 {
        assert!(Client::connect(sim.addr()).await.is_reset().await);
    }
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    client.until("chat.completion").await;
    assert_eq!(sim.connections().total, 3);
}

#[tokio::test]
async fn a_dropped_simulator_closes_everything() {
    let sim = sim().await;
    let (addr, control) = (sim.addr(), sim.control_addr());
    let mut client = Client::connect(addr).await;
    sim.wait_for_connections(DEADLINE, |c| c.open == 1)
        .await
        .unwrap();
    drop(sim);
    client.end().await.unwrap();
    for addr in [addr, control] {
        let until = Instant::now() + DEADLINE;
        while TcpStream::connect(addr).await.is_ok() {
            assert!(Instant::now() < until, "{addr} is still there");
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn reset_answers_with_a_reset() {
    let sim = sim().await;
    sim.fault("reset").await.unwrap();
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    assert!(client.is_reset().await);
    assert_eq!(client.seen, b"");
    assert_eq!(sim.records()[0].state, State::Cut);
}

#[tokio::test]
async fn stale_closes_after_the_answer_without_saying_so() {
    let sim = sim().await;
    sim.fault("stale").await.unwrap();
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    client.end().await.unwrap();
    assert!(client.has("chat.completion") && !client.has("connection: close"));
}

#[tokio::test]
async fn stale_next_resets_when_the_next_request_arrives() {
    let sim = sim().await;
    sim.fault("stale=next").await.unwrap();
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    client.answer().await;
    client.write(&post(CHAT)).await;
    assert!(client.is_reset().await);
    assert_eq!(sim.records().len(), 1);
}

#[tokio::test]
async fn close_says_so_and_does() {
    let sim = sim().await;
    sim.fault("close").await.unwrap();
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    client.end().await.unwrap();
    assert!(client.head().contains("connection: close"));
}

// --- which requests

#[tokio::test]
async fn faults_are_taken_in_order_as_often_as_they_say() {
    let sim = sim().await;
    sim.fault("status=429;times=1\nstatus=503;times=2;path=completions")
        .await
        .unwrap();
    let mut client = Client::connect(sim.addr()).await;
    for status in [429, 503, 503, 200] {
        client.write(&post(CHAT)).await;
        client.answer().await;
        assert!(
            client.head().starts_with(&format!("HTTP/1.1 {status}")),
            "{status}"
        );
    }
}

#[tokio::test]
async fn a_fault_spares_probes_unless_its_path_says_otherwise() {
    let sim = sim().await;
    for (fault, status) in [
        ("status=500", 200),
        ("status=500;path=*", 500),
        ("status=500;path=/models", 500),
    ] {
        sim.fault(fault).await.unwrap();
        let mut client = Client::send(sim.addr(), "GET /v1/models HTTP/1.1\r\n\r\n").await;
        client.until("\r\n\r\n{").await;
        assert!(client.head().contains(&status.to_string()), "{fault}");
    }
}

#[tokio::test]
async fn a_request_may_bring_its_own_fault() {
    let sim = sim().await;
    sim.fault("status=500").await.unwrap();
    for (header, status) in [
        ("x-sim: status=418", 418),
        ("X-Fake: status=429", 429),
        ("x-sim: nonsense", 400),
        ("x-sim: connect=reset", 400),
        ("x-sim: hang;times=2", 400),
    ] {
        let mut client = Client::send(sim.addr(), &post_with(&format!("{header}\r\n"), CHAT)).await;
        client.until("\r\n\r\n{").await;
        assert!(client.head().contains(&status.to_string()), "{header}");
        if header.ends_with("nonsense") {
            client.until("stall_at, die_at").await;
        }
    }
    assert_eq!(sim.records()[0].fault.as_deref(), Some("status=418"));
}

// --- status and head

#[tokio::test]
async fn status_comes_with_retry_after_and_the_shape_asked_for() {
    for (shape, text) in [
        ("openai", r#""code":"rate_limit_exceeded""#),
        ("vllm", r#""code":429"#),
        ("ollama", r#"{"error":"the simulator"#),
        ("html", "<html>"),
        ("empty", "content-length: 0"),
        ("quota", r#""code":"insufficient_quota""#),
        ("detail", r#"{"detail":"#),
    ] {
        let client = whole(&format!("status=429;retry_after=7;body={shape}")).await;
        assert!(client.head().starts_with("HTTP/1.1 429"), "{shape}");
        assert!(client.head().contains("retry-after: 7"), "{shape}");
        assert!(client.has(text), "{shape}: {}", client.text());
    }
}

#[tokio::test]
async fn a_status_of_success_changes_the_status_alone() {
    let client = whole("status=201").await;
    assert!(client.head().starts_with("HTTP/1.1 201"));
    assert!(client.has("chat.completion"));
    let client = whole("status=204").await;
    assert!(client.text().ends_with("\r\n\r\n"));
    assert!(!client.has("content-length"));
}

#[tokio::test]
async fn early_answers_before_the_body_and_closes_or_reads_on() {
    let sim = sim().await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\n\r\n";
    sim.fault("early=413;times=1").await.unwrap();
    let mut client = Client::send(sim.addr(), head).await;
    client.end().await.unwrap();
    assert!(client.head().starts_with("HTTP/1.1 413"));
    sim.fault("early=413;early_then=read;times=1")
        .await
        .unwrap();
    let mut client = Client::send(sim.addr(), head).await;
    client.until("told to answer 413").await;
    client.write("hello").await;
    client.write(&post(CHAT)).await;
    client.until("chat.completion").await;
    let records = sim.records();
    assert!(!records[0].body_complete);
    assert_eq!(
        (&records[1].body[..], records[1].body_complete),
        (&b"hello"[..], true)
    );
}

#[tokio::test]
async fn an_informational_answer_comes_first() {
    let client = whole("1xx=103").await;
    assert!(
        client
            .text()
            .starts_with("HTTP/1.1 103 Early Hints\r\nlink: ")
    );
    assert!(client.has("\r\n\r\nHTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn delays_hold_back_what_they_say() {
    let sim = sim().await;
    let wait = Duration::from_millis(60);
    for (fault, first, then) in [
        ("header_delay=60", None, "HTTP/1.1 200"),
        ("first_token=60", Some("text/event-stream"), "assistant"),
        ("slow_headers=1", Some("H"), "server: forebay-sim"),
        ("gap=30", Some("assistant"), " answers:"),
    ] {
        sim.fault(fault).await.unwrap();
        let started = Instant::now();
        let mut client = Client::send(sim.addr(), &post(STREAM)).await;
        if let Some(first) = first {
            client.until(first).await;
            assert!(!client.has(then), "{fault}");
        }
        client.until(then).await;
        assert!(
            started.elapsed() >= wait.min(Duration::from_millis(30)),
            "{fault}"
        );
    }
}

#[tokio::test]
async fn extra_headers_of_every_kind_are_sent() {
    let client = whole("junk_headers").await;
    assert!(client.has("set-cookie: ") && client.has("connection: x-nominated"));
    let client = whole("junk_headers=malformed").await;
    assert!(client.has("x-space : 1\r\n") && client.has("\r\n  2\r\nno colon here\r\n"));
    let client = whole("many_headers=300").await;
    assert_eq!(client.text().matches("x-many-").count(), 300);
    let client = whole("big_header=100000").await;
    assert!(client.head().len() > 100_000);
}

#[tokio::test]
async fn echo_headers_answers_with_the_head() {
    let client = whole("echo_headers").await;
    assert!(client.has(r#"["Host","sim"]"#) && client.has(r#""method":"POST""#));
}

// --- length and encoding

#[tokio::test]
async fn a_false_content_length_is_half_or_more_than_what_is_sent() {
    for request in [CHAT, STREAM] {
        for lie in ["short", "long"] {
            let sim = sim().await;
            sim.fault(&format!("content_length={lie}")).await.unwrap();
            let mut client =
                Client::send(sim.addr(), &post_with("Connection: close\r\n", request)).await;
            client.end().await.unwrap();
            let head = client.head();
            let claimed = head.split("content-length: ").nth(1).unwrap();
            let claimed: usize = claimed.lines().next().unwrap().parse().unwrap();
            let sent = client.seen.len() - head.len() - 4;
            let expected = if lie == "short" { sent / 2 } else { sent + 100 };
            assert_eq!(claimed, expected, "{lie}");
        }
    }
}

#[tokio::test]
async fn transfer_encoding_twice_or_with_a_length() {
    for stream in [whole("duplicate_te").await, streamed("duplicate_te").await] {
        assert_eq!(
            stream.head().matches("transfer-encoding: chunked").count(),
            2
        );
    }
    for stream in [whole("te_cl").await, streamed("te_cl").await] {
        assert!(stream.head().contains("transfer-encoding: chunked"));
        assert!(stream.head().contains("content-length: "));
    }
}

#[tokio::test]
async fn trailers_follow_the_last_chunk() {
    for client in [whole("trailers").await, streamed("trailers").await] {
        assert!(client.head().contains("trailer: x-sim-trailer"));
        assert!(
            client
                .text()
                .ends_with("\r\n0\r\nx-sim-trailer: 1\r\ncontent-length: 5\r\n\r\n")
        );
    }
}

#[tokio::test]
async fn http10_ends_the_body_with_the_connection() {
    for request in [CHAT, STREAM] {
        let sim = sim().await;
        sim.fault("http10").await.unwrap();
        let mut client = Client::send(sim.addr(), &post(request)).await;
        client.end().await.unwrap();
        assert!(client.head().starts_with("HTTP/1.0 200"));
        assert!(!client.has("content-length") && !client.has("transfer-encoding"));
        assert!(client.has("answers:"));
    }
}

#[tokio::test]
async fn gzip_is_a_gzip_stream_of_the_same_answer() {
    let client = whole("gzip").await;
    assert!(client.head().contains("content-encoding: gzip"));
    assert!(super::http::find(&client.seen, b"\x1f\x8b\x08").is_some());
    let (body, ended) = streamed("gzip").await.dechunked();
    assert!(ended && body.starts_with(b"\x1f\x8b\x08"));
    assert!(super::http::find(&body, b"[DONE]").is_some());
}

#[tokio::test]
async fn split_makes_every_piece_a_chunk() {
    let client = streamed("split=7").await;
    let mut sizes = client.chunks();
    assert_eq!(sizes.pop(), Some(0));
    sizes.pop();
    assert!(sizes.len() > 50 && sizes.iter().all(|&size| size == 7));
    assert_eq!(events(&client.dechunked().0).len(), 9);
}

#[tokio::test]
async fn per_write_groups_events() {
    let client = streamed("per_write=3;gap=1").await;
    assert_eq!(client.chunks().len(), 3 + 1);
    let client = streamed("gap=1").await;
    assert_eq!(client.chunks().len(), 8 + 1, "the last with [DONE]");
}

// --- the event stream

#[tokio::test]
async fn every_dialect_of_the_event_stream_says_the_same() {
    let plain = events(&streamed("").await.dechunked().0);
    for fault in [
        "newline=lf",
        "newline=cr",
        "newline=crlf",
        "bom",
        "multi_data",
        "comments",
        "bom;multi_data;comments;newline=crlf;split=1",
    ] {
        let (body, _) = streamed(fault).await.dechunked();
        let seen = events(&body);
        assert_eq!(words(&seen), words(&plain), "{fault}");
        assert_eq!(seen.len(), plain.len(), "{fault}");
    }
    let bytes = |client: Client| client.dechunked().0;
    assert!(!bytes(streamed("newline=cr").await).contains(&b'\n'));
    assert!(bytes(streamed("bom").await).starts_with(b"\xef\xbb\xbfdata: "));
    assert!(bytes(streamed("multi_data").await).starts_with(b"data: {\ndata: \"id\""));
    assert!(bytes(streamed("comments").await).starts_with(b": between events\nid: 0\n"));
}

#[tokio::test]
async fn a_huge_event_is_one_line() {
    let (body, _) = streamed("huge_event=2000000").await.dechunked();
    let longest = body.split(|&b| b == b'\n').map(<[u8]>::len).max();
    assert!(longest > Some(2_000_000));
    assert_eq!(events(&body).len(), 10);
}

#[tokio::test]
async fn stall_at_sends_so_many_events_and_then_nothing() {
    let sim = sim().await;
    sim.fault("stall_at=3").await.unwrap();
    let mut client = Client::send(sim.addr(), &post(STREAM)).await;
    client.until(" answers:").await;
    let silent = timeout(Duration::from_millis(50), client.read_more()).await;
    assert!(silent.is_err(), "{}", client.text());
    assert_eq!(events(&client.dechunked().0).len(), 3);
    let mut client = Client::send(sim.addr(), &post(CHAT)).await;
    client.until("\r\n\r\n{\"i").await;
    let silent = timeout(Duration::from_millis(50), client.read_more()).await;
    assert!(silent.is_err() && client.text().ends_with("\r\n\r\n{\"i"));
}

#[tokio::test]
async fn die_at_ends_the_connection_after_so_many_events() {
    for n in [0, 3] {
        let client = streamed(&format!("die_at={n}")).await;
        let (body, ended) = client.dechunked();
        assert_eq!((events(&body).len(), ended), (n, false));
    }
    let client = whole("die_at=5").await;
    assert!(client.text().ends_with("\r\n\r\n{\"id\""));
}

#[tokio::test]
async fn die_by_reset_is_a_reset_after_the_events() {
    let sim = sim().await;
    sim.fault("die_at=2;how=rst").await.unwrap();
    let mut client = Client::send(sim.addr(), &post(STREAM)).await;
    assert!(client.is_reset().await);
    assert_eq!(events(&client.dechunked().0).len(), 2);
    assert_eq!(sim.records()[0].state, State::Cut);
}

#[tokio::test]
async fn die_inside_a_chunk_leaves_it_short() {
    for client in [
        streamed("die_at=2;how=mid_chunk").await,
        whole("die_at=9;how=mid_chunk;te_cl").await,
    ] {
        let sizes = client.chunks();
        let (body, ended) = client.dechunked();
        assert!(!ended && sizes.iter().sum::<usize>() > body.len());
    }
}

#[tokio::test]
async fn die_inside_a_character_leaves_two_of_its_three_bytes() {
    let whole_snowman = [0xe2, 0x98, 0x83];
    for fault in ["die_at=2;how=mid_utf8", "die_at=2;how=mid_utf8+mid_chunk"] {
        let (body, ended) = streamed(fault).await.dechunked();
        assert!(!ended && body.ends_with(&whole_snowman[..2]), "{fault}");
        assert!(std::str::from_utf8(&body).is_err());
    }
    let client = whole("die_at=9;how=mid_utf8").await;
    assert!(client.seen.ends_with(&whole_snowman[..2]));
}

#[tokio::test]
async fn error_at_sends_an_error_event_without_done_unless_asked() {
    for n in [0, 2] {
        let (body, ended) = streamed(&format!("error_at={n}")).await.dechunked();
        let seen = events(&body);
        assert_eq!((seen.len(), ended), (n + 1, true));
        assert!(seen[n].starts_with(r#"{"error":{"message":"#));
    }
    let (body, _) = streamed("error_at=2;error_then_done").await.dechunked();
    assert_eq!(events(&body)[3], "[DONE]");
}

#[tokio::test]
async fn no_done_empty_stream_and_only_comments() {
    let (body, ended) = streamed("no_done").await.dechunked();
    assert_eq!((events(&body).len(), ended), (8, true));
    let (body, ended) = streamed("empty_stream").await.dechunked();
    assert_eq!((body.len(), ended), (0, true));
    let sim = sim().await;
    sim.fault("only_comments=2").await.unwrap();
    for (request, sign) in [(STREAM, ": keep-alive\n\n"), (CHAT, "1\r\n\n\r\n")] {
        let mut client = Client::send(sim.addr(), &post(request)).await;
        while client.text().matches(sign).count() < 5 {
            client.read_more().await.unwrap();
        }
        assert!(!client.has("data:") && !client.has("choices"));
    }
}

#[tokio::test]
async fn usage_can_be_left_out_or_come_with_every_event() {
    assert!(!whole("no_usage").await.has("usage"));
    let (body, _) = streamed("continuous_usage").await.dechunked();
    let seen = events(&body);
    let with_usage = seen.iter().filter(|event| event.contains("usage")).count();
    assert_eq!(with_usage, seen.len() - 1, "all but [DONE]");
}

#[tokio::test]
async fn refuse_model_knows_no_model_and_tokens_sets_the_length() {
    let client = whole("refuse_model").await;
    assert!(client.head().contains("404") && client.has("The model `demo` does not exist."));
    let (body, _) = streamed("tokens=40").await.dechunked();
    assert_eq!(words(&events(&body)).split(' ').count(), 40);
}

// --- the control port

async fn control(sim: &Sim, request: &str, body: &str) -> (String, Json) {
    let length = body.len();
    let request =
        format!("{request} HTTP/1.1\r\nHost: control\r\nContent-Length: {length}\r\n\r\n{body}");
    let mut client = Client::send(sim.control_addr(), &request).await;
    client.end().await.unwrap();
    let text = client.text();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (
        head.to_owned(),
        serde_json::from_str(body).unwrap_or_default(),
    )
}

#[tokio::test]
async fn the_control_port_stops_and_starts() {
    let sim = sim().await;
    let (_, state) = control(&sim, "POST /stop", "").await;
    assert_eq!(state["listening"], false);
    assert!(TcpStream::connect(sim.addr()).await.is_err());
    let (_, state) = control(&sim, "POST /start", "").await;
    assert_eq!(state["listening"], true);
    assert!(TcpStream::connect(sim.addr()).await.is_ok());
}

#[tokio::test]
async fn the_control_port_sets_shows_and_clears_faults() {
    let sim = sim().await;
    let (_, state) = control(&sim, "POST /fault", r#"{"status":503,"times":2}"#).await;
    assert_eq!(
        state["faults"],
        json!([{ "fault": "times=2;status=503", "left": 2 }])
    );
    let (head, error) = control(&sim, "POST /fault", "sing=loud").await;
    assert!(head.starts_with("HTTP/1.1 400"));
    assert!(error["error"].as_str().unwrap().contains("die_at"));
    let (_, state) = control(&sim, "GET /state", "").await;
    assert_eq!(
        state["faults"][0]["left"], 2,
        "a refused fault changes nothing"
    );
    let (_, state) = control(&sim, "DELETE /fault", "").await;
    assert_eq!(state["faults"], json!([]));
}

#[tokio::test]
async fn the_control_port_shows_what_was_received() {
    let sim = sim().await;
    let mut client = Client::send(sim.addr(), &post_with("X-Odd: one\r\n", CHAT)).await;
    client.answer().await;
    sim.wait_for(DEADLINE, |r| r[0].finished()).await.unwrap();
    let (_, shown) = control(&sim, "GET /requests", "").await;
    let request = &shown["requests"][0];
    assert_eq!(request["method"], "POST");
    assert_eq!(request["headers"][1], json!(["X-Odd", "one"]));
    assert_eq!(request["body"], CHAT);
    assert_eq!(request["finished"], true);
    assert_eq!(request["sent_bytes"], client.seen.len());
    let (_, connections) = control(&sim, "GET /connections", "").await;
    assert_eq!(connections, json!({ "open": 1, "total": 1 }));
    control(&sim, "DELETE /requests", "").await;
    assert_eq!(sim.records().len(), 0);
}

#[tokio::test]
async fn the_help_of_the_control_port_names_every_knob() {
    let sim = sim().await;
    let mut client = Client::send(sim.control_addr(), "GET / HTTP/1.1\r\n\r\n").await;
    client.end().await.unwrap();
    for knob in KNOBS {
        assert!(client.has(&format!("\n  {}", knob.name)), "{}", knob.name);
    }
    let (head, _) = control(&sim, "GET /nothing", "").await;
    assert!(head.starts_with("HTTP/1.1 404"));
}

// --- itself

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    sim: SimOptions,
}

#[test]
fn the_flags_have_the_defaults_of_the_type() {
    let parsed = <Cli as clap::Parser>::parse_from(["sim"]).sim;
    assert_eq!(
        format!("{parsed:?}"),
        format!("{:?}", SimOptions::default())
    );
    let parsed = <Cli as clap::Parser>::parse_from([
        "sim",
        "--fault",
        "hang;times=3",
        "--first-token",
        "1s",
    ])
    .sim;
    assert_eq!(parsed.faults, ["hang;times=3".parse::<Fault>().unwrap()]);
    assert_eq!(parsed.first_token, Duration::from_secs(1));
}

#[test]
fn every_knob_and_flag_is_in_the_manual_and_nothing_else() {
    let manual = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/simulator.md"));
    let first_cells = |start: &str| -> BTreeSet<String> {
        let section = manual.split_once(start).expect(start).1;
        let section = section.split("\n## ").next().unwrap();
        section
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
            .map(|(name, _)| name.split(['=', ' ']).next().unwrap().to_owned())
            .collect()
    };
    let knobs: BTreeSet<String> = KNOBS.iter().map(|knob| knob.name.to_owned()).collect();
    assert_eq!(first_cells("\n## Knobs"), knobs);
    let command = <Cli as clap::CommandFactory>::command();
    let flags = command.get_arguments().filter_map(|arg| arg.get_long());
    let flags: BTreeSet<String> = flags
        .filter(|flag| *flag != "help")
        .map(|flag| format!("--{flag}"))
        .collect();
    assert_eq!(first_cells("\n## Options"), flags);
}
