//! The pass over the bytes that [`super::scan`] makes.

use std::{
    hash::{BuildHasher, RandomState},
    sync::OnceLock,
};

use super::{JsonError, Kind, MEMBERS_MAX, Member, Problem, Span, text};

/// Objects up to this many keys are compared pair by pair; beyond, by a keyed
/// hash and a sort, which no choice of keys can make quadratic.
const PAIRWISE_KEYS: usize = 16;

/// Returns the members of the one object that `bytes`, which are UTF-8, must be.
pub(super) fn members(bytes: &[u8], max_depth: usize) -> Result<Vec<Member>, JsonError> {
    let mut scanner = Scanner {
        bytes,
        at: 0,
        open: Vec::with_capacity(16),
        keys: Vec::with_capacity(32),
        unescaped: Vec::new(),
        members: Vec::with_capacity(16),
        max_depth,
        error: None,
    };
    match (scanner.body(), scanner.error) {
        (Some(()), None) => Ok(scanner.members),
        (_, error) => Err(error.expect("whoever stops says why")),
    }
}

/// A container that is not closed yet.
#[derive(Clone, Copy)]
struct Open {
    is_object: bool,
    /// Where its keys begin among the scanner's keys.
    first_key: usize,
}

/// A key of an object that is not closed yet. 32 bits, since a hostile body has
/// a key for every few bytes.
#[derive(Clone, Copy)]
struct Key {
    /// Where it stands in the body, with its quotes.
    at: u32,
    /// Its text in the body; or, from the body's length on, in `unescaped`.
    start: u32,
    end: u32,
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    open: Vec<Open>,
    keys: Vec<Key>,
    unescaped: Vec<u8>,
    members: Vec<Member>,
    max_depth: usize,
    /// Why it stopped. The steps below answer `None` then: a `Result` with the
    /// whole error in it would be written to memory at every step.
    error: Option<JsonError>,
}

