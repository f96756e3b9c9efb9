//! A request's body → the dialogue so far.

use serde_json::Value;

use super::{
    dialogue::{Call, Dialogue, Turn, Who},
    lenient::{parse, text_of},
};
use crate::openai::Endpoint;

/// The most prompts of one completion call that are looked at.
const PROMPTS_MAX: usize = 1024;

/// Why an exchange cannot be told in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The call is not about a dialogue.
    #[error("no dialogue")]
    Endpoint,
    /// The prompt is in tokens.
    #[error("a prompt in tokens")]
    Tokens,
    /// It is no JSON.
    #[error("no JSON")]
    Json,
    /// Nothing was answered.
    #[error("an empty answer")]
    Empty,
}

/// What a client asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The model, in the client's words.
    pub model: String,
    /// Whether the answer goes on with the last message.
    pub continues: bool,
    /// The dialogue; of completions one for each prompt. Never empty.
    prompts: Vec<Dialogue>,
    /// How many answers to each prompt were asked for.
    n: u64,
}

impl Asked {
    /// Reads a body that [`crate::openai::ApiRequest`] has checked.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn read(endpoint: Endpoint, body: &[u8]) -> Result<Self, Unreadable> {
        let body: Value = parse(body).ok_or(Unreadable::Json)?;
        let of = |key: &str| body.get(key).unwrap_or(&Value::Null);
        let prompts = match endpoint {
            Endpoint::ChatCompletions => vec![chat(&body)],
            Endpoint::Responses => vec![response(&body)],
            Endpoint::Completions => prompts(of("prompt"))?,
            _ => return Err(Unreadable::Endpoint),
        };
        Ok(Self {
            model: text_of(of("model")),
            continues: of("continue_final_message") == &Value::Bool(true),
            prompts,
            n: of("n").as_u64().unwrap_or(1).max(1),
        })
    }

    /// Returns the prompt that a choice answers. With `take` it is not there any
    /// more: for the only choice, since a prompt may be long.
    pub fn prompt_of(&mut self, choice: u64, take: bool) -> Option<Dialogue> {
        let prompt = match self.prompts.as_mut_slice() {
            [one] => one,
            several => several.get_mut(usize::try_from(choice / self.n).ok()?)?,
        };
        Some(if take {
            std::mem::take(prompt)
        } else {
            prompt.clone()
        })
    }
}

fn chat(body: &Value) -> Dialogue {
    let mut dialogue = Dialogue::default();
    for key in ["tools", "functions"] {
        if let Some(tools) = body.get(key).and_then(Value::as_array) {
            dialogue.tools(tools);
        }
    }
    let messages = body.get("messages").and_then(Value::as_array);
    for message in messages.into_iter().flatten() {
        add_message(&mut dialogue, message);
    }
    dialogue
}

fn add_message(dialogue: &mut Dialogue, message: &Value) {
    let of = |key: &str| message.get(key).unwrap_or(&Value::Null);
    match of("role").as_str().unwrap_or("user") {
        "system" | "developer" => dialogue.system(&text_of(of("content"))),
        "assistant" => {
            let mut text = dialogue.words(of("content"));
            if text.is_empty() {
                text = dialogue.words(of("refusal"));
            }
            let calls = calls_of(message);
            let who = if calls.is_empty() {
                Who::Gpt
            } else {
                Who::FunctionCall
            };
            dialogue.push(Turn {
                calls,
                thought: thought_of(message),
                ..Turn::new(who, text)
            });
        }
        "tool" | "function" => {
            let text = dialogue.words(of("content"));
            dialogue.push(Turn::new(Who::Observation, text));
        }
        // Whatever else a server knows is what it is asked.
        _ => {
            let text = dialogue.words(of("content"));
            dialogue.push(Turn::new(Who::Human, text));
        }
    }
}

/// Returns what a message's model thought, under any of the names for it.
pub(super) fn thought_of(message: &Value) -> String {
    ["reasoning_content", "reasoning", "thinking"]
        .into_iter()
        .filter_map(|key| message.get(key))
        .map(text_of)
        .find(|thought| !thought.is_empty())
        .unwrap_or_else(|| thought_in(message.get("content").unwrap_or(&Value::Null)))
}

