//! The microVM's devices: a serial port, and disks, network cards and a source of random numbers on virtio-mmio.
//!
//! What must stay true: devices are paused after the vCPUs and resumed before them; once paused nothing of them changes
//! memory, images or their own state. What the guest was told is done by then. What may wait for storage is done by the
//! devices' own threads, all of them at once, and is given up when it takes too long.

mod block;
mod bus;
mod chain;
mod console;
mod device;
mod disk;
mod image_lock;
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
use std::time::{Duration, Instant};

use dunlin::{Claim, Need, StartPermit, StateSection};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

pub use bus::Ended;

pub(super) use bus::Bus;
pub(super) use disk::Image;
pub(super) use memory::OwnWrites;

use block::Block;
use device::Device;
use disk::{Disk, Left};
use interrupt::{Interrupt, VmLines};
use memory::GuestRam;
use mmio::{Transport, TransportState};
use net::Net;
use rng::Rng;
use serial::{PortState, SerialPort};
use worker::{Asked, Worker};

use super::KvmError;
use super::x86::{DEVICES_ADDRESS, FIRST_IRQ};
use super::x86::{Power, VirtioWindow};
use crate::device_config::{DeviceConfig, DiskConfig};
use crate::sections::{StateError, find, section};

const SERIAL_SECTION: &str = "serial";
const TRANSPORT_SECTION: &str = "virtio-mmio";
const POWER_SECTION: &str = "power";
const END_SECTION: &str = "end";
/// How the guest has left a disk's image. A machine that does not know the section does without.
const IMAGE_SECTION: &str = "image";

/// How long all devices together may take to settle for a pause, or to get ready to run. Storage that takes longer is said to
/// hang. Longer than what disks and the network's hiccups take; shorter than a guest may stand still without its users asking.
const SETTLE_LIMIT: Duration = Duration::from_secs(2);
/// How long taking and giving up locks may take, waiting for the other side of a move included.
const CLAIM_LIMIT: Duration = Duration::from_secs(2);

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
    /// What people call each virtio device: a disk with its path.
    names: Vec<String>,
    bus: Arc<Bus>,
    lines: Arc<VmLines>,
    /// The first disk and its size in bytes.
    disk: Option<(DiskConfig, u64)>,
    /// What they have written to guest RAM.
    writes: OwnWrites,
}

