//! Forebay: a self-hosted AI inference gateway. One binary in front of model
//! servers; clients speak OpenAI's API to it.
//!
//! This page is the map. Read it, then [`plugins`] for the model plugin
//! (`plugins/auth`), `upstreams/strategies/least_connections.rs` for the model
//! strategy, and [`proxy`] for the data path.
//!
//! # Words
//! *downstream* the client's side; *upstream* a model server; *group* a named
//! list of upstreams with a strategy; *route* a model name or pattern → ordered
//! groups, the last often the *fallback*; *attempt* one try at one upstream;
//! *exchange* one client request with all its attempts and its answer; *plugin*
//! a request filter; *snapshot* one configuration, fully built; *principal* who
//! is calling.
//!
//! # Floors
//! Imports go down only (`tests/it/floors.rs` checks it):
//!
//! | floor | modules | what they are |
//! |---|---|---|
//! | 5 | `main`, [`cli`], `ctl`, `demo`, `export`, [`server`] | assemble the process |
//! | 4 | [`proxy`], [`admin`], [`reload`], [`sim`] | the edges; they do not import each other |
//! | 3 | [`gateway`], [`routes`], [`status`] | assembly: the only readers of the lists |
//! | 2 | [`plugins`], [`upstreams`], [`dialects`] | the extension points; siblings do not import each other |
//! | 1 | [`context`], [`events`], [`lifecycle`], [`outbound`], [`resources`], [`store`], [`worker`] | one request; what changed; whether the process serves or stops; calls to servers that are no upstreams; what outlives a snapshot; work beside the requests; what must survive the process |
//! | 0 | [`error`], [`metrics`], [`config`], [`openai`], [`sharegpt`], [`client_ip`], [`pattern`], [`logging`], `memory`, [`service_manager`], `open_files` | plain data and pure functions |
//!
//! # Life of a request
//! 1. `proxy/edge`: the whole header within its deadline, HTTP/1.1 or h2c.
//! 2. `proxy/head`, `proxy/calls`: sizes, `Host`, the exact allowlist of paths.
//!    Local answers (`/health`, `/v1/models`, …) end here.
//! 3. Plugins' `on_headers`: strangers are turned away before a body is read.
//! 4. `proxy/body`: size, deadline, `Expect`; [`openai::ApiRequest`] checks it in
//!    one pass and keeps its bytes. Plugins' `on_parsed`, then `on_request`.
//! 5. [`routes`] gives the plan: groups in order.
//! 6. `proxy/exchange` makes the attempts: choose an upstream and a slot,
//!    connect, send, wait for the header, judge. All of it while the client is
//!    watched, and kept patient by comments if it streams.
//! 7. The commit: a whole answer (`proxy/answer`), or the first meaningful event
//!    of a stream (`proxy/relay`). Before it another upstream may be tried;
//!    after it another may only go on with a stream (`proxy/takeover`). Plugins
//!    see an answer from here on: those that edit it, then those that watch.
//! 8. `proxy/record`: metrics, the access line, plugins' `on_finish`; once.
//!
//! # Life of a configuration
//! [`reload`] sees other bytes (or SIGHUP, or `POST /reload`) → [`config::load()`]
//! reports every problem with line and path → [`gateway::Snapshot::build`] takes
//! over what has not changed → one atomic swap. Any failure leaves the live
//! snapshot in place; requests finish on the one they began with.
//!
//! # Life of the process
//! [`lifecycle`] has its stages: serving → lame duck → draining → ending; `server`
//! goes from one to the next, by signals and by what is still under way, and
//! Pingora's own shutdown is the very last of it. An upgrade (`server/successor`,
//! `server/predecessor`) starts the program anew, hands it the listening sockets when
//! it has built everything, and drains when it serves.
//!
//! # Extension points
//! A plugin is a file in `plugins/` and a line in [`plugins::PLUGINS`]; a
//! strategy is a file in `upstreams/strategies/` and a line in
//! [`upstreams::STRATEGIES`]; a dialect, what an upstream is spoken to in, is a
//! file in `dialects/` and a line in [`dialects::DIALECTS`]. The lists are `const`, so `grep` finds everything
//! there is.
//!
//! # Decisions
//! - The exchange is ours, inside Pingora's `request_filter`: its stock loop
//!   cannot replay a body over 64 KiB, write to a client before an upstream
//!   answers, or fail over by what an answer says. Listeners, HTTP on the
//!   client's side, TLS, pool and parsing of answers are Pingora's.
//! - Answers that are not streamed are read whole before the client sees any of
//!   it: an upstream that dies in the middle costs nothing but time.
//! - Bodies are checked, never re-serialised: edits are spliced into the bytes
//!   that came.
//! - The identity of an upstream is its name: many accounts of one cloud share
//!   one host.
//! - `Error` holds what a client is told apart from what the log is told.

pub mod admin;
pub mod cli;
pub mod client_ip;
pub mod config;
pub mod context;
mod ctl;
mod demo;
pub mod dialects;
pub mod error;
pub mod events;
mod export;
pub mod gateway;
pub mod lifecycle;
pub mod logging;
mod memory;
pub mod metrics;
mod open_files;
pub mod openai;
pub mod outbound;
pub mod pattern;
pub mod plugins;
pub mod proxy;
pub mod reload;
pub mod resources;
pub mod routes;
pub mod server;
pub mod service_manager;
pub mod sharegpt;
pub mod sim;
pub mod status;
pub mod store;
pub mod upstreams;
pub mod worker;
