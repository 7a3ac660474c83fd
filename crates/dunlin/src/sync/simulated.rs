//! A scheduler for tests.
//!
//! A [`Simulation`] runs real threads, of which exactly one runs at any time: at each *point* (a lock, a wait, a message, a
//! look at the clock, a step of the VMM's code) it decides by a seed which thread goes on. Time is the simulation's: it
//! goes on when nothing else can, and now and then by itself. Each thread belongs to a host (or to none), which can be
//! frozen, suspended and killed. If no thread can ever go on, that is a deadlock, and a failure.
//!
//! Threads that belong to no simulation get what the standard library does.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LockResult, OnceLock, PoisonError, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::Fault;
use crate::error::Cause;

/// Hosts that a thread may belong to, besides 0, which stands for none and does not fail.
const HOSTS: usize = 3;
/// Points after which a schedule counts as one that never ends.
const MAX_POINTS: u64 = 150_000;
/// No thread runs.
const NOBODY: usize = usize::MAX;

thread_local! {
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
}

#[derive(Clone)]
struct Here {
    simulation: Simulation,
    me: usize,
    host: usize,
}

/// What unwinds a thread whose simulation is over.
struct Over;

/// Numbers from a seed.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678_9abc_def1))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Once in `times`.
    pub(crate) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Runs,
    Waits { at: usize, until: Option<Duration> },
    Ended,
}

