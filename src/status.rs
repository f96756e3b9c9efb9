//! What `/health` says, on the data listener and on the admin listener.

use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use crate::{
    context::Class,
    gateway::{Gateway, Snapshot},
    upstreams::{State, Status, TlsFault, state::Reason},
};

/// Who reads a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Whoever reaches the data listener. Learns where the configuration is
    /// wrong, not what it says there: that may name files and addresses.
    Anybody,
    /// Whoever may use the admin listener.
    Admin,
}

/// The state of the gateway and of every upstream; no address, no secret.
pub fn report(gateway: &Gateway, snapshot: &Snapshot, reader: Reader) -> Value {
    let now = Instant::now();
    let upstreams: Vec<_> = snapshot
        .upstreams()
        .map(|(group, upstream)| {
            let status = upstream.shown(now);
            json!({
                "name": &*upstream.name,
                "group": &*group.name,
                "kind": upstream.config.kind.to_string(),
                "state": status.state.as_str(),
                "reason": reason(status),
                "in_flight": upstream.in_flight(),
            })
        })
        .collect();
    let groups = snapshot.routes.groups().iter();
    let queues: Vec<_> = groups
        .map(|group| {
            json!({
                "group": &*group.name,
                "interactive": group.waiting.len_of(Class::Interactive),
                "batch": group.waiting.len_of(Class::Batch),
            })
        })
        .collect();
    let states = snapshot
        .upstreams()
        .map(|(_, upstream)| upstream.status(now).state)
        // Switched off on purpose.
        .filter(|state| *state != State::Off);
    let states: Vec<_> = states.collect();
    let status = if !states.iter().any(|state| state.serves()) {
        "down"
    } else if states.iter().all(|state| *state == State::Ready) {
        "ok"
    } else {
        "degraded"
    };
    let reload = gateway.last_reload().map(|last| {
        json!({
            "ok": last.problems.is_empty(),
            "at": seconds(last.at),
            "problems": last
                .problems
                .iter()
                .map(|problem| match reader {
                    Reader::Anybody => format!("line {}: {}", problem.line, problem.path),
                    Reader::Admin => problem.to_string(),
                })
                .collect::<Vec<_>>(),
        })
    });
    let off: Vec<_> = snapshot.loaded.disabled.iter().collect();
    json!({
        "status": status,
        "stage": gateway.resources.lifecycle.state().stage.as_str(),
        "pid": (reader == Reader::Admin).then(std::process::id),
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": gateway.started.elapsed().as_secs(),
        "config": {
            "version": snapshot.version,
            "hash": snapshot.loaded.hash,
            "loaded": seconds(snapshot.built_at),
            "last_reload": reload,
        },
        "upstreams": upstreams,
        "queues": queues,
        "switched_off": off,
    })
}

/// Every upstream with all that is known of it, for whoever may use the admin
/// listener.
pub fn upstreams(snapshot: &Snapshot) -> Value {
    let now = Instant::now();
    let upstreams = snapshot.upstreams().map(|(group, upstream)| {
        let status = upstream.shown(now);
        let breakers = upstream.health.breakers(now).into_iter();
        let breakers: Vec<_> = breakers
            .map(|(model, phase, wait)| {
                json!({ "model": &*model, "phase": phase, "seconds": wait.as_secs_f64() })
            })
            .collect();
        json!({
            "name": &*upstream.name,
            "group": &*group.name,
            "kind": upstream.config.kind.to_string(),
            "state": status.state.as_str(),
            "reason": reason(status),
            "detail": upstream
                .health
                .tls_fault(&upstream.policy, now)
                .map(TlsFault::as_str),
            "seconds": status.wait.map(|wait| wait.as_secs_f64()),
            "in_flight": upstream.in_flight(),
            "breakers": breakers,
        })
    });
    Value::Array(upstreams.collect())
}

fn reason(status: Status) -> Option<&'static str> {
    (status.reason != Reason::None).then(|| status.reason.as_str())
}

/// Returns a time as seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
