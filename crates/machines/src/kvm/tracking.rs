//! KVM's dirty log, or dirty rings, for a machine.
//!
//! What must stay true: it is settled when the VM is made, as KVM wants it, before the first vCPU.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use dunlin::memory::{
    DirtyTracker, KvmDirtyLog, KvmDirtyRing, KvmDirtyRings, KvmRingSize, TrackerError, WriteProtectTracker,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::devices::OwnWrites;
use super::memory::Memory;
use crate::DirtyTracking;

/// How often the rings are read while the engine waits for something: the quickest guest seen, one that KVM emulates,
/// takes more than ten times as long to fill the largest.
const READ_EVERY: Duration = Duration::from_millis(5);

/// The rings of a VM, if it has them.
pub(super) type Rings = Option<Arc<KvmDirtyRings>>;

fn descriptor(file: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: what is borrowed keeps the descriptor open.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

/// Turns rings on, if they are asked for, in a VM without vCPUs.
pub(super) fn prepare(vm: &VmFd, tracking: DirtyTracking) -> Result<Option<KvmRingSize>, TrackerError> {
    match tracking {
        DirtyTracking::Auto | DirtyTracking::Log => Ok(None),
        DirtyTracking::Ring { entries } => KvmRingSize::enable(descriptor(vm), entries).map(Some),
    }
}

/// The rings of a VM that has its memory and all its vCPUs.
pub(super) fn rings(
    vm: &VmFd,
    vcpus: &[VcpuFd],
    size: Option<KvmRingSize>,
    memory: &Memory,
) -> Result<Rings, TrackerError> {
    let Some(size) = size else { return Ok(None) };
    let vcpus: Vec<_> = vcpus.iter().map(descriptor).collect();
    // SAFETY: these are the vCPUs and the slots that the VM was just given, over memory that lives as long as the machine.
    unsafe { KvmDirtyRings::new(descriptor(vm), &vcpus, size, &memory.ram, &memory.slots) }.map(Some)
}

/// What tracks the VM's writes, and the devices' that are in `own_writes`.
pub(super) fn tracker(
    vm: &VmFd,
    rings: &Rings,
    memory: &Memory,
    own_writes: OwnWrites,
    tracking: DirtyTracking,
) -> Result<Box<dyn DirtyTracker>, TrackerError> {
    let own = Some(own_writes);
    match rings {
        // Neither these rings nor the log can be had from this VM any more. What knows nothing of KVM can, and it
        // sees what the devices write, too.
        Some(rings) if rings.are_lost() => Ok(Box::new(WriteProtectTracker::new(&memory.ram)?)),
        Some(rings) => {
            // Who asks for a size wants to see rings fill.
            let read_every = (tracking == DirtyTracking::Ring { entries: None }).then_some(READ_EVERY);
            Ok(Box::new(KvmDirtyRing::new(rings.clone(), own, read_every)?))
        }
        // SAFETY: these are the slots that the VM was given over this memory, which lives as long as the machine.
        None => Ok(Box::new(unsafe { KvmDirtyLog::new(descriptor(vm), &memory.ram, &memory.slots, own) }?)),
    }
}
