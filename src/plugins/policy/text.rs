//! Where the texts of a request stand in its bytes, and whose they are.
//!
//! Keys are read as any reader of the upstreams' would take them: without
//! escapes, and in any case, since some (Go's) do not mind it.

use std::{borrow::Cow, ops::Range};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::openai::{ApiRequest, Endpoint, cursor::Cursor, json};

/// Whose a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum Role {
    /// The application's: `system` and `developer`.
    System,
    /// The user's, and of whoever has an unknown role.
    User,
    /// What a model said before.
    Assistant,
    /// What a tool returned.
    Tool,
    /// Nobody's: what tools are called and what they are said to do, and the
    /// schemas of answers.
    Definitions,
}

impl Role {
    /// Every role there is.
    pub(super) const ALL: [Self; 5] = [
        Self::System,
        Self::User,
        Self::Assistant,
        Self::Tool,
        Self::Definitions,
    ];
}

/// A string in the value of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it stands in the value, with its quotes.
    pub(super) place: Range<usize>,
    pub(super) role: Role,
    /// Of which message it is, or which prompt: a model may read its texts as one.
    pub(super) message: usize,
}

/// What a model may read beside the texts: a name, what a call was given, a
/// definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Aside {
    pub(super) text: String,
    pub(super) role: Role,
}

/// The members that say what something is, or hold what is no text.
const LABELS: [&str; 24] = [
    "annotations",
    "audio_url",
    "b64_json",
    "cache_control",
    "call_id",
    "data",
    "detail",
    "encrypted_content",
    "file_data",
    "file_id",
    "file_url",
    "format",
    "id",
    "image",
    "image_url",
    "images",
    "index",
    "logprobs",
    "role",
    "signature",
    "status",
    "tool_call_id",
    "type",
    "video_url",
];
/// The words of a definition that are its grammar.
const GRAMMAR: [&str; 14] = [
    "additionalproperties",
    "default",
    "description",
    "enum",
    "function",
    "items",
    "json_schema",
    "name",
    "parameters",
    "properties",
    "required",
    "schema",
    "strict",
    "type",
];
/// The deepest nesting that is looked at; bodies are refused far before.
const DEPTH_MAX: usize = 256;

/// The members of a call that hold texts, and what they are.
pub(super) fn members(endpoint: Endpoint) -> &'static [(&'static str, Shape)] {
    match endpoint {
        Endpoint::Completions => &[
            ("prompt", Shape::Plain(Role::User)),
            ("suffix", Shape::Plain(Role::User)),
            ("messages", Shape::Turns),
            ("response_format", Shape::Any(Role::Definitions)),
        ],
        Endpoint::Responses => &[
            ("instructions", Shape::Plain(Role::System)),
            ("input", Shape::Turns),
            ("prompt", Shape::Any(Role::User)),
            ("tools", Shape::Any(Role::Definitions)),
            ("text", Shape::Any(Role::Definitions)),
        ],
        Endpoint::ChatCompletions => &[
            ("messages", Shape::Turns),
            ("documents", Shape::Any(Role::User)),
            ("prediction", Shape::Any(Role::User)),
            ("tools", Shape::Any(Role::Definitions)),
            ("functions", Shape::Any(Role::Definitions)),
            ("response_format", Shape::Any(Role::Definitions)),
        ],
        Endpoint::Embeddings | Endpoint::Rerank | Endpoint::Moderations => {
            &[("messages", Shape::Turns)]
        }
    }
}

/// What a member with texts looks like.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    /// A string, or a list of them.
    Plain(Role),
    /// A list of messages; a string is the user's.
    Turns,
    /// Whatever it is, every string of it.
    Any(Role),
}