struct Task {
    name: &'static str,
    host: usize,
    doing: Doing,
    timed_out: bool,
    priority: u64,
    thread: Option<Thread>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Host {
    frozen: Option<Frozen>,
    dead: bool,
    /// How long it was suspended.
    lost: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Frozen {
    since: Duration,
    until: Duration,
    suspended: bool,
}

/// Which thread goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Any.
    Any,
    /// Mostly the one that runs.
    Same,
    /// The one of the highest priority, but for a few changes at random points.
    Priority,
}

struct Core {
    tasks: Vec<Task>,
    threads: Vec<std::thread::JoinHandle<()>>,
    hosts: [Host; HOSTS],
    now: Duration,
    points: u64,
    random: Random,
    order: Order,
    changes: Vec<u64>,
    failed: Option<String>,
    done: bool,
    log: Vec<String>,
    fault: Option<Fault>,
    /// When a person looked at the other side, and for how long what was seen holds.
    looked: Option<(Duration, Duration)>,
    /// A person decided on what did not hold any more.
    careless: bool,
}

struct Inner {
    core: std::sync::Mutex<Core>,
    current: AtomicUsize,
    over: AtomicBool,
    ended: std::sync::Condvar,
    logs: bool,
}

/// Threads that run one at a time.
#[derive(Clone)]
pub(crate) struct Simulation(Arc<Inner>);

impl Simulation {
    /// Runs `body`, and what it starts, in the order that `seed` says. `Err` tells what went wrong: a panic, a deadlock, or
    /// what was told to [`fail`]. Ends when `body` does.
    pub(crate) fn run(
        seed: u64,
        fault: Option<Fault>,
        logs: bool,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<Vec<String>, String> {
        let mut random = Random::new(seed);
        let order = [Order::Any, Order::Same, Order::Priority, Order::Priority][random.below(4) as usize];
        let changes = (0..random.below(6)).map(|_| random.below(2500)).collect();
        let simulation = Self(Arc::new(Inner {
            core: std::sync::Mutex::new(Core {
                tasks: Vec::new(),
                threads: Vec::new(),
                hosts: [Host::default(); HOSTS],
                now: Duration::from_secs(1000),
                points: 0,
                random,
                order,
                changes,
                failed: None,
                done: false,
                log: Vec::new(),
                fault,
                looked: None,
                careless: false,
            }),
            current: AtomicUsize::new(NOBODY),
            over: AtomicBool::new(false),
            ended: std::sync::Condvar::new(),
            logs,
        }));
        let first = simulation.start("model", 0, move |simulation| {
            body();
            let mut core = simulation.core();
            core.done = true;
            simulation.0.over.store(true, Ordering::Release);
            simulation.0.ended.notify_all();
        });
        simulation.0.current.store(first, Ordering::Release);
        let mut core = simulation.core();
        if let Some(thread) = core.tasks.first().and_then(|task| task.thread.clone()) {
            thread.unpark();
        }
        while !core.done {
            core = simulation.0.ended.wait(core).unwrap_or_else(PoisonError::into_inner);
        }
        simulation.0.over.store(true, Ordering::Release);
        // Those who were not at their end unwind.
        loop {
            let threads = std::mem::take(&mut core.threads);
            core.tasks.iter().filter_map(|task| task.thread.as_ref()).for_each(Thread::unpark);
            drop(core);
            if threads.is_empty() {
                break;
            }
            threads.into_iter().for_each(|thread| drop(thread.join()));
            core = simulation.core();
        }
        let mut core = simulation.core();
        let log = std::mem::take(&mut core.log);
        match core.failed.take() {
            None => Ok(log),
            Some(failed) => Err(format!("{failed}\n{}", log.join("\n"))),
        }
    }

    fn core(&self) -> std::sync::MutexGuard<'_, Core> {
        self.0.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn over(&self) -> bool {
        self.0.over.load(Ordering::Acquire)
    }

    fn start(&self, name: &'static str, host: usize, body: impl FnOnce(&Self) + Send + 'static) -> usize {
        let mut core = self.core();
        let me = core.tasks.len();
        let priority = core.random.next() | 1 << 63;
        core.tasks.push(Task { name, host, doing: Doing::Runs, timed_out: false, priority, thread: None });
        let simulation = self.clone();
        let thread = std::thread::Builder::new().stack_size(512 << 10).spawn(move || {
            HERE.set(Some(Here { simulation: simulation.clone(), me, host }));
            let ended = catch_unwind(AssertUnwindSafe(|| {
                simulation.await_turn(me);
                body(&simulation);
            }));
            if let Err(panic) = ended
                && !panic.is::<Over>()
            {
                simulation.fail(format!("{name} panicked: {}", words(&*panic)));
            }
            HERE.set(None);
            let mut core = simulation.core();
            core.wake(JOIN | me);
            if let Some(task) = core.tasks.get_mut(me) {
                task.doing = Doing::Ended;
            }
            if !simulation.over() {
                simulation.hand_on(core, NOBODY);
            }
        });
        let thread = thread.expect("a thread of the simulation");
        if let Some(task) = core.tasks.get_mut(me) {
            task.thread = Some(thread.thread().clone());
        }
        core.threads.push(thread);
        me
    }

    /// Ends it with an error.
    fn fail(&self, why: String) {
        let mut core = self.core();
        core.failed.get_or_insert(why);
        core.done = true;
        self.0.over.store(true, Ordering::Release);
        self.0.ended.notify_all();
    }

    fn await_turn(&self, me: usize) {
        while self.0.current.load(Ordering::Acquire) != me {
            if self.over() {
                unwind();
                return;
            }
            std::thread::park();
        }
        if self.over() {
            unwind();
        }
    }

    /// Has somebody go on, `me` perhaps.
    fn hand_on(&self, mut core: std::sync::MutexGuard<'_, Core>, me: usize) {
        match core.choose(me) {
            Some(next) => {
                let thread = core.tasks.get(next).and_then(|task| task.thread.clone());
                drop(core);
                self.0.current.store(next, Ordering::Release);
                if next != me
                    && let Some(thread) = thread
                {
                    thread.unpark();
                }
            }
            None => {
                let waits: Vec<_> = core
                    .tasks
                    .iter()
                    .filter(|task| task.doing != Doing::Ended)
                    .map(|task| format!("{} at {:?}", task.name, task.doing))
                    .collect();
                drop(core);
                self.fail(format!("nobody can go on: {}", waits.join(", ")));
            }
        }
    }
}

/// What waits for a thread's end waits here.
const JOIN: usize = 1 << 63;

impl Core {
    fn wake(&mut self, at: usize) {
        for task in &mut self.tasks {
            if matches!(task.doing, Doing::Waits { at: there, .. } if there == at) {
                task.doing = Doing::Runs;
            }
        }
    }

