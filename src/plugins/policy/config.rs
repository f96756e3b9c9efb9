//! The settings of `policy`.

use std::{num::NonZeroU32, path::PathBuf};

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::text::Role;
use crate::config::{Size, Time};

/// What may be asked, and what may be answered.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    /// How long prompts may be.
    pub(super) context: Option<ContextConfig>,
    /// Which parameters a request may have.
    pub(super) parameters: ParametersConfig,
    /// From where servers may fetch pictures, sound, video and files.
    pub(super) media: MediaConfig,
    /// Rules about what goes to a model, in this order.
    #[schemars(length(max = 1000))]
    pub(super) prompt: Vec<PromptConfig>,
    /// How long the rules about what goes to a model may look at one request,
    /// all together; then it is refused.
    #[schemars(extend("x-min" = "1ms", "x-max" = "10m"))]
    pub(super) time_budget: Time,
    /// Rules about what comes from it, in this order.
    #[schemars(length(max = 100))]
    pub(super) output: Vec<OutputConfig>,
    /// The most characters of a stream that are held back while they may be the
    /// beginning of a match.
    pub(super) window: Window,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            context: None,
            parameters: ParametersConfig::default(),
            media: MediaConfig::default(),
            prompt: Vec::new(),
            time_budget: Time::secs(5),
            output: Vec::new(),
            window: Window::default(),
        }
    }
}

/// Characters.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("minimum" = 16, "maximum" = 1024))]
pub(super) struct Window(pub(super) u32);

impl Default for Window {
    fn default() -> Self {
        Self(256)
    }
}

/// Tokens: 1 to 100,000,000.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("minimum" = 1, "maximum" = 100_000_000))]
pub(super) struct Tokens(pub(super) NonZeroU32);

/// How long prompts may be.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ContextConfig {
    /// The most tokens of a prompt and its answer together.
    pub(super) limit: Option<Tokens>,
    /// The same for single models: a pattern → tokens. The first that fits
    /// counts.
    #[schemars(extend("maxProperties" = 1000))]
    pub(super) models: IndexMap<String, Tokens>,
    /// Whether the tokens that the client wants of the answer count too.
    pub(super) count_answer: bool,
    /// What becomes of a longer one.
    pub(super) over: OverContext,
    /// Where longer ones go, with `over: route`.
    pub(super) route_to: Option<RouteToConfig>,
    /// Tokenizers (`tokenizer.json`) of models: a pattern → a file, relative to
    /// the configuration file. Without one tokens are estimated.
    #[schemars(with = "IndexMap<String, String>", extend("maxProperties" = 100))]
    pub(super) tokenizers: IndexMap<String, PathBuf>,
    /// What a picture, a sound or a file counts for, in tokens.
    pub(super) media_tokens: Tokens,
}

impl Default for ContextConfig {
    fn default() -> Self {
        Self {
            limit: None,
            models: IndexMap::new(),
            count_answer: true,
            over: OverContext::Reject,
            route_to: None,
            tokenizers: IndexMap::new(),
            media_tokens: Tokens(NonZeroU32::new(1000).expect("1000 is not 0")),
        }
    }
}

/// What becomes of a prompt that is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum OverContext {
    /// It is refused.
    Reject,
    /// Its oldest turns are left out.
    Trim,
    /// It goes elsewhere.
    Route,
}

/// Where long prompts go.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RouteToConfig {
    /// Only these groups of the route.
    #[schemars(length(max = 100))]
    pub(super) groups: Vec<String>,
    /// This model in place of the one asked for.
    #[schemars(length(min = 1, max = 256))]
    pub(super) model: Option<String>,
    /// The most tokens there; without it no bound.
    pub(super) limit: Option<Tokens>,
}

/// Which parameters a request may have.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ParametersConfig {
    /// Names of keys, as patterns, that may send what others may not: dangerous
    /// and unknown parameters, and any address.
    #[schemars(length(max = 1000))]
    pub(super) trusted: Vec<String>,
    /// What becomes of dangerous parameters, such as `chat_template`.
    pub(super) extras: Unwanted,
    /// What becomes of parameters that the call does not have.
    pub(super) unknown: Unwanted,
    /// Further names that are neither dangerous nor unknown.
    #[schemars(length(max = 1000))]
    pub(super) known: Vec<String>,
    /// The least and the most of numbers, by parameter.
    pub(super) limits: IndexMap<String, LimitConfig>,
    /// Values of parameters that a client leaves out.
    pub(super) defaults: IndexMap<String, Value>,
    /// Values of parameters whatever a client says.
    pub(super) force: IndexMap<String, Value>,
}

