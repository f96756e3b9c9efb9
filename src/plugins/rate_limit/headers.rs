//! What callers are told of their limits, in OpenAI's header fields and formats.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::table::{Left, Standing};

/// The three fields of one limit.
struct Fields {
    limit: HeaderName,
    remaining: HeaderName,
    reset: HeaderName,
}

const REQUESTS: Fields = Fields {
    limit: HeaderName::from_static("x-ratelimit-limit-requests"),
    remaining: HeaderName::from_static("x-ratelimit-remaining-requests"),
    reset: HeaderName::from_static("x-ratelimit-reset-requests"),
};
const TOKENS: Fields = Fields {
    limit: HeaderName::from_static("x-ratelimit-limit-tokens"),
    remaining: HeaderName::from_static("x-ratelimit-remaining-tokens"),
    reset: HeaderName::from_static("x-ratelimit-reset-tokens"),
};

/// Which rule's figures are shown where several have some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Show {
    /// Those with the least left.
    Tightest,
    /// These: the request was refused for them.
    These,
}

/// Puts the figures into the head of the answer.
pub(super) fn show(standing: Standing, which: Show, reply: &mut HeaderMap) {
    put(standing.requests, &REQUESTS, which, reply);
    put(standing.tokens, &TOKENS, which, reply);
}

fn put(left: Option<Left>, fields: &Fields, which: Show, reply: &mut HeaderMap) {
    let Some(left) = left else {
        return;
    };
    let shown = reply
        .get(&fields.remaining)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if which == Show::Tightest && shown.is_some_and(|shown| shown <= left.remaining) {
        return;
    }
    reply.insert(fields.limit.clone(), left.limit.into());
    reply.insert(fields.remaining.clone(), left.remaining.into());
    if let Ok(reset) = HeaderValue::from_str(&in_words(left.reset)) {
        reply.insert(fields.reset.clone(), reset);
    }
}

/// Writes a time as OpenAI does, rounded up to the millisecond: `120ms`,
/// `8.64s`, `6m0s`, `1h0m0s`.
pub(super) fn in_words(time: Duration) -> String {
    let millis = time.as_nanos().div_ceil(1_000_000);
    if millis == 0 {
        return "0s".to_owned();
    }
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let (whole, part) = (millis / 1000, millis % 1000);
    let part = match part {
        0 => String::new(),
        part => format!(".{part:03}").trim_end_matches('0').to_owned(),
    };
    let (hours, minutes, seconds) = (whole / 3600, whole / 60 % 60, whole % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}{part}s"),
        (0, _) => format!("{minutes}m{seconds}{part}s"),
        _ => format!("{hours}h{minutes}m{seconds}{part}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_openai_writes_them() {
        for (micros, text) in [
            (0, "0s"),
            (1, "1ms"),
            (120_000, "120ms"),
            (999_001, "1s"),
            (1_000_000, "1s"),
            (8_640_000, "8.64s"),
            (59_999_500, "1m0s"),
            (360_000_000, "6m0s"),
            (372_050_000, "6m12.05s"),
            (86_400_000_000, "24h0m0s"),
        ] {
            assert_eq!(in_words(Duration::from_micros(micros)), text);
        }
    }

    #[test]
    fn of_several_rules_the_tightest_is_shown() {
        let left = |remaining| Standing {
            requests: Some(Left {
                limit: remaining * 2,
                remaining,
                reset: Duration::from_secs(1),
            }),
            tokens: None,
        };
        let mut reply = HeaderMap::new();
        for (remaining, which, shown) in [
            (5, Show::Tightest, "10"),
            (7, Show::Tightest, "10"),
            (3, Show::Tightest, "6"),
            (9, Show::These, "18"),
        ] {
            show(left(remaining), which, &mut reply);
            assert_eq!(reply["x-ratelimit-limit-requests"], shown);
        }
        assert_eq!(reply["x-ratelimit-remaining-requests"], "9");
        assert_eq!(reply["x-ratelimit-reset-requests"], "1s");
        assert!(!reply.contains_key("x-ratelimit-limit-tokens"));
    }
}
