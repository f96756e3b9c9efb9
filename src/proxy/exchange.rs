//! One client request with all its attempts: which upstream is tried, what
//! follows a failure, and what the client is told at the end.
//!
//! The order is that of the plan: the upstreams of a group, the next group, the
//! fallback. **Invariants:**
//! - After the first byte of an answer has gone to the client, no other
//!   upstream answers; another may go on with the answer
//!   ([`takeover`](super::takeover)).
//! - An upstream that is known to be down costs no try and no time.
//! - A try that may have been billed is followed by at most one more
//!   ([`Group::retry_ambiguous`](crate::config::Group)), and by the fallback.
//! - The fallback group gets at least one try as long as there is time.

use std::{
    borrow::Cow,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use http::StatusCode;
use pingora::connectors::TransportConnector;
use rand::RngExt;

use super::{
    admission::{self, Admission, Patience, Sought},
    attempt::{Attempt, Tried},
    bodies::Reserved as Memory,
    body,
    client::{Client, Left, Waited},
    frozen::{self, Elsewhere, Onward, Reserved},
    report,
    takeover::{Death, Told},
    verdict::{self, Failure},
};
use crate::{
    config::Limits,
    context::{self, Ending, Outcome, RequestContext, Verdict},
    error::Error,
    metrics::Metrics,
    openai::Usage,
    plugins::Chain,
    routes::{Plan, Step},
    upstreams::{
        Effort, Group, Seeker, Slot, Status, Upstream, budget,
        state::{Reason, State},
    },
};

/// First and longest wait before the same upstream is asked again.
const BACKOFF_FIRST: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(8);
/// How long a request waits for its turn, where the budget of the group allows
/// no more retries at once: as long as the budget looks back, then there is room.
const RETRY_PATIENCE: Duration = Duration::from_secs(10);
/// How often who waits looks although no retry has ended: one that lasts makes
/// room as well.
const RETRY_LOOK_AGAIN: Duration = Duration::from_millis(250);
/// What `Retry-After` says when no upstream said anything better.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How long tries that never reached anybody may take together until they count
/// like others: a refused connection costs nothing, a silent one the connect
/// timeout.
const UNSENT_MAX: Duration = Duration::from_secs(5);

/// The error of a stream that was longer than `limits.stream_timeout`.
pub(super) const STREAM_TIMEOUT: &str = "stream_timeout";

/// How an exchange ended, as far as the client knows.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) ending: Ending,
    /// How the last attempt went.
    pub(super) verdict: Verdict,
    pub(super) status: StatusCode,
    /// OpenAI's `code`; borrowed if it is one of ours.
    pub(super) error: Option<Cow<'static, str>>,
    pub(super) streamed: bool,
    pub(super) first_token: Option<Duration>,
    pub(super) usage: Option<Usage>,
}

/// What an exchange needs and keeps.
pub(super) struct Exchange<'a> {
    pub(super) ctx: &'a mut RequestContext,
    pub(super) chain: &'a Chain,
    pub(super) connector: &'a Arc<TransportConnector>,
    pub(super) metrics: &'a Metrics,
    pub(super) limits: &'a Limits,
    /// When the exchange must have committed.
    pub(super) deadline: Instant,
    /// The last failure of an upstream that was reached.
    last_answer: Option<Failure>,
    /// The tries at upstreams whose dialect has no words for the request.
    unsupported: Vec<Failure>,
    /// Whether the one failover after a silence is used: each costs the client
    /// the whole time to the first token.
    silence_used: bool,
    /// How many died with the request: what kills one may kill the next.
    deaths: u32,
    affinity: u64,
    /// Every upstream that was tried.
    pub(super) tried: Vec<Arc<Upstream>>,
    /// What the last group said where everybody was busy.
    busy: Option<Error>,
    /// What the client has of the answer, for the next try to go on with.
    pub(super) told: Option<Box<Told>>,
    /// How long it would have waited in the group that it went on from.
    spilled: Option<Instant>,
    /// The groups whose budget for retries is used up.
    spent: Vec<Arc<Group>>,
    /// The memory of its body, and of what is asked for in its place.
    pub(super) memory: &'a mut Memory,
    /// What the last try took for the next.
    pub(super) reserved: Option<Reserved>,
    /// Whether the groups behind this one come next.
    onward: bool,
}

