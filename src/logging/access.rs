//! One line per request.

use std::{net::IpAddr, time::Duration};

use log::{
    Level, Record,
    kv::{self, Key, Value, VisitSource},
};

use super::ACCESS;

/// The longest model name that is written, in bytes.
const MODEL_MAX: usize = 128;

/// What the access log says of one request. Never a body, never a secret.
#[derive(Clone, Copy, Debug)]
pub struct AccessLine<'a> {
    /// The request's id.
    pub request_id: &'a str,
    /// Who sent it, seen through the trusted proxies.
    pub client: IpAddr,
    /// The name of the key; `-` for a stranger.
    pub caller: &'a str,
    /// The method.
    pub method: &'a str,
    /// The path, without the query.
    pub path: &'a str,
    /// The status that went to the client; 499 if it left before one did.
    pub status: u16,
    /// How it ended, as the metrics call it.
    pub ending: &'a str,
    /// The model that was asked for.
    pub model: Option<&'a str>,
    /// The route that was taken.
    pub route: Option<&'a str>,
    /// The group that answered.
    pub group: Option<&'a str>,
    /// The upstream that answered.
    pub upstream: Option<&'a str>,
    /// Tries at upstreams.
    pub attempts: usize,
    /// Whether the fallback group answered.
    pub fallback: bool,
    /// How often another upstream went on with the answer; written if it did.
    pub takeovers: u32,
    /// Whether the answer was streamed.
    pub streamed: bool,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body.
    pub bytes_out: u64,
    /// How long it waited for a free upstream; zero is not written.
    pub queued: Duration,
    /// From the header to the first meaningful event.
    pub first_token: Option<Duration>,
    /// From the header to the end.
    pub total: Duration,
    /// Tokens of the prompt, if the upstream told.
    pub tokens_in: Option<u64>,
    /// Tokens of the answer, if the upstream told.
    pub tokens_out: Option<u64>,
    /// OpenAI's `code` of the error, if there was one.
    pub error: Option<&'a str>,
}

/// Writes the line, at level info, if access lines are on.
pub fn write_access(line: &AccessLine<'_>) {
    // Not by the macro: it would evaluate every pair before it asks.
    if Level::Info <= log::max_level() {
        write_to(log::logger(), line);
    }
}

fn write_to(log: &dyn log::Log, line: &AccessLine<'_>) {
    log.log(
        &Record::builder()
            .level(Level::Info)
            .target(ACCESS)
            .module_path_static(Some(module_path!()))
            .args(format_args!("request"))
            .key_values(line)
            .build(),
    );
}

impl kv::Source for AccessLine<'_> {
    /// Visits what is known, in the order of the fields.
    fn visit<'kvs>(&'kvs self, visitor: &mut dyn VisitSource<'kvs>) -> Result<(), kv::Error> {
        let mut pair = |key, value| visitor.visit_pair(Key::from_str(key), value);
        pair("request_id", self.request_id.into())?;
        pair("client", Value::from_display(&self.client))?;
        pair("caller", self.caller.into())?;
        pair("method", self.method.into())?;
        pair("path", self.path.into())?;
        pair("status", self.status.into())?;
        pair("ending", self.ending.into())?;
        for (key, value) in [
            ("model", self.model.map(cut)),
            ("route", self.route),
            ("group", self.group),
            ("upstream", self.upstream),
        ] {
            if let Some(value) = value {
                pair(key, value.into())?;
            }
        }
        pair("attempts", self.attempts.into())?;
        pair("fallback", self.fallback.into())?;
        if self.takeovers > 0 {
            pair("takeovers", self.takeovers.into())?;
        }
        pair("streamed", self.streamed.into())?;
        pair("bytes_in", self.bytes_in.into())?;
        pair("bytes_out", self.bytes_out.into())?;
        if !self.queued.is_zero() {
            pair("queued_ms", millis(self.queued).into())?;
        }
        if let Some(first_token) = self.first_token {
            pair("first_token_ms", millis(first_token).into())?;
        }
        pair("total_ms", millis(self.total).into())?;
        for (key, value) in [
            ("tokens_in", self.tokens_in),
            ("tokens_out", self.tokens_out),
        ] {
            if let Some(value) = value {
                pair(key, value.into())?;
            }
        }
        match self.error {
            Some(error) => pair("error", error.into()),
            None => Ok(()),
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A client may call a model what it likes, at any length.
fn cut(model: &str) -> &str {
    let end = (0..=MODEL_MAX.min(model.len()))
        .rev()
        .find(|end| model.is_char_boundary(*end));
    end.and_then(|end| model.get(..end)).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use std::{sync::Mutex, time::SystemTime};

    use super::*;
    use crate::{config::LogFormat, logging::line};

    struct Caught(LogFormat, Mutex<String>);

    impl log::Log for Caught {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &Record<'_>) {
            let line = line::render(self.0, SystemTime::UNIX_EPOCH, record);
            self.1.lock().unwrap().push_str(&line);
        }
        fn flush(&self) {}
    }

    pub(in crate::logging) fn sample() -> AccessLine<'static> {
        AccessLine {
            request_id: "req-1",
            client: IpAddr::from([192, 0, 2, 7]),
            caller: "alice",
            method: "POST",
            path: "/v1/chat/completions",
            status: 200,
            ending: "success",
            model: Some("qwen 3"),
            route: Some("qwen*"),
            group: Some("gpus"),
            upstream: Some("gpu-1"),
            attempts: 2,
            fallback: false,
            takeovers: 0,
            streamed: true,
            bytes_in: 120,
            bytes_out: 4096,
            queued: Duration::from_millis(40),
            first_token: Some(Duration::from_millis(85)),
            total: Duration::from_millis(1234),
            tokens_in: Some(11),
            tokens_out: None,
            error: None,
        }
    }

    fn written(format: LogFormat, line: &AccessLine<'_>) -> String {
        let caught = Caught(format, Mutex::default());
        write_to(&caught, line);
        caught.1.into_inner().unwrap()
    }

    #[test]
    fn an_access_line_in_text_holds_every_known_field() {
        assert_eq!(
            written(LogFormat::Text, &sample()),
            "1970-01-01T00:00:00.000Z INFO forebay::access: request request_id=req-1 \
             client=192.0.2.7 caller=alice method=POST path=/v1/chat/completions status=200 \
             ending=success model=\"qwen 3\" route=qwen* group=gpus upstream=gpu-1 attempts=2 \
             fallback=false streamed=true bytes_in=120 bytes_out=4096 queued_ms=40 first_token_ms=85 \
             total_ms=1234 tokens_in=11\n"
        );
    }

    #[test]
    fn an_access_line_in_json_holds_the_fields_as_members() {
        let line = AccessLine {
            error: Some("model_not_found"),
            model: Some("x\"},{\"level\":\"error\n"),
            ..sample()
        };
        let read: serde_json::Value =
            serde_json::from_str(&written(LogFormat::Json, &line)).unwrap();
        assert_eq!(read["target"], "forebay::access");
        assert_eq!(read["status"], 200);
        assert_eq!(read["fallback"], false);
        assert_eq!(read["queued_ms"], 40);
        assert_eq!(read["first_token_ms"], 85);
        assert_eq!(read["error"], "model_not_found");
        assert_eq!(read["model"], line.model.unwrap());
        assert!(read.get("tokens_out").is_none());
    }

    #[test]
    fn a_long_model_name_is_cut_between_two_characters() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"ä".repeat(100)).len(), MODEL_MAX);
        assert_eq!(cut(&"日".repeat(100)).len(), 126);
    }
}
