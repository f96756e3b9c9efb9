//! Base64, for bodies that are no text and for embeddings: one function is no
//! reason for a dependency.

/// Standard base64 with padding (RFC 4648 §4).
pub(crate) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: [char; 64] = {
        let mut alphabet = ['A'; 64];
        let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut i = 0;
        while i < 64 {
            #[expect(clippy::indexing_slicing, reason = "both are 64 long, at compile time")]
            {
                alphabet[i] = letters[i] as char;
            }
            i += 1;
        }
        alphabet
    };
    let digit = |bits: u32, shift: u32| {
        let index = usize::try_from((bits >> shift) & 63).unwrap_or_default();
        ALPHABET.get(index).copied().unwrap_or('=')
    };
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        text.push(digit(bits, 18));
        text.push(digit(bits, 12));
        text.push(if group.len() > 1 { digit(bits, 6) } else { '=' });
        text.push(if group.len() > 2 { digit(bits, 0) } else { '=' });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_padded() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(b"\xfb\xff"), "+/8=");
    }
}