/// What follows the tries in one group.
pub(super) enum Next {
    /// The client has its answer.
    Ended(Ended),
    /// The client gets this error.
    Tell(Error),
    /// The next group may try.
    Group,
    /// Only the fallback may still try.
    Fallback,
    /// The answer had begun when its upstream died.
    Died(Box<Death>),
}

impl<'a> Exchange<'a> {
    /// Prepares the exchange of a request that has been parsed.
    pub(super) fn new(
        ctx: &'a mut RequestContext,
        chain: &'a Chain,
        connector: &'a Arc<TransportConnector>,
        metrics: &'a Metrics,
        limits: &'a Limits,
        memory: &'a mut Memory,
    ) -> Self {
        // What plugins made of the body is there beside what came.
        if let (Some(request), Some(received)) = (&ctx.request, &ctx.received)
            && request.raw.as_ptr() != received.as_ptr()
        {
            memory.hold(received.len() + request.raw.len());
        }
        let deadline = ctx.started + limits.total_timeout.get();
        let affinity = ctx
            .request
            .as_ref()
            .map_or(0, crate::openai::ApiRequest::conversation_key);
        Self {
            ctx,
            chain,
            connector,
            metrics,
            limits,
            deadline,
            last_answer: None,
            unsupported: Vec::new(),
            silence_used: false,
            deaths: 0,
            affinity,
            tried: Vec::new(),
            busy: None,
            told: None,
            spilled: None,
            spent: Vec::new(),
            memory,
            reserved: None,
            onward: true,
        }
    }

    /// Tries what the plan says until the client has an answer.
    ///
    /// # Errors
    /// `Ok(Err(error))` is what the client has to be told, by the caller.
    /// [`Left`]: the client is gone.
    pub(super) async fn run(
        mut self,
        plan: &Plan,
        client: &mut Client<'_>,
    ) -> Result<Result<Ended, Error>, Left> {
        let mut only_fallback = false;
        let mut left_behind = Vec::new();
        for step in &plan.steps {
            if only_fallback && !step.fallback {
                continue;
            }
            let next = self.try_group(plan, step, Patience::Spill, client).await?;
            match next {
                Next::Ended(ended) => return Ok(Ok(ended)),
                Next::Tell(error) => return Ok(Err(error)),
                Next::Died(death) => return Ok(Ok(self.go_on(plan, *death, client).await?)),
                Next::Group => {}
                Next::Fallback => only_fallback = true,
            }
            left_behind.extend(self.spilled.take().map(|until| (step, until)));
        }
        // Nobody else could help: back to those who were only busy, as long as
        // it would have waited there.
        self.onward = false;
        for (step, until) in left_behind {
            if only_fallback || Instant::now() >= until {
                continue;
            }
            let patience = Patience::Until(until);
            match self.try_group(plan, step, patience, client).await? {
                Next::Ended(ended) => return Ok(Ok(ended)),
                Next::Tell(error) => return Ok(Err(error)),
                Next::Died(death) => return Ok(Ok(self.go_on(plan, *death, client).await?)),
                Next::Group => {}
                Next::Fallback => only_fallback = true,
            }
        }
        self.onward = true;
        if !only_fallback
            && self.busy.is_none()
            && plan.pin.is_none()
            && let Some(done) = self.last_resort(plan, client).await?
        {
            return Ok(done);
        }
        Ok(Err(self.give_up(plan)))
    }

    /// Tries what was passed over because it is known to be down: it may have
    /// come back since, and asking costs less than turning the client away. Who
    /// asked to be left alone is left alone.
    async fn last_resort(
        &mut self,
        plan: &Plan,
        client: &mut Client<'_>,
    ) -> Result<Option<Result<Ended, Error>>, Left> {
        for step in &plan.steps {
            let reserved = self.reserved.as_ref();
            let is_spent = self
                .spent
                .iter()
                .any(|group| Arc::ptr_eq(group, &step.group));
            if is_spent && !reserved.is_some_and(|reserved| reserved.is_in(&step.group)) {
                continue;
            }
            while self.tries_in(&step.group) < self.limits.attempts
                && Instant::now() < self.deadline
            {
                let now = Instant::now();
                let slot = match self.reserved.take() {
                    None => step.group.pick_in_panic(&step.model, &self.tried, now),
                    Some(reserved) if reserved.is_in(&step.group) => Some(reserved.slot),
                    other => {
                        self.reserved = other;
                        None
                    }
                };
                let Some(mut slot) = slot else {
                    break;
                };
                let group = &step.group;
                let class = self.ctx.restrict.class;
                if !slot.is_leased() && !group.waiting.admits(&mut slot, class, group.places()) {
                    break;
                }
                self.tried.push(Arc::clone(slot.upstream()));
                match self.try_one(plan, step, slot, client).await? {
                    Next::Ended(ended) => return Ok(Some(Ok(ended))),
                    Next::Tell(error) => return Ok(Some(Err(error))),
                    Next::Died(death) => {
                        let ended = self.go_on(plan, *death, client).await?;
                        return Ok(Some(Ok(ended)));
                    }
                    Next::Group => {}
                    Next::Fallback => return Ok(None),
                }
            }
        }
        Ok(None)
    }

