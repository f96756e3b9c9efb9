//! One breaker: what an upstream does with one model.
//!
//! *closed*: everybody may go. *open*: nobody, for a time that doubles with each
//! opening (jittered upwards, to a cap). *half open*: one request at a time
//! tries; a failure opens it again, a whole answer closes it.
//!
//! A long stream would keep the others waiting for its end, so a first token
//! that was followed by [`TRUST`] without a failure closes it too, on
//! *probation*: until the first whole answer a single failure opens it again.
//!
//! **Invariant:** what became of a request that began before the breaker last
//! opened is old news and changes nothing: a hundred requests that fail
//! together open it once.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::config;

/// How long a stream of the probing request has to flow to count as an answer.
pub const TRUST: Duration = Duration::from_secs(5);
/// How many failures in a row open a breaker although the group can spare no
/// further upstream: it answers nobody, so nothing is lost.
pub const HOPELESS: u32 = 20;
/// How often an open breaker may be tried before its time when there is nobody
/// else at all, unless the configuration names how long it stays open.
pub const PANIC_EVERY: Duration = Duration::from_secs(1);

/// The first open time, where the configuration names none.
const OPEN: Duration = Duration::from_secs(5);
/// Into how many parts the window is cut.
const PARTS: u32 = 10;

/// When a breaker opens, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Failures in a row.
    pub failures: Option<u32>,
    /// Hundredths of failures among at least so many requests in the window.
    pub share: Option<(u8, u32)>,
    /// Failures in the window.
    pub errors: Option<u32>,
    /// Over which `share` and `errors` count.
    pub window: Duration,
    /// The first open time.
    pub open: Duration,
    /// The longest open time; at least `open`.
    pub open_max: Duration,
    /// Whether the configuration names `open`: then nobody goes there earlier.
    pub strict: bool,
}

impl Rules {
    /// Returns the rules that a configuration describes.
    pub fn of(config: &config::Breaker) -> Self {
        let named = config.failures.is_some() || config.share.is_some() || config.errors.is_some();
        let (failures, share) = if named {
            (config.failures, config.share.map(|share| share.0))
        } else {
            (Some(5), Some(50))
        };
        let open = config.open.map_or(OPEN, config::Time::get);
        Self {
            failures,
            share: share.map(|share| (share, config.volume)),
            errors: config.errors,
            window: config.window.get(),
            open,
            open_max: config.open_max.get().max(open),
            strict: config.open.is_some(),
        }
    }
}

/// How a server failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It answered with an error, or not in time.
    Answer,
    /// The connection died. What was under way at the same time died of the same
    /// cause: of many such deaths, one counts.
    Death,
}

/// Whether a group can spare one more upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spare {
    /// It can.
    Yes,
    /// As many as may are out already.
    No,
}

/// What a breaker says to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Says {
    /// Go, like everybody.
    Go,
    /// Go as the one that tries.
    Try,
    /// Do not go.
    Stop,
}

/// What a breaker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Everybody may go.
    Closed,
    /// Nobody may go.
    Open,
    /// One at a time may try.
    HalfOpen,
}

impl Phase {
    /// Returns the word for logs and labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// What a report came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// Nothing that anybody would notice.
    Nothing,
    /// Another phase.
    Changed,
    /// It should have opened, but the group could not spare it.
    Spared,
}

/// The breaker of one upstream for one model.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    /// `None` while it is closed.
    shut: Option<Shut>,
    /// How often it opened since it last gave a whole answer.
    times: u32,
    /// When it last opened.
    opened: Option<Instant>,
    /// When a connection last died that counted.
    died: Option<Instant>,
    /// Closed on trust: one failure opens it.
    probation: bool,
    /// Failures in a row.
    row: u32,
    /// The last failures, as many as `errors` counts.
    errors: VecDeque<Instant>,
    window: Window,
    /// Requests that are being answered right now.
    pub(super) answering: u32,
    /// Whether it has ever answered with this model.
    answered: bool,
    last_used: Option<Instant>,
}

#[derive(Debug)]
struct Shut {
    /// From when on somebody may try.
    until: Instant,
    /// The ticket of who tries; 0 is nobody.
    ticket: u64,
    /// When somebody last began to try.
    tried: Instant,
    /// Whether that was before the time.
    early: bool,
    /// When who tries got the first token.
    token: Option<Instant>,
}

