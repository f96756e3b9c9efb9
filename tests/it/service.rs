//! What a service manager hears: sd_notify(3) over a datagram socket, in order, and
//! from nobody but the main process.

use std::path::Path;

use tokio::net::{TcpStream, UnixDatagram};

use crate::support::{
    Connection, Gateway, chat_stream, eventually, gateway::command, http::get, one_group, sim, soon,
};

/// The service manager.
struct Manager {
    socket: UnixDatagram,
    path: String,
}

impl Manager {
    fn new(folder: &Path) -> Self {
        let path = folder.join("notify");
        Self {
            socket: UnixDatagram::bind(&path).unwrap(),
            path: path.to_str().unwrap().to_owned(),
        }
    }

    /// The lines of the next message.
    async fn next(&self) -> Vec<String> {
        let mut buffer = vec![0; 4096];
        let received = self.socket.recv(&mut buffer);
        let length = soon("a message", received).await.unwrap();
        buffer.truncate(length);
        let text = String::from_utf8(buffer).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// The next message that is no sign of life.
    async fn news(&self) -> Vec<String> {
        loop {
            let message = self.next().await;
            if message != ["WATCHDOG=1"] {
                return message;
            }
        }
    }
}

#[tokio::test]
async fn it_is_told_what_becomes_of_the_process_in_order() {
    let gpu = sim("gpu-1").await;
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::new(folder.path());
    let yaml = format!("shutdown: {{ lame_duck: 0s }}\n{}", one_group(&[&gpu]));
    let env = [("NOTIFY_SOCKET", &*manager.path)];
    let mut gateway = Gateway::start_with(&yaml, &[], &env).await;
    let ready = manager.news().await;
    assert_eq!(ready[0], "READY=1");
    assert_eq!(ready[1], format!("STATUS=serving on {}", gateway.addr));

    gateway.signal("HUP");
    let reloading = manager.news().await;
    assert_eq!(reloading[0], "RELOADING=1");
    assert!(reloading[1].starts_with("MONOTONIC_USEC="), "{reloading:?}");
    assert_eq!(manager.news().await, ["READY=1"]);

    // A configuration with mistakes is read, too.
    gateway.write_config("groups: 1");
    assert_eq!(manager.news().await[0], "RELOADING=1");
    assert_eq!(manager.news().await, ["READY=1"]);

    gateway.signal("TERM");
    let stopping = manager.news().await;
    assert_eq!(stopping[0], "STOPPING=1");
    let longest = stopping[1].strip_prefix("EXTEND_TIMEOUT_USEC=").unwrap();
    // The drain of 300 s, and what comes after it.
    assert!(longest.parse::<u64>().unwrap() > 300_000_000, "{longest}");
    eventually("the process has ended", || {
        let ended = gateway.exited().is_some();
        async move { ended }
    })
    .await;
}

#[tokio::test]
async fn it_is_told_so_too_where_its_socket_has_an_abstract_name() {
    use std::os::linux::net::SocketAddrExt as _;
    let name = format!("forebay-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let socket = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
    socket.set_nonblocking(true).unwrap();
    let manager = Manager {
        socket: UnixDatagram::from_std(socket).unwrap(),
        path: format!("@{name}"),
    };
    let gpu = sim("gpu-1").await;
    let env = [("NOTIFY_SOCKET", &*manager.path)];
    let _gateway = Gateway::start_with(&one_group(&[&gpu]), &[], &env).await;
    assert_eq!(manager.news().await[0], "READY=1");
}

#[tokio::test]
async fn where_a_successor_dies_the_old_process_makes_room_for_a_new_start() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=50;tokens=100000").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::new(folder.path());
    let env = [("NOTIFY_SOCKET", &*manager.path)];
    let mut gateway = Gateway::start_with(&one_group(&[&gpu]), &[], &env).await;
    let mut stream = Connection::open(gateway.addr).await;
    let body = chat_stream("demo").replacen('{', "{\"max_tokens\":90000,", 1);
    stream
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    stream.read_until("data: ").await;
    gateway.signal("USR2");
    gateway.logged("upgraded: successor=").await;
    let successor = gateway.successors()[0].to_string();
    let killed = std::process::Command::new("kill")
        .args(["-KILL", &successor])
        .status();
    assert!(killed.unwrap().success());
    let answer = stream.answer().await;
    assert!(
        answer.text().contains("server_shutdown"),
        "{}",
        answer.text()
    );
    let mut status = None;
    eventually("the process has ended", || {
        status = gateway.exited();
        let ended = status.is_some();
        async move { ended }
    })
    .await;
    assert_eq!(status.unwrap().code(), Some(1), "it is to be started again");
}

#[tokio::test]
async fn it_is_told_that_the_process_lives_as_long_as_it_asks_for_that() {
    let gpu = sim("gpu-1").await;
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::new(folder.path());
    let env = [
        ("NOTIFY_SOCKET", &*manager.path),
        ("WATCHDOG_USEC", "2000000"),
    ];
    let _gateway = Gateway::start_with(&one_group(&[&gpu]), &[], &env).await;
    assert_eq!(manager.next().await[0], "READY=1");
    for _ in 0..3 {
        assert_eq!(manager.next().await, ["WATCHDOG=1"]);
    }
}

#[tokio::test]
async fn a_successor_is_announced_by_the_process_that_it_follows() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=20;tokens=1000").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::new(folder.path());
    let yaml = format!("shutdown: {{ lame_duck: 0s }}\n{}", one_group(&[&gpu]));
    let env = [
        ("NOTIFY_SOCKET", &*manager.path),
        ("WATCHDOG_USEC", "20000000"),
    ];
    let mut gateway = Gateway::start_with(&yaml, &[], &env).await;
    assert_eq!(manager.news().await[0], "READY=1");

