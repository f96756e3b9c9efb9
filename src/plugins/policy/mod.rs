//! `policy`: what may be asked, and what may be answered.
//!
//! On the way in, in this order: parameters, addresses of media, rules about
//! texts, the length of the prompt. On the way out: rules about texts, on whole
//! answers and, across the borders of events, on streams.
//!
//! - [`config`]: the settings
//! - [`parameters`], [`names`]: which parameters, and which values
//! - [`media`]: addresses that a model server would fetch from
//! - [`prompt`], [`text`]: rules about texts of requests, and where these stand
//! - [`context`], [`tokens`]: how long a prompt may be, and how long it is
//! - [`output`]: rules about texts of answers
//! - [`rule`], [`matcher`]: one rule, and the expressions it looks for
//! - [`watch`]: when a look at a prompt has to end
//!
//! **Invariant:** nothing that a client or a model wrote gets into the log, a
//! metric or an error; a refusal says what the YAML says.

mod config;
mod context;
mod matcher;
mod media;
mod names;
mod output;
mod parameters;
mod prompt;
mod rule;
mod text;
mod tokens;
mod watch;

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use tokio::sync::Semaphore;

use self::{
    config::{Expression, OutputConfig, Part, PolicyConfig, PromptConfig},
    context::{Context, Fit},
    matcher::Matcher,
    media::Media,
    output::{Rules, Stream},
    parameters::Parameters,
    prompt::{PromptRule, Refusal},
    rule::{Action, Rule},
    text::Role,
    watch::Watch,
};
use super::{
    Build, ConfigError, Configure, Flow, OnFailure, Pass, Plugin, Wants, rate_limit::lists,
};
use crate::{
    config::{Config, PluginEntry},
    context::{Principal, RequestContext, Room},
    error::{Error, Result},
    metrics::Metrics,
    openai::{ApiRequest, Frame},
};

const DROPPED: HeaderName = HeaderName::from_static("x-forebay-dropped-params");
const TRIMMED: HeaderName = HeaderName::from_static("x-forebay-trimmed");
/// Requests up to this size are looked at where they are served, in bytes: it
/// takes less than a thread would to begin.
const INLINE_BYTES_MAX: usize = 32 * 1024;
/// The most names of dropped parameters that a client is told.
const NAMES_MAX: usize = 20;

/// Governs requests and answers.
pub struct Policy {
    work: Arc<Work>,
    output: Rules,
    /// What was read beside the YAML, as it was then.
    files: Vec<(PathBuf, Stamp)>,
    /// Large requests are looked at by so many threads at once.
    threads: Arc<Semaphore>,
}

type Stamp = Option<(u64, SystemTime)>;

/// What is done with a request.
struct Work {
    parameters: Parameters,
    media: Media,
    prompt: Vec<PromptRule>,
    context: Option<Context>,
    /// How long the rules about texts may look at one request.
    time_budget: Duration,
    hits: Hits,
}

/// Counts what rules find.
#[derive(Clone, Default)]
struct Hits(Option<Arc<Metrics>>);

/// A request as it goes on.
struct Governed {
    request: ApiRequest,
    dropped: Vec<String>,
    fit: Fit,
    /// How many tokens may still be put into its prompt.
    room: Option<u64>,
}

impl Hits {
    /// Returns the refusal of a prompt that takes too long to check.
    fn late(&self) -> Error {
        if let Some(metrics) = &self.0 {
            metrics.limits.with_label_values(&["prompt_check"]).inc();
        }
        let message = "checking this prompt takes longer than is allowed: send a shorter one";
        Error::invalid("prompt_check_timeout", message)
    }

    /// `rule` is a name of the YAML, or a word of ours.
    fn note(&self, part: &str, rule: &str, count: u64) {
        if let (1.., Some(metrics)) = (count, &self.0) {
            metrics
                .policy_hits
                .with_label_values(&[part, rule])
                .inc_by(count);
        }
    }
}

