//! `cache_salt`: keeps one tenant from finding out, by how fast an answer
//! begins, what another has asked.
//!
//! A server that caches the beginnings of prompts answers sooner where somebody
//! has sent the same beginning before. vLLM mixes the request's `cache_salt`
//! into the hash of the first block of a prompt, so that only requests with the
//! same salt share a cache
//! (<https://docs.vllm.ai/en/latest/design/prefix_caching/>). The salt of a
//! tenant is HMAC-SHA256(secret, tenant): nobody who does not know the secret
//! can make another's. What a client sends is taken out.

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;
use sha2::Sha256;

use super::{Build, ConfigError, Configure, OnFailure, Plugin};
use crate::{
    config::{Config, Kind, SecretRef},
    context::{Pattern, RequestContext},
    error::Result,
    openai::Edit,
};

/// The member of a request that vLLM reads.
const FIELD: &str = "cache_salt";

/// Separates what tenants share caches.
pub struct CacheSalt {
    secret: Arc<[u8]>,
    /// Who shares: the name of the tenant, and the keys that belong to it.
    shared: Vec<(String, Vec<Pattern>)>,
}

/// The settings of [`CacheSalt`].
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
pub struct CacheSaltConfig {
    /// What salts are made from, such as `env:NAME`. Without one it is drawn at
    /// random at every start: then caches begin anew, and several gateways in
    /// front of one server do not share any.
    secret: Option<SecretRef>,
    /// Keys that share one cache: a name of your own → patterns of keys' names.
    /// Every other key has a cache to itself.
    #[schemars(extend("maxProperties" = 1000, "propertyNames" = {"format": "name"}))]
    shared: IndexMap<String, Names>,
}

/// Names of keys, as patterns.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend("format" = "patterns"))]
struct Names(Vec<String>);

/// The secret of a process that was given none.
#[derive(Default)]
struct Drawn(OnceLock<Arc<[u8]>>);

impl CacheSalt {
    fn tenant<'a>(&'a self, key: &'a str) -> (&'static str, &'a str) {
        let shares = |(_, keys): &&(String, Vec<Pattern>)| keys.iter().any(|one| one.matches(key));
        match self.shared.iter().find(shares) {
            Some((name, _)) => ("shared", name),
            None => ("key", key),
        }
    }

    /// Returns 43 characters, the 256 bits that vLLM's documentation asks for.
    fn salt(&self, key: &str) -> String {
        let (kind, tenant) = self.tenant(key);
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret)
            .expect("HMAC takes a secret of any length");
        // No name of a key can look like one of a list.
        mac.update(kind.as_bytes());
        mac.update(b"\0");
        mac.update(tenant.as_bytes());
        URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
    }
}

#[async_trait]
impl Plugin for CacheSalt {
    fn on_parsed(&self, ctx: &mut RequestContext) -> Result<()> {
        let salt = self.salt(ctx.caller());
        if let Some(request) = &mut ctx.request {
            request.edit(&[Edit::remove(FIELD)])?;
        }
        ctx.cache_salt = Some(salt.into());
        Ok(())
    }

    fn warnings(&self, config: &Config) -> Vec<String> {
        let mut all = config.groups.values().flat_map(|group| &group.upstreams);
        if all.any(|upstream| upstream.kind == Kind::Vllm) {
            return Vec::new();
        }
        vec!["no upstream is of kind vllm: nothing is salted".to_owned()]
    }
}

impl Configure for CacheSalt {
    const NAME: &'static str = "cache_salt";
    const ON_FAILURE: OnFailure = OnFailure::Closed;
    type Config = Option<CacheSaltConfig>;

    fn configure(config: Self::Config, build: &Build<'_>) -> Result<Self, ConfigError> {
        let config = config.unwrap_or_default();
        let secret = match &config.secret {
            Some(secret) => {
                let secret = secret.read(build.base).map_err(|why| ConfigError {
                    path: format!("{}.secret", Self::NAME),
                    message: why.to_string(),
                })?;
                secret.expose().as_bytes().into()
            }
            None => {
                let drawn = build.resources.shared::<Drawn>(Self::NAME);
                let secret = drawn.0.get_or_init(|| Arc::new(rand::random::<[u8; 32]>()));
                Arc::clone(secret)
            }
        };
        Ok(Self {
            secret,
            shared: config
                .shared
                .into_iter()
                .map(|(name, Names(keys))| (name, keys.into_iter().map(Pattern::new).collect()))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;
    use http::{HeaderMap, Method};
    use serde_json::json;

    use super::*;
    use crate::{
        openai::{ApiRequest, Endpoint},
        resources::Resources,
    };

    fn plugin(settings: serde_json::Value, resources: &Resources) -> CacheSalt {
        let config = serde_json::from_value(settings).unwrap();
        let base = Path::new("/");
        CacheSalt::configure(
            config,
            &Build {
                base,
                resources,
                list: "",
                store: None,
            },
        )
        .unwrap()
    }

    #[test]
    fn every_key_has_its_own_salt_and_those_who_share_have_one() {
        let resources = Resources::default();
        let plugin = plugin(json!({ "shared": { "alice": ["pupil-*"] } }), &resources);
        let (alice, bob) = (plugin.salt("alice"), plugin.salt("bob"));
        assert_eq!(alice.len(), 43);
        assert_ne!(alice, bob);
        assert_eq!(plugin.salt("pupil-1"), plugin.salt("pupil-2"));
        assert_ne!(plugin.salt("pupil-1"), alice, "a list is no key");
    }

    #[test]
    fn a_salt_stays_the_same_over_reloads_and_follows_the_secret() {
        let resources = Resources::default();
        let one = plugin(json!(null), &resources).salt("alice");
        assert_eq!(plugin(json!({}), &resources).salt("alice"), one);
        let other = Resources::default();
        assert_ne!(plugin(json!(null), &other).salt("alice"), one);
    }

    #[test]
    fn what_the_client_sent_is_taken_out() {
        let resources = Resources::default();
        let mut ctx = RequestContext::new(
            "id".into(),
            [127, 0, 0, 1].into(),
            Method::POST,
            "/v1/chat/completions".into(),
            HeaderMap::new(),
        );
        let body = r#"{"model":"m","cache_salt":"alices","messages":[{}]}"#;
        let body = Bytes::from_static(body.as_bytes());
        ctx.request = Some(ApiRequest::parse(Endpoint::ChatCompletions, body, 64).unwrap());
        let plugin = plugin(json!(null), &resources);
        plugin.on_parsed(&mut ctx).unwrap();
        let request = ctx.request.unwrap();
        assert_eq!(&*request.raw, br#"{"model":"m","messages":[{}]}"#);
        assert_eq!(ctx.cache_salt.as_deref(), Some(&*plugin.salt("-")));
    }
}