    fn can_run(&self, index: usize) -> bool {
        let Some(task) = self.tasks.get(index) else { return false };
        task.doing == Doing::Runs && self.lives(task.host)
    }

    fn lives(&self, host: usize) -> bool {
        self.hosts.get(host).is_some_and(|host| !host.dead && host.frozen.is_none())
    }

    fn choose(&mut self, me: usize) -> Option<usize> {
        loop {
            let able: Vec<usize> = (0..self.tasks.len()).filter(|index| self.can_run(*index)).collect();
            if able.is_empty() {
                let deadlines =
                    self.tasks.iter().filter(|task| self.lives(task.host)).filter_map(|task| match task.doing {
                        Doing::Waits { until, .. } => until,
                        _ => None,
                    });
                let thaws = self.hosts.iter().filter_map(|host| host.frozen).map(|frozen| frozen.until);
                let next = deadlines.chain(thaws).min()?;
                self.advance_to(next.max(self.now));
                continue;
            }
            let any = |random: &mut Random| able.get(random.below(able.len() as u64) as usize).copied();
            return match self.order {
                Order::Any => any(&mut self.random),
                Order::Same if able.contains(&me) && !self.random.one_in(12) => Some(me),
                Order::Same => any(&mut self.random),
                Order::Priority => {
                    if self.changes.contains(&self.points) || self.random.one_in(2000) {
                        let lowest = self.random.next() >> 32;
                        if let Some(task) = self.tasks.get_mut(me) {
                            task.priority = lowest;
                        }
                    }
                    able.iter().copied().max_by_key(|index| self.tasks.get(*index).map(|task| task.priority))
                }
            };
        }
    }

    fn advance_to(&mut self, now: Duration) {
        self.now = now;
        for index in 0..HOSTS {
            let Some(host) = self.hosts.get_mut(index) else { continue };
            let Some(frozen) = host.frozen.filter(|frozen| frozen.until <= now) else { continue };
            host.frozen = None;
            if !frozen.suspended {
                continue;
            }
            let lost = now.saturating_sub(frozen.since);
            host.lost += lost;
            for task in self.tasks.iter_mut().filter(|task| task.host == index) {
                if let Doing::Waits { until: Some(until), .. } = &mut task.doing {
                    *until += lost;
                }
            }
        }
        let hosts = self.hosts;
        for task in &mut self.tasks {
            let lives = hosts.get(task.host).is_some_and(|host| !host.dead && host.frozen.is_none());
            if lives && matches!(task.doing, Doing::Waits { until: Some(until), .. } if until <= now) {
                task.doing = Doing::Runs;
                task.timed_out = true;
            }
        }
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given").to_owned()
}

fn unwind() {
    if !std::thread::panicking() {
        resume_unwind(Box::new(Over));
    }
}

fn here() -> Option<Here> {
    HERE.try_with(|here| here.borrow().clone()).ok().flatten()
}

/// Another thread may go on here.
pub(crate) fn point() {
    let Some(Here { simulation, me, .. }) = here() else { return };
    if simulation.over() {
        return unwind();
    }
    let mut core = simulation.core();
    core.points += 1;
    if core.points > MAX_POINTS {
        drop(core);
        simulation.fail("it does not come to an end".to_owned());
        return unwind();
    }
    let tick = core.now + Duration::from_micros(1);
    // Now and then whoever runs is slow.
    let slow = core.random.one_in(150).then(|| Duration::from_micros(1 << core.random.below(22)));
    core.advance_to(tick + slow.unwrap_or_default());
    simulation.hand_on(core, me);
    simulation.await_turn(me);
}

/// Waits until somebody wakes `at`, or until then; tells whether that was first.
fn wait_at(at: usize, limit: Option<Duration>) -> bool {
    let Some(Here { simulation, me, .. }) = here() else { return false };
    if simulation.over() {
        unwind();
        return false;
    }
    let mut core = simulation.core();
    core.points += 1;
    let until = limit.map(|limit| core.now.saturating_add(limit));
    if let Some(task) = core.tasks.get_mut(me) {
        task.doing = Doing::Waits { at, until };
        task.timed_out = false;
    }
    simulation.hand_on(core, me);
    simulation.await_turn(me);
    simulation.core().tasks.get(me).is_some_and(|task| task.timed_out)
}

fn wake(at: usize) {
    if let Some(Here { simulation, .. }) = here() {
        simulation.core().wake(at);
    }
}

/// What a test has to say to the simulation that it runs in.
pub(crate) mod control {
    use super::*;

