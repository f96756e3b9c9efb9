//! Around Pingora's proxy: every connection passes here first.
//!
//! Here it is counted and, if it is one too many and nobody makes room, turned
//! away; then it gets a stream under guard (see `guarded`), and Pingora takes over.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pingora::{apps::ServerApp, protocols::Stream, proxy::HttpProxy, server::ShutdownWatch};
use tokio::sync::watch;

use super::{
    Proxy,
    connections::Connections,
    guarded::{Allowed, Guarded},
    turned_away::TurnedAway,
    unreadable::Largest,
};
use crate::gateway::Gateway;

/// How long a connection that was accepted as the last has for its first request,
/// before it is told that no more are served on it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The application behind the data listener.
pub struct Edge {
    proxy: Arc<HttpProxy<Proxy>>,
    gateway: Arc<Gateway>,
    connections: Arc<Connections>,
    turned_away: TurnedAway,
}

impl Edge {
    /// Puts the edge around a proxy.
    pub fn new(
        proxy: HttpProxy<Proxy>,
        gateway: Arc<Gateway>,
        connections: Arc<Connections>,
    ) -> Self {
        Self {
            proxy: Arc::new(proxy),
            gateway,
            connections,
            turned_away: TurnedAway::new(),
        }
    }
}

#[async_trait]
impl ServerApp for Edge {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        _shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let (admitted, allowed) = {
            let snapshot = self.gateway.snapshot();
            let config = snapshot.config();
            let allowed = Allowed {
                header: config.limits.header_timeout.get(),
                write: config.limits.write_timeout.get(),
                largest: Largest {
                    bytes: config.limits.header.get(),
                    fields: config.limits.header_fields,
                },
            };
            (
                self.connections
                    .admit(peer(&stream), config, Instant::now()),
                allowed,
            )
        };
        let Ok(admitted) = admitted else {
            self.turned_away.turn_away(stream).await;
            return None;
        };
        let guarded = Box::new(Guarded::new(stream, allowed, admitted));
        // What of HTTP/2 makes a `GOAWAY` when it turns true, and nothing if it is
        // true from the beginning: who comes late is told at the next occasion.
        let lifecycle = &self.gateway.resources.lifecycle;
        let mut occasions = [lifecycle.leaving(), lifecycle.closed()].into_iter();
        if let Some(told) = occasions.find(|told| !*told.borrow()) {
            return ServerApp::process_new(&self.proxy, guarded, &told).await;
        }
        let (tell, told) = watch::channel(false);
        let last_words = async {
            tokio::time::sleep(LAST_WORDS).await;
            tell.send_replace(true);
            std::future::pending().await
        };
        tokio::select! {
            kept = ServerApp::process_new(&self.proxy, guarded, &told) => kept,
            never = last_words => never,
        }
    }

    /// Nobody is accepted any more. Pingora would close at once who has just
    /// answered, and whose next request is on its way: see `Connections::end_idle`.
    async fn cleanup(&self) {}
}

fn peer(stream: &Stream) -> Option<IpAddr> {
    let digest = stream.get_socket_digest()?;
    Some(digest.peer_addr()?.as_inet()?.ip())
}
