//! A client's request: its bytes, and what the gateway reads of them. What it
//! changes in them is in [`super::edit`].
//!
//! Start at [`ApiRequest::parse`].
//!
//! **Invariant:** what is read here is what any JSON reader would read, since
//! [`json::scan`] has refused everything that two readers could read apart.

use bytes::Bytes;

use super::{
    Endpoint, N_PREDICT, TOKEN_KEYS,
    cursor::Cursor,
    json::{self, Kind, Member, Object},
};
use crate::error::{Error, Result};

/// The longest model name, in bytes.
const MODEL_BYTES_MAX: usize = 256;
/// The most messages of one chat, or items of one `input` of responses.
const MESSAGES_MAX: usize = 4096;
/// The most prompts of one completion call; a list of token ids is one prompt.
const PROMPTS_MAX: usize = 64;
/// The most texts to embed, moderate or rank in one call.
const INPUTS_MAX: usize = 2048;
/// The most stop sequences.
const STOPS_MAX: usize = 32;
/// The most answers to one prompt.
const ANSWERS_MAX: u64 = 128;
/// The most tokens that can be wished for.
const TOKENS_MAX: u64 = 10_000_000;

/// Keys by which other gateways let a client choose where a request goes.
const STEERING: [&str; 4] = ["api_base", "base_url", "api_key", "custom_llm_provider"];

/// The keys that are read here. Some readers (Go's, and so Ollama) take any
/// other spelling of one for it: `{"model":"a","MODEL":"b"}` asks them for b.
const READ: [&str; 15] = [
    "model",
    "stream",
    "stream_options",
    "n",
    "best_of",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n_predict",
    "stop",
    "messages",
    "prompt",
    "input",
    "query",
    "documents",
];

/// A request that has been checked, with the bytes it came in.
#[derive(Clone, Debug)]
pub struct ApiRequest {
    /// Which call it is.
    pub endpoint: Endpoint,
    /// The body as it came.
    pub raw: Bytes,
    /// Where the top-level members stand in `raw`.
    pub object: Object,
    /// The model asked for: 1..=256 bytes, no control characters.
    pub model: String,
    /// Whether the answer is to be a stream of events.
    pub stream: bool,
    /// How many answers are wanted, 1..=128; 1 if the client does not say.
    pub n: u32,
    /// The bound on generated tokens; the largest if there are several, since
    /// servers differ in which they heed. `None` if one of them says "no bound".
    pub max_tokens: Option<MaxTokens>,
    /// `stream_options.include_usage`, if the client wrote it.
    pub include_usage: Option<bool>,
}

/// A client's bound on the tokens of one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxTokens {
    /// The key that says so: one of [`Endpoint::token_keys`].
    pub key: &'static str,
    /// Tokens, 1..=10,000,000.
    pub value: u64,
}

impl ApiRequest {
    /// Checks a body and reads what the gateway decides by. `max_depth` counts
    /// nested containers, the body itself included.
    ///
    /// # Errors
    /// 400 with `param` naming the member at fault, if it is one.
    pub fn parse(endpoint: Endpoint, raw: Bytes, max_depth: usize) -> Result<Self> {
        let object = json::scan(&raw, max_depth)?;
        let body = Body {
            raw: &raw,
            object: &object,
        };
        for key in STEERING {
            if body.object.find(body.raw, key).is_some() {
                return Err(Error::invalid(
                    "unsupported_parameter",
                    format!("`{key}` is not supported: where a request goes is not for it to say"),
                )
                .param(key));
            }
        }
        body.check_spelling()?;
        let model = body.model()?;
        let stream = body.flag("stream")?.unwrap_or(false);
        if stream && !endpoint.streams() {
            return Err(Error::invalid(
                "unsupported_value",
                format!("`stream` is not supported by {}", endpoint.path()),
            )
            .param("stream"));
        }
        let n = body.integer("n", ANSWERS_MAX)?.unwrap_or(1);
        body.integer("best_of", ANSWERS_MAX)?;
        let max_tokens = body.max_tokens(endpoint)?;
        let include_usage = body.include_usage(max_depth)?;
        body.check_stop()?;
        match endpoint {
            Endpoint::ChatCompletions => body.check_messages()?,
            Endpoint::Completions => body.check_prompt()?,
            Endpoint::Embeddings | Endpoint::Moderations => body.check_input()?,
            Endpoint::Responses => body.check_turns()?,
            Endpoint::Rerank => body.check_ranking()?,
        }
        Ok(Self {
            endpoint,
            model,
            stream,
            n: u32::try_from(n).unwrap_or(1),
            max_tokens,
            include_usage,
            object,
            raw,
        })
    }

