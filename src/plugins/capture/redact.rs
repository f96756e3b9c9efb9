//! What must not stand in a file: secrets and personal data, found by patterns.
//!
//! Every search is linear in the text (the `regex` crate does not backtrack).
//!
//! **Invariant:** this is a sieve, not a promise: what looks like nothing that
//! is known passes. Who must be sure opts out.

use std::{borrow::Cow, fmt};

use regex::{Regex, RegexBuilder};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::sharegpt::Rewrite;

/// The most memory of one compiled pattern.
const PATTERN_MAX: usize = 1 << 20;

/// What can be redacted without a pattern of one's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Kind {
    /// API keys, tokens and private keys, by how the well-known ones begin.
    Keys,
    /// E-mail addresses.
    Emails,
    /// Telephone numbers that are written as such: with +, brackets or gaps.
    Phones,
    /// Card numbers: 13 to 19 digits whose checksum (Luhn) is right.
    Cards,
}

/// Finds what is to be redacted.
pub(super) struct Redactor(Vec<Rule>);

struct Rule {
    find: Regex,
    /// Whether what was found is what is looked for.
    check: fn(&str) -> bool,
    replacement: &'static str,
}

impl Redactor {
    /// Makes one; `None` if nothing is to be redacted.
    ///
    /// # Errors
    /// A pattern that is none, or is too large: its place and why.
    pub(super) fn new(
        kinds: &[Kind],
        patterns: &[String],
    ) -> Result<Option<Self>, (usize, String)> {
        let mut rules = Vec::new();
        for (place, pattern) in patterns.iter().enumerate() {
            let built = RegexBuilder::new(pattern).size_limit(PATTERN_MAX).build();
            let find = built.map_err(|why| (place, why.to_string()))?;
            if find.is_match("") {
                let why = "it fits everywhere, since it fits nothing at all";
                return Err((place, why.to_owned()));
            }
            rules.push(Rule {
                find,
                check: |_| true,
                replacement: "[redacted]",
            });
        }
        // Cards before phones, of which some are written alike.
        for kind in [Kind::Keys, Kind::Emails, Kind::Cards, Kind::Phones] {
            if kinds.contains(&kind) {
                rules.push(Rule::of(kind));
            }
        }
        Ok((!rules.is_empty()).then_some(Self(rules)))
    }
}

impl Rewrite for Redactor {
    fn rewrite<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut changed = Cow::Borrowed(text);
        for rule in &self.0 {
            if let Some(other) = rule.apply(&changed) {
                changed = Cow::Owned(other);
            }
        }
        changed
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({})", self.0.len())
    }
}

impl Rule {
    fn of(kind: Kind) -> Self {
        let (pattern, check, replacement): (_, fn(&str) -> bool, _) = match kind {
            Kind::Keys => (KEYS, |_| true, "[key]"),
            Kind::Emails => (EMAILS, |_| true, "[email]"),
            Kind::Phones => (PHONES, is_phone, "[phone]"),
            Kind::Cards => (CARDS, |_| true, "[card]"),
        };
        Self {
            find: Regex::new(pattern).expect("the patterns of this file are valid"),
            check,
            replacement,
        }
    }

    /// Returns the text without what is found; `None` if nothing is.
    fn apply(&self, text: &str) -> Option<String> {
        let mut out = String::new();
        let mut from = 0;
        for found in self.find.find_iter(text) {
            let spans = match self.replacement {
                "[card]" => cards(found.as_str()),
                _ if (self.check)(found.as_str()) => vec![(0, found.len())],
                _ => Vec::new(),
            };
            for (start, end) in spans {
                let (start, end) = (found.start() + start, found.start() + end);
                out.push_str(text.get(from..start).unwrap_or_default());
                out.push_str(self.replacement);
                from = end;
            }
        }
        if from == 0 {
            return None;
        }
        out.push_str(text.get(from..).unwrap_or_default());
        Some(out)
    }
}

/// How keys of well-known makers begin, JSON web tokens, what stands behind
/// `Bearer`, and private keys in PEM.
const KEYS: &str = concat!(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]|-[A-Za-z0-9])*-----END [A-Z ]*PRIVATE KEY-----",
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}",
    r"|\bfb_[A-Za-z0-9_-]{43}",
    r"|\bgh[oprsu]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}|\bglpat-[A-Za-z0-9_-]{20,}",
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{35}",
    r"|\bhf_[A-Za-z0-9]{30,}|\bgsk_[A-Za-z0-9]{20,}|\bnvapi-[A-Za-z0-9_-]{20,}",
    r"|\btvly-[A-Za-z0-9_-]{16,}|\bnpm_[A-Za-z0-9]{30,}|\bdop_v1_[a-f0-9]{40,}",
    r"|\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    r"|\b[Bb]earer [A-Za-z0-9._~+/=-]{20,}",
);
const EMAILS: &str =
    r"[\p{L}\p{N}.!#$%&'*+/=?^_`{|}~-]+@[\p{L}\p{N}-]+(?:\.[\p{L}\p{N}-]+)*\.\p{L}{2,24}";
/// With + or 00 in front; with an area code in brackets; or in groups.
const PHONES: &str = concat!(
    r"(?:\+|\b00)[1-9](?:[ ./()-]{0,2}[0-9]){6,14}\b",
    r"|\([0-9]{2,5}\)[ ./-]?[0-9](?:[ ./-]?[0-9]){5,9}\b",
    r"|\b0[0-9]{1,4}[ /-][0-9](?:[ ./-]?[0-9]){4,9}\b",
    r"|\b[2-9][0-9]{2}[ .-][0-9]{3}[ .-][0-9]{4}\b",
);
/// A run of digits with single gaps, long enough for a card's number.
const CARDS: &str = r"[0-9](?:[ -]?[0-9]){12,}";

