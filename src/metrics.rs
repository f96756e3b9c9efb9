//! Every metric family: its name, its unit, its labels.
//!
//! **Invariant:** the value of every label is bounded by the configuration or
//! by an enum here: a route's pattern, a group, an upstream, an outcome. What a
//! client sends never becomes a label.

use std::fmt;

use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Seconds, from a fast embedding to a slow first token.
const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];
/// Seconds, from a refused request to the longest stream.
const TOTAL_BUCKETS: &[f64] = &[
    0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
];
/// Seconds, from a slot that is freed at once to the longest batch wait.
const QUEUE_BUCKETS: &[f64] = &[
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// Seconds, from a search on this machine to the longest that is waited for.
const SEARCH_BUCKETS: &[f64] = &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0];

/// Seconds, from a look at a header to a search of the web.
const PLUGIN_BUCKETS: &[f64] = &[0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0, 10.0];

/// The process's metrics. Made once.
pub struct Metrics {
    registry: Registry,
    /// Requests that ended, by endpoint, route, status and how they ended.
    pub requests: IntCounterVec,
    /// Errors that clients were told, by OpenAI's `code`.
    pub errors: IntCounterVec,
    /// Requests that are being worked on.
    pub in_flight: IntGauge,
    /// Tries at upstreams, by group, upstream and verdict.
    pub attempts: IntCounterVec,
    /// Moves from one upstream to the next.
    pub failovers: IntCounterVec,
    /// Answers that broke off: which upstream died, which was asked for the
    /// rest (`-` if none was), and what came of it.
    pub takeovers: IntCounterVec,
    /// Tries whose answer was not used and which may have been billed.
    pub maybe_billed: IntCounterVec,
    /// Requests that an upstream is working on.
    pub upstream_in_flight: IntGaugeVec,
    /// 1 for the state that an upstream is in, 0 for the others.
    pub upstream_state: IntGaugeVec,
    /// Changes of upstreams' states, by the new state and why.
    pub upstream_transitions: IntCounterVec,
    /// Changes of breakers, by what they became.
    pub breaker_transitions: IntCounterVec,
    /// How often capturing began to lose exchanges, and to keep them again.
    pub capture_transitions: IntCounterVec,
    /// Exchanges that ended, of those that capture saw.
    pub capture_finished: IntCounter,
    /// What became of them, and why: together as many as have finished, but for
    /// those that wait.
    pub capture_exchanges: IntCounterVec,
    /// Lines that were written.
    pub capture_lines: IntCounter,
    /// Bytes of those lines.
    pub capture_bytes: IntCounter,
    /// Exchanges that wait to be written.
    pub capture_waiting: IntGauge,
    /// Bytes of them.
    pub capture_queue_bytes: IntGauge,
    /// Bytes of answers that are collected while they are sent.
    pub capture_buffer_bytes: IntGauge,
    /// Torn lines that were set aside.
    pub capture_torn: IntCounter,
    /// How often the disk could not make safe what was written.
    pub capture_sync_failures: IntCounter,
    /// How often that took longer than is promised.
    pub capture_syncs_late: IntCounter,
    /// Files that were removed, by why.
    pub capture_files_removed: IntCounterVec,
    /// How often a key's budget came near its end, or to it.
    pub budget_transitions: IntCounterVec,
    /// Alerts, by kind and whether a receiver was reached.
    pub alerts: IntCounterVec,
    /// Breakers, one per model, that are not closed.
    pub breakers: IntGaugeVec,
    /// Questions to upstreams whether they are well, by what came of them.
    pub health_checks: IntCounterVec,
    /// Tries after the first in a group, by whether the budget had one left.
    pub retries: IntCounterVec,
    /// Seconds to the first meaningful event, or to the whole answer.
    pub first_token: HistogramVec,
    /// Seconds to the end.
    pub total: HistogramVec,
    /// Tokens, `in` and `out`, as the upstreams count them.
    pub tokens: IntCounterVec,
    /// Bytes of request and answer bodies.
    pub body_bytes: IntCounterVec,
    /// Connections that clients have open.
    pub client_connections: IntGauge,
    /// The most that they may have: `limits.connections`, or what the open
    /// files allow.
    pub client_connections_max: IntGauge,
    /// Bytes of requests, of answers that are read whole, and of texts that are
    /// kept for takeover, in memory.
    pub bodies: IntGauge,
    /// The most of them: `limits.bodies`.
    pub bodies_max: IntGauge,
    /// Bytes of memory that count against the nearest bound.
    pub memory: IntGauge,
    /// That bound; 0 if there is none.
    pub memory_max: IntGauge,
    /// How often a limit was hit, by its name.
    pub limits: IntCounterVec,
    /// Requests that a `rate_limit` turned away, by rule and limit.
    pub rate_limited: IntCounterVec,
    /// Callers that a `rate_limit` remembers, by rule.
    pub rate_limit_tracked: IntGaugeVec,
    /// Requests that a `budget` turned away, by period and what was used up.
    pub budget_refused: IntCounterVec,
    /// Sums that wait to be written to the store.
    pub store_queue: IntGauge,
    /// Sums that were lost since there was no room for them.
    pub store_dropped: IntCounter,
    /// What the store could not do, by what it was.
    pub store_errors: IntCounterVec,
    /// Requests that wait for a free upstream, by group and class.
    pub queue_length: IntGaugeVec,
    /// Seconds that requests waited for a free upstream, by group, class and
    /// what came of it.
    pub queue_wait: HistogramVec,
    /// Requests that were turned away because all upstreams of a group were
    /// busy, by group, class and reason.
    pub queue_refused: IntCounterVec,
    /// Requests that did not wait any longer and went on to the next group.
    pub spills: IntCounterVec,
    /// Clients that left before their answer was complete.
    pub client_closed: IntCounter,
    /// Answers to prompts of which an upstream had not read all.
    pub prompts_cut: IntCounterVec,
    /// Connections to upstreams, by whether they came from the pool.
    pub connections: IntCounterVec,
    /// Seconds that plugins took, by plugin, hook and what came of it.
    pub plugins: HistogramVec,
    /// Requests that were to be searched for, by what became of it.
    pub research: IntCounterVec,
    /// Calls of retrievers, by retriever and what came of it.
    pub searches: IntCounterVec,
    /// Seconds that retrievers took, answers that were of no use included.
    pub search_seconds: HistogramVec,
    /// Searches by whether the results were known already.
    pub search_cache: IntCounterVec,
    /// Pauses that retrievers were given, by retriever and reason.
    pub search_cooldowns: IntCounterVec,
    /// What the rules of `policy` found, by the part of its settings and the rule.
    pub policy_hits: IntCounterVec,
    /// Reloads of the configuration, by result.
    pub reloads: IntCounterVec,
    /// Upgrades that were tried, by what became of them.
    pub upgrades: IntCounterVec,
    /// Whether the last reload worked.
    pub reload_ok: IntGauge,
    /// When the live configuration was loaded, in seconds since 1970.
    pub config_loaded: GaugeVec,
    /// Seconds that a reload took.
    pub reload_seconds: Histogram,
    /// Lines that the log had no room for.
    pub log_dropped: IntCounter,
    /// Panics of single requests.
    pub panics: IntCounter,
}

