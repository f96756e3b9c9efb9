//! Calls to servers that are no upstreams: search engines, webhooks.
//!
//! An operator names an [`Endpoint`] in the YAML, and nothing else is ever
//! called: what a client, a model or a page says cannot lead a call elsewhere.
//! Start at [`Outbound::send`].
//!
//! **Invariant:** the address that was checked is the one that is connected to:
//! the check is in the resolver of the HTTP client, so that a name which changes
//! its mind between two lookups gains nothing. Redirects are not followed, no
//! proxy of the environment is used, and no body is kept beyond its bound,
//! counted after decompression.

use std::{
    error::Error as StdError,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use pingora::tls::{
    ClientConfig, RootCertStore, install_default_crypto_provider,
    load_platform_certs_incl_env_into_store,
};
use reqwest::{
    Client,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect,
};
use url::{Host, Url};

/// How long an idle connection is kept.
const IDLE: Duration = Duration::from_secs(30);
/// The most idle connections to one host.
const IDLE_MAX: usize = 8;
/// How long a connection may take to come about, TLS included, if the call's
/// own deadline leaves as much.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which addresses an endpoint may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Those of the public Internet alone: for what is not the operator's own.
    Public,
    /// Those of this machine and its networks too: for URLs that an operator
    /// wrote. Link-local addresses, where clouds keep their credentials, never.
    Private,
}

impl Reach {
    /// Returns whether an endpoint of this reach may have this address.
    pub fn allows(self, address: IpAddr) -> bool {
        let address = inner(address);
        match self {
            Self::Public => is_public(address),
            Self::Private => !is_forbidden(address),
        }
    }
}

/// Where calls may go: an origin, and the URL that was written for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    url: Url,
    reach: Reach,
}

