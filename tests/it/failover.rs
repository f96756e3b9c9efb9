//! What follows a failure: the order of upstreams and groups, what each kind of
//! failure means, and what the client is told at the end.

use std::time::{Duration, Instant};

use forebay::sim::Sim;
use futures_util::future::join_all;

use crate::support::{
    Answer, Gateway, Scripted, chat, chat_stream, eventually,
    gateway::free_port,
    group_of, groups_in_order,
    http::{post, post_chat},
    one_group,
    scripted::{self, json},
    sim, upstream_at, with_fallback,
};

/// How many model calls an upstream has seen.
fn asked(sim: &Sim) -> usize {
    sim.records().len()
}

fn attempts(answer: &Answer) -> &str {
    answer.header("x-forebay-attempts").unwrap_or("")
}

/// One gateway for many cases: the model `case-N` is served by a group of its
/// own, whose first upstream has the N-th fault and these keys, and is followed
/// by `healthy` others.
async fn cases(faults: &[&str], healthy: usize, keys: &str) -> (Gateway, Vec<Vec<Sim>>) {
    let mut groups = String::from("groups:\n");
    let mut routes = String::from("routes:\n");
    let mut all = Vec::new();
    for (case, fault) in faults.iter().enumerate() {
        let mut sims = Vec::new();
        let mut upstreams = Vec::new();
        for nth in 0..=healthy {
            let sim = sim(&format!("case-{case}-{nth}")).await;
            let keys = if nth == 0 { keys } else { "" };
            upstreams.push(upstream_at(sim.name(), &sim.url(), keys));
            sims.push(sim);
        }
        sims[0].fault(fault).await.unwrap();
        groups.push_str(&group_of(&format!("g-{case}"), "", &upstreams));
        routes.push_str(&format!(
            "  - {{ model: case-{case}, groups: [g-{case}], rewrite: {{ g-{case}: demo }} }}\n"
        ));
        all.push(sims);
    }
    (Gateway::start(&(groups + &routes)).await, all)
}

/// The bodies of a case's request, not streamed and streamed.
fn both(case: usize) -> [String; 2] {
    let model = format!("case-{case}");
    [chat(&model), chat_stream(&model)]
}

// --- the order ---

#[tokio::test]
async fn the_order_is_the_others_of_the_group_then_the_next_group_then_the_fallback() {
    let (a, b, c, d) = (
        sim("a").await,
        sim("b").await,
        sim("c").await,
        sim("d").await,
    );
    let yaml = groups_in_order(&[("one", &[&a, &b]), ("two", &[&c]), ("last#fallback", &[&d])]);
    for failing in 0..4 {
        let sims = [&a, &b, &c, &d];
        for (nth, sim) in sims.iter().enumerate() {
            sim.clear_records();
            sim.clear_faults().await;
            if nth < failing {
                sim.fault("status=503").await.unwrap();
            }
        }
        let gateway = Gateway::start(&yaml).await;
        let answer = post_chat(gateway.addr, &chat("demo")).await;

        assert_eq!(answer.status, 200);
        assert_eq!(answer.upstream(), sims[failing].name());
        assert_eq!(attempts(&answer), (failing + 1).to_string());
        let group = ["one", "one", "two", "last"][failing];
        assert_eq!(answer.header("x-forebay-group"), Some(group));
        let fallback = if failing == 3 { "1" } else { "0" };
        assert_eq!(answer.header("x-forebay-fallback"), Some(fallback));
        let times: Vec<u64> = sims.iter().map(|sim| sim.records().len() as u64).collect();
        let wanted: Vec<u64> = (0..4).map(|nth| u64::from(nth <= failing)).collect();
        assert_eq!(times, wanted);
    }
}

#[tokio::test]
async fn attempts_bounds_the_tries_of_each_group_and_the_fallback_still_gets_one() {
    let mut first = Vec::new();
    let mut second = Vec::new();
    for nth in 0..4 {
        first.push(sim(&format!("first-{nth}")).await);
        second.push(sim(&format!("second-{nth}")).await);
    }
    let last = sim("last").await;
    for sim in first.iter().chain(&second) {
        sim.fault("status=503").await.unwrap();
    }
    let (one, two): (Vec<&Sim>, Vec<&Sim>) = (first.iter().collect(), second.iter().collect());
    let yaml = groups_in_order(&[("one", &one), ("two", &two), ("last#fallback", &[&last])]);
    let gateway = Gateway::start(&format!("limits: {{ attempts: 2 }}\n{yaml}")).await;

    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.status, answer.upstream()), (200, "last"));
    assert_eq!(attempts(&answer), "5");
    assert_eq!(first.iter().map(asked).sum::<usize>(), 2);
    assert_eq!(second.iter().map(asked).sum::<usize>(), 2);
}

