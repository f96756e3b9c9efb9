//! The configuration: pure data, its defaults, and how a file becomes one.
//!
//! Start at [`Config`]: the struct that is read is the struct that is
//! documented, validated, printed and described by the JSON Schema. Its
//! `Default` impls *are* the defaults; `conf/forebay.yaml` shows every one of
//! them, and a test compares the two.
//!
//! - [`units`]: `30s`, `32MiB`
//! - [`plugin_entry`]: one line of a plugin list
//! - [`secret`]: `env:NAME`, `file:path`

pub mod plugin_entry;
pub mod secret;
pub mod units;

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use indexmap::IndexMap;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use plugin_entry::PluginEntry;
pub use secret::{Secret, SecretError, SecretRef};
pub use units::{Size, Time};

/// Everything that one YAML file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The address that clients connect to (HTTP/1.1 and h2c). Restart to change.
    #[schemars(extend("format" = "listen"))]
    pub listen: String,
    /// The admin listener: metrics, health, reload.
    pub admin: Admin,
    /// Worker threads of the data plane; 0 means one per core. Restart to change.
    #[schemars(range(max = 1024))]
    pub threads: usize,
    /// Bounds on what clients may send, and how long a request may take.
    pub limits: Limits,
    /// Networks whose `X-Forwarded-For` is believed, such as `10.0.0.0/8`.
    #[schemars(with = "Vec<String>", extend("format" = "cidrs"))]
    pub trusted_proxies: Vec<IpNet>,
    /// The log: what it looks like and where it goes.
    pub log: Log,
    /// The request filters, top to bottom on the way in, in reverse on the way out.
    #[schemars(extend("format" = "plugins"))]
    pub plugins: Vec<PluginEntry>,
    /// Groups of upstreams, by name.
    pub groups: IndexMap<String, Group>,
    /// Which groups serve which model; the first route that matches is taken.
    pub routes: Vec<Route>,
    /// Other names for models: what a client asks for → what is routed and sent.
    pub aliases: IndexMap<String, String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7070".to_owned(),
            admin: Admin::default(),
            threads: 0,
            limits: Limits::default(),
            trusted_proxies: Vec::new(),
            log: Log::default(),
            plugins: Vec::new(),
            groups: IndexMap::new(),
            routes: Vec::new(),
            aliases: IndexMap::new(),
        }
    }
}

/// The admin listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Its address. Restart to change.
    #[schemars(extend("format" = "listen"))]
    pub listen: String,
    /// The bearer token that every admin request must carry; required when the
    /// address is not loopback.
    pub key: Option<SecretRef>,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7071".to_owned(),
            key: None,
        }
    }
}

