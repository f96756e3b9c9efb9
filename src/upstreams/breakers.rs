//! The breakers of one upstream, one per model.
//!
//! **Invariant:** at most 64 are kept, for the names come from
//! clients. One that is closed and unused for a window makes room; beyond that
//! all further models share one.

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
    /// Of all models that there was no room for.
    rest: Breaker,
    /// What was last told of those that were not closed.
    told: HashMap<Arc<str>, Phase>,
}

impl Breakers {
    /// Returns the breaker of a model, to look at.
    pub(super) fn of(&self, model: &str) -> Option<&Breaker> {
        if let Some(own) = self.own.get(model) {
            return Some(own);
        }
        (self.own.len() >= MODELS_MAX).then_some(&self.rest)
    }

    /// Returns the breaker of a model, to note something; made at the first.
    pub(super) fn of_mut(&mut self, model: &Arc<str>, rules: &Rules, now: Instant) -> &mut Breaker {
        // Two look-ups: the borrow checker does not see that the first found none.
        if !self.own.contains_key(model) {
            if self.own.len() >= MODELS_MAX {
                self.own
                    .retain(|_, breaker| !breaker.is_forgettable(rules, now));
            }
            if self.own.len() >= MODELS_MAX {
                return &mut self.rest;
            }
            // There is room again: nobody asks this one any more, and what it
            // says would keep the upstream from ever being in order.
            self.rest = Breaker::default();
        }
        self.own.entry(Arc::clone(model)).or_default()
    }

    /// Returns the breaker of a model, as [`Self::of`] does, to note something.
    pub(super) fn known(&mut self, model: &str) -> Option<&mut Breaker> {
        let full = self.own.len() >= MODELS_MAX;
        match self.own.get_mut(model) {
            Some(own) => Some(own),
            None => full.then_some(&mut self.rest),
        }
    }

    /// Lets the next one try, wherever this ticket is the one that tries: the
    /// model may have got a breaker of its own since.
    pub(super) fn end_try(&mut self, ticket: u64, now: Instant) {
        for breaker in self.all_mut() {
            breaker.end_try(ticket, now);
        }
    }

    /// Closes what flowed long enough.
    pub(super) fn settle(&mut self, now: Instant) -> Came {
        let mut came = Came::Nothing;
        for breaker in self.all_mut() {
            if breaker.settle(now) == Came::Changed {
                came = Came::Changed;
            }
        }
        came
    }

    /// Forgets everything but what is under way.
    pub(super) fn reset(&mut self) {
        for breaker in self.all_mut() {
            breaker.reset();
        }
    }

    /// Returns how many are not closed, and of how many.
    pub(super) fn shut(&self, now: Instant) -> (usize, usize) {
        let shut = self
            .own
            .values()
            .chain([&self.rest])
            .filter(|breaker| breaker.phase(now) != Phase::Closed);
        (shut.count(), self.own.len())
    }

    /// Returns the shortest time until one that is open may be tried.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let all = self.own.values().chain([&self.rest]);
        all.filter(|breaker| breaker.phase(now) != Phase::Closed)
            .map(|breaker| breaker.wait(now))
            .min()
    }

    /// Returns those that are not closed, with how long they will not be tried.
    pub(super) fn not_closed(&self, now: Instant) -> Vec<(Arc<str>, Phase, Duration)> {
        let own = self
            .own
            .iter()
            .map(|(model, breaker)| (Arc::clone(model), breaker));
        own.chain([(Arc::from("*"), &self.rest)])
            .map(|(model, breaker)| (model, breaker.phase(now), breaker.wait(now)))
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

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Breaker> {
        self.own.values_mut().chain([&mut self.rest])
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
            let breaker = breakers.of_mut(&model.into(), &rules, now);
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

    #[test]
    fn more_models_than_there_is_room_for_share_one_and_the_unused_make_room() {
        let (mut breakers, now) = (Breakers::default(), Instant::now());
        for nth in 0..MODELS_MAX + 5 {
            fail(&mut breakers, &format!("m{nth}"), 1, now);
        }
        assert_eq!(breakers.own.len(), MODELS_MAX);
        assert_eq!(breakers.of("another").unwrap().phase(now), Phase::Open);
        let later = now + Duration::from_secs(31);
        fail(&mut breakers, "late", 1, later);
        assert_eq!(breakers.own.len(), 1);
    }

    #[test]
    fn what_all_further_models_shared_is_forgotten_when_each_has_room_again() {
        let (mut breakers, now) = (Breakers::default(), Instant::now());
        for nth in 0..MODELS_MAX + 5 {
            fail(&mut breakers, &format!("m{nth}"), 1, now);
        }
        assert_eq!(breakers.shut(now).0, 1);
        let later = now + Duration::from_secs(31);
        breakers.of_mut(&"late".into(), &rules(), later);
        assert_eq!(breakers.shut(later), (0, 1));
        assert!(breakers.known("another").is_none());
    }

    #[test]
    fn who_tried_as_one_of_many_ends_it_also_with_a_breaker_of_its_own() {
        let (mut breakers, now) = (Breakers::default(), Instant::now());
        for nth in 0..MODELS_MAX + 5 {
            fail(&mut breakers, &format!("m{nth}"), 1, now);
        }
        breakers.known("another").unwrap().begin_try(7, now);
        breakers.own.remove("m0");
        breakers.end_try(7, now);
        let later = now + Duration::from_secs(7);
        assert_eq!(
            breakers.rest.says(later),
            crate::upstreams::breaker::Says::Try
        );
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
