//! A file that is renamed when it has grown: `forebay.log` → `forebay.log.1` →
//! `forebay.log.2` → … and a new one begun.
//!
//! The file may be deleted, moved or replaced by anybody at any time, another
//! Forebay that writes to it during an upgrade included: whether the path still
//! means the file that is open is looked up every second and before every
//! rename.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::sinks::count;

/// How often the path is looked up.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How large a file may grow and how many are kept; may change at any time.
pub(super) struct Bounds {
    size: AtomicU64,
    keep: AtomicU32,
}

impl Bounds {
    /// `size` in bytes; `keep` rotated files beside the current one, at least 1.
    pub(super) fn new(size: u64, keep: u32) -> Self {
        Self {
            size: AtomicU64::new(size),
            keep: AtomicU32::new(keep.max(1)),
        }
    }

    pub(super) fn set(&self, size: u64, keep: u32) {
        self.size.store(size, Ordering::Relaxed);
        self.keep.store(keep.max(1), Ordering::Relaxed);
    }
}

/// What did not work. The file goes on as well as it can.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) lines_lost: u64,
    pub(super) cause: io::Error,
}

/// The log file.
pub(super) struct RotatingFile {
    path: PathBuf,
    bounds: Arc<Bounds>,
    /// `None` while it cannot be opened.
    open: Option<Open>,
    looked: Option<Instant>,
    /// When a rotation last failed: the file then grows beyond its bound for a
    /// while, rather than losing lines.
    stuck: Option<Instant>,
}

struct Open {
    file: File,
    /// Device and inode.
    identity: (u64, u64),
    size: u64,
    /// Whether the last line is cut short, by a disk that was full.
    torn: bool,
}

impl RotatingFile {
    /// Opens the file for appending, or makes it, readable by owner and group.
    ///
    /// # Errors
    /// It cannot be opened, or is no regular file: a rename would replace a
    /// device, and a pipe would make everybody wait.
    pub(super) fn open(path: PathBuf, bounds: Arc<Bounds>) -> io::Result<Self> {
        let open = Some(Open::at(&path)?);
        Ok(Self {
            path,
            bounds,
            open,
            looked: None,
            stuck: None,
        })
    }

    /// Appends whole lines, and rotates when they would not fit.
    ///
    /// # Errors
    /// The last thing that went wrong; what could be written is.
    pub(super) fn write(&mut self, lines: &[u8], now: Instant) -> Result<(), Trouble> {
        let mut trouble = None;
        if let Err(cause) = self.look(now) {
            trouble = Some(cause);
        }
        let mut lines_lost = 0;
        let mut rest = lines;
        while !rest.is_empty() {
            let size_max = self.bounds.size.load(Ordering::Relaxed);
            let size = self.open.as_ref().map_or(0, |open| open.size);
            let mut run = fitting(rest, size_max.saturating_sub(size));
            if run == 0 && size > 0 && self.may_rotate(now) {
                match self.rotate() {
                    Ok(()) => run = fitting(rest, size_max),
                    Err(cause) => {
                        self.stuck = Some(now);
                        trouble = Some(cause);
                    }
                }
            }
            // A single line may be longer than any file; and a file that cannot
            // be rotated takes them all.
            let run = if run == 0 { first_line(rest) } else { run };
            let (part, later) = rest.split_at_checked(run).unwrap_or((rest, &[]));
            rest = later;
            match &mut self.open {
                Some(open) => {
                    if let Err(why) = open.append(part) {
                        lines_lost += why.lines_lost;
                        trouble = Some(why.cause);
                    }
                }
                None => {
                    lines_lost += count(part);
                    trouble.get_or_insert_with(|| io::ErrorKind::NotFound.into());
                }
            }
        }
        match trouble {
            Some(cause) => Err(Trouble { lines_lost, cause }),
            None => Ok(()),
        }
    }

    /// Opens the path anew if it means another file than the one that is open.
    fn look(&mut self, now: Instant) -> io::Result<()> {
        let recently = self
            .looked
            .is_some_and(|last| now.duration_since(last) < LOOK_EVERY);
        if recently {
            return Ok(());
        }
        self.looked = Some(now);
        if self.is_ours() {
            Ok(())
        } else {
            self.reopen()
        }
    }

    /// Returns whether the path still means the file that is open.
    fn is_ours(&self) -> bool {
        let Some(open) = &self.open else { return false };
        fs::metadata(&self.path).is_ok_and(|found| identity(&found) == open.identity)
    }

    fn reopen(&mut self) -> io::Result<()> {
        // The old file, if there is one, no longer has the name: lines in it
        // would not be found.
        self.open = None;
        self.open = Some(Open::at(&self.path)?);
        Ok(())
    }

