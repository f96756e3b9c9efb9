//! What clients asked and were answered, kept as training data: one line of
//! JSON for each exchange, one file for each hour.
//!
//! ```yaml
//! plugins:
//!   - capture: { dir: captures, redact: [keys, emails] }
//! ```
//!
//! Here is what is captured and what is not; [`collected`] keeps an answer while
//! it is sent, [`folder`] and [`writer`] put exchanges into files ([`segment`]),
//! [`safe`] makes those safe, [`keep`] looks after old ones, [`account`] counts. What a line looks like is
//! [`crate::sharegpt`]'s affair.
//!
//! **Invariant:** capturing never makes a client wait: an event is copied, an
//! exchange is put into a queue; whatever has no room is counted as dropped.

mod account;
mod collected;
mod folder;
mod keep;
mod redact;
mod retain;
mod safe;
mod segment;
mod writer;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use http::HeaderMap;
use schemars::JsonSchema;
use serde::Deserialize;

use account::{Lost, OptOut, Skip};
use collected::{Bounds, Collected};
use folder::{Folder, Settings, Zone};
use redact::{Kind, Redactor};
use writer::Job;

use super::{Build, ConfigError, Configure, OnFailure, Plugin, Sent, Wants};
use crate::{
    config::{Share, Size, Time},
    context::{Ending, Outcome, RequestContext},
    error::Result,
    openai::Endpoint,
    resources::Resources,
    sharegpt::{Meta, line::Timings},
};

/// By which a client says that it does not want to be captured.
const HEADER: &str = "x-forebay-capture";

/// The plugin's settings.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureConfig {
    /// The folder; made if it is not there. A relative path is relative to the
    /// configuration file.
    #[schemars(with = "String", length(min = 1))]
    pub dir: PathBuf,
    /// Which time names the files.
    pub time: Zone,
    /// Whether answers that ended at their limit of tokens are captured.
    pub length: bool,
    /// Whether answers that broke off are captured too, marked as partial.
    pub partial: bool,
    /// Whether requests that failed are captured too, marked as partial.
    pub failed: bool,
    /// Whether the request is captured as plugins made it, instead of in the
    /// client's own words.
    pub augmented: bool,
    /// Which share of the exchanges is captured.
    pub sample: Share,
    /// What is replaced by its kind in brackets.
    pub redact: Vec<Kind>,
    /// Regular expressions of what else is replaced, by `[redacted]`.
    #[schemars(length(max = 1000))]
    pub redact_patterns: Vec<String>,
    /// How long lines may be unsafe from a loss of power.
    #[schemars(extend("x-min" = "10ms", "x-max" = "1s"))]
    pub sync: Time,
    /// The most bytes of one answer.
    #[schemars(extend("x-min" = "1KiB", "x-max" = "1GiB"))]
    pub answer: Size,
    /// The most bytes of all answers that are on their way.
    #[schemars(extend("x-min" = "64KiB", "x-max" = "1TiB"))]
    pub buffer: Size,
    /// The most bytes of exchanges that wait to be written.
    #[schemars(extend("x-min" = "64KiB", "x-max" = "1GiB"))]
    pub queue: Size,
    /// What is left free on the disk, or a twentieth of it if that is less.
    #[schemars(extend("x-min" = "0B", "x-max" = "1TiB"))]
    pub min_free: Size,
    /// Whether hours that are over are compressed with zstd.
    pub compress: bool,
    /// How old an hour may become; without it they are kept.
    #[schemars(extend("x-min" = "1h", "x-max" = "36500d"))]
    pub max_age: Option<Time>,
    /// How much all files may take; beyond it the oldest go.
    #[schemars(extend("x-min" = "1MiB", "x-max" = "1024TiB"))]
    pub max_size: Option<Size>,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("data/requests_responses"),
            time: Zone::Utc,
            length: true,
            partial: false,
            failed: false,
            augmented: false,
            sample: Share(100),
            redact: Vec::new(),
            redact_patterns: Vec::new(),
            sync: Time::millis(500),
            answer: Size::mib(16),
            buffer: Size::mib(64),
            queue: Size::mib(64),
            min_free: Size::mib(1024),
            compress: false,
            max_age: None,
            max_size: None,
        }
    }
}

impl CaptureConfig {
    fn settings(&self) -> Settings {
        Settings {
            zone: self.time,
            sync: self.sync.get(),
            min_free: self.min_free.0,
            compress: self.compress,
            max_age: self.max_age.map(Time::get),
            max_size: self.max_size.map(|size| size.0),
        }
    }
}

/// Captures exchanges.
#[derive(Debug)]
pub struct Capture {
    config: CaptureConfig,
    bounds: Bounds,
    redactor: Option<Arc<Redactor>>,
    folder: Arc<Folder>,
}

/// What becomes of a request, decided when it is read.
#[derive(Debug)]
enum Mark {
    OptedOut(OptOut),
    Skipped(Skip),
    Wanted(Collected),
}

/// Returns what is wrong with an expression; what stands before it shows the
/// expression.
fn last_line(why: &str) -> &str {
    let line = why.trim_end().lines().last().unwrap_or_default();
    line.trim_start_matches("error: ")
}

