//! One try at one upstream, from the choice to the verdict.
//!
//! Connect → send → wait for the header → judge. A success is handed to
//! [`answer`](super::answer) (one JSON body) or [`relay`](super::relay) (a
//! stream of events), which commit: until then the client has seen nothing of
//! this upstream, and the exchange may go on with the next.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use pingora::{connectors::TransportConnector, upstreams::peer::HttpPeer};
use tokio::time::{sleep, timeout};

use super::{
    bodies::{Full, Reserved},
    client::{Client, Left, Waited},
    exchange::Ended,
    frozen::{self, Elsewhere, Stage, or_frozen},
    link::{self, Link, LinkError, WireRequest},
    takeover::Told,
    verdict::{Failure, Judgement, judge},
};
use crate::{
    config,
    context::{RequestContext, Verdict},
    dialects::{self, Call, Decoder, Encoded, Unsupported},
    error::Error,
    metrics::Metrics,
    openai::{ApiRequest, Endpoint, UpstreamError, retry_after},
    plugins::Chain,
    routes::Step,
    upstreams::{Slot, TlsFault, Upstream, sockets},
};

/// The most of an error's body that is read to understand it.
const ERROR_BODY_MAX: usize = 64 * 1024;
/// How long an upstream has to send that body.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a request to an Ollama waits for its header before its model is
/// shown as one that is being loaded: one that is loaded mostly answers sooner.
const LOADING_SHOWN_AFTER: Duration = Duration::from_secs(1);

/// How long is waited between two tries to get a socket where the system has
/// none left: connections that are turned away give theirs back all the time.
const SOCKET_PAUSE: Duration = Duration::from_millis(20);

/// How soon a pooled connection that the upstream had given up breaks: its answer
/// to our first bytes is a reset. One that breaks later died with its work.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// How many addresses of one name a try goes to: each that nobody answers at
/// costs the whole connect timeout.
const ADDRESSES_MAX: usize = 4;

/// What came of a try.
pub(super) enum Tried {
    /// The client has the answer, or was told that it broke off.
    Ended(Ended),
    /// The client has seen nothing; the next may be tried.
    Failed(Failure),
    /// The caller's fault: this is the answer.
    PassOn(Error),
    /// There is no memory for it: another would need as much. With whether the
    /// upstream has done the work.
    NoRoom { billed: bool },
    /// It died after its answer had begun to reach the client, who has been sent
    /// all that came: [`Attempt::told`] says what that is.
    Died(Failure),
}

/// What a try needs.
pub(super) struct Attempt<'a> {
    pub(super) ctx: &'a mut RequestContext,
    pub(super) chain: &'a Chain,
    pub(super) metrics: &'a Metrics,
    pub(super) limits: &'a crate::config::Limits,
    /// The memory of the request's body.
    pub(super) memory: &'a Reserved,
    pub(super) step: &'a Step,
    pub(super) upstream: &'a Arc<Upstream>,
    /// Its place there: what comes of the try is reported to it.
    pub(super) slot: &'a mut Slot,
    /// When the exchange must have committed.
    pub(super) deadline: Instant,
    /// The number of this try, from 1.
    pub(super) number: usize,
    /// What the client has of the answer already, if this upstream is to go on
    /// with it; afterwards, what it has.
    pub(super) told: Option<Box<Told>>,
    /// Where the exchange may go if the upstream freezes.
    pub(super) elsewhere: Elsewhere<'a>,
    /// What was taken there.
    pub(super) reserved: Option<frozen::Reserved>,
}

/// An answer whose header is in and says success.
pub(super) struct Answering {
    pub(super) link: Link,
    pub(super) peer: HttpPeer,
    pub(super) connector: Arc<TransportConnector>,
    /// When the request had been sent: first-token times start here.
    pub(super) sent_at: Instant,
    /// Whether the upstream was asked for usage that the client did not ask for.
    pub(super) hide_usage: bool,
    /// Turns the answer into OpenAI's; `None` if it is that already.
    pub(super) decoder: Option<Box<dyn Decoder>>,
}

impl Answering {
    /// Returns whether the answer is a stream of events.
    fn is_stream(&self) -> bool {
        let headers = &self.link.head().headers;
        match &self.decoder {
            Some(decoder) => decoder.is_stream(headers),
            None => is_event_stream(headers),
        }
    }

