//! `forebay ctl` and `forebay upgrade`: what people do to a running gateway, over
//! its admin listener.
//!
//! Where that is and which key it wants is read from the configuration the
//! gateway runs with, and only that: secrets of upstreams need not be set in the
//! shell of whoever types this.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::Value;
use url::Url;

use crate::config::{self, Admin, Secret, SecretRef};

/// How long each step may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an upgrade may take: `upgrade.prepare` at its most, and some.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// The longest answer that is read.
const ANSWER_MAX: u64 = 16 * 1024 * 1024;

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum CtlCommand {
    /// Lists every upstream with its state.
    Status,
    /// Lists what every key has used of its budget.
    Usage,
    /// Forgets what is known of one upstream, or of all: pauses, breakers, bad keys.
    Reset {
        /// The upstream; all if absent.
        name: Option<String>,
    },
    /// Gives an upstream nothing new; what is under way ends as usual.
    Drain {
        /// The upstream.
        name: String,
    },
    /// Gives an upstream something again.
    Undrain {
        /// The upstream.
        name: String,
    },
}

/// Which gateway.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// The admin listener, such as http://127.0.0.1:7071; else as the
    /// configuration says.
    #[arg(long, value_name = "URL", global = true)]
    admin: Option<String>,
    /// The key of the admin listener, env:NAME or file:PATH; else as the
    /// configuration says.
    #[arg(long, value_name = "SECRET", global = true)]
    key: Option<String>,
}

/// Where a gateway is asked.
struct Asked {
    at: SocketAddr,
    key: Option<Secret>,
}

impl Target {
    /// Finds out where, and with which key.
    fn find(&self, file: Option<&Path>) -> anyhow::Result<Asked> {
        // With both named, the configuration has nothing to add.
        let configured = match (&self.admin, file) {
            (Some(_), _) | (None, None) => Admin::default(),
            (None, Some(file)) => config::admin_of(file).map_err(anyhow::Error::msg)?,
        };
        let at = match &self.admin {
            Some(url) => address(url)?,
            None => reachable(&configured.listen)?,
        };
        let here = Path::new(".");
        let base = file.and_then(Path::parent).unwrap_or(here);
        let key = match &self.key {
            Some(text) => {
                let reference: SecretRef = text.parse().map_err(anyhow::Error::msg)?;
                Some(reference.read(here).context("--key")?)
            }
            None => match &configured.key {
                Some(reference) => Some(reference.read(base).context("admin.key")?),
                None => None,
            },
        };
        Ok(Asked { at, key })
    }
}

impl Asked {
    /// Asks, and returns what it says; an error if it refuses.
    fn ask(&self, method: &str, path: &str, patience: Duration) -> anyhow::Result<Value> {
        let at = self.at;
        let (status, body) = ask(at, method, path, self.key.as_ref(), patience)
            .with_context(|| format!("the admin listener at {at} cannot be reached"))?;
        let body: Value = serde_json::from_slice(&body)
            .with_context(|| format!("what answers at {at} is no admin listener of forebay"))?;
        if status != 200 {
            let why = body.pointer("/error/message").and_then(Value::as_str);
            bail!("{} (status {status})", why.unwrap_or("refused"));
        }
        Ok(body)
    }
}

/// Has a running gateway replaced, and returns what to print.
pub(crate) fn upgrade(target: &Target, file: Option<&Path>) -> anyhow::Result<String> {
    let body = target
        .find(file)?
        .ask("POST", "/upgrade", UPGRADE_PATIENCE)?;
    let (pid, version) = (text(&body, "pid"), text(&body, "version"));
    Ok(format!("upgraded: pid={pid} version={version}"))
}

/// Does it, and returns what to print.
pub(crate) fn run(
    command: &CtlCommand,
    target: &Target,
    file: Option<&Path>,
) -> anyhow::Result<String> {
    let asked = target.find(file)?;
    let (method, path) = match command {
        CtlCommand::Status => ("GET", "/upstreams".to_owned()),
        CtlCommand::Usage => ("GET", "/usage".to_owned()),
        CtlCommand::Reset { name: None } => ("POST", "/upstreams/reset".to_owned()),
        CtlCommand::Reset { name: Some(name) } => ("POST", one(name, "reset")?),
        CtlCommand::Drain { name } => ("POST", one(name, "drain")?),
        CtlCommand::Undrain { name } => ("POST", one(name, "undrain")?),
    };
    let body = asked.ask(method, &path, PATIENCE)?;
    Ok(match command {
        CtlCommand::Usage => usage(&body),
        _ => table(&body),
    })
}

/// Returns the path for an upstream; its name is one that a configuration can
/// have, and so needs no escaping.
fn one(name: &str, action: &str) -> anyhow::Result<String> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || !name.bytes().all(fits) {
        bail!("expected the name of an upstream, found {name:?}");
    }
    Ok(format!("/upstreams/{name}/{action}"))
}

fn address(url: &str) -> anyhow::Result<SocketAddr> {
    let parsed = Url::parse(url).ok().filter(|url| url.scheme() == "http");
    let expected =
        || format!("--admin: expected a URL such as http://127.0.0.1:7071, found {url:?}");
    let parsed = parsed.with_context(expected)?;
    let found = parsed.socket_addrs(|| None).with_context(expected)?;
    found.first().copied().with_context(expected)
}

