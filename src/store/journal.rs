//! The thread that writes to a store, and the queue to it.
//!
//! What is to be added waits at most a quarter of a second and is then written
//! in one transaction; that, and what waits in the queue, is what is lost when
//! the process is killed. While the store cannot be written to, what waits is
//! added up by key and period, so that it takes no more room than there are
//! keys; it is written when the store is well again.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{Amount, Opened, Place, Store, StoreError, Usage};
use crate::{
    logging::Seldom,
    metrics::Metrics,
    worker::{Inbox, Next, Worker, Workers},
};

/// How long something waits at most before it is written.
const FLUSH: Duration = Duration::from_millis(250);
/// How long a store that failed is left alone.
const RETRY: Duration = Duration::from_secs(1);
/// How long the last of it is tried to be written when the process stops.
const LAST_TRY: Duration = Duration::from_secs(8);
/// The most that waits in the queue to the thread, in bytes.
const QUEUE_MAX: usize = 4 * 1024 * 1024;
/// What an entry of it takes, about.
const ENTRY: usize = 160;
/// The most keys and periods that are remembered; a keys file has some 30,000.
const PENDING_MAX: usize = 100_000;

/// What is called with what a store knew.
type Done = Box<dyn FnOnce(Vec<Usage>) + Send>;

enum Order {
    Load { periods: Vec<String>, done: Done },
    Add(Usage),
}

/// A store that is written behind. One per process.
pub struct Journal {
    worker: Arc<Worker<Order>>,
    metrics: Arc<Metrics>,
    dropped: Seldom,
}

/// The journal of the process; kept beside the snapshots.
#[derive(Debug, Default)]
pub struct Journals(Mutex<Option<(Place, Arc<Journal>)>>);

impl Journals {
    /// Returns the journal, started by the first call. Another place than the
    /// first takes a restart.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn open(
        &self,
        place: &Place,
        metrics: &Arc<Metrics>,
        workers: &Workers,
    ) -> std::io::Result<Arc<Journal>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((other, journal)) = &*open {
            if other != place {
                log::warn!("another store needs a restart: the first one is used on");
            }
            return Ok(Arc::clone(journal));
        }
        let journal = Arc::new(Journal::start(place.clone(), metrics, workers)?);
        *open = Some((place.clone(), Arc::clone(&journal)));
        Ok(journal)
    }
}

impl Journal {
    fn start(place: Place, metrics: &Arc<Metrics>, workers: &Workers) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let writer = Writer {
            place,
            store: None,
            loads: Vec::new(),
            pending: HashMap::new(),
            written: HashMap::new(),
            metrics: Arc::clone(metrics),
            failures: Seldom::default(),
            failing: false,
        };
        let run = move |inbox| writer.run(&inbox, &runtime);
        Ok(Self {
            worker: Worker::start("store", QUEUE_MAX, workers, run)?,
            metrics: Arc::clone(metrics),
            dropped: Seldom::default(),
        })
    }

    /// Reads what was used in these periods, and calls `done` with it, on the
    /// thread, as soon as the store can be read; before anything is written that
    /// is added from now on.
    pub fn load(&self, periods: Vec<String>, done: impl FnOnce(Vec<Usage>) + Send + 'static) {
        let done = Box::new(done);
        if self
            .worker
            .offer(Order::Load { periods, done }, ENTRY)
            .is_err()
        {
            log::error!("the store's queue is full: what was used is not known");
        }
    }

    /// Adds to what was used; never waits. What has no room is lost, and counted.
    pub fn add(&self, used: Usage) {
        if self.worker.offer(Order::Add(used), ENTRY).is_err() {
            self.metrics.store_dropped.inc();
            if let Some(others) = self.dropped.due(Instant::now()) {
                log::error!(
                    "no room in the queue to the store, use is not recorded: others={others}"
                );
            }
        }
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").finish_non_exhaustive()
    }
}

type Sums = HashMap<(Arc<str>, String), Amount>;

/// The thread.
struct Writer {
    place: Place,
    store: Option<Box<dyn Store>>,
    loads: Vec<(Vec<String>, Done)>,
    /// What is not written yet.
    pending: Sums,
    /// What is written, of the periods that were asked for or added to: should
    /// the store have to begin anew, it begins with this.
    written: Sums,
    metrics: Arc<Metrics>,
    failures: Seldom,
    failing: bool,
}

impl Writer {
    fn run(mut self, inbox: &Inbox<Order>, runtime: &tokio::runtime::Runtime) {
        let mut due = Instant::now();
        let mut last_try = None;
        loop {
            let now = Instant::now();
            let idle = self.pending.is_empty() && self.loads.is_empty();
            let wait = if idle {
                Duration::from_secs(1)
            } else {
                due.saturating_duration_since(now)
            };
            match inbox.next(wait) {
                Next::Item(order) => {
                    if idle {
                        // A question is answered at once.
                        due = match order {
                            Order::Load { .. } => Instant::now(),
                            Order::Add(_) => Instant::now() + FLUSH,
                        };
                    }
                    self.take(order);
                }
                Next::Nothing => {}
                Next::Closed => {
                    let until = *last_try.get_or_insert_with(|| Instant::now() + LAST_TRY);
                    let left = self.pending.len();
                    if left == 0 || Instant::now() >= until {
                        if left > 0 {
                            log::error!(
                                "what was used is lost, the store cannot be written to: entries={left}"
                            );
                        }
                        return;
                    }
                }
            }
            let idle = self.pending.is_empty() && self.loads.is_empty();
            if !idle && Instant::now() >= due {
                let well = runtime.block_on(self.work());
                due = Instant::now() + if well { FLUSH } else { RETRY };
                if last_try.is_some() {
                    due = Instant::now() + FLUSH;
                }
            }
            let waiting = i64::try_from(self.pending.len()).unwrap_or(i64::MAX);
            self.metrics.store_queue.set(waiting);
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Load { periods, done } => self.loads.push((periods, done)),
            Order::Add(used) => {
                let key = (used.key, used.period);
                if self.pending.len() >= PENDING_MAX && !self.pending.contains_key(&key) {
                    self.metrics.store_dropped.inc();
                    return;
                }
                self.pending.entry(key).or_default().add(used.amount);
            }
        }
    }

