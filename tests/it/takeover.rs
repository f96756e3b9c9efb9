//! Takeovers: a stream whose upstream dies is gone on with by another, and the
//! client reads one answer.

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::support::{
    Answer, Connection, DEADLINE, Gateway, Scripted,
    by_hand::{ByHand, Call, STREAM_HEAD},
    chat, chat_stream, eventually, group_of,
    http::{post, post_chat},
    scripted, sim, soon, upstream_at,
};

const PATH: &str = "/v1/chat/completions";
const IN_FLIGHT: &str = "forebay_requests_in_flight";

/// An event of the upstream that answers first.
fn first(delta: Value) -> String {
    let chunk = json!({ "id": "a-1", "object": "chat.completion.chunk", "created": 111, "model": "m-a",
        "choices": [{ "index": 0, "delta": delta, "finish_reason": null }] });
    format!("data: {chunk}\n\n")
}

/// An event of one that goes on.
fn next(delta: Value, finish: Option<&str>) -> String {
    let chunk = json!({ "id": "b-1", "object": "chat.completion.chunk", "created": 222, "model": "m-b",
        "system_fingerprint": "fp-b",
        "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] });
    format!("data: {chunk}\n\n")
}

fn usage(id: &str, prompt: u64, completion: u64) -> String {
    let total = prompt + completion;
    let usage =
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total });
    format!(
        "data: {}\n\n",
        json!({ "id": id, "choices": [], "usage": usage })
    )
}

/// A streamed answer in chunks, one for each event, ended in good order.
fn stream(events: &[String]) -> Vec<u8> {
    let mut answer = STREAM_HEAD.to_owned();
    for event in events {
        answer.push_str(&format!("{:x}\r\n{event}\r\n", event.len()));
    }
    answer.push_str("0\r\n\r\n");
    answer.into_bytes()
}

/// What is delivered of the first answer: `Once upon a ` and no more.
fn beginning() -> Vec<String> {
    let mut events = vec![first(json!({ "role": "assistant", "content": "" }))];
    events.extend(["Once", " upon", " a "].map(|text| first(json!({ "content": text }))));
    events
}

/// The rest as another server tells it, ` time there.`, with the usage that it
/// counts.
fn rest() -> Vec<String> {
    vec![
        next(json!({ "role": "assistant", "content": "" }), None),
        next(json!({ "content": " time" }), None),
        next(json!({ "content": " there." }), None),
        next(json!({}), Some("stop")),
        usage("b-1", 13, 2),
        "data: [DONE]\n\n".to_owned(),
    ]
}

const WHOLE: &str = "Once upon a time there.";

/// One group of these upstreams, which are asked in this order first.
fn group(upstreams: &[(&str, String, &str)]) -> String {
    let upstreams: Vec<String> = upstreams
        .iter()
        .map(|(name, url, keys)| upstream_at(name, url, keys))
        .collect();
    format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
        group_of("gpus", "", &upstreams)
    )
}

fn two(first: String, second: String) -> String {
    group(&[
        (
            "gpu-1",
            first,
            "kind: vllm, timeouts: { inter_token: 400ms }",
        ),
        (
            "gpu-2",
            second,
            "kind: vllm, timeouts: { inter_token: 400ms }",
        ),
    ])
}

