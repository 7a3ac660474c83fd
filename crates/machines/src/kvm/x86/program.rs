//! The built-in guests' memory, and what must be in it after so much work.
//!
//! All vCPUs run the same code (`guest`) in 64-bit mode, on page tables that map memory to itself. A step of the `dirty`
//! guest is a visit of a page: three stores, of the page's address at its beginning and of the number of the visit behind
//! it and at the end of the page. A unit of the `io` guest is a sector written, flushed, an earlier one read back, and a
//! line printed.

use dunlin::memory::RamBlock;

use super::guest;
use crate::kvm::{KvmError, MAX_VCPUS};
use crate::payload::{MemoryJob, Payload};

/// Below this lie code, page tables and boards; the memory jobs work above it.
pub(in crate::kvm) const LOW_BYTES: u64 = 1 << 20;
/// The port that paces a guest.
pub(in crate::kvm) const PACE_PORT: u8 = 0xe0;

/// A gate for each of the 256 vectors.
pub(super) const IDT: u64 = 0x6000;
pub(super) const GDT: u64 = 0x7000;
pub(super) const CODE: u64 = 0x8000;
pub(super) const PAGE_TABLES: u64 = 0x1_0000;
/// A page for each vCPU.
const BOARDS: u64 = 0xa_0000;
/// A page for each vCPU.
const STACKS: u64 = 0xb_0000;
/// What the disk is driven with.
const DISK_AREA: u64 = 0xc_0000;
const DISK_AREA_BYTES: u64 = 0x3000;
/// What the page tables have room for.
const MAX_ADDRESS: u64 = 128 << 30;

const PAGE: u64 = 4096;
/// Offsets of a visit's number in a page.
const VISIT: [usize; 2] = [8, 0xff8];

// A board: what a vCPU is told, and what it writes down, after the number of its steps at the beginning.
pub(super) const BOARD_JOBS: u64 = 0x08;
/// Counts of its own timer from one tick to the next.
pub(super) const BOARD_PERIOD: u64 = 0x10;
/// The same of the interval timer.
pub(super) const BOARD_DIVISOR: u64 = 0x14;
pub(super) const BOARD_TICKS: u64 = 0x18;
pub(super) const BOARD_INTERVALS: u64 = 0x20;
pub(super) const BOARD_DISK_INTERRUPTS: u64 = 0x28;
pub(super) const BOARD_UNITS: u64 = 0x30;
/// How often something was not as the guest expected: a sector, a status, a tick too many, an exception.
pub(super) const BOARD_WRONG: u64 = 0x38;

pub(super) const JOB_COUNTER: u8 = 1;
pub(super) const JOB_DIRTY: u8 = 2;
pub(super) const JOB_PACED: u8 = 4;
pub(super) const JOB_IO: u8 = 8;
pub(super) const JOB_TIMER: u8 = 16;
/// The vCPU that takes the interrupts of devices.
pub(super) const JOB_FIRST: u8 = 32;

// The disk's queue: three chains, from descriptors 0 (write), 3 (read) and 6 (flush) on.
pub(super) const QUEUE_SIZE: u32 = 8;
pub(super) const DESCRIPTORS: u64 = DISK_AREA;
pub(super) const AVAIL: u64 = DISK_AREA + 0x100;
pub(super) const USED: u64 = DISK_AREA + 0x200;
pub(super) const WRITE_HEADER: u64 = DISK_AREA + 0x300;
pub(super) const READ_HEADER: u64 = DISK_AREA + 0x310;
const FLUSH_HEADER: u64 = DISK_AREA + 0x320;
/// Where in a header the sector is.
pub(super) const HEADER_SECTOR: u64 = 8;
pub(super) const WRITE_STATUS: u64 = DISK_AREA + 0x330;
pub(super) const READ_STATUS: u64 = DISK_AREA + 0x338;
pub(super) const FLUSH_STATUS: u64 = DISK_AREA + 0x340;
/// The number of the disk's sectors.
pub(super) const SECTORS: u64 = DISK_AREA + 0x348;
pub(super) const WRITE_BUFFER: u64 = DISK_AREA + 0x1000;
pub(super) const READ_BUFFER: u64 = DISK_AREA + 0x2000;
/// A unit reads back the sector of as many units before.
pub(super) const DISTANCE: u64 = 64;
/// Chains in the order in which they are used.
const CHAINS: [u32; 3] = [0, 6, 3];
pub(in crate::kvm) const SECTOR_BYTES: usize = 512;

