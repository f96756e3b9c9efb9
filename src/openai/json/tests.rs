use std::{collections::HashSet, time::Instant};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::{super::testing::Dice, *};

fn problem(body: impl AsRef<[u8]>) -> Problem {
    scan(body.as_ref(), 64).unwrap_err().problem
}

fn syntax(body: impl AsRef<[u8]>) -> (usize, &'static str) {
    match scan(body.as_ref(), 64).unwrap_err() {
        JsonError {
            offset,
            problem: Problem::Syntax(why),
        } => (offset, why),
        other => panic!("{other}"),
    }
}

#[test]
fn members_are_found_with_their_places_and_kinds() {
    let body = br#" { "model" : "m" , "n":1,"t":0.5,"l":[1,2,"x"] ,"o":{"model":[]}, "e":[],"z":null,"b":true} "#;
    let object = scan(body, 64).unwrap();
    let seen: Vec<_> = object
        .members
        .iter()
        .map(|member| {
            let value = std::str::from_utf8(member.value.of(body)).unwrap();
            let name = std::str::from_utf8(member.name(body)).unwrap();
            (name, value, member.kind, member.items)
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("model", "\"m\"", Kind::String, 0),
            ("n", "1", Kind::Int, 0),
            ("t", "0.5", Kind::Float, 0),
            ("l", "[1,2,\"x\"]", Kind::Array, 3),
            ("o", "{\"model\":[]}", Kind::Object, 0),
            ("e", "[]", Kind::Array, 0),
            ("z", "null", Kind::Null, 0),
            ("b", "true", Kind::Bool, 0),
        ]
    );
}

#[test]
fn kinds_of_items_are_those_of_the_top_most_array_alone() {
    let body = br#"{"a":[1,2],"b":[[1.5],["x"]],"c":[{"d":[1]},2],"d":{"e":[1]}}"#;
    let object = scan(body, 64).unwrap();
    let kinds = |name| object.find(body, name).unwrap().item_kinds;
    assert!(kinds("a").only(Kind::Int));
    assert!(kinds("b").only(Kind::Array));
    assert!(!kinds("c").only(Kind::Object) && !kinds("c").only(Kind::Int));
    assert_eq!(object.find(body, "d").unwrap().items, 0);
}

#[test]
fn a_key_with_escapes_is_found_by_its_meaning() {
    let body = br#"{"\u006dodel":"m"}"#;
    let object = scan(body, 64).unwrap();
    assert_eq!(object.find(body, "model").unwrap().name(body), b"model");
}

#[test]
fn what_is_no_object_is_refused() {
    for body in ["", "  ", "[]", "1", "\"x\"", "null", "x"] {
        assert_eq!(problem(body), Problem::NotAnObject, "{body}");
    }
}

