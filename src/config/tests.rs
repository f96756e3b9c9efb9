//! The configuration as a whole, driven by the files of `conf/` and
//! `tests/config/`: adding a case is adding a file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    Config, Loaded, Problems, Upstream, built_in, effective, load, parse, schema::tests::example,
};

const RIGHT: &str = "groups: {g: {upstreams: [{name: a, url: \"http://h:1/v1\"}]}}\nroutes: [{model: \"*\", groups: [g]}]\n";

fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Returns the YAML files of a folder; at least `least`, or the suite would
/// pass without a case.
fn files(path: &str, least: usize) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder(path))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .filter(|path| !path.ends_with("examples/keys.yaml"))
        .collect();
    files.sort();
    assert!(files.len() >= least, "{path}: {}", files.len());
    files
}

fn read(text: &str) -> Result<Loaded, Problems> {
    parse(text, "forebay.yaml", &folder("conf"), &example())
}

/// Returns the problems as `LINE PATH`, in order.
fn places(problems: &Problems) -> Vec<String> {
    let place = |path: &str| if path.is_empty() { "-" } else { path }.to_owned();
    let mut all: Vec<(usize, String)> = problems
        .iter()
        .map(|problem| (problem.line, place(&problem.path)))
        .collect();
    all.sort();
    all.into_iter()
        .map(|(line, path)| format!("{line} {path}"))
        .collect()
}

/// Asserts that a text has one problem, and what it says.
fn one_problem(text: &str) -> String {
    let problems = read(text).unwrap_err();
    assert_eq!(problems.0.len(), 1, "{problems}");
    problems.to_string()
}

#[test]
fn every_valid_file_loads() {
    for file in files("tests/config/valid", 8) {
        if let Err(problems) = load(&file, &example()) {
            panic!("{problems}");
        }
    }
}

