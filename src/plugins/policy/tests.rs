//! The plugin as the chain sees it: answers, whole and in pieces.

use http::{HeaderMap, Method};
use serde_json::{Value, json};

use super::*;
use crate::{
    config::PluginEntry,
    openai::{Endpoint, Framer},
    resources::Resources,
};

fn policy(config: Value) -> std::result::Result<Policy, ConfigError> {
    let config = serde_json::from_value(config).unwrap();
    let build = Build {
        base: std::path::Path::new("."),
        resources: &Resources::default(),
        list: "",
        store: None,
    };
    Policy::configure(config, &build)
}

fn ctx(endpoint: Endpoint, body: &Value) -> RequestContext {
    let mut ctx = RequestContext::new(
        "id".into(),
        [127, 0, 0, 1].into(),
        Method::POST,
        endpoint.path().into(),
        HeaderMap::new(),
    );
    let body = body.to_string();
    ctx.request = Some(ApiRequest::parse(endpoint, body.into(), 64).unwrap());
    ctx
}

fn chat(n: u32) -> RequestContext {
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let body = json!({ "model": "m", "n": n, "messages": messages });
    ctx(Endpoint::ChatCompletions, &body)
}

fn delta(index: u32, delta: Value, finish: Option<&str>) -> String {
    json!({ "id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{ "index": index, "delta": delta, "finish_reason": finish }] })
    .to_string()
}

fn said(index: u32, text: &str) -> String {
    delta(index, json!({ "content": text }), None)
}

/// Sends events through, and returns those that came out, without `[DONE]`, and
/// how it ended.
fn stream(policy: &Policy, ctx: &mut RequestContext, events: &[String]) -> (Vec<Value>, Pass) {
    let mut out = Vec::new();
    let mut pass = Pass::On;
    for event in events {
        pass = policy
            .on_event(ctx, &Frame::of_data(event.as_bytes()), &mut out)
            .unwrap();
        if pass == Pass::End {
            break;
        }
    }
    let mut framer = Framer::new(1 << 20);
    for frame in out {
        framer.push(&frame.raw);
    }
    let frames = std::iter::from_fn(|| framer.next());
    let data = frames.map(|frame| frame.unwrap().data.unwrap());
    let values = data.filter(|data| &data[..] != b"[DONE]");
    (
        values
            .map(|data| serde_json::from_slice(&data).unwrap())
            .collect(),
        pass,
    )
}

/// What a choice says under a name of its delta.
fn told(events: &[Value], index: u64, name: &str) -> String {
    let choices = events
        .iter()
        .flat_map(|event| event["choices"].as_array().unwrap());
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice["delta"][name].as_str())
        .collect()
}

fn finishes(events: &[Value], index: u64) -> Vec<String> {
    let choices = events
        .iter()
        .flat_map(|event| event["choices"].as_array().unwrap());
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| Some(choice["finish_reason"].as_str()?.to_owned()))
        .collect()
}

#[test]
fn a_stream_cut_anywhere_becomes_the_same() {
    let policy = policy(json!({ "output": [
        { "replace": ["secret[0-9]*"], "with": "[x]" },
        { "mask": [r"\[x\]!"] },
    ]}))
    .unwrap();
    let text = "a secret12! and a secre ż secret";
    for cut in (0..=text.len()).filter(|&at| text.is_char_boundary(at)) {
        let (before, after) = text.split_at(cut);
        let events = [
            delta(0, json!({ "role": "assistant", "content": "" }), None),
            said(0, before),
            said(0, after),
            delta(0, json!({}), Some("stop")),
            "[DONE]".to_owned(),
        ];
        let (out, pass) = stream(&policy, &mut chat(1), &events);
        assert_eq!(
            told(&out, 0, "content"),
            "a **** and a secre ż [x]",
            "{cut}"
        );
        assert_eq!(finishes(&out, 0), ["stop"]);
        assert_eq!(pass, Pass::On);
    }
}

