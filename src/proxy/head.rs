//! What a request's header must be before anybody looks at what it asks for.
//!
//! Pingora has parsed it: broken framing never gets here (see `unreadable`).
//! Here are the rules it leaves to us: sizes, `Host`, the
//! form of the target.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use pingora::http::RequestHeader;

use crate::{
    config::Limits,
    error::{Error, Result},
};

/// The longest request id that is taken over from a client.
const REQUEST_ID_MAX: usize = 128;

/// Checks a header against the limits and the rules of HTTP that Pingora does
/// not enforce.
///
/// # Errors
/// 405 for `CONNECT`, 431, 414 or 400, each closing the connection: a client that sends such a
/// header is broken or hostile.
pub(super) fn check(request: &RequestHeader, limits: &Limits) -> Result<()> {
    // Its target is no path, and what follows it may not be HTTP.
    if request.method == Method::CONNECT {
        return Err(Error::method_not_allowed("GET, HEAD, POST").closing());
    }
    let target = request.raw_path();
    if target.len() > limits.uri.get() {
        return Err(Error::refused(
            StatusCode::URI_TOO_LONG,
            "uri_too_long",
            format!("the request target is longer than {}", limits.uri),
        )
        .closing());
    }
    let fields = request.headers.len();
    // A field costs its name, its value, ": " and the line's end.
    let bytes: usize = request
        .headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    if fields > limits.header_fields || bytes > limits.header.get() {
        return Err(Error::refused(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "header_too_large",
            format!(
                "the request header is larger than {} or has more than {} fields",
                limits.header, limits.header_fields
            ),
        )
        .closing());
    }
    check_host(request)?;
    check_coding(&request.headers)?;
    if request.headers.contains_key(header::CONTENT_ENCODING)
        && request.headers.get(header::CONTENT_ENCODING)
            != Some(&HeaderValue::from_static("identity"))
    {
        return Err(Error::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_encoding",
            "an encoded request body is not supported: send it without content-encoding",
        )
        .closing());
    }
    Ok(())
}

/// Checks the request line as it came: a fragment, which no client sends, is
/// lost where the target is parsed, and would make another path of it.
///
/// # Errors
/// 400.
pub(super) fn check_line(head: &[u8]) -> Result<()> {
    let line = head
        .split(|byte| *byte == b'\n')
        .find(|line| line.len() > 1);
    if line.is_some_and(|line| line.contains(&b'#')) {
        let message = "the request target has a fragment";
        return Err(Error::invalid("invalid_target", message).closing());
    }
    Ok(())
}

/// Checks that a body is not coded in ways that only some readers know: Pingora
/// looks at the last coding alone, and would hand on what is below it.
fn check_coding(headers: &HeaderMap) -> Result<()> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let is_known = codings.next().is_none_or(|coding| {
        let coding = coding.as_bytes().trim_ascii();
        coding.eq_ignore_ascii_case(b"chunked")
    });
    if is_known && codings.next().is_none() {
        return Ok(());
    }
    let message = "the only transfer coding of a body is chunked, once";
    Err(Error::invalid("malformed_request", message).closing())
}

/// Checks that there is exactly one host, and that the target is a path.
///
/// RFC 9112 §3.2: a server answers 400 to an HTTP/1.1 request without `Host`,
/// or with more than one. A target in absolute form (§3.2.2) is for forward
/// proxies, which Forebay is not.
fn check_host(request: &RequestHeader) -> Result<()> {
    let bad = |code, message| Err(Error::invalid(code, message).closing());
    let mut hosts = request.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return bad("invalid_host", "the request has more than one Host");
    }
    let authority = request.uri.authority().map(http::uri::Authority::as_str);
    if request.version == Version::HTTP_2 {
        let named = authority.or_else(|| host.and_then(|host| host.to_str().ok()));
        if named.is_none_or(|name| !is_host(name)) {
            return bad("invalid_host", "the request has no valid :authority");
        }
        if let (Some(authority), Some(host)) = (authority, host)
            && !authority.as_bytes().eq_ignore_ascii_case(host.as_bytes())
        {
            return bad("invalid_host", "Host and :authority differ");
        }
        return Ok(());
    }
    if !request.raw_path().starts_with(b"/") {
        return bad("invalid_target", "the request target is not a path");
    }
    match host.map(HeaderValue::to_str) {
        Some(Ok(host)) if is_host(host) => Ok(()),
        Some(_) => bad("invalid_host", "the Host of the request is not valid"),
        // RFC 9112 §3.2 asks it of HTTP/1.1 only; probes speak HTTP/1.0.
        None if request.version == Version::HTTP_10 => Ok(()),
        None => bad("missing_host", "the request has no Host"),
    }
}

