//! KVM's dirty rings: each vCPU has one, into which KVM puts the pages that it writes.
//!
//! An entry goes from the guest's write to KVM's next write to the same page through these states: KVM makes it dirty; this
//! process reads it and marks it as read; `KVM_RESET_DIRTY_RINGS` protects the page again and frees the entry. Until then
//! further writes to the page make no entry. So a page that was read out of a ring is `fresh` until the reset and `settled`
//! after it, and only settled pages are given away by a re-arming: what the engine reads afterwards, it reads after the
//! page was protected. Resets are put off until a re-arming meets a fresh page or a quarter of a ring waits for one: each
//! costs the guest a fault for every page that it goes on writing.
//!
//! KVM makes room for the entries it cannot hold back any more: a vCPU leaves `KVM_RUN` for a full ring some entries before
//! the end. The VMM's thread then calls [`KvmDirtyRings::make_room`], at any time, also when nobody tracks. There are KVMs
//! that emulate the guest and do not look while they do, and go over the end (a paravirtual one was seen to). That is
//! found, always: either as many entries as the ring has were read with no reset between them, or KVM frees fewer than
//! were read. The migration fails then, the VM's rings are not used again, and the guest goes on. A thread that reads the
//! rings every few milliseconds makes it take a great many writes to get there.
//!
//! What must stay true: reading, resetting, and moving what was read happen under one lock; entries are read in order and none
//! twice; an entry is marked as read after its page is in `fresh`, and a page goes from `fresh` to `settled` after
//! the reset has returned.
//!
//! On a processor with a log of its own (Intel's PML) an entry comes when the vCPU next leaves the guest. A write may then be
//! told by a later look than the one that came after it; once the guest is paused, by the next.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::super::{CHUNK_SIZE, DirtyBitmap, DirtyTracker, PAGE_SIZE, Ram, TrackerError};
use super::sys::{self, Entry, Vm};
use super::{KvmSlot, Switch, about, index, machine};

/// A ring has at least a page of entries.
const LEAST_ENTRIES: u32 = (PAGE_SIZE / size_of::<Entry>() as u64) as u32;
/// Calls to reset in a row that free nothing, or times that a ring is full and has nothing in it, before that counts as an
/// overflow. A signal makes one such call.
const TRIES: u32 = 100;

/// The size of a VM's rings, which have been turned on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmRingSize {
    entries: u32,
}

impl KvmRingSize {
    /// Turns on dirty rings of so many entries, or, without a number, of as many as KVM allows. The number is rounded up to
    /// one that KVM takes. To be done after the VM was made and before its first vCPU; from then on the VM has no dirty log.
    ///
    /// # Errors
    /// When this KVM has no dirty rings, or the VM has vCPUs already.
    pub fn enable(vm: BorrowedFd<'_>, entries: Option<u32>) -> Result<Self, TrackerError> {
        let vm = Vm::new(vm)?;
        let doing = machine("turn on KVM's dirty rings for");
        let mut cap = sys::CAP_DIRTY_LOG_RING_ACQ_REL;
        let mut most_bytes = vm.check_extension(cap).map_err(&doing)?;
        if most_bytes == 0 {
            // The older name, on processors where all memory is ordered as the new one asks for.
            cap = sys::CAP_DIRTY_LOG_RING;
            most_bytes = vm.check_extension(cap).map_err(&doing)?;
        }
        let most = u32::try_from(most_bytes / size_of::<Entry>() as u64).unwrap_or(u32::MAX);
        if most < LEAST_ENTRIES {
            return Err(TrackerError::NoDirtyRing);
        }
        let wanted = entries.unwrap_or(most).max(LEAST_ENTRIES);
        let mut entries = wanted.checked_next_power_of_two().unwrap_or(most).min(most);
        loop {
            match vm.enable(cap, u64::from(entries) * size_of::<Entry>() as u64) {
                Ok(()) => return Ok(Self { entries }),
                // KVM keeps some entries for what a vCPU may write before it leaves, and does not say how many.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput && entries < most => {
                    entries = entries.saturating_mul(2).min(most);
                }
                Err(error) => return Err(doing(error)),
            }
        }
    }

    /// Entries in each vCPU's ring.
    pub fn entries(self) -> u32 {
        self.entries
    }
}