    /// Returns a top-level member's value as it is written, with the quotes of a
    /// string.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.object
            .find(&self.raw, key)
            .map(|member| member.value.of(&self.raw))
    }

    /// Returns a number that stays the same while a conversation goes on, for
    /// sending its turns to one upstream: over the model and the messages up to
    /// the first of the user, of long ones the beginning. The same in every
    /// process. A `prompt_cache_key` takes the messages' place.
    pub fn conversation_key(&self) -> u64 {
        let mut hash = Fnv::default();
        hash.write(self.model.as_bytes());
        if let Some(key @ [b'"', _, _, ..]) = self.get("prompt_cache_key") {
            hash.write(key);
            return hash.0;
        }
        let opening = ["messages", "input", "prompt", "query"]
            .into_iter()
            .find_map(|key| self.get(key));
        let Some(opening) = opening else {
            return hash.0;
        };
        let mut turns = Cursor::new(opening);
        if turns.peek() != Some(b'[') {
            hash.write(opening);
            return hash.0;
        }
        turns.enter_array();
        while turns.item() {
            let turn = turns.skip().unwrap_or_default();
            hash.write(turn);
            if is_of_user(turn) {
                break;
            }
        }
        hash.0
    }
}

/// Says whether a message is the user's; what has no role is.
fn is_of_user(message: &[u8]) -> bool {
    let mut fields = Cursor::new(message);
    if !fields.enter_object() {
        return true;
    }
    while let Some(key) = fields.key() {
        let value = fields.skip();
        if key == b"role" {
            return value == Some(b"\"user\"");
        }
    }
    true
}

/// FNV-1a, 64 bits: stable across processes and machines.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Of a long piece its length and its first 1,024 bytes are enough.
    fn write(&mut self, piece: &[u8]) {
        let length = u64::try_from(piece.len()).unwrap_or(u64::MAX).to_le_bytes();
        for byte in length.iter().chain(piece.iter().take(1024)) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// The checks of one body.
struct Body<'a> {
    raw: &'a [u8],
    object: &'a Object,
}

impl<'a> Body<'a> {
    /// Finds a member; null counts as absent, as it does with OpenAI.
    fn find(&self, key: &str) -> Option<(&'a Member, &'a [u8])> {
        let member = self.object.find(self.raw, key)?;
        (member.kind != Kind::Null).then(|| (member, member.value.of(self.raw)))
    }

    fn required(&self, key: &'static str) -> Result<(&'a Member, &'a [u8])> {
        self.find(key).ok_or_else(|| {
            Error::invalid("missing_required_parameter", format!("`{key}` is missing")).param(key)
        })
    }

    /// Refuses a key that is one of [`READ`] but for upper and lower case.
    fn check_spelling(&self) -> Result<()> {
        let plain = |byte: &u8| byte.is_ascii_lowercase() || *byte == b'_';
        for member in &self.object.members {
            let name = member.name(self.raw);
            // Upper case in the way of Unicode: \u{17f} is an s, \u{212a} a k.
            if name.len() > 64 || name.iter().all(plain) {
                continue;
            }
            let folded = String::from_utf8_lossy(name).to_uppercase().to_lowercase();
            if let Some(key) = READ.into_iter().find(|key| *key == folded) {
                return Err(wrong(key, "must be spelled in lower case"));
            }
        }
        Ok(())
    }

