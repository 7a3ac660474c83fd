//! KVM's dirty log of memory slots, with manual protection.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` a look at the log (`KVM_GET_DIRTY_LOG`) changes nothing, and bits are cleared
//! and pages protected again only where and when asked (`KVM_CLEAR_DIRTY_LOG`): here for a chunk, just before it is
//! read. See `Documentation/virt/kvm/api.rst` in Linux.
//!
//! A look always returns the log of a whole slot, so re-arming a chunk looks at a whole slot too: 32 KiB a GiB. A VMM
//! keeps that cheap with slots of 1 GiB at most. What is sent for the first time needs no look: all of it counts as
//! written.
//!
//! What must stay true: no bit is cleared in the kernel that was not added to the engine's bitmap before. Writes that
//! come between the look and the clearing either hit a page whose bit was seen, which is read afterwards anyway, or
//! keep their own bit.
//!
//! KVM sees the writes of vCPUs and its own. Those of the VMM's devices it does not see: the VMM marks them in bitmaps of
//! its own, after the write, and they are merged in here.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::{CHUNK_SIZE, DirtyBitmap, DirtyTracker, PAGE_SIZE, Ram, TrackerError};
use super::sys::{self, Vm};
use super::{KvmSlot, Switch, about, index, machine};

/// Bytes of a block that a word of a bitmap stands for.
const WORD_BYTES: u64 = u64::BITS as u64 * PAGE_SIZE;

/// What is asked of the kernel.
trait Log: Send + Sync + std::fmt::Debug {
    /// The bits of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` that the kernel has.
    fn supported(&self) -> io::Result<u64>;
    /// Turns these on.
    fn enable(&self, bits: u64) -> io::Result<()>;
    /// Starts or ends the log of a slot at this address of this process.
    fn switch(&self, slot: &KvmSlot, address: u64, switch: Switch) -> io::Result<()>;
    /// Fills `words` with a slot's log.
    fn get(&self, slot: u32, words: &mut [u64]) -> io::Result<()>;
    /// Clears what `words` says from `first_page` of a slot on, and protects it.
    fn clear(&self, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()>;
}

#[derive(Debug)]
struct Slot {
    slot: KvmSlot,
    address: u64,
    /// Of each chunk, whether it has been re-armed since the start.
    armed: Box<[AtomicBool]>,
    /// The log as last got. Held from the look to the clearing; the kernel does no two of them at once either.
    words: Mutex<Box<[u64]>>,
}

/// [`DirtyTracker`] on KVM's dirty log with manual protection.
#[derive(Debug)]
pub struct KvmDirtyLog {
    ram: Ram,
    log: Box<dyn Log>,
    slots: Vec<Slot>,
    own_writes: Option<Arc<[DirtyBitmap]>>,
    started: AtomicBool,
}

impl KvmDirtyLog {
    /// A tracker for the VM behind the descriptor `vm`, whose slots over `ram` are `slots`. In `own_writes`, one for each
    /// block, the VMM marks what it writes itself: each page after the write to it. Nothing is tracked until it is
    /// started.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated, the slots do not lie in the blocks as they must, or this KVM has no
    /// dirty log with manual protection.
    ///
    /// # Safety
    /// `vm` must be a KVM virtual machine that has exactly these slots, over the memory of these blocks, mapped for as
    /// long as the machine lives.
    pub unsafe fn new(
        vm: BorrowedFd<'_>,
        ram: &Ram,
        slots: &[KvmSlot],
        own_writes: Option<Arc<[DirtyBitmap]>>,
    ) -> Result<Self, TrackerError> {
        Self::on(Box::new(Vm::new(vm)?), ram, slots, own_writes)
    }

    fn on(
        log: Box<dyn Log>,
        ram: &Ram,
        slots: &[KvmSlot],
        own_writes: Option<Arc<[DirtyBitmap]>>,
    ) -> Result<Self, TrackerError> {
        let blocks = ram.blocks();
        if let Some(own) = &own_writes
            && own.len() != blocks.len()
        {
            return Err(TrackerError::UnknownBlock { block: blocks.len().min(own.len()), blocks: blocks.len() });
        }
        let slots = slots.iter().map(|slot| Slot::new(*slot, ram)).collect::<Result<_, _>>()?;
        Ok(Self { ram: ram.clone(), log, slots, own_writes, started: AtomicBool::new(false) })
    }

