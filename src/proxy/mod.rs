//! The data plane: from a client's bytes to an upstream's and back.
//!
//! - `edge`: around Pingora's proxy: counts connections (`connections`), ends
//!   those that wait where there are too many (`places`) or turns new ones away
//!   (`turned_away`), guards the others
//!   (`guarded`, `frames`), and answers what Pingora cannot read (`unreadable`)
//! - `serve`: one request from its header to its end
//! - `head`, `calls`, `body` (with `bodies`, their memory): what a request must be before it counts
//! - `exchange` → `attempt` → `link`: the tries, one try, one connection
//! - `admission`: the line in front of a group whose upstreams are all busy
//! - `answer`, `relay`: a whole answer, a stream of events
//! - `takeover`, `sequel`: a stream that broke off, gone on with by another
//! - `frozen`: who waits for a frozen upstream, and where he goes
//! - `verdict`: what an upstream's answer means, and what the client is told
//! - `client`: the client's side of an exchange
//! - `local`, `respond`: answers made here; `discover`: what upstreams list
//! - `record`: the access line and the metrics of a request that ended
//!
//! The only place where `pingora_proxy::Session` appears. Everything happens in
//! [`ProxyHttp::request_filter`], which always answers itself: Pingora's own
//! loop cannot replay a body over 64 KiB, write to the client before an
//! upstream answers, or go on after an upstream died.

mod admission;
mod answer;
mod attempt;
mod bodies;
mod body;
mod calls;
mod client;
mod connections;
mod discover;
mod edge;
mod exchange;
mod frames;
mod frozen;
mod guarded;
mod head;
mod io;
mod link;
mod local;
mod places;
mod record;
mod relay;
mod report;
mod respond;
mod sequel;
mod serve;
mod takeover;
mod turned_away;
mod unreadable;
mod verdict;

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::FutureExt;
use http::header;
use pingora::{
    proxy::{ProxyHttp, Session},
    upstreams::peer::HttpPeer,
};

use self::{
    bodies::Bodies,
    client::{Left, cut},
    serve::{Done, Live},
};
pub use self::{connections::Connections, edge::Edge};
use crate::{gateway::Gateway, lifecycle::UnderWay, metrics::Metrics, resources::Resources};

/// How much later than our deadline for a body Pingora's own for one read is.
const READ_MARGIN: Duration = Duration::from_secs(5);

/// How long an idle connection is kept when most of them are in use.
const CROWDED_KEEP_ALIVE: Duration = Duration::from_secs(30);

/// The proxy: one per process, shared by every connection.
pub struct Proxy {
    gateway: Arc<Gateway>,
    connections: Arc<Connections>,
    bodies: Arc<Bodies>,
}

impl Proxy {
    /// Makes the proxy of a gateway. While that is leaving, connections are not
    /// kept.
    pub fn new(gateway: Arc<Gateway>, connections: Arc<Connections>) -> Self {
        let metrics = Arc::clone(&gateway.resources.metrics);
        Self {
            gateway,
            connections,
            bodies: Arc::new(Bodies::new(metrics)),
        }
    }
}

/// What Pingora keeps for us through a request.
#[derive(Default)]
pub struct RequestState {
    /// Set when the header is in and the request is counted.
    live: Option<Live>,
    /// A stopping process waits until it is dropped: after all else.
    counted: Option<Counted>,
}

/// A request that is under way. That is noticed by its `Drop`, so that nothing
/// that goes wrong with a request can keep the process from stopping.
struct Counted {
    metrics: Arc<Metrics>,
    _under_way: UnderWay,
}

