//! How fast a guest dirties its RAM, measured when somebody asks, without a migration or beside one.
//!
//! A measurement has a thread of its own, which ends with the guest's handle. What must stay true: at most one tracker of a
//! machine is started. So a measurement that needs one is refused while a migration runs, and a migration that begins ends
//! it and waits for that.

mod bounds;
mod measure;

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::{Cause, GuestError};
use crate::guest::Calls;
use crate::link::{contain, lock, spawn};
use crate::machine::{Machine, MachineError};
use crate::memory::TrackerError;
use measure::{Measured, Measurement};

/// How long a measurement may take.
pub const CALC_TIME: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(60);
/// Pages that may be sampled of each GiB.
pub const SAMPLE_PAGES: std::ops::RangeInclusive<u64> = 128..=16384;
const MIB: u64 = 1 << 20;

/// How it is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateMode {
    /// Some pages are compared with themselves a while later. Only reads RAM, so that it can be done beside a migration. Does
    /// not see a page that holds the same as before. It is an estimate, and rough when only a few samples have changed: the
    /// result says between which bounds.
    #[default]
    PageSampling,
    /// All pages that are written are counted, each once.
    DirtyBitmap,
    /// The same, shared out to the vCPUs by what each has dirtied: for machines that can tell them apart, such as those
    /// with dirty rings.
    DirtyRing,
}

/// What is to be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyRateRequest {
    /// For how long, of [`CALC_TIME`]. A page that is written several times meanwhile counts once.
    pub calc_time: Duration,
    /// How.
    pub mode: DirtyRateMode,
    /// Pages sampled of each GiB, of [`SAMPLE_PAGES`]; for page sampling.
    pub sample_pages: u64,
}

impl Default for DirtyRateRequest {
    fn default() -> Self {
        Self { calc_time: Duration::from_secs(1), mode: DirtyRateMode::default(), sample_pages: 512 }
    }
}

/// How far a measurement is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateStatus {
    /// None was made, or the last came to nothing.
    #[default]
    Unstarted,
    /// It is being made.
    Measuring,
    /// There is a result.
    Measured,
}

/// What is known of how fast the guest dirties its RAM.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRate {
    /// How far it is.
    pub status: DirtyRateStatus,
    /// How it is or was measured.
    pub mode: Option<DirtyRateMode>,
    /// When it began, in seconds since 1970.
    pub start_time_seconds: Option<f64>,
    /// How long it takes: what was asked for.
    pub calc_time_seconds: f64,
    /// Pages sampled of each GiB, where pages are sampled.
    pub sample_pages: Option<u64>,
    /// Bytes of RAM dirtied a second, once measured: each page once in all the time that it took.
    pub dirty_bytes_per_second: Option<u64>,
    /// The least that it is: it is no estimate where pages are counted. Where they are sampled, it is less than that in one of
    /// 40 measurements.
    #[serde(default)]
    pub at_least_bytes_per_second: Option<u64>,
    /// The most that it is, each page once in [`window_seconds`](Self::window_seconds). A guest that writes a page more often
    /// than that dirties it as fast as it likes: nothing that looks at pages can tell.
    #[serde(default)]
    pub at_most_bytes_per_second: Option<u64>,
    /// The shortest time within which a page was looked at twice.
    #[serde(default)]
    pub window_seconds: Option<f64>,
    /// Pages that were looked at, where pages are sampled.
    #[serde(default)]
    pub samples: Option<u64>,
    /// Sampled pages that had changed. If none had, no more is known of the rate than the most that it can be.
    #[serde(default)]
    pub changed_samples: Option<u64>,
    /// What each vCPU has of it, where they can be told apart.
    pub vcpus: Vec<VcpuDirtyRate>,
    /// Why the last measurement came to nothing.
    pub error: Option<String>,
}

impl DirtyRate {
    /// The rate in whole MiB a second, as QEMU counts it, but rounded up: 0 is of a guest of which no write was seen.
    pub fn dirty_mebibytes_per_second(&self) -> Option<u64> {
        self.dirty_bytes_per_second.map(|bytes| bytes.div_ceil(MIB))
    }
}

/// What a vCPU dirties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VcpuDirtyRate {
    /// Its number, from 0.
    pub vcpu: usize,
    /// Bytes of RAM a second.
    pub dirty_bytes_per_second: u64,
}

impl VcpuDirtyRate {
    /// The rate in whole MiB a second, as QEMU counts it, but rounded up.
    pub fn dirty_mebibytes_per_second(&self) -> u64 {
        self.dirty_bytes_per_second.div_ceil(MIB)
    }
}

