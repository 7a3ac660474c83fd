//! CPU models: which answers of the CPUID instruction a guest is given.
//!
//! All but `host` are the same on every host of one vendor, so that a guest can move to any that has their features: those
//! of the x86-64 psABI's levels, and what KVM itself provides. The vendor is the host's: its processors differ in more
//! than features.

use std::fmt;
use std::str::FromStr;

use super::features::{Leaf, Word, word};

/// A CPU model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CpuModel {
    /// The first x86-64 processors' features, and cmpxchg16b.
    #[default]
    X86_64,
    /// Level 2 of the psABI: up to SSE 4.2 and popcnt.
    X86_64V2,
    /// Level 3 of the psABI: up to AVX2, BMI and FMA.
    X86_64V3,
    /// All that the host can give. Such a guest moves only to hosts that have all of it.
    Host,
}

/// No CPU model of that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CPU model {0:?}: x86-64, x86-64-v2, x86-64-v3 or host")]
pub struct CpuModelError(String);

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86_64 => "x86-64",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
            Self::Host => "host",
        })
    }
}

impl FromStr for CpuModel {
    type Err = CpuModelError;

    fn from_str(text: &str) -> Result<Self, CpuModelError> {
        let all = [Self::X86_64, Self::X86_64V2, Self::X86_64V3, Self::Host];
        all.into_iter().find(|model| model.to_string() == text).ok_or_else(|| CpuModelError(text.to_owned()))
    }
}

const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let mut all = 0;
    let mut rest: &[u32] = &numbers;
    while let [bit, others @ ..] = rest {
        all |= 1 << *bit;
        rest = others;
    }
    all
}

/// fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2
const LEAF_1_EDX: u32 = 0x078b_fbfd;
/// cx16; and of KVM: x2apic, tsc_deadline_timer, hypervisor
const LEAF_1_ECX: u32 = bits([13, 21, 24, 31]);
/// sse3 ssse3 sse4_1 sse4_2 popcnt
const LEAF_1_ECX_V2: u32 = bits([0, 9, 19, 20, 23]);
/// fma movbe xsave avx f16c
const LEAF_1_ECX_V3: u32 = bits([12, 22, 26, 28, 29]);
/// bmi1 avx2 bmi2
const LEAF_7_EBX_V3: u32 = bits([3, 5, 8]);
/// syscall nx lm
const EXTENDED_EDX: u32 = bits([11, 20, 29]);
/// AMD has many of leaf 1's there as well.
const EXTENDED_EDX_AMD: u32 = 0x0183_f3fd;
/// lahf_lm
const EXTENDED_ECX_V2: u32 = bits([0]);
/// lzcnt
const EXTENDED_ECX_V3: u32 = bits([5]);
/// kvmclock, no delays of I/O, kvmclock's new registers, PV EOI, PV unhalt, a stable clock
const KVM_FEATURES: u32 = bits([0, 1, 3, 6, 7, 24]);
/// Physical address bits, enough for all memory that a machine can have, and virtual ones.
const ADDRESS_BITS: u32 = 39 | 48 << 8;
/// The APIC's timer goes on whatever the processor does.
const ARAT: u32 = bits([2]);
/// Signatures of processors that these features suit: family, model and stepping.
const SIGNATURE_AMD: u32 = 0x0080_0f12;
const SIGNATURE_OTHER: u32 = 0x0003_06c3;
const EXTENDED: u32 = 0x8000_0000;
const KVM: u32 = 0x4000_0000;

