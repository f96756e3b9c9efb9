//! What the traffic itself tells of an upstream: ready, down, cooling, off.
//!
//! Nothing here asks the upstream anything: the exchange reports what it saw,
//! and [`Health::available`] says whether to go there now. Active checks will
//! report through the same functions.
//!
//! - *down*: a request could not be sent, or [`FAILURES_MAX`] in a row failed.
//!   For 1 s, then 2, 4, … up to 30 s (± 20 %) nobody goes there; after that one
//!   request at a time may try (*half-open*) until one succeeds.
//! - *cooling*: it asked for a pause (429, 503, `Retry-After`). A success does
//!   not end it: another request may have been let in before the pause began.
//! - *off*: switched off by the configuration.
//!
//! **Invariant:** atomics only, never a lock; `now` is always passed in. Two
//! reports at the same instant count as one: a hundred requests that fail
//! together do not add up to a hundred doublings.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    time::{Duration, Instant},
};

/// How many failures in a row take an upstream down.
pub const FAILURES_MAX: u32 = 5;
/// The first pause after going down; it doubles from there.
pub const DOWN_MIN: Duration = Duration::from_secs(1);
/// The longest pause of an upstream that is down.
pub const DOWN_MAX: Duration = Duration::from_secs(30);
/// The pause of an upstream that asked for one without saying how long.
pub const COOL_DEFAULT: Duration = Duration::from_secs(5);
/// The longest pause that an upstream may ask for.
pub const COOL_MAX: Duration = Duration::from_secs(30 * 60);

/// What an upstream is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It may be used.
    Ready,
    /// It did not answer as it should, and has not since.
    Down,
    /// It asked for a pause.
    Cooling,
    /// The configuration switched it off.
    Off,
}

impl State {
    /// Every state there is.
    pub const ALL: [Self; 4] = [Self::Ready, Self::Down, Self::Cooling, Self::Off];

    /// Returns the word for logs, `/health` and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Down => "down",
            Self::Cooling => "cooling",
            Self::Off => "off",
        }
    }
}

/// The state of one upstream. Times are milliseconds since `epoch`.
#[derive(Debug)]
pub struct Health {
    epoch: Instant,
    off: AtomicBool,
    /// Failures in a row.
    failures: AtomicU32,
    /// How often it went down since it last worked; 0 means it is not down.
    downs: AtomicU32,
    down_until: AtomicU64,
    cool_until: AtomicU64,
    /// Whether the last pause was asked for because of a rate limit.
    limited: AtomicBool,
    /// The ticket of the one request that tries a half-open upstream; 0 is none.
    probe: AtomicU64,
    tickets: AtomicU64,
}

/// Leave to go to an upstream, from [`Health::admit`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// Like everybody.
    Free,
    /// As the one request that tries; give the ticket back.
    Probe(u64),
}

