//! What must survive the process: a store, and the thread that writes to it.
//!
//! Start at [`Store`], what a store can do, and [`STORES`], every kind there is,
//! by the scheme of its URL. [`Journal`] is how the rest of the gateway uses one:
//! it never waits for it.
//!
//! **Invariant:** nothing here runs where requests are served. What is used is
//! in memory; the store is read once, before the first request, and written
//! behind.

mod journal;
mod sqlite;

use std::{fmt, path::Path, sync::Arc};

use async_trait::async_trait;

pub use journal::{Journal, Journals};

/// Every kind of store there is. A new one is its file and a line here.
pub const STORES: &[Kind] = &[sqlite::KIND];

/// One line of [`STORES`].
pub struct Kind {
    /// What its URLs begin with, up to the colon.
    pub scheme: &'static str,
    /// Makes of the rest of the URL what [`open`](Self::open) takes; the path is
    /// the folder of the configuration file. The error is what was expected.
    locate: fn(&str, &Path) -> Result<String, &'static str>,
    open: OpenFn,
}

/// Opens a store.
type OpenFn =
    for<'a> fn(&'a str) -> futures_util::future::BoxFuture<'a, Result<Opened, StoreError>>;

/// A store that has been opened.
pub struct Opened {
    /// The store.
    pub store: Box<dyn Store>,
    /// Whether there is nothing in it yet.
    pub is_new: bool,
}

/// Keeps what the gateway must not forget. One connection, used by one thread.
#[async_trait]
pub trait Store: Send {
    /// Returns what was used in these periods, each such as `2026-11-21` or
    /// `2026-11`.
    ///
    /// # Errors
    /// Nothing was read.
    async fn usage(&mut self, periods: &[String]) -> Result<Vec<Usage>, StoreError>;

    /// Adds to what was used: all of it or, with an error, none.
    ///
    /// # Errors
    /// Nothing was written; the same may be tried again.
    async fn add(&mut self, used: &[Usage]) -> Result<(), StoreError>;

    /// Returns whether what is written here will be found by whoever opens the
    /// store next.
    fn is_there(&self) -> bool;

    /// Ends the connection; when it returns, nothing more is done to the store.
    async fn close(self: Box<Self>);
}

/// What a key used in a period.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The key's name.
    pub key: Arc<str>,
    /// The period: `2026-11-21` or `2026-11`.
    pub period: String,
    /// How much.
    pub amount: Amount,
}

/// How much was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Requests that were answered.
    pub requests: u64,
    /// Tokens, of prompts and answers together.
    pub tokens: u64,
    /// Money, in billionths of the currency's unit.
    pub money: u64,
}

impl Amount {
    /// Adds another.
    pub fn add(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.money = self.money.saturating_add(other.money);
    }

    /// Takes another away, as far as it is there.
    pub fn take(&mut self, other: Self) {
        self.requests = self.requests.saturating_sub(other.requests);
        self.tokens = self.tokens.saturating_sub(other.tokens);
        self.money = self.money.saturating_sub(other.money);
    }
}

/// Why a store did not do what it should.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
pub struct StoreError {
    /// Whether what is stored can no longer be read, now or later.
    pub corrupt: bool,
    /// The cause.
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl StoreError {
    fn other(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            corrupt: false,
            cause: cause.into(),
        }
    }
}

/// Where a store is, as the configuration says.
#[derive(Clone)]
pub struct Place {
    kind: &'static Kind,
    target: String,
}

impl Place {
    /// Reads a URL such as `sqlite:forebay.db`; paths are relative to `base`.
    ///
    /// # Errors
    /// What was expected.
    pub fn of(url: &str, base: &Path) -> Result<Self, String> {
        let (scheme, rest) = url.split_once(':').unwrap_or((url, ""));
        let Some(kind) = STORES.iter().find(|kind| kind.scheme == scheme) else {
            let schemes: Vec<_> = STORES.iter().map(|kind| kind.scheme).collect();
            return Err(format!(
                "expected one of the stores {}, such as sqlite:forebay.db",
                schemes.join(", ")
            ));
        };
        let target = (kind.locate)(rest, base).map_err(|what| format!("expected {what}"))?;
        Ok(Self { kind, target })
    }

    async fn open(&self) -> Result<Opened, StoreError> {
        (self.kind.open)(&self.target).await
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.kind.scheme == other.kind.scheme && self.target == other.target
    }
}

impl fmt::Debug for Place {
    /// Not the target: of other kinds it may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.scheme)
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.scheme)
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened")
            .field("is_new", &self.is_new)
            .finish_non_exhaustive()
    }
}
