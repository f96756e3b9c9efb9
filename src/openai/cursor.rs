//! A forgiving reader for the JSON that upstreams send: one pass, no
//! allocation, every value touched once.
//!
//! It checks only as much grammar as it needs to find its way. What is no JSON
//! reads as if it ended early; nothing panics, loops or recurses.

/// Reads JSON from front to back. A caller asks for what it expects and skips
/// the rest; after anything unexpected every further question is answered with
/// "nothing more".
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Starts before the first value of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Returns the first byte of what comes next, which tells its kind.
    pub fn peek(&mut self) -> Option<u8> {
        loop {
            match self.bytes.get(self.at)? {
                b' ' | b'\n' | b'\r' | b'\t' => self.at += 1,
                &byte => return Some(byte),
            }
        }
    }

    /// Returns the offset in the bytes given to [`Cursor::new`].
    pub const fn offset(&self) -> usize {
        self.at
    }

    /// Steps into an object; anything else is skipped and answered with false.
    pub fn enter_object(&mut self) -> bool {
        self.enter(b'{')
    }

    /// Steps into an array; anything else is skipped and answered with false.
    pub fn enter_array(&mut self) -> bool {
        self.enter(b'[')
    }

    /// Returns the next key of the object that was entered, as it is written
    /// between its quotes, and stops before its value, which must be read or
    /// skipped; `None` once the object has ended.
    pub fn key(&mut self) -> Option<&'a [u8]> {
        if self.peek() == Some(b',') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'"') => {
                let quoted = self.string()?;
                if self.peek() != Some(b':') {
                    return self.lost();
                }
                self.at += 1;
                quoted.strip_prefix(b"\"")?.strip_suffix(b"\"")
            }
            Some(b'}') => {
                self.at += 1;
                None
            }
            _ => self.lost(),
        }
    }

    /// Says whether the array that was entered has another item, and stops
    /// before it; the item must be read or skipped.
    pub fn item(&mut self) -> bool {
        if self.peek() == Some(b',') {
            self.at += 1;
        }
        match self.peek() {
            Some(b']') => {
                self.at += 1;
                false
            }
            Some(_) => true,
            None => false,
        }
    }

    /// Skips one value and returns its text.
    pub fn skip(&mut self) -> Option<&'a [u8]> {
        let first = self.peek()?;
        match first {
            b'"' => self.string(),
            b'{' | b'[' => {
                let start = self.at;
                match container_end(self.bytes, start) {
                    Some(end) => {
                        self.at = end;
                        self.bytes.get(start..end)
                    }
                    None => self.lost(),
                }
            }
            b'-' | b'0'..=b'9' | b'a'..=b'z' => {
                let start = self.at;
                while let Some(b'-' | b'+' | b'.' | b'0'..=b'9' | b'a'..=b'z' | b'E') =
                    self.bytes.get(self.at)
                {
                    self.at += 1;
                }
                self.bytes.get(start..self.at)
            }
            _ => self.lost(),
        }
    }

    /// Reads a whole number; any other value is skipped.
    pub fn integer(&mut self) -> Option<u64> {
        let digits = self.skip()?;
        if digits.is_empty() || digits.len() > 19 {
            return None;
        }
        digits.iter().try_fold(0_u64, |sum, digit| match digit {
            b'0'..=b'9' => Some(sum * 10 + u64::from(digit - b'0')),
            _ => None,
        })
    }

    /// Skips one value; says whether there is anything in it: a string or a
    /// container that is not empty, or `true`.
    pub fn something(&mut self) -> bool {
        self.skip().is_some_and(is_something)
    }

    fn enter(&mut self, bracket: u8) -> bool {
        if self.peek() == Some(bracket) {
            self.at += 1;
            return true;
        }
        self.skip();
        false
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let start = self.at;
        match string_end(self.bytes, start) {
            Some(end) => {
                self.at = end;
                self.bytes.get(start..end)
            }
            None => self.lost(),
        }
    }

    fn lost<T>(&mut self) -> Option<T> {
        self.at = self.bytes.len();
        None
    }
}

