//! What an upstream's answer means for the exchange: the table of the issue
//! "what happened → what Forebay does", as code, in one place.

use std::time::Duration;

use http::StatusCode;

use crate::{
    context::Verdict, dialects::Unsupported, error::Error, openai::UpstreamError,
    upstreams::health::COOL_MAX,
};

/// When to try again where there was no socket left: connections end all the
/// time, and those that are idle within `limits.keep_alive`.
const SOCKET_RETRY_AFTER: Duration = Duration::from_secs(2);

/// A try that did not answer the client, and why.
#[derive(Debug)]
pub(super) struct Failure {
    /// How it went.
    pub(super) verdict: Verdict,
    /// The upstream's status, if an answer came.
    pub(super) status: Option<StatusCode>,
    /// How long the upstream wants to be left alone.
    pub(super) retry_after: Option<Duration>,
    /// What its dialect has no words for; it was not asked then.
    pub(super) unsupported: Option<Unsupported>,
    /// What there is to know beyond its status.
    pub(super) hint: Option<Hint>,
    /// What happened, for the log alone.
    pub(super) cause: String,
}

/// What there is to know beyond a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hint {
    /// The account is out of money, or of its quota for long.
    Quota,
    /// The model is being loaded.
    Loading,
    /// Nothing comes any more, and its checks say that it is down.
    Frozen,
    /// It is the credential that is no good.
    Key,
    /// It may be the request: the credential has just worked for others.
    Request,
}

impl Failure {
    /// Makes a failure without an answer.
    pub(super) fn new(verdict: Verdict, cause: impl Into<String>) -> Self {
        Self {
            verdict,
            status: None,
            retry_after: None,
            unsupported: None,
            hint: None,
            cause: cause.into(),
        }
    }

    /// Makes the failure of an upstream that cannot be told the request.
    pub(super) fn unsupported(why: Unsupported) -> Self {
        Self {
            unsupported: Some(why),
            ..Self::new(Verdict::NoModel, "its dialect has no words for the request")
        }
    }

    /// Returns whether there is no money, or no quota, behind the credential.
    pub(super) fn is_quota(&self) -> bool {
        // Without a status it was an error under 200, which speaks of quotas only.
        let says = matches!(self.status, None | Some(StatusCode::PAYMENT_REQUIRED));
        self.verdict == Verdict::Credential && (says || self.hint == Some(Hint::Quota))
    }

    /// Returns what the client is told of if this one followed another: mostly
    /// the last word. But of several that are only to be left alone for a while
    /// the shortest while counts, and one that has not our key, or not our
    /// money, says nothing of them.
    pub(super) fn after(mut self, earlier: Option<Self>) -> Self {
        match earlier {
            Some(earlier) if earlier.verdict == Verdict::Rejected => match self.verdict {
                Verdict::Credential => earlier,
                Verdict::Rejected if self.status == earlier.status => {
                    let both = [self.retry_after, earlier.retry_after];
                    self.retry_after = both.into_iter().flatten().min();
                    self
                }
                _ => self,
            },
            _ => self,
        }
    }

    /// Returns whether the upstream may have done the work, so that a further
    /// try may be paid twice.
    pub(super) const fn is_ambiguous(&self) -> bool {
        matches!(self.verdict, Verdict::Failed | Verdict::TimedOut)
    }
}

/// What an upstream's error status asks for.
pub(super) enum Judgement {
    /// Try elsewhere.
    Failed(Failure),
    /// It is the caller's fault: passed on once, in our own shape.
    PassOn(Error),
}

/// Judges an answer that is not a success.
pub(super) fn judge(
    status: StatusCode,
    error: UpstreamError,
    retry_after: Option<Duration>,
) -> Judgement {
    let verdict = match status.as_u16() {
        code if error.hard_quota(code) => Verdict::Credential,
        400 | 409 | 413 | 422 => return Judgement::PassOn(error.into_client_error(status)),
        429 | 503 | 529 => Verdict::Rejected,
        403 if error.is_about_content() => return Judgement::PassOn(unwanted(error)),
        403 if error.is_about_model() => Verdict::NoModel,
        // 407 is about a proxy of ours, not of the caller's.
        401..=403 | 407 => Verdict::Credential,
        404 | 501 => Verdict::NoModel,
        // 421, 425 and 426 are about our connection to the upstream, and so is
        // 499: it says that we have left.
        408 | 421 | 425 | 426 | 499 | 300..=399 | 500.. => Verdict::Failed,
        _ => return Judgement::PassOn(error.into_client_error(status)),
    };
    let hint = match verdict {
        Verdict::Credential if error.hard_quota(status.as_u16()) => Some(Hint::Quota),
        Verdict::Credential if error.is_about_key() => Some(Hint::Key),
        Verdict::Rejected if error.model_is_loading() => Some(Hint::Loading),
        _ => None,
    };
    Judgement::Failed(Failure {
        verdict,
        status: Some(status),
        retry_after,
        unsupported: None,
        hint,
        cause: format!("status {}", status.as_u16()),
    })
}