impl Health {
    /// Makes the state of an upstream of which nothing is known, which counts
    /// as ready.
    pub fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            off: AtomicBool::new(false),
            failures: AtomicU32::new(0),
            downs: AtomicU32::new(0),
            down_until: AtomicU64::new(0),
            cool_until: AtomicU64::new(0),
            limited: AtomicBool::new(false),
            probe: AtomicU64::new(0),
            tickets: AtomicU64::new(0),
        }
    }

    /// Makes the state of an upstream that the configuration switched off.
    pub fn off(now: Instant) -> Self {
        let health = Self::new(now);
        health.off.store(true, SeqCst);
        health
    }

    /// Notes that a request could not be sent: DNS, connect or TLS failed.
    pub fn not_sent(&self, now: Instant) {
        self.go_down(now);
    }

    /// Notes a failure of the server after the request was sent.
    pub fn failed(&self, now: Instant) {
        // Saturation is out of reach: a u32 of failures in a row, each at most
        // one request.
        let failures = self.failures.fetch_add(1, SeqCst).saturating_add(1);
        if failures >= FAILURES_MAX || self.is_down() {
            self.go_down(now);
        }
    }

    /// Notes an answer as it should be.
    pub fn succeeded(&self) {
        // Read before written: on the ordinary path these lines stay shared
        // between the cores.
        if self.failures.load(SeqCst) != 0 {
            self.failures.store(0, SeqCst);
        }
        if self.is_down() {
            self.downs.store(0, SeqCst);
            self.down_until.store(0, SeqCst);
            self.probe.store(0, SeqCst);
        }
    }

    /// Notes that the upstream asked for a pause; `None` if it did not say how
    /// long. Never shortens a pause that runs.
    pub fn cool(&self, pause: Option<Duration>, now: Instant) {
        let pause = pause.unwrap_or(COOL_DEFAULT).min(COOL_MAX);
        self.limited.store(false, SeqCst);
        self.cool_until.fetch_max(self.millis(now + pause), SeqCst);
    }

    /// The same, because of its rate limit.
    pub fn limit(&self, pause: Option<Duration>, now: Instant) {
        self.cool(pause, now);
        self.limited.store(true, SeqCst);
    }

    /// Returns whether the last pause it asked for was because of its rate
    /// limit, and not for being overloaded.
    pub fn is_limited(&self) -> bool {
        self.limited.load(SeqCst)
    }

    /// Returns whether a request may go there now.
    pub fn available(&self, now: Instant) -> bool {
        self.wait(now).is_zero()
            && !self.is_off()
            && !(self.is_down() && self.probe.load(SeqCst) != 0)
    }

    /// Returns how long nobody should go there; zero also for an upstream that
    /// is off.
    pub fn wait(&self, now: Instant) -> Duration {
        let until = self
            .cool_until
            .load(SeqCst)
            .max(self.down_until.load(SeqCst));
        Duration::from_millis(until.saturating_sub(self.millis(now)))
    }

    /// Returns what the upstream is good for. One that is down stays so until
    /// an answer comes, also while it may be tried.
    pub fn state(&self, now: Instant) -> State {
        if self.is_off() {
            State::Off
        } else if self.is_down() {
            State::Down
        } else if !self.wait(now).is_zero() {
            State::Cooling
        } else {
            State::Ready
        }
    }

    /// Forgets everything but whether it is off.
    pub fn reset(&self) {
        self.succeeded();
        self.cool_until.store(0, SeqCst);
    }

    /// Returns whether the configuration switched it off.
    pub fn is_off(&self) -> bool {
        self.off.load(SeqCst)
    }

    /// Takes leave to go there now; `None` if [`Self::available`] is false, or
    /// another request was quicker to become the one that tries.
    pub(super) fn admit(&self, now: Instant) -> Option<Leave> {
        if !self.available(now) {
            return None;
        }
        if !self.is_down() {
            return Some(Leave::Free);
        }
        let ticket = self.tickets.fetch_add(1, SeqCst).wrapping_add(1).max(1);
        self.probe
            .compare_exchange(0, ticket, SeqCst, SeqCst)
            .is_ok()
            .then_some(Leave::Probe(ticket))
    }

    /// Lets the next request try. A ticket that is not the current one changes
    /// nothing: its request was overtaken by a success.
    pub(super) fn end_probe(&self, ticket: u64) {
        // Err means just that.
        self.probe.compare_exchange(ticket, 0, SeqCst, SeqCst).ok();
    }

    fn is_down(&self) -> bool {
        self.downs.load(SeqCst) != 0
    }

    fn go_down(&self, now: Instant) {
        let from = self.down_until.load(SeqCst);
        if self.millis(now) < from {
            return;
        }
        let pause = pause_after(self.downs.load(SeqCst));
        let until = self.millis(now + pause);
        // Whoever loses this race saw the same outage as the winner.
        if self
            .down_until
            .compare_exchange(from, until, SeqCst, SeqCst)
            .is_ok()
        {
            self.downs.fetch_add(1, SeqCst);
        }
    }

    fn millis(&self, at: Instant) -> u64 {
        let elapsed = at.saturating_duration_since(self.epoch).as_millis();
        u64::try_from(elapsed).unwrap_or(u64::MAX)
    }
}

