//! Who is asked, for how long, and who next: one search over all retrievers.
//!
//! **Invariant:** a search ends within its time budget, whatever the servers on
//! the other side do; and no retriever is asked while it wants to be left alone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::Semaphore, time::timeout_at};

use super::{
    cache::Cache,
    found::Found,
    retrievers::{Hit, Retriever, Trouble},
};
use crate::{
    logging::Seldom,
    metrics::Metrics,
    outbound::{Failure, Incoming, Outbound},
};

/// An answer up to this size is read where requests are served, a larger one
/// beside them: it takes milliseconds.
const READ_HERE_MAX: usize = 64 * 1024;
/// The longest that a retriever may ask to be left alone.
const COOLDOWN_MAX: Duration = Duration::from_secs(24 * 3600);

/// Searches.
pub(super) struct Search {
    pub(super) engines: Vec<Arc<Engine>>,
    pub(super) outbound: Arc<Outbound>,
    pub(super) cooldowns: Arc<Cooldowns>,
    pub(super) cache: Cache,
    pub(super) at_once: Semaphore,
    pub(super) cooldown: Duration,
    pub(super) time_budget: Duration,
    pub(super) answer_bytes: usize,
    pub(super) snippet_chars: usize,
    pub(super) metrics: Arc<Metrics>,
}

/// A retriever with what is known of it here.
pub(super) struct Engine {
    pub(super) name: &'static str,
    pub(super) retriever: Box<dyn Retriever>,
    /// Its name and its address: what a pause is remembered by.
    pub(super) id: String,
    pub(super) lines: Seldom,
}

impl Engine {
    pub(super) fn new(name: &'static str, retriever: Box<dyn Retriever>) -> Self {
        Self {
            id: format!("{name} {:?}", retriever.endpoint()),
            name,
            retriever,
            lines: Seldom::default(),
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question<'a> {
    pub(super) query: &'a str,
    pub(super) results: usize,
    /// Whether it must not leave the premises.
    pub(super) local: bool,
    /// Whose cache it may be answered from; empty for everybody's.
    pub(super) scope: &'a str,
}

/// What a search came to.
#[derive(Clone, Debug)]
pub(super) enum Searched {
    Now(Arc<Found>),
    Earlier(Arc<Found>),
    Failed,
}

/// Until when retrievers are left alone. Outlives a reload: the servers on the
/// other side know nothing of ours.
#[derive(Debug, Default)]
pub(super) struct Cooldowns(Mutex<HashMap<String, Instant>>);

impl Cooldowns {
    /// Returns whether this one is to be left alone.
    fn holds(&self, id: &str, now: Instant) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, until| *until > now);
        all.contains_key(id)
    }

    fn begin(&self, id: &str, until: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.entry(id.to_owned()).or_insert(until);
        *known = until.max(*known);
    }
}

/// Why a retriever gave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Miss {
    Call(Failure),
    Answer(Trouble),
}

impl Miss {
    /// Returns the word for metrics and the log.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Call(Failure::Forbidden) => "forbidden",
            Self::Call(Failure::Unresolved) => "unresolved",
            Self::Call(Failure::Unreachable) => "unreachable",
            Self::Call(Failure::TooLate) => "too_late",
            Self::Call(Failure::TooLarge) => "too_large",
            Self::Call(Failure::Broken) => "broken",
            Self::Answer(Trouble::Captcha) => "captcha",
            Self::Answer(Trouble::Limited(_)) => "limited",
            Self::Answer(Trouble::Refused(_)) => "refused",
            Self::Answer(Trouble::Unreadable) => "unreadable",
        }
    }
}

impl Search {
    /// Returns whether anybody may be asked at all.
    pub(super) fn is_open_to(&self, local: bool) -> bool {
        self.may_ask(local).next().is_some()
    }

    fn may_ask(&self, local: bool) -> impl Iterator<Item = &Arc<Engine>> {
        let all = self.engines.iter();
        all.filter(move |engine| !local || engine.retriever.is_local())
    }

    /// Answers a question from the cache, or asks.
    pub(super) async fn ask(&self, question: Question<'_>) -> Searched {
        let key = question.key();
        let cache = &self.metrics.search_cache;
        if let Some(found) = self.cache.get(&key, Instant::now()) {
            cache.with_label_values(&["hit"]).inc();
            return Searched::Earlier(found);
        }
        cache.with_label_values(&["miss"]).inc();
        let until = Instant::now() + self.time_budget;
        let passenger = self.cache.board(&key);
        let search = async {
            // Another's search may have ended between the look and the boarding.
            if let Some(found) = self.cache.get(&key, Instant::now()) {
                return Some(found);
            }
            let found = self.search(question, until).await.map(Arc::new);
            if let Some(found) = found.as_ref().filter(|found| !found.sources.is_empty()) {
                self.cache.put(&key, found, Instant::now());
            }
            found
        };
        match timeout_at(until.into(), passenger.wait(search)).await {
            Ok(Some(found)) => Searched::Now(found),
            Ok(None) | Err(_) => Searched::Failed,
        }
    }

