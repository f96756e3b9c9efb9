//! The log: one line per event, on standard error and, if asked for, in a file
//! that is rotated.
//!
//! A line goes from `log`'s macros through the `Front` (who may speak at which
//! level) and env_logger (which has it written down by `line`) into a bounded
//! `queue`; one thread takes it from there to the `sinks`, of which one is the
//! file that `rotate` keeps small. Start with [`init`].
//!
//! **Invariant:** whoever logs never waits for a disk, a pipe or a terminal. A
//! line that finds no room is dropped and counted.
//!
//! **Invariant:** what a stranger sent cannot end a line, start one, or steer a
//! terminal: every such character is escaped, in both formats.

mod access;
mod line;
mod queue;
mod rotate;
mod seldom;
mod sinks;

use std::{
    fmt, io,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use log::{Level, LevelFilter, Metadata, Record};
use prometheus::IntCounter;

pub use access::{AccessLine, write_access};
use queue::Queue;
use rotate::{Bounds, RotatingFile};
pub use seldom::Seldom;
use sinks::Sinks;

use crate::config::{Log as LogConfig, LogLevel};

/// The target of access lines.
const ACCESS: &str = "forebay::access";
/// How long the end of the process waits for lines that are still on their way.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// What Pingora says at level error whenever a client misbehaves or leaves.
/// Anybody can cause these, and our own lines tell the same: shown at debug.
const NOISE: &[&str] = &[
    "Downstream handshake error",
    "Downstream handshake timeout",
    "Fail to proxy: ",
    "H2 handshake error",
    "HTTP server fails to finish the request",
    "HTTP server fails to read from downstream",
    "HTTP server fails to write to downstream",
    "failed to send error response to downstream",
];

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// There is one already.
    #[error("the log is set up already")]
    Twice(#[from] log::SetLoggerError),
    /// The file cannot be written.
    #[error("log file {path} cannot be written")]
    File {
        /// The file as it was tried.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// There is no thread to be had.
    #[error("the log's thread cannot be started: {0}")]
    Thread(io::Error),
}

/// Sets up the process's log and starts its thread. Called once, after any fork:
/// threads do not survive one.
///
/// `base` is the folder of the configuration file, where a relative `file`
/// starts; `dropped` counts the lines that were lost.
///
/// # Errors
/// The file cannot be opened, or there is a log already.
pub fn init(config: &LogConfig, base: &Path, dropped: IntCounter) -> Result<LogHandle, LogError> {
    let (front, handle) = build(config, base, dropped, Box::new(io::stderr()))?;
    log::set_boxed_logger(Box::new(front))?;
    handle.set_level(config.level);
    Ok(handle)
}

/// Makes everything but the one thing that a process has only once.
fn build(
    config: &LogConfig,
    base: &Path,
    dropped: IntCounter,
    stderr: Box<dyn io::Write + Send>,
) -> Result<(Front, LogHandle), LogError> {
    let bounds = Arc::new(Bounds::new(config.rotate_size.0, config.rotate_keep));
    let file = match &config.file {
        Some(path) => {
            let path = base.join(path);
            let opened = RotatingFile::open(path.clone(), Arc::clone(&bounds));
            Some(opened.map_err(|source| LogError::File { path, source })?)
        }
        None => None,
    };
    let queue = Arc::new(Queue::new(dropped.clone()));
    let sinks = Sinks::new(stderr, file, config.format, dropped);
    let thread = std::thread::Builder::new()
        .name("log".to_owned())
        .spawn({
            let queue = Arc::clone(&queue);
            move || sinks.run(&queue)
        })
        .map_err(LogError::Thread)?;

    let rules = Arc::new(Rules {
        level: AtomicU8::new(0),
        access: AtomicBool::new(config.access),
    });
    rules.set_level(config.level);
    let format = config.format;
    let lines = env_logger::Builder::new()
        // The front has decided already.
        .filter_level(LevelFilter::Trace)
        .format(move |out, record| {
            out.write_all(line::render(format, SystemTime::now(), record).as_bytes())
        })
        .target(env_logger::Target::Pipe(Box::new(queue::Entrance(
            Arc::clone(&queue),
        ))))
        .build();
    let front = Front {
        lines,
        rules: Arc::clone(&rules),
        queue: Arc::clone(&queue),
    };
    let handle = LogHandle {
        rules,
        bounds,
        queue,
        thread: Some(thread),
    };
    Ok((front, handle))
}

/// The running log. Dropping it writes what is still on its way, but waits no
/// longer than two seconds; lines after that go straight to standard error.
pub struct LogHandle {
    rules: Arc<Rules>,
    bounds: Arc<Bounds>,
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl LogHandle {
    /// Takes over what a new configuration says and no restart needs: the level,
    /// the access lines, the size and number of the rotated files.
    pub fn apply(&self, config: &LogConfig) {
        self.set_level(config.level);
        self.rules.access.store(config.access, Ordering::Relaxed);
        self.bounds.set(config.rotate_size.0, config.rotate_keep);
    }

    /// Changes the least severe level that is written.
    pub fn set_level(&self, level: LogLevel) {
        self.rules.set_level(level);
        log::set_max_level(filter(level));
    }

    /// Waits until every line is written, two seconds at most. Returns whether
    /// they all were.
    pub fn flush(&self) -> bool {
        self.queue.flush(FLUSH_MAX)
    }
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        self.queue.close();
        let done = self.queue.flush(FLUSH_MAX);
        // A thread that hangs on a pipe nobody reads is left to the system.
        if let Some(thread) = self.thread.take().filter(|_| done)
            && thread.join().is_err()
        {
            log::error!("the log's thread panicked");
        }
    }
}

impl fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogHandle").finish_non_exhaustive()
    }
}

