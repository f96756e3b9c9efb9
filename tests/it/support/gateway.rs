//! The real binary, running with a configuration of the test's own.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    eventually,
    http::{Answer, get, post},
};

/// A running gateway; killed when it is dropped.
pub struct Gateway {
    /// Where clients connect.
    pub addr: SocketAddr,
    /// Where metrics and reload are.
    pub admin: SocketAddr,
    /// Its folder: `forebay.yaml` and whatever the test puts there.
    pub folder: TempDir,
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Gateway {
    /// Starts the binary with a configuration. `listen`, `admin` and, unless the
    /// YAML has its own, `plugins: [auth: none]` are added here.
    pub async fn start(yaml: &str) -> Self {
        Self::start_with(yaml, &[], &[]).await
    }

    /// Starts it with further files in its folder and environment variables.
    pub async fn start_with(yaml: &str, files: &[(&str, &str)], env: &[(&str, &str)]) -> Self {
        Self::start_by(command, yaml, files, env).await
    }

    /// Starts it under limits of the system, as `prlimit` takes them.
    pub async fn start_limited(yaml: &str, limits: &[&str]) -> Self {
        let limited = || {
            let mut command = Command::new("prlimit");
            command.args(limits).arg(env!("CARGO_BIN_EXE_forebay"));
            command.stdin(Stdio::null());
            command
        };
        Self::start_by(limited, yaml, &[], &[]).await
    }

    /// Starts it by the name `forebay` in its own folder, a link to the binary,
    /// which the test may point elsewhere: see [`Gateway::install`].
    pub async fn start_installed(yaml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("forebay");
        symlink(env!("CARGO_BIN_EXE_forebay"), &link).unwrap();
        let by_link = || {
            let mut command = Command::new(&link);
            command.stdin(Stdio::null());
            command
        };
        Self::start_in(folder, by_link, yaml, &[], &[]).await
    }

    /// Puts a script where it was started from, in place of the binary; `None`
    /// puts the binary back.
    pub fn install(&self, script: Option<&str>) {
        let program = self.folder.path().join("forebay");
        fs::remove_file(&program).ok();
        match script {
            None => symlink(env!("CARGO_BIN_EXE_forebay"), &program).unwrap(),
            Some(script) => {
                fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
                fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
    }

    /// The processes that have taken its place, one after the other.
    pub fn successors(&self) -> Vec<u32> {
        let log = self.log();
        let after = log.split("upgraded: successor=").skip(1);
        let pids = after.map(|rest| rest.split(' ').next().unwrap().parse().unwrap());
        pids.collect()
    }

    async fn start_by(
        command: impl Fn() -> Command,
        yaml: &str,
        files: &[(&str, &str)],
        env: &[(&str, &str)],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::start_in(folder, command, yaml, files, env).await
    }

    async fn start_in(
        folder: TempDir,
        command: impl Fn() -> Command,
        yaml: &str,
        files: &[(&str, &str)],
        env: &[(&str, &str)],
    ) -> Self {
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        // Another process may take the port in between; then the start fails
        // and other ports are tried.
        for _ in 0..5 {
            let (addr, admin) = (free_port(), free_port());
            let file = folder.path().join("forebay.yaml");
            fs::write(&file, complete(yaml, addr, admin)).unwrap();
            let mut child = command()
                .arg("run")
                .arg("-c")
                .arg(&file)
                .envs(env.iter().copied())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let log = collect(&mut child);
            if ready(&mut child, addr, has_own_admin(yaml), admin).await {
                return Self {
                    addr,
                    admin,
                    folder,
                    child,
                    log,
                };
            }
            let said = log.lock().unwrap().clone();
            assert!(
                said.contains("cannot listen"),
                "the gateway did not start: {said}"
            );
        }
        panic!("no free ports");
    }

    /// Replaces the configuration file, as an editor does: a new file, renamed.
    pub fn write_config(&self, yaml: &str) {
        let new = self.folder.path().join(".forebay.yaml.new");
        fs::write(&new, complete(yaml, self.addr, self.admin)).unwrap();
        fs::rename(new, self.config_file()).unwrap();
    }

    /// The configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.folder.path().join("forebay.yaml")
    }

    /// What `POST /reload` says.
    pub async fn reload(&self) -> Answer {
        post(self.admin, "/reload", &[], b"").await
    }

    /// Makes it forget what it knows of its upstreams, or of one.
    pub async fn reset(&self, upstream: Option<&str>) {
        let path = match upstream {
            Some(name) => format!("/upstreams/{name}/reset"),
            None => "/upstreams/reset".to_owned(),
        };
        assert_eq!(post(self.admin, &path, &[], b"").await.status, 200);
    }

    /// The state of an upstream, with its reason: `down connect`.
    pub async fn state(&self, upstream: &str) -> String {
        let all = get(self.admin, "/upstreams").await.json();
        let mut all = all["upstreams"].as_array().unwrap().iter();
        let one = all.find(|one| one["name"] == upstream).unwrap();
        let state = one["state"].as_str().unwrap();
        match one["reason"].as_str() {
            Some(reason) => format!("{state} {reason}"),
            None => state.to_owned(),
        }
    }

    /// Waits until an upstream is in a state.
    pub async fn state_becomes(&self, upstream: &str, wanted: &str) {
        eventually(&format!("{upstream} is {wanted}"), || async {
            self.state(upstream).await == wanted
        })
        .await;
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, by its name without SIG.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.pid().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Sets one of its limits, such as `--fsize=4096:unlimited`.
    pub fn limit(&self, limit: &str) {
        let pid = self.pid().to_string();
        let mut prlimit = Command::new("prlimit");
        let set = prlimit.args(["--pid", &pid, limit]).status().unwrap();
        assert!(set.success());
    }

    /// How it exited, if it has.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until the log has a text.
    pub async fn logged(&self, text: &str) {
        eventually(&format!("{text:?} in the log"), || async {
            self.log().contains(text)
        })
        .await;
    }

    /// The value of a metric, by its name with labels as they are written;
    /// `None` if it is not there.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let metrics = get(self.admin, "/metrics").await;
        metrics.text().lines().find_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            (name == series).then(|| value.parse().unwrap())
        })
    }

