//! The allowlist: every method and path that a client may use. Anything else is
//! a 404 and never reaches an upstream.

use http::{Method, StatusCode};

use crate::{
    error::{Error, Result},
    openai::Endpoint,
};

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Call {
    /// A call to a model.
    Model(Endpoint),
    /// `GET /v1/models`.
    Models,
    /// `GET /v1/models/{id}`; the id as it was before it was percent-encoded.
    ModelById(String),
    /// `GET /`.
    Root,
    /// `GET /health`.
    Health,
    /// `GET /livez`: the process runs.
    Live,
    /// `GET /readyz`: requests are welcome.
    Ready,
}

impl Call {
    /// Returns the metric label.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Model(endpoint) => endpoint.name(),
            Self::Models | Self::ModelById(_) => "models",
            Self::Root => "root",
            Self::Health => "health",
            Self::Live => "livez",
            Self::Ready => "readyz",
        }
    }

    /// Returns whether it is answered to strangers: what a load balancer or a
    /// browser asks before it has a key.
    pub(super) const fn is_public(&self) -> bool {
        matches!(self, Self::Root | Self::Health | Self::Live | Self::Ready)
    }
}

/// Looks up the exact method and path; `HEAD` is answered wherever `GET` is. No path is normalised: `//`, `%2e` and
/// `;` are other paths, and unknown.
///
/// # Errors
/// 404 for everything that is not in the list.
pub(super) fn look_up(method: &Method, target: &[u8]) -> Result<Call> {
    let unknown = || {
        Error::refused(
            StatusCode::NOT_FOUND,
            "unknown_url",
            "unknown request URL: see GET / for what is here",
        )
    };
    let path = target.split(|byte| *byte == b'?').next().unwrap_or(target);
    let path = std::str::from_utf8(path).map_err(|why| unknown().because(why))?;
    if *method == Method::POST {
        return Endpoint::of_path(path).map(Call::Model).ok_or_else(unknown);
    }
    // HEAD is GET without the body, which is left out where it is sent.
    if *method != Method::GET && *method != Method::HEAD {
        return Err(unknown());
    }
    match path {
        "/" => Ok(Call::Root),
        "/health" => Ok(Call::Health),
        "/livez" => Ok(Call::Live),
        "/readyz" => Ok(Call::Ready),
        "/v1/models" => Ok(Call::Models),
        _ => path
            .strip_prefix("/v1/models/")
            .and_then(decode_id)
            .map(Call::ModelById)
            .ok_or_else(unknown),
    }
}

/// Decodes a model's name; `None` if it is not one. It is only ever compared,
/// never part of a path.
fn decode_id(encoded: &str) -> Option<String> {
    let decoded = percent_encoding::percent_decode_str(encoded)
        .decode_utf8()
        .ok()?;
    let sane = !decoded.is_empty() && !decoded.contains(char::is_control);
    sane.then(|| decoded.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(method: Method, target: &str) -> Option<Call> {
        look_up(&method, target.as_bytes()).ok()
    }

    #[test]
    fn every_endpoint_is_found_by_its_path() {
        for endpoint in Endpoint::ALL {
            assert_eq!(
                call(Method::POST, endpoint.path()),
                Some(Call::Model(endpoint))
            );
            assert_eq!(call(Method::GET, endpoint.path()), None);
        }
        assert_eq!(call(Method::GET, "/v1/models?limit=3"), Some(Call::Models));
        assert_eq!(
            call(Method::GET, "/v1/models/meta%2Fllama"),
            Some(Call::ModelById("meta/llama".to_owned()))
        );
    }

    #[test]
    fn a_path_that_only_looks_like_one_is_unknown() {
        for target in [
            "//v1/chat/completions",
            "/v1//chat/completions",
            "/v1/chat/completions/",
            "/V1/chat/completions",
            "/v1/%63hat/completions",
            "/v1/x/../chat/completions",
            "/v1/%2e%2e/pause",
            "/v1/chat/completions;x",
            "/v1/models/",
            "/v1/models/%00",
            "/metrics",
            "/reload",
            "*",
        ] {
            assert_eq!(call(Method::POST, target), None, "{target}");
            assert_eq!(call(Method::GET, target), None, "{target}");
        }
        for method in [Method::TRACE, Method::OPTIONS, Method::PUT] {
            assert_eq!(call(method, "/v1/models"), None);
        }
        assert_eq!(call(Method::HEAD, "/v1/models"), Some(Call::Models));
        assert_eq!(call(Method::HEAD, "/v1/embeddings"), None);
    }
}
