//! What single values must look like: one function per `format` of the schema.
//!
//! **Invariant:** a reason given here repeats nothing of the value where it may
//! hold a secret ([`is_private`]).

use ipnet::IpNet;
use url::Url;

use super::{Count, Rate, SecretRef, Share, Size, Time, listen_address, problem::shown};

/// Returns what a value of the format looks like, for "expected …".
pub(super) fn expected(format: &str) -> Option<&'static str> {
    Some(match format {
        "duration" => "a duration such as 250ms, 30s or 10m",
        "size" => "a size such as 64KiB, 32MiB or 10MB",
        "share" => "a share such as 20%",
        "count" => "a whole number above 0 such as 200000, 200k or 1.5M",
        "rate" => "a rate such as 60/min, 200k/min, 5/s or 1000/day, of a whole number above 0",
        "path" => "a path such as /health",
        "store" => "a store such as sqlite:forebay.db",
        "secret" => "env:NAME, file:path or credential:NAME",
        "listen" => "an IP address and a port such as 127.0.0.1:7070",
        "base_url" => "a base URL such as http://127.0.0.1:8000/v1",
        "name" => "a name of letters, digits, dots, dashes and underscores (at most 64)",
        "model" => "a model's name",
        "pattern" => "a model's name, or a pattern such as \"qwen*\"",
        "patterns" => "a list of models' names or patterns such as [\"qwen*\"]",
        "expression" => "a regular expression such as \"(?i)secret\"",
        "cidrs" => "a list of networks such as [10.0.0.0/8]",
        "headers" => "a mapping of header names to values",
        "plugins" => "a list of plugins (each begins with -)",
        _ => return None,
    })
}

/// Returns whether a value of the format may hold a secret, even by mistake.
pub(super) fn is_private(format: &str) -> bool {
    matches!(format, "secret" | "headers" | "base_url")
}

/// Returns what JSON Schema can say of the format.
pub(super) fn json_schema_pattern(format: &str) -> Option<&'static str> {
    Some(match format {
        "duration" => {
            "^([0-9]+ *(ns|us|ms|s|sec|seconds?|m|mins?|minutes?|h|hours?|hr|d|days?|w|weeks?) *)+$"
        }
        "size" => "^[0-9]+(\\.[0-9]+)? *([kKMGTP]i?[bB]?|[bB])$",
        "share" => "^[0-9]{1,3} *%$",
        "count" => "^[0-9]+(\\.[0-9]+)?[kMG]?$",
        "rate" => "^[0-9]+(\\.[0-9]+)?[kMG]? */ *(s|sec|second|m|min|minute|h|hour|d|day)$",
        "path" => "^/[!-~]*$",
        "store" => "^[a-z]+:.+$",
        "secret" => "^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|credential:[A-Za-z0-9_.@-]+)$",
        "listen" => "^([0-9]{1,3}(\\.[0-9]{1,3}){3}|\\[[0-9a-fA-F:.]+\\]):[0-9]{1,5}$",
        "base_url" => "^https?://[^\\s@?#]+$",
        "name" => "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        "model" | "pattern" | "patterns" => "^\\S(.*\\S)?$",
        "cidrs" => "^[0-9a-fA-F:.]+/[0-9]{1,3}$",
        _ => return None,
    })
}

/// Checks a text against a format; formats that are not about texts always fit.
///
/// # Errors
/// What is wrong, to be put behind `expected …`: `found …` or a hint.
pub(super) fn check(format: &str, text: &str) -> Result<(), String> {
    match format {
        "duration" => duration(text),
        "size" => size(text),
        "share" => share(text),
        "count" => text.parse::<Count>().map(drop).map_err(|_why| found(text)),
        "rate" => rate(text),
        "path" => path(text),
        "store" => store(text),
        "secret" => secret(text),
        "listen" => listen(text),
        "base_url" => base_url(text),
        "name" => name(text),
        "model" => model(text),
        "pattern" => pattern(text),
        "expression" => expression(text),
        _ => Ok(()),
    }
}

