//! How many tokens a prompt has: counted by the model's own tokenizer where
//! there is one, estimated otherwise.
//!
//! **The estimate** is the one of [`crate::openai::estimate`], of the decoded
//! texts.
//!
//! Counting stops as soon as there is more than is asked about, so that a prompt
//! costs no more than the limit and one piece.

use std::path::Path;

use tokenizers::Tokenizer;

use super::text::{Shape, plain};
use crate::{
    context::Pattern,
    openai::{ApiRequest, Endpoint, cursor::Cursor, estimate::tokens_of_bytes, json},
};

/// The largest file of a tokenizer, in bytes.
const FILE_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// The most bytes that are counted at once.
const PIECE_BYTES: usize = 16 * 1024;
/// What the template adds to a message, and to the whole.
const PER_MESSAGE: u64 = 4;
const PER_PROMPT: u64 = 3;
/// The deepest nesting that is looked at; bodies are refused far before.
const DEPTH_MAX: usize = 256;

/// Tokenizers by model.
#[derive(Default)]
pub(super) struct Tokenizers(Vec<(Pattern, Tokenizer)>);

impl Tokenizers {
    /// Reads a tokenizer.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub(super) fn add(&mut self, pattern: &str, file: &Path) -> Result<(), String> {
        let length = std::fs::metadata(file)
            .map_err(|why| why.to_string())?
            .len();
        if length > FILE_BYTES_MAX {
            return Err(format!("it has more than {FILE_BYTES_MAX} bytes"));
        }
        let bytes = std::fs::read(file).map_err(|why| why.to_string())?;
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|why| format!("it is no tokenizer.json ({why})"))?;
        // These would have every prompt come out as long as they say.
        tokenizer
            .with_truncation(None)
            .map_err(|why| why.to_string())?;
        tokenizer.with_padding(None);
        self.0.push((Pattern::new(pattern), tokenizer));
        Ok(())
    }

    fn of(&self, model: &str) -> Option<&Tokenizer> {
        let mut all = self.0.iter();
        all.find(|(pattern, _)| pattern.matches(model))
            .map(|(_, one)| one)
    }
}

/// Counts the tokens of one model.
#[derive(Clone, Copy)]
pub(super) struct Ruler<'a> {
    tokenizer: Option<&'a Tokenizer>,
    media: u64,
}

impl<'a> Ruler<'a> {
    pub(super) fn new(tokenizers: &'a Tokenizers, model: &str, media: u64) -> Self {
        Self {
            tokenizer: tokenizers.of(model),
            media,
        }
    }

    /// Counts a text; may stop when there are more than `most`.
    pub(super) fn text(&self, text: &str, most: u64) -> u64 {
        let mut sum = 0;
        let mut rest = text;
        while !rest.is_empty() && sum <= most {
            let (piece, after) = cut(rest);
            let counted = self
                .tokenizer
                .and_then(|one| one.encode_fast(piece, false).ok());
            sum += match counted {
                Some(tokens) => u64::try_from(tokens.len()).unwrap_or(u64::MAX),
                None => tokens_of_bytes(piece.len() as u64),
            };
            rest = after;
        }
        sum
    }

    /// Counts a message or an item with all its texts.
    pub(super) fn message(&self, message: &[u8], most: u64) -> u64 {
        let mut sum = PER_MESSAGE;
        self.walk(&mut Cursor::new(message), most, &mut sum, 0);
        sum
    }

    /// Counts what every prompt has beside its messages: tools, instructions.
    pub(super) fn rest(&self, request: &ApiRequest, most: u64) -> u64 {
        let mut sum = PER_PROMPT;
        for key in ["tools", "functions", "instructions", "suffix"] {
            let value = request.get(key).filter(|value| *value != b"null");
            let text = value.map(|value| match json::text(value) {
                Some(text) => text,
                None => String::from_utf8_lossy(value),
            });
            if let Some(text) = text {
                sum += self.text(&text, most.saturating_sub(sum));
            }
        }
        sum
    }

