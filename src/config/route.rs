//! `routes`: which groups serve a model.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::PluginEntry;

/// Which groups serve a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["model"]))]
pub struct Route {
    /// A model's name, or a pattern in which `*` stands for anything.
    #[schemars(extend("format" = "pattern"))]
    pub model: String,
    /// The groups, in the order in which they are tried.
    pub groups: Vec<String>,
    /// The group that is tried last, and at least once.
    pub fallback: Option<String>,
    /// What the model is called in a group: group → model.
    #[schemars(extend("additionalProperties" = {"type": "string", "format": "model"}))]
    pub rewrite: IndexMap<String, String>,
    /// Whether only groups marked `local` may serve it.
    pub local: bool,
    /// Its own list of plugins, in place of the general one.
    #[schemars(extend("format" = "plugins"))]
    pub plugins: Option<Vec<PluginEntry>>,
}
