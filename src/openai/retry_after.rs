//! How long an upstream that refused wants to be left alone, in every spelling
//! that is in use.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;

/// Nobody is believed beyond this.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// The headers that say when a limit is reset, beside those that say how much
/// of it is left.
const RESETS: [(&str, &str); 8] = [
    (
        "x-ratelimit-reset-requests",
        "x-ratelimit-remaining-requests",
    ),
    ("x-ratelimit-reset-tokens", "x-ratelimit-remaining-tokens"),
    (
        "anthropic-ratelimit-requests-reset",
        "anthropic-ratelimit-requests-remaining",
    ),
    (
        "anthropic-ratelimit-tokens-reset",
        "anthropic-ratelimit-tokens-remaining",
    ),
    (
        "anthropic-ratelimit-input-tokens-reset",
        "anthropic-ratelimit-input-tokens-remaining",
    ),
    (
        "anthropic-ratelimit-output-tokens-reset",
        "anthropic-ratelimit-output-tokens-remaining",
    ),
    ("x-ratelimit-reset", "x-ratelimit-remaining"),
    ("ratelimit-reset", "ratelimit-remaining"),
];

/// Returns how long to wait from `now`, 0 s..=24 h; `None` if the headers do not
/// say. For refusals (429, 503, 529) alone: an answer that succeeded may state
/// when its limits are reset, too, and means nothing by it.
///
/// `retry-after-ms` and `x-ms-retry-after-ms` go before `retry-after` (seconds or
/// a date). Only without these count the resets of limits: the longest of those
/// that are used up, else the shortest of all.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    for name in ["retry-after-ms", "x-ms-retry-after-ms"] {
        if let Some(wait) = text(name).and_then(|ms| number(ms, 0.001)) {
            return Some(wait);
        }
    }
    if let Some(wait) = text("retry-after").and_then(|value| {
        number(value, 1.0)
            .or_else(|| go_duration(value))
            .or_else(|| date(value, now))
    }) {
        return Some(wait);
    }
    let mut used_up: Option<Duration> = None;
    let mut any: Option<Duration> = None;
    for (reset, remaining) in RESETS {
        let Some(wait) = text(reset).and_then(|value| moment(value, now)) else {
            continue;
        };
        let left = text(remaining).and_then(|left| left.parse::<f64>().ok());
        if left.is_some_and(|left| left <= 0.0) {
            used_up = Some(used_up.map_or(wait, |other| other.max(wait)));
        }
        any = Some(any.map_or(wait, |other| other.min(wait)));
    }
    used_up.or(any)
}

/// Reads when a limit is reset. Zero and less say nothing: some vendors send
/// them with every answer.
fn moment(value: &str, now: SystemTime) -> Option<Duration> {
    let wait = match value.parse::<f64>() {
        // Too far away for a number of seconds from now: since 1970, in
        // seconds or in milliseconds.
        Ok(number) if number >= 1e9 => {
            let seconds = if number >= 1e12 { number / 1e3 } else { number };
            let then = UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
            clamp(then.duration_since(now).unwrap_or_default())
        }
        Ok(_) => number(value, 1.0)?,
        Err(_not_a_number) => go_duration(value).or_else(|| date(value, now))?,
    };
    (!wait.is_zero()).then_some(wait)
}

/// Reads a number of units of so many seconds; what is negative is 0.
fn number(value: &str, unit: f64) -> Option<Duration> {
    let is_number = value
        .bytes()
        .all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'+'));
    if !is_number {
        return None;
    }
    let seconds = value.parse::<f64>().ok()? * unit;
    let seconds = seconds.clamp(0.0, LONGEST.as_secs_f64());
    Duration::try_from_secs_f64(seconds).ok()
}

/// Reads a duration as Go writes it: `6m0s`, `1s`, `20ms`, `1h2m3.5s`.
fn go_duration(value: &str) -> Option<Duration> {
    let mut rest = value;
    let mut seconds = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (amount, tail) = rest.split_at_checked(digits)?;
        let letters = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(letters)?;
        let unit = match unit {
            "d" => 86_400.0,
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += amount.parse::<f64>().ok()? * unit;
        rest = tail;
    }
    if value.is_empty() {
        return None;
    }
    Duration::try_from_secs_f64(seconds.clamp(0.0, LONGEST.as_secs_f64())).ok()
}

