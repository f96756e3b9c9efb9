//! The live configuration: how one is built, and how the next takes its place.
//!
//! A [`Snapshot`] is one configuration, fully built and immutable. Requests take
//! the current one from the [`Gateway`] when they begin and hold it to their
//! end, so a reload never changes a request that is on its way.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use arc_swap::ArcSwap;
use pingora::connectors::TransportConnector;

use crate::{
    config::{self, Catalog, Config, Loaded, PluginEntry, Problem, Problems},
    context::{Class, Restrict},
    plugins::{Build, Chain, PLUGINS},
    resources::Resources,
    routes::Routes,
    store::Place,
    upstreams::{
        Group, Previous, STRATEGIES, State, Upstream, connector_options, group::build_all,
    },
};

/// The most idle connections to upstreams, over all of them.
const POOL_SIZE: usize = 4096;

/// Returns what the lists of plugins and strategies know, for the validator and
/// the JSON Schema.
pub fn catalog() -> Catalog {
    Catalog {
        strategies: STRATEGIES
            .iter()
            .flat_map(|entry| std::iter::once(entry.name).chain(entry.aliases.iter().copied()))
            .collect(),
        plugins: PLUGINS
            .iter()
            .map(|entry| (entry.name, (entry.schema)()))
            .collect(),
        credentials_elsewhere: false,
    }
}

/// One configuration, fully built.
pub struct Snapshot {
    /// Counts the configurations of this process, from 1.
    pub version: u64,
    /// What the file said.
    pub loaded: Loaded,
    /// Which groups serve which model.
    pub routes: Routes,
    /// When it was built.
    pub built_at: SystemTime,
    chain: Arc<Chain>,
    /// By the index of the route; `None` where the general list holds.
    route_chains: Vec<Option<Arc<Chain>>>,
}

impl Snapshot {
    /// Builds everything that a configuration describes. Parts whose
    /// configuration is equal are taken over from `previous`: their counters,
    /// health and connections survive.
    ///
    /// # Errors
    /// What only shows when it is built, such as a keys file that cannot be read.
    pub fn build(
        loaded: Loaded,
        previous: Option<&Self>,
        resources: &Resources,
    ) -> Result<Self, Problems> {
        let config = &loaded.config;
        let mut problems = Vec::new();
        let store = match config.store.as_deref() {
            Some(url) => match Place::of(url, &loaded.base) {
                Ok(place) => Some(place),
                Err(why) => return Err(loaded.problem("store", why).into()),
            },
            None => None,
        };
        let mut chain_of =
            |entries: &[PluginEntry], before: Option<&Chain>, at: &str, list: &str| {
                let build = Build {
                    base: &loaded.base,
                    resources,
                    list,
                    store: store.as_ref(),
                };
                match Chain::build(entries, before, &build) {
                    Ok(chain) => Some(Arc::new(chain)),
                    Err(why) => {
                        let path = format!("{at}{}", why.path);
                        problems.push(loaded.problem(&path, why.message));
                        None
                    }
                }
            };
        let chain = chain_of(&config.plugins, previous.map(|old| &*old.chain), "", "");
        let route_chains = config
            .routes
            .iter()
            .enumerate()
            .map(|(index, route)| {
                let before = previous.and_then(|old| old.own_chain(&route.model));
                let at = format!("routes[{index}].");
                chain_of(route.plugins.as_ref()?, before, &at, &route.model)
            })
            .collect();
        let before =
            previous.map_or_else(Previous::default, |old| Previous::new(old.routes.groups()));
        let routes = build_all(config, &loaded.secrets, &loaded.disabled, &before)
            .and_then(|groups| Routes::build(config, groups));
        match (chain, routes) {
            (Some(chain), Ok(routes)) if problems.is_empty() => {
                let mut snapshot = Self {
                    version: previous.map_or(1, |old| old.version + 1),
                    routes,
                    built_at: SystemTime::now(),
                    chain,
                    route_chains,
                    loaded,
                };
                for (_, upstream) in snapshot.upstreams() {
                    upstream.health.tell(&upstream.name, &resources.events);
                }
                let mut warnings = snapshot.warnings();
                // What is loaded may come from a snapshot, with its warnings.
                warnings.retain(|warning| !snapshot.loaded.warnings.contains(warning));
                snapshot.loaded.warnings.extend(warnings);
                Ok(snapshot)
            }
            (_, routes) => {
                for error in routes.err().into_iter().flatten() {
                    problems.push(loaded.problem(&error.path, error.problem));
                }
                Err(Problems(problems))
            }
        }
    }

