//! Time that goes on while a process is frozen and while its host is suspended.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
pub(crate) struct Contact {
    /// Nanoseconds since the host was started.
    heard: AtomicU64,
    /// The connection on which it was is lost.
    lost: AtomicBool,
}

impl Default for Contact {
    fn default() -> Self {
        let contact = Self { heard: AtomicU64::new(0), lost: AtomicBool::new(false) };
        contact.touch();
        contact
    }
}

impl Contact {
    pub(crate) fn touch(&self) {
        let now = u64::try_from(BootInstant::now().0.as_nanos()).unwrap_or(u64::MAX);
        self.heard.fetch_max(now, Ordering::AcqRel);
        self.lost.store(false, Ordering::Release);
    }

    /// Nothing more comes, until it is heard of again.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(crate) fn silence(&self) -> Duration {
        BootInstant(Duration::from_nanos(self.heard.load(Ordering::Acquire))).elapsed()
    }
}
