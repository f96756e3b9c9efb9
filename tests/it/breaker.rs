//! Breakers: what stops the traffic to an upstream that fails, and what lets it
//! come back; retries within their budget.

use std::time::Instant;

use forebay::sim::{Sim, SimOptions};
use futures_util::future::join_all;

use crate::support::{
    Gateway, chat, chat_stream, eventually, group_of, group_with,
    http::{Connection, get, post, post_chat},
    one_group, sim, upstream_at, with_fallback,
};

fn asked(sim: &Sim) -> usize {
    sim.records().len()
}

#[tokio::test]
async fn three_failures_and_it_is_left_alone_for_three_hundred_seconds() {
    let (bad, good) = (sim("bad").await, sim("good").await);
    bad.fault("status=500").await.unwrap();
    let yaml = group_with(&["breaker: { failures: 3, open: 300s }"], &[&bad, &good]);
    let gateway = Gateway::start(&yaml).await;
    for _ in 0..40 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!((answer.status, answer.upstream()), (200, "good"));
    }
    assert_eq!(asked(&bad), 3);
    assert_eq!(gateway.state("bad").await, "down breaker");
    let listed = get(gateway.admin, "/upstreams").await.json();
    let breaker = &listed["upstreams"][0]["breakers"][0];
    assert_eq!(
        (breaker["model"].as_str(), breaker["phase"].as_str()),
        (Some("demo"), Some("open"))
    );
    let left = breaker["seconds"].as_f64().unwrap();
    assert!((280.0..=300.0).contains(&left), "{left}");
    gateway.logged("breaker changed: name=bad").await;
    let series = "forebay_breaker_transitions_total{to=\"open\",upstream=\"bad\"}";
    assert_eq!(gateway.metric(series).await, Some(1.0));
    let series = "forebay_upstream_breakers{group=\"gpus\",phase=\"open\",upstream=\"bad\"}";
    assert_eq!(gateway.metric(series).await, Some(1.0));
    // A model's name is a client's word.
    let metrics = get(gateway.admin, "/metrics").await;
    assert!(!metrics.text().contains("demo"), "{}", metrics.text());
}

#[tokio::test]
async fn a_503_that_comes_again_after_each_pause_it_asked_for_is_a_failure() {
    let (bad, good) = (sim("bad").await, sim("good").await);
    bad.fault("status=503;retry_after=0").await.unwrap();
    let yaml = group_with(&["breaker: { failures: 3, open: 300s }"], &[&bad, &good]);
    let gateway = Gateway::start(&yaml).await;
    for _ in 0..20 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    assert_eq!(asked(&bad), 3);
    assert_eq!(gateway.state("bad").await, "down breaker");
}

#[tokio::test]
async fn ten_errors_in_a_window_open_it_whatever_succeeds_in_between() {
    let only = sim("only").await;
    let yaml = group_with(&["breaker: { errors: 10, window: 300s }"], &[&only]);
    let gateway = Gateway::start(&yaml).await;
    for nth in 0..10 {
        assert_eq!(gateway.state("only").await, "ready", "after {nth}");
        only.fault("status=500;times=1").await.unwrap();
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 502);
        if nth < 9 {
            assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
        }
    }
    let before = asked(&only);
    let answer = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(
        (answer.status, answer.error_code().as_str()),
        (503, "upstream_unavailable")
    );
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=6).contains(&wait), "{wait}");
    assert_eq!(asked(&only), before);
}

#[tokio::test]
async fn a_breaker_is_one_models_own() {
    let only = sim("only").await;
    only.fault("status=500;path=/embeddings").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&only])).await;
    let embed = br#"{"model":"embedder","input":"Hello"}"#;
    for _ in 0..9 {
        post(gateway.addr, "/v1/embeddings", &[], embed).await;
    }
    assert_eq!(asked(&only), 5);
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    assert_eq!(gateway.state("only").await, "degraded breaker");
}

#[tokio::test]
async fn what_counts_opens_it_and_what_does_not_does_not() {
    let counts = [
        "status=500",
        "status=502",
        "status=503",
        "reset",
        "die_at=9",
        "error_at=4",
        "stall_at=0",
        "status=200;body=html;die_at=0",
    ];
    let does_not = ["status=400", "status=404", "status=422", "refuse_model"];
    for (faults, wanted) in [(&counts[..], 5), (&does_not[..], 8)] {
        for fault in faults {
            let (first, last) = (sim("first").await, sim("last").await);
            first.fault(fault).await.unwrap();
            let yaml = with_fallback(&[&first], &last).replace(
                "name: first,",
                "name: first, timeouts: { first_token: 200ms },",
            );
            let gateway = Gateway::start(&yaml).await;
            for _ in 0..8 {
                post_chat(gateway.addr, &chat_stream("demo")).await;
            }
            assert_eq!(asked(&first), wanted, "{fault}");
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_not_the_upstreams_fault() {
    let only = sim("only").await;
    only.fault("hang").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&only])).await;
    for nth in 1..=8 {
        let mut client = Connection::open(gateway.addr).await;
        let body = chat("demo");
        client
            .request("POST", "/v1/chat/completions", &[], body.as_bytes())
            .await;
        eventually("the request arrives", || async { asked(&only) == nth }).await;
        drop(client);
    }
    eventually("all left", || async {
        let series = "forebay_upstream_requests_in_flight{group=\"gpus\",upstream=\"only\"}";
        gateway.metric(series).await == Some(0.0)
    })
    .await;
    assert_eq!(gateway.state("only").await, "ready");
}

