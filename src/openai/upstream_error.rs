//! What upstreams call an error, in all its shapes, and what a client is told.
//!
//! Start at [`UpstreamError::read`]. This is the path of failures: it may
//! allocate, and reads a body of any shape, or of none.
//!
//! **Invariant:** nothing that tells where an upstream is, or what opens it,
//! leaves through [`UpstreamError::into_client_error`]; see [`scrub`].

use std::{
    borrow::Cow,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;

use super::{cursor::Cursor, cursor::is_something};
use crate::error::Error;

/// The longest message that is passed on, in characters.
const MESSAGE_CHARS_MAX: usize = 2000;
/// The most that is read of a message, in characters; scrubbing shortens it.
const PLAIN_CHARS_MAX: usize = 8 * 1024;
/// The longest `code` and `param` that are passed on, in bytes.
const WORD_BYTES_MAX: usize = 128;

/// Codes and types by which vendors say: the account is empty, do not ask again.
const QUOTA_CODES: [&str; 10] = [
    "insufficient_quota",
    "credit_balance_exhausted",
    "billing_hard_limit_reached",
    "billing_not_active",
    "billing_error",
    "enforced_spend_limit_reached",
    "insufficient_credits",
    "insufficient_balance",
    "payment_required",
    "access_terminated",
];

/// Words of messages that say the same, where vendors have no code for it, and
/// those about a limit that lasts.
const QUOTA_WORDS: [&str; 2] = ["credit balance is too low", "insufficient balance"];
const DAILY_WORDS: [&str; 3] = ["perday", "per day", "daily limit"];

/// Codes, types and words of messages by which a refusal is about what the
/// request says.
const CONTENT_CODES: [&str; 6] = [
    "content_policy_violation",
    "content_filter",
    "content_policy",
    "moderation_error",
    "moderation_blocked",
    "responsibleaipolicyviolation",
];
const CONTENT_WORDS: [&str; 4] = [
    "input was flagged",
    "content policy",
    "content management policy",
    "requires moderation",
];

/// The same, by which it is about one model, and so not about the key.
const MODEL_CODES: [&str; 6] = [
    "model_not_found",
    "model_permission_blocked_project",
    "model_permission_blocked_org",
    "model_access_denied",
    "key_model_access_denied",
    "team_model_access_denied",
];
const MODEL_WORDS: [&str; 4] = [
    "access to model",
    "access to the model",
    "to access model",
    "to use model",
];

/// The same, by which it is about the key, or who it belongs to.
const KEY_CODES: [&str; 8] = [
    "invalid_api_key",
    "invalid_authentication",
    "authentication_error",
    "permission_error",
    "permission_denied",
    "unauthorized",
    "account_deactivated",
    "unsupported_country_region_territory",
];
const KEY_WORDS: [&str; 7] = [
    "api key",
    "api-key",
    "apikey",
    "credential",
    "unauthorized",
    "authenticat",
    "your account",
];

/// Words of messages about a prompt that is too long.
const LENGTH_WORDS: [&str; 4] = [
    "context length",
    "context size",
    "context window",
    "too long",
];

/// An error as an upstream wrote it. Not for clients' eyes before
/// [`into_client_error`](Self::into_client_error).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamError {
    /// What it says; `None` if there was nothing, or a page of HTML.
    pub message: Option<String>,
    /// Its `type`.
    pub kind: Option<String>,
    /// The field it blames.
    pub param: Option<String>,
    /// Its `code`; a number as its digits.
    pub code: Option<String>,
}

impl UpstreamError {
    /// Reads the body of an answer, or the data of an event, that is an error.
    pub fn read(body: &[u8]) -> Self {
        match serde_json::from_slice::<Value>(body) {
            Ok(Value::Array(list)) => list.first().map(Self::of_value).unwrap_or_default(),
            Ok(value) => Self::of_value(&value),
            Err(_not_json) => Self {
                message: plain(body),
                ..Self::default()
            },
        }
    }

