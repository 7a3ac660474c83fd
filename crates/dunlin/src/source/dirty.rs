//! Dirty RAM of the whole machine: what is dirty, and how fast it becomes so.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::Cause;
use crate::link::lock;
use crate::memory::{DirtyBitmap, DirtyTracker, PAGE_SIZE, Ram};
use crate::to_go::ToGo;

/// Dirty RAM of the whole machine and when each chunk was last re-armed.
pub(super) struct DirtyRam {
    pub(super) bitmaps: Vec<DirtyBitmap>,
    pub(super) tracker: Box<dyn DirtyTracker>,
    /// For each block and chunk, nanoseconds from `began` to its last re-arming.
    armed: Vec<Box<[AtomicU64]>>,
    last_sync: AtomicU64,
    began: Instant,
    to_go: Mutex<ToGo>,
}

impl DirtyRam {
    /// Everything dirty. The tracker must have been started.
    pub(super) fn new(ram: &Ram, tracker: Box<dyn DirtyTracker>) -> Self {
        let bitmaps: Vec<_> = ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect();
        bitmaps.iter().for_each(DirtyBitmap::set_all);
        let armed =
            bitmaps.iter().map(|b| std::iter::repeat_with(AtomicU64::default).take(b.chunks()).collect()).collect();
        let to_go = Mutex::new(ToGo::round(ram.total_bytes()));
        Self { bitmaps, tracker, armed, last_sync: AtomicU64::new(0), began: Instant::now(), to_go }
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
        *lock(&self.to_go) = ToGo::round(dirty_bytes);
        Ok((dirty_bytes, rate as u64))
    }

    /// Begins to look at what becomes dirty from here on: all that was written before is in the bitmaps.
    pub(super) fn begin_window(&self) -> Result<(), Cause> {
        for (index, bitmap) in self.bitmaps.iter().enumerate() {
            let bytes = (bitmap.pages() as u64).saturating_mul(PAGE_SIZE);
            self.tracker.rearm(index, 0..bytes, bitmap)?;
            (0..bitmap.chunks()).for_each(|chunk| self.armed(index, chunk));
        }
        Ok(())
    }

    /// The bytes that have become dirty since, each page once. They are in the bitmaps as well from here on.
    pub(super) fn end_window(&self) -> Result<u64, Cause> {
        let (mut fresh_bytes, mut dirty_bytes) = (0u64, 0u64);
        for (index, bitmap) in self.bitmaps.iter().enumerate() {
            let fresh = DirtyBitmap::new((bitmap.pages() as u64).saturating_mul(PAGE_SIZE));
            self.tracker.sync(index, &fresh)?;
            fresh.add_to(bitmap);
            fresh_bytes = fresh_bytes.saturating_add(fresh.count().saturating_mul(PAGE_SIZE));
            dirty_bytes = dirty_bytes.saturating_add(bitmap.count().saturating_mul(PAGE_SIZE));
        }
        let mut to_go = lock(&self.to_go);
        *to_go = to_go.looked_again(dirty_bytes);
        Ok(fresh_bytes)
    }

    /// The chunk of that block has been re-armed just now.
    pub(super) fn armed(&self, block: usize, chunk: usize) {
        if let Some(armed) = self.armed.get(block).and_then(|armed| armed.get(chunk)) {
            armed.store(self.now(), Ordering::Relaxed);
        }
    }

    /// How much is to go.
    pub(super) fn to_go(&self) -> ToGo {
        *lock(&self.to_go)
    }

    /// How much is to go in the round that begins.
    pub(super) fn expect(&self, to_go: ToGo) {
        *lock(&self.to_go) = to_go;
    }

    /// So many bytes that were dirty when the round began have been sent.
    pub(super) fn sent(&self, bytes: u64) {
        lock(&self.to_go).done(bytes);
    }
}
