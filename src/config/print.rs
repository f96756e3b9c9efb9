//! The effective configuration: what is written, and every default.
//!
//! **Invariant:** no secret is printed. References are, since they are none;
//! a header value that is written out might be one, so it is `***`.

use serde_yaml::{Mapping, Value};

use super::{Config, Loaded, SecretRef, Time};

/// Returns the effective configuration as YAML, with every default filled in,
/// those of each upstream's kind included.
pub fn effective(loaded: &Loaded) -> String {
    let mut config: Config = loaded.config.clone();
    for upstream in config.groups.values_mut().flat_map(|g| &mut g.upstreams) {
        let resolved = upstream.resolved_timeouts();
        upstream.timeouts.connect = Some(Time(resolved.connect));
        upstream.timeouts.first_token = Some(Time(resolved.first_token));
        upstream.timeouts.inter_token = Some(Time(resolved.inter_token));
        upstream.timeouts.write = Some(Time(resolved.write));
        upstream.timeouts.idle = Some(Time(resolved.idle));
        for value in upstream.headers.values_mut() {
            if value.parse::<SecretRef>().is_err() {
                "***".clone_into(value);
            }
        }
    }
    let tree = serde_yaml::to_value(&config).expect("a configuration is plain data");
    serde_yaml::to_string(&without_nulls(tree)).expect("a tree of YAML values is YAML")
}

/// Leaves out what is absent: a key without a value asks to be filled in.
fn without_nulls(tree: Value) -> Value {
    match tree {
        Value::Mapping(map) => Value::Mapping(
            map.into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect::<Mapping>(),
        ),
        Value::Sequence(list) => Value::Sequence(list.into_iter().map(without_nulls).collect()),
        other => other,
    }
}