    /// Takes the upstream's own secrets out, which [`scrub`] would not know for
    /// what they are.
    #[must_use]
    pub fn without<'a>(mut self, secrets: impl IntoIterator<Item = &'a str>) -> Self {
        for secret in secrets.into_iter().filter(|secret| !secret.is_empty()) {
            let words = [
                &mut self.message,
                &mut self.kind,
                &mut self.param,
                &mut self.code,
            ];
            for word in words.into_iter().flatten() {
                if word.contains(secret) {
                    *word = word.replace(secret, "[…]");
                }
            }
        }
        self
    }

    /// Says whether the account behind the upstream is out of money or out of
    /// its quota for long, so that waiting a minute does not help. `status` is
    /// that of the answer; of an error in an answer that began well, 200.
    ///
    /// A message may repeat what the client wrote, the name of a model or the
    /// whole prompt: its words count only where the status is about money,
    /// rights or rates, else only codes do, which are the upstream's own.
    pub fn hard_quota(&self, status: u16) -> bool {
        let named = [&self.code, &self.kind]
            .into_iter()
            .flatten()
            .any(|word| QUOTA_CODES.contains(&word.as_str()));
        let told = match status {
            // An error in a stream has its status as its code, if anywhere.
            200 => self.code.as_deref().and_then(|code| code.parse().ok()),
            other => Some(other),
        };
        named
            || match told {
                Some(402 | 403 | 429) => self.says(&QUOTA_WORDS) || self.says(&DAILY_WORDS),
                Some(400) => self.begins_as_anthropics(),
                _ => false,
            }
    }

    /// Anthropic says it with 400 and no code of its own, as the beginning of the
    /// message, where nothing of the client's can stand.
    fn begins_as_anthropics(&self) -> bool {
        let message = self.message.as_deref().unwrap_or_default();
        message.starts_with("Your credit balance is too low")
    }

    /// Says whether what the request says is not wanted.
    pub fn is_about_content(&self) -> bool {
        self.is_named(&CONTENT_CODES) || self.says(&CONTENT_WORDS)
    }

    /// Says whether one model, and not everything, is closed to our key.
    pub fn is_about_model(&self) -> bool {
        self.is_named(&MODEL_CODES) || self.says(&MODEL_WORDS)
    }

    /// Says whether it is our key that is no good.
    pub fn is_about_key(&self) -> bool {
        self.is_named(&KEY_CODES) || self.says(&KEY_WORDS)
    }

    fn is_named(&self, any: &[&str]) -> bool {
        let named = [&self.code, &self.kind];
        named
            .into_iter()
            .flatten()
            .any(|word| any.contains(&word.to_ascii_lowercase().as_str()))
    }

    /// Says whether the request was longer than the model can read.
    pub fn is_about_length(&self) -> bool {
        let is_code = |word: &&String| word.contains("context");
        let named = [&self.code, &self.kind]
            .into_iter()
            .flatten()
            .any(|word| is_code(&word));
        named || self.says(&LENGTH_WORDS)
    }

    /// Says whether the model is being loaded, in llama.cpp's words.
    pub fn model_is_loading(&self) -> bool {
        self.says(&["loading model"])
    }

    fn says(&self, any: &[&str]) -> bool {
        self.message.as_ref().is_some_and(|message| {
            let message = message.to_ascii_lowercase();
            any.iter().any(|words| message.contains(words))
        })
    }

    /// Turns what is the caller's fault into what he is told: the status, the
    /// message without anything about the upstream, and his `param`.
    pub fn into_client_error(self, status: StatusCode) -> Error {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "upstream_error",
            _ => "invalid_request_error",
        };
        let code = match (self.code, self.kind.as_deref()) {
            // llama.cpp has a type of its own for OpenAI's code.
            (_, Some("exceed_context_size_error")) => Some("context_length_exceeded".to_owned()),
            (Some(code), _) => Some(code),
            (None, _) => None,
        };
        let message = match self.message {
            Some(message) => Cow::Owned(scrub(&message)),
            None => Cow::Borrowed("the model server refused the request"),
        };
        let mut error = Error::new(status, kind, "", message);
        error.code = code.filter(|code| is_code(code)).map(Cow::Owned);
        error.param = self
            .param
            .map(|param| scrub(&param))
            .filter(|param| !param.is_empty() && param.len() <= WORD_BYTES_MAX)
            .map(Cow::Owned);
        error
    }

    fn of_value(value: &Value) -> Self {
        let Value::Object(body) = value else {
            return Self {
                message: value.as_str().and_then(|text| plain(text.as_bytes())),
                ..Self::default()
            };
        };
        let inner = match body.get("error") {
            Some(error @ Value::Object(_)) => error,
            Some(Value::String(error)) => {
                return Self {
                    message: plain(error.as_bytes()),
                    kind: word(body.get("error_type")).or_else(|| word(body.get("type"))),
                    code: word(body.get("code")),
                    param: word(body.get("param")),
                };
            }
            // A failed response of the responses API, and OpenRouter's choices.
            _ => match (nested_error(body.get("response")), choice_error(body)) {
                (Some(error), _) | (None, Some(error)) => error,
                (None, None) => value,
            },
        };
        if let Some(Value::Array(errors)) = inner.get("errors")
            && let Some(first) = errors.first()
            && inner.get("message").is_none()
        {
            return Self::of_fields(first); // Cloudflare
        }
        Self::of_fields(inner)
    }

    fn of_fields(fields: &Value) -> Self {
        let mut error = Self {
            message: None,
            kind: word(fields.get("type")).or_else(|| word(fields.get("status"))),
            param: word(fields.get("param")),
            code: word(fields.get("code")),
        };
        let message = ["message", "detail", "msg", "title"]
            .into_iter()
            .find_map(|key| fields.get(key).filter(|value| !value.is_null()));
        match message {
            Some(Value::String(text)) => error.message = plain(text.as_bytes()),
            Some(Value::Array(details)) => error.take_details(details),
            // Mistral: a message that is an object with details in it.
            Some(Value::Object(object)) => match object.get("detail") {
                Some(Value::Array(details)) => error.take_details(details),
                Some(Value::String(text)) => error.message = plain(text.as_bytes()),
                _ => {}
            },
            _ => {}
        }
        if error.message.is_none()
            && let Some(text) = fields.as_str()
        {
            error.message = plain(text.as_bytes());
        }
        error
    }

    /// FastAPI's list: `[{"loc":["body","messages",0],"msg":"…","type":"…"}]`.
    fn take_details(&mut self, details: &[Value]) {
        let mut message = String::new();
        for detail in details.iter().take(8) {
            let place = detail
                .get("loc")
                .and_then(Value::as_array)
                .map(|steps| {
                    let steps: Vec<String> = steps
                        .iter()
                        .filter_map(|step| word(Some(step)))
                        .skip_while(|step| step == "body")
                        .collect();
                    steps.join(".")
                })
                .unwrap_or_default();
            let what = word(detail.get("msg")).or_else(|| word(Some(detail)));
            let Some(what) = what else {
                continue;
            };
            if !message.is_empty() {
                message.push_str("; ");
            }
            if !place.is_empty() {
                message.push_str(&place);
                message.push_str(": ");
                self.param.get_or_insert(place);
            }
            message.push_str(&what);
        }
        self.message = (!message.is_empty()).then_some(message);
    }
}

