//! Which sources an answer cites, and where: `[n]` in a text that comes in
//! pieces.
//!
//! **Invariant:** the same text gives the same citations, however it is cut;
//! places count characters (Unicode scalar values), as OpenAI's do.

use serde_json::{Value, json};

use super::found::Found;

/// The most citations of one answer.
const CITATIONS_MAX: usize = 1000;
/// The longest text between the brackets of a citation, in characters.
const INSIDE_MAX: usize = 32;
/// What reasoning stands between where a server leaves it in the text.
const THINK: [&str; 2] = ["<think>", "</think>"];

/// One `[n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Citation {
    /// The place of its opening bracket.
    pub(super) start: usize,
    /// One past its closing bracket.
    pub(super) end: usize,
    /// Which source, from 1.
    pub(super) number: usize,
}

/// Reads the text of one answer as it comes.
#[derive(Clone, Debug, Default)]
pub(super) struct Reader {
    /// How many sources there are.
    sources: usize,
    /// Characters so far.
    chars: usize,
    pub(super) citations: Vec<Citation>,
    /// A bracket that is open, and what stands behind it.
    open: Option<(usize, String)>,
    code: Code,
    /// The last characters, where they may be a mark.
    tail: String,
    thinking: bool,
    /// Nothing but white space has come yet.
    begun: bool,
}

/// Whether the text is code, in which `a[1]` cites nothing.
#[derive(Clone, Debug, Default)]
struct Code {
    /// Backticks in a row.
    ticks: usize,
    fenced: bool,
    /// How many opened the fence.
    fence: usize,
    inline: bool,
}

impl Code {
    fn take(&mut self, c: char) {
        if c == '`' {
            self.ticks += 1;
            return;
        }
        match std::mem::take(&mut self.ticks) {
            0 => {}
            1 | 2 if !self.fenced => self.inline = !self.inline,
            1 | 2 => {}
            ticks => {
                self.fenced = !self.fenced;
                self.fence = ticks;
                self.inline = false;
            }
        }
        if c == '\n' {
            self.inline = false;
        }
    }

    fn is_on(&self) -> bool {
        self.fenced || self.inline
    }
}

impl Reader {
    pub(super) fn new(sources: usize) -> Self {
        Self {
            sources,
            ..Self::default()
        }
    }

    /// Returns whether nothing has come yet.
    pub(super) fn is_empty(&self) -> bool {
        self.chars == 0
    }

    /// Returns whether all that has come is reasoning that has not ended.
    pub(super) fn is_thinking(&self) -> bool {
        self.thinking
    }

    /// Returns what ends a block of code that is open: empty if none is.
    pub(super) fn end_of_code(&self) -> String {
        let mut code = self.code.clone();
        code.take('\n');
        match code.fenced {
            true => format!("\n{}", "`".repeat(code.fence)),
            false => String::new(),
        }
    }

    /// Reads the next piece.
    pub(super) fn take(&mut self, text: &str) {
        for c in text.chars() {
            self.code.take(c);
            self.look_for_reasoning(c);
            if !self.thinking && !self.code.is_on() {
                self.look_for_citation(c);
            } else {
                self.open = None;
            }
            self.chars += 1;
        }
    }

    fn look_for_citation(&mut self, c: char) {
        match (c, &mut self.open) {
            ('[' | '【', _) => self.open = Some((self.chars, String::new())),
            (']' | '】', Some(_)) => {
                if let Some((start, inside)) = self.open.take() {
                    self.close(start, &inside);
                }
            }
            (c, Some((_, inside))) => {
                // `[^1]` and gpt-oss's `【1†L2-L4】` are citations too.
                let is_of_one =
                    c.is_ascii_digit() || matches!(c, ',' | ' ' | '^' | '†' | 'L' | '-');
                if is_of_one && inside.chars().count() < INSIDE_MAX {
                    inside.push(c);
                } else {
                    self.open = None;
                }
            }
            _ => {}
        }
    }

    fn close(&mut self, start: usize, inside: &str) {
        let inside = inside.strip_prefix('^').unwrap_or(inside);
        let inside = inside.split('†').next().unwrap_or_default();
        for number in inside.split(',') {
            let Ok(number) = number.trim().parse::<usize>() else {
                continue;
            };
            let is_known = (1..=self.sources).contains(&number);
            if is_known && self.citations.len() < CITATIONS_MAX {
                self.citations.push(Citation {
                    start,
                    end: self.chars + 1,
                    number,
                });
            }
        }
    }

    /// Reasoning is no answer: what it cites, the answer does not.
    fn look_for_reasoning(&mut self, c: char) {
        let [start, end] = THINK;
        if !self.thinking && self.begun {
            return;
        }
        if self.tail.is_empty() && c.is_whitespace() {
            return;
        }
        self.tail.push(c);
        let mark = if self.thinking { end } else { start };
        if self.tail == mark {
            self.thinking = !self.thinking;
            self.begun = !self.thinking;
            self.tail.clear();
        } else if !mark.starts_with(&self.tail) {
            self.tail.clear();
            if !self.thinking {
                self.begun = true;
            } else if mark.starts_with(c) {
                self.tail.push(c);
            }
        }
    }
}

