//! From a model's name to the groups that serve it, in order.
//!
//! Start at [`Routes::plan`]. An alias is replaced first, once; then **the first
//! route in the file whose pattern fits is taken**, and no other. An exact name
//! gets no precedence over a pattern: the order of the file is the one rule, so
//! the special goes above the general.
//!
//! **Invariant:** a restriction only takes steps out of a plan, never puts one
//! in; what is left is what failover may use. Restricted to `local`, no step of
//! another group is ever in a plan.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use http::StatusCode;

use crate::{
    config::Config,
    context::{Pattern, Restrict},
    error::Error,
    upstreams::{BuildError, Group, Upstream},
};

/// All routes of one configuration.
#[derive(Debug)]
pub struct Routes {
    routes: Vec<Route>,
    aliases: HashMap<Box<str>, Arc<str>>,
    groups: Vec<Arc<Group>>,
    models: Vec<Model>,
}

#[derive(Debug)]
struct Route {
    pattern: Pattern,
    label: Arc<str>,
    local: bool,
    steps: Vec<RouteStep>,
    /// The names of the groups of `steps`.
    names: Arc<[Box<str>]>,
}

#[derive(Debug)]
struct RouteStep {
    group: Arc<Group>,
    /// What the model is called there; `None` means by its own name.
    rewrite: Option<Arc<str>>,
    fallback: bool,
}

impl RouteStep {
    fn model<'a>(&'a self, model: &'a str) -> &'a str {
        self.rewrite.as_deref().unwrap_or(model)
    }

    fn serves(&self, model: &str) -> bool {
        self.group.serves(self.model(model))
    }
}

/// Where one exchange may go.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The index of the route in the file.
    pub index: usize,
    /// The route's pattern: a label of bounded cardinality.
    pub route: Arc<str>,
    /// The model, its alias replaced.
    pub model: Arc<str>,
    /// The groups in the order in which they are tried; never empty.
    pub steps: Vec<Step>,
    /// The one upstream to try; then there is one step, the upstream's group.
    pub pin: Option<Arc<Upstream>>,
}

/// One group of a plan.
#[derive(Clone, Debug)]
pub struct Step {
    /// The group.
    pub group: Arc<Group>,
    /// What the model is called there.
    pub model: Arc<str>,
    /// Whether it is the route's fallback, which is tried last.
    pub fallback: bool,
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanError {
    /// No route fits, or no upstream of the route serves the model.
    UnknownModel,
    /// The exchange is restricted to local groups, and none serves the model.
    NoLocalGroup,
    /// The key may not reach any group that serves the model.
    NoAllowedGroup,
    /// The pinned upstream is none of those that the exchange may use for the
    /// model, or does not exist: the caller is not told which.
    UnknownUpstream,
}

impl PlanError {
    /// Returns the answer to the client, who asked for `model`.
    pub fn into_error(self, model: &str) -> Error {
        match self {
            Self::UnknownModel => Error::refused(
                StatusCode::NOT_FOUND,
                "model_not_found",
                format!("the model `{model}` does not exist"),
            )
            .param("model"),
            Self::NoLocalGroup => Error::refused(
                StatusCode::FORBIDDEN,
                "no_local_upstream",
                format!("the model `{model}` is not served on premises, and this request may not leave them"),
            )
            .param("model"),
            Self::NoAllowedGroup => Error::refused(
                StatusCode::FORBIDDEN,
                "model_not_allowed",
                format!("this key may not use the model `{model}`"),
            )
            .param("model"),
            Self::UnknownUpstream => Error::invalid(
                "unknown_upstream",
                format!("no such upstream serves the model `{model}` to this request"),
            ),
        }
    }
}

/// One line of `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// What a client asks for.
    pub id: Arc<str>,
    /// The first group that serves it.
    pub owner: Arc<str>,
}

