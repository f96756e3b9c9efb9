//! Reading a request's body: bounded in size, time and speed, and by what all
//! bodies take together, into one buffer that every attempt shares.

use std::time::Duration;

use bytes::Bytes;
use http::{StatusCode, Version, header};
use pingora::{ErrorType, proxy::Session};
use tokio::time::{Instant, timeout, timeout_at};

use super::bodies::Reserved;
use crate::{
    config::Limits,
    error::{Error, Result},
    metrics::Metrics,
};

/// How long, and how much of, a body that nobody wants is read, so that its
/// sender gets to see the answer: closing on unread bytes makes the system send
/// a reset, and many clients then report a broken connection instead.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const DRAIN_MAX: usize = 64 * 1024 * 1024;
/// The largest buffer on the word of a `Content-Length`; beyond it the buffer
/// grows with what really comes. The system gives memory only as it is filled.
const BUFFER_FIRST: usize = 1024 * 1024;
/// The first buffer of a body that does not tell its length.
const BUFFER_UNTOLD: usize = 16 * 1024;
/// What is reserved with the first bytes of a body, if it may become that long,
/// and how far ahead of what has come at most. What a client merely says it
/// will send takes nothing from others.
const RESERVE_FIRST: usize = 64 * 1024;
const RESERVE_AHEAD: usize = 1024 * 1024;
/// When to try again after there was no room for a body: most requests that hold
/// one are over within seconds.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What Pingora says of chunks that are none; its own constant is not public.
const INVALID_CHUNK: ErrorType = ErrorType::new("InvalidChunk");

/// Why there is no body.
#[derive(Debug)]
pub(super) enum BodyError {
    /// The client gets this answer.
    Refused(Error),
    /// The client is gone.
    Left,
}

/// Reads the whole body, whose memory is `reserved` as it grows.
///
/// # Errors
/// 413 before anything is read if the length says so already, else as soon as
/// the limit is passed; 408 when it takes too long or comes too slowly; 503 when
/// there is no room; 400 when its chunks are none. The connection is not to be
/// used again after any.
pub(super) async fn read(
    session: &mut Session,
    limits: &Limits,
    metrics: &Metrics,
    reserved: &mut Reserved,
) -> Result<Bytes, BodyError> {
    let most = limits.body.get();
    let too_large = || {
        metrics.limits.with_label_values(&["body"]).inc();
        BodyError::Refused(
            Error::refused(
                StatusCode::PAYLOAD_TOO_LARGE,
                "body_too_large",
                format!("the request body is larger than {}", limits.body),
            )
            .closing(),
        )
    };
    let announced = session
        .get_header(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > most) {
        return Err(too_large());
    }
    let mut buffer = Buffer {
        bytes: Vec::new(),
        announced,
        most,
        all: limits.bodies.get(),
        reserved,
    };
    metrics
        .bodies_max
        .set(i64::try_from(buffer.all).unwrap_or(i64::MAX));
    if !buffer
        .reserved
        .would_fit(announced.unwrap_or(0), buffer.all)
    {
        return Err(no_room(metrics));
    }
    if expects_continue(session)? {
        // Pingora takes every header that goes out before the body is in for a
        // reason to close.
        let kept = session.get_keepalive();
        if session.write_continue_response().await.is_err() {
            return Err(BodyError::Left);
        }
        session.set_keepalive(kept);
    }
    let pace = Pace {
        began: Instant::now(),
        limits,
    };
    loop {
        let (deadline, why) = pace.deadline(buffer.bytes.len());
        match timeout_at(deadline, session.read_request_body()).await {
            Ok(Ok(Some(piece))) if buffer.bytes.len() + piece.len() > most => {
                return Err(too_large());
            }
            // A body that came in one piece needs no copy.
            Ok(Ok(Some(piece))) if buffer.bytes.is_empty() && announced == Some(piece.len()) => {
                buffer.reserve(piece.len(), metrics)?;
                return Ok(piece);
            }
            Ok(Ok(Some(piece))) => {
                buffer.make_room(piece.len(), metrics)?;
                buffer.bytes.extend_from_slice(&piece);
            }
            Ok(Ok(None)) => return Ok(buffer.bytes.into()),
            Ok(Err(why)) if *why.etype() == INVALID_CHUNK => {
                let message = "the chunks of the request body are not valid";
                let error = Error::invalid("invalid_body", message);
                return Err(BodyError::Refused(error.because(why).closing()));
            }
            Ok(Err(why)) => {
                log::debug!("client left inside its body: {}", why.etype().as_str());
                return Err(BodyError::Left);
            }
            Err(_elapsed) => return Err(BodyError::Refused(pace.refuse(why, metrics))),
        }
    }
}

