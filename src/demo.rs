//! `forebay demo`: the gateway in front of three simulated model servers, with
//! lines to paste that show what it does when they fail.

use std::{net::SocketAddr, path::Path, process::ExitCode};

use anyhow::Context;
use clap::Args;

use crate::{
    cli::{say, start},
    config,
    gateway::catalog,
    sim::{Sim, SimOptions},
};

/// What the demo can be told.
#[derive(Args, Clone, Debug)]
pub(crate) struct DemoOptions {
    /// The gateway's address.
    #[arg(long, default_value = "127.0.0.1:7070")]
    pub(crate) listen: SocketAddr,
    /// The address of its admin listener.
    #[arg(long, default_value = "127.0.0.1:7071")]
    pub(crate) admin: SocketAddr,
    /// The first of six ports for the simulated servers: three for their APIs,
    /// three for their controls; 0 takes free ones.
    #[arg(long, default_value_t = 7080)]
    pub(crate) sim_port: u16,
}

/// The simulated servers: two in the group `gpus`, one behind it.
const NAMES: [&str; 3] = ["gpu-1", "gpu-2", "ollama"];

/// Runs the demo until a signal says stop.
///
/// # Errors
/// A port is taken.
pub(crate) fn run(options: &DemoOptions) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let sims = runtime.block_on(start_sims(options))?;
    let yaml = yaml(options, &sims);
    let loaded = config::parse(&yaml, "(demo)", Path::new("."), &catalog())
        .map_err(|problems| anyhow::anyhow!("{problems}"))?;
    let text = manual(options, &sims);
    let code = start(loaded, None, None, |_| {
        // Standard output may be closed; the demo runs all the same.
        say(&text).ok();
    });
    drop(sims);
    code
}

async fn start_sims(options: &DemoOptions) -> anyhow::Result<Vec<Sim>> {
    let mut sims = Vec::with_capacity(NAMES.len());
    for (index, name) in (0_u16..).zip(NAMES) {
        let port = |offset: u16| match options.sim_port {
            0 => 0,
            first => first.saturating_add(offset),
        };
        let mut sim = SimOptions::quick(name);
        sim.listen = SocketAddr::from(([127, 0, 0, 1], port(index)));
        sim.control = SocketAddr::from(([127, 0, 0, 1], port(index + 3)));
        sim.first_token = std::time::Duration::from_millis(50);
        sim.rate = std::num::NonZeroU32::new(40);
        let listen = sim.listen;
        sims.push(
            Sim::start(sim).await.with_context(|| {
                format!("the simulated server {name} cannot listen on {listen}")
            })?,
        );
    }
    Ok(sims)
}

fn yaml(options: &DemoOptions, sims: &[Sim]) -> String {
    let upstream = |sim: &Sim, what| {
        format!(
            "      - {{ name: {}, {what}, url: \"{}\" }}\n",
            sim.name(),
            sim.url()
        )
    };
    let mut gpus = String::new();
    let mut fallback = String::new();
    for sim in sims {
        match sim.name() {
            "ollama" => fallback.push_str(&upstream(sim, "dialect: ollama")),
            _ => gpus.push_str(&upstream(sim, "kind: vllm")),
        }
    }
    format!(
        "listen: {}
admin: {{ listen: {} }}
log: {{ level: warn }}
plugins:
  - auth: none
groups:
  gpus:
    local: true
    upstreams:
{gpus}  ollama:
    local: true
    upstreams:
{fallback}routes:
  - {{ model: demo, groups: [gpus], fallback: ollama }}
",
        options.listen, options.admin
    )
}

fn manual(options: &DemoOptions, sims: &[Sim]) -> String {
    let gateway = options.listen;
    let admin = options.admin;
    let control = |index: usize| {
        sims.get(index)
            .map_or_else(String::new, |sim| sim.control_addr().to_string())
    };
    let (first, second) = (control(0), control(1));
    format!(
        r#"Forebay listens on http://{gateway}/v1 in front of three simulated model servers:
gpu-1 and gpu-2 in the group `gpus`, and `ollama` as their fallback. The model is `demo`.

Ask it, and see in the header who answered:

  curl -si http://{gateway}/v1/chat/completions -H 'content-type: application/json' \
    -d '{{"model":"demo","messages":[{{"role":"user","content":"Hello"}}]}}'

As a stream:

  curl -sN http://{gateway}/v1/chat/completions -H 'content-type: application/json' \
    -d '{{"model":"demo","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'

From Python (pip install openai):

  python3 -c '
from openai import OpenAI
client = OpenAI(base_url="http://{gateway}/v1", api_key="unused")
answer = client.chat.completions.create(model="demo", messages=[{{"role": "user", "content": "Hello"}}])
print(answer.choices[0].message.content)'

Stop the servers one after the other, and ask again after each:
x-forebay-upstream changes, and at last there is x-forebay-fallback: 1.

  curl -s -X POST http://{first}/stop
  curl -s -X POST http://{second}/stop

Start them again:

  curl -s -X POST http://{first}/start
  curl -s -X POST http://{second}/start

State and metrics:

  curl -s http://{gateway}/health
  curl -s http://{admin}/metrics

Ctrl-C ends the demo."#
    )
}
