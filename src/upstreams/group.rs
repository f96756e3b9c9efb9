//! Upstreams that can stand in for each other, and the choice among them.
//!
//! Start at [`Group::pick`]; [`build_all`] makes the groups of a configuration
//! from those of the one before.
//!
//! **Invariant:** a pick never waits and, for groups of up to 16, never
//! allocates.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use smallvec::SmallVec;

use super::{
    breaker::{Fault, Spare},
    budget::Budget,
    outages::Outages,
    policy::Policy,
    shares::Places,
    state::State,
    strategies::{self, STRATEGIES, Strategy},
    upstream::{self, Refusal, Secrets, Slot, Upstream, UpstreamError},
    waiting::Waiting,
};
use crate::config;

/// The upstreams among which a strategy chooses.
type Candidates<'a> = SmallVec<[&'a Arc<Upstream>; 16]>;

/// Upstreams that can stand in for each other.
pub struct Group {
    /// Its name in the YAML.
    pub name: Arc<str>,
    /// Whether its upstreams are on premises.
    pub local: bool,
    /// What the YAML says of it.
    pub config: config::Group,
    /// Its upstreams in the order of the YAML; never empty.
    pub upstreams: Vec<Arc<Upstream>>,
    /// Those who wait for one of them; the same through all configurations.
    pub waiting: Arc<Waiting>,
    /// How much of its traffic may be tries after the first.
    pub budget: Arc<Budget>,
    strategy: Arc<dyn Strategy>,
    outages: Outages,
    /// Held while it is decided whether one more may go: two that fail at the
    /// same time must not both be the last that can be spared.
    sparing: Mutex<()>,
}

/// What a pick came to.
#[derive(Debug)]
pub enum Pick {
    /// A place at this upstream.
    Chosen(Slot),
    /// Every upstream that is left works on as many requests as it may.
    Busy,
    /// Nobody should go to what is left before this time has passed; zero means
    /// that one is just being tried by another request, or all are off.
    Down(Duration),
    /// Every upstream that serves the model was tried.
    Exhausted,
}

/// What makes a group's configuration useless.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct BuildError {
    /// Where in the YAML, such as `groups.gpus.upstreams[1].url`.
    pub path: String,
    /// What is wrong and what was expected; never holds a secret.
    pub problem: String,
}

/// The groups of the configuration before, to take over from.
#[derive(Default)]
pub struct Previous<'a> {
    groups: HashMap<&'a str, &'a Arc<Group>>,
    upstreams: HashMap<&'a str, &'a Arc<Upstream>>,
}

impl<'a> Previous<'a> {
    /// Indexes the groups of the configuration before.
    pub fn new(groups: &'a [Arc<Group>]) -> Self {
        let upstreams = groups.iter().flat_map(|group| &group.upstreams);
        Self {
            groups: groups.iter().map(|group| (&*group.name, group)).collect(),
            upstreams: upstreams
                .map(|upstream| (&*upstream.name, upstream))
                .collect(),
        }
    }
}

/// Builds the groups of a configuration, in its order.
///
/// # Errors
/// All that is wrong with all of them.
pub fn build_all(
    config: &config::Config,
    secrets: &Secrets,
    disabled: &HashSet<String>,
    previous: &Previous<'_>,
) -> Result<Vec<Arc<Group>>, Vec<BuildError>> {
    let mut groups = Vec::with_capacity(config.groups.len());
    let mut errors = Vec::new();
    for (name, config) in &config.groups {
        match Group::build(name, config, secrets, disabled, previous) {
            Ok(group) => groups.push(group),
            Err(more) => errors.extend(more),
        }
    }
    if errors.is_empty() {
        Ok(groups)
    } else {
        Err(errors)
    }
}

