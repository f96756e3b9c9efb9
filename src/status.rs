//! What `/health` says, on the data listener and on the admin listener.

use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use crate::{
    gateway::{Gateway, Snapshot},
    upstreams::State,
};

/// The state of the gateway and of every upstream; no address, no secret.
pub fn report(gateway: &Gateway, snapshot: &Snapshot) -> Value {
    let now = Instant::now();
    let upstreams: Vec<_> = snapshot
        .upstreams()
        .map(|(group, upstream)| {
            json!({
                "name": &*upstream.name,
                "group": &*group.name,
                "kind": upstream.config.kind.to_string(),
                "state": upstream.health.state(now).as_str(),
                "in_flight": upstream.in_flight(),
            })
        })
        .collect();
    let ready = snapshot
        .upstreams()
        .filter(|(_, upstream)| upstream.health.state(now) == State::Ready)
        .count();
    let status = match ready {
        0 => "down",
        some if some < upstreams.len() => "degraded",
        _ => "ok",
    };
    let reload = gateway.last_reload().map(|last| {
        json!({
            "ok": last.problems.is_empty(),
            "at": seconds(last.at),
            "problems": last.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    });
    let off: Vec<_> = snapshot.loaded.disabled.iter().collect();
    json!({
        "status": status,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": gateway.started.elapsed().as_secs(),
        "config": {
            "version": snapshot.version,
            "hash": snapshot.loaded.hash,
            "loaded": seconds(snapshot.built_at),
            "last_reload": reload,
        },
        "upstreams": upstreams,
        "switched_off": off,
    })
}

/// Returns a time as seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
