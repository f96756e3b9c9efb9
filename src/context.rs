//! What is known of one request while it lives: all a plugin may see and edit.
//!
//! [`RequestContext`] is made when the header is in, and grows: the principal
//! (auth), the parsed request (body), the attempts (exchange). [`Outcome`] is
//! how it ended, made once.

use std::{
    any::Any,
    borrow::Cow,
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Method};

pub use crate::pattern::Pattern;
use crate::{
    config::{Budget, KeyLimits},
    openai::{ApiRequest, Usage},
};

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
    /// The body of a model call as the client sent it: plugins edit `request`,
    /// never this. `None` as long as that is.
    pub received: Option<Bytes>,
    /// Fields that plugins add to the head of whatever is answered, errors too;
    /// what was put here after the head went out is lost.
    pub reply: HeaderMap,
    /// Who is calling; `None` when no auth plugin is in the list.
    pub principal: Option<Arc<Principal>>,
    /// Where the exchange may go.
    pub restrict: Restrict,
    /// How much may still be put into the prompt; `None` where nothing bounds it.
    pub room: Option<Room>,
    /// What keeps this caller's prompts apart in the caches of upstreams that
    /// know such a salt.
    pub cache_salt: Option<Arc<str>>,
    /// The label of the route that was taken; before the plugins have run, of
    /// the one that the client's own words lead to; empty before the body is in.
    pub route: Arc<str>,
    /// The model that is meant, once aliases are looked up; empty before the
    /// body is in.
    pub model: Arc<str>,
    /// The groups that this route may lead to, the fallback too; empty before
    /// the body is in.
    pub groups: Arc<[Box<str>]>,
    /// Every try at an upstream, in order.
    pub attempts: Vec<Attempt>,
    /// How long it has waited in line for a free upstream.
    pub queued: Duration,
    /// How often another upstream went on with the answer.
    pub takeovers: u32,
    /// The group of the last that did.
    pub taken_over_by: Option<Arc<str>>,
    /// Events with content that came from upstreams: what is known of the
    /// tokens of a stream that breaks off before its usage.
    pub content_events: u64,
    /// What each plugin keeps of this request.
    pub own: Own,
}

impl RequestContext {
    /// Makes the context of a request whose header is in.
    pub fn new(
        id: Arc<str>,
        client_ip: IpAddr,
        method: Method,
        path: Arc<str>,
        headers: HeaderMap,
    ) -> Self {
        Self {
            id,
            started: Instant::now(),
            client_ip,
            method,
            path,
            headers,
            request: None,
            received: None,
            reply: HeaderMap::new(),
            principal: None,
            restrict: Restrict::default(),
            room: None,
            cache_salt: None,
            route: Arc::from(""),
            model: Arc::from(""),
            groups: Arc::from([]),
            attempts: Vec::new(),
            queued: Duration::ZERO,
            takeovers: 0,
            taken_over_by: None,
            content_events: 0,
            own: Own::default(),
        }
    }

    /// Returns the name of the caller for logs and labels; `-` for a stranger.
    pub fn caller(&self) -> &str {
        self.principal.as_ref().map_or("-", |who| &who.name)
    }
}

/// What the plugins of a list keep of one request: a place for each, that the
/// others cannot reach, also where a plugin is in the list twice.
///
/// A hook that works on its own state and on the rest of the context takes it
/// out and puts it back.
#[derive(Default)]
pub struct Own {
    places: Vec<Option<Box<dyn Any + Send + Sync>>>,
    current: usize,
    spent: Vec<Duration>,
}

impl Own {
    /// Says whose hook runs from now on, by its place in the list. For the
    /// chain alone.
    pub fn enter(&mut self, place: usize) {
        self.current = place;
    }

    /// Adds to the time that the plugin took of this answer's events.
    pub fn spend(&mut self, time: Duration) {
        if self.spent.len() <= self.current {
            self.spent.resize(self.current + 1, Duration::ZERO);
        }
        if let Some(spent) = self.spent.get_mut(self.current) {
            *spent += time;
        }
    }

    /// Returns the sum of what was spent; `None` if nothing was.
    pub fn spent(&self) -> Option<Duration> {
        self.spent.get(self.current).copied()
    }

    /// Keeps a value for the hooks to come; what was there is dropped.
    pub fn put<T: Any + Send + Sync>(&mut self, value: T) {
        if self.places.len() <= self.current {
            self.places.resize_with(self.current + 1, || None);
        }
        if let Some(place) = self.places.get_mut(self.current) {
            *place = Some(Box::new(value));
        }
    }

    /// Returns the value, if one of this type was kept.
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.places.get(self.current)?.as_ref()?.downcast_ref()
    }

    /// Returns the value for changing.
    pub fn get_mut<T: Any>(&mut self) -> Option<&mut T> {
        self.places.get_mut(self.current)?.as_mut()?.downcast_mut()
    }

    /// Takes the value out; of another type it stays.
    pub fn take<T: Any>(&mut self) -> Option<Box<T>> {
        let place = self.places.get_mut(self.current)?;
        match place.take()?.downcast() {
            Ok(value) => Some(value),
            Err(other) => {
                *place = Some(other);
                None
            }
        }
    }
}

impl fmt::Debug for Own {
    /// Nothing of what is kept: it may be what a user wrote.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own").finish_non_exhaustive()
    }
}

/// What is left of the length that a prompt may have.
#[derive(Clone)]
pub struct Room {
    /// Tokens.
    pub tokens: u64,
    /// Counts the tokens of a text as they were counted for the limit.
    pub count: Arc<dyn Fn(&str) -> u64 + Send + Sync>,
}

impl Room {
    /// Returns whether a text has its place in it, with what a template may put
    /// around it.
    pub fn fits(&self, text: &str) -> bool {
        /// A message of its own, and the blank line before what was there.
        const AROUND: u64 = 8;
        (self.count)(text).saturating_add(AROUND) <= self.tokens
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Room").field(&self.tokens).finish()
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
    /// Its own limits, in place of those that hold for every key.
    pub limits: KeyLimits,
    /// Its own budget, in place of the one that holds for every key.
    pub budget: Budget,
    /// Whether its exchanges may be captured.
    pub capture: bool,
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
    /// The request never left: DNS or connect failed.
    NotSent,
    /// There was no TLS to send it over: the handshake failed, or the
    /// certificate is no good.
    Tls,
    /// It could not be sent for want of a socket on this machine: our own fault.
    NoSocket,
    /// There was no memory for what it takes, or for its answer
    /// (`limits.bodies`): our own fault.
    NoRoom,
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
    /// Returns whether the upstream could not be reached, so that it cost it
    /// nothing.
    pub const fn is_unreached(self) -> bool {
        matches!(self, Self::NotSent | Self::Tls)
    }

    /// Returns the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NotSent => "not_sent",
            Self::Tls => "tls",
            Self::NoSocket => "no_socket",
            Self::NoRoom => "no_room",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_plugin_finds_its_own_and_nobody_elses() {
        let mut own = Own::default();
        own.enter(2);
        own.put(1_u32);
        own.enter(0);
        assert_eq!(own.get::<u32>(), None);
        own.put("mine");
        own.enter(2);
        *own.get_mut::<u32>().unwrap() += 1;
        assert_eq!(own.take::<&str>(), None);
        assert_eq!(own.take::<u32>().as_deref(), Some(&2));
        assert_eq!(own.take::<u32>(), None);
        own.enter(0);
        assert_eq!(own.get::<&str>(), Some(&"mine"));
    }
}
