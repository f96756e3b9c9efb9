//! Which parameters a request may have, and which values.
//!
//! In this order: what is dangerous, what is unknown, what is too much, what is
//! missing, what is to be so in any case.

use indexmap::IndexMap;
use serde_json::Value;

use super::{
    Hits,
    config::{LimitConfig, Over, ParametersConfig, Unwanted},
    names::{extra, is_known, is_known_anywhere},
};
use crate::{
    context::Pattern,
    error::{Error, Result},
    openai::{ApiRequest, Edit, N_PREDICT, TOKEN_KEYS, json},
    plugins::ConfigError,
};

/// What says what a request is: no parameter rule may touch it.
const FIXED: [&str; 6] = ["model", "stream", "messages", "prompt", "input", "query"];
/// Limits that hold unless the YAML has its own for the parameter.
const BUILT_IN: [(&str, f64); 3] = [("best_of", 8.0), ("logprobs", 20.0), ("top_logprobs", 20.0)];

/// The rules about parameters.
pub(super) struct Parameters {
    pub(super) trusted: Vec<Pattern>,
    extras: Unwanted,
    unknown: Unwanted,
    known: Vec<String>,
    limits: Vec<(String, LimitConfig)>,
    defaults: Vec<(String, Vec<u8>)>,
    force: Vec<(String, Vec<u8>)>,
}

impl Parameters {
    pub(super) fn new(config: ParametersConfig) -> std::result::Result<Self, ConfigError> {
        let wrong = |path: String, message: &str| ConfigError {
            path: format!("policy.parameters.{path}"),
            message: message.to_owned(),
        };
        for (name, limit) in &config.limits {
            if FIXED.contains(&name.as_str()) {
                let message = "expected another parameter: this one says what is asked for";
                return Err(wrong(format!("limits.{name}"), message));
            }
            if limit.min.is_none() && limit.max.is_none() {
                let message = "expected min, max, or both";
                return Err(wrong(format!("limits.{name}"), message));
            }
            if let Some(max) = limit.max
                && (!max.is_finite() || max <= 0.0)
            {
                let message = "expected a number above 0";
                return Err(wrong(format!("limits.{name}.max"), message));
            }
            let (min, max) = (limit.min, limit.max);
            if min.is_some_and(|min| !min.is_finite() || max.is_some_and(|max| min > max)) {
                let message = "expected a number that is not above max";
                return Err(wrong(format!("limits.{name}.min"), message));
            }
        }
        for (section, values) in [("defaults", &config.defaults), ("force", &config.force)] {
            for (name, value) in values {
                if FIXED.contains(&name.as_str()) {
                    let message = "expected another parameter: this one says what is asked for";
                    return Err(wrong(format!("{section}.{name}"), message));
                }
                let positive = TOKEN_KEYS.contains(&name.as_str()) || name == "n";
                if positive && value.as_u64().is_none_or(|value| value == 0) {
                    let message = "expected a whole number above 0";
                    return Err(wrong(format!("{section}.{name}"), message));
                }
                let limit = limit_of(&config.limits, name);
                if let (Some(limit), Some(number)) = (limit, value.as_f64())
                    && let Some(range) = limit.range_without(number)
                {
                    let message = format!("expected a number that limits allow: {range}");
                    return Err(wrong(format!("{section}.{name}"), &message));
                }
            }
        }
        let mut limits: Vec<(String, LimitConfig)> = config.limits.into_iter().collect();
        for (name, max) in BUILT_IN {
            if !limits.iter().any(|(named, _)| named == name) {
                let limit = LimitConfig {
                    max: Some(max),
                    ..LimitConfig::default()
                };
                limits.push((name.to_owned(), limit));
            }
        }
        let written = |values: IndexMap<String, Value>| {
            let values = values.into_iter();
            values
                .map(|(name, value)| (name, value.to_string().into_bytes()))
                .collect()
        };
        Ok(Self {
            trusted: config.trusted.into_iter().map(Pattern::new).collect(),
            extras: config.extras,
            unknown: config.unknown,
            known: config.known,
            limits,
            defaults: written(config.defaults),
            force: written(config.force),
        })
    }