#[test]
fn what_is_held_back_goes_out_before_the_end_or_another_text() {
    let policy = policy(json!({ "output": [{ "deny": ["secret"] }] })).unwrap();
    let events = [
        delta(0, json!({ "reasoning_content": "se" }), None),
        said(0, "cret? sec"),
        delta(
            0,
            json!({ "tool_calls": [{ "index": 0, "function": { "arguments": "ret" } }] }),
            None,
        ),
        said(1, "se"),
        "[DONE]".to_owned(),
    ];
    let (out, _) = stream(&policy, &mut chat(2), &events);
    assert_eq!(told(&out, 0, "reasoning_content"), "se");
    assert_eq!(told(&out, 0, "content"), "cret? sec");
    assert_eq!(told(&out, 1, "content"), "se");
    let of = |text: &str| {
        out.iter()
            .position(|event| event.to_string().contains(text))
            .unwrap()
    };
    assert!(of("reasoning_content") < of("cret?"));
    assert!(of("sec\"") < of("arguments"));
}

#[test]
fn a_denied_stream_ends_with_content_filter_for_every_choice() {
    let policy = policy(json!({ "output": [{ "deny": ["secret"] }] })).unwrap();
    let events = [
        said(0, "it is "),
        said(1, "fine"),
        delta(2, json!({}), Some("stop")),
        said(0, "a sec"),
        said(0, "ret of"),
        said(1, "never seen"),
    ];
    let (out, pass) = stream(&policy, &mut chat(3), &events);
    assert_eq!(pass, Pass::End);
    assert_eq!(told(&out, 0, "content"), "it is a ");
    assert_eq!(told(&out, 1, "content"), "fine");
    assert_eq!(finishes(&out, 0), ["content_filter"]);
    assert_eq!(finishes(&out, 1), ["content_filter"]);
    assert_eq!(finishes(&out, 2), ["stop"]);
    assert_eq!(out.last().unwrap()["id"], "x");
}

#[test]
fn one_event_with_several_choices_is_taken_apart() {
    let policy = policy(json!({ "output": [{ "deny": ["bad"] }] })).unwrap();
    let event = json!({ "id": "x", "choices": [
        { "index": 0, "delta": { "content": "good" } },
        { "index": 1, "delta": { "content": "a bad one" } },
        { "index": 2, "delta": { "content": "late" } },
    ]});
    let (out, pass) = stream(&policy, &mut chat(3), &[event.to_string()]);
    assert_eq!(pass, Pass::End);
    assert_eq!(told(&out, 0, "content"), "good");
    assert_eq!(told(&out, 1, "content"), "a ");
    assert_eq!(told(&out, 2, "content"), "");
}

#[test]
fn usage_and_what_nobody_looks_at_pass_as_they_came() {
    let policy = policy(json!({ "output": [{ "mask": ["secret"] }] })).unwrap();
    let usage = r#"{"id":"x", "choices":[],"usage":{"total_tokens":1.50}}"#;
    let mut context = chat(1);
    for event in [
        usage,
        &said(0, "nothing of it"),
        r#"{"choices":[{"index":0,"delta":{"x":1}}]}"#,
    ] {
        let frame = Frame::of_data(event.as_bytes());
        let mut out = Vec::new();
        policy.on_event(&mut context, &frame, &mut out).unwrap();
        assert_eq!(out, [frame]);
    }
}

#[test]
fn logprobs_do_not_tell_what_was_masked() {
    let policy = policy(json!({ "output": [{ "mask": ["secret"] }] })).unwrap();
    let event = json!({ "choices": [{ "index": 0, "delta": { "content": "a secret, no" },
        "logprobs": { "content": [{ "token": "secret" }] } }] });
    let (out, _) = stream(&policy, &mut chat(1), &[event.to_string()]);
    assert_eq!(told(&out, 0, "content"), "a ******, no");
    assert!(!out[0].to_string().contains("secret"));
}

