//! One record → one line, as text or as JSON.
//!
//! ```text
//! 2026-11-21T02:52:35.123Z INFO forebay::reload: configuration reloaded: changed=2
//! {"time":"2026-11-21T02:52:35.123Z","level":"info","target":"forebay::reload","message":"…"}
//! ```
//!
//! **Invariant:** a line is ended by its last byte, a `\n`, and holds no other
//! character that ends lines, moves a cursor or turns the writing direction.
//!
//! **Invariant:** a line has a bounded length: messages and values are cut.

use std::{
    fmt::{self, Write as _},
    time::SystemTime,
};

use log::{
    Record,
    kv::{self, Key, Value, VisitSource, VisitValue},
};

use crate::config::LogFormat;

/// The longest message, in bytes before escaping.
const MESSAGE_MAX: usize = 4096;
/// The longest value of a `key=value`, in bytes before escaping.
const VALUE_MAX: usize = 512;

/// Writes a record down; the line ends in `\n`.
pub(super) fn render(format: LogFormat, now: SystemTime, record: &Record<'_>) -> String {
    let mut line = Line {
        format,
        out: String::with_capacity(256),
    };
    let time = humantime::format_rfc3339_millis(now);
    match format {
        LogFormat::Text => {
            line.put(format_args!("{time} {} ", record.level()));
            line.text(Style::Bare, VALUE_MAX, format_args!("{}", record.target()));
            line.out.push_str(": ");
            line.text(Style::Bare, MESSAGE_MAX, *record.args());
        }
        LogFormat::Json => {
            let level = record.level().as_str().to_ascii_lowercase();
            line.put(format_args!(r#"{{"time":"{time}","level":"{level}""#));
            line.out.push_str(r#","target":"#);
            line.quoted(VALUE_MAX, format_args!("{}", record.target()));
            line.out.push_str(r#","message":"#);
            line.quoted(MESSAGE_MAX, *record.args());
        }
    }
    // Neither side of the visit can fail: both write to memory.
    if record.key_values().visit(&mut line).is_err() {
        line.pair("incomplete");
        line.out.push_str("true");
    }
    if format == LogFormat::Json {
        line.out.push('}');
    }
    line.out.push('\n');
    line.out
}

/// A line while it is being written.
struct Line {
    format: LogFormat,
    out: String,
}

impl Line {
    /// Writes what is known to need no escaping.
    fn put(&mut self, text: fmt::Arguments<'_>) {
        self.out.write_fmt(text).expect("a string takes any text");
    }

    fn text(&mut self, style: Style, bytes_max: usize, text: fmt::Arguments<'_>) {
        Escaped {
            out: &mut self.out,
            style,
            left: Some(bytes_max),
        }
        .write_fmt(text)
        .expect("a string takes any text");
    }

    /// Writes a string with quotes around it.
    fn quoted(&mut self, bytes_max: usize, text: fmt::Arguments<'_>) {
        let style = match self.format {
            LogFormat::Text => Style::Quoted,
            LogFormat::Json => Style::Json,
        };
        self.out.push('"');
        self.text(style, bytes_max, text);
        self.out.push('"');
    }

    /// Writes what stands before a value.
    fn pair(&mut self, key: &str) {
        match self.format {
            LogFormat::Text => {
                self.out.push(' ');
                self.text(Style::Bare, VALUE_MAX, format_args!("{key}"));
                self.out.push('=');
            }
            LogFormat::Json => {
                self.out.push(',');
                self.quoted(VALUE_MAX, format_args!("{key}"));
                self.out.push(':');
            }
        }
    }

    /// Writes a string that is a value; in text the quotes only where it would
    /// not be one word without them.
    fn value(&mut self, text: &str) {
        let one_word = !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'=' | b'\\'));
        if self.format == LogFormat::Text && one_word {
            self.text(Style::Bare, VALUE_MAX, format_args!("{text}"));
        } else {
            self.quoted(VALUE_MAX, format_args!("{text}"));
        }
    }
}

impl<'kvs> VisitSource<'kvs> for Line {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        self.pair(key.as_str());
        value.visit(self)
    }
}

impl VisitValue<'_> for &mut Line {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), kv::Error> {
        self.value(&value.to_string());
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), kv::Error> {
        self.out.push_str("null");
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), kv::Error> {
        self.put(format_args!("{value}"));
        Ok(())
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), kv::Error> {
        self.put(format_args!("{value}"));
        Ok(())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), kv::Error> {
        if value.is_finite() {
            self.put(format_args!("{value}"));
        } else {
            self.value(&value.to_string());
        }
        Ok(())
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), kv::Error> {
        self.put(format_args!("{value}"));
        Ok(())
    }

    fn visit_str(&mut self, value: &str) -> Result<(), kv::Error> {
        self.value(value);
        Ok(())
    }
}

/// How text is escaped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    /// In a text line, without quotes around it.
    Bare,
    /// In a text line, within quotes.
    Quoted,
    /// In a JSON string.
    Json,
}

