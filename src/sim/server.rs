//! The simulator's life: its socket, its connections, its faults.
//!
//! [`Server`] listens or does not; [`Shared`] is what every connection needs.
//!
//! **Invariant:** the port stays ours while the simulator refuses connections:
//! a second socket is bound to it and never listens.

use std::{
    collections::HashMap,
    io,
    net::{Shutdown, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::{Notify, Semaphore, SemaphorePermit},
    task::{AbortHandle, JoinHandle},
};

use super::{Connections, Fault, SimOptions, connection, faults::Connect, record::Log};

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 4096;

/// What answering a request needs.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: SimOptions,
    pub(crate) log: Log,
    pub(crate) faults: FaultList,
    /// Whether connections are accepted.
    pub(crate) listening: AtomicBool,
    /// The open connections' tasks, by number.
    open: Mutex<HashMap<u64, AbortHandle>>,
    total: AtomicU64,
    pub(crate) connections_changed: Notify,
    loaded_at: Mutex<Instant>,
    slots: Option<Semaphore>,
    /// How many requests wait for a slot.
    pub(crate) waiting: AtomicUsize,
    answers: AtomicU64,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, AbortHandle>> {
        // The map is whole between any two of its calls.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn connections(&self) -> Connections {
        Connections {
            open: self.open().len() as u64,
            total: self.total.load(Ordering::Relaxed),
        }
    }

    fn load(&self) {
        let mut loaded_at = self
            .loaded_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *loaded_at = Instant::now() + self.options.load;
    }

    pub(crate) fn is_loading(&self) -> bool {
        !self.options.load.is_zero() && Instant::now() < self.loaded_at()
    }

    /// Waits until the model is loaded.
    pub(crate) async fn loaded(&self) {
        if self.is_loading() {
            tokio::time::sleep_until(self.loaded_at().into()).await;
        }
    }

    fn loaded_at(&self) -> Instant {
        *self
            .loaded_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn next_answer(&self) -> u64 {
        self.answers.fetch_add(1, Ordering::Relaxed)
    }

    /// Waits for a slot; none is needed if they are not limited.
    ///
    /// # Errors
    /// The line is full.
    pub(crate) async fn slot(&self) -> Result<Option<SemaphorePermit<'_>>, LineFull> {
        let Some(slots) = &self.slots else {
            return Ok(None);
        };
        if let Ok(slot) = slots.try_acquire() {
            return Ok(Some(slot));
        }
        let place = Place::take(&self.waiting, self.options.queue).ok_or(LineFull)?;
        let slot = slots
            .acquire()
            .await
            .expect("the semaphore is never closed");
        drop(place);
        Ok(Some(slot))
    }
}

/// No more requests may wait.
pub(crate) struct LineFull;

