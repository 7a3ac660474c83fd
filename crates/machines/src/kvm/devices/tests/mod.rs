//! Devices against a driver over memory, without a guest.

mod block;
mod hostile;
mod net;
mod serial;
mod transport;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dunlin::StartPermit;
use dunlin::memory::DirtyBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::device::Device;
use super::interrupt::{Interrupt, Lines};
use super::memory::{GuestRam, OwnWrites};
use super::mmio::Transport;
use super::worker::Worker;

pub(super) const MEMORY: u64 = 8 << 20;

#[derive(Debug, Default)]
pub(super) struct Pulses(AtomicU32);

impl Lines for Pulses {
    fn pulse(&self, _: u32) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Pulses {
    pub(super) fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

pub(super) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// A device on memory that may be shared with another.
pub(super) struct Rig {
    worker: Worker,
    pub(super) transport: Arc<Transport>,
    pub(super) pulses: Arc<Pulses>,
    pub(super) writes: OwnWrites,
}

pub(super) fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

impl Rig {
    pub(super) fn new(device: Box<dyn Device>, memory: &GuestMemoryMmap) -> Self {
        let writes: OwnWrites = [DirtyBitmap::new(MEMORY)].into();
        let ram = GuestRam::new(memory, &writes).unwrap();
        let pulses = Arc::new(Pulses::default());
        let transport = Arc::new(Transport::new(device, Interrupt::new(pulses.clone(), 5), ram).unwrap());
        let works = transport.clone();
        let worker = Worker::start("test".to_owned(), transport.bell().clone(), move |bell| works.work(bell)).unwrap();
        Self { worker, transport, pulses, writes }
    }

    pub(super) fn resume(&self) {
        self.transport.resume().unwrap();
        self.worker.resume(&StartPermit::unlimited());
    }

    pub(super) fn pause(&self) {
        self.try_pause().unwrap();
    }

    pub(super) fn try_pause(&self) -> std::io::Result<()> {
        self.worker.hold();
        let transport = self.transport.clone();
        let paused = self.worker.ask(move || transport.pause(), drop);
        paused.wait(Instant::now() + Duration::from_secs(20)).expect("it stops")
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(super) fn features(&self) -> u64 {
        self.write(0x14, 1);
        let high = self.read(0x10);
        self.write(0x14, 0);
        u64::from(high) << 32 | u64::from(self.read(0x10))
    }

    /// Brings the device up as a driver does, with one queue.
    pub(super) fn bring_up(&self, features: u64, queue: Queue) {
        self.bring_up_all(features, &[queue]);
    }

    /// The same with its first queues.
    pub(super) fn bring_up_all(&self, features: u64, queues: &[Queue]) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x24, select);
            self.write(0x20, word);
        }
        self.write(0x70, 0xb);
        assert_eq!(self.read(0x70), 0xb);
        for (number, queue) in (0..).zip(queues) {
            self.write(0x30, number);
            self.write(0x38, queue.size.into());
            for (offset, address) in [(0x80, queue.descriptors()), (0x90, queue.available()), (0xa0, queue.used())] {
                self.write(offset, address as u32);
                self.write(offset + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
            assert_eq!(self.read(0x44), 1);
        }
        self.write(0x70, 0xf);
        assert_eq!(self.read(0x70), 0xf);
    }
}

/// Where a queue is in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queue {
    pub(super) size: u16,
    pub(super) start: u64,
}

impl Queue {
    pub(super) fn descriptors(self) -> u64 {
        self.start
    }

    pub(super) fn available(self) -> u64 {
        self.start + 0x4000
    }

    pub(super) fn used(self) -> u64 {
        self.start + 0x6000
    }
}

/// A buffer of a request: address, length, and whether the device writes it.
pub(super) type Buffer = (u64, u32, bool);

/// A driver's side of a queue.
pub(super) struct Driver {
    pub(super) memory: GuestMemoryMmap,
    pub(super) queue: Queue,
    pub(super) submitted: u16,
}

impl Driver {
    pub(super) fn new(memory: &GuestMemoryMmap, size: u16) -> Self {
        Self::at(memory, size, 0x1_0000)
    }

    pub(super) fn at(memory: &GuestMemoryMmap, size: u16, start: u64) -> Self {
        Self { memory: memory.clone(), queue: Queue { size, start }, submitted: 0 }
    }

    pub(super) fn descriptor(&self, index: u16, (address, length, writes): Buffer, flags: u16, next: u16) {
        let at = self.queue.descriptors() + u64::from(index) * 16;
        let flags = flags | if writes { 2 } else { 0 };
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain of buffers from descriptor `head` on, and gives it to the device.
    pub(super) fn submit(&mut self, head: u16, buffers: &[Buffer]) {
        for (index, buffer) in (head..).zip(buffers) {
            let last = usize::from(index - head) + 1 == buffers.len();
            self.descriptor(index, *buffer, u16::from(!last), index + 1);
        }
        self.offer(head);
    }

    pub(super) fn offer(&mut self, head: u16) {
        let slot = self.queue.available() + 4 + u64::from(self.submitted % self.queue.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.submitted = self.submitted.wrapping_add(1);
        self.memory.store(self.submitted, GuestAddress(self.queue.available() + 2), Ordering::Release).unwrap();
    }

    pub(super) fn used(&self) -> u16 {
        self.memory.load(GuestAddress(self.queue.used() + 2), Ordering::Acquire).unwrap()
    }

    /// The `number`th entry of the used ring: the chain's head and the length written.
    pub(super) fn used_entry(&self, number: u16) -> (u32, u32) {
        let at = self.queue.used() + 4 + u64::from(number % self.queue.size) * 8;
        (self.memory.read_obj(GuestAddress(at)).unwrap(), self.memory.read_obj(GuestAddress(at + 4)).unwrap())
    }

    pub(super) fn wait_for_all(&self, what: &str) {
        until(what, || self.used() == self.submitted);
    }
}
