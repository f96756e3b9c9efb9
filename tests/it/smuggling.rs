//! One request must never be taken for two, nor hide another: whatever a client
//! does with `Content-Length`, `Transfer-Encoding`, chunks and line ends, the
//! upstream sees nothing, or exactly the request that was meant.

use std::time::Duration;

use crate::support::{
    Connection, Gateway, one_group,
    payloads::{
        CHAT,
        Fate::{self, Either, Meant, Refused},
        Payloads, is_unharmed, send_all,
    },
    sim,
};

/// Adds a chat request with these fields and this body.
fn add(all: &mut Payloads, fate: Fate, name: &str, fields: &[u8], body: &[u8]) {
    let line = format!("POST {CHAT} HTTP/1.1\r\n");
    let bytes = [line.as_bytes(), b"Host: a\r\n", fields, b"\r\n", body].concat();
    all.raw(fate, name, &bytes);
}

fn chunks(body: &str) -> Vec<u8> {
    format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).into_bytes()
}

/// `Content-Length` and `Transfer-Encoding` that contradict each other.
fn contradictions(all: &mut Payloads) {
    // Chunked counts, the connection is closed, what follows is nothing.
    for (name, te, cl) in [
        ("CL then TE", "Transfer-Encoding: chunked\r\n", ""),
        ("TE in capitals", "TRANSFER-ENCODING: CHUNKED\r\n", ""),
        (
            "TE twice chunked, in one CL",
            "",
            "Transfer-Encoding: chunked\r\n",
        ),
    ] {
        let (meant, hidden) = (all.meant(), all.hidden());
        let body = [chunks(&meant), hidden].concat();
        for length in [0, 4, meant.len(), body.len()] {
            let (meant, hidden) = (all.meant(), all.hidden());
            let body = [chunks(&meant), hidden].concat();
            let fields = format!("{te}Content-Length: {length}\r\n{cl}");
            add(
                all,
                Meant,
                &format!("{name}, length {length}"),
                fields.as_bytes(),
                &body,
            );
        }
    }
    // A body of no chunks but an end: nothing is meant, the rest is nothing.
    let hidden = all.hidden();
    let body = [b"0\r\n\r\n".as_slice(), &hidden].concat();
    let fields = format!(
        "Content-Length: {}\r\nTransfer-Encoding: chunked\r\n",
        body.len()
    );
    add(all, Refused, "CL.TE", fields.as_bytes(), &body);
    // The hidden request inside the chunks, a length that ends before it.
    let hidden = all.hidden();
    let inside = [
        format!("{:x}\r\n", hidden.len()).as_bytes(),
        &hidden,
        b"\r\n0\r\n\r\n",
    ]
    .concat();
    add(
        all,
        Refused,
        "TE.CL",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        &inside,
    );
}

/// Codings that one reader takes for chunked and another does not.
fn codings(all: &mut Payloads) {
    let codings: [&[u8]; 30] = [
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunkedx",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding\t: chunked",
        b" Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: chunked, gzip",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: chunked;q=1",
        b"Transfer-Encoding: \"chunked\"",
        b"Transfer-Encoding: 'chunked'",
        b"Transfer-Encoding: chunked\0",
        b"Transfer-Encoding: \0chunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding: chunked\x0b",
        b"Transfer-Encoding: \x0cchunked",
        b"Transfer-Encoding: chunk\xc3\xa9d",
        b"Transfer-Encoding: chun\rked",
        b"Transfer-Encoding: x\r\n chunked",
        b"Transfer-Encoding:\r\n chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: ",
        b"Transfer-Encoding:",
        b"Transfer_Encoding: chunked",
        b"Transfer\x20Encoding: chunked",
        b"X: y\rTransfer-Encoding: chunked",
        b"X: y\0Transfer-Encoding: chunked",
        b"Transfer-Encoding: , ,",
    ];
    for coding in codings {
        let name = String::from_utf8_lossy(coding).into_owned();
        let (meant, hidden) = (all.meant(), all.hidden());
        let body = [chunks(&meant), hidden].concat();
        let fields = [
            coding,
            format!("\r\nContent-Length: {}\r\n", body.len()).as_bytes(),
        ]
        .concat();
        add(all, Refused, &name, &fields, &body);
        // The same with the end first: whoever reads chunks sees nothing, whoever
        // reads the length sees no JSON.
        let hidden = all.hidden();
        let body = [b"0\r\n\r\n".as_slice(), &hidden].concat();
        let fields = [
            format!("Content-Length: {}\r\n", body.len()).as_bytes(),
            coding,
            b"\r\n",
        ]
        .concat();
        add(all, Refused, &name, &fields, &body);
    }
    for coding in [
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding: chunked,",
        "Transfer-Encoding:chunked",
        "Transfer-Encoding: \t chunked \t",
        "transfer-encoding: Chunked",
        "Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    ] {
        let meant = all.meant();
        let body = chunks(&meant);
        add(
            all,
            Either,
            coding,
            format!("{coding}\r\n").as_bytes(),
            &body,
        );
    }
}

