//! One connection to one upstream, for one attempt: the request goes out, the
//! answer comes in.
//!
//! Pingora's transport connector gives and takes back the stream (pool, TLS,
//! connect timeouts); its HTTP/1 session reads the answer. Only the request is
//! written here, for two reasons: head and body leave in one vectored write
//! (Pingora's session sends and flushes the head alone: one packet and one
//! wake-up of the upstream more), and an upstream that answers before it has
//! read a long body is heard while the body is still on its way.

use std::{
    future::{Future, poll_fn},
    io::{
        self,
        ErrorKind::{BrokenPipe, ConnectionReset, TimedOut},
        IoSlice,
    },
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{StatusCode, header};
use pingora::{
    ErrorType,
    connectors::TransportConnector,
    http::ResponseHeader,
    protocols::{Stream, http::v1::client::HttpSession},
    upstreams::peer::{HttpPeer, Peer},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep, timeout},
};

use super::io::Prefixed;
use crate::upstreams::{TlsFault, Upstream, sockets};

/// How long closing in good order may take: it waits until what is buffered has
/// gone out, which it never does to an upstream that does not read.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(100);

/// A request as it goes on the wire: head and body. Cheap to clone; the same
/// for every connection that an attempt may need.
#[derive(Clone)]
pub(super) struct WireRequest {
    /// Request line and header fields, with the empty line.
    pub(super) head: Bytes,
    /// The body, of exactly the length that the head says.
    pub(super) body: Bytes,
}

/// Builds the head of a request to an upstream: its own fields, then `fields`,
/// then those that the configuration adds.
///
/// **Invariant:** nothing of a client's header is copied: not its credential,
/// not who it is.
pub(super) fn request_head(
    upstream: &Upstream,
    method: &str,
    suffix: &str,
    fields: &[(&str, &[u8])],
) -> Bytes {
    const USER_AGENT: &str = concat!("forebay/", env!("CARGO_PKG_VERSION"));
    let mut head = BytesMut::with_capacity(512);
    let mut line = |start: &str, between: &[u8], end: &[u8]| {
        head.put_slice(start.as_bytes());
        head.put_slice(between);
        head.put_slice(end);
        head.put_slice(b"\r\n");
    };
    let target = upstream.base.target(suffix);
    line(method, b" ", format!("{target} HTTP/1.1").as_bytes());
    line("host", b": ", upstream.host.as_bytes());
    line("user-agent", b": ", USER_AGENT.as_bytes());
    // An encoded answer could not be looked into.
    line("accept-encoding", b": ", b"identity");
    for (name, value) in fields {
        line(name, b": ", value);
    }
    if let Some(authorization) = &upstream.authorization {
        line("authorization", b": ", authorization.as_bytes());
    }
    for (name, value) in &upstream.headers {
        line(name.as_str(), b": ", value.as_bytes());
    }
    head.put_slice(b"\r\n");
    head.freeze()
}

/// Why no answer's header came.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// No connection: the request was certainly not sent.
    #[error("connect: {0}")]
    Connect(Box<pingora::Error>),
    /// No TLS: the request was certainly not done. Only the log is told more.
    #[error("tls: {0}: {1}")]
    Tls(TlsFault, Box<pingora::Error>),
    /// No connection, for want of a socket on this machine.
    #[error("no socket left: {0}")]
    NoSocket(Box<pingora::Error>),
    /// The connection broke before the first byte of an answer.
    #[error("broken before the answer: {0}")]
    Broken(String),
    /// The upstream took no more of the request for too long.
    #[error("stalled while the request was sent")]
    Stalled,
    /// What came was not HTTP. Holds no word of it: Pingora's own text has the
    /// bytes that could not be read.
    #[error("not a valid answer: {0}")]
    Invalid(&'static str),
}

/// An open connection whose request has been sent and whose answer has begun.
pub(super) struct Link {
    session: HttpSession,
    reusable: bool,
}

