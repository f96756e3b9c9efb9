//! The thread that looks after hours that are over: compresses them, and removes
//! the oldest ([`retain`](super::retain)).
//!
//! **Invariant:** what somebody writes to is never touched: every file is locked
//! first. A compressed file takes its place whole, and is compared with what it
//! replaces before that is removed.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use chrono::{Local, NaiveDateTime, TimeZone as _};
use zstd::stream::{read::Decoder, write::Encoder};

use super::{
    folder::{Live, Settings, Zone},
    retain::{Now, Retention, remove_old},
    segment::{Make, hour_of, hour_of_name, lock, set_tail_aside, sync_folder},
};
use crate::worker::{Inbox, Next};

/// How often there may be something to do.
const PASS_EVERY: Duration = Duration::from_secs(30);
/// How long a file must have rested: what ended in its hour may come late.
const REST: Duration = Duration::from_secs(120);
/// zstd's own default: fast, and a fifth of the size for prose.
const LEVEL: i32 = 3;

/// Works until the queue is closed.
pub(super) fn run(inbox: &Inbox<()>, live: &Live) {
    let mut retention = Retention::default();
    loop {
        let settings = live.settings();
        if let Err(why) = pass(live, &settings, &mut retention, Now::read()) {
            log::warn!("cannot be tidied: dir={} {why}", live.dir.display());
        }
        if inbox.next(PASS_EVERY) == Next::Closed {
            return;
        }
    }
}

/// Does what is due.
fn pass(live: &Live, settings: &Settings, retention: &mut Retention, now: Now) -> io::Result<()> {
    let mut files = match hours(&live.dir, settings.zone) {
        Ok(files) => files,
        // It was not written yet.
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(why) => return Err(why),
    };
    if settings.compress {
        for file in &mut files {
            if live.is_stopping() {
                return Ok(());
            }
            if file.is_plain && file.has_rested(settings.zone, now.wall) {
                match compress(&file.path, live) {
                    Ok(Some(packed)) => *file = HourFile::of(packed, settings.zone)?,
                    Ok(None) => {}
                    Err(why) => {
                        log::warn!("cannot be compressed: file={} {why}", file.path.display());
                    }
                }
            }
        }
    }
    remove_old(live, settings, retention, files, now)
}

/// A file of an hour, or what was set aside of one.
pub(super) struct HourFile {
    pub(super) path: PathBuf,
    /// When the hour began.
    pub(super) began: SystemTime,
    pub(super) hour: String,
    pub(super) bytes: u64,
    pub(super) changed: SystemTime,
    /// Whether it is one that lines are written to.
    pub(super) is_plain: bool,
}

impl HourFile {
    fn of(path: PathBuf, zone: Zone) -> io::Result<Self> {
        let found = fs::symlink_metadata(&path)?;
        let hour = any_hour_of(&path).unwrap_or_default().to_owned();
        Ok(Self {
            began: beginning(&hour, zone).unwrap_or(SystemTime::UNIX_EPOCH),
            bytes: found.len(),
            changed: found.modified()?,
            is_plain: hour_of(&path).is_some(),
            hour,
            path,
        })
    }

    fn has_rested(&self, zone: Zone, now: SystemTime) -> bool {
        let rested = now.duration_since(self.changed).unwrap_or_default() >= REST;
        rested && self.hour != zone.hour(now)
    }
}

/// Returns the files of a folder that are capture's, the oldest first.
fn hours(dir: &Path, zone: Zone) -> io::Result<Vec<HourFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if any_hour_of(&path).is_some_and(|hour| beginning(hour, zone).is_some()) {
            // It may be gone meanwhile.
            files.extend(HourFile::of(path, zone).ok());
        }
    }
    files.sort_by(|a, b| (a.began, &a.path).cmp(&(b.began, &b.path)));
    Ok(files)
}

/// Returns the hour in the name of any file of capture's, compressed and torn
/// ones too.
fn any_hour_of(path: &Path) -> Option<&str> {
    let (name, rest) = path.file_name()?.to_str()?.split_once(".jsonl")?;
    let known = rest.is_empty() || rest == ".zst" || rest.starts_with(".torn");
    hour_of_name(name).filter(|_| known)
}

/// Returns when the hour of a name began.
pub(super) fn beginning(hour: &str, zone: Zone) -> Option<SystemTime> {
    let at = NaiveDateTime::parse_from_str(&format!("{hour}00"), "%Y%m%d_%H%M").ok()?;
    match zone {
        Zone::Utc => Some(at.and_utc().into()),
        // An hour that the clocks leave out was never written.
        Zone::Local => Local.from_local_datetime(&at).earliest().map(Into::into),
    }
}

/// Compresses a file and removes it; returns what took its place, `None` if
/// somebody writes to it or there was no time.
fn compress(path: &Path, live: &Live) -> io::Result<Option<PathBuf>> {
    let Some(file) = lock(path, Make::No)? else {
        return Ok(None);
    };
    if let Some(torn) = set_tail_aside(path, &file)? {
        torn.file.sync_all()?;
    }
    let packed = with_ending(path, ".zst");
    if !packed.exists() {
        let part = hidden(&packed);
        let made = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)?;
        let mut encoder = Encoder::new(made, LEVEL)?;
        encoder.include_checksum(true)?;
        let whole = copy(&mut &*file, &mut encoder, live)?;
        let made = encoder.finish()?;
        if !whole {
            fs::remove_file(&part)?;
            return Ok(None);
        }
        made.sync_all()?;
        drop(made);
        if packed.exists() {
            // Somebody else's, of the same name: theirs is not ours to replace.
            fs::remove_file(&part)?;
            return Ok(None);
        }
        fs::rename(&part, &packed)?;
        sync_folder(&live.dir)?;
    }
    // Also what was left when a process died in between.
    let same = is_same(File::open(path)?, Decoder::new(File::open(&packed)?)?, live)?;
    if !same {
        return Err(io::Error::other("the compressed file has other lines"));
    }
    fs::remove_file(path)?;
    sync_folder(&live.dir)?;
    Ok(Some(packed))
}

