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
    openai::{ApiRequest, cursor::Cursor, json},
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
/// Tensors in place of a picture: what a server makes of them is its own code.
const TENSORS: [&str; 4] = [
    "image_embeds",
    "audio_embeds",
    "video_embeds",
    "prompt_embeds",
];
/// The deepest nesting that is looked at; bodies are refused far before.
const DEPTH_MAX: usize = 256;

/// The rules about addresses.
pub(super) struct Media {
    hosts: Vec<Pattern>,
    data_max: usize,
}

impl Media {
    pub(super) fn new(config: MediaConfig) -> Self {
        Self {
            hosts: config
                .hosts
                .into_iter()
                .map(|host| Pattern::new(host.to_lowercase()))
                .collect(),
            data_max: config.data_url.get(),
        }
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
            self.walk(&mut cursor, false, 0).map_err(|error| {
                hits.note("media", error.code.as_deref().unwrap_or(""), 1);
                error.param(key)
            })?;
        }
        Ok(())
    }

    fn walk(&self, cursor: &mut Cursor<'_>, is_address: bool, depth: usize) -> Result<()> {
        match cursor.peek() {
            _ if depth > DEPTH_MAX => Err(not_allowed("the prompt is nested too deeply")),
            Some(b'"') => {
                let text = cursor.skip().unwrap_or_default();
                match is_address {
                    true => self.check_address(text),
                    false => Ok(()),
                }
            }
            Some(b'[') => {
                cursor.enter_array();
                while cursor.item() {
                    self.walk(cursor, is_address, depth + 1)?;
                }
                Ok(())
            }
            Some(b'{') => {
                cursor.enter_object();
                while let Some(key) = cursor.key() {
                    let key = plain(key);
                    if TENSORS.contains(&&*key) {
                        return Err(not_allowed("tensors are not accepted here"));
                    }
                    let named = ADDRESSES.contains(&&*key) || is_address && key == "url";
                    self.walk(cursor, named, depth + 1)?;
                }
                Ok(())
            }
            _ => {
                cursor.skip();
                Ok(())
            }
        }
    }

    fn check_address(&self, quoted: &[u8]) -> Result<()> {
        // What readers of URLs skip in front of one.
        let text = json::text(quoted).unwrap_or_default();
        let text = text.trim_matches(|c: char| c.is_whitespace() || c.is_control());
        let scheme = text.get(..5).unwrap_or_default();
        if scheme.eq_ignore_ascii_case("data:") {
            return match text.len() > self.data_max {
                true => Err(Error::refused(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "media_too_large",
                    format!("a data URL has more than {} bytes", self.data_max),
                )),
                false => Ok(()),
            };
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
        });
        let url = serde_json::to_string(url).unwrap();
        let bodies = [
            format!(r#"{{"type":"image_url","image_url":{{"url":{url}}}}}"#),
            format!(r#"{{"type":"input_image","image_url":{url}}}"#),
            format!(r#"{{"type":"video_url","Video_\u0075rl":{{"\u0055rl":{url}}}}}"#),
            format!(r#"{{"type":"input_file","file_url":{url}}}"#),
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
