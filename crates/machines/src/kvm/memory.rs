//! Guest RAM: blocks with a hole below 4 GiB for devices, as memory slots of KVM.

use std::sync::Arc;

use dunlin::memory::{KvmSlot, Ram};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use super::x86::Map;
use super::{KvmError, kvm};
use crate::Backing;

/// Where the hole for devices begins,
const HOLE_START: u64 = 3 << 30;
/// and where it ends.
const HOLE_END: u64 = 4 << 30;
/// Slots are no larger: a look at the dirty log takes that of a whole slot.
const SLOT_BYTES: u64 = 1 << 30;

/// RAM and where the guest has it.
#[derive(Debug)]
pub(super) struct Memory {
    /// Holds the mappings that the slots stand on.
    guest: GuestMemoryMmap,
    pub(super) ram: Ram,
    pub(super) slots: Vec<KvmSlot>,
    addresses: Vec<u64>,
}

impl Memory {
    /// So many bytes of it, all zeros.
    pub(super) fn new(bytes: u64, backing: Backing) -> Result<Self, KvmError> {
        let low = bytes.min(HOLE_START);
        let pieces = [(0, low), (HOLE_END, bytes.saturating_sub(low))];
        let mut regions = Vec::new();
        for (start, size) in pieces.into_iter().filter(|(_, size)| *size > 0) {
            let length = usize::try_from(size).map_err(|_| KvmError::MemorySize { bytes })?;
            let region = backing.map(length).map_err(|source| KvmError::System { doing: "map the memory", source })?;
            let region = GuestRegionMmap::new(region, GuestAddress(start)).ok_or(KvmError::MemorySize { bytes })?;
            regions.push(Arc::new(region));
        }
        let mut blocks = Vec::new();
        let (mut slots, mut addresses) = (Vec::new(), Vec::new());
        for (block, (start, size)) in pieces.into_iter().filter(|(_, size)| *size > 0).enumerate() {
            for offset in (0..size).step_by(SLOT_BYTES as usize) {
                let slot = slots.len() as u32;
                let size_bytes = SLOT_BYTES.min(size - offset);
                slots.push(KvmSlot { slot, guest_address: start + offset, block, offset, size_bytes });
            }
            addresses.push(start);
            let region = regions.get(block).ok_or(KvmError::MemorySize { bytes })?;
            blocks.push(backing.block(&format!("ram@{start:x}"), region.get_mmap())?);
        }
        let guest = GuestMemoryMmap::from_arc_regions(regions)
            .map_err(|e| KvmError::System { doing: "lay out the memory", source: std::io::Error::other(e) })?;
        Ok(Self { guest, ram: Ram::new(blocks)?, slots, addresses })
    }

    /// Guest address of a block.
    pub(super) fn address(&self, block: usize) -> u64 {
        self.addresses.get(block).copied().unwrap_or(0)
    }

    /// The mappings, for devices.
    pub(super) fn guest(&self) -> &GuestMemoryMmap {
        &self.guest
    }

    /// Where the guest's memory ends.
    pub(super) fn end(&self) -> u64 {
        let ends = self.slots.iter().map(|slot| slot.guest_address + slot.size_bytes);
        ends.max().unwrap_or(0)
    }

    /// Bytes below the hole.
    pub(super) fn low_bytes(&self) -> u64 {
        self.ram.blocks().first().map_or(0, dunlin::memory::RamBlock::size_bytes)
    }

    /// As a kernel sees it.
    pub(super) fn map(&self) -> Map<'_> {
        let high = self.ram.blocks().get(1).map(|block| (HOLE_END, block.size_bytes()));
        Map { memory: &self.guest, low_bytes: self.low_bytes(), high }
    }

    /// Gives the slots to a VM.
    pub(super) fn attach(&self, vm: &VmFd) -> Result<(), KvmError> {
        for slot in &self.slots {
            let region = self.guest.iter().nth(slot.block).map(|region| region.as_ptr() as u64).unwrap_or(0);
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.size_bytes,
                userspace_addr: region.saturating_add(slot.offset),
            };
            // SAFETY: the slots of different memory do not overlap, and the machine holds the mappings as long as the VM.
            unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give memory to the VM"))?;
        }
        Ok(())
    }
}
