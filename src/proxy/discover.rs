//! Asking upstreams which models they have, for `GET /v1/models`.
//!
//! Only those are asked that a route with a pattern leads to: everywhere else
//! the configuration tells. The question goes over the gateway's own
//! connections and counts for nothing: not as an attempt, not for the health.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
use pingora::connectors::TransportConnector;
use tokio::time::timeout;

use super::link::{self, Link, WireRequest};
use crate::{dialects, routes::Routes, upstreams::Upstream};

/// How long an upstream has to tell.
const DEADLINE: Duration = Duration::from_secs(2);
/// How many are asked at the same time.
const AT_ONCE: usize = 16;
/// The longest answer that is read.
const ANSWER_MAX: usize = 4 * 1024 * 1024;

/// Brings up to date what the upstreams behind patterns say they have.
///
/// Who never told is waited for, at most twice the deadline; who did is asked
/// behind the caller's back, and counts with what he told last.
pub(super) async fn refresh(routes: &Routes, connector: &Arc<TransportConnector>) {
    let now = Instant::now();
    let (known, unknown): (Vec<_>, Vec<_>) = routes
        .behind_patterns()
        .filter(|(_, upstream)| upstream.discovery.is_due(now))
        .map(|(_, upstream)| Arc::clone(upstream))
        .partition(|upstream| upstream.discovery.models().is_some());
    // Those that somebody asks at this moment need no second one.
    let known: Vec<_> = known
        .into_iter()
        .filter(|upstream| upstream.discovery.turn.try_lock().is_ok())
        .collect();
    if !known.is_empty() {
        let connector = Arc::clone(connector);
        tokio::spawn(async move { ask_all(&known, &connector).await });
    }
    let asking = ask_all(&unknown, connector);
    // The others are asked when the list is next wanted.
    timeout(2 * DEADLINE, asking).await.ok();
}

async fn ask_all(upstreams: &[Arc<Upstream>], connector: &TransportConnector) {
    let each = stream::iter(upstreams);
    each.for_each_concurrent(AT_ONCE, |upstream| ask_in_turn(upstream, connector))
        .await;
}

/// Asks an upstream, unless somebody else just did.
async fn ask_in_turn(upstream: &Upstream, connector: &TransportConnector) {
    let discovery = &upstream.discovery;
    let _turn = discovery.turn.lock().await;
    if !discovery.is_due(Instant::now()) {
        return;
    }
    let told = timeout(DEADLINE, ask(upstream, connector)).await;
    let why = match told {
        Ok(Ok(names)) => return discovery.note(Some(names), Instant::now()),
        Ok(Err(why)) => why,
        Err(_elapsed) => "no answer in time".to_owned(),
    };
    log::debug!("models not listed: upstream={} {why}", upstream.name);
    discovery.note(None, Instant::now());
}

async fn ask(upstream: &Upstream, connector: &TransportConnector) -> Result<Vec<String>, String> {
    let peer = match upstream.peer() {
        Ok(peer) => peer,
        Err(_unresolved) => {
            let resolving = upstream.addresses.resolve_now(Instant::now() + DEADLINE);
            resolving.await.map_err(|why| why.to_string())?;
            upstream.peer().map_err(|why| why.to_string())?
        }
    };
    // A pooled connection may be stale, and this is asked once.
    let stream = link::connect_anew(connector, &peer)
        .await
        .map_err(|why| why.to_string())?;
    let dialect = dialects::of(&upstream.config);
    let request = WireRequest {
        head: link::request_head(
            upstream,
            "GET",
            dialect.models_suffix(),
            &[("accept", b"application/json")],
        ),
        body: Bytes::new(),
    };
    let sent = link::send(stream, request, DEADLINE)
        .await
        .map_err(|why| why.to_string())?;
    let mut link = Link::receive(sent, &peer)
        .await
        .map_err(|why| why.to_string())?;
    let status = link.head().status;
    let mut body = BytesMut::new();
    while let Some(piece) = link.read().await.map_err(|why| why.to_string())? {
        if body.len() + piece.len() > ANSWER_MAX {
            link.close().await;
            return Err("too long an answer".to_owned());
        }
        body.put_slice(&piece);
    }
    link.release(connector, &peer).await;
    if !status.is_success() {
        return Err(format!("status={}", status.as_u16()));
    }
    dialect.read_models(&body).map_err(|why| why.to_string())
}
