//! Request filters: one file each, and one line in [`PLUGINS`].
//!
//! # The life of a plugin
//! 1. [`Configure::configure`] builds it from its part of the YAML, once per
//!    snapshot. An entry that has not changed keeps the plugin it had.
//! 2. For each request the hooks of [`Plugin`] run: [`on_headers`] and
//!    [`on_request`] in the order of the list, [`on_response`], [`on_event`]
//!    and [`on_finish`] in reverse.
//! 3. It is dropped with the last request of the last snapshot that holds it.
//!
//! **Invariant:** a plugin never sees a connection. What it may know is in the
//! [`RequestContext`].
//!
//! [`on_headers`]: Plugin::on_headers
//! [`on_request`]: Plugin::on_request
//! [`on_response`]: Plugin::on_response
//! [`on_event`]: Plugin::on_event
//! [`on_finish`]: Plugin::on_finish

mod auth;
mod chain;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use schemars::{JsonSchema, Schema, schema_for};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use auth::{Auth, hash_token, new_token};
pub use chain::Chain;

use crate::{
    config::Config,
    context::{Outcome, RequestContext},
    error::Result,
    openai::Frame,
    resources::Resources,
};

/// Every plugin there is. A new one is its file and a line here.
pub const PLUGINS: &[Entry] = &[Entry::of::<Auth>()];

/// Watches and changes requests on their way.
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

    /// Runs when the body is parsed and no upstream is chosen. It may edit
    /// `ctx.request` and narrow `ctx.restrict`.
    ///
    /// # Errors
    /// An error is the client's answer.
    async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        let _ = ctx;
        Ok(Flow::Continue)
    }

    /// Runs once, before the head of the answer is sent; may edit it.
    ///
    /// # Errors
    /// An error takes the answer's place.
    async fn on_response(&self, ctx: &mut RequestContext, head: &mut ResponseHead) -> Result<()> {
        let _ = (ctx, head);
        Ok(())
    }

    /// Returns whether [`on_event`](Self::on_event) is to be called. Asked once
    /// per snapshot: events that nobody wants pass as the bytes they came in.
    fn wants_events(&self) -> bool {
        false
    }

    /// Runs for each event of a streamed answer; may edit it. Must not block.
    ///
    /// # Errors
    /// An error ends the stream with an error event.
    fn on_event(&self, ctx: &mut RequestContext, event: &mut Frame) -> Result<()> {
        let _ = (ctx, event);
        Ok(())
    }

    /// Runs exactly once per request that [`on_headers`](Self::on_headers) saw,
    /// whatever happened. May only enqueue.
    async fn on_finish(&self, ctx: &RequestContext, outcome: &Outcome) {
        let _ = (ctx, outcome);
    }

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

/// One line of [`PLUGINS`].
pub struct Entry {
    /// The plugin's name.
    pub name: &'static str,
    /// Makes the JSON Schema of its settings.
    pub schema: fn() -> Schema,
    build: BuildFn,
}

/// Builds a plugin from its settings.
type BuildFn = fn(Value, &Build<'_>) -> Result<Arc<dyn Plugin>, ConfigError>;

impl Entry {
    const fn of<P: Configure>() -> Self {
        Self {
            name: P::NAME,
            schema: || schema_for!(P::Config),
            build: |config, build| {
                let config = serde_json::from_value(config).map_err(|why| ConfigError {
                    path: P::NAME.to_owned(),
                    message: why.to_string(),
                })?;
                Ok(Arc::new(P::configure(config, build)?))
            },
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
