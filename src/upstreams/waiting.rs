//! The line in front of a group whose upstreams are all busy.
//!
//! Start at [`Waiting::enter`]. Whoever gives a slot back hands it on: under the
//! line's lock the first who can use it ([`queue`](super::queue) says who that
//! is) is given the [`Slot`] itself, so nobody is woken for nothing and nobody
//! who comes later is quicker. One line serves a group's name through all
//! configurations, and everybody in it looks at the upstreams of the latest.
//!
//! **Invariants:**
//! - At rest nobody waits for a slot that is free and that he may have
//!   (`shares` keeps a few). Whoever frees one first
//!   counts it as free and then asks whether anybody waits; whoever comes first
//!   counts as waiting and then looks. Who finds the lock taken leaves a note,
//!   and the holder reads it after he let go. What no slot tells of, such as the
//!   end of a pause, is found by [`Place::look_again`].
//! - A slot that was given to somebody who has just left is given back like any
//!   other: [`Slot`] does that when it is dropped.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::{
    group::{Group, Pick},
    queue::{BATCH_EVERY, Key, Look, Queue, Refused, Rules, Ticket},
    shares::{Places, Shares},
    upstream::{Refusal, Slot, Upstream},
};
use crate::context::Class;

/// How often notes of those who found the lock taken are read; what is noted
/// after that is found by [`Place::look_again`].
const NOTES_MAX: u32 = 8;
/// How long a look at everything counts.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long after an interactive request places are kept free of batch.
const RESERVED: Duration = Duration::from_secs(60);
/// How many different wishes one hand-out remembers as not to be met.
const WISHES_MAX: usize = 8;

/// The line in front of one group.
pub struct Waiting {
    inside: Mutex<Inside>,
    /// How many wait.
    len: AtomicUsize,
    /// Whether a slot was freed while the lock was taken.
    note: AtomicBool,
    /// Batch requests that are being worked on.
    batch: AtomicU32,
    /// Who has how many places.
    shares: Mutex<Shares>,
    epoch: Instant,
    /// When the last interactive request came, in seconds since `epoch`, from 1;
    /// 0 means never.
    interactive: AtomicU64,
}

struct Inside {
    queue: Queue<Waiter>,
    looked: Instant,
}

struct Waiter {
    seeker: Seeker,
    tell: oneshot::Sender<Told>,
}

/// What a request needs.
#[derive(Clone, Debug)]
pub struct Seeker {
    /// The group, as its configuration has it.
    pub group: Arc<Group>,
    /// The model, by the name it is sent with.
    pub model: Arc<str>,
    /// What was tried before, of this group and of others.
    pub tried: Vec<Arc<Upstream>>,
    /// The same for all requests of one conversation.
    pub affinity: u64,
    /// The only upstream that will do.
    pub pin: Option<Arc<Upstream>>,
    /// How much it wants one.
    pub effort: Effort,
    /// How urgent it is.
    pub class: Class,
    /// Whose it is.
    pub key: Key,
}

/// How much a request wants an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// One that may be used now.
    Sensible,
    /// If there is none, any that is not switched off.
    Insist,
}

/// What came of [`Waiting::enter`].
#[derive(Debug)]
pub enum Entered {
    /// A slot was free.
    Slot(Slot),
    /// Nobody is left to wait for.
    Nobody,
    /// It waits here.
    Waiting(Place),
    /// It may not wait.
    Refused(Refused),
}

/// What who waits is told, once.
#[derive(Debug)]
pub enum Told {
    /// Its turn has come.
    Slot(Slot),
    /// Nobody is left to wait for.
    Nobody,
    /// Its place went to somebody who has fewer.
    TurnedAway(Refused),
}

/// A place in line; given up when dropped.
pub struct Place {
    line: Arc<Waiting>,
    ticket: Ticket,
    told: oneshot::Receiver<Told>,
}

/// A request that is being worked on, as far as it is counted here; part of its
/// [`Slot`].
pub(super) struct Lease {
    line: Arc<Waiting>,
    batch: bool,
    /// Whose share it is a part of.
    key: Option<Key>,
}

/// What a look came to.
enum Found {
    Slot(Slot),
    Busy,
    /// What is free is kept from its key.
    Enough,
    Nobody,
}

impl Default for Waiting {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            inside: Mutex::new(Inside {
                queue: Queue::default(),
                looked: now,
            }),
            len: AtomicUsize::new(0),
            note: AtomicBool::new(false),
            batch: AtomicU32::new(0),
            shares: Mutex::default(),
            epoch: now,
            interactive: AtomicU64::new(0),
        }
    }
}

