//! The exchange's side of the line in front of a group: how long it waits
//! there, what its client is told meanwhile, and what if its turn never comes.
//!
//! The line itself is [`Waiting`](crate::upstreams::Waiting). Whether a request
//! may wait is decided when it comes, without waiting: see
//! [`Queue::make_room`](crate::upstreams::queue::Queue::make_room).

use std::time::{Duration, Instant};

use http::StatusCode;

use super::client::{Client, Left, Waited};
use crate::{
    client_ip::one_client,
    context::{Class, RequestContext},
    error::Error,
    metrics::Metrics,
    routes::{Plan, Step},
    upstreams::{Entered, Key, Place, Reason, Rules, Seeker, Slot, Told},
};

/// How often who waits looks although nothing was freed, and the shortest time
/// between two comments on its position.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How a slot was sought.
pub(super) enum Sought {
    /// It is here.
    Slot(Slot),
    /// Nobody is left to try here.
    Nobody,
    /// Everybody is busy; this is what the client is told.
    Busy(Error),
    /// The same, but there is another group to ask. If nobody helps there, it
    /// may come back and wait until then.
    Spilled(Error, Instant),
}

/// How long a request waits.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// As long as the group's `queue` says, but if there is another group after
    /// this one, at most `spill_after`.
    Spill,
    /// The same for the rest of an answer that has begun, which is never turned
    /// away: a full line has a place for it, and where there is no other line it
    /// keeps its place.
    Rest,
    /// Until then: it has come back from the other groups.
    Until(Instant),
}

/// One group's line, as one exchange sees it.
pub(super) struct Admission<'a> {
    pub(super) plan: &'a Plan,
    pub(super) step: &'a Step,
    pub(super) patience: Patience,
    pub(super) metrics: &'a Metrics,
    /// When the exchange must have committed.
    pub(super) deadline: Instant,
}

/// How a wait in line ended.
enum Ended {
    Told(Told),
    /// It has waited as long as it may; who comes now should come back then.
    TooLong(Duration),
}