/// Copies to the end; `false` if the process stops before that.
fn copy(from: &mut impl Read, to: &mut impl Write, live: &Live) -> io::Result<bool> {
    let mut block = vec![0; 256 * 1024];
    loop {
        if live.is_stopping() {
            return Ok(false);
        }
        match from.read(&mut block)? {
            0 => return Ok(true),
            read => to.write_all(block.get(..read).unwrap_or_default())?,
        }
    }
}

fn is_same(one: impl Read, other: impl Read, live: &Live) -> io::Result<bool> {
    let (mut one, mut other) = (one, BufReader::with_capacity(256 * 1024, other));
    let (mut block, mut theirs) = (vec![0; 256 * 1024], vec![0; 256 * 1024]);
    loop {
        let read = one.read(&mut block)?;
        if read == 0 || live.is_stopping() {
            return Ok(read == 0 && other.read(&mut theirs)? == 0);
        }
        let theirs = theirs.get_mut(..read).unwrap_or_default();
        if other.read_exact(theirs).is_err() || block.get(..read) != Some(&*theirs) {
            return Ok(false);
        }
    }
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Returns a name beside a file that nobody takes for one of an hour.
fn hidden(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".part");
    path.with_file_name(name)
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{plugins::capture::folder::Folder, resources::Resources};

    pub(in super::super) const HOUR: Duration = Duration::from_secs(3600);

    pub(in super::super) struct Bench {
        pub(in super::super) dir: tempfile::TempDir,
        pub(in super::super) live: Live,
        settings: Settings,
        retention: Retention,
        /// 2026-01-02 15:30 UTC.
        pub(in super::super) now: Now,
    }

    pub(in super::super) fn bench(change: impl FnOnce(&mut Settings)) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings {
            zone: Zone::Utc,
            sync: Duration::from_secs(1),
            min_free: 0,
            compress: false,
            max_age: None,
            max_size: None,
        };
        change(&mut settings);
        let folder = Folder::of(dir.path().to_owned(), &settings, &Resources::default());
        Bench {
            live: folder.live(),
            dir,
            settings,
            retention: Retention::default(),
            now: Now {
                wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_367_800),
                steady: Instant::now(),
            },
        }
    }

    impl Bench {
        pub(in super::super) fn write(&self, name: &str, text: &str, age: Duration) {
            let path = self.dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            let file = File::options().write(true).open(path).unwrap();
            file.set_modified(self.now.wall - age).unwrap();
        }

        pub(in super::super) fn pass_time(&mut self, time: Duration) {
            self.now.wall += time;
            self.now.steady += time;
        }

        pub(in super::super) fn pass(&mut self) -> Vec<String> {
            pass(&self.live, &self.settings, &mut self.retention, self.now).unwrap();
            let mut names: Vec<String> = fs::read_dir(self.dir.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    #[test]
    fn hours_that_are_over_are_compressed_whole() {
        let mut bench = bench(|settings| settings.compress = true);
        let lines = "{\"a\":1}\n".repeat(10_000);
        bench.write("20260102_13.jsonl", &format!("{lines}torn"), HOUR);
        bench.write("20260102_14.jsonl", "{}\n", Duration::from_secs(10));
        bench.write("20260102_15.jsonl", "{}\n", HOUR);
        bench.write("notes.jsonl", "{}\n", HOUR);
        let expected = [
            "20260102_13.jsonl.torn",
            "20260102_13.jsonl.zst",
            "20260102_14.jsonl",
            "20260102_15.jsonl",
            "notes.jsonl",
        ];
        assert_eq!(bench.pass(), expected);
        let packed = File::open(bench.dir.path().join("20260102_13.jsonl.zst")).unwrap();
        let mut text = String::new();
        let mut decoder = Decoder::new(packed).unwrap();
        decoder.read_to_string(&mut text).unwrap();
        assert_eq!(text, lines);
        // A process died before it could remove the original.
        bench.write("20260102_13.jsonl", &lines, HOUR);
        assert_eq!(bench.pass(), expected);
        // Another file of that name is nobody's to remove.
        bench.write("20260102_13.jsonl", "{\"other\":1}\n", HOUR);
        assert_eq!(bench.pass().len(), expected.len() + 1);
    }

    #[test]
    fn what_is_written_to_is_left_alone() {
        let mut bench = bench(|settings| {
            settings.compress = true;
            settings.max_age = Some(Duration::ZERO);
        });
        bench.write("20260102_13.jsonl", "{}\n", HOUR);
        let path = bench.dir.path().join("20260102_13.jsonl");
        let held = lock(&path, Make::No).unwrap().unwrap();
        assert_eq!(bench.pass(), ["20260102_13.jsonl"]);
        drop(held);
        assert!(bench.pass().is_empty());
    }
}
