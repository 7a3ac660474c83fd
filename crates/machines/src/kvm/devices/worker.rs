//! A device's thread, which works while the machine runs, and does for the machine what may take long.
//!
//! It sleeps in poll(2) on its bell and on what the device waits for. Storage can hang, so nobody waits for this thread without
//! a limit: what is asked of it is either answered in time or given up, and what comes of it late is undone by the thread
//! itself. What must stay true: after [`Bell::hold`] the thread finishes the request in hand and begins no other until
//! [`Bell::open`]; what it was asked is done in order, and never beside a request.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin::StartPermit;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// How long the end of a machine waits for threads that hang, all of them together. They are left behind then; they hold what
/// they use.
const END_LIMIT: Duration = Duration::from_millis(200);

/// Something to be done besides requests.
type Task = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// What it works under.
    permit: Option<StartPermit>,
    open: bool,
    /// It is to end, and is waited for until then.
    ends_by: Option<Instant>,
    /// The thread has ended.
    gone: bool,
    tasks: VecDeque<Task>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("open", &self.open).field("tasks", &self.tasks.len()).finish_non_exhaustive()
    }
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

    /// Has the worker end, without waiting for it.
    fn end(&self) {
        self.state().ends_by.get_or_insert_with(|| Instant::now() + END_LIMIT);
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

/// Where an answer stands.
#[derive(Debug)]
enum Stage<R> {
    Waited,
    Answered(R),
    GivenUp,
}

#[derive(Debug)]
struct Answer<R> {
    stage: Mutex<Stage<R>>,
    changed: Condvar,
}

impl<R> Answer<R> {
    fn stage(&self) -> MutexGuard<'_, Stage<R>> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a worker was asked to do.
#[derive(Debug)]
pub(super) struct Asked<R>(Arc<Answer<R>>);

impl<R> Asked<R> {
    /// Waits for the answer until then. Nothing if there is none: what was asked is not begun any more, or is undone when it
    /// has been done.
    pub(super) fn wait(self, deadline: Instant) -> Option<R> {
        let mut stage = self.0.stage();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match std::mem::replace(&mut *stage, Stage::GivenUp) {
                Stage::Answered(answer) => return Some(answer),
                Stage::Waited if !left.is_zero() => *stage = Stage::Waited,
                Stage::Waited | Stage::GivenUp => return None,
            }
            stage = self.0.changed.wait_timeout(stage, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The thread has ended, however that was.
struct Gone<'a>(&'a Bell);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.state().gone = true;
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
            let _gone = Gone(&rung);
            let mut wait = Wait::Bell;
            loop {
                let mut fds = vec![PollFd::new(&*rung, PollFlags::IN)];
                if let Wait::Readable(fd) = &wait {
                    fds.push(PollFd::new(&**fd, PollFlags::IN));
                }
                sleep(&mut fds, None);
                rung.silence();
                let mut state = rung.state();
                if state.ends_by.is_some() {
                    return;
                }
                if let Some(task) = state.tasks.pop_front() {
                    drop(state);
                    task();
                    // There may be another, and requests.
                    rung.ring();
                } else if state.open && state.permit.as_ref().is_some_and(StartPermit::enter) {
                    // A device may write as soon as it works, so it asks as a vCPU does.
                    drop(state);
                    wait = work(&rung);
                } else {
                    wait = Wait::Bell;
                }
            }
        })?;
        Ok(Self { bell, thread: Some(thread) })
    }

    /// Has the thread do `what`, after the request in hand. If nobody waits for the answer any more when it is there, the
    /// thread does `undo` as well; if nobody does when it could begin, it does neither.
    pub(super) fn ask<R: Send + 'static>(
        &self,
        what: impl FnOnce() -> R + Send + 'static,
        undo: impl FnOnce(R) + Send + 'static,
    ) -> Asked<R> {
        let answer = Arc::new(Answer { stage: Mutex::new(Stage::Waited), changed: Condvar::new() });
        let asked = answer.clone();
        let task = move || {
            if matches!(*asked.stage(), Stage::GivenUp) {
                return;
            }
            let done = what();
            let mut stage = asked.stage();
            if matches!(*stage, Stage::GivenUp) {
                drop(stage);
                undo(done);
            } else {
                *stage = Stage::Answered(done);
                asked.changed.notify_all();
            }
        };
        self.order(task);
        Asked(answer)
    }

    /// Has the thread do something that nobody waits for.
    pub(super) fn order(&self, task: impl FnOnce() + Send + 'static) {
        self.bell.state().tasks.push_back(Box::new(task));
        self.bell.ring();
    }

    /// Lets it work.
    pub(super) fn resume(&self, permit: &StartPermit) {
        self.bell.open(permit);
    }

    /// Has it stop after the request in hand, without waiting for that.
    pub(super) fn hold(&self) {
        self.bell.hold();
    }

    /// Has it end after what is in hand, without waiting for that.
    pub(super) fn end(&self) {
        self.bell.end();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.bell.end();
        let state = self.bell.state();
        let left = state.ends_by.map_or(END_LIMIT, |end| end.saturating_duration_since(Instant::now()));
        let waited = self.bell.changed.wait_timeout_while(state, left, |state| !state.gone);
        let gone = waited.unwrap_or_else(PoisonError::into_inner).0.gone;
        if let Some(thread) = self.thread.take().filter(|_| gone) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn those_that_hang_share_one_limit_at_the_end() {
        const COUNT: usize = 8;
        let (mut hung, mut workers) = (Vec::new(), Vec::new());
        let (begun, begins) = mpsc::channel();
        for _ in 0..COUNT {
            let bell = Arc::new(Bell::new().unwrap());
            let worker = Worker::start("test".to_owned(), bell, |_| Wait::Bell).unwrap();
            let (release, released) = mpsc::channel::<()>();
            let begun = begun.clone();
            worker.order(move || {
                begun.send(()).unwrap();
                let _ = released.recv();
            });
            hung.push(release);
            workers.push(worker);
        }
        for _ in 0..COUNT {
            begins.recv().unwrap();
        }
        workers.iter().for_each(Worker::end);
        let began = Instant::now();
        drop(workers);
        let took = began.elapsed();
        assert!(took < END_LIMIT * 4, "{COUNT} threads that hang took {took:?}");
    }
}
