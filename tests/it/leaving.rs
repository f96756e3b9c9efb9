//! Clients that leave: whatever they waited for is given up at once, at the
//! upstream too, and nothing of it stays behind.

use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay::sim::{Sim, State};
use h2::client::{ResponseFuture, SendRequest};
use tokio::{net::TcpStream, task::JoinHandle};

use crate::support::{
    Connection, Gateway,
    by_hand::{ByHand, STREAM_HEAD, group_of},
    chat, chat_stream, eventually,
    http::{build, post_chat},
    one_group, sim, soon,
};

/// How long an upstream may go on for a client that has left.
const AT_ONCE: Duration = Duration::from_secs(1);
const PATH: &str = "/v1/chat/completions";
const UPSTREAM_IN_FLIGHT: &str =
    r#"forebay_upstream_requests_in_flight{group="gpus",upstream="gpu-1"}"#;

/// In which way a client leaves.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// It closes its side in good order, and reads on.
    Fin,
    Reset,
}

const WAYS: [Way; 2] = [Way::Fin, Way::Reset];

/// A client that has left; kept, so that a FIN stays no more than a FIN.
fn leave(client: Connection, way: Way) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut client = client;
        match way {
            Way::Reset => client.reset(),
            Way::Fin => {
                client.finish_sending().await;
                client.rest().await;
            }
        }
    })
}

async fn asking(gateway: &Gateway, body: &str) -> Connection {
    let mut client = Connection::open(gateway.addr).await;
    client.request("POST", PATH, &[], body.as_bytes()).await;
    client
}

/// Waits until the simulator works on as many requests.
async fn working_on(gpu: &Sim, count: usize) {
    let open = |records: &[forebay::sim::Record]| {
        records
            .iter()
            .filter(|record| record.state == State::Open)
            .count()
            == count
    };
    gpu.wait_for(AT_ONCE * 10, open).await.unwrap();
}

/// The last request's client has left: the simulator has seen it within a
/// second of `left`.
async fn given_up_upstream(gpu: &Sim, left: Instant, what: &str) {
    let gone = |records: &[forebay::sim::Record]| {
        records
            .iter()
            .all(|record| record.state == State::ClientLeft)
    };
    gpu.wait_for(AT_ONCE * 10, gone).await.unwrap();
    assert!(
        left.elapsed() < AT_ONCE,
        "{what}: after {:?}",
        left.elapsed()
    );
}

/// `count` clients have left, each with its line, and nothing is in flight.
async fn nothing_is_left(gateway: &Gateway, count: usize) {
    gateway
        .metric_becomes("forebay_client_closed_total", count as f64)
        .await;
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
    gateway.metric_becomes(UPSTREAM_IN_FLIGHT, 0.0).await;
    eventually("a line for each client that left", || async {
        gateway
            .log()
            .matches("status=499 ending=client_closed")
            .count()
            == count
    })
    .await;
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
}

#[tokio::test]
async fn leaving_before_the_answer_closes_the_upstream_connection() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let mut count = 0;
    for fault in [
        "hang",
        "first_token=60s",
        "header_delay=60s",
        "only_comments=20",
        "stall_at=1",
    ] {
        gpu.fault(fault).await.unwrap();
        for body in [chat("demo"), chat_stream("demo")] {
            for way in WAYS {
                let client = asking(&gateway, &body).await;
                working_on(&gpu, 1).await;
                let left = Instant::now();
                leave(client, way);
                given_up_upstream(&gpu, left, &format!("{fault} {way:?} {body}")).await;
                count += 1;
            }
        }
    }
    nothing_is_left(&gateway, count).await;
    assert_eq!(
        gpu.records().len(),
        count,
        "nobody is asked again for a client that left"
    );
    assert_eq!(gpu.connections().open, 0);
}

