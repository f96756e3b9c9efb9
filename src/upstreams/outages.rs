//! The models for which nobody in a group could be asked, until somebody can.
//!
//! **Invariant:** bounded: the names come from clients. As long as there are
//! none, asking takes no lock.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// How many are remembered.
const MODELS_MAX: usize = 64;
/// For how long, if nobody asks again.
const REMEMBERED: Duration = Duration::from_secs(300);

/// The outages of one group.
#[derive(Debug, Default)]
pub(super) struct Outages {
    any: AtomicBool,
    /// Each with when nobody could last be asked.
    models: Mutex<Vec<(Arc<str>, Instant)>>,
}

impl Outages {
    /// Returns whether there may be one.
    pub(super) fn any(&self) -> bool {
        self.any.load(Relaxed)
    }

    /// Notes that nobody can be asked for a model.
    pub(super) fn begin(&self, model: &Arc<str>, now: Instant) {
        let mut models = self.lock();
        if models.len() >= MODELS_MAX {
            forget_old(&mut models, now);
        }
        let room = models.len() < MODELS_MAX;
        match models.iter_mut().find(|(known, _)| known == model) {
            Some((_, last)) => *last = now,
            None if room => models.push((Arc::clone(model), now)),
            None => {}
        }
        self.any.store(!models.is_empty(), Relaxed);
    }

    /// Notes that somebody can be asked; returns whether nobody could before.
    pub(super) fn end(&self, model: &str, now: Instant) -> bool {
        let mut models = self.lock();
        forget_old(&mut models, now);
        let found = models.iter().position(|(known, _)| &**known == model);
        if let Some(at) = found {
            models.swap_remove(at);
        }
        self.any.store(!models.is_empty(), Relaxed);
        found.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Arc<str>, Instant)>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn forget_old(models: &mut Vec<(Arc<str>, Instant)>, now: Instant) {
    models.retain(|(_, last)| now.saturating_duration_since(*last) < REMEMBERED);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_ends_once_and_only_so_many_are_remembered_for_so_long() {
        let (outages, now) = (Outages::default(), Instant::now());
        assert!(!outages.any() && !outages.end("a", now));
        outages.begin(&"a".into(), now);
        assert!(outages.any() && !outages.end("b", now));
        assert!(outages.end("a", now));
        assert!(!outages.any() && !outages.end("a", now));
        for nth in 0..1000 {
            outages.begin(&format!("m{nth}").into(), now);
        }
        assert_eq!(outages.lock().len(), MODELS_MAX);
        let later = now + REMEMBERED;
        assert!(!outages.end("m1", later));
        assert!(!outages.any());
    }
}
