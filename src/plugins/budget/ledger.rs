//! What every key has used of its days and months: in memory, and written behind
//! to the store.
//!
//! **Invariant:** of a budget no more is overdrawn than what one request takes:
//! what is under way counts with its estimate, and where that may be all of the
//! rest, nobody else is let through until it is known.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use super::calendar::{Today, Zone, until};
use crate::{
    config::{Allowance, Budget},
    store::{Amount, Journal, Usage},
};

/// The most periods that are remembered of a key: this day and month, and some
/// before them, should the clock go back.
const PERIODS_MAX: usize = 8;
/// For so many days nobody is forgotten who used anything: longer than a month
/// lasts. Days that a clock jumps over do not count.
const IDLE_DAYS_MAX: u32 = 62;

/// The most periods that the store is asked for: some ten years of days.
const ASKED_MAX: usize = 4096;

/// The books of the process; outlive the snapshots.
#[derive(Default)]
pub struct Ledger(Mutex<Books>);

#[derive(Default)]
struct Books {
    accounts: HashMap<Arc<str>, Account>,
    today: Option<Today>,
    /// The latest day that has been seen, should the clock go back.
    newest: String,
    journal: Option<Arc<Journal>>,
    /// The periods that the store was asked for, before anything of them was
    /// counted.
    asked: BTreeSet<String>,
    /// The ledger itself, for what the store answers.
    ledger: Weak<Ledger>,
    is_loaded: bool,
}

/// What is known of one key.
#[derive(Default)]
struct Account {
    /// By period, the one that was added to last at the end.
    used: Vec<(String, Amount)>,
    /// How many new days have begun since it used anything.
    idle_days: u32,
    /// What requests under way may take.
    under_way: Amount,
    /// What it may use, as far as it has been seen since the start.
    budget: Option<Budget>,
}

/// Which period, and what of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// `day` or `month`.
    pub(super) period: &'static str,
    /// `tokens` or `money`.
    pub(super) of: &'static str,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// What was used is not known: the store could not be read.
    Unknown,
    /// It is used up, for so long.
    UsedUp(Part, Duration),
    /// What is left may be used up by requests that are under way.
    Reserved(Part),
}

/// A part of a budget that has just passed a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passed {
    pub(super) part: Part,
    /// How much of it is used.
    pub(super) percent: u32,
}

/// A request under way; let go of by [`Reserved::settle`], or when it is dropped.
pub(super) struct Reserved {
    ledger: Arc<Ledger>,
    key: Arc<str>,
    amount: Amount,
    budget: Budget,
    open: bool,
}

/// How a key stands, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The key's name.
    pub key: Arc<str>,
    /// What it used today.
    pub day: Amount,
    /// What it used this month.
    pub month: Amount,
    /// What it may use; `None` before its first request since the start.
    pub budget: Option<Budget>,
}

/// All keys, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Whether the store has been read.
    pub is_loaded: bool,
    /// The day, such as `2026-11-21`.
    pub day: String,
    /// The month, such as `2026-11`.
    pub month: String,
    /// Every key that has used anything, by name.
    pub keys: Vec<Standing>,
}

impl Ledger {
    /// Reads what was used before, as soon as the store can be read. Only the
    /// first call does something. `done` is called then.
    pub(super) fn load(
        self: &Arc<Self>,
        journal: &Arc<Journal>,
        zone: Zone,
        now: SystemTime,
        done: impl FnOnce() + Send + 'static,
    ) {
        let mut books = self.books();
        if books.journal.is_some() {
            return done();
        }
        let today = books.today(now, zone);
        let periods = vec![today.day.clone(), today.month.clone()];
        books.asked.extend(periods.iter().cloned());
        books.journal = Some(Arc::clone(journal));
        books.ledger = Arc::downgrade(self);
        drop(books);
        let ledger = Arc::clone(self);
        journal.load(periods, move |all| {
            ledger.take_over(all);
            ledger.books().is_loaded = true;
            done();
        });
    }

    /// Adds what was used before the start to what has been used since.
    fn take_over(&self, all: Vec<Usage>) {
        let mut books = self.books();
        for Usage {
            key,
            period,
            amount,
        } in all
        {
            let account = books.accounts.entry(key).or_default();
            account.add(&period, amount);
        }
    }