/// Says whether a value is a string or a container that is not empty, or `true`.
pub fn is_something(value: &[u8]) -> bool {
    match value {
        [b'"', .., b'"'] => value.len() > 2,
        [b'[' | b'{', inside @ .., _] => !inside.trim_ascii().is_empty(),
        _ => value == b"true",
    }
}

/// Returns one past the closing quote of the string that begins at `start`.
#[inline]
fn string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        let hit = at + quote_or_backslash(bytes.get(at..)?)?;
        if bytes.get(hit) == Some(&b'"') {
            return Some(hit + 1);
        }
        at = hit + 2;
    }
}

/// Returns the offset of the first quote or backslash. The strings of an event
/// are so short that they are read before a call of memchr would have begun.
#[inline]
fn quote_or_backslash(text: &[u8]) -> Option<usize> {
    let mut rest = text;
    for _ in 0..4 {
        let Some((word, tail)) = rest.split_first_chunk::<8>() else {
            break;
        };
        let word = u64::from_le_bytes(*word);
        let hits = zero_bytes(word ^ (ONES * u64::from(b'"')))
            | zero_bytes(word ^ (ONES * u64::from(b'\\')));
        if hits != 0 {
            return Some(text.len() - rest.len() + (hits.trailing_zeros() / 8) as usize);
        }
        rest = tail;
    }
    Some(text.len() - rest.len() + memchr::memchr2(b'"', b'\\', rest)?)
}

const ONES: u64 = u64::from_le_bytes([0x01; 8]);
const HIGH: u64 = u64::from_le_bytes([0x80; 8]);

/// Sets the high bit of the first byte that is zero; bits above it mean nothing
/// (the borrow runs upwards).
const fn zero_bytes(word: u64) -> u64 {
    word.wrapping_sub(ONES) & !word & HIGH
}

/// Returns one past the bracket that closes the container at `start`.
fn container_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    let mut depth = 0_usize;
    loop {
        at = structure(bytes, at);
        match bytes.get(at)? {
            b'"' => at = string_end(bytes, at)?,
            b'{' | b'[' => {
                depth += 1;
                at += 1;
            }
            b'}' | b']' => {
                depth -= 1;
                at += 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => at += 1,
        }
    }
}

/// Returns the offset of the next byte that may be a quote or a bracket: eight
/// bytes at a time, so that a megabyte of embeddings is no burden.
fn structure(bytes: &[u8], at: usize) -> usize {
    let mut rest = bytes.get(at..).unwrap_or_default();
    while let Some((word, tail)) = rest.split_first_chunk::<8>() {
        let word = u64::from_le_bytes(*word);
        // [ ] { } differ from { in the bits 0x26 only; so do y Y and DEL and _,
        // which the caller steps over.
        let hits = zero_bytes(word ^ (ONES * u64::from(b'"')))
            | zero_bytes((word ^ (ONES * u64::from(b'{'))) & (ONES * 0xd9));
        if hits != 0 {
            return bytes.len() - rest.len() + (hits.trailing_zeros() / 8) as usize;
        }
        rest = tail;
    }
    bytes.len() - rest.len()
}

/// Returns whether the bytes are one object with something in it and nothing
/// behind it, as far as brackets and strings tell: enough to know that an answer
/// is one and was not cut.
pub fn is_whole_object(bytes: &[u8]) -> bool {
    let mut inside = Cursor::new(bytes);
    let has_members = inside.enter_object() && inside.key().is_some();
    let mut cursor = Cursor::new(bytes);
    has_members && cursor.skip().is_some() && cursor.peek().is_none()
}

#[cfg(test)]
mod tests {
    use super::{super::testing::Dice, *};