#[test]
fn every_breach_of_the_grammar_is_refused_where_it_stands() {
    for (body, offset, why) in [
        (r#"{"a":1"#, 6, "it ends too early"),
        (r#"{"a":"#, 5, "it ends too early"),
        (r#"{"a""#, 4, "a colon is expected"),
        (r#"{"a" 1}"#, 5, "a colon is expected"),
        (r#"{"a":1,}"#, 7, "a key in double quotes is expected"),
        (r#"{a:1}"#, 1, "a key in double quotes is expected"),
        (r#"{'a':1}"#, 1, "a key in double quotes is expected"),
        (r#"{"a":1 "b":2}"#, 7, "a comma or } is expected"),
        (r#"{"a":[1 2]}"#, 8, "a comma or ] is expected"),
        (r#"{"a":[1,]}"#, 8, "a value is expected"),
        (r#"{"a":[1}"#, 7, "a comma or ] is expected"),
        (r#"{"a":{"b":1]}"#, 11, "a comma or } is expected"),
        (r#"{"a":1}x"#, 7, "something follows the object"),
        (r#"{"a":1}{}"#, 7, "something follows the object"),
        (r#"{"a":tru}"#, 5, "a value is expected"),
        (r#"{"a":nul"#, 5, "a value is expected"),
        (r#"{"a":True}"#, 5, "a value is expected"),
        (r#"{"a":NaN}"#, 5, "a value is expected"),
        (r#"{"a":Infinity}"#, 5, "a value is expected"),
        (r#"{"a":-Infinity}"#, 6, "a digit is expected"),
        (r#"{"a":+1}"#, 5, "a value is expected"),
        (r#"{"a":.5}"#, 5, "a value is expected"),
        (r#"{"a":1.}"#, 7, "a digit is expected"),
        (r#"{"a":1e}"#, 7, "a digit is expected"),
        (r#"{"a":01}"#, 6, "a comma or } is expected"),
        (r#"{"a":0x1}"#, 6, "a comma or } is expected"),
        (r#"{"a":1e400}"#, 5, "a number is out of range"),
        (r#"{"a":-1e400}"#, 5, "a number is out of range"),
        (r#"{"a":/**/1}"#, 5, "a value is expected"),
        (
            "{\"a\":\"x\ny\"}",
            7,
            "a control character stands in a string",
        ),
        (
            "{\"a\":\"\0\"}",
            6,
            "a control character stands in a string",
        ),
        ("{\0}", 1, "a key in double quotes is expected"),
        ("{\u{a0}}", 1, "a key in double quotes is expected"),
        (r#"{"a":"x"#, 5, "a string has no end"),
        (r#"{"a":"x\""#, 5, "a string has no end"),
        (r#"{"a":"\x"}"#, 6, "an escape is not one of JSON's"),
        (r#"{"a":"\U0041"}"#, 6, "an escape is not one of JSON's"),
        (r#"{"a":"\u00g0"}"#, 6, "\\u needs four hexadecimal digits"),
        (r#"{"a":"\u00"#, 6, "\\u needs four hexadecimal digits"),
        (
            r#"{"a":"\ud800"}"#,
            6,
            "half of a surrogate pair stands alone",
        ),
        (
            r#"{"a":"\udc00"}"#,
            6,
            "half of a surrogate pair stands alone",
        ),
        (
            r#"{"a":"\ud800A"}"#,
            6,
            "half of a surrogate pair stands alone",
        ),
        (
            r#"{"a":"\ud800\n"}"#,
            6,
            "half of a surrogate pair stands alone",
        ),
        (
            r#"{"\ud800":1}"#,
            2,
            "half of a surrogate pair stands alone",
        ),
        ("\u{feff}{}", 0, "it begins with a byte order mark"),
    ] {
        assert_eq!(syntax(body), (offset, why), "{body}");
    }
}

#[test]
fn what_is_no_utf_8_is_refused_where_it_stands() {
    for (body, offset) in [
        (&b"{\"a\":\"\xff\"}"[..], 6),
        (b"{\"a\":\"\xed\xa0\x80\"}", 6),
        (b"\xfe\xff\0{\0}", 0),
        (b"\xff\xfe{\0}\0", 0),
        (b"{\"a\":\"\xe2\x82", 6),
    ] {
        let error = scan(body, 64).unwrap_err();
        assert_eq!((error.offset, error.code()), (offset, "invalid_utf8"));
    }
    // UTF-16 without a mark is full of NULs.
    assert_eq!(
        problem(b"{\0}\0"),
        Problem::Syntax("a key in double quotes is expected")
    );
}

#[test]
fn numbers_that_are_odd_and_yet_clear_are_taken() {
    for number in [
        "-0",
        "0e0",
        "1E+2",
        "1e308",
        "1e-400",
        "0.1e-5",
        "123456789012345678901234567890",
        "-0.0",
    ] {
        let body = format!("{{\"a\":{number}}}");
        assert!(scan(body.as_bytes(), 64).is_ok(), "{number}");
    }
    let long = format!("{{\"a\":{}}}", "9".repeat(400));
    assert!(scan(long.as_bytes(), 64).is_ok());
    let long = format!("{{\"a\":{}.0}}", "9".repeat(400));
    assert_eq!(problem(long), Problem::Syntax("a number is out of range"));
}

#[test]
fn depth_is_counted_from_the_body_itself() {
    for depth in [1, 2, 64, 65, 200] {
        let inner = depth - 1;
        let body = format!("{{\"a\":{}1{}}}", "[".repeat(inner), "]".repeat(inner));
        let result = scan(body.as_bytes(), 64);
        if depth <= 64 {
            assert!(result.is_ok(), "{depth}");
        } else {
            let error = result.unwrap_err();
            assert_eq!(error.code(), "json_too_deep");
            assert_eq!(error.offset, 5 + 63);
        }
    }
    let bomb = "{\"a\":".repeat(1_000_000);
    assert_eq!(problem(&bomb), Problem::TooDeep(64));
}

#[test]
fn duplicate_keys_are_refused_at_any_depth_and_spelling() {
    for (body, offset) in [
        (r#"{"model":"a","model":"b"}"#, 13),
        (r#"{"model":"a","\u006dodel":"b"}"#, 13),
        (r#"{"\u006dodel":"a","model":"b"}"#, 18),
        (r#"{"\u006dodel":"a","m\u006fdel":"b"}"#, 18),
        (r#"{"a":{"b":1,"b":2}}"#, 12),
        (r#"{"a":[{"b":1},{"c":{"d":1,"e":2,"d":3}}]}"#, 32),
        (r#"{"":1,"":2}"#, 6),
        (r#"{"a":{},"a":[]}"#, 8),
        (r#"{"\ud83d\ude00":1,"😀":2}"#, 18),
    ] {
        let error = scan(body.as_bytes(), 64).unwrap_err();
        assert_eq!(
            (error.offset, error.code()),
            (offset, "duplicate_key"),
            "{body}"
        );
    }
}

#[test]
fn equal_keys_of_different_objects_are_no_duplicates() {
    let body = r#"{"a":{"a":{"a":1}},"b":[{"a":1},{"a":2}],"c":{"\u0061":1,"A":2,"ab":3}}"#;
    assert!(scan(body.as_bytes(), 64).is_ok());
}

#[test]
fn one_duplicate_among_very_many_keys_is_found() {
    for last in ["k0", "k77777", "\\u006b500"] {
        let keys: Vec<String> = (0..100_000).map(|i| format!("\"k{i}\":1")).collect();
        let body = format!("{{\"bias\":{{{}}}}}", keys.join(","));
        assert!(scan(body.as_bytes(), 64).is_ok());
        let body = format!("{{\"bias\":{{{},\"{last}\":2}}}}", keys.join(","));
        let error = scan(body.as_bytes(), 64).unwrap_err();
        assert_eq!(error.code(), "duplicate_key");
        assert_eq!(error.offset, body.rfind(&format!("\"{last}")).unwrap());
    }
}

#[test]
fn very_many_keys_cost_no_quadratic_time() {
    // Pair by pair this would be 8 * 10^10 comparisons: minutes, even here.
    let keys: Vec<String> = (0..400_000).map(|i| format!("\"k{i}\":1")).collect();
    let body = format!("{{\"bias\":{{{}}}}}", keys.join(","));
    let start = Instant::now();
    assert!(scan(body.as_bytes(), 64).is_ok());
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn a_body_has_at_most_1024_members_of_its_own() {
    let body = |n: usize| {
        let members: Vec<String> = (0..n).map(|i| format!("\"k{i}\":1")).collect();
        format!("{{{}}}", members.join(","))
    };
    assert_eq!(scan(body(1024).as_bytes(), 64).unwrap().members.len(), 1024);
    let error = scan(body(1025).as_bytes(), 64).unwrap_err();
    assert_eq!(error.problem, Problem::TooManyMembers);
    assert_eq!(error.code(), "invalid_json");
}

#[test]
fn a_string_may_end_at_any_place_of_a_block() {
    for length in 0..100 {
        for special in ["\"", "\\n\"", "\\u00e9\"", "é\""] {
            let body = format!("{{\"a\":\"{}{special},\"b\":1}}", "x".repeat(length));
            let object = scan(body.as_bytes(), 64).unwrap();
            assert_eq!(object.members.len(), 2);
        }
        let body = format!(
            "{{\"a\":\"{}\u{1f}{}\"}}",
            "x".repeat(length),
            "y".repeat(40)
        );
        assert_eq!(syntax(&body).0, 6 + length);
    }
}

#[test]
fn a_client_is_told_the_byte_and_the_reason() {
    let error = Error::from(scan(b"{\"a\":1,}", 64).unwrap_err());
    assert_eq!(error.status, 400);
    assert_eq!(
        error.message,
        "the body is not valid JSON at byte 7: a key in double quotes is expected"
    );
    assert_eq!(error.code.as_deref(), Some("invalid_json"));
}

/// What serde_json reads, without duplicate keys.
#[derive(Debug)]
struct Strict;

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }
    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        while seq.next_element::<Self>()?.is_some() {}
        Ok(self)
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<Self>()?;
            if !keys.insert(key) {
                return Err(serde::de::Error::custom("duplicate"));
            }
        }
        Ok(self)
    }
}

#[test]
fn it_takes_exactly_what_serde_json_takes_but_for_duplicates() {
    let mut dice = Dice(0x5eed);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let object = dice.object(3);
        let mut body = String::new();
        dice.write(&serde_json::Value::Object(object), &mut body);
        let mut body = body.into_bytes();
        for _ in 0..dice.below(4) {
            let bits: [&[u8]; 24] = [
                b"{",
                b"}",
                b"[",
                b"]",
                b",",
                b":",
                b"\"",
                b"\\",
                b"\\u12",
                b"\\ud800",
                b"0",
                b"-",
                b"1.5",
                b"e",
                b"E+9",
                b" ",
                b"\n",
                b"\0",
                b"\xff",
                b"\xc3\xa9",
                b"null",
                b"tru",
                b"\"k1\":",
                b"\"a\":1,",
            ];
            let at = dice.below(body.len() + 1);
            let cut = dice.below(3).min(body.len() - at);
            let bit = *dice.pick(&bits);
            body.splice(at..at + cut, bit.iter().copied());
        }
        let theirs = serde_json::from_slice::<Strict>(&body);
        let is_object = body.trim_ascii().first() == Some(&b'{');
        let ours = scan(&body, 64);
        assert_eq!(
            ours.is_ok(),
            theirs.is_ok() && is_object,
            "{}\n{ours:?}\n{theirs:?}",
            String::from_utf8_lossy(&body)
        );
        if ours.is_ok() {
            taken += 1;
        } else {
            refused += 1;
        }
    }
    assert!(taken > 2000 && refused > 2000, "{taken} {refused}");
}

#[test]
fn the_members_are_those_that_serde_json_sees() {
    let mut dice = Dice(7);
    for _ in 0..5000 {
        let object = dice.object(3);
        let mut body = String::new();
        dice.write(&serde_json::Value::Object(object.clone()), &mut body);
        let body = body.as_bytes();
        let seen: serde_json::Map<String, serde_json::Value> = scan(body, 64)
            .unwrap()
            .members
            .iter()
            .map(|member| {
                let name = String::from_utf8(member.name(body).to_vec()).unwrap();
                let value = serde_json::from_slice(member.value.of(body)).unwrap();
                (name, value)
            })
            .collect();
        assert_eq!(seen, object);
    }
}