    fn may_rotate(&self, now: Instant) -> bool {
        self.stuck
            .is_none_or(|last| now.duration_since(last) >= LOOK_EVERY)
    }

    fn rotate(&mut self) -> io::Result<()> {
        // Somebody else may have rotated it meanwhile; to rename theirs, which
        // is new, would push out the oldest one for nothing.
        if self.is_ours() {
            let keep = self.bounds.keep.load(Ordering::Relaxed);
            for number in (1..keep).rev() {
                rename_if_there(&self.numbered(number), &self.numbered(number + 1))?;
            }
            rename_if_there(&self.path, &self.numbered(1))?;
            self.remove_beyond(keep);
        }
        self.stuck = None;
        self.reopen()
    }

    /// Removes what is left of a time when more files were kept.
    fn remove_beyond(&self, keep: u32) {
        let mut number = keep + 1;
        while fs::remove_file(self.numbered(number)).is_ok() {
            number += 1;
        }
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

impl Open {
    fn at(path: &Path) -> io::Result<Self> {
        // Asked before, since to open a pipe would wait for its reader.
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no regular file",
            ));
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(path)?;
        let found = file.metadata()?;
        Ok(Self {
            file,
            identity: identity(&found),
            size: found.len(),
            torn: false,
        })
    }

    fn append(&mut self, lines: &[u8]) -> Result<(), Trouble> {
        if self.torn {
            self.put(b"\n").map_err(|(_, cause)| Trouble {
                lines_lost: count(lines),
                cause,
            })?;
            self.torn = false;
        }
        self.put(lines).map_err(|(rest, cause)| {
            self.torn =
                rest.len() < lines.len() && lines.get(lines.len() - rest.len() - 1) != Some(&b'\n');
            Trouble {
                lines_lost: count(rest),
                cause,
            }
        })
    }

    /// Writes; on failure returns what was not written.
    fn put<'a>(&mut self, bytes: &'a [u8]) -> Result<(), (&'a [u8], io::Error)> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err((rest, io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    self.size += u64::try_from(written).unwrap_or(u64::MAX);
                    rest = rest.get(written..).unwrap_or_default();
                }
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err((rest, why)),
            }
        }
        Ok(())
    }
}

