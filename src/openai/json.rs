//! One strict pass over a request body: whether it is JSON that every reader
//! understands alike, and where its top-level members stand.
//!
//! The gateway decides by what it reads, the upstream by what *it* reads; where
//! two JSON readers can differ, a client could show each another request. So
//! everything that is read differently somewhere is refused: duplicate keys at
//! any depth (also when one is spelled with escapes), lone surrogates, numbers
//! past a double's range, a byte order mark. Integers of any length are fine:
//! those that are not read travel as they came.
//!
//! **Invariant:** nothing here recurses, and nothing grows faster than the body.
//! Start at [`scan`].

use std::{
    borrow::Cow,
    fmt,
    hash::{BuildHasher, RandomState},
    sync::OnceLock,
};

use crate::error::Error;

/// Objects up to this many keys are compared pair by pair; beyond, by a keyed
/// hash and a sort, which no choice of keys can make quadratic.
const PAIRWISE_KEYS: usize = 16;

/// The most members of the body itself, for each of which more is remembered
/// than a hostile body spends on it. Objects inside it may have any number.
const MEMBERS_MAX: usize = 1024;

/// Where a piece of text stands: byte offsets, the end exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The first byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Span {
    /// Returns the text; empty if `bytes` is not what the span was made of.
    pub fn of(self, bytes: &[u8]) -> &[u8] {
        bytes.get(self.start..self.end).unwrap_or_default()
    }
}

/// What sort of value it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// `null`
    #[default]
    Null,
    /// `true` or `false`
    Bool,
    /// A number without fraction and exponent, of any length.
    Int,
    /// Any other number.
    Float,
    /// A string.
    String,
    /// An array.
    Array,
    /// An object.
    Object,
}

/// The kinds that occur among the items of an array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kinds(u8);

impl Kinds {
    /// Says whether every item is of this kind; true of an empty array.
    pub fn only(self, kind: Kind) -> bool {
        self.0 & !Self::bit(kind) == 0
    }

    fn insert(&mut self, kind: Kind) {
        self.0 |= Self::bit(kind);
    }

    const fn bit(kind: Kind) -> u8 {
        1 << kind as u8
    }
}

/// One member of the top-level object.
#[derive(Clone, Debug, Default)]
pub struct Member {
    /// The key, with its quotes.
    pub key: Span,
    /// The value, without white space around it.
    pub value: Span,
    /// What the value is.
    pub kind: Kind,
    /// How many items the value has, if it is an array.
    pub items: usize,
    /// What these items are.
    pub item_kinds: Kinds,
    /// The key without its escapes, if it has any.
    unescaped: Option<Box<str>>,
}

impl Member {
    /// Returns the key as it is meant, without quotes and escapes.
    pub fn name<'a>(&'a self, bytes: &'a [u8]) -> &'a [u8] {
        match &self.unescaped {
            Some(name) => name.as_bytes(),
            None => bytes
                .get(self.key.start.saturating_add(1)..self.key.end.saturating_sub(1))
                .unwrap_or_default(),
        }
    }
}

/// The members of a body that is one JSON object.
#[derive(Clone, Debug, Default)]
pub struct Object {
    /// In the order of the body; the names are distinct.
    pub members: Vec<Member>,
}

impl Object {
    /// Finds a member by its name; `bytes` is the body that was scanned.
    pub fn find(&self, bytes: &[u8], name: &str) -> Option<&Member> {
        self.members
            .iter()
            .find(|member| member.name(bytes) == name.as_bytes())
    }
}

/// Why a body is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// The byte of the body where it shows.
    pub offset: usize,
    /// What is wrong there.
    pub problem: Problem,
}

/// What is wrong with a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It is not UTF-8.
    NotUtf8,
    /// It is something other than one object.
    NotAnObject,
    /// It is nested deeper than this many levels.
    TooDeep(usize),
    /// It has more than 1,024 members of its own.
    TooManyMembers,
    /// This key stands twice in one object.
    DuplicateKey(String),
    /// It breaks JSON's grammar, or is grammatical and yet ambiguous.
    Syntax(&'static str),
}

