//! `breaker`, `check`, `retries`: when an upstream is left alone, how that is
//! found out, and how much may be tried again.
//!
//! All of it stands on a group; what concerns one upstream (`breaker`, `check`,
//! `cooldown`, `slow_start`) may stand on that upstream, and then takes the
//! place of the group's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Share, Time};

/// When failures of an upstream, with one model, stop the traffic to it.
///
/// Three rules, each one line: N failures in a row (`failures`), a share of
/// failures in a window with a minimum volume (`share`, `volume`), N failures in
/// a window (`errors`). Without any of them named, 5 in a row and 50 % of at
/// least 20 in 30 s hold; as soon as one is named, only what is named holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Breaker {
    /// Whether there is one.
    pub enabled: bool,
    /// Failures in a row that open it.
    #[schemars(range(min = 1, max = 10_000))]
    pub failures: Option<u32>,
    /// The share of failures in `window` that opens it.
    #[schemars(extend("x-min" = "1%", "x-max" = "100%"))]
    pub share: Option<Share>,
    /// The fewest requests in `window` for `share` to mean anything.
    #[schemars(range(min = 1, max = 100_000))]
    pub volume: u32,
    /// Failures in `window` that open it, whatever succeeds in between.
    #[schemars(range(min = 1, max = 10_000))]
    pub errors: Option<u32>,
    /// The time over which `share` and `errors` count.
    #[schemars(extend("x-min" = "100ms", "x-max" = "24h"))]
    pub window: Time,
    /// How long nobody goes there after it opened; 5 s if absent. Then one
    /// request at a time tries, and the time doubles with each that fails.
    #[schemars(extend("x-min" = "10ms", "x-max" = "24h"))]
    pub open: Option<Time>,
    /// The longest such time; never less than `open`.
    #[schemars(extend("x-min" = "10ms", "x-max" = "24h"))]
    pub open_max: Time,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            enabled: true,
            failures: None,
            share: None,
            volume: 20,
            errors: None,
            window: Time::secs(30),
            open: None,
            open_max: Time::secs(60),
        }
    }
}

/// How an upstream is asked whether it is well; costs it no token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Check {
    /// Whether it is asked at all.
    pub enabled: bool,
    /// What is asked for, from the root of the server; only 2xx is good then.
    /// Absent, it is what the upstream's kind has: `/health`, `/api/version`,
    /// or the list of models.
    #[schemars(extend("format" = "path"))]
    pub path: Option<String>,
    /// How often, ± 20 %.
    #[schemars(extend("x-min" = "100ms", "x-max" = "1h"))]
    pub every: Time,
    /// How long an answer may take, connecting included.
    #[schemars(extend("x-min" = "10ms", "x-max" = "1m"))]
    pub timeout: Time,
    /// Bad answers in a row that take it down.
    #[schemars(range(min = 1, max = 100))]
    pub fall: u32,
    /// Good answers in a row that bring it back.
    #[schemars(range(min = 1, max = 100))]
    pub rise: u32,
}

impl Default for Check {
    fn default() -> Self {
        Self {
            enabled: true,
            path: None,
            every: Time::secs(5),
            timeout: Time::secs(2),
            fall: 3,
            rise: 2,
        }
    }
}

/// How much of a group's traffic may be tries after the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retries {
    /// The share of the requests under way that may be retries, and of those of
    /// the last ten seconds that may have been.
    #[schemars(extend("x-min" = "0%", "x-max" = "100%"))]
    pub share: Share,
    /// Retries that are allowed in any case: at once, and per second.
    #[schemars(range(max = 10_000))]
    pub min: u32,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            share: Share(20),
            min: 3,
        }
    }
}