/// What is asked of the kernel.
trait Kernel: Send + Sync + std::fmt::Debug {
    /// Starts or ends the watch on a slot at this address of this process.
    fn switch(&self, slot: &KvmSlot, address: u64, switch: Switch) -> io::Result<()>;
    /// Protects the pages of the entries that were read, and frees the entries; tells how many.
    fn reset(&self) -> io::Result<u64>;
    /// A vCPU's ring, shared with the kernel.
    fn ring(&self, vcpu: usize) -> &[Entry];
}

/// How far a vCPU's ring has been read.
#[derive(Debug, Clone, Copy, Default)]
struct Cursor {
    /// Where the next entry comes.
    next: u32,
    /// Entries read and not yet free again.
    read: u32,
    /// Times in a row that the ring was said to be full and had nothing in it.
    nothing: u32,
}

#[derive(Debug)]
struct State {
    cursors: Vec<Cursor>,
    /// A ring went over its end. Nothing read from then on means anything.
    lost: bool,
}

#[derive(Debug)]
struct Slot {
    slot: KvmSlot,
    address: u64,
}

/// The dirty rings of a VM's vCPUs, for as long as the VM lives: for a tracker, and for the threads of the vCPUs.
#[derive(Debug)]
pub struct KvmDirtyRings {
    ram: Ram,
    kernel: Box<dyn Kernel>,
    slots: Vec<Slot>,
    by_number: BTreeMap<u32, usize>,
    entries: u32,
    state: Mutex<State>,
    /// For each block, pages that are out of the rings and not yet protected again.
    fresh: Vec<DirtyBitmap>,
    /// For each block, pages that are protected again.
    settled: Vec<DirtyBitmap>,
    /// A tracker has been started.
    in_use: AtomicBool,
    times_full: AtomicU64,
}