    /// Walks everything there is, the way readers do.
    fn walk(cursor: &mut Cursor<'_>, depth: usize) -> usize {
        let mut seen = 1;
        match cursor.peek() {
            Some(b'{') if depth < 8 => {
                cursor.enter_object();
                while cursor.key().is_some() {
                    seen += walk(cursor, depth + 1);
                }
            }
            Some(b'[') if depth < 8 => {
                cursor.enter_array();
                while cursor.item() {
                    seen += walk(cursor, depth + 1);
                }
            }
            _ => {
                cursor.skip();
            }
        }
        seen
    }

    fn count(value: &serde_json::Value) -> usize {
        1 + match value {
            serde_json::Value::Array(items) => items.iter().map(count).sum(),
            serde_json::Value::Object(members) => members.values().map(count).sum(),
            _ => 0,
        }
    }

    #[test]
    fn it_sees_every_value_of_what_is_json() {
        let mut dice = Dice(11);
        for _ in 0..3000 {
            let value = serde_json::Value::Object(dice.object(4));
            let mut text = String::new();
            dice.write(&value, &mut text);
            let mut cursor = Cursor::new(text.as_bytes());
            assert_eq!(walk(&mut cursor, 0), count(&value), "{text}");
            let mut cursor = Cursor::new(text.as_bytes());
            let whole = cursor.skip().unwrap();
            assert_eq!(whole, text.trim().as_bytes());
        }
    }

    #[test]
    fn it_ends_on_whatever_it_is_given() {
        let mut dice = Dice(13);
        let bits = b"{}[]\",:\\0e-tfn \n\xff";
        for _ in 0..20_000 {
            let text: Vec<u8> = (0..dice.below(24)).map(|_| *dice.pick(bits)).collect();
            assert!(walk(&mut Cursor::new(&text), 0) <= text.len() + 2);
        }
        let deep = "[".repeat(100_000);
        assert_eq!(Cursor::new(deep.as_bytes()).skip(), None);
    }

    #[test]
    fn whole_numbers_are_read_and_nothing_else() {
        for (text, number) in [
            ("17", Some(17)),
            (" 0 ", Some(0)),
            ("-1", None),
            ("1.0", None),
            ("1e3", None),
            ("99999999999999999999", None),
            ("\"5\"", None),
            ("null", None),
            ("", None),
        ] {
            assert_eq!(Cursor::new(text.as_bytes()).integer(), number, "{text}");
        }
    }

    #[test]
    fn empty_values_are_nothing() {
        for text in ["\"\"", "null", "false", "0", "[]", "{ }", "[\n]", ""] {
            assert!(!Cursor::new(text.as_bytes()).something(), "{text}");
        }
        for text in ["\" \"", "true", "[0]", "{\"a\":null}"] {
            assert!(Cursor::new(text.as_bytes()).something(), "{text}");
        }
    }

    #[test]
    fn brackets_and_quotes_in_strings_do_not_end_a_container() {
        let text = br#"{"a":["]}\"\\",{"y":"Y_~}"}],"b":2}"#;
        let mut cursor = Cursor::new(text);
        cursor.enter_object();
        assert_eq!(cursor.key(), Some(&b"a"[..]));
        assert_eq!(cursor.skip().map(<[u8]>::len), Some(23));
        assert_eq!(cursor.key(), Some(&b"b"[..]));
        assert_eq!(cursor.integer(), Some(2));
        assert_eq!(cursor.key(), None);
    }

    #[test]
    fn a_whole_object_has_its_end_and_nothing_behind_it() {
        assert!(is_whole_object(b" \n{\"a\":[1,{\"b\":\"}\"}]} \n"));
        for cut in [
            "",
            "{",
            "{}",
            " { } ",
            "{\"a\":[1",
            "{}{}",
            "{} x",
            "[]",
            "null",
            "<html>",
        ] {
            assert!(!is_whole_object(cut.as_bytes()), "{cut}");
        }
    }
}
