//! Connections that get an answer although there is no request: written by
//! hand, since Pingora has not seen it, or could make nothing of it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use pingora::protocols::Stream;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
    time::timeout,
};

use super::head;
use crate::error::Error;

/// When to try again: idle connections end all the time, a flood does not.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How long, and how much of, what a client still sends is read, so that it
/// gets to see its answer: closing on unread bytes makes the system send a
/// reset, which overtakes it.
pub(super) const LINGER: Duration = Duration::from_secs(1);
pub(super) const LINGER_MAX: usize = 64 * 1024;
/// How many connections may linger at once; the others are closed at once. They
/// take the places of files that are spare.
const LINGERERS: usize = 16;

/// Where connections that are too many end.
#[derive(Debug)]
pub(super) struct TurnedAway {
    lingerers: Semaphore,
}

impl TurnedAway {
    pub(super) fn new() -> Self {
        Self {
            lingerers: Semaphore::new(LINGERERS),
        }
    }

    /// Tells a client that it is one too many, and closes its connection. Never
    /// waits for one that does not read.
    pub(super) async fn turn_away(&self, mut stream: Stream) {
        let permit = self.lingerers.try_acquire();
        let work = async {
            // A new connection takes this much without anybody reading it.
            stream.write_all(&too_many_connections()).await.ok()?;
            stream.flush().await.ok()?;
            if permit.is_err() {
                return None;
            }
            AsyncWriteExt::shutdown(&mut stream).await.ok()?;
            let mut rest = vec![0; 4096];
            let mut read = 0;
            while read < LINGER_MAX {
                match stream.read(&mut rest).await {
                    Ok(count @ 1..) => read += count,
                    _ => break,
                }
            }
            Some(())
        };
        // Late is no error: the connection is closed all the same.
        let _late_or_not = timeout(LINGER, work).await;
    }
}

fn crowded() -> Error {
    let error = Error::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "server_error",
        "too_many_connections",
        "the gateway has as many connections as it takes",
    );
    error.retry_after(RETRY_AFTER)
}

/// Returns the answer to a header that took too long.
pub(super) fn header_timeout() -> Bytes {
    let error = Error::refused(
        StatusCode::REQUEST_TIMEOUT,
        "header_timeout",
        "the request header took too long",
    );
    raw(&error, &new_id())
}

/// Returns the answer to who is one too many, or has to make room with half a
/// header sent.
pub(super) fn too_many_connections() -> Bytes {
    raw(&crowded(), &new_id())
}

/// Returns a request id; a client's own is not known yet.
pub(super) fn new_id() -> Arc<str> {
    head::request_id(&HeaderMap::new())
}

/// Writes an error as a whole answer of HTTP/1.1, after which the connection is
/// closed.
pub(super) fn raw(error: &Error, id: &str) -> Bytes {
    let body = error.to_json();
    let retry_after = error.retry_after.map_or_else(String::new, |wait| {
        format!("retry-after: {}\r\n", wait.as_secs())
    });
    Bytes::from(format!(
        "HTTP/1.1 {}\r\n\
         content-type: application/json\r\n\
         content-length: {}\r\n\
         x-request-id: {id}\r\n\
         {retry_after}\
         connection: close\r\n\r\n{body}",
        error.status,
        body.len(),
    ))
}
