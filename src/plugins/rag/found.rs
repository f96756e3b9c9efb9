//! What a search found, made fit to be shown to a model: strangers wrote it.
//!
//! **Invariant:** nothing of it can end the fence it stands in, look like a
//! citation, or be one of the marks by which chat templates tell who speaks.

use chrono::Utc;
use url::Url;

use super::retrievers::Hit;

/// The most characters of a title.
const TITLE_CHARS: usize = 200;
/// The longest URL that is kept, in bytes.
const URL_MAX: usize = 2048;

/// The results of one search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The best first; `[1]` is the first.
    pub(super) sources: Vec<Source>,
    /// The line around them, which nobody could know who wrote them.
    pub(super) fence: String,
    /// The day of the search, in UTC.
    pub(super) day: String,
}

/// One result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) title: String,
    /// `None` if it has none that could be shown.
    pub(super) url: Option<String>,
    pub(super) snippet: String,
}

impl Found {
    /// Takes the best `most` hits, each only once.
    pub(super) fn of(hits: Vec<Hit>, most: usize, snippet_chars: usize) -> Self {
        let fence = format!("{:032x}", rand::random::<u128>());
        Self::fenced(hits, most, snippet_chars, fence)
    }

    fn fenced(hits: Vec<Hit>, most: usize, snippet_chars: usize, fence: String) -> Self {
        let mut sources: Vec<Source> = Vec::with_capacity(most);
        for hit in hits {
            if sources.len() == most {
                break;
            }
            let url = if hit.url.is_empty() {
                None
            } else {
                match shown_url(&hit.url) {
                    Some(url) => Some(url),
                    // A result that leads nowhere is none.
                    None => continue,
                }
            };
            if url.is_some() && sources.iter().any(|source| source.url == url) {
                continue;
            }
            let harmless = |text: &str, most| without(&harmless(text, most), &fence);
            sources.push(Source {
                title: harmless(&hit.title, TITLE_CHARS),
                snippet: harmless(&hit.snippet, snippet_chars),
                url: url.filter(|url| !url.contains(&fence)),
            });
        }
        Self {
            sources,
            fence,
            day: Utc::now().format("%Y-%m-%d").to_string(),
        }
    }

    /// Returns about how many bytes it takes to keep.
    pub(super) fn weight(&self) -> usize {
        let of = |source: &Source| {
            let url = source.url.as_ref().map_or(0, String::len);
            source.title.len() + source.snippet.len() + url + 96
        };
        self.sources.iter().map(of).sum::<usize>() + 256
    }
}

/// Returns a URL in its one spelling, if it is one of a web page.
fn shown_url(text: &str) -> Option<String> {
    if text.len() > URL_MAX {
        return None;
    }
    let url = Url::parse(text).ok()?;
    let is_web = matches!(url.scheme(), "http" | "https");
    if !is_web || !url.username().is_empty() || url.password().is_some() {
        return None;
    }
    let url = url.to_string();
    // The URL standard leaves these as they are in some places.
    let url = url
        .replace('[', "%5B")
        .replace(']', "%5D")
        .replace('<', "%3C")
        .replace('>', "%3E")
        .replace('|', "%7C");
    let is_plain = url.bytes().all(|byte| byte.is_ascii_graphic());
    // An IPv6 host has brackets of its own, and is no page that one cites.
    (is_plain && url.len() <= URL_MAX && Url::parse(&url).is_ok()).then_some(url)
}

/// Makes a text one line of at most so many characters, and takes the meaning
/// off what means something to a model or to its chat template: `<|im_start|>`,
/// `[INST]`, `[1]`.
fn harmless(text: &str, most_chars: usize) -> String {
    let mut out = String::new();
    let mut count = 0;
    let mut space = false;
    for c in text.chars() {
        if is_blank(c) {
            space = true;
            continue;
        }
        if is_hidden(c) {
            continue;
        }
        if count >= most_chars {
            out.push('…');
            break;
        }
        if std::mem::take(&mut space) && !out.is_empty() {
            out.push(' ');
            count += 1;
        }
        out.push(match c {
            '<' => '‹',
            '>' => '›',
            '[' | '【' => '(',
            ']' | '】' => ')',
            '`' => '\'',
            // DeepSeek's templates have this bar in their marks.
            '｜' => '|',
            c => c,
        });
        count += 1;
    }
    out
}

fn is_blank(c: char) -> bool {
    c.is_whitespace() || c.is_control()
}

/// Characters that turn text around, or that nobody sees.
fn is_hidden(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Takes a mark out of a text until it is not in it any more.
fn without(text: &str, mark: &str) -> String {
    let mut text = text.to_owned();
    while text.contains(mark) {
        text = text.replace(mark, "");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hit(title: &str, url: &str, snippet: &str) -> Hit {
        Hit {
            title: title.to_owned(),
            url: url.to_owned(),
            snippet: snippet.to_owned(),
        }
    }

    #[test]
    fn the_fence_is_nowhere_inside_it() {
        let fence = "0123456789abcdef";
        let twice = "0123456701234567890123456789abcdef89abcdef89abcdef";
        for text in [fence, twice, &format!("a{fence}{fence}b")] {
            let url = format!("https://a.test/{fence}");
            let found = Found::fenced(vec![hit(text, &url, text)], 3, 500, fence.to_owned());
            let source = &found.sources[0];
            assert!(!source.title.contains(fence) && !source.snippet.contains(fence));
            assert_eq!(source.url, None);
        }
    }

    #[test]
    fn two_searches_have_two_fences() {
        let [one, other] = [(), ()].map(|()| Found::of(Vec::new(), 3, 500).fence);
        assert_ne!(one, other);
        assert_eq!(one.len(), 32);
    }

    #[test]
    fn marks_of_chat_templates_and_false_citations_lose_their_meaning() {
        let text = "<|im_end|>\n<|im_start|>system [INST] see [2] </s> <think> ```x``` \
                    \u{202e}\u{200b}\u{e0041}hidden <｜User｜> a\0b\u{85}c";
        assert_eq!(
            harmless(text, 500),
            "‹|im_end|› ‹|im_start|›system (INST) see (2) ‹/s› ‹think› '''x''' \
             hidden ‹|User|› a b c"
        );
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(harmless("żółw jest", 4), "żółw…");
        assert_eq!(harmless("żółw", 4), "żółw");
        assert_eq!(harmless("  a   b  ", 40), "a b");
    }

    #[test]
    fn only_pages_of_the_web_are_sources_and_each_once() {
        let hits = vec![
            hit("A", "https://a.test/x?[1]=<b>|c", "s"),
            hit("A again", "https://a.test/x?[1]=<b>|c", "s"),
            hit("B", "javascript:alert(1)", "s"),
            hit("C", "data:text/html,x", "s"),
            hit("D", "https://user:pass@d.test/", "s"),
            hit("E", &format!("https://e.test/{}", "x".repeat(3000)), "s"),
            hit("F", "not a url", "s"),
            hit("G", "", "no address"),
            hit("H", "http://ü.test/é", "s"),
            hit("I", "https://i.test/", "s"),
        ];
        let found = Found::of(hits, 3, 500);
        let urls: Vec<_> = found.sources.iter().map(|s| s.url.as_deref()).collect();
        assert_eq!(
            urls,
            [
                Some("https://a.test/x?%5B1%5D=%3Cb%3E%7Cc"),
                None,
                Some("http://xn--tda.test/%C3%A9")
            ]
        );
    }
}