    fn failed(&self, doing: &'static str, slot: &Slot) -> impl FnOnce(io::Error) -> TrackerError {
        about(doing, &self.ram, slot.slot.block)
    }

    fn slots_of(&self, block: usize) -> Result<impl Iterator<Item = &Slot>, TrackerError> {
        let blocks = self.ram.blocks().len();
        if block >= blocks || !self.started.load(Ordering::Acquire) {
            return Err(TrackerError::UnknownBlock { block, blocks });
        }
        Ok(self.slots.iter().filter(move |slot| slot.slot.block == block))
    }

    fn own(&self, block: usize) -> Option<&DirtyBitmap> {
        self.own_writes.as_ref()?.get(block)
    }

    fn get(&self, slot: &Slot, words: &mut [u64]) -> Result<(), TrackerError> {
        self.log.get(slot.slot.slot, words).map_err(self.failed("get KVM's dirty log of", slot))
    }

    /// Re-arms `range`, a piece of a slot in bytes of the slot.
    fn rearm_slot(&self, slot: &Slot, range: Range<u64>, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        let first_word = index(range.start / WORD_BYTES);
        let end_word = index(range.end.div_ceil(WORD_BYTES));
        let mut words = slot.words.lock().unwrap_or_else(PoisonError::into_inner);
        let chunks = index(range.start / CHUNK_SIZE)..index(range.end.div_ceil(CHUNK_SIZE));
        let armed = slot.armed.get(chunks).unwrap_or_default();
        if armed.iter().all(|armed| armed.load(Ordering::Relaxed)) {
            self.get(slot, &mut words)?;
        } else {
            // At the start all bits are set, or, where the kernel does not do that, count as set.
            words.get_mut(first_word..end_word).unwrap_or_default().fill(u64::MAX);
        }
        let taken = words.get(first_word..end_word).unwrap_or_default();
        if taken.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let base = index(slot.slot.offset / WORD_BYTES);
        for (number, word) in taken.iter().enumerate() {
            dirty.add_word(base.saturating_add(first_word).saturating_add(number), *word);
        }
        let pages = u32::try_from(range.end.saturating_sub(range.start) / PAGE_SIZE).unwrap_or(u32::MAX);
        self.log
            .clear(slot.slot.slot, range.start / PAGE_SIZE, pages, taken)
            .map_err(self.failed("clear KVM's dirty log of", slot))?;
        armed.iter().for_each(|armed| armed.store(true, Ordering::Relaxed));
        Ok(())
    }
}

impl Slot {
    fn new(slot: KvmSlot, ram: &Ram) -> Result<Self, TrackerError> {
        let address = slot.address(ram)?;
        let chunks = index(slot.size_bytes.div_ceil(CHUNK_SIZE));
        let words = vec![0; index(slot.size_bytes.div_ceil(WORD_BYTES))].into_boxed_slice();
        let armed = std::iter::repeat_with(AtomicBool::default).take(chunks).collect();
        Ok(Self { slot, address, armed, words: Mutex::new(words) })
    }

    /// The part of `range`, in bytes of the block, that lies in the slot, in bytes of the slot.
    fn part(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let start = range.start.saturating_sub(self.slot.offset);
        let end = range.end.saturating_sub(self.slot.offset).min(self.slot.size_bytes);
        (start < end).then_some(start..end)
    }
}

impl DirtyTracker for KvmDirtyLog {
    fn start(&self) -> Result<(), TrackerError> {
        /// Manual protection, and all bits set at the start: the alternative protects all of RAM at once.
        const WANTED: u64 = 3;
        /// Manual protection alone.
        const LEAST: u64 = 1;
        let machine = machine("turn on manual protection in KVM's dirty log for");
        let supported = self.log.supported().map_err(&machine)?;
        if supported & LEAST == 0 {
            return Err(TrackerError::NoManualDirtyLog);
        }
        self.log.enable(supported & WANTED).map_err(&machine)?;
        self.started.store(true, Ordering::Release);
        for slot in &self.slots {
            slot.armed.iter().for_each(|armed| armed.store(false, Ordering::Relaxed));
            let switched = self.log.switch(&slot.slot, slot.address, Switch::On);
            if let Err(error) = switched.map_err(self.failed("start KVM's dirty log of", slot)) {
                self.stop();
                return Err(error);
            }
        }
        Ok(())
    }