/// What a vCPU of the `dirty` guest goes round in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::kvm) struct Slice {
    /// Address of the first page.
    pub(in crate::kvm) start: u64,
    /// Pages visited.
    pub(in crate::kvm) pages: u64,
    /// From one to the next.
    pub(in crate::kvm) stride: u64,
}

impl Slice {
    /// The first address past the last visit.
    pub(super) fn end(self) -> u64 {
        self.start.saturating_add(self.pages.saturating_mul(self.stride))
    }
}

/// What a stopped vCPU's registers say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::kvm) struct Progress {
    pub(in crate::kvm) steps: u64,
    pub(in crate::kvm) ticks: u64,
    pub(in crate::kvm) intervals: u64,
    pub(in crate::kvm) units: u64,
    pub(in crate::kvm) requests: u64,
}

/// A guest on so many vCPUs.
#[derive(Debug, Clone)]
pub(in crate::kvm) struct Program {
    pub(in crate::kvm) payload: Payload,
    pub(in crate::kvm) slices: Vec<Slice>,
    /// Of the first disk.
    pub(in crate::kvm) sectors: u64,
}

impl Program {
    /// The guest of so many vCPUs with so many bytes of memory below the hole, and a disk of so many sectors or none.
    pub(in crate::kvm) fn new(
        payload: Payload,
        vcpus: u32,
        low_bytes: u64,
        sectors: Option<u64>,
    ) -> Result<Self, KvmError> {
        let mut slices = Vec::new();
        if let Some((working_set_bytes, stride_bytes)) = payload.memory.as_ref().and_then(MemoryJob::region) {
            let room = low_bytes.saturating_sub(LOW_BYTES);
            let whole = PAGE.saturating_mul(u64::from(vcpus.max(1)));
            let part = working_set_bytes / whole * PAGE;
            let stride = stride_bytes.max(PAGE);
            let pages = part / stride;
            if working_set_bytes > room || pages == 0 {
                return Err(KvmError::WorkingSet { bytes: working_set_bytes, least: stride * u64::from(vcpus), room });
            }
            slices.extend((0..u64::from(vcpus)).map(|vcpu| Slice { start: LOW_BYTES + vcpu * part, pages, stride }));
        }
        let sectors = match (payload.io, sectors) {
            (false, _) => 0,
            (true, Some(sectors)) if sectors > DISTANCE => sectors,
            (true, _) => return Err(KvmError::NoDisk { least: (DISTANCE + 1) * SECTOR_BYTES as u64 }),
        };
        Ok(Self { payload, slices, sectors })
    }

    /// The page that a vCPU writes down in what it has done.
    pub(in crate::kvm) fn board(vcpu: usize) -> u64 {
        BOARDS + vcpu as u64 * PAGE
    }

    /// Where a vCPU's stack begins, from which it grows down.
    pub(super) fn stack_top(vcpu: usize) -> u64 {
        STACKS + (vcpu as u64 + 1) * PAGE
    }

    fn jobs(&self, vcpu: usize) -> u8 {
        let Payload { memory, io, timer } = &self.payload;
        let mut jobs = match memory {
            None => 0,
            Some(MemoryJob::Counter) => JOB_COUNTER,
            Some(job) if job.pace(vcpu, 1).is_none() => JOB_DIRTY,
            Some(_) => JOB_DIRTY | JOB_PACED,
        };
        if timer.is_some() {
            jobs |= JOB_TIMER;
        }
        if vcpu == 0 {
            jobs |= JOB_FIRST;
            if *io {
                jobs |= JOB_IO;
            }
        }
        jobs
    }

