//! What is known of one upstream: whether it may be used now, and for what.
//!
//! Nothing here asks the upstream anything. The exchange reports what came of
//! its requests, the [`check`](super::check) what came of its probes, people
//! what they want; `Health::says` tells whether a request may go.
//!
//! | what keeps requests away | set by | ended by |
//! |---|---|---|
//! | link: it cannot be reached, or not over TLS | one connect that failed | good checks; without checks, one request at a time after 1 s, 2 s, … 30 s |
//! | checks: it says that it is not well | `fall` bad checks | `rise` good ones |
//! | credential: bad, or out of money | 401, 403, 402, a hard quota | one request at a time after minutes |
//! | loading: its model is not there yet | a check or an answer that says so | a check |
//! | cooling: it asked for a pause | 429; 503 with `Retry-After` | time |
//! | a breaker: it fails, with one model | failures | one request at a time after its open time; never a check, which at most ends that time |
//! | draining | people | people |
//!
//! **Invariants:** where nothing keeps requests away, asking takes no lock. The
//! lock is held for some additions, never across an await; `now` is passed in.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{
    breaker::{Came, Fault, Says, Spare},
    breakers::Breakers,
    check::{Checked, Schedule},
    gate::{Gate, Pauses},
    policy::Policy,
    state::{Reason, State, Status},
    tls_fault::TlsFault,
};
use crate::events::{Change, Events};

/// The longest pause that an upstream may ask for.
pub const COOL_MAX: Duration = Duration::from_secs(30 * 60);
/// The pause after a 429 that names none; it doubles with each that follows.
pub const COOL_FIRST: Duration = Duration::from_secs(30);

/// After a connect that failed.
const LINK: Pauses = Pauses {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(30),
};
/// After checks that failed, until one request tries when there is nobody else.
const CHECKS: Pauses = Pauses {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(1),
};
/// After 401: only people mend a key, or a new one.
const KEY_REFUSED: Pauses = Pauses {
    first: Duration::from_secs(5 * 60),
    longest: Duration::from_secs(30 * 60),
};
/// After 403, which some servers also say to one request alone.
const KEY_FORBIDDEN: Pauses = Pauses {
    first: Duration::from_secs(30),
    longest: Duration::from_secs(30 * 60),
};
/// How long a credential that was accepted is thought to be good.
const KEY_WORKED: Duration = Duration::from_secs(60);
/// After 402 and hard quotas.
const QUOTA: Pauses = Pauses {
    first: Duration::from_secs(5 * 60),
    longest: Duration::from_secs(5 * 60),
};
/// How long a model counts as loading when no check says how it goes on.
const LOADING: Duration = Duration::from_secs(5);
/// Where the share of an upstream begins that comes back, in thousandths.
const RAMP_FIRST: u32 = 100;
/// All of it.
pub(super) const RAMP_FULL: u32 = 1000;
/// A connect that failed this quickly was refused: asking again costs nothing.
const QUICK: Duration = Duration::from_millis(250);

/// Why a credential is no good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyFault {
    /// 401, 407: it is not accepted.
    Refused,
    /// A 403 that says so: it may not do this.
    Forbidden,
    /// A 403 without a reason: it may not do this, or nobody may ask this.
    Unexplained,
    /// 402, hard quota: there is no money behind it.
    Quota,
}

/// Leave to go to an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// Like everybody.
    Free,
    /// As the one request that tries; give the ticket back.
    Try(u64),
}

/// What keeps requests from one upstream.
#[derive(Debug)]
pub struct Health {
    off: bool,
    /// Whether anything keeps any request away; if not, nobody looks further.
    troubled: AtomicBool,
    /// Thousandths of its share; below 1000 while it comes back.
    ramp: AtomicU32,
    inner: Mutex<Inner>,
    told: OnceLock<Told>,
    fallen: watch::Sender<Option<Instant>>,
}

/// Whom to tell of changes.
#[derive(Debug)]
struct Told {
    name: Arc<str>,
    events: Arc<Events>,
}

#[derive(Debug)]
struct Inner {
    link: Gate,
    /// Whether the connect that failed took long.
    link_slow: bool,
    /// When a connect last failed of an upstream that was not known to be
    /// unreachable.
    link_lost: Option<Instant>,
    /// What was wrong with TLS when it was last not reached.
    tls: Option<TlsFault>,
    checks: Gate,
    /// When the last good check was asked for before its checks took it down.
    well: Option<Instant>,
    key: Gate,
    key_fault: KeyFault,
    /// When a 403 without a reason last came.
    forbidden: Option<Instant>,
    loading_until: Option<Instant>,
    cool: Cool,
    breakers: Breakers,
    drained: bool,
    ramp_from: Option<Instant>,
    /// When a whole answer or a first token last came.
    last_good: Option<Instant>,
    schedule: Schedule,
    /// When people said to forget what is known, if that is not checked yet.
    doubted: Option<Instant>,
    tickets: u64,
    status: Status,
}

/// A pause that the upstream asked for.
#[derive(Debug, Default)]
struct Cool {
    until: Option<Instant>,
    /// When the last one that named no time began.
    since: Option<Instant>,
    limited: bool,
    /// How many in a row named no time.
    times: u32,
}

impl Health {
    /// Makes the state of an upstream of which nothing is known, which counts
    /// as ready.
    pub fn new(now: Instant) -> Self {
        Self::make(false, now)
    }

    /// Makes the state of an upstream that the configuration switched off.
    pub fn off(now: Instant) -> Self {
        Self::make(true, now)
    }

    /// Makes the state of an upstream that has the place of another: nothing is
    /// known of it but that people drain it, and what was last told of it.
    pub(super) fn after(old: &Self, off: bool, now: Instant) -> Self {
        let new = Self::make(off, now);
        {
            let (old, mut inner) = (old.lock(), new.lock());
            inner.drained = old.drained;
            inner.status = old.status;
            inner.breakers.follow(&old.breakers);
            new.troubled.store(off || inner.drained, SeqCst);
        }
        new
    }

    fn make(off: bool, now: Instant) -> Self {
        let state = if off { State::Off } else { State::Ready };
        Self {
            off,
            troubled: AtomicBool::new(off),
            ramp: AtomicU32::new(RAMP_FULL),
            inner: Mutex::new(Inner {
                link: Gate::default(),
                link_slow: false,
                link_lost: None,
                tls: None,
                checks: Gate::default(),
                well: None,
                key: Gate::default(),
                key_fault: KeyFault::Refused,
                forbidden: None,
                loading_until: None,
                cool: Cool::default(),
                breakers: Breakers::default(),
                drained: false,
                ramp_from: None,
                last_good: None,
                schedule: Schedule::new(now),
                doubted: None,
                tickets: 0,
                status: Status {
                    state,
                    reason: Reason::None,
                    wait: None,
                },
            }),
            told: OnceLock::new(),
            fallen: watch::Sender::new(None),
        }
    }

