//! Forebay: a self-hosted AI inference gateway. This page is the map.

pub mod admin;
pub mod cli;
pub mod client_ip;
pub mod config;
pub mod context;
mod demo;
pub mod error;
pub mod gateway;
pub mod logging;
pub mod metrics;
pub mod openai;
pub mod plugins;
pub mod proxy;
pub mod reload;
pub mod resources;
pub mod routes;
pub mod server;
pub mod sim;
pub mod status;
pub mod upstreams;
