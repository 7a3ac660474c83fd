//! Proving that RAM is what the vCPUs' registers say: no write lost, none from the future, no byte changed.

use std::fmt;

use dunlin::memory::RamBlock;
use serde::Serialize;

use super::devices::Image;
use super::memory::Memory;
use super::x86::{LOW_BYTES, Progress, SECTOR_BYTES, STORES, visit};
use super::{Known, KvmError};
use crate::synthetic::content::Page;

const PAGE: u64 = 4096;
/// The disk is read in pieces of as much.
const PIECE_BYTES: usize = 1 << 16;
/// Faults that a report describes; all are counted.
const DESCRIBED: usize = 10;

/// What verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KvmReport {
    /// Pages compared.
    pub pages_checked: u64,
    /// Of these, pages that a vCPU had written.
    pub pages_written: u64,
    /// Steps of memory jobs done by all vCPUs together.
    pub steps: u64,
    /// Ticks of all vCPUs' own timers.
    pub ticks: u64,
    /// Ticks of the interval timer.
    pub interval_ticks: u64,
    /// Sectors of the disk compared.
    pub sectors_checked: u64,
    /// Units of disk and serial work done: the guest has printed as many lines, or one more or a part of it.
    pub units: u64,
    /// Pages, registers and vCPUs that are wrong.
    pub wrong: u64,
    /// What is wrong with the first of them.
    pub faults: Vec<String>,
}

impl KvmReport {
    /// Whether everything is as it must be.
    pub fn is_good(&self) -> bool {
        self.wrong == 0
    }

    fn fault(&mut self, fault: impl FnOnce() -> String) {
        self.wrong += 1;
        if self.faults.len() < DESCRIBED {
            self.faults.push(fault());
        }
    }
}

impl fmt::Display for KvmReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages_checked, pages_written, steps, ticks, interval_ticks, sectors_checked, units, wrong, faults } =
            self;
        if self.is_good() {
            write!(f, "{pages_checked} pages are right ({pages_written} of them written, in {steps} steps)")?;
            if *ticks > 0 {
                write!(f, ", and {ticks} ticks of the vCPUs' timers and {interval_ticks} of the interval timer")?;
            }
            if *units > 0 {
                write!(f, ", and {sectors_checked} sectors after {units} units of disk and serial work")?;
            }
            return f.write_str(", and the vCPUs' registers");
        }
        write!(f, "{wrong} things are wrong, with {pages_checked} pages and after {steps} steps")?;
        faults.iter().try_for_each(|fault| write!(f, "; {fault}"))
    }
}

/// Verifies the RAM of a stopped machine whose vCPUs have done `steps`, or have registers that are wrong.
pub(super) fn verify(
    memory: &Memory,
    known: &Known,
    found: Vec<Result<Progress, String>>,
    image: Option<&Image>,
) -> Result<KvmReport, KvmError> {
    let mut report = KvmReport::default();
    let mut progress = Vec::new();
    for found in found {
        progress.push(*found.as_ref().unwrap_or(&Progress::default()));
        if let Err(fault) = found {
            report.fault(|| fault);
        }
    }
    for Progress { steps, ticks, intervals, units, .. } in &progress {
        report.steps += steps;
        report.ticks += ticks;
        report.interval_ticks += intervals;
        report.units += units;
    }
    if let Some(image) = image.filter(|_| known.program.payload.io) {
        let units = progress.first().map_or(0, |progress| progress.units);
        disk(known, units, image, &mut report)?;
    }
    let steps: Vec<u64> = progress.iter().map(|progress| progress.steps).collect();
    for (block, ram_block) in memory.ram.blocks().iter().enumerate() {
        let address = memory.address(block);
        let first = if address == 0 {
            low(ram_block, memory.end(), known, &progress, &mut report)?;
            LOW_BYTES / PAGE
        } else {
            0
        };
        for page in first..ram_block.size_bytes() / PAGE {
            check_page(ram_block, address, page, known, &steps, &mut report)?;
        }
    }
    Ok(report)
}

