//! Whom to trust over TLS: the system's authorities or an upstream's own file.
//!
//! There is one Pingora `Connector` for everything, and an upstream's own
//! authorities travel with its peer (`options.ca`). The other way, a connector
//! per file, would keep TLS sessions for resumption, but it reads the file
//! again by its path and panics if that fails, splits the connection pool, and
//! leaves no way to switch the check off where the system's store is empty.
//! The price is a rustls configuration and a full handshake for each new
//! connection to an upstream with its own authorities; connections are pooled.
//!
//! **Invariant:** nothing here panics, whatever the system's store or a file
//! holds.

use std::{path::Path, sync::Arc};

use pingora::{
    connectors::ConnectorOptions,
    protocols::tls::CaType,
    tls::{RootCertStore, load_platform_certs_incl_env_into_store},
    utils::tls::WrappedX509,
};
use x509_parser::{certificate::X509Certificate, pem::Pem, prelude::FromDer};

/// Certificates of authorities, as a peer takes them, and their bytes to
/// compare. Never empty.
#[derive(Clone, Debug)]
pub struct Authorities {
    pub(super) list: Arc<CaType>,
    pem: Arc<[u8]>,
}

impl PartialEq for Authorities {
    fn eq(&self, other: &Self) -> bool {
        self.pem == other.pem
    }
}

/// Why a file of authorities is of no use.
#[derive(Debug, thiserror::Error)]
pub enum AuthoritiesError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] std::io::Error),
    /// It holds no certificate, or something that is not one.
    #[error("expected one or more certificates in PEM: {0}")]
    Malformed(String),
}

impl Authorities {
    /// Reads a PEM file.
    ///
    /// # Errors
    /// When the file cannot be read, or holds anything but certificates.
    pub fn read(path: &Path) -> Result<Self, AuthoritiesError> {
        Self::parse(&std::fs::read(path)?)
    }

    /// Parses PEM; text around the blocks is ignored, as OpenSSL does.
    ///
    /// # Errors
    /// When there is no certificate, or anything but certificates.
    pub fn parse(pem: &[u8]) -> Result<Self, AuthoritiesError> {
        let list = Pem::iter_from_buffer(pem)
            .map(|block| {
                let block = block.map_err(|why| AuthoritiesError::Malformed(why.to_string()))?;
                if block.label != "CERTIFICATE" {
                    return Err(AuthoritiesError::Malformed(format!(
                        "found {}",
                        block.label
                    )));
                }
                certificate(block.contents)
            })
            .collect::<Result<Vec<_>, _>>()?;
        if list.is_empty() {
            return Err(AuthoritiesError::Malformed("found none".to_owned()));
        }
        Ok(Self {
            list: list.into(),
            pem: pem.into(),
        })
    }

    /// Returns a stand-in for an upstream whose certificate is not checked.
    ///
    /// Even to check nothing, rustls wants a store that is not empty (Pingora
    /// 0.9.1, connectors/tls/rustls/mod.rs: `WebPkiServerVerifier::builder`), and
    /// a container without ca-certificates has none. Nobody has the key of this
    /// one. It can go when `verification_off_needs_no_system_store` passes
    /// without it.
    pub(super) fn unchecked() -> Self {
        Self::parse(PLACEHOLDER.as_bytes()).expect("the placeholder is a certificate")
    }
}

/// A self-signed certificate whose key was thrown away.
const PLACEHOLDER: &str = "\
-----BEGIN CERTIFICATE-----
MIIBcTCCASOgAwIBAgIUVaWWWHuHoeEyMSLrEhsXQlFYlkkwBQYDK2VwMC0xKzAp
BgNVBAMMImZvcmViYXkgcGxhY2Vob2xkZXI6IHNpZ25zIG5vdGhpbmcwIBcNMjYx
MTIxMDMwMzQ4WhgPMjEyNjEwMjgwMzAzNDhaMC0xKzApBgNVBAMMImZvcmViYXkg
cGxhY2Vob2xkZXI6IHNpZ25zIG5vdGhpbmcwKjAFBgMrZXADIQA5AuFP0pXl0Uso
dVBcoKhL7NGmyK+D0uXChGogeXzsPqNTMFEwHQYDVR0OBBYEFB/DVaQzdv3js630
ajmwhb01e8nkMB8GA1UdIwQYMBaAFB/DVaQzdv3js630ajmwhb01e8nkMA8GA1Ud
EwEB/wQFMAMBAf8wBQYDK2VwA0EAr0ASyh2Ows3S9Qju4Kd8tpDIgSVIQLaKFwlF
gucM5aubPNAmAL2GV5XWCwSFOTLvLyJD/YR9C4f0CjQMZT7DCg==
-----END CERTIFICATE-----
";

