//! Names to addresses, in the background; what was good last is kept.
//!
//! [`Addresses`] is what one upstream knows of its host. [`prime`] fills it
//! before a configuration goes live, [`run`] refreshes it for as long as the
//! process lives, and [`Addresses::resolve_now`] is for the request that comes
//! before either was done.
//!
//! Several addresses are taken in turn. One that refuses connections is passed
//! over for 30 s while another does not: `localhost` is often `::1` *and*
//! `127.0.0.1`, with a server on one of them.
//!
//! **Invariant:** a lookup never runs in a request that has an address, and an
//! upstream that once had one never loses it to a failed lookup.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
    time::{sleep, timeout, timeout_at},
};

use super::{upstream::Upstream, url::BaseUrl};

/// How often names are looked up again, ± 20 %.
const PERIOD: Duration = Duration::from_secs(30);
/// How long one lookup may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`prime`] may take for all together.
const PRIME_TIMEOUT: Duration = Duration::from_secs(2);
/// Lookups at the same time; each holds a thread of the blocking pool.
const LOOKUPS_MAX: usize = 16;
/// How long an address that refused a connection is passed over.
const SHUNNED: Duration = Duration::from_secs(30);

/// An upstream's name has no address (yet).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host's name could not be resolved")]
pub struct Unresolved;

/// What is known of an upstream's host.
#[derive(Debug)]
pub struct Addresses {
    host: Box<str>,
    port: u16,
    literal: bool,
    epoch: Instant,
    known: ArcSwap<Vec<Address>>,
    turn: AtomicUsize,
    failing: AtomicBool,
    /// Lookups that came to an end, well or not.
    lookups: AtomicU64,
    looking: Mutex<()>,
}

#[derive(Debug)]
struct Address {
    at: SocketAddr,
    /// Milliseconds since the epoch of [`Addresses`].
    shunned_until: AtomicU64,
}

impl Address {
    fn new(at: SocketAddr) -> Self {
        Self {
            at,
            shunned_until: AtomicU64::new(0),
        }
    }
}

impl Addresses {
    /// Makes the addresses of a host: known if it is an address itself, else
    /// none before the first lookup.
    pub fn new(base: &BaseUrl) -> Self {
        let literal = base.literal();
        Self {
            host: base.host.clone(),
            port: base.port,
            literal: literal.is_some(),
            epoch: Instant::now(),
            known: ArcSwap::from_pointee(literal.into_iter().map(Address::new).collect()),
            turn: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            lookups: AtomicU64::new(0),
            looking: Mutex::new(()),
        }
    }

    /// Returns whether there is an address to connect to.
    pub fn is_resolved(&self) -> bool {
        !self.known.load().is_empty()
    }

    /// Returns all addresses, in the resolver's order.
    pub fn all(&self) -> Vec<SocketAddr> {
        self.known.load().iter().map(|address| address.at).collect()
    }

    /// Returns the address whose turn it is; those that refused lately only
    /// when all did.
    pub fn next(&self, now: Instant) -> Option<SocketAddr> {
        let known = self.known.load();
        if let [only] = known.as_slice() {
            return Some(only.at);
        }
        let millis = self.millis(now);
        let turn = self.turn.fetch_add(1, Relaxed);
        let welcome = |address: &&Address| address.shunned_until.load(Relaxed) <= millis;
        let count = known.iter().filter(welcome).count();
        match turn.checked_rem(count) {
            Some(nth) => known.iter().filter(welcome).nth(nth),
            None => known.get(turn.checked_rem(known.len())?),
        }
        .map(|address| address.at)
    }

    /// Notes that nobody accepted a connection at an address. Returns whether
    /// there is another to try at once.
    pub fn refused(&self, at: SocketAddr, now: Instant) -> bool {
        let known = self.known.load();
        if known.len() < 2 {
            return false;
        }
        let until = self.millis(now + SHUNNED);
        for address in known.iter().filter(|address| address.at == at) {
            address.shunned_until.store(until, Relaxed);
        }
        let millis = self.millis(now);
        known
            .iter()
            .any(|address| address.shunned_until.load(Relaxed) <= millis)
    }

