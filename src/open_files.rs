//! How many files and connections the system lets the process have.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Files that are neither a client's connection nor its upstream's: listeners,
/// logs, watchers, runtimes, and the connections that are being turned away, of
/// which the accepting loop takes up to 128 before it lets others work.
const OTHERS: u64 = 256;
/// The same where there are few files at all.
const OTHERS_MIN: u64 = 64;
/// Fewer clients than this would be no service at all.
const CLIENTS_MIN: usize = 8;

/// Raises the limit as far as the system allows, and returns it; `None` if it
/// cannot be told.
pub(crate) fn raise() -> Option<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        return Some(hard);
    }
    Some(soft)
}

/// Returns how many clients may be connected with so many open files: each may
/// need a connection to an upstream as well.
pub(crate) fn clients(files: u64) -> usize {
    let others = (files / 2).clamp(OTHERS_MIN, OTHERS);
    let half = files.saturating_sub(others) / 2;
    usize::try_from(half).unwrap_or(usize::MAX).max(CLIENTS_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_client_leaves_room_for_its_upstream() {
        for files in [256, 1024, 20_000, u64::MAX] {
            assert!(clients(files) as u64 * 2 + OTHERS_MIN <= files, "{files}");
        }
        assert_eq!(clients(256), 64);
        assert_eq!(clients(1024), 384);
        assert_eq!(clients(0), CLIENTS_MIN);
    }

    #[test]
    fn the_limit_is_known() {
        assert!(raise().is_some_and(|files| files > 0));
    }
}
