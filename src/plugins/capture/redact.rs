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
    /// Where in what was found that is which is looked for.
    places: fn(&str) -> Vec<(usize, usize)>,
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
                places: all,
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
        let (pattern, places, replacement): (_, fn(&str) -> _, _) = match kind {
            Kind::Keys => (KEYS, keys, "[key]"),
            Kind::Emails => (EMAILS, all, "[email]"),
            Kind::Phones => (PHONES, phones, "[phone]"),
            Kind::Cards => (CARDS, cards, "[card]"),
        };
        Self {
            find: Regex::new(pattern).expect("the patterns of this file are valid"),
            places,
            replacement,
        }
    }

    /// Returns the text without what is found; `None` if nothing is.
    fn apply(&self, text: &str) -> Option<String> {
        let mut out = String::new();
        let mut from = 0;
        for found in self.find.find_iter(text) {
            for (start, end) in (self.places)(found.as_str()) {
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

/// All of what was found.
fn all(found: &str) -> Vec<(usize, usize)> {
    vec![(0, found.len())]
}

/// How keys of well-known makers begin, JSON web tokens, what stands behind
/// `Bearer`, and private keys in PEM. A letter of another script may stand right
/// before one, and so may `_`, as in `key_sk-…`; what is found has it in front.
const KEYS: &str = concat!(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]|-[A-Za-z0-9])*-----END [A-Z ]*PRIVATE KEY-----",
    r"|(?:(?-u:\b)|_)(?:",
    r"(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}",
    r"|fb_[A-Za-z0-9_-]{43}",
    r"|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}",
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}",
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?-u:\b)|AIza[0-9A-Za-z_-]{35}",
    r"|hf_[A-Za-z0-9]{30,}|gsk_[A-Za-z0-9]{20,}|nvapi-[A-Za-z0-9_-]{20,}",
    r"|tvly-[A-Za-z0-9_-]{16,}|npm_[A-Za-z0-9]{30,}|dop_v1_[a-f0-9]{40,}",
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    r"|(?i:bearer)[ \t]{1,8}[A-Za-z0-9._~+/=-]{20,}",
    r")",
);
const EMAILS: &str =
    r"[\p{L}\p{N}.!#$%&'*+/=?^_`{|}~-]+@[\p{L}\p{N}-]+(?:\.[\p{L}\p{N}-]+)*\.\p{L}{2,24}";
/// With + or 00 in front; with an area code in brackets; or in groups. A gap may
/// be one that does not break.
const PHONES: &str = concat!(
    r"(?:\+|(?-u:\b)00)[1-9](?:[ \x{a0}\x{202f}./()-]{0,2}[0-9]){6,14}(?-u:\b)",
    r"|\([0-9]{2,5}\)[ \x{a0}\x{202f}./-]?[0-9](?:[ \x{a0}\x{202f}./-]?[0-9]){5,9}(?-u:\b)",
    r"|(?-u:\b)0[0-9]{1,4}[ \x{a0}\x{202f}/-][0-9](?:[ \x{a0}\x{202f}./-]?[0-9]){4,9}(?-u:\b)",
    r"|(?-u:\b)[2-9][0-9]{2}[ \x{a0}\x{202f}.-][0-9]{3}[ \x{a0}\x{202f}.-][0-9]{4}(?-u:\b)",
);
/// A run of digits with gaps, long enough for a card's number: white space of any
/// kind, dots, hyphens and dashes, and what nobody sees.
const CARDS: &str = concat!(
    r"[0-9](?:[\s.\-\x{ad}\x{200b}-\x{200d}\x{2010}-\x{2015}\x{2060}\x{2212}\x{feff}]{0,3}[0-9])",
    r"{12,}",
);

/// What names begin with too is a key only if there is a digit in it.
fn keys(found: &str) -> Vec<(usize, usize)> {
    let key = found.strip_prefix('_').unwrap_or(found);
    let start = found.len() - key.len();
    let is_common = ["sk", "pk", "rk"].iter().any(|word| key.starts_with(word));
    let is_name = start > 0 && is_common && !key.bytes().any(|byte| byte.is_ascii_digit());
    if is_name {
        return Vec::new();
    }
    vec![(start, found.len())]
}

/// Phone numbers have 7 to 15 digits, and are no addresses of the internet.
fn phones(found: &str) -> Vec<(usize, usize)> {
    let digits = found.bytes().filter(u8::is_ascii_digit).count();
    let is_phone = (7..=15).contains(&digits) && found.parse::<std::net::Ipv4Addr>().is_err();
    if is_phone { all(found) } else { Vec::new() }
}

