//! Who waits for a place, and who is next: the order alone, without a clock, a
//! lock or a socket. [`waiting`](super::waiting) makes a line of it.
//!
//! Start at [`Queue::make_room`] and [`Queue::push`] for who comes in, and at
//! [`Queue::take`] for who is next:
//!
//! - *interactive* before *batch*; but of [`BATCH_EVERY`] places one goes to
//!   batch while it waits, so that it never starves;
//! - within a class by deficit round robin between the keys, with a quantum of
//!   one request and a cost of one for each: every key in turn. One that cannot
//!   use what is free keeps its turn;
//! - within a key first come, first served.
//!
//! **Invariant:** never more than `size` wait, but for those who come with a larger
//! one. When one more comes, it goes, or who has most places does: see
//! [`Queue::make_room`].

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::context::Class;

/// Of this many places one goes to batch while it waits: interactive requests
/// keep at least four fifths, the reserve that Stripe's load shedders keep for
/// what is critical being one fifth.
pub const BATCH_EVERY: u32 = 5;
/// How many samples the pace is an average of.
const SAMPLES_MAX: u32 = 32;
/// With fewer samples nobody is turned away for coming too late.
const SAMPLES_MIN: u32 = 4;
/// After so long without a line, what was known of its pace is forgotten.
const PACE_FORGOTTEN: Duration = Duration::from_secs(60);
/// How long a key that came counts as one that wants its part, and how many of
/// them are remembered.
const SEEN_LATELY: Duration = Duration::from_secs(10);
const SEEN_MAX: usize = 64;
/// When to come back, if nothing is known of the pace.
const RETRY_UNKNOWN: Duration = Duration::from_secs(5);
/// The least and the most that a client is asked to wait.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(10 * 60);

/// Between whom the places are shared.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// A key of the keys file, by its name.
    Name(Arc<str>),
    /// A client without a key.
    Address(IpAddr),
}

/// Who waits, in order.
#[derive(Debug)]
pub struct Queue<T> {
    interactive: Line<T>,
    batch: Line<T>,
    tickets: u64,
    /// How many interactive ones went since a batch one did, while one waited.
    in_a_row: u32,
    pace: Pace,
    /// Who came while there was a line, and when last; latest last.
    seen: VecDeque<(Key, Instant)>,
}

/// A place in line; what is needed to find it again.
#[derive(Clone, Debug)]
pub struct Ticket {
    number: u64,
    class: Class,
    key: Key,
}

/// What somebody who comes is measured by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The most that wait.
    pub size: usize,
    /// How long it would wait, if it is turned away when that is too short;
    /// `None` if it has somewhere else to go.
    pub wait: Option<Duration>,
}

/// Why somebody is turned away, and when to come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Whose fault it is.
    pub reason: Reason,
    /// An estimate from the pace of the line, 1 s to 10 min.
    pub retry_after: Duration,
}

/// Why somebody is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The line is full.
    Full,
    /// The line is full, or too long, and this key has more than its fair share.
    FullForKey,
    /// Its turn would not come in time.
    Late,
}

impl Reason {
    /// Returns the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::FullForKey => "full_for_key",
            Self::Late => "late",
        }
    }
}

/// What one who waits says when it is asked whether it can use what is free.
#[derive(Debug)]
pub enum Look<R> {
    /// It can, and this is what it gets.
    Fits(R),
    /// Not now.
    Not,
    /// It has nothing to wait for any more.
    Over(R),
}

#[derive(Debug)]
struct Line<T> {
    /// In the order of their turns; none without an entry.
    lanes: VecDeque<Lane<T>>,
    len: usize,
}

#[derive(Debug)]
struct Lane<T> {
    key: Key,
    /// Oldest first, so sorted by number.
    entries: VecDeque<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    number: u64,
    item: T,
}