/// Returns what the parts of a content are that were only thought.
pub(super) fn thought_in(content: &Value) -> String {
    let parts = content.as_array().into_iter().flatten();
    let thoughts = parts.filter_map(|part| part.get("thinking"));
    thoughts.map(text_of).collect()
}

/// Returns the calls of a message, those of the old form too.
pub(super) fn calls_of(message: &Value) -> Vec<Call> {
    let new = message.get("tool_calls").and_then(Value::as_array);
    let new = new.into_iter().flatten().filter_map(|call| {
        let inside = call.get("function").or_else(|| call.get("custom"));
        call_of(inside.unwrap_or(call))
    });
    let old = message.get("function_call").and_then(call_of);
    new.chain(old).collect()
}

/// Reads a call: an object with a name and its arguments.
pub(super) fn call_of(call: &Value) -> Option<Call> {
    let name = call.get("name")?.as_str()?.to_owned();
    let arguments = call.get("arguments").or_else(|| call.get("input"));
    let arguments = match arguments {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    Some(Call { name, arguments })
}

fn prompts(prompt: &Value) -> Result<Vec<Dialogue>, Unreadable> {
    let dialogue = |text: &Value| {
        let mut dialogue = Dialogue::default();
        let text = dialogue.words(text);
        dialogue.push(Turn::new(Who::Human, text));
        dialogue
    };
    match prompt {
        Value::String(_) => Ok(vec![dialogue(prompt)]),
        Value::Array(all) if !all.is_empty() && all.iter().all(Value::is_string) => {
            Ok(all.iter().take(PROMPTS_MAX).map(dialogue).collect())
        }
        _ => Err(Unreadable::Tokens),
    }
}

fn response(body: &Value) -> Dialogue {
    let mut dialogue = Dialogue::default();
    let of = |key: &str| body.get(key).unwrap_or(&Value::Null);
    dialogue.system(&text_of(of("instructions")));
    if let Some(tools) = of("tools").as_array() {
        dialogue.tools(tools);
    }
    match of("input") {
        Value::Array(items) => {
            let mut thought = String::new();
            for item in items {
                add_item(&mut dialogue, item, &mut thought);
            }
        }
        text => {
            let text = dialogue.words(text);
            dialogue.push(Turn::new(Who::Human, text));
        }
    }
    dialogue
}

/// Adds an item of a response's input. A thought belongs to what comes next.
fn add_item(dialogue: &mut Dialogue, item: &Value, thought: &mut String) {
    let of = |key: &str| item.get(key).unwrap_or(&Value::Null);
    match of("type").as_str().unwrap_or("message") {
        "message" => {
            let before = dialogue.turns.len();
            add_message(dialogue, item);
            let is_answer = of("role").as_str() == Some("assistant");
            if is_answer
                && !thought.is_empty()
                && dialogue.turns.len() > before
                && let Some(last) = dialogue.turns.last_mut()
            {
                last.thought = std::mem::take(thought);
            }
        }
        "function_call" | "custom_tool_call" => {
            let calls: Vec<Call> = call_of(item).into_iter().collect();
            dialogue.push(Turn {
                calls,
                thought: std::mem::take(thought),
                ..Turn::new(Who::FunctionCall, String::new())
            });
        }
        "function_call_output" | "custom_tool_call_output" => {
            let text = dialogue.words(of("output"));
            dialogue.push(Turn::new(Who::Observation, text));
        }
        "reasoning" => *thought = thought_of_item(item),
        _ => {}
    }
}

/// Returns the text of a reasoning item: its own, or a summary of it.
pub(super) fn thought_of_item(item: &Value) -> String {
    ["content", "summary"]
        .into_iter()
        .filter_map(|key| item.get(key))
        .map(text_of)
        .find(|thought| !thought.is_empty())
        .unwrap_or_default()
}