impl Waiting {
    /// Takes a slot for a request, or lets it wait, or turns it away. Nobody
    /// overtakes: a slot that somebody who waits can use is given to him.
    pub fn enter(self: &Arc<Self>, seeker: Seeker, rules: Rules, now: Instant) -> Entered {
        self.came(seeker.class, now);
        if self.len.load(SeqCst) == 0 {
            match seeker.look(now) {
                Found::Slot(slot) => return Entered::Slot(slot),
                Found::Nobody => return Entered::Nobody,
                Found::Busy | Found::Enough => {}
            }
        }
        let entered = self.locked(now, |inside| self.enter_locked(inside, seeker, rules, now));
        let Entered::Waiting(mut place) = entered else {
            return entered;
        };
        // Its turn may have come already. Not under the lock: a place that is
        // dropped takes it.
        match place.told.try_recv() {
            Ok(Told::Slot(slot)) => Entered::Slot(slot),
            Ok(Told::Nobody) => Entered::Nobody,
            Ok(Told::TurnedAway(refused)) => Entered::Refused(refused),
            Err(_nothing_yet) => Entered::Waiting(place),
        }
    }

    fn enter_locked(
        self: &Arc<Self>,
        inside: &mut Inside,
        seeker: Seeker,
        rules: Rules,
        now: Instant,
    ) -> Entered {
        let (key, class) = (seeker.key.clone(), seeker.class);
        inside.queue.came(&key, now);
        self.shares().came(&key, now);
        let mut found = seeker.look(now);
        if let Found::Slot(slot) = &found
            && inside
                .queue
                .any(|waiter| waiter.seeker.could_use(slot.upstream()))
        {
            // First those who wait. What they may not have, or leave, is for it.
            drop(found);
            self.hand_out(inside, now);
            found = seeker.look(now);
        }
        match found {
            Found::Nobody => return Entered::Nobody,
            Found::Slot(slot) => return Entered::Slot(slot),
            Found::Busy | Found::Enough => {}
        }
        match inside.queue.make_room(&key, class, rules, now) {
            Err(refused) => return Entered::Refused(refused),
            Ok(Some((waiter, refused))) => waiter.tell(Told::TurnedAway(refused)),
            Ok(None) => {}
        }
        let (tell, told) = oneshot::channel();
        let ticket = inside.queue.push(key, class, Waiter { seeker, tell }, now);
        // Counted as waiting first, then looked: see the invariants.
        self.len.store(inside.queue.len(), SeqCst);
        self.hand_out(inside, now);
        Entered::Waiting(Place {
            line: Arc::clone(self),
            ticket,
            told,
        })
    }

    /// Notes that a slot of one of its upstreams is free, or that there are more
    /// of them.
    pub(super) fn freed(&self) {
        if self.len.load(SeqCst) == 0 {
            return;
        }
        self.note.store(true, SeqCst);
        self.read_notes();
    }

    /// Returns how many wait.
    pub fn len(&self) -> usize {
        self.len.load(SeqCst)
    }

    /// Returns whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Has everybody look at another configuration of the group from now on.
    pub(super) fn renew(&self, group: &Arc<Group>, now: Instant) {
        if self.len.load(SeqCst) == 0 {
            return;
        }
        self.locked(now, |inside| {
            for waiter in inside.queue.each() {
                waiter.seeker.renew(group);
            }
            self.hand_out(inside, now);
        });
    }

    /// Returns how many of a class wait.
    pub fn len_of(&self, class: Class) -> usize {
        self.locked(Instant::now(), |inside| inside.queue.len_of(class))
    }

    /// Gives to those who wait, in their order, whatever is free.
    fn hand_out(&self, inside: &mut Inside, now: Instant) {
        // Many want the same: one look says no to all of them.
        let mut in_vain: SmallVec<[Wish; WISHES_MAX]> = SmallVec::new();
        let mut look = |waiter: &Waiter| {
            let seeker = &waiter.seeker;
            if in_vain.iter().any(|wish| wish.is_of(seeker)) {
                return Look::Not;
            }
            match seeker.look(now) {
                Found::Slot(slot) => Look::Fits(Told::Slot(slot)),
                Found::Nobody => Look::Over(Told::Nobody),
                found @ (Found::Busy | Found::Enough) => {
                    if in_vain.len() < WISHES_MAX {
                        let enough = matches!(found, Found::Enough);
                        in_vain.extend(Wish::of(seeker, enough));
                    }
                    Look::Not
                }
            }
        };
        while let Some((waiter, told)) = inside.queue.take(now, &mut look) {
            waiter.tell(told);
        }
        self.len.store(inside.queue.len(), SeqCst);
    }

    fn locked<R>(&self, now: Instant, work: impl FnOnce(&mut Inside) -> R) -> R {
        let result = {
            let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
            let result = work(&mut inside);
            self.len.store(inside.queue.len(), SeqCst);
            if self.note.swap(false, SeqCst) {
                self.hand_out(&mut inside, now);
            }
            result
        };
        self.read_notes();
        result
    }