/// Lengths that are no number, or more than one.
fn lengths(all: &mut Payloads) {
    let whole = |all: &Payloads| [all.meant().into_bytes(), all.hidden()].concat();
    for length in [
        "+N",
        "-N",
        "-1",
        "0xN",
        "0xff",
        "N.0",
        "Ne0",
        "N N",
        "N;N",
        "N\tN",
        "\"N\"",
        "N,M",
        "N, M",
        "N,",
        ",N",
        "N\0",
        "\0N",
        "N\x0b",
        "",
        " ",
        "18446744073709551616",
        "99999999999999999999999999999999",
        "N\r\nContent-Length: M",
        "M\r\nContent-Length: N",
        "N\r\nContent-Length: x",
        "x\r\nContent-Length: N",
        "N\r\n N",
        "N\r\nContent-Length: ",
        "N\rContent-Length: M",
        "N_0",
        "0N\r\nContent-Length: M",
    ] {
        let (n, m) = (
            all.meant().len().to_string(),
            (all.meant().len() + all.hidden().len()).to_string(),
        );
        let value = length
            .replace('N', &n)
            .replace('M', &m)
            .replace(&format!("Co{n}tent"), "Content");
        let body = whole(all);
        let fields = format!("Content-Length: {value}\r\n");
        let fate = if matches!(length, "" | " ") {
            Either
        } else {
            Refused
        };
        add(
            all,
            fate,
            &format!("length {length:?}"),
            fields.as_bytes(),
            &body,
        );
    }
    for name in [
        "Content-Length ",
        "Content-Length\t",
        " Content-Length",
        "Content\0-Length",
        "Content-Length\x0b",
    ] {
        let body = whole(all);
        let fields = format!("{name}: {}\r\n", body.len());
        add(
            all,
            Refused,
            &format!("field {name:?}"),
            fields.as_bytes(),
            &body,
        );
    }
    // The same length said twice is one length; the connection may go on, so
    // nothing follows here.
    for value in [
        "N\r\nContent-Length: N",
        "N, N",
        "0N",
        "000N",
        " N ",
        "\tN\t",
    ] {
        let meant = all.meant();
        let value = value
            .replace("Content", "C")
            .replace('N', &meant.len().to_string())
            .replace("\r\nC-", "\r\nContent-");
        let fields = format!("Content-Length: {value}\r\nConnection: close\r\n");
        add(
            all,
            Either,
            &format!("length {value:?}"),
            fields.as_bytes(),
            meant.as_bytes(),
        );
    }
    // No length and no coding: there is no body, and what follows is no body.
    let body = [all.meant().into_bytes(), b"\r\n\r\n".to_vec()].concat();
    add(all, Refused, "no length", b"", &body);
}

