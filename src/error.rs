//! What went wrong, told twice: to the client as an OpenAI error, to the log
//! with its cause.
//!
//! **Invariant:** nothing that a client is told holds an address, a key, or a
//! word that an upstream sent about itself: the message of an [`Error`] is
//! written here or by the caller from what the *client* sent.

use std::{borrow::Cow, fmt, time::Duration};

use http::StatusCode;
use serde::Serialize;

/// The result of what can fail with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An answer that tells a client what went wrong.
#[derive(Debug)]
pub struct Error {
    /// The HTTP status.
    pub status: StatusCode,
    /// OpenAI's `type`, such as `invalid_request_error`.
    pub kind: &'static str,
    /// OpenAI's `code`: a string for programs, or null.
    pub code: Option<Cow<'static, str>>,
    /// One sentence for people.
    pub message: Cow<'static, str>,
    /// The field of the request that is at fault.
    pub param: Option<Cow<'static, str>>,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// The methods that there are, of a 405.
    pub allow: Option<&'static str>,
    /// Whether the connection must not be used again.
    pub close: bool,
    /// The cause, for the log alone.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Makes an error of the given status; the others add what they know.
    pub fn new(
        status: StatusCode,
        kind: &'static str,
        code: &'static str,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            status,
            kind,
            code: Some(Cow::Borrowed(code)),
            message: message.into(),
            param: None,
            retry_after: None,
            allow: None,
            close: false,
            source: None,
        }
    }

    /// 400: the request is at fault.
    pub fn invalid(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            code,
            message,
        )
    }

    /// A 4xx that is about the form of the request, not its sense.
    pub fn refused(
        status: StatusCode,
        code: &'static str,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    /// 405: the path is known, but not with this method; `allow` are those it is
    /// known with.
    pub fn method_not_allowed(allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this URL is not there for this method: see GET / for what is here",
            )
        }
    }

    /// Names the field at fault.
    #[must_use]
    pub fn param(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Marks the connection as not to be used again.
    #[must_use]
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// Adds the cause, for the log.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Returns the body in OpenAI's shape:
    /// `{"error":{"message","type","param","code"}}`.
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct Body<'a> {
            error: Detail<'a>,
        }
        #[derive(Serialize)]
        struct Detail<'a> {
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: Option<&'a str>,
        }
        let body = Body {
            error: Detail {
                message: &self.message,
                r#type: self.kind,
                param: self.param.as_deref(),
                code: self.code.as_deref(),
            },
        };
        serde_json::to_string(&body).expect("four strings are always JSON")
    }
}

impl fmt::Display for Error {
    /// What the log is told.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status.as_u16(), self.message)?;
        if let Some(code) = &self.code {
            write!(f, " code={code}")?;
        }
        if let Some(source) = &self.source {
            write!(f, " cause={source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}
