//! Which hours and images go, because they are too old or too many.
//!
//! **Invariant:** only what capture made is removed: hours by their names, images
//! by theirs, and of these what no hour that is left can name. The hour that is
//! being written stays.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use super::{
    folder::{Live, Settings},
    keep::{HourFile, beginning},
    segment::{Make, lock},
    writer::{IMAGE_FRESH, is_link},
};
use crate::sharegpt::{dialogue::is_image_ending, read::is_image};

/// How far the clock may go ahead of the time that has passed.
const JUMP: Duration = Duration::from_secs(600);
/// How long a clock that went ahead is not believed: who looks after it sets it
/// right before that.
const SETTLE: Duration = Duration::from_secs(3600);
/// How much older than the line that names it last an image may be: another use
/// does not renew it while it is fresh, and the line may come a moment later.
const SLACK: Duration = Duration::from_secs(IMAGE_FRESH.as_secs() + 300);
/// How old the beginning of an image must be that was never finished.
const PART_AGE: Duration = Duration::from_secs(3600);

/// A moment, by both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    /// What the system says: it may jump.
    pub(super) wall: SystemTime,
    /// What only goes on.
    pub(super) steady: Instant,
}

impl Now {
    pub(super) fn read() -> Self {
        Self {
            wall: SystemTime::now(),
            steady: Instant::now(),
        }
    }
}

/// What is remembered from one pass to the next.
#[derive(Debug, Default)]
pub(super) struct Retention {
    clock: Clock,
    /// The hour of which was told that it takes more than its share.
    told_of: String,
}

/// Whether the system's clock is believed: a jump ahead would make everything
/// too old at once.
#[derive(Debug, Default)]
enum Clock {
    #[default]
    Unknown,
    Believed(Now),
    Doubted {
        /// When it was last believed; `None` if it never was.
        last: Option<Now>,
        since: Instant,
    },
}

impl Clock {
    /// Looks at the clock. `newest` is its last trace in the folder.
    fn look(&mut self, now: Now, newest: SystemTime, max_age: Duration) {
        let doubted = |last| Self::Doubted {
            last,
            since: now.steady,
        };
        *self = match *self {
            // All that there is would go.
            Self::Unknown if since(now.wall, newest) > max_age => doubted(None),
            Self::Believed(last) if has_jumped(last, now) => doubted(Some(last)),
            Self::Doubted { last, since }
                if now.steady.saturating_duration_since(since) < SETTLE
                    && last.is_none_or(|last| has_jumped(last, now)) =>
            {
                Self::Doubted { last, since }
            }
            _ => Self::Believed(now),
        };
    }

    fn is_believed(&self) -> bool {
        matches!(self, Self::Believed(_))
    }
}

/// Returns whether the clock went ahead of the time that has passed.
fn has_jumped(last: Now, now: Now) -> bool {
    let passed = now.steady.saturating_duration_since(last.steady);
    since(now.wall, last.wall) > passed + JUMP
}

fn since(now: SystemTime, then: SystemTime) -> Duration {
    now.duration_since(then).unwrap_or_default()
}

/// Removes what is too old or too much, the oldest first, and images that
/// nothing left can name. `files` are in order.
///
/// # Errors
/// The folder cannot be read, or an hour not be removed.
pub(super) fn remove_old(
    live: &Live,
    settings: &Settings,
    retention: &mut Retention,
    files: Vec<HourFile>,
    now: Now,
) -> io::Result<()> {
    if settings.max_age.is_none() && settings.max_size.is_none() {
        return Ok(());
    }
    let mut shelf = Shelf::read(live, settings, files, now)?;
    if let Some(most) = settings.max_age {
        let was_believed = retention.clock.is_believed();
        let is_new = matches!(retention.clock, Clock::Unknown);
        retention.clock.look(now, shelf.newest, most);
        if retention.clock.is_believed() {
            shelf.remove_aged(most, now)?;
        } else if was_believed || is_new {
            log::warn!(
                "the clock is far ahead of what it was, or of all that is here: nothing is removed for its age in the next {} minutes: dir={}",
                SETTLE.as_secs() / 60,
                live.dir.display()
            );
        }
    }
    shelf.remove_orphans();
    if let Some(most) = settings.max_size {
        let excess = shelf.remove_excess(most)?;
        if excess > 0 && retention.told_of != shelf.open {
            log::warn!(
                "this hour takes so much that max_size is not kept: dir={} too_much={excess}",
                live.dir.display()
            );
            retention.told_of.clone_from(&shelf.open);
        }
    }
    shelf.tell();
    Ok(())
}

