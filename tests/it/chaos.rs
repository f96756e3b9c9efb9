//! Many faults at once: upstreams that fail in every way, by the dice, under
//! clients that ask at the same time, and some that leave. What must hold then
//! is not what this or that request gets, but what no request may ever see.
//!
//! The dice are seeded: a failure names its seed and its request.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use forebay::sim::Sim;
use futures_util::future::join_all;

use crate::support::{
    Answer, Connection, Gateway, eventually, group_of,
    http::{get, post_chat},
    sim, upstream_at,
};

/// Clients that ask at the same time.
const CLIENTS: usize = 6;
/// Requests of one seed, all clients together.
const REQUESTS: usize = 72;
/// What the gateway knows and nobody else may see.
const SECRET: &str = "canary-of-the-upstreams-7d1e";

/// What another upstream makes up for, before the first token is out.
const EARLY: &[&str] = &[
    "connect=refuse",
    "connect=reset;times=1",
    "reset",
    "status=429",
    "status=429;body=quota",
    "status=503;body=html",
    "status=529;body=empty",
    "status=500",
    "status=502;body=html",
    "status=504;body=empty",
    "status=401",
    "status=402;body=detail",
    "early=503",
    "early=503;early_then=read",
    "refuse_model;body=openai",
    "gzip",
    "te_cl;die_at=0",
    "duplicate_te;die_at=0",
    "content_length=short;die_at=0",
    "die_at=0;how=rst",
    "die_at=1",
    "error_at=0",
    "error_at=1",
    "many_headers=1000",
    "big_header=3000000",
    "huge_event=2000000;die_at=1",
];

/// What is odd, and good.
const ODD: &[&str] = &[
    "header_delay=5",
    "slow_headers=1",
    "first_token=5",
    "gap=1",
    "newline=crlf",
    "newline=cr",
    "bom",
    "comments",
    "split=3",
    "per_write=5",
    "http10",
    "close",
    "stale=now",
    "stale=next",
    "1xx=102",
    "trailers",
    "no_usage",
    "continuous_usage",
    "junk_headers=legal",
    "many_headers=100",
];

/// What strikes after the first token, if the answer is streamed.
const LATE: &[&str] = &[
    "die_at=5",
    "die_at=9;how=rst",
    "die_at=7;how=mid_chunk",
    "die_at=8;how=mid_utf8",
    "error_at=5",
    "error_at=6;error_then_done",
    "content_length=short",
];

/// What takes no text away, only the word that it was all: nobody can know.
const NO_END: &[&str] = &["no_done"];

/// Dice that fall the same way for the same seed (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(drawn).unwrap() % sides
    }

    fn choose<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.roll(from.len())]
    }
}

/// One client's view of one request.
struct Asked {
    id: String,
    question: String,
    streamed: bool,
    fault: String,
    /// Nothing if the client left.
    answer: Option<Answer>,
}

impl Asked {
    /// The text of a good answer behind the upstream's name, from an upstream
    /// that nobody harmed.
    async fn truth(&self, unharmed: &Sim) -> String {
        let answer = post_chat(unharmed.addr(), &body(&self.question, false)).await;
        let text = answer.content();
        text.strip_prefix(unharmed.name()).unwrap().to_owned()
    }

    /// Panics, with all there is to know.
    fn wrong(&self, what: &str) -> ! {
        panic!(
            "{what}: id={} streamed={} fault={}\n{:#?}",
            self.id,
            self.streamed,
            self.fault,
            self.answer
                .as_ref()
                .map(|a| (a.status, &a.headers, String::from_utf8_lossy(&a.body)))
        );
    }
}

/// What a client got.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Got {
    Whole,
    /// A stream that says by its last event that it is not whole.
    BrokenOff,
    Error,
    Left,
}

fn body(question: &str, streamed: bool) -> String {
    format!(
        r#"{{"model":"demo","stream":{streamed},"max_tokens":20,"messages":[{{"role":"user","content":"{question}"}}]}}"#
    )
}

