//! An upstream that answers with exactly the bytes a test gives it: what the
//! simulator, which speaks HTTP, has no knob for.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
};

use pingora::tls::{
    CertificateDer, PrivateKeyDer, RootCertStore, ServerConfig, TlsAcceptor, WebPkiClientVerifier,
    install_default_crypto_provider, load_ca_file_into_store, load_certs_and_key_files,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

/// A running scripted upstream; closed when it is dropped.
pub struct Scripted {
    pub addr: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    task: JoinHandle<()>,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// The number of its connection, from 1.
    pub connection: u64,
    /// Up to and with the empty line.
    pub head: String,
    pub body: Vec<u8>,
}

impl Request {
    /// Its target: path and query.
    pub fn target(&self) -> &str {
        self.head.split(' ').nth(1).unwrap()
    }

    /// Its body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Any free port of this machine.
const ANYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

impl Scripted {
    /// Answers every request with these bytes and keeps the connection open.
    pub async fn always(answer: impl Into<Vec<u8>>) -> Self {
        Self::start(ANYWHERE, vec![(String::new(), answer.into())], None).await
    }

    /// The same at an address that was free.
    pub async fn always_at(addr: SocketAddr, answer: impl Into<Vec<u8>>) -> Self {
        Self::start(addr, vec![(String::new(), answer.into())], None).await
    }

    /// Answers with the bytes of the first target that the request's begins
    /// with; anything else as Ollama does what it does not know.
    pub async fn by_target(answers: &[(&str, Vec<u8>)]) -> Self {
        let answers = answers.iter();
        let answers = answers.map(|(target, answer)| ((*target).to_owned(), answer.clone()));
        Self::start(ANYWHERE, answers.collect(), None).await
    }

    /// The same over TLS, with a certificate of [`tls_file`]: `server`,
    /// `elsewhere` or `expired`.
    pub async fn over_tls(certificate: &str, answer: impl Into<Vec<u8>>) -> Self {
        install_default_crypto_provider();
        let (certificates, key) = certificate_of(certificate);
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .unwrap();
        Self::over(config, answer).await
    }

    /// The same, as `server`, for clients with a certificate of the authority.
    pub async fn among_friends(answer: impl Into<Vec<u8>>) -> Self {
        install_default_crypto_provider();
        let mut friends = RootCertStore::empty();
        load_ca_file_into_store(tls_file("authority.pem"), &mut friends).unwrap();
        let verifier = WebPkiClientVerifier::builder(Arc::new(friends));
        let (certificates, key) = certificate_of("server");
        let config = ServerConfig::builder()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(certificates, key)
            .unwrap();
        Self::over(config, answer).await
    }

    async fn over(config: ServerConfig, answer: impl Into<Vec<u8>>) -> Self {
        let answers = vec![(String::new(), answer.into())];
        Self::start(ANYWHERE, answers, Some(Arc::new(config).into())).await
    }

    async fn start(
        addr: SocketAddr,
        answers: Vec<(String, Vec<u8>)>,
        tls: Option<TlsAcceptor>,
    ) -> Self {
        let answers = Arc::new(answers);
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            for number in 1.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (answers, seen, tls) = (Arc::clone(&answers), Arc::clone(&seen), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, number, &answers, &seen).await,
                        // A client that does not trust us ends the handshake.
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => serve(stream, number, &answers, &seen).await,
                            Err(_) => None,
                        },
                    }
                });
            }
        });
        Self {
            addr,
            requests,
            task,
        }
    }

    /// Its base URL.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.addr)
    }

    /// How often it was asked.
    pub fn asked(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// What it was asked, oldest first.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A file of the tests' own authority, `authority.pem`, which signed `server`
/// (for 127.0.0.1 and localhost) and `elsewhere` (for elsewhere.test), each a
/// `.pem` and a `.key`, for a hundred years; or of `expired-authority.pem`, which
/// signed `expired`, until 2021. They protect nothing.
pub fn tls_file(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls");
    folder.join(name).to_str().unwrap().to_owned()
}

fn certificate_of(name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let file = |end: &str| tls_file(&format!("{name}.{end}"));
    let loaded = load_certs_and_key_files(&file("pem"), &file("key"));
    loaded.unwrap().unwrap()
}

/// The bytes of an answer with a length.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 {status} Whatever\r\n");
    for (name, value) in headers {
        answer.push_str(&format!("{name}: {value}\r\n"));
    }
    answer.push_str(&format!("content-length: {}\r\n\r\n{body}", body.len()));
    answer.into_bytes()
}

/// The same with JSON in it.
pub fn json(status: u16, body: &str) -> Vec<u8> {
    answer(status, &[("content-type", "application/json")], body)
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    connection: u64,
    answers: &[(String, Vec<u8>)],
    seen: &Mutex<Vec<Request>>,
) -> Option<()> {
    let mut read = Vec::new();
    loop {
        let end = loop {
            match read.windows(4).position(|four| four == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None => more(&mut stream, &mut read).await?,
            }
        };
        let head: Vec<u8> = read.drain(..end).collect();
        let head = String::from_utf8(head).unwrap();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().unwrap());
        while read.len() < length {
            more(&mut stream, &mut read).await?;
        }
        let body = read.drain(..length).collect();
        let target = head.split(' ').nth(1).unwrap();
        let found = answers.iter().find(|(begin, _)| target.starts_with(begin));
        let unknown = answer(404, &[("content-type", "text/plain")], "404 page not found");
        let answer = found.map_or(unknown, |(_, answer)| answer.clone());
        seen.lock().unwrap().push(Request {
            connection,
            head,
            body,
        });
        stream.write_all(&answer).await.ok()?;
        stream.flush().await.ok()?;
    }
}

async fn more<S: AsyncRead + Unpin>(stream: &mut S, read: &mut Vec<u8>) -> Option<()> {
    matches!(stream.read_buf(read).await, Ok(1..)).then_some(())
}
