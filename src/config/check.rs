//! The marked pass: the tree against the schema.
//!
//! Tells *every* unknown key, wrong type, value out of range, unknown word, bad
//! format and missing key, each at its place, and returns the tree without
//! them, so that the later passes can go on with the rest. A misspelt or
//! renamed key is told and then read as what was most likely meant: one mistake
//! is one problem.
//!
//! **Invariant:** the schema's keywords that are handled here are those that
//! schemars writes for our structs and plugins; `pattern` is not among them (a
//! plugin checks such texts itself).

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::{
    SecretRef, Share, Size, Time, formats,
    keywords::{
        Keywords, Rules, between, branches, in_range, is_of, kind, number_of, required, text_of,
        types, words,
    },
    marked::{Entry, Item, Marked, Node},
    problem::{Mark, Report, did_you_mean, index_path, key_path, nearest, shown},
};

/// Keys that other gateways, or older versions, have for what is here the
/// second; the new name must be a key of the same mapping.
const RENAMED: [(&str, &str); 29] = [
    ("address", "listen"),
    ("alias", "aliases"),
    ("api_base", "url"),
    ("api_key", "key"),
    ("base_url", "url"),
    ("bind", "listen"),
    ("ca_file", "ca"),
    ("concurrency", "concurrent"),
    ("endpoint", "url"),
    ("fallback_group", "fallback"),
    ("fallbacks", "fallback"),
    ("filters", "plugins"),
    ("group", "groups"),
    ("id", "name"),
    ("logging", "log"),
    ("max_body", "body"),
    ("max_body_size", "body"),
    ("max_concurrent", "concurrent"),
    ("max_connections", "concurrent"),
    ("max_header_size", "header"),
    ("model_name", "model"),
    ("models", "model"),
    ("retries", "attempts"),
    ("servers", "upstreams"),
    ("timeout", "total_timeout"),
    ("token", "key"),
    ("type", "kind"),
    ("upstream", "upstreams"),
    ("workers", "threads"),
];

/// A reference to a secret, and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SecretUse {
    pub(super) reference: SecretRef,
    pub(super) path: String,
    pub(super) mark: Mark,
}

/// What the marked pass leaves.
#[derive(Debug)]
pub(super) struct Checked {
    /// The tree without what is wrong; always a mapping.
    pub(super) tree: Marked,
    /// Every secret that is named in it.
    pub(super) secrets: Vec<SecretUse>,
}

/// Checks the tree against [`schema::inner`](super::schema::inner).
pub(super) fn check(tree: Marked, schema: &Value, report: &mut Report) -> Checked {
    let mark = tree.mark;
    let mut checker = Checker {
        rules: Rules(schema),
        report,
        secrets: Vec::new(),
    };
    // An empty file is a mapping without keys: the missing ones are told.
    let tree = match tree.node {
        Node::Null => Marked {
            mark,
            node: Node::Map(Default::default()),
        },
        _ => tree,
    };
    let tree = checker.node(tree, schema, mark, "").unwrap_or(Marked {
        mark,
        node: Node::Map(Default::default()),
    });
    let secrets = checker.secrets;
    Checked { tree, secrets }
}

pub(super) struct Checker<'a> {
    pub(super) rules: Rules<'a>,
    pub(super) report: &'a mut Report,
    secrets: Vec<SecretUse>,
}

impl<'a> Checker<'a> {
    /// Checks a node; returns it, less its wrong parts, or `None` if it is wrong
    /// as a whole. `mark` is where to complain.
    pub(super) fn node(
        &mut self,
        tree: Marked,
        schema: &'a Value,
        mark: Mark,
        path: &str,
    ) -> Option<Marked> {
        let Some(schema) = self.rules.resolve(schema) else {
            return Some(tree);
        };
        if let Some(words) = words(schema) {
            return self.word(tree, &words, mark, path);
        }
        if let Some(branches) = branches(schema) {
            return self.branch(tree, schema, branches, mark, path);
        }
        let types = types(schema);
        if !types.is_empty() && !types.iter().any(|name| is_of(&tree.node, name)) {
            let message = self.rules.mismatch(&tree.node, schema);
            self.report.problem(mark, path, message);
            return None;
        }
        match tree.node {
            Node::Null | Node::Bool(_) => Some(tree),
            Node::Number(ref number) => {
                if in_range(number, schema) {
                    return Some(tree);
                }
                let message = format!("expected {}, found {number}", self.rules.expected(schema));
                self.report.problem(mark, path, message);
                None
            }
            Node::Text(ref text) => match self.text(text, schema, mark, path) {
                Ok(()) => Some(tree),
                Err(found) => {
                    let message = format!("expected {}, {found}", self.rules.expected(schema));
                    self.report.problem(mark, path, message);
                    None
                }
            },
            Node::List(items) => {
                let node = Node::List(self.list(items, schema, mark, path)?);
                Some(Marked { node, ..tree })
            }
            Node::Map(entries) => {
                if text_of(schema, "format") == "headers" {
                    let node = Node::Map(self.headers(entries, path));
                    return Some(Marked { node, ..tree });
                }
                let node = Node::Map(self.map(entries, schema, mark, path)?);
                Some(Marked { node, ..tree })
            }
        }
    }

