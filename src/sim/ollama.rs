//! Ollama's own API: `/api/chat`, `/api/generate`, `/api/embed`, `/api/tags`,
//! `/api/ps`, `/api/show`, `/api/version`. It answers with the same words as the
//! OpenAI endpoints, in lines of JSON.

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::{
    SimOptions,
    answers::{Answer, Shape, ToolCall, quoted},
    api::{self, Ask, Call, Message, Reply},
    faults::Fault,
    http::Head,
};

/// A request, as far as the simulator reads it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Native {
    model: Option<String>,
    /// A stream unless it says no.
    stream: Option<bool>,
    messages: Option<Vec<Message>>,
    prompt: Json,
    input: Json,
    dimensions: Option<usize>,
    tools: Option<Vec<Json>>,
    options: Options,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Options {
    num_predict: Option<i64>,
    num_ctx: Option<usize>,
}

/// Whether a path belongs to Ollama's own API: `…/api/chat` and its like, but
/// not `/api/v1/chat/completions`.
pub(super) fn is_native(path: &str) -> bool {
    path.rsplit('/').nth(1) == Some("api")
}

/// The models that are in memory: all, or none while they are loading.
pub(super) fn ps(options: &SimOptions, loading: bool) -> Reply {
    let models: Vec<Json> = match loading {
        true => Vec::new(),
        false => options.models.iter().map(|model| card(model)).collect(),
    };
    Reply::json(200, &json!({ "models": models }))
}

/// Returns the answer to a request. `id` — a number no other answer has.
pub(super) fn reply(
    options: &SimOptions,
    head: &Head,
    body: &[u8],
    fault: &Fault,
    id: u64,
) -> Reply {
    let path = head.path();
    let ends = |end: &str| path.ends_with(end);
    match head.method() {
        "GET" | "HEAD" if ends("/api/tags") => ps(options, false),
        "GET" | "HEAD" if ends("/api/ps") => ps(options, false),
        "POST" if ends("/api/chat") => called(options, Call::Chat, body, fault, id),
        "POST" if ends("/api/generate") => called(options, Call::Completion, body, fault, id),
        "POST" if ends("/api/embed") => called(options, Call::Embeddings, body, fault, id),
        "POST" if ends("/api/show") => called(options, Call::Moderations, body, fault, id),
        "GET" | "HEAD" | "POST" => Reply::whole(
            404,
            "text/plain; charset=utf-8",
            "404 page not found".into(),
        ),
        _ => Reply::whole(
            405,
            "text/plain; charset=utf-8",
            "405 method not allowed".into(),
        ),
    }
}

fn called(options: &SimOptions, call: Call, body: &[u8], fault: &Fault, id: u64) -> Reply {
    let native: Native = match serde_json::from_slice(body) {
        Ok(native) => native,
        Err(error) => return Reply::native(400, &error.to_string()),
    };
    let Some(model) = native.model.clone() else {
        return Reply::native(400, "model is required");
    };
    if fault.refuse_model || !options.models.contains(&model) {
        if fault.body.is_some() || fault.retry_after.is_some() {
            return Reply::ordered(404, fault, true);
        }
        return Reply::native(404, &format!("model '{model}' not found"));
    }
    match call {
        Call::Moderations => {
            let details = json!({ "family": "sim", "format": "none" });
            return Reply::json(
                200,
                &json!({ "details": details, "capabilities": ["completion", "tools"] }),
            );
        }
        Call::Embeddings => return embed(native, &model),
        // An empty list only loads the model.
        Call::Chat if native.messages.as_ref().is_none_or(Vec::is_empty) => {
            let message = json!({ "role": "assistant", "content": "" });
            return Reply::json(
                200,
                &json!({ "model": model, "message": message, "done": true, "done_reason": "load" }),
            );
        }
        _ => {}
    }
    let streamed = native.stream != Some(false);
    let num_ctx = native.options.num_ctx;
    let ask = ask_of(native, streamed);
    match api::answer(options, call, &ask, &model, fault, id) {
        Err(reply) => reply,
        Ok(mut answer) => {
            answer.shape = match call {
                Call::Chat => Shape::NativeChat,
                _ => Shape::NativeGenerate,
            };
            // What does not fit is cut, and counted is what was read.
            answer.prompt_tokens = answer.prompt_tokens.min(num_ctx.unwrap_or(usize::MAX));
            let mut reply = api::spoken(answer, streamed);
            if streamed {
                reply.content_type = "application/x-ndjson";
            }
            reply
        }
    }
}