impl Group {
    /// Builds a group. Upstreams are taken over by their name, from whatever
    /// group they were in; a group of which nothing changed is returned itself.
    ///
    /// `disabled` names the upstreams that are switched off.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn build(
        name: &str,
        config: &config::Group,
        secrets: &Secrets,
        disabled: &HashSet<String>,
        previous: &Previous<'_>,
    ) -> Result<Arc<Self>, Vec<BuildError>> {
        let mut errors = Vec::new();
        let mut upstreams = Vec::with_capacity(config.upstreams.len());
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let off = disabled.contains(&upstream.name);
            let before = previous.upstreams.get(&*upstream.name).copied();
            let policy = Policy::of(config, upstream);
            match upstream::build(upstream, policy, secrets, off, before) {
                Ok(upstream) => upstreams.push(upstream),
                Err(more) => errors.extend(more.into_iter().map(|error| {
                    let UpstreamError { key, problem } = error;
                    BuildError {
                        path: format!("groups.{name}.upstreams[{index}].{key}"),
                        problem,
                    }
                })),
            }
        }
        let strategy = strategies::find(&config.strategy);
        if strategy.is_none() {
            let known: Vec<_> = STRATEGIES.iter().map(|entry| entry.name).collect();
            errors.push(BuildError {
                path: format!("groups.{name}.strategy"),
                problem: format!("expected one of {}", known.join(", ")),
            });
        }
        let (Some(strategy), []) = (strategy, errors.as_slice()) else {
            return Err(errors);
        };

        if let Some(old) = previous.groups.get(name).copied()
            && old.config == *config
            && old.upstreams.len() == upstreams.len()
            && old
                .upstreams
                .iter()
                .zip(&upstreams)
                .all(|(a, b)| Arc::ptr_eq(a, b))
        {
            return Ok(Arc::clone(old));
        }
        let before = previous.groups.get(name);
        let waiting = before.map_or_else(Arc::default, |old| Arc::clone(&old.waiting));
        for upstream in &upstreams {
            upstream.tell(&waiting);
        }
        let budget = match previous.groups.get(name) {
            Some(old) if old.config.retries == config.retries => Arc::clone(&old.budget),
            _ => Budget::new(config.retries.clone(), Instant::now()),
        };
        Ok(Arc::new(Self {
            name: name.into(),
            local: config.local,
            config: config.clone(),
            upstreams,
            waiting,
            budget,
            strategy: (strategy.make)(),
            outages: Outages::default(),
            sparing: Mutex::new(()),
        }))
    }

    /// Chooses an upstream that serves `model` (by the name it is sent with), is
    /// available, was not tried and has a free slot, and takes the slot.
    ///
    /// `tried` holds upstreams of this very group; `key` is the same for all
    /// requests of one conversation.
    pub fn pick(&self, model: &Arc<str>, tried: &[Arc<Upstream>], key: u64, now: Instant) -> Pick {
        let mut candidates = self.candidates(model, tried, now);
        if self.outages.any() {
            self.note_recovery(model, &candidates, now);
        }
        while let Some(upstream) = self.choose(&candidates, key) {
            match candidates
                .get(upstream)
                .map(|chosen| chosen.try_admit(model, now))
            {
                Some(Ok(slot)) => return Pick::Chosen(slot),
                // Another request was quicker; on with the others.
                Some(Err(Refusal::Busy | Refusal::Unavailable)) => {
                    candidates.remove(upstream);
                }
                None => break,
            }
        }
        self.why_none(model, tried, now)
    }

    /// Takes a slot at what should not be asked now, when there is nothing
    /// better left: of those that were not tried, the one that should be ready
    /// the soonest. Never one that is off, draining or at its `concurrent`.
    pub fn pick_any(
        &self,
        model: &Arc<str>,
        tried: &[Arc<Upstream>],
        now: Instant,
    ) -> Option<Slot> {
        self.soonest_first(model, tried, now)
            .into_iter()
            .find_map(|upstream| upstream.try_acquire(model, now))
    }

    /// Takes a slot at what is known to be bad, when there is nobody else at
    /// all: see [`Upstream::try_in_panic`].
    pub fn pick_in_panic(
        &self,
        model: &Arc<str>,
        tried: &[Arc<Upstream>],
        now: Instant,
    ) -> Option<Slot> {
        self.soonest_first(model, tried, now)
            .into_iter()
            .find_map(|upstream| upstream.try_in_panic(model, now).ok())
    }

    /// Notes that the server failed a request. Returns whether its breaker
    /// should have opened but [`eject_max`](config::Group::eject_max) forbids
    /// it.
    pub fn failed(&self, slot: &Slot, fault: Fault, now: Instant) -> bool {
        let _one_at_a_time = self.sparing();
        slot.failed((fault, self.spare(slot, now)), now)
    }

    /// Notes that a request could not be sent. Returns what [`Self::failed`]
    /// does.
    pub fn unsent(&self, slot: &Slot, now: Instant) -> bool {
        let _one_at_a_time = self.sparing();
        slot.unsent(self.spare(slot, now), now)
    }

    /// Notes that the server turned a request away (503, 529) without asking for
    /// a pause. Returns what [`Self::failed`] does.
    pub fn turned_away(&self, slot: &Slot, now: Instant) -> bool {
        let _one_at_a_time = self.sparing();
        slot.turned_away(self.spare(slot, now), now)
    }

    /// Returns whether the group can do without one more upstream for a model:
    /// breakers never take out more than `eject_max`, counting what is out for
    /// other reasons; one may go always.
    fn spare(&self, slot: &Slot, now: Instant) -> Spare {
        let model = slot.model();
        let (mut all, mut out) = (0_u64, 0_u64);
        for upstream in &self.upstreams {
            if upstream.health.is_off() || !upstream.serves(model) {
                continue;
            }
            all += 1;
            let this = upstream.name == slot.upstream().name;
            out += u64::from(this || !upstream.available(model, now));
        }
        if out <= self.config.eject_max.of(all).max(1) {
            Spare::Yes
        } else {
            Spare::No
        }
    }

    fn sparing(&self) -> MutexGuard<'_, ()> {
        self.sparing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn soonest_first(&self, model: &str, tried: &[Arc<Upstream>], now: Instant) -> Candidates<'_> {
        let mut left: Candidates<'_> = self
            .left(model, tried)
            .filter(|upstream| !upstream.is_closed())
            .collect();
        left.sort_by_key(|upstream| upstream.wait(model, now));
        left
    }

    /// Returns whether any of its upstreams serves a model, by the name it is
    /// sent with; those that are off count.
    pub fn serves(&self, model: &str) -> bool {
        self.upstreams.iter().any(|upstream| upstream.serves(model))
    }

    /// Returns how many requests its upstreams work on at once; `None` if one of
    /// them has no bound.
    pub fn places(&self) -> Option<u32> {
        let each = self
            .upstreams
            .iter()
            .map(|upstream| upstream.config.concurrent);
        each.sum()
    }

    /// Returns how many requests with a model its upstreams could work on now,
    /// and of those that are of use to one request, how many they are and how
    /// many are free; `None` if one of all has no bound.
    pub(super) fn places_for(
        &self,
        model: &str,
        is_useful: impl Fn(&Arc<Upstream>) -> bool,
        now: Instant,
    ) -> Option<Places> {
        let mut places = Places::default();
        for upstream in &self.upstreams {
            if !upstream.serves(model) || !upstream.available(model, now) {
                continue;
            }
            let most = upstream.config.concurrent?;
            places.all = places.all.saturating_add(most);
            if is_useful(upstream) {
                let free = most.saturating_sub(upstream.in_flight());
                places.useful = places.useful.saturating_add(most);
                places.free = places.free.saturating_add(free);
            }
        }
        Some(places)
    }

    /// Has those who wait look at this configuration of it.
    pub fn go_live(self: &Arc<Self>) {
        self.waiting.renew(self, Instant::now());
    }

    /// Returns the upstream of this name.
    pub fn find(&self, name: &str) -> Option<&Arc<Upstream>> {
        self.upstreams
            .iter()
            .find(|upstream| &*upstream.name == name)
    }

    fn candidates(&self, model: &str, tried: &[Arc<Upstream>], now: Instant) -> Candidates<'_> {
        self.left(model, tried)
            .filter(|upstream| upstream.available(model, now) && upstream.has_free_slot())
            .inspect(|upstream| upstream.climb(now))
            .collect()
    }

    /// Returns what serves the model and was not tried.
    fn left(&self, model: &str, tried: &[Arc<Upstream>]) -> impl Iterator<Item = &Arc<Upstream>> {
        self.upstreams.iter().filter(move |upstream| {
            !tried.iter().any(|tried| upstream.is_same_server(tried)) && upstream.serves(model)
        })
    }

    fn is_anybody_there(&self, model: &str, now: Instant) -> bool {
        let mut upstreams = self.upstreams.iter();
        upstreams.any(|upstream| upstream.serves(model) && upstream.available(model, now))
    }

    /// Where nobody could be asked for a model, and one can again: lets the others
    /// be tried at once. What took all of them out is likely to be over for all of
    /// them, and meanwhile that one bears everything.
    fn note_recovery(&self, model: &str, candidates: &Candidates<'_>, now: Instant) {
        let is_back = candidates
            .iter()
            .any(|upstream| upstream.is_usable(model, now));
        if !is_back || !self.outages.end(model, now) {
            return;
        }
        for upstream in &self.upstreams {
            if upstream.serves(model) {
                upstream.hurry(model, now);
            }
        }
    }

    fn choose(&self, candidates: &Candidates<'_>, key: u64) -> Option<usize> {
        let plain: SmallVec<[&Upstream; 16]> =
            candidates.iter().map(|upstream| &***upstream).collect();
        match plain.len() {
            0 => None,
            // Also for a single one: round robin keeps its accounts by it.
            _ => Some(self.strategy.pick(&plain, key)),
        }
    }

    /// Tells why there was no candidate: busy if any is only busy, for it may be
    /// free in a moment; down if any is left at all.
    fn why_none(&self, model: &Arc<str>, tried: &[Arc<Upstream>], now: Instant) -> Pick {
        let mut shortest: Option<Duration> = None;
        let mut off = false;
        for upstream in self.left(model, tried) {
            if upstream.status(now).state == State::Off {
                off = true;
            } else if upstream.available(model, now) {
                return Pick::Busy;
            } else {
                let wait = upstream.wait(model, now);
                shortest = Some(shortest.map_or(wait, |least| least.min(wait)));
            }
        }
        match shortest {
            Some(wait) => {
                if !self.is_anybody_there(model, now) {
                    self.outages.begin(model, now);
                }
                Pick::Down(wait)
            }
            None if off => Pick::Down(Duration::ZERO),
            None => Pick::Exhausted,
        }
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("name", &self.name)
            .field("upstreams", &self.upstreams)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{
        super::upstream::tests::{acquire, refuse},
        *,
    };

    fn config(yaml: &str) -> config::Group {
        serde_yaml::from_str(yaml).unwrap()
    }

    fn build(yaml: &str, disabled: &[&str], previous: &[Arc<Group>]) -> Arc<Group> {
        let disabled = disabled.iter().map(|name| (*name).to_owned()).collect();
        let previous = Previous::new(previous);
        Group::build("gpus", &config(yaml), &Secrets::new(), &disabled, &previous).unwrap()
    }

    const THREE: &str = "
      upstreams:
        - { name: a, url: 'http://10.0.0.1', concurrent: 1 }
        - { name: b, url: 'http://10.0.0.2', concurrent: 1, models: ['qwen*'] }
        - { name: c, url: 'http://10.0.0.3', concurrent: 1 }";

    fn three() -> Arc<Group> {
        build(THREE, &[], &[])
    }

    fn chosen(pick: Pick) -> Slot {
        match pick {
            Pick::Chosen(slot) => slot,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn cool(upstream: &Upstream, secs: u64, now: Instant) {
        let pause = Duration::from_secs(secs);
        upstream.health.cool(pause, &upstream.policy, now);
    }

    fn name(slot: &Slot) -> &str {
        &slot.upstream().name
    }

    #[test]
    fn who_comes_back_first_lets_the_others_be_tried_at_once() {
        let group = build(THREE, &[], &[]);
        let (model, mut now): (Arc<str>, _) = ("qwen".into(), Instant::now());
        let out = |group: &Group, now| {
            for upstream in &group.upstreams {
                while upstream.available(&model, now) {
                    let slot = upstream.try_acquire(&model, now).unwrap();
                    group.failed(&slot, Fault::Answer, now);
                }
            }
        };
        out(&group, now);
        assert!(matches!(group.pick(&model, &[], 0, now), Pick::Down(_)));
        // Tries before the time, as in any outage that lasts.
        for _ in 0..4 {
            now += Duration::from_secs(1);
            for upstream in &group.upstreams {
                let slot = upstream.try_in_panic(&model, now).unwrap();
                group.failed(&slot, Fault::Answer, now);
            }
        }
        now += Duration::from_millis(10);
        assert!(matches!(group.pick(&model, &[], 0, now), Pick::Down(_)));
        now += Duration::from_secs(1) - Duration::from_millis(10);
        let slot = group.pick_in_panic(&model, &[], now).unwrap();
        slot.succeeded(now);
        drop(slot);
        let mut names: Vec<_> = (0..3)
            .map(|_| chosen(group.pick(&model, &[], 0, now)))
            .map(|slot| {
                slot.succeeded(now);
                name(&slot).to_owned()
            })
            .collect();
        names.sort();
        assert_eq!(names, ["a", "b", "c"]);
        // One that fails alone is nobody's outage.
        let upstream = &group.upstreams[0];
        for _ in 0..5 {
            let slot = upstream.try_acquire(&model, now).unwrap();
            group.failed(&slot, Fault::Answer, now);
        }
        chosen(group.pick(&model, &[], 0, now));
        assert!(!upstream.available(&model, now));
    }

    #[test]
    fn each_pick_is_another_until_all_are_busy() {
        let (group, now) = (three(), Instant::now());
        let slots: Vec<_> = (0..3)
            .map(|_| chosen(group.pick(&"qwen".into(), &[], 0, now)))
            .collect();
        let names: Vec<_> = slots.iter().map(name).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert!(matches!(
            group.pick(&"qwen".into(), &[], 0, now),
            Pick::Busy
        ));
        assert!(group.pick_any(&"qwen".into(), &[], now).is_none());
        drop(slots);
        chosen(group.pick(&"qwen".into(), &[], 0, now));
    }

    #[test]
    fn two_that_fail_at_the_same_time_are_never_both_taken_out() {
        let yaml = "upstreams: [ { name: a, url: 'http://10.0.0.1' }, { name: b, url: 'http://10.0.0.2' } ]";
        for _ in 0..200 {
            let (group, now) = (build(yaml, &[], &[]), Instant::now());
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                for upstream in &group.upstreams {
                    let (group, start) = (&group, &start);
                    scope.spawn(move || {
                        start.wait();
                        for _ in 0..8 {
                            if let Ok(slot) = upstream.try_admit(&"m".into(), now) {
                                group.failed(&slot, Fault::Answer, now);
                            }
                        }
                    });
                }
            });
            let left = group.upstreams.iter().filter(|one| one.available("m", now));
            assert_eq!(left.count(), 1);
        }
    }

    #[test]
    fn what_was_tried_is_not_picked_again() {
        let (group, now) = (three(), Instant::now());
        let mut tried = Vec::new();
        for _ in 0..3 {
            let slot = chosen(group.pick(&"qwen".into(), &tried, 0, now));
            tried.push(Arc::clone(slot.upstream()));
        }
        assert!(matches!(
            group.pick(&"qwen".into(), &tried, 0, now),
            Pick::Exhausted
        ));
        assert!(group.pick_any(&"qwen".into(), &tried, now).is_none());
    }

    #[test]
    fn only_what_serves_the_model_is_picked() {
        let (group, now) = (three(), Instant::now());
        for _ in 0..6 {
            assert_ne!(name(&chosen(group.pick(&"llama".into(), &[], 0, now))), "b");
        }
        let tried = [
            Arc::clone(&group.upstreams[0]),
            Arc::clone(&group.upstreams[2]),
        ];
        assert!(matches!(
            group.pick(&"llama".into(), &tried, 0, now),
            Pick::Exhausted
        ));
    }

    #[test]
    fn what_is_down_costs_no_try_and_the_wait_is_told() {
        let (group, now) = (three(), Instant::now());
        refuse(&group.upstreams[0], now);
        for _ in 0..6 {
            assert_ne!(name(&chosen(group.pick(&"qwen".into(), &[], 0, now))), "a");
        }
        cool(&group.upstreams[1], 60, now);
        cool(&group.upstreams[2], 90, now);
        let Pick::Down(wait) = group.pick(&"qwen".into(), &[], 0, now) else {
            panic!("nobody is ready");
        };
        assert!(wait > Duration::from_millis(700) && wait < Duration::from_millis(1300));
    }

    #[test]
    fn the_last_resort_is_who_should_be_ready_first() {
        let (group, now) = (three(), Instant::now());
        for (upstream, secs) in group.upstreams.iter().zip([90, 30, 60]) {
            cool(upstream, secs, now);
        }
        let slot = group.pick_any(&"qwen".into(), &[], now).unwrap();
        assert_eq!(name(&slot), "b");
        assert_eq!(
            name(&group.pick_any(&"qwen".into(), &[], now).unwrap()),
            "c"
        );
    }

    #[test]
    fn busy_counts_before_down_for_it_ends_sooner() {
        let (group, now) = (three(), Instant::now());
        refuse(&group.upstreams[0], now);
        let _b = acquire(&group.upstreams[1]).unwrap();
        let tried = [Arc::clone(&group.upstreams[2])];
        assert!(matches!(
            group.pick(&"qwen".into(), &tried, 0, now),
            Pick::Busy
        ));
    }

    #[test]
    fn what_is_off_is_not_even_a_last_resort() {
        let group = build(THREE, &["a", "b", "c"], &[]);
        let now = Instant::now();
        assert!(matches!(
            group.pick(&"qwen".into(), &[], 0, now),
            Pick::Down(_)
        ));
        assert!(group.pick_any(&"qwen".into(), &[], now).is_none());
    }

    #[test]
    fn a_half_open_upstream_gets_one_request_and_the_others_the_rest() {
        let group = build(
            "{ check: { enabled: false }, upstreams: [ { name: a, url: 'http://10.0.0.1' }, { name: b, url: 'http://10.0.0.2' } ] }",
            &[],
            &[],
        );
        let start = Instant::now();
        refuse(&group.upstreams[0], start);
        let now = start + Duration::from_secs(2);
        let slots: Vec<_> = (0..6)
            .map(|_| chosen(group.pick(&"m".into(), &[], 0, now)))
            .collect();
        let tries = slots.iter().filter(|slot| name(slot) == "a").count();
        assert_eq!(tries, 1);
    }

    #[test]
    fn an_unchanged_group_is_the_very_same() {
        let old = [three()];
        assert!(Arc::ptr_eq(&build(THREE, &[], &old), &old[0]));
    }

    #[test]
    fn a_changed_group_keeps_the_upstreams_that_did_not_change() {
        let old = [three()];
        let changed = THREE.replace("10.0.0.3", "10.0.0.4");
        let new = build(&changed, &[], &old);
        assert!(Arc::ptr_eq(&new.upstreams[0], &old[0].upstreams[0]));
        assert!(!Arc::ptr_eq(&new.upstreams[2], &old[0].upstreams[2]));
    }

    #[test]
    fn an_upstream_keeps_its_counters_in_another_group() {
        let old = [three()];
        let _slot = acquire(&old[0].upstreams[0]).unwrap();
        let disabled = HashSet::new();
        let one = config("{ upstreams: [ { name: a, url: 'http://10.0.0.1', concurrent: 1 } ] }");
        let new = Group::build(
            "other",
            &one,
            &Secrets::new(),
            &disabled,
            &Previous::new(&old),
        );
        assert_eq!(new.unwrap().upstreams[0].in_flight(), 1);
    }

    #[test]
    fn every_mistake_is_told_with_its_path() {
        let wrong = config(
            "{ strategy: best, upstreams: [ { name: a, url: 'http://10.0.0.1' }, { name: b, url: nowhere } ] }",
        );
        let errors = Group::build(
            "gpus",
            &wrong,
            &Secrets::new(),
            &HashSet::new(),
            &Previous::default(),
        )
        .unwrap_err();
        let paths: Vec<_> = errors.iter().map(|error| error.path.as_str()).collect();
        assert_eq!(
            paths,
            ["groups.gpus.upstreams[1].url", "groups.gpus.strategy"]
        );
        assert!(errors[1].problem.contains("least_connections"));
    }

    const FOUR: &str = "
      upstreams:
        - { name: a, url: 'http://10.0.0.1' }
        - { name: b, url: 'http://10.0.0.2' }
        - { name: c, url: 'http://10.0.0.3' }
        - { name: d, url: 'http://10.0.0.4' }";

    fn fail(group: &Group, nth: usize, times: usize, now: Instant) {
        let slot = group.upstreams[nth].try_acquire(&"m".into(), now).unwrap();
        for _ in 0..times {
            group.failed(&slot, Fault::Answer, now);
        }
    }

    fn out(group: &Group, now: Instant) -> usize {
        let out = group
            .upstreams
            .iter()
            .filter(|upstream| !upstream.available("m", now));
        out.count()
    }

    #[test]
    fn breakers_leave_half_of_a_group_while_it_answers_at_all() {
        let (group, now) = (build(FOUR, &[], &[]), Instant::now());
        for nth in 0..4 {
            fail(&group, nth, 5, now);
        }
        assert_eq!(out(&group, now), 2);
        // One that answers nobody is no loss.
        fail(&group, 2, 15, now);
        assert_eq!(out(&group, now), 3);
    }

    #[test]
    fn what_is_out_for_another_reason_counts_and_one_alone_may_always_go() {
        let (group, now) = (build(FOUR, &[], &[]), Instant::now());
        refuse(&group.upstreams[0], now);
        refuse(&group.upstreams[1], now);
        fail(&group, 2, 5, now);
        assert_eq!(out(&group, now), 2);
        let alone = build(
            "{ upstreams: [ { name: a, url: 'http://10.0.0.1' } ] }",
            &[],
            &[],
        );
        fail(&alone, 0, 5, now);
        assert_eq!(out(&alone, now), 1);
    }

    #[test]
    fn breakers_are_each_models_own() {
        let (group, now) = (build(FOUR, &[], &[]), Instant::now());
        fail(&group, 0, 5, now);
        assert!(!group.upstreams[0].available("m", now));
        assert!(group.upstreams[0].available("other", now));
    }

    #[test]
    fn what_comes_back_begins_with_a_tenth_of_its_share_whatever_the_strategy() {
        for strategy in ["round_robin", "random", "least_connections"] {
            let yaml = format!(
                "{{ strategy: {strategy}, upstreams: [ {{ name: a, url: 'http://10.0.0.1' }}, {{ name: b, url: 'http://10.0.0.2' }} ] }}"
            );
            let (group, start) = (build(&yaml, &[], &[]), Instant::now());
            refuse(&group.upstreams[0], start);
            let slot = group.upstreams[0].try_acquire(&"m".into(), start).unwrap();
            slot.reached(start);
            drop(slot);
            let share = |secs: u64| {
                let now = start + Duration::from_secs(secs);
                let mut held = Vec::new();
                for _ in 0..1000 {
                    held.push(chosen(group.pick(&"m".into(), &[], 0, now)));
                }
                held.iter().filter(|slot| name(slot) == "a").count()
            };
            let (first, middle, last) = (share(0), share(5), share(10));
            assert!((50..=140).contains(&first), "{strategy}: {first}");
            assert!((260..=400).contains(&middle), "{strategy}: {middle}");
            assert!((450..=550).contains(&last), "{strategy}: {last}");
        }
    }

    #[test]
    fn what_comes_back_alone_gets_everything() {
        let yaml = "{ upstreams: [ { name: a, url: 'http://10.0.0.1' } ] }";
        let (group, now) = (build(yaml, &[], &[]), Instant::now());
        refuse(&group.upstreams[0], now);
        acquire(&group.upstreams[0]).unwrap().reached(now);
        chosen(group.pick(&"m".into(), &[], 0, now));
    }

    #[test]
    fn with_nobody_else_what_was_refused_is_asked_and_what_was_silent_by_one_at_a_time() {
        let (group, now) = (build(FOUR, &[], &[]), Instant::now());
        let model: Arc<str> = "m".into();
        for upstream in &group.upstreams {
            refuse(upstream, now);
        }
        assert!(matches!(group.pick(&model, &[], 0, now), Pick::Down(_)));
        let held: Vec<_> = (0..9)
            .map(|_| group.pick_in_panic(&model, &[], now).unwrap())
            .collect();
        assert_eq!(held.len(), 9);

        let silent = build(
            "{ upstreams: [ { name: z, url: 'http://10.0.0.9' } ] }",
            &[],
            &[],
        );
        silent.upstreams[0].unresolved(now, now + Duration::from_secs(2));
        let later = now + Duration::from_secs(2);
        assert!(silent.pick_in_panic(&model, &[], later).is_none());
        let due = now + Duration::from_secs(4);
        let one = silent.pick_in_panic(&model, &[], due);
        assert!(one.is_some());
        assert!(silent.pick_in_panic(&model, &[], due).is_none());
    }
}
