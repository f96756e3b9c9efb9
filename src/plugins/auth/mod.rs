//! Who is calling: keys as bearer tokens, from a file of their hashes.
//!
//! ```yaml
//! plugins:
//!   - auth: { keys_file: keys.yaml, failures_per_minute: 10 }
//!   - auth: none        # says openly that nobody is checked
//! ```
//!
//! Start with [`keys`] for what a key may do, and [`limiter`] for those who
//! guess. [`token`] makes new ones.
//!
//! **Invariant:** a valid key is never refused for what others at the same
//! address did: the limiter is only asked about tries that have failed.

mod keys;
mod limiter;
mod token;

use std::{
    borrow::Cow,
    fmt,
    num::NonZeroU32,
    path::PathBuf,
    sync::Arc,
    time::{Instant, SystemTime},
};

use async_trait::async_trait;
use http::{
    HeaderMap, HeaderName, StatusCode,
    header::{AUTHORIZATION, COOKIE, Entry, PROXY_AUTHORIZATION},
};
use prometheus::IntCounter;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};

use keys::{Found, Hash, Keys};
use limiter::Limiter;
pub use token::{hash_token, new_token};

use super::{
    Build, ConfigError, Configure, Flow, Plugin,
    rate_limit::{is_listed, is_priced, limits_of_keys},
};
use crate::{
    config::{Config, problem::shown},
    context::{Class, Principal, RequestContext, Restrict},
    error::{Error, Result},
};

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// The longest token that is looked at, in bytes.
const TOKEN_MAX: usize = 512;

/// The plugin's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthConfig {
    /// `none`: everybody may do everything.
    None,
    /// Only who has a key.
    Keys(KeysConfig),
}

/// The settings when keys are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct KeysConfig {
    /// The YAML file of the keys; read again when it changes. A relative path
    /// is relative to the configuration file.
    #[schemars(with = "String", length(min = 1))]
    pub keys_file: PathBuf,
    /// How often an address may fail in a minute; beyond it the answer is 429
    /// instead of 401. Valid keys are not affected.
    #[serde(default = "failures_per_minute")]
    #[schemars(with = "u32", range(min = 1, max = 1_000_000))]
    pub failures_per_minute: NonZeroU32,
}

const fn failures_per_minute() -> NonZeroU32 {
    NonZeroU32::new(10).expect("10 is not 0")
}

impl<'de> Deserialize<'de> for AuthConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Not `untagged`, which only says that no variant fits.
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = AuthConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("none, or settings such as { keys_file: keys.yaml }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<AuthConfig, E> {
                match text {
                    "none" => Ok(AuthConfig::None),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<AuthConfig, A::Error> {
                KeysConfig::deserialize(de::value::MapAccessDeserializer::new(map))
                    .map(AuthConfig::Keys)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl JsonSchema for AuthConfig {
    fn schema_name() -> Cow<'static, str> {
        "AuthConfig".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                generator.subschema_for::<KeysConfig>(),
                { "type": "string", "enum": ["none"] },
            ]
        })
    }
}

/// Turns away who has no key, and tells the others' rights to the rest of the
/// gateway by [`RequestContext::principal`] and [`RequestContext::restrict`].
#[derive(Debug)]
pub struct Auth(Option<Guard>);

/// Asks for keys.
struct Guard {
    path: PathBuf,
    /// Of the file's bytes.
    file_hash: Hash,
    keys: Keys,
    failures_per_minute: NonZeroU32,
    limiter: Arc<Limiter>,
    limited: IntCounter,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("path", &self.path)
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

impl Configure for Auth {
    const NAME: &'static str = "auth";
    const MAY_FAIL_OPEN: bool = false;
    type Config = AuthConfig;

