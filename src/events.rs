//! What changed that somebody may want to hear of: a bounded broadcast.
//!
//! Whoever wants to hear calls [`Events::subscribe`]; whoever has something to
//! tell calls [`Events::tell`], which also writes the line of the log and counts
//! the metric, so that an event, a line and a number are always one and the
//! same thing.
//!
//! **Invariant:** telling never waits. Who listens too slowly loses the oldest
//! events, and is told how many.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::broadcast;

use crate::metrics::Metrics;

/// How many events a slow listener may be behind.
pub const CAPACITY: usize = 1024;

/// Something that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: SystemTime,
    /// What it is about: the name of an upstream, of a key, or a folder.
    pub subject: Arc<str>,
    /// What about it.
    pub change: Change,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Its state as a whole.
    State {
        /// The state before, as a word.
        from: &'static str,
        /// The state now, as a word.
        to: &'static str,
        /// Why, as a word; `-` for no particular reason.
        reason: &'static str,
        /// How long it should last, if that is known.
        wait: Option<Duration>,
    },
    /// Its breaker for one model.
    Breaker {
        /// The model, by the name it is sent with. A client's word: never a
        /// metric label.
        model: Arc<str>,
        /// `closed`, `open` or `half_open`.
        to: &'static str,
        /// How long it is open at least.
        wait: Option<Duration>,
    },
    /// Whether exchanges can be kept in a folder of captures.
    Capture {
        /// Whether they are lost at the moment.
        dropping: bool,
        /// Why, in a few words of ours.
        reason: &'static str,
    },
    /// How much of a key's budget is used.
    Budget {
        /// `day` or `month`.
        period: &'static str,
        /// `tokens` or `money`.
        of: &'static str,
        /// The part that is used, in percent: told once when it is near its end,
        /// and once when it is there.
        percent: u32,
    },
}

/// The broadcast. One per process.
#[derive(Debug)]
pub struct Events {
    sender: broadcast::Sender<Event>,
    metrics: Arc<Metrics>,
}

impl Events {
    /// Makes a broadcast that nobody listens to yet.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            sender: broadcast::Sender::new(CAPACITY),
            metrics,
        }
    }

    /// Returns a receiver of everything that is told from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    /// Tells everybody, the log and the metrics.
    pub fn tell(&self, subject: &Arc<str>, change: Change) {
        self.note(subject, &change);
        let event = Event {
            at: SystemTime::now(),
            subject: Arc::clone(subject),
            change,
        };
        // Err means that nobody listens.
        self.sender.send(event).ok();
    }

    fn note(&self, subject: &Arc<str>, change: &Change) {
        let shown = |wait: &Option<Duration>| match wait {
            Some(wait) => format!(" for={:.1}s", wait.as_secs_f64()),
            None => String::new(),
        };
        match change {
            Change::State {
                from,
                to,
                reason,
                wait,
            } => {
                let level = match (*to, *reason) {
                    // Only people can mend these.
                    (_, "key_bad" | "quota" | "tls") => log::Level::Error,
                    ("down", _) => log::Level::Warn,
                    _ => log::Level::Info,
                };
                log::log!(
                    level,
                    "upstream's state changed: name={subject} from={from} to={to} reason={reason}{}",
                    shown(wait)
                );
                self.metrics
                    .upstream_transitions
                    .with_label_values(&[&**subject, to, reason])
                    .inc();
            }
            Change::Breaker { model, to, wait } => {
                let level = match *to {
                    "open" => log::Level::Warn,
                    _ => log::Level::Info,
                };
                log::log!(
                    level,
                    "breaker changed: name={subject} model={model:?} to={to}{}",
                    shown(wait)
                );
                self.metrics
                    .breaker_transitions
                    .with_label_values(&[&**subject, to])
                    .inc();
            }
            Change::Capture { dropping, reason } => {
                if *dropping {
                    log::error!("exchanges are not captured: dir={subject} reason={reason}");
                } else {
                    log::info!("exchanges are captured again: dir={subject}");
                }
                let to = if *dropping { "dropping" } else { "capturing" };
                self.metrics
                    .capture_transitions
                    .with_label_values(&[to])
                    .inc();
            }
            Change::Budget {
                period,
                of,
                percent,
            } => {
                log::warn!("budget: key={subject} period={period} of={of} used={percent}%");
                let level = if *percent < 100 { "near" } else { "used_up" };
                self.metrics
                    .budget_transitions
                    .with_label_values(&[period, of, level])
                    .inc();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::broadcast::error::TryRecvError;

    use super::*;

    fn down() -> Change {
        Change::State {
            from: "ready",
            to: "down",
            reason: "connect",
            wait: None,
        }
    }

    #[test]
    fn what_is_told_is_heard_and_counted_once() {
        let metrics = Arc::new(Metrics::new());
        let events = Events::new(Arc::clone(&metrics));
        let name: Arc<str> = "gpu-1".into();
        events.tell(&name, down());
        let mut heard = events.subscribe();
        events.tell(&name, down());
        assert_eq!(heard.try_recv().unwrap().change, down());
        assert_eq!(heard.try_recv(), Err(TryRecvError::Empty));
        let series = metrics
            .upstream_transitions
            .with_label_values(&["gpu-1", "down", "connect"]);
        assert_eq!(series.get(), 2);
    }

    #[test]
    fn who_listens_too_slowly_loses_the_oldest_and_nobody_waits() {
        let events = Events::new(Arc::new(Metrics::new()));
        let name: Arc<str> = "gpu-1".into();
        let mut slow = events.subscribe();
        for _ in 0..CAPACITY + 10 {
            events.tell(&name, down());
        }
        assert_eq!(slow.try_recv(), Err(TryRecvError::Lagged(10)));
    }
}
