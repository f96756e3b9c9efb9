//! What is wrong at the moment, and which of it one receiver has been told.
//! Without I/O: what happens goes in with its time, what is to be told comes out,
//! and whether it arrived goes in again.
//!
//! A trouble is told at once; when it is over, that is told too. The same trouble
//! again is not told before `cooldown` has passed since it was last told: then it
//! is, if it is still there. What did not arrive was not told: it is tried again
//! as long as it is so.
//!
//! **Invariant:** nobody is told the end of what he was not told the beginning of.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long nobody must have been served by a fallback until that is over.
pub(super) const FALLBACK_OVER: Duration = Duration::from_secs(60);
/// How long it is waited before what did not arrive is told again; twice as long
/// after each further time.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The longest of these waits.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// The most troubles that are known at once: upstreams × models can be many.
const TROUBLES_MAX: usize = 1000;

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// An upstream cannot be reached, or is not well.
    Down,
    /// A breaker is open.
    Breaker,
    /// An upstream refuses our key, or has no quota left.
    Key,
    /// A route is served by its fallback.
    Fallback,
    /// Exchanges that should be captured are lost.
    Capture,
    /// The budget of a key is nearly used, or used up.
    Budget,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [
        Self::Down,
        Self::Breaker,
        Self::Key,
        Self::Fallback,
        Self::Capture,
        Self::Budget,
    ];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Breaker => "breaker",
            Self::Key => "key",
            Self::Fallback => "fallback",
            Self::Capture => "capture",
            Self::Budget => "budget",
        }
    }
}

/// Something that was noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) kind: Kind,
    /// What it is about: an upstream, a route, a key, a folder.
    pub(super) subject: Arc<str>,
    /// Whether it is wrong; else it is right again.
    pub(super) wrong: bool,
    /// In a few words: what is wrong.
    pub(super) detail: String,
}

/// What a notice comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Noticed {
    /// Whether there may be something to tell now.
    pub(super) news: bool,
    /// What was forgotten for it, although it had never been told.
    pub(super) forgot: Option<Kind>,
}

/// Something to tell people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Alert {
    /// By which its end is reported.
    pub(super) ticket: u64,
    pub(super) kind: Kind,
    pub(super) subject: Arc<str>,
    pub(super) wrong: bool,
    pub(super) detail: String,
    /// How often it came again without being told.
    pub(super) suppressed: u32,
}

/// How a receiver wants to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    /// The least time between two alerts of one trouble.
    pub(super) cooldown: Duration,
    /// Whether ends are told.
    pub(super) recovery: bool,
}

#[derive(Clone, Debug)]
struct Trouble {
    wrong: bool,
    /// Whether the receiver knows that it is wrong: it was told so, and not yet
    /// that it is over.
    known: bool,
    told_at: Option<Instant>,
    noticed_at: Instant,
    detail: String,
    suppressed: u32,
    /// Counts the steps of a budget, each of which is told.
    step: u32,
    sending: Option<Sending>,
    /// How often in a row it did not arrive.
    failures: u32,
    retry_at: Option<Instant>,
}

/// An alert on its way.
#[derive(Clone, Debug)]
struct Sending {
    ticket: u64,
    wrong: bool,
    step: u32,
    suppressed: u32,
    at: Instant,
}

type Key = (Kind, Arc<str>);

/// All troubles, as one receiver knows them.
#[derive(Clone, Debug, Default)]
pub(super) struct Board {
    troubles: HashMap<Key, Trouble>,
}

impl Board {
    /// Takes a notice.
    pub(super) fn notice(&mut self, notice: &Notice, rules: Rules, now: Instant) -> Noticed {
        let key = (notice.kind, Arc::clone(&notice.subject));
        if !notice.wrong {
            let known = self.troubles.get_mut(&key);
            let ended = known.filter(|trouble| trouble.wrong).map(|trouble| {
                trouble.wrong = false;
                trouble.detail.clone_from(&notice.detail);
            });
            return Noticed {
                news: ended.is_some(),
                forgot: None,
            };
        }
        let forgot = match self.troubles.contains_key(&key) {
            true => None,
            false => self.make_room(),
        };
        let trouble = self
            .troubles
            .entry(key)
            .or_insert_with(|| Trouble::new(now));
        // Of a budget each step is noticed once in its day or month, and nobody
        // says when that is over.
        let is_step = notice.kind == Kind::Budget;
        let news = !trouble.wrong || is_step;
        trouble.wrong = true;
        trouble.noticed_at = now;
        if news {
            trouble.detail.clone_from(&notice.detail);
            if is_step {
                trouble.known = false;
                trouble.told_at = None;
                trouble.step = trouble.step.wrapping_add(1);
            }
            if !trouble.known && trouble.is_cooling(rules, now) {
                trouble.suppressed = trouble.suppressed.saturating_add(1);
            }
        }
        Noticed { news, forgot }
    }

