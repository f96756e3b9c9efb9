//! The formats that captured lines are exported in.

use serde_json::{Value, json};

use super::{
    dialogue::{BETWEEN_RESULTS, unescaped},
    line::on_one_line,
    read::{Captured, From, split_thought},
};

/// What an export is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON array without system turns: vLLM's benchmark.
    SharegptJson,
    /// Lines of words alone: Unsloth.
    SharegptPlain,
    /// Lines with `messages`: TRL, Axolotl, OpenAI.
    OpenaiJsonl,
    /// Lines for LLaMA-Factory; a `dataset_info.json` names their columns.
    Llamafactory,
}

/// Why a line has no place in a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It has tool turns.
    Tools,
    /// It has images.
    Images,
}

impl Format {
    /// Returns a line in this format, without its end.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn render(self, line: &Captured) -> Result<Vec<u8>, Unfit> {
        let rendered = match self {
            Self::SharegptJson | Self::Llamafactory => with_columns(line),
            Self::SharegptPlain => plain(line)?,
            Self::OpenaiJsonl => messages(line)?,
        };
        Ok(on_one_line(rendered.to_string().into_bytes()))
    }
}

/// Returns what `dataset_info.json` says of a file of lines.
pub fn dataset_info(file: &str) -> Value {
    json!({
        "file_name": file,
        "formatting": "sharegpt",
        "columns": {
            "messages": "conversations",
            "system": "system",
            "tools": "tools",
            "images": "images",
        },
    })
}

fn turns(line: &Captured) -> Vec<Value> {
    let turns = line.conversations.iter();
    turns
        .map(|turn| json!({ "from": turn.from.as_str(), "value": turn.value }))
        .collect()
}

fn with_columns(line: &Captured) -> Value {
    json!({
        "id": line.id,
        "conversations": turns(line),
        "system": line.system,
        "tools": line.tools,
        "images": line.images,
    })
}

fn plain(line: &Captured) -> Result<Value, Unfit> {
    if line.has_tool_turns() {
        return Err(Unfit::Tools);
    }
    if !line.images.is_empty() {
        return Err(Unfit::Images);
    }
    let mut all = turns(line);
    if !line.system.is_empty() {
        all.insert(0, json!({ "from": "system", "value": line.system }));
    }
    Ok(json!({ "conversations": all }))
}

fn messages(line: &Captured) -> Result<Value, Unfit> {
    if !line.images.is_empty() {
        return Err(Unfit::Images);
    }
    let mut all = Vec::new();
    if !line.system.is_empty() {
        all.push(json!({ "role": "system", "content": line.system }));
    }
    let mut ids: Vec<String> = Vec::new();
    for (place, turn) in line.conversations.iter().enumerate() {
        let text = unescaped(&turn.value);
        match turn.from {
            From::Human => all.push(json!({ "role": "user", "content": text })),
            From::Gpt => all.push(json!({ "role": "assistant", "content": text })),
            From::FunctionCall => {
                let (thought, calls) = split_thought(&turn.value);
                let calls = read_calls(calls);
                ids = (0..calls.len())
                    .map(|i| format!("call_{place}_{i}"))
                    .collect();
                let calls: Vec<Value> = calls
                    .iter()
                    .zip(&ids)
                    .map(|(call, id)| tool_call(call, id))
                    .collect();
                all.push(json!({
                    "role": "assistant",
                    "content": thought.trim_end(),
                    "tool_calls": calls,
                }));
                continue;
            }
            From::Observation if ids.is_empty() => {
                all.push(json!({ "role": "user", "content": text }));
            }
            From::Observation => {
                let mut results: Vec<&str> = text.split(BETWEEN_RESULTS).collect();
                if results.len() != ids.len() {
                    results = vec![&*text];
                    results.resize(ids.len(), "");
                }
                // Every call must have its answer.
                all.extend(ids.iter().zip(results).map(
                    |(id, result)| json!({ "role": "tool", "tool_call_id": id, "content": result }),
                ));
            }
        }
        ids.clear();
    }
    let mut message = json!({ "messages": all });
    if let (Ok(Value::Array(tools)), Some(members)) = (
        serde_json::from_str::<Value>(&line.tools),
        message.as_object_mut(),
    ) {
        let tools = tools.iter();
        let tools = tools.map(|tool| json!({ "type": "function", "function": tool }));
        members.insert("tools".to_owned(), tools.collect());
    }
    Ok(message)
}

