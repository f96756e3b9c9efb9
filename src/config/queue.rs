//! `groups.NAME.queue`: the line of those who wait for a free upstream.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Group, Kind, Time};

/// The line of those who wait for a free upstream of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// The most requests that wait; 0 means that none does. Absent: the sum of
    /// the group's `concurrent`, at least [`QUEUE_SIZE_MIN`].
    #[schemars(range(max = 10_000))]
    pub size: Option<u32>,
    /// How long an interactive request waits. Absent: 5 s, and 60 s if every
    /// upstream of the group is an Ollama, where a place rarely becomes free.
    #[schemars(extend("x-min" = "1ms", "x-max" = "1h"))]
    pub wait: Option<Time>,
    /// How long a batch request waits.
    #[schemars(extend("x-min" = "1ms", "x-max" = "24h"))]
    pub batch_wait: Time,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            size: None,
            wait: None,
            batch_wait: Time::secs(60),
        }
    }
}

/// The least number of places in a line whose `size` is not given.
pub const QUEUE_SIZE_MIN: u32 = 8;

/// [`Queue`] with nothing left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolvedQueue {
    /// The most requests that wait.
    pub size: usize,
    /// How long an interactive request waits.
    pub wait: Duration,
    /// How long a batch request waits.
    pub batch_wait: Duration,
}

impl Group {
    /// Returns what holds for its line, what is not written taken from its
    /// upstreams.
    ///
    /// As many places as requests are worked on: the last in line then waits
    /// about as long as one request takes.
    pub fn resolved_queue(&self) -> ResolvedQueue {
        let only_ollama =
            !self.upstreams.is_empty() && self.upstreams.iter().all(|u| u.kind == Kind::Ollama);
        let size = self.queue.size.unwrap_or_else(|| {
            let each = self.upstreams.iter().filter_map(|u| u.concurrent);
            each.fold(0_u32, u32::saturating_add)
                .clamp(QUEUE_SIZE_MIN, 10_000)
        });
        let wait = self.queue.wait.map_or_else(
            || Duration::from_secs(if only_ollama { 60 } else { 5 }),
            Time::get,
        );
        ResolvedQueue {
            size: usize::try_from(size).unwrap_or(usize::MAX),
            wait,
            batch_wait: self.queue.batch_wait.get(),
        }
    }
}
