//! Sets of regular expressions, and what of a text that still grows they may
//! yet match.
//!
//! Everything here takes time linear in the text, whatever the expressions are:
//! they have no backreferences and no look-around but anchors and word borders.
//! Their compiled size is bounded when the configuration is read.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::watch::{Stopped, Watch};
use regex_automata::{
    Anchored, Input,
    hybrid::{
        LazyStateID,
        dfa::{Cache, DFA},
    },
    meta::Regex,
    nfa::thompson,
};

/// The most memory of a compiled set, in bytes.
const SET_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The memory of the states that a set remembers, in bytes.
const CACHE_BYTES: usize = 256 * 1024;
/// How many of these memories are kept for the next stream.
const CACHES_MAX: usize = 4;
/// Steps that one look at the end of a text may take; a position that is not
/// decided by then counts as one where a match may begin.
const STEPS_MAX: usize = 256 * 1024;

/// How much of a text is searched between two looks at the clock, in bytes.
const SLICE_BYTES: usize = 128 * 1024;
/// The longest match, in bytes, for which a text is searched in slices; where
/// there may be a longer one an automaton first looks whether there is any.
const MATCH_BYTES_MAX: usize = 64 * 1024;

/// A set of expressions, the first of which counts where several match at one
/// place.
pub(super) struct Matcher {
    regex: Regex,
    dfa: DFA,
    /// The longest match, in bytes; `None` if there is no longest, or it is very
    /// long.
    longest: Option<usize>,
    caches: Mutex<Vec<Cache>>,
}

/// Returns the longest match of any of them.
fn longest(patterns: &[String]) -> Option<usize> {
    let mut longest = 0;
    for pattern in patterns {
        let parsed = regex_syntax::parse(pattern).ok()?;
        longest = longest.max(parsed.properties().maximum_len()?);
    }
    (longest <= MATCH_BYTES_MAX).then_some(longest)
}

/// Returns the first border between characters at or behind a place.
fn border(text: &str, at: usize) -> usize {
    (at..text.len())
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(text.len())
}

impl Matcher {
    /// Compiles a set, each of whose expressions was checked by itself.
    ///
    /// # Errors
    /// They are too large together.
    pub(super) fn new(patterns: &[String]) -> Result<Self, String> {
        let told = |why: &dyn std::fmt::Display| format!("too large together ({why})");
        let config = Regex::config()
            .nfa_size_limit(Some(SET_BYTES_MAX))
            .hybrid_cache_capacity(CACHE_BYTES);
        let regex = Regex::builder()
            .configure(config)
            .build_many(patterns)
            .map_err(|why| told(&why))?;
        let config = DFA::config()
            .unicode_word_boundary(true)
            .cache_capacity(CACHE_BYTES)
            .skip_cache_capacity_check(true);
        let dfa = DFA::builder()
            .configure(config)
            .thompson(thompson::Config::new().nfa_size_limit(Some(SET_BYTES_MAX)))
            .build_many(patterns)
            .map_err(|why| told(&why))?;
        Ok(Self {
            regex,
            dfa,
            longest: longest(patterns),
            caches: Mutex::new(Vec::new()),
        })
    }

    /// Returns what [`find`](Self::find) does, slice by slice.
    ///
    /// # Errors
    /// It had to end before.
    pub(super) fn search(
        &self,
        text: &str,
        from: usize,
        watch: &Watch,
    ) -> Result<Option<Range<usize>>, Stopped> {
        watch.goes_on()?;
        if text.len().saturating_sub(from) <= SLICE_BYTES {
            return Ok(self.find(text, from));
        }
        let Some(longest) = self.longest else {
            return match self.is_there(text, from, watch)? {
                false => Ok(None),
                true => Ok(self.find(text, from)),
            };
        };
        let mut start = from;
        while start < text.len() {
            watch.goes_on()?;
            let next = border(text, start.saturating_add(SLICE_BYTES));
            // A match that begins in this slice ends here.
            let end = border(text, next.saturating_add(longest));
            let input = Input::new(text).range(start..end);
            let mut all = self.regex.find_iter(input);
            let found = all.find(|found| !found.is_empty());
            match found.map(|found| found.range()) {
                Some(found) if found.start < next || end == text.len() => return Ok(Some(found)),
                _ => start = next,
            }
        }
        Ok(None)
    }