fn whole(config: Value, endpoint: Endpoint, answer: &Value) -> Value {
    let mut body = Bytes::from(answer.to_string());
    let request = match endpoint {
        Endpoint::Responses => ctx(endpoint, &json!({ "model": "m", "input": "hi" })),
        Endpoint::Completions => ctx(endpoint, &json!({ "model": "m", "prompt": "hi" })),
        _ => chat(1),
    };
    let mut request = request;
    policy(config)
        .unwrap()
        .on_body(&mut request, &mut body)
        .unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn a_whole_answer_is_cut_where_it_is_denied() {
    let answer = json!({ "choices": [
        { "index": 0, "finish_reason": "tool_calls", "logprobs": { "content": [] }, "message":
            { "role": "assistant", "reasoning": "hm", "content": "a bad one",
              "tool_calls": [{ "function": { "arguments": "{}" } }] } },
        { "index": 1, "finish_reason": "stop", "message": { "content": "good" } },
    ], "usage": { "total_tokens": 3 } });
    let config = json!({ "output": [{ "deny": ["bad"] }] });
    let out = whole(config.clone(), Endpoint::ChatCompletions, &answer);
    let first = json!({ "index": 0, "finish_reason": "content_filter", "logprobs": null,
        "message": { "role": "assistant", "reasoning": "hm", "content": "a " } });
    assert_eq!(out["choices"][0], first);
    assert_eq!(out["choices"][1], answer["choices"][1]);
    assert_eq!(out["usage"], answer["usage"]);

    let answer = json!({ "choices": [{ "index": 0, "text": "so bad", "finish_reason": "stop" }] });
    let out = whole(config.clone(), Endpoint::Completions, &answer);
    assert_eq!(out["choices"][0]["text"], "so ");
    assert_eq!(out["choices"][0]["finish_reason"], "content_filter");

    let answer = json!({ "status": "completed", "output": [
        { "type": "reasoning", "summary": [{ "type": "summary_text", "text": "hm" }] },
        { "type": "message", "content": [{ "type": "output_text", "text": "so bad" }] },
        { "type": "function_call", "arguments": "{}" } ] });
    let out = whole(config, Endpoint::Responses, &answer);
    assert_eq!(out["status"], "incomplete");
    assert_eq!(out["incomplete_details"]["reason"], "content_filter");
    assert_eq!(out["output"][1]["content"][0]["text"], "so ");
    assert_eq!(out["output"].as_array().unwrap().len(), 2);
}

#[test]
fn arguments_of_tools_are_looked_at_where_a_rule_says_so() {
    let config = json!({ "output": [{ "deny": ["rm -rf"], "texts": ["tools"] }] });
    let policy = policy(config).unwrap();
    let call = |arguments: &str| {
        let function = json!({ "arguments": arguments });
        delta(
            0,
            json!({ "tool_calls": [{ "index": 0, "function": function }] }),
            None,
        )
    };
    let events = [
        said(0, "rm -rf is fine here"),
        call("{\"c\":\"rm -"),
        call("rf /\"}"),
    ];
    let (out, pass) = stream(&policy, &mut chat(1), &events);
    assert_eq!(pass, Pass::End);
    assert!(told(&out, 0, "content").contains("fine"));
    assert_eq!(finishes(&out, 0), ["content_filter"]);
    let all = out.iter().map(Value::to_string).collect::<String>();
    assert!(!all.contains("rm -\\\""), "{all}");
}

#[test]
fn a_streamed_response_is_masked_and_denied() {
    let delta = |text: &str| {
        json!({ "type": "response.output_text.delta", "item_id": "i", "output_index": 0,
            "content_index": 0, "delta": text })
        .to_string()
    };
    let item = |text: &str| json!({ "type": "message", "content": [{ "type": "output_text", "text": text }] });
    let text = "a secret";
    let done = json!({ "type": "response.output_text.done", "output_index": 0, "text": text });
    let completed = json!({ "type": "response.completed",
        "response": { "id": "r", "status": "completed", "output": [item(text)] } });
    let created = json!({ "type": "response.created",
        "response": { "id": "r", "status": "in_progress", "instructions": "no secret", "output": [] } });
    let events = [
        created.to_string(),
        delta("a sec"),
        delta("ret"),
        done.to_string(),
        completed.to_string(),
    ];
    let body = json!({ "model": "m", "input": "hi", "stream": true });

    let mask = policy(json!({ "output": [{ "mask": ["secret"] }] })).unwrap();
    let (out, pass) = stream(&mask, &mut ctx(Endpoint::Responses, &body), &events);
    assert_eq!(pass, Pass::On);
    let told: String = out
        .iter()
        .filter_map(|event| event["delta"].as_str())
        .collect();
    assert_eq!(told, "a ******");
    assert_eq!(out[0], created);
    let text_of = |event: &Value| event["response"]["output"][0]["content"][0]["text"].clone();
    assert_eq!(text_of(out.last().unwrap()), "a ******");

    let deny = policy(json!({ "output": [{ "deny": ["secret"] }] })).unwrap();
    let (out, pass) = stream(&deny, &mut ctx(Endpoint::Responses, &body), &events);
    assert_eq!(pass, Pass::End);
    let last = out.last().unwrap();
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(
        last["response"]["incomplete_details"]["reason"],
        "content_filter"
    );
    assert_eq!(last["response"]["id"], "r");
    assert_eq!(text_of(last), "a ");
}

#[test]
fn whatever_a_streamed_response_says_its_text_in_it_is_looked_at() {
    let body = json!({ "model": "m", "input": "hi", "stream": true });
    let mask = policy(json!({ "output": [{ "mask": ["secret"] }] })).unwrap();
    let deny =
        json!({ "output": [{ "deny": ["secret"], "texts": ["answer", "reasoning", "tools"] }] });
    let deny = policy(deny).unwrap();
    for (name, is_call) in [
        ("response.audio.transcript", false),
        ("response.reasoning_summary", false),
        ("response.reasoning", false),
        ("response.something_new", false),
        ("response.custom_tool_call_input", true),
        ("response.mcp_call_arguments", true),
        ("response.code_interpreter_call_code", true),
    ] {
        let delta = |delta: Value| {
            let name = format!("{name}.delta");
            json!({ "type": name, "item_id": "i", "output_index": 0, "obfuscation": "secret", "delta": delta })
                .to_string()
        };
        let done = json!({ "type": format!("{name}.done"), "output_index": 0, "item_id": "i" });
        for nest in [
            |text: &str| json!(text),
            |text: &str| json!({ "type": "t", "text": text }),
        ] {
            let events = [
                delta(nest("a sec")),
                delta(nest("ret and a se")),
                done.to_string(),
            ];
            let mut context = ctx(Endpoint::Responses, &body);
            let (out, pass) = stream(&deny, &mut context, &events);
            assert_eq!(pass, Pass::End, "{name}");
            let all = out.iter().map(|event| event["delta"].to_string());
            assert!(!all.collect::<String>().contains("sec"), "{name} {out:?}");
            if is_call {
                continue;
            }
            let mut context = ctx(Endpoint::Responses, &body);
            let (out, _) = stream(&mask, &mut context, &events);
            let texts = out.iter().filter_map(|event| {
                let delta = &event["delta"];
                delta.as_str().or_else(|| delta["text"].as_str())
            });
            let told: String = texts.collect();
            assert_eq!(told, "a ****** and a se", "{name}");
            assert_eq!(out.last().unwrap()["type"], done["type"]);
        }
    }
}

#[test]
fn items_of_a_response_are_looked_at_whatever_they_are() {
    let config =
        json!({ "output": [{ "deny": ["secret"], "texts": ["answer", "reasoning", "tools"] }] });
    let deny = policy(config.clone()).unwrap();
    let body = json!({ "model": "m", "input": "hi", "stream": true });
    for item in [
        json!({ "type": "custom_tool_call", "id": "i", "name": "f", "input": "a secret" }),
        json!({ "type": "function_call", "name": "secret", "arguments": "{}" }),
        json!({ "type": "reasoning", "summary": [{ "type": "summary_text", "text": "a secret" }] }),
        json!({ "type": "message", "content": [{ "type": "output_audio", "transcript": "a secret" }] }),
        json!({ "type": "brand_new", "deep": [{ "new": "a secret" }] }),
    ] {
        let event = json!({ "type": "response.output_item.done", "output_index": 0, "item": item });
        let mut context = ctx(Endpoint::Responses, &body);
        let (out, pass) = stream(&deny, &mut context, &[event.to_string()]);
        assert_eq!(pass, Pass::End, "{item}");
        assert!(!out[0].to_string().contains("secret"), "{out:?}");
        let answer =
            json!({ "status": "completed", "instructions": "keep the secret", "output": [item] });
        let out = whole(config.clone(), Endpoint::Responses, &answer);
        assert_eq!(out["status"], "incomplete", "{out}");
        assert!(!out["output"].to_string().contains("secret"), "{out}");
    }
}

#[test]
fn every_text_of_a_choice_is_looked_at_whatever_its_name() {
    let mask = policy(json!({ "output": [{ "mask": ["secret"] }] })).unwrap();
    let events = [
        delta(
            0,
            json!({ "role": "assistant", "audio": { "id": "secret", "transcript": "a sec" }, "content": "one sec" }),
            None,
        ),
        delta(
            0,
            json!({ "audio": { "data": "secret", "transcript": "ret and a se" }, "content": "ret" }),
            None,
        ),
        delta(0, json!({}), Some("stop")),
    ];
    let (out, _) = stream(&mask, &mut chat(1), &events);
    let choices = out
        .iter()
        .flat_map(|event| event["choices"].as_array().unwrap());
    let transcript: String = choices
        .filter_map(|choice| choice["delta"]["audio"]["transcript"].as_str())
        .collect();
    assert_eq!(transcript, "a ****** and a se");
    assert_eq!(told(&out, 0, "content"), "one ******");
    assert_eq!(finishes(&out, 0), ["stop"]);

    // Citations come in one piece, and stay in one.
    let citation = |title: &str| json!([{ "type": "url_citation", "url_citation": { "url": "https://a.b/se", "title": title } }]);
    let events = [
        delta(
            0,
            json!({ "annotations": citation("a secret, a se") }),
            None,
        ),
        delta(0, json!({}), Some("stop")),
    ];
    let (out, _) = stream(&mask, &mut chat(1), &events);
    let annotations = &out[0]["choices"][0]["delta"]["annotations"];
    assert_eq!(*annotations, citation("a ******, a se"));
    assert_eq!(out.len(), 2);

    let config = json!({ "output": [{ "deny": ["secret"], "texts": ["answer", "tools"] }] });
    let deny = policy(config.clone()).unwrap();
    let call = |call: Value| json!({ "tool_calls": [call] });
    for said in [
        vec![json!({ "audio": { "transcript": "secret" } })],
        vec![
            json!({ "brand_new": { "text": "a sec" } }),
            json!({ "brand_new": { "text": "ret" } }),
        ],
        vec![json!({ "content": [{ "type": "new", "words": "secret" }] })],
        vec![call(
            json!({ "index": 0, "function": { "name": "secret", "arguments": "" } }),
        )],
        vec![json!({ "function_call": { "name": "secret" } })],
        vec![
            call(json!({ "index": 0, "custom": { "name": "f", "input": "sec" } })),
            call(json!({ "index": 0, "custom": { "input": "ret" } })),
        ],
    ] {
        let events: Vec<String> = said
            .iter()
            .map(|said| delta(0, said.clone(), None))
            .collect();
        let (out, pass) = stream(&deny, &mut chat(1), &events);
        assert_eq!(pass, Pass::End, "{said:?}");
        assert_eq!(finishes(&out, 0), ["content_filter"], "{said:?}");
        assert!(!format!("{out:?}").contains("sec"), "{out:?}");
        if let [message] = &said[..] {
            let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
            let answer = json!({ "choices": [choice] });
            let out = whole(config.clone(), Endpoint::ChatCompletions, &answer);
            assert_eq!(out["choices"][0]["finish_reason"], "content_filter");
            assert!(!out.to_string().contains("secret"), "{out}");
        }
    }
}

async fn ask(policy: &Policy, ctx: &mut RequestContext) -> Result<()> {
    policy.on_request(ctx).await.map(|_| ())
}

#[tokio::test]
async fn prompts_are_denied_replaced_and_begun() {
    let config = json!({ "prompt": [
        { "name": "words", "deny": ["(?i)top\\s+secret"], "status": 403, "code": "no_secrets", "message": "not here" },
        { "replace": ["cat"], "with": "\"dog\"\n" },
        { "mask": ["[0-9]{4}"], "roles": ["tool"] },
        { "prepend": "Be kind." },
        { "prepend": "Be brief." },
    ]});
    let policy = policy(config).unwrap();
    let asked = |messages: &str| {
        let body =
            format!(r#"{{"seed":12345678901234567890123, "model":"m","messages":{messages}}}"#);
        let mut context = chat(1);
        context.request =
            Some(ApiRequest::parse(Endpoint::ChatCompletions, body.into(), 64).unwrap());
        context
    };
    let mut context = asked(
        r#"[ {"role":"system" ,"content":"A c\u0061t. 1234"}, {"role":"user","x":1.0,"content":[{"type":"text","text":"cat"}]}, {"role":"tool","content":"1234"} ]"#,
    );
    ask(&policy, &mut context).await.unwrap();
    let expected = r#"{"seed":12345678901234567890123, "model":"m","messages":[ {"role":"system" ,"content":"Be kind.\n\nBe brief.\n\nA \"dog\"\n. 1234"}, {"role":"user","x":1.0,"content":[{"type":"text","text":"\"dog\"\n"}]}, {"role":"tool","content":"****"} ]}"#;
    assert_eq!(context.request.unwrap().raw, expected);

    let mut context = asked(r#"[{"role":"user","content":"hi"}]"#);
    ask(&policy, &mut context).await.unwrap();
    let raw = context.request.unwrap().raw;
    let text = std::str::from_utf8(&raw).unwrap();
    assert!(text.ends_with(
        r#""messages":[{"role":"system","content":"Be kind.\n\nBe brief."},{"role":"user","content":"hi"}]}"#
    ), "{text}");

    for messages in [
        r#"[{"role":"user","content":"TOP \u0053ecret"}]"#,
        r#"[{"content":[{"Text":"top\nsecret"}]}]"#,
    ] {
        let mut context = asked(messages);
        let error = ask(&policy, &mut context).await.unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.code.as_deref()),
            (403, Some("no_secrets"))
        );
        assert_eq!(error.message, "not here");
        assert!(context.request.is_some());
    }
}

#[tokio::test]
async fn a_denied_text_is_found_wherever_a_model_would_read_it() {
    let body = |more: Value, messages: Value| {
        let mut body = json!({ "model": "m", "messages": messages });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    };
    let text = |text: &str| json!({ "type": "text", "text": text });
    let user = |content: Value| json!([{ "role": "user", "content": content }]);
    let function = json!({ "name": "f", "description": "forbidden" });
    let arguments = json!({ "name": "f", "arguments": "{\"x\":\"forbidden\"}" });
    let city = json!({ "type": "object", "properties": { "forbidden": { "type": "string" } } });
    let hi = || user(json!("hi"));
    let denied = [
        (json!({}), user(json!([text("forb"), text("idden")]))),
        (json!({}), user(json!([text("very"), text("bad")]))),
        (
            json!({}),
            json!([{ "role": "user", "name": "forbidden", "content": "hi" }]),
        ),
        (
            json!({}),
            json!([{ "role": "assistant", "content": "forbidden" }]),
        ),
        (
            json!({}),
            json!([{ "role": "tool", "content": "forbidden" }]),
        ),
        (
            json!({}),
            json!([{ "role": "assistant", "tool_calls": [{ "type": "function", "function": arguments }] }]),
        ),
        (
            json!({ "tools": [{ "type": "function", "function": function }] }),
            hi(),
        ),
        (
            json!({ "functions": [{ "name": "f", "parameters": city }] }),
            hi(),
        ),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": city } } }),
            hi(),
        ),
    ];
    let rule = json!({ "deny": ["forbidden", "very\\s+bad"] });
    let all = policy(json!({ "prompt": [rule] })).unwrap();
    let narrow = json!({ "deny": ["forbidden"], "roles": ["system"] });
    let narrow = policy(json!({ "prompt": [narrow] })).unwrap();
    for (more, messages) in denied {
        let asked = ctx(Endpoint::ChatCompletions, &body(more, messages));
        let mut again = chat(1);
        again.request.clone_from(&asked.request);
        let mut asked = asked;
        let error = ask(&all, &mut asked).await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("content_policy_violation"));
        ask(&narrow, &mut again).await.unwrap();
    }
    for (more, messages) in [
        (
            json!({}),
            json!([{ "role": "user", "content": "forb" }, { "role": "user", "content": "idden" }]),
        ),
        (
            json!({ "user": "forbidden", "metadata": { "a": "forbidden" } }),
            hi(),
        ),
        (
            json!({}),
            user(
                json!([text("hi"), { "type": "image_url", "image_url": { "url": "data:,forbidden" } }]),
            ),
        ),
    ] {
        let mut asked = ctx(Endpoint::ChatCompletions, &body(more, messages));
        ask(&all, &mut asked).await.unwrap();
    }
    let config = json!({ "prompt": [{ "mask": ["a"], "roles": ["definitions"] }] });
    assert_eq!(policy(config).err().unwrap().path, "policy.prompt[0].roles");
}

