//! A list of plugins as it runs: in order on the way in, in reverse on the way
//! out.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::StatusCode;

use super::{
    Build, ConfigError, Entry, Flow, OnFailure, Pass, Plugin, ResponseHead, Sent, Wants,
    apart::apart,
    entry::Built,
    meter::{Came, Hook, Meter},
};
use crate::{
    config::{Config, PluginEntry},
    context::{Outcome, RequestContext},
    error::{Error, Result},
    logging::Seldom,
    metrics::Metrics,
    openai::{Endpoint, Frame},
    resources::Resources,
};

/// The plugins of one list of the YAML.
pub struct Chain {
    links: Vec<Link>,
    /// What any of the plugins wants of the answers; if nothing, none is shown
    /// any.
    pub wants: Wants,
    metrics: Arc<Metrics>,
}

struct Link {
    entry: PluginEntry,
    name: &'static str,
    plugin: Arc<dyn Plugin>,
    on_failure: OnFailure,
    wants: Wants,
    meter: Meter,
    failures: Seldom,
}

/// Which of its turns at an answer a plugin has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Edit,
    Annotate,
}

/// What an event of a stream has become.
#[derive(Debug)]
pub struct Passed {
    /// What goes to the client, in this order.
    pub frames: Vec<Frame>,
    /// Whether that is the end: the last of `frames` ends the stream, and the
    /// upstream is not to be asked for more.
    pub ended: bool,
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
        let metrics = &build.resources.metrics;
        let mut links: Vec<Link> = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let kept = previous
                .and_then(|chain| chain.links.iter().find(|link| link.entry == *entry))
                .filter(|link| link.plugin.is_current());
            let built = match kept {
                Some(link) => Built {
                    name: link.name,
                    plugin: Arc::clone(&link.plugin),
                    on_failure: link.on_failure,
                },
                None => Entry::build(entry, build).map_err(|why| ConfigError {
                    path: format!("plugins[{index}].{}", why.path),
                    message: why.message,
                })?,
            };
            links.push(Link::new(entry.clone(), built, metrics));
        }
        Ok(Self::new(links, metrics))
    }

    fn new(links: Vec<Link>, metrics: &Arc<Metrics>) -> Self {
        let any = |which: fn(&Wants) -> bool| links.iter().any(|link| which(&link.wants));
        Self {
            wants: Wants {
                edit: any(|wants| wants.edit || wants.annotate),
                annotate: any(|wants| wants.annotate),
                see: any(|wants| wants.see),
            },
            links,
            metrics: Arc::clone(metrics),
        }
    }

    /// Runs the hooks for a header that is in.
    ///
    /// # Errors
    /// The first plugin's that refuses; the later ones do not run.
    pub async fn on_headers(&self, ctx: &mut RequestContext) -> Result<Flow> {
        for (place, link) in self.links.iter().enumerate() {
            ctx.own.enter(place);
            let began = Instant::now();
            let called = AssertUnwindSafe(link.plugin.on_headers(ctx));
            let came = called.catch_unwind().await;
            let flow = self.judge(link, Hook::Headers, came, began, ctx)?;
            if let Some(Flow::Respond(answer)) = flow {
                return Ok(Flow::Respond(answer));
            }
        }
        Ok(Flow::Continue)
    }

    /// Runs the hooks that make a parsed request what is really meant.
    ///
    /// # Errors
    /// The first plugin's that refuses; the later ones do not run.
    pub fn on_parsed(&self, ctx: &mut RequestContext) -> Result<()> {
        for (place, link) in self.links.iter().enumerate() {
            ctx.own.enter(place);
            let began = Instant::now();
            let came = catch_unwind(AssertUnwindSafe(|| {
                link.plugin.on_parsed(ctx).map(|()| Flow::Continue)
            }));
            self.judge(link, Hook::Parsed, came, began, ctx)?;
        }
        Ok(())
    }

    /// Runs the hooks for a parsed request.
    ///
    /// # Errors
    /// The first plugin's that refuses; the later ones do not run.
    pub async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
        for (place, link) in self.links.iter().enumerate() {
            ctx.own.enter(place);
            let began = Instant::now();
            let called = AssertUnwindSafe(link.plugin.on_request(ctx));
            let came = called.catch_unwind().await;
            let flow = self.judge(link, Hook::Request, came, began, ctx)?;
            if let Some(Flow::Respond(answer)) = flow {
                return Ok(Flow::Respond(answer));
            }
        }
        Ok(Flow::Continue)
    }

    /// Runs the hooks for the head of the answer, last plugin first. A plugin
    /// that fails here is passed over: what it had to refuse it has refused.
    pub async fn on_response(&self, ctx: &mut RequestContext, head: &mut ResponseHead) {
        for (place, link) in self.links.iter().enumerate().rev() {
            ctx.own.enter(place);
            let began = Instant::now();
            let called = AssertUnwindSafe(link.plugin.on_response(ctx, head));
            let panicked = called.catch_unwind().await.is_err();
            self.note(link, Hook::Response, panicked, began, ctx);
        }
    }

    /// Offers an event to the plugins that want to change it, last plugin first,
    /// and what has become of it to those that annotate.
    ///
    /// # Errors
    /// The first plugin's that fails.
    pub fn on_event(&self, ctx: &mut RequestContext, event: Frame) -> Result<Passed> {
        let bytes = event.raw.len();
        let mut passed = Passed {
            frames: vec![event],
            ended: false,
        };
        apart(bytes, || {
            for (turn, place, link) in self.turns() {
                ctx.own.enter(place);
                passed = self.pass(turn, link, ctx, passed)?;
            }
            Ok(passed)
        })
    }

    /// Returns the plugins that change answers, in the order in which they do,
    /// with their places in the list.
    fn turns(&self) -> impl Iterator<Item = (Turn, usize, &Link)> {
        let links = || self.links.iter().enumerate().rev();
        let edits = links().filter(|(_, link)| link.wants.edit);
        let annotates = links().filter(|(_, link)| link.wants.annotate);
        edits
            .map(|(place, link)| (Turn::Edit, place, link))
            .chain(annotates.map(|(place, link)| (Turn::Annotate, place, link)))
    }

    fn pass(
        &self,
        turn: Turn,
        link: &Link,
        ctx: &mut RequestContext,
        given: Passed,
    ) -> Result<Passed> {
        let began = Instant::now();
        let mut out = Vec::with_capacity(given.frames.len());
        let mut ended = given.ended;
        for frame in given.frames {
            if frame.is_comment {
                out.push(frame);
                continue;
            }
            let before = out.len();
            let came = catch_unwind(AssertUnwindSafe(|| match turn {
                Turn::Edit => link.plugin.on_event(ctx, &frame, &mut out),
                Turn::Annotate => link.plugin.annotate_event(ctx, &frame, &mut out),
            }));
            match came.unwrap_or_else(|_payload| Err(self.panicked())) {
                Ok(Pass::On) => {}
                Ok(Pass::End) => {
                    link.meter.note(Hook::Events, Came::Ended, began.elapsed());
                    ended = true;
                    let request = ctx.request.as_ref();
                    // Responses have no such event: their last one says it all.
                    if request.is_none_or(|request| request.endpoint != Endpoint::Responses) {
                        out.push(Frame::done());
                    }
                    break;
                }
                Err(error) => {
                    let came = link.came_of(&error);
                    link.meter.note(Hook::Events, came, began.elapsed());
                    link.tell(Hook::Events, came, &error, ctx);
                    if came != Came::FailedOpen {
                        return Err(error);
                    }
                    out.truncate(before);
                    out.push(frame);
                }
            }
        }
        ctx.own.spend(began.elapsed());
        Ok(Passed { frames: out, ended })
    }

    /// Offers a whole answer to the plugins that want to change it, last plugin
    /// first, and what has become of it to those that annotate.
    ///
    /// # Errors
    /// The first plugin's that fails.
    pub fn on_body(&self, ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
        apart(body.len(), || self.body(ctx, body))
    }

    fn body(&self, ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
        for (turn, place, link) in self.turns() {
            ctx.own.enter(place);
            let began = Instant::now();
            let before = body.clone();
            let came = catch_unwind(AssertUnwindSafe(|| {
                let done = match turn {
                    Turn::Edit => link.plugin.on_body(ctx, body),
                    Turn::Annotate => link.plugin.annotate_body(ctx, body),
                };
                done.map(|()| Flow::Continue)
            }));
            if self.judge(link, Hook::Body, came, began, ctx)?.is_none() {
                *body = before;
            }
        }
        Ok(())
    }

    /// Shows what goes to the client to the plugins that want to see it.
    pub fn on_sent(&self, ctx: &mut RequestContext, sent: Sent<'_>) {
        for (place, link) in self.links.iter().enumerate() {
            if !link.wants.see {
                continue;
            }
            ctx.own.enter(place);
            let began = Instant::now();
            let came = catch_unwind(AssertUnwindSafe(|| link.plugin.on_sent(ctx, sent)));
            if came.is_err() {
                self.note(link, Hook::Events, true, began, ctx);
            }
            ctx.own.spend(began.elapsed());
        }
    }

    /// Tells every plugin what is about to end, last plugin first.
    pub fn on_last(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        for (place, link) in self.links.iter().enumerate().rev() {
            ctx.own.enter(place);
            let began = Instant::now();
            let called = AssertUnwindSafe(|| link.plugin.on_last(ctx, outcome));
            let panicked = catch_unwind(called).is_err();
            self.note(link, Hook::Last, panicked, began, ctx);
        }
    }

    /// Tells every plugin how the request ended, last plugin first.
    pub async fn on_finish(&self, ctx: &mut RequestContext, outcome: &Outcome) {
        for (place, link) in self.links.iter().enumerate().rev() {
            ctx.own.enter(place);
            if let Some(spent) = ctx.own.spent() {
                link.meter.note(Hook::Events, Came::On, spent);
            }
            let began = Instant::now();
            let called = AssertUnwindSafe(link.plugin.on_finish(ctx, outcome));
            let panicked = called.catch_unwind().await.is_err();
            self.note(link, Hook::Finish, panicked, began, ctx);
        }
    }

    /// Measures a call that may refuse the request, and decides what a failure
    /// comes to: `None` if the request goes on without the plugin.
    fn judge(
        &self,
        link: &Link,
        hook: Hook,
        came: std::thread::Result<Result<Flow>>,
        began: Instant,
        ctx: &RequestContext,
    ) -> Result<Option<Flow>> {
        let result = came.unwrap_or_else(|_payload| Err(self.panicked()));
        let error = match result {
            Ok(flow) => {
                let came = match flow {
                    Flow::Continue => Came::On,
                    Flow::Respond(_) => Came::Responded,
                };
                link.meter.note(hook, came, began.elapsed());
                return Ok(Some(flow));
            }
            Err(error) => error,
        };
        let came = link.came_of(&error);
        link.meter.note(hook, came, began.elapsed());
        link.tell(hook, came, &error, ctx);
        if came == Came::FailedOpen {
            Ok(None)
        } else {
            Err(error)
        }
    }

    /// Measures a call that cannot refuse anything.
    fn note(&self, link: &Link, hook: Hook, panicked: bool, began: Instant, ctx: &RequestContext) {
        let came = if panicked { Came::FailedOpen } else { Came::On };
        link.meter.note(hook, came, began.elapsed());
        if panicked {
            link.tell(hook, came, &self.panicked(), ctx);
        }
    }

    /// Counts a panic; its message is in the log already.
    fn panicked(&self) -> Error {
        self.metrics.panics.inc();
        Error::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "internal_error",
            "the gateway failed on this request",
        )
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

    /// Returns the model that the plugins take a name for.
    pub fn model_meant<'a>(&self, model: &'a str) -> &'a str {
        let links = self.links.iter();
        links.fold(model, |model, link| link.plugin.model_meant(model))
    }

    /// Returns whether what the plugins were built from, beside the YAML, is
    /// still the same.
    pub fn is_current(&self) -> bool {
        self.links.iter().all(|link| link.plugin.is_current())
    }

    /// Tells every plugin that it serves from now on.
    pub fn go_live(&self, resources: &Resources) {
        for link in &self.links {
            link.plugin.go_live(resources);
        }
    }

    /// Tells the plugins that `kept` does not hold that they do not serve any
    /// more.
    pub fn retire(&self, kept: impl Fn(&Arc<dyn Plugin>) -> bool) {
        for link in self.links.iter().filter(|link| !kept(&link.plugin)) {
            link.plugin.retire();
        }
    }

    /// Returns whether a plugin is one of the list.
    pub fn holds(&self, plugin: &Arc<dyn Plugin>) -> bool {
        let mut links = self.links.iter();
        links.any(|link| Arc::ptr_eq(&link.plugin, plugin))
    }

    /// Returns the files whose change asks for a reload.
    pub fn watched(&self) -> Vec<PathBuf> {
        self.links
            .iter()
            .flat_map(|link| link.plugin.watched())
            .collect()
    }
}

