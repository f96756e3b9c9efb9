//! An upgrade: another process takes the place of the one that serves, and nobody
//! who is being served notices; if it cannot, nothing happens at all.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    process::Output,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use forebay::sim::Sim;
use serde_json::Value;
use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::{net::TcpStream, task::JoinHandle};

use crate::{
    h2c,
    support::{
        Answer, Connection, Gateway, chat, chat_stream, eventually,
        gateway::{command, free_port},
        http::{get, post_chat},
        one_group, sim, soon,
    },
};

const CHAT: &str = "/v1/chat/completions";

/// A configuration whose long streams last until the test lets them end.
fn quick(sims: &[&Sim]) -> String {
    format!("shutdown: {{ lame_duck: 0s }}\n{}", one_group(sims))
}

async fn upgrade(gateway: &Gateway) -> Output {
    let mut command = command();
    command
        .arg("upgrade")
        .args(["-c"])
        .arg(gateway.config_file());
    // It blocks, and the gateway under test must not wait for it.
    tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// The process that answers at the admin listener.
async fn pid(gateway: &Gateway) -> u32 {
    let health = get(gateway.admin, "/health").await.json();
    u32::try_from(health["pid"].as_u64().unwrap()).unwrap()
}

async fn upgraded(gateway: &Gateway) -> u32 {
    let output = upgrade(gateway).await;
    assert!(output.status.success(), "{}", said(&output));
    let pid = pid(gateway).await;
    assert!(said(&output).contains(&format!("upgraded: pid={pid} version=")));
    // What it logs comes by another way than what it answers.
    gateway.logged(&format!("upgraded: successor={pid} ")).await;
    assert_eq!(gateway.successors().last(), Some(&pid));
    pid
}

async fn ended(gateway: &mut Gateway) -> Option<i32> {
    let mut status = None;
    eventually("the process has ended", || {
        status = gateway.exited();
        let ended = status.is_some();
        async move { ended }
    })
    .await;
    status.and_then(|status| status.code())
}

/// Begins a stream of so many tokens, and waits for the first.
async fn stream_of(gateway: &Gateway, tokens: usize) -> Connection {
    let mut connection = Connection::open(gateway.addr).await;
    let body = chat_stream("demo").replacen('{', &format!("{{\"max_tokens\":{tokens},"), 1);
    connection.request("POST", CHAT, &[], body.as_bytes()).await;
    connection.read_until("data: ").await;
    connection
}

#[track_caller]
fn is_whole(answer: &Answer, tokens: usize) {
    assert_eq!(answer.status, 200);
    assert!(answer.complete);
    assert_eq!(answer.events().last().unwrap(), "[DONE]");
    assert_eq!(answer.content().split_whitespace().count(), tokens);
}

/// Clients that ask all the time.
struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(addr: SocketAddr, http1: usize, http2: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicUsize::new(0));
        let mut tasks = Vec::new();
        for _ in 0..http1 {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let mut connection = Connection::open(addr).await;
                    let mut kept = true;
                    while kept && !stop.load(Ordering::Relaxed) {
                        connection
                            .request("POST", CHAT, &[], chat("demo").as_bytes())
                            .await;
                        let answer = connection.answer().await;
                        assert_eq!(answer.status, 200);
                        assert!(answer.complete);
                        answers.fetch_add(1, Ordering::Relaxed);
                        kept = answer.header("connection") != Some("close");
                    }
                }
            }));
        }
        for _ in 0..http2 {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let sender = h2c::connect(addr).await;
                    // As any client does: no new stream after a GOAWAY.
                    while sender.clone().ready().await.is_ok() && !stop.load(Ordering::Relaxed) {
                        assert_eq!(h2c::post(&sender, &chat("demo")).await.status, 200);
                        answers.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }));
        }
        Self {
            stop,
            answers,
            tasks,
        }
    }

    /// Waits for some more answers.
    async fn goes_on(&self) {
        let wanted = self.answers.load(Ordering::Relaxed) + 50;
        eventually("the clients go on", async || {
            self.answers.load(Ordering::Relaxed) >= wanted
                || self.tasks.iter().any(JoinHandle::is_finished)
        })
        .await;
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            soon("a client ends", task).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_under_traffic_fails_nothing_and_cuts_nothing() {
    let quick_one = sim("gpu-1").await;
    let slow = sim("gpu-2").await;
    slow.fault("gap=20;tokens=1000").await.unwrap();
    let yaml = format!(
        "shutdown: {{ lame_duck: 0s }}\ngroups:\n  quick: {{ upstreams: [ {{ name: gpu-1, kind: vllm, url: \"{}\" }} ] }}\n  \
         slow: {{ upstreams: [ {{ name: gpu-2, kind: vllm, url: \"{}\" }} ] }}\n\
         routes:\n  - {{ model: slow, groups: [slow], rewrite: {{ slow: demo }} }}\n  - {{ model: \"*\", groups: [quick] }}\n",
        quick_one.url(),
        slow.url()
    );
    let mut gateway = Gateway::start_installed(&yaml).await;
    let first = pid(&gateway).await;
    assert_eq!(first, gateway.pid());
    let mut streams = Vec::new();
    for tokens in [40, 80, 200] {
        let body = chat_stream("slow").replacen('{', &format!("{{\"max_tokens\":{tokens},"), 1);
        let mut connection = Connection::open(gateway.addr).await;
        connection.request("POST", CHAT, &[], body.as_bytes()).await;
        connection.read_until("data: ").await;
        streams.push((tokens, connection));
    }
    let http2 = h2c::connect(gateway.addr).await;
    let body = chat_stream("slow").replacen('{', "{\"max_tokens\":150,", 1);
    let asking = http2.clone();
    let over_http2 = tokio::spawn(async move { h2c::post(&asking, &body).await });
    eventually("the stream is under way", async || {
        slow.records().len() == 4
    })
    .await;
    let load = Load::start(gateway.addr, 4, 2);
    load.goes_on().await;
    let second = upgraded(&gateway).await;
    assert_ne!(second, first);
    load.goes_on().await;
    // And once more, while the first still has its streams.
    let mut checks = Connection::open(gateway.addr).await;
    checks.request("GET", "/readyz", &[], b"").await;
    assert_eq!(checks.answer().await.status, 200);
    let third = upgraded(&gateway).await;
    assert_ne!(third, second);
    // Who keeps a connection to see whether the address serves sees that it does.
    checks.request("GET", "/readyz", &[], b"").await;
    let answer = checks.answer().await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("connection"), Some("close"));
    load.goes_on().await;
    assert_eq!(gateway.exited(), None, "its streams are under way");
    load.finish().await;
    for (tokens, mut connection) in streams {
        is_whole(&connection.answer().await, tokens);
    }
    is_whole(&over_http2.await.unwrap(), 150);
    drop(http2);
    assert_eq!(ended(&mut gateway).await, Some(0));
    assert_eq!(pid(&gateway).await, third);
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    let log = gateway.log();
    assert!(!log.contains("ERROR"), "{log}");
    assert!(!log.contains("status=5"), "{log}");
}