    fn own_chain(&self, model: &str) -> Option<&Chain> {
        let index = self
            .config()
            .routes
            .iter()
            .position(|route| route.model == model)?;
        self.route_chains.get(index)?.as_deref()
    }

    /// Returns the configuration as it was read.
    pub fn config(&self) -> &Config {
        &self.loaded.config
    }

    /// Returns the general list of plugins.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Returns whether a route has a list of its own: then no plugin can run
    /// before the body tells which route a request takes.
    pub fn has_route_chains(&self) -> bool {
        self.route_chains.iter().any(Option::is_some)
    }

    /// Returns the plugins of the route that a model takes: of the one that is
    /// meant, if the plugins of that one's route take the name for another's.
    pub fn chain_of(&self, model: &str) -> &Arc<Chain> {
        let meant = self.chains().find(|chain| {
            let meant = chain.model_meant(model);
            meant != model && Arc::ptr_eq(chain, self.chain_by_name(meant))
        });
        meant.unwrap_or_else(|| self.chain_by_name(model))
    }

    fn chain_by_name(&self, model: &str) -> &Arc<Chain> {
        self.routes
            .plan(model, &Restrict::default())
            .ok()
            .and_then(|plan| self.route_chains.get(plan.index)?.as_ref())
            .unwrap_or(&self.chain)
    }

    /// Returns every upstream with its group, in the order of the file.
    pub fn upstreams(&self) -> impl Iterator<Item = (&Arc<Group>, &Arc<Upstream>)> {
        self.routes.groups().iter().flat_map(|group| {
            group
                .upstreams
                .iter()
                .map(move |upstream| (group, upstream))
        })
    }

    /// Tells the plugins that they serve from now on. May block for some seconds. Of the first snapshot
    /// the server calls it, of the others the reload.
    pub fn start_plugins(&self, resources: &Resources) {
        for chain in self.chains() {
            chain.go_live(resources);
        }
    }

    /// Tells the plugins that `next` does not have that they do not serve any
    /// more.
    fn retire_plugins(&self, next: &Self) {
        for chain in self.chains() {
            chain.retire(|plugin| next.chains().any(|chain| chain.holds(plugin)));
        }
    }

    fn watched(&self) -> Vec<PathBuf> {
        let of_plugins = self.chains().flat_map(|chain| chain.watched());
        of_plugins.chain(self.loaded.secret_files()).collect()
    }

    /// Returns the general list of plugins, and those of the routes.
    fn chains(&self) -> impl Iterator<Item = &Arc<Chain>> {
        std::iter::once(&self.chain).chain(self.route_chains.iter().flatten())
    }

    /// Returns what the plugins find questionable.
    fn warnings(&self) -> Vec<Problem> {
        let own = self.route_chains.iter().enumerate();
        let own = own.filter_map(|(i, chain)| Some((format!("routes[{i}]."), chain.as_ref()?)));
        std::iter::once((String::new(), &self.chain))
            .chain(own)
            .flat_map(|(at, chain)| {
                let warnings = chain.warnings(self.config()).into_iter();
                warnings.map(move |why| (format!("{at}{}", why.path), why.message))
            })
            .map(|(path, message)| self.loaded.problem(&path, message))
            .collect()
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("version", &self.version)
            .field("hash", &self.loaded.hash)
            .finish_non_exhaustive()
    }
}

