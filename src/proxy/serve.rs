//! One request from its header to its end: the steps before an upstream is
//! chosen, and what becomes of an exchange that did not answer.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, StatusCode};
use pingora::proxy::Session;
use tokio::time::timeout;

use super::{
    Proxy,
    bodies::Reserved,
    body::{self, BodyError},
    calls::{self, Call},
    client::{Client, LAST_WORDS, Left, cut, event_stream},
    exchange::{Ended, Exchange},
    head, local, respond,
};
use crate::{
    client_ip::client_ip,
    context::{Class, Ending, RequestContext, Verdict},
    error::{Error, Result},
    gateway::Snapshot,
    openai::{ApiRequest, error_event},
    plugins::{Chain, Flow, LocalResponse},
};

/// When to ask again where a process ends: a load balancer, or its successor, has
/// another one ready.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A request that is counted and will be recorded, once.
pub(super) struct Live {
    pub(super) ctx: RequestContext,
    pub(super) snapshot: Arc<Snapshot>,
    /// The plugins that saw the header, and so must see the end.
    pub(super) chain: Option<Arc<Chain>>,
    pub(super) call: &'static str,
    pub(super) bytes_in: usize,
    /// The memory of its body; given back when the request is recorded.
    pub(super) body: Reserved,
    pub(super) done: Option<Done>,
}

impl Live {
    /// Tells the plugins what the client is about to be told.
    fn tell_last(&mut self, ended: &Ended) {
        let outcome = ended.outcome(&self.ctx, 0);
        if let Some(chain) = &self.chain {
            chain.on_last(&mut self.ctx, &outcome);
        }
    }

    /// Returns the model that is asked for; empty before the body is parsed.
    fn model(&self) -> &str {
        let request = self.ctx.request.as_ref();
        request.map_or("", |request| &request.model)
    }
}

/// How a request ended, before it is recorded.
pub(super) struct Done {
    pub(super) ended: Ended,
    pub(super) bytes_out: u64,
}

