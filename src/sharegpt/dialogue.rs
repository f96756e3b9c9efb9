//! A dialogue as training wants it: turns that strictly alternate between the
//! one who asks and the one who answers.
//!
//! **Invariant:** the first turn asks, every other answers, whatever order the
//! messages came in. Neighbours of one side become one turn; where a side is
//! missing, an empty turn stands.

use std::{borrow::Cow, fmt::Write as _, mem};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Choice, lenient::text_of};

/// What stands between two turns that became one.
const BETWEEN: &str = "\n\n";
/// What stands between the results of parallel calls: as LLaMA-Factory's own
/// converter of OpenAI's format writes it, and so that they can be told apart.
pub const BETWEEN_RESULTS: &str = "\n</tool_response>\n<tool_response>\n";
/// Where an image stands in a text.
pub const IMAGE: &str = "<image>";
/// Words that loaders take for media; they are escaped where somebody wrote them.
const MARKS: [(&str, &str); 3] = [
    ("<image>", "&lt;image&gt;"),
    ("<video>", "&lt;video&gt;"),
    ("<audio>", "&lt;audio&gt;"),
];

/// The kinds of images with an ending of their own.
const IMAGE_KINDS: [(&str, &str); 9] = [
    ("image/png", "png"),
    ("image/jpeg", "jpg"),
    ("image/jpg", "jpg"),
    ("image/gif", "gif"),
    ("image/webp", "webp"),
    ("image/bmp", "bmp"),
    ("image/tiff", "tiff"),
    ("image/avif", "avif"),
    ("image/heic", "heic"),
];
/// The ending of all others.
const OTHER_IMAGES: &str = "bin";

/// Returns whether images get such an ending.
pub fn is_image_ending(ending: &str) -> bool {
    let mut kinds = IMAGE_KINDS.iter();
    ending == OTHER_IMAGES || kinds.any(|(_, known)| *known == ending)
}

/// Who a turn is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The user.
    Human,
    /// A tool, or several.
    Observation,
    /// The model, in words.
    Gpt,
    /// The model, calling tools.
    FunctionCall,
}

impl Who {
    /// Returns the word in `from`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Observation => "observation",
            Self::Gpt => "gpt",
            Self::FunctionCall => "function_call",
        }
    }

    const fn asks(self) -> bool {
        matches!(self, Self::Human | Self::Observation)
    }
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The tool's name.
    pub name: String,
    /// Its arguments as they were written: JSON, or a text if it is none.
    pub arguments: String,
}

impl Call {
    /// Writes the call as an object; arguments that are JSON stay what they are.
    fn write(&self, out: &mut String) {
        let arguments = self.arguments.trim();
        let is_json = serde_json::from_str::<serde::de::IgnoredAny>(arguments).is_ok();
        let arguments = match arguments {
            "" => Cow::Borrowed("{}"),
            json if is_json => Cow::Borrowed(json),
            text => Cow::Owned(json!(text).to_string()),
        };
        let name = json!(self.name);
        write!(out, "{{\"name\":{name},\"arguments\":{arguments}}}")
            .expect("a string takes any text");
    }
}

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Who it is from.
    pub who: Who,
    /// Its words; of a call, what was said beside it.
    pub text: String,
    /// What the model thought before it.
    pub thought: String,
    /// The calls, of a turn that calls.
    pub calls: Vec<Call>,
}

impl Turn {
    /// Makes a turn of words.
    pub fn new(who: Who, text: String) -> Self {
        Self {
            who,
            text,
            thought: String::new(),
            calls: Vec::new(),
        }
    }

    /// Returns the turn's value in a line.
    pub fn into_value(self) -> String {
        if self.calls.is_empty() && self.thought.trim().is_empty() {
            return self.text;
        }
        let mut out = String::with_capacity(self.text.len() + self.thought.len() + 32);
        if !self.thought.trim().is_empty() {
            out.push_str("<think>\n");
            out.push_str(self.thought.trim());
            out.push_str("\n</think>\n\n");
        }
        match self.calls.as_slice() {
            [] => out.push_str(&self.text),
            [one] => one.write(&mut out),
            several => {
                for (place, call) in several.iter().enumerate() {
                    out.push(if place == 0 { '[' } else { ',' });
                    call.write(&mut out);
                }
                out.push(']');
            }
        }
        out
    }
}

/// An image that somebody sent inside a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its file below the folder of captures: `images/`, the SHA-256 of the
    /// bytes, an ending.
    pub name: String,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Changes the words of a dialogue.
pub trait Rewrite {
    /// Returns what is to stand in place of a text.
    fn rewrite<'a>(&self, text: &'a str) -> Cow<'a, str>;
}

/// What was said, up to the answer and with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dialogue {
    /// What the system said, all of it.
    pub system: String,
    /// The tools that could be called, as a JSON list; empty without any.
    pub tools: String,
    /// The turns.
    pub turns: Vec<Turn>,
    /// Words that stood beside calls.
    pub preamble: String,
    /// The names of the images, in the order of their marks.
    pub named: Vec<String>,
    /// The images, each once.
    pub images: Vec<Image>,
}

