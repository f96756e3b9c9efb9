//! HTTP/2 by hand: frames and header blocks that no library would send.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::soon;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// A field of a header.
pub type Field<'a> = (&'a [u8], &'a [u8]);

/// A frame: RFC 9113 §4.1.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block of literal fields, neither indexed nor compressed: RFC 7541
/// §6.2.2.
pub fn block(fields: &[Field<'_>]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            length_of(text, &mut block);
            block.extend_from_slice(text);
        }
    }
    block
}

/// An integer with a prefix of seven bits: RFC 7541 §5.1.
fn length_of(text: &[u8], into: &mut Vec<u8>) {
    if text.len() < 127 {
        into.push(u8::try_from(text.len()).unwrap());
        return;
    }
    into.push(127);
    let mut rest = text.len() - 127;
    while rest >= 128 {
        into.push(u8::try_from(rest % 128 + 128).unwrap());
        rest /= 128;
    }
    into.push(u8::try_from(rest).unwrap());
}

/// The fields of a chat request.
pub const CHAT: [Field<'static>; 4] = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/v1/chat/completions"),
    (b":authority", b"a"),
];

/// A whole chat request on this stream.
pub fn chat_on(stream: u32, body: &str) -> Vec<u8> {
    [
        frame(HEADERS, END_HEADERS, stream, &block(&CHAT)),
        frame(DATA, END_STREAM, stream, body.as_bytes()),
    ]
    .concat()
}

/// A frame as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// A connection of frames.
pub struct Frames {
    stream: TcpStream,
}

impl Frames {
    /// Connects, and sends the preface and settings: `(id, value)`.
    pub async fn open(addr: SocketAddr, settings: &[(u16, u32)]) -> Self {
        let stream = soon("a connection", TcpStream::connect(addr))
            .await
            .unwrap();
        stream.set_nodelay(true).unwrap();
        let mut frames = Self { stream };
        let mut payload = Vec::new();
        for (id, value) in settings {
            payload.extend_from_slice(&id.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        let start = [PREFACE, &frame(SETTINGS, 0, 0, &payload)].concat();
        assert!(frames.send(&start).await);
        frames
    }

    /// Sends bytes as they are; whether the other side took them.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        soon("frames are taken", self.stream.write_all(bytes))
            .await
            .is_ok()
    }

    /// The next frame; `None` at the end of the connection, however it ends.
    pub async fn next(&mut self) -> Option<Frame> {
        soon("a frame", self.read()).await
    }

    /// Reads to the end of an answer; whether there was one.
    pub async fn answer(&mut self) -> bool {
        while let Some(frame) = self.next().await {
            if matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0 {
                return true;
            }
        }
        false
    }

    /// Reads to the end; the error of the last GOAWAY, if there was one.
    pub async fn ended(&mut self) -> Option<u32> {
        let mut error = None;
        while let Some(frame) = self.next().await {
            if frame.kind == GOAWAY {
                error = Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
            }
        }
        error
    }

    /// Sends pieces until the other side has had enough, or these are all;
    /// what it says meanwhile is read. Returns how many it took.
    pub async fn flood(&mut self, piece: &[u8], times: usize) -> usize {
        let (mut read, mut write) = self.stream.split();
        let mut said = vec![0; 64 * 1024];
        let listen = async { while let Ok(1..) = read.read(&mut said).await {} };
        let send = async {
            let mut sent = 0;
            while sent < times && write.write_all(piece).await.is_ok() {
                sent += 1;
            }
            sent
        };
        tokio::pin!(listen, send);
        soon("the flood is over", async {
            let mut over = false;
            loop {
                tokio::select! {
                    biased;
                    // What was written after the end is not known to be lost.
                    sent = &mut send => return sent,
                    () = &mut listen, if !over => over = true,
                }
            }
        })
        .await
    }

    async fn read(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some(Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]),
            payload,
        })
    }
}