impl KvmDirtyRings {
    /// The rings of the VM behind the descriptor `vm`, turned on in the given size, with all its vCPUs and with its slots over
    /// `ram`.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated, a ring cannot be mapped, or the slots do not lie in the blocks as they must.
    ///
    /// # Safety
    /// `vm` must be a KVM virtual machine that has exactly these slots, over the memory of these blocks, mapped for as
    /// long as the machine lives; the vCPUs must be its, and no other `KvmDirtyRings` may be made for them.
    pub unsafe fn new(
        vm: BorrowedFd<'_>,
        vcpus: &[BorrowedFd<'_>],
        size: KvmRingSize,
        ram: &Ram,
        slots: &[KvmSlot],
    ) -> Result<Arc<Self>, TrackerError> {
        let vm = Vm::new(vm)?;
        let rings = vcpus.iter().map(|vcpu| Mapped::new(*vcpu, size)).collect::<io::Result<Vec<_>>>();
        let rings = rings.map_err(machine("map the dirty ring of a vCPU for"))?;
        Self::on(Box::new(Rings { vm, rings }), vcpus.len(), size, ram, slots)
    }

    fn on(
        kernel: Box<dyn Kernel>,
        vcpus: usize,
        size: KvmRingSize,
        ram: &Ram,
        slots: &[KvmSlot],
    ) -> Result<Arc<Self>, TrackerError> {
        let placed = slots.iter().map(|slot| Ok(Slot { slot: *slot, address: slot.address(ram)? }));
        let clean = || ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect();
        Ok(Arc::new(Self {
            ram: ram.clone(),
            kernel,
            slots: placed.collect::<Result<_, TrackerError>>()?,
            by_number: slots.iter().enumerate().map(|(number, slot)| (slot.slot, number)).collect(),
            entries: size.entries,
            state: Mutex::new(State { cursors: vec![Cursor::default(); vcpus], lost: false }),
            fresh: clean(),
            settled: clean(),
            in_use: AtomicBool::new(false),
            times_full: AtomicU64::new(0),
        }))
    }

    /// Makes room in the rings, when that vCPU has left `KVM_RUN` because its own is full (`KVM_EXIT_DIRTY_RING_FULL`). What
    /// was in them is kept for the tracker.
    ///
    /// # Errors
    /// When the kernel refuses. The vCPU then cannot go on.
    pub fn make_room(&self, vcpu: usize) -> Result<(), TrackerError> {
        self.times_full.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state();
        match self.make_room_in_order(vcpu, &mut state) {
            Err(TrackerError::RingOverflow) => self.make_room_by_force(vcpu),
            other => other,
        }
    }

    /// How often room was made for a vCPU whose ring was full.
    pub fn times_full(&self) -> u64 {
        self.times_full.load(Ordering::Relaxed)
    }

    /// Whether KVM has gone over the end of a ring, so that a tracker on them cannot be started any more.
    pub fn are_lost(&self) -> bool {
        self.state().lost
    }

    fn make_room_in_order(&self, vcpu: usize, state: &mut State) -> Result<(), TrackerError> {
        self.read(state)?;
        if let Some(cursor) = state.cursors.get_mut(vcpu) {
            // Another thread may have made room already, but not again and again.
            cursor.nothing = if cursor.read == 0 { cursor.nothing.saturating_add(1) } else { 0 };
            if cursor.nothing > TRIES {
                return Err(self.lose(state));
            }
        }
        self.reset(state)
    }

    /// After an overflow this process and KVM do not agree any more on which entry is the next to be free. KVM frees entries
    /// marked as read from there on and stops at the first that is not. So quarters are marked by turns until it frees
    /// something. That is never more than what is in a ring that is full.
    fn make_room_by_force(&self, vcpu: usize) -> Result<(), TrackerError> {
        let doing = machine("make room in a vCPU's dirty ring of");
        let ring = self.kernel.ring(vcpu);
        let mark =
            |entries: &[Entry], flags| entries.iter().for_each(|entry| entry.flags.store(flags, Ordering::Release));
        mark(ring, 0);
        // A call that a signal comes into frees less than it could, so there are as many as free something.
        let free = || {
            let mut freed = 0u64;
            loop {
                match self.kernel.reset().map_err(&doing)? {
                    0 => return Ok(freed),
                    more => freed = freed.saturating_add(more),
                }
            }
        };
        // What the other rings have to free is not to be taken for this one's.
        free()?;
        for _ in 0..TRIES {
            for quarter in ring.chunks((ring.len() / 4).max(1)) {
                mark(quarter, sys::ENTRY_RESET);
                if free()? > 0 {
                    return Ok(());
                }
                mark(quarter, 0);
            }
        }
        Err(TrackerError::RingOverflow)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on nothing is known of what the guest writes.
    fn lose(&self, state: &mut State) -> TrackerError {
        state.lost = true;
        self.switch_off();
        TrackerError::RingOverflow
    }

    fn switch_off(&self) {
        for slot in &self.slots {
            // Nothing to do about a failure: the guest goes on, only slower.
            let _ = self.kernel.switch(&slot.slot, slot.address, Switch::Off);
        }
    }

    /// Reads all entries there are into `fresh`.
    fn read(&self, state: &mut State) -> Result<(), TrackerError> {
        let mut cursors = state.cursors.iter_mut().enumerate();
        if state.lost || !cursors.all(|(vcpu, cursor)| self.read_ring(self.kernel.ring(vcpu), cursor)) {
            return Err(self.lose(state));
        }
        Ok(())
    }

    /// Whether it did not go over its end.
    fn read_ring(&self, ring: &[Entry], cursor: &mut Cursor) -> bool {
        let mask = self.entries.saturating_sub(1);
        while let Some(entry) = ring.get((cursor.next & mask) as usize) {
            if cursor.read >= self.entries {
                // KVM always keeps some free.
                return false;
            }
            // Acquire: the slot and the offset were there before.
            let flags = entry.flags.load(Ordering::Acquire);
            if flags & (sys::ENTRY_DIRTY | sys::ENTRY_RESET) != sys::ENTRY_DIRTY {
                break;
            }
            self.mark(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            // Release: they have been read.
            entry.flags.store(sys::ENTRY_RESET, Ordering::Release);
            cursor.next = cursor.next.wrapping_add(1);
            cursor.read = cursor.read.saturating_add(1);
        }
        true
    }

    /// Marks a page of a slot. A slot that is not of RAM is the VMM's own affair.
    fn mark(&self, slot: u32, offset: u64) {
        let Some(Slot { slot, .. }) = self.by_number.get(&slot).and_then(|number| self.slots.get(*number)) else {
            return;
        };
        if let Some(fresh) = self.fresh.get(slot.block)
            && offset < slot.size_bytes.div_ceil(PAGE_SIZE)
        {
            let page = index((slot.offset / PAGE_SIZE).saturating_add(offset));
            fresh.set(page..page.saturating_add(1));
        }
    }

    /// Has KVM protect the pages of all entries that were read. `fresh` is empty afterwards.
    fn reset(&self, state: &mut State) -> Result<(), TrackerError> {
        let read = state.cursors.iter().map(|cursor| u64::from(cursor.read)).sum::<u64>();
        let (mut freed, mut tries) = (0u64, 0);
        // KVM leaves off early when a signal comes, and says so with a smaller number.
        while freed < read && tries < TRIES {
            let more = self.kernel.reset().map_err(machine("reset the dirty rings of"))?;
            freed = freed.saturating_add(more);
            tries = if more == 0 { tries + 1 } else { 0 };
        }
        if freed != read {
            return Err(self.lose(state));
        }
        state.cursors.iter_mut().for_each(|cursor| cursor.read = 0);
        for (fresh, settled) in self.fresh.iter().zip(&self.settled) {
            fresh.dirty_chunks().for_each(|chunk| fresh.move_chunk(chunk, settled));
        }
        Ok(())
    }

    /// Reads the rings, and resets them when much waits for it.
    fn collect(&self, state: &mut State) -> Result<(), TrackerError> {
        self.read(state)?;
        let much = self.entries / 4;
        if state.cursors.iter().any(|cursor| cursor.read > much) { self.reset(state) } else { Ok(()) }
    }

    /// Empties the rings and forgets what was in them.
    fn forget(&self) -> Result<(), TrackerError> {
        let mut state = self.state();
        self.read(&mut state)?;
        self.reset(&mut state)?;
        self.fresh.iter().chain(&self.settled).for_each(|bitmap| bitmap.drain(drop));
        Ok(())
    }

    fn start(&self) -> Result<(), TrackerError> {
        self.forget()?;
        for slot in &self.slots {
            let doing = about("start KVM's dirty ring for", &self.ram, slot.slot.block);
            self.kernel
                .switch(&slot.slot, slot.address, Switch::On)
                .map_err(doing)
                .inspect_err(|_| self.switch_off())?;
        }
        Ok(())
    }

    fn sync(&self, block: usize, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        let mut state = self.state();
        self.collect(&mut state)?;
        for bitmaps in [&self.fresh, &self.settled] {
            bitmaps.get(block).into_iter().for_each(|bitmap| bitmap.add_to(dirty));
        }
        Ok(())
    }

    fn rearm(&self, block: usize, chunks: Range<usize>, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        let mut state = self.state();
        self.collect(&mut state)?;
        let fresh = self.fresh.get(block);
        if fresh.is_some_and(|fresh| chunks.clone().any(|chunk| fresh.count_chunk(chunk) > 0)) {
            self.reset(&mut state)?;
        }
        if let Some(settled) = self.settled.get(block) {
            chunks.clone().for_each(|chunk| settled.move_chunk(chunk, dirty));
        }
        Ok(())
    }
}

/// [`DirtyTracker`] on the dirty rings of a VM's vCPUs.
#[derive(Debug)]
pub struct KvmDirtyRing {
    rings: Arc<KvmDirtyRings>,
    own_writes: Option<Arc<[DirtyBitmap]>>,
    started: AtomicBool,
    read_every: Option<Duration>,
    reader: Mutex<Option<Reader>>,
}

/// A thread that reads the rings from time to time, until this is dropped.
#[derive(Debug)]
struct Reader {
    stay: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn start(rings: Arc<KvmDirtyRings>, every: Duration) -> io::Result<Self> {
        let (stay, gone) = mpsc::channel();
        let thread = std::thread::Builder::new().name("dirty rings".to_owned()).spawn(move || {
            while gone.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let mut state = rings.state();
                // What goes wrong here goes wrong for the engine too, which has somebody to tell.
                let _ = rings.collect(&mut state);
            }
        })?;
        Ok(Self { stay: Some(stay), thread: Some(thread) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stay = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl KvmDirtyRing {
    /// A tracker that reads these rings. In `own_writes`, one for each block, the VMM marks what it writes itself: each page
    /// after the write to it. A thread of the tracker reads the rings as often as `read_every` says, so that they seldom fill
    /// while the engine waits for something; without, they are read when the engine asks and when one is full. Nothing is
    /// tracked until it is started.
    ///
    /// # Errors
    /// When `own_writes` are not as many as there are blocks.
    pub fn new(
        rings: Arc<KvmDirtyRings>,
        own_writes: Option<Arc<[DirtyBitmap]>>,
        read_every: Option<Duration>,
    ) -> Result<Self, TrackerError> {
        let blocks = rings.ram.blocks().len();
        if let Some(own) = &own_writes
            && own.len() != blocks
        {
            return Err(TrackerError::UnknownBlock { block: blocks.min(own.len()), blocks });
        }
        Ok(Self { rings, own_writes, started: AtomicBool::new(false), read_every, reader: Mutex::default() })
    }

    fn check(&self, block: usize) -> Result<(), TrackerError> {
        let blocks = self.rings.ram.blocks().len();
        if block >= blocks || !self.started.load(Ordering::Acquire) {
            return Err(TrackerError::UnknownBlock { block, blocks });
        }
        Ok(())
    }

    fn own(&self, block: usize) -> Option<&DirtyBitmap> {
        self.own_writes.as_ref()?.get(block)
    }

    fn reader(&self) -> MutexGuard<'_, Option<Reader>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyTracker for KvmDirtyRing {
    fn start(&self) -> Result<(), TrackerError> {
        if self.rings.in_use.swap(true, Ordering::AcqRel) {
            return Err(TrackerError::RingsInUse);
        }
        self.started.store(true, Ordering::Release);
        let begin = || {
            self.rings.start()?;
            let doing = machine("start a thread for the dirty rings of");
            let reader = self.read_every.map(|every| Reader::start(self.rings.clone(), every).map_err(doing));
            *self.reader() = reader.transpose()?;
            Ok(())
        };
        begin().inspect_err(|_| self.stop())
    }

    fn sync(&self, block: usize, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        self.check(block)?;
        self.rings.sync(block, dirty)?;
        if let Some(own) = self.own(block) {
            own.add_to(dirty);
        }
        Ok(())
    }

    fn rearm(&self, block: usize, range: Range<u64>, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        self.check(block)?;
        let chunks = index(range.start / CHUNK_SIZE)..index(range.end.div_ceil(CHUNK_SIZE));
        self.rings.rearm(block, chunks.clone(), dirty)?;
        if let Some(own) = self.own(block) {
            chunks.for_each(|chunk| own.move_chunk(chunk, dirty));
        }
        Ok(())
    }

    fn stop(&self) {
        if self.started.swap(false, Ordering::AcqRel) {
            *self.reader() = None;
            self.rings.switch_off();
            // What cannot be emptied now is when the next one starts, or that one says why not.
            let _ = self.rings.forget();
            self.rings.in_use.store(false, Ordering::Release);
        }
    }
}

impl Drop for KvmDirtyRing {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A VM's rings as KVM has them.
#[derive(Debug)]
struct Rings {
    vm: Vm,
    rings: Vec<Mapped>,
}

impl Kernel for Rings {
    fn switch(&self, slot: &KvmSlot, address: u64, switch: Switch) -> io::Result<()> {
        // SAFETY: by the contract of `KvmDirtyRings::new` the slot exists over this memory.
        unsafe { self.vm.switch(slot, address, switch) }
    }

    fn reset(&self) -> io::Result<u64> {
        self.vm.reset_rings()
    }

    fn ring(&self, vcpu: usize) -> &[Entry] {
        self.rings.get(vcpu).map(Mapped::entries).unwrap_or_default()
    }
}

/// A vCPU's ring, mapped. The mapping holds the vCPU.
#[derive(Debug)]
struct Mapped {
    start: NonNull<Entry>,
    entries: usize,
}

// SAFETY: the memory is the mapping's alone, and all of it is atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(vcpu: BorrowedFd<'_>, size: KvmRingSize) -> io::Result<Self> {
        let entries = size.entries as usize;
        let (bytes, offset) = (entries.saturating_mul(size_of::<Entry>()), sys::RING_PAGE_OFFSET * PAGE_SIZE);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, of a place that the kernel chooses, touches nothing that is there.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, vcpu, offset) }?;
        let start = NonNull::new(start.cast::<Entry>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, entries })
    }

    fn entries(&self) -> &[Entry] {
        // SAFETY: the mapping is that long, lives as long as `self`, and any bytes are valid entries. KVM writes to them, as
        // other threads may: they are atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.entries) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let bytes = self.entries.saturating_mul(size_of::<Entry>());
        // SAFETY: the mapping is that long, and nothing borrows it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), bytes) };
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
    const ENTRIES: u32 = 32;
    const VCPUS: usize = 3;

    /// What KVM remembers of a ring.
    #[derive(Debug, Default, Clone, Copy)]
    struct Indices {
        dirty: u32,
        reset: u32,
    }

    #[derive(Debug, Default)]
    struct Inside {
        on: BTreeSet<u32>,
        indices: [Indices; VCPUS],
        writable: BTreeSet<u64>,
    }

    /// A kernel with rings of its own.
    #[derive(Debug)]
    struct Fake {
        rings: Vec<Box<[Entry]>>,
        inside: Mutex<Inside>,
        /// A reset is interrupted after so many entries.
        patience: u64,
        /// Entries in a ring at which the vCPU does not run on.
        soft_limit: u32,
    }

    fn slot_of(page: u64) -> (u32, u64) {
        let slot = u32::from(page >= SLOTS[1].0);
        (slot, page - SLOTS[slot as usize].0)
    }

    impl Inside {
        fn used(&self, vcpu: usize) -> u32 {
            self.indices[vcpu].dirty.wrapping_sub(self.indices[vcpu].reset)
        }
    }

    impl Fake {
        fn inside(&self) -> MutexGuard<'_, Inside> {
            self.inside.lock().unwrap()
        }

        fn is_full(&self, vcpu: usize) -> bool {
            self.inside().used(vcpu) >= self.soft_limit
        }

        /// A vCPU writes a page, while KVM is held.
        fn write(&self, inside: &mut Inside, vcpu: usize, page: u64, write: Write) {
            let (slot, offset) = slot_of(page);
            let protected = inside.writable.insert(page);
            if inside.on.contains(&slot) && (protected || write == Write::Emulated) {
                let entry = &self.rings[vcpu][(inside.indices[vcpu].dirty % ENTRIES) as usize];
                entry.slot.store(slot, Ordering::Relaxed);
                entry.offset.store(offset, Ordering::Relaxed);
                entry.flags.store(sys::ENTRY_DIRTY, Ordering::Release);
                inside.indices[vcpu].dirty += 1;
            }
        }
    }

    impl Kernel for Arc<Fake> {
        fn switch(&self, slot: &KvmSlot, _: u64, switch: Switch) -> io::Result<()> {
            let mut inside = self.inside();
            match switch {
                Switch::On => {
                    inside.on.insert(slot.slot);
                    inside.writable.retain(|page| slot_of(*page).0 != slot.slot);
                }
                Switch::Off => drop(inside.on.remove(&slot.slot)),
            }
            Ok(())
        }

        fn reset(&self) -> io::Result<u64> {
            let mut inside = self.inside();
            let mut freed = 0;
            for (vcpu, ring) in self.rings.iter().enumerate() {
                while freed < self.patience {
                    let entry = &ring[(inside.indices[vcpu].reset % ENTRIES) as usize];
                    if entry.flags.load(Ordering::Acquire) & sys::ENTRY_RESET == 0 {
                        break;
                    }
                    let page =
                        SLOTS[entry.slot.load(Ordering::Relaxed) as usize].0 + entry.offset.load(Ordering::Relaxed);
                    inside.writable.remove(&page);
                    entry.flags.store(0, Ordering::Release);
                    inside.indices[vcpu].reset += 1;
                    freed += 1;
                }
            }
            Ok(freed)
        }

        fn ring(&self, vcpu: usize) -> &[Entry] {
            &self.rings[vcpu]
        }
    }

    fn rings(patience: u64) -> (Arc<Fake>, Arc<KvmDirtyRings>) {
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
        let ring = || std::iter::repeat_with(Entry::default).take(ENTRIES as usize).collect();
        let rings = std::iter::repeat_with(ring).take(VCPUS).collect();
        let fake = Arc::new(Fake { rings, inside: Mutex::default(), patience, soft_limit: ENTRIES - 8 });
        let size = KvmRingSize { entries: ENTRIES };
        (fake.clone(), KvmDirtyRings::on(Box::new(fake), VCPUS, size, &ram, &slots).unwrap())
    }

    fn pages(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        bitmap.drain(|run| pages.extend(run.map(|page| page as u64)));
        pages
    }

    fn bytes_of(chunk: u64) -> Range<u64> {
        chunk * CHUNK_SIZE..((chunk + 1) * CHUNK_SIZE).min(PAGES * PAGE_SIZE)
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Write {
        /// The processor's own: an entry only if the page was protected.
        Plain,
        /// Done by KVM for the guest: always an entry.
        Emulated,
    }

    #[derive(Debug, Clone)]
    enum Step {
        Guest(usize, u64, Write),
        Own(u64),
        Collect,
        MakeRoom(usize),
        Sync,
        Rearm(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let write = prop_oneof![4 => Just(Write::Plain), 1 => Just(Write::Emulated)];
        // Near pages come again and again.
        let page = prop_oneof![0..PAGES, 500..530u64, Just(PAGES - 1)];
        let step = prop_oneof![
            20 => (0..VCPUS, page, write).prop_map(|(vcpu, page, write)| Step::Guest(vcpu, page, write)),
            2 => (0..PAGES).prop_map(Step::Own),
            1 => Just(Step::Collect),
            1 => (0..VCPUS).prop_map(Step::MakeRoom),
            1 => Just(Step::Sync),
            3 => (0..4u64).prop_map(Step::Rearm),
        ];
        prop::collection::vec(step, 0..300)
    }

    proptest! {
        /// Exactly what was written since the start and until it is re-armed, and what was re-armed is protected.
        #[test]
        fn reports_what_was_written(patience in 1u64..40, steps in steps(), turns in 1..3) {
            let (fake, rings) = rings(patience);
            let own: Arc<[DirtyBitmap]> = Arc::new([DirtyBitmap::new(PAGES * PAGE_SIZE)]);
            let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
            for _ in 0..turns {
                let tracker = KvmDirtyRing::new(rings.clone(), Some(own.clone()), None).unwrap();
                tracker.start().unwrap();
                let mut written = BTreeSet::new();
                for step in &steps {
                    match *step {
                        Step::Guest(vcpu, page, write) => {
                            if fake.is_full(vcpu) {
                                rings.make_room(vcpu).unwrap();
                                prop_assert_eq!(fake.inside().used(vcpu), 0);
                            }
                            fake.write(&mut fake.inside(), vcpu, page, write);
                            written.insert(page);
                        }
                        Step::Own(page) => {
                            own[0].set(page as usize..page as usize + 1);
                            written.insert(page);
                        }
                        Step::Collect => rings.collect(&mut rings.state()).unwrap(),
                        Step::MakeRoom(vcpu) => rings.make_room(vcpu).unwrap(),
                        Step::Sync => {
                            tracker.sync(0, &dirty).unwrap();
                            prop_assert_eq!(pages(&dirty), written.clone());
                        }
                        Step::Rearm(chunk) => {
                            tracker.rearm(0, bytes_of(chunk), &dirty).unwrap();
                            let mine = |page: &u64| page / 512 == chunk;
                            let expected: BTreeSet<u64> = written.iter().copied().filter(mine).collect();
                            prop_assert_eq!(pages(&dirty), expected);
                            let open: Vec<u64> = fake.inside().writable.iter().copied().filter(mine).collect();
                            prop_assert!(open.is_empty(), "not protected: {open:?}");
                            written.retain(|page| !mine(page));
                        }
                    }
                }
                tracker.stop();
                prop_assert!(fake.inside().on.is_empty(), "the watch is off at the end");
                prop_assert_eq!((0..VCPUS).map(|vcpu| fake.inside().used(vcpu)).sum::<u32>(), 0);
                own[0].drain(drop);
            }
        }

        /// A KVM that does not stop a vCPU whose ring is full: either nothing is missing or it is said, and the guest goes on.
        #[test]
        fn an_overflow_is_found(
            before in 0..ENTRIES,
            read in any::<bool>(),
            burst in 0..4 * ENTRIES,
            others in 0..ENTRIES - 8,
            patience in prop_oneof![Just(u64::MAX), 1u64..40],
        ) {
            let (fake, rings) = rings(patience);
            let tracker = KvmDirtyRing::new(rings.clone(), None, None).unwrap();
            tracker.start().unwrap();
            let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
            let mut written = BTreeSet::new();
            let mut write = |vcpu, count: u32, first: u64| for page in (first..).take(count as usize) {
                fake.write(&mut fake.inside(), vcpu, page, Write::Plain);
                written.insert(page);
            };
            write(1, before, 0);
            if read {
                // Read and not reset, unless it is much.
                let _ = rings.collect(&mut rings.state());
            }
            write(1, burst, 300);
            write(2, others, 1000);
            let over = fake.inside().used(1) > ENTRIES;
            match tracker.sync(0, &dirty) {
                Ok(()) => {
                    prop_assert_eq!(pages(&dirty), written);
                    prop_assert!(!over || tracker.rearm(0, bytes_of(0), &dirty).is_err());
                }
                Err(error) => {
                    prop_assert!(matches!(error, TrackerError::RingOverflow));
                    prop_assert!(fake.inside().used(1) >= ENTRIES);
                    prop_assert!(fake.inside().on.is_empty());
                    prop_assert!(matches!(tracker.rearm(0, bytes_of(1), &dirty), Err(TrackerError::RingOverflow)));
                    tracker.stop();
                    prop_assert!(matches!(tracker.start(), Err(TrackerError::RingOverflow)));
                }
            }
            for vcpu in 0..VCPUS {
                let mut times = 0;
                while fake.is_full(vcpu) {
                    rings.make_room(vcpu).unwrap();
                    times += 1;
                    prop_assert!(times < 40, "no room is made");
                }
            }
        }
    }

    /// vCPUs that write, and make room when they must, beside an engine that re-arms and reads: what was read last is what
    /// there is.
    #[test]
    fn nothing_is_missed_while_the_guest_runs() {
        let (fake, rings) = rings(7);
        let ram: Vec<AtomicU64> = std::iter::repeat_with(AtomicU64::default).take(PAGES as usize).collect();
        let tracker = KvmDirtyRing::new(rings.clone(), None, Some(Duration::from_millis(1))).unwrap();
        tracker.start().unwrap();
        let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
        let mut sent = vec![0; PAGES as usize];
        let running = AtomicBool::new(true);
        let send = |sent: &mut Vec<u64>| {
            for chunk in 0..4 {
                tracker.rearm(0, bytes_of(chunk), &dirty).unwrap();
                for page in pages(&dirty) {
                    sent[page as usize] = ram[page as usize].load(Ordering::SeqCst);
                }
            }
        };
        std::thread::scope(|scope| {
            for vcpu in 0..VCPUS {
                let (fake, rings, ram, running) = (&fake, &rings, &ram, &running);
                scope.spawn(move || {
                    let mut random = vcpu as u64 + 1;
                    while running.load(Ordering::Relaxed) {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let page = (random >> 33) % if random >> 63 == 0 { PAGES } else { 20 };
                        while fake.is_full(vcpu) {
                            rings.make_room(vcpu).unwrap();
                        }
                        // One step for the processor, and so one here: no reset comes between the entry and the write.
                        let mut inside = fake.inside();
                        fake.write(&mut inside, vcpu, page, Write::Plain);
                        ram[page as usize].fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            let until = std::time::Instant::now() + Duration::from_millis(500);
            while std::time::Instant::now() < until {
                send(&mut sent);
                tracker.sync(0, &dirty).unwrap();
            }
            running.store(false, Ordering::Relaxed);
        });
        send(&mut sent);
        let now: Vec<u64> = ram.iter().map(|page| page.load(Ordering::SeqCst)).collect();
        assert!(now.iter().sum::<u64>() > 1000);
        assert_eq!(sent, now);
    }

    #[test]
    fn refusals() {
        let (fake, rings) = rings(u64::MAX);
        let first = KvmDirtyRing::new(rings.clone(), None, Some(Duration::from_millis(1))).unwrap();
        let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
        assert!(first.sync(0, &dirty).is_err(), "not started");
        first.start().unwrap();
        assert!(first.sync(1, &dirty).is_err(), "no such block");
        let second = KvmDirtyRing::new(rings.clone(), None, Some(Duration::from_millis(1))).unwrap();
        assert!(matches!(second.start(), Err(TrackerError::RingsInUse)));
        drop(second);
        first.sync(0, &dirty).unwrap();
        drop(first);
        // Entries of no slot, beyond a slot's end, and of no vCPU.
        for (slot, offset) in [(7, 0), (0, 512), (1, u64::MAX), (u32::MAX, u64::MAX)] {
            rings.mark(slot, offset);
        }
        assert!(rings.fresh.iter().all(|fresh| fresh.count() == 0));
        rings.make_room(VCPUS).unwrap();
        // A vCPU that is said to be stopped for a full ring, for ever.
        let mut times = 0;
        while !rings.state().lost {
            let _ = rings.make_room(0);
            times += 1;
            assert!(times < 1000);
        }
        assert!(KvmDirtyRing::new(rings, Some(Arc::new([])), None).is_err());
        drop(fake);
    }
}
