//! What a request says about a search, and what is left of it then.

use std::{net::IpAddr, path::Path, sync::Arc};

use http::{HeaderMap, Method};
use serde_json::{Value, json};

use super::*;
use crate::resources::Resources;

fn rag(settings: Value) -> Rag {
    let build = Build {
        base: Path::new("."),
        resources: &Resources::default(),
        list: "",
        store: None,
    };
    Rag::configure(serde_json::from_value(settings).unwrap(), &build).unwrap()
}

fn context(endpoint: Endpoint, body: &str, header: Option<&str>) -> RequestContext {
    let mut headers = HeaderMap::new();
    if let Some(value) = header {
        headers.insert(RESEARCH, value.parse().unwrap());
    }
    let mut ctx = RequestContext::new(
        Arc::from("id"),
        IpAddr::from([127, 0, 0, 1]),
        Method::POST,
        Arc::from(endpoint.path()),
        headers,
    );
    let body = Bytes::copy_from_slice(body.as_bytes());
    ctx.request = Some(ApiRequest::parse(endpoint, body, 64).unwrap());
    ctx
}

fn parsed(rag: &Rag, model: &str, more: &str, header: Option<&str>) -> Result<(Wish, String)> {
    let body = format!(r#"{{"model":"{model}","messages":[{{}}]{more}}}"#);
    let mut ctx = context(Endpoint::ChatCompletions, &body, header);
    rag.on_parsed(&mut ctx)?;
    let wish = ctx.own.take::<Wish>().unwrap();
    let left = String::from_utf8(ctx.request.unwrap().raw.to_vec()).unwrap();
    Ok((*wish, left))
}

#[test]
fn what_asks_for_a_search_is_taken_out_of_the_request() {
    let rag = rag(json!({}));
    let plain = r#"{"model":"m","messages":[{}]}"#;
    for (model, more, header, asked, declined) in [
        ("m", "", None, false, false),
        ("m", r#","research_mode":true"#, None, true, false),
        ("m", r#","research_mode":false"#, None, false, true),
        ("m", r#","research_mode":null"#, None, false, false),
        ("m", r#","web_search_options":{}"#, None, true, false),
        ("m", r#","web_search_options":null"#, None, false, false),
        ("m", "", Some("1"), true, false),
        ("m", "", Some("0"), false, true),
        ("m:online", "", None, true, false),
        ("m:online", r#","research_mode":false"#, None, true, true),
    ] {
        let (wish, left) = parsed(&rag, model, more, header).unwrap();
        assert_eq!(
            (wish.asked, wish.declined),
            (asked, declined),
            "{model}{more}"
        );
        assert_eq!(left, plain);
    }
    let nothing = parsed(&rag, ":online", "", None).unwrap();
    assert!(!nothing.0.asked && nothing.1.contains(":online"));
}

#[test]
fn models_that_search_by_themselves_keep_their_options() {
    let rag = rag(json!({}));
    for model in [
        "gpt-4o-search-preview",
        "gpt-5-search-api-2025-10-14",
        "sonar-pro",
    ] {
        let (wish, left) = parsed(&rag, model, r#","web_search_options":{}"#, None).unwrap();
        assert!(!wish.asked, "{model}");
        assert!(left.contains("web_search_options"), "{left}");
    }
}

#[test]
fn nonsense_is_refused_with_its_name() {
    let rag = rag(json!({}));
    for (more, header, param) in [
        (r#","research_mode":"yes""#, None, Some("research_mode")),
        (r#","research_mode":1"#, None, Some("research_mode")),
        (
            r#","web_search_options":true"#,
            None,
            Some("web_search_options"),
        ),
        ("", Some("maybe"), None),
    ] {
        let error = parsed(&rag, "m", more, header).unwrap_err();
        assert_eq!(error.status, 400);
        assert_eq!(error.param.as_deref(), param);
    }
}

#[test]
fn ways_that_are_switched_off_do_not_count() {
    let rag = rag(json!({ "triggers": ["header"] }));
    for value in ["true", "false", r#""yes""#] {
        let more = format!(r#","research_mode":{value},"web_search_options":7"#);
        let (wish, left) = parsed(&rag, "m:online", &more, None).unwrap();
        assert!(!wish.asked && !wish.declined);
        // Ours alone is taken out; the others are words of the upstreams too.
        let kept = r#"{"model":"m:online","messages":[{}],"web_search_options":7}"#;
        assert_eq!(left, kept);
    }
    assert_eq!(rag.model_meant("m:online"), "m:online");
    let deaf = self::rag(json!({ "triggers": ["research_mode"] }));
    let (wish, _) = parsed(&deaf, "m", "", Some("1")).unwrap();
    assert!(!wish.asked);
}

#[test]
fn retrievers_that_nobody_may_ask_are_worth_a_warning() {
    let config = |local: bool| {
        let mut config = Config::default();
        let route = crate::config::Route {
            local,
            ..Default::default()
        };
        config.routes = vec![route];
        config
    };
    let away = rag(json!({}));
    assert_eq!(away.warnings(&config(true)).len(), 1);
    assert_eq!(away.warnings(&config(false)).len(), 0);
    let home = rag(json!({ "retrievers": [{ "duckduckgo": { "local": true } }] }));
    assert_eq!(home.warnings(&config(true)).len(), 0);
}

#[test]
fn only_as_many_results_as_there_is_room_for() {
    let hit = |n: usize| retrievers::Hit {
        title: "t".to_owned(),
        url: format!("https://{n}.test/"),
        snippet: "word ".repeat(80),
    };
    let found = std::sync::Arc::new(Found::of((0..3).map(hit).collect(), 3, 1000));
    let room = |tokens| Room {
        tokens,
        count: std::sync::Arc::new(|text: &str| text.len() as u64 / 4),
    };
    let fits = |tokens| {
        let (found, block) = fitting(found.clone(), Cite::Numbers, Some(&room(tokens)))?;
        assert!(block.len() as u64 / 4 < tokens);
        Some(found.sources.len())
    };
    assert_eq!(fits(100_000), Some(3));
    assert_eq!(fits(460), Some(2));
    assert_eq!(fits(350), Some(1));
    assert_eq!(fits(100), None);
    let all = fitting(found.clone(), Cite::Numbers, None);
    assert_eq!(all.unwrap().0.sources.len(), 3);
    assert_eq!(found.sources.len(), 3);
}

#[test]
fn the_size_of_the_context_is_a_number_of_results() {
    let rag = rag(json!({ "results": 3 }));
    for (size, results) in [
        ("low", Some(2)),
        ("medium", None),
        ("high", Some(6)),
        ("x", None),
    ] {
        let more = format!(r#","web_search_options":{{"search_context_size":"{size}"}}"#);
        assert_eq!(parsed(&rag, "m", &more, None).unwrap().0.results, results);
    }
}

#[tokio::test]
async fn what_has_no_question_or_must_stay_here_is_skipped() {
    let rag = rag(json!({}));
    let research = |endpoint, body: &str, local: bool| {
        let mut ctx = context(endpoint, body, Some("1"));
        ctx.restrict.local = local;
        rag.on_parsed(&mut ctx).unwrap();
        let rag = &rag;
        async move {
            rag.on_request(&mut ctx).await.unwrap();
            let told = ctx
                .reply
                .get(OUTCOME)
                .map(|told| told.to_str().unwrap().to_owned());
            told.unwrap_or_default()
        }
    };
    let chat = r#"{"model":"m","messages":[{"role":"user","content":"Who is it today?"}]}"#;
    assert_eq!(
        research(Endpoint::ChatCompletions, chat, true).await,
        "skipped"
    );
    let silent = r#"{"model":"m","messages":[{"role":"user","content":""}]}"#;
    assert_eq!(
        research(Endpoint::ChatCompletions, silent, false).await,
        "skipped"
    );
    let vectors = r#"{"model":"m","input":"x"}"#;
    assert_eq!(
        research(Endpoint::Embeddings, vectors, false).await,
        "skipped"
    );
    let code = r#"{"model":"m","prompt":"a","suffix":"b"}"#;
    assert_eq!(
        research(Endpoint::Completions, code, false).await,
        "skipped"
    );
}
