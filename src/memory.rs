//! How much memory the process takes of what it may have, and what follows.
//!
//! What it may have is `limits.memory`, and what the control groups that it runs
//! in allow (version 2, `memory.max`). Against the one counts what the process
//! itself holds, against the others what all of the group do; never what the
//! system keeps of files, which it takes back when it needs it.
//!
//! Looking is reading a few small files, four times a second, on a thread that
//! serves nobody. Requests read one number.

use std::{
    fs,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::config::Limits;

/// How often is looked.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How long nothing may be given back before one request at a time is served all
/// the same: an allocator keeps some of what it has freed, and uses that first.
const STUCK: Duration = Duration::from_secs(10);

/// How near the end of the memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Pressure {
    /// Far.
    None,
    /// Near: connections are not kept.
    Tight,
    /// Nearly reached: new requests are turned away.
    Full,
}

impl Pressure {
    /// Returns the word for the log.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tight => "tight",
            Self::Full => "full",
        }
    }
}

/// What is taken, of what there is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) used: u64,
    pub(crate) most: u64,
}

/// What is known of the memory. One per process.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    level: AtomicU8,
    /// Since when it has been full.
    full: Mutex<Option<Instant>>,
}

impl Memory {
    /// Notes what is taken; returns the pressure if it is another than before.
    pub(crate) fn note(
        &self,
        taken: Option<Taken>,
        limits: &Limits,
        now: Instant,
    ) -> Option<Pressure> {
        let pressure = taken.map_or(Pressure::None, |taken| pressure(taken, limits));
        let was = self.level.swap(pressure as u8, Relaxed);
        if was == pressure as u8 {
            return None;
        }
        *self.full.lock().unwrap_or_else(PoisonError::into_inner) =
            (pressure == Pressure::Full).then_some(now);
        Some(pressure)
    }

    /// Returns whether connections are to be closed behind their answer.
    pub(crate) fn is_tight(&self) -> bool {
        self.level.load(Relaxed) >= Pressure::Tight as u8
    }

    /// Returns whether a new request may be served, `others` being under way.
    pub(crate) fn admits(&self, others: usize, now: Instant) -> bool {
        if self.level.load(Relaxed) < Pressure::Full as u8 {
            return true;
        }
        let full = *self.full.lock().unwrap_or_else(PoisonError::into_inner);
        let stuck = |since| now.saturating_duration_since(since) >= STUCK;
        others == 0 && full.is_some_and(stuck)
    }
}

fn pressure(taken: Taken, limits: &Limits) -> Pressure {
    if taken.used >= limits.memory_full.of(taken.most) {
        Pressure::Full
    } else if taken.used >= limits.memory_tight.of(taken.most) {
        Pressure::Tight
    } else {
        Pressure::None
    }
}

/// Looks how much is taken, of whichever bound is the nearest; `None` if there is
/// none. Blocks for as long as the system needs to tell.
pub(crate) fn look(limits: &Limits) -> Option<Taken> {
    let own = limits.memory.and_then(|most| {
        let used = of_process(&fs::read_to_string("/proc/self/status").ok()?)?;
        let most = u64::try_from(most.get()).ok()?;
        Some(Taken { used, most })
    });
    let groups = fs::read_to_string("/proc/self/cgroup").ok();
    let group = groups.as_deref().and_then(group_of);
    let allowed = group.and_then(|group| of_groups(Path::new("/sys/fs/cgroup"), group));
    own.into_iter().chain(allowed).max_by(nearer)
}

/// Orders by what share is taken.
fn nearer(one: &Taken, other: &Taken) -> std::cmp::Ordering {
    let share = |a: &Taken, b: &Taken| u128::from(a.used) * u128::from(b.most);
    share(one, other).cmp(&share(other, one))
}

/// Returns what a process holds that no file could give back, from its status.
fn of_process(status: &str) -> Option<u64> {
    let kib = |key: &str| {
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(key))?;
        let number = value.trim().strip_suffix("kB")?.trim();
        number.parse::<u64>().ok()
    };
    let kib = kib("RssAnon:")?.checked_add(kib("RssShmem:").unwrap_or(0))?;
    kib.checked_mul(1024)
}

