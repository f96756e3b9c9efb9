//! The keys file: who may come in, and what each may do.
//!
//! ```yaml
//! keys:
//!   - { name: alice, sha256: 2bd8…64 hex digits }
//!   - name: ci
//!     sha256: [ 9f86…, 60d6… ]          # two while the token is being changed
//!     models: ["qwen*"]                 # absent: all
//!     groups: [gpus]                    # absent: all
//!     pin: true                         # may choose an upstream; default false
//!     local: true                       # held to local groups; default false
//!     class: batch                      # waits behind interactive; default interactive
//!     requests: 600/min                 # own limits, in place of rate_limit's
//!     tokens: 1M/min
//!     concurrent: 20
//!     budget: { day: { tokens: 5M }, month: { money: 100 } }
//!     capture: false                    # its exchanges are never captured; default true
//!     expires: 2027-01-01               # or 2027-01-01T12:00:00Z; UTC
//! ```
//!
//! **Invariant:** tokens are never here, only their SHA-256. That is enough
//! against a stolen file, since a token is 256 random bits: there is no
//! dictionary to try, so a slow hash would only slow down every request.
//!
//! **Invariant:** no message and no `Debug` holds a hash.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, io,
    num::NonZeroU32,
    path::Path,
    sync::Arc,
    time::SystemTime,
};

use indexmap::IndexMap;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::{
    config::{
        Allowance, Budget, Count, KeyLimits, Money, Problem, Problems, Rate,
        file::read_bounded,
        marked::{Entry, Item, Marked, Node},
        problem::{Mark, Report, did_you_mean, index_path, key_path, shown},
        yaml,
    },
    context::{Class, Pattern, Principal},
};

/// The largest keys file, in bytes: some 30,000 keys.
const FILE_MAX: u64 = 4 << 20;
/// The longest name of a key, in characters.
const NAME_MAX: usize = 64;
/// The most hashes of one key.
const HASHES_MAX: usize = 4;
/// The most patterns or groups of one key.
const LIST_MAX: usize = 1000;
/// The most requests at once that a key's own limit can say.
const CONCURRENT_MAX: u64 = 1_000_000;

const FIELDS: [&str; 13] = [
    "name",
    "sha256",
    "models",
    "groups",
    "pin",
    "local",
    "class",
    "capture",
    "requests",
    "tokens",
    "concurrent",
    "budget",
    "expires",
];

/// A SHA-256.
pub(super) type Hash = [u8; 32];

/// Returns the SHA-256 of a token, or of a file.
pub(super) fn hash(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

/// The keys of one file.
///
/// Found by the first eight bytes of the token's hash, then compared in
/// constant time. How long the look-up takes may tell something of those eight
/// bytes, and that is harmless: whoever measures cannot steer the hash of what
/// is sent towards a stored one, and even a whole hash is not a token.
#[derive(Default)]
pub(super) struct Keys {
    by_start: HashMap<[u8; 8], Vec<Key>>,
    len: usize,
}

struct Key {
    hash: Hash,
    principal: Arc<Principal>,
    expires: Option<SystemTime>,
}

/// What a token turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Valid(Arc<Principal>),
    Expired,
    Unknown,
}

impl Keys {
    /// Returns whose token this is.
    pub(super) fn find(&self, token: &[u8], now: SystemTime) -> Found {
        let hash = hash(token);
        let candidates = self.by_start.get(&start(&hash)).into_iter().flatten();
        let mut found = Found::Unknown;
        for key in candidates {
            if key.hash.ct_eq(&hash).into() {
                found = match key.expires {
                    Some(end) if now >= end => Found::Expired,
                    _ => Found::Valid(Arc::clone(&key.principal)),
                };
            }
        }
        found
    }

    /// Returns every group that a key names, with the key's name; sorted, each
    /// pair once.
    pub(super) fn groups(&self) -> BTreeSet<(&str, &str)> {
        let keys = self.by_start.values().flatten();
        keys.flat_map(|key| {
            let groups = key.principal.groups.iter().flat_map(|all| all.iter());
            groups.map(|group| (&*key.principal.name, &**group))
        })
        .collect()
    }