    /// Returns what is to be told now, at most so many; each of them is on its
    /// way until [`report`](Self::report) says what became of it.
    ///
    /// That may also be what time alone makes worth telling: troubles that came
    /// again too soon and are still there, fallbacks that are no longer in use,
    /// and what did not arrive before.
    pub(super) fn due(
        &mut self,
        rules: Rules,
        most: usize,
        tickets: &mut u64,
        now: Instant,
    ) -> Vec<Alert> {
        let mut due: Vec<_> = self
            .troubles
            .iter_mut()
            .filter_map(|(key, trouble)| {
                let is_due = trouble.is_due(key.0, rules, now);
                is_due.then_some((key, trouble))
            })
            .collect();
        due.sort_by_key(|(_, trouble)| trouble.noticed_at);
        due.into_iter()
            .take(most)
            .map(|(key, trouble)| {
                *tickets += 1;
                trouble.send(key, *tickets, now)
            })
            .collect()
    }

    /// Takes what became of an alert. One of another board is none of ours.
    pub(super) fn report(&mut self, ticket: u64, arrived: bool, now: Instant) {
        for trouble in self.troubles.values_mut() {
            let is_it = |sending: &mut Sending| sending.ticket == ticket;
            if let Some(sent) = trouble.sending.take_if(is_it) {
                return trouble.report(&sent, arrived, now);
            }
        }
    }

    /// Returns the board of the same receiver under other settings: it knows
    /// what it knew, of the kinds that it is still told of.
    pub(super) fn heir(&self, wanted: &[Kind]) -> Self {
        let mut heir = self.clone();
        heir.troubles.retain(|(kind, _), _| wanted.contains(kind));
        heir
    }

    /// Learns from the board of another receiver what is wrong: it is told to
    /// this one too. What a budget was at is told to those who were there.
    pub(super) fn learn(&mut self, other: &Self, wanted: &[Kind]) {
        for (key, trouble) in &other.troubles {
            let is_news = trouble.wrong && key.0 != Kind::Budget && wanted.contains(&key.0);
            let has_room = self.troubles.len() < TROUBLES_MAX;
            if is_news && has_room && !self.troubles.contains_key(key) {
                let learned = Trouble {
                    wrong: true,
                    detail: trouble.detail.clone(),
                    ..Trouble::new(trouble.noticed_at)
                };
                self.troubles.insert(key.clone(), learned);
            }
        }
    }

    /// Forgets one that is over, the longest known first; else one of those
    /// that are not: what is new matters more. Returns what should have been
    /// told and was not.
    fn make_room(&mut self) -> Option<Kind> {
        if self.troubles.len() < TROUBLES_MAX {
            return None;
        }
        let oldest = self
            .troubles
            .iter()
            .min_by_key(|(_, trouble)| (trouble.wrong, trouble.noticed_at))
            .map(|(key, _)| key.clone())?;
        let forgotten = self.troubles.remove(&oldest)?;
        (forgotten.wrong && !forgotten.known).then_some(oldest.0)
    }
}

impl Trouble {
    fn new(now: Instant) -> Self {
        Self {
            wrong: false,
            known: false,
            told_at: None,
            noticed_at: now,
            detail: String::new(),
            suppressed: 0,
            step: 0,
            sending: None,
            failures: 0,
            retry_at: None,
        }
    }

    fn is_cooling(&self, rules: Rules, now: Instant) -> bool {
        self.told_at
            .is_some_and(|at| now.saturating_duration_since(at) < rules.cooldown)
    }