#[tokio::test]
async fn a_successor_that_cannot_serve_costs_nothing() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=20;tokens=1000").await.unwrap();
    let yaml = format!("upgrade: {{ prepare: 2s }}\n{}", quick(&[&gpu]));
    let gateway = Gateway::start_installed(&yaml).await;
    let mut stream = stream_of(&gateway, 300).await;
    let mut kept = Connection::open(gateway.addr).await;
    let prepared = format!(
        r#"echo '{{"prepared":{{"version":"9","wants":["{}"]}}}}' >&0"#,
        gateway.addr
    );
    let real = env!("CARGO_BIN_EXE_forebay");
    let older = format!("unset FOREBAY_SUCCESSOR_OF; exec {real} \"$@\" </dev/null");
    let died_late = format!("{prepared}; read greeting; read take; exit 9");
    let hangs_late = format!("{prepared}; read greeting; read take; exec sleep 600");
    let elsewhere =
        r#"echo '{"prepared":{"version":"9","wants":["127.0.0.1:1"]}}' >&0; exec sleep 600"#;
    let kinds = [
        ("exit 3", "died", "exit status: 3"),
        ("kill -SEGV $$", "died", "signal: 11"),
        ("exec sleep 600", "timed_out", "was not prepared within 2s"),
        (&older, "died", "exit status: 1"),
        (
            "echo nonsense >&0; exec sleep 600",
            "died",
            "cannot be understood",
        ),
        (&died_late, "died", "exit status: 9"),
        (&hangs_late, "not_served", "did not serve"),
        (elsewhere, "not_served", "a socket that it wants"),
    ];
    let mut counted = BTreeMap::new();
    let mut check = async |outcome: &'static str, reason: &str| {
        let output = upgrade(&gateway).await;
        assert!(!output.status.success());
        assert!(
            said(&output).contains(reason),
            "{reason}: {}",
            said(&output)
        );
        *counted.entry(outcome).or_insert(0.0) += 1.0;
        for (outcome, count) in &counted {
            let series = format!("forebay_upgrades_total{{outcome=\"{outcome}\"}}");
            assert_eq!(gateway.metric(&series).await, Some(*count), "{outcome}");
        }
        assert_eq!(pid(&gateway).await, gateway.pid());
        // Nobody is told to go elsewhere.
        kept.request("GET", "/readyz", &[], b"").await;
        let answer = kept.answer().await;
        assert_eq!(answer.status, 200);
        assert_ne!(answer.header("connection"), Some("close"));
        gateway.logged(reason).await;
    };
    for (script, outcome, reason) in kinds {
        gateway.install(Some(script));
        check(outcome, reason).await;
    }
    let program = gateway.folder.path().join("forebay");
    fs::remove_file(&program).unwrap();
    check("not_started", "No such file").await;
    fs::write(&program, "no program").unwrap();
    check("not_started", "Permission denied").await;
    // The program is well, its configuration is not.
    gateway.install(None);
    fs::write(
        gateway.config_file(),
        format!(
            "listen: \"{}\"\nadmin: {{ listen: \"{}\" }}\nnonsense: 1\n",
            gateway.addr, gateway.admin
        ),
    )
    .unwrap();
    check("refused", "nonsense").await;
    let missing = yaml.clone() + "plugins:\n  - auth: { keys_file: missing.yaml }\n";
    gateway.write_config(&missing);
    check("refused", "missing.yaml").await;
    // A port that is taken.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    gateway.write_config(&yaml);
    let text = fs::read_to_string(gateway.config_file()).unwrap();
    let other = taken.local_addr().unwrap().to_string();
    fs::write(
        gateway.config_file(),
        text.replace(&gateway.addr.to_string(), &other),
    )
    .unwrap();
    check("refused", "listen: cannot listen on").await;
    gateway.write_config(&yaml);
    // All that went on is still going on.
    is_whole(&stream.answer().await, 300);
    assert_eq!(gateway.successors(), [0_u32; 0]);
    upgraded(&gateway).await;
}

