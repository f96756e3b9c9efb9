//! A tree of YAML in which every node knows its line and column, as [`super::yaml`]
//! reads it.

use indexmap::IndexMap;
use serde_yaml::{Number, Value};

use super::problem::Mark;

/// A node and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Marked {
    pub(crate) mark: Mark,
    pub(crate) node: Node,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Node {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Item>),
    Map(IndexMap<String, Entry>),
}

/// An element of a list.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    /// Its place in the file's list, even when elements before it were dropped.
    pub(crate) index: usize,
    pub(crate) value: Marked,
}

/// What stands under a key.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// Where the key stands.
    pub(crate) mark: Mark,
    pub(crate) value: Marked,
}

impl Entry {
    /// Returns where the value stands, or the key if there is no value.
    pub(crate) fn value_mark(&self) -> Mark {
        match self.value.node {
            Node::Null => self.mark,
            _ => self.value.mark,
        }
    }
}

impl Marked {
    /// Returns the tree without its marks, for serde.
    pub(crate) fn into_value(self) -> Value {
        match self.node {
            Node::Null => Value::Null,
            Node::Bool(bool) => Value::Bool(bool),
            Node::Number(number) => Value::Number(number),
            Node::Text(text) => Value::String(text),
            Node::List(items) => {
                Value::Sequence(items.into_iter().map(|i| i.value.into_value()).collect())
            }
            Node::Map(entries) => Value::Mapping(
                entries
                    .into_iter()
                    .map(|(key, entry)| (Value::String(key), entry.value.into_value()))
                    .collect(),
            ),
        }
    }

    /// Returns the nodes and the bytes of text of the tree.
    pub(super) fn extent(&self) -> (usize, usize) {
        let sum = |(nodes, bytes): (usize, usize), (n, b): (usize, usize)| (nodes + n, bytes + b);
        match &self.node {
            Node::Text(text) => (1, text.len()),
            Node::List(items) => items.iter().map(|i| i.value.extent()).fold((1, 0), sum),
            Node::Map(entries) => entries
                .iter()
                .map(|(key, entry)| sum(entry.value.extent(), (0, key.len())))
                .fold((1, 0), sum),
            Node::Null | Node::Bool(_) | Node::Number(_) => (1, 0),
        }
    }

    /// Returns the levels of the tree; 0 for a scalar.
    pub(super) fn depth(&self) -> usize {
        match &self.node {
            Node::List(items) => 1 + items.iter().map(|i| i.value.depth()).max().unwrap_or(0),
            Node::Map(entries) => {
                let below = entries.values().map(|entry| entry.value.depth());
                1 + below.max().unwrap_or(0)
            }
            _ => 0,
        }
    }
}
