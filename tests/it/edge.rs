//! The edge: how many connections clients may have, how long each may take over
//! a header, and what the process does when it runs out of files.

use std::net::SocketAddr;

use forebay::sim::Sim;
use tokio::task::JoinSet;

use crate::support::{
    Connection, Gateway, chat, chat_stream, eventually,
    http::{get, post_chat},
    one_group, sim,
};

const CHAT: &str = "/v1/chat/completions";
const OPEN: &str = "forebay_client_connections";

fn hits(limit: &str) -> String {
    format!("forebay_limit_hits_total{{limit=\"{limit}\"}}")
}

/// Opens connections that each have had one answer, so that they are counted.
async fn used(addr: SocketAddr, count: usize) -> Vec<Connection> {
    let mut open = Vec::new();
    for _ in 0..count {
        let mut connection = Connection::open(addr).await;
        connection.request("GET", "/livez", &[], b"").await;
        assert_eq!(connection.answer().await.status, 200);
        open.push(connection);
    }
    open
}

/// Asks on a new connection, and checks that it is turned away as it should be.
async fn is_turned_away(addr: SocketAddr) {
    let mut connection = Connection::open(addr).await;
    let body = chat("demo");
    let sent = crate::support::http::build("POST", CHAT, &[], body.as_bytes());
    connection.try_send(&sent).await;
    let answer = connection.answer().await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.error_code(), "too_many_connections");
    assert_eq!(answer.header("connection"), Some("close"));
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!(wait > 0);
    assert!(connection.rest().await.is_empty());
}

/// Opens connections that each have a request under way, for long.
async fn at_work(addr: SocketAddr, count: usize) -> Vec<Connection> {
    let mut open = Vec::new();
    for _ in 0..count {
        let mut connection = Connection::open(addr).await;
        let body = chat_stream("demo");
        connection.request("POST", CHAT, &[], body.as_bytes()).await;
        connection.read_until("answers:").await;
        open.push(connection);
    }
    open
}

/// A simulator whose streams last.
async fn lasting() -> Sim {
    let sim = sim("gpu-1").await;
    sim.fault("path=*;tokens=100000;gap=50ms").await.unwrap();
    sim
}

#[tokio::test]
async fn a_connection_too_many_gets_a_503_and_a_free_place_is_given_again() {
    let sim = lasting().await;
    let limits = "limits: { connections: 5 }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    gateway.metric_becomes(OPEN, 0.0).await;
    let mut held = at_work(gateway.addr, 5).await;
    assert_eq!(gateway.metric(OPEN).await, Some(5.0));
    let max = gateway.metric("forebay_client_connections_max").await;
    assert_eq!(max, Some(5.0));
    for _ in 0..3 {
        is_turned_away(gateway.addr).await;
    }
    assert_eq!(gateway.metric(&hits("connections")).await, Some(3.0));
    gateway.logged("limit=connections client=127.0.0.1").await;
    assert_eq!(gateway.log().matches("limit=connections ").count(), 1);
    assert_eq!(sim.records().len(), 5);
    drop(held.pop());
    gateway.metric_becomes(OPEN, 4.0).await;
    assert_eq!(get(gateway.addr, "/livez").await.status, 200);
    drop(held);
    gateway.metric_becomes(OPEN, 0.0).await;
}

#[tokio::test]
async fn one_address_may_have_so_many_and_a_trusted_proxy_more() {
    let sim = lasting().await;
    let yaml = one_group(&[&sim]);
    let limits = "limits: { connections_per_ip: 3 }\n";
    let gateway = Gateway::start(&format!("{limits}{yaml}")).await;
    gateway.metric_becomes(OPEN, 0.0).await;
    let _held = at_work(gateway.addr, 3).await;
    is_turned_away(gateway.addr).await;
    assert_eq!(gateway.metric(&hits("connections_per_ip")).await, Some(1.0));
    // Taken over by a reload, for those who come after it.
    let trusted = "trusted_proxies: [127.0.0.0/8]\n";
    gateway.write_config(&format!("{limits}{trusted}{yaml}"));
    assert_eq!(gateway.reload().await.status, 200);
    let _more = at_work(gateway.addr, 5).await;
}

