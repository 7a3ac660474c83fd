//! A channel's worker: walks the chunks it owns and sends their dirty pages.
//!
//! A chunk belongs to the same worker for the whole migration, so there is no queue in the middle and no barrier
//! between rounds: order within a channel is all the order there is to keep.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::pacing::Pacer;
use super::versions::Versions;
use crate::error::Cause;
use crate::link::{ChannelCounters, SharedSender, lock};
use crate::memory::{CHUNK_SIZE, DirtyBitmap, DirtyTracker, PAGE_SIZE, Ram, RamBlock};
use crate::page::{self, Encoder, Link, MAX_UNIT_BYTES, PageKind};
use crate::parameters::Integrity;
use crate::wire::{DataDigest, ENTRY_BYTES, MAX_ENTRIES, Mark, Message, PageRun, encode_run};

/// Dirty RAM of the whole machine and when each chunk was last re-armed.
pub(super) struct DirtyRam {
    pub(super) bitmaps: Vec<DirtyBitmap>,
    pub(super) tracker: Box<dyn DirtyTracker>,
    /// For each block and chunk, nanoseconds from `began` to its last re-arming.
    armed: Vec<Box<[AtomicU64]>>,
    last_sync: AtomicU64,
    began: Instant,
    /// Dirty bytes not yet taken in this round.
    pub(super) remaining_bytes: AtomicU64,
}

impl DirtyRam {
    /// Everything dirty. The tracker must have been started.
    pub(super) fn new(ram: &Ram, tracker: Box<dyn DirtyTracker>) -> Self {
        let bitmaps: Vec<_> = ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect();
        bitmaps.iter().for_each(DirtyBitmap::set_all);
        let armed =
            bitmaps.iter().map(|b| std::iter::repeat_with(AtomicU64::default).take(b.chunks()).collect()).collect();
        let remaining_bytes = AtomicU64::new(ram.total_bytes());
        Self { bitmaps, tracker, armed, last_sync: AtomicU64::new(0), began: Instant::now(), remaining_bytes }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Learns what was written since; gives the dirty bytes and the rate at which they became dirty.
    pub(super) fn sync(&self) -> Result<(u64, u64), Cause> {
        for (index, bitmap) in self.bitmaps.iter().enumerate() {
            self.tracker.sync(index, bitmap)?;
        }
        let now = self.now();
        // A chunk that was clean at the last look has been exposed since then, another since it was re-armed.
        let last_sync = self.last_sync.swap(now, Ordering::Relaxed);
        let (mut dirty_bytes, mut rate) = (0u64, 0f64);
        for (bitmap, armed) in self.bitmaps.iter().zip(&self.armed) {
            for chunk in bitmap.dirty_chunks() {
                let bytes = bitmap.count_chunk(chunk) * PAGE_SIZE;
                let since =
                    armed.get(chunk).map_or(0, |nanoseconds| nanoseconds.load(Ordering::Relaxed)).max(last_sync);
                dirty_bytes = dirty_bytes.saturating_add(bytes);
                rate += bytes as f64 / (now.saturating_sub(since).max(1) as f64 / 1e9);
            }
        }
        self.remaining_bytes.store(dirty_bytes, Ordering::Relaxed);
        Ok((dirty_bytes, rate as u64))
    }
}

/// What all workers of a migration share.
pub(super) struct Common {
    pub(super) ram: Ram,
    pub(super) dirty: DirtyRam,
    pub(super) pacer: Arc<Pacer>,
    pub(super) stop: Arc<AtomicBool>,
}

/// The worker of one channel.
pub(super) struct Worker {
    pub(super) index: usize,
    pub(super) workers: usize,
    pub(super) common: Arc<Common>,
    pub(super) sender: SharedSender,
    pub(super) counters: Arc<ChannelCounters>,
    pub(super) encoder: Encoder,
    pub(super) link: Link,
    pub(super) frame: Frame,
    /// Of the range at hand, what is not a hole.
    pub(super) parts: Vec<Range<u64>>,
}

/// A Pages frame in the making, and the versions that its pages replace at the destination.
#[derive(Debug)]
pub(super) struct Frame {
    runs: Vec<PageRun>,
    table: Vec<u8>,
    data: Vec<u8>,
    /// Of the pages as the guest wrote them, where pages are to be checked.
    digest: Option<DataDigest>,
    pub(super) versions: Option<Versions>,
}

impl Frame {
    /// With checksums if `integrity` asks for them, with deltas against `versions` if there are.
    pub(super) fn new(integrity: Integrity, versions: Option<Versions>) -> Self {
        let digest = (integrity == Integrity::Checksum).then(DataDigest::default);
        Self { runs: Vec::new(), table: Vec::new(), data: Vec::new(), digest, versions }
    }

