//! One upstream, ready to be used: its configuration with everything resolved,
//! and its counters.
//!
//! Start at [`build`], which takes over what survives a reload, and at
//! [`Upstream::try_admit`], which every request goes through.
//!
//! **Invariant:** its identity is its name, not its address: two upstreams on
//! one host and port never share a connection, and neither do one upstream's
//! old and new TLS settings ([`HttpPeer::group_key`] differs; Pingora's own
//! reuse hash knows nothing of the authorities).

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{
            AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue};
use pingora::{
    protocols::{TcpKeepalive, l4::socket::SocketAddr as PeerAddr},
    upstreams::peer::{ALPN, HttpPeer, HttpUpstreamRequestPolicy},
};
use smallvec::SmallVec;

use super::{
    breaker::{Fault, Says, Spare},
    budget::Pass,
    check::Checked,
    context_sizes::ContextSizes,
    discovery::Discovery,
    health::{Health, KeyFault, Leave},
    policy::Policy,
    resolve::{Addresses, Unresolved},
    state::{State, Status},
    tls::Authorities,
    tls_fault::TlsFault,
    url::BaseUrl,
    waiting::{Lease, Waiting},
};
use crate::{
    config::{self, Kind, ResolvedTimeouts, Secret, SecretRef},
    context::Pattern,
    openai::Endpoint,
};

/// The values of the secrets that the configuration names.
pub type Secrets = HashMap<SecretRef, Secret>;

/// One model server, or one account of a cloud.
pub struct Upstream {
    /// Its identity, unique in the configuration.
    pub name: Arc<str>,
    /// What the YAML says of it.
    pub config: config::Upstream,
    /// Where it is.
    pub base: BaseUrl,
    /// How long each step may take.
    pub timeouts: ResolvedTimeouts,
    /// The value of `Host`.
    pub host: HeaderValue,
    /// The value of `Authorization`, marked sensitive.
    pub authorization: Option<HeaderValue>,
    /// Further request headers; those from secrets are marked sensitive.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// What its host's name resolves to.
    pub addresses: Arc<Addresses>,
    /// When it is left alone, and how it is asked whether it is well.
    pub policy: Policy,
    /// What is known of it. Ask and report through the functions here and those
    /// of [`Slot`], which know its policy.
    pub health: Arc<Health>,
    /// Which models it says it has.
    pub discovery: Arc<Discovery>,
    /// How large a context its models have.
    pub contexts: Arc<ContextSizes>,
    /// What was found out of whether it goes on with what another began.
    learned: Arc<AtomicU8>,
    /// What smooth weighted turns owe it. Belongs to
    /// [`strategies`](super::strategies); nobody else may touch it. Here and not
    /// there so that it goes with the upstream when groups change.
    pub(super) credit: AtomicI64,
    models: Vec<Pattern>,
    authorities: Option<Authorities>,
    load: Arc<Load>,
    /// Everything of a peer but its address.
    peer: HttpPeer,
}

/// What is under way at one server, shared by all configurations of it.
#[derive(Debug)]
struct Load {
    in_flight: AtomicU32,
    /// The most at once, as the configuration in effect has it.
    most: AtomicU32,
    /// The lines of those who may wait for a slot: mostly that of one group, two
    /// after a reload has moved the upstream to another.
    lines: Mutex<SmallVec<[Weak<Waiting>; 1]>>,
    /// Which line is asked first when a slot becomes free.
    turn: AtomicUsize,
}

/// A request's place at an upstream; given back when dropped.
#[derive(Debug)]
pub struct Slot {
    upstream: Arc<Upstream>,
    /// The model of the request, by the name it is sent with.
    model: Arc<str>,
    /// When it was taken.
    since: Instant,
    /// The ticket of the one request that tries.
    ticket: Option<u64>,
    /// Whether the first token was noted.
    answering: AtomicBool,
    /// Whether the whole answer was noted.
    answered: AtomicBool,
    /// The leave to retry, if the request is one.
    pass: Option<Pass>,
    lease: Option<Lease>,
    /// Whether the place was given back before its holder was done.
    freed: bool,
}

/// Why an upstream does not take a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It works on as many requests as it may (`concurrent`).
    Busy,
    /// It is down, cooling, draining, off, or being tried by another request.
    Unavailable,
}

/// Whether an upstream can go on with an answer that another began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continues {
    /// It is known to, by its kind or by the YAML.
    Yes,
    /// It was found to know what it is asked for then.
    Learned,
    /// Nobody knows: it may refuse, or begin anew.
    Perhaps,
    /// It does not.
    No,
}

/// What is remembered of a server that is asked for the rest of an answer;
/// 0 is nothing.
const LEARNED_YES: u8 = 1;
const LEARNED_NO: u8 = 2;

/// What makes an upstream's configuration useless.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct UpstreamError {
    /// The key in the upstream's block, such as `url` or `headers.x-team`.
    pub key: String,
    /// What is wrong and what was expected; never holds a secret.
    pub problem: String,
}

impl UpstreamError {
    fn new(key: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self {
            key: key.into(),
            problem: problem.to_string(),
        }
    }
}

