//! A guest's time across a move. Its clock (kvmclock) goes on by the time that has passed since, and its time stamp counters
//! go on with it: a guest compares the two, and takes a counter that stood still for broken.
//!
//! The time that has passed is the difference of the two hosts' wall clocks, as long as that lies between what was measured
//! of it at least and at most, by clocks that nobody sets. Otherwise it is the nearer of these two: hosts whose clocks disagree
//! must not make a guest's clock leap.
//!
//! Relies on KVM saying which value of the host's counter its clock belongs to (Linux 5.16 or later). Without, or where
//! counters are scaled, they go on from where they were, behind by the time that the guest stood still. What must stay true:
//! the clock is set before the vCPUs' other state, so that what KVM computes from the time is right.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dunlin::StateAge;
use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clock_data, kvm_device_attr,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

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

/// Two hosts' wall clocks that do not agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockDifference {
    /// By how much the guest's clock was advanced for the time that it stood still since its state was saved.
    pub advanced: Duration,
    /// By how many nanoseconds this host's clock is ahead of the source's, or behind if it is negative, at least.
    pub ahead_nanoseconds: i64,
}

impl fmt::Display for ClockDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { advanced, ahead_nanoseconds } = self;
        let apart = Duration::from_nanos(ahead_nanoseconds.unsigned_abs()).as_secs_f64();
        let which = if *ahead_nanoseconds < 0 { "behind" } else { "ahead of" };
        write!(
            f,
            "this host's clock is {which} the source's by about {apart:.1} s; the guest's clock was advanced by {:.3} s, as long \
             as the guest stood still; synchronise the hosts' clocks",
            advanced.as_secs_f64()
        )
    }
}

/// How a clock is set.
#[derive(Debug, PartialEq, Eq)]
enum Advance {
    /// By KVM, by the wall clocks' difference.
    ByWallClock,
    /// By so much.
    By(Duration),
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// This host's.
fn wall_clock() -> u64 {
    nanoseconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// By how much a clock is to be advanced whose source read it at the wall clock's `then`, where it is `now`, if that is
/// known. A destination's clock that is behind would let it stand still.
fn advance(then_and_now: Option<(u64, u64)>, age: Option<StateAge>) -> (Advance, Option<ClockDifference>) {
    let Some(age) = age else {
        return (if then_and_now.is_some() { Advance::ByWallClock } else { Advance::By(Duration::ZERO) }, None);
    };
    let Some((then, now)) = then_and_now else { return (Advance::By(age.least()), None) };
    let difference = i128::from(now) - i128::from(then);
    // Both as of one moment.
    let (least, most) = (age.least(), age.most());
    let advanced = match difference {
        _ if difference < i128::from(nanoseconds(least)) => least,
        _ if difference > i128::from(nanoseconds(most)) => most,
        _ => return (Advance::ByWallClock, None),
    };
    let ahead = difference.saturating_sub(i128::from(nanoseconds(advanced)));
    let bounded = ahead.clamp(i128::from(i64::MIN), i128::from(i64::MAX));
    let ahead_nanoseconds = i64::try_from(bounded).unwrap_or_default();
    (Advance::By(advanced), Some(ClockDifference { advanced, ahead_nanoseconds }))
}

/// Sets the clock and the time stamp counters of a machine that has not run. Tells whether the hosts' clocks disagree.
pub(in crate::kvm) fn load<'a>(
    vm: &VmFd,
    clock: &kvm_clock_data,
    age: Option<StateAge>,
    vcpus: impl Iterator<Item = (&'a VcpuFd, &'a VcpuState)> + Clone,
) -> Result<Option<ClockDifference>, KvmError> {
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
    let kvm_clock_data { clock: then, realtime, host_tsc: tsc_then, .. } = *clock;
    // What a clock says that was never set does not tell.
    let adds_itself = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0) & KVM_CLOCK_REALTIME != 0;
    let now = wall_clock();
    let known = clock.flags & KVM_CLOCK_REALTIME != 0;
    let (advance, difference) = advance(known.then_some((realtime, now)), age);
    let by = |nanoseconds: u64| kvm_clock_data { clock: then.saturating_add(nanoseconds), ..kvm_clock_data::default() };
    let set = match advance {
        // KVM adds the time that has passed since.
        Advance::ByWallClock if adds_itself => {
            kvm_clock_data { clock: then, flags: KVM_CLOCK_REALTIME, realtime, ..kvm_clock_data::default() }
        }
        Advance::ByWallClock => by(now.saturating_sub(realtime)),
        Advance::By(duration) => by(nanoseconds(duration)),
    };
    vm.set_clock(&set).map_err(kvm("set the clock"))?;
    let here = vm.get_clock().map_err(kvm("get the clock"))?;
    if !exact || here.flags & KVM_CLOCK_HOST_TSC == 0 {
        return Ok(difference);
    }
    for (fd, vcpu) in vcpus {
        let (Some(khz), Some(offset)) = (vcpu.tsc_khz, vcpu.tsc_offset) else { continue };
        let mut offset = continued(offset, khz, (then, tsc_then), (here.clock, here.host_tsc));
        offset_attribute(fd, SET_DEVICE_ATTR, &mut offset)
            .map_err(|source| KvmError::Kvm { doing: "set a vCPU's time stamp counter", source })?;
    }
    Ok(difference)
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
    fn the_wall_clocks_difference_is_bounded_by_what_was_measured() {
        let (second, day) = (1_000_000_000u64, 86_400_000_000_000u64);
        let age = StateAge::between(Duration::from_secs(2), Duration::from_secs(4));
        let advanced = |now: u64| match advance(Some((day, now)), Some(age)) {
            (Advance::ByWallClock, None) => None,
            (Advance::By(duration), Some(told)) => {
                assert_eq!(told.advanced, duration);
                Some((duration.as_secs(), (told.ahead_nanoseconds as f64 / 1e9).round() as i64))
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(advanced(day + 3 * second), None);
        assert_eq!(advanced(day + 3603 * second), Some((4, 3599)));
        assert_eq!(advanced(day + second), Some((2, -1)));
        assert_eq!(advanced(day - 3600 * second), Some((2, -3602)));
        assert_eq!(advanced(0), Some((2, -86_402)));
        assert_eq!(advanced(u64::MAX).map(|(advanced, _)| advanced), Some(4));
        // Where no wall clock is known, by what it was at least.
        let (by, told) = advance(None, Some(age));
        assert!(matches!(by, Advance::By(duration) if duration.as_secs() == 2) && told.is_none());
        assert_eq!(advance(Some((1, 2)), None), (Advance::ByWallClock, None));
        assert_eq!(advance(None, None), (Advance::By(Duration::ZERO), None));
    }

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
