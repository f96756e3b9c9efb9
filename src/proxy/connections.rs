//! How many connections clients have, all together and from each address, and
//! what happened to those that went too far.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::places::{Place, Places};
use crate::{client_ip::one_client, config::Config, logging::Seldom, metrics::Metrics};

/// The count of the connections that clients have. One per process.
#[derive(Debug)]
pub struct Connections {
    /// The most that the open files allow.
    ceiling: usize,
    open: Mutex<Open>,
    metrics: Arc<Metrics>,
    lines: [Seldom; LIMITS],
    /// What the moments of places are counted from.
    epoch: Instant,
}

#[derive(Debug, Default)]
struct Open {
    all: Places,
    /// The number of the next.
    next: u64,
    /// The most at the last look: a reload may have changed it.
    most: usize,
    /// Never more entries than connections.
    by_client: HashMap<IpAddr, Places>,
}

/// What a connection can do too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    /// More connections than the process takes.
    Connections,
    /// More connections than one address may have.
    ConnectionsPerIp,
    /// A header, or nothing at all, for too long.
    HeaderTimeout,
    /// Its place was needed while it waited for its client.
    MakesRoom,
    /// Nothing was read of what it was sent.
    WriteTimeout,
    /// HTTP/2 frames that cost us and do nothing.
    Http2Flood,
    /// HTTP/2 that our side ended with an error.
    Http2Error,
}

const LIMITS: usize = 7;

impl Limit {
    /// Returns the metric label.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ConnectionsPerIp => "connections_per_ip",
            Self::HeaderTimeout => "header_timeout",
            Self::MakesRoom => "idle_connections",
            Self::WriteTimeout => "write_timeout",
            Self::Http2Flood => "http2_flood",
            Self::Http2Error => "http2_error",
        }
    }
}

impl Connections {
    /// Begins to count; at most `ceiling` are ever admitted.
    pub fn new(metrics: Arc<Metrics>, ceiling: usize) -> Self {
        Self {
            ceiling,
            open: Mutex::default(),
            metrics,
            lines: Default::default(),
            epoch: Instant::now(),
        }
    }

    /// Admits a connection until what is returned is dropped. Where there are too
    /// many, one that waits for its client is told to go.
    ///
    /// # Errors
    /// The limit that it would exceed, already noted: all others are at work.
    pub(super) fn admit(
        self: &Arc<Self>,
        peer: Option<IpAddr>,
        config: &Config,
        now: Instant,
    ) -> Result<Admitted, Limit> {
        let per_ip = config.limits.connections_per_ip;
        let most = config.limits.connections.min(self.ceiling);
        let peer = peer.map(|peer| peer.to_canonical());
        let counted = peer
            .filter(|peer| !config.trusted_proxies.iter().any(|net| net.contains(peer)))
            .map(one_client);
        let mut open = self.open();
        open.most = most;
        let mut from_here = counted.and_then(|client| open.by_client.get_mut(&client));
        let here = from_here.as_ref().map_or(0, |places| places.len());
        // One place that a client gives up is one for all.
        let refused = if here >= per_ip {
            let places = from_here.as_mut();
            let makes_room = places.is_some_and(|places| places.make_room(now));
            let refused = here >= per_ip + leaving(per_ip) || !makes_room;
            refused.then_some(Limit::ConnectionsPerIp)
        } else if open.all.len() >= most {
            let is_full = open.all.len() >= most + leaving(most);
            (is_full || !open.all.make_room(now)).then_some(Limit::Connections)
        } else {
            None
        };
        if let Some(limit) = refused {
            drop(open);
            self.note(limit, peer, "connection turned away");
            return Err(limit);
        }
        let number = open.next;
        open.next += 1;
        let place = Places::place(self.epoch, now);
        open.all.add(number, &place);
        if let Some(client) = counted {
            let places = open.by_client.entry(client).or_default();
            places.add(number, &place);
        }
        drop(open);
        self.metrics.client_connections.inc();
        self.metrics
            .client_connections_max
            .set(i64::try_from(most).unwrap_or(i64::MAX));
        Ok(Admitted {
            connections: Arc::clone(self),
            client: counted,
            peer,
            number,
            place,
        })
    }

    /// Returns whether more than four fifths of the connections are in use:
    /// then idle ones are kept less long.
    pub(super) fn is_crowded(&self) -> bool {
        let open = self.open();
        open.all.len() * 5 > open.most * 4
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.open().all.len()
    }

    /// Returns whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether a request is under way on one of them: also one whose
    /// answer is made, and not yet sent.
    pub fn any_busy(&self) -> bool {
        self.open().all.any_busy()
    }

    /// Closes those that wait for a request of which nothing has come.
    pub fn stop_idle(&self) {
        self.open().all.stop_idle();
    }

