//! What is wrong at the moment, and which of it has been told. Without I/O: what
//! happens goes in with its time, what is to be told comes out.
//!
//! A trouble is told at once; when it is over, that is told too. The same trouble
//! again is not told before `cooldown` has passed since it was last told: then it
//! is, if it is still there.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long nobody must have been served by a fallback until that is over.
pub(super) const FALLBACK_OVER: Duration = Duration::from_secs(60);

/// The most troubles that are known at once: upstreams × models can be many.
const TROUBLES_MAX: usize = 1000;

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// An upstream cannot be reached, or is not well.
    Down,
    /// A breaker is open.
    Breaker,
    /// An upstream refuses our key, or has no quota left.
    Key,
    /// A route is served by its fallback.
    Fallback,
    /// Exchanges that should be captured are lost.
    Capture,
    /// The budget of a key is nearly used, or used up.
    Budget,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [
        Self::Down,
        Self::Breaker,
        Self::Key,
        Self::Fallback,
        Self::Capture,
        Self::Budget,
    ];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Breaker => "breaker",
            Self::Key => "key",
            Self::Fallback => "fallback",
            Self::Capture => "capture",
            Self::Budget => "budget",
        }
    }
}

/// Something that was noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) kind: Kind,
    /// What it is about: an upstream, a route, a key, a folder.
    pub(super) subject: Arc<str>,
    /// Whether it is wrong; else it is right again.
    pub(super) wrong: bool,
    /// In a few words: what is wrong.
    pub(super) detail: String,
}

/// Something to tell people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Alert {
    pub(super) kind: Kind,
    pub(super) subject: Arc<str>,
    pub(super) wrong: bool,
    pub(super) detail: String,
    /// How often it came again without being told.
    pub(super) suppressed: u32,
}

#[derive(Debug)]
struct Trouble {
    wrong: bool,
    /// Whether people know that it is wrong.
    told: bool,
    told_at: Option<Instant>,
    noticed_at: Instant,
    detail: String,
    suppressed: u32,
}

/// All troubles.
#[derive(Debug, Default)]
pub(super) struct Board {
    troubles: HashMap<(Kind, Arc<str>), Trouble>,
}

impl Board {
    /// Takes a notice; returns what is to be told now.
    pub(super) fn notice(
        &mut self,
        notice: Notice,
        cooldown: Duration,
        now: Instant,
    ) -> Option<Alert> {
        let key = (notice.kind, Arc::clone(&notice.subject));
        if !notice.wrong {
            let trouble = self.troubles.get_mut(&key)?;
            return over(&key, trouble, notice.detail);
        }
        if !self.troubles.contains_key(&key) {
            self.make_room();
        }
        let trouble = self.troubles.entry(key.clone()).or_insert(Trouble {
            wrong: false,
            told: false,
            told_at: None,
            noticed_at: now,
            detail: String::new(),
            suppressed: 0,
        });
        // Of a budget each step is noticed once in its day or month, and nobody
        // says when that is over.
        let news = !trouble.wrong || key.0 == Kind::Budget;
        trouble.wrong = true;
        trouble.noticed_at = now;
        if !news {
            return None;
        }
        trouble.detail = notice.detail;
        if key.0 == Kind::Budget {
            trouble.told_at = None;
        }
        tell(&key, trouble, cooldown, now)
    }

    /// Returns what time alone makes worth telling: troubles that came again too
    /// soon and are still there, and fallbacks that are no longer in use.
    pub(super) fn look(&mut self, cooldown: Duration, now: Instant) -> Vec<Alert> {
        let mut alerts = Vec::new();
        for (key, trouble) in &mut self.troubles {
            let idle = now.saturating_duration_since(trouble.noticed_at);
            if key.0 == Kind::Fallback && trouble.wrong && idle >= FALLBACK_OVER {
                let detail = "no longer served by its fallback".to_owned();
                alerts.extend(over(key, trouble, detail));
            } else if trouble.wrong && !trouble.told && is_due(trouble, cooldown, now) {
                alerts.extend(tell(key, trouble, cooldown, now));
            }
        }
        alerts
    }

    /// Forgets one that is over, the longest known first; else one of those
    /// that are not: what is new matters more.
    fn make_room(&mut self) {
        if self.troubles.len() < TROUBLES_MAX {
            return;
        }
        let oldest = self
            .troubles
            .iter()
            .min_by_key(|(_, trouble)| (trouble.wrong, trouble.noticed_at))
            .map(|(key, _)| key.clone());
        if let Some(oldest) = oldest {
            self.troubles.remove(&oldest);
        }
    }
}

fn is_due(trouble: &Trouble, cooldown: Duration, now: Instant) -> bool {
    trouble
        .told_at
        .is_none_or(|at| now.saturating_duration_since(at) >= cooldown)
}