/// All that capture has in a folder, the oldest first.
struct Shelf<'a> {
    live: &'a Live,
    files: Vec<HourFile>,
    images: VecDeque<ImageFile>,
    /// Bytes of all of them.
    total: u64,
    /// The hour that is being written.
    open: String,
    opened: SystemTime,
    /// When something in the folder changed last.
    newest: SystemTime,
    images_removed: u64,
    bytes_of_images_removed: u64,
}

struct ImageFile {
    path: PathBuf,
    bytes: u64,
    changed: SystemTime,
}

impl<'a> Shelf<'a> {
    fn read(
        live: &'a Live,
        settings: &Settings,
        files: Vec<HourFile>,
        now: Now,
    ) -> io::Result<Self> {
        let open = settings.zone.hour(now.wall);
        let images = images(&live.dir, now.wall)?;
        let bytes = files.iter().map(|file| file.bytes);
        let total = bytes.chain(images.iter().map(|image| image.bytes)).sum();
        let changed = fs::metadata(&live.dir)?.modified()?;
        let newest = files.iter().map(|file| file.changed).max();
        Ok(Self {
            live,
            images,
            total,
            opened: beginning(&open, settings.zone).unwrap_or(now.wall),
            newest: newest.map_or(changed, |newest| newest.max(changed)),
            open,
            files,
            images_removed: 0,
            bytes_of_images_removed: 0,
        })
    }

    fn remove_aged(&mut self, most: Duration, now: Now) -> io::Result<()> {
        let mut left = Vec::with_capacity(self.files.len());
        for file in std::mem::take(&mut self.files) {
            let ended = file.began + Duration::from_secs(3600);
            let is_old = since(now.wall, ended) > most && file.hour != self.open;
            if !is_old || !self.remove(&file, "age")? {
                left.push(file);
            }
        }
        self.files = left;
        Ok(())
    }

    /// Removes the oldest hours, each with the images that only it named, until
    /// the rest fits; returns how many bytes it is too much then. The hour that
    /// is being written counts too, but half of the limit is left to those that
    /// are over: what it takes cannot be had back by removing them.
    fn remove_excess(&mut self, most: u64) -> io::Result<u64> {
        let files = self.files.iter().filter(|file| file.hour == self.open);
        let of_files: u64 = files.map(|file| file.bytes).sum();
        let images = self.images.iter();
        let of_images: u64 = images
            .filter(|image| image.changed + SLACK >= self.opened)
            .map(|image| image.bytes)
            .sum();
        let open = of_files.saturating_add(of_images);
        let allowed = most.max(open.saturating_add(most / 2));
        let mut left: Vec<HourFile> = Vec::with_capacity(self.files.len());
        let mut files = std::mem::take(&mut self.files).into_iter().peekable();
        while let Some(file) = files.next() {
            let is_kept = self.total <= allowed || file.hour == self.open;
            if is_kept || !self.remove(&file, "size")? {
                left.push(file);
            } else {
                let oldest = left.first().or(files.peek());
                let oldest = oldest.map_or(self.opened, |file| file.began);
                self.remove_images_before(oldest);
            }
        }
        self.files = left;
        Ok(self.total.saturating_sub(most))
    }

    /// Removes images that no hour can name.
    fn remove_orphans(&mut self) {
        let oldest = self.files.first();
        let oldest = oldest.map_or(self.opened, |file| file.began.min(self.opened));
        self.remove_images_before(oldest);
    }

    /// Removes images that no hour can name from this one on.
    fn remove_images_before(&mut self, oldest: SystemTime) {
        let is_older = |image: &ImageFile| image.changed + SLACK < oldest;
        while self.images.front().is_some_and(is_older) {
            let Some(image) = self.images.pop_front() else {
                break;
            };
            match fs::remove_file(&image.path) {
                Ok(()) => {
                    self.images_removed += 1;
                    self.bytes_of_images_removed += image.bytes;
                    self.total = self.total.saturating_sub(image.bytes);
                }
                Err(why) => log::warn!("cannot be removed: file={} {why}", image.path.display()),
            }
        }
    }

    /// Removes a file, unless somebody writes to it.
    fn remove(&mut self, file: &HourFile, reason: &str) -> io::Result<bool> {
        let _held = if file.is_plain {
            match lock(&file.path, Make::No)? {
                Some(held) => Some(held),
                None => return Ok(false),
            }
        } else {
            None
        };
        fs::remove_file(&file.path)?;
        self.total = self.total.saturating_sub(file.bytes);
        let family = &self.live.account.metrics().capture_files_removed;
        family.with_label_values(&[reason]).inc();
        log::info!("removed: file={} reason={reason}", file.path.display());
        Ok(true)
    }