#[tokio::test]
async fn attempts_bounds_the_tries_of_a_group_also_when_nothing_helps() {
    for (fault, tries) in [
        ("status=503", "3"),
        ("status=401", "3"),
        ("refuse_model", "3"),
        // Nobody was asked anything.
        ("connect=refuse", "5"),
    ] {
        let mut sims = Vec::new();
        for nth in 0..5 {
            sims.push(sim(&format!("a-{nth}")).await);
            sims[nth].fault(fault).await.unwrap();
        }
        let all: Vec<&Sim> = sims.iter().collect();
        let gateway = Gateway::start(&one_group(&all)).await;
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert!(answer.status >= 400);
        assert_eq!(attempts(&answer), tries, "{fault}");
    }
}

#[tokio::test]
async fn skipping_an_upstream_that_is_known_to_be_down_costs_no_attempt() {
    let (a, b, last) = (sim("a").await, sim("b").await, sim("last").await);
    a.stop().await;
    b.stop().await;
    let yaml = format!(
        "limits: {{ attempts: 2 }}\n{}",
        with_fallback(&[&a, &b], &last)
    );
    let gateway = Gateway::start(&yaml).await;
    let first = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((first.upstream(), attempts(&first)), ("last", "3"));
    // As soon as one comes within the second that both are known to be down.
    eventually("both are skipped", || async {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.upstream(), "last");
        attempts(&answer) == "1"
    })
    .await;
}

#[tokio::test]
async fn an_upstream_that_comes_back_is_used_again() {
    let (a, last) = (sim("a").await, sim("last").await);
    let gateway = Gateway::start(&with_fallback(&[&a], &last)).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "a");
    a.stop().await;
    assert_eq!(
        post_chat(gateway.addr, &chat("demo")).await.upstream(),
        "last"
    );
    a.start_again().await.unwrap();
    eventually("a serves again", || async {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.status, 200);
        answer.upstream() == "a"
    })
    .await;
}

#[tokio::test]
async fn everything_down_is_503_with_retry_after_and_recovers_at_once() {
    let (a, last) = (sim("a").await, sim("last").await);
    a.stop().await;
    last.stop().await;
    let gateway = Gateway::start(&with_fallback(&[&a], &last)).await;
    for body in [chat("demo"), chat_stream("demo")] {
        let answer = post_chat(gateway.addr, &body).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (503, "upstream_unavailable")
        );
        assert!(
            answer
                .header("retry-after")
                .unwrap()
                .parse::<u32>()
                .unwrap()
                > 0
        );
    }
    // Known to be down or not: the fallback is asked.
    last.start_again().await.unwrap();
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.status, answer.upstream()), (200, "last"));
    assert_eq!(answer.header("x-forebay-fallback"), Some("1"));
}

// --- the table ---

#[tokio::test]
async fn what_another_upstream_may_do_better_goes_to_the_next() {
    let faults = [
        "connect=refuse",
        "status=429",
        "status=503;body=html",
        "status=529;body=empty",
        "status=401",
        "status=402;body=detail",
        "status=403;body=ollama",
        "status=429;body=quota",
        "status=400;body=quota",
        "reset",
        "connect=reset",
        "status=500",
        "status=502;body=html",
        "status=504;body=empty",
        "refuse_model;body=openai",
        "refuse_model;body=ollama",
        "status=404;body=html",
        "gzip",
        "early=503",
        "early=503;early_then=read",
        "junk_headers=malformed;status=500",
    ];
    for streamed in 0..2 {
        let (gateway, all) = cases(&faults, 1, "kind: vllm").await;
        for (case, (fault, sims)) in faults.iter().zip(&all).enumerate() {
            let answer = post_chat(gateway.addr, &both(case)[streamed]).await;
            assert_eq!(answer.status, 200, "{fault}: {}", answer.text());
            assert_eq!(answer.upstream(), sims[1].name(), "{fault}");
            assert_eq!(attempts(&answer), "2", "{fault}");
            assert!(answer.content().starts_with(sims[1].name()), "{fault}");
            assert_eq!(answer.text().contains("[DONE]"), streamed == 1, "{fault}");
            assert!(asked(&sims[0]) <= 1, "{fault}: asked more than once");
            assert_eq!(asked(&sims[1]), 1, "{fault}");
        }
    }
}

