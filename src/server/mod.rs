//! Assembles the process: the data listener, the admin listener, the background
//! jobs, and how all of it stops.

mod course;
mod handshake;
mod listening;
mod predecessor;
mod sockets;
mod successor;
mod watchdog;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pingora::{
    apps::HttpServerOptions,
    listeners::{L4BufferSettings, ListenerConfig, TcpSocketOptions},
    protocols::{TcpKeepalive, http::v2::server::default_h2_options},
    proxy::http_proxy,
    server::{RunArgs, Server, ShutdownWatch, configuration::ServerConf},
    services::{
        background::{BackgroundService, background_service},
        listening::Service,
    },
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

pub(crate) use self::predecessor::Predecessor;
use self::{
    course::Course, listening::Listening, sockets::Sockets, successor::Program, watchdog::Watchdog,
};
use crate::{
    admin::Admin,
    gateway::Gateway,
    logging::LogHandle,
    memory, open_files,
    proxy::{Connections, Edge, Proxy},
    reload::Reloader,
    upstreams::{check, resolve},
};

/// How long what is left in the queues of the background threads may take.
const WORKERS_STOP: Duration = Duration::from_secs(10);
/// How long an idle HTTP/2 connection is kept (Pingora's default is for ever).
const H2_IDLE: Duration = Duration::from_secs(300);
/// How much of a body an HTTP/2 client may send unasked: per stream, and per
/// connection. HTTP/2's own 64 KiB makes large uploads crawl.
const H2_STREAM_WINDOW: u32 = 1024 * 1024;
const H2_CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// How much of an answer is kept for a stream of HTTP/2 whose client is slow.
const H2_SEND_BUFFER: usize = 128 * 1024;
/// How much of an answer the system keeps for a client that is slow: it takes
/// twice this, where it would take megabytes by itself.
const SEND_BUFFER: usize = 128 * 1024;

/// Why the process cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address is taken, or not ours.
    #[error("{key}: cannot listen on {address}")]
    Listen {
        /// Which of the listeners.
        key: &'static str,
        /// What it should have listened on.
        address: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It handed over to a process that is no more: whoever started the first is to
    /// start it again.
    #[error("the process that took over has died")]
    SuccessorDied,
    /// The process before this one gives nothing away.
    #[error("the listeners were not handed over")]
    NotHandedOver(#[source] std::io::Error),
}

/// Serves until a signal says stop. Blocks. With a predecessor, its listeners are
/// taken over, once all else is ready.
///
/// # Errors
/// [`StartError`]: before anything was served, or when nobody serves any more.
pub(crate) fn run(
    gateway: Arc<Gateway>,
    log: Arc<LogHandle>,
    predecessor: Option<Predecessor>,
) -> Result<(), StartError> {
    let snapshot = gateway.snapshot();
    let config = snapshot.config();
    // Pingora panics in a thread of its own when it cannot bind; a process that
    // seems to run but serves nobody is the worst answer to a taken port.
    let addresses = [
        ("listen", &*config.listen),
        ("admin.listen", &*config.admin.listen),
    ];
    let sockets = Sockets::open(&addresses, predecessor.as_ref())?;
    let socket = |key, address: &str| match sockets.of(address) {
        Ok(socket) => Ok((address.to_owned(), socket)),
        Err(source) => Err(StartError::Listen {
            key,
            address: address.to_owned(),
            source,
        }),
    };
    let accepting = watch::Sender::new(0);
    let watchdog = Watchdog::find();

    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        some => some,
    };
    let mut server = Server::new_with_opt_and_conf(
        None,
        ServerConf {
            threads,
            // Stopping is ours, see `Course`.
            grace_period_seconds: Some(0),
            graceful_shutdown_timeout_seconds: Some(1),
            max_retries: 1,
            ..ServerConf::default()
        },
    );
    server.bootstrap();

    let connections = Arc::new(count_connections(&gateway));
    let mut proxy = http_proxy(
        &server.configuration,
        Proxy::new(Arc::clone(&gateway), Arc::clone(&connections)),
    );
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    // It gets no tunnel: this only lets us answer it instead of Pingora.
    options.allow_connect_method_proxying = true;
    // Pingora counts how often a connection is used again.
    options.keepalive_request_limit = Some(config.limits.keep_alive_requests.saturating_sub(1));
    options.h2_idle_timeout = Some(H2_IDLE);
    proxy.server_options = Some(options);
    let mut h2 = default_h2_options();
    h2.initial_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_send_buffer_size(H2_SEND_BUFFER);
    proxy.h2_options = Some(h2);
    let lifecycle = &gateway.resources.lifecycle;
    let edge = Edge::new(proxy, Arc::clone(&gateway), Arc::clone(&connections));
    let mut data = Service::new("data".to_owned(), edge);
    data.add_listener(listener(&config.listen));
    server.add_service(Listening::new(
        data,
        socket("listen", &config.listen)?,
        lifecycle.closed(),
        accepting.clone(),
        watchdog.as_ref().map(Watchdog::pulse),
    ));

    let mut admin = Service::new("admin".to_owned(), Admin::new(Arc::clone(&gateway)));
    admin.threads = Some(1);
    admin.add_tcp(&config.admin.listen);
    server.add_service(Listening::new(
        admin,
        socket("admin.listen", &config.admin.listen)?,
        lifecycle.admin_closed(),
        accepting.clone(),
        watchdog.as_ref().map(Watchdog::pulse),
    ));

    let reloader = Reloader::new(Arc::clone(&gateway), log);
    server.add_service(background_service("reload", reloader));
    let names = Resolver(Arc::clone(&gateway));
    server.add_service(background_service("resolve", names));
    let checker = Checker(Arc::clone(&gateway));
    server.add_service(background_service("check", checker));
    let memory = MemoryWatch(Arc::clone(&gateway));
    server.add_service(background_service("memory", memory));
    if let Some(watchdog) = watchdog {
        let told = watchdog.run_with(Arc::clone(&gateway));
        server.add_service(background_service("watchdog", told));
    }

    log::info!(
        "forebay {} listens: data={} admin={} threads={threads} config={} hash={}",
        env!("CARGO_PKG_VERSION"),
        config.listen,
        config.admin.listen,
        snapshot.loaded.file.display(),
        snapshot.loaded.hash.chars().take(12).collect::<String>(),
    );
    snapshot.start_plugins(&gateway.resources);
    let listen = config.listen.clone();
    let listeners = addresses.len();
    drop(snapshot);
    let resources = Arc::clone(&gateway.resources);
    let successor_died = watch::Sender::new(false);
    let course = Course {
        gateway,
        connections,
        sockets,
        alone: watch::Sender::new(predecessor.is_none()),
        successor_died: successor_died.clone(),
        predecessor,
        program: Program::this(),
        listen,
        listeners,
        accepting,
    };
    server.run(RunArgs {
        shutdown_signal: Box::new(course),
    });
    // No request is left: what they left to be written is all there is. This is
    // the one place where the process ends.
    if !resources.workers.stop(WORKERS_STOP) {
        log::warn!("not everything was written before the end");
    }
    log::info!("forebay stopped");
    if *successor_died.borrow() {
        return Err(StartError::SuccessorDied);
    }
    Ok(())
}

/// Catches SIGHUP and SIGUSR2 from now on, whoever listens to them later: until
/// somebody does, they would end the process. So would a file that has grown to the limit of the
/// process, by SIGXFSZ; with it caught, that write fails as on a full disk.
///
/// tokio installs its handler for good with the first listener. A hangup that
/// nobody hears yet asks for nothing: the configuration was just read.
pub(crate) fn survive_hangups() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    if let Ok(runtime) = runtime {
        let _guard = runtime.enter();
        let file_too_large = SignalKind::from_raw(nix::libc::SIGXFSZ);
        for (name, kind) in [
            ("SIGHUP", SignalKind::hangup()),
            ("SIGUSR2", SignalKind::user_defined2()),
            ("SIGXFSZ", file_too_large),
        ] {
            if let Err(why) = signal(kind) {
                log::warn!("{name} cannot be handled: {why}");
            }
        }
    }
}

