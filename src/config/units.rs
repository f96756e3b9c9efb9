//! Durations, sizes and shares as people write them: `30s`, `10m`, `32MiB`,
//! `20%`.
//!
//! **Invariant:** a unit is always spelled out; a bare number is refused, since
//! nobody can tell whether `timeout: 30` means seconds or milliseconds.

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A length of time, written with its unit: `250ms`, `30s`, `10m`, `1h30m`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub Duration);

impl Time {
    /// Makes a time of whole seconds.
    pub const fn secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// Makes a time of milliseconds.
    pub const fn millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// Returns the standard library's type.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|why| format!("a duration such as 30s, 10m or 250ms ({why})"))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // humantime writes "1m 30s"; without the space it is one YAML word.
        let spaced = humantime::format_duration(self.0).to_string();
        f.write_str(&spaced.replace(' ', ""))
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A number of bytes, written with its unit: `512B`, `64KiB`, `32MiB`, `10MB`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl Size {
    /// Makes a size of `kib` × 1,024 bytes.
    pub const fn kib(kib: u64) -> Self {
        Self(kib * 1024)
    }

    /// Makes a size of `mib` × 1,048,576 bytes.
    pub const fn mib(mib: u64) -> Self {
        Self(mib * 1024 * 1024)
    }

    /// Returns the bytes; on a 32-bit machine at most `usize::MAX`.
    pub fn get(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "a size such as 64KiB, 32MiB or 10MB".to_owned();
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("{} (a unit is missing)", expected()));
        }
        bytesize::ByteSize::from_str(text)
            .map(|size| Self(size.as_u64()))
            .map_err(|_unit| expected())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 6] = [
            ("GiB", 1 << 30),
            ("GB", 1_000_000_000),
            ("MiB", 1 << 20),
            ("MB", 1_000_000),
            ("KiB", 1 << 10),
            ("kB", 1_000),
        ];
        for (unit, bytes) in UNITS {
            if self.0 >= bytes && self.0.is_multiple_of(bytes) {
                return write!(f, "{}{unit}", self.0 / bytes);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl fmt::Debug for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A share of something, in whole hundredths: `20%`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(pub u8);

impl Share {
    /// Returns this share of a number, rounded down.
    pub const fn of(self, whole: u64) -> u64 {
        // Divided first where the product would not fit.
        match whole.checked_mul(self.0 as u64) {
            Some(product) => product / 100,
            None => whole / 100 * self.0 as u64,
        }
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "a share such as 20%".to_owned();
        let Some(number) = text.strip_suffix('%') else {
            return Err(format!("{} (the % is missing)", expected()));
        };
        match number.trim_end().parse() {
            Ok(percent @ 0..=100) if !number.starts_with('+') => Ok(Self(percent)),
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Reads and writes a type by its text, and gives it a JSON Schema `format`
/// that the validator knows how to check.
macro_rules! by_text {
    ($type:ty, $format:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(|expected| {
                    D::Error::custom(format!("expected {expected}, found {text:?}"))
                })
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "format": $format })
            }
        }
    };
}

pub(super) use by_text;

by_text!(Time, "duration");
by_text!(Size, "size");
by_text!(Share, "share");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read_again() {
        for text in ["250ms", "30s", "10m", "1h30m"] {
            assert_eq!(text.parse::<Time>().unwrap().to_string(), text);
        }
        for text in ["512B", "64KiB", "32MiB", "10MB", "1GiB"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_share_is_a_whole_number_of_hundredths() {
        for text in ["0%", "20%", "100%"] {
            assert_eq!(text.parse::<Share>().unwrap().to_string(), text);
        }
        for text in ["20", "101%", "-1%", "+1%", "0.5%", "%", ""] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        assert_eq!(Share(20).of(14), 2);
        assert_eq!(Share(50).of(u64::MAX), u64::MAX / 100 * 50);
    }

    #[test]
    fn a_bare_number_has_no_unit_and_is_refused() {
        assert!("30".parse::<Time>().is_err());
        assert!("30".parse::<Size>().is_err());
    }
}
