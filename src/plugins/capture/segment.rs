//! One file of an hour: its name, who may write to it, and whole lines only.
//!
//! A file belongs to the process that holds its lock, which the system gives
//! back when a process dies, however it dies. Another process takes the next
//! name: `20260102_15.jsonl`, then `20260102_15-2.jsonl`.
//!
//! **Invariant:** what stands in a file is never changed. What has no end of
//! line at the very end, and only that, is moved to a file beside it.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
};

use super::safe::Safety;

/// The most files of one hour.
const FILES_MAX: u32 = 999;

/// A file that is written to.
#[derive(Debug)]
pub(super) struct Segment {
    /// Its place.
    pub(super) path: PathBuf,
    /// The hour in its name.
    pub(super) stem: String,
    file: Flock<File>,
    length: u64,
    identity: (u64, u64),
    /// How its lines become safe.
    pub(super) safety: Arc<Safety>,
}

/// Why lines are not in a file.
#[derive(Debug)]
pub(super) struct Unwritten {
    /// The system's reason.
    pub(super) cause: io::Error,
    /// Whether the file can be used on.
    pub(super) usable: bool,
}

impl Segment {
    /// Opens the first file of an hour that nobody else writes to, or makes it.
    /// Also returns its torn end, if it had one.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(super) fn open(
        dir: &Path,
        stem: &str,
        avoid: &HashSet<PathBuf>,
    ) -> io::Result<(Self, Option<Torn>)> {
        for number in 1..=FILES_MAX {
            let name = match number {
                1 => format!("{stem}.jsonl"),
                _ => format!("{stem}-{number}.jsonl"),
            };
            let path = dir.join(name);
            if avoid.contains(&path) || is_compressed(&path) {
                continue;
            }
            let Some(file) = lock(&path, Make::Yes)? else {
                continue;
            };
            let found = file.metadata()?;
            let safety = Safety::new(path.clone(), file.try_clone()?);
            let mut segment = Self {
                path,
                stem: stem.to_owned(),
                length: found.len(),
                identity: identity(&found),
                file,
                safety: Arc::new(safety),
            };
            let torn = set_tail_aside(&segment.path, &segment.file)?;
            segment.length -= torn.as_ref().map_or(0, |torn| torn.bytes);
            return Ok((segment, torn));
        }
        Err(io::Error::other("too many files of one hour"))
    }

    /// Appends lines by one write; all of them are there then, or none.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub(super) fn append(&mut self, lines: &[u8], count: u64) -> Result<(), Unwritten> {
        let mut rest = lines;
        while !rest.is_empty() {
            match (&*self.file).write(rest) {
                Ok(0) => return Err(self.undo(io::ErrorKind::WriteZero.into())),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err(self.undo(why)),
            }
        }
        self.length += lines.len() as u64;
        self.safety.add(count);
        Ok(())
    }

    /// Takes back what was written of lines that have no room.
    fn undo(&self, cause: io::Error) -> Unwritten {
        let undone = self.file.set_len(self.length);
        // The file itself is as long as it may be.
        let full = cause.kind() == io::ErrorKind::FileTooLarge;
        Unwritten {
            usable: undone.is_ok() && !full,
            cause,
        }
    }

    /// Returns whether nothing stands in it.
    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Returns whether the name still means this file.
    pub(super) fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity)
    }
}

/// Whether a file that is not there is made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Make {
    Yes,
    No,
}

/// Opens a file and locks it; `None` if it is somebody else's, or no file.
///
/// # Errors
/// It cannot be opened.
pub(super) fn lock(path: &Path, make: Make) -> io::Result<Option<Flock<File>>> {
    // To open a pipe would wait for its reader.
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => return Ok(None),
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(make == Make::Yes)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(path);
    let file = match file {
        Ok(file) => file,
        Err(why) if why.raw_os_error() == Some(Errno::ELOOP as i32) => return Ok(None),
        Err(why) => return Err(why),
    };
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => file,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, why)) => return Err(why.into()),
    };
    // Whoever held it before may have put it away in between.
    let is_same = fs::symlink_metadata(path)
        .and_then(|there| Ok(identity(&there) == identity(&file.metadata()?)))
        .unwrap_or(false);
    if !is_same {
        return Ok(None);
    }
    match close_to_others(path, &file) {
        Ok(()) => Ok(Some(file)),
        // Somebody else's: what we write must not be his.
        Err(why) if make == Make::Yes => {
            log::warn!(
                "not written to, others may read it: file={} {why}",
                path.display()
            );
            Ok(None)
        }
        Err(_) => Ok(Some(file)),
    }
}