#[tokio::test]
async fn what_an_earlier_rule_took_out_is_not_denied() {
    let config =
        json!({ "prompt": [{ "replace": ["forbidden"], "with": "x" }, { "deny": ["forbidden"] }] });
    let policy = policy(config).unwrap();
    let messages = json!([{ "role": "user", "content": "forbidden" }]);
    let body = json!({ "model": "m", "messages": messages });
    ask(&policy, &mut ctx(Endpoint::ChatCompletions, &body))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_large_prompt_is_looked_at_elsewhere_with_the_same_outcome() {
    let policy = policy(json!({ "prompt": [{ "deny": ["needle"] }] })).unwrap();
    let long = format!("{}needle", "hay \u{2028} ".repeat(200_000));
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": long }] });
    let error = ask(&policy, &mut ctx(Endpoint::ChatCompletions, &body))
        .await
        .unwrap_err();
    assert_eq!(error.code.as_deref(), Some("content_policy_violation"));
}

#[tokio::test]
async fn nobody_hides_a_prompt_in_token_ids() {
    let policy = policy(json!({ "prompt": [{ "deny": ["x"] }] })).unwrap();
    for prompt in [json!([1, 2]), json!([[1], [2]])] {
        let body = json!({ "model": "m", "prompt": prompt });
        let error = ask(&policy, &mut ctx(Endpoint::Completions, &body))
            .await
            .unwrap_err();
        assert_eq!(error.code.as_deref(), Some("unsupported_value"));
    }
}

#[tokio::test]
async fn trusted_keys_may_send_what_others_may_not() {
    let policy = policy(json!({ "parameters": { "trusted": ["admin-*"] } })).unwrap();
    let image = json!([{ "type": "image_url", "image_url": { "url": "http://h.example/a" } }]);
    let body = json!({ "model": "m", "chat_template": "t", "we\nird": 1, "messages": [{ "role": "user", "content": image }] });
    let principal = |name: &str| {
        Some(Arc::new(Principal {
            name: name.into(),
            models: Vec::new(),
            groups: None,
            pin: false,
            local: false,
            class: crate::context::Class::Interactive,
            limits: Default::default(),
            budget: Default::default(),
            capture: true,
        }))
    };
    let mut context = ctx(Endpoint::ChatCompletions, &body);
    context.principal = principal("admin-1");
    ask(&policy, &mut context).await.unwrap();
    assert!(context.request.unwrap().get("chat_template").is_some());
    assert!(context.reply.is_empty());
    for who in [None, principal("bob")] {
        let mut context = ctx(Endpoint::ChatCompletions, &body);
        context.principal = who;
        let error = ask(&policy, &mut context).await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("media_not_allowed"));
    }
}