impl JsonError {
    /// Returns the `code` of the client's error.
    pub const fn code(&self) -> &'static str {
        match self.problem {
            Problem::NotUtf8 => "invalid_utf8",
            Problem::NotAnObject | Problem::TooManyMembers | Problem::Syntax(_) => "invalid_json",
            Problem::TooDeep(_) => "json_too_deep",
            Problem::DuplicateKey(_) => "duplicate_key",
        }
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.offset;
        match &self.problem {
            Problem::NotUtf8 => write!(f, "the body is not valid UTF-8 at byte {at}"),
            Problem::NotAnObject => {
                write!(f, "the body is not a JSON object: byte {at} is not {{")
            }
            Problem::TooDeep(max) => write!(
                f,
                "the body is nested too deeply at byte {at}: at most {max} levels"
            ),
            Problem::TooManyMembers => write!(
                f,
                "the body has more than {MEMBERS_MAX} members, the next at byte {at}"
            ),
            Problem::DuplicateKey(key) => write!(
                f,
                "the body has the key {key:?} twice in one object, again at byte {at}"
            ),
            Problem::Syntax(why) => {
                write!(f, "the body is not valid JSON at byte {at}: {why}")
            }
        }
    }
}

impl std::error::Error for JsonError {}

impl From<JsonError> for Error {
    fn from(error: JsonError) -> Self {
        Self::invalid(error.code(), error.to_string())
    }
}

/// Checks that `bytes` is exactly one JSON object, nested at most `max_depth`
/// levels (the object itself is the first), and finds its members.
///
/// # Errors
/// The first problem that was met; duplicate keys are seen at the end of their
/// object.
pub fn scan(bytes: &[u8], max_depth: usize) -> Result<Object, JsonError> {
    if let Err(error) = std::str::from_utf8(bytes) {
        return Err(JsonError {
            offset: error.valid_up_to(),
            problem: Problem::NotUtf8,
        });
    }
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
        (Some(()), None) => Ok(Object {
            members: scanner.members,
        }),
        (_, error) => Err(error.expect("whoever stops says why")),
    }
}