impl Work {
    fn govern(
        &self,
        mut request: ApiRequest,
        who: Option<&Principal>,
        watch: &Watch,
    ) -> Result<Governed> {
        let trusted = who.is_some_and(|who| {
            let mut patterns = self.parameters.trusted.iter();
            patterns.any(|pattern| pattern.matches(&who.name))
        });
        let mut dropped = Vec::new();
        self.parameters
            .apply(&mut request, trusted, &mut dropped, &self.hits)?;
        if !trusted {
            self.media.check(&request, &self.hits)?;
        }
        prompt::apply(&self.prompt, &mut request, &self.hits, watch)?;
        let (fit, room) = match &self.context {
            Some(context) => context.apply(&mut request, who, &self.hits)?,
            None => (Fit::Fits, None),
        };
        Ok(Governed {
            request,
            dropped,
            fit,
            room,
        })
    }
}

impl Policy {
    /// Tells the plugins behind this one how much they may put into the prompt.
    fn leave_room(&self, ctx: &mut RequestContext, tokens: u64) {
        let Some(request) = &ctx.request else {
            return;
        };
        let (work, model) = (Arc::clone(&self.work), request.model.clone());
        let count = move |text: &str| match &work.context {
            Some(context) => context.count(&model, text),
            None => 0,
        };
        // The narrowest counts.
        if ctx.room.as_ref().is_none_or(|room| tokens < room.tokens) {
            ctx.room = Some(Room {
                tokens,
                count: Arc::new(count),
            });
        }
    }

    /// Looks at a large request on a thread of its own.
    async fn govern_apart(
        &self,
        request: ApiRequest,
        who: Option<Arc<Principal>>,
    ) -> Result<Governed> {
        let threads = Arc::clone(&self.threads);
        let permit = threads.acquire_owned().await;
        let work = Arc::clone(&self.work);
        let watch = Watch::new(work.time_budget);
        // Dropped with this future, if the client leaves.
        let _waiting = watch.waiting();
        let done = tokio::task::spawn_blocking(move || {
            let governed = work.govern(request, who.as_deref(), &watch);
            drop(permit);
            governed
        });
        done.await.map_err(|why| {
            let message = "the gateway failed on this request";
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Error::new(status, "server_error", "internal_error", message).because(why)
        })?
    }
}

#[async_trait]
impl Plugin for Policy {
    async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        let Some(request) = ctx.request.clone() else {
            return Ok(Flow::Continue);
        };
        let who = ctx.principal.clone();
        let governed = match request.raw.len() {
            0..=INLINE_BYTES_MAX => {
                let watch = Watch::new(self.work.time_budget);
                self.work.govern(request, who.as_deref(), &watch)?
            }
            _ => self.govern_apart(request, who).await?,
        };
        ctx.request = Some(governed.request);
        if let Some(tokens) = governed.room {
            self.leave_room(ctx, tokens);
        }
        if let Some(names) = told(&governed.dropped) {
            ctx.reply.append(DROPPED, names);
        }
        match governed.fit {
            Fit::Fits | Fit::Rerouted => {}
            Fit::Trimmed(count) => {
                ctx.reply.insert(TRIMMED, HeaderValue::from(count));
            }
            Fit::Groups(groups) => {
                let narrowed: Arc<[Box<str>]> = match &ctx.restrict.groups {
                    None => groups,
                    Some(allowed) => {
                        let both = groups.iter().filter(|group| allowed.contains(group));
                        both.cloned().collect()
                    }
                };
                ctx.restrict.groups = Some(narrowed);
            }
        }
        Ok(Flow::Continue)
    }

    fn wants(&self) -> Wants {
        Wants {
            edit: !self.output.list.is_empty(),
            annotate: false,
            see: false,
        }
    }

    fn on_event(
        &self,
        ctx: &mut RequestContext,
        event: &Frame,
        out: &mut Vec<Frame>,
    ) -> Result<Pass> {
        let Some(request) = &ctx.request else {
            out.push(event.clone());
            return Ok(Pass::On);
        };
        let (endpoint, n) = (request.endpoint, request.n);
        let kept = ctx.own.take::<Stream>();
        let mut stream = kept.unwrap_or_else(|| Box::new(Stream::new(endpoint, n)));
        let pass = stream.event(&self.output, &self.work.hits, event, out);
        ctx.own.put(*stream);
        pass
    }

    fn on_body(&self, ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
        if let Some(request) = &ctx.request
            && let Some(new) = output::whole(&self.output, &self.work.hits, request.endpoint, body)?
        {
            *body = new;
        }
        Ok(())
    }

    fn watched(&self) -> Vec<PathBuf> {
        self.files.iter().map(|(file, _)| file.clone()).collect()
    }

    fn is_current(&self) -> bool {
        self.files
            .iter()
            .all(|(file, stamp)| stamp_of(file) == *stamp)
    }

    fn warnings(&self, config: &Config) -> Vec<String> {
        let context = self.work.context.iter();
        let mut warnings: Vec<String> = context
            .flat_map(Context::groups)
            .filter(|group| !config.groups.contains_key(*group))
            .map(|group| format!("long prompts go to the group {group}, which does not exist"))
            .collect();
        let judges = self.work.context.is_some() || !self.work.prompt.is_empty();
        let mut lists = lists(config);
        if judges && lists.any(|list| behind(list, Self::NAME, "rag")) {
            let message = "expected before rag in the list of plugins: behind it what strangers \
                           wrote on web pages is held to these rules and limits, and has requests \
                           refused or trimmed that are in order";
            warnings.push(message.to_owned());
        }
        warnings
    }
}