impl Configure for Capture {
    const NAME: &'static str = "capture";
    const ON_FAILURE: OnFailure = OnFailure::Open;
    type Config = CaptureConfig;

    fn configure(config: CaptureConfig, build: &Build<'_>) -> Result<Self, ConfigError> {
        let redactor =
            Redactor::new(&config.redact, &config.redact_patterns).map_err(|(place, why)| {
                ConfigError {
                    path: format!("{}.redact_patterns[{place}]", Self::NAME),
                    message: format!("expected a regular expression: {}", last_line(&why)),
                }
            })?;
        let dir = build.base.join(&config.dir);
        let dir = std::path::absolute(&dir).map_err(|why| ConfigError {
            path: format!("{}.dir", Self::NAME),
            message: format!("expected a folder: {why}"),
        })?;
        Ok(Self {
            folder: Folder::of(dir, &config.settings(), build.resources),
            redactor: redactor.map(Arc::new),
            bounds: Bounds {
                answer: config.answer.get(),
                all: config.buffer.get(),
            },
            config,
        })
    }
}

#[async_trait]
impl Plugin for Capture {
    fn go_live(&self, resources: &Resources) {
        log::info!(
            "prompts and answers are written to {} (capture)",
            self.folder.dir().display()
        );
        self.folder
            .start(&self.config.settings(), &resources.workers);
    }

    fn wants(&self) -> Wants {
        Wants {
            edit: false,
            annotate: false,
            see: true,
        }
    }

    fn on_parsed(&self, ctx: &mut RequestContext) -> Result<()> {
        let Some(request) = &ctx.request else {
            return Ok(());
        };
        let is_dialogue = matches!(
            request.endpoint,
            Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Responses
        );
        let mark = if let Some(by) = opted_out(ctx) {
            Mark::OptedOut(by)
        } else if !is_dialogue {
            Mark::Skipped(Skip::Endpoint)
        } else if rand::random_range(0..100) >= self.config.sample.0 {
            Mark::Skipped(Skip::Sampled)
        } else {
            let total = &self.folder.account.metrics().capture_buffer_bytes;
            Mark::Wanted(Collected::new(self.bounds, total))
        };
        ctx.own.put(mark);
        Ok(())
    }

    fn on_sent(&self, ctx: &mut RequestContext, sent: Sent<'_>) {
        if let Some(Mark::Wanted(collected)) = ctx.own.get_mut() {
            match sent {
                Sent::Event(frame) => {
                    if let Some(data) = &frame.data {
                        collected.event(data);
                    }
                }
                Sent::Whole(body) => collected.whole(body),
            }
        }
    }

    async fn on_finish(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        let account = &self.folder.account;
        // Decided first, so that the two counts are one right after the other.
        let fate = self.fate(ctx, outcome);
        account.finished();
        match fate {
            Fate::OptedOut(by) => account.opted_out(by),
            Fate::Skipped(why) => account.skipped(why),
            Fate::Lost(why) => {
                count_limit(account.metrics(), why);
                account.dropped(why, Instant::now());
            }
            Fate::Kept(job) => self.folder.offer(*job, self.config.queue.get()),
        }
    }
}

/// What becomes of an exchange that has ended.
enum Fate {
    OptedOut(OptOut),
    Skipped(Skip),
    Lost(Lost),
    Kept(Box<Job>),
}

impl Capture {
    fn fate(&self, ctx: &mut RequestContext, outcome: &Outcome) -> Fate {
        let collected = match ctx.own.take::<Mark>().map(|mark| *mark) {
            Some(Mark::OptedOut(by)) => return Fate::OptedOut(by),
            Some(Mark::Skipped(why)) => return Fate::Skipped(why),
            Some(Mark::Wanted(collected)) => collected,
            None => return Fate::Skipped(Skip::NoRequest),
        };
        if let Some(why) = self.unwanted(&collected, outcome) {
            return Fate::Skipped(why);
        }
        if let Some(lost) = collected.lost() {
            return Fate::Lost(lost);
        }
        let Some(request) = &ctx.request else {
            return Fate::Skipped(Skip::NoRequest);
        };
        let received = ctx.received.as_ref().filter(|_| !self.config.augmented);
        let at = SystemTime::now();
        Fate::Kept(Box::new(Job {
            endpoint: request.endpoint,
            request: received.unwrap_or(&request.raw).clone(),
            answer: collected,
            meta: meta(ctx, outcome, request.endpoint, at),
            at,
            redactor: self.redactor.clone(),
            length: self.config.length,
            // Of those that failed nobody has to be asked here any more.
            partial: self.config.partial || outcome.ending != Ending::Success,
            place: None,
        }))
    }

    /// Returns why an exchange that ended so is not captured.
    fn unwanted(&self, collected: &Collected, outcome: &Outcome) -> Option<Skip> {
        let nothing_came = collected.is_empty();
        match outcome.ending {
            Ending::Success if nothing_came => Some(Skip::Local),
            Ending::Success => None,
            Ending::ClientClosed if nothing_came => (!self.config.failed).then_some(Skip::Left),
            Ending::ClientClosed | Ending::Incomplete if !nothing_came => {
                (!self.config.partial).then_some(Skip::Partial)
            }
            _ => (!self.config.failed).then_some(Skip::Failed),
        }
    }
}