    /// Says whether there may be a match at or behind `from`.
    fn is_there(&self, text: &str, from: usize, watch: &Watch) -> Result<bool, Stopped> {
        let kept = self.lock().pop();
        let mut cache = kept.unwrap_or_else(|| self.dfa.create_cache());
        let is_there = self.walk(&mut cache, text, from, watch);
        let mut caches = self.lock();
        if caches.len() < CACHES_MAX {
            caches.push(cache);
        }
        is_there
    }

    fn walk(
        &self,
        cache: &mut Cache,
        text: &str,
        from: usize,
        watch: &Watch,
    ) -> Result<bool, Stopped> {
        let input = Input::new(text).range(from..);
        let Ok(mut state) = self.dfa.start_state_forward(cache, &input) else {
            return Ok(true);
        };
        let rest = text.as_bytes().get(from..).unwrap_or_default();
        for slice in rest.chunks(SLICE_BYTES) {
            watch.goes_on()?;
            for &byte in slice {
                match self.dfa.next_state(cache, state, byte) {
                    Ok(next) if next.is_dead() => return Ok(false),
                    Ok(next) if !next.is_match() && !next.is_quit() => state = next,
                    // Where the automaton gives up anything may come.
                    _ => return Ok(true),
                }
            }
        }
        let ended = self.dfa.next_eoi_state(cache, state);
        Ok(ended.map_or(true, |ended| ended.is_match()))
    }

    /// Returns the first match that is not empty at or behind `from`.
    pub(super) fn find(&self, text: &str, from: usize) -> Option<Range<usize>> {
        let input = Input::new(text).range(from..);
        let mut all = self.regex.find_iter(input);
        all.find(|found| !found.is_empty())
            .map(|found| found.range())
    }

    /// Returns the first place of `within` from which on the text, up to its
    /// end, is the beginning of a match, or a match that more text may change.
    pub(super) fn undecided(&self, text: &str, within: Range<usize>) -> Option<usize> {
        let kept = self.lock().pop();
        let mut cache = kept.unwrap_or_else(|| self.dfa.create_cache());
        let mut steps = STEPS_MAX;
        let place = text
            .get(within.clone())
            .unwrap_or_default()
            .char_indices()
            .map(|(at, _)| within.start + at)
            .find(|&at| self.is_undecided(&mut cache, text, at, &mut steps));
        let mut caches = self.lock();
        if caches.len() < CACHES_MAX {
            caches.push(cache);
        }
        place
    }

    fn is_undecided(&self, cache: &mut Cache, text: &str, at: usize, steps: &mut usize) -> bool {
        let input = Input::new(text).anchored(Anchored::Yes).range(at..);
        // Where the automaton gives up (at a word border between letters that
        // are not ASCII) anything may come.
        let Ok(mut state) = self.dfa.start_state_forward(cache, &input) else {
            return true;
        };
        for &byte in text.as_bytes().get(at..).unwrap_or_default() {
            if state.is_dead() {
                return false;
            }
            let Some(left) = steps.checked_sub(1) else {
                return true;
            };
            *steps = left;
            match self.dfa.next_state(cache, state, byte) {
                Ok(next) if !next.is_quit() => state = next,
                _ => return true,
            }
        }
        !state.is_dead() && !self.is_settled(cache, state, steps).unwrap_or(false)
    }

    /// Says whether a match has come to its end in a state, whatever follows;
    /// `None` if that takes too long to find out. The automaton tells of a match
    /// one byte later than it has seen it.
    fn is_settled(&self, cache: &mut Cache, state: LazyStateID, steps: &mut usize) -> Option<bool> {
        if state.is_match() {
            return self.is_over(cache, state, steps);
        }
        let cleared = cache.clear_count();
        let ended = self.dfa.next_eoi_state(cache, state).ok()?;
        if cache.clear_count() != cleared || !ended.is_match() {
            return Some(false);
        }
        for class in self.dfa.byte_classes().representatives(..) {
            let Some(byte) = class.as_u8() else {
                continue;
            };
            let next = self.step(cache, state, byte, steps)?;
            if !next.is_match() || !self.is_over(cache, next, steps)? {
                return Some(false);
            }
        }
        Some(true)
    }

