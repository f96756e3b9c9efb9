//! What an upstream is good for, in a word, and why.

use std::time::Duration;

/// What an upstream is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It may be used.
    Ready,
    /// Its model is not loaded yet.
    Loading,
    /// It may be used, but not for every model, or its checks begin to fail.
    Degraded,
    /// It does not answer as it should, and has not since.
    Down,
    /// It gets nothing new; what is under way ends as usual.
    Draining,
    /// It asked for a pause.
    Cooling,
    /// The configuration switched it off.
    Off,
}

impl State {
    /// Every state there is.
    pub const ALL: [Self; 7] = [
        Self::Ready,
        Self::Loading,
        Self::Degraded,
        Self::Down,
        Self::Draining,
        Self::Cooling,
        Self::Off,
    ];

    /// Returns the word for logs, `/health` and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Loading => "loading",
            Self::Degraded => "degraded",
            Self::Down => "down",
            Self::Draining => "draining",
            Self::Cooling => "cooling",
            Self::Off => "off",
        }
    }

    /// Returns whether requests go there.
    pub const fn serves(self) -> bool {
        matches!(self, Self::Ready | Self::Degraded)
    }
}

/// Why an upstream is in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Nothing more than the state says.
    None,
    /// It cannot be reached.
    Connect,
    /// There is no TLS with it: see [`TlsFault`](super::TlsFault).
    Tls,
    /// It says of itself that it is not well.
    Check,
    /// It fails.
    Breaker,
    /// Its rate limit is reached.
    RateLimit,
    /// It is overloaded, and asked for a pause.
    Overload,
    /// The account behind the credential is out of money, or of its quota.
    Quota,
    /// The credential is not accepted.
    KeyBad,
}

impl Reason {
    /// Returns the word for logs, `/health` and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Check => "check",
            Self::Breaker => "breaker",
            Self::RateLimit => "rate_limit",
            Self::Overload => "overload",
            Self::Quota => "quota",
            Self::KeyBad => "key_bad",
        }
    }
}

/// A state with its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The state.
    pub state: State,
    /// Why.
    pub reason: Reason,
    /// How long it lasts at least, if that is known.
    pub wait: Option<Duration>,
}
