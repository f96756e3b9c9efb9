//! How many tokens and how much money a key may use in a day and in a month.
//!
//! ```yaml
//! store: sqlite:/var/lib/forebay/forebay.db
//! plugins:
//!   - auth: { keys_file: keys.yaml }
//!   - budget:
//!       day: { tokens: 1M }
//!       month: { tokens: 20M, money: 50 }
//!       prices:
//!         - { model: "gpt-4o*", input: 2.50, output: 10, cached: 1.25 }
//! ```
//!
//! Start with [`ledger`]: what every key has used. [`calendar`] says which day it
//! is. What survives the process is [`store`](crate::store)'s affair.

mod calendar;
mod ledger;

use std::{
    fmt,
    sync::{Arc, mpsc},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use http::{HeaderName, HeaderValue, StatusCode};
use schemars::JsonSchema;
use serde::Deserialize;

use calendar::Zone;
pub use ledger::{Ledger, Standing, Statement};
use ledger::{Refusal, Reserved};

use super::{
    Build, ConfigError, Configure, Flow, Plugin, ResponseHead,
    spent::{Estimate, Spent},
};
use crate::{
    config::{Allowance, Budget as Amounts, Money, Share},
    context::{Outcome, Pattern, RequestContext},
    error::{Error, Result},
    events::{Change, Events},
    metrics::Metrics,
    resources::Resources,
    store::{Amount, Journals, Place},
};

/// Under what the books are kept across reloads.
pub const LEDGER: &str = "budget";
/// How long the start waits for the store to be read.
const LOAD_PATIENCE: Duration = Duration::from_secs(5);
/// When to come again where nobody knows when a request under way will end.
const ONE_ENDS: Duration = Duration::from_secs(1);
/// Tells OpenAI's clients that it is no use to try again.
const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Who calls where nobody is asked for a key.
const NOBODY: &str = "-";
/// What prices are per.
const MILLION: u128 = 1_000_000;

/// The plugin's settings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetConfig {
    /// What each key may use in a day.
    pub day: Allowance,
    /// What each key may use in a month.
    pub month: Allowance,
    /// What tokens cost: the first that fits a model is taken; one that none
    /// fits costs nothing.
    #[schemars(length(max = 10_000))]
    pub prices: Vec<Price>,
    /// Whose midnight a day begins at: `utc`, or `local` for the machine's.
    pub time_zone: Zone,
    /// Which share of a budget is told as an event when it is used.
    #[schemars(extend("x-min" = "1%", "x-max" = "99%"))]
    pub warn_at: Share,
    /// How many tokens an answer is taken for, as long as it is under way, whose
    /// length the client does not bound.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub default_completion_tokens: u64,
}

/// What the tokens of a model cost, per million.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// The model's name, or a pattern such as `gpt-4o*`.
    #[schemars(extend("format" = "pattern"))]
    pub model: String,
    /// Only where this group answers.
    #[schemars(extend("format" = "name"))]
    pub group: Option<String>,
    /// A million tokens of prompts.
    pub input: Money,
    /// A million tokens of answers.
    pub output: Money,
    /// A million tokens of prompts that came from a cache; as `input` if absent.
    pub cached: Option<Money>,
}

impl Default for BudgetConfig {
    fn default() -> Self {
        Self {
            day: Allowance::default(),
            month: Allowance::default(),
            prices: Vec::new(),
            time_zone: Zone::Utc,
            warn_at: Share(80),
            default_completion_tokens: 1024,
        }
    }
}

/// Turns away who has used what he may.
pub struct Budget {
    config: BudgetConfig,
    /// With the patterns of the prices.
    prices: Vec<(Pattern, Price)>,
    ledger: Arc<Ledger>,
    place: Place,
    events: Arc<Events>,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Budget").field(&self.config).finish()
    }
}

/// What is kept of a request.
struct Kept {
    /// `None` if it was let through although nothing was known.
    reserved: Option<Reserved>,
    /// Tokens of the prompt, as they were estimated.
    prompt: u64,
    /// Which group answers.
    group: Option<String>,
}

impl Configure for Budget {
    const NAME: &'static str = "budget";
    type Config = BudgetConfig;

