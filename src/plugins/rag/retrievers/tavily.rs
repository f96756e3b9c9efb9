//! Tavily's search API, with a key.

use std::path::Path;

use http::{HeaderValue, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Build, ConfigError, Hit, Retriever, Trouble, endpoint_of, hits_of, json_of, key_of};
use crate::{
    config::SecretRef,
    outbound::{Endpoint, Incoming, Outgoing},
};

const URL: &str = "https://api.tavily.com/search";

/// The settings of `tavily`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    /// The key of the account.
    key: SecretRef,
    /// Where the API is, if not at Tavily's own address.
    #[serde(default)]
    #[schemars(length(min = 1))]
    url: Option<String>,
}

pub(super) struct Tavily {
    endpoint: Endpoint,
    key: HeaderValue,
}

impl Build for Tavily {
    const NAME: &'static str = "tavily";
    type Config = Config;

    fn build(config: Config, base: &Path) -> Result<Self, ConfigError> {
        Ok(Self {
            endpoint: endpoint_of(config.url.as_deref(), URL)?,
            key: key_of(&config.key, "Bearer ", base)?,
        })
    }
}

impl Retriever for Tavily {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn is_local(&self) -> bool {
        false
    }

    fn call(&self, query: &str, most: usize) -> Outgoing {
        let body = json!({ "query": query, "max_results": most, "search_depth": "basic" });
        let url = self.endpoint.url().clone();
        Outgoing::post(url, "application/json", body.to_string())
            .with(header::AUTHORIZATION, self.key.clone())
    }

    fn read(&self, answer: &Incoming) -> Result<Vec<Hit>, Trouble> {
        let answer = json_of(answer)?;
        hits_of(answer.get("results"), ["title", "url", "content"])
    }
}

#[cfg(test)]
mod tests {
    use super::{super::answered, *};

    #[test]
    fn the_key_goes_along_and_results_are_read() {
        let config = "{ key: env:CARGO_PKG_NAME }";
        let engine = Tavily::build(serde_yaml::from_str(config).unwrap(), Path::new(".")).unwrap();
        let call = engine.call("a \"b\"", 5);
        assert_eq!(call.headers[header::AUTHORIZATION], "Bearer forebay");
        let sent: serde_json::Value = serde_json::from_slice(&call.body).unwrap();
        assert_eq!(sent["query"], "a \"b\"");
        assert_eq!(sent["max_results"], 5);
        let body = r#"{"query":"a","results":[
            {"title":"T","url":"https://a.test/","content":"Text","score":0.9}]}"#;
        assert_eq!(engine.read(&answered(200, body)).unwrap()[0].title, "T");
    }
}
