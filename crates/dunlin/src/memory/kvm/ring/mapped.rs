//! A VM's rings as KVM has them: memory of the vCPUs, mapped, and calls.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::super::super::PAGE_SIZE;
use super::super::sys::{self, Entry, Vm};
use super::super::{KvmSlot, Switch};
use super::{Kernel, KvmRingSize};

/// A VM's rings as KVM has them.
#[derive(Debug)]
pub(super) struct Rings {
    pub(super) vm: Vm,
    pub(super) rings: Vec<Mapped>,
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
pub(super) struct Mapped {
    start: NonNull<Entry>,
    entries: usize,
}

// SAFETY: the memory is the mapping's alone, and all of it is atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub(super) fn new(vcpu: BorrowedFd<'_>, size: KvmRingSize) -> io::Result<Self> {
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
