//! Names with `*` in them, as routes, keys and upstreams use them.

use std::fmt;

/// A name in which `*` stands for any text, also for none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pattern(Box<str>);

impl Pattern {
    /// Makes a pattern; every text is one.
    pub fn new(text: impl Into<Box<str>>) -> Self {
        Self(text.into())
    }

    /// Returns the text of the pattern.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name if the pattern is one, without any `*`.
    pub fn exact(&self) -> Option<&str> {
        (!self.0.contains('*')).then_some(&*self.0)
    }

    /// Returns whether `name` fits; in time linear in both for one `*`, and
    /// never worse than their product.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
            return false;
        };
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        for middle in parts {
            match rest.split_once(middle) {
                Some((_, after)) => rest = after,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name, fits) in [
            ("qwen*", "qwen2.5:7b", true),
            ("qwen*", "qwen", true),
            ("qwen*", "my-qwen", false),
            ("*", "", true),
            ("*-coder", "qwen-coder", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "ac", false),
            ("ab*ba", "aba", false),
            ("exact", "exact", true),
            ("exact", "exactly", false),
        ] {
            assert_eq!(
                Pattern::new(pattern).matches(name),
                fits,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn a_pattern_covers_what_all_its_matches_match() {
        for (wide, narrow) in [
            ("*", "qwen*"),
            ("*", "x"),
            ("qwen*", "qwen2.5*"),
            ("qwen*", "qwen"),
            ("a*c", "abc"),
            ("a*b*c", "a-b-c"),
        ] {
            assert!(Pattern::new(wide).matches(narrow), "{wide} {narrow}");
        }
        for (wide, narrow) in [
            ("qwen*", "*"),
            ("qwen*", "q*"),
            ("a*c", "ab*"),
            ("a*a", "a"),
            ("x", "*"),
            ("a*b*c", "a-c-b"),
        ] {
            assert!(!Pattern::new(wide).matches(narrow), "{wide} {narrow}");
        }
    }
}