    /// Ends the simulation with an error.
    pub(crate) fn fail(why: impl Into<String>) {
        let Some(Here { simulation, .. }) = here() else { return };
        if !simulation.over() {
            simulation.fail(why.into());
        }
        unwind();
    }

    /// A line for who looks into a schedule.
    pub(crate) fn note(line: impl FnOnce() -> String) {
        let Some(Here { simulation, me, .. }) = here() else { return };
        // Also where nobody looks: it may be a step of the schedule.
        let text = line();
        if simulation.0.logs {
            let mut core = simulation.core();
            let name = core.tasks.get(me).map_or("", |task| task.name);
            let host = core.tasks.get(me).map_or(0, |task| task.host);
            let line = format!("{:12.6} {host} {name}: {}", core.now.as_secs_f64() - 1000.0, text);
            core.log.push(line);
        }
    }

    pub(crate) fn random<T>(draw: impl FnOnce(&mut Random) -> T) -> T {
        match here() {
            Some(Here { simulation, .. }) => draw(&mut simulation.core().random),
            None => draw(&mut Random::new(0)),
        }
    }

    /// Starts a thread of `host`.
    pub(crate) fn spawn_on(host: usize, name: &'static str, body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        match here() {
            Some(Here { simulation, .. }) => JoinHandle::Simulated(simulation.start(name, host, |_| body())),
            None => JoinHandle::Real(std::thread::spawn(body)),
        }
    }

    /// No thread of `host` runs for so long; with `suspended` its clock stands still as well.
    pub(crate) fn freeze(host: usize, duration: Duration, suspended: bool) {
        if let Some(Here { simulation, .. }) = here() {
            let mut core = simulation.core();
            let (since, until) = (core.now, core.now + duration);
            if let Some(host) = core.hosts.get_mut(host) {
                host.frozen.get_or_insert(Frozen { since, until, suspended });
            }
        }
        point();
    }

    pub(crate) fn is_frozen(host: usize) -> bool {
        here().is_some_and(|here| here.simulation.core().hosts.get(host).is_some_and(|host| host.frozen.is_some()))
    }

    /// No thread of `host` runs any more.
    pub(crate) fn kill(host: usize) {
        if let Some(Here { simulation, .. }) = here()
            && let Some(host) = simulation.core().hosts.get_mut(host)
        {
            host.dead = true;
        }
        point();
    }

    /// A person has seen something that holds for so long.
    pub(crate) fn looked(holds: Duration) {
        if let Some(Here { simulation, .. }) = here() {
            let mut core = simulation.core();
            core.looked = Some((core.now, holds));
        }
    }

    /// A person decides on nothing.
    pub(crate) fn be_careless() {
        if let Some(Here { simulation, .. }) = here() {
            simulation.core().careless = true;
        }
    }

    /// The engine has found that a person may decide.
    pub(crate) fn may_decide() {
        if let Some(Here { simulation, .. }) = here() {
            let mut core = simulation.core();
            if core.looked.is_none_or(|(since, holds)| core.now > since + holds) {
                core.careless = true;
            }
        }
    }

