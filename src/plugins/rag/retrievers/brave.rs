//! Brave's search API, with a key.

use std::path::Path;

use http::{HeaderName, HeaderValue, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Build, ConfigError, Hit, Retriever, Trouble, endpoint_of, hits_of, json_of, key_of};
use crate::{
    config::SecretRef,
    outbound::{Endpoint, Incoming, Outgoing},
};

const URL: &str = "https://api.search.brave.com/res/v1/web/search";
const KEY: HeaderName = HeaderName::from_static("x-subscription-token");

/// The settings of `brave`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    /// The key of the subscription.
    key: SecretRef,
    /// Where the API is, if not at Brave's own address.
    #[serde(default)]
    #[schemars(length(min = 1))]
    url: Option<String>,
}

pub(super) struct Brave {
    endpoint: Endpoint,
    key: HeaderValue,
}

impl Build for Brave {
    const NAME: &'static str = "brave";
    type Config = Config;

    fn build(config: Config, base: &Path) -> Result<Self, ConfigError> {
        Ok(Self {
            endpoint: endpoint_of(config.url.as_deref(), URL)?,
            key: key_of(&config.key, "", base)?,
        })
    }
}

impl Retriever for Brave {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn is_local(&self) -> bool {
        false
    }

    fn call(&self, query: &str, most: usize) -> Outgoing {
        let mut url = self.endpoint.url().clone();
        url.query_pairs_mut()
            .append_pair("q", query)
            .append_pair("count", &most.to_string());
        Outgoing::get(url)
            .with(KEY, self.key.clone())
            .with(header::ACCEPT, HeaderValue::from_static("application/json"))
    }

    fn read(&self, answer: &Incoming) -> Result<Vec<Hit>, Trouble> {
        let answer = json_of(answer)?;
        // Without any result there is no `web`.
        match answer.get("web") {
            None if answer.get("type").is_some() => Ok(Vec::new()),
            web => hits_of(
                web.and_then(|web| web.get("results")),
                ["title", "url", "description"],
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::answered, *};

    #[test]
    fn the_key_goes_along_and_results_are_read() {
        // The one variable that is set wherever tests run.
        let config = "{ key: env:CARGO_PKG_NAME }";
        let engine = Brave::build(serde_yaml::from_str(config).unwrap(), Path::new(".")).unwrap();
        let call = engine.call("a b", 5);
        assert_eq!(call.url.as_str(), format!("{URL}?q=a+b&count=5"));
        assert_eq!(call.headers[KEY], "forebay");
        let body = r#"{"type":"search","web":{"results":[
            {"title":"T","url":"https://a.test/","description":"Of <strong>a</strong>."}]}}"#;
        let hits = engine.read(&answered(200, body)).unwrap();
        assert_eq!(hits[0].snippet, "Of a.");
        let none = engine.read(&answered(200, "{\"type\":\"search\"}"));
        assert_eq!(none, Ok(Vec::new()));
        let limited = engine.read(&answered(429, "{}"));
        assert_eq!(limited, Err(Trouble::Limited(None)));
    }
}
