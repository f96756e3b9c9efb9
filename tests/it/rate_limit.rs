//! `rate_limit`: who has had his share waits, and nobody else does.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use futures_util::future::join_all;

use crate::support::{
    Answer, Connection, Gateway, chat, chat_stream, eventually,
    http::{build, post, post_chat},
    keys::{bearer, chat_as, keys},
    one_group, sim,
};

/// A configuration that asks for keys and has these further plugins.
fn keyed(rules: &[&str], yaml: &str) -> String {
    let rules: String = rules.iter().map(|rule| format!("  - {rule}\n")).collect();
    format!("plugins:\n  - auth: {{ keys_file: keys.yaml }}\n{rules}{yaml}")
}

/// The same without keys.
fn open(rules: &[&str], yaml: &str) -> String {
    keyed(rules, yaml).replace("auth: { keys_file: keys.yaml }", "auth: none")
}

/// A chat request whose answer has at most so many tokens.
fn bounded(max_tokens: u32) -> String {
    chat("demo").replacen('{', &format!("{{\"max_tokens\":{max_tokens},"), 1)
}

fn number(answer: &Answer, header: &str) -> u64 {
    let value = answer.header(header);
    let value = value.unwrap_or_else(|| panic!("no {header} in {:?}", answer.headers));
    value.parse().unwrap()
}

#[tokio::test]
async fn a_greedy_key_waits_and_the_others_do_not_notice() {
    let gpu = sim("gpu-1").await;
    let yaml = keyed(&["rate_limit: { requests: 3/day }"], &one_group(&[&gpu]));
    let file = keys(&[("greedy", ""), ("modest", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    for turn in 0..20 {
        let answer = chat_as(&gateway, "greedy", &chat("demo")).await;
        assert_eq!(number(&answer, "x-ratelimit-limit-requests"), 3);
        if turn < 3 {
            assert_eq!(answer.status, 200);
            assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), 2 - turn);
            continue;
        }
        assert_eq!(answer.status, 429);
        assert_eq!(answer.error_code(), "rate_limit_exceeded");
        assert_eq!(answer.json()["error"]["type"], "requests");
        assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), 0);
        // A third of a day, less what the test has taken so far.
        let wait = number(&answer, "retry-after");
        assert!((28_000..=28_800).contains(&wait), "{wait}");
        let reset = answer.header("x-ratelimit-reset-requests").unwrap();
        assert!(reset.starts_with("23h59m") || reset == "24h0m0s", "{reset}");
    }
    assert_eq!(gpu.records().len(), 3);
    let answer = chat_as(&gateway, "modest", &chat_stream("demo")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), 2);
    let series = "forebay_rate_limited_total{limit=\"requests\",rule=\"key\"}";
    assert_eq!(gateway.metric(series).await, Some(17.0));
}

#[tokio::test]
async fn who_waits_as_long_as_he_is_told_is_let_through() {
    let gpu = sim("gpu-1").await;
    gpu.fault("header_delay=200").await.unwrap();
    for (kind, body) in [("requests", chat("demo")), ("tokens", bounded(900))] {
        let rule = format!("rate_limit: {{ {kind}: 1k/s }}").replace("requests: 1k", "requests: 1");
        let gateway = Gateway::start(&open(&[&rule], &one_group(&[&gpu]))).await;
        let refused = RefCell::new(None);
        eventually("one of many has to wait", async || {
            let all = (0..8).map(|_| post_chat(gateway.addr, &body));
            let mut all = join_all(all).await.into_iter();
            *refused.borrow_mut() = all.find(|answer| answer.status == 429);
            refused.borrow().is_some()
        })
        .await;
        let refused = refused.take().unwrap();
        assert_eq!(refused.json()["error"]["type"], kind);
        let wait = Duration::from_secs(number(&refused, "retry-after"));
        let never = std::future::pending::<()>();
        tokio::time::timeout(wait, never).await.unwrap_err();
        assert_eq!(post_chat(gateway.addr, &body).await.status, 200, "{kind}");
    }
}