/// Builds an upstream, or returns `previous` itself when nothing about it
/// changed: not its configuration or policy, nor a secret, nor the file of
/// authorities.
///
/// When something did, what describes the *server* is taken over as far as it
/// is the same server: the requests under way and the addresses with the host
/// and port; health too, unless the URL, the credential or TLS changed, which
/// may have been the cure. That people drain it holds for the name.
///
/// `off` is for an `optional` upstream whose secret is not set: it is built
/// without its secrets, and never available.
///
/// # Errors
/// All that is wrong with it.
pub fn build(
    config: &config::Upstream,
    policy: Policy,
    secrets: &Secrets,
    off: bool,
    previous: Option<&Arc<Upstream>>,
) -> Result<Arc<Upstream>, Vec<UpstreamError>> {
    let mut errors = Vec::new();
    let base = keep(&mut errors, base_url(config));
    let headers = keep(&mut errors, headers(config, secrets, off));
    let authorization = keep(&mut errors, authorization(config, secrets, off));
    let authorities = keep(&mut errors, authorities(config));
    let (Some((base, host)), Some(headers), Some(authorization), Some(authorities)) =
        (base, headers, authorization, authorities)
    else {
        return Err(errors);
    };

    if let Some(old) = previous
        && old.config == *config
        && old.policy == policy
        && old.authorization == authorization
        && old.headers == headers
        && old.authorities == authorities
        && old.health.is_off() == off
    {
        return Ok(Arc::clone(old));
    }

    let by_name = previous;
    let same_server = |old: &&Arc<Upstream>| {
        old.config.name == config.name && (&old.base.host, old.base.port) == (&base.host, base.port)
    };
    let previous = previous.filter(same_server);
    let same_tls = |old: &Upstream| {
        old.base.scheme == base.scheme
            && old.config.tls == config.tls
            && old.authorities == authorities
    };
    let same_health = |old: &&Arc<Upstream>| {
        old.base == base
            && old.authorization == authorization
            && old.headers == headers
            && old.health.is_off() == off
            && same_tls(old)
    };
    let now = Instant::now();
    let discovery = previous
        .filter(same_health)
        .map_or_else(Arc::default, |old| Arc::clone(&old.discovery));
    let contexts = previous.map_or_else(Arc::default, |old| Arc::clone(&old.contexts));
    let health = match previous.filter(same_health) {
        Some(old) => Arc::clone(&old.health),
        None => Arc::new(match (by_name, off) {
            (Some(old), _) => Health::after(&old.health, off, now),
            (None, true) => Health::off(now),
            (None, false) => Health::new(now),
        }),
    };
    let group_key = previous
        .filter(|old| same_tls(old))
        .map_or_else(next_group_key, |old| old.peer.group_key);
    let timeouts = config.resolved_timeouts();
    if base.is_tls() && !config.tls.verify {
        log::warn!(
            "upstream's certificate is not checked: name={}",
            config.name
        );
    }
    Ok(Arc::new(Upstream {
        name: config.name.as_str().into(),
        peer: template(config, &base, timeouts, authorities.as_ref(), group_key),
        timeouts,
        host,
        authorization,
        headers,
        addresses: previous.map_or_else(
            || Arc::new(Addresses::new(&base)),
            |old| Arc::clone(&old.addresses),
        ),
        policy,
        health,
        discovery,
        contexts,
        learned: previous
            .filter(|old| old.base == base)
            .map_or_else(Arc::default, |old| Arc::clone(&old.learned)),
        credit: AtomicI64::new(0),
        models: config
            .models
            .iter()
            .map(|text| Pattern::new(text.as_str()))
            .collect(),
        authorities,
        load: previous.map_or_else(
            || Arc::new(Load::new(config.concurrent)),
            |old| Arc::clone(&old.load),
        ),
        config: config.clone(),
        base,
    }))
}

impl Upstream {
    /// Returns how many requests are under way.
    pub fn in_flight(&self) -> u32 {
        self.load.in_flight.load(Relaxed)
    }

    /// Returns its share of the traffic, relative to the others of its group, in
    /// thousandths of the configuration's weights: less while it comes back (slow
    /// start), and at least 1.
    pub fn weight(&self) -> u32 {
        self.config.weight.max(1).saturating_mul(self.health.ramp())
    }

    /// Returns whether it is coming back, and gets less than its share.
    pub fn is_ramping(&self) -> bool {
        self.health.is_ramping()
    }

    /// Returns whether a request with this model may go there now.
    pub fn available(&self, model: &str, now: Instant) -> bool {
        self.health.says(model, &self.policy, now) != Says::Stop
    }

    /// Returns whether requests with this model go there like everywhere: nobody
    /// has to try first.
    pub(super) fn is_usable(&self, model: &str, now: Instant) -> bool {
        self.health.says(model, &self.policy, now) == Says::Go
    }

    /// Lets one request with this model try at once, if it is a breaker that
    /// keeps them away.
    pub(super) fn hurry(&self, model: &str, now: Instant) {
        self.health.hurry(model, &self.policy, now);
    }

    /// Returns how long nobody should go there with this model.
    pub fn wait(&self, model: &str, now: Instant) -> Duration {
        self.health.wait(model, &self.policy, now)
    }

    /// Returns what it is good for, and why.
    pub fn status(&self, now: Instant) -> Status {
        self.health.status(&self.policy, now)
    }