/// How fast places become free while somebody waits.
#[derive(Debug, Default)]
struct Pace {
    /// The average time between two, over the last [`SAMPLES_MAX`].
    between: Duration,
    samples: u32,
    /// The last one, or when somebody began to wait.
    since: Option<Instant>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            interactive: Line::default(),
            batch: Line::default(),
            tickets: 0,
            in_a_row: 0,
            pace: Pace::default(),
            seen: VecDeque::new(),
        }
    }
}

impl<T> Queue<T> {
    /// Returns how many wait.
    pub fn len(&self) -> usize {
        self.interactive.len + self.batch.len
    }

    /// Returns whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes that one of this key has come. For the question whose fault a full
    /// line is: also those are others who never wait long.
    pub fn came(&mut self, key: &Key, now: Instant) {
        if let Some(at) = self.seen.iter().position(|(seen, _)| seen == key) {
            self.seen.remove(at);
        } else if self.seen.len() >= SEEN_MAX {
            self.seen.pop_front();
        }
        self.seen.push_back((key.clone(), now));
        let is_old = |(_, at): &(Key, Instant)| now.saturating_duration_since(*at) > SEEN_LATELY;
        while self.seen.front().is_some_and(is_old) {
            self.seen.pop_front();
        }
    }

    /// Returns how many of a class wait.
    pub fn len_of(&self, class: Class) -> usize {
        self.line(class).len
    }

    /// Decides whether one more may wait. Where the line is full, it may take
    /// the place of the newest of the key that has most, if that has at least
    /// two more than its own; and of an interactive one a batch one's place.
    /// Who loses its place is returned, with what it is to be told.
    ///
    /// # Errors
    /// The newcomer is to be turned away.
    pub fn make_room(
        &mut self,
        key: &Key,
        class: Class,
        rules: Rules,
        now: Instant,
    ) -> Result<Option<(T, Refused)>, Refused> {
        if rules.size == 0 {
            return Err(self.refused(Reason::Full, now));
        }
        if let Some(wait) = rules.wait {
            let (ahead, expected) = self.expected(key, class, now);
            // The first in line is never turned away: it is who measures.
            if let Some(expected) = expected.filter(|expected| ahead > 0 && *expected > wait) {
                return Err(Refused {
                    reason: self.reason(key, class, rules.size, Reason::Late),
                    retry_after: within_bounds(expected.saturating_sub(wait)),
                });
            }
        }
        if self.len() < rules.size {
            return Ok(None);
        }
        let reason = self.reason(key, class, rules.size, Reason::Full);
        let held = self.line(class).held(key);
        let victim = if class == Class::Interactive && self.batch.len > 0 {
            self.batch.greediest().map(|lane| (Class::Batch, lane))
        } else {
            let most = self.line(class).greediest();
            most.filter(|(_, most)| *most > held + 1)
                .map(|lane| (class, lane))
        };
        let Some((of, (lane, _))) = victim else {
            return Err(self.refused(reason, now));
        };
        let Some((key, item)) = self.line_mut(of).remove_newest(lane) else {
            return Err(self.refused(reason, now));
        };
        // In its own class it lost its place to a key that has less. To a more
        // urgent one anybody may lose it.
        let reason = if of == class {
            Reason::FullForKey
        } else {
            self.reason(&key, of, rules.size, Reason::Full)
        };
        Ok(Some((item, self.refused(reason, now))))
    }

    /// Puts one at the end of its key's line, and returns its ticket.
    pub fn push(&mut self, key: Key, class: Class, item: T, now: Instant) -> Ticket {
        if self.is_empty() {
            self.pace.begin(now);
        }
        self.tickets += 1;
        let number = self.tickets;
        self.line_mut(class).push(&key, Entry { number, item });
        Ticket { number, class, key }
    }