/// Begins to count clients' connections; at most as many as the open files
/// allow, of which each may need two.
fn count_connections(gateway: &Gateway) -> Connections {
    let wanted = gateway.snapshot().config().limits.connections;
    let files = open_files::raise();
    let ceiling = files.map_or(usize::MAX, open_files::clients);
    if let Some(files) = files
        && ceiling < wanted
    {
        log::warn!(
            "fewer connections than limits.connections: allowed={ceiling} wanted={wanted} open_files={files}"
        );
    }
    Connections::new(Arc::clone(&gateway.resources.metrics), ceiling)
}

/// Describes the data listener.
fn listener(address: &str) -> ListenerConfig {
    let mut options = TcpSocketOptions::default();
    options.tcp_snd_buf = Some(SEND_BUFFER);
    // A client that vanished while an upstream thinks is noticed after a minute.
    options.tcp_keepalive = Some(TcpKeepalive {
        idle: Duration::from_secs(30),
        interval: Duration::from_secs(10),
        count: 3,
        #[cfg(target_os = "linux")]
        user_timeout: Duration::ZERO,
    });
    ListenerConfig::tcp(address)
        .tcp_socket_options(options)
        // Pingora's sessions and the h2 crate have buffers of their own.
        .l4_buffer(L4BufferSettings::default().read(0))
}