/// The request in the words of the OpenAI endpoints.
fn ask_of(native: Native, streamed: bool) -> Ask {
    let asked = native.messages.as_deref().unwrap_or_default();
    let question = asked.last().map(|last| api::text_of(&last.content));
    // Ollama knows no tool_choice: a tool is called when its name is said.
    let named = native.tools.iter().flatten().find_map(|tool| {
        let name = tool.get("function")?.get("name")?.as_str()?;
        let said = question.as_ref().is_some_and(|text| text.contains(name));
        said.then(|| json!({ "function": { "name": name } }))
    });
    let limit = native.options.num_predict;
    Ask {
        stream: Some(streamed),
        messages: native.messages,
        prompt: native.prompt,
        tools: native.tools,
        tool_choice: named.unwrap_or_default(),
        // Less than 1 is no bound.
        max_tokens: limit.and_then(|n| u64::try_from(n).ok()).filter(|&n| n > 0),
        ..Ask::default()
    }
}

fn embed(native: Native, model: &str) -> Reply {
    let ask = Ask {
        input: native.input,
        dimensions: native.dimensions,
        ..Ask::default()
    };
    let (data, words) = match api::vectors(&ask, model) {
        Ok(vectors) => vectors,
        Err(reply) => return reply,
    };
    Reply::json(
        200,
        &json!({ "model": model, "embeddings": data, "prompt_eval_count": words }),
    )
}

fn card(model: &str) -> Json {
    json!({
        "name": model, "model": model, "size": 1, "digest": "sim",
        "details": { "family": "sim", "format": "none" },
    })
}

/// The lines of an answer.
impl Answer {
    /// Writes one line of a stream; the last says `done`.
    pub(super) fn render_line(&self, event: usize, out: &mut Vec<u8>) {
        let tokens = self.tokens_each();
        if event >= tokens {
            self.open_line(b"", None, true, out);
            self.close_line(tokens, out);
            return;
        }
        let mut word = Vec::new();
        if self.tool.is_none() {
            self.text.push(self.first_word + event, &mut word);
        }
        self.open_line(&word, self.tool.as_ref(), false, out);
        out.push(b'}');
    }

    /// Returns the answer as one line.
    pub(super) fn whole_line(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let text = match self.tool {
            Some(_) => String::new(),
            None => self.whole_text(),
        };
        self.open_line(text.as_bytes(), self.tool.as_ref(), true, &mut out);
        self.close_line(self.tokens_each(), &mut out);
        out
    }

