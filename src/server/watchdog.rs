//! The watchdog: the service manager is told that this process is alive, as long as
//! the threads that serve connections are.
//!
//! A task on each of the runtimes that matter sets a mark now and then; the manager
//! is told only while all marks are fresh. A process whose threads are all stuck
//! falls silent, and is started anew (`WatchdogSec=`).

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use pingora::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::time::{Instant, interval};

use crate::{gateway::Gateway, service_manager::ServiceManager};

/// How often within the manager's patience everything happens: a beat may be late
/// by half of that.
const BEATS: u32 = 4;

/// Looks at the marks.
#[derive(Debug)]
pub(super) struct Watchdog {
    every: Duration,
    begun: Instant,
    marks: Mutex<Vec<Arc<AtomicU64>>>,
}

/// The mark of one runtime.
#[derive(Debug)]
pub(super) struct Pulse {
    every: Duration,
    begun: Instant,
    mark: Arc<AtomicU64>,
}

impl Pulse {
    /// Beats for ever, on the runtime that this is spawned on.
    pub(super) async fn beat(self) {
        let mut beats = interval(self.every);
        loop {
            let now = beats.tick().await;
            self.mark.store(millis(now - self.begun), Ordering::Relaxed);
        }
    }
}

impl Watchdog {
    /// Returns one if the service manager wants it.
    pub(super) fn find() -> Option<Self> {
        ServiceManager::patience().map(Self::new)
    }

    fn new(patience: Duration) -> Self {
        Self {
            every: (patience / BEATS).max(Duration::from_millis(1)),
            begun: Instant::now(),
            marks: Mutex::default(),
        }
    }

    /// Returns the mark of one more runtime.
    pub(super) fn pulse(&self) -> Pulse {
        let mark = Arc::new(AtomicU64::new(0));
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.push(Arc::clone(&mark));
        Pulse {
            every: self.every,
            begun: self.begun,
            mark,
        }
    }

    /// Returns whether every runtime has beaten lately.
    fn all_beat(&self, now: Instant) -> bool {
        let oldest = millis((now - self.begun).saturating_sub(self.every * 2));
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks
            .iter()
            .all(|mark| mark.load(Ordering::Relaxed) >= oldest)
    }

    /// Returns the job that tells the manager.
    pub(super) fn run_with(self, gateway: Arc<Gateway>) -> Telling {
        Telling {
            watchdog: self,
            gateway,
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Tells the manager.
pub(super) struct Telling {
    watchdog: Watchdog,
    gateway: Arc<Gateway>,
}

#[async_trait]
impl BackgroundService for Telling {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let mut looks = interval(self.watchdog.every);
        loop {
            let now = looks.tick().await;
            if self.watchdog.all_beat(now) {
                self.gateway.resources.service_manager.alive();
            } else {
                log::error!("the threads that serve are stuck");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_alive_only_while_every_runtime_beats() {
        let patience = Duration::from_secs(30);
        let watchdog = Watchdog::new(patience);
        let beating = tokio::spawn(watchdog.pulse().beat());
        let other = tokio::spawn(watchdog.pulse().beat());
        tokio::time::sleep(patience).await;
        assert!(watchdog.all_beat(Instant::now()));
        other.abort();
        tokio::time::sleep(patience).await;
        assert!(!watchdog.all_beat(Instant::now()), "one is stuck");
        beating.abort();
    }
}
