//! The thread that writes: takes exchanges from the queue, turns them into
//! lines, and asks for them to be made safe ([`safe`]) within the time that is
//! promised.
//!
//! **Invariant:** it waits for the disk only in `write(2)`: what is written
//! survives the process.
//!
//! What cannot be written is counted and told, and the folder is tried again
//! every second: nobody has to do anything when there is room again.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    thread::{self, Scope},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;

use super::{
    account::{Account, Lost, Skip},
    collected::Collected,
    folder::{Live, Place, Settings},
    redact::Redactor,
    safe::{self, Syncer},
    segment::{Segment, Torn, repair},
};
use crate::{
    logging::Seldom,
    openai::Endpoint,
    sharegpt::{self, Exchange, Image, Meta, Rewrite, Told, Unreadable},
    worker::{Inbox, Next},
};

/// How often a folder that cannot be written is tried again, and everything
/// else is looked after.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the thread rests when the queue is empty. To be woken for every
/// exchange costs both sides more than the exchange itself.
const REST: Duration = Duration::from_millis(25);
/// How many images are remembered as being there already.
const IMAGES_KNOWN_MAX: usize = 10_000;
/// How old an image may be before another use renews it: retention goes by its
/// age.
pub(super) const IMAGE_FRESH: Duration = Duration::from_secs(600);

/// An exchange on its way to a file.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) endpoint: Endpoint,
    pub(super) request: Bytes,
    pub(super) answer: Collected,
    pub(super) meta: Meta,
    /// When it ended: says which file it belongs to.
    pub(super) at: SystemTime,
    pub(super) redactor: Option<Arc<Redactor>>,
    /// Whether answers that ended at their limit of tokens are kept.
    pub(super) length: bool,
    /// Whether answers that are not whole are kept.
    pub(super) partial: bool,
    /// Its place in the queue; given up when it is counted as something else.
    pub(super) place: Option<Place>,
}

/// Writes until the queue is closed and empty, and all of it is safe.
pub(super) fn run(inbox: &Inbox<Job>, live: &Live) {
    let (syncer, duties) = Syncer::new(&live.account);
    thread::scope(|scope| {
        beside(scope, live, "capture-sync", move || {
            safe::run(&duties, &live.account);
        });
        beside(scope, live, "capture-mend", || mend(live));
        write(inbox, live, syncer);
        live.close();
    });
    log::info!(
        "capture stopped: dir={} {}",
        live.dir.display(),
        live.account
    );
}

/// Starts a thread beside the one that writes.
fn beside<'scope>(
    scope: &'scope Scope<'scope, '_>,
    live: &Live,
    name: &str,
    work: impl FnOnce() + Send + 'scope,
) {
    let named = thread::Builder::new().name(name.to_owned());
    if let Err(why) = named.spawn_scoped(scope, work) {
        log::error!("no thread for {name}: dir={} {why}", live.dir.display());
    }
}

/// Sets aside what is torn of files that processes left when they died.
fn mend(live: &Live) {
    let aside = |torn: Torn| {
        live.account.metrics().capture_torn.inc();
        if let Err(why) = torn.file.sync_all() {
            log::warn!("may not be safe: file={} {why}", torn.path.display());
        }
    };
    match repair(&live.dir, &live.hands, || live.is_stopping(), aside) {
        // It was not written yet, or there is one in the way; the writer says so.
        Err(why)
            if matches!(
                why.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) => {}
        Err(why) => log::warn!("cannot be mended: dir={} {why}", live.dir.display()),
        Ok(()) => {}
    }
}

fn write(inbox: &Inbox<Job>, live: &Live, syncer: Syncer) {
    let mut writer = Writer::new(live, syncer);
    writer.look(Instant::now());
    loop {
        let mut next = inbox.next(LOOK_EVERY);
        let closed = loop {
            match next {
                Next::Item(mut job) => {
                    let place = job.place.take();
                    writer.take(job);
                    drop(place);
                }
                Next::Nothing => break false,
                Next::Closed => break true,
            }
            writer.tick(Instant::now());
            next = inbox.next(Duration::ZERO);
        };
        writer.tick(Instant::now());
        if closed {
            break;
        }
        // Nobody wakes it: whoever puts something into the queue meanwhile has
        // nothing to do but that, and what comes is written in one go.
        thread::park_timeout(REST);
    }
    writer.leave(Instant::now());
}

