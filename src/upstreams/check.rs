//! Asking upstreams whether they are well, at no cost: a `GET` that no model
//! runs for, on a connection of its own that is closed afterwards.
//!
//! [`run`] walks the *live* upstreams ten times a second and asks those whose
//! turn it is, so that what a reload adds is asked at once and what it removes
//! no longer. Each question is a task of its own: one that nobody answers
//! delays no other. [`Probe`] is Pingora's `HealthCheck`; what its answers mean
//! for the upstream is [`health`](super::health)'s to say.
//!
//! An answer below 500 is a good one: the server is there, and it may well have
//! no such path, or want no such question from this key. Where the
//! configuration names the path only 2xx is good.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::{BufMut, BytesMut};
use http::StatusCode;
use pingora::{
    Error, ErrorType,
    connectors::TransportConnector,
    http::RequestHeader,
    lb::{Backend, health_check::HealthCheck},
    protocols::{http::v1::client::HttpSession, l4::socket::SocketAddr},
    upstreams::peer::HttpPeer,
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{sockets, tls_fault::TlsFault, upstream::Upstream};
use crate::{
    config::{self, Kind},
    metrics::Metrics,
};

/// How often it is looked whose turn it is.
const TICK: Duration = Duration::from_millis(100);
/// The most questions at the same time.
const CHECKS_MAX: usize = 256;
/// How soon one is asked again that is not well; doubling to [`QUICK_MAX`], or to
/// its ordinary time if that is less.
const QUICK: Duration = Duration::from_millis(250);
const QUICK_MAX: Duration = Duration::from_secs(1);
/// A question that has taken this long is lost; far above the longest timeout.
const LOST: Duration = Duration::from_secs(300);
/// The most that is read of an answer.
const ANSWER_MAX: usize = 16 * 1024;
/// How many addresses of one name are asked.
const ADDRESSES_MAX: usize = 4;
/// Marks an error that says that the model is being loaded.
const LOADING: ErrorType = ErrorType::CustomCode("loading", 503);

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checked {
    /// It is well.
    Good,
    /// Its model is being loaded.
    Loading,
    /// It did not answer in time.
    Silent,
    /// It was not asked: this machine had no socket left.
    NotAsked,
    /// There is no TLS with it.
    Tls(TlsFault),
    /// It answered that it is not well, or could not be reached; why, for the
    /// log.
    Bad(String),
}

impl Checked {
    /// Returns the metric label.
    const fn as_str(&self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Loading => "loading",
            Self::Silent => "silent",
            Self::NotAsked => "not_asked",
            Self::Tls(_) => "tls",
            Self::Bad(_) => "bad",
        }
    }
}

/// When an upstream is asked next, and what it said last.
#[derive(Debug)]
pub(super) struct Schedule {
    next: Instant,
    /// When the question began that is under way.
    running: Option<Instant>,
    /// When the bad answers in a row were asked for, oldest first; of many the
    /// last.
    fails: VecDeque<Instant>,
    /// Good answers in a row.
    goods: u32,
    /// Questions since it was last well.
    quick: u32,
}

