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
//! SIGUSR2, or who asks at the admin listener: a successor is started
//! ([`successor`]), and when it serves this process drains as above, for
//! `upgrade.drain`, without a lame duck: the address serves on.
//!
//! **Invariant:** Pingora hears of all this only when it is over.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    Predecessor, WORKERS_STOP,
    sockets::Sockets,
    successor::{self, Failure, Program, Serving},
};

use crate::{
    config::Shutdown,
    gateway::Gateway,
    lifecycle::{Lifecycle, Stage, Upgraded},
    proxy::Connections,
    service_manager::ServiceManager,
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
    pub(super) gateway: Arc<Gateway>,
    pub(super) connections: Arc<Connections>,
    pub(super) sockets: Sockets,
    /// Whose place this process takes.
    pub(super) predecessor: Option<Predecessor>,
    /// Whether that has ended, or never was.
    pub(super) alone: watch::Sender<bool>,
    pub(super) program: Program,
    /// The address of the data listener.
    pub(super) listen: String,
    /// How many listeners there are, and how many of them accept.
    pub(super) listeners: usize,
    pub(super) accepting: watch::Sender<usize>,
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
        let upgrade = signal(SignalKind::user_defined2());
        match Signals::listen().and_then(|signals| Ok((signals, upgrade?))) {
            Ok((mut signals, upgrade)) => self.run(&mut signals, upgrade).await,
            Err(why) => {
                log::error!(
                    "signals cannot be handled, only SIGKILL will stop this process: {why}"
                );
                std::future::pending().await
            }
        }
        ShutdownSignal::FastShutdown
    }
}

/// How serving ended.
enum Left {
    /// It is told to stop.
    Stopped(Stop),
    /// To a successor.
    To(Box<Serving>),
}

/// What ended a drain.
enum Drained {
    Ended(Ended),
    /// A signal.
    Told(Stop),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Nothing is under way any more.
    Idle,
    /// Something is.
    Early,
}

impl Course {
    fn lifecycle(&self) -> &Lifecycle {
        &self.gateway.resources.lifecycle
    }

    async fn run(&self, signals: &mut Signals, upgrade: Signal) {
        let left = match self.begin(signals).await {
            Some(stop) => Left::Stopped(stop),
            None => self.serve(signals, upgrade).await,
        };
        let ended = match left {
            Left::Stopped(stop) => {
                let ended = self.stop(stop, signals).await;
                if ended == Ended::Idle && ServiceManager::listens() {
                    self.outlive(signals).await;
                }
                ended
            }
            Left::To(serving) => self.leave(serving, signals).await,
        };
        if ended == Ended::Early {
            self.end_early().await;
        }
    }

    /// Waits until all listeners accept, or somebody wants it to stop already.
    async fn begin(&self, signals: &mut Signals) -> Option<Stop> {
        let mut accepting = self.accepting.subscribe();
        let all = async {
            let all = accepting.wait_for(|accepting| *accepting == self.listeners);
            // The sender is here.
            drop(all.await);
        };
        tokio::select! {
            () = all => {}
            stop = signals.next() => return Some(stop),
        }
        self.lifecycle().reach(Stage::Serving);
        let resources = Arc::clone(&self.gateway.resources);
        let status = format!("serving on {}", self.listen);
        let leads = move || resources.service_manager.ready(&status);
        let Some(predecessor) = self.predecessor.clone() else {
            leads();
            return None;
        };
        predecessor.serving();
        let alone = self.alone.clone();
        tokio::spawn(async move {
            predecessor.outlive(leads).await;
            alone.send_replace(true);
        });
        None
    }

    /// Serves until it is told to stop, or has a successor.
    async fn serve(&self, signals: &mut Signals, mut upgrade: Signal) -> Left {
        // Called once per process.
        let Some(mut asked) = self.lifecycle().upgrades_asked() else {
            return Left::Stopped(signals.next().await);
        };
        loop {
            let asker = tokio::select! {
                stop = signals.next() => return Left::Stopped(stop),
                Some(asker) = asked.recv() => Some(asker),
                _ = upgrade.recv() => None,
            };
            let mut upgrading = pin!(self.upgrade());
            let upgraded = loop {
                tokio::select! {
                    biased;
                    // The candidate ends with the future.
                    stop = signals.next() => return Left::Stopped(stop),
                    upgraded = &mut upgrading => break upgraded,
                    Some(other) = asked.recv() => {
                        // Who asks and does not wait need not be told.
                        other.send(Err("an upgrade is under way already".to_owned())).ok();
                    }
                    _ = upgrade.recv() => log::warn!("an upgrade is under way already"),
                }
            };
            let (told, serving): (Upgraded, _) = match upgraded {
                Ok(serving) => (Ok(serving.successor.clone()), Some(serving)),
                Err(failure) => (Err(failure.reason), None),
            };
            if let Some(asker) = asker {
                asker.send(told).ok();
            }
            if let Some(serving) = serving {
                return Left::To(Box::new(serving));
            }
        }
    }

