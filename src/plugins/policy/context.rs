//! How long a prompt may be, and what becomes of one that is longer.

use std::{path::Path, sync::Arc};

use super::{
    Hits,
    config::{ContextConfig, OverContext, RouteToConfig, Tokens},
    text::{Role, Shape, plain},
    tokens::{Ruler, Tokenizers, prompt_of},
};
use crate::{
    context::{Pattern, Principal},
    error::{Error, Result},
    openai::{ApiRequest, Edit, cursor::Cursor, json},
    plugins::ConfigError,
};

/// The limits of prompts.
pub(super) struct Context {
    limit: Option<u64>,
    models: Vec<(Pattern, u64)>,
    count_answer: bool,
    over: OverContext,
    route_to: RouteToConfig,
    tokenizers: Tokenizers,
    media: u64,
}

/// What has become of a prompt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// It is short enough.
    Fits,
    /// So many messages were left out.
    Trimmed(usize),
    /// It goes to these groups only.
    Groups(Arc<[Box<str>]>),
    /// It asks for another model now.
    Rerouted,
}

/// What has become of a prompt, and how many tokens may still be put into it;
/// `None` where nothing bounds it.
type Fitted = (Fit, Option<u64>);

fn get(tokens: Tokens) -> u64 {
    u64::from(tokens.0.get())
}

impl Context {
    pub(super) fn new(
        config: ContextConfig,
        base: &Path,
    ) -> std::result::Result<Self, ConfigError> {
        let wrong = |path: &str, message: String| ConfigError {
            path: format!("policy.context{path}"),
            message,
        };
        if config.limit.is_none() && config.models.is_empty() {
            return Err(wrong("", "expected limit, models, or both".to_owned()));
        }
        let route_to = config.route_to.unwrap_or_default();
        let leads_somewhere = !route_to.groups.is_empty() || route_to.model.is_some();
        if (config.over == OverContext::Route) != leads_somewhere {
            let message = "expected groups or a model with over: route, and only with it";
            return Err(wrong(".route_to", message.to_owned()));
        }
        let mut tokenizers = Tokenizers::default();
        for (pattern, file) in &config.tokenizers {
            let read = tokenizers.add(pattern, &base.join(file));
            read.map_err(|why| {
                wrong(
                    &format!(".tokenizers.{pattern}"),
                    format!("{}: {why}", file.display()),
                )
            })?;
        }
        let models = config.models.into_iter();
        Ok(Self {
            limit: config.limit.map(get),
            models: models
                .map(|(model, most)| (Pattern::new(model), get(most)))
                .collect(),
            count_answer: config.count_answer,
            over: config.over,
            route_to,
            tokenizers,
            media: get(config.media_tokens),
        })
    }

    /// Returns the groups that long prompts go to.
    pub(super) fn groups(&self) -> &[String] {
        &self.route_to.groups
    }

    fn limit_of(&self, model: &str) -> Option<u64> {
        let named = self
            .models
            .iter()
            .find(|(pattern, _)| pattern.matches(model));
        named.map(|(_, most)| *most).or(self.limit)
    }

    /// Measures a prompt, and does what is to be done with one that is too long.
    ///
    /// # Errors
    /// 400 `context_length_exceeded`.
    pub(super) fn apply(
        &self,
        request: &mut ApiRequest,
        principal: Option<&Principal>,
        hits: &Hits,
    ) -> Result<Fitted> {
        let Some(limit) = self.limit_of(&request.model) else {
            return Ok((Fit::Fits, None));
        };
        let Some((key, shape)) = prompt_of(request) else {
            return Ok((Fit::Fits, None));
        };
        let measured = self.measure(request, key, shape, limit);
        if measured.total() <= limit {
            return Ok((Fit::Fits, Some(limit - measured.total())));
        }
        let refuse = |limit: u64| {
            hits.note("context", "reject", 1);
            Err(too_long(key, &measured, limit))
        };
        match self.over {
            OverContext::Reject => refuse(limit),
            OverContext::Trim => {
                let room = limit.saturating_sub(measured.answer);
                match self.trim(request, key, shape, room)? {
                    Some(left_out) => {
                        hits.note("context", "trim", 1);
                        let now = self.measure(request, key, shape, limit).total();
                        Ok((Fit::Trimmed(left_out), Some(limit.saturating_sub(now))))
                    }
                    None => refuse(limit),
                }
            }
            OverContext::Route => {
                let to = &self.route_to;
                let model = to.model.as_deref().unwrap_or(&request.model);
                let may = principal.is_none_or(|who| who.may_use(model));
                // Without a limit of its own a model has the one that it has
                // when it is asked for directly.
                let named = to.model.as_deref().filter(|_| to.limit.is_none());
                let most = to.limit.map(get).or_else(|| self.limit_of(named?));
                if !may {
                    return refuse(limit);
                }
                let mut room = None;
                if let Some(most) = most {
                    room = most.checked_sub(self.measure(request, key, shape, most).total());
                    if room.is_none() {
                        return refuse(most);
                    }
                }
                hits.note("context", "route", 1);
                if let Some(model) = &to.model {
                    let edits: Vec<Edit<'_>> = request.model_edit(model).into_iter().collect();
                    request.edit(&edits)?;
                }
                if to.groups.is_empty() {
                    return Ok((Fit::Rerouted, room));
                }
                let groups = to.groups.iter().map(|name| name.as_str().into());
                Ok((Fit::Groups(groups.collect()), room))
            }
        }
    }

