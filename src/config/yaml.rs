//! YAML text → a tree in which every node knows its line and column.
//!
//! serde_yaml says nothing about places, so the file is read here by events;
//! plain scalars become what serde_yaml makes of them. Syntax errors, duplicate
//! keys, several documents and keys that are not text are told; of two equal
//! keys the first is kept.
//!
//! **Invariant:** a tree has at most [`NODES_MAX`] nodes, [`BYTES_MAX`] bytes
//! of text and [`DEPTH_MAX`] levels, however often its aliases repeat each
//! other.

use std::collections::HashMap;

use indexmap::{IndexMap, map::Entry as Slot};
use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};
use serde_yaml::Value;

use super::{
    marked::{Entry, Item, Marked, Node},
    problem::{Mark, Report, index_path, key_path, shown},
};

/// The most nodes, those that aliases repeat included.
const NODES_MAX: usize = 200_000;
/// The most bytes of text in them.
const BYTES_MAX: usize = 16 << 20;
/// The deepest nesting; Forebay's own keys need about ten levels.
const DEPTH_MAX: usize = 64;

/// Reads the text; `None` if it is so wrong that nothing else can be said of it.
pub(crate) fn read(text: &str, report: &mut Report) -> Option<Marked> {
    let mut reader = Reader {
        report,
        open: Vec::new(),
        anchors: HashMap::new(),
        root: None,
        documents: 0,
        nodes: 0,
        bytes: 0,
    };
    for event in Parser::new_from_str(text) {
        let took = match event {
            Ok((event, span)) => reader.take(event, span),
            Err(why) => {
                let mark = Mark {
                    line: why.marker().line(),
                    column: why.marker().col() + 1,
                };
                reader.stop(mark, syntax_message(why.info()))
            }
        };
        if let Err(Stopped) = took {
            return None;
        }
    }
    Some(reader.root.unwrap_or(Marked {
        mark: Mark { line: 1, column: 1 },
        node: Node::Null,
    }))
}

/// The text cannot be read any further; the reason has been told.
#[derive(Debug)]
struct Stopped;

struct Reader<'a> {
    report: &'a mut Report,
    open: Vec<Open>,
    anchors: HashMap<usize, Anchored>,
    root: Option<Marked>,
    documents: usize,
    nodes: usize,
    bytes: usize,
}

/// A list or mapping whose end has not been seen yet.
struct Open {
    mark: Mark,
    anchor: usize,
    inside: Inside,
}

enum Inside {
    List(Vec<Item>),
    Map {
        entries: IndexMap<String, Entry>,
        /// The key whose value comes next.
        key: Option<Key>,
        /// What `<<` brings in; what is written out wins over it.
        merged: Vec<Marked>,
    },
}

enum Key {
    /// A name, and where it stands.
    Name(String, Mark),
    /// `<<`.
    Merge,
    /// What is no name; told already, its value is dropped.
    Bad,
}

struct Anchored {
    tree: Marked,
    nodes: usize,
    bytes: usize,
}

