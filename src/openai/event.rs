//! What one event of a stream means: content, the end, an error, usage.
//!
//! [`inspect`] runs for every event of every stream: it makes one pass over the
//! data with a [`Cursor`] and allocates nothing, unless the event is an error.

use super::{
    Endpoint, Frame, UpstreamError,
    cursor::{Cursor, is_something},
};

/// What an event says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The stream is at its end: `[DONE]`, or `response.completed` and
    /// `response.incomplete` of responses. After an error it is no success.
    pub done: bool,
    /// It is part of an answer: new content, reasoning, a refusal, audio or a
    /// tool call; or a finish reason, since an empty answer is one too.
    pub meaningful: bool,
    /// How many choices have new content in it: an estimate of the tokens, and
    /// never the finish reason alone.
    pub content_events: u32,
    /// A choice has come to its end.
    pub finished: bool,
    /// It says that the upstream failed.
    pub error: Option<Box<UpstreamError>>,
    /// The tokens so far, or in all.
    pub usage: Option<Usage>,
    /// It is nothing but usage: `choices` is empty.
    pub usage_only: bool,
}

/// How many tokens a call took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt, cached ones included.
    pub prompt_tokens: u64,
    /// Of the answer, reasoning included.
    pub completion_tokens: u64,
    /// Of both.
    pub total_tokens: u64,
    /// Of the prompt's, those that came from a cache.
    pub cached_tokens: u64,
    /// Of the answer's, those that were spent on reasoning.
    pub reasoning_tokens: u64,
    /// Whether no upstream told any of it, so that it is a guess of ours.
    pub estimated: bool,
}

/// Reads what an event of this endpoint's stream says.
pub fn inspect(endpoint: Endpoint, frame: &Frame) -> Facts {
    let mut facts = Facts::default();
    let Some(data) = &frame.data else {
        return facts;
    };
    if data.trim_ascii() == b"[DONE]" {
        facts.done = true;
        return facts;
    }
    let mut failed = frame.event.as_deref() == Some(b"error");
    failed |= match endpoint {
        Endpoint::Responses => response_event(data, frame.event.as_deref(), &mut facts),
        _ => chunk(data, &mut facts),
    };
    if failed {
        facts.meaningful = false;
        facts.error = Some(Box::new(UpstreamError::read(data)));
    }
    facts
}

/// Returns the event without its top-level `usage`, for a client who did not
/// ask for it; `None` if there is none to hide. `"usage":null` may stay.
pub fn without_usage(frame: &Frame) -> Option<Frame> {
    let data = frame.data.as_deref()?;
    // Most events have none: this is cheaper than to parse them again. A quote
    // in a text is escaped, so that this finds keys (and whole strings) only.
    let is_object = |at: usize| {
        let rest = data.get(at + 7..).unwrap_or_default().trim_ascii_start();
        rest.strip_prefix(b":")
            .is_some_and(|value| value.trim_ascii_start().first() == Some(&b'{'))
    };
    memchr::memmem::find_iter(data, b"\"usage\"").find(|&at| is_object(at))?;
    let mut cursor = Cursor::new(data);
    if !cursor.enter_object() {
        return None;
    }
    let mut from = cursor.offset();
    let mut is_first = true;
    while let Some(key) = cursor.key() {
        let value = cursor.skip()?;
        let end = cursor.offset();
        if key == b"usage" && value.first() == Some(&b'{') {
            let before = data.get(..from)?;
            let mut after = data.get(end..)?;
            // Of the two commas around it, one goes with it.
            if is_first {
                let rest = after.trim_ascii_start();
                after = rest.strip_prefix(b",").unwrap_or(rest);
            }
            return Some(frame.replaced(&[before, after].concat()));
        }
        from = end;
        is_first = false;
    }
    None
}

/// Returns the usage that a complete JSON answer states.
pub fn usage_of_body(body: &[u8]) -> Option<Usage> {
    let mut cursor = Cursor::new(body);
    if !cursor.enter_object() {
        return None;
    }
    while let Some(key) = cursor.key() {
        if key == b"usage" {
            return usage(&mut cursor);
        }
        cursor.skip()?;
    }
    None
}

