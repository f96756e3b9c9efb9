//! Research mode: a search of the web before the model answers, and the sources
//! behind what it says.
//!
//! ```yaml
//! plugins:
//!   - rag: { retrievers: [searxng: { url: "http://127.0.0.1:8080", local: true }, duckduckgo] }
//! ```
//!
//! A request asks for it ([`settings::Trigger`]); the last words of the user
//! become a query ([`query`]); one retriever after the other is asked
//! ([`search`], [`retrievers`]); what is found is made harmless ([`found`]) and
//! put into the request ([`inject`]); and the `[n]` of the answer become
//! annotations ([`cite`], [`answer`], [`stream`], [`responses`]).
//!
//! **Invariant:** a search that fails costs its time budget and nothing else:
//! the request goes on without results, and `x-forebay-rag` says so.
//!
//! **Invariant:** what must not leave the premises is asked of local retrievers
//! only.

mod answer;
mod cache;
mod cite;
mod found;
mod inject;
mod query;
mod responses;
mod retrievers;
mod search;
mod settings;
mod stream;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use tokio::sync::Semaphore;

use self::{
    answer::{Adds, Citing},
    cache::Cache,
    found::Found,
    inject::Cite,
    responses::ResponseStream,
    search::{Engine, Question, Search, Searched},
    settings::{Place, RagConfig, Sources, Trigger, When},
    stream::ChatStream,
};
use super::{Build, ConfigError, Configure, Flow, OnFailure, Pass, Plugin, Wants};
use crate::{
    config::Config,
    context::{RequestContext, Room},
    error::{Error, Result},
    openai::{ApiRequest, Edit, Endpoint, Frame},
    outbound::Outbound,
    pattern::Pattern,
};

/// Says on the answer what became of the search.
const OUTCOME: HeaderName = HeaderName::from_static("x-forebay-rag");
/// Says on the answer how many results the model was shown.
const RESULTS: HeaderName = HeaderName::from_static("x-forebay-rag-results");
/// Asks for a search.
const RESEARCH: &str = "x-forebay-research";
const RESEARCH_MODE: &str = "research_mode";
const WEB_SEARCH_OPTIONS: &str = "web_search_options";
const SUFFIX: &str = ":online";
/// The most results that a request can ask for.
const RESULTS_MAX: usize = 10;

/// Searches the web for requests that ask for it.
pub struct Rag {
    when: When,
    triggers: Vec<Trigger>,
    results: usize,
    place: Place,
    sources: Sources,
    query_chars: usize,
    cache_per_key: bool,
    self_searching: Vec<Pattern>,
    search: Search,
}

/// What a request said about a search.
#[derive(Clone, Copy, Debug, Default)]
struct Wish {
    asked: bool,
    declined: bool,
    /// As `search_context_size` has it.
    results: Option<usize>,
}

/// What is kept of a request that was searched for: both turns at its answer.
struct Answering {
    sources: Adding,
    annotations: Adding,
}

/// One turn at an answer.
struct Adding {
    citing: Citing,
    chat: ChatStream,
    responses: ResponseStream,
}

/// What became of a search, for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Ok,
    Cached,
    Failed,
    Skipped,
}

impl Told {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cached => "cached",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

impl Configure for Rag {
    const NAME: &'static str = "rag";
    const ON_FAILURE: OnFailure = OnFailure::Open;
    type Config = RagConfig;

    fn configure(config: RagConfig, build: &Build<'_>) -> Result<Self, ConfigError> {
        if config.when == When::Requested && config.triggers.is_empty() {
            return Err(ConfigError {
                path: format!("{}.triggers", Self::NAME),
                message: "expected a way to ask for a search, or when: always".to_owned(),
            });
        }
        let mut engines = Vec::with_capacity(config.retrievers.len());
        for (index, entry) in config.retrievers.iter().enumerate() {
            let (name, retriever) =
                retrievers::build(entry, build.base).map_err(|why| ConfigError {
                    path: format!("{}.retrievers[{index}].{}", Self::NAME, why.path),
                    message: why.message,
                })?;
            engines.push(Engine::new(name, retriever).into());
        }
        Ok(Self {
            when: config.when,
            triggers: config.triggers,
            results: config.results,
            place: config.place,
            sources: config.sources,
            query_chars: config.query_chars,
            cache_per_key: config.cache.per_key,
            self_searching: config
                .self_searching
                .into_iter()
                .map(Pattern::new)
                .collect(),
            search: Search {
                engines,
                outbound: build.resources.shared::<Outbound>("outbound"),
                cooldowns: build.resources.shared("rag.cooldowns"),
                cache: Cache::new(config.cache.ttl.get(), config.cache.size.get()),
                at_once: Semaphore::new(config.concurrent),
                cooldown: config.cooldown.get(),
                time_budget: config.time_budget.get(),
                answer_bytes: config.answer_size.get(),
                snippet_chars: config.snippet_chars,
                metrics: build.resources.metrics.clone(),
            },
        })
    }
}

#[async_trait]
impl Plugin for Rag {
    fn on_parsed(&self, ctx: &mut RequestContext) -> Result<()> {
        let Some(request) = &mut ctx.request else {
            return Ok(());
        };
        let mut wish = Wish::default();
        let mut edits = Vec::new();
        if self.takes(Trigger::Header) {
            wish.note(header_flag(ctx.headers.get_all(RESEARCH).iter())?);
        }
        if let Some(value) = request.get(RESEARCH_MODE) {
            if self.takes(Trigger::ResearchMode) {
                wish.note(body_flag(value)?);
            }
            // A word of ours: no upstream knows it, and some refuse what they
            // do not know.
            edits.push(Edit::remove(RESEARCH_MODE));
        }
        if self.takes(Trigger::Suffix)
            && let Some(model) = without_suffix(&request.model)
        {
            wish.note(Some(true));
            edits.push(Edit::set_text("model", model));
        }
        if self.takes(Trigger::WebSearchOptions)
            && request.endpoint == Endpoint::ChatCompletions
            && !self.searches_itself(&request.model)
            && let Some(value) = request.get(WEB_SEARCH_OPTIONS)
        {
            if value != b"null" {
                wish.note(Some(true));
                wish.results = self.results_for(value)?;
            }
            edits.push(Edit::remove(WEB_SEARCH_OPTIONS));
        }
        if !edits.is_empty() {
            request.edit(&edits)?;
        }
        ctx.own.put(wish);
        Ok(())
    }

