//! Writing answers, well or badly: the half of the fault knobs that begins with
//! the first byte of an answer.
//!
//! Start at [`send`]. Bytes are collected in [`Out`] and written together, so
//! that a plain answer is one write; each knob that is about timing or pieces
//! flushes where it must.
//!
//! **Invariant:** without a fault, what is written is correct HTTP/1.1 and a
//! correct event stream.

use std::{
    fmt::Write as _,
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{net::TcpStream, time::sleep};

use super::{
    api::{Content, Reply},
    faults::{Fault, How, Junk, LengthLie, Stale},
    gzip::Gzip,
    stream::{collect, events},
};

/// What a lying `Content-Length` promises beyond the truth, in bytes.
const LIE_BYTES: usize = 100;
/// What `te_cl` claims for a body whose length is not known.
const CLAIMED_BYTES: usize = 42;
/// A character of three bytes to die in.
pub(crate) const SNOWMAN: &str = "\u{2603}";

/// What becomes of the connection after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// It waits for the next request.
    Keep,
    /// It is closed.
    Close,
    /// It is reset when the next request arrives.
    ResetOnNext,
}

/// Why an answer did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The client is gone.
    Gone,
    /// A fault ends the connection, orderly.
    Fin,
    /// A fault resets the connection.
    Reset,
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Self {
        // Whatever broke the connection, there is nobody left to tell.
        Self::Gone
    }
}

impl Stop {
    pub(crate) fn by(how: How) -> Self {
        if how.rst { Self::Reset } else { Self::Fin }
    }
}

/// How fast an answer comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Before the first token.
    pub(crate) first_token: Duration,
    /// Between tokens; absent means none.
    pub(crate) per_token: Option<Duration>,
}

/// What an answer depends on besides the reply.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner<'a> {
    pub(crate) fault: &'a Fault,
    pub(crate) pace: Pace,
    /// Whether the client lets the connection live.
    pub(crate) keep_alive: bool,
    /// Whether the body is withheld (HEAD).
    pub(crate) head_only: bool,
}

/// Bytes on their way out.
pub(crate) struct Out<'a> {
    stream: &'a TcpStream,
    pending: Vec<u8>,
    sent: &'a AtomicU64,
}

impl<'a> Out<'a> {
    /// `sent` — counts what was written.
    pub(crate) fn new(stream: &'a TcpStream, sent: &'a AtomicU64) -> Self {
        Self {
            stream,
            pending: Vec::new(),
            sent,
        }
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        let mut rest = self.pending.as_slice();
        while !rest.is_empty() {
            match self.stream.try_write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.sent.fetch_add(n as u64, Ordering::Relaxed);
                    rest = rest.get(n..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stream.writable().await?;
                }
                Err(error) => return Err(error),
            }
        }
        self.pending.clear();
        Ok(())
    }
}

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length,
    Chunked,
    Close,
}

/// The body of an answer, framed as its head says.
pub(crate) struct Body<'a, 'b> {
    pub(crate) out: &'b mut Out<'a>,
    pub(crate) fault: &'b Fault,
    pub(crate) framing: Framing,
    pub(crate) gzip: Option<Gzip>,
}

impl Body<'_, '_> {
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.gzip {
            Some(gzip) => {
                let packed = gzip.push(bytes);
                self.write_pieces(&packed).await
            }
            None => self.write_pieces(bytes).await,
        }
    }

    async fn write_pieces(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(size) = self.fault.split else {
            self.frame(bytes);
            return Ok(());
        };
        self.out.flush().await?;
        for piece in bytes.chunks(size) {
            self.frame(piece);
            self.out.flush().await?;
            // Gives the reader a chance to see this piece alone.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    fn frame(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return; // an empty chunk would end the body
        }
        if self.framing == Framing::Chunked {
            self.out.put(format!("{:x}\r\n", bytes.len()).as_bytes());
        }
        self.out.put(bytes);
        if self.framing == Framing::Chunked {
            self.out.put(b"\r\n");
        }
    }

    /// Writes `bytes` as the beginning of a chunk that promised more.
    pub(crate) async fn write_torn(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.framing == Framing::Chunked {
            let promised = bytes.len() + LIE_BYTES;
            self.out.put(format!("{promised:x}\r\n").as_bytes());
        }
        self.out.put(bytes);
        self.out.flush().await
    }

    pub(crate) async fn end(&mut self) -> io::Result<()> {
        if let Some(gzip) = &mut self.gzip {
            let tail = gzip.end();
            self.write_pieces(&tail).await?;
        }
        if self.framing == Framing::Chunked {
            self.out.put(b"0\r\n");
            if self.fault.trailers {
                self.out.put(b"x-sim-trailer: 1\r\ncontent-length: 5\r\n");
            }
            self.out.put(b"\r\n");
        }
        self.out.flush().await
    }
}

