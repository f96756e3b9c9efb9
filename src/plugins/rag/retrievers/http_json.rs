//! Any endpoint that answers with JSON: a retriever of your own, a vector
//! store, a search engine that is not known here.
//!
//! **Invariant:** a query changes the path, the query string or the body of a
//! call, and never where it goes.

use std::path::Path;

use http::{HeaderName, HeaderValue, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;

use super::{Build, ConfigError, Hit, Retriever, Trouble, header_of, html, json_of, key_of, wrong};
use crate::{
    config::SecretRef,
    outbound::{Endpoint, Incoming, Outgoing, Reach},
};

const QUERY: &str = "{query}";
const RESULTS: &str = "{results}";
/// All that is not unreserved.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The settings of `http_json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    /// Where to ask; `{query}` in its path or query string is the query,
    /// `{results}` the number of results.
    #[schemars(length(min = 1))]
    url: String,
    /// A JSON text that is posted, in which `{query}` is the query with its
    /// quotes and `{results}` a number; without it the call is a GET.
    #[serde(default)]
    #[schemars(length(min = 2))]
    body: Option<String>,
    /// A key that goes along.
    #[serde(default)]
    key: Option<SecretRef>,
    /// The header that it goes along in; in `authorization` behind `Bearer`.
    #[serde(default = "authorization")]
    #[schemars(length(min = 1, max = 64))]
    key_header: String,
    /// Where in the answer the list of results is, such as `data.items`; empty
    /// if the answer is the list.
    #[serde(default = "results")]
    list: String,
    /// Where in a result its title is.
    #[serde(default = "title")]
    title: String,
    /// Where in a result its URL is; results without one are shown to the model
    /// and never cited.
    #[serde(default = "url")]
    link: String,
    /// Where in a result its text is.
    #[serde(default = "snippet")]
    snippet: String,
    /// Whether it is on premises: then it may see what must not leave them.
    #[serde(default)]
    local: bool,
}

fn authorization() -> String {
    "authorization".to_owned()
}

fn results() -> String {
    "results".to_owned()
}

fn title() -> String {
    "title".to_owned()
}

fn url() -> String {
    "url".to_owned()
}

fn snippet() -> String {
    "snippet".to_owned()
}

pub(super) struct HttpJson {
    config: Config,
    /// With a word for the query.
    endpoint: Endpoint,
    key: Option<(HeaderName, HeaderValue)>,
}

impl Build for HttpJson {
    const NAME: &'static str = "http_json";
    type Config = Config;

    fn build(config: Config, base: &Path) -> Result<Self, ConfigError> {
        let endpoint = |query| {
            Endpoint::parse(&filled(&config.url, query, 3), Reach::Private)
                .map_err(|why| wrong("url", why.to_string()))
        };
        let (one, other) = (endpoint("a")?, endpoint("b")?);
        if one.url().origin() != other.url().origin() {
            return Err(wrong("url", "expected {query} behind the host"));
        }
        if let Some(body) = &config.body {
            let sample = filled_json(body, "a \"b\"", 3);
            if serde_json::from_str::<Value>(&sample).is_err() {
                let message = "expected JSON, in which {query} stands without quotes";
                return Err(wrong("body", message));
            }
        }
        let asks = |text: &str| text.contains(QUERY);
        if !asks(&config.url) && !config.body.as_deref().is_some_and(asks) {
            return Err(wrong("url", "expected {query} in it, or in `body`"));
        }
        let key = match &config.key {
            None => None,
            Some(key) => {
                let (name, _) = header_of(&config.key_header, "")
                    .map_err(|why| wrong("key_header", why.message))?;
                let prefix = if name == header::AUTHORIZATION {
                    "Bearer "
                } else {
                    ""
                };
                Some((name, key_of(key, prefix, base)?))
            }
        };
        Ok(Self {
            endpoint: one,
            config,
            key,
        })
    }
}

impl Retriever for HttpJson {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn is_local(&self) -> bool {
        self.config.local
    }

    fn call(&self, query: &str, most: usize) -> Outgoing {
        let url = Url::parse(&filled(&self.config.url, query, most));
        let url = url.unwrap_or_else(|_why| self.endpoint.url().clone());
        let call = match &self.config.body {
            None => Outgoing::get(url),
            Some(body) => Outgoing::post(url, "application/json", filled_json(body, query, most)),
        };
        let call = call.with(header::ACCEPT, HeaderValue::from_static("application/json"));
        match &self.key {
            Some((name, key)) => call.with(name.clone(), key.clone()),
            None => call,
        }
    }