/// The memory below 1 MiB: as at the start, but for what the vCPUs note and work with there.
fn low(
    block: &RamBlock,
    memory_end: u64,
    known: &Known,
    progress: &[Progress],
    report: &mut KvmReport,
) -> Result<(), KvmError> {
    let mut expected = known.program.low_memory(memory_end, progress.len() as u32);
    let mut found = vec![0; LOW_BYTES as usize];
    block.peek(0, &mut found)?;
    report.pages_written += progress.len() as u64;
    known.program.expect_low(&mut expected, &found, progress, |fault| report.fault(|| fault));
    for (number, (found, expected)) in found.chunks(4096).zip(expected.chunks(4096)).enumerate() {
        report.pages_checked += 1;
        if found != expected {
            report.fault(|| describe(number as u64 * PAGE, found, expected));
        }
    }
    Ok(())
}

/// The disk, which was all zeros at the start: every sector has the latest unit that was written to it.
fn disk(known: &Known, units: u64, image: &Image, report: &mut KvmReport) -> Result<(), KvmError> {
    let program = &known.program;
    let mut piece = vec![0; PIECE_BYTES];
    let mut first = 0;
    while first < program.sectors {
        let sectors = (program.sectors - first).min((PIECE_BYTES / SECTOR_BYTES) as u64);
        let piece = piece.get_mut(..sectors as usize * SECTOR_BYTES).unwrap_or_default();
        let offset = first * SECTOR_BYTES as u64;
        image.read(piece, offset).map_err(|source| KvmError::System { doing: "read the disk", source })?;
        for (sector, found) in (first..).zip(piece.chunks(SECTOR_BYTES)) {
            report.sectors_checked += 1;
            let holds = |unit: u64| found.chunks(8).all(|word| word == unit.to_le_bytes());
            let latest = program.unit_of_sector(sector, units);
            // The unit at work may have been written.
            let next = program.unit_of_sector(sector, units + 1);
            if !holds(latest) && !holds(next) {
                let expected = latest.to_le_bytes().repeat(SECTOR_BYTES / 8);
                report.fault(|| format!("sector {sector}: {}", describe(sector * 512, found, &expected)));
            }
        }
        first += sectors;
    }
    Ok(())
}

fn check_page(
    block: &RamBlock,
    address: u64,
    page: u64,
    known: &Known,
    steps: &[u64],
    report: &mut KvmReport,
) -> Result<(), KvmError> {
    let offset = page * PAGE;
    let guest_address = address + offset;
    let (mut found, mut expected): (Page, Page) = ([0; 4096], [0; 4096]);
    block.peek(offset, &mut found)?;
    known.fill.page(known.seed, guest_address / PAGE, &mut expected);
    report.pages_checked += 1;
    let Some((vcpu, place)) = known.program.visitor(guest_address) else {
        if found != expected {
            report.fault(|| describe(guest_address, &found, &expected));
        }
        return Ok(());
    };
    let pages = known.program.slices.get(vcpu).map_or(1, |slice| slice.pages.max(1));
    let steps = steps.get(vcpu).copied().unwrap_or(0);
    let (rounds, next) = (steps / pages, steps % pages);
    let visits = rounds + u64::from(place < next);
    if visits > 0 {
        visit(&mut expected, guest_address, visits, STORES);
        report.pages_written += 1;
    }
    let mut good = found == expected;
    if !good && place == next {
        // The vCPU stands between the stores of its next visit.
        let mut underway = expected;
        good = (1..=STORES).any(|stores| {
            visit(&mut underway, guest_address, visits + 1, stores);
            found == underway
        });
    }
    if !good {
        report.fault(|| {
            let text = describe(guest_address, &found, &expected);
            format!("{text} (page {place} of vCPU {vcpu}, visit {visits})")
        });
    }
    Ok(())
}

fn describe(address: u64, found: &[u8], expected: &[u8]) -> String {
    let byte = found.iter().zip(expected).position(|(found, expected)| found != expected).unwrap_or(0);
    let word = |bytes: &[u8]| {
        let at = byte & !7;
        bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    };
    format!("at {:#x}: {:#x} instead of {:#x}", address + (byte as u64 & !7), word(found), word(expected))
}
