//! The plugin's settings.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::retrievers;
use crate::config::{PluginEntry, Size, Time};

/// The settings of research mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RagConfig {
    /// Whether a request has to ask for a search, or has to ask for none.
    pub when: When,
    /// The ways in which a request may ask for a search. `research_mode` never
    /// goes on to an upstream, also where it is none of them.
    #[schemars(length(max = 4))]
    pub triggers: Vec<Trigger>,
    /// Where to search: the first, and the next where one fails.
    #[schemars(schema_with = "retriever_list")]
    pub retrievers: Vec<PluginEntry>,
    /// How many results the model is shown.
    #[schemars(range(min = 1, max = 10))]
    pub results: usize,
    /// Where in the request they are put.
    pub place: Place,
    /// Whether the sources are listed at the end of an answer.
    pub sources: Sources,
    /// How long a search may take, all retrievers together; then the request
    /// goes on without results.
    #[schemars(extend("x-min" = "10ms", "x-max" = "30s"))]
    pub time_budget: Time,
    /// The most searches at once; more wait for their turn, within their
    /// `time_budget`.
    #[schemars(range(min = 1, max = 10_000))]
    pub concurrent: usize,
    /// The most characters of a query; longer ones are cut.
    #[schemars(range(min = 20, max = 490))]
    pub query_chars: usize,
    /// The most characters that the model is shown of one result, the title not
    /// counted.
    #[schemars(range(min = 40, max = 8000))]
    pub snippet_chars: usize,
    /// The largest answer of a retriever, decompressed.
    #[schemars(extend("x-min" = "4KiB", "x-max" = "16MiB"))]
    pub answer_size: Size,
    /// What was found is kept for the next who asks the same.
    pub cache: CacheConfig,
    /// How long a retriever is left alone after a captcha or a 429, if it does
    /// not itself ask for longer.
    #[schemars(extend("x-min" = "1s", "x-max" = "24h"))]
    pub cooldown: Time,
    /// Models that search by themselves: `web_search_options` is theirs.
    #[schemars(extend("format" = "patterns"))]
    pub self_searching: Vec<String>,
}

/// What is kept of earlier searches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// How long it is kept; 0s keeps nothing.
    #[schemars(extend("x-min" = "0s", "x-max" = "24h"))]
    pub ttl: Time,
    /// The most of it.
    #[schemars(extend("x-min" = "64KiB", "x-max" = "1GiB"))]
    pub size: Size,
    /// Whether each key has its own: then nobody learns from `x-forebay-rag:
    /// cached` that another asked the same.
    pub per_key: bool,
}

/// Which requests are searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// Those that ask for it.
    Requested,
    /// All that have a question in them, but for those that ask for none.
    Always,
}

/// A way to ask for a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// `"research_mode": true` in the body.
    ResearchMode,
    /// `"web_search_options": {…}` in the body of a chat.
    WebSearchOptions,
    /// The header `x-forebay-research: 1`.
    Header,
    /// A model's name that ends in `:online`.
    Suffix,
}

/// Where the results stand in the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Behind the last words of the user: what was said before stays as it was,
    /// and upstreams find it in their prefix caches.
    User,
    /// In the system's message.
    System,
}

/// When the sources are listed at the end of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sources {
    /// If the model cited none of them.
    WhenUncited,
    /// In any case.
    Always,
    /// Never.
    Never,
}

impl Default for RagConfig {
    fn default() -> Self {
        Self {
            when: When::Requested,
            triggers: vec![
                Trigger::ResearchMode,
                Trigger::WebSearchOptions,
                Trigger::Header,
                Trigger::Suffix,
            ],
            retrievers: vec![PluginEntry {
                name: "duckduckgo".to_owned(),
                config: serde_json::Value::Null,
            }],
            results: 3,
            place: Place::User,
            sources: Sources::WhenUncited,
            time_budget: Time::secs(5),
            concurrent: 8,
            query_chars: 300,
            snippet_chars: 500,
            answer_size: Size::mib(2),
            cache: CacheConfig::default(),
            cooldown: Time::secs(300),
            self_searching: ["*-search-preview*", "*-search-api*", "*sonar*"]
                .map(str::to_owned)
                .to_vec(),
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            ttl: Time::secs(600),
            size: Size::mib(16),
            per_key: false,
        }
    }
}

fn retriever_list(generator: &mut SchemaGenerator) -> Schema {
    let entry = retrievers::entry_schema(generator);
    schemars::json_schema!({
        "type": "array",
        "items": entry,
        "minItems": 1,
        "maxItems": 8,
    })
}
