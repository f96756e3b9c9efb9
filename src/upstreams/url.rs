//! The base URL of an upstream, taken apart once.
//!
//! **Invariant:** a [`BaseUrl`] has a scheme of `http` or `https`, a host, and
//! nothing that would be lost on the way (no user, query or fragment).

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use url::{Host, Url};

/// How an upstream is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// In the clear.
    Http,
    /// Over TLS.
    Https,
}

impl Scheme {
    const fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Where an upstream is, and under which path its API begins.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BaseUrl {
    /// How it is spoken to.
    pub scheme: Scheme,
    /// A name in lower case, or an address; IPv6 without brackets.
    pub host: Box<str>,
    /// The port, the scheme's own if the URL names none.
    pub port: u16,
    /// The path before every request's own: empty, or `/…` with no slash at
    /// its end.
    pub prefix: Box<str>,
    /// The host if it is an address.
    ip: Option<IpAddr>,
}

/// What a text lacks to be a base URL. Never repeats the text, which may hold
/// a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected http:// or https:// with a host and perhaps a path: {0}")]
pub struct UrlError(&'static str);

impl BaseUrl {
    /// Returns the path of a request; `suffix` begins with a slash.
    pub fn target(&self, suffix: &str) -> String {
        debug_assert!(suffix.starts_with('/'), "{suffix} is no path");
        format!("{}{suffix}", self.prefix)
    }

    /// Returns the value of `Host`: no default port, IPv6 in brackets.
    pub fn authority(&self) -> String {
        let host = match self.ip {
            Some(IpAddr::V6(ip)) => format!("[{ip}]"),
            _ => self.host.to_string(),
        };
        if self.port == self.scheme.port() {
            host
        } else {
            format!("{host}:{}", self.port)
        }
    }

    /// Returns the place above a final `/v1`: where the API begins that a server
    /// has beside OpenAI's.
    #[must_use]
    pub fn above_v1(mut self) -> Self {
        if let Some(above) = self.prefix.strip_suffix("/v1") {
            self.prefix = above.into();
        }
        self
    }

    /// Returns whether TLS is spoken.
    pub fn is_tls(&self) -> bool {
        self.scheme == Scheme::Https
    }

    /// Returns the name that the certificate must be for; never empty.
    ///
    /// That matters: Pingora takes an empty SNI for "do not verify". An address
    /// is such a name too, and is not sent as SNI by rustls.
    pub fn tls_name(&self) -> &str {
        self.host.strip_suffix('.').unwrap_or(&self.host)
    }

    /// Returns the socket's address if the host is one and not a name.
    pub fn literal(&self) -> Option<SocketAddr> {
        self.ip.map(|ip| SocketAddr::new(ip, self.port))
    }
}

impl FromStr for BaseUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let Ok(url) = Url::parse(text) else {
            return Err(UrlError("not a URL"));
        };
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Err(UrlError("another scheme")),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UrlError("a user or password; use `key`"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(UrlError("a query or fragment"));
        }
        let (host, ip) = match url.host() {
            None => return Err(UrlError("no host")),
            Some(Host::Domain(name)) => (name.to_owned(), None),
            Some(Host::Ipv4(ip)) => (ip.to_string(), Some(IpAddr::V4(ip))),
            Some(Host::Ipv6(ip)) => (ip.to_string(), Some(IpAddr::V6(ip))),
        };
        let port = url.port().unwrap_or(scheme.port());
        if port == 0 {
            return Err(UrlError("port 0"));
        }
        Ok(Self {
            scheme,
            host: host.into(),
            port,
            prefix: url.path().trim_end_matches('/').into(),
            ip,
        })
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        write!(f, "{scheme}://{}{}", self.authority(), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(text: &str) -> BaseUrl {
        text.parse().unwrap()
    }

    #[test]
    fn a_path_prefix_stands_before_every_target() {
        for (text, target) in [
            (
                "https://api.cloudflare.com/client/v4/accounts/ID/ai/v1",
                "/client/v4/accounts/ID/ai/v1/chat/completions",
            ),
            ("http://gpu-1:8000/v1/", "/v1/chat/completions"),
            ("http://gpu-1:8000", "/chat/completions"),
            ("http://gpu-1:8000/", "/chat/completions"),
            ("http://gpu-1/a%20b/v1", "/a%20b/v1/chat/completions"),
        ] {
            assert_eq!(base(text).target("/chat/completions"), target, "{text}");
        }
    }

    #[test]
    fn a_servers_own_api_is_beside_v1() {
        for (text, target) in [
            ("http://127.0.0.1:11434", "/api/chat"),
            ("http://127.0.0.1:11434/", "/api/chat"),
            ("http://127.0.0.1:11434/v1", "/api/chat"),
            ("http://host/ollama/v1/", "/ollama/api/chat"),
            ("http://host/v11", "/v11/api/chat"),
        ] {
            assert_eq!(base(text).above_v1().target("/api/chat"), target, "{text}");
        }
    }

    #[test]
    fn the_host_field_leaves_out_default_ports_and_brackets_ipv6() {
        for (text, authority) in [
            ("https://API.OpenAI.com/v1", "api.openai.com"),
            ("https://api.openai.com:443/v1", "api.openai.com"),
            ("https://api.openai.com:80/v1", "api.openai.com:80"),
            ("http://127.0.0.1:80", "127.0.0.1"),
            ("http://127.0.0.1:11434/v1", "127.0.0.1:11434"),
            ("http://[::1]:8000/v1", "[::1]:8000"),
            ("http://[2001:DB8::1]/v1", "[2001:db8::1]"),
        ] {
            assert_eq!(base(text).authority(), authority, "{text}");
        }
    }

    #[test]
    fn only_addresses_are_literal() {
        assert_eq!(
            base("http://[::1]:8000").literal(),
            Some("[::1]:8000".parse().unwrap())
        );
        assert_eq!(
            base("https://10.0.0.1").literal(),
            Some("10.0.0.1:443".parse().unwrap())
        );
        assert_eq!(base("http://localhost:8000").literal(), None);
    }

    #[test]
    fn the_name_to_verify_is_never_empty_and_has_no_brackets_or_final_dot() {
        assert_eq!(base("https://[::1]").tls_name(), "::1");
        assert_eq!(base("https://10.0.0.1").tls_name(), "10.0.0.1");
        assert_eq!(base("https://api.openai.com.").tls_name(), "api.openai.com");
    }

    #[test]
    fn what_could_not_be_sent_faithfully_is_refused_without_repeating_it() {
        for text in [
            "",
            "localhost:8000",
            "/v1",
            "ftp://host",
            "http://",
            "http://user:secret@host/v1",
            "http://host/v1?key=secret",
            "http://host/v1#secret",
            "http://host:0/v1",
            "http://host:99999/v1",
        ] {
            let refused = text.parse::<BaseUrl>().unwrap_err();
            assert!(!refused.to_string().contains("secret"), "{text}");
        }
    }

    #[test]
    fn what_is_displayed_can_be_parsed_again() {
        for text in ["http://[::1]:8000/v1", "https://api.openai.com/v1"] {
            assert_eq!(base(text).to_string(), text);
        }
    }
}
