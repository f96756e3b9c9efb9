//! `budget`: what a key may use in a day and a month, and the store that
//! remembers it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};

use crate::support::{
    Connection, Gateway, Scripted,
    by_hand::{ByHand, group_of as one_upstream},
    chat, chat_stream, eventually,
    gateway::command,
    group_of,
    http::{build, get, post_chat},
    keys::{chat_as, keys},
    one_group,
    scripted::answer,
    sim, upstream_at,
};

/// A configuration with a budget and a store, that asks for keys.
fn keyed(store: &str, budget: &str, yaml: &str) -> String {
    format!(
        "store: \"sqlite:{store}\"\nplugins:\n  - auth: {{ keys_file: keys.yaml }}\n  - budget: {{ {budget} }}\n{yaml}"
    )
}

/// The same without keys.
fn open(store: &str, budget: &str, yaml: &str) -> String {
    keyed(store, budget, yaml).replace("auth: { keys_file: keys.yaml }", "auth: none")
}

async fn connect(file: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(file);
    SqliteConnection::connect_with(&options).await.unwrap()
}

/// What the file says that was used this month.
async fn stored(file: &Path) -> i64 {
    let mut connection = connect(file).await;
    let sum = "SELECT COALESCE(SUM(tokens), 0) FROM usage WHERE length(period) = 7";
    sqlx::query_scalar(sum)
        .fetch_one(&mut connection)
        .await
        .unwrap_or(0)
}

async fn usage(gateway: &Gateway, key: &str) -> serde_json::Value {
    let all = get(gateway.admin, "/usage").await.json();
    let mut all = all["keys"].as_array().unwrap().clone().into_iter();
    all.find(|one| one["key"] == key).unwrap()
}

#[tokio::test]
async fn who_has_used_his_budget_waits_for_the_next_day() {
    let gpu = sim("gpu-1").await;
    let yaml = keyed("forebay.db", "day: { tokens: 60 }", &one_group(&[&gpu]));
    let file = keys(&[
        ("a", ""),
        ("b", ""),
        ("rich", ", budget: { day: { tokens: 1M } }"),
    ]);
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &file)], &[]).await;
    // An answer takes 24 tokens, the prompt one.
    for status in [200, 200, 200, 429, 429] {
        let answer = chat_as(&gateway, "a", &chat("demo")).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        if status == 200 {
            continue;
        }
        assert_eq!(answer.error_code(), "insufficient_quota");
        assert_eq!(answer.json()["error"]["type"], "insufficient_quota");
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
        let now = std::time::SystemTime::now();
        let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let left = 86_400 - now % 86_400;
        assert!(
            (left.saturating_sub(120)..=left + 60).contains(&wait),
            "{wait} {left}"
        );
    }
    assert_eq!(
        chat_as(&gateway, "b", &chat_stream("demo")).await.status,
        200
    );
    for _ in 0..5 {
        assert_eq!(chat_as(&gateway, "rich", &chat("demo")).await.status, 200);
    }
    let a = usage(&gateway, "a").await;
    assert_eq!(a["day"]["tokens"], 75);
    assert_eq!(a["day"]["tokens_max"], 60);
    assert_eq!(a["month"]["requests"], 3);
    assert_eq!(usage(&gateway, "b").await["day"]["tokens"], 25);
    assert_eq!(
        usage(&gateway, "rich").await["day"]["tokens_max"],
        1_000_000
    );
    let series = "forebay_budget_refused_total{of=\"tokens\",period=\"day\"}";
    assert_eq!(gateway.metric(series).await, Some(2.0));
    gateway.logged("budget").await;
    let config = gateway.config_file();
    let output = tokio::task::spawn_blocking(move || {
        let mut ctl = command();
        ctl.args(["ctl", "usage", "-c"])
            .arg(config)
            .output()
            .unwrap()
    });
    let output = output.await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let line = said.lines().find(|line| line.starts_with("a ")).unwrap();
    assert!(line.contains(" 75 ") && line.contains(" 60 "), "{said}");
}

