//! What is known of one request while it lives: all a plugin may see and edit.
//!
//! [`RequestContext`] is made when the header is in, and grows: the principal
//! (auth), the parsed request (body), the attempts (exchange). [`Outcome`] is
//! how it ended, made once.

use std::{
    borrow::Cow,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, Method};

use crate::openai::{ApiRequest, Usage};
pub use crate::pattern::Pattern;

/// One client request, from its header to its end.
#[derive(Debug)]
pub struct RequestContext {
    /// Its id: the client's own if that was sane, else made here.
    pub id: Arc<str>,
    /// When its header was complete.
    pub started: Instant,
    /// Who sent it, seen through the trusted proxies.
    pub client_ip: IpAddr,
    /// Its method.
    pub method: Method,
    /// Its path without the query; found in the allowlist.
    pub path: Arc<str>,
    /// Its header fields as they came. Never sent upstream as they are.
    pub headers: HeaderMap,
    /// The parsed body of a model call; `None` before the body is in, and for
    /// the calls that have none.
    pub request: Option<ApiRequest>,
    /// Who is calling; `None` when no auth plugin is in the list.
    pub principal: Option<Arc<Principal>>,
    /// Where the exchange may go.
    pub restrict: Restrict,
    /// The label of the route that was taken; empty before.
    pub route: Arc<str>,
    /// Every try at an upstream, in order.
    pub attempts: Vec<Attempt>,
    /// How long it has waited in line for a free upstream.
    pub queued: Duration,
    /// How often another upstream went on with the answer.
    pub takeovers: u32,
}

impl RequestContext {
    /// Returns the name of the caller for logs and labels; `-` for a stranger.
    pub fn caller(&self) -> &str {
        self.principal.as_ref().map_or("-", |who| &who.name)
    }
}

/// Where an exchange may go. Only ever narrowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restrict {
    /// Only groups marked `local`. Failover never overrides it.
    pub local: bool,
    /// Only these groups; `None` means all.
    pub groups: Option<Arc<[Box<str>]>>,
    /// Only this upstream, tried once, never a fallback.
    pub pin: Option<Box<str>>,
    /// Which line it waits in where all upstreams are busy.
    pub class: Class,
}

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Class {
    /// Somebody waits for the answer.
    #[default]
    Interactive,
    /// It may wait: interactive requests go first.
    Batch,
}

impl Class {
    /// Every class there is, the most urgent first.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Batch];

    /// Returns the word for keys files, headers and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }

    /// Reads the word; `None` if it is another.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.as_str() == word)
    }
}

/// Who is calling, and what that key may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The key's name, unique in its file.
    pub name: Arc<str>,
    /// The models it may ask for, as patterns; empty means all.
    pub models: Vec<Pattern>,
    /// The groups it may reach; `None` means all.
    pub groups: Option<Arc<[Box<str>]>>,
    /// Whether it may choose an upstream by `x-forebay-upstream`.
    pub pin: bool,
    /// Whether it is held to local groups.
    pub local: bool,
    /// How urgent its requests are, at most.
    pub class: Class,
}

impl Principal {
    /// Returns whether the key may ask for this model.
    pub fn may_use(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|pattern| pattern.matches(model))
    }
}

/// One try at one upstream. Holds names, not upstreams, so that it may outlive
/// the snapshot.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The group the upstream was chosen from.
    pub group: Arc<str>,
    /// The upstream.
    pub upstream: Arc<str>,
    /// How it went.
    pub verdict: Verdict,
    /// The upstream's status, if an answer came.
    pub status: Option<u16>,
    /// Whether the upstream may have done (and billed) the work although its
    /// answer was not used.
    pub maybe_billed: bool,
    /// Whether the group is the route's fallback.
    pub fallback: bool,
    /// From the choice of the upstream to the verdict.
    pub took: Duration,
}

/// How an attempt went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Its answer went to the client.
    Answered,
    /// The request never left: DNS, connect or TLS failed.
    NotSent,
    /// 429, 503, 529: turned away, not billed.
    Rejected,
    /// 401, 402, 403 or a hard quota: our credential is no good there.
    Credential,
    /// A reset, 500, 502, 504, an error under 200, nonsense: perhaps billed.
    Failed,
    /// No header or no first token in time: perhaps billed.
    TimedOut,
    /// 404: the upstream does not know the model.
    NoModel,
    /// It would not go on with what another began, or began anew.
    NotContinued,
    /// A 4xx that is the caller's fault; passed on.
    CallersFault,
    /// It died after its answer had begun to reach the client.
    Cut,
    /// The client left.
    Abandoned,
}

impl Verdict {
    /// Returns the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NotSent => "not_sent",
            Self::Rejected => "rejected",
            Self::Credential => "credential",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::NoModel => "no_model",
            Self::NotContinued => "not_continued",
            Self::CallersFault => "callers_fault",
            Self::Cut => "cut",
            Self::Abandoned => "abandoned",
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The client has a whole, successful answer.
    Success,
    /// The client has an error with a status of 400 to 499.
    ClientError,
    /// The client has an error with a status of 500 or more.
    ServerError,
    /// The answer broke off after it had begun; the client has an error event.
    Incomplete,
    /// The client left before the end.
    ClientClosed,
}

impl Ending {
    /// Returns the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::Incomplete => "incomplete",
            Self::ClientClosed => "client_closed",
        }
    }
}

/// How a request ended, with its figures. Made once per request.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The status that went to the client; 499 if it left before one did.
    pub status: u16,
    /// How it ended.
    pub ending: Ending,
    /// OpenAI's `code` of the error, if there was one; borrowed if it is one of
    /// ours, owned if an upstream made it up.
    pub error: Option<Cow<'static, str>>,
    /// Whether the answer was streamed.
    pub streamed: bool,
    /// From the header to the first meaningful event, or to the answer.
    pub first_token: Option<Duration>,
    /// From the header to the end.
    pub total: Duration,
    /// Bytes of the body sent to the client.
    pub bytes_out: u64,
    /// The tokens, if the upstream told.
    pub usage: Option<Usage>,
}
