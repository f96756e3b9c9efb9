//! Long work in hooks that cannot wait: done where it is called, while the other
//! tasks of that thread go on elsewhere.

use std::{
    sync::{Condvar, LazyLock, Mutex, PoisonError},
    thread::available_parallelism,
};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::block_in_place,
};

/// What a plugin is through with in a few milliseconds, in bytes: less is not
/// worth another thread.
pub(super) const INLINE_BYTES_MAX: usize = 64 * 1024;

/// How many are at work; as many as there are cores, so that those who serve
/// small requests always have their share.
static RUNNING: Mutex<usize> = Mutex::new(0);
static FREE: Condvar = Condvar::new();
static RUNNING_MAX: LazyLock<usize> =
    LazyLock::new(|| available_parallelism().map_or(2, usize::from));

/// Does work on so many bytes. Of a large piece nobody else's request waits for
/// its end.
pub(super) fn apart<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes <= INLINE_BYTES_MAX || !can_leave() {
        return work();
    }
    block_in_place(|| {
        let _place = Place::take();
        work()
    })
}

/// Returns whether the other tasks of this thread can go elsewhere.
fn can_leave() -> bool {
    let flavor = Handle::try_current().map(|handle| handle.runtime_flavor());
    flavor.is_ok_and(|flavor| flavor == RuntimeFlavor::MultiThread)
}

struct Place;

impl Place {
    fn take() -> Self {
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = FREE
            .wait_while(running, |running| *running >= *RUNNING_MAX)
            .unwrap_or_else(PoisonError::into_inner);
        *running += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        FREE.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_runtime_and_with_one_thread_it_is_done_right_here() {
        assert_eq!(apart(usize::MAX, || 7), 7);
        let one = tokio::runtime::Builder::new_current_thread().build();
        assert_eq!(one.unwrap().block_on(async { apart(usize::MAX, || 7) }), 7);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_is_long_takes_its_turn_and_gives_it_back() {
        let all = (0..50).map(|number| {
            tokio::spawn(async move {
                apart(usize::MAX, || {
                    let running = *RUNNING.lock().unwrap();
                    assert!((1..=*RUNNING_MAX).contains(&running), "{running}");
                    assert!(number != 7, "places of those who panic are free again");
                })
            })
        });
        let all: Vec<_> = all.collect();
        let mut failed = 0;
        for one in all {
            failed += usize::from(one.await.is_err());
        }
        assert_eq!(failed, 1);
    }
}
