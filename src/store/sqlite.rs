//! The embedded store: one SQLite file.
//!
//! - In WAL mode with `synchronous = NORMAL`: what was committed survives the
//!   end of the process in whatever way; of a machine that loses power the last
//!   commits may be lost, never the file.
//! - Only its owner can read it (0600), its folder too if it is made here.
//! - A file that is no database, or a damaged one, is moved aside with a name
//!   that says when, and a new one made: loudly.
//! - `PRAGMA user_version` counts the [`MIGRATIONS`] that it has had.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures_util::FutureExt;
use sqlx::{
    Connection, Row, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

use super::{Amount, Kind, Opened, Store, StoreError, Usage};

/// How SQLite stores are made.
pub(super) const KIND: Kind = Kind {
    scheme: "sqlite",
    locate,
    open: |target| open(target).boxed(),
};

/// How long another process may hold the file before it is an error.
const BUSY: Duration = Duration::from_secs(2);
/// The largest file that is checked when it is opened, in bytes: a second's work.
const CHECK_MAX: u64 = 64 * 1024 * 1024;

/// What makes of an empty file what is used here; each is done once.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE usage (
        key TEXT NOT NULL,
        period TEXT NOT NULL,
        requests INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        money INTEGER NOT NULL,
        PRIMARY KEY (key, period)
    ) STRICT, WITHOUT ROWID;
    PRAGMA user_version = 1;
"];

struct Sqlite {
    connection: SqliteConnection,
    file: PathBuf,
    /// Of the file that is open.
    identity: Option<(u64, u64)>,
}

/// Returns what tells a file from another one of its name.
fn identity(file: &Path) -> Option<(u64, u64)> {
    let about = fs::metadata(file).ok()?;
    Some((about.dev(), about.ino()))
}

fn locate(rest: &str, base: &Path) -> Result<String, &'static str> {
    const EXPECTED: &str = "a file such as sqlite:forebay.db or sqlite:/var/lib/forebay/forebay.db";
    let path = rest.strip_prefix("//").unwrap_or(rest);
    if path.is_empty() || path.starts_with(':') || path.contains(['\0', '?']) {
        return Err(EXPECTED);
    }
    let file = base.join(path);
    let file = std::path::absolute(&file).unwrap_or(file);
    file.into_os_string()
        .into_string()
        .map_err(|_not_utf8| EXPECTED)
}

async fn open(target: &str) -> Result<Opened, StoreError> {
    let file = Path::new(target);
    let mut is_new = prepare(file).map_err(StoreError::other)?;
    let connection = match connect(file).await {
        Err(why) if why.corrupt => {
            move_aside(file, &why).map_err(StoreError::other)?;
            is_new = prepare(file).map_err(StoreError::other)?;
            connect(file).await?
        }
        other => other?,
    };
    Ok(Opened {
        store: Box::new(Sqlite {
            connection,
            file: file.to_owned(),
            identity: identity(file),
        }),
        is_new,
    })
}

/// Makes the file, if there is none, for its owner alone; returns whether it is
/// empty.
fn prepare(file: &Path) -> io::Result<bool> {
    if let Some(folder) = file.parent()
        && !folder.exists()
    {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(folder)?;
    }
    let made = fs::OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(file)?;
    let about = made.metadata()?;
    if about.permissions().mode() & 0o077 != 0 {
        made.set_permissions(fs::Permissions::from_mode(0o600))?;
        log::warn!(
            "the store was open to others, now it is not: {}",
            file.display()
        );
    }
    Ok(about.len() == 0)
}

async fn connect(file: &Path) -> Result<SqliteConnection, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(BUSY);
    let mut connection = SqliteConnection::connect_with(&options).await?;
    if fs::metadata(file).is_ok_and(|about| about.len() <= CHECK_MAX) {
        let row = sqlx::query("PRAGMA quick_check(1)")
            .fetch_one(&mut connection)
            .await?;
        let found: String = row.try_get(0)?;
        if found != "ok" {
            return Err(StoreError {
                corrupt: true,
                cause: found.into(),
            });
        }
    }
    migrate(&mut connection).await?;
    Ok(connection)
}