    /// What lies below [`LOW_BYTES`] at the start of a guest of so many vCPUs. Nothing of it changes but boards, stacks and
    /// what the disk is driven with: entries of the page tables have been accessed and written already, as far as the
    /// processor can see.
    pub(in crate::kvm) fn low_memory(&self, memory_end: u64, vcpus: u32) -> Vec<u8> {
        const TABLE: u64 = 0x23;
        const LARGE_PAGE: u64 = 0xe3;
        const GIB: u64 = 1 << 30;
        let mut image = vec![0; LOW_BYTES as usize];
        let mut put = |address: u64, bytes: &[u8]| {
            let at = address as usize;
            if let Some(to) = image.get_mut(at..at.saturating_add(bytes.len())) {
                to.copy_from_slice(bytes);
            }
        };
        for (index, entry) in super::boot::GDT_ENTRIES.iter().enumerate() {
            put(GDT + index as u64 * 8, &entry.to_le_bytes());
        }
        for vector in 0..=u8::MAX {
            put(IDT + u64::from(vector) * 16, &super::boot::gate(guest::handler(vector)));
        }
        put(CODE, guest::code());
        let (pointers, directories) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
        put(PAGE_TABLES, &(pointers | TABLE).to_le_bytes());
        for gib in 0..memory_end.div_ceil(GIB).max(4) {
            put(pointers + gib * 8, &((directories + gib * PAGE) | TABLE).to_le_bytes());
            for page in 0..512 {
                let to = gib * GIB + page * (2 << 20);
                put(directories + gib * PAGE + page * 8, &(to | LARGE_PAGE).to_le_bytes());
            }
        }
        for vcpu in 0..vcpus as usize {
            let board = Self::board(vcpu);
            put(board + BOARD_JOBS, &[self.jobs(vcpu)]);
            if let Some(ticks) = self.payload.timer {
                put(board + BOARD_PERIOD, &(1_000_000_000 / ticks.get()).to_le_bytes());
                put(board + BOARD_DIVISOR, &(1_193_182 / ticks.get()).to_le_bytes());
            }
        }
        if self.payload.io {
            put_disk_area(&mut put, self.sectors);
        }
        image
    }

    /// The vCPU that visits the page at `address`, and which of its pages that is.
    pub(in crate::kvm) fn visitor(&self, address: u64) -> Option<(usize, u64)> {
        self.slices.iter().enumerate().find_map(|(vcpu, slice)| {
            let at = address.checked_sub(slice.start).filter(|_| address < slice.end())?;
            at.is_multiple_of(slice.stride).then(|| (vcpu, at / slice.stride))
        })
    }

    /// The unit whose number the sector holds after so many units, 0 if none.
    pub(in crate::kvm) fn unit_of_sector(&self, sector: u64, units: u64) -> u64 {
        // The latest that is the sector's number modulo their count.
        let sectors = self.sectors.max(1);
        let behind = (units % sectors + sectors - sector % sectors) % sectors;
        units.saturating_sub(behind)
    }

    /// Puts into `expected`, the memory below [`LOW_BYTES`] at the start, what the vCPUs may have made of it, judging by
    /// what is `found`; tells what cannot be.
    pub(in crate::kvm) fn expect_low(
        &self,
        expected: &mut [u8],
        found: &[u8],
        progress: &[Progress],
        mut fault: impl FnMut(String),
    ) {
        for (vcpu, done) in progress.iter().enumerate() {
            let board = Self::board(vcpu);
            // A count is increased in the register first.
            let mut counted = |what: &str, at: u64, is: u64| {
                let noted = word(found, board + at);
                if noted != is && noted.wrapping_add(1) != is {
                    fault(format!("vCPU {vcpu} has noted {noted} {what} and done {is}"));
                }
                set_word(expected, board + at, noted);
            };
            counted("steps", 0, done.steps);
            counted("ticks", BOARD_TICKS, done.ticks);
            counted("ticks of the interval timer", BOARD_INTERVALS, done.intervals);
            counted("units", BOARD_UNITS, done.units);
            if vcpu == 0 && self.payload.io {
                let interrupts = word(found, board + BOARD_DISK_INTERRUPTS);
                if interrupts > done.requests {
                    fault(format!(
                        "vCPU 0 has taken {interrupts} of the disk's interrupts for {} requests",
                        done.requests
                    ));
                }
                set_word(expected, board + BOARD_DISK_INTERRUPTS, interrupts);
                self.expect_disk_area(expected, found, *done, &mut fault);
            }
            if self.jobs(vcpu) & (JOB_IO | JOB_TIMER) != 0 {
                // Its stack has what interrupts and calls left on it.
                let stack = Self::stack_top(vcpu).saturating_sub(PAGE);
                copy(expected, found, stack, PAGE);
            }
        }
    }

