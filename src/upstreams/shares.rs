//! Who has how many of a group's places: a key that has more than its part
//! leaves a few to others.
//!
//! Keys take turns in line ([`queue`](super::queue)), but that helps nobody who
//! finds every place taken by one key: he waits until one of that key's requests
//! has ended. So while other keys come, who has more than its part leaves a few
//! of the places that it could use free for those who have less: at most an
//! eighth, so none of fewer than eight. What nobody has asked for in the last
//! [`LATELY`] is anybody's, and so are all places where one key is alone.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::queue::Key;

/// How long a key that came, or was served, counts as one that wants its part.
const LATELY: Duration = Duration::from_secs(10);
/// Of so many places one is kept free; of fewer none is: it would be too large a
/// part of them.
const RESERVED_OF: u32 = 8;
/// A key that has less than this part of the places is never held back, however
/// many others there are.
const MODEST: u32 = 4;
/// How many keys are remembered before those that are idle are forgotten, and
/// at most.
const KEYS_TIDY: usize = 64;
const KEYS_MAX: usize = 1024;

/// How many places there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// For requests with a model: what keys have parts of.
    pub(super) all: u32,
    /// Those of them that are of use to one request.
    pub(super) useful: u32,
    /// Those of these that are free.
    pub(super) free: u32,
}

/// Who has how many.
#[derive(Debug, Default)]
pub(super) struct Shares {
    keys: HashMap<Key, Held>,
}

#[derive(Debug)]
struct Held {
    running: u32,
    last: Instant,
}

impl Shares {
    /// Returns whether a key may have one more of the places that are free.
    pub(super) fn allows(&self, key: &Key, places: Places, now: Instant) -> bool {
        let reserve = places.useful / RESERVED_OF;
        let own = self.keys.get(key).map_or(0, |held| held.running);
        if places.free > reserve || own < (places.all / MODEST).max(1) {
            return true;
        }
        let others = self.others(key, now);
        others == 0 || own < places.all.div_ceil(others.saturating_add(1))
    }

    /// Notes that one of this key has come.
    pub(super) fn came(&mut self, key: &Key, now: Instant) {
        if let Some(held) = self.held(key, now) {
            held.last = now;
        }
    }

    /// Counts one more. Returns whether it is counted; if so, call [`Self::end`].
    pub(super) fn begin(&mut self, key: &Key, now: Instant) -> bool {
        let held = self.held(key, now);
        held.map(|held| (held.running, held.last) = (held.running.saturating_add(1), now))
            .is_some()
    }

    /// Counts one less.
    pub(super) fn end(&mut self, key: &Key, now: Instant) {
        if let Some(held) = self.keys.get_mut(key) {
            (held.running, held.last) = (held.running.saturating_sub(1), now);
        }
    }

    /// Returns how many other keys want their part.
    fn others(&self, key: &Key, now: Instant) -> u32 {
        let others = self
            .keys
            .iter()
            .filter(|(other, held)| *other != key && held.wants(now));
        u32::try_from(others.count()).unwrap_or(u32::MAX)
    }

    fn held(&mut self, key: &Key, now: Instant) -> Option<&mut Held> {
        // Two look-ups: the borrow checker does not see that the first found none.
        if !self.keys.contains_key(key) {
            if self.keys.len() >= KEYS_TIDY {
                self.keys.retain(|_, held| held.wants(now));
            }
            if self.keys.len() >= KEYS_MAX {
                return None;
            }
        }
        let new = || Held {
            running: 0,
            last: now,
        };
        Some(self.keys.entry(key.clone()).or_insert_with(new))
    }
}

