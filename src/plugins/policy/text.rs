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
}

/// A string in the value of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it stands in the value, with its quotes.
    pub(super) place: Range<usize>,
    pub(super) role: Role,
}

/// The members of a call that hold texts, and what they are.
pub(super) fn members(endpoint: Endpoint) -> &'static [(&'static str, Shape)] {
    match endpoint {
        Endpoint::Completions => &[
            ("prompt", Shape::Plain(Role::User)),
            ("suffix", Shape::Plain(Role::User)),
            ("messages", Shape::Turns),
        ],
        Endpoint::Responses => &[
            ("instructions", Shape::Plain(Role::System)),
            ("input", Shape::Turns),
        ],
        Endpoint::ChatCompletions
        | Endpoint::Embeddings
        | Endpoint::Rerank
        | Endpoint::Moderations => &[("messages", Shape::Turns)],
    }
}

/// What a member with texts looks like.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    /// A string, or a list of them.
    Plain(Role),
    /// A list of messages; a string is the user's.
    Turns,
}

/// Finds the texts in a member's value.
pub(super) fn pieces(value: &[u8], shape: Shape) -> Vec<Piece> {
    let mut found = Vec::new();
    let mut cursor = Cursor::new(value);
    let role = match shape {
        Shape::Plain(role) => role,
        Shape::Turns => Role::User,
    };
    match cursor.peek() {
        Some(b'"') => found.push(Piece {
            place: take(&mut cursor),
            role,
        }),
        Some(b'[') => {
            cursor.enter_array();
            while cursor.item() {
                match (cursor.peek(), shape) {
                    (Some(b'"'), _) => found.push(Piece {
                        place: take(&mut cursor),
                        role,
                    }),
                    (Some(b'{'), Shape::Turns) => message(&mut cursor, &mut found),
                    _ => {
                        cursor.skip();
                    }
                }
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

fn message(cursor: &mut Cursor<'_>, found: &mut Vec<Piece>) {
    let first = found.len();
    let mut role = Role::User;
    cursor.enter_object();
    while let Some(key) = cursor.key() {
        match &*plain(key) {
            "role" => role = role_of(cursor.skip().unwrap_or_default()),
            "type" => {
                if cursor.skip() == Some(b"\"function_call_output\"") {
                    role = Role::Tool;
                }
            }
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
        }),
        Some(b'{') => {
            cursor.enter_object();
            while let Some(key) = cursor.key() {
                let is_text = matches!(&*plain(key), "text" | "refusal" | "thinking");
                if is_text && cursor.peek() == Some(b'"') {
                    found.push(Piece {
                        place: take(cursor),
                        role,
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
    fn prompts_are_texts_or_lists_of_them() {
        let user = Shape::Plain(Role::User);
        assert_eq!(texts(r#""a""#, user), [("a".to_owned(), Role::User)]);
        assert_eq!(texts(r#"["a", "b"]"#, user).len(), 2);
        assert_eq!(texts("[1,2]", user), []);
        assert_eq!(texts("[[1],[2]]", user), []);
    }
}
