//! A channel's worker: walks the chunks it owns and sends their dirty pages.
//!
//! A chunk belongs to the same worker for the whole migration, so there is no queue in the middle and no barrier
//! between rounds: order within a channel is all the order there is to keep.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::dirty::DirtyRam;
use super::frame::Frame;
use super::pacing::Pacer;
use crate::error::Cause;
use crate::link::{ChannelClock, ChannelCounters, SharedSender, lock};
use crate::memory::{CHUNK_SIZE, DirtyBitmap, PAGE_SIZE, Ram, RamBlock};
use crate::page::{Encoder, Link, MAX_UNIT_BYTES};
use crate::wire::{Mark, Message};

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
    /// Of this worker's thread, once it has begun.
    pub(super) clock: Option<ChannelClock>,
    pub(super) encoder: Encoder,
    pub(super) link: Link,
    pub(super) frame: Frame,
    /// The bandwidth limit when the frame in the making was begun.
    pub(super) frame_rate: u64,
    /// Bytes of the latest chunk that were dirty when the round began. They count as sent when others have been sent after
    /// them; the last do so only at the round's end, when they have arrived.
    pub(super) latest_bytes: u64,
    /// Of the range at hand, what is not a hole.
    pub(super) parts: Vec<Range<u64>>,
}

impl Worker {
    /// Sends the dirty pages of this worker's chunks, then the round's mark; gives when the mark was sent.
    pub(super) fn round(&mut self, round: u32) -> Result<Instant, Cause> {
        let common = self.common.clone();
        match &mut self.clock {
            Some(clock) => clock.skip(),
            None => self.clock = Some(ChannelClock::start(self.counters.clone())),
        }
        self.frame.begin(round);
        self.latest_bytes = 0;
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
        if let Some(counts) = self.frame.delta_counts() {
            *lock(&self.counters.delta) = counts;
        }
        let marked = Instant::now();
        lock(&self.sender).send(&Message::Mark(Mark { round }))?;
        self.lap(Duration::ZERO);
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
        common.dirty.sent(std::mem::replace(&mut self.latest_bytes, bitmap.count_chunk(chunk) * PAGE_SIZE));
        common.dirty.tracker.rearm(index, start..end, bitmap)?;
        common.dirty.armed(index, chunk);
        let pages = bitmap.take_chunk(chunk);
        for run in pages.runs() {
            let bytes = start + run.start as u64 * PAGE_SIZE..start + run.end as u64 * PAGE_SIZE;
            if round == 1 {
                self.skip_holes(index as u16, block, bytes)?;
            } else {
                self.run(index as u16, block, bytes)?;
            }
        }
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

    /// Bytes to put into a frame: what is even on a limited link, and does not stop a slow one for long. Somebody may want to
    /// cancel, or to know whether it is still alive.
    fn frame_bytes(&self) -> u64 {
        const TIME: Duration = Duration::from_millis(20);
        const UNKNOWN: u64 = 256 << 10;
        self.common.pacer.frame_bytes().min(self.link.bytes_within(TIME, UNKNOWN).max(PAGE_SIZE))
    }

    /// Notes under which limit a frame is begun, if one is.
    fn note_rate(&mut self) {
        if self.frame.is_empty() {
            self.frame_rate = self.common.pacer.rate();
        }
    }

    /// Puts pages into frames.
    fn run(&mut self, index: u16, block: &RamBlock, bytes: Range<u64>) -> Result<(), Cause> {
        // A whole chunk has a frame to itself, so that it can travel as one run.
        if bytes.end.saturating_sub(bytes.start) >= CHUNK_SIZE.min(self.frame_bytes()) {
            self.flush()?;
        }
        let mut at = bytes.start;
        while at < bytes.end {
            // A slow stream is evener in small pieces. The limit may change within a chunk.
            let frame_bytes = self.frame_bytes();
            let most = (frame_bytes / PAGE_SIZE * PAGE_SIZE).clamp(PAGE_SIZE, MAX_UNIT_BYTES as u64);
            let end = at.saturating_add(most).min(bytes.end);
            self.note_rate();
            self.frame.add((index, block), at..end, &mut self.encoder, &self.link, &self.counters)?;
            self.flush_if_full()?;
            at = end;
        }
        Ok(())
    }

    /// A run of zeros that nobody has to look at.
    fn hole(&mut self, block: u16, bytes: Range<u64>) -> Result<(), Cause> {
        self.note_rate();
        self.frame.add_hole(block, bytes, &self.counters);
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<(), Cause> {
        let full = self.frame.is_full(self.frame_bytes()) || self.frame.is_outdated(&self.encoder);
        if full { self.flush() } else { Ok(()) }
    }

    /// Sends the frame in the making.
    fn flush(&mut self) -> Result<(), Cause> {
        if self.frame.is_empty() {
            return Ok(());
        }
        let (bytes, compressed) = (self.frame.wire_bytes(), self.frame.is_compressed());
        let began = Instant::now();
        self.common.pacer.pay_for(bytes, self.frame_rate, &self.common.stop);
        let paced = began.elapsed();
        self.frame.send(&self.common.ram, &mut lock(&self.sender))?;
        let took = began.elapsed();
        // A destination that is behind would not go on earlier if less had to travel.
        let waited = paced.saturating_add(took.saturating_sub(paced).mul_f64(self.counters.link_share()));
        // A limit that others have left room under holds all the same.
        let least = Duration::from_nanos(bytes.saturating_mul(1_000_000_000).checked_div(self.frame_rate).unwrap_or(0));
        self.link.sent(bytes, took, waited.max(least), compressed);
        // Waiting that nothing is known of is not time in which trials are free.
        self.lap(if self.link.is_slow() { waited } else { paced });
        Ok(())
    }

    /// Counts the worker's time, of which it waited at most `of_link` for the link.
    fn lap(&mut self, of_link: Duration) {
        if let Some(clock) = &mut self.clock {
            let (busy, waiting) = clock.lap();
            self.encoder.worked(busy.saturating_add(waiting.min(of_link)));
            self.counters.set_compression(self.encoder.counts());
        }
    }
}