    async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        let Some(wish) = ctx.own.take::<Wish>() else {
            return Ok(Flow::Continue);
        };
        let Some(request) = &ctx.request else {
            return Ok(Flow::Continue);
        };
        let is_wanted = match self.when {
            When::Requested => wish.asked && !wish.declined,
            When::Always => {
                let is_due = request.endpoint.streams() && !self.searches_itself(&request.model);
                !wish.declined && (wish.asked || is_due)
            }
        };
        if !is_wanted {
            return Ok(Flow::Continue);
        }
        let told = self
            .research(ctx, wish.results.unwrap_or(self.results))
            .await;
        let metric = &self.search.metrics.research;
        metric.with_label_values(&[told.as_str()]).inc();
        ctx.reply
            .insert(OUTCOME, HeaderValue::from_static(told.as_str()));
        Ok(Flow::Continue)
    }

    fn wants(&self) -> Wants {
        Wants {
            edit: true,
            annotate: true,
            see: false,
        }
    }

    fn on_event(
        &self,
        ctx: &mut RequestContext,
        event: &Frame,
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        event_of(ctx, Adds::Sources, event, out);
        Ok(Pass::On)
    }

    fn on_body(&self, ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
        body_of(ctx, Adds::Sources, body);
        Ok(())
    }

    fn annotate_event(
        &self,
        ctx: &mut RequestContext,
        event: &Frame,
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        event_of(ctx, Adds::Annotations, event, out);
        Ok(Pass::On)
    }

    fn annotate_body(&self, ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
        body_of(ctx, Adds::Annotations, body);
        Ok(())
    }

    fn warnings(&self, config: &Config) -> Vec<String> {
        let all_local = !config.routes.is_empty() && config.routes.iter().all(|route| route.local);
        if !all_local || self.search.is_open_to(true) {
            return Vec::new();
        }
        let message = "nothing will be searched for: every route is local, and no retriever is";
        vec![message.to_owned()]
    }

    fn model_meant<'a>(&self, model: &'a str) -> &'a str {
        if self.takes(Trigger::Suffix) {
            without_suffix(model).unwrap_or(model)
        } else {
            model
        }
    }
}

impl Rag {
    fn takes(&self, trigger: Trigger) -> bool {
        self.triggers.contains(&trigger)
    }

    fn searches_itself(&self, model: &str) -> bool {
        self.self_searching.iter().any(|one| one.matches(model))
    }

    /// Reads how much a client wants to be searched: `low` is half of what is
    /// usual, `high` twice.
    fn results_for(&self, options: &[u8]) -> Result<Option<usize>> {
        if options.first() != Some(&b'{') {
            let message = "`web_search_options` must be an object";
            return Err(Error::invalid("invalid_value", message).param(WEB_SEARCH_OPTIONS));
        }
        Ok(match query::member_of(options, b"search_context_size") {
            Some(b"\"low\"") => Some(self.results.div_ceil(2)),
            Some(b"\"high\"") => Some((self.results * 2).min(RESULTS_MAX)),
            _ => None,
        })
    }