/// Checks one element of `trusted_proxies`.
pub(super) fn network(text: &str) -> Result<(), String> {
    match (text.parse::<IpNet>(), text.parse::<std::net::IpAddr>()) {
        (Ok(_), _) => Ok(()),
        (Err(_), Ok(address)) => {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            Err(format!(
                "found {} (a single address is written {address}/{bits})",
                shown(text)
            ))
        }
        (Err(_), Err(_)) => Err(found(text)),
    }
}

/// Checks the name of a request header that Forebay is to send.
pub(super) fn header_name(name: &str) -> Result<(), String> {
    // RFC 9110 §7.6.1, and what Forebay writes itself.
    const OWN: [&str; 13] = [
        "connection",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    let lower = name.to_ascii_lowercase();
    if OWN.contains(&lower.as_str()) {
        return Err(format!(
            "the header {lower} belongs to the connection and cannot be set"
        ));
    }
    match http::HeaderName::from_bytes(name.as_bytes()) {
        Ok(_) => Ok(()),
        Err(_) => {
            Err("expected a header name such as x-team (letters, digits and dashes)".to_owned())
        }
    }
}

/// Checks a header's value; returns the reference if it is one.
pub(super) fn header_value(text: &str) -> Result<Option<SecretRef>, String> {
    if ["env:", "file:", "credential:"]
        .iter()
        .any(|kind| text.starts_with(kind))
    {
        secret(text)?;
        return text.parse().map(Some);
    }
    if text.trim().is_empty() {
        return Err("found blank text".to_owned());
    }
    if text != text.trim() || !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return Err("found characters that no header can carry (it is not shown here)".to_owned());
    }
    Ok(None)
}

/// Checks a regular expression: one that is not too large compiled, and that
/// never finds an empty text.
fn expression(text: &str) -> Result<(), String> {
    /// The most memory of one expression, in bytes.
    const BYTES_MAX: usize = 1024 * 1024;
    let parsed = regex_syntax::parse(text).map_err(|why| {
        // Its first lines show the expression, the last says what is wrong.
        let told = why.to_string();
        let reason = told.lines().last().unwrap_or_default();
        format!("{} ({})", found(text), reason.trim_start_matches("error: "))
    })?;
    if parsed
        .properties()
        .minimum_len()
        .is_none_or(|least| least == 0)
    {
        return Err(format!("{} (it can match an empty text)", found(text)));
    }
    regex::RegexBuilder::new(text)
        .size_limit(BYTES_MAX)
        .build()
        .map(drop)
        .map_err(|_why| {
            format!(
                "{} (it is larger than {BYTES_MAX} bytes compiled)",
                found(text)
            )
        })
}

fn duration(text: &str) -> Result<(), String> {
    if is_number(text) {
        return Err(format!("{} (a unit is missing)", found(text)));
    }
    text.parse::<Time>().map(drop).map_err(|_why| found(text))
}

fn size(text: &str) -> Result<(), String> {
    if is_number(text) {
        return Err(format!("{} (a unit is missing)", found(text)));
    }
    text.parse::<Size>().map(drop).map_err(|_why| found(text))
}

fn share(text: &str) -> Result<(), String> {
    if is_number(text) {
        return Err(format!("{} (the % is missing)", found(text)));
    }
    text.parse::<Share>().map(drop).map_err(|_why| found(text))
}

fn rate(text: &str) -> Result<(), String> {
    if is_number(text) {
        return Err(format!(
            "{} (the time is missing, such as /min)",
            found(text)
        ));
    }
    text.parse::<Rate>().map(drop).map_err(|_why| found(text))
}

/// Which stores there are, only the floors above know.
fn store(text: &str) -> Result<(), String> {
    match text.split_once(':') {
        Some((scheme, rest)) if !scheme.is_empty() && !rest.trim().is_empty() => Ok(()),
        // Of other kinds it may hold a password.
        _ => Err("found other text".to_owned()),
    }
}

fn path(text: &str) -> Result<(), String> {
    let fits = text.starts_with('/') && text.len() <= 1024;
    if fits && text.bytes().all(|b| (0x21..0x7f).contains(&b) && b != b'#') {
        return Ok(());
    }
    Err(found(text))
}

