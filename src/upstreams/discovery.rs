//! Which models an upstream says it has: what it told last, and when to ask
//! again.
//!
//! Nothing here asks. Whoever does takes [`Discovery::turn`] first, so that one
//! asks at a time, and tells what came with [`Discovery::note`].
//!
//! **Invariant:** an upstream that fails keeps the list it told last.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The most models that are remembered of one upstream, and listed in all.
pub const MODELS_MAX: usize = 10_000;

/// How long a list counts as fresh.
const FRESH: Duration = Duration::from_secs(30);
/// How long an upstream is left alone that did not tell.
const PAUSE: Duration = Duration::from_secs(5);
/// The longest name of a model, in bytes; nothing longer can be asked for.
const NAME_MAX: usize = 256;

/// What is known of one upstream's models.
#[derive(Debug, Default)]
pub struct Discovery {
    known: Mutex<Known>,
    /// Held by the one who asks.
    pub turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    /// Sorted, each once; `None` until it has told for the first time.
    models: Option<Arc<[Box<str>]>>,
    ask_again: Option<Instant>,
}

impl Discovery {
    /// Returns the names it told last, sorted, each once; `None` if it never
    /// told any.
    pub fn models(&self) -> Option<Arc<[Box<str>]>> {
        self.lock().models.clone()
    }

    /// Returns whether it is time to ask.
    pub fn is_due(&self, now: Instant) -> bool {
        self.lock().ask_again.is_none_or(|at| at <= now)
    }

    /// Notes what it told; `None` if it did not. Names that nobody could ask
    /// for are left out.
    pub fn note(&self, told: Option<Vec<String>>, now: Instant) {
        let mut known = self.lock();
        let Some(mut names) = told else {
            known.ask_again = Some(now + PAUSE);
            return;
        };
        names.retain(|name| {
            (1..=NAME_MAX).contains(&name.len()) && !name.contains(char::is_control)
        });
        names.sort_unstable();
        names.dedup();
        names.truncate(MODELS_MAX);
        known.models = Some(names.into_iter().map(String::into_boxed_str).collect());
        known.ask_again = Some(now + FRESH);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(discovery: &Discovery) -> Vec<String> {
        let models = discovery.models().unwrap();
        models.iter().map(ToString::to_string).collect()
    }

    fn told(names: &[&str]) -> Option<Vec<String>> {
        Some(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn a_list_is_sorted_and_has_nothing_that_cannot_be_asked_for() {
        let discovery = Discovery::default();
        assert!(discovery.models().is_none());
        let long = "m".repeat(257);
        discovery.note(told(&["b", "a", "b", "", "x\ny", &long]), Instant::now());
        assert_eq!(names(&discovery), ["a", "b"]);
        let many = (0..MODELS_MAX + 5).map(|i| format!("{i:05}")).collect();
        discovery.note(Some(many), Instant::now());
        assert_eq!(names(&discovery).len(), MODELS_MAX);
    }

    #[test]
    fn it_is_asked_again_after_30_seconds_or_5_if_it_did_not_tell() {
        let discovery = Discovery::default();
        let now = Instant::now();
        let after = |secs| now + Duration::from_secs(secs);
        assert!(discovery.is_due(now));
        discovery.note(told(&["a"]), now);
        assert!(!discovery.is_due(after(29)));
        assert!(discovery.is_due(after(30)));
        discovery.note(None, after(30));
        assert!(!discovery.is_due(after(34)));
        assert!(discovery.is_due(after(35)));
        assert_eq!(names(&discovery), ["a"]);
    }
}
