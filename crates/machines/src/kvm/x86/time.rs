//! A guest's time across a move. Its clock (kvmclock) goes on by the time that has passed since, and its time stamp counters
//! go on with it: a guest compares the two, and takes a counter that stood still for broken.
//!
//! Relies on KVM saying which value of the host's counter its clock belongs to (Linux 5.16 or later). Without, or where
//! counters are scaled, they go on from where they were, behind by the time that the guest stood still. What must stay true:
//! the clock is set before the vCPUs' other state, so that what KVM computes from the time is right.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clock_data, kvm_device_attr,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::state::{self, VcpuState};
use crate::kvm::{KvmError, kvm};

/// `KVM_SET_DEVICE_ATTR`
const SET_DEVICE_ATTR: u32 = 0x4018_aee1;
/// and `KVM_GET_DEVICE_ATTR`.
const GET_DEVICE_ATTR: u32 = 0x4018_aee2;

/// Reads or writes what is added to the host's time stamp counter for the guest's.
fn offset_attribute(fd: &VcpuFd, request: u32, offset: &mut u64) -> io::Result<()> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: (&raw mut *offset).expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: KVM reads or writes the eight bytes of `offset`, or refuses.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw const attribute) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What is added to the host's time stamp counter for the guest's. Nothing where KVM does not say.
pub(super) fn offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    offset_attribute(fd, GET_DEVICE_ATTR, &mut offset).ok().map(|()| offset)
}

/// Sets the clock and the time stamp counters of a machine that has not run.
pub(in crate::kvm) fn load<'a>(
    vm: &VmFd,
    clock: &kvm_clock_data,
    vcpus: impl Iterator<Item = (&'a VcpuFd, &'a VcpuState)> + Clone,
) -> Result<(), KvmError> {
    // Where counters are scaled they cannot be set exactly.
    let mut exact = clock.flags & KVM_CLOCK_HOST_TSC != 0 && clock.flags & KVM_CLOCK_REALTIME != 0;
    for (fd, vcpu) in vcpus.clone() {
        let ours = fd.get_tsc_khz().ok();
        if let Some(theirs) = vcpu.tsc_khz
            && ours != Some(theirs)
        {
            // Where it cannot be scaled KVM refuses unless it is near enough.
            fd.set_tsc_khz(theirs).map_err(kvm("set the frequency of a vCPU's time stamp counter"))?;
        }
        exact &= ours.is_some() && ours == vcpu.tsc_khz && vcpu.tsc_offset.is_some();
        state::load_tsc(fd, vcpu)?;
    }
    // With the wall clock KVM adds the time that has passed since.
    let kvm_clock_data { clock: then, realtime, host_tsc: tsc_then, .. } = *clock;
    let flags = clock.flags & KVM_CLOCK_REALTIME;
    let set = kvm_clock_data { clock: then, flags, realtime, ..kvm_clock_data::default() };
    vm.set_clock(&set).map_err(kvm("set the clock"))?;
    let here = vm.get_clock().map_err(kvm("get the clock"))?;
    if !exact || here.flags & KVM_CLOCK_HOST_TSC == 0 {
        return Ok(());
    }
    for (fd, vcpu) in vcpus {
        let (Some(khz), Some(offset)) = (vcpu.tsc_khz, vcpu.tsc_offset) else { continue };
        let mut offset = continued(offset, khz, (then, tsc_then), (here.clock, here.host_tsc));
        offset_attribute(fd, SET_DEVICE_ATTR, &mut offset)
            .map_err(|source| KvmError::Kvm { doing: "set a vCPU's time stamp counter", source })?;
    }
    Ok(())
}

/// The offset by which a guest's counter of `khz` has gone on by as much as its clock has. Each side is the clock and the
/// host's counter at the same instant.
fn continued(offset: u64, khz: u32, (clock_then, tsc_then): (u64, u64), (clock_now, tsc_now): (u64, u64)) -> u64 {
    let nanoseconds = i128::from(clock_now) - i128::from(clock_then);
    let cycles = nanoseconds * i128::from(khz) / 1_000_000;
    // Offsets are modulo 2^64, as the counters are.
    offset.wrapping_add(tsc_then).wrapping_add(cycles as u64).wrapping_sub(tsc_now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_go_on_as_the_clock_does() {
        // The guest's counter stands at 100 000 when its clock says 5 s; 2 s later on another host it must be 2e9 × 3 on.
        let (then, tsc_then) = (5_000_000_000, 700_000);
        let offset = 100_000_u64.wrapping_sub(tsc_then);
        let moved = continued(offset, 3_000_000, (then, tsc_then), (then + 2_000_000_000, 42));
        assert_eq!(moved.wrapping_add(42), 100_000 + 6_000_000_000);
        // A clock that was set back, by hand.
        let back = continued(offset, 1_000_000, (then, tsc_then), (then - 1_000, tsc_then));
        assert_eq!(back.wrapping_add(tsc_then), 99_000);
    }
}
