//! `forebay ctl`: what people do to the upstreams of a running gateway.

use std::process::Output;

use crate::support::{
    Gateway, chat, gateway::command, group_with, http::post_chat, one_group, sim,
};

async fn ctl(arguments: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = command();
    command.arg("ctl").args(arguments).envs(env.iter().copied());
    // It blocks, and the gateway under test must not wait for it.
    tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

#[tokio::test]
async fn reset_brings_one_or_all_back_at_once() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&group_with(&["cooldown: 30m"], &[&a, &b])).await;
    let config = gateway.config_file();
    let config = config.to_str().unwrap();
    for names in [&["a"][..], &[]] {
        a.fault("status=401;times=1").await.unwrap();
        b.fault("status=429;retry_after=1000;times=1")
            .await
            .unwrap();
        assert!(post_chat(gateway.addr, &chat("demo")).await.status >= 400);
        assert_eq!(gateway.state("a").await, "down key_bad");
        assert_eq!(gateway.state("b").await, "cooling rate_limit");
        let status = ctl(&["status", "-c", config], &[]).await;
        assert!(status.status.success());
        let line = |name: &str| {
            let said = said(&status);
            let line = said.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(line("a")[1..4], ["gpus", "down", "key_bad"]);
        assert_eq!(line("b")[1..4], ["gpus", "cooling", "rate_limit"]);

        let reset = [&["reset"], names, &["-c", config]].concat();
        let output = ctl(&reset, &[]).await;
        assert!(output.status.success(), "{}", said(&output));
        assert_eq!(gateway.state("a").await, "ready");
        let other = if names.is_empty() {
            "ready"
        } else {
            "cooling rate_limit"
        };
        assert_eq!(gateway.state("b").await, other);
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.status, 200);
        gateway.reset(None).await;
    }
}

#[tokio::test]
async fn reset_says_what_a_check_finds_of_one_that_could_not_be_reached() {
    let (a, b) = (sim("a").await, sim("b").await);
    let yaml = group_with(&["check: { every: 1h }"], &[&a, &b]);
    let gateway = Gateway::start(&yaml).await;
    let admin = format!("http://{}", gateway.admin);
    a.stop().await;
    for _ in 0..2 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    }
    let reset = async || said(&ctl(&["reset", "a", "--admin", &admin], &[]).await);
    let line = reset().await;
    assert!(line.contains("down") && line.contains("connect"), "{line}");
    a.start_again().await.unwrap();
    let line = reset().await;
    assert!(line.contains("ready"), "{line}");
}

#[tokio::test]
async fn drain_and_undrain_take_an_upstream_out_and_in() {
    let (a, b) = (sim("a").await, sim("b").await);
    let gateway = Gateway::start(&one_group(&[&a, &b])).await;
    let admin = format!("http://{}", gateway.admin);
    let output = ctl(&["drain", "a", "--admin", &admin], &[]).await;
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("draining"));
    for _ in 0..4 {
        assert_eq!(post_chat(gateway.addr, &chat("demo")).await.upstream(), "b");
    }
    assert_eq!(a.records().len(), 0);
    ctl(&["undrain", "a", "--admin", &admin], &[]).await;
    assert_eq!(gateway.state("a").await, "ready");
}

#[tokio::test]
async fn the_key_of_the_admin_listener_is_used_and_no_other_secret_is_needed() {
    let only = sim("only").await;
    let admin = crate::support::gateway::free_port();
    let yaml = format!(
        "admin: {{ listen: \"{admin}\", key: env:ADMIN_KEY }}\ngroups:\n  g:\n    upstreams:\n      - {{ name: only, url: \"{}\", key: env:UPSTREAM_KEY }}\nroutes:\n  - {{ model: \"*\", groups: [g] }}\n",
        only.url()
    );
    let env = [
        ("ADMIN_KEY", "canary-admin"),
        ("UPSTREAM_KEY", "canary-upstream"),
    ];
    let gateway = Gateway::start_with(&yaml, &[], &env).await;
    let config = gateway.config_file();
    let config = config.to_str().unwrap();
    let with_key = ctl(&["status", "-c", config], &[("ADMIN_KEY", "canary-admin")]).await;
    assert!(with_key.status.success(), "{}", said(&with_key));
    assert!(said(&with_key).contains("only"));
    let url = format!("http://{admin}");
    let named = ["status", "--admin", &url, "--key", "env:MINE"];
    let with_key = ctl(&named, &[("MINE", "canary-admin")]).await;
    assert!(with_key.status.success(), "{}", said(&with_key));
    for (arguments, env, wanted) in [
        (vec!["status", "-c", config], vec![], "ADMIN_KEY"),
        (
            vec!["status", "-c", config],
            vec![("ADMIN_KEY", "canary-wrong")],
            "the admin listener needs its key",
        ),
    ] {
        let output = ctl(&arguments, &env).await;
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains(wanted), "{}", said(&output));
        assert!(!said(&output).contains("canary"), "{}", said(&output));
    }
}

#[tokio::test]
async fn what_cannot_be_done_is_told_in_one_line() {
    let only = sim("only").await;
    let gateway = Gateway::start(&one_group(&[&only])).await;
    let admin = format!("http://{}", gateway.admin);
    let data = format!("http://{}", only.addr());
    let nobody = format!("http://{}", crate::support::gateway::free_port());
    for (arguments, wanted) in [
        (
            vec!["reset", "nobody", "--admin", &admin],
            "no upstream has this name",
        ),
        (
            vec!["reset", "a/b", "--admin", &admin],
            "expected the name of an upstream",
        ),
        (vec!["status", "--admin", &nobody], "cannot be reached"),
        (vec!["status", "--admin", "nonsense"], "expected a URL"),
        (vec!["status", "--admin", &data], "status 404"),
        (vec!["status", "-c", "/nowhere/x.yaml"], "cannot be read"),
    ] {
        let output = ctl(&arguments, &[]).await;
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let said = said(&output);
        assert!(said.contains(wanted), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
}
