//! How much of a group's traffic may be tries after the first.
//!
//! Two bounds, and a retry has to keep both. *At once*: a share of the requests
//! under way, at least `min`; who finds it used up may wait, since a retry that
//! has lasted `SETTLED` counts no longer: what fails fails sooner, and what
//! lasts is work. *Over time*: the same share of the requests of the last ten
//! seconds, or of those under way if they are more, at least `min` a second; who
//! finds that used up gives up, so that upstreams that fail see at most 1.2 times
//! what clients ask.
//!
//! So those whose upstream has crashed in the middle of long answers are all
//! helped, a few at a time.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, futures::Notified};

use crate::config;

/// How many seconds the second bound looks back.
const SECONDS: usize = 10;
/// How long a retry without a first token counts as one: an answer that is not
/// streamed has none before its end, a minute later perhaps.
const SETTLED: Duration = Duration::from_secs(1);

/// The budget of one group.
#[derive(Debug)]
pub struct Budget {
    config: config::Retries,
    /// Requests under way in the group.
    active: AtomicU32,
    /// Retries under way that have no first token yet, with their numbers, oldest
    /// first. Never more than the first bound.
    retrying: Mutex<Retrying>,
    recent: Mutex<Recent>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Retrying {
    passes: VecDeque<(u64, Instant)>,
    /// The number of the last one.
    last: u64,
}

/// A request under way in a group; ends when dropped.
#[derive(Debug)]
pub struct Active(Arc<Budget>);

/// Leave for one retry; given back when dropped.
#[derive(Debug)]
pub struct Pass {
    budget: Arc<Budget>,
    number: u64,
    since: Instant,
    used: AtomicBool,
}

/// Why there is no leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPass {
    /// As many as may are under way: one may end in a moment.
    Busy,
    /// As many as may were made.
    Spent,
}

/// What there was in each of the last seconds.
#[derive(Debug)]
struct Recent {
    epoch: Instant,
    seconds: [Second; SECONDS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Second {
    /// Which second since the epoch.
    nth: u64,
    requests: u32,
    retries: u32,
}

impl Budget {
    /// Makes an unused budget.
    pub fn new(config: config::Retries, now: Instant) -> Arc<Self> {
        Arc::new(Self {
            config,
            active: AtomicU32::new(0),
            retrying: Mutex::default(),
            recent: Mutex::new(Recent {
                epoch: now,
                seconds: [Second::default(); SECONDS],
            }),
            freed: Notify::new(),
        })
    }

    /// Notes a request that comes to the group.
    pub fn enter(self: &Arc<Self>, now: Instant) -> Active {
        self.active.fetch_add(1, Relaxed);
        self.note(now, |second| {
            second.requests = second.requests.saturating_add(1);
        });
        Active(Arc::clone(self))
    }

    /// Takes leave for one retry.
    ///
    /// # Errors
    /// Which of the bounds it would break.
    pub fn retry(self: &Arc<Self>, now: Instant) -> Result<Pass, NoPass> {
        let share = |of: u64| self.config.share.of(of);
        let min = u64::from(self.config.min);
        let active = u64::from(self.active.load(Relaxed));
        let most = share(active).max(min);
        if most == 0 {
            return Err(NoPass::Spent);
        }
        let number = {
            let mut retrying = self.retrying();
            let settled =
                |&(_, since): &(u64, Instant)| now.saturating_duration_since(since) >= SETTLED;
            while retrying.passes.front().is_some_and(settled) {
                retrying.passes.pop_front();
            }
            if retrying.passes.len() as u64 >= most {
                return Err(NoPass::Busy);
            }
            retrying.last += 1;
            let number = retrying.last;
            retrying.passes.push_back((number, now));
            number
        };
        let pass = Pass {
            budget: Arc::clone(self),
            number,
            since: now,
            used: AtomicBool::new(false),
        };
        let (requests, retries) = self.recent(now);
        let seconds = u64::try_from(SECONDS).unwrap_or(u64::MAX);
        if retries >= share(requests.max(active)).max(min * seconds) {
            // It was never noted.
            pass.spend();
            return Err(NoPass::Spent);
        }
        self.note(now, |second| {
            second.retries = second.retries.saturating_add(1);
        });
        Ok(pass)
    }

    /// Waits for a retry to end, or to have its first token; that one has lasted
    /// long enough is told to nobody. Register before asking again.
    pub fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    fn retrying(&self) -> MutexGuard<'_, Retrying> {
        self.retrying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recent(&self, now: Instant) -> (u64, u64) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let nth = recent.nth(now);
        let live = |second: &&Second| second.nth + 10 > nth;
        recent
            .seconds
            .iter()
            .filter(live)
            .fold((0, 0), |(requests, retries), second| {
                (
                    requests + u64::from(second.requests),
                    retries + u64::from(second.retries),
                )
            })
    }

    fn note(&self, now: Instant, note: impl FnOnce(&mut Second)) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let nth = recent.nth(now);
        let index = usize::try_from(nth).unwrap_or(0) % SECONDS;
        // One of a later round: what is to be noted is no longer of interest.
        if let Some(second) = recent.seconds.get_mut(index).filter(|s| s.nth <= nth) {
            if second.nth < nth {
                *second = Second {
                    nth,
                    ..Second::default()
                };
            }
            note(second);
        }
    }
}