    /// Hands out what was freed while somebody else had the lock. Never waits
    /// for it: a slot may be given back by whoever has it.
    fn read_notes(&self) {
        for _ in 0..NOTES_MAX {
            if !self.note.load(SeqCst) {
                return;
            }
            let mut inside = match self.inside.try_lock() {
                Ok(inside) => inside,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // Whoever has it reads the note.
                Err(TryLockError::WouldBlock) => return,
            };
            self.note.store(false, SeqCst);
            self.hand_out(&mut inside, Instant::now());
        }
    }

    fn came(&self, class: Class, now: Instant) {
        if class == Class::Interactive {
            let secs = self.secs(now);
            // Read before written: the line stays shared between the cores.
            if self.interactive.load(Relaxed) != secs {
                self.interactive.store(secs, Relaxed);
            }
        }
    }

    /// Returns how many batch requests may be worked on: all places but what is
    /// kept for interactive ones, a fifth, as long as some have come lately.
    fn batch_max(&self, places: Option<u32>, now: Instant) -> u32 {
        let last = self.interactive.load(Relaxed);
        let lately = last != 0 && self.secs(now).saturating_sub(last) <= RESERVED.as_secs();
        match places {
            Some(places) if lately && places > 1 => places - places.div_ceil(BATCH_EVERY),
            _ => u32::MAX,
        }
    }

    /// Counts a request that has taken its slot past the line; `false` if the
    /// slot is kept from its class now.
    pub fn admits(self: &Arc<Self>, slot: &mut Slot, class: Class, places: Option<u32>) -> bool {
        if class == Class::Interactive {
            return true;
        }
        let lease = self.class_lease(class, places, Instant::now());
        let has_leave = lease.is_some();
        if let Some(lease) = lease {
            slot.hold(lease);
        }
        has_leave
    }

    /// Counts a request that has just got a slot, if there may be one more of
    /// its class, and of its key.
    fn lease(self: &Arc<Self>, seeker: &Seeker, now: Instant) -> Option<Lease> {
        let mut lease = self.class_lease(seeker.class, seeker.group.places(), now)?;
        if let Some(places) = seeker.places(now) {
            // Its own is taken already.
            let free = places.free.saturating_add(1);
            let mut shares = self.shares();
            if !shares.allows(&seeker.key, Places { free, ..places }, now) {
                return None;
            }
            if shares.begin(&seeker.key, now) {
                lease.key = Some(seeker.key.clone());
            }
        }
        Some(lease)
    }

    fn class_lease(
        self: &Arc<Self>,
        class: Class,
        places: Option<u32>,
        now: Instant,
    ) -> Option<Lease> {
        if class == Class::Batch {
            let most = self.batch_max(places, now);
            let more = |now| (now < most).then_some(now + 1);
            self.batch.fetch_update(SeqCst, SeqCst, more).ok()?;
        }
        Some(Lease {
            line: Arc::clone(self),
            batch: class == Class::Batch,
            key: None,
        })
    }

    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn secs(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_secs() + 1
    }
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting")
            .field("len", &self.len.load(Relaxed))
            .finish_non_exhaustive()
    }
}

impl Waiter {
    fn tell(self, told: Told) {
        // Whoever has left gives back what he was given.
        drop(self.tell.send(told));
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.batch {
            self.line.batch.fetch_sub(1, SeqCst);
        }
        if let Some(key) = &self.key {
            self.line.shares().end(key, Instant::now());
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lease")
    }
}

impl Seeker {
    fn look(&self, now: Instant) -> Found {
        // Nothing is kept from who has nobody left to wait for.
        if self.anybody_is_left(now) {
            if !self.may_begin(now) {
                return Found::Busy;
            }
            if !self.may_have_more(now) {
                return Found::Enough;
            }
        }
        let mut found = match &self.pin {
            Some(pin) => self.look_at(pin, now),
            None => self.look_around(now),
        };
        if let Found::Slot(slot) = &mut found {
            // Not before there is a slot: a lease that is given back without
            // one is told to nobody.
            match self.group.waiting.lease(self, now) {
                Some(lease) => slot.hold(lease),
                None => return Found::Busy,
            }
        }
        found
    }

    /// Returns whether what is free is not kept from its key.
    fn may_have_more(&self, now: Instant) -> bool {
        let places = self.places(now);
        let shares = self.group.waiting.shares();
        places.is_none_or(|places| places.free == 0 || shares.allows(&self.key, places, now))
    }

    /// Returns the group's places, as far as they are bounded.
    fn places(&self, now: Instant) -> Option<Places> {
        let is_useful = |upstream: &Arc<Upstream>| self.is_useful(upstream);
        self.group.places_for(&self.model, is_useful, now)
    }

