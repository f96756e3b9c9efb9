//! The thread that makes safe from a loss of power what was written.
//!
//! It has the files a second time: a disk that takes its time here is waited for
//! by nobody. What came meanwhile is made safe together, at once.
//!
//! **Invariant:** of each file of lines at most one request waits; of others, at
//! most [`FILES_MAX`].

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    time::{Duration, Instant},
};

use super::{
    account::{Account, Lost},
    segment::sync_folder,
};
use crate::logging::Seldom;

/// How long lines are unsafe at most: what is promised.
const PROMISED: Duration = Duration::from_secs(1);
/// The most files beside those of lines that wait; they are open meanwhile.
const FILES_MAX: usize = 256;
/// How many wait when it is begun before it is due.
const ENOUGH: usize = 64;

/// A file of lines, as both threads know it.
#[derive(Debug)]
pub(super) struct Safety {
    path: PathBuf,
    /// The same open file, which may be made safe after it was given up.
    file: File,
    /// Lines since it was last made safe.
    lines: AtomicU64,
    /// Whether it is asked for and not yet begun.
    asked: AtomicBool,
    /// Whether it is safe that the folder has it.
    named: AtomicBool,
    broken: AtomicBool,
}

impl Safety {
    pub(super) fn new(path: PathBuf, file: File) -> Self {
        Self {
            path,
            file,
            lines: AtomicU64::new(0),
            asked: AtomicBool::new(false),
            named: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        }
    }

    /// Lines were written.
    pub(super) fn add(&self, lines: u64) {
        self.lines.fetch_add(lines, Ordering::Release);
    }

    /// Returns whether it could not be made safe: what is on the disk is not
    /// known, and asking again would only look well. It must not be used on.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    fn make_safe(&self, account: &Account) {
        // In this order: what is written from here on is asked for anew.
        self.asked.store(false, Ordering::SeqCst);
        let lines = self.lines.swap(0, Ordering::SeqCst);
        if lines == 0 {
            return;
        }
        let synced = self.file.sync_data().and_then(|()| {
            if self.named.load(Ordering::Relaxed) {
                return Ok(());
            }
            match sync_folder(self.path.parent().unwrap_or(Path::new("/"))) {
                // Taken away, and the file with it; who writes will see it.
                Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
                synced => synced.map(|()| self.named.store(true, Ordering::Relaxed)),
            }
        });
        if let Err(why) = synced {
            self.broken.store(true, Ordering::Release);
            let file = self.path.display();
            log::error!(
                "lines may not be safe, a new file is begun: file={file} lines={lines} {why}"
            );
            failed(account);
        }
    }
}

/// Something that is to be made safe.
#[derive(Debug)]
enum Unsafe {
    Lines(Arc<Safety>),
    File(PathBuf, File),
}

/// It, and when.
#[derive(Debug)]
pub(super) struct Duty {
    what: Unsafe,
    /// Since when it is unsafe.
    since: Instant,
    due: Instant,
}

/// Asks for things to be made safe; never waits.
#[derive(Debug)]
pub(super) struct Syncer {
    duties: SyncSender<Duty>,
    /// How many files wait.
    files: Arc<AtomicUsize>,
    account: Arc<Account>,
}

/// What [`run`] works on.
#[derive(Debug)]
pub(super) struct Duties {
    receiver: Receiver<Duty>,
    files: Arc<AtomicUsize>,
}

impl Syncer {
    pub(super) fn new(account: &Arc<Account>) -> (Self, Duties) {
        let (duties, receiver) = mpsc::sync_channel(FILES_MAX * 2);
        let files = Arc::new(AtomicUsize::new(0));
        let syncer = Self {
            duties,
            files: Arc::clone(&files),
            account: Arc::clone(account),
        };
        (syncer, Duties { receiver, files })
    }