/// Finds the texts in a member's value.
pub(super) fn pieces(value: &[u8], shape: Shape) -> Vec<Piece> {
    let mut found = Vec::new();
    let mut cursor = Cursor::new(value);
    let role = match shape {
        Shape::Plain(role) => role,
        Shape::Turns => Role::User,
        Shape::Any(_) => return found,
    };
    match cursor.peek() {
        Some(b'"') => found.push(Piece {
            place: take(&mut cursor),
            role,
            message: 0,
        }),
        Some(b'[') => {
            cursor.enter_array();
            let mut nth = 0;
            while cursor.item() {
                match (cursor.peek(), shape) {
                    (Some(b'"'), _) => found.push(Piece {
                        place: take(&mut cursor),
                        role,
                        message: nth,
                    }),
                    (Some(b'{'), Shape::Turns) => {
                        let first = found.len();
                        message(&mut cursor, &mut found);
                        let own = found.iter_mut().skip(first);
                        own.for_each(|piece| piece.message = nth);
                    }
                    _ => {
                        cursor.skip();
                    }
                }
                nth += 1;
            }
        }
        _ => {}
    }
    found
}

/// Says whether a request's prompt is one of token ids, which nobody here can
/// read.
pub(super) fn has_token_ids(request: &ApiRequest) -> bool {
    if request.endpoint != Endpoint::Completions {
        return false;
    }
    let mut cursor = Cursor::new(request.get("prompt").unwrap_or_default());
    if cursor.peek() != Some(b'[') {
        return false;
    }
    cursor.enter_array();
    cursor.item() && cursor.peek() != Some(b'"')
}

/// Finds what a model may read of a member beside its `pieces`.
pub(super) fn asides(value: &[u8], shape: Shape, pieces: &[Piece]) -> Vec<Aside> {
    let mut walk = Walk {
        value,
        pieces,
        found: Vec::new(),
    };
    let mut cursor = Cursor::new(value);
    match shape {
        Shape::Plain(_) => {}
        Shape::Any(role) => walk.any(&mut cursor, role, 0),
        Shape::Turns => {
            if cursor.peek() == Some(b'[') {
                cursor.enter_array();
                while cursor.item() {
                    let start = walk.found.len();
                    let before = cursor.clone();
                    walk.any(&mut cursor, Role::User, 0);
                    if walk.found.len() > start {
                        let role = role_of_message(before);
                        let own = walk.found.iter_mut().skip(start);
                        own.for_each(|aside| aside.role = role);
                    }
                }
            }
        }
    }
    walk.found
}

struct Walk<'a> {
    value: &'a [u8],
    /// In their order.
    pieces: &'a [Piece],
    found: Vec<Aside>,
}

impl Walk<'_> {
    fn any(&mut self, cursor: &mut Cursor<'_>, role: Role, depth: usize) {
        match cursor.peek() {
            Some(b'"') => {
                let place = take(cursor);
                let is_piece = |piece: &Piece| piece.place.start.cmp(&place.start);
                if self.pieces.binary_search_by(is_piece).is_err() {
                    let text = self.value.get(place).and_then(json::text);
                    self.put(text, role);
                }
            }
            Some(b'[') if depth < DEPTH_MAX => {
                cursor.enter_array();
                while cursor.item() {
                    self.any(cursor, role, depth + 1);
                }
            }
            Some(b'{') if depth < DEPTH_MAX => {
                cursor.enter_object();
                while let Some(key) = cursor.key() {
                    let name = plain(key);
                    if role == Role::Definitions && !GRAMMAR.iter().any(|word| *word == name) {
                        let quoted = [b"\"", key, b"\""].concat();
                        self.put(json::text(&quoted), role);
                    }
                    let is_label = match role {
                        // A definition may have anything under any name.
                        Role::Definitions => name == "type" && cursor.peek() == Some(b'"'),
                        _ => LABELS.contains(&&*name),
                    };
                    if is_label {
                        cursor.skip();
                    } else {
                        self.any(cursor, role, depth + 1);
                    }
                }
            }
            _ => {
                cursor.skip();
            }
        }
    }

    fn put(&mut self, text: Option<Cow<'_, str>>, role: Role) {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            let text = text.into_owned();
            self.found.push(Aside { text, role });
        }
    }
}

