//! What every test needs: the binary with a configuration, and a client.
//!
//! **Invariant:** nothing sleeps. What takes time is waited for with a deadline
//! ([`eventually`]).

pub mod gateway;
pub mod http;

pub use gateway::Gateway;
pub use http::{Answer, Connection};

use std::{future::Future, time::Duration};

use forebay::sim::{Sim, SimOptions};
use tokio::time::{Instant, interval, timeout};

/// How long anything that should happen may take.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Asks again and again until `check` says yes, or panics with `what`.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let until = Instant::now() + DEADLINE;
    let mut tick = interval(Duration::from_millis(10));
    loop {
        tick.tick().await;
        if check().await {
            return;
        }
        assert!(Instant::now() < until, "in {DEADLINE:?} never: {what}");
    }
}

/// Waits for something that must come.
pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match timeout(DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => panic!("in {DEADLINE:?} never: {what}"),
    }
}

/// Starts a simulated upstream without delays.
pub async fn sim(name: &str) -> Sim {
    Sim::start(SimOptions::quick(name)).await.unwrap()
}

/// The YAML of one group with these upstreams, and a route for every model.
pub fn one_group(sims: &[&Sim]) -> String {
    let mut yaml = String::from("groups:\n  gpus:\n    local: true\n    upstreams:\n");
    for sim in sims {
        yaml.push_str(&upstream(sim));
    }
    yaml.push_str("routes:\n  - { model: \"*\", groups: [gpus] }\n");
    yaml
}

/// The YAML of two groups, the second the fallback of the first.
pub fn with_fallback(sims: &[&Sim], fallback: &Sim) -> String {
    let mut yaml = String::from("groups:\n  gpus:\n    local: true\n    upstreams:\n");
    for sim in sims {
        yaml.push_str(&upstream(sim));
    }
    yaml.push_str("  ollama:\n    local: true\n    upstreams:\n");
    yaml.push_str(&upstream(fallback));
    yaml.push_str("routes:\n  - { model: \"*\", groups: [gpus], fallback: ollama }\n");
    yaml
}

fn upstream(sim: &Sim) -> String {
    format!("      - {{ name: {}, kind: vllm, url: \"{}\" }}\n", sim.name(), sim.url())
}

/// A small chat request.
pub fn chat(model: &str) -> String {
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"Hello"}}]}}"#)
}

/// A small chat request that wants a stream.
pub fn chat_stream(model: &str) -> String {
    format!(
        r#"{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}"#
    )
}