/// "AuthenticAMD" and "HygonGenuine", as leaf 0's EBX has their beginnings.
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// The leaves that a vCPU is given, of so many.
pub(in crate::kvm) fn leaves(model: CpuModel, host: &[Leaf], vcpu: u32, vcpus: u32) -> Vec<Leaf> {
    if model == CpuModel::Host {
        return host_leaves(host, vcpu, vcpus);
    }
    let vendor = host.iter().find(|leaf| leaf.function == 0).copied().unwrap_or(Leaf::new(0, 0, [0; 4]));
    let amd = AMD_VENDORS.contains(&vendor.word(Word::Ebx));
    let level = |wanted: CpuModel, bits: u32| if model as u8 >= wanted as u8 { bits } else { 0 };
    let v2 = |bits| level(CpuModel::X86_64V2, bits);
    let v3 = |bits| level(CpuModel::X86_64V3, bits);
    let mut all = vec![
        Leaf::new(0, 0, [0xd, vendor.word(Word::Ebx), vendor.word(Word::Ecx), vendor.word(Word::Edx)]),
        Leaf::new(
            1,
            0,
            [
                if amd { SIGNATURE_AMD } else { SIGNATURE_OTHER },
                // Eight times eight bytes in a cache line.
                8 << 8,
                LEAF_1_ECX | v2(LEAF_1_ECX_V2) | v3(LEAF_1_ECX_V3),
                // Hyperthreading, which says that leaf 1 counts vCPUs, when there is more than one.
                LEAF_1_EDX | u32::from(vcpus > 1) << 28,
            ],
        ),
        Leaf::new(6, 0, [ARAT, 0, 0, 0]),
        Leaf::indexed(7, 0, [0, v3(LEAF_7_EBX_V3), 0, 0]),
    ];
    for index in 0..2 {
        all.push(Leaf::indexed(0xb, index, [0; 4]));
    }
    if model == CpuModel::X86_64V3 {
        /// x87, SSE and AVX.
        const STATES: u32 = 7;
        const AVX_OFFSET: u32 = 576;
        const AVX_BYTES: u32 = 256;
        const ALL_BYTES: u32 = AVX_OFFSET + AVX_BYTES;
        all.push(Leaf::indexed(0xd, 0, [STATES, ALL_BYTES, ALL_BYTES, 0]));
        all.push(Leaf::indexed(0xd, 1, [0; 4]));
        all.push(Leaf::indexed(0xd, 2, [AVX_BYTES, AVX_OFFSET, 0, 0]));
    }
    all.push(Leaf::new(KVM, 0, [KVM + 1, 0x4b4d_564b, 0x564b_4d56, 0x4d]));
    all.push(Leaf::new(KVM + 1, 0, [KVM_FEATURES, 0, 0, 0]));
    let [ebx, ecx, edx] = [Word::Ebx, Word::Ecx, Word::Edx].map(|register| vendor.word(register));
    all.push(Leaf::new(EXTENDED, 0, [EXTENDED + 8, ebx, ecx, edx]));
    let edx = EXTENDED_EDX | if amd { EXTENDED_EDX_AMD } else { 0 };
    all.push(Leaf::new(EXTENDED + 1, 0, [0, 0, v2(EXTENDED_ECX_V2) | v3(EXTENDED_ECX_V3), edx]));
    let mut name = [0; 48];
    for (to, from) in name.iter_mut().zip(format!("Dunlin {model}").bytes()) {
        *to = from;
    }
    for (function, part) in (EXTENDED + 2..).zip(name.chunks(16)) {
        let mut words = [0; 4];
        for (to, from) in words.iter_mut().zip(part.chunks(4)) {
            *to = from.try_into().map_or(0, u32::from_le_bytes);
        }
        all.push(Leaf::new(function, 0, words));
    }
    all.push(Leaf::new(EXTENDED + 7, 0, [0; 4]));
    all.push(Leaf::new(EXTENDED + 8, 0, [ADDRESS_BITS, 0, vcpus.saturating_sub(1), 0]));
    all.into_iter().map(|leaf| leaf.of_vcpu(vcpu, vcpus)).collect()
}