#[tokio::test]
async fn one_upgrade_at_a_time_and_sigterm_ends_it() {
    let gpu = sim("gpu-1").await;
    let mut gateway = Gateway::start_installed(&quick(&[&gpu])).await;
    gateway.install(Some("exec sleep 600"));
    gateway.signal("USR2");
    gateway.logged("upgrade: starting").await;
    let output = upgrade(&gateway).await;
    assert!(!output.status.success());
    assert!(
        said(&output).contains("under way already"),
        "{}",
        said(&output)
    );
    gateway.signal("TERM");
    assert_eq!(ended(&mut gateway).await, Some(0));
}

#[tokio::test]
async fn sigusr2_takes_the_program_and_the_configuration_that_are_there_now() {
    let gpu = sim("gpu-1").await;
    let mut gateway = Gateway::start_installed(&quick(&[&gpu])).await;
    let other = free_port();
    let text = fs::read_to_string(gateway.config_file()).unwrap();
    let moved = text.replace(&gateway.addr.to_string(), &other.to_string());
    fs::write(gateway.config_file(), moved).unwrap();
    gateway.signal("USR2");
    eventually("the successor serves", async || {
        gateway.successors().len() == 1
    })
    .await;
    assert_eq!(get(other, "/readyz").await.status, 200);
    assert_eq!(ended(&mut gateway).await, Some(0));
    assert!(
        TcpStream::connect(gateway.addr).await.is_err(),
        "nobody is there any more"
    );
    assert_eq!(vec![pid(&gateway).await], gateway.successors());
}

