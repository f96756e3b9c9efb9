//! The rest of an answer, told by another upstream: its beginning is looked at
//! before the client sees any of it, then its events are fitted to those that
//! the client has.

use std::{sync::Arc, time::Instant};

use http::StatusCode;
use pingora::connectors::TransportConnector;

use super::{
    attempt::{Attempt, Tried},
    client::{Client, Left},
    relay::{Relay, Step, broken},
    verdict::{Failure, Judgement, judge},
};
use crate::{
    context::Verdict,
    openai::{Facts, Frame, UpstreamError, continuation::Heard, inspect},
    upstreams::Continues,
};

/// The events of a rest of which nobody knows yet whether it is one.
#[derive(Default)]
pub(super) struct Opening {
    held: Vec<(Frame, Facts)>,
    bytes: usize,
}

impl Opening {
    /// Returns whether nothing is held back.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

impl Attempt<'_> {
    /// Takes an event of the rest of an answer.
    pub(super) fn take_sequel(
        &mut self,
        relay: &mut Relay,
        frame: Frame,
        facts: &Facts,
        client: &Client<'_>,
    ) -> Step {
        if relay.committed {
            return self.fit(relay, frame, facts, client);
        }
        let means_something = facts.meaningful || facts.done;
        if !means_something {
            // The head of the stream, which the client has from another.
            return Step::On;
        }
        let Some(ask) = relay.told.ask.as_mut() else {
            return Step::On;
        };
        match ask.sequel.listen(&frame) {
            Heard::Undecided if !facts.done => {
                relay.opening.bytes += frame.raw.len();
                relay.opening.held.push((frame, facts.clone()));
                if relay.opening.bytes > self.limits.event.get() {
                    self.metrics.limits.with_label_values(&["event"]).inc();
                    return broken(Verdict::Failed, "too much before the first token");
                }
                return Step::On;
            }
            Heard::Undecided | Heard::GoesOn => {}
            Heard::Repeats { surely } => {
                if surely {
                    self.found_to_start_over();
                }
                return broken(Verdict::NotContinued, "it began anew");
            }
            Heard::Reasons => {
                return broken(Verdict::NotContinued, "it reasons before it goes on");
            }
        }
        self.go_on(relay);
        for (frame, facts) in std::mem::take(&mut relay.opening).held {
            match self.fit(relay, frame, &facts, client) {
                Step::On => {}
                end => return end,
            }
        }
        self.fit(relay, frame, facts, client)
    }

    /// The rest has begun: from here on this upstream answers.
    fn go_on(&mut self, relay: &mut Relay) {
        relay.committed = true;
        self.slot.token(Instant::now());
        self.ctx.takeovers += 1;
        self.ctx.taken_over_by = Some(Arc::clone(&self.step.group.name));
        let from = &*relay.told.from;
        self.metrics
            .takeovers
            .with_label_values(&[from, &*self.upstream.name, "continued"])
            .inc();
        log::info!(
            "answer taken over: id={} from={from} to={} tokens={}",
            self.ctx.id,
            self.upstream.name,
            relay.told.partial.tokens()
        );
    }

    fn fit(&mut self, relay: &mut Relay, frame: Frame, facts: &Facts, client: &Client<'_>) -> Step {
        if frame.is_comment {
            return self.pass_on(relay, frame, facts, client);
        }
        let fitted = match relay.told.ask.as_mut() {
            Some(ask) => ask.sequel.fit(frame),
            None => Ok(Some(frame)),
        };
        match fitted {
            Ok(None) => Step::On,
            Ok(Some(frame)) => {
                // Its usage is the sum now.
                let facts = inspect(relay.endpoint, &frame);
                if facts.usage.is_some() {
                    relay.usage = facts.usage;
                }
                self.pass_on(relay, frame, &facts, client)
            }
            Err(why) => broken(Verdict::Failed, why.to_string()),
        }
    }

    /// Finds out of an upstream of which nobody knows it whether it goes on with
    /// answers: one that ignores the wish would begin anew, with words that nobody
    /// could tell from a rest. So it is asked for a contradiction first, which
    /// only one that knows the wish refuses; it costs the others a token, once.
    /// Returns what came of the try if it ends with that.
    ///
    /// # Errors
    /// [`Left`].
    pub(super) async fn prove(
        &mut self,
        connector: &Arc<TransportConnector>,
        client: &mut Client<'_>,
    ) -> Result<Option<Tried>, Left> {
        let ask = self.told.as_ref().and_then(|told| told.ask.as_ref());
        let Some(ask) = ask.filter(|ask| ask.continues) else {
            return Ok(None);
        };
        if self.upstream.continues(self.endpoint()) != Continues::Perhaps {
            return Ok(None);
        }
        let unproven = |why| {
            Ok(Some(Tried::Failed(Failure::new(
                Verdict::NotContinued,
                why,
            ))))
        };
        let Some(Ok(encoded)) = ask.contradiction().map(|asked| self.encode(&asked)) else {
            return unproven("it cannot be asked whether it goes on");
        };
        let wire = self.wire_request(&encoded);
        let answering = match self.open(connector, client, wire).await? {
            Ok(answering) => answering,
            Err(failure) => return Ok(Some(Tried::Failed(failure))),
        };
        if answering.link.head().status.is_success() {
            answering.link.close().await;
            self.found_to_start_over();
            return unproven("it does not know what going on is");
        }
        let refusal = self.refused(answering, client).await?;
        let names_both = |text: &String| {
            text.contains("continue_final_message") && text.contains("add_generation_prompt")
        };
        let is_of_contradiction = matches!(refusal.status.as_u16(), 400 | 422)
            && refusal.error.message.as_ref().is_some_and(names_both);
        if is_of_contradiction {
            self.upstream.found_to_continue();
            return Ok(None);
        }
        let of_rest = self.refuses_rest(refusal.status, &refusal.error);
        Ok(Some(
            of_rest.map_or_else(|| refusal.judged(), Tried::Failed),
        ))
    }

    /// Judges an error status as the answer to the question for the rest of an
    /// answer: what would be the caller's fault is ours then. `None` if it is
    /// to be judged like any other.
    pub(super) fn refuses_rest(
        &self,
        status: StatusCode,
        error: &UpstreamError,
    ) -> Option<Failure> {
        let ask = self.told.as_ref()?.ask.as_ref()?;
        let Judgement::PassOn(_) = judge(status, error.clone(), None) else {
            return None;
        };
        let is_unknown_word = matches!(status.as_u16(), 400 | 422) && !error.is_about_length();
        if ask.continues && is_unknown_word {
            self.found_to_start_over();
        }
        Some(Failure {
            status: Some(status),
            ..Failure::new(Verdict::NotContinued, format!("status {}", status.as_u16()))
        })
    }

    /// Remembers that the upstream cannot go on, unless it is known that it can.
    fn found_to_start_over(&self) {
        let continues = self.upstream.continues(self.endpoint());
        if matches!(continues, Continues::Perhaps | Continues::Learned) {
            log::info!(
                "upstream does not continue answers: name={}",
                self.upstream.name
            );
            Arc::as_ref(self.upstream).found_to_start_over();
        }
    }
}