/// What a text lacks to be an endpoint. Never repeats the text, which may hold
/// a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected http:// or https:// with a host: {0}")]
pub struct EndpointError(&'static str);

impl Endpoint {
    /// Reads a URL.
    ///
    /// # Errors
    /// It is none for HTTP, or of a place that its reach does not cover.
    pub fn parse(text: &str, reach: Reach) -> Result<Self, EndpointError> {
        let url = Url::parse(text).map_err(|_why| EndpointError("not a URL"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(EndpointError("another scheme"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(EndpointError("a user or password"));
        }
        if url.fragment().is_some() {
            return Err(EndpointError("a fragment"));
        }
        if url.port() == Some(0) {
            return Err(EndpointError("port 0"));
        }
        let literal = match url.host() {
            None => return Err(EndpointError("no host")),
            Some(Host::Domain(_)) => None,
            Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
        };
        // A resolver is not asked about these.
        if literal.is_some_and(|ip| !reach.allows(ip)) {
            return Err(EndpointError("an address that must not be called"));
        }
        Ok(Self { url, reach })
    }

    /// Returns the URL as it was written, to be extended for a call.
    pub fn url(&self) -> &Url {
        &self.url
    }
}

impl fmt::Debug for Endpoint {
    /// The origin alone: paths of webhooks are secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url.origin().ascii_serialization())
    }
}

/// One call.
#[derive(Clone)]
pub struct Outgoing {
    /// GET or POST.
    pub method: Method,
    /// Of the endpoint's origin, with any path and query.
    pub url: Url,
    /// Its header fields; `User-Agent` is Forebay's unless it is among them.
    pub headers: HeaderMap,
    /// Empty for GET.
    pub body: Bytes,
}

impl Outgoing {
    /// Makes a GET.
    pub fn get(url: Url) -> Self {
        Self {
            method: Method::GET,
            url,
            headers: HeaderMap::new(),
            body: Bytes::new(),
        }
    }

    /// Makes a POST.
    pub fn post(url: Url, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        let mut headers = HeaderMap::new();
        let content_type = HeaderValue::from_static(content_type);
        headers.insert(header::CONTENT_TYPE, content_type);
        Self {
            method: Method::POST,
            url,
            headers,
            body: body.into(),
        }
    }

    /// Adds a header field.
    #[must_use]
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }
}

impl fmt::Debug for Outgoing {
    /// No URL, no header and no body: there are keys and words of users in them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("method", &self.method)
            .field("body", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// What was answered, read whole.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// The status; a redirect is one like any other.
    pub status: StatusCode,
    /// The header fields.
    pub headers: HeaderMap,
    /// The body, decompressed.
    pub body: Bytes,
}

/// Why a call has no answer. Holds no address, no URL and no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The call was to another origin than the endpoint's, or the name has none
    /// but addresses that must not be called.
    #[error("the address must not be called")]
    Forbidden,
    /// The name has no address.
    #[error("the name could not be resolved")]
    Unresolved,
    /// Nobody accepted the connection, or TLS failed.
    #[error("no connection")]
    Unreachable,
    /// The deadline passed.
    #[error("no answer in time")]
    TooLate,
    /// The body is larger than was allowed.
    #[error("the answer is too large")]
    TooLarge,
    /// The answer broke off, or is none.
    #[error("the answer is broken")]
    Broken,
}

/// The HTTP client for such calls. One per process is enough.
pub struct Outbound {
    public: Client,
    private: Client,
}

impl Outbound {
    /// Makes the client. Reads the system's certificates.
    pub fn new() -> Self {
        install_default_crypto_provider();
        let mut store = RootCertStore::empty();
        // What was read before the error is kept; without any, https fails.
        if let Err(why) = load_platform_certs_incl_env_into_store(&mut store) {
            log::warn!("the system's certificates cannot be read: {why}");
        }
        let tls = ClientConfig::builder()
            .with_root_certificates(store)
            .with_no_client_auth();
        Self {
            public: client(tls.clone(), Reach::Public),
            private: client(tls, Reach::Private),
        }
    }

    /// Makes a call, and reads the answer whole: at most `most_bytes`, and
    /// before `until`.
    ///
    /// # Errors
    /// Why there is no whole answer. An answer of any status is none of them.
    pub async fn send(
        &self,
        to: &Endpoint,
        call: Outgoing,
        most_bytes: usize,
        until: Instant,
    ) -> Result<Incoming, Failure> {
        if call.url.origin() != to.url.origin() {
            return Err(Failure::Forbidden);
        }
        let client = match to.reach {
            Reach::Public => &self.public,
            Reach::Private => &self.private,
        };
        let exchange = async {
            let request = client
                .request(call.method, call.url)
                .headers(call.headers)
                .body(call.body);
            let answer = request.send().await.map_err(|why| cause_of(&why))?;
            read(answer, most_bytes).await
        };
        match tokio::time::timeout_at(until.into(), exchange).await {
            Ok(result) => result,
            Err(_elapsed) => Err(Failure::TooLate),
        }
    }
}

impl Default for Outbound {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound").finish_non_exhaustive()
    }
}

fn client(tls: ClientConfig, reach: Reach) -> Client {
    Client::builder()
        .tls_backend_preconfigured(tls)
        .dns_resolver(Arc::new(Checked(reach)))
        .redirect(redirect::Policy::none())
        .no_proxy()
        .referer(false)
        .retry(reqwest::retry::never())
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(IDLE_MAX)
        .user_agent(concat!("forebay/", env!("CARGO_PKG_VERSION")))
        .build()
        .expect("TLS is configured, and nothing else in it can fail")
}

/// Reads a body piece by piece, so that a small one that swells is found out
/// before it has.
async fn read(mut answer: reqwest::Response, most_bytes: usize) -> Result<Incoming, Failure> {
    let (status, headers) = (answer.status(), answer.headers().clone());
    let length = answer.content_length().unwrap_or(0);
    if usize::try_from(length).unwrap_or(usize::MAX) > most_bytes {
        return Err(Failure::TooLarge);
    }
    let mut body = BytesMut::new();
    while let Some(piece) = answer.chunk().await.map_err(|why| cause_of(&why))? {
        if body.len() + piece.len() > most_bytes {
            return Err(Failure::TooLarge);
        }
        body.extend_from_slice(&piece);
    }
    Ok(Incoming {
        status,
        headers,
        body: body.freeze(),
    })
}

/// Looks names up, and gives out only the addresses that may be called.
struct Checked(Reach);

impl Resolve for Checked {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = self.0;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await;
            let found: Vec<SocketAddr> = found.map_err(|_why| Refused::Unresolved)?.collect();
            if found.is_empty() {
                return Err(Refused::Unresolved.into());
            }
            let allowed: Vec<SocketAddr> = found
                .into_iter()
                .filter(|address| reach.allows(address.ip()))
                .collect();
            if allowed.is_empty() {
                return Err(Refused::Forbidden.into());
            }
            let allowed: Addrs = Box::new(allowed.into_iter());
            Ok(allowed)
        })
    }
}

