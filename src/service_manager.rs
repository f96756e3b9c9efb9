//! What the service manager is told of this process: sd_notify(3).
//!
//! Only the main process of a unit is heard. So a successor says nothing until it is
//! that, and who has named a successor says nothing more.

use std::{
    fmt, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sd_notify::NotifyState;

/// The variable that says where it listens: a path, or `@` and an abstract name.
const SOCKET: &str = "NOTIFY_SOCKET";

/// The one that started this process, if it wants to hear from it (`NOTIFY_SOCKET`).
/// One per process.
#[derive(Default)]
pub struct ServiceManager {
    // Also the order of what is said.
    voice: Mutex<Voice>,
}

/// Whether this process may speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Voice {
    /// It does not serve yet.
    #[default]
    NotYet,
    /// It is the main process.
    Speaks,
    /// Another is the main process.
    NoMore,
}

/// The configuration is being read; over when it is dropped.
#[derive(Debug)]
pub struct Reloading<'a>(&'a ServiceManager);

impl Drop for Reloading<'_> {
    fn drop(&mut self) {
        self.0.say(|_| vec![NotifyState::Ready]);
    }
}

impl ServiceManager {
    /// Returns whether somebody wants to hear.
    pub fn listens() -> bool {
        std::env::var_os(SOCKET).is_some_and(|socket| !socket.is_empty())
    }

    /// Returns how long it waits for [`alive`](Self::alive) before it takes the
    /// process for dead; `None` if it does not.
    pub fn patience() -> Option<Duration> {
        sd_notify::watchdog_enabled().filter(|_| Self::listens())
    }

    /// Says that this process serves, as the main one.
    pub fn ready(&self, status: &str) {
        let mut voice = self.voice();
        if *voice == Voice::NotYet {
            *voice = Voice::Speaks;
            send(&[NotifyState::Ready, NotifyState::Status(status)]);
        }
    }

    /// Says that the configuration is being read, and, when what is returned is
    /// dropped, that it is not any more.
    pub fn reloading(&self) -> Reloading<'_> {
        self.say(|_| {
            let mut states = vec![NotifyState::Reloading];
            // Asked for from systemd 253 on.
            states.extend(NotifyState::monotonic_usec_now());
            states
        });
        Reloading(self)
    }

    /// Says who is the main process from now on.
    pub fn hand_over(&self, successor: u32) {
        self.say(|voice| {
            *voice = Voice::NoMore;
            vec![NotifyState::MainPid(successor)]
        });
    }

    /// Says that it stops, and how long that may take: longer than the unit allows,
    /// if the configuration wants that.
    pub fn stopping(&self, most: Duration) {
        // The crate's own variant ends at 71 minutes.
        let most = format!("EXTEND_TIMEOUT_USEC={}", most.as_micros());
        self.say(|_| {
            vec![
                NotifyState::Stopping,
                NotifyState::Custom(&most),
                NotifyState::Status("finishing what is under way"),
            ]
        });
    }

    /// Says that it is alive.
    pub fn alive(&self) {
        self.say(|_| vec![NotifyState::Watchdog]);
    }

    fn say<'a>(&self, what: impl FnOnce(&mut Voice) -> Vec<NotifyState<'a>>) {
        let mut voice = self.voice();
        if *voice == Voice::Speaks {
            send(&what(&mut voice));
        }
    }

    fn voice(&self) -> MutexGuard<'_, Voice> {
        self.voice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send(states: &[NotifyState<'_>]) {
    let lines: Vec<_> = states.iter().map(ToString::to_string).collect();
    if let Err(why) = tell(&lines.join("\n")) {
        log::warn!("the service manager cannot be told: {why}");
    }
}

/// The crate's own takes a name that begins with `@` for a path.
fn tell(message: &str) -> io::Result<()> {
    let Some(socket) = std::env::var_os(SOCKET).filter(|socket| !socket.is_empty()) else {
        return Ok(());
    };
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&socket)?,
    };
    let ours = UnixDatagram::unbound()?;
    ours.send_to_addr(message.as_bytes(), &address).map(drop)
}

impl fmt::Debug for ServiceManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceManager")
            .field("voice", &*self.voice())
            .finish()
    }
}
