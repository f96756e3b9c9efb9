//! The memory that requests take, all together: their bodies, what is made of
//! them for an upstream, answers that are read whole, and the texts that are
//! kept so that another upstream can go on with them.
//!
//! A body is kept to the end of its request, since any attempt may need it
//! again. So what it takes is reserved before it is taken, and given back when
//! the request is over. What a request needs besides has a reservation of its
//! own, which is given back with it, whatever becomes of the request.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::metrics::Metrics;

/// The count of the bytes. One per process.
pub(super) struct Bodies {
    held: AtomicUsize,
    metrics: Arc<Metrics>,
}

impl Bodies {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            held: AtomicUsize::new(0),
            metrics,
        }
    }

    /// Begins a body of no bytes.
    pub(super) fn reserve(self: &Arc<Self>) -> Reserved {
        Reserved {
            bodies: Arc::clone(self),
            bytes: 0,
        }
    }

    fn show(&self) {
        let held = self.held.load(Ordering::Relaxed);
        let shown = i64::try_from(held).unwrap_or(i64::MAX);
        self.metrics.bodies.set(shown);
    }
}

impl fmt::Debug for Bodies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bodies").field(&self.held).finish()
    }
}

/// No room: the bodies that are there take all of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

/// The memory of one body; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Reserved {
    bodies: Arc<Bodies>,
    bytes: usize,
}

impl Reserved {
    /// Begins what the same request takes besides.
    pub(super) fn beside(&self) -> Self {
        self.bodies.reserve()
    }

    /// Sets the size of what a request takes besides its body of `own` bytes. One
    /// that is alone is not refused: it would never be served, and what it can
    /// take is bounded by other limits.
    ///
    /// # Errors
    /// [`Full`]; then the size stays what it was.
    pub(super) fn grow(&mut self, bytes: usize, own: usize, most: usize) -> Result<(), Full> {
        if self.resize(bytes, most).is_ok() {
            return Ok(());
        }
        let held = self.bodies.held.load(Ordering::Relaxed);
        if held > own.saturating_add(self.bytes) {
            return Err(Full);
        }
        self.hold(bytes);
        Ok(())
    }

    /// Returns the size of the body.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns whether so many more bytes would fit at the moment.
    pub(super) fn would_fit(&self, more: usize, most: usize) -> bool {
        let held = self.bodies.held.load(Ordering::Relaxed);
        held.saturating_add(more) <= most
    }

    /// Sets the size without asking whether there is room, for what an answer that
    /// has begun needs: those who come then find less.
    pub(super) fn hold(&mut self, bytes: usize) {
        let held = &self.bodies.held;
        held.fetch_add(bytes, Ordering::Relaxed);
        held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
        self.bodies.show();
    }

    /// Sets the size of the body, of which all together may have `most`.
    ///
    /// # Errors
    /// [`Full`]; then the size stays what it was.
    pub(super) fn resize(&mut self, bytes: usize, most: usize) -> Result<(), Full> {
        let held = &self.bodies.held;
        if let Some(more) = bytes.checked_sub(self.bytes) {
            let fits = |held: usize| held.checked_add(more).filter(|sum| *sum <= most);
            if held
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
                .is_err()
            {
                return Err(Full);
            }
        } else {
            held.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
        self.bodies.show();
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.bodies.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bodies.show();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bodies_share_one_bound_and_give_back_what_they_took() {
        let bodies = Arc::new(Bodies::new(Arc::new(Metrics::new())));
        let mut first = bodies.reserve();
        let mut second = bodies.reserve();
        first.resize(60, 100).unwrap();
        assert_eq!(second.resize(41, 100), Err(Full));
        second.resize(40, 100).unwrap();
        assert_eq!(first.resize(61, 100), Err(Full));
        first.resize(10, 100).unwrap();
        second.resize(90, 100).unwrap();
        assert_eq!(bodies.metrics.bodies.get(), 100);
        // A reload may lower the bound below what is held.
        assert_eq!(second.resize(91, 50), Err(Full));
        second.resize(1, 50).unwrap();
        drop(first);
        assert_eq!(bodies.metrics.bodies.get(), 1);
        drop(second);
        assert_eq!(bodies.metrics.bodies.get(), 0);
    }

    #[test]
    fn what_a_request_needs_besides_is_refused_unless_it_is_alone() {
        let bodies = Arc::new(Bodies::new(Arc::new(Metrics::new())));
        let mut body = bodies.reserve();
        body.resize(60, 100).unwrap();
        let mut answer = body.beside();
        answer.grow(40, 60, 100).unwrap();
        answer.grow(400, 60, 100).unwrap();
        answer.grow(10, 60, 100).unwrap();
        let mut other = bodies.reserve();
        other.resize(1, 100).unwrap();
        assert_eq!(answer.grow(40, 60, 100), Err(Full));
        assert_eq!(bodies.metrics.bodies.get(), 71);
        answer.grow(39, 60, 100).unwrap();
        drop((answer, other));
        assert_eq!(bodies.metrics.bodies.get(), 60);
    }
}
