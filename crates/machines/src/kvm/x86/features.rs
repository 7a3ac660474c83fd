//! The CPU's features that a guest is given, and whether another host has them.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// An answer of the CPUID instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::kvm) struct Leaf {
    pub(in crate::kvm) function: u32,
    pub(in crate::kvm) index: u32,
    flags: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// Which of a leaf's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Registers whose bits are features: all that the guest was given must be there.
const FEATURES: [(u32, u32, Word, &str); 16] = [
    (0x1, 0, Word::Ecx, "ECX"),
    (0x1, 0, Word::Edx, "EDX"),
    (0x6, 0, Word::Eax, "EAX"),
    (0x7, 0, Word::Ebx, "EBX"),
    (0x7, 0, Word::Ecx, "ECX"),
    (0x7, 0, Word::Edx, "EDX"),
    (0x7, 1, Word::Eax, "EAX"),
    (0x7, 1, Word::Edx, "EDX"),
    (0xd, 0, Word::Eax, "EAX"),
    (0xd, 1, Word::Eax, "EAX"),
    (0x8000_0001, 0, Word::Ecx, "ECX"),
    (0x8000_0001, 0, Word::Edx, "EDX"),
    (0x8000_0007, 0, Word::Edx, "EDX"),
    (0x8000_0008, 0, Word::Ebx, "EBX"),
    (0x8000_0021, 0, Word::Eax, "EAX"),
    (0x4000_0001, 0, Word::Eax, "EAX"),
];

/// Features that people know by name.
const NAMES: [(u32, u32, Word, u32, &str); 24] = [
    (0x1, 0, Word::Ecx, 0, "sse3"),
    (0x1, 0, Word::Ecx, 9, "ssse3"),
    (0x1, 0, Word::Ecx, 12, "fma"),
    (0x1, 0, Word::Ecx, 13, "cx16"),
    (0x1, 0, Word::Ecx, 17, "pcid"),
    (0x1, 0, Word::Ecx, 19, "sse4_1"),
    (0x1, 0, Word::Ecx, 20, "sse4_2"),
    (0x1, 0, Word::Ecx, 21, "x2apic"),
    (0x1, 0, Word::Ecx, 24, "tsc_deadline_timer"),
    (0x1, 0, Word::Ecx, 25, "aes"),
    (0x1, 0, Word::Ecx, 26, "xsave"),
    (0x1, 0, Word::Ecx, 28, "avx"),
    (0x1, 0, Word::Ecx, 30, "rdrand"),
    (0x7, 0, Word::Ebx, 3, "bmi1"),
    (0x7, 0, Word::Ebx, 5, "avx2"),
    (0x7, 0, Word::Ebx, 8, "bmi2"),
    (0x7, 0, Word::Ebx, 16, "avx512f"),
    (0x7, 0, Word::Ebx, 18, "rdseed"),
    (0x7, 0, Word::Ebx, 29, "sha_ni"),
    (0x7, 0, Word::Ecx, 16, "la57"),
    (0x7, 0, Word::Edx, 26, "ibrs"),
    (0x8000_0001, 0, Word::Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Word::Edx, 27, "rdtscp"),
    (0x4000_0001, 0, Word::Eax, 3, "kvmclock"),
];

/// What the guest sees change by itself: OSXSAVE and OSPKE follow its control registers.
const FOLLOWS_GUEST: [(u32, u32, Word, u32); 2] = [(0x1, 0, Word::Ecx, 27), (0x7, 0, Word::Ecx, 4)];

impl Leaf {
    fn word(&self, word: Word) -> u32 {
        match word {
            Word::Eax => self.eax,
            Word::Ebx => self.ebx,
            Word::Ecx => self.ecx,
            Word::Edx => self.edx,
        }
    }
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
        Self { function, index, flags, eax, ebx, ecx, edx }
    }
}

impl From<&Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: &Leaf) -> Self {
        let Leaf { function, index, flags, eax, ebx, ecx, edx } = *leaf;
        Self { function, index, flags, eax, ebx, ecx, edx, ..Self::default() }
    }
}

/// All leaves of a CPU.
pub(in crate::kvm) fn leaves(cpuid: &CpuId) -> Vec<Leaf> {
    cpuid.as_slice().iter().map(Leaf::from).collect()
}

/// The leaves of the vCPU of that number, of so many: the host's but for who it is.
pub(in crate::kvm) fn of_vcpu(leaves: &[Leaf], vcpu: u32, vcpus: u32) -> Vec<Leaf> {
    const HYPERVISOR: u32 = 1 << 31;
    let mut leaves = leaves.to_vec();
    for leaf in &mut leaves {
        match leaf.function {
            0x1 => {
                leaf.ebx = leaf.ebx & 0xffff | vcpu << 24 | vcpus.next_power_of_two() << 16;
                leaf.ecx |= HYPERVISOR;
            }
            0xb | 0x1f => leaf.edx = vcpu,
            _ => {}
        }
    }
    leaves
}

/// The features of `given` that `here` has not, in words; nothing when it has all.
pub(in crate::kvm) fn missing(given: &[Leaf], here: &[Leaf]) -> Option<String> {
    let word = |leaves: &[Leaf], function, index, word| {
        let leaf = leaves.iter().find(|leaf| leaf.function == function && leaf.index == index);
        leaf.map_or(0, |leaf| leaf.word(word))
    };
    let mut all = Vec::new();
    for (function, index, register, register_name) in FEATURES {
        let absent = word(given, function, index, register) & !word(here, function, index, register);
        for bit in (0..32).filter(|bit| absent >> bit & 1 != 0) {
            if FOLLOWS_GUEST.contains(&(function, index, register, bit)) || (function, bit) == (0x1, 31) {
                continue;
            }
            let known = NAMES.iter().find(|(f, i, w, b, _)| (*f, *i, *w, *b) == (function, index, register, bit));
            let name = known.map_or_else(String::new, |(.., name)| format!(" ({name})"));
            all.push(format!("leaf {function:#x}.{index} {register_name} bit {bit}{name}"));
        }
    }
    (!all.is_empty()).then(|| all.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let leaf = |ebx, edx| Leaf { function: 7, index: 0, flags: 1, eax: 0, ebx, ecx: 0, edx };
        assert_eq!(missing(&[leaf(1 << 3, 0)], &[leaf(1 << 3 | 1 << 5, 1)]), None);
        let missing = missing(&[leaf(1 << 3 | 1 << 5, 1)], &[leaf(1 << 3, 0)]).unwrap();
        assert_eq!(missing, "leaf 0x7.0 EBX bit 5 (avx2), leaf 0x7.0 EDX bit 0");
    }
}