    /// Tries the upstreams of one group, at most `limits.attempts` of them.
    async fn try_group(
        &mut self,
        plan: &Plan,
        step: &Step,
        patience: Patience,
        client: &mut Client<'_>,
    ) -> Result<Next, Left> {
        let _active = step.group.budget.enter(Instant::now());
        let before = self.tries_in(&step.group);
        let mut is_first = true;
        while self.tries_in(&step.group) - before < self.limits.attempts
            && Instant::now() < self.deadline
        {
            let is_expected_elsewhere = |reserved: &Reserved| !reserved.is_in(&step.group);
            if self.reserved.as_ref().is_some_and(is_expected_elsewhere) {
                return Ok(Next::Group);
            }
            let effort = if is_first && (step.fallback || plan.pin.is_some()) {
                Effort::Insist
            } else {
                Effort::Sensible
            };
            let Ok(pass) = self.leave_to_retry(step, client).await? else {
                return Ok(Next::Group);
            };
            let mut slot = match self.seek(plan, step, effort, patience, client).await? {
                Sought::Slot(slot) => slot,
                Sought::Nobody => return Ok(Next::Group),
                Sought::Busy(error) => {
                    self.busy = Some(error);
                    return Ok(Next::Group);
                }
                Sought::Spilled(error, until) => {
                    self.busy = Some(error);
                    self.spilled = Some(until);
                    return Ok(Next::Group);
                }
            };
            let upstream = Arc::clone(slot.upstream());
            self.tried.push(Arc::clone(&upstream));
            if let Some(pass) = pass {
                slot.carry(pass);
            }
            let mut slot = Some(slot);
            let again = step.group.config.same_upstream_retries;
            for round in 0..=again {
                let held = match slot.take() {
                    Some(first) => first,
                    None => {
                        let Ok(pass) = self.leave_to_retry(step, client).await? else {
                            return Ok(Next::Group);
                        };
                        let now = Instant::now();
                        let Some(mut held) = upstream.try_acquire(&step.model, now) else {
                            break;
                        };
                        if let Some(pass) = pass {
                            held.carry(pass);
                        }
                        held
                    }
                };
                is_first = false;
                match self.try_one(plan, step, held, client).await? {
                    Next::Group => {}
                    other => return Ok(other),
                }
                let tries = self.tries_in(&step.group) - before;
                let last_round = round == again || tries >= self.limits.attempts;
                let now = Instant::now();
                let pauses = !upstream.available(&step.model, now)
                    && upstream.status(now).reason != Reason::Connect;
                if last_round || pauses || !self.same_may_recover() {
                    break;
                }
                if let Waited::TooLate = self.back_off(round, client).await? {
                    break;
                }
            }
        }
        Ok(Next::Group)
    }

