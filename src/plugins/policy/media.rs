//! Addresses in a prompt that a model server would fetch from: pictures, sound,
//! video, files.
//!
//! A server that follows them reaches what the caller cannot: a cloud's
//! metadata, the admin pages beside it, its own disk. By default only what the
//! prompt itself carries (`data:`) goes through.

use std::net::IpAddr;

use http::StatusCode;
use url::{Host, Url};

use super::{Hits, config::MediaConfig, text::plain};
use crate::{
    context::Pattern,
    error::{Error, Result},
    openai::{ApiRequest, Endpoint, cursor::Cursor, json},
    plugins::ConfigError,
};

/// The members that may hold prompts.
const MEMBERS: [&str; 7] = [
    "messages",
    "input",
    "documents",
    "query",
    "tools",
    "prompt",
    "instructions",
];
/// What is fetched from, as a string or in a member `url`.
const ADDRESSES: [&str; 6] = [
    "image_url",
    "video_url",
    "audio_url",
    "file_url",
    "input_audio",
    "server_url",
];
/// What holds the bytes of a file or an address, as a server likes; not in the
/// definitions of tools, where anything may have such a name.
const FILES: [&str; 4] = ["image", "images", "video", "audio"];
/// The members of a part that are texts, and may be about any address.
const TEXTS: [&str; 18] = [
    "annotations",
    "arguments",
    "citations",
    "context",
    "id",
    "input_text",
    "name",
    "output_text",
    "query",
    "quote",
    "reasoning",
    "refusal",
    "signature",
    "summary",
    "text",
    "thinking",
    "title",
    "transcript",
];
/// The fewest letters that are taken for the bytes of a file.
const BYTES_MIN: usize = 64;
/// Tensors in place of a picture: what a server makes of them is its own code.
const TENSORS: [&str; 4] = [
    "image_embeds",
    "audio_embeds",
    "video_embeds",
    "prompt_embeds",
];
/// The deepest nesting that is looked at; bodies are refused far before.
const DEPTH_MAX: usize = 256;

/// What a value is, by where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Anything of a prompt.
    Prompt,
    /// The definition of a tool.
    Tools,
    /// A list of parts; a string is a text.
    Parts,
    /// A part: what looks like an address is one.
    Part,
    /// A text of a part.
    Text,
    /// An address, or holds one under `url`.
    Address,
    /// One of [`FILES`].
    File,
}

impl At {
    /// Returns what a member of an object here is.
    fn inside(self, key: &str) -> Self {
        match key {
            _ if ADDRESSES.contains(&key) => Self::Address,
            "url" if matches!(self, Self::Address | Self::File) => Self::Address,
            _ if self == Self::Tools => Self::Tools,
            _ if FILES.contains(&key) && self != Self::Text => Self::File,
            "content" | "output" => Self::Parts,
            _ if self == Self::Prompt => Self::Prompt,
            _ if self == Self::Text || TEXTS.contains(&key) => Self::Text,
            _ => Self::Part,
        }
    }

    /// Returns what an item of a list here is.
    fn item(self, is_object: bool) -> Self {
        match self {
            Self::Parts if is_object => Self::Part,
            Self::Parts => Self::Text,
            other => other,
        }
    }
}

/// The rules about addresses.
pub(super) struct Media {
    hosts: Vec<Pattern>,
    data_max: usize,
}

impl Media {
    pub(super) fn new(config: MediaConfig) -> std::result::Result<Self, ConfigError> {
        let no_host = |host: &String| {
            let is_v6 = host.starts_with('[') && host.ends_with(']');
            host.is_empty() || host.contains(['/', '@', ' ']) || host.contains(':') && !is_v6
        };
        if let Some(at) = config.hosts.iter().position(no_host) {
            let message = "expected a host such as example.org or *.example.org, without scheme, \
                           port and path";
            return Err(ConfigError {
                path: format!("policy.media.hosts[{at}]"),
                message: message.to_owned(),
            });
        }
        Ok(Self {
            hosts: config
                .hosts
                .into_iter()
                .map(|host| Pattern::new(host.to_lowercase()))
                .collect(),
            data_max: config.data_url.get(),
        })
    }