impl Breaker {
    /// Returns what it is now.
    pub(super) fn phase(&self, now: Instant) -> Phase {
        match &self.shut {
            None => Phase::Closed,
            Some(shut) if shut.trusted(now) => Phase::Closed,
            Some(shut) if shut.ticket != 0 || now >= shut.until => Phase::HalfOpen,
            Some(_) => Phase::Open,
        }
    }

    /// Returns whether a request may go.
    pub(super) fn says(&self, now: Instant) -> Says {
        match (&self.shut, self.phase(now)) {
            (_, Phase::Closed) => Says::Go,
            (Some(shut), Phase::HalfOpen) if shut.ticket == 0 => Says::Try,
            _ => Says::Stop,
        }
    }

    /// Returns whether a request may go when there is nobody else at all.
    pub(super) fn says_in_panic(&self, rules: &Rules, now: Instant) -> Says {
        match (&self.shut, self.says(now)) {
            (Some(_), Says::Stop) if rules.strict => Says::Stop,
            (Some(shut), Says::Stop) if shut.ticket == 0 && now >= shut.tried + PANIC_EVERY => {
                Says::Try
            }
            // Whoever tries is being answered: better than nobody.
            (Some(shut), Says::Stop) if shut.ticket != 0 && shut.token.is_some() => Says::Go,
            (_, says) => says,
        }
    }

