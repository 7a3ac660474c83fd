//! Starting and stopping all of a machine's threads together.
//!
//! What must stay true: when [`Gate::close`] returns, no thread is between [`Gate::enter`] and its next wait at the
//! gate, and none goes through until it is opened.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Threads that are kept by something are kicked again after this.
const KICK_PAUSE: Duration = Duration::from_millis(50);

/// So many threads did not come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StillInside(pub(crate) usize);

use dunlin::StartPermit;

#[derive(Debug, Default)]
struct State {
    /// What those inside run under.
    permit: Option<StartPermit>,
    open: bool,
    ended: bool,
    inside: usize,
}

/// A gate that threads pass to run.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// What `state.open` says, for a look without the lock after every step.
    open: AtomicBool,
}

/// Why a thread came back from the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passage {
    /// It may run.
    Run,
    /// The machine is gone.
    End,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets all threads run under `permit`; whoever is inside asks it. Who runs already keeps the permit it has.
    pub(crate) fn open(&self, permit: &StartPermit) {
        let mut state = self.state();
        if !state.open {
            state.permit = Some(permit.clone());
        }
        drop(state);
        self.reopen();
    }

    /// Lets all threads run on under the permit that they ran under before.
    pub(crate) fn reopen(&self) {
        self.state().open = true;
        self.open.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// What whoever is inside runs under.
    pub(crate) fn permit(&self) -> Option<StartPermit> {
        self.state().permit.clone()
    }

    /// Has all threads stop, without waiting until they have.
    pub(crate) fn shut(&self) {
        self.state().open = false;
        self.open.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Stops all threads and waits until they have; tells whether the gate was open.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.state();
        let was_open = self.begin_close(&mut state);
        while state.inside > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        was_open
    }

    /// The same for threads that do not look by themselves, and may be kept by something else: `kick` makes those inside look,
    /// once the gate is closed. Gives up after `limit`: the gate is then as it was.
    pub(crate) fn close_within(&self, limit: Duration, kick: impl Fn()) -> Result<bool, StillInside> {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        let was_open = self.begin_close(&mut state);
        while state.inside > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let inside = state.inside;
                state.open = was_open;
                self.open.store(was_open, Ordering::Release);
                self.changed.notify_all();
                return Err(StillInside(inside));
            }
            kick();
            let wait = left.min(KICK_PAUSE);
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(was_open)
    }

    fn begin_close(&self, state: &mut State) -> bool {
        let was_open = std::mem::replace(&mut state.open, false);
        self.open.store(false, Ordering::SeqCst);
        self.changed.notify_all();
        was_open
    }

    /// Ends all threads.
    pub(crate) fn end(&self) {
        self.state().ended = true;
        self.open.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits until the gate is open. A thread that got in must [`leave`](Self::leave).
    pub(crate) fn enter(&self) -> Passage {
        let mut state = self.state();
        loop {
            if state.ended {
                return Passage::End;
            }
            if state.open {
                state.inside += 1;
                return Passage::Run;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether a thread inside may go on.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Sleeps until `until`, or until the gate is closed.
    pub(crate) fn sleep(&self, until: Instant) {
        self.sleep_while(until, || true);
    }

    /// The same, for no longer than `reason` holds, which is looked at again after a [`nudge`](Self::nudge).
    pub(crate) fn sleep_while(&self, until: Instant, reason: impl Fn() -> bool) {
        let mut state = self.state();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !state.open || state.ended || left.is_zero() || !reason() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has those who sleep look whether they still should. What they look at was changed before.
    pub(crate) fn nudge(&self) {
        // Whoever has looked and not yet gone to sleep holds the lock.
        drop(self.state());
        self.changed.notify_all();
    }

    /// A thread that was inside is not any more.
    pub(crate) fn leave(&self) {
        self.state().inside -= 1;
        self.changed.notify_all();
    }
}