/// Returns whether the text can be a host with a port: RFC 3986 §3.2.2.
fn is_host(text: &str) -> bool {
    if text.is_empty() || text.contains('@') {
        return false;
    }
    // The parser takes anything for a port.
    text.parse::<http::uri::Authority>().is_ok_and(|authority| {
        authority.host().len() == text.len() || authority.port_u16().is_some()
    })
}

/// Takes over the client's request id if it is harmless in a header and a log
/// line, or makes one.
pub(super) fn request_id(headers: &HeaderMap) -> Arc<str> {
    let sane = |id: &&str| {
        !id.is_empty()
            && id.len() <= REQUEST_ID_MAX
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    headers
        .get("x-request-id")
        .and_then(|id| id.to_str().ok())
        .filter(sane)
        .map_or_else(
            || Arc::from(format!("req_{:032x}", rand::random::<u128>())),
            Arc::from,
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: Version, target: &str, fields: &[(&str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build("GET", target.as_bytes(), None).unwrap();
        request.set_version(version);
        for (name, value) in fields {
            request.append_header((*name).to_owned(), *value).unwrap();
        }
        request
    }

    fn status(request: &RequestHeader) -> Option<u16> {
        check(request, &Limits::default())
            .err()
            .map(|error| error.status.as_u16())
    }

    #[test]
    fn an_ordinary_request_passes() {
        let request = request(Version::HTTP_11, "/v1/models?x=1", &[("host", "a:7070")]);
        assert_eq!(status(&request), None);
    }

    #[test]
    fn chunked_is_the_only_coding_and_once() {
        let of = |codings: &[&str]| {
            let codings = codings.iter().map(|coding| ("transfer-encoding", *coding));
            let fields: Vec<_> = codings.chain([("host", "a")]).collect();
            status(&request(Version::HTTP_11, "/", &fields))
        };
        for known in [&[][..], &["chunked"], &["Chunked "]] {
            assert_eq!(of(known), None, "{known:?}");
        }
        for other in [
            &["gzip, chunked"][..],
            &["identity, chunked"],
            &["chunked, chunked"],
            &[",chunked"],
            &["gzip", "chunked"],
            &["chunked", "chunked"],
        ] {
            assert_eq!(of(other), Some(400), "{other:?}");
        }
    }

    #[test]
    fn exactly_one_valid_host_is_needed() {
        let of = |fields: &[(&str, &str)]| status(&request(Version::HTTP_11, "/", fields));
        assert_eq!(of(&[]), Some(400));
        assert_eq!(of(&[("host", "")]), Some(400));
        assert_eq!(of(&[("host", "a"), ("host", "a")]), Some(400));
        assert_eq!(of(&[("host", "a b")]), Some(400));
        assert_eq!(of(&[("host", "u@a")]), Some(400));
        assert_eq!(of(&[("host", "a:b")]), Some(400));
        assert_eq!(of(&[("host", "[::1]:7070")]), None);
        assert_eq!(status(&request(Version::HTTP_10, "/", &[])), None);
    }

    #[test]
    fn a_target_has_no_fragment() {
        assert!(check_line(b"GET /v1/models HTTP/1.1\r\nx: #\r\n\r\n").is_ok());
        assert!(check_line(b"\r\n\nGET /v1/models#a HTTP/1.1\r\n\r\n").is_err());
    }

    #[test]
    fn sizes_are_bounded() {
        let long = format!("/{}", "a".repeat(9000));
        assert_eq!(
            status(&request(Version::HTTP_11, &long, &[("host", "a")])),
            Some(414)
        );
        let value = "v".repeat(33_000);
        let fields = [("host", "a"), ("x-long", &*value)];
        assert_eq!(status(&request(Version::HTTP_11, "/", &fields)), Some(431));
        let many = vec![("x-many", "1"); 101];
        assert_eq!(status(&request(Version::HTTP_11, "/", &many)), Some(431));
    }

    #[test]
    fn only_a_harmless_request_id_is_taken_over() {
        let id = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-request-id", HeaderValue::from_str(text).unwrap());
            request_id(&headers)
        };
        assert_eq!(&*id("abc-1.2:3_4"), "abc-1.2:3_4");
        assert!(id("a b").starts_with("req_"));
        assert!(id(&"a".repeat(129)).starts_with("req_"));
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
