//! Putting pages into their place.
//!
//! The guest's RAM is given back to the host before the first page, so that what was never received is zero. Where it cannot
//! be, what was there before is remembered as stale and overwritten. What must stay true: a page that came as zero, or did not
//! come at all, is zero before the guest runs; it costs no memory here, but on huge pages of a pool and where it was stale;
//! pages are made present in batches before they are filled, since the first touch of a page is the dearest step of a
//! migration; a page comes on its own channel only; nothing comes in any more when the guest may run.

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
    /// Pages that may hold what was in RAM before the migration.
    stale: Vec<DirtyBitmap>,
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
            stale: ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect(),
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
        let mut left = Vec::new();
        for (block, stale) in self.ram.blocks().iter().zip(&self.stale) {
            block.discard(&mut left);
            for part in &left {
                stale.set((part.start / PAGE_SIZE) as usize..part.end.div_ceil(PAGE_SIZE) as usize);
            }
        }
        self.door.open();
    }

    fn integrity(&self) -> Integrity {
        if self.checked.load(Ordering::Acquire) { Integrity::Checksum } else { Integrity::None }
    }

    /// Lets no more pages in, and makes sure that nothing is left of what was in RAM before.
    ///
    /// # Errors
    /// When some are coming in at this moment, which would be written under the guest.
    pub(super) fn finish(&self) -> Result<(), Cause> {
        self.close()?;
        // A source that sends all of RAM has left nothing to do here.
        Ok(self.clear_stale(|_, _| true)?)
    }

    /// Lets no more pages in.
    ///
    /// # Errors
    /// When some are coming in at this moment.
    pub(super) fn close(&self) -> Result<(), Cause> {
        match self.door.close() {
            0 => Ok(()),
            _ => Err(Cause::Unexpected { message: "Pages", expected: "nothing behind the last round" }),
        }
    }

    /// Makes every huge page of a pool present that has not been touched: a pool that has no more is to be found out while
    /// the guest is at the source, and not when it touches the page. Every channel's thread comes here once all of RAM has
    /// come, and takes its part. What is stale in the chunks of `channel`, whose thread this is, becomes zero.
    pub(super) fn complete(&self, channel: u8) -> Result<(), MemoryError> {
        self.clear_stale(|block, chunk| self.comes_on(channel, block, chunk))?;
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

    /// Zeroes the pages that are stale in the chunks that are `own`, by the numbers of block and chunk.
    fn clear_stale(&self, own: impl Fn(usize, u64) -> bool) -> Result<(), MemoryError> {
        for (index, (block, stale)) in self.ram.blocks().iter().zip(&self.stale).enumerate() {
            for chunk in stale.dirty_chunks().filter(|chunk| own(index, *chunk as u64)) {
                let start = (chunk as u64).saturating_mul(CHUNK_SIZE);
                for run in stale.take_chunk(chunk).runs() {
                    let first = start.saturating_add(run.start as u64 * PAGE_SIZE);
                    make_zero(block, first..start.saturating_add(run.end as u64 * PAGE_SIZE))?;
                }
            }
        }
        Ok(())
    }

    /// Whether the pages of a chunk, by the numbers of block and chunk, come on `channel`.
    fn comes_on(&self, channel: u8, block: usize, chunk: u64) -> bool {
        let channels = self.channels.load(Ordering::Acquire);
        let before = self.chunks_before.get(block).copied().unwrap_or(0);
        before.saturating_add(chunk).checked_rem(channels).is_none_or(|number| number == u64::from(channel))
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
            let Block { block, touched, .. } = self.block(run)?;
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
            let Block { block, touched, stale } = self.block(run)?;
            match run.kind {
                PageKind::Plain => {
                    stale.clear(pages(run));
                    continue;
                }
                PageKind::Zero => {
                    zero(block, touched, stale, run, &mut staging.parts)?;
                    continue;
                }
                PageKind::Delta | PageKind::Lz4 | PageKind::Zstd => populate(block, touched, run)?,
            }
            // A delta of a page that never came stands on one of zeros.
            if run.kind == PageKind::Delta && stale.any(pages(run)) {
                make_zero(block, bytes(run))?;
            }
            stale.clear(pages(run));
            let (own, rest) = encoded.split_at_checked(run.encoded_length as usize).unwrap_or_default();
            encoded = rest;
            let placed = staging.decoder.decode(run.kind, own, block, run.offset, run.length as usize);
            placed.map_err(|error| match error {
                PlaceError::Decode(source) => receiver.wire(WireError::Page { source }),
                PlaceError::Memory(error) => error.into(),
            })?;
        }
        self.check(receiver, u64::from_le_bytes(checksum), runs, &mut staging.piece)?;
        for run in runs {
            counters.count(run.kind, u64::from(run.length));
        }
        Ok(())
    }

    /// A chunk comes on one channel: no other thread has its hands in it.
    fn check_channel(&self, channel: u8, run: &PageRun) -> Result<(), WireError> {
        let chunk = run.offset / CHUNK_SIZE;
        let last = run.offset.saturating_add(u64::from(run.length).saturating_sub(1)) / CHUNK_SIZE;
        let own = self.comes_on(channel, usize::from(run.block), chunk);
        if self.channels.load(Ordering::Acquire) <= 1 || (chunk == last && own) {
            return Ok(());
        }
        Err(WireError::Channel { block: run.block, offset: run.offset, length: run.length })
    }

    /// Compares what is in RAM now with the source's checksum of what the guest wrote there. Pages of zeros are not part of it:
    /// [`zero`] has looked at each that is in memory.
    fn check(
        &self,
        receiver: &FrameReceiver,
        checksum: u64,
        runs: &[PageRun],
        piece: &mut Vec<u8>,
    ) -> Result<(), Cause> {
        if self.integrity() == Integrity::None {
            return Ok(());
        }
        piece.resize(PIECE_BYTES, 0);
        let mut digest = DataDigest::default();
        for run in runs.iter().filter(|run| run.kind != PageKind::Zero) {
            let slice = self.block(run)?.block.io_slice(run.offset, run.length as usize)?;
            slice.copy_out(piece, |bytes| digest.update(bytes))?;
        }
        if digest.value() == checksum {
            return Ok(());
        }
        Err(receiver.wire(WireError::Checksum { what: "guest RAM" }))
    }

    /// The block of a run that was checked against the blocks there are.
    fn block(&self, run: &PageRun) -> Result<Block<'_>, Cause> {
        let index = usize::from(run.block);
        let missing = Cause::Unexpected { message: "Pages", expected: "a block of this machine" };
        let (Some(block), Some(touched), Some(stale)) =
            (self.ram.blocks().get(index), self.touched.get(index), self.stale.get(index))
        else {
            return Err(missing);
        };
        Ok(Block { block, touched, stale })
    }
}