    /// Looks at every address of a prompt.
    ///
    /// # Errors
    /// 400 for one that is not allowed, 413 for data that are too large.
    pub(super) fn check(&self, request: &ApiRequest, hits: &Hits) -> Result<()> {
        for key in MEMBERS {
            let Some(value) = request.get(key) else {
                continue;
            };
            let mut cursor = Cursor::new(value);
            let at = match (key, request.endpoint) {
                ("tools", _) => At::Tools,
                ("input", Endpoint::Embeddings | Endpoint::Moderations) => At::Parts,
                _ => At::Prompt,
            };
            self.walk(&mut cursor, at, 0).map_err(|error| {
                hits.note("media", error.code.as_deref().unwrap_or(""), 1);
                error.param(key)
            })?;
        }
        Ok(())
    }

    fn walk(&self, cursor: &mut Cursor<'_>, at: At, depth: usize) -> Result<()> {
        match cursor.peek() {
            _ if depth > DEPTH_MAX => Err(not_allowed("the prompt is nested too deeply")),
            Some(b'"') => {
                let text = cursor.skip().unwrap_or_default();
                match at {
                    At::Address => self.check_address(text),
                    At::File => self.check_file(text),
                    At::Part if is_address(text) => self.check_address(text),
                    _ => Ok(()),
                }
            }
            Some(b'[') => {
                cursor.enter_array();
                while cursor.item() {
                    let is_object = cursor.peek() == Some(b'{');
                    self.walk(cursor, at.item(is_object), depth + 1)?;
                }
                Ok(())
            }
            Some(b'{') => {
                let at = at.item(true);
                cursor.enter_object();
                while let Some(key) = cursor.key() {
                    let key = plain(key);
                    if TENSORS.contains(&&*key) {
                        return Err(not_allowed("tensors are not accepted here"));
                    }
                    self.walk(cursor, at.inside(&key), depth + 1)?;
                }
                Ok(())
            }
            _ => {
                cursor.skip();
                Ok(())
            }
        }
    }

    /// Checks what may be an address, or the bytes themselves.
    fn check_file(&self, quoted: &[u8]) -> Result<()> {
        if is_address(quoted) {
            return self.check_address(quoted);
        }
        let text = json::text(quoted).unwrap_or_default();
        let is_byte = |byte: &u8| {
            byte.is_ascii_alphanumeric() || b"+/=-_".contains(byte) || byte.is_ascii_whitespace()
        };
        if text.len() < BYTES_MIN || !text.as_bytes().iter().all(is_byte) {
            return Err(not_allowed("only data: URLs are accepted here"));
        }
        self.check_size(&text)
    }

    fn check_size(&self, text: &str) -> Result<()> {
        if text.len() <= self.data_max {
            return Ok(());
        }
        let message = format!("a data URL has more than {} bytes", self.data_max);
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Err(Error::refused(status, "media_too_large", message))
    }

    fn check_address(&self, quoted: &[u8]) -> Result<()> {
        let text = json::text(quoted).unwrap_or_default();
        let text = trimmed(&text);
        let scheme = text.get(..5).unwrap_or_default();
        if scheme.eq_ignore_ascii_case("data:") {
            return self.check_size(text);
        }
        let Ok(url) = Url::parse(text) else {
            return Err(not_allowed("only data: URLs are accepted here"));
        };
        let host = url
            .host()
            .filter(|_| matches!(url.scheme(), "http" | "https"));
        match host {
            Some(host) if self.may_reach(&host) => Ok(()),
            _ if self.hosts.is_empty() => Err(not_allowed("only data: URLs are accepted here")),
            _ => Err(not_allowed(
                "this address is not one that may be fetched from",
            )),
        }
    }

    /// A pattern with a star never reaches inside: who means such an address
    /// writes it out.
    fn may_reach(&self, host: &Host<&str>) -> bool {
        let name = host.to_string().to_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let inside = is_inside(host);
        self.hosts.iter().any(|pattern| match pattern.exact() {
            Some(exact) => exact == name,
            None => !inside && pattern.matches(name),
        })
    }
}

/// Takes away what readers of URLs skip around one.
fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c.is_control())
}

/// Says whether a string looks like an address.
fn is_address(quoted: &[u8]) -> bool {
    let text = json::text(quoted).unwrap_or_default();
    let start: String = trimmed(&text).chars().take(32).collect();
    let start = start.to_ascii_lowercase();
    // What readers of URLs take out of one.
    let start: String = start.chars().filter(|c| !c.is_ascii_control()).collect();
    let named = |scheme: &&str| start.starts_with(*scheme);
    ["http:", "https:", "file:", "data:"].iter().any(named)
        || start.split_once("://").is_some_and(|(scheme, _)| {
            let is_letter = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
            !scheme.is_empty() && scheme.chars().all(is_letter)
        })
}

