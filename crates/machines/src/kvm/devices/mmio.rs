//! The virtio-mmio transport, version 2: the registers of a device, its queues and its interrupt.
//!
//! The guest writes what it likes into registers and memory. What makes no sense is ignored, or the device asks to be reset
//! (DEVICE_NEEDS_RESET) and does nothing until then.
//!
//! What must stay true: locks are taken in the order registers, live. The worker holds `live` for one request at a time, so
//! that a request is either done and in the used ring, or untouched. Once paused, nothing here changes. A device that
//! panics is out of use from then on: its driver is told, and pauses fail, so that it is not moved.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dunlin::Claim;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::GuestAddress;

use super::chain::{Broken, Chain};
use super::device::Device;
use super::disk::Left;
use super::interrupt::Interrupt;
use super::memory::GuestRam;
use super::worker::{Bell, Wait};
use crate::sections::{StateError, same};

/// Registers and configuration space of a device take so many bytes.
pub(super) const WINDOW_BYTES: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"dnln");
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;

const USED: u32 = 1;
const CONFIGURATION: u32 = 2;

/// Requests of a queue before the others have their turn.
const TURN: usize = 64;

/// A queue as the driver describes it before it is ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Setup {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// What the driver writes while it sets up the device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    setups: Vec<Setup>,
}

/// The queues and the device.
struct Live {
    queues: Vec<Queue>,
    /// The driver has said that it is ready, and nothing has gone wrong since.
    active: bool,
    device: Box<dyn Device>,
    /// The queue of the request in hand, and where in its available ring that is.
    in_hand: Option<(usize, u16)>,
    /// The device has panicked; what it said. Nobody knows what state it is in.
    failed: Option<String>,
}

/// A device has panicked.
#[derive(Debug, thiserror::Error)]
#[error("it has failed: {said}")]
struct DeviceFailed {
    said: String,
}

/// What a panic says.
fn said(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it panicked".to_owned())
}

/// What became of a look at a queue.
enum Look {
    /// There was nothing to do.
    Nothing,
    /// A request was carried out.
    Done,
}

/// A device's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TransportState {
    kind: u32,
    status: u32,
    interrupt_status: u32,
    registers: Registers,
    queues: Vec<SavedQueue>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
        }
    }
}

impl From<&SavedQueue> for QueueState {
    fn from(saved: &SavedQueue) -> Self {
        Self {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.descriptors,
            avail_ring: saved.available,
            used_ring: saved.used,
        }
    }
}

/// A virtio device in the guest's address space.
pub(super) struct Transport {
    kind: u32,
    name: &'static str,
    /// What is offered.
    features: u64,
    config: Vec<u8>,
    properties: Vec<(String, String)>,
    queue_sizes: &'static [u16],
    status: AtomicU32,
    interrupt_status: AtomicU32,
    interrupt: Interrupt,
    registers: Mutex<Registers>,
    live: Mutex<Live>,
    ram: GuestRam,
    bell: Arc<Bell>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("device", &self.name).field("status", &self.status).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn low(value: u64) -> u32 {
    value as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

fn with_low(value: u64, low: u32) -> u64 {
    value & !u64::from(u32::MAX) | u64::from(low)
}

fn with_high(value: u64, high: u32) -> u64 {
    value & u64::from(u32::MAX) | u64::from(high) << 32
}

/// The word numbered `select` of features.
fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => low(features),
        1 => high(features),
        _ => 0,
    }
}

fn feature(bit: u32) -> u64 {
    1 << bit
}

impl Transport {
    /// A device that nobody has set up yet.
    ///
    /// # Errors
    /// The system's, when there is no bell for its worker, or the device's queues are not possible.
    pub(super) fn new(device: Box<dyn Device>, interrupt: Interrupt, ram: GuestRam) -> io::Result<Self> {
        let ours =
            feature(VIRTIO_F_VERSION_1) | feature(VIRTIO_RING_F_EVENT_IDX) | feature(VIRTIO_RING_F_INDIRECT_DESC);
        let queue_sizes = device.queue_sizes();
        let queues: Result<Vec<_>, _> = queue_sizes.iter().map(|size| Queue::new(*size)).collect();
        let transport = Self {
            kind: device.kind(),
            name: device.name(),
            features: device.features() | ours,
            config: device.config(),
            properties: device.properties(),
            queue_sizes,
            status: AtomicU32::new(0),
            interrupt_status: AtomicU32::new(0),
            interrupt,
            registers: Mutex::default(),
            live: Mutex::new(Live {
                queues: queues.map_err(io::Error::other)?,
                active: false,
                device,
                in_hand: None,
                failed: None,
            }),
            ram,
            bell: Arc::new(Bell::new()?),
        };
        *lock(&transport.registers) = transport.fresh();
        Ok(transport)
    }