impl Default for ParametersConfig {
    fn default() -> Self {
        Self {
            trusted: Vec::new(),
            extras: Unwanted::Drop,
            unknown: Unwanted::Allow,
            known: Vec::new(),
            limits: IndexMap::new(),
            defaults: IndexMap::new(),
            force: IndexMap::new(),
        }
    }
}

/// What becomes of a parameter that is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum Unwanted {
    /// It goes through.
    Allow,
    /// It is taken out, and the client is told.
    Drop,
    /// The request is refused.
    Reject,
}

/// The range of a number.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LimitConfig {
    /// The least.
    pub(super) min: Option<f64>,
    /// The most; above 0.
    pub(super) max: Option<f64>,
    /// What becomes of a number outside.
    pub(super) over: Over,
}

/// What becomes of a number that is out of its range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum Over {
    /// The request is refused.
    #[default]
    Reject,
    /// The nearest that is allowed takes its place.
    Lower,
}

/// From where servers may fetch.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct MediaConfig {
    /// Hosts, as patterns, whose addresses may stand in a prompt; `"*"` is every
    /// host but those inside. Without any only `data:` goes through.
    #[schemars(length(max = 1000))]
    pub(super) hosts: Vec<String>,
    /// The longest `data:` address.
    #[schemars(extend("x-min" = "1B", "x-max" = "1GiB"))]
    pub(super) data_url: Size,
}

impl Default for MediaConfig {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            data_url: Size::mib(20),
        }
    }
}

/// A regular expression.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("format" = "expression"))]
pub(super) struct Expression(pub(super) String);

/// A rule about what goes to a model: one of `deny`, `replace`, `mask`,
/// `prepend`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PromptConfig {
    /// What it is called in metrics; by default `prompt-1` and so on.
    #[schemars(extend("format" = "name"))]
    pub(super) name: Option<String>,
    /// Refuses prompts in which one of these is found.
    #[schemars(length(min = 1, max = 10_000))]
    pub(super) deny: Option<Vec<Expression>>,
    /// Puts `with` in place of what one of these finds.
    #[schemars(length(min = 1, max = 10_000))]
    pub(super) replace: Option<Vec<Expression>>,
    /// Puts stars there.
    #[schemars(length(min = 1, max = 10_000))]
    pub(super) mask: Option<Vec<Expression>>,
    /// Puts this before the system's text.
    #[schemars(length(min = 1))]
    pub(super) prepend: Option<String>,
    /// What `replace` puts in, as it is written here.
    pub(super) with: String,
    /// Whose texts are looked at; without it, everybody's and the definitions of
    /// tools by `deny`, those of system and user by the others. Definitions can
    /// only be denied.
    #[schemars(length(min = 1))]
    pub(super) roles: Option<Vec<Role>>,
    /// The status of a refusal.
    #[schemars(range(min = 400, max = 403))]
    pub(super) status: u16,
    /// Its `code`.
    #[schemars(extend("format" = "name"))]
    pub(super) code: String,
    /// What the client is told.
    #[schemars(length(min = 1, max = 1000))]
    pub(super) message: String,
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self {
            name: None,
            deny: None,
            replace: None,
            mask: None,
            prepend: None,
            with: String::new(),
            roles: None,
            status: 400,
            code: "content_policy_violation".to_owned(),
            message: "this prompt is against the rules of this service".to_owned(),
        }
    }
}

/// A rule about what comes from a model: one of `deny`, `replace`, `mask`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OutputConfig {
    /// What it is called in metrics; by default `output-1` and so on.
    #[schemars(extend("format" = "name"))]
    pub(super) name: Option<String>,
    /// Ends the answer, with `content_filter`, before what one of these finds.
    #[schemars(length(min = 1, max = 10_000))]
    pub(super) deny: Option<Vec<Expression>>,
    /// Puts `with` in place of what one of these finds.
    #[schemars(length(min = 1, max = 10_000))]
    pub(super) replace: Option<Vec<Expression>>,
    /// Puts stars there.
    #[schemars(length(min = 1, max = 10_000))]
    pub(super) mask: Option<Vec<Expression>>,
    /// What `replace` puts in, as it is written here.
    pub(super) with: String,
    /// Which texts of an answer are looked at; `tools`, the arguments of calls,
    /// can only be denied.
    #[schemars(length(min = 1))]
    pub(super) texts: Vec<Part>,
}

impl Default for OutputConfig {
    fn default() -> Self {
        Self {
            name: None,
            deny: None,
            replace: None,
            mask: None,
            with: String::new(),
            texts: vec![Part::Answer, Part::Reasoning],
        }
    }
}

/// A kind of text of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum Part {
    /// What is said, refusals included.
    Answer,
    /// What is thought before.
    Reasoning,
    /// The arguments of tool calls.
    Tools,
}