    /// One of a fixed set of words.
    fn word(&mut self, tree: Marked, words: &[&str], mark: Mark, path: &str) -> Option<Marked> {
        let list = words.join(", ");
        let one_of = if words.len() == 1 { "" } else { "one of " };
        let found = match &tree.node {
            Node::Text(text) if words.contains(&text.as_str()) => return Some(tree),
            Node::Text(text) => format!(
                "{}{}",
                shown(text),
                did_you_mean(text, words.iter().copied())
            ),
            node => kind(node).to_owned(),
        };
        let message = format!("expected {one_of}{list}, found {found}");
        self.report.problem(mark, path, message);
        None
    }

    /// One of several schemas: the one whose type fits speaks.
    fn branch(
        &mut self,
        tree: Marked,
        schema: &'a Keywords,
        branches: &'a [Value],
        mark: Mark,
        path: &str,
    ) -> Option<Marked> {
        let fitting: Vec<&'a Value> = branches
            .iter()
            .filter(|branch| self.rules.admits(branch, &tree.node))
            .collect();
        match fitting.as_slice() {
            [] => {
                let message = self.rules.mismatch(&tree.node, schema);
                self.report.problem(mark, path, message);
                None
            }
            [only] => {
                // A wrong word might have been meant as one of the others.
                let others = branches
                    .iter()
                    .filter(|one| !self.rules.admits(one, &Node::Null));
                let words = self.rules.resolve(only).and_then(words);
                if let (Node::Text(text), Some(words)) = (&tree.node, words)
                    && !words.contains(&text.as_str())
                    && others.count() > 1
                {
                    let expected = self.rules.expected(schema);
                    let message = format!("expected {expected}, found other text");
                    self.report.problem(mark, path, message);
                    return None;
                }
                self.node(tree, only, mark, path)
            }
            [first, ..] => {
                // Several could be meant: the first that finds nothing wrong,
                // or else what the first has to say.
                let passes = fitting.iter().find(|branch| {
                    let mut trial = Report::new("");
                    let mut checker = Checker {
                        rules: self.rules,
                        report: &mut trial,
                        secrets: Vec::new(),
                    };
                    checker.node(tree.clone(), branch, mark, path);
                    trial.is_clean()
                });
                self.node(tree, passes.unwrap_or(first), mark, path)
            }
        }
    }

    /// Checks a text; the error is what was found.
    fn text(
        &mut self,
        text: &str,
        schema: &Keywords,
        mark: Mark,
        path: &str,
    ) -> Result<(), String> {
        let format = text_of(schema, "format");
        formats::check(format, text)?;
        let in_bounds = match format {
            "duration" => between::<Time>(text, schema),
            "size" => between::<Size>(text, schema),
            "share" => between::<Share>(text, schema),
            _ => true,
        };
        if !in_bounds {
            return Err(format!("found {}", shown(text)));
        }
        if let ("secret", Ok(reference)) = (format, text.parse()) {
            self.use_secret(reference, mark, path);
        }
        let chars = u64::try_from(text.chars().count()).unwrap_or(u64::MAX);
        if chars < number_of(schema, "minLength").unwrap_or(0) {
            let found = if chars == 0 { "blank text" } else { "less" };
            return Err(format!("found {found}"));
        }
        if number_of(schema, "maxLength").is_some_and(|max| chars > max) {
            return Err(format!("found {chars} characters"));
        }
        Ok(())
    }