    /// Names whom to tell of changes from now on; the first call counts.
    pub fn tell(&self, name: &Arc<str>, events: &Arc<Events>) {
        self.told.get_or_init(|| Told {
            name: Arc::clone(name),
            events: Arc::clone(events),
        });
    }

    /// Returns whether the configuration switched it off.
    pub fn is_off(&self) -> bool {
        self.off
    }

    // --- questions ---

    /// Returns whether nothing keeps any request away.
    pub(super) fn is_good(&self) -> bool {
        !self.troubled.load(SeqCst)
    }

    /// Returns whether a request with this model may go there now.
    pub(super) fn says(&self, model: &str, policy: &Policy, now: Instant) -> Says {
        if !self.troubled.load(SeqCst) && !policy.drain {
            return Says::Go;
        }
        if self.off || policy.drain {
            return Says::Stop;
        }
        self.lock().says(model, policy, now)
    }

    /// Returns how long nobody should go there with this model; an estimate
    /// where it is a check that will tell.
    pub fn wait(&self, model: &str, policy: &Policy, now: Instant) -> Duration {
        if !self.troubled.load(SeqCst) {
            return Duration::ZERO;
        }
        self.lock().wait(model, policy, now)
    }

    /// Watches whether its checks have taken it down: since when it has answered
    /// none of the last `fall` as it should, or `None`. For those who wait for
    /// an answer of it, who are told after each further check.
    pub fn fallen(&self) -> watch::Receiver<Option<Instant>> {
        self.fallen.subscribe()
    }

    /// Returns what the upstream is good for, and why.
    pub fn status(&self, policy: &Policy, now: Instant) -> Status {
        if self.off {
            return Status {
                state: State::Off,
                reason: Reason::None,
                wait: None,
            };
        }
        self.lock().look(policy, now)
    }

    /// Returns what is wrong with TLS, if that is why it is down.
    pub fn tls_fault(&self, policy: &Policy, now: Instant) -> Option<TlsFault> {
        if self.off {
            return None;
        }
        let inner = self.lock();
        inner
            .tls
            .filter(|_| inner.look(policy, now).reason == Reason::Tls)
    }

    /// Returns the models whose breaker is not closed, with its phase as a word
    /// and how long nobody will try.
    pub fn breakers(&self, now: Instant) -> Vec<(Arc<str>, &'static str, Duration)> {
        let not_closed = self.lock().breakers.not_closed(now).into_iter();
        not_closed
            .map(|(model, phase, wait)| (model, phase.as_str(), wait))
            .collect()
    }

    /// Returns the thousandths of its share that it should get, 100..=1000.
    pub(super) fn ramp(&self) -> u32 {
        self.ramp.load(SeqCst)
    }

    /// Returns whether it is coming back, so that [`Self::climb`] has work.
    pub(super) fn is_ramping(&self) -> bool {
        self.ramp() < RAMP_FULL
    }

    /// Brings the share up to date of an upstream that is coming back.
    pub(super) fn climb(&self, policy: &Policy, now: Instant) {
        let mut inner = self.lock();
        let ramp = inner.climb(policy, now);
        self.ramp.store(ramp, SeqCst);
    }

    // --- leave ---

    /// Takes leave to go there now.
    pub(super) fn admit(&self, model: &Arc<str>, policy: &Policy, now: Instant) -> Option<Leave> {
        if !self.troubled.load(SeqCst) && !policy.drain {
            return Some(Leave::Free);
        }
        if self.off || policy.drain {
            return None;
        }
        let mut inner = self.lock();
        match inner.says(model, policy, now) {
            Says::Go => Some(Leave::Free),
            Says::Try => Some(inner.begin_try(model, now)),
            Says::Stop => None,
        }
    }

    /// Takes leave to go there although it should not be asked: when there is
    /// nobody else at all. One at a time, unless a refused connect is the only
    /// reason, which costs nobody anything.
    pub(super) fn admit_in_panic(
        &self,
        model: &Arc<str>,
        policy: &Policy,
        now: Instant,
    ) -> Option<Leave> {
        if self.off || policy.drain {
            return None;
        }
        let mut inner = self.lock();
        match inner.says_in_panic(model, policy, now) {
            Says::Go => Some(Leave::Free),
            Says::Try => Some(inner.begin_try(model, now)),
            Says::Stop => None,
        }
    }

    /// Lets the next request try, if this one told nothing. A ticket that is not
    /// the current one changes nothing.
    pub(super) fn end_try(&self, ticket: u64, policy: &Policy, now: Instant) {
        self.change(policy, now, |inner| {
            inner.link.end_try(ticket);
            inner.checks.end_try(ticket);
            inner.key.end_try(ticket);
            inner.breakers.end_try(ticket, now);
        });
    }

    // --- reports of requests ---

    /// Notes that a request could not be sent: DNS, connect or TLS failed, after
    /// this long; `tls` if it was that. Concerns every model.
    pub fn not_sent(&self, took: Duration, tls: Option<TlsFault>, policy: &Policy, now: Instant) {
        self.change(policy, now, |inner| {
            inner.tls = tls;
            if inner.link.shut(LINK, now) {
                inner.link_lost = Some(now);
                inner.schedule.soon(now);
            }
            inner.link_slow = took >= QUICK;
        });
    }

    /// Counts, as a failure of its model, a request that could not be sent; so
    /// one that its checks can reach, but requests cannot, is left alone for
    /// longer and longer. Of an upstream that is known to be unreachable the
    /// attempts that are made all the same count only where they are how one
    /// finds out, which is where there are no checks. Returns what
    /// [`Self::failed`] does.
    pub(super) fn unsent(
        &self,
        model: &Arc<str>,
        policy: &Policy,
        spare: Spare,
        began: Instant,
        now: Instant,
    ) -> bool {
        let lost = {
            let inner = self.lock();
            match policy.check.enabled {
                true => inner.link_lost,
                false => inner.link.since(),
            }
        };
        let is_news = lost.is_some_and(|lost| lost >= began);
        is_news && self.failed(model, policy, (Fault::Death, spare), began, now)
    }

    /// Notes that it answers a request that began at `began`, whatever it says.
    pub(super) fn reached(&self, policy: &Policy, began: Instant, now: Instant) {
        if self.troubled.load(SeqCst) {
            self.change(policy, now, |inner| {
                if inner.link.open_by(began) {
                    inner.recover(now);
                }
            });
        }
    }

    /// Notes that it accepted the credential, whatever it says.
    pub(super) fn accepted(&self, policy: &Policy, began: Instant, now: Instant) {
        if self.troubled.load(SeqCst) {
            self.change(policy, now, |inner| {
                if inner.link.open_by(began) | inner.key.open_by(began) {
                    inner.recover(now);
                }
            });
        }
    }

    /// Notes the first token of a request that began at `began`.
    pub(super) fn token(&self, model: &Arc<str>, policy: &Policy, began: Instant, now: Instant) {
        self.accepted(policy, began, now);
        let mut inner = self.lock();
        inner.last_good = Some(now);
        if let Some(rules) = &policy.breaker {
            let breakers = &mut inner.breakers;
            if let Some(breaker) = breakers.of_mut(model, rules, now) {
                breaker.token(began, now);
            }
        }
    }