    /// Reads a keys file's text; `file` is what it is called in messages.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub(super) fn parse(file: &str, text: &str) -> Result<Self, Problems> {
        let mut report = Report::new(file);
        let mut reader = Reader {
            report: &mut report,
            names: HashMap::new(),
            hashes: HashMap::new(),
            keys: Self::default(),
        };
        if let Some(root) = yaml::read(text, reader.report) {
            reader.file(root);
        }
        let keys = reader.keys;
        report.finish().map(|_warnings| keys)
    }

    /// Returns whether any key has limits of its own.
    pub(super) fn have_limits(&self) -> bool {
        let mut keys = self.by_start.values().flatten();
        keys.any(|key| !key.principal.limits.is_empty())
    }

    /// Returns a key for each kind of limit that keys have of their own: what is
    /// counted, the time, and the first name of those who have it.
    pub(super) fn own_rates(&self) -> BTreeMap<(&'static str, &'static str), &str> {
        let mut found = BTreeMap::new();
        for key in self.by_start.values().flatten() {
            let limits = key.principal.limits;
            let rates = [("requests", limits.requests), ("tokens", limits.tokens)];
            for (kind, rate) in rates {
                let Some(rate) = rate else {
                    continue;
                };
                let name = found
                    .entry((kind, rate.per.as_str()))
                    .or_insert(&*key.principal.name);
                *name = (*name).min(&*key.principal.name);
            }
        }
        found
    }

    /// Returns whether any key has a budget in money of its own.
    pub(super) fn have_money(&self) -> bool {
        let mut keys = self.by_start.values().flatten();
        keys.any(|key| {
            let Budget { day, month } = key.principal.budget;
            day.money.or(month.money).is_some()
        })
    }

    /// Returns whether any key has a budget of its own.
    pub(super) fn have_budgets(&self) -> bool {
        let mut keys = self.by_start.values().flatten();
        keys.any(|key| !key.principal.budget.is_empty())
    }

    fn insert(&mut self, key: Key) {
        self.len += 1;
        self.by_start.entry(start(&key.hash)).or_default().push(key);
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.len)
    }
}

fn start(hash: &Hash) -> [u8; 8] {
    let (start, _) = hash.split_first_chunk().expect("a hash has 32 bytes");
    *start
}

/// Reads a keys file's bytes, but never more than are allowed.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_bounded(path, FILE_MAX)
}

/// Reads a keys file; also returns the hash of its bytes.
///
/// # Errors
/// It cannot be read, or everything that is wrong with it.
pub(super) fn load(path: &Path) -> Result<(Keys, Hash), Problems> {
    let file = path.display().to_string();
    let of_file = |message: String| Problems::from(Problem::of_file(file.clone(), message));
    let bytes = read(path).map_err(|why| of_file(format!("the file cannot be read: {why}")))?;
    let hash = hash(&bytes);
    let text =
        String::from_utf8(bytes).map_err(|why| of_file(format!("the file is no text: {why}")))?;
    Ok((Keys::parse(&file, &text)?, hash))
}

/// Walks the file and tells everything that is wrong.
struct Reader<'a> {
    report: &'a mut Report,
    /// Where each name and hash was seen first.
    names: HashMap<String, Mark>,
    hashes: HashMap<Hash, Mark>,
    keys: Keys,
}

/// One field of a key.
struct Field<'a> {
    entry: Entry,
    path: &'a str,
}