    fn configure(config: AuthConfig, build: &Build<'_>) -> Result<Self, ConfigError> {
        let config = match config {
            AuthConfig::None => return Ok(Self(None)),
            AuthConfig::Keys(config) => config,
        };
        let path = build.base.join(config.keys_file);
        let (keys, file_hash) = keys::load(&path).map_err(|problems| ConfigError {
            path: format!("{}.keys_file", Self::NAME),
            message: problems.to_string(),
        })?;
        let limits = &build.resources.metrics.limits;
        Ok(Self(Some(Guard {
            path,
            file_hash,
            keys,
            failures_per_minute: config.failures_per_minute,
            limiter: build.resources.shared("auth.failures"),
            limited: limits.with_label_values(&["auth_failures"]),
        })))
    }
}

#[async_trait]
impl Plugin for Auth {
    async fn on_headers(&self, ctx: &mut RequestContext) -> Result<Flow> {
        hide_credentials(&mut ctx.headers);
        if let Some(guard) = &self.0 {
            let (found, now) = (Presented::of(&ctx.headers), SystemTime::now());
            let principal = match guard.admit(&found, now) {
                Ok(principal) => principal,
                Err(refused) => {
                    return Err(guard.refuse(refused, ctx, Instant::now()));
                }
            };
            narrow(&mut ctx.restrict, &principal);
            ctx.principal = Some(principal);
        }
        Ok(Flow::Continue)
    }

    async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        let (Some(_), Some(who), Some(request)) = (&self.0, &ctx.principal, &ctx.request) else {
            return Ok(Flow::Continue);
        };
        if who.may_use(&request.model) {
            return Ok(Flow::Continue);
        }
        let message = "this API key may not use the model that was asked for";
        Err(Error::new(
            StatusCode::FORBIDDEN,
            "permission_error",
            "model_not_allowed",
            message,
        )
        .param("model"))
    }

    fn watched(&self) -> Vec<PathBuf> {
        self.0.iter().map(|guard| guard.path.clone()).collect()
    }

    fn warnings(&self, config: &Config) -> Vec<String> {
        let Some(guard) = &self.0 else {
            return Vec::new();
        };
        let unknown = |group: &str| !config.groups.contains_key(group);
        let all = guard.keys.groups().into_iter();
        let mut warnings: Vec<String> = all
            .filter(|(_, group)| unknown(group))
            .map(|(name, group)| {
                format!(
                    "the key {} may reach the group {}, which does not exist",
                    shown(name),
                    shown(group)
                )
            })
            .collect();
        let rules = limits_of_keys(config);
        if guard.keys.have_limits() && rules.is_empty() {
            let message = "keys have limits of their own that nobody is held to: \
                           add `- rate_limit: { per: key }` behind auth";
            warnings.push(message.to_owned());
        } else {
            let idle = guard.keys.own_rates().into_iter();
            let idle = idle.filter(|((kind, per), _)| {
                let mut same = rules.iter().map(|rule| match *kind {
                    "tokens" => rule.tokens,
                    _ => rule.requests,
                });
                // A rule that has none of the kind takes any.
                !same.any(|rate| rate.is_none_or(|rate| rate.per.as_str() == *per))
            });
            warnings.extend(idle.map(|((kind, per), name)| {
                format!(
                    "keys such as {} have {kind} per {per} of their own that nobody is held to, \
                     since no rule is about that time: add `- rate_limit: {{ per: key, name: own }}`",
                    shown(name)
                )
            }));
        }
        if guard.keys.have_budgets() && !is_listed(config, "budget") {
            let message = "keys have budgets of their own that nobody is held to: \
                           add `- budget` behind auth";
            warnings.push(message.to_owned());
        } else if guard.keys.have_money() && !is_priced(config) {
            let message = "keys have budgets in money that nobody is held to, since nothing has \
                           a price: add `prices` to `budget`";
            warnings.push(message.to_owned());
        }
        warnings
    }

    fn is_current(&self) -> bool {
        self.0.as_ref().is_none_or(|guard| {
            keys::read(&guard.path).is_ok_and(|bytes| keys::hash(&bytes) == guard.file_hash)
        })
    }
}

/// Why somebody is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    Missing,
    Unreadable,
    Ambiguous,
    Unknown,
    Expired,
}

