//! Putting pages into their place.
//!
//! Relies on the guest's RAM having been given back to the host before the first page, so that what was never
//! received is zero. What must stay true: a page that is zero costs no memory here, but on huge pages of a pool; pages are
//! made present in batches before they are filled, since the first touch of a page is the dearest step of a migration; a
//! page comes on its own channel only; nothing comes in any more when the guest may run.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::channel::Target;
use crate::error::Cause;
use crate::link::{ChannelCounters, FrameReceiver};
use crate::memory::{CHUNK_SIZE, DirtyBitmap, MemoryError, PAGE_SIZE, Ram, RamBlock};
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
    /// Chunks in all blocks before each.
    chunks_before: Vec<u64>,
    /// RAM has been cleared and may be written.
    door: Door,
    /// Pages come with checksums.
    checked: AtomicBool,
    /// Channels that pages come on.
    channels: AtomicU64,
    /// Of all huge pages of pools, those that have been looked at.
    completed: AtomicU64,
}

impl Placement {
    pub(super) fn new(ram: &Ram) -> Self {
        let chunks = ram.blocks().iter().map(|block| block.size_bytes().div_ceil(CHUNK_SIZE));
        let chunks_before = chunks.scan(0u64, |before, chunks| {
            let here = *before;
            *before = here.saturating_add(chunks);
            Some(here)
        });
        Self {
            ram: ram.clone(),
            chunks_before: chunks_before.collect(),
            block_bytes: ram.blocks().iter().map(RamBlock::size_bytes).collect(),
            touched: ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect(),
            door: Door::default(),
            checked: AtomicBool::new(true),
            channels: AtomicU64::new(1),
            completed: AtomicU64::new(0),
        }
    }

    /// Sizes of the blocks, in order.
    pub(super) fn block_bytes(&self) -> &[u64] {
        &self.block_bytes
    }

    /// Clears RAM and lets pages in on `channels` channels, which are checked if `integrity` says so.
    pub(super) fn open(&self, integrity: Integrity, channels: u8) {
        self.checked.store(integrity == Integrity::Checksum, Ordering::Release);
        self.channels.store(u64::from(channels.max(1)), Ordering::Release);
        for (block, touched) in self.ram.blocks().iter().zip(&self.touched) {
            // What cannot be given back may hold anything; zero pages are written there.
            if block.discard().is_err() {
                touched.set_all();
            }
        }
        self.door.open();
    }

    fn integrity(&self) -> Integrity {
        if self.checked.load(Ordering::Acquire) { Integrity::Checksum } else { Integrity::None }
    }

    /// Lets no more pages in.
    ///
    /// # Errors
    /// When some are coming in at this moment, which would be written under the guest.
    pub(super) fn close(&self) -> Result<(), Cause> {
        match self.door.close() {
            0 => Ok(()),
            _ => Err(Cause::Unexpected { message: "Pages", expected: "nothing behind the last round" }),
        }
    }

    /// Makes every huge page of a pool present that has not been touched: a pool that has no more is to be found out while
    /// the guest is at the source, and not when it touches the page. Every channel's thread comes here once all of RAM has
    /// come, and takes its part.
    pub(super) fn complete(&self) -> Result<(), MemoryError> {
        loop {
            let mut number = self.completed.fetch_add(1, Ordering::Relaxed);
            let mut found = None;
            for (block, touched) in self.ram.blocks().iter().zip(&self.touched) {
                let bytes = block.host_page_size();
                let count = if bytes > PAGE_SIZE { block.size_bytes().div_ceil(bytes) } else { 0 };
                if number < count {
                    found = Some((block, touched, number.saturating_mul(bytes)));
                    break;
                }
                number = number.saturating_sub(count);
            }
            let Some((block, touched, start)) = found else { return Ok(()) };
            let end = start.saturating_add(block.host_page_size()).min(block.size_bytes());
            if !touched.any((start / PAGE_SIZE) as usize..(end / PAGE_SIZE) as usize) {
                populate_range(block, start..end)?;
            }
        }
    }