    /// Lets a request through that may take so much.
    pub(super) fn admit(
        self: &Arc<Self>,
        key: &Arc<str>,
        budget: Budget,
        amount: Amount,
        zone: Zone,
        now: SystemTime,
    ) -> Result<Reserved, Refusal> {
        let mut books = self.books();
        if !books.is_loaded && !budget.is_empty() {
            return Err(Refusal::Unknown);
        }
        let today = books.today(now, zone).clone();
        let account = books.accounts.entry(Arc::clone(key)).or_default();
        account.budget = Some(budget);
        if let Some(refusal) = account.refusal(budget, &today, now) {
            return Err(refusal);
        }
        account.under_way.add(amount);
        Ok(Reserved {
            ledger: Arc::clone(self),
            key: Arc::clone(key),
            amount,
            budget,
            open: true,
        })
    }

    /// Counts what a request took that was let through without a look at it.
    pub(super) fn count(&self, key: &Arc<str>, amount: Amount, zone: Zone, now: SystemTime) {
        self.books().count(key, amount, zone, now);
    }

    /// Returns how every key stands.
    pub fn statement(&self, now: SystemTime) -> Statement {
        let mut books = self.books();
        let zone = books.today.as_ref().map_or(Zone::Utc, Today::zone);
        let today = books.today(now, zone).clone();
        let mut keys: Vec<Standing> = books
            .accounts
            .iter()
            .map(|(key, account)| Standing {
                key: Arc::clone(key),
                day: account.used(&today.day),
                month: account.used(&today.month),
                budget: account.budget,
            })
            .collect();
        keys.sort_by(|one, other| one.key.cmp(&other.key));
        Statement {
            is_loaded: books.is_loaded,
            day: today.day,
            month: today.month,
            keys,
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    /// Returns today. When a day begins that nobody has seen before, who has used
    /// nothing for long is forgotten.
    fn today(&mut self, now: SystemTime, zone: Zone) -> &Today {
        let fits = |today: &Today| today.holds(now, zone);
        if !self.today.as_ref().is_some_and(fits) {
            let today = Today::at(now, zone);
            if self.newest < today.day {
                self.newest.clone_from(&today.day);
                self.accounts.retain(|_, account| {
                    account.idle_days += 1;
                    account.under_way != Amount::default() || account.idle_days <= IDLE_DAYS_MAX
                });
            }
            self.ask_for([&today.day, &today.month]);
            self.today = None;
            return self.today.insert(today);
        }
        self.today.get_or_insert_with(|| Today::at(now, zone))
    }

    /// Reads what the store has of periods that nobody has looked at yet: that of
    /// a process that began while its clock was wrong, or of another one.
    fn ask_for(&mut self, periods: [&String; 2]) {
        let Some(journal) = &self.journal else {
            return;
        };
        let mut new = Vec::new();
        for period in periods {
            if self.asked.len() < ASKED_MAX && self.asked.insert(period.clone()) {
                new.push(period.clone());
            }
        }
        if new.is_empty() {
            return;
        }
        let ledger = Weak::clone(&self.ledger);
        journal.load(new, move |all| {
            if let Some(ledger) = ledger.upgrade() {
                ledger.take_over(all);
            }
        });
    }

    /// Returns what was used before, and since, in the day and the month.
    fn count(
        &mut self,
        key: &Arc<str>,
        amount: Amount,
        zone: Zone,
        now: SystemTime,
    ) -> [(Amount, Amount); 2] {
        let today = self.today(now, zone);
        let periods = [today.day.clone(), today.month.clone()];
        let account = self.accounts.entry(Arc::clone(key)).or_default();
        let counted = periods.each_ref().map(|period| {
            let before = account.used(period);
            account.add(period, amount);
            (before, account.used(period))
        });
        if let Some(journal) = &self.journal
            && amount != Amount::default()
        {
            for period in periods {
                let key = Arc::clone(key);
                journal.add(Usage {
                    key,
                    period,
                    amount,
                });
            }
        }
        counted
    }
}

impl Account {
    fn used(&self, period: &str) -> Amount {
        let mut all = self.used.iter();
        all.find(|(one, _)| one == period)
            .map(|(_, amount)| *amount)
            .unwrap_or_default()
    }

    fn add(&mut self, period: &str, amount: Amount) {
        self.idle_days = 0;
        let (known, mut all) = match self.used.iter().position(|(one, _)| one == period) {
            Some(place) => self.used.remove(place),
            None => (period.to_owned(), Amount::default()),
        };
        all.add(amount);
        // A month stays behind its days, however many there are.
        if self.used.len() >= PERIODS_MAX {
            self.used.remove(0);
        }
        self.used.push((known, all));
    }

    /// Returns what bounds the request: of several, what lasts longest.
    fn refusal(&self, budget: Budget, today: &Today, now: SystemTime) -> Option<Refusal> {
        let periods = [
            ("day", budget.day, &today.day, today.day_ends),
            ("month", budget.month, &today.month, today.month_ends),
        ];
        let mut reserved = None;
        let mut used_up: Option<(Part, Duration)> = None;
        for (period, allowance, name, ends) in periods {
            let used = self.used(name);
            let all = bounds(allowance).into_iter().flatten();
            for (of, limit, part_of) in all {
                let part = Part { period, of };
                let (used, under_way) = (part_of(&used), part_of(&self.under_way));
                if used >= limit {
                    let wait = until(ends, now);
                    if used_up.is_none_or(|(_, other)| other < wait) {
                        used_up = Some((part, wait));
                    }
                } else if used.saturating_add(under_way) >= limit {
                    reserved = Some(Refusal::Reserved(part));
                }
            }
        }
        used_up
            .map(|(part, wait)| Refusal::UsedUp(part, wait))
            .or(reserved)
    }
}

/// What of an amount is bounded, and how it is read.
type Bound = (&'static str, u64, fn(&Amount) -> u64);

fn bounds(allowance: Allowance) -> [Option<Bound>; 2] {
    let tokens = allowance.tokens.map(|most| most.get());
    let money = allowance.money.map(|most| most.0);
    [
        tokens.map(|most| ("tokens", most, (|used| used.tokens) as fn(&Amount) -> u64)),
        money.map(|most| ("money", most, (|used| used.money) as fn(&Amount) -> u64)),
    ]
}

impl Reserved {
    /// Ends the request with what it really took; returns the marks that were
    /// passed with it: `near` percent, and all of it.
    pub(super) fn settle(
        mut self,
        really: Amount,
        near: u8,
        zone: Zone,
        now: SystemTime,
    ) -> Vec<Passed> {
        self.open = false;
        let mut books = self.ledger.books();
        let counted = books.count(&self.key, really, zone, now);
        if let Some(account) = books.accounts.get_mut(&self.key) {
            account.under_way.take(self.amount);
        }
        drop(books);
        let allowances = [("day", self.budget.day), ("month", self.budget.month)];
        let mut passed = Vec::new();
        for ((period, allowance), (before, after)) in allowances.into_iter().zip(counted) {
            for (of, limit, part_of) in bounds(allowance).into_iter().flatten() {
                let percent = |used: u64| u128::from(used) * 100 / u128::from(limit.max(1));
                let (before, after) = (percent(part_of(&before)), percent(part_of(&after)));
                let marks = [u128::from(near), 100];
                if marks.iter().any(|mark| before < *mark && *mark <= after) {
                    passed.push(Passed {
                        part: Part { period, of },
                        percent: u32::try_from(after).unwrap_or(u32::MAX),
                    });
                }
            }
        }
        passed
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        let mut books = self.ledger.books();
        if let Some(account) = books.accounts.get_mut(&self.key) {
            account.under_way.take(self.amount);
        }
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{
        config::Money,
        metrics::Metrics,
        store::{Journals, Place},
        worker::Workers,
    };

    const LONG: Duration = Duration::from_secs(20);

    fn time(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).unwrap()
    }

    fn tokens(tokens: u64) -> Amount {
        Amount {
            requests: 1,
            tokens,
            money: tokens * 1000,
        }
    }

    fn budget(day: &str, month: &str) -> Budget {
        let of = |text: &str| Allowance {
            tokens: text.parse().ok(),
            money: None,
        };
        Budget {
            day: of(day),
            month: of(month),
        }
    }

    fn ledger() -> Arc<Ledger> {
        let ledger = Arc::new(Ledger::default());
        ledger.books().is_loaded = true;
        ledger
    }

    /// A ledger that has read this file, with the clock at this time.
    fn stored(file: &std::path::Path, now: &str) -> (Arc<Ledger>, Workers) {
        let (workers, metrics) = (Workers::default(), Arc::new(Metrics::new()));
        let url = format!("sqlite:{}", file.display());
        let place = Place::of(&url, std::path::Path::new(".")).unwrap();
        let journal = Journals::default().open(&place, &metrics, &workers);
        let ledger = Arc::new(Ledger::default());
        let (send, done) = std::sync::mpsc::channel();
        ledger.load(&journal.unwrap(), Zone::Utc, time(now), move || {
            send.send(()).unwrap();
        });
        done.recv_timeout(LONG).unwrap();
        (ledger, workers)
    }

    #[test]
    fn a_process_that_began_with_a_wrong_clock_reads_what_was_used() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("forebay.db");
        let (first, workers) = stored(&file, NOON);
        let hundred = budget("100", "100");
        spend(&first, hundred, 100, NOON).unwrap();
        assert!(workers.stop(LONG));
        for _ in 0..2 {
            let (second, workers) = stored(&file, "1970-01-01T00:00:09Z");
            spend(&second, hundred, 0, "1970-01-01T00:00:10Z").unwrap();
            let until = Instant::now() + LONG;
            let used = || {
                second
                    .statement(time(NOON))
                    .keys
                    .first()
                    .map(|one| one.month.tokens)
            };
            while used() != Some(100) && Instant::now() < until {
                std::thread::yield_now();
            }
            assert_eq!(used(), Some(100));
            assert!(spend(&second, hundred, 1, NOON).is_err());
            assert!(workers.stop(LONG));
        }
    }

    const NOON: &str = "2026-11-21T12:00:00Z";

    fn spend(
        ledger: &Arc<Ledger>,
        budget: Budget,
        amount: u64,
        now: &str,
    ) -> Result<Vec<Passed>, Refusal> {
        let now = time(now);
        let held = ledger.admit(&"a".into(), budget, tokens(amount), Zone::Utc, now)?;
        Ok(held.settle(tokens(amount), 80, Zone::Utc, now))
    }

    #[test]
    fn a_budget_holds_until_its_period_ends() {
        let (ledger, both) = (ledger(), budget("100", "150"));
        let day = Part {
            period: "day",
            of: "tokens",
        };
        let month = Part {
            period: "month",
            of: "tokens",
        };
        assert_eq!(spend(&ledger, both, 60, NOON), Ok(vec![]));
        let near = Passed {
            part: day,
            percent: 110,
        };
        assert_eq!(spend(&ledger, both, 50, NOON), Ok(vec![near]));
        let refused = spend(&ledger, both, 1, NOON);
        assert_eq!(
            refused,
            Err(Refusal::UsedUp(day, Duration::from_secs(12 * 3600)))
        );
        // Others have theirs.
        assert!(
            ledger
                .admit(&"b".into(), both, tokens(1), Zone::Utc, time(NOON))
                .is_ok()
        );
        let tomorrow = "2026-11-22T00:00:00Z";
        let came = spend(&ledger, both, 40, tomorrow).unwrap();
        assert_eq!(
            came,
            [Passed {
                part: month,
                percent: 100
            }]
        );
        let nine_days = Duration::from_secs(9 * 24 * 3600);
        assert_eq!(
            spend(&ledger, both, 1, tomorrow),
            Err(Refusal::UsedUp(month, nine_days))
        );
        assert!(spend(&ledger, both, 1, "2026-12-01T00:00:00Z").is_ok());
    }

    #[test]
    fn marks_are_passed_once() {
        let ledger = ledger();
        let hundred = budget("100", "");
        let mut told = Vec::new();
        for _ in 0..20 {
            if let Ok(passed) = spend(&ledger, hundred, 10, NOON) {
                told.extend(passed.into_iter().map(|one| one.percent));
            }
        }
        assert_eq!(told, [80, 100]);
    }

    #[test]
    fn what_is_under_way_may_be_the_rest_but_not_twice() {
        let (ledger, now) = (ledger(), time(NOON));
        let hundred = budget("100", "");
        let admit = || ledger.admit(&"a".into(), hundred, tokens(1000), Zone::Utc, now);
        let first = admit().ok().unwrap();
        assert!(matches!(admit(), Err(Refusal::Reserved(_))));
        first.settle(tokens(10), 80, Zone::Utc, now);
        let second = admit().ok().unwrap();
        drop(second);
        assert!(admit().is_ok());
    }

    #[test]
    fn money_is_a_budget_too() {
        let (ledger, now) = (ledger(), time(NOON));
        let mut cents = Budget::default();
        cents.month.money = Money::new(0.000_05);
        let held = ledger.admit(&"a".into(), cents, tokens(1), Zone::Utc, now);
        let passed = held.ok().unwrap().settle(tokens(50), 80, Zone::Utc, now);
        assert_eq!(passed.len(), 1);
        let came = ledger.admit(&"a".into(), cents, tokens(1), Zone::Utc, now);
        assert!(matches!(
            came,
            Err(Refusal::UsedUp(Part { of: "money", .. }, _))
        ));
    }

    #[test]
    fn before_the_store_is_read_nobody_knows() {
        let (ledger, now) = (Arc::new(Ledger::default()), time(NOON));
        let hundred = budget("100", "");
        let came = ledger.admit(&"a".into(), hundred, tokens(1), Zone::Utc, now);
        assert!(matches!(came, Err(Refusal::Unknown)));
        ledger.count(&"a".into(), tokens(30), Zone::Utc, now);
        ledger.take_over(vec![Usage {
            key: "a".into(),
            period: "2026-11-21".to_owned(),
            amount: tokens(60),
        }]);
        ledger.books().is_loaded = true;
        let statement = ledger.statement(now);
        assert!(statement.is_loaded);
        assert_eq!(statement.keys[0].day.tokens, 90);
        assert_eq!(statement.keys[0].month.tokens, 30);
    }

    #[test]
    fn a_month_is_one_however_many_days_of_it_are_used() {
        let (ledger, both) = (ledger(), budget("100", "200"));
        for day in 1..=20 {
            let noon = format!("2026-11-{day:02}T12:00:00Z");
            assert!(spend(&ledger, both, 10, &noon).is_ok(), "{noon}");
        }
        assert!(spend(&ledger, both, 10, "2026-11-21T12:00:00Z").is_err());
        assert_eq!(ledger.statement(time(NOON)).keys[0].month.tokens, 200);
    }

    #[test]
    fn a_clock_that_jumps_over_months_and_comes_back_forgets_nobody() {
        for far in ["2026-12-01T00:00:10Z", "2041-01-01T12:00:00Z"] {
            let (ledger, hundred) = (ledger(), budget("100", "100"));
            spend(&ledger, hundred, 100, NOON).unwrap();
            assert!(
                ledger
                    .statement(time(far))
                    .keys
                    .iter()
                    .all(|one| one.day == Amount::default())
            );
            let other = ledger.admit(&"b".into(), hundred, tokens(1), Zone::Utc, time(far));
            assert!(other.is_ok());
            assert!(spend(&ledger, hundred, 1, NOON).is_err(), "{far}");
        }
    }

    #[test]
    fn who_uses_nothing_for_months_is_forgotten() {
        let (ledger, hundred) = (ledger(), budget("100", ""));
        spend(&ledger, hundred, 90, NOON).unwrap();
        let day = Duration::from_secs(24 * 3600);
        let after = |days: u32| ledger.statement(time(NOON) + day * days).keys.len();
        assert!((1..=62).all(|days| after(days) == 1));
        assert_eq!(after(63), 0);
    }

    #[test]
    fn a_clock_that_goes_back_finds_what_was_used() {
        let (ledger, hundred) = (ledger(), budget("100", ""));
        spend(&ledger, hundred, 90, NOON).unwrap();
        spend(&ledger, hundred, 20, "2026-11-22T00:10:00Z").unwrap();
        spend(&ledger, hundred, 20, "2026-11-21T23:59:00Z").unwrap();
        assert!(spend(&ledger, hundred, 1, "2026-11-21T23:59:00Z").is_err());
        assert!(spend(&ledger, hundred, 1, "2026-11-22T00:10:00Z").is_ok());
    }
}