impl Routes {
    /// Builds the routes over the groups that were built for the same
    /// configuration.
    ///
    /// # Errors
    /// Every reference to a group that is not there.
    pub fn build(config: &Config, groups: Vec<Arc<Group>>) -> Result<Self, Vec<BuildError>> {
        let mut errors = Vec::new();
        let mut routes = Vec::with_capacity(config.routes.len());
        for (index, route) in config.routes.iter().enumerate() {
            let mut steps = Vec::with_capacity(route.groups.len() + 1);
            // What is named as the fallback is tried last, also if it is named
            // among the others as well; and nothing is tried twice.
            let mut seen = HashSet::new();
            let ordinary = route
                .groups
                .iter()
                .enumerate()
                .filter(|(_, name)| Some(*name) != route.fallback.as_ref())
                .map(|(nth, name)| (format!("groups[{nth}]"), name, false));
            let last = route
                .fallback
                .iter()
                .map(|name| ("fallback".to_owned(), name, true));
            for (key, name, fallback) in ordinary.chain(last) {
                match groups.iter().find(|group| *group.name == **name) {
                    None => errors.push(BuildError {
                        path: format!("routes[{index}].{key}"),
                        problem: "expected the name of a group".to_owned(),
                    }),
                    Some(group) if seen.insert(name) => steps.push(RouteStep {
                        group: Arc::clone(group),
                        rewrite: route.rewrite.get(name).map(|model| model.as_str().into()),
                        fallback,
                    }),
                    Some(_) => {}
                }
            }
            routes.push(Route {
                pattern: Pattern::new(route.model.as_str()),
                label: route.model.as_str().into(),
                local: route.local,
                names: steps
                    .iter()
                    .map(|step| step.group.name.as_ref().into())
                    .collect(),
                steps,
            });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let aliases = config
            .aliases
            .iter()
            .map(|(alias, model)| (alias.as_str().into(), model.as_str().into()))
            .collect();
        let mut built = Self {
            routes,
            aliases,
            groups,
            models: Vec::new(),
        };
        built.models = built.list(config);
        Ok(built)
    }

    /// Returns whether what is asked of `model` must stay on premises, whoever
    /// asks.
    pub fn is_local(&self, model: &str) -> bool {
        let model = self.aliases.get(model).map_or(model, |target| target);
        self.route(model).is_some_and(|(_, route)| route.local)
    }

    /// Returns where an exchange for `model` may go.
    ///
    /// # Errors
    /// Why it may go nowhere.
    pub fn plan(&self, model: &str, restrict: &Restrict) -> Result<Plan, PlanError> {
        let model = self.meant(model);
        let (index, route) = self.route(&model).ok_or(PlanError::UnknownModel)?;

        let mut steps: Vec<&RouteStep> = route
            .steps
            .iter()
            .filter(|step| step.serves(&model))
            .collect();
        if steps.is_empty() {
            return Err(PlanError::UnknownModel);
        }
        if route.local || restrict.local {
            steps.retain(|step| step.group.local);
            if steps.is_empty() {
                return Err(PlanError::NoLocalGroup);
            }
        }
        if let Some(allowed) = &restrict.groups {
            steps.retain(|step| allowed.iter().any(|name| **name == *step.group.name));
            if steps.is_empty() {
                return Err(PlanError::NoAllowedGroup);
            }
        }

        let mut steps: Vec<Step> = steps
            .into_iter()
            .map(|step| Step {
                group: Arc::clone(&step.group),
                model: step
                    .rewrite
                    .as_ref()
                    .map_or_else(|| Arc::clone(&model), Arc::clone),
                fallback: step.fallback,
            })
            .collect();
        let mut pin = None;
        if let Some(name) = &restrict.pin {
            let (step, upstream) = steps
                .iter()
                .find_map(|step| Some((step, step.group.find(name)?)))
                .filter(|(step, upstream)| upstream.serves(&step.model))
                .ok_or(PlanError::UnknownUpstream)?;
            pin = Some(Arc::clone(upstream));
            // Asked for by name, it is nobody's fallback.
            steps = vec![Step {
                fallback: false,
                ..step.clone()
            }];
        }
        Ok(Plan {
            index,
            route: Arc::clone(&route.label),
            model,
            steps,
            pin,
        })
    }

    /// Returns the models that can be told by name: exact routes, then what
    /// upstreams under a pattern list exactly, both in the order of the file,
    /// then aliases. What nothing but switched-off upstreams would serve is not
    /// among them.
    pub fn models(&self) -> &[Model] {
        &self.models
    }

    /// Returns the models of [`Self::models`] that an exchange under these
    /// restrictions could use.
    pub fn models_for(&self, restrict: &Restrict) -> impl Iterator<Item = &Model> {
        self.models
            .iter()
            .filter(|model| self.plan(&model.id, restrict).is_ok())
    }

    /// Returns the upstreams that a route with a pattern leads to by the name
    /// that the client used, each once, with their groups: what they serve, only
    /// they can tell. None that is switched off.
    pub fn behind_patterns(&self) -> impl Iterator<Item = (&Arc<Group>, &Arc<Upstream>)> {
        let mut seen = HashSet::new();
        self.routes
            .iter()
            .filter(|route| route.pattern.exact().is_none())
            .flat_map(|route| &route.steps)
            .filter(|step| step.rewrite.is_none())
            .flat_map(|step| {
                step.group
                    .upstreams
                    .iter()
                    .map(|upstream| (&step.group, upstream))
            })
            .filter(|(_, upstream)| {
                let models = upstream.models();
                models.is_empty() || models.iter().any(|pattern| pattern.exact().is_none())
            })
            .filter(move |(_, upstream)| {
                !upstream.health.is_off() && seen.insert(Arc::clone(&upstream.name))
            })
    }

    /// Returns the lines of the list that the upstreams behind patterns add to
    /// [`Self::models`], under these restrictions: each name of theirs that
    /// would be asked of who told it. In the order of the file, then of the
    /// name; a name may come twice.
    pub fn discovered(&self, restrict: &Restrict) -> impl Iterator<Item = Model> {
        self.behind_patterns().flat_map(move |(group, upstream)| {
            let told = upstream.discovery.models().unwrap_or_default();
            let asked = |id: &str| {
                let plan = self.plan(id, restrict).ok()?;
                let mut steps = plan.steps.iter();
                steps
                    .any(|step| Arc::ptr_eq(&step.group, group) && *step.model == *id)
                    .then_some(())
            };
            told.iter()
                .filter(|id| upstream.serves(id) && asked(id).is_some())
                .map(|id| Model {
                    id: Arc::from(&**id),
                    owner: Arc::clone(&group.name),
                })
                .collect::<Vec<_>>()
        })
    }

    /// Returns all groups in the order of the file, routed to or not.
    pub fn groups(&self) -> &[Arc<Group>] {
        &self.groups
    }

    /// Collects what [`Self::models`] returns.
    fn list(&self, config: &Config) -> Vec<Model> {
        let exact = self.routes.iter().filter_map(|route| route.pattern.exact());
        let listed = self.routes.iter().enumerate().flat_map(|(index, route)| {
            self.listed(route)
                .filter(move |id| self.route(id).is_some_and(|(taken, _)| taken == index))
        });
        let aliases = config.aliases.keys().map(String::as_str);
        let mut seen = HashSet::new();
        exact
            .chain(listed)
            .chain(aliases)
            .filter(|id| seen.insert(*id))
            .filter_map(|id| self.model(id))
            .collect()
    }

    /// Returns what upstreams under a pattern list exactly. Where the route
    /// renames the model for a group, that is not what a client would ask for.
    fn listed<'a>(&self, route: &'a Route) -> impl Iterator<Item = &'a str> {
        route
            .steps
            .iter()
            .filter(|step| route.pattern.exact().is_none() && step.rewrite.is_none())
            .flat_map(|step| &step.group.upstreams)
            .flat_map(|upstream| upstream.models())
            .filter_map(Pattern::exact)
    }

    /// Returns the line of the list for a model that anything but switched-off
    /// upstreams serves.
    fn model(&self, id: &str) -> Option<Model> {
        let plan = self.plan(id, &Restrict::default()).ok()?;
        let on = |step: &&Step| {
            let mut upstreams = step.group.upstreams.iter();
            upstreams.any(|upstream| !upstream.health.is_off() && upstream.serves(&step.model))
        };
        Some(Model {
            id: id.into(),
            owner: Arc::clone(&plan.steps.iter().find(on)?.group.name),
        })
    }

    /// Returns the model that a name means: what it is an alias of, or itself.
    pub fn meant(&self, model: &str) -> Arc<str> {
        match self.aliases.get(model) {
            Some(target) => Arc::clone(target),
            None => model.into(),
        }
    }

    /// Returns the label of the route that a model takes by its name alone;
    /// empty if it takes none.
    pub fn label(&self, model: &str) -> Arc<str> {
        let model = self.aliases.get(model).map_or(model, |target| target);
        match self.route(model) {
            Some((_, route)) => Arc::clone(&route.label),
            None => Arc::from(""),
        }
    }

    /// Returns the groups that a model may lead to by its name alone, the
    /// fallback too.
    pub fn groups_of(&self, model: &str) -> Arc<[Box<str>]> {
        let model = self.aliases.get(model).map_or(model, |target| target);
        match self.route(model) {
            Some((_, route)) => Arc::clone(&route.names),
            None => Arc::from([]),
        }
    }

    /// Returns the first route that fits, and its index.
    fn route(&self, model: &str) -> Option<(usize, &Route)> {
        self.routes
            .iter()
            .enumerate()
            .find(|(_, route)| route.pattern.matches(model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstreams::{Previous, group::build_all};

    const CONFIG: &str = r#"
groups:
  gpus:
    local: true
    upstreams:
      - { name: gpu-1, url: "http://127.0.0.1:1/v1", models: [qwen-coder, "qwen2*"] }
      - { name: gpu-2, url: "http://127.0.0.1:2/v1", models: ["qwen2*", qwen2.5, x-embed] }
  cloud:
    upstreams:
      - { name: openai, kind: openai, url: "https://api.example/v1", models: ["gpt-*", gpt-4o, gpt-4o-mini, qwen-turbo] }
  ollama:
    local: true
    upstreams: [ { name: ollama, kind: ollama, url: "http://127.0.0.1:3/v1" } ]
  mirror:
    upstreams: [ { name: twin, url: "https://twin.example/v1" } ]
routes:
  - { model: qwen-secret, groups: [cloud], rewrite: { cloud: gpt-4o } , local: true }
  - { model: "qwen*", groups: [gpus, cloud], fallback: ollama, rewrite: { cloud: gpt-4o-mini, ollama: "qwen2.5:7b" } }
  - { model: qwen-late, groups: [mirror] }
  - { model: "gpt-*", groups: [cloud] }
  - { model: both, groups: [ollama, mirror, mirror], fallback: ollama }
  - { model: "*-embed", groups: [ollama, mirror] }
aliases: { fast: qwen2.5, fastest: fast, gone: nothing }
"#;

    fn routes_without(disabled: &[&str]) -> Routes {
        let config: Config = serde_yaml::from_str(CONFIG).unwrap();
        let disabled = disabled.iter().map(|name| (*name).to_owned()).collect();
        let groups = build_all(&config, &HashMap::new(), &disabled, &Previous::default()).unwrap();
        Routes::build(&config, groups).unwrap()
    }

    fn routes() -> Routes {
        routes_without(&[])
    }

    /// Returns the steps as `group=model`, the fallback with `!`.
    fn steps(model: &str, restrict: &Restrict) -> Result<Vec<String>, PlanError> {
        let plan = routes().plan(model, restrict)?;
        let step = |step: &Step| {
            let mark = if step.fallback { "!" } else { "" };
            format!("{mark}{}={}", step.group.name, step.model)
        };
        Ok(plan.steps.iter().map(step).collect())
    }

    fn anywhere() -> Restrict {
        Restrict::default()
    }

    fn local() -> Restrict {
        Restrict {
            local: true,
            ..Restrict::default()
        }
    }

    fn pinned(name: &str) -> Restrict {
        Restrict {
            pin: Some(name.into()),
            ..Restrict::default()
        }
    }

    fn only(groups: &[&str]) -> Restrict {
        Restrict {
            groups: Some(groups.iter().map(|name| Box::from(*name)).collect()),
            ..Restrict::default()
        }
    }

    #[test]
    fn groups_come_in_order_each_with_its_own_name_for_the_model() {
        assert_eq!(
            steps("qwen2.5", &anywhere()).unwrap(),
            ["gpus=qwen2.5", "cloud=gpt-4o-mini", "!ollama=qwen2.5:7b"]
        );
    }

    #[test]
    fn the_first_route_that_fits_is_taken_even_if_a_later_one_is_exact() {
        let plan = routes().plan("qwen-late", &anywhere()).unwrap();
        assert_eq!((&*plan.route, plan.index), ("qwen*", 1));
    }

    #[test]
    fn an_alias_is_replaced_once_and_sent_as_its_target() {
        let plan = routes().plan("fast", &anywhere()).unwrap();
        assert_eq!(&*plan.model, "qwen2.5");
        assert_eq!(&*plan.steps[0].model, "qwen2.5");
        assert_eq!(
            routes().plan("fastest", &anywhere()).unwrap_err(),
            PlanError::UnknownModel
        );
    }

    #[test]
    fn what_no_route_or_no_upstream_serves_is_unknown() {
        for model in ["claude", "", "gone", "xgpt-4o"] {
            assert_eq!(
                steps(model, &anywhere()),
                Err(PlanError::UnknownModel),
                "{model}"
            );
        }
    }

    #[test]
    fn a_group_that_does_not_serve_the_model_is_no_step() {
        assert_eq!(
            steps("qwen3", &anywhere()).unwrap(),
            ["cloud=gpt-4o-mini", "!ollama=qwen2.5:7b"]
        );
    }

    #[test]
    fn restricted_to_local_no_other_group_is_in_the_plan() {
        assert_eq!(
            steps("qwen2.5", &local()).unwrap(),
            ["gpus=qwen2.5", "!ollama=qwen2.5:7b"]
        );
        assert_eq!(steps("gpt-4o", &local()), Err(PlanError::NoLocalGroup));
    }

    #[test]
    fn a_local_route_needs_no_word_from_the_request() {
        assert_eq!(
            steps("qwen-secret", &anywhere()),
            Err(PlanError::NoLocalGroup)
        );
    }

    #[test]
    fn a_key_reaches_only_its_groups() {
        assert_eq!(
            steps("qwen2.5", &only(&["cloud"])).unwrap(),
            ["cloud=gpt-4o-mini"]
        );
        assert_eq!(
            steps("qwen2.5", &only(&["mirror"])),
            Err(PlanError::NoAllowedGroup)
        );
        assert_eq!(steps("qwen2.5", &only(&[])), Err(PlanError::NoAllowedGroup));
    }

    #[test]
    fn the_fallback_is_tried_last_and_nothing_twice() {
        assert_eq!(
            steps("both", &anywhere()).unwrap(),
            ["mirror=both", "!ollama=both"]
        );
    }

    #[test]
    fn a_pin_leaves_its_upstream_alone() {
        let plan = routes().plan("qwen2.5", &pinned("ollama")).unwrap();
        assert_eq!(plan.steps.len(), 1);
        assert_eq!(&*plan.steps[0].model, "qwen2.5:7b");
        assert!(!plan.steps[0].fallback);
        assert_eq!(&*plan.pin.unwrap().name, "ollama");
    }

    #[test]
    fn a_pin_opens_nothing_that_is_closed_otherwise() {
        for (model, pin, restrict) in [
            ("qwen2.5", "nobody", anywhere()),
            ("qwen2.5", "twin", anywhere()),
            ("qwen-coder", "gpu-2", anywhere()),
            ("qwen2.5", "openai", local()),
            ("qwen2.5", "gpu-1", only(&["cloud"])),
        ] {
            let restrict = Restrict {
                pin: Some(pin.into()),
                ..restrict
            };
            assert_eq!(
                steps(model, &restrict),
                Err(PlanError::UnknownUpstream),
                "{model} at {pin}"
            );
        }
    }

    fn ids<'a>(models: impl IntoIterator<Item = &'a Model>) -> Vec<&'a str> {
        models.into_iter().map(|model| &*model.id).collect()
    }

    #[test]
    fn the_models_are_what_a_client_can_ask_for_by_name() {
        let routes = routes();
        assert_eq!(
            ids(routes.models()),
            [
                "qwen-late",
                "both",
                "qwen-coder",
                "qwen2.5",
                "gpt-4o",
                "gpt-4o-mini",
                "fast"
            ]
        );
        assert_eq!(&*routes.models()[1].owner, "mirror");
    }

    #[test]
    fn the_models_of_a_restricted_key_are_those_it_can_use() {
        let routes = routes();
        assert_eq!(ids(routes.models_for(&only(&["mirror"]))), ["both"]);
    }

    #[test]
    fn models_of_a_switched_off_upstream_are_not_listed_but_not_unknown_either() {
        let routes = routes_without(&["openai"]);
        assert!(!ids(routes.models()).contains(&"gpt-4o"));
        assert!(routes.plan("gpt-4o", &anywhere()).is_ok());
    }

    #[test]
    fn references_to_no_group_are_all_told() {
        let config: Config = serde_yaml::from_str(
            "routes: [ { model: a, groups: [x, y] }, { model: b, fallback: z } ]",
        )
        .unwrap();
        let errors = Routes::build(&config, Vec::new()).unwrap_err();
        let paths: Vec<_> = errors.iter().map(|error| error.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "routes[0].groups[0]",
                "routes[0].groups[1]",
                "routes[1].fallback"
            ]
        );
    }

    #[test]
    fn what_a_client_is_told_names_the_model_and_nothing_of_ours() {
        for error in [
            PlanError::UnknownModel,
            PlanError::NoLocalGroup,
            PlanError::NoAllowedGroup,
            PlanError::UnknownUpstream,
        ] {
            let error = error.into_error("qwen");
            assert!(error.status.is_client_error());
            assert!(error.message.contains("`qwen`"));
        }
    }
}
