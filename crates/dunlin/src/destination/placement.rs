//! Putting pages into their place.
//!
//! Relies on the guest's RAM having been given back to the host before the first page, so that what was never
//! received is zero. What must stay true: a page that is zero costs no memory here; pages are made present in
//! batches before they are filled, since the first touch of a page is the dearest step of a migration.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Cause;
use crate::link::{ChannelCounters, FrameReceiver, PagesFrame};
use crate::memory::{DirtyBitmap, GuestSlice, MemoryError, PAGE_SIZE, Ram, RamBlock};
use crate::page::PageKind;
use crate::wire::{PageRun, WireError, data_checksum_with};

/// The guest's RAM while it is being received, by several channels at once.
#[derive(Debug)]
pub(super) struct Placement {
    ram: Ram,
    block_bytes: Vec<u64>,
    /// Pages that have been present with contents of their own.
    touched: Vec<DirtyBitmap>,
    /// RAM has been cleared and may be written.
    open: AtomicBool,
}

impl Placement {
    pub(super) fn new(ram: &Ram) -> Self {
        Self {
            ram: ram.clone(),
            block_bytes: ram.blocks().iter().map(RamBlock::size_bytes).collect(),
            touched: ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect(),
            open: AtomicBool::new(false),
        }
    }

    /// Sizes of the blocks, in order.
    pub(super) fn block_bytes(&self) -> &[u64] {
        &self.block_bytes
    }

    /// Clears RAM and lets pages in.
    pub(super) fn open(&self) {
        for (block, touched) in self.ram.blocks().iter().zip(&self.touched) {
            // What cannot be given back may hold anything; zero pages are written there.
            if block.discard().is_err() {
                touched.set_all();
            }
        }
        self.open.store(true, Ordering::Release);
    }

    /// Lets no more pages in.
    pub(super) fn close(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// Receives the data of a Pages frame into RAM and checks it.
    pub(super) fn place(
        &self,
        receiver: &FrameReceiver,
        frame: PagesFrame,
        runs: &[PageRun],
        counters: &ChannelCounters,
    ) -> Result<(), Cause> {
        if !self.open.load(Ordering::Acquire) {
            return Err(Cause::Unexpected { message: "Pages", expected: "a message" });
        }
        let mut slices: Vec<GuestSlice<'_>> = Vec::with_capacity(runs.len());
        for run in runs {
            let index = usize::from(run.block);
            let (Some(block), Some(touched)) = (self.ram.blocks().get(index), self.touched.get(index)) else {
                continue;
            };
            match run.kind {
                PageKind::Zero => zero(block, touched, run)?,
                PageKind::Plain => {
                    populate(block, touched, run)?;
                    slices.push(block.io_slice(run.offset, run.length as usize)?);
                }
            }
        }
        receiver.connection().recv_guest(&slices)?;
        let checksum = data_checksum_with(|digest| slices.iter().for_each(|slice| slice.with_bytes(&mut *digest)));
        if checksum != frame.data_checksum {
            return Err(receiver.wire(WireError::Checksum { what: "guest RAM" }));
        }
        for run in runs {
            let counter = match run.kind {
                PageKind::Zero => &counters.zero_pages,
                PageKind::Plain => &counters.plain_pages,
            };
            counter.fetch_add(u64::from(run.length) / PAGE_SIZE, Ordering::Release);
        }
        Ok(())
    }
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