fn host_leaves(host: &[Leaf], vcpu: u32, vcpus: u32) -> Vec<Leaf> {
    const HYPERVISOR: u32 = 1 << 31;
    // A guest's own guests are state that is not moved.
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    const NESTED: u32 = 0x8000_000a;
    let topology = |leaf: &Leaf| matches!(leaf.function, 0xb | 0x1f);
    let mut all: Vec<Leaf> = host.iter().filter(|leaf| !topology(leaf)).copied().collect();
    if host.iter().any(topology) {
        all.extend((0..2).map(|index| Leaf::indexed(0xb, index, [0; 4])));
    }
    let all = all.into_iter().filter(|leaf| leaf.function != NESTED).map(|leaf| match leaf.function {
        1 => leaf.without(Word::Ecx, VMX).with(Word::Ecx, HYPERVISOR),
        0x8000_0001 => leaf.without(Word::Ecx, SVM),
        _ => leaf,
    });
    all.map(|leaf| leaf.of_vcpu(vcpu, vcpus)).collect()
}

/// Whether two CPUs are one vendor's.
pub(in crate::kvm) fn same_vendor(one: &[Leaf], other: &[Leaf]) -> bool {
    [Word::Ebx, Word::Ecx, Word::Edx].iter().all(|register| word(one, 0, 0, *register) == word(other, 0, 0, *register))
}

/// The vendor's name.
pub(in crate::kvm) fn vendor(leaves: &[Leaf]) -> String {
    let bytes = [Word::Ebx, Word::Edx, Word::Ecx].map(|register| word(leaves, 0, 0, register).to_le_bytes());
    String::from_utf8_lossy(&bytes.concat()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::features::missing;
    use super::*;

    fn host(vendor: &[u8; 12]) -> Vec<Leaf> {
        let part = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        vec![Leaf::new(0, 0, [0x20, part(0), part(8), part(4)])]
    }

    #[test]
    fn levels_have_what_lower_ones_have() {
        let models = [CpuModel::X86_64, CpuModel::X86_64V2, CpuModel::X86_64V3];
        let given = models.map(|model| leaves(model, &host(b"GenuineIntel"), 1, 4));
        for (lower, higher) in given.iter().zip(&given[1..]) {
            assert_eq!(missing(lower, higher), None);
            assert!(missing(higher, lower).is_some());
        }
        let missing = missing(&given[2], &given[1]).unwrap();
        for name in ["fma", "movbe", "xsave", "avx", "f16c", "bmi1", "avx2", "bmi2", "lzcnt"] {
            assert!(missing.contains(&format!("({name})")), "{name}: {missing}");
        }
    }

    #[test]
    fn vcpus_are_told_apart_and_hosts_are_not() {
        let amd = host(b"AuthenticAMD");
        let other_host = [amd.clone(), vec![Leaf::new(1, 0, [1, 2, 3, 4])]].concat();
        assert_eq!(leaves(CpuModel::X86_64V2, &amd, 3, 4), leaves(CpuModel::X86_64V2, &other_host, 3, 4));
        let numbers: Vec<u32> = (0..4)
            .map(|vcpu| {
                let leaves = leaves(CpuModel::X86_64, &amd, vcpu, 4);
                assert_eq!(word(&leaves, 0xb, 0, Word::Edx), word(&leaves, 1, 0, Word::Ebx) >> 24);
                word(&leaves, 0xb, 1, Word::Edx)
            })
            .collect();
        assert_eq!(numbers, [0, 1, 2, 3]);
        assert!(same_vendor(&amd, &other_host) && !same_vendor(&amd, &host(b"GenuineIntel")));
        assert_eq!(vendor(&amd), "AuthenticAMD");
    }

    #[test]
    fn what_is_printed_can_be_typed() {
        for name in ["x86-64", "x86-64-v2", "x86-64-v3", "host"] {
            assert_eq!(name.parse::<CpuModel>().unwrap().to_string(), name);
        }
        assert!("486".parse::<CpuModel>().is_err());
    }
}