    /// Returns what people are shown: as [`Self::status`], and that it loads a
    /// model behind a request that waits for it. Such an upstream is in order
    /// and takes requests, so nothing is decided by this.
    pub fn shown(&self, now: Instant) -> Status {
        let mut status = self.status(now);
        if status.state.serves() && self.contexts.is_loading() {
            status.state = State::Loading;
        }
        status
    }

    /// Returns whether it gets nothing new at all: it is off, or draining.
    pub fn is_closed(&self) -> bool {
        self.health.is_off() || self.policy.drain || self.health.is_drained()
    }

    /// Forgets what is known of it, as if it had just been added.
    pub fn reset(&self, now: Instant) {
        self.health.reset(&self.policy, now);
        self.wake();
    }

    /// Gives it nothing new from now on, or something again.
    pub fn drain(&self, drained: bool, now: Instant) {
        self.health.drain(drained, &self.policy, now);
        self.wake();
    }

    /// Notices what only time changes.
    pub(super) fn tick(&self, now: Instant) {
        self.health.tick(&self.policy, now);
    }

    /// Returns whether it is time to ask whether it is well, and takes the turn.
    pub(super) fn begin_check(&self, now: Instant) -> bool {
        self.health.begin_check(&self.policy, now)
    }

    /// Notes what it said of itself when it was asked at `began`.
    pub(super) fn checked(&self, checked: &Checked, began: Instant, now: Instant) {
        let was_good = self.health.is_good();
        self.health.checked(checked, &self.policy, began, now);
        if was_good != self.health.is_good() {
            self.wake();
        }
    }

    /// Brings its share up to date while it comes back.
    pub(super) fn climb(&self, now: Instant) {
        if self.is_ramping() {
            self.health.climb(&self.policy, now);
        }
    }

    /// Returns whether it would take one more request.
    pub fn has_free_slot(&self) -> bool {
        // In one order with the length of the line: who waits looks here after he
        // has counted himself, and must not see what was before a slot was freed.
        self.load.in_flight.load(SeqCst) < self.load.most.load(SeqCst)
    }