#[tokio::test]
async fn a_whole_answer_that_is_none_goes_to_the_next_and_at_the_end_is_502() {
    let faults = [
        "content_length=short",
        "content_length=long",
        "die_at=20",
        "die_at=20;how=rst",
        "die_at=20;how=mid_chunk",
        "te_cl;die_at=5",
        "gzip",
    ];
    let (gateway, all) = cases(&faults, 1, "kind: vllm").await;
    let (alone, _sims) = cases(&faults, 0, "kind: vllm").await;
    for (case, (fault, sims)) in faults.iter().zip(&all).enumerate() {
        let answer = post_chat(gateway.addr, &both(case)[0]).await;
        assert_eq!(
            (answer.status, answer.upstream()),
            (200, sims[1].name()),
            "{fault}"
        );
        assert!(answer.complete, "{fault}");
        let answer = post_chat(alone.addr, &both(case)[0]).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (502, "upstream_error"),
            "{fault}"
        );
    }
}

#[tokio::test]
async fn a_success_without_a_json_object_or_with_an_error_in_it_goes_to_the_next() {
    let good = sim("good").await;
    let answers = [
        scripted::answer(
            200,
            &[("content-type", "text/html")],
            "<html>Welcome</html>",
        ),
        json(
            200,
            r#"{"error":{"message":"CUDA out of memory","code":500}}"#,
        ),
        json(200, r#"{"error":"model is loading"}"#),
        json(200, r#"{"object":"error","message":"no","code":400}"#),
        json(200, r#"{"choices":[{"#),
        json(200, r#"{"choices":[]} trailing"#),
        json(200, r#"[]"#),
        json(200, "{}"),
        json(200, ""),
        b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
            .to_vec(),
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n".to_vec(),
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\ncontent-length: nonsense\r\n\r\n{}".to_vec(),
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 9\r\n\r\n{}".to_vec(),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}".to_vec(),
    ];
    let mut bad = Vec::new();
    let mut groups = String::from("groups:\n");
    let mut routes = String::from("routes:\n");
    for (case, bytes) in answers.iter().enumerate() {
        let upstream = Scripted::always(bytes.as_slice()).await;
        let first = upstream_at(&format!("bad-{case}"), &upstream.url(), "weight: 1000");
        let alone = upstream_at(&format!("alone-{case}"), &upstream.url(), "");
        let next = upstream_at(&format!("good-{case}"), &good.url(), "");
        groups.push_str(&group_of(&format!("g-{case}"), "", &[first, next]));
        groups.push_str(&group_of(&format!("h-{case}"), "", &[alone]));
        routes.push_str(&format!(
            "  - {{ model: case-{case}, groups: [g-{case}], rewrite: {{ g-{case}: demo }} }}\n\
             \x20 - {{ model: alone-{case}, groups: [h-{case}] }}\n"
        ));
        bad.push(upstream);
    }
    let gateway = Gateway::start(&(groups + &routes)).await;
    for (case, bytes) in answers.iter().enumerate() {
        let shown = String::from_utf8_lossy(bytes);
        let name = format!("good-{case}");
        for body in both(case) {
            let answer = post_chat(gateway.addr, &body).await;
            assert_eq!(
                (answer.status, answer.upstream()),
                (200, name.as_str()),
                "{shown}"
            );
        }
        assert_eq!(bad[case].requests().len(), 2, "{shown}");
        let model = format!("alone-{case}");
        for body in [chat(&model), chat_stream(&model)] {
            let answer = post_chat(gateway.addr, &body).await;
            assert_eq!(answer.status, 502, "{shown}: {}", answer.text());
            assert_eq!(answer.error_code(), "upstream_error", "{shown}");
        }
    }
}

#[tokio::test]
async fn at_the_end_the_client_is_told_what_the_last_answer_means() {
    let table: [(&str, u16, &str, Option<&str>); 13] = [
        ("connect=refuse", 503, "upstream_unavailable", Some("5")),
        (
            "status=429;retry_after=7",
            429,
            "rate_limit_exceeded",
            Some("7"),
        ),
        ("status=429", 429, "rate_limit_exceeded", Some("30")),
        (
            "status=503;retry_after=9",
            502,
            "upstream_overloaded",
            Some("9"),
        ),
        ("status=529", 502, "upstream_overloaded", Some("5")),
        ("status=401", 502, "upstream_auth", None),
        ("status=403", 502, "upstream_auth", None),
        ("reset", 502, "upstream_error", None),
        ("status=500", 502, "upstream_error", None),
        ("status=502", 502, "upstream_error", None),
        ("status=504", 502, "upstream_error", None),
        ("refuse_model", 404, "model_not_found", None),
        ("status=404;body=html", 404, "model_not_found", None),
    ];
    let faults: Vec<&str> = table.iter().map(|row| row.0).collect();
    for streamed in 0..2 {
        let (gateway, all) = cases(&faults, 0, "kind: vllm").await;
        for (case, (fault, status, code, retry_after)) in table.iter().enumerate() {
            let answer = post_chat(gateway.addr, &both(case)[streamed]).await;
            assert_eq!(answer.status, *status, "{fault}: {}", answer.text());
            assert_eq!(answer.error_code(), *code, "{fault}");
            assert_eq!(answer.header("retry-after"), *retry_after, "{fault}");
            assert_eq!(
                answer.header("content-type"),
                Some("application/json"),
                "{fault}"
            );
            assert!(answer.header("www-authenticate").is_none(), "{fault}");
            assert_eq!(attempts(&answer), "1", "{fault}");
            assert!(asked(&all[case][0]) <= 1, "{fault}");
        }
    }
}

#[tokio::test]
async fn a_last_429_outweighs_an_upstream_that_cannot_be_reached() {
    let (a, b) = (sim("a").await, sim("b").await);
    a.fault("status=429;retry_after=21").await.unwrap();
    b.stop().await;
    let gateway = Gateway::start(&one_group(&[&a, &b])).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(
        (answer.status, answer.header("retry-after")),
        (429, Some("21"))
    );
}

#[tokio::test]
async fn retry_after_is_understood_in_every_spelling() {
    let then = std::time::SystemTime::now() + Duration::from_secs(100);
    let date = httpdate::fmt_http_date(then);
    let spellings = [
        ("retry-after", "30", 30..=30),
        ("Retry-After", date.as_str(), 90..=100),
        ("retry-after-ms", "4200", 5..=5),
        ("x-ms-retry-after-ms", "12000", 12..=12),
        ("retry-after", "0", 1..=1),
        ("retry-after", "soon", 30..=30),
    ];
    for (name, value, wanted) in spellings {
        let body =
            r#"{"error":{"message":"slow down","type":"rate_limit","param":null,"code":null}}"#;
        let bytes = scripted::answer(
            429,
            &[("content-type", "application/json"), (name, value)],
            body,
        );
        let busy = Scripted::always(bytes).await;
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of("g", "", &[upstream_at("busy", &busy.url(), "")]),
        );
        let gateway = Gateway::start(&yaml).await;
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.status, 429);
        let wait: u32 = answer.header("retry-after").unwrap().parse().unwrap();
        assert!(wanted.contains(&wait), "{name}: {value} became {wait}");
    }
}

#[tokio::test]
async fn an_upstream_that_asked_for_a_pause_gets_it() {
    let (a, b) = (sim("a").await, sim("b").await);
    a.fault("status=429;retry_after=60;times=1").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&a, &b])).await;
    for nth in 0..6 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        let tries = if nth == 0 { "2" } else { "1" };
        assert_eq!((answer.upstream(), attempts(&answer)), ("b", tries));
    }
    assert_eq!(asked(&a), 1);

    // Alone, it is not pestered either: the client is told how long.
    for (refusal, status, code) in [
        (429, 429, "rate_limit_exceeded"),
        (503, 502, "upstream_overloaded"),
    ] {
        let c = sim("c").await;
        let fault = format!("status={refusal};retry_after=60;times=1");
        c.fault(&fault).await.unwrap();
        let gateway = Gateway::start(&one_group(&[&c])).await;
        for _ in 0..2 {
            let answer = post_chat(gateway.addr, &chat("demo")).await;
            assert_eq!(
                (answer.status, answer.error_code().as_str()),
                (status, code)
            );
            let wait: u32 = answer.header("retry-after").unwrap().parse().unwrap();
            assert!((40..=60).contains(&wait), "{wait}");
        }
        assert_eq!(asked(&c), 1);
    }
}

