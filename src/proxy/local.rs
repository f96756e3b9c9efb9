//! Answers that need no upstream: the list of models, health, what is here.

use std::{collections::HashSet, sync::Arc};

use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::{calls::Call, discover, verdict::model_not_found};
use crate::{
    context::RequestContext,
    error::Result,
    gateway::{Gateway, Snapshot},
    plugins::LocalResponse,
    routes::Model,
    status::{Reader, report, seconds},
    upstreams::MODELS_MAX,
};

/// Answers a call that needs no upstream.
///
/// # Errors
/// 404 for a model that is not there, or not for this caller.
pub(super) async fn answer(
    call: &Call,
    gateway: &Gateway,
    snapshot: &Snapshot,
    ctx: &RequestContext,
    is_ready: bool,
) -> Result<LocalResponse> {
    Ok(match call {
        Call::Models => {
            discover::refresh(&snapshot.routes, &gateway.connector).await;
            ok(&json!({ "object": "list", "data": list(snapshot, ctx) }))
        }
        Call::ModelById(id) => {
            if let Some(model) = visible_models(snapshot, ctx).find(|model| *model.id == **id) {
                ok(&entry(snapshot, id, &model.owner))
            } else if may_use(ctx, id) && snapshot.routes.plan(id, &ctx.restrict).is_ok() {
                ok(&entry(snapshot, id, "forebay"))
            } else {
                return Err(model_not_found(id));
            }
        }
        Call::Health => ok(&report(gateway, snapshot, Reader::Anybody)),
        Call::Ready if is_ready => status(StatusCode::OK, "ready"),
        Call::Ready => status(StatusCode::SERVICE_UNAVAILABLE, "draining"),
        Call::Live => status(StatusCode::OK, "live"),
        Call::Root | Call::Model(_) => ok(&json!({
            "name": "forebay",
            "version": env!("CARGO_PKG_VERSION"),
            "openai_base_url": "/v1",
            "endpoints": endpoints(),
        })),
    })
}

fn endpoints() -> Vec<String> {
    let models = crate::openai::Endpoint::ALL
        .iter()
        .map(|endpoint| format!("POST {}", endpoint.path()));
    let local = [
        "GET /v1/models",
        "GET /v1/models/{id}",
        "GET /health",
        "GET /livez",
        "GET /readyz",
    ];
    models.chain(local.map(str::to_owned)).collect()
}

fn may_use(ctx: &RequestContext, name: &str) -> bool {
    ctx.principal
        .as_ref()
        .is_none_or(|principal| principal.may_use(name))
}

/// The models that this caller may ask for, and that some group may serve him.
fn visible_models<'a>(
    snapshot: &'a Snapshot,
    ctx: &'a RequestContext,
) -> impl Iterator<Item = &'a Model> {
    snapshot
        .routes
        .models_for(&ctx.restrict)
        .filter(|model| may_use(ctx, &model.id))
}

/// What the configuration names, then what upstreams say they have; each once.
fn list(snapshot: &Snapshot, ctx: &RequestContext) -> Vec<Value> {
    let discovered = snapshot
        .routes
        .discovered(&ctx.restrict)
        .filter(|model| may_use(ctx, &model.id));
    let mut seen = HashSet::new();
    visible_models(snapshot, ctx)
        .cloned()
        .chain(discovered)
        .filter(|model| seen.insert(Arc::clone(&model.id)))
        .take(MODELS_MAX)
        .map(|model| entry(snapshot, &model.id, &model.owner))
        .collect()
}

fn entry(snapshot: &Snapshot, id: &str, owner: &str) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": seconds(snapshot.built_at),
        "owned_by": owner,
    })
}

fn ok(body: &Value) -> LocalResponse {
    respond(StatusCode::OK, body)
}

fn status(status: StatusCode, word: &str) -> LocalResponse {
    respond(status, &json!({ "status": word }))
}

fn respond(status: StatusCode, body: &Value) -> LocalResponse {
    LocalResponse {
        status,
        headers: HeaderMap::new(),
        content_type: "application/json",
        body: format!("{body}\n").into(),
    }
}
