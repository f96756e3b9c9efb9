//! An answer that is not streamed: read whole, looked at, then sent.
//!
//! The client sees nothing until the last byte is in, so an upstream that dies
//! in the middle, or whose 200 holds an error, costs the client nothing but
//! time: the exchange goes on with the next.

use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderValue, StatusCode, header};

use super::{
    attempt::{Answering, Attempt, Tried},
    client::{Client, Left, Waited},
    exchange::Ended,
    verdict::Failure,
};
use crate::{
    context::{Ending, Verdict},
    openai::{UpstreamError, error_in_body, json, usage_of_body},
    plugins::ResponseHead,
};

/// The deepest answer that is believed; clients' own parsers stop about there.
const ANSWER_DEPTH_MAX: usize = 128;

/// The most that is reserved on the word of a `Content-Length`.
const RESERVE_MAX: usize = 1024 * 1024;

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
        let body = match self.read_whole(&mut answering, client).await? {
            Ok(body) => body,
            Err(failure) => {
                answering.link.close().await;
                return Ok(Tried::Failed(failure));
            }
        };
        answering.release().await;
        if let Some(failure) = find_fault(&body) {
            return Ok(Tried::Failed(failure));
        }
        self.upstream.health.succeeded();
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
        if let Err(error) = self.chain.on_response(self.ctx, &mut head).await {
            return Ok(Tried::PassOn(error));
        }
        // A comment has gone out already: the client reads events.
        if client.head_is_sent() {
            let mut event = BytesMut::with_capacity(body.len() + 32);
            event.put_slice(b"data: ");
            event.extend(body.iter().filter(|byte| !matches!(byte, b'\n' | b'\r')));
            event.put_slice(b"\n\n");
            event.put_slice(self.last_comment(client).unwrap_or_default().as_bytes());
            event.put_slice(b"data: [DONE]\n\n");
            client.finish(event.freeze()).await?;
        } else {
            client.send_head(head, Some(body.len())).await?;
            client.finish(body).await?;
        }
        Ok(Tried::Ended(Ended {
            ending: Ending::Success,
            verdict: Verdict::Answered,
            status,
            error: None,
            streamed: false,
            first_token: Some(first_token),
            usage,
        }))
    }

    async fn read_whole(
        &mut self,
        answering: &mut Answering,
        client: &mut Client<'_>,
    ) -> Result<Result<Bytes, Failure>, Left> {
        let most = self.limits.answer.get();
        let length = answering
            .link
            .head()
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        let mut body = BytesMut::with_capacity(length.unwrap_or(4096).min(RESERVE_MAX));
        loop {
            let now = Instant::now();
            let deadline = self.deadline.min(now + self.upstream.timeouts.inter_token);
            let piece = match client.wait(deadline, answering.link.read()).await? {
                Waited::Done(Ok(Some(piece))) => piece,
                Waited::Done(Ok(None)) => return Ok(Ok(body.freeze())),
                Waited::Done(Err(why)) => {
                    let cause = format!("broken inside the answer: {why}");
                    return Ok(Err(Failure::new(Verdict::Failed, cause)));
                }
                Waited::TooLate => {
                    let cause = "stalled inside the answer";
                    return Ok(Err(Failure::new(Verdict::TimedOut, cause)));
                }
            };
            if body.len() + piece.len() > most {
                self.metrics.limits.with_label_values(&["answer"]).inc();
                let cause = format!("answer larger than {}", self.limits.answer);
                return Ok(Err(Failure::new(Verdict::Failed, cause)));
            }
            body.put_slice(&piece);
        }
    }
}

/// Returns what is wrong with the body of a success: an error under 200, or
/// something that is not one whole JSON object.
fn find_fault(body: &Bytes) -> Option<Failure> {
    if let Err(why) = json::scan(body, ANSWER_DEPTH_MAX) {
        let cause = format!("success without a JSON object: {why}");
        return Some(Failure::new(Verdict::Failed, cause));
    }
    if !error_in_body(body) {
        return None;
    }
    let verdict = if UpstreamError::read(body).hard_quota() {
        Verdict::Credential
    } else {
        Verdict::Failed
    };
    Some(Failure::new(verdict, "an error under 200"))
}
