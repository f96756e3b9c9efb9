//! Reading requests: HTTP/1.1 by hand, so that what arrived is kept byte for
//! byte.
//!
//! [`Inbox`] holds what was read of a connection and not yet used. It never
//! writes; who calls it decides when a `100 Continue` goes out.
//!
//! **Invariant:** a request is read exactly as RFC 9112 frames it, and what two
//! readers could frame differently (both lengths, two lengths, bad chunks) is an
//! error: the simulator is the witness in tests of request smuggling.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::net::TcpStream;

/// The largest head that is read, in bytes.
const HEAD_BYTES_MAX: usize = 1 << 20;
/// The largest body that is read, in bytes.
const BODY_BYTES_MAX: u64 = 256 << 20;
/// How far the simulator reads ahead while it answers, in bytes.
const AHEAD_BYTES_MAX: usize = 1 << 20;
/// Smaller messages are copied, so that keeping one does not keep the whole
/// buffer it was read into.
const COPY_BYTES_MAX: usize = 16 << 10;

/// Why a request could not be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The client is gone.
    Gone,
    /// It is no HTTP; the status that says so, and why.
    Bad(u16, &'static str),
}

impl From<io::Error> for ReadError {
    fn from(_: io::Error) -> Self {
        // Whatever broke the connection, there is nobody left to tell.
        Self::Gone
    }
}

/// How the body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
}

/// A request's head, with what is needed of it looked up once.
#[derive(Debug)]
pub(crate) struct Head {
    /// As it came, with the blank line.
    pub(crate) bytes: Bytes,
    /// How the body is framed.
    pub(crate) framing: Framing,
    /// Whether the client waits for `100 Continue`.
    pub(crate) expects_continue: bool,
    /// Whether the connection stays open after the answer.
    pub(crate) keep_alive: bool,
    /// The fault the request asks for itself (`x-sim`, `x-fake`).
    pub(crate) fault: Option<String>,
    /// The value of `Authorization`.
    pub(crate) authorization: Option<String>,
}

impl Head {
    /// A head that was refused.
    pub(crate) fn unread(bytes: Bytes) -> Self {
        Self {
            bytes,
            framing: Framing::Length(0),
            expects_continue: false,
            keep_alive: false,
            fault: None,
            authorization: None,
        }
    }

    /// Returns the method; empty if there is none.
    pub(crate) fn method(&self) -> &str {
        request_line(&self.bytes).0
    }

    /// Returns the path, without the query.
    pub(crate) fn path(&self) -> &str {
        let target = request_line(&self.bytes).1;
        target.split_once('?').map_or(target, |(path, _)| path)
    }
}

/// Returns the method and the target of a head.
pub(crate) fn request_line(head: &[u8]) -> (&str, &str) {
    let line = head.split(|&b| b == b'\r').next().unwrap_or_default();
    let mut words = std::str::from_utf8(line).unwrap_or_default().split(' ');
    (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    )
}

/// Returns the header lines of a head, in order, as name and value.
pub(crate) fn header_lines(head: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    head.split(|&b| b == b'\n')
        .skip(1)
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter(|line| !line.is_empty())
        .map(|line| {
            let colon = line.iter().position(|&b| b == b':').unwrap_or(line.len());
            let (name, rest) = line.split_at(colon);
            (name, rest.strip_prefix(b":").unwrap_or(rest).trim_ascii())
        })
}

fn read_head(bytes: Bytes) -> Result<Head, ReadError> {
    let mut length: Option<u64> = None;
    let mut chunked = false;
    let mut expects_continue = false;
    let mut fault = None;
    let mut authorization = None;
    let first = bytes.split(|&b| b == b'\r').next().unwrap_or_default();
    let mut keep_alive = first.ends_with(b" HTTP/1.1");
    if !keep_alive && !first.ends_with(b" HTTP/1.0") {
        return Err(ReadError::Bad(400, "no HTTP/1 request line"));
    }
    let text = |value: &[u8]| Some(String::from_utf8_lossy(value).into_owned());
    for (name, value) in header_lines(&bytes) {
        // By length first: most headers are none of these.
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
                let number = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                if !digits || number.is_none() || length.is_some_and(|l| Some(l) != number) {
                    return Err(ReadError::Bad(400, "bad Content-Length"));
                }
                length = number;
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(ReadError::Bad(400, "bad Transfer-Encoding"));
                }
                chunked = true;
            }
            6 if name.eq_ignore_ascii_case(b"expect") => {
                expects_continue = value.eq_ignore_ascii_case(b"100-continue");
            }
            10 if name.eq_ignore_ascii_case(b"connection") => {
                keep_alive &= !value.eq_ignore_ascii_case(b"close");
            }
            13 if name.eq_ignore_ascii_case(b"authorization") => authorization = text(value),
            5 if name.eq_ignore_ascii_case(b"x-sim") => fault = text(value),
            6 if name.eq_ignore_ascii_case(b"x-fake") => fault = text(value),
            _ => {}
        }
    }
    let framing = match (length, chunked) {
        (Some(_), true) => return Err(ReadError::Bad(400, "two lengths")),
        (Some(length), false) if length > BODY_BYTES_MAX => {
            return Err(ReadError::Bad(413, "body too large"));
        }
        (Some(length), false) => Framing::Length(length),
        (None, true) => Framing::Chunked,
        (None, false) => Framing::Length(0),
    };
    Ok(Head {
        bytes,
        framing,
        expects_continue,
        keep_alive,
        fault,
        authorization,
    })
}

