//! The keywords of a JSON Schema, as the marked pass reads them, and what they
//! ask for in words.

use serde_json::{Map, Value};
use serde_yaml::Number;

use super::{formats, marked::Node, problem::shown};

/// The keywords of one schema.
pub(super) type Keywords = Map<String, Value>;

/// A whole schema, in which references are looked up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a>(pub(super) &'a Value);

impl<'a> Rules<'a> {
    /// Returns the keywords behind any `$ref`; `None` for a schema that is
    /// `true`, and for a reference that leads nowhere.
    pub(super) fn resolve(self, mut schema: &'a Value) -> Option<&'a Keywords> {
        // A chain of references is short; a circle is no schema.
        for _ in 0..16 {
            let keywords = schema.as_object()?;
            let Some(reference) = keywords.get("$ref").and_then(Value::as_str) else {
                return Some(keywords);
            };
            schema = self.0.pointer(reference.strip_prefix('#')?)?;
        }
        None
    }

    /// Returns whether a schema could be meant by a node, going by its type.
    pub(super) fn admits(self, schema: &'a Value, node: &Node) -> bool {
        let Some(schema) = self.resolve(schema) else {
            return true;
        };
        if words(schema).is_some() {
            return matches!(node, Node::Text(_));
        }
        if let Some(branches) = branches(schema) {
            return branches.iter().any(|branch| self.admits(branch, node));
        }
        let types = types(schema);
        types.is_empty() || types.iter().any(|name| is_of(node, name))
    }

    /// Says what a schema wants: `a whole number from 1 to 20`.
    pub(super) fn expected(self, schema: &'a Keywords) -> String {
        if let Some(words) = words(schema) {
            let one_of = if words.len() == 1 { "" } else { "one of " };
            return format!("{one_of}{}", words.join(", "));
        }
        if let Some(branches) = branches(schema) {
            let all: Vec<String> = branches
                .iter()
                .filter_map(|branch| self.resolve(branch))
                .filter(|branch| types(branch) != ["null"])
                .map(|branch| self.expected(branch))
                .collect();
            return all.join(", or ");
        }
        if let Some(expected) = formats::expected(text_of(schema, "format")) {
            let (min, max) = (text_of(schema, "x-min"), text_of(schema, "x-max"));
            return match (min, max) {
                ("", _) | (_, "") => expected.to_owned(),
                _ => format!("{expected}, from {min} to {max}"),
            };
        }
        let all: Vec<String> = types(schema)
            .into_iter()
            .filter(|name| *name != "null")
            .map(|name| match name {
                "boolean" => "true or false".to_owned(),
                "integer" => format!("a whole number{}", range_text(schema)),
                "number" => format!("a number{}", range_text(schema)),
                "string" => "text".to_owned(),
                "array" => "a list (each element begins with -)".to_owned(),
                "object" => match schema.get("properties").and_then(Value::as_object) {
                    Some(properties) => {
                        let mut keys: Vec<&str> = required(schema).collect();
                        if keys.is_empty() {
                            keys.extend(properties.keys().take(3).map(String::as_str));
                        }
                        format!(
                            "a mapping (key: value) with keys such as {}",
                            keys.join(", ")
                        )
                    }
                    None => "a mapping (key: value)".to_owned(),
                },
                other => other.to_owned(),
            })
            .collect();
        all.join(" or ")
    }

    /// Says that a node is of the wrong type, and how that may have come.
    pub(super) fn mismatch(self, node: &Node, schema: &'a Keywords) -> String {
        let expected = self.expected(schema);
        let wants = |name| types(schema).contains(&name);
        let private = formats::is_private(text_of(schema, "format"));
        // Quotes make a word of a number, but no address.
        let quotable = matches!(text_of(schema, "format"), "" | "name" | "model" | "pattern");
        let unit = match text_of(schema, "format") {
            "duration" | "size" => "a unit",
            "share" => "the %",
            "rate" => "the time, such as /min,",
            _ => "",
        };
        let found = match node {
            Node::Null => "nothing".to_owned(),
            Node::Number(number) if !unit.is_empty() => format!("{number} ({unit} is missing)"),
            Node::Number(number) if !private => {
                let quotes = if wants("string") && quotable {
                    " (put it in quotes)"
                } else {
                    ""
                };
                format!("the number {number}{quotes}")
            }
            Node::Bool(bool) if !private => {
                let quotes = if wants("string") && quotable {
                    " (put it in quotes)"
                } else {
                    ""
                };
                format!("{bool}{quotes}")
            }
            Node::Text(text) if wants("integer") || wants("number") || wants("boolean") => {
                let quotes = match serde_yaml::from_str(text) {
                    Ok(serde_yaml::Value::Number(_)) if !wants("boolean") => {
                        " (write it without quotes)"
                    }
                    Ok(serde_yaml::Value::Bool(_)) if wants("boolean") => {
                        " (write it without quotes)"
                    }
                    _ if wants("boolean") => match text.to_ascii_lowercase().as_str() {
                        "yes" | "y" | "on" => " (write true)",
                        "no" | "n" | "off" => " (write false)",
                        _ => "",
                    },
                    _ => "",
                };
                format!("{}{quotes}", shown(text))
            }
            node => kind(node).to_owned(),
        };
        format!("expected {expected}, found {found}")
    }
}

/// Names a node without telling its value.
pub(super) fn kind(node: &Node) -> &'static str {
    match node {
        Node::Null => "nothing",
        Node::Bool(_) => "true or false",
        Node::Number(_) => "a number",
        Node::Text(_) => "text",
        Node::List(_) => "a list",
        Node::Map(_) => "a mapping",
    }
}

