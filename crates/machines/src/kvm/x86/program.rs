//! The built-in guests' code and memory, and what must be in it after so many steps.
//!
//! All vCPUs run the same code in 64-bit mode, on page tables that map memory to itself; what differs is in registers.
//! A step of the `dirty` guest is a visit of a page: three stores, of the page's address at its beginning and of the number
//! of the visit behind it and at the end of the page. What must stay true: the register r9 counts steps, and is
//! increased right after the last store of one.

use dunlin::memory::RamBlock;

use super::assembler::{Assembler, Register};
use crate::Payload;
use crate::kvm::{KvmError, MAX_VCPUS};

/// Below this lie code, page tables and counters; payloads work above it.
pub(in crate::kvm) const LOW_BYTES: u64 = 1 << 20;
/// The port that paces a guest.
pub(in crate::kvm) const PACE_PORT: u8 = 0xe0;

pub(super) const GDT: u64 = 0x7000;
pub(super) const CODE: u64 = 0x8000;
pub(super) const PAGE_TABLES: u64 = 0x1_0000;
const COUNTERS: u64 = 0xa_0000;
/// What the page tables have room for.
const MAX_ADDRESS: u64 = 128 << 30;

const PAGE: u64 = 4096;
/// Offsets of a visit's number in a page.
const VISIT: [usize; 2] = [8, 0xff8];

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

/// A guest on so many vCPUs.
#[derive(Debug, Clone)]
pub(in crate::kvm) struct Program {
    pub(in crate::kvm) payload: Payload,
    pub(in crate::kvm) slices: Vec<Slice>,
}

impl Program {
    /// The guest of so many vCPUs with so many bytes of memory below the hole.
    pub(in crate::kvm) fn new(payload: Payload, vcpus: u32, low_bytes: u64) -> Result<Self, KvmError> {
        let mut slices = Vec::new();
        if let Payload::Dirty { working_set_bytes, stride_bytes, .. } = payload {
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
        Ok(Self { payload, slices })
    }

    /// The page that a vCPU counts in.
    pub(in crate::kvm) fn counter(vcpu: usize) -> u64 {
        COUNTERS + vcpu as u64 * PAGE
    }

    fn code(&self) -> Vec<u8> {
        let mut code = Assembler::default();
        let start = code.label();
        match self.payload {
            Payload::Counter => {
                code.increment(Register::R9);
                code.store(Register::R8, 0, Register::R9);
                code.jump(start);
            }
            Payload::Dirty { rate_bytes_per_second, .. } => {
                code.store(Register::Rbx, 0, Register::Rbx);
                for offset in VISIT {
                    code.store(Register::Rbx, offset as i32, Register::Rcx);
                }
                code.increment(Register::R9);
                code.store(Register::R8, 0, Register::R9);
                if rate_bytes_per_second.is_some() {
                    code.out(PACE_PORT);
                }
                code.add(Register::Rbx, Register::R10);
                code.compare(Register::Rbx, Register::Rsi);
                code.jump_if_below(start);
                code.copy(Register::Rbx, Register::Rdi);
                code.increment(Register::Rcx);
                code.jump(start);
            }
        }
        code.finish()
    }

    /// What lies below [`LOW_BYTES`] at the start. Nothing of it changes but the counters: entries of the page tables have
    /// been accessed and written already, as far as the processor can see.
    pub(in crate::kvm) fn low_memory(&self, memory_end: u64) -> Vec<u8> {
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
        put(CODE, &self.code());
        let (pointers, directories) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
        put(PAGE_TABLES, &(pointers | TABLE).to_le_bytes());
        for gib in 0..memory_end.div_ceil(GIB).max(4) {
            put(pointers + gib * 8, &((directories + gib * PAGE) | TABLE).to_le_bytes());
            for page in 0..512 {
                let to = gib * GIB + page * (2 << 20);
                put(directories + gib * PAGE + page * 8, &(to | LARGE_PAGE).to_le_bytes());
            }
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

/// What a vCPU's counter in memory says.
pub(in crate::kvm) fn counted(block: &RamBlock, vcpu: usize) -> Result<u64, KvmError> {
    let mut bytes = [0; 8];
    block.read(Program::counter(vcpu), &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

const _: () = {
    let tables = PAGE_TABLES + (2 + MAX_ADDRESS / (1 << 30)) * PAGE;
    assert!(tables <= COUNTERS && COUNTERS + MAX_VCPUS as u64 * PAGE <= LOW_BYTES);
};
