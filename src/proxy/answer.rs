//! An answer that is not streamed: read whole, looked at, then sent.
//!
//! The client sees nothing until the last byte is in, so an upstream that dies
//! in the middle, or whose 200 holds an error, costs the client nothing but
//! time: the exchange goes on with the next. And a client that reads slowly
//! keeps no place at the upstream: that is done when the answer is in.

use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderValue, StatusCode, header};

use super::{
    attempt::{Answering, Attempt, Tried},
    bodies::Reserved,
    client::{Client, Left, Waited, event_stream},
    exchange::Ended,
    frozen::{Stage, or_frozen},
    verdict::Failure,
};
use crate::{
    context::{Ending, Verdict},
    dialects::Decoder,
    error::Error,
    openai::{
        Endpoint, Framer, UpstreamError, cursor::is_whole_object, error_in_body, usage_of_body,
        whole::as_events,
    },
    plugins::{ResponseHead, Sent, Wants},
};

/// The most that is reserved on the word of a `Content-Length`.
const RESERVE_MAX: usize = 1024 * 1024;

/// The field that says that the upstream has not read all of the prompt.
const PROMPT_CUT: &str = "x-forebay-prompt-cut";

/// A whole answer in OpenAI's words.
struct Decoded {
    body: Bytes,
    /// Whether the prompt was certainly cut.
    prompt_cut: bool,
}