impl Held {
    fn wants(&self, now: Instant) -> bool {
        self.running > 0 || now.saturating_duration_since(self.last) <= LATELY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight places and their clock.
    struct Bench {
        shares: Shares,
        all: u32,
        used: u32,
        now: Instant,
    }

    impl Bench {
        fn new(all: u32) -> Self {
            Self {
                shares: Shares::default(),
                all,
                used: 0,
                now: Instant::now(),
            }
        }

        /// Takes as many as it may, at most so many; returns how many.
        fn take(&mut self, name: &str, most: u32) -> u32 {
            let key = Key::Name(name.into());
            self.shares.came(&key, self.now);
            for taken in 0..most {
                let places = Places {
                    all: self.all,
                    useful: self.all,
                    free: self.all - self.used,
                };
                if places.free == 0 || !self.shares.allows(&key, places, self.now) {
                    return taken;
                }
                assert!(self.shares.begin(&key, self.now));
                self.used += 1;
            }
            most
        }

        fn give(&mut self, name: &str, times: u32) {
            for _ in 0..times {
                self.shares.end(&Key::Name(name.into()), self.now);
                self.used -= 1;
            }
        }
    }

    #[test]
    fn who_is_alone_may_have_all_and_who_has_more_than_its_part_leaves_some() {
        let mut bench = Bench::new(8);
        assert_eq!(bench.take("greedy", 100), 8);
        bench.give("greedy", 1);
        assert_eq!(bench.take("normal", 1), 1);
        bench.give("normal", 1);
        // One place stays free for whoever comes, and is taken at once.
        assert_eq!(bench.take("greedy", 1), 0);
        assert_eq!(bench.take("another", 1), 1);
        bench.give("another", 1);
        bench.give("greedy", 1);
        assert_eq!(bench.take("greedy", 100), 1);
        // Nobody else came for a while.
        bench.now += Duration::from_secs(11);
        assert_eq!(bench.take("greedy", 100), 1);
    }

    #[test]
    fn those_who_have_no_more_than_their_part_use_every_place() {
        let mut bench = Bench::new(8);
        assert_eq!((bench.take("a", 4), bench.take("b", 100)), (4, 4));
        // Of many keys each may have a quarter.
        let mut bench = Bench::new(8);
        for name in ["a", "b", "c", "d"] {
            assert_eq!(bench.take(name, 2), 2);
        }
    }

    #[test]
    fn few_places_are_kept_for_nobody() {
        let mut bench = Bench::new(7);
        assert_eq!((bench.take("normal", 1), bench.take("greedy", 9)), (1, 6));
        bench.give("normal", 1);
        assert_eq!(bench.take("greedy", 9), 1);
    }

    #[test]
    fn no_more_than_an_eighth_is_kept_free() {
        for all in 1..100 {
            let mut bench = Bench::new(all);
            bench.take("normal", 0);
            let taken = bench.take("greedy", 100);
            assert!(taken * 8 >= all * 7, "{taken} of {all}");
            assert_eq!(taken < all, all >= 8, "{taken} of {all}");
        }
    }

    #[test]
    fn who_can_use_few_of_the_places_leaves_an_eighth_of_those_and_has_its_part_of_all() {
        let mut bench = Bench::new(32);
        bench.take("normal", 0);
        let key = Key::Name("greedy".into());
        assert_eq!(bench.take("greedy", 7), 7);
        let few = |useful, free| Places {
            all: 32,
            useful,
            free,
        };
        // A quarter of all, though it is nearly all of what is of use to it.
        assert!(bench.shares.allows(&key, few(8, 1), bench.now));
        bench.take("greedy", 25);
        assert!(!bench.shares.allows(&key, few(8, 1), bench.now));
        assert!(bench.shares.allows(&key, few(8, 2), bench.now));
        assert!(bench.shares.allows(&key, few(7, 1), bench.now));
    }

    #[test]
    fn keys_that_are_idle_are_forgotten_and_never_too_many_are_known() {
        let mut bench = Bench::new(8);
        for nth in 0..2 * KEYS_MAX {
            bench.take(&nth.to_string(), 0);
        }
        assert_eq!(bench.shares.keys.len(), KEYS_MAX);
        bench.now += Duration::from_secs(11);
        bench.take("late", 1);
        assert_eq!(bench.shares.keys.len(), 1);
    }
}
