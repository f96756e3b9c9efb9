//! How much of something, and how much of it in a time, as people write it:
//! `200k`, `60/min`, `2.50`.
//!
//! **Invariant:** none of them is 0 where it is a bound: a limit of nothing would
//! be a way to say "off", and there is a way to say that already.

use std::{borrow::Cow, fmt, num::NonZeroU64, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Error as _, Visitor},
};

use super::units::by_text;

/// The largest number that can be written: a trillion.
const COUNT_MAX: u64 = 1_000_000_000_000;
/// The largest sum of money, in whole units of a currency.
const MONEY_MAX: f64 = 1_000_000_000.0;
/// How many parts a unit of a currency has here: nobody asks less than this for
/// a token.
const NANOS: f64 = 1e9;

/// A number of things, at least 1: `200000`, `200k`, `1.5M`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Count(pub NonZeroU64);

impl Count {
    /// Returns the number.
    pub const fn get(self) -> u64 {
        self.0.get()
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "a whole number above 0 such as 200000, 200k or 1.5M".to_owned();
        let (number, factor) = match text.as_bytes().last() {
            Some(b'k') => (text.strip_suffix('k'), 1_000),
            Some(b'M') => (text.strip_suffix('M'), 1_000_000),
            Some(b'G') => (text.strip_suffix('G'), 1_000_000_000),
            _ => (Some(text), 1),
        };
        let (whole, part) = match number.and_then(|number| number.split_once('.')) {
            Some((whole, part)) => (whole, part),
            None => (number.unwrap_or_default(), "0"),
        };
        let digits = |text: &str| {
            let fits = (1..=15).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
            fits.then(|| text.parse::<u64>().ok()).flatten()
        };
        let (Some(ones), Some(parts)) = (digits(whole), digits(part)) else {
            return Err(expected());
        };
        let scale = 10_u64.pow(u32::try_from(part.len()).unwrap_or(0));
        let whole = ones.checked_mul(factor);
        // 1.5k is 1,500; 1.5 is no number of things.
        let parts = parts.checked_mul(factor).filter(|all| all % scale == 0);
        whole
            .zip(parts)
            .and_then(|(whole, parts)| whole.checked_add(parts / scale))
            .filter(|count| *count <= COUNT_MAX)
            .and_then(NonZeroU64::new)
            .map(Self)
            .ok_or_else(expected)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.get();
        for (unit, factor) in [("G", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)] {
            if count.is_multiple_of(factor) {
                return write!(f, "{}{unit}", count / factor);
            }
        }
        write!(f, "{count}")
    }
}

impl fmt::Debug for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number such as 200000, 200k or 1.5M")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Count, E> {
                NonZeroU64::new(number)
                    .filter(|number| number.get() <= COUNT_MAX)
                    .map(Count)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(number), &self))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Count, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Count, E> {
                let wrong = |_why| E::invalid_value(de::Unexpected::Str(text), &self);
                text.parse().map_err(wrong)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get())
    }
}

impl JsonSchema for Count {
    fn schema_name() -> Cow<'static, str> {
        "Count".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["integer", "string"],
            "format": "count",
            "minimum": 1,
            "maximum": COUNT_MAX,
        })
    }
}

/// So many in a time: `60/min`, `200k/min`, `5/s`, `1000/day`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rate {
    /// How many.
    pub count: Count,
    /// In which time.
    pub per: Per,
}

/// The time of a [`Rate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Per {
    /// A second.
    Second,
    /// A minute.
    Minute,
    /// An hour.
    Hour,
    /// 24 hours.
    Day,
}

impl Per {
    /// Returns how long it is.
    pub const fn length(self) -> Duration {
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3600,
            Self::Day => 24 * 3600,
        })
    }

    /// Returns the word behind the slash.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Second => "s",
            Self::Minute => "min",
            Self::Hour => "h",
            Self::Day => "day",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "s" | "sec" | "second" => Self::Second,
            "m" | "min" | "minute" => Self::Minute,
            "h" | "hour" => Self::Hour,
            "d" | "day" => Self::Day,
            _ => return None,
        })
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(count, per)| {
            let count = count.trim_end().parse().ok()?;
            let per = Per::parse(per.trim_start())?;
            Some(Self { count, per })
        });
        let expected =
            "a rate such as 60/min, 200k/min, 5/s or 1000/day, of a whole number above 0";
        parsed.ok_or_else(|| expected.to_owned())
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, self.per.as_str())
    }
}