#[tokio::test]
async fn what_is_the_callers_fault_is_passed_through_once() {
    let body = r#"{"error":{"message":"messages[0] has no role","type":"odd_type","param":"messages[0].role","code":"missing_role"}}"#;
    for status in [400, 409, 413, 415, 418, 422] {
        let first = Scripted::always(json(status, body)).await;
        let second = sim("second").await;
        let upstreams = [
            upstream_at("first", &first.url(), ""),
            upstream_at("second", &second.url(), ""),
        ];
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of("g", "", &upstreams),
        );
        let gateway = Gateway::start(&yaml).await;
        let stream = if status % 2 == 0 {
            chat("demo")
        } else {
            chat_stream("demo")
        };
        let answer = post_chat(gateway.addr, &stream).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (status, "missing_role")
        );
        let error = &answer.json()["error"];
        assert_eq!(error["message"], "messages[0] has no role");
        assert_eq!(error["param"], "messages[0].role");
        assert_eq!(answer.header("x-forebay-upstream"), Some("first"));
        assert_eq!((first.requests().len(), asked(&second)), (1, 0));
    }
}

#[tokio::test]
async fn errors_of_every_shape_become_openais() {
    // What the upstream says, and the message, param and code the client gets.
    let shapes: [(&str, &str, Option<&str>, Option<&str>); 8] = [
        // vLLM and its integer code.
        (
            r#"{"error":{"message":"max_tokens is too large","type":"BadRequestError","param":"max_tokens","code":400}}"#,
            "max_tokens is too large",
            Some("max_tokens"),
            None,
        ),
        // vLLM before 0.10: not nested.
        (
            r#"{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}"#,
            "too long",
            None,
            None,
        ),
        // Ollama.
        (
            r#"{"error":"invalid think value"}"#,
            "invalid think value",
            None,
            None,
        ),
        // FastAPI.
        (
            r#"{"detail":"temperature is out of range"}"#,
            "temperature is out of range",
            None,
            None,
        ),
        (
            r#"{"detail":[{"loc":["body","temperature"],"msg":"is too hot","type":"value_error"}]}"#,
            "temperature: is too hot",
            Some("temperature"),
            None,
        ),
        // Cloudflare.
        (
            r#"{"success":false,"errors":[{"code":5006,"message":"bad input"}],"result":null}"#,
            "bad input",
            None,
            None,
        ),
        (
            "<html><body>nginx/1.25</body></html>",
            "the model server refused the request",
            None,
            None,
        ),
        ("", "the model server refused the request", None, None),
    ];
    for (body, message, param, code) in shapes {
        let upstream = Scripted::always(json(400, body)).await;
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of("g", "", &[upstream_at("up", &upstream.url(), "")]),
        );
        let gateway = Gateway::start(&yaml).await;
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.status, 400, "{body}");
        answer.error_code();
        let error = &answer.json()["error"];
        assert_eq!(error["message"], message, "{body}");
        assert_eq!(error["param"].as_str(), param, "{body}");
        assert_eq!(error["code"].as_str(), code, "{body}");
    }
}

