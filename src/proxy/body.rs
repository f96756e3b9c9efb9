//! Reading a request's body: bounded in size and time, into one buffer that
//! every attempt shares.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{StatusCode, Version, header};
use pingora::{ErrorType, proxy::Session};
use tokio::time::timeout;

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
/// The most that is reserved on the word of a `Content-Length`; beyond it the
/// buffer grows with what really comes.
const RESERVE_MAX: usize = 1024 * 1024;

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

/// Reads the whole body.
///
/// # Errors
/// 413 before anything is read if the length says so already, else as soon as
/// the limit is passed; 408 when it takes too long; 400 when its chunks are
/// none. The connection is not to be used again after any.
pub(super) async fn read(
    session: &mut Session,
    limits: &Limits,
    metrics: &Metrics,
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
    if expects_continue(session)? {
        // Pingora takes every header that goes out before the body is in for a
        // reason to close.
        let kept = session.get_keepalive();
        if session.write_continue_response().await.is_err() {
            return Err(BodyError::Left);
        }
        session.set_keepalive(kept);
    }
    let whole = async {
        let mut body = BytesMut::with_capacity(announced.unwrap_or(0).min(RESERVE_MAX));
        loop {
            match session.read_request_body().await {
                Ok(Some(piece)) if body.len() + piece.len() > most => return Err(too_large()),
                // A body that came in one piece needs no copy.
                Ok(Some(piece)) if body.is_empty() && announced == Some(piece.len()) => {
                    return Ok(piece);
                }
                Ok(Some(piece)) => body.put_slice(&piece),
                Ok(None) => return Ok(body.freeze()),
                Err(why) if *why.etype() == INVALID_CHUNK => {
                    let message = "the chunks of the request body are not valid";
                    let error = Error::invalid("invalid_body", message);
                    return Err(BodyError::Refused(error.because(why).closing()));
                }
                Err(why) => {
                    log::debug!("client left inside its body: {}", why.etype().as_str());
                    return Err(BodyError::Left);
                }
            }
        }
    };
    match timeout(limits.body_timeout.get(), whole).await {
        Ok(read) => read,
        Err(_elapsed) => {
            metrics.limits.with_label_values(&["body_timeout"]).inc();
            let message = format!("the request body took longer than {}", limits.body_timeout);
            let error = Error::refused(StatusCode::REQUEST_TIMEOUT, "body_timeout", message);
            Err(BodyError::Refused(error.closing()))
        }
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
