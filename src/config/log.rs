//! `log`: what the log looks like and where it goes.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Size;

/// The log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The least severe level that is written.
    pub level: LogLevel,
    /// How a line looks. Restart to change.
    pub format: LogFormat,
    /// A file that gets the lines too, beside standard error. Restart to change.
    #[schemars(extend("minLength" = 1))]
    pub file: Option<PathBuf>,
    /// The size at which the file is rotated.
    #[schemars(extend("x-min" = "4KiB", "x-max" = "10GiB"))]
    pub rotate_size: Size,
    /// How many rotated files are kept beside the current one.
    #[schemars(range(min = 1, max = 1000))]
    pub rotate_keep: u32,
    /// One line per request.
    pub access: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: LogLevel::Info,
            format: LogFormat::Text,
            file: None,
            rotate_size: Size(10_000_000),
            rotate_keep: 5,
            access: true,
        }
    }
}

/// A level of the log; `error` is the quietest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Someone should act.
    Error,
    /// It was coped with.
    Warn,
    /// State changed.
    Info,
    /// One request.
    Debug,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}
