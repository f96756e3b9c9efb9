//! The client's side of an exchange: whether it is still there, what it has
//! been sent, and the comments that keep it patient.
//!
//! **Invariant:** every wait of an exchange goes through [`Client::wait`]. So a
//! client that leaves is noticed wherever the exchange is, a client that streams
//! hears from us at least every heartbeat, and a process that has to end gets to
//! tell everybody so.

use std::{
    future::Future,
    pin::pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, StatusCode, Version, header};
use pingora::{http::ResponseHeader, proxy::Session};
use tokio::{
    sync::watch,
    time::{sleep_until, timeout},
};

use super::guarded::guarded;
use crate::{
    lifecycle::{Lifecycle, turned},
    plugins::ResponseHead,
};

/// What an SSE stream says to keep a connection from looking dead; comments
/// are ignored by every client.
const PING: &[u8] = b": ping\n\n";

/// How much of an answer is written at once.
const PIECE: usize = 64 * 1024;

/// How long a client has to take its last event when the process ends.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// The client is gone, and nobody is left to answer; or the process ends, see
/// [`Client::is_cut_short`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Left;

/// How a wait ended.
#[derive(Debug)]
pub(super) enum Waited<T> {
    /// What was waited for is there.
    Done(T),
    /// The deadline passed first.
    TooLate,
}

/// The client of one exchange.
pub(super) struct Client<'a> {
    session: &'a mut Session,
    heartbeat: Duration,
    write_timeout: Duration,
    /// When the next comment is due; `None` if the client does not stream.
    ping_at: Option<Instant>,
    /// The head that is sent when the first comment is due and no upstream has
    /// answered yet.
    early_head: Option<Box<ResponseHeader>>,
    /// Whether the head went out before an upstream was known.
    head_was_early: bool,
    /// Its position in line, while it waits for a free upstream.
    position: Option<usize>,
    /// Whether it wants to be told of every change of its position.
    wants_position: bool,
    bytes_out: u64,
    /// When the head of an upstream's answer was sent.
    answering_since: Option<Instant>,
    /// True when it is to go elsewhere next time.
    leaving: watch::Receiver<bool>,
    /// Turns true when the process ends.
    ended: watch::Receiver<bool>,
    /// Whether something was sent in part, and nothing can follow it.
    is_broken: bool,
}

impl<'a> Client<'a> {
    /// Wraps the session of a request whose body has been read.
    pub(super) fn new(
        session: &'a mut Session,
        heartbeat: Duration,
        write_timeout: Duration,
        lifecycle: &Lifecycle,
    ) -> Self {
        Self {
            session,
            heartbeat,
            write_timeout,
            ping_at: None,
            early_head: None,
            head_was_early: false,
            position: None,
            wants_position: false,
            bytes_out: 0,
            answering_since: None,
            leaving: lifecycle.leaving(),
            ended: lifecycle.ended(),
            is_broken: false,
        }
    }

    /// Begins to send comments, `heartbeat` from now, behind this head.
    pub(super) fn keep_patient(&mut self, head: ResponseHead) {
        self.early_head = Some(Box::new(self.to_wire(head, None)));
        self.ping_at = Some(Instant::now() + self.heartbeat);
    }

    /// Tells it by comments where in line it is, from the moment it waits.
    pub(super) fn tell_position(&mut self) {
        self.wants_position = true;
    }

    /// Notes where in line it is; `None` when its turn has come. If it is to be
    /// told (it asked, or has waited so long that comments have begun), it is.
    ///
    /// # Errors
    /// [`Left`].
    pub(super) async fn is_in_line(&mut self, position: Option<usize>) -> Result<(), Left> {
        let moved = position.is_some() && self.position != position;
        self.position = position;
        let is_told = self.wants_position || self.head_was_early;
        if moved && is_told && self.ping_at.is_some() {
            self.ping().await?;
        }
        Ok(())
    }

    /// Notes that it does not wait in line any more.
    pub(super) fn is_out_of_line(&mut self) {
        self.position = None;
    }

    /// Returns whether the head has been sent: from then on an error is an event.
    pub(super) fn head_is_sent(&self) -> bool {
        // What was written may have been a `100 Continue`.
        self.session
            .response_written()
            .is_some_and(|head| !head.status.is_informational())
    }

    /// Returns whether the head went out before an upstream was known.
    pub(super) fn head_was_early(&self) -> bool {
        self.head_was_early
    }

    /// Returns since when the client is being sent an upstream's answer.
    pub(super) fn answering_since(&self) -> Option<Instant> {
        self.answering_since
    }

    /// Returns whether it is still there, and gave up only because the process
    /// ends: then it can be told so.
    pub(super) fn is_cut_short(&self) -> bool {
        *self.ended.borrow() && !self.is_broken
    }

    /// Returns the bytes of the body sent so far.
    pub(super) fn bytes_out(&self) -> u64 {
        self.bytes_out
    }

    /// Waits for `work`, until `deadline`, as long as the client is there.
    ///
    /// # Errors
    /// [`Left`]: the client closed its connection (also its sending side), or
    /// does not take what it is sent; or the process ends.
    pub(super) async fn wait<T>(
        &mut self,
        deadline: Instant,
        work: impl Future<Output = T>,
    ) -> Result<Waited<T>, Left> {
        let mut work = pin!(work);
        loop {
            // Here as well: work that is always ready leaves no time to ask.
            if *self.ended.borrow() {
                return Err(Left);
            }
            let ping_at = self.ping_at;
            tokio::select! {
                biased;
                // First: an upstream that always has more to say would never
                // let us find out that nobody listens.
                gone = self.session.read_body_or_idle(true) => {
                    self.is_broken = true;
                    // Nothing more can come of a body that was read whole.
                    if let Err(why) = gone {
                        log::debug!("client left: {}", why.etype().as_str());
                    }
                    return Err(Left);
                },
                done = &mut work => return Ok(Waited::Done(done)),
                () = sleep_until(deadline.into()) => return Ok(Waited::TooLate),
                () = sleep_until(ping_at.unwrap_or(deadline).into()), if ping_at.is_some() => {
                    self.ping().await?;
                }
                () = turned(&mut self.ended) => return Err(Left),
            }
        }
    }