/// What a request says is refused. Not with 403, which speaks of the caller's
/// rights.
fn unwanted(error: UpstreamError) -> Error {
    let mut error = error.into_client_error(StatusCode::BAD_REQUEST);
    let is_word = |code: &str| code.bytes().any(|byte| byte.is_ascii_alphabetic());
    if !error.code.as_deref().is_some_and(is_word) {
        error.code = Some("content_policy_violation".into());
    }
    error
}

/// What the client is told when every try is used up. `last_answer` is the last
/// failure that was an answer, or a silence, of an upstream that was reached.
pub(super) fn give_up(last_answer: Option<&Failure>, wait: Duration, model: &str) -> Error {
    let asked = last_answer.and_then(|last| last.retry_after);
    let wait = asked.unwrap_or(wait).min(COOL_MAX);
    let bad_gateway =
        |code, message| Error::new(StatusCode::BAD_GATEWAY, "server_error", code, message);
    let Some(last) = last_answer else {
        return Error::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            "upstream_unavailable",
            "no model server can be reached at the moment",
        )
        .retry_after(wait);
    };
    if let Some(unsupported) = &last.unsupported {
        return unsupported.to_error();
    }
    match (last.verdict, last.status.map(|status| status.as_u16())) {
        (Verdict::Rejected, Some(429)) => Error::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            "rate_limit_exceeded",
            "every model server that could answer is at its rate limit",
        )
        .retry_after(wait),
        (Verdict::Rejected, _) => {
            let error = bad_gateway(
                "upstream_overloaded",
                "every model server that could answer is overloaded",
            );
            error.retry_after(wait)
        }
        (Verdict::Credential, _) if last.is_quota() => Error::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            "upstream_quota",
            "the gateway's own accounts at the model servers are out of quota",
        )
        .retry_after(wait),
        (Verdict::Credential, _) if last.hint == Some(Hint::Request) => Error::refused(
            StatusCode::FORBIDDEN,
            "request_forbidden",
            "the model server refused this request without saying why",
        ),
        (Verdict::Credential, _) => bad_gateway(
            "upstream_auth",
            "the gateway's own credential was not accepted by the model server",
        ),
        (Verdict::NoModel, Some(501)) => Error::new(
            StatusCode::NOT_IMPLEMENTED,
            "invalid_request_error",
            "unsupported_by_upstream",
            "the model server does not support this call",
        ),
        (Verdict::NoModel, _) => model_not_found(model),
        (Verdict::TimedOut, _) => Error::new(
            StatusCode::GATEWAY_TIMEOUT,
            "server_error",
            "upstream_timeout",
            "the model server did not answer in time",
        ),
        _ => bad_gateway("upstream_error", "the model server failed"),
    }
}

/// 502: model servers are there, but there is no TLS with them: a certificate, or
/// what we think of it, is to be mended by people.
pub(super) fn no_tls() -> Error {
    Error::new(
        StatusCode::BAD_GATEWAY,
        "server_error",
        "upstream_tls",
        "no secure connection to a model server can be made",
    )
}

/// 503: there was no socket to ask anybody with.
pub(super) fn no_socket() -> Error {
    Error::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "server_error",
        "gateway_overloaded",
        "the gateway has no connections left to ask a model server with",
    )
    .retry_after(SOCKET_RETRY_AFTER)
}

