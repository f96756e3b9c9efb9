//! The JSON Schema of the configuration: for `forebay schema`, for editors, and
//! for the marked pass, which checks every file against it.
//!
//! The structs say what they hold by their derives; what only the floors above
//! know (which strategies and plugins there are) comes in as a [`Catalog`].
//!
//! Two forms exist. The inner one has keywords of our own: `format`s such as
//! `size` and `base_url`, whose checks are in `formats`, and `x-min` / `x-max`
//! for values with a unit. The published one ([`schema()`]) says the same in
//! standard keywords, as far as those reach.

use schemars::{Schema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{Config, formats};

/// What this build of Forebay has at its extension points.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// The names of the strategies, aliases included.
    pub strategies: Vec<&'static str>,
    /// The plugins: name, and the schema of what stands under it.
    pub plugins: Vec<(&'static str, Schema)>,
    /// Whether only the service itself has its credentials: whoever checks its
    /// configuration from outside takes them for granted.
    pub credentials_elsewhere: bool,
}

/// Returns the JSON Schema (draft 2020-12) that is published.
pub fn schema(catalog: &Catalog) -> Value {
    let mut root = inner(catalog);
    walk(&mut root, &mut publish);
    if let Some(root) = root.as_object_mut() {
        let dialect = root.shift_remove("$schema").unwrap_or_default();
        root.shift_insert(0, "$schema".to_owned(), dialect);
        root.shift_insert(1, "title".to_owned(), json!("Forebay configuration"));
    }
    root
}

/// Returns the schema with the keywords that the marked pass knows.
pub(super) fn inner(catalog: &Catalog) -> Value {
    let mut root = SchemaSettings::draft2020_12()
        .into_generator()
        .into_root_schema_for::<Config>()
        .to_value();
    let (defs, entry) = plugin_schemas(catalog);
    walk(
        &mut root,
        &mut |schema| match schema.get("format").and_then(Value::as_str) {
            Some("strategy") => {
                schema.insert("enum".to_owned(), json!(catalog.strategies));
            }
            Some("plugins") => {
                schema.insert("items".to_owned(), entry.clone());
            }
            _ => {}
        },
    );
    if let Some(root) = root.as_object_mut() {
        let all = root.entry("$defs").or_insert_with(|| json!({}));
        if let Some(all) = all.as_object_mut() {
            all.extend(defs);
        }
    }
    root
}

/// Returns the definitions of the plugins' settings, and the schema of one
/// entry of a plugin list.
fn plugin_schemas(catalog: &Catalog) -> (Map<String, Value>, Value) {
    let mut defs = Map::new();
    let mut bare = Vec::new();
    let mut settings = Map::new();
    for (name, schema) in &catalog.plugins {
        let mut schema = schema.clone().to_value();
        let home = format!("plugin.{name}");
        walk(&mut schema, &mut |schema| {
            if let Some(Value::String(reference)) = schema.get_mut("$ref") {
                *reference = match reference.strip_prefix("#/$defs/") {
                    Some(def) => format!("#/$defs/{home}.{def}"),
                    None => format!("#/$defs/{home}"),
                };
            }
        });
        if let Some(schema) = schema.as_object_mut() {
            schema.remove("$schema");
            if let Some(Value::Object(own)) = schema.remove("$defs") {
                defs.extend(own.into_iter().map(|(k, v)| (format!("{home}.{k}"), v)));
            }
        }
        if needs_nothing(&schema) {
            bare.push(*name);
        }
        settings.insert(
            (*name).to_owned(),
            json!({ "$ref": format!("#/$defs/{home}") }),
        );
        defs.insert(home, schema);
    }
    let map = json!({
        "type": "object",
        "properties": settings,
        "additionalProperties": false,
        "minProperties": 1,
        "maxProperties": 1,
    });
    let entry = if bare.is_empty() {
        map
    } else {
        json!({ "anyOf": [map, { "type": "string", "enum": bare }] })
    };
    (defs, entry)
}

/// Returns whether a plugin works by its name alone.
fn needs_nothing(schema: &Value) -> bool {
    let required = || schema.get("required").and_then(Value::as_array);
    let branches = || schema.get("anyOf").or_else(|| schema.get("oneOf"));
    if let Some(branches) = branches().and_then(Value::as_array) {
        return branches.iter().any(needs_nothing);
    }
    match schema.get("type") {
        Some(Value::String(one)) if one == "object" => required().is_none_or(Vec::is_empty),
        Some(Value::String(one)) => one == "null",
        Some(Value::Array(some)) => some.iter().any(|one| one == "null"),
        _ => schema.as_object().is_some_and(Map::is_empty) || schema == &Value::Bool(true),
    }
}

/// Calls `visit` with a schema and every schema within it. Keys of objects that
/// happen to be called `format` are not taken for the keyword.
fn walk(schema: &mut Value, visit: &mut dyn FnMut(&mut Map<String, Value>)) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    visit(map);
    for (keyword, value) in map {
        match (keyword.as_str(), value) {
            ("properties" | "patternProperties" | "$defs", Value::Object(named)) => {
                named.values_mut().for_each(|one| walk(one, visit));
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems", Value::Array(list)) => {
                list.iter_mut().for_each(|one| walk(one, visit));
            }
            ("items" | "additionalProperties" | "propertyNames" | "not", one) => walk(one, visit),
            _ => {}
        }
    }
}