#[tokio::test]
async fn who_has_no_request_under_way_makes_room() {
    let sim = lasting().await;
    for limits in ["connections: 3", "connections_per_ip: 3"] {
        let limits = format!("limits: {{ {limits}, header_timeout: 60s }}\n");
        let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
        gateway.metric_becomes(OPEN, 0.0).await;
        let mut works = at_work(gateway.addr, 1).await.remove(0);
        let mut idle = used(gateway.addr, 1).await.remove(0);
        let mut half = Connection::open(gateway.addr).await;
        half.send(b"GET /livez HTTP/1.1\r\nhost: a\r\n").await;
        gateway.metric_becomes(OPEN, 3.0).await;
        let come = at_work(gateway.addr, 2).await;
        assert!(idle.rest().await.is_empty());
        let answer = half.answer().await;
        assert_eq!(
            (answer.status, &*answer.error_code()),
            (503, "too_many_connections")
        );
        assert!(half.rest().await.is_empty());
        assert_eq!(gateway.metric(&hits("idle_connections")).await, Some(2.0));
        // All are at work now.
        is_turned_away(gateway.addr).await;
        works.read_until("data: ").await;
        drop((works, come));
        gateway.metric_becomes(OPEN, 0.0).await;
    }
}

#[tokio::test]
async fn more_clients_than_places_never_wait_for_each_other() {
    let sim = lasting().await;
    let limits = "limits: { connections: 20, header_timeout: 60s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    gateway.metric_becomes(OPEN, 0.0).await;
    let mut held = at_work(gateway.addr, 10).await;
    // Connections that say nothing, or half of a header.
    let mut deaf = Vec::new();
    for number in 0..300 {
        let mut connection = Connection::open(gateway.addr).await;
        if number % 2 == 0 {
            connection.try_send(b"GET /livez HTTP/1.1\r\nx: ").await;
        }
        deaf.push(connection);
        if number % 10 == 0 {
            assert_eq!(get(gateway.addr, "/livez").await.status, 200);
        }
    }
    assert!(gateway.metric(OPEN).await <= Some(22.0));
    // Of those who come in a burst a few may find only such as are leaving.
    let refused = gateway.metric(&hits("connections")).await;
    assert!(refused.unwrap_or(0.0) <= 30.0, "{refused:?}");
    for connection in &mut held {
        connection.read_until("data: ").await;
    }
    drop((deaf, held));
    gateway.metric_becomes(OPEN, 0.0).await;
}

#[tokio::test]
async fn a_new_connection_that_says_nothing_is_closed_and_one_that_dribbles_gets_408() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 500ms, keep_alive: 60s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let mut silent = Connection::open(gateway.addr).await;
    assert!(silent.rest().await.is_empty());
    let mut begun = Connection::open(gateway.addr).await;
    begun.send(b"GET /livez HTTP/1.1\r\nhost: a\r\nx: ").await;
    let mut kept = used(gateway.addr, 1).await.pop().unwrap();
    kept.send(b"GET /li").await;
    // Whose next header begins behind a request, with that or while it is served.
    let body = chat("demo");
    let good = crate::support::http::build("POST", CHAT, &[], body.as_bytes());
    let mut behind = Connection::open(gateway.addr).await;
    behind.send(&[&good, b"GET /li".as_slice()].concat()).await;
    let mut behind_none = Connection::open(gateway.addr).await;
    behind_none
        .send(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\nG")
        .await;
    for pipelined in [&mut behind, &mut behind_none] {
        assert_eq!(pipelined.answer().await.status, 200);
    }
    for mut slow in [begun, kept, behind, behind_none] {
        let answer = slow.answer().await;
        assert_eq!(
            (answer.status, &*answer.error_code()),
            (408, "header_timeout")
        );
        assert_eq!(answer.header("connection"), Some("close"));
        assert!(slow.rest().await.is_empty());
    }
    assert!(gateway.metric(&hits("header_timeout")).await >= Some(5.0));
    gateway.logged("limit=header_timeout").await;
    gateway.metric_becomes(OPEN, 0.0).await;
}