/// Says whether a complete JSON answer, sent with 200, is nothing but an error.
pub fn error_in_body(body: &[u8]) -> bool {
    let mut error = false;
    let mut unsuccessful = false;
    let mut errors = false;
    let mut cursor = Cursor::new(body);
    if !cursor.enter_object() {
        return false;
    }
    while let Some(key) = cursor.key() {
        match key {
            b"choices" | b"data" | b"output" | b"results" if cursor.peek() == Some(b'[') => {
                return false;
            }
            b"error" => {
                error |= match cursor.skip() {
                    Some(value @ [b'"', ..]) => is_something(value),
                    Some([b'{', ..]) => true,
                    _ => false,
                };
            }
            b"object" | b"type" => error |= cursor.skip() == Some(b"\"error\""),
            b"success" => unsuccessful = cursor.skip() == Some(b"false"),
            b"errors" => errors = cursor.something(),
            _ => {
                cursor.skip();
            }
        }
    }
    error || (unsuccessful && errors)
}

/// Returns the event that tells a client, in the middle of a stream, what went
/// wrong: `data: {"error":{…}}` and a blank line.
pub fn error_event(error: &Error) -> Bytes {
    format!("data: {}\n\n", error.to_json()).into()
}

/// Returns a message without URLs, addresses, paths, keys and tokens, in one
/// line of at most 2,000 characters. What is taken out leaves `[…]`.
pub fn scrub(message: &str) -> String {
    let mut out = String::with_capacity(message.len().min(MESSAGE_CHARS_MAX * 4));
    let mut after_bearer = false;
    // Words with the separators behind them, so that the text stays as it is.
    for piece in message.split_inclusive(is_separator) {
        let word = piece.trim_end_matches(is_separator);
        let bare = word.trim_end_matches(['.', ':', '?', '!']);
        let secret =
            is_address(bare) || is_path(bare) || is_token(bare) || (after_bearer && bare.len() > 7);
        let rest = if secret {
            out.push_str("[…]");
            piece.get(bare.len()..).unwrap_or_default()
        } else {
            piece
        };
        out.extend(rest.chars().map(|c| if c.is_control() { ' ' } else { c }));
        if !bare.is_empty() {
            after_bearer = bare.eq_ignore_ascii_case("bearer");
        }
    }
    match out.char_indices().nth(MESSAGE_CHARS_MAX) {
        Some((end, _)) => out.truncate(end),
        None => {
            let end = out.trim_end().len();
            out.truncate(end);
        }
    }
    out
}