    /// Counts, at least as far as `limit`.
    fn measure(&self, request: &ApiRequest, key: &str, shape: Shape, limit: u64) -> Measured {
        let ruler = self.ruler(request);
        let wanted = request.max_tokens.filter(|_| self.count_answer);
        let answer = wanted.map_or(0, |wanted| wanted.value);
        let value = request.get(key).unwrap_or_default();
        let mut prompt = ruler.rest(request, limit);
        let mut cursor = Cursor::new(value);
        if matches!(shape, Shape::Turns) && cursor.peek() == Some(b'[') {
            cursor.enter_array();
            while cursor.item() && prompt <= limit {
                let message = cursor.skip().unwrap_or_default();
                prompt += ruler.message(message, limit.saturating_sub(prompt));
            }
        } else {
            prompt += ruler.prompts(value, limit.saturating_sub(prompt));
        }
        Measured { prompt, answer }
    }

    /// Counts a text as the prompt of a model is counted.
    pub(super) fn count(&self, model: &str, text: &str) -> u64 {
        Ruler::new(&self.tokenizers, model, self.media).text(text, u64::MAX)
    }

    fn ruler(&self, request: &ApiRequest) -> Ruler<'_> {
        Ruler::new(&self.tokenizers, &request.model, self.media)
    }

    /// Leaves out the oldest turns: a turn is what the user says with all that
    /// answers it, so that calls of tools stay with their results. What the
    /// system says and the last turn stay. `None` if that is not enough.
    fn trim(
        &self,
        request: &mut ApiRequest,
        key: &'static str,
        shape: Shape,
        room: u64,
    ) -> Result<Option<usize>> {
        let value = request.get(key).unwrap_or_default();
        let mut cursor = Cursor::new(value);
        if !matches!(shape, Shape::Turns) || cursor.peek() != Some(b'[') {
            return Ok(None);
        }
        let mut messages = Vec::new();
        cursor.enter_array();
        while cursor.item() {
            let bytes = cursor.skip().unwrap_or_default();
            messages.push((bytes, role(bytes)));
        }
        let ruler = self.ruler(request);
        let mut used = ruler.rest(request, room);
        for (bytes, role) in &messages {
            if *role == Role::System && used <= room {
                used += ruler.message(bytes, room - used);
            }
        }
        // From the newest turn back as far as there is room.
        let last = messages.iter().rposition(|(_, role)| *role == Role::User);
        let mut end = messages.len();
        let mut kept_from = None;
        for start in (0..messages.len()).rev() {
            let begins = matches!(messages.get(start), Some((_, Role::User))) || start == 0;
            if !begins {
                continue;
            }
            // What stands before the first of the user is no turn of its own
            // unless there is no other.
            let turn = messages.get(start..end).unwrap_or_default();
            for (bytes, role) in turn {
                if *role != Role::System && used <= room {
                    used += ruler.message(bytes, room - used);
                }
            }
            if used > room {
                break;
            }
            kept_from = Some(start);
            end = start;
        }
        let Some(from) = kept_from.filter(|from| last.is_none_or(|last| *from <= last)) else {
            return Ok(None);
        };
        let stays =
            |(at, (_, role)): &(usize, &(&[u8], Role))| *at >= from || *role == Role::System;
        let kept: Vec<&[u8]> = messages
            .iter()
            .enumerate()
            .filter(stays)
            .map(|(_, (bytes, _))| *bytes)
            .collect();
        let left_out = messages.len() - kept.len();
        if left_out == 0 {
            return Ok(None);
        }
        let joined = [&b"["[..], &kept.join(&b","[..]), b"]"].concat();
        request.edit(&[Edit::set(key, joined)])?;
        Ok(Some(left_out))
    }
}