#[tokio::test]
async fn who_drains_behind_an_upgrade_has_its_own_time() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=50;tokens=1000000").await.unwrap();
    for (upgrade, signal) in [("upgrade: { drain: 300ms }", None), ("", Some("TERM"))] {
        let yaml = format!(
            "shutdown: {{ lame_duck: 10m, drain: 300ms }}\n{upgrade}\n{}",
            one_group(&[&gpu])
        );
        let mut gateway = Gateway::start_installed(&yaml).await;
        let mut stream = stream_of(&gateway, 100_000).await;
        upgraded(&gateway).await;
        if let Some(signal) = signal {
            assert_eq!(gateway.exited(), None, "its stream is under way");
            gateway.signal(signal);
        }
        let answer = stream.answer().await;
        let last: Value = serde_json::from_str(answer.events().last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "server_shutdown");
        assert_eq!(ended(&mut gateway).await, Some(0));
        assert_eq!(get(gateway.addr, "/readyz").await.status, 200);
    }
}

#[tokio::test]
async fn what_two_processes_write_at_once_is_all_there_once() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=20;tokens=1000").await.unwrap();
    let yaml = format!(
        "store: \"sqlite:forebay.db\"\nlog: {{ file: forebay.log, rotate_size: 4KiB, rotate_keep: 50 }}\n\
         plugins:\n  - auth: none\n  - budget: {{ month: {{ tokens: 1G }} }}\n  \
         - capture: {{ dir: captures }}\n{}",
        quick(&[&gpu])
    );
    let mut gateway = Gateway::start_installed(&yaml).await;
    let mut wanted = Vec::new();
    let mut old = Vec::new();
    for nth in 0..5 {
        let tokens = 60 + nth;
        old.push((tokens, stream_of(&gateway, tokens).await));
        wanted.push(tokens);
    }
    upgraded(&gateway).await;
    for nth in 0..20 {
        let tokens = 2 + nth;
        let mut new = stream_of(&gateway, tokens).await;
        is_whole(&new.answer().await, tokens);
        wanted.push(tokens);
    }
    for (tokens, mut connection) in old {
        is_whole(&connection.answer().await, tokens);
    }
    assert_eq!(ended(&mut gateway).await, Some(0));
    let folder = gateway.folder.path();
    let mut found = Vec::new();
    let mut files = 0;
    for entry in fs::read_dir(folder.join("captures")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "jsonl") {
            files += 1;
        }
    }
    assert!(files >= 2, "each process has its own");
    let lines = || {
        let mut lines = Vec::new();
        for entry in fs::read_dir(folder.join("captures")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|end| end == "jsonl") {
                let text = fs::read_to_string(path).unwrap();
                lines.extend(text.lines().map(str::to_owned));
            }
        }
        lines
    };
    eventually("all is captured", async || lines().len() >= wanted.len()).await;
    for line in lines() {
        let line: Value = serde_json::from_str(&line).unwrap();
        let said = line["conversations"].as_array().unwrap().last().unwrap();
        found.push(said["value"].as_str().unwrap().split_whitespace().count());
    }
    found.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    // Of every prompt one token.
    let tokens: usize = wanted.iter().map(|tokens| tokens + 1).sum();
    let file = folder.join("forebay.db");
    eventually("all is added up", async || {
        stored(&file).await == i64::try_from(tokens).unwrap()
    })
    .await;
    let access = || {
        let mut lines = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("forebay.log")
            {
                lines.extend(fs::read_to_string(path).unwrap().lines().map(str::to_owned));
            }
        }
        lines.retain(|line| line.contains("path=/v1/chat/completions"));
        lines
    };
    eventually("all is logged", async || access().len() == wanted.len()).await;
    for line in access() {
        assert!(
            line.starts_with("20") && line.contains("tokens_out="),
            "{line}"
        );
    }
}

/// What the file says that was used this month.
async fn stored(file: &Path) -> i64 {
    let options = SqliteConnectOptions::new().filename(file);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let sum = "SELECT COALESCE(SUM(tokens), 0) FROM usage WHERE length(period) = 7";
    sqlx::query_scalar(sum)
        .fetch_one(&mut connection)
        .await
        .unwrap_or(0)
}