/// Why [`Checked`] gives no address.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Refused {
    #[error("no address")]
    Unresolved,
    #[error("no address that may be called")]
    Forbidden,
}

fn cause_of(error: &reqwest::Error) -> Failure {
    let mut source = error.source();
    while let Some(inner) = source {
        match inner.downcast_ref() {
            Some(Refused::Unresolved) => return Failure::Unresolved,
            Some(Refused::Forbidden) => return Failure::Forbidden,
            None => source = inner.source(),
        }
    }
    if error.is_connect() {
        Failure::Unreachable
    } else if error.is_timeout() {
        Failure::TooLate
    } else {
        Failure::Broken
    }
}

/// Returns the IPv4 address that an IPv6 one stands for: mapped, of NAT64, of
/// 6to4. Whoever is connected to is that one.
fn inner(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    let low = |high: u16, low: u16| {
        let bits = u32::from(high) << 16 | u32::from(low);
        IpAddr::V4(Ipv4Addr::from_bits(bits))
    };
    match v6.segments() {
        [0, 0, 0, 0, 0, 0xffff, a, b] => low(a, b),
        [0x64, 0xff9b, 0, 0, 0, 0, a, b] => low(a, b),
        [0x2002, a, b, ..] => low(a, b),
        // `::a.b.c.d`, which nobody uses any more, but for :: and ::1.
        [0, 0, 0, 0, 0, 0, a, b] if a != 0 => low(a, b),
        _ => address,
    }
}

/// Addresses that nothing good ever listens on: link-local ones and those where
/// clouds hand out credentials, and such as are no single machine's.
fn is_forbidden(address: IpAddr) -> bool {
    /// Alibaba's, Oracle's and AWS's (IPv6) metadata outside the link-local nets.
    const METADATA_V4: [Ipv4Addr; 2] = [
        Ipv4Addr::new(100, 100, 100, 200),
        Ipv4Addr::new(192, 0, 0, 192),
    ];
    const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match address {
        IpAddr::V4(ip) => {
            let [first, ..] = ip.octets();
            first == 0 || first >= 224 || ip.is_link_local() || METADATA_V4.contains(&ip)
        }
        IpAddr::V6(ip) => {
            ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || ip == METADATA_V6
        }
    }
}

