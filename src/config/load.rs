//! A file → a [`Loaded`] configuration, or everything that is wrong with it.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{
    Admin, Catalog, Config, Problem, Problems, Secret, SecretRef, Upstream, check, file, marked,
    places::Places,
    problem::{Mark, Report},
    resolve, schema, validate, yaml,
};

/// The largest file, 4 MiB; a configuration with a thousand upstreams has less
/// than one.
const BYTES_MAX: usize = 4 << 20;

/// What Forebay runs with when no file is given: every model goes to the Ollama
/// of this machine, and only this machine may ask.
pub const BUILT_IN: &str = "\
listen: 127.0.0.1:7070
plugins:
  - auth: none
groups:
  ollama:
    local: true
    upstreams:
      - { name: ollama, kind: ollama, url: \"http://127.0.0.1:11434/v1\" }
routes:
  - { model: \"*\", groups: [ollama] }
";

/// A configuration that was read, checked, and found right.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What the file says, and the defaults where it says nothing.
    pub config: Config,
    /// The file as it was named.
    pub file: PathBuf,
    /// The folder that relative paths in it start from.
    pub base: PathBuf,
    /// Every secret that the file names.
    pub secrets: HashMap<SecretRef, Secret>,
    /// The names of the upstreams that are switched off: `optional: true`, and
    /// a variable that is not set.
    pub disabled: HashSet<String>,
    /// What is questionable, in the order of the lines.
    pub warnings: Vec<Problem>,
    /// The SHA-256 of the file, as 64 hexadecimal digits.
    pub hash: String,
    places: Places,
}

impl Loaded {
    /// Returns whether the file still holds the same bytes, and the files of its
    /// secrets the same secrets.
    pub fn is_current(&self) -> bool {
        text_of(&self.file).is_ok_and(|text| hex(&Sha256::digest(text.as_bytes())) == self.hash)
            && self.secrets.iter().all(|(reference, secret)| {
                !matches!(reference, SecretRef::File(_))
                    || reference.read(&self.base).is_ok_and(|now| now == *secret)
            })
    }

    /// Returns the files of its secrets.
    pub fn secret_files(&self) -> impl Iterator<Item = PathBuf> {
        self.secrets.keys().filter_map(|reference| match reference {
            SecretRef::File(path) => Some(self.base.join(path)),
            _ => None,
        })
    }

    /// Makes a problem with what stands at a path of the configuration, for
    /// what only shows when it is built.
    pub fn problem(&self, path: &str, message: impl Into<String>) -> Problem {
        let place = self.places.get(path);
        Problem {
            file: self.file.display().to_string(),
            line: place.value.line,
            column: place.value.column,
            path: place.path,
            message: message.into(),
        }
    }
}

/// Reads a file. Its secrets are read too.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(path: &Path, catalog: &Catalog) -> Result<Loaded, Problems> {
    let label = path.display().to_string();
    let text = text_of(path).map_err(|message| Problem::of_file(&label, message))?;
    let base = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    parse(&text, &label, base, catalog)
}

/// Reads a text as if it were a file called `file` in the folder `base`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse(text: &str, file: &str, base: &Path, catalog: &Catalog) -> Result<Loaded, Problems> {
    let mut report = Report::new(file);
    let hash = hex(&Sha256::digest(text.as_bytes()));
    // Editors on Windows begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut loaded = None;
    if let Some(tree) = yaml::read(text, &mut report) {
        loaded = typed(tree, base, catalog, &mut report);
    }
    let warnings = report.finish()?;
    let (config, resolved, places) = loaded.expect("a clean report comes with a configuration");
    Ok(Loaded {
        config,
        file: PathBuf::from(file),
        base: base.to_owned(),
        secrets: resolved.secrets,
        disabled: resolved.disabled,
        warnings,
        hash,
        places,
    })
}

/// Returns the built-in default, [`BUILT_IN`].
///
/// # Errors
/// None, unless the catalogue lacks `auth` or `round_robin`.
pub fn built_in(catalog: &Catalog) -> Result<Loaded, Problems> {
    parse(BUILT_IN, "(built-in default)", Path::new("."), catalog)
}

/// Takes a tree through the passes that come after the first.
fn typed(
    tree: marked::Marked,
    base: &Path,
    catalog: &Catalog,
    report: &mut Report,
) -> Option<(Config, resolve::Resolved, Places)> {
    let checked = check::check(tree, &schema::inner(catalog), report);
    let places = Places::of(&checked.tree);
    let root = checked.tree.mark;
    let mut config: Config = match serde_yaml::from_value(checked.tree.into_value()) {
        Ok(config) => config,
        Err(why) => {
            // The schema is made from the types, so this is what it cannot say.
            if report.is_clean() {
                let root = Mark { ..root };
                report.problem(root, "", format!("this cannot be read: {why}"));
            }
            return None;
        }
    };
    validate::validate(&config, &places, report);
    let resolved = resolve::resolve(
        &config,
        &checked.secrets,
        &places,
        base,
        catalog.credentials_elsewhere,
        report,
    );
    resolve::anchor(&mut config, base);
    let groups = config.groups.values_mut();
    groups
        .flat_map(|group| &mut group.upstreams)
        .for_each(Upstream::fill_in);
    Some((config, resolved, places))
}

/// Reads a file as text; the error is a message.
fn text_of(path: &Path) -> Result<String, String> {
    let file = File::open(path).map_err(|why| format!("cannot be read: {why}"))?;
    let mut bytes = Vec::new();
    let limit = u64::try_from(BYTES_MAX).unwrap_or(u64::MAX);
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|why| format!("cannot be read: {why}"))?;
    if bytes.len() > BYTES_MAX {
        return Err(format!(
            "expected at most {} MiB, found more",
            BYTES_MAX >> 20
        ));
    }
    String::from_utf8(bytes).map_err(|why| {
        let valid = why.as_bytes().iter().take(why.utf8_error().valid_up_to());
        let line = 1 + valid.filter(|byte| **byte == b'\n').count();
        format!("expected UTF-8, found other bytes in line {line}")
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("a String takes any text");
        hex
    })
}

/// Reads of a configuration only where its admin listener is, whatever else may
/// be wrong with it: for whoever wants to talk to the gateway that runs with it.
///
/// # Errors
/// What is wrong, in one line.
pub fn admin_of(path: &Path) -> Result<Admin, String> {
    let name = path.display();
    let most = u64::try_from(BYTES_MAX).unwrap_or(u64::MAX);
    let text =
        file::read_bounded(path, most).map_err(|why| format!("{name}: cannot be read: {why}"))?;
    // The reason may repeat what stands there.
    let unreadable = |what: &str| format!("{name}: {what}: forebay check -c {name} tells more");
    let mut tree: serde_yaml::Value =
        serde_yaml::from_slice(&text).map_err(|_why| unreadable("this is no YAML"))?;
    tree.apply_merge()
        .map_err(|_why| unreadable("this is no YAML"))?;
    match tree.get("admin") {
        Some(admin) => serde_yaml::from_value(admin.clone())
            .map_err(|_why| unreadable("admin is not as expected")),
        None => Ok(Admin::default()),
    }
}
