//! The canonical wire format: OpenAI's, read as little as possible.
//!
//! Pure functions over bytes. Nothing here does I/O, knows the time, or keeps
//! anything between two requests.
//!
//! - [`endpoint`]: the six calls, their paths and names
//! - [`json`]: one strict pass over a body: valid or not, and where its members are
//! - [`cursor`]: a forgiving reader for what upstreams send, without allocation
//! - [`request`]: a checked request that keeps its bytes
//! - [`edit`]: edits of it by splicing
//! - [`sse`]: bytes in any pieces → events
//! - [`event`]: what one event means: content, end, error, usage
//! - [`estimate`]: how many tokens a prompt has, about
//! - [`continuation`]: an answer that broke off, gone on with elsewhere
//! - [`whole`]: a whole answer told as a stream
//! - [`upstream_error`]: what upstreams call an error → what a client is told
//! - [`mod@retry_after`]: how long an upstream wants to be left alone
//!
//! **Invariant:** what is not read is not changed. A request without edits goes
//! out as the bytes it came in as; an edited one is spliced, never serialised
//! anew, so that long integers, key order and white space survive.

pub mod continuation;
pub mod cursor;
pub mod edit;
pub mod endpoint;
pub mod estimate;
pub mod event;
pub mod json;
pub mod request;
pub mod retry_after;
pub mod sse;
pub mod upstream_error;
pub mod whole;

pub use edit::Edit;
pub use endpoint::{Endpoint, N_PREDICT, TOKEN_KEYS};
pub use event::{Facts, Usage, inspect, usage_of_body, without_usage};
pub use json::{JsonError, Object};
pub use request::{ApiRequest, MaxTokens};
pub use retry_after::retry_after;
pub use sse::{EventTooLarge, Frame, Framer};
pub use upstream_error::{UpstreamError, error_event, error_in_body};

#[cfg(test)]
mod testing {
    //! A small deterministic generator of what tests need much of.

    use serde_json::{Map, Value};

    /// xorshift64*: the same sequence on every machine.
    pub(super) struct Dice(pub(super) u64);

    impl Dice {
        /// Returns a number below `n`.
        pub(super) fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
            usize::try_from(drawn).unwrap() % n
        }

        pub(super) fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
            &list[self.below(list.len())]
        }

        /// Returns a value nested at most `depth` levels.
        pub(super) fn value(&mut self, depth: usize) -> Value {
            const TEXTS: [&str; 8] = [
                "",
                "model",
                "a \"quoted\" \\ word",
                "line\nline\ttab\u{1}",
                "{[,:]}",
                "żółć 😀 \u{2028}",
                "the quick brown fox jumps over the lazy dog, and once more",
                "\u{fffd}\u{7f}",
            ];
            match self.below(if depth == 0 { 6 } else { 8 }) {
                0 => Value::Null,
                1 => Value::Bool(self.below(2) == 0),
                2 => Value::from(self.below(100_000)),
                3 => Value::from(-0.25 * self.below(1000) as f64),
                4 | 5 => Value::from(*self.pick(&TEXTS)),
                6 => (0..self.below(5)).map(|_| self.value(depth - 1)).collect(),
                _ => Value::Object(self.object(depth - 1)),
            }
        }

        pub(super) fn object(&mut self, depth: usize) -> Map<String, Value> {
            const KEYS: [&str; 8] = ["a", "model", "b\"c", "", "n", "é", "stream", "x\ny"];
            let many = if self.below(8) == 0 { 40 } else { 6 };
            (0..self.below(many))
                .map(|i| {
                    let key = match self.below(2) {
                        0 => (*self.pick(&KEYS)).to_owned(),
                        _ => format!("k{i}"),
                    };
                    (key, self.value(depth))
                })
                .collect()
        }

        /// Writes a value with white space and escapes wherever they may be.
        pub(super) fn write(&mut self, value: &Value, out: &mut String) {
            self.space(out);
            match value {
                Value::String(text) => self.text(text, out),
                Value::Array(items) => {
                    out.push('[');
                    for (i, item) in items.iter().enumerate() {
                        if i > 0 {
                            out.push(',');
                        }
                        self.write(item, out);
                    }
                    self.space(out);
                    out.push(']');
                }
                Value::Object(members) => {
                    out.push('{');
                    for (i, (key, value)) in members.iter().enumerate() {
                        if i > 0 {
                            out.push(',');
                        }
                        self.space(out);
                        self.text(key, out);
                        self.space(out);
                        out.push(':');
                        self.write(value, out);
                    }
                    self.space(out);
                    out.push('}');
                }
                scalar => out.push_str(&scalar.to_string()),
            }
            self.space(out);
        }

        fn space(&mut self, out: &mut String) {
            const SPACES: [&str; 6] = ["", "", "", " ", "\n  ", "\r\t"];
            let space: &&str = self.pick(&SPACES);
            out.push_str(space);
        }

        fn text(&mut self, text: &str, out: &mut String) {
            if self.below(3) > 0 {
                out.push_str(&serde_json::to_string(text).unwrap());
                return;
            }
            out.push('"');
            for unit in text.encode_utf16() {
                out.push_str(&format!("\\u{unit:04x}"));
            }
            out.push('"');
        }
    }
}
