//! The plugin as the chain sees it: answers, whole and in pieces.

use http::{HeaderMap, Method};
use serde_json::{Value, json};

use super::*;
use crate::{
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