impl Reader<'_> {
    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Stopped> {
        let mark = Mark {
            line: span.start.line(),
            column: span.start.col() + 1,
        };
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return self.stop(
                        mark,
                        "expected one YAML document, found a second one after ---",
                    );
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.count(mark, 1, text.len())?;
                if style == ScalarStyle::Plain && text == "<<" && self.open_key() {
                    self.set_key(Key::Merge);
                    return Ok(());
                }
                let node = self.resolve(&text, style, tag.as_deref(), mark);
                self.complete(Marked { mark, node }, anchor)?;
            }
            Event::SequenceStart(anchor, tag) => {
                self.refuse_tag(tag.as_deref(), mark);
                self.begin(mark, anchor, Inside::List(Vec::new()))?;
            }
            Event::MappingStart(anchor, tag) => {
                self.refuse_tag(tag.as_deref(), mark);
                let inside = Inside::Map {
                    entries: IndexMap::new(),
                    key: None,
                    merged: Vec::new(),
                };
                self.begin(mark, anchor, inside)?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(open) = self.open.pop() {
                    let node = match open.inside {
                        Inside::List(items) => Node::List(items),
                        Inside::Map {
                            entries, merged, ..
                        } => Node::Map(self.merge(entries, merged)),
                    };
                    let mark = open.mark;
                    self.complete(Marked { mark, node }, open.anchor)?;
                }
            }
            Event::Alias(anchor) => {
                let Some(anchored) = self.anchors.get(&anchor) else {
                    return self.stop(mark, "an alias cannot stand inside what it stands for");
                };
                let (nodes, bytes) = (anchored.nodes, anchored.bytes);
                self.count(mark, nodes, bytes)?;
                if let Some(anchored) = self.anchors.get(&anchor) {
                    let tree = anchored.tree.clone();
                    if self.open.len() + tree.depth() > DEPTH_MAX {
                        return self.too_deep(mark);
                    }
                    self.complete(tree, 0)?;
                }
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
        Ok(())
    }

    fn begin(&mut self, mark: Mark, anchor: usize, inside: Inside) -> Result<(), Stopped> {
        self.count(mark, 1, 0)?;
        if self.open.len() >= DEPTH_MAX {
            return self.too_deep(mark);
        }
        self.open.push(Open {
            mark,
            anchor,
            inside,
        });
        Ok(())
    }

    /// Puts a node that is complete where it belongs.
    fn complete(&mut self, tree: Marked, anchor: usize) -> Result<(), Stopped> {
        if anchor > 0 {
            let (nodes, bytes) = tree.extent();
            // The copy that is kept for the aliases takes memory like any other.
            self.count(tree.mark, nodes, bytes)?;
            let tree = tree.clone();
            self.anchors.insert(anchor, Anchored { tree, nodes, bytes });
        }
        if self.open_key() {
            let key = self.key_from(tree);
            self.set_key(key);
            return Ok(());
        }
        // Only where it is needed: a path is as long as the file is deep.
        let path = self.given_before().then(|| self.path());
        match self.open.last_mut().map(|open| &mut open.inside) {
            None => self.root = Some(tree),
            Some(Inside::List(items)) => items.push(Item {
                index: items.len(),
                value: tree,
            }),
            Some(Inside::Map {
                entries,
                key,
                merged,
            }) => match key.take() {
                Some(Key::Name(name, mark)) => match entries.entry(name) {
                    Slot::Vacant(slot) => {
                        slot.insert(Entry { mark, value: tree });
                    }
                    Slot::Occupied(slot) => {
                        let first = slot.get().mark.line;
                        let message = format!(
                            "this key is given twice: first in line {first}; which one holds?"
                        );
                        let path = path.unwrap_or_default();
                        self.report.aside(mark, &path, message);
                    }
                },
                Some(Key::Merge) => merged.push(tree),
                Some(Key::Bad) | None => {}
            },
        }
        Ok(())
    }

    /// Returns whether the mapping that is open has its current key already.
    fn given_before(&self) -> bool {
        match self.open.last().map(|open| &open.inside) {
            Some(Inside::Map {
                entries,
                key: Some(Key::Name(name, _)),
                ..
            }) => entries.contains_key(name),
            _ => false,
        }
    }

    /// Returns whether the next node is a key.
    fn open_key(&self) -> bool {
        matches!(
            self.open.last().map(|open| &open.inside),
            Some(Inside::Map { key: None, .. })
        )
    }

    fn set_key(&mut self, new: Key) {
        if let Some(Inside::Map { key, .. }) = self.open.last_mut().map(|open| &mut open.inside) {
            *key = Some(new);
        }
    }

    fn key_from(&mut self, tree: Marked) -> Key {
        let found = match tree.node {
            Node::Text(name) => return Key::Name(name, tree.mark),
            Node::Null => "nothing".to_owned(),
            Node::Bool(bool) => format!("{bool}: put it in quotes if it is meant as text"),
            Node::Number(number) => {
                format!("the number {number}: put it in quotes if it is meant as text")
            }
            Node::List(_) => "a list".to_owned(),
            Node::Map(_) => "a mapping (text with braces needs quotes)".to_owned(),
        };
        let path = self.path();
        self.report.problem(
            tree.mark,
            &path,
            format!("expected text as a key, found {found}"),
        );
        Key::Bad
    }

    /// Adds what `<<` brings in; earlier ones win over later ones.
    fn merge(
        &mut self,
        mut entries: IndexMap<String, Entry>,
        merged: Vec<Marked>,
    ) -> IndexMap<String, Entry> {
        let mut waiting: Vec<Marked> = merged.into_iter().rev().collect();
        while let Some(tree) = waiting.pop() {
            match tree.node {
                Node::Map(others) => {
                    for (name, entry) in others {
                        entries.entry(name).or_insert(entry);
                    }
                }
                Node::List(items) => waiting.extend(items.into_iter().rev().map(|i| i.value)),
                _ => {
                    let path = key_path(&self.path(), "<<");
                    let message = "expected a mapping to merge, such as *defaults";
                    self.report.problem(tree.mark, &path, message);
                }
            }
        }
        entries
    }

    fn resolve(&mut self, text: &str, style: ScalarStyle, tag: Option<&Tag>, mark: Mark) -> Node {
        let untagged = || match style {
            ScalarStyle::Plain => plain(text),
            _ => Node::Text(text.to_owned()),
        };
        let Some(tag) = tag else { return untagged() };
        if !tag.is_yaml_core_schema() {
            self.refuse_tag(Some(tag), mark);
            return untagged();
        }
        let node = plain(text);
        let fits = match tag.suffix.as_str() {
            "str" => return Node::Text(text.to_owned()),
            "null" => matches!(node, Node::Null),
            "bool" => matches!(node, Node::Bool(_)),
            "int" | "float" => matches!(node, Node::Number(_)),
            _ => false,
        };
        if !fits {
            let path = self.path();
            let message = format!("the text does not fit its tag !!{}", tag.suffix);
            self.report.problem(mark, &path, message);
        }
        node
    }

    fn refuse_tag(&mut self, tag: Option<&Tag>, mark: Mark) {
        let Some(tag) = tag else { return };
        // `!` alone means "not resolved by its looks"; it is harmless here.
        let own = tag.handle.is_empty() && tag.suffix == "!"
            || tag.handle == "!" && tag.suffix.is_empty();
        if !tag.is_yaml_core_schema() && !own {
            let path = self.path();
            let message = format!(
                "expected no tag, found {}: put text that begins with ! in quotes",
                shown(&tag.to_string())
            );
            self.report.problem(mark, &path, message);
        }
    }

    fn count(&mut self, mark: Mark, nodes: usize, bytes: usize) -> Result<(), Stopped> {
        self.nodes = self.nodes.saturating_add(nodes);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.nodes > NODES_MAX || self.bytes > BYTES_MAX {
            return self.stop(
                mark,
                format!(
                    "expected at most {NODES_MAX} values and {} MiB of text, found more (with what aliases repeat)",
                    BYTES_MAX >> 20
                ),
            );
        }
        Ok(())
    }

    fn too_deep(&mut self, mark: Mark) -> Result<(), Stopped> {
        self.stop(
            mark,
            format!("expected at most {DEPTH_MAX} levels, found more"),
        )
    }

    fn stop(&mut self, mark: Mark, message: impl Into<String>) -> Result<(), Stopped> {
        let path = self.path();
        self.report.problem(mark, &path, message);
        Err(Stopped)
    }

    /// Returns the path of the node that comes next.
    fn path(&self) -> String {
        let mut path = String::new();
        for open in &self.open {
            path = match &open.inside {
                Inside::List(items) => index_path(&path, items.len()),
                Inside::Map {
                    key: Some(Key::Name(name, _)),
                    ..
                } => key_path(&path, name),
                Inside::Map {
                    key: Some(Key::Merge),
                    ..
                } => key_path(&path, "<<"),
                Inside::Map { .. } => path,
            };
        }
        path
    }
}