/// Sends an answer.
///
/// # Errors
/// [`Stop`] says who ended it early.
pub(crate) async fn send(
    out: &mut Out<'_>,
    reply: Reply,
    manner: Manner<'_>,
) -> Result<Then, Stop> {
    let fault = manner.fault;
    if let Some(status) = fault.informational {
        let line = format!(
            "HTTP/1.1 {status} {}\r\nlink: </style.css>; rel=preload\r\n\r\n",
            reason(status)
        );
        out.put(line.as_bytes());
        out.flush().await?;
    }
    if let Some(delay) = fault.header_delay {
        sleep(delay).await;
    }
    let then = match (fault.stale, manner.keep_alive) {
        (Some(Stale::Now), _) | (_, false) => Then::Close,
        _ if fault.close || fault.http10 || fault.content_length == Some(LengthLie::Long) => {
            Then::Close
        }
        (Some(Stale::Next), _) => Then::ResetOnNext,
        (None, _) => Then::Keep,
    };
    let head = HeadParts {
        status: reply.status,
        content_type: reply.content_type,
        extra: &reply.extra,
    };
    match reply.content {
        Content::Whole(body) => whole(out, &head, &body, manner).await?,
        Content::Thought(body, tokens) => {
            think(manner, tokens).await;
            whole(out, &head, &body, manner).await?;
        }
        Content::Events(answer) if fault.content_length.is_some() => {
            let mut body = Vec::new();
            collect(&answer, fault, &mut body);
            whole(out, &head, &body, manner).await?;
        }
        Content::Events(answer) => events(out, &head, &answer, manner).await?,
    }
    Ok(then)
}

/// Waits as long as an answer of so many tokens takes.
async fn think(manner: Manner<'_>, tokens: usize) {
    let gaps = u32::try_from(tokens.saturating_sub(1)).unwrap_or(u32::MAX);
    let per_token = manner.pace.per_token.unwrap_or_default();
    let time = manner.pace.first_token + per_token.saturating_mul(gaps);
    if !time.is_zero() {
        sleep(time).await;
    }
}

pub(crate) struct HeadParts<'a> {
    status: u16,
    content_type: &'a str,
    extra: &'a str,
}

/// Sends the head. `length` — the body's, if it is known.
pub(crate) async fn head(
    out: &mut Out<'_>,
    parts: &HeadParts<'_>,
    framing: Framing,
    length: Option<usize>,
    manner: Manner<'_>,
) -> io::Result<()> {
    let fault = manner.fault;
    let version = if fault.http10 { "HTTP/1.0" } else { "HTTP/1.1" };
    let mut text = String::with_capacity(256);
    let status = parts.status;
    put_line(
        &mut text,
        format_args!("{version} {status} {}", reason(status)),
    );
    put_line(&mut text, format_args!("server: forebay-sim"));
    put_line(
        &mut text,
        format_args!("content-type: {}", parts.content_type),
    );
    if framing == Framing::Chunked {
        put_line(&mut text, format_args!("transfer-encoding: chunked"));
        if fault.duplicate_te {
            put_line(&mut text, format_args!("transfer-encoding: chunked"));
        }
        if fault.te_cl {
            let claimed = length.unwrap_or(CLAIMED_BYTES);
            put_line(&mut text, format_args!("content-length: {claimed}"));
        }
        if fault.trailers {
            put_line(&mut text, format_args!("trailer: x-sim-trailer"));
        }
    }
    if let (Framing::Length, Some(length)) = (framing, length) {
        let claimed = match fault.content_length {
            None => length,
            Some(LengthLie::Short) => length / 2,
            Some(LengthLie::Long) => length + LIE_BYTES,
        };
        put_line(&mut text, format_args!("content-length: {claimed}"));
    }
    if fault.gzip {
        put_line(&mut text, format_args!("content-encoding: gzip"));
    }
    if fault.close || fault.http10 || !manner.keep_alive {
        put_line(&mut text, format_args!("connection: close"));
    }
    text.push_str(parts.extra);
    for number in 0..fault.many_headers.unwrap_or(0) {
        put_line(&mut text, format_args!("x-many-{number}: {number}"));
    }
    if let Some(size) = fault.big_header {
        put_line(&mut text, format_args!("x-big: {}", "b".repeat(size)));
    }
    let mut bytes = text.into_bytes();
    match fault.junk_headers {
        None => {}
        Some(Junk::Legal) => bytes.extend_from_slice(LEGAL_JUNK),
        Some(Junk::Malformed) => bytes.extend_from_slice(MALFORMED_JUNK),
    }
    bytes.extend_from_slice(b"\r\n");
    let Some(pause) = fault.slow_headers else {
        out.put(&bytes);
        return Ok(());
    };
    for byte in bytes {
        out.put(&[byte]);
        out.flush().await?;
        sleep(pause).await;
    }
    Ok(())
}