impl Reader<'_> {
    fn file(&mut self, root: Marked) {
        let Node::Map(mut fields) = root.node else {
            self.report
                .problem(root.mark, "", "expected keys: and a list of keys");
            return;
        };
        let keys = fields.shift_remove("keys");
        for (name, entry) in &fields {
            let message = format!(
                "unknown key {}; expected keys: and nothing else",
                shown(name)
            );
            self.report
                .problem(entry.mark, &key_path("", name), message);
        }
        match keys.map(|entry| (entry.value_mark(), entry.value.node)) {
            Some((_, Node::List(items))) => items.into_iter().for_each(|item| self.key(item)),
            Some((mark, _)) => self.report.problem(mark, "keys", "expected a list of keys"),
            None => self
                .report
                .problem(root.mark, "", "expected keys: and a list of keys"),
        }
    }

    fn key(&mut self, item: Item) {
        let path = index_path("keys", item.index);
        let mark = item.value.mark;
        let Node::Map(mut fields) = item.value.node else {
            let message = "expected a key such as { name: alice, sha256: … }";
            self.report.problem(mark, &path, message);
            return;
        };
        let mut take = |name: &'static str| fields.shift_remove(name);
        let (name, sha256) = (take("name"), take("sha256"));
        let (models, groups) = (take("models"), take("groups"));
        let (pin, local, class) = (take("pin"), take("local"), take("class"));
        let (requests, tokens) = (take("requests"), take("tokens"));
        let (concurrent, budget) = (take("concurrent"), take("budget"));
        let (capture, expires) = (take("capture"), take("expires"));
        self.unknown(&fields, &path);

        let at = |name| key_path(&path, name);
        let name = self.required(name, mark, &at("name"), Self::name);
        let hashes = self.required(sha256, mark, &at("sha256"), Self::hashes);
        let models = self.optional(models, &at("models"), Self::texts);
        let groups = self.optional(groups, &at("groups"), Self::texts);
        let pin = self.optional(pin, &at("pin"), Self::flag);
        let local = self.optional(local, &at("local"), Self::flag);
        let class = self.optional(class, &at("class"), Self::class);
        let limits = KeyLimits {
            requests: self.optional(requests, &at("requests"), Self::rate),
            tokens: self.optional(tokens, &at("tokens"), Self::rate),
            concurrent: self.optional(concurrent, &at("concurrent"), Self::at_once),
        };
        let budget = self.optional(budget, &at("budget"), Self::budget);
        let capture = self.optional(capture, &at("capture"), Self::flag);
        let expires = self.optional(expires, &at("expires"), Self::expiry);

        // Whatever is missing here has been told, and nothing of the file will
        // be used.
        let (Some(name), Some(hashes)) = (name, hashes) else {
            return;
        };
        let models = models.into_iter().flatten();
        let principal = Arc::new(Principal {
            name: name.into(),
            models: models.map(Pattern::new).collect(),
            groups: groups.map(Into::into),
            pin: pin.unwrap_or(false),
            local: local.unwrap_or(false),
            class: class.unwrap_or_default(),
            limits,
            budget: budget.unwrap_or_default(),
            capture: capture.unwrap_or(true),
        });
        for hash in hashes {
            self.keys.insert(Key {
                hash,
                principal: Arc::clone(&principal),
                expires,
            });
        }
    }

    fn unknown(&mut self, fields: &IndexMap<String, Entry>, path: &str) {
        for (name, entry) in fields {
            // Not shown: somebody may have put the token where a field belongs.
            let message = format!(
                "unknown field{}; expected one of {}",
                did_you_mean(name, FIELDS),
                FIELDS.join(", ")
            );
            self.report.problem(entry.mark, path, message);
        }
    }

    fn required<T>(
        &mut self,
        entry: Option<Entry>,
        mark: Mark,
        path: &str,
        read: impl FnOnce(&mut Self, Field<'_>) -> Option<T>,
    ) -> Option<T> {
        match entry {
            Some(entry) => read(self, Field { entry, path }),
            None => {
                self.report.problem(mark, path, "is missing");
                None
            }
        }
    }

    fn optional<T>(
        &mut self,
        entry: Option<Entry>,
        path: &str,
        read: impl FnOnce(&mut Self, Field<'_>) -> Option<T>,
    ) -> Option<T> {
        read(
            self,
            Field {
                entry: entry?,
                path,
            },
        )
    }

    fn name(&mut self, field: Field<'_>) -> Option<String> {
        let mark = field.entry.value_mark();
        let name = match field.entry.value.node {
            Node::Text(text) if is_name(&text) => text,
            _ => {
                let message = format!(
                    "expected a name: 1 to {NAME_MAX} letters, digits and signs, not just -"
                );
                self.report.problem(mark, field.path, message);
                return None;
            }
        };
        if let Some(first) = self.names.get(&name) {
            let message = format!("the name {} is used in line {}", shown(&name), first.line);
            self.report.problem(mark, field.path, message);
            return None;
        }
        self.names.insert(name.clone(), mark);
        Some(name)
    }

    fn hashes(&mut self, field: Field<'_>) -> Option<Vec<Hash>> {
        let Field { entry, path } = field;
        let mark = entry.value_mark();
        let Node::List(items) = entry.value.node else {
            let value = Marked {
                mark,
                node: entry.value.node,
            };
            return self.one_hash(&value, path).map(|hash| vec![hash]);
        };
        if items.is_empty() || items.len() > HASHES_MAX {
            let message = format!("expected 1 to {HASHES_MAX} hashes, found {}", items.len());
            self.report.problem(mark, path, message);
            return None;
        }
        let hashes: Vec<_> = items
            .iter()
            .map(|item| self.one_hash(&item.value, &index_path(path, item.index)))
            .collect();
        hashes.into_iter().collect()
    }

    fn one_hash(&mut self, value: &Marked, path: &str) -> Option<Hash> {
        let parsed = match &value.node {
            Node::Text(text) => parse_hex(text),
            _ => None,
        };
        let Some(found) = parsed else {
            // What was found is not repeated: it may be the token itself.
            let message = "expected a SHA-256 in 64 hex digits, as `forebay key hash` prints it \
                           (in quotes if it has no letters)";
            self.report.problem(value.mark, path, message);
            return None;
        };
        if found == hash(b"") {
            let message = "this is the hash of nothing, not of a token";
            self.report.problem(value.mark, path, message);
            return None;
        }
        if let Some(first) = self.hashes.get(&found) {
            let message = format!("the same hash is given in line {}", first.line);
            self.report.problem(value.mark, path, message);
            return None;
        }
        self.hashes.insert(found, value.mark);
        Some(found)
    }

    /// Reads a list of texts that is not empty: an empty one could be read as
    /// "none" as well as "all".
    fn texts(&mut self, field: Field<'_>) -> Option<Vec<Box<str>>> {
        let mark = field.entry.value_mark();
        let Node::List(items) = field.entry.value.node else {
            self.report
                .problem(mark, field.path, "expected a list of names");
            return None;
        };
        if items.is_empty() || items.len() > LIST_MAX {
            let message = format!("expected 1 to {LIST_MAX} names; leave it out to allow all");
            self.report.problem(mark, field.path, message);
            return None;
        }
        let mut texts = Vec::with_capacity(items.len());
        for Item { index, value } in items {
            match value.node {
                Node::Text(text) if !text.is_empty() => texts.push(text.into()),
                _ => {
                    let path = index_path(field.path, index);
                    self.report.problem(value.mark, &path, "expected a name");
                }
            }
        }
        Some(texts)
    }

    fn flag(&mut self, field: Field<'_>) -> Option<bool> {
        if let Node::Bool(flag) = field.entry.value.node {
            return Some(flag);
        }
        let mark = field.entry.value_mark();
        self.report
            .problem(mark, field.path, "expected true or false");
        None
    }

    fn class(&mut self, field: Field<'_>) -> Option<Class> {
        let mark = field.entry.value_mark();
        if let Node::Text(text) = &field.entry.value.node
            && let Some(class) = Class::parse(text)
        {
            return Some(class);
        }
        self.report
            .problem(mark, field.path, "expected interactive or batch");
        None
    }

    fn rate(&mut self, field: Field<'_>) -> Option<Rate> {
        let mark = field.entry.value_mark();
        if let Node::Text(text) = &field.entry.value.node
            && let Ok(rate) = text.parse()
        {
            return Some(rate);
        }
        let message =
            "expected a rate such as 60/min, 200k/min, 5/s or 1000/day, of a whole number above 0";
        self.report.problem(mark, field.path, message);
        None
    }

    fn at_once(&mut self, field: Field<'_>) -> Option<NonZeroU32> {
        let mark = field.entry.value_mark();
        if let Node::Number(number) = &field.entry.value.node
            && let Some(number) = number.as_u64()
            && number <= CONCURRENT_MAX
            && let Some(number) = u32::try_from(number).ok().and_then(NonZeroU32::new)
        {
            return Some(number);
        }
        let message = format!("expected a whole number from 1 to {CONCURRENT_MAX}");
        self.report.problem(mark, field.path, message);
        None
    }

    fn budget(&mut self, field: Field<'_>) -> Option<Budget> {
        let mut periods = self.members(field, ["day", "month"])?.into_iter();
        let mut next = |this: &mut Self| {
            let (path, entry) = periods.next()?;
            this.optional(entry, &path, Self::allowance)
        };
        let (day, month) = (next(self), next(self));
        Some(Budget {
            day: day.unwrap_or_default(),
            month: month.unwrap_or_default(),
        })
    }

    fn allowance(&mut self, field: Field<'_>) -> Option<Allowance> {
        let mut amounts = self.members(field, ["tokens", "money"])?.into_iter();
        let (tokens, money) = (amounts.next()?, amounts.next()?);
        Some(Allowance {
            tokens: self.optional(tokens.1, &tokens.0, Self::count),
            money: self.optional(money.1, &money.0, Self::money),
        })
    }

    /// Takes the two members of a mapping, with their paths.
    fn members(
        &mut self,
        field: Field<'_>,
        names: [&'static str; 2],
    ) -> Option<[(String, Option<Entry>); 2]> {
        let mark = field.entry.value_mark();
        let Node::Map(mut entries) = field.entry.value.node else {
            let message = format!("expected a mapping with {}", names.join(", "));
            self.report.problem(mark, field.path, message);
            return None;
        };
        let found = names.map(|name| (key_path(field.path, name), entries.shift_remove(name)));
        for (name, entry) in &entries {
            let message = format!(
                "unknown key {}; expected one of {}",
                shown(name),
                names.join(", ")
            );
            let path = key_path(field.path, name);
            self.report.problem(entry.mark, &path, message);
        }
        Some(found)
    }

    fn count(&mut self, field: Field<'_>) -> Option<Count> {
        let mark = field.entry.value_mark();
        let count = match &field.entry.value.node {
            Node::Text(text) => text.parse().ok(),
            Node::Number(number) => number.to_string().parse().ok(),
            _ => None,
        };
        if count.is_none() {
            let message = "expected a whole number above 0 such as 200000, 200k or 1.5M";
            self.report.problem(mark, field.path, message);
        }
        count
    }

    fn money(&mut self, field: Field<'_>) -> Option<Money> {
        let mark = field.entry.value_mark();
        if let Node::Number(number) = &field.entry.value.node
            && let Some(money) = number.as_f64().and_then(Money::new)
            && money > Money::default()
        {
            return Some(money);
        }
        let message = "expected a sum of money such as 2.50, more than 0";
        self.report.problem(mark, field.path, message);
        None
    }

    fn expiry(&mut self, field: Field<'_>) -> Option<SystemTime> {
        let mark = field.entry.value_mark();
        if let Node::Text(text) = &field.entry.value.node
            && let Some(time) = parse_time(text)
        {
            return Some(time);
        }
        let message = "expected a time such as 2027-01-01T12:00:00Z or a date such as 2027-01-01, \
                       both in UTC";
        self.report.problem(mark, field.path, message);
        None
    }
}

/// Returns whether a name can stand in a log line and mean one key. `-` alone
/// means that nobody has identified himself.
fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_alphanumeric() || c.is_ascii_graphic() || c == ' ';
    (1..=NAME_MAX).contains(&text.chars().count())
        && text.chars().all(fits)
        && text.trim() == text
        && text != "-"
}

fn parse_hex(text: &str) -> Option<Hash> {
    if text.len() != 64 {
        return None;
    }
    let mut hash = Hash::default();
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).ok()?;
        // from_str_radix would take a sign for a digit.
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(hash)
}