    /// Waits until a metric has a value.
    pub async fn metric_becomes(&self, series: &str, wanted: f64) {
        eventually(&format!("{series} = {wanted}"), || async {
            self.metric(series).await == Some(wanted)
        })
        .await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // Whom it left its place to is its own affair.
        for successor in self.successors() {
            let pid = successor.to_string();
            Command::new("kill").args(["-KILL", &pid]).status().ok();
        }
        self.child.kill().ok();
        self.child.wait().ok();
        if thread::panicking() {
            eprintln!("--- the gateway's log ---\n{}", self.log());
        }
    }
}

/// The binary that this test run built.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.stdin(Stdio::null());
    command
}

/// A port that was free a moment ago.
///
/// Not one that the system chooses: it would give the same one, a moment later,
/// to a simulator or to a client, and a test would talk to a stranger.
pub fn free_port() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Below the ports that the system hands out; each process begins elsewhere.
        let nth = NEXT.fetch_add(1, Ordering::Relaxed) + std::process::id() * 257;
        let port = u16::try_from(10_000 + nth % 22_000).unwrap();
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return listener.local_addr().unwrap();
        }
    }
}

fn complete(yaml: &str, addr: SocketAddr, admin: SocketAddr) -> String {
    let plugins = if yaml.lines().any(|line| line.starts_with("plugins:")) {
        ""
    } else {
        "plugins: [ auth: none ]\n"
    };
    let admin = if has_own_admin(yaml) {
        String::new()
    } else {
        format!("admin: {{ listen: \"{admin}\" }}\n")
    };
    format!("listen: \"{addr}\"\n{admin}{plugins}{}", unasked(yaml))
}

/// Switches the health checks of every group off, unless the YAML says
/// something of them: a test counts every connection and every request, and
/// breaks servers that would then be known to be broken before it asks them.
fn unasked(yaml: &str) -> String {
    const OFF: &str = "check: { enabled: false }";
    if yaml.contains("check:") {
        return yaml.to_owned();
    }
    let mut asked = String::with_capacity(yaml.len() + 64);
    for line in yaml.split_inclusive('\n') {
        let trimmed = line.trim_start();
        let indent = line.strip_suffix(trimmed).unwrap();
        if trimmed.starts_with("upstreams:") {
            asked.push_str(&format!("{indent}{OFF}\n{line}"));
        } else {
            let inline = format!("{{ {OFF}, upstreams: [");
            asked.push_str(&line.replace("{ upstreams: [", &inline));
        }
    }
    asked
}

fn collect(child: &mut Child) -> Arc<Mutex<String>> {
    let log = Arc::new(Mutex::new(String::new()));
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let into = Arc::clone(&log);
    thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let mut log = into.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        }
    });
    log
}

fn has_own_admin(yaml: &str) -> bool {
    yaml.lines().any(|line| line.starts_with("admin:"))
}

/// Waits until the gateway serves, or is gone. That somebody listens says
/// little: before it starts it tries both addresses, and lets go of them again.
/// The admin listener is asked where it can be, since nothing counts that.
async fn ready(child: &mut Child, addr: SocketAddr, own_admin: bool, admin: SocketAddr) -> bool {
    let (asked, path) = if own_admin {
        (addr, "/livez")
    } else {
        (admin, "/health")
    };
    let mut exited = false;
    eventually("the gateway is ready or gone", || {
        exited = child.try_wait().unwrap().is_some();
        async move {
            exited || (answers(asked, path).await && TcpStream::connect(addr).await.is_ok())
        }
    })
    .await;
    !exited
}

async fn answers(addr: SocketAddr, path: &str) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(addr).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: forebay.test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    ask.await
        .is_ok_and(|answer| answer.starts_with(b"HTTP/1.1 "))
}
