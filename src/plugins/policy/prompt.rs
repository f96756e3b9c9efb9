//! Rules about what goes to a model: texts that are denied, replaced, masked,
//! or put before everything else.
//!
//! They read the decoded texts of messages and prompts, never the JSON around
//! them; a text that changes is written anew as a string, and every other byte
//! of the request stays. What denies reads more: the texts of a message as one,
//! names, what calls were given, and definitions.

use std::borrow::Cow;

use http::StatusCode;

use super::{
    Hits,
    rule::{Action, Rule},
    text::{self, Aside, Piece, Role, Shape, asides, pieces, plain, quoted, spliced, take},
    watch::{Stopped, Watch},
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

/// A member of the request that a model reads.
struct Member {
    key: &'static str,
    texts: Vec<Text>,
    /// Read by what denies.
    asides: Vec<Aside>,
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
/// The refusal of the first rule that denies a text; 400 `prompt_check_timeout`
/// if it takes too long to find out.
pub(super) fn apply(
    rules: &[PromptRule],
    request: &mut ApiRequest,
    hits: &Hits,
    watch: &Watch,
) -> Result<()> {
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
    let denies = |rule: &PromptRule| matches!(rule, PromptRule::Texts { rule, .. } if rule.action == Action::Deny);
    let denies = rules.iter().any(denies);
    let mut all = Vec::new();
    for &(key, shape) in text::members(request.endpoint) {
        if let Some(value) = request.get(key) {
            let found = pieces(value, shape);
            let asides = match denies {
                true => asides(value, shape, &found),
                false => Vec::new(),
            };
            all.push(Member {
                key,
                texts: texts(value, found),
                asides,
            });
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
                for member in &mut all {
                    if rule.action == Action::Deny {
                        if member
                            .has(rule, roles, watch)
                            .map_err(|Stopped| hits.late())?
                        {
                            hits.note("prompt", &rule.name, 1);
                            return Err(refusal.error().param(member.key));
                        }
                        continue;
                    }
                    for text in member
                        .texts
                        .iter_mut()
                        .filter(|text| roles.contains(&text.piece.role))
                    {
                        let passed = rule
                            .rewrite(&text.text, watch)
                            .map_err(|Stopped| hits.late())?;
                        hits.note("prompt", &rule.name, passed.hits);
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
    for Member { key, texts, .. } in all {
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

impl Member {
    /// Says whether a rule finds anything in what has these roles.
    fn has(
        &self,
        rule: &Rule,
        roles: &[Role],
        watch: &Watch,
    ) -> std::result::Result<bool, Stopped> {
        let finds = |text: &str| -> std::result::Result<bool, Stopped> {
            Ok(rule.matcher.search(text, 0, watch)?.is_some())
        };
        for aside in self
            .asides
            .iter()
            .filter(|aside| roles.contains(&aside.role))
        {
            if finds(&aside.text)? {
                return Ok(true);
            }
        }
        // A template joins the texts of a message, some with a line's end.
        let messages = self
            .texts
            .chunk_by(|one, other| one.piece.message == other.piece.message);
        for message in messages {
            let texts = message
                .iter()
                .filter(|text| roles.contains(&text.piece.role));
            let texts: Vec<&str> = texts.map(|text| &*text.text).collect();
            for text in &texts {
                if finds(text)? {
                    return Ok(true);
                }
            }
            if texts.len() > 1 && (finds(&texts.concat())? || finds(&texts.join("\n"))?) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn texts(value: &[u8], found: Vec<Piece>) -> Vec<Text> {
    let found = found.into_iter();
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
            let found = pieces(value, Shape::Plain(Role::User));
            let found = texts(value, found).into_iter();
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