/// Says whether an address is of the public Internet, by IANA's registries of
/// special-purpose addresses.
fn is_public(address: IpAddr) -> bool {
    if is_forbidden(address) {
        return false;
    }
    match address {
        IpAddr::V4(ip) => {
            let special = match ip.octets() {
                [100, second, ..] => second & 0xc0 == 64,
                [192, 0, 0, _] | [192, 88, 99, _] => true,
                [198, second, ..] => second & 0xfe == 18,
                _ => false,
            };
            !(special || ip.is_private() || ip.is_loopback() || ip.is_documentation())
        }
        IpAddr::V6(ip) => match ip.segments() {
            [0x2001, second, ..] => second >= 0x200 && second != 0xdb8,
            [0x3fff, second, ..] => second >= 0x1000,
            [first, ..] => first & 0xe000 == 0x2000,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str, reach: Reach) -> Result<Endpoint, EndpointError> {
        Endpoint::parse(url, reach)
    }

    #[test]
    fn an_address_of_the_inside_is_never_public_however_it_is_written() {
        for host in [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "017700000001",
            "0",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "100.64.0.1",
            "169.254.169.254",
            "192.0.0.192",
            "198.18.0.1",
            "192.0.2.1",
            "224.0.0.1",
            "255.255.255.255",
            "[::]",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:a00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[64:ff9b:1::1]",
            "[2002:7f00:1::]",
            "[2001::1]",
            "[2001:db8::1]",
            "[fc00::1]",
            "[fd12:3456::1]",
            "[fe80::1]",
            "[fec0::1]",
            "[ff02::1]",
            "[fd00:ec2::254]",
        ] {
            let url = format!("http://{host}/x");
            assert!(parse(&url, Reach::Public).is_err(), "{url}");
        }
        for host in ["8.8.8.8", "100.128.0.1", "172.32.0.1", "[2606:4700::1111]"] {
            assert!(
                parse(&format!("https://{host}"), Reach::Public).is_ok(),
                "{host}"
            );
        }
    }

    #[test]
    fn what_an_operator_names_may_be_inside_but_not_link_local() {
        for host in [
            "127.0.0.1:8080",
            "10.0.0.1",
            "192.168.1.1",
            "[::1]:1",
            "[fd12::1]",
        ] {
            assert!(
                parse(&format!("http://{host}"), Reach::Private).is_ok(),
                "{host}"
            );
        }
        for host in [
            "169.254.169.254",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::a9fe:a9fe]",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "100.100.100.200",
            "0.0.0.0",
            "239.1.1.1",
        ] {
            assert!(
                parse(&format!("http://{host}"), Reach::Private).is_err(),
                "{host}"
            );
        }
    }

    #[test]
    fn only_urls_of_http_without_a_user_are_endpoints() {
        for url in [
            "",
            "search.example.com",
            "ftp://search.example.com",
            "file:///etc/passwd",
            "gopher://x:1/",
            "http://",
            "http://user@search.example.com",
            "http://user:pass@search.example.com",
            "http://search.example.com/#a",
            "http://search.example.com:0/",
        ] {
            assert!(parse(url, Reach::Private).is_err(), "{url}");
        }
        let secret = parse("https://hooks.example.com/T0/secret", Reach::Public).unwrap();
        assert_eq!(format!("{secret:?}"), "https://hooks.example.com");
    }

    #[tokio::test]
    async fn a_call_to_another_origin_is_not_made() {
        let endpoint = parse("http://search.example.com/x", Reach::Private).unwrap();
        for url in [
            "http://127.0.0.1/",
            "https://search.example.com/",
            "http://search.example.com:8080/",
            "http://search.example.com.evil.test/",
        ] {
            let call = Outgoing::get(Url::parse(url).unwrap());
            let until = Instant::now() + Duration::from_secs(20);
            let failure = Outbound::new().send(&endpoint, call, 1, until).await;
            assert_eq!(failure.unwrap_err(), Failure::Forbidden, "{url}");
        }
    }

    #[tokio::test]
    async fn a_public_name_that_leads_inside_is_not_called() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = format!("http://localhost:{port}/");
        let endpoint = parse(&url, Reach::Public).unwrap();
        let call = Outgoing::get(endpoint.url().clone());
        let until = Instant::now() + Duration::from_secs(20);
        let failure = Outbound::new().send(&endpoint, call, 1, until).await;
        assert_eq!(failure.unwrap_err(), Failure::Forbidden);
        let nobody = listener.accept().unwrap_err();
        assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock);
    }

    #[tokio::test]
    async fn a_deadline_that_has_passed_ends_the_call() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let endpoint = parse(&url, Reach::Private).unwrap();
        let call = Outgoing::get(endpoint.url().clone());
        let failure = Outbound::new()
            .send(&endpoint, call, 1, Instant::now())
            .await;
        assert_eq!(failure.unwrap_err(), Failure::TooLate);
    }
}
