//! The control plane: metrics, health, reload, and what people do to upstreams.
//! Its own listener, loopback by default, never the clients'.
//!
//! An axum router behind a Pingora listener: shutdown and the hand-over of sockets
//! come with Pingora's. One request per connection, few connections at once, and
//! the data listener's deadlines for a header and for an answer.

mod upstreams;
mod usage;

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Response, StatusCode, header, uri::Authority},
    middleware::{Next, from_fn_with_state},
    response::IntoResponse,
    routing::{get, post},
};
use bytes::{BufMut, BytesMut};
use http_body_util::BodyExt;
use pingora::{
    ErrorType,
    apps::ServerApp,
    http::ResponseHeader,
    protocols::{Stream, http::ServerSession},
    server::ShutdownWatch,
};
use serde_json::json;
use subtle::ConstantTimeEq;
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};
use tower::ServiceExt;

use crate::{
    error::Error,
    gateway::Gateway,
    lifecycle::Successor,
    status::{Reader, report},
};

/// The largest body of an admin request, 1 MiB.
const BODY_MAX: usize = 1024 * 1024;
/// How long a client has to send it.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The most connections at once: scrapers and people are few, and each takes a
/// file that clients may need.
const CONNECTIONS_MAX: usize = 32;

/// The application behind the admin listener.
pub struct Admin {
    router: Router,
    gateway: Arc<Gateway>,
    places: Semaphore,
}

impl Admin {
    /// Makes the application.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        let router = Router::new()
            .route("/", get(index))
            .route("/metrics", get(metrics))
            .route("/health", get(health))
            .route("/reload", post(reload))
            .route("/upgrade", post(upgrade))
            .route("/upstreams", get(upstreams::list))
            .route("/usage", get(usage::list))
            .route("/upstreams/reset", post(upstreams::reset_all))
            .route("/upstreams/{name}/{action}", post(upstreams::act))
            .fallback(unknown)
            .layer(from_fn_with_state(Arc::clone(&gateway), guard))
            .with_state(Arc::clone(&gateway));
        Self {
            router,
            gateway,
            places: Semaphore::new(CONNECTIONS_MAX),
        }
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").finish_non_exhaustive()
    }
}

#[async_trait]
impl ServerApp for Admin {
    /// Answers one request, and closes: nobody asks often enough to miss it.
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        _shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let mut session = ServerSession::new_http1(stream);
        let Ok(_place) = self.places.try_acquire() else {
            self.hit("admin_connections");
            // What it has to say is not waited for.
            return None;
        };
        let (header, write) = {
            let snapshot = self.gateway.snapshot();
            let limits = &snapshot.config().limits;
            (limits.header_timeout.get(), limits.write_timeout.get())
        };
        let mut _under_way = None;
        let answer = match timeout(header, session.read_request()).await {
            Ok(Ok(true)) => {
                _under_way = Some(self.gateway.resources.lifecycle.admin_request());
                self.answer(&mut session).await
            }
            Ok(Err(why)) if why.etype() == &ErrorType::InvalidHTTPHeader => {
                let message = "the request is not valid HTTP";
                whole(shape(&Error::invalid("malformed_request", message))).await
            }
            // It has left.
            Ok(_) => return None,
            Err(_elapsed) => {
                self.hit("admin_header_timeout");
                return None;
            }
        };
        session.set_keepalive(None);
        let (parts, body) = answer.into_parts();
        let sent = async {
            let head = Box::new(ResponseHeader::from(parts));
            session.write_response_header(head).await?;
            if !body.is_empty() {
                session.write_response_body(body.into(), true).await?;
            }
            session.finish().await
        };
        match timeout(write, sent).await {
            Ok(Ok(_closed)) => {}
            Ok(Err(why)) => log::debug!("admin client left: {}", why.etype().as_str()),
            Err(_elapsed) => self.hit("admin_write_timeout"),
        }
        None
    }
}

impl Admin {
    async fn answer(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let request = match read(session).await {
            Ok(request) => request,
            Err(error) => return whole(shape(&error)).await,
        };
        match self.router.clone().oneshot(request).await {
            Ok(response) => whole(response).await,
            Err(never) => match never {},
        }
    }

    fn hit(&self, limit: &str) {
        let metrics = &self.gateway.resources.metrics;
        metrics.limits.with_label_values(&[limit]).inc();
    }
}

/// Reads a request into axum's type.
async fn read(session: &mut ServerSession) -> Result<Request, Error> {
    let mut request = Request::new(Body::empty());
    let from = session.req_header();
    *request.method_mut() = from.method.clone();
    *request.uri_mut() = from.uri.clone();
    *request.headers_mut() = from.headers.clone();
    let body = async {
        let mut body = BytesMut::new();
        while let Some(piece) = session.read_request_body().await? {
            body.put_slice(&piece);
            if body.len() > BODY_MAX {
                break;
            }
        }
        Ok::<_, Box<pingora::Error>>(body)
    };
    let body = match timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) if body.len() <= BODY_MAX => body,
        Ok(Ok(_)) => {
            let status = StatusCode::PAYLOAD_TOO_LARGE;
            return Err(Error::refused(status, "body_too_large", "body over 1MiB"));
        }
        Ok(Err(why)) => {
            return Err(Error::invalid("invalid_body", "the body is not complete").because(why));
        }
        Err(why) => {
            let status = StatusCode::REQUEST_TIMEOUT;
            return Err(
                Error::refused(status, "body_timeout", "the body took too long").because(why),
            );
        }
    };
    *request.body_mut() = Body::from(body.freeze());
    Ok(request)
}

