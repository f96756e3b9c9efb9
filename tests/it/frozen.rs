//! Model servers that freeze: their connections stay open, and nothing comes any
//! more, to no request and to no check. Real processes, stopped by SIGSTOP.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::watch,
    time::interval,
};

use crate::support::{
    Connection, Gateway, chat, chat_stream, eventually,
    gateway::command,
    group_of,
    http::{get, post},
    sim, upstream_at,
};

const PATH: &str = "/v1/chat/completions";

/// Checks that find out quickly, and times that do not.
const CHECK: &str = "check: { every: 100ms, timeout: 200ms, fall: 3, rise: 2 }";

/// A simulator in a process of its own.
struct Process {
    child: Child,
    name: String,
    url: String,
    control: SocketAddr,
}

impl Process {
    fn start(name: &str, flags: &[&str]) -> Self {
        let mut child = command()
            .args(["sim", "--name", name])
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (mut url, mut control) = (None, None);
        for line in out.lines().take(3) {
            let line = line.unwrap();
            let last = line.split_whitespace().last().unwrap().to_owned();
            if line.contains("base URL") {
                url = Some(last);
            } else if line.contains("control") {
                let addr = last.trim_start_matches("http://").trim_end_matches('/');
                control = Some(addr.parse().unwrap());
            }
        }
        Self {
            child,
            name: name.to_owned(),
            url: url.unwrap(),
            control: control.unwrap(),
        }
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    fn freeze(&self) {
        self.signal("STOP");
    }

    fn thaw(&self) {
        self.signal("CONT");
    }

    async fn fault(&self, fault: &str) {
        let answer = post(self.control, "/fault", &[], fault.as_bytes()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// How many model calls it has read.
    async fn calls(&self) -> usize {
        let requests = get(self.control, "/requests").await.json();
        let all = requests["requests"].as_array().unwrap().iter();
        all.filter(|one| one["method"] == "POST").count()
    }

    async fn is_asked(&self) {
        eventually("it is asked", || async { self.calls().await > 0 }).await;
    }

    fn upstream(&self, keys: &str) -> String {
        upstream_at(&self.name, &self.url, keys)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// One group, `keys` for all of it.
fn group(keys: &[&str], upstreams: &[String]) -> String {
    let keys: String = keys.iter().map(|key| format!("    {key}\n")).collect();
    let group = group_of("gpus", "", upstreams);
    let group = group.replace("    upstreams:", &format!("{keys}    upstreams:"));
    format!("groups:\n{group}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n")
}

async fn asking(gateway: &Gateway, body: &str) -> Connection {
    let mut client = Connection::open(gateway.addr).await;
    client.request("POST", PATH, &[], body.as_bytes()).await;
    client
}

#[tokio::test]
async fn who_waits_for_a_server_that_freezes_is_answered_by_another() {
    for (fault, body) in [
        // Before the head of an answer that is not streamed, and amid its body.
        ("first_token=1h", chat("demo")),
        ("stall_at=40", chat("demo")),
        // Before the head of a stream, and before its first token.
        ("header_delay=1h", chat_stream("demo")),
        ("stall_at=0", chat_stream("demo")),
    ] {
        let (frozen, good) = (Process::start("frozen", &[]), sim("good").await);
        frozen.fault(fault).await;
        let upstreams = [
            frozen.upstream("kind: vllm"),
            upstream_at("good", &good.url(), "kind: vllm"),
        ];
        let gateway = Gateway::start(&group(&[CHECK], &upstreams)).await;
        let mut client = asking(&gateway, &body).await;
        frozen.is_asked().await;
        frozen.freeze();
        let answer = client.answer().await;
        assert_eq!(answer.status, 200, "{fault}: {}", answer.text());
        assert_eq!(answer.upstream(), "good", "{fault}");
        assert_eq!(answer.header("x-forebay-attempts"), Some("2"), "{fault}");
        gateway
            .logged("cause=down by its checks, and nothing comes")
            .await;
        gateway
            .metric_becomes("forebay_requests_in_flight", 0.0)
            .await;
        assert_eq!(gateway.state("frozen").await, "down check", "{fault}");
    }
}

#[tokio::test]
async fn a_stream_whose_server_freezes_is_taken_over_long_before_its_times_are_over() {
    let (frozen, good) = (Process::start("frozen", &[]), sim("good").await);
    frozen.fault("gap=200ms;tokens=500").await;
    let upstreams = [
        frozen.upstream("kind: vllm, timeouts: { inter_token: 20m }"),
        upstream_at("good", &good.url(), "kind: vllm"),
    ];
    let gateway = Gateway::start(&group(&[CHECK], &upstreams)).await;
    let mut client = asking(&gateway, &chat_stream("demo")).await;
    client.read_until("\"content\":\"frozen").await;
    frozen.freeze();
    let answer = client.answer().await;
    assert!(
        answer.text().ends_with("data: [DONE]\n\n"),
        "{}",
        answer.text()
    );
    assert!(
        answer.text().contains("\"takeovers\":1"),
        "{}",
        answer.text()
    );
    let series = r#"forebay_takeovers_total{from="frozen",result="continued",to="good"}"#;
    assert_eq!(gateway.metric(series).await, Some(1.0));
}

#[tokio::test]
async fn all_who_wait_for_a_server_that_freezes_are_helped() {
    const CLIENTS: usize = 40;
    let (frozen, good) = (Process::start("frozen", &[]), sim("good").await);
    frozen.fault("first_token=1h").await;
    let upstreams = [
        frozen.upstream("kind: vllm"),
        upstream_at("good", &good.url(), "kind: vllm, concurrent: 4"),
    ];
    let keys = [CHECK, "strategy: round_robin", "retries: { share: 100% }"];
    let gateway = Gateway::start(&group(&keys, &upstreams)).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(asking(&gateway, &chat("demo")).await);
    }
    eventually("all are asked for", || async {
        let others = good.records().iter().filter(|one| !one.is_check()).count();
        frozen.calls().await + others == CLIENTS
    })
    .await;
    frozen.freeze();
    for mut client in clients {
        let answer = client.answer().await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    // One freeze is one death, whoever noticed.
    assert!(!gateway.log().contains("breaker changed: name=frozen"));
}

#[tokio::test]
async fn of_streams_that_freeze_no_more_leave_than_have_a_place_elsewhere() {
    const CLIENTS: usize = 12;
    let (frozen, good) = (Process::start("frozen", &[]), sim("good").await);
    frozen.fault("gap=100ms;tokens=60").await;
    good.fault("stall_at=5").await.unwrap();
    let first = group(
        &[CHECK],
        &[frozen.upstream("kind: vllm, timeouts: { inter_token: 20m }")],
    );
    let (groups, _) = first.split_once("routes:").unwrap();
    let behind = [upstream_at(
        "good",
        &good.url(),
        "kind: vllm, concurrent: 1",
    )];
    let yaml = format!(
        "{groups}{}routes:\n  - {{ model: \"*\", groups: [gpus, behind] }}\n",
        group_of("behind", "", &behind)
    );
    let gateway = Gateway::start(&yaml).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(asking(&gateway, &chat_stream("demo")).await);
    }
    for client in &mut clients {
        client.read_until("\"content\":\"frozen").await;
    }
    frozen.freeze();
    let goes_on = r#"forebay_takeovers_total{from="frozen",result="continued",to="good"}"#;
    gateway.metric_becomes(goes_on, 1.0).await;
    let silent = r#"forebay_health_checks_total{result="silent",upstream="frozen"}"#;
    eventually("it has been silent for long", || async {
        gateway.metric(silent).await >= Some(8.0)
    })
    .await;
    let cut = r#"forebay_attempts_total{group="gpus",upstream="frozen",verdict="cut"}"#;
    assert_eq!(gateway.metric(cut).await, Some(1.0));
    // The others kept what they had, and get the rest of it.
    frozen.thaw();
    gateway
        .metric_becomes("forebay_requests_in_flight", 1.0)
        .await;
    assert_eq!(gateway.metric(cut).await, Some(1.0));
}

#[tokio::test]
async fn who_has_nowhere_else_to_go_waits_and_is_answered_when_it_thaws() {
    for (keys, other) in [
        (vec![CHECK], None),
        (vec![CHECK, "retry_ambiguous: false"], Some("kind: vllm")),
        (
            vec![CHECK, "retries: { share: 0%, min: 0 }"],
            Some("kind: vllm"),
        ),
        (vec![CHECK], Some("kind: vllm, models: [other]")),
        (vec![CHECK], Some("kind: vllm, drain: true")),
    ] {
        let (frozen, good) = (Process::start("frozen", &[]), sim("good").await);
        frozen.fault("first_token=1s").await;
        let mut upstreams = vec![frozen.upstream("kind: vllm")];
        upstreams.extend(other.map(|keys| upstream_at("good", &good.url(), keys)));
        let gateway = Gateway::start(&group(&keys, &upstreams)).await;
        let mut client = asking(&gateway, &chat("demo")).await;
        frozen.is_asked().await;
        frozen.freeze();
        let silent = r#"forebay_health_checks_total{result="silent",upstream="frozen"}"#;
        eventually("it has been silent for long", || async {
            gateway.metric(silent).await >= Some(5.0)
        })
        .await;
        frozen.thaw();
        let answer = client.answer().await;
        assert_eq!(
            (answer.status, answer.upstream()),
            (200, "frozen"),
            "{keys:?}"
        );
        assert_eq!(answer.header("x-forebay-attempts"), Some("1"), "{keys:?}");
    }
}

#[tokio::test]
async fn who_has_nowhere_to_go_goes_as_soon_as_another_is_back() {
    let (frozen, other) = (Process::start("frozen", &[]), sim("other").await);
    frozen.fault("first_token=1h").await;
    other.stop().await;
    let upstreams = [
        frozen.upstream("kind: vllm"),
        upstream_at("other", &other.url(), "kind: vllm"),
    ];
    let gateway = Gateway::start(&group(&[CHECK], &upstreams)).await;
    gateway.state_becomes("other", "down check").await;
    let mut client = asking(&gateway, &chat("demo")).await;
    frozen.is_asked().await;
    frozen.freeze();
    gateway.state_becomes("frozen", "down check").await;
    other.start_again().await.unwrap();
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.upstream()), (200, "other"));
}

#[tokio::test]
async fn the_groups_behind_take_what_the_own_cannot() {
    for (keys, fallback) in [("", ""), ("retries: { share: 0%, min: 0 }", "#fallback")] {
        let (frozen, good) = (Process::start("frozen", &[]), sim("good").await);
        frozen.fault("first_token=1h").await;
        let first = group(&[CHECK, keys], &[frozen.upstream("kind: vllm")]);
        let (groups, _) = first.split_once("routes:").unwrap();
        let behind = group_of(
            "behind",
            "",
            &[upstream_at("good", &good.url(), "kind: vllm")],
        );
        let key = if fallback.is_empty() {
            ""
        } else {
            ", fallback: behind"
        };
        let names = if fallback.is_empty() {
            "gpus, behind"
        } else {
            "gpus"
        };
        let yaml =
            format!("{groups}{behind}routes:\n  - {{ model: \"*\", groups: [{names}]{key} }}\n");
        let gateway = Gateway::start(&yaml).await;
        let mut client = asking(&gateway, &chat("demo")).await;
        frozen.is_asked().await;
        frozen.freeze();
        let answer = client.answer().await;
        assert_eq!(
            (answer.status, answer.upstream()),
            (200, "good"),
            "{fallback}"
        );
    }
}

#[tokio::test]
async fn a_stream_that_flows_is_not_cut_for_checks_that_fail() {
    let (busy, good) = (sim("busy").await, sim("good").await);
    busy.fault("gap=50ms;tokens=60\nhang;path=/health")
        .await
        .unwrap();
    let upstreams = [
        upstream_at("busy", &busy.url(), "kind: vllm"),
        upstream_at("good", &good.url(), "kind: vllm"),
    ];
    let gateway = Gateway::start(&group(&[CHECK], &upstreams)).await;
    let mut client = asking(&gateway, &chat_stream("demo")).await;
    gateway.state_becomes("busy", "down check").await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.upstream()), (200, "busy"));
    assert!(!answer.text().contains("takeovers"), "{}", answer.text());
    assert!(good.records().iter().all(|one| one.is_check()));
}

