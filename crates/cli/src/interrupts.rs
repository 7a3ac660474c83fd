//! Ctrl-C and requests to end: flags that the commands look at, so that each ends in its own good order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// What has arrived.
#[derive(Debug, Clone)]
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

/// How often [`LastResort`] looks.
const LOOK: Duration = Duration::from_millis(50);

/// Ends the process if it has not ended by itself some time after it was asked to: for a command that writes to a terminal,
/// which may never take what is written. Dropping it calls that off.
#[derive(Debug)]
pub struct LastResort {
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LastResort {
    /// Gives the process `grace` from the first of `interrupts`; then does `last`, which must not wait for anything, and ends
    /// the process.
    pub fn after(grace: Duration, interrupts: &Interrupts, last: impl FnOnce() + Send + 'static) -> Result<Self> {
        let interrupts = interrupts.clone();
        let (over, is_over) = mpsc::channel();
        let watch = move || {
            let goes_on = |patience| is_over.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
            while !interrupts.arrived() {
                if !goes_on(LOOK) {
                    return;
                }
            }
            if goes_on(grace) {
                last();
                std::process::exit(1);
            }
        };
        let thread = thread::Builder::new().name("last resort".to_owned()).spawn(watch);
        let thread = thread.context("could not start a thread")?;
        Ok(Self { over: Some(over), thread: Some(thread) })
    }
}

impl Drop for LastResort {
    fn drop(&mut self) {
        self.over.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
