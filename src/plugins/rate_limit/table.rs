//! The buckets of everybody who is held to one rule.
//!
//! **Invariant:** memory is bounded: so many are remembered as the rule says,
//! and those whose requests are under way. Who is idle is forgotten first, which
//! nobody can notice; if that is not enough, those who have asked longest ago.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus::{IntCounter, IntGauge};

use super::bucket::{Bucket, Ticket};
use crate::{
    client_ip::one_client,
    config::{KeyLimits, Rate},
};

/// How many locks there are: requests of one caller never wait for many others.
const SHARDS: usize = 16;
/// When to come again where nobody knows when a request under way will end.
const ONE_ENDS: Duration = Duration::from_secs(1);

/// Whom a rule counts together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    /// A key, a model, a route.
    Name(Arc<str>),
    /// An address, as far as it stands for one client.
    Address(IpAddr),
}

impl From<IpAddr> for Who {
    fn from(ip: IpAddr) -> Self {
        Self::Address(one_client(ip))
    }
}

/// Everybody; outlives the snapshots.
#[derive(Default)]
pub(super) struct Table {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
}

#[derive(Default)]
struct Shard(HashMap<Who, Entry>);

struct Entry {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    in_flight: u32,
    seen: Instant,
}

/// How much may be remembered, and where it is counted.
#[derive(Debug)]
pub(super) struct Bounds {
    pub(super) tracked_max: usize,
    pub(super) tracked: IntGauge,
    pub(super) forgotten: IntCounter,
}

/// How a caller stands with a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) limit: u64,
    pub(super) remaining: u64,
    /// Until all of it is there again.
    pub(super) reset: Duration,
}

/// How a caller stands with all limits of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) requests: Option<Left>,
    pub(super) tokens: Option<Left>,
}

/// Why a request is refused, and after which time it would not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Requests { limit: Rate, wait: Duration },
    Tokens { limit: Rate, wait: Duration },
    Concurrent { limit: u32, wait: Duration },
}

/// A request that was let through; let go of by [`Held::settle`], or when it is
/// dropped.
pub(super) struct Held {
    table: Arc<Table>,
    who: Who,
    requests: Option<Ticket>,
    tokens: Option<Ticket>,
    open: bool,
}

impl Table {
    /// Lets a request through that may cost so many tokens, or says what it has
    /// to wait for; then nothing is counted.
    pub(super) fn admit(
        self: &Arc<Self>,
        who: Who,
        limits: KeyLimits,
        tokens: u64,
        bounds: &Bounds,
        now: Instant,
    ) -> (Standing, Result<Held, Refusal>) {
        let mut shard = self.shard(&who);
        if !shard.0.contains_key(&who) {
            shard.make_room(bounds, now);
            bounds.tracked.inc();
        }
        let entry = shard.0.entry(who.clone()).or_insert_with(|| Entry {
            requests: None,
            tokens: None,
            in_flight: 0,
            seen: now,
        });
        entry.seen = entry.seen.max(now);
        up_to_date(&mut entry.requests, limits.requests, now);
        up_to_date(&mut entry.tokens, limits.tokens, now);
        if let Some(refusal) = entry.refusal(limits, tokens) {
            return (entry.standing(limits), Err(refusal));
        }
        entry.in_flight = entry.in_flight.saturating_add(1);
        let reserve = |bucket: &mut Option<Bucket>, rate: Option<Rate>, amount| {
            rate.and(bucket.as_mut())
                .map(|bucket| bucket.reserve(amount))
        };
        let held = Held {
            requests: reserve(&mut entry.requests, limits.requests, 1),
            tokens: reserve(&mut entry.tokens, limits.tokens, tokens),
            table: Arc::clone(self),
            who,
            open: true,
        };
        (entry.standing(limits), Ok(held))
    }

    fn shard(&self, who: &Who) -> MutexGuard<'_, Shard> {
        let hash = self.hasher.hash_one(who);
        let at = usize::try_from(hash % SHARDS as u64).unwrap_or(0);
        let shard = self.shards.get(at).unwrap_or(&self.shards[0]);
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the bucket of a limit, or brings it to the present. One whose limit is
/// gone stays as it is: another list may still have the limit.
fn up_to_date(bucket: &mut Option<Bucket>, rate: Option<Rate>, now: Instant) {
    if let Some(rate) = rate {
        let bucket = bucket.get_or_insert_with(|| Bucket::new(rate, now));
        bucket.bring_to(rate, now);
    }
}

impl Entry {
    fn refusal(&self, limits: KeyLimits, tokens: u64) -> Option<Refusal> {
        let wait = |bucket: &Option<Bucket>, amount| bucket.as_ref()?.wait_for(amount);
        let of_requests = limits
            .requests
            .zip(wait(&self.requests, 1))
            .map(|(limit, wait)| Refusal::Requests { limit, wait });
        let of_tokens = limits
            .tokens
            .zip(wait(&self.tokens, tokens))
            .map(|(limit, wait)| Refusal::Tokens { limit, wait });
        let full = limits
            .concurrent
            .filter(|most| self.in_flight >= most.get())
            .map(|most| Refusal::Concurrent {
                limit: most.get(),
                wait: ONE_ENDS,
            });
        // The one that lasts longest: after it the others are over too.
        let all = [full, of_requests, of_tokens];
        all.into_iter().flatten().max_by_key(Refusal::wait)
    }

