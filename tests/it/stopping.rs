//! SIGTERM and SIGINT: nobody who is being served notices, everybody else goes
//! elsewhere, and the process is gone when the last one is.

use serde_json::Value;
use tokio::net::TcpStream;

use crate::{
    h2c,
    support::{
        Answer, Connection, Gateway,
        by_hand::{ByHand, STREAM_HEAD, group_of},
        chat, chat_stream, eventually,
        http::{get, post_chat},
        one_group, sim, soon,
    },
};

const CHAT: &str = "/v1/chat/completions";
/// Stops accepting at once.
const AT_ONCE: &str = "shutdown: { lame_duck: 0s }\n";
/// Accepts for as long as any test takes.
const FOR_LONG: &str = "shutdown: { lame_duck: 10m }\n";

async fn ended(gateway: &mut Gateway) -> Option<i32> {
    let mut status = None;
    eventually("the process has ended", || {
        status = gateway.exited();
        let ended = status.is_some();
        async move { ended }
    })
    .await;
    status.and_then(|status| status.code())
}

/// Waits until nobody is accepted any more.
async fn closed(gateway: &Gateway) {
    eventually("connections are refused", || async {
        TcpStream::connect(gateway.addr).await.is_err()
    })
    .await;
}

/// A connection on which a stream is under way.
async fn streaming(gateway: &Gateway) -> Connection {
    let mut connection = Connection::open(gateway.addr).await;
    let body = chat_stream("demo");
    connection.request("POST", CHAT, &[], body.as_bytes()).await;
    connection.read_until("data: ").await;
    connection
}

#[track_caller]
fn is_whole(answer: &Answer) {
    assert_eq!(answer.status, 200);
    assert!(answer.complete);
    assert_eq!(answer.events().last().unwrap(), "[DONE]");
}

#[track_caller]
fn is_cut_short(answer: &Answer) {
    assert_eq!(answer.status, 200);
    assert!(answer.complete, "the error event is its proper end");
    let events = answer.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "server_shutdown", "{last}");
    assert_eq!(last["error"]["type"], "server_error");
}

/// Begins a request on a connection of its own.
async fn asking(gateway: &Gateway, body: &str) -> Connection {
    let mut connection = Connection::open(gateway.addr).await;
    connection.request("POST", CHAT, &[], body.as_bytes()).await;
    connection
}

fn of_length(tokens: usize, body: &str) -> String {
    body.replacen('{', &format!("{{\"max_tokens\":{tokens},"), 1)
}

async fn in_flight(gateway: &Gateway, wanted: f64) {
    gateway
        .metric_becomes("forebay_requests_in_flight", wanted)
        .await;
}

#[tokio::test]
async fn streams_of_every_length_end_whole_and_then_the_process_does() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=20;tokens=1000").await.unwrap();
    let mut gateway = Gateway::start(&format!("{AT_ONCE}{}", one_group(&[&gpu]))).await;
    let mut streams = Vec::new();
    for tokens in [2, 20, 60, 100, 140] {
        let body = of_length(tokens, &chat_stream("demo"));
        streams.push((tokens, asking(&gateway, &body).await));
    }
    let mut whole = asking(&gateway, &of_length(30, &chat("demo"))).await;
    eventually("all are under way", async || gpu.records().len() == 6).await;
    gateway.signal("TERM");
    closed(&gateway).await;
    let answer = whole.answer().await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("connection"), Some("close"));
    for (tokens, mut connection) in streams {
        let answer = connection.answer().await;
        is_whole(&answer);
        assert_eq!(answer.content().split_whitespace().count(), tokens);
        assert!(connection.rest().await.is_empty(), "closed behind it");
    }
    assert_eq!(ended(&mut gateway).await, Some(0));
    let log = gateway.log();
    assert!(log.contains("forebay stopped"), "{log}");
    assert_eq!(log.matches("path=/v1/chat/completions").count(), 6, "{log}");
}