/// Returns what serde_yaml makes of a plain scalar.
fn plain(text: &str) -> Node {
    if text.is_empty() {
        return Node::Null;
    }
    // What is more than text begins like this, and is one word; the rest must
    // not be asked about: alone in a file, `---` means something else.
    let word = text.starts_with(|c: char| "~.+-nNtTfF".contains(c) || c.is_ascii_digit());
    if !word || text.starts_with("---") || text == "..." || text.contains(char::is_whitespace) {
        return Node::Text(text.to_owned());
    }
    match serde_yaml::from_str(text) {
        Ok(Value::Null) => Node::Null,
        Ok(Value::Bool(bool)) => Node::Bool(bool),
        Ok(Value::Number(number)) => Node::Number(number),
        _ => Node::Text(text.to_owned()),
    }
}

/// Says what the parser says, and what most often is behind it.
fn syntax_message(info: &str) -> String {
    let hint = if info.contains("tab") {
        "indent with spaces, not with tabs"
    } else if info.contains("mapping values are not allowed") {
        "is the line above complete and indented alike? text with a colon and a space needs quotes"
    } else if info.contains("flow") || info.contains("bracket") || info.contains('}') {
        "is a bracket, brace or comma missing?"
    } else if info.contains("quote") || info.contains("scalar") {
        "is a quote missing?"
    } else if info.contains("unknown anchor") {
        "text that begins with * needs quotes, as in \"*\""
    } else {
        "is it indented like its neighbours, with a colon after the key?"
    };
    format!("this is not YAML: {info}; {hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(text: &str) -> Marked {
        let mut report = Report::new("f");
        let tree = read(text, &mut report);
        assert_eq!(report.finish(), Ok(Vec::new()), "{text}");
        tree.unwrap()
    }

    fn problems(text: &str) -> Vec<(usize, usize, String, String)> {
        let mut report = Report::new("f");
        read(text, &mut report);
        let problems = report.finish().unwrap_err().0;
        problems
            .into_iter()
            .map(|p| (p.line, p.column, p.path, p.message))
            .collect()
    }

    /// Reads the text here and by serde_yaml, merge keys applied.
    fn agrees(text: &str) {
        let mut theirs: Value = serde_yaml::from_str(text).unwrap();
        theirs.apply_merge().unwrap();
        assert_eq!(tree(text).into_value(), theirs, "{text}");
    }

    #[test]
    fn scalars_are_what_serde_yaml_makes_of_them() {
        let words = [
            "1",
            "-1",
            "+1",
            "0",
            "007",
            "0x1F",
            "0o17",
            "0b11",
            "1_000",
            "1.5",
            "1e3",
            ".5",
            ".inf",
            "-.inf",
            "~",
            "null",
            "Null",
            "NULL",
            "nUll",
            "true",
            "True",
            "TRUE",
            "false",
            "yes",
            "no",
            "on",
            "off",
            "n",
            "y",
            "text",
            "30s",
            "1h30m",
            "127.0.0.1:7070",
            "a:b",
            "12:30:45",
            "2026-01-01",
            "\"1\"",
            "'true'",
            "\"\"",
            "''",
            "http://h:1/v1",
            "two words",
            "env:NAME",
            "- 1",
            "1.2.3",
            "!!str 5",
            "-",
            "--",
            "--- x",
            "\"\\u00e9\\n\"",
            "|\n  block\n  text\n",
            ">-\n  a\n  b\n",
        ];
        for word in words.iter().filter(|w| **w != "--- x" && **w != "-") {
            if word.starts_with("- ") {
                agrees(word);
            } else {
                agrees(&format!("key: {word}"));
            }
        }
    }

    #[test]
    fn a_number_that_no_type_holds_is_text_and_so_no_number() {
        // serde_yaml refuses the whole file, without a path.
        for word in ["18446744073709551616", "-9223372036854775809"] {
            assert_eq!(plain(word), Node::Text(word.to_owned()));
        }
    }

    #[test]
    fn block_flow_anchors_and_merge_keys_agree_with_serde_yaml() {
        for text in [
            "a: {b: [1, 2, {c: d}], e: }\nf:\n- g\n- h:\n    i\n",
            "base: &b {x: 1, y: 2}\na: {<<: *b, y: 3}\n",
            "b1: &b1 {x: 1}\nb2: &b2 {x: 2, z: 3}\na:\n  <<: [*b1, *b2]\n  w: 0\n",
            "a: &a text\nb: *a\nc: &c [1, 2]\nd: *c\n",
            "",
            "# nothing\n",
        ] {
            let theirs: Option<Value> = serde_yaml::from_str(text).unwrap();
            match theirs {
                Some(_) => agrees(text),
                None => assert_eq!(tree(text).node, Node::Null),
            }
        }
    }

    #[test]
    fn nodes_know_their_line_and_column() {
        let tree = tree("a: 1\nb:\n  - c: x\n  - {d: \"y\"}\n");
        let Node::Map(root) = &tree.node else {
            panic!()
        };
        let Node::List(items) = &root["b"].value.node else {
            panic!()
        };
        let Node::Map(flow) = &items[1].value.node else {
            panic!()
        };
        assert_eq!(root["b"].mark, Mark { line: 2, column: 1 });
        assert_eq!(flow["d"].mark, Mark { line: 4, column: 6 });
        assert_eq!(flow["d"].value.mark, Mark { line: 4, column: 9 });
    }

    #[test]
    fn each_duplicate_key_is_told_and_the_first_is_kept() {
        let text = "a: {x: 1,\n  x: 2}\na: 3\n";
        let found = problems(text);
        assert_eq!(
            found
                .iter()
                .map(|p| (p.0, p.1, p.2.as_str()))
                .collect::<Vec<_>>(),
            [(2, 3, "a.x"), (3, 1, "a")]
        );
        let mut report = Report::new("f");
        let Node::Map(root) = read(text, &mut report).unwrap().node else {
            panic!()
        };
        assert!(matches!(root["a"].value.node, Node::Map(_)));
    }

    #[test]
    fn a_key_that_is_no_text_is_told() {
        for text in ["1: a\n", "true: a\n", "{[1]: a}\n", "? {b: c}\n: d\n"] {
            assert_eq!(problems(text).len(), 1, "{text}");
        }
    }

    #[test]
    fn broken_yaml_and_a_second_document_are_told_with_their_line() {
        for (text, line) in [
            ("a: 1\n---\nb: 2\n", 2),
            ("a: 1\n  b: 2\n", 2),
            ("a:\n\t- b\n", 2),
            ("a: *unknown\n", 1),
            ("a: 1\nb: \"open\n", 2),
            ("a: &x [*x]\n", 1),
            ("a: !custom b\n", 1),
        ] {
            assert_eq!(problems(text)[0].0, line, "{text:?}: {:?}", problems(text));
        }
    }

    #[test]
    fn aliases_that_repeat_aliases_end_in_a_problem_not_in_memory() {
        let mut laughs = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned();
        for i in 1..20 {
            let before = format!("*a{}", i - 1);
            let line = vec![before; 9].join(", ");
            laughs.push_str(&format!("a{i}: &a{i} [{line}]\n"));
        }
        assert!(problems(&laughs)[0].3.contains("at most 200000"));
    }

    #[test]
    fn nesting_is_bounded_through_aliases_too() {
        assert!(problems(&"[".repeat(100))[0].3.contains("64 levels"));
        let mut deep = "a0: &a0 [x]\n".to_owned();
        for i in 1..100 {
            deep.push_str(&format!("a{i}: &a{i} [*a{}]\n", i - 1));
        }
        assert!(problems(&deep)[0].3.contains("64 levels"));
    }
}
