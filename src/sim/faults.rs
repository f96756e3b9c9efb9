//! The fault knobs: how the simulator can be told to misbehave.
//!
//! [`KNOBS`] is the whole list; a knob is one row of it and one field of
//! [`Fault`]. The same text is read everywhere (the header `x-sim`, the control
//! port, `--fault`, tests): `knob=value;knob;knob=value`. Times are milliseconds
//! or carry a unit (`250`, `2s`).
//!
//! **Invariant:** what is not understood is refused, never ignored: a test that
//! asks for a fault and does not get it would prove nothing.

use std::{fmt, str::FromStr, time::Duration};

use serde_json::Value as Json;

/// One way to misbehave; the default behaves well.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fault {
    /// How many requests (or connections) it is for; absent means all.
    pub times: Option<u64>,
    /// Only requests whose path contains this; `*` is every request. Absent
    /// means model calls, that is, every POST.
    pub path: Option<String>,
    /// What happens to new connections.
    pub connect: Option<Connect>,
    /// Reads the request and never answers.
    pub hang: bool,
    /// Reads the request and resets the connection.
    pub reset: bool,
    /// Answers with this status before the body is read.
    pub early: Option<u16>,
    /// What follows an early answer.
    pub early_then: Option<EarlyThen>,
    /// Answers with this status, 200..=599.
    pub status: Option<u16>,
    /// The `Retry-After` of an error answer, as it is sent.
    pub retry_after: Option<String>,
    /// The shape of an error answer's body.
    pub body: Option<ErrorBody>,
    /// Waits this long before the head of the answer.
    pub header_delay: Option<Duration>,
    /// Sends the head byte by byte, this long apart.
    pub slow_headers: Option<Duration>,
    /// The delay of the first token, instead of `--first-token`.
    pub first_token: Option<Duration>,
    /// The time between events, instead of `--rate`.
    pub gap: Option<Duration>,
    /// Falls silent after this many events (or body bytes, if not streamed).
    pub stall_at: Option<u64>,
    /// Dies after this many events (or body bytes, if not streamed).
    pub die_at: Option<u64>,
    /// How it dies.
    pub how: Option<How>,
    /// Sends an error event after this many events, and no `[DONE]`.
    pub error_at: Option<u64>,
    /// Sends `[DONE]` after the error event all the same.
    pub error_then_done: bool,
    /// Ends the stream without `[DONE]`.
    pub no_done: bool,
    /// Sends comments (blank lines, if not streamed) this far apart for ever.
    pub only_comments: Option<Duration>,
    /// Lies about the length of the body.
    pub content_length: Option<LengthLie>,
    /// Sends `Transfer-Encoding: chunked` twice.
    pub duplicate_te: bool,
    /// Sends `Transfer-Encoding` and `Content-Length`.
    pub te_cl: bool,
    /// Sends headers that nobody asked for.
    pub junk_headers: Option<Junk>,
    /// Sends this many extra headers.
    pub many_headers: Option<usize>,
    /// Sends one header with a value of this many bytes.
    pub big_header: Option<usize>,
    /// Sends one extra event with a content of this many bytes, on one line.
    pub huge_event: Option<usize>,
    /// The line ends of the event stream.
    pub newline: Option<Newline>,
    /// Begins the event stream with a byte order mark.
    pub bom: bool,
    /// Spreads each event over several `data:` lines.
    pub multi_data: bool,
    /// Puts comments, `id:` and `retry:` lines between the events.
    pub comments: bool,
    /// Writes the body in pieces of this many bytes, each a write and a chunk.
    pub split: Option<usize>,
    /// Writes this many events at once.
    pub per_write: Option<usize>,
    /// Compresses the body, whatever the client accepts.
    pub gzip: bool,
    /// Answers in HTTP/1.0; the end of the connection is the end of the body.
    pub http10: bool,
    /// Says `Connection: close`, and does.
    pub close: bool,
    /// Closes the kept-alive connection without a word.
    pub stale: Option<Stale>,
    /// Answers with the request's own head, as JSON.
    pub echo_headers: bool,
    /// Sends this informational status (102..=199) before the answer.
    pub informational: Option<u16>,
    /// Sends trailers after the body.
    pub trailers: bool,
    /// Leaves `usage` out.
    pub no_usage: bool,
    /// Sends `usage` in every event.
    pub continuous_usage: bool,
    /// Streams no event at all.
    pub empty_stream: bool,
    /// Knows no model.
    pub refuse_model: bool,
    /// What becomes of `continue_final_message`, instead of being honoured.
    pub continuation: Option<Continuation>,
    /// The natural length of the answer in tokens, instead of `--tokens`.
    pub tokens: Option<usize>,
}

