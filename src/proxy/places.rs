//! The places of connections: which of them wait for their client, and which of
//! those ends first where somebody new needs room.
//!
//! A place is changed by its own connection alone, without a lock, as often as a
//! request begins and ends; whoever needs room looks at all of them, and takes
//! several at a time, so that a flood costs a look per [`LOOK`] newcomers.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    task::Context,
    time::{Duration, Instant},
};

use futures_util::task::AtomicWaker;

/// How many that may go are remembered at a look.
const LOOK: usize = 64;
/// After a look that found nobody, how long nobody looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How long a connection must have been idle to go first: one that has just been
/// used is likely to be used again at once.
const LONG: Duration = Duration::from_secs(1);

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaits {
    /// A request, of which nothing has come.
    Request,
    /// The rest of a header.
    Header,
}

/// Why a connection has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goes {
    /// Somebody new needs its place.
    MakesRoom,
    /// The process stops.
    Stops,
}

/// The place of one connection.
#[derive(Debug)]
pub(super) struct Place {
    /// What the moments of all places are counted from.
    epoch: Instant,
    state: AtomicU64,
    /// Wakes who reads from the connection.
    reader: AtomicWaker,
}

/// A request is under way.
const BUSY: u64 = 0;
/// It has to go: others need its place.
const ENDED: u64 = 1;
/// It has to go: the process stops.
const STOPPED: u64 = 1 << 2 | ENDED;
/// All else: since when it waits, in milliseconds, above two bits for what.
const REQUEST: u64 = 2;
const HEADER: u64 = 3;

impl Place {
    fn new(epoch: Instant, now: Instant) -> Self {
        let place = Self {
            epoch,
            state: AtomicU64::new(BUSY),
            reader: AtomicWaker::new(),
        };
        place.awaits(Awaits::Request, now);
        place
    }

    /// Notes what it waits for, and since when. As with [`works`](Self::works), an
    /// end that nobody has noticed yet has come too late.
    pub(super) fn awaits(&self, what: Awaits, since: Instant) {
        let waited = since.saturating_duration_since(self.epoch).as_millis();
        let kind = match what {
            Awaits::Request => REQUEST,
            Awaits::Header => HEADER,
        };
        let millis = u64::try_from(waited).unwrap_or(u64::MAX);
        self.state.store(millis << 2 | kind, SeqCst);
    }

    /// Notes that a request is under way.
    pub(super) fn works(&self) {
        self.state.store(BUSY, SeqCst);
    }

    /// Returns whether it has to go; if not, whoever polls is woken when it has.
    pub(super) fn poll_goes(&self, cx: &Context<'_>) -> Option<Goes> {
        self.reader.register(cx.waker());
        match self.state.load(SeqCst) {
            ENDED => Some(Goes::MakesRoom),
            STOPPED => Some(Goes::Stops),
            _ => None,
        }
    }

    /// Returns whether a request is under way.
    fn is_busy(&self) -> bool {
        self.state.load(SeqCst) == BUSY
    }

    /// Returns its state if it may go, and in which order.
    fn may_go(&self, now: Instant) -> Option<(u8, u64)> {
        let state = self.state.load(SeqCst);
        let rank = match state & 3 {
            HEADER => 1,
            REQUEST => {
                let since = self.epoch + Duration::from_millis(state >> 2);
                let is_long = now.saturating_duration_since(since) >= LONG;
                if is_long { 0 } else { 2 }
            }
            _ => return None,
        };
        Some((rank, state))
    }

    /// Ends it, unless it has gone on since that state.
    fn end(&self, state: u64, how: u64) -> bool {
        let ended = self.state.compare_exchange(state, how, SeqCst, SeqCst);
        if ended.is_ok() {
            self.reader.wake();
        }
        ended.is_ok()
    }
}

/// The places of all connections, or of those of one client.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// By the number of the connection.
    all: HashMap<u64, Arc<Place>>,
    /// Who may go, the first one first, as they were at the last look.
    first: VecDeque<(u64, Arc<Place>)>,
    /// When there was nobody.
    nobody: Option<Instant>,
}

impl Places {
    /// Returns how many there are.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Makes a place; `epoch` is the same for all.
    pub(super) fn place(epoch: Instant, now: Instant) -> Arc<Place> {
        Arc::new(Place::new(epoch, now))
    }

    /// Adds a place.
    pub(super) fn add(&mut self, number: u64, place: &Arc<Place>) {
        self.all.insert(number, Arc::clone(place));
    }

    /// Removes a place: who is gone makes no room.
    pub(super) fn remove(&mut self, number: u64) {
        if let Some(place) = self.all.remove(&number) {
            place.works();
        }
    }

    /// Returns whether a request is under way at one of them.
    pub(super) fn any_busy(&self) -> bool {
        self.all.values().any(|place| place.is_busy())
    }

    /// Tells all to go that wait for a request of which nothing has come.
    pub(super) fn stop_idle(&self) {
        for place in self.all.values() {
            let state = place.state.load(SeqCst);
            if state & 3 == REQUEST {
                place.end(state, STOPPED);
            }
        }
    }