    pub(crate) fn was_careless() -> bool {
        here().is_some_and(|here| here.simulation.core().careless)
    }
}

/// Whether an old behaviour was put back.
pub(crate) fn seeded(fault: Fault) -> bool {
    here().is_some_and(|here| here.simulation.core().fault == Some(fault))
}

pub(crate) fn now() -> Instant {
    point();
    time()
}

/// As [`now`], for who may not be interrupted.
fn time() -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    match here() {
        None => Instant::now(),
        Some(Here { simulation, host, .. }) => {
            let core = simulation.core();
            let lost = core.hosts.get(host).map_or(Duration::ZERO, |host| host.lost);
            *BASE.get_or_init(Instant::now) + core.now.saturating_sub(lost)
        }
    }
}

pub(crate) fn boot_time() -> Duration {
    point();
    match here() {
        None => Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default(),
        Some(Here { simulation, .. }) => simulation.core().now,
    }
}

pub(crate) fn sleep(duration: Duration) {
    match here() {
        None => std::thread::sleep(duration),
        Some(_) => drop(wait_at(0, Some(duration))),
    }
}

/// A thread.
pub(crate) enum JoinHandle<T> {
    Real(std::thread::JoinHandle<T>),
    Simulated(usize),
}

impl JoinHandle<()> {
    pub(crate) fn is_finished(&self) -> bool {
        match self {
            Self::Real(thread) => thread.is_finished(),
            Self::Simulated(task) => here().is_none_or(|here| {
                here.simulation.over()
                    || here.simulation.core().tasks.get(*task).is_none_or(|task| task.doing == Doing::Ended)
            }),
        }
    }

    pub(crate) fn join(self) -> std::thread::Result<()> {
        if let Self::Real(thread) = self {
            return thread.join();
        }
        while let Self::Simulated(task) = &self
            && !self.is_finished()
        {
            wait_at(JOIN | task, None);
        }
        Ok(())
    }
}

pub(crate) fn spawn(name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Cause> {
    match here() {
        None => crate::link::spawn(name, body).map(JoinHandle::Real),
        Some(Here { host, .. }) => Ok(control::spawn_on(host, name, body)),
    }
}

/// A lock.
#[derive(Default)]
pub(crate) struct Mutex<T: ?Sized> {
    /// Has an address also where `T` has no size.
    _place: u8,
    inner: std::sync::Mutex<T>,
}

impl<T: fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    inner: Option<std::sync::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { _place: 0, inner: std::sync::Mutex::new(value) }
    }

    fn place(&self) -> usize {
        std::ptr::from_ref(&self._place).addr()
    }

    fn raw(&self) -> MutexGuard<'_, T> {
        MutexGuard { mutex: self, inner: Some(self.inner.lock().unwrap_or_else(PoisonError::into_inner)) }
    }

    pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        let Some(Here { simulation, .. }) = here() else { return Ok(self.raw()) };
        point();
        loop {
            if simulation.over() {
                return Ok(self.raw());
            }
            let inner = match self.inner.try_lock() {
                Ok(inner) => inner,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    wait_at(self.place(), None);
                    continue;
                }
            };
            return Ok(MutexGuard { mutex: self, inner: Some(inner) });
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.inner.as_ref().expect("held")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().expect("held")
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        if self.inner.take().is_some() {
            wake(self.mutex.place());
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A condition.
#[derive(Debug, Default)]
pub(crate) struct Condvar {
    place: u8,
    inner: std::sync::Condvar,
}

/// Whether a wait has timed out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TimedOut(#[allow(dead_code)] bool);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn place(&self) -> usize {
        std::ptr::from_ref(&self.place).addr()
    }

    fn wait_for<'a, T>(&self, mut guard: MutexGuard<'a, T>, limit: Option<Duration>) -> (MutexGuard<'a, T>, TimedOut) {
        let mutex = guard.mutex;
        let Some(inner) = guard.inner.take() else { return (guard, TimedOut(true)) };
        if here().is_some() {
            drop(inner);
            wake(mutex.place());
            let timed_out = wait_at(self.place(), limit);
            return (lock(mutex), TimedOut(timed_out));
        }
        let (inner, timed_out) = match limit {
            None => (self.inner.wait(inner).unwrap_or_else(PoisonError::into_inner), false),
            Some(limit) => {
                let (inner, out) = self.inner.wait_timeout(inner, limit).unwrap_or_else(PoisonError::into_inner);
                (inner, out.timed_out())
            }
        };
        (MutexGuard { mutex, inner: Some(inner) }, TimedOut(timed_out))
    }

    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        Ok(self.wait_for(guard, None).0)
    }

    pub(crate) fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        limit: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, TimedOut)> {
        Ok(self.wait_for(guard, Some(limit)))
    }

    pub(crate) fn notify_all(&self) {
        wake(self.place());
        self.inner.notify_all();
    }
}