/// What `log`'s macros call: decides, and hands on.
struct Front {
    lines: env_logger::Logger,
    rules: Arc<Rules>,
    queue: Arc<Queue>,
}

impl log::Log for Front {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.rules.allow(metadata.target(), metadata.level())
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if !record.target().starts_with("pingora") {
            self.lines.log(record);
            return;
        }
        let text = record.args().to_string();
        let level = if is_noise(&text) {
            Level::Debug
        } else {
            record.level()
        };
        if self.rules.allow(record.target(), level) {
            let said = without_raw_bytes(&text);
            let mut record = record.to_builder();
            self.lines
                .log(&record.level(level).args(format_args!("{said}")).build());
        }
    }

    fn flush(&self) {
        self.queue.flush(FLUSH_MAX);
    }
}

/// Who may speak at which level. May change while the process runs.
struct Rules {
    /// The number of the [`LevelFilter`].
    level: AtomicU8,
    access: AtomicBool,
}

impl Rules {
    fn set_level(&self, level: LogLevel) {
        let number = match level {
            LogLevel::Error => 1,
            LogLevel::Warn => 2,
            LogLevel::Info => 3,
            LogLevel::Debug => 4,
        };
        self.level.store(number, Ordering::Relaxed);
    }

    /// Pingora tells its whole life at info, and other crates write for their
    /// own developers: both are heard from warn on, until somebody asks for
    /// everything.
    fn allow(&self, target: &str, level: Level) -> bool {
        let ours = match self.level.load(Ordering::Relaxed) {
            1 => LevelFilter::Error,
            2 => LevelFilter::Warn,
            3 => LevelFilter::Info,
            _ => LevelFilter::Debug,
        };
        let at_debug = ours == LevelFilter::Debug;
        let most = match target.split("::").next() {
            Some("forebay") if target == ACCESS && !self.access.load(Ordering::Relaxed) => {
                return false;
            }
            Some("forebay") => ours,
            Some(root) if root.starts_with("pingora") && at_debug => LevelFilter::Debug,
            _ if at_debug => LevelFilter::Info,
            _ => ours.min(LevelFilter::Warn),
        };
        level <= most
    }
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
    }
}

fn is_noise(text: &str) -> bool {
    NOISE.iter().any(|noise| text.starts_with(noise))
}

