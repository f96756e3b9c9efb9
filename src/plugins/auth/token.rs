//! New tokens, for `forebay key new` and `forebay key hash`.

use std::fmt::Write as _;

use rand::{TryRng as _, rngs::SysRng};

use super::keys::hash;
use crate::config::Secret;

/// What every token of ours begins with, so that scanners for leaked secrets
/// can know one.
const PREFIX: &str = "fb_";
/// RFC 4648 §5.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Makes a token of 256 random bits: `fb_` and 43 characters of base64url.
///
/// # Panics
/// The operating system has no random numbers.
pub fn new_token() -> Secret {
    let mut bits = [0; 32];
    SysRng
        .try_fill_bytes(&mut bits)
        .expect("the system has random numbers");
    Secret::new(format!("{PREFIX}{}", base64url(&bits)))
}

/// Returns the SHA-256 of a token in 64 hex digits, as a keys file wants it.
pub fn hash_token(token: &str) -> String {
    hash(token.as_bytes())
        .iter()
        .fold(String::with_capacity(64), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a string takes any text");
            hex
        })
}

/// Writes six bits a character, without padding.
fn base64url(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 4 / 3 + 1);
    for chunk in bytes.chunks(3) {
        let bits = chunk
            .iter()
            .zip([16, 8, 0])
            .fold(0, |bits, (byte, shift)| bits | u32::from(*byte) << shift);
        for shift in [18, 12, 6, 0].into_iter().take(chunk.len() + 1) {
            let six = usize::try_from(bits >> shift & 0x3f).unwrap_or_default();
            let character = ALPHABET.get(six).copied().expect("six bits are below 64");
            text.push(char::from(character));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_43_characters_after_its_prefix_and_never_the_same() {
        let (one, other) = (new_token(), new_token());
        assert_ne!(one.expose(), other.expose());
        let random = one.expose().strip_prefix("fb_").unwrap();
        assert_eq!(random.len(), 43);
        assert!(random.bytes().all(|b| ALPHABET.contains(&b)));
    }

    #[test]
    fn base64url_is_that_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg"),
            ("fo", "Zm8"),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg"),
            ("fooba", "Zm9vYmE"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64url(bytes.as_bytes()), text);
        }
        assert_eq!(base64url(&[0xfb, 0xff, 0xfe]), "-__-");
    }

    #[test]
    fn a_hash_is_what_sha256sum_prints() {
        assert_eq!(
            hash_token("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