    /// Returns the secrets that are sent to it, to be kept out of what it says.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        let headers = self.headers.iter().map(|(_, value)| value);
        headers
            .filter(|value| value.is_sensitive())
            .chain(&self.authorization)
            .filter_map(|value| value.to_str().ok())
            .map(|value| value.strip_prefix("Bearer ").unwrap_or(value))
    }

    /// Returns whether it serves a model, by the name it is sent with.
    pub fn serves(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|pattern| pattern.matches(model))
    }

    /// Returns the patterns of what it serves; empty means any.
    pub fn models(&self) -> &[Pattern] {
        &self.models
    }

    /// Chooses the context that a model is to have for a request of so many
    /// tokens: of Ollama only, within `num_ctx`.
    pub fn context(&self, model: &str, tokens: u32, now: Instant) -> u32 {
        let most = self.config.num_ctx.unwrap_or(u32::MAX);
        let kept = match self.config.keep_alive {
            Some(keep_alive) => keep_alive.time(),
            None => Some(config::KeepAlive::DEFAULT),
        };
        self.contexts.choose(model, tokens, most, kept, now)
    }

    /// Returns whether it can go on with an answer of this endpoint that another
    /// upstream began. A completion is gone on with by any server that puts its
    /// prompt through no template.
    pub fn continues(&self, endpoint: Endpoint) -> Continues {
        match (self.config.r#continue, self.config.kind, endpoint) {
            (Some(false), _, _) => Continues::No,
            (Some(true), _, _) => Continues::Yes,
            (None, Kind::Ollama, _) => Continues::No,
            (None, _, Endpoint::Completions) => Continues::Yes,
            (None, Kind::Vllm | Kind::Llamacpp, _) => Continues::Yes,
            _ => match self.learned.load(Relaxed) {
                LEARNED_NO => Continues::No,
                LEARNED_YES => Continues::Learned,
                _ => Continues::Perhaps,
            },
        }
    }

    /// Notes that it knows what going on with an answer is.
    pub fn found_to_continue(&self) {
        self.learned.store(LEARNED_YES, Relaxed);
    }

    /// Notes that it does not go on with what another began.
    pub fn found_to_start_over(&self) {
        self.learned.store(LEARNED_NO, Relaxed);
    }

    /// Takes a slot whatever its health is; `None` at `concurrent`. For the
    /// last resort; everything else goes through [`Self::try_admit`].
    pub fn try_acquire(self: &Arc<Self>, model: &Arc<str>, now: Instant) -> Option<Slot> {
        let most = self.load.most.load(SeqCst);
        self.load
            .in_flight
            .fetch_update(SeqCst, SeqCst, |now| (now < most).then_some(now + 1))
            .is_ok()
            .then(|| Slot {
                upstream: Arc::clone(self),
                model: Arc::clone(model),
                since: now,
                ticket: None,
                answering: AtomicBool::new(false),
                answered: AtomicBool::new(false),
                pass: None,
                lease: None,
                freed: false,
            })
    }

    /// Takes a slot if it is available for this model. On an upstream that was
    /// down, the slot makes its holder the one request that tries.
    ///
    /// # Errors
    /// Why it takes no request now.
    pub fn try_admit(self: &Arc<Self>, model: &Arc<str>, now: Instant) -> Result<Slot, Refusal> {
        if !self.available(model, now) {
            return Err(Refusal::Unavailable);
        }
        let slot = self.try_acquire(model, now).ok_or(Refusal::Busy)?;
        let leave = self.health.admit(model, &self.policy, now);
        slot.with(leave)
    }

    /// Takes a slot when there is nobody else at all: also of an upstream that
    /// is down, if finding out that it still is costs next to nothing, or nobody
    /// else is finding out.
    ///
    /// # Errors
    /// Why it takes no request now.
    pub fn try_in_panic(self: &Arc<Self>, model: &Arc<str>, now: Instant) -> Result<Slot, Refusal> {
        let slot = self.try_acquire(model, now).ok_or(Refusal::Busy)?;
        let leave = self.health.admit_in_panic(model, &self.policy, now);
        slot.with(leave)
    }

    /// Lets `concurrent` take effect, also for requests that began with another
    /// configuration. Called when its configuration goes live.
    pub fn go_live(&self) {
        let most = self.config.concurrent.unwrap_or(u32::MAX);
        self.load.most.store(most, SeqCst);
        self.wake();
    }

    /// Has those who wait for it look: it may be free, or usable again.
    pub fn wake(&self) {
        self.load.wake();
    }

    /// Returns whether this is the same server, perhaps configured otherwise.
    pub(super) fn is_same_server(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.load, &other.load)
    }

    /// Has a line told of every slot that is given back.
    pub(super) fn tell(&self, line: &Arc<Waiting>) {
        let mut lines = self
            .load
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        lines.retain(|line| line.strong_count() > 0);
        if !lines
            .iter()
            .any(|known| known.as_ptr() == Arc::as_ptr(line))
        {
            lines.push(Arc::downgrade(line));
        }
    }

    /// Returns the peer to connect to, every timeout set; several addresses are
    /// taken in turn.
    ///
    /// `read_timeout` and `write_timeout` are for whoever has Pingora's own
    /// session send the request; the exchange keeps its deadlines itself.
    ///
    /// # Errors
    /// When the host's name has no address: see [`Addresses::resolve_now`].
    pub fn peer(&self) -> Result<HttpPeer, Unresolved> {
        let address = self.addresses.next(Instant::now()).ok_or(Unresolved)?;
        Ok(self.peer_at(PeerAddr::Inet(address)))
    }

    /// Returns the peer at an address of its host.
    pub(super) fn peer_at(&self, address: PeerAddr) -> HttpPeer {
        let mut peer = self.peer.clone();
        peer._address = address;
        peer
    }

    /// Notes that its name could not be resolved, which took from `began`.
    pub fn unresolved(&self, began: Instant, now: Instant) {
        let took = now.saturating_duration_since(began);
        self.health.not_sent(took, None, &self.policy, now);
    }

    /// Notes that a request could not be sent to a peer, which took from
    /// `began`; `fault` if it was for TLS. Returns whether the upstream has
    /// another address to try at once, with a new [`Self::peer`]; if not, it is
    /// down.
    pub fn not_sent(
        &self,
        peer: &HttpPeer,
        fault: Option<TlsFault>,
        began: Instant,
        now: Instant,
    ) -> bool {
        let another = match peer._address {
            PeerAddr::Inet(at) => self.addresses.refused(at, now),
            PeerAddr::Unix(_) => false,
        };
        if !another {
            let took = now.saturating_duration_since(began);
            self.health.not_sent(took, fault, &self.policy, now);
        }
        another
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("name", &self.name)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl Slot {
    /// Returns the upstream it is a place at.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Returns the model of the request, by the name it is sent with.
    pub fn model(&self) -> &Arc<str> {
        &self.model
    }

    /// Returns whether its holder tries an upstream that was down.
    pub fn is_probe(&self) -> bool {
        self.ticket.is_some()
    }

    /// Makes the request a retry, which it stays until its first token.
    pub fn carry(&mut self, pass: Pass) {
        pass.spend();
        self.pass = Some(pass);
    }

    /// Notes that the upstream answers, whatever it says.
    pub fn reached(&self, now: Instant) {
        let Upstream { health, policy, .. } = &*self.upstream;
        health.reached(policy, self.since, now);
    }

    /// Notes that it accepted our credential, whatever it says.
    pub fn accepted(&self, now: Instant) {
        let Upstream { health, policy, .. } = &*self.upstream;
        health.accepted(policy, self.since, now);
    }

    /// Notes the first token of a stream; more may come.
    pub fn token(&self, now: Instant) {
        if let Some(pass) = &self.pass {
            pass.settle();
        }
        if !self.answering.swap(true, SeqCst) {
            let Upstream { health, policy, .. } = &*self.upstream;
            health.token(&self.model, policy, self.since, now);
        }
    }

    /// Notes that the answer is whole, and good; the first call counts.
    pub fn succeeded(&self, now: Instant) {
        if !self.answered.swap(true, SeqCst) {
            let Upstream { health, policy, .. } = &*self.upstream;
            health.succeeded(&self.model, policy, self.since, now);
        }
    }

    /// Notes a failure of the server. Returns whether its breaker should have
    /// opened but the group cannot spare it. Called by [`Group`](super::Group).
    pub(super) fn failed(&self, how: (Fault, Spare), now: Instant) -> bool {
        let Upstream { health, policy, .. } = &*self.upstream;
        health.failed(&self.model, policy, how, self.since, now)
    }

    /// Notes that it could not be sent, for the breaker; what this means for the
    /// whole upstream was told to [`Upstream::not_sent`]. Returns what
    /// [`Self::failed`] does.
    pub(super) fn unsent(&self, spare: Spare, now: Instant) -> bool {
        let Upstream { health, policy, .. } = &*self.upstream;
        health.unsent(&self.model, policy, spare, self.since, now)
    }

    /// Notes that it was turned away (503, 529).
    /// Returns what [`Self::failed`] does.
    pub(super) fn turned_away(&self, spare: Spare, now: Instant) -> bool {
        self.reached(now);
        let Upstream { health, policy, .. } = &*self.upstream;
        health.turned_away(&self.model, policy, spare, self.since, now)
    }

    /// Notes that the upstream asked for a pause because it is overloaded.
    /// Returns whether it was not pausing already.
    pub fn cool(&self, pause: Duration, now: Instant) -> bool {
        self.accepted(now);
        self.upstream.health.cool(pause, &self.upstream.policy, now)
    }

    /// Notes that its rate limit is reached; `None` if it did not say how long.
    pub fn limit(&self, pause: Option<Duration>, now: Instant) {
        self.accepted(now);
        self.upstream
            .health
            .limit(pause, &self.upstream.policy, now);
    }

    /// Notes that its model is being loaded.
    pub fn loading(&self, now: Instant) {
        self.upstream.health.loading(&self.upstream.policy, now);
    }

    /// Notes that our credential is no good there. Returns whether it is taken
    /// for bad from now on.
    pub fn key_fault(&self, fault: KeyFault, now: Instant) -> bool {
        let Upstream { health, policy, .. } = &*self.upstream;
        health.key_fault(fault, policy, now)
    }

    fn with(mut self, leave: Option<Leave>) -> Result<Self, Refusal> {
        match leave {
            Some(Leave::Free) => {}
            Some(Leave::Try(ticket)) => self.ticket = Some(ticket),
            None => return Err(Refusal::Unavailable),
        }
        Ok(self)
    }

    /// Gives the place to whoever waits for it although its holder is not done:
    /// the upstream is, and the rest is for the client to read. The first call
    /// counts.
    pub fn free(&mut self) {
        if std::mem::replace(&mut self.freed, true) {
            return;
        }
        self.upstream.load.in_flight.fetch_sub(1, SeqCst);
        drop(self.lease.take());
        // Last: whoever waits finds everything given back.
        self.upstream.load.wake();
    }

    /// Returns whether it has a batch request's lease.
    pub fn is_leased(&self) -> bool {
        self.lease.is_some()
    }

    /// Keeps a batch request's lease as long as the slot is held.
    pub(super) fn hold(&mut self, lease: Lease) {
        self.lease = Some(lease);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Upstream { health, policy, .. } = &*self.upstream;
        if *self.answering.get_mut() {
            health.token_over(&self.model);
        }
        if let Some(ticket) = self.ticket {
            health.end_try(ticket, policy, Instant::now());
        }
        self.free();
    }
}

impl Load {
    fn new(concurrent: Option<u32>) -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            most: AtomicU32::new(concurrent.unwrap_or(u32::MAX)),
            lines: Mutex::new(SmallVec::new()),
            turn: AtomicUsize::new(0),
        }
    }

    /// Tells the lines, in turns, that somebody's turn may have come.
    fn wake(&self) {
        let mut lines: SmallVec<[Arc<Waiting>; 2]> = {
            let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines.iter().filter_map(Weak::upgrade).collect()
        };
        if lines.len() > 1 {
            let first = self.turn.fetch_add(1, Relaxed) % lines.len();
            lines.rotate_left(first);
        }
        for line in lines {
            line.freed();
        }
    }
}