/// What became of the last reload.
#[derive(Clone, Debug)]
pub struct Reloaded {
    /// When it was tried.
    pub at: SystemTime,
    /// What was wrong; empty if it worked.
    pub problems: Vec<Problem>,
}

/// The running gateway: the live snapshot, and what outlives every snapshot.
pub struct Gateway {
    current: ArcSwap<Snapshot>,
    /// Handles that outlive the snapshots.
    pub resources: Arc<Resources>,
    /// The connections to upstreams, pooled over all snapshots.
    pub connector: Arc<TransportConnector>,
    /// When the process began to serve.
    pub started: Instant,
    file: Option<PathBuf>,
    last_reload: Mutex<Option<Reloaded>>,
    /// One reload at a time.
    reloading: Mutex<()>,
}

impl Gateway {
    /// Builds the gateway from its first configuration. `file` is what a reload
    /// reads; `None` for the built-in configuration, which never changes.
    ///
    /// # Errors
    /// See [`Snapshot::build`].
    pub fn new(
        loaded: Loaded,
        file: Option<PathBuf>,
        resources: Arc<Resources>,
    ) -> Result<Self, Problems> {
        let snapshot = Snapshot::build(loaded, None, &resources)?;
        let gateway = Self {
            connector: Arc::new(TransportConnector::new(Some(connector_options(POOL_SIZE)))),
            current: ArcSwap::from_pointee(snapshot),
            resources,
            started: Instant::now(),
            file,
            last_reload: Mutex::new(None),
            reloading: Mutex::new(()),
        };
        gateway.resources.metrics.reload_ok.set(1);
        gateway.export_config();
        Ok(gateway)
    }

    /// Returns the live snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Returns the configuration file, if there is one.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Returns every file whose change asks for a reload.
    pub fn watched(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = self.file.iter().cloned().collect();
        files.extend(self.snapshot().watched());
        files
    }

    /// Returns whether the live snapshot was made from what the files say now.
    /// Blocks on the file system.
    pub fn is_current(&self) -> bool {
        let snapshot = self.snapshot();
        let file = self.file.is_none() || snapshot.loaded.is_current();
        file && snapshot.chains().all(|chain| chain.is_current())
    }

