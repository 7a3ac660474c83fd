//! Time that goes on while a process is frozen and while its host is suspended.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::sync::boot_time;

/// A moment of CLOCK_BOOTTIME. Unlike `Instant`, which stands still while the host is suspended, it can tell how long
/// something is ago whatever happened to this process meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BootInstant(Duration);

impl BootInstant {
    pub(crate) fn now() -> Self {
        Self(boot_time())
    }

    /// Time since `earlier`; zero if that is later.
    pub(crate) fn saturating_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn elapsed(self) -> Duration {
        Self::now().saturating_since(self)
    }
}

impl Add<Duration> for BootInstant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

impl Sub<Duration> for BootInstant {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration))
    }
}

/// When the other side was last heard of. Readers touch it; decisions look at it.
#[derive(Debug)]
pub(crate) struct Contact(AtomicU64);

impl Default for Contact {
    fn default() -> Self {
        let contact = Self(AtomicU64::new(0));
        contact.touch();
        contact
    }
}

impl Contact {
    pub(crate) fn touch(&self) {
        let now = u64::try_from(BootInstant::now().0.as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_max(now, Ordering::AcqRel);
    }

    pub(crate) fn silence(&self) -> Duration {
        BootInstant(Duration::from_nanos(self.0.load(Ordering::Acquire))).elapsed()
    }
}
