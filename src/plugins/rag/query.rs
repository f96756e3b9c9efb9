//! What to search for: the last words of the user, as a search engine wants
//! them.

use std::collections::VecDeque;

use crate::openai::{
    ApiRequest, Endpoint,
    cursor::Cursor,
    json::{self, Span},
};

/// As much of the beginning, and of the end, of a text is looked at, in bytes.
const LOOKED_AT_MAX: usize = 32 * 1024;
/// The most words of a turn that may lean on the one before.
const FOLLOW_UP_WORDS: usize = 8;
/// Of words like these a question begins that goes on with another.
const BEGINNINGS: [&str; 24] = [
    "and",
    "or",
    "but",
    "so",
    "also",
    "then",
    "what about",
    "how about",
    "why",
    "und",
    "oder",
    "aber",
    "auch",
    "warum",
    "et",
    "mais",
    "pourquoi",
    "y",
    "pero",
    "e",
    "ed",
    "a co",
    "i",
    "那",
];
/// Words that mean something that was said before.
const POINTERS: [&str; 22] = [
    "it", "its", "he", "him", "his", "she", "her", "hers", "they", "them", "their", "this", "that",
    "these", "those", "there", "same", "one", "er", "sie", "ihr", "sein",
];

/// Where the turns of a request stand, and what they say.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Turn {
    /// Of the content in the body; empty if it has none.
    pub(super) content: Span,
}

/// The last two turns of the user, and the first of the system: all that is
/// looked at.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// The last first.
    pub(super) user: Vec<Turn>,
    pub(super) system: Option<Turn>,
}

/// Finds the turns of a list of messages, or of items of a response's input.
/// `at` is where the list stands in `body`.
pub(super) fn turns(body: &[u8], at: Span) -> Turns {
    let mut found = Turns::default();
    let mut last: VecDeque<Turn> = VecDeque::new();
    let mut list = Cursor::new(at.of(body));
    if list.peek() != Some(b'[') {
        return found;
    }
    list.enter_array();
    while list.item() {
        let Some(message) = list.skip() else { break };
        let end = at.start + list.offset();
        let start = end - message.len();
        let mut fields = Cursor::new(message);
        if !fields.enter_object() {
            continue;
        }
        let (mut role, mut content) = (None, Span::default());
        while let Some(key) = fields.key() {
            let Some(value) = fields.skip() else { break };
            match key {
                b"role" => role = json::text(value),
                b"content" => {
                    let end = start + fields.offset();
                    content = Span {
                        start: end - value.len(),
                        end,
                    };
                }
                _ => {}
            }
        }
        match role.as_deref() {
            Some("user") => {
                last.push_front(Turn { content });
                last.truncate(2);
            }
            Some("system" | "developer") if found.system.is_none() => {
                found.system = Some(Turn { content });
            }
            _ => {}
        }
    }
    found.user = last.into();
    found
}

/// Returns what a turn says: a text, or the text parts of a list.
pub(super) fn text_of(content: &[u8]) -> String {
    let mut parts = Cursor::new(content);
    if parts.peek() != Some(b'[') {
        return json::text(content).unwrap_or_default().into_owned();
    }
    // No tree is made of it: that of a hostile one is thirty times as large.
    let mut out = String::new();
    parts.enter_array();
    while parts.item() {
        let Some(part) = parts.skip() else { break };
        let text = match part.first() {
            Some(b'{') => member_of(part, b"text").and_then(json::text),
            _ => json::text(part),
        };
        if let Some(text) = text {
            out.push_str(&text);
            out.push('\n');
        }
    }
    out
}

/// Returns a member of an object, as it is written.
pub(super) fn member_of<'a>(object: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let mut cursor = Cursor::new(object);
    if !cursor.enter_object() {
        return None;
    }
    while let Some(key) = cursor.key() {
        let value = cursor.skip()?;
        if key == name {
            return Some(value);
        }
    }
    None
}

/// Makes the query for a request; `None` if the user asks nothing in words.
pub(super) fn query_of(request: &ApiRequest, most_chars: usize) -> Option<String> {
    let body = &request.raw;
    let member = |key: &str| request.object.find(body, key).map(|found| found.value);
    let (last, before) = match request.endpoint {
        Endpoint::ChatCompletions => of_turns(body, member("messages")?),
        Endpoint::Responses => {
            let input = member("input")?;
            match body.get(input.start) {
                Some(b'[') => of_turns(body, input),
                _ => (text_of(input.of(body)), String::new()),
            }
        }
        Endpoint::Completions => (text_of(prompt_of(request)?.of(body)), String::new()),
        _ => return None,
    };
    let last = shortened(&last, most_chars);
    // Nothing is found by dots and dashes, which mean something in a path.
    if !last.contains(char::is_alphanumeric) {
        return None;
    }
    if !leans_on_what_was_said(&last) {
        return Some(last);
    }
    let room = most_chars.saturating_sub(last.chars().count() + 1);
    let before = shortened(&before, room);
    Some(format!("{before} {last}").trim().to_owned())
}