    /// Returns whether the upstream has read less of the prompt than it was
    /// sent, as far as that is certain.
    pub(super) fn prompt_was_cut(&self) -> bool {
        let decoder = self.decoder.as_ref();
        decoder.is_some_and(|decoder| decoder.prompt_was_cut())
    }

    /// Gives the connection back, or closes it if its answer is unread.
    pub(super) async fn release(self) {
        self.link.release(&self.connector, &self.peer).await;
    }
}

impl Attempt<'_> {
    /// Makes the try.
    ///
    /// # Errors
    /// [`Left`]: the client is gone; the upstream's connection is closed.
    pub(super) async fn run(
        &mut self,
        connector: &Arc<TransportConnector>,
        client: &mut Client<'_>,
    ) -> Result<Tried, Left> {
        let rest = self.told.as_ref().and_then(|told| told.ask.as_ref());
        let is_rest = rest.is_some();
        let request = rest
            .map(|ask| ask.request.clone())
            .or_else(|| self.ctx.request.clone())
            .expect("an exchange has a parsed request");
        if is_rest && let Some(tried) = Box::pin(self.prove(connector, client)).await? {
            return Ok(tried);
        }
        let mut copy = self.memory.beside();
        if self.reserve_words(&mut copy, &request).is_err() {
            return Ok(Tried::NoRoom { billed: false });
        }
        let mut encoded = match self.encode(&request) {
            Ok(encoded) => encoded,
            Err(why) => return Ok(Tried::Failed(Failure::unsupported(why))),
        };
        if encoded.body.as_ptr() == request.raw.as_ptr() {
            copy.hold(0);
        } else {
            copy.hold(encoded.body.len());
        }
        let mut is_amended = false;
        let mut answering = loop {
            let wire = self.wire_request(&encoded);
            let answering = match self.open(connector, client, wire).await? {
                Ok(answering) => answering,
                Err(failure) => return Ok(Tried::Failed(failure)),
            };
            if answering.link.head().status.is_success() {
                break answering;
            }
            let refusal = self.refused(answering, client).await?;
            match self.amended(&encoded, &refusal) {
                Some(body) if !is_amended => encoded.body = body,
                _ => {
                    let of_rest = self.refuses_rest(refusal.status, &refusal.error);
                    return Ok(of_rest.map_or_else(|| refusal.judged(), Tried::Failed));
                }
            }
            is_amended = true;
        };
        answering.hide_usage = encoded.hide_usage;
        answering.decoder = encoded.decoder.take();
        // A stream may last half an hour; who goes on with it gets another.
        encoded.body = Bytes::new();
        drop(copy);
        let status = answering.link.head().status;
        let headers = &answering.link.head().headers;
        if headers
            .get(header::CONTENT_ENCODING)
            .is_some_and(|coding| coding != "identity")
        {
            answering.link.close().await;
            let why = "encoded although identity was asked for";
            return Ok(Tried::Failed(Failure::new(Verdict::Failed, why)));
        }
        // A part of something (206), or nothing (204), is no answer.
        if !matches!(status.as_u16(), 200..=203) {
            answering.link.close().await;
            let why = format!("status {}", status.as_u16());
            return Ok(Tried::Failed(Failure::new(Verdict::Failed, why)));
        }
        if request.stream && answering.is_stream() {
            Box::pin(self.relay(answering, client)).await
        } else if is_rest {
            answering.link.close().await;
            let why = "the rest of a stream that is none";
            Ok(Tried::Failed(Failure::new(Verdict::Failed, why)))
        } else {
            Box::pin(self.answer(answering, client)).await
        }
    }

    /// Makes room for the request in the words of an Ollama, which takes it apart
    /// and puts it together anew. An edit is a copy like that of a rest, and is
    /// not refused either: there is mostly one.
    fn reserve_words(&self, copy: &mut Reserved, request: &ApiRequest) -> Result<(), Full> {
        match self.upstream.config.dialect {
            config::Dialect::Openai => Ok(()),
            config::Dialect::Ollama => self.reserve(copy, request.raw.len().saturating_mul(2)),
        }
    }

    /// Makes room for what is kept besides the body.
    pub(super) fn reserve(&self, kept: &mut Reserved, bytes: usize) -> Result<(), Full> {
        let most = self.limits.bodies.get();
        let reserved = kept.grow(bytes, self.memory.bytes(), most);
        if reserved.is_err() {
            self.metrics.limits.with_label_values(&["bodies"]).inc();
        }
        reserved
    }

    /// Connects, sends the request and waits for the header. A pooled
    /// connection that turns out to be stale is replaced once by a fresh one.
    pub(super) async fn open(
        &mut self,
        connector: &Arc<TransportConnector>,
        client: &mut Client<'_>,
        wire: WireRequest,
    ) -> Result<Result<Answering, Failure>, Left> {
        let mut stale = false;
        let mut refused = 0;
        let mut before = self.ctx.attempts.iter();
        let patience = match before.any(|tried| tried.verdict == Verdict::NoSocket) {
            // It has waited at another upstream; here it is the pool that may help.
            true => Duration::ZERO,
            false => self.upstream.timeouts.connect,
        };
        let starved = self.deadline.min(Instant::now() + patience);
        loop {
            let peer = match self.peer(client).await? {
                Ok(peer) => peer,
                Err(failure) => return Ok(Err(failure)),
            };
            let began = Instant::now();
            let connecting = async {
                if stale {
                    let stream = link::connect_anew(connector, &peer).await?;
                    Ok((stream, false))
                } else {
                    link::connect(connector, &peer).await
                }
            };
            let (stream, reused) = match client.wait(self.deadline, connecting).await? {
                Waited::Done(Ok(connected)) => connected,
                Waited::Done(Err(why @ LinkError::NoSocket(_))) => {
                    let pause = sleep(SOCKET_PAUSE);
                    if let Waited::Done(()) = client.wait(starved, pause).await? {
                        continue;
                    }
                    return Ok(Err(Failure::new(Verdict::NoSocket, why.to_string())));
                }
                // A name may have several addresses; the next is tried at once.
                Waited::Done(Err(why)) => {
                    refused += 1;
                    let (verdict, fault) = match &why {
                        LinkError::Tls(fault, _) => (Verdict::Tls, Some(*fault)),
                        _ => (Verdict::NotSent, None),
                    };
                    let now = Instant::now();
                    let another = self.upstream.not_sent(&peer, fault, began, now);
                    if another && refused < ADDRESSES_MAX {
                        continue;
                    }
                    return Ok(Err(Failure::new(verdict, why.to_string())));
                }
                Waited::TooLate => {
                    let why = "no time left to connect";
                    return Ok(Err(Failure::new(Verdict::NotSent, why)));
                }
            };
            self.count_connection(reused);
            let asked = Instant::now();
            match self
                .send_and_wait(stream, &peer, wire.clone(), client)
                .await?
            {
                Ok((link, sent_at)) => {
                    return Ok(Ok(Answering {
                        link,
                        peer,
                        connector: Arc::clone(connector),
                        sent_at,
                        hide_usage: false,
                        decoder: None,
                    }));
                }
                Err(LinkFailure::Stale(why))
                    if reused && !stale && asked.elapsed() < STALE_WITHIN =>
                {
                    log::debug!(
                        "pooled connection was stale: upstream={} {why}",
                        self.upstream.name
                    );
                    stale = true;
                }
                Err(LinkFailure::Stale(why)) => {
                    return Ok(Err(Failure::new(Verdict::Failed, why)));
                }
                Err(LinkFailure::Refused(fault, why)) => {
                    let now = Instant::now();
                    self.upstream.not_sent(&peer, Some(fault), began, now);
                    return Ok(Err(Failure::new(Verdict::Tls, why)));
                }
                Err(LinkFailure::Final(failure)) => return Ok(Err(failure)),
            }
        }
    }

    /// Returns where to connect to; asks the name service if nobody has yet.
    async fn peer(&self, client: &mut Client<'_>) -> Result<Result<HttpPeer, Failure>, Left> {
        let upstream = self.upstream;
        if let Ok(peer) = upstream.peer() {
            return Ok(Ok(peer));
        }
        let began = Instant::now();
        let deadline = self.deadline.min(began + upstream.timeouts.connect);
        let resolving = upstream.addresses.resolve_now(deadline);
        let resolved = client.wait(self.deadline, resolving).await?;
        let cause = match (resolved, upstream.peer()) {
            (Waited::Done(Ok(())), Ok(peer)) => return Ok(Ok(peer)),
            (Waited::Done(Err(why)), _) => why.to_string(),
            _ => "the name has no address".to_owned(),
        };
        if sockets::are_out() {
            return Ok(Err(Failure::new(Verdict::NoSocket, cause)));
        }
        upstream.unresolved(began, Instant::now());
        Ok(Err(Failure::new(Verdict::NotSent, cause)))
    }

    async fn send_and_wait(
        &mut self,
        stream: pingora::protocols::Stream,
        peer: &HttpPeer,
        wire: WireRequest,
        client: &mut Client<'_>,
    ) -> Result<Result<(Link, Instant), LinkFailure>, Left> {
        let timeouts = &self.upstream.timeouts;
        let sending = link::send(stream, wire, timeouts.write);
        let sent = match client.wait(self.deadline, sending).await? {
            Waited::Done(Ok(sent)) => sent,
            Waited::Done(Err(why)) => return Ok(Err(why.into())),
            Waited::TooLate => return Ok(Err(LinkFailure::timed_out("no time left to send"))),
        };
        let sent_at = Instant::now();
        let deadline = self.header_deadline(sent_at);
        let stage = Stage::before(self.told.as_deref());
        let mut fallen = self.upstream.health.fallen();
        let receiving = or_frozen(
            &mut fallen,
            sent_at,
            |now| self.way_out(&stage, now),
            self.receive(Link::receive(sent, peer)),
        );
        match client.wait(deadline, receiving).await? {
            Waited::Done(Ok(Ok(link))) => Ok(Ok((link, sent_at))),
            Waited::Done(Ok(Err(why))) => Ok(Err(why.into())),
            Waited::Done(Err(way)) => Ok(Err(LinkFailure::Final(self.leave_frozen(way)))),
            Waited::TooLate => Ok(Err(LinkFailure::timed_out("no header in time"))),
        }
    }

    /// Waits for the header, and shows meanwhile that the model is being loaded
    /// if that is what it most likely waits for: Ollama answers nothing until
    /// then. Not a failure, however long it takes within the first token's time.
    async fn receive(
        &self,
        receiving: impl Future<Output = Result<Link, LinkError>>,
    ) -> Result<Link, LinkError> {
        let (upstream, model) = (self.upstream, &*self.step.model);
        if upstream.config.dialect != config::Dialect::Ollama {
            return receiving.await;
        }
        let mut receiving = pin!(receiving);
        let received = if upstream.contexts.awaits(model) {
            match timeout(LOADING_SHOWN_AFTER, receiving.as_mut()).await {
                Ok(received) => received,
                Err(_elapsed) => {
                    log::info!(
                        "model is being loaded: id={} upstream={}",
                        self.ctx.id,
                        upstream.name
                    );
                    let _waiting = upstream.contexts.wait();
                    receiving.await
                }
            }
        } else {
            receiving.await
        };
        if received
            .as_ref()
            .is_ok_and(|link| link.head().status.is_success())
        {
            upstream.contexts.answered(model, Instant::now());
        }
        received
    }

    /// Returns until when the header must be in.
    ///
    /// An answer that is not streamed begins when it is complete, so the
    /// default first-token time of the upstream's kind says nothing about it:
    /// only one that the YAML names holds there.
    fn header_deadline(&self, sent_at: Instant) -> Instant {
        let streamed = self
            .ctx
            .request
            .as_ref()
            .is_some_and(|request| request.stream);
        let named = self.upstream.config.timeouts.first_token.is_some();
        if streamed || named {
            self.deadline
                .min(sent_at + self.upstream.timeouts.first_token)
        } else {
            self.deadline
        }
    }

    /// Reads why the upstream refused, and gives the connection back.
    pub(super) async fn refused(
        &mut self,
        mut answering: Answering,
        client: &mut Client<'_>,
    ) -> Result<Refusal, Left> {
        let status = answering.link.head().status;
        let wait = retry_after(&answering.link.head().headers, SystemTime::now());
        let deadline = self.deadline.min(Instant::now() + ERROR_BODY_TIMEOUT);
        let mut body = BytesMut::new();
        loop {
            match client.wait(deadline, answering.link.read()).await? {
                Waited::Done(Ok(Some(piece))) if body.len() + piece.len() <= ERROR_BODY_MAX => {
                    body.put_slice(&piece);
                }
                // Its end, or more than anybody needs to say what went wrong.
                _ => break,
            }
        }
        answering.release().await;
        Ok(Refusal {
            status,
            error: UpstreamError::read(&body).without(self.upstream.secrets()),
            wait,
        })
    }

    /// Returns the body to ask with once more, if the upstream refused something
    /// that it can be asked without.
    fn amended(&self, encoded: &Encoded, refusal: &Refusal) -> Option<Bytes> {
        if refusal.status != StatusCode::BAD_REQUEST {
            return None;
        }
        let dialect = dialects::of(&self.upstream.config);
        dialect.amended(&encoded.body, &refusal.error)
    }

    /// Says the request in the words of this upstream.
    pub(super) fn encode(&self, request: &ApiRequest) -> Result<Encoded, Unsupported> {
        let (upstream, model) = (self.upstream, &*self.step.model);
        let context = |tokens| upstream.context(model, tokens, Instant::now());
        dialects::of(&upstream.config).encode(&Call {
            request,
            model,
            upstream: &upstream.config,
            cache_salt: self.ctx.cache_salt.as_deref(),
            context: &context,
            event_bytes_max: self.limits.event.get(),
        })
    }

    pub(super) fn wire_request(&self, encoded: &Encoded) -> WireRequest {
        let length = encoded.body.len().to_string();
        let fields: [(&str, &[u8]); 4] = [
            ("content-type", b"application/json"),
            ("accept", encoded.accept.as_bytes()),
            ("content-length", length.as_bytes()),
            ("x-request-id", self.ctx.id.as_bytes()),
        ];
        WireRequest {
            head: link::request_head(self.upstream, "POST", encoded.suffix, &fields),
            body: encoded.body.clone(),
        }
    }

    /// Notes what only an answer in another dialect tells at its end.
    pub(super) fn note_decoded(&self, prompt_cut: bool) {
        let upstream = self.upstream;
        upstream.contexts.answered(&self.step.model, Instant::now());
        if prompt_cut {
            let series = self
                .metrics
                .prompts_cut
                .with_label_values(&[&*upstream.name]);
            series.inc();
            log::warn!(
                "prompt cut to the size of the context: id={} upstream={} num_ctx_max={}",
                self.ctx.id,
                upstream.name,
                upstream.config.num_ctx.unwrap_or(0)
            );
        }
    }

    fn count_connection(&self, reused: bool) {
        let source = if reused { "pool" } else { "new" };
        self.metrics
            .connections
            .with_label_values(&[&*self.upstream.name, source])
            .inc();
    }

    /// Returns what the client called.
    pub(super) fn endpoint(&self) -> Endpoint {
        self.ctx
            .request
            .as_ref()
            .map_or(Endpoint::ChatCompletions, |request| request.endpoint)
    }

    /// Returns the header fields that tell who answered.
    pub(super) fn answer_headers(&self) -> HeaderMap {
        let mut headers = super::respond::answer_headers(
            &self.ctx.id,
            &self.upstream.name,
            &self.step.group.name,
            self.number,
            self.step.fallback,
        );
        headers.extend(self.ctx.reply.clone());
        headers
    }
}