/// Reads a time, or a date, which means its first moment.
fn parse_time(text: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(text)
        .or_else(|_| humantime::parse_rfc3339(&format!("{text}T00:00:00Z")))
        .ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::plugins::hash_token;

    fn keys(text: &str) -> Keys {
        Keys::parse("keys.yaml", text).unwrap_or_else(|why| panic!("{why}"))
    }

    fn problems(text: &str) -> Vec<String> {
        let problems = Keys::parse("keys.yaml", text).unwrap_err();
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_group_that_a_key_names_is_told_once() {
        let keys = keys(&format!(
            "keys:\n- {{ name: a, sha256: [ {}, {} ], groups: [y, x] }}\n- {{ name: b, sha256: {} }}\n",
            hash_token("a new token"),
            hash_token("an old token"),
            hash_token("another token"),
        ));
        let groups: Vec<_> = keys.groups().into_iter().collect();
        assert_eq!(groups, [("a", "x"), ("a", "y")]);
    }

    #[test]
    fn a_key_with_every_field_is_read() {
        let keys = keys(&format!(
            "keys:\n- name: alice\n  sha256: {}\n  models: [\"qwen*\", llama3]\n  groups: [gpus]\n  \
             pin: true\n  local: true\n  class: batch\n  capture: false\n  expires: \"2027-01-01T00:00:00Z\"\n",
            hash_token("token"),
        ));
        let Found::Valid(who) = keys.find(b"token", SystemTime::UNIX_EPOCH) else {
            panic!("not found");
        };
        let expected = Principal {
            name: "alice".into(),
            models: vec![Pattern::new("qwen*"), Pattern::new("llama3")],
            groups: Some(["gpus".into()].into()),
            pin: true,
            local: true,
            class: Class::Batch,
            limits: KeyLimits::default(),
            budget: Budget::default(),
            capture: false,
        };
        assert_eq!(*who, expected);
        assert_eq!(keys.find(b"Token", SystemTime::UNIX_EPOCH), Found::Unknown);
        assert_eq!(keys.find(b"", SystemTime::UNIX_EPOCH), Found::Unknown);
    }

    #[test]
    fn a_key_may_have_limits_and_a_budget_of_its_own() {
        let file = |fields: &str| {
            let hash = hash_token("token");
            format!("keys: [ {{ name: a, sha256: '{hash}', {fields} }} ]")
        };
        let good = keys(&file(
            "requests: 600/min, tokens: 1M/day, concurrent: 20, \
             budget: { day: { tokens: 5000 }, month: { money: 2.5, tokens: 5M } }",
        ));
        let Found::Valid(who) = good.find(b"token", SystemTime::now()) else {
            panic!("not found");
        };
        assert!(good.have_limits() && good.have_budgets());
        assert_eq!(who.limits.requests, "600/min".parse().ok());
        assert_eq!(who.limits.tokens, "1M/day".parse().ok());
        assert_eq!(who.limits.concurrent, NonZeroU32::new(20));
        assert_eq!(who.budget.day.tokens, "5k".parse().ok());
        assert_eq!(who.budget.day.money, None);
        assert_eq!(who.budget.month.money, Money::new(2.5));
        for (bad, path) in [
            ("requests: 0/min", "requests"),
            ("requests: 60", "requests"),
            ("tokens: -1/min", "tokens"),
            ("concurrent: 0", "concurrent"),
            ("concurrent: -1", "concurrent"),
            ("budget: 5", "budget"),
            ("budget: { week: {} }", "budget.week"),
            ("budget: { day: { tokens: 0 } }", "budget.day.tokens"),
            ("budget: { day: { tokens: 1.5 } }", "budget.day.tokens"),
            ("budget: { month: { money: 0 } }", "budget.month.money"),
            ("budget: { month: { money: -1 } }", "budget.month.money"),
        ] {
            let found = problems(&file(bad));
            assert_eq!(found.len(), 1, "{bad} {found:?}");
            let wanted = format!(": keys[0].{path}: ");
            assert!(found[0].contains(&wanted), "{bad} {found:?}");
        }
    }

    #[test]
    fn a_key_with_two_hashes_has_two_tokens() {
        let keys = keys(&format!(
            "keys: [ {{ name: a, sha256: [ {}, \"{}\" ] }} ]",
            hash_token("old"),
            hash_token("new").to_uppercase(),
        ));
        for token in ["old", "new"] {
            let found = keys.find(token.as_bytes(), SystemTime::now());
            assert!(matches!(found, Found::Valid(_)), "{token}");
        }
    }

    #[test]
    fn hashes_that_begin_alike_are_told_apart() {
        let hash = hash(b"token");
        let mut other = hash;
        other[31] ^= 1;
        let hex: String = other.iter().map(|byte| format!("{byte:02x}")).collect();
        let keys = keys(&format!(
            "keys: [ {{ name: other, sha256: '{hex}' }}, {{ name: ours, sha256: '{}' }} ]",
            hash_token("token")
        ));
        let Found::Valid(who) = keys.find(b"token", SystemTime::now()) else {
            panic!("not found");
        };
        assert_eq!(&*who.name, "ours");
    }

    #[test]
    fn a_key_ends_at_the_moment_it_says() {
        let new_year = SystemTime::UNIX_EPOCH + Duration::from_secs(1_798_761_600);
        for expires in ["2027-01-01", "\"2027-01-01T00:00:00Z\""] {
            let keys = keys(&format!(
                "keys: [ {{ name: a, sha256: '{}', expires: {expires} }} ]",
                hash_token("token")
            ));
            assert_eq!(keys.find(b"token", new_year), Found::Expired);
            let before = new_year - Duration::from_millis(1);
            assert!(matches!(keys.find(b"token", before), Found::Valid(_)));
        }
    }

    #[test]
    fn all_mistakes_are_told_at_once_with_their_lines() {
        let good = hash_token("good");
        let other = hash_token("other");
        let found = problems(&format!(
            "keys:\n\
             - {{ name: a, sha256: '{good}' }}\n\
             - {{ name: a, sha256: '{good}' }}\n\
             - name: b\n\
             \x20 sha256: sk-plain-text-token\n\
             \x20 model: [x]\n\
             \x20 pin: yes please\n\
             - {{ sha256: '{other}', models: [] , groups: [''] }}\n\
             - {{ name: '-', sha256: [] }}\n\
             - {{ name: \"c\\e\", expires: tomorrow }}\n\
             - just text\n\
             users: []\n"
        ));
        let places: Vec<_> = found
            .iter()
            .map(|one| one.split(": ").take(2).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            places,
            [
                "keys.yaml:3:11 keys[1].name",
                "keys.yaml:3:22 keys[1].sha256",
                "keys.yaml:5:11 keys[2].sha256",
                "keys.yaml:6:3 keys[2]",
                "keys.yaml:7:8 keys[2].pin",
                "keys.yaml:8:3 keys[3].name",
                "keys.yaml:8:89 keys[3].models",
                "keys.yaml:8:103 keys[3].groups[0]",
                "keys.yaml:9:11 keys[4].name",
                "keys.yaml:9:24 keys[4].sha256",
                "keys.yaml:10:3 keys[5].sha256",
                "keys.yaml:10:11 keys[5].name",
                "keys.yaml:10:27 keys[5].expires",
                "keys.yaml:11:3 keys[6]",
                "keys.yaml:12:1 users",
            ],
            "{found:#?}"
        );
        let all = found.join("\n");
        assert!(all.contains("did you mean models?"), "{all}");
        assert!(!all.contains("plain-text"), "{all}");
        assert!(!all.contains(&good), "{all}");
    }

    #[test]
    fn a_class_is_one_of_two_words() {
        let hash = hash_token("token");
        for bad in ["urgent", "Batch", "1", "[batch]"] {
            let found = problems(&format!(
                "keys: [ {{ name: a, sha256: '{hash}', class: {bad} }} ]"
            ));
            assert_eq!(found.len(), 1, "{bad} {found:?}");
            assert!(found[0].contains("keys[0].class"), "{found:?}");
        }
        let keys = keys(&format!("keys: [ {{ name: a, sha256: '{hash}' }} ]"));
        let Found::Valid(who) = keys.find(b"token", SystemTime::now()) else {
            panic!("not found");
        };
        assert_eq!(who.class, Class::Interactive);
    }

    #[test]
    fn what_is_no_hash_is_refused() {
        let plus = format!("+{}", "1".repeat(63));
        let short = "a".repeat(63);
        let umlauts = "ä".repeat(32);
        let digits = "1".repeat(64);
        for bad in [&plus, &short, &umlauts, &digits, &hash_token(""), "null"] {
            let found = problems(&format!("keys: [ {{ name: a, sha256: {bad} }} ]"));
            assert_eq!(found.len(), 1, "{bad} {found:?}");
        }
    }

    #[test]
    fn a_file_without_a_list_of_keys_is_refused() {
        for text in ["", "keys:", "keys: {}", "- alice", "keys: [", "a: b"] {
            assert!(!problems(text).is_empty(), "{text}");
        }
        assert_eq!(keys("keys: []").len, 0);
    }

    #[test]
    fn debug_shows_no_hash() {
        let hash = hash_token("token");
        let keys = keys(&format!("keys: [ {{ name: a, sha256: '{hash}' }} ]"));
        assert_eq!(format!("{keys:?}"), "Keys(1)");
    }
}