impl Attempt<'_> {
    /// Reads the answer to its end and sends it.
    ///
    /// # Errors
    /// [`Left`].
    pub(super) async fn answer(
        &mut self,
        mut answering: Answering,
        client: &mut Client<'_>,
    ) -> Result<Tried, Left> {
        let status = answering.link.head().status;
        let mut room = self.memory.beside();
        let read = self.read_whole(&mut answering, &mut room, client).await?;
        let body = match read {
            Ok(body) => body,
            Err(tried) => {
                answering.link.close().await;
                return Ok(tried);
            }
        };
        let decoder = answering.decoder.take();
        answering.release().await;
        let endpoint = self.endpoint();
        if let Some(failure) = find_fault(&body) {
            return Ok(Tried::Failed(failure));
        }
        let Decoded { body, prompt_cut } = match self.decode(decoder, body) {
            Ok(decoded) => decoded,
            Err(failure) => return Ok(Tried::Failed(failure)),
        };
        self.slot.succeeded(Instant::now());
        // It is here, whatever it has become.
        room.hold(body.len());
        let usage = usage_of_body(&body);
        let first_token = self.ctx.started.elapsed();
        let mut head = ResponseHead {
            status: StatusCode::OK,
            headers: self.answer_headers(),
        };
        head.status = status;
        head.headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if prompt_cut {
            let yes = HeaderValue::from_static("1");
            head.headers.insert(PROMPT_CUT, yes);
        }
        self.chain.on_response(self.ctx, &mut head).await;
        let wanted = self.ctx.request.as_ref();
        let streamed = wanted.is_some_and(|request| request.stream);
        let want_usage = wanted.is_some_and(|request| request.include_usage == Some(true));
        let events = if streamed {
            as_events(endpoint, &body, want_usage)
        } else {
            None
        };
        let ended = Ended {
            ending: Ending::Success,
            verdict: Verdict::Answered,
            status,
            error: None,
            streamed,
            first_token: Some(first_token),
            usage,
        };
        match events {
            // The client waits for events, whatever the upstream sends.
            Some(events) => {
                let mut out = BytesMut::from(events);
                if let Some(comment) = self.last_comment(client, prompt_cut) {
                    out.put_slice(comment.as_bytes());
                }
                if endpoint != Endpoint::Responses {
                    out.put_slice(b"data: [DONE]\n\n");
                }
                let out = match self.shown_as_events(out.freeze()) {
                    Ok(out) => out,
                    Err(error) => return Ok(Tried::PassOn(error)),
                };
                room.hold(body.len() + out.len());
                let mut stream = event_stream(head.headers);
                stream.headers.remove(header::CONTENT_LENGTH);
                self.slot.free();
                self.tell_last(&ended, 0);
                client.send_head(stream, None).await?;
                client.finish(out).await?;
            }
            None if streamed => {
                let cause = "a whole answer that cannot be told as a stream";
                return Ok(Tried::Failed(Failure::new(Verdict::Failed, cause)));
            }
            None => {
                self.slot.free();
                let mut body = body;
                if self.chain.wants.edit
                    && let Err(error) = self.chain.on_body(self.ctx, &mut body)
                {
                    return Ok(Tried::PassOn(error));
                }
                if self.chain.wants.see {
                    self.chain.on_sent(self.ctx, Sent::Whole(&body));
                }
                self.tell_last(&ended, body.len());
                client.send_head(head, Some(body.len())).await?;
                client.finish(body).await?;
            }
        }
        Ok(Tried::Ended(ended))
    }

    fn tell_last(&mut self, ended: &Ended, bytes: usize) {
        let outcome = ended.outcome(self.ctx, bytes as u64);
        self.chain.on_last(self.ctx, &outcome);
    }

    /// Offers the events of a whole answer to the plugins, as if they had come
    /// one by one.
    fn shown_as_events(&mut self, events: Bytes) -> Result<Bytes, Error> {
        if self.chain.wants == Wants::default() {
            return Ok(events);
        }
        let mut framer = Framer::new(events.len() + 1);
        framer.push(&events);
        let mut out = BytesMut::with_capacity(events.len());
        while let Some(Ok(frame)) = framer.next() {
            let passed = self.chain.on_event(self.ctx, frame)?;
            for frame in &passed.frames {
                out.put_slice(&frame.raw);
                if !frame.is_comment {
                    self.chain.on_sent(self.ctx, Sent::Event(frame));
                }
            }
            if passed.ended {
                break;
            }
        }
        Ok(out.freeze())
    }

    /// Turns an answer in another dialect into OpenAI's.
    fn decode(&self, decoder: Option<Box<dyn Decoder>>, body: Bytes) -> Result<Decoded, Failure> {
        let Some(mut decoder) = decoder else {
            return Ok(Decoded {
                body,
                prompt_cut: false,
            });
        };
        let body = decoder
            .whole(&body)
            .map_err(|why| Failure::new(Verdict::Failed, why.to_string()))?;
        let prompt_cut = decoder.prompt_was_cut();
        self.note_decoded(prompt_cut);
        Ok(Decoded { body, prompt_cut })
    }

    async fn read_whole(
        &mut self,
        answering: &mut Answering,
        room: &mut Reserved,
        client: &mut Client<'_>,
    ) -> Result<Result<Bytes, Tried>, Left> {
        let failed = |failure| Ok(Err(Tried::Failed(failure)));
        let most = self.limits.answer.get();
        let length = answering
            .link
            .head()
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        let mut body = BytesMut::with_capacity(length.unwrap_or(4096).min(RESERVE_MAX));
        let mut fallen = self.upstream.health.fallen();
        loop {
            let now = Instant::now();
            // A server may send its head long before the rest: as with the first
            // token, only a time that the YAML names holds here.
            let deadline = match self.upstream.config.timeouts.inter_token {
                Some(named) => self.deadline.min(now + named.get()),
                None => self.deadline,
            };
            let reading = or_frozen(
                &mut fallen,
                now,
                |now| self.way_out(&Stage::Nothing, now),
                answering.link.read(),
            );
            let read = match client.wait(deadline, reading).await? {
                Waited::Done(Ok(read)) => Waited::Done(read),
                Waited::Done(Err(way)) => return failed(self.leave_frozen(way)),
                Waited::TooLate => Waited::TooLate,
            };
            let piece = match read {
                Waited::Done(Ok(Some(piece))) => piece,
                Waited::Done(Ok(None)) => return Ok(Ok(body.freeze())),
                Waited::Done(Err(why)) => {
                    let cause = format!("broken inside the answer: {}", why.etype().as_str());
                    return failed(Failure::new(Verdict::Failed, cause));
                }
                Waited::TooLate => {
                    let cause = "stalled inside the answer";
                    return failed(Failure::new(Verdict::TimedOut, cause));
                }
            };
            if body.len() + piece.len() > most {
                self.metrics.limits.with_label_values(&["answer"]).inc();
                let cause = format!("answer larger than {}", self.limits.answer);
                return failed(Failure::new(Verdict::Failed, cause));
            }
            if self.reserve(room, body.len() + piece.len()).is_err() {
                self.slot.accepted(Instant::now());
                return Ok(Err(Tried::NoRoom { billed: true }));
            }
            body.put_slice(&piece);
        }
    }
}

/// Returns what is wrong with the body of a success: an error under 200, or
/// something that is not one whole JSON object.
fn find_fault(body: &Bytes) -> Option<Failure> {
    if !is_whole_object(body) {
        let cause = "success without a whole JSON object";
        return Some(Failure::new(Verdict::Failed, cause));
    }
    if !error_in_body(body) {
        return None;
    }
    let verdict = if UpstreamError::read(body).hard_quota(200) {
        Verdict::Credential
    } else {
        Verdict::Failed
    };
    Some(Failure::new(verdict, "an error under 200"))
}