/// A body as it came and as it is meant; the same bytes if it was not chunked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Body {
    /// As it came, with the chunk framing.
    pub(crate) wire: Bytes,
    /// What it says.
    pub(crate) content: Bytes,
}

/// What was read of a connection and not yet used.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    buffer: BytesMut,
    /// The last head that was read, also when it was refused.
    pub(crate) last_head: Bytes,
}

impl Inbox {
    /// Reads more; false at the end of the stream.
    async fn fill(&mut self, stream: &TcpStream) -> io::Result<bool> {
        loop {
            if self.buffer.capacity() - self.buffer.len() < 2048 {
                // Grows with the message, so that a large body is not read in
                // thousands of small pieces.
                let more = self.buffer.len().clamp(8 << 10, 1 << 20);
                self.buffer.reserve(more);
            }
            match stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stream.readable().await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for the first byte of the next request.
    pub(crate) async fn wait(&mut self, stream: &TcpStream) -> Result<(), ReadError> {
        while self.buffer.is_empty() {
            if !self.fill(stream).await? {
                return Err(ReadError::Gone);
            }
        }
        Ok(())
    }

    /// Reads the next head.
    pub(crate) async fn head(&mut self, stream: &TcpStream) -> Result<Head, ReadError> {
        let mut seen: usize = 0;
        loop {
            // RFC 9112 §2.2: an empty line before the request is skipped.
            while self.buffer.starts_with(b"\r\n") {
                self.buffer.advance(2);
                seen = 0;
            }
            let tail = self.buffer.get(seen..).unwrap_or_default();
            if let Some(at) = find(tail, b"\r\n\r\n") {
                self.last_head = take(&mut self.buffer, seen + at + 4);
                return read_head(self.last_head.clone());
            }
            seen = self.buffer.len().saturating_sub(3);
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(ReadError::Bad(431, "head too large"));
            }
            if !self.fill(stream).await? {
                return Err(ReadError::Gone);
            }
        }
    }

    /// Reads the body. If the client leaves before its end, or its chunks are
    /// none, `partial` holds what had come.
    pub(crate) async fn body(
        &mut self,
        stream: &TcpStream,
        framing: Framing,
        partial: &mut Body,
    ) -> Result<Body, ReadError> {
        match framing {
            Framing::Length(length) => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                while self.buffer.len() < length {
                    let more = self.fill(stream).await;
                    if !matches!(more, Ok(true)) {
                        partial.content = take_all(&mut self.buffer);
                        partial.wire = partial.content.clone();
                        return Err(ReadError::Gone);
                    }
                }
                let content = take(&mut self.buffer, length);
                Ok(Body {
                    wire: content.clone(),
                    content,
                })
            }
            Framing::Chunked => self.chunks(stream, partial).await,
        }
    }

    async fn chunks(&mut self, stream: &TcpStream, partial: &mut Body) -> Result<Body, ReadError> {
        let mut content = BytesMut::new();
        let mut at = 0; // how much of the buffer is decoded
        loop {
            let step = match chunk(self.buffer.get(at..).unwrap_or_default()) {
                Ok(step) => step,
                Err(why) => {
                    partial.wire = take_all(&mut self.buffer);
                    partial.content = content.freeze();
                    return Err(ReadError::Bad(400, why));
                }
            };
            match step {
                Chunk::Data { framed, data } => {
                    let end = at + framed;
                    content.extend_from_slice(
                        self.buffer
                            .get(data.0 + at..data.1 + at)
                            .unwrap_or_default(),
                    );
                    at = end;
                    if content.len() as u64 > BODY_BYTES_MAX {
                        return Err(ReadError::Bad(413, "body too large"));
                    }
                }
                Chunk::End { framed } => {
                    let wire = take(&mut self.buffer, at + framed);
                    return Ok(Body {
                        wire,
                        content: content.freeze(),
                    });
                }
                Chunk::Incomplete => {
                    if !matches!(self.fill(stream).await, Ok(true)) {
                        partial.wire = take_all(&mut self.buffer);
                        partial.content = content.freeze();
                        return Err(ReadError::Gone);
                    }
                }
            }
        }
    }

    /// Ends when the client closes the connection, whether or not it has sent
    /// more. What it sends meanwhile is kept, up to a bound, after which only
    /// a failing write tells that it left.
    pub(crate) async fn client_left(&mut self, stream: &TcpStream) {
        while self.buffer.len() < AHEAD_BYTES_MAX {
            if !matches!(self.fill(stream).await, Ok(true)) {
                return;
            }
        }
        std::future::pending().await
    }