impl Link {
    fn new(entry: PluginEntry, built: Built, metrics: &Arc<Metrics>) -> Self {
        Self {
            entry,
            name: built.name,
            wants: built.plugin.wants(),
            plugin: built.plugin,
            on_failure: built.on_failure,
            meter: Meter::new(built.name, metrics),
            failures: Seldom::default(),
        }
    }

    /// Returns what an error comes to.
    fn came_of(&self, error: &Error) -> Came {
        match self.on_failure {
            _ if !error.status.is_server_error() => Came::Refused,
            OnFailure::Open => Came::FailedOpen,
            OnFailure::Closed => Came::FailedClosed,
        }
    }

    /// Says in the log that the plugin failed, and what became of the request.
    fn tell(&self, hook: Hook, came: Came, error: &Error, ctx: &RequestContext) {
        if came == Came::Refused {
            return;
        }
        if let Some(others) = self.failures.due(Instant::now()) {
            log::error!(
                "plugin failed: plugin={} hook={} verdict={} id={} others={others} {error}",
                self.name,
                hook.as_str(),
                came.as_str(),
                ctx.id,
            );
        }
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.links.iter().map(|link| &link.entry.name);
        f.debug_list().entries(names).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use http::{HeaderMap, Method};
    use serde_json::Value;

    use super::{
        OnFailure::{Closed, Open},
        *,
    };
    use crate::context::Ending;

    /// What a test's plugin does when it is called.
    #[derive(Clone, Copy, PartialEq)]
    enum Does {
        Nothing,
        Refuse,
        Fail,
        Panic,
        /// Says every event twice.
        Double,
        /// Ends the stream at the first event.
        End,
        /// Annotates.
        Note,
    }

    use Does::{Double, End, Fail, Note, Nothing, Panic, Refuse};

    struct Toy {
        name: &'static str,
        does: Does,
        calls: Arc<Mutex<Vec<String>>>,
    }

    impl Toy {
        fn act(&self, hook: &str) -> Result<()> {
            let call = format!("{} {hook}", self.name);
            self.calls.lock().unwrap().push(call);
            match self.does {
                Refuse => Err(Error::invalid("refused", "no")),
                Fail => Err(Error::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "server_error",
                    "broken",
                    "it is broken",
                )),
                Panic => panic!("in a plugin"),
                Nothing | Double | End | Note => Ok(()),
            }
        }
    }

