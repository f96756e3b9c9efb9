//! What became of every exchange: counted once, and told when some are lost.
//!
//! **Invariant:** finished = captured + opted out + skipped + dropped + what
//! still waits to be written. After the process has ended in good order nothing
//! waits.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus::IntCounter;

use crate::{
    events::{Change, Events},
    metrics::Metrics,
    resources::Resources,
};

/// How long nothing must be lost before it is told that all is well again.
const CALM: Duration = Duration::from_secs(3);

/// Why an exchange is lost that should have been captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The folder cannot be written; in a few words why.
    Disk(&'static str),
    /// Too much waits to be written.
    Queue,
    /// Too much is being collected, all answers together.
    Buffer,
    /// This answer is too large.
    Answer,
    /// The process stops, or the writer failed.
    Writer,
}

impl Lost {
    const ALL: [Self; 5] = [
        Self::Disk(""),
        Self::Queue,
        Self::Buffer,
        Self::Answer,
        Self::Writer,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Disk(_) => "disk",
            Self::Queue => "queue",
            Self::Buffer => "buffer",
            Self::Answer => "answer",
            Self::Writer => "writer",
        }
    }

    const fn told(self) -> &'static str {
        match self {
            Self::Disk(why) => why,
            Self::Queue => "too much waits to be written",
            Self::Buffer => "too much is being answered at once",
            Self::Answer => "an answer is too large",
            Self::Writer => "the writer has stopped",
        }
    }
}

/// Why an exchange is not to be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skip {
    /// It is no dialogue: embeddings, a list of models.
    Endpoint,
    /// It was refused before it was read, or is no model call.
    NoRequest,
    /// A plugin answered it.
    Local,
    /// It failed.
    Failed,
    /// The client left before an answer began.
    Left,
    /// Its answer broke off.
    Partial,
    /// Its answer ended at the limit of tokens.
    Length,
    /// The dice fell so.
    Sampled,
    /// Its prompt is in tokens.
    Tokens,
    /// Its answer has no words of any kind that is known.
    Unreadable,
}

impl Skip {
    const ALL: [Self; 10] = [
        Self::Endpoint,
        Self::NoRequest,
        Self::Local,
        Self::Failed,
        Self::Left,
        Self::Partial,
        Self::Length,
        Self::Sampled,
        Self::Tokens,
        Self::Unreadable,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::NoRequest => "no_request",
            Self::Local => "local",
            Self::Failed => "failed",
            Self::Left => "left",
            Self::Partial => "partial",
            Self::Length => "length",
            Self::Sampled => "sampled",
            Self::Tokens => "tokens",
            Self::Unreadable => "unreadable",
        }
    }
}

/// Who did not want to be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OptOut {
    /// The key's entry says so.
    Key,
    /// `x-forebay-capture`.
    Header,
    /// `"store": false`.
    Store,
}

impl OptOut {
    const ALL: [Self; 3] = [Self::Key, Self::Header, Self::Store];

    const fn label(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Header => "header",
            Self::Store => "store",
        }
    }
}

/// The accounts of one folder.
pub(super) struct Account {
    metrics: Arc<Metrics>,
    events: Arc<Events>,
    /// The folder, as it is told.
    dir: Arc<str>,
    losing: Mutex<Losing>,
    captured: IntCounter,
    totals: Totals,
}

/// Of this folder, for the log.
#[derive(Default)]
struct Totals {
    captured: AtomicU64,
    opted_out: AtomicU64,
    skipped: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Losing {
    told: bool,
    last: Option<Instant>,
}

impl Account {
    pub(super) fn new(dir: Arc<str>, resources: &Resources) -> Self {
        let metrics = Arc::clone(&resources.metrics);
        let family = &metrics.capture_exchanges;
        // Series that are there from the start can be added up from the start.
        for lost in Lost::ALL {
            family.with_label_values(&["dropped", lost.label()]);
        }
        for skip in Skip::ALL {
            family.with_label_values(&["skipped", skip.label()]);
        }
        for out in OptOut::ALL {
            family.with_label_values(&["opted_out", out.label()]);
        }
        Self {
            captured: family.with_label_values(&["captured", ""]),
            metrics,
            events: Arc::clone(&resources.events),
            dir,
            losing: Mutex::default(),
            totals: Totals::default(),
        }
    }

