//! The whole state of a VM and its vCPUs, read and written through KVM.
//!
//! The order matters, as others have learnt: reading MP_STATE lets KVM take in pending INIT and SIPI, so that it comes first;
//! events come last; time is set before all else, and the deadline of the APIC's timer is written after the APIC. A vCPU must have left KVM_RUN with nothing left to complete.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_VCPUEVENT_VALID_NMI_PENDING, Msrs,
    Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::features::{self, Leaf, Word};
use super::time;
use crate::kvm::{KvmError, kvm};

/// The interrupt controllers: two PICs and an IOAPIC.
pub(in crate::kvm) const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// Memory type range registers, which KVM does not list: the variable ranges, the fixed ones, and the default.
const MSRS_MTRR: [(u32, u32); 5] = [(0x200, 0x210), (0x250, 0x251), (0x258, 0x25a), (0x268, 0x270), (0x2ff, 0x300)];
/// Entries that one call takes.
const MSR_BATCH: usize = 256;

/// What this host's KVM has.
#[derive(Debug)]
pub(in crate::kvm) struct Host {
    /// The CPU's features that a guest can be given.
    pub(in crate::kvm) cpuid: Vec<Leaf>,
    /// MSRs that KVM names as part of a vCPU's state, in the order in which they are written.
    msrs: Vec<u32>,
    /// Frequency of its time stamp counter.
    pub(in crate::kvm) tsc_khz: Option<u32>,
    /// Whether a guest's time stamp counter can have another frequency.
    scales_tsc: bool,
    /// Words that XSAVE's area has beyond `kvm_xsave`'s 4 KiB.
    xsave_extra: usize,
}

/// A vCPU's state.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::kvm) struct VcpuState {
    pub(in crate::kvm) cpuid: Vec<Leaf>,
    pub(in crate::kvm) tsc_khz: Option<u32>,
    /// Between the host's time stamp counter and the guest's, unless it is scaled.
    pub(in crate::kvm) tsc_offset: Option<u64>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// The state of what all vCPUs share.
pub(in crate::kvm) struct VmState {
    pub(in crate::kvm) chips: Vec<kvm_irqchip>,
    pub(in crate::kvm) pit: kvm_pit_state2,
    pub(in crate::kvm) clock: kvm_clock_data,
}

fn too_many(what: &'static str) -> KvmError {
    KvmError::System { doing: what, source: std::io::Error::other("there are too many of them") }
}