/// A place in the line, given back on drop: the client may leave while waiting.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(waiting: &'a AtomicUsize, bound: Option<usize>) -> Option<Self> {
        let before = waiting.fetch_add(1, Ordering::Relaxed);
        let place = Self(waiting);
        bound.is_none_or(|bound| before < bound).then_some(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The faults that were set, and how often each is still due.
#[derive(Debug)]
pub(crate) struct FaultList {
    none: Arc<Fault>,
    /// Saves the lock when there is nothing to look for.
    any: AtomicBool,
    faults: Mutex<Vec<Due>>,
}

#[derive(Clone, Debug)]
pub(crate) struct Due {
    pub(crate) fault: Arc<Fault>,
    pub(crate) left: Option<u64>,
}

impl FaultList {
    fn new() -> Self {
        Self {
            none: Arc::default(),
            any: AtomicBool::new(false),
            faults: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Due>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, faults: Vec<Fault>) {
        let due = |fault: Fault| Due {
            left: fault.times,
            fault: Arc::new(fault),
        };
        let mut list = self.lock();
        *list = faults.into_iter().map(due).collect();
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    pub(crate) fn all(&self) -> Vec<Due> {
        self.lock().clone()
    }

    pub(crate) fn none(&self) -> Arc<Fault> {
        self.none.clone()
    }

    /// Returns the fault for a request, one time fewer due.
    pub(crate) fn take(&self, path: &str, model_call: bool) -> Arc<Fault> {
        self.take_if(|fault| fault.connect.is_none() && fault.matches(path, model_call))
            .unwrap_or_else(|| self.none())
    }

    fn take_reset(&self) -> bool {
        self.take_if(|fault| fault.connect == Some(Connect::Reset))
            .is_some()
    }

    fn refuses(&self) -> bool {
        let refuse = |due: &Due| due.fault.connect == Some(Connect::Refuse);
        self.lock().iter().any(refuse)
    }

    fn take_if(&self, wanted: impl Fn(&Fault) -> bool) -> Option<Arc<Fault>> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut list = self.lock();
        let due = list
            .iter_mut()
            .find(|due| due.left != Some(0) && wanted(&due.fault))?;
        due.left = due.left.map(|left| left - 1);
        Some(due.fault.clone())
    }
}

/// The listening half: what the control port and [`Sim`] both steer.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) shared: Arc<Shared>,
    pub(crate) addr: SocketAddr,
    /// Bound but never listening: keeps the port ours while it refuses.
    _reserved: TcpSocket,
    /// Held over awaits: starting and stopping take turns.
    listening: tokio::sync::Mutex<Listening>,
    accepting: Mutex<Option<AbortHandle>>,
}

#[derive(Debug, Default)]
struct Listening {
    stopped: bool,
    task: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn bind(mut options: SimOptions) -> io::Result<Self> {
        let reserved = socket(options.listen)?;
        let addr = reserved.local_addr()?;
        let faults = FaultList::new();
        faults.set(std::mem::take(&mut options.faults));
        let shared = Arc::new(Shared {
            log: Log::new(),
            faults,
            listening: AtomicBool::new(false),
            open: Mutex::default(),
            total: AtomicU64::new(0),
            connections_changed: Notify::new(),
            loaded_at: Mutex::new(Instant::now() + options.load),
            slots: options.slots.map(|slots| Semaphore::new(slots.get())),
            waiting: AtomicUsize::new(0),
            answers: AtomicU64::new(0),
            options,
        });
        Ok(Self {
            shared,
            addr,
            _reserved: reserved,
            listening: tokio::sync::Mutex::default(),
            accepting: Mutex::default(),
        })
    }

    /// Listens or not, as it should.
    pub(crate) async fn apply(&self) -> io::Result<()> {
        let mut listening = self.listening.lock().await;
        self.apply_to(&mut listening).await
    }

    async fn apply_to(&self, listening: &mut Listening) -> io::Result<()> {
        let wanted = !listening.stopped && !self.shared.faults.refuses();
        if wanted && listening.task.is_none() {
            let listener = socket(self.addr)?.listen(BACKLOG)?;
            let task = tokio::spawn(accept(self.shared.clone(), listener));
            *self.accepting() = Some(task.abort_handle());
            listening.task = Some(task);
        } else if !wanted && let Some(task) = listening.task.take() {
            task.abort();
            // Once it is joined, its socket is closed.
            if let Err(error) = task.await
                && error.is_panic()
            {
                log::error!(
                    "simulator stopped accepting: addr={} error={error}",
                    self.addr
                );
            }
        }
        self.shared.listening.store(wanted, Ordering::Release);
        Ok(())
    }

    fn accepting(&self) -> MutexGuard<'_, Option<AbortHandle>> {
        self.accepting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn stop(&self) {
        let mut listening = self.listening.lock().await;
        listening.stopped = true;
        self.apply_to(&mut listening)
            .await
            .expect("only listening can fail, and it stops");
        loop {
            let changed = self.shared.connections_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let tasks: Vec<AbortHandle> = self.shared.open().values().cloned().collect();
            if tasks.is_empty() {
                return;
            }
            tasks.iter().for_each(AbortHandle::abort);
            changed.await;
        }
    }

    pub(crate) async fn start_again(&self) -> io::Result<()> {
        let mut listening = self.listening.lock().await;
        if std::mem::take(&mut listening.stopped) {
            self.shared.load();
        }
        // A process that is just being forked elsewhere in this one holds the
        // old socket until it execs.
        let until = Instant::now() + Duration::from_secs(2);
        loop {
            match self.apply_to(&mut listening).await {
                Err(why) if why.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                done => return done,
            }
        }
    }

    pub(crate) async fn set_faults(&self, faults: Vec<Fault>) -> io::Result<()> {
        let mut listening = self.listening.lock().await;
        self.shared.faults.set(faults);
        self.apply_to(&mut listening).await
    }

    /// Ends all tasks, without waiting.
    pub(crate) fn abort(&self) {
        if let Some(task) = self.accepting().take() {
            task.abort();
        }
        self.shared.open().values().for_each(AbortHandle::abort);
    }
}

fn socket(addr: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    Ok(socket)
}

/// A listener that refuses from the moment it is dropped, even while a process
/// that is just being forked elsewhere in this one still holds its socket.
struct Refusing(TcpListener);

impl Drop for Refusing {
    fn drop(&mut self) {
        SockRef::from(&self.0).shutdown(Shutdown::Both).ok();
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    let Refusing(listener) = &Refusing(listener);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::warn!("simulator cannot accept: error={error}");
                // Most likely out of descriptors: some will be given back.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let number = shared.total.fetch_add(1, Ordering::Relaxed) + 1;
        let reset = shared.faults.take_reset();
        let socket = if reset {
            stream.set_zero_linger()
        } else {
            stream.set_nodelay(true)
        };
        if let Err(error) = socket {
            log::debug!("client left at once: connection={number} error={error}");
        }
        if reset {
            shared.connections_changed.notify_waiters();
            continue;
        }
        // Held over the spawn, so that the task cannot end before it is listed.
        let mut open = shared.open();
        let listed = Listed {
            shared: shared.clone(),
            number,
        };
        let task = tokio::spawn(async move {
            // Dropped after the connection: who waits for the one sees the other.
            let listed = listed;
            connection::serve(listed.shared.clone(), stream, number).await;
        });
        open.insert(number, task.abort_handle());
        drop(open);
        shared.connections_changed.notify_waiters();
    }
}

/// A connection in the list of the open ones.
struct Listed {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.shared.open().remove(&self.number);
        self.shared.connections_changed.notify_waiters();
    }
}
