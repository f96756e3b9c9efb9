//! `upgrade`: how another process takes this one's place.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Time;

/// How long the two processes of an upgrade may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Upgrade {
    /// How long the new process has to load everything; beyond it the old one
    /// stays.
    #[schemars(extend("x-min" = "1s", "x-max" = "10m"))]
    pub prepare: Time,
    /// How long requests under way then have to end in the old process; what is
    /// left gets an error. Absent: `limits.stream_timeout`.
    #[schemars(extend("x-min" = "0s", "x-max" = "24h"))]
    pub drain: Option<Time>,
}

impl Default for Upgrade {
    fn default() -> Self {
        Self {
            prepare: Time::secs(30),
            drain: None,
        }
    }
}
