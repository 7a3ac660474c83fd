//! The permission under which a machine's vCPUs run.
//!
//! A start is more than a call of `Machine::resume`: that call may panic, hang, or return when somebody has long decided
//! that the guest is elsewhere. So the engine hands out a [`StartPermit`] with each start, and the machine asks it each
//! time before a vCPU enters the guest. What must stay true: the first entry and a revocation are ordered by one lock, so
//! that whoever revokes knows for certain whether a vCPU may have run.

use crate::clock::BootInstant;
use crate::link::contain;
use crate::sync::{Fault, Mutex, lock, seeded};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Nobody has entered yet.
const FRESH: u8 = 0;
/// Somebody has.
const ENTERED: u8 = 1;
/// Nobody may enter any more.
const REVOKED: u8 = 2;

/// Says whether vCPUs may run. The engine gives one to each [`Machine::resume`](crate::Machine::resume); clones are the
/// same permit.
#[derive(Clone)]
pub struct StartPermit(Arc<Inner>);

struct Inner {
    /// Read without the lock; written with it held.
    state: AtomicU8,
    slow: Mutex<Slow>,
}

#[derive(Default)]
struct Slow {
    /// The first entry must come before this moment.
    until: Option<BootInstant>,
    entered: bool,
    expired: bool,
    revoked: Vec<Box<dyn FnOnce() + Send>>,
}

/// What had become of a permit when it was revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Used {
    /// No vCPU has entered the guest, and none will.
    Never,
    /// The permit ran out before the first entry: none has entered, and none will.
    TooLate,
    /// A vCPU may have run.
    Entered,
}

impl fmt::Debug for StartPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StartPermit").field("valid", &self.is_valid()).finish()
    }
}

impl StartPermit {
    /// A permit without a limit on when it is first used. It is for a guest that this side owns, for a guest
    /// that a person takes over, and for a VMM's own tests of its machine. The engine can still revoke it.
    pub fn unlimited() -> Self {
        Self::new(None)
    }

    /// A permit whose first use must come before `until`.
    pub(crate) fn until(until: BootInstant) -> Self {
        Self::new(Some(until))
    }

    fn new(until: Option<BootInstant>) -> Self {
        let slow = Slow { until, ..Slow::default() };
        Self(Arc::new(Inner { state: AtomicU8::new(FRESH), slow: Mutex::new(slow) }))
    }

    /// Asks for permission to run. Each vCPU asks each time right before it enters the guest, and each device before it
    /// gives its first output. `false` means that the guest must not run: the vCPU stays out.
    ///
    /// From the first `true` on the guest counts as having run.
    #[must_use]
    pub fn enter(&self) -> bool {
        match self.0.state.load(Ordering::Acquire) {
            ENTERED => true,
            FRESH => self.first_entry(),
            _ => seeded(Fault::PermitUnchecked),
        }
    }

    fn first_entry(&self) -> bool {
        let mut slow = lock(&self.0.slow);
        if self.0.state.load(Ordering::Acquire) != FRESH {
            return self.0.state.load(Ordering::Acquire) == ENTERED;
        }
        // With the lock held, and the last thing before the first instruction: this process may have been frozen until now.
        if slow.until.is_some_and(|until| BootInstant::now() >= until) {
            slow.expired = true;
            self.0.state.store(REVOKED, Ordering::Release);
            return false;
        }
        slow.entered = true;
        self.0.state.store(ENTERED, Ordering::Release);
        true
    }

    /// Whether a vCPU may run, or go on running.
    pub fn is_valid(&self) -> bool {
        self.0.state.load(Ordering::Acquire) != REVOKED
    }

    /// Has `act` called once the permit is revoked, or at once if it is: to get vCPUs out of the guest that would not ask
    /// again by themselves. `act` must return at once.
    pub fn on_revoke(&self, act: impl FnOnce() + Send + 'static) {
        let mut slow = lock(&self.0.slow);
        if self.is_valid() {
            slow.revoked.push(Box::new(act));
            return;
        }
        drop(slow);
        act();
    }

    /// Whether a vCPU may have run.
    #[cfg(test)]
    pub(crate) fn was_entered(&self) -> bool {
        self.0.state.load(Ordering::Acquire) == ENTERED
    }

    /// Lets no vCPU enter any more, and tells whether one has before.
    pub(crate) fn revoke(&self) -> Used {
        let (used, acts) = {
            let mut slow = lock(&self.0.slow);
            self.0.state.store(REVOKED, Ordering::Release);
            let used = match (slow.entered, slow.expired) {
                (true, _) => Used::Entered,
                (false, true) => Used::TooLate,
                (false, false) => Used::Never,
            };
            (used, std::mem::take(&mut slow.revoked))
        };
        // The VMM's code: what it does wrong must not keep the others' vCPUs in, nor the caller from going on.
        acts.into_iter().for_each(|act| {
            let _ = contain("machine", || {
                act();
                Ok(())
            });
        });
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    #[test]
    fn revoked_before_the_first_entry_nobody_has_run() {
        let permit = StartPermit::unlimited();
        assert!(permit.is_valid());
        assert_eq!(permit.revoke(), Used::Never);
        assert!(!permit.enter() && !permit.is_valid());
    }

    #[test]
    fn revoked_after_it_somebody_may_have() {
        let permit = StartPermit::unlimited();
        assert!(permit.enter() && permit.enter());
        assert_eq!(permit.revoke(), Used::Entered);
        assert!(!permit.enter());
    }

    #[test]
    fn too_late_for_the_first_entry_but_not_for_the_next() {
        let late = StartPermit::until(BootInstant::now());
        assert!(!late.enter());
        assert_eq!(late.revoke(), Used::TooLate);
        let soon = StartPermit::until(BootInstant::now() + Duration::from_secs(3600));
        assert!(soon.enter());
        lock(&soon.0.slow).until = Some(BootInstant::now());
        assert!(soon.enter(), "only the first entry has a limit");
    }

    #[test]
    fn who_asked_is_told_once() {
        let told = Arc::new(AtomicUsize::new(0));
        let tell = || {
            let told = told.clone();
            move || {
                told.fetch_add(1, Ordering::SeqCst);
            }
        };
        let permit = StartPermit::unlimited();
        permit.on_revoke(tell());
        assert_eq!(told.load(Ordering::SeqCst), 0);
        permit.revoke();
        permit.revoke();
        assert_eq!(told.load(Ordering::SeqCst), 1);
        permit.on_revoke(tell());
        assert_eq!(told.load(Ordering::SeqCst), 2);
    }

    /// Entries and a revocation from many threads: who entered before is counted, and nobody enters after.
    #[test]
    fn one_order_for_all() {
        for _ in 0..500 {
            let permit = StartPermit::unlimited();
            let entered = std::thread::scope(|scope| {
                let vcpu = scope.spawn(|| permit.enter());
                let used = permit.revoke();
                (vcpu.join().unwrap(), used)
            });
            assert!(matches!(entered, (true, Used::Entered) | (false, Used::Never)), "{entered:?}");
        }
    }
}