impl Scanner<'_> {
    fn body(&mut self) -> Option<()> {
        if self.bytes.starts_with(b"\xef\xbb\xbf") {
            return self.syntax("it begins with a byte order mark");
        }
        // Key offsets are 32 bits, and the unescaped ones come after the body.
        if u32::try_from(self.bytes.len().saturating_mul(2)).is_err() {
            return self.syntax("it is longer than 2 GiB");
        }
        self.space();
        if self.peek() != Some(b'{') {
            return self.fail(self.at, Problem::NotAnObject);
        }
        loop {
            if self.value()? {
                self.closing()?;
            }
            if self.open.is_empty() {
                break;
            }
        }
        self.space();
        match self.peek() {
            None => Some(()),
            Some(_) => self.syntax("something follows the object"),
        }
    }

    /// Reads a scalar or an empty container whole, or opens a container and
    /// stops before its first value. Says whether a value came to its end.
    fn value(&mut self) -> Option<bool> {
        let start = self.at;
        match self.peek() {
            Some(b'"') => {
                self.note(start, Kind::String);
                self.string()?;
                Some(true)
            }
            Some(b'-' | b'0'..=b'9') => {
                let kind = self.number()?;
                self.note(start, kind);
                Some(true)
            }
            Some(b'{') => {
                self.note(start, Kind::Object);
                self.enter(true)?;
                if self.peek() == Some(b'}') {
                    self.at += 1;
                    self.open.pop();
                    return Some(true);
                }
                self.key()?;
                Some(false)
            }
            Some(b'[') => {
                self.note(start, Kind::Array);
                self.enter(false)?;
                if self.peek() == Some(b']') {
                    self.at += 1;
                    self.open.pop();
                    return Some(true);
                }
                Some(false)
            }
            Some(b't') => self.word(b"true", Kind::Bool),
            Some(b'f') => self.word(b"false", Kind::Bool),
            Some(b'n') => self.word(b"null", Kind::Null),
            Some(_) => self.syntax("a value is expected"),
            None => self.syntax("it ends too early"),
        }
    }

    /// Goes on after a value: closes what ends here, and stops before the next
    /// value, or when nothing is open.
    fn closing(&mut self) -> Option<()> {
        loop {
            if self.open.len() == 1
                && let Some(member) = self.members.last_mut()
            {
                member.value.end = self.at;
            }
            let Some(&Open {
                is_object,
                first_key,
            }) = self.open.last()
            else {
                return Some(());
            };
            self.space();
            match (self.peek(), is_object) {
                (Some(b','), true) => {
                    self.at += 1;
                    self.space();
                    return self.key();
                }
                (Some(b','), false) => {
                    self.at += 1;
                    self.space();
                    return Some(());
                }
                (Some(b'}'), true) => {
                    self.refuse_duplicates(first_key)?;
                    self.keys.truncate(first_key);
                }
                (Some(b']'), false) => {}
                (None, _) => return self.syntax("it ends too early"),
                (_, true) => return self.syntax("a comma or } is expected"),
                (_, false) => return self.syntax("a comma or ] is expected"),
            }
            self.at += 1;
            self.open.pop();
        }
    }

    /// Opens a container and skips the white space behind its bracket.
    fn enter(&mut self, is_object: bool) -> Option<()> {
        if self.open.len() >= self.max_depth {
            return self.fail(self.at, Problem::TooDeep(self.max_depth));
        }
        self.open.push(Open {
            is_object,
            first_key: self.keys.len(),
        });
        self.at += 1;
        self.space();
        Some(())
    }

    /// Writes down what is needed of a member's value and of its items.
    #[inline]
    fn note(&mut self, start: usize, kind: Kind) {
        match self.open.len() {
            1 => {
                if let Some(member) = self.members.last_mut() {
                    member.kind = kind;
                    member.value.start = start;
                }
            }
            2 => {
                if let (
                    Some(Open {
                        is_object: false, ..
                    }),
                    Some(member),
                ) = (self.open.last(), self.members.last_mut())
                {
                    member.items += 1;
                    member.item_kinds.insert(kind);
                }
            }
            _ => {}
        }
    }

    /// Reads a key and its colon, and stops before the value.
    fn key(&mut self) -> Option<()> {
        let at = self.at;
        if self.peek() != Some(b'"') {
            return self.syntax("a key in double quotes is expected");
        }
        let escaped = self.string()?;
        let key = Span {
            start: at,
            end: self.at,
        };
        let mut unescaped = None;
        let (start, end) = if escaped {
            let name = text(key.of(self.bytes)).unwrap_or_default();
            let start = self.bytes.len() + self.unescaped.len();
            self.unescaped.extend_from_slice(name.as_bytes());
            if self.open.len() == 1 {
                unescaped = Some(name.into());
            }
            (start, self.bytes.len() + self.unescaped.len())
        } else {
            (key.start + 1, key.end - 1)
        };
        self.keys.push(Key {
            at: short(at),
            start: short(start),
            end: short(end),
        });
        if self.open.len() == 1 {
            if self.members.len() >= MEMBERS_MAX {
                return self.fail(at, Problem::TooManyMembers);
            }
            self.members.push(Member {
                key,
                unescaped,
                ..Member::default()
            });
        }
        self.space();
        if self.peek() != Some(b':') {
            return self.syntax("a colon is expected");
        }
        self.at += 1;
        self.space();
        Some(())
    }

    fn key_text(&self, key: Key) -> &[u8] {
        let (start, end) = (key.start as usize, key.end as usize);
        match start.checked_sub(self.bytes.len()) {
            None => self.bytes.get(start..end),
            Some(start) => self.unescaped.get(start..end - self.bytes.len()),
        }
        .unwrap_or_default()
    }

    #[inline]
    fn refuse_duplicates(&mut self, first_key: usize) -> Option<()> {
        let keys = self.keys.get(first_key..).unwrap_or_default();
        let duplicate = if keys.len() <= PAIRWISE_KEYS {
            self.duplicate_by_pairs(keys)
        } else {
            self.duplicate_by_hash(keys)
        };
        match duplicate {
            None => Some(()),
            Some(key) => {
                let name = String::from_utf8_lossy(self.key_text(key));
                let name = name.chars().take(64).collect();
                self.fail(key.at as usize, Problem::DuplicateKey(name))
            }
        }
    }

    #[inline]
    fn duplicate_by_pairs(&self, keys: &[Key]) -> Option<Key> {
        keys.iter().enumerate().skip(1).find_map(|(i, &key)| {
            let twin = keys.iter().take(i).any(|&earlier| {
                key.end - key.start == earlier.end - earlier.start
                    && self.key_text(key) == self.key_text(earlier)
            });
            twin.then_some(key)
        })
    }

    fn duplicate_by_hash(&self, keys: &[Key]) -> Option<Key> {
        const HASH: u64 = !0 << 32; // there are fewer than 2^32 keys
        // Random per process: nobody can prepare keys that collide.
        static SEED: OnceLock<RandomState> = OnceLock::new();
        let seed = SEED.get_or_init(RandomState::new);
        // Half a hash and the key's number in one word: quick to sort. Keys that
        // share the half by chance are few, and are compared.
        let mut hashed: Vec<u64> = (0_u64..)
            .zip(keys)
            .map(|(i, &key)| seed.hash_one(self.key_text(key)) & HASH | i)
            .collect();
        hashed.sort_unstable();
        hashed
            .chunk_by(|a, b| a & HASH == b & HASH)
            .filter(|run| run.len() > 1)
            .find_map(|run| {
                let run: Vec<Key> = run
                    .iter()
                    .filter_map(|word| keys.get(usize::try_from(word & !HASH).ok()?))
                    .copied()
                    .collect();
                self.duplicate_by_pairs(&run)
            })
    }

    /// Reads a string; says whether it has escapes.
    fn string(&mut self) -> Option<bool> {
        let start = self.at;
        let mut escaped = false;
        self.at += 1;
        loop {
            self.at = plain_end(self.bytes, self.at);
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Some(escaped);
                }
                Some(b'\\') => {
                    escaped = true;
                    self.escape()?;
                }
                Some(_) => return self.syntax("a control character stands in a string"),
                None => {
                    self.at = start;
                    return self.syntax("a string has no end");
                }
            }
        }
    }

    #[inline]
    fn escape(&mut self) -> Option<()> {
        match self.bytes.get(self.at + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 2;
                Some(())
            }
            Some(b'u') => self.unicode_escape(),
            _ => self.syntax("an escape is not one of JSON's"),
        }
    }

    fn unicode_escape(&mut self) -> Option<()> {
        const ALONE: &str = "half of a surrogate pair stands alone";
        match self.code_unit(self.at)? {
            0xd800..=0xdbff => {
                let low = self.at + 6;
                if self.bytes.get(low..low + 2) != Some(b"\\u")
                    || !matches!(self.code_unit(low)?, 0xdc00..=0xdfff)
                {
                    return self.syntax(ALONE);
                }
                self.at += 12;
            }
            0xdc00..=0xdfff => return self.syntax(ALONE),
            _ => self.at += 6,
        }
        Some(())
    }

    /// Returns the code unit of the `\uXXXX` at `at`.
    fn code_unit(&mut self, at: usize) -> Option<u32> {
        let digits = self.bytes.get(at + 2..at + 6).unwrap_or_default();
        let unit = digits.iter().try_fold(0, |unit, &digit| {
            let digit = char::from(digit).to_digit(16)?;
            Some(unit << 4 | digit)
        });
        match unit {
            Some(unit) if digits.len() == 4 => Some(unit),
            _ => self.syntax("\\u needs four hexadecimal digits"),
        }
    }

    fn number(&mut self) -> Option<Kind> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        let whole = self.at - start;
        let mut kind = Kind::Int;
        if self.peek() == Some(b'.') {
            kind = Kind::Float;
            self.at += 1;
            self.digits()?;
        }
        let mut exponent = false;
        if let Some(b'e' | b'E') = self.peek() {
            kind = Kind::Float;
            exponent = true;
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        // Without an exponent, fewer than 300 digits always fit a double.
        if kind == Kind::Float && (exponent || whole >= 300) {
            let digits = self.bytes.get(start..self.at).unwrap_or_default();
            let fits = std::str::from_utf8(digits)
                .ok()
                .and_then(|digits| digits.parse::<f64>().ok())
                .is_some_and(f64::is_finite);
            if !fits {
                self.at = start;
                return self.syntax("a number is out of range");
            }
        }
        Some(kind)
    }

    #[inline]
    fn digits(&mut self) -> Option<()> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if count == 0 {
            return self.syntax("a digit is expected");
        }
        self.at += count;
        Some(())
    }

    fn word(&mut self, word: &'static [u8], kind: Kind) -> Option<bool> {
        if self.bytes.get(self.at..self.at + word.len()) != Some(word) {
            return self.syntax("a value is expected");
        }
        self.note(self.at, kind);
        self.at += word.len();
        Some(true)
    }

    #[inline]
    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    #[cold]
    fn syntax<T>(&mut self, why: &'static str) -> Option<T> {
        self.fail(self.at, Problem::Syntax(why))
    }

    #[cold]
    fn fail<T>(&mut self, offset: usize, problem: Problem) -> Option<T> {
        self.error = Some(JsonError { offset, problem });
        None
    }
}

