//! DuckDuckGo's page for browsers without scripts, asked as a browser's form
//! asks it. No key, no promise: after too many questions it wants to see a
//! human, and is left alone for a while then.

use std::path::Path;

use http::{HeaderName, HeaderValue, StatusCode, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::{Url, form_urlencoded};

use super::{
    Build, ConfigError, Hit, Retriever, Trouble, endpoint_of,
    html::{Token, Tokens, attribute, decoded, has_class},
    judge,
};
use crate::outbound::{Endpoint, Incoming, Outgoing};

/// Where the form is.
const URL: &str = "https://html.duckduckgo.com/html/";
/// What the form's page would have said of itself.
const REFERER: &str = "https://html.duckduckgo.com/";
/// The form answers browsers only.
const USER_AGENT: &str = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0";
/// What the clients of this page take for "too many questions".
const LIMITED: [u16; 6] = [202, 301, 302, 400, 403, 418];

/// The settings of `duckduckgo`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Config {
    /// Where its form is, if not at DuckDuckGo's own address.
    #[schemars(length(min = 1))]
    url: Option<String>,
    /// The region whose results are preferred, such as `us-en`; `wt-wt` is none.
    #[schemars(length(min = 1, max = 16))]
    region: String,
    /// Whether it is on premises: then it may see what must not leave them.
    local: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: None,
            region: "wt-wt".to_owned(),
            local: false,
        }
    }
}

pub(super) struct DuckDuckGo {
    endpoint: Endpoint,
    region: String,
    local: bool,
}

impl Build for DuckDuckGo {
    const NAME: &'static str = "duckduckgo";
    type Config = Config;

    fn build(config: Config, _base: &Path) -> Result<Self, ConfigError> {
        Ok(Self {
            endpoint: endpoint_of(config.url.as_deref(), URL)?,
            region: config.region,
            local: config.local,
        })
    }
}

impl Retriever for DuckDuckGo {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn is_local(&self) -> bool {
        self.local
    }