/// Reads a chunk of chat or text completions; says whether it is an error.
fn chunk(data: &[u8], facts: &mut Facts) -> bool {
    let mut failed = false;
    let mut no_choices = false;
    let mut cursor = Cursor::new(data);
    if !cursor.enter_object() {
        return false;
    }
    while let Some(key) = cursor.key() {
        match key {
            b"choices" => {
                no_choices = cursor.peek() == Some(b'[');
                if cursor.enter_array() {
                    while cursor.item() {
                        no_choices = false;
                        failed |= choice(&mut cursor, facts);
                    }
                }
            }
            b"usage" => facts.usage = usage(&mut cursor),
            b"error" => failed |= is_error(&mut cursor),
            b"object" => failed |= cursor.skip() == Some(b"\"error\""),
            _ => {
                cursor.skip();
            }
        }
    }
    facts.usage_only = no_choices && facts.usage.is_some();
    failed
}

fn choice(cursor: &mut Cursor<'_>, facts: &mut Facts) -> bool {
    let mut failed = false;
    let mut content = false;
    if !cursor.enter_object() {
        return false;
    }
    while let Some(key) = cursor.key() {
        match key {
            b"delta" => content |= delta(cursor),
            b"text" => content |= cursor.something(),
            b"finish_reason" => match cursor.skip() {
                Some(b"\"error\"") => failed = true,
                // Some servers write "" for none.
                Some([b'"', _, _, ..]) => facts.finished = true,
                _ => {}
            },
            b"error" => failed |= is_error(cursor),
            _ => {
                cursor.skip();
            }
        }
    }
    facts.content_events += u32::from(content);
    facts.meaningful |= content || facts.finished;
    failed
}

/// Says whether a delta adds anything: the first one, with the role and an
/// empty content, does not.
fn delta(cursor: &mut Cursor<'_>) -> bool {
    let mut content = false;
    if !cursor.enter_object() {
        return false;
    }
    while let Some(key) = cursor.key() {
        match key {
            b"content" | b"reasoning" | b"reasoning_content" | b"reasoning_details"
            | b"thinking" | b"refusal" | b"audio" | b"images" | b"tool_calls"
            | b"function_call" => content |= cursor.something(),
            _ => {
                cursor.skip();
            }
        }
    }
    content
}

/// Reads an event of responses; says whether it is an error.
fn response_event(data: &[u8], event: Option<&[u8]>, facts: &mut Facts) -> bool {
    let mut failed = false;
    let mut content = false;
    let mut item = false;
    let mut kind = event.unwrap_or_default();
    let mut cursor = Cursor::new(data);
    if !cursor.enter_object() {
        return false;
    }
    while let Some(key) = cursor.key() {
        match key {
            b"type" => {
                let quoted = cursor.skip().unwrap_or_default();
                kind = quoted.trim_ascii_start();
                kind = kind.strip_prefix(b"\"").unwrap_or(kind);
                kind = kind.strip_suffix(b"\"").unwrap_or(kind);
            }
            b"delta" => content = cursor.something(),
            b"item" => item = output_item(&mut cursor),
            b"response" => facts.usage = response_usage(&mut cursor).or(facts.usage),
            b"error" => failed |= is_error(&mut cursor),
            _ => {
                cursor.skip();
            }
        }
    }
    match kind {
        b"response.completed" | b"response.incomplete" => {
            facts.done = true;
            facts.finished = true;
            facts.meaningful = true;
        }
        b"response.failed" | b"error" => failed = true,
        b"response.output_item.added" | b"response.output_item.done" => facts.meaningful = item,
        _ if kind.ends_with(b".delta") => {
            facts.meaningful = content;
            facts.content_events = u32::from(content);
        }
        _ => {}
    }
    failed
}

/// Says whether an output item has content. A message or a reasoning that was
/// only opened has none; a call says something by its name alone.
fn output_item(cursor: &mut Cursor<'_>) -> bool {
    let mut filled = false;
    let mut call = false;
    if !cursor.enter_object() {
        return false;
    }
    while let Some(key) = cursor.key() {
        match key {
            b"content" | b"summary" => filled |= cursor.something(),
            b"type" => {
                call = cursor.skip().is_some_and(|kind| kind.ends_with(b"_call\""));
            }
            _ => {
                cursor.skip();
            }
        }
    }
    filled || call
}

