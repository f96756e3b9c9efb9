//! How many connections clients have, all together and from each address, and
//! what happened to those that went too far.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use crate::{client_ip::one_client, config::Config, logging::Seldom, metrics::Metrics};

/// The count of the connections that clients have. One per process.
#[derive(Debug)]
pub struct Connections {
    /// The most that the open files allow.
    ceiling: usize,
    open: Mutex<Open>,
    metrics: Arc<Metrics>,
    lines: [Seldom; LIMITS],
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    /// The most at the last look: a reload may have changed it.
    most: usize,
    /// Never more entries than connections.
    by_client: HashMap<IpAddr, usize>,
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
    /// Nothing was read of what it was sent.
    WriteTimeout,
    /// HTTP/2 frames that cost us and do nothing.
    Http2Flood,
    /// HTTP/2 that our side ended with an error.
    Http2Error,
}

const LIMITS: usize = 6;

impl Limit {
    /// Returns the metric label.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ConnectionsPerIp => "connections_per_ip",
            Self::HeaderTimeout => "header_timeout",
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
        }
    }

    /// Admits a connection until what is returned is dropped.
    ///
    /// # Errors
    /// The limit that it would exceed, already noted.
    pub(super) fn admit(
        self: &Arc<Self>,
        peer: Option<IpAddr>,
        config: &Config,
    ) -> Result<Admitted, Limit> {
        let most = config.limits.connections.min(self.ceiling);
        let peer = peer.map(|peer| peer.to_canonical());
        let counted = peer
            .filter(|peer| !config.trusted_proxies.iter().any(|net| net.contains(peer)))
            .map(one_client);
        let mut open = self.open();
        open.most = most;
        let refused = if open.all >= most {
            Some(Limit::Connections)
        } else if counted.is_some_and(|client| {
            let from_here = open.by_client.get(&client).copied().unwrap_or(0);
            from_here >= config.limits.connections_per_ip
        }) {
            Some(Limit::ConnectionsPerIp)
        } else {
            None
        };
        if let Some(limit) = refused {
            drop(open);
            self.note(limit, peer, "connection turned away");
            return Err(limit);
        }
        open.all += 1;
        if let Some(client) = counted {
            *open.by_client.entry(client).or_insert(0) += 1;
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
        })
    }

    /// Returns whether more than four fifths of the connections are in use:
    /// then idle ones are kept less long.
    pub(super) fn is_crowded(&self) -> bool {
        let open = self.open();
        open.all * 5 > open.most * 4
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
}

impl Admitted {
    /// As [`Connections::note`].
    pub(super) fn note(&self, limit: Limit, what: &str) {
        self.connections.note(limit, self.peer, what);
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
        open.all = open.all.saturating_sub(1);
        if let Some(client) = self.client
            && let Some(from_here) = open.by_client.get_mut(&client)
        {
            *from_here -= 1;
            if *from_here == 0 {
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

    #[test]
    fn a_place_is_free_again_when_its_connection_ends() {
        let (all, config) = (connections(100), config(2, 2));
        let first = all.admit(ip("1.1.1.1"), &config).unwrap();
        let _second = all.admit(ip("2.2.2.2"), &config).unwrap();
        let refused = all.admit(ip("3.3.3.3"), &config).unwrap_err();
        assert_eq!(refused, Limit::Connections);
        drop(first);
        let _third = all.admit(ip("3.3.3.3"), &config).unwrap();
        assert_eq!(all.metrics.client_connections.get(), 2);
        assert_eq!(all.open().by_client.len(), 2);
    }

    #[test]
    fn one_address_cannot_take_every_place() {
        let (all, config) = (connections(100), config(100, 2));
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(all.admit(ip("1.1.1.1"), &config).unwrap());
            held.push(all.admit(ip("2001:db8::1"), &config).unwrap());
        }
        for same in ["1.1.1.1", "::ffff:1.1.1.1", "2001:db8::ffff:2"] {
            let refused = all.admit(ip(same), &config).unwrap_err();
            assert_eq!(refused, Limit::ConnectionsPerIp, "{same}");
        }
        for other in ["1.1.1.2", "2001:db8:0:1::1"] {
            held.push(all.admit(ip(other), &config).unwrap());
        }
        held.clear();
        assert!(all.open().by_client.is_empty());
    }

    #[test]
    fn a_trusted_proxy_stands_for_many() {
        let (all, config) = (connections(100), config(5, 1));
        let held: Vec<_> = (0..5)
            .map(|_| all.admit(ip("10.1.2.3"), &config).unwrap())
            .collect();
        let refused = all.admit(ip("10.1.2.3"), &config).unwrap_err();
        assert_eq!(refused, Limit::Connections);
        assert!(all.is_crowded());
        drop(held);
        assert!(!all.is_crowded());
    }

    #[test]
    fn the_open_files_have_the_last_word() {
        let (all, config) = (connections(1), config(100, 100));
        let _first = all.admit(ip("1.1.1.1"), &config).unwrap();
        assert!(all.admit(ip("2.2.2.2"), &config).is_err());
        assert_eq!(all.metrics.client_connections_max.get(), 1);
    }
}
