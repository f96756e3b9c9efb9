//! What a request may cost in tokens, and what it has cost: for the plugins that
//! hold callers to a number of them.

use std::{sync::LazyLock, time::Instant};

use crate::{
    context::{Ending, Outcome, RequestContext},
    logging::Seldom,
    openai::{
        ApiRequest, Endpoint, N_PREDICT, Usage,
        cursor::Cursor,
        estimate::{prompt_tokens, tokens_of_bytes},
        json::Kind,
    },
};

/// How far what an upstream claims may be from what was sent and received, in
/// either direction: estimates are wrong by less than this.
const TOLERANCE: u64 = 100;
/// What is believed however little was sent and received, in tokens: reasoning
/// that is not shown, and conversations that the upstream keeps.
const CONTEXT: u64 = 1 << 18;

/// Tells of upstreams that cannot count.
static NONSENSE: LazyLock<Seldom> = LazyLock::new(Seldom::default);

/// What a request may cost, as far as it shows before an upstream has seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Estimate {
    /// Tokens of the prompt, about.
    pub(super) prompt: u64,
    /// The most tokens of all answers together.
    pub(super) completion: u64,
    /// Whether the client itself has bounded the answer; else `completion` is no
    /// more than a guess.
    pub(super) bounded: bool,
}

impl Estimate {
    /// Estimates a request. `otherwise` is how long an answer is that the client
    /// has not bounded.
    pub(super) fn of(request: &ApiRequest, otherwise: u64) -> Self {
        let prompt = prompt_tokens(request);
        if !writes_text(request.endpoint) {
            return Self {
                prompt,
                completion: 0,
                bounded: true,
            };
        }
        let asked = request.max_tokens;
        let each = match asked {
            // Servers that do not know the word write as much as they like.
            Some(most) if most.key == N_PREDICT => most.value.max(otherwise),
            Some(most) => most.value,
            None => otherwise,
        };
        Self {
            prompt,
            completion: each.saturating_mul(answers(request)),
            bounded: asked.is_some_and(|most| most.value == each),
        }
    }

    /// Returns prompt and answers together.
    pub(super) fn total(self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }
}

/// Returns how many answers are written: so many to each prompt, also where only
/// the best of them are told.
fn answers(request: &ApiRequest) -> u64 {
    let best_of = request.get("best_of").unwrap_or_default();
    let best_of = Cursor::new(best_of).integer().unwrap_or(1);
    let each = best_of.max(u64::from(request.n));
    let prompts = match request.object.find(&request.raw, "prompt") {
        // A list of numbers is one prompt.
        Some(list) if list.kind == Kind::Array && !list.item_kinds.only(Kind::Int) => list.items,
        _ => 1,
    };
    each.saturating_mul(u64::try_from(prompts).unwrap_or(u64::MAX))
}

/// What a request has cost, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Spent {
    /// Of the prompt, cached ones included.
    pub(super) prompt: u64,
    /// Of the prompt's, those that came from a cache.
    pub(super) cached: u64,
    /// Of the answer.
    pub(super) completion: u64,
}

impl Spent {
    /// Returns what a finished request has cost: what the upstream says, as far
    /// as that can be true; where it says nothing, the prompt as it was
    /// estimated and what has come of the answer. What brought the client
    /// nothing costs nothing.
    pub(super) fn of(ctx: &RequestContext, outcome: &Outcome, prompt: u64) -> Self {
        let came = Self {
            prompt,
            cached: 0,
            completion: came(ctx, outcome),
        };
        let told = outcome.usage.filter(|usage| !usage.estimated);
        if let Some(usage) = told
            && (
                usage.total_tokens,
                usage.prompt_tokens,
                usage.completion_tokens,
            ) != (0, 0, 0)
            && let Some(spent) = came.corrected(&usage, &ctx.id)
        {
            return spent;
        }
        let delivered = match outcome.ending {
            Ending::Success => true,
            Ending::Incomplete => ctx.content_events > 0,
            Ending::ClientClosed => reached_upstream(ctx),
            Ending::ClientError | Ending::ServerError => false,
        };
        if delivered { came } else { Self::default() }
    }