    /// The same of the disk's queue and buffers.
    fn expect_disk_area(&self, expected: &mut [u8], found: &[u8], done: Progress, fault: &mut impl FnMut(String)) {
        let Progress { units, requests, .. } = done;
        let half = |address: u64| word(found, address) & 0xffff;
        if !(units * 3..=units * 3 + 3).contains(&requests) {
            fault(format!("vCPU 0 has made {requests} requests in {units} units"));
        }
        // A request is counted in the register, then put into the ring, then used.
        let (made, used) = (half(AVAIL + 2), half(USED + 2));
        let behind = |index: u64| (requests.wrapping_sub(index)) & 0xffff;
        if behind(made) > 1 || behind(used) > 1 || behind(used) < behind(made) {
            fault(format!("of {requests} requests the rings have {made} made and {used} used, modulo 65536"));
        }
        let done = requests.saturating_sub(behind(used));
        for request in done.saturating_sub(u64::from(QUEUE_SIZE))..done {
            let chain = CHAINS.get((request % 3) as usize).copied().unwrap_or(0);
            let entry = word(found, USED + 4 + request % u64::from(QUEUE_SIZE) * 8) as u32;
            if entry != chain {
                fault(format!("request {request} was used as chain {entry}, it was {chain}"));
            }
        }
        // The buffer that is written: words of the unit at work, then those of the one before.
        let mut last = units + 1;
        for at in (WRITE_BUFFER..WRITE_BUFFER + SECTOR_BYTES as u64).step_by(8) {
            let value = word(found, at);
            if value > last || value < units {
                fault(format!("at {at:#x}: {value:#x} in the buffer of unit {}", units + 1));
            }
            last = value;
        }
        // What was read back: of one unit, the last or the one at work.
        let read = word(found, READ_BUFFER);
        let wanted = [units.saturating_sub(1), units, units + 1].map(|unit| match unit.saturating_sub(DISTANCE) {
            0 => unit,
            earlier => earlier,
        });
        if !wanted.contains(&read) && read != 0 {
            fault(format!("unit {read} was read back in unit {}", units + 1));
        }
        if (READ_BUFFER..READ_BUFFER + SECTOR_BYTES as u64).step_by(8).any(|at| word(found, at) != read) {
            fault(format!("what was read back as unit {read} is not all of one unit"));
        }
        copy(expected, found, AVAIL, 4 + 2 * u64::from(QUEUE_SIZE));
        copy(expected, found, USED, 4 + 8 * u64::from(QUEUE_SIZE));
        for header in [WRITE_HEADER, READ_HEADER] {
            let sector = word(found, header + HEADER_SECTOR);
            if sector >= self.sectors {
                fault(format!("sector {sector} was asked for, of {}", self.sectors));
            }
            copy(expected, found, header + HEADER_SECTOR, 8);
        }
        for status in [WRITE_STATUS, READ_STATUS, FLUSH_STATUS] {
            copy(expected, found, status, 1);
        }
        copy(expected, found, WRITE_BUFFER, SECTOR_BYTES as u64);
        copy(expected, found, READ_BUFFER, SECTOR_BYTES as u64);
    }
}