/// The tokens of a request.
#[derive(Debug)]
struct Measured {
    prompt: u64,
    answer: u64,
}

impl Measured {
    const fn total(&self) -> u64 {
        self.prompt.saturating_add(self.answer)
    }
}

/// Says it as OpenAI does.
fn too_long(key: &'static str, measured: &Measured, limit: u64) -> Error {
    let (total, prompt, answer) = (measured.total(), measured.prompt, measured.answer);
    let have = match answer {
        0 => format!(
            "your {key} resulted in at least {prompt} tokens. Please reduce the length of the {key}."
        ),
        _ => format!(
            "you requested at least {total} tokens ({prompt} in the {key}, {answer} in the \
             completion). Please reduce the length of the {key} or completion."
        ),
    };
    let message = format!("This model's maximum context length is {limit} tokens. However, {have}");
    Error::invalid("context_length_exceeded", message).param(key)
}

/// Returns whose a message is; of items without a role, those that belong to an
/// answer are not the user's.
fn role(message: &[u8]) -> Role {
    let mut cursor = Cursor::new(message);
    let mut kind = None;
    cursor.enter_object();
    while let Some(key) = cursor.key() {
        let key = plain(key);
        let value = cursor.skip().unwrap_or_default();
        match (&*key, json::text(value).as_deref()) {
            ("role", Some("system" | "developer")) => return Role::System,
            ("role", Some("assistant")) => return Role::Assistant,
            ("role", Some("tool" | "function")) => return Role::Tool,
            ("role", _) => return Role::User,
            ("type", Some(other)) if other != "message" => kind = Some(Role::Tool),
            _ => {}
        }
    }
    kind.unwrap_or(Role::User)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::openai::Endpoint;

    fn context(config: Value) -> std::result::Result<Context, ConfigError> {
        Context::new(serde_json::from_value(config).unwrap(), Path::new("."))
    }

    fn chat(messages: &Value, more: &str) -> ApiRequest {
        let body = format!(r#"{{"model":"m","messages":{messages}{more}}}"#);
        ApiRequest::parse(Endpoint::ChatCompletions, body.into(), 64).unwrap()
    }

    fn apply(config: Value, request: &mut ApiRequest) -> std::result::Result<Fit, Error> {
        context(config)
            .unwrap()
            .apply(request, None, &Hits::default())
            .map(|(fit, _)| fit)
    }

    #[test]
    fn it_is_known_what_is_left() {
        let left = |config: Value, more: &str| {
            let mut request = chat(&json!([ten("user", 'a'), ten("user", 'b')]), more);
            let context = context(config).unwrap();
            let (_, room) = context.apply(&mut request, None, &Hits::default()).unwrap();
            let now = context.measure(&request, "messages", Shape::Turns, 1000);
            room.map(|room| (room, room + now.total()))
        };
        assert_eq!(left(json!({ "limit": 30 }), ""), Some((7, 30)));
        let asked = r#","max_tokens":5"#;
        assert_eq!(left(json!({ "limit": 30 }), asked), Some((2, 30)));
        let trim = json!({ "limit": 20, "over": "trim" });
        assert_eq!(left(trim, asked), Some((2, 20)));
        let to = json!({ "groups": ["large"], "limit": 100 });
        let route = json!({ "limit": 20, "over": "route", "route_to": to });
        assert_eq!(left(route, ""), Some((77, 100)));
        let to = json!({ "groups": ["large"] });
        let route = json!({ "limit": 20, "over": "route", "route_to": to });
        assert_eq!(left(route, ""), None);
        assert_eq!(left(json!({ "models": { "other": 20 } }), ""), None);
    }

    /// A message of 10 tokens.
    fn ten(role: &str, mark: char) -> Value {
        json!({ "role": role, "content": mark.to_string().repeat(24) })
    }

    fn marks(request: &ApiRequest) -> String {
        let body: Value = serde_json::from_slice(&request.raw).unwrap();
        let messages = body["messages"].as_array().unwrap().iter();
        let mark = |message: &Value| message["content"].as_str()?.chars().next();
        messages
            .map(|message| mark(message).unwrap_or('-'))
            .collect()
    }

    #[test]
    fn what_is_too_long_is_refused_in_openais_words() {
        let messages = json!([ten("user", 'a')]);
        let mut request = chat(&messages, r#","max_tokens":7"#);
        assert_eq!(
            apply(json!({ "limit": 20 }), &mut request).unwrap(),
            Fit::Fits
        );
        let error = apply(json!({ "limit": 19 }), &mut request).unwrap_err();
        assert_eq!(error.status, 400);
        assert_eq!(error.code.as_deref(), Some("context_length_exceeded"));
        assert_eq!(error.param.as_deref(), Some("messages"));
        let begin = "This model's maximum context length is 19 tokens. However, you requested";
        assert!(error.message.starts_with(begin), "{}", error.message);
        let config = json!({ "limit": 13, "count_answer": false });
        assert_eq!(apply(config, &mut request).unwrap(), Fit::Fits);
        let config = json!({ "limit": 13, "models": { "m*": 20 } });
        assert_eq!(apply(config, &mut request).unwrap(), Fit::Fits);
    }

    #[test]
    fn the_oldest_turns_go_first_and_whole() {
        let call = json!({ "role": "assistant", "content": null, "tool_calls":
            [{ "id": "1", "function": { "name": "f", "arguments": "{}" } }] });
        let messages = json!([
            ten("system", 's'),
            ten("user", 'a'),
            ten("assistant", 'b'),
            ten("user", 'c'),
            call,
            ten("tool", 'd'),
            ten("assistant", 'e'),
            ten("developer", 'z'),
            ten("user", 'f'),
        ]);
        for (limit, left) in [
            (89, "sabc-dezf"),
            (88, "sc-dezf"),
            (69, "sc-dezf"),
            (68, "szf"),
            (33, "szf"),
        ] {
            let mut request = chat(&messages, "");
            let before = request.raw.clone();
            let fit = apply(json!({ "limit": limit, "over": "trim" }), &mut request);
            assert_eq!(marks(&request), left, "{limit}");
            match left.len() {
                9 => assert_eq!((fit.unwrap(), request.raw), (Fit::Fits, before)),
                kept => assert_eq!(fit.unwrap(), Fit::Trimmed(9 - kept)),
            }
        }
        let mut request = chat(&messages, "");
        let error = apply(json!({ "limit": 32, "over": "trim" }), &mut request).unwrap_err();
        assert_eq!(error.code.as_deref(), Some("context_length_exceeded"));
        assert_eq!(marks(&request), "sabc-dezf");
    }

    #[test]
    fn a_long_one_goes_elsewhere_if_it_fits_there() {
        let messages = json!([ten("user", 'a')]);
        let to = |to: Value| json!({ "limit": 5, "over": "route", "route_to": to });
        let mut request = chat(&messages, "");
        let fit = apply(to(json!({ "groups": ["big"] })), &mut request).unwrap();
        assert_eq!(fit, Fit::Groups(["big".into()].into()));
        let fit = apply(to(json!({ "model": "large", "limit": 13 })), &mut request).unwrap();
        assert_eq!(fit, Fit::Rerouted);
        assert_eq!(request.model, "large");
        let mut request = chat(&messages, "");
        assert!(apply(to(json!({ "model": "large", "limit": 12 })), &mut request).is_err());
        assert_eq!(request.model, "m");
    }

    #[test]
    fn settings_that_make_no_sense_are_mistakes() {
        for config in [
            json!({}),
            json!({ "limit": 1, "over": "route" }),
            json!({ "limit": 1, "route_to": { "model": "m" } }),
            json!({ "limit": 1, "tokenizers": { "m": "nowhere.json" } }),
        ] {
            assert!(context(config.clone()).is_err(), "{config}");
        }
        assert!(serde_json::from_value::<ContextConfig>(json!({ "limit": 0 })).is_err());
    }
}