#[tokio::test]
async fn when_its_time_is_over_one_request_at_a_time_tries() {
    let (bad, good) = (sim("bad").await, sim("good").await);
    bad.fault("status=500").await.unwrap();
    let yaml = group_with(&["breaker: { failures: 3, open: 200ms }"], &[&bad, &good]);
    let gateway = Gateway::start(&yaml).await;
    for _ in 0..6 {
        post_chat(gateway.addr, &chat("demo")).await;
    }
    assert_eq!(asked(&bad), 3);
    bad.fault("hang").await.unwrap();
    let half_open = || async {
        let listed = get(gateway.admin, "/upstreams").await.json();
        listed["upstreams"][0]["breakers"][0]["phase"] == "half_open"
    };
    eventually("it is half open", half_open).await;
    let answers = (0..20).map(|_| async {
        let mut client = Connection::open(gateway.addr).await;
        let body = chat("demo");
        client
            .request("POST", "/v1/chat/completions", &[], body.as_bytes())
            .await;
        client
    });
    let mut clients = join_all(answers).await;
    eventually("one tries", || async { asked(&bad) == 4 }).await;
    // The one that tries hangs; all the others have their answers.
    let answered = |gateway: &Gateway| {
        let series = "forebay_requests_total{endpoint=\"chat_completions\",outcome=\"success\",route=\"*\",status=\"200\"}";
        let addr = gateway.admin;
        async move {
            let metrics = get(addr, "/metrics").await;
            let line = metrics.text().lines().find(|line| line.starts_with(series));
            line.and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        }
    };
    eventually("19 are answered", || async {
        answered(&gateway).await == Some(6.0 + 19.0)
    })
    .await;
    assert_eq!(asked(&bad), 4);
    clients.clear();
    // Nothing was learnt: the next may try, and finds it well.
    bad.clear_faults().await;
    eventually("it is used again", || async {
        post_chat(gateway.addr, &chat("demo")).await.upstream() == "bad"
    })
    .await;
    eventually("it is closed", || async {
        gateway.state("bad").await == "ready"
    })
    .await;
}

#[tokio::test]
async fn one_of_three_that_answers_503_to_everything_costs_no_client_anything() {
    let (a, b, c) = (sim("a").await, sim("b").await, sim("c").await);
    a.fault("status=503").await.unwrap();
    let gateway = Gateway::start(&one_group(&[&a, &b, &c])).await;
    for _ in 0..10 {
        let many = (0..30).map(|_| async { post_chat(gateway.addr, &chat("demo")).await.status });
        let statuses = join_all(many).await;
        assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    }
    assert!(asked(&a) <= 30, "{}", asked(&a));
}

#[tokio::test]
async fn when_all_fail_upstreams_see_little_more_than_clients_ask() {
    let sims = [sim("a").await, sim("b").await, sim("c").await];
    for sim in &sims {
        sim.fault("status=503").await.unwrap();
    }
    let all: Vec<&Sim> = sims.iter().collect();
    let gateway = Gateway::start(&one_group(&all)).await;
    let requests = 600;
    for _ in 0..requests / 20 {
        let many = (0..20).map(|_| async { post_chat(gateway.addr, &chat("demo")).await.status });
        for status in join_all(many).await {
            assert!(matches!(status, 502 | 503), "{status}");
        }
    }
    let seen: usize = sims.iter().map(asked).sum();
    assert!(seen <= requests * 12 / 10, "{seen}");
    // They are all known to be bad: hardly anything goes there any more.
    assert!(seen <= 150, "{seen}");
}

#[tokio::test]
async fn after_an_outage_of_everybody_all_of_them_serve_again_within_ten_seconds() {
    let sims = [sim("a").await, sim("b").await, sim("c").await];
    for sim in &sims {
        sim.fault("status=500").await.unwrap();
    }
    let all: Vec<&Sim> = sims.iter().collect();
    let gateway = Gateway::start(&one_group(&all)).await;
    let burst = || async {
        let many = (0..6).map(|_| async { post_chat(gateway.addr, &chat("demo")).await });
        join_all(many).await
    };
    eventually("all are out", || async {
        burst().await;
        let listed = get(gateway.admin, "/upstreams").await.json();
        let mut listed = listed["upstreams"].as_array().unwrap().iter();
        listed.all(|one| one["reason"] == "breaker")
    })
    .await;
    // Once a second somebody looks; it stays so for a while.
    let before: Vec<usize> = sims.iter().map(asked).collect();
    eventually("each is tried before its time", || async {
        burst().await;
        let since = sims.iter().zip(&before);
        since
            .into_iter()
            .all(|(sim, before)| asked(sim) >= before + 4)
    })
    .await;
    for sim in &sims {
        sim.clear_faults().await;
    }
    let over = Instant::now();
    eventually("all of them serve", || async {
        let answers = burst().await;
        let serves = |sim: &Sim| {
            let mut answers = answers.iter();
            answers.any(|answer| answer.status == 200 && answer.upstream() == sim.name())
        };
        answers.iter().all(|answer| answer.status == 200) && sims.iter().all(serves)
    })
    .await;
    assert!(over.elapsed().as_secs() < 10, "{:?}", over.elapsed());
    for sim in &sims {
        assert_eq!(gateway.state(sim.name()).await, "ready");
    }
}

