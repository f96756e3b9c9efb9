//! A streamed answer: events in, events out, nothing held back longer than it
//! must be.
//!
//! Until the first meaningful event the client has seen nothing of this
//! upstream: what came is held, and a stream that fails, ends or says an error
//! before it costs the client nothing. That event commits: the head goes out,
//! then what was held, then every event as soon as it is whole.
//!
//! A stream that dies behind the commit leaves [`Told`] to whoever goes on with
//! it ([`takeover`](super::takeover)); that one's stream is relayed here too, its
//! events fitted by [`sequel`](super::sequel).
//!
//! **Invariant:** `[DONE]` is sent only if the upstream sent it, and never
//! after an error event.

use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    attempt::{Answering, Attempt, Tried},
    client::{Client, Left, Waited, event_stream},
    exchange::Ended,
    frozen::{Stage, or_frozen},
    sequel::Opening,
    takeover::Told,
    verdict::Failure,
};
use crate::{
    context::{Ending, Verdict},
    dialects::DecodeError,
    error::Error,
    openai::{Endpoint, Facts, Frame, Framer, Usage, error_event, inspect, without_usage},
    plugins::Sent,
};

/// How long an upstream may send comments and nothing else.
const COMMENTS_ONLY_MAX: Duration = Duration::from_secs(600);
/// How long the end of a stream's framing is waited for after its last event,
/// so that the connection can be used again.
const TAIL_TIMEOUT: Duration = Duration::from_millis(50);

/// One stream on its way.
pub(super) struct Relay {
    answering: Answering,
    framer: Framer,
    pub(super) endpoint: Endpoint,
    /// What came before the commit.
    held: Vec<(Frame, Facts)>,
    held_bytes: usize,
    /// Why a plugin ended the answer; the client has been told in `out`.
    error: Option<Error>,
    /// What goes out with the next write.
    out: BytesMut,
    pub(super) committed: bool,
    pub(super) usage: Option<Usage>,
    last_event: Instant,
    /// What the client has of the answer, from this upstream and others.
    pub(super) told: Box<Told>,
    /// The beginning of the rest of an answer, until it is known for what it is.
    pub(super) opening: Opening,
}

/// What a batch of events came to.
pub(super) enum Step {
    /// More is to come.
    On,
    /// The last event is in `out`.
    Done,
    /// The stream cannot go on.
    Broken(Failure),
}

impl Relay {
    /// Gives what has arrived to the framer, as events.
    fn push(&mut self, piece: &Bytes) -> Result<(), DecodeError> {
        let Some(decoder) = &mut self.answering.decoder else {
            self.framer.push(piece);
            return Ok(());
        };
        let mut events = BytesMut::new();
        let decoded = decoder.push(piece, &mut events);
        self.framer.push(&events.freeze());
        decoded
    }

    /// The upstream has ended its body.
    fn push_end(&mut self) -> Result<(), DecodeError> {
        let Some(decoder) = &mut self.answering.decoder else {
            return Ok(());
        };
        let mut events = BytesMut::new();
        let decoded = decoder.end(&mut events);
        self.framer.push(&events.freeze());
        decoded
    }
}