    /// Says how many images went.
    fn tell(&self) {
        if self.images_removed == 0 {
            return;
        }
        let family = &self.live.account.metrics().capture_files_removed;
        family
            .with_label_values(&["image"])
            .inc_by(self.images_removed);
        log::info!(
            "removed: images={} bytes={} dir={} reason=image",
            self.images_removed,
            self.bytes_of_images_removed,
            self.live.dir.display()
        );
    }
}

/// Returns the images of a folder that are capture's, the longest unused first.
/// The beginnings of some that a process left when it died go at once.
fn images(dir: &Path, now: SystemTime) -> io::Result<VecDeque<ImageFile>> {
    let folder = dir.join("images");
    if is_link(&folder) {
        return Ok(VecDeque::new()); // nothing of ours
    }
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(VecDeque::new()),
        Err(why) => return Err(why),
    };
    let mut images = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_image = is_ours(name);
        let is_part = !is_image && is_part(name);
        // It may be gone meanwhile.
        let Some(found) = entry.metadata().ok().filter(fs::Metadata::is_file) else {
            continue;
        };
        let changed = found.modified()?;
        if is_image {
            images.push(ImageFile {
                path: entry.path(),
                bytes: found.len(),
                changed,
            });
        } else if is_part && since(now, changed) > PART_AGE {
            fs::remove_file(entry.path())?;
        }
    }
    images.sort_by_key(|image| image.changed);
    Ok(images.into())
}

/// Returns whether this is how an image is named while it is written: behind its
/// hash stand the number of the process and `part`.
fn is_part(name: &str) -> bool {
    let Some((hash, ending)) = name.split_once('.') else {
        return false;
    };
    let process = ending.strip_suffix(".part").unwrap_or_default();
    let is_number = !process.is_empty() && process.bytes().all(|byte| byte.is_ascii_digit());
    is_number && is_ours(&format!("{hash}.bin"))
}

/// Returns whether this is how capture names an image. Others may have put what
/// they know of one beside it, under its hash.
fn is_ours(name: &str) -> bool {
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    is_image_ending(ending) && is_image(&format!("images/{name}"))
}

#[cfg(test)]
mod tests {
    use super::{
        super::keep::tests::{Bench, HOUR, bench},
        *,
    };

    fn name(number: usize) -> String {
        format!("{number:064x}.png")
    }