fn response_usage(cursor: &mut Cursor<'_>) -> Option<Usage> {
    let mut found = None;
    if cursor.enter_object() {
        while let Some(key) = cursor.key() {
            match key {
                b"usage" => found = usage(cursor),
                _ => {
                    cursor.skip();
                }
            }
        }
    }
    found
}

/// Says whether the value of an `error` member is an error: null is none.
fn is_error(cursor: &mut Cursor<'_>) -> bool {
    match cursor.skip() {
        Some(value @ [b'"', ..]) => is_something(value),
        Some([b'{', ..]) => true,
        _ => false,
    }
}

/// Reads a usage object under any of its names.
fn usage(cursor: &mut Cursor<'_>) -> Option<Usage> {
    let mut usage = Usage::default();
    let mut total = None;
    let mut found = false;
    if !cursor.enter_object() {
        return None;
    }
    while let Some(key) = cursor.key() {
        let field = match key {
            b"prompt_tokens" | b"input_tokens" => &mut usage.prompt_tokens,
            b"completion_tokens" | b"output_tokens" => &mut usage.completion_tokens,
            b"prompt_cache_hit_tokens" => &mut usage.cached_tokens,
            b"total_tokens" => {
                total = cursor.integer();
                found |= total.is_some();
                continue;
            }
            b"prompt_tokens_details" | b"input_tokens_details" => {
                if let Some(tokens) = detail(cursor, b"cached_tokens") {
                    usage.cached_tokens = tokens;
                }
                continue;
            }
            b"completion_tokens_details" | b"output_tokens_details" => {
                if let Some(tokens) = detail(cursor, b"reasoning_tokens") {
                    usage.reasoning_tokens = tokens;
                }
                continue;
            }
            _ => {
                cursor.skip();
                continue;
            }
        };
        if let Some(tokens) = cursor.integer() {
            *field = tokens;
            found = true;
        }
    }
    usage.total_tokens =
        total.unwrap_or_else(|| usage.prompt_tokens.saturating_add(usage.completion_tokens));
    found.then_some(usage)
}