#[tokio::test]
async fn tokens_are_settled_by_what_was_really_used() {
    let gpu = sim("gpu-1").await;
    let rules = ["rate_limit: { tokens: 10k/day }"];
    let gateway = Gateway::start(&open(&rules, &one_group(&[&gpu]))).await;
    let left = async |body: &str| {
        let answer = post_chat(gateway.addr, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let usage = match answer.header("content-type") {
            Some("application/json") => answer.json()["usage"]["total_tokens"].as_u64(),
            _ => None,
        };
        (number(&answer, "x-ratelimit-remaining-tokens"), usage)
    };
    let (first, usage) = left(&bounded(1000)).await;
    assert!((8900..9000).contains(&first), "{first}");
    let used = usage.unwrap();
    let (second, _) = left(&bounded(1000)).await;
    assert!(
        second.abs_diff(first - used) <= 1,
        "{first} {second} {used}"
    );
    // A stream that was not asked for its usage is settled as well.
    let body = chat_stream("demo").replacen('{', "{\"max_tokens\":1000,", 1);
    let (third, _) = left(&body).await;
    let (fourth, _) = left(&body).await;
    assert!(third - fourth <= used + 1, "{third} {fourth}");
    // What nobody bounds is a guess.
    let (fifth, _) = left(&chat("demo")).await;
    assert!((fourth - 200..fourth).contains(&fifth), "{fourth} {fifth}");
}

#[tokio::test]
async fn who_leaves_pays_for_what_came_and_gets_the_rest_back() {
    let gpu = sim("gpu-1").await;
    let rules = ["rate_limit: { tokens: 2000/day }"];
    let gateway = Gateway::start(&open(&rules, &one_group(&[&gpu]))).await;
    gpu.fault("stall_at=6;times=1").await.unwrap();
    let body = chat_stream("demo").replacen('{', "{\"max_tokens\":1500,", 1);
    let mut connection = Connection::open(gateway.addr).await;
    connection
        .send(&build("POST", "/v1/chat/completions", &[], body.as_bytes()))
        .await;
    connection.read_until("answers:").await;
    // All of it is reserved while the answer comes.
    let refused = post_chat(gateway.addr, &bounded(600)).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()["error"]["type"], "tokens");
    assert!(number(&refused, "x-ratelimit-remaining-tokens") < 500);
    drop(connection);
    let remaining = Cell::new(0);
    eventually("the rest is back", async || {
        let answer = post_chat(gateway.addr, &bounded(600)).await;
        if answer.status == 200 {
            remaining.set(number(&answer, "x-ratelimit-remaining-tokens"));
        }
        answer.status == 200
    })
    .await;
    // 600 and a prompt are reserved, a prompt and some events were paid.
    let remaining = remaining.get();
    assert!((1300..1399).contains(&remaining), "{remaining}");
}

#[tokio::test]
async fn a_request_that_can_never_fit_is_told_so_at_once() {
    let gpu = sim("gpu-1").await;
    let rules = ["rate_limit: { tokens: 500/min }"];
    let gateway = Gateway::start(&open(&rules, &one_group(&[&gpu]))).await;
    let answer = post_chat(gateway.addr, &bounded(600)).await;
    assert_eq!(answer.status, 429);
    assert_eq!(answer.error_code(), "rate_limit_exceeded");
    assert_eq!(answer.json()["error"]["type"], "tokens");
    assert_eq!(answer.header("retry-after"), None);
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    assert!(
        answer.text().contains("request too large"),
        "{}",
        answer.text()
    );
    // Without a bound of the client's own it is only our guess that is larger.
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    let series = "forebay_rate_limited_total{limit=\"too_large\",rule=\"key\"}";
    assert_eq!(gateway.metric(series).await, Some(1.0));
}