/// Moves what went wrong to the others and returns what went well.
fn keep<T>(errors: &mut Vec<UpstreamError>, result: Result<T, UpstreamError>) -> Option<T> {
    result.map_err(|error| errors.push(error)).ok()
}

fn base_url(config: &config::Upstream) -> Result<(BaseUrl, HeaderValue), UpstreamError> {
    let mut base: BaseUrl = config
        .url
        .parse()
        .map_err(|why| UpstreamError::new("url", why))?;
    if config.dialect == config::Dialect::Ollama {
        base = base.above_v1();
    }
    let host =
        HeaderValue::try_from(base.authority()).map_err(|why| UpstreamError::new("url", why))?;
    Ok((base, host))
}

fn authorization(
    config: &config::Upstream,
    secrets: &Secrets,
    off: bool,
) -> Result<Option<HeaderValue>, UpstreamError> {
    let Some(key) = config.key.as_ref().filter(|_| !off) else {
        return Ok(None);
    };
    let secret = look_up(secrets, key, "key")?;
    sensitive(&format!("Bearer {}", secret.expose()), "key").map(Some)
}

fn headers(
    config: &config::Upstream,
    secrets: &Secrets,
    off: bool,
) -> Result<Vec<(HeaderName, HeaderValue)>, UpstreamError> {
    let mut headers = Vec::with_capacity(config.headers.len());
    for (name, text) in &config.headers {
        let key = format!("headers.{name}");
        let header: HeaderName = name
            .parse()
            .map_err(|why| UpstreamError::new(key.as_str(), why))?;
        let value = match text.parse::<SecretRef>() {
            Ok(_) if off => continue,
            Ok(reference) => sensitive(look_up(secrets, &reference, &key)?.expose(), &key)?,
            Err(_) => {
                HeaderValue::from_str(text).map_err(|why| UpstreamError::new(key.as_str(), why))?
            }
        };
        headers.push((header, value));
    }
    Ok(headers)
}