fn detail(cursor: &mut Cursor<'_>, name: &[u8]) -> Option<u64> {
    let mut found = None;
    if cursor.enter_object() {
        while let Some(key) = cursor.key() {
            if key == name {
                found = cursor.integer();
            } else {
                cursor.skip();
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{super::Framer, *};

    fn frame(text: &str) -> Frame {
        let mut framer = Framer::new(1 << 20);
        framer.push(&Bytes::copy_from_slice(text.as_bytes()));
        framer.next().unwrap().unwrap()
    }

    fn facts(endpoint: Endpoint, data: &str) -> Facts {
        inspect(endpoint, &frame(&format!("data: {data}\n\n")))
    }

    fn chat(data: &str) -> Facts {
        facts(Endpoint::ChatCompletions, data)
    }

    fn delta_of(delta: &str) -> Facts {
        chat(&format!(
            r#"{{"id":"c","object":"chat.completion.chunk","choices":[{{"index":0,"delta":{delta},"finish_reason":null,"logprobs":null}}],"usage":null}}"#
        ))
    }

    #[test]
    fn the_first_deltas_of_real_servers_mean_nothing_yet() {
        for delta in [
            r#"{"role":"assistant","content":""}"#,
            r#"{"role":"assistant","content":null}"#,
            r#"{"role":"assistant","content":"","reasoning":null,"tool_calls":[],"function_call":null,"refusal":null,"annotations":[]}"#,
            "{}",
            "null",
        ] {
            assert_eq!(delta_of(delta), Facts::default(), "{delta}");
        }
    }

    #[test]
    fn content_of_every_sort_is_meaningful() {
        for delta in [
            r#"{"content":"a"}"#,
            r#"{"content":" "}"#,
            r#"{"content":[{"type":"text","text":"a"}]}"#,
            r#"{"reasoning":"a"}"#,
            r#"{"reasoning_content":"a","content":null}"#,
            r#"{"reasoning_details":[{"text":"a"}]}"#,
            r#"{"refusal":"no"}"#,
            r#"{"audio":{"id":"a"}}"#,
            r#"{"tool_calls":[{"index":0,"function":{"name":"f","arguments":""}}]}"#,
            r#"{"function_call":{"name":"f"}}"#,
        ] {
            let facts = delta_of(delta);
            assert!(facts.meaningful && facts.content_events == 1, "{delta}");
            assert!(!facts.done && !facts.finished && facts.error.is_none());
        }
    }

    #[test]
    fn each_choice_with_content_is_counted() {
        let facts = chat(
            r#"{"choices":[{"delta":{"content":"a"}},{"delta":{}},{"delta":{"content":"b"}}]}"#,
        );
        assert_eq!(facts.content_events, 2);
    }

    #[test]
    fn a_finish_reason_is_meaningful_without_content() {
        let facts = chat(r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#);
        assert!(facts.meaningful && facts.finished && facts.content_events == 0);
        let facts = facts_of_text(r#"{"choices":[{"text":"","finish_reason":"length"}]}"#);
        assert!(facts.meaningful && facts.finished);
        let facts = chat(r#"{"choices":[{"delta":{"role":"assistant"},"finish_reason":""}]}"#);
        assert!(!facts.meaningful && !facts.finished);
    }

    fn facts_of_text(data: &str) -> Facts {
        facts(Endpoint::Completions, data)
    }

    #[test]
    fn text_completions_mean_something_when_there_is_text() {
        let some = facts_of_text(r#"{"choices":[{"text":"a","finish_reason":null}]}"#);
        assert!(some.meaningful && !some.finished);
        let none = facts_of_text(r#"{"choices":[{"text":"","finish_reason":null}]}"#);
        assert!(!none.meaningful);
    }

    #[test]
    fn the_end_is_seen_with_space_around_it() {
        for data in ["[DONE]", " [DONE]", "[DONE] "] {
            let facts = chat(data);
            assert!(
                facts.done && !facts.meaningful && facts.error.is_none(),
                "{data}"
            );
        }
    }

    #[test]
    fn comments_and_other_fields_mean_nothing() {
        for text in [
            ": ping\n\n",
            "retry: 5\n\n",
            "id: 1\n\n",
            "event: x\n\n",
            "data\n\n",
        ] {
            let facts = inspect(Endpoint::ChatCompletions, &frame(text));
            assert_eq!(facts, Facts::default(), "{text}");
        }
    }

    #[test]
    fn errors_inside_a_stream_are_seen_in_every_shape() {
        for (data, message) in [
            (
                r#"{"error":{"message":"boom","type":"InternalServerError","param":null,"code":500}}"#,
                "boom",
            ),
            (r#"{"error":"boom"}"#, "boom"),
            (r#"{"object":"error","message":"boom","code":500}"#, "boom"),
            (
                r#"{"type":"error","error":{"type":"overloaded_error","message":"boom"}}"#,
                "boom",
            ),
            (
                r#"{"id":"x","choices":[{"delta":{"content":""},"finish_reason":"error","error":{"code":502,"message":"boom"}}]}"#,
                "boom",
            ),
            (
                r#"{"id":"x","error":{"code":502,"message":"boom"},"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"error"}]}"#,
                "boom",
            ),
        ] {
            let facts = chat(data);
            let error = facts.error.expect(data);
            assert_eq!(error.message.as_deref(), Some(message), "{data}");
            assert!(!facts.meaningful && !facts.done, "{data}");
        }
        let named = frame("event: error\ndata: boom\n\n");
        let facts = inspect(Endpoint::ChatCompletions, &named);
        assert_eq!(facts.error.unwrap().message.as_deref(), Some("boom"));
    }

    #[test]
    fn an_error_that_is_null_or_only_spoken_of_is_none() {
        for data in [
            r#"{"error":null,"choices":[{"delta":{"content":"a"},"error":null}]}"#,
            r#"{"error":"","choices":[{"delta":{"content":"a"}}]}"#,
            r#"{"choices":[{"delta":{"content":"{\"error\":{}}"}}]}"#,
            r#"{"choices":[{"delta":{"content":"a","error":{"message":"x"}}}]}"#,
        ] {
            let facts = chat(data);
            assert!(facts.error.is_none() && facts.meaningful, "{data}");
        }
    }

    #[test]
    fn the_usage_event_of_real_servers_is_read() {
        let facts = chat(
            r#"{"id":"c","choices":[],"usage":{"prompt_tokens":19,"completion_tokens":16,"total_tokens":35,"prompt_tokens_details":{"cached_tokens":18,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":4}},"timings":{"cache_n":0}}"#,
        );
        assert!(facts.usage_only && !facts.meaningful);
        assert_eq!(
            facts.usage,
            Some(Usage {
                prompt_tokens: 19,
                completion_tokens: 16,
                total_tokens: 35,
                cached_tokens: 18,
                reasoning_tokens: 4,
                estimated: false,
            })
        );
    }

    #[test]
    fn usage_beside_content_is_not_alone() {
        let facts = chat(
            r#"{"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#,
        );
        assert!(!facts.usage_only && facts.meaningful);
        assert_eq!(facts.usage.unwrap().total_tokens, 3);
        assert!(!chat(r#"{"choices":[],"usage":null}"#).usage_only);
        assert!(!chat(r#"{"usage":{"prompt_tokens":1}}"#).usage_only);
        assert_eq!(chat(r#"{"choices":[],"usage":{}}"#).usage, None);
    }

    #[test]
    fn responses_are_meaningful_by_their_deltas_and_items() {
        let meaning = |data: &str| facts(Endpoint::Responses, data).meaningful;
        for data in [
            r#"{"type":"response.output_text.delta","delta":"a"}"#,
            r#"{"delta":"a","type":"response.reasoning_summary_text.delta"}"#,
            r#"{"type":"response.function_call_arguments.delta","delta":"{"}"#,
            r#"{"type":"response.output_item.added","item":{"type":"function_call","name":"f","arguments":""}}"#,
            r#"{"type":"response.output_item.done","item":{"type":"message","content":[{"type":"output_text","text":"a"}]}}"#,
        ] {
            assert!(meaning(data), "{data}");
        }
        for data in [
            r#"{"type":"response.created","response":{"error":null,"usage":null}}"#,
            r#"{"type":"response.in_progress","response":{}}"#,
            r#"{"type":"response.output_item.added","item":{"type":"message","content":[]}}"#,
            r#"{"type":"response.output_item.added","item":{"type":"reasoning","summary":[]}}"#,
            r#"{"type":"response.output_text.delta","delta":""}"#,
        ] {
            assert!(!meaning(data), "{data}");
        }
    }

    #[test]
    fn the_name_of_a_response_event_may_stand_in_its_event_line() {
        let named = frame("event: response.output_text.delta\ndata: {\"delta\":\"a\"}\n\n");
        assert!(inspect(Endpoint::Responses, &named).meaningful);
    }

    #[test]
    fn responses_end_by_their_own_events() {
        for kind in ["response.completed", "response.incomplete"] {
            let facts = facts(
                Endpoint::Responses,
                &format!(
                    r#"{{"type":"{kind}","response":{{"error":null,"output":[],"usage":{{"input_tokens":3,"input_tokens_details":{{"cached_tokens":1}},"output_tokens":5,"output_tokens_details":{{"reasoning_tokens":2}},"total_tokens":8}}}}}}"#
                ),
            );
            assert!(facts.done && facts.finished && facts.meaningful && facts.error.is_none());
            let usage = facts.usage.unwrap();
            assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 5));
            assert_eq!((usage.cached_tokens, usage.reasoning_tokens), (1, 2));
        }
    }

    #[test]
    fn a_failed_response_is_an_error() {
        for data in [
            r#"{"type":"response.failed","response":{"status":"failed","error":{"code":"server_error","message":"boom"}}}"#,
            r#"{"type":"error","code":"server_error","message":"boom","param":null}"#,
        ] {
            let facts = facts(Endpoint::Responses, data);
            let error = facts.error.expect(data);
            assert_eq!(error.message.as_deref(), Some("boom"), "{data}");
            assert_eq!(error.code.as_deref(), Some("server_error"), "{data}");
            assert!(!facts.done && !facts.meaningful);
        }
    }

    #[test]
    fn broken_data_is_survived() {
        let whole = r#"{"choices":[{"delta":{"content":"a\"b"},"finish_reason":null}],"usage":{"prompt_tokens":1}}"#;
        for end in 0..whole.len() {
            for endpoint in Endpoint::ALL {
                let facts = facts(endpoint, whole.get(..end).unwrap());
                assert!(facts.error.is_none() && !facts.done);
            }
        }
        for data in [
            "{",
            "}",
            "[1]",
            "null",
            "\"x\"",
            "{\"choices\":{}}",
            "{\"choices\":[1]}",
        ] {
            assert!(!chat(data).meaningful, "{data}");
        }
    }

    #[test]
    fn usage_is_cut_out_wherever_it_stands() {
        for (data, rest) in [
            (r#"{"id":1,"usage":{"a":1},"x":2}"#, r#"{"id":1,"x":2}"#),
            (r#"{"id":1,"usage":{"a":1}}"#, r#"{"id":1}"#),
            (r#"{"usage":{"a":1},"x":2}"#, r#"{"x":2}"#),
            (r#"{ "usage" : {"a":1} , "x":2 }"#, r#"{ "x":2 }"#),
            (r#"{ "x":2 , "usage" : {} }"#, r#"{ "x":2 }"#),
            (r#"{"usage":{"a":1}}"#, "{}"),
            (r#"{"usage":{}}"#, "{}"),
        ] {
            let frame = frame(&format!("id: 7\ndata: {data}\n\n"));
            let out = without_usage(&frame).expect(data);
            let expected: serde_json::Value = serde_json::from_str(rest).unwrap();
            let text = std::str::from_utf8(&out.raw).unwrap();
            let json = text
                .strip_prefix("id: 7\ndata: ")
                .and_then(|text| text.strip_suffix("\n\n"))
                .unwrap();
            let seen: serde_json::Value = serde_json::from_str(json).unwrap();
            assert_eq!(seen, expected, "{data}");
        }
    }

    #[test]
    fn without_usage_nothing_is_copied() {
        for data in [
            r#"{"choices":[{"delta":{"content":"the \"usage\" of it"}}]}"#,
            r#"{"choices":[],"usage":null}"#,
            r#"{"x":{"usage":{"a":1}}}"#,
            "[DONE]",
        ] {
            assert_eq!(
                without_usage(&frame(&format!("data: {data}\n\n"))),
                None,
                "{data}"
            );
        }
        assert_eq!(without_usage(&frame(": comment\n\n")), None);
    }

    #[test]
    fn usage_of_complete_answers_is_read_under_all_its_names() {
        let read = |body: &str| usage_of_body(body.as_bytes());
        let chat = read(
            r#"{"choices":[{"message":{"content":"\"usage\":{}"}}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}"#,
        )
        .unwrap();
        assert_eq!((chat.prompt_tokens, chat.completion_tokens), (1, 2));
        let response =
            read(r#"{"output":[],"usage":{"input_tokens":1,"output_tokens":2}}"#).unwrap();
        assert_eq!(response.total_tokens, 3);
        let rerank = read("\n\n{\"usage\":{\"total_tokens\":9},\"results\":[]}").unwrap();
        assert_eq!(rerank.total_tokens, 9);
        let deepseek = read(
            r#"{"usage":{"prompt_tokens":9,"completion_tokens":1,"prompt_cache_hit_tokens":8}}"#,
        )
        .unwrap();
        assert_eq!(deepseek.cached_tokens, 8);
        for body in ["", "[]", "{}", r#"{"usage":null}"#, r#"{"usage":{"x":1}}"#] {
            assert_eq!(read(body), None, "{body}");
        }
    }
}