// --- what may have been billed ---

#[tokio::test]
async fn a_try_that_may_have_been_billed_is_followed_by_others_within_the_attempts() {
    for (fault, streamed) in [
        ("status=500", 0),
        ("status=502", 1),
        ("reset", 0),
        ("reset", 1),
        ("die_at=9", 0),
    ] {
        let (a, b, c) = (sim("a").await, sim("b").await, sim("c").await);
        let last = sim("last").await;
        for sim in [&a, &b, &c] {
            sim.fault(fault).await.unwrap();
        }
        let body = [chat("demo"), chat_stream("demo")][streamed].clone();
        let gateway = Gateway::start(&one_group(&[&a, &b, &c])).await;
        let answer = post_chat(gateway.addr, &body).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (502, "upstream_error"),
            "{fault}"
        );
        assert_eq!(attempts(&answer), "3", "{fault}");
        assert_eq!([asked(&a), asked(&b), asked(&c)], [1, 1, 1], "{fault}");
        for name in ["a", "b", "c"] {
            let series = format!("forebay_attempts_maybe_billed_total{{upstream=\"{name}\"}}");
            gateway.metric_becomes(&series, 1.0).await;
        }

        let gateway = Gateway::start(&with_fallback(&[&a, &b, &c], &last)).await;
        let answer = post_chat(gateway.addr, &body).await;
        assert_eq!((answer.status, answer.upstream()), (200, "last"), "{fault}");
        assert_eq!(attempts(&answer), "4", "{fault}");
    }
}

