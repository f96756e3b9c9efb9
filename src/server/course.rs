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
    process::Child,
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
/// How long a connection that is idle when the last request has ended may be used
/// once more: its client may be about to.
const ONE_MORE: Duration = Duration::from_millis(500);
/// How long nothing has to be under way: a connection is counted only when a thread
/// has come to it.
const SETTLED: Duration = Duration::from_millis(100);
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
    pub(super) successor_died: watch::Sender<bool>,
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
                if ended == Ended::Idle {
                    self.outlive(true, signals).await;
                }
                ended
            }
            Left::To(serving) => {
                let Serving { child, channel, .. } = *serving;
                let (ended, told) = self.leave(child, signals).await;
                if ended == Ended::Idle {
                    self.outlive(told, signals).await;
                }
                // Open to the end: the successor waits for that.
                drop(channel);
                ended
            }
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

    /// Lets what is under way end when a successor serves; says too whether it was
    /// told to stop meanwhile.
    async fn leave(&self, mut child: Child, signals: &mut Signals) -> (Ended, bool) {
        let died = self.successor_died.clone();
        tokio::spawn(async move {
            // Else it would stay as a zombie as long as this process is there.
            match child.wait().await {
                // It was told to stop, or has a successor itself.
                Ok(status) if status.success() => log::info!("the successor has ended"),
                Ok(status) => {
                    log::error!("the successor has died, nobody serves: {status}");
                    died.send_replace(true);
                }
                Err(why) => log::warn!("the successor cannot be watched: {why}"),
            }
        });
        // Idle connections end by themselves, as at any time: a client that is just
        // asking on one would take its being closed for a failure.
        let keep_alive = {
            let snapshot = self.gateway.snapshot();
            let limits = &snapshot.config().limits;
            limits.keep_alive.get().max(limits.header_timeout.get())
        };
        match self.drain(self.upgrade_drain(), keep_alive, signals).await {
            Drained::Ended(ended) => (ended, false),
            Drained::Told(stop) => (self.stop(stop, signals).await, true),
        }
    }

    /// Returns how long what is under way may take behind an upgrade.
    fn upgrade_drain(&self) -> Duration {
        let snapshot = self.gateway.snapshot();
        let config = snapshot.config();
        let drain = config.upgrade.drain.unwrap_or(config.limits.stream_timeout);
        drain.get()
    }

    /// Waits for the end of the process that this one has succeeded, if it is still
    /// finishing what it had under way. A service manager ends the service with its
    /// main process, and sends a second signal to whoever is left: so nobody goes
    /// before those that were there before him. `told`: this one was told to stop.
    async fn outlive(&self, mut told: bool, signals: &mut Signals) {
        let mut alone = self.alone.subscribe();
        if *alone.borrow() || !ServiceManager::listens() {
            return;
        }
        log::info!("waiting for the process before this one to finish");
        loop {
            let most = match told {
                true => self.gateway.snapshot().config().shutdown.drain.get(),
                false => self.upgrade_drain(),
            };
            if told {
                let manager = &self.gateway.resources.service_manager;
                manager.stopping(most + LAST_WORDS + WORKERS_STOP);
            }
            tokio::select! {
                // The sender is here.
                _ = alone.wait_for(|alone| *alone) => return,
                () = sleep(most + LAST_WORDS) => return,
                _ = signals.next() => {}
            }
            if told {
                log::warn!("stopping at once: second signal");
                return;
            }
            told = true;
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
        match self.drain(drain.get(), ONE_MORE, signals).await {
            Drained::Ended(ended) => ended,
            Drained::Told(_) => {
                log::warn!("stopping at once: second signal");
                Ended::Early
            }
        }
    }

    /// Waits until nothing is under way, so long at most.
    async fn drain(&self, most: Duration, one_more: Duration, signals: &mut Signals) -> Drained {
        let mut died = self.successor_died.subscribe();
        let nobody_serves = async {
            // The sender is here.
            died.wait_for(|died| *died).await.ok();
            // Without a manager nobody would start it anew.
            if !ServiceManager::listens() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = nobody_serves => {
                log::warn!("stopping at once, so that the service is started anew");
                Drained::Ended(Ended::Early)
            }
            () = self.idle(one_more) => Drained::Ended(Ended::Idle),
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
    /// sent. Connections that wait for their client are closed when none has asked
    /// for `one_more`.
    async fn idle(&self, one_more: Duration) {
        let write_timeout = self.gateway.snapshot().config().limits.write_timeout.get();
        let mut done = None;
        let mut quiet = None;
        let mut asked = Instant::now();
        loop {
            let now = Instant::now();
            if self.lifecycle().requests() > 0 {
                asked = now;
                (done, quiet) = (None, None);
            } else if now < asked + one_more && !self.connections.is_empty() {
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
                    // Who was accepted a moment ago may not be counted yet.
                    let is_over = now >= quiet_since + SETTLED
                        && self.connections.is_empty()
                        && self.lifecycle().admin_requests() == 0;
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
        if timeout(LAST_WORDS, self.idle(Duration::ZERO))
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
