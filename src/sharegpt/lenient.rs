//! JSON as upstreams send it: what is no UTF-8, and halves of surrogate pairs,
//! become U+FFFD instead of making all of it unreadable.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads JSON; `None` if it is none, however kindly it is read.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    if let Ok(value) = serde_json::from_slice(bytes) {
        return Some(value);
    }
    serde_json::from_str(&mended(bytes)).ok()
}

/// Reads a string as it is written, with its quotes; `None` of anything else.
pub fn string(raw: &[u8]) -> Option<Cow<'_, str>> {
    let inside = raw.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if memchr::memchr(b'\\', inside).is_none() {
        return Some(String::from_utf8_lossy(inside));
    }
    parse::<String>(raw).map(Cow::Owned)
}

/// Returns the text of a value: a string's own, or of parts those that are text.
pub fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| match part {
                Value::String(text) => Some(text.as_str()),
                _ => part.get("text").and_then(Value::as_str),
            });
            texts.collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

/// Replaces what no string may hold.
fn mended(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut rest = &*text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let (escape, later) = match surrogate(after) {
            Some(Half::Pair) => after.split_at_checked(11),
            Some(Half::Alone) => {
                out.push('\u{fffd}');
                rest = after.get(5..).unwrap_or_default();
                continue;
            }
            // The character after it is no escape's beginning.
            None => {
                let end = after.chars().next().map_or(0, char::len_utf8);
                after.split_at_checked(end)
            }
        }
        .unwrap_or((after, ""));
        out.push('\\');
        out.push_str(escape);
        rest = later;
    }
    out.push_str(rest);
    out
}

/// What begins behind a backslash, if it is a surrogate.
enum Half {
    /// A high one and its low one.
    Pair,
    /// Only one of them.
    Alone,
}

fn surrogate(after: &str) -> Option<Half> {
    let unit = |text: &str| u16::from_str_radix(text.strip_prefix('u')?.get(..4)?, 16).ok();
    match unit(after)? {
        0xd800..=0xdbff => {
            let low = after
                .get(5..)
                .and_then(|rest| unit(rest.strip_prefix('\\')?));
            match low {
                Some(0xdc00..=0xdfff) => Some(Half::Pair),
                _ => Some(Half::Alone),
            }
        }
        0xdc00..=0xdfff => Some(Half::Alone),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_broken_costs_only_itself() {
        for (raw, text) in [
            (&b"\"plain\""[..], "plain"),
            (b"\"a\\nb\"", "a\nb"),
            (b"\"\\ud83d\\ude00\"", "😀"),
            (b"\"x\\ud83dy\"", "x\u{fffd}y"),
            (b"\"x\\ude00\"", "x\u{fffd}"),
            (b"\"\\ud83d\\ud83d\\ude00\"", "\u{fffd}😀"),
            (b"\"\\\\ud83d\"", "\\ud83d"),
            (b"\"\\\\\\ud83d\"", "\\\u{fffd}"),
            (b"\"bad \xff\xfe bytes\"", "bad \u{fffd}\u{fffd} bytes"),
            (b"\"bad \xf0\x9f\\n\"", "bad \u{fffd}\n"),
            (b"\"\"", ""),
        ] {
            assert_eq!(string(raw).as_deref(), Some(text));
        }
        for raw in [&b"null"[..], b"7", b"\"", b"", b"\"\\x\"", b"\"\\ud8\""] {
            assert_eq!(string(raw), None);
        }
    }

    #[test]
    fn an_object_with_a_broken_string_is_read() {
        let value: Value = parse(b"{\"a\":\"\xff\",\"b\":\"\\udc00\",\"c\":1}").unwrap();
        assert_eq!(value["a"], "\u{fffd}");
        assert_eq!(value["b"], "\u{fffd}");
        assert_eq!(value["c"], 1);
        assert_eq!(parse::<Value>(b"{\"a\":"), None);
    }
}
