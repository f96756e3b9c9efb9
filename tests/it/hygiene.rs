//! What is said about a client stays with us, and what an upstream says about
//! itself does too; proved by every byte that passed.

use std::collections::BTreeSet;

use forebay::sim::Sim;

use crate::support::{
    Answer, Connection, Gateway, Scripted, chat, chat_stream,
    frames::{
        CHAT as CHAT_FIELDS, DATA, END_HEADERS, END_STREAM, Field, Frames, HEADERS, block, frame,
    },
    http::{build, post_chat},
    one_group,
    scripted::answer,
    sim,
};

const CHAT: &str = "/v1/chat/completions";

/// What a client may say about itself, with a canary in every value.
const ABOUT_THE_CLIENT: [(&str, &str); 38] = [
    ("authorization", "Bearer canary"),
    ("x-api-key", "canary"),
    ("api-key", "canary"),
    ("proxy-authorization", "Basic canary"),
    ("cookie", "session=canary"),
    ("set-cookie", "session=canary"),
    ("x-forwarded-for", "198.51.100.7, canary"),
    ("x-forwarded-host", "canary"),
    ("x-forwarded-proto", "canary"),
    ("x-forwarded-port", "canary"),
    ("x-forwarded-prefix", "/canary"),
    ("x-forwarded-user", "canary"),
    ("x-forwarded-client-cert", "canary"),
    ("forwarded", "for=198.51.100.7;by=canary"),
    ("via", "1.1 canary"),
    ("x-real-ip", "198.51.100.7"),
    ("x-client-ip", "198.51.100.7"),
    ("true-client-ip", "198.51.100.7"),
    ("cf-connecting-ip", "198.51.100.7"),
    ("x-cluster-client-ip", "198.51.100.7"),
    ("x-forebay-user", "canary"),
    ("x-forebay-group", "canary"),
    ("x_forwarded_for", "198.51.100.7"),
    ("x_api_key", "canary"),
    ("x-remote-user", "canary"),
    ("x-auth-request-email", "canary@example.org"),
    ("openai-organization", "canary"),
    ("openai-project", "canary"),
    ("user-agent", "canary/1"),
    ("referer", "http://canary/"),
    ("origin", "http://canary"),
    ("from", "canary@example.org"),
    ("x-stainless-os", "canary"),
    ("x-http-method-override", "canary"),
    ("x-original-url", "/canary"),
    ("x-rewrite-url", "/canary"),
    ("traceparent", "00-canary"),
    ("baggage", "user=canary"),
];

/// The fields that an upstream without a key may get, and no others.
const TO_UPSTREAMS: [&str; 7] = [
    "host",
    "user-agent",
    "accept-encoding",
    "accept",
    "content-type",
    "content-length",
    "x-request-id",
];

fn field_names(head: &[u8]) -> Vec<String> {
    let head = String::from_utf8_lossy(head).into_owned();
    let lines = head.split("\r\n").skip(1).filter(|line| !line.is_empty());
    lines
        .map(|line| line.split(':').next().unwrap().to_lowercase())
        .collect()
}

fn nothing_of_the_client(sim: &Sim, requests: usize) {
    let records = sim.records();
    assert_eq!(records.len(), requests);
    for record in records {
        let raw = String::from_utf8_lossy(&record.raw()).into_owned();
        for leak in ["canary", "198.51.100.7", "127.0.0.1, ", "x-forwarded"] {
            assert!(!raw.to_lowercase().contains(leak), "{leak}: {raw}");
        }
        let names = field_names(&record.head);
        let once: BTreeSet<_> = names.iter().collect();
        assert_eq!(once.len(), names.len(), "{names:?}");
        for name in &names {
            assert!(TO_UPSTREAMS.contains(&name.as_str()), "{name} in {raw}");
        }
    }
}

#[tokio::test]
async fn nothing_that_a_client_says_of_itself_goes_upstream() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    for body in [chat("demo"), chat_stream("demo")] {
        let mut connection = Connection::open(gateway.addr).await;
        let sent = build("POST", CHAT, &ABOUT_THE_CLIENT, body.as_bytes());
        connection.send(&sent).await;
        assert_eq!(connection.answer().await.status, 200);
    }
    nothing_of_the_client(&sim, 2);
    let mut fields: Vec<Field<'_>> = CHAT_FIELDS.to_vec();
    let about = ABOUT_THE_CLIENT.iter();
    fields.extend(about.map(|(name, value)| (name.as_bytes(), value.as_bytes())));
    let mut connection = Frames::open(gateway.addr, &[]).await;
    let frames = [
        frame(HEADERS, END_HEADERS, 1, &block(&fields)),
        frame(DATA, END_STREAM, 1, chat("demo").as_bytes()),
    ];
    connection.send(&frames.concat()).await;
    assert!(connection.answer().await);
    nothing_of_the_client(&sim, 3);
}

#[tokio::test]
async fn a_client_cannot_name_the_fields_that_we_add_as_the_connections() {
    let sim = sim("gpu-1").await;
    let yaml = one_group(&[&sim]).replace(
        "kind: vllm,",
        "kind: vllm, key: \"env:FOREBAY_TEST_KEY\", headers: { x-team: ours },",
    );
    let gateway = Gateway::start_with(&yaml, &[], &[("FOREBAY_TEST_KEY", "upstream-key")]).await;
    for nominated in [
        "authorization, x-team",
        "close, authorization",
        "Authorization,X-Team,Host,Content-Length,Content-Type,Accept",
        "x-request-id",
        "te, trailer, upgrade, transfer-encoding",
    ] {
        sim.clear_records();
        let fields = [
            ("connection", nominated),
            ("authorization", "Bearer theirs"),
        ];
        let mut connection = Connection::open(gateway.addr).await;
        let body = chat("demo");
        connection
            .request("POST", CHAT, &fields, body.as_bytes())
            .await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 200, "{nominated}");
        assert!(answer.header("x-request-id").is_some());
        let record = sim.records().pop().unwrap();
        let key = record.header("authorization");
        assert_eq!(key.as_deref(), Some("Bearer upstream-key"), "{nominated}");
        assert_eq!(record.header("x-team").as_deref(), Some("ours"));
        assert_eq!(record.header("connection"), None);
        let length = record.header("content-length");
        assert_eq!(length, Some(body.len().to_string()));
    }
}

