//! HTTP/2 by prior knowledge, on the port that speaks HTTP/1.1 as well.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::{
    Reason,
    client::{SendRequest, handshake},
};
use http::{Request, Version};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use crate::support::{
    Answer, Gateway, chat, chat_stream, eventually,
    http::{get, post_chat},
    one_group, sim, soon,
};

const CHAT: &str = "/v1/chat/completions";
const IN_FLIGHT: &str = "forebay_requests_in_flight";

pub type Sender = SendRequest<Bytes>;

pub async fn connect(addr: SocketAddr) -> Sender {
    let stream = soon("a connection", TcpStream::connect(addr))
        .await
        .unwrap();
    let (sender, connection) = soon("a handshake", handshake(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

pub fn request(path: &str, fields: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::post(format!("http://forebay.test{path}")).version(Version::HTTP_2);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// Sends a request on a stream of its own and reads the answer.
async fn ask(
    sender: &Sender,
    request: Request<()>,
    body: impl Into<Bytes>,
) -> Result<Answer, h2::Error> {
    let body = body.into();
    let work = async {
        let mut sender = sender.clone().ready().await?;
        let (answer, mut stream) = sender.send_request(request, false)?;
        // The answer may come, and the stream end, before the body is out.
        stream.send_data(body, true).ok();
        let (head, mut body) = answer.await?.into_parts();
        let mut answer = Answer {
            status: head.status.as_u16(),
            headers: head
                .headers
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                .collect(),
            body: Vec::new(),
            complete: true,
        };
        while let Some(piece) = body.data().await {
            let piece = piece?;
            body.flow_control().release_capacity(piece.len())?;
            answer.body.extend_from_slice(&piece);
        }
        Ok(answer)
    };
    soon("an answer", work).await
}

pub async fn post(sender: &Sender, body: &str) -> Answer {
    ask(sender, request(CHAT, &[]), body.to_owned())
        .await
        .unwrap()
}

async fn is_unharmed(gateway: &Gateway) {
    let sender = connect(gateway.addr).await;
    assert_eq!(post(&sender, &chat("demo")).await.status, 200);
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
}

#[tokio::test]
async fn a_chat_and_a_stream_come_through_and_say_who_answered() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let sender = connect(gateway.addr).await;
    let whole = post(&sender, &chat("demo")).await;
    assert_eq!((whole.status, whole.upstream()), (200, "gpu-1"));
    let stream = post(&sender, &chat_stream("demo")).await;
    assert_eq!((stream.status, stream.upstream()), (200, "gpu-1"));
    assert_eq!(stream.content(), whole.content());
    assert_eq!(stream.events().last().map(String::as_str), Some("[DONE]"));
    for field in ["connection", "transfer-encoding", "keep-alive"] {
        assert_eq!(stream.header(field), None, "{field} is not for HTTP/2");
    }
    assert!(sim.records().iter().all(|record| record.target() == CHAT));
    assert_eq!(sim.records().len(), 2);
}

#[tokio::test]
async fn a_body_of_5_mb_arrives_as_it_was_sent() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let sender = connect(gateway.addr).await;
    let mut body = chat("demo");
    body.truncate(body.len() - 1);
    body.push_str(&format!(r#","user":"{}"}}"#, "u".repeat(5_000_000)));
    assert_eq!(post(&sender, &body).await.status, 200);
    let record = sim.records().pop().unwrap();
    assert_eq!(record.body_len, body.len() as u64);
    assert_eq!(
        record.header("content-length"),
        Some(body.len().to_string())
    );
    assert_eq!(record.body, body);
}

#[tokio::test]
async fn errors_have_their_status_and_openais_shape() {
    let sim = sim("gpu-1").await;
    let yaml = one_group(&[&sim]).replace("\"*\"", "demo");
    let limits = "limits: { body: 64KiB, body_timeout: 300ms }\n";
    let gateway = Gateway::start(&format!("{limits}{yaml}")).await;
    let sender = connect(gateway.addr).await;
    let large = "x".repeat(3_000_000);
    let long = format!("/{}", "a".repeat(9000));
    let mut cases = 0;
    for (path, fields, body, status, code) in [
        (CHAT, vec![], "{", 400, "invalid_json"),
        (
            CHAT,
            vec![],
            r#"{"model":"demo","model":"x"}"#,
            400,
            "duplicate_key",
        ),
        (
            CHAT,
            vec![],
            r#"{"model":"demo"}"#,
            400,
            "missing_required_parameter",
        ),
        (CHAT, vec![], &chat("other"), 404, "model_not_found"),
        (
            CHAT,
            vec![("x-forebay-local", "maybe")],
            &chat("demo"),
            400,
            "invalid_header",
        ),
        (
            CHAT,
            vec![("expect", "fly")],
            &chat("demo"),
            417,
            "unknown_expectation",
        ),
        (CHAT, vec![], &large, 413, "body_too_large"),
        (
            CHAT,
            vec![("content-length", "3000000")],
            &large,
            413,
            "body_too_large",
        ),
        (
            "/v1/chat/completions/",
            vec![],
            &chat("demo"),
            404,
            "unknown_url",
        ),
        (
            "//v1/chat/completions",
            vec![],
            &chat("demo"),
            404,
            "unknown_url",
        ),
        ("/metrics", vec![], "", 404, "unknown_url"),
        (&long, vec![], "", 414, "uri_too_long"),
    ] {
        let answer = ask(&sender, request(path, &fields), body.to_owned())
            .await
            .unwrap();
        assert_eq!(answer.status, status, "{code}");
        assert_eq!(answer.error_code(), code);
        cases += 1;
    }
    assert_eq!(cases, 12);
    let many: Vec<(String, String)> = (0..101)
        .map(|i| (format!("x-{i}"), "1".to_owned()))
        .collect();
    let many: Vec<(&str, &str)> = many
        .iter()
        .map(|(name, value)| (&**name, &**value))
        .collect();
    let answer = ask(&sender, request(CHAT, &many), chat("demo"))
        .await
        .unwrap();
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (431, "header_too_large")
    );
    // A body that does not come.
    let mut ready = sender.clone().ready().await.unwrap();
    let (answer, _stream) = ready.send_request(request(CHAT, &[]), false).unwrap();
    assert_eq!(soon("an answer", answer).await.unwrap().status(), 408);
    assert!(sim.records().is_empty());
    // The connection goes on.
    assert_eq!(post(&sender, &chat("demo")).await.status, 200);
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn a_host_that_is_missing_or_contradicts_is_refused() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let bare = Request::post(CHAT)
        .version(Version::HTTP_11)
        .body(())
        .unwrap();
    let sender = connect(gateway.addr).await;
    let answer = ask(&sender, bare, chat("demo")).await.unwrap();
    // Pingora's own, without a body; recorded all the same.
    assert_eq!((answer.status, answer.text()), (400, ""));
    let errors = "forebay_errors_total{code=\"malformed_request\"}";
    gateway.metric_becomes(errors, 1.0).await;
    let line = "status=400 ending=client_error attempts=0";
    gateway.logged(line).await;
    assert_eq!(gateway.log().matches(line).count(), 1);
    for host in [
        "other.test",
        "forebay.test:81",
        "forebay.test, other.test",
        "",
    ] {
        let sender = connect(gateway.addr).await;
        let answer = ask(&sender, request(CHAT, &[("host", host)]), chat("demo")).await;
        match answer {
            Ok(answer) => assert_eq!(answer.status, 400, "{host}"),
            Err(why) => assert!(why.is_reset() || why.is_go_away(), "{host}: {why}"),
        }
    }
    assert!(sim.records().is_empty());
    let sender = connect(gateway.addr).await;
    let same = request(CHAT, &[("host", "forebay.test")]);
    assert_eq!(ask(&sender, same, chat("demo")).await.unwrap().status, 200);
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn many_streams_share_one_connection() {
    let sim = sim("gpu-1").await;
    sim.fault("first_token=50ms").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let sender = connect(gateway.addr).await;
    let mut asking = JoinSet::new();
    for number in 0..60 {
        let sender = sender.clone();
        asking.spawn(async move {
            let body = if number % 2 == 0 {
                chat("demo")
            } else {
                chat_stream("demo")
            };
            let id = format!("stream-{number}");
            let answer = ask(&sender, request(CHAT, &[("x-request-id", &id)]), body)
                .await
                .unwrap();
            (answer, id)
        });
    }
    let mut contents = Vec::new();
    while let Some(done) = asking.join_next().await {
        let (answer, id) = done.unwrap();
        assert_eq!(
            (answer.status, answer.header("x-request-id")),
            (200, Some(id.as_str()))
        );
        contents.push(answer.content());
    }
    assert_eq!(contents.len(), 60);
    contents.dedup();
    assert_eq!(contents.len(), 1);
    assert_eq!(sim.records().len(), 60);
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn both_protocols_are_spoken_on_one_port() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let addr = gateway.addr;
    let mut asking = JoinSet::new();
    for number in 0..20 {
        asking.spawn(async move {
            if number % 2 == 0 {
                post_chat(addr, &chat("demo")).await.status
            } else {
                post(&connect(addr).await, &chat("demo")).await.status
            }
        });
    }
    while let Some(status) = asking.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    assert_eq!(sim.records().len(), 20);
}

#[tokio::test]
async fn a_connection_outlives_the_time_of_a_header() {
    let sim = sim("gpu-1").await;
    sim.fault("first_token=700ms").await.unwrap();
    let limits = "limits: { header_timeout: 200ms }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let sender = connect(gateway.addr).await;
    assert_eq!(post(&sender, &chat("demo")).await.status, 200);
    assert_eq!(post(&sender, &chat("demo")).await.status, 200);
}

#[tokio::test]
async fn a_reset_stream_leaves_nothing_behind() {
    let sim = sim("gpu-1").await;
    sim.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let sender = connect(gateway.addr).await;
    // Inside the body.
    let mut ready = sender.clone().ready().await.unwrap();
    let (_answer, mut stream) = ready.send_request(request(CHAT, &[]), false).unwrap();
    stream.send_data(Bytes::from_static(b"{"), false).unwrap();
    gateway.metric_becomes(IN_FLIGHT, 1.0).await;
    stream.send_reset(Reason::CANCEL);
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    assert!(sim.records().is_empty());
    // While an upstream thinks: its connection is closed.
    for body in [chat("demo"), chat_stream("demo")] {
        let mut ready = sender.clone().ready().await.unwrap();
        let (_answer, mut stream) = ready.send_request(request(CHAT, &[]), false).unwrap();
        stream.send_data(Bytes::from(body), true).unwrap();
        gateway.metric_becomes(IN_FLIGHT, 1.0).await;
        sim.wait_for_connections(crate::support::DEADLINE, |now| now.open == 1)
            .await
            .unwrap();
        stream.send_reset(Reason::CANCEL);
        sim.wait_for_connections(crate::support::DEADLINE, |now| now.open == 0)
            .await
            .unwrap();
        gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    }
    sim.clear_faults().await;
    assert_eq!(post(&sender, &chat("demo")).await.status, 200);
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn rapid_resets_are_survived() {
    let sim = sim("gpu-1").await;
    sim.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let mut sender = connect(gateway.addr).await;
    let mut reset = 0;
    while reset < 1000 {
        // A connection that resets too much is turned away; the attacker comes
        // again.
        let Ok(mut ready) = soon("room", sender.clone().ready()).await else {
            sender = connect(gateway.addr).await;
            continue;
        };
        let Ok((_answer, mut stream)) = ready.send_request(request(CHAT, &[]), false) else {
            sender = connect(gateway.addr).await;
            continue;
        };
        stream.send_data(Bytes::from(chat("demo")), true).ok();
        stream.send_reset(Reason::CANCEL);
        reset += 1;
        tokio::task::yield_now().await;
    }
    sim.clear_faults().await;
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn a_client_that_only_says_hello_harms_nobody() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 300ms }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let mut half = TcpStream::connect(gateway.addr).await.unwrap();
    half.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r").await.unwrap();
    let mut rest = Vec::new();
    soon("the end", half.read_to_end(&mut rest)).await.ok();
    assert!(rest.starts_with(b"HTTP/1.1 408 "), "it may be HTTP/1 yet");
    let mut garbage = TcpStream::connect(gateway.addr).await.unwrap();
    garbage
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnot a frame at all, nor anything like it")
        .await
        .unwrap();
    soon("the end", garbage.read_to_end(&mut rest)).await.ok();
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn an_idle_connection_makes_room_and_one_with_a_request_does_not() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { connections: 2 }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let open = "forebay_client_connections";
    gateway.metric_becomes(open, 0.0).await;
    let (idle, works) = (connect(gateway.addr).await, connect(gateway.addr).await);
    assert_eq!(post(&idle, &chat("demo")).await.status, 200);
    sim.fault("header_delay=3600000").await.unwrap();
    let mut working = JoinSet::new();
    let sender = works.clone();
    working.spawn(async move { ask(&sender, request(CHAT, &[]), chat("demo")).await.is_ok() });
    gateway.metric_becomes(IN_FLIGHT, 1.0).await;
    assert_eq!(get(gateway.addr, "/livez").await.status, 200);
    eventually("the idle one is closed", async || {
        idle.clone().ready().await.is_err()
    })
    .await;
    let hits = "forebay_limit_hits_total{limit=\"idle_connections\"}";
    assert_eq!(gateway.metric(hits).await, Some(1.0));
    assert_eq!(gateway.metric(IN_FLIGHT).await, Some(1.0));
    assert!(works.ready().await.is_ok());
}
