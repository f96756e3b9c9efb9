//! One line of a plugin list: `- auth: { keys_file: keys.yaml }`, `- auth: none`
//! or just `- access_log`.

use std::borrow::Cow;

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::Value;

/// A plugin's name and its settings.
///
/// What stands under the name is the plugin's own affair: the validator checks
/// it against the plugin's schema, the plugin reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginEntry {
    /// The plugin's name in the one list.
    pub name: String,
    /// Its settings; `Null` where only the name is given.
    pub config: Value,
}

impl<'de> Deserialize<'de> for PluginEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Shape {
            Name(String),
            Map(IndexMap<String, Value>),
        }
        match Shape::deserialize(deserializer)? {
            Shape::Name(name) => Ok(Self {
                name,
                config: Value::Null,
            }),
            Shape::Map(map) => {
                let mut entries = map.into_iter();
                match (entries.next(), entries.next()) {
                    (Some((name, config)), None) => Ok(Self { name, config }),
                    _ => Err(D::Error::custom("expected one plugin: NAME: settings")),
                }
            }
        }
    }
}

impl Serialize for PluginEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.config.is_null() {
            serializer.serialize_str(&self.name)
        } else {
            serializer.collect_map([(&self.name, &self.config)])
        }
    }
}

impl JsonSchema for PluginEntry {
    fn schema_name() -> Cow<'static, str> {
        "PluginEntry".into()
    }

    fn inline_schema() -> bool {
        true
    }

    /// Anything: the catalogue of plugins puts the real schema in its place.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "format": "plugin" })
    }
}