    fn configure(config: BudgetConfig, build: &Build<'_>) -> Result<Self, ConfigError> {
        let error = |key: &str, message: &str| ConfigError {
            path: format!("{}{key}", Self::NAME),
            message: message.to_owned(),
        };
        let Some(place) = build.store else {
            let message = "expected a store, where it is written down what was used: \
                           store: sqlite:forebay.db, at the top of the file";
            return Err(error("", message));
        };
        let in_money = [config.day.money, config.month.money];
        if in_money.iter().any(Option::is_some) && config.prices.is_empty() {
            return Err(error(
                "",
                "expected prices, since there is a budget in money",
            ));
        }
        let resources = build.resources;
        Ok(Self {
            prices: config
                .prices
                .iter()
                .map(|price| (Pattern::new(&*price.model), price.clone()))
                .collect(),
            config,
            ledger: resources.shared(LEDGER),
            place: place.clone(),
            events: Arc::clone(&resources.events),
            metrics: Arc::clone(&resources.metrics),
        })
    }
}

#[async_trait]
impl Plugin for Budget {
    fn go_live(&self, resources: &Resources) {
        let journals = resources.shared::<Journals>("store");
        let journal = match journals.open(&self.place, &self.metrics, &resources.workers) {
            Ok(journal) => journal,
            Err(why) => {
                log::error!("the store cannot be used: {why}");
                return;
            }
        };
        let (send, done) = mpsc::channel();
        let now = SystemTime::now();
        self.ledger
            .load(&journal, self.config.time_zone, now, move || {
                // Err means that nobody waits any longer.
                send.send(()).ok();
            });
        if done.recv_timeout(LOAD_PATIENCE).is_err() {
            log::error!(
                "what was used of the budgets is not known yet, the store cannot be read: on_failure says what becomes of requests"
            );
        }
    }

    async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        let Some(request) = &ctx.request else {
            return Ok(Flow::Continue);
        };
        let estimate = Estimate::of(request, self.config.default_completion_tokens);
        let mut kept = Kept {
            reserved: None,
            prompt: estimate.prompt,
            group: None,
        };
        let most = Spent {
            prompt: estimate.prompt,
            cached: 0,
            completion: estimate.completion,
        };
        let most = self.most(most, ctx);
        let (zone, now) = (self.config.time_zone, SystemTime::now());
        let admitted = self
            .ledger
            .admit(&key_of(ctx), self.of(ctx), most, zone, now);
        match admitted {
            Ok(reserved) => kept.reserved = Some(reserved),
            Err(Refusal::Unknown) => {
                // Counted all the same, if the settings let it through.
                ctx.own.put(kept);
                return Err(unknown());
            }
            Err(refusal) => return Err(self.refuse(refusal, ctx)),
        }
        ctx.own.put(kept);
        Ok(Flow::Continue)
    }

    async fn on_response(&self, ctx: &mut RequestContext, head: &mut ResponseHead) {
        if let Some(kept) = ctx.own.get_mut::<Kept>() {
            let group = head.headers.get("x-forebay-group");
            kept.group = group.and_then(|group| group.to_str().ok().map(str::to_owned));
        }
    }

    fn on_last(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        self.settle(ctx, outcome);
    }

    async fn on_finish(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        self.settle(ctx, outcome);
    }
}

impl Budget {
    fn settle(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        let Some(kept) = ctx.own.take::<Kept>() else {
            return;
        };
        let spent = Spent::of(ctx, outcome, kept.prompt);
        let mut amount = Amount::default();
        if spent.total() > 0 {
            let tried = ctx.attempts.last().map(|attempt| &*attempt.group);
            let began = kept.group.as_deref().or(tried);
            // Of two that wrote an answer nobody knows how much each took.
            let wrote = [began, ctx.taken_over_by.as_deref()];
            let wrote = wrote.into_iter().flatten();
            let dearest = wrote
                .map(|group| self.amount(spent, &ctx.model, Some(group)))
                .max_by_key(|amount| amount.money);
            amount = dearest.unwrap_or_else(|| self.most(spent, ctx));
        }
        let (zone, now) = (self.config.time_zone, SystemTime::now());
        let key = key_of(ctx);
        let Some(reserved) = kept.reserved else {
            self.ledger.count(&key, amount, zone, now);
            return;
        };
        for passed in reserved.settle(amount, self.config.warn_at.0, zone, now) {
            let change = Change::Budget {
                period: passed.part.period,
                of: passed.part.of,
                percent: passed.percent,
            };
            self.events.tell(&key, change);
        }
    }