struct Writer<'a> {
    live: &'a Live,
    syncer: Syncer,
    segment: Option<Segment>,
    /// Files that failed: never written again.
    abandoned: HashSet<PathBuf>,
    /// When the folder is tried again.
    retry: Option<Instant>,
    looked: Option<Instant>,
    /// Whether there is less space than is to be left.
    short: bool,
    images_known: HashSet<String>,
    told: Seldom,
    /// Whether it was told that others can look into the folder.
    told_open: bool,
}

impl<'a> Writer<'a> {
    fn new(live: &'a Live, syncer: Syncer) -> Self {
        Self {
            live,
            syncer,
            segment: None,
            abandoned: HashSet::new(),
            retry: None,
            looked: None,
            short: false,
            images_known: HashSet::new(),
            told: Seldom::default(),
            told_open: false,
        }
    }

    fn account(&self) -> &Account {
        &self.live.account
    }

    fn take(&mut self, job: Job) {
        let now = Instant::now();
        if self.retry.is_some_and(|retry| now < retry) || self.short {
            let why = if self.short {
                LOW
            } else {
                "it cannot be written"
            };
            return self.account().dropped(Lost::Disk(why), now);
        }
        let told = catch_unwind(AssertUnwindSafe(|| tell(&job)));
        let (told, length) = match told {
            Ok(Ok(told)) => told,
            Ok(Err(why)) => return self.account().skipped(why),
            Err(_payload) => {
                self.account().metrics().panics.inc();
                return self.account().dropped(Lost::Writer, now);
            }
        };
        let stem = self.live.settings().zone.hour(job.at);
        drop(job);
        match self.write(&stem, &told, now) {
            Ok(()) => self.account().captured(told.lines.len(), length),
            // It can be written, only not everything.
            Err(why) if why.kind() == io::ErrorKind::TimedOut => {
                self.account().dropped(Lost::Disk(words_for(&why)), now);
            }
            Err(why) => self.failed(&why, now),
        }
    }

    fn write(&mut self, stem: &str, told: &Ready, now: Instant) -> io::Result<()> {
        for image in &told.images {
            self.keep_image(image)?;
        }
        // Once more in a new file, if this one is as long as it may be.
        for _ in 0..2 {
            let count = told.lines.len() as u64;
            let segment = self.segment_of(stem, now)?;
            match segment.append(&told.bytes, count) {
                Ok(()) => return Ok(()),
                Err(why) if why.usable => return Err(why.cause),
                Err(why) => {
                    let is_empty = segment.is_empty();
                    self.abandon(now);
                    if is_empty || why.cause.kind() != io::ErrorKind::FileTooLarge {
                        return Err(why.cause);
                    }
                }
            }
        }
        Err(io::ErrorKind::FileTooLarge.into())
    }