    fn image_names(bench: &Bench) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(bench.dir.path().join("images"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_oldest_go_by_age_and_by_size() {
        let mut by_age = bench(|settings| settings.max_age = Some(HOUR * 2));
        for name in ["20260102_11", "20260102_12", "20260102_14", "20260102_15"] {
            by_age.write(&format!("{name}.jsonl"), "{}\n", HOUR);
        }
        by_age.write("20260102_10.jsonl.zst", "{}\n", HOUR);
        by_age.write("20260102_10.jsonl.torn", "{}\n", HOUR);
        by_age.write(&format!("images/{}", name(1)), "x", HOUR * 9);
        by_age.write(&format!("images/{}", name(2)), "x", HOUR);
        // 12:00 to 13:00 ended two and a half hours ago.
        let left = ["20260102_14.jsonl", "20260102_15.jsonl", "images"];
        assert_eq!(by_age.pass(), left);
        assert_eq!(image_names(&by_age), [name(2)]);
        let removed = |reason| {
            let family = &by_age.live.account.metrics().capture_files_removed;
            family.with_label_values(&[reason]).get()
        };
        assert_eq!((removed("age"), removed("image")), (4, 1));

        let mut by_size = bench(|settings| settings.max_size = Some(250));
        for name in ["20260102_13", "20260102_14", "20260102_15"] {
            by_size.write(&format!("{name}.jsonl"), &"x".repeat(100), HOUR);
        }
        assert_eq!(by_size.pass(), ["20260102_14.jsonl", "20260102_15.jsonl"]);
        // The file of this hour stays, however large.
        let mut tiny = bench(|settings| settings.max_size = Some(1));
        tiny.write("20260102_15.jsonl", &"x".repeat(100), HOUR);
        assert_eq!(tiny.pass(), ["20260102_15.jsonl"]);
    }

    #[test]
    fn what_is_somebody_elses_stays() {
        let mut bench = bench(|settings| settings.max_age = Some(HOUR));
        let hash = "0f".repeat(32);
        let theirs = [
            "notes.txt".to_owned(),
            "old.png".to_owned(),
            format!("{}.png", hash.replacen('0', "", 1)),
            format!("{}.png", hash.to_uppercase()),
            format!("{hash}.png.bak"),
            format!("{hash}.part"),
            format!("{hash}.txt"),
            hash.clone(),
        ];
        for name in &theirs {
            bench.write(&format!("images/{name}"), "x", HOUR * 99);
        }
        bench.write(&format!("images/{hash}.png"), "x", HOUR * 99);
        bench.write(&format!("images/{hash}.123.part"), "x", HOUR * 99);
        bench.write("2026.jsonl", "x", HOUR * 99);
        bench.write("20260101_10.jsonl", "{}\n", HOUR * 29);
        assert_eq!(bench.pass(), ["2026.jsonl", "images"]);
        let mut theirs = theirs.to_vec();
        theirs.sort();
        assert_eq!(image_names(&bench), theirs);
    }

    #[test]
    fn no_more_hours_go_than_have_to() {
        let mut bench = bench(|settings| settings.max_size = Some(4 << 20));
        // 40 hours of 30 KB and an image of 100 KB: 1.1 MB too much.
        let hours = |ago: u64| {
            let began =
                bench.now.wall - Duration::from_secs(1800) - HOUR * u32::try_from(ago).unwrap();
            crate::plugins::capture::folder::Zone::Utc.hour(began)
        };
        let names: Vec<_> = (0..40).map(|ago| format!("{}.jsonl", hours(ago))).collect();
        for (ago, hour) in (0_u32..).zip(&names) {
            bench.write(hour, &"x".repeat(30_000), HOUR * ago);
            let image = format!("images/{}", name(ago as usize));
            bench.write(&image, &"x".repeat(100_000), HOUR * ago);
        }
        let left = bench.pass().len() - 1;
        // Of the last one the image may be named by the next.
        assert!((31..=32).contains(&left), "{left}");
        assert_eq!(bench.pass().len() - 1, left, "the rest fits");
        let images = image_names(&bench).len();
        assert!((left..=left + 1).contains(&images), "{images}");
    }

    #[test]
    fn what_this_hour_takes_is_not_taken_from_all_others() {
        let mut bench = bench(|settings| settings.max_size = Some(4 << 20));
        for hour in ["20260102_12", "20260102_13", "20260102_14", "20260102_15"] {
            bench.write(&format!("{hour}.jsonl"), &"x".repeat(30_000), HOUR);
        }
        for number in 0..50 {
            let image = format!("images/{}", name(number));
            bench.write(&image, &"x".repeat(100_000), Duration::ZERO);
        }
        assert_eq!(bench.pass().len(), 5);
        assert_eq!(image_names(&bench).len(), 50);
        // When it is over, it is like any other.
        bench.now.wall += HOUR * 2;
        assert_eq!(bench.pass(), ["images"]);
        assert!(image_names(&bench).is_empty());
    }

    #[test]
    fn a_clock_that_goes_ahead_removes_nothing_at_once() {
        let day = HOUR * 24;
        let mut bench = bench(|settings| settings.max_age = Some(day));
        let file = "20260102_14.jsonl";
        bench.write(file, "{}\n", HOUR);
        assert_eq!(bench.pass(), [file]);
        bench.pass_time(HOUR);
        assert_eq!(bench.pass(), [file]);
        // It jumps, and is set right again.
        bench.now.wall += day * 400;
        assert_eq!(bench.pass(), [file]);
        bench.pass_time(SETTLE / 2);
        assert_eq!(bench.pass(), [file]);
        bench.now.wall -= day * 400;
        assert_eq!(bench.pass(), [file]);
        // It jumps, and stays there: it is right.
        bench.now.wall += day * 400;
        assert_eq!(bench.pass(), [file]);
        bench.pass_time(SETTLE);
        assert!(bench.pass().is_empty());
    }

    #[test]
    fn a_process_that_begins_long_after_the_last_hour_waits_too() {
        let day = HOUR * 24;
        let mut bench = bench(|settings| settings.max_age = Some(day));
        bench.write("20260102_14.jsonl", "{}\n", HOUR);
        // The folder itself was made now, by the test's own clock.
        bench.now.wall = SystemTime::now() + day * 2;
        assert_eq!(bench.pass().len(), 1);
        bench.pass_time(SETTLE / 2);
        assert_eq!(bench.pass().len(), 1);
        bench.pass_time(SETTLE / 2);
        assert!(bench.pass().is_empty());
        // Time that has really passed makes what is old go.
        bench.write("20260103_14.jsonl", "{}\n", HOUR);
        assert!(bench.pass().is_empty());
    }
}