/// Reads an HTTP date or an RFC 3339 one; what has passed is 0.
fn date(value: &str, now: SystemTime) -> Option<Duration> {
    let then = httpdate::parse_http_date(value)
        .ok()
        .or_else(|| rfc3339(value))?;
    Some(clamp(then.duration_since(now).unwrap_or_default()))
}

/// Reads `2026-11-21T02:50:33Z`, with or without a fraction, and with an offset
/// from UTC in place of the Z.
fn rfc3339(value: &str) -> Option<SystemTime> {
    let (day, time) = value.split_once(['T', 't', ' '])?;
    let (time, offset) = match time.strip_suffix(['Z', 'z']) {
        Some(time) => (time, 0),
        None => {
            let sign_at = time.rfind(['+', '-'])?;
            let (time, offset) = time.split_at_checked(sign_at)?;
            let (hours, minutes) = offset.get(1..)?.split_once(':')?;
            let seconds = decimal(hours, 23)? * 3600 + decimal(minutes, 59)? * 60;
            (
                time,
                if offset.starts_with('-') {
                    -seconds
                } else {
                    seconds
                },
            )
        }
    };
    let mut parts = day.splitn(3, '-');
    let year = decimal(parts.next()?, 9999)?;
    let month = decimal(parts.next()?, 12)?;
    let day = decimal(parts.next()?, 31)?;
    let mut parts = time.splitn(3, ':');
    let hour = decimal(parts.next()?, 23)?;
    let minute = decimal(parts.next()?, 59)?;
    let seconds = parts.next()?;
    let (second, fraction) = seconds.split_once('.').unwrap_or((seconds, "0"));
    let fraction = format!("0.{fraction}").parse::<f64>().ok()?;
    let second = decimal(second, 60)?;
    if month == 0 || day == 0 || year < 1970 {
        return None;
    }
    // Howard Hinnant's days_from_civil: years begin in March.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year / 400;
    let of_era = year - era * 400;
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset;
    let since = Duration::from_secs(u64::try_from(seconds).ok()?)
        .checked_add(Duration::try_from_secs_f64(fraction).ok()?)?;
    UNIX_EPOCH.checked_add(since)
}

/// Reads digits alone, up to `max`.
fn decimal(digits: &str, max: i64) -> Option<i64> {
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.parse::<i64>().ok()?;
    (plain && number <= max).then_some(number)
}