#[tokio::test]
async fn no_failover_of_what_may_have_been_billed_where_it_is_turned_off() {
    for (fault, status, code) in [
        ("status=500", 502, "upstream_error"),
        ("reset", 502, "upstream_error"),
        ("hang", 504, "upstream_timeout"),
    ] {
        let (a, b, last) = (sim("a").await, sim("b").await, sim("last").await);
        a.fault(fault).await.unwrap();
        let keys = "timeouts: { first_token: 200ms }";
        let upstreams = [
            upstream_at("a", &a.url(), keys),
            upstream_at("b", &b.url(), ""),
        ];
        let yaml = format!(
            "groups:\n{}{}routes:\n  - {{ model: \"*\", groups: [g], fallback: h }}\n",
            group_of("g", "retry_ambiguous: false", &upstreams),
            group_of("h", "", &[upstream_at("last", &last.url(), "")]),
        );
        let gateway = Gateway::start(&yaml).await;
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (status, code),
            "{fault}"
        );
        assert_eq!([asked(&a), asked(&b), asked(&last)], [1, 0, 0], "{fault}");

        // What was surely not billed still goes on.
        a.stop().await;
        let gateway = Gateway::start(&yaml).await;
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!((answer.status, answer.upstream()), (200, "b"));
    }
}

// --- time ---

#[tokio::test]
async fn no_first_token_in_time_goes_to_the_next_and_at_the_end_is_504() {
    let keys = "kind: vllm, timeouts: { first_token: 250ms }";
    let faults = [
        "hang",
        "header_delay=60s",
        "slow_headers=20",
        "first_token=60s",
        "stall_at=0",
        "only_comments=20",
    ];
    for streamed in 0..2 {
        let (gateway, all) = cases(&faults, 1, keys).await;
        let (alone, _sims) = cases(&faults, 0, keys).await;
        // Once its header is in, a whole answer is held to inter_token.
        let held = if streamed == 0 {
            &faults[..3]
        } else {
            &faults[..]
        };
        let told = join_all((0..held.len()).map(async |case| {
            let body = &both(case)[streamed];
            tokio::join!(post_chat(gateway.addr, body), post_chat(alone.addr, body))
        }))
        .await;
        for (case, (next, last)) in told.iter().enumerate() {
            let fault = faults[case];
            assert_eq!(
                (next.status, next.upstream()),
                (200, all[case][1].name()),
                "{fault}"
            );
            assert_eq!(
                (last.status, last.error_code().as_str()),
                (504, "upstream_timeout"),
                "{fault}"
            );
        }
    }
}

#[tokio::test]
async fn a_whole_answer_that_stalls_goes_to_the_next() {
    let keys = "kind: vllm, timeouts: { inter_token: 250ms }";
    let (gateway, all) = cases(&["stall_at=20"], 1, keys).await;
    let answer = post_chat(gateway.addr, &both(0)[0]).await;
    assert_eq!((answer.status, answer.upstream()), (200, all[0][1].name()));
}

#[tokio::test]
async fn total_timeout_ends_all_tries_with_504() {
    let (a, b, last) = (sim("a").await, sim("b").await, sim("last").await);
    a.fault("hang").await.unwrap();
    let yaml = with_fallback(&[&a, &b], &last);
    let gateway = Gateway::start(&format!("limits: {{ total_timeout: 300ms }}\n{yaml}")).await;
    for body in [chat("demo"), chat_stream("demo")] {
        // Round robin: b takes every second.
        let mut answer = post_chat(gateway.addr, &body).await;
        if answer.status == 200 {
            answer = post_chat(gateway.addr, &body).await;
        }
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (504, "total_timeout")
        );
    }
    assert_eq!(asked(&last), 0);
}

#[tokio::test]
async fn the_same_upstream_is_asked_again_first_where_that_is_wanted() {
    let (a, b) = (sim("a").await, sim("b").await);
    let upstreams = [
        upstream_at("a", &a.url(), ""),
        upstream_at("b", &b.url(), ""),
    ];
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        group_of("g", "same_upstream_retries: 1", &upstreams),
    );
    // It gets better: b is never needed.
    a.fault("status=503;times=1").await.unwrap();
    let gateway = Gateway::start(&yaml).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.upstream(), attempts(&answer)), ("a", "2"));
    assert_eq!((asked(&a), asked(&b)), (2, 0));

    // It does not: then b.
    a.clear_records();
    a.fault("status=503").await.unwrap();
    let gateway = Gateway::start(&yaml).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.upstream(), attempts(&answer)), ("b", "3"));
    assert_eq!((asked(&a), asked(&b)), (2, 1));
}