/// Allows a process so many open files, until it is told otherwise.
fn allow_files(pid: u32, soft: u32) {
    let limited = std::process::Command::new("prlimit")
        .args([&format!("--nofile={soft}:"), "--pid", &pid.to_string()])
        .status();
    assert!(limited.is_ok_and(|status| status.success()), "no prlimit");
}

#[tokio::test]
async fn a_want_of_files_is_never_an_upstreams_fault() {
    let (a, b, c) = (sim("a").await, sim("b").await, sim("c").await);
    let upstream = |sim: &Sim, connect: &str| {
        let timeouts = format!("timeouts: {{ connect: {connect}, idle: 60s }}");
        let (name, url) = (sim.name(), sim.url());
        format!("      - {{ name: {name}, kind: vllm, url: \"{url}\", {timeouts} }}\n")
    };
    // Asked all the time, and down after one bad answer.
    let yaml = format!(
        "groups:\n  gpus:\n    check: {{ every: 200ms, fall: 1 }}\n\
         \x20   breaker: {{ failures: 1, open: 300s }}\n    upstreams:\n{}{}{}\
         routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
        upstream(&a, "300ms"),
        upstream(&b, "300ms"),
        upstream(&c, "15s"),
    );
    let gateway = Gateway::start(&yaml).await;
    let mut held = Connection::open(gateway.addr).await;
    let mut ask = async |pin: &[(&str, &str)]| {
        let body = chat("demo");
        held.request("POST", CHAT, pin, body.as_bytes()).await;
        held.answer().await
    };
    let [to_a, to_b, to_c] = ["a", "b", "c"].map(|name| [("x-forebay-upstream", name)]);
    for name in ["a", "b", "c"] {
        gateway.state_becomes(name, "ready").await;
    }
    assert_eq!(ask(&to_a).await.status, 200);
    allow_files(gateway.pid(), 1);
    // There is a pooled connection to a, and none to b.
    assert_eq!(ask(&to_a).await.status, 200);
    for _ in 0..3 {
        let answer = ask(&to_b).await;
        assert_eq!(
            (answer.status, &*answer.error_code()),
            (503, "gateway_overloaded")
        );
        assert!(answer.header("retry-after").is_some());
    }
    // While it waits for a file, one comes free.
    let pid = gateway.pid();
    let (answer, ()) = tokio::join!(ask(&to_c), async {
        allow_files(pid, 1024);
    });
    assert_eq!((answer.status, answer.upstream()), (200, "c"));
    for name in ["a", "b", "c"] {
        assert_eq!(gateway.state(name).await, "ready", "{name}");
        let series =
            format!("forebay_health_checks_total{{result=\"not_asked\",upstream=\"{name}\"}}");
        assert!(gateway.metric(&series).await > Some(0.0), "{name}");
    }
    assert!(gateway.metric(&hits("sockets")).await >= Some(3.0));
    let log = gateway.log();
    assert!(!log.contains("to=down"), "{log}");
}

#[tokio::test]
async fn a_process_without_files_serves_on_and_recovers_by_itself() {
    let sim = sim("gpu-1").await;
    sim.fault("tokens=40;gap=50ms").await.unwrap();
    let limits = "limits: { connections_per_ip: 100000 }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let pid = gateway.pid();
    let limited = std::process::Command::new("prlimit")
        .args(["--nofile=256", "--pid", &pid.to_string()])
        .status();
    assert!(limited.is_ok_and(|status| status.success()), "no prlimit");
    // The limit came after the start, so that the cap does not know of it.
    let mut stream = Connection::open(gateway.addr).await;
    let body = chat_stream("demo");
    stream.request("POST", CHAT, &[], body.as_bytes()).await;
    stream.read_until("answers:").await;
    let before = cpu_ticks(pid);
    let mut crowd = Vec::new();
    for _ in 0..1000 {
        crowd.push(Connection::open(gateway.addr).await);
    }
    let answer = stream.answer().await;
    assert!(answer.complete, "the stream that was there went on");
    assert!(answer.text().ends_with("data: [DONE]\n\n"));
    let spent = cpu_ticks(pid) - before;
    assert!(spent < 200, "it ran for {spent} hundredths of a second");
    sim.clear_faults().await;
    drop((crowd, stream));
    eventually("it serves again", || async {
        get(gateway.addr, "/livez").await.status == 200
    })
    .await;
    gateway.metric_becomes(OPEN, 0.0).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
}

