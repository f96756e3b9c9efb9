//! What every test needs: the binary with a configuration, and a client.
//!
//! **Invariant:** nothing sleeps. What takes time is waited for with a deadline
//! ([`eventually`]).

pub mod by_hand;
pub mod frames;
pub mod gateway;
pub mod http;
pub mod keys;
pub mod payloads;
pub mod scripted;

pub use gateway::Gateway;
pub use http::{Answer, Connection};
pub use scripted::Scripted;

use std::{future::Future, time::Duration};

use forebay::sim::{Sim, SimOptions};
use tokio::time::{Instant, interval, timeout};

/// How long anything that should happen may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

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
    format!(
        "      - {{ name: {}, kind: vllm, url: \"{}\" }}\n",
        sim.name(),
        sim.url()
    )
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

/// The YAML of one upstream, with further keys: `concurrent: 1, weight: 3`.
pub fn upstream_at(name: &str, url: &str, keys: &str) -> String {
    let comma = if keys.is_empty() { "" } else { ", " };
    format!("      - {{ name: {name}, url: \"{url}\"{comma}{keys} }}\n")
}

/// The YAML of one group, to stand under `groups:`; with further keys:
/// `local: true, retry_ambiguous: false`.
pub fn group_of(name: &str, keys: &str, upstreams: &[String]) -> String {
    let mut yaml = format!("  {name}:\n");
    for key in keys.split(", ").filter(|key| !key.is_empty()) {
        yaml.push_str(&format!("    {key}\n"));
    }
    yaml.push_str("    upstreams:\n");
    yaml.extend(upstreams.iter().map(String::as_str));
    yaml
}

/// The YAML of groups with these upstreams, and of one route through all of
/// them in this order; `#fallback` after a name makes the group the fallback.
pub fn groups_in_order(groups: &[(&str, &[&Sim])]) -> String {
    let mut yaml = String::from("groups:\n");
    let mut ordinary = Vec::new();
    let mut last = String::new();
    for (name, sims) in groups {
        let group = name.strip_suffix("#fallback").unwrap_or(name);
        let upstreams: Vec<String> = sims
            .iter()
            .map(|sim| upstream_at(sim.name(), &sim.url(), "kind: vllm"))
            .collect();
        yaml.push_str(&group_of(group, "", &upstreams));
        if group == *name {
            ordinary.push(group);
        } else {
            last = format!(", fallback: {group}");
        }
    }
    let ordinary = ordinary.join(", ");
    yaml.push_str(&format!(
        "routes:\n  - {{ model: \"*\", groups: [{ordinary}]{last} }}\n"
    ));
    yaml
}

/// The YAML of one group with these settings, each a line of YAML.
pub fn group_with(keys: &[&str], sims: &[&Sim]) -> String {
    let upstreams: Vec<String> = sims
        .iter()
        .map(|sim| upstream_at(sim.name(), &sim.url(), "kind: vllm"))
        .collect();
    let group = group_of("gpus", "", &upstreams);
    let keys: String = keys.iter().map(|key| format!("    {key}\n")).collect();
    let group = group.replace("    upstreams:", &format!("{keys}    upstreams:"));
    format!("groups:\n{group}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n")
}
