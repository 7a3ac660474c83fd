//! The microVM's devices: a serial port, and disks, network cards and a source of random numbers on virtio-mmio.
//!
//! What must stay true: devices are paused after the vCPUs and resumed before them; once paused nothing of them changes
//! memory, images or their own state. What the guest was told is done by then.

mod block;
mod bus;
mod chain;
mod console;
mod device;
mod disk;
mod interrupt;
mod memory;
mod mmio;
mod net;
mod rng;
mod serial;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;

use dunlin::{StartPermit, StateSection};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

pub use bus::Ended;

pub(super) use bus::Bus;
pub(super) use disk::Image;
pub(super) use memory::OwnWrites;

use block::Block;
use device::Device;
use disk::Disk;
use interrupt::{Interrupt, VmLines};
use memory::GuestRam;
use mmio::{Transport, TransportState};
use net::Net;
use rng::Rng;
use serial::{PortState, SerialPort};
use worker::Worker;

use super::KvmError;
use super::x86::{DEVICES_ADDRESS, FIRST_IRQ};
use super::x86::{Power, VirtioWindow};
use crate::device_config::{DeviceConfig, DiskConfig};
use crate::sections::{StateError, find, section};

const SERIAL_SECTION: &str = "serial";
const TRANSPORT_SECTION: &str = "virtio-mmio";
const POWER_SECTION: &str = "power";
const END_SECTION: &str = "end";

const SERIAL_LINE: u32 = 4;
/// The lines of the virtio devices, one each.
const LINES: std::ops::RangeInclusive<u32> = FIRST_IRQ..=15;

/// A device as the other side must have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    name: String,
    properties: Vec<(String, String)>,
}

/// A machine's devices.
#[derive(Debug)]
pub(super) struct Devices {
    // Dropped in this order: the workers end before what they work on.
    workers: Vec<Worker>,
    bus: Arc<Bus>,
    lines: Arc<VmLines>,
    /// The first disk and its size in bytes.
    disk: Option<(DiskConfig, u64)>,
    /// What they have written to guest RAM.
    writes: OwnWrites,
}

fn failed(device: impl Into<String>, doing: &'static str) -> impl FnOnce(io::Error) -> KvmError {
    let device = device.into();
    move |source| KvmError::Device { device, doing, source }
}

impl Devices {
    /// The devices, in a machine with this memory, paused.
    pub(super) fn new(config: &DeviceConfig, memory: &GuestMemoryMmap, writes: OwnWrites) -> Result<Self, KvmError> {
        let lines = Arc::new(VmLines::default());
        let ram = GuestRam::new(memory, &writes)
            .map_err(|source| KvmError::System { doing: "show the memory to devices", source })?;
        let mut devices: Vec<(String, Box<dyn Device>)> = Vec::new();
        let mut first = None;
        for disk in &config.disks {
            let name = format!("disk {}", disk.path.display());
            let looked = Disk::look(disk.clone()).map_err(failed(&name, "open"))?;
            first.get_or_insert((disk.clone(), looked.size));
            devices.push((name, Box::new(Block::new(looked))));
        }
        for net in &config.nets {
            let name = format!("tap device {}", net.tap);
            let card = Net::new(net).map_err(failed(&name, "open"))?;
            devices.push((name, Box::new(card)));
        }
        devices.extend((0..config.rngs).map(|_| ("rng".to_owned(), Box::new(Rng) as Box<dyn Device>)));
        let room = LINES.count();
        if devices.len() > room {
            return Err(KvmError::TooManyDevices { devices: devices.len(), room });
        }
        let (mut transports, mut workers) = (Vec::new(), Vec::new());
        for ((name, device), line) in devices.into_iter().zip(LINES) {
            let interrupt = Interrupt::new(lines.clone(), line);
            let transport =
                Transport::new(device, interrupt, ram.clone()).map_err(failed(&name, "make a transport for"))?;
            let transport = Arc::new(transport);
            let worker = {
                let transport = transport.clone();
                Worker::start(format!("virtio {line}"), transport.bell().clone(), move |bell| transport.work(bell))
            };
            workers.push(worker.map_err(failed(&name, "start a thread for"))?);
            transports.push(transport);
        }
        let serial = SerialPort::new(&config.serial, Interrupt::new(lines.clone(), SERIAL_LINE))
            .map_err(failed(format!("serial port {}", config.serial), "open"))?;
        Ok(Self { workers, bus: Arc::new(Bus::new(serial, transports)), lines, disk: first, writes })
    }

    /// What answers the guest.
    pub(super) fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// What they have written to guest RAM, a bitmap for each block.
    pub(super) fn writes(&self) -> &OwnWrites {
        &self.writes
    }

    /// Bytes of the first disk.
    pub(super) fn disk_bytes(&self) -> Option<u64> {
        self.disk.as_ref().map(|(_, bytes)| *bytes)
    }

    /// The first disk's image, as any other process would find it. The devices have been paused.
    pub(super) fn image(&self) -> Result<Option<Image>, KvmError> {
        let open = |(config, _): &(DiskConfig, u64)| {
            Image::open(config).map_err(failed(format!("disk {}", config.path.display()), "look at"))
        };
        self.disk.as_ref().map(open).transpose()
    }

    /// Where a guest finds the virtio devices.
    pub(super) fn windows(&self) -> Vec<VirtioWindow> {
        let addresses = (DEVICES_ADDRESS..).step_by(mmio::WINDOW_BYTES as usize);
        let windows = self.bus.transports.iter().zip(addresses).zip(LINES);
        let window = |((_, address), irq)| VirtioWindow { address, bytes: mmio::WINDOW_BYTES, irq };
        windows.map(window).collect()
    }

