//! The course of the process: what signals make of it, stage by stage, to its
//! end.
//!
//! SIGTERM: for `shutdown.lame_duck` everybody is still served, while `/readyz`
//! and every answer say that it is time to go elsewhere. Then nobody is accepted
//! any more, and what is under way ends, for `shutdown.drain` at most. What is
//! left is told so by an error. SIGINT does without the lame duck: whoever is at
//! the keyboard has no load balancer. A second signal of either kind is the end at
//! once.
//!
//! **Invariant:** Pingora hears of all this only when it is over.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{sleep, timeout},
};

use crate::{
    config::Shutdown,
    gateway::Gateway,
    lifecycle::{Lifecycle, Stage},
    proxy::Connections,
};

/// How often a draining process looks whether it is done.
const LOOK: Duration = Duration::from_millis(20);
/// How long connections have to close when the last request has ended: to send
/// what is left of an answer, and to read that there will be none.
const PARTING: Duration = Duration::from_secs(1);
/// How long those who are told that it ends have to be told.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Turns signals into stages, and the last stage into Pingora's shutdown.
pub(super) struct Course {
    gateway: Arc<Gateway>,
    connections: Arc<Connections>,
}

/// A signal that asks the process to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Terminate,
    Interrupt,
}

/// The signals that ask it to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> Stop {
        tokio::select! {
            _ = self.terminate.recv() => Stop::Terminate,
            _ = self.interrupt.recv() => Stop::Interrupt,
        }
    }
}

#[async_trait]
impl ShutdownSignalWatch for Course {
    async fn recv(&self) -> ShutdownSignal {
        let mut signals = match Signals::listen() {
            Ok(signals) => signals,
            Err(why) => {
                log::error!(
                    "signals cannot be handled, only SIGKILL will stop this process: {why}"
                );
                return std::future::pending().await;
            }
        };
        self.lifecycle().reach(Stage::Serving);
        let stop = signals.next().await;
        if self.stop(stop, &mut signals).await == Ended::Early {
            self.end_early().await;
        }
        ShutdownSignal::FastShutdown
    }
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Nothing is under way any more.
    Idle,
    /// Something is.
    Early,
}

impl Course {
    pub(super) fn new(gateway: Arc<Gateway>, connections: Arc<Connections>) -> Self {
        Self {
            gateway,
            connections,
        }
    }

    fn lifecycle(&self) -> &Lifecycle {
        &self.gateway.resources.lifecycle
    }

    fn shutdown(&self) -> Shutdown {
        self.gateway.snapshot().config().shutdown.clone()
    }

    /// Stops: first the lame duck, then the drain.
    async fn stop(&self, stop: Stop, signals: &mut Signals) -> Ended {
        let Shutdown { lame_duck, drain } = self.shutdown();
        let lame_duck = match stop {
            Stop::Terminate => lame_duck.get(),
            Stop::Interrupt => Duration::ZERO,
        };
        log::info!(
            "stopping: requests_in_flight={} lame_duck={lame_duck:?} drain={:?}",
            self.lifecycle().requests(),
            drain.get(),
        );
        self.lifecycle().reach(Stage::LameDuck);
        if timeout(lame_duck, signals.next()).await.is_ok() {
            log::warn!("stopping at once: second signal");
            return Ended::Early;
        }
        self.lifecycle().reach(Stage::Draining);
        tokio::select! {
            () = self.idle(Instant::now()) => Ended::Idle,
            () = sleep(drain.get()) => {
                log::warn!(
                    "stopping: the time to drain is over, requests_in_flight={}",
                    self.lifecycle().requests(),
                );
                Ended::Early
            }
            _ = signals.next() => {
                log::warn!("stopping at once: second signal");
                Ended::Early
            }
        }
    }

    /// Waits until nothing is under way: no request, no answer that is not yet
    /// sent. Connections that wait for their client are closed then, from
    /// `idle_until` on.
    async fn idle(&self, idle_until: Instant) {
        let write_timeout = self.gateway.snapshot().config().limits.write_timeout.get();
        let mut done = None;
        let mut quiet = None;
        loop {
            let now = Instant::now();
            if self.lifecycle().requests() > 0 {
                (done, quiet) = (None, None);
            } else if now < idle_until && !self.connections.is_empty() {
                quiet = None;
            } else {
                // Who does not read has as long as at any time.
                let done_since = *done.get_or_insert(now);
                let is_busy = self.connections.any_busy() && now < done_since + write_timeout;
                if is_busy {
                    quiet = None;
                } else {
                    self.connections.stop_idle();
                    let quiet_since = *quiet.get_or_insert(now);
                    let is_over =
                        self.connections.is_empty() && self.lifecycle().admin_requests() == 0;
                    if is_over || now >= quiet_since + PARTING {
                        return;
                    }
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Tells everybody who is left that it ends, and waits until they are told.
    async fn end_early(&self) {
        self.lifecycle().reach(Stage::Ending);
        if timeout(LAST_WORDS, self.idle(Instant::now()))
            .await
            .is_err()
        {
            log::warn!(
                "stopped with requests under way: {}",
                self.lifecycle().requests()
            );
        }
    }
}
