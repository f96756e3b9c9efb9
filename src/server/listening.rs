//! A listener that stops accepting when we say so.
//!
//! Pingora tells a service to stop with everything else, and then ends the
//! process after a fixed time; a listener of ours stops by itself, and Pingora
//! hears of it when nothing is under way any more.

use async_trait::async_trait;
use pingora::{
    apps::ServerApp,
    server::{ListenFds, ShutdownWatch},
    services::{Service as ServiceTrait, listening::Service},
};
use tokio::sync::watch;

/// A listening service of Pingora's that accepts until a bit turns true.
pub(super) struct Listening<A> {
    service: Service<A>,
    closed: watch::Receiver<bool>,
}

impl<A> Listening<A> {
    pub(super) fn new(service: Service<A>, closed: watch::Receiver<bool>) -> Self {
        Self { service, closed }
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServiceTrait for Listening<A> {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        _shutdown: ShutdownWatch,
        listeners_per_fd: usize,
    ) {
        let mut closed = self.closed.clone();
        // It waits for changes: one that came before is one too.
        closed.mark_changed();
        self.service
            .start_service(fds, closed, listeners_per_fd)
            .await;
    }

    fn name(&self) -> &str {
        ServiceTrait::name(&self.service)
    }

    fn threads(&self) -> Option<usize> {
        ServiceTrait::threads(&self.service)
    }
}