    fn standing(&self, limits: KeyLimits) -> Standing {
        let left = |bucket: &Option<Bucket>, rate: Option<Rate>| {
            let (bucket, rate) = (bucket.as_ref()?, rate?);
            Some(Left {
                limit: rate.count.get(),
                remaining: bucket.remaining(),
                reset: bucket.empty_in(),
            })
        };
        Standing {
            requests: left(&self.requests, limits.requests),
            tokens: left(&self.tokens, limits.tokens),
        }
    }

    /// Returns whether it may be forgotten and nobody would notice.
    fn is_idle(&self, now: Instant) -> bool {
        let empty =
            |bucket: &Option<Bucket>| bucket.as_ref().is_none_or(|bucket| bucket.is_empty_at(now));
        self.in_flight == 0 && empty(&self.requests) && empty(&self.tokens)
    }
}

impl Refusal {
    /// Returns after which time the request would not be refused for this.
    pub(super) fn wait(&self) -> Duration {
        match self {
            Self::Requests { wait, .. }
            | Self::Tokens { wait, .. }
            | Self::Concurrent { wait, .. } => *wait,
        }
    }
}

impl Shard {
    /// Forgets somebody if there is no room for one more. So many at once that
    /// it is done seldom.
    fn make_room(&mut self, bounds: &Bounds, now: Instant) {
        let most = (bounds.tracked_max / SHARDS).max(1);
        let before = self.0.len();
        if before < most {
            return;
        }
        self.0.retain(|_, entry| !entry.is_idle(now));
        let enough = most - most / 8;
        if self.0.len() >= enough {
            bounds.forgotten.inc();
            let mut seen: Vec<Instant> = self.0.values().map(|entry| entry.seen).collect();
            let middle = seen.len() / 2;
            let (_, median, _) = seen.select_nth_unstable(middle);
            let median = *median;
            self.0
                .retain(|_, entry| entry.in_flight > 0 || entry.seen > median);
        }
        let gone = before - self.0.len();
        bounds.tracked.sub(i64::try_from(gone).unwrap_or(i64::MAX));
    }
}

impl Held {
    /// Ends the request: `tokens` is what it has really cost, and unless it
    /// `counts` it is as if it had never been.
    pub(super) fn settle(mut self, tokens: u64, counts: bool, now: Instant) {
        self.open = false;
        self.with_entry(|entry| {
            entry.in_flight = entry.in_flight.saturating_sub(1);
            if let Some((bucket, ticket)) = entry.requests.as_mut().zip(self.requests.as_ref()) {
                bucket.settle(ticket, u64::from(counts), now);
            }
            if let Some((bucket, ticket)) = entry.tokens.as_mut().zip(self.tokens.as_ref()) {
                bucket.settle(ticket, tokens, now);
            }
            entry.seen = entry.seen.max(now);
        });
    }

