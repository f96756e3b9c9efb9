//! Why TLS with an upstream failed: one of a few words, for people to see.
//!
//! Pingora keeps of rustls' error its text alone (0.9.1, protocols/tls/rustls/
//! client.rs: `e_explain` drops the cause), so the text it is. **Invariant:**
//! nothing of it is kept but which word it comes to: it holds what the server's
//! certificate says.

use std::fmt;

use pingora::{Error, ErrorType};

/// Why TLS with an upstream failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlsFault {
    /// Its certificate is no longer valid.
    Expired,
    /// Its certificate is not valid yet.
    NotValidYet,
    /// Its certificate is for another name.
    WrongName,
    /// Nobody who is trusted vouches for its certificate.
    Untrusted,
    /// Its certificate is no good for another reason.
    BadCertificate,
    /// It ended the handshake with an alert.
    Refused,
    /// The handshake failed otherwise: it closed, or speaks no TLS that we do.
    Handshake,
}

/// What the text of rustls says of a certificate begins with.
const CERTIFICATE: &str = "invalid peer certificate: ";
/// What an alert of the other side begins with.
const ALERT: &str = "received fatal alert";

impl TlsFault {
    /// Every fault there is.
    pub const ALL: [Self; 7] = [
        Self::Expired,
        Self::NotValidYet,
        Self::WrongName,
        Self::Untrusted,
        Self::BadCertificate,
        Self::Refused,
        Self::Handshake,
    ];

    /// Returns the word for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "certificate_expired",
            Self::NotValidYet => "certificate_not_valid_yet",
            Self::WrongName => "certificate_for_another_name",
            Self::Untrusted => "certificate_not_trusted",
            Self::BadCertificate => "certificate_invalid",
            Self::Refused => "handshake_refused",
            Self::Handshake => "handshake_failed",
        }
    }

    /// Returns what was wrong with TLS, if that is why there is no connection.
    /// A handshake that nobody answers in time is a connect that was not
    /// answered.
    pub fn of(error: &Error) -> Option<Self> {
        match error.etype() {
            ErrorType::InvalidCert => Some(Self::BadCertificate),
            ErrorType::TLSHandshakeFailure | ErrorType::HandshakeError => {
                Some(Self::of_text(&error.to_string()))
            }
            _ => None,
        }
    }

    /// Returns the same for a connection that ended before an answer. A server
    /// that wants our certificate says so behind a handshake that is complete
    /// for us (TLS 1.3).
    pub fn of_silence(error: &Error) -> Option<Self> {
        let refused = || error.to_string().contains(ALERT);
        (error.etype() == &ErrorType::ReadError && refused()).then_some(Self::Refused)
    }

    fn of_text(text: &str) -> Self {
        if let Some((_, why)) = text.split_once(CERTIFICATE) {
            return Self::of_certificate(why);
        }
        match text.contains(ALERT) {
            true => Self::Refused,
            false => Self::Handshake,
        }
    }

    fn of_certificate(why: &str) -> Self {
        let begins = |words: [&str; 2]| words.iter().any(|word| why.starts_with(word));
        if begins(["certificate expired", "Expired"]) {
            Self::Expired
        } else if begins(["certificate not valid yet", "NotValidYet"]) {
            Self::NotValidYet
        } else if begins(["certificate not valid for name", "NotValidForName"]) {
            Self::WrongName
        } else if begins(["UnknownIssuer", "Other(OtherError(CaUsedAsEndEntity"]) {
            // The second: it vouches for itself.
            Self::Untrusted
        } else {
            Self::BadCertificate
        }
    }
}

impl fmt::Display for TlsFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use pingora::ErrorSource;

    use super::*;

    fn failed(kind: ErrorType, text: &str) -> Box<Error> {
        let source = ErrorSource::Upstream;
        Error::create(kind, source, Some(text.to_owned().into()), None)
    }

    #[test]
    fn what_rustls_says_comes_to_one_of_a_few_words() {
        use TlsFault::{
            BadCertificate, Expired, Handshake, NotValidYet, Refused, Untrusted, WrongName,
        };
        for (text, wanted) in [
            (
                "certificate expired: verification time 9 (UNIX), but",
                Expired,
            ),
            (
                "certificate not valid yet: verification time 1 (UNIX)",
                NotValidYet,
            ),
            (
                "certificate not valid for name \"a\"; certificate is only",
                WrongName,
            ),
            ("UnknownIssuer, SNI: a", Untrusted),
            ("Other(OtherError(CaUsedAsEndEntity)), SNI: a", Untrusted),
            ("BadSignature, SNI: a", BadCertificate),
        ] {
            let text = format!("TLS connect() failed: cause: invalid peer certificate: {text}");
            let error = failed(ErrorType::TLSHandshakeFailure, &text);
            assert_eq!(TlsFault::of(&error), Some(wanted), "{text}");
        }
        for (text, wanted) in [
            ("cause: received fatal alert: HandshakeFailure", Refused),
            (
                "cause: received corrupt message of type InvalidContentType",
                Handshake,
            ),
            ("cause: tls handshake eof", Handshake),
        ] {
            let error = failed(ErrorType::TLSHandshakeFailure, text);
            assert_eq!(TlsFault::of(&error), Some(wanted), "{text}");
        }
        for kind in [ErrorType::ConnectRefused, ErrorType::ConnectTimedout] {
            assert_eq!(TlsFault::of(&failed(kind, "received fatal alert")), None);
        }
    }

    #[test]
    fn an_alert_in_place_of_an_answer_is_told_from_an_end() {
        let alert = failed(
            ErrorType::ReadError,
            "received fatal alert: CertificateRequired",
        );
        assert_eq!(TlsFault::of_silence(&alert), Some(TlsFault::Refused));
        let end = failed(ErrorType::ConnectionClosed, "received fatal alert");
        assert_eq!(TlsFault::of_silence(&end), None);
    }

    #[test]
    fn words_differ() {
        let words: std::collections::HashSet<_> = TlsFault::ALL.map(TlsFault::as_str).into();
        assert_eq!(words.len(), TlsFault::ALL.len());
    }
}
