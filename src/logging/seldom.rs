//! Lines that anybody could cause a thousand times a second.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How often a line of one kind is written at most.
const EVERY: Duration = Duration::from_secs(10);

/// Lets a line of one kind through now and then, and counts the others.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    kept_back: u64,
}

impl Seldom {
    /// Returns whether the line is to be written now: then how many were kept
    /// back since the last one.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = state
            .last
            .is_none_or(|last| now.saturating_duration_since(last) >= EVERY);
        if !is_due {
            state.kept_back += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.kept_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_ten_seconds_tells_of_all() {
        let (line, start) = (Seldom::default(), Instant::now());
        assert_eq!(line.due(start), Some(0));
        assert_eq!(line.due(start), None);
        assert_eq!(line.due(start + EVERY / 2), None);
        assert_eq!(line.due(start + EVERY), Some(2));
        assert_eq!(line.due(start + EVERY * 2), Some(0));
    }
}