/// Returns a pooled connection, or makes one; with whether it was pooled.
pub(super) async fn connect(
    connector: &TransportConnector,
    peer: &HttpPeer,
) -> Result<(Stream, bool), LinkError> {
    if let Some(stream) = connector.reused_stream(peer).await {
        return Ok((stream, true));
    }
    connect_anew(connector, peer)
        .await
        .map(|stream| (stream, false))
}

/// Makes a connection, never a pooled one.
pub(super) async fn connect_anew(
    connector: &TransportConnector,
    peer: &HttpPeer,
) -> Result<Stream, LinkError> {
    // Boxed: it is 18 KB, and most attempts find a pooled connection.
    Box::pin(connector.new_stream(peer))
        .await
        .map_err(|why| match TlsFault::of(&why) {
            _ if sockets::is_ours(&why) => LinkError::NoSocket(why),
            Some(fault) => LinkError::Tls(fault, why),
            None => LinkError::Connect(why),
        })
}

/// A connection on which the request has been sent, all of it or as much as the
/// upstream wanted.
pub(super) struct Sent {
    stream: Stream,
    reusable: bool,
}

/// Sends the request, listening for an early answer whenever the upstream takes
/// no more.
///
/// # Errors
/// [`LinkError::Broken`] on a pooled connection means that the upstream had
/// given it up: the request may be sent again on a fresh one.
pub(super) async fn send(
    mut stream: Stream,
    request: WireRequest,
    stall: Duration,
) -> Result<Sent, LinkError> {
    match write(&mut stream, request, stall).await {
        Ok(Written::Whole) => Ok(Sent {
            stream,
            reusable: true,
        }),
        Ok(Written::AnsweredEarly(first)) => Ok(Sent {
            stream: Box::new(Prefixed::new(first, stream)),
            reusable: false,
        }),
        // The upstream may have answered and closed: its answer, if there is
        // one, is in the receive buffer still.
        Err(why) if matches!(why.kind(), BrokenPipe | ConnectionReset) => Ok(Sent {
            stream,
            reusable: false,
        }),
        Err(why) if why.kind() == TimedOut => Err(LinkError::Stalled),
        Err(why) => Err(LinkError::Broken(format!("while sending: {why}"))),
    }
}

impl Link {
    /// Reads until the header of the answer is in. Informational answers (1xx)
    /// are passed over. The deadline is the caller's: dropping the future
    /// closes the connection.
    ///
    /// # Errors
    /// [`LinkError::Broken`] as in [`send`]; [`LinkError::Invalid`] if what came
    /// was not HTTP.
    pub(super) async fn receive(sent: Sent, peer: &HttpPeer) -> Result<Self, LinkError> {
        let mut session = HttpSession::new_with_options(sent.stream, peer);
        loop {
            if let Err(why) = session.read_response().await {
                if let Some(fault) = TlsFault::of_silence(&why) {
                    return Err(LinkError::Tls(fault, why));
                }
                return Err(match why.etype {
                    ErrorType::ConnectionClosed
                    | ErrorType::ReadError
                    | ErrorType::ReadTimedout => LinkError::Broken(why.etype().as_str().to_owned()),
                    _ => LinkError::Invalid("no HTTP header"),
                });
            }
            match session.get_status() {
                Some(StatusCode::SWITCHING_PROTOCOLS) | None => {
                    let why = "an upgrade that nobody asked for";
                    return Err(LinkError::Invalid(why));
                }
                Some(status) if status.is_informational() => {}
                Some(_) => break,
            }
        }
        let reusable = sent.reusable && one_framing(&session);
        Ok(Self { session, reusable })
    }

    /// Returns the header of the answer.
    pub(super) fn head(&self) -> &ResponseHeader {
        self.session
            .resp_header()
            .expect("receive() returns with a header")
    }

    /// Reads the next piece of the body; `None` at its end. May be dropped and
    /// called again: nothing is lost.
    ///
    /// # Errors
    /// The connection broke, or the framing was wrong: the body is incomplete.
    pub(super) async fn read(&mut self) -> pingora::Result<Option<Bytes>> {
        self.session.read_body_bytes().await
    }

