//! So many requests and tokens in a time, and so many requests at once: for each
//! key, address, model or route.
//!
//! ```yaml
//! plugins:
//!   - auth: { keys_file: keys.yaml }
//!   - rate_limit: { per: key, requests: 60/min, tokens: 200k/min, concurrent: 8 }
//!   - rate_limit: { per: ip, requests: 600/min }
//! ```
//!
//! Start with [`bucket`] for one limit of one caller, [`table`] for all callers;
//! [`headers`] is what they are told. What a key says of itself in the keys file
//! holds in place of what the rules `per: key` say of the same kind and time.
//!
//! **Invariant:** only a request that everything else has let through so far is
//! counted: a stranger costs no memory here.

mod bucket;
mod headers;
mod table;

use std::{fmt, num::NonZeroU32, sync::Arc, time::Instant};

use async_trait::async_trait;
use http::{HeaderName, HeaderValue, StatusCode};
use prometheus::IntCounterVec;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use headers::{Show, in_words, show};
use table::{Bounds, Held, Refusal, Table, Who};

use super::{
    Build, ConfigError, Configure, Flow, Plugin,
    spent::{Estimate, Spent, counts},
};
use crate::{
    config::{Config, KeyLimits, PluginEntry, Rate},
    context::{Outcome, RequestContext},
    error::{Error, Result},
};

/// Tells OpenAI's clients that it is no use to try again.
const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Who calls where nobody is asked for a key.
const NOBODY: &str = "-";

/// The plugin's settings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimitConfig {
    /// Whose requests are counted together: those of a key, of an address (of
    /// IPv6 a /64), for a model, or for a route.
    pub per: Per,
    /// What the rule is called in metrics; `per` if it has no name.
    #[schemars(extend("format" = "name"))]
    pub name: Option<String>,
    /// The most requests in a time; as many may come at once.
    pub requests: Option<Rate>,
    /// The most tokens in a time, of prompts and answers together.
    pub tokens: Option<Rate>,
    /// The most requests at once.
    #[schemars(with = "Option<u32>", range(min = 1, max = 1_000_000))]
    pub concurrent: Option<NonZeroU32>,
    /// How many tokens are reserved for an answer whose length the client does
    /// not bound.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub default_completion_tokens: u64,
    /// How many callers are remembered; those who are idle are forgotten first.
    #[schemars(range(min = 1000, max = 10_000_000))]
    pub max_tracked: usize,
}

impl Default for RateLimitConfig {
    fn default() -> Self {
        Self {
            per: Per::Key,
            name: None,
            requests: None,
            tokens: None,
            concurrent: None,
            default_completion_tokens: 1024,
            max_tracked: 100_000,
        }
    }
}

/// Whose requests are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Per {
    /// Those of one key; of everybody where nobody is asked for one.
    Key,
    /// Those from one address.
    Ip,
    /// Those for one model.
    Model,
    /// Those for one route.
    Route,
}

impl Per {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Ip => "ip",
            Self::Model => "model",
            Self::Route => "route",
        }
    }
}

impl RateLimitConfig {
    fn limits(&self) -> KeyLimits {
        KeyLimits {
            requests: self.requests,
            tokens: self.tokens,
            concurrent: self.concurrent,
        }
    }

    /// Returns what the rule is called in metrics.
    fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(self.per.as_str())
    }

    /// Returns under what the rule's counts are kept: the same as long as it is
    /// the same rule, whatever its numbers.
    fn identity(&self, list: &str) -> String {
        let per = self.per.as_str();
        if let Some(name) = &self.name {
            return format!("{list} {per} name={name}");
        }
        let of = |rate: Option<Rate>| rate.map_or("-", |rate| rate.per.as_str());
        let at_once = if self.concurrent.is_some() { "+" } else { "-" };
        let (requests, tokens) = (of(self.requests), of(self.tokens));
        format!("{list} {per} requests={requests} tokens={tokens} concurrent={at_once}")
    }
}

/// Turns away who has had his share.
pub struct RateLimit {
    config: RateLimitConfig,
    table: Arc<Table>,
    bounds: Bounds,
    limited: IntCounterVec,
}

impl fmt::Debug for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RateLimit").field(&self.config).finish()
    }
}

