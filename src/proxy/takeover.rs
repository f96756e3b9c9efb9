//! A streamed answer whose upstream died: another goes on with it, and the
//! client reads one answer.
//!
//! Start at [`Exchange::go_on`]. The order is the plan's, as for any request.
//! Only an upstream that may be able to continue is asked, and never the one
//! that has just died; when nobody fresh is left, those that died earlier are
//! asked once more. What fails before its first token costs the client nothing
//! but time.
//!
//! **Invariant:** a takeover sends the client nothing twice: what was delivered
//! is what the next upstream is asked to continue ([`openai::continuation`]
//! (crate::openai::continuation)).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use http::StatusCode;

use super::{
    admission::{Patience, Sought},
    bodies::{Full, Reserved},
    client::{Client, Left},
    exchange::{Ended, Exchange, Next, STREAM_TIMEOUT},
    verdict::Failure,
};
use crate::{
    config::Limits,
    context::{Ending, RequestContext, Verdict},
    error::Error,
    openai::{
        ApiRequest, Endpoint, Frame,
        continuation::{Ask, Obstacle, Partial, Rest},
        error_event,
    },
    plugins::Sent,
    routes::{Plan, Step},
    upstreams::{Continues, Effort, Refusal, Slot, Upstream},
};

/// How long a search for somebody who goes on pauses when all are busy.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What the client has of a streamed answer, and how the rest is asked for.
pub(super) struct Told {
    pub(super) partial: Partial,
    /// The memory of its text.
    kept: Reserved,
    /// From the request's header to the first token of the first upstream.
    pub(super) first_token: Option<Duration>,
    /// When the stream must be at its end, whoever sends it.
    pub(super) ends: Instant,
    /// Who died last; empty before.
    pub(super) from: Arc<str>,
    /// What is asked of who goes on; `None` while the first answers.
    pub(super) ask: Option<Box<Ask>>,
}

impl Told {
    /// Begins an answer.
    pub(super) fn new(
        ctx: &RequestContext,
        limits: &Limits,
        memory: &Reserved,
        now: Instant,
    ) -> Self {
        let request = ctx.request.as_ref();
        let request = request.expect("an exchange has a parsed request");
        Self {
            partial: Partial::new(request, limits.takeover_text.get()),
            kept: memory.beside(),
            first_token: None,
            ends: now,
            from: Arc::from(""),
            ask: None,
        }
    }

    /// Brings up to date what its text takes, which is seldom more than before.
    /// If there is no room, the text is forgotten and nobody goes on with it: an
    /// answer that comes is worth more than one that may be needed.
    pub(super) fn settle(
        &mut self,
        reserve: impl FnOnce(&mut Reserved, usize) -> Result<(), Full>,
    ) {
        let bytes = self.partial.text_bytes();
        if bytes != self.kept.bytes() && reserve(&mut self.kept, bytes).is_err() {
            self.partial.forget();
            self.kept.hold(0);
        }
    }
}

/// How a stream that had begun came to its end.
pub(super) struct Death {
    pub(super) upstream: Arc<Upstream>,
    /// Whether its group lets others go on.
    pub(super) takeover: bool,
    pub(super) failure: Failure,
    pub(super) told: Box<Told>,
}