fn put_line(text: &mut String, line: std::fmt::Arguments<'_>) {
    write!(text, "{line}\r\n").expect("a string takes all that is written");
}

const LEGAL_JUNK: &[u8] = b"set-cookie: session=sim; Path=/\r\n\
openai-organization: sim-org\r\n\
x-vllm-worker: 10.9.8.7\r\n\
via: 1.1 inner-proxy\r\n\
x-accel-redirect: /private\r\n\
connection: x-nominated\r\n\
x-nominated: 1\r\n";

const MALFORMED_JUNK: &[u8] = b"x-space : 1\r\n\
x-folded: 1\r\n  2\r\n\
no colon here\r\n\
x-high: \xff\xfe\r\n";

/// Sends a body that is known as a whole.
async fn whole(
    out: &mut Out<'_>,
    parts: &HeadParts<'_>,
    body: &[u8],
    manner: Manner<'_>,
) -> Result<(), Stop> {
    let fault = manner.fault;
    let packed = fault.gzip.then(|| {
        let mut gzip = Gzip::default();
        let mut packed = gzip.push(body);
        packed.extend(gzip.end());
        packed
    });
    let body = packed.as_deref().unwrap_or(body);
    let chunked =
        fault.te_cl || fault.duplicate_te || fault.trailers || fault.only_comments.is_some();
    let framing = if fault.http10 {
        Framing::Close
    } else if chunked {
        Framing::Chunked
    } else {
        Framing::Length
    };
    let empty = manner.head_only || matches!(parts.status, 204 | 304);
    let length = (!matches!(parts.status, 204 | 304)).then_some(body.len());
    head(out, parts, framing, length, manner).await?;
    if empty {
        out.flush().await?;
        return Ok(());
    }
    let mut sink = Body {
        out,
        fault,
        framing,
        gzip: None,
    };
    if let Some(pause) = fault.only_comments {
        return for_ever(&mut sink, b"\n", pause).await;
    }
    let how = fault.how.unwrap_or_default();
    let at = |n: Option<u64>| {
        n.map(|n| usize::try_from(n).unwrap_or(usize::MAX))
            .filter(|&n| n < body.len())
    };
    if let Some(n) = at(fault.die_at) {
        let mut part = body.get(..n).unwrap_or_default().to_vec();
        if how.mid_utf8 {
            part.extend(SNOWMAN.bytes().take(2));
        }
        if how.mid_chunk {
            sink.write_torn(&part).await?;
        } else {
            sink.write(&part).await?;
        }
        sink.out.flush().await?;
        return Err(Stop::by(how));
    }
    if let Some(n) = at(fault.stall_at) {
        sink.write(body.get(..n).unwrap_or_default()).await?;
        sink.out.flush().await?;
        return std::future::pending().await;
    }
    sink.write(body).await?;
    sink.end().await?;
    Ok(())
}

/// Writes the same again and again.
pub(crate) async fn for_ever(
    sink: &mut Body<'_, '_>,
    bytes: &[u8],
    pause: Duration,
) -> Result<(), Stop> {
    loop {
        sink.write(bytes).await?;
        sink.out.flush().await?;
        sleep(pause.max(Duration::from_millis(1))).await;
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        102 => "Processing",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        529 => "Site is overloaded",
        _ => "Unknown",
    }
}
