//! An upstream that has frozen in the middle of an answer: its connections stay
//! open and nothing comes any more. Its checks notice, and whoever waits for it
//! goes elsewhere, if there is an elsewhere.
//!
//! Start at [`or_frozen`] and [`Attempt::way_out`].
//!
//! **Invariants:**
//! - Nobody gives up an upstream from which a byte came since the first of the
//!   bad checks: a server that has much to do answers checks late, and answers.
//! - Nobody gives up an upstream before he has a place elsewhere: who has to
//!   wait in line for one goes on listening meanwhile, and where there is nobody
//!   else, waiting is all there is to do. The rest of an answer stands in no line:
//!   it looks again until somebody who is known to go on is free.

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::sleep};

use super::{
    admission::key,
    attempt::Attempt,
    takeover::{Told, goes_on, is_known_to_go_on},
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
    upstreams::{
        self, Effort, Entered, Group, Pick, Place, Rules, Seeker, Slot, Upstream, budget::Pass,
    },
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
    /// There: with the same request, or for the rest of the answer.
    To(Reserved),
    /// To its end: nothing is missing of the answer but that.
    Ends,
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
        let way = match stage {
            Stage::Nothing if now < self.deadline => return self.way_of_request(now),
            Stage::Rest(ask) if now < self.deadline => self.way_of_rest(ask, now),
            Stage::Begun(told) if now < told.ends => self.way_of_begun(told, now),
            Stage::Nothing | Stage::Rest(_) | Stage::Begun(_) => None,
        };
        way.map_or(Found::Nothing, Found::Way)
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

    /// Takes a place at somebody who was not asked for the rest of an answer.
    fn way_of_rest(&self, ask: &Ask, now: Instant) -> Option<Way> {
        let is_fit =
            |other: &Arc<Upstream>| !is_in(self.elsewhere.tried, other) && goes_on(other, ask);
        self.take(is_fit, now).map(Way::To)
    }

    /// Takes a place at somebody for the rest of what this upstream has begun.
    fn way_of_begun(&self, told: &Told, now: Instant) -> Option<Way> {
        // Cheap questions first, every time: the rest is a request of its own.
        let others = || self.others(now);
        if !self.step.group.config.takeover
            || self.ctx.takeovers >= self.limits.takeovers
            || told.partial.obstacle().is_some()
            || others().next().is_none()
        {
            return None;
        }
        let request = self.ctx.request.as_ref()?;
        let knows = |other: &Arc<Upstream>| is_known_to_go_on(other, request.endpoint);
        if told.partial.needs_one_who_knows(request) && !others().any(knows) {
            return None;
        }
        match told.partial.ask(request) {
            Err(_obstacle) => None,
            Ok(Rest::Nothing) => Some(Way::Ends),
            Ok(Rest::Ask(ask)) => {
                let is_fit = |other: &Arc<Upstream>| goes_on(other, &ask);
                self.take(is_fit, now).map(Way::To)
            }
        }
    }

    /// Takes a place past the lines at another upstream, in the order of the plan:
    /// half an answer is worth more than a place in line.
    fn take(&self, is_fit: impl Fn(&Arc<Upstream>) -> bool, now: Instant) -> Option<Reserved> {
        self.elsewhere.plan.steps.iter().find_map(|step| {
            let group = Arc::clone(&step.group);
            let is_out =
                |other: &&Arc<Upstream>| Arc::ptr_eq(other, self.upstream) || !is_fit(other);
            let out: Vec<_> = group.upstreams.iter().filter(is_out).cloned().collect();
            let picked = group.pick(&step.model, &out, self.elsewhere.affinity, now);
            let Pick::Chosen(mut slot) = picked else {
                return None;
            };
            let class = self.ctx.restrict.class;
            let is_admitted = group.waiting.admits(&mut slot, class, group.places());
            is_admitted.then_some(Reserved {
                pass: None,
                group,
                slot,
            })
        })
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