/// What is kept of a request that was let through.
struct Admitted {
    held: Held,
    /// Tokens of the prompt, as they were estimated.
    prompt: u64,
}

impl Configure for RateLimit {
    const NAME: &'static str = "rate_limit";
    type Config = RateLimitConfig;

    fn configure(config: RateLimitConfig, build: &Build<'_>) -> Result<Self, ConfigError> {
        if config.limits().is_empty() && config.per != Per::Key {
            return Err(ConfigError {
                path: Self::NAME.to_owned(),
                message: "expected at least one of requests, tokens, concurrent".to_owned(),
            });
        }
        let metrics = &build.resources.metrics;
        let label = [config.label()];
        Ok(Self {
            table: build
                .resources
                .shared(&format!("rate_limit {}", config.identity(build.list))),
            bounds: Bounds {
                tracked_max: config.max_tracked,
                tracked: metrics.rate_limit_tracked.with_label_values(&label),
                forgotten: metrics.limits.with_label_values(&["rate_limit_tracked"]),
            },
            limited: metrics.rate_limited.clone(),
            config,
        })
    }
}

#[async_trait]
impl Plugin for RateLimit {
    async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        if let Some(admitted) = self.admit(ctx, Instant::now())? {
            ctx.own.put(admitted);
        }
        Ok(Flow::Continue)
    }

    fn on_last(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        settle(ctx, outcome);
    }

    async fn on_finish(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        settle(ctx, outcome);
    }

    fn warnings(&self, config: &Config) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.config.per == Per::Key && !asks_for_keys(config) {
            let message = "nobody is asked for a key, so that all callers are counted as one: \
                           per: ip counts each address";
            warnings.push(message.to_owned());
        }
        let same = |list: &[PluginEntry]| {
            let rules = list.iter().filter(|entry| entry.name == Self::NAME);
            let rules = rules.filter_map(|entry| settings(entry).ok());
            rules
                .filter(|other| other.identity("") == self.config.identity(""))
                .count()
        };
        if lists(config).any(|list| same(list) > 1) {
            let message = "another rate_limit in this list counts the same: every request counts \
                           twice; give each a name";
            warnings.push(message.to_owned());
        }
        warnings
    }
}

impl RateLimit {
    /// Lets a request through, or refuses it; `None` if nothing bounds it.
    fn admit(&self, ctx: &mut RequestContext, now: Instant) -> Result<Option<Admitted>> {
        let (Some(request), limits) = (&ctx.request, self.limits_of(ctx)) else {
            return Ok(None);
        };
        if limits.is_empty() {
            return Ok(None);
        }
        let estimate = Estimate::of(request, self.config.default_completion_tokens);
        let mut tokens = estimate.total();
        if let Some(limit) = limits.tokens {
            let most = limit.count.get();
            if !estimate.bounded {
                // A guess of ours must not make a request impossible.
                tokens = tokens.min(most).max(estimate.prompt);
            }
            if tokens > most {
                ctx.reply
                    .insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
                return Err(self.too_large(limit, tokens));
            }
        }
        let who = self.who(ctx);
        let (standing, came) = self.table.admit(who, limits, tokens, &self.bounds, now);
        let which = if came.is_ok() {
            Show::Tightest
        } else {
            Show::These
        };
        show(standing, which, &mut ctx.reply);
        let held = came.map_err(|refusal| self.refuse(refusal))?;
        let prompt = estimate.prompt;
        Ok(Some(Admitted { held, prompt }))
    }

    fn limits_of(&self, ctx: &RequestContext) -> KeyLimits {
        let rule = self.config.limits();
        match (&self.config.per, &ctx.principal) {
            (Per::Key, Some(who)) => who.limits.in_place_of(rule),
            _ => rule,
        }
    }

    fn who(&self, ctx: &RequestContext) -> Who {
        match self.config.per {
            Per::Key => Who::Name(match &ctx.principal {
                Some(who) => Arc::clone(&who.name),
                None => NOBODY.into(),
            }),
            Per::Ip => ctx.client_ip.into(),
            Per::Model => Who::Name(Arc::clone(&ctx.model)),
            Per::Route => Who::Name(Arc::clone(&ctx.route)),
        }
    }

