//! Notices that the configuration changed, and has the gateway take it.
//!
//! The *folder* of each file is watched, since editors write a new file and
//! rename it, and ConfigMaps swap a link two levels up. Watching alone misses
//! network file systems and links into other folders, so the files are looked
//! at every second as well. What counts is the bytes: touching a file does
//! nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use pingora::{server::ShutdownWatch, services::background::BackgroundService};
use sha2::{Digest, Sha256};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::spawn_blocking,
    time::{interval, sleep},
};

use crate::{gateway::Gateway, lifecycle::turned, logging::LogHandle};

/// How often the files are looked at although nothing was reported.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the files must stay the same before they are read: an editor that
/// writes in place does so in several steps.
const SETTLE: Duration = Duration::from_millis(100);
/// How often settling is waited for; then the file is read as it is.
const SETTLE_ROUNDS: usize = 10;

/// The digest of every watched file; `None` for one that cannot be read.
type Fingerprint = BTreeMap<PathBuf, Option<[u8; 32]>>;

/// The background job that reloads.
#[derive(Debug)]
pub struct Reloader {
    gateway: Arc<Gateway>,
    log: Arc<LogHandle>,
}

impl Reloader {
    /// Makes the job; it runs when the server does.
    pub fn new(gateway: Arc<Gateway>, log: Arc<LogHandle>) -> Self {
        Self { gateway, log }
    }

    async fn fingerprint(&self) -> Fingerprint {
        let files = self.gateway.watched();
        spawn_blocking(move || digest(&files))
            .await
            .unwrap_or_default()
    }

    /// Waits until the files have stopped changing.
    async fn settled(&self, mut seen: Fingerprint) -> Fingerprint {
        for _ in 0..SETTLE_ROUNDS {
            sleep(SETTLE).await;
            let now = self.fingerprint().await;
            if now == seen {
                break;
            }
            seen = now;
        }
        seen
    }

    /// Returns whether what is live was made from what the files say now.
    async fn is_current(&self) -> bool {
        let gateway = Arc::clone(&self.gateway);
        spawn_blocking(move || gateway.is_current())
            .await
            .unwrap_or(true)
    }

    /// Reloads, unless `POST /reload` was faster.
    async fn reload(&self, why: Why) {
        let gateway = Arc::clone(&self.gateway);
        let log = Arc::clone(&self.log);
        let reloaded = spawn_blocking(move || {
            let is_taken = || {
                let last = gateway.last_reload();
                last.is_none_or(|last| last.problems.is_empty()) && gateway.is_current()
            };
            if why == Why::Changed && is_taken() {
                log.apply(&gateway.snapshot().config().log);
                return;
            }
            // The gateway says in the log what became of it.
            if let Ok(snapshot) = gateway.reload() {
                log.apply(&snapshot.config().log);
            }
        });
        if let Err(why) = reloaded.await {
            log::error!("reload failed: {why}");
        }
    }
}

/// Why to reload.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// The files hold other bytes.
    Changed,
    /// Somebody asked for it, changed or not.
    Asked,
}

