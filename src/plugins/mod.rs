//! Request filters: one file each, and one line in [`PLUGINS`].
//!
//! # The life of a plugin
//! 1. [`Configure::configure`] builds it from its part of the YAML, once per
//!    snapshot. An entry that has not changed keeps the plugin it had.
//! 2. For each request the hooks of [`Plugin`] run: [`on_headers`],
//!    [`on_parsed`] and [`on_request`] in the order of the list,
//!    [`on_response`], [`on_event`], [`on_body`], [`on_last`] and [`on_finish`]
//!    in reverse, [`annotate_event`] and [`annotate_body`] behind all edits.
//!    The [`Chain`] measures each of them and catches their panics.
//! 3. It is dropped with the last request of the last snapshot that holds it.
//!
//! **Invariant:** a plugin never sees a connection. What it may know is in the
//! [`RequestContext`]; what it keeps of a request is in
//! [`own`](RequestContext::own), what it keeps of all of them in the
//! [`Resources`].
//!
//! [`on_headers`]: Plugin::on_headers
//! [`on_parsed`]: Plugin::on_parsed
//! [`on_request`]: Plugin::on_request
//! [`on_response`]: Plugin::on_response
//! [`on_event`]: Plugin::on_event
//! [`on_body`]: Plugin::on_body
//! [`annotate_event`]: Plugin::annotate_event
//! [`annotate_body`]: Plugin::annotate_body
//! [`on_last`]: Plugin::on_last
//! [`on_finish`]: Plugin::on_finish

mod alert;
mod apart;
mod auth;
mod budget;
mod cache_salt;
mod capture;
mod chain;
mod entry;
mod meter;
mod policy;
mod rag;
mod rate_limit;
mod spent;

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, de::DeserializeOwned};

pub use alert::Alert;
pub use auth::{Auth, hash_token, new_token};
pub use budget::{Budget, LEDGER, Ledger, Standing, Statement};
pub use cache_salt::CacheSalt;
pub use capture::{Capture, CaptureConfig};
pub use chain::{Chain, Passed};
pub use entry::Entry;
pub use policy::Policy;
pub use rag::Rag;
pub use rate_limit::RateLimit;

use crate::{
    config::Config,
    context::{Outcome, RequestContext},
    error::Result,
    openai::Frame,
    resources::Resources,
    store::Place,
};

/// Every plugin there is. A new one is its file and a line here.
pub const PLUGINS: &[Entry] = &[
    Entry::of::<Auth>(),
    Entry::of::<CacheSalt>(),
    Entry::of::<Alert>(),
    Entry::of::<Rag>(),
    Entry::of::<Policy>(),
    Entry::of::<RateLimit>(),
    Entry::of::<Capture>(),
    Entry::of::<Budget>(),
];

/// Watches and changes requests on their way.
///
/// An `Err` with a status of 400 to 499 is a *refusal*: what the plugin is there
/// for. One of 500 or more, and a panic, is a *failure* of the plugin itself;
/// what becomes of the request then is for `on_failure` of its settings to say.
#[async_trait]
pub trait Plugin: Send + Sync {
    /// Runs when the header is in and nothing of the body is: the place to turn
    /// strangers away. It may narrow `ctx.restrict` and set `ctx.principal`.
    ///
    /// # Errors
    /// An error is the client's answer.
    async fn on_headers(&self, ctx: &mut RequestContext) -> Result<Flow> {
        let _ = ctx;
        Ok(Flow::Continue)
    }

    /// Runs when the body is parsed, for every plugin before any
    /// [`on_request`](Self::on_request): takes out of the request what was meant
    /// for this plugin alone, so that the others see the model and the
    /// parameters that are really meant. Must not block.
    ///
    /// # Errors
    /// An error is the client's answer.
    fn on_parsed(&self, ctx: &mut RequestContext) -> Result<()> {
        let _ = ctx;
        Ok(())
    }