    async fn ping(&mut self) -> Result<(), Left> {
        if let Some(head) = self.early_head.take() {
            self.head_was_early = true;
            self.write_head(head).await?;
        }
        let comment = match self.position {
            Some(position) => format!(": queued position={position}\n\n").into(),
            None => Bytes::from_static(PING),
        };
        self.write(comment).await
    }

    /// Sends the head, unless a comment had to go first. `length` is that of
    /// the body, or `None` for a stream.
    ///
    /// # Errors
    /// [`Left`].
    pub(super) async fn send_head(
        &mut self,
        head: ResponseHead,
        length: Option<usize>,
    ) -> Result<(), Left> {
        self.answering_since = Some(Instant::now());
        if self.head_is_sent() {
            return Ok(());
        }
        self.early_head = None;
        let head = Box::new(self.to_wire(head, length));
        self.write_head(head).await
    }

    async fn write_head(&mut self, head: Box<ResponseHeader>) -> Result<(), Left> {
        if *self.leaving.borrow() {
            self.session.set_keepalive(None);
        }
        let sent = self.session.write_response_header(head, false);
        let sent = in_time(self.write_timeout, &mut self.ended, sent).await;
        self.is_broken = sent.is_err();
        sent
    }

    /// Sends a piece of the body and puts off the next comment.
    ///
    /// # Errors
    /// [`Left`].
    pub(super) async fn write(&mut self, piece: Bytes) -> Result<(), Left> {
        if piece.is_empty() {
            return Ok(());
        }
        self.bytes_out += piece.len() as u64;
        self.write_body(piece, false).await?;
        if self.ping_at.is_some() {
            self.ping_at = Some(Instant::now() + self.heartbeat);
        }
        Ok(())
    }

    /// Sends the last piece: the answer is complete, the client may go.
    ///
    /// # Errors
    /// [`Left`].
    pub(super) async fn finish(&mut self, piece: Bytes) -> Result<(), Left> {
        self.ping_at = None;
        self.bytes_out += piece.len() as u64;
        self.write_body(piece, true).await
    }

    /// Writes in pieces that each have `write_timeout`: a large answer over a
    /// slow line takes as long as it needs, as long as it moves.
    async fn write_body(&mut self, mut body: Bytes, end: bool) -> Result<(), Left> {
        while body.len() > PIECE {
            let piece = body.split_to(PIECE);
            self.write_piece(Some(piece), false).await?;
        }
        let last = (!body.is_empty()).then_some(body);
        self.write_piece(last, end).await
    }

    async fn write_piece(&mut self, piece: Option<Bytes>, end: bool) -> Result<(), Left> {
        let sent = self.session.write_response_body(piece, end);
        let sent = in_time(self.write_timeout, &mut self.ended, sent).await;
        self.is_broken = sent.is_err();
        sent
    }

    /// [`cut`]s the client off.
    pub(super) async fn abort(&mut self) {
        cut(self.session).await;
    }

    fn to_wire(&self, head: ResponseHead, length: Option<usize>) -> ResponseHeader {
        to_wire(self.session.req_header().version, head, length)
    }
}

/// Waits until something is sent; less long once the process ends.
async fn in_time<E>(
    most: Duration,
    ended: &mut watch::Receiver<bool>,
    sent: impl Future<Output = Result<(), E>>,
) -> Result<(), Left> {
    let last_words = async {
        turned(ended).await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        biased;
        sent = timeout(most, sent) => match sent {
            Ok(Ok(())) => Ok(()),
            _ => Err(Left),
        },
        () = last_words => Err(Left),
    }
}

/// Ends the connection (of HTTP/2: the stream) without ending the answer: for a
/// client that does not read, or an answer that must not look complete. Waits
/// for nothing, and neither does Pingora after it.
pub(super) async fn cut(session: &mut Session) {
    session.set_keepalive(None);
    if let Some(stream) = session.stream().and_then(guarded) {
        stream.cut();
        return;
    }
    session.shutdown().await;
}

/// Builds the head for the wire, framed as the client's HTTP version wants it.
pub(super) fn to_wire(
    version: Version,
    head: ResponseHead,
    length: Option<usize>,
) -> ResponseHeader {
    let fields = head.headers.len() + 2;
    let mut wire = ResponseHeader::build(head.status, Some(fields))
        .expect("a StatusCode is always a valid status");
    for (name, value) in &head.headers {
        wire.append_header(name, value)
            .expect("names and values of a HeaderMap are valid");
    }
    match length {
        Some(length) => wire
            .insert_header(header::CONTENT_LENGTH, length)
            .expect("a number is a valid value"),
        // HTTP/2 frames for itself; HTTP/1.0 knows no chunks and reads to the end.
        None if version == Version::HTTP_11 => wire
            .insert_header(
                header::TRANSFER_ENCODING,
                HeaderValue::from_static("chunked"),
            )
            .expect("a constant is a valid value"),
        None => {}
    }
    wire
}

/// Returns the head of an event stream, before anything is known of an upstream.
pub(super) fn event_stream(mut headers: http::HeaderMap) -> ResponseHead {
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx in front of us would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    ResponseHead {
        status: StatusCode::OK,
        headers,
    }
}
