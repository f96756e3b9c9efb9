//! A simulated model server that can misbehave: for the demo, the tests, the
//! benches, and for load tests by users (`forebay sim`).
//!
//! It speaks HTTP/1.1 over raw sockets, without an HTTP library, because half of
//! its work is to break the protocol. Beside the model's port it has a control
//! port, over which faults are set and what was received is read.
//! `docs/simulator.md` is its manual.
//!
//! - [`faults`]: the knobs — start here to add one
//! - [`record`]: what was received
//! - `answers`, `api`, `ollama`: what is answered when nothing goes wrong
//! - `http`, `wire`, `stream`, `gzip`: reading and writing bytes
//! - `server`, `connection`: the socket, and the life of one connection
//! - `control`: the control port
//!
//! **Invariant:** nothing outside this module is used but the crate's
//! dependencies: a bug in the gateway cannot hide in its witness.

mod answers;
mod api;
mod base64;
mod connection;
mod control;
pub mod faults;
mod gzip;
mod http;
mod ollama;
pub mod record;
mod server;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    io,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{net::TcpListener, task::AbortHandle};

pub use faults::{Fault, FaultError};
pub use record::{NotSeen, Record, State};

use server::Server;

/// What a simulator is like; each field is a flag of `forebay sim`.
#[derive(clap::Args, Clone, Debug)]
pub struct SimOptions {
    /// The address of the model server; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// The address of the control port; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub control: SocketAddr,
    /// The first word of every answer.
    #[arg(long, value_name = "NAME", default_value = "sim")]
    pub name: String,
    /// A model it serves; may be given several times.
    #[arg(long = "model", value_name = "NAME", default_value = "demo")]
    pub models: Vec<String>,
    /// The time until the first token.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = humantime::parse_duration)]
    pub first_token: Duration,
    /// Tokens per second; without it, as fast as it can.
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU32>,
    /// The length of an answer in tokens (words), if the request sets no less.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub tokens: usize,
    /// How many answers are made at once, the others wait in line; without it,
    /// all.
    #[arg(long, value_name = "N")]
    pub slots: Option<NonZeroUsize>,
    /// How many requests may wait in line, the others get 503; without it, all.
    #[arg(long, value_name = "N", requires = "slots")]
    pub queue: Option<usize>,
    /// How long the model takes to load after a start: until then `/health` and
    /// model calls answer 503.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub load: Duration,
    /// The key that requests must carry as `Authorization: Bearer`.
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// A fault from the start, such as `status=503;times=3`; may be given
    /// several times.
    #[arg(long = "fault", value_name = "KNOBS")]
    pub faults: Vec<Fault>,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            control: SocketAddr::from(([127, 0, 0, 1], 0)),
            name: "sim".to_owned(),
            models: vec!["demo".to_owned()],
            first_token: Duration::from_millis(20),
            rate: None,
            tokens: 24,
            slots: None,
            queue: None,
            load: Duration::ZERO,
            api_key: None,
            faults: Vec::new(),
        }
    }
}

impl SimOptions {
    /// Returns options for tests: no delay at all.
    pub fn quick(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            first_token: Duration::ZERO,
            ..Self::default()
        }
    }

    fn per_token(&self) -> Option<Duration> {
        self.rate.map(|rate| Duration::from_secs(1) / rate.get())
    }
}

/// How many connections there are and were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Open now.
    pub open: u64,
    /// Accepted since the start, those that were reset at once included.
    pub total: u64,
}

/// A running simulator; dropping it closes everything.
#[derive(Debug)]
pub struct Sim {
    server: Arc<Server>,
    control_addr: SocketAddr,
    control: AbortHandle,
}

impl Sim {
    /// Starts a simulator on the current tokio runtime.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub async fn start(options: SimOptions) -> io::Result<Self> {
        let control = TcpListener::bind(options.control).await?;
        let control_addr = control.local_addr()?;
        let server = Arc::new(Server::bind(options)?);
        server.apply().await?;
        let task = tokio::spawn(control::serve(server.clone(), control));
        Ok(Self {
            server,
            control_addr,
            control: task.abort_handle(),
        })
    }

    /// Returns the address of the model server, the same after a stop.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr
    }

    /// Returns the address of the control port.
    pub fn control_addr(&self) -> SocketAddr {
        self.control_addr
    }

    /// Returns the base URL of the model server: `http://ADDRESS/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.server.addr)
    }

    /// Returns the name it was given.
    pub fn name(&self) -> &str {
        &self.server.shared.options.name
    }

    /// Refuses new connections and cuts the open ones, as if the process had
    /// been killed. When it returns, both are done. The port stays reserved.
    pub async fn stop(&self) {
        self.server.stop().await;
    }

    /// Listens again on the same port; the model loads again.
    ///
    /// # Errors
    /// The port cannot be bound.
    pub async fn start_again(&self) -> io::Result<()> {
        self.server.start_again().await
    }

    /// Whether connections are accepted.
    pub fn is_listening(&self) -> bool {
        self.server.shared.listening.load(Ordering::Acquire)
    }

    /// Sets faults by their text form, one a line; all others are cleared.
    ///
    /// # Errors
    /// A knob is not understood; nothing is changed.
    pub async fn fault(&self, text: &str) -> Result<(), FaultError> {
        let faults = Fault::parse_all(text)?;
        self.set_faults(faults).await;
        Ok(())
    }

    /// Sets one fault; all others are cleared.
    pub async fn set_fault(&self, fault: Fault) {
        self.set_faults(vec![fault]).await;
    }

    /// Sets faults in order: for each request the first that matches and is not
    /// used up is taken.
    pub async fn set_faults(&self, faults: Vec<Fault>) {
        if let Err(error) = self.server.set_faults(faults).await {
            log::error!(
                "simulator cannot listen again: addr={} error={error}",
                self.addr()
            );
        }
    }

    /// Clears all faults.
    pub async fn clear_faults(&self) {
        self.set_faults(Vec::new()).await;
    }

    /// Returns what was received, oldest first.
    pub fn records(&self) -> Vec<Record> {
        self.server.shared.log.all()
    }

    /// Forgets what was received.
    pub fn clear_records(&self) {
        self.server.shared.log.clear();
    }

    /// Waits until the records are as `seen` wants them, and returns them.
    ///
    /// # Errors
    /// They are not in time; the error holds what was recorded instead.
    pub async fn wait_for(
        &self,
        deadline: Duration,
        seen: impl FnMut(&[Record]) -> bool,
    ) -> Result<Vec<Record>, NotSeen> {
        self.server.shared.log.wait_for(deadline, seen).await
    }

    /// Returns how many connections there are and were.
    pub fn connections(&self) -> Connections {
        self.server.shared.connections()
    }

    /// Waits until the connections are as `seen` wants them.
    ///
    /// # Errors
    /// They are not in time; the error says how they are instead.
    pub async fn wait_for_connections(
        &self,
        deadline: Duration,
        mut seen: impl FnMut(Connections) -> bool,
    ) -> Result<Connections, Connections> {
        let shared = &self.server.shared;
        let until = tokio::time::Instant::now() + deadline;
        loop {
            // Registered before the look, so that no change falls between.
            let changed = shared.connections_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let connections = shared.connections();
            if seen(connections) {
                return Ok(connections);
            }
            if tokio::time::timeout_at(until, changed).await.is_err() {
                return Err(connections);
            }
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.control.abort();
        self.server.abort();
    }
}