/// Returns where a listener is reached from this machine.
fn reachable(listen: &str) -> anyhow::Result<SocketAddr> {
    let mut at: SocketAddr = listen
        .parse()
        .with_context(|| format!("admin.listen: expected an address, found {listen:?}"))?;
    if at.ip().is_unspecified() {
        at.set_ip(match at {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    Ok(at)
}

fn ask(
    at: SocketAddr,
    method: &str,
    path: &str,
    key: Option<&Secret>,
    patience: Duration,
) -> std::io::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let key = key.map_or_else(String::new, |key| {
        format!("authorization: Bearer {}\r\n", key.expose())
    });
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\ncontent-length: 0\r\n{key}\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
    parse(&answer).ok_or_else(|| std::io::Error::other("not a valid answer"))
}

/// Takes status and body out of an answer that has a length, or ends with its
/// connection.
fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = memchr::memmem::find(answer, b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some((status, answer.get(end + 4..)?.to_vec()))
}

fn text(one: &Value, key: &str) -> String {
    match one.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => "-".to_owned(),
    }
}

/// Writes what keys have used as lines in columns.
fn usage(body: &Value) -> String {
    let titles = ["KEY", "PERIOD", "REQUESTS", "TOKENS", "OF", "MONEY", "OF"];
    let mut rows = vec![titles.map(str::to_owned)];
    let keys = body.get("keys").and_then(Value::as_array);
    for one in keys.into_iter().flatten() {
        for period in ["day", "month"] {
            let Some(used) = one.get(period) else {
                continue;
            };
            let money = |key: &str| {
                let units = used.get(key).and_then(Value::as_f64);
                units.map_or_else(|| "-".to_owned(), |units| format!("{units:.4}"))
            };
            rows.push([
                text(one, "key"),
                text(body, period),
                text(used, "requests"),
                text(used, "tokens"),
                text(used, "tokens_max"),
                money("money"),
                money("money_max"),
            ]);
        }
    }
    columns(&rows)
}

/// Writes the upstreams as lines in columns.
fn table(body: &Value) -> String {
    let mut rows =
        vec![["NAME", "GROUP", "STATE", "REASON", "FOR", "IN FLIGHT"].map(str::to_owned)];
    let mut open = Vec::new();
    let upstreams = body.get("upstreams").and_then(Value::as_array);
    for one in upstreams.into_iter().flatten() {
        let name = text(one, "name");
        let lasts = one.get("seconds").and_then(Value::as_f64);
        rows.push([
            name.clone(),
            text(one, "group"),
            text(one, "state"),
            reason(one),
            lasts.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.0}s")),
            text(one, "in_flight"),
        ]);
        let breakers = one.get("breakers").and_then(Value::as_array);
        for breaker in breakers.into_iter().flatten() {
            // A client's word: nothing of it may move the cursor.
            let model = text(breaker, "model").escape_debug().to_string();
            let phase = text(breaker, "phase");
            open.push(format!(
                "breaker: upstream={name} model={model} phase={phase}"
            ));
        }
    }
    let mut lines = vec![columns(&rows)];
    lines.extend(open);
    if let Some(process) = body.get("process") {
        lines.push(format!(
            "process: pid={} stage={} version={}",
            text(process, "pid"),
            text(process, "stage"),
            text(process, "version")
        ));
    }
    lines.join("\n")
}

/// Returns why an upstream is in its state, as exactly as it is known.
fn reason(one: &Value) -> String {
    let reason = text(one, "reason");
    match one.get("detail").and_then(Value::as_str) {
        Some(detail) => format!("{reason}: {detail}"),
        None => reason,
    }
}

/// Pads the cells of each column to the widest.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(&widths);
        let line: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        line.join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn states_are_shown_in_columns_and_models_cannot_move_the_cursor() {
        let body = json!({ "upstreams": [
            { "name": "gpu-1", "group": "gpus", "state": "cooling", "reason": "rate_limit",
              "seconds": 6.6, "in_flight": 2, "breakers": [] },
            { "name": "b", "group": "gpus", "state": "ready", "reason": null,
              "seconds": null, "in_flight": 0,
              "breakers": [ { "model": "x\u{1b}[2J", "phase": "open", "seconds": 1.0 } ] },
            { "name": "c", "group": "gpus", "state": "down", "reason": "tls",
              "detail": "handshake_failed", "seconds": null, "in_flight": 0, "breakers": [] },
        ]});
        let lines = "\
NAME   GROUP  STATE    REASON                 FOR  IN FLIGHT
gpu-1  gpus   cooling  rate_limit             7s   2
b      gpus   ready    -                      -    0
c      gpus   down     tls: handshake_failed  -    0
breaker: upstream=b model=x\\u{1b}[2J phase=open";
        assert_eq!(table(&body), lines);
    }

    #[test]
    fn a_listener_on_every_address_is_reached_on_this_machine() {
        assert_eq!(
            reachable("0.0.0.0:7071").unwrap().to_string(),
            "127.0.0.1:7071"
        );
        assert_eq!(reachable("[::]:7071").unwrap().to_string(), "[::1]:7071");
        assert!(reachable("nowhere").is_err());
        assert_eq!(address("http://127.0.0.1:7071").unwrap().port(), 7071);
        for wrong in ["127.0.0.1:7071", "https://127.0.0.1:7071", "nonsense", ""] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_what_can_be_a_name_becomes_part_of_a_path() {
        assert_eq!(one("gpu-1", "reset").unwrap(), "/upstreams/gpu-1/reset");
        for wrong in ["", "a/b", "a b", "a?b", "é", "a\r\nx: y"] {
            assert!(one(wrong, "reset").is_err(), "{wrong}");
        }
    }
}
