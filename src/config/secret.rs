//! Secrets: named in the YAML as `env:NAME`, `file:path` or `credential:NAME`, never
//! written there.
//!
//! **Invariant:** no `Debug`, `Display` or `Serialize` of anything here shows a
//! secret's value; only [`Secret::expose`] does.

use std::{borrow::Cow, fmt, path::Path, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::file::read_bounded;

/// The largest file that holds a secret.
const SECRET_MAX: u64 = 64 * 1024;

/// Where a secret is kept: what the YAML says.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum SecretRef {
    /// `env:NAME`, an environment variable of the process.
    Env(String),
    /// `file:path`, a file whose content, without white space around it, is the
    /// secret; a relative path is relative to the configuration file.
    File(String),
    /// `credential:NAME`, what systemd was told to load for the service
    /// (`LoadCredential=`), by the name it has there (systemd.exec(5), Credentials).
    Credential(String),
}

/// The variable in which systemd tells a service where its credentials are.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Why a secret could not be read. Never holds any part of one.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The variable does not exist, or is empty.
    #[error("environment variable {0} is not set")]
    Unset(String),
    /// systemd gave the process no such credential, or did not start it.
    #[error("credential {0} is not there: {1}")]
    NoCredential(String, &'static str),
    /// The file cannot be read.
    #[error("file {path} cannot be read: {source}")]
    File {
        /// The path as it was tried.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file holds nothing but white space, or what no HTTP header can carry.
    #[error("{0} is empty or not one line of printable characters")]
    Unusable(String),
}

impl SecretRef {
    /// Reads the secret; `base` is the folder of the configuration file.
    ///
    /// # Errors
    /// [`SecretError::Unset`] is what `optional: true` forgives; the others are
    /// mistakes in any case.
    pub fn read(&self, base: &Path) -> Result<Secret, SecretError> {
        let text = match self {
            Self::Env(name) => match variable(name) {
                Some(value) => value,
                None => return Err(SecretError::Unset(name.clone())),
            },
            Self::File(path) => self.read_file(&base.join(path))?,
            Self::Credential(name) => {
                let missing = |why| SecretError::NoCredential(name.clone(), why);
                let folder = variable(CREDENTIALS).ok_or_else(|| {
                    missing("systemd did not start this process with credentials")
                })?;
                match self.read_file(&Path::new(&folder).join(name)) {
                    Err(SecretError::File { source, .. })
                        if source.kind() == std::io::ErrorKind::NotFound =>
                    {
                        return Err(missing("the unit loads none of that name"));
                    }
                    read => read?,
                }
            }
        };
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Err(SecretError::Unusable(self.to_string()));
        }
        Ok(Secret(text.into()))
    }

    fn read_file(&self, path: &Path) -> Result<String, SecretError> {
        let bytes = read_bounded(path, SECRET_MAX).map_err(|source| SecretError::File {
            path: path.display().to_string(),
            source,
        })?;
        String::from_utf8(bytes).map_err(|_bytes| SecretError::Unusable(self.to_string()))
    }
}

/// Returns a variable of the environment that is set to more than blanks.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place that reads secrets from the environment"
)]
fn variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    (!value.trim().is_empty()).then_some(value)
}

impl FromStr for SecretRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("env", name)) if !name.is_empty() => Ok(Self::Env(name.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.to_owned())),
            Some(("credential", name)) if !name.is_empty() => Ok(Self::Credential(name.to_owned())),
            _ => Err("env:NAME, file:path or credential:NAME".to_owned()),
        }
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{path}"),
            Self::Credential(name) => write!(f, "credential:{name}"),
        }
    }
}

impl fmt::Debug for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for SecretRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The message must not repeat the text: somebody may have put the
        // secret itself there.
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse()
            .map_err(|expected: String| D::Error::custom(format!("expected {expected}")))
    }
}

impl Serialize for SecretRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for SecretRef {
    fn schema_name() -> Cow<'static, str> {
        "SecretRef".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "secret" })
    }
}

/// A secret's value.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<str>);

impl Secret {
    /// Wraps a value that was made here, such as a new client key.
    pub fn new(value: impl Into<Box<str>>) -> Self {
        Self(value.into())
    }

    /// Returns the value, for the one place that puts it on a wire.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