fn look_up<'a>(
    secrets: &'a Secrets,
    reference: &SecretRef,
    key: &str,
) -> Result<&'a Secret, UpstreamError> {
    secrets
        .get(reference)
        .ok_or_else(|| UpstreamError::new(key, format!("{reference} was not read")))
}

fn sensitive(text: &str, key: &str) -> Result<HeaderValue, UpstreamError> {
    let mut value = HeaderValue::from_str(text).map_err(|why| UpstreamError::new(key, why))?;
    value.set_sensitive(true);
    Ok(value)
}

fn authorities(config: &config::Upstream) -> Result<Option<Authorities>, UpstreamError> {
    let Some(path) = &config.tls.ca else {
        return Ok(None);
    };
    Authorities::read(path)
        .map(Some)
        .map_err(|why| UpstreamError::new("tls.ca", why))
}

/// Returns a key that no upstream of this process had before.
fn next_group_key() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Relaxed) + 1
}

/// How much the system receives of an answer that is not read: enough for
/// 10 MB/s over 10 ms.
const RECEIVE_BUFFER: usize = 128 * 1024;

fn template(
    config: &config::Upstream,
    base: &BaseUrl,
    timeouts: ResolvedTimeouts,
    authorities: Option<&Authorities>,
    group_key: u64,
) -> HttpPeer {
    // Port 0 of nowhere: replaced in every copy. A name here would be looked up
    // on the spot, and would panic if it has no address.
    let nowhere = (std::net::Ipv4Addr::UNSPECIFIED, 0);
    let mut peer = HttpPeer::new(nowhere, base.is_tls(), base.tls_name().to_owned());
    peer.group_key = group_key;
    let options = &mut peer.options;
    options.connection_timeout = Some(timeouts.connect);
    options.total_connection_timeout = Some(timeouts.connect);
    options.read_timeout = Some(timeouts.first_token.max(timeouts.inter_token));
    options.write_timeout = Some(timeouts.write);
    options.idle_timeout = Some(timeouts.idle);
    // HTTP/1.1 for all: one stream a connection has no head-of-line blocking,
    // and an abort is a close that every server notices.
    options.alpn = ALPN::H1;
    options.verify_cert = config.tls.verify;
    options.verify_hostname = config.tls.verify;
    options.ca = if config.tls.verify {
        authorities.map(|authorities| Arc::clone(&authorities.list))
    } else {
        base.is_tls().then(|| Authorities::unchecked().list)
    };
    // A server that vanished while it thinks is noticed after a minute, long
    // before its first-token deadline.
    options.tcp_keepalive = Some(TcpKeepalive {
        idle: Duration::from_secs(30),
        interval: Duration::from_secs(10),
        count: 3,
        #[cfg(target_os = "linux")]
        user_timeout: Duration::ZERO,
    });
    // What the system reads ahead of a client that is slow; it takes twice this,
    // where it would take megabytes by itself.
    options.tcp_recv_buf = Some(RECEIVE_BUFFER);
    options.http_upstream_request_policy = HttpUpstreamRequestPolicy::deny_upgrades();
    peer
}

#[cfg(test)]
pub(super) mod tests {
    use pingora::{connectors::TransportConnector, upstreams::peer::Peer};
    use tokio::net::TcpListener;

    use super::*;
    use crate::upstreams::connector_options;

    fn config(yaml: &str) -> config::Upstream {
        serde_yaml::from_str(yaml).unwrap()
    }

    fn build(
        config: &config::Upstream,
        secrets: &Secrets,
        off: bool,
        previous: Option<&Arc<Upstream>>,
    ) -> Result<Arc<Upstream>, Vec<UpstreamError>> {
        let policy = Policy::of(&config::Group::default(), config);
        super::build(config, policy, secrets, off, previous)
    }

    /// Builds an upstream without secrets, in a group without settings.
    pub(crate) fn built(yaml: &str) -> Arc<Upstream> {
        build(&config(yaml), &Secrets::new(), false, None).unwrap()
    }

    /// Takes a slot whatever its health is.
    pub(crate) fn acquire(upstream: &Arc<Upstream>) -> Option<Slot> {
        upstream.try_acquire(&"m".into(), Instant::now())
    }

    /// Takes it down as a connect does that was refused.
    pub(crate) fn refuse(upstream: &Upstream, now: Instant) {
        upstream.unresolved(now, now);
    }

    fn admit(upstream: &Arc<Upstream>, now: Instant) -> Result<Slot, Refusal> {
        upstream.try_admit(&"m".into(), now)
    }

    /// Builds the next configuration's upstream.
    fn rebuilt(yaml: &str, old: &Arc<Upstream>) -> Arc<Upstream> {
        build(&config(yaml), &Secrets::new(), false, Some(old)).unwrap()
    }