    /// Returns how long nobody may go.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        match (&self.shut, self.phase(now)) {
            (Some(shut), Phase::Open) => shut.until.saturating_duration_since(now),
            _ => Duration::ZERO,
        }
    }

    /// Notes who tries.
    pub(super) fn begin_try(&mut self, ticket: u64, now: Instant) {
        if let Some(shut) = &mut self.shut {
            (shut.ticket, shut.tried, shut.token) = (ticket, now, None);
            shut.early = now < shut.until;
        }
    }

    /// Lets the next one try, if nothing was learnt from this one.
    pub(super) fn end_try(&mut self, ticket: u64, now: Instant) {
        self.settle(now);
        if let Some(shut) = self.shut.as_mut().filter(|shut| shut.ticket == ticket) {
            (shut.ticket, shut.token) = (0, None);
        }
    }

    /// Notes a first token of a request that began at `began`.
    pub(super) fn token(&mut self, began: Instant, now: Instant) {
        self.answering += 1;
        self.answered = true;
        self.last_used = Some(now);
        if self.is_news(began)
            && let Some(shut) = self.shut.as_mut().filter(|shut| shut.ticket != 0)
        {
            shut.token.get_or_insert(now);
        }
    }

    /// Notes a whole answer.
    pub(super) fn succeeded(&mut self, rules: &Rules, began: Instant, now: Instant) -> Came {
        let settled = self.settle(now);
        self.answered = true;
        self.last_used = Some(now);
        if !self.is_news(began) {
            return settled;
        }
        match &self.shut {
            // Open, and nobody was sent to try: the request began in between.
            Some(shut) if shut.ticket == 0 => return settled,
            Some(_) => {
                self.close();
                self.times = 0;
                return Came::Changed;
            }
            None => {}
        }
        (self.row, self.times, self.probation) = (0, 0, false);
        self.window.note(rules.window, now, |part| part.good += 1);
        settled
    }

    /// Notes a failure of the server.
    pub(super) fn failed(
        &mut self,
        rules: &Rules,
        (fault, spare): (Fault, Spare),
        began: Instant,
        now: Instant,
    ) -> Came {
        let settled = self.settle(now);
        self.last_used = Some(now);
        if !self.is_news(began) {
            return settled;
        }
        if fault == Fault::Death {
            if self.died.is_some_and(|died| began < died) {
                return settled;
            }
            self.died = Some(now);
        }
        if let Some(shut) = &mut self.shut {
            if shut.ticket == 0 {
                return settled;
            }
            if shut.early {
                // It went only since there was nobody else: its time neither
                // doubles nor begins anew.
                (shut.ticket, shut.token) = (0, None);
                return Came::Changed;
            }
            self.open(rules, now);
            return Came::Changed;
        }
        self.row = self.row.saturating_add(1);
        self.window.note(rules.window, now, |part| part.bad += 1);
        if let Some(most) = rules.errors {
            self.errors.push_back(now);
            while self.errors.len() > usize::try_from(most).unwrap_or(usize::MAX) {
                self.errors.pop_front();
            }
        }
        if !self.is_due(rules, now) {
            return settled;
        }
        let hopeless = self.row >= HOPELESS.max(rules.failures.unwrap_or(0));
        if spare == Spare::No && !hopeless {
            return Came::Spared;
        }
        self.open(rules, now);
        Came::Changed
    }

    /// Forgets everything but what is under way.
    pub(super) fn reset(&mut self) {
        *self = Self {
            answering: self.answering,
            ..Self::default()
        };
    }

    /// Lets somebody try at once: what it opened for seems to be over. Never where
    /// the configuration names how long it stays open.
    pub(super) fn hurry(&mut self, rules: &Rules, now: Instant) -> Came {
        match &mut self.shut {
            Some(shut) if !rules.strict && now < shut.until => {
                shut.until = now;
                Came::Changed
            }
            _ => Came::Nothing,
        }
    }

    /// Returns whether it has opened since then.
    pub(super) fn has_opened_since(&self, since: Instant) -> bool {
        self.opened.is_some_and(|opened| opened >= since)
    }

    /// Makes a trusted stream count; call before anything is noted.
    pub(super) fn settle(&mut self, now: Instant) -> Came {
        if self.shut.as_ref().is_some_and(|shut| shut.trusted(now)) {
            self.close();
            self.probation = true;
            return Came::Changed;
        }
        Came::Nothing
    }

    /// Returns whether nothing of interest would be lost with it: nobody has come
    /// for a window, nor since somebody might have tried.
    pub(super) fn is_forgettable(&self, rules: &Rules, now: Instant) -> bool {
        let old = |at: Instant| now.saturating_duration_since(at) > rules.window;
        let is_shut = self
            .shut
            .as_ref()
            .is_some_and(|shut| shut.ticket != 0 || !old(shut.until));
        !is_shut && self.answering == 0 && self.last_used.is_none_or(old)
    }

    /// Returns what it is worth to know, if it may be forgotten at all: what never
    /// answered with a model may not even have it. What stops requests with one
    /// that it has stays.
    pub(super) fn worth(&self) -> Option<(bool, Option<Instant>)> {
        let is_idle = self.answering == 0;
        let may_go = match &self.shut {
            None => is_idle,
            Some(shut) => is_idle && !self.answered && shut.ticket == 0,
        };
        may_go.then_some((self.answered, self.last_used))
    }

    fn is_news(&self, began: Instant) -> bool {
        self.opened.is_none_or(|opened| began >= opened)
    }

    fn is_due(&self, rules: &Rules, now: Instant) -> bool {
        let in_row = rules.failures.is_some_and(|most| self.row >= most);
        let in_share = rules.share.is_some_and(|(share, volume)| {
            let (good, bad) = self.window.count(rules.window, now);
            let all = good + bad;
            all >= volume.into() && bad * 100 >= all * u64::from(share)
        });
        let in_window = rules.errors.is_some_and(|most| {
            let oldest = self.errors.front();
            self.errors.len() >= usize::try_from(most).unwrap_or(usize::MAX)
                && oldest.is_some_and(|at| now.saturating_duration_since(*at) <= rules.window)
        });
        self.probation || in_row || in_share || in_window
    }

    fn open(&mut self, rules: &Rules, now: Instant) {
        let pause = pause_after(rules, self.times);
        self.times = self.times.saturating_add(1);
        self.opened = Some(now);
        self.forget();
        self.shut = Some(Shut {
            until: now + pause,
            ticket: 0,
            tried: now,
            early: false,
            token: None,
        });
    }

    fn close(&mut self) {
        self.shut = None;
        self.forget();
    }

    fn forget(&mut self) {
        (self.row, self.probation) = (0, false);
        self.errors.clear();
        self.window = Window::default();
    }
}

impl Shut {
    fn trusted(&self, now: Instant) -> bool {
        let flowing = |at: Instant| now.saturating_duration_since(at) >= TRUST;
        self.ticket != 0 && self.token.is_some_and(flowing)
    }
}

/// Returns the open time of a breaker that opened `times` times before: doubling
/// to the cap, up to 20 % longer so that gateways do not come back together. At
/// the cap up to 20 % shorter instead; never shorter than the first.
fn pause_after(rules: &Rules, times: u32) -> Duration {
    let doubled = 1_u32.checked_shl(times.min(20)).unwrap_or(u32::MAX);
    let pause = rules.open.saturating_mul(doubled);
    let later = pause.mul_f64(rand::random_range(1.0..1.2));
    if later < rules.open_max {
        return later;
    }
    let earlier = rules.open_max.mul_f64(rand::random_range(0.8..1.0));
    earlier.max(rules.open)
}