impl Counted {
    fn new(resources: &Resources) -> Self {
        resources.metrics.in_flight.inc();
        Self {
            metrics: Arc::clone(&resources.metrics),
            _under_way: resources.lifecycle.request(),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.in_flight.dec();
    }
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = RequestState;

    fn new_ctx(&self) -> RequestState {
        RequestState::default()
    }

    async fn early_request_filter(
        &self,
        session: &mut Session,
        _state: &mut RequestState,
    ) -> pingora::Result<()> {
        if let Some(guarded) = session.stream().and_then(guarded::guarded) {
            guarded.header_is_in();
        }
        let snapshot = self.gateway.snapshot();
        let limits = &snapshot.config().limits;
        let resources = &self.gateway.resources;
        if resources.lifecycle.is_leaving() || resources.memory.is_tight() {
            session.set_keepalive(None);
        } else if session.get_keepalive().is_some() {
            // Pingora switches keep-alive off where a connection cannot be
            // trusted (Content-Length with Transfer-Encoding, HTTP/1.0): only
            // what it left on is changed.
            let mut idle = limits.keep_alive.get();
            if self.connections.is_crowded() {
                idle = idle.min(CROWDED_KEEP_ALIVE);
            }
            session.set_keepalive(Some(idle.as_secs()));
        }
        // A client that pipelines is served in turn instead of being cut off.
        session.set_pipelining_enabled(true);
        // The body as a whole has its own deadline, which gets an answer: this
        // one is per read, and must not come first.
        session.set_read_timeout(Some(limits.body_timeout.get() + READ_MARGIN));
        session.set_write_timeout(Some(limits.write_timeout.get()));
        Ok(())
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        state: &mut RequestState,
    ) -> pingora::Result<bool> {
        let snapshot = self.gateway.snapshot();
        state.counted = Some(Counted::new(&self.gateway.resources));
        let live = state.live.insert(self.begin(session, &snapshot));
        let serving = Box::pin(self.serve(session, live, &snapshot));
        let done = match caught(serving).await {
            Ok(Ok(done)) => done,
            Ok(Err(Left)) => {
                // Pingora would wait for the rest of the body otherwise.
                cut(session).await;
                Done::left(session.body_bytes_sent() as u64)
            }
            Err(Panicked) => self.after_panic(session, live).await,
        };
        live.done = Some(done);
        Ok(true)
    }

    /// Runs once per request, whatever happened before.
    async fn logging(
        &self,
        session: &mut Session,
        _error: Option<&pingora::Error>,
        state: &mut RequestState,
    ) {
        let is_chunked = session.get_header(header::TRANSFER_ENCODING).is_some();
        if let Some(http1) = session.as_http1()
            && let Some(guarded) = session.stream().and_then(guarded::guarded)
        {
            let header = http1.get_headers_raw_bytes().len();
            // Of a chunked body the framing is not counted, and nothing may come
            // behind it anyway.
            let used = if is_chunked {
                usize::MAX
            } else {
                header + http1.body_bytes_read()
            };
            guarded.request_is_over(used);
        }
        // Where a chunked body ends is a matter of its reader when its chunks
        // are odd (Pingora takes an empty size for 0): what came behind one is
        // not taken for a request, the connection is closed.
        if is_chunked {
            session.set_pipelining_enabled(false);
        }
        let Some(live) = state.live.take() else {
            return;
        };
        let metrics = &self.gateway.resources.metrics;
        let id = Arc::clone(&live.ctx.id);
        if let Err(Panicked) = caught(record::write(&self.gateway, live)).await {
            metrics.panics.inc();
            log::error!("request panicked at its end: id={id}");
        }
        state.counted = None;
    }

    async fn upstream_peer(
        &self,
        _session: &mut Session,
        _state: &mut RequestState,
    ) -> pingora::Result<Box<HttpPeer>> {
        let why = "every request is answered in request_filter";
        Err(pingora::Error::explain(
            pingora::ErrorType::InternalError,
            why,
        ))
    }
}

/// Something panicked; what is known of it is in the log already.
#[derive(Debug, PartialEq, Eq)]
struct Panicked;

/// Does the work; a panic in it ends this request, not the process, and not the
/// other streams of an HTTP/2 connection.
async fn caught<T>(work: impl Future<Output = T>) -> std::result::Result<T, Panicked> {
    AssertUnwindSafe(work)
        .catch_unwind()
        .await
        .map_err(|_payload| Panicked)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::{config, gateway::catalog};

    fn proxy() -> Proxy {
        let loaded = config::built_in(&catalog()).unwrap();
        let gateway = Gateway::new(loaded, None, Arc::new(Resources::default())).unwrap();
        let metrics = Arc::clone(&gateway.resources.metrics);
        let connections = Arc::new(Connections::new(metrics, 10));
        Proxy::new(Arc::new(gateway), connections)
    }

    #[tokio::test]
    async fn a_panic_is_caught_wherever_it_happens() {
        let at_once = async { panic!("at once") };
        assert_eq!(caught::<()>(at_once).await, Err(Panicked));
        let later = async {
            tokio::task::yield_now().await;
            panic!("later")
        };
        assert_eq!(caught::<()>(later).await, Err(Panicked));
        assert_eq!(caught(async { 1 }).await, Ok(1));
    }

    #[tokio::test]
    async fn a_request_that_panicked_gets_a_500_with_its_id_and_is_counted() {
        let proxy = proxy();
        let (near, mut far) = tokio::io::duplex(4096);
        let mut session = Session::new_h1(Box::new(near));
        let request = b"GET /livez HTTP/1.1\r\nhost: a\r\nx-request-id: my-id\r\n\r\n";
        far.write_all(request).await.unwrap();
        session.read_request().await.unwrap();
        let snapshot = proxy.gateway.snapshot();
        let live = proxy.begin(&session, &snapshot);
        let done = proxy.after_panic(&mut session, &live).await;
        assert_eq!(done.ended.status, 500);
        drop(session);
        let mut said = String::new();
        far.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 500 "), "{said}");
        assert!(said.contains("x-request-id: my-id\r\n"), "{said}");
        assert!(
            said.to_lowercase().contains("connection: close\r\n"),
            "{said}"
        );
        assert!(said.contains("\"code\":\"internal_error\""), "{said}");
        assert_eq!(proxy.gateway.resources.metrics.panics.get(), 1);
    }
}
