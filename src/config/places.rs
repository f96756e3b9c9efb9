//! Where each value of the typed configuration stands in the file.
//!
//! The typed configuration has lost its places, and elements that were wrong
//! are missing from its lists: element 1 there may be element 2 of the file.
//! Here a path in the one leads to the path and the place in the other.

use std::collections::HashMap;

use super::{
    marked::{Marked, Node},
    problem::{Mark, index_path, key_path},
};

/// Where a value stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Place {
    /// Its path in the file.
    pub(super) path: String,
    /// Where its key stands; of an element, the element.
    pub(super) key: Mark,
    /// Where the value stands.
    pub(super) value: Mark,
}

/// The places of all values, by their paths in the typed configuration.
#[derive(Clone, Debug)]
pub(super) struct Places {
    all: HashMap<String, Place>,
    root: Mark,
}

impl Places {
    pub(super) fn of(tree: &Marked) -> Self {
        let mut places = Self {
            all: HashMap::new(),
            root: tree.mark,
        };
        places.add(tree, "", "");
        places
    }

    /// Returns the place of a value, or (if it is a default) that of what is
    /// around it, with the path it would have.
    pub(super) fn get(&self, path: &str) -> Place {
        let mut around = path;
        loop {
            if let Some(place) = self.all.get(around) {
                let rest = path.strip_prefix(around).unwrap_or("");
                return Place {
                    path: format!("{}{rest}", place.path),
                    ..*place
                };
            }
            around = match around.rfind(['.', '[']).and_then(|at| around.get(..at)) {
                Some(shorter) => shorter,
                None => {
                    return Place {
                        path: path.to_owned(),
                        key: self.root,
                        value: self.root,
                    };
                }
            };
        }
    }

    fn add(&mut self, tree: &Marked, typed: &str, file: &str) {
        match &tree.node {
            Node::List(items) => {
                for (at, item) in items.iter().enumerate() {
                    let typed = index_path(typed, at);
                    let file = index_path(file, item.index);
                    self.put(&typed, &file, item.value.mark, item.value.mark);
                    self.add(&item.value, &typed, &file);
                }
            }
            Node::Map(entries) => {
                for (key, entry) in entries {
                    let typed = key_path(typed, key);
                    let file = key_path(file, key);
                    self.put(&typed, &file, entry.mark, entry.value_mark());
                    self.add(&entry.value, &typed, &file);
                }
            }
            Node::Null | Node::Bool(_) | Node::Number(_) | Node::Text(_) => {}
        }
    }

    fn put(&mut self, typed: &str, file: &str, key: Mark, value: Mark) {
        let place = Place {
            path: file.to_owned(),
            key,
            value,
        };
        self.all.insert(typed.to_owned(), place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{problem::Report, yaml};

    #[test]
    fn an_element_after_a_dropped_one_keeps_its_place_in_the_file() {
        let text = "list:\n  - a: 1\n  - a: 2\n  - a: 3\n";
        let mut tree = yaml::read(text, &mut Report::new("f")).unwrap();
        let Node::Map(root) = &mut tree.node else {
            panic!()
        };
        let Node::List(items) = &mut root[0].value.node else {
            panic!()
        };
        items.remove(1);
        let place = Places::of(&tree).get("list[1].a");
        assert_eq!((place.path.as_str(), place.value.line), ("list[2].a", 4));
    }

    #[test]
    fn a_value_that_is_not_written_is_placed_at_what_is_around_it() {
        let tree = yaml::read("a:\n  b: {c: 1}\n", &mut Report::new("f")).unwrap();
        let place = Places::of(&tree).get("a.b.d.e");
        assert_eq!((place.path.as_str(), place.value.line), ("a.b.d.e", 2));
        assert_eq!(Places::of(&tree).get("z").value.line, 1);
    }
}