/// Separates words. What addresses, keys and URLs are made of does not.
fn is_separator(c: char) -> bool {
    c.is_whitespace()
        || c.is_control()
        || matches!(
            c,
            '"' | '\'' | '`' | '(' | ')' | '<' | '>' | '{' | '}' | ',' | ';' | '|' | '='
        )
}

/// Says whether a word is a URL, an IP address, a host with a port, or a name
/// that only a host has.
fn is_address(word: &str) -> bool {
    if word.contains("://") {
        return true;
    }
    let unbracketed = word.trim_start_matches('[').trim_end_matches(']');
    let (host, path) = word.split_once('/').unwrap_or((word, ""));
    if word.parse::<SocketAddr>().is_ok()
        || host.parse::<SocketAddr>().is_ok()
        || host.parse::<Ipv4Addr>().is_ok()
        || (unbracketed.len() > 2 && unbracketed.parse::<Ipv6Addr>().is_ok())
    {
        return true;
    }
    if let Some((name, port)) = host.rsplit_once(':')
        && (2..=5).contains(&port.len())
        && port.bytes().all(|byte| byte.is_ascii_digit())
        && is_host(name)
    {
        return true;
    }
    let Some((name, last)) = host.rsplit_once('.') else {
        return false;
    };
    const ENDINGS: [&str; 16] = [
        "ai",
        "app",
        "cloud",
        "cluster",
        "co",
        "com",
        "dev",
        "home",
        "internal",
        "io",
        "lan",
        "local",
        "localdomain",
        "net",
        "org",
        "svc",
    ];
    let ends = ENDINGS
        .iter()
        .any(|ending| last.eq_ignore_ascii_case(ending));
    // "z.ai/glm-4" is a model: a vendor's name before a slash is no secret.
    ends && is_host(name) && (path.is_empty() || host.matches('.').count() > 1)
}