    /// The metrics of all folders.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Counts an exchange that has ended; one of the others follows.
    pub(super) fn finished(&self) {
        self.metrics.capture_finished.inc();
    }

    /// An exchange is in a file, with so many lines.
    pub(super) fn captured(&self, lines: usize, bytes: usize) {
        self.captured.inc();
        self.totals.captured.fetch_add(1, Ordering::Relaxed);
        self.metrics.capture_lines.inc_by(lines as u64);
        self.metrics.capture_bytes.inc_by(bytes as u64);
    }

    pub(super) fn opted_out(&self, by: OptOut) {
        self.count("opted_out", by.label());
        self.totals.opted_out.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn skipped(&self, why: Skip) {
        self.count("skipped", why.label());
        self.totals.skipped.fetch_add(1, Ordering::Relaxed);
    }

    /// An exchange is lost. The first is told to everybody.
    pub(super) fn dropped(&self, why: Lost, now: Instant) {
        self.count("dropped", why.label());
        self.totals.dropped.fetch_add(1, Ordering::Relaxed);
        self.losing(why, now);
    }

    /// Exchanges are lost, or would be.
    pub(super) fn losing(&self, why: Lost, now: Instant) {
        let is_first = {
            let mut losing = self.losing.lock().unwrap_or_else(PoisonError::into_inner);
            losing.last = Some(now);
            !std::mem::replace(&mut losing.told, true)
        };
        if is_first {
            self.tell(true, why.told());
        }
    }

    /// The folder can be written: if nothing was lost for a while, that is told.
    pub(super) fn all_is_well(&self, now: Instant) {
        let is_over = {
            let mut losing = self.losing.lock().unwrap_or_else(PoisonError::into_inner);
            let calm = losing
                .last
                .is_none_or(|last| now.saturating_duration_since(last) >= CALM);
            calm && std::mem::take(&mut losing.told)
        };
        if is_over {
            self.tell(false, "");
        }
    }

    fn tell(&self, dropping: bool, reason: &'static str) {
        let change = Change::Capture { dropping, reason };
        self.events.tell(&self.dir, change);
    }

    fn count(&self, result: &str, reason: &str) {
        let family = &self.metrics.capture_exchanges;
        family.with_label_values(&[result, reason]).inc();
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |total: &AtomicU64| total.load(Ordering::Relaxed);
        write!(
            f,
            "captured={} opted_out={} skipped={} dropped={}",
            of(&self.totals.captured),
            of(&self.totals.opted_out),
            of(&self.totals.skipped),
            of(&self.totals.dropped),
        )
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Account({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_told_once_and_so_is_their_end() {
        let resources = Resources::default();
        let mut heard = resources.events.subscribe();
        let account = Account::new("/captures".into(), &resources);
        let start = Instant::now();
        account.all_is_well(start);
        assert!(heard.try_recv().is_err());
        account.dropped(Lost::Disk("the disk is full"), start);
        account.dropped(Lost::Queue, start + CALM / 2);
        account.all_is_well(start + CALM);
        let event = heard.try_recv().unwrap();
        assert_eq!(&*event.subject, "/captures");
        let lost = Change::Capture {
            dropping: true,
            reason: "the disk is full",
        };
        assert_eq!(event.change, lost);
        assert!(heard.try_recv().is_err(), "once, and not over yet");
        account.all_is_well(start + CALM * 2);
        account.all_is_well(start + CALM * 3);
        let well = Change::Capture {
            dropping: false,
            reason: "",
        };
        assert_eq!(heard.try_recv().unwrap().change, well);
        assert!(heard.try_recv().is_err());
        let text = resources.metrics.encode().unwrap();
        for series in [
            "{reason=\"disk\",result=\"dropped\"} 1",
            "{reason=\"queue\",result=\"dropped\"} 1",
            "{reason=\"\",result=\"captured\"} 0",
            "{reason=\"store\",result=\"opted_out\"} 0",
        ] {
            let series = format!("forebay_capture_exchanges_total{series}");
            assert!(text.contains(&series), "{series}\n{text}");
        }
    }
}