    /// Returns whether it could have a slot now, or when its turn has come.
    fn anybody_is_left(&self, now: Instant) -> bool {
        self.useful().any(|upstream| match self.effort {
            Effort::Sensible => upstream.available(&self.model, now),
            Effort::Insist => !upstream.is_closed(),
        })
    }

    /// Looks at another configuration of the group from now on.
    fn renew(&mut self, group: &Arc<Group>) {
        if let Some(pin) = &mut self.pin {
            match group.find(&pin.name) {
                Some(new) => *pin = Arc::clone(new),
                // It goes on with what it came for.
                None => return,
            }
        }
        self.group = Arc::clone(group);
    }

    /// Returns whether nothing is kept from its class now.
    fn may_begin(&self, now: Instant) -> bool {
        let line = &self.group.waiting;
        match self.class {
            Class::Interactive => true,
            Class::Batch => line.batch.load(SeqCst) < line.batch_max(self.group.places(), now),
        }
    }

    fn look_at(&self, pin: &Arc<Upstream>, now: Instant) -> Found {
        match pin.try_admit(&self.model, now) {
            Ok(slot) => Found::Slot(slot),
            Err(Refusal::Busy) => Found::Busy,
            Err(Refusal::Unavailable) if self.effort == Effort::Sensible => Found::Nobody,
            Err(Refusal::Unavailable) if pin.is_closed() => Found::Nobody,
            Err(Refusal::Unavailable) => pin
                .try_acquire(&self.model, now)
                .map_or(Found::Busy, Found::Slot),
        }
    }

    fn look_around(&self, now: Instant) -> Found {
        let group = &*self.group;
        match group.pick(&self.model, &self.tried, self.affinity, now) {
            Pick::Chosen(slot) => Found::Slot(slot),
            Pick::Busy => Found::Busy,
            Pick::Down(_) | Pick::Exhausted if self.effort == Effort::Sensible => Found::Nobody,
            Pick::Down(_) | Pick::Exhausted => {
                match group.pick_any(&self.model, &self.tried, now) {
                    Some(slot) => Found::Slot(slot),
                    None if self.useful().any(|upstream| !upstream.is_closed()) => Found::Busy,
                    None => Found::Nobody,
                }
            }
        }
    }

    /// Returns the upstreams that would do.
    fn useful(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        let upstreams = self.group.upstreams.iter();
        upstreams.filter(|upstream| self.is_useful(upstream))
    }

    fn is_useful(&self, upstream: &Arc<Upstream>) -> bool {
        match &self.pin {
            Some(pin) => Arc::ptr_eq(pin, upstream),
            None => {
                let mut tried = self.tried.iter();
                upstream.serves(&self.model) && !tried.any(|tried| upstream.is_same_server(tried))
            }
        }
    }

    /// Returns whether a slot of this upstream, as any configuration has it,
    /// would do.
    fn could_use(&self, upstream: &Upstream) -> bool {
        self.useful().any(|useful| useful.is_same_server(upstream))
    }
}

/// What a seeker that wants nothing special wants, to know others by it.
struct Wish {
    group: Arc<Group>,
    model: Arc<str>,
    class: Class,
    /// The only key that is meant.
    key: Option<Key>,
}

impl Wish {
    fn of(seeker: &Seeker, only_its_key: bool) -> Option<Self> {
        Self::is_plain(seeker).then(|| Self {
            key: only_its_key.then(|| seeker.key.clone()),
            group: Arc::clone(&seeker.group),
            model: Arc::clone(&seeker.model),
            class: seeker.class,
        })
    }

    fn is_of(&self, seeker: &Seeker) -> bool {
        Self::is_plain(seeker)
            && Arc::ptr_eq(&self.group, &seeker.group)
            && self.class == seeker.class
            && self.key.as_ref().is_none_or(|key| *key == seeker.key)
            && self.model == seeker.model
    }

    fn is_plain(seeker: &Seeker) -> bool {
        seeker.tried.is_empty() && seeker.pin.is_none() && seeker.effort == Effort::Sensible
    }
}

impl Place {
    /// Waits for its turn. Not to be called again after it has come.
    pub async fn turn(&mut self) -> Told {
        // Nobody forgets to tell: what is taken out of line is told.
        (&mut self.told).await.unwrap_or(Told::Nobody)
    }

    /// Gives the place up, unless its turn has just come.
    pub fn leave(mut self) -> Option<Told> {
        let line = Arc::clone(&self.line);
        line.locked(Instant::now(), |inside| inside.queue.remove(&self.ticket));
        self.told.try_recv().ok()
    }

    /// Returns the position, from 1; `None` if its turn has come.
    pub fn position(&self) -> Option<usize> {
        let now = Instant::now();
        self.line
            .locked(now, |inside| inside.queue.position(&self.ticket))
    }

