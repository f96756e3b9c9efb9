//! Answers that Forebay writes itself: errors and local responses, in one place.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use pingora::proxy::Session;
use tokio::time::timeout;

use super::{body, client::to_wire};
use crate::{
    error::Error,
    plugins::{LocalResponse, ResponseHead},
};

/// Returns the fields that every answer has.
pub(super) fn common_headers(id: &str) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(8);
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert("x-request-id", id);
    }
    headers
}

/// Returns the fields of an answer that an upstream gave.
pub(super) fn answer_headers(
    id: &str,
    upstream: &str,
    group: &str,
    attempts: usize,
    fallback: bool,
) -> HeaderMap {
    let mut headers = common_headers(id);
    // Names are checked when the configuration is loaded.
    for (name, value) in [
        ("x-forebay-upstream", upstream),
        ("x-forebay-group", group),
        ("x-forebay-fallback", if fallback { "1" } else { "0" }),
    ] {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    headers.insert("x-forebay-attempts", HeaderValue::from(attempts));
    headers
}

/// Sends an error in OpenAI's shape. Returns the bytes of its body, or `None`
/// if the client did not take it.
pub(super) async fn send_error(
    session: &mut Session,
    id: &str,
    error: &Error,
    extra: HeaderMap,
) -> Option<usize> {
    let mut headers = common_headers(id);
    headers.extend(extra);
    if let Some(wait) = error.retry_after {
        // Whole seconds (RFC 9110 §10.2.3), never 0: that would say "now".
        let secs = wait.as_secs_f64().ceil().max(1.0);
        if let Ok(value) = HeaderValue::from_str(&format!("{secs:.0}")) {
            headers.insert(header::RETRY_AFTER, value);
        }
    }
    if let Some(allow) = error.allow {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if error.status == StatusCode::UNAUTHORIZED {
        headers.insert(
            header::WWW_AUTHENTICATE,
            HeaderValue::from_static("Bearer realm=\"forebay\""),
        );
    }
    let response = LocalResponse {
        status: error.status,
        headers,
        content_type: "application/json",
        body: error.to_json().into(),
    };
    send(session, response, error.close).await
}

/// Sends an answer made here. What is left of the request's body is read within
/// bounds, and the connection then closed. Returns the bytes of the body, or
/// `None` if the client did not take it.
pub(super) async fn send(
    session: &mut Session,
    response: LocalResponse,
    close: bool,
) -> Option<usize> {
    let unread = !session.is_body_done();
    if close || unread {
        session.set_keepalive(None);
    }
    let mut head = ResponseHead {
        status: response.status,
        headers: response.headers,
    };
    head.headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static(response.content_type),
    );
    let length = response.body.len();
    let wire = to_wire(session.req_header().version, head, Some(length));
    let most = session.get_write_timeout().unwrap_or(Duration::MAX);
    let sent = async {
        session.write_response_header(Box::new(wire), false).await?;
        session.write_response_body(Some(response.body), true).await
    };
    // Pingora bounds its writes, but not the flush that ends them.
    match timeout(most, sent).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => {
            log::debug!("client did not take its answer: {}", why.etype().as_str());
            return None;
        }
        Err(_elapsed) => {
            log::debug!("client did not take its answer in time");
            return None;
        }
    }
    if unread {
        body::drain(session).await;
    }
    Some(length)
}
