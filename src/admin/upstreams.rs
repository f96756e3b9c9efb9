//! What people see of upstreams, and do to them: reset, drain, undrain.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{Response, StatusCode},
    response::IntoResponse,
};
use serde_json::{Value, json};

use super::shape;
use crate::{
    error::Error,
    gateway::{Gateway, Snapshot},
    status,
};

/// How long a reset waits for what the checks say to it, and how often it looks.
const CHECKED_WITHIN: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Every upstream with its state.
pub(super) async fn list(State(gateway): State<Arc<Gateway>>) -> impl IntoResponse {
    Json(json!({
        "upstreams": status::upstreams(&gateway.snapshot()),
        "process": {
            "pid": std::process::id(),
            "stage": gateway.resources.lifecycle.state().stage.as_str(),
            "version": env!("CARGO_PKG_VERSION"),
        },
    }))
}

/// Forgets what is known of every upstream.
pub(super) async fn reset_all(State(gateway): State<Arc<Gateway>>) -> impl IntoResponse {
    let snapshot = gateway.snapshot();
    for (_, upstream) in snapshot.upstreams() {
        upstream.reset(Instant::now());
    }
    log::info!("upstreams reset by hand: all of them");
    checked(&snapshot).await;
    Json(json!({ "upstreams": status::upstreams(&snapshot) }))
}

/// Does something to one upstream.
pub(super) async fn act(
    State(gateway): State<Arc<Gateway>>,
    Path((name, action)): Path<(String, String)>,
) -> Response<Body> {
    let snapshot = gateway.snapshot();
    let found = snapshot.upstreams().find(|(_, one)| *one.name == *name);
    let Some((_, upstream)) = found else {
        let message = "no upstream has this name: see GET /upstreams";
        let status = StatusCode::NOT_FOUND;
        return shape(&Error::refused(status, "unknown_upstream", message));
    };
    let now = Instant::now();
    match action.as_str() {
        "reset" => upstream.reset(now),
        "drain" => upstream.drain(true, now),
        "undrain" if upstream.policy.drain => {
            let message = "the configuration says drain: true";
            let status = StatusCode::CONFLICT;
            return shape(&Error::refused(status, "drained_by_configuration", message));
        }
        "undrain" => upstream.drain(false, now),
        _ => {
            let message = "expected reset, drain or undrain";
            return shape(&Error::refused(
                StatusCode::NOT_FOUND,
                "unknown_action",
                message,
            ));
        }
    }
    log::info!("upstream changed by hand: name={name} action={action}");
    if action == "reset" {
        checked(&snapshot).await;
    }
    let all = status::upstreams(&snapshot);
    let one: Vec<&Value> = all
        .as_array()
        .into_iter()
        .flatten()
        .filter(|one| one["name"] == *name)
        .collect();
    Json(json!({ "upstreams": one })).into_response()
}

/// Waits until those have been asked of which only a check can tell whether they
/// are well again, so that what is shown is true; not for long.
async fn checked(snapshot: &Snapshot) {
    let until = Instant::now() + CHECKED_WITHIN;
    let mut upstreams = snapshot.upstreams();
    while Instant::now() < until && upstreams.any(|(_, one)| one.health.is_doubted()) {
        tokio::time::sleep(LOOK_EVERY).await;
        upstreams = snapshot.upstreams();
    }
}