#[tokio::test]
async fn a_lame_duck_serves_everybody_and_tells_them_to_go_elsewhere() {
    let gpu = sim("gpu-1").await;
    let mut gateway = Gateway::start(&format!("{FOR_LONG}{}", one_group(&[&gpu]))).await;
    let mut kept = Connection::open(gateway.addr).await;
    kept.request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    assert_eq!(kept.answer().await.header("connection"), Some("keep-alive"));
    assert_eq!(get(gateway.addr, "/readyz").await.status, 200);
    gateway.signal("TERM");
    eventually("/readyz says so", async || {
        get(gateway.addr, "/readyz").await.status == 503
    })
    .await;
    for _ in 0..3 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("connection"), Some("close"));
    }
    assert_eq!(get(gateway.addr, "/livez").await.status, 200);
    // The one that was there before gets its last answer.
    kept.request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    let last = kept.answer().await;
    assert_eq!(last.status, 200);
    assert_eq!(last.header("connection"), Some("close"));
    assert!(kept.rest().await.is_empty());
    let health = get(gateway.admin, "/health").await.json();
    assert_eq!(health["stage"], "lame_duck");
    assert_eq!(health["pid"], gateway.pid());
    // Its configuration stays as it is.
    let reloaded = gateway.reload().await;
    assert_eq!(reloaded.status, 409);
    assert_eq!(reloaded.json()["error"]["code"], "stopping");
    gateway.signal("HUP");
    gateway.logged("SIGHUP: not reloading").await;
    // A second signal is the end of it.
    gateway.signal("TERM");
    assert_eq!(ended(&mut gateway).await, Some(0));
    assert!(gateway.log().contains("second signal"));
}

#[tokio::test]
async fn who_is_idle_gets_one_last_answer_and_is_closed_with_the_last_request() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&format!("{AT_ONCE}{}", group_of(&upstream.url()))).await;
    let mut gateway = gateway;
    let mut idle = Vec::new();
    for _ in 0..3 {
        let mut connection = Connection::open(gateway.addr).await;
        connection.request("GET", "/livez", &[], b"").await;
        assert_eq!(connection.answer().await.status, 200);
        idle.push(connection);
    }
    // It has not asked anything yet.
    let mut silent = Connection::open(gateway.addr).await;
    let mut stream = asking(&gateway, &chat_stream("demo")).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("one").await;
    stream.read_until("one").await;
    gateway.signal("TERM");
    closed(&gateway).await;
    let mut first = idle.pop().unwrap();
    for connection in [&mut first, &mut silent] {
        connection.request("GET", "/livez", &[], b"").await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("connection"), Some("close"));
        assert!(connection.rest().await.is_empty());
    }
    assert_eq!(gateway.exited(), None, "a stream is under way");
    call.chunk("data: [DONE]\n\n").await;
    call.end().await;
    is_whole(&stream.answer().await);
    for mut connection in idle {
        assert!(connection.rest().await.is_empty());
    }
    assert_eq!(ended(&mut gateway).await, Some(0));
}

