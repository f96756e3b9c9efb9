//! What holds for one upstream: its own settings, or its group's.

use std::time::Duration;

use crate::config;

use super::breaker::Rules;

/// When one upstream is left alone, and how it is asked whether it is well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// When its breakers open; `None` if it has none.
    pub breaker: Option<Rules>,
    /// How it is asked.
    pub check: config::Check,
    /// The longest pause after a 429 that names none.
    pub cooldown: Duration,
    /// How long it takes to its full share after it came back.
    pub slow_start: Duration,
    /// Whether the configuration gives it nothing new.
    pub drain: bool,
}

impl Policy {
    /// Returns what holds for an upstream of a group.
    pub fn of(group: &config::Group, upstream: &config::Upstream) -> Self {
        let breaker = upstream.breaker.as_ref().unwrap_or(&group.breaker);
        Self {
            breaker: breaker.enabled.then(|| Rules::of(breaker)),
            check: upstream.check.as_ref().unwrap_or(&group.check).clone(),
            cooldown: upstream.cooldown.unwrap_or(group.cooldown).get(),
            slow_start: upstream.slow_start.unwrap_or(group.slow_start).get(),
            drain: upstream.drain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstreams_own_settings_go_before_its_groups() {
        let group: config::Group = serde_yaml::from_str(
            "{ cooldown: 1m, slow_start: 1s, check: { every: 7s }, breaker: { failures: 3 },
               upstreams: [ { name: a, url: x }, { name: b, url: x, cooldown: 2m, slow_start: 0s,
               check: { enabled: false }, breaker: { enabled: false }, drain: true } ] }",
        )
        .unwrap();
        let [a, b] = [0, 1].map(|nth| Policy::of(&group, &group.upstreams[nth]));
        assert_eq!(a.cooldown, Duration::from_secs(60));
        assert_eq!(a.check.every, config::Time::secs(7));
        assert_eq!(a.breaker.unwrap().failures, Some(3));
        assert!(!a.drain && b.drain);
        assert_eq!(b.cooldown, Duration::from_secs(120));
        assert!(b.slow_start.is_zero() && !b.check.enabled && b.breaker.is_none());
    }
}