impl Schedule {
    /// Makes one whose turn it is.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            next: now,
            running: None,
            fails: VecDeque::new(),
            goods: 0,
            quick: 0,
        }
    }

    /// Takes the turn, if it is one.
    pub(super) fn begin(&mut self, now: Instant) -> bool {
        let running = self.running.is_some_and(|since| now < since + LOST);
        if running || now < self.next {
            return false;
        }
        self.running = Some(now);
        true
    }

    /// Brings the next question forward: something happened.
    pub(super) fn soon(&mut self, now: Instant) {
        (self.goods, self.quick) = (0, 0);
        self.next = self.next.min(now + QUICK);
    }

    /// Ends a question, and sets the time of the next.
    pub(super) fn next(&mut self, check: &config::Check, well: bool, now: Instant) {
        self.running = None;
        let every = check.every.get();
        let pause = if well {
            self.quick = 0;
            every
        } else {
            if self.goods > 0 {
                self.quick = 0;
            }
            let doubled = 1_u32.checked_shl(self.quick.min(16)).unwrap_or(u32::MAX);
            self.quick = self.quick.saturating_add(1);
            QUICK.saturating_mul(doubled).min(QUICK_MAX).min(every)
        };
        self.next = now + pause.mul_f64(rand::random_range(0.8..1.2));
    }

    /// Counts a good answer; returns how many there were in a row.
    pub(super) fn good(&mut self) -> u32 {
        self.fails.clear();
        self.goods = self.goods.saturating_add(1);
        self.goods
    }

    /// Counts a bad answer to a question that was asked at `began`. Returns
    /// whether it is the `fall`th in a row, or a later one.
    pub(super) fn bad(&mut self, fall: u32, began: Instant) -> bool {
        self.goods = 0;
        self.fails.push_back(began);
        let fall = usize::try_from(fall).unwrap_or(usize::MAX);
        while self.fails.len() > fall {
            self.fails.pop_front();
        }
        self.fails.len() >= fall
    }

    /// Notes an answer that is neither.
    pub(super) fn loading(&mut self) {
        self.fails.clear();
        self.goods = 0;
    }

    /// Returns whether the last answer was bad.
    pub(super) fn fails(&self) -> bool {
        !self.fails.is_empty()
    }

    /// Returns when the oldest of the last `fall` questions was asked, if all of
    /// them had bad answers.
    pub(super) fn bad_since(&self, fall: u32) -> Option<Instant> {
        let fall = usize::try_from(fall).unwrap_or(usize::MAX);
        let first = self.fails.len().checked_sub(fall)?;
        self.fails.get(first).copied()
    }
}

/// The question to one upstream.
pub struct Probe {
    upstream: Arc<Upstream>,
    connector: Arc<TransportConnector>,
}

#[async_trait]
impl HealthCheck for Probe {
    async fn check(&self, target: &Backend) -> pingora::Result<()> {
        let mut peer = self.upstream.peer_at(target.addr.clone());
        let patience = self.upstream.policy.check.timeout.get();
        peer.options.connection_timeout = Some(patience);
        peer.options.total_connection_timeout = Some(patience);
        peer.options.read_timeout = Some(patience);
        let stream = self.connector.new_stream(&peer).await?;
        let mut session = HttpSession::new_with_options(stream, &peer);
        let asked = self.ask(&mut session).await;
        session.shutdown().await;
        asked
    }

    fn health_threshold(&self, success: bool) -> usize {
        let check = &self.upstream.policy.check;
        let threshold = if success { check.rise } else { check.fall };
        usize::try_from(threshold).unwrap_or(usize::MAX)
    }
}

impl Probe {
    /// Makes the question to an upstream.
    pub fn new(upstream: Arc<Upstream>, connector: Arc<TransportConnector>) -> Self {
        Self {
            upstream,
            connector,
        }
    }

    async fn ask(&self, session: &mut HttpSession) -> pingora::Result<()> {
        session.write_request_header(self.request()?).await?;
        session.finish_body().await?;
        let status = loop {
            session.read_response().await?;
            match session.get_status() {
                Some(StatusCode::SWITCHING_PROTOCOLS) | None => {
                    return Error::e_explain(ErrorType::InvalidHTTPHeader, "no answer");
                }
                Some(status) if status.is_informational() => {}
                Some(status) => break status,
            }
        };
        let named = self.upstream.policy.check.path.is_some();
        if status.is_success() || (!named && !status.is_server_error()) {
            return Ok(());
        }
        let mut body = BytesMut::new();
        // What cannot be read says nothing.
        while let Ok(Some(piece)) = session.read_body_bytes().await {
            if body.len() + piece.len() > ANSWER_MAX {
                break;
            }
            body.put_slice(&piece);
        }
        if is_loading(self.upstream.config.kind, status, &body) {
            return Error::e_explain(LOADING, "the model is being loaded");
        }
        Error::e_explain(ErrorType::HTTPStatus(status.as_u16()), "a check")
    }

