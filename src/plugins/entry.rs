//! One line of the list of plugins: a name, a schema, and how it is built.

use std::{fmt, sync::Arc};

use schemars::{Schema, schema_for};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Build, ConfigError, Configure, OnFailure, PLUGINS, Plugin};
use crate::config::PluginEntry;

/// The key that every plugin's settings have, unless it must not be left out.
const ON_FAILURE: &str = "on_failure";

/// One line of [`PLUGINS`].
pub struct Entry {
    /// The plugin's name.
    pub name: &'static str,
    /// Makes the JSON Schema of its settings.
    pub schema: fn() -> Schema,
    on_failure: OnFailure,
    build: BuildFn,
}

/// Builds a plugin from its settings.
type BuildFn = fn(Value, &Build<'_>) -> Result<Arc<dyn Plugin>, ConfigError>;

/// A plugin, and what else its settings say.
pub(super) struct Built {
    pub(super) name: &'static str,
    pub(super) plugin: Arc<dyn Plugin>,
    pub(super) on_failure: OnFailure,
}

impl Entry {
    pub(super) const fn of<P: Configure>() -> Self {
        Self {
            name: P::NAME,
            schema: || {
                let mut schema = schema_for!(P::Config);
                if P::MAY_FAIL_OPEN
                    && let Some(schema) = schema.as_object_mut()
                {
                    describe_on_failure(schema, P::ON_FAILURE);
                }
                schema
            },
            on_failure: P::ON_FAILURE,
            build: |config, build| {
                // The name alone: all as it is by default.
                let config = match config {
                    Value::Null => json!({}),
                    given => given,
                };
                let config = serde_json::from_value(config).map_err(|why| ConfigError {
                    path: P::NAME.to_owned(),
                    message: why.to_string(),
                })?;
                Ok(Arc::new(P::configure(config, build)?))
            },
        }
    }

    /// Builds the plugin of one entry of the YAML.
    ///
    /// # Errors
    /// There is no such plugin, or its settings make no sense.
    pub(super) fn build(entry: &PluginEntry, build: &Build<'_>) -> Result<Built, ConfigError> {
        let known = PLUGINS.iter().find(|known| known.name == entry.name);
        let Some(known) = known else {
            let names: Vec<_> = PLUGINS.iter().map(|known| known.name).collect();
            return Err(ConfigError {
                path: entry.name.clone(),
                message: format!("expected one of the plugins: {}", names.join(", ")),
            });
        };
        let mut settings = entry.config.clone();
        // The schema has seen that it is one of the two words.
        let named = settings
            .as_object_mut()
            .and_then(|settings| settings.shift_remove(ON_FAILURE))
            .and_then(|word| OnFailure::deserialize(word).ok());
        Ok(Built {
            name: known.name,
            plugin: (known.build)(settings, build)?,
            on_failure: named.unwrap_or(known.on_failure),
        })
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Adds the common key to a schema of settings: to each of its forms, also where
/// that is a definition of its own.
fn describe_on_failure(root: &mut Map<String, Value>, default: OnFailure) {
    for name in referred_to(root) {
        let definition = root
            .get_mut("$defs")
            .and_then(|all| all.get_mut(&name))
            .and_then(Value::as_object_mut);
        if let Some(definition) = definition {
            add_key(definition, default);
        }
    }
    for forms in ["anyOf", "oneOf"] {
        if let Some(Value::Array(forms)) = root.get_mut(forms) {
            for form in forms.iter_mut().filter_map(Value::as_object_mut) {
                add_key(form, default);
            }
        }
    }
    add_key(root, default);
}

/// Returns the names of the definitions that are forms of the whole.
fn referred_to(root: &Map<String, Value>) -> Vec<String> {
    let forms = ["anyOf", "oneOf"].into_iter();
    let forms = forms.filter_map(|key| root.get(key)?.as_array()).flatten();
    let references = forms
        .filter_map(Value::as_object)
        .chain([root])
        .filter_map(|form| form.get("$ref")?.as_str());
    let names = references.filter_map(|reference| reference.strip_prefix("#/$defs/"));
    names.map(str::to_owned).collect()
}

/// Adds the key to a schema of a mapping; others are left alone.
fn add_key(schema: &mut Map<String, Value>, default: OnFailure) {
    if schema.get("type").is_none_or(|kind| kind != "object") {
        return;
    }
    let word = match default {
        OnFailure::Open => "open",
        OnFailure::Closed => "closed",
    };
    let properties = schema.entry("properties").or_insert_with(|| json!({}));
    if let Some(properties) = properties.as_object_mut() {
        let of_key = json!({
            "description": "What becomes of a request when the plugin itself fails: it goes on as if the plugin were not there (`open`), or is refused (`closed`).",
            "type": "string",
            "enum": ["open", "closed"],
            "default": word,
        });
        properties.insert(ON_FAILURE.to_owned(), of_key);
    }
}