    /// Chooses an upstream with a free slot; waits in line if all are busy. With
    /// [`Effort::Insist`] what should not be asked now is better than nothing:
    /// for the pin and for the fallback, that gets its one try whatever is known
    /// of it.
    pub(super) async fn seek(
        &mut self,
        plan: &Plan,
        step: &Step,
        effort: Effort,
        patience: Patience,
        client: &mut Client<'_>,
    ) -> Result<Sought, Left> {
        if plan.pin.is_some() && !self.tried.is_empty() {
            return Ok(Sought::Nobody);
        }
        if let Some(reserved) = self.reserved.take() {
            return Ok(Sought::Slot(reserved.slot));
        }
        self.pass_over_speechless(plan, step);
        if plan.pin.is_some() && !self.tried.is_empty() {
            return Ok(Sought::Nobody);
        }
        let seeker = Seeker {
            group: Arc::clone(&step.group),
            model: Arc::clone(&step.model),
            tried: self.tried.clone(),
            affinity: self.affinity,
            pin: plan.pin.clone(),
            effort,
            class: self.ctx.restrict.class,
            key: admission::key(self.ctx),
        };
        let admission = Admission {
            plan,
            step,
            patience,
            metrics: self.metrics,
            deadline: self.deadline,
        };
        admission.seek(seeker, self.ctx, client).await
    }

    /// Notes as tried, of those who are busy, who has no words for the request:
    /// nobody waits in line only to find that out.
    fn pass_over_speechless(&mut self, plan: &Plan, step: &Step) {
        let (Some(request), None) = (&self.ctx.request, &self.told) else {
            return;
        };
        let is_wanted = |upstream: &&Arc<Upstream>| {
            let is_it = |other: &Arc<Upstream>| Arc::ptr_eq(other, upstream);
            !upstream.has_free_slot()
                && upstream.serves(&step.model)
                && !self.tried.iter().any(is_it)
                && plan.pin.as_ref().is_none_or(is_it)
        };
        let upstreams = step.group.upstreams.iter().filter(is_wanted);
        let speechless: Vec<_> = upstreams
            .filter_map(|upstream| {
                let why = frozen::words(step, upstream, request).err()?;
                Some((Arc::clone(upstream), Failure::unsupported(why)))
            })
            .collect();
        for (upstream, failure) in speechless {
            self.note(context::Attempt {
                group: Arc::clone(&step.group.name),
                upstream: Arc::clone(&upstream.name),
                verdict: failure.verdict,
                status: None,
                maybe_billed: false,
                fallback: step.fallback,
                took: Duration::ZERO,
            });
            self.tried.push(upstream);
            self.unsupported.push(failure);
        }
    }

    /// Makes one try and notes what came of it.
    pub(super) async fn try_one(
        &mut self,
        plan: &Plan,
        step: &Step,
        mut slot: Slot,
        client: &mut Client<'_>,
    ) -> Result<Next, Left> {
        let upstream = Arc::clone(slot.upstream());
        if let Some(previous) = self.ctx.attempts.last()
            && previous.upstream != upstream.name
        {
            self.metrics
                .failovers
                .with_label_values(&[&*previous.upstream, &*upstream.name])
                .inc();
        }
        let began = Instant::now();
        let number = self.ctx.attempts.len() + 1;
        let elsewhere = Elsewhere {
            plan,
            tried: &self.tried,
            affinity: self.affinity,
            onward: self.onward_from(step),
        };
        let mut attempt = Attempt {
            ctx: &mut *self.ctx,
            chain: self.chain,
            metrics: self.metrics,
            limits: self.limits,
            memory: self.memory,
            step,
            upstream: &upstream,
            slot: &mut slot,
            deadline: self.deadline,
            number,
            told: self.told.take(),
            elsewhere,
            reserved: None,
        };
        // Unless it was freed behind a good answer, the slot is held to the end of
        // this function: who gets it next must not go to an upstream of which it
        // is not yet noted that it is down.
        let tried = Box::pin(attempt.run(self.connector, client)).await;
        self.told = attempt.told.take();
        self.reserved = attempt.reserved.take();
        let note = |verdict, status: Option<StatusCode>, maybe_billed| context::Attempt {
            group: Arc::clone(&step.group.name),
            upstream: Arc::clone(&upstream.name),
            verdict,
            status: status.map(|status| status.as_u16()),
            maybe_billed,
            fallback: step.fallback,
            took: began.elapsed(),
        };
        match tried {
            Err(Left) => {
                self.note(note(Verdict::Abandoned, None, true));
                Err(Left)
            }
            Ok(Tried::Ended(ended)) => {
                slot.succeeded(Instant::now());
                self.note(note(ended.verdict, Some(ended.status), false));
                Ok(Next::Ended(ended))
            }
            Ok(Tried::Died(failure)) => {
                let told = self.told.take();
                let told = told.expect("who dies leaves what the client has");
                let now = Instant::now();
                // A stream that was merely too long is nobody's fault.
                if now < told.ends {
                    report::cut(step, &slot, self.metrics);
                } else {
                    slot.succeeded(now);
                }
                self.note(note(Verdict::Cut, Some(StatusCode::OK), true));
                Ok(Next::Died(Box::new(Death {
                    takeover: step.group.config.takeover,
                    upstream,
                    failure,
                    told,
                })))
            }
            Ok(Tried::NoRoom { billed }) => {
                self.note(note(Verdict::NoRoom, None, billed));
                Ok(Next::Tell(body::no_memory()))
            }
            Ok(Tried::PassOn(error)) => {
                slot.accepted(Instant::now());
                self.note(note(Verdict::CallersFault, Some(error.status), false));
                Ok(Next::Tell(error))
            }
            Ok(Tried::Failed(mut failure)) => {
                report::failure(step, &slot, &mut failure, self.metrics);
                self.note(note(
                    failure.verdict,
                    failure.status,
                    failure.is_ambiguous(),
                ));
                log::info!(
                    "attempt failed: id={} group={} upstream={} verdict={} cause={}",
                    self.ctx.id,
                    step.group.name,
                    upstream.name,
                    failure.verdict.as_str(),
                    failure.cause
                );
                Ok(self.after_failure(step, failure))
            }
        }
    }

