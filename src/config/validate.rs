//! The semantic pass: does the configuration make sense as a whole?
//!
//! Each function is one question. What an earlier pass told is not told again;
//! what is wrong with a single value is not asked here but in `check`.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use serde_json::Value;
use url::{Host, Url};

use super::{
    Config, Dialect, Kind, PluginEntry, Queue, Upstream, listen_address,
    places::Places,
    problem::{Report, did_you_mean, index_path, key_path, shown},
    resolve::upstreams,
};
use crate::pattern::Pattern;

/// The one plugin whose absence is a question of safety.
const AUTH: &str = "auth";

/// Tells everything that does not make sense.
pub(super) fn validate(config: &Config, places: &Places, report: &mut Report) {
    let mut pass = Pass {
        config,
        places,
        report,
    };
    pass.listeners();
    pass.proxies();
    pass.limits();
    pass.upstream_names();
    for (path, upstream) in upstreams(config) {
        pass.upstream(&path, upstream);
    }
    pass.lines();
    pass.local_groups();
    pass.routes();
    pass.route_models();
    pass.unused_groups();
    pass.plugins();
    pass.aliases();
}

struct Pass<'a> {
    config: &'a Config,
    places: &'a Places,
    report: &'a mut Report,
}

impl Pass<'_> {
    /// Tells a problem with the value at a path.
    fn problem(&mut self, path: &str, message: impl Into<String>) {
        let place = self.places.get(path);
        if !self.report.knows(&place.path) {
            self.report.problem(place.value, &place.path, message);
        }
    }

    /// Tells a problem with the key at a path.
    fn key_problem(&mut self, path: &str, message: impl Into<String>) {
        let place = self.places.get(path);
        if !self.report.knows(&place.path) {
            self.report.problem(place.key, &place.path, message);
        }
    }

    fn warning(&mut self, path: &str, message: impl Into<String>) {
        let place = self.places.get(path);
        self.report.warning(place.value, &place.path, message);
    }

    fn key_warning(&mut self, path: &str, message: impl Into<String>) {
        let place = self.places.get(path);
        self.report.warning(place.key, &place.path, message);
    }

    /// Whoever can reach a listener can use it, unless somebody asks who it is.
    fn listeners(&mut self) {
        let (config, listen, admin) = (self.config, &self.config.listen, &self.config.admin);
        let data_address = listen_address(listen);
        let admin_address = listen_address(&admin.listen);
        if data_address.is_some_and(|a| !a.ip().is_loopback()) {
            let advice = "add `- auth: { keys_file: keys.yaml }` (or `- auth: none` to let everybody in), or listen on 127.0.0.1";
            if !has_auth(&config.plugins) && !self.report.knows("plugins") {
                let message = format!(
                    "expected the auth plugin in plugins, since {listen} can be reached from other machines: {advice}"
                );
                self.problem("listen", message);
            }
            for (path, list) in route_lists(config) {
                if !has_auth(list) {
                    let message = format!(
                        "expected the auth plugin in this list too, since {listen} can be reached from other machines and this list takes the place of the general one: {advice}"
                    );
                    self.problem(&path, message);
                }
            }
            if lets_everybody_in(&config.plugins) {
                let message = format!("everybody who can reach {listen} may use every model");
                self.warning("plugins", message);
            }
        } else if has_auth(&config.plugins) && !lets_everybody_in(&config.plugins) {
            for (path, list) in route_lists(config) {
                if !has_auth(list) {
                    self.warning(&path, "this route asks for no key: its list takes the place of the general one, and has no auth");
                }
            }
        }
        if admin_address.is_some_and(|a| !a.ip().is_loopback()) && admin.key.is_none() {
            let message = format!(
                "expected env:NAME, file:path or credential:NAME, found nothing: key is required, since {} can be reached from other machines",
                admin.listen
            );
            self.problem("admin.key", message);
        }
        if let (Some(one), Some(other)) = (data_address, admin_address)
            && collide(one, other)
        {
            let message = format!("expected another address than that of listen, found {other}");
            self.problem("admin.listen", message);
        }
    }

    fn proxies(&mut self) {
        for (i, network) in self.config.trusted_proxies.iter().enumerate() {
            if network.prefix_len() == 0 {
                let message = "every client is believed when it says which address it has";
                self.warning(&index_path("trusted_proxies", i), message);
            }
        }
    }

    /// Limits that contradict each other.
    fn limits(&mut self) {
        let limits = &self.config.limits;
        if limits.uri > limits.header {
            let message = format!(
                "expected at most limits.header ({}), which it is a part of, found {}",
                limits.header, limits.uri
            );
            self.problem("limits.uri", message);
        }
        if limits.bodies < limits.body {
            let message = format!(
                "expected at least limits.body ({}), which has to fit into it, found {}",
                limits.body, limits.bodies
            );
            self.problem("limits.bodies", message);
        }
        if limits.memory_tight > limits.memory_full {
            let message = format!(
                "expected at most limits.memory_full ({}), found {}: connections go first",
                limits.memory_full, limits.memory_tight
            );
            self.problem("limits.memory_tight", message);
        }
        if limits.stream_timeout <= limits.heartbeat {
            let message = format!(
                "expected more than limits.heartbeat ({}), found {}: no stream would live to its first heartbeat",
                limits.heartbeat, limits.stream_timeout
            );
            self.problem("limits.stream_timeout", message);
        }
    }

    fn upstream_names(&mut self) {
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (path, upstream) in upstreams(self.config) {
            if upstream.name.is_empty() {
                continue;
            }
            let path = format!("{path}.name");
            let line = self.places.get(&path).value.line;
            match seen.get(upstream.name.as_str()) {
                Some(first) => {
                    let message = format!(
                        "expected a name that no other upstream has, found {}, which is in line {first} too",
                        shown(&upstream.name)
                    );
                    self.problem(&path, message);
                }
                None => {
                    seen.insert(&upstream.name, line);
                }
            }
        }
    }

    fn upstream(&mut self, path: &str, upstream: &Upstream) {
        let total = self.config.limits.total_timeout;
        let stream = self.config.limits.stream_timeout;
        let timeouts = upstream.timeouts;
        for (key, set, bound, name) in [
            ("connect", timeouts.connect, total, "total_timeout"),
            ("first_token", timeouts.first_token, total, "total_timeout"),
            (
                "inter_token",
                timeouts.inter_token,
                stream,
                "stream_timeout",
            ),
        ] {
            if let Some(set) = set.filter(|set| *set > bound) {
                let message = format!(
                    "expected at most limits.{name} ({bound}), found {set}: it would never be reached"
                );
                self.problem(&format!("{path}.timeouts.{key}"), message);
            }
        }
        for header in upstream.headers.keys() {
            if upstream.key.is_some() && header.eq_ignore_ascii_case("authorization") {
                let path = key_path(&format!("{path}.headers"), header);
                self.key_problem(&path, "expected either key or this header, found both");
            }
        }
        self.dialect(path, upstream);
        let Ok(url) = Url::parse(&upstream.url) else {
            return;
        };
        let plain = url.scheme() == "http";
        if !upstream.tls.verify {
            let message = if plain {
                "it has no effect: the URL of this upstream is http"
            } else {
                "certificates are not checked: whoever is between can read and change everything"
            };
            self.warning(&format!("{path}.tls.verify"), message);
        }
        if plain && upstream.tls.ca.is_some() {
            let message = "it has no effect: the URL of this upstream is http";
            self.warning(&format!("{path}.tls.ca"), message);
        }
        if plain && upstream.key.is_some() && is_public(&url) {
            let message = "the key of this upstream travels unencrypted: the URL is http";
            self.warning(&format!("{path}.url"), message);
        }
        let below_v1 = upstream.kind != Kind::Generic && upstream.dialect == Dialect::Openai;
        if url.path() == "/" && below_v1 {
            let message = format!("a base URL of kind {} mostly ends in /v1", upstream.kind);
            self.warning(&format!("{path}.url"), message);
        }
    }

    /// What only Ollama's own API has.
    fn dialect(&mut self, path: &str, upstream: &Upstream) {
        if upstream.dialect == Dialect::Ollama {
            if !matches!(upstream.kind, Kind::Generic | Kind::Ollama) {
                let message = format!(
                    "expected kind ollama, since the dialect is ollama, found {}",
                    upstream.kind
                );
                self.problem(&format!("{path}.kind"), message);
            }
            if upstream.r#continue == Some(true) {
                let message = "Ollama's own API cannot be asked to continue an answer";
                self.problem(&format!("{path}.continue"), message);
            }
            return;
        }
        for (key, is_set) in [
            ("num_ctx", upstream.num_ctx.is_some()),
            ("num_thread", upstream.num_thread.is_some()),
            ("keep_alive", upstream.keep_alive.is_some()),
        ] {
            if is_set {
                let message = "only Ollama's own API knows it: add dialect: ollama";
                self.key_problem(&format!("{path}.{key}"), message);
            }
        }
    }

    /// Nobody waits where upstreams take as many as come.
    fn lines(&mut self) {
        for (name, group) in &self.config.groups {
            let set = group.queue != Queue::default();
            let bounded = |upstream: &Upstream| upstream.concurrent.is_some();
            if set && !group.upstreams.is_empty() && !group.upstreams.iter().any(bounded) {
                let path = format!("{}.queue", key_path("groups", name));
                let message = "it has no effect: no upstream of this group has concurrent";
                self.key_warning(&path, message);
            }
        }
    }

    fn local_groups(&mut self) {
        for (name, group) in self.config.groups.iter().filter(|(_, group)| group.local) {
            let list = key_path(&key_path("groups", name), "upstreams");
            for (i, upstream) in group.upstreams.iter().enumerate() {
                if Url::parse(&upstream.url).is_ok_and(|url| is_public(&url)) {
                    let message = "this host does not look like one on premises, but its group says local: true";
                    self.warning(&format!("{}.url", index_path(&list, i)), message);
                }
            }
        }
    }

    fn routes(&mut self) {
        for (i, route) in self.config.routes.iter().enumerate() {
            let path = index_path("routes", i);
            let groups = format!("{path}.groups");
            if route.groups.is_empty() && route.fallback.is_none() {
                if !self
                    .report
                    .knows(&self.places.get(&format!("{path}.fallback")).path)
                {
                    self.problem(&groups, "expected at least one group, found none");
                }
                continue;
            }
            let mut seen = HashSet::new();
            for (j, name) in route.groups.iter().enumerate() {
                let path = index_path(&groups, j);
                self.group_exists(&path, name);
                if !seen.insert(name) {
                    self.problem(
                        &path,
                        format!("expected each group once, found {} twice", shown(name)),
                    );
                }
            }
            if let Some(fallback) = &route.fallback {
                let path = format!("{path}.fallback");
                self.group_exists(&path, fallback);
                if route.groups.contains(fallback) {
                    let message = format!(
                        "expected a group that is not in groups, found {}: it would be tried twice",
                        shown(fallback)
                    );
                    self.problem(&path, message);
                }
            }
            let all: Vec<&str> = route
                .groups
                .iter()
                .chain(&route.fallback)
                .map(String::as_str)
                .collect();
            for name in route.rewrite.keys() {
                if !all.contains(&name.as_str()) {
                    let message = format!(
                        "expected one of the groups of this route ({}) as the key, found {}{}",
                        all.join(", "),
                        shown(name),
                        did_you_mean(name, all.iter().copied())
                    );
                    self.key_problem(&key_path(&format!("{path}.rewrite"), name), message);
                }
            }
            self.local_route(&path, route.local, &all);
        }
    }

    /// A route that may not leave the premises needs a group that is there.
    fn local_route(&mut self, path: &str, local: bool, groups: &[&str]) {
        // What a group is, is not known if that part of the file is wrong.
        let unclear = |name: &&&str| {
            let file = key_path("groups", name);
            !self.config.groups.contains_key(**name) || self.report.knows(&key_path(&file, "local"))
        };
        if !local || groups.iter().any(|name| unclear(&name)) {
            return;
        }
        let is_local = |name: &&&str| self.config.groups.get(**name).is_some_and(|g| g.local);
        let away: Vec<&str> = groups
            .iter()
            .filter(|name| !is_local(name))
            .copied()
            .collect();
        if away.len() == groups.len() {
            let message = format!(
                "expected a group marked local: true, since this route is local, found {}",
                away.join(", ")
            );
            self.problem(&format!("{path}.local"), message);
        } else if !away.is_empty() {
            let message = format!("this route never uses {}: not local", away.join(", "));
            self.warning(&format!("{path}.local"), message);
        }
    }

    /// What settings of plugins say of the rest of the file.
    fn plugins(&mut self) {
        let config = self.config;
        let mut lists = route_lists(config);
        lists.push(("plugins".to_owned(), &config.plugins));
        for (path, list) in lists {
            for (i, entry) in list.iter().enumerate() {
                let path = key_path(&index_path(&path, i), &entry.name);
                match &*entry.name {
                    "budget" => self.prices(&key_path(&path, "prices"), &entry.config),
                    "policy" => self.answers(&key_path(&path, "parameters"), &entry.config),
                    _ => {}
                }
            }
        }
    }

    fn prices(&mut self, path: &str, budget: &Value) {
        let prices = budget.get("prices").and_then(Value::as_array);
        for (i, price) in prices.into_iter().flatten().enumerate() {
            if let Some(group) = price.get("group").and_then(Value::as_str) {
                self.group_exists(&key_path(&index_path(path, i), "group"), group);
            }
        }
    }

    /// Nobody gets more answers by a rule than he may ask for.
    fn answers(&mut self, path: &str, policy: &Value) {
        let most = self.config.limits.n;
        for section in ["defaults", "force"] {
            let parameters = policy.get("parameters").and_then(|all| all.get(section));
            let number = parameters
                .and_then(|all| all.get("n"))
                .and_then(Value::as_u64);
            if number.is_some_and(|number| number > u64::from(most)) {
                let path = key_path(&key_path(path, section), "n");
                let message = format!("expected at most limits.n, which is {most}");
                self.problem(&path, message);
            }
        }
    }

    fn group_exists(&mut self, path: &str, name: &str) {
        let groups = &self.config.groups;
        if groups.contains_key(name) || self.report.knows(&key_path("groups", name)) {
            return;
        }
        let names: Vec<&str> = groups.keys().map(String::as_str).collect();
        let message = match names.as_slice() {
            // Without any group, that is what is wrong.
            [] => return,
            names => format!(
                "expected one of the groups {}, found {}{}",
                names.join(", "),
                shown(name),
                did_you_mean(name, names.iter().copied())
            ),
        };
        self.problem(path, message);
    }

    /// The first route that matches is taken: no other can have its turn.
    fn route_models(&mut self) {
        let mut seen: HashMap<&str, usize> = HashMap::new();
        let mut wide: Vec<(&str, usize)> = Vec::new();
        for (i, route) in self.config.routes.iter().enumerate() {
            let model = route.model.as_str();
            if model.is_empty() {
                continue;
            }
            let path = format!("{}.model", index_path("routes", i));
            let line = self.places.get(&path).value.line;
            if let Some(first) = seen.get(model) {
                let message = format!(
                    "expected a model that no route above has, found {}, which is in line {first} too",
                    shown(model)
                );
                self.problem(&path, message);
                continue;
            }
            seen.insert(model, line);
            if let Some((cover, line)) = wide
                .iter()
                .find(|(wide, _)| Pattern::new(*wide).matches(model))
            {
                let message = format!(
                    "this route is never taken: {} in line {line} matches first",
                    shown(cover)
                );
                self.warning(&path, message);
            }
            if model.contains('*') {
                wide.push((model, line));
            }
        }
    }

    fn unused_groups(&mut self) {
        // With a route missing, nothing can be said.
        if self.report.knows("routes") {
            return;
        }
        let used: HashSet<&String> = self
            .config
            .routes
            .iter()
            .flat_map(|route| route.groups.iter().chain(&route.fallback))
            .collect();
        for name in self.config.groups.keys() {
            if !used.contains(name) {
                let message = "no route leads to this group";
                self.key_warning(&key_path("groups", name), message);
            }
        }
    }

    fn aliases(&mut self) {
        let aliases = &self.config.aliases;
        let mut done: HashSet<&str> = HashSet::new();
        for start in aliases.keys() {
            let mut way: Vec<&str> = Vec::new();
            let mut on_way: HashSet<&str> = HashSet::new();
            let mut at = start.as_str();
            while !done.contains(at) && on_way.insert(at) {
                way.push(at);
                match aliases.get(at) {
                    Some(next) => at = next,
                    None => break,
                }
            }
            if aliases.contains_key(at) && on_way.contains(at) && !done.contains(at) {
                let circle: Vec<&str> = way.iter().copied().skip_while(|one| *one != at).collect();
                let message = match circle.as_slice() {
                    [_] => "expected another model, found the alias itself".to_owned(),
                    circle => format!(
                        "expected a model, found aliases that lead in a circle: {} → {at}",
                        circle.join(" → ")
                    ),
                };
                self.problem(&key_path("aliases", at), message);
            }
            done.extend(way);
        }
        for (name, model) in aliases {
            let route = |pattern: &str| Pattern::new(pattern).matches(model);
            let routed = self.config.routes.iter().any(|r| route(&r.model));
            if !routed && !aliases.contains_key(model) && !self.report.knows("routes") {
                let message = format!("no route matches {}", shown(model));
                self.warning(&key_path("aliases", name), message);
            }
        }
    }
}