    /// Counts the longest of the prompts that a member is.
    pub(super) fn prompts(&self, value: &[u8], most: u64) -> u64 {
        let mut cursor = Cursor::new(value);
        match cursor.peek() {
            Some(b'"') => self.text(&json::text(value).unwrap_or_default(), most),
            Some(b'[') => {
                cursor.enter_array();
                let mut ids = 0;
                let mut longest = 0;
                while cursor.item() {
                    match cursor.peek() {
                        Some(b'"') => {
                            let text = cursor.skip().and_then(json::text).unwrap_or_default();
                            longest = longest.max(self.text(&text, most));
                        }
                        Some(b'[') => {
                            let inner = cursor.skip().unwrap_or_default();
                            longest = longest.max(items(inner));
                        }
                        Some(b'{') => {
                            let item = cursor.skip().unwrap_or_default();
                            longest = longest.max(self.message(item, most));
                        }
                        _ => {
                            cursor.skip();
                            ids += 1;
                        }
                    }
                }
                longest.max(ids)
            }
            _ => 0,
        }
    }

    fn walk(&self, cursor: &mut Cursor<'_>, most: u64, sum: &mut u64, depth: usize) {
        match cursor.peek() {
            _ if depth > DEPTH_MAX || *sum > most => {
                cursor.skip();
            }
            Some(b'"') => {
                let text = cursor.skip().and_then(json::text).unwrap_or_default();
                *sum += self.text(&text, most.saturating_sub(*sum));
            }
            Some(b'[') => {
                cursor.enter_array();
                while cursor.item() {
                    self.walk(cursor, most, sum, depth + 1);
                }
            }
            Some(b'{') => {
                cursor.enter_object();
                while let Some(key) = cursor.key() {
                    match &*plain(key) {
                        "role" | "type" | "id" | "call_id" | "tool_call_id" | "status"
                        | "annotations" | "detail" | "cache_control" => {
                            cursor.skip();
                        }
                        "image_url" | "video_url" | "audio_url" | "input_audio" | "file"
                        | "file_url" | "file_data" | "file_id" | "images" | "audio" => {
                            cursor.skip();
                            *sum += self.media;
                        }
                        _ => self.walk(cursor, most, sum, depth + 1),
                    }
                }
            }
            _ => {
                cursor.skip();
            }
        }
    }
}

/// Returns which member is the prompt of a call, and what it looks like; `None`
/// if its length is nobody's business here.
pub(super) fn prompt_of(request: &ApiRequest) -> Option<(&'static str, Shape)> {
    let plain = Shape::Plain(super::text::Role::User);
    let (key, shape) = match request.endpoint {
        Endpoint::ChatCompletions => ("messages", Shape::Turns),
        Endpoint::Responses => ("input", Shape::Turns),
        Endpoint::Completions => ("prompt", plain),
        Endpoint::Embeddings => ("input", plain),
        Endpoint::Rerank | Endpoint::Moderations => return None,
    };
    request.get(key).map(|_| (key, shape))
}

fn items(array: &[u8]) -> u64 {
    let mut cursor = Cursor::new(array);
    cursor.enter_array();
    let mut count = 0;
    while cursor.item() {
        cursor.skip();
        count += 1;
    }
    count
}

