//! The parts of a file that the schema alone cannot check: plugin lists,
//! headers, and lists whose format is about their elements.

use indexmap::IndexMap;
use serde_json::Value;

use super::{
    check::Checker,
    formats,
    keywords::{Keywords, branches, kind},
    marked::{Entry, Item, Marked, Node},
    problem::{Mark, did_you_mean, key_path, shown},
};

impl<'a> Checker<'a> {
    /// One text of a list whose format is about its elements.
    pub(super) fn element(&mut self, value: Marked, format: &str, path: &str) -> Option<Marked> {
        let (expected, checked) = match format {
            "cidrs" => (
                "a network such as 10.0.0.0/8",
                formats::network as fn(&str) -> _,
            ),
            _ => (
                "a model's name, or a pattern such as \"qwen*\"",
                (|text| formats::check("pattern", text)) as fn(&str) -> _,
            ),
        };
        let wrong = match &value.node {
            Node::Text(text) => checked(text).err(),
            node => Some(format!("found {}", kind(node))),
        };
        let Some(found) = wrong else {
            return Some(value);
        };
        self.report
            .problem(value.mark, path, format!("expected {expected}, {found}"));
        None
    }

    /// One entry of a plugin list: `NAME` or `NAME: settings`. A bare name is
    /// returned as one with settings if the plugin has any, and what the
    /// settings leave out is filled in.
    pub(super) fn plugin(&mut self, value: Marked, entry: &'a Value, path: &str) -> Option<Marked> {
        let known = plugin_settings(entry)?;
        let mark = value.mark;
        let (name, name_mark, settings) = match value.node {
            Node::Text(name) => (name, mark, None),
            Node::Map(entries) if entries.len() == 1 => {
                let (name, entry) = entries.into_iter().next()?;
                let settings = match entry.value.node {
                    Node::Null => None,
                    _ => Some(entry.value),
                };
                (name, entry.mark, settings)
            }
            Node::Map(ref entries) => {
                let names: Vec<_> = entries.keys().map(|name| shown(name)).collect();
                let message = format!(
                    "expected one plugin per element, found {}: settings are indented below the name, the next plugin begins with -",
                    if names.is_empty() {
                        "nothing".to_owned()
                    } else {
                        names.join(", ")
                    }
                );
                self.report.problem(mark, path, message);
                return None;
            }
            ref node => {
                let message = format!(
                    "expected a plugin's name, or NAME: settings, found {}",
                    kind(node)
                );
                self.report.problem(mark, path, message);
                return None;
            }
        };
        let Some(schema) = known.get(&name) else {
            let names: Vec<&str> = known.keys().map(String::as_str).collect();
            let message = format!(
                "expected one of the plugins {}, found {}{}",
                names.join(", "),
                shown(&name),
                did_you_mean(&name, names.iter().copied())
            );
            self.report.problem(name_mark, path, message);
            return None;
        };
        let path = key_path(path, &name);
        let value = match settings {
            Some(settings) => {
                let mark = settings.mark;
                self.node(settings, schema, mark, &path)?
            }
            // A bare name stands for settings with nothing in them.
            None if self.rules.admits(schema, &Node::Null) => Marked {
                mark,
                node: Node::Null,
            },
            None => {
                let empty = Marked {
                    mark: name_mark,
                    node: Node::Map(Default::default()),
                };
                self.node(empty, schema, name_mark, &path)?
            }
        };
        let value = self.filled(value, schema);
        let entry = Entry {
            mark: name_mark,
            value,
        };
        Some(Marked {
            mark,
            node: Node::Map([(name, entry)].into_iter().collect()),
        })
    }

    /// Fills the defaults that the schema knows into a plugin's settings.
    pub(super) fn filled(&self, mut tree: Marked, schema: &'a Value) -> Marked {
        let mark = tree.mark;
        let object = match self.rules.resolve(schema) {
            Some(schema) => match branches(schema) {
                Some(branches) => branches
                    .iter()
                    .filter(|branch| self.rules.admits(branch, &tree.node))
                    .find_map(|branch| self.rules.resolve(branch)),
                None => Some(schema),
            },
            None => None,
        };
        let properties = object
            .and_then(|schema| schema.get("properties"))
            .and_then(Value::as_object);
        if let (Node::Map(entries), Some(properties)) = (&mut tree.node, properties) {
            for (key, property) in properties {
                let default = property.get("default").filter(|value| !value.is_null());
                if let (Some(default), false) = (default, entries.contains_key(key)) {
                    let value = from_json(default, mark);
                    entries.insert(key.clone(), Entry { mark, value });
                }
            }
        }
        tree
    }

    pub(super) fn headers(
        &mut self,
        entries: IndexMap<String, Entry>,
        path: &str,
    ) -> IndexMap<String, Entry> {
        let mut seen: Vec<String> = Vec::new();
        let mut kept = IndexMap::new();
        for (name, entry) in entries {
            let path = key_path(path, &name);
            if let Err(why) = formats::header_name(&name) {
                self.report.problem(entry.mark, &path, why);
                continue;
            }
            let lower = name.to_ascii_lowercase();
            if seen.contains(&lower) {
                let message = "this header is given twice (upper and lower case are the same)";
                self.report.problem(entry.mark, &path, message);
                continue;
            }
            seen.push(lower);
            let value = match &entry.value.node {
                Node::Text(text) => formats::header_value(text),
                Node::Null => Err("found nothing".to_owned()),
                node => Err(format!("found {} (put it in quotes)", kind(node))),
            };
            match value {
                Ok(reference) => {
                    if let Some(reference) = reference {
                        self.use_secret(reference, entry.value_mark(), &path);
                    }
                    kept.insert(name, entry);
                }
                Err(found) => {
                    let message = format!(
                        "expected a header's value, or env:NAME, file:path or credential:NAME, {found}"
                    );
                    self.report.problem(entry.value_mark(), &path, message);
                }
            }
        }
        kept
    }
}

/// Returns the settings of each plugin by name: the `properties` of the schema
/// of one entry of a plugin list.
fn plugin_settings(entry: &Value) -> Option<&Keywords> {
    match entry.get("anyOf").and_then(Value::as_array) {
        Some(branches) => branches.iter().find_map(plugin_settings),
        None => entry.get("properties")?.as_object(),
    }
}

fn from_json(value: &Value, mark: Mark) -> Marked {
    let node = match value {
        Value::Null => Node::Null,
        Value::Bool(bool) => Node::Bool(*bool),
        Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(n), _, _) => Node::Number(n.into()),
            (None, Some(n), _) => Node::Number(n.into()),
            (None, None, n) => Node::Number(n.unwrap_or_default().into()),
        },
        Value::String(text) => Node::Text(text.clone()),
        Value::Array(all) => Node::List(
            all.iter()
                .enumerate()
                .map(|(index, value)| Item {
                    index,
                    value: from_json(value, mark),
                })
                .collect(),
        ),
        Value::Object(all) => Node::Map(
            all.iter()
                .map(|(key, value)| {
                    let value = from_json(value, mark);
                    (key.clone(), Entry { mark, value })
                })
                .collect(),
        ),
    };
    Marked { mark, node }
}