/// Judges an answer against the truth; panics if it is anything that a client
/// must never see.
fn judge(asked: &Asked, truth: &str) -> Got {
    let Some(answer) = &asked.answer else {
        return Got::Left;
    };
    if !answer.complete {
        asked.wrong("the framing broke");
    }
    if answer.header("x-request-id") != Some(&asked.id) {
        asked.wrong("another request's id");
    }
    let shown = String::from_utf8_lossy(&answer.body);
    if shown.contains(SECRET) || format!("{:?}", answer.headers).contains(SECRET) {
        asked.wrong("a secret");
    }
    if answer.status != 200 {
        if !(400..=599).contains(&answer.status) || answer.error_code().is_empty() {
            asked.wrong("no error of ours");
        }
        return Got::Error;
    }
    let text = answer.content();
    let Some((_, said)) = text.split_once(" answers:") else {
        asked.wrong("no answer");
    };
    let said = format!(" answers:{said}");
    if !asked.streamed {
        if said != truth {
            asked.wrong("not its text");
        }
        return Got::Whole;
    }
    let events = answer.events();
    let done = events.iter().filter(|event| *event == "[DONE]").count();
    let errors = events.iter().filter(|event| is_error(event)).count();
    let last = events.last().map_or("", String::as_str);
    match (done, errors) {
        (1, 0) if last == "[DONE]" && said == truth => Got::Whole,
        (0, 1) if is_error(last) && truth.starts_with(&said) => Got::BrokenOff,
        _ => asked.wrong("neither whole nor one error"),
    }
}

fn is_error(event: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(event).is_ok_and(|event| event["error"].is_object())
}

/// How the clients of a scene behave.
struct Scene<'a> {
    /// The first so many of the upstreams suffer faults.
    harmed: usize,
    /// What those are drawn from.
    faults: &'a [&'a [&'a str]],
    /// One of so many clients leaves; none, if 0.
    leaves: usize,
    /// Further keys of the group.
    group: &'a str,
}

impl Scene<'_> {
    /// Plays it with each seed, checks what must always hold, and returns how
    /// often clients got what.
    async fn play(&self, seeds: &[u64]) -> BTreeMap<Got, usize> {
        let mut all = BTreeMap::new();
        for &seed in seeds {
            for got in self.play_one(seed).await {
                *all.entry(got).or_default() += 1;
            }
        }
        all
    }

    async fn play_one(&self, seed: u64) -> Vec<Got> {
        let sims = [sim("a").await, sim("b").await, sim("c").await];
        let upstreams: Vec<String> = sims
            .iter()
            .map(|sim| upstream_at(sim.name(), &sim.url(), "kind: vllm, key: env:CANARY"))
            .collect();
        let gateway = Gateway::start_with(
            &format!(
                "groups:\n{}routes:\n  - {{ model: \"*\", groups: [gpus] }}\n",
                group_of("gpus", self.group, &upstreams)
            ),
            &[],
            &[("CANARY", SECRET)],
        )
        .await;
        let next = AtomicUsize::new(0);
        let clients = (1..).take(CLIENTS).map(|client| {
            let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ client);
            self.client(seed, dice, &gateway, &sims[..self.harmed], &next)
        });
        let asked: Vec<Asked> = join_all(clients).await.into_iter().flatten().collect();
        for sim in &sims {
            sim.clear_faults().await;
        }
        let unharmed = sim("unharmed").await;
        let mut got = Vec::new();
        for one in &asked {
            got.push(judge(one, &one.truth(&unharmed).await));
        }
        nothing_is_left(&gateway, &asked).await;
        got
    }

    async fn client(
        &self,
        seed: u64,
        mut dice: Dice,
        gateway: &Gateway,
        harmed: &[Sim],
        next: &AtomicUsize,
    ) -> Vec<Asked> {
        let mut all = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= REQUESTS {
                return all;
            }
            let kind = self.faults[dice.roll(self.faults.len())];
            let fault = dice.choose(kind);
            let victim = &harmed[dice.roll(harmed.len())];
            // One client may undo what another did: that, too, is chaos.
            if fault.starts_with("connect=") || fault.contains("times=") {
                victim.fault(fault).await.unwrap();
            } else {
                victim.fault(&format!("{fault};times=1")).await.unwrap();
            }
            let mut asked = Asked {
                id: format!("seed-{seed}-{number}"),
                question: format!("question {seed} {number}"),
                streamed: dice.roll(2) == 0,
                fault: format!("{fault} at {}", victim.name()),
                answer: None,
            };
            let mut connection = Connection::open(gateway.addr).await;
            let headers = [("x-request-id", asked.id.as_str())];
            let body = body(&asked.question, asked.streamed);
            connection
                .request("POST", "/v1/chat/completions", &headers, body.as_bytes())
                .await;
            if self.leaves > 0 && dice.roll(self.leaves) == 0 {
                connection.reset();
            } else {
                asked.answer = Some(connection.answer().await);
            }
            all.push(asked);
        }
    }
}

