//! The ACPI tables that a Linux guest finds its vCPUs, interrupt controllers and virtio devices by.
//!
//! Distributions' kernels come without the older ways, MP tables and devices on the command line. The tables say what is
//! there and no more; that is not hardware-reduced ACPI, because Linux would then not use the PICs and the interval timer,
//! which the machine has. What must stay true: all lies in the BIOS area below 1 MiB, which the memory map does not give to
//! the guest as RAM and where a guest that was not told the root pointer's address looks for it.

use acpi_tables::aml::{Device, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::power;

/// The root pointer's address.
pub(super) const ROOT: u64 = 0xe_0000;
/// What there is room for.
pub(super) const BYTES: u64 = 0x1_0000;

const OEM: [u8; 6] = *b"DUNLIN";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// A virtio device in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::kvm) struct VirtioWindow {
    /// Where its registers are.
    pub(in crate::kvm) address: u64,
    /// How many bytes.
    pub(in crate::kvm) bytes: u64,
    /// Its interrupt.
    pub(in crate::kvm) irq: u32,
}

/// The tables of a machine with so many vCPUs and these devices, as they stand from [`ROOT`] on.
pub(super) fn tables(vcpus: u32, devices: &[VirtioWindow]) -> Vec<u8> {
    let mut image = Image::default();
    // The root pointer stands first, and is known last.
    image.put(&vec![0; Rsdp::len()]);
    let facs = image.put(&bytes(&FACS::new()));
    let dsdt = image.put(dsdt(devices).as_slice());
    let fadt = image.put(&bytes(&fadt(facs, dsdt)));
    let madt = image.put(madt(vcpus).as_slice());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.put(&bytes(&xsdt));
    let mut all = image.bytes;
    for (to, byte) in all.iter_mut().zip(bytes(&Rsdp::new(OEM, xsdt))) {
        *to = byte;
    }
    all
}

/// Tables one behind the other.
#[derive(Debug, Default)]
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Adds a table, and tells its address.
    fn put(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        ROOT.saturating_add(at as u64)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16, bits: u8, size: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, size, u64::from(address))
}

/// What is fixed: the power management's ports, and how to reset.
fn fadt(facs: u64, dsdt: u64) -> acpi_tables::fadt::FADT {
    /// There is a serial port, no VGA, no message signalled interrupts and no clock on battery.
    const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = power::IRQ.into();
    fadt.pm1a_evt_blk = u32::from(power::EVENT_PORT).into();
    fadt.pm1_evt_len = power::EVENT_BYTES;
    fadt.x_pm1a_evt_blk = port(power::EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(power::CONTROL_PORT).into();
    fadt.pm1_cnt_len = power::CONTROL_BYTES;
    fadt.x_pm1a_cnt_blk = port(power::CONTROL_PORT, 16, AccessSize::WordAccess);
    // Neither of these states is there: their latencies say so.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(power::RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

/// vCPUs and interrupt controllers. An interrupt has the same number at the PICs and at the IOAPIC, so none is overridden.
fn madt(vcpus: u32) -> Sdt {
    /// There are PICs too.
    const PCAT_COMPATIBLE: u32 = 1;
    /// A local APIC's second pin is the non-maskable interrupt, of all vCPUs.
    const NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];
    let mut madt = Sdt::new(*b"APIC", 36, 4, OEM, OEM_TABLE, OEM_REVISION);
    madt.append(LOCAL_APIC);
    madt.append(PCAT_COMPATIBLE);
    for vcpu in 0..vcpus.min(255) as u8 {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled)));
    }
    // Its number is none of a vCPU's.
    madt.append_slice(&bytes(&IoApic::new(0xfe, IO_APIC, 0)));
    madt.append_slice(&NMI);
    madt
}

/// How to switch off, and the devices. The serial port is not among them: it is found where it always is.
fn dsdt(devices: &[VirtioWindow]) -> Sdt {
    let off = power::SLEEP_OFF;
    let off = Name::new("_S5_".into(), &Package::new(vec![&off, &off, &aml::ZERO, &aml::ZERO]));
    let devices = (0_u32..).zip(devices).flat_map(|(number, window)| device(number, *window));
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&bytes(&off));
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices.collect()));
    dsdt
}

fn device(number: u32, window: VirtioWindow) -> Vec<u8> {
    let VirtioWindow { address, bytes: size, irq } = window;
    // They lie in the hole below 4 GiB.
    let resources =
        (Memory32Fixed::new(true, address as u32, size as u32), Interrupt::new(true, true, false, false, irq));
    // What Linux knows a virtio device with registers in memory by.
    let kind = Name::new("_HID".into(), &"LNRO0005");
    let unique = Name::new("_UID".into(), &number);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&resources.0, &resources.1]));
    let name = format!("V{:03X}", number & 0xfff);
    bytes(&Device::new(name.as_str().into(), vec![&kind, &unique, &resources]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// From the root pointer on every table is found, is whole and fits.
    #[test]
    fn tables_hang_together() {
        let devices =
            [0, 1].map(|n| VirtioWindow { address: 0xd000_0000 + u64::from(n) * 0x1000, bytes: 0x1000, irq: 5 + n });
        let image = tables(16, &devices);
        assert!(image.len() as u64 <= BYTES);
        let table = |address: u64| {
            let from = &image[(address - ROOT) as usize..];
            &from[..number(&from[4..8]) as usize]
        };
        let root = &image[..36];
        assert_eq!((&root[..8], sum(&root[..20]), sum(root)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(number(&root[24..32]));
        assert_eq!((&xsdt[..4], sum(xsdt), xsdt.len()), (&b"XSDT"[..], 0, 36 + 16));
        let (fadt, madt) = (table(number(&xsdt[36..44])), table(number(&xsdt[44..52])));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        assert_eq!((&madt[..4], sum(madt), madt.len()), (&b"APIC"[..], 0, 44 + 16 * 8 + 12 + 6));
        let dsdt = table(number(&fadt[140..148]));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        assert_eq!(dsdt.windows(8).filter(|name| name == b"LNRO0005").count(), 2);
        assert_eq!(&table(number(&fadt[36..40]))[..4], b"FACS");
    }
}
