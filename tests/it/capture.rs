//! What clients asked and were answered stands in files, line by line, whatever
//! happens to the process, the folder or the upstreams.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::support::{
    Connection, Gateway, Scripted, chat, chat_stream, eventually,
    http::{Answer, get, post, post_chat},
    one_group,
    scripted::answer,
    sim, with_fallback,
};

const CHAT: &str = "/v1/chat/completions";

/// The YAML of a gateway that captures into `captures`, with these settings.
fn capturing(settings: &str, rest: &str) -> String {
    format!("plugins:\n  - auth: none\n  - capture: {{ dir: captures{settings} }}\n{rest}")
}

fn captures(gateway: &Gateway) -> PathBuf {
    gateway.folder.path().join("captures")
}

/// The files of a folder that lines are written to, by name.
fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "jsonl"))
        .collect();
    files.sort();
    files
}

/// Every line of every file; panics on one that is none.
fn lines(dir: &Path) -> Vec<Value> {
    let mut lines = Vec::new();
    for file in files(dir) {
        let text = fs::read(&file).unwrap();
        assert!(text.is_empty() || text.ends_with(b"\n"), "{file:?} is torn");
        for line in text.split(|&byte| byte == b'\n') {
            if !line.is_empty() {
                let line = serde_json::from_slice(line);
                lines.push(line.unwrap_or_else(|why| panic!("{file:?}: {why}")));
            }
        }
    }
    lines
}

/// Waits until so many lines are there, and returns them.
async fn captured(gateway: &Gateway, count: usize) -> Vec<Value> {
    let dir = captures(gateway);
    // Of a line that is being written a reader may see the beginning.
    let ends = || {
        files(&dir)
            .into_iter()
            .flat_map(|file| fs::read(file).unwrap())
    };
    eventually(&format!("{count} lines"), || async {
        ends().filter(|&byte| byte == b'\n').count() >= count
    })
    .await;
    gateway.metric_becomes("forebay_capture_waiting", 0.0).await;
    let lines = lines(&dir);
    assert_eq!(lines.len(), count, "{lines:#?}");
    lines
}

fn turns(line: &Value) -> Vec<(String, String)> {
    let turns = line["conversations"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    turns
        .map(|turn| (text(&turn["from"]), text(&turn["value"])))
        .collect()
}

fn answer_of(line: &Value) -> String {
    turns(line).pop().unwrap().1
}

/// Waits until so many exchanges have finished and nothing waits to be written,
/// and returns what became of them: `captured`, `skipped failed`, …, without those
/// that are 0. All of them together are as many as have finished.
async fn account(gateway: &Gateway, count: u64) -> BTreeSet<(String, u64)> {
    let found = Cell::new(BTreeSet::new());
    let all_is_counted = async || {
        let metrics = get(gateway.admin, "/metrics").await;
        let (all, finished, waiting) = read_account(metrics.text());
        let sum: u64 = all.iter().map(|(_, count)| count).sum();
        found.set(all);
        waiting == 0 && sum == finished && finished >= count
    };
    eventually("every exchange is counted once", all_is_counted).await;
    found.into_inner()
}

/// Returns what became of the exchanges, how many have finished, and how many
/// wait.
fn read_account(metrics: &str) -> (BTreeSet<(String, u64)>, u64, u64) {
    let (mut finished, mut waiting) = (0, 0);
    let mut all = BTreeSet::new();
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        match series {
            "forebay_capture_finished_total" => finished = value.parse().unwrap(),
            "forebay_capture_waiting" => waiting = value.parse().unwrap(),
            _ => {}
        }
        if let Some(labels) = series.strip_prefix("forebay_capture_exchanges_total") {
            let label = |name: &str| labels.split(&format!("{name}=\"")).nth(1).unwrap();
            let label = |name: &str| label(name).split('"').next().unwrap().to_owned();
            let count: u64 = value.parse().unwrap();
            if count > 0 {
                let what = format!("{} {}", label("result"), label("reason"));
                all.insert((what.trim().to_owned(), count));
            }
        }
    }
    (all, finished, waiting)
}

fn expected(all: &[(&str, u64)]) -> BTreeSet<(String, u64)> {
    let all = all.iter();
    all.map(|(what, count)| ((*what).to_owned(), *count))
        .collect()
}