    /// Returns what became of the last reload; `None` before the first.
    pub fn last_reload(&self) -> Option<Reloaded> {
        self.last_reload
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Reads the file, builds it, and puts it in the place of the live
    /// snapshot. Blocks on the file system: not for the proxy's runtime.
    ///
    /// # Errors
    /// Everything that is wrong with the file; the live snapshot stays.
    pub fn reload(&self) -> Result<Arc<Snapshot>, Problems> {
        let _one_at_a_time = self
            .reloading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let _told = self.resources.service_manager.reloading();
        let metrics = &self.resources.metrics;
        let timer = metrics.reload_seconds.start_timer();
        let built = self.build_next();
        timer.observe_duration();
        let reloaded = Reloaded {
            at: SystemTime::now(),
            problems: built
                .as_ref()
                .err()
                .map_or_else(Vec::new, |all| all.0.clone()),
        };
        *self
            .last_reload
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(reloaded);
        match built {
            Ok(next) => {
                let next = Arc::new(next);
                // Before the first request: what they read must be there then.
                next.start_plugins(&self.resources);
                let previous = self.current.swap(Arc::clone(&next));
                previous.retire_plugins(&next);
                for (_, upstream) in next.upstreams() {
                    upstream.go_live();
                }
                for group in next.routes.groups() {
                    group.go_live();
                }
                metrics.reloads.with_label_values(&["success"]).inc();
                metrics.reload_ok.set(1);
                self.export_config();
                announce(&previous, &next);
                Ok(next)
            }
            Err(problems) => {
                metrics.reloads.with_label_values(&["failure"]).inc();
                metrics.reload_ok.set(0);
                log::error!("reload refused, the live configuration stays: {problems}");
                Err(problems)
            }
        }
    }

    fn build_next(&self) -> Result<Snapshot, Problems> {
        let live = self.snapshot();
        let loaded = match &self.file {
            Some(file) => config::load(file, &catalog())?,
            // Nothing to read: what is live is built again.
            None => live.loaded.clone(),
        };
        Snapshot::build(loaded, Some(&live), &self.resources)
    }

    /// Brings the metrics that mirror the live snapshot up to date; called when
    /// they are read.
    pub fn export(&self) {
        let metrics = &self.resources.metrics;
        let now = Instant::now();
        metrics.upstream_state.reset();
        metrics.upstream_in_flight.reset();
        metrics.breakers.reset();
        metrics.queue_length.reset();
        for group in self.snapshot().routes.groups() {
            for class in Class::ALL {
                let waiting = i64::try_from(group.waiting.len_of(class)).unwrap_or(i64::MAX);
                metrics
                    .queue_length
                    .with_label_values(&[&*group.name, class.as_str()])
                    .set(waiting);
            }
        }
        for (group, upstream) in self.snapshot().upstreams() {
            let names = [&*group.name, &*upstream.name];
            let in_flight = i64::from(upstream.in_flight());
            metrics
                .upstream_in_flight
                .with_label_values(&names)
                .set(in_flight);
            for (_model, phase, _wait) in upstream.health.breakers(now) {
                metrics
                    .breakers
                    .with_label_values(&[names[0], names[1], phase])
                    .inc();
            }
            let state = upstream.shown(now).state;
            for each in State::ALL {
                metrics
                    .upstream_state
                    .with_label_values(&[names[0], names[1], each.as_str()])
                    .set(i64::from(each == state));
            }
        }
    }

    fn export_config(&self) {
        let snapshot = self.snapshot();
        let loaded = &self.resources.metrics.config_loaded;
        loaded.reset();
        let since_1970 = snapshot
            .built_at
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let hash: String = snapshot.loaded.hash.chars().take(12).collect();
        loaded
            .with_label_values(&[hash.as_str()])
            .set(since_1970.as_secs_f64());
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway")
            .field("snapshot", &*self.snapshot())
            .finish_non_exhaustive()
    }
}

/// Says in the log what a reload changed, and what it could not.
fn announce(old: &Snapshot, new: &Snapshot) {
    let (was, is) = (old.config(), new.config());
    let names = |snapshot: &Snapshot| -> Vec<String> {
        snapshot
            .upstreams()
            .map(|(_, upstream)| upstream.name.to_string())
            .collect()
    };
    let (before, after) = (names(old), names(new));
    let only = |some: &[String], others: &[String]| {
        let left: Vec<_> = some.iter().filter(|name| !others.contains(name)).collect();
        left.iter()
            .map(|name| name.as_str())
            .collect::<Vec<_>>()
            .join(",")
    };
    log::info!(
        "configuration reloaded: version={} hash={} upstreams_added=[{}] upstreams_removed=[{}] routes={} plugins={}",
        new.version,
        new.loaded.hash.chars().take(12).collect::<String>(),
        only(&after, &before),
        only(&before, &after),
        is.routes.len(),
        is.plugins.len(),
    );
    for (key, changed) in [
        ("listen", was.listen != is.listen),
        ("admin.listen", was.admin.listen != is.admin.listen),
        ("threads", was.threads != is.threads),
        (
            "limits.header_timeout",
            was.limits.header_timeout != is.limits.header_timeout,
        ),
        ("log.format", was.log.format != is.log.format),
        ("log.file", was.log.file != is.log.file),
    ] {
        if changed {
            log::warn!("{key} has changed: this needs a restart, or an upgrade");
        }
    }
    for warning in &new.loaded.warnings {
        log::warn!("{warning}");
    }
}
