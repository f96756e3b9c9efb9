//! One rule about texts, and what it makes of a text that comes in pieces.
//!
//! A piece goes on at once, but for what may be the beginning of a match: that
//! is held back, at most `window` characters of it, until it is decided.

use std::{borrow::Cow, ops::Range};

use super::{
    matcher::Matcher,
    watch::{Stopped, Watch},
};

/// What is done to what matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The text ends before it.
    Deny,
    /// This stands in its place.
    Replace(String),
    /// As many stars as it had characters.
    Mask,
}

/// One rule.
pub(super) struct Rule {
    /// Its name in metrics and in the log.
    pub(super) name: String,
    pub(super) action: Action,
    pub(super) matcher: Matcher,
}

/// What one rule holds back of one text.
#[derive(Debug, Default)]
pub(super) struct Stage {
    held: String,
    /// The character before it, which word borders ask for.
    before: Option<char>,
}

/// What becomes of a piece of text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// What goes on.
    pub(super) text: String,
    /// How many matches there were.
    pub(super) hits: u64,
    /// Whether the text ends here.
    pub(super) denied: bool,
}

impl Rule {
    /// Applies the rule to a whole text.
    #[cfg(test)]
    pub(super) fn apply(&self, text: &str) -> Passed {
        Stage::default().push(self, text, true, 0)
    }

    /// Applies the rule to a text that may be large; what it finds may not end
    /// the text.
    ///
    /// # Errors
    /// It had to end before.
    pub(super) fn rewrite(&self, text: &str, watch: &Watch) -> Result<Passed, Stopped> {
        let mut passed = Passed::default();
        let mut at = 0;
        while let Some(found) = self.matcher.search(text, at, watch)? {
            passed.hits += 1;
            passed.text.push_str(slice(text, at..found.start));
            self.put(slice(text, found.clone()), &mut passed.text);
            at = found.end;
        }
        passed.text.push_str(slice(text, at..text.len()));
        Ok(passed)
    }

    /// Puts into `out` what stands in the place of a match; says whether the
    /// text goes on behind it.
    fn put(&self, found: &str, out: &mut String) -> bool {
        match &self.action {
            Action::Deny => return false,
            Action::Replace(with) => out.push_str(with),
            Action::Mask => out.extend(found.chars().map(|_| '*')),
        }
        true
    }
}

impl Stage {
    /// Adds a piece; `last` says that none follows. Holds at most `window`
    /// characters back: a match that begins before them is taken as it is.
    pub(super) fn push(&mut self, rule: &Rule, piece: &str, last: bool, window: usize) -> Passed {
        let mut passed = Passed::default();
        let all: Cow<'_, str> = match (self.before, self.held.is_empty()) {
            (None, true) => piece.into(),
            (before, _) => {
                let mut all = String::with_capacity(self.held.len() + piece.len() + 4);
                all.extend(before);
                all.push_str(&self.held);
                all.push_str(piece);
                all.into()
            }
        };
        let mut at = self.before.map_or(0, char::len_utf8);
        let end = all.len();
        let may_wait = if last { end } else { last_chars(&all, window) };
        loop {
            let found = rule.matcher.find(&all, at);
            let decided_by = found.as_ref().map_or(end, |found| {
                // The match itself may be one that more text changes.
                let first = slice(&all, found.clone()).chars().next();
                found.start + first.map_or(0, char::len_utf8)
            });
            let looked_at = may_wait.max(at)..decided_by.max(may_wait.max(at));
            let waits = match last {
                true => None,
                false => rule.matcher.undecided(&all, looked_at),
            };
            if let Some(place) = waits {
                passed.text.push_str(slice(&all, at..place));
                self.hold(&all, place);
                return passed;
            }
            let Some(found) = found else {
                passed.text.push_str(slice(&all, at..end));
                self.hold(&all, end);
                return passed;
            };
            passed.hits += 1;
            passed.text.push_str(slice(&all, at..found.start));
            if !rule.put(slice(&all, found.clone()), &mut passed.text) {
                passed.denied = true;
                self.hold(&all, end);
                return passed;
            }
            at = found.end;
        }
    }

    fn hold(&mut self, all: &str, place: usize) {
        self.before = slice(all, 0..place).chars().next_back();
        self.held = slice(all, place..all.len()).to_owned();
    }
}