fn put_disk_area(put: &mut impl FnMut(u64, &[u8]), sectors: u64) {
    const NEXT: u16 = 1;
    const WRITABLE: u16 = 2;
    const SECTOR: u32 = SECTOR_BYTES as u32;
    // Address, length, flags, next.
    let descriptors: [(u64, u32, u16, u16); 8] = [
        (WRITE_HEADER, 16, NEXT, 1),
        (WRITE_BUFFER, SECTOR, NEXT, 2),
        (WRITE_STATUS, 1, WRITABLE, 0),
        (READ_HEADER, 16, NEXT, 4),
        (READ_BUFFER, SECTOR, NEXT | WRITABLE, 5),
        (READ_STATUS, 1, WRITABLE, 0),
        (FLUSH_HEADER, 16, NEXT, 7),
        (FLUSH_STATUS, 1, WRITABLE, 0),
    ];
    for (index, (address, length, flags, next)) in descriptors.into_iter().enumerate() {
        let at = DESCRIPTORS + index as u64 * 16;
        put(at, &address.to_le_bytes());
        put(at + 8, &length.to_le_bytes());
        put(at + 12, &flags.to_le_bytes());
        put(at + 14, &next.to_le_bytes());
    }
    // In, out and flush, of the virtio block device.
    for (header, kind) in [(READ_HEADER, 0u32), (WRITE_HEADER, 1), (FLUSH_HEADER, 4)] {
        put(header, &kind.to_le_bytes());
    }
    put(SECTORS, &sectors.to_le_bytes());
}

fn word(bytes: &[u8], address: u64) -> u64 {
    let at = address as usize;
    let found = bytes.get(at..at.saturating_add(8)).and_then(|bytes| bytes.try_into().ok());
    found.map_or(0, u64::from_le_bytes)
}

fn set_word(bytes: &mut [u8], address: u64, value: u64) {
    let at = address as usize;
    if let Some(to) = bytes.get_mut(at..at.saturating_add(8)) {
        to.copy_from_slice(&value.to_le_bytes());
    }
}

fn copy(to: &mut [u8], from: &[u8], address: u64, length: u64) {
    let range = address as usize..address.saturating_add(length) as usize;
    if let (Some(to), Some(from)) = (to.get_mut(range.clone()), from.get(range)) {
        to.copy_from_slice(from);
    }
}

/// What `page`, which is at `address`, holds after the first `stores` of visit number `visit`.
pub(in crate::kvm) fn visit(page: &mut [u8], address: u64, visit: u64, stores: usize) {
    let all = std::iter::once((0, address)).chain(VISIT.map(|offset| (offset, visit)));
    for (offset, value) in all.take(stores) {
        if let Some(to) = page.get_mut(offset..offset + 8) {
            to.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Stores of a visit.
pub(in crate::kvm) const STORES: usize = 3;

/// What a vCPU has written down.
pub(in crate::kvm) fn noted(block: &RamBlock, vcpu: usize) -> Result<Progress, KvmError> {
    let mut board = [0; 0x40];
    block.read(Program::board(vcpu), &mut board)?;
    let [steps, ticks, intervals, units] = [0, BOARD_TICKS, BOARD_INTERVALS, BOARD_UNITS].map(|at| word(&board, at));
    Ok(Progress { steps, ticks, intervals, units, requests: 0 })
}

const _: () = {
    let tables = PAGE_TABLES + (2 + MAX_ADDRESS / (1 << 30)) * PAGE;
    let all = MAX_VCPUS as u64 * PAGE;
    assert!(tables <= BOARDS && BOARDS + all <= STACKS && STACKS + all <= DISK_AREA);
    assert!(DISK_AREA + DISK_AREA_BYTES <= LOW_BYTES);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits() {
        assert!((100..0x1000).contains(&guest::code().len()));
        assert_eq!(guest::code().get(..2), Some(&[0x41, 0xf6][..]), "test byte ptr [r8 + ...], ...");
    }

    #[test]
    fn sectors_hold_the_latest_unit() {
        let payload: Payload = "io".parse().unwrap();
        let program = Program::new(payload, 1, 2 << 20, Some(100)).unwrap();
        let mut sectors = [0; 100];
        for units in 0..350 {
            for (sector, unit) in sectors.iter().enumerate() {
                assert_eq!(program.unit_of_sector(sector as u64, units), *unit, "sector {sector} after {units}");
            }
            sectors[(units as usize + 1) % 100] = units + 1;
        }
    }
}