/// Queues between threads.
pub(crate) mod mpsc {
    use super::*;
    pub(crate) use std::sync::mpsc::{RecvTimeoutError, SendError, TryRecvError};

    struct Queue<T> {
        items: VecDeque<T>,
        received: bool,
    }

    struct Channel<T> {
        queue: Mutex<Queue<T>>,
        /// Counted without the lock: who clones or drops one may hold locks that are not the simulation's.
        senders: AtomicUsize,
        changed: Condvar,
    }

    pub(crate) struct Sender<T>(Arc<Channel<T>>);
    pub(crate) struct Receiver<T>(Arc<Channel<T>>);

    pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let queue = Mutex::new(Queue { items: VecDeque::new(), received: true });
        let channel = Arc::new(Channel { queue, senders: AtomicUsize::new(1), changed: Condvar::new() });
        (Sender(channel.clone()), Receiver(channel))
    }

    impl<T> Sender<T> {
        pub(crate) fn send(&self, item: T) -> Result<(), SendError<T>> {
            let mut queue = lock(&self.0.queue);
            if !queue.received {
                return Err(SendError(item));
            }
            queue.items.push_back(item);
            drop(queue);
            self.0.changed.notify_all();
            Ok(())
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.senders.fetch_add(1, Ordering::AcqRel);
            Self(self.0.clone())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.senders.fetch_sub(1, Ordering::AcqRel);
            if here().is_none() {
                // Nobody is between looking and waiting.
                drop(self.0.queue.raw());
            }
            self.0.changed.notify_all();
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn recv_timeout(&self, limit: Duration) -> Result<T, RecvTimeoutError> {
            self.within(Some(limit))
        }

        fn within(&self, limit: Option<Duration>) -> Result<T, RecvTimeoutError> {
            let deadline = limit.and_then(|limit| now().checked_add(limit));
            let mut queue = lock(&self.0.queue);
            loop {
                if let Some(item) = queue.items.pop_front() {
                    return Ok(item);
                }
                if self.0.senders.load(Ordering::Acquire) == 0 {
                    return Err(RecvTimeoutError::Disconnected);
                }
                // With the queue locked nobody else may go on: the other end may be another host's, which must not wait for
                // one that is frozen or dead.
                let left = deadline.map(|deadline| deadline.saturating_duration_since(time()));
                if left == Some(Duration::ZERO) {
                    return Err(RecvTimeoutError::Timeout);
                }
                queue = self.0.changed.wait_for(queue, left).0;
                if here().is_some_and(|here| here.simulation.over()) {
                    return Err(RecvTimeoutError::Disconnected);
                }
            }
        }

        pub(crate) fn try_recv(&self) -> Result<T, TryRecvError> {
            let mut queue = lock(&self.0.queue);
            match queue.items.pop_front() {
                Some(item) => Ok(item),
                None if self.0.senders.load(Ordering::Acquire) == 0 => Err(TryRecvError::Disconnected),
                None => Err(TryRecvError::Empty),
            }
        }
    }

    impl<T> Iterator for Receiver<T> {
        type Item = T;

        fn next(&mut self) -> Option<T> {
            self.within(None).ok()
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            let items = {
                let mut queue = lock(&self.0.queue);
                queue.received = false;
                std::mem::take(&mut queue.items)
            };
            drop(items);
        }
    }
}
