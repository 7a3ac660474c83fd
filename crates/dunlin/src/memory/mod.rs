//! RAM as the engine sees it.
//!
//! [`RamBlock`]s over the VMM's own mappings, the two-level [`DirtyBitmap`], and the [`DirtyTracker`]s that say
//! which pages were written. `mapping` says how RAM is mapped, `file` and `holes` find what of it was never written. `userfault` and `pagemap` wrap the two kernel interfaces that tracking without a
//! hypervisor stands on.
//!
//! This is one of the two places in the crate where `unsafe` is allowed: guest RAM is shared with vCPUs that go
//! on writing, so it is only ever touched through raw pointers and system calls, never through a slice.

mod bitmap;
mod block;
mod file;
mod holes;
mod kvm;
mod mapping;
mod pagemap;
mod tracker;
mod userfault;
mod write_protect;

pub use bitmap::DirtyBitmap;
pub use block::{MemoryError, Ram, RamBlock};
pub use kvm::{KvmDirtyLog, KvmDirtyRing, KvmDirtyRings, KvmRingSize, KvmSlot};
pub use mapping::{RamKind, RamMapping};
pub use tracker::{DirtyTracker, TrackerError};
pub use write_protect::WriteProtectTracker;

pub(crate) use block::GuestSlice;

/// The unit in which pages are tracked, classified and counted, whatever backs the RAM.
pub const PAGE_SIZE: u64 = 4096;

/// The unit of scheduling: an aligned piece of a RAM block that always travels on the same channel.
pub const CHUNK_SIZE: u64 = 2 << 20;

/// Pages in a chunk.
pub(crate) const CHUNK_PAGES: usize = (CHUNK_SIZE / PAGE_SIZE) as usize;