    /// Returns how the plan goes on behind a try in this group that ends without
    /// an answer, and may have been billed.
    fn onward_from(&self, step: &Step) -> Onward {
        let tries = self.tries_in(&step.group);
        let again = tries.saturating_add(1) < self.limits.attempts;
        match (self.silence_used, self.onward, again) {
            (true, true, _) => Onward::Fallback,
            (false, true, true) => Onward::Everywhere,
            (false, true, false) => Onward::Behind,
            (false, false, true) => Onward::Here,
            (true, false, _) | (false, false, false) => Onward::Nowhere,
        }
    }

    fn after_failure(&mut self, step: &Step, failure: Failure) -> Next {
        let ambiguous = failure.is_ambiguous();
        let silent = failure.verdict == Verdict::TimedOut;
        let died = ambiguous && !silent && failure.status.is_none();
        if failure.unsupported.is_some() {
            // It was not asked: that says nothing of those who were.
            self.unsupported.push(failure);
            return Next::Group;
        }
        if failure.verdict == Verdict::NoSocket {
            self.metrics.limits.with_label_values(&["sockets"]).inc();
        } else if !failure.verdict.is_unreached() {
            self.last_answer = Some(failure.after(self.last_answer.take()));
        }
        if !ambiguous {
            return Next::Group;
        }
        if !step.group.config.retry_ambiguous {
            let error = verdict::give_up(self.last_answer.as_ref(), RETRY_AFTER, "");
            return Next::Tell(error);
        }
        self.deaths += u32::from(died);
        let silent_again = silent && std::mem::replace(&mut self.silence_used, true);
        if silent_again || self.deaths >= self.limits.attempts {
            Next::Fallback
        } else {
            Next::Group
        }
    }

    /// Returns how many tries in a group count towards `limits.attempts`: all but
    /// those that reached nobody, as long as these were quick.
    fn tries_in(&self, group: &Group) -> u32 {
        let mut unsent = Duration::ZERO;
        let attempts = self.ctx.attempts.iter();
        let here = attempts.filter(|attempt| attempt.group == group.name);
        let counted = here.filter(|attempt| {
            if !attempt.verdict.is_unreached() {
                return true;
            }
            unsent += attempt.took;
            unsent > UNSENT_MAX
        });
        u32::try_from(counted.count()).unwrap_or(u32::MAX)
    }

    fn note(&mut self, attempt: context::Attempt) {
        let upstream = &*attempt.upstream;
        self.metrics
            .attempts
            .with_label_values(&[&*attempt.group, upstream, attempt.verdict.as_str()])
            .inc();
        if attempt.maybe_billed && attempt.verdict != Verdict::Cut {
            self.metrics
                .maybe_billed
                .with_label_values(&[upstream])
                .inc();
        }
        self.ctx.attempts.push(attempt);
    }

