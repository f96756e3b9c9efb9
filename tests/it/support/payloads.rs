//! Requests of HTTP/1 as raw bytes, each with its number in its bodies, so that
//! the upstream's byte log tells what became of it.

use std::{fmt, net::SocketAddr};

use forebay::sim::Sim;
use tokio::task::JoinSet;

use super::{
    Connection, Gateway, chat,
    http::{build, post_chat},
};

pub const CHAT: &str = "/v1/chat/completions";

/// What may become of a payload.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    /// No byte to the upstream; an error or nothing to the client.
    Refused,
    /// Exactly the request that was meant to the upstream, one 200 to the client.
    Meant,
    /// One of the two: both are sound readings.
    Either,
}

pub struct Payload {
    pub name: String,
    pub bytes: Vec<u8>,
    pub fate: Fate,
}

#[derive(Default)]
pub struct Payloads(Vec<Payload>);

impl Payloads {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The body that the next payload's request is meant to have.
    pub fn meant(&self) -> String {
        self.body("meant")
    }

    /// A whole request that nobody must ever see, for the next payload.
    pub fn hidden(&self) -> Vec<u8> {
        build("POST", CHAT, &[], self.body("hidden").as_bytes())
    }

    pub fn raw(&mut self, fate: Fate, name: impl Into<String>, bytes: &[u8]) {
        let name = format!("{} ({})", name.into(), self.0.len());
        let bytes = bytes.to_vec();
        self.0.push(Payload { name, bytes, fate });
    }

    fn body(&self, word: &str) -> String {
        let number = self.0.len();
        format!(r#"{{"model":"demo","messages":[{{"role":"user","content":"{word}-{number}."}}]}}"#)
    }
}

/// What became of a payload.
pub struct Outcome {
    pub name: String,
    pub fate: Fate,
    /// All that its client read.
    pub said: String,
    /// How often the upstream has seen what was meant, and whether what was not.
    pub meant: usize,
    pub hidden: bool,
}

impl Outcome {
    /// The final answers, without `HTTP/1.1 `.
    pub fn answers(&self) -> Vec<&str> {
        let answers = self.said.split("HTTP/1.1 ").skip(1);
        answers
            .filter(|answer| !answer.starts_with("100"))
            .collect()
    }

    /// Whether each answer is a 200 or says that it was the client's fault.
    pub fn is_sane(&self) -> bool {
        let is_sane = |answer: &&str| answer.starts_with("200") || answer.starts_with('4');
        self.answers().iter().all(is_sane)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            said,
            meant,
            hidden,
            ..
        } = self;
        write!(f, "{name}: meant={meant} hidden={hidden} {said:?}")
    }
}

/// Sends each on a connection of its own, and reads to its end.
pub async fn send_all(addr: SocketAddr, sim: &Sim, all: Payloads) -> Vec<Outcome> {
    let mut running = JoinSet::new();
    let mut payloads = all.0.into_iter().enumerate();
    let mut outcomes = Vec::new();
    loop {
        // Some at a time: who leaves a connection waiting takes until a timeout.
        while running.len() < 40
            && let Some((number, payload)) = payloads.next()
        {
            running.spawn(async move {
                let mut connection = Connection::open(addr).await;
                connection.try_send(&payload.bytes).await;
                let said = connection.rest().await;
                (number, payload, String::from_utf8_lossy(&said).into_owned())
            });
        }
        let Some(done) = running.join_next().await else {
            return outcomes;
        };
        let (number, payload, said) = done.unwrap();
        let (meant, hidden) = seen(sim, number);
        outcomes.push(Outcome {
            name: payload.name,
            fate: payload.fate,
            said,
            meant,
            hidden,
        });
    }
}

/// What the upstream has seen of a payload: how many meant requests, and whether
/// a hidden one.
fn seen(sim: &Sim, number: usize) -> (usize, bool) {
    let (meant, hidden) = (format!("meant-{number}."), format!("hidden-{number}."));
    let records = sim.records();
    let raw = records.iter().map(|record| record.raw());
    let raw: Vec<_> = raw
        .map(|raw| String::from_utf8_lossy(&raw).into_owned())
        .collect();
    let count = raw.iter().filter(|raw| raw.contains(&meant)).count();
    (count, raw.iter().any(|raw| raw.contains(&hidden)))
}

/// After whatever it was sent, a gateway has nothing under way, has panicked
/// nowhere, and answers.
pub async fn is_unharmed(gateway: &Gateway) {
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}
