//! The floors of the design: imports go down only.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The modules of each floor, the lowest first.
const FLOORS: [&[&str]; 6] = [
    &[
        "error",
        "metrics",
        "config",
        "openai",
        "sharegpt",
        "client_ip",
        "pattern",
        "logging",
        "memory",
        "open_files",
        "service_manager",
    ],
    &[
        "context",
        "events",
        "lifecycle",
        "outbound",
        "resources",
        "store",
        "worker",
    ],
    &["plugins", "upstreams", "dialects"],
    &["gateway", "routes", "status"],
    &["proxy", "admin", "reload", "sim"],
    &["main", "cli", "ctl", "server", "demo", "export", "lib"],
];
/// The floors whose modules do not know each other.
const STRANGERS: [usize; 2] = [2, 4];

fn floor(module: &str) -> usize {
    FLOORS
        .iter()
        .position(|floor| floor.contains(&module))
        .unwrap_or_else(|| panic!("the module {module} has no floor"))
}

fn files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, into);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            into.push(path);
        }
    }
}

/// The modules at the root of the crate that a source names after `crate::`:
/// in `use`, in braces, in paths.
fn imported(source: &str) -> Vec<String> {
    let code: String = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut modules = Vec::new();
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(list) => modules.extend(heads(list)),
            None => modules.push(name(after)),
        }
    }
    // What a macro calls `$crate::…` and items at the root are no modules.
    modules.retain(|module| !module.is_empty());
    modules
}

/// The first names of the elements of a `use` list, up to its closing brace.
fn heads(list: &str) -> Vec<String> {
    let (mut heads, mut element, mut depth) = (Vec::new(), String::new(), 0);
    for c in list.chars() {
        match c {
            ',' | '}' if depth == 0 => {
                heads.push(name(&element));
                element.clear();
                if c == '}' {
                    break;
                }
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        element.push(c);
    }
    heads
}

fn name(text: &str) -> String {
    let text = text.trim_start();
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

/// The module at the root of the crate that a file belongs to.
fn module_of(path: &Path) -> String {
    let first = path.components().next().unwrap();
    Path::new(&first)
        .file_stem()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

#[test]
fn imports_go_down_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&root, &mut all);
    assert!(all.len() > 40, "only {} files", all.len());
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in &all {
        let path = file.strip_prefix(&root).unwrap();
        let from = module_of(path);
        for to in imported(&fs::read_to_string(file).unwrap()) {
            seen += 1;
            let (here, there) = (floor(&from), floor(&to));
            let stranger = here == there && STRANGERS.contains(&here) && from != to;
            if there > here || stranger {
                wrong.push(format!("{}: crate::{to}", path.display()));
            }
        }
    }
    assert!(seen > 100, "only {seen} imports");
    assert!(
        wrong.is_empty(),
        "these imports go up or sideways: {wrong:#?}"
    );
}

#[test]
fn every_spelling_of_an_import_is_found() {
    let source = "
        //! crate::demo is only told about
        use crate::config::Config;
        use crate::{
            config::{self, Log},
            gateway::Gateway, routes,
        };
        pub(in crate::logging) fn f() -> crate::error::Error { crate::proxy::x() }
    ";
    let found = imported(source);
    let wanted = [
        "config", "config", "gateway", "routes", "logging", "error", "proxy",
    ];
    assert_eq!(found, wanted);
}