    /// Returns whether the body was read to its end.
    pub(super) fn is_done(&mut self) -> bool {
        self.session.is_body_done()
    }

    /// Gives the connection back to the pool if its answer was read to the end
    /// and it may be used again; closes it otherwise.
    pub(super) async fn release(mut self, connector: &TransportConnector, peer: &HttpPeer) {
        if !self.reusable {
            return self.close().await;
        }
        self.session.respect_keepalive();
        // It closes what cannot be used again.
        if let Ok(Some(stream)) = timeout(CLOSE_TIMEOUT, self.session.reuse()).await {
            connector.release_stream(stream, peer.reuse_hash(), peer.idle_timeout());
        }
    }

    /// Closes the connection at once: the upstream stops working.
    pub(super) async fn close(mut self) {
        // Late is no error: dropping the session closes the connection too.
        timeout(CLOSE_TIMEOUT, self.session.shutdown()).await.ok();
    }
}

/// Returns whether the header says once how long the body is. Where it says it
/// twice, whoever is on the way may disagree on where the next answer begins
/// (RFC 9112 §6.3). Of two ways Pingora takes one out of the parsed header.
fn one_framing(session: &HttpSession) -> bool {
    let Some(head) = session.resp_header() else {
        return false;
    };
    let mut codings = head.headers.get_all(header::TRANSFER_ENCODING).iter();
    if codings.next().is_none() {
        return true;
    }
    let length = b"\ncontent-length";
    let raw = session.get_headers_raw_bytes();
    codings.next().is_none()
        && !raw
            .windows(length.len())
            .any(|window| window.eq_ignore_ascii_case(length))
}

/// How much of a request was written before something came back.
enum Written {
    /// All of it.
    Whole,
    /// Not all: the upstream answered while it was on its way. The first bytes
    /// of that answer.
    AnsweredEarly(Bytes),
}

async fn write(stream: &mut Stream, request: WireRequest, stall: Duration) -> io::Result<Written> {
    let WireRequest { mut head, mut body } = request;
    // Armed only when the upstream takes no more, so that an ordinary request
    // costs no timer.
    let mut stalled: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        while !head.is_empty() || !body.is_empty() {
            let slices = [IoSlice::new(&head), IoSlice::new(&body)];
            match Pin::new(&mut *stream).poll_write_vectored(cx, &slices) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => {
                    let of_head = written.min(head.len());
                    head.advance(of_head);
                    body.advance(written - of_head);
                    stalled = None;
                }
                Poll::Ready(Err(why)) => return Poll::Ready(Err(why)),
                Poll::Pending => return poll_stalled(stream, cx, &mut stalled, stall),
            }
        }
        // The last small piece may be in Pingora's buffer still.
        match Pin::new(&mut *stream).poll_flush(cx) {
            Poll::Ready(flushed) => Poll::Ready(flushed.map(|()| Written::Whole)),
            Poll::Pending => poll_stalled(stream, cx, &mut stalled, stall),
        }
    })
    .await
}

/// Listens while the upstream takes no more, for as long as it may.
fn poll_stalled(
    stream: &mut Stream,
    cx: &mut Context<'_>,
    stalled: &mut Option<Pin<Box<Sleep>>>,
    stall: Duration,
) -> Poll<io::Result<Written>> {
    if let Poll::Ready(answered) = poll_early_answer(stream, cx) {
        return Poll::Ready(answered);
    }
    let clock = stalled.get_or_insert_with(|| Box::pin(sleep(stall)));
    clock
        .as_mut()
        .poll(cx)
        .map(|()| Err(io::ErrorKind::TimedOut.into()))
}

fn poll_early_answer(stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<Written>> {
    let mut first = [0; 1024];
    let mut buffer = ReadBuf::new(&mut first);
    ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
    if buffer.filled().is_empty() {
        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
    }
    let first = Bytes::copy_from_slice(buffer.filled());
    Poll::Ready(Ok(Written::AnsweredEarly(first)))
}
