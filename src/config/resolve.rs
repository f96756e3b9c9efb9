//! Reads what a configuration names outside itself: secrets and certificates.
//!
//! An unset `env:`, or a `credential:` that is not there, on an upstream that is `optional: true` switches that
//! upstream off with a warning; anything else that cannot be read is a problem.
//!
//! **Invariant:** no message here holds any part of a secret.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use super::{
    Config, Secret, SecretError, SecretRef, Upstream,
    check::SecretUse,
    places::Places,
    problem::{Report, index_path, key_path},
};

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) secrets: HashMap<SecretRef, Secret>,
    /// The names of the upstreams that are switched off.
    pub(super) disabled: HashSet<String>,
}

/// Reads every secret and looks at every certificate file, relative to `base`.
pub(super) fn resolve(
    config: &Config,
    uses: &[SecretUse],
    places: &Places,
    base: &Path,
    credentials_elsewhere: bool,
    report: &mut Report,
) -> Resolved {
    let owners = owners(config, places);
    let mut resolved = Resolved::default();
    for one in uses {
        if resolved.secrets.contains_key(&one.reference) {
            continue;
        }
        // The last path up to this one is the only one that can be around it.
        let before = owners.range(..=one.path.clone()).next_back();
        let owner = before.filter(|(path, _)| one.path.starts_with(path.as_str()));
        match (one.reference.read(base), owner) {
            (Ok(secret), _) => {
                resolved.secrets.insert(one.reference.clone(), secret);
            }
            (Err(SecretError::NoCredential(name, _)), _) if credentials_elsewhere => {
                let message = format!("credential {name} is not checked: only the service has it");
                report.warning(one.mark, &one.path, message);
                let stand_in = Secret::new("a-credential-of-the-service");
                resolved.secrets.insert(one.reference.clone(), stand_in);
            }
            (
                Err(why @ (SecretError::Unset(_) | SecretError::NoCredential(..))),
                Some((_, upstream)),
            ) if upstream.optional => {
                resolved.disabled.insert(upstream.name.clone());
                let message = format!(
                    "{why}: upstream {} is switched off (optional: true)",
                    upstream.name
                );
                report.warning(one.mark, &one.path, message);
            }
            (Err(why @ (SecretError::Unset(_) | SecretError::NoCredential(..))), Some(_)) => {
                let message = format!(
                    "{why}; set it, or give the upstream optional: true to start without it"
                );
                report.problem(one.mark, &one.path, message);
            }
            (Err(why), _) => report.problem(one.mark, &one.path, why.to_string()),
        }
    }
    certificates(config, places, base, report);
    warn_of_empty_groups(config, places, &resolved.disabled, report);
    resolved
}

/// Returns the upstreams by their paths in the file, closed by a dot.
fn owners<'a>(config: &'a Config, places: &Places) -> BTreeMap<String, &'a Upstream> {
    upstreams(config)
        .map(|(path, upstream)| (format!("{}.", places.get(&path).path), upstream))
        .collect()
}

/// Returns all upstreams with their paths in the typed configuration.
pub(super) fn upstreams(config: &Config) -> impl Iterator<Item = (String, &Upstream)> {
    config.groups.iter().flat_map(|(name, group)| {
        let list = key_path(&key_path("groups", name), "upstreams");
        let indexed = group.upstreams.iter().enumerate();
        indexed.map(move |(i, upstream)| (index_path(&list, i), upstream))
    })
}

fn certificates(config: &Config, places: &Places, base: &Path, report: &mut Report) {
    for (path, upstream) in upstreams(config) {
        let Some(ca) = &upstream.tls.ca else { continue };
        let file = base.join(ca);
        let found = match std::fs::read_to_string(&file) {
            Ok(pem) if pem.contains("-----BEGIN CERTIFICATE-----") => continue,
            Ok(_) => "no certificate in it".to_owned(),
            Err(why) => format!("{why}"),
        };
        let place = places.get(&format!("{path}.tls.ca"));
        let message = format!(
            "expected a PEM file with certificates, found {}: {found}",
            file.display()
        );
        report.problem(place.value, &place.path, message);
    }
}

/// Makes the paths of certificate files absolute: what is built later knows
/// nothing of the folder of the configuration.
pub(super) fn anchor(config: &mut Config, base: &Path) {
    let groups = config.groups.values_mut();
    for upstream in groups.flat_map(|group| &mut group.upstreams) {
        if let Some(ca) = &mut upstream.tls.ca {
            let file = base.join(&*ca);
            // Fails only where there is no working directory, and then a path
            // that starts from it is of no use either way.
            *ca = std::path::absolute(&file).unwrap_or(file);
        }
    }
}

fn warn_of_empty_groups(
    config: &Config,
    places: &Places,
    disabled: &HashSet<String>,
    report: &mut Report,
) {
    for (name, group) in &config.groups {
        let off = |upstream: &Upstream| disabled.contains(&upstream.name);
        if !group.upstreams.is_empty() && group.upstreams.iter().all(off) {
            let place = places.get(&key_path("groups", name));
            let message = "all upstreams of this group are switched off: it is skipped";
            report.warning(place.key, &place.path, message);
        }
    }
}
