//! Two thin wrappers of a Pingora stream: [`Prefixed`], of which some bytes have
//! been read already, and [`Guarded`], which bounds a request's header in time.

use std::{
    any::Any,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use bytes::{Buf, Bytes, BytesMut};
use pingora::{
    protocols::ALPN,
    protocols::{
        GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
        Stream, TimingDigest, UniqueID, UniqueIDType, raw_connect::ProxyDigest, tls::SslDigest,
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, timeout},
};

/// How long a new connection may say nothing. Pingora gives its own first read
/// as much, but none to the peek that comes before it.
const FIRST_BYTES: Duration = Duration::from_secs(60);

/// Everything of Pingora's `IO` but reading and peeking is the wrapped stream's.
macro_rules! forward_to_stream {
    ($type:ty) => {
        impl AsyncWrite for $type {
            fn poll_write(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                self.check_uncut()?;
                Pin::new(&mut self.stream).poll_write(cx, bytes)
            }

            fn poll_write_vectored(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                slices: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                self.check_uncut()?;
                Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
            }

            fn is_write_vectored(&self) -> bool {
                self.stream.is_write_vectored()
            }

            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.check_uncut()?;
                Pin::new(&mut self.stream).poll_flush(cx)
            }

            fn poll_shutdown(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<io::Result<()>> {
                self.check_uncut()?;
                Pin::new(&mut self.stream).poll_shutdown(cx)
            }
        }

        #[async_trait]
        impl Shutdown for $type {
            async fn shutdown(&mut self) {
                if self.check_uncut().is_ok() {
                    self.stream.shutdown().await;
                }
            }
        }

        impl UniqueID for $type {
            fn id(&self) -> UniqueIDType {
                self.stream.id()
            }
        }

        impl Ssl for $type {
            fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
                self.stream.get_ssl_digest()
            }

            fn selected_alpn_proto(&self) -> Option<ALPN> {
                self.stream.selected_alpn_proto()
            }
        }

        impl GetTimingDigest for $type {
            fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
                self.stream.get_timing_digest()
            }
        }

        impl GetProxyDigest for $type {
            fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
                self.stream.get_proxy_digest()
            }
        }

        impl GetSocketDigest for $type {
            fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
                self.stream.get_socket_digest()
            }
        }
    };
}

/// A stream that first gives back the bytes that were read from it.
#[derive(Debug)]
pub(super) struct Prefixed {
    first: Bytes,
    stream: Stream,
}

impl Prefixed {
    /// Puts `first` before what `stream` still has.
    pub(super) fn new(first: Bytes, stream: Stream) -> Self {
        Self { first, stream }
    }

    /// Only a [`Guarded`] can be cut.
    const fn check_uncut(&self) -> io::Result<()> {
        Ok(())
    }
}

forward_to_stream!(Prefixed);

#[async_trait]
impl Peek for Prefixed {}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        give_back(&mut self.first, buffer);
        Poll::Ready(Ok(()))
    }
}

/// What a connection's bytes are part of; set by the hooks of the proxy, looked
/// at by [`Guarded`] when it reads.
#[derive(Debug, Default)]
struct Phase(AtomicU8);

impl Phase {
    /// A header that may have begun.
    const HEADER: u8 = 0;
    /// What follows a header.
    const BODY: u8 = 1;
    /// A header of which nothing has been read.
    const NEXT: u8 = 2;

    fn set(&self, phase: u8) {
        self.0.store(phase, Ordering::Relaxed);
    }