/// Escapes what is written to it, and cuts it at a bound.
struct Escaped<'a> {
    out: &'a mut String,
    style: Style,
    /// The bytes that may still come; `None` once it was cut.
    left: Option<usize>,
}

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let Some(left) = self.left else { break };
            self.left = left.checked_sub(c.len_utf8());
            if self.left.is_none() {
                self.out.push('…');
                break;
            }
            self.push(c)?;
        }
        Ok(())
    }
}

impl Escaped<'_> {
    fn push(&mut self, c: char) -> fmt::Result {
        match (c, self.style) {
            ('"' | '\\', Style::Quoted | Style::Json) => {
                self.out.push('\\');
                self.out.push(c);
            }
            ('\n', _) => self.out.push_str("\\n"),
            ('\r', _) => self.out.push_str("\\r"),
            ('\t', _) => self.out.push_str("\\t"),
            (c, Style::Json) if is_unsafe(c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(self.out, "\\u{unit:04x}")?;
                }
            }
            (c, _) if is_unsafe(c) => write!(self.out, "\\u{{{:x}}}", u32::from(c))?,
            (c, _) => self.out.push(c),
        }
        Ok(())
    }
}

/// Returns whether a character could end a line somewhere, steer a terminal, or
/// make a reader see something else than what is there.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}'
            | '\u{61c}'                     // Arabic letter mark
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'       // zero width, direction marks
            | '\u{2028}'..='\u{202e}'       // line and paragraph ends, bidi overrides
            | '\u{2060}'..='\u{206f}'       // invisible operators, bidi isolates
            | '\u{fe00}'..='\u{fe0f}'       // variation selectors
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}'     // tags
        )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use log::Level;

    use super::*;

    const HOSTILE: &str = "a\r\n\0\u{1b}[31m\u{7f}\u{85}\u{9b}\u{2028}\u{2029}\u{202e}\u{2066}\u{feff}\u{e0041}\"\\}\tz";

    fn line(format: LogFormat, message: &str, pairs: &dyn kv::Source) -> String {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_229_555_123);
        render(
            format,
            now,
            &Record::builder()
                .level(Level::Info)
                .target("forebay")
                .args(format_args!("{message}"))
                .key_values(&pairs)
                .build(),
        )
    }

    fn no_pairs() -> [(&'static str, u64); 0] {
        []
    }

    #[test]
    fn a_text_line_looks_as_documented() {
        assert_eq!(
            line(LogFormat::Text, "message", &[("key", "value")]),
            "2026-11-21T02:52:35.123Z INFO forebay: message key=value\n"
        );
    }

    #[test]
    fn a_json_line_has_its_pairs_as_members_of_their_type() {
        let pairs: [(&str, &dyn kv::ToValue); 4] =
            [("n", &7_u64), ("f", &1.5_f64), ("b", &true), ("s", &"x y")];
        assert_eq!(
            line(LogFormat::Json, "message", &pairs),
            concat!(
                r#"{"time":"2026-11-21T02:52:35.123Z","level":"info","target":"forebay","#,
                r#""message":"message","n":7,"f":1.5,"b":true,"s":"x y"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn hostile_text_stays_on_one_line_without_a_single_control_character() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let line = line(format, HOSTILE, &[("key", HOSTILE), (HOSTILE, "value")]);
            let body = line.strip_suffix('\n').unwrap();
            assert!(!body.chars().any(is_unsafe), "{line:?}");
        }
    }

    #[test]
    fn a_json_line_gives_hostile_text_back_as_it_was() {
        let line = line(LogFormat::Json, HOSTILE, &[("key", HOSTILE)]);
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["message"], HOSTILE);
        assert_eq!(read["key"], HOSTILE);
    }

    #[test]
    fn a_number_that_json_does_not_know_is_written_as_a_string() {
        let line = line(LogFormat::Json, "m", &[("n", f64::NAN)]);
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["n"], "NaN");
    }

    #[test]
    fn a_value_that_is_not_one_word_is_quoted() {
        for (value, shown) in [
            ("gpu-1", "gpu-1"),
            ("qwen2.5:7b", "qwen2.5:7b"),
            ("", r#""""#),
            ("two words", r#""two words""#),
            ("a=b", r#""a=b""#),
            ("say \"hi\"", r#""say \"hi\"""#),
            ("back\\slash", r#""back\\slash""#),
            ("größe", r#""größe""#),
            ("a\nlevel=error", r#""a\nlevel=error""#),
        ] {
            let line = line(LogFormat::Text, "m", &[("k", value)]);
            assert!(line.ends_with(&format!(": m k={shown}\n")), "{line}");
        }
    }

    #[test]
    fn long_text_is_cut_between_two_characters() {
        let long = "ä".repeat(MESSAGE_MAX);
        for format in [LogFormat::Text, LogFormat::Json] {
            let line = line(format, &long, &no_pairs());
            assert_eq!(line.matches('ä').count(), MESSAGE_MAX / 2);
            assert_eq!(line.matches('…').count(), 1);
        }
    }
}