/// Why a dirty rate cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyRateError {
    /// One at a time.
    #[error("the dirty rate is being measured already")]
    Measuring,
    /// The time is out of range.
    #[error("calc-time {calc_time:?}: it must be 50 ms to 60 s")]
    CalcTime {
        /// Asked for.
        calc_time: Duration,
    },
    /// The number of pages is out of range.
    #[error("sample-pages {sample_pages}: it must be 128 to 16384 pages of each GiB")]
    SamplePages {
        /// Asked for.
        sample_pages: u64,
    },
    /// A migration has the tracker.
    #[error(
        "a migration is running, which tracks the guest's writes: its report has the dirty rate; mode page-sampling works \
         beside it"
    )]
    Migrating,
    /// vCPUs cannot be told apart.
    #[error(
        "this machine cannot tell what each of its vCPUs dirties, for which it needs dirty rings; use mode dirty-bitmap or \
         page-sampling"
    )]
    NoRing,
    /// The guest is not here.
    #[error("{0}")]
    Guest(#[from] GuestError),
    /// Its writes cannot be tracked.
    #[error("could not track the guest's writes: {0}")]
    Machine(#[source] MachineError),
    /// The same.
    #[error("{0}")]
    Tracker(#[from] TrackerError),
    /// No thread.
    #[error("{0}")]
    Thread(#[source] Cause),
}

/// A measurement under way.
#[derive(Debug)]
struct Running {
    tracks: bool,
    /// It goes on for as long as this is kept.
    stay: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stay = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Measurements of a machine, one after the other.
pub(crate) struct DirtyRateService {
    machine: Arc<dyn Machine>,
    running: Mutex<Option<Running>>,
    /// Never held for long.
    state: Arc<Mutex<DirtyRate>>,
}

impl DirtyRateService {
    pub(crate) fn new(machine: Arc<dyn Machine>) -> Self {
        Self { machine, running: Mutex::default(), state: Arc::default() }
    }

    pub(crate) fn state(&self) -> DirtyRate {
        lock(&self.state).clone()
    }

    /// Begins one. `may_track` is asked whether the machine's writes may be tracked, when it is settled that no migration
    /// that begins later gets by without [`give_up_tracker`](Self::give_up_tracker).
    pub(crate) fn start(
        &self,
        calls: &Calls,
        request: &DirtyRateRequest,
        may_track: impl FnOnce() -> Result<(), DirtyRateError>,
    ) -> Result<(), DirtyRateError> {
        let DirtyRateRequest { calc_time, mode, sample_pages } = *request;
        if !CALC_TIME.contains(&calc_time) {
            return Err(DirtyRateError::CalcTime { calc_time });
        }
        if mode == DirtyRateMode::PageSampling && !SAMPLE_PAGES.contains(&sample_pages) {
            return Err(DirtyRateError::SamplePages { sample_pages });
        }
        let mut running = lock(&self.running);
        if lock(&self.state).status == DirtyRateStatus::Measuring {
            return Err(DirtyRateError::Measuring);
        }
        // The thread of the one before is about to end.
        *running = None;
        let tracks = mode != DirtyRateMode::PageSampling;
        if tracks {
            may_track()?;
        }
        let measurement = Measurement::begin(self.machine.clone(), calls, request)?;
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let begun = DirtyRate {
            status: DirtyRateStatus::Measuring,
            mode: Some(mode),
            start_time_seconds: Some(since_1970.as_secs_f64()),
            calc_time_seconds: calc_time.as_secs_f64(),
            sample_pages: (!tracks).then_some(sample_pages),
            ..DirtyRate::default()
        };
        let before = std::mem::replace(&mut *lock(&self.state), begun);
        let (stay, gone) = mpsc::channel();
        let state = self.state.clone();
        let thread = spawn("dirty rate", move || {
            let measured = contain("dirty rate", || measurement.finish(&gone));
            lock(&state).end(measured);
        });
        match thread {
            Ok(thread) => {
                *running = Some(Running { tracks, stay: Some(stay), thread: Some(thread) });
                Ok(())
            }
            Err(cause) => {
                *lock(&self.state) = before;
                Err(DirtyRateError::Thread(cause))
            }
        }
    }

    /// The guest is stopped and may leave: what is being measured would count time in which it did nothing. Does not wait.
    pub(crate) fn give_up(&self) {
        if let Ok(mut running) = self.running.try_lock()
            && let Some(running) = &mut *running
        {
            running.stay = None;
        }
    }

    /// Ends a measurement that has a tracker: somebody else needs one.
    pub(crate) fn give_up_tracker(&self) {
        let mut running = lock(&self.running);
        if running.as_ref().is_some_and(|running| running.tracks) {
            *running = None;
        }
    }
}

impl DirtyRate {
    fn end(&mut self, measured: Result<Option<Measured>, Cause>) {
        self.status = DirtyRateStatus::Unstarted;
        match measured {
            Ok(Some(measured)) => {
                self.status = DirtyRateStatus::Measured;
                let Measured { rates, window, samples, .. } = measured;
                self.dirty_bytes_per_second = Some(rates.estimate);
                self.at_least_bytes_per_second = Some(rates.at_least);
                self.at_most_bytes_per_second = Some(rates.at_most);
                self.window_seconds = Some(window.as_secs_f64());
                self.samples = samples.map(|samples| samples.all);
                self.changed_samples = samples.map(|samples| samples.changed);
                let each = measured.vcpus.into_iter().enumerate();
                self.vcpus =
                    each.map(|(vcpu, dirty_bytes_per_second)| VcpuDirtyRate { vcpu, dirty_bytes_per_second }).collect();
            }
            Ok(None) => {
                self.error = Some("a migration began, whose report has the dirty rate, or the guest left".to_owned())
            }
            Err(cause) => self.error = Some(cause.to_string()),
        }
    }
}