impl Metrics {
    /// Makes and registers every family.
    pub fn new() -> Self {
        let registry = Registry::new();
        let all = Families(&registry);
        let build = all.gauges(
            "forebay_build_info",
            "The version that is running; always 1",
            &["version"],
        );
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self {
            requests: all.counters(
                "forebay_requests_total",
                "Requests that ended",
                &["endpoint", "route", "status", "outcome"],
            ),
            errors: all.counters(
                "forebay_errors_total",
                "Errors that clients were told, by code",
                &["code"],
            ),
            in_flight: all.gauge(
                "forebay_requests_in_flight",
                "Requests that are being worked on",
            ),
            attempts: all.counters(
                "forebay_attempts_total",
                "Tries at upstreams",
                &["group", "upstream", "verdict"],
            ),
            failovers: all.counters(
                "forebay_failovers_total",
                "Moves from one upstream to the next",
                &["from", "to"],
            ),
            takeovers: all.counters(
                "forebay_takeovers_total",
                "Streamed answers whose upstream died, and what another made of them",
                &["from", "to", "result"],
            ),
            maybe_billed: all.counters(
                "forebay_attempts_maybe_billed_total",
                "Tries whose answer was not used although the upstream may have done the work",
                &["upstream"],
            ),
            upstream_in_flight: all.gauges(
                "forebay_upstream_requests_in_flight",
                "Requests that an upstream is working on",
                &["group", "upstream"],
            ),
            upstream_state: all.gauges(
                "forebay_upstream_state",
                "1 for the state that an upstream is in",
                &["group", "upstream", "state"],
            ),
            upstream_transitions: all.counters(
                "forebay_upstream_transitions_total",
                "Changes of upstreams' states",
                &["upstream", "to", "reason"],
            ),
            breaker_transitions: all.counters(
                "forebay_breaker_transitions_total",
                "Changes of breakers, over all models",
                &["upstream", "to"],
            ),
            capture_transitions: all.counters(
                "forebay_capture_transitions_total",
                "How often capturing began to lose exchanges, and to keep them again",
                &["to"],
            ),
            capture_finished: all.counter(
                "forebay_capture_finished_total",
                "Exchanges that ended, of those that capture saw",
            ),
            capture_exchanges: all.counters(
                "forebay_capture_exchanges_total",
                "What became of exchanges: captured, opted_out, skipped or dropped",
                &["result", "reason"],
            ),
            capture_lines: all.counter(
                "forebay_capture_lines_total",
                "Lines that were captured: one for each choice",
            ),
            capture_bytes: all.counter(
                "forebay_capture_bytes_total",
                "Bytes of the lines that were captured",
            ),
            capture_waiting: all.gauge(
                "forebay_capture_waiting",
                "Exchanges that wait to be written",
            ),
            capture_queue_bytes: all.gauge(
                "forebay_capture_queue_bytes",
                "Bytes of the exchanges that wait to be written",
            ),
            capture_buffer_bytes: all.gauge(
                "forebay_capture_buffer_bytes",
                "Bytes of answers that are collected while they are sent",
            ),
            capture_torn: all.counter(
                "forebay_capture_torn_total",
                "Torn lines that were set aside",
            ),
            capture_sync_failures: all.counter(
                "forebay_capture_sync_failures_total",
                "How often the disk could not make safe what was captured",
            ),
            capture_syncs_late: all.counter(
                "forebay_capture_syncs_late_total",
                "How often what was captured was unsafe for more than a second: the disk is slow",
            ),
            capture_files_removed: all.counters(
                "forebay_capture_files_removed_total",
                "Files of captures that were removed: by age, by size, and images that nothing names any more",
                &["reason"],
            ),
            budget_transitions: all.counters(
                "forebay_budget_transitions_total",
                "How often the budget of a key came near its end, or to it",
                &["period", "of", "level"],
            ),
            alerts: all.counters(
                "forebay_alerts_total",
                "Tries to tell a receiver, by kind and what came of them",
                &["kind", "result"],
            ),
            breakers: all.gauges(
                "forebay_upstream_breakers",
                "Breakers, one per model, that are open or half open",
                &["group", "upstream", "phase"],
            ),
            health_checks: all.counters(
                "forebay_health_checks_total",
                "Questions to upstreams whether they are well",
                &["upstream", "result"],
            ),
            retries: all.counters(
                "forebay_retries_total",
                "Tries after the first in a group that count for its budget",
                &["group", "result"],
            ),
            first_token: all.histograms(
                "forebay_first_token_seconds",
                "Time to the first token, or to the whole answer if it is not streamed",
                &["route", "upstream"],
                FIRST_TOKEN_BUCKETS,
            ),
            total: all.histograms(
                "forebay_request_seconds",
                "Time to the end of the answer",
                &["endpoint"],
                TOTAL_BUCKETS,
            ),
            tokens: all.counters(
                "forebay_tokens_total",
                "Tokens as the upstreams count them",
                &["route", "upstream", "direction"],
            ),
            body_bytes: all.counters(
                "forebay_body_bytes_total",
                "Bytes of bodies received from and sent to clients",
                &["direction"],
            ),
            client_connections: all.gauge(
                "forebay_client_connections",
                "Connections that clients have open",
            ),
            client_connections_max: all.gauge(
                "forebay_client_connections_max",
                "The most connections that clients may have open",
            ),
            bodies: all.gauge(
                "forebay_request_bodies_bytes",
                "Requests in memory, whole answers and texts kept for takeover",
            ),
            bodies_max: all.gauge(
                "forebay_request_bodies_bytes_max",
                "The most bytes of requests in memory",
            ),
            memory: all.gauge(
                "forebay_memory_bytes",
                "Memory that counts against its nearest bound",
            ),
            memory_max: all.gauge(
                "forebay_memory_bytes_max",
                "The nearest bound on memory, 0 if there is none",
            ),
            limits: all.counters(
                "forebay_limit_hits_total",
                "How often a limit was hit",
                &["limit"],
            ),
            rate_limited: all.counters(
                "forebay_rate_limited_total",
                "Requests that were turned away because a caller had used its share",
                &["rule", "limit"],
            ),
            rate_limit_tracked: all.gauges(
                "forebay_rate_limit_tracked",
                "Callers whose use is remembered",
                &["rule"],
            ),
            budget_refused: all.counters(
                "forebay_budget_refused_total",
                "Requests that were turned away because a key had used its budget",
                &["period", "of"],
            ),
            store_queue: all.gauge(
                "forebay_store_queue",
                "Sums that wait to be written to the store",
            ),
            store_dropped: all.counter(
                "forebay_store_dropped_total",
                "Sums that were lost since the queue to the store was full",
            ),
            store_errors: all.counters(
                "forebay_store_errors_total",
                "What the store could not do",
                &["what"],
            ),
            queue_length: all.gauges(
                "forebay_queue_length",
                "Requests that wait for a free upstream",
                &["group", "class"],
            ),
            queue_wait: all.histograms(
                "forebay_queue_wait_seconds",
                "Time that requests waited for a free upstream",
                &["group", "class", "outcome"],
                QUEUE_BUCKETS,
            ),
            queue_refused: all.counters(
                "forebay_queue_refused_total",
                "Requests that were turned away because all upstreams were busy",
                &["group", "class", "reason"],
            ),
            spills: all.counters(
                "forebay_spills_total",
                "Requests that went on to the next group because all upstreams were busy",
                &["from", "to"],
            ),
            client_closed: all.counter(
                "forebay_client_closed_total",
                "Clients that left before their answer was complete",
            ),
            prompts_cut: all.counters(
                "forebay_prompts_cut_total",
                "Answers to prompts that an upstream cut to the size of its context",
                &["upstream"],
            ),
            connections: all.counters(
                "forebay_upstream_connections_total",
                "Connections used for tries at upstreams",
                &["upstream", "source"],
            ),
            plugins: all.histograms(
                "forebay_plugin_seconds",
                "Time that the hooks of plugins took, by what came of it",
                &["plugin", "hook", "verdict"],
                PLUGIN_BUCKETS,
            ),
            research: all.counters(
                "forebay_research_requests_total",
                "Requests that were to be searched for, by what became of it",
                &["outcome"],
            ),
            searches: all.counters(
                "forebay_searches_total",
                "Calls of retrievers, by what came of it",
                &["retriever", "result"],
            ),
            search_seconds: all.histograms(
                "forebay_search_seconds",
                "Time that retrievers took to answer or to fail",
                &["retriever"],
                SEARCH_BUCKETS,
            ),
            search_cache: all.counters(
                "forebay_search_cache_total",
                "Searches by whether the results were known already",
                &["result"],
            ),
            search_cooldowns: all.counters(
                "forebay_search_cooldowns_total",
                "Pauses that retrievers were given",
                &["retriever", "reason"],
            ),
            policy_hits: all.counters(
                "forebay_policy_hits_total",
                "What the rules of the plugin policy found",
                &["part", "rule"],
            ),
            reloads: all.counters(
                "forebay_config_reloads_total",
                "Reloads of the configuration",
                &["result"],
            ),
            upgrades: all.counters(
                "forebay_upgrades_total",
                "Upgrades that were tried, by what became of them: handed_over, not_started, timed_out, died, refused, not_served",
                &["outcome"],
            ),
            reload_ok: all.gauge(
                "forebay_config_last_reload_successful",
                "Whether the last reload worked",
            ),
            config_loaded: all.float_gauges(
                "forebay_config_loaded_timestamp_seconds",
                "When the live configuration was loaded, by the start of its SHA-256",
                &["hash"],
            ),
            reload_seconds: all.histogram(
                "forebay_config_reload_seconds",
                "Time that a reload took",
                &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0],
            ),
            log_dropped: all.counter(
                "forebay_log_lines_dropped_total",
                "Lines that the log had no room for",
            ),
            panics: all.counter("forebay_panics_total", "Panics of single requests"),
            registry,
        }
    }

    /// Writes every family in the Prometheus text format.
    ///
    /// # Errors
    /// Never in practice: the families were checked when they were registered.
    pub fn encode(&self) -> prometheus::Result<String> {
        let mut text = Vec::with_capacity(16 * 1024);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Makes families and registers them. The names are constants of this file, so
/// a clash is a mistake that the first test shows.
struct Families<'a>(&'a Registry);

impl Families<'_> {
    fn register<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> C {
        let family = made.expect("the names and labels in this file are valid");
        self.0
            .register(Box::new(family.clone()))
            .expect("the names in this file are different");
        family
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn float_gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(Opts::new(name, help), labels))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(HistogramVec::new(opts, labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_there_from_the_start() {
        let text = Metrics::new().encode().unwrap();
        assert!(text.contains("forebay_build_info{version="), "{text}");
    }
}