/// Takes a file from others who may read it.
fn close_to_others(path: &Path, file: &File) -> io::Result<()> {
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        file.set_permissions(fs::Permissions::from_mode(mode & 0o700))?;
        log::warn!("it was open to others, now it is not: {}", path.display());
    }
    Ok(())
}

/// Returns whether a file of an hour was compressed, and is closed for good.
fn is_compressed(path: &Path) -> bool {
    let mut name = path.as_os_str().to_owned();
    name.push(".zst");
    Path::new(&name).symlink_metadata().is_ok()
}

/// The end of a file that had no end of line.
#[derive(Debug)]
pub(super) struct Torn {
    /// Where it is now.
    pub(super) path: PathBuf,
    /// That file; it is not safe yet.
    pub(super) file: File,
    /// How many bytes it has.
    pub(super) bytes: u64,
}

/// Moves what stands behind the last end of line to a file beside it.
///
/// The line was being written when a process or the machine died: it was never
/// whole.
///
/// # Errors
/// It cannot be moved; the file is as it was.
pub(super) fn set_tail_aside(path: &Path, file: &File) -> io::Result<Option<Torn>> {
    const BLOCK: u64 = 64 * 1024;
    let length = file.metadata()?.len();
    let mut end = length;
    // Nearly always: then that is all there is to read.
    let mut block = vec![0];
    if length == 0 || (file.read_exact_at(&mut block, length - 1).is_ok() && block == *b"\n") {
        return Ok(None);
    }
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        block.resize(usize::try_from(end - start).unwrap_or(0), 0);
        file.read_exact_at(&mut block, start)?;
        if let Some(at) = memchr::memrchr(b'\n', &block) {
            end = start + at as u64 + 1;
            break;
        }
        end = start;
    }
    let (name, mut aside) = make_aside(path)?;
    let mut from = end;
    while from < length {
        let size = (length - from).min(BLOCK);
        block.resize(usize::try_from(size).unwrap_or(0), 0);
        file.read_exact_at(&mut block, from)?;
        aside.write_all(&block)?;
        from += size;
    }
    file.set_len(end)?;
    let bytes = length - end;
    log::warn!(
        "a torn line was set aside: file={} bytes={bytes}",
        path.display(),
    );
    Ok(Some(Torn {
        path: name,
        file: aside,
        bytes,
    }))
}

fn make_aside(path: &Path) -> io::Result<(PathBuf, File)> {
    let mut taken = None;
    for number in 1..=FILES_MAX {
        let mut name = path.as_os_str().to_owned();
        name.push(".torn");
        if number > 1 {
            name.push(format!("-{number}"));
        }
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(Path::new(&name));
        match made {
            Err(why) if why.kind() == io::ErrorKind::AlreadyExists => taken = Some(why),
            made => return Ok((name.into(), made?)),
        }
    }
    Err(taken.unwrap_or_else(|| io::ErrorKind::AlreadyExists.into()))
}

/// Sets the torn tails aside of all files that nobody writes to, and shows each.
/// What cannot be looked at is left alone. While it has a file in hand it holds
/// `hands`, never for long. Ends early if `stops`.
///
/// # Errors
/// The folder cannot be read.
pub(super) fn repair(
    dir: &Path,
    hands: &Mutex<()>,
    stops: impl Fn() -> bool,
    mut show: impl FnMut(Torn),
) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        if stops() {
            return Ok(());
        }
        let path = entry?.path();
        if hour_of(&path).is_none() {
            continue;
        }
        let repaired = {
            let _held = hands.lock().unwrap_or_else(PoisonError::into_inner);
            match lock(&path, Make::No) {
                Ok(Some(file)) => set_tail_aside(&path, &file),
                Ok(None) => Ok(None),
                Err(why) => Err(why),
            }
        };
        match repaired {
            Ok(torn) => torn.into_iter().for_each(&mut show),
            Err(why) => log::warn!("cannot be looked at: file={} {why}", path.display()),
        }
    }
    Ok(())
}

/// Returns the hour in the name of a file that capture writes to: of
/// `20260102_15-2.jsonl` `20260102_15`.
pub(super) fn hour_of(path: &Path) -> Option<&str> {
    hour_of_name(path.file_name()?.to_str()?.strip_suffix(".jsonl")?)
}

/// The same of a name without its ending.
pub(super) fn hour_of_name(name: &str) -> Option<&str> {
    let (hour, number) = match name.split_once('-') {
        Some((hour, number)) => (hour, Some(number)),
        None => (name, None),
    };
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (day, of_day) = hour.split_once('_')?;
    let is_hour = day.len() == 8 && of_day.len() == 2 && is_digits(day) && is_digits(of_day);
    (is_hour && number.is_none_or(is_digits)).then_some(hour)
}