impl Proxy {
    /// Starts the account of a request whose header is in.
    pub(super) fn begin(&self, session: &Session, snapshot: &Arc<Snapshot>) -> Live {
        let request = session.req_header();
        let path = request.uri.path();
        let peer = session
            .client_addr()
            .and_then(|address| address.as_inet())
            .map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address| address.ip());
        let forwarded = request
            .headers
            .get_all("x-forwarded-for")
            .iter()
            .filter_map(|value| value.to_str().ok());
        Live {
            ctx: RequestContext::new(
                head::request_id(&request.headers),
                client_ip(peer, forwarded, &snapshot.config().trusted_proxies),
                request.method.clone(),
                Arc::from(start_of(path)),
                request.headers.clone(),
            ),
            snapshot: Arc::clone(snapshot),
            chain: None,
            call: "unknown",
            bytes_in: 0,
            body: self.bodies.reserve(),
            done: None,
        }
    }

    /// Ends a request whose handling panicked: 500 if nothing was sent yet, else
    /// an answer that does not look complete.
    pub(super) async fn after_panic(&self, session: &mut Session, live: &Live) -> Done {
        self.gateway.resources.metrics.panics.inc();
        log::error!("request panicked: id={}", live.ctx.id);
        let error = Error::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "internal_error",
            "the gateway failed on this request",
        );
        let error = error.closing();
        let status = error.status;
        let code = error.code.clone();
        let head = session.response_written();
        if head.is_none_or(|head| head.status.is_informational()) {
            if let Ok(done) = send_error(session, live, error).await {
                return done;
            }
        } else {
            cut(session).await;
        }
        Done::local(status, code, session.body_bytes_sent())
    }

    /// Serves the request to its end.
    ///
    /// # Errors
    /// [`Left`]: the client is gone before it had its answer.
    pub(super) async fn serve(
        &self,
        session: &mut Session,
        live: &mut Live,
        snapshot: &Snapshot,
    ) -> std::result::Result<Done, Left> {
        let lifecycle = &self.gateway.resources.lifecycle;
        let prepared = tokio::select! {
            biased;
            prepared = self.prepare(session, live, snapshot) => prepared,
            () = lifecycle.end() => {
                self.count_cut_short();
                let error = stopping();
                let done = Done::local(error.status, error.code.clone(), 0);
                live.tell_last(&done.ended);
                // Not until the rest of its body has come.
                let told = timeout(LAST_WORDS, send_error(session, live, error)).await;
                return told.unwrap_or(Ok(done));
            }
        };
        let served = match prepared {
            Ok(Prepared::Call(plan)) => {
                return self.exchange(session, live, snapshot, &plan).await;
            }
            Ok(Prepared::Local(response)) => {
                self.close_if_leaving(session);
                let status = response.status;
                let sent = respond::send(session, with_id(response, &live.ctx), false).await;
                sent.map(|bytes| Done::local(status, None, bytes))
            }
            Err(Stopped::Left) => None,
            Err(Stopped::Refused(error)) => {
                live.tell_last(&Ended::local(error.status, error.code.clone()));
                self.close_if_leaving(session);
                return send_error(session, live, error).await;
            }
        };
        served.ok_or(Left)
    }

    /// Turns a request away whose memory may be the last that there is.
    fn check_memory(&self) -> std::result::Result<(), Error> {
        let resources = &self.gateway.resources;
        // This one counts.
        let others = usize::try_from(resources.metrics.in_flight.get() - 1).unwrap_or(0);
        if resources.memory.admits(others, Instant::now()) {
            return Ok(());
        }
        resources
            .metrics
            .limits
            .with_label_values(&["memory"])
            .inc();
        Err(body::no_memory().closing())
    }

    /// Everything before an upstream is chosen.
    async fn prepare(
        &self,
        session: &mut Session,
        live: &mut Live,
        snapshot: &Snapshot,
    ) -> std::result::Result<Prepared, Stopped> {
        let limits = &snapshot.config().limits;
        head::check(session.req_header(), limits)?;
        if let Some(http1) = session.as_http1() {
            head::check_line(&http1.get_headers_raw_bytes())?;
        }
        let request = session.req_header();
        let call = calls::look_up(&request.method, request.raw_path())?;
        live.call = call.name();
        let is_ready = self.gateway.resources.lifecycle.is_ready();
        let Call::Model(endpoint) = call else {
            if !call.is_public() {
                live.chain = Some(Arc::clone(snapshot.chain()));
                if let Flow::Respond(answer) = snapshot.chain().on_headers(&mut live.ctx).await? {
                    return Ok(Prepared::Local(answer));
                }
            }
            let answer = local::answer(&call, &self.gateway, snapshot, &live.ctx, is_ready).await?;
            return Ok(Prepared::Local(answer));
        };
        self.check_memory()?;
        // With lists per route the body must tell which list it is.
        let chain_is_known = !snapshot.has_route_chains();
        if chain_is_known {
            live.chain = Some(Arc::clone(snapshot.chain()));
            if let Flow::Respond(answer) = snapshot.chain().on_headers(&mut live.ctx).await? {
                return Ok(Prepared::Local(answer));
            }
        }
        let metrics = &self.gateway.resources.metrics;
        let raw = body::read(session, limits, metrics, &mut live.body).await?;
        live.bytes_in = raw.len();
        live.ctx.received = Some(raw.clone());
        let request = ApiRequest::parse(endpoint, raw, limits.json_depth)?;
        if request.n > limits.n {
            metrics.limits.with_label_values(&["n"]).inc();
            let message = format!("`n` must be a whole number from 1 to {}", limits.n);
            return Err(Error::invalid("invalid_value", message).param("n").into());
        }
        let model = request.model.clone();
        live.ctx.request = Some(request);
        restrict_by_headers(&mut live.ctx)?;
        if !chain_is_known {
            let chain = Arc::clone(snapshot.chain_of(&model));
            live.chain = Some(Arc::clone(&chain));
            if let Flow::Respond(answer) = chain.on_headers(&mut live.ctx).await? {
                return Ok(Prepared::Local(answer));
            }
        }
        if let Some(chain) = live.chain.clone() {
            chain.on_parsed(&mut live.ctx)?;
            live.ctx.route = snapshot.routes.label(live.model());
            live.ctx.restrict.local |= snapshot.routes.is_local(live.model());
            live.ctx.model = snapshot.routes.meant(live.model());
            live.ctx.groups = snapshot.routes.groups_of(live.model());
            let flow = tokio::select! {
                // The body has been read: nothing more can come, or he leaves.
                _gone = session.read_body_or_idle(true) => return Err(Stopped::Left),
                flow = chain.on_request(&mut live.ctx) => flow?,
            };
            if let Flow::Respond(answer) = flow {
                return Ok(Prepared::Local(answer));
            }
        }
        check_pin(&live.ctx)?;
        check_class(&live.ctx)?;
        // A plugin may have changed the model.
        let model = live.model();
        let plan = snapshot
            .routes
            .plan(model, &live.ctx.restrict)
            .map_err(|why| why.into_error(model))?;
        live.ctx.route = Arc::clone(&plan.route);
        live.ctx.model = snapshot.routes.meant(live.model());
        Ok(Prepared::Call(Box::new(plan)))
    }

    /// Tells a client with its answer to go elsewhere next time, although nobody
    /// did when it asked.
    fn close_if_leaving(&self, session: &mut Session) {
        if self.gateway.resources.lifecycle.is_leaving() {
            session.set_keepalive(None);
        }
    }

    fn count_cut_short(&self) {
        let metrics = &self.gateway.resources.metrics;
        metrics.limits.with_label_values(&["shutdown_drain"]).inc();
    }

    async fn exchange(
        &self,
        session: &mut Session,
        live: &mut Live,
        snapshot: &Snapshot,
        plan: &crate::routes::Plan,
    ) -> std::result::Result<Done, Left> {
        let limits = &snapshot.config().limits;
        let chain = live
            .chain
            .clone()
            .unwrap_or_else(|| Arc::clone(snapshot.chain()));
        let streamed = live
            .ctx
            .request
            .as_ref()
            .is_some_and(|request| request.stream);
        let mut client = Client::new(
            session,
            limits.heartbeat.get(),
            limits.write_timeout.get(),
            &self.gateway.resources.lifecycle,
        );
        if streamed {
            let mut headers = respond::common_headers(&live.ctx.id);
            headers.extend(live.ctx.reply.clone());
            client.keep_patient(event_stream(headers));
            if flag(&live.ctx.headers, "x-forebay-queue-events").is_ok_and(|on| on) {
                client.tell_position();
            }
        }
        let metrics = &self.gateway.resources.metrics;
        let connector = &self.gateway.connector;
        let memory = &mut live.body;
        let exchange = Exchange::new(&mut live.ctx, &chain, connector, metrics, limits, memory);
        let error = match Box::pin(exchange.run(plan, &mut client)).await {
            Ok(Ok(ended)) => {
                let bytes_out = client.bytes_out();
                return Ok(Done { ended, bytes_out });
            }
            Ok(Err(error)) => error,
            Err(Left) if client.is_cut_short() => {
                self.count_cut_short();
                stopping()
            }
            Err(Left) => {
                let mut done = Done::left(client.bytes_out());
                done.ended.streamed = streamed;
                done.ended.first_token = client
                    .answering_since()
                    .map(|since| since.duration_since(live.ctx.started));
                client.abort().await;
                return Ok(done);
            }
        };
        if !client.head_is_sent() {
            live.tell_last(&Ended::local(error.status, error.code.clone()));
            self.close_if_leaving(session);
            return send_error(session, live, error).await;
        }
        let event = error_event(&error);
        let ended = match client.answering_since() {
            // A comment has gone out under a 200: the error is an event.
            None => Ended {
                ending: Ending::Incomplete,
                streamed: true,
                ..Ended::local(error.status, error.code)
            },
            Some(since) => Ended {
                ending: Ending::Incomplete,
                verdict: Verdict::Cut,
                streamed: true,
                first_token: Some(since.duration_since(live.ctx.started)),
                ..Ended::local(StatusCode::OK, error.code)
            },
        };
        live.tell_last(&ended);
        client.finish(event).await?;
        let bytes_out = client.bytes_out();
        Ok(Done { ended, bytes_out })
    }
}

