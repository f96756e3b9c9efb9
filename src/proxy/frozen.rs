//! An upstream that has frozen in the middle of an answer: its connections stay
//! open and nothing comes any more. Its checks notice, and whoever waits for it
//! goes elsewhere, if there is an elsewhere.
//!
//! Start at [`or_frozen`] and [`Attempt::way_out`].
//!
//! **Invariants:**
//! - Nobody gives up an upstream from which a byte came since the first of the
//!   bad checks: a server that has much to do answers checks late, and answers.
//! - Nobody gives up an upstream before there is a place elsewhere: who has to
//!   wait in line for one goes on listening meanwhile, and where there is nobody
//!   else, waiting is all there is to do.

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::sleep};

use super::{
    admission::key,
    attempt::Attempt,
    takeover::{Told, goes_on},
    verdict::{Failure, Hint},
};
use crate::{
    config,
    context::Verdict,
    dialects::{self, Call, Unsupported},
    openai::{
        ApiRequest,
        continuation::{Ask, Rest},
    },
    routes::{Plan, Step},
    upstreams::{self, Effort, Entered, Group, Place, Rules, Seeker, Slot, Upstream, budget::Pass},
};

/// How often who waits for a frozen upstream looks whether it can go elsewhere.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Where the exchange of an attempt may go after it.
#[derive(Clone, Copy)]
pub(super) struct Elsewhere<'a> {
    pub(super) plan: &'a Plan,
    /// Every upstream that was tried, the attempt's own among them.
    pub(super) tried: &'a [Arc<Upstream>],
    /// The same for all requests of one conversation.
    pub(super) affinity: u64,
    /// How the plan goes on after a try that may have been billed.
    pub(super) onward: Onward,
}

/// How a plan goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Onward {
    /// In the same group, and then in those behind it.
    Everywhere,
    /// In the same group.
    Here,
    /// In the groups behind this one.
    Behind,
    /// In the fallback, if it comes behind this one.
    Fallback,
    /// Not at all.
    Nowhere,
}

/// What was taken for the next try before this one was given up.
#[derive(Debug)]
pub(super) struct Reserved {
    /// The leave to retry, if the next try is in the same group.
    pub(super) pass: Option<Pass>,
    pub(super) group: Arc<Group>,
    pub(super) slot: Slot,
}

impl Reserved {
    /// Returns whether the place is in this group.
    pub(super) fn is_in(&self, group: &Arc<Group>) -> bool {
        Arc::ptr_eq(&self.group, group)
    }
}

/// Where who gives up a frozen upstream goes.
#[derive(Debug)]
pub(super) enum Way {
    /// There, with the same request.
    To(Reserved),
    /// To somebody who goes on with the answer; there is one.
    GoesOn,
}

/// What a look for a way comes to.
pub(super) enum Found {
    Way(Way),
    /// A place in line.
    Place(Waits),
    Nothing,
}

/// A place in line for what will be [`Reserved`].
pub(super) struct Waits {
    pass: Option<Pass>,
    group: Arc<Group>,
    place: Place,
}

