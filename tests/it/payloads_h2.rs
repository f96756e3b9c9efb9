//! Requests of HTTP/2 that HTTP/2 forbids, or that would be another request, or
//! two, once they are HTTP/1.1: whatever a client puts into its frames, the
//! upstream sees nothing, or exactly the request that was meant.

use forebay::sim::Sim;

use crate::support::{
    Gateway, chat,
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, Field, Frames, GOAWAY, HEADERS, PUSH_PROMISE,
        RST_STREAM, block, frame,
    },
    http::post_chat,
    one_group, sim,
};

const PATH: &[u8] = b"/v1/chat/completions";

/// What may become of a payload.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// No byte to the upstream, and no 200.
    Refused,
    /// Exactly the request that was meant.
    Meant,
}

use Fate::{Meant, Refused};

struct Payload {
    name: String,
    frames: Vec<u8>,
    fate: Fate,
}

/// Collects payloads; the number of each is in its bodies, so that what the
/// upstream saw can be told apart.
struct Payloads(Vec<Payload>);

impl Payloads {
    fn meant(&self) -> String {
        let number = self.0.len();
        format!(r#"{{"model":"demo","messages":[{{"role":"user","content":"meant-{number}."}}]}}"#)
    }

    fn frames(&mut self, fate: Fate, name: &str, frames: Vec<u8>) {
        self.0.push(Payload {
            name: format!("{name} ({})", self.0.len()),
            frames,
            fate,
        });
    }

    /// A request of these fields, with its body in one frame.
    fn request(&mut self, fate: Fate, name: &str, fields: &[Field<'_>]) {
        let body = self.meant();
        let frames = [
            frame(HEADERS, END_HEADERS, 1, &block(fields)),
            frame(DATA, END_STREAM, 1, body.as_bytes()),
        ];
        self.frames(fate, name, frames.concat());
    }

    /// The good request with one more field.
    fn with(&mut self, fate: Fate, name: &[u8], value: &[u8]) {
        let mut fields = good();
        fields.push((name, value));
        let what = format!("{}: {}", name.escape_ascii(), value.escape_ascii());
        self.request(fate, &what, &fields);
    }

    /// The good request with another value of one of its pseudo-headers.
    fn instead(&mut self, fate: Fate, name: &[u8], value: &[u8]) {
        let fields: Vec<Field<'_>> = good()
            .into_iter()
            .map(|field| {
                if field.0 == name {
                    (name, value)
                } else {
                    field
                }
            })
            .collect();
        let what = format!("{} = {}", name.escape_ascii(), value.escape_ascii());
        self.request(fate, &what, &fields);
    }
}

fn good() -> Vec<Field<'static>> {
    vec![
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", PATH),
        (b":authority", b"a"),
    ]
}

/// Names and values that would be lines of their own.
fn injections(all: &mut Payloads) {
    let hidden = b"x\r\n\r\nPOST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n";
    for (name, value) in [
        (b"x\r\nhidden".as_slice(), b"1".as_slice()),
        (b"x\nhidden", b"1"),
        (b"x\rhidden", b"1"),
        (b"x: y\r\nhidden", b"1"),
        (b"x:y", b"1"),
        (b":", b"1"),
        (b"x y", b"1"),
        (b" x", b"1"),
        (b"x ", b"1"),
        (b"x\t", b"1"),
        (b"x\0", b"1"),
        (b"", b"1"),
        (b"X-Upper", b"1"),
        (b"x\x7f", b"1"),
        (b"x\xc3\xa9", b"1"),
        (b"x(y)", b"1"),
        (b"x", b"a\r\nhidden: 1"),
        (b"x", b"a\nhidden: 1"),
        (b"x", b"a\rhidden: 1"),
        (b"x", b"a\0b"),
        (b"x", hidden),
        (b"x", b"a\x0bb"),
        (b"x", b"a\x7fb"),
        (b"host", b"a\r\nhidden: 1"),
        (b"x-request-id", b"a\r\nhidden: 1"),
        (b"x-forebay-upstream", b"gpu-1\r\nhidden: 1"),
    ] {
        all.with(Refused, name, value);
    }
    for value in [
        b"/v1/chat/completions HTTP/1.1".as_slice(),
        b"/v1/chat/completions\r\nhidden: 1",
        b"/v1/chat/completions HTTP/1.1\r\nhost: a\r\n\r\nPOST /hidden",
        b"/v1/chat/completions\0",
        b"/v1/chat/completions\t",
        b"/v1/chat/completions\xff",
        b"//v1/chat/completions",
        b"/v1/x/../chat/completions",
        b"/v1/%63hat/completions",
        b"http://a/v1/chat/completions",
        b"http://evil/v1/chat/completions",
        b"v1/chat/completions",
        b"",
        b"*",
        b"/metrics",
    ] {
        all.instead(Refused, b":path", value);
    }
    for value in [
        b"CONNECT".as_slice(),
        b"TRACE",
        b"",
        b"PO ST",
        b"POST\r\n",
        b"POST /hidden HTTP/1.1\r\nx:",
        b"post",
        b"GET",
    ] {
        all.instead(Refused, b":method", value);
    }
    for value in [
        b"user@a".as_slice(),
        b"a b",
        b"a\r\nhidden: 1",
        b"a/b",
        b"a:b",
        b"",
    ] {
        all.instead(Refused, b":authority", value);
    }
    for value in [b"http\r\nx: y".as_slice(), b"ht tp"] {
        all.instead(Refused, b":scheme", value);
    }
}

/// Fields that belong to a connection of HTTP/1.1, or say the same twice.
fn connections(all: &mut Payloads) {
    for (name, value) in [
        (b"transfer-encoding".as_slice(), b"chunked".as_slice()),
        (b"transfer-encoding", b"identity"),
        (b"connection", b"keep-alive"),
        (b"connection", b"transfer-encoding"),
        (b"keep-alive", b"timeout=5"),
        (b"proxy-connection", b"keep-alive"),
        (b"upgrade", b"websocket"),
        (b"upgrade", b"h2c"),
        (b"te", b"gzip"),
        (b":unknown", b"1"),
        (b":status", b"200"),
        (b":protocol", b"websocket"),
        (b":path", b"/v1/models"),
        (b":path", PATH),
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":authority", b"b"),
        (b"host", b"b"),
        (b"host", b"a:81"),
        (b"host", b"a, b"),
        (b"host", b""),
        (b"content-encoding", b"gzip"),
        (b"expect", b"the-unexpected"),
        (b"content-length", b"5"),
        (b"content-length", b"0"),
        (b"content-length", b"100000"),
        (b"content-length", b"-1"),
        (b"content-length", b"+70"),
        (b"content-length", b"0x46"),
        (b"content-length", b"18446744073709551616"),
        (b"content-length", b"7 0"),
        (b"content-length", b""),
    ] {
        all.with(Refused, name, value);
    }
    for left_out in 0..4 {
        let mut fields = good();
        let (name, _) = fields.remove(left_out);
        let name = format!("without {}", name.escape_ascii());
        all.request(Refused, &name, &fields);
    }
    let mut late = good();
    late.insert(3, (b"x", b"1"));
    all.request(Refused, "a pseudo-header behind a header", &late);
    let mut twice = good();
    twice.push((b"host", b"a"));
    twice.push((b"host", b"a"));
    all.request(Refused, "two hosts", &twice);
    for second in ["5", "71"] {
        let length = all.meant().len().to_string();
        let mut fields = good();
        fields.push((b"content-length", length.as_bytes()));
        fields.push((b"content-length", second.as_bytes()));
        all.request(Refused, "two lengths", &fields);
    }
}