    // Somebody is served by the old process, and goes on being.
    let mut stream = Connection::open(gateway.addr).await;
    // Longer than the upgrade and the stop take.
    let body = chat_stream("demo").replacen('{', "{\"max_tokens\":500,", 1);
    stream
        .request("POST", "/v1/chat/completions", &[], body.as_bytes())
        .await;
    stream.read_until("data: ").await;

    let mut successor = 0;
    for _ in 0..2 {
        let mut upgrade = command();
        upgrade.args(["upgrade", "-c"]).arg(gateway.config_file());
        let upgraded = tokio::task::spawn_blocking(move || upgrade.output().unwrap());
        assert!(upgraded.await.unwrap().status.success());
        let health = get(gateway.admin, "/health").await.json();
        successor = health["pid"].as_u64().unwrap();
        assert_eq!(manager.news().await, [format!("MAINPID={successor}")]);
        assert_eq!(manager.news().await[0], "READY=1");
        // The watchdog's variables of the old process do not silence the new one.
        assert_eq!(manager.next().await, ["WATCHDOG=1"]);
    }

    // Stopped, it stays until the first is done, though the second has nothing to do:
    // with it the service would end.
    let pid = successor.to_string();
    let kill = |signal: &'static str| {
        let pid = pid.clone();
        std::process::Command::new("kill")
            .args([signal, &pid])
            .status()
    };
    assert!(kill("-TERM").unwrap().success());
    assert_eq!(manager.news().await[0], "STOPPING=1");
    eventually("both wait", || {
        let log = gateway.log();
        let waits = "waiting for the process before this one to finish";
        async move { log.matches(waits).count() == 2 }
    })
    .await;
    assert!(gateway.exited().is_none());
    let answer = stream.answer().await;
    assert_eq!(answer.events().last().unwrap(), "[DONE]");
    assert_eq!(answer.content().split_whitespace().count(), 500);
    drop(stream);
    eventually("both have ended", || {
        let old = gateway.exited().is_some();
        let admin = gateway.admin;
        async move { old && TcpStream::connect(admin).await.is_err() }
    })
    .await;
}