impl Dialogue {
    /// Adds to what the system says.
    pub fn system(&mut self, text: &str) {
        join(&mut self.system, text, BETWEEN);
    }

    /// Names the tools that may be called.
    pub fn tools(&mut self, tools: &[Value]) {
        let functions: Vec<Value> = tools.iter().filter_map(function).collect();
        if !functions.is_empty() {
            self.tools = Value::Array(functions).to_string();
        }
    }

    /// Adds a turn, to the last one if that is of the same side.
    pub fn push(&mut self, turn: Turn) {
        let Some(last) = self.turns.last_mut() else {
            if !turn.who.asks() {
                self.turns.push(Turn::new(Who::Human, String::new()));
            }
            self.turns.push(turn);
            return;
        };
        if last.who.asks() != turn.who.asks() {
            self.turns.push(turn);
            return;
        }
        match (last.who, turn.who) {
            (Who::Observation, Who::Observation) => {
                last.text.push_str(BETWEEN_RESULTS);
                last.text.push_str(&turn.text);
            }
            (Who::FunctionCall, Who::Gpt) => {
                // The results that it speaks of were never sent.
                self.turns.push(Turn::new(Who::Observation, String::new()));
                self.turns.push(turn);
            }
            (Who::Gpt | Who::FunctionCall, Who::FunctionCall) => {
                last.who = Who::FunctionCall;
                last.calls.extend(turn.calls);
                join(&mut last.text, &turn.text, BETWEEN);
                join(&mut last.thought, &turn.thought, BETWEEN);
            }
            _ => {
                join(&mut last.text, &turn.text, BETWEEN);
                join(&mut last.thought, &turn.thought, BETWEEN);
            }
        }
    }

    /// Adds the answer. `continues`: it goes on with the last turn's own words.
    pub fn answer(&mut self, choice: Choice, continues: bool) {
        let text = self.words_of(&choice.text, &choice.parts);
        let turn = Turn {
            who: if choice.calls.is_empty() {
                Who::Gpt
            } else {
                Who::FunctionCall
            },
            text,
            thought: choice.thought,
            calls: choice.calls,
        };
        match self.turns.last_mut() {
            Some(last) if continues && last.who == Who::Gpt && turn.who == Who::Gpt => {
                last.text.push_str(&turn.text);
                join(&mut last.thought, &turn.thought, BETWEEN);
            }
            Some(_) => self.push(turn),
            None => {
                self.turns.push(Turn::new(Who::Human, String::new()));
                self.turns.push(turn);
            }
        }
        self.set_preambles_aside();
    }

    /// Takes the words that stand beside calls out of their turns.
    fn set_preambles_aside(&mut self) {
        for turn in &mut self.turns {
            if turn.who == Who::FunctionCall {
                let text = mem::take(&mut turn.text);
                join(&mut self.preamble, text.trim(), BETWEEN);
            }
        }
    }

    /// Returns the words of a message's content, and keeps its images.
    pub fn words(&mut self, content: &Value) -> String {
        match content {
            Value::Array(parts) => self.words_of("", parts),
            content => escaped(text_of(content)),
        }
    }

    fn words_of(&mut self, text: &str, parts: &[Value]) -> String {
        let mut words = escaped(text.to_owned());
        let mut after_text = !words.is_empty();
        for part in parts {
            if let Some(text) = text_of_part(part) {
                if after_text && !text.is_empty() {
                    words.push('\n');
                }
                after_text |= !text.is_empty();
                words.push_str(&escaped(text.to_owned()));
                continue;
            }
            if part.get("thinking").is_some() {
                continue;
            }
            after_text = false;
            match url_of_image(part) {
                Some(url) => match image_of(url) {
                    Some(image) => {
                        words.push_str(IMAGE);
                        self.named.push(image.name.clone());
                        if !self.images.iter().any(|known| known.name == image.name) {
                            self.images.push(image);
                        }
                    }
                    None if url.starts_with("data:") => words.push_str("[image]"),
                    None => {
                        words.push_str("[image: ");
                        words.push_str(&escaped(url.to_owned()));
                        words.push(']');
                    }
                },
                None => {
                    let kind = part.get("type").and_then(Value::as_str);
                    let kind = kind.unwrap_or("part").trim_start_matches("input_");
                    words.push('[');
                    words.push_str(&escaped(kind.chars().take(32).collect()));
                    words.push(']');
                }
            }
        }
        words
    }