    fn too_large(&self, limit: Rate, tokens: u64) -> Error {
        self.count("too_large");
        let per = self.config.per.as_str();
        let message = format!(
            "request too large for the tokens per {per}: limit {limit}, requested {tokens}; \
             shorten the prompt or lower max_tokens"
        );
        limited("tokens", message)
    }

    fn refuse(&self, refusal: Refusal) -> Error {
        let per = self.config.per.as_str();
        let wait = refusal.wait();
        let again = in_words(wait);
        let (name, kind, message) = match refusal {
            Refusal::Requests { limit, .. } => (
                "requests",
                "requests",
                format!(
                    "rate limit reached for the requests per {per}: limit {limit}; try again in {again}"
                ),
            ),
            Refusal::Tokens { limit, .. } => (
                "tokens",
                "tokens",
                format!(
                    "rate limit reached for the tokens per {per}: limit {limit}; try again in {again}"
                ),
            ),
            Refusal::Concurrent { limit, .. } => (
                "concurrent",
                "requests",
                format!(
                    "too many requests at once per {per}: limit {limit}; try again when one has ended"
                ),
            ),
        };
        self.count(name);
        limited(kind, message).retry_after(wait)
    }

    fn count(&self, limit: &str) {
        let labels = [self.config.label(), limit];
        self.limited.with_label_values(&labels).inc();
    }
}

/// Makes what was reserved what it has come to; the first call counts.
fn settle(ctx: &mut RequestContext, outcome: &Outcome) {
    let Some(admitted) = ctx.own.take::<Admitted>() else {
        return;
    };
    let Admitted { held, prompt } = *admitted;
    let spent = Spent::of(ctx, outcome, prompt).total();
    held.settle(spent, counts(ctx, outcome), Instant::now());
}

/// Makes the error as OpenAI's is.
fn limited(kind: &'static str, message: String) -> Error {
    let status = StatusCode::TOO_MANY_REQUESTS;
    Error::new(status, kind, "rate_limit_exceeded", message)
}

/// Reads the settings of an entry whose schema has been checked.
fn settings(entry: &PluginEntry) -> serde_json::Result<RateLimitConfig> {
    let mut settings = entry.config.clone();
    if let Some(settings) = settings.as_object_mut() {
        settings.shift_remove("on_failure");
    }
    serde_json::from_value(settings)
}

/// Returns every list of plugins: the general one, and those of routes.
pub(super) fn lists(config: &Config) -> impl Iterator<Item = &[PluginEntry]> {
    let own = config
        .routes
        .iter()
        .filter_map(|route| route.plugins.as_deref());
    std::iter::once(&*config.plugins).chain(own)
}

/// Returns whether any list asks callers who they are.
fn asks_for_keys(config: &Config) -> bool {
    let mut entries = lists(config).flatten();
    entries.any(|entry| entry.name == "auth" && entry.config.is_object())
}

/// Returns whether any list has this plugin.
pub(super) fn is_listed(config: &Config, plugin: &str) -> bool {
    let mut entries = lists(config).flatten();
    entries.any(|entry| entry.name == plugin)
}

/// Returns whether every `budget` knows what tokens cost.
pub(super) fn is_priced(config: &Config) -> bool {
    let entries = lists(config).flatten();
    let mut budgets = entries.filter(|entry| entry.name == "budget");
    budgets.all(|entry| {
        let prices = entry.config.get("prices").and_then(Value::as_array);
        prices.is_some_and(|prices| !prices.is_empty())
    })
}