#[test]
fn every_invalid_file_has_exactly_the_problems_that_are_expected() {
    let mut wrong = String::new();
    for file in files("tests/config/invalid", 25) {
        let expected = fs::read_to_string(file.with_extension("expected")).unwrap();
        let mut expected: Vec<String> = expected.lines().map(str::to_owned).collect();
        let line = |place: &String| place.split(' ').next().unwrap().parse::<usize>().unwrap();
        expected.sort_by_key(|place| (line(place), place.clone()));
        assert!(!expected.is_empty());
        let problems = load(&file, &example()).expect_err(&file.display().to_string());
        if places(&problems) != expected {
            wrong += &format!("{}\nexpected {expected:#?}\n{problems}\n", file.display());
        }
        for problem in problems.iter() {
            assert!(!problem.message.contains('\n'), "{problem}");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn fifteen_mistakes_are_fifteen_problems() {
    let file = folder("tests/config/invalid/fifteen-mistakes.yaml");
    let problems = load(&file, &example()).unwrap_err();
    assert_eq!(problems.0.len(), 15, "{problems}");
    for problem in problems.iter() {
        let place = format!(
            "{}:{}:{}: {}: ",
            file.display(),
            problem.line,
            problem.column,
            problem.path
        );
        assert!(problem.to_string().starts_with(&place), "{problem}");
    }
}

#[test]
fn what_the_readme_and_the_documents_print_loads() {
    let mut found = 0;
    for file in ["README.md", "docs/keys.md"] {
        let text = fs::read_to_string(folder(file)).unwrap();
        let fenced = text
            .split("```yaml\n")
            .skip(1)
            .filter_map(|rest| rest.split("```").next());
        // Lists of keys are the auth plugin's to read.
        for yaml in fenced.filter(|yaml| !yaml.starts_with("keys:")) {
            let whole = match yaml.contains("routes:") {
                true => yaml.to_owned(),
                false => format!("{yaml}{RIGHT}"),
            };
            read(&whole).unwrap_or_else(|problems| panic!("{file}: {problems}"));
            found += 1;
        }
    }
    assert_eq!(found, 2);
}

#[test]
fn the_reference_file_shows_the_defaults() {
    let loaded = load(&folder("conf/forebay.yaml"), &example()).unwrap();
    assert_eq!(loaded.warnings, []);
    let mut config = loaded.config;
    let defaults = Config::default();
    let gpus = config.groups.get_mut("gpus").unwrap();
    let shown = gpus.upstreams[0].clone();
    assert_eq!(
        shown.timeouts,
        super::Timeouts {
            connect: Some(super::Time(shown.kind.timeouts().connect)),
            first_token: Some(super::Time(shown.kind.timeouts().first_token)),
            inter_token: Some(super::Time(shown.kind.timeouts().inter_token)),
            write: Some(super::Time(shown.kind.timeouts().write)),
            idle: Some(super::Time(shown.kind.timeouts().idle)),
        }
    );
    let expected = Upstream {
        name: shown.name.clone(),
        url: shown.url.clone(),
        kind: shown.kind,
        timeouts: shown.timeouts,
        ..Upstream::default()
    };
    assert_eq!(shown, expected);
    gpus.upstreams.clear();
    gpus.local = false;
    assert_eq!(*gpus, super::Group::default());
    assert!(!config.routes[0].local);
    config.groups = defaults.groups.clone();
    config.routes = defaults.routes.clone();
    config.plugins = defaults.plugins.clone();
    assert_eq!(config, defaults);
}

#[test]
fn the_built_in_default_loads_and_lets_only_this_machine_in() {
    let loaded = built_in(&example()).unwrap();
    assert_eq!(loaded.warnings, []);
    let listen = super::listen_address(&loaded.config.listen).unwrap();
    assert!(listen.ip().is_loopback());
    assert_eq!(
        loaded.config.groups["ollama"].upstreams[0].url,
        "http://127.0.0.1:11434/v1"
    );
}

#[test]
fn a_message_says_what_was_expected_and_what_was_found() {
    for (line, message) in [
        (
            "limits: {body: 32}",
            "limits.body: expected a size such as 64KiB, 32MiB or 10MB, from 1KiB to 1GiB, found 32 (a unit is missing)",
        ),
        (
            "limits: {heartbeat: 15}",
            "limits.heartbeat: expected a duration such as 250ms, 30s or 10m, from 100ms to 10m, found 15 (a unit is missing)",
        ),
        (
            "limits: {attempts: \"3\"}",
            "limits.attempts: expected a whole number from 1 to 20, found \"3\" (write it without quotes)",
        ),
        (
            "limits: {atempts: 3}",
            "limits.atempts: unknown key \"atempts\" (did you mean attempts?); known here: ",
        ),
        (
            "log: {level: information}",
            "log.level: expected one of error, warn, info, debug, found \"information\"",
        ),
        (
            "log: {access: yes}",
            "log.access: expected true or false, found \"yes\" (write true)",
        ),
        (
            "listen: localhost:7070",
            "found \"localhost:7070\" (write 127.0.0.1:7070: names are not looked up)",
        ),
        ("bind: 127.0.0.1:1", "bind: this key is called listen"),
        (
            "plugins: [oauth]",
            "plugins[0]: expected one of the plugins auth, found \"oauth\" (did you mean auth?)",
        ),
        (
            "plugins: [auth: nobody]",
            "plugins[0].auth: expected none, or a mapping (key: value) with keys such as keys_file, found other text",
        ),
        (
            "plugins: [auth]",
            "plugins[0].auth.keys_file: expected text, found nothing: keys_file is required",
        ),
        (
            "admin: {key: $KEY}",
            "admin.key: expected env:NAME, file:path or credential:NAME, found a variable written with $: write env:NAME",
        ),
        (
            "threads:",
            "threads: expected a whole number from 0 to 1024, found nothing (leave the key out for its default)",
        ),
        (
            "listen: 0.0.0.0:7070",
            "listen: expected the auth plugin in plugins, since 0.0.0.0:7070 can be reached from other machines: ",
        ),
    ] {
        let told = one_problem(&format!("{line}\n{RIGHT}"));
        assert!(told.contains(message), "{told}");
        assert!(told.starts_with("forebay.yaml:1:"), "{told}");
    }
}

#[test]
fn what_is_questionable_is_a_warning() {
    for (text, path) in [
        (
            "groups: {g: {upstreams: [{name: a, url: \"https://h/v1\", tls: {verify: false}}]}}\nroutes: [{model: \"*\", groups: [g]}]",
            "groups.g.upstreams[0].tls.verify",
        ),
        (
            "groups: {g: {upstreams: [{name: a, url: \"http://h/v1\"}]}, h: {upstreams: [{name: b, url: \"http://h/v1\"}]}}\nroutes: [{model: \"*\", groups: [g]}]",
            "groups.h",
        ),
        (
            "groups: {g: {upstreams: [{name: a, url: \"http://h/v1\"}]}}\nroutes: [{model: \"*\", groups: [g]}, {model: x, groups: [g]}]",
            "routes[1].model",
        ),
        (
            "groups: {g: {upstreams: [{name: a, url: \"http://h/v1\"}]}}\nroutes: [{model: x, groups: [g]}]\naliases: {y: z}",
            "aliases.y",
        ),
        (
            "groups: {g: {local: true, upstreams: [{name: a, url: \"https://api.openai.com/v1\"}]}}\nroutes: [{model: x, groups: [g]}]",
            "groups.g.upstreams[0].url",
        ),
        (
            "groups: {g: {upstreams: [{name: a, kind: ollama, url: \"http://h:11434\"}]}}\nroutes: [{model: x, groups: [g]}]",
            "groups.g.upstreams[0].url",
        ),
        (
            "groups: {g: {upstreams: [{name: a, url: \"http://api.example.com/v1\", key: env:CARGO_PKG_NAME}]}}\nroutes: [{model: x, groups: [g]}]",
            "groups.g.upstreams[0].url",
        ),
        (
            "groups: {g: {queue: {size: 3}, upstreams: [{name: a, url: \"http://h/v1\"}]}}\nroutes: [{model: x, groups: [g]}]",
            "groups.g.queue",
        ),
        (
            "listen: 0.0.0.0:1\nplugins: [auth: none]\ngroups: {g: {upstreams: [{name: a, url: \"http://h/v1\"}]}}\nroutes: [{model: x, groups: [g]}]",
            "plugins",
        ),
    ] {
        let loaded = read(text).unwrap();
        let paths: Vec<_> = loaded.warnings.iter().map(|w| w.path.as_str()).collect();
        assert_eq!(paths, [path], "{text}");
    }
}

#[test]
fn an_optional_upstream_without_its_key_is_switched_off() {
    let file = folder("tests/config/valid/optional-cloud-without-key.yaml");
    let loaded = load(&file, &example()).unwrap();
    let mut off: Vec<_> = loaded.disabled.iter().map(String::as_str).collect();
    off.sort_unstable();
    assert_eq!(off, ["a", "b"]);
    let paths: Vec<_> = loaded.warnings.iter().map(|w| w.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "groups.cloud",
            "groups.cloud.upstreams[0].key",
            "groups.cloud.upstreams[1].headers.x-key"
        ]
    );
}

#[test]
fn secrets_are_read_and_kept_beside_the_configuration() {
    let file = folder("tests/config/valid/secrets-that-are-set.yaml");
    let loaded = load(&file, &example()).unwrap();
    let upstream = &loaded.config.groups["g"].upstreams[0];
    let secret = &loaded.secrets[upstream.key.as_ref().unwrap()];
    assert_eq!(secret.expose(), "forebay");
    assert_eq!(loaded.secrets.len(), 3);
    assert!(loaded.disabled.is_empty());
    let shown = format!("{loaded:?}");
    assert!(!shown.contains("not-a-real-key"), "{shown}");
}

#[test]
fn no_problem_repeats_a_secret() {
    let canary = "c4nary-s3cret";
    for text in [
        format!("admin: {{key: {canary}}}"),
        format!("admin: {{key: [{canary}]}}"),
        format!("admin: {{key: \"env:{canary}\"}}"),
        format!("admin: {{key: \"${{{canary}}}\"}}"),
        format!("admin: {canary}"),
        format!("groups: {{g: {{upstreams: [{{name: a, url: \"http://u:{canary}@h/v1\"}}]}}}}"),
        format!("groups: {{g: {{upstreams: [{{name: a, url: \"http://h/v1?{canary}\"}}]}}}}"),
        format!("groups: {{g: {{upstreams: [{{name: a, url: x, key: {canary}}}]}}}}"),
        format!("groups: {{g: {{upstreams: [{{name: a, url: x, api_key: {canary}}}]}}}}"),
        format!("groups: {{g: {{upstreams: [{{name: a, url: x, headers: {canary}}}]}}}}"),
        format!(
            "groups: {{g: {{upstreams: [{{name: a, url: x, headers: {{x: \"{canary}\\n\"}}}}]}}}}"
        ),
        format!("groups: {{g: {{upstreams: [{{name: a, url: x, pasword: {canary}}}]}}}}"),
    ] {
        let problems = read(&text).unwrap_err();
        assert!(
            !format!("{problems} {problems:?}").contains(canary),
            "{problems}"
        );
    }
}

#[test]
fn a_relative_file_of_authorities_is_beside_the_configuration() {
    let loaded = load(&folder("conf/examples/own-ca.yaml"), &example()).unwrap();
    let group = loaded.config.groups.values().next().unwrap();
    let ca = group.upstreams[0].tls.ca.as_deref().unwrap();
    assert_eq!(ca, folder("conf/examples/ca.pem"));
}

#[test]
fn the_effective_configuration_shows_names_of_secrets_and_no_secret() {
    let loaded = load(
        &folder("tests/config/valid/secrets-that-are-set.yaml"),
        &example(),
    )
    .unwrap();
    let text = effective(&loaded);
    for shown in [
        "key: env:CARGO_PKG_NAME",
        "x-a: env:CARGO_PKG_VERSION",
        "x-b: '***'",
    ] {
        assert!(text.contains(shown), "{text}");
    }
    for hidden in ["plain", "not-a-real-key"] {
        assert!(!text.contains(hidden), "{text}");
    }
}

#[test]
fn what_a_plugin_is_not_told_is_filled_in() {
    let loaded = read(&format!("plugins: [auth: {{keys_file: k.yaml}}]\n{RIGHT}")).unwrap();
    let entry = &loaded.config.plugins[0];
    assert_eq!(entry.name, "auth");
    assert_eq!(
        entry.config,
        serde_json::json!({ "keys_file": "k.yaml", "failures_per_minute": 10 })
    );
}

#[test]
fn the_hash_is_that_of_the_bytes() {
    let one = read(RIGHT).unwrap();
    let other = read(&format!("{RIGHT}# a comment\n")).unwrap();
    assert_eq!(one.config, other.config);
    assert_eq!(one.hash.len(), 64);
    assert_ne!(one.hash, other.hash);
}

#[test]
fn a_file_that_is_missing_too_large_or_no_text_is_a_problem() {
    let missing = load(&folder("conf/no-such.yaml"), &example()).unwrap_err();
    assert!(missing.to_string().contains("cannot be read"), "{missing}");
    let dir = std::env::temp_dir().join(format!("forebay-config-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let large = dir.join("large.yaml");
    fs::write(&large, format!("{RIGHT}#{}", "x".repeat(4 << 20))).unwrap();
    let binary = dir.join("binary.yaml");
    fs::write(&binary, b"# one\n# two \xff\n").unwrap();
    let problems = [large, binary].map(|file| load(&file, &example()).unwrap_err().to_string());
    fs::remove_dir_all(&dir).unwrap();
    assert!(problems[0].contains("at most 4 MiB"), "{}", problems[0]);
    assert!(problems[1].contains("line 2"), "{}", problems[1]);
}

#[test]
fn no_mutation_of_the_reference_file_breaks_the_reader() {
    let text = fs::read_to_string(folder("conf/forebay.yaml")).unwrap();
    let letters: Vec<char> = text.chars().collect();
    let odd: Vec<char> = "{}[]:,\"'&*!|>%@`#-?\t\n 0~<é\0\r".chars().collect();
    // xorshift64: the same cases each time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % u64::try_from(below).unwrap()).unwrap()
    };
    let mut wrong = 0;
    for _ in 0..400 {
        let mut mutant = letters.clone();
        for _ in 0..=next(4) {
            let at = next(mutant.len());
            match next(4) {
                0 => mutant[at] = odd[next(odd.len())],
                1 => mutant.insert(at, odd[next(odd.len())]),
                2 => {
                    let end = (at + next(40)).min(mutant.len());
                    mutant.drain(at..end);
                }
                _ => {
                    let end = (at + next(40)).min(mutant.len());
                    let piece: Vec<char> = mutant[at..end].to_vec();
                    let to = next(mutant.len());
                    mutant.splice(to..to, piece);
                }
            }
        }
        let mutant: String = mutant.into_iter().collect();
        if let Err(problems) = read(&mutant) {
            wrong += 1;
            assert!(!problems.0.is_empty());
            // What the schema lets pass, the types must take.
            assert!(
                !problems.to_string().contains("this cannot be read"),
                "{problems}\n{mutant}"
            );
        }
    }
    assert!(wrong > 50, "{wrong}");
}
