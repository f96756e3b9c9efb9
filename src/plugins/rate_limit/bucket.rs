//! One limit of one caller: GCRA in its other form, the leaky bucket that fills
//! with what is used and empties at the rate of the limit.
//!
//! The two forms of the algorithm decide alike. This one keeps what is in the
//! bucket and not a moment in the future, and so can take something back (what
//! was reserved and not used), be in debt, and go on under another rate. The
//! crate `governor` can do none of that.
//!
//! **Invariant:** all of it is integers, exact to the nanosecond: what a limit
//! grants does not depend on how often it is asked.

use std::time::{Duration, Instant};

use crate::config::Rate;

/// What a caller has used of a rate.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    rate: Rate,
    /// What is in it, times the nanoseconds of the rate's time: a unit leaks in
    /// so many, divided by the rate's count. At most 10^12 × 10^14 at a limit.
    level: u128,
    at: Instant,
    /// What was put in for requests that are under way.
    reserved: Vec<Reserved>,
    /// At least as much as any of those could still give back.
    most_back: u128,
    tickets: u64,
}

/// What was put in for a request that is under way.
#[derive(Clone, Debug)]
struct Reserved {
    ticket: u64,
    amount: u64,
    /// How much of it can be taken back: all of it, but never more than has been
    /// in the bucket at any time since. What leaked meanwhile would have leaked
    /// for nothing, had it not been there.
    back: u128,
}

/// Stands for what was reserved.
#[derive(Debug)]
pub(super) struct Ticket(u64);