    fn list(
        &mut self,
        items: Vec<Item>,
        schema: &'a Keywords,
        mark: Mark,
        path: &str,
    ) -> Option<Vec<Item>> {
        let length = u64::try_from(items.len()).unwrap_or(u64::MAX);
        let min = number_of(schema, "minItems").unwrap_or(0);
        let max = number_of(schema, "maxItems").unwrap_or(u64::MAX);
        if length < min || length > max {
            let message = match (length, max) {
                (0, _) => "expected at least one element, found an empty list".to_owned(),
                (_, u64::MAX) => format!("expected at least {min} elements, found {length}"),
                _ => format!("expected {min} to {max} elements, found {length}"),
            };
            self.report.problem(mark, path, message);
            return None;
        }
        let format = text_of(schema, "format");
        let mut kept = Vec::with_capacity(items.len());
        for Item { index, value } in items {
            let path = index_path(path, index);
            let mark = value.mark;
            let value = match (format, schema.get("items")) {
                ("plugins", Some(entry)) => self.plugin(value, entry, &path),
                ("cidrs" | "patterns", _) => self.element(value, format, &path),
                (_, Some(element)) => self.node(value, element, mark, &path),
                _ => Some(value),
            };
            kept.extend(value.map(|value| Item { index, value }));
        }
        Some(kept)
    }

    fn map(
        &mut self,
        entries: IndexMap<String, Entry>,
        schema: &'a Keywords,
        mark: Mark,
        path: &str,
    ) -> Option<IndexMap<String, Entry>> {
        let none = Map::new();
        let properties = match schema.get("properties") {
            Some(Value::Object(properties)) => properties,
            _ => &none,
        };
        if entries.is_empty() && number_of(schema, "minProperties").is_some_and(|min| min > 0) {
            let message = "expected at least one entry, found an empty mapping";
            self.report.problem(mark, path, message);
            return None;
        }
        let count = u64::try_from(entries.len()).unwrap_or(u64::MAX);
        if let Some(max) = number_of(schema, "maxProperties").filter(|max| count > *max) {
            let message = format!("expected at most {max} entries, found {count}");
            self.report.problem(mark, path, message);
            return None;
        }
        let entries = self.known_keys(entries, schema, path);
        for key in required(schema) {
            if !entries.contains_key(key) {
                let expected = schema
                    .get("properties")
                    .and_then(|properties| properties.get(key))
                    .and_then(|property| self.rules.resolve(property))
                    .map_or_else(|| "it".to_owned(), |property| self.rules.expected(property));
                let message = format!("expected {expected}, found nothing: {key} is required");
                self.report.problem(mark, &key_path(path, key), message);
            }
        }
        let mut kept = IndexMap::with_capacity(entries.len());
        for (key, entry) in entries {
            let path = key_path(path, &key);
            let inner = match schema.get("properties").and_then(|all| all.get(&key)) {
                Some(property) => Some(property),
                None => schema.get("additionalProperties"),
            };
            let names = schema.get("propertyNames").and_then(Value::as_object);
            if let (Some(names), false) = (names, properties.contains_key(&key)) {
                let format = text_of(names, "format");
                if let Err(found) = formats::check(format, &key) {
                    let expected = formats::expected(format).unwrap_or("another key");
                    let message = format!("expected {expected} as the key, {found}");
                    self.report.problem(entry.mark, &path, message);
                    continue;
                }
            }
            let mark = entry.value_mark();
            let Entry { mark: at, value } = entry;
            let value = match inner {
                Some(inner)
                    if value.node == Node::Null && !self.rules.admits(inner, &value.node) =>
                {
                    let expected = self
                        .rules
                        .resolve(inner)
                        .map_or_else(String::new, |inner| self.rules.expected(inner));
                    let advice = if required(schema).any(|name| name == key) {
                        format!(": {key} is required")
                    } else if properties.contains_key(&key) {
                        " (leave the key out for its default)".to_owned()
                    } else {
                        String::new()
                    };
                    let message = format!("expected {expected}, found nothing{advice}");
                    self.report.problem(mark, &path, message);
                    None
                }
                Some(inner) => self.node(value, inner, mark, &path),
                None => Some(value),
            };
            if let Some(value) = value {
                kept.insert(key, Entry { mark: at, value });
            }
        }
        Some(kept)
    }