    fn check(&mut self, kind: PageKind, pages: &[u8]) {
        if let (Some(digest), true) = (&mut self.digest, kind != PageKind::Zero) {
            digest.update(pages);
        }
    }

    fn checksum(&self) -> u64 {
        self.digest.as_ref().map_or(0, DataDigest::value)
    }

    fn clear(&mut self) {
        self.runs.clear();
        self.data.clear();
        if let Some(digest) = &mut self.digest {
            *digest = DataDigest::default();
        }
    }

    /// Adds a run whose encoding is already in `data`, joined to the run before where they are one.
    fn push(&mut self, run: PageRun) {
        if let Some(last) = self.runs.last_mut()
            && (last.block, last.kind) == (run.block, run.kind)
            && run.kind.joins()
            && last.offset.checked_add(u64::from(last.length)) == Some(run.offset)
            && let Some(length) = last.length.checked_add(run.length)
        {
            last.length = length;
            last.encoded_length = last.encoded_length.saturating_add(run.encoded_length);
            return;
        }
        self.runs.push(run);
    }
}

impl Worker {
    /// Sends the dirty pages of this worker's chunks, then the round's mark; gives when the mark was sent.
    pub(super) fn round(&mut self, round: u32) -> Result<Instant, Cause> {
        let common = self.common.clone();
        if let Some(versions) = &mut self.frame.versions {
            versions.begin(round);
        }
        let mut first_chunk = 0;
        for (index, block) in common.ram.blocks().iter().enumerate() {
            let Some(bitmap) = common.dirty.bitmaps.get(index) else { continue };
            for chunk in bitmap.dirty_chunks() {
                if (first_chunk + chunk) % self.workers == self.index {
                    self.chunk(&common, round, index, block, bitmap, chunk)?;
                }
            }
            first_chunk += bitmap.chunks();
        }
        self.flush()?;
        if let Some(versions) = &self.frame.versions {
            *lock(&self.counters.delta) = versions.counts;
        }
        let marked = Instant::now();
        lock(&self.sender).send(&Message::Mark(Mark { round }))?;
        Ok(marked)
    }

    fn chunk(
        &mut self,
        common: &Common,
        round: u32,
        index: usize,
        block: &RamBlock,
        bitmap: &DirtyBitmap,
        chunk: usize,
    ) -> Result<(), Cause> {
        if common.stop.load(Ordering::Relaxed) {
            return Err(Cause::Cancelled);
        }
        let start = (chunk as u64).saturating_mul(CHUNK_SIZE);
        let end = start.saturating_add(CHUNK_SIZE).min(block.size_bytes());
        common.dirty.tracker.rearm(index, start..end, bitmap)?;
        if let Some(armed) = common.dirty.armed.get(index).and_then(|armed| armed.get(chunk)) {
            armed.store(common.dirty.now(), Ordering::Relaxed);
        }
        let pages = bitmap.take_chunk(chunk);
        let taken = pages.count() * PAGE_SIZE;
        for run in pages.runs() {
            let bytes = start + run.start as u64 * PAGE_SIZE..start + run.end as u64 * PAGE_SIZE;
            if round == 1 {
                self.skip_holes(index as u16, block, bytes)?;
            } else {
                self.run(index as u16, block, bytes)?;
            }
        }
        let remaining = &common.dirty.remaining_bytes;
        let _ = remaining.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |r| Some(r.saturating_sub(taken)));
        Ok(())
    }