/// Makes an enum whose values are words, read and shown by the same table.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl Value for Option<$name> {
            fn read(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Some($name::$variant)),)+
                    _ => Err([$($word),+].join("|")),
                }
            }

            fn show(&self) -> Option<String> {
                self.map(|value| match value { $($name::$variant => $word.to_owned(),)+ })
            }
        }
    };
}

words! {
    /// What happens to new connections.
    Connect {
        /// The listening socket is closed; open connections live on.
        Refuse = "refuse",
        /// They are accepted and reset at once.
        Reset = "reset",
    }
}

words! {
    /// What follows an early answer.
    EarlyThen {
        /// The connection is closed with the body unread.
        Close = "close",
        /// The rest of the body is read, and the connection is kept.
        Read = "read",
    }
}

words! {
    /// The shape of an error answer's body.
    ErrorBody {
        /// `{"error":{message,type,param,code}}` with a string code.
        Openai = "openai",
        /// The same with an integer code, as vLLM sends it.
        Vllm = "vllm",
        /// `{"error":"text"}`.
        Ollama = "ollama",
        /// A proxy's error page.
        Html = "html",
        /// No body.
        Empty = "empty",
        /// OpenAI's `insufficient_quota`.
        Quota = "quota",
        /// `{"detail":"text"}`.
        Detail = "detail",
    }
}

words! {
    /// How the length of the body is misstated.
    LengthLie {
        /// Half of what is sent.
        Short = "short",
        /// A hundred bytes more than is sent before the connection closes.
        Long = "long",
    }
}

words! {
    /// Which headers are added.
    Junk {
        /// Well formed, but nothing a client should see: cookies, nominated
        /// connection headers, the vendor's own.
        Legal = "legal",
        /// A folded line, a space before the colon, a line without a colon,
        /// bytes over 0x7f.
        Malformed = "malformed",
    }
}

words! {
    /// The line ends of an event stream.
    Newline {
        /// `\n`
        Lf = "lf",
        /// `\r`
        Cr = "cr",
        /// `\r\n`
        Crlf = "crlf",
    }
}

words! {
    /// What becomes of the wish to go on with a partial message.
    Continuation {
        /// It is not read: the answer begins anew.
        Ignore = "ignore",
        /// It is an unknown field: 400.
        Reject = "reject",
    }
}

words! {
    /// When a kept-alive connection is closed without a word.
    Stale {
        /// Right after the answer.
        Now = "now",
        /// When the next request arrives on it, which is not read.
        Next = "next",
    }
}

/// How an answer dies; `mid_utf8` and `rst` may be joined by `+`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// By a reset; otherwise by an orderly FIN.
    pub rst: bool,
    /// Inside a chunk whose length promised more.
    pub mid_chunk: bool,
    /// Inside a character of several bytes.
    pub mid_utf8: bool,
}

/// A row of [`KNOBS`].
pub struct Knob {
    /// Its name in the text form.
    pub name: &'static str,
    /// What it takes.
    pub values: &'static str,
    /// What it does, in a sentence without a full stop.
    pub effect: &'static str,
    /// What it means without `=value`; absent when it needs one.
    bare: Option<&'static str>,
    set: fn(&mut Fault, &str) -> Result<(), String>,
    show: fn(&Fault) -> Option<String>,
}

