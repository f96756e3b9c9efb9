//! What a plugin costs and decides, as one metric.

use std::{sync::Arc, time::Duration};

use prometheus::Histogram;

use crate::metrics::Metrics;

/// A call of one kind to one plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    Headers,
    Parsed,
    Request,
    Response,
    /// All events of one answer together.
    Events,
    Body,
    Last,
    Finish,
}

impl Hook {
    const ALL: [Self; 8] = [
        Self::Headers,
        Self::Parsed,
        Self::Request,
        Self::Response,
        Self::Events,
        Self::Body,
        Self::Last,
        Self::Finish,
    ];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Headers => "headers",
            Self::Parsed => "parsed",
            Self::Request => "request",
            Self::Response => "response",
            Self::Events => "events",
            Self::Body => "body",
            Self::Last => "last",
            Self::Finish => "finish",
        }
    }
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// The request goes on.
    On,
    /// The plugin answered it.
    Responded,
    /// The plugin refused it.
    Refused,
    /// The plugin ended the answer.
    Ended,
    /// The plugin failed, and the request goes on without it.
    FailedOpen,
    /// The plugin failed, and the request with it.
    FailedClosed,
}

impl Came {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::On => "continue",
            Self::Responded => "respond",
            Self::Refused => "refuse",
            Self::Ended => "end",
            Self::FailedOpen => "failed_open",
            Self::FailedClosed => "failed_closed",
        }
    }
}

/// Measures the calls to one plugin.
pub(super) struct Meter {
    name: &'static str,
    /// Of [`Came::On`], by hook: what nearly every call comes to.
    on: [Histogram; Hook::ALL.len()],
    metrics: Arc<Metrics>,
}

impl Meter {
    pub(super) fn new(name: &'static str, metrics: &Arc<Metrics>) -> Self {
        let labels = |hook: Hook| [name, hook.as_str(), Came::On.as_str()];
        Self {
            name,
            on: Hook::ALL.map(|hook| metrics.plugins.with_label_values(&labels(hook))),
            metrics: Arc::clone(metrics),
        }
    }

    pub(super) fn note(&self, hook: Hook, came: Came, took: Duration) {
        let seconds = took.as_secs_f64();
        if came == Came::On
            && let Some(series) = self.on.get(hook as usize)
        {
            series.observe(seconds);
            return;
        }
        let labels = [self.name, hook.as_str(), came.as_str()];
        let series = self.metrics.plugins.with_label_values(&labels);
        series.observe(seconds);
    }
}
