//! The model servers: where they are, how they are, and which one is next.
//!
//! Start at [`group`]: a [`Group`] holds [`Upstream`]s and picks one. Nothing
//! here sends a request (checks excepted): the exchange does, and reports to its
//! [`Slot`] and to [`Group::failed`] what it saw.
//!
//! - [`url`]: a base URL, taken apart
//! - [`tls`]: the authorities to trust; [`tls_fault`]: why TLS failed
//! - [`upstream`]: one upstream: headers, peer, slots
//! - [`resolve`]: its name's addresses, kept fresh in the background
//! - [`discovery`]: which models it says it has
//! - [`context_sizes`]: how large a context its models have, for Ollama
//! - [`policy`]: what holds for it: its own settings, or its group's
//! - [`health`]: whether it may be used now; [`state`] in a word
//! - [`breaker`]: what it does with one model; `breakers` for all of them;
//!   `gate` for what concerns all models
//! - [`check`]: asking it whether it is well
//! - [`sockets`]: whether it is our own fault that it is not reached
//! - [`budget`]: how much may be tried again
//! - [`strategies`]: how one of several is chosen; the one list
//! - [`group`]: upstreams that can stand in for each other; `outages`: when
//!   none of them could be asked
//! - [`waiting`]: those who wait until one of them is free
//! - [`queue`]: who of them is next

pub mod breaker;
mod breakers;
pub mod budget;
pub mod check;
pub mod context_sizes;
pub mod discovery;
mod gate;
pub mod group;
pub mod health;
mod outages;
pub mod policy;
pub mod queue;
pub mod resolve;
mod shares;
pub mod sockets;
pub mod state;
pub mod strategies;
pub mod tls;
pub mod tls_fault;
pub mod upstream;
pub mod url;
pub mod waiting;

pub use context_sizes::ContextSizes;
pub use discovery::{Discovery, MODELS_MAX};
pub use group::{BuildError, Group, Pick, Previous};
pub use health::{Health, KeyFault};
pub use policy::Policy;
pub use queue::{Key, Reason, Refused, Rules};
pub use resolve::{Addresses, Unresolved};
pub use state::{State, Status};
pub use strategies::{STRATEGIES, Strategy};
pub use tls::connector_options;
pub use tls_fault::TlsFault;
pub use upstream::{Continues, Refusal, Secrets, Slot, Upstream};
pub use url::BaseUrl;
pub use waiting::{Effort, Entered, Place, Seeker, Told, Waiting};