    /// Searches, and puts what was found into the request.
    async fn research(&self, ctx: &mut RequestContext, results: usize) -> Told {
        let Some(request) = &ctx.request else {
            return Told::Skipped;
        };
        let local = ctx.restrict.local;
        // Between two pieces of code there is nothing to cite.
        let fills_in = request.endpoint == Endpoint::Completions && request.get("suffix").is_some();
        let Some(query) = query::query_of(request, self.query_chars).filter(|_| !fills_in) else {
            return Told::Skipped;
        };
        if !self.search.is_open_to(local) {
            return Told::Skipped;
        }
        let scope = if self.cache_per_key { ctx.caller() } else { "" };
        let question = Question {
            query: &query,
            results,
            local,
            scope,
        };
        let (found, told) = match self.search.ask(question).await {
            Searched::Now(found) => (found, Told::Ok),
            Searched::Earlier(found) => (found, Told::Cached),
            Searched::Failed => return Told::Failed,
        };
        if found.sources.is_empty() {
            ctx.reply.insert(RESULTS, HeaderValue::from(0));
            return told;
        }
        let Some(request) = &mut ctx.request else {
            return Told::Skipped;
        };
        let cite = inject::cite_of(request);
        let Some((found, block)) = fitting(found, cite, ctx.room.as_ref()) else {
            return Told::Skipped;
        };
        if !put_in(request, &block, self.place) {
            return Told::Skipped;
        }
        ctx.reply
            .insert(RESULTS, HeaderValue::from(found.sources.len()));
        if cite == Cite::Numbers {
            let adding = |adds| Adding {
                citing: Citing {
                    found: Arc::clone(&found),
                    sources: self.sources,
                    adds,
                },
                chat: ChatStream::default(),
                responses: ResponseStream::default(),
            };
            ctx.own.put(Answering {
                sources: adding(Adds::Sources),
                annotations: adding(Adds::Annotations),
            });
        }
        told
    }
}

impl Answering {
    /// Returns a turn at an answer, unless there is nothing in it for that.
    fn turn(&mut self, adds: Adds, endpoint: Endpoint) -> Option<&mut Adding> {
        match (adds, endpoint) {
            (Adds::Sources, _) => Some(&mut self.sources),
            // Completions have no annotations.
            (Adds::Annotations, Endpoint::Completions) => None,
            (Adds::Annotations, _) => Some(&mut self.annotations),
        }
    }
}

/// Returns as many of the results, the best first, as there is room for in the
/// prompt, and the block they are; `None` if there is room for none.
fn fitting(mut found: Arc<Found>, cite: Cite, room: Option<&Room>) -> Option<(Arc<Found>, String)> {
    loop {
        let block = inject::block(&found, cite);
        if room.is_none_or(|room| room.fits(&block)) {
            return Some((found, block));
        }
        Arc::make_mut(&mut found).sources.pop();
        if found.sources.is_empty() {
            return None;
        }
    }
}

/// Adds to an event of a stream.
fn event_of(ctx: &mut RequestContext, adds: Adds, event: &Frame, out: &mut Vec<Frame>) {
    let endpoint = ctx.request.as_ref().map(|request| request.endpoint);
    let answering = ctx.own.get_mut::<Answering>();
    let turn = endpoint
        .zip(answering)
        .and_then(|(endpoint, answering)| Some((endpoint, answering.turn(adds, endpoint)?)));
    match turn {
        Some((Endpoint::Responses, turn)) => turn.responses.take(&turn.citing, event, out),
        Some((endpoint, turn)) => turn.chat.take(&turn.citing, endpoint, event, out),
        None => out.push(event.clone()),
    }
}

/// Adds to a whole answer.
fn body_of(ctx: &mut RequestContext, adds: Adds, body: &mut Bytes) {
    let endpoint = ctx.request.as_ref().map(|request| request.endpoint);
    if let (Some(endpoint), Some(answering)) = (endpoint, ctx.own.get_mut::<Answering>())
        && let Some(turn) = answering.turn(adds, endpoint)
        && let Some(more) = turn.citing.whole(endpoint, body)
    {
        *body = more;
    }
}

fn put_in(request: &mut ApiRequest, block: &str, place: Place) -> bool {
    match inject::edit(request, block, place) {
        Some(edit) => request.edit(&[edit]).is_ok(),
        None => false,
    }
}

impl Wish {
    fn note(&mut self, flag: Option<bool>) {
        self.asked |= flag == Some(true);
        self.declined |= flag == Some(false);
    }
}

/// Returns the model before `:online`, if that is how the name ends.
fn without_suffix(model: &str) -> Option<&str> {
    model.strip_suffix(SUFFIX).filter(|model| !model.is_empty())
}

fn body_flag(value: &[u8]) -> Result<Option<bool>> {
    match value {
        b"true" => Ok(Some(true)),
        b"false" => Ok(Some(false)),
        b"null" => Ok(None),
        _ => {
            let message = "`research_mode` must be true or false";
            Err(Error::invalid("invalid_value", message).param(RESEARCH_MODE))
        }
    }
}

fn header_flag<'a>(mut values: impl Iterator<Item = &'a HeaderValue>) -> Result<Option<bool>> {
    let flag = match (values.next().map(HeaderValue::as_bytes), values.next()) {
        (None, _) => return Ok(None),
        (Some(b"0" | b"false"), None) => false,
        (Some(b"1" | b"true"), None) => true,
        _ => {
            let message =
                "x-forebay-research must be 1 (or true) or 0 (or false), and there only once";
            return Err(Error::invalid("invalid_header", message));
        }
    };
    Ok(Some(flag))
}

impl fmt::Debug for Rag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let engines = self.search.engines.iter().map(|engine| &engine.id);
        f.debug_list().entries(engines).finish()
    }
}

#[cfg(test)]
mod tests;
