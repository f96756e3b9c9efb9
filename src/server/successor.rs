//! The old process of an upgrade: it starts its successor, and leaves to it only
//! when that serves.
//!
//! **Invariant:** until the successor has said that it serves, nothing has changed
//! here: whatever becomes of it, this process accepts and serves as before.

use std::{
    env, fmt, io,
    os::{fd::AsFd, unix::net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};

use super::{
    handshake::{FromSuccessor, LINE_MAX, MARK, ToSuccessor, line, message, send},
    sockets::Sockets,
};
use crate::lifecycle::Successor;

/// How long it may take from its sockets to the first connection.
const SERVES_WITHIN: Duration = Duration::from_secs(10);
/// How long the exit status of one that has closed its channel is waited for.
const EXITS_WITHIN: Duration = Duration::from_secs(1);

/// How this process was started: so its successor is, too.
#[derive(Clone, Debug)]
pub(super) struct Program {
    path: PathBuf,
    arguments: Vec<std::ffi::OsString>,
}

impl Program {
    /// Looks at the arguments of this process. The path is the one it was called
    /// by, not the file that this was: a link that points to another version by
    /// now is followed, and a file that was replaced is taken as it is.
    pub(super) fn this() -> Self {
        let mut arguments = env::args_os();
        let name = arguments.next().map(PathBuf::from).unwrap_or_default();
        let here = env::current_dir().unwrap_or_default();
        let found = if name.components().count() > 1 || name.is_absolute() {
            Some(here.join(&name))
        } else {
            let path = env::var_os("PATH").unwrap_or_default();
            let all = env::split_paths(&path).map(|folder| here.join(folder).join(&name));
            all.into_iter().find(|file| file.is_file())
        };
        let found = found.filter(|file| file.is_file());
        Self {
            path: found.or_else(|| env::current_exe().ok()).unwrap_or(name),
            arguments: arguments.collect(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Why there is no successor.
#[derive(Debug)]
pub(super) struct Failure {
    /// Metric label.
    pub(super) outcome: &'static str,
    pub(super) reason: String,
}

impl Failure {
    fn new(outcome: &'static str, reason: impl fmt::Display) -> Self {
        Self {
            outcome,
            reason: reason.to_string(),
        }
    }
}

/// A successor that serves.
pub(super) struct Serving {
    pub(super) successor: Successor,
    pub(super) child: Child,
    /// Closed, it says that this process has ended.
    pub(super) channel: BufReader<UnixStream>,
}

impl Serving {
    /// Says that it is the main process from now on. One that is of a version
    /// before this message does not listen, which is no error.
    pub(super) async fn leads(&mut self) {
        let Ok(line) = line(&ToSuccessor::Lead {}) else {
            return;
        };
        if let Err(why) = self.channel.get_mut().write_all(&line).await {
            log::warn!("the successor cannot be told that it leads: {why}");
        }
    }
}

/// A successor that does not serve yet.
struct Candidate {
    child: Unproven,
    channel: BufReader<UnixStream>,
}

/// A process that is killed if it is dropped.
struct Unproven(Option<Child>);

impl Drop for Unproven {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // An error is one that has ended by itself.
            child.start_kill().ok();
        }
    }
}

/// Starts a successor and hands it the sockets that it wants. `prepare` is how
/// long it may take over loading.
pub(super) async fn start(
    program: &Program,
    sockets: &Sockets,
    prepare: Duration,
) -> Result<Serving, Failure> {
    if std::process::id() == 1 {
        let reason = "this is the first process of its container, which would end with it: \
                      start another container instead";
        return Err(Failure::new("not_started", reason));
    }
    let mut candidate = spawn(program).map_err(|why| {
        let path = program.path.display();
        Failure::new("not_started", format!("{path} cannot be executed: {why}"))
    })?;
    let addresses = sockets.addresses();
    let greeting = ToSuccessor::Listening { addresses };
    let prepared = async {
        candidate.say(&greeting, &[]).await?;
        candidate.hear().await
    };
    let Ok(prepared) = timeout(prepare, prepared).await else {
        let reason = format!("it was not prepared within {prepare:?}");
        return Err(Failure::new("timed_out", reason));
    };
    let (version, wants) = match prepared {
        Ok(FromSuccessor::Prepared { version, wants }) => (version, wants),
        other => return Err(candidate.unfit(other, "before it was prepared").await),
    };
    let handles = wants.iter().map(|address| sockets.of(address));
    let handles: Vec<_> = handles
        .collect::<io::Result<_>>()
        .map_err(|why| Failure::new("not_served", format!("a socket that it wants: {why}")))?;
    let take = ToSuccessor::Take { addresses: wants };
    let serves = async {
        let handles: Vec<_> = handles.iter().map(AsFd::as_fd).collect();
        candidate.say(&take, &handles).await?;
        candidate.hear().await
    };
    let Ok(serves) = timeout(SERVES_WITHIN, serves).await else {
        let reason = format!("it did not serve within {SERVES_WITHIN:?}");
        return Err(Failure::new("not_served", reason));
    };
    match serves {
        Ok(FromSuccessor::Serving {}) => {}
        other => return Err(candidate.unfit(other, "before it served").await),
    }
    let Candidate { mut child, channel } = candidate;
    let running = child.0.take().and_then(|child| Some((child.id()?, child)));
    let (pid, child) = running.ok_or_else(|| Failure::new("died", "it has ended"))?;
    Ok(Serving {
        successor: Successor { pid, version },
        child,
        channel,
    })
}

fn spawn(program: &Program) -> io::Result<Candidate> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let channel = BufReader::new(UnixStream::from_std(ours)?);
    let child = Command::new(&program.path)
        .args(&program.arguments)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .env(MARK, std::process::id().to_string())
        // It names this process; without it, whoever has the interval is meant.
        .env_remove("WATCHDOG_PID")
        .spawn()?;
    Ok(Candidate {
        child: Unproven(Some(child)),
        channel,
    })
}

impl Candidate {
    async fn say(
        &mut self,
        message: &ToSuccessor,
        handles: &[std::os::fd::BorrowedFd<'_>],
    ) -> io::Result<()> {
        let line = line(message)?;
        let channel = self.channel.get_mut();
        let sent = channel
            .async_io(Interest::WRITABLE, || send(&*channel, &line, handles))
            .await?;
        channel
            .write_all(line.get(sent..).unwrap_or_default())
            .await
    }

    async fn hear(&mut self) -> io::Result<FromSuccessor> {
        let mut line = Vec::new();
        let most = u64::try_from(LINE_MAX).unwrap_or(u64::MAX);
        let mut bounded = (&mut self.channel).take(most);
        bounded.read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        message(&line)
    }

    /// Says what was wrong with what it said.
    async fn unfit(&mut self, said: io::Result<FromSuccessor>, when: &str) -> Failure {
        let why = match said {
            Ok(FromSuccessor::Failed { reason }) => return Failure::new("refused", reason),
            Ok(other) => return Failure::new("refused", format!("it said {other:?} {when}")),
            Err(why) => why,
        };
        let Some(child) = &mut self.child.0 else {
            return Failure::new("died", why);
        };
        match timeout(EXITS_WITHIN, child.wait()).await {
            Ok(Ok(status)) => {
                let reason = format!("it ended {when}: {status}; its log says why");
                Failure::new("died", reason)
            }
            _ => Failure::new("died", format!("it cannot be understood {when}: {why}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_the_file_that_was_called() {
        let program = Program::this();
        assert!(program.path().is_absolute());
        assert!(program.path().is_file());
    }
}
