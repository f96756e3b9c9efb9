//! A SearXNG instance, over its JSON API. The instance must allow it:
//! `search.formats` of its settings needs `json`, or it answers 403.

use std::path::Path;

use http::{HeaderValue, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Build, ConfigError, Hit, Retriever, Trouble, hits_of, json_of, wrong};
use crate::outbound::{Endpoint, Incoming, Outgoing, Reach};

/// The settings of `searxng`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    /// Where the instance is; `/search` is appended.
    #[schemars(length(min = 1))]
    url: String,
    /// The language of the results, such as `en`; the instance's own if not said.
    #[serde(default)]
    #[schemars(length(min = 1, max = 16))]
    language: Option<String>,
    /// The categories to search, such as `general,news`.
    #[serde(default)]
    #[schemars(length(min = 1, max = 200))]
    categories: Option<String>,
    /// The engines to ask, such as `wikipedia,brave`.
    #[serde(default)]
    #[schemars(length(min = 1, max = 500))]
    engines: Option<String>,
    /// Whether it is on premises: then it may see what must not leave them.
    #[serde(default)]
    local: bool,
}

pub(super) struct SearXng {
    /// With all that every query has in common.
    endpoint: Endpoint,
    local: bool,
}

impl Build for SearXng {
    const NAME: &'static str = "searxng";
    type Config = Config;

    fn build(config: Config, _base: &Path) -> Result<Self, ConfigError> {
        let base = Endpoint::parse(&config.url, Reach::Private)
            .map_err(|why| wrong("url", why.to_string()))?;
        let mut url = base.url().clone();
        if url.query().is_some() {
            return Err(wrong("url", "expected a URL without a query"));
        }
        let prefix = url.path().trim_end_matches('/');
        let path = match prefix.strip_suffix("/search") {
            Some(_) => prefix.to_owned(),
            None => format!("{prefix}/search"),
        };
        url.set_path(&path);
        {
            let mut pairs = url.query_pairs_mut();
            pairs.append_pair("format", "json");
            let more = [
                ("language", config.language),
                ("categories", config.categories),
                ("engines", config.engines),
            ];
            for (key, value) in more {
                if let Some(value) = value {
                    pairs.append_pair(key, &value);
                }
            }
        }
        let endpoint = Endpoint::parse(url.as_str(), Reach::Private)
            .map_err(|why| wrong("url", why.to_string()))?;
        Ok(Self {
            endpoint,
            local: config.local,
        })
    }
}

impl Retriever for SearXng {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn is_local(&self) -> bool {
        self.local
    }

    fn call(&self, query: &str, _most: usize) -> Outgoing {
        let mut url = self.endpoint.url().clone();
        url.query_pairs_mut().append_pair("q", query);
        // An instance whose limiter is on wants these as browsers send them.
        Outgoing::get(url)
            .with(
                header::ACCEPT,
                HeaderValue::from_static("application/json, text/html;q=0.9"),
            )
            .with(
                header::ACCEPT_LANGUAGE,
                HeaderValue::from_static("en-US,en;q=0.5"),
            )
    }

    fn read(&self, answer: &Incoming) -> Result<Vec<Hit>, Trouble> {
        let answer = json_of(answer)?;
        hits_of(answer.get("results"), ["title", "url", "content"])
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::{super::answered, *};

    fn engine(yaml: &str) -> Result<SearXng, ConfigError> {
        SearXng::build(serde_yaml::from_str(yaml).unwrap(), Path::new("."))
    }

    #[test]
    fn the_query_is_added_to_what_the_settings_say() {
        for url in [
            "http://127.0.0.1:8080",
            "http://127.0.0.1:8080/",
            "http://127.0.0.1:8080/search",
        ] {
            let engine = engine(&format!("{{ url: \"{url}\", language: en }}")).unwrap();
            assert_eq!(
                engine.call("a b&c", 3).url.as_str(),
                "http://127.0.0.1:8080/search?format=json&language=en&q=a+b%26c"
            );
        }
        assert!(engine("{ url: \"http://a/?x=1\" }").is_err());
        assert!(engine("{ url: \"http://169.254.169.254/\" }").is_err());
    }

    #[test]
    fn results_are_read_as_the_instance_writes_them() {
        let engine = engine("{ url: \"http://s\" }").unwrap();
        let body = r#"{"query":"q","number_of_results":0,"results":[
            {"url":"https://a.test/","title":"A","content":"First.","engine":"brave","score":1.0},
            {"url":"https://b.test/","title":"B"}, {"title":"no address"}, 7],
            "answers":[],"unresponsive_engines":[["google","CAPTCHA"]]}"#;
        let hits = engine.read(&answered(200, body)).unwrap();
        assert_eq!(hits.len(), 2);
        assert_eq!((&*hits[0].title, &*hits[0].snippet), ("A", "First."));
        let none = engine.read(&answered(200, "{\"results\":[]}"));
        assert_eq!(none, Ok(Vec::new()));
        for body in [
            "",
            "{}",
            "[]",
            "{\"results\":{}}",
            "<html>",
            "{\"results\":[",
        ] {
            let read = engine.read(&answered(200, body));
            assert_eq!(read, Err(Trouble::Unreadable), "{body}");
        }
        let forbidden = engine.read(&answered(403, ""));
        assert_eq!(forbidden, Err(Trouble::Refused(StatusCode::FORBIDDEN)));
    }
}
