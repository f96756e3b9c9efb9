//! Where lines wait for the thread that writes them.
//!
//! Two buffers take turns: one fills, the other is being written. To log is to
//! copy one line under a lock.

use std::{
    io, mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus::IntCounter;

/// The most bytes that wait; a line that does not fit is dropped and counted.
const BYTES_MAX: usize = 4 << 20;

/// Lines on their way. Never more than [`BYTES_MAX`] of them wait.
pub(super) struct Queue {
    state: Mutex<State>,
    /// Something came, or the end.
    filled: Condvar,
    /// Everything is written.
    emptied: Condvar,
    dropped: IntCounter,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    /// Lines dropped since the last batch was taken.
    dropped: u64,
    writing: bool,
    closed: bool,
}

impl State {
    fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.dropped == 0
    }
}

/// What is written in one go.
pub(super) struct Batch {
    /// Whole lines.
    pub(super) lines: Vec<u8>,
    /// How many came after them and found no room.
    pub(super) dropped: u64,
}

impl Queue {
    pub(super) fn new(dropped: IntCounter) -> Self {
        Self {
            state: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            dropped,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line. Returns whether somebody will write or count it: `false`
    /// once the queue is closed.
    fn push(&self, line: &[u8]) -> bool {
        let mut state = self.state();
        if state.closed {
            return false;
        }
        if state.lines.len() + line.len() <= BYTES_MAX {
            state.lines.extend_from_slice(line);
        } else {
            state.dropped += 1;
            self.dropped.inc();
        }
        drop(state);
        self.filled.notify_one();
        true
    }

    /// Waits for lines; `spent` is the buffer of the last batch, to be filled
    /// anew. `None` is the end.
    pub(super) fn take(&self, mut spent: Vec<u8>) -> Option<Batch> {
        spent.clear();
        let mut state = self.state();
        state.writing = false;
        if state.is_empty() {
            self.emptied.notify_all();
        }
        while state.is_empty() {
            if state.closed {
                return None;
            }
            state = self
                .filled
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        Some(Batch {
            lines: mem::replace(&mut state.lines, spent),
            dropped: mem::take(&mut state.dropped),
        })
    }

    /// Waits until everything is written, `wait_max` at most. Returns whether it is.
    pub(super) fn flush(&self, wait_max: Duration) -> bool {
        let (_state, timeout) = self
            .emptied
            .wait_timeout_while(self.state(), wait_max, |state| {
                state.writing || !state.is_empty()
            })
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }

    /// Takes no more lines.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.filled.notify_one();
    }
}

/// The end of the queue that env_logger writes to, a line at a time.
pub(super) struct Entrance(pub(super) Arc<Queue>);

impl io::Write for Entrance {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.0.push(line) {
            // The process is ending: nobody is left to wait for.
            io::stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> Queue {
        Queue::new(IntCounter::new("dropped", "lines").unwrap())
    }

    #[test]
    fn lines_come_out_in_the_order_they_went_in() {
        let queue = queue();
        assert!(queue.push(b"one\n"));
        assert!(queue.push(b"two\n"));
        assert_eq!(queue.take(Vec::new()).unwrap().lines, b"one\ntwo\n");
    }

    #[test]
    fn a_line_that_finds_no_room_is_dropped_and_counted() {
        let queue = queue();
        let line = vec![b'x'; BYTES_MAX / 4];
        for _ in 0..6 {
            queue.push(&line);
        }
        let batch = queue.take(Vec::new()).unwrap();
        assert_eq!(batch.lines.len(), BYTES_MAX);
        assert_eq!(batch.dropped, 2);
        assert_eq!(queue.dropped.get(), 2);
        assert!(queue.push(b"there is room again\n"));
        assert_eq!(queue.take(batch.lines).unwrap().dropped, 0);
    }

    #[test]
    fn a_flush_that_nobody_answers_ends_in_time() {
        let queue = queue();
        queue.push(b"line\n");
        assert!(!queue.flush(Duration::from_millis(10)));
    }

    #[test]
    fn a_closed_queue_gives_what_it_has_and_then_ends() {
        let queue = queue();
        queue.push(b"line\n");
        queue.close();
        assert!(!queue.push(b"late\n"));
        assert_eq!(queue.take(Vec::new()).unwrap().lines, b"line\n");
        assert!(queue.take(Vec::new()).is_none());
    }
}
