//! The events of a continuation, made to read like more of the same answer.

use super::{
    super::{
        Edit, Frame,
        cursor::{Cursor, is_something},
        edit::splice,
        json,
    },
    Identity, Partial,
    chunk::Chunk,
};

/// How much of an answer's beginning must come again before it is taken for
/// another beginning, in characters; all of it, if it is shorter.
const OPENING_CHARS: usize = 64;

/// Fits the events of a continuation to the answer that it continues.
#[derive(Clone, Debug)]
pub struct Sequel {
    identity: Identity,
    /// Whether the client has been told the role.
    has_role: bool,
    /// White space that the client has and the upstream was not sent.
    owed: String,
    /// The tokens of what was sent on.
    tokens: u64,
    /// The tokens of the client's prompt, if the first upstream told.
    prompt_tokens: Option<u64>,
    opening: Option<Opening>,
}

/// What the beginning of a continuation shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing yet: what came so far may be either. Hold it back.
    Undecided,
    /// It goes on.
    GoesOn,
    /// It is the answer's own beginning once more.
    Repeats {
        /// Whether that is more than chance: short answers may say a thing twice.
        surely: bool,
    },
    /// It thinks before it speaks, and so has not gone on.
    Reasons,
}

/// An event is not what could be fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event that cannot be fitted: {why}")]
pub struct Unfitting {
    /// What is wrong with it.
    pub why: &'static str,
}

impl Sequel {
    /// Fits what follows `partial`, of whose text the first `sent` bytes, which
    /// are `tokens` tokens, are sent on; the white space behind them is not.
    pub(super) fn of(partial: &Partial, text: &str, sent: usize, tokens: u64) -> Self {
        Self {
            identity: partial.identity.clone().unwrap_or_default(),
            has_role: partial.has_role,
            owed: text.get(sent..).unwrap_or_default().to_owned(),
            tokens,
            prompt_tokens: partial.told.map(|usage| usage.prompt_tokens),
            opening: Opening::of(text.get(..sent).unwrap_or_default()),
        }
    }

    /// Trusts the upstream: nothing of its beginning is held back.
    pub fn trust(&mut self) {
        self.opening = None;
    }

    /// Listens to an event of the beginning, in their order, until it is known
    /// what they are.
    pub fn listen(&mut self, frame: &Frame) -> Heard {
        let Some(data) = &frame.data else {
            return Heard::Undecided;
        };
        let chunk = Chunk::read(data);
        if chunk.reasoning {
            return Heard::Reasons;
        }
        let text = chunk.text.and_then(json::text);
        let heard = match (&mut self.opening, text) {
            (_, None) => Heard::Undecided,
            (None, Some(_)) => Heard::GoesOn,
            (Some(opening), Some(text)) => opening.hear(&text),
        };
        if heard == Heard::Undecided && (chunk.finished || chunk.obstacle.is_some()) {
            // It is over, or calls a tool: it was no repetition of a longer text.
            return Heard::GoesOn;
        }
        heard
    }

    /// Returns an event as the client may read it behind the others; `None` if
    /// nothing of it is new. To be called once for each, in their order.
    ///
    /// # Errors
    /// [`Unfitting`]: the stream is broken.
    pub fn fit(&mut self, frame: Frame) -> Result<Option<Frame>, Unfitting> {
        let Some(data) = frame.data.as_deref() else {
            return Ok(Some(frame));
        };
        if data.trim_ascii() == b"[DONE]" || data.trim_ascii().is_empty() {
            return Ok(Some(frame));
        }
        let broken = |_why| Unfitting {
            why: "no valid JSON",
        };
        let object = json::scan(data, usize::MAX).map_err(broken)?;
        let value = |key| object.find(data, key).map(|member| member.value.of(data));
        let mut edits = Vec::new();
        for (key, first) in self.identity.members() {
            match (value(key), first) {
                (Some(_), Some(first)) => edits.push(Edit::set(key, first.to_vec())),
                (Some(_), None) => edits.push(Edit::remove(key)),
                (None, _) => {}
            }
        }
        let usage = value("usage").filter(|usage| usage.first() == Some(&b'{'));
        if let Some(usage) = usage.and_then(|usage| self.sum(usage)) {
            edits.push(Edit::set("usage", usage));
        }
        if let Some(choices) = value("choices") {
            let fitted = self.fit_choices(choices)?;
            if fitted.emptied && usage.is_none() {
                return Ok(None);
            }
            if let Some(choices) = fitted.choices {
                edits.push(Edit::set("choices", choices));
            }
        }
        Ok(Some(match splice(data, &object, &edits) {
            None => frame,
            Some(data) => Frame {
                raw: frame.with_data(&data),
                data: Some(data.into()),
                event: frame.event,
                is_comment: false,
            },
        }))
    }