impl Drop for Devices {
    fn drop(&mut self) {
        // All at once: each is waited for afterwards, and those that hang share one limit.
        self.workers.iter().for_each(Worker::end);
    }
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
        let (mut transports, mut workers, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for ((number, (name, device)), line) in devices.into_iter().enumerate().zip(LINES) {
            names.push(format!("{name} (device {number})"));
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
        Ok(Self { workers, names, bus: Arc::new(Bus::new(serial, transports)), lines, disk: first, writes })
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

    /// Asks all of them at once, each in its own thread, and waits until `limit` for the answers. What is answered too late is
    /// undone. Gives each one's answer; one that gave none has an error for it.
    fn ask_all<R: Send + 'static>(
        &self,
        limit: Duration,
        what: impl Fn(&Transport, usize) -> io::Result<R> + Clone + Send + 'static,
        undo: impl Fn(&Transport, R) + Clone + Send + 'static,
    ) -> Vec<io::Result<R>> {
        let deadline = Instant::now() + limit;
        let pairs = self.workers.iter().zip(&self.bus.transports).enumerate();
        let asked: Vec<Asked<io::Result<R>>> = pairs
            .map(|(number, (worker, transport))| {
                let (what, undo) = (what.clone(), undo.clone());
                let (asks, undoes) = (transport.clone(), transport.clone());
                worker.ask(
                    move || what(&asks, number),
                    move |done| {
                        if let Ok(done) = done {
                            undo(&undoes, done);
                        }
                    },
                )
            })
            .collect();
        let late = || {
            let text = format!("no answer within {} s: its storage hangs or is too slow", limit.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        };
        asked.into_iter().map(|asked| asked.wait(deadline).unwrap_or_else(late)).collect()
    }

    /// The first error, with the device's name.
    fn check<R>(&self, doing: &'static str, answers: Vec<io::Result<R>>) -> Result<(), KvmError> {
        for (answer, name) in answers.into_iter().zip(&self.names) {
            answer.map_err(failed(name, doing))?;
        }
        Ok(())
    }

    /// Has each stop after the request in hand, without waiting for that: before the vCPUs are stopped, so that one of
    /// these that waits for a busy device has its turn. [`Self::pause`], [`Self::resume`] or [`Self::keep_on`] must follow;
    /// each device looks at its queues when it is resumed, so no notification is lost.
    pub(super) fn hold(&self) {
        self.workers.iter().for_each(Worker::hold);
    }

    /// Stops them, after the vCPUs, and has them settle.
    ///
    /// # Errors
    /// When something that the guest was told is done could not be, or that takes too long: the device is named. They are
    /// stopped all the same, and [`Self::keep_on`] must follow.
    pub(super) fn pause(&self) -> Result<(), KvmError> {
        self.hold();
        self.bus.serial.pause();
        // A thread answers only between two requests.
        let answers = self.ask_all(SETTLE_LIMIT, |transport, _| transport.pause(), |transport, ()| transport.keep_on());
        self.check("write out", answers)
    }

    /// A pause came to nothing: they go on under the permit that they had, before the vCPUs, without waiting for what hangs.
    pub(super) fn keep_on(&self, permit: &StartPermit) {
        for (worker, transport) in self.workers.iter().zip(&self.bus.transports) {
            let transport = transport.clone();
            worker.order(move || transport.keep_on());
        }
        self.go_on(permit);
    }

    fn go_on(&self, permit: &StartPermit) {
        self.workers.iter().for_each(|worker| worker.resume(permit));
        self.bus.serial.resume();
    }

    /// Starts them, before the vCPUs. Each looks at its queues first.
    ///
    /// # Errors
    /// When one must not run, or cannot say so in time; none does then.
    pub(super) fn resume(&self, permit: &StartPermit) -> Result<(), KvmError> {
        let answers = self.ask_all(SETTLE_LIMIT, |transport, _| transport.resume(), |transport, ()| transport.let_go());
        if answers.iter().any(Result::is_err) {
            for ((worker, transport), answer) in self.workers.iter().zip(&self.bus.transports).zip(&answers) {
                let transport = transport.clone();
                if answer.is_ok() {
                    worker.order(move || transport.let_go());
                }
            }
            return self.check("use", answers);
        }
        self.go_on(permit);
        Ok(())
    }

    /// Takes or gives up what only one machine may use.
    ///
    /// # Errors
    /// When another machine has it, or that cannot be said in time; nothing has changed then.
    pub(super) fn claim(&self, claim: Claim) -> Result<(), KvmError> {
        let take_back = |transport: &Transport, before| drop(transport.claim(before));
        let answers = self.ask_all(CLAIM_LIMIT, move |transport, _| transport.claim(claim), take_back);
        if answers.iter().any(Result::is_err) {
            for ((worker, transport), answer) in self.workers.iter().zip(&self.bus.transports).zip(&answers) {
                let transport = transport.clone();
                if let Ok(before) = *answer {
                    worker.order(move || take_back(&transport, before));
                }
            }
        }
        self.check("claim", answers)
    }

    /// Those that do not answer within `limit`: what they wait for, their storage, hangs. They do nothing from here on.
    pub(super) fn hanging(&self, limit: Duration) -> Vec<String> {
        self.hold();
        let answers = self.ask_all(limit, |_, _| Ok(()), |_, ()| {});
        let named = answers.iter().zip(&self.names);
        named.filter(|(answer, _)| answer.is_err()).map(|(_, name)| name.clone()).collect()
    }

    /// The state of the paused devices.
    pub(super) fn save(&self) -> Result<Vec<StateSection>, StateError> {
        let mut sections = vec![section(SERIAL_SECTION, 0, &self.bus.serial.save())?];
        for (number, transport) in (0..).zip(&self.bus.transports) {
            sections.push(section(TRANSPORT_SECTION, number, &transport.save())?);
            if let Some(left) = transport.left() {
                sections.push(StateSection { need: Need::Optional, ..section(IMAGE_SECTION, number, &left)? });
            }
        }
        sections.push(section(POWER_SECTION, 0, &*self.bus.power())?);
        sections.push(section(END_SECTION, 0, &self.bus.ended())?);
        Ok(sections)
    }

    /// Whether a section is one of these devices'.
    pub(super) fn knows(&self, section: &StateSection) -> bool {
        match section.name.as_str() {
            SERIAL_SECTION | POWER_SECTION | END_SECTION => section.instance == 0,
            TRANSPORT_SECTION | IMAGE_SECTION => (section.instance as usize) < self.bus.transports.len(),
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
        let mut left = Vec::new();
        for (number, transport) in (0..).zip(&self.bus.transports) {
            let state: TransportState = find(sections, TRANSPORT_SECTION, number)?;
            transport.load(state, number)?;
            let is_given = sections.iter().any(|each| each.name == IMAGE_SECTION && each.instance == number);
            left.push(is_given.then(|| find::<Left>(sections, IMAGE_SECTION, number)).transpose()?);
        }
        let renew = move |transport: &Transport, number: usize| transport.renew(left.get(number).copied().flatten());
        self.check("open anew", self.ask_all(SETTLE_LIMIT, renew, |_, ()| {}))?;
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
