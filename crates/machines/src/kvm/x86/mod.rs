//! What of the microVM is x86-64: its first state, its whole state, its CPU's features, its built-in guests' code,
//! and what Linux needs to start.

mod acpi;
mod boot;
mod guest;
mod linux;
mod power;
mod program;
mod state;
mod time;

pub(super) mod cpu;
pub(super) mod features;

pub use linux::{BootError, Kernel};

pub(super) use acpi::VirtioWindow;
pub(super) use boot::{boot, boot_linux, progress};
pub(super) use linux::{Entry, Map, load as load_kernel};
pub(super) use power::{Power, RESET_PORT, RESET_VALUE, Written};
pub(super) use program::{LOW_BYTES, PACE_PORT, Program, Progress, SECTOR_BYTES, STORES, noted, visit};
pub(super) use state::{CHIPS, Host, VcpuState, VmState, load_vcpu, load_vm, save_vcpu, save_vm, set_cpuid};
pub use time::ClockDifference;
pub(super) use time::load as load_time;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;

use super::{KvmError, kvm};

/// The serial port, as on every PC.
pub(super) const SERIAL_PORT: u16 = 0x3f8;
/// Where the first virtio device is, in the hole below 4 GiB, and its interrupt.
pub(super) const DEVICES_ADDRESS: u64 = 0xd000_0000;
pub(super) const FIRST_IRQ: u32 = 5;

/// Three pages that KVM needs on some processors, in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a VM has before its vCPUs.
pub(super) fn create_chips(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_tss_address(TSS_ADDRESS).map_err(kvm("set the TSS address"))?;
    vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(kvm("create the interval timer"))
}