    /// Adds what was delivered before to a usage object.
    fn sum(&self, usage: &[u8]) -> Option<Vec<u8>> {
        let object = json::scan(usage, usize::MAX).ok()?;
        let number = |key| {
            let member = object.find(usage, key)?;
            Cursor::new(member.value.of(usage)).integer()
        };
        // The partial answer was part of this upstream's prompt.
        let prompt = number("prompt_tokens").map(|told| {
            self.prompt_tokens
                .unwrap_or_else(|| told.saturating_sub(self.tokens))
        });
        let completion = number("completion_tokens").map(|told| told.saturating_add(self.tokens));
        let total = number("total_tokens").map(|told| match (prompt, completion) {
            (Some(prompt), Some(completion)) => prompt.saturating_add(completion),
            _ => told,
        });
        let edits: Vec<_> = [
            ("prompt_tokens", prompt),
            ("completion_tokens", completion),
            ("total_tokens", total),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some(Edit::set(key, value?.to_string().into_bytes())))
        .collect();
        splice(usage, &object, &edits)
    }

    fn fit_choices(&mut self, choices: &[u8]) -> Result<Fitted, Unfitting> {
        let mut fitted = Fitted::default();
        let mut cursor = Cursor::new(choices);
        if !cursor.enter_array() || !cursor.item() {
            return Ok(fitted);
        }
        let start = cursor.offset();
        let Some(choice) = cursor.skip() else {
            return Ok(fitted);
        };
        let end = cursor.offset();
        if cursor.item() {
            return Err(Unfitting {
                why: "a second choice",
            });
        }
        let broken = |_why| Unfitting {
            why: "a choice that is no object",
        };
        let object = json::scan(choice, usize::MAX).map_err(broken)?;
        let value = |key| {
            let member = object.find(choice, key)?;
            Some(member.value.of(choice))
        };
        let finished = matches!(value("finish_reason"), Some([b'"', _, _, ..]));
        let mut edits = Vec::new();
        let mut emptied = false;
        if let Some(text) = value("text").and_then(|text| self.without_owed(text)) {
            emptied = text.is_empty();
            edits.push(Edit::set_text("text", &text));
        }
        if let Some(delta) = value("delta").filter(|delta| delta.first() == Some(&b'{')) {
            let members = json::scan(delta, usize::MAX).map_err(broken)?;
            let content = members.find(delta, "content");
            let mut inner = Vec::new();
            if self.has_role && members.find(delta, "role").is_some() {
                inner.push(Edit::remove("role"));
            }
            if let Some(text) =
                content.and_then(|content| self.without_owed(content.value.of(delta)))
            {
                let others = members
                    .members
                    .iter()
                    .filter(|member| !matches!(member.name(delta), b"content" | b"role"));
                let more = others.map(|member| member.value.of(delta));
                emptied = text.is_empty() && !more.into_iter().any(is_something);
                inner.push(Edit::set_text("content", &text));
            }
            if let Some(delta) = splice(delta, &members, &inner) {
                edits.push(Edit::set("delta", delta));
            }
        }
        fitted.emptied = emptied && !finished;
        fitted.choices = splice(choice, &object, &edits).map(|choice| {
            let before = choices.get(..start).unwrap_or_default();
            let after = choices.get(end..).unwrap_or_default();
            [before, &choice, after].concat()
        });
        Ok(fitted)
    }

    /// Drops as much white space from the beginning of a JSON string as the
    /// client has already; `None` if that is none.
    fn without_owed(&mut self, text: &[u8]) -> Option<String> {
        if self.owed.is_empty() || !is_something(text) {
            return None;
        }
        let text = json::text(text)?;
        let mut rest = text.chars();
        loop {
            let before = rest.as_str();
            let Some(next) = rest.next() else {
                return Some(String::new());
            };
            let mut owed = self.owed.chars();
            // A line's end stands for one, never for a mere space.
            let paid = match next {
                '\n' => owed.any(|owed| owed == '\n'),
                _ => next.is_whitespace() && owed.next().is_some(),
            };
            if !paid {
                self.owed.clear();
                return (before.len() < text.len()).then(|| before.to_owned());
            }
            self.owed = owed.as_str().to_owned();
        }
    }
}

/// What became of the choices of an event.
#[derive(Default)]
struct Fitted {
    /// As they are now, if they are not what they were.
    choices: Option<Vec<u8>>,
    /// Whether nothing is left in them.
    emptied: bool,
}

/// The beginning of the answer, to notice when it comes again.
#[derive(Clone, Debug)]
struct Opening {
    text: String,
    /// How much of it has come again, in bytes.
    heard: usize,
}

impl Opening {
    fn of(text: &str) -> Option<Self> {
        let text: String = text.trim().chars().take(OPENING_CHARS).collect();
        (!text.is_empty()).then_some(Self { text, heard: 0 })
    }

    fn hear(&mut self, said: &str) -> Heard {
        for c in said.chars() {
            if self.heard == 0 && c.is_whitespace() {
                continue;
            }
            let rest = self.text.get(self.heard..).unwrap_or_default();
            if !rest.starts_with(c) {
                return Heard::GoesOn;
            }
            self.heard += c.len_utf8();
            if self.heard == self.text.len() {
                let surely = self.text.chars().count() >= OPENING_CHARS / 4;
                return Heard::Repeats { surely };
            }
        }
        Heard::Undecided
    }
}