    /// Asks for the lines of a file, if it has any that are unsafe; `false` if
    /// too much waits already.
    pub(super) fn lines(&self, safety: &Arc<Safety>, now: Instant, most: Duration) -> bool {
        if safety.lines.load(Ordering::SeqCst) == 0 || safety.asked.swap(true, Ordering::SeqCst) {
            return true;
        }
        let taken = self.ask(Unsafe::Lines(Arc::clone(safety)), now, most);
        if !taken {
            safety.asked.store(false, Ordering::SeqCst);
        }
        taken
    }

    /// Looks for room for another file.
    ///
    /// # Errors
    /// There is none: the disk is too slow.
    pub(super) fn room(&self) -> io::Result<()> {
        if self.files.load(Ordering::Relaxed) < FILES_MAX {
            return Ok(());
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Asks for a file that was written and will not be written again, and its
    /// name.
    ///
    /// # Errors
    /// There is no [`room`](Self::room).
    pub(super) fn file(&self, path: PathBuf, file: File, most: Duration) -> io::Result<()> {
        self.room()?;
        self.files.fetch_add(1, Ordering::Relaxed);
        if self.ask(Unsafe::File(path, file), Instant::now(), most) {
            return Ok(());
        }
        self.files.fetch_sub(1, Ordering::Relaxed);
        Err(io::ErrorKind::TimedOut.into())
    }

    fn ask(&self, what: Unsafe, since: Instant, most: Duration) -> bool {
        let due = since + most;
        match self.duties.try_send(Duty { what, since, due }) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => false,
            // There is no thread: better late than never.
            Err(TrySendError::Disconnected(duty)) => {
                if matches!(duty.what, Unsafe::File(..)) {
                    self.files.fetch_sub(1, Ordering::Relaxed);
                }
                make_safe(&[duty], &self.account);
                true
            }
        }
    }
}

/// Works until nobody can ask any more, and all is safe.
pub(super) fn run(duties: &Duties, account: &Account) {
    let told = Seldom::default();
    let mut waiting: Vec<Duty> = Vec::new();
    loop {
        let next = match waiting.iter().map(|duty| duty.due).min() {
            None => duties.receiver.recv().map_err(RecvTimeoutError::from),
            Some(due) => {
                let most = due.saturating_duration_since(Instant::now());
                duties.receiver.recv_timeout(most)
            }
        };
        match next {
            Ok(duty) => {
                waiting.push(duty);
                if waiting.len() < ENOUGH {
                    continue;
                }
            }
            Err(RecvTimeoutError::Disconnected) if waiting.is_empty() => return,
            Err(_) => {}
        }
        make_safe(&waiting, account);
        let files = waiting.iter();
        let files = files.filter(|duty| matches!(duty.what, Unsafe::File(..)));
        duties.files.fetch_sub(files.count(), Ordering::Relaxed);
        let oldest = waiting.iter().map(|duty| duty.since.elapsed()).max();
        waiting.clear();
        if let Some(oldest) = oldest.filter(|oldest| *oldest > PROMISED) {
            account.metrics().capture_syncs_late.inc();
            if let Some(others) = told.due(Instant::now()) {
                let ms = oldest.as_millis();
                log::warn!("the disk is slow, lines were long unsafe: ms={ms} others={others}");
            }
        }
    }
}

/// Makes things safe: lines after what they may name.
fn make_safe(duties: &[Duty], account: &Account) {
    let mut folders = BTreeSet::new();
    for duty in duties {
        if let Unsafe::File(path, file) = &duty.what {
            // The folder may be a new one itself.
            folders.extend(path.ancestors().skip(1).take(2));
            told(path, file.sync_data(), account);
        }
    }
    for folder in folders {
        let synced = sync_folder(folder);
        let is_gone = |why: &io::Error| why.kind() == io::ErrorKind::NotFound;
        if !synced.as_ref().is_err_and(is_gone) {
            told(folder, synced, account);
        }
    }
    for duty in duties {
        if let Unsafe::Lines(safety) = &duty.what {
            safety.make_safe(account);
        }
    }
}

fn told(path: &Path, synced: io::Result<()>, account: &Account) {
    if let Err(why) = synced {
        log::error!("may not be safe: file={} {why}", path.display());
        failed(account);
    }
}

fn failed(account: &Account) {
    account.metrics().capture_sync_failures.inc();
    account.losing(
        Lost::Disk("what was written cannot be made safe"),
        Instant::now(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::Resources;

    const SOON: Duration = Duration::from_millis(1);
    const NEVER: Duration = Duration::from_secs(3600);

    fn bench() -> (tempfile::TempDir, Arc<Account>, Syncer, Duties) {
        let account = Arc::new(Account::new("/captures".into(), &Resources::default()));
        let (syncer, duties) = Syncer::new(&account);
        (tempfile::tempdir().unwrap(), account, syncer, duties)
    }

    fn safety(dir: &Path, name: &str) -> Arc<Safety> {
        let path = dir.join(name);
        let file = File::create(&path).unwrap();
        Arc::new(Safety::new(path, file))
    }

    #[test]
    fn one_file_is_asked_for_once_until_it_is_begun() {
        let (dir, account, syncer, duties) = bench();
        let file = safety(dir.path(), "a");
        let now = Instant::now();
        assert!(syncer.lines(&file, now, SOON), "nothing is unsafe");
        assert!(duties.receiver.try_recv().is_err());
        for _ in 0..1000 {
            file.add(1);
            assert!(syncer.lines(&file, now, SOON));
        }
        let duty = duties.receiver.try_recv().unwrap();
        assert!(duties.receiver.try_recv().is_err());
        make_safe(&[duty], &account);
        assert!(!file.is_broken() && file.lines.load(Ordering::SeqCst) == 0);
        file.add(1);
        assert!(syncer.lines(&file, now, SOON));
        assert!(duties.receiver.try_recv().is_ok(), "asked for anew");
    }

    #[test]
    fn a_disk_that_is_too_slow_is_told_and_not_waited_for() {
        let (dir, account, syncer, duties) = bench();
        let image = |number: usize| {
            let path = dir.path().join(number.to_string());
            let file = File::create(&path).unwrap();
            syncer.file(path, file, NEVER)
        };
        for number in 0..FILES_MAX {
            image(number).unwrap();
        }
        let refused = image(FILES_MAX).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        // Lines have room all the same.
        let file = safety(dir.path(), "lines");
        file.add(1);
        assert!(syncer.lines(&file, Instant::now(), NEVER));
        // Nobody asks any more: what waits is not waited for until it is due.
        let files = Arc::clone(&syncer.files);
        drop(syncer);
        run(&duties, &account);
        assert_eq!(files.load(Ordering::Relaxed), 0);
        assert_eq!(file.lines.load(Ordering::SeqCst), 0);
        assert_eq!(account.metrics().capture_sync_failures.get(), 0);
    }

    #[test]
    fn a_file_that_cannot_be_made_safe_is_broken() {
        let (_dir, account, syncer, duties) = bench();
        // It has no way to be made safe.
        let null = File::options().append(true).open("/dev/null").unwrap();
        let file = Arc::new(Safety::new("/dev/null".into(), null));
        file.add(3);
        assert!(syncer.lines(&file, Instant::now(), SOON));
        drop(syncer);
        run(&duties, &account);
        assert!(file.is_broken());
        assert_eq!(account.metrics().capture_sync_failures.get(), 1);
    }

    #[test]
    fn without_a_thread_it_is_made_safe_at_once() {
        let (dir, _account, syncer, duties) = bench();
        drop(duties);
        let file = safety(dir.path(), "a");
        file.add(1);
        assert!(syncer.lines(&file, Instant::now(), NEVER));
        assert_eq!(file.lines.load(Ordering::SeqCst), 0);
        let path = dir.path().join("b");
        for _ in 0..FILES_MAX * 2 {
            let image = File::create(&path).unwrap();
            syncer.file(path.clone(), image, NEVER).unwrap();
        }
    }
}