/// A request with a question of its own.
fn asking(question: &str, more: Value) -> String {
    let mut body = json!({
        "model": "demo",
        "max_tokens": 8,
        "messages": [{ "role": "user", "content": question }],
    });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

async fn ask(gateway: &Gateway, question: &str, more: Value) -> Answer {
    post_chat(gateway.addr, &asking(question, more)).await
}

#[tokio::test]
async fn what_is_asked_and_answered_is_a_line_in_the_file_of_the_hour() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    let dir = captures(&gateway);
    let says_where = format!("prompts and answers are written to {}", dir.display());
    assert!(gateway.log().contains(&says_where), "{}", gateway.log());

    let whole = ask(&gateway, "first", json!({})).await;
    let first = captured(&gateway, 1).await.remove(0);
    let stream = ask(&gateway, "second", json!({ "stream": true })).await;
    let lines = captured(&gateway, 2).await;
    assert_eq!(first, lines[0]);

    assert_eq!(
        turns(&lines[0]),
        [
            ("human".to_owned(), "first".to_owned()),
            ("gpt".to_owned(), whole.content())
        ]
    );
    assert_eq!(answer_of(&lines[1]), stream.content());
    let meta = &lines[0]["meta"];
    assert_eq!(meta["request_id"], whole.header("x-request-id").unwrap());
    assert_eq!(meta["upstream"], "gpu-1");
    assert_eq!(meta["group"], "gpus");
    assert_eq!(meta["model"], "demo");
    assert_eq!(meta["key"], "-");
    assert_eq!(meta["outcome"], "success");
    assert_eq!(meta["partial"], false);
    assert_eq!(meta["finish_reason"], "length");
    assert_eq!(meta["usage"]["completion_tokens"], 8);
    assert_eq!(lines[1]["meta"]["streamed"], true);
    assert_eq!(lines[0]["id"], whole.json()["id"]);

    for (file, line) in files(&dir).iter().zip([&lines[0], lines.last().unwrap()]) {
        let hour = line["meta"]["ts"].as_str().unwrap().replace(['-', 'T'], "");
        let name = file.file_stem().unwrap().to_str().unwrap().replace('_', "");
        assert!(hour.starts_with(&name), "{name} {hour}");
    }
    let file = files(&dir).remove(0);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&file), mode(&dir)), (0o600, 0o700));
    assert_eq!(account(&gateway, 2).await, expected(&[("captured", 2)]));
}

