//! Where lines end: standard error, and perhaps a file.
//!
//! Runs on a thread of its own, the only one that may have to wait for a pipe
//! or a disk. What cannot be written is counted, told on the other sink, and
//! forgotten: a full disk stops nobody.

use std::{
    io,
    time::{Duration, Instant, SystemTime},
};

use log::{Level, Record, kv};
use prometheus::IntCounter;

use super::{line, queue::Queue, rotate::RotatingFile};
use crate::config::LogFormat;

/// How often trouble with the file is told.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// The places that every line goes to.
pub(super) struct Sinks {
    stderr: Box<dyn io::Write + Send>,
    file: Option<RotatingFile>,
    format: LogFormat,
    dropped: IntCounter,
    /// Lines that the file did not get since that was last told.
    untold: u64,
    complained: Option<Instant>,
}

impl Sinks {
    pub(super) fn new(
        stderr: Box<dyn io::Write + Send>,
        file: Option<RotatingFile>,
        format: LogFormat,
        dropped: IntCounter,
    ) -> Self {
        Self {
            stderr,
            file,
            format,
            dropped,
            untold: 0,
            complained: None,
        }
    }

    /// Writes what comes until the queue is closed and empty.
    pub(super) fn run(mut self, queue: &Queue) {
        let mut spent = Vec::new();
        while let Some(mut batch) = queue.take(spent) {
            if batch.dropped > 0 {
                let told = self.line(
                    "log lines dropped, they came faster than they could be written",
                    &[("count", batch.dropped)],
                );
                batch.lines.extend_from_slice(told.as_bytes());
            }
            self.write(&batch.lines, Instant::now());
            spent = batch.lines;
        }
    }

    fn write(&mut self, lines: &[u8], now: Instant) {
        let on_stderr = self
            .stderr
            .write_all(lines)
            .and_then(|()| self.stderr.flush());
        let Some(file) = &mut self.file else {
            if on_stderr.is_err() {
                self.dropped.inc_by(count(lines));
            }
            return;
        };
        let Err(trouble) = file.write(lines, now) else {
            return;
        };
        self.dropped.inc_by(trouble.lines_lost);
        self.untold += trouble.lines_lost;
        let quiet = self
            .complained
            .is_some_and(|last| now.duration_since(last) < COMPLAIN_EVERY);
        if !quiet {
            self.complained = Some(now);
            let told = self.line(
                &format!("log file cannot be written or rotated: {}", trouble.cause),
                &[("lines_lost", self.untold)],
            );
            self.untold = 0;
            if self.stderr.write_all(told.as_bytes()).is_err() {
                self.dropped.inc();
            }
        }
    }

    /// Makes a line of our own; the way through the queue would be a circle.
    fn line(&self, message: &str, pairs: &[(&str, u64)]) -> String {
        line::render(
            self.format,
            SystemTime::now(),
            &Record::builder()
                .level(Level::Warn)
                .target("forebay::logging")
                .args(format_args!("{message}"))
                .key_values(&pairs as &dyn kv::Source)
                .build(),
        )
    }
}

/// Returns the number of lines.
#[expect(
    clippy::naive_bytecount,
    reason = "only counted when something has gone wrong"
)]
pub(super) fn count(lines: &[u8]) -> u64 {
    u64::try_from(lines.iter().filter(|b| **b == b'\n').count()).unwrap_or(u64::MAX)
}
