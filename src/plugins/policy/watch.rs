//! Rules that look at large prompts end when nobody waits for them any longer,
//! and when they take too long.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Says when a look at a prompt has to end.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    until: Instant,
    left: Arc<AtomicBool>,
}

/// Why a look at a prompt came to no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stopped;

impl Watch {
    /// Begins now, and lasts so long at most.
    pub(super) fn new(time: Duration) -> Self {
        let now = Instant::now();
        Self {
            until: now.checked_add(time).unwrap_or(now),
            left: Arc::default(),
        }
    }

    /// Returns what says, when it is dropped, that nobody waits any longer.
    pub(super) fn waiting(&self) -> Waiting {
        Waiting(Arc::clone(&self.left))
    }

    /// Asked between two slices of work.
    ///
    /// # Errors
    /// It has to end.
    pub(super) fn goes_on(&self) -> Result<(), Stopped> {
        if self.left.load(Ordering::Relaxed) || Instant::now() >= self.until {
            return Err(Stopped);
        }
        Ok(())
    }
}

/// Somebody waits, as long as this is there.
#[derive(Debug)]
pub(super) struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