#[tokio::test]
async fn every_choice_is_a_line_and_other_calls_have_theirs() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    let many = ask(&gateway, "many", json!({ "n": 3, "stream": true })).await;
    assert_eq!(many.status, 200);
    let lines = captured(&gateway, 3).await;
    let ids: BTreeSet<_> = lines.iter().map(|line| line["id"].to_string()).collect();
    assert_eq!(ids.len(), 3);
    for (path, body) in [
        ("/v1/completions", r#"{"model":"demo","prompt":"once"}"#),
        ("/v1/responses", r#"{"model":"demo","input":"once"}"#),
        (
            "/v1/responses",
            r#"{"model":"demo","input":"once","stream":true}"#,
        ),
        ("/v1/embeddings", r#"{"model":"demo","input":"once"}"#),
    ] {
        let answer = post(gateway.addr, path, &[], body.as_bytes()).await;
        assert_eq!(answer.status, 200, "{path}");
    }
    for line in &captured(&gateway, 6).await[3..] {
        assert_eq!(turns(line)[0].1, "once");
        assert!(answer_of(line).starts_with("gpu-1 answers:"), "{line}");
    }
    assert_eq!(
        account(&gateway, 5).await,
        expected(&[("captured", 4), ("skipped endpoint", 1)])
    );
}

#[tokio::test]
async fn who_does_not_want_it_is_not_captured() {
    let gpu = sim("gpu-1").await;
    let keys = format!(
        "keys:\n  - {{ name: alice, sha256: {} }}\n  - {{ name: bob, capture: false, sha256: {} }}\n",
        forebay::plugins::hash_token("alices-token-0123456789"),
        forebay::plugins::hash_token("bobs-token-0123456789"),
    );
    let yaml =
        capturing("", &one_group(&[&gpu])).replace("auth: none", "auth: { keys_file: keys.yaml }");
    let gateway = Gateway::start_with(&yaml, &[("keys.yaml", &keys)], &[]).await;
    let alice = "Bearer alices-token-0123456789";
    let send = async |key: &str, header: &str, more: Value| {
        let headers = [("authorization", key), ("x-forebay-capture", header)];
        let headers = &headers[..if header.is_empty() { 1 } else { 2 }];
        let body = asking("canary-of-the-prompt", more);
        post(gateway.addr, CHAT, headers, body.as_bytes()).await
    };
    for stream in [false, true] {
        let more = json!({ "stream": stream });
        assert_eq!(send(alice, "0", more.clone()).await.status, 200);
        assert_eq!(send(alice, "no", more.clone()).await.status, 200);
        for no in [json!(false), json!("false"), json!(0)] {
            let store = json!({ "stream": stream, "store": no });
            assert_eq!(send(alice, "1", store).await.status, 200);
        }
        let bobs = "Bearer bobs-token-0123456789";
        assert_eq!(send(bobs, "1", more).await.status, 200);
    }
    assert_eq!(send("Bearer nobody", "", json!({})).await.status, 401);
    assert_eq!(
        account(&gateway, 13).await,
        expected(&[
            ("opted_out header", 4),
            ("opted_out key", 2),
            ("opted_out store", 6),
            ("skipped no_request", 1)
        ])
    );
    assert!(lines(&captures(&gateway)).is_empty());
    assert_eq!(send(alice, "1", json!({ "store": true })).await.status, 200);
    let line = captured(&gateway, 1).await.remove(0);
    assert_eq!(line["meta"]["key"], "alice");
}

/// Asks for a stream and leaves in its middle.
async fn leave_a_stream(gateway: &Gateway, question: &str) {
    let mut connection = Connection::open(gateway.addr).await;
    let body = asking(question, json!({ "stream": true, "max_tokens": 1000 }));
    connection.request("POST", CHAT, &[], body.as_bytes()).await;
    connection.read_until("answers:").await;
}

#[tokio::test]
async fn only_whole_answers_are_captured_unless_more_is_asked_for() {
    let gpu = sim("gpu-1").await;
    let rest = one_group(&[&gpu]).replace(
        "    local: true\n",
        "    local: true\n    takeover: false\n",
    );
    let gateway = Gateway::start(&capturing("", &rest)).await;
    gpu.fault("gap=5;path=chat").await.unwrap();
    leave_a_stream(&gateway, "left").await;
    gateway
        .metric_becomes("forebay_capture_finished_total", 1.0)
        .await;
    gpu.fault("die_at=4").await.unwrap();
    let cut = ask(&gateway, "cut", json!({ "stream": true })).await;
    assert!(cut.text().contains("\"error\""), "{}", cut.text());
    gpu.fault("status=400;body=openai").await.unwrap();
    assert_eq!(ask(&gateway, "wrong", json!({})).await.status, 400);
    gpu.fault("comments").await.unwrap();
    gateway
        .metric_becomes("forebay_capture_finished_total", 3.0)
        .await;
    assert_eq!(
        account(&gateway, 3).await,
        expected(&[("skipped failed", 1), ("skipped partial", 2)])
    );
    gateway.write_config(&capturing(
        ", partial: true, failed: true, length: false",
        &rest,
    ));
    gateway.logged("configuration reloaded: version=2").await;
    assert_eq!(ask(&gateway, "long", json!({})).await.status, 200);
    gpu.fault("die_at=4").await.unwrap();
    let cut = ask(&gateway, "cut", json!({ "stream": true })).await;
    gpu.fault("status=400;body=openai").await.unwrap();
    assert_eq!(ask(&gateway, "wrong", json!({})).await.status, 400);
    let lines = captured(&gateway, 2).await;
    assert_eq!(lines[0]["meta"]["outcome"], "incomplete");
    assert_eq!(lines[0]["meta"]["partial"], true);
    assert_eq!(answer_of(&lines[0]), cut.content());
    assert!(!cut.content().is_empty());
    assert_eq!(lines[1]["meta"]["outcome"], "client_error");
    assert_eq!(lines[1]["meta"]["partial"], true);
    assert_eq!(lines[1]["meta"]["status"], 400);
    assert_eq!(answer_of(&lines[1]), "");
    let all = account(&gateway, 6).await;
    assert!(all.contains(&("skipped length".to_owned(), 1)), "{all:?}");
}

#[tokio::test]
async fn an_answer_that_a_filter_ended_is_not_whole() {
    let gpu = sim("gpu-1").await;
    let plugins = |settings: &str| {
        capturing(settings, &one_group(&[&gpu])).replacen(
            "plugins:\n",
            "plugins:\n  - policy: { output: [ { deny: [\"(?s).\"] } ] }\n",
            1,
        )
    };
    let gateway = Gateway::start(&plugins("")).await;
    for stream in [false, true] {
        let answer = ask(&gateway, "denied", json!({ "stream": stream })).await;
        assert!(
            answer.text().contains("content_filter"),
            "{}",
            answer.text()
        );
    }
    assert_eq!(
        account(&gateway, 2).await,
        expected(&[("skipped partial", 2)])
    );
    gateway.write_config(&plugins(", partial: true"));
    gateway.logged("configuration reloaded: version=2").await;
    ask(&gateway, "denied", json!({})).await;
    let line = captured(&gateway, 1).await.remove(0);
    assert_eq!(line["meta"]["finish_reason"], "content_filter");
    assert_eq!(line["meta"]["partial"], true);
}

#[tokio::test]
async fn an_answer_that_was_taken_over_is_captured_as_it_was_read() {
    let (one, two) = (sim("gpu-1").await, sim("gpu-2").await);
    let gateway = Gateway::start(&capturing("", &with_fallback(&[&one], &two))).await;
    one.fault("die_at=5").await.unwrap();
    let answer = ask(
        &gateway,
        "go on",
        json!({ "stream": true, "max_tokens": 20 }),
    )
    .await;
    assert_eq!(answer.events().last().unwrap(), "[DONE]");
    let line = captured(&gateway, 1).await.remove(0);
    assert_eq!(answer_of(&line), answer.content());
    assert_eq!(line["meta"]["takeovers"], 1);
    assert_eq!(line["meta"]["upstream"], "gpu-2");
    assert_eq!(line["meta"]["fallback"], true);
}

#[tokio::test]
async fn names_of_strangers_and_odd_prompts_are_only_words() {
    let gpu = sim("gpu-1").await;
    gpu.fault("tokens=4").await.unwrap();
    let gateway = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    let nasty = "a\nb\r\"c\"\u{2028}\u{2029}\u{85}\u{0}😀\\ <image> }{";
    let long = "x".repeat(10 << 20);
    for prompt in [nasty, &long] {
        let answer = ask(&gateway, prompt, json!({})).await;
        assert_eq!(answer.status, 200);
    }
    let lines = captured(&gateway, 2).await;
    assert_eq!(
        turns(&lines[0])[0].1,
        nasty.replace("<image>", "&lt;image&gt;")
    );
    assert_eq!(turns(&lines[1])[0].1, long);
    let text = fs::read_to_string(&files(&captures(&gateway))[0]).unwrap();
    for end in ['\r', '\u{2028}', '\u{2029}', '\u{85}'] {
        assert!(!text.contains(end));
    }
    let before: Vec<_> = fs::read_dir(gateway.folder.path()).unwrap().collect();
    for model in ["../../x", "a/b", "..", "CON", "😀", &"m".repeat(250)] {
        let answer = ask(&gateway, "name", json!({ "model": model })).await;
        assert!(answer.status == 200 || answer.status == 404, "{model}");
    }
    for model in ["\u{0}", &"m".repeat(300)] {
        assert_eq!(
            ask(&gateway, "name", json!({ "model": model }))
                .await
                .status,
            400
        );
    }
    account(&gateway, 8).await;
    let after: Vec<_> = fs::read_dir(gateway.folder.path()).unwrap().collect();
    assert_eq!(before.len(), after.len());
    for file in files(&captures(&gateway)) {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(name.len() == 11 && name.is_ascii(), "{name}");
    }
}

#[tokio::test]
async fn broken_characters_of_an_upstream_become_a_valid_line() {
    let body: &[u8] =
        b"{\"id\":\"x\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\
        \"content\":\"bad \xff and \\ud83d\"},\"finish_reason\":\"stop\"}]}";
    let head = answer(200, &[("content-type", "application/json")], "");
    let head = String::from_utf8(head).unwrap();
    let length = format!("content-length: {}", body.len());
    let mut sent = head.replace("content-length: 0", &length).into_bytes();
    sent.extend_from_slice(body);
    let upstream = Scripted::always(sent).await;
    let rest = crate::support::by_hand::group_of(&upstream.url());
    let gateway = Gateway::start(&capturing("", &rest)).await;
    let got = post_chat(gateway.addr, &chat("demo")).await;
    assert_eq!(got.status, 200);
    let line = captured(&gateway, 1).await.remove(0);
    assert_eq!(answer_of(&line), "bad \u{fffd} and \u{fffd}");
}

#[tokio::test]
async fn images_are_files_beside_the_lines() {
    const PIXEL: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==";
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    let url = format!("data:image/png;base64,{PIXEL}");
    let content = json!([
        { "type": "image_url", "image_url": { "url": url } },
        { "type": "text", "text": "What is it?" },
    ]);
    let messages = json!([{ "role": "user", "content": content }]);
    for _ in 0..2 {
        let answer = ask(&gateway, "", json!({ "messages": messages })).await;
        assert_eq!(answer.status, 200);
    }
    let lines = captured(&gateway, 2).await;
    assert_eq!(turns(&lines[0])[0].1, "<image>What is it?");
    let name = lines[0]["images"][0].as_str().unwrap();
    assert_eq!(lines[1]["images"][0], name);
    let image = captures(&gateway).join(name);
    assert!(fs::read(&image).unwrap().starts_with(b"\x89PNG"));
    let mode = fs::metadata(&image).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let images = fs::read_dir(captures(&gateway).join("images")).unwrap();
    assert_eq!(images.count(), 1);
}

#[tokio::test]
async fn what_is_to_be_redacted_reaches_no_file() {
    let gpu = sim("gpu-1").await;
    let settings = ", redact: [keys, emails, phones, cards], redact_patterns: [\"canary-[0-9]+\"]";
    let gateway = Gateway::start(&capturing(settings, &one_group(&[&gpu]))).await;
    let secrets =
        "sk-abcdefghijklmnopqrst ann@example.org +49 30 1234567 4111 1111 1111 1111 canary-7";
    let answer = ask(&gateway, secrets, json!({ "stream": true })).await;
    assert_eq!(answer.status, 200);
    let line = captured(&gateway, 1).await.remove(0);
    assert_eq!(turns(&line)[0].1, "[key] [email] [phone] [card] [redacted]");
    // The upstream got the client's own words.
    let records = gpu.records();
    let raw = String::from_utf8_lossy(&records[0].raw()).into_owned();
    assert!(raw.contains("ann@example.org"), "{raw}");
}

#[tokio::test]
async fn two_processes_write_to_files_of_their_own() {
    let gpu = sim("gpu-1").await;
    let first = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    let shared = captures(&first);
    let yaml = capturing("", &one_group(&[&gpu]))
        .replace("dir: captures", &format!("dir: {}", shared.display()));
    let second = Gateway::start(&yaml).await;
    for number in 0..10 {
        for gateway in [&first, &second] {
            let answer = ask(gateway, &format!("q {number}"), json!({})).await;
            assert_eq!(answer.status, 200);
        }
    }
    captured(&first, 20).await;
    let names: Vec<String> = files(&shared)
        .iter()
        .map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert!(names.len() >= 2, "{names:?}");
    assert!(names.iter().any(|name| name.ends_with("-2")), "{names:?}");
    let of = |gateway| account(gateway, 10);
    assert_eq!(of(&first).await, expected(&[("captured", 10)]));
    assert_eq!(of(&second).await, expected(&[("captured", 10)]));
}

#[tokio::test]
async fn a_torn_line_is_set_aside_at_the_start_and_damage_elsewhere_is_left() {
    let gpu = sim("gpu-1").await;
    let old = "20200102_03.jsonl";
    let mut gateway = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    ask(&gateway, "before", json!({})).await;
    captured(&gateway, 1).await;
    gateway.signal("KILL");
    eventually("it is gone", || {
        let gone = gateway.exited().is_some();
        async move { gone }
    })
    .await;
    let dir = captures(&gateway);
    let file = files(&dir).pop().unwrap();
    let whole = fs::read(&file).unwrap();
    let damaged = [b"{\"da\xffmaged\n", &whole[..]].concat();
    fs::write(&file, [&damaged[..], b"{\"id\":\"half"].concat()).unwrap();
    fs::write(dir.join(old), "{}\n{\"x\"").unwrap();
    let yaml = capturing("", &one_group(&[&gpu]))
        .replace("dir: captures", &format!("dir: {}", dir.display()));
    let again = Gateway::start(&yaml).await;
    again
        .metric_becomes("forebay_capture_torn_total", 2.0)
        .await;
    assert_eq!(fs::read(&file).unwrap(), damaged);
    assert_eq!(fs::read(dir.join(old)).unwrap(), b"{}\n");
    let aside = |name: &Path| {
        let mut name = name.as_os_str().to_owned();
        name.push(".torn");
        fs::read_to_string(PathBuf::from(name)).unwrap()
    };
    assert_eq!(aside(&file), "{\"id\":\"half");
    assert_eq!(aside(&dir.join(old)), "{\"x\"");
    // And the file is written on.
    ask(&again, "after", json!({})).await;
    eventually("another line", || async {
        files(&dir).iter().any(|file| {
            fs::read_to_string(file).is_ok_and(|text| text.contains("after"))
                || fs::read(file).is_ok_and(|text| text.len() > damaged.len())
        })
    })
    .await;
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_harms_nobody_and_is_taken_when_it_can() {
    let gpu = sim("gpu-1").await;
    let yaml = capturing("", &one_group(&[&gpu])).replace("dir: captures", "dir: in/the/way");
    let gateway = Gateway::start_with(&yaml, &[("in", "a file")], &[]).await;
    for number in 0..5 {
        let more = json!({ "stream": number % 2 == 0 });
        assert_eq!(ask(&gateway, "lost", more).await.status, 200);
    }
    assert_eq!(account(&gateway, 5).await, expected(&[("dropped disk", 5)]));
    gateway.logged("exchanges are not captured: dir=").await;
    fs::remove_file(gateway.folder.path().join("in")).unwrap();
    gateway.logged("exchanges are captured again").await;
    assert_eq!(ask(&gateway, "kept", json!({})).await.status, 200);
    assert_eq!(
        account(&gateway, 6).await,
        expected(&[("captured", 1), ("dropped disk", 5)])
    );
    let lines = lines(&gateway.folder.path().join("in/the/way"));
    assert_eq!(turns(&lines[0])[0].1, "kept");
    // The folder is taken away under our feet.
    fs::remove_dir_all(gateway.folder.path().join("in")).unwrap();
    gateway.logged("the file is gone").await;
    assert_eq!(ask(&gateway, "new", json!({})).await.status, 200);
    account(&gateway, 7).await;
    let lines = self::lines(&gateway.folder.path().join("in/the/way"));
    assert_eq!(lines.len(), 1);
}

#[tokio::test]
async fn what_does_not_fit_is_counted_and_every_line_is_whole() {
    let gpu = sim("gpu-1").await;
    let rest = one_group(&[&gpu]);
    // No file of this process may be larger.
    let gateway = Gateway::start_limited(&capturing("", &rest), &["--fsize=20000"]).await;
    let long = "y".repeat(30_000);
    for number in 0..40 {
        let question = format!("question {number} {}", "x".repeat(700));
        assert_eq!(ask(&gateway, &question, json!({})).await.status, 200);
    }
    assert_eq!(ask(&gateway, &long, json!({})).await.status, 200);
    let all = account(&gateway, 41).await;
    let of = |what: &str| {
        all.iter()
            .find(|(name, _)| name == what)
            .map_or(0, |(_, n)| *n)
    };
    assert_eq!(of("captured") + of("dropped disk"), 41, "{all:?}");
    assert!(of("dropped disk") >= 1, "{all:?}");
    let dir = captures(&gateway);
    assert_eq!(lines(&dir).len() as u64, of("captured"));
    assert!(files(&dir).len() >= 2, "a full file is followed by another");
}

#[tokio::test]
async fn every_exchange_is_accounted_for_when_the_process_ends() {
    let gpu = sim("gpu-1").await;
    gpu.fault("gap=2").await.unwrap();
    let rest = format!("shutdown: {{ lame_duck: 0s }}\n{}", one_group(&[&gpu]));
    let mut gateway = Gateway::start(&capturing("", &rest)).await;
    let whole = (0..30).map(|number| ask_owned(gateway.addr, format!("nonce-{number}")));
    let whole: Vec<_> = whole.map(tokio::spawn).collect();
    for _ in 0..3 {
        leave_a_stream(&gateway, "left").await;
        gateway.write_config(&capturing(", length: true", &rest));
    }
    let mut connection = Connection::open(gateway.addr).await;
    let body = asking("at the end", json!({ "stream": true, "max_tokens": 50 }));
    connection.request("POST", CHAT, &[], body.as_bytes()).await;
    connection.read_until("answers:").await;
    for one in whole {
        assert_eq!(one.await.unwrap(), 200);
    }
    gateway.signal("TERM");
    let last = connection.answer().await;
    assert_eq!(last.events().last().unwrap(), "[DONE]");
    eventually("it has ended", || {
        let ended = gateway.exited().is_some();
        async move { ended }
    })
    .await;
    let lines = lines(&captures(&gateway));
    let mut asked: Vec<String> = lines.iter().map(|line| turns(line)[0].1.clone()).collect();
    asked.sort();
    let mut wanted: Vec<String> = (0..30).map(|number| format!("nonce-{number}")).collect();
    wanted.push("at the end".to_owned());
    wanted.sort();
    assert_eq!(asked, wanted);
    gateway
        .logged("captured=31 opted_out=0 skipped=3 dropped=0")
        .await;
}

async fn ask_owned(addr: std::net::SocketAddr, question: String) -> u16 {
    let body = asking(&question, json!({ "stream": true }));
    post_chat(addr, &body).await.status
}

#[tokio::test]
async fn another_folder_is_taken_by_a_reload_and_nothing_is_lost() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    ask(&gateway, "one", json!({})).await;
    captured(&gateway, 1).await;
    let other = capturing("", &one_group(&[&gpu])).replace("dir: captures", "dir: others");
    gateway.write_config(&other);
    gateway.logged("configuration reloaded: version=2").await;
    ask(&gateway, "two", json!({})).await;
    assert_eq!(account(&gateway, 2).await, expected(&[("captured", 2)]));
    gateway.logged("capture stopped: dir=").await;
    let lines = lines(&gateway.folder.path().join("others"));
    assert_eq!(turns(&lines[0])[0].1, "two");
    gateway.write_config(&one_group(&[&gpu]));
    gateway.logged("configuration reloaded: version=3").await;
    ask(&gateway, "three", json!({})).await;
    assert_eq!(self::lines(&gateway.folder.path().join("others")).len(), 1);
}

#[tokio::test]
async fn too_much_at_once_is_dropped_and_counted() {
    let gpu = sim("gpu-1").await;
    let settings = ", answer: 1KiB, queue: 64KiB";
    let gateway = Gateway::start(&capturing(settings, &one_group(&[&gpu]))).await;
    let long = ask(&gateway, "a", json!({ "stream": true, "max_tokens": 500 })).await;
    assert_eq!(long.events().last().unwrap(), "[DONE]");
    let large = "x".repeat(100_000);
    assert_eq!(ask(&gateway, &large, json!({})).await.status, 200);
    assert_eq!(
        account(&gateway, 2).await,
        expected(&[("dropped answer", 1), ("dropped queue", 1)])
    );
    let hits = "forebay_limit_hits_total{limit=\"capture_answer\"}";
    assert_eq!(gateway.metric(hits).await, Some(1.0));
    assert_eq!(
        gateway.metric("forebay_capture_buffer_bytes").await,
        Some(0.0)
    );
    assert_eq!(
        gateway.metric("forebay_capture_queue_bytes").await,
        Some(0.0)
    );
}

#[tokio::test]
async fn a_share_of_none_captures_nothing() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&capturing(", sample: 0%", &one_group(&[&gpu]))).await;
    post_chat(gateway.addr, &chat_stream("demo")).await;
    assert_eq!(
        account(&gateway, 1).await,
        expected(&[("skipped sampled", 1)])
    );
}