#[tokio::test]
async fn names_that_clients_make_up_take_out_no_model_that_nobody_asked_for() {
    let only = Sim::start(SimOptions {
        models: vec!["used".to_owned(), "new".to_owned()],
        ..SimOptions::quick("only")
    })
    .await
    .unwrap();
    let gateway = Gateway::start(&one_group(&[&only])).await;
    assert_eq!(post_chat(gateway.addr, &chat("used")).await.status, 200);
    only.fault("status=500").await.unwrap();
    for nth in 0..200 {
        let answer = post_chat(gateway.addr, &chat(&format!("made-up-{nth}"))).await;
        assert_eq!(answer.status, 502, "{nth}");
    }
    only.clear_faults().await;
    for (model, status) in [("new", 200), ("used", 200), ("made-up-3", 404)] {
        let answer = post_chat(gateway.addr, &chat(model)).await;
        assert_eq!(answer.status, status, "{model}");
    }
    assert_eq!(gateway.state("only").await, "ready");
}

#[tokio::test]
async fn retries_keep_to_their_budget_also_where_breakers_stay_closed() {
    let sims = [sim("a").await, sim("b").await, sim("c").await];
    for sim in &sims {
        sim.fault("status=503").await.unwrap();
    }
    let all: Vec<&Sim> = sims.iter().collect();
    let keys = [
        "breaker: { enabled: false }",
        "retries: { share: 20%, min: 1 }",
    ];
    let gateway = Gateway::start(&group_with(&keys, &all)).await;
    let requests = 300;
    for _ in 0..requests / 20 {
        let many = (0..20).map(|_| async { post_chat(gateway.addr, &chat("demo")).await.status });
        for status in join_all(many).await {
            assert_eq!(status, 502);
        }
    }
    let seen: usize = sims.iter().map(asked).sum();
    assert!(seen <= requests * 12 / 10 + 1, "{seen}");
    assert!(seen > requests, "{seen}");
    let hits = "forebay_limit_hits_total{limit=\"retries\"}";
    assert!(gateway.metric(hits).await.unwrap() > 0.0);
}

#[tokio::test]
async fn what_comes_back_begins_with_a_small_share() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&group_with(&["slow_start: 1h"], &[&a, &b])).await;
    a.stop().await;
    eventually("a is down", || async {
        post_chat(gateway.addr, &chat("demo")).await;
        gateway.state("a").await == "down connect"
    })
    .await;
    a.start_again().await.unwrap();
    eventually("a is back", || async {
        post_chat(gateway.addr, &chat("demo")).await;
        gateway.state("a").await == "ready"
    })
    .await;
    let before = asked(&a);
    for _ in 0..100 {
        post_chat(gateway.addr, &chat("demo")).await;
    }
    let share = asked(&a) - before;
    assert!((5..=15).contains(&share), "{share}");
    // By hand, at once.
    gateway.reset(Some("a")).await;
    let before = asked(&a);
    for _ in 0..20 {
        post_chat(gateway.addr, &chat("demo")).await;
    }
    assert!(asked(&a) - before >= 9);
}

#[tokio::test]
async fn a_silent_address_costs_one_connect_timeout_once() {
    let good = sim("good").await;
    // A queue of connections that is full: further ones get no answer.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
    socket.bind(&any.into()).unwrap();
    socket.listen(0).unwrap();
    let at = socket.local_addr().unwrap().as_socket().unwrap();
    let mut fill = Vec::new();
    for _ in 0..4 {
        let one = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        one.set_nonblocking(true).unwrap();
        one.connect(&at.into()).ok();
        fill.push(one);
    }
    let keys = "timeouts: { connect: 500ms }, weight: 1000";
    let upstreams = [
        upstream_at("silent", &format!("http://{at}/v1"), keys),
        upstream_at("good", &good.url(), ""),
    ];
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
        group_of("gpus", "check: { every: 1h }", &upstreams)
    );
    let gateway = Gateway::start(&yaml).await;
    let began = Instant::now();
    while began.elapsed().as_secs() < 4 {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!((answer.status, answer.upstream()), (200, "good"));
    }
    let series = "forebay_attempts_total{group=\"gpus\",upstream=\"silent\",verdict=\"not_sent\"}";
    assert_eq!(gateway.metric(series).await, Some(1.0));
}