/// The chunks of a stream.
fn chunks(answer: &Answer) -> Vec<Value> {
    answer
        .events()
        .iter()
        .filter(|event| *event != "[DONE]")
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

/// Checks that the client read one answer, from one server as far as it can tell.
#[track_caller]
fn assert_one(answer: &Answer, text: &str) {
    let said = answer.text();
    assert!(answer.complete && answer.status == 200, "{said}");
    assert_eq!(answer.content(), text, "{said}");
    assert!(said.ends_with("data: [DONE]\n\n"), "{said}");
    assert_eq!(said.matches("[DONE]").count(), 1, "{said}");
    let chunks = chunks(answer);
    let count = |what: fn(&Value) -> bool| chunks.iter().filter(|chunk| what(chunk)).count();
    assert_eq!(count(|chunk| chunk["error"] != Value::Null), 0, "{said}");
    assert_eq!(count(|chunk| chunk["id"] != "a-1"), 0, "{said}");
    let others = |chunk: &Value| chunk["created"] == 222 || chunk["model"] == "m-b";
    assert_eq!(count(others), 0, "{said}");
    assert_eq!(said.matches("fp-b").count(), 0, "{said}");
    let has_role = |chunk: &Value| chunk["choices"][0]["delta"]["role"] != Value::Null;
    assert_eq!(count(has_role), 1, "{said}");
    let finished = |chunk: &Value| chunk["choices"][0]["finish_reason"] != Value::Null;
    assert_eq!(count(finished), 1, "{said}");
}

/// Checks that the client was told that its answer is not complete; returns the
/// code.
#[track_caller]
fn assert_broken_off(answer: &Answer) -> String {
    let said = answer.text();
    assert!(answer.complete && !said.contains("[DONE]"), "{said}");
    let last = chunks(answer).pop().unwrap();
    last["error"]["code"].as_str().unwrap().to_owned()
}

/// Checks what was asked for: the client's messages and this text, to be gone
/// on with.
#[track_caller]
fn assert_asked_to_continue(body: &[u8], text: &str) {
    let body: Value = serde_json::from_slice(body).unwrap();
    assert_eq!(
        body["messages"],
        json!([{ "role": "user", "content": "Hello" }, { "role": "assistant", "content": text }])
    );
    assert_eq!(body["continue_final_message"], true);
    assert_eq!(body["add_generation_prompt"], false);
}

async fn asking(gateway: &Gateway, body: &str) -> Connection {
    let mut client = Connection::open(gateway.addr).await;
    client.request("POST", PATH, &[], body.as_bytes()).await;
    client
}

async fn send_all(call: &mut Call, events: &[String]) {
    call.send(STREAM_HEAD).await;
    for event in events {
        call.chunk(event).await;
    }
}

/// The ways in which an upstream dies.
const DEATHS: [&str; 9] = [
    "fin",
    "an end in good order without [DONE]",
    "reset",
    "fin inside a character",
    "reset inside an event",
    "silence",
    "an error event",
    "an error event and [DONE]",
    "nonsense",
];

async fn die(mut call: Call, how: &str) -> Option<Call> {
    let error = r#"data: {"error": {"message": "EngineCore encountered an issue","type":"InternalServerError","param":null,"code":500}}"#;
    match how {
        "fin" => drop(call),
        "an end in good order without [DONE]" => {
            call.end().await;
            return Some(call);
        }
        "reset" => call.reset(),
        "fin inside a character" => {
            let half = first(json!({ "content": "ż" })).into_bytes();
            let at = half.iter().position(|byte| *byte > 0x7f).unwrap() + 1;
            call.send(format!("{:x}\r\n", half.len())).await;
            call.send(&half[..at]).await;
        }
        "reset inside an event" => {
            call.chunk("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"LOST")
                .await;
            call.reset();
        }
        "silence" => return Some(call),
        "an error event" => {
            call.chunk(format!("{error}\n\n")).await;
            return Some(call);
        }
        "an error event and [DONE]" => {
            call.chunk(format!("{error}\n\ndata: [DONE]\n\n")).await;
            call.end().await;
        }
        "nonsense" => {
            call.chunk("data: {\"choices\":[{\"del\n\n").await;
            return Some(call);
        }
        other => panic!("{other}"),
    }
    None
}

#[tokio::test]
async fn whatever_an_upstream_dies_of_the_client_reads_one_answer() {
    for how in DEATHS {
        let (gpu_1, gpu_2) = (
            ByHand::listen().await,
            Scripted::always(stream(&rest())).await,
        );
        let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
        let mut client = asking(&gateway, &chat_stream("demo")).await;
        let mut call = gpu_1.accept().await;
        send_all(&mut call, &beginning()).await;
        client.read_until("\" a \"").await;
        let kept = die(call, how).await;
        let answer = client.answer().await;
        assert_one(&answer, WHOLE);
        assert_eq!(answer.upstream(), "gpu-1", "{how}");
        assert!(answer.text().contains(
            r#": forebay {"upstream":"gpu-2","group":"gpus","attempts":2,"fallback":false,"takeovers":1}"#
        ), "{how}: {}", answer.text());
        let asked = gpu_2.requests();
        assert_eq!(asked.len(), 1, "{how}");
        assert_asked_to_continue(&asked[0].body, "Once upon a");
        let series = r#"forebay_takeovers_total{from="gpu-1",result="continued",to="gpu-2"}"#;
        gateway.metric_becomes(series, 1.0).await;
        gateway.logged("takeovers=1").await;
        gateway.logged("ending=success").await;
        let cut = r#"forebay_attempts_total{group="gpus",upstream="gpu-1",verdict="cut"}"#;
        assert_eq!(gateway.metric(cut).await, Some(1.0), "{how}");
        drop(kept);
    }
}

#[tokio::test]
async fn what_came_in_one_piece_with_the_end_is_delivered_and_half_an_event_is_not() {
    let mut all = beginning().concat();
    all.push_str("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"LOST\"}}]}\n");
    let gpu_1 = Scripted::always(stream(&[all])).await;
    let gpu_2 = Scripted::always(stream(&rest())).await;
    let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
    let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_one(&answer, WHOLE);
    assert_asked_to_continue(&gpu_2.requests()[0].body, "Once upon a");
}

#[tokio::test]
async fn two_upstreams_survive_three_deaths() {
    let (gpu_1, gpu_2) = (ByHand::listen().await, ByHand::listen().await);
    let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
    let mut client = asking(&gateway, &chat_stream("demo")).await;
    let mut call = gpu_1.accept().await;
    send_all(&mut call, &beginning()).await;
    client.read_until("\" a \"").await;
    drop(call);
    for (by, text, so_far) in [
        (&gpu_2, " time", "Once upon a"),
        (&gpu_1, " there", "Once upon a time"),
        (&gpu_2, " was", "Once upon a time there"),
    ] {
        let mut call = by.accept().await;
        assert_asked_to_continue(call.body(), so_far);
        let role = next(json!({ "role": "assistant", "content": null }), None);
        send_all(&mut call, &[role, next(json!({ "content": text }), None)]).await;
        client.read_until(text.trim()).await;
        drop(call);
    }
    let mut call = gpu_1.accept().await;
    assert_asked_to_continue(call.body(), "Once upon a time there was");
    send_all(&mut call, &rest()[3..]).await;
    call.end().await;
    let answer = client.answer().await;
    assert_one(&answer, "Once upon a time there was");
    gateway.logged("takeovers=4").await;
}

#[tokio::test]
async fn takeovers_of_one_answer_are_bounded() {
    let (gpu_1, gpu_2) = (ByHand::listen().await, ByHand::listen().await);
    let config = two(gpu_1.url(), gpu_2.url()) + "limits: { takeovers: 1 }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway, &chat_stream("demo")).await;
    for (by, text) in [(&gpu_1, "one"), (&gpu_2, " two")] {
        let mut call = by.accept().await;
        send_all(&mut call, &[first(json!({ "content": text }))]).await;
        client.read_until(text).await;
    }
    let answer = client.answer().await;
    assert_eq!(assert_broken_off(&answer), "upstream_incomplete");
    assert_eq!(answer.content(), "one two");
    let series = r#"forebay_limit_hits_total{limit="takeovers"}"#;
    gateway.metric_becomes(series, 1.0).await;
}

#[tokio::test]
async fn who_fails_before_the_first_token_of_the_rest_is_passed_over() {
    let gpu_1 = Scripted::always(stream(&beginning())).await;
    let (gpu_2, gpu_3) = (sim("gpu-2").await, sim("gpu-3").await);
    let gpu_4 = Scripted::always(stream(&rest())).await;
    gpu_2.fault("status=503").await.unwrap();
    gpu_3.fault("error_at=1").await.unwrap();
    let config = group(&[
        ("gpu-1", gpu_1.url(), "kind: vllm"),
        ("gpu-2", gpu_2.url(), "kind: vllm"),
        ("gpu-3", gpu_3.url(), "kind: vllm"),
        ("gpu-4", gpu_4.url(), "kind: vllm"),
    ]);
    let gateway = Gateway::start(&config).await;
    let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_one(&answer, WHOLE);
    assert_eq!((gpu_2.records().len(), gpu_3.records().len()), (1, 1));
    for to in ["gpu-2", "gpu-3"] {
        let series =
            format!(r#"forebay_takeovers_total{{from="gpu-1",result="failed",to="{to}"}}"#);
        gateway.metric_becomes(&series, 1.0).await;
    }
}

#[tokio::test]
async fn when_nobody_can_go_on_the_client_is_told() {
    let gpu_1 = Scripted::always(stream(&beginning())).await;
    let gpu_2 = sim("gpu-2").await;
    gpu_2.fault("status=500").await.unwrap();
    let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
    let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_eq!(assert_broken_off(&answer), "upstream_incomplete");
    assert_eq!(answer.content(), "Once upon a ");
    assert_eq!((gpu_1.asked(), gpu_2.records().len()), (1, 1));
    let series = r#"forebay_takeovers_total{from="gpu-1",result="none",to="-"}"#;
    gateway.metric_becomes(series, 1.0).await;
    gateway.logged("ending=incomplete").await;
}

#[tokio::test]
async fn what_cannot_be_gone_on_with_ends_with_an_error_event_and_no_second_request() {
    let plain = beginning();
    let with = |event: String| [beginning(), vec![event]].concat();
    let tool = json!([{ "index": 0, "id": "c", "type": "function", "function": { "name": "f", "arguments": "" } }]);
    let cases = [
        (r#","n":2"#, plain.clone()),
        (r#","logprobs":true"#, plain.clone()),
        (
            r#","response_format":{"type":"json_object"}"#,
            plain.clone(),
        ),
        (r#","structured_outputs":{"regex":".*"}"#, plain.clone()),
        (r#","guided_json":{"type":"object"}"#, plain.clone()),
        (
            r#","tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"required""#,
            plain.clone(),
        ),
        ("", with(first(json!({ "tool_calls": tool })))),
        ("", with(first(json!({ "refusal": "no" })))),
        (
            "",
            vec![first(json!({ "role": "assistant", "reasoning": "Hm" }))],
        ),
        ("", with(next(json!({}), Some("stop")))),
    ];
    for (more, events) in cases {
        let gpu_1 = Scripted::always(stream(&events)).await;
        let gpu_2 = Scripted::always(stream(&rest())).await;
        let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
        let body = chat_stream("demo").replace(r#","messages""#, &format!(r#"{more},"messages""#));
        let answer = post_chat(gateway.addr, &body).await;
        assert_eq!(
            assert_broken_off(&answer),
            "upstream_incomplete",
            "{more} {events:?}"
        );
        assert_eq!((gpu_1.asked(), gpu_2.asked()), (1, 0), "{more} {events:?}");
        let series = r#"forebay_takeovers_total{from="gpu-1",result="unsuitable",to="-"}"#;
        gateway.metric_becomes(series, 1.0).await;
    }
}

#[tokio::test]
async fn a_pin_a_group_and_an_upstream_can_forbid_it() {
    for (config, headers) in [
        (("", "kind: vllm"), &[("x-forebay-upstream", "gpu-1")][..]),
        (("takeover: false", "kind: vllm"), &[]),
        (("", "kind: vllm, continue: false"), &[]),
        (("", "kind: ollama"), &[]),
    ] {
        let (keys, second) = config;
        let gpu_1 = Scripted::always(stream(&beginning())).await;
        let gpu_2 = Scripted::always(stream(&rest())).await;
        let upstreams = [
            upstream_at("gpu-1", &gpu_1.url(), "kind: vllm"),
            upstream_at("gpu-2", &gpu_2.url(), second),
        ];
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
            group_of("gpus", keys, &upstreams)
        );
        let gateway = Gateway::start(&yaml).await;
        let answer = post(gateway.addr, PATH, headers, chat_stream("demo").as_bytes()).await;
        assert_eq!(
            assert_broken_off(&answer),
            "upstream_incomplete",
            "{config:?}"
        );
        assert_eq!((gpu_1.asked(), gpu_2.asked()), (1, 0), "{config:?}");
    }
}

#[tokio::test]
async fn a_request_held_to_local_groups_never_goes_on_elsewhere() {
    let gpu = Scripted::always(stream(&beginning())).await;
    let cloud = Scripted::always(stream(&rest())).await;
    let yaml = format!(
        "groups:\n{}{}routes:\n  - {{ model: \"*\", groups: [gpus], fallback: cloud }}\n",
        group_of(
            "gpus",
            "local: true",
            &[upstream_at("gpu-1", &gpu.url(), "kind: vllm")]
        ),
        group_of(
            "cloud",
            "",
            &[upstream_at("cloud-1", &cloud.url(), "kind: vllm")]
        ),
    );
    let gateway = Gateway::start(&yaml).await;
    let local = [("x-forebay-local", "1")];
    let body = chat_stream("demo");
    let answer = post(gateway.addr, PATH, &local, body.as_bytes()).await;
    assert_eq!(assert_broken_off(&answer), "upstream_incomplete");
    assert_eq!(cloud.asked(), 0);
    // Without it the fallback goes on.
    let gateway = Gateway::start(&yaml).await;
    assert_one(&post_chat(gateway.addr, &body).await, WHOLE);
    assert_eq!(cloud.asked(), 1);
}

/// Two upstreams that die, each with a model of its own, and then `others`.
fn dying(deads: &[&Scripted], others: &[(&str, String, &str)]) -> String {
    let dead = |(at, dead): (usize, &&Scripted)| {
        let keys = format!("kind: vllm, models: [m{at}]");
        upstream_at(&format!("dead-{at}"), &dead.url(), &keys)
    };
    let deads: Vec<String> = deads.iter().enumerate().map(dead).collect();
    let others: Vec<String> = others
        .iter()
        .map(|(name, url, keys)| upstream_at(name, url, keys))
        .collect();
    format!(
        "groups:\n{}{}routes:\n  - {{ model: \"*\", groups: [dying, others] }}\n",
        group_of("dying", "", &deads),
        group_of("others", "", &others)
    )
}

#[tokio::test]
async fn who_answers_400_to_a_rest_is_not_asked_again_even_after_a_reload() {
    for status in [400, 422] {
        let deads = [
            Scripted::always(stream(&beginning())).await,
            Scripted::always(stream(&beginning())).await,
        ];
        let error = r#"{"error":{"message":"Unrecognized request argument supplied: continue_final_message","type":"invalid_request_error","param":null,"code":null}}"#;
        let refusing = Scripted::always(scripted::json(status, error)).await;
        let good = Scripted::always(stream(&rest())).await;
        let config = dying(
            &[&deads[0], &deads[1]],
            &[
                ("unknown", refusing.url(), ""),
                ("good", good.url(), "kind: vllm"),
            ],
        );
        let gateway = Gateway::start(&config).await;
        assert_one(&post_chat(gateway.addr, &chat_stream("m0")).await, WHOLE);
        assert_eq!((refusing.asked(), good.asked()), (1, 1));
        let series = r#"forebay_takeovers_total{from="dead-0",result="refused",to="unknown"}"#;
        gateway.metric_becomes(series, 1.0).await;
        gateway.write_config(&config.replace("name: unknown,", "name: unknown, weight: 2,"));
        assert_eq!(gateway.reload().await.status, 200);
        assert_one(&post_chat(gateway.addr, &chat_stream("m1")).await, WHOLE);
        assert_eq!((refusing.asked(), good.asked()), (1, 2));
        let failed = r#"forebay_upstream_state{group="others",state="ready",upstream="unknown"}"#;
        assert_eq!(
            gateway.metric(failed).await,
            Some(1.0),
            "it has done nothing wrong"
        );
    }
}

#[tokio::test]
async fn who_begins_anew_is_noticed_before_the_client_reads_it() {
    let long = "Once upon a time, long ago, there lived a king.";
    let begun = |more: &[&str]| {
        let role = first(json!({ "role": "assistant", "content": "" }));
        let texts = [long].into_iter().chain(more.iter().copied());
        let texts = texts.map(|text| first(json!({ "content": text })));
        [role].into_iter().chain(texts).collect::<Vec<_>>()
    };
    let deads = [
        Scripted::always(stream(&begun(&[]))).await,
        Scripted::always(stream(&begun(&[]))).await,
    ];
    let words: Vec<String> = long.split_inclusive(' ').map(str::to_owned).collect();
    let mut anew = vec![next(json!({ "role": "assistant", "content": "" }), None)];
    anew.extend(
        words
            .iter()
            .map(|word| next(json!({ "content": word }), None)),
    );
    anew.extend(rest().split_off(3));
    let anew = Scripted::always(stream(&anew)).await;
    let good = Scripted::always(stream(&rest())).await;
    let config = dying(
        &[&deads[0], &deads[1]],
        &[
            ("unknown", anew.url(), ""),
            ("good", good.url(), "kind: vllm"),
        ],
    );
    let gateway = Gateway::start(&config).await;
    let whole = format!("{long} time there.");
    for (model, asked) in [("m0", (1, 1)), ("m1", (1, 2))] {
        assert_one(&post_chat(gateway.addr, &chat_stream(model)).await, &whole);
        assert_eq!((anew.asked(), good.asked()), asked, "{model}");
    }
    let series = r#"forebay_takeovers_total{from="dead-0",result="restarted",to="unknown"}"#;
    gateway.metric_becomes(series, 1.0).await;
}

#[tokio::test]
async fn a_server_of_unknown_kind_that_goes_on_is_used() {
    let deads = [
        Scripted::always(stream(&beginning())).await,
        Scripted::always(stream(&beginning())).await,
    ];
    let unknown = ByHand::listen().await;
    let config = dying(
        &[&deads[0], &deads[1]],
        &[("unknown", unknown.url(), "kind: openai")],
    );
    let gateway = Gateway::start(&config).await;
    // It repeats the first letters, and is another text all the same.
    let mut same = rest();
    same[1] = next(json!({ "content": "On" }), None);
    let mut client = asking(&gateway, &chat_stream("m0")).await;
    let mut call = unknown.accept().await;
    let proof: Value = serde_json::from_slice(call.body()).unwrap();
    assert_eq!(proof["continue_final_message"], true);
    assert_eq!(proof["add_generation_prompt"], true);
    assert_eq!(
        (&proof["stream"], &proof["max_tokens"]),
        (&json!(false), &json!(1))
    );
    let knows = r#"{"error":{"message":"Cannot set both `continue_final_message` and `add_generation_prompt` to True.","type":"BadRequestError","param":null,"code":400}}"#;
    call.send(scripted::json(400, knows)).await;
    drop(call);
    let mut call = unknown.accept().await;
    assert_asked_to_continue(call.body(), "Once upon a");
    send_all(&mut call, &same).await;
    call.end().await;
    assert_one(&client.answer().await, "Once upon a On there.");
    drop(call);
    // Once is enough.
    let mut client = asking(&gateway, &chat_stream("m1")).await;
    let mut call = unknown.accept().await;
    assert_asked_to_continue(call.body(), "Once upon a");
    send_all(&mut call, &same).await;
    call.end().await;
    assert_one(&client.answer().await, "Once upon a On there.");
}

#[tokio::test]
async fn a_server_of_unknown_kind_that_ignores_the_wish_never_doubles_a_text() {
    let (gpu_1, other) = (sim("gpu-1").await, sim("other").await);
    let good = sim("good").await;
    gpu_1.fault("die_at=5").await.unwrap();
    other.fault("continue=ignore").await.unwrap();
    // Alone, and with one behind it that can.
    for more in [None, Some("kind: vllm")] {
        let mut upstreams = vec![
            ("gpu-1", gpu_1.url(), "kind: vllm, models: [demo]"),
            ("other", other.url(), "kind: generic, concurrent: 9"),
        ];
        upstreams.extend(more.map(|keys| ("good", good.url(), keys)));
        let gateway = Gateway::start(&group(&upstreams)).await;
        other.clear_records();
        let mut whole = 0;
        for _ in 0..3 {
            let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
            let said = answer.content();
            assert_eq!(said.matches("answers:").count(), 1, "{said}");
            assert!(answer.status == 200, "{}", answer.text());
            whole += usize::from(answer.text().ends_with("data: [DONE]\n\n"));
        }
        assert_eq!(whole == 3, more.is_some(), "{whole}");
        let proofs = other.records();
        let proofs = proofs
            .iter()
            .filter(|one| String::from_utf8_lossy(&one.body).contains("continue_final_message"));
        assert_eq!(proofs.count(), 1);
    }
}

#[tokio::test]
async fn usage_is_the_sum_whether_the_client_asked_for_it_or_not() {
    for asked in [true, false] {
        let gpu_1 = Scripted::always(stream(&beginning())).await;
        let gpu_2 = Scripted::always(stream(&rest())).await;
        let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
        let options = format!(r#","stream_options":{{"include_usage":{asked}}},"messages""#);
        let body = chat_stream("demo").replace(r#","messages""#, &options);
        let answer = post_chat(gateway.addr, &body).await;
        assert_one(&answer, WHOLE);
        let shown: Vec<Value> = chunks(&answer)
            .into_iter()
            .map(|chunk| chunk["usage"].clone())
            .filter(|usage| *usage != Value::Null)
            .collect();
        let sum = json!({ "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15 });
        assert_eq!(
            shown,
            if asked { vec![sum] } else { vec![] },
            "{}",
            answer.text()
        );
        gateway.logged("tokens_in=10 tokens_out=5").await;
    }
}

#[tokio::test]
async fn usage_that_only_the_first_told_is_not_lost() {
    let mut begun = beginning();
    begun.push(usage("a-1", 10, 3));
    let gpu_1 = Scripted::always(stream(&begun)).await;
    let mut silent = rest();
    silent.remove(4);
    let gpu_2 = Scripted::always(stream(&silent)).await;
    let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
    let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_one(&answer, WHOLE);
    gateway.logged("tokens_in=10 tokens_out=5").await;
}

#[tokio::test]
async fn what_is_asked_for_in_its_place_counts_as_a_body() {
    const HELD: &str = "forebay_request_bodies_bytes";
    let (gpu_1, gpu_2) = (ByHand::listen().await, ByHand::listen().await);
    let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
    let body = chat_stream("demo");
    let mut client = asking(&gateway, &body).await;
    let mut call = gpu_1.accept().await;
    let counted = gateway.metric(HELD).await;
    assert!(counted >= Some(body.len() as f64), "{counted:?}");
    send_all(&mut call, &beginning()).await;
    client.read_until("\" a \"").await;
    drop(call);
    let mut call = gpu_2.accept().await;
    eventually("both are counted", || async {
        gateway.metric(HELD).await > Some((2 * body.len() + "Once upon a".len()) as f64)
    })
    .await;
    send_all(&mut call, &rest()).await;
    call.end().await;
    assert_one(&client.answer().await, WHOLE);
    gateway.metric_becomes(HELD, 0.0).await;
}

#[tokio::test]
async fn the_text_of_a_stream_counts_and_is_given_up_where_there_is_no_room_for_it() {
    const HELD: &str = "forebay_request_bodies_bytes";
    let piece = first(json!({ "content": "x".repeat(10_000) }));
    let begun = [vec![first(json!({ "role": "assistant" }))], vec![piece; 20]].concat();
    let (gpu_1, gpu_2) = (
        ByHand::listen().await,
        Scripted::always(stream(&rest())).await,
    );
    let yaml = format!(
        "limits: {{ body: 1MiB, bodies: 1MiB }}\n{}",
        two(gpu_1.url(), gpu_2.url())
    );
    let body = chat_stream("demo");
    let no_room = "forebay_limit_hits_total{limit=\"bodies\"}";
    for is_full in [false, true] {
        let gateway = Gateway::start(&yaml).await;
        let mut holder = Connection::open(gateway.addr).await;
        let mut held = 0.0;
        if is_full {
            // All but its end, which never comes.
            let head = format!("POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-length: 940000\r\n\r\n");
            holder.send(head.as_bytes()).await;
            holder.send(&vec![b' '; 939_000]).await;
            held = 940_000.0;
            gateway.metric_becomes(HELD, held).await;
        }
        let mut client = asking(&gateway, &body).await;
        let mut call = gpu_1.accept().await;
        send_all(&mut call, &begun).await;
        call.chunk(first(json!({ "content": "told" }))).await;
        client.read_until("told").await;
        let text = if is_full { 0.0 } else { 200_000.0 };
        eventually("the text counts", || async {
            let now = gateway.metric(HELD).await.unwrap() - held;
            (text..=2.0 * text + 1000.0).contains(&now)
        })
        .await;
        drop(call);
        let answer = client.answer().await;
        if is_full {
            assert_eq!(assert_broken_off(&answer), "upstream_incomplete");
            assert_eq!(gpu_2.asked(), 1);
            assert_eq!(gateway.metric(no_room).await, Some(1.0));
            gateway.logged("reason=no_room").await;
        } else {
            assert!(answer.text().ends_with("data: [DONE]\n\n"));
            assert_eq!(gpu_2.asked(), 1);
        }
        gateway.metric_becomes(HELD, held).await;
        drop(holder);
        gateway.metric_becomes(HELD, 0.0).await;
    }
}

#[tokio::test]
async fn the_bound_on_tokens_is_lowered_by_what_was_delivered() {
    for key in ["max_tokens", "max_completion_tokens"] {
        let gpu_1 = Scripted::always(stream(&beginning())).await;
        let gpu_2 = Scripted::always(stream(&rest())).await;
        let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
        let body =
            chat_stream("demo").replace(r#","messages""#, &format!(r#","{key}":10,"messages""#));
        assert_one(&post_chat(gateway.addr, &body).await, WHOLE);
        let asked: Value = serde_json::from_slice(&gpu_2.requests()[0].body).unwrap();
        assert_eq!(asked[key], 7);
    }
}

#[tokio::test]
async fn an_answer_with_all_its_tokens_is_complete() {
    let gpu_1 = Scripted::always(stream(&beginning())).await;
    let gpu_2 = Scripted::always(stream(&rest())).await;
    let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
    let body = chat_stream("demo").replace(r#","messages""#, r#","max_tokens":3,"messages""#);
    let answer = post_chat(gateway.addr, &body).await;
    assert_one(&answer, "Once upon a ");
    assert!(answer.text().contains(r#""finish_reason":"length""#));
    assert_eq!(gpu_2.asked(), 0);
    gateway.logged("ending=success").await;
}

#[tokio::test]
async fn the_end_that_is_told_in_its_place_goes_through_the_plugins() {
    let gpu_1 = Scripted::always(stream(&beginning())).await;
    let gpu_2 = Scripted::always(stream(&rest())).await;
    let plugins = "plugins:\n  - auth: none\n  - capture: { dir: captures }\n  - policy: { output: [{ mask: [\"a secret\"] }] }\n";
    let yaml = format!("{plugins}{}", two(gpu_1.url(), gpu_2.url()));
    let gateway = Gateway::start(&yaml).await;
    let body = chat_stream("demo").replace(r#","messages""#, r#","max_tokens":3,"messages""#);
    let answer = post_chat(gateway.addr, &body).await;
    // What the rule held back goes out before the end.
    assert_one(&answer, "Once upon a ");
    assert!(answer.text().contains(r#""finish_reason":"length""#));
    let line = || {
        let files = std::fs::read_dir(gateway.folder.path().join("captures")).ok()?;
        let texts = files.filter_map(|file| std::fs::read_to_string(file.ok()?.path()).ok());
        texts.into_iter().find(|text| text.ends_with('\n'))
    };
    eventually("it is captured", async || line().is_some()).await;
    let line: Value = serde_json::from_str(line().unwrap().trim()).unwrap();
    assert_eq!(line["meta"]["finish_reason"], "length", "{line}");
    assert!(line.to_string().contains("Once upon a "), "{line}");
}

#[tokio::test]
async fn a_completion_goes_on_behind_its_prompt() {
    let text = |id: &str, text: &str, finish: Option<&str>| {
        let choice = json!({ "index": 0, "text": text, "finish_reason": finish });
        format!(
            "data: {}\n\n",
            json!({ "id": id, "object": "text_completion", "choices": [choice] })
        )
    };
    let gpu_1 = Scripted::always(stream(&[
        text("a-1", "Once", None),
        text("a-1", " upon ", None),
    ]))
    .await;
    let gpu_2 = Scripted::always(stream(&[
        text("b-1", " a time", None),
        text("b-1", "", Some("stop")),
        "data: [DONE]\n\n".to_owned(),
    ]))
    .await;
    // Every server can do that, whatever its kind.
    let config = group(&[("gpu-1", gpu_1.url(), ""), ("gpu-2", gpu_2.url(), "")]);
    let gateway = Gateway::start(&config).await;
    let body = r#"{"model":"demo","stream":true,"prompt":"Tell:\n","max_tokens":5}"#;
    let answer = post(gateway.addr, "/v1/completions", &[], body.as_bytes()).await;
    let said: String = chunks(&answer)
        .iter()
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    // No template trims a prompt: what comes is what follows.
    assert_eq!(said, "Once upon  a time", "{}", answer.text());
    assert!(chunks(&answer).iter().all(|chunk| chunk["id"] == "a-1"));
    assert!(answer.text().ends_with("data: [DONE]\n\n"));
    let asked: Value = serde_json::from_slice(&gpu_2.requests()[0].body).unwrap();
    assert_eq!(asked["prompt"], "Tell:\nOnce upon ");
    assert_eq!(asked["max_tokens"], 3);
}

#[tokio::test]
async fn an_http2_client_reads_one_answer_too() {
    let gpu_1 = Scripted::always(stream(&beginning())).await;
    let gpu_2 = Scripted::always(stream(&rest())).await;
    let gateway = Gateway::start(&two(gpu_1.url(), gpu_2.url())).await;
    let work = async {
        let socket = TcpStream::connect(gateway.addr).await.unwrap();
        let (sender, connection) = h2::client::handshake(socket).await.unwrap();
        tokio::spawn(connection);
        let mut sender = sender.ready().await.unwrap();
        let request = http::Request::post(format!("http://forebay.test{PATH}"))
            .version(http::Version::HTTP_2)
            .body(())
            .unwrap();
        let (answer, mut body) = sender.send_request(request, false).unwrap();
        body.send_data(Bytes::from(chat_stream("demo")), true)
            .unwrap();
        let (head, mut body) = answer.await.unwrap().into_parts();
        let mut answer = Answer {
            status: head.status.as_u16(),
            headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
            body: Vec::new(),
            complete: true,
        };
        while let Some(piece) = body.data().await {
            answer.body.extend_from_slice(&piece.unwrap());
        }
        answer
    };
    assert_one(&soon("an answer", work).await, WHOLE);
}

#[tokio::test]
async fn a_client_that_waits_for_the_rest_hears_from_us_and_its_leaving_ends_all() {
    let (gpu_1, gpu_2) = (ByHand::listen().await, ByHand::listen().await);
    let config = two(gpu_1.url(), gpu_2.url()) + "limits: { heartbeat: 150ms }\n";
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway, &chat_stream("demo")).await;
    let mut call = gpu_1.accept().await;
    send_all(&mut call, &beginning()).await;
    client.read_until("\" a \"").await;
    drop(call);
    let call = gpu_2.accept().await;
    client.read_until(": ping").await;
    drop(client);
    call.closed().await;
    gateway.metric_becomes(IN_FLIGHT, 0.0).await;
    gateway.logged("ending=client_closed").await;
}

#[tokio::test]
async fn a_rest_that_stays_away_costs_a_first_token_time_and_no_more() {
    let gpu_1 = Scripted::always(stream(&beginning())).await;
    let gpu_2 = ByHand::listen().await;
    let gpu_3 = Scripted::always(stream(&rest())).await;
    let config = group(&[
        ("gpu-1", gpu_1.url(), "kind: vllm"),
        (
            "gpu-2",
            gpu_2.url(),
            "kind: vllm, timeouts: { first_token: 300ms }",
        ),
        ("gpu-3", gpu_3.url(), "kind: vllm"),
    ]);
    let gateway = Gateway::start(&config).await;
    let body = chat_stream("demo");
    let client = asking(&gateway, &body);
    let (mut client, mut call) = tokio::join!(client, gpu_2.accept());
    // Comments and the role are no token.
    send_all(&mut call, &[": hm\n\n".to_owned(), rest().swap_remove(0)]).await;
    assert_one(&client.answer().await, WHOLE);
    call.closed().await;
}

#[tokio::test]
async fn one_simulator_goes_on_with_the_words_of_another() {
    for at in [2, 5, 12, 24] {
        let (gpu_1, gpu_2) = (sim("gpu-1").await, sim("gpu-2").await);
        let whole = post_chat(gpu_2.addr(), &chat("demo")).await.content();
        gpu_1.fault(&format!("die_at={at}")).await.unwrap();
        let config = group(&[("gpu-1", gpu_1.url(), ""), ("gpu-2", gpu_2.url(), "")]);
        let gateway = Gateway::start(&config).await;
        let answer = post_chat(gateway.addr, &chat_stream("demo")).await;
        assert_eq!(answer.content(), whole.replace("gpu-2", "gpu-1"), "{at}");
        assert_eq!(answer.events().last().unwrap(), "[DONE]");
    }
}

#[tokio::test]
async fn half_an_answer_waits_for_who_is_only_busy() {
    let (gpu_1, gpu_2) = (ByHand::listen().await, sim("gpu-2").await);
    let upstreams = [
        upstream_at("gpu-1", &gpu_1.url(), "kind: vllm"),
        upstream_at("gpu-2", &gpu_2.url(), "kind: vllm, concurrent: 1"),
    ];
    // The line in front of them has no place at all.
    let config = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
        group_of("gpus", "queue: { size: 0 }", &upstreams).replace("size: 0", "size: 0, wait: 1ms")
    );
    let gateway = Gateway::start(&config).await;
    let mut client = asking(&gateway, &chat_stream("demo")).await;
    let mut call = gpu_1.accept().await;
    send_all(&mut call, &beginning()).await;
    client.read_until("\" a \"").await;
    gpu_2.fault("times=1;hang").await.unwrap();
    let other = asking(&gateway, &chat_stream("demo")).await;
    gpu_2
        .wait_for(DEADLINE, |records| records.len() == 1)
        .await
        .unwrap();
    drop(call);
    // There is a place for it all the same.
    let waiting = r#"forebay_queue_length{class="interactive",group="gpus"}"#;
    gateway.metric_becomes(waiting, 1.0).await;
    drop(other);
    let answer = client.answer().await;
    assert!(
        answer.content().starts_with("Once upon a "),
        "{}",
        answer.text()
    );
    assert!(
        answer.text().ends_with("data: [DONE]\n\n"),
        "{}",
        answer.text()
    );
    assert_asked_to_continue(&gpu_2.records()[1].body, "Once upon a");
    let given_up =
        r#"forebay_queue_wait_seconds_count{class="interactive",group="gpus",outcome="timeout"}"#;
    assert_eq!(gateway.metric(given_up).await, None);
}