    /// In the first round much of a machine's RAM may never have been touched. What the file behind it has as a hole
    /// is zero, and reading it would make the host allocate it.
    fn skip_holes(&mut self, index: u16, block: &RamBlock, bytes: Range<u64>) -> Result<(), Cause> {
        let mut parts = std::mem::take(&mut self.parts);
        block.data_in(bytes.clone(), &mut parts);
        let mut at = bytes.start;
        for part in &parts {
            if part.start > at {
                self.hole(index, at..part.start)?;
            }
            self.run(index, block, part.clone())?;
            at = part.end;
        }
        if bytes.end > at {
            self.hole(index, at..bytes.end)?;
        }
        self.parts = parts;
        Ok(())
    }

    /// Copies pages out of guest RAM, chooses the kind of each, and puts them into frames.
    fn run(&mut self, index: u16, block: &RamBlock, bytes: Range<u64>) -> Result<(), Cause> {
        let mut buffer = [0u8; MAX_UNIT_BYTES];
        // A slow stream is evener in small pieces.
        let most = (self.common.pacer.frame_bytes() / PAGE_SIZE * PAGE_SIZE).clamp(PAGE_SIZE, MAX_UNIT_BYTES as u64);
        let mut at = bytes.start;
        while at < bytes.end {
            let length = (bytes.end - at).min(most);
            let copy = buffer.get_mut(..length as usize).unwrap_or_default();
            block.read(at, copy)?;
            let mut out = Sending { block: index, frame: &mut self.frame, counters: &self.counters };
            self.encoder.encode(copy, at, &self.link, &mut out);
            self.flush_if_full()?;
            at += length;
        }
        Ok(())
    }

    /// A run of zeros that nobody has to look at.
    fn hole(&mut self, block: u16, bytes: Range<u64>) -> Result<(), Cause> {
        let length = bytes.end.saturating_sub(bytes.start);
        self.frame.push(PageRun {
            block,
            kind: PageKind::Zero,
            offset: bytes.start,
            length: length as u32,
            encoded_length: 0,
        });
        self.counters.count(PageKind::Zero, length);
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<(), Cause> {
        // Room for another unit whose pages are a run each.
        const ROOM: usize = MAX_UNIT_BYTES / PAGE_SIZE as usize;
        let frame = &self.frame;
        if frame.data.len() as u64 >= self.common.pacer.frame_bytes() || frame.runs.len() + ROOM > MAX_ENTRIES {
            self.flush()?;
        }
        Ok(())
    }

    /// Sends the frame in the making.
    fn flush(&mut self) -> Result<(), Cause> {
        if self.frame.runs.is_empty() {
            return Ok(());
        }
        self.frame.table.clear();
        for run in &self.frame.runs {
            encode_run(&mut self.frame.table, run);
        }
        let bytes = (self.frame.data.len() + self.frame.runs.len() * ENTRY_BYTES) as u64;
        let began = Instant::now();
        self.common.pacer.pay(bytes, &self.common.stop);
        lock(&self.sender).send_pages(&self.frame.table, &self.frame.data, self.frame.checksum())?;
        self.link.sent(bytes, began.elapsed());
        self.frame.clear();
        Ok(())
    }
}

/// Where the encoder puts what it makes.
struct Sending<'a> {
    block: u16,
    frame: &'a mut Frame,
    counters: &'a ChannelCounters,
}

impl page::Out for Sending<'_> {
    fn data(&mut self) -> &mut Vec<u8> {
        &mut self.frame.data
    }

    fn push(&mut self, kind: PageKind, offset: u64, pages: &[u8], encoded: usize) {
        let length = pages.len() as u64;
        self.frame.push(PageRun {
            block: self.block,
            kind,
            offset,
            length: length as u32,
            encoded_length: encoded as u32,
        });
        self.counters.count(kind, length);
        self.frame.check(kind, pages);
        let Some(versions) = &mut self.frame.versions else { return };
        versions.count(kind, self.block, offset..offset.saturating_add(length), encoded);
        for (page, at) in pages.chunks_exact(PAGE_SIZE as usize).zip((offset..).step_by(PAGE_SIZE as usize)) {
            versions.sent(kind, self.block, at, page);
        }
    }

    fn sent_before(&mut self, offset: u64) -> Option<&[u8]> {
        self.frame.versions.as_ref().and_then(|versions| versions.get(self.block, offset))
    }
}