    fn is_due(&mut self, kind: Kind, rules: Rules, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.noticed_at);
        if kind == Kind::Fallback && self.wrong && idle >= FALLBACK_OVER {
            self.wrong = false;
            "no longer served by its fallback".clone_into(&mut self.detail);
        }
        if self.sending.is_some() {
            return false;
        }
        if !self.wrong && !rules.recovery {
            self.known = false;
        }
        let has_news = match (self.wrong, self.known) {
            (true, false) => !self.is_cooling(rules, now),
            (wrong, known) => wrong != known,
        };
        has_news && self.retry_at.is_none_or(|at| now >= at)
    }

    fn send(&mut self, key: &Key, ticket: u64, now: Instant) -> Alert {
        let suppressed = if self.wrong { self.suppressed } else { 0 };
        self.sending = Some(Sending {
            ticket,
            wrong: self.wrong,
            step: self.step,
            suppressed,
            at: now,
        });
        Alert {
            ticket,
            kind: key.0,
            subject: Arc::clone(&key.1),
            wrong: self.wrong,
            detail: self.detail.clone(),
            suppressed,
        }
    }

    fn report(&mut self, sent: &Sending, arrived: bool, now: Instant) {
        if !arrived {
            self.failures = self.failures.saturating_add(1);
            let wait = RETRY_FIRST.saturating_mul(1 << (self.failures - 1).min(16));
            self.retry_at = Some(now + wait.min(RETRY_MAX));
            return;
        }
        self.failures = 0;
        self.retry_at = None;
        // A budget may have come to its next step meanwhile.
        let is_last_step = sent.step == self.step;
        self.known = sent.wrong && is_last_step;
        if sent.wrong {
            self.told_at = Some(sent.at).filter(|_| is_last_step);
            self.suppressed = self.suppressed.saturating_sub(sent.suppressed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOLDOWN: Duration = Duration::from_secs(300);
    const RULES: Rules = Rules {
        cooldown: COOLDOWN,
        recovery: true,
    };

    /// A board with a receiver that is there, or is not.
    struct Bench {
        board: Board,
        rules: Rules,
        start: Instant,
        tickets: u64,
        reached: bool,
    }

    fn bench() -> Bench {
        Bench {
            board: Board::default(),
            rules: RULES,
            start: Instant::now(),
            tickets: 0,
            reached: true,
        }
    }

    impl Bench {
        fn at(&self, second: u64) -> Instant {
            self.start + Duration::from_secs(second)
        }

        /// Notices something, and returns what is sent then: `!` a trouble, `.`
        /// its end, `-` nothing.
        fn step(&mut self, second: u64, kind: Kind, wrong: Option<bool>) -> &'static str {
            let now = self.at(second);
            if let Some(wrong) = wrong {
                self.board.notice(&notice(kind, wrong), self.rules, now);
            }
            let alerts = self.board.due(self.rules, 10, &mut self.tickets, now);
            for alert in &alerts {
                self.board.report(alert.ticket, self.reached, now);
            }
            match alerts.as_slice() {
                [] => "-",
                [alert] if alert.wrong => "!",
                [_] => ".",
                _ => "?",
            }
        }
    }

    fn notice(kind: Kind, wrong: bool) -> Notice {
        Notice {
            kind,
            subject: "gpu-1".into(),
            wrong,
            detail: "why".to_owned(),
        }
    }

    /// Returns what is told at each of these seconds.
    fn told(kind: Kind, steps: &[(u64, Option<bool>)]) -> String {
        let mut bench = bench();
        let steps = steps.iter();
        steps
            .map(|&(second, wrong)| bench.step(second, kind, wrong))
            .collect()
    }

    #[test]
    fn a_trouble_is_told_once_and_so_is_its_end() {
        let steps = [
            (0, Some(true)),
            (1, Some(true)),
            (2, Some(false)),
            (3, Some(false)),
        ];
        assert_eq!(told(Kind::Down, &steps), "!-.-");
    }

    #[test]
    fn what_was_never_wrong_is_not_told_to_be_over() {
        assert_eq!(told(Kind::Down, &[(0, Some(false))]), "-");
    }

    #[test]
    fn what_flaps_is_told_again_after_the_cooldown_if_it_is_still_wrong() {
        let steps = [
            (0, Some(true)),
            (10, Some(false)),
            (20, Some(true)),
            (30, Some(false)),
            (40, Some(true)),
            (299, None),
            (300, None),
            (310, Some(false)),
        ];
        assert_eq!(told(Kind::Down, &steps), "!.----!.");
    }

    #[test]
    fn how_often_nothing_was_told_is_told() {
        let mut bench = bench();
        bench.step(0, Kind::Down, Some(true));
        for second in 1..4 {
            bench.step(second, Kind::Down, Some(false));
            bench.step(second, Kind::Down, Some(true));
        }
        let mut due = |second| {
            let now = bench.at(second);
            let alerts = bench.board.due(RULES, 10, &mut bench.tickets, now);
            bench.board.report(bench.tickets, second > 300, now);
            alerts[0].suppressed
        };
        assert_eq!((due(300), due(301)), (3, 3), "the first did not arrive");
    }

    #[test]
    fn a_fallback_is_over_when_nobody_was_served_by_it_for_a_minute() {
        let steps = [
            (0, Some(true)),
            (50, Some(true)),
            (109, None),
            (110, None),
            (200, None),
        ];
        assert_eq!(told(Kind::Fallback, &steps), "!--.-");
    }

    #[test]
    fn every_step_of_a_budget_is_told() {
        let steps = [(0, Some(true)), (0, Some(true)), (0, Some(true)), (9, None)];
        assert_eq!(told(Kind::Budget, &steps), "!!!-");
        // Also one that comes while the one before it is on its way.
        let mut bench = bench();
        let now = bench.start;
        bench.board.notice(&notice(Kind::Budget, true), RULES, now);
        let first = bench.board.due(RULES, 10, &mut bench.tickets, now);
        assert_eq!(bench.step(1, Kind::Budget, Some(true)), "-");
        bench.board.report(first[0].ticket, true, now);
        assert_eq!(bench.step(1, Kind::Budget, None), "!");
    }

    #[test]
    fn what_did_not_arrive_is_told_again_until_it_does() {
        let mut bench = bench();
        bench.reached = false;
        let mut tries = Vec::new();
        for second in 0..300 {
            let wrong = (second == 0).then_some(true);
            if bench.step(second, Kind::Down, wrong) == "!" {
                tries.push(second);
            }
        }
        assert_eq!(tries, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]);
        bench.reached = true;
        assert_eq!(bench.step(303, Kind::Down, None), "!");
        assert_eq!(bench.step(900, Kind::Down, None), "-");
        // So is the end.
        bench.reached = false;
        assert_eq!(bench.step(901, Kind::Down, Some(false)), ".");
        bench.reached = true;
        assert_eq!(bench.step(902, Kind::Down, None), ".");
        assert_eq!(bench.step(999, Kind::Down, None), "-");
    }

    #[test]
    fn nobody_is_told_the_end_of_what_he_was_never_told() {
        let mut bench = bench();
        bench.reached = false;
        assert_eq!(bench.step(0, Kind::Down, Some(true)), "!");
        bench.reached = true;
        assert_eq!(bench.step(0, Kind::Down, Some(false)), "-");
        // It ends while it is being told: then both are told, in order.
        let now = bench.at(10);
        bench.board.notice(&notice(Kind::Down, true), RULES, now);
        let first = bench.board.due(RULES, 10, &mut bench.tickets, now);
        assert_eq!(bench.step(10, Kind::Down, Some(false)), "-");
        bench.board.report(first[0].ticket, true, now);
        assert_eq!(bench.step(10, Kind::Down, None), ".");
        // Who wants no ends is told none.
        bench.rules.recovery = false;
        bench.rules.cooldown = Duration::ZERO;
        assert_eq!(bench.step(20, Kind::Down, Some(true)), "!");
        assert_eq!(bench.step(21, Kind::Down, Some(false)), "-");
        assert_eq!(bench.step(22, Kind::Down, Some(true)), "!");
    }

    #[test]
    fn more_than_may_be_on_their_way_wait_for_their_turn() {
        let mut bench = bench();
        for number in 0..20 {
            let notice = Notice {
                subject: format!("gpu-{number}").into(),
                ..notice(Kind::Down, true)
            };
            let now = bench.at(number);
            assert!(bench.board.notice(&notice, RULES, now).news);
        }
        let now = bench.at(20);
        let mut due = |most| bench.board.due(RULES, most, &mut bench.tickets, now);
        let first = due(16);
        assert_eq!((first.len(), &*first[0].subject), (16, "gpu-0"));
        assert_eq!(due(16).len(), 4);
        assert_eq!(due(16).len(), 0);
    }

    #[test]
    fn who_comes_later_learns_what_is_wrong_and_who_was_there_knows() {
        let mut bench = bench();
        bench.step(0, Kind::Down, Some(true));
        bench.step(0, Kind::Key, Some(true));
        bench.step(0, Kind::Budget, Some(true));
        bench.step(0, Kind::Breaker, Some(true));
        bench.step(0, Kind::Breaker, Some(false));
        let mut due = |mut board: Board| {
            let due = board.due(RULES, 10, &mut bench.tickets, bench.start);
            let mut kinds: Vec<_> = due.iter().map(|alert| alert.kind.as_str()).collect();
            kinds.sort_unstable();
            (kinds, board)
        };
        let mut newcomer = Board::default();
        newcomer.learn(&bench.board, &[Kind::Down, Kind::Breaker, Kind::Budget]);
        assert_eq!(due(newcomer).0, ["down"]);
        let (kinds, mut heir) = due(bench.board.heir(&[Kind::Down]));
        assert!(kinds.is_empty());
        for (kind, news) in [(Kind::Down, true), (Kind::Key, false)] {
            let noticed = heir.notice(&notice(kind, false), RULES, bench.start);
            assert_eq!(noticed.news, news, "{kind:?}");
        }
    }

    #[test]
    fn the_number_of_troubles_is_bounded() {
        let now = Instant::now();
        let mut board = Board::default();
        for number in 0..TROUBLES_MAX + 10 {
            let notice = Notice {
                subject: format!("gpu-{number}").into(),
                ..notice(Kind::Breaker, true)
            };
            let noticed = board.notice(&notice, RULES, now);
            let forgot = (number >= TROUBLES_MAX).then_some(Kind::Breaker);
            assert!(noticed.news && noticed.forgot == forgot);
        }
        assert_eq!(board.troubles.len(), TROUBLES_MAX);
    }
}
