//! At random, by weight: no state at all, so many gateways in front of the same
//! upstreams never fall into step.

use super::Strategy;
use crate::upstreams::upstream::Upstream;

/// At random, by weight.
#[derive(Debug)]
pub struct Random;

impl Strategy for Random {
    fn pick(&self, candidates: &[&Upstream], _key: u64) -> usize {
        let weight = |upstream: &Upstream| u64::from(upstream.weight());
        let total: u64 = candidates.iter().map(|upstream| weight(upstream)).sum();
        let mut point = rand::random_range(0..total.max(1));
        for (index, upstream) in candidates.iter().enumerate() {
            match point.checked_sub(weight(upstream)) {
                Some(rest) => point = rest,
                None => return index,
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{count, picks, weighted},
        *,
    };

    #[test]
    fn shares_follow_the_weights() {
        let upstreams = weighted(&[5, 3, 2]);
        let picks = picks(&Random, &upstreams, 10_000);
        // Six standard deviations are 300 picks.
        for (name, share) in [('a', 5000), ('b', 3000), ('c', 2000)] {
            let count = count(&picks, name);
            assert!(
                (share - 300..=share + 300).contains(&count),
                "{name}: {count}"
            );
        }
    }

    #[test]
    fn picks_are_not_in_turn() {
        let upstreams = weighted(&[1, 1]);
        let picks = picks(&Random, &upstreams, 200);
        assert!(picks.contains("aaa") && picks.contains("bbb"), "{picks}");
    }
}