#[tokio::test]
async fn hours_that_are_over_are_compressed_and_exports_read_them() {
    let gpu = sim("gpu-1").await;
    let gateway = Gateway::start(&capturing("", &one_group(&[&gpu]))).await;
    ask(&gateway, "long ago", json!({})).await;
    captured(&gateway, 1).await;
    let dir = captures(&gateway);
    let old = dir.join("20200102_03.jsonl");
    fs::copy(files(&dir).pop().unwrap(), &old).unwrap();
    let touched = Command::new("touch")
        .args(["-d", "2020-01-02"])
        .arg(&old)
        .status();
    assert!(touched.unwrap().success());
    gateway.write_config(&capturing(", compress: true", &one_group(&[&gpu])));
    let packed = dir.join("20200102_03.jsonl.zst");
    eventually("it is compressed", || async {
        packed.exists() && !old.exists()
    })
    .await;
    let output = export(&["--to", "openai-jsonl", "--dedup", dir.to_str().unwrap()]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(line["messages"][0]["content"], "long ago");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("exported 1 line\n") && said.contains("1 line there already"),
        "{said}"
    );
    // And by age they go.
    gateway.write_config(&capturing(", max_age: 30d", &one_group(&[&gpu])));
    eventually("it is removed", || async { !packed.exists() }).await;
}

