//! Where the process is in its life, and who has to know of it.
//!
//! `server` decides (by signals, by deadlines, by what is still under way); the
//! listeners, connections and requests only ask, or wait for their stage. Whoever
//! announces the stages elsewhere, such as to a service manager, watches
//! [`Lifecycle::states`].

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::{mpsc, oneshot, watch};

/// A stage of the process; they follow each other, and some may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nobody is accepted yet.
    Starting,
    /// Everybody is served.
    Serving,
    /// Everybody is served, and told to go elsewhere next time.
    LameDuck,
    /// Nobody is accepted any more; what is under way ends as usual.
    Draining,
    /// What is still under way is told that it ends here.
    Ending,
}

impl Stage {
    /// Returns the name that is shown.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::LameDuck => "lame_duck",
            Self::Draining => "draining",
            Self::Ending => "ending",
        }
    }
}

/// What there is to announce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// The stage.
    pub stage: Stage,
    /// The process that serves from now on in place of this one; set with the
    /// stage that follows [`Stage::Serving`], if at all.
    pub successor: Option<u32>,
}

/// The process that has taken this one's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Successor {
    /// Its pid.
    pub pid: u32,
    /// Its version.
    pub version: String,
}

/// What became of an upgrade: who serves now, or why it is still this process.
pub type Upgraded = Result<Successor, String>;

/// Somebody who asks for an upgrade, and is told here what became of it.
pub type Asker = oneshot::Sender<Upgraded>;

/// The life of the process. One per process.
pub struct Lifecycle {
    state: watch::Sender<State>,
    // Pingora, and whoever waits, wants one bit each.
    leaving: watch::Sender<bool>,
    closed: watch::Sender<bool>,
    admin_closed: watch::Sender<bool>,
    ended: watch::Sender<bool>,
    requests: Arc<AtomicUsize>,
    admin_requests: Arc<AtomicUsize>,
    ask: mpsc::Sender<Asker>,
    asked: Mutex<Option<mpsc::Receiver<Asker>>>,
}

/// Something that is under way; over when it is dropped.
#[derive(Debug)]
pub struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Lifecycle {
    /// Begins with [`Stage::Starting`].
    pub fn new() -> Self {
        let bit = || watch::Sender::new(false);
        let (ask, asked) = mpsc::channel(1);
        Self {
            state: watch::Sender::new(State {
                stage: Stage::Starting,
                successor: None,
            }),
            leaving: bit(),
            closed: bit(),
            admin_closed: bit(),
            ended: bit(),
            requests: Arc::default(),
            admin_requests: Arc::default(),
            ask,
            asked: Mutex::new(Some(asked)),
        }
    }

    /// Goes on to a stage; never back.
    pub fn reach(&self, stage: Stage) {
        self.advance(stage, None);
    }

    /// Leaves the listeners to another process: what is under way ends here.
    pub fn hand_over(&self, successor: u32) {
        self.advance(Stage::Draining, Some(successor));
    }

    fn advance(&self, stage: Stage, successor: Option<u32>) {
        self.state.send_if_modified(|state| {
            let is_news = stage > state.stage;
            if is_news {
                state.stage = stage;
                state.successor = state.successor.or(successor);
            }
            is_news
        });
        let state = self.state();
        // Who stops without a successor can be asked how it goes, to the end.
        let admin_closes = match state.successor {
            Some(_) => Stage::Draining,
            None => Stage::Ending,
        };
        for (bit, from) in [
            (&self.leaving, Stage::LameDuck),
            (&self.closed, Stage::Draining),
            (&self.admin_closed, admin_closes),
            (&self.ended, Stage::Ending),
        ] {
            let is_set = state.stage >= from;
            bit.send_if_modified(|bit| std::mem::replace(bit, is_set) != is_set);
        }
    }

    /// Asks for an upgrade, and waits for what becomes of it: as long as that takes.
    ///
    /// # Errors
    /// Why this process still serves, or why it cannot have a successor.
    pub async fn upgrade(&self) -> Upgraded {
        const STOPPING: &str = "this process is stopping";
        if self.is_leaving() {
            return Err(STOPPING.to_owned());
        }
        let (asker, told) = oneshot::channel();
        if let Err(why) = self.ask.try_send(asker) {
            return Err(match why {
                mpsc::error::TrySendError::Full(_) => "an upgrade is under way already",
                mpsc::error::TrySendError::Closed(_) => STOPPING,
            }
            .to_owned());
        }
        told.await.unwrap_or_else(|_gone| Err(STOPPING.to_owned()))
    }

    /// Returns who asks for upgrades; once.
    pub fn upgrades_asked(&self) -> Option<mpsc::Receiver<Asker>> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.take()
    }

    /// Returns where it is.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Returns every state from now on, for whoever announces them.
    pub fn states(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Returns whether clients are to go elsewhere.
    pub fn is_leaving(&self) -> bool {
        *self.leaving.borrow()
    }

    /// Returns whether the address serves: also if it is by a successor, to whom
    /// the next connection goes.
    pub fn is_ready(&self) -> bool {
        let state = self.state.borrow();
        state.stage <= Stage::Serving || state.successor.is_some()
    }

    /// Turns true when clients are to go elsewhere.
    pub fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    /// Turns true when the data listener is to accept nobody any more.
    pub fn closed(&self) -> watch::Receiver<bool> {
        self.closed.subscribe()
    }

    /// The same for the admin listener.
    pub fn admin_closed(&self) -> watch::Receiver<bool> {
        self.admin_closed.subscribe()
    }

    /// Turns true when what is still under way has to end.
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Waits for that.
    pub async fn end(&self) {
        turned(&mut self.ended()).await;
    }

    /// Counts a request of a client, until what is returned is dropped.
    pub fn request(&self) -> UnderWay {
        UnderWay::begin(&self.requests)
    }

    /// Counts a request to the admin listener.
    pub fn admin_request(&self) -> UnderWay {
        UnderWay::begin(&self.admin_requests)
    }

    /// Returns how many requests of clients are under way.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Returns how many requests to the admin listener are under way.
    pub fn admin_requests(&self) -> usize {
        self.admin_requests.load(Ordering::SeqCst)
    }
}

