//! The thread that looks after hours that are over: compresses them, and removes
//! the oldest, by age and by size.
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
    loop {
        let settings = live.settings();
        if let Err(why) = pass(live, &settings, SystemTime::now()) {
            log::warn!("cannot be tidied: dir={} {why}", live.dir.display());
        }
        if inbox.next(PASS_EVERY) == Next::Closed {
            return;
        }
    }
}

/// Does what is due.
fn pass(live: &Live, settings: &Settings, now: SystemTime) -> io::Result<()> {
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
            if file.is_plain && file.has_rested(settings.zone, now) {
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
    remove_old(live, settings, files, now)
}

/// A file of an hour, or what was set aside of one.
struct HourFile {
    path: PathBuf,
    /// When the hour began.
    began: SystemTime,
    hour: String,
    bytes: u64,
    changed: SystemTime,
    /// Whether it is one that lines are written to.
    is_plain: bool,
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
fn beginning(hour: &str, zone: Zone) -> Option<SystemTime> {
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

/// Removes what is too old or too much, and images that nothing left can name.
fn remove_old(
    live: &Live,
    settings: &Settings,
    files: Vec<HourFile>,
    now: SystemTime,
) -> io::Result<()> {
    if settings.max_age.is_none() && settings.max_size.is_none() {
        return Ok(());
    }
    let images = images(&live.dir)?;
    let mut total: u64 = files.iter().map(|file| file.bytes).sum();
    total += images.iter().map(|image| image.bytes).sum::<u64>();
    let mut oldest = None;
    for file in files {
        let ended = file.began + Duration::from_secs(3600);
        let age = now.duration_since(ended).unwrap_or_default();
        let reason = if settings.max_age.is_some_and(|most| age > most) {
            "age"
        } else if settings.max_size.is_some_and(|most| total > most) {
            "size"
        } else {
            ""
        };
        let is_open = file.hour == settings.zone.hour(now);
        if reason.is_empty() || is_open || !remove(&file)? {
            oldest.get_or_insert(file.began);
            continue;
        }
        total = total.saturating_sub(file.bytes);
        let family = &live.account.metrics().capture_files_removed;
        family.with_label_values(&[reason]).inc();
        log::info!("removed: file={} reason={reason}", file.path.display());
    }
    // An image is renewed when it is used again.
    let oldest = oldest.unwrap_or(now) - Duration::from_secs(3600);
    for image in images.iter().filter(|image| image.changed < oldest) {
        fs::remove_file(&image.path)?;
    }
    Ok(())
}

/// Removes a file, unless somebody writes to it.
fn remove(file: &HourFile) -> io::Result<bool> {
    let _held = if file.is_plain {
        match lock(&file.path, Make::No)? {
            Some(held) => Some(held),
            None => return Ok(false),
        }
    } else {
        None
    };
    fs::remove_file(&file.path).map(|()| true)
}

struct ImageFile {
    path: PathBuf,
    bytes: u64,
    changed: SystemTime,
}

fn images(dir: &Path) -> io::Result<Vec<ImageFile>> {
    let entries = match fs::read_dir(dir.join("images")) {
        Ok(entries) => entries,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(why) => return Err(why),
    };
    let mut images = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Ok(found) = entry.metadata()
            && found.is_file()
        {
            images.push(ImageFile {
                path: entry.path(),
                bytes: found.len(),
                changed: found.modified()?,
            });
        }
    }
    Ok(images)
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
mod tests {
    use super::*;
    use crate::{plugins::capture::folder::Folder, resources::Resources};

    const HOUR: Duration = Duration::from_secs(3600);

    struct Bench {
        dir: tempfile::TempDir,
        live: Live,
        settings: Settings,
        /// 2026-01-02 15:30 UTC.
        now: SystemTime,
    }

    fn bench(change: impl FnOnce(&mut Settings)) -> Bench {
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
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_367_800),
        }
    }

    impl Bench {
        fn write(&self, name: &str, text: &str, age: Duration) {
            let path = self.dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            let file = File::options().write(true).open(path).unwrap();
            file.set_modified(self.now - age).unwrap();
        }

        fn pass(&self) -> Vec<String> {
            pass(&self.live, &self.settings, self.now).unwrap();
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
        let bench = bench(|settings| settings.compress = true);
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
        let bench = bench(|settings| {
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

    #[test]
    fn the_oldest_go_by_age_and_by_size() {
        let by_age = bench(|settings| settings.max_age = Some(HOUR * 2));
        for name in ["20260102_11", "20260102_12", "20260102_14", "20260102_15"] {
            by_age.write(&format!("{name}.jsonl"), "{}\n", HOUR);
        }
        by_age.write("20260102_10.jsonl.zst", "{}\n", HOUR);
        by_age.write("20260102_10.jsonl.torn", "{}\n", HOUR);
        by_age.write("images/old.png", "x", HOUR * 9);
        by_age.write("images/new.png", "x", HOUR);
        // 12:00 to 13:00 ended two and a half hours ago.
        let left = ["20260102_14.jsonl", "20260102_15.jsonl", "images"];
        assert_eq!(by_age.pass(), left);
        let images = by_age.dir.path().join("images");
        assert!(!images.join("old.png").exists() && images.join("new.png").exists());

        let by_size = bench(|settings| settings.max_size = Some(250));
        for name in ["20260102_13", "20260102_14", "20260102_15"] {
            by_size.write(&format!("{name}.jsonl"), &"x".repeat(100), HOUR);
        }
        assert_eq!(by_size.pass(), ["20260102_14.jsonl", "20260102_15.jsonl"]);
        // The file of this hour stays, however large.
        let tiny = bench(|settings| settings.max_size = Some(1));
        tiny.write("20260102_15.jsonl", &"x".repeat(100), HOUR);
        assert_eq!(tiny.pass(), ["20260102_15.jsonl"]);
    }
}