impl Host {
    /// Asks KVM.
    pub(in crate::kvm) fn ask(kvm_fd: &Kvm) -> Result<Self, KvmError> {
        let cpuid = kvm_fd
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("get the CPU features that a guest can have"))?;
        let list = kvm_fd.get_msr_index_list().map_err(kvm("get the list of model specific registers"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.extend(MSRS_MTRR.iter().flat_map(|(from, to)| *from..*to));
        msrs.sort_unstable();
        msrs.dedup();
        msrs.sort_by_key(|msr| match *msr {
            MSR_TSC => 0,
            MSR_TSC_DEADLINE => 2,
            _ => 1,
        });
        let bytes = usize::try_from(kvm_fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let xsave_extra = bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
        // Said apart, for it depends on the interrupt controllers, which all machines here have.
        let deadline = u32::from(kvm_fd.check_extension(Cap::TscDeadlineTimer)) << 24;
        let mut cpuid = features::leaves(&cpuid);
        for leaf in cpuid.iter_mut().filter(|leaf| leaf.function == 1) {
            *leaf = leaf.with(Word::Ecx, deadline);
        }
        let scales_tsc = kvm_fd.check_extension(Cap::TscControl);
        Ok(Self { cpuid, msrs, tsc_khz: None, scales_tsc, xsave_extra })
    }

    /// Looks at a vCPU that will not run as this: which MSRs vCPUs with all features have, and how fast they count.
    pub(in crate::kvm) fn probe(&mut self, fd: &VcpuFd) -> Result<(), KvmError> {
        set_cpuid(fd, &self.cpuid)?;
        let mut rest = std::mem::take(&mut self.msrs);
        loop {
            let got = read_msrs(fd, &rest)?.len();
            if got >= rest.len() {
                break;
            }
            rest.remove(got);
        }
        self.msrs = rest;
        self.tsc_khz = fd.get_tsc_khz().ok();
        Ok(())
    }

    /// Whether a guest's time stamp counter can go on here as fast as it has gone, or as good as.
    pub(in crate::kvm) fn keeps_pace(&self, theirs_khz: Option<u32>) -> Result<(), KvmError> {
        /// What KVM takes for the same, in millionths.
        const TOLERANCE_PPM: u64 = 250;
        let (Some(theirs), Some(ours)) = (theirs_khz, self.tsc_khz) else { return Ok(()) };
        let apart = u64::from(theirs.abs_diff(ours)).saturating_mul(1_000_000);
        if self.scales_tsc || apart <= u64::from(ours).saturating_mul(TOLERANCE_PPM) {
            return Ok(());
        }
        Err(KvmError::TscFrequency { theirs_khz: theirs, ours_khz: ours })
    }
}

/// Turns the memory type range registers on, with nothing but memory that is written back: what firmware does.
pub(super) fn write_back_memory(fd: &VcpuFd) -> Result<(), KvmError> {
    const WRITE_BACK: u64 = 6;
    const ENABLED: u64 = 1 << 11;
    load_msrs(fd, &[(MSR_MTRR_DEFAULT, WRITE_BACK | ENABLED)])
}

/// Reads MSRs up to the first that the vCPU does not have.
fn read_msrs(fd: &VcpuFd, msrs: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut all = Vec::new();
    for indices in msrs.chunks(MSR_BATCH) {
        let entries: Vec<_> =
            indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut batch = Msrs::from_entries(&entries).map_err(|_| too_many("list model specific registers"))?;
        let got = fd.get_msrs(&mut batch).map_err(kvm("get a vCPU's model specific registers"))?;
        all.extend(batch.as_slice().iter().take(got).map(|entry| (entry.index, entry.data)));
        if got < indices.len() {
            break;
        }
    }
    Ok(all)
}

/// Gives a vCPU its features.
pub(in crate::kvm) fn set_cpuid(fd: &VcpuFd, leaves: &[Leaf]) -> Result<(), KvmError> {
    let entries: Vec<kvm_cpuid_entry2> = leaves.iter().map(kvm_cpuid_entry2::from).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| too_many("list CPU features"))?;
    fd.set_cpuid2(&cpuid).map_err(kvm("give a vCPU its features"))
}

/// Reads a vCPU that has left KVM_RUN, but for the features that it was given: some hosts' KVM answers with more.
pub(in crate::kvm) fn save_vcpu(fd: &VcpuFd, host: &Host, given: &[Leaf]) -> Result<VcpuState, KvmError> {
    let mp_state = fd.get_mp_state().map_err(kvm("get a vCPU's run state"))?;
    let regs = fd.get_regs().map_err(kvm("get a vCPU's registers"))?;
    let sregs = fd.get_sregs().map_err(kvm("get a vCPU's system registers"))?;
    let xsave = save_xsave(fd, host)?;
    let xcrs = fd.get_xcrs().map_err(kvm("get a vCPU's extended control registers"))?;
    let debugregs = fd.get_debug_regs().map_err(kvm("get a vCPU's debug registers"))?;
    let lapic = fd.get_lapic().map_err(kvm("get a vCPU's interrupt controller"))?;
    let msrs = read_msrs(fd, &host.msrs)?;
    if let Some(msr) = host.msrs.get(msrs.len()) {
        return Err(KvmError::Msr { doing: "get", msr: *msr });
    }
    let tsc_khz = fd.get_tsc_khz().ok();
    let tsc_offset = time::offset(fd).filter(|_| tsc_khz.is_some() && tsc_khz == host.tsc_khz);
    let events = fd.get_vcpu_events().map_err(kvm("get a vCPU's events"))?;
    let cpuid = given.to_vec();
    Ok(VcpuState { cpuid, tsc_khz, tsc_offset, mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, msrs, events })
}

/// Writes a vCPU that has not run.
pub(in crate::kvm) fn load_vcpu(fd: &VcpuFd, host: &Host, state: &VcpuState) -> Result<(), KvmError> {
    set_cpuid(fd, &state.cpuid)?;
    fd.set_mp_state(state.mp_state).map_err(kvm("set a vCPU's run state"))?;
    fd.set_regs(&state.regs).map_err(kvm("set a vCPU's registers"))?;
    fd.set_sregs(&state.sregs).map_err(kvm("set a vCPU's system registers"))?;
    load_xsave(fd, host, &state.xsave)?;
    // A host without XSAVE has none, and takes none.
    if state.xcrs.nr_xcrs > 0 {
        fd.set_xcrs(&state.xcrs).map_err(kvm("set a vCPU's extended control registers"))?;
    }
    fd.set_debug_regs(&state.debugregs).map_err(kvm("set a vCPU's debug registers"))?;
    fd.set_lapic(&state.lapic).map_err(kvm("set a vCPU's interrupt controller"))?;
    // The time stamp counter is set, and counts.
    let msrs: Vec<_> = state.msrs.iter().filter(|(msr, _)| *msr != MSR_TSC).copied().collect();
    load_msrs(fd, &msrs)?;
    // KVM gives a waiting NMI without saying so, and takes it only where that is said.
    let events = kvm_vcpu_events { flags: state.events.flags | KVM_VCPUEVENT_VALID_NMI_PENDING, ..state.events };
    fd.set_vcpu_events(&events).map_err(kvm("set a vCPU's events"))
}

/// Writes a vCPU's time stamp counter.
pub(super) fn load_tsc(fd: &VcpuFd, state: &VcpuState) -> Result<(), KvmError> {
    let counter: Vec<_> = state.msrs.iter().filter(|(msr, _)| *msr == MSR_TSC).copied().collect();
    load_msrs(fd, &counter)
}

/// In one batch, as long as none is refused. One that is refused and is zero is one that the guest never used.
fn load_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), KvmError> {
    let entries: Vec<_> =
        msrs.iter().map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() }).collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let first = rest.get(..MSR_BATCH).unwrap_or(rest);
        let batch = Msrs::from_entries(first).map_err(|_| too_many("list model specific registers"))?;
        let set = fd.set_msrs(&batch).map_err(kvm("set a vCPU's model specific registers"))?;
        rest = match rest.get(set..) {
            Some(after) if set == first.len() => after,
            Some([refused, after @ ..]) if refused.data == 0 => after,
            Some([refused, ..]) => return Err(KvmError::Msr { doing: "set", msr: refused.index }),
            _ => &[],
        };
    }
    Ok(())
}