fn export(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_forebay"))
        .arg("export")
        .args(arguments)
        .output()
        .unwrap()
}

const LINE: &str = r#"{"id":"a","conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"<think>\nt\n</think>\n\na"}],"system":"s","tools":"","images":[],"meta":{"partial":false}}"#;

#[test]
fn an_export_leaves_out_what_does_not_belong_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("20260102_03.jsonl");
    let partial = LINE.replace("\"partial\":false", "\"partial\":true");
    let tools = LINE.replace("\"human\"", "\"observation\"");
    fs::write(
        &file,
        format!("{LINE}\n{LINE}\n{partial}\n{{\"damaged\n{tools}\n{{\"torn"),
    )
    .unwrap();
    let file = file.to_str().unwrap();
    let out = folder.path().join("out.json");
    let out = out.to_str().unwrap();

    let output = export(&["--to", "sharegpt-json", "--out", out, file]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    for part in [
        "exported 3 lines",
        "left out 2 lines damaged",
        "left out 1 line not whole",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let array: Value = serde_json::from_slice(&fs::read(out).unwrap()).unwrap();
    assert_eq!(array.as_array().unwrap().len(), 3);
    assert_eq!(array[0]["conversations"][0]["from"], "human");
    assert_eq!(array[0].get("meta"), None);

    let output = export(&[
        "--to",
        "sharegpt-plain",
        "--dedup",
        "--thoughts",
        "strip",
        file,
    ]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1);
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        line["conversations"][0],
        json!({ "from": "system", "value": "s" })
    );
    assert_eq!(line["conversations"][2]["value"], "a");

    let set = folder.path().join("set");
    let output = export(&[
        "--to",
        "llamafactory",
        "--partial",
        "-o",
        set.to_str().unwrap(),
        file,
    ]);
    assert!(output.status.success());
    let info: Value =
        serde_json::from_slice(&fs::read(set.join("dataset_info.json")).unwrap()).unwrap();
    assert_eq!(info["forebay"]["file_name"], "forebay.jsonl");
    let text = fs::read_to_string(set.join("forebay.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 4);
}

#[test]
fn an_export_that_fails_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.json");
    fs::write(&out, "before").unwrap();
    let nowhere = folder.path().join("nowhere.jsonl");
    let good = folder.path().join("good.jsonl");
    fs::write(&good, LINE).unwrap();
    let [out_, nowhere, good] = [&out, &nowhere, &good].map(|path| path.to_str().unwrap());
    for arguments in [
        &["--to", "sharegpt-json", "--out", out_, nowhere][..],
        &["--to", "llamafactory", good],
        &["--to", "sharegpt-json", "--out", "/nowhere/at/all", good],
        &["--to", "parquet", good],
        &["--to", "sharegpt-json"],
    ] {
        let output = export(arguments);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments:?}");
        assert!(!output.stderr.is_empty());
    }
    assert_eq!(fs::read_to_string(&out).unwrap(), "before");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn an_export_writes_nothing_where_it_reads() {
    let folder = tempfile::tempdir().unwrap();
    let captures = folder.path().join("captures");
    fs::create_dir(&captures).unwrap();
    let hour = captures.join("20260102_03.jsonl");
    fs::write(&hour, LINE).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&captures, &link).unwrap();
    let [captures_, hour_, link] = [&captures, &hour, &link].map(|path| path.to_str().unwrap());
    let inside = format!("{captures_}/out.jsonl");
    for arguments in [
        &["--to", "openai-jsonl", "--out", hour_, hour_][..],
        &["--to", "openai-jsonl", "--out", hour_, captures_],
        &["--to", "openai-jsonl", "--out", &inside, captures_],
        &["--to", "openai-jsonl", "--out", &inside, link],
        &["--to", "llamafactory", "--out", captures_, hour_],
        &["--to", "llamafactory", "--out", link, captures_],
    ] {
        let output = export(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("is read"), "{said}");
    }
    assert_eq!(fs::read_to_string(&hour).unwrap(), LINE);
    assert_eq!(fs::read_dir(&captures).unwrap().count(), 1);
    assert!(
        export(&["--to", "openai-jsonl", "--out", &inside, hour_])
            .status
            .success()
    );
}

#[test]
fn an_export_of_nothing_but_damage_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.jsonl");
    let silent = LINE.replace("<think>\\nt\\n</think>\\n\\na", " ");
    for (name, text, code) in [
        ("junk.jsonl", "junk\n", 1),
        ("junk.jsonl.zst", "junk\n", 1),
        ("empty.jsonl", "", 0),
        ("silent.jsonl", &silent, 0),
    ] {
        let file = folder.path().join(name);
        fs::write(&file, text).unwrap();
        let [out, file] = [&out, &file].map(|path| path.to_str().unwrap());
        let output = export(&["--to", "openai-jsonl", "--out", out, file]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{name}: {said}");
    }
}
