//! Requests that Pingora's parser refuses: what their clients are told in place
//! of its own bare answer.
//!
//! Pingora answers them itself, before any hook runs: no body, no id, its name
//! under `Server`, and nobody is told. What it writes goes through the guarded
//! stream (`guarded`), which knows that no request has begun, and sends this
//! instead. Under HTTP/2 what it writes is compressed, and only recorded.

use std::{net::IpAddr, time::Duration};

use bytes::Bytes;
use http::StatusCode;

use super::{
    record::{Unread, write_unread},
    turned_away::{new_id, raw},
};
use crate::{error::Error, metrics::Metrics};

/// The most that a header may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Largest {
    pub(super) bytes: usize,
    pub(super) fields: usize,
}

/// How much of a header has come, seen from outside.
#[derive(Debug, Default)]
pub(super) struct Size {
    bytes: usize,
    lines: usize,
    /// The length of the line under way.
    line: usize,
    ended: bool,
}

impl Size {
    /// Follows what the client sent, up to the empty line.
    pub(super) fn follow(&mut self, new: &[u8]) {
        if self.ended {
            return;
        }
        for byte in new {
            self.bytes += 1;
            match byte {
                b'\n' if self.line > 0 => {
                    self.lines += 1;
                    self.line = 0;
                }
                // Empty lines may stand before a request.
                b'\n' if self.lines > 0 => {
                    self.ended = true;
                    return;
                }
                b'\n' | b'\r' => {}
                _ => self.line += 1,
            }
        }
    }

    /// Returns whether it is more than a header may be, its first line included.
    fn exceeds(&self, largest: Largest) -> bool {
        self.bytes > largest.bytes || self.lines > largest.fields + 1
    }
}

/// Returns whether these bytes begin an answer.
pub(super) fn is_answer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"HTTP/1.")
}

/// Returns what a client is told whose request could not be read, and records
/// it.
pub(super) fn refuse(
    size: &Size,
    largest: Largest,
    client: Option<IpAddr>,
    total: Duration,
    metrics: &Metrics,
) -> Bytes {
    let error = if size.exceeds(largest) {
        Error::refused(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "header_too_large",
            format!(
                "the request header is larger than {} bytes or has more than {} fields",
                largest.bytes, largest.fields
            ),
        )
    } else {
        malformed()
    };
    let id = new_id();
    let bytes_out = error.to_json().len();
    write_unread(
        metrics,
        &Unread {
            id: &id,
            client,
            error: &error,
            bytes_out,
            total,
        },
    );
    raw(&error, &id)
}

/// Records a request of HTTP/2 that Pingora has refused.
pub(super) fn refused(client: Option<IpAddr>, metrics: &Metrics) {
    write_unread(
        metrics,
        &Unread {
            id: &new_id(),
            client,
            error: &malformed(),
            bytes_out: 0,
            total: Duration::ZERO,
        },
    );
}

fn malformed() -> Error {
    Error::invalid(
        "malformed_request",
        "the request is not valid HTTP: its line, its fields or its framing",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Size {
        let mut size = Size::default();
        for byte in text.bytes() {
            size.follow(&[byte]);
        }
        size
    }

    #[test]
    fn a_header_is_measured_up_to_its_empty_line() {
        let body = "\n1\n2\n3".repeat(100);
        for end in ["\r\n", "\n"] {
            let head = format!("{end}{end}GET / HTTP/1.1{end}a: b{end}c: d{end}{end}");
            let all = size(&format!("{head}{body}"));
            assert_eq!((all.bytes, all.lines), (head.len(), 3));
        }
    }

    #[test]
    fn a_header_is_too_large_by_its_bytes_or_by_its_fields() {
        let largest = Largest {
            bytes: 100,
            fields: 2,
        };
        assert!(!size("GET / HTTP/1.1\r\na: b\r\nc: d\r\n\r\n").exceeds(largest));
        assert!(size("GET / HTTP/1.1\r\na: b\r\nc: d\r\ne: f\r\n").exceeds(largest));
        assert!(size(&"a".repeat(101)).exceeds(largest));
    }
}