/// An answer that is not a success, read.
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) error: UpstreamError,
    wait: Option<Duration>,
}

impl Refusal {
    pub(super) fn judged(self) -> Tried {
        match judge(self.status, self.error, self.wait) {
            Judgement::Failed(failure) => Tried::Failed(failure),
            Judgement::PassOn(error) => Tried::PassOn(error),
        }
    }
}

/// Why a link brought no header.
enum LinkFailure {
    /// The connection broke before the first byte of an answer: if it came from
    /// the pool, the upstream had given it up.
    Stale(String),
    /// The upstream ended TLS in place of an answer.
    Refused(TlsFault, String),
    Final(Failure),
}

impl LinkFailure {
    fn timed_out(cause: &str) -> Self {
        Self::Final(Failure::new(Verdict::TimedOut, cause))
    }
}

impl From<LinkError> for LinkFailure {
    fn from(error: LinkError) -> Self {
        let cause = error.to_string();
        match error {
            LinkError::Tls(fault, _) => Self::Refused(fault, cause),
            LinkError::Connect(_) => Self::Final(Failure::new(Verdict::NotSent, cause)),
            LinkError::NoSocket(_) => Self::Final(Failure::new(Verdict::NoSocket, cause)),
            LinkError::Broken(_) => Self::Stale(cause),
            LinkError::Stalled => Self::Final(Failure::new(Verdict::TimedOut, cause)),
            LinkError::Invalid(_) => Self::Final(Failure::new(Verdict::Failed, cause)),
        }
    }
}

/// Returns whether the answer is a stream of events.
fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}