/// Returns an offset that is known to fit: [`Scanner::body`] has checked.
fn short(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

/// Returns the offset of the first quote, backslash or control character at or
/// after `at`; the length if there is none.
#[inline]
fn plain_end(bytes: &[u8], at: usize) -> usize {
    let mut rest = bytes.get(at..).unwrap_or_default();
    // Most strings are short: words first, and blocks only for long ones.
    for _ in 0..4 {
        let Some((word, tail)) = rest.split_first_chunk::<8>() else {
            break;
        };
        let hits = special_bytes(u64::from_le_bytes(*word));
        if hits != 0 {
            return bytes.len() - rest.len() + (hits.trailing_zeros() / 8) as usize;
        }
        rest = tail;
    }
    if rest.len() >= 32 {
        rest = skip_plain_blocks(rest);
    }
    while let Some((word, tail)) = rest.split_first_chunk::<8>() {
        let hits = special_bytes(u64::from_le_bytes(*word));
        if hits != 0 {
            return bytes.len() - rest.len() + (hits.trailing_zeros() / 8) as usize;
        }
        rest = tail;
    }
    let plain = rest
        .iter()
        .take_while(|&&byte| byte != b'"' && byte != b'\\' && byte >= 0x20)
        .count();
    bytes.len() - rest.len() + plain
}

/// Skips blocks without anything special. The test has no branch, so that it
/// becomes vector instructions.
fn skip_plain_blocks(mut rest: &[u8]) -> &[u8] {
    while let Some((block, tail)) = rest.split_first_chunk::<64>() {
        let special = block.iter().fold(0_u8, |any, &byte| {
            any | u8::from(byte == b'"') | u8::from(byte == b'\\') | u8::from(byte < 0x20)
        });
        if special != 0 {
            break;
        }
        rest = tail;
    }
    rest
}

/// Sets the high bit of the first byte that is a quote, a backslash or a
/// control character; bits above it mean nothing (the borrow runs upwards).
#[inline]
const fn special_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::from_le_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_le_bytes([0x80; 8]);
    let quote = word ^ (ONES * b'"' as u64);
    let backslash = word ^ (ONES * b'\\' as u64);
    ((word.wrapping_sub(ONES * 0x20) & !word)
        | (quote.wrapping_sub(ONES) & !quote)
        | (backslash.wrapping_sub(ONES) & !backslash))
        & HIGH
}
