//! Notices that the configuration changed, and has the gateway take it.
//!
//! The *folder* of each file is watched, since editors write a new file and
//! rename it, and ConfigMaps swap a link two levels up. Watching alone misses
//! network file systems and links into other folders, so the files are looked
//! at every second as well. What counts is the bytes: touching a file does
//! nothing.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use pingora::{server::ShutdownWatch, services::background::BackgroundService};
use sha2::{Digest, Sha256};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::spawn_blocking,
    time::{interval, sleep},
};

use crate::{gateway::Gateway, logging::LogHandle};

/// How often the files are looked at although nothing was reported.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the files must stay the same before they are read: an editor that
/// writes in place does so in several steps.
const SETTLE: Duration = Duration::from_millis(100);
/// How often settling is waited for; then the file is read as it is.
const SETTLE_ROUNDS: usize = 10;

/// The bytes of every watched file, as one digest.
type Fingerprint = [u8; 32];

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

    async fn reload(&self) {
        let gateway = Arc::clone(&self.gateway);
        let log = Arc::clone(&self.log);
        let reloaded = spawn_blocking(move || {
            // The gateway says in the log what became of it.
            if let Ok(snapshot) = gateway.reload() {
                log.set_level(snapshot.config().log.level);
            }
        });
        if let Err(why) = reloaded.await {
            log::error!("reload failed: {why}");
        }
    }
}

#[async_trait]
impl BackgroundService for Reloader {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        // One note is enough, however many changes there are.
        let (note, mut changed) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |_event| {
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
        loop {
            watch_folders(watcher.as_mut(), &mut watched, &self.gateway.watched());
            let asked = tokio::select! {
                _ = shutdown.changed() => return,
                _ = look.tick() => false,
                Some(()) = changed.recv() => false,
                Some(()) = hangup(&mut hangups) => true,
            };
            let now = self.fingerprint().await;
            if now != seen {
                seen = self.settled(now).await;
                self.reload().await;
                // A reload may watch other files than before.
                seen = if self
                    .gateway
                    .last_reload()
                    .is_some_and(|last| last.problems.is_empty())
                {
                    self.fingerprint().await
                } else {
                    seen
                };
            } else if asked {
                log::info!("SIGHUP: reloading");
                self.reload().await;
                seen = self.fingerprint().await;
            }
        }
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
    let mut digest = Sha256::new();
    for file in files {
        // A file that cannot be read differs from one that is empty.
        match fs::read(file) {
            Ok(bytes) => {
                digest.update([1]);
                digest.update(bytes.len().to_le_bytes());
                digest.update(&bytes);
            }
            Err(_unreadable) => digest.update([0]),
        }
    }
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

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
