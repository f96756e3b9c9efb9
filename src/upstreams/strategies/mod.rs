//! How one of several upstreams is chosen: [`STRATEGIES`] is the one list.
//!
//! To add one: a file beside [`least_connections`] with a type that implements
//! [`Strategy`], and a line in the list.

pub mod least_connections;
pub mod random;
pub mod round_robin;

use std::sync::Arc;

use super::upstream::Upstream;

/// Chooses among upstreams that could all serve a request.
pub trait Strategy: Send + Sync {
    /// Returns the index of the one to use.
    ///
    /// `candidates` is never empty, and holds only what is available, not yet
    /// tried, and has a free slot: it may be another subset of the group at every
    /// call. `key` is the same for all requests of one conversation. Honours
    /// [`Upstream::weight`].
    fn pick(&self, candidates: &[&Upstream], key: u64) -> usize;
}

/// One line of the list.
pub struct Entry {
    /// What it is called in the YAML.
    pub name: &'static str,
    /// Other names that mean the same.
    pub aliases: &'static [&'static str],
    /// One line for people.
    pub doc: &'static str,
    /// Makes one, for one group.
    pub make: fn() -> Arc<dyn Strategy>,
}

/// Every strategy, the default first.
pub const STRATEGIES: &[Entry] = &[
    Entry {
        name: "round_robin",
        aliases: &[],
        doc: "in turn, by weight, evenly spread (5 to 1 to 1 is a a b a c a a)",
        make: || Arc::new(round_robin::RoundRobin::default()),
    },
    Entry {
        name: "random",
        aliases: &[],
        doc: "at random, by weight",
        make: || Arc::new(random::Random),
    },
    Entry {
        name: "least_connections",
        aliases: &["least_used"],
        doc: "fewest requests under way for its weight; in turn on ties",
        make: || Arc::new(least_connections::LeastConnections::default()),
    },
];

/// Returns the strategy that is called `name`, also by an alias.
pub fn find(name: &str) -> Option<&'static Entry> {
    STRATEGIES
        .iter()
        .find(|entry| entry.name == name || entry.aliases.contains(&name))
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::{
        config,
        upstreams::{Policy, upstream::build},
    };

    /// Builds upstreams `a`, `b`, … of the given weights.
    pub(crate) fn weighted(weights: &[u32]) -> Vec<Arc<Upstream>> {
        ('a'..)
            .zip(weights)
            .map(|(name, &weight)| {
                let config = config::Upstream {
                    name: name.to_string(),
                    url: "http://127.0.0.1:1/v1".to_owned(),
                    weight,
                    ..config::Upstream::default()
                };
                let policy = Policy::of(&config::Group::default(), &config);
                build(&config, policy, &HashMap::new(), false, None).unwrap()
            })
            .collect()
    }

    /// Picks `times` times and returns the names.
    pub(crate) fn picks(
        strategy: &dyn Strategy,
        upstreams: &[Arc<Upstream>],
        times: usize,
    ) -> String {
        let candidates: Vec<&Upstream> = upstreams.iter().map(|upstream| &**upstream).collect();
        (0..times)
            .map(|_| &*candidates[strategy.pick(&candidates, 0)].name)
            .collect()
    }

    /// Counts how often a name was picked.
    pub(crate) fn count(picks: &str, name: char) -> usize {
        picks.matches(name).count()
    }

    #[test]
    fn every_name_and_alias_means_one_strategy() {
        let mut seen = HashSet::new();
        for entry in STRATEGIES {
            for name in entry.aliases.iter().chain([&entry.name]) {
                assert!(seen.insert(*name), "{name} is there twice");
                assert_eq!(find(name).map(|found| found.name), Some(entry.name));
            }
        }
        assert_eq!(find("least_used").unwrap().name, "least_connections");
        assert!(find("sticky").is_none());
        let default = config::Group::default().strategy;
        assert_eq!(STRATEGIES[0].name, default);
    }

    #[test]
    fn every_strategy_picks_within_its_candidates() {
        let upstreams = weighted(&[1000, 1, 7]);
        for entry in STRATEGIES {
            let strategy = (entry.make)();
            for few in [&upstreams[..], &upstreams[1..], &upstreams[2..]] {
                assert_eq!(picks(&*strategy, few, 50).len(), 50);
            }
        }
    }
}