/// What must hold after everything: nothing in flight, no panic, one access
/// line for each request that was answered, no secret anywhere.
async fn nothing_is_left(gateway: &Gateway, asked: &[Asked]) {
    eventually("nothing is in flight", || async {
        let metrics = get(gateway.admin, "/metrics").await;
        let mut in_flight = metrics
            .text()
            .lines()
            .filter(|line| line.contains("_in_flight") && !line.starts_with('#'));
        in_flight.all(|line| line.ends_with(" 0"))
    })
    .await;
    assert_eq!(gateway.metric("forebay_panics_total").await, Some(0.0));
    let metrics = get(gateway.admin, "/metrics").await;
    let health = get(gateway.admin, "/health").await;
    // Who left before its header was read has no line; who was answered has one.
    let lines = |id: &str| {
        let wanted = format!(" request_id={id} ");
        let log = gateway.log();
        let lines = log.lines().filter(|line| line.contains("forebay::access"));
        lines.filter(|line| line.contains(&wanted)).count()
    };
    for one in asked.iter().filter(|one| one.answer.is_some()) {
        let what = format!("an access line of {}", one.id);
        eventually(&what, || async { lines(&one.id) > 0 }).await;
    }
    for one in asked {
        assert!(lines(&one.id) <= 1, "two access lines: {}", one.id);
    }
    for (place, text) in [
        ("log", gateway.log()),
        ("metrics", metrics.text().to_owned()),
        ("health", health.text().to_owned()),
    ] {
        assert!(!text.contains(SECRET), "a secret in the {place}");
        assert!(!text.contains("question "), "a prompt in the {place}");
        assert!(!text.contains(" answers:"), "an answer in the {place}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_upstream_of_three_is_noticed_by_nobody() {
    let scene = Scene {
        harmed: 1,
        faults: &[EARLY, ODD],
        leaves: 0,
        group: "",
    };
    let got = scene.play(&[1, 2]).await;
    assert_eq!(got, BTreeMap::from([(Got::Whole, 2 * REQUESTS)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_dies_at_one_bad_upstream_of_three_is_whole_all_the_same() {
    let scene = Scene {
        harmed: 1,
        faults: &[LATE],
        leaves: 0,
        group: "",
    };
    let got = scene.play(&[5, 6]).await;
    assert_eq!(got, BTreeMap::from([(Got::Whole, 2 * REQUESTS)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_all_upstreams_do_a_client_gets_its_answer_or_one_typed_error() {
    let scene = Scene {
        harmed: 3,
        faults: &[EARLY, ODD, LATE, NO_END],
        leaves: 8,
        group: "",
    };
    let got = scene.play(&[3, 4]).await;
    // The dice must have thrown some of each, or nothing was tested.
    assert!(got[&Got::Whole] > REQUESTS / 2, "{got:?}");
    assert!(got[&Got::Left] > 0, "{got:?}");
}

#[tokio::test]
async fn an_upstream_that_flaps_costs_no_client_anything_and_is_soon_left_alone() {
    let (steady, flapping) = (sim("steady").await, sim("flapping").await);
    let upstreams: Vec<String> = [&steady, &flapping]
        .iter()
        .map(|sim| upstream_at(sim.name(), &sim.url(), "kind: vllm"))
        .collect();
    let keys = "breaker: { failures: 2, open: 1h, open_max: 1h }, check: { enabled: false }";
    let group = format!("  gpus:\n    {}\n", keys.replace("}, ", "}\n    "))
        + "    upstreams:\n"
        + &upstreams.concat();
    let routes = "routes:\n  - { model: \"*\", groups: [gpus] }\n";
    let gateway = Gateway::start(&format!("groups:\n{group}{routes}")).await;
    for round in 0..4 {
        flapping.stop().await;
        for _ in 0..4 {
            let answer = post_chat(gateway.addr, &body("a question", false)).await;
            assert_eq!(
                (answer.status, answer.upstream()),
                (200, "steady"),
                "{round}"
            );
        }
        flapping.start_again().await.unwrap();
    }
    assert_eq!(
        flapping.records().len(),
        0,
        "it was asked although it is left alone"
    );
    assert_eq!(steady.records().len(), 16);
}

#[tokio::test]
async fn a_good_check_does_not_undo_what_bad_answers_have_shown() {
    let (good, grey) = (sim("good").await, sim("grey").await);
    // Model calls fail, /health does not.
    grey.fault("status=500").await.unwrap();
    let group = format!(
        "  gpus:\n    breaker: {{ failures: 2, open: 1h, open_max: 1h }}\n    check: {{ every: 100ms }}\n    upstreams:\n{}{}",
        upstream_at("good", &good.url(), "kind: vllm"),
        upstream_at("grey", &grey.url(), "kind: vllm"),
    );
    let routes = "routes:\n  - { model: \"*\", groups: [gpus] }\n";
    let gateway = Gateway::start(&format!("groups:\n{group}{routes}")).await;
    let calls = || {
        grey.records()
            .iter()
            .filter(|r| r.method() == "POST")
            .count()
    };
    let checks = || grey.records().len() - calls();
    for _ in 0..6 {
        let answer = post_chat(gateway.addr, &body("a question", false)).await;
        assert_eq!((answer.status, answer.upstream()), (200, "good"));
    }
    assert_eq!(calls(), 2, "its breaker is open");
    let before = checks();
    eventually("many good checks", || async { checks() >= before + 5 }).await;
    for _ in 0..6 {
        let answer = post_chat(gateway.addr, &body("a question", false)).await;
        assert_eq!((answer.status, answer.upstream()), (200, "good"));
    }
    assert_eq!(calls(), 2, "a check has closed it");
}

#[tokio::test]
async fn whole_answers_that_die_with_their_upstream_are_all_given_by_another() {
    let (dying, steady) = (sim("dying").await, sim("steady").await);
    dying.fault("hang").await.unwrap();
    // A whole answer takes longer than a retry counts as one.
    steady.fault("header_delay=1100").await.unwrap();
    let upstreams = [&dying, &steady].map(|sim| upstream_at(sim.name(), &sim.url(), "kind: vllm"));
    let routes = "routes:\n  - { model: \"*\", groups: [gpus] }\n";
    let groups = format!("groups:\n{}", group_of("gpus", "", &upstreams));
    let gateway = Gateway::start(&(groups + routes)).await;

    let question = body("a question", false);
    let clients = join_all((0..16).map(|_| post_chat(gateway.addr, &question)));
    let death = async {
        eventually("half of them are there", || async {
            dying.records().len() == 8
        })
        .await;
        dying.stop().await;
    };
    let (answers, ()) = tokio::join!(clients, death);
    for answer in answers {
        assert_eq!((answer.status, answer.upstream()), (200, "steady"));
    }
}
