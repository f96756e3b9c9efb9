//! What bad input gets: a 4xx in OpenAI's shape with a request id, a connection
//! in a defined state, and no byte to an upstream.

use std::time::Duration;

use forebay::sim::Sim;
use tokio::time::{Instant, interval};

use crate::support::{Answer, Connection, Gateway, chat, chat_stream, http::build, sim, soon};

const CHAT: &str = "/v1/chat/completions";
const IN_FLIGHT: &str = "forebay_requests_in_flight";

/// A gateway that knows the model `demo` alone, in front of one upstream.
struct House {
    gateway: Gateway,
    sim: Sim,
}

impl House {
    async fn new(limits: &str) -> Self {
        let sim = sim("gpu-1").await;
        let yaml = format!(
            "limits: {{ {limits} }}\n\
             groups:\n  gpus:\n    local: true\n    upstreams:\n\
             \x20     - {{ name: gpu-1, kind: vllm, url: \"{}\" }}\n\
             routes:\n  - {{ model: demo, groups: [gpus] }}\n",
            sim.url()
        );
        Self {
            gateway: Gateway::start(&yaml).await,
            sim,
        }
    }

    async fn connect(&self) -> Connection {
        Connection::open(self.gateway.addr).await
    }

    /// Sends bytes on a connection of their own and reads the answer.
    async fn ask(&self, bytes: &[u8]) -> (Answer, Connection) {
        let mut connection = self.connect().await;
        connection.send(bytes).await;
        let answer = connection.answer().await;
        (answer, connection)
    }

    /// Checks that the upstream saw nothing so far, that nothing is left under
    /// way, and that a good request is answered.
    async fn is_unharmed(&self) {
        assert_eq!(paths(&self.sim), Vec::<String>::new());
        self.serves().await;
    }

    async fn serves(&self) {
        let before = self.sim.records().len();
        let mut connection = self.connect().await;
        works(&mut connection).await;
        assert_eq!(self.sim.records().len(), before + 1);
        self.gateway.metric_becomes(IN_FLIGHT, 0.0).await;
        assert_eq!(self.gateway.metric("forebay_panics_total").await, Some(0.0));
    }
}

fn paths(sim: &Sim) -> Vec<String> {
    sim.records()
        .iter()
        .map(|record| record.target().to_owned())
        .collect()
}