impl Recent {
    /// Which second it is; from 10 on, so that an unused one is never live.
    fn nth(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_secs() + 10
    }
}

impl Pass {
    /// Says that the retry was sent: from now on it counts.
    pub fn spend(&self) {
        self.used.store(true, Relaxed);
    }

    /// Says that the retry has its first token: it is no longer under way.
    pub fn settle(&self) {
        let mut retrying = self.budget.retrying();
        let place = retrying
            .passes
            .binary_search_by_key(&self.number, |&(number, _)| number);
        if let Ok(at) = place {
            retrying.passes.remove(at);
            drop(retrying);
            self.budget.freed.notify_one();
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.settle();
        if !self.used.load(Relaxed) {
            self.budget.note(self.since, |second| {
                second.retries = second.retries.saturating_sub(1);
            });
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(now: Instant) -> Arc<Budget> {
        Budget::new(config::Retries::default(), now)
    }

    fn spent(budget: &Arc<Budget>, now: Instant) -> Result<(), NoPass> {
        budget.retry(now).map(|pass| pass.spend())
    }

    #[test]
    fn three_at_once_and_a_fifth_of_many() {
        let now = Instant::now();
        let budget = budget(now);
        let mut passes: Vec<_> = (0..3).map(|_| budget.retry(now).unwrap()).collect();
        assert_eq!(budget.retry(now).unwrap_err(), NoPass::Busy);
        let active: Vec<_> = (0..50).map(|_| budget.enter(now)).collect();
        passes.extend((3..10).map(|_| budget.retry(now).unwrap()));
        assert_eq!(budget.retry(now).unwrap_err(), NoPass::Busy);
        passes[0].settle();
        budget.retry(now).unwrap();
        drop((passes, active));
        assert!(budget.retrying().passes.is_empty());
        assert_eq!(budget.active.load(Relaxed), 0);
    }

    #[test]
    fn a_retry_that_lasts_makes_room_for_the_next() {
        let now = Instant::now();
        let budget = budget(now);
        let passes: Vec<_> = (0..3).map(|_| budget.retry(now).unwrap()).collect();
        let just_before = now + SETTLED - Duration::from_millis(1);
        assert_eq!(budget.retry(just_before).unwrap_err(), NoPass::Busy);
        let next: Vec<_> = (0..3)
            .map(|_| budget.retry(now + SETTLED).unwrap())
            .collect();
        // The end of one that counts no longer makes no room a second time.
        drop(passes);
        assert_eq!(budget.retry(now + SETTLED).unwrap_err(), NoPass::Busy);
        drop(next);
        assert!(budget.retrying().passes.is_empty());
    }

    #[test]
    fn long_requests_count_as_long_as_they_last() {
        let start = Instant::now();
        let budget = budget(start);
        let active: Vec<_> = (0..500).map(|_| budget.enter(start)).collect();
        let now = start + Duration::from_secs(60);
        for _ in 0..100 {
            spent(&budget, now).unwrap();
        }
        assert_eq!(spent(&budget, now), Err(NoPass::Spent));
        drop(active);
    }

    #[test]
    fn a_fifth_of_the_last_ten_seconds() {
        let start = Instant::now();
        let budget = budget(start);
        let mut made = 0;
        for tenth in 0..600 {
            let now = start + Duration::from_millis(100 * tenth);
            for _ in 0..20 {
                budget.enter(now);
                made += usize::from(spent(&budget, now).is_ok());
            }
        }
        // 12,000 requests in a minute.
        assert!((2200..=2430).contains(&made), "{made}");
    }

    #[test]
    fn little_traffic_may_always_retry_three_a_second() {
        let now = Instant::now();
        let budget = budget(now);
        for _ in 0..30 {
            spent(&budget, now).unwrap();
        }
        assert_eq!(spent(&budget, now), Err(NoPass::Spent));
        assert!(budget.retrying().passes.is_empty());
        spent(&budget, now + Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn what_was_not_used_is_given_back() {
        let now = Instant::now();
        let budget = budget(now);
        for _ in 0..100 {
            budget.retry(now).unwrap();
        }
        spent(&budget, now).unwrap();
    }

    #[test]
    fn nothing_is_a_budget_too() {
        let now = Instant::now();
        let none = config::Retries {
            share: config::Share(0),
            min: 0,
        };
        assert_eq!(
            Budget::new(none, now).retry(now).unwrap_err(),
            NoPass::Spent
        );
    }
}