#[tokio::test]
async fn only_so_many_are_served_at_once() {
    let gpu = sim("gpu-1").await;
    let rules = ["rate_limit: { concurrent: 2 }"];
    let yaml = keyed(&rules, &one_group(&[&gpu]));
    let file = keys(&[("a", ""), ("b", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    gpu.fault("hang;times=2").await.unwrap();
    let key = bearer("a");
    let headers = [("authorization", key.as_str())];
    let body = chat("demo");
    let request = build("POST", "/v1/chat/completions", &headers, body.as_bytes());
    let mut hanging = Vec::new();
    for _ in 0..2 {
        let mut connection = Connection::open(gateway.addr).await;
        connection.send(&request).await;
        hanging.push(connection);
    }
    eventually("both are under way", async || gpu.records().len() == 2).await;
    let refused = chat_as(&gateway, "a", &body).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.error_code(), "rate_limit_exceeded");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(chat_as(&gateway, "b", &body).await.status, 200);
    hanging.pop();
    eventually("there is room again", async || {
        chat_as(&gateway, "a", &body).await.status == 200
    })
    .await;
}

#[tokio::test]
async fn a_keys_own_limits_take_the_place_of_the_rules() {
    let gpu = sim("gpu-1").await;
    let rules = [
        "rate_limit: { per: key, requests: 1/day }",
        "rate_limit: { per: ip, requests: 5/day }",
    ];
    let yaml = keyed(&rules, &one_group(&[&gpu]));
    let file = keys(&[
        ("plain", ""),
        ("more", ", requests: 3/day"),
        ("most", ", requests: 100/day"),
    ]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    for (name, granted) in [("plain", 1), ("more", 3)] {
        for turn in 0..granted + 2 {
            let status = chat_as(&gateway, name, &chat("demo")).await.status;
            assert_eq!(status == 200, turn < granted, "{name} {turn}");
        }
    }
    // The rule for addresses holds for everybody; refusals of others do not count.
    assert_eq!(chat_as(&gateway, "most", &chat("demo")).await.status, 200);
    let refused = chat_as(&gateway, "most", &chat("demo")).await;
    assert_eq!(refused.status, 429);
    assert!(
        refused.text().contains("requests per ip"),
        "{}",
        refused.text()
    );
}

#[tokio::test]
async fn a_keys_own_limit_takes_the_place_of_rules_of_the_same_time_only() {
    let gpu = sim("gpu-1").await;
    let rules = [
        "rate_limit: { per: key, requests: 1/h }",
        "rate_limit: { per: key, requests: 3/day }",
    ];
    let yaml = keyed(&rules, &one_group(&[&gpu]));
    let file = keys(&[
        ("more", ", requests: 100/h"),
        ("odd", ", requests: 100/min"),
    ]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    for (name, granted) in [("more", 3), ("odd", 1)] {
        for turn in 0..granted + 2 {
            let status = chat_as(&gateway, name, &chat("demo")).await.status;
            assert_eq!(status == 200, turn < granted, "{name} {turn}");
        }
    }
    let log = gateway.log();
    let warning = "keys such as \"odd\" have requests per min of their own that nobody is held to";
    assert!(log.contains(warning), "{log}");
    assert!(!log.contains("have requests per h of"), "{log}");
}

#[tokio::test]
async fn the_bound_of_llama_cpp_is_reserved_like_any() {
    let gpu = sim("gpu-1").await;
    let rules = ["rate_limit: { tokens: 2000/day }"];
    let gateway = Gateway::start(&open(&rules, &one_group(&[&gpu]))).await;
    let body = bounded(5).replacen('{', "{\"n_predict\":100000,", 1);
    let refused = post_chat(gateway.addr, &body).await;
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert!(refused.text().contains("request too large"));
}

#[tokio::test]
async fn addresses_models_and_routes_count_by_themselves() {
    let gpu = sim("gpu-1").await;
    gpu.fault("status=200").await.unwrap();
    let from = async |gateway: &Gateway, ip: &str, model: &str| {
        let headers = [("x-forwarded-for", ip)];
        let path = "/v1/chat/completions";
        post(gateway.addr, path, &headers, chat(model).as_bytes())
            .await
            .status
    };
    let yaml = |rule: &str| {
        let groups = one_group(&[&gpu]).replace(
            "routes:\n",
            "aliases: { other-name: demo }\ntrusted_proxies: [127.0.0.0/8]\nroutes:\n  - { model: \"gpt*\", groups: [gpus] }\n",
        );
        open(&[rule], &groups)
    };
    let gateway = Gateway::start(&yaml("rate_limit: { per: ip, requests: 1/day }")).await;
    for (ip, status) in [
        ("192.0.2.1", 200),
        ("192.0.2.1", 429),
        ("192.0.2.2", 200),
        ("2001:db8:1:2::1", 200),
        ("2001:db8:1:2:ffff::2", 429),
        ("2001:db8:1:3::1", 200),
    ] {
        assert_eq!(from(&gateway, ip, "demo").await, status, "{ip}");
    }
    let gateway = Gateway::start(&yaml("rate_limit: { per: model, requests: 1/day }")).await;
    assert_eq!(from(&gateway, "192.0.2.1", "demo").await, 200);
    assert_eq!(from(&gateway, "192.0.2.2", "demo").await, 429);
    assert_eq!(from(&gateway, "192.0.2.2", "other-name").await, 429);
    let gateway = Gateway::start(&yaml("rate_limit: { per: route, requests: 1/day }")).await;
    assert_eq!(from(&gateway, "192.0.2.1", "demo").await, 200);
    assert_eq!(from(&gateway, "192.0.2.1", "demo-2").await, 429);
    assert_ne!(from(&gateway, "192.0.2.1", "gpt-x").await, 429);
}

#[tokio::test]
async fn strangers_are_not_remembered() {
    let gpu = sim("gpu-1").await;
    // Also where the rule stands before the plugin that turns them away.
    let yaml = keyed(&[], &one_group(&[&gpu])).replace(
        "plugins:\n",
        "trusted_proxies: [127.0.0.0/8]\nplugins:\n  - rate_limit: { per: ip, requests: 1/day }\n",
    );
    let file = keys(&[("a", "")]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    for i in 0..50 {
        let (ip, key) = (format!("192.0.2.{i}"), "Bearer fb_wrong");
        let headers = [("authorization", key), ("x-forwarded-for", ip.as_str())];
        let path = "/v1/chat/completions";
        let answer = post(gateway.addr, path, &headers, chat("demo").as_bytes()).await;
        assert_eq!(answer.status, 401);
    }
    let series = "forebay_rate_limit_tracked{rule=\"ip\"}";
    assert_eq!(gateway.metric(series).await, Some(0.0));
    assert_eq!(chat_as(&gateway, "a", &chat("demo")).await.status, 200);
    assert_eq!(gateway.metric(series).await, Some(1.0));
}

#[tokio::test]
async fn a_raised_limit_acts_at_once_and_what_was_used_is_remembered() {
    let gpu = sim("gpu-1").await;
    let yaml = |limit: &str| {
        let rule = format!("rate_limit: {{ requests: {limit}/day }}");
        open(&[&rule], &one_group(&[&gpu]))
    };
    let gateway = Gateway::start(&yaml("2")).await;
    for status in [200, 200, 429] {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, status);
    }
    gateway.write_config(&yaml("3"));
    assert_eq!(gateway.reload().await.status, 200);
    for status in [200, 429] {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, status);
    }
}

#[tokio::test]
async fn what_reached_no_upstream_is_given_back() {
    let gpu = sim("gpu-1").await;
    let rules = ["rate_limit: { requests: 2/day, tokens: 3k/day }"];
    let gateway = Gateway::start(&open(&rules, &one_group(&[&gpu]))).await;
    gpu.stop().await;
    for _ in 0..5 {
        let answer = post_chat(gateway.addr, &bounded(2000)).await;
        assert!(answer.status >= 500, "{}", answer.status);
    }
    gpu.start_again().await.unwrap();
    eventually("it is back", async || {
        post_chat(gateway.addr, &bounded(2000)).await.status == 200
    })
    .await;
    let answer = post_chat(gateway.addr, &bounded(2000)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(post_chat(gateway.addr, &bounded(2000)).await.status, 429);
}

#[tokio::test]
async fn limits_that_make_no_sense_are_mistakes_with_their_line() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    for (rule, path) in [
        ("rate_limit: { requests: 0/min }", "requests"),
        ("rate_limit: { requests: -5/min }", "requests"),
        ("rate_limit: { requests: 60 }", "requests"),
        ("rate_limit: { tokens: 0k/min }", "tokens"),
        ("rate_limit: { tokens: 5/fortnight }", "tokens"),
        ("rate_limit: { concurrent: 0 }", "concurrent"),
        ("rate_limit: { concurrent: -1 }", "concurrent"),
        (
            "rate_limit: { requests: 1/s, default_completion_tokens: 0 }",
            "default_completion_tokens",
        ),
        ("rate_limit: { requests: 1/s, per: user }", "per"),
        ("rate_limit: { requests: 1/s, burst: 5 }", "burst"),
    ] {
        gateway.write_config(&open(&[rule], &one_group(&[&gpu])));
        let answer = gateway.reload().await;
        assert_eq!(answer.status, 422, "{rule}");
        let problems = answer.json()["problems"].to_string();
        let wanted = format!("plugins[1].rate_limit.{path}: ");
        assert!(problems.contains("forebay.yaml:5:"), "{problems}");
        assert!(problems.contains(&wanted), "{problems}");
    }
    gateway.write_config(&open(&["rate_limit: { per: ip }"], &one_group(&[&gpu])));
    let problems = gateway.reload().await.json()["problems"].to_string();
    assert!(
        problems.contains("expected at least one of requests"),
        "{problems}"
    );
    let file = keys(&[("a", ", requests: 0/min")]);
    std::fs::write(gateway.folder.path().join("keys.yaml"), file).unwrap();
    gateway.write_config(&keyed(&[], &one_group(&[&gpu])));
    let problems = gateway.reload().await.json()["problems"].to_string();
    assert!(problems.contains("keys.yaml:2:"), "{problems}");
}