    /// Tells one that waits for its client to go: one that has been idle for
    /// long, else one whose header is not in, else any that is idle; of equals
    /// the one that has waited the longest. Returns whether there was one.
    pub(super) fn make_room(&mut self, now: Instant) -> bool {
        if self.end_first() {
            return true;
        }
        if self.nobody.is_some_and(|at| now < at + LOOK_AGAIN) {
            return false;
        }
        let mut waiting: Vec<((u8, u64), &Arc<Place>)> = self
            .all
            .values()
            .filter_map(|place| Some((place.may_go(now)?, place)))
            .collect();
        if waiting.len() > LOOK {
            waiting.select_nth_unstable_by_key(LOOK, |(order, _)| *order);
            waiting.truncate(LOOK);
        }
        waiting.sort_unstable_by_key(|(order, _)| *order);
        self.first = waiting
            .into_iter()
            .map(|((_, state), place)| (state, Arc::clone(place)))
            .collect();
        let found = self.end_first();
        self.nobody = (!found).then_some(now);
        found
    }

    fn end_first(&mut self) -> bool {
        while let Some((state, place)) = self.first.pop_front() {
            if place.end(state, ENDED) {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn is_ended(place: &Place) -> bool {
        place.state.load(SeqCst) == ENDED
    }

    fn places(count: u64, epoch: Instant) -> (Places, Vec<Arc<Place>>) {
        let mut places = Places::default();
        let all = (0..count).map(|number| {
            let place = Places::place(epoch, epoch);
            places.add(number, &place);
            place
        });
        let all = all.collect();
        (places, all)
    }

    #[test]
    fn who_is_idle_for_long_goes_before_half_a_header_and_that_before_the_rest() {
        let epoch = Instant::now();
        let now = epoch + SECOND * 100;
        let (mut places, all) = places(6, epoch);
        all[0].works();
        all[1].awaits(Awaits::Request, now - SECOND / 2);
        all[2].awaits(Awaits::Header, now - SECOND * 3);
        all[3].awaits(Awaits::Request, now - SECOND * 2);
        all[4].awaits(Awaits::Request, now - SECOND * 20);
        all[5].awaits(Awaits::Header, now - SECOND * 8);
        for next in [4, 3, 5, 2, 1] {
            assert!(!is_ended(&all[next]));
            assert!(places.make_room(now));
            assert!(is_ended(&all[next]), "{next}");
        }
        assert!(!places.make_room(now), "one works");
        all[0].awaits(Awaits::Request, now);
        assert!(!places.make_room(now), "nobody looks again at once");
        assert!(places.make_room(now + LOOK_AGAIN));
    }

    #[test]
    fn who_went_on_since_the_look_stays() {
        let epoch = Instant::now();
        let now = epoch + SECOND * 10;
        let (mut places, all) = places(3, epoch);
        for (age, place) in (0..).zip(&all) {
            place.awaits(Awaits::Request, now - SECOND * (9 - age));
        }
        assert!(places.make_room(now));
        assert!(is_ended(&all[0]));
        all[1].works();
        all[1].awaits(Awaits::Request, now);
        assert!(places.make_room(now));
        assert!(is_ended(&all[2]) && !is_ended(&all[1]));
        // A request that came in before it went.
        all[2].works();
        assert!(!is_ended(&all[2]));
    }

    #[test]
    fn a_process_that_stops_sends_away_who_is_idle_and_nobody_else() {
        let epoch = Instant::now();
        let (places, all) = places(3, epoch);
        all[0].works();
        all[1].awaits(Awaits::Header, epoch);
        assert!(places.any_busy());
        places.stop_idle();
        let goes = |place: &Place| place.poll_goes(&Context::from_waker(std::task::Waker::noop()));
        assert_eq!(goes(&all[0]), None);
        assert_eq!(goes(&all[1]), None);
        assert_eq!(goes(&all[2]), Some(Goes::Stops));
        all[0].awaits(Awaits::Request, epoch);
        assert!(!places.any_busy());
        places.stop_idle();
        assert_eq!(goes(&all[0]), Some(Goes::Stops));
    }

    #[test]
    fn who_is_gone_makes_no_room() {
        let epoch = Instant::now();
        let (mut places, _all) = places(2, epoch);
        assert!(places.make_room(epoch));
        places.remove(0);
        places.remove(1);
        assert!(!places.make_room(epoch));
    }

    #[test]
    fn many_are_told_one_by_one_the_oldest_first() {
        let epoch = Instant::now();
        let now = epoch + SECOND * 1000;
        let (mut places, all) = places(500, epoch);
        for (age, place) in (0..).zip(&all) {
            place.awaits(Awaits::Request, epoch + SECOND * age);
        }
        for place in &all {
            assert!(places.make_room(now));
            assert!(is_ended(place));
        }
        assert!(!places.make_room(now));
    }
}
