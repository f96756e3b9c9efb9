//! The control port: what tests in other processes, and people with curl, steer
//! the simulator by. One request per connection, plain HTTP/1.1.

use std::{
    io,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use serde_json::{Value as Json, json};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};

use super::{
    faults::{Fault, KNOBS},
    http::{Body, Head, Inbox, ReadError},
    server::Server,
    wire::Out,
};

/// How long a control request may take to arrive.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the control port until it is aborted.
pub(crate) async fn serve(server: Arc<Server>, listener: TcpListener) {
    // Dropped with this task, and its connections with it.
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                tasks.spawn(one(server.clone(), stream));
            }
            Err(error) => {
                log::warn!("simulator's control port cannot accept: error={error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn one(server: Arc<Server>, mut stream: TcpStream) {
    let mut inbox = Inbox::default();
    let answer = match timeout(PATIENCE, read(&stream, &mut inbox)).await {
        Ok(Ok((head, body))) => answer(&server, &head, &body.content).await,
        Ok(Err(ReadError::Bad(status, why))) => Answer::wrong(status, why),
        Ok(Err(ReadError::Gone)) | Err(_) => return,
    };
    let written = write(&stream, &answer).await;
    if written.is_ok() && stream.shutdown().await.is_ok() {
        let drained = timeout(Duration::from_secs(1), inbox.drain(&stream)).await;
        drop(drained); // either way it is closed now
    }
}

async fn read(stream: &TcpStream, inbox: &mut Inbox) -> Result<(Head, Body), ReadError> {
    let head = inbox.head(stream).await?;
    if head.expects_continue {
        let sent = AtomicU64::new(0);
        let mut out = Out::new(stream, &sent);
        out.put(b"HTTP/1.1 100 Continue\r\n\r\n");
        out.flush().await?;
    }
    let body = inbox
        .body(stream, head.framing, &mut Body::default())
        .await?;
    Ok((head, body))
}

async fn write(stream: &TcpStream, answer: &Answer) -> io::Result<()> {
    let sent = AtomicU64::new(0);
    let mut out = Out::new(stream, &sent);
    let (status, kind, length) = (answer.status, answer.content_type, answer.body.len());
    let head = format!(
        "HTTP/1.1 {status}\x20\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    out.put(head.as_bytes());
    out.put(answer.body.as_bytes());
    out.flush().await
}

struct Answer {
    status: u16,
    content_type: &'static str,
    body: String,
}

impl Answer {
    fn json(json: &Json) -> Self {
        Self {
            status: 200,
            content_type: "application/json",
            body: format!("{json:#}\n"),
        }
    }

    fn wrong(status: u16, why: impl std::fmt::Display) -> Self {
        let json = json!({ "error": why.to_string() });
        Self {
            status,
            content_type: "application/json",
            body: format!("{json:#}\n"),
        }
    }
}

async fn answer(server: &Server, head: &Head, body: &[u8]) -> Answer {
    let changed = match (head.method(), head.path()) {
        ("GET", "/") => {
            return Answer {
                status: 200,
                content_type: "text/plain; charset=utf-8",
                body: help(server),
            };
        }
        ("GET", "/state") => Ok(()),
        ("GET", "/connections") => return Answer::json(&connections(server)),
        ("GET", "/requests") => return Answer::json(&requests(server)),
        ("DELETE", "/requests") => {
            server.shared.log.clear();
            Ok(())
        }
        ("POST", "/stop") => {
            server.stop().await;
            Ok(())
        }
        ("POST", "/start") => server.start_again().await,
        ("DELETE", "/fault") => server.set_faults(Vec::new()).await,
        ("POST", "/fault") => match Fault::parse_all(&String::from_utf8_lossy(body)) {
            Ok(faults) => server.set_faults(faults).await,
            Err(error) => return Answer::wrong(400, error),
        },
        _ => return Answer::wrong(404, "there is GET /, which lists what there is"),
    };
    match changed {
        Ok(()) => Answer::json(&state(server)),
        Err(error) => Answer::wrong(500, error),
    }
}

fn connections(server: &Server) -> Json {
    let connections = server.shared.connections();
    json!({ "open": connections.open, "total": connections.total })
}

fn state(server: &Server) -> Json {
    let shared = &server.shared;
    let faults: Vec<Json> = shared
        .faults
        .all()
        .iter()
        .map(|due| json!({ "fault": due.fault.to_string(), "left": due.left }))
        .collect();
    let (received, kept, bodies_dropped) = shared.log.counts();
    json!({
        "name": shared.options.name,
        "models": shared.options.models,
        "address": server.addr.to_string(),
        "listening": shared.listening.load(std::sync::atomic::Ordering::Acquire),
        "loading": shared.is_loading(),
        "faults": faults,
        "connections": connections(server),
        "requests": { "received": received, "kept": kept, "bodies_dropped": bodies_dropped },
    })
}

fn requests(server: &Server) -> Json {
    let (received, kept, bodies_dropped) = server.shared.log.counts();
    let requests: Vec<Json> = server
        .shared
        .log
        .all()
        .iter()
        .map(|r| r.to_json())
        .collect();
    json!({
        "received": received,
        "kept": kept,
        "bodies_dropped": bodies_dropped,
        "requests": requests,
    })
}

fn help(server: &Server) -> String {
    let mut text = format!(
        "forebay sim {:?}, a simulated model server on http://{}/v1

GET    /             this text
GET    /state        what it is doing
POST   /stop         refuse connections and cut the open ones
POST   /start        listen again on the same port
POST   /fault        set faults: knob=value;knob;… (one fault a line) or JSON
DELETE /fault        clear all faults
GET    /requests     what was received: the last 10,000, 64 MiB of bodies
DELETE /requests     forget it
GET    /connections  how many are open, and were in total

Knobs:
",
        server.shared.options.name, server.addr
    );
    for knob in KNOBS {
        let form = match knob.values {
            "" => knob.name.to_owned(),
            values => format!("{}={values}", knob.name),
        };
        text.push_str(&format!("  {form:24} {}\n", knob.effect));
    }
    text
}
