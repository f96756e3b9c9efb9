//! Where results come from: one file each, and one line in [`RETRIEVERS`].
//!
//! A retriever says what to send and reads what comes back; it never does any
//! I/O. Who asks whom, for how long and how often is in
//! [`search`](super::search).

mod brave;
mod duckduckgo;
mod html;
mod http_json;
mod searxng;
mod tavily;

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use http::{HeaderName, HeaderValue, StatusCode};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    config::{PluginEntry, SecretRef},
    openai::retry_after,
    outbound::{Endpoint, Incoming, Outgoing, Reach},
    plugins::ConfigError,
};

/// Every retriever there is. A new one is its file and a line here.
pub(super) const RETRIEVERS: &[Kind] = &[
    Kind::of::<duckduckgo::DuckDuckGo>(),
    Kind::of::<searxng::SearXng>(),
    Kind::of::<http_json::HttpJson>(),
    Kind::of::<brave::Brave>(),
    Kind::of::<tavily::Tavily>(),
];

/// A source of results.
pub(super) trait Retriever: Send + Sync {
    /// Returns where it is.
    fn endpoint(&self) -> &Endpoint;

    /// Returns whether it is on premises: then it may see what must not leave
    /// them.
    fn is_local(&self) -> bool;

    /// Makes the call that asks for `most` results.
    fn call(&self, query: &str, most: usize) -> Outgoing;

    /// Reads what came back, the best first; more than were asked for is no
    /// harm.
    ///
    /// # Errors
    /// It is no list of results.
    fn read(&self, answer: &Incoming) -> Result<Vec<Hit>, Trouble>;
}

/// A retriever that is built from a part of the YAML.
pub(super) trait Build: Retriever + Sized + 'static {
    /// What it is called in the YAML and in metrics.
    const NAME: &'static str;
    /// Its settings.
    type Config: DeserializeOwned + JsonSchema;

    /// Builds it; `base` is the folder of the configuration file.
    ///
    /// # Errors
    /// The key that is at fault, and why.
    fn build(config: Self::Config, base: &Path) -> Result<Self, ConfigError>;
}

/// A result as it was found, before anything is made of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) title: String,
    pub(super) url: String,
    pub(super) snippet: String,
}

/// Why an answer is no list of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It wants to know whether we are human.
    Captcha,
    /// Too many questions; how long to wait, if it says so.
    Limited(Option<Duration>),
    /// A status that is no success.
    Refused(StatusCode),
    /// Nothing that this retriever's answers look like.
    Unreadable,
}

/// Builds a retriever from its settings.
type BuildFn = fn(Value, &Path) -> Result<Box<dyn Retriever>, ConfigError>;

/// One line of [`RETRIEVERS`].
pub(super) struct Kind {
    pub(super) name: &'static str,
    schema: fn(&mut SchemaGenerator) -> Schema,
    build: BuildFn,
}

impl Kind {
    const fn of<R: Build>() -> Self {
        Self {
            name: R::NAME,
            schema: |generator| generator.subschema_for::<R::Config>(),
            build: |config, base| {
                let config = match config {
                    Value::Null => Value::Object(Map::new()),
                    given => given,
                };
                let config = serde_json::from_value(config)
                    .map_err(|why| wrong(R::NAME, why.to_string()))?;
                let built = R::build(config, base).map_err(|why| ConfigError {
                    path: format!("{}.{}", R::NAME, why.path),
                    ..why
                })?;
                Ok(Box::new(built))
            },
        }
    }
}

/// Builds the retriever of one entry of the YAML; with its name.
///
/// # Errors
/// There is none of that name, or its settings make no sense.
pub(super) fn build(
    entry: &PluginEntry,
    base: &Path,
) -> Result<(&'static str, Box<dyn Retriever>), ConfigError> {
    let Some(kind) = RETRIEVERS.iter().find(|kind| kind.name == entry.name) else {
        let names: Vec<_> = RETRIEVERS.iter().map(|kind| kind.name).collect();
        let message = format!("expected one of the retrievers: {}", names.join(", "));
        return Err(wrong(&entry.name, message));
    };
    Ok((kind.name, (kind.build)(entry.config.clone(), base)?))
}

