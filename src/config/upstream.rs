//! `groups`: the groups, their upstreams, and what is special about each kind.

use std::{fmt, path::PathBuf, time::Duration};

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Breaker, Check, Queue, Retries, SecretRef, Share, Time};

/// Upstreams that can stand in for each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["upstreams"]))]
pub struct Group {
    /// Whether its upstreams are on premises. An exchange that is restricted to
    /// local groups never leaves them.
    pub local: bool,
    /// How one of the upstreams is chosen.
    #[schemars(extend("format" = "strategy"))]
    pub strategy: String,
    /// Whether a try that may have been billed (a reset, 500, 502, 504, no
    /// answer in time) is followed by one more elsewhere.
    pub retry_ambiguous: bool,
    /// How often the same upstream is asked again, after a backoff, before the
    /// next one is.
    #[schemars(range(max = 10))]
    pub same_upstream_retries: u32,
    /// The line of those who wait for a free upstream.
    pub queue: Queue,
    /// How long a request waits in this line before it goes on to the next group
    /// of its route; in the last one it waits as long as `queue` says.
    #[schemars(extend("x-min" = "1ms", "x-max" = "1h"))]
    pub spill_after: Time,
    /// Whether a streamed answer whose upstream of this group died is gone on
    /// with by another upstream.
    pub takeover: bool,
    /// How much of the traffic may be tries after the first.
    pub retries: Retries,
    /// When failures stop the traffic to an upstream.
    pub breaker: Breaker,
    /// The most of the upstreams that breakers may take out; one always may go,
    /// and one that answers nothing at all goes in any case.
    #[schemars(extend("x-min" = "0%", "x-max" = "100%"))]
    pub eject_max: Share,
    /// How upstreams are asked whether they are well.
    pub check: Check,
    /// The longest pause of an upstream whose rate limit is reached and that
    /// does not say when to come back.
    #[schemars(extend("x-min" = "1s", "x-max" = "24h"))]
    pub cooldown: Time,
    /// How long an upstream that comes back takes to reach its full share; `0s`
    /// switches it off.
    #[schemars(extend("x-min" = "0s", "x-max" = "1h"))]
    pub slow_start: Time,
    /// The upstreams; never empty.
    #[schemars(length(min = 1, max = 1000))]
    pub upstreams: Vec<Upstream>,
}

impl Default for Group {
    fn default() -> Self {
        Self {
            local: false,
            strategy: "round_robin".to_owned(),
            retry_ambiguous: true,
            same_upstream_retries: 0,
            queue: Queue::default(),
            spill_after: Time::secs(2),
            takeover: true,
            retries: Retries::default(),
            breaker: Breaker::default(),
            eject_max: Share(50),
            check: Check::default(),
            cooldown: Time::secs(30 * 60),
            slow_start: Time::secs(10),
            upstreams: Vec::new(),
        }
    }
}

