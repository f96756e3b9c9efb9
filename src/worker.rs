//! Work that must not be done where requests are served: a thread, and a queue
//! to it that is bounded by the bytes in it.
//!
//! [`Worker::offer`] never waits. What has no room is handed back to whoever
//! offered it, who counts it. When the process stops, [`Workers::stop`] lets
//! every thread finish what is in its queue.

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

/// The most entries of a queue, however small they are.
const ENTRIES_MAX: usize = 16 * 1024;

/// A thread with a queue. Its last handle gone, it finishes the queue and ends.
pub struct Worker<T> {
    sender: Mutex<Option<SyncSender<Weighed<T>>>>,
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
}

/// What was offered, with its weight.
struct Weighed<T> {
    item: T,
    bytes: usize,
}

/// Where a worker's thread takes its work from.
pub struct Inbox<T> {
    receiver: Receiver<Weighed<T>>,
    bytes: Arc<AtomicUsize>,
}

/// What an [`Inbox`] has.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// Something to do.
    Item(T),
    /// Nothing in time.
    Nothing,
    /// Nothing will come any more.
    Closed,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts the thread. `bytes_max` bounds the weight of what waits.
    ///
    /// # Errors
    /// The system has no thread for us.
    pub fn start(
        name: &str,
        bytes_max: usize,
        workers: &Workers,
        work: impl FnOnce(Inbox<T>) + Send + 'static,
    ) -> std::io::Result<Arc<Self>> {
        let (sender, receiver) = mpsc::sync_channel(ENTRIES_MAX);
        let bytes = Arc::new(AtomicUsize::new(0));
        let inbox = Inbox {
            receiver,
            bytes: Arc::clone(&bytes),
        };
        let state = Arc::new(State::default());
        let done = Done(Arc::clone(&state));
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _done = done;
                work(inbox);
            })?;
        let worker = Arc::new(Self {
            sender: Mutex::new(Some(sender)),
            bytes,
            bytes_max,
        });
        let weak: Weak<dyn Close> = Arc::downgrade(&worker) as Weak<dyn Close>;
        workers.add(weak, state);
        Ok(worker)
    }

    /// Puts an item into the queue; never waits.
    ///
    /// # Errors
    /// The item, if there is no room, or the worker has been stopped.
    pub fn offer(&self, item: T, bytes: usize) -> Result<(), T> {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let refused = if before.saturating_add(bytes) > self.bytes_max {
            Some(item)
        } else {
            let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
            match sender.as_ref() {
                Some(sender) => match sender.try_send(Weighed { item, bytes }) {
                    Ok(()) => None,
                    Err(TrySendError::Full(back) | TrySendError::Disconnected(back)) => {
                        Some(back.item)
                    }
                },
                None => Some(item),
            }
        };
        match refused {
            None => Ok(()),
            Some(item) => {
                self.bytes.fetch_sub(bytes, Ordering::Relaxed);
                Err(item)
            }
        }
    }

    /// Returns the weight of what waits.
    pub fn waiting(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl<T> fmt::Debug for Worker<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("bytes", &self.bytes)
            .field("bytes_max", &self.bytes_max)
            .finish_non_exhaustive()
    }
}

impl<T> Inbox<T> {
    /// Waits for the next item, at most so long.
    pub fn next(&self, most: Duration) -> Next<T> {
        match self.receiver.recv_timeout(most) {
            Ok(weighed) => {
                self.bytes.fetch_sub(weighed.bytes, Ordering::Relaxed);
                Next::Item(weighed.item)
            }
            Err(RecvTimeoutError::Timeout) => Next::Nothing,
            Err(RecvTimeoutError::Disconnected) => Next::Closed,
        }
    }
}

impl<T> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}

/// Whether a thread has come to its end.
#[derive(Default)]
struct State {
    ended: Mutex<bool>,
    changed: Condvar,
}

/// Says that the thread has ended, also if it panicked.
struct Done(Arc<State>);

