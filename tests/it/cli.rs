//! The command line, as a user meets it.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Output, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use crate::support::{
    Answer, Gateway, chat, eventually,
    gateway::{command, free_port},
    http::{ask, get, post_chat},
    one_group, sim,
};

const MINIMAL: &str = "groups:
  ollama:
    upstreams:
      - { name: ollama, kind: ollama, url: \"http://127.0.0.1:11434/v1\" }
routes:
  - { model: \"*\", groups: [ollama] }
";

/// Runs the binary to its end, with no environment of its own.
fn forebay(args: &[&str], folder: &Path) -> Output {
    command()
        .args(args)
        .current_dir(folder)
        .env_clear()
        .output()
        .unwrap()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn an_explicit_file_that_is_missing_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for job in ["run", "check"] {
        let output = forebay(&[job, "-c", "nowhere/forebay.yaml"], folder.path());
        assert_eq!(output.status.code(), Some(1), "{job}");
        let said = err(&output);
        assert!(
            said.contains("nowhere/forebay.yaml: cannot be read"),
            "{said}"
        );
        assert_eq!(out(&output), "");
    }
}

#[test]
fn without_a_file_the_built_in_default_is_announced_loudly() {
    // Whether the port is held by this test or by something else, a start on it
    // must fail, and before that say what it was about to serve.
    let _held = TcpListener::bind("127.0.0.1:7070");
    let folder = tempfile::tempdir().unwrap();
    let output = forebay(&["run"], folder.path());
    assert_eq!(output.status.code(), Some(1));
    let said = err(&output);
    for text in [
        "WARN",
        "no configuration",
        "11434",
        "cannot listen on 127.0.0.1:7070",
    ] {
        assert!(said.contains(text), "{text:?} in {said}");
    }
    let checked = forebay(&["check", "--print"], folder.path());
    assert_eq!(checked.status.code(), Some(0), "{}", err(&checked));
    assert!(out(&checked).contains("listen: 127.0.0.1:7070"));
    assert!(out(&checked).contains("http://127.0.0.1:11434/v1"));
}

#[test]
fn without_a_name_the_file_in_conf_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("conf")).unwrap();
    fs::write(folder.path().join("conf/forebay.yaml"), "routes: 7\n").unwrap();
    for job in ["run", "check"] {
        let output = forebay(&[job], folder.path());
        assert_eq!(output.status.code(), Some(1));
        assert!(
            err(&output).contains("conf/forebay.yaml:1:"),
            "{}",
            err(&output)
        );
    }
}

#[test]
fn a_taken_port_ends_the_start_with_its_address() {
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = held.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (key, listen, admin) in [
        ("listen", taken, free_port()),
        ("admin.listen", free_port(), taken),
    ] {
        let yaml = format!(
            "listen: \"{listen}\"\nadmin: {{ listen: \"{admin}\" }}\nplugins: [ auth: none ]\n{MINIMAL}"
        );
        fs::write(folder.path().join("forebay.yaml"), yaml).unwrap();
        let output = forebay(&["run", "-c", "forebay.yaml"], folder.path());
        assert_eq!(output.status.code(), Some(1), "{key}");
        let said = err(&output);
        assert!(
            said.contains(&format!("{key}: cannot listen on {taken}")),
            "{said}"
        );
    }
}

#[test]
fn check_and_run_tell_every_problem_with_its_place() {
    let folder = root().join("tests/config/invalid");
    let expected = fs::read_to_string(folder.join("fifteen-mistakes.expected")).unwrap();
    let expected: Vec<_> = expected
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .collect();
    assert_eq!(expected.len(), 15);
    for job in ["check", "run"] {
        let output = forebay(&[job, "-c", "fifteen-mistakes.yaml"], &folder);
        assert_eq!(output.status.code(), Some(1), "{job}");
        let said = err(&output);
        let told: Vec<_> = said
            .lines()
            .filter_map(|line| line.strip_prefix("fifteen-mistakes.yaml:"))
            .collect();
        assert_eq!(told.len(), 15, "{said}");
        for (problem, (line, path)) in told.iter().zip(&expected) {
            let mut parts = problem.splitn(4, ':');
            assert_eq!(parts.next(), Some(*line), "{problem}");
            let column: usize = parts.next().unwrap().parse().unwrap();
            assert!(column > 0);
            assert_eq!(parts.next().map(str::trim), Some(*path), "{problem}");
            assert!(!parts.next().unwrap().trim().is_empty(), "{problem}");
        }
        assert!(said.contains("15 problems"), "{said}");
        assert_eq!(out(&output), "");
    }
}

