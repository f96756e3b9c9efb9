//! `shutdown`: how the process stops.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Time;

/// How long things may take when the process is told to stop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// How long it goes on accepting after SIGTERM, while `/readyz` says 503: until
    /// every load balancer has seen it.
    #[schemars(extend("x-min" = "0s", "x-max" = "10m"))]
    pub lame_duck: Time,
    /// How long requests under way then have to end; what is left gets an error.
    #[schemars(extend("x-min" = "0s", "x-max" = "24h"))]
    pub drain: Time,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self {
            lame_duck: Time::secs(5),
            drain: Time::secs(300),
        }
    }
}
