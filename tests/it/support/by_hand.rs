//! An upstream that does nothing by itself: a test sends its every byte, and so
//! knows what the gateway cannot have seen yet.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::soon;

/// The head of a streamed answer, in chunks.
pub const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// A listening upstream.
pub struct ByHand {
    listener: TcpListener,
}

impl ByHand {
    pub async fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { listener }
    }

    /// Its base URL.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.listener.local_addr().unwrap())
    }

    /// Waits for a connection and a whole request on it.
    pub async fn accept(&self) -> Call {
        let mut call = self.accept_unread().await;
        soon("a request", call.read_request()).await;
        call
    }

    /// The same with a connection on which this side keeps little of what it
    /// sends.
    pub async fn accept_narrow(&self) -> Call {
        let mut call = self.accept_unread().await;
        let socket = socket2::SockRef::from(&call.stream);
        socket.set_send_buffer_size(16 * 1024).unwrap();
        soon("a request", call.read_request()).await;
        call
    }

    /// Waits for a connection, and reads nothing from it.
    pub async fn accept_unread(&self) -> Call {
        let (stream, _) = soon("a connection", self.listener.accept()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Call {
            stream,
            request: Vec::new(),
        }
    }
}

/// One connection from the gateway.
pub struct Call {
    stream: TcpStream,
    request: Vec<u8>,
}

impl Call {
    /// The request as it came.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.request).into_owned()
    }

    /// Sends bytes as they are.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        soon("bytes are taken", self.stream.write_all(bytes.as_ref()))
            .await
            .unwrap();
    }

    /// The body of the request.
    pub fn body(&self) -> &[u8] {
        let end = self.request.windows(4).position(|four| four == b"\r\n\r\n");
        end.map_or(&[], |at| &self.request[at + 4..])
    }

    /// Sends bytes in a chunk of their own.
    pub async fn chunk(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        self.send(chunk).await;
    }

    /// Sends a chunk with one event of a chat that says this.
    pub async fn say(&mut self, text: &str) {
        self.chunk(delta(text)).await;
    }

    /// Ends a body in chunks.
    pub async fn end(&mut self) {
        self.send("0\r\n\r\n").await;
    }

    /// Sends a piece again and again until the gateway takes no more for a
    /// while, or has taken `most` bytes; returns how many it took.
    pub async fn fill(&mut self, piece: &[u8], most: usize) -> usize {
        let patience = std::time::Duration::from_millis(300);
        let mut taken = 0;
        while taken < most {
            let rest = &piece[taken % piece.len()..];
            match tokio::time::timeout(patience, self.stream.write(rest)).await {
                Ok(Ok(written)) => taken += written,
                Ok(Err(_)) | Err(_) => break,
            }
        }
        taken
    }

    /// Sends a chunk with one event that says this, again and again at this
    /// pace, until the gateway has closed the connection.
    pub async fn go_on_saying(mut self, text: &str, pace: std::time::Duration) {
        let event = delta(text);
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        let mut tick = tokio::time::interval(pace);
        while self.stream.write_all(chunk.as_bytes()).await.is_ok() {
            tick.tick().await;
        }
    }

    /// Closes with a reset.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream)
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap();
    }

    /// Waits until the gateway has closed the connection, in whatever way.
    pub async fn closed(mut self) {
        let mut rest = vec![0; 64 * 1024];
        let end = async { while let Ok(1..) = self.stream.read(&mut rest).await {} };
        soon("the gateway closes its connection", end).await;
    }

    async fn read_request(&mut self) {
        loop {
            let text = String::from_utf8_lossy(&self.request);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: "))
                    .map_or(0, |length| length.parse().unwrap());
                if body.len() >= length {
                    return;
                }
            }
            let read = self.stream.read_buf(&mut self.request).await.unwrap();
            assert!(read > 0, "closed inside the request");
        }
    }
}

/// One event of a chat that says this.
pub fn delta(text: &str) -> String {
    let text = serde_json::Value::from(text);
    format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":{text}}}}}]}}\n\n")
}

/// One group of this upstream alone, and a route for every model.
pub fn group_of(url: &str) -> String {
    format!(
        "groups:\n  gpus:\n    local: true\n    upstreams:\n      - {{ name: gpu-1, kind: vllm, url: \"{url}\" }}\nroutes:\n  - {{ model: \"*\", groups: [gpus] }}\n"
    )
}