    /// Takes the first who can use what is free, in the order of the module's
    /// page. `look` asks one after the other, and may be asked again.
    pub fn take<R>(&mut self, now: Instant, mut look: impl FnMut(&T) -> Look<R>) -> Option<(T, R)> {
        let classes = if self.in_a_row + 1 >= BATCH_EVERY {
            [Class::Batch, Class::Interactive]
        } else {
            [Class::Interactive, Class::Batch]
        };
        for class in classes {
            let Some((lane, nth, result, served)) = self.line(class).find(&mut look) else {
                continue;
            };
            let item = self.line_mut(class).remove(lane, nth, served)?;
            if served {
                self.pace.step(now);
                self.in_a_row = match class {
                    Class::Interactive if self.batch.len > 0 => self.in_a_row + 1,
                    Class::Interactive | Class::Batch => 0,
                };
            }
            return Some((item, result));
        }
        None
    }

    /// Removes one who leaves; `None` if it is not in line any more.
    pub fn remove(&mut self, ticket: &Ticket) -> Option<T> {
        let line = self.line_mut(ticket.class);
        let (lane, nth) = line.place(ticket)?;
        line.remove(lane, nth, false)
    }

    /// Returns the position, from 1, as things stand; `None` if it is not in
    /// line any more.
    pub fn position(&self, ticket: &Ticket) -> Option<usize> {
        let (lane, nth) = self.line(ticket.class).place(ticket)?;
        Some(self.ahead(ticket.class, lane, nth) + 1)
    }

    /// Returns when who is turned away now should come back: when those who
    /// wait now have been served.
    pub fn retry_after(&self, now: Instant) -> Duration {
        self.pace
            .of(self.len(), 1, now)
            .map_or(RETRY_UNKNOWN, within_bounds)
    }

    /// Returns what `look` says of anybody.
    pub fn any(&self, look: impl Fn(&T) -> bool) -> bool {
        let lines = [&self.interactive, &self.batch];
        let lanes = lines.into_iter().flat_map(|line| &line.lanes);
        lanes
            .flat_map(|lane| &lane.entries)
            .any(|entry| look(&entry.item))
    }

    /// Returns everybody who waits, in no particular order.
    pub fn each(&mut self) -> impl Iterator<Item = &mut T> {
        let lines = [&mut self.interactive, &mut self.batch];
        let lanes = lines.into_iter().flat_map(|line| &mut line.lanes);
        lanes.flat_map(|lane| lane.entries.iter_mut().map(|entry| &mut entry.item))
    }

    /// Returns how many would be ahead of a newcomer, and how long it would wait
    /// if that is known.
    fn expected(&self, key: &Key, class: Class, now: Instant) -> (usize, Option<Duration>) {
        let line = self.line(class);
        let own = line.lanes.iter().position(|lane| lane.key == *key);
        let (lane, nth) = match own {
            Some(lane) => (lane, line.held(key)),
            None => (line.lanes.len(), 0),
        };
        let ahead = self.ahead(class, lane, nth);
        (ahead, self.pace.of(ahead + 1, SAMPLES_MIN, now))
    }

    /// Returns how many go before the `nth` of a lane.
    fn ahead(&self, class: Class, lane: usize, nth: usize) -> usize {
        let own = self.line(class).ahead(lane, nth);
        let turns = usize::try_from(BATCH_EVERY - 1).unwrap_or(1);
        own + match class {
            Class::Interactive => self.batch.len.min(own / turns),
            Class::Batch => self.interactive.len.min((own + 1) * turns),
        }
    }

    /// Tells whose fault it is: the key's, if there are others, who wait or came
    /// lately, and it would have more than its part of all places.
    fn reason(&self, key: &Key, class: Class, size: usize, ours: Reason) -> Reason {
        let line = self.line(class);
        let held = line.held(key);
        let waiting = line.lanes.len() - usize::from(held > 0);
        let seen = self.seen.iter().filter(|(seen, _)| seen != key).count();
        let others = waiting.max(seen);
        let share = (size / (others + 1)).max(1);
        if others > 0 && held + 1 > share {
            Reason::FullForKey
        } else {
            ours
        }
    }

    fn refused(&self, reason: Reason, now: Instant) -> Refused {
        Refused {
            reason,
            retry_after: self.retry_after(now),
        }
    }