    /// Says whether nothing more can come of a state.
    fn is_over(&self, cache: &mut Cache, state: LazyStateID, steps: &mut usize) -> Option<bool> {
        for class in self.dfa.byte_classes().representatives(..) {
            let Some(byte) = class.as_u8() else {
                continue;
            };
            if !self.step(cache, state, byte, steps)?.is_dead() {
                return Some(false);
            }
        }
        Some(true)
    }

    /// Goes from a state that is still needed to the next; `None` if it has been
    /// forgotten on the way, since the memory is bounded.
    fn step(
        &self,
        cache: &mut Cache,
        state: LazyStateID,
        byte: u8,
        steps: &mut usize,
    ) -> Option<LazyStateID> {
        *steps = steps.checked_sub(1)?;
        let cleared = cache.clear_count();
        let next = self.dfa.next_state(cache, state, byte).ok()?;
        (cache.clear_count() == cleared).then_some(next)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Cache>> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(patterns: &[&str]) -> Matcher {
        let patterns: Vec<String> = patterns.iter().map(|&one| one.to_owned()).collect();
        Matcher::new(&patterns).unwrap()
    }

    #[test]
    fn only_what_may_become_a_match_is_undecided() {
        let set = matcher(&["secret", "[0-9]{4}-[0-9]+"]);
        for (text, place) in [
            ("nothing of it", None),
            ("a sec", Some(2)),
            ("a seclusion", None),
            ("sse", Some(1)),
            ("in 2026-1", Some(3)),
            ("in 2026-12.", None),
            ("the secret", None),
            ("", None),
        ] {
            assert_eq!(set.undecided(text, 0..text.len()), place, "{text}");
        }
    }

    #[test]
    fn more_states_than_the_memory_holds_change_nothing() {
        let set = matcher(&["[ab]*a[ab]{14}c", "abc"]);
        let text: String = (0..3000_u32)
            .map(|n| {
                if n.wrapping_mul(2_654_435_761) >> 31 == 0 {
                    'a'
                } else {
                    'b'
                }
            })
            .collect();
        for end in (0..text.len()).step_by(7) {
            let (before, _) = text.split_at(end);
            set.undecided(before, end.saturating_sub(64)..end);
        }
        assert_eq!(set.undecided("xabc", 0..4), None);
    }

    #[test]
    fn a_word_border_is_seen_from_both_sides() {
        let set = matcher(&[r"\bass\b"]);
        assert_eq!(set.undecided("bass", 0..4), None);
        assert_eq!(set.undecided("an ass", 0..6), Some(3));
        assert_eq!(set.undecided("an assa", 0..7), None);
        assert_eq!(set.find("an ass.", 0), Some(3..6));
    }

    #[test]
    fn what_is_searched_in_slices_is_found_where_it_is() {
        let watch = Watch::new(std::time::Duration::from_secs(60));
        for pattern in ["nee.{0,90}dle", "nee.*?dle", r"\bnee\w*é", "nee(dle)?"] {
            let set = matcher(&[pattern]);
            for before in [0, 5, SLICE_BYTES - 4, SLICE_BYTES, 3 * SLICE_BYTES + 1] {
                let mut text = " é".repeat(before / 3);
                text.push_str(" neeé---dle ");
                text.push_str(&" x".repeat(SLICE_BYTES));
                assert_eq!(
                    set.search(&text, 0, &watch).unwrap(),
                    set.find(&text, 0),
                    "{pattern} {before}"
                );
            }
            let none = "ne edle ".repeat(SLICE_BYTES / 3);
            assert_eq!(set.search(&none, 0, &watch), Ok(None), "{pattern}");
        }
    }

    #[test]
    fn a_search_that_nobody_waits_for_ends() {
        let text = "foo ".repeat(SLICE_BYTES);
        for pattern in ["foo.{0,200}baz", "foo.*baz"] {
            let watch = Watch::new(std::time::Duration::from_secs(60));
            drop(watch.waiting());
            assert_eq!(matcher(&[pattern]).search(&text, 0, &watch), Err(Stopped));
            let late = Watch::new(std::time::Duration::ZERO);
            assert_eq!(matcher(&[pattern]).search(&text, 0, &late), Err(Stopped));
        }
    }

    #[test]
    fn a_set_that_explodes_is_not_built() {
        let many = vec!["(?:[a-z]{500}){20}".to_owned(); 50];
        assert!(Matcher::new(&many).is_err());
    }
}