    /// Takes leave from the group's budget, if the next try there is a retry:
    /// one that follows an answer, or a silence, of another. What was not sent,
    /// or sent to a server that has not the model or not our key, cost no model
    /// server anything. `Err` if the budget is used up.
    async fn leave_to_retry(
        &mut self,
        step: &Step,
        client: &mut Client<'_>,
    ) -> Result<Result<Option<budget::Pass>, budget::NoPass>, Left> {
        let group = &step.group;
        let is_retry = self.ctx.attempts.last().is_some_and(|last| {
            last.group == group.name
                && matches!(
                    last.verdict,
                    Verdict::Rejected | Verdict::Failed | Verdict::TimedOut
                )
        });
        if !is_retry {
            return Ok(Ok(None));
        }
        let until = self.deadline.min(Instant::now() + RETRY_PATIENCE);
        let reserved = self.reserved.as_mut();
        let mut reserved = reserved.and_then(|reserved| reserved.pass.take());
        let taken = loop {
            if let Some(pass) = reserved.take() {
                break Ok(pass);
            }
            // Registered before the next look: one that ends in between is seen.
            let mut freed = pin!(group.budget.freed());
            freed.as_mut().enable();
            match group.budget.retry(Instant::now()) {
                Err(budget::NoPass::Busy) => {}
                decided => break decided,
            }
            let look_at = until.min(Instant::now() + RETRY_LOOK_AGAIN);
            let waited = client.wait(look_at, freed).await?;
            if matches!(waited, Waited::TooLate) && Instant::now() >= until {
                break Err(budget::NoPass::Busy);
            }
        };
        let result = if taken.is_ok() { "made" } else { "refused" };
        self.metrics
            .retries
            .with_label_values(&[&*group.name, result])
            .inc();
        if taken.is_err() {
            self.metrics.limits.with_label_values(&["retries"]).inc();
            self.spent.push(Arc::clone(group));
        }
        Ok(taken.map(Some))
    }

    /// Returns whether the last failure is one that time may heal.
    fn same_may_recover(&self) -> bool {
        self.ctx.attempts.last().is_some_and(|attempt| {
            matches!(
                attempt.verdict,
                Verdict::NotSent | Verdict::NoSocket | Verdict::Rejected | Verdict::Failed
            )
        })
    }

    /// Waits before the same upstream is asked again: exponential, with full
    /// jitter, so that many clients do not come back at once.
    async fn back_off(&self, round: u32, client: &mut Client<'_>) -> Result<Waited<()>, Left> {
        let longest = BACKOFF_FIRST
            .saturating_mul(2_u32.saturating_pow(round))
            .min(BACKOFF_MAX);
        let wait = longest.mul_f64(rand::rng().random::<f64>());
        client.wait(self.deadline, tokio::time::sleep(wait)).await
    }

    fn give_up(mut self, plan: &Plan) -> Error {
        if Instant::now() >= self.deadline {
            self.metrics
                .limits
                .with_label_values(&["total_timeout"])
                .inc();
            return Error::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                "total_timeout",
                "no model server answered within the time a request may take",
            );
        }
        if self.last_answer.is_none()
            && let Some(error) = self.busy.take()
        {
            return error;
        }
        let mut attempts = self.ctx.attempts.iter();
        if self.last_answer.is_none()
            && attempts.any(|attempt| attempt.verdict == Verdict::NoSocket)
        {
            return verdict::no_socket();
        }
        let mut attempts = self.ctx.attempts.iter();
        if self.last_answer.is_none() && attempts.any(|attempt| attempt.verdict == Verdict::Tls) {
            return verdict::no_tls();
        }
        if let Some(last) = &mut self.last_answer
            && (last.verdict == Verdict::Rejected || last.is_quota())
        {
            last.retry_after = last
                .retry_after
                .into_iter()
                .chain(soonest_pause(plan))
                .min();
        }
        if self.ctx.attempts.len() > self.unsupported.len() {
            return verdict::give_up(self.last_answer.as_ref(), RETRY_AFTER, &plan.model);
        }
        match self.unsupported.pop() {
            Some(failure) if !self.others_are_away(plan) => {
                verdict::give_up(Some(&failure), RETRY_AFTER, &plan.model)
            }
            _ => nobody_asked(plan),
        }
    }

    /// Returns whether somebody was left alone who might have had words for the
    /// request: then it is not the request that is to be changed.
    fn others_are_away(&self, plan: &Plan) -> bool {
        let now = Instant::now();
        let was_tried = |upstream: &Upstream| {
            let mut attempts = self.ctx.attempts.iter();
            attempts.any(|attempt| attempt.upstream == upstream.name)
        };
        plan.pin.is_none()
            && plan.steps.iter().any(|step| {
                step.group.upstreams.iter().any(|upstream| {
                    upstream.serves(&step.model)
                        && !upstream.is_closed()
                        && upstream.status(now).reason != Reason::None
                        && !was_tried(upstream)
                })
            })
    }
}