    fn model(&self) -> Result<String> {
        let (_, value) = self.required("model")?;
        let Some(model) = json::text(value) else {
            return Err(wrong("model", "must be a string"));
        };
        if model.is_empty() || model.len() > MODEL_BYTES_MAX {
            return Err(wrong("model", "must be 1 to 256 bytes long"));
        }
        if model.chars().any(char::is_control) {
            return Err(wrong("model", "must not contain control characters"));
        }
        Ok(model.into_owned())
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>> {
        match self.find(key) {
            None => Ok(None),
            Some((_, b"true")) => Ok(Some(true)),
            Some((_, b"false")) => Ok(Some(false)),
            Some(_) => Err(wrong(key, "must be true or false")),
        }
    }

    fn integer(&self, key: &'static str, max: u64) -> Result<Option<u64>> {
        let Some((_, value)) = self.find(key) else {
            return Ok(None);
        };
        match Cursor::new(value).integer() {
            Some(number) if (1..=max).contains(&number) => Ok(Some(number)),
            _ => Err(wrong(
                key,
                &format!("must be a whole number from 1 to {max}"),
            )),
        }
    }

    fn max_tokens(&self, endpoint: Endpoint) -> Result<Option<MaxTokens>> {
        let mut largest: Option<MaxTokens> = None;
        let mut boundless = false;
        for key in TOKEN_KEYS {
            if key == N_PREDICT && self.find(key).is_some_and(|(_, value)| is_negative(value)) {
                boundless |= endpoint.token_keys().contains(&key);
                continue;
            }
            if let Some(value) = self.integer(key, TOKENS_MAX)?
                && endpoint.token_keys().contains(&key)
                && largest.is_none_or(|other| other.value < value)
            {
                largest = Some(MaxTokens { key, value });
            }
        }
        Ok(largest.filter(|_| !boundless))
    }

    fn include_usage(&self, max_depth: usize) -> Result<Option<bool>> {
        let Some((member, value)) = self.find("stream_options") else {
            return Ok(None);
        };
        if member.kind != Kind::Object {
            return Err(wrong("stream_options", "must be an object"));
        }
        let options = json::scan(value, max_depth)?;
        let options = Body {
            raw: value,
            object: &options,
        };
        options.flag("include_usage").map_err(|error| Error {
            message: "`stream_options.include_usage` must be true or false".into(),
            param: Some("stream_options.include_usage".into()),
            ..error
        })
    }

    fn check_stop(&self) -> Result<()> {
        match self.find("stop") {
            None => Ok(()),
            Some((stop, _)) => match stop.kind {
                Kind::String => Ok(()),
                Kind::Array if stop.items <= STOPS_MAX && stop.item_kinds.only(Kind::String) => {
                    Ok(())
                }
                _ => Err(wrong(
                    "stop",
                    "must be a string or an array of at most 32 strings",
                )),
            },
        }
    }

    fn check_messages(&self) -> Result<()> {
        let (messages, _) = self.required("messages")?;
        if messages.kind != Kind::Array || messages.items == 0 {
            return Err(wrong("messages", "must be an array that is not empty"));
        }
        if messages.items > MESSAGES_MAX {
            return Err(wrong("messages", "must have at most 4096 items"));
        }
        if !messages.item_kinds.only(Kind::Object) {
            return Err(wrong("messages", "must have objects only as its items"));
        }
        Ok(())
    }

    fn check_prompt(&self) -> Result<()> {
        let (prompt, _) = self.required("prompt")?;
        match prompt.kind {
            Kind::String => Ok(()),
            Kind::Array if prompt.items > 0 => {
                let kinds = prompt.item_kinds;
                if kinds.only(Kind::Int) {
                    return Ok(()); // one prompt of token ids
                }
                if !kinds.only(Kind::String) && !kinds.only(Kind::Array) {
                    return Err(wrong(
                        "prompt",
                        "must have as its items strings only, integers only or arrays only",
                    ));
                }
                if prompt.items > PROMPTS_MAX {
                    return Err(wrong("prompt", "must have at most 64 prompts"));
                }
                Ok(())
            }
            _ => Err(wrong(
                "prompt",
                "must be a string or an array that is not empty",
            )),
        }
    }

    fn check_input(&self) -> Result<()> {
        let (input, _) = self.required("input")?;
        match input.kind {
            Kind::String => Ok(()),
            Kind::Array if input.items > 0 => {
                if input.item_kinds.only(Kind::Int) {
                    return Ok(()); // one text of token ids
                }
                if input.items > INPUTS_MAX {
                    return Err(wrong("input", "must have at most 2048 items"));
                }
                let uniform = [Kind::String, Kind::Array, Kind::Object]
                    .into_iter()
                    .any(|kind| input.item_kinds.only(kind));
                if !uniform {
                    return Err(wrong(
                        "input",
                        "must have as its items strings only, integers only, arrays only or objects only",
                    ));
                }
                Ok(())
            }
            _ => Err(wrong(
                "input",
                "must be a string or an array that is not empty",
            )),
        }
    }

    /// The `input` of responses; a call that goes on from something stored, or
    /// that fills in a stored prompt, may do without.
    fn check_turns(&self) -> Result<()> {
        let goes_on = ["previous_response_id", "conversation", "prompt"]
            .into_iter()
            .any(|key| self.find(key).is_some());
        if goes_on && self.find("input").is_none() {
            return Ok(());
        }
        let (input, _) = self.required("input")?;
        match input.kind {
            Kind::String => Ok(()),
            Kind::Array if input.items > MESSAGES_MAX => {
                Err(wrong("input", "must have at most 4096 items"))
            }
            Kind::Array if input.item_kinds.only(Kind::Object) => Ok(()),
            _ => Err(wrong("input", "must be a string or an array of objects")),
        }
    }

    fn check_ranking(&self) -> Result<()> {
        let (query, _) = self.required("query")?;
        if !matches!(query.kind, Kind::String | Kind::Object) {
            return Err(wrong("query", "must be a string or an object"));
        }
        let (documents, _) = self.required("documents")?;
        match documents.kind {
            Kind::Object => return Ok(()), // several media, as vLLM has it
            Kind::Array if documents.items > 0 => {}
            _ => {
                return Err(wrong("documents", "must be an array that is not empty"));
            }
        }
        if documents.items > INPUTS_MAX {
            return Err(wrong("documents", "must have at most 2048 items"));
        }
        let kinds = documents.item_kinds;
        if !kinds.only(Kind::String) && !kinds.only(Kind::Object) {
            return Err(wrong(
                "documents",
                "must have as its items strings only or objects only",
            ));
        }
        Ok(())
    }
}

/// Says whether a number is below 0: to llama.cpp that means without a bound.
fn is_negative(value: &[u8]) -> bool {
    let digits = value.strip_prefix(b"-").unwrap_or_default();
    !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) && digits != b"0"
}