    fn request(&self) -> pingora::Result<Box<RequestHeader>> {
        const USER_AGENT: &str = concat!("forebay-check/", env!("CARGO_PKG_VERSION"));
        let upstream = &self.upstream;
        let path = path(upstream);
        let mut request = RequestHeader::build("GET", path.as_bytes(), Some(8))?;
        request.insert_header("host", &upstream.host)?;
        request.insert_header("user-agent", USER_AGENT)?;
        request.insert_header("accept", "*/*")?;
        request.insert_header("accept-encoding", "identity")?;
        // Some servers keep a thread for each connection.
        request.insert_header("connection", "close")?;
        if let Some(authorization) = &upstream.authorization {
            request.insert_header("authorization", authorization)?;
        }
        for (name, value) in &upstream.headers {
            request.insert_header(name, value)?;
        }
        Ok(Box::new(request))
    }

    /// Asks, and says what came of it.
    async fn run(&self) -> Checked {
        let patience = self.upstream.policy.check.timeout.get();
        match timeout(patience, self.every_address()).await {
            Ok(checked) => checked,
            Err(_elapsed) => Checked::Silent,
        }
    }

    /// A name may have several addresses: one that answers is enough.
    async fn every_address(&self) -> Checked {
        let upstream = &self.upstream;
        if upstream.peer().is_err() {
            let until = Instant::now() + upstream.policy.check.timeout.get();
            if let Err(why) = upstream.addresses.resolve_now(until).await {
                return match sockets::are_out() {
                    true => Checked::NotAsked,
                    false => Checked::Bad(why.to_string()),
                };
            }
        }
        let mut last = Checked::Bad("the name has no address".to_owned());
        for _ in 0..ADDRESSES_MAX {
            let Ok(HttpPeer { _address: at, .. }) = upstream.peer() else {
                return last;
            };
            let target = Backend {
                addr: at.clone(),
                weight: 1,
                ext: http::Extensions::new(),
            };
            last = match self.check(&target).await {
                Ok(()) => return Checked::Good,
                Err(why) if why.etype() == &LOADING => return Checked::Loading,
                Err(why) => judge(&why),
            };
            let unreachable = matches!(&last, Checked::Bad(why) if why == UNREACHABLE);
            let another = match at {
                SocketAddr::Inet(at) if unreachable => {
                    upstream.addresses.refused(at, Instant::now())
                }
                _ => false,
            };
            if !another {
                break;
            }
        }
        last
    }
}

const UNREACHABLE: &str = "cannot be reached";

fn judge(why: &Error) -> Checked {
    if sockets::is_ours(why) {
        return Checked::NotAsked;
    }
    if let Some(fault) = TlsFault::of(why).or_else(|| TlsFault::of_silence(why)) {
        return Checked::Tls(fault);
    }
    match why.etype() {
        ErrorType::ConnectTimedout
        | ErrorType::ReadTimedout
        | ErrorType::WriteTimedout
        | ErrorType::TLSHandshakeTimedout => Checked::Silent,
        ErrorType::HTTPStatus(status) => Checked::Bad(format!("status {status}")),
        ErrorType::ConnectRefused | ErrorType::ConnectNoRoute | ErrorType::ConnectError => {
            Checked::Bad(UNREACHABLE.to_owned())
        }
        // Pingora's own text may hold bytes of the answer.
        other => Checked::Bad(other.as_str().to_owned()),
    }
}

/// Returns what an upstream is asked for.
fn path(upstream: &Upstream) -> String {
    if let Some(path) = &upstream.policy.check.path {
        return path.clone();
    }
    let prefix = &*upstream.base.prefix;
    let root = prefix.strip_suffix("/v1").unwrap_or(prefix);
    match upstream.config.kind {
        Kind::Vllm | Kind::Llamacpp => format!("{root}/health"),
        Kind::Ollama => format!("{root}/api/version"),
        Kind::Openai | Kind::Generic => format!("{prefix}/models"),
    }
}

/// llama.cpp's `/health` says 503 while it loads and at no other time; other
/// servers, or proxies before them, say it in its words.
fn is_loading(kind: Kind, status: StatusCode, body: &[u8]) -> bool {
    let said = || String::from_utf8_lossy(body).contains("Loading model");
    status == StatusCode::SERVICE_UNAVAILABLE && (kind == Kind::Llamacpp || said())
}