/// Waits until a bit is true.
pub async fn turned(bit: &mut watch::Receiver<bool>) {
    // No sender, no process.
    bit.wait_for(|is_set| *is_set).await.ok();
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle")
            .field("state", &self.state())
            .field("requests", &self.requests())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(life: &Lifecycle) -> [bool; 4] {
        let bits = [
            life.leaving(),
            life.closed(),
            life.admin_closed(),
            life.ended(),
        ];
        bits.map(|bit| *bit.borrow())
    }

    #[test]
    fn a_process_that_stops_accepts_for_a_while_and_can_be_watched_to_the_end() {
        let life = Lifecycle::new();
        life.reach(Stage::Serving);
        assert_eq!(bits(&life), [false; 4]);
        life.reach(Stage::LameDuck);
        assert_eq!(bits(&life), [true, false, false, false]);
        assert!(!life.is_ready());
        life.reach(Stage::Draining);
        assert_eq!(bits(&life), [true, true, false, false]);
        life.reach(Stage::LameDuck);
        assert_eq!(life.state().stage, Stage::Draining, "never back");
        life.reach(Stage::Ending);
        assert_eq!(bits(&life), [true; 4]);
        assert_eq!(life.state().successor, None);
    }

    #[test]
    fn a_process_with_a_successor_leaves_both_listeners_to_it() {
        let life = Lifecycle::new();
        life.reach(Stage::Serving);
        let mut states = life.states();
        life.hand_over(7);
        assert!(states.has_changed().unwrap());
        let state = State {
            stage: Stage::Draining,
            successor: Some(7),
        };
        assert_eq!(*states.borrow_and_update(), state);
        assert_eq!(bits(&life), [true, true, true, false]);
        assert!(life.is_ready(), "the address is");
        life.reach(Stage::Ending);
        assert_eq!(life.state().successor, Some(7));
    }

    #[test]
    fn what_is_under_way_counts_until_it_is_dropped() {
        let life = Lifecycle::new();
        let one = life.request();
        let other = life.admin_request();
        assert_eq!((life.requests(), life.admin_requests()), (1, 1));
        drop(one);
        drop(other);
        assert_eq!((life.requests(), life.admin_requests()), (0, 0));
    }
}