/// Returns where the last so many characters begin.
fn last_chars(text: &str, count: usize) -> usize {
    match count.checked_sub(1) {
        None => text.len(),
        Some(skip) => text.char_indices().rev().nth(skip).map_or(0, |(at, _)| at),
    }
}

fn slice(text: &str, range: Range<usize>) -> &str {
    text.get(range).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn rule(action: Action, patterns: &[&str]) -> Rule {
        let patterns: Vec<String> = patterns.iter().map(|&one| one.to_owned()).collect();
        Rule {
            name: "r".to_owned(),
            action,
            matcher: Matcher::new(&patterns).unwrap(),
        }
    }

    /// Pushes the pieces, and returns all that went on, and whether it was
    /// denied.
    fn run(rule: &Rule, pieces: &[&str], window: usize) -> (String, bool) {
        let mut stage = Stage::default();
        let mut text = String::new();
        for piece in pieces {
            let passed = stage.push(rule, piece, false, window);
            text.push_str(&passed.text);
            if passed.denied {
                return (text, true);
            }
        }
        let passed = stage.push(rule, "", true, window);
        text.push_str(&passed.text);
        (text, passed.denied)
    }

    #[test]
    fn however_a_text_is_cut_it_becomes_the_same() {
        let text = "żółw secret 12-345, a secre, SECRET 12-3 seсret bass 😀secret";
        let rules = [
            rule(
                Action::Replace("[x]".to_owned()),
                &["secret", "[0-9]+-[0-9]+"],
            ),
            rule(Action::Mask, &["(?i)secret|12-345", r"(?-u:\b)ass(?-u:\b)"]),
            rule(Action::Deny, &["SECRET 12-3"]),
            rule(Action::Replace(String::new()), &["[a-z]+"]),
        ];
        for rule in &rules {
            let whole = rule.apply(text);
            let whole = (whole.text, whole.denied);
            for first in 0..=text.len() {
                for second in first..=text.len() {
                    let cut = [0, first, second, text.len()];
                    if !cut.iter().all(|&at| text.is_char_boundary(at)) {
                        continue;
                    }
                    let (before, end) = text.split_at(second);
                    let (begin, middle) = before.split_at(first);
                    let pieces = [begin, middle, end];
                    assert_eq!(run(rule, &pieces, 64), whole, "{pieces:?}");
                }
            }
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            assert_eq!(run(rule, &letters, 64), whole);
        }
    }

    #[test]
    fn what_cannot_be_a_match_is_not_held() {
        let rule = rule(Action::Deny, &["forbidden fruit"]);
        let mut stage = Stage::default();
        assert_eq!(
            stage.push(&rule, "an apple a day ", false, 64).text,
            "an apple a day "
        );
        assert_eq!(stage.push(&rule, "for", false, 64).text, "");
        assert_eq!(stage.push(&rule, "ever", false, 64).text, "forever");
        assert_eq!(stage.push(&rule, "forbidden", false, 64).text, "");
        let passed = stage.push(&rule, " fruit is sweet", false, 64);
        assert!(passed.denied);
        assert_eq!(passed.text, "");
    }

    #[test]
    fn no_more_than_the_window_is_held() {
        let rule = rule(Action::Mask, &["begin.*end"]);
        let mut stage = Stage::default();
        let mut out = String::new();
        for _ in 0..50 {
            out.push_str(&stage.push(&rule, "begin and on ", false, 32).text);
            assert!(stage.held.chars().count() <= 32);
        }
        assert!(out.starts_with("begin and on begin"));
        // One that fits is found nevertheless.
        let passed = stage.push(&rule, "\nbegin end\n", false, 32);
        assert!(passed.text.ends_with("\n*********\n"), "{}", passed.text);
    }

    #[test]
    fn one_huge_piece_takes_linear_time() {
        let rule = rule(Action::Mask, &["a.*z", "(?:a|aa)+b"]);
        let huge = "a".repeat(4 * 1024 * 1024);
        let passed = Stage::default().push(&rule, &huge, false, 256);
        assert_eq!(passed.text.len(), huge.len() - 256);
    }
}
