//! KVM's interface, as in Linux's `include/uapi/linux/kvm.h`, as far as dirty tracking needs it.

use std::ffi::c_void;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};

use super::{KvmSlot, Switch, TrackerError, machine};

const KVMIO: u8 = 0xAE;

/// `struct kvm_userspace_memory_region`
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

/// `struct kvm_dirty_log`
#[repr(C)]
struct DirtyLog {
    slot: u32,
    padding: u32,
    dirty_bitmap: u64,
}

/// `struct kvm_clear_dirty_log`
#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    dirty_bitmap: u64,
}

/// `struct kvm_enable_cap`
#[repr(C)]
struct EnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    pad: [u8; 64],
}

/// `struct kvm_dirty_gfn`, an entry of a vCPU's ring. KVM and this process share it, so that it is all atomics.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) flags: AtomicU32,
    pub(super) slot: AtomicU32,
    pub(super) offset: AtomicU64,
}

const CHECK_EXTENSION: Opcode = opcode::none(KVMIO, 0x03);
const GET_DIRTY_LOG: Opcode = opcode::write::<DirtyLog>(KVMIO, 0x42);
const SET_USER_MEMORY_REGION: Opcode = opcode::write::<MemoryRegion>(KVMIO, 0x46);
const ENABLE_CAP: Opcode = opcode::write::<EnableCap>(KVMIO, 0xa3);
const CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<ClearDirtyLog>(KVMIO, 0xc0);
const RESET_DIRTY_RINGS: Opcode = opcode::none(KVMIO, 0xc7);

pub(super) const CAP_MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
pub(super) const CAP_DIRTY_LOG_RING: u32 = 192;
pub(super) const CAP_DIRTY_LOG_RING_ACQ_REL: u32 = 223;
const MEM_LOG_DIRTY_PAGES: u32 = 1;

/// The entry says a page that was written,
pub(super) const ENTRY_DIRTY: u32 = 1;
/// and has been read by this process.
pub(super) const ENTRY_RESET: u32 = 2;
/// Where in a vCPU's descriptor its ring is, in pages.
pub(super) const RING_PAGE_OFFSET: u64 = 64;

/// A VM, by its descriptor.
#[derive(Debug)]
pub(super) struct Vm(OwnedFd);

impl Vm {
    pub(super) fn new(vm: BorrowedFd<'_>) -> Result<Self, TrackerError> {
        vm.try_clone_to_owned().map(Self).map_err(machine("duplicate the KVM descriptor for"))
    }

    /// # Safety
    /// `argument` must be what ioctl `OPCODE` takes, and what it points to as large as it says.
    unsafe fn call<const OPCODE: Opcode, T>(&self, argument: &mut T) -> io::Result<()> {
        loop {
            // SAFETY: by this function's own contract.
            let called = unsafe { ioctl(&self.0, Updater::<'_, OPCODE, T>::new(argument)) };
            match called {
                Err(rustix::io::Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }

    fn count(&self, opcode: Opcode, argument: usize) -> io::Result<u64> {
        loop {
            // SAFETY: the two calls that this is for take a plain number, or nothing, and give a number.
            match unsafe { ioctl(&self.0, Counting { opcode, argument }) } {
                Err(rustix::io::Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }

    /// What the kernel says of an extension; 0 if it does not have it.
    pub(super) fn check_extension(&self, cap: u32) -> io::Result<u64> {
        self.count(CHECK_EXTENSION, cap as usize)
    }

    pub(super) fn enable(&self, cap: u32, argument: u64) -> io::Result<()> {
        let mut cap = EnableCap { cap, flags: 0, args: [argument, 0, 0, 0], pad: [0; 64] };
        // SAFETY: `cap` is what KVM_ENABLE_CAP takes.
        unsafe { self.call::<{ ENABLE_CAP }, _>(&mut cap) }
    }

    /// Has KVM watch a slot at this address of this process, or no more.
    ///
    /// # Safety
    /// The VM must have the slot over this memory, so that only its flags change.
    pub(super) unsafe fn switch(&self, slot: &KvmSlot, address: u64, switch: Switch) -> io::Result<()> {
        let mut region = MemoryRegion {
            slot: slot.slot,
            flags: if switch == Switch::On { MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest_address,
            memory_size: slot.size_bytes,
            userspace_addr: address,
        };
        // SAFETY: `region` is what KVM_SET_USER_MEMORY_REGION takes, and by this function's own contract.
        unsafe { self.call::<{ SET_USER_MEMORY_REGION }, _>(&mut region) }
    }

    /// # Safety
    /// `words` must have a bit for each page of the slot, in whole words.
    pub(super) unsafe fn get_log(&self, slot: u32, words: &mut [u64]) -> io::Result<()> {
        let mut log = DirtyLog { slot, padding: 0, dirty_bitmap: words.as_mut_ptr() as u64 };
        // SAFETY: `log` is what KVM_GET_DIRTY_LOG takes, and by this function's own contract.
        unsafe { self.call::<{ GET_DIRTY_LOG }, _>(&mut log) }
    }

    /// # Safety
    /// `words` must have a bit for each of `pages`.
    pub(super) unsafe fn clear_log(&self, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()> {
        let dirty_bitmap = words.as_ptr() as u64;
        let mut clear = ClearDirtyLog { slot, num_pages: pages, first_page, dirty_bitmap };
        // SAFETY: `clear` is what KVM_CLEAR_DIRTY_LOG takes; it reads a bit for each of `pages` from `words`.
        unsafe { self.call::<{ CLEAR_DIRTY_LOG }, _>(&mut clear) }
    }

    /// Has KVM protect the pages of all entries that were read; says how many entries.
    pub(super) fn reset_rings(&self) -> io::Result<u64> {
        self.count(RESET_DIRTY_RINGS, 0)
    }
}

/// A call that takes a number and gives one.
struct Counting {
    opcode: Opcode,
    argument: usize,
}

// SAFETY: the argument is a plain number, and so is the answer.
unsafe impl Ioctl for Counting {
    type Output = u64;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.argument)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u64> {
        Ok(u64::try_from(out).unwrap_or(0))
    }
}