fn count_limit(metrics: &crate::metrics::Metrics, lost: Lost) {
    let limit = match lost {
        Lost::Answer => "capture_answer",
        _ => "capture_buffer",
    };
    metrics.limits.with_label_values(&[limit]).inc();
}

/// Returns who of those who may has said that the exchange is not to be kept.
fn opted_out(ctx: &RequestContext) -> Option<OptOut> {
    if ctx.principal.as_ref().is_some_and(|who| !who.capture) {
        return Some(OptOut::Key);
    }
    if says_no(&ctx.headers) {
        return Some(OptOut::Header);
    }
    let store = ctx.request.as_ref()?.get("store")?;
    // As with the header: anything but a plain yes is a no.
    (!matches!(store, b"true" | b"null")).then_some(OptOut::Store)
}

/// Anything but a plain yes is a no: who writes the header cares.
fn says_no(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(HEADER).iter();
    values.any(|value| !matches!(value.as_bytes(), b"1" | b"true"))
}

fn meta(ctx: &RequestContext, outcome: &Outcome, endpoint: Endpoint, at: SystemTime) -> Meta {
    let last = ctx.attempts.last();
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 4);
    let at = DateTime::<Utc>::from(at);
    Meta {
        request_id: ctx.id.to_string(),
        ts: at.to_rfc3339_opts(SecondsFormat::Millis, true),
        endpoint: endpoint.name().to_owned(),
        upstream: last.map_or("", |attempt| &*attempt.upstream).to_owned(),
        group: last.map_or("", |attempt| &*attempt.group).to_owned(),
        key: ctx.caller().to_owned(),
        streamed: outcome.streamed,
        outcome: outcome.ending.as_str().to_owned(),
        partial: outcome.ending != Ending::Success,
        error: outcome.error.as_deref().unwrap_or("").to_owned(),
        status: outcome.status,
        takeovers: ctx.takeovers,
        attempts: ctx.attempts.len() as u64,
        fallback: last.is_some_and(|attempt| attempt.fallback),
        timings: Timings {
            queued_ms: millis(ctx.queued),
            first_token_ms: outcome.first_token.map_or(0, millis),
            total_ms: millis(outcome.total),
        },
        usage: outcome.usage.map(Into::into).unwrap_or_default(),
        // The rest is in the exchange itself.
        ..Meta::default()
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Method};

    use super::*;

    #[test]
    fn only_a_plain_yes_in_the_header_is_no_no() {
        for (values, no) in [
            (&[][..], false),
            (&["1"], false),
            (&["true", "1"], false),
            (&["0"], true),
            (&["off"], true),
            (&[""], true),
            (&["1", "0"], true),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(HEADER, HeaderValue::from_static(value));
            }
            assert_eq!(says_no(&headers), no, "{values:?}");
        }
    }

    #[test]
    fn a_bare_name_has_the_documented_settings() {
        let config: CaptureConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(config, CaptureConfig::default());
    }

    fn build(config: CaptureConfig) -> (Resources, Capture) {
        let resources = Resources::default();
        let build = Build {
            base: std::path::Path::new("/conf"),
            resources: &resources,
            list: "",
            store: None,
        };
        let capture = Capture::configure(config, &build).unwrap();
        (resources, capture)
    }

    #[tokio::test]
    async fn what_was_never_read_is_accounted_for_too() {
        let (resources, capture) = build(CaptureConfig::default());
        assert_eq!(
            capture.folder.dir(),
            std::path::Path::new("/conf/data/requests_responses")
        );
        let mut ctx = RequestContext::new(
            "id".into(),
            [127, 0, 0, 1].into(),
            Method::POST,
            "/v1/chat/completions".into(),
            HeaderMap::new(),
        );
        let outcome = Outcome {
            status: 401,
            ending: Ending::ClientError,
            error: None,
            streamed: false,
            first_token: None,
            total: Duration::ZERO,
            bytes_out: 0,
            usage: None,
        };
        capture.on_parsed(&mut ctx).unwrap();
        capture.on_finish(&mut ctx, &outcome).await;
        let text = resources.metrics.encode().unwrap();
        let series = "forebay_capture_exchanges_total{reason=\"no_request\",result=\"skipped\"} 1";
        assert!(text.contains(series), "{text}");
        assert!(text.contains("forebay_capture_finished_total 1"), "{text}");
    }

    #[test]
    fn a_pattern_that_is_none_is_told_with_its_place() {
        let config = CaptureConfig {
            redact_patterns: vec!["a".to_owned(), "(".to_owned()],
            ..CaptureConfig::default()
        };
        let resources = Resources::default();
        let build = Build {
            base: std::path::Path::new("/"),
            resources: &resources,
            list: "",
            store: None,
        };
        let why = Capture::configure(config, &build).unwrap_err();
        assert_eq!(why.path, "capture.redact_patterns[1]");
    }
}