    fn call(&self, query: &str, _most: usize) -> Outgoing {
        let form = form_urlencoded::Serializer::new(String::new())
            .append_pair("q", &without_bangs(query))
            .append_pair("b", "")
            .append_pair("kl", &self.region)
            .finish();
        let fields = [
            (header::USER_AGENT, USER_AGENT),
            (header::REFERER, REFERER),
            (header::ORIGIN, "https://html.duckduckgo.com"),
            (
                header::ACCEPT,
                "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            ),
            (header::ACCEPT_LANGUAGE, "en-US,en;q=0.5"),
            (header::UPGRADE_INSECURE_REQUESTS, "1"),
            (HeaderName::from_static("sec-fetch-dest"), "document"),
            (HeaderName::from_static("sec-fetch-mode"), "navigate"),
            (HeaderName::from_static("sec-fetch-site"), "same-origin"),
            (HeaderName::from_static("sec-fetch-user"), "?1"),
        ];
        let url = self.endpoint.url().clone();
        let call = Outgoing::post(url, "application/x-www-form-urlencoded", form);
        fields.into_iter().fold(call, |call, (name, value)| {
            call.with(name, HeaderValue::from_static(value))
        })
    }

    fn read(&self, answer: &Incoming) -> Result<Vec<Hit>, Trouble> {
        let page = String::from_utf8_lossy(&answer.body);
        if page.contains("challenge-form") || page.contains("anomaly-modal") {
            return Err(Trouble::Captcha);
        }
        if LIMITED.contains(&answer.status.as_u16()) {
            return Err(Trouble::Limited(None));
        }
        judge(answer)?;
        if answer.status != StatusCode::OK {
            return Err(Trouble::Unreadable);
        }
        let (hits, is_page) = hits_of(&page);
        if hits.is_empty() && !is_page {
            return Err(Trouble::Unreadable);
        }
        Ok(hits)
    }
}

/// Takes the exclamation marks off words: a `!g` would send the question to
/// another engine.
fn without_bangs(query: &str) -> String {
    let words = query.split_whitespace();
    let words: Vec<&str> = words
        .map(|word| word.trim_start_matches(['!', '\\']))
        .filter(|word| !word.is_empty())
        .collect();
    words.join(" ")
}

/// What the next text belongs to.
enum In {
    Nothing,
    Title,
    Snippet,
}

/// Reads the results of a page, and whether it is a page of results at all,
/// also one without any.
fn hits_of(page: &str) -> (Vec<Hit>, bool) {
    let mut hits: Vec<Hit> = Vec::new();
    let mut is_page = false;
    let mut in_ad = false;
    let mut within = In::Nothing;
    for token in Tokens::of(page) {
        match token {
            Token::Open("div", tag) if has_class(tag, "result") => {
                is_page = true;
                in_ad = has_class(tag, "result--ad");
                within = In::Nothing;
            }
            Token::Open("div", tag) if has_class(tag, "no-results") => is_page = true,
            Token::Open("a", tag) if has_class(tag, "result__a") && !in_ad => {
                within = In::Nothing;
                if let Some(url) = attribute(tag, "href").and_then(|href| target_of(&href)) {
                    hits.push(Hit {
                        url,
                        ..Hit::default()
                    });
                    within = In::Title;
                }
            }
            Token::Open(_, tag) if has_class(tag, "result__snippet") && !in_ad => {
                within = match hits.last() {
                    Some(hit) if hit.snippet.is_empty() => In::Snippet,
                    _ => In::Nothing,
                };
            }
            Token::Close("a" | "td" | "div") => within = In::Nothing,
            Token::Text(text) => match (&within, hits.last_mut()) {
                (In::Title, Some(hit)) => hit.title.push_str(&decoded(text)),
                (In::Snippet, Some(hit)) => hit.snippet.push_str(&decoded(text)),
                _ => {}
            },
            _ => {}
        }
    }
    (hits, is_page)
}

/// Returns where a link leads: behind the engine's own redirect, and nowhere if
/// it is an advertisement's.
fn target_of(href: &str) -> Option<String> {
    let url = match href.strip_prefix("//") {
        Some(rest) => Url::parse(&format!("https://{rest}")),
        None => Url::parse(href),
    };
    let url = url.ok()?;
    let is_own = url
        .host_str()
        .is_some_and(|host| host == "duckduckgo.com" || host.ends_with(".duckduckgo.com"));
    if !is_own {
        return Some(url.into());
    }
    match url.path() {
        "/y.js" => None,
        "/l/" | "/l" => {
            let mut pairs = url.query_pairs();
            let (_, target) = pairs.find(|(key, _)| key == "uddg")?;
            // An advertisement may be wrapped as well.
            let is_ad = target.starts_with("https://duckduckgo.com/y.js");
            (!is_ad).then(|| target.into_owned())
        }
        _ => Some(url.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::answered, *};

    fn engine() -> DuckDuckGo {
        DuckDuckGo::build(Config::default(), Path::new(".")).unwrap()
    }

    fn result(class: &str, href: &str, title: &str, snippet: &str) -> String {
        format!(
            "<div class=\"result results_links results_links_deep {class} \">\
             <div class=\"links_main links_deep result__body\"><h2 class=\"result__title\">\
             <a rel=\"nofollow\" class=\"result__a\" href=\"{href}\">{title}</a></h2>\
             <div class=\"result__extras\"><a class=\"result__url\" href=\"{href}\"> x </a></div>\
             <a class=\"result__snippet\" href=\"{href}\">{snippet}</a><div class=\"clear\"></div>\
             </div></div>"
        )
    }

    fn read(status: u16, body: &str) -> Result<Vec<Hit>, Trouble> {
        engine().read(&answered(status, body.to_owned()))
    }

    #[test]
    fn the_question_is_asked_as_the_form_does() {
        let call = engine().call("!g what is  \\this & that?", 3);
        assert_eq!(call.method, http::Method::POST);
        assert_eq!(call.url.as_str(), URL);
        assert_eq!(call.body, "q=g+what+is+this+%26+that%3F&b=&kl=wt-wt");
        assert_eq!(call.headers[header::REFERER], REFERER);
    }

    #[test]
    fn results_are_read_and_advertisements_are_not() {
        let wrapped = "//duckduckgo.com/l/?uddg=https%3A%2F%2Fb.test%2Fp%3Fq%3D1&amp;rut=aa";
        let ad = "https://duckduckgo.com/y.js?ad_domain=x";
        let wrapped_ad =
            "//duckduckgo.com/l/?uddg=https%3A%2F%2Fduckduckgo.com%2Fy.js%3Fad_domain%3Dx";
        let page = [
            result("result--ad", "https://ad.test/", "Ad", "Buy"),
            result("web-result", ad, "Ad", "Buy"),
            result("web-result", wrapped_ad, "Ad", "Buy"),
            result(
                "web-result",
                "https://a.test/x?a=1&amp;b=2",
                "A &amp; <b>B</b>",
                "Of <b>a</b> &#x27;b&#x27;",
            ),
            result("web-result", wrapped, "Second", ""),
            result("web-result", "/settings", "Nowhere", "x"),
        ]
        .concat();
        let hits = read(200, &page).unwrap();
        assert_eq!(hits.len(), 2, "{hits:?}");
        assert_eq!(hits[0].url, "https://a.test/x?a=1&b=2");
        assert_eq!(hits[0].title, "A & B");
        assert_eq!(hits[0].snippet, "Of a 'b'");
        assert_eq!(hits[1].url, "https://b.test/p?q=1");
        assert_eq!(hits[1].title, "Second");
    }

    #[test]
    fn a_page_without_results_is_no_trouble() {
        let page = "<div class=\"result result--no-result\"><div class=\"no-results\">No  results.";
        assert_eq!(read(200, page), Ok(Vec::new()));
    }

    #[test]
    fn who_wants_to_see_a_human_is_left_alone() {
        let page = "<form id=\"challenge-form\" action=\"//duckduckgo.com/anomaly.js\">";
        assert_eq!(read(202, page), Err(Trouble::Captcha));
        assert_eq!(read(200, page), Err(Trouble::Captcha));
        for status in [202, 301, 302, 400, 403, 418, 429] {
            assert_eq!(read(status, ""), Err(Trouble::Limited(None)), "{status}");
        }
        let refused = Trouble::Refused(StatusCode::BAD_GATEWAY);
        assert_eq!(read(502, ""), Err(refused));
        assert_eq!(read(200, "<html>another page"), Err(Trouble::Unreadable));
    }
}