    fn fresh(&self) -> Registers {
        let setups = self.queue_sizes.iter().map(|size| Setup { size: u32::from(*size), ..Setup::default() }).collect();
        Registers { setups, ..Registers::default() }
    }

    /// What wakes the device's worker.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// What the device is called.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// What the other side must have the same.
    pub(super) fn properties(&self) -> Vec<(String, String)> {
        self.properties.clone()
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    fn raise(&self, why: u32) {
        self.interrupt_status.fetch_or(why, Ordering::SeqCst);
        self.interrupt.raise();
    }

    /// The guest has done something that cannot be gone on from.
    fn give_up(&self, live: &mut Live) {
        live.active = false;
        self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        if self.status() & DRIVER_OK != 0 {
            self.raise(CONFIGURATION);
        }
    }

    fn reset(&self, registers: &mut Registers) {
        let mut live = lock(&self.live);
        live.active = false;
        live.queues.iter_mut().for_each(Queue::reset);
        live.device.set_features(0);
        *registers = self.fresh();
        self.interrupt_status.store(0, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    /// The guest reads from the device's window.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let bytes = self.config.get(at..).unwrap_or_default();
            data.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
            return;
        }
        // Registers are words, and read as such.
        if let (4, true) = (data.len(), offset.is_multiple_of(4)) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.kind,
            0x0c => VENDOR,
            0x10 => word(self.features, lock(&self.registers).device_features_select),
            0x34 => {
                let select = lock(&self.registers).queue_select as usize;
                self.queue_sizes.get(select).map_or(0, |size| u32::from(*size))
            }
            0x44 => {
                let select = lock(&self.registers).queue_select as usize;
                lock(&self.live).queues.get(select).map_or(0, |queue| u32::from(queue.ready()))
            }
            0x60 => self.interrupt_status.load(Ordering::SeqCst),
            0x70 => self.status(),
            // No shared memory: its length reads as all ones.
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            // The configuration never changes.
            _ => 0,
        }
    }

