//! How many tokens there are, about: for what must be decided before a model has
//! counted them.
//!
//! Four bytes are a token. That is a little high for English prose, up to a third
//! low for code and digits, and up to a half high for languages of other scripts.
//! Of a prompt that is everything that a model reads: messages with their JSON,
//! tools, prompts, inputs; a picture or a sound inside a message is 1,024 tokens
//! whatever its size.

use memchr::memmem;

use super::ApiRequest;

/// Bytes per token.
const BYTES_PER_TOKEN: u64 = 4;
/// What a picture takes, in tokens.
const PER_IMAGE: u64 = 1024;
/// The members that a model reads.
const READ: [&str; 8] = [
    "messages",
    "tools",
    "functions",
    "prompt",
    "input",
    "instructions",
    "query",
    "documents",
];

/// Returns about how many tokens the prompt of a request has; at least 1.
pub fn prompt_tokens(request: &ApiRequest) -> u64 {
    let (mut bytes, mut images) = (0_u64, 0_u64);
    for value in READ.into_iter().filter_map(|key| request.get(key)) {
        let media = media_of(value);
        bytes += value.len().saturating_sub(media.bytes) as u64;
        images += media.count;
    }
    (tokens_of_bytes(bytes) + images * PER_IMAGE).max(1)
}

/// Returns about how many tokens so many bytes of text are.
pub fn tokens_of_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(BYTES_PER_TOKEN)
}

#[derive(Default)]
struct Media {
    count: u64,
    bytes: usize,
}

/// Finds the strings of a JSON value that hold a file: `data:` URLs, and the
/// bare base64 of `input_audio`.
fn media_of(value: &[u8]) -> Media {
    let mut media = Media::default();
    for start in [&b"\"data:"[..], b"\"data\""] {
        let mut from = 0;
        while let Some(at) = value.get(from..).and_then(|rest| memmem::find(rest, start)) {
            let mut begin = from + at + start.len();
            if start.ends_with(b"\"") {
                // The value of the key, if it is a string.
                let rest = value.get(begin..).unwrap_or_default();
                let gap = rest.iter().take_while(|b| b" \t\r\n:".contains(b)).count();
                begin += gap;
                if value.get(begin) != Some(&b'"') {
                    from = begin;
                    continue;
                }
                begin += 1;
            }
            let rest = value.get(begin..).unwrap_or_default();
            let length = memchr::memchr(b'"', rest).unwrap_or(rest.len());
            // What is shorter is talk of such a thing.
            if length > 256 {
                media.count += 1;
                media.bytes += length;
            }
            from = begin + length;
        }
    }
    media
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::Endpoint;

    fn of(endpoint: Endpoint, body: &str) -> u64 {
        let request = ApiRequest::parse(endpoint, body.to_owned().into(), 64).unwrap();
        prompt_tokens(&request)
    }

    #[test]
    fn four_bytes_are_a_token() {
        let body = |text: &str| format!(r#"{{"model":"m","prompt":"{text}","max_tokens":5}}"#);
        assert_eq!(of(Endpoint::Completions, &body(&"x".repeat(398))), 100);
        assert_eq!(of(Endpoint::Completions, &body("")), 1);
    }

    #[test]
    fn a_picture_is_a_picture_whatever_its_size() {
        let body = |size: usize| {
            format!(
                r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{}"}}}},{{"type":"input_audio","input_audio":{{"data" : "{}"}}}}]}}]}}"#,
                "A".repeat(size),
                "A".repeat(size)
            )
        };
        let tokens = of(Endpoint::ChatCompletions, &body(1000));
        assert!((2048..2200).contains(&tokens), "{tokens}");
        assert_eq!(tokens, of(Endpoint::ChatCompletions, &body(100_000)));
    }

    #[test]
    fn talk_of_data_is_text() {
        let body = r#"{"model":"m","input":["see \"data: x\"","\"data\": 5"]}"#;
        assert!(of(Endpoint::Embeddings, body) < 20);
    }
}