/// Returns whether a plugin stands behind another in a list.
fn behind(list: &[PluginEntry], plugin: &str, other: &str) -> bool {
    let place = |name: &str| list.iter().rposition(|entry| entry.name == name);
    let first = list.iter().position(|entry| entry.name == other);
    first.is_some_and(|first| place(plugin).is_some_and(|place| place > first))
}

/// Returns the names of dropped parameters as a header can carry them.
fn told(dropped: &[String]) -> Option<HeaderValue> {
    if dropped.is_empty() {
        return None;
    }
    let mut names: Vec<String> = dropped
        .iter()
        .take(NAMES_MAX)
        .map(|name| shown(name))
        .collect();
    if dropped.len() > NAMES_MAX {
        names.push(format!("+{}", dropped.len() - NAMES_MAX));
    }
    HeaderValue::try_from(names.join(", ")).ok()
}

/// A client's word in a header: what is no ordinary letter is a question mark.
fn shown(name: &str) -> String {
    let plain = |letter: char| match letter {
        letter if letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.') => letter,
        _ => '?',
    };
    name.chars().take(64).map(plain).collect()
}

fn stamp_of(file: &PathBuf) -> Stamp {
    let about = std::fs::metadata(file).ok()?;
    Some((about.len(), about.modified().ok()?))
}

impl Configure for Policy {
    const NAME: &'static str = "policy";
    const ON_FAILURE: OnFailure = OnFailure::Closed;
    type Config = Option<PolicyConfig>;

    fn configure(
        config: Self::Config,
        build: &Build<'_>,
    ) -> std::result::Result<Self, ConfigError> {
        let config = config.unwrap_or_default();
        let tokenizers = config
            .context
            .iter()
            .flat_map(|context| context.tokenizers.values());
        let files = tokenizers
            .map(|file| {
                let file = build.base.join(file);
                let stamp = stamp_of(&file);
                (file, stamp)
            })
            .collect();
        let mut names = HashSet::new();
        let mut prompt = Vec::with_capacity(config.prompt.len());
        for (at, rule) in config.prompt.into_iter().enumerate() {
            prompt.push(prompt_rule(at, rule, &mut names)?);
        }
        let mut list = Vec::with_capacity(config.output.len());
        for (at, rule) in config.output.into_iter().enumerate() {
            list.push(output_rule(at, rule, &mut names)?);
        }
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Ok(Self {
            work: Arc::new(Work {
                parameters: Parameters::new(config.parameters)?,
                media: Media::new(config.media)?,
                prompt,
                time_budget: config.time_budget.get(),
                context: match config.context {
                    Some(context) => Some(Context::new(context, build.base)?),
                    None => None,
                },
                hits: Hits(Some(Arc::clone(&build.resources.metrics))),
            }),
            output: Rules {
                list,
                window: usize::try_from(config.window.0).unwrap_or(usize::MAX),
            },
            files,
            threads: Arc::new(Semaphore::new(threads)),
        })
    }
}

