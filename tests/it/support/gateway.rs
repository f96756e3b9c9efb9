//! The real binary, running with a configuration of the test's own.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use tempfile::TempDir;

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
        let folder = tempfile::tempdir().unwrap();
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
            if ready(&mut child, addr).await {
                return Self {
                    addr,
                    admin,
                    folder,
                    child,
                    log,
                };
            }
            let said = log.lock().unwrap().clone();
            assert!(said.contains("cannot listen"), "the gateway did not start: {said}");
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
pub fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn complete(yaml: &str, addr: SocketAddr, admin: SocketAddr) -> String {
    let plugins = if yaml.lines().any(|line| line.starts_with("plugins:")) {
        ""
    } else {
        "plugins: [ auth: none ]\n"
    };
    let admin = if yaml.lines().any(|line| line.starts_with("admin:")) {
        String::new()
    } else {
        format!("admin: {{ listen: \"{admin}\" }}\n")
    };
    format!("listen: \"{addr}\"\n{admin}{plugins}{yaml}")
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

async fn ready(child: &mut Child, addr: SocketAddr) -> bool {
    let mut exited = false;
    eventually("the gateway is ready or gone", || {
        exited = child.try_wait().unwrap().is_some();
        async move {
            exited || tokio::net::TcpStream::connect(addr).await.is_ok()
        }
    })
    .await;
    !exited
}
