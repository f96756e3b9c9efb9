//! The client's request: whether its answer can be gone on with, and with a
//! partial answer in it.

use std::borrow::Cow;

use super::{
    super::{
        ApiRequest, Edit, Endpoint,
        cursor::Cursor,
        edit::{quoted, splice},
        json,
    },
    Obstacle,
};

/// Keys by which servers are told what an answer must look like. A grammar
/// would begin anew in the middle of the text.
const SHAPES: [&str; 7] = [
    "structured_outputs",
    "grammar",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "format",
];

/// Returns what in a request makes it impossible to go on with its answer.
pub(super) fn unfit(request: &ApiRequest) -> Option<Obstacle> {
    if !request.stream {
        return Some(Obstacle::Endpoint);
    }
    let set = |key: &str| {
        let nothing: [&[u8]; 5] = [b"null", b"false", b"0", b"\"\"", b"[]"];
        request.get(key).filter(|value| !nothing.contains(value))
    };
    let any = |keys: &[&str]| keys.iter().any(|key| set(key).is_some());
    let more_than_one = |key| set(key).is_some_and(|number| number != b"1");
    if request.n != 1 || more_than_one("best_of") || any(&["use_beam_search"]) {
        return Some(Obstacle::Choices);
    }
    // A completion's `logprobs: 0` asks for those of the chosen tokens.
    let asks_logprobs = request
        .get("logprobs")
        .is_some_and(|value| !matches!(value, b"null" | b"false"));
    if asks_logprobs
        || any(&[
            "top_logprobs",
            "prompt_logprobs",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "n_probs",
        ])
    {
        return Some(Obstacle::Logprobs);
    }
    let guided = |member: &json::Member| {
        member.name(&request.raw).starts_with(b"guided_")
            && !matches!(member.value.of(&request.raw), b"null" | b"false" | b"\"\"")
    };
    let is_text = |format: &[u8]| type_of(format) == Some(b"\"text\"");
    if any(&SHAPES)
        || request.object.members.iter().any(guided)
        || set("response_format").is_some_and(|format| !is_text(format))
    {
        return Some(Obstacle::Structured);
    }
    let forced = |key| set(key).is_some_and(|choice| !matches!(choice, b"\"auto\"" | b"\"none\""));
    if forced("tool_choice") || forced("function_call") {
        return Some(Obstacle::ToolCall);
    }
    let only_text = |kinds: &[u8]| memchr::memmem::find(kinds, b"audio").is_none();
    if any(&["audio"]) || set("modalities").is_some_and(|kinds| !only_text(kinds)) {
        return Some(Obstacle::NotText);
    }
    match request.endpoint {
        Endpoint::ChatCompletions if any(&["echo"]) => Some(Obstacle::Prompt),
        Endpoint::ChatCompletions => unfit_turns(request),
        Endpoint::Completions => {
            let is_one = request.get("prompt").is_some_and(|p| p.starts_with(b"\""));
            let odd = !is_one || any(&["echo", "suffix", "prompt_embeds"]);
            odd.then_some(Obstacle::Prompt)
        }
        _ => Some(Obstacle::Endpoint),
    }
}

/// A last message of the assistant is gone on with by some servers and answered
/// by others, unless the client says which.
fn unfit_turns(request: &ApiRequest) -> Option<Obstacle> {
    let goes_on = request.get("continue_final_message") == Some(b"true");
    let no_prompt = request.get("add_generation_prompt") == Some(b"false");
    let last = request.get("messages").and_then(last_item);
    let by_assistant = last.is_some_and(|last| role_of(last.bytes) == Some(b"\"assistant\""));
    (by_assistant != goes_on || (no_prompt && !goes_on)).then_some(Obstacle::Prefill)
}

/// The edits that put a partial answer at the end of a chat.
pub(super) fn with_turn(request: &ApiRequest, text: &str) -> Result<Vec<Edit<'static>>, Obstacle> {
    let messages = request.get("messages").ok_or(Obstacle::Prompt)?;
    let last = last_item(messages).ok_or(Obstacle::Prompt)?;
    let messages = if role_of(last.bytes) == Some(b"\"assistant\"") {
        longer_turn(messages, &last, text)?
    } else {
        let mut longer = messages.get(..last.end).unwrap_or_default().to_vec();
        longer.extend_from_slice(b",{\"role\":\"assistant\",\"content\":");
        longer.extend_from_slice(&quoted(text));
        longer.push(b'}');
        longer.extend_from_slice(messages.get(last.end..).unwrap_or_default());
        longer
    };
    Ok(vec![
        Edit::set("messages", messages),
        Edit::set("continue_final_message", &b"true"[..]),
        Edit::set("add_generation_prompt", &b"false"[..]),
    ])
}

/// Adds the text to what the client itself let the assistant begin with.
fn longer_turn(messages: &[u8], last: &Item<'_>, text: &str) -> Result<Vec<u8>, Obstacle> {
    let object = json::scan(last.bytes, usize::MAX).map_err(|_why| Obstacle::Prefill)?;
    let content = object
        .find(last.bytes, "content")
        .ok_or(Obstacle::Prefill)?;
    let begun = json::text(content.value.of(last.bytes)).ok_or(Obstacle::Prefill)?;
    if object.find(last.bytes, "tool_calls").is_some() {
        return Err(Obstacle::Prefill);
    }
    let edit = Edit::set_text("content", &[begun, Cow::Borrowed(text)].concat());
    let turn = splice(last.bytes, &object, &[edit]).ok_or(Obstacle::Prefill)?;
    let before = messages.get(..last.start).unwrap_or_default();
    let after = messages.get(last.end..).unwrap_or_default();
    Ok([before, &turn, after].concat())
}

/// The edit that puts a partial answer at the end of a prompt.
pub(super) fn with_prompt(request: &ApiRequest, text: &str) -> Result<Edit<'static>, Obstacle> {
    let prompt = request.get("prompt").and_then(json::text);
    let prompt = prompt.ok_or(Obstacle::Prompt)?;
    let longer = [prompt, Cow::Borrowed(text)].concat();
    Ok(Edit::set_text("prompt", &longer))
}

/// An item of an array, and where it stands.
struct Item<'a> {
    bytes: &'a [u8],
    start: usize,
    end: usize,
}

fn last_item(array: &[u8]) -> Option<Item<'_>> {
    let mut cursor = Cursor::new(array);
    let mut last = None;
    if cursor.enter_array() {
        while cursor.item() {
            let start = cursor.offset();
            let bytes = cursor.skip()?;
            let end = cursor.offset();
            last = Some(Item { bytes, start, end });
        }
    }
    last
}

fn role_of(message: &[u8]) -> Option<&[u8]> {
    member_of(message, b"role")
}

fn type_of(format: &[u8]) -> Option<&[u8]> {
    member_of(format, b"type")
}

fn member_of<'a>(object: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let mut cursor = Cursor::new(object);
    if !cursor.enter_object() {
        return None;
    }
    while let Some(key) = cursor.key() {
        let value = cursor.skip();
        if key == name {
            return value;
        }
    }
    None
}
