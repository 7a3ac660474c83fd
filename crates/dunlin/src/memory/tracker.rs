//! What gives the engine the pages a guest has written.

use std::io;
use std::ops::Range;

use super::DirtyBitmap;

/// Tells which pages of a machine's RAM were written.
///
/// The engine asks twice. [`sync`](Self::sync), between rounds and with the guest paused, says what was written
/// so far. [`rearm`](Self::rearm), just before a chunk is read, takes what was written in it and begins anew, so
/// that a page written between the two travels once and not twice.
///
/// At the start every page counts as written: the engine sends all of RAM in the first round, and re-arms all of it. So
/// an implementation may report pages that have not been re-armed yet, or leave them out.
///
/// What must stay true of an implementation: a write that ends before `rearm` begins is in the bitmap when it
/// returns; a write that begins after `rearm` returns is in the bitmap after the next `rearm` or `sync`; a write in
/// between is in one of them at least. Pages that were not written may be reported, written ones never left out. While
/// the guest runs, a write may be held back in a buffer of its processor and come with a later call; the first call after
/// it has been paused has all.
pub trait DirtyTracker: Send + Sync {
    /// Begins: from here on every write to a page that has been re-armed is seen. Called once, with the guest running.
    ///
    /// # Errors
    /// When the kernel refuses; nothing is tracked then.
    fn start(&self) -> Result<(), TrackerError>;

    /// Adds to `dirty` the pages of block number `block` written since they were last re-armed.
    ///
    /// # Errors
    /// When the kernel refuses; the migration then fails.
    fn sync(&self, block: usize, dirty: &DirtyBitmap) -> Result<(), TrackerError>;

    /// Adds to `dirty` the pages of `range` (bytes, chunk-aligned) of block number `block` written since they
    /// were last re-armed, and re-arms them.
    ///
    /// # Errors
    /// When the kernel refuses; the migration then fails.
    fn rearm(&self, block: usize, range: Range<u64>, dirty: &DirtyBitmap) -> Result<(), TrackerError>;

    /// Ends. The guest runs at full speed again. Also done on drop.
    fn stop(&self);
}

/// What can go wrong with dirty tracking.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// The kernel lacks what the tracker needs.
    #[error("this kernel cannot track writes with userfaultfd (missing: {missing}); Linux 6.7 or later is needed")]
    Unsupported {
        /// The features it lacks.
        missing: String,
    },
    /// Userfaultfd is not allowed to this process.
    #[error(
        "userfaultfd is not permitted here: {source}; run as root, or set vm.unprivileged_userfaultfd=1, or give \
         access to /dev/userfaultfd"
    )]
    NotPermitted {
        /// The kernel's answer.
        source: io::Error,
    },
    /// KVM's dirty log cannot be cleared piece by piece.
    #[error("this kernel's KVM has no dirty log with manual protection; Linux 5.2 or later is needed")]
    NoManualDirtyLog,
    /// KVM has no dirty rings.
    #[error("this kernel's KVM has no dirty rings; Linux 5.11 or later is needed, or use the dirty log")]
    NoDirtyRing,
    /// Another tracker of the same VM has been started and not stopped.
    #[error("the dirty rings of this VM are in use by another tracker")]
    RingsInUse,
    /// KVM wrote over entries that nobody had read.
    #[error(
        "KVM put more pages into a vCPU's dirty ring than it holds, so that not all pages written are known any more; \
         use the dirty log with this KVM"
    )]
    RingOverflow,
    /// A memory slot that is not a piece of its block in whole chunks.
    #[error(
        "memory slot {slot}, {size_bytes} bytes at {offset} of RAM block {block}: it must lie in the block, begin at a \
         multiple of 2 MiB, and end at one or with the block"
    )]
    Slot {
        /// The slot's number.
        slot: u32,
        /// The block's name.
        block: String,
        /// Where in the block it begins.
        offset: u64,
        /// Its length.
        size_bytes: u64,
    },
    /// A call failed.
    #[error("could not {doing} RAM block {block}: {source}")]
    Kernel {
        /// What was being done.
        doing: &'static str,
        /// The block's name.
        block: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The engine asked for a block the tracker does not have, or before it was started.
    #[error("the dirty tracker was asked for block {block} but tracks {blocks} blocks")]
    UnknownBlock {
        /// Asked for.
        block: usize,
        /// There are.
        blocks: usize,
    },
    /// An error of a VMM's own tracker.
    #[error("{0}")]
    Other(#[source] Box<dyn std::error::Error + Send + Sync>),
}