/// What is told to who is still here when the process ends.
fn stopping() -> Error {
    Error::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "server_error",
        "server_shutdown",
        "the gateway stops before this answer is complete: ask again",
    )
    .retry_after(RETRY_AFTER)
    .closing()
}

/// Cuts a path to what a log line needs.
fn start_of(path: &str) -> &str {
    const MAX: usize = 256;
    (0..=MAX)
        .rev()
        .find_map(|end| path.get(..end))
        .filter(|_| path.len() > MAX)
        .unwrap_or(path)
}

/// What a request comes to before an upstream is chosen.
enum Prepared {
    /// It goes to an upstream.
    Call(Box<crate::routes::Plan>),
    /// It is answered here.
    Local(LocalResponse),
}

/// Why a request goes no further.
enum Stopped {
    Refused(Error),
    Left,
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl From<BodyError> for Stopped {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::Refused(error) => Self::Refused(error),
            BodyError::Left => Self::Left,
        }
    }
}

/// Reads what a client may say about where its request goes.
fn restrict_by_headers(ctx: &mut RequestContext) -> Result<()> {
    ctx.restrict.local |= flag(&ctx.headers, "x-forebay-local")?;
    // Read when it is used; a mistake is told at once.
    flag(&ctx.headers, "x-forebay-queue-events")?;
    if class_asked_for(&ctx.headers)? == Some(Class::Batch) {
        ctx.restrict.class = Class::Batch;
    }
    if let Some(name) = only(&ctx.headers, "x-forebay-upstream")? {
        match name.to_str() {
            Ok(name) if !name.is_empty() => ctx.restrict.pin = Some(name.into()),
            _ => {
                let message = "x-forebay-upstream must be the name of an upstream";
                return Err(Error::invalid("invalid_header", message));
            }
        }
    }
    Ok(())
}