    /// Reads and forgets until the client closes the connection.
    pub(crate) async fn drain(&mut self, stream: &TcpStream) {
        loop {
            self.buffer.clear();
            if !matches!(self.fill(stream).await, Ok(true)) {
                return;
            }
        }
    }
}

/// What stands at the head of a chunked body; positions count from there.
enum Chunk {
    Data { framed: usize, data: (usize, usize) },
    End { framed: usize },
    Incomplete,
}

fn chunk(bytes: &[u8]) -> Result<Chunk, &'static str> {
    let Some(line_end) = find(bytes, b"\r\n") else {
        return if bytes.len() > 4096 {
            Err("chunk line too long")
        } else {
            Ok(Chunk::Incomplete)
        };
    };
    let line = bytes.get(..line_end).unwrap_or_default();
    let digits = line.split(|&b| b == b';').next().unwrap_or_default();
    let size = std::str::from_utf8(digits)
        .ok()
        .filter(|d| d.len() <= 8 && !d.is_empty() && d.bytes().all(|b| b.is_ascii_hexdigit()))
        .and_then(|d| usize::from_str_radix(d, 16).ok())
        .ok_or("bad chunk size")?;
    let start = line_end + 2;
    if size == 0 {
        // The trailers end with an empty line; there may be none.
        let rest = bytes.get(start..).unwrap_or_default();
        if rest.starts_with(b"\r\n") {
            return Ok(Chunk::End { framed: start + 2 });
        }
        return Ok(match find(rest, b"\r\n\r\n") {
            Some(at) => Chunk::End {
                framed: start + at + 4,
            },
            None if rest.len() > HEAD_BYTES_MAX => return Err("trailers too large"),
            None => Chunk::Incomplete,
        });
    }
    let end = start + size;
    match bytes.get(end..end + 2) {
        Some(b"\r\n") => Ok(Chunk::Data {
            framed: end + 2,
            data: (start, end),
        }),
        Some(_) => Err("no line end after a chunk"),
        None => Ok(Chunk::Incomplete),
    }
}

fn take(buffer: &mut BytesMut, length: usize) -> Bytes {
    let bytes = buffer.split_to(length.min(buffer.len()));
    if bytes.len() <= COPY_BYTES_MAX {
        Bytes::copy_from_slice(&bytes)
    } else {
        bytes.freeze()
    }
}

fn take_all(buffer: &mut BytesMut) -> Bytes {
    let length = buffer.len();
    take(buffer, length)
}

/// Returns where `needle` first stands in `bytes`.
pub(crate) fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes
        .windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Head, ReadError> {
        read_head(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn a_head_tells_framing_expectation_and_fault() {
        let head = head("POST /v1/x?y=1 HTTP/1.1\r\nContent-Length: 12\r\nExpect: 100-continue\r\nX-Sim: hang\r\n\r\n").unwrap();
        assert_eq!((head.method(), head.path()), ("POST", "/v1/x"));
        assert_eq!(head.framing, Framing::Length(12));
        assert!(head.expects_continue && head.keep_alive);
        assert_eq!(head.fault.as_deref(), Some("hang"));
    }

    #[test]
    fn what_two_readers_could_frame_differently_is_refused() {
        for fields in [
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            "Content-Length: 1\r\nContent-Length: 2",
            "Content-Length: +1",
            "Content-Length:",
            "Transfer-Encoding: identity, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        ] {
            let text = format!("POST / HTTP/1.1\r\n{fields}\r\n\r\n");
            assert!(
                matches!(head(&text), Err(ReadError::Bad(400, _))),
                "{fields}"
            );
        }
        assert!(matches!(
            head("GARBAGE\r\n\r\n"),
            Err(ReadError::Bad(400, _))
        ));
    }

    #[test]
    fn a_chunk_is_read_only_when_it_is_all_there() {
        let whole = b"5;ext=1\r\nhello\r\n";
        for cut in 0..whole.len() {
            assert!(
                matches!(chunk(&whole[..cut]), Ok(Chunk::Incomplete)),
                "{cut}"
            );
        }
        let Ok(Chunk::Data { framed, data }) = chunk(whole) else {
            panic!("a chunk");
        };
        assert_eq!(
            (framed, &whole[data.0..data.1]),
            (whole.len(), &b"hello"[..])
        );
        assert!(matches!(chunk(b"0\r\n\r\n"), Ok(Chunk::End { framed: 5 })));
        assert!(matches!(
            chunk(b"0\r\nA: b\r\n\r\nnext"),
            Ok(Chunk::End { framed: 11 })
        ));
        assert!(chunk(b"0x5\r\nhello\r\n").is_err());
        assert!(chunk(b"5\r\nhelloXX").is_err());
    }
}
