//! Client keys: their tokens, the file that knows them, and who calls with one.

use forebay::plugins::hash_token;

use super::{
    Gateway,
    http::{Answer, post},
};

/// The token of the key with this name.
pub fn token(name: &str) -> String {
    format!("fb_token_that_nobody_guesses_of_{name}")
}

/// A keys file: each key's name, and its further fields.
pub fn keys(all: &[(&str, &str)]) -> String {
    let mut text = "keys:\n".to_owned();
    for (name, rest) in all {
        let hash = hash_token(&token(name));
        text.push_str(&format!(
            "  - {{ name: {name}, sha256: \"{hash}\"{rest} }}\n"
        ));
    }
    text
}

/// What the key with this name sends in `Authorization`.
pub fn bearer(name: &str) -> String {
    format!("Bearer {}", token(name))
}

/// Sends a chat with the key of this name.
pub async fn chat_as(gateway: &Gateway, name: &str, body: &str) -> Answer {
    let key = bearer(name);
    let headers = [("authorization", key.as_str())];
    let path = "/v1/chat/completions";
    post(gateway.addr, path, &headers, body.as_bytes()).await
}