    /// Returns the file of an hour; of another than the one that is open, that
    /// one is closed.
    fn segment_of(&mut self, stem: &str, now: Instant) -> io::Result<&mut Segment> {
        let is_open = self.segment.as_ref().is_some_and(|open| open.stem == stem);
        if !is_open {
            self.leave(now);
            make_folder(&self.live.dir)?;
            let (opened, torn) = {
                let hands = &self.live.hands;
                let _held = hands.lock().unwrap_or_else(PoisonError::into_inner);
                Segment::open(&self.live.dir, stem, &self.abandoned)?
            };
            self.segment = Some(opened);
            if let Some(torn) = torn {
                self.account().metrics().capture_torn.inc();
                self.syncer
                    .file(torn.path, torn.file, self.live.settings().sync)?;
            }
        }
        self.segment
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Closes the file; what is in it is made safe at once.
    fn leave(&mut self, now: Instant) -> Option<PathBuf> {
        self.images_known.clear();
        let segment = self.segment.take()?;
        if !self.syncer.lines(&segment.safety, now, Duration::ZERO) {
            self.account().metrics().capture_sync_failures.inc();
            log::error!(
                "lines may not be safe, the disk is too slow: file={}",
                segment.path.display()
            );
        }
        Some(segment.path)
    }

    /// Never writes to the file again. What is in it may still be good.
    fn abandon(&mut self, now: Instant) {
        let left = self.leave(now);
        self.abandoned.extend(left);
    }

    /// Looks after everything that is due.
    fn tick(&mut self, now: Instant) {
        if let Some(segment) = &self.segment {
            if segment.safety.is_broken() {
                self.abandon(now);
            } else {
                let sync = self.live.settings().sync;
                // With no room it is asked for again.
                self.syncer.lines(&segment.safety, now, sync);
            }
        }
        if self
            .looked
            .is_none_or(|last| now.duration_since(last) >= LOOK_EVERY)
        {
            self.look(now);
        }
    }

    /// Looks whether the folder can be written, the file is there, its hour is
    /// not over, and the disk has room.
    fn look(&mut self, now: Instant) {
        self.looked = Some(now);
        let settings = self.live.settings();
        let hour = settings.zone.hour(SystemTime::now());
        if let Some(segment) = &self.segment {
            if !segment.is_there() {
                log::warn!(
                    "the file is gone, a new one is begun: file={}",
                    segment.path.display()
                );
                self.segment = None;
                self.images_known.clear();
            } else if segment.stem != hour {
                self.leave(now);
            }
        }
        let ready = make_folder(&self.live.dir).and_then(|()| {
            if self.retry.is_some() {
                // Whether it can be written, only writing tells.
                self.segment_of(&hour, now)?;
            }
            Ok(())
        });
        if let Err(why) = ready {
            return self.cannot(&why, now);
        }
        self.close_folders();
        self.retry = None;
        let was_short = std::mem::replace(&mut self.short, is_short(&self.live.dir, &settings));
        if self.short && !was_short {
            self.account().losing(Lost::Disk(LOW), now);
        }
        if !self.short {
            self.account().all_is_well(now);
        }
    }

    fn failed(&mut self, why: &io::Error, now: Instant) {
        self.account().dropped(Lost::Disk(words_for(why)), now);
        self.cannot(why, now);
    }

    fn cannot(&mut self, why: &io::Error, now: Instant) {
        self.retry = Some(now + LOOK_EVERY);
        self.account().losing(Lost::Disk(words_for(why)), now);
        if let Some(others) = self.told.due(now) {
            let dir = self.live.dir.display();
            log::error!("cannot be written: dir={dir} others={others} {why}");
        }
    }

    /// Closes the folders to others, if they were there before and are open.
    fn close_folders(&mut self) {
        for dir in [self.live.dir.clone(), self.live.dir.join("images")] {
            let is_images = dir != self.live.dir;
            if is_images && is_link(&dir) {
                continue; // somebody else's
            }
            match close_folder(&dir) {
                Ok(()) => {}
                Err(_) if self.told_open => {}
                Err(why) => {
                    log::warn!("others can look into it: dir={} {why}", dir.display());
                    self.told_open = true;
                }
            }
        }
    }

    /// Writes an image, unless it is there.
    fn keep_image(&mut self, image: &Image) -> io::Result<()> {
        if self.images_known.contains(&image.name) {
            return Ok(());
        }
        own_folder(&self.live.dir.join("images"))?;
        let path = self.live.dir.join(&image.name);
        let is_fresh = match fs::symlink_metadata(&path) {
            Ok(found) if found.len() == image.bytes.len() as u64 && is_ours(&found) => found
                .modified()
                .ok()
                .and_then(|at| at.elapsed().ok())
                .is_some_and(|age| age < IMAGE_FRESH),
            _ => false,
        };
        if !is_fresh {
            self.write_image(&path, image)?;
        }
        if self.images_known.len() >= IMAGES_KNOWN_MAX {
            self.images_known.clear();
        }
        self.images_known.insert(image.name.clone());
        Ok(())
    }

    /// Writes an image under another name first: it is there whole or not at
    /// all.
    fn write_image(&mut self, path: &Path, image: &Image) -> io::Result<()> {
        self.syncer.room()?;
        let pid = std::process::id();
        let part = path.with_extension(format!("{pid}.part"));
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .and_then(|mut file| {
                file.write_all(&image.bytes)?;
                fs::rename(&part, path)?;
                Ok(file)
            });
        match written {
            Ok(file) => {
                let sync = self.live.settings().sync;
                self.syncer.file(path.to_owned(), file, sync)
            }
            Err(why) => {
                // It may not even be there.
                fs::remove_file(&part).ok();
                Err(why)
            }
        }
    }
}

/// What is told when there is less space than is to be left.
const LOW: &str = "the disk is nearly full";

/// An exchange as it is written.
struct Ready {
    lines: Vec<sharegpt::Line>,
    images: Vec<Image>,
    bytes: Vec<u8>,
}

fn tell(job: &Job) -> Result<(Ready, usize), Skip> {
    let exchange = Exchange {
        endpoint: job.endpoint,
        request: &job.request,
        answer: job.answer.received(),
    };
    let redactor = job.redactor.as_deref();
    let redactor = redactor.map(|redactor| redactor as &dyn Rewrite);
    let told = sharegpt::tell(&exchange, &job.meta, redactor);
    let Told { mut lines, images } = told.map_err(|why| match why {
        Unreadable::Tokens => Skip::Tokens,
        Unreadable::Endpoint => Skip::Endpoint,
        Unreadable::Json | Unreadable::Empty => Skip::Unreadable,
    })?;
    for line in &mut lines {
        // What a filter ended, an upstream's or ours, stops in mid-sentence.
        line.meta.partial |= line.meta.finish_reason == "content_filter";
    }
    if !job.partial {
        lines.retain(|line| !line.meta.partial);
    }
    if lines.is_empty() {
        return Err(Skip::Partial);
    }
    if !job.length {
        lines.retain(|line| line.meta.finish_reason != "length");
    }
    if lines.is_empty() {
        return Err(Skip::Length);
    }
    // Nearly always it is one.
    let bytes = match lines.as_slice() {
        [one] => one.bytes(),
        several => several.iter().flat_map(sharegpt::Line::bytes).collect(),
    };
    let length = bytes.len();
    let ready = Ready {
        lines,
        images,
        bytes,
    };
    Ok((ready, length))
}

/// Makes a folder that only its owner can look into, and those above it.
fn make_folder(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Takes a folder from others who can look into it.
///
/// # Errors
/// It is not ours to close: somebody else's, or one that everybody shares.
fn close_folder(dir: &Path) -> io::Result<()> {
    let found = match fs::metadata(dir) {
        Ok(found) if found.is_dir() => found,
        _ => return Ok(()),
    };
    if is_ours(&found) {
        return Ok(());
    }
    let mode = found.permissions().mode();
    if mode & 0o1000 != 0 {
        return Err(io::Error::other("it is one that everybody shares"));
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(mode & 0o700))?;
    log::warn!("it was open to others, now it is not: {}", dir.display());
    Ok(())
}

/// Returns whether nobody but its owner can use it.
fn is_ours(found: &fs::Metadata) -> bool {
    found.permissions().mode() & 0o077 == 0
}

/// Returns whether a link stands there.
pub(super) fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// Makes a folder within one of ours, unless it is there.
///
/// # Errors
/// It cannot be made, or a link stands in its place: what we write stays where
/// it was asked for.
fn own_folder(dir: &Path) -> io::Result<()> {
    make_folder(dir)?;
    if !is_link(dir) {
        return Ok(());
    }
    let message = format!("a link stands in the place of the folder {}", dir.display());
    Err(io::Error::new(io::ErrorKind::NotADirectory, message))
}

/// Returns whether there is less space than is to be left: of a small disk a
/// twentieth, so that it can be used at all.
fn is_short(dir: &Path, settings: &Settings) -> bool {
    let Ok(disk) = nix::sys::statvfs::statvfs(dir) else {
        return false;
    };
    #[expect(
        clippy::useless_conversion,
        reason = "the fields have other types on other systems"
    )]
    let bytes = |blocks| u64::from(blocks).saturating_mul(u64::from(disk.fragment_size()));
    let least = settings.min_free.min(bytes(disk.blocks()) / 20);
    bytes(disk.blocks_available()) < least
}