    /// Puts what an upstream has counted in the place of an estimate, but for
    /// what cannot be: nobody's budget is used up, or spared, by a server that
    /// cannot count. `None` if nothing it says is of any use.
    fn corrected(self, usage: &Usage, id: &str) -> Option<Self> {
        let estimate = self.total().max(1);
        let most = estimate.saturating_mul(TOLERANCE).max(CONTEXT);
        let told = [
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
        ];
        if told.iter().any(|tokens| *tokens > most) {
            if NONSENSE.due(Instant::now()).is_some() {
                log::warn!(
                    "request {id}: an upstream claims {}, {} and {} tokens (prompt, answer, total), \
                     which cannot be: about {} and {} are counted in their place",
                    usage.prompt_tokens,
                    usage.completion_tokens,
                    usage.total_tokens,
                    self.prompt,
                    self.completion
                );
            }
            return None;
        }
        let enough = |tokens: u64| tokens.saturating_mul(TOLERANCE) >= self.prompt;
        let [prompt, completion, total] = told;
        if (prompt, completion) == (0, 0) {
            // A prompt has a token, and so has an answer.
            let least = 1 + u64::from(self.completion > 0);
            if total < least || !enough(total) {
                return None;
            }
            let share = u128::from(total) * u128::from(self.prompt) / u128::from(estimate);
            let prompt = u64::try_from(share).unwrap_or(total).min(total);
            return Some(Self {
                prompt,
                cached: usage.cached_tokens.min(prompt),
                completion: total - prompt,
            });
        }
        let rest = |part: u64| total.saturating_sub(part);
        // No prompt has no tokens: who says so has not counted them.
        let counted = [prompt, rest(completion)];
        let prompt = counted.into_iter().find(|tokens| *tokens > 0);
        let prompt = prompt.filter(|tokens| enough(*tokens));
        let prompt = prompt.unwrap_or(self.prompt);
        let completion = match (completion, rest(prompt)) {
            (0, 0) => self.completion,
            (0, rest) => rest,
            (counted, _) => counted,
        };
        Some(Self {
            prompt,
            cached: usage.cached_tokens.min(prompt),
            completion,
        })
    }

    /// Returns prompt and answer together.
    pub(super) fn total(self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }
}

/// Returns about how many tokens have come of an answer.
fn came(ctx: &RequestContext, outcome: &Outcome) -> u64 {
    let request = ctx.request.as_ref();
    let writes = request.is_some_and(|request| writes_text(request.endpoint));
    match (writes, outcome.streamed, outcome.ending) {
        (false, ..) => 0,
        // An event of a stream is a token, near enough.
        (true, true, _) => ctx.content_events,
        (true, false, Ending::Success) => tokens_of_bytes(outcome.bytes_out),
        (true, false, _) => ctx.content_events,
    }
}

/// Returns whether a finished request counts as one: not where it failed before
/// an upstream had seen it. Who leaves while it waits has had his turn.
pub(super) fn counts(ctx: &RequestContext, outcome: &Outcome) -> bool {
    reached_upstream(ctx) || matches!(outcome.ending, Ending::Success | Ending::ClientClosed)
}

fn reached_upstream(ctx: &RequestContext) -> bool {
    let mut attempts = ctx.attempts.iter();
    attempts.any(|attempt| !attempt.verdict.is_unreached())
}

