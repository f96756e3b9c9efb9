//! Around Pingora's proxy: every connection passes here first.
//!
//! Pingora bounds each read of a header, not the header: one byte every 59
//! seconds would hold a connection for ever. The edge gives every connection a
//! stream that fails when a header as a whole takes too long.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora::{apps::ServerApp, protocols::Stream, proxy::HttpProxy, server::ShutdownWatch};

use super::{Proxy, io::Guarded};

/// The application behind the data listener.
pub struct Edge {
    proxy: Arc<HttpProxy<Proxy>>,
    header_timeout: Duration,
}

impl Edge {
    /// Puts the edge around a proxy. A client has `header_timeout` for each of
    /// its request headers.
    pub fn new(proxy: HttpProxy<Proxy>, header_timeout: Duration) -> Self {
        Self {
            proxy: Arc::new(proxy),
            header_timeout,
        }
    }
}

#[async_trait]
impl ServerApp for Edge {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let guarded = Box::new(Guarded::new(stream, self.header_timeout));
        ServerApp::process_new(&self.proxy, guarded, shutdown).await
    }

    async fn cleanup(&self) {
        ServerApp::cleanup(&*self.proxy).await;
    }
}