    /// Runs when the body is parsed and no upstream is chosen. It may edit
    /// `ctx.request`, narrow `ctx.restrict`, and put fields into `ctx.reply`.
    ///
    /// # Errors
    /// An error is the client's answer.
    async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        let _ = ctx;
        Ok(Flow::Continue)
    }

    /// Runs once, before the head of an upstream's answer is sent; may edit it.
    async fn on_response(&self, ctx: &mut RequestContext, head: &mut ResponseHead) {
        let _ = (ctx, head);
    }

    /// Returns what of the answers this plugin wants to be shown. Asked once per
    /// snapshot: events that nobody wants pass as the bytes they came in.
    fn wants(&self) -> Wants {
        Wants::default()
    }

    /// Runs for each event of a streamed answer, comments excepted, if
    /// [`Wants::edit`]: puts what is to go on in its place into `out`, which is
    /// the event itself, several, or nothing. What it holds back it must let go
    /// before the end: the event with the finish reason, or `[DONE]`, is its last
    /// chance. Must not wait for anything; what it does with a large event keeps
    /// no other request from being served.
    ///
    /// Events come in the order and with the text of the upstreams, also where
    /// one went on with what another began.
    ///
    /// # Errors
    /// An error ends the stream with an error event.
    fn on_event(
        &self,
        ctx: &mut RequestContext,
        event: &Frame,
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        let _ = ctx;
        out.push(event.clone());
        Ok(Pass::On)
    }

    /// Runs for an answer that is one JSON object, if [`Wants::edit`]; may put
    /// another in its place. An answer that came whole although the client asked
    /// for a stream is told as events, and comes to
    /// [`on_event`](Self::on_event). Must not wait for anything, as there.
    ///
    /// # Errors
    /// An error takes the answer's place.
    fn on_body(&self, ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
        let _ = (ctx, body);
        Ok(())
    }

    /// Runs like [`on_event`](Self::on_event), if [`Wants::annotate`], on what
    /// has become of the events when every plugin that edits has had its turn:
    /// the place to say where in the text something stands. Must leave the text
    /// as it is, and must not block.
    ///
    /// # Errors
    /// An error ends the stream with an error event.
    fn annotate_event(
        &self,
        ctx: &mut RequestContext,
        event: &Frame,
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        let _ = ctx;
        out.push(event.clone());
        Ok(Pass::On)
    }

    /// Runs like [`on_body`](Self::on_body), if [`Wants::annotate`], behind every
    /// plugin that edits. Must leave the text as it is, and must not block.
    ///
    /// # Errors
    /// An error takes the answer's place.
    fn annotate_body(&self, ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
        let _ = (ctx, body);
        Ok(())
    }

    /// Runs for everything of an answer that goes to the client, as it goes, if
    /// [`Wants::see`]: after all edits, wherever in the list the plugin stands.
    /// Must not block.
    fn on_sent(&self, ctx: &mut RequestContext, sent: Sent<'_>) {
        let _ = (ctx, sent);
    }

    /// Runs before the last of an answer goes to the client, when its cost is
    /// known: who has it all may come again before
    /// [`on_finish`](Self::on_finish) runs. Not for answers that are made here
    /// without an error, nor where the client leaves before. The bytes of an
    /// `outcome` here are those of a whole answer, and 0 of a streamed one. Must
    /// not block.
    fn on_last(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        let _ = (ctx, outcome);
    }

    /// Runs exactly once per request that [`on_headers`](Self::on_headers) saw,
    /// whatever happened. May only enqueue.
    async fn on_finish(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        let _ = (ctx, outcome);
    }

    /// Returns the model that is meant by a name in which there is something for
    /// this plugin alone, such as a suffix: what [`on_parsed`](Self::on_parsed)
    /// will make of it. The route is looked up by it, and so the list of plugins.
    fn model_meant<'a>(&self, model: &'a str) -> &'a str {
        model
    }

    /// Runs when a snapshot that holds the plugin becomes the one that serves,
    /// also of a plugin that was kept: the place to start threads, and never
    /// before, since a configuration that is only checked must not do anything.
    /// May block for some seconds.
    fn go_live(&self, resources: &Resources) {
        let _ = resources;
    }

    /// Runs when another snapshot has taken the place of the one that holds the
    /// plugin, and does not hold it: whatever it does beside requests ends here,
    /// although some of them may be on their way for long. Must not block.
    fn retire(&self) {}

    /// Returns the files, beside the YAML, whose change asks for a reload.
    fn watched(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Returns what is questionable in view of the whole configuration. Asked
    /// once per snapshot, also of a plugin that was kept.
    fn warnings(&self, config: &Config) -> Vec<String> {
        let _ = config;
        Vec::new()
    }

    /// Returns whether what the plugin was built from, beside the YAML, is
    /// still the same: only then does a reload keep it.
    fn is_current(&self) -> bool {
        true
    }
}

