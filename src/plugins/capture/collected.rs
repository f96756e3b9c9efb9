//! What a client is sent of an answer, kept until it is all there: within a
//! bound for each answer, and one for all of them together.

use std::fmt;

use bytes::Bytes;
use prometheus::IntGauge;

use super::account::Lost;
use crate::sharegpt::{EventLog, Received};

/// What bounds it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// One answer.
    pub(super) answer: usize,
    /// All answers that are on their way.
    pub(super) all: usize,
}

/// An answer on its way.
pub(super) struct Collected {
    log: EventLog,
    whole: Option<Bytes>,
    bounds: Bounds,
    /// What is counted for it in `total`.
    counted: usize,
    total: IntGauge,
    lost: Option<Lost>,
}

impl Collected {
    /// Begins with nothing. `total` is what all of them take, in bytes.
    pub(super) fn new(bounds: Bounds, total: &IntGauge) -> Self {
        Self {
            log: EventLog::default(),
            whole: None,
            bounds,
            counted: 0,
            total: total.clone(),
            lost: None,
        }
    }

    /// Adds the data of an event.
    pub(super) fn event(&mut self, data: &[u8]) {
        if self.lost.is_none() && self.count(self.log.bytes_with(data)) {
            self.log.push(data);
        }
    }

    /// Takes an answer that is one body.
    pub(super) fn whole(&mut self, body: &Bytes) {
        if self.lost.is_none() && self.count(body.len()) {
            self.whole = Some(body.clone());
        }
    }

    /// Returns whether there is nothing, and nothing was lost.
    pub(super) fn is_empty(&self) -> bool {
        self.lost.is_none() && self.whole.is_none() && self.log.is_empty()
    }

    /// Returns why it is not whole.
    pub(super) fn lost(&self) -> Option<Lost> {
        self.lost
    }

    /// Returns how many bytes it takes.
    pub(super) fn bytes(&self) -> usize {
        self.log.bytes() + self.whole.as_ref().map_or(0, Bytes::len)
    }

    /// No longer counts it: it is somebody else's.
    pub(super) fn handed_over(&mut self) {
        self.total.sub(as_i64(self.counted));
        self.counted = 0;
    }

    /// Returns what was received.
    pub(super) fn received(&self) -> Received<'_> {
        match &self.whole {
            Some(body) => Received::Whole(body),
            None if self.log.is_empty() => Received::Nothing,
            None => Received::Events(&self.log),
        }
    }

    /// Counts that it takes so much, if there is room; else all of it is lost.
    fn count(&mut self, bytes: usize) -> bool {
        if bytes > self.bounds.answer {
            self.lose(Lost::Answer);
            return false;
        }
        if bytes <= self.counted {
            return true;
        }
        let more = as_i64(bytes - self.counted);
        self.total.add(more);
        if self.total.get() > as_i64(self.bounds.all) {
            self.total.sub(more);
            self.lose(Lost::Buffer);
            return false;
        }
        self.counted = bytes;
        true
    }

    fn lose(&mut self, why: Lost) {
        self.log = EventLog::default();
        self.whole = None;
        self.handed_over();
        self.lost = Some(why);
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        self.handed_over();
    }
}

impl fmt::Debug for Collected {
    /// Nothing of what is kept.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collected")
            .field("bytes", &self.bytes())
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

fn as_i64(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total() -> IntGauge {
        IntGauge::new("a", "b").unwrap()
    }

    #[test]
    fn what_is_collected_is_counted_until_it_is_handed_over() {
        let total = total();
        let bounds = Bounds {
            answer: 10_000,
            all: 10_000,
        };
        let mut one = Collected::new(bounds, &total);
        assert!(one.is_empty());
        for _ in 0..100 {
            one.event(b"{\"choices\":[]}");
        }
        assert!(total.get() >= as_i64(one.bytes()), "{one:?}");
        assert_eq!(one.lost(), None);
        one.handed_over();
        assert_eq!(total.get(), 0);
        let mut other = Collected::new(bounds, &total);
        other.whole(&Bytes::from_static(b"{}"));
        assert_eq!(total.get(), 2);
        drop((one, other));
        assert_eq!(total.get(), 0);
    }

    #[test]
    fn what_is_too_large_is_lost_whole_and_takes_no_room() {
        let total = total();
        let bounds = Bounds {
            answer: 1000,
            all: 1500,
        };
        let mut large = Collected::new(bounds, &total);
        large.event(b"first");
        large.event(&[b'x'; 1000]);
        assert_eq!(large.lost(), Some(Lost::Answer));
        assert_eq!(total.get(), 0);
        large.event(b"late");
        assert_eq!(total.get(), 0);
        let body = Bytes::from(vec![b'x'; 1000]);
        let mut first = Collected::new(bounds, &total);
        first.whole(&body);
        let mut second = Collected::new(bounds, &total);
        second.whole(&body);
        assert_eq!(first.lost(), None);
        assert_eq!(second.lost(), Some(Lost::Buffer));
        assert_eq!(total.get(), 1000);
    }
}