/// 404: nobody serves the model.
pub(super) fn model_not_found(model: &str) -> Error {
    // The name is the client's own word: printable (the request was checked)
    // and of bounded length.
    Error::refused(
        StatusCode::NOT_FOUND,
        "model_not_found",
        format!("the model `{model}` does not exist or is not available to you"),
    )
    .param("model")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: u16, body: &[u8]) -> Judgement {
        let status = StatusCode::from_u16(status).unwrap();
        judge(status, UpstreamError::read(body), None)
    }

    #[test]
    fn each_status_is_judged_as_the_table_says() {
        for (status, verdict) in [
            (429, Verdict::Rejected),
            (503, Verdict::Rejected),
            (529, Verdict::Rejected),
            (401, Verdict::Credential),
            (402, Verdict::Credential),
            (403, Verdict::Credential),
            (404, Verdict::NoModel),
            (501, Verdict::NoModel),
            (408, Verdict::Failed),
            (499, Verdict::Failed),
            (302, Verdict::Failed),
            (500, Verdict::Failed),
            (502, Verdict::Failed),
            (504, Verdict::Failed),
            (999, Verdict::Failed),
        ] {
            match judged(status, b"{}") {
                Judgement::Failed(failure) => assert_eq!(failure.verdict, verdict, "{status}"),
                Judgement::PassOn(error) => panic!("{status} passed on: {error}"),
            }
        }
        for status in [400, 409, 413, 422] {
            match judged(status, b"{}") {
                Judgement::PassOn(error) => assert_eq!(error.status.as_u16(), status),
                Judgement::Failed(failure) => panic!("{status} not passed on: {failure:?}"),
            }
        }
    }

    #[test]
    fn an_exhausted_quota_is_a_bad_credential_whatever_the_status() {
        let body = br#"{"error":{"code":"insufficient_quota","message":"x","type":"y"}}"#;
        for status in [400, 429] {
            assert!(matches!(
                judged(status, body),
                Judgement::Failed(Failure {
                    verdict: Verdict::Credential,
                    ..
                })
            ));
        }
    }

    #[test]
    fn a_403_is_about_the_key_the_model_or_what_the_request_says() {
        let judged = |body: &str| judged(403, body.as_bytes());
        for body in [
            r#"{"error":{"code":403,"message":"Your chosen model requires moderation and your input was flagged for \"x\"","metadata":{"reasons":["x"]}}}"#,
            r#"{"error":{"code":"content_policy_violation","message":"no","type":"invalid_request_error"}}"#,
        ] {
            let Judgement::PassOn(error) = judged(body) else {
                panic!("{body}");
            };
            let code = error.code.as_deref();
            assert_eq!(
                (error.status.as_u16(), code),
                (400, Some("content_policy_violation"))
            );
        }
        let none = r#"{"error":{"code":"model_not_found","message":"Project `p` does not have access to model `m`","type":"invalid_request_error"}}"#;
        for (body, verdict, hint) in [
            (none, Verdict::NoModel, None),
            (
                r#"{"error":"Invalid API key"}"#,
                Verdict::Credential,
                Some(Hint::Key),
            ),
            (r#"{"error":"no"}"#, Verdict::Credential, None),
            ("", Verdict::Credential, None),
        ] {
            match judged(body) {
                Judgement::Failed(failure) => {
                    assert_eq!((failure.verdict, failure.hint), (verdict, hint), "{body}");
                }
                Judgement::PassOn(error) => panic!("{body}: {error}"),
            }
        }
    }

    #[test]
    fn of_several_that_ask_for_a_pause_the_shortest_is_told() {
        let rejected = |secs: u64| Failure {
            status: Some(StatusCode::TOO_MANY_REQUESTS),
            retry_after: Some(Duration::from_secs(secs)),
            ..Failure::new(Verdict::Rejected, "")
        };
        let wait = |failure: Failure| failure.retry_after.unwrap().as_secs();
        assert_eq!(wait(rejected(60).after(Some(rejected(7)))), 7);
        assert_eq!(wait(rejected(7).after(Some(rejected(60)))), 7);
        let no_money = Failure {
            hint: Some(Hint::Quota),
            ..Failure::new(Verdict::Credential, "")
        };
        assert_eq!(wait(no_money.after(Some(rejected(7)))), 7);
        let failed = Failure::new(Verdict::Failed, "").after(Some(rejected(7)));
        assert_eq!(failed.verdict, Verdict::Failed);
    }

    #[test]
    fn what_nobody_could_be_told_is_the_callers_to_change() {
        let failure = Failure::unsupported(Unsupported::param("n", "one answer only"));
        assert!(!failure.is_ambiguous());
        let error = give_up(Some(&failure), Duration::from_secs(1), "m");
        assert_eq!(
            (error.status.as_u16(), error.param.as_deref()),
            (400, Some("n"))
        );
        let failure = Failure::unsupported(Unsupported::call());
        let error = give_up(Some(&failure), Duration::from_secs(1), "m");
        assert_eq!(error.status.as_u16(), 501);
    }

    #[test]
    fn a_bad_request_that_repeats_the_clients_words_is_passed_on() {
        let body =
            br#"{"error":{"message":"got 'apples per day'","type":"Bad Request","code":400}}"#;
        assert!(matches!(judged(400, body), Judgement::PassOn(_)));
        assert!(matches!(judged(429, body), Judgement::Failed(_)));
        for status in [404, 500] {
            let Judgement::Failed(failure) = judged(status, body) else {
                panic!("{status}");
            };
            assert_ne!(failure.verdict, Verdict::Credential, "{status}");
        }
    }

    #[test]
    fn what_the_client_is_told_depends_on_the_last_answer() {
        let told = |verdict, status: Option<u16>| {
            let mut failure = Failure::new(verdict, "");
            failure.status = status.map(|status| StatusCode::from_u16(status).unwrap());
            give_up(Some(&failure), Duration::from_secs(1), "m")
                .status
                .as_u16()
        };
        assert_eq!(told(Verdict::Rejected, Some(429)), 429);
        assert_eq!(told(Verdict::Rejected, Some(503)), 502);
        assert_eq!(told(Verdict::Credential, Some(401)), 502);
        assert_eq!(told(Verdict::NoModel, Some(404)), 404);
        assert_eq!(told(Verdict::TimedOut, None), 504);
        assert_eq!(told(Verdict::Failed, Some(500)), 502);
        let unreachable = give_up(None, Duration::from_secs(1), "m");
        assert_eq!(unreachable.status.as_u16(), 503);
        assert!(unreachable.retry_after.is_some());
    }
}