async fn migrate(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    // Another process may be at it.
    let mut all = connection.begin_with("BEGIN IMMEDIATE").await?;
    let row = sqlx::query("PRAGMA user_version")
        .fetch_one(&mut *all)
        .await?;
    let version: i64 = row.try_get(0)?;
    let done = usize::try_from(version).unwrap_or(usize::MAX);
    if done > MIGRATIONS.len() {
        let message = format!(
            "it was made by a newer version of forebay: version={version} known={}",
            MIGRATIONS.len()
        );
        return Err(StoreError::other(message));
    }
    for migration in MIGRATIONS.iter().skip(done) {
        sqlx::raw_sql(*migration).execute(&mut *all).await?;
    }
    all.commit().await?;
    Ok(())
}

/// Renames a damaged file and what belongs to it.
fn move_aside(file: &Path, why: &StoreError) -> io::Result<()> {
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let stamp: String = now.chars().filter(char::is_ascii_alphanumeric).collect();
    let mut aside = file.as_os_str().to_owned();
    aside.push(format!(".corrupt-{stamp}"));
    for end in ["-wal", "-shm", ""] {
        let with = |name: &std::ffi::OsStr| {
            let mut name = name.to_owned();
            name.push(end);
            name
        };
        match fs::rename(with(file.as_os_str()), with(&aside)) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
            _ => {}
        }
    }
    log::error!(
        "the store is damaged, it was moved aside and a new one is made: file={} aside={} cause={why}",
        file.display(),
        Path::new(&aside).display()
    );
    Ok(())
}

#[async_trait]
impl Store for Sqlite {
    async fn usage(&mut self, periods: &[String]) -> Result<Vec<Usage>, StoreError> {
        let mut all = Vec::new();
        for period in periods {
            let rows =
                sqlx::query("SELECT key, requests, tokens, money FROM usage WHERE period = ?")
                    .bind(period)
                    .fetch_all(&mut self.connection)
                    .await?;
            for row in rows {
                let key: String = row.try_get(0)?;
                let number = |column: usize| -> Result<u64, StoreError> {
                    let number: i64 = row.try_get(column)?;
                    Ok(u64::try_from(number).unwrap_or(0))
                };
                all.push(Usage {
                    key: key.into(),
                    period: period.clone(),
                    amount: Amount {
                        requests: number(1)?,
                        tokens: number(2)?,
                        money: number(3)?,
                    },
                });
            }
        }
        Ok(all)
    }

    async fn add(&mut self, used: &[Usage]) -> Result<(), StoreError> {
        const ADD: &str = "INSERT INTO usage (key, period, requests, tokens, money)
            VALUES (?, ?, ?, ?, ?) ON CONFLICT (key, period) DO UPDATE SET
            requests = requests + excluded.requests,
            tokens = tokens + excluded.tokens,
            money = money + excluded.money";
        let mut all = self.connection.begin_with("BEGIN IMMEDIATE").await?;
        for one in used {
            let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
            sqlx::query(ADD)
                .bind(&*one.key)
                .bind(&one.period)
                .bind(number(one.amount.requests))
                .bind(number(one.amount.tokens))
                .bind(number(one.amount.money))
                .execute(&mut *all)
                .await?;
        }
        all.commit().await?;
        Ok(())
    }

    fn is_there(&self) -> bool {
        self.identity.is_some() && identity(&self.file) == self.identity
    }

