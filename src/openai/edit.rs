//! Edits of a request that leave every other byte as it came.
//!
//! Start at [`ApiRequest::edited`]; the other functions say which edits a cause
//! asks for, so that several make one body in one call.

use std::borrow::Cow;

use bytes::Bytes;

use super::{
    ApiRequest, Endpoint, N_PREDICT,
    cursor::Cursor,
    json::{self, Member, Object},
};
use crate::error::Result;

/// A change to one top-level member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit<'a> {
    /// Gives the member this value, which must be valid JSON; a member that does
    /// not exist is added at the end.
    Set(Cow<'a, str>, Cow<'a, [u8]>),
    /// Takes the member away, if it exists.
    Remove(Cow<'a, str>),
}

impl<'a> Edit<'a> {
    /// Sets a member to a value that is valid JSON already.
    pub fn set(key: impl Into<Cow<'a, str>>, value: impl Into<Cow<'a, [u8]>>) -> Self {
        Self::Set(key.into(), value.into())
    }

    /// Sets a member to a string, which is escaped here.
    pub fn set_text(key: impl Into<Cow<'a, str>>, value: &str) -> Self {
        Self::set(key, quoted(value))
    }

    /// Takes a member away.
    pub fn remove(key: impl Into<Cow<'a, str>>) -> Self {
        Self::Remove(key.into())
    }

    fn key(&self) -> &str {
        match self {
            Self::Set(key, _) | Self::Remove(key) => key,
        }
    }
}

impl ApiRequest {
    /// Returns the body with these edits: everything else stays byte for byte.
    /// Of two edits of one key the later counts. Without any change the bytes
    /// are shared, not copied.
    pub fn edited(&self, edits: &[Edit<'_>]) -> Bytes {
        match splice(&self.raw, &self.object, edits) {
            Some(body) => body.into(),
            None => self.raw.clone(),
        }
    }

    /// Makes these edits for good: what is read of the body is read anew.
    ///
    /// # Errors
    /// As [`parse`](Self::parse): the edits make it a body that no client might
    /// send. The request is as it was then.
    pub fn edit(&mut self, edits: &[Edit<'_>]) -> Result<()> {
        if let Some(body) = splice(&self.raw, &self.object, edits) {
            // The depth of what came was checked; edits are ours.
            *self = Self::parse(self.endpoint, body.into(), usize::MAX)?;
        }
        Ok(())
    }

    /// Asks for another model; nothing if it is the one asked for.
    pub fn model_edit(&self, name: &str) -> Option<Edit<'static>> {
        (self.model != name).then(|| Edit::set_text("model", name))
    }

    /// Lowers every bound on generated tokens to at most `cap`, each under its
    /// own key, or sets one if the client did not. Empty if nothing changes, and
    /// for calls that generate nothing.
    pub fn max_tokens_cap(&self, cap: u64) -> Vec<Edit<'static>> {
        let keys = self.endpoint.token_keys();
        let written = keys.iter().filter_map(|&key| {
            let value = self.get(key).filter(|value| *value != b"null")?;
            // What is no such number is llama.cpp's -1: no bound.
            Some((key, Cursor::new(value).integer()))
        });
        let mut edits = Vec::new();
        let mut bounded = false;
        for (key, wish) in written {
            // Only llama.cpp heeds its own word.
            bounded |= key != N_PREDICT;
            if wish.is_none_or(|wish| wish > cap) {
                edits.push(Edit::set(key, cap.to_string().into_bytes()));
            }
        }
        if let (false, Some(&key)) = (bounded, keys.first()) {
            edits.push(Edit::set(key, cap.to_string().into_bytes()));
        }
        edits
    }