/// A body on its way.
struct Buffer<'a> {
    bytes: Vec<u8>,
    announced: Option<usize>,
    most: usize,
    /// What all bodies together may take.
    all: usize,
    reserved: &'a mut Reserved,
}

impl Buffer<'_> {
    /// Makes sure that `more` bytes fit.
    fn make_room(&mut self, more: usize, metrics: &Metrics) -> Result<(), BodyError> {
        let needed = self.bytes.len() + more;
        self.reserve(needed, metrics)?;
        let room = self.bytes.capacity();
        if needed <= room {
            return Ok(());
        }
        let first = self
            .announced
            .map_or(BUFFER_UNTOLD, |length| length.min(BUFFER_FIRST));
        let wanted = needed.max(room * 2).max(first).min(self.end(needed));
        self.bytes.reserve_exact(wanted - self.bytes.len());
        Ok(())
    }

    /// Makes sure that so many bytes are reserved: twice as many each time, so
    /// that the count of all is not touched with every piece.
    fn reserve(&mut self, needed: usize, metrics: &Metrics) -> Result<(), BodyError> {
        let reserved = self.reserved.bytes();
        if needed <= reserved {
            return Ok(());
        }
        let wanted = needed
            .max(reserved * 2)
            .max(RESERVE_FIRST)
            .min(needed + RESERVE_AHEAD)
            .min(self.end(needed));
        self.reserved
            .resize(wanted, self.all)
            .or_else(|_ahead| self.reserved.resize(needed, self.all))
            .map_err(|_full| no_room(metrics))
    }

    /// Returns how long the body can become.
    fn end(&self, needed: usize) -> usize {
        self.announced.unwrap_or(self.most).max(needed)
    }
}

fn no_room(metrics: &Metrics) -> BodyError {
    metrics.limits.with_label_values(&["bodies"]).inc();
    BodyError::Refused(no_memory().closing())
}

/// 503: `limits.bodies` is reached.
pub(super) fn no_memory() -> Error {
    let error = Error::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "server_error",
        "gateway_overloaded",
        "the gateway holds as many requests and answers as it can",
    );
    error.retry_after(RETRY_AFTER)
}

/// How fast a body must come.
struct Pace<'a> {
    began: Instant,
    limits: &'a Limits,
}

/// What a body that is late has missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Late {
    /// `limits.body_timeout`.
    Whole,
    /// `limits.body_rate`.
    Rate,
}

impl Pace<'_> {
    /// Returns until when the next piece must come, with what it misses then.
    ///
    /// A body may take as long as a header at any speed; from then on it must
    /// have come at `limits.body_rate`.
    fn deadline(&self, received: usize) -> (Instant, Late) {
        let limits = self.limits;
        let whole = self.began + limits.body_timeout.get();
        #[expect(
            clippy::cast_precision_loss,
            reason = "a deadline that is a microsecond off harms nobody"
        )]
        let earned = received as f64 / limits.body_rate.get() as f64;
        let earned = Duration::try_from_secs_f64(earned).unwrap_or(Duration::MAX);
        let due = limits.header_timeout.get().saturating_add(earned);
        match self.began.checked_add(due) {
            Some(rate) if rate < whole => (rate, Late::Rate),
            _ => (whole, Late::Whole),
        }
    }

    fn refuse(&self, late: Late, metrics: &Metrics) -> Error {
        let limits = self.limits;
        let (name, code, message) = match late {
            Late::Whole => (
                "body_timeout",
                "body_timeout",
                format!("the request body took longer than {}", limits.body_timeout),
            ),
            Late::Rate => (
                "body_rate",
                "body_too_slow",
                format!(
                    "the request body came with less than {} a second",
                    limits.body_rate
                ),
            ),
        };
        metrics.limits.with_label_values(&[name]).inc();
        Error::refused(StatusCode::REQUEST_TIMEOUT, code, message).closing()
    }
}

