//! The configuration: pure data, its defaults, and how a file becomes one.
//!
//! Start at [`Config`]: the struct that is read is the struct that is
//! documented, validated, printed and described by the JSON Schema. Its
//! `Default` impls *are* the defaults; `conf/forebay.yaml` shows every one of
//! them, and a test compares the two.
//!
//! What can be written:
//! - [`limits`], [`shutdown`], [`upgrade`], [`log`], [`upstream`], [`resilience`], [`route`]: the parts of
//!   [`Config`]
//! - [`units`], [`amounts`]: `30s`, `32MiB`, `20%`; `200k`, `60/min`, `2.50`
//! - [`plugin_entry`]: one line of a plugin list
//! - [`secret`]: `env:NAME`, `file:path`, `credential:NAME`
//!
//! How a file is read ([`load()`]), so that every problem is told at once and
//! with its line, where serde would stop at the first and know no lines:
//! 1. `yaml`: text → a tree whose nodes know their place (`marked`)
//! 2. `check`: the tree against the [`schema()`]; what is wrong is told and taken out
//! 3. serde: what is left → [`Config`]
//! 4. `validate`: does it make sense as a whole?
//! 5. `resolve`: the secrets are read, upstreams without theirs switched off
//!
//! [`effective`] shows the result with every default filled in.

pub mod amounts;
pub mod budget;
mod check;
pub(crate) mod file;
mod formats;
mod keywords;
pub mod limits;
pub mod load;
pub mod log;
pub(crate) mod marked;
mod places;
pub mod plugin_entry;
pub mod print;
pub mod problem;
pub mod queue;
pub mod resilience;
mod resolve;
pub mod route;
pub mod schema;
pub mod secret;
pub mod shutdown;
mod special;
#[cfg(test)]
mod tests;
pub mod units;
pub mod upgrade;
pub mod upstream;
mod validate;
pub(crate) mod yaml;

use std::net::SocketAddr;

use indexmap::IndexMap;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use amounts::{Count, Money, Per, Rate};
pub use budget::{Allowance, Budget, KeyLimits};
pub use limits::Limits;
pub use load::{BUILT_IN, Loaded, admin_of, built_in, load, parse};
pub use log::{Log, LogFormat, LogLevel};
pub use plugin_entry::PluginEntry;
pub use print::effective;
pub use problem::{Problem, Problems};
pub use queue::{Queue, ResolvedQueue};
pub use resilience::{Breaker, Check, Retries};
pub use route::Route;
pub use schema::{Catalog, schema};
pub use secret::{Secret, SecretError, SecretRef};
pub use shutdown::Shutdown;
pub use units::{Share, Size, Time};
pub use upgrade::Upgrade;
pub use upstream::{Dialect, Group, KeepAlive, Kind, ResolvedTimeouts, Timeouts, Tls, Upstream};

/// Everything that one YAML file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(extend("required" = ["groups", "routes"]))]
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
    /// How the process stops.
    pub shutdown: Shutdown,
    /// How another process takes its place.
    pub upgrade: Upgrade,
    /// Networks whose `X-Forwarded-For` is believed, such as `10.0.0.0/8`.
    #[schemars(with = "Vec<String>", extend("format" = "cidrs"))]
    pub trusted_proxies: Vec<IpNet>,
    /// Where is kept what must survive the process, such as what was used of
    /// budgets: `sqlite:FILE`, relative to this file. Restart to change.
    #[schemars(extend("format" = "store"))]
    pub store: Option<String>,
    /// The log: what it looks like and where it goes.
    pub log: Log,
    /// The request filters, top to bottom on the way in, in reverse on the way out.
    #[schemars(extend("format" = "plugins"))]
    pub plugins: Vec<PluginEntry>,
    /// Groups of upstreams, by name; never empty.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 1000, "propertyNames" = {"format": "name"}))]
    pub groups: IndexMap<String, Group>,
    /// Which groups serve which model; the first route that matches is taken.
    #[schemars(length(min = 1, max = 1000))]
    pub routes: Vec<Route>,
    /// Other names for models: what a client asks for → what is routed and sent.
    #[schemars(extend(
        "maxProperties" = 10_000,
        "propertyNames" = {"format": "model"},
        "additionalProperties" = {"type": "string", "format": "model"}
    ))]
    pub aliases: IndexMap<String, String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7070".to_owned(),
            admin: Admin::default(),
            threads: 0,
            limits: Limits::default(),
            shutdown: Shutdown::default(),
            upgrade: Upgrade::default(),
            trusted_proxies: Vec::new(),
            store: None,
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

/// Parses an address to listen on; `localhost` is not one.
pub fn listen_address(text: &str) -> Option<SocketAddr> {
    text.parse().ok()
}