#[tokio::test]
async fn no_upgrade_is_ever_made_and_what_follows_one_is_no_request() {
    let sim = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&sim])).await;
    let settings = "AAMAAABkAAQCAAAAAAIAAAAA";
    for (connection_is, upgrade) in [
        ("upgrade", "foo"),
        ("Upgrade", "websocket"),
        ("Upgrade, HTTP2-Settings", "h2c"),
        ("upgrade", "HTTP/2.0, websocket"),
        ("upgrade", "TLS/1.0"),
    ] {
        sim.clear_records();
        let fields = [
            ("connection", connection_is),
            ("upgrade", upgrade),
            ("http2-settings", settings),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-version", "13"),
        ];
        let body = chat("demo");
        let first = build("POST", CHAT, &fields, body.as_bytes());
        let hidden = chat("demo").replace("Hello", "behind the upgrade");
        let second = build("POST", CHAT, &[("connection", "close")], hidden.as_bytes());
        let mut connection = Connection::open(gateway.addr).await;
        connection.send(&[first, second].concat()).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 200, "{upgrade}");
        for field in ["upgrade", "sec-websocket-accept"] {
            assert_eq!(answer.header(field), None, "{upgrade}");
        }
        // The second is a request of its own, or none.
        let rest = connection.rest().await;
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 200 "));
        let records = sim.records();
        assert_eq!(records.len(), 1 + usize::from(!rest.is_empty()));
        for record in &records {
            let raw = String::from_utf8_lossy(&record.raw()).to_lowercase();
            for leak in ["upgrade:", "http2-settings", "websocket", "connection:"] {
                assert!(!raw.contains(leak), "{leak}: {raw}");
            }
            assert_eq!(raw.matches("post ").count(), 1, "{raw}");
        }
    }
}

/// What an upstream may say about itself, with a canary in every value.
const ABOUT_THE_UPSTREAM: [(&str, &str); 30] = [
    ("set-cookie", "session=canary"),
    ("set-cookie2", "session=canary"),
    ("server", "canary"),
    ("x-powered-by", "canary"),
    ("via", "1.1 canary"),
    ("x-vllm-version", "canary"),
    ("x-vllm-request-id", "canary"),
    ("openai-organization", "canary"),
    ("openai-project", "canary"),
    ("openai-processing-ms", "canary"),
    ("x-accel-redirect", "/canary"),
    ("x-accel-expires", "canary"),
    ("x-sendfile", "/canary"),
    ("x-request-id", "canary"),
    ("cf-ray", "canary"),
    ("x-envoy-upstream-service-time", "canary"),
    ("proxy-authenticate", "Basic realm=canary"),
    ("www-authenticate", "Basic realm=canary"),
    ("keep-alive", "timeout=canary"),
    ("trailer", "canary"),
    ("upgrade", "canary"),
    ("location", "http://canary/"),
    ("refresh", "0; url=http://canary/"),
    ("link", "<http://canary/>; rel=preload"),
    ("alt-svc", "h3=\"canary:443\""),
    ("strict-transport-security", "max-age=canary"),
    ("access-control-allow-origin", "canary"),
    ("x-forebay-upstream", "canary"),
    ("x-amzn-requestid", "canary"),
    ("report-to", "canary"),
];

fn nothing_of_the_upstream(what: &str, answer: &Answer) {
    for (name, value) in &answer.headers {
        assert!(!value.contains("canary"), "{what}: {name}: {value}");
    }
    for name in ["server", "set-cookie", "keep-alive", "trailer", "upgrade"] {
        assert_eq!(answer.header(name), None, "{what}: {name}");
    }
}

#[tokio::test]
async fn nothing_that_an_upstream_says_of_itself_reaches_a_client() {
    let whole = r#"{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}]}"#;
    let stream = concat!(
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hi\"}}]}\n\n",
        "data: [DONE]\n\n"
    );
    let refused = r#"{"error":{"message":"no","type":"invalid_request_error"}}"#;
    for (what, status, kind, said, body) in [
        (
            "a whole answer",
            200,
            "application/json",
            whole,
            chat("demo"),
        ),
        (
            "a stream",
            200,
            "text/event-stream",
            stream,
            chat_stream("demo"),
        ),
        ("a refusal", 400, "application/json", refused, chat("demo")),
        ("a failure", 503, "application/json", refused, chat("demo")),
    ] {
        let mut fields = ABOUT_THE_UPSTREAM.to_vec();
        fields.push(("content-type", kind));
        let upstream = Scripted::always(answer(status, &fields, said)).await;
        let yaml = crate::support::by_hand::group_of(&upstream.url());
        let gateway = Gateway::start(&yaml).await;
        let answer = post_chat(gateway.addr, &body).await;
        let expected = if status == 503 { 502 } else { status };
        assert_eq!(answer.status, expected, "{what}");
        nothing_of_the_upstream(what, &answer);
    }
}