fn not_allowed(message: &'static str) -> Error {
    Error::invalid("media_not_allowed", message)
}

/// Says whether a host is one of this machine or of its network, as far as the
/// name tells.
fn is_inside(host: &Host<&str>) -> bool {
    let address = match host {
        Host::Domain(name) => {
            let name = name.strip_suffix('.').unwrap_or(name).to_lowercase();
            return !name.contains('.')
                || [".localhost", ".internal", ".local", ".lan", ".home.arpa"]
                    .iter()
                    .any(|end| name.ends_with(end));
        }
        Host::Ipv4(address) => IpAddr::V4(*address),
        Host::Ipv6(address) => address.to_canonical(),
    };
    match address {
        IpAddr::V4(v4) => {
            let [first, second, ..] = v4.octets();
            v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_broadcast()
                || v4.is_multicast()
                || first == 0
                || first == 100 && (64..128).contains(&second)
        }
        // Global unicast is 2000::/3, but for what carries an IPv4 address.
        IpAddr::V6(v6) => {
            let [first, second, ..] = v6.segments();
            first & 0xe000 != 0x2000 || first == 0x2002 || first == 0x2001 && second == 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Size, openai::Endpoint};

    fn check(hosts: &[&str], url: &str) -> std::result::Result<(), String> {
        let media = Media::new(MediaConfig {
            hosts: hosts.iter().map(|&host| host.to_owned()).collect(),
            data_url: Size(100),
        })
        .map_err(|why| why.path)?;
        let url = serde_json::to_string(url).unwrap();
        let bodies = [
            format!(r#"{{"type":"image_url","image_url":{{"url":{url}}}}}"#),
            format!(r#"{{"type":"input_image","image_url":{url}}}"#),
            format!(r#"{{"type":"video_url","Video_\u0075rl":{{"\u0055rl":{url}}}}}"#),
            format!(r#"{{"type":"input_file","file_url":{url}}}"#),
            format!(r#"{{"type":"image","image":{url}}}"#),
            format!(r#"{{"images":[{url}]}}"#),
            format!(r#"{{"type":"audio","audio":{{"url":{url}}}}}"#),
        ];
        let mut last = Ok(());
        for (nth, part) in bodies.iter().enumerate() {
            let body = format!(
                r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"text","text":"see http://a.b"}},{part}]}}]}}"#
            );
            let request = ApiRequest::parse(Endpoint::ChatCompletions, body.into(), 64).unwrap();
            let came = media.check(&request, &Hits::default());
            let came = came.map_err(|error| error.code.unwrap().into_owned());
            assert!(nth == 0 || last == came, "{part}");
            last = came;
        }
        last
    }

    #[test]
    fn by_default_only_what_the_prompt_carries() {
        assert_eq!(check(&[], "data:image/png;base64,AAAA"), Ok(()));
        let large = format!("DATA:image/png;base64,{}", "A".repeat(100));
        assert_eq!(check(&[], &large), Err("media_too_large".to_owned()));
        for url in [
            "https://example.org/a.png",
            "http://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
            " \u{1}file:///etc/passwd",
            "//example.org/a.png",
            "/etc/passwd",
            "ftp://example.org",
            "",
        ] {
            assert_eq!(
                check(&[], url),
                Err("media_not_allowed".to_owned()),
                "{url}"
            );
        }
    }

    #[test]
    fn a_host_is_no_address() {
        for host in ["http://x", "x/y", "x:80", "a@b", ""] {
            let refused = check(&["*.example.org", host], "data:,");
            assert_eq!(refused, Err("policy.media.hosts[1]".to_owned()), "{host}");
        }
        assert_eq!(check(&["[2001:db8::1]"], "data:,"), Ok(()));
    }

    fn checked(endpoint: Endpoint, body: &str) -> Option<String> {
        let media = Media::new(MediaConfig {
            hosts: Vec::new(),
            data_url: Size(300),
        })
        .unwrap();
        let request = ApiRequest::parse(endpoint, body.to_owned().into(), 64).unwrap();
        let came = media.check(&request, &Hits::default());
        came.err().map(|error| error.code.unwrap().into_owned())
    }

    #[test]
    fn what_looks_like_an_address_in_a_part_is_one() {
        let refused = Some("media_not_allowed".to_owned());
        let bytes = "/9j/4AAQ".repeat(16);
        for (part, came) in [
            (
                r#"{"type":"new","source":{"type":"url","where":"http://10.0.0.1/a"}}"#,
                &refused,
            ),
            (
                r#"{"type":"file","file":{"file_data":" HTTPS:\\example.org"}}"#,
                &refused,
            ),
            (
                r#"{"type":"file","file":{"file_data":"h\tttp://example.org"}}"#,
                &refused,
            ),
            (r#"{"type":"new","a":["gopher://a.b"]}"#, &refused),
            (r#"{"type":"image","image":"/etc/passwd"}"#, &refused),
            (r#"{"type":"image","image":"FILE:/etc/passwd"}"#, &refused),
            (&format!(r#"{{"image":"{bytes}"}}"#), &None),
            (
                &format!(r#"{{"image":"{}"}}"#, bytes.repeat(3)),
                &Some("media_too_large".to_owned()),
            ),
            (r#"{"type":"text","text":"https://example.org"}"#, &None),
            (
                r#"{"type":"output_text","text":"a","annotations":[{"url":"https://a.b","title":"t"}]}"#,
                &None,
            ),
            (
                r#"{"type":"input_audio","input_audio":{"data":"AAAA","format":"wav"}}"#,
                &None,
            ),
            (r#""https://example.org""#, &None),
        ] {
            let chat =
                format!(r#"{{"model":"m","messages":[{{"role":"user","content":[{part}]}}]}}"#);
            assert_eq!(checked(Endpoint::ChatCompletions, &chat), *came, "{part}");
            let items =
                format!(r#"{{"model":"m","input":[{{"role":"user","content":[{part}]}}]}}"#);
            assert_eq!(checked(Endpoint::Responses, &items), *came, "{part}");
            let embed = format!(r#"{{"model":"m","input":[{part}]}}"#);
            assert_eq!(checked(Endpoint::Embeddings, &embed), *came, "{part}");
        }
    }

    #[test]
    fn what_is_only_told_of_addresses_goes_through() {
        for body in [
            r#"{"model":"m","messages":[{"role":"assistant","audio":{"id":"audio_1"},"annotations":[{"url":"https://a.b"}]},{"role":"user","name":"https://a.b","content":"https://a.b"}]}"#,
            r#"{"model":"m","messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"https://a.b"}}]},{"role":"tool","content":"https://a.b"}]}"#,
            r#"{"model":"m","messages":[{}],"tools":[{"function":{"parameters":{"properties":{"image":{"type":"string"}},"examples":[{"image":"a.png","audio":"http://a.b"}]}}}]}"#,
        ] {
            assert_eq!(checked(Endpoint::ChatCompletions, body), None, "{body}");
        }
        let items = r#"{"model":"m","input":[{"type":"web_search_call","action":{"type":"open_page","url":"https://a.b"}},{"type":"function_call_output","output":"https://a.b"}]}"#;
        assert_eq!(checked(Endpoint::Responses, items), None);
        let texts = r#"{"model":"m","input":["https://a.b"]}"#;
        assert_eq!(checked(Endpoint::Embeddings, texts), None);
    }

    #[test]
    fn hosts_are_allowed_by_name_and_never_the_inside_by_a_star() {
        let hosts = ["*.example.org", "10.0.0.7"];
        for (url, fits) in [
            ("https://cdn.example.org/a", true),
            ("https://CDN.EXAMPLE.ORG./a", true),
            ("http://10.0.0.7/a", true),
            ("http://167772167/a", true),
            ("https://example.org/a", false),
            ("https://example.org.evil.net/a", false),
            ("https://cdn.example.org@evil.net/a", false),
            ("http://10.0.0.8/a", false),
            ("file://cdn.example.org/a", false),
        ] {
            assert_eq!(check(&hosts, url).is_ok(), fits, "{url}");
        }
        for (url, fits) in [
            ("https://anything.net/a", true),
            ("http://8.8.8.8/a", true),
            ("http://[2606:4700::1]/a", true),
            ("http://127.0.0.1/a", false),
            ("http://0x7f.1/a", false),
            ("http://2852039166/a", false),
            ("http://[::ffff:169.254.169.254]/a", false),
            ("http://[fd00:ec2::254]/a", false),
            ("http://[::1]/a", false),
            ("http://localhost:9000/a", false),
            ("http://metadata.google.internal/a", false),
            ("gopher://anything.net/a", false),
        ] {
            assert_eq!(check(&["*"], url).is_ok(), fits, "{url}");
        }
    }
}
