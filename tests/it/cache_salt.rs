//! Callers' prompts kept apart in the caches of upstreams.

use forebay::sim::Sim;

use crate::support::{
    Gateway, chat, group_of,
    keys::{chat_as, keys},
    sim, upstream_at,
};

/// Sends a chat with a salt of the client's own, and returns the one that came
/// to the upstream.
async fn salt_at(gateway: &Gateway, sim: &Sim, key: &str) -> Option<String> {
    let body = chat("demo").replacen('{', r#"{"cache_salt":"of-the-client","#, 1);
    let answer = chat_as(gateway, key, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let records = sim.records();
    let sent = records.last().unwrap().json();
    Some(sent.get("cache_salt")?.as_str().unwrap().to_owned())
}

fn yaml(sim: &Sim, kind: &str) -> String {
    let group = group_of("g", "", &[upstream_at("a", &sim.url(), kind)]);
    format!(
        "plugins:\n  - auth: {{ keys_file: keys.yaml }}\n  - cache_salt: {{ secret: env:SALT, shared: {{ class: [\"pupil-*\"] }} }}\n\
         groups:\n{group}routes:\n  - {{ model: \"*\", groups: [g] }}\n"
    )
}

async fn start(sim: &Sim, kind: &str) -> Gateway {
    let file = keys(&[("alice", ""), ("bob", ""), ("pupil-1", ""), ("pupil-2", "")]);
    let env = [("SALT", "a secret of the gateway")];
    Gateway::start_with(&yaml(sim, kind), &[("keys.yaml", &file)], &env).await
}

#[tokio::test]
async fn each_caller_has_a_salt_that_the_client_cannot_choose() {
    let vllm = sim("a").await;
    let gateway = start(&vllm, "kind: vllm").await;
    let alice = salt_at(&gateway, &vllm, "alice").await.unwrap();
    assert_eq!(alice.len(), 43, "{alice}");
    assert_eq!(salt_at(&gateway, &vllm, "alice").await.unwrap(), alice);
    assert_ne!(salt_at(&gateway, &vllm, "bob").await.unwrap(), alice);
    let one = salt_at(&gateway, &vllm, "pupil-1").await;
    assert_eq!(salt_at(&gateway, &vllm, "pupil-2").await, one);
    // Another gateway with the same secret: the same.
    let other = start(&vllm, "kind: vllm").await;
    assert_eq!(salt_at(&other, &vllm, "alice").await.unwrap(), alice);
}

#[tokio::test]
async fn who_knows_no_salt_gets_none() {
    let other = sim("a").await;
    let gateway = start(&other, "kind: llamacpp").await;
    assert_eq!(salt_at(&gateway, &other, "alice").await, None);
    gateway.logged("no upstream is of kind vllm").await;
}