fn read_calls(value: &str) -> Vec<Value> {
    match serde_json::from_str(value) {
        Ok(Value::Array(calls)) => calls,
        Ok(one) => vec![one],
        Err(_) => Vec::new(),
    }
}

fn tool_call(call: &Value, id: &str) -> Value {
    let arguments = match call.get("arguments") {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => "{}".to_owned(),
    };
    let name = call.get("name").and_then(Value::as_str).unwrap_or("");
    json!({
        "id": id,
        "type": "function",
        "function": { "name": name, "arguments": arguments },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(turns: &[(&str, &str)], more: &Value) -> Captured {
        let turns: Vec<Value> = turns
            .iter()
            .map(|(from, value)| json!({ "from": from, "value": value }))
            .collect();
        let mut line = json!({ "id": "x", "conversations": turns, "system": "", "tools": "" });
        for (key, value) in more.as_object().unwrap() {
            line[key] = value.clone();
        }
        Captured::read(line.to_string().as_bytes()).unwrap()
    }

    fn rendered(format: Format, line: &Captured) -> Value {
        serde_json::from_slice(&format.render(line).unwrap()).unwrap()
    }

    fn with_tools() -> Captured {
        let calls = r#"[{"name":"a","arguments":{"x":1}},{"name":"b","arguments":{}}]"#;
        let results = format!("one{BETWEEN_RESULTS}two");
        line(
            &[
                ("human", "go"),
                (
                    "function_call",
                    &format!("<think>\nhm\n</think>\n\n{calls}"),
                ),
                ("observation", &results),
                ("gpt", "done"),
            ],
            &json!({ "system": "be", "tools": "[{\"name\":\"a\"}]" }),
        )
    }

    #[test]
    fn messages_have_each_call_and_its_result() {
        let all = rendered(Format::OpenaiJsonl, &with_tools());
        let roles = all["messages"].as_array().unwrap().iter();
        let roles: Vec<_> = roles.map(|message| &message["role"]).collect();
        assert_eq!(
            roles,
            ["system", "user", "assistant", "tool", "tool", "assistant"]
        );
        let called = &all["messages"][2];
        assert_eq!(called["content"], "<think>\nhm\n</think>");
        assert_eq!(
            called["tool_calls"][0]["function"]["arguments"],
            "{\"x\":1}"
        );
        assert_eq!(called["tool_calls"][1]["function"]["name"], "b");
        for (call, result) in [(0, "one"), (1, "two")] {
            let answer = &all["messages"][3 + call];
            assert_eq!(answer["tool_call_id"], called["tool_calls"][call]["id"]);
            assert_eq!(answer["content"], result);
        }
        assert_eq!(all["tools"][0]["function"]["name"], "a");
    }

    #[test]
    fn plain_lines_have_words_and_nothing_else() {
        assert_eq!(
            Format::SharegptPlain.render(&with_tools()),
            Err(Unfit::Tools)
        );
        let words = line(
            &[("human", "a\u{2028}b"), ("gpt", "c")],
            &json!({ "system": "be" }),
        );
        let bytes = Format::SharegptPlain.render(&words).unwrap();
        assert!(!String::from_utf8(bytes).unwrap().contains('\u{2028}'));
        let plain = rendered(Format::SharegptPlain, &words);
        assert_eq!(plain["conversations"][0]["from"], "system");
        assert_eq!(plain["conversations"][1]["value"], "a\u{2028}b");
        let image = format!("images/{}.png", "0f".repeat(32));
        let pictured = line(
            &[("human", "<image>a"), ("gpt", "c")],
            &json!({ "images": [image] }),
        );
        for format in [Format::SharegptPlain, Format::OpenaiJsonl] {
            assert_eq!(format.render(&pictured), Err(Unfit::Images));
        }
        let kept = rendered(Format::Llamafactory, &pictured);
        assert_eq!(kept["images"][0], image);
    }

    #[test]
    fn the_array_has_no_system_turn_and_nothing_of_meta() {
        let bare = rendered(Format::SharegptJson, &with_tools());
        assert_eq!(bare["conversations"][0]["from"], "human");
        assert_eq!(bare["system"], "be");
        assert_eq!(bare.get("meta"), None);
    }
}