/// Whose shape annotations have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// `{"type":"url_citation","url_citation":{…}}`
    Chat,
    /// `{"type":"url_citation",…}`
    Responses,
}

/// Returns the annotations of an answer: one for each `[n]` whose source has a
/// URL.
pub(super) fn annotations(reader: &Reader, found: &Found, shape: Shape) -> Vec<Value> {
    let of = |citation: &Citation| {
        let source = found.sources.get(citation.number - 1)?;
        let url = source.url.as_deref()?;
        let (start, end, title) = (citation.start, citation.end, &source.title);
        Some(match shape {
            Shape::Chat => json!({
                "type": "url_citation",
                "url_citation": {
                    "start_index": start,
                    "end_index": end,
                    "url": url,
                    "title": title,
                },
            }),
            Shape::Responses => json!({
                "type": "url_citation",
                "start_index": start,
                "end_index": end,
                "url": url,
                "title": title,
            }),
        })
    };
    reader.citations.iter().filter_map(of).collect()
}

/// Writes the list of sources for the end of an answer.
pub(super) fn list_of_sources(found: &Found) -> String {
    let mut out = String::from("\n\nSources:");
    for (index, source) in found.sources.iter().enumerate() {
        out.push_str(&format!("\n[{}] {}", index + 1, source.title));
        if let Some(url) = &source.url {
            let gap = if source.title.is_empty() { "" } else { " - " };
            out.push_str(&format!("{gap}{url}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::rag::retrievers::Hit;

    fn read(pieces: &[&str]) -> Vec<(usize, usize, usize)> {
        let mut reader = Reader::new(3);
        pieces.iter().for_each(|piece| reader.take(piece));
        let places = reader.citations.iter();
        places.map(|c| (c.start, c.end, c.number)).collect()
    }

    #[test]
    fn citations_are_found_at_their_characters() {
        assert_eq!(read(&["Zażółć 😀 [1] and [3]."]), [(9, 12, 1), (17, 20, 3)]);
        assert_eq!(read(&["[1][2]"]), [(0, 3, 1), (3, 6, 2)]);
        assert_eq!(read(&["x [1, 2]"]), [(2, 8, 1), (2, 8, 2)]);
        assert_eq!(read(&["x [^2] 【3†L1-L4】"]), [(2, 6, 2), (7, 16, 3)]);
        assert_eq!(read(&["[[1]]"]), [(1, 4, 1)]);
    }

    #[test]
    fn what_only_looks_like_one_is_none() {
        for text in [
            "[0] [4] [99999999999999999999] [-1] [a] [1a] [] [ ] [1",
            "see `a[1]` and\n```\nb[2]\n```\nor [1 and more]",
            "<think>the first says [1]</think>No.",
            "\n<think>[1]",
        ] {
            assert_eq!(read(&[text]), [], "{text}");
        }
        assert_eq!(read(&["<think>[1]</think>Yes [2]"]), [(22, 25, 2)]);
        assert_eq!(read(&["a <think>[1]"]), [(9, 12, 1)]);
        assert_eq!(read(&["it`s\n[1]"]), [(5, 8, 1)]);
    }

    #[test]
    fn every_cut_gives_the_same_citations() {
        let text = "<think>é [1]</think>A `x[1]` é [1]\n```\n[2]\n```\n[^2], [3, 1] 【2†L1】.";
        let whole = read(&[text]);
        assert_eq!(whole.len(), 5);
        for (at, _) in text.char_indices() {
            let (a, b) = text.split_at(at);
            assert_eq!(read(&[a, b]), whole, "{at}");
        }
        let each: Vec<String> = text.chars().map(String::from).collect();
        let each: Vec<&str> = each.iter().map(String::as_str).collect();
        assert_eq!(read(&each), whole);
    }

    #[test]
    fn an_answer_of_nothing_but_citations_is_bounded() {
        let mut reader = Reader::new(3);
        reader.take(&"[1]".repeat(5000));
        reader.take(&"[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1".repeat(1000));
        assert_eq!(reader.citations.len(), CITATIONS_MAX);
    }

    #[test]
    fn only_sources_with_an_address_are_annotated() {
        let hit = |title: &str, url: &str| Hit {
            title: title.to_owned(),
            url: url.to_owned(),
            snippet: "s".to_owned(),
        };
        let found = Found::of(vec![hit("A", "https://a.test/"), hit("B", "")], 3, 100);
        let mut reader = Reader::new(found.sources.len());
        reader.take("x [1] [2] [3]");
        let list = list_of_sources(&found);
        assert_eq!(list, "\n\nSources:\n[1] A - https://a.test/\n[2] B");
        reader.take(&list);
        let chat = annotations(&reader, &found, Shape::Chat);
        let citation = |start: usize, end: usize| json!({ "start_index": start, "end_index": end, "url": "https://a.test/", "title": "A" });
        let wrap = |inner: Value| json!({ "type": "url_citation", "url_citation": inner });
        assert_eq!(chat, [wrap(citation(2, 5)), wrap(citation(24, 27))]);
        let responses = annotations(&reader, &found, Shape::Responses);
        assert_eq!(responses[0]["start_index"], 2);
        assert_eq!(responses[0]["type"], "url_citation");
    }
}