impl fmt::Debug for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

by_text!(Rate, "rate");

/// A sum of money in whatever currency the reader has in mind: `2.50`. Exact to
/// a billionth of its unit.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(pub u64);

impl Money {
    /// Makes a sum from a number of whole units; `None` if it is negative or
    /// more than a billion.
    pub fn new(units: f64) -> Option<Self> {
        if !(0.0..=MONEY_MAX).contains(&units) {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the range has just been checked"
        )]
        let nanos = (units * NANOS).round() as u64;
        Some(Self(nanos))
    }

    /// Returns the sum in whole units.
    pub fn units(self) -> f64 {
        #[expect(
            clippy::cast_precision_loss,
            reason = "for people, who read no more than six digits of it"
        )]
        let nanos = self.0 as f64;
        nanos / NANOS
    }
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = format!("{:.6}", self.units());
        // 2.5 is written 2.50, and 0.000123 in full.
        let cut = short.trim_end_matches('0');
        let least = short.find('.').map_or(short.len(), |dot| dot + 3);
        let end = cut.len().max(least).min(short.len());
        f.write_str(short.get(..end).unwrap_or(&short))
    }
}

impl fmt::Debug for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let units = f64::deserialize(deserializer)?;
        Self::new(units).ok_or_else(|| {
            let found = de::Unexpected::Float(units);
            de::Error::invalid_value(found, &"a sum of money such as 2.50")
        })
    }
}

impl Serialize for Money {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.units())
    }
}

impl JsonSchema for Money {
    fn schema_name() -> Cow<'static, str> {
        "Money".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "minimum": 0, "maximum": 1_000_000_000 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_may_have_a_suffix() {
        for (text, count) in [
            ("1", 1),
            ("200k", 200_000),
            ("1.5M", 1_500_000),
            ("0.5k", 500),
            ("1G", 1_000_000_000),
            ("1000G", COUNT_MAX),
        ] {
            let parsed: Count = text.parse().unwrap();
            assert_eq!(parsed.get(), count, "{text}");
            assert_eq!(parsed.to_string().parse(), Ok(parsed), "{text}");
        }
        for text in [
            "",
            "k",
            "0",
            "0k",
            "-1",
            "+1",
            "1.5",
            "1.0001k",
            "1 k",
            "1K",
            "1e3",
            "1001G",
            ".5k",
            "1.k",
            "99999999999999999999",
            "999999999999999G",
        ] {
            assert!(text.parse::<Count>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_count_may_be_a_bare_number_in_yaml() {
        let parsed: Vec<Count> = serde_yaml::from_str("[5, 5k, \"7\"]").unwrap();
        let counts: Vec<u64> = parsed.into_iter().map(Count::get).collect();
        assert_eq!(counts, [5, 5000, 7]);
        for text in ["0", "-1", "1.5", "true", "1000000000001"] {
            assert!(serde_yaml::from_str::<Count>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rate_is_a_count_in_a_time() {
        for (text, shown) in [
            ("60/min", "60/min"),
            ("200k/min", "200k/min"),
            ("60 / m", "60/min"),
            ("5/second", "5/s"),
            ("1000/day", "1k/day"),
            ("7/hour", "7/h"),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(rate.to_string(), shown);
            assert_eq!(shown.parse(), Ok(rate));
        }
        for text in [
            "60",
            "0/min",
            "-5/min",
            "60/",
            "/min",
            "60/week",
            "60/min/min",
            "6 0/s",
        ] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn money_is_exact_to_the_billionth_and_shown_to_the_millionth() {
        for (units, nanos, shown) in [
            (2.5, 2_500_000_000, "2.50"),
            (0.0, 0, "0.00"),
            (0.000_123, 123_000, "0.000123"),
            (1e9, 1_000_000_000_000_000_000, "1000000000.00"),
            (19.99, 19_990_000_000, "19.99"),
        ] {
            let money = Money::new(units).unwrap();
            assert_eq!(money.0, nanos);
            assert_eq!(money.to_string(), shown);
        }
        for wrong in [-0.01, 1e9 + 1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(Money::new(wrong), None, "{wrong}");
        }
    }
}