#[test]
fn check_prints_what_is_in_effect_without_secrets_and_as_a_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = format!(
        "plugins: [ auth: none ]\n{}",
        MINIMAL.replace(
            "kind: ollama,",
            "kind: ollama, key: env:OLLAMA_KEY, headers: { x-token: written-out-secret, x-other: file:other.key },"
        )
    );
    fs::write(folder.path().join("forebay.yaml"), yaml).unwrap();
    fs::write(folder.path().join("other.key"), "secret-of-the-file").unwrap();
    let check = |file: &str| {
        command()
            .args(["check", "--print", "-c", file])
            .current_dir(folder.path())
            .env_clear()
            .env("OLLAMA_KEY", "secret-of-the-environment")
            .output()
            .unwrap()
    };
    let output = check("forebay.yaml");
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let printed = out(&output);
    assert!(!printed.contains("secret"), "{printed}");
    for text in [
        "env:OLLAMA_KEY",
        "file:other.key",
        "'***'",
        "heartbeat: 15s",
        "attempts: 3",
        "first_token: 5m",
    ] {
        assert!(printed.contains(text), "{text} in {printed}");
    }
    fs::write(folder.path().join("printed.yaml"), &printed).unwrap();
    let again = check("printed.yaml");
    assert_eq!(again.status.code(), Some(0), "{}\n{printed}", err(&again));
    assert_eq!(out(&again), printed);
}

#[test]
fn a_credential_of_systemd_is_a_secret_and_may_be_missing_where_it_is_optional() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = format!(
        "plugins: [ auth: none ]\n{}",
        MINIMAL.replace(
            "kind: ollama,",
            "kind: ollama, key: credential:secrets_ollama,"
        )
    );
    fs::write(folder.path().join("forebay.yaml"), &yaml).unwrap();
    let optional = yaml.replace("kind: ollama,", "kind: ollama, optional: true,");
    fs::write(folder.path().join("optional.yaml"), optional).unwrap();
    let forebay = |job: &str, file: &str, credentials: Option<&Path>| {
        let mut forebay = command();
        forebay.args([job, "-c", file]).current_dir(folder.path());
        forebay.env_clear();
        if let Some(credentials) = credentials {
            forebay.env("CREDENTIALS_DIRECTORY", credentials);
        }
        let output = forebay.output().unwrap();
        (output.status.code(), err(&output))
    };
    let loaded = tempfile::tempdir().unwrap();
    for (credentials, why) in [
        (None, "systemd did not start this process with credentials"),
        (Some(loaded.path()), "the unit loads none of that name"),
    ] {
        let (code, said) = forebay("run", "forebay.yaml", credentials);
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains("credential secrets_ollama is not there"),
            "{said}"
        );
        assert!(said.contains(why), "{said}");
        // Who checks is not the service, and is not told less for that.
        for file in ["forebay.yaml", "optional.yaml"] {
            let (code, said) = forebay("check", file, credentials);
            assert_eq!(code, Some(0), "{said}");
            assert!(said.contains("secrets_ollama is not checked"), "{said}");
        }
    }
    fs::write(loaded.path().join("secrets_ollama"), "of-systemd\n").unwrap();
    assert_eq!(
        forebay("check", "forebay.yaml", Some(loaded.path())),
        (Some(0), String::new())
    );
}