/// A row: name, field, what it takes, what it means alone, what it does.
macro_rules! knob {
    ($name:literal, $field:ident, $values:literal, $bare:expr, $effect:literal) => {
        Knob {
            name: $name,
            values: $values,
            effect: $effect,
            bare: $bare,
            set: |fault, text| {
                fault.$field = Value::read(text)?;
                Ok(())
            },
            show: |fault| fault.$field.show(),
        }
    };
}

const ON: Option<&str> = Some("true");

/// Every knob there is.
#[rustfmt::skip] // one knob, one line
pub const KNOBS: &[Knob] = &[
    knob!("times", times, "N", None, "only the next N requests (for `connect=reset`: connections)"),
    knob!("path", path, "TEXT", None, "only requests whose path contains TEXT; `*` is every request; without it, every POST"),
    knob!("connect", connect, "refuse|reset", None, "refuses new connections, or accepts and resets them; stands alone, not in the header"),
    knob!("hang", hang, "", ON, "reads the request and never answers"),
    knob!("reset", reset, "", ON, "reads the request and resets the connection"),
    knob!("early", early, "NNN", None, "answers with this status before the body is read"),
    knob!("early_then", early_then, "close|read", None, "after an early answer: closes (default), or reads on and keeps the connection"),
    knob!("status", status, "NNN", None, "answers with this status, 200..=599"),
    knob!("retry_after", retry_after, "TEXT", None, "the `Retry-After` of an error answer, sent as it is"),
    knob!("body", body, "openai|vllm|ollama|html|empty|quota|detail", None, "the shape of an error answer (default vllm)"),
    knob!("header_delay", header_delay, "MS", None, "waits before the head of the answer"),
    knob!("slow_headers", slow_headers, "MS", Some("5"), "sends the head byte by byte, this far apart (5 ms)"),
    knob!("first_token", first_token, "MS", None, "the delay of the first token, instead of `--first-token`"),
    knob!("gap", gap, "MS", None, "the time between events, instead of `--rate`"),
    knob!("stall_at", stall_at, "N", None, "falls silent after N events"),
    knob!("die_at", die_at, "N", None, "ends the connection after N events"),
    knob!("how", how, "fin|rst|mid_chunk|mid_utf8", None, "how it dies: orderly (default), by reset, inside a chunk, inside a character; joined by `+`"),
    knob!("error_at", error_at, "N", None, "sends an error event after N events and ends the stream without `[DONE]`; 0 makes it the first event"),
    knob!("error_then_done", error_then_done, "", ON, "with `error_at`: sends `[DONE]` all the same"),
    knob!("no_done", no_done, "", ON, "ends the stream without its last event (`[DONE]`)"),
    knob!("only_comments", only_comments, "MS", None, "sends comments this far apart, and nothing else for ever (blank lines if not streamed)"),
    knob!("content_length", content_length, "short|long", None, "sends a `Content-Length` that is half of, or 100 bytes over, what follows"),
    knob!("duplicate_te", duplicate_te, "", ON, "sends `Transfer-Encoding: chunked` twice"),
    knob!("te_cl", te_cl, "", ON, "sends `Transfer-Encoding: chunked` and a `Content-Length`"),
    knob!("junk_headers", junk_headers, "legal|malformed", Some("legal"), "adds headers nobody should see (default), or that are none"),
    knob!("many_headers", many_headers, "N", None, "adds N headers"),
    knob!("big_header", big_header, "BYTES", None, "adds one header with a value of this size"),
    knob!("huge_event", huge_event, "BYTES", None, "adds one event with a content of this size, on one line, before the first token"),
    knob!("newline", newline, "lf|cr|crlf", None, "the line ends of the event stream (default lf)"),
    knob!("bom", bom, "", ON, "begins the event stream with a byte order mark"),
    knob!("multi_data", multi_data, "", ON, "spreads each event over two `data:` lines"),
    knob!("comments", comments, "", ON, "puts comments, `id:` and `retry:` lines between the events"),
    knob!("split", split, "BYTES", None, "writes the body in pieces of this size, each a write and a chunk"),
    knob!("per_write", per_write, "N", None, "writes N events at once"),
    knob!("gzip", gzip, "", ON, "compresses the body, whatever the client accepts"),
    knob!("http10", http10, "", ON, "answers in HTTP/1.0, the body ends with the connection"),
    knob!("close", close, "", ON, "says `Connection: close`, and does"),
    knob!("stale", stale, "now|next", Some("now"), "closes the kept-alive connection without a word: after the answer, or when the next request arrives"),
    knob!("echo_headers", echo_headers, "", ON, "answers with the request's own head, as JSON"),
    knob!("1xx", informational, "NNN", None, "sends this informational status first, 102..=199"),
    knob!("trailers", trailers, "", ON, "sends trailers after the body"),
    knob!("no_usage", no_usage, "", ON, "leaves `usage` out"),
    knob!("continuous_usage", continuous_usage, "", ON, "sends `usage` in every event"),
    knob!("empty_stream", empty_stream, "", ON, "streams no event at all"),
    knob!("refuse_model", refuse_model, "", ON, "knows no model: 404"),
    knob!("continue", continuation, "ignore|reject", None, "does not know `continue_final_message`: begins anew, or answers 400"),
    knob!("tokens", tokens, "N", None, "the natural length of the answer, instead of `--tokens`"),
];

