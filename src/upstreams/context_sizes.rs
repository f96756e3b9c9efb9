//! How large a context each model of an Ollama has at the moment.
//!
//! A request for another size makes Ollama load the model anew, which takes
//! seconds to minutes. So the sizes are powers of two, and one only grows until
//! the model has been idle for so long that Ollama has unloaded it; then the
//! next request chooses freely.
//!
//! Nothing here asks: what is known is what was asked for.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// The smallest context that is asked for, in tokens.
pub const CONTEXT_MIN: u32 = 2048;

/// The most models that are remembered of one upstream; beyond, the one that
/// was asked longest ago is forgotten.
const MODELS_MAX: usize = 64;

/// The contexts of one upstream's models.
#[derive(Debug, Default)]
pub struct ContextSizes {
    models: Mutex<HashMap<Box<str>, Model>>,
    /// Requests that wait until their model is loaded.
    waiting: AtomicU32,
}

#[derive(Clone, Copy, Debug)]
struct Model {
    num_ctx: u32,
    used: Instant,
    /// With which context it last answered; 0 if it never has.
    loaded: u32,
}

/// A request that waits until its model is loaded; dropped when it no longer
/// does.
#[derive(Debug)]
pub struct Waiting<'a>(&'a ContextSizes);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

impl ContextSizes {
    /// Chooses a context in which `tokens` fit, of at most `most` tokens: a
    /// power of two, or `most` itself. `kept` is how long an idle model stays
    /// loaded; `None` for ever.
    pub fn choose(
        &self,
        model: &str,
        tokens: u32,
        most: u32,
        kept: Option<Duration>,
        now: Instant,
    ) -> u32 {
        let wanted = tokens
            .max(CONTEXT_MIN)
            .checked_next_power_of_two()
            .map_or(most, |size| size.min(most));
        let mut models = self.lock();
        let idle = |model: &Model| now.saturating_duration_since(model.used);
        let known = models.get(model).copied();
        let known = known.filter(|model| kept.is_none_or(|kept| idle(model) < kept));
        let num_ctx = known.map_or(wanted, |model| model.num_ctx.min(most).max(wanted));
        let loaded = known.map_or(0, |model| model.loaded);
        if models.len() >= MODELS_MAX && !models.contains_key(model) {
            let oldest = models.iter().min_by_key(|(_, model)| model.used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                models.remove(&oldest);
            }
        }
        let used = Model {
            num_ctx,
            used: now,
            loaded,
        };
        models.insert(model.into(), used);
        num_ctx
    }

    /// Notes that a model answers: it is loaded, and stays so from now on.
    pub fn answered(&self, model: &str, now: Instant) {
        if let Some(model) = self.lock().get_mut(model) {
            model.used = now;
            model.loaded = model.num_ctx;
        }
    }

    /// Returns whether a model was chosen a context for and has not answered
    /// since: it is probably being loaded.
    pub fn awaits(&self, model: &str) -> bool {
        let models = self.lock();
        let model = models.get(model);
        model.is_some_and(|model| model.loaded != model.num_ctx)
    }

    /// Notes that a request could not be sent: what it was chosen for is loaded
    /// nowhere, and nobody is bound by it.
    pub fn unsent(&self, model: &str) {
        let mut models = self.lock();
        match models.get_mut(model) {
            Some(known) if known.loaded > 0 => known.num_ctx = known.loaded,
            Some(_) => drop(models.remove(model)),
            None => {}
        }
    }

    /// Notes that a request waits for its model, until what is returned is
    /// dropped.
    pub fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Relaxed);
        Waiting(self)
    }

    /// Returns whether a request waits for its model.
    pub fn is_loading(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Model>> {
        // The map is whole between any two of its calls.
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Option<Duration> = Some(Duration::from_secs(300));

    #[test]
    fn sizes_are_powers_of_two_between_the_least_and_the_most() {
        for (tokens, num_ctx) in [
            (0, 2048),
            (2048, 2048),
            (2049, 4096),
            (9000, 16_384),
            (20_000, 20_000),
            (u32::MAX, 20_000),
        ] {
            let sizes = ContextSizes::default();
            let chosen = sizes.choose("m", tokens, 20_000, KEPT, Instant::now());
            assert_eq!(chosen, num_ctx, "{tokens}");
        }
    }

    #[test]
    fn a_size_only_grows_while_the_model_is_loaded() {
        let sizes = ContextSizes::default();
        let now = Instant::now();
        let choose = |tokens, now| sizes.choose("m", tokens, 32_768, KEPT, now);
        assert_eq!(choose(100, now), 2048);
        assert_eq!(choose(5000, now), 8192);
        assert_eq!(choose(100, now), 8192);
        let later = now + Duration::from_secs(290);
        sizes.answered("m", later);
        assert_eq!(choose(100, later + Duration::from_secs(290)), 8192);
        assert_eq!(choose(100, later + Duration::from_secs(600)), 2048);
    }

    #[test]
    fn what_was_never_sent_leaves_no_size_behind() {
        let sizes = ContextSizes::default();
        let now = Instant::now();
        let choose = |tokens| sizes.choose("m", tokens, 32_768, KEPT, now);
        assert_eq!(choose(20_000), 32_768);
        sizes.unsent("m");
        assert_eq!(choose(5000), 8192);
        sizes.answered("m", now);
        assert_eq!(choose(20_000), 32_768);
        sizes.unsent("m");
        assert!(!sizes.awaits("m"));
        assert_eq!(choose(1), 8192);
    }

    #[test]
    fn a_model_is_awaited_until_it_answers_and_again_when_it_has_to_be_loaded_anew() {
        let sizes = ContextSizes::default();
        let now = Instant::now();
        let choose = |tokens, now| sizes.choose("m", tokens, 32_768, KEPT, now);
        assert!(!sizes.awaits("m"));
        for (tokens, at) in [(1, 0), (5000, 1), (1, 900)] {
            let at = now + Duration::from_secs(at);
            choose(tokens, at);
            assert!(sizes.awaits("m"), "{tokens}");
            sizes.answered("m", at);
            choose(1, at);
            assert!(!sizes.awaits("m"));
        }
        let waiting = (sizes.wait(), sizes.wait());
        drop(waiting.0);
        assert!(sizes.is_loading());
        drop(waiting.1);
        assert!(!sizes.is_loading());
    }

    #[test]
    fn a_model_that_is_kept_for_ever_never_shrinks_and_one_that_is_not_always_does() {
        let sizes = ContextSizes::default();
        let now = Instant::now();
        let year = now + Duration::from_secs(31_000_000);
        sizes.choose("m", 5000, 32_768, None, now);
        assert_eq!(sizes.choose("m", 1, 32_768, None, year), 8192);
        let none = Some(Duration::ZERO);
        assert_eq!(sizes.choose("m", 1, 32_768, none, year), 2048);
    }

    #[test]
    fn models_do_not_share_a_size_and_their_number_is_bounded() {
        let sizes = ContextSizes::default();
        let now = Instant::now();
        for nth in 0..200 {
            let at = now + Duration::from_millis(nth);
            sizes.choose(&nth.to_string(), 5000, 32_768, KEPT, at);
        }
        assert_eq!(sizes.lock().len(), MODELS_MAX);
        assert_eq!(sizes.choose("199", 1, 32_768, KEPT, now), 8192);
        assert_eq!(sizes.choose("0", 1, 32_768, KEPT, now), 2048);
    }
}