/// What of an answer there is, and so what may be asked for elsewhere.
pub(super) enum Stage<'a> {
    /// Nothing: the request is sent again.
    Nothing,
    /// What others sent before: the same rest is asked for.
    Rest(&'a Ask),
    /// What others and this upstream sent: the rest of that is asked for.
    Begun(&'a Told),
}

impl<'a> Stage<'a> {
    /// Returns the stage of an attempt that has not committed.
    pub(super) fn before(told: Option<&'a Told>) -> Self {
        match told.and_then(|told| told.ask.as_deref()) {
            Some(ask) => Self::Rest(ask),
            None => Self::Nothing,
        }
    }
}

/// Waits for `work` as long as the upstream is not known to be frozen: its checks
/// have taken it down, `heard` was before the first of them, and `look` finds a
/// way that leads elsewhere.
pub(super) async fn or_frozen<T>(
    fallen: &mut watch::Receiver<Option<Instant>>,
    heard: Instant,
    look: impl Fn(Instant) -> Found,
    work: impl Future<Output = T>,
) -> Result<T, Way> {
    tokio::select! {
        biased;
        done = work => Ok(done),
        way = frozen(fallen, heard, look) => Err(way),
    }
}

async fn frozen(
    fallen: &mut watch::Receiver<Option<Instant>>,
    heard: Instant,
    look: impl Fn(Instant) -> Found,
) -> Way {
    let mut waits: Option<Waits> = None;
    loop {
        let since = *fallen.borrow_and_update();
        let is_frozen = since.is_some_and(|since| heard < since);
        if !is_frozen {
            waits = None;
        } else if let Some(Waits { place, .. }) = &waits {
            place.look_again(Instant::now());
        } else {
            match look(Instant::now()) {
                Found::Way(way) => return way,
                Found::Place(place) => waits = Some(place),
                Found::Nothing => {}
            }
        }
        tokio::select! {
            turn = turn(&mut waits) => {
                let waited = waits.take();
                if let (upstreams::Told::Slot(slot), Some(waited)) = (turn, waited) {
                    let Waits { pass, group, .. } = waited;
                    return Way::To(Reserved { pass, group, slot });
                }
            }
            changed = fallen.changed() => if changed.is_err() {
                // Nobody asks it any more.
                return pending().await;
            },
            // Somebody else may have become free, or usable, meanwhile.
            () = sleep(LOOK_AGAIN), if is_frozen => {}
        }
    }
}

async fn turn(waits: &mut Option<Waits>) -> upstreams::Told {
    match waits {
        Some(waits) => waits.place.turn().await,
        None => pending().await,
    }
}

impl Attempt<'_> {
    /// Notes that the upstream is frozen, and where the exchange goes now.
    pub(super) fn leave_frozen(&mut self, way: Way) -> Failure {
        if let Way::To(reserved) = way {
            self.reserved = Some(reserved);
        }
        Failure {
            hint: Some(Hint::Frozen),
            ..Failure::new(Verdict::TimedOut, "down by its checks, and nothing comes")
        }
    }

    /// Looks for a way elsewhere for what is to be asked for at this stage.
    pub(super) fn way_out(&self, stage: &Stage<'_>, now: Instant) -> Found {
        if self.elsewhere.plan.pin.is_some() {
            return Found::Nothing;
        }
        let goes_on = match stage {
            Stage::Nothing if now < self.deadline => return self.way_of_request(now),
            Stage::Rest(ask) => now < self.deadline && self.others_go_on(ask, now),
            Stage::Begun(told) => now < told.ends && self.others_take_over(told, now),
            Stage::Nothing => false,
        };
        match goes_on {
            true => Found::Way(Way::GoesOn),
            false => Found::Nothing,
        }
    }

    /// Takes a place for the same request where the plan goes on.
    fn way_of_request(&self, now: Instant) -> Found {
        let (onward, here) = (self.elsewhere.onward, &self.step.group);
        let Some(request) = self.ctx.request.as_ref() else {
            return Found::Nothing;
        };
        if !here.config.retry_ambiguous {
            return Found::Nothing;
        }
        if matches!(onward, Onward::Everywhere | Onward::Here)
            && self.may_take(self.step, request, now)
            && let Ok(pass) = here.budget.retry(now)
        {
            match self.enter(self.step, request, Some(pass), now) {
                Found::Nothing => {}
                found => return found,
            }
        }
        let mut behind = self.elsewhere.plan.steps.iter();
        behind.find(|step| std::ptr::eq(*step, self.step));
        for step in behind {
            let goes_there = match onward {
                Onward::Everywhere | Onward::Behind => true,
                Onward::Fallback => step.fallback,
                Onward::Here | Onward::Nowhere => false,
            };
            if goes_there && self.may_take(step, request, now) {
                match self.enter(step, request, None, now) {
                    Found::Nothing => {}
                    found => return found,
                }
            }
        }
        Found::Nothing
    }

    /// Returns whether anybody in a group may take the request, now or when its
    /// turn has come.
    fn may_take(&self, step: &Step, request: &ApiRequest, now: Instant) -> bool {
        step.group.upstreams.iter().any(|upstream| {
            !is_in(self.elsewhere.tried, upstream)
                && upstream.serves(&step.model)
                && upstream.available(&step.model, now)
                && has_words(step, upstream, request)
        })
    }

    /// Takes a slot in a group, or a place in its line.
    fn enter(&self, step: &Step, request: &ApiRequest, pass: Option<Pass>, now: Instant) -> Found {
        let group = Arc::clone(&step.group);
        let mut tried = self.elsewhere.tried.to_vec();
        let speechless = |upstream: &&Arc<Upstream>| !has_words(step, upstream, request);
        tried.extend(group.upstreams.iter().filter(speechless).cloned());
        let seeker = Seeker {
            group: Arc::clone(&group),
            model: Arc::clone(&step.model),
            tried,
            affinity: self.elsewhere.affinity,
            pin: None,
            effort: Effort::Sensible,
            class: self.ctx.restrict.class,
            key: key(self.ctx),
        };
        let rules = Rules {
            size: group.config.resolved_queue().size,
            wait: None,
        };
        match group.waiting.enter(seeker, rules, now) {
            Entered::Slot(slot) => Found::Way(Way::To(Reserved { pass, group, slot })),
            Entered::Waiting(place) => Found::Place(Waits { pass, group, place }),
            Entered::Nobody | Entered::Refused(_) => Found::Nothing,
        }
    }

    /// Returns whether somebody who was not asked may go on with an answer.
    fn others_go_on(&self, ask: &Ask, now: Instant) -> bool {
        self.others(now)
            .any(|other| !is_in(self.elsewhere.tried, other) && goes_on(other, ask))
    }

    /// Returns whether somebody may go on with what this upstream has begun.
    fn others_take_over(&self, told: &Told, now: Instant) -> bool {
        // Cheap questions first: the rest is a request of its own.
        if !self.step.group.config.takeover
            || self.ctx.takeovers >= self.limits.takeovers
            || told.partial.obstacle().is_some()
            || self.others(now).next().is_none()
        {
            return false;
        }
        let Some(request) = self.ctx.request.as_ref() else {
            return false;
        };
        match told.partial.ask(request) {
            Err(_obstacle) => false,
            Ok(Rest::Nothing) => true,
            Ok(Rest::Ask(ask)) => self.others(now).any(|other| goes_on(other, &ask)),
        }
    }

    /// Returns all others that are free.
    fn others(&self, now: Instant) -> impl Iterator<Item = &Arc<Upstream>> {
        self.elsewhere.plan.steps.iter().flat_map(move |step| {
            step.group.upstreams.iter().filter(move |upstream| {
                !Arc::ptr_eq(upstream, self.upstream)
                    && upstream.serves(&step.model)
                    && upstream.available(&step.model, now)
                    && upstream.has_free_slot()
            })
        })
    }
}

fn is_in(tried: &[Arc<Upstream>], upstream: &Arc<Upstream>) -> bool {
    tried.iter().any(|tried| Arc::ptr_eq(tried, upstream))
}

fn has_words(step: &Step, upstream: &Upstream, request: &ApiRequest) -> bool {
    words(step, upstream, request).is_ok()
}

/// Finds out whether an upstream's dialect can say the request, and what not.
pub(super) fn words(
    step: &Step,
    upstream: &Upstream,
    request: &ApiRequest,
) -> Result<(), Unsupported> {
    if upstream.config.dialect == config::Dialect::Openai {
        return Ok(());
    }
    let call = Call {
        request,
        model: &step.model,
        upstream: &upstream.config,
        cache_salt: None,
        context: &|tokens| tokens,
        event_bytes_max: usize::MAX,
    };
    dialects::of(&upstream.config).encode(&call).map(drop)
}