/// Returns the limits of the rules that limits of keys take the place of.
pub(super) fn limits_of_keys(config: &Config) -> Vec<KeyLimits> {
    let entries = lists(config).flatten();
    let rules = entries.filter(|entry| entry.name == RateLimit::NAME);
    let rules = rules.filter_map(|entry| settings(entry).ok());
    rules
        .filter(|rule| rule.per == Per::Key)
        .map(|rule| rule.limits())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use serde_json::json;

    use super::{
        super::spent::tests::{attempt, context, outcome},
        *,
    };
    use crate::{
        context::{Class, Ending, Principal, Verdict},
        resources::Resources,
    };

    fn rule(config: serde_json::Value, resources: &Resources) -> RateLimit {
        let build = Build {
            base: Path::new("."),
            resources,
            list: "",
            store: None,
        };
        RateLimit::configure(serde_json::from_value(config).unwrap(), &build).unwrap()
    }

    fn called_by(name: &str, limits: KeyLimits) -> RequestContext {
        let mut ctx = context("");
        ctx.principal = Some(Arc::new(Principal {
            name: name.into(),
            models: Vec::new(),
            groups: None,
            pin: false,
            local: false,
            class: Class::default(),
            limits,
            budget: Default::default(),
            capture: true,
        }));
        ctx
    }

    fn admit(rule: &RateLimit, mut ctx: RequestContext, now: Instant) -> Result<Held> {
        let admitted = rule.admit(&mut ctx, now)?;
        Ok(admitted.unwrap().held)
    }

    #[test]
    fn the_counts_of_a_rule_outlive_its_numbers() {
        let (resources, now) = (Resources::default(), Instant::now());
        let before = rule(json!({ "requests": "2/min" }), &resources);
        for _ in 0..2 {
            admit(&before, context(""), now).unwrap();
        }
        assert!(admit(&before, context(""), now).is_err());
        let after = rule(json!({ "requests": "3/min" }), &resources);
        assert!(admit(&after, context(""), now).is_ok());
        assert!(admit(&after, context(""), now).is_err());
        let another = rule(json!({ "requests": "3/min", "name": "other" }), &resources);
        assert!(admit(&another, context(""), now).is_ok());
    }

    #[test]
    fn a_refusal_is_openais_and_says_when() {
        let (resources, now) = (Resources::default(), Instant::now());
        let rule = rule(
            json!({ "requests": "3/min", "tokens": "4k/min" }),
            &resources,
        );
        for _ in 0..3 {
            admit(&rule, context(""), now).unwrap();
        }
        let mut ctx = context("");
        let error = rule.admit(&mut ctx, now).err().unwrap();
        assert_eq!(error.status, 429);
        assert_eq!(error.kind, "requests");
        assert_eq!(error.code.as_deref(), Some("rate_limit_exceeded"));
        assert_eq!(error.retry_after, Some(Duration::from_secs(20)));
        assert!(
            error.message.ends_with("limit 3/min; try again in 20s"),
            "{error}"
        );
        assert_eq!(ctx.reply["x-ratelimit-limit-requests"], "3");
        assert_eq!(ctx.reply["x-ratelimit-remaining-requests"], "0");
        assert_eq!(ctx.reply["x-ratelimit-reset-requests"], "1m0s");
        // Three times 10 for the prompt and 1,024 for the answer.
        assert_eq!(ctx.reply["x-ratelimit-remaining-tokens"], "898");
        let series = ["key", "requests"];
        assert_eq!(rule.limited.with_label_values(&series).get(), 1);
    }

    #[test]
    fn what_can_never_fit_is_told_so() {
        let (resources, now) = (Resources::default(), Instant::now());
        let rule = rule(json!({ "tokens": "100/min" }), &resources);
        let mut ctx = context(r#","max_tokens":91"#);
        let error = rule.admit(&mut ctx, now).err().unwrap();
        assert_eq!((error.status.as_u16(), error.kind), (429, "tokens"));
        assert_eq!(error.retry_after, None);
        assert_eq!(ctx.reply["x-should-retry"], "false");
        assert!(error.message.contains("requested 101"), "{error}");
        let fits = rule.admit(&mut context(r#","max_tokens":90"#), now);
        drop(fits.unwrap().unwrap());
        // Of an answer that the client has not bounded, all there is.
        let later = now + Duration::from_secs(60);
        assert!(admit(&rule, context(""), later).is_ok());
    }

    #[tokio::test]
    async fn what_was_not_used_is_there_again_also_after_an_abort() {
        let resources = Resources::default();
        let rule = rule(
            json!({ "requests": "10/day", "tokens": "1000/day" }),
            &resources,
        );
        for (ending, usage, requests, tokens) in [
            (Ending::Success, Some((10, 30)), 9, 960),
            (Ending::ClientClosed, None, 8, 947),
            (Ending::ServerError, None, 7, 947),
        ] {
            let mut ctx = context(r#","max_tokens":500"#);
            rule.on_request(&mut ctx).await.unwrap();
            ctx.attempts.push(attempt(Verdict::Answered));
            ctx.content_events = 3;
            rule.on_finish(&mut ctx, &outcome(ending, usage)).await;
            let mut probe = context(r#","max_tokens":1"#);
            rule.on_request(&mut probe).await.unwrap();
            // What the probe itself has taken is told as taken.
            let left = |header: &str, own: u64| {
                let text = probe.reply[header].to_str().unwrap();
                text.parse::<u64>().unwrap() + own
            };
            let of_requests = left("x-ratelimit-remaining-requests", 1);
            let of_tokens = left("x-ratelimit-remaining-tokens", 11);
            assert_eq!((of_requests, of_tokens), (requests, tokens), "{ending:?}");
            rule.on_finish(&mut probe, &outcome(Ending::ServerError, None))
                .await;
        }
    }

    #[test]
    fn a_keys_own_limits_win() {
        let (resources, now) = (Resources::default(), Instant::now());
        let rule = rule(json!({ "requests": "1/min", "concurrent": 5 }), &resources);
        let own = KeyLimits {
            requests: "2/min".parse().ok(),
            ..KeyLimits::default()
        };
        for (name, limits, most) in [("a", KeyLimits::default(), 1), ("b", own, 2)] {
            let granted = (0..4).filter(|_| admit(&rule, called_by(name, limits), now).is_ok());
            assert_eq!(granted.count(), most, "{name}");
        }
    }

    #[test]
    fn a_keys_own_limit_leaves_those_of_other_times() {
        let (resources, now) = (Resources::default(), Instant::now());
        let minute = rule(json!({ "requests": "1/min" }), &resources);
        let day = rule(json!({ "requests": "3/day" }), &resources);
        let tokens = rule(json!({ "tokens": "1M/day" }), &resources);
        let own = KeyLimits {
            requests: "5/min".parse().ok(),
            ..KeyLimits::default()
        };
        for (rule, most) in [(minute, 5), (day, 3), (tokens, 5)] {
            let granted = (0..9).filter(|_| admit(&rule, called_by("a", own), now).is_ok());
            assert_eq!(granted.count(), most, "{rule:?}");
        }
    }

    #[test]
    fn each_kind_of_rule_counts_by_its_own() {
        for (per, change) in [
            (
                "ip",
                (|ctx| ctx.client_ip = [192, 0, 2, 9].into()) as fn(&mut RequestContext),
            ),
            ("model", |ctx| ctx.model = "other".into()),
            ("route", |ctx| ctx.route = "other".into()),
        ] {
            let (resources, now) = (Resources::default(), Instant::now());
            let rule = rule(json!({ "per": per, "requests": "1/min" }), &resources);
            admit(&rule, called_by("a", KeyLimits::default()), now).unwrap();
            assert!(admit(&rule, called_by("b", KeyLimits::default()), now).is_err());
            let mut other = called_by("a", KeyLimits::default());
            change(&mut other);
            assert!(admit(&rule, other, now).is_ok(), "{per}");
        }
    }

    #[test]
    fn a_rule_of_nothing_is_a_mistake_unless_keys_have_their_own() {
        let resources = Resources::default();
        let build = Build {
            base: Path::new("."),
            resources: &resources,
            list: "",
            store: None,
        };
        for (per, fine) in [(Per::Key, true), (Per::Ip, false), (Per::Model, false)] {
            let config = RateLimitConfig {
                per,
                ..RateLimitConfig::default()
            };
            assert_eq!(RateLimit::configure(config, &build).is_ok(), fine);
        }
    }

    #[test]
    fn what_is_questionable_is_told() {
        let resources = Resources::default();
        let one = json!({ "requests": "1/min" });
        let rule = rule(one.clone(), &resources);
        let entry = |name: &str, config| PluginEntry {
            name: name.to_owned(),
            config,
        };
        let mut config = Config {
            plugins: vec![entry("auth", json!({ "keys_file": "k" }))],
            ..Config::default()
        };
        config.plugins.push(entry("rate_limit", one));
        assert_eq!(rule.warnings(&config), [""; 0]);
        assert_eq!(limits_of_keys(&config), [rule.config.limits()]);
        let twice = entry(
            "rate_limit",
            json!({ "requests": "2/min", "on_failure": "open" }),
        );
        config.plugins.push(twice);
        config.plugins.remove(0);
        let warnings = rule.warnings(&config);
        assert_eq!(warnings.len(), 2, "{warnings:?}");
    }
}
