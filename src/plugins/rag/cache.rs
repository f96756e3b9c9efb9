//! What was found lately, for the next who asks the same.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::OnceCell;

use super::found::Found;

/// Results by what was asked, bounded in time and in bytes; and the searches
/// under way, so that many who ask the same at once ask once.
#[derive(Debug)]
pub(super) struct Cache {
    ttl: Duration,
    bytes_max: usize,
    kept: Mutex<Kept>,
    flights: Mutex<HashMap<Arc<str>, Flight>>,
}

/// A search under way; `None` in it if it failed.
type Flight = Arc<OnceCell<Option<Arc<Found>>>>;

/// The place of one who waits for a search. The last one gone, it is forgotten.
#[derive(Debug)]
pub(super) struct Passenger<'a> {
    cache: &'a Cache,
    key: Arc<str>,
    flight: Flight,
}

impl Passenger<'_> {
    /// Returns what the search comes to; begins it if nobody else does.
    pub(super) async fn wait(
        &self,
        search: impl Future<Output = Option<Arc<Found>>>,
    ) -> Option<Arc<Found>> {
        self.flight.get_or_init(|| search).await.clone()
    }
}

impl Drop for Passenger<'_> {
    fn drop(&mut self) {
        self.cache.land(&self.key, &self.flight);
    }
}

#[derive(Debug, Default)]
struct Kept {
    entries: HashMap<Arc<str>, Entry>,
    /// The oldest first: all live equally long.
    order: VecDeque<(Arc<str>, Instant)>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    found: Arc<Found>,
    bytes: usize,
    since: Instant,
}

impl Cache {
    pub(super) fn new(ttl: Duration, bytes_max: usize) -> Self {
        Self {
            ttl,
            bytes_max,
            kept: Mutex::default(),
            flights: Mutex::default(),
        }
    }

    /// Returns what was found for this, if that was not too long ago.
    pub(super) fn get(&self, key: &str, now: Instant) -> Option<Arc<Found>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = kept.entries.get(key)?;
        let is_fresh = now.saturating_duration_since(entry.since) < self.ttl;
        is_fresh.then(|| Arc::clone(&entry.found))
    }

    /// Keeps what was found; the oldest goes where there is no room.
    pub(super) fn put(&self, key: &Arc<str>, found: &Arc<Found>, now: Instant) {
        let bytes = found.weight() + 2 * key.len();
        if self.ttl.is_zero() || bytes > self.bytes_max {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = Entry {
            found: Arc::clone(found),
            bytes,
            since: now,
        };
        if let Some(old) = kept.entries.insert(Arc::clone(key), entry) {
            kept.bytes -= old.bytes;
        }
        kept.bytes += bytes;
        kept.order.push_back((Arc::clone(key), now));
        while let Some((oldest, since)) = kept.order.front().cloned() {
            let is_old = now.saturating_duration_since(since) >= self.ttl;
            // What was put again stands further behind too.
            let is_current = kept
                .entries
                .get(&oldest)
                .is_some_and(|entry| entry.since == since);
            if is_current && !is_old && kept.bytes <= self.bytes_max {
                break;
            }
            kept.order.pop_front();
            if is_current && let Some(gone) = kept.entries.remove(&oldest) {
                kept.bytes -= gone.bytes;
            }
        }
    }

    /// Joins the search for this that is under way, or one to begin.
    pub(super) fn board(&self, key: &Arc<str>) -> Passenger<'_> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        Passenger {
            cache: self,
            key: Arc::clone(key),
            flight: Arc::clone(flights.entry(Arc::clone(key)).or_default()),
        }
    }

    fn land(&self, key: &str, flight: &Flight) {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let is_this = flights.get(key).is_some_and(|one| Arc::ptr_eq(one, flight));
        // One is in the map, one is the caller's: nobody else waits.
        if is_this && (flight.initialized() || Arc::strong_count(flight) <= 2) {
            flights.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::plugins::rag::retrievers::Hit;

    fn found(text: &str) -> Arc<Found> {
        let hit = Hit {
            title: text.to_owned(),
            url: "https://a.test/".to_owned(),
            snippet: text.to_owned(),
        };
        Arc::new(Found::of(vec![hit], 3, 100_000))
    }

    fn key(text: &str) -> Arc<str> {
        Arc::from(text)
    }

    #[test]
    fn what_is_too_old_is_not_found() {
        let cache = Cache::new(Duration::from_secs(10), 1 << 20);
        let now = Instant::now();
        cache.put(&key("a"), &found("a"), now);
        assert!(cache.get("a", now + Duration::from_secs(9)).is_some());
        assert!(cache.get("a", now + Duration::from_secs(10)).is_none());
        assert!(cache.get("b", now).is_none());
        cache.put(&key("b"), &found("b"), now + Duration::from_secs(10));
        assert_eq!(cache.kept.lock().unwrap().entries.len(), 1, "a is gone");
    }

    #[test]
    fn the_oldest_goes_first_and_the_bytes_are_counted() {
        let one = found(&"x".repeat(1000));
        let cache = Cache::new(Duration::from_secs(1000), 4 * (one.weight() + 4));
        let now = Instant::now();
        for i in 0..10 {
            cache.put(&key(&format!("k{i}")), &one, now + Duration::from_secs(i));
            // Put again: it counts once.
            cache.put(&key("k0"), &one, now + Duration::from_secs(i));
        }
        let there = |i: usize| cache.get(&format!("k{i}"), now).is_some();
        assert_eq!(
            (0..10).filter(|&i| there(i)).collect::<Vec<_>>(),
            [0, 7, 8, 9]
        );
        let kept = cache.kept.lock().unwrap();
        let sum: usize = kept.entries.values().map(|entry| entry.bytes).sum();
        assert_eq!(kept.bytes, sum);
        assert!(kept.order.len() <= 8, "{}", kept.order.len());
    }

    #[test]
    fn what_is_larger_than_all_of_it_and_what_lives_no_time_is_not_kept() {
        let now = Instant::now();
        let small = Cache::new(Duration::from_secs(10), 300);
        small.put(&key("a"), &found(&"x".repeat(1000)), now);
        assert!(small.get("a", now).is_none());
        let none = Cache::new(Duration::ZERO, 1 << 20);
        none.put(&key("a"), &found("a"), now);
        assert!(none.get("a", now).is_none());
    }

    #[tokio::test]
    async fn who_asks_the_same_waits_for_the_same_search() {
        let cache = Cache::new(Duration::ZERO, 0);
        let (a, b) = (cache.board(&key("a")), cache.board(&key("a")));
        let given_up = a.wait(std::future::pending());
        assert!(given_up.now_or_never().is_none());
        drop(a);
        let once = b.wait(async { Some(found("a")) }).await.unwrap();
        let c = cache.board(&key("a"));
        let again = c.wait(async { panic!("it was searched already") }).await;
        assert!(Arc::ptr_eq(&once, &again.unwrap()));
        drop((b, c));
        assert_eq!(cache.flights.lock().unwrap().len(), 0);
        assert!(cache.board(&key("a")).wait(async { None }).await.is_none());
    }
}