/// Bounds on one request and one connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The largest request body; 413 beyond it.
    #[schemars(extend("x-min" = "1KiB", "x-max" = "1GiB"))]
    pub body: Size,
    /// The largest request header, all fields together; 431 beyond it.
    #[schemars(extend("x-min" = "1KiB", "x-max" = "512KiB"))]
    pub header: Size,
    /// The most header fields; 431 beyond it.
    #[schemars(range(min = 10, max = 250))]
    pub header_fields: usize,
    /// The longest request target; 414 beyond it.
    #[schemars(extend("x-min" = "64B", "x-max" = "64KiB"))]
    pub uri: Size,
    /// The deepest nesting of a JSON body; 400 beyond it.
    #[schemars(range(min = 4, max = 120))]
    pub json_depth: usize,
    /// The time a client has for its whole request header.
    #[schemars(extend("x-min" = "100ms", "x-max" = "10m"))]
    pub header_timeout: Time,
    /// The time a client has for its whole request body; 408 beyond it.
    #[schemars(extend("x-min" = "100ms", "x-max" = "1h"))]
    pub body_timeout: Time,
    /// Tries per group; the fallback group always gets at least one.
    #[schemars(range(min = 1, max = 20))]
    pub attempts: u32,
    /// From the request to the first byte of the answer (to its end if it is
    /// not streamed).
    #[schemars(extend("x-min" = "100ms", "x-max" = "24h"))]
    pub total_timeout: Time,
    /// From the first byte of a streamed answer to its end.
    #[schemars(extend("x-min" = "100ms", "x-max" = "24h"))]
    pub stream_timeout: Time,
    /// How long a streaming client waits in silence before `: ping` comments begin.
    #[schemars(extend("x-min" = "100ms", "x-max" = "10m"))]
    pub heartbeat: Time,
    /// How long nothing of an answer may be writable to a client that does not read.
    #[schemars(extend("x-min" = "100ms", "x-max" = "1h"))]
    pub write_timeout: Time,
    /// How long an idle client connection is kept.
    #[schemars(extend("x-min" = "1s", "x-max" = "1h"))]
    pub keep_alive: Time,
    /// Requests per client connection before it is closed in good order.
    #[schemars(range(min = 1, max = 4_000_000))]
    pub keep_alive_requests: u32,
    /// The largest single event of a streamed answer; beyond it the stream ends
    /// with an error event.
    #[schemars(extend("x-min" = "4KiB", "x-max" = "64MiB"))]
    pub event: Size,
    /// The largest answer that is not streamed; 502 beyond it.
    #[schemars(extend("x-min" = "64KiB", "x-max" = "1GiB"))]
    pub answer: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: Size::mib(32),
            header: Size::kib(32),
            header_fields: 100,
            uri: Size::kib(8),
            json_depth: 64,
            header_timeout: Time::secs(10),
            body_timeout: Time::secs(60),
            attempts: 3,
            total_timeout: Time::secs(600),
            stream_timeout: Time::secs(1800),
            heartbeat: Time::secs(15),
            write_timeout: Time::secs(60),
            keep_alive: Time::secs(75),
            keep_alive_requests: 1000,
            event: Size::mib(1),
            answer: Size::mib(64),
        }
    }
}

/// The log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The least severe level that is written.
    pub level: LogLevel,
    /// How a line looks. Restart to change.
    pub format: LogFormat,
    /// A file that gets the lines too, beside standard error. Restart to change.
    pub file: Option<PathBuf>,
    /// The size at which the file is rotated.
    #[schemars(extend("x-min" = "4KiB", "x-max" = "10GiB"))]
    pub rotate_size: Size,
    /// How many rotated files are kept beside the current one.
    #[schemars(range(min = 1, max = 1000))]
    pub rotate_keep: u32,
    /// One line per request.
    pub access: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: LogLevel::Info,
            format: LogFormat::Text,
            file: None,
            rotate_size: Size(10_000_000),
            rotate_keep: 5,
            access: true,
        }
    }
}

/// A level of the log; `error` is the quietest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Someone should act.
    Error,
    /// It was coped with.
    Warn,
    /// State changed.
    Info,
    /// One request.
    Debug,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Upstreams that can stand in for each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
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
    /// The models it serves, as patterns; empty means any that is routed to it.
    #[schemars(extend("format" = "patterns"))]
    pub models: Vec<String>,
    /// Whether streams are asked for their usage (`stream_options.include_usage`).
    pub include_usage: bool,
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
            url: String::new(),
            key: None,
            optional: false,
            headers: IndexMap::new(),
            weight: 1,
            concurrent: None,
            max_tokens: None,
            models: Vec::new(),
            include_usage: true,
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

/// How an upstream's certificate is checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Whether it is checked at all; `false` is warned about at every start.
    pub verify: bool,
    /// A PEM file of the authorities to trust instead of the system's.
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

/// Which groups serve a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["model"]))]
pub struct Route {
    /// A model's name, or a pattern in which `*` stands for anything.
    #[schemars(extend("format" = "pattern"))]
    pub model: String,
    /// The groups, in the order in which they are tried.
    pub groups: Vec<String>,
    /// The group that is tried last, and at least once.
    pub fallback: Option<String>,
    /// What the model is called in a group: group → model.
    pub rewrite: IndexMap<String, String>,
    /// Whether only groups marked `local` may serve it.
    pub local: bool,
    /// Its own list of plugins, in place of the general one.
    #[schemars(extend("format" = "plugins"))]
    pub plugins: Option<Vec<PluginEntry>>,
}

/// Parses an address to listen on; `localhost` is not one.
pub fn listen_address(text: &str) -> Option<SocketAddr> {
    text.parse().ok()
}