    fn line(&self, class: Class) -> &Line<T> {
        match class {
            Class::Interactive => &self.interactive,
            Class::Batch => &self.batch,
        }
    }

    fn line_mut(&mut self, class: Class) -> &mut Line<T> {
        match class {
            Class::Interactive => &mut self.interactive,
            Class::Batch => &mut self.batch,
        }
    }
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self {
            lanes: VecDeque::new(),
            len: 0,
        }
    }
}

impl<T> Line<T> {
    fn push(&mut self, key: &Key, entry: Entry<T>) {
        self.len += 1;
        match self.lanes.iter_mut().find(|lane| lane.key == *key) {
            Some(lane) => lane.entries.push_back(entry),
            None => self.lanes.push_back(Lane {
                key: key.clone(),
                entries: VecDeque::from([entry]),
            }),
        }
    }

    /// Returns where the first is who has something to take, what, and whether
    /// it is served by that.
    fn find<R>(&self, look: &mut impl FnMut(&T) -> Look<R>) -> Option<(usize, usize, R, bool)> {
        for (at, lane) in self.lanes.iter().enumerate() {
            for (nth, entry) in lane.entries.iter().enumerate() {
                match look(&entry.item) {
                    Look::Fits(result) => return Some((at, nth, result, true)),
                    Look::Over(result) => return Some((at, nth, result, false)),
                    Look::Not => {}
                }
            }
        }
        None
    }

    /// Removes the `nth` of a lane; who was served has had its turn.
    fn remove(&mut self, at: usize, nth: usize, served: bool) -> Option<T> {
        let lane = self.lanes.get_mut(at)?;
        let entry = lane.entries.remove(nth)?;
        self.len -= 1;
        if lane.entries.is_empty() {
            self.lanes.remove(at);
        } else if served && let Some(lane) = self.lanes.remove(at) {
            self.lanes.push_back(lane);
        }
        Some(entry.item)
    }

    fn remove_newest(&mut self, at: usize) -> Option<(Key, T)> {
        let lane = self.lanes.get(at)?;
        let (key, last) = (lane.key.clone(), lane.entries.len().checked_sub(1)?);
        Some((key, self.remove(at, last, false)?))
    }

    fn place(&self, ticket: &Ticket) -> Option<(usize, usize)> {
        let at = self.lanes.iter().position(|lane| lane.key == ticket.key)?;
        let entries = &self.lanes.get(at)?.entries;
        let nth = entries.binary_search_by_key(&ticket.number, |entry| entry.number);
        Some((at, nth.ok()?))
    }

    fn held(&self, key: &Key) -> usize {
        let own = self.lanes.iter().find(|lane| lane.key == *key);
        own.map_or(0, |lane| lane.entries.len())
    }

    /// Returns which lane is the longest, and how long; of several the one whose
    /// turn comes last.
    fn greediest(&self) -> Option<(usize, usize)> {
        let lengths = self.lanes.iter().map(|lane| lane.entries.len());
        lengths.enumerate().max_by_key(|(_, len)| *len)
    }

    /// Returns how many of this line go before the `nth` of a lane.
    fn ahead(&self, lane: usize, nth: usize) -> usize {
        let before = |(at, other): (usize, &Lane<T>)| match at.cmp(&lane) {
            std::cmp::Ordering::Less => other.entries.len().min(nth + 1),
            std::cmp::Ordering::Equal => nth,
            std::cmp::Ordering::Greater => other.entries.len().min(nth),
        };
        self.lanes.iter().enumerate().map(before).sum()
    }
}

impl Pace {
    fn begin(&mut self, now: Instant) {
        let idle = self.since.map(|since| now.saturating_duration_since(since));
        if idle.is_none_or(|idle| idle > PACE_FORGOTTEN) {
            self.samples = 0;
        }
        self.since = Some(now);
    }

    fn step(&mut self, now: Instant) {
        (self.between, self.samples) = self.with(self.gap(now));
        self.since = Some(now);
    }