    /// Applies the rules; the names of what was taken out go to `dropped`.
    ///
    /// # Errors
    /// 400 for a parameter that is refused, or that is out of its range.
    pub(super) fn apply(
        &self,
        request: &mut ApiRequest,
        trusted: bool,
        dropped: &mut Vec<String>,
        hits: &Hits,
    ) -> Result<()> {
        if !trusted {
            self.drop_unwanted(request, dropped, hits)?;
        }
        for (name, limit) in &self.limits {
            limit_one(request, name, limit, hits)?;
        }
        for (name, value) in &self.defaults {
            let absent = |key: &str| request.get(key).is_none_or(|value| value == b"null");
            let is_absent = match TOKEN_KEYS.contains(&name.as_str()) {
                true => TOKEN_KEYS.into_iter().all(absent),
                false => absent(name),
            };
            if is_absent && applies(request, name) {
                request.edit(&[Edit::set(name.as_str(), value.as_slice())])?;
            }
        }
        for (name, value) in &self.force {
            if !applies(request, name) {
                continue;
            }
            let mut edits = Vec::new();
            if TOKEN_KEYS.contains(&name.as_str()) {
                edits.extend(TOKEN_KEYS.map(Edit::remove));
            }
            edits.push(Edit::set(name.as_str(), value.as_slice()));
            request.edit(&edits)?;
        }
        Ok(())
    }

    fn drop_unwanted(
        &self,
        request: &mut ApiRequest,
        dropped: &mut Vec<String>,
        hits: &Hits,
    ) -> Result<()> {
        let mut edits = Vec::new();
        for member in &request.object.members {
            let name = String::from_utf8_lossy(member.name(&request.raw)).into_owned();
            // Readers that do not mind the case are read with.
            let own = is_known(request.endpoint, &name);
            let is_extra = !own && extra(&name.to_uppercase().to_lowercase());
            let is_named = self.known.contains(&name);
            let (verdict, rule) = match is_extra {
                true if is_named => continue,
                true => (self.extras, "extras"),
                false if is_named || own => continue,
                false => (self.unknown, "unknown"),
            };
            match verdict {
                Unwanted::Allow => continue,
                Unwanted::Drop => {
                    edits.push(Edit::remove(name.clone()));
                    dropped.push(name);
                }
                Unwanted::Reject => {
                    hits.note("parameters", rule, 1);
                    let message = "this parameter is not allowed here";
                    let name: String = name.chars().take(64).collect();
                    return Err(Error::invalid("unsupported_parameter", message).param(name));
                }
            }
            hits.note("parameters", rule, 1);
        }
        request.edit(&edits)
    }
}

impl LimitConfig {
    /// Says what is allowed, if a number is not.
    fn range_without(&self, number: f64) -> Option<String> {
        let nearest = number.max(self.min.unwrap_or(number));
        let nearest = nearest.min(self.max.unwrap_or(nearest));
        (nearest != number).then(|| self.range())
    }

    fn range(&self) -> String {
        match (self.min, self.max) {
            (Some(min), Some(max)) => format!("from {min} to {max}"),
            (None, Some(max)) => format!("at most {max}"),
            (Some(min), None) => format!("at least {min}"),
            (None, None) => String::new(),
        }
    }
}

/// Returns the limit that holds for a parameter: each bound on the tokens of an
/// answer is one on all of them.
fn limit_of<'a>(limits: &'a IndexMap<String, LimitConfig>, name: &str) -> Option<&'a LimitConfig> {
    let of_tokens = TOKEN_KEYS.contains(&name);
    let others = TOKEN_KEYS.iter().filter(|_| of_tokens);
    let named = limits.get(name);
    named.or_else(|| others.filter_map(|key| limits.get(*key)).next())
}

/// Says whether a parameter that the YAML names is one of this call's.
fn applies(request: &ApiRequest, name: &str) -> bool {
    is_known(request.endpoint, name) || request.endpoint.streams() && !is_known_anywhere(name)
}

