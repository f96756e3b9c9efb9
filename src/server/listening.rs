//! A listener that begins with a socket of ours, and stops accepting when we say
//! so.
//!
//! Pingora tells a service to stop with everything else, and then ends the
//! process after a fixed time; a listener of ours stops by itself, and Pingora
//! hears of it when nothing is under way any more.

use std::{
    os::fd::{IntoRawFd, OwnedFd},
    task::Poll,
};

use async_trait::async_trait;
use futures_util::{FutureExt, poll};
use pingora::{
    apps::ServerApp,
    server::{ListenFds, ShutdownWatch},
    services::{Service as ServiceTrait, listening::Service},
};
use tokio::sync::watch;

use super::watchdog::Pulse;

/// A listening service of Pingora's that accepts until a bit turns true.
pub(super) struct Listening<A> {
    service: Service<A>,
    socket: Option<(String, OwnedFd)>,
    closed: watch::Receiver<bool>,
    /// How many listeners accept.
    accepting: watch::Sender<usize>,
    /// Beats where its connections are served.
    pulse: Option<Pulse>,
}

impl<A> Listening<A> {
    /// `socket` is the listening socket of the service's one address.
    pub(super) fn new(
        service: Service<A>,
        socket: (String, OwnedFd),
        closed: watch::Receiver<bool>,
        accepting: watch::Sender<usize>,
        pulse: Option<Pulse>,
    ) -> Self {
        Self {
            service,
            socket: Some(socket),
            closed,
            accepting,
            pulse,
        }
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
        if let (Some(fds), Some((address, socket))) = (&fds, self.socket.take()) {
            // From here on it is Pingora's, which takes it for inherited.
            fds.lock().add(address, socket.into_raw_fd());
        }
        if let Some(pulse) = self.pulse.take() {
            tokio::spawn(pulse.beat());
        }
        let mut closed = self.closed.clone();
        // It waits for changes: one that came before is one too.
        closed.mark_changed();
        let serving = self.service.start_service(fds, closed, listeners_per_fd);
        let mut serving = serving.fuse();
        // When it first has to wait, all that accept are started.
        if poll!(&mut serving) == Poll::Pending {
            self.accepting.send_modify(|accepting| *accepting += 1);
        }
        serving.await;
    }

    fn name(&self) -> &str {
        ServiceTrait::name(&self.service)
    }

    fn threads(&self) -> Option<usize> {
        ServiceTrait::threads(&self.service)
    }
}