impl Exchange<'_> {
    /// Lets others go on with an answer, as often as it dies, and tells the
    /// client if nobody can.
    ///
    /// # Errors
    /// [`Left`].
    pub(super) async fn go_on(
        &mut self,
        plan: &Plan,
        mut death: Death,
        client: &mut Client<'_>,
    ) -> Result<Ended, Left> {
        loop {
            let request = self.ctx.request.clone();
            let request = request.expect("an exchange has a parsed request");
            let ask = match self.how_to_go_on(plan, &death, &request) {
                Ok(Rest::Ask(ask)) => ask,
                Ok(Rest::Nothing) => return self.complete(death, &request, client).await,
                Err(why) => {
                    log::info!("answer not taken over: id={} reason={why}", self.ctx.id);
                    return self.break_off(death, client).await;
                }
            };
            // Both are kept: the next death asks for another rest of the first.
            let bytes = request.raw.len() + ask.request.raw.len();
            self.memory.hold(bytes.max(self.memory.bytes()));
            death = match self.ask_around(plan, death, &ask, client).await? {
                Asked::Ended(ended) => return Ok(ended),
                Asked::Died(death) => death,
                Asked::Nobody(death) => {
                    self.count(&death.told.from, "-", "none");
                    return self.break_off(death, client).await;
                }
            };
        }
    }

    /// Returns how the rest of the answer is asked for, or why nobody may go on.
    fn how_to_go_on(
        &self,
        plan: &Plan,
        death: &Death,
        request: &ApiRequest,
    ) -> Result<Rest, &'static str> {
        if !death.takeover {
            return Err("switched_off");
        }
        if death.failure.verdict == Verdict::Cut {
            return Err("plugin");
        }
        if plan.pin.is_some() {
            return Err("pinned");
        }
        if death.told.ends <= Instant::now() {
            return Err(STREAM_TIMEOUT);
        }
        if self.ctx.takeovers >= self.limits.takeovers {
            self.metrics.limits.with_label_values(&["takeovers"]).inc();
            return Err("takeovers");
        }
        let rest = death.told.partial.ask(request);
        rest.map_err(|obstacle| {
            if obstacle == Obstacle::TooLong {
                let limits = &self.metrics.limits;
                limits.with_label_values(&["takeover_text"]).inc();
            }
            self.count(&death.upstream.name, "-", "unsuitable");
            obstacle.as_str()
        })
    }

    /// Asks one upstream after the other for the rest, until one has begun it.
    /// While somebody who could is only busy, it waits: half an answer is worth
    /// more than a place in line.
    async fn ask_around(
        &mut self,
        plan: &Plan,
        death: Death,
        ask: &Ask,
        client: &mut Client<'_>,
    ) -> Result<Asked, Left> {
        let mut round = Round {
            plan,
            ask,
            asked: Vec::new(),
            busy: false,
            died: death.upstream,
            takeover: death.takeover,
            failure: death.failure,
        };
        let mut told = death.told;
        told.from = Arc::clone(&round.died.name);
        let patience = Instant::now() + self.limits.total_timeout.get();
        self.deadline = told.ends.min(patience);
        if let Some((step, slot)) = self.reserved_in(plan) {
            told = match self.ask_one(step, slot, told, &mut round, client).await? {
                Ok(asked) => return Ok(asked),
                Err(told) => told,
            };
        }
        loop {
            told = match self.ask_fresh(told, &mut round, client).await? {
                Ok(asked) => return Ok(asked),
                Err(told) => told,
            };
            told = match self.ask_again(told, &mut round, client).await? {
                Ok(asked) => return Ok(asked),
                Err(told) => told,
            };
            let now = Instant::now();
            if !std::mem::take(&mut round.busy) || now >= self.deadline {
                return Ok(Asked::Nobody(Death {
                    upstream: round.died,
                    takeover: round.takeover,
                    failure: round.failure,
                    told,
                }));
            }
            let pause = tokio::time::sleep(ASK_AGAIN);
            client.wait(self.deadline, pause).await?;
        }
    }

    /// Asks who was not tried yet, in the order of the plan.
    async fn ask_fresh(
        &mut self,
        mut told: Box<Told>,
        round: &mut Round<'_>,
        client: &mut Client<'_>,
    ) -> Result<Result<Asked, Box<Told>>, Left> {
        let Round { plan, ask, .. } = *round;
        for step in &plan.steps {
            let mut tries = 0;
            while tries < self.limits.attempts && Instant::now() < self.deadline {
                self.pass_over(step, ask);
                let sought = self
                    .seek(plan, step, Effort::Sensible, Patience::Rest, client)
                    .await?;
                let slot = match sought {
                    Sought::Slot(slot) => slot,
                    Sought::Nobody => break,
                    Sought::Busy(_) | Sought::Spilled(..) => {
                        round.busy = true;
                        break;
                    }
                };
                tries += 1;
                told = match self.ask_one(step, slot, told, round, client).await? {
                    Ok(asked) => return Ok(Ok(asked)),
                    Err(told) => told,
                };
            }
        }
        Ok(Err(told))
    }

    /// Asks who failed earlier in this exchange, or is known to be down: it may
    /// be back. Never who has just died.
    async fn ask_again(
        &mut self,
        mut told: Box<Told>,
        round: &mut Round<'_>,
        client: &mut Client<'_>,
    ) -> Result<Result<Asked, Box<Told>>, Left> {
        let Round { plan, ask, .. } = *round;
        for step in &plan.steps {
            let mut tries = 0;
            for upstream in &step.group.upstreams {
                let now = Instant::now();
                if tries >= self.limits.attempts || now >= self.deadline {
                    break;
                }
                if round.has_had(upstream)
                    || !upstream.serves(&step.model)
                    || !may_go_on(upstream, ask)
                {
                    continue;
                }
                let mut slot = match upstream.try_in_panic(&step.model, now) {
                    Ok(slot) => slot,
                    Err(Refusal::Busy) => {
                        round.busy = true;
                        continue;
                    }
                    Err(Refusal::Unavailable) => continue,
                };
                let group = &step.group;
                let class = self.ctx.restrict.class;
                if !group.waiting.admits(&mut slot, class, group.places()) {
                    round.busy = true;
                    continue;
                }
                tries += 1;
                told = match self.ask_one(step, slot, told, round, client).await? {
                    Ok(asked) => return Ok(Ok(asked)),
                    Err(told) => told,
                };
            }
        }
        Ok(Err(told))
    }

    /// Returns what whoever gave up a frozen upstream has taken for the next try.
    fn reserved_in<'p>(&mut self, plan: &'p Plan) -> Option<(&'p Step, Slot)> {
        let reserved = self.reserved.take()?;
        let mut steps = plan.steps.iter();
        let step = steps.find(|step| reserved.is_in(&step.group))?;
        Some((step, reserved.slot))
    }

    /// Asks one upstream for the rest; if it freezes, another whose place was
    /// taken before it was given up. `Ok(Err(told))`: nobody of them has begun it.
    async fn ask_one(
        &mut self,
        step: &Step,
        slot: Slot,
        mut told: Box<Told>,
        round: &mut Round<'_>,
        client: &mut Client<'_>,
    ) -> Result<Result<Asked, Box<Told>>, Left> {
        let mut next = Some((step, slot));
        while let Some((step, slot)) = next {
            told = match self.ask_this(step, slot, told, round, client).await? {
                Ok(asked) => return Ok(Ok(asked)),
                Err(told) => told,
            };
            next = self.reserved_in(round.plan);
        }
        Ok(Err(told))
    }

    async fn ask_this(
        &mut self,
        step: &Step,
        slot: Slot,
        mut told: Box<Told>,
        round: &mut Round<'_>,
        client: &mut Client<'_>,
    ) -> Result<Result<Asked, Box<Told>>, Left> {
        let upstream = Arc::clone(slot.upstream());
        round.asked.push(Arc::clone(&upstream));
        self.tried.push(Arc::clone(&upstream));
        let mut ask = Box::new(round.ask.clone());
        let continues = upstream.continues(ask.request.endpoint);
        if !ask.continues || continues == Continues::Yes {
            ask.sequel.trust();
        }
        told.ask = Some(ask);
        self.told = Some(told);
        match self.try_one(round.plan, step, slot, client).await? {
            Next::Ended(ended) => return Ok(Ok(Asked::Ended(ended))),
            Next::Died(death) => return Ok(Ok(Asked::Died(*death))),
            Next::Tell(_) | Next::Group | Next::Fallback => {}
        }
        let result = match self.ctx.attempts.last() {
            Some(last) if last.verdict == Verdict::NotContinued => match last.status {
                Some(_) => "refused",
                None => "restarted",
            },
            _ => "failed",
        };
        self.count(&round.died.name, &upstream.name, result);
        let told = self.told.take();
        Ok(Err(
            told.expect("a try that failed leaves what the client has")
        ))
    }

    /// Lets the choice pass over who cannot go on.
    fn pass_over(&mut self, step: &Step, ask: &Ask) {
        for upstream in &step.group.upstreams {
            let known = self.tried.iter().any(|tried| Arc::ptr_eq(tried, upstream));
            if !known && !may_go_on(upstream, ask) {
                self.tried.push(Arc::clone(upstream));
            }
        }
    }

    fn count(&self, from: &str, to: &str, result: &str) {
        self.metrics
            .takeovers
            .with_label_values(&[from, to, result])
            .inc();
    }

    /// Ends an answer that has all the tokens that the client wished for: only
    /// its last events were lost.
    async fn complete(
        &mut self,
        death: Death,
        request: &ApiRequest,
        client: &mut Client<'_>,
    ) -> Result<Ended, Left> {
        self.count(&death.upstream.name, "-", "complete");
        let partial = &death.told.partial;
        let mut out = BytesMut::new();
        let error = self.put_ending(partial.ending(request), &mut out);
        let ended = Ended {
            ending: match error {
                None => Ending::Success,
                Some(_) => Ending::Incomplete,
            },
            verdict: Verdict::Answered,
            status: StatusCode::OK,
            error: error.and_then(|error| error.code),
            streamed: true,
            first_token: death.told.first_token,
            usage: partial.usage(request),
        };
        let outcome = ended.outcome(self.ctx, 0);
        self.chain.on_last(self.ctx, &outcome);
        client.finish(out.freeze()).await?;
        Ok(ended)
    }

    /// Shows the last events to the plugins, as those before them were: what
    /// these hold back goes out with them. Returns why a plugin failed.
    fn put_ending(&mut self, frames: Vec<Frame>, out: &mut BytesMut) -> Option<Error> {
        for frame in frames {
            let passed = match self.chain.on_event(self.ctx, frame) {
                Ok(passed) => passed,
                Err(error) => {
                    out.extend_from_slice(&error_event(&error));
                    return Some(error);
                }
            };
            for frame in passed.frames {
                out.extend_from_slice(&frame.raw);
                if !frame.is_comment {
                    self.chain.on_sent(self.ctx, Sent::Event(&frame));
                }
            }
            if passed.ended {
                break;
            }
        }
        None
    }

    /// Tells the client by an event that the answer is not complete.
    async fn break_off(&mut self, death: Death, client: &mut Client<'_>) -> Result<Ended, Left> {
        log::warn!(
            "answer broken off: id={} upstream={} cause={}",
            self.ctx.id,
            death.upstream.name,
            death.failure.cause
        );
        let error = if death.told.ends <= Instant::now() {
            self.metrics
                .limits
                .with_label_values(&[STREAM_TIMEOUT])
                .inc();
            let message = "the answer took longer than a stream may";
            Error::new(
                StatusCode::BAD_GATEWAY,
                "server_error",
                STREAM_TIMEOUT,
                message,
            )
        } else {
            incomplete(death.failure.verdict)
        };
        let event = error_event(&error);
        let request = self.ctx.request.as_ref();
        let usage = request.and_then(|request| death.told.partial.usage(request));
        let ended = Ended {
            ending: Ending::Incomplete,
            verdict: Verdict::Cut,
            status: StatusCode::OK,
            error: error.code,
            streamed: true,
            first_token: death.told.first_token,
            usage,
        };
        let outcome = ended.outcome(self.ctx, 0);
        self.chain.on_last(self.ctx, &outcome);
        client.finish(event).await?;
        Ok(ended)
    }
}