/// Returns whether an answer of this call is text that a model writes.
fn writes_text(endpoint: Endpoint) -> bool {
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Responses => true,
        Endpoint::Embeddings | Endpoint::Rerank | Endpoint::Moderations => false,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use http::{HeaderMap, Method};

    use super::*;
    use crate::context::{Attempt, Verdict};

    /// A chat request that has been parsed, with further members.
    pub(in crate::plugins) fn context(members: &str) -> RequestContext {
        let mut ctx = RequestContext::new(
            "id".into(),
            [192, 0, 2, 1].into(),
            Method::POST,
            "/v1/chat/completions".into(),
            HeaderMap::new(),
        );
        // The messages are 40 bytes: 10 tokens.
        let body = format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"0123456789"}}]{members}}}"#
        );
        let request = ApiRequest::parse(Endpoint::ChatCompletions, body.into(), 64).unwrap();
        ctx.request = Some(request);
        ctx.model = "m".into();
        ctx.route = "*".into();
        ctx
    }

    /// An attempt at an upstream that went like this.
    pub(in crate::plugins) fn attempt(verdict: Verdict) -> Attempt {
        Attempt {
            group: "gpus".into(),
            upstream: "gpu-1".into(),
            verdict,
            status: None,
            maybe_billed: false,
            fallback: false,
            took: Duration::ZERO,
        }
    }

    /// A streamed answer that ended like this.
    pub(in crate::plugins) fn outcome(ending: Ending, usage: Option<(u64, u64)>) -> Outcome {
        Outcome {
            status: 200,
            ending,
            error: None,
            streamed: true,
            first_token: None,
            total: Duration::ZERO,
            bytes_out: 400,
            usage: usage.map(|(prompt_tokens, completion_tokens)| Usage {
                prompt_tokens,
                completion_tokens,
                ..Usage::default()
            }),
        }
    }

    fn request(members: &str) -> ApiRequest {
        context(members).request.unwrap()
    }

    #[test]
    fn the_clients_bound_is_taken_and_else_a_guess() {
        let estimate = |members: &str| Estimate::of(&request(members), 1024);
        let plain = estimate("");
        assert_eq!((plain.prompt, plain.completion), (10, 1024));
        assert!(!plain.bounded);
        let bounded = estimate(r#","max_tokens":50,"n":3"#);
        assert_eq!((bounded.total(), bounded.bounded), (160, true));
        for (more, total) in [
            // Only llama.cpp heeds its own bound, and it before all others.
            (r#","max_tokens":50,"n_predict":5000"#, 5010),
            (r#","n_predict":5"#, 1034),
            (r#","max_tokens":50,"n_predict":-1"#, 1034),
            (r#","max_tokens":50,"n":2,"best_of":3"#, 160),
        ] {
            assert_eq!(estimate(more).total(), total, "{more}");
        }
        assert!(!estimate(r#","n_predict":5"#).bounded);
        for (prompt, prompts) in [
            (r#""hi""#, 1),
            (r#"["a","b","c"]"#, 3),
            ("[1,2,3,4]", 1),
            ("[[1,2],[3,4]]", 2),
        ] {
            let body = format!(r#"{{"model":"m","prompt":{prompt},"max_tokens":50,"best_of":3}}"#);
            let request = ApiRequest::parse(Endpoint::Completions, body.into(), 64).unwrap();
            let estimate = Estimate::of(&request, 1024);
            assert_eq!(estimate.completion, prompts * 150, "{prompt}");
        }
        let embedding = ApiRequest::parse(
            Endpoint::Embeddings,
            r#"{"model":"m","input":"0123456789"}"#.into(),
            64,
        );
        assert_eq!(Estimate::of(&embedding.unwrap(), 1024).total(), 3);
    }

    #[test]
    fn what_the_upstream_says_is_what_was_spent() {
        let ctx = context("");
        let spent = Spent::of(&ctx, &outcome(Ending::Success, Some((7, 5))), 10);
        assert_eq!((spent.prompt, spent.completion), (7, 5));
        // Much is believed of reasoning that nobody has seen.
        let thought = outcome(Ending::Success, Some((7, 100_000)));
        assert_eq!(Spent::of(&ctx, &thought, 10).completion, 100_000);
    }

    #[test]
    fn a_prompt_that_nobody_counted_is_not_free() {
        let mut ctx = context("");
        ctx.content_events = 3;
        let spent = |prompt_tokens, completion_tokens, total_tokens, estimated| {
            let mut told = outcome(Ending::Incomplete, None);
            told.usage = Some(Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens,
                estimated,
                ..Usage::default()
            });
            let spent = Spent::of(&ctx, &told, 10);
            (spent.prompt, spent.completion)
        };
        assert_eq!(spent(0, 9, 9, false), (10, 9));
        assert_eq!(spent(0, 0, 13, false), (10, 3));
        assert_eq!(spent(0, 0, 7, false), (5, 2));
        assert_eq!(spent(0, 0, 1, false), (10, 3));
        assert_eq!(spent(0, 0, 0, false), (10, 3));
        assert_eq!(spent(7, 0, 0, false), (7, 3));
        assert_eq!(spent(7, 0, 7, false), (7, 3));
        assert_eq!(spent(7, 0, 16, false), (7, 9));
        let absurd = 1 << 62;
        assert_eq!(spent(absurd, absurd, 1, false), (10, 3));
        assert_eq!(spent(7, 1_000_000, 1_000_007, false), (10, 3));
        assert_eq!(spent(0, 0, absurd, false), (10, 3));
        assert_eq!(spent(99, 3, 102, true), (10, 3));
        assert_eq!(spent(7, 5, 12, false), (7, 5));
    }

    #[test]
    fn a_long_prompt_is_not_one_token() {
        let mut ctx = context("");
        ctx.content_events = 200;
        for told in [(1, 200), (0, 200)] {
            let spent = Spent::of(&ctx, &outcome(Ending::Success, Some(told)), 1000);
            assert_eq!((spent.prompt, spent.completion), (1000, 200), "{told:?}");
        }
    }

    #[test]
    fn what_is_not_said_is_estimated_from_what_came() {
        let mut ctx = context("");
        ctx.attempts.push(attempt(Verdict::Abandoned));
        ctx.content_events = 3;
        for ending in [Ending::ClientClosed, Ending::Incomplete, Ending::Success] {
            let spent = Spent::of(&ctx, &outcome(ending, None), 10);
            assert_eq!((spent.prompt, spent.completion), (10, 3), "{ending:?}");
        }
        let mut whole = outcome(Ending::Success, None);
        whole.streamed = false;
        assert_eq!(Spent::of(&ctx, &whole, 10).completion, 100);
    }

    #[test]
    fn what_brought_nothing_costs_nothing() {
        let mut ctx = context("");
        for ending in [Ending::ServerError, Ending::ClientError] {
            assert!(!counts(&ctx, &outcome(ending, None)));
        }
        // Left while it waited in line.
        let left = outcome(Ending::ClientClosed, None);
        assert_eq!(Spent::of(&ctx, &left, 10).total(), 0);
        assert!(counts(&ctx, &left));
        ctx.attempts.push(attempt(Verdict::NotSent));
        ctx.attempts.push(attempt(Verdict::Tls));
        assert!(!counts(&ctx, &outcome(Ending::ServerError, None)));
        ctx.attempts.push(attempt(Verdict::Failed));
        let failed = outcome(Ending::ServerError, None);
        assert_eq!(Spent::of(&ctx, &failed, 10).total(), 0);
        assert!(counts(&ctx, &failed));
    }
}
