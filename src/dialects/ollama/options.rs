//! What every call of Ollama has: the model, its options, how long it stays.

use serde_json::{Map, Value, json};

use super::size::Size;
use crate::{
    config::{KeepAlive, Time, Upstream},
    dialects::Call,
};

/// What a client may ask for, and what it is called in `options`; of two that
/// mean the same the later counts.
const OPTIONS: [(&str, &str); 12] = [
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("typical_p", "typical_p"),
    ("seed", "seed"),
    ("stop", "stop"),
    ("frequency_penalty", "frequency_penalty"),
    ("presence_penalty", "presence_penalty"),
    ("repetition_penalty", "repeat_penalty"),
    ("repeat_penalty", "repeat_penalty"),
    ("repeat_last_n", "repeat_last_n"),
];

/// Takes a member out of the client's body; null counts as absent.
pub(super) fn take(body: &mut Map<String, Value>, key: &str) -> Option<Value> {
    body.shift_remove(key).filter(|value| !value.is_null())
}

/// Adds to `out` what a call that generates text has in common with the others.
/// Returns the context that is asked for.
pub(super) fn finish(
    call: &Call<'_>,
    body: &mut Map<String, Value>,
    size: Size,
    out: &mut Map<String, Value>,
) -> u32 {
    let mut options = Map::new();
    for (theirs, ours) in OPTIONS {
        match take(body, theirs) {
            Some(Value::String(one)) if theirs == "stop" => {
                options.insert(ours.to_owned(), json!([one]));
            }
            Some(value) => {
                options.insert(ours.to_owned(), value);
            }
            None => {}
        }
    }
    let answer = num_predict(call);
    if let Some(tokens) = answer {
        options.insert("num_predict".to_owned(), tokens.into());
    }
    let num_ctx = place(call, size.context(answer), &mut options);
    out.insert("options".to_owned(), options.into());
    out.insert("stream".to_owned(), call.request.stream.into());
    stay(call.upstream, out);
    num_ctx
}

/// Adds where and in how much memory the model computes, by how many tokens must
/// fit. Returns the context that is asked for.
pub(super) fn place(call: &Call<'_>, tokens: u32, options: &mut Map<String, Value>) -> u32 {
    let num_ctx = (call.context)(tokens);
    options.insert("num_ctx".to_owned(), num_ctx.into());
    if let Some(threads) = call.upstream.num_thread {
        options.insert("num_thread".to_owned(), threads.into());
    }
    num_ctx
}

/// Adds how long the model stays loaded.
pub(super) fn stay(upstream: &Upstream, out: &mut Map<String, Value>) {
    let keep_alive = match upstream.keep_alive {
        None => return,
        Some(KeepAlive::Forever(number)) => number.into(),
        Some(KeepAlive::For(time)) => go_duration(time).into(),
    };
    out.insert("keep_alive".to_owned(), keep_alive);
}

/// Returns a time as Go reads it. Below a day it is written alike.
fn go_duration(time: Time) -> String {
    let text = time.to_string();
    if text.contains("day") {
        return format!("{}s", time.get().as_secs());
    }
    text
}

/// Returns the bound on the answer: the client's, and never more than the
/// configuration's.
fn num_predict(call: &Call<'_>) -> Option<u64> {
    let wish = call.request.max_tokens.map(|wish| wish.value);
    match (wish, call.upstream.max_tokens) {
        (Some(wish), Some(cap)) => Some(wish.min(cap)),
        (wish, cap) => wish.or(cap),
    }
}