    fn secrets(pairs: &[(&str, &str)]) -> Secrets {
        pairs
            .iter()
            .map(|(reference, value)| (reference.parse().unwrap(), Secret::new(*value)))
            .collect()
    }

    #[test]
    fn every_timeout_of_a_peer_is_set() {
        for kind in ["vllm", "llamacpp", "ollama", "openai", "generic"] {
            let upstream = built(&format!(
                "{{ name: a, kind: {kind}, url: 'http://10.0.0.1' }}"
            ));
            let options = upstream.peer().unwrap().options;
            for timeout in [
                options.connection_timeout,
                options.total_connection_timeout,
                options.read_timeout,
                options.write_timeout,
                options.idle_timeout,
            ] {
                assert!(timeout.is_some_and(|timeout| !timeout.is_zero()), "{kind}");
            }
            assert!(options.tcp_keepalive.is_some());
        }
    }

    #[test]
    fn timeouts_of_the_yaml_reach_the_peer() {
        let upstream = built(
            "{ name: a, url: 'http://10.0.0.1', timeouts: { connect: 1s, first_token: 2s, inter_token: 3s, write: 4s, idle: 5s } }",
        );
        let options = upstream.peer().unwrap().options;
        let secs = |secs| Some(Duration::from_secs(secs));
        assert_eq!(options.connection_timeout, secs(1));
        assert_eq!(options.total_connection_timeout, secs(1));
        assert_eq!(options.read_timeout, secs(3));
        assert_eq!(options.write_timeout, secs(4));
        assert_eq!(options.idle_timeout, secs(5));
    }

    #[test]
    fn host_and_sni_are_right_for_names_and_addresses() {
        for (url, host, sni) in [
            (
                "https://api.example:8443/v1",
                "api.example:8443",
                "api.example",
            ),
            ("https://api.example/v1", "api.example", "api.example"),
            ("https://10.0.0.1/v1", "10.0.0.1", "10.0.0.1"),
            ("https://[::1]:8443/v1", "[::1]:8443", "::1"),
        ] {
            let upstream = built(&format!("{{ name: a, url: '{url}' }}"));
            assert_eq!(upstream.host, host);
            assert_eq!(upstream.peer.sni, sni);
            assert!(upstream.peer.is_tls());
            assert!(upstream.peer.options.verify_cert && upstream.peer.options.verify_hostname);
        }
    }

    #[test]
    fn a_name_that_is_not_resolved_has_no_peer() {
        let upstream = built("{ name: a, url: 'http://gpu-1:8000' }");
        assert_eq!(upstream.peer().unwrap_err(), Unresolved);
    }

