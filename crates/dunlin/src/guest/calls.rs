//! The VMM's own code, called with a bound.
//!
//! `Machine`'s methods run on one thread of their own, one at a time, and whoever called waits for a limited time. Code that
//! hangs or panics then costs an error and not a lock or a thread of the engine's. What must stay true: a call that was
//! given up before it began never begins; what one that was given up later returns is dropped.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use std::time::{Duration, Instant};

use crate::error::{Cause, GuestError, MachineStep};
use crate::guest::taken::{Expected, Taken};
use crate::link::{CpuTime, contain};
use crate::machine::{Machine, MachineError, StateSection, SwitchoverCost};
use crate::sync::mpsc::{self, RecvTimeoutError, Sender};
use crate::sync::{JoinHandle, Mutex, lock, now, sleep, spawn};

/// A call that failed has shown how long it takes if it took longer than this.
const FAILED_LATE: Duration = Duration::from_millis(100);
/// How long dropping waits for a call under way.
const PATIENCE: Duration = Duration::from_millis(200);

type Body = Box<dyn FnOnce(&dyn Machine) + Send>;

struct Job {
    step: MachineStep,
    /// Set by whoever comes first: the thread, to do it, or the caller, to give it up.
    taken: Arc<AtomicBool>,
    body: Body,
}

/// What the thread is at, and since when.
type Current = Arc<Mutex<Option<(MachineStep, Instant)>>>;

struct Worker {
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

/// A machine's methods, called one at a time.
pub(crate) struct Calls {
    machine: Arc<dyn Machine>,
    worker: Mutex<Option<Worker>>,
    current: Current,
    taken: Arc<Mutex<Taken>>,
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").field("current", &*lock(&self.current)).finish_non_exhaustive()
    }
}

impl Calls {
    pub(crate) fn new(machine: Arc<dyn Machine>) -> Self {
        Self { machine, worker: Mutex::default(), current: Arc::default(), taken: Arc::default() }
    }

    /// What the machine is busy with, and since when.
    pub(crate) fn current(&self) -> Option<(MachineStep, Instant)> {
        *lock(&self.current)
    }

    /// Calls `body` and waits for its answer, `limit` at most. Its CPU time is added to `cpu`.
    ///
    /// # Errors
    /// What `body` returned; that it panicked; that it took too long, or that another call is in its way.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        step: MachineStep,
        limit: Duration,
        cpu: &Arc<CpuTime>,
        body: impl FnOnce(&dyn Machine) -> Result<T, MachineError> + Send + 'static,
    ) -> Result<T, GuestError> {
        let (answer, answered) = mpsc::channel();
        let taken = Arc::new(AtomicBool::new(false));
        let (cpu, noted) = (cpu.clone(), self.taken.clone());
        let body: Body = Box::new(move |machine| {
            let result = {
                let _meter = cpu.meter();
                let began = now();
                let result = contain("machine", || Ok(body(machine)));
                let took = now().saturating_duration_since(began);
                // What fails at once would have taken longer; what fails late would take as long again.
                if matches!(result, Ok(Ok(_))) || took > FAILED_LATE {
                    lock(&noted).note(step, now(), took);
                }
                result
            };
            let _ = answer.send(match result {
                Ok(result) => result.map_err(|source| GuestError::Machine { step, source }),
                Err(Cause::Thread { what, .. }) => Err(GuestError::MachinePanicked { step, what }),
                Err(cause) => Err(GuestError::Machine { step, source: cause.into() }),
            });
        });
        self.submit(Job { step, taken: taken.clone(), body })?;
        match answered.recv_timeout(limit) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) if taken.swap(true, Ordering::AcqRel) => {
                // It may have come in this very moment.
                answered.try_recv().unwrap_or(Err(GuestError::MachineTooSlow { step, limit }))
            }
            Err(_) => {
                let (at, since) =
                    self.current().map_or((step, limit), |(at, since)| (at, now().saturating_duration_since(since)));
                Err(GuestError::MachineBusy { step, at, since })
            }
        }
    }

    /// A call elsewhere on the same machine has taken `took`.
    pub(crate) fn note(&self, step: MachineStep, took: Duration) {
        lock(&self.taken).note(step, now(), took);
    }

    /// The device state is `sections`.
    pub(crate) fn note_state(&self, sections: &[StateSection]) -> u64 {
        let bytes = sections.iter().map(|section| section.data.len() as u64).fold(0, u64::saturating_add);
        lock(&self.taken).note_state(now(), bytes);
        bytes
    }

    /// What the machine says that a switchover costs.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub(crate) fn declared_cost(&self, limit: Duration, cpu: &Arc<CpuTime>) -> Result<SwitchoverCost, GuestError> {
        self.call(MachineStep::Cost, limit, cpu, |machine| Ok(machine.switchover_cost()))
    }

    /// What it will cost, by that and by what it lately did.
    pub(crate) fn expect(&self, declared: SwitchoverCost) -> Expected {
        lock(&self.taken).expect(declared, now())
    }

    /// Has `body` called when its turn comes; nobody waits for it.
    pub(crate) fn follow_up(&self, step: MachineStep, body: impl FnOnce(&dyn Machine) + Send + 'static) {
        let body: Body = Box::new(move |machine| {
            let _ = contain("machine", || {
                body(machine);
                Ok(())
            });
        });
        let _ = self.submit(Job { step, taken: Arc::default(), body });
    }

    fn submit(&self, job: Job) -> Result<(), GuestError> {
        let mut worker = lock(&self.worker);
        let job = match &*worker {
            Some(Worker { jobs, .. }) => match jobs.send(job) {
                Ok(()) => return Ok(()),
                Err(mpsc::SendError(job)) => job,
            },
            None => job,
        };
        let step = job.step;
        let (jobs, queue) = mpsc::channel::<Job>();
        let (machine, current) = (self.machine.clone(), self.current.clone());
        let thread = spawn("machine", move || {
            for job in queue {
                // Both in one step: who is told what the machine is at must not find nothing.
                let mut at = lock(&current);
                if job.taken.swap(true, Ordering::AcqRel) {
                    continue;
                }
                *at = Some((job.step, now()));
                drop(at);
                (job.body)(&*machine);
                *lock(&current) = None;
            }
        })
        .map_err(|cause| GuestError::Machine { step, source: cause.into() })?;
        let _ = jobs.send(job);
        *worker = Some(Worker { jobs, thread });
        Ok(())
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        if let Some(Worker { jobs, thread }) = lock(&self.worker).take() {
            drop(jobs);
            // One that hangs in the VMM's code is left behind: nobody could wait for it.
            let deadline = now() + PATIENCE;
            while !thread.is_finished() && now() < deadline {
                sleep(Duration::from_micros(50));
            }
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}