fn tell(
    key: &(Kind, Arc<str>),
    trouble: &mut Trouble,
    cooldown: Duration,
    now: Instant,
) -> Option<Alert> {
    if !is_due(trouble, cooldown, now) {
        trouble.told = false;
        trouble.suppressed = trouble.suppressed.saturating_add(1);
        return None;
    }
    trouble.told = true;
    trouble.told_at = Some(now);
    Some(Alert {
        kind: key.0,
        subject: Arc::clone(&key.1),
        wrong: true,
        detail: trouble.detail.clone(),
        suppressed: std::mem::take(&mut trouble.suppressed),
    })
}

/// Ends a trouble; returns what is to be told, if people know of it.
fn over(key: &(Kind, Arc<str>), trouble: &mut Trouble, detail: String) -> Option<Alert> {
    let known = std::mem::take(&mut trouble.told);
    if !std::mem::take(&mut trouble.wrong) || !known {
        return None;
    }
    Some(Alert {
        kind: key.0,
        subject: Arc::clone(&key.1),
        wrong: false,
        detail,
        suppressed: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOLDOWN: Duration = Duration::from_secs(300);

    fn notice(kind: Kind, wrong: bool, detail: &str) -> Notice {
        Notice {
            kind,
            subject: "gpu-1".into(),
            wrong,
            detail: detail.to_owned(),
        }
    }

    /// Returns what is told at each of these seconds: `!` a trouble, `.` its end.
    fn told(kind: Kind, steps: &[(u64, Option<bool>)]) -> String {
        let start = Instant::now();
        let mut board = Board::default();
        let mut said = String::new();
        for &(second, wrong) in steps {
            let now = start + Duration::from_secs(second);
            let mut alerts = board.look(COOLDOWN, now);
            if let Some(wrong) = wrong {
                alerts.extend(board.notice(notice(kind, wrong, "why"), COOLDOWN, now));
            }
            said.push_str(match alerts.as_slice() {
                [] => "-",
                [alert] if alert.wrong => "!",
                [_] => ".",
                _ => "?",
            });
        }
        said
    }

    #[test]
    fn a_trouble_is_told_once_and_so_is_its_end() {
        let steps = [
            (0, Some(true)),
            (1, Some(true)),
            (2, Some(false)),
            (3, Some(false)),
        ];
        assert_eq!(told(Kind::Down, &steps), "!-.-");
    }

    #[test]
    fn what_was_never_wrong_is_not_told_to_be_over() {
        assert_eq!(told(Kind::Down, &[(0, Some(false))]), "-");
    }

    #[test]
    fn what_flaps_is_told_again_after_the_cooldown_if_it_is_still_wrong() {
        let steps = [
            (0, Some(true)),
            (10, Some(false)),
            (20, Some(true)),
            (30, Some(false)),
            (40, Some(true)),
            (299, None),
            (300, None),
            (310, Some(false)),
        ];
        assert_eq!(told(Kind::Down, &steps), "!.----!.");
    }

    #[test]
    fn how_often_nothing_was_told_is_told() {
        let start = Instant::now();
        let mut board = Board::default();
        let mut at = |second, wrong| {
            let now = start + Duration::from_secs(second);
            board.notice(notice(Kind::Down, wrong, "why"), COOLDOWN, now)
        };
        at(0, true);
        for second in 1..4 {
            at(second, false);
            at(second, true);
        }
        let alerts = board.look(COOLDOWN, start + COOLDOWN);
        assert_eq!(alerts[0].suppressed, 3);
    }

    #[test]
    fn a_fallback_is_over_when_nobody_was_served_by_it_for_a_minute() {
        let steps = [
            (0, Some(true)),
            (50, Some(true)),
            (109, None),
            (110, None),
            (200, None),
        ];
        assert_eq!(told(Kind::Fallback, &steps), "!--.-");
    }

    #[test]
    fn every_step_of_a_budget_is_told() {
        let now = Instant::now();
        let mut board = Board::default();
        let mut told = |detail| {
            let notice = notice(Kind::Budget, true, detail);
            board.notice(notice, COOLDOWN, now).is_some()
        };
        assert!(told("80 %"));
        assert!(told("100 %"));
        assert!(told("80 %"), "of the next day");
    }

    #[test]
    fn the_number_of_troubles_is_bounded() {
        let mut board = Board::default();
        for number in 0..TROUBLES_MAX + 10 {
            let notice = Notice {
                subject: format!("gpu-{number}").into(),
                ..notice(Kind::Breaker, true, "why")
            };
            assert!(board.notice(notice, COOLDOWN, Instant::now()).is_some());
        }
        assert_eq!(board.troubles.len(), TROUBLES_MAX);
    }
}
