//! Requests of HTTP/1 that are malformed, or sound and dangerous, beyond those
//! of `smuggling`: versions, line ends, fields, targets, methods, expectations,
//! pipelines. Each has a number in its bytes; the upstream's byte log tells what
//! became of it.

use crate::support::{
    Connection, Gateway, chat, one_group,
    payloads::{
        CHAT,
        Fate::{self, Either, Meant, Refused},
        Payloads, is_unharmed, send_all,
    },
    sim,
};

/// Adds a request with this line and these fields, its length, and its body; the
/// connection ends with it.
fn request(all: &mut Payloads, fate: Fate, line: &[u8], fields: &[u8]) {
    let body = all.meant();
    let length = format!(
        "content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let bytes = [line, b"\r\n", fields, length.as_bytes(), body.as_bytes()].concat();
    let name = format!("{} | {}", line.escape_ascii(), fields.escape_ascii());
    all.raw(fate, name.chars().take(120).collect::<String>(), &bytes);
}

fn hidden(all: &Payloads) -> String {
    String::from_utf8(all.hidden()).unwrap()
}

const LINE: &[u8] = b"POST /v1/chat/completions HTTP/1.1";

fn versions(all: &mut Payloads) {
    for version in [
        "HTTP/0.9",
        "HTTP/1.2",
        "HTTP/2",
        "HTTP/2.0",
        "HTTP/3",
        "HTTP/11",
        "HTTP/1.",
        "HTTP/.1",
        "HTTP/1",
        "http/1.1",
        "HTTPS/1.1",
        "HTTP 1.1",
        "HTTP/1.1x",
        "HTTP/1,1",
        "HTTP/01.1",
        "HTTP/-1.1",
        "ICY",
        "HTTP/1.1 HTTP/1.1",
    ] {
        request(
            all,
            Refused,
            format!("POST {CHAT} {version}").as_bytes(),
            b"host: a\r\n",
        );
    }
    // HTTP/1.0 without a length has no body; what follows is nothing.
    let body = all.meant();
    let bytes = format!("POST {CHAT} HTTP/1.0\r\nhost: a\r\n\r\n{body}");
    all.raw(Refused, "HTTP/1.0 without a length", bytes.as_bytes());
    let bytes = format!("POST {CHAT}\r\n\r\n{}", hidden(all));
    all.raw(Refused, "HTTP/0.9", bytes.as_bytes());
    let keep = b"host: a\r\nconnection: keep-alive\r\n";
    request(all, Meant, format!("POST {CHAT} HTTP/1.0").as_bytes(), keep);
}

fn line_ends(all: &mut Payloads) {
    // Empty lines before a request are passed over (RFC 9112 §2.2).
    let framed = |all: &Payloads, before: &[u8], after: &str| {
        let body = all.meant();
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        [before, head.as_bytes(), after.as_bytes()].concat()
    };
    let bytes = framed(all, b"\r\n", "");
    all.raw(Meant, "one empty line before", &bytes);
    for (name, before) in [
        ("1000 empty lines before", b"\r\n".repeat(1000)),
        ("line feeds before", b"\n\n\n".to_vec()),
    ] {
        let bytes = framed(all, &before, "");
        all.raw(Either, name, &bytes);
    }
    for (name, before) in [
        ("a space before", b" ".as_slice()),
        ("a tab before", b"\t"),
        ("a NUL before", b"\0"),
        ("carriage returns before", b"\r\r\r"),
        ("a byte order mark before", b"\xef\xbb\xbf"),
        ("a TLS hello before", b"\x16\x03\x01\x02\x00\x01"),
        ("a proxy line before", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"),
        ("a line of words before", b"hello there\r\n"),
    ] {
        let bytes = framed(all, before, "");
        all.raw(Refused, name, &bytes);
    }
    for (name, from, to) in [
        (
            "a carriage return alone after the line",
            " HTTP/1.1\r\n",
            " HTTP/1.1\r",
        ),
        (
            "a carriage return alone after a field",
            "host: a\r\n",
            "host: a\r",
        ),
        (
            "two carriage returns after a field",
            "host: a\r\n",
            "host: a\r\r\n",
        ),
        (
            "a vertical tab for a line end",
            "host: a\r\n",
            "host: a\x0b",
        ),
        ("a form feed for a line end", "host: a\r\n", "host: a\x0c"),
        ("a next line for a line end", "host: a\r\n", "host: a\u{85}"),
        ("the end by carriage returns", "\r\n\r\n", "\r\r"),
        ("line feed, carriage return", "host: a\r\n", "host: a\n\r"),
    ] {
        let bytes = framed(all, b"", "");
        let text = String::from_utf8(bytes).unwrap().replacen(from, to, 1);
        all.raw(Refused, name, text.as_bytes());
    }
    let hidden = hidden(all);
    let bytes = framed(all, b"", &hidden);
    all.raw(Meant, "a request behind the last", &bytes);
}

fn fields(all: &mut Payloads) {
    let long = [b"x".repeat(40_000).as_slice(), b": y\r\n"].concat();
    let many = b"x: y\r\n".repeat(300);
    let value = [b"x: ".as_slice(), &b"y".repeat(40_000), b"\r\n"].concat();
    for field in [
        b"x;y: z\r\n".as_slice(),
        b"x{y}: z\r\n",
        b"x@y: z\r\n",
        b"x=y: z\r\n",
        b"x/y: z\r\n",
        b"x?y: z\r\n",
        b"x\\y: z\r\n",
        b"<x>: z\r\n",
        b"x\x01: z\r\n",
        b"x\x1b: z\r\n",
        b"x\x7f: z\r\n",
        b"\xc3\xa9: z\r\n",
        b"\xff: z\r\n",
        b":x: z\r\n",
        b":authority: b\r\n",
        b": \r\n",
        b"=\r\n",
        b"x\r\n",
        b"x: a\x01b\r\n",
        b"x: a\x1b[31m\r\n",
        b"x: a\x7fb\r\n",
        b"x: a\x08b\r\n",
        b"host: b\r\n",
        b"Host: a\r\n",
        b"HOST : a\r\n",
        b"content-encoding: gzip\r\n",
        b"content-encoding: br, gzip\r\n",
        b"x-forebay-local: \xff\r\n",
        b"x-forebay-local: 2\r\n",
        b"x-forebay-upstream: \xff\r\n",
        b"x-forebay-upstream: nobody\r\n",
        b"x-forebay-upstream: \r\n",
        b"x-forebay-upstream: gpu-1\r\nx-forebay-upstream: gpu-1\r\n",
        b"expect: y 100-continue\r\n",
        b"expect: 100-continue, 100-continue\r\n",
        b"expect: 100\r\n",
        b"expect: \r\n",
        b"expect: 0.CL\r\n",
        &long,
        &many,
        &value,
    ] {
        request(all, Refused, LINE, &[b"host: a\r\n", field].concat());
    }
    for field in [
        b"x: \xc3\xa9\r\n".as_slice(),
        b"x: \xff\xfe\r\n",
        b"authorization: Bearer \xff\r\n",
        b"x:\r\n",
        b"x:y\r\n",
        b"x: \t y \t \r\n",
        b"x: a\tb\r\n",
        b"x_y: z\r\n",
        b"x!#$%&'*+-.^_`|~y: z\r\n",
        b"expect: 100-continue\r\n",
        b"expect: 100-Continue\r\n",
        b"connection: x, y, z\r\n",
        b"upgrade: h2c\r\n",
        b"te: trailers\r\n",
        b"trailer: authorization\r\n",
    ] {
        request(all, Meant, LINE, &[b"host: a\r\n", field].concat());
    }
    for host in [
        b"".as_slice(),
        b"host:\r\n",
        b"host: a b\r\n",
        b"host: a, b\r\n",
        b"host: a/b\r\n",
        b"host: a#b\r\n",
        b"host: u@a\r\n",
        b"host: a:b\r\n",
        b"host: a:99999\r\n",
        b"host: [::1\r\n",
        b"host: a\x00\r\n",
        b"host: http://a\r\n",
        b"host: a\r\nhost: a\r\n",
        b"host: \xff\r\n",
    ] {
        request(all, Refused, LINE, host);
    }
}

fn targets(all: &mut Payloads) {
    for target in [
        "*",
        "a:80",
        "http://a/v1/chat/completions",
        "http://evil/v1/chat/completions",
        "https://a/v1/chat/completions",
        "v1/chat/completions",
        "//v1/chat/completions",
        "///v1/chat/completions",
        "/v1//chat/completions",
        "/v1/./chat/completions",
        "/v1/x/../chat/completions",
        "/v1/%2e%2e/v1/chat/completions",
        "/v1/%63hat/completions",
        "/v1/chat%2fcompletions",
        "/v1/chat/completions/",
        "/v1/chat/completions;x=y",
        "/v1/chat/completions%00",
        "/v1/chat/completions%0d%0ax:%20y",
        "/v1/chat/completions#x",
        "/v1/chat/completions\u{e9}",
        "/V1/chat/completions",
        "/v1/chat\\completions",
        "\\v1\\chat\\completions",
        "/metrics",
        "/invocations",
        "/pause",
        "/v1/chat/completions\u{2028}",
        "?",
    ] {
        request(
            all,
            Refused,
            format!("POST {target} HTTP/1.1").as_bytes(),
            b"host: a\r\n",
        );
    }
    request(
        all,
        Meant,
        format!("POST {CHAT}?x=y HTTP/1.1").as_bytes(),
        b"host: a\r\n",
    );
    for method in [
        "CONNECT",
        "TRACE",
        "TRACK",
        "OPTIONS",
        "PUT",
        "PATCH",
        "DELETE",
        "post",
        "Post",
        "POST\u{e9}",
        "PO(ST",
        "PRI",
        "GET",
        "HEAD",
        "POSTT",
        "\"POST\"",
    ] {
        request(
            all,
            Refused,
            format!("{method} {CHAT} HTTP/1.1").as_bytes(),
            b"host: a\r\n",
        );
    }
    // A body where none is expected is never the next request.
    for path in ["/livez", "/v1/models", "/"] {
        let hidden = hidden(all);
        let bytes = format!(
            "GET {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{hidden}",
            hidden.len()
        );
        all.raw(Refused, format!("GET {path} with a body"), bytes.as_bytes());
        let chunk = format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len());
        let bytes =
            format!("GET {path} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{chunk}");
        all.raw(Refused, format!("GET {path} with chunks"), bytes.as_bytes());
    }
}

#[tokio::test]
async fn no_malformed_request_gets_further_than_it_should() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 1s, body_timeout: 1s, keep_alive: 1s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let addr = gateway.addr;
    let mut all = Payloads::default();
    for add in [versions, line_ends, fields, targets] {
        add(&mut all);
    }
    let count = all.len();
    assert!(count >= 140, "{count}");
    let (mut wrong, mut meant_to_come) = (Vec::new(), 0);
    for outcome in send_all(addr, &sim, all).await {
        let answers = outcome.answers();
        let is_local = outcome.name.starts_with("GET /");
        let served = answers
            .first()
            .is_some_and(|answer| answer.starts_with("200"));
        let good = match outcome.fate {
            Refused => outcome.meant == 0 && (is_local || !served),
            Meant => outcome.meant == 1 && served && answers.len() == 1,
            Either => outcome.meant == usize::from(served) && answers.len() <= 1,
        };
        meant_to_come += outcome.meant;
        if !good || outcome.hidden || !outcome.is_sane() {
            wrong.push(outcome.to_string());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let records = sim.records();
    // What upstreams list is asked for by us.
    let (calls, lists): (Vec<_>, Vec<_>) = records
        .into_iter()
        .partition(|record| record.target() == CHAT);
    assert!(lists.iter().all(|record| record.target() == "/v1/models"));
    assert_eq!(calls.len(), meant_to_come, "only what was meant came");
    for record in calls {
        let head = String::from_utf8_lossy(&record.head).into_owned();
        assert!(
            head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"),
            "{head:?}"
        );
        assert_eq!(head.matches('\n').count(), head.matches("\r\n").count());
        assert!(head.is_ascii(), "{head:?}");
    }
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn a_hundred_requests_at_once_are_answered_in_order() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let mut all = Vec::new();
    for number in 0..100 {
        let id = format!("nr-{number}");
        let body = chat("demo");
        let fields = [("x-request-id", id.as_str())];
        all.extend(crate::support::http::build(
            "POST",
            CHAT,
            &fields,
            body.as_bytes(),
        ));
    }
    let mut connection = Connection::open(gateway.addr).await;
    connection.send(&all).await;
    for number in 0..100 {
        let answer = connection.answer().await;
        assert_eq!(answer.status, 200);
        assert_eq!(
            answer.header("x-request-id"),
            Some(&*format!("nr-{number}"))
        );
    }
    assert_eq!(sim.records().len(), 100);
    // A limit holds for each of them, and ends the row.
    let mut row = crate::support::http::build("POST", CHAT, &[], chat("demo").as_bytes());
    let long = "v".repeat(40_000);
    let fields = [("x-long", long.as_str())];
    row.extend(crate::support::http::build(
        "POST",
        CHAT,
        &fields,
        chat("demo").as_bytes(),
    ));
    row.extend(crate::support::http::build(
        "POST",
        CHAT,
        &[],
        chat("demo").as_bytes(),
    ));
    let mut connection = Connection::open(gateway.addr).await;
    connection.try_send(&row).await;
    assert_eq!(connection.answer().await.status, 200);
    assert_eq!(connection.answer().await.status, 431);
    assert!(connection.rest().await.is_empty());
    assert_eq!(sim.records().len(), 101);
}