/// Returns whether the client waits for a `100 Continue` (RFC 9110 §10.1.1).
fn expects_continue(session: &Session) -> Result<bool, BodyError> {
    match session.get_header(header::EXPECT) {
        None => Ok(false),
        // HTTP/1.0 knows no interim answers (RFC 9110 §10.1.1).
        Some(_) if session.req_header().version == Version::HTTP_10 => Ok(false),
        Some(value) if value.as_bytes().eq_ignore_ascii_case(b"100-continue") => Ok(true),
        Some(_) => Err(BodyError::Refused(
            Error::refused(
                StatusCode::EXPECTATION_FAILED,
                "unknown_expectation",
                "the only expectation that can be met is 100-continue",
            )
            .closing(),
        )),
    }
}

/// Reads and forgets what is left of a body, within bounds.
pub(super) async fn drain(session: &mut Session) {
    let rest = async {
        let mut read = 0;
        while let Ok(Some(piece)) = session.read_request_body().await {
            read += piece.len();
            if read > DRAIN_MAX {
                break;
            }
        }
    };
    if timeout(DRAIN_TIMEOUT, rest).await.is_err() {
        log::debug!("client still sending a body that nobody wants");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::proxy::bodies::Bodies;

    #[test]
    fn a_body_may_be_slow_for_a_while_and_then_must_keep_its_pace() {
        let limits = Limits::default();
        let pace = Pace {
            began: Instant::now(),
            limits: &limits,
        };
        let in_secs = |received| {
            let (deadline, late) = pace.deadline(received);
            ((deadline - pace.began).as_secs(), late)
        };
        assert_eq!(in_secs(0), (10, Late::Rate));
        assert_eq!(in_secs(1023), (10, Late::Rate));
        assert_eq!(in_secs(5 * 1024), (15, Late::Rate));
        assert_eq!(in_secs(50 * 1024), (60, Late::Whole));
        assert_eq!(in_secs(usize::MAX), (60, Late::Whole));
    }

    #[test]
    fn a_buffer_takes_no_more_than_its_body_and_reserves_it_before() {
        let metrics = Arc::new(Metrics::new());
        let bodies = Arc::new(Bodies::new(Arc::clone(&metrics)));
        let mut reserved = bodies.reserve();
        let mut buffer = Buffer {
            bytes: Vec::new(),
            announced: Some(2_500_000),
            most: 32 << 20,
            all: 3 << 20,
            reserved: &mut reserved,
        };
        let mut ahead = Vec::new();
        for _ in 0..2_500 {
            buffer.make_room(1000, &metrics).unwrap();
            buffer.bytes.extend_from_slice(&[b'x'; 1000]);
            ahead.push(buffer.reserved.bytes() - buffer.bytes.len());
        }
        assert!(ahead.iter().all(|ahead| *ahead <= RESERVE_AHEAD));
        assert_eq!(metrics.bodies.get(), 2_500_000);
        assert_eq!(buffer.bytes.capacity(), 2_500_000);
        let refused = buffer.make_room(1 << 20, &metrics);
        assert!(matches!(refused, Err(BodyError::Refused(error)) if error.status == 503));
        assert_eq!(metrics.limits.with_label_values(&["bodies"]).get(), 1);
    }
}