#[tokio::test]
async fn an_optional_upstream_without_its_key_is_switched_off_with_a_warning() {
    let gpu = sim("gpu-1").await;
    let cloud = "  cloud:
    upstreams:
      - { name: cloud-1, kind: openai, url: \"http://127.0.0.1:1/v1\", key: env:FOREBAY_TEST_UNSET, optional: true }
routes:
  - { model: cloudy, groups: [cloud], fallback: gpus }
";
    let yaml = one_group(&[&gpu]).replace("routes:\n", cloud);
    let folder = tempfile::tempdir().unwrap();
    let whole = format!("plugins: [ auth: none ]\n{yaml}");
    fs::write(folder.path().join("a.yaml"), &whole).unwrap();
    let output = forebay(&["check", "-c", "a.yaml"], folder.path());
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(
        err(&output).contains("warning: a.yaml:"),
        "{}",
        err(&output)
    );
    assert!(
        err(&output).contains("FOREBAY_TEST_UNSET"),
        "{}",
        err(&output)
    );
    let strict = whole.replace(", optional: true", "");
    fs::write(folder.path().join("a.yaml"), strict).unwrap();
    assert_eq!(
        forebay(&["check", "-c", "a.yaml"], folder.path())
            .status
            .code(),
        Some(1)
    );

    let gateway = Gateway::start(&yaml).await;
    gateway.logged("FOREBAY_TEST_UNSET").await;
    let health = get(gateway.addr, "/health").await.json();
    assert_eq!(health["switched_off"], serde_json::json!(["cloud-1"]));
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.status, answer.upstream()), (200, "gpu-1"));
}

#[test]
fn the_schema_is_json_schema() {
    let output = forebay(&["schema"], &root());
    assert_eq!(output.status.code(), Some(0));
    let schema: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        schema["$schema"]
            .as_str()
            .unwrap()
            .contains("json-schema.org")
    );
    for key in [
        "listen", "admin", "limits", "groups", "routes", "plugins", "log", "aliases",
    ] {
        assert!(schema["properties"][key].is_object(), "{key}");
    }
    assert!(out(&output).contains("keys_file"));
}

