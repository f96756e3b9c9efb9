//! What is wrong with a configuration: where, and what was expected.
//!
//! **Invariant:** a message never holds a secret. Where one may stand (keys,
//! headers, URLs), the text that was found is not repeated.

use std::{collections::BTreeSet, fmt};

/// One thing that is wrong, or (as a warning) questionable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, as it was named to Forebay.
    pub file: String,
    /// The line, from 1; 0 if the problem is with the file as a whole.
    pub line: usize,
    /// The column, from 1; 0 if the problem is with the file as a whole.
    pub column: usize,
    /// The YAML path, such as `groups.gpus.upstreams[1].url`; empty for the
    /// document itself.
    pub path: String,
    /// What was expected and what was found: one line.
    pub message: String,
}

impl Problem {
    /// Makes a problem with a file as a whole, such as one that is missing.
    pub fn of_file(file: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            line: 0,
            column: 0,
            path: String::new(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file)?;
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        if !self.path.is_empty() {
            write!(f, " {}:", self.path)?;
        }
        write!(f, " {}", self.message)
    }
}

/// Everything that is wrong with a file, in the order of its lines; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// Returns the problems in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl fmt::Display for Problems {
    /// One a line, with no line break after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            fmt::Display::fmt(problem, f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A place in the text; line and column from 1, the column in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mark {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

/// Collects what the passes find, and remembers where, so that a later pass
/// does not tell again what an earlier one told.
#[derive(Debug)]
pub(crate) struct Report {
    file: String,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    told: BTreeSet<String>,
}

impl Report {
    pub(crate) fn new(file: &str) -> Self {
        Self {
            file: file.to_owned(),
            problems: Vec::new(),
            warnings: Vec::new(),
            told: BTreeSet::new(),
        }
    }

    /// Adds a problem; what stands at `path` counts as told.
    pub(crate) fn problem(&mut self, mark: Mark, path: &str, message: impl Into<String>) {
        self.told.insert(path.to_owned());
        self.aside(mark, path, message);
    }

    /// Adds a problem that leaves a usable value at `path`, such as the second
    /// of two equal keys.
    pub(crate) fn aside(&mut self, mark: Mark, path: &str, message: impl Into<String>) {
        let problem = self.at(mark, path, message.into());
        self.problems.push(problem);
    }

    pub(crate) fn warning(&mut self, mark: Mark, path: &str, message: impl Into<String>) {
        let warning = self.at(mark, path, message.into());
        self.warnings.push(warning);
    }

    /// Returns whether a problem was told at `path`, around it or within it.
    pub(crate) fn knows(&self, path: &str) -> bool {
        let within = self
            .told
            .range(path.to_owned()..)
            .take_while(|told| told.starts_with(path))
            .any(|told| told == path || is_below(told, path));
        within || self.knows_around(path)
    }

    fn knows_around(&self, path: &str) -> bool {
        // The document itself, whose path is empty, is around everything.
        let mut around = path;
        while !around.is_empty() {
            if self.told.contains(around) {
                return true;
            }
            let end = around.rfind(['.', '[']).unwrap_or(0);
            around = around.get(..end).unwrap_or("");
        }
        self.told.contains("")
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// Returns the warnings of a clean report, or else its problems.
    pub(crate) fn finish(mut self) -> Result<Vec<Problem>, Problems> {
        let order = |p: &Problem| (p.line, p.column);
        if self.problems.is_empty() {
            self.warnings.sort_by_key(order);
            Ok(self.warnings)
        } else {
            self.problems.sort_by_key(order);
            Err(Problems(self.problems))
        }
    }

    fn at(&self, mark: Mark, path: &str, message: String) -> Problem {
        Problem {
            file: self.file.clone(),
            line: mark.line,
            column: mark.column,
            path: path.to_owned(),
            message,
        }
    }
}

fn is_below(path: &str, around: &str) -> bool {
    path.strip_prefix(around)
        .is_some_and(|rest| rest.starts_with(['.', '[']))
}

/// Returns the path of a key below `parent`: `parent.key`, or `parent["odd key"]`
/// where a dot would mislead.
pub(crate) fn key_path(parent: &str, key: &str) -> String {
    let plain = !key.is_empty()
        && key
            .chars()
            .all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'));
    match (plain, parent.is_empty()) {
        (true, true) => key.to_owned(),
        (true, false) => format!("{parent}.{key}"),
        (false, _) => format!("{parent}[{}]", shown(key)),
    }
}

/// Returns the path of an element of the list at `parent`.
pub(crate) fn index_path(parent: &str, index: usize) -> String {
    format!("{parent}[{index}]")
}

/// Returns a text of the file in quotes, on one line and not too long.
pub(crate) fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 60;
    if text.chars().count() <= CHARS_MAX {
        return format!("{text:?}");
    }
    let head: String = text.chars().take(CHARS_MAX).collect();
    format!("{:?}…", head)
}