fn secret(text: &str) -> Result<(), String> {
    if text.starts_with('$') {
        return Err("found a variable written with $: write env:NAME".to_owned());
    }
    match text.parse() {
        Ok(SecretRef::Env(name)) if !is_variable(&name) => {
            Err("found env: with what is no variable's name (it is not shown here)".to_owned())
        }
        Ok(SecretRef::File(path)) if path.trim().is_empty() || path.contains('\0') => {
            Err("found file: without a path".to_owned())
        }
        Ok(SecretRef::Credential(name)) if !is_credential(&name) => Err(
            "found credential: with what is no credential's name (it is not shown here)".to_owned(),
        ),
        Ok(_) => Ok(()),
        Err(_) if text.trim().is_empty() => Err("found blank text".to_owned()),
        Err(_) => Err(
            "found something else (it is not shown here): a secret is never written into this file"
                .to_owned(),
        ),
    }
}

/// systemd takes any file name; no file of another folder may be named.
fn is_credential(name: &str) -> bool {
    name.bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_.@-".contains(&b))
        && !name.starts_with('.')
}

fn is_variable(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn listen(text: &str) -> Result<(), String> {
    if listen_address(text).is_some() {
        return Ok(());
    }
    let hint = match text.rsplit_once(':') {
        Some(("", port)) => format!(" (write 0.0.0.0:{port} for every address)"),
        Some(("localhost", port)) => format!(" (write 127.0.0.1:{port}: names are not looked up)"),
        Some(("*", port)) => format!(" (write 0.0.0.0:{port})"),
        None if text.parse::<std::net::IpAddr>().is_ok() => " (the port is missing)".to_owned(),
        _ => String::new(),
    };
    Err(format!("{}{hint}", found(text)))
}

fn base_url(text: &str) -> Result<(), String> {
    if text.trim().is_empty() {
        return Err("found blank text".to_owned());
    }
    if text.contains(char::is_whitespace) {
        return Err("found white space in it".to_owned());
    }
    let lower = text.to_ascii_lowercase();
    let Some((scheme, rest)) = lower.split_once("://") else {
        return Err("found no http:// or https:// at its beginning".to_owned());
    };
    if scheme != "http" && scheme != "https" {
        return Err("found a scheme other than http and https".to_owned());
    }
    if rest
        .split(['/', '?', '#'])
        .next()
        .is_some_and(|authority| authority.contains('@'))
    {
        return Err("found a user or password in it: use key or headers instead".to_owned());
    }
    let url = match Url::parse(text) {
        Ok(url) if url.has_host() => url,
        Ok(_) => return Err("found no host in it".to_owned()),
        Err(why) => return Err(format!("found a mistake in it: {why}")),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err("found a user or password in it: use key or headers instead".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(
            "found a query (?) or fragment (#) in it: Forebay appends paths to it".to_owned(),
        );
    }
    if url.port() == Some(0) {
        return Err("found port 0".to_owned());
    }
    const ENDS: [&str; 4] = [
        "/chat/completions",
        "/completions",
        "/embeddings",
        "/responses",
    ];
    let path = url.path().trim_end_matches('/');
    if let Some(end) = ENDS.iter().find(|end| path.ends_with(**end)) {
        return Err(format!(
            "found {end} at its end: Forebay appends that itself"
        ));
    }
    Ok(())
}

fn name(text: &str) -> Result<(), String> {
    let fits = text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    if fits { Ok(()) } else { Err(found(text)) }
}

fn model(text: &str) -> Result<(), String> {
    pattern(text)?;
    if text.contains('*') {
        return Err(format!("{} (a * means nothing here)", found(text)));
    }
    Ok(())
}

fn pattern(text: &str) -> Result<(), String> {
    let fits = !text.is_empty()
        && text.len() <= 256
        && text.trim() == text
        && !text.contains(char::is_control);
    if fits { Ok(()) } else { Err(found(text)) }
}

fn found(text: &str) -> String {
    if text.trim().is_empty() {
        "found blank text".to_owned()
    } else {
        format!("found {}", shown(text))
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_takes_what_it_shows_as_an_example() {
        for (format, fits, fails) in [
            (
                "duration",
                vec!["250ms", "30s", "10m", "1h30m"],
                vec!["30", "", "soon", "-1s", "5 parsecs"],
            ),
            (
                "size",
                vec!["64KiB", "32MiB", "10MB", "512B", "1.5GiB"],
                vec!["64", "", "big", "-1KiB"],
            ),
            (
                "share",
                vec!["0%", "20%", "100%"],
                vec!["20", "", "101%", "much", "-1%", "0.2"],
            ),
            (
                "path",
                vec!["/health", "/", "/a/b?c=d"],
                vec!["", "health", "/a b", "/a#b", "http://h/"],
            ),
            (
                "secret",
                vec!["env:KEY", "file:/run/key", "credential:secrets_openai"],
                vec![
                    "",
                    "sk-1",
                    "env:",
                    "env:a-b",
                    "${KEY}",
                    "file: ",
                    "credential:",
                    "credential:../key",
                    "credential:..",
                ],
            ),
            (
                "listen",
                vec!["127.0.0.1:7070", "[::1]:1", "0.0.0.0:80"],
                vec!["", "localhost:1", ":80", "1.2.3.4", "1.2.3.4:99999"],
            ),
            (
                "base_url",
                vec![
                    "http://127.0.0.1:8000/v1",
                    "https://api.cloudflare.com/client/v4/accounts/ID/ai/v1",
                    "http://[::1]:1",
                ],
                vec![
                    "",
                    " ",
                    "127.0.0.1:8000",
                    "ftp://h/",
                    "http://u:p@h/v1",
                    "http://u@h",
                    "http://h/v1?a=b",
                    "http://h/#x",
                    "http://",
                    "http:// h",
                    "http://h/v1/chat/completions",
                    "http://h:0/",
                ],
            ),
            (
                "name",
                vec!["gpu-1", "a", "7b.q4_k"],
                vec!["", " ", "-a", "a b", "a/b", "é"],
            ),
            (
                "model",
                vec!["gpt-4o", "qwen2.5:7b", "@cf/meta/llama"],
                vec!["", " a", "q*", "a\nb"],
            ),
            ("pattern", vec!["*", "qwen*", "a*b"], vec!["", " ", "a\tb"]),
            (
                "expression",
                vec!["secret", "(?i)a+b", r"\bass\b"],
                vec![
                    "",
                    "(",
                    "a*",
                    r"\b",
                    "(?:a{1000}){1000}",
                    "(a)\\1",
                    "(?=a)b",
                ],
            ),
        ] {
            for text in fits {
                assert_eq!(check(format, text), Ok(()), "{format} {text:?}");
            }
            for text in fails {
                assert!(check(format, text).is_err(), "{format} {text:?}");
            }
            assert!(expected(format).is_some(), "{format}");
        }
    }

    #[test]
    fn a_reason_never_repeats_what_may_be_secret() {
        for (format, text) in [
            ("secret", "s3cret"),
            ("secret", "env:s3cret-x"),
            ("secret", "$s3cret"),
            ("base_url", "http://me:s3cret@host/"),
            ("base_url", "s3cret"),
            ("base_url", "s3cret://host"),
            ("base_url", "http://host/?key=s3cret"),
            ("base_url", "http://s3cret host"),
        ] {
            assert!(is_private(format));
            let reason = check(format, text).unwrap_err();
            assert!(!reason.contains("s3cret"), "{reason}");
        }
        for text in ["s3cret\u{7f}", " s3cret", "env:s3cret-x"] {
            assert!(!header_value(text).unwrap_err().contains("s3cret"));
        }
    }

    #[test]
    fn headers_of_the_connection_are_refused() {
        for name in [
            "Host",
            "content-length",
            "Connection",
            "TE",
            "Transfer-Encoding",
            "a b",
            "",
        ] {
            assert!(header_name(name).is_err(), "{name:?}");
        }
        for name in ["x-team", "OpenAI-Organization", "api-key"] {
            assert_eq!(header_name(name), Ok(()));
        }
        assert_eq!(header_value("abc def"), Ok(None));
        assert!(header_value("env:KEY").unwrap().is_some());
    }

    #[test]
    fn a_network_needs_its_length() {
        assert_eq!(network("10.0.0.0/8"), Ok(()));
        assert_eq!(network("::1/128"), Ok(()));
        assert!(network("10.0.0.1").unwrap_err().contains("10.0.0.1/32"));
        assert!(network("10.0.0.0/33").is_err());
    }
}