#[tokio::test]
async fn what_was_used_survives_a_kill() {
    let gpu = sim("gpu-1").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state/forebay.db");
    let yaml = open(
        file.to_str().unwrap(),
        "month: { tokens: 60 }",
        &format!("shutdown: {{ lame_duck: 0s }}\n{}", one_group(&[&gpu])),
    );
    let mut gateway = Gateway::start(&yaml).await;
    for _ in 0..2 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    eventually("it is written", async || stored(&file).await == 50).await;
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    gateway.signal("KILL");
    while gateway.exited().is_none() {
        tokio::task::yield_now().await;
    }
    let mut gateway = Gateway::start(&yaml).await;
    assert_eq!(usage(&gateway, "-").await["month"]["tokens"], 50);
    for status in [200, 429] {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, status);
    }
    // Who is asked to stop writes everything first.
    gateway.signal("TERM");
    while gateway.exited().is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(stored(&file).await, 75);
}

#[tokio::test]
async fn money_is_counted_by_the_prices() {
    let gpu = sim("gpu-1").await;
    let budget = "month: { money: 0.0005 }, prices: [ { model: demo, input: 1, output: 10 } ]";
    let yaml = open("forebay.db", budget, &one_group(&[&gpu]));
    let gateway = Gateway::start(&yaml).await;
    // 1 × 1 and 24 × 10 millionths: 0.000241 each.
    for status in [200, 200, 200, 429] {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.status, status, "{}", answer.text());
    }
    let used = usage(&gateway, "-").await["month"]["money"]
        .as_f64()
        .unwrap();
    assert!((used - 3.0 * 0.000_241).abs() < 1e-9, "{used}");
    let more = yaml.replace("0.0005", "5");
    gateway.write_config(&more);
    assert_eq!(gateway.reload().await.status, 200);
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
}

#[tokio::test]
async fn an_answer_that_breaks_off_costs_its_prompt_too() {
    let event = r#"{"id":"x","choices":[{"index":0,"delta":{"content":"word "}}]}"#;
    let body = format!("data: {event}\n\n").repeat(9);
    let headers = [("content-type", "text/event-stream")];
    let dying = Scripted::always(answer(200, &headers, &body)).await;
    let upstream = upstream_at("gpu-1", &dying.url(), "kind: vllm");
    let yaml = format!(
        "groups:\n{}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
        group_of("gpus", "takeover: false", &[upstream])
    );
    let yaml = open("forebay.db", "day: { tokens: 1M }", &yaml);
    let gateway = Gateway::start(&yaml).await;
    let prompt = "word ".repeat(8000);
    let asked = chat_stream("demo").replace("Hello", &prompt);
    let broken = post_chat(gateway.addr, &asked).await;
    assert!(broken.text().contains("upstream_incomplete"));
    gateway.logged("tokens_out=9").await;
    let used = usage(&gateway, "-").await["day"]["tokens"]
        .as_u64()
        .unwrap();
    assert!((10_009..10_100).contains(&used), "{used}");
}

#[tokio::test]
async fn money_is_reserved_also_where_only_groups_have_a_price() {
    let upstream = ByHand::listen().await;
    let budget =
        "month: { money: 1 }, prices: [ { model: '*', group: gpus, input: 1, output: 1000 } ]";
    let yaml = open("forebay.db", budget, &one_upstream(&upstream.url()));
    let gateway = Gateway::start(&yaml).await;
    let body = chat("demo").replacen('{', "{\"max_tokens\":2000,", 1);
    let mut first = Connection::open(gateway.addr).await;
    let path = "/v1/chat/completions";
    first.send(&build("POST", path, &[], body.as_bytes())).await;
    let call = upstream.accept().await;
    for _ in 0..4 {
        let refused = post_chat(gateway.addr, &body).await;
        assert_eq!(refused.status, 429, "{}", refused.text());
        assert_eq!(refused.error_code(), "rate_limit_exceeded");
    }
    drop(call);
}