    /// Counts that a connection went too far, and says so now and then.
    pub(super) fn note(&self, limit: Limit, peer: Option<IpAddr>, what: &str) {
        let name = limit.as_str();
        self.metrics.limits.with_label_values(&[name]).inc();
        let line = self.lines.get(limit as usize);
        if let Some(kept_back) = line.and_then(|line| line.due(Instant::now())) {
            let client = peer.map_or_else(|| "-".to_owned(), |peer| peer.to_string());
            log::warn!("{what}: limit={name} client={client} more_like_it={kept_back}");
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that is counted; dropping it gives its place back.
#[derive(Debug)]
pub(super) struct Admitted {
    connections: Arc<Connections>,
    /// The address it is counted under; `None` for a trusted proxy.
    client: Option<IpAddr>,
    peer: Option<IpAddr>,
    number: u64,
    place: Arc<Place>,
}

/// Returns how many of so many may be on their way out, beyond them: who has to
/// make room is gone a moment later.
fn leaving(most: usize) -> usize {
    (most / 8).clamp(1, 64)
}

impl Admitted {
    /// As [`Connections::note`].
    pub(super) fn note(&self, limit: Limit, what: &str) {
        self.connections.note(limit, self.peer, what);
    }

    /// Returns its place.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Returns who is connected; `None` if the system does not tell.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// Returns where connections are counted.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.connections.metrics
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut open = self.connections.open();
        open.all.remove(self.number);
        if let Some(client) = self.client
            && let Some(from_here) = open.by_client.get_mut(&client)
        {
            from_here.remove(self.number);
            if from_here.len() == 0 {
                open.by_client.remove(&client);
            }
        }
        drop(open);
        self.connections.metrics.client_connections.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(connections: usize, per_ip: usize) -> Config {
        let mut config = Config::default();
        config.limits.connections = connections;
        config.limits.connections_per_ip = per_ip;
        config.trusted_proxies = vec!["10.0.0.0/8".parse().unwrap()];
        config
    }

    fn connections(ceiling: usize) -> Arc<Connections> {
        Arc::new(Connections::new(Arc::new(Metrics::new()), ceiling))
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    /// Admits one that is at work at once.
    fn admit(all: &Arc<Connections>, from: &str, config: &Config) -> Result<Admitted, Limit> {
        let admitted = all.admit(ip(from), config, Instant::now())?;
        admitted.place().works();
        Ok(admitted)
    }

    #[test]
    fn a_place_is_free_again_when_its_connection_ends() {
        let (all, config) = (connections(100), config(2, 2));
        let first = admit(&all, "1.1.1.1", &config).unwrap();
        let _second = admit(&all, "2.2.2.2", &config).unwrap();
        let refused = admit(&all, "3.3.3.3", &config).unwrap_err();
        assert_eq!(refused, Limit::Connections);
        drop(first);
        let _third = admit(&all, "3.3.3.3", &config).unwrap();
        assert_eq!(all.metrics.client_connections.get(), 2);
        assert_eq!(all.open().by_client.len(), 2);
    }

    #[test]
    fn one_address_cannot_take_every_place() {
        let (all, config) = (connections(100), config(100, 2));
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(admit(&all, "1.1.1.1", &config).unwrap());
            held.push(admit(&all, "2001:db8::1", &config).unwrap());
        }
        for same in ["1.1.1.1", "::ffff:1.1.1.1", "2001:db8::ffff:2"] {
            let refused = admit(&all, same, &config).unwrap_err();
            assert_eq!(refused, Limit::ConnectionsPerIp, "{same}");
        }
        for other in ["1.1.1.2", "2001:db8:0:1::1"] {
            held.push(admit(&all, other, &config).unwrap());
        }
        held.clear();
        assert!(all.open().by_client.is_empty());
    }

    #[test]
    fn a_trusted_proxy_stands_for_many() {
        let (all, config) = (connections(100), config(5, 1));
        let held: Vec<_> = (0..5)
            .map(|_| admit(&all, "10.1.2.3", &config).unwrap())
            .collect();
        let refused = admit(&all, "10.1.2.3", &config).unwrap_err();
        assert_eq!(refused, Limit::Connections);
        assert!(all.is_crowded());
        drop(held);
        assert!(!all.is_crowded());
    }

    #[test]
    fn the_open_files_have_the_last_word() {
        let (all, config) = (connections(1), config(100, 100));
        let _first = admit(&all, "1.1.1.1", &config).unwrap();
        assert!(admit(&all, "2.2.2.2", &config).is_err());
        assert_eq!(all.metrics.client_connections_max.get(), 1);
    }

    #[test]
    fn who_waits_for_its_client_makes_room_for_who_comes() {
        let (all, config) = (connections(100), config(16, 4));
        let now = Instant::now();
        let idle = |from: &str| all.admit(ip(from), &config, now);
        let mut held: Vec<_> = (0..4).map(|_| idle("1.1.1.1").unwrap()).collect();
        // One of its own goes, as long as those that were told are nearly gone.
        held.push(idle("1.1.1.1").unwrap());
        assert_eq!(idle("1.1.1.1").unwrap_err(), Limit::ConnectionsPerIp);
        held.extend((0..11).map(|n| idle(&format!("2.2.2.{n}")).unwrap()));
        assert_eq!(all.open().all.len(), 16);
        for beyond in 0..2 {
            held.push(idle(&format!("3.3.3.{beyond}")).unwrap());
        }
        assert_eq!(idle("3.3.3.9").unwrap_err(), Limit::Connections);
        held.remove(0);
        assert!(idle("3.3.3.9").is_ok());
        // Nobody goes who is at work.
        for admitted in &held {
            admitted.place().works();
        }
        held.pop();
        assert_eq!(idle("3.3.3.9").unwrap_err(), Limit::Connections);
    }
}
