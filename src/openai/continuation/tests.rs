use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};

use super::*;
use crate::openai::{Framer, inspect};

const PLAIN: &str = r#"{ "model" : "m", "messages":[ {"role":"user","content":"hi"} ], "stream":true, "seed":12345678901234567890 }"#;

fn request(endpoint: Endpoint, body: &str) -> ApiRequest {
    ApiRequest::parse(endpoint, Bytes::copy_from_slice(body.as_bytes()), 64).unwrap()
}

fn chat(more: &str) -> ApiRequest {
    let body = PLAIN.replacen('{', &format!("{{{more}"), 1);
    request(Endpoint::ChatCompletions, &body)
}

fn completion(more: &str) -> ApiRequest {
    let body = format!(r#"{{{more}"model":"m","prompt":"Once\n","stream":true}}"#);
    request(Endpoint::Completions, &body)
}

fn frame(data: &str) -> Frame {
    let mut framer = Framer::new(1 << 20);
    framer.push(&Bytes::from(format!("data: {data}\n\n")));
    framer.next().unwrap().unwrap()
}

/// A chunk of the first upstream, whose delta is this.
fn first(delta: &Value) -> Frame {
    frame(&format!(
        r#"{{"id":"first-1","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":null}}]}}"#
    ))
}

/// A chunk of the next, whose delta is this.
fn next(delta: &Value) -> Frame {
    frame(&format!(
        r#"{{"id":"other-9","object":"chat.completion.chunk","created":1800000000,"model":"m2","system_fingerprint":"x","choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":null}}]}}"#
    ))
}

fn take(partial: &mut Partial, frame: &Frame) {
    let facts = inspect(partial.endpoint, frame);
    partial.take(frame, facts.content_events, facts.usage);
}

/// What is there when these texts were delivered behind the role.
fn delivered(request: &ApiRequest, texts: &[&str]) -> Partial {
    let mut partial = Partial::new(request, 1 << 20);
    if request.endpoint == Endpoint::ChatCompletions {
        take(
            &mut partial,
            &first(&json!({ "role": "assistant", "content": "" })),
        );
    }
    for text in texts {
        let event = match request.endpoint {
            Endpoint::ChatCompletions => first(&json!({ "content": text })),
            _ => frame(
                &json!({ "id": "first-1", "choices": [{ "index": 0, "text": text }] }).to_string(),
            ),
        };
        take(&mut partial, &event);
    }
    partial
}

fn ask_of(partial: &Partial, request: &ApiRequest) -> Ask {
    match partial.ask(request) {
        Ok(Rest::Ask(ask)) => *ask,
        other => panic!("{other:?}"),
    }
}

fn body(ask: &Ask) -> Value {
    serde_json::from_slice(&ask.request.raw).unwrap()
}

fn data(frame: &Frame) -> Value {
    serde_json::from_slice(frame.data.as_ref().unwrap()).unwrap()
}

/// What the client reads of these texts of a continuation.
fn read_on(sequel: &mut Sequel, texts: &[&str]) -> String {
    let mut read = String::new();
    for text in texts {
        if let Some(event) = sequel.fit(next(&json!({ "content": text }))).unwrap() {
            let delta = &data(&event)["choices"][0]["delta"];
            read.push_str(delta["content"].as_str().unwrap());
        }
    }
    read
}

#[test]
fn who_must_know_how_to_go_on_is_known_before_the_rest_is_asked_for() {
    for (request, texts, needed) in [
        (chat(""), &["Once", " upon"][..], true),
        (chat(r#""max_tokens":3,"#), &["Once", " upon"], true),
        (completion(""), &["Once"], true),
        // Nothing to go on from: anybody may begin.
        (chat(""), &[], false),
        (chat(""), &[" ", "\n"], false),
        // All its tokens are there: nobody is needed.
        (chat(r#""max_tokens":2,"#), &["Once", " upon"], false),
    ] {
        let partial = delivered(&request, texts);
        assert_eq!(partial.needs_one_who_knows(&request), needed, "{texts:?}");
        let asked = partial.ask(&request).unwrap();
        let does = matches!(&asked, Rest::Ask(ask) if ask.continues);
        assert_eq!(does, needed, "{texts:?}");
    }
}

#[test]
fn the_partial_is_put_behind_the_messages_and_no_other_byte_changes() {
    let request = chat("");
    let ask = ask_of(&delivered(&request, &["Hel", "lo \"you\"", "\n"]), &request);
    let raw = std::str::from_utf8(&ask.request.raw).unwrap();
    let expected = PLAIN
        .replace(
            "\"hi\"}",
            r#""hi"},{"role":"assistant","content":"Hello \"you\""}"#,
        )
        .replace(
            "12345678901234567890",
            r#"12345678901234567890,"continue_final_message":true,"add_generation_prompt":false"#,
        );
    assert_eq!(raw, expected);
    assert!(ask.continues);
}

#[test]
fn text_survives_wherever_it_is_cut_into_deltas() {
    let text = "żółć 😀 \"q\" \\ tab\t\u{1}\u{2028}end";
    let request = chat("");
    for at in (0..text.len()).filter(|at| text.is_char_boundary(*at)) {
        let (a, b) = text.split_at(at);
        let ask = ask_of(&delivered(&request, &[a, b]), &request);
        let messages = &body(&ask)["messages"];
        assert_eq!(
            messages[1],
            json!({ "role": "assistant", "content": text.trim_end() }),
            "{at}"
        );
    }
}

#[test]
fn a_pair_of_surrogates_in_two_deltas_is_one_character_and_half_of_one_is_no_text() {
    let request = chat("");
    let mut partial = Partial::new(&request, 1000);
    let half = |half: &str| {
        frame(&format!(
            r#"{{"id":"1","choices":[{{"delta":{{"content":"{half}"}}}}]}}"#
        ))
    };
    take(&mut partial, &half(r"a\ud83d"));
    assert_eq!(partial.ask(&request).unwrap_err(), Obstacle::NotText);
    take(&mut partial, &half(r"\ude00"));
    let ask = ask_of(&partial, &request);
    assert_eq!(body(&ask)["messages"][1]["content"], "a😀");
}

#[test]
fn what_the_client_let_the_assistant_begin_with_is_made_longer() {
    let body_of = |last: &str, more: &str| {
        let body = format!(
            r#"{{"model":"m","stream":true{more},"messages":[{{"role":"user","content":"hi"}},{last}]}}"#
        );
        request(Endpoint::ChatCompletions, &body)
    };
    let flags = r#","continue_final_message":true,"add_generation_prompt":false"#;
    let request = body_of(r#"{"role":"assistant","content":"Well, "}"#, flags);
    let ask = ask_of(&delivered(&request, &["hel", "lo "]), &request);
    assert_eq!(
        body(&ask)["messages"],
        json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "Well, hello" }])
    );
    for (last, more) in [
        // Some servers go on with it, others answer it.
        (r#"{"role":"assistant","content":"Well"}"#, ""),
        (r#"{"role":"user","content":"Well"}"#, flags),
        (
            r#"{"role":"user","content":"Well"}"#,
            r#","add_generation_prompt":false"#,
        ),
    ] {
        let request = body_of(last, more);
        let partial = delivered(&request, &["x"]);
        assert_eq!(
            partial.ask(&request).unwrap_err(),
            Obstacle::Prefill,
            "{last}"
        );
    }
    for last in [
        r#"{"role":"assistant","content":[{"type":"text","text":"Well"}]}"#,
        r#"{"role":"assistant","content":null}"#,
        r#"{"role":"assistant"}"#,
        r#"{"role":"assistant","content":"Well","tool_calls":[]}"#,
    ] {
        let request = body_of(last, flags);
        let partial = delivered(&request, &["x"]);
        assert_eq!(
            partial.ask(&request).unwrap_err(),
            Obstacle::Prefill,
            "{last}"
        );
    }
}

#[test]
fn a_prompt_is_gone_on_with_to_the_last_space() {
    let request = completion("");
    let mut ask = ask_of(&delivered(&request, &["there ", "was "]), &request);
    assert_eq!(body(&ask)["prompt"], "Once\nthere was ");
    assert!(body(&ask).get("continue_final_message").is_none());
    let event = frame(r#"{"id":"other","choices":[{"index":0,"text":" a"}]}"#);
    let event = ask.sequel.fit(event).unwrap().unwrap();
    assert_eq!(
        data(&event),
        json!({ "id": "first-1", "choices": [{ "index": 0, "text": " a" }] })
    );
}

#[test]
fn bounds_are_lowered_by_what_was_delivered() {
    for (more, key, left) in [
        (r#""max_tokens":10,"#, "max_tokens", 8),
        (r#""max_completion_tokens":3,"#, "max_completion_tokens", 1),
        (r#""n_predict":7,"#, "n_predict", 5),
        (r#""min_tokens":5,"#, "min_tokens", 3),
        (r#""min_tokens":1,"#, "min_tokens", 0),
    ] {
        let request = chat(more);
        let ask = ask_of(&delivered(&request, &["a", "b"]), &request);
        assert_eq!(body(&ask)[key], left, "{more}");
    }
    let request = chat(r#""n_predict":-1,"max_tokens":null,"#);
    let ask = ask_of(&delivered(&request, &["a"]), &request);
    assert_eq!(body(&ask)["n_predict"], -1);
    // What is not sent is said once more: an event of white space counts twice.
    let request = chat(r#""max_tokens":10,"#);
    let ask = ask_of(
        &delivered(&request, &["a", "\n", " b ", " ", "\t\n"]),
        &request,
    );
    assert_eq!(body(&ask)["max_tokens"], 7);
    let request = completion(r#""max_tokens":10,"#);
    let ask = ask_of(&delivered(&request, &["a", "\n"]), &request);
    assert_eq!(body(&ask)["max_tokens"], 8);
    for bound in 1..=2 {
        let request = chat(&format!(r#""max_tokens":{bound},"#));
        let partial = delivered(&request, &["a", "b"]);
        assert!(
            matches!(partial.ask(&request), Ok(Rest::Nothing)),
            "{bound}"
        );
    }
}

#[test]
fn tokens_are_what_the_upstream_tells_if_that_is_more_than_one_a_delta() {
    let request = chat(r#""max_tokens":10,"#);
    let mut partial = delivered(&request, &["a", "b"]);
    take(
        &mut partial,
        &frame(
            r#"{"id":"first-1","choices":[{"index":0,"delta":{"content":"c d"}}],"usage":{"prompt_tokens":7,"completion_tokens":6,"total_tokens":13}}"#,
        ),
    );
    let ask = ask_of(&partial, &request);
    assert_eq!(body(&ask)["max_tokens"], 4);
    assert_eq!(partial.usage(&request).unwrap().total_tokens, 13);
}

#[test]
fn an_answer_that_has_all_its_tokens_is_ended() {
    let request = chat(r#""max_tokens":2,"stream_options":{"include_usage":true},"#);
    let partial = delivered(&request, &["a", "b"]);
    let ending = partial.ending(&request);
    assert_eq!(
        data(&ending[0]),
        json!({ "id": "first-1", "created": 1_700_000_000, "model": "m", "object": "chat.completion.chunk",
            "choices": [{ "index": 0, "delta": {}, "finish_reason": "length" }] })
    );
    // The prompt's tokens are not known, so that nothing is told of them.
    assert_eq!(ending[1..], [Frame::done()]);
    let usage = partial.usage(&request).unwrap();
    assert!(usage.estimated && usage.prompt_tokens > 0);
    assert_eq!(usage.completion_tokens, 2);
}

#[test]
fn an_answer_of_white_space_only_is_asked_for_anew() {
    let request = chat("");
    let mut ask = ask_of(&delivered(&request, &["\n", "\n"]), &request);
    assert!(!ask.continues);
    assert_eq!(ask.request.raw, request.raw);
    assert_eq!(read_on(&mut ask.sequel, &["\n\nHi"]), "Hi");
}

#[test]
fn what_a_request_excludes() {
    let tool = r#""tools":[{"type":"function","function":{"name":"f"}}],"#;
    for (more, obstacle) in [
        (r#""n":2,"#, Obstacle::Choices),
        (r#""best_of":2,"#, Obstacle::Choices),
        (r#""use_beam_search":true,"#, Obstacle::Choices),
        (r#""logprobs":true,"#, Obstacle::Logprobs),
        (r#""top_logprobs":1,"#, Obstacle::Logprobs),
        (r#""prompt_logprobs":1,"#, Obstacle::Logprobs),
        (r#""return_token_ids":true,"#, Obstacle::Logprobs),
        (
            r#""response_format":{"type":"json_object"},"#,
            Obstacle::Structured,
        ),
        (
            r#""response_format":{"type":"json_schema","json_schema":{}},"#,
            Obstacle::Structured,
        ),
        (
            r#""structured_outputs":{"regex":"a"},"#,
            Obstacle::Structured,
        ),
        (r#""guided_choice":["a"],"#, Obstacle::Structured),
        (r#""grammar":"root ::= \"a\"","#, Obstacle::Structured),
        (
            &format!(r#"{tool}"tool_choice":"required","#),
            Obstacle::ToolCall,
        ),
        (
            &format!(r#"{tool}"tool_choice":{{"type":"function","function":{{"name":"f"}}}},"#),
            Obstacle::ToolCall,
        ),
        (r#""function_call":{"name":"f"},"#, Obstacle::ToolCall),
        (r#""modalities":["text","audio"],"#, Obstacle::NotText),
        (r#""audio":{"voice":"a"},"#, Obstacle::NotText),
        (r#""echo":true,"#, Obstacle::Prompt),
    ] {
        let request = chat(more);
        let partial = delivered(&request, &["a"]);
        assert_eq!(partial.ask(&request).unwrap_err(), obstacle, "{more}");
    }
    for (more, obstacle) in [
        (r#""logprobs":0,"#, Obstacle::Logprobs),
        (r#""echo":true,"#, Obstacle::Prompt),
        (r#""suffix":"x","#, Obstacle::Prompt),
        (r#""best_of":3,"#, Obstacle::Choices),
    ] {
        let request = completion(more);
        let partial = delivered(&request, &["a"]);
        assert_eq!(partial.ask(&request).unwrap_err(), obstacle, "{more}");
    }
    for prompt in [r#"["a"]"#, "[1,2]"] {
        let body = format!(r#"{{"model":"m","prompt":{prompt},"stream":true}}"#);
        let request = request(Endpoint::Completions, &body);
        let partial = delivered(&request, &["a"]);
        assert_eq!(
            partial.ask(&request).unwrap_err(),
            Obstacle::Prompt,
            "{prompt}"
        );
    }
    let request = request(
        Endpoint::Responses,
        r#"{"model":"m","input":"x","stream":true}"#,
    );
    assert_eq!(
        Partial::new(&request, 99).obstacle(),
        Some(Obstacle::Endpoint)
    );
    let more = format!(
        r#"{tool}"tool_choice":"auto","response_format":{{"type":"text"}},"logprobs":false,"n":1,"modalities":["text"],"echo":false,"guided_json":null,"#
    );
    assert_eq!(Partial::new(&chat(&more), 99).obstacle(), None);
}

#[test]
fn what_an_answer_excludes() {
    let with = |choice: &str| frame(&format!(r#"{{"id":"1","choices":[{choice}]}}"#));
    for (choice, obstacle) in [
        (
            r#"{"delta":{"tool_calls":[{"index":0}]}}"#,
            Obstacle::ToolCall,
        ),
        (
            r#"{"delta":{"function_call":{"name":"f"}}}"#,
            Obstacle::ToolCall,
        ),
        (r#"{"delta":{"refusal":"no"}}"#, Obstacle::Refusal),
        (r#"{"delta":{"audio":{"id":"a"}}}"#, Obstacle::NotText),
        (
            r#"{"delta":{"content":[{"type":"text"}]}}"#,
            Obstacle::NotText,
        ),
        (r#"{"index":1,"delta":{"content":"x"}}"#, Obstacle::Choices),
        (
            r#"{"delta":{"content":"x"}},{"delta":{"content":"y"}}"#,
            Obstacle::Choices,
        ),
        (
            r#"{"delta":{"content":"x"},"logprobs":{"content":[]}}"#,
            Obstacle::Logprobs,
        ),
        (r#"{"delta":{},"finish_reason":"stop"}"#, Obstacle::Finished),
        (r#"{"delta":{"reasoning":"hm"}}"#, Obstacle::Reasoning),
        (
            r#"{"delta":{"reasoning_content":"hm"}}"#,
            Obstacle::Reasoning,
        ),
    ] {
        let request = chat("");
        let mut partial = delivered(&request, &["a"]);
        take(&mut partial, &with(choice));
        // What follows does not make it sound again.
        if obstacle != Obstacle::Reasoning {
            take(&mut partial, &with(r#"{"delta":{"content":"b"}}"#));
        }
        assert_eq!(partial.ask(&request).unwrap_err(), obstacle, "{choice}");
    }
}

#[test]
fn reasoning_that_is_over_is_no_obstacle_and_counts() {
    let request = chat(r#""max_tokens":10,"#);
    let mut partial = Partial::new(&request, 99);
    take(
        &mut partial,
        &first(&json!({ "role": "assistant", "reasoning": "hm" })),
    );
    take(&mut partial, &first(&json!({ "content": "\n" })));
    assert_eq!(partial.ask(&request).unwrap_err(), Obstacle::Reasoning);
    take(&mut partial, &first(&json!({ "content": "So" })));
    let ask = ask_of(&partial, &request);
    assert_eq!(body(&ask)["max_tokens"], 7);
    assert_eq!(body(&ask)["messages"][1]["content"], "\nSo");
}

#[test]
fn what_is_longer_than_is_remembered_is_not_gone_on_with() {
    let request = chat("");
    let mut partial = Partial::new(&request, 4);
    take(&mut partial, &first(&json!({ "content": "abcd" })));
    assert_eq!(partial.obstacle(), None);
    take(&mut partial, &first(&json!({ "content": "e" })));
    assert_eq!(partial.obstacle(), Some(Obstacle::TooLong));
    assert_eq!((partial.tokens(), partial.text.capacity()), (2, 0));
}

#[test]
fn an_event_of_the_rest_has_the_first_ones_identity_and_no_second_role() {
    let request = chat("");
    let mut sequel = ask_of(&delivered(&request, &["Hel"]), &request).sequel;
    let event = sequel
        .fit(next(&json!({ "role": "assistant", "content": "lo" })))
        .unwrap()
        .unwrap();
    assert_eq!(data(&event), data(&first(&json!({ "content": "lo" }))));
    // Where the first never told a role, the client learns it here.
    let mut partial = Partial::new(&request, 99);
    take(&mut partial, &first(&json!({ "content": "Hel" })));
    let mut sequel = ask_of(&partial, &request).sequel;
    let event = sequel
        .fit(next(&json!({ "content": "lo", "role": "assistant" })))
        .unwrap()
        .unwrap();
    assert_eq!(data(&event)["choices"][0]["delta"]["role"], "assistant");
}

#[test]
fn what_is_not_touched_stays_byte_for_byte() {
    let request = chat("");
    let mut sequel = ask_of(&delivered(&request, &["Hel"]), &request).sequel;
    let odd = r#"{"id":"other", "x" : 1.50e1,"choices":[ {"index":0,"delta":{ "content" :"l\u006f","y":[ ] },"finish_reason":null} ]}"#;
    let event = sequel.fit(frame(odd)).unwrap().unwrap();
    let expected = odd.replace("other", "first-1");
    assert_eq!(event.raw, format!("data: {expected}\n\n"));
    for untouched in ["[DONE]", r#"{"id":"first-1","choices":[]}"#] {
        let event = frame(untouched);
        assert_eq!(sequel.fit(event.clone()).unwrap().unwrap(), event);
    }
}

#[test]
fn white_space_that_was_delivered_is_not_sent_twice() {
    for (delivered_text, texts, read) in [
        ("one ", vec![" two"], "two"),
        ("one", vec![" two"], " two"),
        ("one ", vec!["two"], "two"),
        ("one ", vec!["  two"], " two"),
        ("one  ", vec![" two"], "two"),
        ("one  ", vec![" ", " ", " two"], " two"),
        ("one\n\n", vec!["\n\n- two"], "- two"),
        ("one\n    ", vec!["\n    two"], "two"),
        ("one\n    ", vec!["\n  ", "two"], "two"),
        ("one ", vec!["\n", "two"], "\ntwo"),
        ("one \n", vec!["\n", "two"], "two"),
        ("one\t", vec![" two  three"], "two  three"),
        ("one ", vec![" ", "two", " ", "three"], "two three"),
        ("one\u{a0}", vec!["\u{a0}two"], "two"),
    ] {
        let request = chat("");
        let mut ask = ask_of(&delivered(&request, &[delivered_text]), &request);
        assert_eq!(
            body(&ask)["messages"][1]["content"],
            delivered_text.trim_end()
        );
        assert_eq!(
            read_on(&mut ask.sequel, &texts),
            read,
            "{delivered_text:?} {texts:?}"
        );
    }
}

#[test]
fn an_event_with_nothing_left_but_its_end_is_kept() {
    let request = chat("");
    let mut sequel = ask_of(&delivered(&request, &["one "]), &request).sequel;
    let end =
        r#"{"id":"other","choices":[{"index":0,"delta":{"content":" "},"finish_reason":"stop"}]}"#;
    let event = sequel.fit(frame(end)).unwrap().unwrap();
    let choice = &data(&event)["choices"][0];
    assert_eq!(
        (
            choice["delta"]["content"].as_str(),
            choice["finish_reason"].as_str()
        ),
        (Some(""), Some("stop"))
    );
}

#[test]
fn what_comes_along_with_white_space_that_was_delivered_is_kept() {
    let request = chat("");
    let call = json!([{ "index": 0, "id": "c", "function": { "name": "f", "arguments": "{}" } }]);
    for (key, value) in [("tool_calls", call), ("refusal", json!("no"))] {
        let mut sequel = ask_of(&delivered(&request, &["one "]), &request).sequel;
        let event = sequel.fit(next(&json!({ "content": " ", key: value })));
        let event = event.unwrap().expect("there is more in it");
        let delta = &data(&event)["choices"][0]["delta"];
        assert_eq!((&delta["content"], &delta[key]), (&json!(""), &value));
    }
}

#[test]
fn an_empty_finish_reason_is_none() {
    let request = chat("");
    let mut partial = Partial::new(&request, 99);
    let event = |id: &str, text: &str| {
        frame(&format!(
            r#"{{"id":"{id}","choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":""}}]}}"#
        ))
    };
    take(&mut partial, &event("first-1", "one "));
    let mut sequel = ask_of(&partial, &request).sequel;
    assert_eq!(sequel.fit(event("other", " ")), Ok(None));
}

#[test]
fn usage_is_summed() {
    let request = chat("");
    let mut sequel = ask_of(&delivered(&request, &["a", "b", "c"]), &request).sequel;
    let told = r#"{"id":"o","choices":[],"usage":{"prompt_tokens":13,"completion_tokens":5,"total_tokens":18,"prompt_tokens_details":{"cached_tokens":2}}}"#;
    let event = sequel.fit(frame(told)).unwrap().unwrap();
    assert_eq!(
        data(&event)["usage"],
        json!({ "prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18, "prompt_tokens_details": { "cached_tokens": 2 } })
    );
    let null = r#"{"id":"first-1","choices":[],"usage":null}"#;
    assert_eq!(
        data(&sequel.fit(frame(null)).unwrap().unwrap())["usage"],
        Value::Null
    );
}

#[test]
fn a_second_death_asks_for_the_rest_of_all_of_it() {
    let request = chat(r#""max_tokens":9,"#);
    let mut partial = delivered(&request, &["one ", "two "]);
    for text in [" three", " four "] {
        let mut sequel = ask_of(&partial, &request).sequel;
        let event = sequel
            .fit(next(&json!({ "content": text })))
            .unwrap()
            .unwrap();
        take(&mut partial, &event);
    }
    let ask = ask_of(&partial, &request);
    assert_eq!(body(&ask)["messages"][1]["content"], "one two three four");
    assert_eq!(body(&ask)["messages"].as_array().unwrap().len(), 2);
    assert_eq!(body(&ask)["max_tokens"], 5);
}

#[test]
fn a_beginning_that_comes_again_is_heard_wherever_it_is_cut() {
    let text = "The gateway forwards each request to a healthy backend – and streams the answer.";
    let request = chat("");
    for at in (1..40).filter(|at| text.is_char_boundary(*at)) {
        let mut sequel = ask_of(&delivered(&request, &[text]), &request).sequel;
        let (a, b) = text.split_at(at);
        assert_eq!(
            sequel.listen(&next(&json!({ "content": format!(" {a}") }))),
            Heard::Undecided
        );
        let heard = sequel.listen(&next(&json!({ "content": b })));
        assert_eq!(heard, Heard::Repeats { surely: true }, "{at}");
    }
    let heard = |delivered_text: &str, said: &str| {
        let mut sequel = ask_of(&delivered(&request, &[delivered_text]), &request).sequel;
        sequel.listen(&next(&json!({ "content": said })))
    };
    assert_eq!(heard(text, "The gateways"), Heard::GoesOn);
    assert_eq!(heard(text, " and"), Heard::GoesOn);
    assert_eq!(heard("ha", "hahaha"), Heard::Repeats { surely: false });
    assert_eq!(heard("ha", "h"), Heard::Undecided);
}

#[test]
fn a_rest_that_ends_before_it_has_repeated_all_is_one() {
    let request = chat("");
    let mut sequel = ask_of(&delivered(&request, &["Hello there"]), &request).sequel;
    assert_eq!(
        sequel.listen(&next(&json!({ "content": "Hel" }))),
        Heard::Undecided
    );
    let end = frame(r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#);
    assert_eq!(sequel.listen(&end), Heard::GoesOn);
    let mut sequel = ask_of(&delivered(&request, &["Hello there"]), &request).sequel;
    assert_eq!(
        sequel.listen(&next(&json!({ "reasoning": "Hm" }))),
        Heard::Reasons
    );
    sequel.trust();
    assert_eq!(
        sequel.listen(&next(&json!({ "content": "Hel" }))),
        Heard::GoesOn
    );
    assert_eq!(
        sequel.listen(&next(&json!({ "reasoning_content": "Hm" }))),
        Heard::Reasons
    );
}

#[test]
fn the_same_events_in_any_pieces_are_the_same_partial() {
    let request = chat("");
    let mut stream = BytesMut::new();
    for text in ["He", "llo ", "w\"ö", "rld\n"] {
        stream.extend_from_slice(&first(&json!({ "content": text })).raw);
    }
    let stream = stream.freeze();
    for at in 0..=stream.len() {
        let mut partial = Partial::new(&request, 1000);
        let mut framer = Framer::new(1 << 20);
        for piece in [stream.slice(..at), stream.slice(at..)] {
            framer.push(&piece);
            while let Some(event) = framer.next() {
                take(&mut partial, &event.unwrap());
            }
        }
        let ask = ask_of(&partial, &request);
        assert_eq!(
            body(&ask)["messages"][1]["content"],
            "Hello w\"örld",
            "{at}"
        );
    }
}

#[test]
fn nonsense_is_told_and_never_fitted() {
    let request = chat("");
    let mut sequel = ask_of(&delivered(&request, &["a"]), &request).sequel;
    for data in [
        r#"{"choices":[{"delta":{"content":"x"}}"#,
        r#"{"choices":[1]}"#,
        r#"{"choices":[{"delta":{"content":"x"}},{"delta":{"content":"y"}}]}"#,
    ] {
        assert!(sequel.fit(frame(data)).is_err(), "{data}");
    }
    for data in [
        "{}",
        r#"{"choices":{}}"#,
        r#"{"choices":[]}"#,
        r#"{"choices":[{}]}"#,
    ] {
        assert!(sequel.fit(frame(data)).is_ok(), "{data}");
    }
}