#[tokio::test]
async fn the_same_upstream_is_not_asked_again_when_it_asked_for_a_pause() {
    let (a, b) = (sim("a").await, sim("b").await);
    a.fault("status=503;retry_after=30").await.unwrap();
    let upstreams = [
        upstream_at("a", &a.url(), ""),
        upstream_at("b", &b.url(), ""),
    ];
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
        group_of("g", "same_upstream_retries: 2", &upstreams),
    );
    let gateway = Gateway::start(&yaml).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.upstream(), attempts(&answer)), ("b", "2"));
    assert_eq!(asked(&a), 1);
}

#[tokio::test]
async fn the_fallback_gets_its_try_also_while_it_asked_for_a_pause() {
    let (a, last) = (sim("a").await, sim("last").await);
    a.stop().await;
    last.fault("status=503;retry_after=60;times=1")
        .await
        .unwrap();
    let gateway = Gateway::start(&with_fallback(&[&a], &last)).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 502);
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!((answer.status, answer.upstream()), (200, "last"));
}

#[tokio::test]
async fn a_failure_is_not_waited_for_longer_than_it_takes() {
    let (a, b) = (sim("a").await, sim("b").await);
    a.fault("status=503").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&a, &b])).await;
    let began = Instant::now();
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    // No backoff between different upstreams.
    assert!(began.elapsed() < Duration::from_secs(2));
}

// --- what stays inside ---

#[tokio::test]
async fn no_error_tells_where_an_upstream_is_what_opens_it_or_what_it_said_of_itself() {
    const KEY: &str = "Canary.Key~of/the+upstream";
    for status in [200, 302, 400, 401, 403, 404, 413, 422, 429, 500, 503] {
        let hidden = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let body = format!(
            r#"{{"error":{{"message":"key {KEY} refused at http://{hidden}/v1 by 10.1.2.3:8000, see /opt/models/x","type":"x","param":"{KEY}","code":"{KEY}"}}}}"#
        );
        let headers = [
            ("content-type", "application/json"),
            ("x-canary-header", "canary-value"),
            ("server", "canary-server"),
            ("set-cookie", "canary=1"),
            ("openai-organization", "canary-org"),
            ("www-authenticate", "Bearer realm=canary"),
        ];
        let upstream = Scripted::always(scripted::answer(status, &headers, &body)).await;
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of(
                "g",
                "",
                &[upstream_at(
                    "up",
                    &upstream.url(),
                    "key: env:CANARY, headers: { x-team: env:CANARY }"
                )]
            ),
        );
        let gateway = Gateway::start_with(&yaml, &[], &[("CANARY", KEY)]).await;
        for body in [chat("demo"), chat_stream("demo")] {
            let answer = post_chat(gateway.addr, &body).await;
            assert!(answer.status >= 400, "{status}");
            assert_ne!(answer.status, 401);
            answer.error_code();
            let all = format!("{:?} {}", answer.headers, answer.text());
            for secret in [
                KEY,
                &upstream.addr.port().to_string(),
                &hidden.port().to_string(),
                "127.0.0.1",
                "10.1.2.3",
                "/opt/models",
            ] {
                assert!(!all.contains(secret), "{status}: {secret} in {all}");
            }
            assert!(!all.to_lowercase().contains("canary"), "{status}: {all}");
        }
        assert!(!gateway.log().contains(KEY), "{status}");
    }
}

#[tokio::test]
async fn an_answer_larger_than_the_limit_is_502() {
    let big = format!(
        r#"{{"choices":[{{"message":{{"content":"{}"}}}}]}}"#,
        "x".repeat(100_000)
    );
    let length = scripted::answer(200, &[("content-type", "application/json")], &big);
    let chunked = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{big}\r\n0\r\n\r\n",
        big.len()
    );
    for bytes in [length, chunked.into_bytes()] {
        let upstream = Scripted::always(bytes).await;
        let yaml = format!(
            "groups:\n{}routes:\n  - {{ model: \"*\", groups: [g] }}\n",
            group_of("g", "", &[upstream_at("up", &upstream.url(), "")]),
        );
        let gateway = Gateway::start(&format!("limits: {{ answer: 64KiB }}\n{yaml}")).await;
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (502, "upstream_error")
        );
        assert_eq!(
            gateway
                .metric("forebay_limit_hits_total{limit=\"answer\"}")
                .await,
            Some(1.0)
        );
        let gateway = Gateway::start(&yaml).await;
        assert_eq!(
            post_chat(gateway.addr, &chat("demo")).await.body,
            big.as_bytes()
        );
    }
}