pub(super) fn is_of(node: &Node, name: &str) -> bool {
    match node {
        Node::Null => name == "null",
        Node::Bool(_) => name == "boolean",
        Node::Number(number) => name == "number" || name == "integer" && !number.is_f64(),
        Node::Text(_) => name == "string",
        Node::List(_) => name == "array",
        Node::Map(_) => name == "object",
    }
}

/// Returns the words of an enumeration: `enum`, `const`, or a union of those.
pub(super) fn words(schema: &Keywords) -> Option<Vec<&str>> {
    if let Some(Value::Array(all)) = schema.get("enum") {
        return all.iter().map(Value::as_str).collect();
    }
    if let Some(Value::String(one)) = schema.get("const") {
        return Some(vec![one]);
    }
    let mut all = Vec::new();
    for branch in branches(schema)? {
        all.extend(words(branch.as_object()?)?);
    }
    Some(all)
}

pub(super) fn branches(schema: &Keywords) -> Option<&[Value]> {
    let branches = schema.get("anyOf").or_else(|| schema.get("oneOf"))?;
    branches.as_array().map(Vec::as_slice)
}

pub(super) fn types(schema: &Keywords) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(some)) => some.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

pub(super) fn required(schema: &Keywords) -> impl Iterator<Item = &str> {
    let required = schema.get("required").and_then(Value::as_array);
    required.into_iter().flatten().filter_map(Value::as_str)
}

pub(super) fn text_of<'a>(schema: &'a Keywords, keyword: &str) -> &'a str {
    schema.get(keyword).and_then(Value::as_str).unwrap_or("")
}

pub(super) fn number_of(schema: &Keywords, keyword: &str) -> Option<u64> {
    schema.get(keyword).and_then(Value::as_u64)
}

/// Returns the least and the greatest number that a schema admits, those of its
/// Rust type included.
pub(super) fn range(schema: &Keywords) -> (Option<f64>, Option<f64>) {
    let (low, high) = match text_of(schema, "format") {
        "uint8" => (Some(0.0), Some(f64::from(u8::MAX))),
        "uint16" => (Some(0.0), Some(f64::from(u16::MAX))),
        "uint32" => (Some(0.0), Some(f64::from(u32::MAX))),
        "uint" | "uint64" => (Some(0.0), None),
        "int32" => (Some(f64::from(i32::MIN)), Some(f64::from(i32::MAX))),
        _ => (None, None),
    };
    let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
    (bound("minimum").or(low), bound("maximum").or(high))
}

pub(super) fn in_range(number: &Number, schema: &Keywords) -> bool {
    // Bounds in a configuration are far below 2^53, where floats are exact.
    let Some(value) = number.as_f64() else {
        return false;
    };
    let (min, max) = range(schema);
    // NaN is in no range.
    min.is_none_or(|min| value >= min) && max.is_none_or(|max| value <= max) && !value.is_nan()
}

pub(super) fn range_text(schema: &Keywords) -> String {
    match range(schema) {
        (Some(min), Some(max)) => format!(" from {min} to {max}"),
        (Some(min), None) => format!(" of at least {min}"),
        (None, Some(max)) => format!(" of at most {max}"),
        (None, None) => String::new(),
    }
}

/// Returns whether a text with a unit is between `x-min` and `x-max`.
pub(super) fn between<T: std::str::FromStr + PartialOrd>(text: &str, schema: &Keywords) -> bool {
    let parse = |text: &str| text.parse::<T>().ok();
    let Some(value) = parse(text) else {
        return false;
    };
    parse(text_of(schema, "x-min")).is_none_or(|min| value >= min)
        && parse(text_of(schema, "x-max")).is_none_or(|max| value <= max)
}