    #[async_trait]
    impl Plugin for Toy {
        async fn on_headers(&self, ctx: &mut RequestContext) -> Result<Flow> {
            ctx.own.put(self.name);
            Ok(Flow::Continue)
        }

        async fn on_request(&self, ctx: &mut RequestContext) -> Result<Flow> {
            assert_eq!(ctx.own.get(), Some(&self.name));
            self.act("request").map(|()| Flow::Continue)
        }

        fn wants(&self) -> Wants {
            Wants {
                edit: true,
                annotate: self.does == Note,
                see: true,
            }
        }

        fn annotate_event(
            &self,
            ctx: &mut RequestContext,
            event: &Frame,
            out: &mut Vec<Frame>,
        ) -> Result<Pass> {
            assert_eq!(ctx.own.get(), Some(&self.name));
            out.push(event.clone());
            self.act("note").map(|()| Pass::On)
        }

        fn annotate_body(&self, _ctx: &mut RequestContext, _body: &mut Bytes) -> Result<()> {
            self.act("note body")
        }

        fn on_event(
            &self,
            ctx: &mut RequestContext,
            event: &Frame,
            out: &mut Vec<Frame>,
        ) -> Result<Pass> {
            assert_eq!(ctx.own.get(), Some(&self.name));
            out.push(event.clone());
            self.act("event")?;
            match self.does {
                Double => out.push(event.clone()),
                End => return Ok(Pass::End),
                _ => {}
            }
            Ok(Pass::On)
        }