    /// Returns the budget of whoever calls.
    fn of(&self, ctx: &RequestContext) -> Amounts {
        let general = Amounts {
            day: self.config.day,
            month: self.config.month,
        };
        match &ctx.principal {
            Some(who) => who.budget.or(general),
            None => general,
        }
    }

    /// Returns the most that tokens may come to, whichever group of the route
    /// answers.
    fn most(&self, spent: Spent, ctx: &RequestContext) -> Amount {
        let narrowed = ctx.restrict.groups.as_deref();
        let groups = ctx.groups.iter();
        let groups = groups.filter(|group| narrowed.is_none_or(|all| all.contains(group)));
        let dearest = groups
            .map(|group| self.amount(spent, &ctx.model, Some(group)))
            .max_by_key(|amount| amount.money);
        dearest.unwrap_or_else(|| self.amount(spent, &ctx.model, None))
    }

    /// Returns what tokens come to, of a model, and of a group if it is known.
    fn amount(&self, spent: Spent, model: &str, group: Option<&str>) -> Amount {
        let price = self.prices.iter().find(|(pattern, price)| {
            let fits = match (&price.group, group) {
                (Some(only), Some(group)) => only == group,
                (Some(_), None) => false,
                (None, _) => true,
            };
            fits && pattern.matches(model)
        });
        let money = price.map_or(0, |(_, price)| {
            let of = |tokens: u64, price: Money| u128::from(tokens) * u128::from(price.0);
            let fresh = spent.prompt.saturating_sub(spent.cached);
            let all = of(fresh, price.input)
                + of(spent.cached, price.cached.unwrap_or(price.input))
                + of(spent.completion, price.output);
            u64::try_from(all.div_ceil(MILLION)).unwrap_or(u64::MAX)
        });
        Amount {
            requests: 1,
            tokens: spent.total(),
            money,
        }
    }

    fn refuse(&self, refusal: Refusal, ctx: &mut RequestContext) -> Error {
        let status = StatusCode::TOO_MANY_REQUESTS;
        match refusal {
            Refusal::Unknown => unknown(),
            Refusal::UsedUp(part, wait) => {
                let labels = [part.period, part.of];
                self.metrics.budget_refused.with_label_values(&labels).inc();
                ctx.reply
                    .insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
                let message = format!(
                    "this key has used its {} for this {}; there is more when the {} is over",
                    part.of, part.period, part.period
                );
                Error::new(status, "insufficient_quota", "insufficient_quota", message)
                    .retry_after(wait)
            }
            Refusal::Reserved(part) => {
                let labels = [part.period, "reserved"];
                self.metrics.budget_refused.with_label_values(&labels).inc();
                let message = format!(
                    "what is left of this key's {} for this {} may be used by its requests under way; try again when one has ended",
                    part.of, part.period
                );
                Error::new(status, "tokens", "rate_limit_exceeded", message).retry_after(ONE_ENDS)
            }
        }
    }
}

fn key_of(ctx: &RequestContext) -> Arc<str> {
    match &ctx.principal {
        Some(who) => Arc::clone(&who.name),
        None => NOBODY.into(),
    }
}