/// Says in standard keywords what our own say. A `format` of ours would be
/// taken for another by editors: JSON Schema's `duration` is `PT30S`.
fn publish(schema: &mut Map<String, Value>) {
    let format = match schema.remove("format") {
        Some(Value::String(format)) => format,
        _ => String::new(),
    };
    let pattern = formats::json_schema_pattern(&format);
    match (format.as_str(), pattern) {
        ("cidrs" | "patterns", Some(pattern)) => {
            schema.insert(
                "items".to_owned(),
                json!({ "type": "string", "pattern": pattern }),
            );
        }
        (_, Some(pattern)) => {
            schema.insert("pattern".to_owned(), json!(pattern));
        }
        _ => {}
    }
    let mut bound = |key| match schema.shift_remove(key) {
        Some(Value::String(bound)) => Some(bound),
        _ => None,
    };
    if let (Some(min), Some(max)) = (bound("x-min"), bound("x-max")) {
        let description = schema.entry("description").or_insert_with(|| json!(""));
        let text = description.as_str().unwrap_or_default();
        *description = json!(format!("{text} From {min} to {max}.").trim_start());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use schemars::{JsonSchema, schema_for};
    use serde::Deserialize;

    use super::*;

    /// Stands in for a real plugin's settings.
    #[derive(Deserialize, JsonSchema)]
    #[serde(untagged)]
    #[expect(dead_code, reason = "only its schema is looked at")]
    enum AuthExample {
        /// Nobody is asked who they are.
        None(NoneExample),
        /// Keys are looked up.
        Keys(KeysExample),
    }

    #[derive(Deserialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    enum NoneExample {
        None,
    }

    #[derive(Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only its schema is looked at")]
    struct KeysExample {
        /// The file of keys.
        keys_file: String,
        /// Failures a minute before an address has to wait.
        #[serde(default = "ten")]
        #[schemars(range(min = 1, max = 10_000))]
        failures_per_minute: u32,
    }

    fn ten() -> u32 {
        10
    }

    /// A small catalogue, made by hand: what floor 3 hands in.
    pub(in super::super) fn example() -> Catalog {
        Catalog {
            credentials_elsewhere: false,
            strategies: vec!["round_robin", "random", "least_connections", "least_used"],
            plugins: vec![("auth", schema_for!(AuthExample))],
        }
    }

    #[test]
    fn every_reference_leads_to_a_definition() {
        let mut root = schema(&example());
        let whole = root.clone();
        let mut seen = 0;
        walk(&mut root, &mut |schema| {
            if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
                seen += 1;
                let pointer = reference.strip_prefix('#').unwrap();
                assert!(whole.pointer(pointer).is_some(), "{reference}");
            }
        });
        assert!(seen > 5, "{seen}");
    }

    #[test]
    fn what_is_published_has_no_keyword_of_our_own() {
        let mut root = schema(&example());
        walk(&mut root, &mut |schema| {
            assert!(!schema.contains_key("format"), "{schema:?}");
            assert!(
                schema.keys().all(|key| !key.starts_with("x-")),
                "{schema:?}"
            );
        });
        assert_eq!(
            root["$schema"],
            "https://json-schema.org/draft/2020-12/schema"
        );
    }

    #[test]
    fn editors_learn_strategies_plugins_defaults_and_descriptions() {
        let root = schema(&example());
        let defs = &root["$defs"];
        let strategy = &defs["Group"]["properties"]["strategy"];
        assert_eq!(strategy["enum"][3], "least_used");
        assert_eq!(strategy["default"], "round_robin");
        let entry = &root["properties"]["plugins"]["items"];
        assert_eq!(entry["properties"]["auth"]["$ref"], "#/$defs/plugin.auth");
        let body = &defs["Limits"]["properties"]["body"];
        assert_eq!(body["default"], "32MiB");
        assert_eq!(
            body["description"],
            "The largest request body; 413 beyond it. From 1KiB to 1GiB."
        );
    }

    #[test]
    fn every_key_is_described() {
        let root = schema(&example());
        let mut keys = 0;
        let all = root["$defs"].as_object().unwrap().values();
        for schema in all.chain([&root]) {
            let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
                continue;
            };
            for (key, property) in properties {
                keys += 1;
                assert!(property.get("description").is_some(), "{key}");
            }
        }
        assert!(keys > 50, "{keys}");
    }
}
