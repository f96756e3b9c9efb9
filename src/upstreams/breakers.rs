//! The breakers of one upstream, one per model.
//!
//! **Invariant:** at most 64 are kept, for the names come from clients, and no
//! model's breaker is another's: a client that makes up names takes out none but
//! those. Room is made by what nobody has used for a window, then by names that
//! the upstream has never answered to, then by closed ones, the longest unused
//! first. Where even that is not enough, a further model has no breaker.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::breaker::{Breaker, Came, Phase, Rules};

/// How many models of one upstream have a breaker of their own.
const MODELS_MAX: usize = 64;

/// One breaker per model.
#[derive(Debug, Default)]
pub(super) struct Breakers {
    own: HashMap<Arc<str>, Breaker>,
    /// What was last told of those that were not closed.
    told: HashMap<Arc<str>, Phase>,
}

impl Breakers {
    /// Returns the breaker of a model, to look at.
    pub(super) fn of(&self, model: &str) -> Option<&Breaker> {
        self.own.get(model)
    }

    /// Returns the breaker of a model, to note something; made at the first.
    /// `None` if there is no room.
    pub(super) fn of_mut(
        &mut self,
        model: &Arc<str>,
        rules: &Rules,
        now: Instant,
    ) -> Option<&mut Breaker> {
        if self.own.len() >= MODELS_MAX && !self.own.contains_key(model) {
            self.make_room(rules, now);
            if self.own.len() >= MODELS_MAX {
                return None;
            }
        }
        Some(self.own.entry(Arc::clone(model)).or_default())
    }

    fn make_room(&mut self, rules: &Rules, now: Instant) {
        self.own
            .retain(|_, breaker| !breaker.is_forgettable(rules, now));
        if self.own.len() < MODELS_MAX {
            return;
        }
        let worth = |(model, breaker): (&Arc<str>, &Breaker)| {
            let worth = breaker.worth()?;
            Some((worth, Arc::clone(model)))
        };
        if let Some((_, least)) = self.own.iter().filter_map(worth).min() {
            self.own.remove(&least);
        }
    }

    /// Returns the breaker of a model, as [`Self::of`] does, to note something.
    pub(super) fn known(&mut self, model: &str) -> Option<&mut Breaker> {
        self.own.get_mut(model)
    }

    /// Lets somebody try at once what has opened since then: see
    /// [`Breaker::hurry`].
    pub(super) fn hurry(&mut self, since: Option<Instant>, rules: &Rules, now: Instant) {
        for breaker in self.own.values_mut() {
            if since.is_none_or(|since| breaker.has_opened_since(since)) {
                breaker.hurry(rules, now);
            }
        }
    }

    /// Lets the next one try, wherever this ticket is the one that tries.
    pub(super) fn end_try(&mut self, ticket: u64, now: Instant) {
        for breaker in self.own.values_mut() {
            breaker.end_try(ticket, now);
        }
    }

    /// Closes what flowed long enough.
    pub(super) fn settle(&mut self, now: Instant) -> Came {
        let mut came = Came::Nothing;
        for breaker in self.own.values_mut() {
            if breaker.settle(now) == Came::Changed {
                came = Came::Changed;
            }
        }
        came
    }

    /// Forgets everything but what is under way.
    pub(super) fn reset(&mut self) {
        for breaker in self.own.values_mut() {
            breaker.reset();
        }
    }

    /// Returns how many are not closed, and of how many.
    pub(super) fn shut(&self, now: Instant) -> (usize, usize) {
        let shut = self
            .own
            .values()
            .filter(|breaker| breaker.phase(now) != Phase::Closed);
        (shut.count(), self.own.len())
    }