    /// Looks the name up unless an address is known, and waits for it until
    /// `deadline`. Requests that wait together share one lookup and its end.
    ///
    /// # Errors
    /// When there is no address by then.
    pub async fn resolve_now(&self, deadline: Instant) -> Result<(), Unresolved> {
        if self.is_resolved() {
            return Ok(());
        }
        let seen = self.lookups.load(Relaxed);
        let lookup = async {
            let _looking = self.looking.lock().await;
            // Whoever held the lock while we waited has looked it up for us.
            if self.lookups.load(Relaxed) == seen {
                self.settle(self.lookup().await);
            }
        };
        // Late is told by the state, as is a lookup that failed.
        timeout_at(deadline.into(), lookup).await.ok();
        if self.is_resolved() {
            Ok(())
        } else {
            Err(Unresolved)
        }
    }

    async fn lookup(&self) -> io::Result<Vec<SocketAddr>> {
        lookup(&self.host, self.port).await
    }

    /// Takes over what a lookup found; nothing found changes nothing.
    fn settle(&self, found: io::Result<Vec<SocketAddr>>) {
        let Self { host, port, .. } = self;
        match found {
            Ok(found) if !found.is_empty() => {
                // Resolvers rotate their answers: the set is what counts.
                let known = self.known.load();
                let same = known.len() == found.len()
                    && known.iter().all(|address| found.contains(&address.at));
                if !same {
                    log::info!("upstream resolved: host={host} port={port} to={found:?}");
                    let found = found.into_iter().map(Address::new).collect();
                    self.known.store(Arc::new(found));
                }
                if self.failing.swap(false, Relaxed) {
                    log::info!("upstream resolves again: host={host}");
                }
            }
            failed => {
                if !self.failing.swap(true, Relaxed) {
                    let why = match failed {
                        Ok(_) => "no address".to_owned(),
                        Err(why) => why.to_string(),
                    };
                    let kept = self.known.load().len();
                    log::warn!("upstream does not resolve: host={host} kept={kept} cause={why}");
                }
            }
        }
        self.lookups.fetch_add(1, Relaxed);
    }

    fn millis(&self, at: Instant) -> u64 {
        let elapsed = at.saturating_duration_since(self.epoch).as_millis();
        u64::try_from(elapsed).unwrap_or(u64::MAX)
    }
}

/// Looks up the names that have no address yet, all at once, for at most 2 s.
/// What is not there by then comes later, from [`run`] or a request.
pub async fn prime(upstreams: &[Arc<Upstream>]) {
    let missing = upstreams
        .iter()
        .filter(|upstream| !upstream.addresses.is_resolved())
        .cloned()
        .collect();
    // Late is no error: a request will wait for its own upstream.
    timeout(PRIME_TIMEOUT, refresh(missing)).await.ok();
}

/// Looks up the names of the upstreams that `live` returns every 30 s, until
/// `shutdown` is true or its sender gone. `live` is called anew each time, so a
/// reload is seen.
pub async fn run(live: impl Fn() -> Vec<Arc<Upstream>>, mut shutdown: watch::Receiver<bool>) {
    let rounds = async {
        loop {
            sleep(PERIOD.mul_f64(rand::random_range(0.8..1.2))).await;
            refresh(live()).await;
        }
    };
    tokio::select! {
        () = rounds => {}
        // An error is a sender that is gone.
        _ = shutdown.wait_for(|down| *down) => {}
    }
}

/// Looks every name up once, however many upstreams share it.
async fn refresh(upstreams: Vec<Arc<Upstream>>) {
    let mut hosts: HashMap<(Box<str>, u16), Vec<Arc<Upstream>>> = HashMap::new();
    for upstream in upstreams {
        let Addresses {
            host,
            port,
            literal,
            ..
        } = &*upstream.addresses;
        if !literal {
            hosts
                .entry((host.clone(), *port))
                .or_default()
                .push(upstream);
        }
    }
    let mut lookups = JoinSet::new();
    for ((host, port), upstreams) in hosts {
        if lookups.len() >= LOOKUPS_MAX {
            lookups.join_next().await;
        }
        lookups.spawn(async move {
            let found = lookup(&host, port).await;
            for upstream in upstreams {
                upstream.addresses.settle(again(&found));
            }
        });
    }
    while lookups.join_next().await.is_some() {}
}

/// Asks the system's resolver.
async fn lookup(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let found = timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, port))).await??;
    let mut unique = Vec::new();
    for at in found {
        if !unique.contains(&at) {
            unique.push(at);
        }
    }
    Ok(unique)
}

