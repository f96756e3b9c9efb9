//! Smooth weighted round robin, as nginx does it.
//!
//! At each pick every candidate earns its weight, the one with the most credit
//! is taken and pays what all of them earned. Five to one to one is a a b a c a
//! a: nobody waits longer than needed, and nobody gets its share in one go.
//!
//! The credit belongs to the upstream, not to a place in a list, and only
//! candidates earn: an upstream that is missing for a while (down, busy, tried)
//! has its credit frozen. It comes back to the turn it had, without a burst to
//! make up for what it missed, and the others share by their weights meanwhile.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicI64, Ordering::Relaxed},
};

use super::Strategy;
use crate::upstreams::upstream::Upstream;

/// In turn, by weight.
#[derive(Debug, Default)]
pub struct RoundRobin {
    /// One pick at a time: some additions per candidate, nothing that waits.
    /// Two snapshots of one group overlap at a reload, each with its own lock;
    /// the credits are atomics, so their sum stays right and only the order of
    /// a few turns may differ.
    picking: Mutex<()>,
}

impl RoundRobin {
    /// Picks among the candidates for which `admit` holds; `None` if it holds
    /// for none.
    pub(super) fn pick_among(
        &self,
        candidates: &[&Upstream],
        admit: impl Fn(&Upstream) -> bool,
    ) -> Option<usize> {
        let _picking = self.picking.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = 0;
        let mut best: Option<(usize, i64, &AtomicI64)> = None;
        for (index, upstream) in candidates.iter().enumerate() {
            if !admit(upstream) {
                continue;
            }
            let weight = i64::from(upstream.weight());
            let credit = upstream.credit.fetch_add(weight, Relaxed) + weight;
            total += weight;
            if best.is_none_or(|(_, most, _)| credit > most) {
                best = Some((index, credit, &upstream.credit));
            }
        }
        let (index, _, credit) = best?;
        credit.fetch_sub(total, Relaxed);
        Some(index)
    }
}

impl Strategy for RoundRobin {
    fn pick(&self, candidates: &[&Upstream], _key: u64) -> usize {
        self.pick_among(candidates, |_| true).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{count, picks, weighted},
        *,
    };

    #[test]
    fn five_to_one_to_one_is_smooth() {
        let upstreams = weighted(&[5, 1, 1]);
        let strategy = RoundRobin::default();
        assert_eq!(picks(&strategy, &upstreams, 14), "aabacaaaabacaa");
    }

    #[test]
    fn equal_weights_take_turns() {
        let upstreams = weighted(&[1, 1, 1]);
        assert_eq!(picks(&RoundRobin::default(), &upstreams, 6), "abcabc");
    }

    #[test]
    fn the_others_share_by_weight_while_one_is_away_and_it_returns_without_a_burst() {
        let upstreams = weighted(&[2, 1, 1]);
        let strategy = RoundRobin::default();
        picks(&strategy, &upstreams, 3);
        let without_c = picks(&strategy, &upstreams[..2], 3000);
        assert!((1999..=2001).contains(&count(&without_c, 'a')));
        let first = picks(&strategy, &upstreams, 8);
        assert!(count(&first, 'c') <= 3, "{first}");
        let after = picks(&strategy, &upstreams, 4000);
        for (name, share) in [('a', 2000), ('b', 1000), ('c', 1000)] {
            let count = count(&after, name);
            assert!((share - 2..=share + 2).contains(&count), "{name}: {count}");
        }
    }

    #[test]
    fn subsets_that_change_at_every_pick_stay_fair() {
        let upstreams = weighted(&[1, 1, 1]);
        let strategy = RoundRobin::default();
        let mut all = String::new();
        for round in 0..3000 {
            // Each upstream is missing from every third pick.
            let mut few = upstreams.clone();
            few.remove(round % 3);
            all += &picks(&strategy, &few, 1);
        }
        for name in ['a', 'b', 'c'] {
            assert!((990..=1010).contains(&count(&all, name)), "{name}");
        }
    }
}