        fn on_body(&self, _ctx: &mut RequestContext, body: &mut Bytes) -> Result<()> {
            *body = Bytes::from_static(b"edited");
            self.act("body")
        }

        async fn on_finish(&self, _ctx: &mut RequestContext, _outcome: &Outcome) {
            self.act("finish").ok();
        }
    }

    struct Bench {
        chain: Chain,
        ctx: RequestContext,
        calls: Arc<Mutex<Vec<String>>>,
        metrics: Arc<Metrics>,
    }

    fn bench(plugins: &[(&'static str, Does, OnFailure)]) -> Bench {
        let metrics = Arc::clone(&Resources::default().metrics);
        let calls = Arc::new(Mutex::new(Vec::new()));
        let links = plugins.iter().map(|&(name, does, on_failure)| {
            let calls = Arc::clone(&calls);
            let entry = PluginEntry {
                name: name.to_owned(),
                config: Value::Null,
            };
            let plugin = Arc::new(Toy { name, does, calls });
            let built = Built {
                name,
                plugin,
                on_failure,
            };
            Link::new(entry, built, &metrics)
        });
        Bench {
            chain: Chain::new(links.collect(), &metrics),
            ctx: RequestContext::new(
                "id".into(),
                [127, 0, 0, 1].into(),
                Method::POST,
                "/v1/chat/completions".into(),
                HeaderMap::new(),
            ),
            calls,
            metrics,
        }
    }

    impl Bench {
        async fn request(&mut self) -> Result<Flow> {
            self.chain.on_headers(&mut self.ctx).await?;
            self.chain.on_request(&mut self.ctx).await
        }

        async fn finish(&mut self) {
            let outcome = Outcome {
                status: 200,
                ending: Ending::Success,
                error: None,
                streamed: false,
                first_token: None,
                total: std::time::Duration::ZERO,
                bytes_out: 0,
                usage: None,
            };
            self.chain.on_finish(&mut self.ctx, &outcome).await;
        }

        fn calls(&self) -> String {
            self.calls.lock().unwrap().join(", ")
        }

        /// Says whether the metric knows of exactly one such call.
        fn has_metric(&self, plugin: &str, hook: &str, verdict: &str) -> bool {
            let text = self.metrics.encode().unwrap();
            let labels = format!("{{hook=\"{hook}\",plugin=\"{plugin}\",verdict=\"{verdict}\"}} 1");
            text.contains(&format!("forebay_plugin_seconds_count{labels}"))
        }
    }

    #[tokio::test]
    async fn the_way_in_is_in_order_and_the_way_out_in_reverse() {
        let mut bench = bench(&[("a", Nothing, Closed), ("b", Nothing, Closed)]);
        assert!(bench.request().await.is_ok());
        bench.finish().await;
        assert_eq!(bench.calls(), "a request, b request, b finish, a finish");
        assert!(bench.has_metric("b", "request", "continue"));
    }

    #[tokio::test]
    async fn a_refusal_is_the_answer_whatever_the_settings_say() {
        for on_failure in [Open, Closed] {
            let mut bench = bench(&[("a", Refuse, on_failure), ("b", Nothing, Closed)]);
            let error = bench.request().await.unwrap_err();
            assert_eq!(error.code.as_deref(), Some("refused"));
            assert_eq!(bench.calls(), "a request");
            assert!(bench.has_metric("a", "request", "refuse"));
        }
    }

    #[tokio::test]
    async fn a_failure_is_what_the_settings_say() {
        for does in [Fail, Panic] {
            let mut open = bench(&[("a", does, Open), ("b", Nothing, Closed)]);
            assert!(open.request().await.is_ok());
            assert_eq!(open.calls(), "a request, b request");
            assert!(open.has_metric("a", "request", "failed_open"));

            let mut closed = bench(&[("a", does, Closed), ("b", Nothing, Closed)]);
            let error = closed.request().await.unwrap_err();
            assert!(error.status.is_server_error());
            assert_eq!(closed.calls(), "a request");
            assert!(closed.has_metric("a", "request", "failed_closed"));
        }
    }

    #[tokio::test]
    async fn every_plugin_hears_of_the_end_although_one_panics() {
        let mut bench = bench(&[("a", Nothing, Closed), ("b", Panic, Closed)]);
        bench.finish().await;
        assert_eq!(bench.calls(), "b finish, a finish");
        assert_eq!(bench.metrics.panics.get(), 1);
    }

    fn raws(passed: &Passed) -> Vec<&str> {
        let frames = passed.frames.iter();
        frames
            .map(|frame| std::str::from_utf8(&frame.raw).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn what_one_plugin_puts_out_comes_to_the_one_before_it() {
        let mut bench = bench(&[("a", Double, Closed), ("b", Double, Closed)]);
        assert!(bench.request().await.is_ok());
        let event = Frame::of_data(b"{}");
        let passed = bench.chain.on_event(&mut bench.ctx, event).unwrap();
        assert_eq!(raws(&passed), ["data: {}\n\n"; 4]);
        assert!(!passed.ended);
    }

    #[tokio::test]
    async fn who_annotates_comes_behind_all_who_edit_wherever_he_stands() {
        for order in [["a", "b"], ["b", "a"]] {
            let plugins = order.map(|name| match name {
                "a" => ("a", Note, Closed),
                _ => ("b", Double, Closed),
            });
            let mut bench = bench(&plugins);
            assert!(bench.request().await.is_ok());
            bench.calls.lock().unwrap().clear();
            let event = Frame::of_data(b"{}");
            let passed = bench.chain.on_event(&mut bench.ctx, event).unwrap();
            assert_eq!(raws(&passed).len(), 2);
            assert!(bench.calls().ends_with("event, a note, a note"));
            let mut body = Bytes::from_static(b"x");
            bench.chain.on_body(&mut bench.ctx, &mut body).unwrap();
            assert!(bench.calls().ends_with("body, a note body"));
        }
    }

    #[tokio::test]
    async fn a_stream_that_a_plugin_ends_has_its_last_event() {
        let mut bench = bench(&[("a", Double, Closed), ("b", End, Closed)]);
        assert!(bench.request().await.is_ok());
        let event = Frame::of_data(b"{}");
        let passed = bench.chain.on_event(&mut bench.ctx, event).unwrap();
        assert!(passed.ended);
        let expected = ["data: {}\n\n", "data: {}\n\n", "data: [DONE]\n\n"];
        assert_eq!(raws(&passed)[..3], expected);
    }

    #[tokio::test]
    async fn an_answer_survives_a_plugin_that_fails_open() {
        for does in [Fail, Panic] {
            let mut open = bench(&[("a", does, Open)]);
            open.chain.on_headers(&mut open.ctx).await.unwrap();
            let passed = open.chain.on_event(&mut open.ctx, Frame::done()).unwrap();
            assert_eq!(raws(&passed), ["data: [DONE]\n\n"]);
            let mut body = Bytes::from_static(b"as it came");
            open.chain.on_body(&mut open.ctx, &mut body).unwrap();
            assert_eq!(&*body, b"as it came");

            let mut closed = bench(&[("a", does, Closed)]);
            closed.chain.on_headers(&mut closed.ctx).await.unwrap();
            let passed = closed.chain.on_event(&mut closed.ctx, Frame::done());
            assert!(passed.is_err());
        }
    }

    /// Takes its time over what is long: until somebody else was served.
    struct Waits(
        Mutex<std::sync::mpsc::Receiver<()>>,
        Arc<tokio::sync::Notify>,
    );

    impl Waits {
        fn wait(&self) {
            self.1.notify_one();
            let others = self.0.lock().unwrap();
            let most = std::time::Duration::from_secs(20);
            others.recv_timeout(most).expect("nobody else was served");
        }
    }

    impl Plugin for Waits {
        fn wants(&self) -> Wants {
            Wants {
                edit: true,
                annotate: false,
                see: false,
            }
        }

        fn on_event(
            &self,
            _ctx: &mut RequestContext,
            event: &Frame,
            out: &mut Vec<Frame>,
        ) -> Result<Pass> {
            self.wait();
            out.push(event.clone());
            Ok(Pass::On)
        }

        fn on_body(&self, _ctx: &mut RequestContext, _body: &mut Bytes) -> Result<()> {
            self.wait();
            Ok(())
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_long_answer_holds_up_nobody_elses() {
        let long = vec![b'x'; crate::plugins::apart::INLINE_BYTES_MAX + 1];
        for is_event in [false, true] {
            let (tell, others) = std::sync::mpsc::channel();
            let begun = Arc::new(tokio::sync::Notify::new());
            let Bench {
                mut ctx, metrics, ..
            } = bench(&[]);
            let built = Built {
                name: "waits",
                plugin: Arc::new(Waits(Mutex::new(others), Arc::clone(&begun))),
                on_failure: Closed,
            };
            let entry = PluginEntry {
                name: "waits".to_owned(),
                config: Value::Null,
            };
            let chain = Chain::new(vec![Link::new(entry, built, &metrics)], &metrics);
            let mut body = Bytes::from(long.clone());
            let one = tokio::spawn(async move {
                if is_event {
                    chain.on_event(&mut ctx, Frame::of_data(&body)).map(drop)
                } else {
                    chain.on_body(&mut ctx, &mut body)
                }
            });
            begun.notified().await;
            // On the only thread of the runtime, which is not held.
            let other = tokio::spawn(async move { tell.send(()) });
            other.await.unwrap().unwrap();
            one.await.unwrap().unwrap();
        }
    }
}