#[tokio::test]
async fn with_few_files_a_crowd_is_turned_away_and_the_process_recovers() {
    let sim = sim("gpu-1").await;
    let yaml = one_group(&[&sim]);
    let gateway = Gateway::start_limited(&yaml, &["--nofile=256"]).await;
    gateway
        .logged("fewer connections than limits.connections: allowed=64")
        .await;
    sim.fault("tokens=20;gap=100ms").await.unwrap();
    let mut crowd = JoinSet::new();
    let addr = gateway.addr;
    for _ in 0..1000 {
        crowd.spawn(async move {
            let mut connection = Connection::open(addr).await;
            let body = chat_stream("demo");
            let sent = crate::support::http::build("POST", CHAT, &[], body.as_bytes());
            connection.try_send(&sent).await;
            let said = connection.rest_of_any().await;
            String::from_utf8_lossy(&said).into_owned()
        });
    }
    // How many of them are served is not asked here: those being turned away may
    // have the files that a connection to an upstream needs.
    gateway.logged("limit=connections client=127.0.0.1").await;
    gateway.logged("status=200 ending=success").await;
    drop(crowd);
    sim.clear_faults().await;
    // What waited to be accepted is turned away first.
    eventually("it serves again", || async {
        let mut connection = Connection::open(addr).await;
        let body = chat("demo");
        let sent = crate::support::http::build("POST", CHAT, &[], body.as_bytes());
        connection.try_send(&sent).await;
        String::from_utf8_lossy(&connection.rest_of_one().await).starts_with("HTTP/1.1 200 ")
    })
    .await;
    gateway.metric_becomes(OPEN, 0.0).await;
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
}

/// The time a process has run, in hundredths of a second.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test]
async fn the_admin_listener_has_a_cap_and_deadlines_too() {
    let sim = sim("gpu-1").await;
    let yaml = one_group(&[&sim]);
    let gateway = Gateway::start(&format!("limits: {{ header_timeout: 1s }}\n{yaml}")).await;
    let mut silent = Connection::open(gateway.admin).await;
    let mut slow = Connection::open(gateway.admin).await;
    slow.send(b"GET /metrics HTTP/1.1\r\nhost: a\r\nx: ").await;
    assert!(silent.rest().await.is_empty());
    assert!(slow.rest().await.is_empty());
    assert!(gateway.metric(&hits("admin_header_timeout")).await >= Some(2.0));
    let mut bad = Connection::open(gateway.admin).await;
    bad.send(b"GET /metrics HTTP/1.1\r\nx : y\r\n\r\n").await;
    let answer = bad.answer().await;
    assert_eq!(answer.status, 400);
    assert!(answer.header("server").is_none());

    let gateway = Gateway::start(&format!("limits: {{ header_timeout: 60s }}\n{yaml}")).await;
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(Connection::open(gateway.admin).await);
    }
    let mut one_more = Connection::open(gateway.admin).await;
    one_more
        .try_send(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .await;
    assert!(one_more.rest().await.is_empty());
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    drop(held);
    eventually("it is free again", async || {
        let mut connection = Connection::open(gateway.admin).await;
        let asked = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n";
        connection.try_send(asked).await;
        connection.rest_of_one().await.starts_with(b"HTTP/1.1 200 ")
    })
    .await;
    // Nearly all of the 169 beyond the 32: some may have come in only when the
    // others had left.
    assert!(gateway.metric(&hits("admin_connections")).await >= Some(100.0));
}