/// What a plugin wants of the answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// To change them: [`Plugin::on_event`] and [`Plugin::on_body`].
    pub edit: bool,
    /// To add to them what speaks of places in them: [`Plugin::annotate_event`]
    /// and [`Plugin::annotate_body`].
    pub annotate: bool,
    /// To see what the client gets: [`Plugin::on_sent`].
    pub see: bool,
}

/// What becomes of a stream after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// It goes on.
    On,
    /// It ends here: what the plugin put out is the last of it, but for
    /// `[DONE]`. The upstream is not asked for the rest.
    End,
}

/// A part of an answer on its way to the client.
#[derive(Clone, Copy, Debug)]
pub enum Sent<'a> {
    /// One event of a stream.
    Event(&'a Frame),
    /// All of an answer.
    Whole(&'a Bytes),
}

/// What becomes of a request whose plugin failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// It goes on as if the plugin were not there.
    Open,
    /// It is refused.
    Closed,
}

/// What becomes of a request after a hook.
#[derive(Debug)]
pub enum Flow {
    /// It goes on.
    Continue,
    /// It is answered here and goes no further.
    Respond(LocalResponse),
}

/// An answer made by Forebay itself.
#[derive(Debug)]
pub struct LocalResponse {
    /// The status.
    pub status: StatusCode,
    /// Its header fields; length and type included by the sender.
    pub headers: HeaderMap,
    /// The media type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
}

/// The head of an answer on its way to the client.
#[derive(Debug)]
pub struct ResponseHead {
    /// The status.
    pub status: StatusCode,
    /// Its header fields.
    pub headers: HeaderMap,
}

/// A plugin that is built from a part of the YAML.
pub trait Configure: Plugin + Sized + 'static {
    /// What it is called in the YAML.
    const NAME: &'static str;
    /// What becomes of a request when it fails, unless its settings say
    /// otherwise with `on_failure`.
    const ON_FAILURE: OnFailure = OnFailure::Closed;
    /// Whether its settings may say so.
    const MAY_FAIL_OPEN: bool = true;
    /// Its settings; the schema validates them before [`configure`](Self::configure).
    type Config: DeserializeOwned + JsonSchema;

    /// Builds the plugin.
    ///
    /// # Errors
    /// What is wrong with the settings that no schema can tell, such as a file
    /// that cannot be read.
    fn configure(config: Self::Config, build: &Build<'_>) -> Result<Self, ConfigError>;
}

/// What a plugin is built with.
#[derive(Debug)]
pub struct Build<'a> {
    /// The folder of the configuration file: relative paths start there.
    pub base: &'a Path,
    /// What outlives the snapshot.
    pub resources: &'a Resources,
    /// Which list of plugins it stands in: empty for the general one, else the
    /// model of the route whose own list it is.
    pub list: &'a str,
    /// Where things are kept that must survive the process, if the configuration
    /// says so. It is opened in [`Plugin::go_live`].
    pub store: Option<&'a Place>,
}

/// Why a plugin could not be built.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}")]
pub struct ConfigError {
    /// The YAML path below the plugin's own entry, or the file that is at fault.
    pub path: String,
    /// What was expected.
    pub message: String,
}