#[tokio::test]
async fn leaving_after_the_first_token_closes_the_upstream_connection() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=50;tokens=100000").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for way in WAYS {
        let mut client = asking(&gateway, &chat_stream("demo")).await;
        client.read_until("answers:").await;
        let left = Instant::now();
        leave(client, way);
        given_up_upstream(&gpu, left, &format!("{way:?}")).await;
    }
    // A silence in the middle is no different.
    gpu.fault("stall_at=3").await.unwrap();
    let mut client = asking(&gateway, &chat_stream("demo")).await;
    client.read_until("answers:").await;
    let left = Instant::now();
    leave(client, Way::Fin);
    given_up_upstream(&gpu, left, "stall").await;
    nothing_is_left(&gateway, 3).await;
}

// A simulator that never waits leaves no time to anything on its thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_is_noticed_however_fast_the_upstream_is() {
    let gpu = sim("gpu-1").await;
    gpu.fault("tokens=1000000000").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for way in WAYS {
        let mut client = asking(&gateway, &chat_stream("demo")).await;
        client.read_until("answers:").await;
        let left = Instant::now();
        leave(client, way);
        given_up_upstream(&gpu, left, &format!("{way:?}")).await;
    }
    nothing_is_left(&gateway, 2).await;
}

#[tokio::test]
async fn leaving_inside_a_whole_answer_closes_the_upstream_connection() {
    let gpu = sim("gpu-1").await;
    gpu.fault("stall_at=100").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for way in WAYS {
        let client = asking(&gateway, &chat("demo")).await;
        working_on(&gpu, 1).await;
        let left = Instant::now();
        leave(client, way);
        given_up_upstream(&gpu, left, &format!("{way:?}")).await;
    }
    nothing_is_left(&gateway, 2).await;
}

#[tokio::test]
async fn leaving_behind_comments_closes_the_upstream_connection() {
    let gpu = sim("gpu-1").await;
    gpu.fault("hang").await.unwrap();
    let config = one_group(&[&gpu]) + "limits: { heartbeat: 100ms }\n";
    let gateway = Gateway::start(&config).await;
    for way in WAYS {
        let mut client = asking(&gateway, &chat_stream("demo")).await;
        client.read_until(": ping").await;
        let left = Instant::now();
        leave(client, way);
        given_up_upstream(&gpu, left, &format!("{way:?}")).await;
    }
    nothing_is_left(&gateway, 2).await;
}

#[tokio::test]
async fn leaving_the_line_for_a_slot_leaves_the_slot_to_others() {
    let gpu = sim("gpu-1").await;
    gpu.fault("hang;times=1").await.unwrap();
    let config = one_group(&[&gpu]).replace("kind: vllm,", "kind: vllm, concurrent: 1,");
    let gateway = Gateway::start(&config).await;
    let holder = asking(&gateway, &chat("demo")).await;
    working_on(&gpu, 1).await;
    for (count, way) in WAYS.into_iter().enumerate() {
        let waiting = asking(&gateway, &chat_stream("demo")).await;
        gateway
            .metric_becomes("forebay_requests_in_flight", 2.0)
            .await;
        leave(waiting, way);
        gateway
            .metric_becomes("forebay_requests_in_flight", 1.0)
            .await;
        gateway
            .metric_becomes("forebay_client_closed_total", count as f64 + 1.0)
            .await;
    }
    assert_eq!(
        gpu.records().len(),
        1,
        "those who waited never reached the upstream"
    );
    let mut patient = asking(&gateway, &chat("demo")).await;
    gateway
        .metric_becomes("forebay_requests_in_flight", 2.0)
        .await;
    let left = Instant::now();
    leave(holder, Way::Reset);
    let answer = patient.answer().await;
    assert_eq!(answer.status, 200);
    assert!(
        left.elapsed() < AT_ONCE,
        "the slot was free after {:?}",
        left.elapsed()
    );
    nothing_is_left(&gateway, 3).await;
}

