//! Putting pages into their place.
//!
//! Relies on the guest's RAM having been given back to the host before the first page, so that what was never
//! received is zero. What must stay true: a page that is zero costs no memory here, but on huge pages; pages are made
//! present in batches before they are filled, since the first touch of a page is the dearest step of a migration.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::channel::Target;
use crate::error::Cause;
use crate::link::{ChannelCounters, FrameReceiver};
use crate::memory::{DirtyBitmap, MemoryError, PAGE_SIZE, Ram, RamBlock};
use crate::page::{Decoder, PageKind, PlaceError};
use crate::parameters::Integrity;
use crate::wire::{DataDigest, PAGES_TRAILER_BYTES, PageRun, WireError};

/// The guest's RAM while it is being received, by several channels at once.
#[derive(Debug)]
pub(super) struct Placement {
    ram: Ram,
    block_bytes: Vec<u64>,
    /// Pages that have been present with contents of their own.
    touched: Vec<DirtyBitmap>,
    /// RAM has been cleared and may be written.
    open: AtomicBool,
    /// Pages come with checksums.
    checked: AtomicBool,
}

impl Placement {
    pub(super) fn new(ram: &Ram) -> Self {
        Self {
            ram: ram.clone(),
            block_bytes: ram.blocks().iter().map(RamBlock::size_bytes).collect(),
            touched: ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect(),
            open: AtomicBool::new(false),
            checked: AtomicBool::new(true),
        }
    }

    /// Sizes of the blocks, in order.
    pub(super) fn block_bytes(&self) -> &[u64] {
        &self.block_bytes
    }

    /// Clears RAM and lets pages in, which are checked if `integrity` says so.
    ///
    /// # Errors
    /// When there are not as many huge pages as the block needs.
    pub(super) fn open(&self, integrity: Integrity) -> Result<(), MemoryError> {
        self.checked.store(integrity == Integrity::Checksum, Ordering::Release);
        for (block, touched) in self.ram.blocks().iter().zip(&self.touched) {
            // What cannot be given back may hold anything; zero pages are written there.
            if block.discard().is_err() {
                touched.set_all();
            }
        }
        self.open.store(true, Ordering::Release);
        Ok(())
    }

    fn integrity(&self) -> Integrity {
        if self.checked.load(Ordering::Acquire) { Integrity::Checksum } else { Integrity::None }
    }

    /// Lets no more pages in.
    pub(super) fn close(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// Receives the data of a Pages frame, puts it into RAM and checks it.
    pub(super) fn place(
        &self,
        receiver: &FrameReceiver,
        runs: &[PageRun],
        counters: &ChannelCounters,
        staging: &mut Staging,
    ) -> Result<(), Cause> {
        if !self.open.load(Ordering::Acquire) {
            return Err(Cause::Unexpected { message: "Pages", expected: "a message" });
        }
        // Plain pages go straight to their place, the encodings of others by way of a buffer.
        let encoded = runs.iter().filter(|run| run.kind != PageKind::Plain).map(|run| run.encoded_length as usize);
        staging.bytes.resize(encoded.sum(), 0);
        let mut free = staging.bytes.as_mut_slice();
        let mut checksum = [0; PAGES_TRAILER_BYTES];
        let mut targets = Vec::with_capacity(runs.len() + 1);
        for run in runs {
            let (block, touched) = self.block(run)?;
            if run.kind == PageKind::Plain {
                populate(block, touched, run)?;
                targets.push(Target::Guest(block.io_slice(run.offset, run.length as usize)?));
            } else {
                let (target, rest) = free.split_at_mut_checked(run.encoded_length as usize).unwrap_or_default();
                targets.push(Target::Buffer(target));
                free = rest;
            }
        }
        targets.push(Target::Buffer(&mut checksum));
        receiver.connection().recv_into(&mut targets)?;
        drop(targets);
        let mut encoded = staging.bytes.as_slice();
        for run in runs {
            let (block, touched) = self.block(run)?;
            match run.kind {
                PageKind::Plain => continue,
                PageKind::Zero => {
                    zero(block, touched, run)?;
                    continue;
                }
                // A delta of a page that never came stands on one of zeros.
                PageKind::Delta | PageKind::Lz4 | PageKind::Zstd => populate(block, touched, run)?,
            }
            let (own, rest) = encoded.split_at_checked(run.encoded_length as usize).unwrap_or_default();
            encoded = rest;
            let placed = staging.decoder.decode(run.kind, own, block, run.offset, run.length as usize);
            placed.map_err(|error| match error {
                PlaceError::Decode(source) => receiver.wire(WireError::Page { source }),
                PlaceError::Memory(error) => error.into(),
            })?;
        }
        self.check(receiver, u64::from_le_bytes(checksum), runs)?;
        for run in runs {
            counters.count(run.kind, u64::from(run.length));
        }
        Ok(())
    }

    /// Compares what is in RAM now with the source's checksum of what the guest wrote there.
    fn check(&self, receiver: &FrameReceiver, checksum: u64, runs: &[PageRun]) -> Result<(), Cause> {
        if self.integrity() == Integrity::None {
            return Ok(());
        }
        let mut digest = DataDigest::default();
        for run in runs.iter().filter(|run| run.kind != PageKind::Zero) {
            let (block, _) = self.block(run)?;
            block.io_slice(run.offset, run.length as usize)?.with_bytes(|bytes| digest.update(bytes));
        }
        if digest.value() == checksum {
            return Ok(());
        }
        Err(receiver.wire(WireError::Checksum { what: "guest RAM" }))
    }

    /// The block of a run that was checked against the blocks there are.
    fn block(&self, run: &PageRun) -> Result<(&RamBlock, &DirtyBitmap), Cause> {
        let index = usize::from(run.block);
        let missing = Cause::Unexpected { message: "Pages", expected: "a block of this machine" };
        self.ram.blocks().get(index).zip(self.touched.get(index)).ok_or(missing)
    }
}

/// What a channel's thread needs to decode pages.
#[derive(Debug, Default)]
pub(super) struct Staging {
    bytes: Vec<u8>,
    decoder: Decoder,
}

fn pages(run: &PageRun) -> std::ops::Range<usize> {
    let first = (run.offset / PAGE_SIZE) as usize;
    first..first + (u64::from(run.length) / PAGE_SIZE) as usize
}

/// Only what has been touched can be anything but zero.
fn zero(block: &RamBlock, touched: &DirtyBitmap, run: &PageRun) -> Result<(), Cause> {
    for page in pages(run) {
        if touched.contains(page..page + 1) {
            let start = page as u64 * PAGE_SIZE;
            block.zero(start..start + PAGE_SIZE)?;
        }
    }
    Ok(())
}

fn populate(block: &RamBlock, touched: &DirtyBitmap, run: &PageRun) -> Result<(), Cause> {
    let pages = pages(run);
    if touched.contains(pages.clone()) {
        return Ok(());
    }
    let align = block.host_page_size();
    let start = run.offset / align * align;
    let end = (run.offset + u64::from(run.length)).div_ceil(align).saturating_mul(align).min(block.size_bytes());
    match block.populate(start..end) {
        // A kernel that does not know the advice: the pages come one by one.
        Err(MemoryError::Kernel { source, .. }) if source.kind() == io::ErrorKind::InvalidInput => {}
        other => other?,
    }
    touched.set(pages);
    Ok(())
}