    /// Asks for a usage event at the end of a stream of chat or text
    /// completions, keeping the client's other stream options. Nothing if the
    /// client asked for it himself, or if there is no such stream.
    pub fn ask_usage(&self) -> Option<Edit<'static>> {
        let applies = matches!(
            self.endpoint,
            Endpoint::ChatCompletions | Endpoint::Completions
        );
        if !applies || !self.stream || self.include_usage == Some(true) {
            return None;
        }
        let options = self
            .get("stream_options")
            .filter(|options| options.first() == Some(&b'{'))
            .unwrap_or(b"{}");
        // The depth was checked with the body.
        let object = json::scan(options, usize::MAX).ok()?;
        let include = Edit::set("include_usage", &b"true"[..]);
        let options = splice(options, &object, &[include])?;
        Some(Edit::set("stream_options", options))
    }
}

/// Splices edits into an object; `None` if they change nothing.
pub(super) fn splice(raw: &[u8], object: &Object, edits: &[Edit<'_>]) -> Option<Vec<u8>> {
    let last_edit_of = |key: &[u8]| edits.iter().rev().find(|edit| edit.key().as_bytes() == key);
    let added = || {
        edits.iter().enumerate().filter_map(|(i, edit)| {
            let Edit::Set(key, value) = edit else {
                return None;
            };
            let superseded = edits.iter().skip(i + 1).any(|later| later.key() == key);
            let exists = object.find(raw, key).is_some();
            (!superseded && !exists).then_some((key, value))
        })
    };
    let changes = |member: &Member| match last_edit_of(member.name(raw)) {
        None => false,
        Some(Edit::Remove(_)) => true,
        Some(Edit::Set(_, value)) => value.as_ref() != member.value.of(raw),
    };
    if added().next().is_none() && !object.members.iter().any(changes) {
        return None;
    }

    let more: usize = edits
        .iter()
        .map(|edit| match edit {
            Edit::Set(key, value) => key.len() + value.len() + 4,
            Edit::Remove(_) => 0,
        })
        .sum();
    let mut out = Vec::with_capacity(raw.len() + more);
    let piece = |start: usize, end: usize| raw.get(start..end).unwrap_or_default();

    // What follows the brace, or what is left of an object without members.
    let opening = raw.iter().position(|&byte| byte == b'{').unwrap_or(0) + 1;
    let first = object.members.first();
    let last = object.members.last();
    out.extend_from_slice(piece(0, first.map_or(opening, |member| member.key.start)));
    let mut is_first = true;
    let mut previous_end = None;
    for member in &object.members {
        let edit = last_edit_of(member.name(raw));
        let separator = previous_end.replace(member.value.end);
        if let Some(Edit::Remove(_)) = edit {
            continue;
        }
        if let (false, Some(end)) = (is_first, separator) {
            out.extend_from_slice(piece(end, member.key.start));
        }
        is_first = false;
        out.extend_from_slice(piece(member.key.start, member.value.start));
        match edit {
            Some(Edit::Set(_, value)) => out.extend_from_slice(value),
            _ => out.extend_from_slice(member.value.of(raw)),
        }
    }
    for (key, value) in added() {
        if !is_first {
            out.push(b',');
        }
        is_first = false;
        out.extend_from_slice(&quoted(key));
        out.push(b':');
        out.extend_from_slice(value);
    }
    out.extend_from_slice(piece(
        last.map_or(opening, |member| member.value.end),
        raw.len(),
    ));
    Some(out)
}

/// Returns a text as a JSON string.
pub(super) fn quoted(text: &str) -> Vec<u8> {
    serde_json::to_vec(text).expect("a string is always JSON")
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::{super::testing::Dice, *};

    fn parse(endpoint: Endpoint, body: impl Into<Bytes>) -> ApiRequest {
        ApiRequest::parse(endpoint, body.into(), 64).unwrap()
    }

    fn chat(more: &str) -> ApiRequest {
        let body =
            format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{more}}}"#);
        parse(Endpoint::ChatCompletions, body)
    }

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn without_a_change_the_bytes_are_shared() {
        let request = chat(r#","seed":123456789012345678901234567890"#);
        for edits in [
            vec![],
            vec![Edit::remove("absent")],
            vec![Edit::set_text("model", "m")],
            vec![Edit::set("new", &b"1"[..]), Edit::remove("new")],
        ] {
            let body = request.edited(&edits);
            assert_eq!(body.as_ptr(), request.raw.as_ptr(), "{edits:?}");
            assert_eq!(body.len(), request.raw.len());
        }
    }

    #[test]
    fn an_edit_leaves_every_other_byte_as_it_was() {
        let raw = "\n{ \"model\" : \"m\" ,\t\"seed\":1234567890123456789012345 , \"messages\":[{ }] ,\"x\" : 1.0e0 } ";
        let request = parse(Endpoint::ChatCompletions, raw);
        let edited = |edits: &[Edit<'_>]| text(&request.edited(edits)).to_owned();
        assert_eq!(
            edited(&[Edit::set_text("model", "a\"b")]),
            raw.replace("\"m\"", "\"a\\\"b\"")
        );
        assert_eq!(
            edited(&[Edit::remove("model")]),
            raw.replace("\"model\" : \"m\" ,\t", "")
        );
        assert_eq!(
            edited(&[Edit::remove("seed")]),
            raw.replace(" ,\t\"seed\":1234567890123456789012345", "")
        );
        assert_eq!(
            edited(&[Edit::remove("x")]),
            raw.replace(" ,\"x\" : 1.0e0", "")
        );
        assert_eq!(
            edited(&[Edit::set("new", &b"[1]"[..])]),
            raw.replace("1.0e0", "1.0e0,\"new\":[1]")
        );
        assert_eq!(
            edited(&[
                Edit::set("x", &b"2"[..]),
                Edit::remove("seed"),
                Edit::set("x", &b"3"[..]),
                Edit::set("y", &b"4"[..]),
            ]),
            raw.replace(" ,\t\"seed\":1234567890123456789012345", "")
                .replace("1.0e0", "3,\"y\":4")
        );
    }

    #[test]
    fn every_member_can_be_taken_away_and_others_put_in() {
        let raw = b" {\"a\":1 , \"b\":2 }\n";
        let object = json::scan(raw, 8).unwrap();
        let none = [Edit::remove("a"), Edit::remove("b")];
        assert_eq!(splice(raw, &object, &none).unwrap(), b" { }\n");
        let other = [
            Edit::remove("a"),
            Edit::set("c", &b"3"[..]),
            Edit::remove("b"),
        ];
        assert_eq!(splice(raw, &object, &other).unwrap(), b" {\"c\":3 }\n");
        let empty = json::scan(b"{ }", 8).unwrap();
        let one = [Edit::set("c", &b"3"[..])];
        assert_eq!(splice(b"{ }", &empty, &one).unwrap(), b"{\"c\":3 }");
    }

    #[test]
    fn any_edits_of_any_body_give_what_they_say() {
        let mut dice = Dice(0xed17);
        for _ in 0..10_000 {
            let object = dice.object(3);
            let mut raw = String::new();
            dice.write(&Value::Object(object.clone()), &mut raw);
            let mut expected: Map<String, Value> = object.clone();
            let mut edits = Vec::new();
            for _ in 0..dice.below(5) {
                let mut keys: Vec<String> = object.keys().cloned().collect();
                keys.extend(["new".to_owned(), "\"\n".to_owned()]);
                let key = dice.pick(&keys).clone();
                if dice.below(2) == 0 {
                    expected.shift_remove(&key);
                    edits.push(Edit::remove(key));
                } else {
                    let value = dice.value(2);
                    let mut written = String::new();
                    dice.write(&value, &mut written);
                    let written = written.trim().as_bytes().to_vec();
                    expected.insert(key.clone(), value);
                    edits.push(Edit::set(key, written));
                }
            }
            let members = json::scan(raw.as_bytes(), 64).unwrap();
            let out = splice(raw.as_bytes(), &members, &edits)
                .unwrap_or_else(|| raw.clone().into_bytes());
            let seen: Value = serde_json::from_slice(&out).unwrap();
            assert_eq!(seen, Value::Object(expected), "{raw}\n{edits:?}");
            json::scan(&out, 64).unwrap();
        }
    }

    #[test]
    fn an_edit_for_good_is_read_anew_or_not_made() {
        let mut request = chat("");
        request
            .edit(&[
                Edit::set_text("model", "b"),
                Edit::set("stream", &b"true"[..]),
            ])
            .unwrap();
        assert_eq!((request.model.as_str(), request.stream), ("b", true));
        assert!(text(&request.raw).contains(r#""model":"b""#));
        let before = request.raw.clone();
        assert!(request.edit(&[Edit::set("n", &b"\"x\""[..])]).is_err());
        assert_eq!(request.raw, before);
    }

    #[test]
    fn a_model_is_rewritten_only_if_it_differs() {
        let request = chat("");
        assert_eq!(request.model_edit("m"), None);
        let edit = request.model_edit("other").unwrap();
        let body: Value = serde_json::from_slice(&request.edited(&[edit])).unwrap();
        assert_eq!(body["model"], "other");
    }

    #[test]
    fn a_cap_lowers_each_wish_under_its_own_key() {
        let capped = |request: &ApiRequest, cap| {
            let edits = request.max_tokens_cap(cap);
            serde_json::from_slice::<Value>(&request.edited(&edits)).unwrap()
        };
        let request = chat(r#","max_completion_tokens":500"#);
        let body = capped(&request, 100);
        assert_eq!(body["max_completion_tokens"], 100);
        assert_eq!(body.get("max_tokens"), None);
        assert!(request.max_tokens_cap(500).is_empty());

        let body = capped(
            &chat(r#","max_completion_tokens":500,"max_tokens":50"#),
            100,
        );
        assert_eq!(
            (&body["max_completion_tokens"], &body["max_tokens"]),
            (&json!(100), &json!(50))
        );

        assert_eq!(capped(&chat(""), 100)["max_tokens"], 100);
        assert_eq!(
            capped(&chat(r#","max_tokens":null"#), 100)["max_tokens"],
            100
        );

        let responses = parse(Endpoint::Responses, r#"{"model":"m","input":"x"}"#);
        assert_eq!(capped(&responses, 100)["max_output_tokens"], 100);
        let embeddings = parse(Endpoint::Embeddings, r#"{"model":"m","input":"x"}"#);
        assert!(embeddings.max_tokens_cap(1).is_empty());
    }

    #[test]
    fn usage_is_asked_for_beside_the_clients_own_options() {
        let asked = |more| {
            let request = chat(more);
            let edit = request.ask_usage()?;
            let body = request.edited(&[edit]);
            parse(Endpoint::ChatCompletions, body)
                .get("stream_options")
                .map(|options| text(options).to_owned())
        };
        let plain = Some(r#"{"include_usage":true}"#.to_owned());
        assert_eq!(asked(r#","stream":true"#), plain);
        assert_eq!(asked(r#","stream":true,"stream_options":null"#), plain);
        assert_eq!(asked(r#","stream":true,"stream_options":{}"#), plain);
        assert_eq!(
            asked(r#","stream":true,"stream_options":{"include_usage":false}"#),
            plain
        );
        assert_eq!(
            asked(r#","stream":true,"stream_options":{ "include_obfuscation":false }"#),
            Some(r#"{ "include_obfuscation":false,"include_usage":true }"#.to_owned())
        );
        assert_eq!(
            asked(r#","stream":true,"stream_options":{"include_usage":true}"#),
            None
        );
        assert_eq!(asked(""), None);
        let responses = r#"{"model":"m","input":"x","stream":true}"#;
        assert_eq!(parse(Endpoint::Responses, responses).ask_usage(), None);
    }

    #[test]
    fn helpers_compose_in_one_call() {
        let request = chat(r#","stream":true,"max_tokens":9"#);
        let mut edits = request.max_tokens_cap(4);
        edits.extend(request.model_edit("other"));
        edits.extend(request.ask_usage());
        assert_eq!(
            text(&request.edited(&edits)),
            r#"{"model":"other","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":4,"stream_options":{"include_usage":true}}"#
        );
    }
}
