//! Exchanges as training data: the client's request and the answer it received,
//! as lines in ShareGPT's shape.
//!
//! Pure functions over bytes. Nothing here does I/O or knows the time.
//!
//! - [`dialogue`]: turns that alternate, with tools, thoughts and images
//! - [`request`]: a request's body → the dialogue so far
//! - [`answer`]: a whole answer or its events → what each choice says
//! - [`events`]: the events of a stream, kept in little memory
//! - [`mod@line`]: one dialogue with its answer → one line of JSON
//! - [`lenient`]: JSON as upstreams send it, broken characters included
//! - [`mod@read`]: lines → what the export formats are made of
//! - [`export`]: those formats
//!
//! **Invariant:** a line is one line whatever was said in it, for every reader:
//! also what some take for a line's end (U+2028, U+2029, U+0085) is escaped.

pub mod answer;
pub mod dialogue;
pub mod events;
pub mod export;
pub mod lenient;
pub mod line;
pub mod read;
pub mod request;

pub use answer::{Choice, Said};
pub use dialogue::{Call, Dialogue, Image, Rewrite, Turn, Who};
pub use events::EventLog;
pub use line::{Line, Meta};
pub use request::{Asked, Unreadable};

use crate::openai::{Endpoint, Usage};

/// An exchange that has ended.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// Which call it was.
    pub endpoint: Endpoint,
    /// The client's body.
    pub request: &'a [u8],
    /// What the client received.
    pub answer: Received<'a>,
}

/// What a client received of an answer.
#[derive(Clone, Copy, Debug)]
pub enum Received<'a> {
    /// Nothing, or an error.
    Nothing,
    /// A body.
    Whole(&'a [u8]),
    /// The data of the events of a stream.
    Events(&'a EventLog),
}

/// What an exchange comes to.
#[derive(Debug, Default)]
pub struct Told {
    /// One for each choice.
    pub lines: Vec<Line>,
    /// The images that the lines name.
    pub images: Vec<Image>,
}

/// Turns an exchange into lines: one for each choice of the answer. `meta` is
/// what is known of the exchange beside its words; `rewrite` may change those, and
/// what clients and upstreams wrote of the rest.
///
/// # Errors
/// [`Unreadable`]: it cannot be told in words.
pub fn tell(
    exchange: &Exchange<'_>,
    meta: &Meta,
    rewrite: Option<&dyn Rewrite>,
) -> Result<Told, Unreadable> {
    let mut asked = Asked::read(exchange.endpoint, exchange.request)?;
    let said = match exchange.answer {
        Received::Nothing => Said::nothing(),
        Received::Whole(body) => Said::of_body(exchange.endpoint, body)?,
        Received::Events(log) => Said::of_events(exchange.endpoint, log),
    };
    if said.choices.is_empty() {
        return Err(Unreadable::Empty);
    }
    let many = said.choices.len() > 1;
    let mut told = Told::default();
    for (index, choice) in said.choices {
        let prompt = asked.prompt_of(index, !many);
        let mut dialogue = prompt.ok_or(Unreadable::Empty)?;
        let mut meta = meta.clone();
        meta.model.clone_from(&asked.model);
        meta.answer_model.clone_from(&said.model);
        meta.choice = index;
        meta.finish_reason.clone_from(&choice.finish_reason);
        dialogue.answer(choice, asked.continues);
        if let Some(rewrite) = rewrite {
            dialogue.rewrite(rewrite);
            meta.rewrite(rewrite);
        }
        let id = if said.id.is_empty() {
            &meta.request_id
        } else {
            &said.id
        };
        let id = if many {
            format!("{id}-{index}")
        } else {
            id.clone()
        };
        // The same image may be in several choices' dialogues.
        for image in std::mem::take(&mut dialogue.images) {
            if !told.images.iter().any(|known| known.name == image.name) {
                told.images.push(image);
            }
        }
        told.lines.push(Line::new(id, dialogue, meta));
    }
    Ok(told)
}

/// Figures of a usage as a line has them; all 0 if nothing is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Tokens {
    /// Of the prompt, cached ones included.
    pub prompt_tokens: u64,
    /// Of the answer, reasoning included.
    pub completion_tokens: u64,
    /// Of both.
    pub total_tokens: u64,
    /// Of the prompt's, those that came from a cache.
    pub cached_tokens: u64,
    /// Of the answer's, those that were spent on reasoning.
    pub reasoning_tokens: u64,
}

impl From<Usage> for Tokens {
    fn from(usage: Usage) -> Self {
        // Whole numbers of other readers end at 2^63.
        let bounded = |tokens: u64| tokens.min(u64::MAX / 4);
        Self {
            prompt_tokens: bounded(usage.prompt_tokens),
            completion_tokens: bounded(usage.completion_tokens),
            total_tokens: bounded(usage.total_tokens),
            cached_tokens: bounded(usage.cached_tokens),
            reasoning_tokens: bounded(usage.reasoning_tokens),
        }
    }
}

#[cfg(test)]
mod tests;