/// Checks that a connection takes a good request.
async fn works(connection: &mut Connection) {
    connection
        .request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    let answer = connection.answer().await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// Checks that an answer says that the connection closes, and that it does.
async fn closes(what: &str, answer: &Answer, connection: &mut Connection) {
    assert_eq!(answer.header("connection"), Some("close"), "{what}");
    let rest = connection.rest().await;
    assert!(
        rest.is_empty(),
        "{what}: {:?}",
        String::from_utf8_lossy(&rest)
    );
}

/// Checks status, shape and code of a refusal.
#[track_caller]
fn refused(what: &str, answer: &Answer, status: u16, code: &str) {
    assert!(answer.complete, "{what}");
    assert_eq!(
        answer.status,
        status,
        "{what}: {:?}",
        String::from_utf8_lossy(&answer.body)
    );
    assert_eq!(answer.error_code(), code, "{what}");
    let content_type = answer.header("content-type");
    assert_eq!(content_type, Some("application/json"), "{what}");
}

/// A chat body with further members.
fn with(more: &str) -> Vec<u8> {
    let mut body = chat("demo");
    body.truncate(body.len() - 1);
    format!("{body}{more}}}").into_bytes()
}

fn nested(levels: usize) -> Vec<u8> {
    let (open, close) = ("[".repeat(levels), "]".repeat(levels));
    with(&format!(r#","deep":{open}1{close}"#))
}

/// Bodies that are no request, and the code of each one's 400.
fn bad_bodies() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    const JSON: &str = "invalid_json";
    const TWICE: &str = "duplicate_key";
    const UTF8: &str = "invalid_utf8";
    const VALUE: &str = "invalid_value";
    const MISSING: &str = "missing_required_parameter";
    let utf16: Vec<u8> = chat("demo")
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let mut utf16_with_mark = vec![0xff, 0xfe];
    utf16_with_mark.extend_from_slice(&utf16);
    let mut marked = b"\xef\xbb\xbf".to_vec();
    marked.extend_from_slice(chat("demo").as_bytes());
    let text = |text: &str| text.as_bytes().to_vec();
    let cut = |less: usize| {
        let body = chat("demo");
        body.as_bytes()[..body.len() - less].to_vec()
    };
    let model = |value: &str| {
        text(&format!(
            r#"{{"model":{value},"messages":[{{"role":"user","content":"x"}}]}}"#
        ))
    };
    let messages = |value: &str| text(&format!(r#"{{"model":"demo","messages":{value}}}"#));
    let mut bad_utf8 = with(r#","user":"?""#);
    let at = bad_utf8.iter().position(|byte| *byte == b'?').unwrap();
    bad_utf8[at] = 0xff;
    let mut overlong = with(r#","user":"??""#);
    let at = overlong.iter().position(|byte| *byte == b'?').unwrap();
    overlong[at..at + 2].copy_from_slice(&[0xc0, 0xaf]);
    vec![
        ("empty", Vec::new(), JSON),
        ("spaces", text("  \r\n"), JSON),
        ("cut by one", cut(1), JSON),
        ("cut in a string", cut(6), JSON),
        ("cut in half", cut(30), JSON),
        ("no JSON", text("model=demo&stream=true"), JSON),
        ("an array", text(r#"[{"model":"demo"}]"#), JSON),
        ("a string", text(r#""demo""#), JSON),
        ("a number", text("7"), JSON),
        ("null", text("null"), JSON),
        (
            "two objects",
            text(r#"{"model":"demo"}{"model":"demo"}"#),
            JSON,
        ),
        (
            "something behind",
            [chat("demo").as_bytes(), b"x"].concat(),
            JSON,
        ),
        (
            "a NUL behind",
            [chat("demo").as_bytes(), b"\0"].concat(),
            JSON,
        ),
        ("a comma too many", with(","), JSON),
        ("a comment", with(r#"/* hi */,"n":1"#), JSON),
        (
            "single quotes",
            text("{'model':'demo','messages':[]}"),
            JSON,
        ),
        ("NaN", with(r#","temperature":NaN"#), JSON),
        ("Infinity", with(r#","temperature":Infinity"#), JSON),
        ("-Infinity", with(r#","temperature":-Infinity"#), JSON),
        ("1e400", with(r#","temperature":1e400"#), JSON),
        ("-1e400 deep inside", with(r#","x":{"y":[-1e400]}"#), JSON),
        ("a plus sign", with(r#","n":+1"#), JSON),
        ("a leading zero", with(r#","n":01"#), JSON),
        ("a hexadecimal number", with(r#","n":0x1"#), JSON),
        (
            "a bare line feed in a string",
            with(",\"user\":\"a\nb\""),
            JSON,
        ),
        ("a NUL in a string", with(",\"user\":\"a\0b\""), JSON),
        ("an unknown escape", with(r#","user":"\x41""#), JSON),
        ("a lone high surrogate", with(r#","user":"\ud800""#), JSON),
        ("a lone low surrogate", with(r#","user":"\udc00x""#), JSON),
        (
            "surrogates the wrong way round",
            with(r#","user":"\udc00\ud800""#),
            JSON,
        ),
        ("a lone surrogate in a key", with(r#","\ud800":1"#), JSON),
        ("a byte order mark", marked, JSON),
        ("UTF-16", utf16, JSON),
        ("UTF-16 with a mark", utf16_with_mark, UTF8),
        ("a byte that is never UTF-8", bad_utf8, UTF8),
        ("an overlong slash", overlong, UTF8),
        ("the model twice", with(r#","model":"other""#), TWICE),
        ("the model twice alike", with(r#","model":"demo""#), TWICE),
        (
            "the model twice, once escaped",
            with(r#","\u006dodel":"other""#),
            TWICE,
        ),
        ("an unknown key twice", with(r#","x":1,"x":1"#), TWICE),
        (
            "a key twice inside",
            with(r#","x":{"a":1,"b":2,"a":3}"#),
            TWICE,
        ),
        (
            "a key twice inside, once escaped",
            with(r#","x":[{"a":1,"\u0061":3}]"#),
            TWICE,
        ),
        (
            "a role twice",
            messages(r#"[{"role":"user","content":"x","role":"system"}]"#),
            TWICE,
        ),
        (
            "a key twice at depth 20",
            with(&format!(
                r#","x":{}{{"k":1,"k":2}}{}"#,
                "[".repeat(18),
                "]".repeat(18)
            )),
            TWICE,
        ),
        ("depth 65", nested(64), "json_too_deep"),
        ("depth 5000", nested(4999), "json_too_deep"),
        (
            "no model",
            text(r#"{"messages":[{"role":"user","content":"x"}]}"#),
            MISSING,
        ),
        ("model null", model("null"), MISSING),
        ("model a number", model("7"), VALUE),
        ("model an array", model(r#"["demo"]"#), VALUE),
        ("model an object", model(r#"{"name":"demo"}"#), VALUE),
        ("model true", model("true"), VALUE),
        ("model empty", model(r#""""#), VALUE),
        (
            "model too long",
            model(&format!("\"{}\"", "m".repeat(257))),
            VALUE,
        ),
        ("model with a line end", model(r#""demo\r\nx: y""#), VALUE),
        ("model with a NUL", model(r#""demo\u0000""#), VALUE),
        ("stream a string", with(r#","stream":"true""#), VALUE),
        ("stream a number", with(r#","stream":1"#), VALUE),
        ("stream an object", with(r#","stream":{}"#), VALUE),
        (
            "include_usage a string",
            with(r#","stream":true,"stream_options":{"include_usage":"yes"}"#),
            VALUE,
        ),
        (
            "stream_options an array",
            with(r#","stream":true,"stream_options":[]"#),
            VALUE,
        ),
        ("n zero", with(r#","n":0"#), VALUE),
        ("n negative", with(r#","n":-1"#), VALUE),
        ("n a fraction", with(r#","n":1.5"#), VALUE),
        ("n a string", with(r#","n":"1""#), VALUE),
        ("n true", with(r#","n":true"#), VALUE),
        ("n absurd", with(r#","n":1000000"#), VALUE),
        (
            "n longer than any integer",
            with(r#","n":99999999999999999999999999"#),
            VALUE,
        ),
        ("max_tokens zero", with(r#","max_tokens":0"#), VALUE),
        ("max_tokens negative", with(r#","max_tokens":-5"#), VALUE),
        (
            "max_tokens a string",
            with(r#","max_tokens":"many""#),
            VALUE,
        ),
        (
            "max_tokens a fraction",
            with(r#","max_tokens":10.5"#),
            VALUE,
        ),
        ("max_tokens an array", with(r#","max_tokens":[10]"#), VALUE),
        (
            "max_tokens beyond 64 bits",
            with(r#","max_tokens":18446744073709551617"#),
            VALUE,
        ),
        (
            "max_completion_tokens a string",
            with(r#","max_completion_tokens":"9""#),
            VALUE,
        ),
        ("no messages", text(r#"{"model":"demo"}"#), MISSING),
        ("messages null", messages("null"), MISSING),
        ("messages empty", messages("[]"), VALUE),
        ("messages a string", messages(r#""hi""#), VALUE),
        ("messages an object", messages(r#"{"role":"user"}"#), VALUE),
        ("messages of strings", messages(r#"["hi"]"#), VALUE),
        (
            "messages with a null among them",
            messages(r#"[{"role":"user","content":"x"},null]"#),
            VALUE,
        ),
        (
            "a prompt in place of messages",
            text(r#"{"model":"demo","prompt":"hi"}"#),
            MISSING,
        ),
        (
            "a destination of its own",
            with(r#","api_base":"http://127.0.0.1:1""#),
            "unsupported_parameter",
        ),
    ]
}

#[tokio::test]
async fn a_body_that_is_no_request_gets_a_400_and_the_connection_goes_on() {
    let house = House::new("").await;
    let bodies = bad_bodies();
    assert!(bodies.len() > 75, "{}", bodies.len());
    let mut connection = house.connect().await;
    for (what, body, code) in &bodies {
        connection.request("POST", CHAT, &[], body).await;
        let answer = connection.answer().await;
        refused(what, &answer, 400, code);
        assert_ne!(answer.header("connection"), Some("close"), "{what}");
    }
    assert_eq!(paths(&house.sim), Vec::<String>::new());
    works(&mut connection).await;
    house.serves().await;
}

#[tokio::test]
async fn the_same_body_in_chunks_gets_the_same_400() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    for (what, body, code) in &bad_bodies() {
        let mut request =
            format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
                .into_bytes();
        for piece in body.chunks(17) {
            request.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            request.extend_from_slice(piece);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"0\r\n\r\n");
        connection.send(&request).await;
        refused(what, &connection.answer().await, 400, code);
    }
    assert_eq!(paths(&house.sim), Vec::<String>::new());
    works(&mut connection).await;
}

#[tokio::test]
async fn every_call_refuses_what_it_cannot_read() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    let mut cases = 0;
    for (path, body, param) in [
        ("/v1/completions", r#"{"model":"demo"}"#, "prompt"),
        (
            "/v1/completions",
            r#"{"model":"demo","prompt":7}"#,
            "prompt",
        ),
        ("/v1/embeddings", r#"{"model":"demo"}"#, "input"),
        ("/v1/embeddings", r#"{"model":"demo","input":{}}"#, "input"),
        (
            "/v1/embeddings",
            r#"{"model":"demo","input":"x","stream":true}"#,
            "stream",
        ),
        ("/v1/responses", r#"{"model":"demo"}"#, "input"),
        ("/v1/responses", r#"{"model":"demo","input":7}"#, "input"),
        (
            "/v1/rerank",
            r#"{"model":"demo","documents":["a"]}"#,
            "query",
        ),
        (
            "/v1/rerank",
            r#"{"model":"demo","query":"q","documents":[]}"#,
            "documents",
        ),
        ("/v1/moderations", r#"{"model":"demo"}"#, "input"),
        (
            "/v1/moderations",
            r#"{"model":["demo"],"input":"x"}"#,
            "model",
        ),
    ] {
        connection.request("POST", path, &[], body.as_bytes()).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 400, "{path} {body}");
        answer.error_code();
        assert_eq!(answer.json()["error"]["param"], param, "{path} {body}");
        cases += 1;
    }
    assert_eq!(cases, 11);
    works(&mut connection).await;
    assert_eq!(paths(&house.sim), ["/v1/chat/completions"]);
}

#[tokio::test]
async fn an_unknown_model_is_a_404_that_names_the_param() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    for model in ["nobody", "demo ", "Demo", "demo/../x", "*", "dem\u{43e}"] {
        connection
            .request("POST", CHAT, &[], chat(model).as_bytes())
            .await;
        let answer = connection.answer().await;
        refused(model, &answer, 404, "model_not_found");
        assert_eq!(answer.json()["error"]["param"], "model");
        connection
            .request("POST", CHAT, &[], chat_stream(model).as_bytes())
            .await;
        refused(model, &connection.answer().await, 404, "model_not_found");
    }
    assert_eq!(paths(&house.sim), Vec::<String>::new());
    works(&mut connection).await;
}

#[tokio::test]
async fn what_is_odd_but_good_travels_as_it_came() {
    let house = House::new("").await;
    let bodies = [
        nested(63),
        with(r#","seed":123456789012345678901234567890"#),
        with(r#","temperature":0.10000000000000000000000001"#),
        with(r#","user":"\ud83d\ude00 \u0000 \/","stream":null,"n":null,"max_tokens":null"#),
        with(r#" , "x" : [ 1E+2 , -0.0 , {} ]  "#),
        [b"\r\n\t ".as_slice(), &with(""), b" \n"].concat(),
    ];
    let mut connection = house.connect().await;
    for body in &bodies {
        connection.request("POST", CHAT, &[], body).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let seen = house.sim.records().pop().unwrap();
        assert_eq!(seen.body, *body);
    }
    assert_eq!(house.sim.records().len(), bodies.len());
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_before_it_is_sent() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 33554433\r\n\r\n");
    connection.send(head.as_bytes()).await;
    let answer = connection.answer().await;
    refused("announced", &answer, 413, "body_too_large");
    connection.finish_sending().await;
    closes("announced", &answer, &mut connection).await;
    // A length that no machine word holds is as little a reason to read.
    for length in ["18446744073709551615", "9223372036854775808"] {
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
        let mut connection = house.connect().await;
        connection.send(head.as_bytes()).await;
        let answer = connection.answer().await;
        assert!(matches!(answer.status, 400 | 413), "{}", answer.status);
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_client_that_sends_40_mb_regardless_sees_the_413() {
    let house = House::new("").await;
    let body = vec![b'x'; 40_000_000];
    let mut connection = house.connect().await;
    assert!(
        connection.try_send(&build("POST", CHAT, &[], &body)).await,
        "the sender was cut off"
    );
    let answer = connection.answer().await;
    refused("sent whole", &answer, 413, "body_too_large");
    closes("sent whole", &answer, &mut connection).await;
    house.is_unharmed().await;
}

#[tokio::test]
async fn curl_sees_the_413_of_a_40_mb_upload() {
    let house = House::new("").await;
    let file = house.gateway.folder.path().join("large");
    std::fs::write(&file, vec![b'x'; 40_000_000]).unwrap();
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let mut curl = std::process::Command::new("curl");
        curl.args([
            "-sS",
            "-m",
            "20",
            version,
            "-w",
            "\n%{http_code}",
            "--data-binary",
        ])
        .arg(format!("@{}", file.display()))
        .args(["-H", "content-type: application/json"])
        .arg(format!("http://{}{CHAT}", house.gateway.addr));
        let ran = tokio::task::spawn_blocking(move || curl.output())
            .await
            .unwrap();
        let Ok(curl) = ran else {
            return; // no curl here; the other tests say the same
        };
        let said = String::from_utf8_lossy(&curl.stdout);
        assert!(
            said.ends_with("\n413"),
            "{version}: {said} {}",
            String::from_utf8_lossy(&curl.stderr)
        );
        assert!(said.contains("body_too_large"), "{version}: {said}");
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_body_without_length_is_refused_as_soon_as_it_is_too_long() {
    let house = House::new("body: 64KiB").await;
    let mut connection = house.connect().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n");
    connection.send(head.as_bytes()).await;
    let chunk = [b"1000\r\n".as_slice(), &[b'x'; 0x1000], b"\r\n"].concat();
    for _ in 0..17 {
        connection.send(&chunk).await;
    }
    // The end of the body is not there yet.
    let answer = connection.answer().await;
    refused("chunked", &answer, 413, "body_too_large");
    connection.try_send(b"0\r\n\r\n").await;
    closes("chunked", &answer, &mut connection).await;
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not() {
    let house = House::new("body: 64KiB").await;
    let of_size = |size: usize| {
        let bare = with(r#","user":"""#).len();
        with(&format!(r#","user":"{}""#, "u".repeat(size - bare)))
    };
    let body = of_size(65536);
    let mut connection = house.connect().await;
    connection.request("POST", CHAT, &[], &body).await;
    assert_eq!(connection.answer().await.status, 200);
    let mut chunked =
        format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            .into_bytes();
    for piece in body.chunks(1000) {
        chunked.extend_from_slice(format!("{:X};ext=1\r\n", piece.len()).as_bytes());
        chunked.extend_from_slice(piece);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\nx-trailer: 1\r\n\r\n");
    connection.send(&chunked).await;
    assert_eq!(connection.answer().await.status, 200);
    let seen = house.sim.records();
    assert_eq!(seen.len(), 2);
    for record in seen {
        assert_eq!(record.body, body);
        assert_eq!(record.header("content-length").as_deref(), Some("65536"));
        assert_eq!(record.header("transfer-encoding"), None);
        assert_eq!(record.header("x-trailer"), None);
    }
    connection.request("POST", CHAT, &[], &of_size(65537)).await;
    let answer = connection.answer().await;
    refused("one more", &answer, 413, "body_too_large");
    closes("one more", &answer, &mut connection).await;
    assert_eq!(house.sim.records().len(), 2);
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_it_once() {
    let house = House::new("").await;
    let body = chat("demo");
    let head = |more: &str| {
        format!(
            "POST {CHAT} HTTP/1.1\r\nhost: a\r\n{more}content-length: {}\r\n\r\n",
            body.len()
        )
    };
    let mut connection = house.connect().await;
    connection
        .send(head("Expect: 100-Continue\r\n").as_bytes())
        .await;
    let first = connection.read_until("\r\n\r\n").await;
    assert!(first.starts_with("HTTP/1.1 100 "), "{first}");
    connection.send(body.as_bytes()).await;
    assert_eq!(connection.answer().await.status, 200);
    // The connection stays usable, and nobody else is told to continue.
    connection.send(head("").as_bytes()).await;
    connection.send(body.as_bytes()).await;
    let second = connection.read_until("\r\n\r\n").await;
    assert!(second.starts_with("HTTP/1.1 200 "), "{second}");
    assert!(
        house
            .sim
            .records()
            .iter()
            .all(|record| record.header("expect").is_none())
    );
}

#[tokio::test]
async fn a_client_that_waits_with_too_large_a_body_gets_413_alone() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 40000000\r\n\r\n"
    );
    connection.send(head.as_bytes()).await;
    let said = connection.read_until("body_too_large").await;
    assert!(said.starts_with("HTTP/1.1 413 "), "{said}");
    let answer = connection.answer().await;
    connection.finish_sending().await;
    closes("too large", &answer, &mut connection).await;
    house.is_unharmed().await;
}

#[tokio::test]
async fn an_unknown_expectation_gets_417() {
    let house = House::new("").await;
    for expectation in ["200-ok", "100-continue, fly", "y 100-continue", ""] {
        let fields = [("expect", expectation)];
        let (answer, mut connection) = house
            .ask(&build("POST", CHAT, &fields, chat("demo").as_bytes()))
            .await;
        refused(expectation, &answer, 417, "unknown_expectation");
        closes(expectation, &answer, &mut connection).await;
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_body_that_takes_too_long_gets_408() {
    let house = House::new("body_timeout: 300ms").await;
    // One that stops, one that never begins, and one that drips.
    for (what, first, drips) in [
        ("stops", "{\"model\":", false),
        ("nothing", "", false),
        ("drips", "{", true),
    ] {
        let mut connection = house.connect().await;
        let head =
            format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 10000\r\n\r\n{first}");
        connection.send(head.as_bytes()).await;
        let mut tick = interval(Duration::from_millis(40));
        let answer = soon("an answer", async {
            loop {
                tick.tick().await;
                if drips {
                    connection.try_send(b" ").await;
                }
                if !connection.stays_open(Duration::from_millis(10)).await {
                    return connection.answer().await;
                }
            }
        })
        .await;
        refused(what, &answer, 408, "body_timeout");
        connection.finish_sending().await;
        closes(what, &answer, &mut connection).await;
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_client_that_leaves_inside_its_body_leaves_nothing_behind() {
    let house = House::new("").await;
    for end in ["finish", "reset", "bad chunk"] {
        let mut connection = house.connect().await;
        let framing = if end == "bad chunk" {
            "transfer-encoding: chunked"
        } else {
            "content-length: 10000"
        };
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n");
        connection.send(head.as_bytes()).await;
        house.gateway.metric_becomes(IN_FLIGHT, 1.0).await;
        match end {
            "finish" => connection.finish_sending().await,
            "reset" => {
                connection.reset();
                house.gateway.metric_becomes(IN_FLIGHT, 0.0).await;
                continue;
            }
            _ => connection.send(b"zz\r\nhello\r\n").await,
        }
        connection.rest().await;
        house.gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_header_or_target_out_of_bounds_is_refused_and_the_connection_closed() {
    let house = House::new("").await;
    let field = |bytes: usize| format!("x-long: {}\r\n", "v".repeat(bytes));
    let fields =
        |count: usize| (0..count).fold(String::new(), |all, i| format!("{all}x-{i}: 1\r\n"));
    let mut cases = 0;
    for (what, target, more, status, code) in [
        (
            "33 KB in one field",
            "/v1/models".to_owned(),
            field(33_000),
            431,
            "header_too_large",
        ),
        (
            "33 KB in many fields",
            "/v1/models".to_owned(),
            field(1000).repeat(33),
            431,
            "header_too_large",
        ),
        (
            "500 KB",
            "/v1/models".to_owned(),
            field(500_000),
            431,
            "header_too_large",
        ),
        (
            "101 fields",
            "/v1/models".to_owned(),
            fields(100),
            431,
            "header_too_large",
        ),
        (
            "200 fields",
            "/v1/models".to_owned(),
            fields(199),
            431,
            "header_too_large",
        ),
        (
            "a long path",
            format!("/{}", "a".repeat(8192)),
            String::new(),
            414,
            "uri_too_long",
        ),
        (
            "a long query",
            format!("/v1/models?{}", "a".repeat(8192)),
            String::new(),
            414,
            "uri_too_long",
        ),
        (
            "a path of 60 KB",
            format!("/{}", "a".repeat(60_000)),
            String::new(),
            414,
            "uri_too_long",
        ),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: a\r\n{more}\r\n");
        let (answer, mut connection) = house.ask(request.as_bytes()).await;
        refused(what, &answer, status, code);
        closes(what, &answer, &mut connection).await;
        cases += 1;
    }
    assert_eq!(cases, 8);
    // What is just within bounds passes.
    for (target, more) in [
        (
            format!("/v1/models?{}", "a".repeat(8192 - 11)),
            String::new(),
        ),
        ("/v1/models".to_owned(), fields(99)),
        ("/v1/models".to_owned(), field(32_000)),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: a\r\n{more}\r\n");
        let (answer, mut connection) = house.ask(request.as_bytes()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        works(&mut connection).await;
    }
    house.serves().await;
}

#[tokio::test]
async fn more_than_pingora_can_parse_is_closed() {
    let house = House::new("").await;
    let fields = (0..1000).fold(String::new(), |all, i| format!("{all}x-{i}: 1\r\n"));
    for request in [
        format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n"),
        format!(
            "GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n",
            "v".repeat(2_000_000)
        ),
    ] {
        let mut connection = house.connect().await;
        connection.try_send(request.as_bytes()).await;
        let said = String::from_utf8_lossy(&connection.rest().await).into_owned();
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
        assert!(said.matches("HTTP/1.1").count() <= 1, "{said}");
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_request_needs_exactly_one_host() {
    let house = House::new("").await;
    let mut cases = 0;
    for (hosts, code) in [
        ("", "missing_host"),
        ("host: a\r\nhost: b\r\n", "invalid_host"),
        ("host: a\r\nHost: a\r\n", "invalid_host"),
        ("host:\r\n", "invalid_host"),
        ("host: user@a\r\n", "invalid_host"),
        ("host: user:secret@a\r\n", "invalid_host"),
        ("host: a b\r\n", "invalid_host"),
        ("host: a/b\r\n", "invalid_host"),
        ("host: a, b\r\n", "invalid_host"),
        ("host: http://a\r\n", "invalid_host"),
        ("host: a:port\r\n", "invalid_host"),
    ] {
        let body = chat("demo");
        let request = format!(
            "POST {CHAT} HTTP/1.1\r\n{hosts}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut connection = house.connect().await;
        connection.send(request.as_bytes()).await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 400, "{hosts:?}");
        // Some are refused by Pingora's parser already.
        let said = answer.error_code();
        assert!(
            said == code || said == "malformed_request",
            "{hosts:?}: {said}"
        );
        closes(hosts, &answer, &mut connection).await;
        cases += 1;
    }
    assert_eq!(cases, 11);
    house.is_unharmed().await;
    for host in [
        "a",
        "a:7070",
        "[::1]:7070",
        "127.0.0.1",
        "xn--bcher-kva.example",
        "A.Example.",
    ] {
        let request = format!("GET /livez HTTP/1.1\r\nhost: {host}\r\n\r\n");
        let (answer, _) = house.ask(request.as_bytes()).await;
        assert_eq!(answer.status, 200, "{host}");
    }
}

#[tokio::test]
async fn http_1_0_is_answered_and_closed() {
    let house = House::new("").await;
    for request in [
        "GET / HTTP/1.0\r\n\r\n",
        "GET /livez HTTP/1.0\r\n\r\n",
        "GET /livez HTTP/1.0\r\nhost: a\r\nuser-agent: a-probe\r\n\r\n",
    ] {
        let (answer, mut connection) = house.ask(request.as_bytes()).await;
        assert_eq!(answer.status, 200, "{request}");
        assert!(answer.header("x-request-id").is_some());
        assert!(answer.header("transfer-encoding").is_none());
        assert!(connection.rest().await.is_empty());
    }
    let body = chat_stream("demo");
    let request = format!(
        "POST {CHAT} HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let (answer, _) = house.ask(request.as_bytes()).await;
    assert_eq!(answer.status, 200);
    assert!(
        answer.header("transfer-encoding").is_none(),
        "HTTP/1.0 knows no chunks"
    );
    assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"));
}

#[tokio::test]
async fn a_request_may_come_byte_by_byte() {
    let house = House::new("").await;
    let body = chat("demo");
    for request in [
        "GET / HTTP/1.0\r\n\r\n".to_owned(),
        "GET /livez HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        "PRI HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        format!(
            "POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ),
    ] {
        let mut connection = house.connect().await;
        for byte in request.as_bytes() {
            connection.try_send(&[*byte]).await;
            tokio::task::yield_now().await;
        }
        if request.starts_with("PRI") {
            let said = String::from_utf8_lossy(&connection.rest().await).into_owned();
            assert!(said.starts_with("HTTP/1.1 4"), "{said}");
        } else {
            assert_eq!(connection.answer().await.status, 200, "{request}");
        }
    }
    assert_eq!(paths(&house.sim), [CHAT]);
}

#[tokio::test]
async fn a_method_that_is_not_in_the_list_never_reaches_an_upstream() {
    let house = House::new("").await;
    let mut cases = 0;
    for method in [
        "TRACE", "OPTIONS", "PUT", "DELETE", "PATCH", "HEAD", "GET", "PROPFIND", "post", "BREW",
    ] {
        let request = format!("{method} {CHAT} HTTP/1.1\r\nhost: a\r\n\r\n");
        let mut connection = house.connect().await;
        connection.send(request.as_bytes()).await;
        let head = connection.read_until("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 405 "), "{method}: {head}");
        assert!(
            head.to_lowercase().contains("\r\nallow: post\r\n"),
            "{method}: {head}"
        );
        assert!(head.contains("x-request-id: "), "{method}: {head}");
        if method == "HEAD" {
            // An answer to HEAD has a length but no body: the next answer
            // follows at once.
            connection
                .send(b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                .await;
            let all = String::from_utf8_lossy(&connection.rest().await).into_owned();
            assert_eq!(all.matches("HTTP/1.1 ").count(), 2, "{all}");
            assert!(all.contains("\r\n\r\nHTTP/1.1 200 "), "{all}");
        } else {
            let answer = connection.answer().await;
            refused(method, &answer, 405, "method_not_allowed");
            works(&mut connection).await;
            house.sim.clear_records();
        }
        cases += 1;
    }
    assert_eq!(cases, 10);
    for connect in [
        "CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: 127.0.0.1:22\r\n\r\n",
        "CONNECT / HTTP/1.1\r\nhost: a\r\n\r\n",
        "CONNECT /v1/chat/completions HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        let (answer, mut connection) = house.ask(connect.as_bytes()).await;
        refused(connect, &answer, 405, "method_not_allowed");
        assert!(answer.header("allow").is_some(), "{connect}");
        closes(connect, &answer, &mut connection).await;
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn a_path_that_only_looks_like_one_never_reaches_an_upstream() {
    let house = House::new("").await;
    let targets: [&[u8]; 46] = [
        b"//v1/chat/completions",
        b"/v1//chat/completions",
        b"/v1/chat//completions",
        b"/v1/chat/completions/",
        b"/v1/chat/completions//",
        b"/V1/chat/completions",
        b"/v1/Chat/Completions",
        b"/v1/%63hat/completions",
        b"/v1/chat%2fcompletions",
        b"/v1/chat%2Fcompletions",
        b"/%76%31/chat/completions",
        b"/v1/./chat/completions",
        b"/v1/x/../chat/completions",
        b"/v1/%2e%2e/v1/chat/completions",
        b"/v1/%2e/chat/completions",
        b"/%2e%2e/v1/chat/completions",
        b"/../v1/chat/completions",
        b"/v1/..;/v1/chat/completions",
        b"/v1/chat/completions;x=1",
        b"/v1;x=1/chat/completions",
        b"/v1/chat/completions%00",
        b"/v1/chat/completions%20",
        b"/v1/chat/completions%3f",
        b"/v1/chat/completions%23",
        b"/v1/chat/completions#x",
        b"/v1\\chat\\completions",
        b"\\v1\\chat\\completions",
        b"/v1/chat/completions\\",
        b"/v1/chat/completions\0",
        b"/v1/chat\0/completions",
        b"/v1/chat/completions\xff",
        b"/v1/chat/completions\x7f",
        b"/v1/chat/completions\t",
        b"http://127.0.0.1/v1/chat/completions",
        b"http://a/v1/chat/completions",
        b"https://a:1/v1/chat/completions",
        b"file:///etc/passwd",
        b"*",
        b"a:80",
        b"v1/chat/completions",
        b"?",
        b"/v1/models/../chat/completions",
        b"/v1/engines/demo/completions",
        b"/pause",
        b"/v1/load_lora_adapter",
        b"/metrics",
    ];
    let body = chat("demo");
    for method in ["POST", "GET"] {
        for target in targets {
            let shown = String::from_utf8_lossy(target);
            let mut request =
                [method.as_bytes(), b" ", target, b" HTTP/1.1\r\nhost: a\r\n"].concat();
            if method == "POST" {
                let rest = format!(
                    "content-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                request.extend_from_slice(rest.as_bytes());
            } else {
                request.extend_from_slice(b"connection: close\r\n\r\n");
            }
            let mut connection = house.connect().await;
            connection.send(&request).await;
            let said = String::from_utf8_lossy(&connection.rest().await).into_owned();
            assert!(said.starts_with("HTTP/1.1 4"), "{method} {shown}: {said}");
            let ours = said.contains("x-request-id: ") && said.contains("{\"error\":{\"message\":");
            assert!(ours, "{method} {shown}: {said}");
            assert_eq!(
                said.matches("HTTP/1.1 ").count(),
                1,
                "{method} {shown}: {said}"
            );
        }
    }
    house.is_unharmed().await;
}

#[tokio::test]
async fn what_is_not_http_is_closed() {
    let house = House::new("header_timeout: 300ms").await;
    let attempts: [&[u8]; 10] = [
        b"GET /\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/1.2\r\nhost: a\r\n\r\n",
        b"GET / HTTP/3.0\r\nhost: a\r\n\r\n",
        b"GET / http/1.1\r\nhost: a\r\n\r\n",
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\0\0\0\0\0\0\0\0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\r\n\r\n\r\n\r\n",
    ];
    for bytes in attempts {
        let mut connection = house.connect().await;
        connection.try_send(bytes).await;
        let said = String::from_utf8_lossy(&connection.rest().await).into_owned();
        let shown = String::from_utf8_lossy(bytes);
        assert!(
            said.is_empty() || said.starts_with("HTTP/1.1 4"),
            "{shown}: {said}"
        );
    }
    house.is_unharmed().await;
}

/// Sends a byte every few milliseconds until the other side closes.
async fn drip(connection: &mut Connection) {
    let mut tick = interval(Duration::from_millis(20));
    soon("the drip is cut off", async {
        loop {
            tick.tick().await;
            if !connection.try_send(b"x").await
                || !connection.stays_open(Duration::from_millis(5)).await
            {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_header_that_drips_in_is_cut_off_on_fresh_and_kept_connections() {
    let house = House::new("header_timeout: 500ms").await;
    let start = b"GET /livez HTTP/1.1\r\nhost: a\r\nx-drip: ";
    let mut fresh = house.connect().await;
    fresh.send(start).await;
    let mut first_line = house.connect().await;
    first_line.send(b"GET /").await;
    let mut preface = house.connect().await;
    preface.send(b"PRI * HTT").await;
    let mut kept = house.connect().await;
    works(&mut kept).await;
    works(&mut kept).await;
    kept.send(start).await;
    let mut after_get = house.connect().await;
    after_get.request("GET", "/livez", &[], b"").await;
    assert_eq!(after_get.answer().await.status, 200);
    after_get.send(start).await;
    tokio::join!(
        drip(&mut fresh),
        drip(&mut first_line),
        drip(&mut preface),
        drip(&mut kept),
        drip(&mut after_get),
    );
    house.serves().await;
}

#[tokio::test]
async fn an_idle_kept_connection_outlives_the_header_timeout() {
    let house = House::new("header_timeout: 200ms, keep_alive: 60s").await;
    let mut after_post = house.connect().await;
    works(&mut after_post).await;
    let mut after_get = house.connect().await;
    after_get.request("GET", "/livez", &[], b"").await;
    assert_eq!(after_get.answer().await.status, 200);
    let mut after_chunks = house.connect().await;
    let body = chat("demo");
    let (one, two) = body.split_at(7);
    let chunked = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
         {:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n",
        one.len(),
        two.len(),
    );
    after_chunks.send(chunked.as_bytes()).await;
    assert_eq!(after_chunks.answer().await.status, 200);
    let idle = Duration::from_millis(700);
    let open = tokio::join!(
        after_post.stays_open(idle),
        after_get.stays_open(idle),
        after_chunks.stays_open(idle),
    );
    assert_eq!(open, (true, true, true));
    for mut connection in [after_post, after_get, after_chunks] {
        works(&mut connection).await;
    }
}

#[tokio::test]
async fn a_request_may_take_longer_than_its_header_could() {
    let house = House::new("header_timeout: 200ms, keep_alive: 60s").await;
    house.sim.fault("first_token=600ms").await.unwrap();
    let mut connection = house.connect().await;
    works(&mut connection).await;
    works(&mut connection).await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_keep_alive() {
    let house = House::new("keep_alive: 1s").await;
    let mut connection = house.connect().await;
    works(&mut connection).await;
    let begun = Instant::now();
    works(&mut connection).await;
    assert!(connection.rest().await.is_empty());
    assert!(
        begun.elapsed() > Duration::from_millis(800),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_connection_is_closed_in_good_order_after_its_number_of_requests() {
    let house = House::new("keep_alive_requests: 3").await;
    let mut connection = house.connect().await;
    for _ in 0..2 {
        connection
            .request("POST", CHAT, &[], chat("demo").as_bytes())
            .await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, 200);
        assert_ne!(answer.header("connection"), Some("close"));
    }
    connection
        .request("POST", CHAT, &[], chat("demo").as_bytes())
        .await;
    let answer = connection.answer().await;
    assert_eq!(answer.status, 200);
    closes("the third", &answer, &mut connection).await;
    assert_eq!(house.sim.records().len(), 3);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_turn() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    let good = build("POST", CHAT, &[], chat("demo").as_bytes());
    let bad = build("POST", CHAT, &[], b"{}");
    let list = build("GET", "/v1/models", &[], b"");
    connection
        .send(&[good.as_slice(), &bad, &list, &good].concat())
        .await;
    for status in [200, 400, 200, 200] {
        assert_eq!(connection.answer().await.status, status);
    }
    assert_eq!(house.sim.records().len(), 2);
}

#[tokio::test]
async fn a_sane_request_id_is_kept_and_any_other_replaced() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    let longest = "a".repeat(128);
    for id in ["abc", "A-1_2.3:4", "0", longest.as_str()] {
        for (method, path, body) in [
            ("GET", "/livez", String::new()),
            ("POST", CHAT, chat("demo")),
            ("POST", CHAT, "{".to_owned()),
        ] {
            connection
                .request(method, path, &[("X-Request-ID", id)], body.as_bytes())
                .await;
            assert_eq!(connection.answer().await.header("x-request-id"), Some(id));
        }
    }
    for record in house.sim.records() {
        assert!(
            record
                .header("x-request-id")
                .is_some_and(|id| id.len() <= 128)
        );
    }
    let too_long = "a".repeat(129);
    let strange = [
        "",
        "a b",
        "a\tb",
        "\"x\"",
        "a,b",
        "<script>",
        "a;b",
        "é",
        "%0d%0aset-cookie:x",
        "{}",
        &too_long,
    ];
    for id in strange {
        connection
            .request(
                "POST",
                CHAT,
                &[("x-request-id", id)],
                chat("demo").as_bytes(),
            )
            .await;
        let answer = connection.answer().await;
        let made = answer.header("x-request-id").unwrap();
        assert!(
            made.starts_with("req_") && made.len() == 36,
            "{id:?}: {made:?}"
        );
        assert_eq!(
            answer
                .headers
                .iter()
                .filter(|(name, _)| name == "x-request-id")
                .count(),
            1
        );
        let seen = house.sim.records().pop().unwrap();
        assert_eq!(seen.header("x-request-id").as_deref(), Some(made));
    }
    // A line end in the value is the end of the value.
    let request = "GET /livez HTTP/1.1\r\nhost: a\r\nx-request-id: a\rset-cookie: b\r\n\r\n";
    let mut connection = house.connect().await;
    connection.send(request.as_bytes()).await;
    connection.finish_sending().await;
    let said = String::from_utf8_lossy(&connection.rest().await).into_owned();
    assert!(!said.contains("set-cookie"), "{said}");
}

#[tokio::test]
async fn a_query_is_accepted_and_not_forwarded() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    for query in [
        "?",
        "?beta=true",
        "?a=b&c=%2e%2e/%00",
        "?x=/../../pause",
        "??",
        "?a;b",
    ] {
        connection
            .request(
                "POST",
                &format!("{CHAT}{query}"),
                &[],
                chat("demo").as_bytes(),
            )
            .await;
        assert_eq!(connection.answer().await.status, 200, "{query}");
        connection
            .request("GET", &format!("/v1/models{query}"), &[], b"")
            .await;
        assert_eq!(connection.answer().await.status, 200, "{query}");
    }
    let seen = paths(&house.sim);
    assert_eq!(seen.len(), 6);
    assert!(seen.iter().all(|path| path == CHAT), "{seen:?}");
}

#[tokio::test]
async fn a_steering_header_that_makes_no_sense_is_a_400() {
    let house = House::new("").await;
    let mut connection = house.connect().await;
    for (name, value, status) in [
        ("x-forebay-local", "maybe", 400),
        ("x-forebay-local", "", 400),
        ("x-forebay-local", "TRUE ", 400),
        ("x-forebay-upstream", "", 400),
        ("x-forebay-upstream", "é", 400),
        ("x-forebay-upstream", "gpu-9", 400),
        ("content-encoding", "gzip", 415),
    ] {
        connection
            .request("POST", CHAT, &[(name, value)], chat("demo").as_bytes())
            .await;
        let answer = connection.answer().await;
        assert_eq!(answer.status, status, "{name}: {value}");
        answer.error_code();
        if answer.header("connection") == Some("close") {
            connection = house.connect().await;
        }
    }
    // Said twice, it must not depend on which one counts.
    let twice = [("x-forebay-local", "0"), ("x-forebay-local", "1")];
    connection
        .request("POST", CHAT, &twice, chat("demo").as_bytes())
        .await;
    assert_eq!(connection.answer().await.status, 400);
    assert_eq!(paths(&house.sim), Vec::<String>::new());
    connection
        .request(
            "POST",
            CHAT,
            &[("x-forebay-local", "1")],
            chat("demo").as_bytes(),
        )
        .await;
    assert_eq!(connection.answer().await.status, 200);
}

#[tokio::test]
async fn an_unread_body_is_never_taken_for_a_request() {
    let house = House::new("").await;
    let hidden = build("POST", CHAT, &[], chat("demo").as_bytes());
    for (method, path, status, code) in [
        ("POST", "/unknown", 404, "unknown_url"),
        ("PUT", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/", 405, "method_not_allowed"),
    ] {
        let mut connection = house.connect().await;
        connection.request(method, path, &[], &hidden).await;
        let answer = connection.answer().await;
        refused(path, &answer, status, code);
        closes(path, &answer, &mut connection).await;
    }
    // A GET with a body is answered, its body no request either.
    let mut connection = house.connect().await;
    let head = format!(
        "GET /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
        hidden.len()
    );
    connection.send(&[head.as_bytes(), &hidden].concat()).await;
    let answer = connection.answer().await;
    assert_eq!(answer.status, 200);
    closes("GET with a body", &answer, &mut connection).await;
    house.is_unharmed().await;
}

#[tokio::test]
async fn an_upgrade_is_ignored() {
    let house = House::new("").await;
    for upgrade in ["websocket", "h2c", "foo"] {
        let fields = [
            ("connection", "upgrade, http2-settings"),
            ("upgrade", upgrade),
            ("http2-settings", "AAMAAABkAAQAAP__"),
        ];
        let (answer, _) = house
            .ask(&build("POST", CHAT, &fields, chat("demo").as_bytes()))
            .await;
        assert_eq!(answer.status, 200, "{upgrade}");
    }
    for record in house.sim.records() {
        assert_eq!(record.header("upgrade"), None);
        assert_eq!(record.header("http2-settings"), None);
    }
    assert_eq!(house.sim.records().len(), 3);
}

/// Requests whose header Pingora's parser refuses: what is wrong, the header
/// without its empty line, and the code of the answer.
fn unreadable() -> Vec<(&'static str, String, u16, &'static str)> {
    let bad = |what, fields: &str| {
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\n{fields}");
        (what, head, 400, "malformed_request")
    };
    let large = |what, fields: String| {
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\n{fields}");
        (what, head, 431, "header_too_large")
    };
    vec![
        bad("two lengths", "content-length: 5\r\ncontent-length: 6\r\n"),
        bad("a coding that is none", "transfer-encoding: xchunked\r\n"),
        bad("a folded field", "x: a\r\n b\r\n"),
        bad("a NUL", "x: a\0b\r\n"),
        bad("a carriage return alone", "x: a\rb\r\n"),
        bad("a space before the colon", "x : a\r\n"),
        bad("no colon", "hello\r\n"),
        bad("a length that is no number", "content-length: 5x\r\n"),
        (
            "another version",
            "GET / HTTP/3.7\r\nhost: a\r\n".to_owned(),
            400,
            "malformed_request",
        ),
        (
            "no request at all",
            "\x16\x03\x01 hello\r\n".to_owned(),
            400,
            "malformed_request",
        ),
        large("too many fields", "x: y\r\n".repeat(300)),
    ]
}

#[tokio::test]
async fn what_the_parser_refuses_gets_an_answer_a_line_and_a_count() {
    let house = House::new("").await;
    let cases = unreadable();
    let (mut bad, mut large) = (0.0, 0.0);
    for (number, (what, head, status, code)) in cases.iter().enumerate() {
        let mut connection = house.connect().await;
        // Half of them on a connection that has been used.
        if number % 2 == 1 {
            works(&mut connection).await;
        }
        // More than is read with the header: the answer gets through all the same.
        let rest = "x".repeat(if number % 3 == 0 { 60_000 } else { 10 });
        connection
            .send(format!("{head}\r\n{rest}").as_bytes())
            .await;
        let answer = connection.answer().await;
        refused(what, &answer, *status, code);
        let fields: Vec<_> = answer.headers.iter().map(|(name, _)| &**name).collect();
        assert!(answer.header("server").is_none(), "{what}: {fields:?}");
        closes(what, &answer, &mut connection).await;
        let id = answer.header("x-request-id").unwrap();
        let line = format!("request_id={id} client=127.0.0.1");
        house.gateway.logged(&line).await;
        let log = house.gateway.log();
        assert_eq!(log.matches(id).count(), 1, "{what}");
        let line = log.lines().find(|line| line.contains(id)).unwrap();
        let ending = format!("status={status} ending=client_error");
        assert!(line.contains(&ending), "{line}");
        assert!(line.contains(&format!("error={code}")), "{line}");
        *if *status == 400 { &mut bad } else { &mut large } += 1.0;
    }
    assert!(bad > 5.0 && large > 0.0);
    for (code, status, count) in [
        ("malformed_request", 400, bad),
        ("header_too_large", 431, large),
    ] {
        let errors = format!("forebay_errors_total{{code=\"{code}\"}}");
        assert_eq!(house.gateway.metric(&errors).await, Some(count));
        let requests = format!(
            "forebay_requests_total{{endpoint=\"unknown\",outcome=\"client_error\",route=\"\",status=\"{status}\"}}"
        );
        assert_eq!(house.gateway.metric(&requests).await, Some(count));
    }
    house
        .gateway
        .metric_becomes("forebay_client_connections", 0.0)
        .await;
    let calls = paths(&house.sim);
    assert!(calls.iter().all(|path| path == CHAT), "{calls:?}");
    // Those that were sent before, on the connections that had been used.
    assert_eq!(calls.len(), cases.len() / 2);
}

#[tokio::test]
async fn a_bad_request_behind_a_good_one_gets_its_own_answer() {
    let house = House::new("").await;
    let body = chat("demo");
    let good = build("POST", CHAT, &[], body.as_bytes());
    let both = [
        good.as_slice(),
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n",
    ]
    .concat();
    let mut connection = house.connect().await;
    connection.send(&both).await;
    assert_eq!(connection.answer().await.status, 200);
    let answer = connection.answer().await;
    refused("pipelined", &answer, 400, "malformed_request");
    closes("pipelined", &answer, &mut connection).await;
}