    /// The guest writes into the device's window.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        // Nothing in the configuration space can be written.
        let (Ok(bytes), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4) && offset < CONFIG) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x50 => return self.bell.ring(),
            0x64 => {
                self.interrupt_status.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            _ => {}
        }
        let mut registers = lock(&self.registers);
        match offset {
            0x14 => registers.device_features_select = value,
            0x20 => self.choose_features(&mut registers, value),
            0x24 => registers.driver_features_select = value,
            0x30 => registers.queue_select = value,
            0x44 => self.set_ready(&registers, value),
            0x70 => self.set_status(&mut registers, value),
            0x38 | 0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 => self.set_up(&mut registers, offset, value),
            _ => {}
        }
    }

    fn choose_features(&self, registers: &mut Registers, value: u32) {
        let chosen = registers.driver_features;
        if self.status() & (DRIVER | FEATURES_OK) == DRIVER {
            registers.driver_features = match registers.driver_features_select {
                0 => with_low(chosen, value),
                1 => with_high(chosen, value),
                _ => chosen,
            };
        }
    }

    /// Whether queues can be set up now: features are settled, and the device is not in use.
    fn is_being_set_up(&self) -> bool {
        self.status() & (FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED) == FEATURES_OK
    }

    fn set_up(&self, registers: &mut Registers, offset: u64, value: u32) {
        let select = registers.queue_select as usize;
        let ready = lock(&self.live).queues.get(select).is_none_or(QueueT::ready);
        let Some(setup) = registers.setups.get_mut(select).filter(|_| !ready && self.is_being_set_up()) else { return };
        match offset {
            0x38 => setup.size = value,
            0x80 => setup.descriptors = with_low(setup.descriptors, value),
            0x84 => setup.descriptors = with_high(setup.descriptors, value),
            0x90 => setup.available = with_low(setup.available, value),
            0x94 => setup.available = with_high(setup.available, value),
            0xa0 => setup.used = with_low(setup.used, value),
            _ => setup.used = with_high(setup.used, value),
        }
    }

    fn set_ready(&self, registers: &Registers, value: u32) {
        let select = registers.queue_select as usize;
        let mut live = lock(&self.live);
        let live = &mut *live;
        let (Some(queue), Some(setup)) = (live.queues.get_mut(select), registers.setups.get(select)) else { return };
        if value == 0 {
            queue.set_ready(false);
        } else if self.is_being_set_up() && !queue.ready() {
            let prepared = prepare(queue, *setup);
            queue.set_ready(true);
            if prepared.is_none() || !queue.is_valid(&*self.ram) {
                queue.set_ready(false);
                self.give_up(live);
            }
        }
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset(registers);
        }
        let old = self.status();
        let wanted = value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        // Bits are only ever added.
        if old & !NEEDS_RESET & !wanted != 0 || !is_ordered(wanted) {
            return;
        }
        let mut added = wanted & !old;
        let chosen = registers.driver_features;
        let acceptable = chosen & !self.features == 0 && chosen & feature(VIRTIO_F_VERSION_1) != 0;
        if added & FEATURES_OK != 0 && !acceptable {
            // The driver sees that the bit has not come on.
            added &= !(FEATURES_OK | DRIVER_OK);
        }
        let mut live = lock(&self.live);
        let status = self.status.fetch_or(added, Ordering::SeqCst) | added;
        if added & DRIVER_OK != 0 {
            let event_idx = chosen & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
            live.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
            live.device.set_features(chosen);
        }
        live.active = is_active(status);
        if live.active && live.failed.is_some() {
            self.give_up(&mut live);
        }
        drop(live);
        self.bell.ring();
    }

    /// Carries out what is in the queues, until there is nothing or the machine is paused.
    pub(super) fn work(&self, bell: &Bell) -> Wait {
        // After a panic the device is not used any more, and the queues are put right.
        let work = catch_unwind(AssertUnwindSafe(|| self.work_through(bell)));
        work.unwrap_or_else(|panic| {
            self.fail(&mut lock(&self.live), said(&*panic));
            Wait::Bell
        })
    }

    /// The device has panicked. The request in hand goes back to the available ring, and the driver is told.
    fn fail(&self, live: &mut Live, said: String) {
        if let Some((index, next)) = live.in_hand.take()
            && let Some(queue) = live.queues.get_mut(index)
        {
            queue.set_next_avail(next);
        }
        live.failed.get_or_insert(said);
        self.give_up(live);
    }

    /// Asks the device for something that is no request.
    fn ask(&self, what: impl FnOnce(&mut (dyn Device + 'static)) -> io::Result<()>) -> io::Result<()> {
        let mut live = lock(&self.live);
        let asked = catch_unwind(AssertUnwindSafe(|| what(&mut *live.device)));
        asked.unwrap_or_else(|panic| {
            let said = said(&*panic);
            self.fail(&mut live, said.clone());
            Err(io::Error::other(DeviceFailed { said }))
        })
    }

    fn work_through(&self, bell: &Bell) -> Wait {
        let mut again = true;
        while again {
            again = false;
            for queue in 0..self.queue_sizes.len() {
                for turn in 0..=TURN {
                    // One that has had its turn has the next after the others.
                    again |= turn == TURN;
                    if turn == TURN || !bell.is_open() || !self.advance(queue) {
                        break;
                    }
                }
            }
            again &= bell.is_open();
        }
        let mut live = lock(&self.live);
        if live.active { live.device.wait() } else { Wait::Bell }
    }

    /// Carries out a request of a queue; tells whether there may be more.
    fn advance(&self, index: usize) -> bool {
        let mut live = lock(&self.live);
        if !live.active {
            return false;
        }
        match self.look(&mut live, index) {
            Ok(Look::Done) => true,
            Ok(Look::Nothing) => false,
            Err(Broken) => {
                self.give_up(&mut live);
                false
            }
        }
    }

    fn look(&self, live: &mut Live, index: usize) -> Result<Look, Broken> {
        let Live { queues, device, in_hand, .. } = live;
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.ready()) else { return Ok(Look::Nothing) };
        let ram = &*self.ram;
        if !queue.is_valid(ram) {
            return Err(Broken);
        }
        if !device.wants(index) {
            return Ok(Look::Nothing);
        }
        let next = queue.next_avail();
        let Some(descriptors) = queue.iter(ram).map_err(|_| Broken)?.next() else {
            // From here on the guest tells of more; what came before it could know that is found here.
            let more = queue.enable_notification(ram).map_err(|_| Broken)?;
            return Ok(if more { Look::Done } else { Look::Nothing });
        };
        let head = descriptors.head_index();
        let chain = Chain::collect(descriptors)?;
        *in_hand = Some((index, next));
        let handled = device.handle(index, &chain, &self.ram);
        *in_hand = None;
        let written = handled?;
        queue.add_used(ram, head, written).map_err(|_| Broken)?;
        if queue.needs_notification(ram).map_err(|_| Broken)? {
            self.raise(USED);
        }
        Ok(Look::Done)
    }

    /// The device's worker calls this when it has stopped: has the device make others see what was acknowledged.
    ///
    /// # Errors
    /// When they would not, or the device has failed: as it is it must not go anywhere.
    pub(super) fn pause(&self) -> io::Result<()> {
        let paused = self.ask(|device| device.pause());
        match lock(&self.live).failed.clone() {
            Some(said) => Err(io::Error::other(DeviceFailed { said })),
            None => paused,
        }
    }

    /// A pause came to nothing: the machine runs on.
    pub(super) fn keep_on(&self) {
        let _ = self.ask(|device| {
            device.keep_on();
            Ok(())
        });
    }

    /// The machine is about to run. A device that has failed does not keep the others from that.
    pub(super) fn resume(&self) -> io::Result<()> {
        if lock(&self.live).failed.is_some() {
            return Ok(());
        }
        self.ask(|device| device.resume())
    }

    /// A start came to nothing.
    pub(super) fn let_go(&self) {
        let _ = self.ask(|device| {
            device.let_go();
            Ok(())
        });
    }

    /// Takes or gives up what only one machine may use; tells what was this machine's before.
    pub(super) fn claim(&self, claim: Claim) -> io::Result<Claim> {
        let mut before = Claim::Nothing;
        self.ask(|device| {
            before = device.claimed();
            device.claim(claim)
        })?;
        Ok(before)
    }

    /// How the guest has left the image of the paused device.
    pub(super) fn left(&self) -> Option<Left> {
        lock(&self.live).device.left()
    }

    /// The guest comes from elsewhere and has left the image like this: see [`Device::renew`].
    pub(super) fn renew(&self, left: Option<Left>) -> io::Result<()> {
        self.ask(|device| device.renew(left))
    }

    /// The state of the paused device.
    pub(super) fn save(&self) -> TransportState {
        TransportState {
            kind: self.kind,
            status: self.status(),
            interrupt_status: self.interrupt_status.load(Ordering::SeqCst),
            registers: lock(&self.registers).clone(),
            queues: lock(&self.live).queues.iter().map(|queue| queue.state().into()).collect(),
        }
    }

    /// Checks a state and makes the queues of it.
    fn check(&self, state: &TransportState) -> Result<Vec<Queue>, String> {
        let TransportState { kind, status, registers, queues, .. } = state;
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED;
        let count = self.queue_sizes.len();
        if *kind != self.kind || queues.len() != count || registers.setups.len() != count || status & !known != 0 {
            return Err("it is another device's".to_owned());
        }
        if !is_ordered(*status) {
            return Err(format!("a status of {status:#x}"));
        }
        if status & FEATURES_OK != 0 && registers.driver_features & !self.features != 0 {
            return Err("the driver has features that this device does not offer".to_owned());
        }
        let made = queues.iter().zip(self.queue_sizes).map(|(saved, size)| {
            let queue = Queue::try_from(QueueState::from(saved)).map_err(|error| error.to_string())?;
            if saved.max_size == *size { Ok(queue) } else { Err("a queue has another size".to_owned()) }
        });
        made.collect()
    }

    /// Takes over a state. The worker must be stopped, and the device be renewed afterwards.
    pub(super) fn load(&self, state: TransportState, instance: u32) -> Result<(), StateError> {
        same("as kind of a virtio device", state.kind.into(), self.kind.into())?;
        let queues = self.check(&state).map_err(|problem| StateError::Damaged {
            name: super::TRANSPORT_SECTION,
            instance,
            problem,
        })?;
        let mut registers = lock(&self.registers);
        let mut live = lock(&self.live);
        let features = if state.status & DRIVER_OK != 0 { state.registers.driver_features } else { 0 };
        live.device.set_features(features);
        live.queues = queues;
        live.active = is_active(state.status) && live.failed.is_none();
        self.status.store(state.status, Ordering::SeqCst);
        self.interrupt_status.store(state.interrupt_status, Ordering::SeqCst);
        *registers = state.registers;
        Ok(())
    }
}

/// Each bit of a driver's progress comes after those before it.
fn is_ordered(status: u32) -> bool {
    let order = [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)];
    order.iter().all(|(bit, before)| status & bit == 0 || status & before != 0)
}

fn is_active(status: u32) -> bool {
    status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
}

/// Gives a queue its size and places, if they are possible.
fn prepare(queue: &mut Queue, setup: Setup) -> Option<()> {
    queue.try_set_size(u16::try_from(setup.size).ok()?).ok()?;
    queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(setup.available)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(setup.used)).ok()?;
    // The queue counts address 0 as not set.
    (setup.available != 0).then_some(())
}
