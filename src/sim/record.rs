//! What the simulator received: the witness of every test.
//!
//! `Log` keeps the last requests, each as a [`Record`] that is there as soon
//! as the request was read and is brought up to date when its answer ends.
//!
//! **Invariant:** memory is bounded: the last 10,000 requests, of whose bodies
//! at most 64 MiB are kept, the oldest dropped first. A record whose body was
//! dropped says so, and still knows its length and its SHA-256.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::{Value as Json, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;

use super::{
    base64::base64,
    http::{Body, header_lines, request_line},
};

/// How many requests are kept.
const RECORDS_MAX: usize = 10_000;
/// How many bytes of their bodies are kept.
const BODY_BYTES_MAX: usize = 64 << 20;

/// How far a request's answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is being answered.
    Open,
    /// All of the answer was written.
    Finished,
    /// The client closed the connection before that.
    ClientLeft,
    /// The simulator cut the answer itself: a fault, or [`super::Sim::stop`].
    Cut,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Finished => "finished",
            Self::ClientLeft => "client_left",
            Self::Cut => "cut",
        }
    }
}

/// One request, as it came, and what became of it.
#[derive(Clone, Debug)]
pub struct Record {
    /// 1 for the first request, in order of arrival.
    pub id: u64,
    /// The number of its connection, from 1.
    pub connection: u64,
    /// Its number among the requests of that connection, from 1.
    pub nth: u64,
    /// When it was read, since the simulator started.
    pub at: Duration,
    /// The head as it came, with the blank line.
    pub head: Bytes,
    /// The body without chunk framing; empty once it was dropped.
    pub body: Bytes,
    /// The length of the body, also when it was dropped.
    pub body_len: u64,
    /// Whether the body was dropped to bound memory.
    pub body_dropped: bool,
    /// Whether all of the body was read.
    pub body_complete: bool,
    /// The fault it was given, as text.
    pub fault: Option<String>,
    /// The status of the answer, once its head is on its way.
    pub status: Option<u16>,
    /// The bytes of the answer that were written; set when the answer ends.
    pub sent: u64,
    /// How far the answer is.
    pub state: State,
    /// The time from the end of the request to the end of the answer, of
    /// whatever kind; for [`State::ClientLeft`] that is when the client left.
    pub ended_after: Option<Duration>,
    wire: Bytes,
    digest: Option<[u8; 32]>,
}

impl Record {
    /// Returns the method.
    pub fn method(&self) -> &str {
        request_line(&self.head).0
    }

    /// Returns the request target: path and query.
    pub fn target(&self) -> &str {
        request_line(&self.head).1
    }

    /// Returns the headers in order, names as they were sent.
    pub fn headers(&self) -> Vec<(String, String)> {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        header_lines(&self.head)
            .map(|(name, value)| (text(name), text(value)))
            .collect()
    }

    /// Returns the first header of this name, in any case.
    pub fn header(&self, name: &str) -> Option<String> {
        header_lines(&self.head)
            .find(|(found, _)| found.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    }

    /// Returns whether it asks how the server is, and for nothing of a model:
    /// what gateways and load balancers ask by themselves.
    pub fn is_check(&self) -> bool {
        let path = self.target().split('?').next().unwrap_or_default();
        let asks = ["/health", "/api/version", "/models"];
        self.method() == "GET" && asks.iter().any(|end| path.ends_with(end))
    }

    /// Returns the body as JSON; null if it is none.
    pub fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap_or(Json::Null)
    }

    /// Returns the request as it was on the wire, chunk framing included.
    pub fn raw(&self) -> Bytes {
        [&self.head[..], &self.wire[..]].concat().into()
    }