/// Returns the text of a JSON string given with its quotes; `None` if it is no
/// string. Borrows when there is no escape in it.
pub fn text(value: &[u8]) -> Option<Cow<'_, str>> {
    let inner = value.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if memchr::memchr(b'\\', inner).is_none() {
        return std::str::from_utf8(inner).ok().map(Cow::Borrowed);
    }
    serde_json::from_slice(value).ok().map(Cow::Owned)
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

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Instant};

    use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

    use super::{super::testing::Dice, *};

    fn problem(body: impl AsRef<[u8]>) -> Problem {
        scan(body.as_ref(), 64).unwrap_err().problem
    }

    fn syntax(body: impl AsRef<[u8]>) -> (usize, &'static str) {
        match scan(body.as_ref(), 64).unwrap_err() {
            JsonError {
                offset,
                problem: Problem::Syntax(why),
            } => (offset, why),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn members_are_found_with_their_places_and_kinds() {
        let body = br#" { "model" : "m" , "n":1,"t":0.5,"l":[1,2,"x"] ,"o":{"model":[]}, "e":[],"z":null,"b":true} "#;
        let object = scan(body, 64).unwrap();
        let seen: Vec<_> = object
            .members
            .iter()
            .map(|member| {
                let value = std::str::from_utf8(member.value.of(body)).unwrap();
                let name = std::str::from_utf8(member.name(body)).unwrap();
                (name, value, member.kind, member.items)
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("model", "\"m\"", Kind::String, 0),
                ("n", "1", Kind::Int, 0),
                ("t", "0.5", Kind::Float, 0),
                ("l", "[1,2,\"x\"]", Kind::Array, 3),
                ("o", "{\"model\":[]}", Kind::Object, 0),
                ("e", "[]", Kind::Array, 0),
                ("z", "null", Kind::Null, 0),
                ("b", "true", Kind::Bool, 0),
            ]
        );
    }

    #[test]
    fn kinds_of_items_are_those_of_the_top_most_array_alone() {
        let body = br#"{"a":[1,2],"b":[[1.5],["x"]],"c":[{"d":[1]},2],"d":{"e":[1]}}"#;
        let object = scan(body, 64).unwrap();
        let kinds = |name| object.find(body, name).unwrap().item_kinds;
        assert!(kinds("a").only(Kind::Int));
        assert!(kinds("b").only(Kind::Array));
        assert!(!kinds("c").only(Kind::Object) && !kinds("c").only(Kind::Int));
        assert_eq!(object.find(body, "d").unwrap().items, 0);
    }

    #[test]
    fn a_key_with_escapes_is_found_by_its_meaning() {
        let body = br#"{"\u006dodel":"m"}"#;
        let object = scan(body, 64).unwrap();
        assert_eq!(object.find(body, "model").unwrap().name(body), b"model");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "  ", "[]", "1", "\"x\"", "null", "x"] {
            assert_eq!(problem(body), Problem::NotAnObject, "{body}");
        }
    }

    #[test]
    fn every_breach_of_the_grammar_is_refused_where_it_stands() {
        for (body, offset, why) in [
            (r#"{"a":1"#, 6, "it ends too early"),
            (r#"{"a":"#, 5, "it ends too early"),
            (r#"{"a""#, 4, "a colon is expected"),
            (r#"{"a" 1}"#, 5, "a colon is expected"),
            (r#"{"a":1,}"#, 7, "a key in double quotes is expected"),
            (r#"{a:1}"#, 1, "a key in double quotes is expected"),
            (r#"{'a':1}"#, 1, "a key in double quotes is expected"),
            (r#"{"a":1 "b":2}"#, 7, "a comma or } is expected"),
            (r#"{"a":[1 2]}"#, 8, "a comma or ] is expected"),
            (r#"{"a":[1,]}"#, 8, "a value is expected"),
            (r#"{"a":[1}"#, 7, "a comma or ] is expected"),
            (r#"{"a":{"b":1]}"#, 11, "a comma or } is expected"),
            (r#"{"a":1}x"#, 7, "something follows the object"),
            (r#"{"a":1}{}"#, 7, "something follows the object"),
            (r#"{"a":tru}"#, 5, "a value is expected"),
            (r#"{"a":nul"#, 5, "a value is expected"),
            (r#"{"a":True}"#, 5, "a value is expected"),
            (r#"{"a":NaN}"#, 5, "a value is expected"),
            (r#"{"a":Infinity}"#, 5, "a value is expected"),
            (r#"{"a":-Infinity}"#, 6, "a digit is expected"),
            (r#"{"a":+1}"#, 5, "a value is expected"),
            (r#"{"a":.5}"#, 5, "a value is expected"),
            (r#"{"a":1.}"#, 7, "a digit is expected"),
            (r#"{"a":1e}"#, 7, "a digit is expected"),
            (r#"{"a":01}"#, 6, "a comma or } is expected"),
            (r#"{"a":0x1}"#, 6, "a comma or } is expected"),
            (r#"{"a":1e400}"#, 5, "a number is out of range"),
            (r#"{"a":-1e400}"#, 5, "a number is out of range"),
            (r#"{"a":/**/1}"#, 5, "a value is expected"),
            (
                "{\"a\":\"x\ny\"}",
                7,
                "a control character stands in a string",
            ),
            (
                "{\"a\":\"\0\"}",
                6,
                "a control character stands in a string",
            ),
            ("{\0}", 1, "a key in double quotes is expected"),
            ("{\u{a0}}", 1, "a key in double quotes is expected"),
            (r#"{"a":"x"#, 5, "a string has no end"),
            (r#"{"a":"x\""#, 5, "a string has no end"),
            (r#"{"a":"\x"}"#, 6, "an escape is not one of JSON's"),
            (r#"{"a":"\U0041"}"#, 6, "an escape is not one of JSON's"),
            (r#"{"a":"\u00g0"}"#, 6, "\\u needs four hexadecimal digits"),
            (r#"{"a":"\u00"#, 6, "\\u needs four hexadecimal digits"),
            (
                r#"{"a":"\ud800"}"#,
                6,
                "half of a surrogate pair stands alone",
            ),
            (
                r#"{"a":"\udc00"}"#,
                6,
                "half of a surrogate pair stands alone",
            ),
            (
                r#"{"a":"\ud800A"}"#,
                6,
                "half of a surrogate pair stands alone",
            ),
            (
                r#"{"a":"\ud800\n"}"#,
                6,
                "half of a surrogate pair stands alone",
            ),
            (
                r#"{"\ud800":1}"#,
                2,
                "half of a surrogate pair stands alone",
            ),
            ("\u{feff}{}", 0, "it begins with a byte order mark"),
        ] {
            assert_eq!(syntax(body), (offset, why), "{body}");
        }
    }

    #[test]
    fn what_is_no_utf_8_is_refused_where_it_stands() {
        for (body, offset) in [
            (&b"{\"a\":\"\xff\"}"[..], 6),
            (b"{\"a\":\"\xed\xa0\x80\"}", 6),
            (b"\xfe\xff\0{\0}", 0),
            (b"\xff\xfe{\0}\0", 0),
            (b"{\"a\":\"\xe2\x82", 6),
        ] {
            let error = scan(body, 64).unwrap_err();
            assert_eq!((error.offset, error.code()), (offset, "invalid_utf8"));
        }
        // UTF-16 without a mark is full of NULs.
        assert_eq!(
            problem(b"{\0}\0"),
            Problem::Syntax("a key in double quotes is expected")
        );
    }

    #[test]
    fn numbers_that_are_odd_and_yet_clear_are_taken() {
        for number in [
            "-0",
            "0e0",
            "1E+2",
            "1e308",
            "1e-400",
            "0.1e-5",
            "123456789012345678901234567890",
            "-0.0",
        ] {
            let body = format!("{{\"a\":{number}}}");
            assert!(scan(body.as_bytes(), 64).is_ok(), "{number}");
        }
        let long = format!("{{\"a\":{}}}", "9".repeat(400));
        assert!(scan(long.as_bytes(), 64).is_ok());
        let long = format!("{{\"a\":{}.0}}", "9".repeat(400));
        assert_eq!(problem(long), Problem::Syntax("a number is out of range"));
    }

    #[test]
    fn depth_is_counted_from_the_body_itself() {
        for depth in [1, 2, 64, 65, 200] {
            let inner = depth - 1;
            let body = format!("{{\"a\":{}1{}}}", "[".repeat(inner), "]".repeat(inner));
            let result = scan(body.as_bytes(), 64);
            if depth <= 64 {
                assert!(result.is_ok(), "{depth}");
            } else {
                let error = result.unwrap_err();
                assert_eq!(error.code(), "json_too_deep");
                assert_eq!(error.offset, 5 + 63);
            }
        }
        let bomb = "{\"a\":".repeat(1_000_000);
        assert_eq!(problem(&bomb), Problem::TooDeep(64));
    }

    #[test]
    fn duplicate_keys_are_refused_at_any_depth_and_spelling() {
        for (body, offset) in [
            (r#"{"model":"a","model":"b"}"#, 13),
            (r#"{"model":"a","\u006dodel":"b"}"#, 13),
            (r#"{"\u006dodel":"a","model":"b"}"#, 18),
            (r#"{"\u006dodel":"a","m\u006fdel":"b"}"#, 18),
            (r#"{"a":{"b":1,"b":2}}"#, 12),
            (r#"{"a":[{"b":1},{"c":{"d":1,"e":2,"d":3}}]}"#, 32),
            (r#"{"":1,"":2}"#, 6),
            (r#"{"a":{},"a":[]}"#, 8),
            (r#"{"\ud83d\ude00":1,"😀":2}"#, 18),
        ] {
            let error = scan(body.as_bytes(), 64).unwrap_err();
            assert_eq!(
                (error.offset, error.code()),
                (offset, "duplicate_key"),
                "{body}"
            );
        }
    }

    #[test]
    fn equal_keys_of_different_objects_are_no_duplicates() {
        let body = r#"{"a":{"a":{"a":1}},"b":[{"a":1},{"a":2}],"c":{"\u0061":1,"A":2,"ab":3}}"#;
        assert!(scan(body.as_bytes(), 64).is_ok());
    }

    #[test]
    fn one_duplicate_among_very_many_keys_is_found() {
        for last in ["k0", "k77777", "\\u006b500"] {
            let keys: Vec<String> = (0..100_000).map(|i| format!("\"k{i}\":1")).collect();
            let body = format!("{{\"bias\":{{{}}}}}", keys.join(","));
            assert!(scan(body.as_bytes(), 64).is_ok());
            let body = format!("{{\"bias\":{{{},\"{last}\":2}}}}", keys.join(","));
            let error = scan(body.as_bytes(), 64).unwrap_err();
            assert_eq!(error.code(), "duplicate_key");
            assert_eq!(error.offset, body.rfind(&format!("\"{last}")).unwrap());
        }
    }

    #[test]
    fn very_many_keys_cost_no_quadratic_time() {
        // Pair by pair this would be 8 * 10^10 comparisons: minutes, even here.
        let keys: Vec<String> = (0..400_000).map(|i| format!("\"k{i}\":1")).collect();
        let body = format!("{{\"bias\":{{{}}}}}", keys.join(","));
        let start = Instant::now();
        assert!(scan(body.as_bytes(), 64).is_ok());
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }

    #[test]
    fn a_body_has_at_most_1024_members_of_its_own() {
        let body = |n: usize| {
            let members: Vec<String> = (0..n).map(|i| format!("\"k{i}\":1")).collect();
            format!("{{{}}}", members.join(","))
        };
        assert_eq!(scan(body(1024).as_bytes(), 64).unwrap().members.len(), 1024);
        let error = scan(body(1025).as_bytes(), 64).unwrap_err();
        assert_eq!(error.problem, Problem::TooManyMembers);
        assert_eq!(error.code(), "invalid_json");
    }

    #[test]
    fn a_string_may_end_at_any_place_of_a_block() {
        for length in 0..100 {
            for special in ["\"", "\\n\"", "\\u00e9\"", "é\""] {
                let body = format!("{{\"a\":\"{}{special},\"b\":1}}", "x".repeat(length));
                let object = scan(body.as_bytes(), 64).unwrap();
                assert_eq!(object.members.len(), 2);
            }
            let body = format!(
                "{{\"a\":\"{}\u{1f}{}\"}}",
                "x".repeat(length),
                "y".repeat(40)
            );
            assert_eq!(syntax(&body).0, 6 + length);
        }
    }

    #[test]
    fn a_client_is_told_the_byte_and_the_reason() {
        let error = Error::from(scan(b"{\"a\":1,}", 64).unwrap_err());
        assert_eq!(error.status, 400);
        assert_eq!(
            error.message,
            "the body is not valid JSON at byte 7: a key in double quotes is expected"
        );
        assert_eq!(error.code.as_deref(), Some("invalid_json"));
    }

    /// What serde_json reads, without duplicate keys.
    #[derive(Debug)]
    struct Strict;

    impl<'de> Deserialize<'de> for Strict {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(Self)
        }
    }

    impl<'de> Visitor<'de> for Strict {
        type Value = Self;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("anything")
        }
        fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_str<E>(self, _: &str) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_unit<E>(self) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
            while seq.next_element::<Self>()?.is_some() {}
            Ok(self)
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
            let mut keys = HashSet::new();
            while let Some(key) = map.next_key::<String>()? {
                map.next_value::<Self>()?;
                if !keys.insert(key) {
                    return Err(serde::de::Error::custom("duplicate"));
                }
            }
            Ok(self)
        }
    }

    #[test]
    fn it_takes_exactly_what_serde_json_takes_but_for_duplicates() {
        let mut dice = Dice(0x5eed);
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..20_000 {
            let object = dice.object(3);
            let mut body = String::new();
            dice.write(&serde_json::Value::Object(object), &mut body);
            let mut body = body.into_bytes();
            for _ in 0..dice.below(4) {
                let bits: [&[u8]; 24] = [
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b",",
                    b":",
                    b"\"",
                    b"\\",
                    b"\\u12",
                    b"\\ud800",
                    b"0",
                    b"-",
                    b"1.5",
                    b"e",
                    b"E+9",
                    b" ",
                    b"\n",
                    b"\0",
                    b"\xff",
                    b"\xc3\xa9",
                    b"null",
                    b"tru",
                    b"\"k1\":",
                    b"\"a\":1,",
                ];
                let at = dice.below(body.len() + 1);
                let cut = dice.below(3).min(body.len() - at);
                let bit = *dice.pick(&bits);
                body.splice(at..at + cut, bit.iter().copied());
            }
            let theirs = serde_json::from_slice::<Strict>(&body);
            let is_object = body.trim_ascii().first() == Some(&b'{');
            let ours = scan(&body, 64);
            assert_eq!(
                ours.is_ok(),
                theirs.is_ok() && is_object,
                "{}\n{ours:?}\n{theirs:?}",
                String::from_utf8_lossy(&body)
            );
            if ours.is_ok() {
                taken += 1;
            } else {
                refused += 1;
            }
        }
        assert!(taken > 2000 && refused > 2000, "{taken} {refused}");
    }

    #[test]
    fn the_members_are_those_that_serde_json_sees() {
        let mut dice = Dice(7);
        for _ in 0..5000 {
            let object = dice.object(3);
            let mut body = String::new();
            dice.write(&serde_json::Value::Object(object.clone()), &mut body);
            let body = body.as_bytes();
            let seen: serde_json::Map<String, serde_json::Value> = scan(body, 64)
                .unwrap()
                .members
                .iter()
                .map(|member| {
                    let name = String::from_utf8(member.name(body).to_vec()).unwrap();
                    let value = serde_json::from_slice(member.value.of(body)).unwrap();
                    (name, value)
                })
                .collect();
            assert_eq!(seen, object);
        }
    }
}