    /// Returns how long so many steps take, if at least `samples` are known. A
    /// step that has taken longer than others by now counts as it is: a line
    /// that has come to a stop does not move at the pace that it had.
    fn of(&self, steps: usize, samples: u32, now: Instant) -> Option<Duration> {
        let steps = u32::try_from(steps).unwrap_or(u32::MAX);
        let (with_this_one, _) = self.with(self.gap(now));
        let between = self.between.max(with_this_one);
        (self.samples >= samples).then(|| between.saturating_mul(steps))
    }

    /// Returns the average with one sample more, and of how many it is one.
    fn with(&self, sample: Duration) -> (Duration, u32) {
        let samples = (self.samples + 1).min(SAMPLES_MAX);
        let weight = 1.0 / f64::from(samples);
        let between = self.between.mul_f64(1.0 - weight) + sample.mul_f64(weight);
        (between, samples)
    }

    fn gap(&self, now: Instant) -> Duration {
        let since = self.since.unwrap_or(now);
        now.saturating_duration_since(since)
    }
}

fn within_bounds(wait: Duration) -> Duration {
    wait.clamp(RETRY_MIN, RETRY_MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;
    use Class::{Batch, Interactive};

    fn key(name: &str) -> Key {
        Key::Name(name.into())
    }

    fn rules(size: usize) -> Rules {
        Rules { size, wait: None }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Puts these in line, each as `key`, or `key/` for batch.
    fn queue(names: &str, now: Instant) -> (Queue<String>, Vec<Ticket>) {
        let mut queue = Queue::default();
        let mut counts: HashMap<&str, u32> = HashMap::new();
        let tickets = names.split_whitespace().map(|name| {
            let count = counts.entry(name).or_default();
            *count += 1;
            let class = if name.ends_with('/') {
                Batch
            } else {
                Interactive
            };
            let item = format!("{name}{count}");
            queue.push(key(name.trim_end_matches('/')), class, item, now)
        });
        let tickets = tickets.collect();
        (queue, tickets)
    }

    fn next(queue: &mut Queue<String>, now: Instant) -> Option<String> {
        let taken = queue.take(now, |_| Look::Fits(()));
        taken.map(|(item, ())| item)
    }

    /// Everybody in the order of being served.
    fn order(queue: &mut Queue<String>) -> String {
        let now = Instant::now();
        let all: Vec<_> = std::iter::from_fn(|| next(queue, now)).collect();
        all.join(" ")
    }

    #[test]
    fn keys_take_turns_and_each_key_is_served_in_its_own_order() {
        let (mut queue, _) = queue("a a a a b c c", Instant::now());
        assert_eq!(order(&mut queue), "a1 b1 c1 a2 c2 a3 a4");
    }

    #[test]
    fn interactive_goes_first_and_batch_gets_every_fifth_place() {
        let names = "x/ x/ a a a a a a a a a";
        let (mut queue, _) = queue(names, Instant::now());
        assert_eq!(order(&mut queue), "a1 a2 a3 a4 x/1 a5 a6 a7 a8 x/2 a9");
    }

    #[test]
    fn places_that_went_by_while_no_batch_waited_are_no_debt() {
        let now = Instant::now();
        let (mut queue, _) = queue("a a a a a a a a", now);
        for _ in 0..6 {
            next(&mut queue, now);
        }
        queue.push(key("x"), Batch, "x".into(), now);
        assert_eq!(order(&mut queue), "a7 a8 x");
    }

    #[test]
    fn who_cannot_use_what_is_free_keeps_its_turn() {
        let now = Instant::now();
        let (mut queue, _) = queue("a a b b", now);
        let only_b = |item: &String| match item.starts_with('b') {
            true => Look::Fits(()),
            false => Look::Not,
        };
        assert_eq!(queue.take(now, only_b).unwrap().0, "b1");
        assert_eq!(order(&mut queue), "a1 b2 a2");
    }

    #[test]
    fn who_has_nothing_to_wait_for_is_taken_out_and_costs_its_key_no_turn() {
        let now = Instant::now();
        let (mut queue, _) = queue("a a b", now);
        let over = |item: &String| match item.as_str() {
            "a1" => Look::Over("over"),
            _ => Look::Not,
        };
        assert_eq!(queue.take(now, over), Some(("a1".into(), "over")));
        assert_eq!(order(&mut queue), "a2 b1");
    }

    #[test]
    fn positions_are_those_in_which_all_are_served() {
        let now = Instant::now();
        for names in [
            "a a a b c c",
            "a b c d",
            "x/ a a a a a a a b x/ y/ a a a a",
            "x/ y/ x/",
        ] {
            let (mut queue, tickets) = queue(names, now);
            let positions: Vec<_> = tickets.iter().map(|t| queue.position(t).unwrap()).collect();
            let mut by_position: Vec<_> = positions.iter().zip(&tickets).collect();
            by_position.sort_by_key(|(position, _)| **position);
            for (nth, (position, ticket)) in by_position.into_iter().enumerate() {
                assert_eq!(*position, nth + 1, "{names}");
                next(&mut queue, now).unwrap();
                assert_eq!(queue.position(ticket), None, "{names} at {position}");
            }
        }
    }

    #[test]
    fn who_leaves_is_gone() {
        let now = Instant::now();
        let (mut queue, tickets) = queue("a a b", now);
        assert_eq!(queue.remove(&tickets[0]).unwrap(), "a1");
        assert_eq!(queue.remove(&tickets[0]), None);
        assert_eq!(queue.position(&tickets[1]), Some(1));
        assert_eq!((queue.len(), order(&mut queue)), (2, "a2 b1".into()));
        assert_eq!(queue.remove(&tickets[1]), None);
    }

    #[test]
    fn a_line_of_no_length_takes_nobody() {
        let mut queue = Queue::<String>::default();
        let refused = queue.make_room(&key("a"), Interactive, rules(0), Instant::now());
        assert_eq!(refused.unwrap_err().reason, Reason::Full);
    }

    #[test]
    fn in_a_full_line_the_greediest_key_loses_its_newest_place_to_who_has_less() {
        let now = Instant::now();
        let (mut queue, _) = queue("a a a b", now);
        let (item, refused) = queue
            .make_room(&key("c"), Interactive, rules(4), now)
            .unwrap()
            .unwrap();
        assert_eq!((item.as_str(), refused.reason), ("a3", Reason::FullForKey));
        queue.push(key("c"), Interactive, "c1".into(), now);
        // Now a has one more than the others: nothing would be gained.
        let refused = queue.make_room(&key("b"), Interactive, rules(4), now);
        assert_eq!(refused.unwrap_err().reason, Reason::FullForKey);
        let (_, _) = queue
            .make_room(&key("d"), Interactive, rules(4), now)
            .unwrap()
            .unwrap();
        queue.push(key("d"), Interactive, "d1".into(), now);
        assert_eq!(order(&mut queue), "a1 b1 c1 d1");
    }

    #[test]
    fn a_full_line_is_the_keys_fault_only_if_it_has_more_than_its_share() {
        let now = Instant::now();
        let reason = |names: &str, who: &str| {
            let (mut queue, _) = queue(names, now);
            let refused = queue.make_room(&key(who), Interactive, rules(4), now);
            refused.unwrap_err().reason
        };
        // Alone it may have all; that there are not more is ours.
        assert_eq!(reason("a a a a", "a"), Reason::Full);
        assert_eq!(reason("a a a b", "a"), Reason::FullForKey);
        assert_eq!(reason("a b c d", "e"), Reason::Full);
        assert_eq!(reason("a b c d", "a"), Reason::FullForKey);
    }

    #[test]
    fn others_that_are_served_quickly_count_as_others_for_a_while() {
        let start = Instant::now();
        let (mut queue, _) = queue("a a a a", start);
        let mut reason = |now| {
            queue.came(&key("a"), now);
            let refused = queue.make_room(&key("a"), Interactive, rules(4), now);
            refused.unwrap_err().reason
        };
        assert_eq!(reason(start), Reason::Full);
        queue.came(&key("b"), start);
        let mut reason = |now| {
            queue.came(&key("a"), now);
            let refused = queue.make_room(&key("a"), Interactive, rules(4), now);
            refused.unwrap_err().reason
        };
        assert_eq!(reason(start), Reason::FullForKey);
        assert_eq!(reason(start + SEEN_LATELY + ms(1)), Reason::Full);
        for nth in 0..1000 {
            queue.came(&key(&nth.to_string()), start);
        }
        assert_eq!(queue.seen.len(), SEEN_MAX);
    }

    #[test]
    fn in_a_full_line_batch_makes_room_for_interactive_and_not_the_other_way() {
        let now = Instant::now();
        let (mut queue, _) = queue("x/ x/ y/", now);
        let (item, _) = queue
            .make_room(&key("a"), Interactive, rules(3), now)
            .unwrap()
            .unwrap();
        assert_eq!(item, "x/2");
        queue.push(key("a"), Interactive, "a1".into(), now);
        assert!(queue.make_room(&key("z"), Batch, rules(3), now).is_err());
    }

    #[test]
    fn who_would_be_late_is_told_at_once_but_only_when_the_pace_is_known() {
        let mut now = Instant::now();
        let (mut queue, _) = queue("a a a a a a a a", now);
        let late = Rules {
            size: 100,
            wait: Some(ms(1500)),
        };
        assert!(queue.make_room(&key("a"), Interactive, late, now).is_ok());
        assert_eq!(queue.retry_after(now), RETRY_UNKNOWN);
        for _ in 0..4 {
            now += ms(500);
            next(&mut queue, now).unwrap();
        }
        // Four are left; the fifth would wait two and a half seconds.
        let refused = queue
            .make_room(&key("a"), Interactive, late, now)
            .unwrap_err();
        assert_eq!(
            (refused.reason, refused.retry_after),
            (Reason::Late, ms(1000))
        );
        assert_eq!(queue.retry_after(now), ms(2000));
        // Another key's turn comes second.
        assert!(queue.make_room(&key("b"), Interactive, late, now).is_ok());
        // Who has somewhere else to go may try.
        assert!(
            queue
                .make_room(&key("a"), Interactive, rules(100), now)
                .is_ok()
        );
        // The first in line measures, whatever is expected.
        while next(&mut queue, now).is_some() {}
        let at_once = Rules {
            size: 100,
            wait: Some(ms(1)),
        };
        assert!(
            queue
                .make_room(&key("a"), Interactive, at_once, now)
                .is_ok()
        );
        // What was known is forgotten after a pause.
        now += PACE_FORGOTTEN + ms(1);
        queue.push(key("a"), Interactive, "new".into(), now);
        assert!(
            queue
                .make_room(&key("a"), Interactive, at_once, now)
                .is_ok()
        );
    }

    #[test]
    fn a_line_that_has_come_to_a_stop_is_not_told_of_as_if_it_moved() {
        let mut now = Instant::now();
        let (mut queue, _) = queue("a a a a a a a a", now);
        for _ in 0..4 {
            now += ms(10);
            next(&mut queue, now).unwrap();
        }
        assert_eq!(queue.retry_after(now), RETRY_MIN);
        let soon = Rules {
            size: 100,
            wait: Some(ms(5000)),
        };
        assert!(queue.make_room(&key("b"), Interactive, soon, now).is_ok());
        // Nobody was served for a minute: whatever the pace was, it is not now.
        now += ms(60_000);
        assert!(queue.retry_after(now) > Duration::from_secs(30));
        let refused = queue.make_room(&key("b"), Interactive, soon, now);
        assert_eq!(refused.unwrap_err().reason, Reason::Late);
    }

    #[test]
    fn a_retry_is_never_asked_for_sooner_than_in_a_second_nor_later_than_in_ten_minutes() {
        assert_eq!(within_bounds(ms(3)), RETRY_MIN);
        assert_eq!(within_bounds(Duration::from_secs(1_000_000)), RETRY_MAX);
    }

    /// Twenty thousand random steps against a plain list of who waits: nobody is
    /// lost, nobody is served twice, the bound holds, the order is fair.
    #[test]
    fn whatever_happens_everybody_leaves_once_and_keys_that_wait_get_equal_parts() {
        const SIZE: usize = 12;
        let keys = ["a", "b", "c", "d"];
        for seed in 0..20 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut now = Instant::now();
            let mut queue: Queue<u64> = Queue::default();
            let mut inside: HashMap<u64, (Ticket, &str, Class)> = HashMap::new();
            let mut serial = 0;
            // What each interactive key got since all of them wait without a gap.
            let mut got: HashMap<&str, u32> = HashMap::new();
            let mut interactive_run = 0;
            for step in 0..1000 {
                now += ms(rng.random_range(0..50));
                match rng.random_range(0..10) {
                    0..5 => {
                        let name = keys[rng.random_range(0..keys.len())];
                        let class = Class::ALL[usize::from(rng.random_bool(0.3))];
                        match queue.make_room(&key(name), class, rules(SIZE), now) {
                            Err(_) => assert_eq!(queue.len(), SIZE),
                            Ok(lost) => {
                                if let Some((lost, _)) = lost {
                                    inside.remove(&lost).unwrap();
                                }
                                serial += 1;
                                let ticket = queue.push(key(name), class, serial, now);
                                inside.insert(serial, (ticket, name, class));
                            }
                        }
                    }
                    5..9 => {
                        // What is free suits some of them.
                        let odd = rng.random_bool(0.2);
                        let suits = |item: &u64| !odd || item % 2 == 1;
                        let taken = queue.take(now, |item| match suits(item) {
                            true => Look::Fits(()),
                            false => Look::Not,
                        });
                        match taken {
                            None => assert!(!inside.keys().any(suits)),
                            Some((item, ())) => {
                                assert!(suits(&item));
                                let (_, name, class) = inside.remove(&item).unwrap();
                                let older = inside.iter().any(|(other, (_, n, c))| {
                                    *n == name && *c == class && *other < item && suits(other)
                                });
                                assert!(!older, "seed {seed} step {step}: {item} overtook");
                                let batch_waits = inside.values().any(|(_, _, c)| *c == Batch);
                                if class == Batch || !batch_waits {
                                    interactive_run = 0;
                                } else if !odd {
                                    interactive_run += 1;
                                }
                                assert!(interactive_run < BATCH_EVERY, "seed {seed} step {step}");
                                if class == Interactive && !odd {
                                    *got.entry(name).or_default() += 1;
                                }
                            }
                        }
                        if odd {
                            got.clear();
                        }
                    }
                    _ => {
                        let some = inside.keys().next().copied();
                        if let Some(item) = some {
                            let (ticket, ..) = inside.remove(&item).unwrap();
                            assert_eq!(queue.remove(&ticket), Some(item));
                        }
                    }
                }
                let waits = |name: &&str| {
                    let mut all = inside.values();
                    all.any(|(_, n, class)| n == name && *class == Interactive)
                };
                if keys.iter().all(waits) {
                    let parts = keys.iter().map(|name| got.get(name).copied().unwrap_or(0));
                    let (least, most) = (parts.clone().min(), parts.max());
                    assert!(
                        most.unwrap() - least.unwrap() <= 1,
                        "seed {seed} step {step}: {got:?}"
                    );
                } else {
                    got.clear();
                }
                assert_eq!(queue.len(), inside.len());
                assert!(queue.len() <= SIZE);
            }
            while let Some((item, ())) = queue.take(now, |_| Look::Fits(())) {
                inside.remove(&item).unwrap();
            }
            assert!(inside.is_empty(), "seed {seed}");
        }
    }
}
