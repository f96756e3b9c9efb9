//! The integration tests: the real binary, real sockets, simulated upstreams.
//!
//! One module per behaviour. Start at [`support`]: [`support::Gateway`] runs the
//! binary, `forebay::sim::Sim` is an upstream that misbehaves on request,
//! [`support::http`] is a client that can send what no library would.

#![expect(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test that panics is a test that fails, and says so"
)]

mod support;

mod alert;
mod auth;
mod bad_input;
mod breaker;
mod budget;
mod cache_salt;
mod capture;
mod chaos;
mod cli;
mod config_files;
mod connections;
mod cooldown;
mod ctl;
mod edge;
mod endpoints;
mod failover;
mod floors;
mod frozen;
mod h2_abuse;
mod h2c;
mod health_checks;
mod hygiene;
mod leaving;
mod local;
mod observability;
mod ollama;
mod payloads_h1;
mod payloads_h2;
mod policy;
mod queue;
mod rate_limit;
mod reload;
mod research;
mod routing;
mod service;
mod slow_clients;
mod smoke;
mod smuggling;
mod stopping;
mod streaming;
mod takeover;
mod upgrade;
