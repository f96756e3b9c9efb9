//! What Ollama says, read: one line of a stream, or all of an answer.

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::Asked;
use crate::dialects::DecodeError;

/// A line of `/api/chat` or `/api/generate`.
#[derive(Deserialize)]
pub(super) struct Line {
    pub(super) error: Option<Value>,
    /// Of a chat.
    #[serde(default)]
    pub(super) message: Message,
    /// Of a completion.
    #[serde(default)]
    pub(super) response: Option<String>,
    #[serde(default)]
    pub(super) logprobs: Option<Box<RawValue>>,
    #[serde(default)]
    pub(super) done: bool,
    done_reason: Option<String>,
    // Left out where they are 0.
    prompt_eval_count: Option<u64>,
    // Of those; servers before 0.34 do not say.
    prompt_eval_cached_count: Option<u64>,
    eval_count: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Message {
    pub(super) content: Option<String>,
    pub(super) thinking: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
}

#[derive(Deserialize)]
struct ToolCall {
    id: Option<String>,
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    arguments: Option<Box<RawValue>>,
}

impl Line {
    pub(super) fn read(line: &[u8]) -> Result<Self, DecodeError> {
        let mut read: Self = serde_json::from_slice(line)
            .map_err(|_why| DecodeError::Malformed("a line that is no JSON object"))?;
        // With an empty list, Ollama has loaded (or unloaded) a model.
        if read.done && matches!(read.done_reason.as_deref(), Some("load" | "unload")) {
            return Err(DecodeError::Malformed("a model was loaded, not asked"));
        }
        for text in [&mut read.message.content, &mut read.message.thinking] {
            if text.as_ref().is_some_and(String::is_empty) {
                *text = None;
            }
        }
        Ok(read)
    }

    /// Returns the tool calls in OpenAI's words, numbered from `first`: the
    /// arguments are the text of an object.
    pub(super) fn tool_calls(&mut self, asked: &Asked, first: usize) -> Vec<Value> {
        let calls = self.message.tool_calls.take().unwrap_or_default();
        let ours = |(place, call): (usize, ToolCall)| {
            let index = first + place;
            let id = match call.id {
                Some(id) if !id.is_empty() => id,
                // Unique wherever the answer's own is.
                _ => format!("call_{}_{index}", own_part(&asked.id)),
            };
            json!({
                "index": index,
                "id": id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": arguments(call.function.arguments.as_deref()),
                },
            })
        };
        calls.into_iter().enumerate().map(ours).collect()
    }

    /// Returns OpenAI's reason for the end.
    pub(super) fn finish_reason(&self, calls_tools: bool) -> &'static str {
        match self.done_reason.as_deref() {
            Some("length") => "length",
            _ if calls_tools => "tool_calls",
            _ => "stop",
        }
    }

    /// Returns how many tokens of the prompt were read; 0 if it does not say.
    pub(super) fn prompt_tokens(&self) -> u64 {
        self.prompt_eval_count.unwrap_or(0)
    }

    /// Returns how many of them came from a cache.
    pub(super) fn cached_tokens(&self) -> u64 {
        self.prompt_eval_cached_count.unwrap_or(0)
    }

    pub(super) fn usage(&self) -> Value {
        let (prompt, answer) = (self.prompt_tokens(), self.eval_count.unwrap_or(0));
        let mut usage = json!({
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt.saturating_add(answer),
        });
        if let (Some(cached), Value::Object(usage)) = (self.prompt_eval_cached_count, &mut usage) {
            let details = json!({ "cached_tokens": cached });
            usage.insert("prompt_tokens_details".to_owned(), details);
        }
        usage
    }
}

/// Returns the text of a call's arguments: as Ollama wrote the object, or what
/// stands in the string that some servers make of it.
fn arguments(raw: Option<&RawValue>) -> String {
    let text = raw.map_or("{}", RawValue::get);
    if text == "null" {
        return "{}".to_owned();
    }
    serde_json::from_str::<String>(text).unwrap_or_else(|_object| text.to_owned())
}

fn own_part(id: &str) -> &str {
    id.split_once('-').map_or(id, |(_, own)| own)
}