/// Returns when the first of those whose pause runs may be asked again.
fn soonest_pause(plan: &Plan) -> Option<Duration> {
    let now = Instant::now();
    let upstreams = plan.steps.iter().flat_map(|step| {
        let upstreams = step.group.upstreams.iter();
        upstreams
            .filter(|upstream| upstream.serves(&step.model))
            .map(|upstream| upstream.status(now))
    });
    upstreams
        .filter(|status| status.state == State::Cooling)
        .filter_map(|status| status.wait)
        .min()
}

/// What the client is told when nobody was asked, since everybody is known to
/// be down, or wants to be left alone: what he would have been told by whoever
/// may be asked first.
fn nobody_asked(plan: &Plan) -> Error {
    let now = Instant::now();
    let serving = plan.steps.iter().flat_map(|step| {
        let upstreams = step.group.upstreams.iter();
        upstreams
            .filter(|upstream| !upstream.is_closed() && upstream.serves(&step.model))
            .map(|upstream| (upstream.status(now), upstream.wait(&step.model, now)))
    });
    let serving: Vec<_> = serving.collect();
    let refusal = |verdict, status, wait| Failure {
        status: Some(status),
        retry_after: Some(wait),
        ..Failure::new(verdict, "left alone")
    };
    let cooling = serving
        .iter()
        .filter(|(status, _)| matches!(status.reason, Reason::RateLimit | Reason::Overload))
        .min_by_key(|(_, wait)| *wait);
    let soonest = serving.iter().map(|(_, wait)| *wait).min();
    let wait = soonest
        .filter(|wait| !wait.is_zero())
        .unwrap_or(RETRY_AFTER);
    let no_key =
        |(status, _): &(Status, Duration)| matches!(status.reason, Reason::KeyBad | Reason::Quota);
    let unreached = |(status, _): &(Status, Duration)| {
        matches!(status.reason, Reason::Tls | Reason::Connect | Reason::Check)
    };
    let tls = |(status, _): &(Status, Duration)| status.reason == Reason::Tls;
    if serving.iter().all(unreached) && serving.iter().any(tls) {
        return verdict::no_tls();
    }
    let failure = match cooling {
        Some((status, wait)) => {
            let status = match status.reason {
                Reason::RateLimit => StatusCode::TOO_MANY_REQUESTS,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            Some(refusal(Verdict::Rejected, status, *wait))
        }
        None if !serving.is_empty() && serving.iter().all(no_key) => {
            let no_money = serving
                .iter()
                .filter(|(status, _)| status.reason == Reason::Quota);
            let (status, wait) = match no_money.map(|(_, wait)| *wait).min() {
                Some(wait) => (StatusCode::PAYMENT_REQUIRED, wait),
                None => (StatusCode::UNAUTHORIZED, wait),
            };
            Some(refusal(Verdict::Credential, status, wait))
        }
        None => None,
    };
    verdict::give_up(failure.as_ref(), wait, &plan.model)
}

impl Ended {
    /// Returns it as plugins are told.
    pub(super) fn outcome(&self, ctx: &RequestContext, bytes_out: u64) -> Outcome {
        Outcome {
            status: self.status.as_u16(),
            ending: self.ending,
            error: self.error.clone(),
            streamed: self.streamed,
            first_token: self.first_token,
            total: ctx.started.elapsed(),
            bytes_out,
            usage: self.usage,
        }
    }

    /// An answer made here.
    pub(super) fn local(status: StatusCode, error: Option<Cow<'static, str>>) -> Self {
        let ending = if status.is_server_error() {
            Ending::ServerError
        } else if status.is_client_error() {
            Ending::ClientError
        } else {
            Ending::Success
        };
        Self {
            ending,
            verdict: Verdict::Answered,
            status,
            error,
            streamed: false,
            first_token: None,
            usage: None,
        }
    }
}