    /// Asks one after the other; `None` if all failed.
    async fn search(&self, question: Question<'_>, until: Instant) -> Option<Found> {
        let Ok(Ok(_turn)) = timeout_at(until.into(), self.at_once.acquire()).await else {
            let limits = &self.metrics.limits;
            limits.with_label_values(&["searches"]).inc();
            return None;
        };
        let engines: Vec<_> = self.may_ask(question.local).collect();
        let mut nothing_found = None;
        for (nth, engine) in engines.iter().enumerate() {
            let now = Instant::now();
            let counted = |result| {
                let labels = [engine.name, result];
                self.metrics.searches.with_label_values(&labels).inc();
            };
            if self.cooldowns.holds(&engine.id, now) {
                counted("cooling_down");
                continue;
            }
            // Who is slow leaves the others their share of the time.
            let left = until.saturating_duration_since(now);
            let others = u32::try_from(engines.len() - nth).unwrap_or(u32::MAX);
            let came = self.try_one(engine, question, now + left / others).await;
            let seconds = self
                .metrics
                .search_seconds
                .with_label_values(&[engine.name]);
            seconds.observe(now.elapsed().as_secs_f64());
            match came {
                Ok(hits) => {
                    let found = Found::of(hits, question.results, self.snippet_chars);
                    if !found.sources.is_empty() {
                        counted("ok");
                        return Some(found);
                    }
                    counted("empty");
                    nothing_found = Some(found);
                }
                Err(miss) => {
                    counted(miss.as_str());
                    self.note(engine, miss, Instant::now());
                }
            }
        }
        nothing_found
    }

    async fn try_one(
        &self,
        engine: &Arc<Engine>,
        question: Question<'_>,
        until: Instant,
    ) -> Result<Vec<Hit>, Miss> {
        let retriever = &engine.retriever;
        let call = retriever.call(question.query, question.results);
        let sent = self
            .outbound
            .send(retriever.endpoint(), call, self.answer_bytes, until);
        let answer = sent.await.map_err(Miss::Call)?;
        read(engine, answer, until).await
    }

    /// Says in the log what went wrong, and leaves alone who asked for it.
    fn note(&self, engine: &Engine, miss: Miss, now: Instant) {
        let pause = match miss {
            Miss::Answer(Trouble::Captcha) => Some(self.cooldown),
            Miss::Answer(Trouble::Limited(asked)) => {
                let asked = asked.unwrap_or_default().min(COOLDOWN_MAX);
                Some(self.cooldown.max(asked))
            }
            Miss::Call(Failure::TooLarge) => {
                let limits = &self.metrics.limits;
                limits.with_label_values(&["search_answer"]).inc();
                None
            }
            _ => None,
        };
        if let Some(pause) = pause {
            self.cooldowns.begin(&engine.id, now + pause);
            let labels = [engine.name, miss.as_str()];
            self.metrics
                .search_cooldowns
                .with_label_values(&labels)
                .inc();
        }
        if let Some(others) = engine.lines.due(now) {
            let status = match miss {
                Miss::Answer(Trouble::Refused(status)) => status.as_u16(),
                _ => 0,
            };
            log::warn!(
                "search failed: retriever={} reason={} status={status} pause={}s others={others}",
                engine.name,
                miss.as_str(),
                pause.unwrap_or_default().as_secs(),
            );
        }
    }
}

impl Question<'_> {
    /// What it is remembered by: the same words, in whatever case, for the same
    /// readers.
    fn key(&self) -> Arc<str> {
        let Self {
            query,
            results,
            local,
            scope,
        } = self;
        // No scope has a line end in it, and no number.
        format!("{results} {local}\n{scope}\n{}", query.to_lowercase()).into()
    }
}

/// Reads an answer; a large one on a thread where nobody is served.
async fn read(engine: &Arc<Engine>, answer: Incoming, until: Instant) -> Result<Vec<Hit>, Miss> {
    if answer.body.len() <= READ_HERE_MAX {
        return engine.retriever.read(&answer).map_err(Miss::Answer);
    }
    let engine = Arc::clone(engine);
    let work = tokio::task::spawn_blocking(move || engine.retriever.read(&answer));
    match timeout_at(until.into(), work).await {
        Ok(Ok(read)) => read.map_err(Miss::Answer),
        Ok(Err(_panicked)) => Err(Miss::Answer(Trouble::Unreadable)),
        Err(_elapsed) => Err(Miss::Call(Failure::TooLate)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_ends_and_a_longer_one_is_not_shortened() {
        let cooldowns = Cooldowns::default();
        let now = Instant::now();
        let after = |secs| now + Duration::from_secs(secs);
        cooldowns.begin("a", after(60));
        cooldowns.begin("a", after(30));
        assert!(cooldowns.holds("a", after(59)));
        assert!(!cooldowns.holds("b", now));
        assert!(!cooldowns.holds("a", after(60)));
        assert!(cooldowns.0.lock().unwrap().is_empty());
    }

    #[test]
    fn only_the_same_question_of_the_same_readers_is_the_same() {
        let question = Question {
            query: "Who is it?",
            results: 3,
            local: false,
            scope: "",
        };
        let key = question.key();
        let same = Question {
            query: "who IS it?",
            ..question
        };
        assert_eq!(same.key(), key);
        for other in [
            Question {
                query: "who is it",
                ..question
            },
            Question {
                results: 4,
                ..question
            },
            Question {
                local: true,
                ..question
            },
            Question {
                scope: "alice",
                ..question
            },
        ] {
            assert_ne!(other.key(), key, "{other:?}");
        }
    }
}
