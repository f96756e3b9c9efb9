//! OpenAI's own format: the bytes that came, with the edits that the upstream's
//! part of the configuration asks for. The answer is not read here at all.

use serde::Deserialize;

use super::{Call, Dialect, Encoded, Unsupported};
use crate::{
    config::{Kind, Upstream},
    openai::{ApiRequest, Edit, Endpoint},
};

/// Speaks OpenAI's API.
#[derive(Debug)]
pub struct Openai;

/// The list of models, as far as it matters.
#[derive(Deserialize)]
struct List {
    data: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    id: String,
}

impl Dialect for Openai {
    fn encode(&self, call: &Call<'_>) -> Result<Encoded, Unsupported> {
        let (request, upstream) = (call.request, call.upstream);
        let mut edits = Vec::with_capacity(3);
        edits.extend(request.model_edit(call.model));
        if let Some(cap) = upstream.max_tokens {
            edits.extend(request.max_tokens_cap(cap));
        }
        let ask = upstream
            .include_usage
            .then(|| request.ask_usage())
            .flatten();
        let hide_usage = ask.is_some();
        edits.extend(ask);
        edits.extend(words_of_ollama(request, upstream));
        if let Some(salt) = call.cache_salt.filter(|_| knows_salt(request, upstream)) {
            edits.push(Edit::set_text("cache_salt", salt));
        }
        Ok(Encoded {
            suffix: request.endpoint.suffix(),
            accept: if request.stream {
                "text/event-stream"
            } else {
                "application/json"
            },
            body: request.edited(&edits),
            hide_usage,
            decoder: None,
        })
    }

    fn models_suffix(&self) -> &'static str {
        "/models"
    }

    fn read_models(&self, body: &[u8]) -> serde_json::Result<Vec<String>> {
        let list: List = serde_json::from_slice(body)?;
        Ok(list.data.into_iter().map(|listed| listed.id).collect())
    }
}

/// Only vLLM reads a salt, and only where it makes text; to others it may be an
/// unknown parameter, and so an error.
fn knows_salt(request: &ApiRequest, upstream: &Upstream) -> bool {
    let makes_text = matches!(
        request.endpoint,
        Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Responses
    );
    upstream.kind == Kind::Vllm && makes_text
}

/// Ollama's `/v1` reads `max_tokens` only, and would ignore the newer spelling.
fn words_of_ollama(request: &ApiRequest, upstream: &Upstream) -> Option<Edit<'static>> {
    let wish = request.max_tokens.as_ref()?;
    if upstream.kind != Kind::Ollama || wish.key != "max_completion_tokens" {
        return None;
    }
    let most = upstream.max_tokens.unwrap_or(u64::MAX);
    let tokens = wish.value.min(most).to_string();
    Some(Edit::set("max_tokens", tokens.into_bytes()))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn encode(body: &str, upstream: &Upstream) -> (Bytes, Encoded) {
        let raw = Bytes::copy_from_slice(body.as_bytes());
        let request = ApiRequest::parse(Endpoint::ChatCompletions, raw.clone(), 64).unwrap();
        let call = Call {
            request: &request,
            model: "m",
            upstream,
            cache_salt: Some("salt"),
            context: &|tokens| tokens,
            event_bytes_max: 1024,
        };
        (raw, Openai.encode(&call).unwrap())
    }

    #[test]
    fn what_needs_no_edit_goes_out_as_the_bytes_that_came() {
        let upstream = Upstream::default();
        let body = r#"{ "model":"m","messages":[{}] ,"seed":123456789012345678901 }"#;
        let (raw, encoded) = encode(body, &upstream);
        assert_eq!(encoded.body.as_ptr(), raw.as_ptr(), "copied");
        assert_eq!(encoded.suffix, "/chat/completions");
        assert!(encoded.decoder.is_none());
        assert!(!encoded.hide_usage);
    }

    #[test]
    fn a_salt_goes_to_vllm_and_to_nobody_else() {
        let body = r#"{"model":"m","messages":[{}]}"#;
        let vllm = Upstream {
            kind: Kind::Vllm,
            ..Upstream::default()
        };
        let (_, encoded) = encode(body, &vllm);
        let wanted = r#"{"model":"m","messages":[{}],"cache_salt":"salt"}"#;
        assert_eq!(encoded.body, wanted);
        let (_, encoded) = encode(body, &Upstream::default());
        assert_eq!(encoded.body, body);
    }

    #[test]
    fn the_configuration_of_the_upstream_is_spliced_in() {
        let upstream = Upstream {
            kind: Kind::Ollama,
            max_tokens: Some(9),
            ..Upstream::default()
        };
        let body = r#"{"model":"x","stream":true,"messages":[{}],"max_completion_tokens":50}"#;
        let (_, encoded) = encode(body, &upstream);
        let wanted = r#"{"model":"m","stream":true,"messages":[{}],"max_completion_tokens":9,"stream_options":{"include_usage":true},"max_tokens":9}"#;
        assert_eq!(encoded.body, wanted);
        assert!(encoded.hide_usage);
        assert_eq!(encoded.accept, "text/event-stream");
    }

    #[test]
    fn the_list_of_models_is_read() {
        let list = br#"{"object":"list","data":[{"id":"a","owned_by":"x"},{"id":"b"}]}"#;
        assert_eq!(Openai.read_models(list).unwrap(), ["a", "b"]);
        assert!(Openai.read_models(b"{}").is_err());
    }
}