fn clamp(wait: Duration) -> Duration {
    wait.min(LONGEST)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    /// 2026-11-21T02:50:33Z, a Saturday.
    const NOW: u64 = 1_795_229_433;

    fn wait(headers: &[(&str, &str)]) -> Option<Duration> {
        let headers = headers
            .iter()
            .map(|(name, value)| {
                let name: HeaderName = name.parse().unwrap();
                (name, HeaderValue::from_str(value).unwrap())
            })
            .collect();
        retry_after(&headers, UNIX_EPOCH + Duration::from_secs(NOW))
    }

    fn millis(millis: u64) -> Option<Duration> {
        Some(Duration::from_millis(millis))
    }

    #[test]
    fn every_spelling_is_read() {
        for (name, value, expected) in [
            ("retry-after-ms", "250", 250),
            ("x-ms-retry-after-ms", "1500.5", 1500),
            ("retry-after", "7", 7000),
            ("retry-after", " 7 ", 7000),
            ("retry-after", "0.5", 500),
            ("retry-after", "0", 0),
            ("retry-after", "2s", 2000),
            ("retry-after", "Sat, 21 Nov 2026 02:51:33 GMT", 60_000),
            ("retry-after", "Sat, 21 Nov 2026 02:50:00 GMT", 0),
            ("retry-after", "Saturday, 21-Nov-26 02:51:33 GMT", 60_000),
            ("x-ratelimit-reset-requests", "6m0s", 360_000),
            ("x-ratelimit-reset-requests", "1s", 1000),
            ("x-ratelimit-reset-tokens", "20ms", 20),
            ("x-ratelimit-reset-tokens", "1h2m3.5s", 3_723_500),
            ("x-ratelimit-reset-tokens", "7.66s", 7660),
            ("x-ratelimit-reset-tokens", "12", 12_000),
            ("x-ratelimit-reset-tokens", "12.5", 12_500),
            ("x-ratelimit-reset", "1795229443", 10_000),
            ("x-ratelimit-reset", "1795229443000", 10_000),
            (
                "anthropic-ratelimit-requests-reset",
                "2026-11-21T02:51:03Z",
                30_000,
            ),
            (
                "anthropic-ratelimit-input-tokens-reset",
                "2026-11-21T02:50:34.25Z",
                1250,
            ),
            (
                "anthropic-ratelimit-output-tokens-reset",
                "2026-11-21T04:50:34+02:00",
                1000,
            ),
            (
                "anthropic-ratelimit-tokens-reset",
                "2026-11-20T21:50:34-05:00",
                1000,
            ),
        ] {
            let seen = wait(&[(name, value)]).unwrap();
            assert_eq!(seen.as_millis(), expected, "{name}: {value}");
        }
    }

    #[test]
    fn what_is_nonsense_says_nothing() {
        for value in [
            "",
            "soon",
            "1e3",
            "inf",
            "NaN",
            "--1",
            "6x",
            "m",
            "5m6",
            "2026-13-01T00:00:00Z",
            "2026-11-21",
            "0x10",
            "1969-01-01T00:00:00Z",
        ] {
            assert_eq!(wait(&[("retry-after", value)]), None, "{value}");
            assert_eq!(
                wait(&[("x-ratelimit-reset-tokens", value)]),
                None,
                "{value}"
            );
        }
        assert_eq!(wait(&[]), None);
    }

    #[test]
    fn nobody_is_believed_beyond_a_day_or_below_nothing() {
        for value in [
            "86401",
            "99999999999999999999999",
            "Fri, 31 Dec 9999 23:59:59 GMT",
            "100h",
        ] {
            assert_eq!(wait(&[("retry-after", value)]), Some(LONGEST), "{value}");
        }
        assert_eq!(wait(&[("retry-after", "-5")]), millis(0));
        assert_eq!(wait(&[("retry-after-ms", "-1")]), millis(0));
    }

    #[test]
    fn the_most_exact_spelling_goes_first() {
        let all = [
            ("retry-after", "7"),
            ("retry-after-ms", "6500"),
            ("x-ratelimit-reset-requests", "1h"),
        ];
        assert_eq!(wait(&all), millis(6500));
        assert_eq!(wait(&[all[0], all[2]]), millis(7000));
        assert_eq!(wait(&[("retry-after", "soon"), all[2]]), millis(3_600_000));
    }

    #[test]
    fn the_limit_that_is_used_up_decides() {
        let groq = [
            ("x-ratelimit-reset-requests", "2h"),
            ("x-ratelimit-remaining-requests", "900"),
            ("x-ratelimit-reset-tokens", "7s"),
            ("x-ratelimit-remaining-tokens", "0"),
        ];
        assert_eq!(wait(&groq), millis(7000));
        let both = [
            groq[0],
            ("x-ratelimit-remaining-requests", "0"),
            groq[2],
            groq[3],
        ];
        assert_eq!(wait(&both), millis(7_200_000));
        assert_eq!(wait(&[groq[0], groq[2]]), millis(7000));
        // Azure sends these with every answer.
        let azure = [
            ("x-ratelimit-remaining-tokens", "-1"),
            ("x-ratelimit-reset-tokens", "0"),
        ];
        assert_eq!(wait(&azure), None);
    }

    #[test]
    fn dates_are_reckoned_as_the_calendar_is() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("2026-11-21T02:50:33Z", NOW),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
        ] {
            let then = rfc3339(text).unwrap();
            assert_eq!(then, UNIX_EPOCH + Duration::from_secs(seconds), "{text}");
        }
    }
}
