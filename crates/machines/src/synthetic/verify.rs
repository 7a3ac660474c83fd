//! Proving that RAM is what the program says: no write lost, none from the future, no byte changed.

use std::fmt;

use dunlin::memory::RamBlock;
use serde::Serialize;

use super::content::{self, Page};
use super::device::Device;
use super::program::Program;
use super::workload::Content;
use super::{Identity, PAGE_BYTES, SyntheticError, system};

/// Faults that a report describes; all are counted.
const DESCRIBED: usize = 10;

/// What verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Pages compared.
    pub pages_checked: u64,
    /// Of these, pages that some step had written.
    pub pages_written: u64,
    /// Steps done by all vCPUs together.
    pub steps: u64,
    /// Ticks of the device.
    pub device_ticks: u64,
    /// The first entry of the device's log that is wrong.
    pub bad_log_entry: Option<u64>,
    /// Pages that are wrong.
    pub bad_pages: u64,
    /// The first of them.
    pub faults: Vec<Fault>,
}

/// A wrong page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Its number.
    pub page: u64,
    /// Where it begins, in bytes.
    pub offset_bytes: u64,
    /// The step that wrote it last; 0 when none did.
    pub last_step: u64,
    /// How it is wrong.
    #[serde(flatten)]
    pub kind: FaultKind,
}

/// How a page is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum FaultKind {
    /// It holds what an earlier step wrote: later writes were lost.
    Stale {
        /// The step it holds.
        holds_step: u64,
        /// The first lost one.
        lost_since_step: u64,
    },
    /// It holds what a step wrote that has not been done.
    Future {
        /// The step it holds.
        holds_step: u64,
    },
    /// It is all zeros.
    Zero {
        /// The first lost step, if any had written it.
        lost_since_step: u64,
    },
    /// It holds what it held before the first step.
    Unwritten {
        /// The first lost step.
        lost_since_step: u64,
    },
    /// It holds something else.
    Corrupt {
        /// The first byte that differs.
        byte: usize,
        /// What it should be.
        expected: u8,
        /// What it is.
        found: u8,
    },
}

impl VerifyReport {
    /// Whether everything is as it must be.
    pub fn is_good(&self) -> bool {
        self.bad_pages == 0 && self.bad_log_entry.is_none()
    }

    fn add(&mut self, other: Self) {
        self.pages_checked += other.pages_checked;
        self.pages_written += other.pages_written;
        self.bad_pages += other.bad_pages;
        self.faults.extend(other.faults);
        self.faults.truncate(DESCRIBED);
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages_checked, pages_written, steps, device_ticks, bad_pages, .. } = self;
        if self.is_good() {
            return write!(
                f,
                "{pages_checked} pages are right ({pages_written} of them written, in {steps} steps), and the log of \
                 {device_ticks} device ticks"
            );
        }
        write!(f, "{bad_pages} of {pages_checked} pages are wrong after {steps} steps")?;
        if let Some(entry) = self.bad_log_entry {
            write!(f, "; entry {entry} of the device's log is wrong after {device_ticks} ticks")?;
        }
        self.faults.iter().try_for_each(|fault| write!(f, "; {fault}"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, offset_bytes, last_step, kind } = self;
        write!(f, "page {page} (at {offset_bytes:#x}, last written by step {last_step}) ")?;
        match kind {
            FaultKind::Stale { holds_step, lost_since_step } => {
                write!(f, "holds step {holds_step}: writes since step {lost_since_step} were lost")
            }
            FaultKind::Future { holds_step } => write!(f, "holds step {holds_step}, from the future"),
            FaultKind::Zero { lost_since_step } => write!(f, "is zero; lost since step {lost_since_step}"),
            FaultKind::Unwritten { lost_since_step } => {
                write!(f, "was never written; lost since step {lost_since_step}")
            }
            FaultKind::Corrupt { byte, expected, found } => {
                write!(f, "differs from byte {byte} on: {found:#04x} instead of {expected:#04x}")
            }
        }
    }
}

/// The last step that wrote each page of a vCPU's slice; 0 for none.
fn replay(program: &Program, vcpu: usize, steps: u64) -> Vec<u64> {
    let slice = program.slice(vcpu);
    let pages = slice.end.saturating_sub(slice.start);
    let mut last = vec![0; pages as usize];
    let seed = program.vcpu_seed(vcpu);
    for step in 1..=steps {
        if let Some(entry) = last.get_mut(program.page(seed, step, pages) as usize) {
            *entry = step;
        }
    }
    last
}

/// What a range of pages that one vCPU writes, or none, must hold.
struct Part<'a> {
    block: &'a RamBlock,
    identity: &'a Identity,
    content: Option<Content>,
    vcpu: usize,
    vcpu_seed: u64,
    steps: u64,
    /// The last step of each page of the vCPU's slice; empty for pages that nobody writes.
    last: &'a [u64],
    slice_start: u64,
}

