//! The end of a request: its metrics, its access line, its plugins' last hook.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use super::serve::{Done, Live};
use crate::{
    context::Ending,
    error::Error,
    gateway::Gateway,
    logging::{AccessLine, write_access},
    metrics::Metrics,
};

/// More tokens than any model takes or makes: an upstream that claims more is
/// broken, and must not spoil the counters.
const TOKENS_MAX: u64 = 100_000_000;

/// Records a request that ended. Called once per request.
pub(super) async fn write(gateway: &Gateway, live: Live) {
    let Live {
        mut ctx,
        snapshot: _snapshot,
        chain,
        call,
        bytes_in,
        body: _body,
        done,
    } = live;
    let done = done.unwrap_or_else(|| Done::left(0));
    let outcome = done.ended.outcome(&ctx, done.bytes_out);
    if let Some(chain) = chain {
        chain.on_finish(&mut ctx, &outcome).await;
    }
    let metrics = &gateway.resources.metrics;
    let status = outcome.status.to_string();
    let route = &*ctx.route;
    metrics
        .requests
        .with_label_values(&[call, route, &status, outcome.ending.as_str()])
        .inc();
    metrics
        .total
        .with_label_values(&[call])
        .observe(outcome.total.as_secs_f64());
    // An upstream's own code may be anything: it must not become a label.
    let code = match &outcome.error {
        Some(Cow::Borrowed(ours)) => Some(*ours),
        Some(Cow::Owned(_)) => Some("from_upstream"),
        None => None,
    };
    if let Some(code) = code {
        metrics.errors.with_label_values(&[code]).inc();
    }
    if outcome.ending == Ending::ClientClosed {
        metrics.client_closed.inc();
    }
    let direction = |name| metrics.body_bytes.with_label_values(&[name]);
    direction("in").inc_by(bytes_in as u64);
    direction("out").inc_by(outcome.bytes_out);
    let last = ctx.attempts.last();
    let upstream = last.map_or("", |attempt| &*attempt.upstream);
    if let Some(first_token) = outcome.first_token {
        metrics
            .first_token
            .with_label_values(&[route, upstream])
            .observe(first_token.as_secs_f64());
    }
    if let Some(usage) = &outcome.usage {
        let tokens = |name| metrics.tokens.with_label_values(&[route, upstream, name]);
        tokens("in").inc_by(usage.prompt_tokens.min(TOKENS_MAX));
        tokens("out").inc_by(usage.completion_tokens.min(TOKENS_MAX));
    }
    write_access(&AccessLine {
        request_id: &ctx.id,
        client: ctx.client_ip,
        caller: ctx.caller(),
        method: ctx.method.as_str(),
        path: &ctx.path,
        status: outcome.status,
        ending: outcome.ending.as_str(),
        model: ctx.request.as_ref().map(|request| request.model.as_str()),
        route: Some(route).filter(|route| !route.is_empty()),
        group: last.map(|attempt| &*attempt.group),
        upstream: last.map(|attempt| &*attempt.upstream),
        attempts: ctx.attempts.len(),
        fallback: last.is_some_and(|attempt| attempt.fallback),
        takeovers: ctx.takeovers,
        streamed: outcome.streamed,
        bytes_in: bytes_in as u64,
        bytes_out: outcome.bytes_out,
        queued: ctx.queued,
        first_token: outcome.first_token,
        total: outcome.total,
        tokens_in: outcome.usage.as_ref().map(|usage| usage.prompt_tokens),
        tokens_out: outcome.usage.as_ref().map(|usage| usage.completion_tokens),
        error: outcome.error.as_deref(),
    });
}

/// A request that nobody could read.
pub(super) struct Unread<'a> {
    pub(super) id: &'a str,
    /// Who is connected; `None` if the system does not tell.
    pub(super) client: Option<IpAddr>,
    /// What it was told.
    pub(super) error: &'a Error,
    pub(super) bytes_out: usize,
    /// From its first byte.
    pub(super) total: Duration,
}

/// Records a request that could not be read: as [`write`] does, with what is
/// known of it. Plugins see requests only.
pub(super) fn write_unread(metrics: &Metrics, unread: &Unread<'_>) {
    let status = unread.error.status.as_u16();
    let ending = Ending::ClientError.as_str();
    let code = unread.error.code.as_deref();
    metrics
        .requests
        .with_label_values(&["unknown", "", &status.to_string(), ending])
        .inc();
    let total = metrics.total.with_label_values(&["unknown"]);
    total.observe(unread.total.as_secs_f64());
    if let Some(code) = code {
        metrics.errors.with_label_values(&[code]).inc();
    }
    let bytes_out = unread.bytes_out as u64;
    let out = metrics.body_bytes.with_label_values(&["out"]);
    out.inc_by(bytes_out);
    write_access(&AccessLine {
        request_id: unread.id,
        client: unread.client.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        caller: "-",
        method: "-",
        path: "-",
        status,
        ending,
        model: None,
        route: None,
        group: None,
        upstream: None,
        attempts: 0,
        fallback: false,
        takeovers: 0,
        streamed: false,
        bytes_in: 0,
        bytes_out,
        queued: Duration::ZERO,
        first_token: None,
        total: unread.total,
        tokens_in: None,
        tokens_out: None,
        error: code,
    });
}