    /// Returns the SHA-256 of the body in hex, also when the body was dropped.
    pub fn sha256(&self) -> String {
        let digest = self.digest.unwrap_or_else(|| sha256(&self.body));
        digest.iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a string takes all that is written");
            hex
        })
    }

    /// Whether all of the answer was written.
    pub fn finished(&self) -> bool {
        self.state == State::Finished
    }

    /// Returns what `GET /requests` shows.
    pub(crate) fn to_json(&self) -> Json {
        let mut json = json!({
            "id": self.id,
            "connection": self.connection,
            "nth": self.nth,
            "at_ms": millis(self.at),
            "method": self.method(),
            "target": self.target(),
            "headers": self.headers(),
            "head_bytes": self.head.len(),
            "body_bytes": self.body_len,
            "body_complete": self.body_complete,
            "body_dropped": self.body_dropped,
            "sha256": self.sha256(),
            "fault": self.fault,
            "status": self.status,
            "sent_bytes": self.sent,
            "state": self.state.name(),
            "finished": self.finished(),
            "client_left": self.state == State::ClientLeft,
            "ended_after_ms": self.ended_after.map(millis),
        });
        if let Some(fields) = json.as_object_mut() {
            match std::str::from_utf8(&self.body) {
                Ok(text) => fields.insert("body".to_owned(), text.into()),
                Err(_) => fields.insert("body_base64".to_owned(), base64(&self.body).into()),
            };
        }
        json
    }

    fn kept_bytes(&self) -> usize {
        self.body.len() + self.wire_bytes_apart()
    }

    /// The chunked form takes memory of its own.
    fn wire_bytes_apart(&self) -> usize {
        if self.wire.as_ptr() == self.body.as_ptr() {
            0
        } else {
            self.wire.len()
        }
    }

    fn drop_body(&mut self) {
        self.digest = Some(sha256(&self.body));
        self.body = Bytes::new();
        self.wire = Bytes::new();
        self.body_dropped = true;
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What was waited for did not come in time; holds what was recorded instead.
#[derive(Debug, thiserror::Error)]
#[error("not seen in {waited:?}, but {} requests", records.len())]
pub struct NotSeen {
    /// How long it was waited for.
    pub waited: Duration,
    /// What was recorded until then.
    pub records: Vec<Record>,
}

/// The last requests.
#[derive(Debug)]
pub(crate) struct Log {
    started: Instant,
    kept: Mutex<Kept>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    records: VecDeque<Record>,
    /// The id of the newest record; ids are never used twice.
    last_id: u64,
    body_bytes: usize,
    /// How many of the oldest records have no body left.
    bodies_dropped: u64,
}

/// A request on its way into the log.
pub(crate) struct Arrival<'a> {
    pub(crate) connection: u64,
    pub(crate) nth: u64,
    pub(crate) head: &'a Bytes,
    pub(crate) body: &'a Body,
    pub(crate) body_complete: bool,
    pub(crate) fault: Option<String>,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            kept: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // No invariant spans a panic: every change is one statement.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request and returns its id.
    pub(crate) fn push(&self, arrival: Arrival<'_>) -> u64 {
        let mut kept = self.lock();
        kept.last_id += 1;
        let record = Record {
            id: kept.last_id,
            connection: arrival.connection,
            nth: arrival.nth,
            at: self.started.elapsed(),
            head: arrival.head.clone(),
            body: arrival.body.content.clone(),
            body_len: arrival.body.content.len() as u64,
            body_dropped: false,
            body_complete: arrival.body_complete,
            fault: arrival.fault,
            status: None,
            sent: 0,
            state: State::Open,
            ended_after: None,
            wire: arrival.body.wire.clone(),
            digest: None,
        };
        let id = record.id;
        kept.body_bytes += record.kept_bytes();
        kept.records.push_back(record);
        kept.bound();
        drop(kept);
        self.changed.notify_waiters();
        id
    }

    /// Brings a record up to date, if it is still kept.
    pub(crate) fn update(&self, id: u64, change: impl FnOnce(&mut Record)) {
        let mut kept = self.lock();
        let first = kept.records.front().map_or(id, |record| record.id);
        let index = id
            .checked_sub(first)
            .and_then(|index| usize::try_from(index).ok());
        let record = index.and_then(|index| kept.records.get_mut(index));
        if let Some(record) = record {
            change(record);
        }
        drop(kept);
        self.changed.notify_waiters();
    }

    /// Puts a body that came late into its record.
    pub(crate) fn set_body(&self, id: u64, body: &Body, complete: bool) {
        let mut grown = 0;
        self.update(id, |record| {
            record.body = body.content.clone();
            record.wire = body.wire.clone();
            record.body_len = body.content.len() as u64;
            record.body_complete = complete;
            grown = record.kept_bytes();
        });
        let mut kept = self.lock();
        kept.body_bytes += grown;
        kept.bound();
    }

    /// Returns copies of all records, oldest first.
    pub(crate) fn all(&self) -> Vec<Record> {
        self.lock().records.iter().cloned().collect()
    }

    pub(crate) fn clear(&self) {
        let mut kept = self.lock();
        kept.records.clear();
        kept.body_bytes = 0;
        kept.bodies_dropped = 0;
        drop(kept);
        self.changed.notify_waiters();
    }

    /// Returns how many requests there were, how many are kept, and how many of
    /// those have lost their body.
    pub(crate) fn counts(&self) -> (u64, usize, u64) {
        let kept = self.lock();
        (kept.last_id, kept.records.len(), kept.bodies_dropped)
    }

    /// Waits until the records are as `seen` wants them.
    pub(crate) async fn wait_for(
        &self,
        deadline: Duration,
        mut seen: impl FnMut(&[Record]) -> bool,
    ) -> Result<Vec<Record>, NotSeen> {
        let until = tokio::time::Instant::now() + deadline;
        loop {
            // Registered before the look, so that no change falls between.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let records = self.all();
            if seen(&records) {
                return Ok(records);
            }
            if tokio::time::timeout_at(until, changed).await.is_err() {
                return Err(NotSeen {
                    waited: deadline,
                    records,
                });
            }
        }
    }
}