/// Returns the pause of an upstream that was down `downs` times before: 1 s
/// doubling to 30 s, ± 20 % so that gateways do not come back together, and
/// never above 30 s.
fn pause_after(downs: u32) -> Duration {
    let pause = DOWN_MIN
        .saturating_mul(1_u32.checked_shl(downs.min(16)).unwrap_or(u32::MAX))
        .min(DOWN_MAX);
    pause.mul_f64(rand::random_range(0.8..1.2)).min(DOWN_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(secs: f64) -> Duration {
        Duration::from_secs_f64(secs)
    }

    #[test]
    fn a_pause_knows_whether_it_was_for_a_rate_limit() {
        let now = Instant::now();
        let health = Health::new(now);
        health.limit(Some(Duration::from_secs(9)), now);
        assert_eq!(
            (health.state(now), health.is_limited()),
            (State::Cooling, true)
        );
        health.cool(None, now);
        assert!(!health.is_limited());
        assert_eq!(health.wait(now), Duration::from_secs(9));
    }

    #[test]
    fn an_upstream_that_cannot_be_reached_is_down_for_about_a_second() {
        let now = Instant::now();
        let health = Health::new(now);
        assert!(health.available(now));
        health.not_sent(now);
        assert_eq!(health.state(now), State::Down);
        assert!(!health.available(now + secs(0.79)));
        assert!(health.available(now + secs(1.21)));
    }

    #[test]
    fn pauses_double_to_thirty_seconds_and_a_success_starts_again() {
        let mut now = Instant::now();
        let health = Health::new(now);
        for expected in [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0] {
            health.not_sent(now);
            let wait = health.wait(now).as_secs_f64();
            assert!(wait >= expected * 0.79, "{wait} of {expected}");
            assert!(wait <= (expected * 1.21).min(30.0), "{wait} of {expected}");
            now += health.wait(now);
        }
        health.succeeded();
        assert_eq!(health.state(now), State::Ready);
        health.not_sent(now);
        assert!(health.wait(now) <= secs(1.21));
    }

    #[test]
    fn a_crowd_that_fails_together_doubles_the_pause_once() {
        let now = Instant::now();
        let health = Health::new(now);
        for _ in 0..100 {
            health.not_sent(now);
        }
        assert!(health.wait(now) <= secs(1.21));
    }

    #[test]
    fn one_request_at_a_time_tries_an_upstream_that_was_down() {
        let start = Instant::now();
        let health = Health::new(start);
        health.not_sent(start);
        let now = start + secs(2.0);
        let Some(Leave::Probe(ticket)) = health.admit(now) else {
            panic!("the first may try");
        };
        assert!(!health.available(now));
        assert_eq!(health.admit(now), None);
        health.end_probe(ticket);
        assert!(matches!(health.admit(now), Some(Leave::Probe(_))));
        health.succeeded();
        assert_eq!(health.admit(now), Some(Leave::Free));
    }

    #[test]
    fn a_ticket_from_before_a_success_does_not_end_a_later_try() {
        let start = Instant::now();
        let health = Health::new(start);
        health.not_sent(start);
        let now = start + secs(2.0);
        let Some(Leave::Probe(old)) = health.admit(now) else {
            panic!("the first may try");
        };
        health.succeeded();
        health.not_sent(now);
        let later = now + secs(2.0);
        assert!(matches!(health.admit(later), Some(Leave::Probe(_))));
        health.end_probe(old);
        assert_eq!(health.admit(later), None);
    }

    #[test]
    fn five_failures_in_a_row_take_it_down_and_four_do_not() {
        let now = Instant::now();
        let health = Health::new(now);
        for _ in 0..4 {
            health.failed(now);
        }
        assert_eq!(health.state(now), State::Ready);
        health.succeeded();
        for _ in 0..4 {
            health.failed(now);
        }
        assert!(health.available(now));
        health.failed(now);
        assert_eq!(health.state(now), State::Down);
        assert!(!health.available(now));
    }

    #[test]
    fn one_failure_while_half_open_is_enough() {
        let start = Instant::now();
        let health = Health::new(start);
        health.not_sent(start);
        let now = start + secs(2.0);
        health.failed(now);
        assert!(!health.available(now + secs(1.5)));
    }

    #[test]
    fn a_pause_is_kept_as_asked_within_thirty_minutes() {
        let now = Instant::now();
        let health = Health::new(now);
        health.cool(None, now);
        assert_eq!(health.state(now), State::Cooling);
        assert_eq!(health.wait(now), COOL_DEFAULT);
        health.cool(Some(secs(1.0)), now);
        assert_eq!(health.wait(now), COOL_DEFAULT);
        health.succeeded();
        assert!(!health.available(now));
        health.cool(Some(secs(1e6)), now);
        assert_eq!(health.wait(now), COOL_MAX);
        assert_eq!(health.state(now + COOL_MAX), State::Ready);
    }

    #[test]
    fn reset_forgets_pauses_but_not_that_it_is_off() {
        let now = Instant::now();
        let health = Health::new(now);
        health.cool(None, now);
        health.not_sent(now);
        health.reset();
        assert_eq!(health.state(now), State::Ready);
        assert!(health.available(now));
        let off = Health::off(now);
        off.reset();
        off.succeeded();
        assert_eq!(off.state(now), State::Off);
        assert!(!off.available(now));
        assert_eq!(off.admit(now), None);
    }
}