/// Keeps the addresses of the live upstreams fresh.
struct Resolver(Arc<Gateway>);

#[async_trait]
impl BackgroundService for Resolver {
    async fn start(&self, shutdown: ShutdownWatch) {
        let live = || -> Vec<_> {
            let snapshot = self.0.snapshot();
            let upstreams = snapshot.upstreams();
            upstreams
                .map(|(_, upstream)| Arc::clone(upstream))
                .filter(|upstream| !upstream.health.is_off())
                .collect()
        };
        resolve::prime(&live()).await;
        resolve::run(live, shutdown).await;
    }
}

/// Asks the live upstreams whether they are well.
struct Checker(Arc<Gateway>);

#[async_trait]
impl BackgroundService for Checker {
    async fn start(&self, shutdown: ShutdownWatch) {
        let live = || -> Vec<_> {
            let snapshot = self.0.snapshot();
            let upstreams = snapshot.upstreams();
            upstreams
                .map(|(_, upstream)| Arc::clone(upstream))
                .collect()
        };
        let metrics = Arc::clone(&self.0.resources.metrics);
        check::run(live, Arc::clone(&self.0.connector), metrics, shutdown).await;
    }
}

/// Watches how near the end of the memory is.
struct MemoryWatch(Arc<Gateway>);

#[async_trait]
impl BackgroundService for MemoryWatch {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let watching = async {
            let mut tick = tokio::time::interval(memory::LOOK_EVERY);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                self.look();
            }
        };
        tokio::select! {
            () = watching => {}
            // An error is a sender that is gone.
            _ = shutdown.wait_for(|down| *down) => {}
        }
    }
}

impl MemoryWatch {
    fn look(&self) {
        let snapshot = self.0.snapshot();
        let limits = &snapshot.config().limits;
        let resources = &self.0.resources;
        let taken = memory::look(limits);
        let shown = |bytes: Option<u64>| i64::try_from(bytes.unwrap_or(0)).unwrap_or(i64::MAX);
        let metrics = &resources.metrics;
        metrics.memory.set(shown(taken.map(|taken| taken.used)));
        metrics.memory_max.set(shown(taken.map(|taken| taken.most)));
        let changed = resources.memory.note(taken, limits, Instant::now());
        if let (Some(pressure), Some(taken)) = (changed, taken) {
            log::warn!(
                "memory pressure changed: to={} used={} most={}",
                pressure.as_str(),
                taken.used,
                taken.most
            );
        }
    }
}