/// Says in a few words why a folder cannot be written.
fn words_for(why: &io::Error) -> &'static str {
    match why.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "the disk is full",
        io::ErrorKind::FileTooLarge => "the file is as long as it may be",
        io::ErrorKind::ReadOnlyFilesystem => "the disk is read-only",
        io::ErrorKind::PermissionDenied => "no permission",
        io::ErrorKind::TimedOut => "the disk is too slow",
        io::ErrorKind::NotADirectory | io::ErrorKind::NotFound => "there is no such folder",
        _ => "it cannot be written",
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_link_is_no_folder_of_ours() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let link = dir.path().join("images");
        std::os::unix::fs::symlink(elsewhere.path(), &link).unwrap();
        let refused = own_folder(&link).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotADirectory);
        own_folder(&dir.path().join("other")).unwrap();
        own_folder(&dir.path().join("other")).unwrap();
    }

    use prometheus::IntGauge;

    use super::*;
    use crate::{
        plugins::capture::{
            collected::Bounds,
            folder::{Folder, Zone},
        },
        resources::Resources,
    };

    const ANSWER: &[u8] = br#"{"choices":[{"message":{"content":"yes"}}]}"#;

    fn job(at: SystemTime) -> Job {
        let bounds = Bounds {
            answer: 1000,
            all: 1000,
        };
        let total = IntGauge::new("a", "b").unwrap();
        let mut answer = Collected::new(bounds, &total);
        answer.whole(&Bytes::from_static(ANSWER));
        Job {
            endpoint: Endpoint::ChatCompletions,
            request: Bytes::from_static(br#"{"messages":[{"role":"user","content":"?"}]}"#),
            answer,
            meta: Meta::default(),
            at,
            redactor: None,
            length: true,
            partial: true,
            place: None,
        }
    }

    fn folder_in(dir: &Path) -> Arc<Folder> {
        let settings = Settings {
            zone: Zone::Utc,
            sync: Duration::ZERO,
            min_free: 0,
            compress: false,
            max_age: None,
            max_size: None,
        };
        Folder::of(dir.to_owned(), &settings, &Resources::default())
    }

    #[test]
    fn a_disk_that_makes_nothing_safe_holds_up_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder_in(dir.path());
        let live = folder.live();
        // Nobody ever takes what is asked for here.
        let (syncer, _duties) = Syncer::new(&live.account);
        let mut writer = Writer::new(&live, syncer);
        let first = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_367_800);
        for hours in 0..3 {
            for _ in 0..1000 {
                writer.take(job(first + Duration::from_secs(hours * 3600)));
                writer.tick(Instant::now());
            }
        }
        for name in ["20260102_15", "20260102_16", "20260102_17"] {
            let path = dir.path().join(format!("{name}.jsonl"));
            assert_eq!(fs::read_to_string(path).unwrap().lines().count(), 1000);
        }
        assert_eq!(live.account.metrics().capture_sync_failures.get(), 0);
    }

    #[test]
    fn folders_that_others_can_look_into_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        set(dir.path(), 0o755);
        set(&images, 0o775);
        let folder = folder_in(dir.path());
        let live = folder.live();
        let (syncer, _duties) = Syncer::new(&live.account);
        let mut writer = Writer::new(&live, syncer);
        writer.look(Instant::now());
        assert_eq!((mode(dir.path()), mode(&images)), (0o700, 0o700));
        // Such as /tmp.
        set(dir.path(), 0o1777);
        writer.look(Instant::now());
        assert_eq!(mode(dir.path()), 0o1777);
    }
}
