//! The desk of the process: who is told at the moment, and the one thread that
//! tells them.
//!
//! A plugin takes its posts when its snapshot goes live, and gives them back when
//! that is replaced: the thread goes on, with whoever is there then.

use std::{
    collections::{HashMap, HashSet},
    io,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use futures_util::FutureExt as _;
use tokio::{
    sync::{broadcast, mpsc, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use super::{
    board::{Alert, Board, Kind, Notice, Rules},
    deliver::Receiver,
};
use crate::{
    events::{Change, Event},
    lifecycle::State,
    metrics::Metrics,
    outbound::Outbound,
    resources::Resources,
};

/// How many notices of requests may wait.
const NOTICES_MAX: usize = 256;
/// How many alerts may be on their way to one receiver; more wait for their turn.
const DELIVERIES_MAX: usize = 16;
/// How often it is looked whether time has made something worth telling.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What a receiver and his settings are known by: a hash, since URLs are secrets.
pub(super) type Id = [u8; 32];

/// One receiver, with his settings.
pub(super) struct Post {
    /// Of both.
    pub(super) id: Id,
    /// Of the receiver alone.
    pub(super) of: Id,
    pub(super) wanted: Vec<Kind>,
    pub(super) rules: Rules,
    pub(super) receiver: Receiver,
}

/// A post that is taken.
struct Seat {
    post: Arc<Post>,
    board: Board,
    /// The plugins that have it in their settings.
    holders: HashSet<u64>,
    on_their_way: usize,
}

/// Everybody who is told.
#[derive(Default)]
struct Seats {
    by_id: HashMap<Id, Seat>,
    /// The last ticket that was drawn, for any of the boards.
    tickets: u64,
}

/// The desk. One per process.
#[derive(Default)]
pub(super) struct Desk {
    seats: Mutex<Seats>,
    /// Where requests leave their notices, once the thread runs.
    wire: OnceLock<mpsc::Sender<InUse>>,
}

/// A request was served by the fallback of its route.
struct InUse {
    route: Arc<str>,
    /// Who is told of it.
    posts: Arc<[Id]>,
}

/// What became of an alert.
struct Delivered {
    post: Id,
    ticket: u64,
    arrived: bool,
}

impl Desk {
    /// Takes posts for a plugin that serves from now on.
    pub(super) fn enter(&self, holder: u64, posts: &[Arc<Post>]) {
        let mut seats = self.lock();
        for post in posts {
            if let Some(seat) = seats.by_id.get_mut(&post.id) {
                seat.holders.insert(holder);
                continue;
            }
            let mut all = seats.by_id.values();
            let board = match all.find(|seat| seat.post.of == post.of) {
                Some(seat) => seat.board.heir(&post.wanted),
                None => {
                    let mut board = Board::default();
                    for seat in seats.by_id.values() {
                        board.learn(&seat.board, &post.wanted);
                    }
                    board
                }
            };
            let seat = Seat {
                post: Arc::clone(post),
                board,
                holders: HashSet::from([holder]),
                on_their_way: 0,
            };
            seats.by_id.insert(post.id, seat);
        }
    }

    /// Gives back what a plugin has taken, if it has.
    pub(super) fn leave(&self, holder: u64) {
        self.lock()
            .by_id
            .retain(|_, seat| !seat.holders.remove(&holder) || !seat.holders.is_empty());
    }

    /// Leaves a notice that a route was served by its fallback. Never waits.
    pub(super) fn fallback(&self, posts: &Arc<[Id]>, route: &Arc<str>) {
        if let Some(wire) = self.wire.get() {
            let (route, posts) = (Arc::clone(route), Arc::clone(posts));
            // With no room there are notices enough.
            wire.try_send(InUse { route, posts }).ok();
        }
    }

    /// Starts the thread, if it does not run yet. It ends with the process.
    ///
    /// # Errors
    /// The system has no thread for us.
    pub(super) fn start(this: &Arc<Self>, resources: &Resources) -> io::Result<()> {
        let _one_at_a_time = this.lock();
        if this.wire.get().is_some() {
            return Ok(());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (wire, heard) = mpsc::channel(NOTICES_MAX);
        let events = resources.events.subscribe();
        let thread = Thread {
            desk: Arc::clone(this),
            metrics: Arc::clone(&resources.metrics),
            process: resources.lifecycle.states(),
        };
        thread::Builder::new()
            .name("alert".to_owned())
            .spawn(move || runtime.block_on(thread.run(events, heard)))?;
        this.wire.set(wire).ok();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread has.
struct Thread {
    desk: Arc<Desk>,
    metrics: Arc<Metrics>,
    process: watch::Receiver<State>,
}

impl Thread {
    async fn run(
        self,
        mut events: broadcast::Receiver<Event>,
        mut fallbacks: mpsc::Receiver<InUse>,
    ) {
        let outbound = Arc::new(Outbound::new());
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut deliveries = JoinSet::new();
        loop {
            let may_be_due = tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => self.take(&notices_of(&event), |_| true),
                    Err(broadcast::error::RecvError::Lagged(lost)) => {
                        log::warn!("events came too fast for alerts: lost={lost}");
                        false
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                Some(InUse { route, posts }) = fallbacks.recv() => {
                    let notice = Notice {
                        kind: Kind::Fallback,
                        subject: route,
                        wrong: true,
                        detail: "served by its fallback".to_owned(),
                    };
                    self.take(&[notice], |id| posts.contains(id))
                }
                Some(done) = deliveries.join_next() => {
                    self.report(done);
                    true
                }
                _ = tick.tick() => true,
            };
            if may_be_due {
                for (post, alert) in self.due() {
                    let (outbound, metrics) = (Arc::clone(&outbound), Arc::clone(&self.metrics));
                    deliveries.spawn(deliver(post, alert, outbound, metrics));
                }
            }
        }
    }

    /// Puts notices on the boards of those whom they are for; returns whether
    /// there may be something to tell now.
    fn take(&self, notices: &[Notice], is_for: impl Fn(&Id) -> bool) -> bool {
        let now = Instant::now();
        let mut news = false;
        for (id, seat) in &mut self.desk.lock().by_id {
            for notice in notices {
                if !seat.post.wanted.contains(&notice.kind) || !is_for(id) {
                    continue;
                }
                let noticed = seat.board.notice(notice, seat.post.rules, now);
                news |= noticed.news;
                if let Some(kind) = noticed.forgot {
                    count(&self.metrics, kind, "dropped");
                    log::error!("too much is wrong to tell of all: kind={}", kind.as_str());
                }
            }
        }
        news
    }

    fn due(&self) -> Vec<(Arc<Post>, Alert)> {
        // Whoever serves in its place tells.
        if self.process.borrow().successor.is_some() {
            return Vec::new();
        }
        let now = Instant::now();
        let mut due = Vec::new();
        let mut seats = self.desk.lock();
        let Seats { by_id, tickets } = &mut *seats;
        for seat in by_id.values_mut() {
            let room = DELIVERIES_MAX.saturating_sub(seat.on_their_way);
            let alerts = seat.board.due(seat.post.rules, room, tickets, now);
            seat.on_their_way += alerts.len();
            due.extend(
                alerts
                    .into_iter()
                    .map(|alert| (Arc::clone(&seat.post), alert)),
            );
        }
        due
    }

    fn report(&self, done: Result<Delivered, tokio::task::JoinError>) {
        // They catch their panics, and nobody aborts them.
        let Ok(done) = done else { return };
        let now = Instant::now();
        let mut seats = self.desk.lock();
        if let Some(seat) = seats.by_id.get_mut(&done.post) {
            seat.on_their_way = seat.on_their_way.saturating_sub(1);
        }
        // The settings may be others meanwhile: then it is on an heir's board.
        for seat in seats.by_id.values_mut() {
            seat.board.report(done.ticket, done.arrived, now);
        }
    }
}

async fn deliver(
    post: Arc<Post>,
    alert: Alert,
    outbound: Arc<Outbound>,
    metrics: Arc<Metrics>,
) -> Delivered {
    let told = post.receiver.tell(&outbound, &alert, SystemTime::now());
    let arrived = AssertUnwindSafe(told).catch_unwind().await.unwrap_or(false);
    count(
        &metrics,
        alert.kind,
        if arrived { "sent" } else { "failed" },
    );
    Delivered {
        post: post.id,
        ticket: alert.ticket,
        arrived,
    }
}

fn count(metrics: &Metrics, kind: Kind, result: &str) {
    let labels = [kind.as_str(), result];
    metrics.alerts.with_label_values(&labels).inc();
}

/// Returns what an event says is wrong, or is right again.
fn notices_of(event: &Event) -> Vec<Notice> {
    let notice = |kind, subject: &Arc<str>, wrong, detail: String| Notice {
        kind,
        subject: Arc::clone(subject),
        wrong,
        detail,
    };
    let subject = &event.subject;
    match &event.change {
        Change::State { to, reason, .. } => {
            let key = matches!(*reason, "key_bad" | "quota");
            let down = *to == "down" && !key;
            let say = |wrong: bool| {
                if wrong {
                    format!("upstream is {to} ({reason})")
                } else {
                    format!("upstream is {to}")
                }
            };
            let mut notices = vec![notice(Kind::Down, subject, down, say(down))];
            // One that cannot be reached may still refuse the key.
            if key || matches!(*to, "ready" | "degraded") {
                notices.push(notice(Kind::Key, subject, key, say(key)));
            }
            notices
        }
        Change::Breaker { model, to, .. } => {
            let of = Arc::from(format!("{subject} {model}"));
            match *to {
                "open" => vec![notice(
                    Kind::Breaker,
                    &of,
                    true,
                    "breaker is open".to_owned(),
                )],
                "closed" => {
                    let detail = "breaker is closed again".to_owned();
                    vec![notice(Kind::Breaker, &of, false, detail)]
                }
                _ => Vec::new(),
            }
        }
        Change::Capture { dropping, reason } => {
            let detail = if *dropping {
                format!("exchanges are lost ({reason})")
            } else {
                "exchanges are captured again".to_owned()
            };
            vec![notice(Kind::Capture, subject, *dropping, detail)]
        }
        Change::Budget {
            period,
            of,
            percent,
        } => {
            let subject = Arc::from(format!("{subject} ({of} per {period})"));
            let detail = format!("{percent} % used");
            vec![notice(Kind::Budget, &subject, true, detail)]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::{Build, Configure as _, Plugin as _, alert};

    fn plugin(command: &str, resources: &Resources) -> alert::Alert {
        let settings = serde_json::json!({ "command": [command] });
        let build = Build {
            base: std::path::Path::new("."),
            resources,
            list: "",
            store: None,
        };
        alert::Alert::configure(serde_json::from_value(settings).unwrap(), &build).unwrap()
    }

    fn seats(resources: &Resources) -> usize {
        resources.shared::<Desk>("alert").lock().by_id.len()
    }

    fn runs(resources: &Resources) -> bool {
        resources.shared::<Desk>("alert").wire.get().is_some()
    }

    #[test]
    fn what_is_only_checked_does_nothing() {
        let resources = Resources::default();
        let checked = plugin("true", &resources);
        assert!(!runs(&resources));
        assert_eq!(seats(&resources), 0);
        checked.go_live(&resources);
        assert!(runs(&resources));
        assert_eq!(seats(&resources), 1);
    }

    #[test]
    fn who_is_told_is_what_the_live_configuration_says() {
        let resources = Resources::default();
        let (old, other) = (plugin("true", &resources), plugin("false", &resources));
        old.go_live(&resources);
        other.go_live(&resources);
        assert_eq!(seats(&resources), 2);
        // The same settings in another list, or after a reload.
        let same = plugin("true", &resources);
        same.go_live(&resources);
        assert_eq!(seats(&resources), 2);
        // Requests may hold it for long.
        old.retire();
        other.retire();
        assert_eq!(seats(&resources), 1);
        drop((old, other));
        assert_eq!(seats(&resources), 1);
        drop(same);
        assert_eq!(seats(&resources), 0);
    }
}
