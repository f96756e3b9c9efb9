//! Rules about what goes to a model: texts that are denied, replaced, masked,
//! or put before everything else.
//!
//! They read the decoded texts of messages and prompts, never the JSON around
//! them; a text that changes is written anew as a string, and every other byte
//! of the request stays.

use std::borrow::Cow;

use http::StatusCode;

use super::{
    Hits,
    rule::Rule,
    text::{self, Piece, Role, Shape, pieces, plain, quoted, spliced, take},
};
use crate::{
    error::{Error, Result},
    openai::{ApiRequest, Edit, Endpoint, cursor::Cursor, json},
};

/// One rule of the list.
pub(super) enum PromptRule {
    /// Looks at texts.
    Texts {
        rule: Box<Rule>,
        roles: Vec<Role>,
        refusal: Refusal,
    },
    /// Puts a text of the system's before everything else.
    Prepend { name: String, text: String },
}

/// What a client is told whose prompt is denied.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: String,
    pub(super) message: String,
}

impl Refusal {
    fn error(&self) -> Error {
        let kind = match self.status {
            StatusCode::FORBIDDEN => "permission_error",
            _ => "invalid_request_error",
        };
        let mut error = Error::new(self.status, kind, "", self.message.clone());
        error.code = Some(Cow::Owned(self.code.clone()));
        error
    }
}

/// A text of the request, as it is by now.
struct Text {
    piece: Piece,
    text: String,
    changed: bool,
}

/// Applies the rules in their order.
///
/// # Errors
/// The refusal of the first rule that denies a text.
pub(super) fn apply(rules: &[PromptRule], request: &mut ApiRequest, hits: &Hits) -> Result<()> {
    if rules.is_empty() || !request.endpoint.streams() && request.get("messages").is_none() {
        return Ok(());
    }
    let looks = rules
        .iter()
        .any(|rule| matches!(rule, PromptRule::Texts { .. }));
    if looks && text::has_token_ids(request) {
        let message = "`prompt` must be text: token ids are not accepted here";
        return Err(Error::invalid("unsupported_value", message).param("prompt"));
    }
    let mut all: Vec<(&'static str, Vec<Text>)> = Vec::new();
    for &(key, shape) in text::members(request.endpoint) {
        if let Some(value) = request.get(key) {
            all.push((key, texts(value, shape)));
        }
    }
    let mut before: Vec<&str> = Vec::new();
    for rule in rules {
        match rule {
            PromptRule::Prepend { name, text } => {
                hits.note("prompt", name, 1);
                before.push(text);
            }
            PromptRule::Texts {
                rule,
                roles,
                refusal,
            } => {
                for (key, texts) in &mut all {
                    for text in texts
                        .iter_mut()
                        .filter(|text| roles.contains(&text.piece.role))
                    {
                        let passed = rule.apply(&text.text);
                        hits.note("prompt", &rule.name, passed.hits);
                        if passed.denied {
                            return Err(refusal.error().param(*key));
                        }
                        if passed.hits > 0 {
                            text.changed |= passed.text != text.text;
                            text.text = passed.text;
                        }
                    }
                }
            }
        }
    }
    let mut edits = Vec::new();
    for (key, texts) in all {
        let changes: Vec<_> = texts
            .into_iter()
            .filter(|text| text.changed)
            .map(|text| (text.piece.place, quoted(&text.text)))
            .collect();
        if !changes.is_empty() {
            let value = request.get(key).unwrap_or_default();
            edits.push(Edit::set(key, spliced(value, &changes)));
        }
    }
    request.edit(&edits)?;
    if before.is_empty() {
        return Ok(());
    }
    prepend(request, &before.join("\n\n"))
}

fn texts(value: &[u8], shape: Shape) -> Vec<Text> {
    let found = pieces(value, shape).into_iter();
    let read = |piece: Piece| {
        let text = json::text(value.get(piece.place.clone())?)?.into_owned();
        Some(Text {
            piece,
            text,
            changed: false,
        })
    };
    found.filter_map(read).collect()
}

/// Puts a text before everything else that the model reads.
fn prepend(request: &mut ApiRequest, text: &str) -> Result<()> {
    let joined = |old: &str| quoted(&format!("{text}\n\n{old}"));
    let edit = match request.endpoint {
        Endpoint::Responses => {
            let old = request.get("instructions").and_then(json::text);
            let new = old.map_or_else(|| quoted(text), |old| joined(&old));
            Some(Edit::set("instructions", new))
        }
        Endpoint::Completions if request.get("messages").is_none() => {
            let value = request.get("prompt").unwrap_or_default();
            let found = texts(value, Shape::Plain(Role::User)).into_iter();
            let changes: Vec<_> = found
                .map(|old| (old.piece.place, joined(&old.text)))
                .collect();
            Some(Edit::set("prompt", spliced(value, &changes)))
        }
        _ => request
            .get("messages")
            .map(|value| Edit::set("messages", before_messages(value, text))),
    };
    request.edit(&edit.into_iter().collect::<Vec<_>>())
}

/// Puts a text into the system's message if it is the first, since many models
/// take no second one; else into a message of its own.
fn before_messages(value: &[u8], text: &str) -> Vec<u8> {
    let mut cursor = Cursor::new(value);
    cursor.enter_array();
    cursor.peek();
    let start = cursor.offset();
    let mut role = Role::User;
    let mut content = None;
    cursor.enter_object();
    while let Some(key) = cursor.key() {
        let key = plain(key);
        let place = take(&mut cursor);
        let bytes = value.get(place.clone()).unwrap_or_default();
        match &*key {
            "role" if matches!(bytes, b"\"system\"" | b"\"developer\"") => role = Role::System,
            "content" => content = Some((place, bytes)),
            _ => {}
        }
    }
    let own = || {
        let message = [
            &br#"{"role":"system","content":"#[..],
            &quoted(text),
            &b"},"[..],
        ]
        .concat();
        spliced(value, &[(start..start, message)])
    };
    match content.filter(|_| role == Role::System) {
        Some((place, bytes @ [b'"', ..])) => {
            let old = json::text(bytes).unwrap_or_default();
            spliced(value, &[(place, quoted(&format!("{text}\n\n{old}")))])
        }
        Some((place, [b'[', rest @ ..])) => {
            let comma: &[u8] = match rest.trim_ascii_start().first() {
                Some(b']') => b"",
                _ => b",",
            };
            let part = [
                &br#"{"type":"text","text":"#[..],
                &quoted(text),
                &b"}"[..],
                comma,
            ]
            .concat();
            let at = place.start + 1;
            spliced(value, &[(at..at, part)])
        }
        _ => own(),
    }
}