    /// Tells the keys that the schema does not know. Those that most likely
    /// stand for another come back under its name.
    fn known_keys(
        &mut self,
        entries: IndexMap<String, Entry>,
        schema: &'a Keywords,
        path: &str,
    ) -> IndexMap<String, Entry> {
        if schema.get("additionalProperties") != Some(&Value::Bool(false)) {
            return entries;
        }
        let known: Vec<&str> = match schema.get("properties") {
            Some(Value::Object(properties)) => properties.keys().map(String::as_str).collect(),
            _ => Vec::new(),
        };
        let given: Vec<String> = entries.keys().cloned().collect();
        let mut kept = IndexMap::with_capacity(entries.len());
        for (key, entry) in entries {
            if known.contains(&key.as_str()) {
                kept.insert(key, entry);
                continue;
            }
            let at = key_path(path, &key);
            let free = |name: &&str| !given.iter().any(|given| given == name);
            let renamed = RENAMED
                .iter()
                .find(|(old, new)| *old == key && known.contains(new))
                .map(|(_, new)| *new);
            let near = nearest(&key, known.iter().copied());
            let message = match (renamed, near) {
                (Some(new), _) => format!("this key is called {new}"),
                (None, Some(near)) => format!(
                    "unknown key {} (did you mean {near}?); known here: {}",
                    shown(&key),
                    known.join(", ")
                ),
                (None, None) => format!(
                    "unknown key {}; known here: {}",
                    shown(&key),
                    known.join(", ")
                ),
            };
            self.report.problem(entry.mark, &at, message);
            let meant = renamed.or(near).filter(free);
            if let Some(meant) = meant.filter(|meant| !kept.contains_key(*meant)) {
                kept.insert(meant.to_owned(), entry);
            }
        }
        kept
    }

    pub(super) fn use_secret(&mut self, reference: SecretRef, mark: Mark, path: &str) {
        self.secrets.push(SecretUse {
            reference,
            path: path.to_owned(),
            mark,
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{
        schema::{inner, tests::example},
        yaml,
    };

    /// Checks a text against a schema; returns the problems as `PATH: MESSAGE`.
    fn told(text: &str, schema: &Value) -> Vec<String> {
        let mut report = Report::new("f");
        let tree = yaml::read(text, &mut report).unwrap();
        check(tree, schema, &mut report);
        match report.finish() {
            Ok(_) => Vec::new(),
            Err(problems) => problems
                .iter()
                .map(|problem| format!("{}: {}", problem.path, problem.message))
                .collect(),
        }
    }

    #[test]
    fn of_several_schemas_the_one_of_the_right_type_speaks() {
        let schema = json!({ "properties": { "a": { "anyOf": [
            { "type": "string", "format": "duration" },
            { "type": "integer", "minimum": 5 },
            { "type": "null" },
        ] } } });
        for text in ["a: 3s", "a: 7", "a: null"] {
            assert_eq!(told(text, &schema), [""; 0], "{text}");
        }
        assert_eq!(
            told("a: 3", &schema),
            ["a: expected a whole number of at least 5, found 3"]
        );
        assert_eq!(
            told("a: []", &schema),
            [
                "a: expected a duration such as 250ms, 30s or 10m, or a whole number of at least 5, found a list"
            ]
        );
    }

    #[test]
    fn of_two_schemas_of_one_type_the_one_that_fits_is_taken() {
        let object = |key: &str| {
            json!({
                "type": "object",
                "properties": { key: { "type": "integer" } },
                "required": [key],
                "additionalProperties": false,
            })
        };
        let schema = json!({ "anyOf": [object("one"), object("other")] });
        assert_eq!(told("other: 1", &schema), [""; 0]);
        assert_eq!(told("other: x", &schema).len(), 2);
    }

    #[test]
    fn a_misspelt_key_is_one_problem_and_read_as_what_was_meant() {
        let schema = inner(&example());
        let text = "groups: {g: {upstreams: [{name: a, ulr: \"http://h/v1\", weigth: 0}]}}\nroutes: [{model: x, groups: [g]}]\n";
        let told = told(text, &schema);
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told[2].starts_with("groups.g.upstreams[0].weight: expected a whole number"));
    }

    #[test]
    fn every_renamed_key_leads_to_one_that_exists() {
        let schema = inner(&example()).to_string();
        assert!(RENAMED.is_sorted());
        for (old, new) in RENAMED {
            assert!(schema.contains(&format!("\"{new}\":{{")), "{old} {new}");
        }
    }
}