#[tokio::test]
async fn a_damaged_store_is_moved_aside_and_the_gateway_serves() {
    let gpu = sim("gpu-1").await;
    let yaml = open("forebay.db", "day: { tokens: 1M }", &one_group(&[&gpu]));
    let garbage = "this is no database, and it never was one: ".repeat(500);
    let gateway = Gateway::start_with(&yaml, &[("forebay.db", &garbage)], &[]).await;
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    let names = fs::read_dir(gateway.folder.path()).unwrap();
    let aside = names.flatten().find(|entry| {
        let name = entry.file_name().into_string().unwrap();
        name.starts_with("forebay.db.corrupt-")
    });
    assert_eq!(fs::read_to_string(aside.unwrap().path()).unwrap(), garbage);
    assert!(
        gateway.log().contains("the store is damaged"),
        "{}",
        gateway.log()
    );
    let file = gateway.folder.path().join("forebay.db");
    eventually("it is written", async || stored(&file).await == 25).await;
}

#[tokio::test]
async fn a_store_that_cannot_be_used_is_what_on_failure_says() {
    let gpu = sim("gpu-1").await;
    for (on_failure, status) in [("closed", 503), ("open", 200)] {
        let budget = format!("day: {{ tokens: 60 }}, on_failure: {on_failure}");
        // A file stands where the folder should be.
        let yaml = open("folder/forebay.db", &budget, &one_group(&[&gpu]));
        let gateway = Gateway::start_with(&yaml, &[("folder", "")], &[]).await;
        for _ in 0..4 {
            let answer = post_chat(gateway.addr, &chat("demo")).await;
            assert_eq!(answer.status, status, "{}", answer.text());
            if status == 503 {
                assert_eq!(answer.error_code(), "budget_unknown");
            }
        }
        assert!(gateway.log().contains("the store does not work"));
        let errors = "forebay_store_errors_total{what=\"open\"}";
        assert!(gateway.metric(errors).await.unwrap() > 0.0);
        fs::remove_file(gateway.folder.path().join("folder")).unwrap();
        // What was let through has been counted.
        let then = if on_failure == "closed" { 200 } else { 429 };
        eventually("it works again", async || {
            post_chat(gateway.addr, &chat("demo")).await.status == then
        })
        .await;
        gateway.logged("the store works again").await;
    }
}

#[tokio::test]
async fn a_locked_store_delays_nobody_and_loses_nothing() {
    let gpu = sim("gpu-1").await;
    let yaml = open("forebay.db", "day: { tokens: 1M }", &one_group(&[&gpu]));
    let gateway = Gateway::start(&yaml).await;
    let file = gateway.folder.path().join("forebay.db");
    let mut other = connect(&file).await;
    sqlx::raw_sql("BEGIN EXCLUSIVE")
        .execute(&mut other)
        .await
        .unwrap();
    for _ in 0..10 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    gateway.logged("database is locked").await;
    assert_eq!(gateway.metric("forebay_store_queue").await, Some(2.0));
    sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
    eventually("it is written", async || stored(&file).await == 250).await;
    gateway.metric_becomes("forebay_store_queue", 0.0).await;
    assert_eq!(
        gateway.metric("forebay_store_dropped_total").await,
        Some(0.0)
    );
}

#[tokio::test]
async fn a_full_disk_harms_nobody_and_what_was_used_is_written_when_there_is_room() {
    let gpu = sim("gpu-1").await;
    let yaml = open("forebay.db", "day: { tokens: 375 }", &one_group(&[&gpu]));
    let gateway = Gateway::start(&yaml).await;
    let file = gateway.folder.path().join("forebay.db");
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    eventually("it is written", async || stored(&file).await == 25).await;
    // From now on no file may be longer than those of the store are already.
    gateway.limit("--fsize=4096:unlimited");
    for _ in 0..12 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    gateway.logged("the store does not work").await;
    let errors = "forebay_store_errors_total{what=\"write\"}";
    assert!(gateway.metric(errors).await.unwrap() > 0.0);
    gateway.metric_becomes("forebay_store_queue", 2.0).await;
    // Nobody uses more than what is his meanwhile.
    for status in [200, 200, 429] {
        let answer = post_chat(gateway.addr, &chat("demo")).await;
        assert_eq!(answer.status, status, "{}", answer.text());
    }
    gateway.limit("--fsize=unlimited:unlimited");
    gateway.logged("the store works again").await;
    eventually("it is written", async || stored(&file).await == 375).await;
    gateway.metric_becomes("forebay_store_queue", 0.0).await;
    let dropped = gateway.metric("forebay_store_dropped_total").await;
    assert_eq!(dropped, Some(0.0));
}