/// Frames in an order, or of a size, that is none.
fn orders(all: &mut Payloads) {
    let header = block(&good());
    let body = all.meant();
    let data = frame(DATA, END_STREAM, 1, body.as_bytes());
    all.frames(Refused, "DATA without HEADERS", data.clone());
    let even = [
        frame(HEADERS, END_HEADERS, 2, &header),
        frame(DATA, END_STREAM, 2, body.as_bytes()),
    ];
    all.frames(Refused, "an even stream", even.concat());
    let zero = frame(HEADERS, END_HEADERS | END_STREAM, 0, &header);
    all.frames(Refused, "a request on stream 0", zero);
    let alone = frame(CONTINUATION, END_HEADERS, 1, &header);
    all.frames(Refused, "CONTINUATION without HEADERS", alone);
    let torn = [frame(HEADERS, 0, 1, &header), data.clone()].concat();
    all.frames(Refused, "DATA inside a header", torn);
    let other = [
        frame(HEADERS, 0, 1, &header),
        frame(CONTINUATION, END_HEADERS, 3, &header),
    ];
    all.frames(Refused, "CONTINUATION of another stream", other.concat());
    let large = frame(DATA, END_STREAM, 1, &[b'x'; 70_000]);
    all.frames(Refused, "a frame larger than allowed", large);
    let push = frame(
        PUSH_PROMISE,
        END_HEADERS,
        1,
        &[&[0, 0, 0, 2], &*header].concat(),
    );
    all.frames(Refused, "a push by a client", push);
    let padded = frame(HEADERS, END_HEADERS | 8, 1, &[&[255], &*header].concat());
    all.frames(Refused, "more padding than frame", padded);
    let cut = frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        1,
        &header[..header.len() - 1],
    );
    all.frames(Refused, "a header block that is cut off", cut);
    let index = frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff, 0xff, 0x7f]);
    all.frames(Refused, "a reference to nothing", index);
    let huffman = frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        1,
        &[0, 1, b'x', 0x84, 0xff, 0xff, 0xff, 0xff],
    );
    all.frames(Refused, "a huffman code of nothing but its end", huffman);
    let itself = frame(
        HEADERS,
        END_HEADERS | 0x20,
        1,
        &[&[0, 0, 0, 1, 0], &*header].concat(),
    );
    all.frames(
        Refused,
        "a stream that depends on itself",
        [itself, data].concat(),
    );
}