    /// From now on their interrupts go to this VM.
    pub(super) fn connect(&self, vm: Arc<VmFd>) {
        self.lines.connect(vm);
    }

    /// Does it to all of them, also when it goes wrong with one; the first error is returned.
    fn each(&self, doing: &'static str, mut each: impl FnMut(&Transport) -> io::Result<()>) -> Result<(), KvmError> {
        let mut result = Ok(());
        for (number, transport) in self.bus.transports.iter().enumerate() {
            let done = each(transport).map_err(failed(format!("{} (device {number})", transport.name()), doing));
            result = result.and(done);
        }
        result
    }

    /// Has each stop after the request in hand, without waiting for that: before the vCPUs are stopped, so that one of
    /// these that waits for a busy device has its turn. [`Self::pause`] or [`Self::resume`] must follow; each device looks
    /// at its queues when it is resumed, so no notification is lost.
    pub(super) fn hold(&self) {
        self.workers.iter().for_each(Worker::hold);
    }

    /// Stops them, after the vCPUs.
    ///
    /// # Errors
    /// When something that the guest was told is done could not be; they are stopped all the same.
    pub(super) fn pause(&self) -> Result<(), KvmError> {
        self.halt();
        self.each("write out", Transport::pause)
    }

    fn halt(&self) {
        self.bus.serial.pause();
        self.workers.iter().for_each(Worker::pause);
    }

    fn go_on(&self, permit: &StartPermit) {
        self.workers.iter().for_each(|worker| worker.resume(permit));
        self.bus.serial.resume();
    }

    /// Starts them, before the vCPUs. Each looks at its queues first.
    ///
    /// # Errors
    /// When one must not run; none does then.
    pub(super) fn resume(&self, permit: &StartPermit) -> Result<(), KvmError> {
        if let Err(error) = self.each("use", Transport::resume) {
            // What was taken for use is let go again; the first error says more than those.
            let _ = self.each("let go of", Transport::pause);
            return Err(error);
        }
        self.go_on(permit);
        Ok(())
    }

    /// The state of the paused devices.
    pub(super) fn save(&self) -> Result<Vec<StateSection>, StateError> {
        let mut sections = vec![section(SERIAL_SECTION, 0, &self.bus.serial.save())?];
        for (number, transport) in (0..).zip(&self.bus.transports) {
            sections.push(section(TRANSPORT_SECTION, number, &transport.save())?);
        }
        sections.push(section(POWER_SECTION, 0, &*self.bus.power())?);
        sections.push(section(END_SECTION, 0, &self.bus.ended())?);
        Ok(sections)
    }

    /// Whether a section is one of these devices'.
    pub(super) fn knows(&self, section: &StateSection) -> bool {
        match section.name.as_str() {
            SERIAL_SECTION | POWER_SECTION | END_SECTION => section.instance == 0,
            TRANSPORT_SECTION => (section.instance as usize) < self.bus.transports.len(),
            _ => false,
        }
    }

    /// Takes over the state of devices elsewhere, which have been paused.
    pub(super) fn load(&self, sections: &[StateSection]) -> Result<(), KvmError> {
        let serial: PortState = find(sections, SERIAL_SECTION, 0)?;
        let power: Power = find(sections, POWER_SECTION, 0)?;
        let ended: Option<Ended> = find(sections, END_SECTION, 0)?;
        let damaged = |problem| StateError::Damaged { name: SERIAL_SECTION, instance: 0, problem };
        self.bus.serial.load(serial).map_err(damaged)?;
        for (number, transport) in (0..).zip(&self.bus.transports) {
            let state: TransportState = find(sections, TRANSPORT_SECTION, number)?;
            let name = format!("{} (device {number})", transport.name());
            transport.load(state, number)?.map_err(failed(name, "open anew"))?;
        }
        *self.bus.power() = power;
        self.bus.set_ended(ended);
        Ok(())
    }

    /// What the other side must have the same.
    pub(super) fn describe(&self) -> Vec<Description> {
        let describe = |transport: &Arc<Transport>| Description {
            name: transport.name().to_owned(),
            properties: transport.properties(),
        };
        self.bus.transports.iter().map(describe).collect()
    }

    /// Checks that the source has the same devices.
    pub(super) fn accept(&self, theirs: &[Description]) -> Result<(), KvmError> {
        let ours = self.describe();
        let list = |all: &[Description]| match all {
            [] => "none".to_owned(),
            all => all.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", "),
        };
        if theirs.iter().map(|one| &one.name).ne(ours.iter().map(|one| &one.name)) {
            return Err(KvmError::OtherDevices { theirs: list(theirs), ours: list(&ours) });
        }
        for (number, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
            let name = &theirs.name;
            let values = |all: &Description, wanted: &str| {
                let found = all.properties.iter().find(|(name, _)| name == wanted);
                found.map_or_else(|| "nothing".to_owned(), |(_, value)| value.clone())
            };
            for (property, _) in theirs.properties.iter().chain(&ours.properties) {
                let (theirs, ours) = (values(theirs, property), values(ours, property));
                if theirs != ours {
                    let device = format!("{name} (device {number})");
                    return Err(KvmError::OtherDevice { device, property: property.clone(), theirs, ours });
                }
            }
        }
        Ok(())
    }
}
