//! `/v1/chat/completions` → `/api/chat`: messages, tools, pictures, thinking,
//! the format of the answer.

use serde_json::{Map, Value};

use super::{
    Draft,
    options::{finish, take},
    size::Size,
};
use crate::dialects::{Call, Unsupported};

pub(super) fn encode(call: &Call<'_>, mut body: Map<String, Value>) -> Result<Draft, Unsupported> {
    if call.request.n > 1 {
        return Err(Unsupported::param(
            "n",
            "this model server gives one answer only",
        ));
    }
    let mut messages = Messages::default();
    let theirs = match take(&mut body, "messages") {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    let ours = theirs
        .into_iter()
        .map(|message| messages.translate(message))
        .collect::<Result<Vec<Value>, _>>()?;

    let mut out = Map::new();
    out.insert("model".to_owned(), call.model.into());
    out.insert("messages".to_owned(), ours.into());
    let mut size = messages.size;
    if let Some(tools) = tools(&mut body) {
        let text = serde_json::to_string(&tools).expect("a JSON value is always JSON");
        size.bytes += text.len();
        out.insert("tools".to_owned(), tools.into());
    }
    if let Some(format) = format(&mut body) {
        out.insert("format".to_owned(), format);
    }
    if let Some(think) = think(&mut body) {
        out.insert("think".to_owned(), think);
    }
    for key in ["logprobs", "top_logprobs"] {
        if let Some(wish) = take(&mut body, key) {
            out.insert(key.to_owned(), wish);
        }
    }
    let num_ctx = finish(call, &mut body, size, &mut out);
    Ok(Draft {
        body: out,
        size,
        num_ctx,
        texts: 0,
        base64: false,
    })
}

/// The messages so far.
#[derive(Default)]
struct Messages {
    size: Size,
    /// The calls that the assistant made: their ids and functions.
    calls: Vec<(String, String)>,
}

impl Messages {
    fn translate(&mut self, message: Value) -> Result<Value, Unsupported> {
        let Value::Object(mut theirs) = message else {
            return Err(wrong("a message must be an object"));
        };
        self.size.messages += 1;
        let role = match take(&mut theirs, "role") {
            Some(Value::String(role)) => role,
            _ => return Err(wrong("a message must have a role")),
        };
        // What templates know. They leave out what they do not, without a word.
        let role = match role.as_str() {
            "developer" => "system",
            "function" => "tool",
            role => role,
        };
        let (text, images) = self.content(take(&mut theirs, "content"))?;
        let mut ours = Map::new();
        ours.insert("role".to_owned(), role.into());
        ours.insert("content".to_owned(), text.into());
        if !images.is_empty() {
            ours.insert("images".to_owned(), images.into());
        }
        match role {
            "assistant" => self.assistant(&mut theirs, &mut ours)?,
            "tool" => self.tool(&mut theirs, &mut ours),
            _ => {}
        }
        Ok(ours.into())
    }

    /// Returns the text of a content, and its pictures in base64.
    fn content(&mut self, content: Option<Value>) -> Result<(String, Vec<Value>), Unsupported> {
        let mut images = Vec::new();
        let text = match content {
            None => String::new(),
            Some(Value::String(text)) => text,
            Some(Value::Array(parts)) => {
                let mut texts = Vec::new();
                for part in parts {
                    match part {
                        Value::String(text) => texts.push(text),
                        Value::Object(part) => match of_part(part)? {
                            Part::Text(text) => texts.push(text),
                            Part::Image(base64) => images.push(base64.into()),
                        },
                        _ => return Err(wrong("a part of a content must be an object")),
                    }
                }
                texts.join("\n")
            }
            Some(_) => return Err(wrong("a content must be a string or a list of parts")),
        };
        self.size.bytes += text.len();
        self.size.images += images.len();
        Ok((text, images))
    }

    /// What the assistant thought, and which tools it called.
    fn assistant(
        &mut self,
        theirs: &mut Map<String, Value>,
        ours: &mut Map<String, Value>,
    ) -> Result<(), Unsupported> {
        for key in ["reasoning_content", "reasoning", "thinking"] {
            if let Some(Value::String(thinking)) = take(theirs, key)
                && !thinking.is_empty()
            {
                ours.insert("thinking".to_owned(), thinking.into());
            }
        }
        let mut calls = match take(theirs, "tool_calls") {
            Some(Value::Array(calls)) => calls,
            _ => Vec::new(),
        };
        // Before there were tools: one function, without an id.
        if let Some(function) = take(theirs, "function_call") {
            calls.push(Map::from_iter([("function".to_owned(), function)]).into());
        }
        let calls = calls
            .into_iter()
            .map(|call| self.call(call))
            .collect::<Result<Vec<Value>, _>>()?;
        if !calls.is_empty() {
            ours.insert("tool_calls".to_owned(), calls.into());
        }
        Ok(())
    }

    /// A call in Ollama's words: its arguments are an object, not its text.
    fn call(&mut self, call: Value) -> Result<Value, Unsupported> {
        let no_call = || wrong("a tool call must have a function with a name and arguments");
        let Value::Object(mut call) = call else {
            return Err(no_call());
        };
        let Some(Value::Object(mut function)) = take(&mut call, "function") else {
            return Err(no_call());
        };
        let Some(Value::String(name)) = take(&mut function, "name") else {
            return Err(no_call());
        };
        let arguments = match take(&mut function, "arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
            Some(Value::String(text)) => {
                self.size.bytes += text.len();
                serde_json::from_str(&text).map_err(|_why| {
                    wrong(
                        "the arguments of a tool call must be a JSON object, for this model server",
                    )
                })?
            }
            Some(_) => return Err(no_call()),
        };
        let id = match take(&mut call, "id") {
            Some(Value::String(id)) => id,
            _ => String::new(),
        };
        self.size.bytes += name.len();
        let mut ours = Map::new();
        if !id.is_empty() {
            ours.insert("id".to_owned(), id.as_str().into());
        }
        let function = Map::from_iter([
            ("name".to_owned(), Value::from(name.as_str())),
            ("arguments".to_owned(), arguments.into()),
        ]);
        ours.insert("function".to_owned(), function.into());
        self.calls.push((id, name));
        Ok(ours.into())
    }

    /// What a tool said: templates want its name, OpenAI's clients send the id
    /// of the call.
    fn tool(&self, theirs: &mut Map<String, Value>, ours: &mut Map<String, Value>) {
        let id = match take(theirs, "tool_call_id") {
            Some(Value::String(id)) => id,
            _ => String::new(),
        };
        let called = self.calls.iter().rev().find(|(known, _)| *known == id);
        let name = match (take(theirs, "name"), called) {
            (Some(Value::String(name)), _) => Some(name),
            (_, Some((_, name))) => Some(name.clone()),
            _ => None,
        };
        if let Some(name) = name {
            ours.insert("tool_name".to_owned(), name.into());
        }
        if !id.is_empty() {
            ours.insert("tool_call_id".to_owned(), id.into());
        }
    }
}

/// A part of a content.
enum Part {
    Text(String),
    /// In base64.
    Image(String),
}

fn of_part(mut part: Map<String, Value>) -> Result<Part, Unsupported> {
    let kind = match take(&mut part, "type") {
        Some(Value::String(kind)) => kind,
        _ => return Err(wrong("a part of a content must have a type")),
    };
    let text = |part: &mut Map<String, Value>, key| match take(part, key) {
        Some(Value::String(text)) => Ok(Part::Text(text)),
        _ => Err(wrong("a part of type text must have a text")),
    };
    match kind.as_str() {
        "text" | "input_text" | "output_text" => text(&mut part, "text"),
        "refusal" => text(&mut part, "refusal"),
        "image_url" | "input_image" => {
            let url = match take(&mut part, "image_url") {
                Some(Value::String(url)) => Some(url),
                Some(Value::Object(mut image)) => match take(&mut image, "url") {
                    Some(Value::String(url)) => Some(url),
                    _ => None,
                },
                _ => None,
            };
            image(&url.ok_or_else(|| wrong("a picture must have a url"))?)
        }
        _ => Err(wrong(
            "this model server takes text and pictures, and no other parts of a content",
        )),
    }
}

/// A picture from a `data:` URL (RFC 2397). None is fetched: what a client sends
/// never makes the gateway or the model server connect to anything.
fn image(url: &str) -> Result<Part, Unsupported> {
    let needed = || {
        wrong("a picture must be in the request, as data:image/…;base64,…, for this model server")
    };
    let (head, data) = url.split_once(',').ok_or_else(needed)?;
    let head = head.to_ascii_lowercase();
    let is_data = head.starts_with("data:") && head.ends_with(";base64");
    let data = data.trim();
    if !is_data || data.is_empty() {
        return Err(needed());
    }
    Ok(Part::Image(data.to_owned()))
}

/// The tools that the model may call; `None` if it may call none.
fn tools(body: &mut Map<String, Value>) -> Option<Vec<Value>> {
    let choice = take(body, "tool_choice").or_else(|| take(body, "function_call"));
    let mut tools = match take(body, "tools") {
        Some(Value::Array(tools)) => tools,
        _ => match take(body, "functions") {
            Some(Value::Array(functions)) => functions.into_iter().map(as_tool).collect(),
            _ => Vec::new(),
        },
    };
    match &choice {
        Some(Value::String(word)) if word == "none" => return None,
        Some(Value::Object(one)) => {
            let allowed = allowed_by(one);
            if !allowed.is_empty() {
                tools.retain(|tool| name_of(tool).is_some_and(|name| allowed.contains(&name)));
            }
        }
        _ => {}
    }
    (!tools.is_empty()).then_some(tools)
}

/// The tools that a choice names, one or several; none if it names no tool.
fn allowed_by(choice: &Map<String, Value>) -> Vec<&str> {
    let list = choice
        .get("allowed_tools")
        .and_then(|allowed| allowed.get("tools"))
        .and_then(Value::as_array);
    if let Some(list) = list {
        return list.iter().filter_map(name_of).collect();
    }
    let function = choice
        .get("function")
        .and_then(Value::as_object)
        .unwrap_or(choice);
    let name = function.get("name").and_then(Value::as_str);
    name.into_iter().collect()
}

fn as_tool(function: Value) -> Value {
    Map::from_iter([
        ("type".to_owned(), "function".into()),
        ("function".to_owned(), function),
    ])
    .into()
}

fn name_of(tool: &Value) -> Option<&str> {
    tool.get("function")?.get("name")?.as_str()
}

/// What the answer is to look like.
fn format(body: &mut Map<String, Value>) -> Option<Value> {
    let Some(Value::Object(mut wish)) = take(body, "response_format") else {
        return None;
    };
    match wish.get("type")?.as_str()? {
        "json_object" => Some("json".into()),
        "json_schema" => {
            let schema = match take(&mut wish, "json_schema") {
                Some(Value::Object(mut named)) => take(&mut named, "schema"),
                _ => None,
            };
            Some(schema.unwrap_or_else(|| "json".into()))
        }
        _ => None,
    }
}

/// Whether and how much it is to think; `None` if the client does not say.
fn think(body: &mut Map<String, Value>) -> Option<Value> {
    if let Some(own) = take(body, "think") {
        return Some(own);
    }
    let mut of = |key: &str, inner: &[&str]| match take(body, key) {
        Some(Value::Object(mut wish)) => inner.iter().find_map(|key| take(&mut wish, key)),
        _ => None,
    };
    // vLLM's and llama.cpp's way to say it, and OpenRouter's.
    let template = of("chat_template_kwargs", &["enable_thinking", "thinking"]);
    let effort = of("reasoning", &["effort"]);
    let effort = take(body, "reasoning_effort").or(effort);
    let level = match effort.as_ref().and_then(Value::as_str) {
        Some("none") => Some(false.into()),
        Some("minimal") => Some("low".into()),
        Some("xhigh") => Some("high".into()),
        Some(level) => Some(level.into()),
        None => None,
    };
    level.or(template.filter(Value::is_boolean))
}

fn wrong(message: &'static str) -> Unsupported {
    Unsupported::param("messages", message)
}