#[test]
fn what_is_dropped_is_told_in_plain_letters() {
    assert_eq!(told_names(&["a", "ż\r\nx"]), Some("a, ???x".to_owned()));
    let many: Vec<String> = (0..25).map(|n| format!("p{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(told_names(&many).unwrap().ends_with("p19, +5"));
    assert_eq!(told_names(&[]), None);
}

#[test]
fn a_search_in_front_of_the_rules_is_worth_a_warning() {
    let of = |names: &[&str]| {
        let mut config = Config::default();
        let entry = |name: &&str| PluginEntry {
            name: (*name).to_owned(),
            config: Value::Null,
        };
        config.plugins = names.iter().map(entry).collect();
        config
    };
    for settings in [
        json!({ "context": { "limit": 5 } }),
        json!({ "prompt": [{ "deny": ["a"] }] }),
    ] {
        let policy = policy(settings).unwrap();
        assert_eq!(policy.warnings(&of(&["rag", "policy"])).len(), 1);
        assert_eq!(policy.warnings(&of(&["policy", "rag"])).len(), 0);
        assert_eq!(policy.warnings(&of(&["policy"])).len(), 0);
    }
    let policy = policy(json!({})).unwrap();
    assert_eq!(policy.warnings(&of(&["rag", "policy"])).len(), 0);
}

#[tokio::test]
async fn what_is_left_of_the_context_is_told_to_who_comes_behind() {
    let policy = policy(json!({ "context": { "limit": 100 } })).unwrap();
    let body =
        json!({ "model": "m", "messages": [{ "role": "user", "content": "word".repeat(43) }] });
    let mut context = ctx(Endpoint::ChatCompletions, &body);
    ask(&policy, &mut context).await.unwrap();
    let room = context.room.unwrap();
    assert_eq!(room.tokens, 100 - 43 - 4 - 3);
    assert!(room.fits(&"word".repeat(42)) && !room.fits(&"word".repeat(43)));
}

#[tokio::test]
async fn rules_that_take_too_long_or_that_nobody_waits_for_end() {
    let config =
        json!({ "prompt": [{ "deny": ["foo.{0,200}bar.{0,200}baz"] }], "time_budget": "1ms" });
    let heavy = policy(config).unwrap();
    let long = "foo ".repeat(1_000_000);
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": long }] });
    let error = ask(&heavy, &mut ctx(Endpoint::ChatCompletions, &body))
        .await
        .unwrap_err();
    assert_eq!(error.code.as_deref(), Some("prompt_check_timeout"));
    assert_eq!(error.status, 400);

    let config =
        json!({ "prompt": [{ "deny": ["foo.{0,200}bar.{0,200}baz"] }], "time_budget": "60s" });
    let patient = policy(config).unwrap();
    let mut asked = ctx(Endpoint::ChatCompletions, &body);
    {
        let leaving = ask(&patient, &mut asked);
        let mut leaving = std::pin::pin!(leaving);
        assert!(futures_util::poll!(&mut leaving).is_pending());
    }
    // The thread gives its permit back when it ends: far before it is through.
    let threads = u32::try_from(std::thread::available_parallelism().map_or(2, usize::from));
    let all = patient.threads.acquire_many(threads.unwrap());
    let all = tokio::time::timeout(std::time::Duration::from_secs(30), all);
    assert!(all.await.is_ok());
}

fn told_names(names: &[&str]) -> Option<String> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    super::told(&names).map(|value| value.to_str().unwrap().to_owned())
}

#[test]
fn settings_that_make_no_sense_are_mistakes_with_their_place() {
    for (config, path) in [
        (json!({ "prompt": [{}] }), "policy.prompt[0]"),
        (
            json!({ "prompt": [{ "deny": ["a"], "mask": ["b"] }] }),
            "policy.prompt[0]",
        ),
        (
            json!({ "prompt": [{ "deny": ["a"], "status": 401 }] }),
            "policy.prompt[0].status",
        ),
        (
            json!({ "output": [{ "mask": ["a"], "texts": ["tools"] }] }),
            "policy.output[0].texts",
        ),
        (
            json!({ "output": [{ "mask": ["a"], "name": "x" }, { "mask": ["a"], "name": "x" }] }),
            "policy.output[1].name",
        ),
        (json!({ "context": {} }), "policy.context"),
        (
            json!({ "parameters": { "limits": { "n": { "max": 4 } }, "force": { "n": 5 } } }),
            "policy.parameters.force.n",
        ),
        (
            json!({ "parameters": { "limits": { "max_tokens": { "max": 4 } },
                "defaults": { "max_completion_tokens": 5 } } }),
            "policy.parameters.defaults.max_completion_tokens",
        ),
        (
            json!({ "parameters": { "force": { "best_of": 9 } , "limits": { "best_of": { "max": 8 } } } }),
            "policy.parameters.force.best_of",
        ),
        (
            json!({ "parameters": { "limits": { "model": { "max": 1 } } } }),
            "policy.parameters.limits.model",
        ),
        (
            json!({ "parameters": { "limits": { "temperature": {} } } }),
            "policy.parameters.limits.temperature",
        ),
        (
            json!({ "parameters": { "limits": { "n": { "max": 0 } } } }),
            "policy.parameters.limits.n.max",
        ),
    ] {
        let error = policy(config.clone()).err().unwrap();
        assert_eq!(error.path, path, "{config}");
    }
    assert!(
        !policy(json!({ "prompt": [{ "deny": ["a"] }] }))
            .unwrap()
            .wants()
            .edit
    );
}
