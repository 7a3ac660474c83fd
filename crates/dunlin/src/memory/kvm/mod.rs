//! Dirty tracking by KVM: the dirty log of memory slots, and the dirty rings of vCPUs.
//!
//! A VM has the one or the other, from before its vCPUs are made: where rings are turned on, KVM keeps no log.
//! `Documentation/virt/kvm/api.rst` in Linux describes both.
//!
//! What must stay true: only this folder names KVM in this crate.

mod log;
mod ring;
mod sys;

use std::io;

use super::{CHUNK_SIZE, Ram, TrackerError};

pub use log::KvmDirtyLog;
pub use ring::{KvmDirtyRing, KvmDirtyRings, KvmRingSize};

/// A memory slot of a VM: a piece of a RAM block, as it was given to KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmSlot {
    /// Its number.
    pub slot: u32,
    /// Where the guest has it.
    pub guest_address: u64,
    /// Number of the RAM block that it is of.
    pub block: usize,
    /// Where in the block it begins, in bytes; a multiple of 2 MiB.
    pub offset: u64,
    /// Its length in bytes; a multiple of 2 MiB unless it is the block's last slot. At most 1 GiB is best.
    pub size_bytes: u64,
}

impl KvmSlot {
    /// Where this process has the slot's memory, if the slot lies in its block as it must.
    fn address(&self, ram: &Ram) -> Result<u64, TrackerError> {
        let blocks = ram.blocks();
        let block =
            blocks.get(self.block).ok_or(TrackerError::UnknownBlock { block: self.block, blocks: blocks.len() })?;
        let end = self.offset.checked_add(self.size_bytes).filter(|end| *end <= block.size_bytes());
        let fits = end.is_some_and(|end| {
            self.size_bytes > 0
                && self.offset.is_multiple_of(CHUNK_SIZE)
                && (end == block.size_bytes() || end.is_multiple_of(CHUNK_SIZE))
        });
        if !fits {
            let Self { slot, offset, size_bytes, .. } = *self;
            return Err(TrackerError::Slot { slot, block: block.name().to_owned(), offset, size_bytes });
        }
        Ok(block.host_range().start.saturating_add(self.offset))
    }
}

/// Whether KVM watches the writes to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    On,
    Off,
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// An error of the kernel about the whole machine.
fn machine(doing: &'static str) -> impl Fn(io::Error) -> TrackerError {
    move |source| TrackerError::Kernel { doing, block: "of the machine".to_owned(), source }
}

/// An error of the kernel about a block.
fn about(doing: &'static str, ram: &Ram, block: usize) -> impl FnOnce(io::Error) -> TrackerError {
    let block = ram.blocks().get(block).map_or_else(String::new, |block| block.name().to_owned());
    move |source| TrackerError::Kernel { doing, block, source }
}