/// Copies a result, since `io::Error` cannot be cloned.
fn again(found: &io::Result<Vec<SocketAddr>>) -> io::Result<Vec<SocketAddr>> {
    match found {
        Ok(found) => Ok(found.clone()),
        Err(why) => Err(io::Error::new(why.kind(), why.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(url: &str) -> Addresses {
        Addresses::new(&url.parse().unwrap())
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn fails() -> io::Result<Vec<SocketAddr>> {
        Err(io::Error::other("no such host"))
    }

    #[test]
    fn an_address_needs_no_lookup() {
        let now = Instant::now();
        let literal = addresses("http://10.0.0.1:8000");
        assert_eq!(literal.next(now), Some(at("10.0.0.1:8000")));
        assert_eq!(addresses("http://gpu-1:8000").next(now), None);
    }

    #[test]
    fn a_failed_lookup_keeps_what_was_good() {
        let gpu = addresses("http://gpu-1:8000");
        gpu.settle(Ok(vec![at("10.0.0.1:8000")]));
        gpu.settle(fails());
        gpu.settle(Ok(vec![]));
        assert_eq!(gpu.all(), [at("10.0.0.1:8000")]);
        gpu.settle(Ok(vec![at("10.0.0.2:8000")]));
        assert_eq!(gpu.all(), [at("10.0.0.2:8000")]);
    }

    #[test]
    fn several_addresses_are_taken_in_turn() {
        let now = Instant::now();
        let gpu = addresses("http://gpu:1");
        gpu.settle(Ok(vec![at("10.0.0.1:1"), at("10.0.0.2:1")]));
        let taken: Vec<_> = (0..4).map(|_| gpu.next(now).unwrap()).collect();
        assert_ne!(taken[0], taken[1]);
        assert_eq!(taken[..2], taken[2..]);
    }

    #[test]
    fn an_address_that_refused_is_passed_over_for_a_while() {
        let now = Instant::now();
        let gpu = addresses("http://localhost:1");
        let (bad, good) = (at("[::1]:1"), at("127.0.0.1:1"));
        gpu.settle(Ok(vec![bad, good]));
        assert!(gpu.refused(bad, now));
        assert!((0..10).all(|_| gpu.next(now) == Some(good)));
        // The resolver's other order is no news: the mark stays.
        gpu.settle(Ok(vec![good, bad]));
        assert!((0..10).all(|_| gpu.next(now) == Some(good)));
        let later = now + SHUNNED;
        assert!((0..2).any(|_| gpu.next(later) == Some(bad)));
        assert!(gpu.refused(bad, now));
        assert!(!gpu.refused(good, now));
        assert!(gpu.next(now).is_some());
    }

    #[test]
    fn the_only_address_is_never_passed_over() {
        let now = Instant::now();
        let gpu = addresses("http://10.0.0.1:1");
        assert!(!gpu.refused(at("10.0.0.1:1"), now));
        assert_eq!(gpu.next(now), Some(at("10.0.0.1:1")));
    }

    #[tokio::test]
    async fn a_request_that_comes_first_resolves_for_itself() {
        let host = addresses("http://localhost:8000");
        let deadline = Instant::now() + Duration::from_secs(5);
        assert_eq!(host.resolve_now(deadline).await, Ok(()));
        assert!(host.all().iter().all(|at| at.ip().is_loopback()));
    }

    #[tokio::test]
    async fn requests_that_wait_together_share_one_failed_lookup() {
        let host = addresses("http://localhost:8000");
        let held = host.looking.lock().await;
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut crowd: Vec<_> = (0..3)
            .map(|_| Box::pin(host.resolve_now(deadline)))
            .collect();
        for request in &mut crowd {
            let waiting = tokio::time::timeout(Duration::ZERO, request).await;
            assert!(waiting.is_err());
        }
        host.settle(fails());
        drop(held);
        for request in crowd {
            assert_eq!(request.await, Err(Unresolved));
        }
        assert_eq!(host.lookups.load(Relaxed), 1);
    }

    #[tokio::test]
    async fn a_deadline_ends_the_wait() {
        let host = addresses("http://localhost:8000");
        let _held = host.looking.lock().await;
        assert_eq!(host.resolve_now(Instant::now()).await, Err(Unresolved));
    }

    #[tokio::test]
    async fn run_ends_with_the_shutdown() {
        let (down, shutdown) = watch::channel(false);
        let task = tokio::spawn(run(Vec::new, shutdown));
        down.send(true).unwrap();
        timeout(Duration::from_secs(10), task)
            .await
            .unwrap()
            .unwrap();
    }
}
