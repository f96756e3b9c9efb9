//! The allowlist: every method and path that a client may use. Anything else is
//! a 404, or a 405 where the path is one of them, and never reaches an upstream.

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

/// The methods of what is read; `HEAD` is answered wherever `GET` is.
const READ: &str = "GET, HEAD";

/// Looks up the exact method and path. No path is normalised: `//`, `%2e` and
/// `;` are other paths, and unknown.
///
/// # Errors
/// 404 for every path that is not in the list, 405 for one that is there with
/// another method.
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
    let call = by_path(path).ok_or_else(unknown)?;
    let (is_its_own, allow) = match call {
        Call::Model(_) => (*method == Method::POST, "POST"),
        _ => (*method == Method::GET || *method == Method::HEAD, READ),
    };
    if is_its_own {
        Ok(call)
    } else {
        Err(Error::method_not_allowed(allow))
    }
}

fn by_path(path: &str) -> Option<Call> {
    match path {
        "/" => Some(Call::Root),
        "/health" => Some(Call::Health),
        "/livez" => Some(Call::Live),
        "/readyz" => Some(Call::Ready),
        "/v1/models" => Some(Call::Models),
        _ => Endpoint::of_path(path).map(Call::Model).or_else(|| {
            let id = path.strip_prefix("/v1/models/")?;
            decode_id(id).map(Call::ModelById)
        }),
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
    fn a_known_path_tells_its_methods_to_who_comes_with_another() {
        let refusal = |method: &str, target: &str| {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let error = look_up(&method, target.as_bytes()).unwrap_err();
            (error.status.as_u16(), error.allow)
        };
        for method in ["PUT", "TRACE", "OPTIONS", "CONNECT", "BREW", "get"] {
            for path in ["/", "/livez", "/v1/models", "/v1/models/x?y"] {
                assert_eq!(refusal(method, path), (405, Some("GET, HEAD")));
            }
            for endpoint in Endpoint::ALL {
                assert_eq!(refusal(method, endpoint.path()), (405, Some("POST")));
            }
            assert_eq!(refusal(method, "/nowhere"), (404, None));
        }
        assert_eq!(refusal("POST", "/v1/models"), (405, Some("GET, HEAD")));
        assert_eq!(refusal("GET", "/v1/responses"), (405, Some("POST")));
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