/// Returns the plugin lists that routes have of their own, with their paths.
fn route_lists(config: &Config) -> Vec<(String, &[PluginEntry])> {
    let routes = config.routes.iter().enumerate();
    routes
        .filter_map(|(i, route)| {
            let path = format!("{}.plugins", index_path("routes", i));
            route.plugins.as_deref().map(|list| (path, list))
        })
        .collect()
}

fn has_auth(list: &[PluginEntry]) -> bool {
    list.iter().any(|entry| entry.name == AUTH)
}

fn lets_everybody_in(list: &[PluginEntry]) -> bool {
    list.iter()
        .any(|entry| entry.name == AUTH && entry.config.as_str() == Some("none"))
}

/// Returns whether two listeners cannot both have their address. Port 0 asks
/// for any port that is free.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let everywhere = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && (everywhere || one.ip() == other.ip())
}

/// Returns whether a URL leads, by its looks, out of the premises.
fn is_public(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => {
            !(ip.is_loopback() || ip.is_private() || ip.is_link_local() || ip.is_unspecified())
        }
        Some(Host::Ipv6(ip)) => {
            let v4 = ip.to_ipv4_mapped().map(IpAddr::V4);
            let local = ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local();
            v4.is_none() && !local
        }
        Some(Host::Domain(name)) => {
            const INSIDE: [&str; 6] = [
                ".local",
                ".internal",
                ".lan",
                ".home.arpa",
                ".svc",
                ".localhost",
            ];
            name.contains('.') && !INSIDE.iter().any(|end| name.ends_with(end))
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_collide_on_one_port_but_not_on_port_zero() {
        let at = |text: &str| text.parse().unwrap();
        assert!(collide(at("127.0.0.1:1"), at("127.0.0.1:1")));
        assert!(collide(at("0.0.0.0:1"), at("127.0.0.1:1")));
        assert!(!collide(at("127.0.0.1:1"), at("127.0.0.2:1")));
        assert!(!collide(at("127.0.0.1:0"), at("127.0.0.1:0")));
    }

    #[test]
    fn a_host_is_public_by_its_looks() {
        let public = |text: &str| is_public(&Url::parse(text).unwrap());
        for url in [
            "https://api.openai.com/v1",
            "http://8.8.8.8/",
            "http://[2001:db8::1]/",
        ] {
            assert!(public(url), "{url}");
        }
        for url in [
            "http://127.0.0.1:1",
            "http://gpu-1:8000",
            "http://10.0.0.1",
            "http://[::1]:1",
            "http://a.svc/",
        ] {
            assert!(!public(url), "{url}");
        }
    }
}