/// 400: a member's value is not what it should be.
fn wrong(key: &'static str, expected: &str) -> Error {
    Error::invalid("invalid_value", format!("`{key}` {expected}")).param(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(endpoint: Endpoint, body: impl Into<Bytes>) -> Result<ApiRequest> {
        ApiRequest::parse(endpoint, body.into(), 64)
    }

    fn chat(more: &str) -> ApiRequest {
        let body =
            format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{more}}}"#);
        parse(Endpoint::ChatCompletions, body).unwrap()
    }

    #[test]
    fn a_key_that_other_readers_take_for_ours_is_refused() {
        for (more, param) in [
            (r#","MODEL":"other""#, "model"),
            (r#","Max_Tokens":100000"#, "max_tokens"),
            (r#","\u017ftream":true"#, "stream"),
            (r#","max_to\u212aens":100000"#, "max_tokens"),
        ] {
            let body = format!(r#"{{"model":"m","messages":[{{"Model":1}}]{more}}}"#);
            let (code, at, _) = refusal(Endpoint::ChatCompletions, &body);
            assert_eq!((&*code, &*at), ("invalid_value", param), "{body}");
        }
        assert_eq!(chat(r#","Modell":"x","top_K":1,"x-Model":2"#).model, "m");
    }

    /// What a client is told: code, param and message.
    fn refusal(endpoint: Endpoint, body: &str) -> (String, String, String) {
        match parse(endpoint, body.to_owned()) {
            Ok(_) => panic!("taken: {body}"),
            Err(error) => {
                assert_eq!(error.status, 400, "{body}");
                assert_eq!(error.kind, "invalid_request_error", "{body}");
                (
                    error.code.unwrap().into_owned(),
                    error.param.unwrap_or_default().into_owned(),
                    error.message.into_owned(),
                )
            }
        }
    }

    #[test]
    fn what_is_decided_by_is_read() {
        let request = chat(
            r#","stream":true,"n":2,"max_completion_tokens":50,"stream_options":{"include_usage":false}"#,
        );
        assert_eq!(request.model, "m");
        assert!(request.stream);
        assert_eq!(request.n, 2);
        assert_eq!(
            request.max_tokens,
            Some(MaxTokens {
                key: "max_completion_tokens",
                value: 50
            })
        );
        assert_eq!(request.include_usage, Some(false));
        assert_eq!(request.get("n"), Some(&b"2"[..]));
        assert_eq!(request.get("model"), Some(&b"\"m\""[..]));
        assert_eq!(request.get("seed"), None);
    }

    #[test]
    fn null_counts_as_absent() {
        let request = chat(
            r#","stream":null,"n":null,"best_of":null,"max_tokens":null,"stop":null,"stream_options":null"#,
        );
        assert!(!request.stream);
        assert_eq!(request.n, 1);
        assert_eq!(request.max_tokens, None);
        assert_eq!(request.include_usage, None);
    }

    #[test]
    fn of_two_bounds_the_larger_is_told() {
        let request = chat(r#","max_tokens":5,"max_completion_tokens":9"#);
        assert_eq!(request.max_tokens.unwrap().value, 9);
        let request = chat(r#","max_tokens":9,"max_completion_tokens":5"#);
        assert_eq!(request.max_tokens.unwrap().key, "max_tokens");
    }

    #[test]
    fn the_bound_of_llama_cpp_is_one_too() {
        for (more, value) in [
            (r#","n_predict":7"#, Some(7)),
            (r#","max_tokens":5,"n_predict":900"#, Some(900)),
            (r#","max_tokens":5,"n_predict":-1"#, None),
            (r#","max_tokens":5,"max_output_tokens":9"#, Some(5)),
            (r#","n_predict":null"#, None),
        ] {
            let read = chat(more).max_tokens.map(|most| most.value);
            assert_eq!(read, value, "{more}");
        }
        for value in ["0", "\"7\"", "1.5", "99999999", "-0"] {
            let body = format!(r#"{{"model":"m","messages":[{{}}],"n_predict":{value}}}"#);
            let (code, param, _) = refusal(Endpoint::ChatCompletions, &body);
            assert_eq!((&*code, &*param), ("invalid_value", "n_predict"), "{value}");
        }
        let embed = r#"{"model":"m","input":"a","max_tokens":5}"#;
        assert_eq!(parse(Endpoint::Embeddings, embed).unwrap().max_tokens, None);
    }

    #[test]
    fn a_model_that_is_none_is_refused() {
        let long = format!("\"{}\"", "m".repeat(257));
        for model in [
            "1",
            "true",
            "[]",
            "{}",
            "[\"m\"]",
            "\"\"",
            "\"a\\nb\"",
            "\"a\\u0000\"",
            "\"\\u007f\"",
            "\"\\u0085\"",
            &long,
        ] {
            let body = format!(r#"{{"model":{model},"messages":[{{}}]}}"#);
            let (code, param, message) = refusal(Endpoint::ChatCompletions, &body);
            assert_eq!((&*code, &*param), ("invalid_value", "model"), "{message}");
        }
        for body in [
            r#"{"messages":[{}]}"#,
            r#"{"model":null,"messages":[{}]}"#,
            "{}",
        ] {
            let (code, param, message) = refusal(Endpoint::ChatCompletions, body);
            assert_eq!(code, "missing_required_parameter");
            assert_eq!((&*param, &*message), ("model", "`model` is missing"));
        }
        let longest = format!(r#"{{"model":"{}","messages":[{{}}]}}"#, "é".repeat(128));
        assert!(parse(Endpoint::ChatCompletions, longest).is_ok());
    }

    #[test]
    fn a_model_with_escapes_is_read_as_it_is_meant() {
        let body = r#"{"\u006dodel":"\u0071wen\/\ud83d\ude00","messages":[{}]}"#;
        let request = parse(Endpoint::ChatCompletions, body).unwrap();
        assert_eq!(request.model, "qwen/😀");
    }

    #[test]
    fn every_bad_member_is_refused_by_its_name() {
        let many_stops = format!(r#""stop":[{}"x"]"#, "\"x\",".repeat(32));
        for (param, member) in [
            ("stream", r#""stream":1"#),
            ("stream", r#""stream":"true""#),
            ("stream", r#""stream":[]"#),
            ("n", r#""n":0"#),
            ("n", r#""n":129"#),
            ("n", r#""n":-1"#),
            ("n", r#""n":1.0"#),
            ("n", r#""n":1e0"#),
            ("n", r#""n":"1""#),
            ("n", r#""n":true"#),
            ("n", r#""n":[1]"#),
            ("n", r#""n":100000000000000000000000000001"#),
            ("best_of", r#""best_of":129"#),
            ("max_tokens", r#""max_tokens":0"#),
            ("max_tokens", r#""max_tokens":-5"#),
            ("max_tokens", r#""max_tokens":10000001"#),
            ("max_tokens", r#""max_tokens":2.5"#),
            ("max_tokens", r#""max_tokens":"many""#),
            ("max_tokens", r#""max_tokens":18446744073709551617"#),
            ("max_completion_tokens", r#""max_completion_tokens":{}"#),
            ("max_output_tokens", r#""max_output_tokens":99999999999"#),
            ("stop", r#""stop":1"#),
            ("stop", r#""stop":[1]"#),
            ("stop", r#""stop":{}"#),
            ("stop", &many_stops),
            ("stream_options", r#""stream_options":true"#),
            ("stream_options", r#""stream_options":[]"#),
            (
                "stream_options.include_usage",
                r#""stream_options":{"include_usage":1}"#,
            ),
        ] {
            let body = format!(r#"{{"model":"m","messages":[{{}}],{member}}}"#);
            let (code, told, message) = refusal(Endpoint::ChatCompletions, &body);
            assert_eq!((&*code, &*told), ("invalid_value", param), "{message}");
            assert!(message.starts_with(&format!("`{param}` must")), "{message}");
        }
    }

    #[test]
    fn bounds_themselves_are_allowed() {
        chat(r#","n":128,"best_of":128,"max_tokens":10000000"#);
        let stops = format!(r#","stop":[{}"x"]"#, "\"x\",".repeat(31));
        chat(&stops);
        chat(r#","stop":"x""#);
        chat(r#","stop":[]"#);
    }

    #[test]
    fn messages_must_be_a_list_of_objects() {
        for messages in ["[]", "{}", "\"hi\"", "1", "[1]", "[{},null]", "[[]]"] {
            let body = format!(r#"{{"model":"m","messages":{messages}}}"#);
            let (code, param, _) = refusal(Endpoint::ChatCompletions, &body);
            assert_eq!((&*code, &*param), ("invalid_value", "messages"));
        }
        for body in [r#"{"model":"m"}"#, r#"{"model":"m","messages":null}"#] {
            let (code, param, _) = refusal(Endpoint::ChatCompletions, body);
            assert_eq!(
                (&*code, &*param),
                ("missing_required_parameter", "messages")
            );
        }
        let list = |n: usize| {
            format!(
                r#"{{"model":"m","messages":[{}{{}}]}}"#,
                "{},".repeat(n - 1)
            )
        };
        assert!(parse(Endpoint::ChatCompletions, list(4096)).is_ok());
        let (_, param, message) = refusal(Endpoint::ChatCompletions, &list(4097));
        assert_eq!(param, "messages");
        assert_eq!(message, "`messages` must have at most 4096 items");
    }

    #[test]
    fn prompts_may_be_texts_or_tokens_but_not_both() {
        let body = |prompt: &str| format!(r#"{{"model":"m","prompt":{prompt}}}"#);
        let ids = format!("[{}1]", "17,".repeat(100_000));
        let texts = format!("[{}\"x\"]", "\"x\",".repeat(63));
        for prompt in [
            "\"x\"",
            "\"\"",
            "[\"x\"]",
            "[1,2]",
            "[[1],[2]]",
            &ids,
            &texts,
        ] {
            assert!(
                parse(Endpoint::Completions, body(prompt)).is_ok(),
                "{prompt}"
            );
        }
        let texts = format!("[{}\"x\"]", "\"x\",".repeat(64));
        let lists = format!("[{}[1]]", "[1],".repeat(64));
        for prompt in [
            "1",
            "{}",
            "[]",
            "[1,\"x\"]",
            "[1.5]",
            "[{}]",
            "[null]",
            "[[1],2]",
            &texts,
            &lists,
        ] {
            let (code, param, _) = refusal(Endpoint::Completions, &body(prompt));
            assert_eq!((&*code, &*param), ("invalid_value", "prompt"), "{prompt}");
        }
        let (code, ..) = refusal(Endpoint::Completions, r#"{"model":"m"}"#);
        assert_eq!(code, "missing_required_parameter");
    }

    #[test]
    fn inputs_are_checked_for_each_call_that_has_them() {
        let body = |input: &str| format!(r#"{{"model":"m","input":{input}}}"#);
        let most = format!("[{}\"x\"]", "\"x\",".repeat(2047));
        let more = format!("[{}\"x\"]", "\"x\",".repeat(2048));
        for endpoint in [Endpoint::Embeddings, Endpoint::Moderations] {
            for input in ["\"x\"", "[\"x\"]", "[1,2]", "[[1],[2]]", "[{}]", &most] {
                assert!(parse(endpoint, body(input)).is_ok(), "{input}");
            }
            for input in ["1", "{}", "[]", "[1,\"x\"]", "[null]", "[0.5]", &more] {
                let (_, param, _) = refusal(endpoint, &body(input));
                assert_eq!(param, "input", "{input}");
            }
            let (code, ..) = refusal(endpoint, r#"{"model":"m"}"#);
            assert_eq!(code, "missing_required_parameter");
        }
        for input in ["\"x\"", "[{\"role\":\"user\"}]", "[]"] {
            assert!(parse(Endpoint::Responses, body(input)).is_ok(), "{input}");
        }
        for input in ["1", "{}", "[1]", "[\"x\"]", "true"] {
            let (_, param, _) = refusal(Endpoint::Responses, &body(input));
            assert_eq!(param, "input", "{input}");
        }
        assert!(
            parse(
                Endpoint::Responses,
                r#"{"model":"m","previous_response_id":"r"}"#
            )
            .is_ok()
        );
        let (code, ..) = refusal(Endpoint::Responses, r#"{"model":"m"}"#);
        assert_eq!(code, "missing_required_parameter");
    }

    #[test]
    fn ranking_needs_a_query_and_documents() {
        for (body, blamed) in [
            (r#"{"model":"m","documents":["a"]}"#, "query"),
            (r#"{"model":"m","query":1,"documents":["a"]}"#, "query"),
            (r#"{"model":"m","query":"q"}"#, "documents"),
            (r#"{"model":"m","query":"q","documents":[]}"#, "documents"),
            (r#"{"model":"m","query":"q","documents":"a"}"#, "documents"),
            (
                r#"{"model":"m","query":"q","documents":["a",1]}"#,
                "documents",
            ),
        ] {
            assert_eq!(refusal(Endpoint::Rerank, body).1, blamed, "{body}");
        }
        for documents in ["[\"a\"]", "[{\"text\":\"a\"}]"] {
            let body = format!(r#"{{"model":"m","query":"q","documents":{documents}}}"#);
            assert!(parse(Endpoint::Rerank, body).is_ok());
        }
    }

    #[test]
    fn only_calls_that_stream_may_be_streamed() {
        for (endpoint, members) in [
            (Endpoint::Embeddings, r#""input":"x""#),
            (Endpoint::Moderations, r#""input":"x""#),
            (Endpoint::Rerank, r#""query":"q","documents":["d"]"#),
        ] {
            let body = format!(r#"{{"model":"m",{members},"stream":true}}"#);
            let (code, param, message) = refusal(endpoint, &body);
            assert_eq!((&*code, &*param), ("unsupported_value", "stream"));
            assert!(message.contains(endpoint.path()));
            let body = format!(r#"{{"model":"m",{members},"stream":false}}"#);
            assert!(parse(endpoint, body).is_ok());
        }
    }

    #[test]
    fn keys_that_would_steer_the_gateway_are_refused() {
        for key in [
            "api_base",
            "base_url",
            "api_key",
            "custom_llm_provider",
            "\\u0061pi_key",
        ] {
            for value in ["\"http://evil\"", "null"] {
                let body = format!(r#"{{"model":"m","messages":[{{}}],"{key}":{value}}}"#);
                let (code, param, _) = refusal(Endpoint::ChatCompletions, &body);
                assert_eq!(code, "unsupported_parameter");
                assert!(STEERING.contains(&&*param));
            }
        }
        chat(r#","metadata":{"api_key":"mine"}"#);
    }

    #[test]
    fn a_body_that_is_no_json_has_a_code_of_its_own() {
        for (body, code) in [
            ("", "invalid_json"),
            ("[]", "invalid_json"),
            ("{\"model\":}", "invalid_json"),
            ("{\"model\":\"a\",\"model\":\"b\"}", "duplicate_key"),
            (&format!("{{\"a\":{}", "[".repeat(70)), "json_too_deep"),
        ] {
            assert_eq!(refusal(Endpoint::ChatCompletions, body).0, code);
        }
        let error = parse(Endpoint::ChatCompletions, &b"{\"a\":\"\xff\"}"[..]).unwrap_err();
        assert_eq!(error.code.as_deref(), Some("invalid_utf8"));
    }

    #[test]
    fn a_conversation_keeps_its_key_as_it_grows() {
        let key = |body: &str| {
            parse(Endpoint::ChatCompletions, body.to_owned())
                .unwrap()
                .conversation_key()
        };
        let system = r#"{"role":"system","content":"be kind"}"#;
        let user = r#"{"role":"user","content":"hello"}"#;
        let more = r#"{"role":"assistant","content":"hi"},{"content":"and?","role":"user"}"#;
        let first = key(&format!(r#"{{"model":"m","messages":[{system},{user}]}}"#));
        let later = key(&format!(
            r#"{{"model":"m","stream":true,"messages":[{system},{user},{more}]}}"#
        ));
        assert_eq!(first, later);
        let alone = key(&format!(r#"{{"model":"m","messages":[{user}]}}"#));
        let alone_later = key(&format!(r#"{{"model":"m","messages":[{user},{more}]}}"#));
        assert_eq!(alone, alone_later);
        assert_ne!(first, alone);
        assert_ne!(
            first,
            key(&format!(r#"{{"model":"n","messages":[{system},{user}]}}"#))
        );
        let cached = |key_name: &str, user: &str| {
            key(&format!(
                r#"{{"model":"m","prompt_cache_key":"{key_name}","messages":[{user}]}}"#
            ))
        };
        assert_eq!(cached("k", user), cached("k", system));
        assert_ne!(cached("k", user), cached("l", user));
    }

    #[test]
    fn a_conversation_key_is_the_same_on_every_machine() {
        assert_eq!(chat("").conversation_key(), 0x2154_1ac1_56e8_617c);
    }
}
