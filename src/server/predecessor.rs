//! The new process of an upgrade: what it says to the one that started it.

use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::parent_id},
    },
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    time::timeout,
};

use super::handshake::{FromSuccessor, MARK, ToSuccessor, line, message, receive};

/// How long the old process may take over a line; it waits for ours, and has
/// nothing else to do.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take from the first connection until the service manager knows.
const LEADS_WITHIN: Duration = Duration::from_secs(10);

/// The process that started this one, to be its successor.
#[derive(Clone, Debug)]
pub(crate) struct Predecessor {
    channel: Arc<UnixStream>,
    listening: Vec<String>,
}

impl Predecessor {
    /// Returns who started this process to be its successor; `None` if nobody did.
    ///
    /// # Errors
    /// Somebody did, and does not say what has to be known.
    pub(crate) fn find() -> io::Result<Option<Self>> {
        // A mark that was passed on to a process that somebody started else names
        // another parent.
        let parent = std::env::var_os(MARK);
        if parent.is_none_or(|parent| *parent != *parent_id().to_string()) {
            return Ok(None);
        }
        let channel = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        channel.set_read_timeout(Some(PATIENCE))?;
        channel.set_write_timeout(Some(PATIENCE))?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        let (line, _none) = receive(&channel)?;
        let ToSuccessor::Listening { addresses } = message(&line)? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        Ok(Some(Self {
            channel: Arc::new(channel),
            listening: addresses,
        }))
    }

    /// Returns whether it listens there.
    pub(super) fn listens_at(&self, address: &str) -> bool {
        self.listening.iter().any(|other| *other == address)
    }

    /// Says that all is loaded, and waits for the sockets of these addresses.
    ///
    /// # Errors
    /// It gives none: it has thought better of it, or is gone.
    pub(super) fn ask_for(&self, wants: &[String]) -> io::Result<Vec<(String, OwnedFd)>> {
        self.say(&FromSuccessor::Prepared {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            wants: wants.to_vec(),
        })?;
        let (line, sockets) = receive(&self.channel)?;
        let ToSuccessor::Take { addresses } = message(&line)? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        Ok(addresses.into_iter().zip(sockets).collect())
    }

    /// Says that this process accepts. Nobody there to hear it is no error.
    pub(super) fn serving(&self) {
        if let Err(why) = self.say(&FromSuccessor::Serving {}) {
            log::warn!("the process before this one is gone: {why}");
        }
    }

    /// Waits until this process is the main one (`leads` is called then), and until
    /// the old one has ended.
    pub(super) async fn outlive(&self, leads: impl FnOnce()) {
        let channel = match self.watch() {
            Ok(channel) => channel,
            Err(why) => {
                log::warn!("the process before this one cannot be watched: {why}");
                return leads();
            }
        };
        let mut channel = BufReader::new(channel);
        let mut line = String::new();
        // One that is of a version before that message says nothing, and closes.
        timeout(LEADS_WITHIN, channel.read_line(&mut line))
            .await
            .ok();
        leads();
        // Whatever else it may have to say.
        tokio::io::copy(&mut channel, &mut tokio::io::sink())
            .await
            .ok();
    }

    fn watch(&self) -> io::Result<tokio::net::UnixStream> {
        let channel = self.channel.try_clone()?;
        channel.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(channel)
    }

    /// Says why this process cannot serve.
    pub(crate) fn failed(&self, reason: &str) {
        // It will see the end of this process as well.
        self.say(&FromSuccessor::failed(reason)).ok();
    }

    fn say(&self, message: &FromSuccessor) -> io::Result<()> {
        (&*self.channel).write_all(&line(message)?)
    }
}