/// What HTTP/2 allows is understood, and as one request.
fn sound(all: &mut Payloads) {
    all.request(Meant, "the good one", &good());
    all.with(Meant, b"te", b"trailers");
    // The fragment is gone before anybody could see it; it is no part of a path.
    all.instead(Meant, b":path", b"/v1/chat/completions#x");
    // Names of hosts may have commas (RFC 3986 §3.2.2); it is not used, nor is
    // the scheme.
    all.instead(Meant, b":authority", b"a,b");
    all.instead(Meant, b":scheme", b"");
    all.with(Meant, b"host", b"a");
    all.with(Meant, b"x", b"b\xc3\xa9");
    let length = all.meant().len().to_string();
    all.with(Meant, b"content-length", length.as_bytes());
    let body = all.meant();
    let header = block(&good());
    let pieces = [
        frame(HEADERS, 0, 1, &header[..10]),
        frame(CONTINUATION, 0, 1, &header[10..20]),
        frame(CONTINUATION, END_HEADERS, 1, &header[20..]),
        frame(DATA, 0, 1, &body.as_bytes()[..5]),
        frame(
            DATA,
            8,
            1,
            &[&[3], &body.as_bytes()[5..9], &[0, 0, 0]].concat(),
        ),
        frame(DATA, END_STREAM, 1, &body.as_bytes()[9..]),
    ];
    all.frames(Meant, "in pieces", pieces.concat());
    // Trailers never become fields of the request.
    let body = all.meant();
    let trailers = [
        (b"content-length".as_slice(), b"5".as_slice()),
        (b"authorization", b"hidden"),
        (b"x-hidden", b"1"),
    ];
    let frames = [
        frame(HEADERS, END_HEADERS, 1, &header),
        frame(DATA, 0, 1, body.as_bytes()),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&trailers[1..])),
    ];
    all.frames(Meant, "with trailers", frames.concat());
}

/// What the upstream has seen of a payload.
fn seen(sim: &Sim, number: usize) -> usize {
    let meant = format!("meant-{number}.");
    let records = sim.records();
    let raw = records.iter().map(|record| record.raw());
    raw.filter(|raw| String::from_utf8_lossy(raw).contains(&meant))
        .count()
}

/// How the other side took it: by an answer, a reset, or the end.
async fn outcome(connection: &mut Frames) -> String {
    while let Some(frame) = connection.next().await {
        match frame.kind {
            HEADERS if frame.payload.first() == Some(&0x88) => return "200".to_owned(),
            // 0x8c is 400, 0x8d 404; 0x48 begins a `:status` that has no index.
            HEADERS if matches!(frame.payload.first(), Some(0x8c | 0x8d | 0x48)) => {
                return "4xx".to_owned();
            }
            HEADERS => return format!("an answer of {:?}", frame.payload.first()),
            RST_STREAM => return "reset".to_owned(),
            GOAWAY => return "goaway".to_owned(),
            _ => {}
        }
    }
    "closed".to_owned()
}

#[tokio::test]
async fn no_frames_make_another_request_of_what_was_sent() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 1s, body_timeout: 1s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let mut all = Payloads(Vec::new());
    for add in [injections, connections, orders, sound] {
        add(&mut all);
    }
    let count = all.0.len();
    assert!(count >= 100, "{count}");
    let mut wrong = Vec::new();
    let mut meant = 0;
    for (number, payload) in all.0.iter().enumerate() {
        let mut connection = Frames::open(gateway.addr, &[]).await;
        connection.send(&payload.frames).await;
        let how = outcome(&mut connection).await;
        let upstream = seen(&sim, number);
        let good = match payload.fate {
            Refused => how != "200" && !how.starts_with("an answer") && upstream == 0,
            Meant => how == "200" && upstream == 1,
        };
        if !good {
            wrong.push(format!("{}: {how}, upstream={upstream}", payload.name));
        }
        meant += usize::from(payload.fate == Meant);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Nothing else went upstream, and nothing of what was hidden.
    let records = sim.records();
    assert_eq!(records.len(), meant);
    for record in records {
        let head = String::from_utf8_lossy(&record.head).to_lowercase();
        assert!(!head.contains("hidden"), "{head}");
        assert!(
            head.starts_with("post /v1/chat/completions http/1.1\r\n"),
            "{head}"
        );
        assert_eq!(head.matches("content-length:").count(), 1, "{head}");
        assert!(!head.contains("transfer-encoding"), "{head}");
        assert!(String::from_utf8_lossy(&record.body).contains("meant-"));
    }
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}
