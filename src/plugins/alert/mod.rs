//! `alert`: tells people what is wrong, and when it is right again.
//!
//! Nothing of this happens where requests are served: a thread of its own
//! listens to [`Events`](crate::events), keeps the [`board`], and makes the
//! calls. A request that was served by a fallback leaves a notice, in a bounded
//! queue, and does not wait.

mod board;
mod deliver;

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::{
    sync::{broadcast, mpsc, oneshot},
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use self::{
    board::{Alert as Told, Board, Kind, Notice},
    deliver::{Format, Receivers, Webhook},
};
use super::{Build, ConfigError, Configure, OnFailure, Plugin};
use crate::{
    config::{SecretRef, Time},
    context::{Outcome, RequestContext},
    events::{Change, Event},
    metrics::Metrics,
    outbound::{Endpoint, Outbound, Reach},
    resources::Resources,
};

/// How many notices of requests may wait.
const NOTICES_MAX: usize = 256;
/// How many alerts may be on their way at once; more are lost, and counted.
const DELIVERIES_MAX: usize = 16;
/// How often it is looked whether time has made something worth telling.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long alerts that are on their way have when the settings change.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Tells people what is wrong.
pub struct Alert {
    fallbacks: Option<mpsc::Sender<Arc<str>>>,
    /// What the thread is started with; gone once it is.
    waiting: Mutex<Option<Box<Waiting>>>,
    /// Dropped with the plugin: then the thread ends.
    _stop: oneshot::Sender<()>,
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

/// The board of a process, which outlives its configurations.
#[derive(Default)]
struct Shared(Mutex<Board>);

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
        let mut webhooks = Vec::new();
        for (place, webhook) in config.webhooks.iter().enumerate() {
            let at = || format!("webhooks[{place}].url");
            let url = webhook.url.read(build.base);
            let url = url.map_err(|why| error(at(), why.to_string()))?;
            let endpoint = Endpoint::parse(url.expose(), Reach::Private);
            webhooks.push(Webhook {
                endpoint: endpoint.map_err(|why| error(at(), why.to_string()))?,
                format: webhook.format,
            });
        }
        let wanted = config.on.unwrap_or_else(|| Kind::ALL.to_vec());
        let (stop, stopped) = oneshot::channel();
        let (fallbacks, heard) = mpsc::channel(NOTICES_MAX);
        let watch = Watch {
            board: build.resources.shared::<Shared>(Self::NAME),
            cooldown: config.alert_cooldown.get(),
            recovery: config.recovery,
            metrics: Arc::clone(&build.resources.metrics),
            receivers: Arc::new(Receivers {
                source: config.source,
                webhooks,
                command: config.command,
                timeout: config.timeout.get(),
                outbound: Outbound::new(),
            }),
            wanted: wanted.clone(),
        };
        let waiting = Waiting {
            watch,
            // What happens until the thread runs is not missed.
            events: build.resources.events.subscribe(),
            fallbacks: heard,
            stopped,
        };
        Ok(Self {
            fallbacks: wanted.contains(&Kind::Fallback).then_some(fallbacks),
            waiting: Mutex::new(Some(Box::new(waiting))),
            _stop: stop,
        })
    }
}

#[async_trait]
impl Plugin for Alert {
    fn go_live(&self, _resources: &Resources) {
        let waiting = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.take()
        };
        // It runs already: the plugin was kept.
        let Some(waiting) = waiting else { return };
        if let Err(why) = waiting.start() {
            log::error!("nobody will be told of anything: no thread: {why}");
        }
    }

    async fn on_finish(&self, ctx: &mut RequestContext, _outcome: &Outcome) {
        let last = ctx.attempts.last();
        if let (Some(fallbacks), true) = (&self.fallbacks, last.is_some_and(|last| last.fallback)) {
            // With no room there are notices enough.
            fallbacks.try_send(Arc::clone(&ctx.route)).ok();
        }
    }
}

/// A thread that was not started yet.
struct Waiting {
    watch: Watch,
    events: broadcast::Receiver<Event>,
    fallbacks: mpsc::Receiver<Arc<str>>,
    stopped: oneshot::Receiver<()>,
}

impl Waiting {
    fn start(self) -> std::io::Result<()> {
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            match runtime {
                Ok(runtime) => {
                    let run = self.watch.run(self.events, self.fallbacks, self.stopped);
                    runtime.block_on(run);
                }
                Err(why) => log::error!("nobody will be told of anything: {why}"),
            }
        };
        let named = thread::Builder::new().name("alert".to_owned());
        named.spawn(run).map(drop)
    }
}

/// What the thread has.
struct Watch {
    board: Arc<Shared>,
    wanted: Vec<Kind>,
    cooldown: Duration,
    recovery: bool,
    receivers: Arc<Receivers>,
    metrics: Arc<Metrics>,
}