    fn with_entry(&self, change: impl FnOnce(&mut Entry)) {
        let mut shard = self.table.shard(&self.who);
        if let Some(entry) = shard.0.get_mut(&self.who) {
            change(entry);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        self.with_entry(|entry| {
            entry.in_flight = entry.in_flight.saturating_sub(1);
            if let Some((bucket, ticket)) = entry.requests.as_mut().zip(self.requests.as_ref()) {
                bucket.keep(ticket);
            }
            if let Some((bucket, ticket)) = entry.tokens.as_mut().zip(self.tokens.as_ref()) {
                bucket.keep(ticket);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    fn limits(requests: &str, tokens: &str, concurrent: u32) -> KeyLimits {
        KeyLimits {
            requests: requests.parse().ok(),
            tokens: tokens.parse().ok(),
            concurrent: NonZeroU32::new(concurrent),
        }
    }

    fn bounds(tracked_max: usize) -> Bounds {
        Bounds {
            tracked_max,
            tracked: IntGauge::new("tracked", "t").unwrap(),
            forgotten: IntCounter::new("forgotten", "f").unwrap(),
        }
    }

    fn who(name: &str) -> Who {
        Who::Name(name.into())
    }

    fn nth(number: u32) -> Who {
        Who::from(IpAddr::from(number.to_be_bytes()))
    }

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn a_greedy_caller_leaves_the_others_untouched() {
        let (table, bounds, now) = (Arc::new(Table::default()), bounds(1000), Instant::now());
        let three = limits("3/min", "", 0);
        for turn in 0..10 {
            let (_, came) = table.admit(who("greedy"), three, 0, &bounds, now);
            assert_eq!(came.is_ok(), turn < 3);
        }
        let (standing, came) = table.admit(who("modest"), three, 0, &bounds, now);
        assert!(came.is_ok());
        let left = Left {
            limit: 3,
            remaining: 2,
            reset: secs(20),
        };
        assert_eq!(standing.requests, Some(left));
    }

    #[test]
    fn what_is_refused_is_not_counted() {
        let (table, bounds, now) = (Arc::new(Table::default()), bounds(1000), Instant::now());
        let both = limits("10/min", "100/min", 0);
        let (_, first) = table.admit(who("a"), both, 80, &bounds, now);
        let first = first.ok().unwrap();
        let (standing, second) = table.admit(who("a"), both, 30, &bounds, now);
        let Err(Refusal::Tokens { wait, .. }) = second else {
            panic!("let through");
        };
        assert_eq!(wait, secs(6));
        assert_eq!(standing.requests.unwrap().remaining, 9);
        assert_eq!(standing.tokens.unwrap().remaining, 20);
        let (_, after) = table.admit(who("a"), both, 30, &bounds, now + wait);
        drop(after.ok().unwrap());
        first.settle(80, true, now + wait);
    }

    #[test]
    fn what_was_reserved_and_not_used_is_given_back() {
        let (table, bounds, now) = (Arc::new(Table::default()), bounds(1000), Instant::now());
        let both = limits("10/min", "100/min", 0);
        let remaining = |at| {
            let (standing, held) = table.admit(who("a"), both, 0, &bounds, at);
            held.ok().unwrap().settle(0, false, at);
            let left = (standing.requests.unwrap(), standing.tokens.unwrap());
            (left.0.remaining, left.1.remaining)
        };
        let (_, held) = table.admit(who("a"), both, 90, &bounds, now);
        held.ok().unwrap().settle(15, true, now);
        assert_eq!(remaining(now), (8, 85));
        let (_, held) = table.admit(who("a"), both, 50, &bounds, now);
        held.ok().unwrap().settle(0, false, now);
        assert_eq!(remaining(now), (8, 85));
        let (_, held) = table.admit(who("a"), both, 10, &bounds, now);
        held.ok().unwrap().settle(185, true, now);
        let (_, refused) = table.admit(who("a"), both, 1, &bounds, now);
        let Err(refusal) = refused else {
            panic!("let through");
        };
        // 200 of 100 are used, and one more is wanted.
        assert_eq!(refusal.wait().as_millis(), 60_600);
    }

    #[test]
    fn so_many_at_once_and_no_more() {
        let (table, bounds, now) = (Arc::new(Table::default()), bounds(1000), Instant::now());
        let two = limits("", "", 2);
        let admit = || table.admit(who("a"), two, 0, &bounds, now).1;
        let (first, second) = (admit().ok().unwrap(), admit().ok().unwrap());
        assert!(matches!(admit(), Err(Refusal::Concurrent { limit: 2, .. })));
        first.settle(0, true, now);
        let third = admit().ok().unwrap();
        assert!(admit().is_err());
        // Also what is dropped half-way has ended.
        drop((second, third));
        assert!(admit().is_ok());
    }

    #[test]
    fn an_ipv6_customer_is_one_whatever_the_address() {
        let of = |ip: &str| Who::from(ip.parse::<IpAddr>().unwrap());
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn a_flood_of_callers_is_bounded_and_takes_nobody_under_way() {
        let (table, bounds, now) = (Arc::new(Table::default()), bounds(1600), Instant::now());
        let one = limits("1/min", "", 1);
        let (_, under_way) = table.admit(who("under way"), one, 0, &bounds, now);
        let under_way = under_way.ok().unwrap();
        for i in 0..20_000_u32 {
            let at = now + Duration::from_millis(u64::from(i));
            let (_, held) = table.admit(nth(i), one, 0, &bounds, at);
            held.ok().unwrap().settle(0, true, at);
        }
        let len = || -> usize {
            let all = table.shards.iter();
            all.map(|shard| shard.lock().unwrap().0.len()).sum()
        };
        assert!(len() <= 1600, "{}", len());
        assert_eq!(bounds.tracked.get(), i64::try_from(len()).unwrap());
        assert!(bounds.forgotten.get() > 0);
        let end = now + secs(20);
        assert!(
            table
                .admit(who("under way"), one, 0, &bounds, end)
                .1
                .is_err()
        );
        assert!(table.admit(nth(19_999), one, 0, &bounds, end).1.is_err());
        drop(under_way);
    }

    #[test]
    fn the_idle_go_first() {
        let (table, bounds, now) = (Arc::new(Table::default()), bounds(1600), Instant::now());
        let one = limits("1/s", "", 0);
        for i in 0..20_000_u32 {
            // A hundred a second: each has long been idle when there is no room.
            let at = now + Duration::from_millis(u64::from(i) * 10);
            let (_, held) = table.admit(nth(i), one, 0, &bounds, at);
            held.ok().unwrap().settle(0, true, at);
        }
        assert_eq!(bounds.forgotten.get(), 0);
    }
}