    /// Changes every word that somebody has said.
    pub fn rewrite(&mut self, how: &dyn Rewrite) {
        let change = |text: &mut String| {
            if let Cow::Owned(changed) = how.rewrite(text) {
                *text = changed;
            }
        };
        change(&mut self.system);
        change(&mut self.preamble);
        if let Ok(mut tools) = serde_json::from_str::<Value>(&self.tools) {
            rewrite_value(&mut tools, how);
            self.tools = tools.to_string();
        }
        for turn in &mut self.turns {
            change(&mut turn.text);
            change(&mut turn.thought);
            for call in &mut turn.calls {
                change(&mut call.name);
                match serde_json::from_str::<Value>(&call.arguments) {
                    Ok(mut arguments) => {
                        if rewrite_value(&mut arguments, how) {
                            call.arguments = arguments.to_string();
                        }
                    }
                    Err(_) => change(&mut call.arguments),
                }
            }
        }
    }
}

/// Changes the texts of a value, its keys and numbers included; says whether
/// anything is another now.
fn rewrite_value(value: &mut Value, how: &dyn Rewrite) -> bool {
    match value {
        Value::String(text) => match how.rewrite(text) {
            Cow::Owned(changed) => {
                *text = changed;
                true
            }
            Cow::Borrowed(_) => false,
        },
        Value::Number(number) => match how.rewrite(&number.to_string()) {
            Cow::Owned(changed) => {
                *value = Value::String(changed);
                true
            }
            Cow::Borrowed(_) => false,
        },
        Value::Array(items) => items
            .iter_mut()
            .fold(false, |changed, item| rewrite_value(item, how) | changed),
        Value::Object(members) => {
            let mut changed = false;
            for (key, mut member) in mem::take(members) {
                changed |= rewrite_value(&mut member, how);
                let key = match how.rewrite(&key) {
                    Cow::Owned(other) => {
                        changed = true;
                        other
                    }
                    Cow::Borrowed(_) => key,
                };
                members.insert(key, member);
            }
            changed
        }
        Value::Null | Value::Bool(_) => false,
    }
}

fn join(text: &mut String, more: &str, between: &str) {
    if !text.is_empty() && !more.is_empty() {
        text.push_str(between);
    }
    text.push_str(more);
}

/// Escapes the words that loaders take for media.
fn escaped(text: String) -> String {
    if !text.contains('<') {
        return text;
    }
    MARKS.iter().fold(text, |text, (mark, escaped)| {
        if text.contains(mark) {
            text.replace(mark, escaped)
        } else {
            text
        }
    })
}

/// Undoes what [`Dialogue::words`] does to the words that loaders take for media.
pub fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains("&lt;") {
        return Cow::Borrowed(text);
    }
    let text = MARKS.iter().fold(text.to_owned(), |text, (mark, escaped)| {
        text.replace(escaped, mark)
    });
    Cow::Owned(text)
}

/// Returns a tool as loaders expect it, if it is a function: name, description
/// and parameters, none of them missing.
fn function(tool: &Value) -> Option<Value> {
    let function = match tool.get("function") {
        Some(function) => function,
        None if tool.get("type").is_none_or(|kind| kind == "function") => tool,
        None => return None,
    };
    let name = function.get("name")?.as_str()?;
    let description = function.get("description").and_then(Value::as_str);
    let mut parameters = function.get("parameters").cloned().unwrap_or(Value::Null);
    if !parameters.is_object() {
        parameters = json!({ "type": "object" });
    }
    if let Some(schema) = parameters.as_object_mut() {
        schema.entry("properties").or_insert_with(|| json!({}));
    }
    Some(json!({
        "name": name,
        "description": description.unwrap_or(""),
        "parameters": parameters,
    }))
}

fn text_of_part(part: &Value) -> Option<&str> {
    match part {
        Value::String(text) => Some(text),
        _ => ["text", "refusal"]
            .into_iter()
            .find_map(|key| part.get(key)?.as_str()),
    }
}

fn url_of_image(part: &Value) -> Option<&str> {
    let image = part.get("image_url").or_else(|| part.get("image"))?;
    image.as_str().or_else(|| image.get("url")?.as_str())
}

/// Decodes the image in a data URL; `None` if it is none.
fn image_of(url: &str) -> Option<Image> {
    /// Who writes data URLs by hand forgets the padding.
    const FORGIVING: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    const BASE64: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, FORGIVING);
    let (head, data) = url.strip_prefix("data:")?.split_once(',')?;
    let head = head.to_ascii_lowercase();
    let kind = head.strip_suffix(";base64")?;
    let kind = kind.split(';').next().unwrap_or_default();
    let known = IMAGE_KINDS.iter().find(|(known, _)| *known == kind);
    let ending = match known {
        Some((_, ending)) => *ending,
        // Nothing of what a client writes becomes a part of a path.
        None if kind.starts_with("image/") => OTHER_IMAGES,
        None => return None,
    };
    let bytes = BASE64.decode(data).ok().filter(|bytes| !bytes.is_empty())?;
    let mut name = String::from("images/");
    for byte in Sha256::digest(&bytes) {
        write!(name, "{byte:02x}").expect("a string takes any text");
    }
    name.push('.');
    name.push_str(ending);
    Some(Image { name, bytes })
}