fn role_of_message(mut cursor: Cursor<'_>) -> Role {
    let mut role = Role::User;
    if cursor.peek() != Some(b'{') {
        return role;
    }
    cursor.enter_object();
    while let Some(key) = cursor.key() {
        match &*plain(key) {
            "role" => role = role_of(cursor.skip().unwrap_or_default()),
            "type" => role = role_of_item(cursor.skip().unwrap_or_default()).unwrap_or(role),
            _ => {
                cursor.skip();
            }
        }
    }
    role
}

/// Returns whose an item of a response's input is that has no role.
fn role_of_item(kind: &[u8]) -> Option<Role> {
    let kind = json::text(kind)?;
    if kind.ends_with("_output") {
        Some(Role::Tool)
    } else if kind.ends_with("_call") || kind == "reasoning" {
        Some(Role::Assistant)
    } else {
        None
    }
}

fn message(cursor: &mut Cursor<'_>, found: &mut Vec<Piece>) {
    let first = found.len();
    let mut role = Role::User;
    cursor.enter_object();
    while let Some(key) = cursor.key() {
        match &*plain(key) {
            "role" => role = role_of(cursor.skip().unwrap_or_default()),
            "type" => role = role_of_item(cursor.skip().unwrap_or_default()).unwrap_or(role),
            "content" | "output" | "text" => content(cursor, found),
            _ => {
                cursor.skip();
            }
        }
    }
    for piece in found.iter_mut().skip(first) {
        piece.role = role;
    }
}

fn content(cursor: &mut Cursor<'_>, found: &mut Vec<Piece>) {
    let role = Role::User; // until the message's is known
    match cursor.peek() {
        Some(b'"') => found.push(Piece {
            place: take(cursor),
            role,
            message: 0,
        }),
        Some(b'[') => {
            cursor.enter_array();
            while cursor.item() {
                part(cursor, found);
            }
        }
        _ => part(cursor, found),
    }
}

fn part(cursor: &mut Cursor<'_>, found: &mut Vec<Piece>) {
    let role = Role::User;
    match cursor.peek() {
        Some(b'"') => found.push(Piece {
            place: take(cursor),
            role,
            message: 0,
        }),
        Some(b'{') => {
            cursor.enter_object();
            while let Some(key) = cursor.key() {
                let is_text = matches!(&*plain(key), "text" | "refusal" | "thinking");
                if is_text && cursor.peek() == Some(b'"') {
                    found.push(Piece {
                        place: take(cursor),
                        role,
                        message: 0,
                    });
                } else {
                    cursor.skip();
                }
            }
        }
        _ => {
            cursor.skip();
        }
    }
}

fn role_of(value: &[u8]) -> Role {
    match json::text(value).as_deref() {
        Some("system" | "developer") => Role::System,
        Some("assistant" | "model") => Role::Assistant,
        Some("tool" | "function") => Role::Tool,
        _ => Role::User,
    }
}

/// Skips a value and says where it stands.
pub(super) fn take(cursor: &mut Cursor<'_>) -> Range<usize> {
    cursor.peek();
    let start = cursor.offset();
    cursor.skip();
    start..cursor.offset()
}

/// Returns a key without its escapes, in lower case.
pub(super) fn plain(key: &[u8]) -> Cow<'_, str> {
    let is_plain = |byte: &u8| byte.is_ascii() && !byte.is_ascii_uppercase() && *byte != b'\\';
    match std::str::from_utf8(key) {
        Ok(text) if key.iter().all(is_plain) => text.into(),
        _ => {
            let quoted = [b"\"", key, b"\""].concat();
            let text = json::text(&quoted).map(Cow::into_owned).unwrap_or_default();
            // Upper case in the way of Unicode: \u{17f} is an s, \u{212a} a k.
            text.to_uppercase().to_lowercase().into()
        }
    }
}

