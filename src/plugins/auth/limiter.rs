//! How many tries to guess a key an address has.
//!
//! Each address has a bucket that holds a minute's failures and empties
//! steadily. What is stored is one moment per address: when its bucket will be
//! empty again.
//!
//! **Invariant:** at most [`PEERS_MAX`] addresses are remembered. The oldest
//! half is forgotten at once, so that nobody's flood of addresses costs more
//! than a look-up.

use std::{
    collections::HashMap,
    fmt, mem,
    net::IpAddr,
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::client_ip::one_client;

/// The most addresses that are remembered.
pub(super) const PEERS_MAX: usize = 16_384;
const MINUTE: Duration = Duration::from_secs(60);

/// The failures of every address; shared by all snapshots.
#[derive(Default)]
pub(super) struct Limiter(Mutex<Generations>);

/// Two halves: when the younger is full it becomes the older one, and the older
/// one is forgotten.
#[derive(Default)]
struct Generations {
    younger: HashMap<IpAddr, Instant>,
    older: HashMap<IpAddr, Instant>,
}

impl Limiter {
    /// Counts a failure.
    ///
    /// # Errors
    /// The address has had its failures for now; it may fail again after the
    /// time that is returned. Failures beyond the limit do not prolong it.
    pub(super) fn fail(
        &self,
        ip: IpAddr,
        per_minute: NonZeroU32,
        now: Instant,
    ) -> Result<(), Duration> {
        let peer = one_client(ip);
        let one = MINUTE / per_minute.get();
        let mut generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let empty_at = generations.empty_at(peer).map_or(now, |at| at.max(now));
        let filled = empty_at.duration_since(now);
        // Division rounds down: `per_minute` times `one` is not quite a minute.
        let room = (one * per_minute.get()).saturating_sub(one);
        if filled > room {
            return Err(filled.saturating_sub(room));
        }
        generations.keep(peer, empty_at + one);
        Ok(())
    }
}

impl Generations {
    fn empty_at(&self, peer: IpAddr) -> Option<Instant> {
        self.younger
            .get(&peer)
            .or_else(|| self.older.get(&peer))
            .copied()
    }

    fn keep(&mut self, peer: IpAddr, empty_at: Instant) {
        if self.younger.len() >= PEERS_MAX / 2 && !self.younger.contains_key(&peer) {
            self.older = mem::take(&mut self.younger);
        }
        self.younger.insert(peer, empty_at);
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEN: NonZeroU32 = NonZeroU32::new(10).unwrap();

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn ten_failures_a_minute_are_ten() {
        let limiter = Limiter::default();
        let start = Instant::now();
        for _ in 0..10 {
            assert_eq!(limiter.fail(ip("192.0.2.1"), TEN, start), Ok(()));
        }
        let wait = limiter.fail(ip("192.0.2.1"), TEN, start);
        assert_eq!(wait, Err(Duration::from_secs(6)));
        assert_eq!(limiter.fail(ip("192.0.2.2"), TEN, start), Ok(()));
        let later = start + Duration::from_secs(6);
        assert_eq!(limiter.fail(ip("192.0.2.1"), TEN, later), Ok(()));
        assert!(limiter.fail(ip("192.0.2.1"), TEN, later).is_err());
    }

    #[test]
    fn every_limit_grants_as_many_as_it_says() {
        for per_minute in [1, 7, 60, 997, 100_000] {
            let limiter = Limiter::default();
            let now = Instant::now();
            let limit = NonZeroU32::new(per_minute).unwrap();
            let granted = (0..per_minute + 5)
                .filter(|_| limiter.fail(ip("192.0.2.1"), limit, now).is_ok())
                .count();
            assert_eq!(granted, usize::try_from(per_minute).unwrap());
        }
    }

    #[test]
    fn an_ipv6_customer_has_one_bucket_for_all_its_addresses() {
        let limiter = Limiter::default();
        let now = Instant::now();
        for i in 0..10 {
            let ip = ip(&format!("2001:db8:1:2::{i}"));
            assert_eq!(limiter.fail(ip, TEN, now), Ok(()));
        }
        assert!(limiter.fail(ip("2001:db8:1:2:ffff::"), TEN, now).is_err());
        assert_eq!(limiter.fail(ip("2001:db8:1:3::"), TEN, now), Ok(()));
    }

    #[test]
    fn a_flood_of_addresses_is_forgotten_oldest_first() {
        let limiter = Limiter::default();
        let now = Instant::now();
        let one = NonZeroU32::MIN;
        let peer = |i: u32| IpAddr::from(i.to_be_bytes());
        let many = u32::try_from(PEERS_MAX).unwrap() * 3;
        for i in 0..many {
            assert_eq!(limiter.fail(peer(i), one, now), Ok(()));
        }
        {
            let generations = limiter.0.lock().unwrap();
            assert!(generations.younger.len() + generations.older.len() <= PEERS_MAX);
        }
        assert!(limiter.fail(peer(many - 1), one, now).is_err());
        assert!(limiter.fail(peer(many - 8000), one, now).is_err());
        assert_eq!(limiter.fail(peer(0), one, now), Ok(()));
    }
}