/// Answers every `POST` with a JSON object of which a space comes every 20 ms
/// until `enough`, and no check at all.
async fn trickle(listener: TcpListener, enough: watch::Receiver<bool>) {
    let mut checks = Vec::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut head = [0; 4];
        if stream.read_exact(&mut head).await.is_err() || &head == b"GET " {
            checks.push(stream);
            continue;
        }
        let enough = enough.clone();
        tokio::spawn(async move {
            // Closed with something unread, a connection is reset.
            let mut request = [0; 4096];
            while stream.read(&mut request).await.is_ok_and(|read| {
                !String::from_utf8_lossy(&request[..read]).contains("\"messages\"")
            }) {}
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{";
            stream.write_all(head.as_bytes()).await.ok();
            let mut tick = interval(Duration::from_millis(20));
            while !*enough.borrow() {
                tick.tick().await;
                stream.write_all(b" ").await.ok();
            }
            let rest = "\"choices\":[{\"message\":{\"content\":\"slowly\"}}]}";
            stream.write_all(rest.as_bytes()).await.ok();
        });
    }
}

#[tokio::test]
async fn a_whole_answer_that_still_comes_is_not_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let (tell, enough) = watch::channel(false);
    let busy = tokio::spawn(trickle(listener, enough));
    let good = sim("good").await;
    let upstreams = [
        upstream_at("busy", &url, "kind: vllm"),
        upstream_at("good", &good.url(), "kind: vllm"),
    ];
    let gateway = Gateway::start(&group(&[CHECK], &upstreams)).await;
    let mut client = asking(&gateway, &chat("demo")).await;
    let silent = r#"forebay_health_checks_total{result="silent",upstream="busy"}"#;
    eventually("its checks are silent for long", || async {
        gateway.metric(silent).await >= Some(6.0)
    })
    .await;
    tell.send(true).unwrap();
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.upstream()), (200, "busy"));
    assert!(answer.text().contains("slowly"));
    busy.abort();
}