impl Drop for Done {
    fn drop(&mut self) {
        *self.0.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}

impl State {
    fn has_ended(&self) -> bool {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of the thread; `false` if that takes longer.
    fn wait(&self, until: Instant) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let most = until.saturating_duration_since(Instant::now());
        let waited = self
            .changed
            .wait_timeout_while(ended, most, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// What can be told to take nothing more.
trait Close: Send + Sync {
    fn close(&self);
}

impl<T: Send + 'static> Close for Worker<T> {
    fn close(&self) {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        *sender = None;
    }
}

/// Every thread of the process that has not come to its end, also one whose last
/// handle is gone: it still works on what is in its queue.
#[derive(Default)]
pub struct Workers(Mutex<Vec<Running>>);

struct Running {
    worker: Weak<dyn Close>,
    state: Arc<State>,
}

impl Workers {
    fn add(&self, worker: Weak<dyn Close>, state: Arc<State>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|running| !running.state.has_ended());
        all.push(Running { worker, state });
    }

    /// Closes every queue, then waits until all that was in them is done, at
    /// most so long. Returns whether it is. Blocks.
    pub fn stop(&self, most: Duration) -> bool {
        let all: Vec<_> = {
            let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let all = all.iter();
            all.map(|running| (running.worker.upgrade(), Arc::clone(&running.state)))
                .collect()
        };
        let until = Instant::now() + most;
        for worker in all.iter().filter_map(|(worker, _)| worker.as_ref()) {
            worker.close();
        }
        // Every one is waited for, also behind one that is late.
        let late = all.iter().filter(|(_, state)| !state.wait(until)).count();
        late == 0
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_was_taken_is_done_before_the_end() {
        let workers = Workers::default();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&seen);
        let worker = Worker::start("test", 100, &workers, move |inbox| {
            while let Next::Item(item) = inbox.next(LONG) {
                theirs.lock().unwrap().push(item);
            }
        })
        .unwrap();
        for item in 0..100 {
            while worker.offer(item, 10).is_err() {
                thread::yield_now();
            }
        }
        assert!(workers.stop(LONG));
        assert_eq!(*seen.lock().unwrap(), (0..100).collect::<Vec<_>>());
        assert_eq!(worker.waiting(), 0);
        assert_eq!(worker.offer(1, 1), Err(1), "it was stopped");
    }

    #[test]
    fn a_thread_whose_handle_is_gone_is_waited_for() {
        let workers = Workers::default();
        let seen = Arc::new(AtomicUsize::new(0));
        let theirs = Arc::clone(&seen);
        let (go, wait) = mpsc::channel::<()>();
        let worker = Worker::start("test", 100, &workers, move |inbox| {
            wait.recv().unwrap();
            while let Next::Item(item) = inbox.next(LONG) {
                theirs.fetch_add(item, Ordering::Relaxed);
            }
        })
        .unwrap();
        worker.offer(7, 1).unwrap();
        drop(worker);
        let late = thread::spawn(move || go.send(()).unwrap());
        assert!(workers.stop(LONG));
        assert_eq!(seen.load(Ordering::Relaxed), 7);
        late.join().unwrap();
    }

    #[test]
    fn what_has_no_room_is_handed_back_at_once() {
        let workers = Workers::default();
        let (go, wait) = mpsc::channel::<()>();
        let worker = Worker::start("test", 100, &workers, move |inbox: Inbox<&str>| {
            wait.recv().unwrap();
            while inbox.next(LONG) != Next::Closed {}
        })
        .unwrap();
        assert_eq!(worker.offer("large", 101), Err("large"));
        assert_eq!(worker.offer("most", 100), Ok(()));
        assert_eq!(worker.offer("more", 1), Err("more"));
        assert_eq!(worker.waiting(), 100);
        assert!(!workers.stop(Duration::ZERO), "it cannot have ended");
        go.send(()).unwrap();
        assert!(workers.stop(LONG));
    }

    #[test]
    fn a_thread_that_panics_is_not_waited_for() {
        let workers = Workers::default();
        let worker = Worker::start("test", 100, &workers, |_inbox: Inbox<()>| {
            panic!("in the worker");
        })
        .unwrap();
        assert!(workers.stop(LONG));
        assert_eq!(worker.offer((), 1), Err(()));
    }
}