#[tokio::test]
async fn a_store_that_is_damaged_while_it_serves_begins_anew_with_what_is_known() {
    let gpu = sim("gpu-1").await;
    let yaml = open("forebay.db", "day: { tokens: 1M }", &one_group(&[&gpu]));
    let gateway = Gateway::start(&yaml).await;
    let file = gateway.folder.path().join("forebay.db");
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    eventually("it is written", async || stored(&file).await == 100).await;
    {
        // Everything into the one file, so that it is read again.
        let mut other = connect(&file).await;
        sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            .execute(&mut other)
            .await
            .unwrap();
        let damaged = vec![b'x'; usize::try_from(fs::metadata(&file).unwrap().len()).unwrap()];
        fs::write(&file, damaged).unwrap();
    }
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    }
    gateway.logged("the store is damaged").await;
    gateway.logged("the store works again").await;
    let errors = "forebay_store_errors_total{what=\"write\"}";
    assert!(gateway.metric(errors).await.unwrap() > 0.0);
    eventually("it is written", async || stored(&file).await == 200).await;
    let names = fs::read_dir(gateway.folder.path()).unwrap();
    let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.any(|name| name.starts_with("forebay.db.corrupt-")));
}

#[tokio::test]
async fn a_store_that_is_taken_away_begins_anew_with_what_is_known() {
    let gpu = sim("gpu-1").await;
    let yaml = open("forebay.db", "day: { tokens: 1M }", &one_group(&[&gpu]));
    let gateway = Gateway::start(&yaml).await;
    let file = gateway.folder.path().join("forebay.db");
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    eventually("it is written", async || stored(&file).await == 25).await;
    for end in ["", "-wal", "-shm"] {
        let path = gateway.folder.path().join(format!("forebay.db{end}"));
        fs::remove_file(path).ok();
    }
    assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
    gateway.logged("the store is gone").await;
    eventually("it is written", async || {
        file.exists() && stored(&file).await == 50
    })
    .await;
}

#[tokio::test]
async fn a_budget_that_makes_no_sense_is_a_mistake_and_checking_makes_no_file() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&one_group(&[&gpu])).await;
    let groups = one_group(&[&gpu]);
    for (yaml, problem) in [
        (
            open("x.db", "day: { tokens: 0 }", &groups),
            "budget.day.tokens",
        ),
        (
            open("x.db", "day: { tokens: -5k }", &groups),
            "budget.day.tokens",
        ),
        (
            open("x.db", "month: { money: 0 }", &groups),
            "budget.month.money",
        ),
        (
            open("x.db", "month: { money: 5 }", &groups),
            "expected prices",
        ),
        (open("x.db", "week: { tokens: 5 }", &groups), "budget.week"),
        (
            open(
                "x.db",
                "prices: [ { model: x, input: -1, output: 0 } ]",
                &groups,
            ),
            "budget.prices[0].input",
        ),
        (
            open("x.db", "day: { tokens: 5 }", &groups).replace("sqlite:", "oracle:"),
            "expected one of the stores sqlite",
        ),
        (
            open("x.db", "day: { tokens: 5 }", &groups).replace("store: \"sqlite:x.db\"\n", ""),
            "expected a store",
        ),
    ] {
        gateway.write_config(&yaml);
        let answer = gateway.reload().await;
        assert_eq!(answer.status, 422, "{problem}");
        let problems = answer.json()["problems"].to_string();
        assert!(problems.contains(problem), "{problem} {problems}");
        assert!(problems.contains("forebay.yaml:"), "{problems}");
    }
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("forebay.yaml");
    fs::write(&config, open("x.db", "day: { tokens: 5 }", &groups)).unwrap();
    let output = command()
        .args(["check", "-c"])
        .arg(&config)
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(!folder.path().join("x.db").exists());
}