fn xsave_area(host: &Host) -> Result<Xsave, KvmError> {
    Xsave::new(host.xsave_extra).map_err(|_| too_many("make room for vector registers"))
}

fn save_xsave(fd: &VcpuFd, host: &Host) -> Result<Vec<u32>, KvmError> {
    let mut area = xsave_area(host)?;
    // SAFETY: the area is as large as KVM says that it needs, or the 4 KiB that it was before KVM could say.
    unsafe { fd.get_xsave2(&mut area) }.map_err(kvm("get a vCPU's vector registers"))?;
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend(area.as_slice());
    // What is behind the fixed part depends on the host, and is zero where the guest has not used it.
    let used = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
    words.truncate(used.max(kvm_xsave::default().region.len()));
    Ok(words)
}

fn load_xsave(fd: &VcpuFd, host: &Host, words: &[u32]) -> Result<(), KvmError> {
    let mut area = xsave_area(host)?;
    let region = kvm_xsave::default().region.len();
    let (first, extra) = words.split_at_checked(region).unwrap_or((words, &[]));
    if first.len() != region || extra.len() > host.xsave_extra {
        return Err(KvmError::Xsave { theirs: words.len() * 4, ours: (region + host.xsave_extra) * 4 });
    }
    for (to, word) in area.as_mut_slice().iter_mut().zip(extra) {
        *to = *word;
    }
    // SAFETY: only the contents of the fixed part change.
    unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(first);
    // SAFETY: the area is as large as KVM says that it needs.
    unsafe { fd.set_xsave2(&area) }.map_err(kvm("set a vCPU's vector registers"))
}

/// Reads what all vCPUs share, while none runs.
pub(in crate::kvm) fn save_vm(vm: &VmFd) -> Result<VmState, KvmError> {
    let mut chips = Vec::new();
    for chip_id in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        vm.get_irqchip(&mut chip).map_err(kvm("get an interrupt controller"))?;
        chips.push(chip);
    }
    let pit = vm.get_pit2().map_err(kvm("get the interval timer"))?;
    let clock = vm.get_clock().map_err(kvm("get the clock"))?;
    Ok(VmState { chips, pit, clock })
}

/// Writes what all vCPUs share but for the clock, while none runs.
pub(in crate::kvm) fn load_vm(vm: &VmFd, state: &VmState) -> Result<(), KvmError> {
    for chip in &state.chips {
        vm.set_irqchip(chip).map_err(kvm("set an interrupt controller"))?;
    }
    vm.set_pit2(&state.pit).map_err(kvm("set the interval timer"))
}