/// Returns where the one prompt of a completion stands, if there is one in
/// words.
pub(super) fn prompt_of(request: &ApiRequest) -> Option<Span> {
    let member = request.object.find(&request.raw, "prompt")?;
    match member.kind {
        json::Kind::String => Some(member.value),
        json::Kind::Array if member.items == 1 && member.item_kinds.only(json::Kind::String) => {
            let mut list = Cursor::new(member.value.of(&request.raw));
            list.enter_array();
            list.item();
            let text = list.skip()?;
            let end = member.value.start + list.offset();
            Some(Span {
                start: end - text.len(),
                end,
            })
        }
        _ => None,
    }
}

fn of_turns(body: &[u8], at: Span) -> (String, String) {
    let turns = turns(body, at);
    let mut texts = turns.user.iter().map(|turn| text_of(turn.content.of(body)));
    let mut next = || texts.next().unwrap_or_default();
    (next(), next())
}

/// Brings a text to the length of a query: of a long one the last question in
/// it, or else its beginning.
fn shortened(text: &str, most_chars: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut in_code = false;
    let (head, tail) = ends_of(text);
    for line in head.lines().chain(tail.lines()) {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            continue;
        }
        let line = one_line(line);
        if !in_code && !line.is_empty() {
            lines.push(line);
        }
    }
    let whole = lines.join(" ");
    if whole.chars().count() <= most_chars {
        return whole;
    }
    let questions = lines.iter().rev();
    let question = questions
        .flat_map(|line| sentences(line).into_iter().rev())
        .find(|sentence| sentence.ends_with(['?', '？', '؟']));
    let first = lines.first().map_or("", String::as_str);
    cut(question.unwrap_or(first), most_chars)
}

/// Returns the beginning and the end of a long text; of another, all of it.
fn ends_of(text: &str) -> (&str, &str) {
    if text.len() <= 2 * LOOKED_AT_MAX {
        return (text, "");
    }
    let borders = |from: usize| (from..from + 4).find(|at| text.is_char_boundary(*at));
    let head = borders(LOOKED_AT_MAX).and_then(|at| text.get(..at));
    let tail = borders(text.len() - LOOKED_AT_MAX).and_then(|at| text.get(at..));
    (head.unwrap_or_default(), tail.unwrap_or_default())
}

/// Splits a line behind every mark that ends a sentence.
fn sentences(line: &str) -> Vec<&str> {
    let mut all: Vec<&str> = line
        .split_inclusive(['.', '!', '?', '。', '？', '！', '؟'])
        .map(str::trim)
        .collect();
    all.retain(|sentence| !sentence.is_empty());
    all
}