/// Returns the schema of one entry: a name with its settings, or the name alone
/// of one that needs none.
pub(super) fn entry_schema(generator: &mut SchemaGenerator) -> Schema {
    let mut settings = Map::new();
    for kind in RETRIEVERS {
        settings.insert(kind.name.to_owned(), (kind.schema)(generator).to_value());
    }
    json_schema!({
        "anyOf": [
            {
                "type": "object",
                "properties": settings,
                "additionalProperties": false,
                "minProperties": 1,
                "maxProperties": 1,
            },
            { "type": "string", "enum": [duckduckgo::DuckDuckGo::NAME] },
        ]
    })
}

fn wrong(path: impl Into<String>, message: impl Into<String>) -> ConfigError {
    ConfigError {
        path: path.into(),
        message: message.into(),
    }
}

/// Reads a URL that an operator may have written: then it may be inside, which
/// the retriever's own must not be.
fn endpoint_of(written: Option<&str>, own: &str) -> Result<Endpoint, ConfigError> {
    let parsed = match written {
        Some(url) => Endpoint::parse(url, Reach::Private),
        None => Endpoint::parse(own, Reach::Public),
    };
    parsed.map_err(|why| wrong("url", why.to_string()))
}

/// Reads a key, as the value of a header field behind `prefix`.
fn key_of(key: &SecretRef, prefix: &str, base: &Path) -> Result<HeaderValue, ConfigError> {
    let secret = key
        .read(base)
        .map_err(|why| wrong("key", why.to_string()))?;
    let value = HeaderValue::try_from(format!("{prefix}{}", secret.expose()));
    let mut value = value.map_err(|_why| wrong("key", "expected printable characters"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Reads a header field that an operator wrote.
fn header_of(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), ConfigError> {
    let at = || format!("headers.{name}");
    let field = HeaderName::try_from(name).map_err(|_why| wrong(at(), "no name of a header"))?;
    let value = HeaderValue::try_from(value).map_err(|_why| wrong(at(), "no value of a header"))?;
    Ok((field, value))
}

/// Says what a status that is no success means.
fn judge(answer: &Incoming) -> Result<(), Trouble> {
    match answer.status {
        status if status.is_success() => Ok(()),
        StatusCode::TOO_MANY_REQUESTS => Err(Trouble::Limited(retry_after(
            &answer.headers,
            SystemTime::now(),
        ))),
        status => Err(Trouble::Refused(status)),
    }
}

/// Reads a body as JSON.
fn json_of(answer: &Incoming) -> Result<Value, Trouble> {
    judge(answer)?;
    serde_json::from_slice(&answer.body).map_err(|_why| Trouble::Unreadable)
}

/// Makes hits of the items of a list, whose texts are under these keys. Items
/// that are none are left out.
fn hits_of(list: Option<&Value>, keys: [&str; 3]) -> Result<Vec<Hit>, Trouble> {
    let items = list.and_then(Value::as_array).ok_or(Trouble::Unreadable)?;
    let [title, url, snippet] = keys;
    let text = |item: &Value, key: &str| item.get(key)?.as_str().map(str::to_owned);
    let hits = items.iter().filter_map(|item| {
        Some(Hit {
            title: text(item, title).unwrap_or_default(),
            url: text(item, url)?,
            snippet: html::plain(&text(item, snippet).unwrap_or_default()),
        })
    });
    Ok(hits.collect())
}

#[cfg(test)]
pub(super) fn answered(status: u16, body: impl Into<bytes::Bytes>) -> Incoming {
    Incoming {
        status: StatusCode::from_u16(status).unwrap(),
        headers: http::HeaderMap::new(),
        body: body.into(),
    }
}
