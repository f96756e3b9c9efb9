//! A folder of captures: the one thread that writes to it, whatever routes and
//! snapshots use it.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use chrono::{DateTime, Local, Utc};
use prometheus::IntGauge;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    account::{Account, Lost},
    keep,
    writer::{self, Job},
};
use crate::{
    metrics::Metrics,
    resources::Resources,
    worker::{Worker, Workers},
};

/// The most bytes of a queue, whatever the settings say.
const QUEUE_MAX: usize = 1 << 30;

/// Which time files are named by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Zone {
    /// Coordinated universal time: every day has 24 files.
    #[default]
    Utc,
    /// The time of this machine.
    Local,
}

impl Zone {
    /// Returns the hour that a moment is in, as files are named by.
    pub(super) fn hour(self, at: SystemTime) -> String {
        const FORMAT: &str = "%Y%m%d_%H";
        match self {
            Self::Utc => DateTime::<Utc>::from(at).format(FORMAT).to_string(),
            Self::Local => DateTime::<Local>::from(at).format(FORMAT).to_string(),
        }
    }
}

/// How a folder is written and kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) zone: Zone,
    /// How long lines may be unsafe.
    pub(super) sync: Duration,
    /// Bytes of the disk that are left to others.
    pub(super) min_free: u64,
    pub(super) compress: bool,
    pub(super) max_age: Option<Duration>,
    pub(super) max_size: Option<u64>,
}

/// What the threads of a folder know.
pub(super) struct Live {
    pub(super) dir: PathBuf,
    pub(super) account: Arc<Account>,
    /// Held by who opens a file of lines or mends one, so that each waits for the
    /// other instead of taking the file for somebody else's.
    pub(super) hands: Mutex<()>,
    settings: Arc<Mutex<Arc<Settings>>>,
    stopping: Arc<AtomicBool>,
}

impl Live {
    pub(super) fn settings(&self) -> Arc<Settings> {
        let settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&settings)
    }

    /// Whatever takes long is to end.
    pub(super) fn close(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// The place that an exchange has in the queue, as the metrics show it.
#[derive(Debug)]
pub(super) struct Place {
    bytes: i64,
    exchanges: IntGauge,
    queue: IntGauge,
}

impl Place {
    fn new(bytes: usize, metrics: &Metrics) -> Self {
        let place = Self {
            bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
            exchanges: metrics.capture_waiting.clone(),
            queue: metrics.capture_queue_bytes.clone(),
        };
        place.exchanges.inc();
        place.queue.add(place.bytes);
        place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.exchanges.dec();
        self.queue.sub(self.bytes);
    }
}

/// A folder of captures.
pub(super) struct Folder {
    dir: PathBuf,
    pub(super) account: Arc<Account>,
    settings: Arc<Mutex<Arc<Settings>>>,
    stopping: Arc<AtomicBool>,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    writer: Option<Arc<Worker<Job>>>,
    keeper: Option<Arc<Worker<()>>>,
}

/// Every folder that is in use.
#[derive(Default)]
struct Folders(Mutex<HashMap<PathBuf, Weak<Folder>>>);

impl Folder {
    /// Returns a folder, the same for everybody who names it.
    pub(super) fn of(dir: PathBuf, settings: &Settings, resources: &Resources) -> Arc<Self> {
        let folders = resources.shared::<Folders>("capture");
        let mut folders = folders.0.lock().unwrap_or_else(PoisonError::into_inner);
        folders.retain(|_, folder| folder.strong_count() > 0);
        if let Some(folder) = folders.get(&dir).and_then(Weak::upgrade) {
            return folder;
        }
        let told: Arc<str> = dir.display().to_string().into();
        let folder = Arc::new(Self {
            account: Arc::new(Account::new(told, resources)),
            settings: Arc::new(Mutex::new(Arc::new(settings.clone()))),
            stopping: Arc::default(),
            threads: Mutex::default(),
            dir: dir.clone(),
        });
        folders.insert(dir, Arc::downgrade(&folder));
        folder
    }

    /// Where it is.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts the threads that do not run yet, and gives them their settings.
    pub(super) fn start(&self, settings: &Settings, workers: &Workers) {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings.clone());
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let threads = &mut *threads;
        if threads.writer.is_none() {
            let live = self.live();
            let started = Worker::start("capture", QUEUE_MAX, workers, move |inbox| {
                writer::run(&inbox, &live);
            });
            threads.writer = started.map_err(|why| self.no_thread(&why)).ok();
        }
        let wants_keeper =
            settings.compress || settings.max_age.is_some() || settings.max_size.is_some();
        if threads.keeper.is_none() && wants_keeper {
            let live = self.live();
            let started = Worker::start("capture-keep", 1, workers, move |inbox| {
                keep::run(&inbox, &live);
            });
            threads.keeper = started.map_err(|why| self.no_thread(&why)).ok();
        } else if let Some(keeper) = &threads.keeper {
            // What the settings say now may be due at once.
            keeper.offer((), 0).ok();
        }
    }

    fn no_thread(&self, why: &std::io::Error) {
        log::error!(
            "no thread to capture with: dir={} {why}",
            self.dir.display()
        );
    }

    /// Returns what the threads are given.
    pub(super) fn live(&self) -> Live {
        Live {
            dir: self.dir.clone(),
            account: Arc::clone(&self.account),
            hands: Mutex::default(),
            settings: Arc::clone(&self.settings),
            stopping: Arc::clone(&self.stopping),
        }
    }

    /// Puts an exchange into the queue, if no more than `most` bytes wait; else
    /// it is lost.
    pub(super) fn offer(&self, mut job: Job, most: usize) {
        /// What an exchange takes beside its words.
        const REST: usize = 1024;
        let writer = {
            let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            threads.writer.clone()
        };
        let Some(writer) = writer else {
            return self.account.dropped(Lost::Writer, Instant::now());
        };
        let bytes = job.request.len() + job.answer.bytes() + REST;
        if writer.waiting().saturating_add(bytes) > most {
            return self.account.dropped(Lost::Queue, Instant::now());
        }
        job.answer.handed_over();
        job.place = Some(Place::new(bytes, self.account.metrics()));
        if writer.offer(job, bytes).is_err() {
            self.account.dropped(Lost::Queue, Instant::now());
        }
    }
}

impl fmt::Debug for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Folder")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_are_named_by_their_time() {
        // 2026-12-31 23:59:59 UTC and a second later.
        let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
        assert_eq!(Zone::Utc.hour(at(1_798_761_599)), "20261231_23");
        assert_eq!(Zone::Utc.hour(at(1_798_761_600)), "20270101_00");
        assert_eq!(Zone::Local.hour(at(1_798_761_600)).len(), 11);
    }

    #[test]
    fn who_names_the_same_folder_gets_the_same() {
        let resources = Resources::default();
        let settings = Settings {
            zone: Zone::Utc,
            sync: Duration::from_secs(1),
            min_free: 0,
            compress: false,
            max_age: None,
            max_size: None,
        };
        let one = Folder::of("/a".into(), &settings, &resources);
        let same = Folder::of("/a".into(), &settings, &resources);
        let other = Folder::of("/b".into(), &settings, &resources);
        assert!(Arc::ptr_eq(&one, &same));
        assert!(!Arc::ptr_eq(&one, &other));
    }
}