    /// Hands out what became free by the passing of time. Everybody who waits
    /// calls it now and then; mostly it was somebody else's turn to look.
    pub fn look_again(&self, now: Instant) {
        self.line.locked(now, |inside| {
            if now.saturating_duration_since(inside.looked) >= LOOK_EVERY {
                inside.looked = now;
                self.line.hand_out(inside, now);
            }
        });
    }

    /// Returns when those who wait now will have been served.
    pub fn retry_after(&self) -> Duration {
        let now = Instant::now();
        self.line
            .locked(now, |inside| inside.queue.retry_after(now))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What it was told but did not hear is dropped with the receiver.
        drop(
            self.line
                .locked(Instant::now(), |inside| inside.queue.remove(&self.ticket)),
        );
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place")
            .field("ticket", &self.ticket)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::atomic::AtomicU32, thread};

    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::{super::group::tests::cool, *};
    use crate::{
        config,
        upstreams::{Previous, Secrets},
    };

    fn group(name: &str, yaml: &str, previous: &[Arc<Group>]) -> Arc<Group> {
        let config: config::Group = serde_yaml::from_str(yaml).unwrap();
        let none = HashSet::new();
        Group::build(
            name,
            &config,
            &Secrets::new(),
            &none,
            &Previous::new(previous),
        )
        .unwrap()
    }

