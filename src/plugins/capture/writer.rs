//! The thread that writes: takes exchanges from the queue, turns them into
//! lines, and sees to it that they are safe within the time that is promised.
//!
//! What cannot be written is counted and told, and the folder is tried again
//! every second: nobody has to do anything when there is room again.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;

use super::{
    account::{Account, Lost, Skip},
    collected::Collected,
    folder::{Live, Place, Settings},
    redact::Redactor,
    segment::{Segment, repair, sync_folder},
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
const IMAGE_FRESH: Duration = Duration::from_secs(600);
/// How many new images are made safe together.
const IMAGES_UNSYNCED_MAX: usize = 64;

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
    /// Its place in the queue; given up when it is counted as something else.
    pub(super) place: Option<Place>,
}

/// Writes until the queue is closed and empty.
pub(super) fn run(inbox: &Inbox<Job>, live: &Live) {
    let mut writer = Writer::new(live);
    writer.look(Instant::now());
    loop {
        let mut next = inbox.next(writer.patience(Instant::now()));
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
    writer.close();
    live.close();
    log::info!(
        "capture stopped: dir={} {}",
        live.dir.display(),
        live.account
    );
}

struct Writer<'a> {
    live: &'a Live,
    segment: Option<Segment>,
    /// Files that failed: never written again.
    abandoned: HashSet<PathBuf>,
    /// When the first of the lines that are not safe yet was written.
    unsynced_since: Option<Instant>,
    /// When the folder is tried again.
    retry: Option<Instant>,
    looked: Option<Instant>,
    repaired: bool,
    /// Whether there is less space than is to be left.
    short: bool,
    images_known: HashSet<String>,
    images_unsynced: Vec<File>,
    told: Seldom,
}

impl<'a> Writer<'a> {
    fn new(live: &'a Live) -> Self {
        Self {
            live,
            segment: None,
            abandoned: HashSet::new(),
            unsynced_since: None,
            retry: None,
            looked: None,
            repaired: false,
            short: false,
            images_known: HashSet::new(),
            images_unsynced: Vec::new(),
            told: Seldom::default(),
        }
    }

    fn account(&self) -> &Account {
        &self.live.account
    }

    /// How long the queue is waited for.
    fn patience(&self, now: Instant) -> Duration {
        let sync = self.live.settings().sync;
        match self.unsynced_since {
            Some(since) => (since + sync).saturating_duration_since(now),
            None => LOOK_EVERY,
        }
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
            let segment = self.segment_of(stem)?;
            match segment.append(&told.bytes, count) {
                Ok(()) => {
                    self.unsynced_since.get_or_insert(now);
                    return Ok(());
                }
                Err(why) if why.usable => return Err(why.cause),
                Err(why) => {
                    let is_empty = segment.unsynced == 0;
                    self.abandon();
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
    fn segment_of(&mut self, stem: &str) -> io::Result<&mut Segment> {
        let is_open = self.segment.as_ref().is_some_and(|open| open.stem == stem);
        if !is_open {
            self.rotate();
            make_folder(&self.live.dir)?;
            let opened = Segment::open(&self.live.dir, stem, &self.abandoned)?;
            self.segment = Some(opened);
        }
        self.segment
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Closes the file; what is in it is safe then.
    fn rotate(&mut self) {
        self.sync();
        self.segment = None;
        self.images_known.clear();
    }

    /// Never writes to the file again.
    fn abandon(&mut self) {
        if let Some(mut segment) = self.segment.take() {
            // What is in it may still be good; whether it is, nobody can say.
            if segment.sync().is_err() {
                self.account().metrics().capture_sync_failures.inc();
            }
            self.abandoned.insert(segment.path);
        }
        self.unsynced_since = None;
    }

    fn sync(&mut self) {
        self.unsynced_since = None;
        let images = std::mem::take(&mut self.images_unsynced);
        let mut synced = images.iter().try_for_each(File::sync_data);
        if !images.is_empty() {
            synced = synced.and_then(|()| sync_folder(&self.live.dir.join("images")));
        }
        let Some(segment) = &mut self.segment else {
            return;
        };
        let in_doubt = segment.unsynced;
        synced = segment.sync().and(synced);
        if let Err(why) = synced {
            let account = &self.live.account;
            account.metrics().capture_sync_failures.inc();
            log::error!(
                "lines may not be safe, a new file is begun: file={} lines={in_doubt} {why}",
                segment.path.display()
            );
            account.losing(
                Lost::Disk("what was written cannot be made safe"),
                Instant::now(),
            );
            self.abandoned.insert(segment.path.clone());
            self.segment = None;
        }
    }

    /// Looks after everything that is due.
    fn tick(&mut self, now: Instant) {
        let sync = self.live.settings().sync;
        if self
            .unsynced_since
            .is_some_and(|since| now.duration_since(since) >= sync)
        {
            self.sync();
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
                self.unsynced_since = None;
                self.images_known.clear();
            } else if segment.stem != hour {
                self.rotate();
            }
        }
        let ready = make_folder(&self.live.dir).and_then(|()| {
            if !self.repaired {
                let torn = repair(&self.live.dir)?;
                self.account().metrics().capture_torn.inc_by(torn);
                self.repaired = true;
            }
            if self.retry.is_some() {
                // Whether it can be written, only writing tells.
                self.segment_of(&hour)?;
            }
            Ok(())
        });
        if let Err(why) = ready {
            return self.cannot(&why, now);
        }
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

    /// Writes an image, unless it is there.
    fn keep_image(&mut self, image: &Image) -> io::Result<()> {
        if self.images_known.contains(&image.name) {
            return Ok(());
        }
        let path = self.live.dir.join(&image.name);
        let is_fresh = match fs::symlink_metadata(&path) {
            Ok(found) if found.len() == image.bytes.len() as u64 => found
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
        make_folder(&self.live.dir.join("images"))?;
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
                self.images_unsynced.push(file);
                if self.images_unsynced.len() >= IMAGES_UNSYNCED_MAX {
                    self.sync();
                }
                Ok(())
            }
            Err(why) => {
                // It may not even be there.
                fs::remove_file(&part).ok();
                Err(why)
            }
        }
    }

    fn close(&mut self) {
        self.rotate();
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
    if !job.length {
        lines.retain(|line| line.meta.finish_reason != "length");
        if lines.is_empty() {
            return Err(Skip::Length);
        }
    }
    let mut bytes = Vec::new();
    for line in &lines {
        bytes.append(&mut line.bytes());
    }
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
        io::ErrorKind::NotADirectory | io::ErrorKind::NotFound => "there is no such folder",
        _ => "it cannot be written",
    }
}
