//! When a vCPU's thread runs and when it sleeps: the pace of its program, and its throttle.
//!
//! A throttled vCPU runs for a slice of every period and sleeps at the gate for the rest, so that it is paused as soon as
//! any other. Both are kept in account: a slice that ends late is slept for, as far as the thread was running and did not
//! wait for a processor, and a sleep that lasts too long is made up for.
//!
//! The pace of a program stands for what a guest computes between its writes. So it counts the time that the vCPU may run
//! and not that of the clock: throttled by half, a vCPU does half of its steps, with a pace and without.
//!
//! What must stay true: a vCPU without throttle pays for it with a look at an atomic.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use crate::gate::Gate;

/// A slice and the sleep after it.
const PERIOD: Duration = Duration::from_millis(10);
/// No sleep is longer, whatever the account says.
const LONGEST_SLEEP: Duration = Duration::from_millis(250);
/// A vCPU goes ahead of its pace by up to this much before it sleeps,
const BATCH: Duration = Duration::from_millis(1);
/// and catches up on no more than this much.
const BACKLOG: Duration = Duration::from_millis(20);
/// The most that a vCPU is throttled.
const MAX_PERCENT: u8 = 99;

/// Time between two steps of 4096 bytes of each of so many vCPUs that come to `rate` bytes a second together.
pub(crate) fn pace(rate: u64, vcpus: u64) -> Duration {
    let nanoseconds = u128::from(vcpus) * 4096 * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

/// How much a vCPU is slowed, in percent of its time.
#[derive(Debug, Default)]
pub(crate) struct Throttle(AtomicU8);

impl Throttle {
    /// Who sleeps must be nudged afterwards.
    pub(crate) fn set(&self, percent: u8) {
        self.0.store(percent.min(MAX_PERCENT), Ordering::SeqCst);
    }

    fn percent(&self) -> u8 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Where a throttled vCPU is in its period.
#[derive(Debug, Clone, Copy)]
struct Slice {
    percent: u8,
    began: Instant,
    /// The thread's processor time at its beginning,
    processor: Duration,
    /// and the time since then that its program has waited by itself.
    waited: Duration,
    /// Nanoseconds of sleep that earlier slices have left, or of sleep that was too much.
    owed: i64,
}

impl Slice {
    fn new(percent: u8) -> Self {
        let mut slice =
            Self { percent, began: Instant::now(), processor: Duration::ZERO, waited: Duration::ZERO, owed: 0 };
        slice.begin();
        slice
    }

    fn begin(&mut self) {
        self.began = Instant::now();
        self.processor = processor_time();
        self.waited = Duration::ZERO;
    }

    fn length(&self) -> Duration {
        PERIOD * (100u32.saturating_sub(u32::from(self.percent))) / 100
    }

    fn end(&self) -> Instant {
        self.began + self.length()
    }

    /// The sleep that is owed if the slice ends now.
    fn owed_at(&self, now: Instant) -> i64 {
        let ran = processor_time().saturating_sub(self.processor).saturating_add(self.waited);
        let ran = nanoseconds(ran.max(self.length()).min(now.saturating_duration_since(self.began)));
        let percent = i64::from(self.percent);
        let sleep = ran.saturating_mul(percent) / 100i64.saturating_sub(percent).max(1);
        self.owed.saturating_add(sleep).min(nanoseconds(LONGEST_SLEEP))
    }
}

/// Of this thread, the guest's on it included.
fn processor_time() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)).unwrap_or_default()
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// The schedule of a vCPU's thread while the gate lets it run.
#[derive(Debug)]
pub(crate) struct Schedule<'a> {
    gate: &'a Gate,
    throttle: &'a Throttle,
    /// Time between two steps.
    pace: Option<Duration>,
    /// When the next step is due.
    due: Instant,
    slice: Option<Slice>,
}

impl<'a> Schedule<'a> {
    pub(crate) fn new(gate: &'a Gate, throttle: &'a Throttle, pace: Option<Duration>) -> Self {
        Self { gate, throttle, pace, due: Instant::now(), slice: None }
    }

    /// To be called between any two things that the vCPU does: sleeps if its slice is over, or the gate is closed, whichever is
    /// over first. Gives when the vCPU has to come here again; nothing while it is not throttled.
    pub(crate) fn pass(&mut self) -> Option<Instant> {
        let percent = self.throttle.percent();
        if percent == 0 {
            self.slice = None;
            return None;
        }
        let mut slice = self.slice.filter(|slice| slice.percent == percent).unwrap_or_else(|| Slice::new(percent));
        let now = Instant::now();
        if now >= slice.end() {
            let owed = slice.owed_at(now);
            let until = now + Duration::from_nanos(u64::try_from(owed).unwrap_or(0));
            self.gate.sleep_while(until, || self.throttle.percent() == percent);
            slice.begin();
            let slept = slice.began.saturating_duration_since(now);
            slice.owed = owed.saturating_sub(nanoseconds(slept)).max(-nanoseconds(PERIOD));
            self.due += slept;
        }
        self.slice = Some(slice);
        Some(slice.end())
    }

    /// After a step of a program that has a pace: sleeps until the next.
    pub(crate) fn step(&mut self) {
        let mut slice_end = self.pass();
        let Some(pace) = self.pace else { return };
        self.due += pace;
        let now = Instant::now();
        let batch = self.slice.map_or(BATCH, |slice| BATCH.min(slice.length() / 2));
        if self.due <= now + batch {
            if let Some(earliest) = now.checked_sub(BACKLOG) {
                self.due = self.due.max(earliest);
            }
            return;
        }
        while self.gate.is_open() && Instant::now() < self.due {
            let until = slice_end.map_or(self.due, |end| end.min(self.due));
            let (percent, began) = (self.throttle.percent(), Instant::now());
            self.gate.sleep_while(until, || self.throttle.percent() == percent);
            if let Some(slice) = &mut self.slice {
                slice.waited += began.elapsed();
            }
            slice_end = self.pass();
        }
    }
}