/// Returns ` (did you mean x?)` for the candidate that `word` most likely is a
/// misspelling of, or nothing.
pub(crate) fn did_you_mean<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> String {
    match nearest(word, candidates) {
        Some(near) => format!(" (did you mean {near}?)"),
        None => String::new(),
    }
}

/// Returns the candidate that differs from `word` by so little that it is a
/// likely misspelling: case and separators aside, one change per three letters.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // The distance takes time for each pair of letters; no key is that long.
    if word.len() > 64 {
        return None;
    }
    let plain = |text: &str| -> Vec<char> {
        text.chars()
            .filter(|c| !matches!(c, '_' | '-' | ' '))
            .flat_map(char::to_lowercase)
            .collect()
    };
    let letters = plain(word);
    let allowed = (letters.len() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (distance(&letters, &plain(candidate)), candidate))
        .filter(|(distance, candidate)| *distance <= allowed && *distance < candidate.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Returns how many letters have to be put in, taken out, replaced or swapped
/// with their neighbour (the optimal string alignment distance).
fn distance(a: &[char], b: &[char]) -> usize {
    // Three rows of the usual table, over `b`: two before the current one.
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    let mut previous_a = None;
    for (i, x) in a.iter().enumerate() {
        let mut row = Vec::with_capacity(b.len() + 1);
        row.push(i + 1);
        let mut previous_b = None;
        for (j, y) in b.iter().enumerate() {
            let cell = |row: &[usize], at: usize| row.get(at).copied().unwrap_or(usize::MAX);
            let replaced = cell(&last, j) + usize::from(x != y);
            let mut best = replaced.min(cell(&last, j + 1) + 1).min(cell(&row, j) + 1);
            if j > 0 && previous_a == Some(y) && previous_b == Some(x) {
                best = best.min(cell(&before, j - 1).saturating_add(1));
            }
            row.push(best);
            previous_b = Some(y);
        }
        before = std::mem::replace(&mut last, row);
        previous_a = Some(x);
    }
    last.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_reads_like_a_compiler_message() {
        let problem = Problem {
            file: "forebay.yaml".to_owned(),
            line: 12,
            column: 9,
            path: "groups.gpus.upstreams[1].url".to_owned(),
            message: "expected a URL, found nothing".to_owned(),
        };
        assert_eq!(
            problem.to_string(),
            "forebay.yaml:12:9: groups.gpus.upstreams[1].url: expected a URL, found nothing"
        );
        assert_eq!(
            Problem::of_file("forebay.yaml", "no such file").to_string(),
            "forebay.yaml: no such file"
        );
    }

    #[test]
    fn problems_come_in_the_order_of_their_lines() {
        let mut report = Report::new("f");
        for line in [7, 2, 5] {
            report.problem(Mark { line, column: 1 }, "", "wrong");
        }
        let lines: Vec<_> = report
            .finish()
            .unwrap_err()
            .iter()
            .map(|p| p.line)
            .collect();
        assert_eq!(lines, [2, 5, 7]);
    }

    #[test]
    fn what_was_told_is_known_around_and_within() {
        let mut report = Report::new("f");
        report.problem(Mark::default(), "groups.gpus.upstreams[1]", "wrong");
        for path in [
            "groups",
            "groups.gpus.upstreams",
            "groups.gpus.upstreams[1]",
            "groups.gpus.upstreams[1].url",
        ] {
            assert!(report.knows(path), "{path}");
        }
        for path in ["groups.gpus.upstreams[10]", "groups.gp", "routes"] {
            assert!(!report.knows(path), "{path}");
        }
    }

    #[test]
    fn a_likely_misspelling_is_recognised_and_a_wild_guess_is_not_made() {
        let keys = ["upstreams", "url", "key", "max_tokens", "weight"];
        for (word, near) in [
            ("upstream", Some("upstreams")),
            ("maxTokens", Some("max_tokens")),
            ("max-tokens", Some("max_tokens")),
            ("wieght", Some("weight")),
            ("ulr", Some("url")),
            ("Key", Some("key")),
            ("colour", None),
            ("x", None),
        ] {
            assert_eq!(nearest(word, keys), near, "{word}");
        }
    }

    #[test]
    fn an_odd_key_is_quoted_in_a_path() {
        assert_eq!(key_path("", "routes"), "routes");
        assert_eq!(key_path("a", "b"), "a.b");
        assert_eq!(key_path("aliases", "gpt-4.1"), "aliases[\"gpt-4.1\"]");
    }
}