/// Returns the one field of this name: of two, the client may have meant either.
fn only<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a HeaderValue>> {
    let mut values = headers.get_all(name).iter();
    let value = values.next();
    if values.next().is_some() {
        let message = format!("{name} is there more than once");
        return Err(Error::invalid("invalid_header", message));
    }
    Ok(value)
}

/// Reads a switch; off if it is not there.
fn flag(headers: &HeaderMap, name: &'static str) -> Result<bool> {
    match only(headers, name)?.map(HeaderValue::as_bytes) {
        None | Some(b"0" | b"false") => Ok(false),
        Some(b"1" | b"true") => Ok(true),
        Some(_) => {
            let message = format!("{name} must be 0 or 1");
            Err(Error::invalid("invalid_header", message))
        }
    }
}

fn class_asked_for(headers: &HeaderMap) -> Result<Option<Class>> {
    let Some(value) = only(headers, "x-forebay-class")? else {
        return Ok(None);
    };
    match value.to_str().ok().and_then(Class::parse) {
        Some(class) => Ok(Some(class)),
        None => {
            let message = "x-forebay-class must be interactive or batch";
            Err(Error::invalid("invalid_header", message))
        }
    }
}

/// A request may be less urgent than its key, never more: to say so openly is
/// better than to let a client believe that it goes first.
fn check_class(ctx: &RequestContext) -> Result<()> {
    let asked = class_asked_for(&ctx.headers)?;
    if asked != Some(Class::Interactive) || ctx.restrict.class == Class::Interactive {
        return Ok(());
    }
    Err(Error::new(
        StatusCode::FORBIDDEN,
        "permission_error",
        "class_not_allowed",
        "this key's requests are of the class batch",
    ))
}

/// A key may choose an upstream only if its entry says so; without keys
/// everybody may.
fn check_pin(ctx: &RequestContext) -> Result<()> {
    let allowed = ctx.principal.as_ref().is_none_or(|principal| principal.pin);
    if ctx.restrict.pin.is_none() || allowed {
        return Ok(());
    }
    Err(Error::new(
        StatusCode::FORBIDDEN,
        "permission_error",
        "pin_not_allowed",
        "this key may not choose an upstream",
    ))
}

async fn send_error(
    session: &mut Session,
    live: &Live,
    error: Error,
) -> std::result::Result<Done, Left> {
    let mut extra = who_was_tried(live);
    extra.extend(live.ctx.reply.clone());
    let sent = respond::send_error(session, &live.ctx.id, &error, extra).await;
    let bytes = sent.ok_or(Left)?;
    if error.status.is_server_error() {
        let last = live.ctx.attempts.last();
        log::warn!(
            "request failed: id={} {error} upstream={} verdict={}",
            live.ctx.id,
            last.map_or("-", |attempt| &*attempt.upstream),
            last.map_or("-", |attempt| attempt.verdict.as_str()),
        );
    }
    let code = error.code;
    Ok(Done::local(error.status, code, bytes))
}

/// Tells on an error who was tried last, if anybody was.
fn who_was_tried(live: &Live) -> HeaderMap {
    let Some(last) = live.ctx.attempts.last() else {
        return HeaderMap::new();
    };
    let tries = live.ctx.attempts.len();
    let mut headers =
        respond::answer_headers(&live.ctx.id, &last.upstream, &last.group, tries, false);
    headers.remove("x-request-id");
    headers.remove("x-forebay-fallback");
    headers
}

fn with_id(mut response: LocalResponse, ctx: &RequestContext) -> LocalResponse {
    response.headers.extend(respond::common_headers(&ctx.id));
    response.headers.extend(ctx.reply.clone());
    response
}

impl Done {
    fn local(status: StatusCode, error: Option<Cow<'static, str>>, bytes_out: usize) -> Self {
        Self {
            ended: Ended::local(status, error),
            bytes_out: bytes_out as u64,
        }
    }

    /// The client left. 499 is nginx's status for it, in logs only.
    pub(super) fn left(bytes_out: u64) -> Self {
        let status = StatusCode::from_u16(499).expect("499 is a valid status");
        let mut ended = Ended::local(status, Some("client_closed".into()));
        ended.ending = Ending::ClientClosed;
        Self { ended, bytes_out }
    }
}