    fn read(&self, answer: &Incoming) -> Result<Vec<Hit>, Trouble> {
        let answer = json_of(answer)?;
        let list = at(&answer, &self.config.list).and_then(Value::as_array);
        let items = list.ok_or(Trouble::Unreadable)?;
        let text = |item: &Value, path: &str| match at(item, path) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Number(number)) => number.to_string(),
            _ => String::new(),
        };
        let hits = items.iter().map(|item| Hit {
            title: html::plain(&text(item, &self.config.title)),
            url: text(item, &self.config.link),
            snippet: html::plain(&text(item, &self.config.snippet)),
        });
        Ok(hits
            .filter(|hit| !hit.title.is_empty() || !hit.snippet.is_empty())
            .collect())
    }
}

fn filled(template: &str, query: &str, results: usize) -> String {
    let query = utf8_percent_encode(query, ESCAPED).to_string();
    // The number first: there may be braces in the query.
    template
        .replace(RESULTS, &results.to_string())
        .replace(QUERY, &query)
}

fn filled_json(template: &str, query: &str, results: usize) -> String {
    let query = Value::from(query).to_string();
    template
        .replace(RESULTS, &results.to_string())
        .replace(QUERY, &query)
}

/// Follows a path of keys, and of places in lists: `hits.0.document`.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    if path.is_empty() {
        return Some(value);
    }
    path.split('.').try_fold(value, |value, key| match value {
        Value::Array(items) => items.get(key.parse::<usize>().ok()?),
        value => value.get(key),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::answered, *};

    fn engine(yaml: &str) -> Result<HttpJson, ConfigError> {
        HttpJson::build(serde_yaml::from_str(yaml).unwrap(), Path::new("."))
    }

    #[test]
    fn a_query_stays_where_the_template_has_it() {
        let engine = engine("{ url: \"http://s:1/q/{query}?k={results}&x={query}\" }").unwrap();
        let call = engine.call("../../a?b#c&d=e@f/{results}%00", 4);
        assert_eq!(
            call.url.as_str(),
            "http://s:1/q/..%2F..%2Fa%3Fb%23c%26d%3De%40f%2F%7Bresults%7D%2500?k=4\
             &x=..%2F..%2Fa%3Fb%23c%26d%3De%40f%2F%7Bresults%7D%2500"
        );
        assert_eq!(call.url.origin(), engine.endpoint().url().origin());
    }

    #[test]
    fn a_body_is_json_whatever_is_asked() {
        let yaml = "url: http://s:1/search\nkey: env:CARGO_PKG_NAME\nkey_header: x-key\n\
                    body: '{\"text\": {query}, \"k\": {results}}'\n";
        let call = engine(yaml).unwrap().call("a \"b\\ {results}\n", 4);
        let sent: Value = serde_json::from_slice(&call.body).unwrap();
        assert_eq!(sent["text"], "a \"b\\ {results}\n");
        assert_eq!(sent["k"], 4);
        assert_eq!(call.headers["x-key"], "forebay");
    }

    #[test]
    fn templates_that_lead_elsewhere_are_refused() {
        for yaml in [
            "{ url: \"http://{query}/\" }",
            "{ url: \"http://{query}.test/\" }",
            "{ url: \"{query}\" }",
            "{ url: \"http://s/\" }",
            "{ url: \"ftp://s/{query}\" }",
            "{ url: \"http://169.254.169.254/{query}\" }",
            "{ url: \"http://s/{query}\", body: \"{\" }",
            "{ url: \"http://s/\", body: '{\"q\": \"{query}\"}' }",
            "{ url: \"http://s/{query}\", key: \"env:CARGO_PKG_NAME\", key_header: \"a b\" }",
        ] {
            assert!(engine(yaml).is_err(), "{yaml}");
        }
    }

    #[test]
    fn fields_are_found_by_their_paths() {
        let engine = engine(
            "{ url: \"http://s/{query}\", list: data.0.hits, title: doc.name, link: doc.at, snippet: text }",
        )
        .unwrap();
        let body = r#"{"data":[{"hits":[
            {"doc":{"name":"A","at":"https://a.test/"},"text":"One"},
            {"doc":{"name":7},"text":"Two"}, {"doc":{}}, null]}]}"#;
        let hits = engine.read(&answered(200, body)).unwrap();
        assert_eq!(hits.len(), 2, "{hits:?}");
        assert_eq!((&*hits[0].title, &*hits[0].url), ("A", "https://a.test/"));
        assert_eq!((&*hits[1].title, &*hits[1].url), ("7", ""));
        for body in [
            "{}",
            "{\"data\":[]}",
            "{\"data\":[{\"hits\":{}}]}",
            "[",
            "\"x\"",
        ] {
            let read = engine.read(&answered(200, body));
            assert_eq!(read, Err(Trouble::Unreadable), "{body}");
        }
    }
}