/// Why a text is no fault.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// There is no such knob.
    #[error("unknown knob {name:?}; there are: {}", knob_names())]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The knob does not take this.
    #[error("{knob}={found}: expected {expected}")]
    Value {
        /// The knob.
        knob: &'static str,
        /// What it takes.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The knobs do not go together.
    #[error("{0}")]
    Together(&'static str),
    /// It is neither the text form nor a JSON object or list of objects.
    #[error("expected knob=value;… or a JSON object or a list of them: {0}")]
    Json(String),
}

fn knob_names() -> String {
    let names: Vec<&str> = KNOBS.iter().map(|knob| knob.name).collect();
    names.join(", ")
}

impl Fault {
    /// Reads what the control port is sent: one fault a line, or a JSON object,
    /// or a JSON list of objects.
    ///
    /// # Errors
    /// The first knob that is not understood.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, FaultError> {
        let trimmed = text.trim();
        if trimmed.starts_with(['{', '[']) {
            let json = serde_json::from_str(trimmed)
                .map_err(|error| FaultError::Json(error.to_string()))?;
            return match json {
                Json::Array(list) => list.iter().map(Self::from_json).collect(),
                one => Ok(vec![Self::from_json(&one)?]),
            };
        }
        let lines = trimmed.lines().filter(|line| !line.trim().is_empty());
        lines.map(str::parse).collect()
    }

    /// Whether it is no fault at all.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a request may bring it along: not what chooses among requests.
    pub(crate) fn fits_one_request(&self) -> bool {
        self.connect.is_none() && self.times.is_none() && self.path.is_none()
    }

    /// Whether it is for this request.
    pub(crate) fn matches(&self, path: &str, model_call: bool) -> bool {
        match self.path.as_deref() {
            None => model_call,
            Some("*") => true,
            Some(part) => path.contains(part),
        }
    }

    fn from_json(json: &Json) -> Result<Self, FaultError> {
        let Json::Object(fields) = json else {
            return Err(FaultError::Json(format!("found {json}")));
        };
        let mut fault = Self::default();
        for (name, value) in fields {
            match value {
                Json::Bool(true) => fault.set(name, None)?,
                Json::Bool(false) | Json::Null => {}
                Json::String(text) => fault.set(name, Some(text))?,
                other => fault.set(name, Some(&other.to_string()))?,
            }
        }
        fault.checked()
    }

    fn set(&mut self, name: &str, text: Option<&str>) -> Result<(), FaultError> {
        let unknown = || FaultError::Unknown {
            name: name.to_owned(),
        };
        let knob = KNOBS
            .iter()
            .find(|knob| knob.name == name)
            .ok_or_else(unknown)?;
        let wrong = |expected: String| FaultError::Value {
            knob: knob.name,
            expected,
            found: text.unwrap_or_default().to_owned(),
        };
        let value = text
            .or(knob.bare)
            .ok_or_else(|| wrong(knob.values.to_owned()))?;
        (knob.set)(self, value).map_err(wrong)
    }

    /// Refuses what would have no effect, or two effects at once.
    fn checked(self) -> Result<Self, FaultError> {
        let wrong = |why| Err(FaultError::Together(why));
        let alone = Self {
            connect: self.connect,
            times: self.times,
            ..Self::default()
        };
        if self.connect.is_some() && self != alone {
            return wrong("connect: goes with no other knob but times");
        }
        if self.connect == Some(Connect::Refuse) && self.times.is_some() {
            return wrong("connect=refuse: refused connections cannot be counted, leave times out");
        }
        if self.how.is_some() && self.die_at.is_none() {
            return wrong("how: needs die_at");
        }
        if self.early_then.is_some() && self.early.is_none() {
            return wrong("early_then: needs early");
        }
        if self.error_then_done && self.error_at.is_none() {
            return wrong("error_then_done: needs error_at");
        }
        let error = self.status.is_some() || self.early.is_some() || self.refuse_model;
        if !error && (self.retry_after.is_some() || self.body.is_some()) {
            return wrong("retry_after and body: need status, early or refuse_model");
        }
        for status in [self.status, self.early].into_iter().flatten() {
            if !(200..=599).contains(&status) {
                return wrong("status and early: expected 200..=599");
            }
        }
        if self
            .informational
            .is_some_and(|status| !(102..=199).contains(&status))
        {
            return wrong("1xx: expected 102..=199");
        }
        if self.split == Some(0) || self.per_write == Some(0) {
            return wrong("split and per_write: expected at least 1");
        }
        Ok(self)
    }
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let mut fault = Self::default();
        for part in text.split(';').map(str::trim).filter(|p| !p.is_empty()) {
            match part.split_once('=') {
                Some((name, value)) => fault.set(name.trim(), Some(value.trim()))?,
                None => fault.set(part, None)?,
            }
        }
        fault.checked()
    }
}