impl Bucket {
    /// Makes an empty bucket.
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            level: 0,
            at: now,
            reserved: Vec::new(),
            most_back: 0,
            tickets: 0,
        }
    }

    /// Lets leak what has leaked until now, and goes on under this rate. What is
    /// in the bucket stays in it, up to a full one if the rate is another.
    pub(super) fn bring_to(&mut self, rate: Rate, now: Instant) {
        self.leak(now);
        if rate == self.rate {
            return;
        }
        let (old, new) = (period(self.rate), period(rate));
        let converted = |level: u128| level.saturating_mul(new) / old;
        self.rate = rate;
        self.level = converted(self.level).min(self.full());
        for one in &mut self.reserved {
            one.back = converted(one.back);
        }
        self.most_back = u128::MAX;
        self.bound_what_comes_back();
    }

    fn leak(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_nanos();
        let leaked = passed.saturating_mul(u128::from(self.rate.count.get()));
        self.level = self.level.saturating_sub(leaked);
        // Another thread may have read the clock later, and come here first.
        self.at = self.at.max(now);
        self.bound_what_comes_back();
    }

    fn bound_what_comes_back(&mut self) {
        if self.most_back <= self.level {
            return;
        }
        for one in &mut self.reserved {
            one.back = one.back.min(self.level);
        }
        self.most_back = self.level;
    }

    /// Returns how long it takes until so much fits in; `None` if it does now. A
    /// thing larger than the bucket never fits.
    pub(super) fn wait_for(&self, amount: u64) -> Option<Duration> {
        let over = (self.level + self.volume(amount)).saturating_sub(self.full());
        (over > 0).then(|| self.time_of(over))
    }

    /// Puts something in, whether it fits or not, that may be more or less in
    /// the end.
    pub(super) fn reserve(&mut self, amount: u64) -> Ticket {
        let volume = self.volume(amount);
        self.level = self.level.saturating_add(volume);
        self.tickets += 1;
        self.most_back = self.most_back.max(volume);
        self.reserved.push(Reserved {
            ticket: self.tickets,
            amount,
            back: volume,
        });
        Ticket(self.tickets)
    }

    /// Makes what was reserved what it really was.
    pub(super) fn settle(&mut self, ticket: &Ticket, really: u64, now: Instant) {
        self.leak(now);
        let place = self.reserved.iter().position(|one| one.ticket == ticket.0);
        let Some(place) = place else {
            return;
        };
        let one = self.reserved.swap_remove(place);
        if really >= one.amount {
            let more = self.volume(really - one.amount);
            self.level = self.level.saturating_add(more);
        } else {
            let less = self.volume(one.amount - really).min(one.back);
            self.level = self.level.saturating_sub(less);
        }
        if self.reserved.is_empty() {
            self.most_back = 0;
        }
        self.bound_what_comes_back();
    }

    /// Makes what was reserved final, as it is.
    pub(super) fn keep(&mut self, ticket: &Ticket) {
        self.reserved.retain(|one| one.ticket != ticket.0);
    }

    /// Returns how much fits in, in whole units.
    pub(super) fn remaining(&self) -> u64 {
        let free = self.full().saturating_sub(self.level) / period(self.rate);
        u64::try_from(free).unwrap_or(u64::MAX)
    }

    /// Returns how long it takes until it is empty, if nothing is put in.
    pub(super) fn empty_in(&self) -> Duration {
        self.time_of(self.level)
    }

    /// Returns whether it is empty by then.
    pub(super) fn is_empty_at(&self, now: Instant) -> bool {
        self.empty_in() <= now.saturating_duration_since(self.at)
    }

    fn full(&self) -> u128 {
        self.volume(self.rate.count.get())
    }

    fn volume(&self, amount: u64) -> u128 {
        u128::from(amount) * period(self.rate)
    }

    fn time_of(&self, level: u128) -> Duration {
        let nanos = level.div_ceil(u128::from(self.rate.count.get()));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Returns the nanoseconds of the rate's time.
fn period(rate: Rate) -> u128 {
    rate.per.length().as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(text: &str) -> Rate {
        text.parse().unwrap()
    }

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    /// Puts something in for good.
    fn put(bucket: &mut Bucket, amount: u64) {
        let ticket = bucket.reserve(amount);
        bucket.keep(&ticket);
    }

    /// Puts one in if it fits.
    fn admit(bucket: &mut Bucket, rate: Rate, now: Instant) -> bool {
        bucket.bring_to(rate, now);
        let fits = bucket.wait_for(1).is_none();
        if fits {
            put(bucket, 1);
        }
        fits
    }

    #[test]
    fn every_limit_grants_as_many_as_it_says_and_then_one_by_one() {
        for text in ["1/min", "7/s", "60/min", "997/h", "1k/day"] {
            let (rate, start) = (rate(text), Instant::now());
            let mut bucket = Bucket::new(rate, start);
            let count = rate.count.get();
            let granted = (0..count + 5).filter(|_| admit(&mut bucket, rate, start));
            assert_eq!(granted.count() as u64, count, "{text}");
            let wait = bucket.wait_for(1).unwrap();
            let almost = start + wait - Duration::from_nanos(1);
            assert!(!admit(&mut bucket, rate, almost), "{text}");
            assert!(admit(&mut bucket, rate, start + wait), "{text}");
            assert!(!admit(&mut bucket, rate, start + wait), "{text}");
        }
    }

    #[test]
    fn asking_often_grants_no_more_and_no_less() {
        let rate = rate("7/s");
        let start = Instant::now();
        let mut bucket = Bucket::new(rate, start);
        let step = Duration::from_micros(333);
        let granted = (0..30_000u32).filter(|i| admit(&mut bucket, rate, start + step * *i));
        // 7 at once, and 7 in each of 9.99 seconds.
        assert_eq!(granted.count(), 7 + 69);
    }

    #[test]
    fn what_was_reserved_and_not_used_can_be_used() {
        let (rate, now) = (rate("100/min"), Instant::now());
        let mut bucket = Bucket::new(rate, now);
        let ticket = bucket.reserve(90);
        assert_eq!(bucket.remaining(), 10);
        assert_eq!(bucket.wait_for(20), Some(secs(6)));
        bucket.settle(&ticket, 40, now);
        assert_eq!(bucket.remaining(), 60);
        assert_eq!(bucket.empty_in(), secs(24));
        let ticket = bucket.reserve(10);
        bucket.settle(&ticket, 25, now);
        assert_eq!(bucket.remaining(), 35);
    }

    #[test]
    fn a_reservation_that_lasts_takes_nothing_of_others_back() {
        let (rate, now) = (rate("100/min"), Instant::now());
        let mut bucket = Bucket::new(rate, now);
        let long = bucket.reserve(90);
        // By now all of it has leaked, as if it had been used.
        let later = now + secs(54);
        bucket.bring_to(rate, later);
        assert_eq!(bucket.remaining(), 100);
        put(&mut bucket, 90);
        bucket.settle(&long, 15, later);
        assert_eq!(bucket.remaining(), 10);
        // A bucket that never was empty gives back everything.
        let later = later + secs(60);
        bucket.bring_to(rate, later);
        put(&mut bucket, 50);
        let long = bucket.reserve(50);
        let end = later + secs(30);
        bucket.bring_to(rate, end);
        bucket.settle(&long, 10, end);
        assert_eq!(bucket.remaining(), 90);
    }

    #[test]
    fn a_debt_is_waited_for() {
        let (rate, now) = (rate("60/min"), Instant::now());
        let mut bucket = Bucket::new(rate, now);
        put(&mut bucket, 150);
        assert_eq!(bucket.remaining(), 0);
        assert_eq!(bucket.wait_for(1), Some(secs(91)));
        bucket.bring_to(rate, now + secs(91));
        assert_eq!(bucket.wait_for(1), None);
        assert_eq!(bucket.remaining(), 1);
    }

    #[test]
    fn another_rate_acts_at_once_and_forgets_nothing() {
        let now = Instant::now();
        let mut bucket = Bucket::new(rate("10/min"), now);
        put(&mut bucket, 10);
        bucket.bring_to(rate("100/min"), now);
        assert_eq!(bucket.remaining(), 90);
        bucket.bring_to(rate("100/h"), now);
        assert_eq!(bucket.remaining(), 90);
        bucket.bring_to(rate("5/s"), now);
        assert_eq!(bucket.remaining(), 0);
        assert_eq!(bucket.empty_in(), secs(1));
    }

    #[test]
    fn a_clock_that_goes_back_changes_nothing() {
        let start = Instant::now() + secs(100);
        let rate = rate("1/min");
        let mut bucket = Bucket::new(rate, start);
        put(&mut bucket, 1);
        bucket.bring_to(rate, start - secs(50));
        bucket.bring_to(rate, start + secs(30));
        assert_eq!(bucket.wait_for(1), Some(secs(30)));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let rate = rate("1000G/day");
        let now = Instant::now();
        let mut bucket = Bucket::new(rate, now);
        let tickets = [bucket.reserve(u64::MAX), bucket.reserve(u64::MAX)];
        assert!(bucket.wait_for(u64::MAX).is_some());
        let end = now + Duration::from_secs(u64::from(u32::MAX));
        for ticket in tickets {
            bucket.settle(&ticket, 0, end);
        }
        assert_eq!(bucket.remaining(), 1_000_000_000_000);
    }
}