/// Returns what Pingora says up to a header that it could not parse: it shows
/// the bytes as they came, with the key in them.
fn without_raw_bytes(text: &str) -> &str {
    text.split_once(" buf: ").map_or(text, |(said, _)| said)
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError, mpsc};

    use super::*;
    use crate::{config::LogFormat, logging::rotate::tests::Folder};

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Screen {
        fn text(&self) -> String {
            let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            String::from_utf8(bytes.clone()).unwrap()
        }
    }

    impl io::Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn counter() -> IntCounter {
        IntCounter::new("dropped", "lines").unwrap()
    }

    fn say(front: &Front, target: &str, level: Level, text: &str) {
        log::Log::log(
            front,
            &Record::builder()
                .target(target)
                .level(level)
                .args(format_args!("{text}"))
                .build(),
        );
    }

    #[test]
    fn a_line_goes_to_the_screen_and_to_the_file() {
        let folder = Folder::new();
        let screen = Screen::default();
        let config = LogConfig {
            file: Some("forebay.log".into()),
            ..LogConfig::default()
        };
        let (front, handle) =
            build(&config, &folder.0, counter(), Box::new(screen.clone())).unwrap();
        say(&front, "forebay", Level::Info, "started");
        drop(handle);
        let on_screen = screen.text();
        assert!(
            on_screen.ends_with("Z INFO forebay: started\n"),
            "{on_screen}"
        );
        let in_file = std::fs::read_to_string(folder.0.join("forebay.log")).unwrap();
        assert_eq!(in_file, on_screen);
    }

    #[test]
    fn a_file_in_a_folder_that_is_not_there_is_an_error() {
        let config = LogConfig {
            file: Some("missing/forebay.log".into()),
            ..LogConfig::default()
        };
        let folder = Folder::new();
        let built = build(&config, &folder.0, counter(), Box::new(io::sink()));
        let why = built.err().unwrap().to_string();
        assert!(why.contains("missing/forebay.log"), "{why}");
    }

    #[test]
    fn the_level_can_change_while_the_process_runs() {
        let screen = Screen::default();
        let (front, handle) = build(
            &LogConfig::default(),
            Path::new(""),
            counter(),
            Box::new(screen.clone()),
        )
        .unwrap();
        say(&front, "forebay::proxy", Level::Debug, "first");
        handle.rules.set_level(LogLevel::Debug);
        say(&front, "forebay::proxy", Level::Debug, "second");
        handle.rules.set_level(LogLevel::Error);
        say(&front, "forebay::proxy", Level::Warn, "third");
        drop(handle);
        let text = screen.text();
        assert!(!text.contains("first"), "{text}");
        assert!(text.contains("DEBUG forebay::proxy: second"), "{text}");
        assert!(!text.contains("third"), "{text}");
    }

    #[test]
    fn pingora_is_heard_from_warn_on_unless_everything_is_asked_for() {
        let rules = Rules {
            level: AtomicU8::new(0),
            access: AtomicBool::new(true),
        };
        for (level, target, said, heard) in [
            (LogLevel::Info, "pingora_core::server", Level::Info, false),
            (LogLevel::Info, "pingora_core::server", Level::Warn, true),
            (LogLevel::Error, "pingora_core::server", Level::Warn, false),
            (LogLevel::Debug, "pingora_proxy", Level::Debug, true),
            (LogLevel::Debug, "h2::codec", Level::Debug, false),
            (LogLevel::Debug, "rustls", Level::Info, true),
            (LogLevel::Info, "forebay", Level::Info, true),
            (LogLevel::Info, "forebay_like", Level::Info, false),
            (LogLevel::Warn, "forebay::access", Level::Info, false),
        ] {
            rules.set_level(level);
            assert_eq!(
                rules.allow(target, said),
                heard,
                "{level:?} {target} {said}"
            );
        }
    }

    #[test]
    fn what_any_client_can_make_pingora_say_is_no_error() {
        let screen = Screen::default();
        let (front, handle) = build(
            &LogConfig::default(),
            Path::new(""),
            counter(),
            Box::new(screen.clone()),
        )
        .unwrap();
        let noise = "HTTP server fails to read from downstream: InvalidHTTPHeader \
                     context: buf: \"GET / HTTP/1.1\\r\\nAuthorization: Bearer fb_x\"";
        say(&front, "pingora_core::apps::http_app", Level::Error, noise);
        assert!(handle.flush());
        assert_eq!(screen.text(), "");
        handle.rules.set_level(LogLevel::Debug);
        say(&front, "pingora_core::apps::http_app", Level::Error, noise);
        drop(handle);
        let text = screen.text();
        assert!(text.contains(" DEBUG pingora_core"), "{text}");
        assert!(!text.contains("fb_x"), "{text}");
    }

    #[test]
    fn access_lines_can_be_switched_off_and_on() {
        let screen = Screen::default();
        let off = LogConfig {
            access: false,
            format: LogFormat::Json,
            ..LogConfig::default()
        };
        let (front, handle) =
            build(&off, Path::new(""), counter(), Box::new(screen.clone())).unwrap();
        say(&front, ACCESS, Level::Info, "first");
        handle.rules.access.store(true, Ordering::Relaxed);
        say(&front, ACCESS, Level::Info, "second");
        drop(handle);
        assert_eq!(screen.text().lines().count(), 1);
    }

    /// Lets nothing through until it is told to.
    struct Stuck(mpsc::Receiver<()>, Screen);

    impl io::Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Released for good when the other end is dropped.
            self.0.recv().unwrap_or_default();
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_screen_that_hangs_costs_lines_but_nobody_waits_and_the_loss_is_told() {
        let (release, held) = mpsc::channel();
        let screen = Screen::default();
        let dropped = counter();
        let (front, handle) = build(
            &LogConfig::default(),
            Path::new(""),
            dropped.clone(),
            Box::new(Stuck(held, screen.clone())),
        )
        .unwrap();
        // Two buffers of 4 MiB, filled by lines of 4 KiB, and some more.
        let text = "x".repeat(4000);
        for _ in 0..2500 {
            say(&front, "forebay", Level::Info, &text);
        }
        let lost = dropped.get();
        assert!(lost > 100, "{lost}");
        drop(release);
        drop(handle);
        let text = screen.text();
        let (tellings, lines): (Vec<_>, Vec<_>) =
            text.lines().partition(|line| line.contains(" WARN "));
        let told: u64 = tellings
            .iter()
            .filter_map(|line| line.rsplit_once("count=")?.1.parse::<u64>().ok())
            .sum();
        assert_eq!(told, lost);
        assert_eq!(u64::try_from(lines.len()).unwrap(), 2500 - lost);
    }
}