/// Replaces white space and control characters by single spaces.
fn one_line(text: &str) -> String {
    let clean = text.replace(char::is_control, " ");
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Cuts a text to so many characters, behind a word if one ends near.
fn cut(text: &str, most_chars: usize) -> String {
    let Some((end, _)) = text.char_indices().nth(most_chars) else {
        return text.to_owned();
    };
    let head = text.get(..end).unwrap_or_default();
    match head.rsplit_once(' ') {
        Some((whole, _)) if whole.len() * 2 > head.len() => whole.to_owned(),
        _ => head.to_owned(),
    }
}

/// Says whether a turn means little without the one before: "and in 2025?".
fn leans_on_what_was_said(text: &str) -> bool {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower
        .split(|c: char| !c.is_alphanumeric() && c != '\'')
        .filter(|word| !word.is_empty())
        .collect();
    if words.is_empty() || words.len() > FOLLOW_UP_WORDS {
        return false;
    }
    let begins = |with: &str| {
        let rest = lower.strip_prefix(with);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
    };
    let is_short = words.len() <= 2 && lower.chars().count() <= 20 && lower.is_ascii();
    is_short
        || BEGINNINGS.iter().any(|&beginning| begins(beginning))
        || words.iter().any(|word| POINTERS.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(endpoint: Endpoint, body: &str) -> Option<String> {
        let request = ApiRequest::parse(endpoint, body.to_owned().into(), 64).unwrap();
        query_of(&request, 60)
    }

    fn chat(messages: &str) -> Option<String> {
        let body = format!(r#"{{"model":"m","messages":[{messages}]}}"#);
        query(Endpoint::ChatCompletions, &body)
    }

    #[test]
    fn the_last_words_of_the_user_are_the_query() {
        let first = r#"{"role":"user","content":"Tell me about tea."}"#;
        let answer = r#"{"role":"assistant","content":"Tea is a plant."}"#;
        let last = r#"{"role":"user","content":"Who is the president\n of  Vietnam today?"}"#;
        let tool = r#"{"role":"tool","tool_call_id":"1","content":"42"}"#;
        let wanted = Some("Who is the president of Vietnam today?".to_owned());
        assert_eq!(chat(last), wanted);
        assert_eq!(chat(&format!("{first},{answer},{last}")), wanted);
        assert_eq!(chat(&format!("{first},{answer},{last},{tool}")), wanted);
    }

    #[test]
    fn a_follow_up_takes_the_question_before_along() {
        let with = |last: &str| {
            chat(&format!(
                r#"{{"role":"user","content":"Who won the World Cup in 2022?"}},
                   {{"role":"assistant","content":"Argentina."}},
                   {{"role":"user","content":"{last}"}}"#
            ))
            .unwrap()
        };
        assert_eq!(
            with("and in 2018?"),
            "Who won the World Cup in 2022? and in 2018?"
        );
        assert_eq!(with("In 2018?"), "Who won the World Cup in 2022? In 2018?");
        assert_eq!(
            with("Who scored in it?"),
            "Who won the World Cup in 2022? Who scored in it?"
        );
        let alone = "What is the weather in Paris today?";
        assert_eq!(with(alone), alone);
        let alone = "Andorra has how many inhabitants?";
        assert_eq!(with(alone), alone);
    }

    #[test]
    fn of_a_long_text_the_question_is_kept() {
        let long = "word ".repeat(50);
        let content = format!("{long}. Who wrote this? Thanks.\\n```\\ncode {long}?\\n```");
        let message = format!(r#"{{"role":"user","content":"{content}"}}"#);
        assert_eq!(chat(&message).as_deref(), Some("Who wrote this?"));
        let message = format!(r#"{{"role":"user","content":"{long}"}}"#);
        let cut = chat(&message).unwrap();
        assert!(cut.len() <= 60 && cut.ends_with("word"), "{cut:?}");
        let message = format!(r#"{{"role":"user","content":"{}"}}"#, "水".repeat(100));
        assert_eq!(chat(&message).unwrap().chars().count(), 60);
    }

    #[test]
    fn of_a_very_long_text_both_ends_are_looked_at() {
        let long = "żółw. ".repeat(1 << 20);
        let (head, tail) = ends_of(&long);
        assert!(head.len() <= LOOKED_AT_MAX + 3 && tail.len() <= LOOKED_AT_MAX);
        for content in [
            format!("Who reads all of this? {long}"),
            format!("{long} Who reads all of this?"),
        ] {
            let message = format!(r#"{{"role":"user","content":"{content}"}}"#);
            assert_eq!(chat(&message).as_deref(), Some("Who reads all of this?"));
        }
    }

    #[test]
    fn parts_without_words_ask_nothing() {
        let image = r#"{"type":"image_url","image_url":{"url":"data:image/png;base64,AA"}}"#;
        let text = r#"{"type":"text","text":"What is on the picture of the moon?"}"#;
        assert_eq!(
            chat(&format!(r#"{{"role":"user","content":[{image},{text}]}}"#)).as_deref(),
            Some("What is on the picture of the moon?")
        );
        for content in [
            &format!("[{image}]"),
            "null",
            "\"\"",
            "\"..\"",
            "\" \\n\"",
            "\"```\\nx\\n```\"",
            "7",
        ] {
            let message = format!(r#"{{"role":"user","content":{content}}}"#);
            assert_eq!(chat(&message), None, "{content}");
        }
        assert_eq!(chat(r#"{"role":"user"}"#), None);
        assert_eq!(chat(r#"{"role":"system","content":"x"}"#), None);
    }

    #[test]
    fn prompts_and_inputs_are_asked_for_too() {
        let asked =
            |endpoint, member: &str| query(endpoint, &format!(r#"{{"model":"m",{member}}}"#));
        let question = Some("Why is the sky blue at noon?".to_owned());
        for member in [
            r#""prompt":"Why is the sky blue at noon?""#,
            r#""prompt":["Why is the sky blue at noon?"]"#,
        ] {
            assert_eq!(asked(Endpoint::Completions, member), question);
        }
        assert_eq!(asked(Endpoint::Completions, r#""prompt":[1,2]"#), None);
        assert_eq!(asked(Endpoint::Completions, r#""prompt":["a","b"]"#), None);
        for member in [
            r#""input":"Why is the sky blue at noon?""#,
            r#""input":[{"role":"user","content":[{"type":"input_text","text":"Why is the sky blue at noon?"}]}]"#,
        ] {
            assert_eq!(asked(Endpoint::Responses, member), question);
        }
        assert_eq!(asked(Endpoint::Embeddings, r#""input":"x""#), None);
    }
}