impl Kept {
    fn bound(&mut self) {
        while self.records.len() > RECORDS_MAX {
            if let Some(gone) = self.records.pop_front() {
                self.body_bytes = self.body_bytes.saturating_sub(gone.kept_bytes());
                self.bodies_dropped -= u64::from(gone.body_dropped);
            }
        }
        if self.body_bytes <= BODY_BYTES_MAX {
            return;
        }
        for record in &mut self.records {
            if self.body_bytes <= BODY_BYTES_MAX {
                break;
            }
            if !record.body_dropped && record.body_len > 0 {
                self.body_bytes = self.body_bytes.saturating_sub(record.kept_bytes());
                self.bodies_dropped += 1;
                record.drop_body();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(log: &Log, body: &[u8]) -> u64 {
        let content = Bytes::copy_from_slice(body);
        log.push(Arrival {
            connection: 1,
            nth: 1,
            head: &Bytes::from_static(b"POST /v1/x HTTP/1.1\r\nX-A: 1\r\nx-a: 2\r\n\r\n"),
            body: &Body {
                wire: content.clone(),
                content,
            },
            body_complete: true,
            fault: None,
        })
    }

    #[test]
    fn a_record_gives_back_what_came() {
        let log = Log::new();
        push(&log, b"{\"a\":1}");
        let record = &log.all()[0];
        assert_eq!((record.method(), record.target()), ("POST", "/v1/x"));
        let pair = |n: &str, v: &str| (n.to_owned(), v.to_owned());
        assert_eq!(record.headers(), [pair("X-A", "1"), pair("x-a", "2")]);
        assert_eq!(record.header("X-a").as_deref(), Some("1"));
        assert_eq!(record.json()["a"], 1);
        assert!(record.raw().ends_with(b"\r\n\r\n{\"a\":1}"));
    }

    #[test]
    fn only_the_last_ten_thousand_are_kept_and_the_rest_stays_addressable() {
        let log = Log::new();
        for _ in 0..RECORDS_MAX + 5 {
            push(&log, b"x");
        }
        log.update(RECORDS_MAX as u64, |record| record.status = Some(200));
        log.update(1, |_| panic!("the first is gone"));
        let records = log.all();
        assert_eq!(records.len(), RECORDS_MAX);
        assert_eq!(records[0].id, 6);
        let changed = records.iter().find(|r| r.status == Some(200)).unwrap();
        assert_eq!(changed.id, RECORDS_MAX as u64);
    }

    #[test]
    fn the_oldest_bodies_are_dropped_beyond_the_bound_and_say_so() {
        let log = Log::new();
        let body = vec![b'x'; BODY_BYTES_MAX / 2];
        push(&log, &body);
        let before = log.all()[0].sha256();
        push(&log, &body);
        push(&log, b"small");
        let records = log.all();
        assert!(records[0].body_dropped && records[0].body.is_empty());
        assert_eq!(records[0].body_len, body.len() as u64);
        assert_eq!(records[0].sha256(), before);
        assert!(!records[1].body_dropped && !records[2].body_dropped);
        assert_eq!(log.counts(), (3, 3, 1));
    }

    #[test]
    fn a_body_that_is_no_text_is_shown_in_base64() {
        let log = Log::new();
        push(&log, b"\xff\xfe");
        let json = log.all()[0].to_json();
        assert_eq!(json["body_base64"], "//4=");
        assert_eq!(json["sha256"].as_str().unwrap().len(), 64);
    }

    #[tokio::test]
    async fn waiting_ends_when_the_record_changes() {
        let log = std::sync::Arc::new(Log::new());
        let id = push(&log, b"");
        let other = log.clone();
        let task = tokio::spawn(async move {
            other
                .wait_for(Duration::from_secs(5), |r| r[0].finished())
                .await
        });
        tokio::task::yield_now().await;
        log.update(id, |record| record.state = State::Finished);
        assert!(task.await.unwrap().is_ok());
        let never = log.wait_for(Duration::ZERO, |_| false).await.unwrap_err();
        assert_eq!(never.records.len(), 1);
    }
}
