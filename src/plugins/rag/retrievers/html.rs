//! As much HTML as a page of results needs: its tags and texts, in order.
//!
//! No tree is built. A page is a stranger's, and the tree of a hostile one
//! grows with the square of its bytes, by the standard's own rules for tags
//! that were not closed.
//!
//! **Invariant:** one pass, no recursion, and nothing longer than the page.

use std::borrow::Cow;

/// A piece of a page.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Token<'a> {
    /// A start tag: its name as it is written, and what follows it.
    Open(&'a str, &'a str),
    /// An end tag.
    Close(&'a str),
    /// A text with its entities.
    Text(&'a str),
}

/// Reads a page from front to back.
pub(super) struct Tokens<'a> {
    rest: &'a str,
    /// The name of an element in which nothing is a tag but its own end.
    raw: Option<&'a str>,
}

impl<'a> Tokens<'a> {
    pub(super) fn of(page: &'a str) -> Self {
        Self {
            rest: page,
            raw: None,
        }
    }

    /// Cuts off what stands before `at`.
    fn take(&mut self, at: usize) -> &'a str {
        let (head, tail) = self.rest.split_at_checked(at).unwrap_or((self.rest, ""));
        self.rest = tail;
        head
    }

    /// Cuts off what stands before `end`, and drops `end`; without it, all.
    fn until(&mut self, end: &str) -> &'a str {
        let at = self.rest.find(end).unwrap_or(self.rest.len());
        let head = self.take(at);
        self.rest = self.rest.strip_prefix(end).unwrap_or_default();
        head
    }

    /// Skips what is in an element such as `script`.
    fn skip_raw(&mut self, name: &str) {
        loop {
            let Some(at) = self.rest.find("</") else {
                self.rest = "";
                return;
            };
            let tag = self.rest.get(at + 2..).unwrap_or_default();
            let is_end = tag
                .get(..name.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(name));
            self.take(if is_end { at } else { at + 2 });
            if is_end {
                return;
            }
        }
    }

    /// Reads the inside of a tag up to its `>`, quotes respected.
    fn tag(&mut self) -> &'a str {
        let mut quote = None;
        let end = self.rest.bytes().position(|byte| match (quote, byte) {
            (None, b'>') => true,
            (None, b'"' | b'\'') => {
                quote = Some(byte);
                false
            }
            (Some(open), _) if open == byte => {
                quote = None;
                false
            }
            _ => false,
        });
        match end {
            Some(end) => {
                let tag = self.take(end);
                self.take(1);
                tag
            }
            // A quote that is never closed must not swallow the page twice.
            None => self.take(self.rest.len()),
        }
    }
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        if let Some(name) = self.raw.take() {
            self.skip_raw(name);
        }
        loop {
            if self.rest.is_empty() {
                return None;
            }
            let Some(inside) = self.rest.strip_prefix('<') else {
                let end = self.rest.find('<').unwrap_or(self.rest.len());
                return Some(Token::Text(self.take(end)));
            };
            match inside.bytes().next() {
                Some(b'!') if inside.starts_with("!--") => {
                    self.take(4);
                    self.until("-->");
                }
                Some(b'!' | b'?') => {
                    self.until(">");
                }
                Some(b'/') => {
                    self.take(2);
                    let name = self.until(">");
                    let name = name.split(|c: char| c.is_ascii_whitespace()).next();
                    return Some(Token::Close(name.unwrap_or_default()));
                }
                Some(first) if first.is_ascii_alphabetic() => {
                    self.take(1);
                    let tag = self.tag();
                    let end = tag
                        .find(|c: char| c.is_ascii_whitespace() || c == '/')
                        .unwrap_or(tag.len());
                    let (name, rest) = tag.split_at_checked(end).unwrap_or((tag, ""));
                    let is_raw = ["script", "style", "template", "noscript"]
                        .iter()
                        .any(|raw| raw.eq_ignore_ascii_case(name));
                    self.raw = is_raw.then_some(name);
                    return Some(Token::Open(name, rest));
                }
                _ => return Some(Token::Text(self.take(1))),
            }
        }
    }
}

/// Returns the value of an attribute, its entities decoded.
pub(super) fn attribute<'a>(tag: &'a str, name: &str) -> Option<Cow<'a, str>> {
    let mut rest = tag;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '/');
        let end = rest.find(|c: char| c.is_ascii_whitespace() || c == '=' || c == '/')?;
        let (key, after) = rest.split_at_checked(end)?;
        let after = after.trim_start();
        let Some(value) = after.strip_prefix('=') else {
            rest = after;
            continue;
        };
        let value = value.trim_start();
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let (value, after) = match quote {
            Some(quote) => {
                let inside = value.get(1..)?;
                inside.split_once(quote).unwrap_or((inside, ""))
            }
            None => {
                let end = value.find(|c: char| c.is_ascii_whitespace());
                value.split_at_checked(end.unwrap_or(value.len()))?
            }
        };
        if key.eq_ignore_ascii_case(name) {
            return Some(decoded(value));
        }
        rest = after;
    }
}