    #[tokio::test]
    async fn two_upstreams_on_one_port_never_share_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (a, b) = (
            built(&format!("{{ name: a, url: 'http://{at}/accounts/1' }}")),
            built(&format!("{{ name: b, url: 'http://{at}/accounts/2' }}")),
        );
        let connector = TransportConnector::new(Some(connector_options(8)));
        let peer = a.peer().unwrap();
        let (stream, _) = connector.get_stream(&peer).await.unwrap();
        connector.release_stream(stream, peer.reuse_hash(), peer.idle_timeout());
        let (_stream, reused) = connector.get_stream(&b.peer().unwrap()).await.unwrap();
        assert!(!reused);
        let (_stream, reused) = connector.get_stream(&a.peer().unwrap()).await.unwrap();
        assert!(reused);
    }

    #[test]
    fn other_tls_settings_mean_other_connections_and_other_weights_do_not() {
        let old = built("{ name: a, url: 'https://10.0.0.1' }");
        let hash = |upstream: &Upstream| upstream.peer().unwrap().reuse_hash();
        let heavier = rebuilt("{ name: a, url: 'https://10.0.0.1', weight: 2 }", &old);
        assert_eq!(hash(&old), hash(&heavier));
        let unchecked = rebuilt(
            "{ name: a, url: 'https://10.0.0.1', tls: { verify: false } }",
            &old,
        );
        assert_ne!(hash(&old), hash(&unchecked));
        let checked = rebuilt("{ name: a, url: 'https://10.0.0.1' }", &unchecked);
        assert_ne!(hash(&unchecked), hash(&checked));
    }

    #[test]
    fn secrets_are_resolved_and_never_printed() {
        let config = config(
            "{ name: a, url: 'http://10.0.0.1', key: 'env:KEY', headers: { x-team: 'file:team', x-plain: blue } }",
        );
        let secrets = secrets(&[("env:KEY", "sk-1"), ("file:team", "red")]);
        let upstream = build(&config, &secrets, false, None).unwrap();
        let key = upstream.authorization.as_ref().unwrap();
        assert_eq!(key, "Bearer sk-1");
        assert_eq!(upstream.headers[0].1, "red");
        assert_eq!(upstream.headers[1].1, "blue");
        let printed = format!("{:?} {key:?} {:?}", upstream, upstream.headers);
        assert!(
            !printed.contains("sk-1") && !printed.contains("red"),
            "{printed}"
        );
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let config = config(
            "{ name: a, url: 'ftp://host', key: 'env:KEY', headers: { 'x y': z }, tls: { ca: /nowhere/ca.pem } }",
        );
        let errors = build(&config, &Secrets::new(), false, None).unwrap_err();
        let keys: Vec<_> = errors.iter().map(|error| error.key.as_str()).collect();
        assert_eq!(keys, ["url", "headers.x y", "key", "tls.ca"]);
    }

    #[test]
    fn one_that_is_off_needs_no_secrets_and_takes_nothing() {
        let config = config(
            "{ name: a, url: 'http://10.0.0.1', key: 'env:KEY', optional: true, headers: { x-team: 'env:T' } }",
        );
        let upstream = build(&config, &Secrets::new(), true, None).unwrap();
        let now = Instant::now();
        assert_eq!(upstream.status(now).state, State::Off);
        assert_eq!(admit(&upstream, now).unwrap_err(), Refusal::Unavailable);
        // The key appears: the next configuration switches it on.
        let secrets = secrets(&[("env:KEY", "sk-1"), ("env:T", "red")]);
        let on = build(&config, &secrets, false, Some(&upstream)).unwrap();
        assert!(admit(&on, now).is_ok());
    }

    #[test]
    fn an_unchanged_upstream_is_the_very_same_and_a_changed_secret_is_a_change() {
        let config = config("{ name: a, url: 'http://10.0.0.1', key: 'env:KEY' }");
        let first = secrets(&[("env:KEY", "sk-1")]);
        let old = build(&config, &first, false, None).unwrap();
        let same = build(&config, &first, false, Some(&old)).unwrap();
        assert!(Arc::ptr_eq(&old, &same));
        let rotated = secrets(&[("env:KEY", "sk-2")]);
        let new = build(&config, &rotated, false, Some(&old)).unwrap();
        assert_eq!(new.authorization.as_ref().unwrap(), "Bearer sk-2");
    }

    #[test]
    fn a_changed_weight_keeps_what_is_under_way_and_a_changed_host_does_not() {
        let old = built("{ name: a, url: 'http://10.0.0.1', concurrent: 1 }");
        let slot = acquire(&old).unwrap();
        refuse(&old, Instant::now());
        let heavier = rebuilt(
            "{ name: a, url: 'http://10.0.0.1', concurrent: 1, weight: 9, cooldown: 1m }",
            &old,
        );
        assert_eq!(heavier.in_flight(), 1);
        assert!(acquire(&heavier).is_none());
        assert_eq!(heavier.status(Instant::now()).state, State::Down);
        drop(slot);
        assert!(acquire(&heavier).is_some());
        let moved = rebuilt("{ name: a, url: 'http://10.0.0.2', concurrent: 1 }", &old);
        assert_eq!(moved.status(Instant::now()).state, State::Ready);
        assert_eq!(moved.addresses.all(), ["10.0.0.2:80".parse().unwrap()]);
    }

    #[test]
    fn who_people_drain_is_drained_wherever_a_reload_moves_it_and_what_was_told_is_taken_back() {
        let events = Arc::new(crate::events::Events::new(Arc::default()));
        let mut heard = events.subscribe();
        let old = built("{ name: a, url: 'http://10.0.0.1' }");
        let now = Instant::now();
        old.health.tell(&old.name, &events);
        refuse(&old, now);
        let moved = rebuilt("{ name: a, url: 'http://10.0.0.2' }", &old);
        moved.health.tell(&moved.name, &events);
        moved.tick(now);
        let states = std::iter::from_fn(|| heard.try_recv().ok()).map(|event| match event.change {
            crate::events::Change::State { from, to, .. } => format!("{from} {to}"),
            other => panic!("{other:?}"),
        });
        assert_eq!(states.collect::<Vec<_>>(), ["ready down", "down ready"]);
        moved.drain(true, now);
        let moved = rebuilt("{ name: a, url: 'http://10.0.0.3' }", &moved);
        assert_eq!(moved.status(now).state, State::Draining);
        assert_eq!(admit(&moved, now).unwrap_err(), Refusal::Unavailable);
    }

    #[test]
    fn a_probe_that_ends_without_a_word_lets_the_next_one_try() {
        let upstream = built("{ name: a, url: 'http://10.0.0.1', check: { enabled: false } }");
        let start = Instant::now();
        refuse(&upstream, start);
        let now = start + Duration::from_secs(2);
        let slot = admit(&upstream, now).unwrap();
        assert!(slot.is_probe());
        assert_eq!(admit(&upstream, now).unwrap_err(), Refusal::Unavailable);
        assert_eq!(upstream.in_flight(), 1);
        drop(slot);
        assert!(admit(&upstream, now).is_ok());
    }

    #[test]
    fn a_refused_connection_takes_a_single_address_down() {
        let upstream = built("{ name: a, url: 'http://10.0.0.1' }");
        let now = Instant::now();
        assert!(!upstream.not_sent(&upstream.peer().unwrap(), None, now, now));
        assert_eq!(upstream.status(now).state, State::Down);
    }

    #[test]
    fn every_slot_of_many_threads_is_counted_and_given_back() {
        let upstream = built("{ name: a, url: 'http://10.0.0.1', concurrent: 3 }");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let slot = acquire(&upstream);
                        assert!(upstream.in_flight() <= 3);
                        drop(slot);
                    }
                });
            }
        });
        assert_eq!(upstream.in_flight(), 0);
    }
}