fn identity(found: &fs::Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Returns the length of the longest run of whole lines within `room` bytes.
fn fitting(lines: &[u8], room: u64) -> usize {
    let room = usize::try_from(room).unwrap_or(usize::MAX).min(lines.len());
    lines
        .get(..room)
        .and_then(|head| head.iter().rposition(|b| *b == b'\n'))
        .map_or(0, |end| end + 1)
}

fn first_line(lines: &[u8]) -> usize {
    let end = lines.iter().position(|b| *b == b'\n');
    end.map_or(lines.len(), |end| end + 1)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// A folder of its own, removed at the end.
    pub(in crate::logging) struct Folder(pub(in crate::logging) PathBuf);

    impl Folder {
        pub(in crate::logging) fn new() -> Self {
            static NEXT: AtomicUsize = AtomicUsize::new(0);
            let name = format!(
                "forebay-log-{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            );
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn log(&self) -> PathBuf {
            self.0.join("forebay.log")
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).unwrap_or_else(|why| format!("({name}: {why})"))
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(&self.0)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn open(folder: &Folder, size: u64, keep: u32) -> RotatingFile {
        RotatingFile::open(folder.log(), Arc::new(Bounds::new(size, keep))).unwrap()
    }

    #[test]
    fn a_full_file_is_renamed_and_the_oldest_one_goes() {
        let folder = Folder::new();
        let mut file = open(&folder, 10, 2);
        for line in ["one....\n", "two....\n", "three..\n", "four...\n"] {
            file.write(line.as_bytes(), Instant::now()).unwrap();
        }
        assert_eq!(
            folder.names(),
            ["forebay.log", "forebay.log.1", "forebay.log.2"]
        );
        assert_eq!(folder.read("forebay.log"), "four...\n");
        assert_eq!(folder.read("forebay.log.1"), "three..\n");
        assert_eq!(folder.read("forebay.log.2"), "two....\n");
    }

    #[test]
    fn lines_are_never_torn_between_two_files() {
        let folder = Folder::new();
        let mut file = open(&folder, 12, 9);
        file.write(
            b"aaaa\nbbbb\ncccc\na line too long for any file\ndd\n",
            Instant::now(),
        )
        .unwrap();
        assert_eq!(folder.read("forebay.log.3"), "aaaa\nbbbb\n");
        assert_eq!(folder.read("forebay.log.2"), "cccc\n");
        assert_eq!(
            folder.read("forebay.log.1"),
            "a line too long for any file\n"
        );
        assert_eq!(folder.read("forebay.log"), "dd\n");
    }

    #[test]
    fn what_an_earlier_process_wrote_is_kept_and_counted() {
        let folder = Folder::new();
        fs::write(folder.log(), "earlier\n").unwrap();
        let mut file = open(&folder, 16, 1);
        file.write(b"now....\n", Instant::now()).unwrap();
        assert_eq!(folder.read("forebay.log"), "earlier\nnow....\n");
        file.write(b"later\n", Instant::now()).unwrap();
        assert_eq!(folder.read("forebay.log.1"), "earlier\nnow....\n");
    }

    #[test]
    fn a_file_that_was_deleted_or_moved_is_begun_again() {
        let folder = Folder::new();
        let mut file = open(&folder, 1000, 1);
        let start = Instant::now();
        file.write(b"one\n", start).unwrap();
        fs::remove_file(folder.log()).unwrap();
        file.write(b"two\n", start + LOOK_EVERY).unwrap();
        assert_eq!(folder.read("forebay.log"), "two\n");
        fs::rename(folder.log(), folder.0.join("moved")).unwrap();
        file.write(b"three\n", start + 2 * LOOK_EVERY).unwrap();
        assert_eq!(folder.read("forebay.log"), "three\n");
        assert_eq!(folder.read("moved"), "two\n");
    }

    #[test]
    fn two_processes_that_share_a_file_rotate_it_once() {
        let folder = Folder::new();
        let (mut ours, mut theirs) = (open(&folder, 10, 5), open(&folder, 10, 5));
        let start = Instant::now();
        ours.write(b"one....\n", start).unwrap();
        ours.write(b"two....\n", start).unwrap();
        theirs.write(b"three\n", start + LOOK_EVERY).unwrap();
        assert_eq!(folder.read("forebay.log.1"), "two....\n");
        assert_eq!(folder.read("forebay.log"), "three\n");
        assert_eq!(folder.names().len(), 3);
    }

    #[test]
    fn a_folder_that_went_away_costs_lines_and_nothing_else() {
        let folder = Folder::new();
        let inner = folder.0.join("inner");
        fs::create_dir(&inner).unwrap();
        let bounds = Arc::new(Bounds::new(1000, 1));
        let mut file = RotatingFile::open(inner.join("log"), bounds).unwrap();
        fs::remove_dir_all(&inner).unwrap();
        let start = Instant::now();
        let trouble = file.write(b"one\ntwo\n", start).unwrap_err();
        assert_eq!(trouble.lines_lost, 2);
        fs::create_dir(&inner).unwrap();
        file.write(b"three\n", start + LOOK_EVERY).unwrap();
        assert_eq!(folder.read("inner/log"), "three\n");
    }

    #[test]
    fn a_file_that_cannot_be_renamed_grows_on() {
        let folder = Folder::new();
        let mut file = open(&folder, 10, 1);
        // A folder in the way that is not empty cannot be replaced.
        fs::create_dir_all(folder.0.join("forebay.log.1/x")).unwrap();
        file.write(b"one....\n", Instant::now()).unwrap();
        let trouble = file.write(b"two....\n", Instant::now()).unwrap_err();
        assert_eq!(trouble.lines_lost, 0);
        assert_eq!(folder.read("forebay.log"), "one....\ntwo....\n");
    }

    #[test]
    fn fewer_kept_files_from_now_on_removes_the_others() {
        let folder = Folder::new();
        let mut file = open(&folder, 4, 5);
        file.write(b"1..\n2..\n3..\n4..\n", Instant::now()).unwrap();
        assert_eq!(folder.names().len(), 4);
        file.bounds.set(4, 1);
        file.write(b"5..\n", Instant::now()).unwrap();
        assert_eq!(folder.names(), ["forebay.log", "forebay.log.1"]);
    }

    #[test]
    fn a_full_disk_costs_lines_and_nothing_else() {
        let full = Path::new("/dev/full");
        let mut open = Open {
            file: OpenOptions::new().append(true).open(full).unwrap(),
            identity: (0, 0),
            size: 0,
            torn: false,
        };
        let trouble = open.append(b"one\ntwo\n").unwrap_err();
        assert_eq!(trouble.lines_lost, 2);
        assert_eq!(trouble.cause.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_device_is_no_log_file() {
        let bounds = Arc::new(Bounds::new(1000, 1));
        assert!(RotatingFile::open("/dev/null".into(), bounds).is_err());
    }
}