    fn get(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A client's stream that fails when a header takes too long, however slowly
/// and steadily its bytes drip in.
///
/// The clock starts with the first byte of a request, not with the connection:
/// an idle kept-alive connection is Pingora's business. It stops at
/// [`header_is_in`](Self::header_is_in) and is armed again by
/// [`request_is_over`](Self::request_is_over).
#[derive(Debug)]
pub(super) struct Guarded {
    first: BytesMut,
    stream: Stream,
    phase: Phase,
    cut: AtomicBool,
    allowed: Duration,
    clock: Option<Pin<Box<Sleep>>>,
}

impl Guarded {
    /// Guards a new connection.
    pub(super) fn new(stream: Stream, allowed: Duration) -> Self {
        Self {
            first: BytesMut::new(),
            stream,
            phase: Phase::default(),
            cut: AtomicBool::new(false),
            allowed,
            clock: None,
        }
    }

    /// Stops the clock: what comes now is a body.
    pub(super) fn header_is_in(&self) {
        self.phase.set(Phase::BODY);
    }

    /// Arms the clock: what comes now is the next header.
    pub(super) fn request_is_over(&self) {
        self.phase.set(Phase::NEXT);
    }

    /// Lets every further write, flush and shutdown fail at once. Each of them
    /// first waits until what is buffered has gone out, which it never does to a
    /// client that does not read.
    pub(super) fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    fn check_uncut(&self) -> io::Result<()> {
        if self.cut.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }

    /// Passes on what the stream reads, and an error once the time is up.
    fn poll_in_time(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.phase.get() {
            Phase::BODY => {
                self.clock = None;
                return Pin::new(&mut self.stream).poll_read(cx, buffer);
            }
            // A request without a body ends with its own header's clock armed.
            Phase::NEXT => {
                self.clock = None;
                self.phase.set(Phase::HEADER);
            }
            _ => {}
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if self.clock.is_none() && buffer.filled().len() > before {
            let until = Instant::now() + self.allowed;
            self.clock = Some(Box::pin(tokio::time::sleep_until(until)));
        }
        match self.clock.as_mut().map(|clock| clock.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            _ => read,
        }
    }
}

forward_to_stream!(Guarded);

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return self.poll_in_time(cx, buffer);
        }
        give_back(&mut self.first, buffer);
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl Peek for Guarded {
    /// Reads until the bytes differ from HTTP/2's preface or are all of it, and
    /// puts them back.
    ///
    /// Pingora's own peek waits for 24 bytes, which `GET / HTTP/1.0` with its
    /// empty line never sends.
    async fn try_peek(&mut self, wanted: &mut [u8]) -> io::Result<bool> {
        const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let mut seen = BytesMut::with_capacity(wanted.len());
        while seen.len() < wanted.len() && PREFACE.starts_with(&seen) {
            let room = wanted.len() - seen.len();
            let mut piece = vec![0; room];
            let read = timeout(FIRST_BYTES, self.read(&mut piece)).await??;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            piece.truncate(read);
            seen.extend_from_slice(&piece);
        }
        wanted.fill(0);
        for (to, from) in wanted.iter_mut().zip(seen.iter()) {
            *to = *from;
        }
        // From here on its frames are the bytes, and the hooks cannot tell us
        // when a header is in.
        if seen == PREFACE {
            self.header_is_in();
        }
        self.first = seen;
        Ok(true)
    }
}

fn give_back(first: &mut impl Buf, buffer: &mut ReadBuf<'_>) {
    let fitting = first.remaining().min(buffer.remaining());
    let bytes = first.copy_to_bytes(fitting);
    buffer.put_slice(&bytes);
}

/// Returns the guarded stream behind a session's stream, if it is one: under
/// HTTP/2 it is out of reach, and the header's time is bounded by the peek.
pub(super) fn guarded(stream: &Stream) -> Option<&Guarded> {
    let any: &dyn Any = stream.as_any();
    any.downcast_ref()
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_stream_that_was_cut_waits_for_no_reader() {
        let (near, _nobody_reads) = tokio::io::duplex(4);
        let mut stream = Guarded::new(Box::new(near), Duration::from_secs(10));
        stream.write_all(b"full").await.unwrap();
        stream.cut();
        let more = timeout(Duration::from_secs(5), stream.write_all(b"x")).await;
        more.unwrap().unwrap_err();
        stream.flush().await.unwrap_err();
        AsyncWriteExt::shutdown(&mut stream).await.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_sends_a_byte_is_given_up() {
        let (near, _far_says_nothing) = tokio::io::duplex(64);
        let mut stream = Guarded::new(Box::new(near), Duration::from_secs(10));
        let mut first = [0; 24];
        let peek = stream.try_peek(&mut first);
        let peeked = timeout(FIRST_BYTES * 10, peek).await;
        assert_eq!(peeked.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
