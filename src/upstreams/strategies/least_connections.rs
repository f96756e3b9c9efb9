//! Fewest requests under way for its weight.
//!
//! `in_flight / weight` is compared by cross multiplication, so that 1 of 2 and
//! 2 of 4 are a tie and not a matter of rounding. Ties are the ordinary case
//! when little is going on (nobody has anything), so they decide the shares then:
//! they are taken in turn, by weight, as in [`round_robin`](super::round_robin).

use super::{Strategy, round_robin::RoundRobin};
use crate::upstreams::upstream::Upstream;

/// Fewest requests under way for its weight; in turn on ties.
#[derive(Debug, Default)]
pub struct LeastConnections {
    turns: RoundRobin,
}

impl Strategy for LeastConnections {
    fn pick(&self, candidates: &[&Upstream], _key: u64) -> usize {
        let mut least = 0;
        let mut fewest: Option<Used> = None;
        let mut tied = false;
        for (index, upstream) in candidates.iter().enumerate() {
            let used = Used::of(upstream);
            match fewest {
                Some(best) if best.less(used) => {}
                Some(best) if !used.less(best) => tied = true,
                _ => {
                    least = index;
                    fewest = Some(used);
                    tied = false;
                }
            }
        }
        let Some(fewest) = fewest.filter(|_| tied) else {
            return least;
        };
        // Counters move while we look. Who has become busier since is left out,
        // and if all have, the first look holds.
        let among = |upstream: &Upstream| !fewest.less(Used::of(upstream));
        self.turns.pick_among(candidates, among).unwrap_or(least)
    }
}

/// Requests under way for a weight.
#[derive(Clone, Copy)]
struct Used {
    in_flight: u64,
    weight: u64,
}

impl Used {
    fn of(upstream: &Upstream) -> Self {
        Self {
            // One that comes back has a small weight, and would get the next
            // request all the same while it has none: what it would have then
            // counts.
            in_flight: u64::from(upstream.in_flight()) + u64::from(upstream.is_ramping()),
            weight: upstream.weight().into(),
        }
    }

    /// A u32 and one, times a u32: a u64 holds the product.
    const fn less(self, other: Self) -> bool {
        self.in_flight * other.weight < other.in_flight * self.weight
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{
        super::tests::{count, picks, weighted},
        *,
    };
    use crate::upstreams::upstream::{Slot, tests::acquire};

    fn hold(upstream: &Arc<Upstream>, slots: usize) -> Vec<Slot> {
        (0..slots).map(|_| acquire(upstream).unwrap()).collect()
    }

    #[test]
    fn the_least_used_for_its_weight_is_taken() {
        let upstreams = weighted(&[4, 1]);
        let strategy = LeastConnections::default();
        let _a = hold(&upstreams[0], 3);
        let b = hold(&upstreams[1], 1);
        assert_eq!(picks(&strategy, &upstreams, 3), "aaa");
        drop(b);
        assert_eq!(picks(&strategy, &upstreams, 3), "bbb");
    }

    #[test]
    fn half_of_two_and_half_of_four_are_a_tie() {
        let upstreams = weighted(&[2, 4]);
        let _a = hold(&upstreams[0], 1);
        let _b = hold(&upstreams[1], 2);
        let picks = picks(&LeastConnections::default(), &upstreams, 6);
        assert_eq!((count(&picks, 'a'), count(&picks, 'b')), (2, 4));
    }

    #[test]
    fn ties_are_taken_in_turn() {
        let upstreams = weighted(&[1, 1, 1]);
        assert_eq!(picks(&LeastConnections::default(), &upstreams, 6), "abcabc");
    }

    #[test]
    fn a_tie_among_some_leaves_out_the_busy_one() {
        let upstreams = weighted(&[1, 1, 1]);
        let _b = hold(&upstreams[1], 1);
        let picks = picks(&LeastConnections::default(), &upstreams, 6);
        assert_eq!((count(&picks, 'a'), count(&picks, 'c')), (3, 3));
    }

    #[test]
    fn requests_that_stay_fill_up_by_weight() {
        let upstreams = weighted(&[3, 1]);
        let strategy = LeastConnections::default();
        let mut held = Vec::new();
        for _ in 0..400 {
            let name = picks(&strategy, &upstreams, 1);
            let index = usize::from(name == "b");
            held.extend(acquire(&upstreams[index]));
        }
        assert!((299..=301).contains(&upstreams[0].in_flight()));
    }
}