/// What came of asking for the rest of an answer.
enum Asked {
    Ended(Ended),
    /// Somebody went on, and died.
    Died(Death),
    /// Nobody went on.
    Nobody(Death),
}

/// One search for somebody who goes on.
struct Round<'a> {
    plan: &'a Plan,
    /// What is asked for.
    ask: &'a Ask,
    /// Who was asked.
    asked: Vec<Arc<Upstream>>,
    /// Whether somebody who may be asked had no place.
    busy: bool,
    /// Whose death it is about, and how it was.
    died: Arc<Upstream>,
    takeover: bool,
    failure: Failure,
}

impl Round<'_> {
    /// Returns whether an upstream had its chance.
    fn has_had(&self, upstream: &Arc<Upstream>) -> bool {
        Arc::ptr_eq(&self.died, upstream)
            || self.asked.iter().any(|asked| Arc::ptr_eq(asked, upstream))
    }
}

/// Returns whether an upstream may be asked.
pub(super) fn may_go_on(upstream: &Upstream, ask: &Ask) -> bool {
    !ask.continues || upstream.continues(ask.request.endpoint) != Continues::No
}

/// Returns whether it is known of an upstream that it goes on, if that is needed.
pub(super) fn goes_on(upstream: &Upstream, ask: &Ask) -> bool {
    !ask.continues || is_known_to_go_on(upstream, ask.request.endpoint)
}

/// Returns whether it is known of an upstream that it goes on with an answer of
/// this endpoint.
pub(super) fn is_known_to_go_on(upstream: &Upstream, endpoint: Endpoint) -> bool {
    let continues = upstream.continues(endpoint);
    matches!(continues, Continues::Yes | Continues::Learned)
}

/// The error event of an answer that broke off.
fn incomplete(verdict: Verdict) -> Error {
    let (code, message) = match verdict {
        Verdict::TimedOut => (
            "upstream_idle",
            "the model server stopped sending before its answer was complete",
        ),
        _ => (
            "upstream_incomplete",
            "the model server failed before its answer was complete",
        ),
    };
    Error::new(StatusCode::BAD_GATEWAY, "server_error", code, message)
}
