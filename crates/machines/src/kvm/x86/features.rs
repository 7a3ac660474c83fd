//! The CPU's features that a guest is given, and whether another host has them.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
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
pub(in crate::kvm) enum Word {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Registers whose bits are features: all that the guest was given must be there.
const FEATURES: [(u32, u32, Word, &str); 19] = [
    (0x1, 0, Word::Ecx, "ECX"),
    (0x1, 0, Word::Edx, "EDX"),
    (0x6, 0, Word::Eax, "EAX"),
    (0x7, 0, Word::Ebx, "EBX"),
    (0x7, 0, Word::Ecx, "ECX"),
    (0x7, 0, Word::Edx, "EDX"),
    (0x7, 1, Word::Eax, "EAX"),
    (0x7, 1, Word::Ecx, "ECX"),
    (0x7, 1, Word::Edx, "EDX"),
    (0x7, 2, Word::Edx, "EDX"),
    (0xd, 0, Word::Eax, "EAX"),
    (0xd, 0, Word::Edx, "EDX"),
    (0xd, 1, Word::Eax, "EAX"),
    (0x8000_0001, 0, Word::Ecx, "ECX"),
    (0x8000_0001, 0, Word::Edx, "EDX"),
    (0x8000_0007, 0, Word::Edx, "EDX"),
    (0x8000_0008, 0, Word::Ebx, "EBX"),
    (0x8000_0021, 0, Word::Eax, "EAX"),
    (0x4000_0001, 0, Word::Eax, "EAX"),
];

/// Features that people know by name.
const NAMES: [(u32, u32, Word, u32, &str); 29] = [
    (0x1, 0, Word::Ecx, 0, "sse3"),
    (0x1, 0, Word::Ecx, 9, "ssse3"),
    (0x1, 0, Word::Ecx, 12, "fma"),
    (0x1, 0, Word::Ecx, 13, "cx16"),
    (0x1, 0, Word::Ecx, 17, "pcid"),
    (0x1, 0, Word::Ecx, 19, "sse4_1"),
    (0x1, 0, Word::Ecx, 20, "sse4_2"),
    (0x1, 0, Word::Ecx, 21, "x2apic"),
    (0x1, 0, Word::Ecx, 22, "movbe"),
    (0x1, 0, Word::Ecx, 23, "popcnt"),
    (0x1, 0, Word::Ecx, 24, "tsc_deadline_timer"),
    (0x1, 0, Word::Ecx, 25, "aes"),
    (0x1, 0, Word::Ecx, 26, "xsave"),
    (0x1, 0, Word::Ecx, 28, "avx"),
    (0x1, 0, Word::Ecx, 29, "f16c"),
    (0x1, 0, Word::Ecx, 30, "rdrand"),
    (0x7, 0, Word::Ebx, 3, "bmi1"),
    (0x7, 0, Word::Ebx, 5, "avx2"),
    (0x7, 0, Word::Ebx, 8, "bmi2"),
    (0x7, 0, Word::Ebx, 16, "avx512f"),
    (0x7, 0, Word::Ebx, 18, "rdseed"),
    (0x7, 0, Word::Ebx, 29, "sha_ni"),
    (0x7, 0, Word::Ecx, 16, "la57"),
    (0x7, 0, Word::Edx, 26, "ibrs"),
    (0x8000_0001, 0, Word::Ecx, 0, "lahf_lm"),
    (0x8000_0001, 0, Word::Ecx, 5, "lzcnt"),
    (0x8000_0001, 0, Word::Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Word::Edx, 27, "rdtscp"),
    (0x4000_0001, 0, Word::Eax, 3, "kvmclock"),
];

/// What does not come from the processor: OSXSAVE and OSPKE follow the guest's control registers, and that it is a guest,
/// with more than one vCPU, is the machine's to say.
const NOT_OF_HOST: [(u32, u32, Word, u32); 4] =
    [(0x1, 0, Word::Ecx, 27), (0x7, 0, Word::Ecx, 4), (0x1, 0, Word::Ecx, 31), (0x1, 0, Word::Edx, 28)];

impl Leaf {
    /// A leaf that does not depend on an index.
    pub(in crate::kvm) fn new(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self { function, index, flags: 0, eax, ebx, ecx, edx }
    }

    /// One of several leaves of a function.
    pub(in crate::kvm) fn indexed(function: u32, index: u32, words: [u32; 4]) -> Self {
        Self { flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..Self::new(function, index, words) }
    }

    /// With these bits set in a register as well.
    pub(in crate::kvm) fn with(mut self, register: Word, bits: u32) -> Self {
        *match register {
            Word::Eax => &mut self.eax,
            Word::Ebx => &mut self.ebx,
            Word::Ecx => &mut self.ecx,
            Word::Edx => &mut self.edx,
        } |= bits;
        self
    }

    /// Without these bits of a register.
    pub(super) fn without(self, register: Word, bits: u32) -> Self {
        let mut all = self;
        *match register {
            Word::Eax => &mut all.eax,
            Word::Ebx => &mut all.ebx,
            Word::Ecx => &mut all.ecx,
            Word::Edx => &mut all.edx,
        } &= !bits;
        all
    }

    /// With what says which vCPU of how many it is.
    pub(super) fn of_vcpu(mut self, vcpu: u32, vcpus: u32) -> Self {
        const THREADS: u32 = 1 << 8;
        const CORES: u32 = 2 << 8;
        match (self.function, self.index) {
            (0x1, _) => self.ebx = self.ebx & 0xff00 | vcpu << 24 | vcpus.next_power_of_two() << 16,
            // One thread a core, all cores in one socket.
            (0xb, 0) => (self.eax, self.ebx, self.ecx, self.edx) = (0, 1, THREADS, vcpu),
            (0xb, 1) => {
                let width = vcpus.next_power_of_two().trailing_zeros();
                (self.eax, self.ebx, self.ecx, self.edx) = (width, vcpus, CORES | 1, vcpu);
            }
            _ => {}
        }
        self
    }

    pub(super) fn word(&self, word: Word) -> u32 {
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

/// A register of a leaf, 0 if there is no such leaf.
pub(super) fn word(leaves: &[Leaf], function: u32, index: u32, register: Word) -> u32 {
    let leaf = leaves.iter().find(|leaf| leaf.function == function && leaf.index == index);
    leaf.map_or(0, |leaf| leaf.word(register))
}

/// The features of `given` that `here` has not, in words; nothing when it has all.
pub(in crate::kvm) fn missing(given: &[Leaf], here: &[Leaf]) -> Option<String> {
    let mut all = Vec::new();
    for (function, index, register, register_name) in FEATURES {
        let absent = word(given, function, index, register) & !word(here, function, index, register);
        for bit in (0..32).filter(|bit| absent >> bit & 1 != 0) {
            if NOT_OF_HOST.contains(&(function, index, register, bit)) {
                continue;
            }
            let known = NAMES.iter().find(|(f, i, w, b, _)| (*f, *i, *w, *b) == (function, index, register, bit));
            let name = known.map_or_else(String::new, |(.., name)| format!(" ({name})"));
            all.push(format!("leaf {function:#x}.{index} {register_name} bit {bit}{name}"));
        }
    }
    let bits = |leaves: &[Leaf]| word(leaves, 0x8000_0008, 0, Word::Eax) & 0xff;
    let (wanted, there) = (bits(given), bits(here));
    // A guest may use every bit that it was told of; none are told of on hosts without the leaf.
    if there != 0 && wanted > there {
        all.push(format!("{wanted} bits of physical addresses (there are {there})"));
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