#[tokio::test]
async fn an_upstreams_own_headers_never_reach_the_client() {
    let a = sim("a").await;
    let gateway = Gateway::start(&one_group(&[&a])).await;
    for fault in [
        "junk_headers=legal",
        "1xx=103",
        "1xx=102;junk_headers=legal",
        "many_headers=100",
        "big_header=20000",
        "trailers",
    ] {
        a.fault(fault).await.unwrap();
        for body in [chat("demo"), chat_stream("demo")] {
            let answer = post_chat(gateway.addr, &body).await;
            assert_eq!(answer.status, 200, "{fault}");
            let mut names: Vec<String> = answer
                .headers
                .iter()
                .map(|(name, _)| name.to_lowercase())
                .collect();
            names.retain(|name| {
                ![
                    "content-type",
                    "content-length",
                    "transfer-encoding",
                    "date",
                    "connection",
                    "cache-control",
                    "x-accel-buffering",
                    "x-request-id",
                ]
                .contains(&name.as_str())
                    && !name.starts_with("x-forebay-")
            });
            assert_eq!(names, [""; 0], "{fault}");
        }
    }
    // More than anybody should send: the next, or 502; never a hang.
    for fault in ["many_headers=1000", "big_header=3000000"] {
        a.fault(fault).await.unwrap();
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert!(
            answer.status == 502 || answer.status == 200,
            "{fault}: {}",
            answer.status
        );
    }
}

#[tokio::test]
async fn other_calls_fail_over_alike() {
    let (a, b) = (sim("a").await, sim("b").await);
    let calls = [
        ("/v1/completions", r#"{"model":"demo","prompt":"Hello"}"#),
        ("/v1/embeddings", r#"{"model":"demo","input":"Hello"}"#),
        ("/v1/responses", r#"{"model":"demo","input":"Hello"}"#),
        (
            "/v1/rerank",
            r#"{"model":"demo","query":"a","documents":["b"]}"#,
        ),
        ("/v1/moderations", r#"{"model":"demo","input":"Hello"}"#),
    ];
    for (path, body) in calls {
        a.fault("status=503").await.unwrap();
        a.clear_records();
        b.clear_records();
        let gateway = Gateway::start(&one_group(&[&a, &b])).await;
        let answer = post(gateway.addr, path, &[], body.as_bytes()).await;
        assert_eq!((answer.status, answer.upstream()), (200, "b"), "{path}");
        assert_eq!(a.records()[0].target(), path);
        assert_eq!(b.records()[0].body, body.as_bytes());
    }
}

#[tokio::test]
async fn whoever_can_still_answer_does_however_many_cannot() {
    let well = sim("well").await;
    // More that refuse than there are attempts, and as many that die.
    let mut upstreams: Vec<String> = (0..5)
        .map(|number| {
            let url = format!("http://{}/v1", free_port());
            upstream_at(&format!("dead-{number}"), &url, "")
        })
        .collect();
    let dying = [sim("dying-1").await, sim("dying-2").await];
    for sim in &dying {
        sim.fault("status=500").await.unwrap();
        upstreams.push(upstream_at(sim.name(), &sim.url(), ""));
    }
    upstreams.push(upstream_at("well", &well.url(), ""));
    let groups = format!("groups:\n{}", group_of("g", "", &upstreams));
    let routes = "routes:\n  - { model: \"*\", groups: [g] }\n";
    let gateway = Gateway::start(&(groups + routes)).await;
    for body in [chat("demo"), chat_stream("demo")] {
        let answer = post_chat(gateway.addr, &body).await;
        assert_eq!((answer.status, answer.upstream()), (200, "well"));
        gateway.reset(None).await;
    }
}

#[tokio::test]
async fn a_request_that_kills_goes_to_no_more_than_the_attempts() {
    let sims = [
        sim("a").await,
        sim("b").await,
        sim("c").await,
        sim("d").await,
    ];
    for sim in &sims {
        sim.fault("reset").await.unwrap();
    }
    let gateway = Gateway::start(&one_group(&sims.each_ref())).await;
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(answer.status, 502, "{}", answer.text());
    let asked: usize = sims.iter().map(|sim| sim.records().len()).sum();
    assert_eq!(asked, 3);
}