#[tokio::test]
async fn leaving_during_a_backoff_ends_the_tries() {
    let gpu = sim("gpu-1").await;
    gpu.fault("status=503").await.unwrap();
    let config = one_group(&[&gpu]).replace("  gpus:\n", "  gpus:\n    same_upstream_retries: 9\n")
        + "limits: { attempts: 10 }\n";
    let gateway = Gateway::start(&config).await;
    let client = asking(&gateway, &chat("demo")).await;
    gpu.wait_for(AT_ONCE * 10, |records| !records.is_empty())
        .await
        .unwrap();
    leave(client, Way::Fin);
    nothing_is_left(&gateway, 1).await;
    let tries = gpu.records().len();
    assert!(tries < 10, "it went on to the end: {tries}");
    // Its place is free.
    gpu.clear_faults().await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}

#[tokio::test]
async fn leaving_while_the_body_goes_to_a_slow_upstream_closes_its_connection() {
    let upstream = ByHand::listen().await;
    let gateway = Gateway::start(&group_of(&upstream.url())).await;
    // More than the buffers between us and an upstream that reads nothing.
    let body = chat("demo").replace("Hello", &"Hello ".repeat(3 << 20));
    for (count, way) in WAYS.into_iter().enumerate() {
        let client = asking(&gateway, &body).await;
        let call = upstream.accept_unread().await;
        gateway.metric_becomes(UPSTREAM_IN_FLIGHT, 1.0).await;
        let left = Instant::now();
        leave(client, way);
        nothing_is_left(&gateway, count + 1).await;
        assert!(
            left.elapsed() < AT_ONCE,
            "{way:?}: after {:?}",
            left.elapsed()
        );
        call.closed().await;
    }
}

#[tokio::test]
async fn leaving_inside_the_own_body_reaches_no_upstream() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for way in WAYS {
        let bytes = build("POST", PATH, &[], chat("demo").as_bytes());
        let mut client = Connection::open(gateway.addr).await;
        client.send(&bytes[..bytes.len() - 5]).await;
        gateway
            .metric_becomes("forebay_requests_in_flight", 1.0)
            .await;
        leave(client, way);
        gateway
            .metric_becomes("forebay_requests_in_flight", 0.0)
            .await;
    }
    nothing_is_left(&gateway, 2).await;
    assert!(gpu.records().is_empty());
}

#[tokio::test]
async fn who_leaves_after_the_whole_answer_has_not_left_it() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for body in [chat("demo"), chat_stream("demo")] {
        let mut client = asking(&gateway, &body).await;
        assert_eq!(client.answer().await.status, 200);
        leave(client, Way::Reset);
    }
    nothing_is_left(&gateway, 0).await;
    assert!(
        gpu.records()
            .iter()
            .all(|record| record.state == State::Finished)
    );
}

#[tokio::test]
async fn a_slot_of_who_left_inside_a_stream_is_free_again() {
    let upstream = ByHand::listen().await;
    let config = group_of(&upstream.url()).replace("kind: vllm,", "kind: vllm, concurrent: 1,");
    let gateway = Gateway::start(&config).await;
    for way in WAYS {
        let mut client = asking(&gateway, &chat_stream("demo")).await;
        let mut call = upstream.accept().await;
        call.send(STREAM_HEAD).await;
        call.say("one").await;
        client.read_until("one").await;
        leave(client, way);
        call.closed().await;
    }
    nothing_is_left(&gateway, 2).await;
}

/// Small events stay in a buffer, and whatever ends the connection in good order
/// waits for that buffer to empty.
#[tokio::test]
async fn who_stops_reading_small_events_is_given_up_and_keeps_nobody_from_exiting() {
    let upstream = ByHand::listen().await;
    let config = group_of(&upstream.url())
        + "limits: { write_timeout: 500ms }\nshutdown: { lame_duck: 0s }\n";
    let mut gateway = Gateway::start(&config).await;
    let mut client = Connection::open_narrow(gateway.addr).await;
    let body = chat_stream("demo");
    client.request("POST", PATH, &[], body.as_bytes()).await;
    let mut call = upstream.accept().await;
    call.send(STREAM_HEAD).await;
    call.say("one").await;
    client.read_until("one").await;
    let text = "x".repeat(850);
    // Faster, and they would arrive together, as large ones.
    let talking = async { call.go_on_saying(&text, Duration::from_millis(1)).await };
    soon("the upstream is left", talking).await;
    nothing_is_left(&gateway, 1).await;

    gateway.signal("TERM");
    eventually("the process exits", || {
        let exited = gateway.exited().is_some();
        async move { exited }
    })
    .await;
    // It was there to the end.
    client.reset();
}