#[test]
fn a_new_key_fits_its_hash() {
    let output = forebay(&["key", "new", "alice"], &root());
    assert_eq!(output.status.code(), Some(0));
    let token = out(&output).trim().to_owned();
    assert!(
        token.len() >= 40 && !token.contains(char::is_whitespace),
        "{token}"
    );
    let entry = err(&output);
    assert!(
        entry.contains("alice") && !entry.contains(&token),
        "{entry}"
    );

    let mut hash = command()
        .args(["key", "hash"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(hash.stdin.take().unwrap(), "{token}").unwrap();
    let hash = out(&hash.wait_with_output().unwrap()).trim().to_owned();
    assert_eq!(hash.len(), 64);
    assert!(entry.contains(&hash), "{entry}");
    assert_ne!(
        out(&forebay(&["key", "new", "alice"], &root())).trim(),
        token
    );
}

#[test]
fn the_version_is_told() {
    let output = forebay(&["--version"], &root());
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        out(&output).trim(),
        format!("forebay {}", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn every_example_is_a_valid_configuration() {
    let conf = root().join("conf");
    let mut files: Vec<_> = fs::read_dir(conf.join("examples"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "yaml"))
        .filter(|path| !path.ends_with("keys.yaml"))
        .collect();
    assert!(files.len() > 15, "only {} examples", files.len());
    files.push(conf.join("forebay.yaml"));
    for file in files {
        let output = forebay(&["check", "-c", file.to_str().unwrap()], &root());
        assert_eq!(output.status.code(), Some(0), "{}", err(&output));
        assert!(out(&output).ends_with(": ok\n"), "{}", out(&output));
    }
}

/// A job of the binary that runs on, and what it has printed.
struct Running {
    child: Child,
    out: Arc<Mutex<String>>,
}

impl Running {
    fn start(args: &[&str]) -> Self {
        let mut child = command().args(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let out = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&out);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                into.lock().unwrap().push_str(&format!("{line}\n"));
            }
        });
        Self { child, out }
    }

    async fn printed(&self, text: &str) -> String {
        let out = || self.out.lock().unwrap().clone();
        eventually(&format!("{text:?} is printed"), async || {
            out().contains(text)
        })
        .await;
        out()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[tokio::test]
async fn the_simulator_runs_by_itself() {
    let args = [
        "sim",
        "--listen",
        "127.0.0.1:0",
        "--control",
        "127.0.0.1:0",
        "--name",
        "box",
        "--model",
        "m1",
    ];
    let running = Running::start(&args);
    let printed = running.printed("control ").await;
    let url = printed
        .split_whitespace()
        .find(|word| word.ends_with("/v1"))
        .unwrap();
    let addr: SocketAddr = url
        .strip_prefix("http://")
        .unwrap()
        .strip_suffix("/v1")
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(get(addr, "/v1/models").await.json()["data"][0]["id"], "m1");
    assert!(
        post_chat(addr, &chat("m1"))
            .await
            .content()
            .starts_with("box answers:")
    );
}

/// A `curl` line: what it would send, and where.
#[derive(Debug)]
struct Curl {
    method: &'static str,
    addr: SocketAddr,
    path: String,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Curl {
    /// Reads every `curl` line of a text, continued lines included.
    fn all(text: &str) -> Vec<Self> {
        let text = text.replace("\\\n", " ");
        let lines = text
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with("curl "));
        lines.map(|line| Self::read(&words(line))).collect()
    }

    fn read(words: &[String]) -> Self {
        let mut curl = Self {
            method: "GET",
            addr: ([0, 0, 0, 0], 0).into(),
            path: String::new(),
            headers: BTreeMap::new(),
            body: String::new(),
        };
        let mut words = words.iter().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "-X" => {
                    assert_eq!(words.next().unwrap(), "POST");
                    curl.method = "POST";
                }
                "-H" => {
                    let (name, value) = words.next().unwrap().split_once(": ").unwrap();
                    curl.headers.insert(name.to_owned(), value.to_owned());
                }
                "-d" => {
                    curl.body.clone_from(words.next().unwrap());
                    curl.method = "POST";
                }
                flags if flags.starts_with('-') => {
                    assert!(["-s", "-si", "-sN"].contains(&flags), "{flags}");
                }
                url => {
                    let rest = url.strip_prefix("http://").unwrap();
                    let (addr, path) = rest.split_once('/').unwrap();
                    curl.addr = addr.parse().unwrap();
                    curl.path = format!("/{path}");
                }
            }
        }
        curl
    }

    async fn run(&self) -> Answer {
        assert!(self.body.is_empty() || self.headers["content-type"] == "application/json");
        ask(
            self.addr,
            self.method,
            &self.path,
            &[],
            self.body.as_bytes(),
        )
        .await
    }
}

/// The words of a shell line with single quotes.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quoted) = (vec![String::new()], false);
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[tokio::test]
async fn the_demo_does_what_it_prints() {
    let (listen, admin) = (free_port().to_string(), free_port().to_string());
    let mut running = Running::start(&[
        "demo",
        "--listen",
        &listen,
        "--admin",
        &admin,
        "--sim-port",
        "0",
    ]);
    let printed = running.printed("Ctrl-C ends the demo.").await;
    let python = printed.split_once("from openai import OpenAI").unwrap().1;
    assert!(
        python.contains(&format!("base_url=\"http://{listen}/v1\"")),
        "{python}"
    );
    assert!(python.contains("model=\"demo\""), "{python}");
    let curls = Curl::all(&printed);
    let [
        ask,
        stream,
        stop_1,
        stop_2,
        start_1,
        start_2,
        health,
        metrics,
    ] = &curls[..]
    else {
        panic!("{curls:#?}");
    };
    eventually("the demo listens", async || {
        tokio::net::TcpStream::connect(ask.addr).await.is_ok()
    })
    .await;

    let answer = ask.run().await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("x-forebay-fallback"), Some("0"));
    let streamed = stream.run().await;
    assert_eq!(streamed.header("content-type"), Some("text/event-stream"));
    assert_eq!(streamed.events().last().unwrap(), "[DONE]");

    assert_eq!(stop_1.run().await.status, 200);
    for _ in 0..2 {
        assert_eq!(ask.run().await.upstream(), "gpu-2");
    }
    assert_eq!(stop_2.run().await.status, 200);
    let answer = ask.run().await;
    assert_eq!(answer.upstream(), "ollama");
    assert_eq!(answer.header("x-forebay-fallback"), Some("1"));
    assert_eq!(health.run().await.json()["status"], "degraded");
    assert!(
        metrics
            .run()
            .await
            .text()
            .contains("forebay_failovers_total")
    );

    assert_eq!(start_1.run().await.status, 200);
    assert_eq!(start_2.run().await.status, 200);
    eventually("a server that was started answers again", async || {
        ask.run().await.upstream().starts_with("gpu-")
    })
    .await;

    let pid = running.child.id().to_string();
    let sent = std::process::Command::new("kill")
        .args(["-INT", &pid])
        .status();
    assert!(sent.unwrap().success());
    let mut status = None;
    eventually("the demo has ended", || {
        status = running.child.try_wait().unwrap();
        let ended = status.is_some();
        async move { ended }
    })
    .await;
    assert_eq!(status.unwrap().code(), Some(0));
}