/// Says whether an element has a class.
pub(super) fn has_class(tag: &str, class: &str) -> bool {
    attribute(tag, "class").is_some_and(|all| all.split_ascii_whitespace().any(|one| one == class))
}

/// Decodes the entities of a text. Of the named ones those that search engines
/// write; others stay as they are.
pub(super) fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        out.push_str(before);
        // The longest that is known has ten characters.
        let end = after.bytes().take(10).position(|byte| byte == b';');
        let known = end.and_then(|end| Some((after.get(..end)?, after.get(end + 1..)?)));
        match known.and_then(|(name, tail)| Some((entity(name)?, tail))) {
            Some((character, tail)) => {
                out.push(character);
                rest = tail;
            }
            None => {
                out.push('&');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

fn entity(name: &str) -> Option<char> {
    if let Some(number) = name.strip_prefix('#') {
        let code = match number.strip_prefix(['x', 'X']) {
            Some(hex) => u32::from_str_radix(hex, 16).ok()?,
            None => number.parse().ok()?,
        };
        return char::from_u32(code).filter(|c| *c != '\0');
    }
    Some(match name {
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "quot" => '"',
        "apos" => '\'',
        "nbsp" => ' ',
        "ndash" => '–',
        "mdash" => '—',
        "hellip" => '…',
        "lsquo" => '‘',
        "rsquo" => '’',
        "ldquo" => '“',
        "rdquo" => '”',
        "laquo" => '«',
        "raquo" => '»',
        "middot" => '·',
        "bull" => '•',
        "deg" => '°',
        "euro" => '€',
        "copy" => '©',
        "reg" => '®',
        "trade" => '™',
        _ => return None,
    })
}

/// Returns what a piece of HTML says, without its tags.
pub(super) fn plain(html: &str) -> String {
    if !html.contains(['<', '&']) {
        return html.to_owned();
    }
    let mut out = String::with_capacity(html.len());
    for token in Tokens::of(html) {
        if let Token::Text(text) = token {
            out.push_str(&decoded(text));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_and_texts_come_in_order() {
        let page = "<!DOCTYPE html><!-- <b> --><p class='a b' x>One &amp; <B>two</B></p>\
                    <script>if (1 < 2) \"</p>\"</SCRIPT >3 < 4";
        let tokens: Vec<_> = Tokens::of(page).collect();
        assert_eq!(
            tokens,
            [
                Token::Open("p", " class='a b' x"),
                Token::Text("One &amp; "),
                Token::Open("B", ""),
                Token::Text("two"),
                Token::Close("B"),
                Token::Close("p"),
                Token::Open("script", ""),
                Token::Close("SCRIPT"),
                Token::Text("3 "),
                Token::Text("<"),
                Token::Text(" 4"),
            ]
        );
    }

    #[test]
    fn an_attribute_is_found_in_any_spelling() {
        for tag in [
            r#" id=1 href="/a?b=1&amp;c" x"#,
            r" href = '/a?b=1&amp;c'",
            " HREF=/a?b=1&amp;c class=z",
            " disabled href=\"/a?b=1&amp;c\"/",
        ] {
            assert_eq!(attribute(tag, "href").as_deref(), Some("/a?b=1&c"), "{tag}");
        }
        assert_eq!(attribute(r#" data-href="x""#, "href"), None);
        assert_eq!(attribute(" href", "href"), None);
        assert!(has_class(r#" class="a result--ad""#, "result--ad"));
        assert!(!has_class(r#" class="a result--ads""#, "result--ad"));
    }

    #[test]
    fn what_is_said_stays_without_its_tags() {
        assert_eq!(
            plain("a <b>b</b> &lt;c&gt; &#x27;&#39; &unknown; &"),
            "a b <c> '' &unknown; &"
        );
        assert_eq!(plain("&#0;&#x110000;&#99999999999;").len(), 28);
    }

    #[test]
    fn any_bytes_come_to_an_end() {
        for page in [
            "<",
            "</",
            "<a",
            "<a href=\"",
            "<!--",
            "<script>",
            "<script></scrip",
            "&",
            "&#",
            "é<é",
            "<a href='é",
            "<é>",
            "</é",
            "<a =\"\"=>",
            "<a b=é c=\">",
        ] {
            for token in Tokens::of(page) {
                if let Token::Open(_, tag) = token {
                    attribute(tag, "href");
                }
            }
            plain(page);
        }
        let many = "<b a=\"1\">".repeat(100_000) + &"</".repeat(100_000);
        assert_eq!(plain(&many), "");
    }
}
