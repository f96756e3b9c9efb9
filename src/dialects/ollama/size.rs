//! How many tokens a prompt may be, and whether Ollama has read all of them.
//!
//! Ollama cuts a prompt that is longer than the context: it leaves out the
//! oldest messages, and of what is left the beginning, and tells nobody. So the
//! context is asked for by the prompt's size, and what it says it has read
//! (`prompt_eval_count`) is compared with what it was sent.
//!
//! A tokenizer is not needed for either: an estimate that is a little too large
//! costs some memory; a report is made only when no tokenizer could explain the
//! difference.

/// Bytes of text per token when the context is chosen: English has 4, code and
/// most other languages 3 to 4.
const BYTES_PER_TOKEN: usize = 3;
/// What a template puts around a message, in tokens.
const PER_MESSAGE: usize = 8;
/// What a picture takes, in tokens: 256 to 1,100 with most models.
const PER_IMAGE: usize = 1024;
/// What is kept free for the answer if nobody says how long it may be.
const ANSWER: u64 = 1024;

/// More bytes per token than this no ordinary text has, if it was estimated to
/// be too long for the context.
const CUT_BYTES_PER_TOKEN: usize = 6;
/// The same if it should have fitted: the model's own context may be smaller
/// than what was asked for.
const CUT_BYTES_PER_TOKEN_UNEXPECTED: usize = 8;
/// The smallest context that a model has, in tokens, after Ollama has made room.
const CONTEXT_LEAST: u64 = 1024;
/// A prompt that was cut fills the context but for so few tokens.
const BRIM: u64 = 16;

/// How large a prompt is, as far as it shows before it is tokenized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Of text and tools.
    pub bytes: usize,
    /// Messages, or texts.
    pub messages: usize,
    /// Pictures.
    pub images: usize,
}

impl Size {
    /// Returns about how many tokens the prompt is, rather too many than too few.
    pub fn tokens(self) -> u64 {
        let tokens = self.bytes.div_ceil(BYTES_PER_TOKEN)
            + self.messages * PER_MESSAGE
            + self.images * PER_IMAGE;
        u64::try_from(tokens).unwrap_or(u64::MAX)
    }

    /// Returns how many tokens the context must have. `answer` — the most tokens
    /// of the answer, if it has a bound.
    pub fn context(self, answer: Option<u64>) -> u32 {
        let tokens = self.tokens().saturating_add(answer.unwrap_or(ANSWER));
        u32::try_from(tokens).unwrap_or(u32::MAX)
    }

    /// Returns whether a prompt was certainly cut, of which `read` tokens were
    /// read by a model that was asked for `num_ctx`. Nothing is certain if it
    /// does not say, or says 0: then it came from a cache. `cached` of them it
    /// says came from there; some servers do not count those among what was
    /// read, and then they count here.
    pub fn was_cut(self, num_ctx: u32, read: u64, cached: u64) -> bool {
        if read == 0 {
            return false;
        }
        let seen = usize::try_from(read.saturating_add(cached)).unwrap_or(usize::MAX);
        let most = |per_token: usize| seen.saturating_mul(per_token);
        if self.tokens() > u64::from(num_ctx) {
            let full = read + BRIM >= u64::from(num_ctx);
            return full || self.bytes > most(CUT_BYTES_PER_TOKEN);
        }
        read >= CONTEXT_LEAST && self.bytes > most(CUT_BYTES_PER_TOKEN_UNEXPECTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: usize) -> Size {
        Size {
            bytes,
            messages: 1,
            images: 0,
        }
    }

    #[test]
    fn the_context_holds_the_prompt_and_the_answer() {
        assert_eq!(text(5).context(None), 2 + 8 + 1024);
        assert_eq!(text(3000).context(Some(50)), 1000 + 8 + 50);
        let picture = Size {
            images: 2,
            ..text(0)
        };
        assert_eq!(picture.context(Some(0)), 8 + 2048);
        assert_eq!(text(usize::MAX / 2).context(Some(u64::MAX)), u32::MAX);
    }

    #[test]
    fn a_prompt_that_fits_is_never_called_cut() {
        // 16 KB of English: about 4,000 tokens, estimated as 5,341.
        for read in [3_400, 4_000, 4_079] {
            assert!(!text(16_000).was_cut(4096, read, 0), "{read}");
        }
        // Nothing is known of what came from a cache.
        assert!(!text(1_000_000).was_cut(4096, 0, 0));
        // What was not read anew is no less there.
        assert!(!text(16_000).was_cut(4096, 200, 3_800));
        // A short prompt, whatever is said of it.
        assert!(!text(5_000).was_cut(4096, 3, 0));
        assert!(!text(8_000).was_cut(4096, 1024, 0));
    }

    #[test]
    fn a_prompt_that_fills_the_context_or_was_mostly_left_out_is_cut() {
        assert!(text(16_000).was_cut(4096, 4096, 0));
        assert!(text(16_000).was_cut(4096, 4095, 0));
        // Most of a conversation was left out.
        assert!(text(100_000).was_cut(4096, 700, 0));
        // The model's own context was smaller than what was asked for.
        assert!(text(20_000).was_cut(8192, 2047, 0));
    }
}