/// Makes safe that a file is in its folder.
pub(super) fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn identity(found: &fs::Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const HOUR: &str = "20260102_15";

    fn open(dir: &Path) -> Segment {
        Segment::open(dir, HOUR, &HashSet::new()).unwrap().0
    }

    fn repaired(dir: &Path) -> usize {
        let mut torn = 0;
        repair(dir, &Mutex::default(), || false, |_| torn += 1).unwrap();
        torn
    }

    fn name(segment: &Segment) -> &str {
        segment.path.file_name().unwrap().to_str().unwrap()
    }

    #[test]
    fn every_writer_has_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = open(dir.path());
        let second = open(dir.path());
        assert_eq!(name(&first), "20260102_15.jsonl");
        assert_eq!(name(&second), "20260102_15-2.jsonl");
        first.append(b"{}\n", 1).unwrap();
        let path = first.path.clone();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(first);
        // Free again, and what is in it stays.
        let mut first = open(dir.path());
        first.append(b"[]\n", 1).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{}\n[]\n");
        assert!(first.is_there());
        fs::remove_file(&path).unwrap();
        assert!(!first.is_there());
    }

    #[test]
    fn a_file_that_others_can_read_is_closed_to_them() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["20260102_14.jsonl", "20260102_15.jsonl"].map(|name| dir.path().join(name));
        for path in &paths {
            fs::write(path, "{}\n").unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        }
        drop(open(dir.path()));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(paths.each_ref().map(|path| mode(path)), [0o644, 0o600]);
        // Those of other hours when they are looked at.
        assert!(lock(&paths[0], Make::No).unwrap().is_some());
        assert_eq!(mode(&paths[0]), 0o600);
    }

    #[test]
    fn what_is_no_file_of_ours_is_stepped_over() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/dev/null", dir.path().join("20260102_15.jsonl")).unwrap();
        fs::create_dir(dir.path().join("20260102_15-2.jsonl")).unwrap();
        fs::write(dir.path().join("20260102_15-3.jsonl.zst"), "").unwrap();
        let avoid = HashSet::from([dir.path().join("20260102_15-4.jsonl")]);
        let (segment, _) = Segment::open(dir.path(), HOUR, &avoid).unwrap();
        assert_eq!(name(&segment), "20260102_15-5.jsonl");
    }

    #[test]
    fn a_torn_tail_is_set_aside_whatever_its_length() {
        let long = "x".repeat(200_000);
        for (before, whole, tail) in [
            ("{}\n{\"a\"", "{}\n", "{\"a\""),
            ("{\"a\"", "", "{\"a\""),
            (&format!("{{}}\n{long}"), "{}\n", &long),
            (&format!("{long}\n{{"), &format!("{long}\n"), "{"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("20260102_15.jsonl");
            fs::write(&path, before).unwrap();
            assert_eq!(repaired(dir.path()), 1);
            assert_eq!(fs::read_to_string(&path).unwrap(), whole);
            let aside = dir.path().join("20260102_15.jsonl.torn");
            assert_eq!(fs::read_to_string(aside).unwrap(), tail);
            assert_eq!(repaired(dir.path()), 0, "nothing is left to do");
            // The next one does not replace it.
            fs::write(&path, "again").unwrap();
            drop(open(dir.path()));
            let aside = dir.path().join("20260102_15.jsonl.torn-2");
            assert_eq!(fs::read_to_string(aside).unwrap(), "again");
        }
    }

    #[test]
    fn corruption_in_the_middle_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("20260102_15.jsonl");
        let damaged = b"{}\n{\"a\xff\0\n{}\n";
        fs::write(&path, damaged).unwrap();
        assert_eq!(repaired(dir.path()), 0);
        let mut segment = open(dir.path());
        segment.append(b"[]\n", 1).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [&damaged[..], b"[]\n"].concat());
    }

    #[test]
    fn a_file_that_somebody_writes_to_is_not_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let segment = open(dir.path());
        fs::write(&segment.path, "half").unwrap();
        assert_eq!(repaired(dir.path()), 0);
        assert_eq!(fs::read_to_string(&segment.path).unwrap(), "half");
    }

    #[test]
    fn only_names_of_ours_are_hours() {
        for good in ["20260102_15.jsonl", "20260102_15-12.jsonl"] {
            assert_eq!(hour_of(Path::new(good)), Some(HOUR), "{good}");
        }
        for bad in [
            "20260102_15.jsonl.zst",
            "20260102_15-.jsonl",
            "20260102_15-x.jsonl",
            "2026010_15.jsonl",
            "20260102-15.jsonl",
            ".jsonl",
            "notes.jsonl",
        ] {
            assert_eq!(hour_of(Path::new(bad)), None, "{bad}");
        }
    }
}