#[async_trait]
impl BackgroundService for Reloader {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let mut leaving = self.gateway.resources.lifecycle.leaving();
        // One note is enough, however many changes there are.
        let (note, mut changed) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.is_ok_and(|event| !is_change(&event)) {
                return;
            }
            let _full_is_fine = note.try_send(());
        });
        let mut watcher = match watcher {
            Ok(watcher) => Some(watcher),
            Err(why) => {
                log::warn!("files cannot be watched, looking every second only: {why}");
                None
            }
        };
        let mut watched = BTreeSet::new();
        let mut hangups = signal(SignalKind::hangup()).ok();
        let mut look = interval(LOOK_EVERY);
        let mut seen = self.fingerprint().await;
        // What changed since it was read, and before it was first looked at.
        let mut stale = !self.is_current().await;
        loop {
            watch_folders(watcher.as_mut(), &mut watched, &self.gateway.watched());
            let asked = tokio::select! {
                biased;
                () = turned(&mut leaving) => break,
                Some(()) = hangup(&mut hangups) => true,
                () = std::future::ready(()), if stale => false,
                Some(()) = changed.recv() => {
                    // A busy folder (a log beside the configuration) is looked
                    // at now and then, not for each of its events.
                    sleep(SETTLE).await;
                    changed.try_recv().ok();
                    false
                }
                _ = look.tick() => false,
            };
            let now = self.fingerprint().await;
            let changed = now != seen;
            if changed {
                seen = self.settled(now).await;
            }
            if asked {
                log::info!("SIGHUP: reloading");
                self.reload(Why::Asked).await;
            } else if changed || stale {
                self.reload(Why::Changed).await;
            } else {
                continue;
            }
            // What was seen is from before the files were read: a change that
            // came in between is found by the next look. For a file that is
            // new to the list only the snapshot knows what was read.
            let watched = self.fingerprint().await;
            let is_new = watched.keys().any(|file| !seen.contains_key(file));
            seen = watched
                .into_iter()
                .map(|(file, now)| {
                    let before = seen.get(&file).copied();
                    (file, before.unwrap_or(now))
                })
                .collect();
            stale = is_new && !self.is_current().await;
        }
        while hangup(&mut hangups).await.is_some() {
            log::warn!("SIGHUP: not reloading, this process is stopping");
        }
    }
}

/// Returns whether an event may be a change of a file.
///
/// Opening and reading are events too, our own among them: looking at the files
/// for each of those would be a loop that never rests.
fn is_change(event: &Event) -> bool {
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

async fn hangup(signals: &mut Option<tokio::signal::unix::Signal>) -> Option<()> {
    match signals {
        Some(signals) => signals.recv().await,
        None => std::future::pending().await,
    }
}

/// Watches the folders of these files that are not watched yet.
fn watch_folders(
    watcher: Option<&mut RecommendedWatcher>,
    watched: &mut BTreeSet<PathBuf>,
    files: &[PathBuf],
) {
    let Some(watcher) = watcher else {
        return;
    };
    for file in files {
        let folder = match file.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if !watched.insert(folder.to_owned()) {
            continue;
        }
        if let Err(why) = watcher.watch(folder, RecursiveMode::NonRecursive) {
            log::warn!("folder cannot be watched: {} {why}", folder.display());
        }
    }
}

fn digest(files: &[PathBuf]) -> Fingerprint {
    files
        .iter()
        .map(|file| {
            let bytes = fs::read(file).ok();
            let digest = bytes.map(|bytes| Sha256::digest(bytes).into());
            (file.clone(), digest)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use notify::event::{CreateKind, ModifyKind};

    use super::*;

    #[test]
    fn reading_a_file_is_no_change() {
        let of = |kind| is_change(&Event::new(kind));
        assert!(!of(EventKind::Access(AccessKind::Open(AccessMode::Any))));
        assert!(!of(EventKind::Access(AccessKind::Read)));
        assert!(!of(EventKind::Access(AccessKind::Close(AccessMode::Read))));
        assert!(of(EventKind::Access(AccessKind::Close(AccessMode::Write))));
        assert!(of(EventKind::Modify(ModifyKind::Any)));
        assert!(of(EventKind::Create(CreateKind::File)));
    }

    #[test]
    fn only_other_bytes_are_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.yaml");
        let files = [file.clone()];
        let missing = digest(&files);
        fs::write(&file, "a: 1").unwrap();
        let first = digest(&files);
        fs::write(&file, "a: 1").unwrap();
        assert_eq!(digest(&files), first);
        fs::write(&file, "a: 2").unwrap();
        assert_ne!(digest(&files), first);
        fs::write(&file, "").unwrap();
        assert_ne!(digest(&files), missing);
    }
}