fn limit_one(request: &mut ApiRequest, name: &str, limit: &LimitConfig, hits: &Hits) -> Result<()> {
    let of_tokens = TOKEN_KEYS.contains(&name);
    let keys: &[&str] = match of_tokens {
        true => &TOKEN_KEYS,
        false => &[name],
    };
    let mut edits = Vec::new();
    for &key in keys {
        let Some(value) = request.get(key).filter(|value| *value != b"null") else {
            continue;
        };
        if matches!(value, b"true" | b"false") {
            continue; // such as logprobs of chats
        }
        let number = std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse::<f64>().ok());
        // A number in quotes is one to many servers.
        let Some(number) = number.filter(|_| json::text(value).is_none()) else {
            let message = format!("`{key}` must be a number");
            return Err(Error::invalid("invalid_type", message).param(key.to_owned()));
        };
        let number = match key {
            // To llama.cpp what is below 0 is without a bound.
            N_PREDICT if number < 0.0 => f64::INFINITY,
            _ => number,
        };
        let nearest = number.max(limit.min.unwrap_or(number));
        let nearest = nearest.min(limit.max.unwrap_or(nearest));
        if nearest == number {
            continue;
        }
        hits.note("parameters", "limits", 1);
        if limit.over == Over::Reject {
            let range = limit.range();
            let message = format!("`{key}` must be {range}");
            return Err(Error::invalid("invalid_value", message).param(key.to_owned()));
        }
        edits.push(Edit::set(key, nearest.to_string().into_bytes()));
    }
    request.edit(&edits)?;
    // Who does not say how much he wants would get as much as there is.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is above 0, and a cast of what is too large gives the largest"
    )]
    let cap = limit.max.filter(|_| of_tokens).map(|max| max as u64);
    match cap {
        Some(cap) => {
            let edits = request.max_tokens_cap(cap.max(1));
            request.edit(&edits)
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::openai::Endpoint;

    fn parameters(config: Value) -> std::result::Result<Parameters, ConfigError> {
        Parameters::new(serde_json::from_value(config).unwrap())
    }

    fn request(endpoint: Endpoint, body: &str) -> ApiRequest {
        ApiRequest::parse(endpoint, Bytes::copy_from_slice(body.as_bytes()), 64).unwrap()
    }

    const CHAT: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]"#;

    fn run(config: Value, more: &str) -> std::result::Result<(String, Vec<String>), String> {
        let mut request = request(Endpoint::ChatCompletions, &format!("{CHAT}{more}}}"));
        let mut dropped = Vec::new();
        parameters(config)
            .unwrap()
            .apply(&mut request, false, &mut dropped, &Hits::default())
            .map_err(|error| error.to_string())?;
        let text = std::str::from_utf8(&request.raw).unwrap();
        let text = text.strip_prefix(CHAT).unwrap().strip_suffix('}').unwrap();
        Ok((text.to_owned(), dropped))
    }

    #[test]
    fn dangerous_extras_are_dropped_and_named() {
        let more = r#","chat_template":"{{","seed":12345678901234567890123,"GUIDED_regex":"(a+)+","vllm_xargs":{}"#;
        let (left, dropped) = run(json!({}), more).unwrap();
        assert_eq!(left, r#","seed":12345678901234567890123"#);
        assert_eq!(dropped, ["chat_template", "GUIDED_regex", "vllm_xargs"]);
        assert!(run(json!({ "extras": "reject" }), more).is_err());
        assert_eq!(run(json!({ "extras": "allow" }), more).unwrap().0, more);
        let known = json!({ "known": ["chat_template", "GUIDED_regex", "vllm_xargs"] });
        assert_eq!(run(known, more).unwrap().0, more);
    }

    #[test]
    fn what_nobody_knows_is_let_through_unless_the_yaml_says_otherwise() {
        let more = r#","top_k":5,"new_thing":1"#;
        assert_eq!(run(json!({}), more).unwrap().0, more);
        let (left, dropped) = run(json!({ "unknown": "drop" }), more).unwrap();
        assert_eq!(
            (left.as_str(), dropped),
            (r#","top_k":5"#, vec!["new_thing".to_owned()])
        );
        let error = run(json!({ "unknown": "reject" }), more).unwrap_err();
        assert!(error.contains("unsupported_parameter"), "{error}");
    }

    #[test]
    fn limits_refuse_or_lower() {
        let config = json!({ "limits": {
            "temperature": { "min": 0.5, "max": 1.5, "over": "lower" },
            "max_tokens": { "max": 100, "over": "lower" },
            "n": { "max": 2 },
        }});
        let run = |more: &str| run(config.clone(), more).map(|(left, _)| left);
        assert_eq!(run("").unwrap(), r#","max_tokens":100"#);
        assert_eq!(
            run(r#","temperature":9,"max_completion_tokens":200"#).unwrap(),
            r#","temperature":1.5,"max_completion_tokens":100"#
        );
        assert_eq!(
            run(r#","temperature":0.1,"max_tokens":20"#).unwrap(),
            r#","temperature":0.5,"max_tokens":20"#
        );
        assert!(run(r#","n":3"#).unwrap_err().contains("invalid_value"));
        for more in [r#","top_logprobs":1000000"#, r#","logprobs":21"#] {
            assert!(run(more).unwrap_err().contains("invalid_value"), "{more}");
        }
        assert!(
            run(r#","temperature":"9""#)
                .unwrap_err()
                .contains("invalid_type")
        );
        assert!(run(r#","logprobs":true"#).is_ok());
    }

    #[test]
    fn no_name_of_the_bound_gets_past_its_limit() {
        let more = r#","max_tokens":5,"n_predict":100000"#;
        let (left, dropped) = run(json!({}), more).unwrap();
        assert_eq!(
            (left.as_str(), dropped),
            (r#","max_tokens":5"#, vec![N_PREDICT.to_owned()])
        );
        let capped = |over: &str, more: &str| {
            let limits = json!({ "max_tokens": { "max": 100, "over": over } });
            run(json!({ "extras": "allow", "limits": limits }), more).map(|(left, _)| left)
        };
        for (more, left) in [
            (more, r#","max_tokens":5,"n_predict":100"#),
            (r#","n_predict":-1"#, r#","n_predict":100,"max_tokens":100"#),
            (r#","n_predict":7"#, r#","n_predict":7,"max_tokens":100"#),
            (
                r#","max_output_tokens":7"#,
                r#","max_output_tokens":7,"max_tokens":100"#,
            ),
        ] {
            assert_eq!(capped("lower", more).unwrap(), left);
        }
        for more in [more, r#","n_predict":-1"#] {
            assert!(capped("reject", more).unwrap_err().contains("n_predict"));
        }
    }

    #[test]
    fn defaults_fill_and_forced_values_replace() {
        let config = json!({
            "defaults": { "temperature": 0.7, "max_tokens": 50 },
            "force": { "user": "shared", "top_p": 1 },
        });
        let (left, _) = run(config.clone(), r#","top_p":0.1,"max_completion_tokens":9"#).unwrap();
        assert_eq!(
            left,
            r#","top_p":1,"max_completion_tokens":9,"temperature":0.7,"user":"shared""#
        );
        let mut embed = request(Endpoint::Embeddings, r#"{"model":"m","input":"a"}"#);
        parameters(config)
            .unwrap()
            .apply(&mut embed, false, &mut Vec::new(), &Hits::default())
            .unwrap();
        assert_eq!(
            &embed.raw[..],
            br#"{"model":"m","input":"a","user":"shared"}"#
        );
    }

    #[test]
    fn limits_of_nothing_are_mistakes() {
        for config in [
            json!({ "limits": { "max_tokens": { "max": 0 } } }),
            json!({ "limits": { "max_tokens": { "max": -5 } } }),
            json!({ "limits": { "top_p": { "min": 2, "max": 1 } } }),
            json!({ "defaults": { "max_tokens": 0 } }),
            json!({ "force": { "n": -1 } }),
            json!({ "force": { "model": "other" } }),
        ] {
            assert!(parameters(config.clone()).is_err(), "{config}");
        }
    }
}