    async fn close(self: Box<Self>) {
        // It removes files by their names: of the next one, were it still at it.
        if let Err(why) = self.connection.close().await {
            log::warn!("the store was not closed well: {why}");
        }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        // SQLITE_CORRUPT and SQLITE_NOTADB, whatever the extended code adds.
        let code = error
            .as_database_error()
            .and_then(|why| why.code()?.parse::<i32>().ok());
        Self {
            corrupt: code.is_some_and(|code| matches!(code & 0xff, 11 | 26)),
            cause: error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(key: &str, period: &str, tokens: u64) -> Usage {
        Usage {
            key: key.into(),
            period: period.to_owned(),
            amount: Amount {
                requests: 1,
                tokens,
                money: tokens * 2,
            },
        }
    }

    #[tokio::test]
    async fn what_is_added_is_there_when_it_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("deep/er/forebay.db");
        let target = file.to_str().unwrap();
        let mut opened = open(target).await.unwrap();
        assert!(opened.is_new);
        let add = [usage("a", "2026-11", 5), usage("b", "2026-11", 7)];
        opened.store.add(&add).await.unwrap();
        opened
            .store
            .add(&[usage("a", "2026-11", 10)])
            .await
            .unwrap();
        opened.store.add(&[usage("a", "2026-10", 1)]).await.unwrap();
        drop(opened);
        let mut opened = open(target).await.unwrap();
        assert!(!opened.is_new);
        let all = opened.store.usage(&["2026-11".to_owned()]).await.unwrap();
        let tokens: Vec<_> = all.iter().map(|one| (&*one.key, one.amount)).collect();
        let amount = |requests, tokens| Amount {
            requests,
            tokens,
            money: tokens * 2,
        };
        assert_eq!(tokens, [("a", amount(2, 15)), ("b", amount(1, 7))]);
        for end in ["", "-wal", "-shm"] {
            let about = fs::metadata(format!("{target}{end}")).unwrap();
            assert_eq!(about.permissions().mode() & 0o777, 0o600, "{end}");
        }
        let about = fs::metadata(file.parent().unwrap()).unwrap();
        assert_eq!(about.permissions().mode() & 0o777, 0o700);
    }

    #[tokio::test]
    async fn a_damaged_file_is_moved_aside_and_a_new_one_made() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("forebay.db");
        let target = file.to_str().unwrap();
        let aside = || {
            let all = fs::read_dir(folder.path()).unwrap();
            let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let aside = names.filter(|name| name.contains(".corrupt-") && !name.contains("-wal"));
            aside.filter(|name| !name.contains("-shm")).count()
        };
        fs::write(&file, "this was never a database, whatever its name says").unwrap();
        let mut opened = open(target).await.unwrap();
        assert!(opened.is_new);
        let many: Vec<Usage> = (0..2000)
            .map(|i| usage(&format!("key-{i}"), "2026-11", 1))
            .collect();
        opened.store.add(&many).await.unwrap();
        drop(opened);
        assert_eq!(aside(), 1);
        // A second: names of what is moved aside must differ.
        let first = fs::read_dir(folder.path()).unwrap();
        for entry in first.flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.contains(".corrupt-") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        let opened = open(target).await.unwrap();
        drop(opened);
        let mut bytes = fs::read(&file).unwrap();
        if bytes.len() > 16_384 {
            bytes[4096..16_384].fill(0xa5);
        } else {
            bytes[100..].fill(0xa5);
        }
        fs::remove_file(format!("{target}-wal")).ok();
        fs::remove_file(format!("{target}-shm")).ok();
        fs::write(&file, bytes).unwrap();
        assert!(open(target).await.unwrap().is_new);
        assert_eq!(aside(), 1);
    }

    #[tokio::test]
    async fn a_file_of_a_newer_version_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("forebay.db");
        let target = file.to_str().unwrap();
        drop(open(target).await.unwrap());
        let mut connection = connect(&file).await.unwrap();
        sqlx::raw_sql("PRAGMA user_version = 99")
            .execute(&mut connection)
            .await
            .unwrap();
        drop(connection);
        let why = open(target).await.unwrap_err();
        assert!(!why.corrupt);
        assert!(why.to_string().contains("newer version"), "{why}");
        assert_eq!(
            fs::read_dir(folder.path())
                .unwrap()
                .flatten()
                .filter(|e| e.file_name().to_string_lossy().contains("corrupt"))
                .count(),
            0
        );
    }

    #[test]
    fn a_place_is_a_file() {
        let base = Path::new("/etc/forebay");
        for (url, file) in [
            ("forebay.db", "/etc/forebay/forebay.db"),
            ("/var/lib/x.db", "/var/lib/x.db"),
            ("///var/lib/x.db", "/var/lib/x.db"),
        ] {
            assert_eq!(locate(url, base).as_deref(), Ok(file));
        }
        for wrong in ["", "//", ":memory:", "a?mode=ro", "a\0b"] {
            assert!(locate(wrong, base).is_err(), "{wrong:?}");
        }
    }
}
