//! A client's stream under guard: a header that takes too long, a client that
//! takes nothing, HTTP/2 that only keeps us busy.
//!
//! Pingora bounds each read, not what the reads are for: a byte now and then
//! would hold a connection for ever. A guarded stream fails instead, and
//! Pingora then closes the connection as if the client had left.

use std::{
    any::Any,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
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
    time::{Instant, Sleep},
};

use super::{
    connections::{Admitted, Limit},
    frames::Watch,
    io::{forward_to_stream, give_back},
    places::{Awaits, Goes},
    turned_away::{self, LINGER, LINGER_MAX},
    unreadable::{self, Largest, Size},
};

/// What a connection's bytes are part of; set by the hooks of the proxy, looked
/// at when it reads.
#[derive(Debug, Default)]
struct Phase(AtomicU8);

impl Phase {
    /// A header that may have begun.
    const HEADER: u8 = 0;
    /// What follows a header.
    const BODY: u8 = 1;
    /// A header of which nothing has been read.
    const NEXT: u8 = 2;
    /// A header whose beginning came behind the request before.
    const PIPELINED: u8 = 3;

    fn set(&self, phase: u8) {
        self.0.store(phase, Ordering::Relaxed);
    }

    fn get(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long a client may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowed {
    /// Over a header, from its first byte to its last; over its first, from the
    /// beginning of the connection.
    pub(super) header: Duration,
    /// Until it takes anything of what it is sent.
    pub(super) write: Duration,
    /// The largest header.
    pub(super) largest: Largest,
}

/// A client's stream that fails when a header takes too long, however slowly
/// and steadily its bytes drip in, or when nothing of an answer is taken.
///
/// Under HTTP/1 the clock stops at [`header_is_in`](Self::header_is_in) and is
/// armed again by [`request_is_over`](Self::request_is_over): an idle kept-alive
/// connection is Pingora's business, and begins to count with the first byte of
/// its next request. Under HTTP/2 the frames tell where headers are.
#[derive(Debug)]
pub(super) struct Guarded {
    first: BytesMut,
    stream: Stream,
    phase: Phase,
    cut: AtomicBool,
    allowed: Allowed,
    /// Runs while the client owes us a header.
    clock: Option<Pin<Box<Sleep>>>,
    /// What the clock runs for, under HTTP/2.
    owed: u64,
    /// When the first of the header came.
    begun: Option<Instant>,
    /// How large the header is so far.
    size: Size,
    /// What was read since the last request was over, and what was left of it
    /// then.
    delivered: AtomicUsize,
    /// Runs while the client takes nothing.
    stall: Option<Pin<Box<Sleep>>>,
    /// What is left to send in place of Pingora's answer to what it could not
    /// read.
    instead: Option<Bytes>,
    /// Until when, and how much of, what such a client still sends is read.
    linger: Option<(Pin<Box<Sleep>>, usize)>,
    http2: Option<Box<Watch>>,
    admitted: Admitted,
}

impl Guarded {
    /// Guards a new connection.
    pub(super) fn new(stream: Stream, allowed: Allowed, admitted: Admitted) -> Self {
        Self {
            first: BytesMut::new(),
            stream,
            phase: Phase::default(),
            cut: AtomicBool::new(false),
            allowed,
            clock: Some(after(allowed.header)),
            owed: 0,
            begun: None,
            size: Size::default(),
            delivered: AtomicUsize::new(0),
            stall: None,
            instead: None,
            linger: None,
            http2: None,
            admitted,
        }
    }

    /// Stops the clock: what comes now is a body.
    pub(super) fn header_is_in(&self) {
        self.admitted.place().works();
        self.phase.set(Phase::BODY);
    }

    /// Arms the clock: what comes now is the next header. `used` is how many
    /// bytes the request was, header and body: what was read beyond them is the
    /// beginning of that header.
    pub(super) fn request_is_over(&self, used: usize) {
        let left = self.delivered.load(Ordering::Relaxed).saturating_sub(used);
        self.delivered.store(left, Ordering::Relaxed);
        let next = if left > 0 {
            Phase::PIPELINED
        } else {
            Phase::NEXT
        };
        self.phase.set(next);
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
        if self.http2.is_some() {
            return self.poll_frames(cx, buffer);
        }
        match self.phase.get() {
            Phase::BODY => {
                self.clock = None;
                return self.poll_counted(cx, buffer);
            }
            // A request without a body ends with its own header's clock armed.
            Phase::NEXT => self.begin_header(None),
            Phase::PIPELINED => self.begin_header(Some(Instant::now())),
            _ => {}
        }
        if self.is_too_late(cx) {
            self.tell(cx, &turned_away::header_timeout());
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buffer.filled().len();
        let read = self.poll_counted(cx, buffer);
        let new = buffer.filled().get(before..).unwrap_or_default();
        if !new.is_empty() {
            self.size.follow(new);
            let allowed = self.allowed.header;
            let begun = *self.begun.get_or_insert_with(Instant::now);
            self.clock.get_or_insert_with(|| after(allowed));
            let place = self.admitted.place();
            place.awaits(Awaits::Header, begun.into_std());
        } else if read.is_pending()
            && let Some(why) = self.admitted.place().poll_goes(cx)
        {
            if why == Goes::MakesRoom {
                let what = "connection closed to make room: no request under way";
                self.admitted.note(Limit::MakesRoom, what);
                self.tell(cx, &turned_away::too_many_connections());
            }
            // Nothing was read: that is the end of it.
            return Poll::Ready(Ok(()));
        }
        read
    }

    /// Waits for a header, of which something may have come already.
    fn begin_header(&mut self, begun: Option<Instant>) {
        self.clock = begun.map(|_| after(self.allowed.header));
        self.begun = begun;
        let (awaits, since) = match begun {
            Some(begun) => (Awaits::Header, begun),
            None => (Awaits::Request, Instant::now()),
        };
        self.admitted.place().awaits(awaits, since.into_std());
        self.size = Size::default();
        self.phase.set(Phase::HEADER);
    }

    fn poll_counted(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let new = buffer.filled().len() - before;
        self.delivered.fetch_add(new, Ordering::Relaxed);
        read
    }

    /// Sends an answer to who has begun a header.
    fn tell(&mut self, cx: &mut Context<'_>, answer: &[u8]) {
        if self.begun.is_none() {
            return;
        }
        // Best effort: who sends slowly may well not read either.
        let stream = Pin::new(&mut self.stream);
        if let Poll::Ready(Ok(_)) = stream.poll_write(cx, answer) {
            let _too_late_for_more = Pin::new(&mut self.stream).poll_flush(cx);
        }
    }

    /// The same under HTTP/2.
    fn poll_frames(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_too_late(cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let new = buffer.filled().get(before..).unwrap_or_default();
        if let Some(watch) = &mut self.http2
            && !new.is_empty()
        {
            if watch.read(new, std::time::Instant::now()).is_err() {
                let what = "http/2 connection closed: it keeps us busy for nothing";
                self.admitted.note(Limit::Http2Flood, what);
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            match watch.owes() {
                None => self.clock = None,
                Some(owed) if self.clock.is_none() || owed != self.owed => {
                    self.owed = owed;
                    self.clock = Some(after(self.allowed.header));
                }
                Some(_) => {}
            }
            watch.note(self.admitted.place());
        }
        if read.is_pending()
            && let Some(why) = self.admitted.place().poll_goes(cx)
        {
            if why == Goes::MakesRoom {
                let what = "http/2 connection closed to make room: no request under way";
                self.admitted.note(Limit::MakesRoom, what);
            }
            return Poll::Ready(Ok(()));
        }
        read
    }

    /// Returns whether the clock has run out. Whoever reads on after it was
    /// armed asks again before the next read, and is woken by it from then on.
    fn is_too_late(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(clock) = &mut self.clock else {
            return false;
        };
        if clock.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.clock = None;
        let what = "connection closed: no request header in time";
        self.admitted.note(Limit::HeaderTimeout, what);
        true
    }

    /// Passes on what a write came to, and an error once nothing was taken for
    /// too long.
    fn poll_taken<T>(
        &mut self,
        cx: &mut Context<'_>,
        taken: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if taken.is_ready() {
            self.stall = None;
            return taken;
        }
        let allowed = self.allowed.write;
        let stall = self.stall.get_or_insert_with(|| after(allowed));
        if stall.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let what = "connection closed: nothing was read from it";
        self.admitted.note(Limit::WriteTimeout, what);
        self.cut();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Sends our own answer where Pingora answers what it could not read: what
    /// is written although no request has begun. `None` if that is not so.
    fn poll_instead(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Option<Poll<io::Result<usize>>> {
        if self.instead.is_none() {
            let is_refusal = self.http2.is_none()
                && self.phase.get() != Phase::BODY
                && unreadable::is_answer(bytes);
            if !is_refusal {
                return None;
            }
            let took = self.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
            self.instead = Some(unreadable::refuse(
                &self.size,
                self.allowed.largest,
                self.admitted.peer(),
                took,
                self.admitted.metrics(),
            ));
        }
        let Self {
            instead, stream, ..
        } = self;
        let left = instead.as_mut()?;
        while left.has_remaining() {
            match Pin::new(&mut *stream).poll_write(cx, left) {
                Poll::Ready(Ok(0)) => {
                    return Some(Poll::Ready(Err(io::ErrorKind::WriteZero.into())));
                }
                Poll::Ready(Ok(count)) => left.advance(count),
                other => return Some(other),
            }
        }
        Some(Poll::Ready(Ok(bytes.len())))
    }

    /// Reads on for a moment, so that a client that still sends gets to see its
    /// answer before the connection is closed.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Self { linger, stream, .. } = self;
        let (until, read) = linger.get_or_insert_with(|| (after(LINGER), 0));
        let mut piece = [0; 4096];
        while *read < LINGER_MAX && until.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut piece);
            match ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => *read += buffer.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(())
    }

    /// Looks at what was written, if it is HTTP/2.
    fn wrote<'a>(&mut self, slices: impl Iterator<Item = &'a [u8]>, mut written: usize) {
        let Some(watch) = &mut self.http2 else {
            return;
        };
        for slice in slices {
            let part = slice.get(..written.min(slice.len())).unwrap_or_default();
            written -= part.len();
            let wrote = watch.wrote(part);
            if let Some(error) = wrote.error {
                let what = format!("http/2 connection ended with error {error}");
                self.admitted.note(Limit::Http2Error, &what);
            }
            for _ in 0..wrote.refused {
                unreadable::refused(self.admitted.peer(), self.admitted.metrics());
            }
        }
        watch.note(self.admitted.place());
    }
}

fn after(time: Duration) -> Pin<Box<Sleep>> {
    Box::pin(tokio::time::sleep_until(Instant::now() + time))
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

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_uncut()?;
        if let Some(taken) = self.poll_instead(cx, bytes) {
            return self.poll_taken(cx, taken);
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.wrote(std::iter::once(bytes), count);
        }
        self.poll_taken(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_uncut()?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        if let Poll::Ready(Ok(count)) = written {
            self.wrote(slices.iter().map(|slice| &**slice), count);
        }
        self.poll_taken(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_uncut()?;
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.poll_taken(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_uncut()?;
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        ready!(self.poll_taken(cx, shut))?;
        if self.instead.is_some() {
            ready!(self.poll_linger(cx));
        }
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl Shutdown for Guarded {
    async fn shutdown(&mut self) {
        if self.check_uncut().is_ok() {
            self.stream.shutdown().await;
        }
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
            let read = self.read(&mut piece).await?;
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
        if seen == PREFACE {
            let watch = Watch::new(std::time::Instant::now());
            self.http2 = Some(Box::new(watch));
        }
        self.first = seen;
        Ok(true)
    }
}

/// Returns the guarded stream behind a session's stream, if it is one: under
/// HTTP/2 it is out of reach, and needs no help.
pub(super) fn guarded(stream: &Stream) -> Option<&Guarded> {
    let any: &dyn Any = stream.as_any();
    any.downcast_ref()
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncWriteExt, DuplexStream},
        time::timeout,
    };

    use super::*;
    use crate::{config::Config, metrics::Metrics, proxy::connections::Connections};

    const SECOND: Duration = Duration::from_secs(1);

    fn under_guard(near: DuplexStream) -> (Guarded, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        let connections = Arc::new(Connections::new(Arc::clone(&metrics), 10));
        let admitted = connections
            .admit(None, &Config::default(), std::time::Instant::now())
            .unwrap();
        let allowed = Allowed {
            header: SECOND * 10,
            write: SECOND * 60,
            largest: Largest {
                bytes: 1024,
                fields: 10,
            },
        };
        (Guarded::new(Box::new(near), allowed, admitted), metrics)
    }

    #[tokio::test]
    async fn a_stream_that_was_cut_waits_for_no_reader() {
        let (near, _nobody_reads) = tokio::io::duplex(4);
        let (mut stream, _metrics) = under_guard(near);
        stream.write_all(b"full").await.unwrap();
        stream.cut();
        let more = timeout(SECOND * 5, stream.write_all(b"x")).await;
        more.unwrap().unwrap_err();
        stream.flush().await.unwrap_err();
        AsyncWriteExt::shutdown(&mut stream).await.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_sends_a_byte_is_given_up() {
        let (near, mut far) = tokio::io::duplex(1024);
        let (mut stream, metrics) = under_guard(near);
        let mut first = [0; 24];
        let peeked = timeout(SECOND * 11, stream.try_peek(&mut first)).await;
        assert_eq!(peeked.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(
            metrics.limits.with_label_values(&["header_timeout"]).get(),
            1
        );
        drop(stream);
        let mut said = Vec::new();
        far.read_to_end(&mut said).await.unwrap();
        assert!(said.is_empty(), "it asked for nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_that_drips_in_gets_a_408_after_its_time() {
        let (near, mut far) = tokio::io::duplex(1024);
        let (mut stream, _metrics) = under_guard(near);
        let began = Instant::now();
        let read = async {
            let mut header = Vec::new();
            stream.read_to_end(&mut header).await.unwrap_err()
        };
        let drip = async {
            while began.elapsed() < SECOND * 30 && far.write_all(b"x").await.is_ok() {
                tokio::time::sleep(SECOND).await;
            }
        };
        tokio::select! {
            why = read => assert_eq!(why.kind(), io::ErrorKind::TimedOut),
            () = drip => panic!("it drips on"),
        }
        assert!(began.elapsed() <= SECOND * 11);
        drop(stream);
        let mut said = String::new();
        far.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 408 "), "{said}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up_and_one_that_takes_little_is_not() {
        let (near, mut far) = tokio::io::duplex(4);
        let (mut stream, metrics) = under_guard(near);
        let slow = async {
            for _ in 0..5 {
                tokio::time::sleep(SECOND * 50).await;
                far.read_u8().await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(stream.write_all(b"12345678"), slow);
        written.unwrap();
        let began = Instant::now();
        stream.write_all(b"12345678").await.unwrap_err();
        assert!(began.elapsed() <= SECOND * 61);
        assert_eq!(
            metrics.limits.with_label_values(&["write_timeout"]).get(),
            1
        );
    }
}