#[tokio::test]
async fn http2_clients_are_sent_away_and_their_streams_end_whole() {
    let upstream = ByHand::listen().await;
    let config = format!("{FOR_LONG}{}", group_of(&upstream.url()));
    let mut gateway = Gateway::start(&config).await;
    let stream = TcpStream::connect(gateway.addr).await.unwrap();
    let (old, connection) = soon("h2", h2::client::handshake(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let open = begin(&old).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("one").await;
    let mut body = soon("a head", open).await.unwrap().into_body();
    soon("an event", body.data()).await.unwrap().unwrap();
    gateway.signal("TERM");
    eventually("no more streams are begun on it", async || {
        old.clone().ready().await.is_err()
    })
    .await;
    // Who comes anew is served, again and again.
    let new = h2c::connect(gateway.addr).await;
    for _ in 0..2 {
        let answer = begin(&new).await;
        let mut call = upstream.accept().await;
        call.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\ncontent-type: application/json\r\n\r\n{}").await;
        let answer = soon("an answer", answer).await.unwrap();
        drop(answer);
    }
    call.say("two").await;
    call.chunk("data: [DONE]\n\n").await;
    call.end().await;
    let mut rest = Vec::new();
    while let Some(piece) = soon("an event", body.data()).await {
        rest.extend_from_slice(&piece.unwrap());
    }
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
    drop((old, body));
    soon("the connection ends", connection)
        .await
        .unwrap()
        .expect("in good order");
    gateway.signal("TERM");
    assert_eq!(ended(&mut gateway).await, Some(0));
}

/// Begins a request on a stream of its own.
async fn begin(sender: &h2c::Sender) -> h2::client::ResponseFuture {
    let mut sender = soon("a stream", sender.clone().ready()).await.unwrap();
    let (answer, mut body) = sender.send_request(h2c::request(CHAT, &[]), false).unwrap();
    body.send_data(chat_stream("demo").into(), true).unwrap();
    answer
}

#[tokio::test]
async fn what_is_left_after_the_drain_is_told_so() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=50;tokens=1000000").await.unwrap();
    let hung = sim("gpu-2").await;
    hung.fault("hang").await.unwrap();
    let group = |sim: &forebay::sim::Sim| {
        format!(
            "    upstreams: [ {{ name: {}, kind: vllm, url: \"{}\", concurrent: 1 }} ]\n",
            sim.name(),
            sim.url()
        )
    };
    let mut gateway = Gateway::start(&format!(
        "shutdown: {{ lame_duck: 0s, drain: 300ms }}\nlimits: {{ heartbeat: 100ms }}\n\
         plugins:\n  - auth: none\n  - capture: {{ dir: captures }}\n\
         groups:\n  talks:\n{}  hangs:\n    queue: {{ size: 8, wait: 10m }}\n{}\
         routes:\n  - {{ model: hang, groups: [hangs] }}\n  - {{ model: \"*\", groups: [talks] }}\n",
        group(&gpu),
        group(&hung)
    ))
    .await;
    let mut stream = streaming(&gateway).await;
    let mut whole = asking(&gateway, &chat("hang")).await;
    eventually("it hangs", async || hung.records().len() == 1).await;
    // In line behind it: one of them has been told so by a comment.
    let mut in_line = asking(&gateway, &chat("hang")).await;
    let mut patient = asking(&gateway, &chat_stream("hang")).await;
    patient.read_until(": queued").await;
    // Half a body.
    let mut half = Connection::open(gateway.addr).await;
    half.send(
        format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{{").as_bytes(),
    )
    .await;
    in_flight(&gateway, 5.0).await;
    gateway.signal("TERM");
    for connection in [&mut whole, &mut in_line, &mut half] {
        let answer = connection.answer().await;
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert_eq!(answer.error_code(), "server_shutdown");
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
    is_cut_short(&stream.answer().await);
    is_cut_short(&patient.answer().await);
    assert_eq!(ended(&mut gateway).await, Some(0));
    let log = gateway.log();
    assert_eq!(log.matches("error=server_shutdown").count(), 5, "{log}");
    assert!(
        log.contains("the time to drain is over, requests_in_flight=5"),
        "{log}"
    );
    // Every one is accounted for.
    assert!(log.contains("dropped=0"), "{log}");
}

#[tokio::test]
async fn a_second_signal_is_the_end_at_once_and_sigint_needs_no_lame_duck() {
    for (first, second) in [("TERM", "TERM"), ("TERM", "INT"), ("INT", "INT")] {
        let gpu = sim("gpu-1").await;
        gpu.fault("gap=50;tokens=1000000").await.unwrap();
        let yaml = match first {
            "TERM" => format!("{AT_ONCE}{}", one_group(&[&gpu])),
            _ => format!("{FOR_LONG}{}", one_group(&[&gpu])),
        };
        let mut gateway = Gateway::start(&yaml).await;
        let mut stream = streaming(&gateway).await;
        gateway.signal(first);
        closed(&gateway).await;
        assert_eq!(gateway.exited(), None, "a stream is under way");
        let metrics = get(gateway.admin, "/metrics").await;
        assert!(metrics.text().contains("forebay_requests_in_flight 1"));
        gateway.signal(second);
        is_cut_short(&stream.answer().await);
        assert_eq!(ended(&mut gateway).await, Some(0));
    }
}

#[tokio::test]
async fn a_failover_goes_on_while_the_process_drains() {
    let upstream = ByHand::listen().await;
    let gpu = sim("gpu-2").await;
    let yaml = format!(
        "{AT_ONCE}groups:\n  gpus:\n    upstreams: [ {{ name: gpu-1, kind: vllm, url: \"{}\" }} ]\n  \
         more:\n    upstreams: [ {{ name: gpu-2, kind: vllm, url: \"{}\" }} ]\n\
         routes:\n  - {{ model: \"*\", groups: [gpus, more] }}\n",
        upstream.url(),
        gpu.url()
    );
    let mut gateway = Gateway::start(&yaml).await;
    let mut connection = asking(&gateway, &chat_stream("demo")).await;
    let call = upstream.accept().await;
    gateway.signal("TERM");
    closed(&gateway).await;
    call.reset();
    let answer = connection.answer().await;
    is_whole(&answer);
    assert_eq!(answer.upstream(), "gpu-2");
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(ended(&mut gateway).await, Some(0));
}

#[tokio::test]
async fn a_client_that_never_sends_its_request_does_not_keep_the_process() {
    let gpu = sim("gpu-1").await;
    let yaml = format!(
        "{AT_ONCE}limits: {{ header_timeout: 10m }}\n{}",
        one_group(&[&gpu])
    );
    let mut gateway = Gateway::start(&yaml).await;
    let _silent = Connection::open(gateway.addr).await;
    let mut half = Connection::open(gateway.addr).await;
    half.send(b"GET /livez HTTP/1.1\r\nho").await;
    let _http2 = h2c::connect(gateway.addr).await;
    gateway
        .metric_becomes("forebay_client_connections", 3.0)
        .await;
    gateway.signal("TERM");
    assert_eq!(ended(&mut gateway).await, Some(0));
}