/// Verifies RAM and the device of a stopped machine.
pub(super) fn verify(
    block: &RamBlock,
    identity: &Identity,
    steps: &[u64],
    device: &Device,
) -> Result<VerifyReport, SyntheticError> {
    let program = &identity.program;
    let pages = block.size_bytes() / PAGE_BYTES as u64;
    let content = program.workload.writes().map(|writes| writes.content);
    let lasts = in_parallel(steps.iter().enumerate().map(|(vcpu, steps)| move || replay(program, vcpu, *steps)))?;
    let mut parts: Vec<(Part<'_>, std::ops::Range<u64>)> = Vec::new();
    let mut next = 0;
    for ((vcpu, last), steps) in lasts.iter().enumerate().zip(steps) {
        let slice = program.slice(vcpu);
        let vcpu_seed = program.vcpu_seed(vcpu);
        next = slice.end;
        let half = slice.start + (slice.end - slice.start) / 2;
        for range in [slice.start..half, half..slice.end] {
            let slice_start = slice.start;
            let part = Part { block, identity, content, vcpu, vcpu_seed, steps: *steps, last, slice_start };
            parts.push((part, range));
        }
    }
    let step = (pages - next).div_ceil(8).max(1);
    for start in (next..pages).step_by(step as usize) {
        let part = Part { block, identity, content, vcpu: 0, vcpu_seed: 0, steps: 0, last: &[], slice_start: start };
        parts.push((part, start..(start + step).min(pages)));
    }
    let mut report = VerifyReport { steps: steps.iter().sum(), ..VerifyReport::default() };
    for part in in_parallel(parts.iter().map(|(part, range)| move || part.verify(range.clone())))? {
        report.add(part?);
    }
    (report.device_ticks, report.bad_log_entry) = device.verify();
    Ok(report)
}

/// Runs jobs on as many threads as there are cores; the results are in the jobs' order.
fn in_parallel<T: Send>(jobs: impl Iterator<Item = impl FnOnce() -> T + Send>) -> Result<Vec<T>, SyntheticError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut jobs = jobs.peekable();
    let mut results = Vec::new();
    while jobs.peek().is_some() {
        let panicked = |_| system("verify")(std::io::Error::other("a thread panicked"));
        std::thread::scope(|scope| {
            let batch: Vec<_> = jobs.by_ref().take(threads).map(|job| scope.spawn(job)).collect();
            for job in batch {
                results.push(job.join().map_err(panicked)?);
            }
            Ok::<_, SyntheticError>(())
        })?;
    }
    Ok(results)
}

impl Part<'_> {
    fn verify(&self, range: std::ops::Range<u64>) -> Result<VerifyReport, SyntheticError> {
        let mut report = VerifyReport::default();
        let (mut found, mut expected): (Page, Page) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        for number in range {
            let last_step = self.last.get((number - self.slice_start) as usize).copied().unwrap_or(0);
            self.block.peek(number * PAGE_BYTES as u64, &mut found)?;
            self.expected(number, last_step, &mut expected);
            report.pages_checked += 1;
            report.pages_written += u64::from(last_step > 0);
            if found != expected {
                report.bad_pages += 1;
                if report.faults.len() < DESCRIBED {
                    let kind = self.diagnose(number, last_step, &found, &expected);
                    let offset_bytes = number * PAGE_BYTES as u64;
                    report.faults.push(Fault { page: number, offset_bytes, last_step, kind });
                }
            }
        }
        Ok(report)
    }

    /// What page `number` holds after `step` wrote it, or before any did if that is 0.
    fn expected(&self, number: u64, step: u64, page: &mut Page) {
        // A step that rewrites the whole page leaves nothing of what was there.
        if step == 0 || self.content == Some(Content::Counter) {
            self.identity.fill.page(self.identity.program.seed, number, page);
        }
        if let (Some(content), 1..) = (self.content, step) {
            content::write(content, self.vcpu_seed, number, step, page);
        }
    }

    fn diagnose(&self, number: u64, last_step: u64, found: &Page, expected: &Page) -> FaultKind {
        let mut other = [0; PAGE_BYTES];
        let (holds_step, says_number) = content::head(found);
        if says_number == number && holds_step > 0 && !self.last.is_empty() {
            self.expected(number, holds_step, &mut other);
            if other == *found {
                return if holds_step > last_step {
                    FaultKind::Future { holds_step }
                } else {
                    FaultKind::Stale { holds_step, lost_since_step: self.next_write(number, holds_step) }
                };
            }
        }
        self.expected(number, 0, &mut other);
        if last_step > 0 && other == *found {
            return FaultKind::Unwritten { lost_since_step: self.next_write(number, 0) };
        }
        if found.iter().all(|byte| *byte == 0) {
            return FaultKind::Zero { lost_since_step: self.next_write(number, 0) };
        }
        let differing = found.iter().zip(expected).enumerate().find(|(_, (found, expected))| found != expected);
        let (byte, (found, expected)) = differing.unwrap_or((0, (&0, &0)));
        FaultKind::Corrupt { byte, expected: *expected, found: *found }
    }

    /// The first step after `step` that wrote page `number`; 0 when there is none.
    fn next_write(&self, number: u64, step: u64) -> u64 {
        let program = &self.identity.program;
        let slice = program.slice(self.vcpu);
        let pages = slice.end.saturating_sub(slice.start);
        if self.last.is_empty() {
            return 0;
        }
        (step + 1..=self.steps)
            .find(|step| slice.start + program.page(self.vcpu_seed, *step, pages) == number)
            .unwrap_or(0)
    }
}