/// Chunk framing that two readers could read apart.
fn framing(all: &mut Payloads) {
    let te = b"Transfer-Encoding: chunked\r\n";
    for (name, size, after) in [
        ("a hexadecimal prefix", "0xS\r\n", "\r\n0\r\n\r\n"),
        ("a plus", "+S\r\n", "\r\n0\r\n\r\n"),
        ("a minus", "-S\r\n", "\r\n0\r\n\r\n"),
        ("a size of no digits", "\r\n", "\r\n0\r\n\r\n"),
        ("a size of letters", "zz\r\n", "\r\n0\r\n\r\n"),
        (
            "a size beyond 64 bits",
            "fffffffffffffffff\r\n",
            "\r\n0\r\n\r\n",
        ),
        ("the largest size", "ffffffffffffffff\r\n", "\r\n0\r\n\r\n"),
        ("a negative size", "8000000000000000\r\n", "\r\n0\r\n\r\n"),
        (
            "an overflow to the size",
            "10000000000000040\r\n",
            "\r\n0\r\n\r\n",
        ),
        ("an underscore", "0_S\r\n", "\r\n0\r\n\r\n"),
        ("no line end after the data", "S\r\n", "0\r\n\r\n"),
        ("something after the data", "S\r\n", "xx\r\n0\r\n\r\n"),
        (
            "a carriage return alone after the size",
            "S\r",
            "\r\n0\r\n\r\n",
        ),
        ("a NUL after the size", "S\0\r\n", "\r\n0\r\n\r\n"),
        (
            "a vertical tab after the size",
            "S\x0b\r\n",
            "\r\n0\r\n\r\n",
        ),
    ] {
        let meant = all.meant();
        let size = size.replace('S', &format!("{:x}", meant.len()));
        let body = [format!("{size}{meant}{after}").into_bytes(), all.hidden()].concat();
        add(all, Refused, name, te, &body);
    }
    // What RFC 9112 allows, or what harms nobody: then it is the one request,
    // and the connection is closed on request.
    for (name, size, after) in [
        ("an extension", "S;a=b\r\n", "\r\n0\r\n\r\n"),
        ("a quoted extension", "S;a=\"b\"\r\n", "\r\n0\r\n\r\n"),
        (
            "an extension with a line feed",
            "S;a\n\r\n",
            "\r\n0\r\n\r\n",
        ),
        ("a space after the size", "S \r\n", "\r\n0\r\n\r\n"),
        ("a space before the size", " S\r\n", "\r\n0\r\n\r\n"),
        ("leading zeros", "0000S\r\n", "\r\n0\r\n\r\n"),
        ("line feeds alone", "S\n", "\n0\n\n"),
        ("a line feed after the size", "S\n", "\r\n0\r\n\r\n"),
        (
            "trailers",
            "S\r\n",
            "\r\n0\r\nContent-Length: 5\r\nAuthorization: x\r\nHost: b\r\n\r\n",
        ),
        (
            "a trailer that is none",
            "S\r\n",
            "\r\n0\r\nnonsense\r\n\r\n",
        ),
        ("several zeros at the end", "S\r\n", "\r\n00000\r\n\r\n"),
    ] {
        let meant = all.meant();
        let size = size.replace('S', &format!("{:x}", meant.len()));
        let fields = [te.as_slice(), b"Connection: close\r\n"].concat();
        let body = [format!("{size}{meant}{after}").into_bytes(), all.hidden()].concat();
        add(all, Either, name, &fields, &body);
    }
    let meant = all.meant();
    let long = format!(
        "{:x};{}\r\n{meant}\r\n0\r\n\r\n",
        meant.len(),
        "x".repeat(100_000)
    );
    add(all, Refused, "an extension of 100 KB", te, long.as_bytes());
}

