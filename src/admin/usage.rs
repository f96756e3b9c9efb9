//! What every key has used of its budget.

use std::{sync::Arc, time::SystemTime};

use axum::{Json, extract::State, response::IntoResponse};
use serde_json::{Value, json};

use crate::{
    config::Allowance,
    gateway::Gateway,
    plugins::{LEDGER, Ledger},
    store::Amount,
};

/// `GET /usage`
pub(super) async fn list(State(gateway): State<Arc<Gateway>>) -> impl IntoResponse {
    let ledger = gateway.resources.shared::<Ledger>(LEDGER);
    let statement = ledger.statement(SystemTime::now());
    let keys: Vec<Value> = statement
        .keys
        .iter()
        .map(|one| {
            let budget = one.budget.unwrap_or_default();
            json!({
                "key": &*one.key,
                "day": period(one.day, budget.day),
                "month": period(one.month, budget.month),
            })
        })
        .collect();
    Json(json!({
        "complete": statement.is_loaded,
        "day": statement.day,
        "month": statement.month,
        "keys": keys,
    }))
}

fn period(used: Amount, allowance: Allowance) -> Value {
    let money = crate::config::Money(used.money);
    json!({
        "requests": used.requests,
        "tokens": used.tokens,
        "tokens_max": allowance.tokens.map(|most| most.get()),
        "money": money.units(),
        "money_max": allowance.money.map(|most| most.units()),
    })
}