/// How often something went well and badly in the last while, in parts of a
/// tenth of it: what is counted reaches back nine to ten tenths.
#[derive(Debug, Default)]
struct Window {
    parts: VecDeque<Part>,
}

#[derive(Debug)]
struct Part {
    began: Instant,
    good: u32,
    bad: u32,
}

impl Window {
    fn note(&mut self, length: Duration, now: Instant, count: impl FnOnce(&mut Part)) {
        while let Some(oldest) = self.parts.front()
            && now.saturating_duration_since(oldest.began) >= length
        {
            self.parts.pop_front();
        }
        let current = |part: &&mut Part| now.saturating_duration_since(part.began) < length / PARTS;
        if let Some(part) = self.parts.back_mut().filter(current) {
            return count(part);
        }
        let mut part = Part {
            began: now,
            good: 0,
            bad: 0,
        };
        count(&mut part);
        self.parts.push_back(part);
    }

    fn count(&self, length: Duration, now: Instant) -> (u64, u64) {
        let live = |part: &&Part| now.saturating_duration_since(part.began) < length;
        self.parts
            .iter()
            .filter(live)
            .fold((0, 0), |(good, bad), part| {
                (good + u64::from(part.good), bad + u64::from(part.bad))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(yaml: &str) -> Rules {
        Rules::of(&serde_yaml::from_str(yaml).unwrap())
    }

    /// A breaker with its clock.
    struct Bench {
        breaker: Breaker,
        rules: Rules,
        now: Instant,
        tickets: u64,
    }

    impl Bench {
        fn new(yaml: &str) -> Self {
            Self {
                breaker: Breaker::default(),
                rules: rules(yaml),
                now: Instant::now(),
                tickets: 0,
            }
        }

        fn later(&mut self, secs: f64) -> &mut Self {
            self.now += Duration::from_secs_f64(secs);
            self
        }

        fn fail(&mut self) -> &mut Self {
            self.breaker
                .failed(&self.rules, (Fault::Answer, Spare::Yes), self.now, self.now);
            self
        }

        fn succeed(&mut self) -> &mut Self {
            self.breaker.succeeded(&self.rules, self.now, self.now);
            self
        }

        fn try_it(&mut self) -> u64 {
            assert_eq!(self.breaker.says(self.now), Says::Try);
            self.begin()
        }

        fn begin(&mut self) -> u64 {
            self.tickets += 1;
            self.breaker.begin_try(self.tickets, self.now);
            self.tickets
        }

        fn phase(&self) -> Phase {
            self.breaker.phase(self.now)
        }

        fn wait(&self) -> f64 {
            self.breaker.wait(self.now).as_secs_f64()
        }
    }

    #[test]
    fn five_in_a_row_open_it_and_a_success_starts_the_row_again() {
        let mut bench = Bench::new("{}");
        for _ in 0..4 {
            bench.fail();
        }
        bench.succeed();
        for _ in 0..4 {
            bench.fail();
        }
        assert_eq!(bench.phase(), Phase::Closed);
        bench.later(0.1).fail();
        assert_eq!(bench.phase(), Phase::Open);
        assert!((5.0..=6.0).contains(&bench.wait()), "{}", bench.wait());
    }

    #[test]
    fn half_of_twenty_in_thirty_seconds_open_it() {
        let mut bench = Bench::new("{}");
        for _ in 0..9 {
            bench.later(0.5).succeed().fail();
        }
        assert_eq!(bench.phase(), Phase::Closed);
        bench.later(0.5).succeed().fail();
        assert_eq!(bench.phase(), Phase::Open);

        let mut slow = Bench::new("{}");
        for _ in 0..40 {
            slow.later(4.0).succeed().fail();
        }
        assert_eq!(slow.phase(), Phase::Closed, "never twenty in a window");
    }

    #[test]
    fn three_failures_and_three_hundred_seconds_are_one_line() {
        let mut bench = Bench::new("{ failures: 3, open: 300s }");
        for _ in 0..30 {
            bench.fail().fail().succeed();
        }
        assert_eq!(bench.phase(), Phase::Closed, "no other rule holds");
        bench.fail().fail().fail();
        assert_eq!(bench.wait(), 300.0);
        bench.later(299.0);
        assert_eq!(bench.phase(), Phase::Open);
        assert_eq!(
            bench.breaker.says_in_panic(&bench.rules, bench.now),
            Says::Stop
        );
        bench.later(1.0).try_it();
        bench.fail();
        assert_eq!(bench.wait(), 300.0);
    }

    #[test]
    fn ten_errors_in_three_hundred_seconds_are_one_line() {
        let mut bench = Bench::new("{ errors: 10, window: 300s }");
        for _ in 0..9 {
            bench.later(33.0).fail().succeed();
        }
        assert_eq!(bench.phase(), Phase::Closed);
        bench.later(33.0).fail();
        assert_eq!(bench.phase(), Phase::Open);
        let mut slow = Bench::new("{ errors: 10, window: 300s }");
        for _ in 0..50 {
            slow.later(33.5).fail();
        }
        assert_eq!(slow.phase(), Phase::Closed, "nine in any 300 s");
    }

    #[test]
    fn one_at_a_time_tries_and_what_comes_of_it_decides() {
        let mut bench = Bench::new("{}");
        for _ in 0..5 {
            bench.fail();
        }
        bench.later(6.1);
        assert_eq!(bench.phase(), Phase::HalfOpen);
        let first = bench.try_it();
        assert_eq!(bench.breaker.says(bench.now), Says::Stop);
        // It ended without a word: the next may try.
        bench.breaker.end_try(first, bench.now);
        bench.try_it();
        bench.breaker.end_try(first, bench.now);
        assert_eq!(bench.breaker.says(bench.now), Says::Stop, "an old ticket");
        bench.fail();
        assert!((10.0..=12.0).contains(&bench.wait()), "{}", bench.wait());
        bench.later(12.1).try_it();
        bench.succeed();
        assert_eq!(bench.phase(), Phase::Closed);
        for _ in 0..5 {
            bench.fail();
        }
        assert!(bench.wait() <= 6.0, "a success starts again");
    }

    #[test]
    fn open_times_double_to_a_minute() {
        let mut bench = Bench::new("{}");
        for _ in 0..5 {
            bench.fail();
        }
        for expected in [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0] {
            let wait = bench.wait();
            let least = if expected < 60.0 { expected } else { 48.0 };
            assert!(
                wait >= least && wait <= (expected * 1.2).min(60.0),
                "{wait} of {expected}"
            );
            bench.later(wait).try_it();
            bench.fail();
        }
    }

    #[test]
    fn a_crowd_that_fails_together_opens_it_once() {
        let mut bench = Bench::new("{}");
        let began = bench.now;
        bench.later(1.0);
        for _ in 0..100 {
            bench
                .breaker
                .failed(&bench.rules, (Fault::Answer, Spare::Yes), began, bench.now);
        }
        assert!(bench.wait() <= 6.0);
        // Stragglers decide nothing while one tries.
        bench.later(6.1).try_it();
        bench
            .breaker
            .failed(&bench.rules, (Fault::Answer, Spare::Yes), began, bench.now);
        bench.breaker.succeeded(&bench.rules, began, bench.now);
        assert_eq!(bench.phase(), Phase::HalfOpen);
    }

    #[test]
    fn a_crash_under_many_requests_is_one_failure_and_five_crashes_are_five() {
        let mut bench = Bench::new("{}");
        for crash in 0..5 {
            assert_eq!(bench.phase(), Phase::Closed, "crash {crash}");
            let began = bench.now;
            bench.later(1.0);
            for _ in 0..50 {
                let how = (Fault::Death, Spare::Yes);
                bench.breaker.failed(&bench.rules, how, began, bench.now);
            }
        }
        assert_eq!(bench.phase(), Phase::Open);
    }

    #[test]
    fn a_stream_that_flows_closes_it_on_probation() {
        let mut bench = Bench::new("{}");
        for _ in 0..5 {
            bench.fail();
        }
        bench.later(6.1).try_it();
        bench.breaker.token(bench.now, bench.now);
        bench.later(4.9);
        assert_eq!(bench.breaker.says(bench.now), Says::Stop);
        bench.later(0.1);
        assert_eq!(bench.breaker.says(bench.now), Says::Go);
        bench.fail();
        assert!((10.0..=12.0).contains(&bench.wait()), "one is enough");
    }

    #[test]
    fn what_a_group_cannot_spare_stays_until_it_answers_nobody() {
        let mut bench = Bench::new("{}");
        let fail = |bench: &mut Bench| {
            bench.breaker.failed(
                &bench.rules,
                (Fault::Answer, Spare::No),
                bench.now,
                bench.now,
            )
        };
        for nth in 1..20 {
            let came = fail(&mut bench);
            assert_eq!(came == Came::Spared, nth >= 5, "{nth}");
        }
        assert_eq!(bench.phase(), Phase::Closed);
        assert_eq!(fail(&mut bench), Came::Changed);
        assert_eq!(bench.phase(), Phase::Open);
        // Once a second somebody may look, if there is nobody else.
        assert_eq!(
            bench.breaker.says_in_panic(&bench.rules, bench.now),
            Says::Stop
        );
        bench.later(1.0);
        assert_eq!(
            bench.breaker.says_in_panic(&bench.rules, bench.now),
            Says::Try
        );
    }

    #[test]
    fn tries_before_the_time_close_it_and_never_make_it_longer() {
        let mut bench = Bench::new("{}");
        for _ in 0..5 {
            bench.fail();
        }
        let until = bench.wait();
        let panic = |bench: &Bench| bench.breaker.says_in_panic(&bench.rules, bench.now);
        for nth in 1..5 {
            assert_eq!(panic(bench.later(1.0)), Says::Try);
            bench.begin();
            assert_eq!(panic(&bench), Says::Stop);
            bench.fail();
            assert!((bench.wait() + f64::from(nth) - until).abs() < 0.001);
        }
        // Whoever tries is being answered.
        bench.later(1.0).begin();
        bench.breaker.token(bench.now, bench.now);
        assert_eq!(panic(&bench), Says::Go);
        bench.succeed();
        assert_eq!(bench.phase(), Phase::Closed);
    }

    #[test]
    fn one_that_is_hurried_is_tried_at_once_and_opens_for_longer_if_it_fails() {
        let mut bench = Bench::new("{}");
        for _ in 0..5 {
            bench.fail();
        }
        bench.later(1.0);
        let came = bench.breaker.hurry(&bench.rules, bench.now);
        assert_eq!(came, Came::Changed);
        assert_eq!(bench.breaker.says(bench.now), Says::Try);
        bench.try_it();
        bench.fail();
        assert!((10.0..=12.0).contains(&bench.wait()), "{}", bench.wait());
        let mut named = Bench::new("{ failures: 3, open: 60s }");
        named.fail().fail().fail();
        let came = named.breaker.hurry(&named.rules, named.now);
        assert_eq!(came, Came::Nothing);
        assert_eq!(named.phase(), Phase::Open);
    }

    #[test]
    fn no_walk_leads_out_of_the_rules() {
        // xorshift64: the same walks each time.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut opened = 0;
        for walk in 0..300 {
            let mut bench =
                Bench::new("{ failures: 3, share: 50%, errors: 7, open: 2s, open_max: 9s }");
            let mut trying = None;
            for _ in 0..300 {
                bench.later(next(40) as f64 / 10.0);
                // Only who was let in has something to tell.
                let says = bench.breaker.says(bench.now);
                match (says, trying) {
                    (Says::Try, _) => trying = Some(bench.try_it()),
                    (Says::Stop, None) => {
                        assert_eq!(bench.phase(), Phase::Open, "walk {walk}");
                        continue;
                    }
                    _ => {}
                }
                let before = bench.phase();
                match next(5) {
                    0..=2 => {
                        bench.fail();
                    }
                    3 => {
                        bench.succeed();
                        assert_eq!(bench.phase(), Phase::Closed, "walk {walk}");
                    }
                    _ => {
                        if let Some(ticket) = trying {
                            bench.breaker.end_try(ticket, bench.now);
                        }
                    }
                }
                trying = None;
                if let Phase::Open = bench.phase() {
                    opened += 1;
                    assert!((2.0..=9.0).contains(&bench.wait()), "{}", bench.wait());
                } else if before == Phase::HalfOpen {
                    assert_ne!(bench.breaker.says(bench.now), Says::Stop, "walk {walk}");
                }
            }
        }
        assert!(opened > 1000, "{opened}");
    }
}
