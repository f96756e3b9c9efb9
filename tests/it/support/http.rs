//! A client on a bare socket: it sends exactly what a test says, and reads an
//! answer as strictly as a good client does.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::soon;

/// An answer, read whole.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    /// In the order and case of the wire.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body ended as its framing said.
    pub complete: bool,
}

impl Answer {
    /// The first header field of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(field, _)| field.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_slice(&self.body) {
            Ok(value) => value,
            Err(why) => panic!("{why} in {:?}", String::from_utf8_lossy(&self.body)),
        }
    }

    /// The upstream that answered.
    pub fn upstream(&self) -> &str {
        self.header("x-forebay-upstream").unwrap_or("")
    }

    /// The text of a chat answer, streamed or not.
    pub fn content(&self) -> String {
        if self.header("content-type") == Some("text/event-stream") {
            return self
                .events()
                .iter()
                .filter_map(|event| {
                    let event: serde_json::Value = serde_json::from_str(event).ok()?;
                    Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())
                })
                .collect();
        }
        self.json()["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// The data of each event of a stream (single `data:` lines).
    pub fn events(&self) -> Vec<String> {
        self.text()
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(str::to_owned)
            .collect()
    }

    /// Checks the shape of an error, and returns its code.
    #[track_caller]
    pub fn error_code(&self) -> String {
        let body = self.json();
        let error = &body["error"];
        assert!(error["message"].is_string(), "{body}");
        assert!(error["type"].is_string(), "{body}");
        assert!(
            error["param"].is_string() || error["param"].is_null(),
            "{body}"
        );
        assert!(
            error["code"].is_string() || error["code"].is_null(),
            "{body}"
        );
        assert!(self.header("x-request-id").is_some(), "{:?}", self.headers);
        error["code"].as_str().unwrap_or("").to_owned()
    }
}

/// One connection, used by hand.
pub struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    pub async fn open(addr: SocketAddr) -> Self {
        let stream = soon("a connection", TcpStream::connect(addr))
            .await
            .unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            read: Vec::new(),
        }
    }

    /// A connection that can take very little while nobody reads from it.
    pub async fn open_narrow(addr: SocketAddr) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let stream = soon("a connection", socket.connect(addr)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            read: Vec::new(),
        }
    }

    /// Sends bytes as they are.
    pub async fn send(&mut self, bytes: &[u8]) {
        soon("bytes are taken", self.stream.write_all(bytes))
            .await
            .unwrap();
    }

    /// Sends bytes as they are; the other side may have closed already.
    pub async fn try_send(&mut self, bytes: &[u8]) -> bool {
        soon("bytes are taken", self.stream.write_all(bytes))
            .await
            .is_ok()
    }

    /// Sends a request with a length.
    pub async fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) {
        self.send(&build(method, path, headers, body)).await;
    }

    /// Reads one answer.
    pub async fn answer(&mut self) -> Answer {
        soon("an answer", self.read_answer()).await
    }

    /// Reads until a text has come (it stays in the buffer); panics if the
    /// connection ends before.
    pub async fn read_until(&mut self, text: &str) -> String {
        soon(&format!("{text:?}"), async {
            while !contains(&self.read, text.as_bytes()) {
                assert!(
                    self.more().await,
                    "closed before {text:?}: {:?}",
                    String::from_utf8_lossy(&self.read)
                );
            }
        })
        .await;
        String::from_utf8_lossy(&self.read).into_owned()
    }

    /// Reads everything until the other side closes.
    pub async fn rest(&mut self) -> Vec<u8> {
        soon("the end of the connection", async {
            while self.more().await {}
        })
        .await;
        std::mem::take(&mut self.read)
    }

    /// Reads a stream to its end, or whatever else comes, as the bytes it came
    /// in; waits for ever.
    pub async fn rest_of_any(mut self) -> Vec<u8> {
        while !contains(&self.read, b"data: [DONE]") && self.more().await {}
        std::mem::take(&mut self.read)
    }

    /// Reads the first bytes of whatever comes; none if the connection ends.
    pub async fn rest_of_one(mut self) -> Vec<u8> {
        soon("an answer or the end", self.more()).await;
        std::mem::take(&mut self.read)
    }

    /// Watches for a time whether the other side neither says anything nor
    /// closes.
    pub async fn stays_open(&mut self, time: std::time::Duration) -> bool {
        tokio::time::timeout(time, self.more()).await.is_err()
    }

    /// Closes the sending side only.
    pub async fn finish_sending(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// Closes with a reset.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream)
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap();
    }

    async fn more(&mut self) -> bool {
        matches!(self.stream.read_buf(&mut self.read).await, Ok(1..))
    }

    async fn read_answer(&mut self) -> Answer {
        loop {
            let answer = self.read_one_answer().await;
            if answer.status >= 200 {
                return answer;
            }
        }
    }

    async fn read_one_answer(&mut self) -> Answer {
        let end = loop {
            if let Some(at) = self.read.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(
                self.more().await,
                "closed before a header: {:?}",
                String::from_utf8_lossy(&self.read)
            );
        };
        let head: Vec<u8> = self.read.drain(..end).collect();
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let headers: Vec<(String, String)> = lines
            .filter(|line| !line.is_empty())
            .map(|line| {
                let (name, value) = line.split_once(':').unwrap();
                (name.to_owned(), value.trim().to_owned())
            })
            .collect();
        let mut answer = Answer {
            status,
            headers,
            body: Vec::new(),
            complete: true,
        };
        if status < 200 || status == 204 || status == 304 {
            return answer;
        }
        if answer.header("transfer-encoding") == Some("chunked") {
            assert!(answer.header("content-length").is_none());
            self.read_chunks(&mut answer).await;
        } else if let Some(length) = answer.header("content-length") {
            let length: usize = length.parse().unwrap();
            while self.read.len() < length && self.more().await {}
            answer.complete = self.read.len() >= length;
            let length = length.min(self.read.len());
            answer.body = self.read.drain(..length).collect();
        } else {
            while self.more().await {}
            answer.body = std::mem::take(&mut self.read);
        }
        answer
    }

    async fn read_chunks(&mut self, answer: &mut Answer) {
        loop {
            let Some(line) = self.line().await else {
                answer.complete = false;
                return;
            };
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            while self.read.len() < size + 2 {
                if !self.more().await {
                    answer.complete = false;
                    answer.body.append(&mut self.read);
                    return;
                }
            }
            answer.body.extend(self.read.drain(..size));
            self.read.drain(..2);
            if size == 0 {
                return;
            }
        }
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.read.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<u8> = self.read.drain(..at + 2).collect();
                return Some(String::from_utf8(line).unwrap());
            }
            if !self.more().await {
                return None;
            }
        }
    }
}

/// One request on a connection of its own.
pub async fn ask(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let mut connection = Connection::open(addr).await;
    connection.request(method, path, headers, body).await;
    connection.answer().await
}

pub async fn get(addr: SocketAddr, path: &str) -> Answer {
    ask(addr, "GET", path, &[], b"").await
}

pub async fn post(addr: SocketAddr, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    ask(addr, "POST", path, headers, body).await
}

/// `POST /v1/chat/completions`.
pub async fn post_chat(addr: SocketAddr, body: &str) -> Answer {
    post(addr, "/v1/chat/completions", &[], body.as_bytes()).await
}

/// The bytes of a request with a length.
pub fn build(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    if method != "GET" {
        bytes.extend_from_slice(format!("content-length: {}\r\n", body.len()).as_bytes());
        bytes.extend_from_slice(b"content-type: application/json\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}
