//! The files of `conf/` with the plugins that there really are: adding an
//! example is adding a file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use forebay::{
    config::{effective, load, parse, schema},
    gateway::catalog,
};
use serde_json::Value;

fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Returns the examples; at least fifteen, or the suite would pass without a
/// case.
fn examples() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder("conf/examples"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .filter(|path| !path.ends_with("examples/keys.yaml"))
        .collect();
    files.sort();
    assert!(files.len() >= 15, "{}", files.len());
    files
}

#[test]
fn every_example_loads_and_says_what_it_shows() {
    for file in examples() {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("# "), "{}", file.display());
        let loaded = load(&file, &catalog()).unwrap_or_else(|problems| panic!("{problems}"));
        // Only an upstream without its key is worth a warning in an example.
        for warning in &loaded.warnings {
            let told =
                warning.message.contains("switched off") || file.ends_with("route-plugins.yaml");
            assert!(told, "{warning}");
        }
    }
}

#[test]
fn what_the_pages_about_plugins_print_loads() {
    const RIGHT: &str = "groups: {g: {upstreams: [{name: a, url: \"http://h:1/v1\"}]}}\nroutes: [{model: \"*\", groups: [g]}]\n";
    let mut found = 0;
    for file in ["docs/research.md"] {
        let text = fs::read_to_string(folder(file)).unwrap();
        let fenced = text.split("```yaml\n").skip(1);
        for yaml in fenced.filter_map(|rest| rest.split("```").next()) {
            let head = if yaml.starts_with("- ") {
                "plugins:\n- auth: none\n"
            } else {
                ""
            };
            let whole = format!("{head}{yaml}{RIGHT}");
            parse(&whole, file, &folder("conf"), &catalog())
                .unwrap_or_else(|problems| panic!("{problems}\n{whole}"));
            found += 1;
        }
    }
    assert!(found >= 2, "{found}");
}

#[test]
fn the_reference_file_names_every_key() {
    let text = fs::read_to_string(folder("conf/forebay.yaml")).unwrap();
    let mentions = |key: &str| {
        text.lines().any(|line| {
            let line = line.trim_start_matches([' ', '#', '-', '{']);
            line.strip_prefix(key)
                .is_some_and(|rest| rest.starts_with(':'))
        })
    };
    let root = schema(&catalog());
    let mut keys = 0;
    let all = root["$defs"].as_object().unwrap().values();
    for schema in all.chain([&root]) {
        let properties = schema.get("properties").and_then(Value::as_object);
        for key in properties
            .into_iter()
            .flat_map(|properties| properties.keys())
        {
            keys += 1;
            assert!(mentions(key), "{key}");
        }
    }
    assert!(keys > 50, "{keys}");
}

#[test]
fn the_effective_configuration_is_whole_and_can_be_read_again() {
    for file in examples().into_iter().chain([folder("conf/forebay.yaml")]) {
        let loaded = load(&file, &catalog()).unwrap();
        let text = effective(&loaded);
        let base = file.parent().unwrap();
        let again = parse(&text, "effective", base, &catalog())
            .unwrap_or_else(|problems| panic!("{problems}\n{text}"));
        assert_eq!(effective(&again), text);
        for key in [
            "threads:",
            "stream_timeout:",
            "first_token:",
            "include_usage:",
        ] {
            assert!(text.contains(key), "{text}");
        }
    }
}

#[test]
fn every_plugin_but_auth_may_say_what_becomes_of_a_request_when_it_fails() {
    let problems = |entry: &str| {
        let text = format!(
            "plugins: [{entry}]\ngroups: {{g: {{upstreams: [{{name: a, url: \"http://h:1/v1\"}}]}}}}\nroutes: [{{model: \"*\", groups: [g]}}]\n"
        );
        let read = parse(&text, "forebay.yaml", &folder("conf/examples"), &catalog());
        read.err()
            .map(|problems| problems.to_string())
            .unwrap_or_default()
    };
    assert_eq!(problems("cache_salt: { on_failure: open }"), "");
    assert_eq!(problems("cache_salt"), "");
    let wrong = problems("cache_salt: { on_failure: maybe }");
    assert!(wrong.contains("open, closed"), "{wrong}");
    let auth = problems("auth: { keys_file: keys.yaml, on_failure: open }");
    assert!(auth.contains("on_failure"), "{auth}");
}
