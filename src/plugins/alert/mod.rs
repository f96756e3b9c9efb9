//! `alert`: tells people what is wrong, and when it is right again.
//!
//! Nothing of this happens where requests are served: one thread of the process
//! listens to [`Events`](crate::events) and makes the calls ([`desk`],
//! [`deliver`]). Everybody who is told has a [`board`] of his own, which knows
//! what has reached him. A request that was served by a fallback leaves a notice,
//! in a bounded queue, and does not wait.
//!
//! **Invariant:** who is told is what the live configuration says, whatever
//! requests of earlier ones are still on their way; one that is only checked, or
//! refused, does nothing.

mod board;
mod deliver;
mod desk;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use self::{
    board::{Kind, Rules},
    deliver::{Format, Receiver, To},
    desk::{Desk, Id, Post},
};
use super::{Build, ConfigError, Configure, OnFailure, Plugin};
use crate::{
    config::{SecretRef, Time},
    context::{Outcome, RequestContext},
    logging::Seldom,
    outbound::{Endpoint, Reach},
    resources::Resources,
};

/// How many plugins there were: each has a number of its own.
static HOLDERS: AtomicU64 = AtomicU64::new(0);

/// Tells people what is wrong.
pub struct Alert {
    desk: Arc<Desk>,
    /// By which the desk knows this plugin.
    holder: u64,
    posts: Vec<Arc<Post>>,
    /// The posts that are told of fallbacks.
    of_fallbacks: Arc<[Id]>,
}

/// The settings of [`Alert`].
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlertConfig {
    /// URLs that get each alert as a POST.
    #[schemars(length(max = 16))]
    webhooks: Vec<WebhookConfig>,
    /// A program and its arguments, run for each alert, which it reads as JSON on
    /// its standard input. It gets an environment of its own.
    #[schemars(length(max = 64))]
    command: Vec<String>,
    /// What is told of; everything if it is not named.
    #[schemars(length(min = 1))]
    on: Option<Vec<Kind>>,
    /// The least time between two alerts of one trouble.
    #[schemars(extend("x-min" = "0s", "x-max" = "7d"))]
    alert_cooldown: Time,
    /// Whether it is told when a trouble is over.
    recovery: bool,
    /// How long one call or one run of the command may take.
    #[schemars(extend("x-min" = "100ms", "x-max" = "5m"))]
    timeout: Time,
    /// What this gateway is called in its alerts.
    #[schemars(length(min = 1, max = 100))]
    source: String,
}

impl Default for AlertConfig {
    fn default() -> Self {
        Self {
            webhooks: Vec::new(),
            command: Vec::new(),
            on: None,
            alert_cooldown: Time(Duration::from_secs(300)),
            recovery: true,
            timeout: Time(Duration::from_secs(10)),
            source: "forebay".to_owned(),
        }
    }
}

/// One webhook.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct WebhookConfig {
    /// Where it is: `env:NAME` or `file:path`, since who knows the URL can post
    /// there.
    url: SecretRef,
    /// What it reads.
    #[serde(default)]
    format: Format,
}

impl Configure for Alert {
    const NAME: &'static str = "alert";
    const ON_FAILURE: OnFailure = OnFailure::Open;
    type Config = AlertConfig;

    fn configure(config: AlertConfig, build: &Build<'_>) -> Result<Self, ConfigError> {
        let error = |path: String, message: String| ConfigError {
            path: format!("{}.{path}", Self::NAME),
            message,
        };
        if config.webhooks.is_empty() && config.command.is_empty() {
            let message = "expected webhooks, a command, or both";
            return Err(error("webhooks".to_owned(), message.to_owned()));
        }
        let mut receivers = Vec::new();
        for (place, webhook) in config.webhooks.iter().enumerate() {
            let at = || format!("webhooks[{place}].url");
            let url = webhook.url.read(build.base);
            let url = url.map_err(|why| error(at(), why.to_string()))?;
            let endpoint = Endpoint::parse(url.expose(), Reach::Private);
            receivers.push(To::Webhook {
                endpoint: endpoint.map_err(|why| error(at(), why.to_string()))?,
                format: webhook.format,
            });
        }
        if !config.command.is_empty() {
            receivers.push(To::Command(config.command.clone()));
        }
        let wanted = config.on.clone().unwrap_or_else(|| Kind::ALL.to_vec());
        let posts: Vec<_> = receivers
            .into_iter()
            .map(|to| Arc::new(post(&config, &wanted, to)))
            .collect();
        let of_fallbacks = posts
            .iter()
            .filter(|post| post.wanted.contains(&Kind::Fallback))
            .map(|post| post.id);
        Ok(Self {
            desk: build.resources.shared::<Desk>(Self::NAME),
            holder: HOLDERS.fetch_add(1, Ordering::Relaxed),
            of_fallbacks: of_fallbacks.collect(),
            posts,
        })
    }
}

/// Makes the post of one receiver. Posts of the same settings are one and the
/// same, in whatever lists of plugins they stand.
fn post(config: &AlertConfig, wanted: &[Kind], to: To) -> Post {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    match &to {
        To::Webhook { endpoint, format } => {
            add(endpoint.url().as_str());
            add(&format!("{format:?}"));
        }
        To::Command(words) => {
            add(&format!("command of {}", words.len()));
            words.iter().for_each(|word| add(word));
        }
    }
    let of = hash.clone();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    for kind in Kind::ALL.iter().filter(|kind| wanted.contains(kind)) {
        add(kind.as_str());
    }
    let rules = Rules {
        cooldown: config.alert_cooldown.get(),
        recovery: config.recovery,
    };
    add(&format!("{rules:?}"));
    add(&format!("{:?}", config.timeout.get()));
    add(&config.source);
    Post {
        id: hash.finalize().into(),
        of: of.finalize().into(),
        wanted: wanted.to_vec(),
        rules,
        receiver: Receiver {
            source: config.source.clone(),
            to,
            timeout: config.timeout.get(),
            failures: Seldom::default(),
        },
    }
}

#[async_trait]
impl Plugin for Alert {
    fn go_live(&self, resources: &Resources) {
        self.desk.enter(self.holder, &self.posts);
        if let Err(why) = Desk::start(&self.desk, resources) {
            log::error!("no thread to send alerts with: {why}");
        }
    }

    fn retire(&self) {
        self.desk.leave(self.holder);
    }

    async fn on_finish(&self, ctx: &mut RequestContext, _outcome: &Outcome) {
        let last = ctx.attempts.last();
        if !self.of_fallbacks.is_empty() && last.is_some_and(|last| last.fallback) {
            self.desk.fallback(&self.of_fallbacks, &ctx.route);
        }
    }
}

impl Drop for Alert {
    fn drop(&mut self) {
        self.desk.leave(self.holder);
    }
}
