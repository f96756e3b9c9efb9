//! Client keys: their tokens, and the file that knows them.

use forebay::plugins::hash_token;

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