/// Cuts a piece off, at white space if there is any near.
fn cut(text: &str) -> (&str, &str) {
    if text.len() <= PIECE_BYTES {
        return (text, "");
    }
    let end = (0..=PIECE_BYTES)
        .rev()
        .find(|&at| text.is_char_boundary(at));
    let end = end.unwrap_or(text.len());
    let near = end.saturating_sub(256);
    let space = text
        .as_bytes()
        .get(near..end)
        .and_then(|last| last.iter().rposition(u8::is_ascii_whitespace))
        .map(|at| near + at)
        .filter(|&at| at > 0);
    text.split_at(space.unwrap_or(end))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A tokenizer that knows words, and one token for all others.
    pub(in super::super) const WORDS: &str = r#"{"version":"1.0","truncation":{"direction":"Right","max_length":5,"strategy":"LongestFirst","stride":0},"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
        "model":{"type":"WordLevel","vocab":{"[UNK]":0,"a":1},"unk_token":"[UNK]"}}"#;

    fn real() -> Tokenizers {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        std::fs::write(&file, WORDS).unwrap();
        let mut all = Tokenizers::default();
        all.add("real*", &file).unwrap();
        all
    }

    #[test]
    fn a_given_tokenizer_counts_and_stops() {
        let all = real();
        let ruler = Ruler::new(&all, "real-1", 10);
        // Its own truncation does not count.
        assert_eq!(ruler.text("a b c d e f g", 100), 7);
        assert_eq!(ruler.text("incomprehensibilities", 100), 1);
        let long = "word ".repeat(1_000_000);
        let counted = ruler.text(&long, 100);
        assert!((101..5000).contains(&counted), "{counted}");
        assert_eq!(ruler.text(&long, u64::MAX), 1_000_000);
        assert_eq!(Ruler::new(&all, "other", 10).text("abcdefgh", 100), 2);
    }

    /// The shape of Qwen's and Llama's: its expression has a look-ahead, and its
    /// letters are bytes.
    #[test]
    fn a_tokenizer_of_today_can_be_read() {
        let split = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+(?!\S)|\s+";
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": { "type": "NFC" },
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": split }, "behavior": "Isolated", "invert": false },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false },
            ]},
            "post_processor": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false },
            "decoder": null,
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                "vocab": { "a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "1": 5 },
                "merges": ["a b", "Ġ ab"] },
        });
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        std::fs::write(&file, tokenizer.to_string()).unwrap();
        let mut all = Tokenizers::default();
        all.add("*", &file).unwrap();
        let ruler = Ruler::new(&all, "m", 10);
        // "ab", " ab", " ", " ab", "1", "1"
        assert_eq!(ruler.text("ab ab  ab11", u64::MAX), 6);
        assert_eq!(ruler.text(&" ".repeat(100_000), u64::MAX), 100_000);
    }

    #[test]
    fn the_estimate_is_near_for_every_script() {
        let none = Tokenizers::default();
        let ruler = Ruler::new(&none, "m", 10);
        for (text, tokens) in [
            ("", 0),
            ("word", 1),
            ("words", 2),
            ("żółw", 2),
            ("你好", 2),
            ("😀", 1),
        ] {
            assert_eq!(ruler.text(text, 100), tokens, "{text}");
        }
    }

    #[test]
    fn media_and_calls_count_but_roles_do_not() {
        let ruler = Ruler {
            tokenizer: None,
            media: 10,
        };
        let message = br#"{"role":"assistant","content":[{"type":"text","text":"abcd"},{"type":"image_url","image_url":{"url":"data:AAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}}],
            "tool_calls":[{"id":"call_aaaaaaa","type":"function","function":{"name":"abcd","arguments":"{\"a\":1}"}}]}"#;
        assert_eq!(ruler.message(message, u64::MAX), 4 + 1 + 10 + 1 + 2);
    }

    #[test]
    fn prompts_are_counted_one_by_one_and_token_ids_by_number() {
        let ruler = Ruler {
            tokenizer: None,
            media: 10,
        };
        for (prompt, tokens) in [
            (r#""abcdefgh""#, 2),
            (r#"["abcd","abcdefghijkl"]"#, 3),
            ("[1,2,3,4,5]", 5),
            ("[[1,2],[3,4,5]]", 3),
        ] {
            assert_eq!(
                ruler.prompts(prompt.as_bytes(), u64::MAX),
                tokens,
                "{prompt}"
            );
        }
    }

    #[test]
    fn what_is_no_tokenizer_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("t.json");
        assert!(Tokenizers::default().add("*", &file).is_err());
        std::fs::write(&file, "{}").unwrap();
        let told = Tokenizers::default().add("*", &file).unwrap_err();
        assert!(told.contains("tokenizer.json"), "{told}");
    }
}
