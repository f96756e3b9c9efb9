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
//! Start at [`scan`]; the pass itself is in `scanner`.

mod scanner;
#[cfg(test)]
mod tests;

use std::{borrow::Cow, fmt};

use crate::error::Error;

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
    scanner::members(bytes, max_depth).map(|members| Object { members })
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