/// A digit of a run, and what stands before it.
#[derive(Clone, Copy)]
struct Digit {
    at: usize,
    value: u8,
    gap: Gap,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gap {
    None,
    Some,
    /// There is a dot in it.
    Dot,
    /// The end of a line, as between two parts of a message.
    Line,
}

impl Gap {
    fn of(text: &str) -> Self {
        if text.is_empty() {
            Self::None
        } else if text.contains(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']) {
            Self::Line
        } else if text.contains('.') {
            Self::Dot
        } else {
            Self::Some
        }
    }
}

/// Returns where in a run of digits card numbers stand. They begin where the run
/// or a group of it does, and end where one does: any long number has a part
/// whose checksum is right.
fn cards(run: &str) -> Vec<(usize, usize)> {
    let mut digits: Vec<Digit> = Vec::new();
    let mut end = 0;
    for (at, byte) in run.bytes().enumerate() {
        if byte.is_ascii_digit() {
            let gap = Gap::of(run.get(end..at).unwrap_or_default());
            let value = byte - b'0';
            digits.push(Digit { at, value, gap });
            end = at + 1;
        }
    }
    let begins = |index: usize| {
        let digit = digits.get(index);
        index == 0 || digit.is_none_or(|digit| digit.gap != Gap::None)
    };
    let mut found = Vec::new();
    let mut first = 0;
    while first < digits.len() {
        let longest = (13..=19).rev().find(|&length| {
            let numbers = digits.get(first..first + length);
            begins(first) && begins(first + length) && numbers.is_some_and(is_card)
        });
        let Some(length) = longest else {
            first += 1;
            continue;
        };
        let last = digits.get(first + length - 1);
        let place = digits.get(first).zip(last);
        found.extend(place.map(|(first, last)| (first.at, last.at + 1)));
        first += length;
    }
    found
}

/// Where the gaps are unusual for a card, more has to be right than the checksum:
/// of ten numbers one has it.
fn is_card(digits: &[Digit]) -> bool {
    let inside = digits.get(1..).unwrap_or_default();
    let lines = inside.iter().filter(|digit| digit.gap == Gap::Line);
    let may_be = match lines.count() {
        0 => true,
        1 => is_issued(digits),
        _ => false,
    };
    let has_dots = inside.iter().any(|digit| digit.gap == Gap::Dot);
    may_be && (!has_dots || is_grouped(digits)) && luhn(digits)
}

/// Returns whether a number begins as those of the known issuers, and is as long.
fn is_issued(digits: &[Digit]) -> bool {
    let start = digits.iter().take(4);
    let start = start.fold(0, |number, digit| number * 10 + u32::from(digit.value));
    let lengths = match start {
        4000..=4999 => 16..=16,
        5100..=5599 | 2200..=2204 | 2221..=2720 => 16..=16,
        3400..=3499 | 3700..=3799 => 15..=15,
        3000..=3099 | 3600..=3699 | 3800..=3999 => 14..=14,
        3500..=3599 | 5000..=5099 | 5600..=5899 | 6000..=6999 => 16..=19,
        _ => return false,
    };
    lengths.contains(&digits.len())
}

/// Returns whether the digits are in groups as on a card: of 4 to 6, the last of 3
/// at least. Dots stand in fractions and between thousands too.
fn is_grouped(digits: &[Digit]) -> bool {
    let inside = digits.get(1..).unwrap_or_default();
    let mut groups = inside.split(|digit| digit.gap != Gap::None).rev();
    // The first digit of each group is not in it.
    let last = groups.next().map_or(0, <[Digit]>::len) + 1;
    (3..=6).contains(&last) && groups.all(|group| (4..=6).contains(&(group.len() + 1)))
}

fn luhn(digits: &[Digit]) -> bool {
    let all_the_same = digits.windows(2).all(|two| match two {
        [a, b] => a.value == b.value,
        _ => true,
    });
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(place, digit)| match (place % 2, u32::from(digit.value)) {
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
            (Cards, "4111.1111.1111.1111.", "[card]."),
            (Cards, "3782.822463.10005", "[card]"),
            (Cards, "4111\u{a0}1111\u{202f}1111\u{2011}1111", "[card]"),
            (Cards, "4111 - 1111 - 1111 - 1111", "[card]"),
            (Cards, "4111\u{200b}111111111111", "[card]"),
            // Over two parts of a message.
            (Cards, "it is 4111 1111\n1111 1111", "it is [card]"),
            (Cards, "41111111\n11111111", "[card]"),
            // A column of numbers is none, whatever its checksum.
            (Cards, "4111\n1111\n1111\n1111", "4111\n1111\n1111\n1111"),
            (Cards, "10000003\n10000003", "10000003\n10000003"),
            // Neither are thousands and fractions.
            (Cards, "4.111.111.111.111.111", "4.111.111.111.111.111"),
            (Cards, "41111111111.11111", "41111111111.11111"),
            (Keys, "key_sk-abcdefghijklmnop1234", "key_[key]"),
            (Keys, "my_ghp_abcdefghijklmnopqrstuvwxyz0123", "my_[key]"),
            (
                Keys,
                "the_pk_constraint_of_my_table",
                "the_pk_constraint_of_my_table",
            ),
            (Keys, "密钥sk-abcdefghijklmnop1234", "密钥[key]"),
            (Keys, "BEARER abcdefghijklmnopqrstuvwxyz", "[key]"),
            (Keys, "bEaReR\tabcdefghijklmnopqrstuvwxyz", "[key]"),
            (Keys, "a bearer of bad news", "a bearer of bad news"),
            (
                Phones,
                "call +49\u{a0}30\u{202f}1234567现在",
                "call [phone]现在",
            ),
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
            "1234.",
            "1\n",
            "4111\u{a0}",
            "_sk-",
            "bearer ",
        ] {
            let text = hostile.repeat(100_000 / hostile.len());
            redacted(&all, &text);
        }
    }
}