impl Attempt<'_> {
    /// Relays the stream to its end.
    ///
    /// # Errors
    /// [`Left`]: the client is gone; the upstream's connection is closed.
    pub(super) async fn relay(
        &mut self,
        answering: Answering,
        client: &mut Client<'_>,
    ) -> Result<Tried, Left> {
        let now = Instant::now();
        let told = self.told.take();
        let mut relay = Relay {
            framer: Framer::new(self.limits.event.get()),
            endpoint: self.endpoint(),
            held: Vec::new(),
            held_bytes: 0,
            error: None,
            out: BytesMut::new(),
            committed: false,
            usage: None,
            last_event: now,
            told: told
                .unwrap_or_else(|| Box::new(Told::new(self.ctx, self.limits, self.memory, now))),
            opening: Opening::default(),
            answering,
        };
        match self.pump(&mut relay, client).await {
            Ok(Ok(())) => {
                let ended = self.finish(relay, client).await?;
                Ok(Tried::Ended(ended))
            }
            Ok(Err(failure)) => {
                relay.answering.link.close().await;
                let died = relay.committed;
                if died {
                    // What came whole before the end is the client's.
                    client.write(relay.out.split().freeze()).await?;
                }
                if died || relay.told.ask.is_some() {
                    self.told = Some(relay.told);
                }
                Ok(if died {
                    Tried::Died(failure)
                } else {
                    Tried::Failed(failure)
                })
            }
            Err(Left) => {
                relay.answering.link.close().await;
                Err(Left)
            }
        }
    }

    /// Reads and sends until the last event is in `relay.out`, or until the
    /// stream cannot go on.
    async fn pump(
        &mut self,
        relay: &mut Relay,
        client: &mut Client<'_>,
    ) -> Result<Result<(), Failure>, Left> {
        let mut fallen = self.upstream.health.fallen();
        let mut heard = Instant::now();
        loop {
            let deadline = self.next_deadline(relay);
            if deadline <= Instant::now() {
                // A wait asks the upstream first: one that always has more to
                // say would never be found too late.
                return Ok(Err(Failure::new(Verdict::TimedOut, "no end in time")));
            }
            let (answering, told) = (&mut relay.answering, &relay.told);
            let stage = match relay.committed {
                true => Stage::Begun(told),
                false => Stage::before(Some(told)),
            };
            let reading = or_frozen(
                &mut fallen,
                heard,
                |now| self.way_out(&stage, now),
                answering.link.read(),
            );
            let read = match client.wait(deadline, reading).await? {
                Waited::Done(Ok(read)) => Waited::Done(read),
                Waited::Done(Err(way)) => return Ok(Err(self.leave_frozen(way))),
                Waited::TooLate => Waited::TooLate,
            };
            heard = Instant::now();
            let piece = match read {
                Waited::Done(Ok(Some(piece))) => piece,
                Waited::Done(Ok(None)) => return self.take_tail(relay, client).await,
                Waited::Done(Err(why)) => {
                    let cause = format!("broken inside the stream: {}", why.etype().as_str());
                    return Ok(Err(Failure::new(Verdict::Failed, cause)));
                }
                Waited::TooLate => {
                    let why = "no event in time";
                    return Ok(Err(Failure::new(Verdict::TimedOut, why)));
                }
            };
            let fault = relay.push(&piece).err();
            match self.take_events(relay, client).await? {
                Step::On => {}
                Step::Done => return Ok(Ok(())),
                Step::Broken(failure) => return Ok(Err(failure)),
            }
            if let Some(fault) = fault {
                return Ok(Err(self.undecoded(&fault)));
            }
            if relay.committed && !relay.out.is_empty() {
                client.write(relay.out.split().freeze()).await?;
            }
        }
    }

    /// Moves every whole event from the framer to `out`; commits when one of
    /// them is meaningful.
    async fn take_events(
        &mut self,
        relay: &mut Relay,
        client: &mut Client<'_>,
    ) -> Result<Step, Left> {
        while let Some(event) = relay.framer.next() {
            let frame = match event {
                Ok(frame) => frame,
                Err(why) => {
                    self.metrics.limits.with_label_values(&["event"]).inc();
                    return Ok(broken(Verdict::Failed, why.to_string()));
                }
            };
            let facts = inspect(relay.endpoint, &frame);
            match self.take_event(relay, frame, &facts, client).await? {
                Step::On => {}
                end => return Ok(end),
            }
        }
        Ok(Step::On)
    }

    async fn take_event(
        &mut self,
        relay: &mut Relay,
        frame: Frame,
        facts: &Facts,
        client: &mut Client<'_>,
    ) -> Result<Step, Left> {
        if let Some(step) = self.look_at(relay, &frame, facts) {
            return Ok(step);
        }
        if relay.told.ask.is_some() {
            return Ok(self.take_sequel(relay, frame, facts, client));
        }
        if facts.meaningful && !relay.committed {
            self.commit(relay, client).await?;
            relay.held_bytes = 0;
            for (frame, facts) in std::mem::take(&mut relay.held) {
                match self.pass_on(relay, frame, &facts, client) {
                    Step::On => {}
                    end => return Ok(end),
                }
            }
        }
        Ok(self.pass_on(relay, frame, facts, client))
    }

    /// Hands an event to the plugins and puts it into `out`.
    pub(super) fn pass_on(
        &mut self,
        relay: &mut Relay,
        frame: Frame,
        facts: &Facts,
        client: &Client<'_>,
    ) -> Step {
        // Comments before the commit are dropped: ours take their place.
        if frame.is_comment && !relay.committed {
            return Step::On;
        }
        if !relay.committed {
            return self.hold(relay, frame, facts);
        }
        // What the upstream said, not what plugins make of it: they may hold
        // some of it back, and would say it twice if another said it again.
        let partial = &mut relay.told.partial;
        partial.take(&frame, facts.content_events, facts.usage);
        relay.told.settle(|kept, bytes| self.reserve(kept, bytes));
        self.ctx.content_events += u64::from(facts.content_events);
        if !self.chain.wants.edit {
            return self.put(relay, &frame, facts, client);
        }
        let passed = match self.chain.on_event(self.ctx, frame) {
            Ok(passed) => passed,
            Err(error) => {
                relay.out.put_slice(&error_event(&error));
                relay.error = Some(error);
                return Step::Done;
            }
        };
        for frame in passed.frames {
            let facts = inspect(relay.endpoint, &frame);
            if let Step::Done = self.put(relay, &frame, &facts, client) {
                return Step::Done;
            }
        }
        if passed.ended || facts.done {
            Step::Done
        } else {
            Step::On
        }
    }

    /// Keeps what comes before the commit: plugins see nothing of an answer that
    /// may yet be another's.
    fn hold(&self, relay: &mut Relay, frame: Frame, facts: &Facts) -> Step {
        relay.held_bytes += frame.raw.len();
        relay.held.push((frame, facts.clone()));
        if relay.held_bytes > self.limits.event.get() {
            self.metrics.limits.with_label_values(&["event"]).inc();
            return broken(Verdict::Failed, "too much before the first token");
        }
        Step::On
    }

    /// Puts an event into `out` as the client is to have it.
    fn put(
        &mut self,
        relay: &mut Relay,
        frame: &Frame,
        facts: &Facts,
        client: &Client<'_>,
    ) -> Step {
        if facts.done
            && let Some(comment) = self.last_comment(client, relay.answering.prompt_was_cut())
        {
            relay.out.put_slice(comment.as_bytes());
        }
        let shown = relay.answering.hide_usage.then(|| hide_usage(frame, facts));
        let frame = match &shown {
            None => Some(frame),
            Some(shown) => shown.as_ref(),
        };
        if let Some(frame) = frame {
            relay.out.put_slice(&frame.raw);
            if self.chain.wants.see && !frame.is_comment {
                self.chain.on_sent(self.ctx, Sent::Event(frame));
            }
        }
        if facts.done { Step::Done } else { Step::On }
    }

    /// The upstream ended its body in good order. By the standard what has no
    /// blank line is no event; some servers leave it out after `[DONE]`, though,
    /// and that one line says all there is to know.
    async fn take_tail(
        &mut self,
        relay: &mut Relay,
        client: &mut Client<'_>,
    ) -> Result<Result<(), Failure>, Left> {
        let fault = relay.push_end().err();
        match self.take_events(relay, client).await? {
            Step::On => {}
            Step::Done => return Ok(Ok(())),
            Step::Broken(failure) => return Ok(Err(failure)),
        }
        if let Some(fault) = fault {
            return Ok(Err(self.undecoded(&fault)));
        }
        if let Some(frame) = relay.framer.take_tail() {
            let facts = inspect(relay.endpoint, &frame);
            if facts.done {
                match self.take_event(relay, frame, &facts, client).await? {
                    Step::Done => return Ok(Ok(())),
                    Step::Broken(failure) => return Ok(Err(failure)),
                    Step::On => {}
                }
            }
        }
        let why = "ended without its last event";
        Ok(Err(Failure::new(Verdict::Failed, why)))
    }

    /// Notes what an event tells; returns a step if the stream ends with it.
    fn look_at(&self, relay: &mut Relay, frame: &Frame, facts: &Facts) -> Option<Step> {
        if let Some(error) = &facts.error {
            let verdict = if error.hard_quota(200) {
                Verdict::Credential
            } else {
                Verdict::Failed
            };
            return Some(broken(verdict, "an error event"));
        }
        if !facts.done && frame.data.as_deref().is_some_and(|data| !is_event(data)) {
            return Some(broken(Verdict::Failed, "an event that is no JSON object"));
        }
        if facts.usage.is_some() {
            relay.usage = facts.usage;
        }
        if !frame.is_comment {
            relay.last_event = Instant::now();
        }
        let nothing_held = relay.opening.is_empty();
        if facts.done && !relay.committed && !facts.meaningful && nothing_held {
            return Some(broken(Verdict::Failed, "an empty answer"));
        }
        None
    }

    async fn commit(&mut self, relay: &mut Relay, client: &mut Client<'_>) -> Result<(), Left> {
        relay.committed = true;
        self.slot.token(Instant::now());
        relay.told.first_token = Some(self.ctx.started.elapsed());
        relay.told.ends = Instant::now() + self.limits.stream_timeout.get();
        let mut head = event_stream(self.answer_headers());
        self.chain.on_response(self.ctx, &mut head).await;
        client.send_head(head, None).await
    }

    /// If the head went out before all was known that it should say, returns
    /// the comment that says it before the last event: who answered, and whether
    /// the prompt was cut.
    pub(super) fn last_comment(&self, client: &Client<'_>, prompt_cut: bool) -> Option<String> {
        if !client.head_was_early() && !prompt_cut && self.ctx.takeovers == 0 {
            return None;
        }
        let mut who = serde_json::json!({
            "upstream": &*self.upstream.name,
            "group": &*self.step.group.name,
            "attempts": self.number,
            "fallback": self.step.fallback,
        });
        if let Some(who) = who.as_object_mut().filter(|_| prompt_cut) {
            who.insert("prompt_cut".to_owned(), true.into());
        }
        if let (1.., Some(who)) = (self.ctx.takeovers, who.as_object_mut()) {
            who.insert("takeovers".to_owned(), self.ctx.takeovers.into());
        }
        Some(format!(": forebay {who}\n\n"))
    }

    fn undecoded(&self, fault: &DecodeError) -> Failure {
        if let DecodeError::TooLong(_) = fault {
            self.metrics.limits.with_label_values(&["event"]).inc();
        }
        Failure::new(Verdict::Failed, fault.to_string())
    }

    fn next_deadline(&self, relay: &Relay) -> Instant {
        let timeouts = &self.upstream.timeouts;
        if !relay.committed {
            let first_token = relay.answering.sent_at + timeouts.first_token;
            return self.deadline.min(first_token);
        }
        (Instant::now() + timeouts.inter_token)
            .min(relay.last_event + COMMENTS_ONLY_MAX)
            .min(relay.told.ends)
    }

    /// Sends the last event, and meanwhile keeps the upstream's connection if its
    /// framing ends soon too. The upstream is done: its place is not held until
    /// the client has read.
    async fn finish(&mut self, mut relay: Relay, client: &mut Client<'_>) -> Result<Ended, Left> {
        if relay.answering.decoder.is_some() {
            self.note_decoded(relay.answering.prompt_was_cut());
        }
        let last = relay.out.split().freeze();
        if relay.error.is_none() {
            self.slot.succeeded(Instant::now());
        }
        let told = &relay.told;
        // Of a rest whose upstream tells nothing, what is known all the same.
        let usage = match (relay.usage, &told.ask, &self.ctx.request) {
            (None, Some(_), Some(request)) => told.partial.usage(request),
            (usage, ..) => usage,
        };
        let ended = Ended {
            ending: if relay.error.is_some() {
                Ending::Incomplete
            } else {
                Ending::Success
            },
            verdict: Verdict::Answered,
            status: http::StatusCode::OK,
            error: relay.error.and_then(|error| error.code),
            streamed: true,
            first_token: told.first_token,
            usage,
        };
        let outcome = ended.outcome(self.ctx, 0);
        self.chain.on_last(self.ctx, &outcome);
        let mut link = relay.answering;
        let leave = async {
            let tail = async { while let Ok(Some(_)) = link.link.read().await {} };
            if tokio::time::timeout(TAIL_TIMEOUT, tail).await.is_ok() && link.link.is_done() {
                link.release().await;
            } else {
                link.link.close().await;
            }
            self.slot.free();
        };
        let (sent, ()) = tokio::join!(client.finish(last), leave);
        sent?;
        Ok(ended)
    }
}

/// Returns whether the data of an event can be what clients expect: a JSON
/// object. Looked at from outside only; an empty one keeps a connection alive.
fn is_event(data: &[u8]) -> bool {
    let data = data.trim_ascii();
    let is_object = data.starts_with(b"{") && data.ends_with(b"}");
    data.is_empty() || is_object && std::str::from_utf8(data).is_ok()
}

/// Returns an event without the usage that the client did not ask for; `None`
/// if nothing else is in it.
fn hide_usage(frame: &Frame, facts: &Facts) -> Option<Frame> {
    if facts.usage_only {
        return None;
    }
    Some(without_usage(frame).unwrap_or_else(|| frame.clone()))
}

pub(super) fn broken(verdict: Verdict, cause: impl Into<String>) -> Step {
    Step::Broken(Failure::new(verdict, cause))
}