impl Watch {
    async fn run(
        self,
        mut events: broadcast::Receiver<Event>,
        mut fallbacks: mpsc::Receiver<Arc<str>>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut deliveries = JoinSet::new();
        loop {
            let alerts = tokio::select! {
                _ = &mut stopped => break,
                event = events.recv() => match event {
                    Ok(event) => notices_of(&event)
                        .into_iter()
                        .filter_map(|notice| self.take(notice))
                        .collect(),
                    Err(broadcast::error::RecvError::Lagged(lost)) => {
                        log::warn!("events came too fast for alerts: lost={lost}");
                        Vec::new()
                    }
                    Err(broadcast::error::RecvError::Closed) => break,
                },
                Some(route) = fallbacks.recv() => {
                    let detail = "served by its fallback".to_owned();
                    let notice = Notice { kind: Kind::Fallback, subject: route, wrong: true, detail };
                    self.take(notice).into_iter().collect()
                }
                _ = tick.tick() => self.lock().look(self.cooldown, Instant::now()),
                Some(_done) = deliveries.join_next() => Vec::new(),
            };
            for alert in alerts {
                self.send(alert, &mut deliveries);
            }
        }
        let last_words = async { while deliveries.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_WORDS, last_words).await.is_err() {
            log::warn!("alerts were given up on their way");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Board> {
        self.board.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, notice: Notice) -> Option<Told> {
        if !self.wanted.contains(&notice.kind) {
            return None;
        }
        self.lock().notice(notice, self.cooldown, Instant::now())
    }

    fn send(&self, alert: Told, deliveries: &mut JoinSet<()>) {
        if !alert.wrong && !self.recovery {
            return;
        }
        let kind = alert.kind.as_str();
        let count = move |metrics: &Metrics, result| {
            metrics.alerts.with_label_values(&[kind, result]).inc();
        };
        if deliveries.len() >= DELIVERIES_MAX {
            count(&self.metrics, "dropped");
            log::error!(
                "too many alerts on their way: kind={kind} subject={:?}",
                alert.subject
            );
            return;
        }
        let (receivers, metrics) = (Arc::clone(&self.receivers), Arc::clone(&self.metrics));
        deliveries.spawn(async move {
            let failed = receivers.tell(&alert, SystemTime::now()).await;
            count(&metrics, if failed == 0 { "sent" } else { "failed" });
        });
    }
}

/// Returns what an event says is wrong, or is right again.
fn notices_of(event: &Event) -> Vec<Notice> {
    let notice = |kind, subject: &Arc<str>, wrong, detail: String| Notice {
        kind,
        subject: Arc::clone(subject),
        wrong,
        detail,
    };
    let subject = &event.subject;
    match &event.change {
        Change::State { to, reason, .. } => {
            let key = matches!(*reason, "key_bad" | "quota");
            let down = *to == "down" && !key;
            let say = |wrong: bool| {
                if wrong {
                    format!("upstream is {to} ({reason})")
                } else {
                    format!("upstream is {to}")
                }
            };
            let mut notices = vec![notice(Kind::Down, subject, down, say(down))];
            // One that cannot be reached may still refuse the key.
            if key || matches!(*to, "ready" | "degraded") {
                notices.push(notice(Kind::Key, subject, key, say(key)));
            }
            notices
        }
        Change::Breaker { model, to, .. } => {
            let of = Arc::from(format!("{subject} {model}"));
            match *to {
                "open" => vec![notice(
                    Kind::Breaker,
                    &of,
                    true,
                    "breaker is open".to_owned(),
                )],
                "closed" => {
                    let detail = "breaker is closed again".to_owned();
                    vec![notice(Kind::Breaker, &of, false, detail)]
                }
                _ => Vec::new(),
            }
        }
        Change::Capture { dropping, reason } => {
            let detail = if *dropping {
                format!("exchanges are lost ({reason})")
            } else {
                "exchanges are captured again".to_owned()
            };
            vec![notice(Kind::Capture, subject, *dropping, detail)]
        }
        Change::Budget {
            period,
            of,
            percent,
        } => {
            let subject = Arc::from(format!("{subject} ({of} per {period})"));
            let detail = format!("{percent} % used");
            vec![notice(Kind::Budget, &subject, true, detail)]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_is_only_checked_starts_no_thread() {
        let resources = Resources::default();
        let build = Build {
            base: std::path::Path::new("/conf"),
            resources: &resources,
            list: "",
            store: None,
        };
        let config = AlertConfig {
            command: vec!["true".to_owned()],
            ..AlertConfig::default()
        };
        let alert = Alert::configure(config, &build).unwrap();
        let is_waiting = || alert.waiting.lock().unwrap().is_some();
        assert!(is_waiting());
        alert.go_live(&resources);
        assert!(!is_waiting());
        // The next snapshot keeps it.
        alert.go_live(&resources);
        assert!(!is_waiting());
    }
}
