//! What outlives a snapshot: metrics, events, and the state that plugins keep
//! across reloads.

use std::{
    any::{Any, TypeId},
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    events::Events, lifecycle::Lifecycle, memory::Memory, metrics::Metrics,
    service_manager::ServiceManager, worker::Workers,
};

type Shared = HashMap<(TypeId, String), Arc<dyn Any + Send + Sync>>;

/// Handles that every snapshot is built with. One per process.
pub struct Resources {
    /// Every metric family.
    pub metrics: Arc<Metrics>,
    /// What changed, for whoever wants to hear of it.
    pub events: Arc<Events>,
    /// Whether the process serves or stops.
    pub lifecycle: Lifecycle,
    /// How near the end of the memory is.
    pub(crate) memory: Memory,
    /// Who started the process, and is told how it is.
    pub service_manager: ServiceManager,
    /// The threads that work beside the requests.
    pub workers: Workers,
    shared: Mutex<Shared>,
}

impl Resources {
    /// Makes the resources of a new process.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            events: Arc::new(Events::new(Arc::clone(&metrics))),
            metrics,
            lifecycle: Lifecycle::new(),
            memory: Memory::default(),
            service_manager: ServiceManager::default(),
            workers: Workers::default(),
            shared: Mutex::new(HashMap::new()),
        }
    }

    /// Returns the state of type `T` that is kept under `name`, made by its
    /// `Default` at the first call. The next snapshot gets the very same.
    pub fn shared<T: Default + Send + Sync + 'static>(&self, name: &str) -> Arc<T> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = shared
            .entry((TypeId::of::<T>(), name.to_owned()))
            .or_insert_with(|| Arc::new(T::default()));
        Arc::clone(kept)
            .downcast()
            .expect("the type is part of the key")
    }
}

impl Default for Resources {
    fn default() -> Self {
        Self::new(Arc::new(Metrics::new()))
    }
}

impl fmt::Debug for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resources").finish_non_exhaustive()
    }
}