impl Guard {
    fn admit(&self, found: &Presented<'_>, now: SystemTime) -> Result<Arc<Principal>, Refused> {
        match found {
            Presented::Token(token) => match self.keys.find(token, now) {
                Found::Valid(principal) => Ok(principal),
                Found::Expired => Err(Refused::Expired),
                Found::Unknown => Err(Refused::Unknown),
            },
            Presented::Nothing => Err(Refused::Missing),
            Presented::Unreadable => Err(Refused::Unreadable),
            Presented::Ambiguous => Err(Refused::Ambiguous),
        }
    }

    /// Makes the answer, and counts the failure. Who has a key that has expired
    /// is not guessing.
    fn refuse(&self, refused: Refused, ctx: &RequestContext, now: Instant) -> Error {
        // Only a wrong key is a guess: not one that has expired, not none, and
        // not two of which one may be right.
        if matches!(refused, Refused::Unknown | Refused::Unreadable)
            && let Err(wait) = self
                .limiter
                .fail(ctx.client_ip, self.failures_per_minute, now)
        {
            self.limited.inc();
            return Error::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "too_many_auth_failures",
                "too many tries without a valid API key; try again later",
            )
            .retry_after(wait);
        }
        log::debug!(
            "caller refused: reason={refused:?} client={}",
            ctx.client_ip
        );
        let (code, message) = match refused {
            Refused::Missing => (
                "missing_api_key",
                "an API key is needed: send the header Authorization: Bearer KEY",
            ),
            Refused::Unreadable => (
                "invalid_api_key",
                "the API key cannot be read: expected the header Authorization: Bearer KEY",
            ),
            Refused::Ambiguous => (
                "invalid_api_key",
                "the request carries several API keys that differ",
            ),
            Refused::Unknown => ("invalid_api_key", "the API key is not valid"),
            Refused::Expired => ("expired_api_key", "the API key has expired"),
        };
        Error::refused(StatusCode::UNAUTHORIZED, code, message)
    }
}

/// What a request shows.
#[derive(Debug, PartialEq, Eq)]
enum Presented<'a> {
    Token(&'a [u8]),
    Nothing,
    Unreadable,
    /// Several that differ; to take one of them would be a guess.
    Ambiguous,
}

impl<'a> Presented<'a> {
    fn of(headers: &'a HeaderMap) -> Self {
        if headers.get_all(AUTHORIZATION).iter().count() > 1 {
            return Self::Ambiguous;
        }
        let bearer = headers.get(AUTHORIZATION).map(|v| bearer(v.as_bytes()));
        let plain = headers
            .get_all(X_API_KEY)
            .iter()
            .map(|value| Self::token(value.as_bytes()));
        let mut found = Self::Nothing;
        for one in bearer.into_iter().chain(plain) {
            match (&found, one) {
                (Self::Nothing, one) => found = one,
                (_, Self::Nothing) => {}
                (first, one) if *first == one => {}
                _ => return Self::Ambiguous,
            }
        }
        found
    }

    fn token(text: &'a [u8]) -> Self {
        match text.trim_ascii() {
            [] => Self::Nothing,
            token if token.len() <= TOKEN_MAX && token.iter().all(u8::is_ascii_graphic) => {
                Self::Token(token)
            }
            _ => Self::Unreadable,
        }
    }
}

/// Reads `Bearer TOKEN`; the scheme in any case (RFC 9110 §11.1).
fn bearer(value: &[u8]) -> Presented<'_> {
    let value = value.trim_ascii();
    let end = value
        .iter()
        .position(u8::is_ascii_whitespace)
        .unwrap_or(value.len());
    match value.split_at_checked(end) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer") => Presented::token(token),
        Some(([], _)) => Presented::Nothing,
        _ => Presented::Unreadable,
    }
}

/// Narrows where the exchange may go to what the key may reach.
fn narrow(restrict: &mut Restrict, who: &Principal) {
    restrict.local |= who.local;
    if who.class == Class::Batch {
        restrict.class = Class::Batch;
    }
    let Some(allowed) = &who.groups else { return };
    restrict.groups = Some(match &restrict.groups {
        Some(groups) => groups
            .iter()
            .filter(|group| allowed.contains(group))
            .cloned()
            .collect(),
        None => Arc::clone(allowed),
    });
}