/// Wraps one certificate after both parsers that will read it later have
/// accepted it.
fn certificate(der: Vec<u8>) -> Result<WrappedX509, AuthoritiesError> {
    RootCertStore::empty()
        .add(der.clone().into())
        .map_err(|why| AuthoritiesError::Malformed(why.to_string()))?;
    WrappedX509::try_new(der, |der| {
        X509Certificate::from_der(der)
            .map(|(_, certificate)| certificate)
            .map_err(|why| AuthoritiesError::Malformed(why.to_string()))
    })
}

/// Returns the options of the one client connector; `pool_size` is the most
/// idle connections it keeps.
///
/// `Connector::new` panics if the system's store cannot be read or holds a bad
/// certificate. That is found out here first, and an empty store is taken
/// instead: then only `https` upstreams without a `tls.ca` of their own fail, at
/// their handshake. A store that is just empty is no error to Pingora.
pub fn connector_options(pool_size: usize) -> ConnectorOptions {
    let mut store = RootCertStore::empty();
    let loaded = load_platform_certs_incl_env_into_store(&mut store);
    options_for(pool_size, loaded.map(|()| store.len()))
}

/// `authorities` is how many the system's store holds.
fn options_for(pool_size: usize, authorities: pingora::Result<usize>) -> ConnectorOptions {
    let mut options = ConnectorOptions::new(pool_size);
    match authorities {
        Ok(0) => log::warn!(
            "the system trusts no certificate authority: https upstreams need tls.ca or SSL_CERT_FILE"
        ),
        Ok(_) => {}
        Err(why) => {
            log::error!("the system's certificate authorities cannot be loaded: {why}");
            options.ca_file = Some("/dev/null".to_owned());
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, path::PathBuf};

    use pingora::{
        connectors::TransportConnector,
        tls::{CertificateDer, PrivateKeyDer, ServerConfig, TlsAcceptor},
    };
    use tokio::net::TcpListener;

    use super::*;
    use crate::upstreams::upstream::tests::built;

    /// An authority whose key was thrown away when it had signed `LEAF`.
    const CA: &str = "\
-----BEGIN CERTIFICATE-----
MIIBqjCCAU+gAwIBAgIUNhzB+4f7T96u9CJcoG5MmTxxpRUwCgYIKoZIzj0EAwIw
ITEfMB0GA1UEAwwWZm9yZWJheSB0ZXN0IGF1dGhvcml0eTAgFw0yNjExMjEwMzE1
MTlaGA8yMTI2MTAyODAzMTUxOVowITEfMB0GA1UEAwwWZm9yZWJheSB0ZXN0IGF1
dGhvcml0eTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNOzsKr3XmP8pJlF+EWx
NHWiBz44pXJL4v2fQtB2w4Tk+iX09tSR3YIqj3gErYa/gva9FGqUdptrGZGuBoD5
mZejYzBhMB0GA1UdDgQWBBTBhdgDwX4D7UYVPcGQKZQN/8tzSDAfBgNVHSMEGDAW
gBTBhdgDwX4D7UYVPcGQKZQN/8tzSDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB
/wQEAwICBDAKBggqhkjOPQQDAgNJADBGAiEA3X5NBJmoQfuAvNzFBdKQi5M8AbD6
Y1MVDfUCCRrVCD0CIQDW2mATrwMFDS/fiIQhC9FCUcxw/fOv8hMmKnxDurnuTw==
-----END CERTIFICATE-----
";

    /// Valid for localhost and 127.0.0.1, for a hundred years.
    const LEAF: &str = "\
-----BEGIN CERTIFICATE-----
MIIBuDCCAV2gAwIBAgIUK96TEg5ByJerhA1kRTUIo8Ftu+QwCgYIKoZIzj0EAwIw
ITEfMB0GA1UEAwwWZm9yZWJheSB0ZXN0IGF1dGhvcml0eTAgFw0yNjExMjEwMzE1
MTlaGA8yMTI2MTAyODAzMTUxOVowFDESMBAGA1UEAwwJbG9jYWxob3N0MFkwEwYH
KoZIzj0CAQYIKoZIzj0DAQcDQgAESYvukb9Qt9Wc8QvYj5j3kE5aMj/foTrDMI1R
ZGACJchLd3m+iTDr/YmgV5nykI3YdrdoKTK1WlRSrFwNfJ6+7qN+MHwwGgYDVR0R
BBMwEYIJbG9jYWxob3N0hwR/AAABMAkGA1UdEwQCMAAwEwYDVR0lBAwwCgYIKwYB
BQUHAwEwHQYDVR0OBBYEFCnmry2Xhvm5lSN6Sp1j5/g1mvBMMB8GA1UdIwQYMBaA
FMGF2APBfgPtRhU9wZAplA3/y3NIMAoGCCqGSM49BAMCA0kAMEYCIQDw/X0ZN+ic
VJC2iWpp7qAQP6LHUuY7/oi64x0HawLZ4QIhAKhxN0xnt2Qt0w76HBgM1xLnsVYp
M9ZfEMyfS4NBShCp
-----END CERTIFICATE-----
";

    /// The key of `LEAF`, worth nothing.
    const KEY: &str = "\
-----BEGIN TEST KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgD4/uL5gpbuZ/gyVx
+mFuUEhc/WLzW+SaXqvAzC/gaqGhRANCAARJi+6Rv1C31ZzxC9iPmPeQTloyP9+h
OsMwjVFkYAIlyEt3eb6JMOv9iaBXmfKQjdh2t2gpMrVaVFKsXA18nr7u
-----END TEST KEY-----
";

    fn der(pem: &str) -> Vec<u8> {
        let mut blocks = Pem::iter_from_buffer(pem.as_bytes());
        blocks.next().unwrap().unwrap().contents
    }

    /// Starts a TLS server on loopback that presents `LEAF` to whoever comes.
    async fn server() -> SocketAddr {
        pingora::tls::install_default_crypto_provider();
        let chain = vec![CertificateDer::from(der(LEAF))];
        let key = PrivateKeyDer::try_from(der(KEY)).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move { acceptor.accept(stream).await.is_ok() });
            }
        });
        at
    }

    /// Writes `CA` to a file of this test's own.
    fn ca_file(test: &str) -> PathBuf {
        let name = format!("forebay-{}-{test}.pem", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, CA).unwrap();
        path
    }

    /// Connects to an upstream as the exchange would, with a system store that
    /// is empty.
    async fn connects(host: &str, port: u16, tls: &str) -> bool {
        let yaml = format!("{{ name: a, url: 'https://{host}:{port}/v1', tls: {tls} }}");
        let upstream = built(&yaml);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        upstream.addresses.resolve_now(deadline).await.unwrap();
        let connector = without_system_store();
        // `localhost` may be an address more than the server listens on.
        for _ in upstream.addresses.all() {
            let peer = upstream.peer().unwrap();
            if connector.new_stream(&peer).await.is_ok() {
                return true;
            }
            let now = std::time::Instant::now();
            upstream.not_sent(&peer, None, now, now);
        }
        false
    }

    fn without_system_store() -> TransportConnector {
        let broken = pingora::Error::e_explain(pingora::ErrorType::InvalidCert, "as a test");
        TransportConnector::new(Some(options_for(8, broken)))
    }

    #[tokio::test]
    async fn an_own_authority_vouches_for_a_name_and_for_an_address() {
        let port = server().await.port();
        let path = ca_file("own");
        let tls = format!("{{ ca: '{}' }}", path.display());
        assert!(connects("localhost", port, &tls).await);
        assert!(connects("127.0.0.1", port, &tls).await);
        assert!(
            !connects("127.0.0.2", port, &tls).await,
            "not in the certificate"
        );
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_stranger_is_refused_also_at_an_address_that_sends_no_sni() {
        let port = server().await.port();
        assert!(!connects("localhost", port, "{}").await);
        assert!(!connects("127.0.0.1", port, "{}").await);
    }

    #[tokio::test]
    async fn verification_off_needs_no_system_store() {
        let port = server().await.port();
        assert!(connects("localhost", port, "{ verify: false }").await);
        assert!(connects("127.0.0.1", port, "{ verify: false }").await);
    }

    #[test]
    fn a_system_store_that_cannot_be_loaded_does_not_panic() {
        let broken = pingora::Error::e_explain(pingora::ErrorType::InvalidCert, "as a test");
        let options = options_for(8, broken);
        assert!(
            options.ca_file.is_some(),
            "Pingora would load the store again"
        );
        TransportConnector::new(Some(options));
        TransportConnector::new(Some(connector_options(8)));
    }

    #[test]
    fn what_is_no_certificate_is_told_and_never_parsed_later() {
        let garbled = CA.replace("MII", "MIJ");
        let with_key = format!("{CA}{KEY}");
        for pem in ["", "hello", &garbled, &with_key] {
            let refused = Authorities::parse(pem.as_bytes()).unwrap_err();
            assert!(matches!(refused, AuthoritiesError::Malformed(_)), "{pem}");
        }
        let trailing = [der(CA), vec![0]].concat();
        assert!(
            certificate(trailing).is_err(),
            "rustls would refuse it later"
        );
        let missing = Authorities::read(Path::new("/nowhere/ca.pem")).unwrap_err();
        assert!(matches!(missing, AuthoritiesError::Unreadable(_)));
    }

    #[test]
    fn a_bundle_is_read_whole() {
        let bundle = format!("first\n{CA}second\n{LEAF}");
        assert_eq!(Authorities::parse(bundle.as_bytes()).unwrap().list.len(), 2);
    }
}