impl fmt::Display for Fault {
    /// The text form, which reads back as the same fault.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for knob in KNOBS {
            let Some(value) = (knob.show)(self) else {
                continue;
            };
            if !first {
                f.write_str(";")?;
            }
            first = false;
            f.write_str(knob.name)?;
            if knob.bare != Some(value.as_str()) {
                write!(f, "={value}")?;
            }
        }
        Ok(())
    }
}

/// A knob's value as text.
trait Value: Sized {
    /// Reads it; the error says what was expected.
    fn read(text: &str) -> Result<Self, String>;
    /// Shows it, unless it is the default.
    fn show(&self) -> Option<String>;
}

impl Value for bool {
    fn read(text: &str) -> Result<Self, String> {
        match text {
            "true" | "1" | "on" => Ok(true),
            "false" | "0" | "off" => Ok(false),
            _ => Err("no value, or true|false".to_owned()),
        }
    }

    fn show(&self) -> Option<String> {
        self.then(|| "true".to_owned())
    }
}

impl Value for Option<String> {
    fn read(text: &str) -> Result<Self, String> {
        Ok(Some(text.to_owned()))
    }

    fn show(&self) -> Option<String> {
        self.clone()
    }
}

impl Value for Option<Duration> {
    fn read(text: &str) -> Result<Self, String> {
        if let Ok(ms) = text.parse() {
            return Ok(Some(Duration::from_millis(ms)));
        }
        humantime::parse_duration(text)
            .map(Some)
            .map_err(|why| format!("milliseconds, or a time such as 250ms or 2s ({why})"))
    }

    fn show(&self) -> Option<String> {
        self.map(|time| time.as_millis().to_string())
    }
}

impl Value for Option<How> {
    fn read(text: &str) -> Result<Self, String> {
        let mut how = How::default();
        for word in text.split('+') {
            match word {
                "fin" => how.rst = false,
                "rst" => how.rst = true,
                "mid_chunk" => how.mid_chunk = true,
                "mid_utf8" => how.mid_utf8 = true,
                _ => return Err("fin|rst|mid_chunk|mid_utf8, joined by +".to_owned()),
            }
        }
        Ok(Some(how))
    }