/// A block and what is known of its pages.
struct Block<'a> {
    block: &'a RamBlock,
    touched: &'a DirtyBitmap,
    stale: &'a DirtyBitmap,
}

/// Pages are copied out in pieces of this size to be checked: they stay in a processor's nearest cache.
const PIECE_BYTES: usize = 16 << 10;

/// What a channel's thread needs to decode pages.
#[derive(Debug, Default)]
pub(super) struct Staging {
    bytes: Vec<u8>,
    decoder: Decoder,
    piece: Vec<u8>,
    parts: Vec<Range<u64>>,
}

fn pages(run: &PageRun) -> std::ops::Range<usize> {
    let first = (run.offset / PAGE_SIZE) as usize;
    first..first + (u64::from(run.length) / PAGE_SIZE) as usize
}

fn bytes(run: &PageRun) -> Range<u64> {
    run.offset..run.offset.saturating_add(u64::from(run.length))
}

/// Makes sure that all of `run` is zero: pages that came before, that are stale, or that somebody else has put into memory.
/// All others are holes.
fn zero(
    block: &RamBlock,
    touched: &DirtyBitmap,
    stale: &DirtyBitmap,
    run: &PageRun,
    parts: &mut Vec<Range<u64>>,
) -> Result<(), Cause> {
    block.present_in(bytes(run), parts);
    for part in parts.iter() {
        make_zero(block, part.clone())?;
    }
    for page in pages(run) {
        // What is swapped out is not in memory.
        if touched.contains(page..page + 1) || stale.contains(page..page + 1) {
            let start = page as u64 * PAGE_SIZE;
            make_zero(block, start..start + PAGE_SIZE)?;
        }
    }
    stale.clear(pages(run));
    Ok(())
}

/// Zeroes those pages of `bytes` that are not zero. A page that is, is not written: in a private mapping of a file the write
/// would have the host allocate it.
fn make_zero(block: &RamBlock, bytes: Range<u64>) -> Result<(), MemoryError> {
    for at in bytes.clone().step_by(PAGE_SIZE as usize) {
        let page = at..at.saturating_add(PAGE_SIZE).min(bytes.end);
        if !block.is_zero(page.clone())? {
            block.zero(page)?;
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

    /// A page that comes as zero is zero afterwards, whoever has put something there since RAM was cleared; a page that is a
    /// hole stays one.
    #[test]
    fn zero_is_zero() {
        const PAGES: u64 = 8;
        let file = std::fs::File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(PAGES * PAGE_SIZE).unwrap();
        let offset = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
        let shared = vm_memory::MmapRegion::<()>::from_file(offset, (PAGES * PAGE_SIZE) as usize).unwrap();
        let private = vm_memory::MmapRegion::<()>::new((PAGES * PAGE_SIZE) as usize).unwrap();
        for mapping in [private, shared] {
            let block = RamBlock::new("ram", std::sync::Arc::new(mapping)).unwrap();
            let placement = Placement::new(&Ram::new(vec![block.clone()]).unwrap());
            placement.open(Integrity::Checksum, 1);
            block.write(2 * PAGE_SIZE, &[1]).unwrap();
            let length = (PAGES * PAGE_SIZE) as u32;
            let run = PageRun { block: 0, kind: PageKind::Zero, offset: 0, length, encoded_length: 0 };
            let Block { touched, stale, .. } = placement.block(&run).unwrap();
            zero(&block, touched, stale, &run, &mut Vec::new()).unwrap();
            assert!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) <= PAGE_SIZE / 512);
            assert!(block.is_zero(0..PAGES * PAGE_SIZE).unwrap());
        }
    }

    /// What was in RAM before and cannot be given back is zero at the end of the round, each chunk by its own channel, and
    /// in any case before the guest may run.
    #[test]
    fn nothing_stale_is_left() {
        let mapping = vm_memory::MmapRegion::<()>::new(4 * CHUNK_SIZE as usize).unwrap();
        let block = RamBlock::new("ram", std::sync::Arc::new(mapping)).unwrap().pinned();
        let chunks = || (0..4).map(|chunk| block.is_zero(chunk * CHUNK_SIZE..(chunk + 1) * CHUNK_SIZE).unwrap());
        let placement = Placement::new(&Ram::new(vec![block.clone()]).unwrap());
        (0..4).for_each(|chunk| block.write(chunk * CHUNK_SIZE + 77, &[1]).unwrap());
        placement.open(Integrity::None, 2);
        assert!(chunks().all(|zero| !zero), "pinned RAM is left alone");
        placement.complete(1).unwrap();
        assert_eq!(chunks().collect::<Vec<_>>(), [false, true, false, true]);
        placement.finish().unwrap();
        assert!(chunks().all(|zero| zero));
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