    const ONE: &str = "{ upstreams: [ { name: a, url: 'http://10.0.0.1', concurrent: 1 } ] }";
    const TWO: &str = "{ upstreams: [
        { name: a, url: 'http://10.0.0.1', concurrent: 1, models: [m, a] },
        { name: b, url: 'http://10.0.0.2', concurrent: 1, models: [m, b] } ] }";

    fn seeker(group: &Arc<Group>, model: &str) -> Seeker {
        Seeker {
            group: Arc::clone(group),
            model: model.into(),
            tried: Vec::new(),
            affinity: 0,
            pin: None,
            effort: Effort::Sensible,
            class: Class::Interactive,
            key: Key::Name("key".into()),
        }
    }

    fn enter_as(group: &Arc<Group>, seeker: Seeker, key: &str) -> Entered {
        let key = Key::Name(key.into());
        let seeker = Seeker { key, ..seeker };
        let rules = Rules {
            size: 100,
            wait: None,
        };
        group.waiting.enter(seeker, rules, Instant::now())
    }

    fn enter(group: &Arc<Group>, model: &str) -> Entered {
        enter_as(group, seeker(group, model), "key")
    }

    fn slot(entered: Entered) -> Slot {
        match entered {
            Entered::Slot(slot) => slot,
            other => panic!("{other:?}"),
        }
    }

    fn place(entered: Entered) -> Place {
        match entered {
            Entered::Waiting(place) => place,
            other => panic!("{other:?}"),
        }
    }

    fn told(place: Place) -> Slot {
        match place.leave() {
            Some(Told::Slot(slot)) => slot,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_goes_past_the_line_leaves_what_is_kept_from_its_class() {
        let (group, now) = (group("g", TWO, &[]), Instant::now());
        drop(enter(&group, "m"));
        let batch = Seeker {
            class: Class::Batch,
            ..seeker(&group, "m")
        };
        // Of two places one is kept from batch while others come.
        let first = slot(enter_as(&group, batch, "batch"));
        let free = group.upstreams.iter().find_map(|other| {
            let is_taken = Arc::ptr_eq(other, first.upstream());
            (!is_taken).then(|| other.try_in_panic(&"m".into(), now).unwrap())
        });
        let mut second = free.unwrap();
        let admits = |slot: &mut Slot, class| group.waiting.admits(slot, class, group.places());
        assert!(!admits(&mut second, Class::Batch));
        assert!(admits(&mut second, Class::Interactive));
        drop(first);
        assert!(admits(&mut second, Class::Batch));
        assert!(second.is_leased());
    }

    #[test]
    fn a_slot_that_is_given_back_goes_to_the_first_in_line() {
        let group = group("g", ONE, &[]);
        let held = slot(enter(&group, "m"));
        let (first, second) = (place(enter(&group, "m")), place(enter(&group, "m")));
        assert_eq!((first.position(), second.position()), (Some(1), Some(2)));
        drop(held);
        assert_eq!((first.position(), second.position()), (None, Some(1)));
        // It has the slot already: nobody who comes now is quicker.
        let third = place(enter(&group, "m"));
        drop(told(first));
        drop(told(second));
        drop(told(third));
        assert_eq!(group.upstreams[0].in_flight(), 0);
    }

    #[test]
    fn who_leaves_is_skipped_and_who_leaves_with_a_slot_hands_it_on() {
        let group = group("g", ONE, &[]);
        let held = slot(enter(&group, "m"));
        let places: Vec<_> = (0..4).map(|_| place(enter(&group, "m"))).collect();
        let [first, second, third, fourth] = places.try_into().unwrap();
        drop(first);
        drop(held);
        // The second has been given the slot, and leaves without knowing it.
        assert_eq!(second.position(), None);
        drop(second);
        assert_eq!(third.position(), None);
        drop(told(third));
        drop(told(fourth));
        assert_eq!(group.upstreams[0].in_flight(), 0);
        assert_eq!(group.waiting.len_of(Class::Interactive), 0);
    }

    #[test]
    fn who_can_use_what_is_free_does_not_wait_behind_who_cannot() {
        let group = group("g", TWO, &[]);
        let (a, b) = (slot(enter(&group, "a")), slot(enter(&group, "b")));
        let (for_a, for_b) = (place(enter(&group, "a")), place(enter(&group, "b")));
        drop(b);
        assert_eq!((for_a.position(), for_b.position()), (Some(1), None));
        drop(told(for_b));
        // Nobody waits for b: it is for who comes.
        assert_eq!(&*slot(enter(&group, "b")).upstream().name, "b");
        drop(a);
        drop(told(for_a));
    }

    #[test]
    fn what_was_tried_is_not_waited_for() {
        let group = group("g", TWO, &[]);
        let (_a, b) = (slot(enter(&group, "a")), slot(enter(&group, "b")));
        let tried = |names: &[usize]| Seeker {
            tried: names
                .iter()
                .map(|n| Arc::clone(&group.upstreams[*n]))
                .collect(),
            ..seeker(&group, "m")
        };
        let nobody = enter_as(&group, tried(&[0, 1]), "key");
        assert!(matches!(nobody, Entered::Nobody), "{nobody:?}");
        let only_a = place(enter_as(&group, tried(&[1]), "key"));
        drop(b);
        assert_eq!(only_a.position(), Some(1));
    }

    #[test]
    fn nothing_that_was_tried_is_waited_for_because_it_is_kept_from_who_asks() {
        for (class, places, taken) in [(Class::Interactive, 8, 7), (Class::Batch, 7, 6)] {
            let two = TWO.replacen("concurrent: 1", &format!("concurrent: {places}"), 1);
            let group = group("g", &two, &[]);
            cool(&group.upstreams[1], 60, Instant::now());
            drop(enter_as(&group, seeker(&group, "m"), "other"));
            let again = |class, tried: &[usize]| {
                let tried = tried.iter().map(|n| Arc::clone(&group.upstreams[*n]));
                let seeker = Seeker {
                    class,
                    tried: tried.collect(),
                    ..seeker(&group, "m")
                };
                enter_as(&group, seeker, "greedy")
            };
            // All that it may have; it waits for the rest.
            let held: Vec<_> = (0..taken).map(|_| slot(again(class, &[]))).collect();
            drop(place(again(class, &[])));
            // Not so if it has been there, and the other is down.
            let nobody = again(class, &[0]);
            assert!(matches!(nobody, Entered::Nobody), "{nobody:?}");
            assert_eq!(group.upstreams[0].in_flight(), taken);
            drop(held);
        }
    }

    #[test]
    fn what_a_pin_wants_is_kept_from_it_and_not_what_others_have() {
        let two = "{ upstreams: [
            { name: a, url: 'http://10.0.0.1', concurrent: 8 },
            { name: b, url: 'http://10.0.0.2', concurrent: 8 } ] }";
        let group = group("g", two, &[]);
        let pinned = |nth: usize| {
            let seeker = Seeker {
                pin: Some(Arc::clone(&group.upstreams[nth])),
                ..seeker(&group, "m")
            };
            enter_as(&group, seeker, "greedy")
        };
        drop(enter_as(&group, seeker(&group, "m"), "other"));
        let held: Vec<_> = (0..8).map(|_| slot(pinned(0))).collect();
        // It has its part of the group: of this one too, one is left free.
        let more: Vec<_> = (0..7).map(|_| slot(pinned(1))).collect();
        drop(place(pinned(1)));
        drop((held, more));
    }

    #[test]
    fn a_pause_that_is_over_is_found_by_looking_again_and_so_is_an_upstream_that_is_down() {
        let group = group("g", TWO, &[]);
        let start = Instant::now();
        let a = slot(enter(&group, "a"));
        cool(&group.upstreams[1], 60, start);
        let waiting = place(enter(&group, "m"));
        waiting.look_again(start + Duration::from_secs(59));
        assert_eq!(waiting.position(), Some(1));
        waiting.look_again(start + Duration::from_secs(61));
        assert_eq!(&*told(waiting).upstream().name, "b");
        let waiting = place(enter(&group, "a"));
        cool(&group.upstreams[0], 600, start);
        waiting.look_again(start + Duration::from_secs(62));
        assert!(matches!(waiting.leave(), Some(Told::Nobody)));
        drop(a);
    }

    #[test]
    fn who_insists_waits_for_what_is_down_but_never_goes_beyond_its_bound() {
        let group = group("g", ONE, &[]);
        cool(&group.upstreams[0], 60, Instant::now());
        assert!(matches!(enter(&group, "m"), Entered::Nobody));
        let pin = Some(Arc::clone(&group.upstreams[0]));
        for pin in [None, pin] {
            let insists = Seeker {
                effort: Effort::Insist,
                pin,
                ..seeker(&group, "m")
            };
            let held = slot(enter_as(&group, insists.clone(), "key"));
            let waiting = place(enter_as(&group, insists, "key"));
            drop(held);
            drop(told(waiting));
        }
    }

    #[test]
    fn more_places_after_a_reload_are_for_those_who_wait() {
        let old = [group("g", ONE, &[])];
        let _held = slot(enter(&old[0], "m"));
        let waiting = place(enter(&old[0], "m"));
        let new = group("g", &ONE.replace("concurrent: 1", "concurrent: 2"), &old);
        assert_eq!(waiting.position(), Some(1), "it is not live yet");
        new.upstreams[0].go_live();
        drop(told(waiting));
        assert!(Arc::ptr_eq(&old[0].waiting, &new.waiting));
    }

    #[test]
    fn a_slot_of_an_upstream_that_moved_goes_to_the_lines_of_both_groups() {
        let old = [group("g", ONE, &[])];
        let held = slot(enter(&old[0], "m"));
        let new = group("h", ONE, &old);
        let (here, there) = (place(enter(&old[0], "m")), place(enter(&new, "m")));
        drop(held);
        let (first, second) = match here.position() {
            None => (here, there),
            Some(_) => (there, here),
        };
        assert_eq!((first.position(), second.position()), (None, Some(1)));
        drop(told(first));
        drop(told(second));
    }

    #[test]
    fn batch_leaves_a_fifth_to_interactive_while_there_are_any() {
        let five = ONE.replace("concurrent: 1", "concurrent: 5");
        let group = group("g", &five, &[]);
        let batch = || {
            let seeker = Seeker {
                class: Class::Batch,
                ..seeker(&group, "m")
            };
            enter_as(&group, seeker, "batch")
        };
        let mut held: Vec<_> = (0..5).map(|_| slot(batch())).collect();
        held.pop();
        held.push(slot(enter(&group, "m")));
        // Now that an interactive one has come, its place is not for batch.
        held.pop();
        let waiting = place(batch());
        drop(slot(enter(&group, "m")));
        assert_eq!(waiting.position(), Some(1));
        held.pop();
        drop(told(waiting));
        drop(held);
        assert_eq!(group.waiting.batch.load(SeqCst), 0);
    }

    #[test]
    fn a_place_that_is_kept_for_interactive_costs_no_batch_request_its_own() {
        let two = ONE.replace("concurrent: 1", "concurrent: 2");
        let group = group("g", &two, &[]);
        drop(slot(enter(&group, "m")));
        let enter_line_of_one = |class| {
            let seeker = Seeker {
                class,
                ..seeker(&group, "m")
            };
            let rules = Rules {
                size: 1,
                wait: None,
            };
            group.waiting.enter(seeker, rules, Instant::now())
        };
        let _held = slot(enter_line_of_one(Class::Batch));
        let waiting = place(enter_line_of_one(Class::Batch));
        // The line is full, but who takes what is free does not stand in it.
        let kept = slot(enter_line_of_one(Class::Interactive));
        assert_eq!(waiting.position(), Some(1));
        drop(kept);
        assert_eq!(waiting.position(), Some(1));
    }

    #[test]
    fn a_key_that_has_most_places_leaves_one_to_those_who_come_and_takes_it_back_when_nobody_does()
    {
        let eight = ONE.replace("concurrent: 1", "concurrent: 8");
        let group = group("g", &eight, &[]);
        let start = Instant::now();
        let come = |key: &str| enter_as(&group, seeker(&group, "m"), key);
        let mut held: Vec<_> = (0..8).map(|_| slot(come("greedy"))).collect();
        let mut greedy: Vec<_> = (0..9).map(|_| place(come("greedy"))).collect();
        // The first of the others finds everything taken: its turn comes next.
        let first = place(come("a"));
        let mut given = 0;
        while first.position().is_some() {
            held.pop();
            given += 1;
        }
        assert!(given <= 2, "{given}");
        drop(told(first));
        held.extend(greedy.drain(..given - 1).map(told));
        // From now on one is free for whoever comes, at once.
        for key in ["a", "b", "c"] {
            drop(slot(come(key)));
            assert_eq!(greedy[0].position(), Some(1));
        }
        // The others get no more than what is kept.
        held.pop();
        held.push(told(greedy.remove(0)));
        assert_eq!(greedy[0].position(), Some(1));
        greedy[0].look_again(start + Duration::from_secs(60));
        held.push(told(greedy.remove(0)));
        drop((held, greedy));
        assert_eq!(group.upstreams[0].in_flight(), 0);
    }

    #[test]
    fn who_waits_looks_at_what_a_reload_has_put_in_the_place_of_an_upstream() {
        let old = [group("g", ONE, &[])];
        let held = slot(enter(&old[0], "m"));
        let (first, second) = (place(enter(&old[0], "m")), place(enter(&old[0], "m")));
        let new = group("g", &ONE.replace("10.0.0.1", "10.0.0.9"), &old);
        new.upstreams[0].go_live();
        assert_eq!(first.position(), Some(1));
        new.go_live();
        let moved = told(first);
        assert!(Arc::ptr_eq(moved.upstream(), &new.upstreams[0]));
        drop(held);
        assert_eq!(second.position(), Some(1));
        drop(moved);
        drop(told(second));
    }

    #[test]
    fn keys_take_turns() {
        let group = group("g", ONE, &[]);
        let mut held = slot(enter(&group, "m"));
        let mut greedy: Vec<_> = (0..20)
            .map(|_| place(enter_as(&group, seeker(&group, "m"), "greedy")))
            .collect();
        for _ in 0..3 {
            let normal = place(enter_as(&group, seeker(&group, "m"), "normal"));
            drop(held);
            if normal.position().is_some() {
                drop(told(greedy.remove(0)));
            }
            held = told(normal);
        }
    }

    /// Threads that come, wait, leave and hold at random: never more than
    /// `concurrent` at once, and at the end nothing is lost.
    #[test]
    fn no_slot_is_lost_whatever_threads_do() {
        let group = group("g", TWO, &[]);
        let at_once = [AtomicU32::new(0), AtomicU32::new(0)];
        let served = AtomicU32::new(0);
        thread::scope(|scope| {
            for seed in 0..4 {
                let (group, at_once, served) = (&group, &at_once, &served);
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed);
                    for _ in 0..2000 {
                        let model = ["a", "b", "m"][rng.random_range(0..3)];
                        let slot = match enter_as(group, seeker(group, model), &seed.to_string()) {
                            Entered::Slot(slot) => slot,
                            Entered::Waiting(place) if rng.random_bool(0.3) => {
                                drop(place);
                                continue;
                            }
                            Entered::Waiting(mut place) => {
                                match futures_util::FutureExt::now_or_never(place.turn()) {
                                    Some(Told::Slot(slot)) => slot,
                                    Some(other) => panic!("{other:?}"),
                                    None => match place.leave() {
                                        Some(Told::Slot(slot)) => slot,
                                        Some(other) => panic!("{other:?}"),
                                        None => continue,
                                    },
                                }
                            }
                            other => panic!("{other:?}"),
                        };
                        let nth = usize::from(&*slot.upstream().name == "b");
                        assert_eq!(at_once[nth].fetch_add(1, SeqCst), 0);
                        served.fetch_add(1, Relaxed);
                        thread::yield_now();
                        at_once[nth].fetch_sub(1, SeqCst);
                        drop(slot);
                    }
                });
            }
        });
        assert!(served.load(Relaxed) > 0);
        assert!(
            group
                .upstreams
                .iter()
                .all(|upstream| upstream.in_flight() == 0)
        );
        assert_eq!(group.waiting.len.load(SeqCst), 0);
    }

    /// The same, but everybody waits until its turn comes: nobody is forgotten.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn everybody_who_waits_is_served_without_looking_again() {
        let group = group("g", TWO, &[]);
        let tasks: Vec<_> = (0..90)
            .map(|nth: usize| {
                let group = Arc::clone(&group);
                tokio::spawn(async move {
                    for _ in 0..20 {
                        let model = ["a", "b", "m"][nth % 3];
                        let key = (nth % 7).to_string();
                        let slot = match enter_as(&group, seeker(&group, model), &key) {
                            Entered::Slot(slot) => slot,
                            Entered::Waiting(mut place) => match place.turn().await {
                                Told::Slot(slot) => slot,
                                other => panic!("{other:?}"),
                            },
                            other => panic!("{other:?}"),
                        };
                        tokio::task::yield_now().await;
                        drop(slot);
                    }
                })
            })
            .collect();
        let all = async {
            for task in tasks {
                task.await.unwrap();
            }
        };
        let done = tokio::time::timeout(Duration::from_secs(60), all).await;
        done.expect("a slot was lost");
    }
}