/// Returns the path of the control group of version 2.
fn group_of(groups: &str) -> Option<&str> {
    let mut lines = groups.lines();
    let path = lines.find_map(|line| line.strip_prefix("0::/"))?;
    let is_plain = !path.split('/').any(|part| part == "..");
    is_plain.then_some(path)
}

/// Looks at a control group and all that it is in.
fn of_groups(root: &Path, group: &str) -> Option<Taken> {
    let own = root.join(group);
    let all = own.ancestors().take_while(|above| above.starts_with(root));
    all.filter_map(of_group).max_by(nearer)
}

fn of_group(folder: &Path) -> Option<Taken> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    // `max` is no bound, and no number.
    let most = read("memory.max")?.trim().parse::<u64>().ok()?;
    let current = read("memory.current")?.trim().parse::<u64>().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let of_files = stat.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        let is_of_files = matches!(key, "inactive_file" | "active_file");
        value.trim().parse::<u64>().ok().filter(|_| is_of_files)
    });
    let used = of_files.fold(current, u64::saturating_sub);
    Some(Taken { used, most })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn connections_go_first_and_then_requests() {
        let (memory, limits, start) = (Memory::default(), Limits::default(), Instant::now());
        let note = |used: u64, now| {
            let most = 100 * MIB;
            let used = used * MIB;
            memory.note(Some(Taken { used, most }), &limits, now)
        };
        assert_eq!(note(91, start), None);
        assert!(!memory.is_tight() && memory.admits(9, start));
        assert_eq!(note(92, start), Some(Pressure::Tight));
        assert!(memory.is_tight() && memory.admits(9, start));
        assert_eq!(note(95, start), Some(Pressure::Full));
        assert!(memory.is_tight() && !memory.admits(0, start));
        // Nothing more comes back: then one at a time is better than none.
        let later = start + STUCK;
        assert_eq!(note(99, later), None);
        assert!(memory.admits(0, later) && !memory.admits(1, later));
        assert_eq!(note(50, later), Some(Pressure::None));
        assert!(!memory.is_tight() && memory.admits(9, later));
        assert_eq!(memory.note(None, &limits, later), None);
    }

    #[test]
    fn what_the_process_holds_is_told_by_the_system() {
        let status =
            "VmRSS:\t  9000 kB\nRssAnon:\t    5000 kB\nRssFile:\t 3000 kB\nRssShmem:\t 1000 kB\n";
        assert_eq!(of_process(status), Some(6000 * 1024));
        assert_eq!(of_process("VmRSS: 9000 kB\n"), None);
        let limits = Limits {
            memory: Some(crate::config::Size::mib(64)),
            ..Limits::default()
        };
        let taken = look(&limits).unwrap();
        assert!(taken.used > MIB, "{taken:?}");
    }

    #[test]
    fn of_nested_control_groups_the_nearest_bound_counts_and_files_do_not() {
        let root = tempfile::tempdir().unwrap();
        let write = |group: &str, files: [&str; 3]| {
            let folder = root.path().join(group);
            fs::create_dir_all(&folder).unwrap();
            for (name, text) in ["memory.max", "memory.current", "memory.stat"]
                .iter()
                .zip(files)
            {
                fs::write(folder.join(name), text).unwrap();
            }
        };
        let none = "anon 1\ninactive_file 0\n";
        write("a/b", ["max\n", "700\n", none]);
        assert_eq!(of_groups(root.path(), "a/b"), None);
        write(
            "a",
            [
                "1000\n",
                "900\n",
                "anon 1\ninactive_file 150\nactive_file 50\n",
            ],
        );
        let outer = Taken {
            used: 700,
            most: 1000,
        };
        assert_eq!(of_groups(root.path(), "a/b"), Some(outer));
        write("a/b", ["800\n", "700\n", none]);
        let inner = Taken {
            used: 700,
            most: 800,
        };
        assert_eq!(of_groups(root.path(), "a/b"), Some(inner));
        assert_eq!(of_groups(root.path(), ""), None);
        assert_eq!(group_of("4:memory:/x\n0::/a/b\n"), Some("a/b"));
        assert_eq!(group_of("0::/\n"), Some(""));
        assert_eq!(group_of("0::/../x\n"), None);
        assert_eq!(group_of("4:memory:/x\n"), None);
    }
}
