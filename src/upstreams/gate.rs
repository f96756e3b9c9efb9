//! A gate in front of a whole upstream: shut for a time that doubles, then one
//! request at a time may try.
//!
//! An upstream has several, each with its own reason to be shut: it cannot be
//! reached, its checks fail, its credential is no good. Unlike a
//! [`breaker`](super::breaker), a gate shuts at the first report.

use std::time::{Duration, Instant};

use super::breaker::Says;

/// How long a gate stays shut: `first`, doubling to `longest`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pauses {
    pub(super) first: Duration,
    pub(super) longest: Duration,
}

/// One gate.
#[derive(Debug, Default)]
pub(super) struct Gate {
    shut: Option<Shut>,
    /// How often it was shut since it last was opened for good.
    times: u32,
}

#[derive(Debug)]
struct Shut {
    since: Instant,
    until: Instant,
    /// The ticket of who tries; 0 is nobody.
    ticket: u64,
}

impl Gate {
    /// Returns whether it is shut, also while somebody may try.
    pub(super) fn is_shut(&self) -> bool {
        self.shut.is_some()
    }

    /// Returns whether a request may go.
    pub(super) fn says(&self, now: Instant) -> Says {
        match &self.shut {
            None => Says::Go,
            Some(shut) if shut.ticket == 0 && now >= shut.until => Says::Try,
            Some(_) => Says::Stop,
        }
    }

    /// Returns since when it has been shut.
    pub(super) fn since(&self) -> Option<Instant> {
        self.shut.as_ref().map(|shut| shut.since)
    }

    /// Returns whether nobody tries right now.
    pub(super) fn is_untried(&self) -> bool {
        self.shut.as_ref().is_none_or(|shut| shut.ticket == 0)
    }

    /// Returns how long nobody may go.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.shut.as_ref().map_or(Duration::ZERO, |shut| {
            shut.until.saturating_duration_since(now)
        })
    }

    /// Shuts it, or shuts it again after a try; what is reported while it is
    /// shut belongs to the same outage. Returns whether it was open.
    pub(super) fn shut(&mut self, pauses: Pauses, now: Instant) -> bool {
        let was_open = match &self.shut {
            Some(shut) if now < shut.until => return false,
            Some(_) => false,
            None => true,
        };
        let doubled = 1_u32.checked_shl(self.times.min(20)).unwrap_or(u32::MAX);
        // Gateways must not come back together.
        let pause = pauses
            .first
            .saturating_mul(doubled)
            .min(pauses.longest)
            .mul_f64(rand::random_range(0.8..1.2))
            .min(pauses.longest);
        self.times = self.times.saturating_add(1);
        self.shut = Some(Shut {
            since: now,
            until: now + pause,
            ticket: 0,
        });
        was_open
    }

    /// Opens it for good; returns whether it was shut.
    pub(super) fn open(&mut self) -> bool {
        self.times = 0;
        self.shut.take().is_some()
    }

    /// Opens it for what came of a request that began at `began`; returns whether
    /// it was shut. One that began before it was shut is old news: its answer was
    /// on the way when the server went away.
    pub(super) fn open_by(&mut self, began: Instant) -> bool {
        self.shut.as_ref().is_some_and(|shut| began >= shut.since) && self.open()
    }

    /// Notes who tries.
    pub(super) fn begin_try(&mut self, ticket: u64) {
        if let Some(shut) = &mut self.shut {
            shut.ticket = ticket;
        }
    }

    /// Lets the next one try, if this ticket is the one that tries.
    pub(super) fn end_try(&mut self, ticket: u64) {
        if let Some(shut) = self.shut.as_mut().filter(|shut| shut.ticket == ticket) {
            shut.ticket = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSES: Pauses = Pauses {
        first: Duration::from_secs(1),
        longest: Duration::from_secs(30),
    };

    #[test]
    fn pauses_double_to_the_longest_and_opening_starts_again() {
        let (mut gate, mut now) = (Gate::default(), Instant::now());
        for expected in [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] {
            gate.shut(PAUSES, now);
            let wait = gate.wait(now).as_secs_f64();
            assert!(wait >= expected * 0.79, "{wait} of {expected}");
            assert!(wait <= (expected * 1.21).min(30.0), "{wait} of {expected}");
            now += gate.wait(now);
        }
        assert!(gate.open());
        assert_eq!(gate.says(now), Says::Go);
        assert!(gate.shut(PAUSES, now));
        assert!(gate.wait(now) <= Duration::from_millis(1210));
    }

    #[test]
    fn a_crowd_that_fails_together_doubles_the_pause_once() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        let shut = (0..100).filter(|_| gate.shut(PAUSES, now)).count();
        assert_eq!(shut, 1);
        assert!(gate.wait(now) <= Duration::from_millis(1210));
    }

    #[test]
    fn what_began_before_it_was_shut_does_not_open_it() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        let now = start + Duration::from_secs(1);
        gate.shut(PAUSES, now);
        assert!(!gate.open_by(start));
        assert!(gate.is_shut());
        assert!(gate.open_by(now));
        assert!(!gate.open_by(now));
    }

    #[test]
    fn one_at_a_time_tries_and_an_old_ticket_ends_nothing() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        gate.shut(PAUSES, start);
        assert_eq!(gate.says(start), Says::Stop);
        let now = start + Duration::from_secs(2);
        assert_eq!(gate.says(now), Says::Try);
        gate.begin_try(1);
        assert_eq!(gate.says(now), Says::Stop);
        gate.end_try(7);
        assert!(!gate.is_untried());
        gate.end_try(1);
        assert_eq!(gate.says(now), Says::Try);
    }
}