fn unknown() -> Error {
    Error::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "server_error",
        "budget_unknown",
        "it is not known at the moment what this key has used",
    )
    .retry_after(LOAD_PATIENCE)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::{
        super::spent::tests::{attempt, context, outcome},
        *,
    };
    use crate::context::{Ending, Verdict};

    fn configured(config: serde_json::Value) -> Result<Budget, ConfigError> {
        let resources = Resources::default();
        let place = Place::of("sqlite:nowhere.db", Path::new(".")).unwrap();
        let build = Build {
            base: Path::new("."),
            resources: &resources,
            list: "",
            store: Some(&place),
        };
        Budget::configure(serde_json::from_value(config).unwrap(), &build)
    }

    #[test]
    fn the_first_price_that_fits_is_taken() {
        let budget = configured(json!({ "prices": [
            { "model": "gpt-4o*", "input": 2.5, "output": 10, "cached": 1.25 },
            { "model": "*", "group": "ollama", "input": 0, "output": 0 },
            { "model": "*", "input": 0.05, "output": 0.1 },
        ] }))
        .unwrap();
        let spent = Spent {
            prompt: 1000,
            cached: 400,
            completion: 100,
        };
        let money = |model: &str, group: Option<&str>| {
            let amount = budget.amount(spent, model, group);
            Money(amount.money).units()
        };
        let gpt = (600.0 * 2.5 + 400.0 * 1.25 + 100.0 * 10.0) / 1e6;
        assert!((money("gpt-4o-mini", None) - gpt).abs() < 1e-9);
        assert!((money("qwen", None) - 0.00006).abs() < 1e-9);
        assert!(money("qwen", Some("ollama")).abs() < 1e-9);
        assert!((money("qwen", Some("gpus")) - 0.00006).abs() < 1e-9);
    }

    #[test]
    fn a_reservation_is_for_the_dearest_group_of_the_route() {
        let budget = configured(json!({ "prices": [
            { "model": "*", "group": "gpus", "input": 1, "output": 1 },
            { "model": "*", "group": "cloud", "input": 5, "output": 50 },
            { "model": "*", "group": "elsewhere", "input": 500, "output": 500 },
        ] }))
        .unwrap();
        let spent = Spent {
            prompt: 1_000_000,
            cached: 0,
            completion: 0,
        };
        let mut ctx = context("");
        let money = |ctx: &RequestContext| Money(budget.most(spent, ctx).money).units();
        ctx.groups = ["gpus".into(), "cloud".into()].into();
        assert!((money(&ctx) - 5.0).abs() < 1e-9);
        ctx.restrict.groups = Some(["gpus".into()].into());
        assert!((money(&ctx) - 1.0).abs() < 1e-9);
    }

    #[tokio::test]
    async fn who_goes_on_with_an_answer_has_its_price() {
        let budget = configured(json!({ "day": { "money": 1 }, "prices": [
            { "model": "*", "group": "gpus", "input": 10, "output": 10 },
            { "model": "*", "group": "cloud", "input": 50, "output": 50 },
        ] }))
        .unwrap();
        let mut sum = 0.0;
        for (taken_over_by, price) in [(None, 1.0), (Some("cloud".into()), 5.0)] {
            let mut ctx = context("");
            budget.on_request(&mut ctx).await.unwrap_err();
            ctx.attempts.push(attempt(Verdict::Cut));
            ctx.taken_over_by = taken_over_by;
            let end = outcome(Ending::Success, Some((70_000, 30_000)));
            budget.on_finish(&mut ctx, &end).await;
            sum += price;
            let statement = budget.ledger.statement(SystemTime::now());
            let used = Money(statement.keys[0].day.money).units();
            assert!((used - sum).abs() < 1e-9, "{used} {sum}");
        }
    }

    #[test]
    fn a_budget_in_money_needs_prices() {
        let error = configured(json!({ "month": { "money": 5.0 } })).unwrap_err();
        assert!(error.message.contains("prices"), "{error}");
    }

    #[tokio::test]
    async fn what_is_not_known_is_a_failure_and_counted_if_it_goes_on() {
        let budget = configured(json!({ "day": { "tokens": 100 } })).unwrap();
        let mut ctx = context("");
        let error = budget.on_request(&mut ctx).await.unwrap_err();
        assert!(error.status.is_server_error());
        ctx.attempts.push(attempt(Verdict::Answered));
        budget
            .on_finish(&mut ctx, &outcome(Ending::Success, Some((7, 5))))
            .await;
        let statement = budget.ledger.statement(SystemTime::now());
        assert_eq!(statement.keys[0].day.tokens, 12);
    }
}