/// Asks the upstreams that `live` returns, for ever: until `shutdown` says so.
pub async fn run(
    live: impl Fn() -> Vec<Arc<Upstream>>,
    connector: Arc<TransportConnector>,
    metrics: Arc<Metrics>,
    mut shutdown: watch::Receiver<bool>,
) {
    let rounds = async {
        let mut asked = JoinSet::new();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            while asked.try_join_next().is_some() {}
            for upstream in live() {
                upstream.tick(Instant::now());
                if asked.len() < CHECKS_MAX && upstream.begin_check(Instant::now()) {
                    let probe = Probe::new(upstream, Arc::clone(&connector));
                    asked.spawn(ask(probe, Arc::clone(&metrics)));
                }
            }
        }
    };
    tokio::select! {
        () = rounds => {}
        // An error is a sender that is gone.
        _ = shutdown.wait_for(|down| *down) => {}
    }
}

async fn ask(probe: Probe, metrics: Arc<Metrics>) {
    let began = Instant::now();
    let checked = probe.run().await;
    let name = &*probe.upstream.name;
    match &checked {
        Checked::Bad(why) => log::debug!("check failed: name={name} {why}"),
        Checked::Tls(fault) => log::debug!("check failed: name={name} {}", fault.as_str()),
        _ => {}
    }
    metrics
        .health_checks
        .with_label_values(&[name, checked.as_str()])
        .inc();
    probe.upstream.checked(&checked, began, Instant::now());
}

#[cfg(test)]
mod tests {
    use super::{super::upstream::tests::built, *};

    #[test]
    fn what_is_asked_for_costs_no_token_and_depends_on_the_kind() {
        for (yaml, wanted) in [
            ("kind: vllm, url: 'http://10.0.0.1:8000/v1'", "/health"),
            ("kind: llamacpp, url: 'http://10.0.0.1'", "/health"),
            ("kind: vllm, url: 'http://10.0.0.1/a/v1'", "/a/health"),
            ("kind: ollama, url: 'http://10.0.0.1/v1'", "/api/version"),
            ("kind: openai, url: 'https://10.0.0.1/v1'", "/v1/models"),
            ("url: 'http://10.0.0.1/v1'", "/v1/models"),
            ("url: 'http://10.0.0.1/ai/v3'", "/ai/v3/models"),
            ("url: 'http://10.0.0.1/v1', check: { path: /up }", "/up"),
        ] {
            assert_eq!(path(&built(&format!("{{ name: a, {yaml} }}"))), wanted);
        }
    }

    #[test]
    fn loading_is_told_from_being_ill() {
        let body = br#"{"error":{"message":"Loading model","type":"unavailable_error"}}"#;
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        assert!(is_loading(Kind::Llamacpp, unavailable, b""));
        assert!(is_loading(Kind::Generic, unavailable, body));
        assert!(!is_loading(Kind::Vllm, unavailable, b""));
        assert!(!is_loading(Kind::Llamacpp, StatusCode::BAD_GATEWAY, body));
    }

    #[test]
    fn one_question_at_a_time_and_the_next_after_about_its_time() {
        let check = config::Check::default();
        let now = Instant::now();
        let mut schedule = Schedule::new(now);
        assert!(schedule.begin(now));
        assert!(!schedule.begin(now + Duration::from_secs(9)));
        schedule.next(&check, true, now);
        assert!(!schedule.begin(now + Duration::from_millis(3990)));
        assert!(schedule.begin(now + Duration::from_millis(6010)));
    }

    #[test]
    fn who_is_not_well_is_asked_sooner() {
        let check = config::Check::default();
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        schedule.soon(now);
        for expected in [0.25, 0.5, 1.0, 1.0, 1.0] {
            schedule.bad(3, now);
            schedule.next(&check, false, now);
            let wait = (schedule.next - now).as_secs_f64();
            assert!(wait >= expected * 0.79 && wait <= expected * 1.21, "{wait}");
            now = schedule.next;
        }
        // Once it answers, it is soon known for sure.
        schedule.good();
        schedule.next(&check, false, now);
        assert!(schedule.next - now <= Duration::from_millis(310));
    }
}
