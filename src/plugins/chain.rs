//! A list of plugins as it runs: in order on the way in, in reverse on the way
//! out.

use std::{fmt, path::PathBuf, sync::Arc};

use super::{Build, ConfigError, Flow, PLUGINS, Plugin, ResponseHead};
use crate::{
    config::{Config, PluginEntry},
    context::{Outcome, RequestContext},
    error::Result,
    openai::Frame,
};

/// The plugins of one list of the YAML.
pub struct Chain {
    links: Vec<Link>,
    /// Whether any plugin asked for the events; if not, none is offered one.
    pub wants_events: bool,
}

struct Link {
    entry: PluginEntry,
    plugin: Arc<dyn Plugin>,
}

impl Chain {
    /// Builds the plugins of a list; entries that `previous` has too, and whose
    /// files have not changed, are taken over from it.
    ///
    /// # Errors
    /// The first plugin that cannot be built, with its place in the list.
    pub fn build(
        entries: &[PluginEntry],
        previous: Option<&Self>,
        build: &Build<'_>,
    ) -> Result<Self, ConfigError> {
        let mut links = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let kept = previous
                .and_then(|chain| chain.links.iter().find(|link| link.entry == *entry))
                .filter(|link| link.plugin.is_current());
            let plugin = match kept {
                Some(link) => Arc::clone(&link.plugin),
                None => build_one(entry, build).map_err(|why| ConfigError {
                    path: format!("plugins[{index}].{}", why.path),
                    message: why.message,
                })?,
            };
            links.push(Link {
                entry: entry.clone(),
                plugin,
            });
        }
        let wants_events = links.iter().any(|link| link.plugin.wants_events());
        Ok(Self {
            links,
            wants_events,
        })
    }

    /// Runs the hooks for a header that is in.
    ///
    /// # Errors
    /// The first plugin's that refuses; the later ones do not run.
    pub async fn on_headers(&self, ctx: &mut RequestContext) -> Result<Flow> {
        for link in &self.links {
            if let Flow::Respond(answer) = link.plugin.on_headers(ctx).await? {
                return Ok(Flow::Respond(answer));
            }
        }
        Ok(Flow::Continue)
    }

    /// Runs the hooks for a parsed request.
    ///
    /// # Errors
    /// The first plugin's that refuses; the later ones do not run.
    pub async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        for link in &self.links {
            if let Flow::Respond(answer) = link.plugin.on_request(ctx).await? {
                return Ok(Flow::Respond(answer));
            }
        }
        Ok(Flow::Continue)
    }

    /// Runs the hooks for the head of the answer, last plugin first.
    ///
    /// # Errors
    /// The first plugin's that fails.
    pub async fn on_response(
        &self,
        ctx: &mut RequestContext,
        head: &mut ResponseHead,
    ) -> Result<()> {
        for link in self.links.iter().rev() {
            link.plugin.on_response(ctx, head).await?;
        }
        Ok(())
    }

    /// Offers an event to the plugins that asked, last plugin first.
    ///
    /// # Errors
    /// The first plugin's that fails.
    pub fn on_event(&self, ctx: &mut RequestContext, event: &mut Frame) -> Result<()> {
        for link in self.links.iter().rev() {
            if link.plugin.wants_events() {
                link.plugin.on_event(ctx, event)?;
            }
        }
        Ok(())
    }

    /// Tells every plugin how the request ended, last plugin first.
    pub async fn on_finish(&self, ctx: &RequestContext, outcome: &Outcome) {
        for link in self.links.iter().rev() {
            link.plugin.on_finish(ctx, outcome).await;
        }
    }

    /// Returns what the plugins find questionable in view of the whole
    /// configuration, with the places in the list.
    pub fn warnings(&self, config: &Config) -> Vec<ConfigError> {
        let mut warnings = Vec::new();
        for (index, link) in self.links.iter().enumerate() {
            let path = format!("plugins[{index}].{}", link.entry.name);
            for message in link.plugin.warnings(config) {
                let path = path.clone();
                warnings.push(ConfigError { path, message });
            }
        }
        warnings
    }

    /// Returns whether what the plugins were built from, beside the YAML, is
    /// still the same.
    pub fn is_current(&self) -> bool {
        self.links.iter().all(|link| link.plugin.is_current())
    }

    /// Returns the files whose change asks for a reload.
    pub fn watched(&self) -> Vec<PathBuf> {
        self.links
            .iter()
            .flat_map(|link| link.plugin.watched())
            .collect()
    }
}

fn build_one(entry: &PluginEntry, build: &Build<'_>) -> Result<Arc<dyn Plugin>, ConfigError> {
    let known = PLUGINS.iter().find(|known| known.name == entry.name);
    let Some(known) = known else {
        let names: Vec<_> = PLUGINS.iter().map(|known| known.name).collect();
        return Err(ConfigError {
            path: entry.name.clone(),
            message: format!("expected one of the plugins: {}", names.join(", ")),
        });
    };
    (known.build)(entry.config.clone(), build)
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.links.iter().map(|link| &link.entry.name);
        f.debug_list().entries(names).finish()
    }
}
