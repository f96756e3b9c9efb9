//! Captured lines → what the export formats are made of.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// A captured line, as far as exports need it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Captured {
    /// The answer's id.
    #[serde(default)]
    pub id: String,
    /// The turns: asking and answering in turn, at least one of each.
    pub conversations: Vec<Turn>,
    /// What the system said.
    #[serde(default)]
    pub system: String,
    /// The tools, as a JSON list; empty without any.
    #[serde(default)]
    pub tools: String,
    /// The files of the images.
    #[serde(default)]
    pub images: Vec<String>,
    /// The rest.
    #[serde(default)]
    pub meta: About,
}

/// A turn as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Turn {
    /// Who.
    pub from: From,
    /// What.
    pub value: String,
}

/// Who a turn is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// The user.
    Human,
    /// A tool, or several.
    Observation,
    /// The model, in words.
    Gpt,
    /// The model, calling tools.
    FunctionCall,
}

impl From {
    /// Returns the word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Observation => "observation",
            Self::Gpt => "gpt",
            Self::FunctionCall => "function_call",
        }
    }

    const fn asks(self) -> bool {
        matches!(self, Self::Human | Self::Observation)
    }
}

/// What exports read of a line's `meta`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct About {
    /// Whether the answer is not whole.
    #[serde(default)]
    pub partial: bool,
}

impl Captured {
    /// Reads a line; `None` if it is none of ours, or a damaged one.
    pub fn read(line: &[u8]) -> Option<Self> {
        let captured: Self = serde_json::from_slice(line).ok()?;
        let turns = &captured.conversations;
        let alternate = turns
            .iter()
            .enumerate()
            .all(|(place, turn)| turn.from.asks() == (place % 2 == 0));
        let is_whole = !turns.is_empty() && turns.len().is_multiple_of(2) && alternate;
        // A name that leads elsewhere was not written by us.
        let is_ours = captured.images.iter().all(|name| is_image(name));
        (is_whole && is_ours).then_some(captured)
    }

    /// Returns whether the answer has no words and no calls: nothing to learn.
    pub fn says_nothing(&self) -> bool {
        let last = self.conversations.last();
        last.is_none_or(|turn| turn.value.trim().is_empty())
    }

    /// Returns whether a tool was called.
    pub fn has_tool_turns(&self) -> bool {
        let mut turns = self.conversations.iter();
        turns.any(|turn| matches!(turn.from, From::Observation | From::FunctionCall))
    }

    /// Returns a number that is the same for lines that say the same, whenever
    /// and by whomever it was said.
    pub fn fingerprint(&self) -> [u8; 16] {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        add(&self.system);
        add(&self.tools);
        for name in &self.images {
            add(name);
        }
        for turn in &self.conversations {
            add(turn.from.as_str());
            add(&turn.value);
        }
        let hash: [u8; 32] = hash.finalize().into();
        let (start, _) = hash.split_first_chunk().expect("a hash has 32 bytes");
        *start
    }

    /// Takes the thoughts off the answers.
    pub fn strip_thoughts(&mut self) {
        for turn in &mut self.conversations {
            if !turn.from.asks() {
                turn.value = split_thought(&turn.value).1.to_owned();
            }
        }
    }
}

/// Splits what an answer begins with, if it is a thought, from the rest.
pub fn split_thought(value: &str) -> (&str, &str) {
    let Some(inside) = value.strip_prefix("<think>") else {
        return ("", value);
    };
    let Some((_, rest)) = inside.split_once("</think>") else {
        return ("", value);
    };
    let rest = rest.trim_start_matches('\n');
    let thought = value.len() - rest.len();
    (value.get(..thought).unwrap_or_default(), rest)
}

/// Returns whether this is how capture names images: `images/`, 64 hexadecimal
/// digits, an ending.
pub fn is_image(name: &str) -> bool {
    let Some((hash, ending)) = name
        .strip_prefix("images/")
        .and_then(|file| file.split_once('.'))
    else {
        return false;
    };
    hash.len() == 64
        && hash
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        && (1..=8).contains(&ending.len())
        && ending.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(turns: &str, images: &str) -> Option<Captured> {
        let line = format!(r#"{{"conversations":[{turns}],"images":[{images}],"meta":{{}}}}"#);
        Captured::read(line.as_bytes())
    }

    const GOOD: &str = r#"{"from":"human","value":"a"},{"from":"gpt","value":"b"}"#;

    #[test]
    fn only_whole_lines_of_ours_are_read() {
        let image = format!("\"images/{}.png\"", "0f".repeat(32));
        assert!(read(GOOD, "").is_some());
        assert!(read(GOOD, &image).is_some());
        for turns in [
            "",
            r#"{"from":"human","value":"a"}"#,
            r#"{"from":"gpt","value":"a"},{"from":"human","value":"b"}"#,
            r#"{"from":"human","value":"a"},{"from":"human","value":"b"}"#,
            r#"{"from":"system","value":"a"},{"from":"gpt","value":"b"}"#,
            r#"{"from":"human","value":null},{"from":"gpt","value":"b"}"#,
        ] {
            assert_eq!(read(turns, ""), None, "{turns}");
        }
        for image in [r#""/etc/passwd""#, r#""images/../../x.png""#, "1", r#""""#] {
            assert_eq!(read(GOOD, image), None, "{image}");
        }
        assert_eq!(Captured::read(b"{\"conversations\":[{\"from\""), None);
    }

    #[test]
    fn the_same_words_have_the_same_fingerprint() {
        let of = |value: &str| {
            let turns = GOOD.replace("\"b\"", &format!("{value:?}"));
            read(&turns, "").unwrap().fingerprint()
        };
        assert_eq!(of("b"), of("b"));
        assert_ne!(of("b"), of("c"));
    }

    #[test]
    fn a_thought_is_told_from_what_follows() {
        for (value, thought, rest) in [
            (
                "<think>\nx\n</think>\n\nyes",
                "<think>\nx\n</think>\n\n",
                "yes",
            ),
            ("<think>x</think>yes", "<think>x</think>", "yes"),
            ("<think>x", "", "<think>x"),
            ("yes", "", "yes"),
        ] {
            assert_eq!(split_thought(value), (thought, rest));
        }
    }
}
