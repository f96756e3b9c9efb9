//! The calls that go to an upstream, and what they are named.

use std::fmt;

/// Every key by which a client bounds the tokens of an answer, of whatever call:
/// what limits one of them limits all.
pub const TOKEN_KEYS: [&str; 4] = [
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    N_PREDICT,
];
/// llama.cpp's own bound on the tokens of an answer; others pass over it.
pub const N_PREDICT: &str = "n_predict";

/// One of OpenAI's calls that take a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`
    ChatCompletions,
    /// `POST /v1/completions`
    Completions,
    /// `POST /v1/embeddings`
    Embeddings,
    /// `POST /v1/responses`
    Responses,
    /// `POST /v1/rerank`
    Rerank,
    /// `POST /v1/moderations`
    Moderations,
}

impl Endpoint {
    /// Every endpoint, in the order of the documentation.
    pub const ALL: [Self; 6] = [
        Self::ChatCompletions,
        Self::Completions,
        Self::Embeddings,
        Self::Responses,
        Self::Rerank,
        Self::Moderations,
    ];

    /// Returns the path that clients call: `/v1/chat/completions`.
    pub const fn path(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
            Self::Rerank => "/v1/rerank",
            Self::Moderations => "/v1/moderations",
        }
    }

    /// Returns what is appended to an upstream's base URL, which ends with its
    /// own `/v1` or whatever it has instead: `/chat/completions`.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/chat/completions",
            Self::Completions => "/completions",
            Self::Embeddings => "/embeddings",
            Self::Responses => "/responses",
            Self::Rerank => "/rerank",
            Self::Moderations => "/moderations",
        }
    }

    /// Returns the name in metrics and logs: `chat_completions`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat_completions",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
            Self::Responses => "responses",
            Self::Rerank => "rerank",
            Self::Moderations => "moderations",
        }
    }

    /// Says whether the call can be answered with a stream of events; these are
    /// also the calls that generate tokens.
    pub const fn streams(self) -> bool {
        matches!(
            self,
            Self::ChatCompletions | Self::Completions | Self::Responses
        )
    }

    /// Returns the keys by which a client bounds the tokens of an answer of this
    /// call, that of OpenAI's API first; `n_predict` is llama.cpp's, where it
    /// overrules the others. None for calls that generate nothing.
    pub const fn token_keys(self) -> &'static [&'static str] {
        match self {
            Self::ChatCompletions => &["max_tokens", "max_completion_tokens", N_PREDICT],
            Self::Completions => &["max_tokens", N_PREDICT],
            Self::Responses => &["max_output_tokens", N_PREDICT],
            Self::Embeddings | Self::Rerank | Self::Moderations => &[],
        }
    }

    /// Finds the endpoint of a path that a client called; exact, no prefixes.
    pub fn of_path(path: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|endpoint| endpoint.path() == path)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_v1_and_the_suffix() {
        for endpoint in Endpoint::ALL {
            assert_eq!(endpoint.path(), format!("/v1{}", endpoint.suffix()));
            assert_eq!(
                endpoint.name(),
                endpoint.suffix().trim_start_matches('/').replace('/', "_")
            );
            assert_eq!(Endpoint::of_path(endpoint.path()), Some(endpoint));
        }
    }

    #[test]
    fn every_bound_of_a_call_is_known_as_one() {
        let all = Endpoint::ALL.into_iter().flat_map(Endpoint::token_keys);
        for key in all {
            assert!(TOKEN_KEYS.contains(key), "{key}");
        }
        for endpoint in Endpoint::ALL {
            assert_eq!(endpoint.streams(), !endpoint.token_keys().is_empty());
        }
    }

    #[test]
    fn a_path_that_is_only_nearly_right_is_no_endpoint() {
        for path in [
            "/v1/chat/completions/",
            "/V1/completions",
            "/completions",
            "",
        ] {
            assert_eq!(Endpoint::of_path(path), None, "{path}");
        }
    }
}