/// Phone numbers have 7 to 15 digits, and are no addresses of the internet.
fn is_phone(text: &str) -> bool {
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    (7..=15).contains(&digits) && text.parse::<std::net::Ipv4Addr>().is_err()
}

/// Returns where in a run of digits card numbers stand. They begin where the run
/// or a group of it does, and end where one does: any long number has a part
/// whose checksum is right.
fn cards(run: &str) -> Vec<(usize, usize)> {
    let digits: Vec<(usize, u8)> = run
        .bytes()
        .enumerate()
        .filter(|(_, byte)| byte.is_ascii_digit())
        .map(|(at, byte)| (at, byte - b'0'))
        .collect();
    let at = |index: usize| digits.get(index).map(|(at, _)| *at);
    let begins =
        |index: usize| index == 0 || at(index).zip(at(index - 1)).is_some_and(|(b, a)| b > a + 1);
    let mut found = Vec::new();
    let mut first = 0;
    while first < digits.len() {
        let longest = (13..=19).rev().find(|&length| {
            let numbers = digits.get(first..first + length);
            begins(first)
                && (first + length == digits.len() || begins(first + length))
                && numbers.is_some_and(luhn)
        });
        match longest {
            Some(length) => {
                let end = at(first + length - 1).map_or(run.len(), |at| at + 1);
                found.extend(at(first).map(|start| (start, end)));
                first += length;
            }
            None => first += 1,
        }
    }
    found
}

fn luhn(digits: &[(usize, u8)]) -> bool {
    let all_the_same = digits.windows(2).all(|two| match two {
        [(_, a), (_, b)] => a == b,
        _ => true,
    });
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(place, (_, digit))| match (place % 2, u32::from(*digit)) {
            (1, digit @ 5..) => digit * 2 - 9,
            (1, digit) => digit * 2,
            (_, digit) => digit,
        })
        .sum();
    sum.is_multiple_of(10) && !all_the_same
}

#[cfg(test)]
mod tests {
    use super::{
        Kind::{Cards, Emails, Keys, Phones},
        *,
    };

    fn redacted(kinds: &[Kind], text: &str) -> String {
        let redactor = Redactor::new(kinds, &[]).unwrap().unwrap();
        redactor.rewrite(text).into_owned()
    }

    #[test]
    fn what_is_looked_for_is_found() {
        for (kind, text, expected) in [
            (
                Emails,
                "write to a.b+c@mail.example.org.",
                "write to [email].",
            ),
            (Emails, "jürgen@exämple.de", "[email]"),
            (Emails, "a@b, @home, x@1", "a@b, @home, x@1"),
            (
                Keys,
                "key sk-proj-abcdefghijklmnop1234 end",
                "key [key] end",
            ),
            (
                Keys,
                "sk-short and risk-of-something-long-here",
                "sk-short and risk-of-something-long-here",
            ),
            (Keys, "AKIAIOSFODNN7EXAMPLE", "[key]"),
            (
                Keys,
                "Authorization: Bearer abcdefghijklmnopqrstuvwxyz",
                "Authorization: [key]",
            ),
            (
                Keys,
                "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n",
                "[key]\n",
            ),
            (Phones, "call +49 30 1234567 now", "call [phone] now"),
            (
                Phones,
                "(555) 123-4567 or 555-123-4567",
                "[phone] or [phone]",
            ),
            (Phones, "0170 1234567", "[phone]"),
            (
                Phones,
                "on 2024-01-01 12:00 at 192.168.100.200",
                "on 2024-01-01 12:00 at 192.168.100.200",
            ),
            (
                Phones,
                "1700000000 and 3.14159265358979",
                "1700000000 and 3.14159265358979",
            ),
            (Cards, "4111 1111 1111 1111!", "[card]!"),
            (Cards, "no 4111 1111 1111 1112", "no 4111 1111 1111 1112"),
            (Cards, "7 5500-0000-0000-0004", "7 [card]"),
            (Cards, "378282246310005", "[card]"),
            (Cards, "0000000000000000", "0000000000000000"),
            (Cards, "éé4111111111111111é", "éé[card]é"),
        ] {
            assert_eq!(redacted(&[kind], text), expected, "{kind:?}");
        }
        let all = [Keys, Emails, Phones, Cards];
        let text = "4111 1111 1111 1111, a@b.example";
        assert_eq!(redacted(&all, text), "[card], [email]");
    }

    #[test]
    fn patterns_of_ones_own_come_first() {
        let patterns = ["(?i)project \\w+".to_owned()];
        let redactor = Redactor::new(&[Emails], &patterns).unwrap().unwrap();
        let text = redactor.rewrite("Project Xanadu: a@b.example");
        assert_eq!(text, "[redacted]: [email]");
        assert!(matches!(redactor.rewrite("nothing"), Cow::Borrowed(_)));
        assert!(Redactor::new(&[], &[]).unwrap().is_none());
    }

    #[test]
    fn patterns_that_make_no_sense_are_refused() {
        for bad in ["(", "a*", "", "(?:a{1000}){1000}", "\\1"] {
            let patterns = ["ok".to_owned(), bad.to_owned()];
            let (place, why) = Redactor::new(&[], &patterns).unwrap_err();
            assert_eq!(place, 1, "{bad}: {why}");
        }
    }

    #[test]
    fn long_texts_take_time_in_proportion() {
        let all = [Keys, Emails, Phones, Cards];
        for hostile in [
            "a@",
            "1 ",
            "1",
            "+1 ",
            "-----BEGIN PRIVATE KEY-----",
            "a.",
            "eyJaaaaaaaa.",
        ] {
            let text = hostile.repeat(100_000 / hostile.len());
            redacted(&all, &text);
        }
    }
}
