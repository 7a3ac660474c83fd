//! A device's thread, which works while the machine runs.
//!
//! It sleeps in poll(2) on its bell and on what the device waits for. What must stay true: once [`Bell::close`] has returned
//! the thread does not work until [`Bell::open`].

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use dunlin::StartPermit;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

#[derive(Debug, Default)]
struct State {
    /// What it works under.
    permit: Option<StartPermit>,
    open: bool,
    ended: bool,
    working: bool,
}

/// Wakes a worker, and starts and stops it.
#[derive(Debug)]
pub(super) struct Bell {
    fd: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    /// What `state.open` says, for a look after each piece of work.
    open: AtomicBool,
}

/// What a worker has to wait for besides its bell.
#[derive(Debug, Clone, Default)]
pub(super) enum Wait {
    /// Nothing.
    #[default]
    Bell,
    /// Something to read.
    Readable(Arc<OwnedFd>),
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd, state: Mutex::default(), changed: Condvar::new(), open: AtomicBool::new(false) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is work.
    pub(super) fn ring(&self) {
        // Fails only when so many have rung that it is awake anyway.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Takes what has been rung.
    pub(super) fn silence(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
    }

    /// Whether a worker at work may go on.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Lets the worker work under `permit`; it begins with a look at everything.
    pub(super) fn open(&self, permit: &StartPermit) {
        {
            let mut state = self.state();
            state.permit = Some(permit.clone());
            state.open = true;
        }
        self.open.store(true, Ordering::Release);
        self.ring();
    }

    /// Has the worker stop soon, without waiting for it. What is rung from now on is found when it is opened again.
    pub(super) fn hold(&self) {
        self.state().open = false;
        self.open.store(false, Ordering::Release);
    }

    /// Stops the worker and waits until it has.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.open = false;
        self.open.store(false, Ordering::Release);
        while state.working {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self) {
        self.state().ended = true;
        self.open.store(false, Ordering::Release);
        self.ring();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sleeps until one of `fds` has what it waits for, or for so long; errors count as having come.
pub(super) fn sleep(fds: &mut [PollFd<'_>], timeout: Option<Duration>) {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    // Whatever interrupts this, the caller looks at everything again.
    let _ = poll(fds, timeout.as_ref());
}

/// A worker at work. However that ends, nobody waits for it any more then.
struct Working<'a>(&'a Bell);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.state().working = false;
        self.0.changed.notify_all();
    }
}

/// A thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Worker {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread that does `work` whenever its bell has been rung, or what `work` waits for has come. It waits until
    /// the bell is opened.
    pub(super) fn start(
        name: String,
        bell: Arc<Bell>,
        mut work: impl FnMut(&Bell) -> Wait + Send + 'static,
    ) -> io::Result<Self> {
        let rung = bell.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let mut wait = Wait::Bell;
            loop {
                let mut fds = vec![PollFd::new(&*rung, PollFlags::IN)];
                if let Wait::Readable(fd) = &wait {
                    fds.push(PollFd::new(&**fd, PollFlags::IN));
                }
                sleep(&mut fds, None);
                rung.silence();
                {
                    let mut state = rung.state();
                    if state.ended {
                        return;
                    }
                    // A device may write as soon as it works, so it asks as a vCPU does.
                    if !state.open || !state.permit.as_ref().is_some_and(StartPermit::enter) {
                        wait = Wait::Bell;
                        continue;
                    }
                    state.working = true;
                }
                let _working = Working(&rung);
                wait = work(&rung);
            }
        })?;
        Ok(Self { bell, thread: Some(thread) })
    }

    /// Lets it work.
    pub(super) fn resume(&self, permit: &StartPermit) {
        self.bell.open(permit);
    }

    /// Has it stop soon, without waiting for it.
    pub(super) fn hold(&self) {
        self.bell.hold();
    }

    /// Stops it and waits until it has.
    pub(super) fn pause(&self) {
        self.bell.close();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.bell.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