/// One model server, or one account of a cloud.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["name", "url"]))]
pub struct Upstream {
    /// Its identity, unique in the whole file.
    #[schemars(extend("format" = "name"))]
    pub name: String,
    /// What it is; decides the defaults of [`Timeouts`].
    pub kind: Kind,
    /// What it is spoken to in.
    pub dialect: Dialect,
    /// Its base URL with any path prefix; `/chat/completions` and the like are
    /// appended to it.
    #[schemars(extend("format" = "base_url"))]
    pub url: String,
    /// Its credential, sent as `Authorization: Bearer …`.
    pub key: Option<SecretRef>,
    /// With `true`, an unset `env:` secret switches the upstream off with a
    /// warning instead of being an error.
    pub optional: bool,
    /// Further request headers; a value may be a literal or a secret's reference.
    #[schemars(extend("format" = "headers"))]
    pub headers: IndexMap<String, String>,
    /// Its share of the traffic, relative to the others of its group.
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u32,
    /// The most requests it works on at once; absent means no bound.
    #[schemars(range(min = 1, max = 100_000))]
    pub concurrent: Option<u32>,
    /// The most tokens a request may ask of it; larger and absent wishes are
    /// lowered to this.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_tokens: Option<u64>,
    /// Of `dialect: ollama`: the largest context, in tokens, that it is asked
    /// for; the size follows the prompt, in powers of two.
    #[schemars(range(min = 2048, max = 1_048_576))]
    pub num_ctx: Option<u32>,
    /// Of `dialect: ollama`: the CPU threads that it computes with; absent means
    /// that it decides.
    #[schemars(range(min = 1, max = 1024))]
    pub num_thread: Option<u32>,
    /// Of `dialect: ollama`: how long a model stays loaded after its last
    /// request; absent means that it decides (5 minutes, mostly).
    pub keep_alive: Option<KeepAlive>,
    /// The models it serves, as patterns; empty means any that is routed to it.
    #[schemars(extend("format" = "patterns"))]
    pub models: Vec<String>,
    /// Whether streams are asked for their usage (`stream_options.include_usage`).
    pub include_usage: bool,
    /// Whether it can go on with an answer that another upstream began
    /// (`continue_final_message`); absent means by its kind, or as it proves.
    pub r#continue: Option<bool>,
    /// Whether it gets nothing new: what is under way ends as usual.
    pub drain: bool,
    /// Its own breaker, in place of the group's.
    pub breaker: Option<Breaker>,
    /// Its own check, in place of the group's.
    pub check: Option<Check>,
    /// Its own longest pause, in place of the group's.
    #[schemars(extend("x-min" = "1s", "x-max" = "24h"))]
    pub cooldown: Option<Time>,
    /// Its own slow start, in place of the group's.
    #[schemars(extend("x-min" = "0s", "x-max" = "1h"))]
    pub slow_start: Option<Time>,
    /// How its certificate is checked.
    pub tls: Tls,
    /// How long each step may take.
    pub timeouts: Timeouts,
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            name: String::new(),
            kind: Kind::Generic,
            dialect: Dialect::Openai,
            url: String::new(),
            key: None,
            optional: false,
            headers: IndexMap::new(),
            weight: 1,
            concurrent: None,
            max_tokens: None,
            num_ctx: None,
            num_thread: None,
            keep_alive: None,
            models: Vec::new(),
            include_usage: true,
            r#continue: None,
            drain: false,
            breaker: None,
            check: None,
            cooldown: None,
            slow_start: None,
            tls: Tls::default(),
            timeouts: Timeouts::default(),
        }
    }
}

/// What a model server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// vLLM (and SGLang): uvicorn, which closes idle connections after 5 s.
    Vllm,
    /// llama.cpp's server, which closes idle connections after 5 s.
    Llamacpp,
    /// Ollama, which may load a model before it answers.
    Ollama,
    /// OpenAI itself, or a cloud that speaks like it.
    Openai,
    /// Anything else that speaks OpenAI's API.
    Generic,
}

impl Kind {
    /// Returns the timeouts that apply where the YAML names none.
    ///
    /// An idle connection is given up before the server gives it up: a request
    /// on a connection that is just being closed would be lost. uvicorn and
    /// llama.cpp close after 5 s.
    pub const fn timeouts(self) -> ResolvedTimeouts {
        let (connect, first_token, idle) = match self {
            Self::Vllm | Self::Llamacpp => (2, 120, 4),
            Self::Ollama => (2, 300, 60),
            Self::Openai => (5, 60, 60),
            Self::Generic => (5, 120, 4),
        };
        ResolvedTimeouts {
            connect: Duration::from_secs(connect),
            first_token: Duration::from_secs(first_token),
            inter_token: Duration::from_secs(60),
            write: Duration::from_secs(30),
            idle: Duration::from_secs(idle),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vllm => "vllm",
            Self::Llamacpp => "llamacpp",
            Self::Ollama => "ollama",
            Self::Openai => "openai",
            Self::Generic => "generic",
        })
    }
}