    /// Receives the data of a Pages frame on `channel`, puts it into RAM and checks it.
    pub(super) fn place(
        &self,
        channel: u8,
        receiver: &FrameReceiver,
        runs: &[PageRun],
        counters: &ChannelCounters,
        staging: &mut Staging,
    ) -> Result<(), Cause> {
        let Some(_inside) = self.door.enter() else {
            return Err(Cause::Unexpected { message: "Pages", expected: "a message" });
        };
        for run in runs {
            self.check_channel(channel, run).map_err(|error| receiver.wire(error))?;
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

    /// A chunk comes on one channel: no other thread has its hands in it.
    fn check_channel(&self, channel: u8, run: &PageRun) -> Result<(), WireError> {
        let channels = self.channels.load(Ordering::Acquire);
        let before = self.chunks_before.get(usize::from(run.block)).copied().unwrap_or(0);
        let chunk = run.offset / CHUNK_SIZE;
        let last = run.offset.saturating_add(u64::from(run.length).saturating_sub(1)) / CHUNK_SIZE;
        let own = before.saturating_add(chunk) % channels.max(1) == u64::from(channel);
        if channels <= 1 || (chunk == last && own) {
            return Ok(());
        }
        Err(WireError::Channel { block: run.block, offset: run.offset, length: run.length })
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
    populate_range(block, start..end)?;
    touched.set(pages);
    Ok(())
}

fn populate_range(block: &RamBlock, range: Range<u64>) -> Result<(), MemoryError> {
    match block.populate(range) {
        // A kernel that does not know the advice: the pages come one by one.
        Err(MemoryError::Kernel { source, .. }) if source.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// Whether frames may come in, and how many are coming in.
#[derive(Debug, Default)]
struct Door(AtomicU32);

/// A frame that is coming in.
#[derive(Debug)]
struct Inside<'a>(&'a Door);

impl Door {
    const OPEN: u32 = 1 << 31;

    fn open(&self) {
        self.0.fetch_or(Self::OPEN, Ordering::SeqCst);
    }

    /// Lets no more in; how many are inside.
    fn close(&self) -> u32 {
        self.0.fetch_and(!Self::OPEN, Ordering::SeqCst) & !Self::OPEN
    }

    fn enter(&self) -> Option<Inside<'_>> {
        let inside = Inside(self);
        (self.0.fetch_add(1, Ordering::SeqCst) & Self::OPEN != 0).then_some(inside)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_have_channels() {
        let block = |name: &str, chunks: u64| {
            let mapping = vm_memory::MmapRegion::<()>::new((chunks * CHUNK_SIZE) as usize).unwrap();
            RamBlock::new(name, std::sync::Arc::new(mapping)).unwrap()
        };
        let placement = Placement::new(&Ram::new(vec![block("a", 5), block("b", 2)]).unwrap());
        placement.open(Integrity::None, 3);
        let check = |channel, block, offset, length| {
            let run = PageRun { block, kind: PageKind::Zero, offset, length, encoded_length: 0 };
            placement.check_channel(channel, &run).is_ok()
        };
        let chunk = CHUNK_SIZE as u32;
        for number in 0..7u64 {
            let (block, offset) = if number < 5 { (0, number * CHUNK_SIZE) } else { (1, (number - 5) * CHUNK_SIZE) };
            for channel in 0..3 {
                assert_eq!(
                    check(channel, block, offset, chunk),
                    number % 3 == u64::from(channel),
                    "{number} on {channel}"
                );
            }
        }
        assert!(!check(0, 0, CHUNK_SIZE - PAGE_SIZE, 2 * PAGE_SIZE as u32), "from one chunk into another's");
        placement.open(Integrity::None, 0);
        assert!(check(0, 0, 0, 5 * chunk), "a single connection has all of them");
    }

    #[test]
    fn a_door() {
        let door = Door::default();
        assert!(door.enter().is_none());
        door.open();
        let inside = door.enter();
        assert!(inside.is_some());
        assert_eq!(door.close(), 1, "one is inside");
        assert!(door.enter().is_none());
        drop(inside);
        assert_eq!(door.close(), 0);
    }
}