    /// Starts a successor, and leaves the listeners to it if it serves.
    async fn upgrade(&self) -> Result<Serving, Failure> {
        let path = self.program.path().display();
        log::info!("upgrade: starting {path}");
        let prepare = self.gateway.snapshot().config().upgrade.prepare.get();
        let mut upgraded = successor::start(&self.program, &self.sockets, prepare).await;
        let outcome = match &mut upgraded {
            Ok(serving) => {
                let successor = serving.successor.clone();
                // Whoever comes from now on is accepted there.
                self.lifecycle().hand_over(successor.pid);
                self.sockets.close_all();
                let manager = &self.gateway.resources.service_manager;
                manager.hand_over(successor.pid);
                // Not before: the manager hears only the main process.
                serving.leads().await;
                log::info!(
                    "upgraded: successor={} version={} requests_in_flight={}",
                    successor.pid,
                    successor.version,
                    self.lifecycle().requests(),
                );
                "handed_over"
            }
            Err(failure) => {
                log::error!(
                    "upgrade failed, this process goes on: {} ({})",
                    failure.reason,
                    failure.outcome,
                );
                failure.outcome
            }
        };
        let upgrades = &self.gateway.resources.metrics.upgrades;
        upgrades.with_label_values(&[outcome]).inc();
        upgraded
    }

    /// Lets what is under way end when a successor serves.
    async fn leave(&self, serving: Box<Serving>, signals: &mut Signals) -> Ended {
        // The channel stays open to the end: the successor waits for that.
        let Serving {
            mut child, channel, ..
        } = *serving;
        let _open = channel;
        tokio::spawn(async move {
            // Else it would stay as a zombie as long as this process is there.
            if let Ok(status) = child.wait().await {
                log::warn!("the successor has ended: {status}");
            }
        });
        let (drain, keep_alive) = {
            let snapshot = self.gateway.snapshot();
            let config = snapshot.config();
            let limits = &config.limits;
            let drain = config.upgrade.drain.unwrap_or(limits.stream_timeout);
            let keep_alive = limits.keep_alive.get().max(limits.header_timeout.get());
            (drain.get(), keep_alive)
        };
        // Idle connections end by themselves, as at any time: a client that is just
        // asking on one would take its being closed for a failure.
        let idle_until = Instant::now() + keep_alive;
        match self.drain(drain, idle_until, signals).await {
            Drained::Ended(ended) => ended,
            Drained::Told(stop) => self.stop(stop, signals).await,
        }
    }

    /// Waits for the end of the process that this one has succeeded, if it is still
    /// finishing what it had under way: with the main process the service ends, and
    /// whoever is left is killed.
    async fn outlive(&self, signals: &mut Signals) {
        let mut alone = self.alone.subscribe();
        if *alone.borrow() {
            return;
        }
        log::info!("waiting for the process before this one to finish");
        let drain = self.gateway.snapshot().config().shutdown.drain.get();
        tokio::select! {
            // The sender is here.
            _ = alone.wait_for(|alone| *alone) => {}
            () = sleep(drain + LAST_WORDS) => {}
            _ = signals.next() => log::warn!("stopping at once: second signal"),
        }
    }

    /// Stops: first the lame duck, then the drain.
    async fn stop(&self, stop: Stop, signals: &mut Signals) -> Ended {
        let Shutdown { lame_duck, drain } = self.gateway.snapshot().config().shutdown.clone();
        let accepts = self.lifecycle().state().stage < Stage::Draining;
        let lame_duck = match stop {
            Stop::Terminate if accepts => lame_duck.get(),
            _ => Duration::ZERO,
        };
        log::info!(
            "stopping: requests_in_flight={} lame_duck={lame_duck:?} drain={:?}",
            self.lifecycle().requests(),
            drain.get(),
        );
        let most = lame_duck + drain.get() + LAST_WORDS + WORKERS_STOP + PARTING;
        self.gateway.resources.service_manager.stopping(most);
        self.lifecycle().reach(Stage::LameDuck);
        if timeout(lame_duck, signals.next()).await.is_ok() {
            log::warn!("stopping at once: second signal");
            return Ended::Early;
        }
        self.lifecycle().reach(Stage::Draining);
        self.sockets.close(&self.listen);
        match self.drain(drain.get(), Instant::now(), signals).await {
            Drained::Ended(ended) => ended,
            Drained::Told(_) => {
                log::warn!("stopping at once: second signal");
                Ended::Early
            }
        }
    }

    /// Waits until nothing is under way, so long at most.
    async fn drain(&self, most: Duration, idle_until: Instant, signals: &mut Signals) -> Drained {
        tokio::select! {
            () = self.idle(idle_until) => Drained::Ended(Ended::Idle),
            () = sleep(most) => {
                log::warn!(
                    "the time to drain is over, requests_in_flight={}",
                    self.lifecycle().requests(),
                );
                Drained::Ended(Ended::Early)
            }
            stop = signals.next() => Drained::Told(stop),
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