fn is_host(name: &str) -> bool {
    name.bytes().any(|byte| byte.is_ascii_alphabetic())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'@'))
}

/// Says whether a word is a path of the upstream's machine.
fn is_path(word: &str) -> bool {
    (word.starts_with('/') && word.matches('/').count() > 1 && !word.starts_with("/v1/"))
        || word.starts_with("~/")
        || word.contains(":\\")
}

/// Says whether a word looks like a key.
fn is_token(word: &str) -> bool {
    const PREFIXES: [&str; 17] = [
        "sk-", "sk_", "pk-", "rk-", "fb_", "hf_", "gsk_", "xai-", "nvapi-", "AIza", "AKIA", "eyJ",
        "ghp_", "org-", "proj_", "key-", "tok_",
    ];
    if word.len() >= 10
        && PREFIXES.iter().any(|prefix| word.starts_with(prefix))
        && word
            .bytes()
            .any(|byte| byte.is_ascii_digit() || byte == b'*')
    {
        return true;
    }
    if word.len() >= 20 && (word.starts_with("sk-") || word.starts_with("eyJ")) {
        return true;
    }
    // A long run of letters and digits, such as an account's id. Names of models
    // are as long, but have hyphens and dots.
    word.split(|c: char| !c.is_ascii_alphanumeric()).any(|run| {
        run.len() >= 32
            && run.bytes().any(|byte| byte.is_ascii_digit())
            && run.bytes().any(|byte| byte.is_ascii_alphabetic())
    })
}

/// Says whether a code is one for programs: a word, and not an HTTP status or
/// another number, of which OpenAI's clients know nothing.
fn is_code(code: &str) -> bool {
    code.len() <= WORD_BYTES_MAX
        && code.bytes().any(|byte| byte.is_ascii_alphabetic())
        && code
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
        && !is_token(code)
        && !is_address(code)
}

/// Returns a text that is worth showing: not a page, not binary, not empty.
fn plain(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let is_page = text.starts_with('<') || text.contains("<html") || text.contains("<!DOCTYPE");
    if text.is_empty() || is_page {
        return None;
    }
    Some(text.chars().take(PLAIN_CHARS_MAX).collect())
}