/// What an upstream is spoken to in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// OpenAI's API: nearly everybody's.
    #[default]
    Openai,
    /// Ollama's own API (`/api/chat`), which alone has a say in the size of the
    /// context.
    Ollama,
}

/// How long Ollama keeps a model loaded after its last request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum KeepAlive {
    /// This long: `30m`.
    For(#[schemars(extend("x-min" = "1s", "x-max" = "23h59m"))] Time),
    /// `-1`: for ever; `0`: not at all.
    Forever(#[schemars(range(min = -1, max = 0))] i8),
}

impl KeepAlive {
    /// What Ollama does unless it is told otherwise.
    pub const DEFAULT: Duration = Duration::from_secs(300);

    /// Returns how long; `None` for ever.
    pub fn time(self) -> Option<Duration> {
        match self {
            Self::For(time) => Some(time.get()),
            Self::Forever(..0) => None,
            Self::Forever(_) => Some(Duration::ZERO),
        }
    }
}

/// How an upstream's certificate is checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Whether it is checked at all; `false` is warned about at every start.
    pub verify: bool,
    /// A PEM file of the authorities to trust instead of the system's; a
    /// relative path is relative to the configuration file.
    #[schemars(extend("minLength" = 1))]
    pub ca: Option<PathBuf>,
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            verify: true,
            ca: None,
        }
    }
}

/// How long each step with an upstream may take; what is absent has the default
/// of the upstream's [`Kind`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// Connecting, TLS included.
    #[schemars(extend("x-min" = "1ms", "x-max" = "5m"))]
    pub connect: Option<Time>,
    /// From the request's last byte to the first token (or to the header, if it
    /// is not streamed).
    #[schemars(extend("x-min" = "1ms", "x-max" = "2h"))]
    pub first_token: Option<Time>,
    /// Between two tokens.
    #[schemars(extend("x-min" = "1ms", "x-max" = "2h"))]
    pub inter_token: Option<Time>,
    /// Until the upstream has taken a piece of the request.
    #[schemars(extend("x-min" = "1ms", "x-max" = "1h"))]
    pub write: Option<Time>,
    /// How long an unused connection is kept; must be below what the server does.
    #[schemars(extend("x-min" = "1ms", "x-max" = "1h"))]
    pub idle: Option<Time>,
}

/// [`Timeouts`] with nothing left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolvedTimeouts {
    /// Connecting, TLS included.
    pub connect: Duration,
    /// From the request's last byte to the first token.
    pub first_token: Duration,
    /// Between two tokens.
    pub inter_token: Duration,
    /// Until the upstream has taken a piece of the request.
    pub write: Duration,
    /// How long an unused connection is kept.
    pub idle: Duration,
}

impl Upstream {
    /// The largest context that an Ollama is asked for unless the YAML says
    /// more or less: enough for a long conversation, and a few GiB on a model
    /// that fits a machine without a GPU.
    const NUM_CTX: u32 = 32_768;

    /// Fills in what follows from `dialect: ollama` where the YAML says nothing:
    /// its kind, one request at a time (Ollama answers one after the other and
    /// lets the rest wait for as long as they like), a bound on the context.
    pub(super) fn fill_in(&mut self) {
        if self.dialect != Dialect::Ollama {
            return;
        }
        if self.kind == Kind::Generic {
            self.kind = Kind::Ollama;
        }
        self.concurrent.get_or_insert(1);
        self.num_ctx.get_or_insert(Self::NUM_CTX);
    }

    /// Returns its timeouts, what is not written taken from its kind.
    pub fn resolved_timeouts(&self) -> ResolvedTimeouts {
        let default = self.kind.timeouts();
        let or = |set: Option<Time>, default| set.map_or(default, Time::get);
        ResolvedTimeouts {
            connect: or(self.timeouts.connect, default.connect),
            first_token: or(self.timeouts.first_token, default.first_token),
            inter_token: or(self.timeouts.inter_token, default.inter_token),
            write: or(self.timeouts.write, default.write),
            idle: or(self.timeouts.idle, default.idle),
        }
    }
}
