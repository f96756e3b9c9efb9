//! `limits`: what clients may send, and how long things may take.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Share, Size, Time};

/// Bounds on one request, one connection, and all of them together.
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
    /// The most answers to one request (`n`); 400 beyond it.
    #[schemars(range(min = 1, max = 128))]
    pub n: u32,
    /// The time a client has for its whole request header, from its first byte
    /// (on a new connection: from the connection) to its last.
    #[schemars(extend("x-min" = "100ms", "x-max" = "10m"))]
    pub header_timeout: Time,
    /// The time a client has for its whole request body; 408 beyond it.
    #[schemars(extend("x-min" = "100ms", "x-max" = "1h"))]
    pub body_timeout: Time,
    /// The least bytes per second of a request body, counted once it has taken
    /// longer than `header_timeout`; 408 below it.
    #[schemars(extend("x-min" = "1B", "x-max" = "1GiB"))]
    pub body_rate: Size,
    /// The most bytes of requests in memory, all together: their bodies, what is
    /// made of them for an Ollama, answers that are read whole, and texts kept
    /// for takeover; 503 beyond it.
    #[schemars(extend("x-min" = "1MiB", "x-max" = "1TiB"))]
    pub bodies: Size,
    /// The most memory that the process is to take, if that is less than what the
    /// system's control group allows it; without either nothing is watched.
    #[schemars(extend("x-min" = "16MiB", "x-max" = "64TiB"))]
    pub memory: Option<Size>,
    /// From which share of that on connections are closed behind their answer.
    pub memory_tight: Share,
    /// From which share of it on new requests get 503.
    pub memory_full: Share,
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
    /// The most client connections at once. Beyond it the one that has been idle
    /// the longest is closed; if none is, 503. Never more than half of the files
    /// that the process may open.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections: usize,
    /// The most connections from one address (of IPv6: one /64 network), those
    /// in `trusted_proxies` excepted. Beyond it as for all.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections_per_ip: usize,
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
    /// How often one streamed answer is taken over by another upstream; 0 is
    /// never.
    #[schemars(range(max = 100))]
    pub takeovers: u32,
    /// The most text of a streamed answer that is remembered for a takeover;
    /// a longer one cannot be taken over.
    #[schemars(extend("x-min" = "1KiB", "x-max" = "64MiB"))]
    pub takeover_text: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: Size::mib(32),
            header: Size::kib(32),
            header_fields: 100,
            uri: Size::kib(8),
            json_depth: 64,
            n: 8,
            header_timeout: Time::secs(10),
            body_timeout: Time::secs(60),
            body_rate: Size::kib(1),
            bodies: Size::mib(512),
            memory: None,
            memory_tight: Share(92),
            memory_full: Share(95),
            attempts: 3,
            total_timeout: Time::secs(600),
            stream_timeout: Time::secs(1800),
            heartbeat: Time::secs(15),
            write_timeout: Time::secs(60),
            connections: 10_000,
            connections_per_ip: 256,
            keep_alive: Time::secs(75),
            keep_alive_requests: 1000,
            event: Size::mib(1),
            answer: Size::mib(64),
            takeovers: 5,
            takeover_text: Size::mib(1),
        }
    }
}