/// An h2c connection of a client. The task ends with the connection.
async fn h2c(gateway: &Gateway) -> (SendRequest<Bytes>, JoinHandle<()>) {
    let stream = TcpStream::connect(gateway.addr).await.unwrap();
    let (sender, connection) = soon("h2 begins", h2::client::handshake(stream))
        .await
        .unwrap();
    let running = tokio::spawn(async move {
        connection.await.ok();
    });
    (sender, running)
}

async fn ask_h2(
    sender: &SendRequest<Bytes>,
    body: &str,
) -> (ResponseFuture, h2::SendStream<Bytes>) {
    let request = http::Request::post(format!("http://forebay.test{PATH}"))
        .header("content-type", "application/json")
        .body(())
        .unwrap();
    let mut sender = soon("a stream", sender.clone().ready()).await.unwrap();
    let (answer, mut sending) = sender.send_request(request, false).unwrap();
    sending
        .send_data(Bytes::copy_from_slice(body.as_bytes()), true)
        .unwrap();
    (answer, sending)
}

#[tokio::test]
async fn leaving_over_h2c_closes_the_upstream_connection() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let (sender, running) = h2c(&gateway).await;
    let mut count = 0;
    for fault in ["hang", "first_token=60s"] {
        gpu.fault(fault).await.unwrap();
        for body in [chat("demo"), chat_stream("demo")] {
            // One stream of the connection is reset.
            let (answer, mut sending) = ask_h2(&sender, &body).await;
            working_on(&gpu, 1).await;
            let left = Instant::now();
            sending.send_reset(h2::Reason::CANCEL);
            given_up_upstream(&gpu, left, &format!("{fault} {body}")).await;
            drop(answer);
            count += 1;
        }
    }
    // After the first token.
    gpu.fault("gap=50;tokens=100000").await.unwrap();
    let (answer, mut sending) = ask_h2(&sender, &chat_stream("demo")).await;
    let answer = soon("a head", answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut events = answer.into_body();
    soon("an event", events.data()).await.unwrap().unwrap();
    let left = Instant::now();
    sending.send_reset(h2::Reason::CANCEL);
    given_up_upstream(&gpu, left, "after the first token").await;
    count += 1;
    // The others of a connection are not touched by who leaves.
    gpu.clear_faults().await;
    let (answer, _sending) = ask_h2(&sender, &chat_stream("demo")).await;
    let mut events = soon("a head", answer).await.unwrap().into_body();
    let mut stream = Vec::new();
    while let Some(piece) = soon("an event", events.data()).await {
        let piece = piece.unwrap();
        events.flow_control().release_capacity(piece.len()).unwrap();
        stream.extend_from_slice(&piece);
    }
    assert!(stream.ends_with(b"data: [DONE]\n\n"));
    nothing_is_left(&gateway, count).await;
    running.abort();
}

#[tokio::test]
async fn an_h2c_connection_that_ends_takes_all_its_requests_with_it() {
    let gpu = sim("gpu-1").await;
    gpu.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let (sender, running) = h2c(&gateway).await;
    let mut asked = Vec::new();
    for body in [chat("demo"), chat_stream("demo"), chat("demo")] {
        asked.push(ask_h2(&sender, &body).await);
    }
    working_on(&gpu, 3).await;
    let left = Instant::now();
    running.abort();
    given_up_upstream(&gpu, left, "the connection").await;
    nothing_is_left(&gateway, 3).await;
}