    /// Notes the end of a request whose first token was noted.
    pub(super) fn token_over(&self, model: &str) {
        let mut inner = self.lock();
        if let Some(breaker) = inner.breakers.known(model) {
            breaker.answering = breaker.answering.saturating_sub(1);
        }
    }

    /// Notes a whole answer.
    pub(super) fn succeeded(
        &self,
        model: &Arc<str>,
        policy: &Policy,
        began: Instant,
        now: Instant,
    ) {
        let mut inner = self.lock();
        inner.last_good = Some(now);
        let mut changed = false;
        if let Some(rules) = &policy.breaker {
            let breaker = inner.breakers.of_mut(model, rules, now);
            let came = breaker.map(|breaker| breaker.succeeded(rules, began, now));
            if came == Some(Came::Changed) {
                inner.recover(now);
                changed = true;
            }
        }
        // What its checks say is theirs to take back.
        if inner.link.open_by(began) | inner.key.open_by(began) {
            inner.recover(now);
            changed = true;
        }
        // An answer that began before the limit was reached says nothing of it.
        if inner.cool.since.is_none_or(|since| began > since) {
            inner.cool.times = 0;
        }
        if changed {
            self.changed(&mut inner, policy, now);
        }
    }

    /// Notes a failure of the server after the request was sent. Returns whether
    /// the breaker should have opened but the group could not spare it.
    pub(super) fn failed(
        &self,
        model: &Arc<str>,
        policy: &Policy,
        how: (Fault, Spare),
        began: Instant,
        now: Instant,
    ) -> bool {
        let Some(rules) = &policy.breaker else {
            return false;
        };
        let mut inner = self.lock();
        let Some(breaker) = inner.breakers.of_mut(model, rules, now) else {
            return false;
        };
        let came = breaker.failed(rules, how, began, now);
        if came == Came::Changed {
            self.changed(&mut inner, policy, now);
        }
        came == Came::Spared
    }

    /// Notes that it turned a request away (503, 529): a failure, unless it is just answering others with this model, and
    /// so is only busy. Returns what [`Self::failed`] does.
    pub(super) fn turned_away(
        &self,
        model: &Arc<str>,
        policy: &Policy,
        spare: Spare,
        began: Instant,
        now: Instant,
    ) -> bool {
        let busy = {
            let inner = self.lock();
            let breaker = inner.breakers.of(model);
            breaker.is_some_and(|breaker| breaker.answering > 0)
        };
        !busy && self.failed(model, policy, (Fault::Answer, spare), began, now)
    }

    /// Notes that it asked for a pause. Never shortens a pause that runs; returns
    /// whether none did.
    pub fn cool(&self, pause: Duration, policy: &Policy, now: Instant) -> bool {
        let mut is_new = false;
        self.change(policy, now, |inner| {
            is_new = inner.cool.until.is_none_or(|until| until <= now);
            inner.cool(pause.min(COOL_MAX), now);
            inner.cool.limited = false;
        });
        is_new
    }