/// Returns a string, or a number as its digits.
fn word(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn nested_error(value: Option<&Value>) -> Option<&Value> {
    value?.get("error").filter(|error| error.is_object())
}

fn choice_error(body: &serde_json::Map<String, Value>) -> Option<&Value> {
    body.get("choices")?
        .as_array()?
        .iter()
        .find_map(|choice| nested_error(Some(choice)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> UpstreamError {
        UpstreamError::read(body.as_bytes())
    }

    /// Message, type, param and code.
    fn parts(body: &str) -> [String; 4] {
        let error = read(body);
        [error.message, error.kind, error.param, error.code].map(Option::unwrap_or_default)
    }

    #[test]
    fn an_upstreams_own_secrets_are_taken_out_whatever_they_look_like() {
        let body = br#"{"error":{"message":"bad key: tulip!","param":"tulip","code":"tulip"}}"#;
        let error = UpstreamError::read(body).without(["tulip", ""]);
        let error = error.into_client_error(StatusCode::BAD_REQUEST);
        assert_eq!(error.message, "bad key: […]!");
        assert_eq!(error.param.as_deref(), Some("[…]"));
        assert_eq!(error.code, None);
    }

    #[test]
    fn every_shape_of_an_error_is_read() {
        for (body, expected) in [
            // OpenAI
            (
                r#"{"error":{"message":"m","type":"invalid_request_error","param":"n","code":"c"}}"#,
                ["m", "invalid_request_error", "n", "c"],
            ),
            // vLLM
            (
                r#"{"error":{"message":"m","type":"BadRequestError","param":null,"code":400}}"#,
                ["m", "BadRequestError", "", "400"],
            ),
            (r#"{"error":"Unauthorized"}"#, ["Unauthorized", "", "", ""]),
            (
                r#"{"object":"error","message":"m","type":"BadRequestError","param":null,"code":400}"#,
                ["m", "BadRequestError", "", "400"],
            ),
            // Hugging Face
            (
                r#"{"error":"m","error_type":"validation"}"#,
                ["m", "validation", "", ""],
            ),
            // FastAPI
            (r#"{"detail":"Not Found"}"#, ["Not Found", "", "", ""]),
            (
                r#"{"detail":[{"type":"missing","loc":["body","messages",0,"role"],"msg":"Field required"},{"loc":["body","n"],"msg":"bad"}]}"#,
                [
                    "messages.0.role: Field required; n: bad",
                    "",
                    "messages.0.role",
                    "",
                ],
            ),
            // Mistral
            (
                r#"{"object":"error","message":{"detail":[{"loc":["body","n"],"msg":"bad"}]},"type":"invalid_request_error","param":null,"code":null}"#,
                ["n: bad", "invalid_request_error", "n", ""],
            ),
            // Anthropic
            (
                r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"r"}"#,
                ["Overloaded", "overloaded_error", "", ""],
            ),
            // Cloudflare
            (
                r#"{"result":null,"success":false,"errors":[{"code":7003,"message":"m"}],"messages":[]}"#,
                ["m", "", "", "7003"],
            ),
            // Gemini
            (
                r#"[{"error":{"code":400,"message":"m","status":"INVALID_ARGUMENT"}}]"#,
                ["m", "INVALID_ARGUMENT", "", "400"],
            ),
            // NVIDIA
            (
                r#"{"type":"about:blank","title":"t","status":404,"detail":"m"}"#,
                ["m", "about:blank", "", ""],
            ),
            (r#"{"message":"m"}"#, ["m", "", "", ""]),
            ("\"m\"", ["m", "", "", ""]),
            ("404 page not found", ["404 page not found", "", "", ""]),
            ("<html><body>502 Bad Gateway</body></html>", [""; 4]),
            ("\n<!DOCTYPE html>\n<html>", [""; 4]),
            (
                r#"{"error":{"message":"<html>502</html>","code":502}}"#,
                ["", "", "", "502"],
            ),
            ("", [""; 4]),
            ("{}", [""; 4]),
            ("[]", [""; 4]),
            (r#"{"error":null}"#, [""; 4]),
            ("\u{0}", ["\u{0}", "", "", ""]),
        ] {
            assert_eq!(parts(body), expected.map(str::to_owned), "{body}");
        }
        assert_eq!(UpstreamError::read(b"\xff\xfe"), UpstreamError::default());
    }

    #[test]
    fn a_body_of_any_depth_is_survived() {
        let deep = format!("{{\"error\":{}", "[".repeat(100_000));
        assert_eq!(read(&deep).code, None);
        assert!(!error_in_body(deep.as_bytes()));
    }

    #[test]
    fn an_account_without_money_is_told_from_one_in_a_hurry() {
        for body in [
            r#"{"error":{"message":"You exceeded your current quota, please check your plan and billing details.","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}"#,
            r#"{"error":{"message":"m","code":"credit_balance_exhausted"}}"#,
            r#"{"error":{"message":"m","code":"billing_hard_limit_reached"}}"#,
            r#"{"type":"error","error":{"type":"enforced_spend_limit_reached","message":"m"}}"#,
            r#"{"error":{"type":"invalid_request_error","message":"Your credit balance is too low to access the API"}}"#,
            r#"{"error":{"message":"Insufficient Balance","type":"unknown_error"}}"#,
            r#"[{"error":{"code":429,"message":"Quota exceeded for GenerateRequestsPerDayPerProject"}}]"#,
        ] {
            let status = if body.contains("Your credit") {
                400
            } else {
                429
            };
            assert!(read(body).hard_quota(status), "{body}");
        }
        for body in [
            r#"{"error":{"message":"Rate limit reached for requests","type":"requests","code":"rate_limit_exceeded"}}"#,
            r#"{"error":"slow down"}"#,
            "",
        ] {
            assert!(!read(body).hard_quota(429), "{body}");
        }
    }

    #[test]
    fn a_clients_words_empty_no_account() {
        for words in [
            "insufficient balance",
            "a per day",
            "credit balance is too low",
        ] {
            let body = format!(
                r#"{{"error":{{"message":"The model `{words}` does not exist","code":404}}}}"#
            );
            for status in [200, 400, 404, 422, 500, 503] {
                assert!(!read(&body).hard_quota(status), "{status} {words}");
            }
            assert!(read(&body).hard_quota(429), "{words}");
        }
        let event = r#"{"error":{"message":"limit per day","code":429}}"#;
        assert!(
            read(event).hard_quota(200),
            "an error event with its status"
        );
    }

    #[test]
    fn a_client_is_told_what_is_his_fault_in_openais_shape() {
        let error = read(
            r#"{"error":{"message":"`temperature` must be at most 2","type":"BadRequestError","param":"temperature","code":400}}"#,
        )
        .into_client_error(StatusCode::BAD_REQUEST);
        assert_eq!(
            error.to_json(),
            r#"{"error":{"message":"`temperature` must be at most 2","type":"invalid_request_error","param":"temperature","code":null}}"#
        );
        assert_eq!(error.status, 400);

        let error = read(
            r#"{"error":{"code":400,"message":"request (9000 tokens) exceeds the available context size (4096 tokens)","type":"exceed_context_size_error","n_prompt_tokens":9000}}"#,
        )
        .into_client_error(StatusCode::BAD_REQUEST);
        assert_eq!(error.code.as_deref(), Some("context_length_exceeded"));
        assert!(error.message.contains("9000 tokens"));

        let error = UpstreamError::default().into_client_error(StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(error.status, 422);
        assert_eq!(error.message, "the model server refused the request");
        assert_eq!(error.code, None);

        let error = read(r#"{"error":{"message":"m","code":"string_above_max_length"}}"#)
            .into_client_error(StatusCode::BAD_REQUEST);
        assert_eq!(error.code.as_deref(), Some("string_above_max_length"));
    }

    #[test]
    fn a_code_that_is_no_word_is_not_passed_on() {
        for code in [
            "\"a b\"",
            "\"http://x\"",
            "\"sk-12345678901\"",
            "\"\"",
            "17",
            "\"10.0.0.1\"",
        ] {
            let error = read(&format!(r#"{{"error":{{"message":"m","code":{code}}}}}"#))
                .into_client_error(StatusCode::BAD_REQUEST);
            assert_eq!(error.code, None, "{code}");
        }
    }

    #[test]
    fn addresses_keys_and_paths_are_taken_out() {
        for (message, told) in [
            (
                "connect to http://10.0.0.11:8000/v1/chat failed",
                "connect to […] failed",
            ),
            (
                "see https://platform.openai.com/account/api-keys.",
                "see […].",
            ),
            ("host='10.0.0.11', port=8000", "host='[…]', port=8000"),
            ("upstream 10.0.0.11:8000 refused", "upstream […] refused"),
            ("upstream 192.168.1.7: refused", "upstream […]: refused"),
            ("at [::1]:8080 and fe80::1, gone", "at […] and […], gone"),
            ("gpu-1:8000 is down", "[…] is down"),
            ("localhost:11434/api is down", "[…] is down"),
            (
                "vllm.svc.cluster.local did not answer",
                "[…] did not answer",
            ),
            ("ask help.openai.com", "ask […]"),
            (
                "Incorrect API key provided: sk-ab***************wxyz.",
                "Incorrect API key provided: […].",
            ),
            ("key sk-proj-abcDEF123456 is dead", "key […] is dead"),
            ("bad token (nvapi-a1b2c3d4e5)", "bad token ([…])"),
            (
                "Authorization: Bearer abc.def-ghi",
                "Authorization: Bearer […]",
            ),
            (
                "account 0123456789abcdef0123456789abcdef is over",
                "account […] is over",
            ),
            (
                "organization org-a1b2c3d4e5f6 is over",
                "organization […] is over",
            ),
            ("no file /root/.cache/models/x.gguf", "no file […]"),
            ("a\r\nb\u{1b}[31m\0c", "a  b [31m c"),
        ] {
            assert_eq!(scrub(message), told, "{message}");
        }
    }

    #[test]
    fn what_a_client_needs_to_know_stays() {
        for message in [
            "The model `qwen2.5:7b` does not exist. Valid aliases: tiny.",
            "model 'llama3.1:70b-instruct-q4_K_M' not found",
            "model meta-llama/Llama-3.3-70B-Instruct is not here",
            "model @cf/meta/llama-3.1-8b-instruct is not here",
            "Qwen3-235B-A22B-Instruct-2507-FP8-dynamic does not exist",
            "messages.0.content.1: Field required; n: bad",
            "This model's maximum context length is 8192 tokens (8000 in the messages, 500 in the completion).",
            "temperature: 2.5 is greater than 2.0; top_p must be in (0, 1]",
            "Invalid bearer token",
            "only /v1/completions is supported",
            "Expected ':' at line 1, column 12: {\"a\" 1}",
            "żółć 😀 e.g. this",
            "at 12:30:45 it was 1:2",
            "and/or z.ai/glm-4",
        ] {
            assert_eq!(scrub(message), message);
        }
    }

    #[test]
    fn a_message_is_cut_between_characters() {
        let long = "é ".repeat(5000);
        let told = scrub(&long);
        assert_eq!(told.chars().count(), 2000);
        let error =
            read(&format!("{{\"error\":\"{long}\"}}")).into_client_error(StatusCode::BAD_REQUEST);
        assert_eq!(error.message.chars().count(), 2000);
    }

    #[test]
    fn an_answer_that_is_only_an_error_is_none() {
        for body in [
            r#"{"error":{"message":"m"}}"#,
            r#"{"error":"m"}"#,
            "\n\n {\"error\":{}}",
            r#"{"object":"error","message":"m"}"#,
            r#"{"type":"error","error":{"message":"m"}}"#,
            r#"{"result":null,"success":false,"errors":[{"code":1,"message":"m"}]}"#,
            r#"{"error":{"message":"m"},"choices":null}"#,
        ] {
            assert!(error_in_body(body.as_bytes()), "{body}");
        }
        for body in [
            r#"{"choices":[{"message":{"content":"a"}}]}"#,
            r#"{"error":null,"output":[]}"#,
            r#"{"error":{"message":"m"},"output":[{}]}"#,
            r#"{"choices":[],"error":{"message":"m"}}"#,
            r#"{"object":"list","data":[]}"#,
            r#"{"error":{"message":"m"},"data":[{}]}"#,
            r#"{"error":{"message":"m"},"results":[{}]}"#,
            r#"{"error":null}"#,
            r#"{"error":""}"#,
            r#"{"success":true,"errors":[]}"#,
            "{}",
            "[]",
            "",
            "text",
        ] {
            assert!(!error_in_body(body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn an_error_event_is_one_line_of_data_whatever_the_message() {
        let error = Error::invalid("c", "two\nlines");
        let event = error_event(&error);
        let text = std::str::from_utf8(&event).unwrap();
        let json = text
            .strip_prefix("data: ")
            .and_then(|text| text.strip_suffix("\n\n"))
            .unwrap();
        assert!(!json.contains('\n'));
        let value: Value = serde_json::from_str(json).unwrap();
        assert_eq!(value["error"]["message"], "two\nlines");
    }
}