    /// Does what there is to do; returns whether the store is well.
    async fn work(&mut self) -> bool {
        let came = match self.opened().await {
            Ok(()) => match self.read().await {
                Ok(()) => self.write().await.map_err(|why| ("write", why)),
                Err(why) => Err(("read", why)),
            },
            Err(why) => Err(("open", why)),
        };
        let Err((what, why)) = came else {
            if std::mem::take(&mut self.failing) {
                log::info!("the store works again");
            }
            return true;
        };
        self.failing = true;
        self.metrics.store_errors.with_label_values(&[what]).inc();
        // After a failure nobody knows what state a connection is in. What is
        // damaged is looked at when it is opened, and moved aside.
        self.close().await;
        if let Some(others) = self.failures.due(Instant::now()) {
            log::error!(
                "the store does not work, it is tried again: what={what} waiting={} others={others} cause={why}",
                self.pending.len()
            );
        }
        false
    }

    async fn close(&mut self) {
        if let Some(store) = self.store.take() {
            store.close().await;
        }
    }

    async fn opened(&mut self) -> Result<(), StoreError> {
        if self.store.as_ref().is_some_and(|store| store.is_there()) {
            return Ok(());
        }
        if self.store.is_some() {
            log::error!("the store is gone, another one is opened");
            self.metrics.store_errors.with_label_values(&["gone"]).inc();
            self.close().await;
        }
        let Opened { store, is_new } = self.place.open().await?;
        self.store = Some(store);
        if is_new {
            for (key, amount) in self.written.drain() {
                self.pending.entry(key).or_default().add(amount);
            }
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<(), StoreError> {
        let Some(store) = &mut self.store else {
            return Ok(());
        };
        while let Some((periods, _)) = self.loads.last() {
            let all = store.usage(periods).await?;
            for one in &all {
                let key = (Arc::clone(&one.key), one.period.clone());
                self.written.insert(key, one.amount);
            }
            if let Some((_, done)) = self.loads.pop() {
                done(all);
            }
        }
        Ok(())
    }

    async fn write(&mut self) -> Result<(), StoreError> {
        let Some(store) = &mut self.store else {
            return Ok(());
        };
        if self.pending.is_empty() {
            return Ok(());
        }
        let all: Vec<Usage> = self
            .pending
            .iter()
            .map(|((key, period), amount)| Usage {
                key: Arc::clone(key),
                period: period.clone(),
                amount: *amount,
            })
            .collect();
        store.add(&all).await?;
        for (key, amount) in self.pending.drain() {
            self.written.entry(key).or_default().add(amount);
        }
        if self.written.len() > PENDING_MAX {
            // Periods long over; what is read of them is in the store.
            self.written.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, sync::mpsc};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn usage(key: &str, tokens: u64) -> Usage {
        Usage {
            key: key.into(),
            period: "2026-11".to_owned(),
            amount: Amount {
                requests: 1,
                tokens,
                money: 0,
            },
        }
    }

    fn loaded(journal: &Journal) -> Vec<Usage> {
        let (send, receive) = mpsc::channel();
        journal.load(vec!["2026-11".to_owned()], move |all| {
            send.send(all).unwrap();
        });
        receive.recv_timeout(LONG).unwrap()
    }

    fn journal(file: &Path) -> (Journal, Workers, Arc<Metrics>) {
        let (workers, metrics) = (Workers::default(), Arc::new(Metrics::new()));
        let url = format!("sqlite:{}", file.display());
        let place = Place::of(&url, Path::new(".")).unwrap();
        let journal = Journal::start(place, &metrics, &workers).unwrap();
        (journal, workers, metrics)
    }

    #[test]
    fn what_was_added_is_written_before_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("forebay.db");
        let (first, workers, metrics) = journal(&file);
        assert_eq!(loaded(&first), []);
        for _ in 0..1000 {
            first.add(usage("a", 2));
        }
        assert!(workers.stop(LONG));
        assert_eq!(metrics.store_dropped.get(), 0);
        let (second, workers, _) = journal(&file);
        let all = loaded(&second);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].amount.tokens, 2000);
        assert_eq!(all[0].amount.requests, 1000);
        assert!(workers.stop(LONG));
    }

    #[test]
    fn what_cannot_be_opened_is_tried_again_and_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("folder");
        // A file stands where the folder should be.
        fs::write(&missing, "").unwrap();
        let (journal_, workers, metrics) = journal(&missing.join("forebay.db"));
        let (send, receive) = mpsc::channel();
        journal_.load(vec!["2026-11".to_owned()], move |all| {
            send.send(all).unwrap()
        });
        journal_.add(usage("a", 3));
        let errors = metrics.store_errors.with_label_values(&["open"]);
        let until = Instant::now() + LONG;
        while errors.get() == 0 && Instant::now() < until {
            std::thread::yield_now();
        }
        assert!(receive.try_recv().is_err());
        fs::remove_file(&missing).unwrap();
        assert_eq!(receive.recv_timeout(LONG).unwrap(), []);
        assert!(workers.stop(LONG));
        let (second, workers, _) = journal(&missing.join("forebay.db"));
        assert_eq!(loaded(&second)[0].amount.tokens, 3);
        assert!(workers.stop(LONG));
    }
}