    /// The same, because of its rate limit; `None` if it did not say how long.
    pub fn limit(&self, pause: Option<Duration>, policy: &Policy, now: Instant) {
        self.change(policy, now, |inner| {
            let running = inner.cool.until.is_some_and(|until| until > now);
            let pause = match pause {
                Some(pause) => pause.min(COOL_MAX),
                // Stragglers of the same crowd.
                None if running => Duration::ZERO,
                None => {
                    let times = inner.cool.times.min(20);
                    inner.cool.times += 1;
                    inner.cool.since = Some(now);
                    COOL_FIRST
                        .saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX))
                        .min(policy.cooldown)
                }
            };
            inner.cool(pause, now);
            inner.cool.limited = true;
        });
    }

    /// Notes that its model is not loaded yet.
    pub fn loading(&self, policy: &Policy, now: Instant) {
        self.change(policy, now, |inner| {
            inner.link.open();
            inner.loading(policy, now);
            inner.schedule.soon(now);
        });
    }

    /// Notes that our credential is no good there. Returns whether it is taken
    /// for bad: one that has just worked is, after a 403 without a reason, only
    /// if the next request is told the same.
    pub fn key_fault(&self, fault: KeyFault, policy: &Policy, now: Instant) -> bool {
        let pauses = match fault {
            KeyFault::Refused => KEY_REFUSED,
            KeyFault::Forbidden | KeyFault::Unexplained => KEY_FORBIDDEN,
            KeyFault::Quota => QUOTA,
        };
        let mut is_bad = true;
        self.change(policy, now, |inner| {
            inner.link.open();
            if fault == KeyFault::Unexplained {
                let before = inner.forbidden.replace(now);
                let worked = |at: &Instant| now.saturating_duration_since(*at) < KEY_WORKED;
                let good = inner.last_good.filter(worked);
                is_bad = inner.key.is_shut() || good.is_none() || before > good;
            }
            if is_bad {
                inner.key.shut(pauses, now);
                inner.key_fault = fault;
            }
        });
        is_bad
    }

    // --- checks ---

    /// Returns whether it is time for a check, and takes the turn: the next one
    /// comes after [`Self::checked`].
    pub(super) fn begin_check(&self, policy: &Policy, now: Instant) -> bool {
        !self.off && policy.check.enabled && self.lock().schedule.begin(now)
    }

    /// Notes what came of a check that began at `began`.
    pub(super) fn checked(&self, checked: &Checked, policy: &Policy, began: Instant, now: Instant) {
        self.change(policy, now, |inner| {
            // A server that answers requests has more to do than to answer us.
            let outweighed = *checked == Checked::Silent
                && !inner.link.is_shut()
                && inner.last_good.is_some_and(|at| at >= began);
            // It was asked because people say that it is well: once is enough.
            let hasty = inner.doubted.is_some_and(|at| began >= at);
            if !outweighed {
                inner.checked(checked, hasty, policy, (began, now));
            }
            if hasty {
                inner.doubted = None;
            }
            let fall = policy.check.fall;
            let since = match outweighed || !inner.checks.is_shut() {
                true => None,
                false => inner.schedule.bad_since(fall),
            };
            self.tell_fallen(since);
            let well =
                !inner.link.is_shut() && !inner.checks.is_shut() && inner.loading_until.is_none();
            inner.schedule.next(&policy.check, well, now);
        });
    }

    /// Lets one request try its breaker at once: others of its group that failed
    /// at the same time answer again.
    pub(super) fn hurry(&self, model: &str, policy: &Policy, now: Instant) {
        let Some(rules) = &policy.breaker else {
            return;
        };
        let mut inner = self.lock();
        let breaker = inner.breakers.known(model);
        let came = breaker.map(|breaker| breaker.hurry(rules, now));
        if came == Some(Came::Changed) {
            self.changed(&mut inner, policy, now);
        }
    }

    // --- people, and time ---

    /// Forgets everything but whether it is off or draining. What a check can
    /// find out is not forgotten but asked at once, and the first answer counts.
    pub fn reset(&self, policy: &Policy, now: Instant) {
        self.change(policy, now, |inner| {
            if policy.check.enabled && (inner.link.is_shut() || inner.checks.is_shut()) {
                inner.doubted = Some(now);
            } else {
                inner.link.open();
                inner.checks.open();
            }
            inner.key.open();
            inner.loading_until = None;
            inner.cool = Cool::default();
            inner.breakers.reset();
            inner.ramp_from = None;
            inner.schedule = Schedule::new(now);
            self.tell_fallen(None);
        });
    }

    /// Returns whether it was reset, and it is still being asked what that
    /// changes.
    pub fn is_doubted(&self) -> bool {
        self.lock().doubted.is_some()
    }

    /// Gives it nothing new from now on, or something again.
    pub fn drain(&self, drained: bool, policy: &Policy, now: Instant) {
        self.change(policy, now, |inner| inner.drained = drained);
    }

    /// Returns whether people, not the configuration, drain it.
    pub fn is_drained(&self) -> bool {
        self.lock().drained
    }

    /// Notices what only time changes: pauses that are over, streams that have
    /// flowed long enough. Called about ten times a second.
    pub(super) fn tick(&self, policy: &Policy, now: Instant) {
        self.change(policy, now, |inner| {
            if inner.breakers.settle(now) == Came::Changed {
                inner.recover(now);
            }
            // A reload has ended the checks: nobody would take back what they said.
            if !policy.check.enabled && (inner.checks.open() || inner.schedule.fails()) {
                inner.schedule = Schedule::new(now);
                self.tell_fallen(None);
            }
        });
    }

    fn tell_fallen(&self, since: Option<Instant>) {
        self.fallen.send_if_modified(|told| {
            let was = std::mem::replace(told, since);
            was != since
        });
    }

    fn change(&self, policy: &Policy, now: Instant, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        change(&mut inner);
        self.changed(&mut inner, policy, now);
    }

    /// Brings everything up to date that depends on what was changed, and tells
    /// of it; with the lock held, so that changes are told in their order.
    fn changed(&self, inner: &mut Inner, policy: &Policy, now: Instant) {
        self.troubled
            .store(self.off || inner.is_troubled(now), SeqCst);
        let ramp = inner.climb(policy, now);
        self.ramp.store(ramp, SeqCst);
        let status = if self.off {
            Status {
                state: State::Off,
                reason: Reason::None,
                wait: None,
            }
        } else {
            inner.look(policy, now)
        };
        let was = std::mem::replace(&mut inner.status, status);
        let news = inner.breakers.news(now);
        let Some(told) = self.told.get() else {
            return;
        };
        for (model, phase, wait) in news {
            let to = phase.as_str();
            told.events
                .tell(&told.name, Change::Breaker { model, to, wait });
        }
        if (was.state, was.reason) != (status.state, status.reason) {
            let change = Change::State {
                from: was.state.as_str(),
                to: status.state.as_str(),
                reason: status.reason.as_str(),
                wait: status.wait,
            };
            told.events.tell(&told.name, change);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn says(&self, model: &str, policy: &Policy, now: Instant) -> Says {
        // With checks, they find out for us: no client has to wait for a
        // connect that fails.
        let link = match self.link.says(now) {
            Says::Try if policy.check.enabled => Says::Stop,
            says => says,
        };
        let checks = match self.checks.is_shut() {
            true => Says::Stop,
            false => Says::Go,
        };
        let breaker = match (&policy.breaker, self.breakers.of(model)) {
            (Some(_), Some(breaker)) => breaker.says(now),
            _ => Says::Go,
        };
        self.all(&[link, checks, self.key.says(now), breaker], now)
    }

    fn says_in_panic(&self, model: &str, policy: &Policy, now: Instant) -> Says {
        let link = match self.link.says(now) {
            Says::Stop if !self.link_slow && self.link.is_untried() => Says::Go,
            says => says,
        };
        let breaker = match (&policy.breaker, self.breakers.of(model)) {
            (Some(rules), Some(breaker)) => breaker.says_in_panic(rules, now),
            _ => Says::Go,
        };
        let answers = self.checks.since() <= self.last_good;
        let checks = match self.checks.is_shut() && answers {
            true => Says::Go,
            false => self.checks.says(now),
        };
        self.all(&[link, checks, self.key.says(now), breaker], now)
    }

    /// Puts together what each has to say.
    fn all(&self, each: &[Says], now: Instant) -> Says {
        let paused = self.drained
            || self.loading_until.is_some_and(|until| until > now)
            || self.cool.until.is_some_and(|until| until > now);
        if paused || each.contains(&Says::Stop) {
            Says::Stop
        } else if each.contains(&Says::Try) {
            Says::Try
        } else {
            Says::Go
        }
    }

    fn begin_try(&mut self, model: &Arc<str>, now: Instant) -> Leave {
        self.tickets += 1;
        let ticket = self.tickets;
        self.link.begin_try(ticket);
        self.checks.begin_try(ticket);
        self.key.begin_try(ticket);
        if let Some(breaker) = self.breakers.known(model) {
            breaker.begin_try(ticket, now);
        }
        Leave::Try(ticket)
    }

    fn wait(&self, model: &str, policy: &Policy, now: Instant) -> Duration {
        let left = |until: Option<Instant>| {
            until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
        };
        let breaker = self.breakers.of(model);
        let loading = self.loading_until.is_some_and(|until| until > now);
        let asked = match loading || self.checks.is_shut() {
            true => policy.check.every.get(),
            false => Duration::ZERO,
        };
        [
            self.link.wait(now),
            self.key.wait(now),
            left(self.cool.until),
            breaker.map_or(Duration::ZERO, |breaker| breaker.wait(now)),
            asked,
        ]
        .into_iter()
        .max()
        .unwrap_or_default()
    }

    fn look(&self, policy: &Policy, now: Instant) -> Status {
        let status = |state, reason, wait: Duration| Status {
            state,
            reason,
            wait: Some(wait).filter(|wait| !wait.is_zero()),
        };
        let none = Duration::ZERO;
        if policy.drain || self.drained {
            return status(State::Draining, Reason::None, none);
        }
        let or_tls = |reason| match self.tls {
            Some(_) => Reason::Tls,
            None => reason,
        };
        if self.link.is_shut() {
            return status(State::Down, or_tls(Reason::Connect), none);
        }
        if self.key.is_shut() {
            let wait = self.key.wait(now);
            return match self.key_fault {
                KeyFault::Quota => status(State::Cooling, Reason::Quota, wait),
                _ => status(State::Down, Reason::KeyBad, wait),
            };
        }
        if self.loading_until.is_some_and(|until| until > now) {
            return status(State::Loading, Reason::None, none);
        }
        if self.checks.is_shut() {
            return status(State::Down, or_tls(Reason::Check), none);
        }
        if let Some(until) = self.cool.until.filter(|until| *until > now) {
            let reason = match self.cool.limited {
                true => Reason::RateLimit,
                false => Reason::Overload,
            };
            return status(State::Cooling, reason, until - now);
        }
        match self.breakers.shut(now) {
            (0, _) if self.schedule.fails() => status(State::Degraded, Reason::Check, none),
            (0, _) => status(State::Ready, Reason::None, none),
            (shut, all) => {
                let wait = self.breakers.wait(now).unwrap_or_default();
                let state = match shut >= all {
                    true => State::Down,
                    false => State::Degraded,
                };
                status(state, Reason::Breaker, wait)
            }
        }
    }

    fn is_troubled(&self, now: Instant) -> bool {
        self.link.is_shut()
            || self.checks.is_shut()
            || self.key.is_shut()
            || self.drained
            || self.loading_until.is_some_and(|until| until > now)
            || self.cool.until.is_some_and(|until| until > now)
            || self.breakers.shut(now).0 > 0
    }

    fn cool(&mut self, pause: Duration, now: Instant) {
        let until = now + pause;
        self.cool.until = Some(self.cool.until.map_or(until, |running| running.max(until)));
    }

    fn loading(&mut self, policy: &Policy, now: Instant) {
        // Checks come more often than that.
        let check = &policy.check;
        let pause = match check.enabled {
            true => check.every.get() * 2 + check.timeout.get(),
            false => LOADING,
        };
        self.loading_until = Some(now + pause);
    }

    fn checked(
        &mut self,
        checked: &Checked,
        hasty: bool,
        policy: &Policy,
        (began, now): (Instant, Instant),
    ) {
        let check = &policy.check;
        match checked {
            Checked::Good => {
                let enough = self.schedule.good() >= check.rise || hasty;
                // A model that was loading says by itself that it is there.
                let loaded = self.loading_until.take().is_some();
                let was_down = self.checks.is_shut();
                if (enough || loaded) && (self.link.open() | self.checks.open() | loaded) {
                    self.recover(now);
                }
                let is_up = !self.checks.is_shut();
                if was_down
                    && is_up
                    && let Some(rules) = &policy.breaker
                {
                    // What opened while it was down, or as it went down, opened
                    // for that. What failed while checks were good did not.
                    self.breakers.hurry(self.well, rules, now);
                }
                if is_up {
                    self.well = Some(began);
                }
            }
            Checked::Loading => {
                self.schedule.loading();
                self.link.open();
                self.checks.open();
                self.loading(policy, now);
            }
            Checked::NotAsked => {}
            Checked::Silent | Checked::Bad(_) | Checked::Tls(_) => {
                self.tls = match checked {
                    Checked::Tls(fault) => Some(*fault),
                    _ => None,
                };
                if self.schedule.bad(check.fall, began) {
                    self.loading_until = None;
                    if !self.checks.is_shut() {
                        self.checks.shut(CHECKS, now);
                    }
                }
            }
        }
    }

    fn recover(&mut self, now: Instant) {
        self.ramp_from = Some(now);
    }

    fn climb(&mut self, policy: &Policy, now: Instant) -> u32 {
        let Some(from) = self.ramp_from else {
            return RAMP_FULL;
        };
        let since = now.saturating_duration_since(from);
        if since >= policy.slow_start {
            self.ramp_from = None;
            return RAMP_FULL;
        }
        let thousandths = since.as_millis() * 1000 / policy.slow_start.as_millis().max(1);
        u32::try_from(thousandths)
            .unwrap_or(RAMP_FULL)
            .clamp(RAMP_FIRST, RAMP_FULL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config, metrics::Metrics};

    fn secs(secs: f64) -> Duration {
        Duration::from_secs_f64(secs)
    }

    /// An upstream's health with its clock.
    struct Bench {
        health: Health,
        policy: Policy,
        now: Instant,
    }

    impl Bench {
        fn new(yaml: &str) -> Self {
            let now = Instant::now();
            let upstream: config::Upstream = serde_yaml::from_str(yaml).unwrap();
            Self {
                health: Health::new(now),
                policy: Policy::of(&config::Group::default(), &upstream),
                now,
            }
        }

        fn unchecked() -> Self {
            Self::new("{ check: { enabled: false } }")
        }

        fn later(&mut self, time: f64) -> &mut Self {
            self.now += secs(time);
            self
        }

        fn not_sent(&self) -> &Self {
            let Self { health, policy, .. } = self;
            health.not_sent(secs(0.0), None, policy, self.now);
            self
        }

        fn fail(&self, model: &str, times: usize) -> &Self {
            let model = model.into();
            for _ in 0..times {
                self.health.failed(
                    &model,
                    &self.policy,
                    (Fault::Answer, Spare::Yes),
                    self.now,
                    self.now,
                );
            }
            self
        }

        fn succeed(&self, model: &str) -> &Self {
            self.health
                .succeeded(&model.into(), &self.policy, self.now, self.now);
            self
        }

        fn check(&self, checked: &Checked) -> &Self {
            self.health
                .checked(checked, &self.policy, self.now, self.now);
            self
        }

        fn bad(&self) -> &Self {
            self.check(&Checked::Bad("status 500".to_owned()))
        }

        fn says(&self, model: &str) -> Says {
            self.health.says(model, &self.policy, self.now)
        }

        fn state(&self) -> (State, Reason) {
            let status = self.health.status(&self.policy, self.now);
            (status.state, status.reason)
        }

        fn wait(&self) -> Duration {
            self.health.wait("m", &self.policy, self.now)
        }

        fn admit(&self, model: &str) -> Option<Leave> {
            self.health.admit(&model.into(), &self.policy, self.now)
        }
    }

    #[test]
    fn an_upstream_that_cannot_be_reached_is_down_until_checks_are_good() {
        let mut bench = Bench::new("{}");
        bench.not_sent();
        assert_eq!(bench.state(), (State::Down, Reason::Connect));
        // However long it takes, no client finds out.
        assert_eq!(bench.later(3600.0).says("m"), Says::Stop);
        bench.check(&Checked::Good);
        assert_eq!(bench.says("m"), Says::Stop);
        bench.check(&Checked::Good);
        assert_eq!(bench.state(), (State::Ready, Reason::None));
        assert_eq!(bench.says("m"), Says::Go);
        assert_eq!(bench.health.ramp(), RAMP_FIRST);
    }

    #[test]
    fn one_that_is_not_reached_for_tls_says_so_until_it_is_reached() {
        let mut bench = Bench::new("{}");
        let tls = |bench: &Bench| bench.health.tls_fault(&bench.policy, bench.now);
        let expired = Some(TlsFault::Expired);
        let Bench { health, policy, .. } = &bench;
        health.not_sent(secs(0.0), expired, policy, bench.now);
        assert_eq!(bench.state(), (State::Down, Reason::Tls));
        assert_eq!(tls(&bench), expired);
        // It is the last that counts.
        bench.later(40.0).not_sent();
        assert_eq!(bench.state(), (State::Down, Reason::Connect));
        assert_eq!(tls(&bench), None);
        bench.check(&Checked::Good).check(&Checked::Good);
        let wrong = Checked::Tls(TlsFault::WrongName);
        bench.check(&wrong).check(&wrong);
        assert_eq!(bench.state(), (State::Degraded, Reason::Check));
        assert_eq!(tls(&bench), None, "it is not down");
        bench.check(&wrong);
        assert_eq!(bench.state(), (State::Down, Reason::Tls));
        assert_eq!(tls(&bench), Some(TlsFault::WrongName));
        bench.check(&Checked::Good).check(&Checked::Good);
        assert_eq!(
            (bench.state(), tls(&bench)),
            ((State::Ready, Reason::None), None)
        );
    }

    #[test]
    fn without_checks_one_request_at_a_time_finds_out() {
        let mut bench = Bench::unchecked();
        bench.not_sent();
        assert_eq!(bench.later(0.7).says("m"), Says::Stop);
        bench.later(0.6);
        let Some(Leave::Try(ticket)) = bench.admit("m") else {
            panic!("the first may try");
        };
        assert_eq!(bench.admit("m"), None);
        assert_eq!(bench.admit("another model"), None);
        bench.health.end_try(ticket, &bench.policy, bench.now);
        assert!(matches!(bench.admit("m"), Some(Leave::Try(_))));
        bench.succeed("m");
        assert_eq!(bench.admit("m"), Some(Leave::Free));
    }

    #[test]
    fn who_waits_for_an_upstream_that_falls_is_told_since_when_it_is_silent() {
        let mut bench = Bench::new("{}");
        let mut fallen = bench.health.fallen();
        let told = |fallen: &mut watch::Receiver<Option<Instant>>| {
            let is_news = fallen.has_changed().unwrap();
            (is_news, *fallen.borrow_and_update())
        };
        let first = bench.now;
        bench.bad();
        bench.later(1.0).bad();
        assert_eq!(told(&mut fallen), (false, None), "not down yet");
        bench.later(1.0).bad();
        assert_eq!(told(&mut fallen), (true, Some(first)));
        // Whoever asked after the first one waits until three more are bad.
        bench.later(1.0).bad();
        assert_eq!(told(&mut fallen), (true, Some(first + secs(1.0))));
        bench.check(&Checked::Good);
        assert_eq!(told(&mut fallen), (true, None), "down, and yet not silent");
        bench.bad().bad().bad();
        assert_eq!(told(&mut fallen), (true, Some(bench.now)));
        bench.health.reset(&bench.policy, bench.now);
        assert_eq!(told(&mut fallen), (true, None));
        // One that answers others has no time for checks.
        let bench = Bench::new("{}");
        let mut fallen = bench.health.fallen();
        for _ in 0..5 {
            bench.succeed("m").check(&Checked::Silent);
        }
        assert_eq!(told(&mut fallen), (false, None));
    }

    #[test]
    fn three_bad_checks_take_it_down_and_two_good_ones_bring_it_back() {
        let bench = Bench::new("{}");
        bench.bad().bad();
        assert_eq!(bench.state(), (State::Degraded, Reason::Check));
        assert_eq!(bench.says("m"), Says::Go);
        bench.bad();
        assert_eq!(bench.state(), (State::Down, Reason::Check));
        assert_eq!(bench.says("m"), Says::Stop);
        bench.check(&Checked::Good);
        assert_eq!(bench.says("m"), Says::Stop);
        bench.bad().check(&Checked::Good);
        assert_eq!(bench.says("m"), Says::Stop, "not in a row");
        bench.check(&Checked::Good);
        assert_eq!(bench.state(), (State::Ready, Reason::None));
    }

    #[test]
    fn a_good_check_never_closes_a_breaker() {
        let bench = Bench::new("{}");
        bench.fail("m", 5);
        for _ in 0..10 {
            bench.check(&Checked::Good);
        }
        assert_eq!(bench.state(), (State::Down, Reason::Breaker));
        assert_eq!(bench.says("m"), Says::Stop);
    }

    #[test]
    fn a_server_that_answers_requests_is_not_down_for_a_silent_check() {
        let mut bench = Bench::new("{}");
        for _ in 0..10 {
            bench.succeed("m").check(&Checked::Silent);
        }
        assert_eq!(bench.state(), (State::Ready, Reason::None));
        for _ in 0..3 {
            bench.later(5.0).check(&Checked::Silent);
        }
        assert_eq!(bench.state(), (State::Down, Reason::Check));
    }

    #[test]
    fn a_breaker_is_one_models_own_and_the_state_says_so() {
        let mut bench = Bench::new("{}");
        bench.succeed("b").fail("a", 5);
        assert_eq!((bench.says("a"), bench.says("b")), (Says::Stop, Says::Go));
        assert_eq!(bench.state(), (State::Degraded, Reason::Breaker));
        bench.later(6.1);
        assert!(matches!(bench.admit("a"), Some(Leave::Try(_))));
        assert_eq!(
            (bench.admit("a"), bench.admit("b")),
            (None, Some(Leave::Free))
        );
        bench.succeed("a");
        assert_eq!(bench.state(), (State::Ready, Reason::None));
        assert_eq!(bench.health.ramp(), RAMP_FIRST);
        bench.later(10.0);
        bench.health.climb(&bench.policy, bench.now);
        assert_eq!(bench.health.ramp(), RAMP_FULL);
    }

    #[test]
    fn loading_is_a_state_and_no_failure() {
        let mut bench = Bench::new("{}");
        bench.health.loading(&bench.policy, bench.now);
        assert_eq!(bench.state(), (State::Loading, Reason::None));
        assert_eq!(bench.says("m"), Says::Stop);
        for _ in 0..100 {
            bench.later(5.0).check(&Checked::Loading);
        }
        assert_eq!(bench.state(), (State::Loading, Reason::None));
        bench.check(&Checked::Good);
        assert_eq!(bench.state(), (State::Ready, Reason::None));
        // Without checks, somebody looks after a while.
        let mut bench = Bench::unchecked();
        bench.health.loading(&bench.policy, bench.now);
        assert_eq!(bench.later(5.0).says("m"), Says::Go);
    }

    #[test]
    fn a_rate_limit_without_a_time_doubles_from_half_a_minute_to_the_longest() {
        let mut bench = Bench::new("{ cooldown: 5m }");
        for expected in [30.0, 60.0, 120.0, 240.0, 300.0, 300.0] {
            for _crowd in 0..9 {
                bench.health.limit(None, &bench.policy, bench.now);
            }
            assert_eq!(bench.wait(), secs(expected));
            assert_eq!(bench.state(), (State::Cooling, Reason::RateLimit));
            bench.later(expected);
            assert_eq!(bench.says("m"), Says::Go);
        }
        bench.succeed("m");
        bench.health.limit(None, &bench.policy, bench.now);
        assert_eq!(bench.wait(), secs(30.0));
    }

    #[test]
    fn a_pause_is_kept_as_asked_within_thirty_minutes() {
        let mut bench = Bench::new("{}");
        let limit = |bench: &Bench, time| {
            bench
                .health
                .limit(Some(secs(time)), &bench.policy, bench.now);
        };
        limit(&bench, 7.0);
        limit(&bench, 1.0);
        bench.succeed("m");
        assert_eq!((bench.wait(), bench.says("m")), (secs(7.0), Says::Stop));
        limit(&bench, 1e6);
        assert_eq!(bench.wait(), COOL_MAX);
        bench.later(1800.0);
        assert_eq!(bench.state(), (State::Ready, Reason::None));
        bench.health.cool(secs(3.0), &bench.policy, bench.now);
        assert_eq!(bench.state(), (State::Cooling, Reason::Overload));
    }

    #[test]
    fn a_bad_credential_is_tried_again_after_minutes_by_one() {
        for (fault, state, reason, least, most) in [
            (KeyFault::Refused, State::Down, Reason::KeyBad, 240.0, 360.0),
            (KeyFault::Forbidden, State::Down, Reason::KeyBad, 24.0, 36.0),
            (KeyFault::Quota, State::Cooling, Reason::Quota, 240.0, 300.0),
        ] {
            let mut bench = Bench::new("{}");
            bench.health.key_fault(fault, &bench.policy, bench.now);
            assert_eq!(bench.state(), (state, reason));
            assert!(bench.wait() >= secs(least) && bench.wait() <= secs(most));
            bench.check(&Checked::Good).check(&Checked::Good);
            assert_eq!(bench.says("m"), Says::Stop);
            bench.later(most);
            assert!(matches!(bench.admit("m"), Some(Leave::Try(_))));
            assert_eq!(bench.admit("m"), None);
            bench.health.accepted(&bench.policy, bench.now, bench.now);
            assert_eq!(bench.state(), (State::Ready, Reason::None));
        }
    }

    #[test]
    fn a_key_that_has_just_worked_is_not_bad_before_the_second_unexplained_403_in_a_row() {
        let mut bench = Bench::new("{}");
        let forbidden = |bench: &Bench| {
            let fault = KeyFault::Unexplained;
            bench.health.key_fault(fault, &bench.policy, bench.now)
        };
        for _ in 0..3 {
            bench.later(0.1).succeed("m");
            bench.later(0.1);
            assert!(!forbidden(&bench));
            assert_eq!(bench.says("m"), Says::Go);
        }
        bench.later(0.1);
        assert!(forbidden(&bench));
        assert_eq!(bench.state(), (State::Down, Reason::KeyBad));
        // Nothing is known of one that was never used, or not for long.
        assert!(forbidden(&Bench::new("{}")));
        let mut bench = Bench::new("{}");
        bench.succeed("m");
        bench.later(61.0);
        assert!(forbidden(&bench));
    }

    #[test]
    fn one_that_turns_some_away_while_it_answers_others_is_only_busy() {
        let bench = Bench::new("{}");
        let model: Arc<str> = "m".into();
        let away = || {
            bench
                .health
                .turned_away(&model, &bench.policy, Spare::Yes, bench.now, bench.now)
        };
        bench
            .health
            .token(&model, &bench.policy, bench.now, bench.now);
        assert!(!(0..50).any(|_| away()));
        assert_eq!(bench.says("m"), Says::Go);
        bench.health.token_over("m");
        assert!(!(0..5).any(|_| away()));
        assert_eq!(bench.says("m"), Says::Stop);
    }

    #[test]
    fn connects_that_fail_although_checks_are_good_open_the_breaker() {
        let mut bench = Bench::new("{}");
        let model: Arc<str> = "m".into();
        let unsent = |bench: &mut Bench| {
            let began = bench.now;
            bench.later(0.001).not_sent();
            let Bench { health, policy, .. } = bench;
            // A crowd that fails together fails once.
            for _ in 0..10 {
                health.unsent(&model, policy, Spare::Yes, began, bench.now);
            }
        };
        for _ in 0..5 {
            assert_eq!(bench.says("m"), Says::Go);
            unsent(&mut bench);
            bench.later(0.1).check(&Checked::Good).check(&Checked::Good);
        }
        assert_eq!(bench.says("m"), Says::Stop);
        assert_eq!(bench.state(), (State::Down, Reason::Breaker));
    }

    #[test]
    fn a_breaker_that_opened_in_an_outage_is_tried_when_checks_say_that_it_is_over() {
        let mut bench = Bench::new("{}");
        bench.check(&Checked::Good);
        bench.later(1.0).fail("m", 5);
        bench.later(1.0).bad();
        bench.later(0.5).bad();
        bench.later(0.5).bad();
        assert_eq!(bench.state(), (State::Down, Reason::Check));
        bench.later(0.5).check(&Checked::Good);
        assert_eq!(bench.admit("m"), None);
        bench.later(0.5).check(&Checked::Good);
        assert!(matches!(bench.admit("m"), Some(Leave::Try(_))));
        assert_eq!(bench.admit("m"), None);
        // It was no more than leave to try.
        bench.fail("m", 1);
        assert!(bench.wait() >= secs(10.0));
        bench.check(&Checked::Good).check(&Checked::Good);
        assert_eq!(bench.admit("m"), None);
    }

    #[test]
    fn a_breaker_that_opened_while_checks_were_good_waits_for_its_time_whatever_they_say() {
        let mut bench = Bench::new("{}");
        bench.fail("m", 5);
        bench.later(0.5).check(&Checked::Good);
        for _ in 0..3 {
            bench.later(0.5).bad();
        }
        bench.later(0.5).check(&Checked::Good).check(&Checked::Good);
        assert_eq!(bench.state(), (State::Down, Reason::Breaker));
        assert_eq!(bench.admit("m"), None);
    }

    #[test]
    fn asking_again_who_is_known_to_be_unreachable_opens_no_breaker_if_checks_tell() {
        for (mut bench, opens) in [(Bench::new("{}"), false), (Bench::unchecked(), true)] {
            let model: Arc<str> = "m".into();
            for _ in 0..9 {
                bench.not_sent();
                let Bench { health, policy, .. } = &bench;
                health.unsent(&model, policy, Spare::Yes, bench.now, bench.now);
                bench.later(40.0);
            }
            let open = bench.health.breakers(bench.now).len() == 1;
            assert_eq!(open, opens);
        }
    }

    #[test]
    fn an_answer_that_began_before_the_rate_limit_does_not_shorten_the_next_pause() {
        let mut bench = Bench::new("{}");
        let began = bench.now;
        bench.later(1.0);
        bench.health.limit(None, &bench.policy, bench.now);
        bench.later(30.0);
        let Bench { health, policy, .. } = &bench;
        health.succeeded(&"m".into(), policy, began, bench.now);
        health.limit(None, policy, bench.now);
        assert_eq!(bench.wait(), secs(60.0));
    }

    #[test]
    fn one_that_answers_although_its_checks_are_bad_stays_down_and_is_used_if_nobody_else_is_there()
    {
        let mut bench = Bench::new("{}");
        bench.bad().bad().bad();
        let panic = |bench: &Bench| {
            let Bench { health, policy, .. } = bench;
            health.admit_in_panic(&"m".into(), policy, bench.now)
        };
        assert_eq!(panic(&bench), None);
        bench.later(1.3).bad();
        let Some(Leave::Try(ticket)) = panic(&bench) else {
            panic!("one may try");
        };
        assert_eq!(panic(&bench), None);
        bench.succeed("m");
        bench.health.end_try(ticket, &bench.policy, bench.now);
        for _ in 0..5 {
            assert_eq!(panic(&bench), Some(Leave::Free));
            bench.succeed("m");
            bench.later(1.0).bad();
            assert_eq!(bench.state(), (State::Down, Reason::Check));
            assert_eq!(bench.says("m"), Says::Stop);
        }
    }

    #[test]
    fn what_checks_said_is_forgotten_when_a_reload_ends_them() {
        let mut bench = Bench::new("{}");
        bench.bad().bad().bad();
        bench.policy.check.enabled = false;
        bench.health.tick(&bench.policy, bench.now);
        assert_eq!(bench.state(), (State::Ready, Reason::None));
    }

    #[test]
    fn draining_takes_nothing_new_until_it_is_taken_back() {
        let bench = Bench::new("{}");
        bench.health.drain(true, &bench.policy, bench.now);
        assert_eq!(bench.state(), (State::Draining, Reason::None));
        assert_eq!((bench.says("m"), bench.admit("m")), (Says::Stop, None));
        bench.health.reset(&bench.policy, bench.now);
        assert_eq!(bench.says("m"), Says::Stop);
        bench.health.drain(false, &bench.policy, bench.now);
        assert_eq!(bench.says("m"), Says::Go);
        let written = Bench::new("{ drain: true }");
        assert_eq!(written.state(), (State::Draining, Reason::None));
        assert_eq!((written.says("m"), written.admit("m")), (Says::Stop, None));
    }

    #[test]
    fn one_that_is_reset_is_asked_at_once_and_the_first_answer_counts() {
        let mut bench = Bench::new("{}");
        bench.not_sent().fail("m", 9).bad().bad().bad();
        bench.later(1.0);
        let reset = |bench: &Bench| bench.health.reset(&bench.policy, bench.now);
        reset(&bench);
        // Nobody knows better yet than that it cannot be reached.
        assert_eq!(bench.state(), (State::Down, Reason::Connect));
        assert!(bench.health.is_doubted());
        assert!(bench.health.begin_check(&bench.policy, bench.now));
        let old = bench.now - secs(0.5);
        let good = Checked::Good;
        bench.health.checked(&good, &bench.policy, old, bench.now);
        assert!(bench.health.is_doubted(), "it was asked before");
        bench.check(&good);
        assert_eq!(bench.state(), (State::Ready, Reason::None));
        assert!(!bench.health.is_doubted());
        bench.not_sent();
        reset(&bench);
        bench.bad();
        assert_eq!(bench.state(), (State::Down, Reason::Connect));
        assert!(!bench.health.is_doubted());
    }

    #[test]
    fn reset_forgets_everything_but_that_it_is_off() {
        let bench = Bench::unchecked();
        bench.not_sent().fail("m", 9);
        bench.health.limit(None, &bench.policy, bench.now);
        bench
            .health
            .key_fault(KeyFault::Quota, &bench.policy, bench.now);
        bench.health.loading(&bench.policy, bench.now);
        bench.health.reset(&bench.policy, bench.now);
        assert_eq!(bench.state(), (State::Ready, Reason::None));
        assert_eq!(bench.says("m"), Says::Go);

        let off = Health::off(bench.now);
        off.reset(&bench.policy, bench.now);
        assert_eq!(off.status(&bench.policy, bench.now).state, State::Off);
        assert_eq!(off.says("m", &bench.policy, bench.now), Says::Stop);
        assert!(!off.begin_check(&bench.policy, bench.now));
    }

    #[test]
    fn each_change_is_told_once_also_what_only_time_changes() {
        let mut bench = Bench::new("{}");
        let events = Arc::new(Events::new(Arc::new(Metrics::new())));
        let mut heard = events.subscribe();
        bench.health.tell(&"gpu-1".into(), &events);
        bench
            .health
            .limit(Some(secs(7.0)), &bench.policy, bench.now);
        bench
            .health
            .limit(Some(secs(7.0)), &bench.policy, bench.now);
        bench.health.tick(&bench.policy, bench.now);
        bench.later(7.0);
        bench.health.tick(&bench.policy, bench.now);
        bench.health.tick(&bench.policy, bench.now);
        bench.fail("m", 5);
        let mut told = Vec::new();
        while let Ok(event) = heard.try_recv() {
            assert_eq!(&*event.subject, "gpu-1");
            told.push(match event.change {
                Change::State {
                    from, to, reason, ..
                } => format!("{from} {to} {reason}"),
                Change::Breaker { model, to, .. } => format!("{model} {to}"),
                other => panic!("not of an upstream: {other:?}"),
            });
        }
        assert_eq!(
            told,
            [
                "ready cooling rate_limit",
                "cooling ready -",
                "m open",
                "ready down breaker",
            ]
        );
    }

    #[test]
    fn no_walk_of_reports_leaves_it_shut_for_ever() {
        // xorshift64: the same walks each time.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for walk in 0..300 {
            let mut bench = match walk % 2 {
                0 => Bench::new("{}"),
                _ => Bench::unchecked(),
            };
            for _ in 0..200 {
                bench.later(next(30) as f64 / 10.0);
                let model = ["a", "b"][usize::try_from(next(2)).unwrap()];
                let leave = bench.admit(model);
                match next(9) {
                    0 | 1 => drop(bench.fail(model, 1)),
                    2 => drop(bench.not_sent()),
                    3 => drop(bench.succeed(model)),
                    4 => bench.health.limit(None, &bench.policy, bench.now),
                    5 => {
                        let fault = KeyFault::Forbidden;
                        bench.health.key_fault(fault, &bench.policy, bench.now);
                    }
                    6 if bench.policy.check.enabled => drop(bench.bad()),
                    7 if bench.policy.check.enabled => drop(bench.check(&Checked::Good)),
                    _ => {}
                }
                if let Some(Leave::Try(ticket)) = leave {
                    bench.health.end_try(ticket, &bench.policy, bench.now);
                }
            }
            // It is mended: checks say so, and whoever may try finds it so.
            for _ in 0..3 {
                bench.later(1801.0);
                if bench.policy.check.enabled {
                    bench.check(&Checked::Good).check(&Checked::Good);
                }
                for model in ["a", "b"] {
                    assert!(bench.admit(model).is_some(), "walk {walk}");
                    bench.succeed(model);
                }
            }
            assert_eq!(bench.state(), (State::Ready, Reason::None), "walk {walk}");
        }
    }
}