impl Admission<'_> {
    /// Takes a slot at an upstream of the group, and waits for one if all are
    /// busy.
    ///
    /// # Errors
    /// [`Left`]: the client is gone, and with it its place.
    pub(super) async fn seek(
        &self,
        seeker: Seeker,
        ctx: &mut RequestContext,
        client: &mut Client<'_>,
    ) -> Result<Sought, Left> {
        let began = Instant::now();
        let class = seeker.class;
        let config = &self.step.group.config;
        let queue = config.resolved_queue();
        let whole = match (self.patience, class) {
            (Patience::Until(until), _) => until.saturating_duration_since(began),
            (Patience::Rest, _) if self.plan.steps.len() == 1 => Duration::MAX,
            (_, Class::Interactive) => queue.wait,
            (_, Class::Batch) => queue.batch_wait,
        };
        let whole = whole.min(self.deadline.saturating_duration_since(began));
        let goes_on = self.next_group().is_some();
        let wait = if goes_on {
            whole.min(config.spill_after.get())
        } else {
            whole
        };
        let comes_again = goes_on || matches!(self.patience, Patience::Rest);
        let rules = Rules {
            size: match self.patience {
                Patience::Rest => usize::MAX,
                Patience::Spill | Patience::Until(_) => queue.size,
            },
            wait: (!comes_again).then_some(wait),
        };
        let busy = |why: Why, retry_after| self.busy(class, why, retry_after, began + whole);
        let line = &self.step.group.waiting;
        let place = match line.enter(seeker, rules, began) {
            Entered::Slot(slot) => return Ok(Sought::Slot(slot)),
            Entered::Nobody => return Ok(Sought::Nobody),
            Entered::Refused(refused) => {
                return Ok(busy(Why::Refused(refused.reason), refused.retry_after));
            }
            Entered::Waiting(place) => place,
        };
        let waited = wait_in_line(place, began + wait, client).await;
        client.is_out_of_line();
        ctx.queued += began.elapsed();
        let outcome = match &waited {
            Ok(Ended::Told(Told::Slot(_))) => "served",
            Ok(Ended::Told(Told::Nobody)) => "nobody_left",
            Ok(Ended::Told(Told::TurnedAway(_))) => "turned_away",
            Ok(Ended::TooLong(_)) => "timeout",
            Err(Left) => "client_left",
        };
        self.metrics
            .queue_wait
            .with_label_values(&[&*self.step.group.name, class.as_str(), outcome])
            .observe(began.elapsed().as_secs_f64());
        Ok(match waited? {
            Ended::Told(Told::Slot(slot)) => Sought::Slot(slot),
            Ended::Told(Told::Nobody) => Sought::Nobody,
            Ended::Told(Told::TurnedAway(refused)) => {
                busy(Why::Refused(refused.reason), refused.retry_after)
            }
            Ended::TooLong(retry_after) => busy(Why::Timeout, retry_after),
        })
    }

    /// Returns where a request goes that does not wait any longer.
    fn next_group(&self) -> Option<&Step> {
        if let Patience::Until(_) = self.patience {
            return None;
        }
        let mut steps = self.plan.steps.iter();
        steps.find(|step| std::ptr::eq(*step, self.step))?;
        steps.next()
    }

    /// Counts a request that does not wait here, or not any longer.
    fn busy(&self, class: Class, why: Why, retry_after: Duration, until: Instant) -> Sought {
        let group = &*self.step.group.name;
        self.metrics.limits.with_label_values(&["concurrent"]).inc();
        let error = why.into_error(retry_after);
        if let Some(next) = self.next_group() {
            let names = [group, &*next.group.name];
            self.metrics.spills.with_label_values(&names).inc();
            return Sought::Spilled(error, until);
        }
        let labels = [group, class.as_str(), why.as_str()];
        self.metrics.queue_refused.with_label_values(&labels).inc();
        Sought::Busy(error)
    }
}

async fn wait_in_line(
    mut place: Place,
    until: Instant,
    client: &mut Client<'_>,
) -> Result<Ended, Left> {
    loop {
        client.is_in_line(place.position()).await?;
        let look_at = until.min(Instant::now() + LOOK_AGAIN);
        if let Waited::Done(told) = client.wait(look_at, place.turn()).await? {
            return Ok(Ended::Told(told));
        }
        let now = Instant::now();
        if now >= until {
            let retry_after = place.retry_after();
            return Ok(match place.leave() {
                Some(told) => Ended::Told(told),
                None => Ended::TooLong(retry_after),
            });
        }
        place.look_again(now);
    }
}

/// Between whom the places are shared: keys, or addresses where there are none.
pub(super) fn key(ctx: &RequestContext) -> Key {
    match &ctx.principal {
        Some(who) => Key::Name(std::sync::Arc::clone(&who.name)),
        None => Key::Address(one_client(ctx.client_ip)),
    }
}

/// Why a request does not wait, or not any longer.
#[derive(Clone, Copy, Debug)]
enum Why {
    Refused(Reason),
    Timeout,
}

impl Why {
    /// Returns the metric label.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Refused(reason) => reason.as_str(),
            Self::Timeout => "timeout",
        }
    }

    fn into_error(self, retry_after: Duration) -> Error {
        let error = match self {
            Self::Refused(Reason::FullForKey) => Error::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "queue_full_for_key",
                "too many requests of this caller wait already",
            ),
            Self::Refused(Reason::Full) => Error::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "overloaded",
                "every model server is busy, and enough requests wait already",
            ),
            Self::Refused(Reason::Late) => Error::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "queue_timeout",
                "every model server is busy, and will not be free in time",
            ),
            Self::Timeout => Error::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "queue_timeout",
                "every model server was busy for too long",
            ),
        };
        error.retry_after(retry_after)
    }
}
