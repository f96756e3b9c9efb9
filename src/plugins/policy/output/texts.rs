//! The rules over the texts of one answer, piece by piece.

use std::collections::BTreeMap;

use super::unreadable;
use crate::{
    error::Result,
    plugins::policy::{
        Hits,
        config::Part,
        rule::{Rule, Stage},
    },
};

/// The most texts of one answer that are kept apart: choices times kinds.
const TEXTS_MAX: usize = 4096;

/// The rules of the list.
#[derive(Default)]
pub(crate) struct Rules {
    pub(crate) list: Vec<(Rule, Vec<Part>)>,
    /// The most characters that each holds back.
    pub(crate) window: usize,
}

/// One text of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// The choice, or the item of a response.
    pub(super) choice: u64,
    pub(super) kind: Kind,
    /// Which of its kind: a tool call, a part.
    pub(super) nth: u64,
    /// The way to it, as a number, where its kind does not say it.
    pub(super) way: u64,
}

/// What a text of an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// `content`, or `text`.
    Answer,
    Refusal,
    /// Under this name: servers differ, and some write it twice.
    Reasoning(&'static str),
    /// The arguments of a call.
    Tool,
    /// What a tool of the client's own kind is given.
    Input,
    /// What is said beside the answer, such as the transcript of a sound, or
    /// under a name that nobody knows.
    Aside,
}

impl Kind {
    fn part(self) -> Part {
        match self {
            Self::Answer | Self::Refusal | Self::Aside => Part::Answer,
            Self::Reasoning(_) => Part::Reasoning,
            Self::Tool | Self::Input => Part::Tools,
        }
    }

    /// Says whether both can go on side by side.
    fn is_beside(self, other: Self) -> bool {
        self.part() == other.part() && (self == other || self.part() == Part::Reasoning)
    }
}

/// What becomes of a piece.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fed {
    pub(super) text: String,
    /// Whether the answer ends here.
    pub(super) denied: bool,
}

/// What is held back of the texts of one answer.
#[derive(Debug, Default)]
pub(super) struct Texts(BTreeMap<Place, Vec<Stage>>);

impl Rules {
    /// Says whether any rule is about texts of this kind.
    pub(super) fn look_at(&self, kind: Kind) -> bool {
        self.list
            .iter()
            .any(|(_, parts)| parts.contains(&kind.part()))
    }

    /// Runs a whole text through the rules.
    pub(super) fn apply(&self, hits: &Hits, kind: Kind, text: &str) -> Fed {
        let mut stages = Vec::new();
        self.push(hits, kind, &mut stages, text, true)
    }

    fn push(
        &self,
        hits: &Hits,
        kind: Kind,
        stages: &mut Vec<Stage>,
        text: &str,
        mut last: bool,
    ) -> Fed {
        let part = kind.part();
        let mut fed = Fed {
            text: text.to_owned(),
            denied: false,
        };
        stages.resize_with(self.list.len(), Stage::default);
        for ((rule, parts), stage) in self.list.iter().zip(stages) {
            if !parts.contains(&part) {
                continue;
            }
            let passed = stage.push(rule, &fed.text, last, self.window);
            hits.note("output", &rule.name, passed.hits);
            fed.text = passed.text;
            // What stands before it is all there is for the rules behind.
            fed.denied |= passed.denied;
            last |= passed.denied;
        }
        fed
    }
}

impl Texts {
    /// Adds a piece to a text; `last` says that none follows.
    ///
    /// # Errors
    /// There are more texts than any answer has.
    pub(super) fn feed(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        place: Place,
        piece: &str,
        last: bool,
    ) -> Result<Fed> {
        if self.0.len() >= TEXTS_MAX && !self.0.contains_key(&place) {
            return Err(unreadable());
        }
        let stages = self.0.entry(place).or_default();
        let fed = rules.push(hits, place.kind, stages, piece, last);
        if last {
            self.0.remove(&place);
        }
        Ok(fed)
    }

    /// Ends texts, in their order, and returns what was held back of them, up
    /// to the first that is denied.
    pub(super) fn end(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        which: impl Fn(&Place) -> bool,
    ) -> Vec<(Place, Fed)> {
        let places: Vec<Place> = self
            .0
            .keys()
            .copied()
            .filter(|place| which(place))
            .collect();
        let mut ended = Vec::new();
        for place in places {
            let Some(mut stages) = self.0.remove(&place) else {
                continue;
            };
            let fed = rules.push(hits, place.kind, &mut stages, "", true);
            let denied = fed.denied;
            if denied || !fed.text.is_empty() {
                ended.push((place, fed));
            }
            if denied {
                break;
            }
        }
        ended
    }

    /// Ends the texts that a text of this kind comes behind: no match goes from
    /// one to the other. What is said beside the answer ends nothing, and goes on
    /// to its own end.
    pub(super) fn end_before(
        &mut self,
        rules: &Rules,
        hits: &Hits,
        next: Place,
    ) -> Vec<(Place, Fed)> {
        self.end(rules, hits, |place| {
            place.kind != Kind::Aside
                && next.kind != Kind::Aside
                && place.choice == next.choice
                && *place != next
                && !(place.kind.is_beside(next.kind) && place.nth == next.nth)
        })
    }
}