/// Header fields and lines that are none.
fn lines(all: &mut Payloads) {
    let fields: [&[u8]; 16] = [
        b"X : y",
        b"X\t: y",
        b" X: y",
        b": y",
        b"no colon",
        b"X: a\r b",
        b"X: a\0b",
        b"X\0: b",
        b"X: a\r\n folded",
        b"X: a\r\n\tfolded",
        b"X[]: y",
        b"X(y): z",
        b"X,Y: z",
        b"\"X\": z",
        b"X\xe9: z",
        b"X: a\rPOST /v1/chat/completions HTTP/1.1",
    ];
    for field in fields {
        let name = String::from_utf8_lossy(field).into_owned();
        let meant = all.meant();
        let fields = [
            field,
            format!("\r\nContent-Length: {}\r\n", meant.len()).as_bytes(),
        ]
        .concat();
        let body = [meant.into_bytes(), all.hidden()].concat();
        add(all, Refused, &name, &fields, &body);
    }
    for (name, version) in [
        ("1.0", "HTTP/1.0"),
        ("1.2", "HTTP/1.2"),
        ("0.9", "HTTP/0.9"),
        ("2.0", "HTTP/2.0"),
    ] {
        let body = [chunks(&all.meant()), all.hidden()].concat();
        let head =
            format!("POST {CHAT} {version}\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        all.raw(
            Refused,
            format!("chunks in {name}"),
            &[head.as_bytes(), &body].concat(),
        );
    }
    // HTTP/1.0 with a length is closed after its answer.
    let meant = all.meant();
    let head = format!(
        "POST {CHAT} HTTP/1.0\r\nHost: a\r\nContent-Length: {}\r\n\r\n{meant}",
        meant.len()
    );
    let bytes = [head.as_bytes(), &all.hidden()].concat();
    all.raw(Meant, "1.0 with more behind", &bytes);
    // Lines ended by LF alone are read as lines, by everybody alike: what goes
    // upstream is written anew.
    let meant = all.meant();
    let head = format!(
        "POST {CHAT} HTTP/1.1\nHost: a\nConnection: close\nContent-Length: {}\n\n{meant}",
        meant.len()
    );
    let bytes = [head.as_bytes(), &all.hidden()].concat();
    all.raw(Either, "LF alone", &bytes);
    for (name, line) in [
        ("a space too many", format!("POST  {CHAT} HTTP/1.1")),
        ("a tab for a space", format!("POST\t{CHAT}\tHTTP/1.1")),
        (
            "a space inside the target",
            format!("POST {CHAT} x HTTP/1.1"),
        ),
        (
            "a request line inside the target",
            format!("POST {CHAT}\rHTTP/1.1\rX: HTTP/1.1"),
        ),
        (
            "a space behind the version",
            format!("POST {CHAT} HTTP/1.1 "),
        ),
        (
            "a space before the method",
            format!(" POST {CHAT} HTTP/1.1"),
        ),
        ("no version", format!("POST {CHAT}")),
        ("a NUL in the method", format!("PO\0ST {CHAT} HTTP/1.1")),
    ] {
        let meant = all.meant();
        let head = format!(
            "{line}\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{meant}",
            meant.len()
        );
        let bytes = [head.as_bytes(), &all.hidden()].concat();
        all.raw(Either, name, &bytes);
    }
}

#[tokio::test]
async fn no_payload_makes_two_requests_of_one() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { header_timeout: 1s, body_timeout: 1s, keep_alive: 1s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let mut all = Payloads::default();
    for collect in [contradictions, codings, lengths, framing, lines] {
        collect(&mut all);
    }
    assert!(all.len() > 150, "{}", all.len());
    let (mut wrong, mut answered) = (Vec::new(), 0);
    for outcome in send_all(gateway.addr, &sim, all).await {
        let (meant, said) = (outcome.meant, &outcome.said);
        // A 100 counts too: nothing here asks for one and is meant.
        let answers = said.matches("HTTP/1.1 ").count();
        let good = match outcome.fate {
            Refused => meant == 0 && !said.contains("HTTP/1.1 200 "),
            Meant => meant == 1 && said.starts_with("HTTP/1.1 200 ") && answers == 1,
            Either => meant <= 1,
        };
        answered += usize::from(answers > 0);
        if !good || outcome.hidden || !outcome.is_sane() {
            wrong.push(outcome.to_string());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(answered > 150, "only {answered} payloads got any answer");
    for record in sim.records() {
        let head = String::from_utf8_lossy(&record.head).into_owned();
        assert_eq!(record.target(), CHAT);
        assert_eq!(
            head.matches('\n').count(),
            head.matches("\r\n").count(),
            "{head:?}"
        );
        for field in ["transfer-encoding", "x", "expect", "trailer"] {
            assert_eq!(record.header(field), None, "{head:?}");
        }
        assert_eq!(head.to_lowercase().matches("content-length:").count(), 1);
    }
    is_unharmed(&gateway).await;
}

#[tokio::test]
async fn content_length_with_chunks_is_answered_once_and_closed() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let all = Payloads::default();
    let body = [chunks(&all.meant()), all.hidden()].concat();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n",
        body.len()
    );
    let mut connection = Connection::open(gateway.addr).await;
    connection.send(&[head.as_bytes(), &body].concat()).await;
    let answer = connection.answer().await;
    assert_eq!(
        (answer.status, answer.header("connection")),
        (200, Some("close"))
    );
    assert!(connection.rest().await.is_empty());
    let records = sim.records();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].body, all.meant());
    assert_eq!(
        records[0].header("content-length"),
        Some(all.meant().len().to_string())
    );
    assert_eq!(records[0].header("transfer-encoding"), None);
}

