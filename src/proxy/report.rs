//! What a failed try tells of the upstream, in one place: which failures count
//! for its breaker, which ask for a pause, which mark its credential.

use std::time::Instant;

use http::StatusCode;

use super::verdict::{Failure, Hint};
use crate::{
    context::Verdict,
    metrics::Metrics,
    routes::Step,
    upstreams::{KeyFault, Slot, breaker::Fault},
};

/// Reports a failure. The upstream's pause is put into the failure where its
/// answer named none, so that the client can be told.
pub(super) fn failure(step: &Step, slot: &Slot, failure: &mut Failure, metrics: &Metrics) {
    if failure.unsupported.is_some() {
        // It was not asked.
        return;
    }
    let now = Instant::now();
    let spared = match failure.verdict {
        Verdict::Rejected if failure.hint == Some(Hint::Loading) => {
            slot.loading(now);
            false
        }
        Verdict::Rejected if failure.status == Some(StatusCode::TOO_MANY_REQUESTS) => {
            slot.limit(failure.retry_after, now);
            let upstream = slot.upstream();
            failure
                .retry_after
                .get_or_insert_with(|| upstream.wait(slot.model(), now));
            false
        }
        Verdict::Rejected => match failure.retry_after {
            // Of those who were turned away together one counts.
            Some(pause) => slot.cool(pause, now) && step.group.turned_away(slot, now),
            None => step.group.turned_away(slot, now),
        },
        Verdict::Credential => {
            let fault = key_fault(failure);
            let is_bad = slot.key_fault(fault, now);
            match fault {
                KeyFault::Quota => {
                    let upstream = slot.upstream();
                    failure.retry_after = Some(upstream.wait(slot.model(), now));
                }
                KeyFault::Unexplained if !is_bad => failure.hint = Some(Hint::Request),
                KeyFault::Unexplained | KeyFault::Forbidden | KeyFault::Refused => {}
            }
            false
        }
        Verdict::NoModel | Verdict::NotContinued => {
            slot.accepted(now);
            false
        }
        Verdict::Failed | Verdict::TimedOut => {
            if failure.status.is_some() {
                slot.reached(now);
            }
            let fault = match failure.status {
                None if failure.verdict == Verdict::Failed => Fault::Death,
                _ if failure.hint == Some(Hint::Frozen) => Fault::Death,
                _ => Fault::Answer,
            };
            step.group.failed(slot, fault, now)
        }
        // What it means for the upstream was reported where it happened.
        Verdict::NotSent | Verdict::Tls => {
            slot.upstream().contexts.unsent(slot.model());
            step.group.unsent(slot, now)
        }
        Verdict::NoSocket => {
            slot.upstream().contexts.unsent(slot.model());
            false
        }
        _ => false,
    };
    if spared {
        count_spared(metrics);
    }
}

/// Reports an answer that broke off.
pub(super) fn cut(step: &Step, slot: &Slot, metrics: &Metrics) {
    if step.group.failed(slot, Fault::Death, Instant::now()) {
        count_spared(metrics);
    }
}

fn count_spared(metrics: &Metrics) {
    metrics.limits.with_label_values(&["eject_max"]).inc();
}

fn key_fault(failure: &Failure) -> KeyFault {
    match (failure.hint, failure.status) {
        _ if failure.is_quota() => KeyFault::Quota,
        (Some(Hint::Key), Some(StatusCode::FORBIDDEN)) => KeyFault::Forbidden,
        (_, Some(StatusCode::FORBIDDEN)) => KeyFault::Unexplained,
        _ => KeyFault::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_credential_follows_from_the_answer() {
        for (status, hint, wanted) in [
            (Some(401), None, KeyFault::Refused),
            (Some(407), None, KeyFault::Refused),
            (Some(403), None, KeyFault::Unexplained),
            (Some(402), None, KeyFault::Quota),
            (Some(429), Some(Hint::Quota), KeyFault::Quota),
            (Some(403), Some(Hint::Quota), KeyFault::Quota),
            (Some(403), Some(Hint::Key), KeyFault::Forbidden),
            (None, None, KeyFault::Quota),
        ] {
            let failure = Failure {
                status: status.map(|status| StatusCode::from_u16(status).unwrap()),
                hint,
                ..Failure::new(Verdict::Credential, "")
            };
            assert_eq!(key_fault(&failure), wanted, "{status:?} {hint:?}");
        }
    }
}