/// Returns a value with other bytes in these places, which are in order.
pub(super) fn spliced(value: &[u8], changes: &[(Range<usize>, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len() + 64);
    let mut at = 0;
    for (place, bytes) in changes {
        out.extend_from_slice(value.get(at..place.start).unwrap_or_default());
        out.extend_from_slice(bytes);
        at = place.end;
    }
    out.extend_from_slice(value.get(at..).unwrap_or_default());
    out
}

/// Returns a text as a JSON string.
pub(super) fn quoted(text: &str) -> Vec<u8> {
    serde_json::to_vec(text).expect("a string is always JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(value: &str, shape: Shape) -> Vec<(String, Role)> {
        let found = pieces(value.as_bytes(), shape).into_iter();
        let text = |piece: Piece| {
            let text = json::text(&value.as_bytes()[piece.place])
                .unwrap()
                .into_owned();
            (text, piece.role)
        };
        found.map(text).collect()
    }

    #[test]
    fn every_text_of_the_turns_is_found_with_its_role() {
        let value = r#" [ {"content":"a","role":"system"}, {"role":"developer","content":[{"type":"text","text":"b"}]},
            {"ROLE":"user","c\u006fntent":[{"type":"image_url","image_url":{"url":"u"}},{"Text":"c\n"}, "d"]},
            {"role":"assistant","content":null,"tool_calls":[{"function":{"arguments":"no"}}]},
            {"role":"tool","content":"e"}, {"type":"function_call_output","output":"f"} ] "#;
        let expected = [
            ("a", Role::System),
            ("b", Role::System),
            ("c\n", Role::User),
            ("d", Role::User),
            ("e", Role::Tool),
            ("f", Role::Tool),
        ];
        let expected = expected.map(|(text, role)| (text.to_owned(), role));
        assert_eq!(texts(value, Shape::Turns), expected);
    }

    #[test]
    fn what_is_read_beside_the_texts_is_found_once() {
        let of = |value: &str, shape: Shape| {
            let pieces = pieces(value.as_bytes(), shape);
            let found = asides(value.as_bytes(), shape, &pieces).into_iter();
            found
                .map(|aside| (aside.text, aside.role))
                .collect::<Vec<_>>()
        };
        let turns = r#"[{"content":"text","n\u0061me":"bob","role":"user"},
            {"role":"assistant","tool_calls":[{"id":"no","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}}]},
            {"type":"custom_tool_call","call_id":"no","input":"run"},
            {"role":"user","content":[{"type":"file","file":{"filename":"a.pdf","file_data":"no"}},{"type":"text","text":"t"}]}, "s"]"#;
        let expected = [
            ("bob", Role::User),
            ("f", Role::Assistant),
            ("{\"a\":1}", Role::Assistant),
            ("run", Role::Assistant),
            ("a.pdf", Role::User),
        ];
        let expected = expected.map(|(text, role)| (text.to_owned(), role));
        assert_eq!(of(turns, Shape::Turns), expected);
        let tools = r#"[{"type":"function","function":{"name":"f","parameters":{"properties":{"city":{"type":"string","description":"where"}}}}}]"#;
        let texts = of(tools, Shape::Any(Role::Definitions)).into_iter();
        let texts: Vec<String> = texts.map(|(text, _)| text).collect();
        assert_eq!(texts, ["f", "city", "where"]);
    }

    #[test]
    fn prompts_are_texts_or_lists_of_them() {
        let user = Shape::Plain(Role::User);
        assert_eq!(texts(r#""a""#, user), [("a".to_owned(), Role::User)]);
        assert_eq!(texts(r#"["a", "b"]"#, user).len(), 2);
        assert_eq!(texts("[1,2]", user), []);
        assert_eq!(texts("[[1],[2]]", user), []);
    }
}
