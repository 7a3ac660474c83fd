//! Ctrl-C and requests to end: flags that the commands look at, so that each ends in its own good order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// What has arrived.
#[derive(Debug)]
pub struct Interrupts {
    interrupted: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

impl Interrupts {
    /// From now on Ctrl-C and the like no longer end the process.
    pub fn install() -> Result<Self> {
        Self::install_all(false)
    }

    /// The same, but a second Ctrl-C does end it, at once.
    pub fn install_with_second_chance() -> Result<Self> {
        Self::install_all(true)
    }

    /// From now on Ctrl-C no longer ends the process, but a second one does; other requests to end still do.
    pub fn install_for_keyboard() -> Result<Self> {
        let interrupts = Self { interrupted: Arc::default(), terminated: Arc::default() };
        let install = || {
            flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&interrupts.interrupted))?;
            flag::register(SIGINT, Arc::clone(&interrupts.interrupted))
        };
        install().context("could not install a signal handler")?;
        Ok(interrupts)
    }

    /// What has arrived was heeded: only what comes from now on counts.
    pub fn forget(&self) {
        self.interrupted.store(false, Ordering::Relaxed);
        self.terminated.store(false, Ordering::Relaxed);
    }

    fn install_all(second_ends: bool) -> Result<Self> {
        let interrupts = Self { interrupted: Arc::default(), terminated: Arc::default() };
        let install = || {
            if second_ends {
                // Before the flag is set by the next line's handler, or the first would end it too.
                flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&interrupts.interrupted))?;
            }
            flag::register(SIGINT, Arc::clone(&interrupts.interrupted))?;
            flag::register(SIGTERM, Arc::clone(&interrupts.terminated))?;
            flag::register(SIGHUP, Arc::clone(&interrupts.terminated))
        };
        install().context("could not install signal handlers")?;
        Ok(interrupts)
    }

    /// Whether the process was asked to end, in whatever way.
    pub fn arrived(&self) -> bool {
        self.by_keyboard() || self.terminated.load(Ordering::Relaxed)
    }

    /// Whether that was by Ctrl-C.
    pub fn by_keyboard(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Sleeps, but not on after something has arrived; tells whether it has.
    pub fn sleep(&self, duration: Duration) -> bool {
        let deadline = Instant::now() + duration;
        while !self.arrived() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            thread::sleep(left.min(Duration::from_millis(20)));
        }
        true
    }
}