    /// Returns the shortest time until one that is open may be tried.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let all = self.own.values();
        all.filter(|breaker| breaker.phase(now) != Phase::Closed)
            .map(|breaker| breaker.wait(now))
            .min()
    }

    /// Returns those that are not closed, with how long they will not be tried.
    pub(super) fn not_closed(&self, now: Instant) -> Vec<(Arc<str>, Phase, Duration)> {
        self.own
            .iter()
            .map(|(model, breaker)| (Arc::clone(model), breaker.phase(now), breaker.wait(now)))
            .filter(|(_, phase, _)| *phase != Phase::Closed)
            .collect()
    }

    /// Returns what changed since this was last asked.
    pub(super) fn news(&mut self, now: Instant) -> Vec<(Arc<str>, Phase, Option<Duration>)> {
        let shut = self.not_closed(now);
        if shut.is_empty() && self.told.is_empty() {
            return Vec::new();
        }
        let mut news = Vec::new();
        let mut told = HashMap::with_capacity(shut.len());
        for (model, phase, wait) in shut {
            if self.told.remove(&model) != Some(phase) {
                let wait = Some(wait).filter(|_| phase == Phase::Open);
                news.push((Arc::clone(&model), phase, wait));
            }
            told.insert(model, phase);
        }
        let closed = std::mem::replace(&mut self.told, told);
        news.extend(closed.into_keys().map(|model| (model, Phase::Closed, None)));
        news
    }

    /// Makes what was told of others count as told of these, so that the next
    /// news take it back.
    pub(super) fn follow(&mut self, old: &Self) {
        self.told = old.told.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::breaker::{Fault, Spare},
        *,
    };
    use crate::config;

    fn rules() -> Rules {
        Rules::of(&config::Breaker::default())
    }

    fn fail(breakers: &mut Breakers, model: &str, times: usize, now: Instant) {
        let rules = rules();
        for _ in 0..times {
            let breaker = breakers.of_mut(&model.into(), &rules, now).unwrap();
            breaker.failed(&rules, (Fault::Answer, Spare::Yes), now, now);
        }
    }

    #[test]
    fn each_model_has_its_own() {
        let (mut breakers, now) = (Breakers::default(), Instant::now());
        fail(&mut breakers, "a", 5, now);
        fail(&mut breakers, "b", 1, now);
        assert_eq!(breakers.of("a").unwrap().phase(now), Phase::Open);
        assert_eq!(breakers.of("b").unwrap().phase(now), Phase::Closed);
        assert!(breakers.of("c").is_none());
        assert_eq!(breakers.shut(now), (1, 2));
    }

    fn succeed(breakers: &mut Breakers, model: &str, now: Instant) {
        let rules = rules();
        let breaker = breakers.of_mut(&model.into(), &rules, now).unwrap();
        breaker.succeeded(&rules, now, now);
    }

    #[test]
    fn names_that_are_made_up_take_out_no_other_and_need_no_more_room() {
        let (mut breakers, start) = (Breakers::default(), Instant::now());
        succeed(&mut breakers, "good", start);
        succeed(&mut breakers, "bad", start);
        fail(&mut breakers, "bad", 5, start);
        for nth in 0..10 * MODELS_MAX as u64 {
            let now = start + Duration::from_millis(nth);
            fail(&mut breakers, &format!("m{nth}"), 5, now);
            assert!(breakers.own.len() <= MODELS_MAX);
        }
        // What it has is remembered, also what it fails with.
        let now = start + Duration::from_millis(2000);
        assert_eq!(breakers.of("bad").unwrap().phase(now), Phase::Open);
        assert_eq!(breakers.of("good").unwrap().phase(now), Phase::Closed);
        assert!(breakers.of("m0").is_none(), "the oldest go first");
        assert!(breakers.of("another").is_none());
        let news = breakers.news(now);
        assert!(news.len() < MODELS_MAX, "{}", news.len());
    }

    #[test]
    fn what_nobody_has_used_for_a_window_makes_room_also_if_it_is_open() {
        let (mut breakers, now) = (Breakers::default(), Instant::now());
        for nth in 0..MODELS_MAX {
            succeed(&mut breakers, &format!("m{nth}"), now);
            fail(&mut breakers, &format!("m{nth}"), 5, now);
        }
        // All of them are of use: a further one has none.
        let rules = rules();
        assert!(breakers.of_mut(&"late".into(), &rules, now).is_none());
        let later = now + Duration::from_secs(35);
        assert!(breakers.of_mut(&"late".into(), &rules, later).is_none());
        let later = now + Duration::from_secs(37);
        fail(&mut breakers, "late", 1, later);
        assert_eq!(breakers.own.len(), 1);
    }

    #[test]
    fn among_models_that_work_the_longest_unused_makes_room() {
        let (mut breakers, start) = (Breakers::default(), Instant::now());
        let now = |nth: usize| start + Duration::from_millis(nth as u64);
        for nth in 0..MODELS_MAX {
            succeed(&mut breakers, &format!("m{nth}"), now(nth));
        }
        succeed(&mut breakers, "m0", now(100));
        succeed(&mut breakers, "late", now(101));
        assert!(breakers.of("m0").is_some() && breakers.of("late").is_some());
        assert!(breakers.of("m1").is_none());
    }

    #[test]
    fn only_what_opened_since_is_hurried() {
        let (mut breakers, start) = (Breakers::default(), Instant::now());
        fail(&mut breakers, "old", 5, start);
        let now = start + Duration::from_secs(1);
        fail(&mut breakers, "new", 5, now);
        breakers.hurry(Some(now), &rules(), now);
        assert_eq!(breakers.of("old").unwrap().phase(now), Phase::Open);
        assert_eq!(breakers.of("new").unwrap().phase(now), Phase::HalfOpen);
        breakers.hurry(None, &rules(), now);
        assert_eq!(breakers.of("old").unwrap().phase(now), Phase::HalfOpen);
    }

    #[test]
    fn news_are_told_once() {
        let (mut breakers, now) = (Breakers::default(), Instant::now());
        assert!(breakers.news(now).is_empty());
        fail(&mut breakers, "a", 5, now);
        let news = breakers.news(now);
        assert!(matches!(&news[..], [(model, Phase::Open, Some(_))] if **model == *"a"));
        assert!(breakers.news(now).is_empty());
        let later = now + Duration::from_secs(7);
        assert_eq!(breakers.news(later)[0].1, Phase::HalfOpen);
        breakers.reset();
        assert_eq!(breakers.news(later)[0].1, Phase::Closed);
        assert!(breakers.news(later).is_empty());
    }
}