/// Collects an answer, as Pingora's simple server wants it.
async fn whole(response: Response<Body>) -> Response<Vec<u8>> {
    let (mut parts, body) = response.into_parts();
    let body = match body.collect().await {
        Ok(body) => body.to_bytes().to_vec(),
        Err(why) => {
            log::error!("admin answer lost: {why}");
            parts.status = StatusCode::INTERNAL_SERVER_ERROR;
            Vec::new()
        }
    };
    parts
        .headers
        .insert(header::CONTENT_LENGTH, body.len().into());
    Response::from_parts(parts, body)
}

/// Turns away who has no key, and pages of other sites that a browser sends
/// here on its user's behalf.
async fn guard(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let snapshot = gateway.snapshot();
    let key = snapshot
        .config()
        .admin
        .key
        .as_ref()
        .and_then(|reference| snapshot.loaded.secrets.get(reference));
    if let Some(key) = key
        && !carries(request.headers(), key.expose())
    {
        let error = Error::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            "invalid_api_key",
            "the admin listener needs its key: Authorization: Bearer …",
        );
        return shape(&error);
    }
    if is_cross_site(request.headers()) || (key.is_none() && !is_local_name(request.headers())) {
        let error = Error::new(
            StatusCode::FORBIDDEN,
            "invalid_request_error",
            "cross_site",
            "requests from other sites are not answered",
        );
        return shape(&error);
    }
    next.run(request).await
}

fn carries(headers: &HeaderMap, key: &str) -> bool {
    headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .is_some_and(|(scheme, token)| {
            scheme.eq_ignore_ascii_case("bearer")
                && bool::from(token.trim().as_bytes().ct_eq(key.as_bytes()))
        })
}

fn is_cross_site(headers: &HeaderMap) -> bool {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &header::HeaderValue| value.to_str().ok())
    };
    let Some(origin) = headers.get(header::ORIGIN) else {
        return false;
    };
    let origin = origin.to_str().unwrap_or("");
    let host = text(header::HOST).unwrap_or("");
    origin.split_once("://").map(|(_, host)| host) != Some(host)
}

/// Returns whether the listener was called by an address or as `localhost`.
/// Without a key that is asked for: a page whose own name is made to point here
/// (DNS rebinding) calls it by that name.
fn is_local_name(headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    host.is_none_or(|host| {
        let name = host.host().trim_matches(['[', ']']);
        name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
    })
}

async fn index() -> impl IntoResponse {
    Json(json!({
        "name": "forebay admin",
        "version": env!("CARGO_PKG_VERSION"),
        "endpoints": [
            "GET /metrics",
            "GET /health",
            "POST /reload",
            "POST /upgrade",
            "GET /upstreams",
            "GET /usage",
            "POST /upstreams/reset",
            "POST /upstreams/{name}/reset",
            "POST /upstreams/{name}/drain",
            "POST /upstreams/{name}/undrain",
        ],
    }))
}

async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    gateway.export();
    match gateway.resources.metrics.encode() {
        Ok(text) => {
            let kind = [(
                header::CONTENT_TYPE,
                "text/plain; version=0.0.4; charset=utf-8",
            )];
            (kind, text).into_response()
        }
        Err(why) => shape(&internal().because(why)),
    }
}

async fn health(State(gateway): State<Arc<Gateway>>) -> impl IntoResponse {
    Json(report(&gateway, &gateway.snapshot(), Reader::Admin))
}

/// Reloads; 422 with every problem if the file is wrong, 409 if the process stops.
async fn reload(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    if gateway.resources.lifecycle.is_leaving() {
        let message = "the gateway is stopping: its configuration stays as it is";
        let status = StatusCode::CONFLICT;
        return shape(&Error::refused(status, "stopping", message));
    }
    let reloaded = spawn_blocking(move || gateway.reload()).await;
    match reloaded {
        Ok(Ok(snapshot)) => {
            let warnings: Vec<_> = snapshot
                .loaded
                .warnings
                .iter()
                .map(ToString::to_string)
                .collect();
            Json(json!({
                "reloaded": true,
                "version": snapshot.version,
                "hash": snapshot.loaded.hash,
                "warnings": warnings,
            }))
            .into_response()
        }
        Ok(Err(problems)) => {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            let body = Json(json!({ "reloaded": false, "problems": problems }));
            (StatusCode::UNPROCESSABLE_ENTITY, body).into_response()
        }
        Err(why) => shape(&internal().because(why)),
    }
}

/// Has this process replaced by a successor; 409 with the reason if it goes on
/// instead.
async fn upgrade(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    match gateway.resources.lifecycle.upgrade().await {
        Ok(successor) => {
            let Successor { pid, version } = successor;
            Json(json!({ "upgraded": true, "pid": pid, "version": version })).into_response()
        }
        Err(reason) => {
            let status = StatusCode::CONFLICT;
            shape(&Error::refused(status, "upgrade_failed", reason))
        }
    }
}

async fn unknown() -> Response<Body> {
    let message = "unknown admin URL: see GET / for what is here";
    shape(&Error::refused(
        StatusCode::NOT_FOUND,
        "unknown_url",
        message,
    ))
}

fn internal() -> Error {
    Error::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "server_error",
        "internal_error",
        "the gateway failed",
    )
}

/// The one place where an admin error becomes an answer.
fn shape(error: &Error) -> Response<Body> {
    if error.status.is_server_error() {
        log::error!("admin request failed: {error}");
    }
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (error.status, kind, error.to_json()).into_response()
}