    fn sync(&self, block: usize, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        for slot in self.slots_of(block)? {
            let mut words = slot.words.lock().unwrap_or_else(PoisonError::into_inner);
            self.get(slot, &mut words)?;
            let base = index(slot.slot.offset / WORD_BYTES);
            for (number, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                dirty.add_word(base.saturating_add(number), *word);
            }
        }
        if let Some(own) = self.own(block) {
            own.add_to(dirty);
        }
        Ok(())
    }

    fn rearm(&self, block: usize, range: Range<u64>, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        for slot in self.slots_of(block)? {
            if let Some(part) = slot.part(&range) {
                self.rearm_slot(slot, part, dirty)?;
            }
        }
        if let Some(own) = self.own(block) {
            for chunk in index(range.start / CHUNK_SIZE)..index(range.end.div_ceil(CHUNK_SIZE)) {
                own.move_chunk(chunk, dirty);
            }
        }
        Ok(())
    }

    fn stop(&self) {
        if self.started.swap(false, Ordering::AcqRel) {
            for slot in &self.slots {
                // Nothing to do about a failure: the guest goes on, only slower.
                let _ = self.log.switch(&slot.slot, slot.address, Switch::Off);
            }
        }
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Log for Vm {
    fn supported(&self) -> io::Result<u64> {
        self.check_extension(sys::CAP_MANUAL_DIRTY_LOG_PROTECT2)
    }

    fn enable(&self, bits: u64) -> io::Result<()> {
        self.enable(sys::CAP_MANUAL_DIRTY_LOG_PROTECT2, bits)
    }

    fn switch(&self, slot: &KvmSlot, address: u64, switch: Switch) -> io::Result<()> {
        // SAFETY: by the contract of `KvmDirtyLog::new` the slot exists over this memory.
        unsafe { self.switch(slot, address, switch) }
    }

    fn get(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        // SAFETY: `words` is as long as `Slot::new` made it.
        unsafe { self.get_log(slot, words) }
    }

    fn clear(&self, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()> {
        // SAFETY: `words` are those that the range of `pages` lies in.
        unsafe { self.clear_log(slot, first_page, pages, words) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::MmapRegion;

    use super::*;
    use crate::memory::RamBlock;

    /// Three chunks and 100 pages, in slots of a chunk, and two chunks and 100 pages.
    const PAGES: u64 = 3 * 512 + 100;
    const SLOTS: [(u64, u64); 2] = [(0, 512), (512, 1024 + 100)];

    /// A kernel with a log of its own, that refuses what the real one refuses.
    #[derive(Debug, Default)]
    struct Fake {
        supported: u64,
        bits: Mutex<BTreeSet<u64>>,
        on: Mutex<BTreeSet<u32>>,
    }

    fn pages_of(slot: u32) -> Range<u64> {
        let (first, pages) = SLOTS[slot as usize];
        first..first + pages
    }

    impl Log for Arc<Fake> {
        fn supported(&self) -> io::Result<u64> {
            Ok(self.supported)
        }

        fn enable(&self, bits: u64) -> io::Result<()> {
            assert_eq!(bits & !self.supported, 0);
            Ok(())
        }

        fn switch(&self, slot: &KvmSlot, _: u64, switch: Switch) -> io::Result<()> {
            match switch {
                Switch::On => {
                    self.on.lock().unwrap().insert(slot.slot);
                    if self.supported & 2 != 0 {
                        self.bits.lock().unwrap().extend(pages_of(slot.slot));
                    }
                }
                Switch::Off => drop(self.on.lock().unwrap().remove(&slot.slot)),
            }
            Ok(())
        }

        fn get(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
            let pages = pages_of(slot);
            assert_eq!(words.len() as u64, (pages.end - pages.start).div_ceil(64));
            words.fill(0);
            for page in self.bits.lock().unwrap().range(pages.clone()) {
                let at = page - pages.start;
                words[(at / 64) as usize] |= 1 << (at % 64);
            }
            Ok(())
        }

        fn clear(&self, slot: u32, first_page: u64, count: u32, words: &[u64]) -> io::Result<()> {
            let pages = pages_of(slot);
            let last = first_page + u64::from(count) == pages.end - pages.start;
            if !first_page.is_multiple_of(64) || !(last || count.is_multiple_of(64)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let cleared = |at: u64| words[(at / 64) as usize] >> (at % 64) & 1 != 0;
            let first = pages.start + first_page;
            let range = first..first + u64::from(count);
            self.bits.lock().unwrap().retain(|page| !(range.contains(page) && cleared(page - first)));
            Ok(())
        }
    }

    fn tracker(supported: u64) -> (Arc<Fake>, KvmDirtyLog, Arc<[DirtyBitmap]>) {
        let region: MmapRegion = MmapRegion::new((PAGES * PAGE_SIZE) as usize).unwrap();
        let ram = Ram::new(vec![RamBlock::new("ram", Arc::new(region)).unwrap()]).unwrap();
        let slots: Vec<KvmSlot> = (0..)
            .zip(SLOTS)
            .map(|(slot, (first, pages))| KvmSlot {
                slot,
                guest_address: first * PAGE_SIZE,
                block: 0,
                offset: first * PAGE_SIZE,
                size_bytes: pages * PAGE_SIZE,
            })
            .collect();
        let fake = Arc::new(Fake { supported, ..Fake::default() });
        let own: Arc<[DirtyBitmap]> = Arc::new([DirtyBitmap::new(PAGES * PAGE_SIZE)]);
        let tracker = KvmDirtyLog::on(Box::new(fake.clone()), &ram, &slots, Some(own.clone())).unwrap();
        (fake, tracker, own)
    }

    fn pages(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        bitmap.drain(|run| pages.extend(run.map(|page| page as u64)));
        pages
    }

    #[derive(Debug, Clone)]
    enum Step {
        Guest(u64),
        Own(u64),
        Sync,
        Rearm(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..PAGES).prop_map(Step::Guest),
            2 => (0..PAGES).prop_map(Step::Own),
            1 => Just(Step::Sync),
            3 => (0..4u64).prop_map(Step::Rearm),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        /// After all has been re-armed once: exactly what was written since, and again until it is re-armed.
        #[test]
        fn reports_what_was_written(supported in prop_oneof![Just(1u64), Just(3)], steps in steps()) {
            let (fake, tracker, own) = tracker(supported);
            let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
            tracker.start().unwrap();
            tracker.rearm(0, 0..PAGES * PAGE_SIZE, &dirty).unwrap();
            prop_assert_eq!(pages(&dirty).len() as u64, PAGES);
            let mut written = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Guest(page) => {
                        fake.bits.lock().unwrap().insert(page);
                        written.insert(page);
                    }
                    Step::Own(page) => {
                        own[0].set(page as usize..page as usize + 1);
                        written.insert(page);
                    }
                    Step::Sync => {
                        tracker.sync(0, &dirty).unwrap();
                        prop_assert_eq!(pages(&dirty), written.clone());
                    }
                    Step::Rearm(chunk) => {
                        let range = chunk * CHUNK_SIZE..((chunk + 1) * CHUNK_SIZE).min(PAGES * PAGE_SIZE);
                        tracker.rearm(0, range, &dirty).unwrap();
                        let mine = |page: &u64| page / 512 == chunk;
                        let expected: BTreeSet<u64> = written.iter().copied().filter(mine).collect();
                        prop_assert_eq!(pages(&dirty), expected);
                        written.retain(|page| !mine(page));
                    }
                }
            }
            drop(tracker);
            prop_assert!(fake.on.lock().unwrap().is_empty(), "the log is off at the end");
        }
    }

    #[test]
    fn refusals() {
        let (_, old, _) = tracker(0);
        assert!(matches!(old.start(), Err(TrackerError::NoManualDirtyLog)));
        let (fake, tracker, _) = tracker(3);
        let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
        assert!(tracker.sync(0, &dirty).is_err(), "not started");
        tracker.start().unwrap();
        assert!(tracker.sync(1, &dirty).is_err(), "no such block");
        let slot = |offset, size_bytes| KvmSlot { slot: 0, guest_address: 0, block: 0, offset, size_bytes };
        for (offset, size_bytes) in [(4096, CHUNK_SIZE), (0, 4096), (0, 0), (0, PAGES * PAGE_SIZE + 4096)] {
            let made = KvmDirtyLog::on(Box::new(fake.clone()), &tracker.ram, &[slot(offset, size_bytes)], None);
            assert!(matches!(made, Err(TrackerError::Slot { .. })), "{offset} {size_bytes}");
        }
    }
}
