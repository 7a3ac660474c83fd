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
//! were read. The migration fails then, the VM's rings are not used again, and the guest goes on. A vCPU's thread that comes
//! out of the guest and calls [`KvmDirtyRings::look`] every few milliseconds of its processor time makes it take a great many
//! writes to get there, however busy the host is: only the vCPU itself fills its ring.
//!
//! What must stay true: reading, resetting, and moving what was read happen under one lock; entries are read in order and none
//! twice; an entry is marked as read after its page is in `fresh`, and a page goes from `fresh` to `settled` after
//! the reset has returned. KVM never frees more entries of a ring than are in it: it would count the ring as full for ever. So
//! once a ring went over its end no entry is marked as read, except for a vCPU whose own ring is known to be full.
//!
//! On a processor with a log of its own (Intel's PML) an entry comes when the vCPU next leaves the guest. A write may then be
//! told by a later look than the one that came after it; once the guest is paused, by the next.

mod mapped;
#[cfg(test)]
mod tests;
mod tracker;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::{DirtyBitmap, PAGE_SIZE, Ram, TrackerError};
use super::sys::{self, Entry, Vm};
use super::{KvmSlot, Switch, about, index, machine};
use mapped::{Mapped, Rings};

pub use tracker::KvmDirtyRing;

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

fn set_flags(entries: &[Entry], flags: u32) {
    entries.iter().for_each(|entry| entry.flags.store(flags, Ordering::Release));
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
    /// Entries ever read.
    total: u64,
    /// Times in a row that the ring was said to be full, had nothing in it, and nobody else had made room.
    nothing: u32,
    /// Resets that had freed something when its vCPU last came for room.
    resets: u64,
    /// Its vCPU has come for room since a ring went over its end.
    came: bool,
}

#[derive(Debug)]
struct State {
    cursors: Vec<Cursor>,
    /// A ring went over its end. Nothing read from then on means anything.
    lost: bool,
    /// Resets so far that have freed something.
    resets: u64,
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
            state: Mutex::new(State { cursors: vec![Cursor::default(); vcpus], lost: false, resets: 0 }),
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
            Err(TrackerError::RingOverflow) => self.make_room_by_force(vcpu, &mut state),
            other => other,
        }
    }

    /// Reads the rings if a tracker waits for what is in them: for the thread of a vCPU that has come out of the guest. One
    /// that does so every few milliseconds of its processor time cannot fill its ring meanwhile, not even on a KVM that does
    /// not look whether there is room.
    pub fn look(&self) {
        if self.in_use.load(Ordering::Acquire) {
            // What goes wrong here goes wrong for the tracker too, which has somebody to tell.
            let _ = self.collect(&mut self.state());
        }
    }

    /// How often room was made for a vCPU whose ring was full.
    pub fn times_full(&self) -> u64 {
        self.times_full.load(Ordering::Relaxed)
    }

    /// How many pages have come out of each vCPU's ring since the VM was made: those that it was the first to write after they
    /// were protected. Only writes are counted that a tracker waits for.
    pub fn pages_read(&self) -> Vec<u64> {
        self.state().cursors.iter().map(|cursor| cursor.total).collect()
    }

    /// Whether KVM has gone over the end of a ring, so that a tracker on them cannot be started any more.
    pub fn are_lost(&self) -> bool {
        self.state().lost
    }

    fn make_room_in_order(&self, vcpu: usize, state: &mut State) -> Result<(), TrackerError> {
        self.read(state)?;
        if let Some(cursor) = state.cursors.get_mut(vcpu) {
            // Another thread may have made room already. Where none has, a full ring has something in it.
            let nothing = cursor.read == 0 && cursor.resets == state.resets;
            cursor.nothing = if nothing { cursor.nothing.saturating_add(1) } else { 0 };
            cursor.resets = state.resets;
            if cursor.nothing > TRIES {
                return Err(self.lose(state));
            }
        }
        self.reset(state)
    }

    /// After an overflow this process and KVM do not agree any more on which entry is the next to be free. KVM frees entries
    /// marked as read from there on and stops at the first that is not. So quarters are marked by turns until it frees
    /// something. That is never more than what is in a ring that is full.
    fn make_room_by_force(&self, vcpu: usize, state: &mut State) -> Result<(), TrackerError> {
        let Some(cursor) = state.cursors.get_mut(vcpu) else { return Ok(()) };
        if !std::mem::replace(&mut cursor.came, true) {
            // What was read before the overflow was found may have been freed since this vCPU came out of the guest. If its
            // ring is still full it comes again; from here on nobody else makes room for it.
            return Ok(());
        }
        let doing = machine("make room in a vCPU's dirty ring of");
        let ring = self.kernel.ring(vcpu);
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
        for _ in 0..TRIES {
            for quarter in ring.chunks((ring.len() / 4).max(1)) {
                set_flags(quarter, sys::ENTRY_RESET);
                let freed = free();
                set_flags(quarter, 0);
                if freed? > 0 {
                    return Ok(());
                }
            }
        }
        Err(TrackerError::RingOverflow)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on nothing is known of what the guest writes, and nothing is marked as read.
    fn lose(&self, state: &mut State) -> TrackerError {
        state.lost = true;
        (0..state.cursors.len()).for_each(|vcpu| set_flags(self.kernel.ring(vcpu), 0));
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
        if state.lost {
            return Err(TrackerError::RingOverflow);
        }
        let mut cursors = state.cursors.iter_mut().enumerate();
        if !cursors.all(|(vcpu, cursor)| self.read_ring(self.kernel.ring(vcpu), cursor)) {
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
            cursor.total = cursor.total.saturating_add(1);
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
        state.resets = state.resets.saturating_add(u64::from(freed > 0));
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