#[tokio::test]
async fn what_a_client_says_of_its_connection_changes_nothing_upstream() {
    let sim = sim("gpu-1").await;
    let yaml = one_group(&[&sim]).replace(
        "kind: vllm,",
        "kind: vllm, key: \"env:FOREBAY_TEST_KEY\", headers: { x-team: ours },",
    );
    let gateway = Gateway::start_with(&yaml, &[], &[("FOREBAY_TEST_KEY", "upstream-key")]).await;
    let fields = [
        (
            "connection",
            "keep-alive, authorization, x-team, host, content-length, x-request-id",
        ),
        ("authorization", "Bearer client-key"),
        ("x-api-key", "client-key"),
        ("cookie", "client-cookie"),
        ("x-team", "theirs"),
        ("x_team", "theirs"),
        ("x-forwarded-for", "10.9.8.7"),
        ("x-real-ip", "10.9.8.7"),
        ("forwarded", "for=10.9.8.7"),
        ("via", "1.1 client-proxy"),
        ("te", "trailers"),
        ("trailer", "authorization"),
        ("proxy-authorization", "Basic client-key"),
        ("x-http-method-override", "DELETE"),
        ("x-original-url", "/client-path"),
    ];
    let mut connection = Connection::open(gateway.addr).await;
    let body = crate::support::chat("demo");
    connection
        .request("POST", CHAT, &fields, body.as_bytes())
        .await;
    assert_eq!(connection.answer().await.status, 200);
    let record = sim.records().pop().unwrap();
    let head = String::from_utf8_lossy(&record.head).into_owned();
    assert_eq!(
        record.header("authorization").as_deref(),
        Some("Bearer upstream-key")
    );
    assert_eq!(record.header("x-team").as_deref(), Some("ours"));
    assert_eq!(
        record.header("content-length"),
        Some(body.len().to_string())
    );
    for leak in ["client-", "theirs", "10.9.8.7", "DELETE", "trailer"] {
        assert!(!head.contains(leak), "{leak}: {head}");
    }
}

#[tokio::test]
async fn an_answer_before_the_body_leaves_nothing_to_be_read_as_a_request() {
    let sim = sim("gpu-1").await;
    let limits = "limits: { body: 1KiB, body_timeout: 1s }\n";
    let gateway = Gateway::start(&format!("{limits}{}", one_group(&[&sim]))).await;
    let all = Payloads::default();
    let hidden = all.hidden().repeat(20);
    for framing in [
        format!("Content-Length: {}", hidden.len()),
        format!("Expect: 100-continue\r\nContent-Length: {}", hidden.len()),
        "Expect: something\r\nContent-Length: 10".to_owned(),
    ] {
        let head = format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n");
        let mut connection = Connection::open(gateway.addr).await;
        connection.send(&[head.as_bytes(), &hidden].concat()).await;
        let answer = connection.answer().await;
        assert!(matches!(answer.status, 413 | 417), "{framing}");
        assert_eq!(answer.header("connection"), Some("close"));
        assert!(connection.rest().await.is_empty());
    }
    assert!(sim.records().is_empty());
    gateway
        .metric_becomes("forebay_requests_in_flight", 0.0)
        .await;
}

#[tokio::test]
async fn a_request_split_at_any_byte_is_the_same_request() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let all = Payloads::default();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    let request = [head.as_bytes(), &chunks(&all.meant())].concat();
    let mut connection = Connection::open(gateway.addr).await;
    for at in 1..request.len() {
        let (first, second) = request.split_at(at);
        connection.send(first).await;
        connection.stays_open(Duration::from_micros(100)).await;
        connection.send(second).await;
        assert_eq!(connection.answer().await.status, 200, "split at {at}");
    }
    let records = sim.records();
    assert_eq!(records.len(), request.len() - 1);
    assert!(records.iter().all(|record| record.body == all.meant()));
}
