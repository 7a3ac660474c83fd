//! Locks, threads and clocks of what decides who may run the guest.
//!
//! They are the standard library's, but for this crate's own tests: there a thread may belong to a simulation, which runs
//! one thread at a time in an order of its own and has a clock of its own. What must stay true: outside tests there is
//! nothing here but other names.

#[cfg(test)]
pub(crate) mod simulated;

/// An old behaviour that a test can put back, to see that the model finds what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests put them back"))]
pub(crate) enum Fault {
    /// The guest counts as here before its start has succeeded.
    HereTooSoon,
    /// A start by a person's decision that fails throws the guest away.
    TakeOverThrowsAway,
    /// Running is a failure for a source that has offered.
    RunningFails,
    /// A permit that was revoked is valid.
    PermitUnchecked,
    /// What becomes of a start that panicked is never told.
    PanicForgotten,
    /// Whether a person may decide is looked at first, and the decision is entered later.
    DecisionUnlocked,
    /// A Release is acted on however old it is.
    OldRelease,
    /// A stranger makes a guest go that waits for a decision.
    StrangerEvicts,
    /// A connection that came to nothing counts as one.
    ConnectedForNothing,
    /// Who has no handle cannot decide.
    HandleDecides,
    /// A guest that has ended is handed over, and started, as any other.
    EndForgotten,
}

#[cfg(not(test))]
pub(crate) use real::*;
#[cfg(test)]
pub(crate) use simulated::*;

#[cfg(not(test))]
mod real {
    pub(crate) use std::sync::mpsc;
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::thread::{JoinHandle, sleep};
    use std::time::{Duration, Instant};

    use rustix::time::{ClockId, clock_gettime};

    pub(crate) use crate::link::{lock, spawn};

    /// The time that stands still while the host is suspended.
    pub(crate) fn now() -> Instant {
        Instant::now()
    }

    /// Whether an old behaviour was put back: no.
    pub(crate) const fn seeded(_: super::Fault) -> bool {
        false
    }

    /// The time that does not: since the host was started.
    pub(crate) fn boot_time() -> Duration {
        Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
    }
}
