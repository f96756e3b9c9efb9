//! What one caller may use: of requests and tokens in a time, and of tokens and
//! money in a day and a month.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Count, Money, Rate};

/// The limits of one caller; what is absent has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests in a time.
    pub requests: Option<Rate>,
    /// Tokens in a time.
    pub tokens: Option<Rate>,
    /// Requests at once.
    pub concurrent: Option<NonZeroU32>,
}

impl KeyLimits {
    /// Returns whether there is no limit at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns what a rule comes to for who has these limits: each takes the
    /// place of the rule's own of the same kind and the same time, and stands
    /// where the rule has none of its kind.
    #[must_use]
    pub fn in_place_of(self, rule: Self) -> Self {
        let rate = |own: Option<Rate>, rule: Option<Rate>| match (own, rule) {
            (Some(own), Some(rule)) if own.per != rule.per => Some(rule),
            (own, rule) => own.or(rule),
        };
        Self {
            requests: rate(self.requests, rule.requests),
            tokens: rate(self.tokens, rule.tokens),
            concurrent: self.concurrent.or(rule.concurrent),
        }
    }
}

/// What a caller may use in a day, and in a month; both hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// From midnight to midnight.
    pub day: Allowance,
    /// From the first to the last day of a month.
    pub month: Allowance,
}

impl Budget {
    /// Returns whether it bounds nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns this budget, and the other's where this one says nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            day: self.day.or(other.day),
            month: self.month.or(other.month),
        }
    }
}

/// How much may be used in one period; what is absent is not bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Allowance {
    /// Tokens, of prompts and answers together.
    pub tokens: Option<Count>,
    /// Money, by `prices`; more than 0.
    #[schemars(range(min = 0.000_001, max = 1_000_000_000))]
    pub money: Option<Money>,
}

impl Allowance {
    fn or(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.or(other.tokens),
            money: self.money.or(other.money),
        }
    }
}