    /// Writes a line up to its `done`. `content` — plain text that needs no
    /// escape.
    pub(super) fn open_line(
        &self,
        content: &[u8],
        tool: Option<&ToolCall>,
        done: bool,
        out: &mut Vec<u8>,
    ) {
        let mut put = |text: &[u8]| out.extend_from_slice(text);
        put(br#"{"model":"#);
        put(self.model.as_bytes());
        put(br#","created_at":"2026-01-01T00:00:00Z","#);
        put(match self.shape {
            Shape::NativeChat => br#""message":{"role":"assistant","content":""#,
            _ => br#""response":""#,
        });
        put(content);
        put(b"\"");
        if let Some(tool) = tool {
            let (name, arguments) = (quoted(&tool.name), &tool.arguments);
            let call = format!(
                r#","tool_calls":[{{"id":"call_{:08x}","function":{{"index":0,"name":{name},"arguments":{arguments}}}}}]"#,
                self.id
            );
            put(call.as_bytes());
        }
        if self.shape == Shape::NativeChat {
            put(b"}");
        }
        put(format!(r#","done":{done}"#).as_bytes());
    }

    fn close_line(&self, tokens: usize, out: &mut Vec<u8>) {
        let reason = if self.truncated { "length" } else { "stop" };
        let prompt = self.prompt_tokens;
        let mut end = format!(
            r#","done_reason":"{reason}","total_duration":2000000,"load_duration":1000000"#
        );
        if !self.no_counts {
            end += &format!(
                r#","prompt_eval_count":{prompt},"prompt_eval_duration":1000000,"eval_count":{tokens},"eval_duration":1000000"#
            );
        }
        out.extend_from_slice(end.as_bytes());
        out.push(b'}');
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::sim::{api::Content, http::Framing};

    fn ask(method: &str, target: &str, body: &Json) -> Reply {
        let head = Head {
            bytes: Bytes::from(format!("{method} {target} HTTP/1.1\r\n\r\n")),
            framing: Framing::Length(0),
            expects_continue: false,
            keep_alive: true,
            fault: None,
            authorization: None,
        };
        let (options, fault) = (SimOptions::quick("sim"), Fault::default());
        api::reply(&options, &head, body.to_string().as_bytes(), &fault, 7)
    }

    fn json(reply: &Reply) -> Json {
        match &reply.content {
            Content::Whole(body) | Content::Thought(body, _) => {
                serde_json::from_slice(body).unwrap()
            }
            Content::Events(_) => panic!("a stream"),
        }
    }

    fn lines(reply: &Reply) -> Vec<Json> {
        let Content::Events(answer) = &reply.content else {
            panic!("no stream");
        };
        assert!(answer.done().is_none());
        let line = |event| {
            let mut line = Vec::new();
            answer.render(event, &mut line);
            serde_json::from_slice(&line).unwrap()
        };
        (0..answer.events()).map(line).collect()
    }

    fn chat(more: Json) -> Json {
        let mut body = json!({ "model": "demo", "messages": [{ "role": "user", "content": "one two three" }] });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    }

    #[test]
    fn a_chat_is_a_stream_unless_it_says_no_and_both_say_the_same() {
        let streamed = ask("POST", "/api/chat", &chat(json!({})));
        assert_eq!(streamed.content_type, "application/x-ndjson");
        let lines = lines(&streamed);
        let (last, words) = lines.split_last().unwrap();
        let text: String = words
            .iter()
            .map(|line| line["message"]["content"].as_str().unwrap())
            .collect();
        assert!(words.iter().all(|line| line["done"] == false));
        let whole = json(&ask("POST", "/api/chat", &chat(json!({ "stream": false }))));
        assert_eq!(whole["message"]["content"], text);
        for end in [last, &whole] {
            assert_eq!(
                (&end["done"], &end["done_reason"]),
                (&json!(true), &json!("stop"))
            );
            assert_eq!(
                (&end["prompt_eval_count"], &end["eval_count"]),
                (&json!(3), &json!(24))
            );
        }
    }

    #[test]
    fn num_predict_num_ctx_and_tools_are_honoured() {
        let options = json!({ "num_predict": 2, "num_ctx": 2 });
        let whole = json(&ask(
            "POST",
            "/api/chat",
            &chat(json!({ "stream": false, "options": options })),
        ));
        assert_eq!(
            (&whole["done_reason"], &whole["eval_count"]),
            (&json!("length"), &json!(2))
        );
        assert_eq!(whole["prompt_eval_count"], 2);
        let tools = json!([{ "type": "function", "function": { "name": "two", "parameters": { "type": "object", "properties": { "city": { "type": "string" } } } } }]);
        let lines = lines(&ask("POST", "/api/chat", &chat(json!({ "tools": tools }))));
        let call = &lines[0]["message"]["tool_calls"][0]["function"];
        assert_eq!(
            (&call["name"], &call["arguments"]),
            (&json!("two"), &json!({ "city": "harbor" }))
        );
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn the_other_calls_answer_and_what_there_is_not_is_404() {
        let embedded = json(&ask(
            "POST",
            "/api/embed",
            &json!({ "model": "demo", "input": ["a b", "c"], "dimensions": 4 }),
        ));
        assert_eq!(embedded["embeddings"][1].as_array().unwrap().len(), 4);
        assert_eq!(embedded["prompt_eval_count"], 3);
        let generated = json(&ask(
            "POST",
            "/api/generate",
            &json!({ "model": "demo", "prompt": "x", "stream": false }),
        ));
        assert!(
            generated["response"]
                .as_str()
                .unwrap()
                .starts_with("sim answers:")
        );
        for path in ["/api/tags", "/api/ps"] {
            assert_eq!(
                json(&ask("GET", path, &Json::Null))["models"][0]["name"],
                "demo"
            );
        }
        assert_eq!(
            ask("POST", "/api/show", &json!({ "model": "demo" })).status,
            200
        );
        assert_eq!(
            ask("POST", "/api/pull", &json!({ "model": "demo" })).status,
            404
        );
        let unknown = ask("POST", "/api/chat", &json!({ "model": "nope" }));
        assert_eq!(json(&unknown), json!({ "error": "model 'nope' not found" }));
    }
}