type Expressions = Option<Vec<Expression>>;

fn prompt_rule(
    at: usize,
    config: PromptConfig,
    names: &mut HashSet<String>,
) -> std::result::Result<PromptRule, ConfigError> {
    let path = format!("prompt[{at}]");
    let name = name_of(config.name, || format!("prompt-{}", at + 1), &path, names)?;
    let looks = [&config.deny, &config.replace, &config.mask];
    let is_one = looks.into_iter().flatten().count() + config.prepend.iter().count() == 1;
    if !is_one {
        let message = "expected one of deny, replace, mask, prepend";
        return Err(wrong(&path, message));
    }
    if let Some(text) = config.prepend {
        return Ok(PromptRule::Prepend { name, text });
    }
    let status = StatusCode::from_u16(config.status)
        .ok()
        .filter(|status| matches!(status.as_u16(), 400 | 403))
        .ok_or_else(|| wrong(&format!("{path}.status"), "expected 400 or 403"))?;
    let rule = rule(
        name,
        &path,
        config.deny,
        config.replace,
        config.mask,
        config.with,
    )?;
    let by_default = || match rule.action {
        Action::Deny => Role::ALL.to_vec(),
        _ => vec![Role::System, Role::User],
    };
    let roles = config.roles.unwrap_or_else(by_default);
    if rule.action != Action::Deny && roles.contains(&Role::Definitions) {
        let message = "expected system, user, assistant or tool: definitions can only be denied";
        return Err(wrong(&format!("{path}.roles"), message));
    }
    Ok(PromptRule::Texts {
        rule: Box::new(rule),
        roles,
        refusal: Refusal {
            status,
            code: config.code,
            message: config.message,
        },
    })
}

fn output_rule(
    at: usize,
    config: OutputConfig,
    names: &mut HashSet<String>,
) -> std::result::Result<(Rule, Vec<Part>), ConfigError> {
    let path = format!("output[{at}]");
    let name = name_of(config.name, || format!("output-{}", at + 1), &path, names)?;
    let looks = [&config.deny, &config.replace, &config.mask];
    if looks.into_iter().flatten().count() != 1 {
        return Err(wrong(&path, "expected one of deny, replace, mask"));
    }
    if config.deny.is_none() && config.texts.contains(&Part::Tools) {
        let message = "expected answer or reasoning: the arguments of tools can only be denied, \
                       since what is put into them may be no JSON";
        return Err(wrong(&format!("{path}.texts"), message));
    }
    let rule = rule(
        name,
        &path,
        config.deny,
        config.replace,
        config.mask,
        config.with,
    )?;
    Ok((rule, config.texts))
}

/// Makes the rule of the one list of expressions that is there.
fn rule(
    name: String,
    path: &str,
    deny: Expressions,
    replace: Expressions,
    mask: Expressions,
    with: String,
) -> std::result::Result<Rule, ConfigError> {
    let (key, list, action) = match (deny, replace, mask) {
        (Some(list), _, _) => ("deny", list, Action::Deny),
        (_, Some(list), _) => ("replace", list, Action::Replace(with)),
        (_, _, list) => ("mask", list.unwrap_or_default(), Action::Mask),
    };
    let patterns: Vec<String> = list.into_iter().map(|Expression(text)| text).collect();
    let matcher = Matcher::new(&patterns).map_err(|why| {
        wrong(
            &format!("{path}.{key}"),
            &format!("expected fewer or smaller expressions, found {why}"),
        )
    })?;
    Ok(Rule {
        name,
        action,
        matcher,
    })
}

fn name_of(
    given: Option<String>,
    default: impl FnOnce() -> String,
    path: &str,
    names: &mut HashSet<String>,
) -> std::result::Result<String, ConfigError> {
    let name = given.unwrap_or_else(default);
    if !names.insert(name.clone()) {
        let message = format!("expected a name of its own, found {name:?} a second time");
        return Err(wrong(&format!("{path}.name"), &message));
    }
    Ok(name)
}

fn wrong(path: &str, message: &str) -> ConfigError {
    ConfigError {
        path: format!("policy.{path}"),
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests;