/// Keeps credentials out of every `Debug` of the request.
fn hide_credentials(headers: &mut HeaderMap) {
    for name in [AUTHORIZATION, X_API_KEY, PROXY_AUTHORIZATION, COOKIE] {
        if let Entry::Occupied(mut entry) = headers.entry(name) {
            for value in entry.iter_mut() {
                value.set_sensitive(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use bytes::Bytes;
    use http::{HeaderValue, Method};
    use serde_json::json;

    use super::*;
    use crate::{
        metrics::Metrics,
        openai::{ApiRequest, Endpoint},
        resources::Resources,
    };

    /// A folder of its own with a keys file, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(keys: &str) -> Self {
            static NEXT: AtomicUsize = AtomicUsize::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("forebay-auth-{}-{number}", std::process::id());
            let folder = Self(std::env::temp_dir().join(name));
            fs::create_dir(&folder.0).unwrap();
            folder.write(keys);
            folder
        }

        fn write(&self, keys: &str) {
            fs::write(self.0.join("keys.yaml"), keys).unwrap();
        }

        fn auth(&self, resources: &Resources) -> Result<Auth, ConfigError> {
            let config = json!({ "keys_file": "keys.yaml" });
            let build = Build {
                base: &self.0,
                resources,
                list: "",
                store: None,
            };
            Auth::configure(serde_json::from_value(config).unwrap(), &build)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn resources() -> Resources {
        Resources::new(Arc::new(Metrics::new()))
    }

    /// A keys file with `alice` and what her entry says beside name and hash.
    fn alice(rights: &str) -> String {
        let hash = hash_token("alices-token");
        format!("keys: [ {{ name: alice, sha256: '{hash}'{rights} }} ]")
    }

    fn request(headers: &[(&'static str, &str)]) -> RequestContext {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        RequestContext::new(
            "req-1".into(),
            [192, 0, 2, 1].into(),
            Method::POST,
            "/v1/chat/completions".into(),
            map,
        )
    }

    async fn code(auth: &Auth, headers: &[(&'static str, &str)]) -> String {
        match auth.on_headers(&mut request(headers)).await {
            Ok(_) => "ok".to_owned(),
            Err(why) => format!("{} {}", why.status.as_u16(), why.code.unwrap()),
        }
    }

    #[tokio::test]
    async fn a_key_comes_as_bearer_token_or_as_x_api_key() {
        let (folder, resources) = (Folder::new(&alice("")), resources());
        let auth = folder.auth(&resources).unwrap();
        for headers in [
            vec![("authorization", "Bearer alices-token")],
            vec![("authorization", "bEARER   alices-token ")],
            vec![("x-api-key", "alices-token")],
            vec![("x-api-key", "alices-token"), ("x-api-key", "alices-token")],
            vec![
                ("authorization", "Bearer alices-token"),
                ("x-api-key", "alices-token"),
            ],
            vec![("authorization", ""), ("x-api-key", "alices-token")],
        ] {
            assert_eq!(code(&auth, &headers).await, "ok", "{headers:?}");
        }
    }

    #[tokio::test]
    async fn everything_else_is_turned_away_with_401() {
        let long = format!("Bearer {}", "x".repeat(TOKEN_MAX + 1));
        for (headers, expected) in [
            (vec![], "401 missing_api_key"),
            (vec![("authorization", "Bearer ")], "401 missing_api_key"),
            (vec![("x-api-key", "")], "401 missing_api_key"),
            (
                vec![("authorization", "Bearer wrong")],
                "401 invalid_api_key",
            ),
            (vec![("x-api-key", "wrong")], "401 invalid_api_key"),
            (vec![("authorization", &long)], "401 invalid_api_key"),
            (
                vec![("authorization", "alices-token")],
                "401 invalid_api_key",
            ),
            (
                vec![("authorization", "Basic alices-token")],
                "401 invalid_api_key",
            ),
            (
                vec![("authorization", "Bearer alices-token x")],
                "401 invalid_api_key",
            ),
            (
                vec![
                    ("authorization", "Bearer alices-token"),
                    ("authorization", "Bearer alices-token"),
                ],
                "401 invalid_api_key",
            ),
            (
                vec![
                    ("authorization", "Bearer alices-token"),
                    ("x-api-key", "other"),
                ],
                "401 invalid_api_key",
            ),
            (
                vec![
                    ("authorization", "Basic eDp5"),
                    ("x-api-key", "alices-token"),
                ],
                "401 invalid_api_key",
            ),
            (
                vec![("x-api-key", "alices-token"), ("x-api-key", "other")],
                "401 invalid_api_key",
            ),
        ] {
            let (folder, resources) = (Folder::new(&alice("")), resources());
            let auth = folder.auth(&resources).unwrap();
            assert_eq!(code(&auth, &headers).await, expected, "{headers:?}");
        }
    }

    #[tokio::test]
    async fn an_expired_key_is_told_so_and_is_not_counted_as_a_guess() {
        let keys = alice(", expires: 2020-01-01");
        let (folder, resources) = (Folder::new(&keys), resources());
        let auth = folder.auth(&resources).unwrap();
        for _ in 0..20 {
            let headers = [("x-api-key", "alices-token")];
            assert_eq!(code(&auth, &headers).await, "401 expired_api_key");
        }
    }

    #[tokio::test]
    async fn who_guesses_gets_429_but_a_valid_key_is_let_in_from_the_same_address() {
        let (folder, resources) = (Folder::new(&alice("")), resources());
        let auth = folder.auth(&resources).unwrap();
        for i in 0..10 {
            let guess = format!("guess-{i}");
            let headers = [("x-api-key", guess.as_str())];
            assert_eq!(code(&auth, &headers).await, "401 invalid_api_key");
        }
        let mut eleventh = request(&[("x-api-key", "guess")]);
        let refused = auth.on_headers(&mut eleventh).await.unwrap_err();
        assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
        assert!(refused.retry_after.is_some_and(|wait| !wait.is_zero()));
        assert_eq!(code(&auth, &[("x-api-key", "alices-token")]).await, "ok");

        // What was counted outlives the snapshot.
        let reloaded = folder.auth(&resources).unwrap();
        let again = code(&reloaded, &[("x-api-key", "guess")]).await;
        assert_eq!(again, "429 too_many_auth_failures");
        let hits = resources
            .metrics
            .limits
            .with_label_values(&["auth_failures"]);
        assert_eq!(hits.get(), 2);
    }

    #[tokio::test]
    async fn the_rights_of_a_key_narrow_where_its_requests_may_go() {
        let keys = alice(", groups: [gpus, cloud], local: true, pin: true");
        let (folder, resources) = (Folder::new(&keys), resources());
        let auth = folder.auth(&resources).unwrap();
        let mut ctx = request(&[("x-api-key", "alices-token")]);
        ctx.restrict.groups = Some(["gpus".into(), "ollama".into()].into());
        auth.on_headers(&mut ctx).await.unwrap();
        assert_eq!(ctx.caller(), "alice");
        assert!(ctx.principal.as_ref().unwrap().pin);
        assert!(ctx.restrict.local);
        assert_eq!(ctx.restrict.groups.as_deref(), Some(&["gpus".into()][..]));
    }

    #[tokio::test]
    async fn a_model_that_the_key_may_not_use_is_403() {
        let keys = alice(", models: ['qwen*']");
        let (folder, resources) = (Folder::new(&keys), resources());
        let auth = folder.auth(&resources).unwrap();
        for (model, allowed) in [("qwen3", true), ("gpt-4o", false)] {
            let mut ctx = request(&[("x-api-key", "alices-token")]);
            auth.on_headers(&mut ctx).await.unwrap();
            let body = json!({ "model": model, "messages": [{ "role": "user", "content": "?" }] });
            let body = Bytes::from(body.to_string());
            ctx.request = Some(ApiRequest::parse(Endpoint::ChatCompletions, body, 64).unwrap());
            let status = auth.on_request(&mut ctx).await.map_err(|why| why.status);
            match allowed {
                true => assert!(status.is_ok(), "{model}"),
                false => assert_eq!(status.unwrap_err(), StatusCode::FORBIDDEN, "{model}"),
            }
        }
    }

    #[tokio::test]
    async fn none_lets_everybody_in_as_a_stranger() {
        let resources = resources();
        let build = Build {
            base: "".as_ref(),
            resources: &resources,
            list: "",
            store: None,
        };
        let config = serde_json::from_value(json!("none")).unwrap();
        let auth = Auth::configure(config, &build).unwrap();
        let mut ctx = request(&[("authorization", "Bearer whatever")]);
        auth.on_headers(&mut ctx).await.unwrap();
        assert_eq!(ctx.caller(), "-");
        assert_eq!(ctx.restrict, Restrict::default());
        assert!(auth.is_current());
        assert!(auth.watched().is_empty());
    }

    #[test]
    fn a_changed_keys_file_is_noticed_and_a_broken_one_refused() {
        let (folder, resources) = (Folder::new(&alice("")), resources());
        let auth = folder.auth(&resources).unwrap();
        assert_eq!(auth.watched(), [folder.0.join("keys.yaml")]);
        assert!(auth.is_current());
        folder.write(&alice(", pin: true"));
        assert!(!auth.is_current());
        folder.write("keys: [ { name: alice } ]");
        let why = folder.auth(&resources).unwrap_err();
        assert_eq!(why.path, "auth.keys_file");
        assert!(
            why.message.contains("keys.yaml:1:9: keys[0].sha256"),
            "{why}"
        );
        fs::remove_file(folder.0.join("keys.yaml")).unwrap();
        assert!(!auth.is_current());
        let why = folder.auth(&resources).unwrap_err();
        assert!(why.message.contains("cannot be read"), "{why}");
    }

    #[test]
    fn a_keys_file_that_is_too_large_or_no_file_is_refused() {
        let (folder, resources) = (Folder::new(""), resources());
        folder.write(&format!("{}# {}", alice(""), "x".repeat(4 << 20)));
        let why = folder.auth(&resources).unwrap_err();
        assert!(why.message.contains("larger than 4MiB"), "{why}");
        let path = folder.0.join("keys.yaml");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let why = folder.auth(&resources).unwrap_err();
        assert!(why.message.contains("no regular file"), "{why}");
    }

    #[test]
    fn settings_are_none_or_a_keys_file() {
        let read = |value| serde_json::from_value::<AuthConfig>(value).map_err(|e| e.to_string());
        assert_eq!(read(json!("none")), Ok(AuthConfig::None));
        let Ok(AuthConfig::Keys(config)) = read(json!({ "keys_file": "k" })) else {
            panic!("refused");
        };
        assert_eq!(config.failures_per_minute.get(), 10);
        for (value, expected) in [
            (json!("off"), "expected none, or settings such as"),
            (json!(null), "expected none, or settings such as"),
            (json!({}), "missing field `keys_file`"),
            (json!({ "keys_file": "k", "key": 1 }), "unknown field `key`"),
            (
                json!({ "keys_file": "k", "failures_per_minute": 0 }),
                "nonzero",
            ),
        ] {
            let why = read(value).unwrap_err();
            assert!(why.contains(expected), "{why}");
        }
    }

    #[tokio::test]
    async fn debug_shows_no_hash_and_no_token() {
        let (folder, resources) = (Folder::new(&alice("")), resources());
        let auth = folder.auth(&resources).unwrap();
        let mut ctx = request(&[
            ("authorization", "Bearer alices-token"),
            ("x-api-key", "alices-token"),
            ("cookie", "session=alices-token"),
        ]);
        auth.on_headers(&mut ctx).await.unwrap();
        let shown = format!("{auth:?} {ctx:?}");
        let hash = hash_token("alices-token");
        assert!(!shown.contains("alices-token"), "{shown}");
        let start: String = hash.chars().take(8).collect();
        assert!(!shown.contains(&start), "{shown}");
        assert!(shown.contains("Keys(1)"), "{shown}");
    }
}