    fn show(&self) -> Option<String> {
        let how = (*self)?;
        let words = [
            (how.mid_chunk, "mid_chunk"),
            (how.mid_utf8, "mid_utf8"),
            (how.rst, "rst"),
        ];
        let words: Vec<&str> = words.iter().filter(|w| w.0).map(|w| w.1).collect();
        Some(if words.is_empty() {
            "fin".to_owned()
        } else {
            words.join("+")
        })
    }
}

macro_rules! numbers {
    ($($type:ty),+) => {$(
        impl Value for Option<$type> {
            fn read(text: &str) -> Result<Self, String> {
                text.parse().map(Some).map_err(|why| format!("a whole number ({why})"))
            }

            fn show(&self) -> Option<String> {
                self.map(|number| number.to_string())
            }
        }
    )+};
}

numbers!(u16, u64, usize);

#[cfg(test)]
mod tests {
    use super::*;

    /// A value that `knob` takes.
    fn sample(knob: &Knob) -> String {
        match (knob.name, knob.values) {
            ("early" | "status", _) => "503".to_owned(),
            ("1xx", _) => "103".to_owned(),
            (_, "") => "true".to_owned(),
            (_, "N" | "BYTES" | "MS") => "7".to_owned(),
            (_, "TEXT") => "models".to_owned(),
            (_, words) => words.split('|').next_back().unwrap().to_owned(),
        }
    }

    #[test]
    fn every_knob_is_read_and_shown_by_the_same_text() {
        assert!(KNOBS.len() > 40);
        for knob in KNOBS {
            let needs = match knob.name {
                "how" => "die_at=3;",
                "early_then" => "early=413;",
                "retry_after" | "body" => "status=503;",
                "error_then_done" => "error_at=0;",
                _ => "",
            };
            let text = format!("{needs}{}={}", knob.name, sample(knob));
            let fault: Fault = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_ne!(fault, needs.parse().unwrap(), "{text} changes nothing");
            let shown = fault.to_string();
            assert_eq!(shown.parse::<Fault>().unwrap(), fault, "{text} -> {shown}");
        }
    }

    #[test]
    fn an_unknown_knob_is_refused_with_the_list_of_knobs() {
        let error = "stutter=3".parse::<Fault>().unwrap_err().to_string();
        for knob in KNOBS {
            assert!(error.contains(knob.name), "{error}");
        }
    }

    #[test]
    fn a_value_that_a_knob_does_not_take_is_refused() {
        for text in [
            "status=abc",
            "status=99",
            "1xx=100",
            "newline=nl",
            "gap=1parsec",
            "die_at",
            "split=0",
            "how=rst",
            "body=html",
            "early_then=read",
            "connect=refuse;times=2",
            "connect=reset;hang",
            "hang=perhaps",
        ] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_may_carry_a_unit() {
        let fault: Fault = "gap=2s; first_token=15".parse().unwrap();
        assert_eq!(fault.gap, Some(Duration::from_secs(2)));
        assert_eq!(fault.first_token, Some(Duration::from_millis(15)));
    }

    #[test]
    fn the_control_port_takes_lines_and_json() {
        let lines = Fault::parse_all("status=429;times=1\n\nhang\n").unwrap();
        let json = r#"[{"status":429,"times":1},{"hang":true,"bom":false}]"#;
        assert_eq!(lines, Fault::parse_all(json).unwrap());
        let one = Fault::parse_all(r#"{"how":"mid_utf8+rst","die_at":3}"#).unwrap();
        assert_eq!(one, ["die_at=3;how=mid_utf8+rst".parse().unwrap()]);
        assert!(Fault::parse_all(r#"{"status":[1]}"#).is_err());
        assert!(Fault::parse_all(r#"["hang"]"#).is_err());
        assert!(Fault::parse_all("{").is_err());
    }
}
