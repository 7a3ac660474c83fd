//! What of the guest's port and memory accesses comes to the VMM, and who answers it.
//!
//! vCPUs' threads call it. Where nobody answers, reads give all ones and writes are ignored: guests look for devices that
//! are not there.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dunlin::GuestEnd;
use serde::{Deserialize, Serialize};

use super::mmio::{Transport, WINDOW_BYTES};
use super::serial::SerialPort;
use crate::gate::Gate;
use crate::kvm::x86::{DEVICES_ADDRESS, Power, RESET_PORT, RESET_VALUE, SERIAL_PORT, Written};

/// What is written here ends the machine, as with QEMU's isa-debug-exit.
const DEBUG_EXIT_PORT: u16 = 0xf4;
/// A guest that has to wait for the consumer of its output looks again after this.
const OUTPUT_PAUSE: Duration = Duration::from_millis(1);

/// How a guest has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// It has said so, with a value, at the debug exit port.
    Exit {
        /// What it wrote: 0 is success.
        value: u32,
    },
    /// It has asked for a reset.
    Reset,
    /// It has switched itself off.
    Off,
    /// A vCPU met a fault in handling a fault in handling a fault, or the guest shut down.
    Shutdown,
    /// A vCPU has halted for good.
    Halted,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit { value } => write!(f, "the guest has exited with {value}"),
            Self::Reset => f.write_str("the guest has asked for a reset"),
            Self::Off => f.write_str("the guest has switched itself off"),
            Self::Shutdown => f.write_str("the guest has shut down by a triple fault"),
            Self::Halted => f.write_str("the guest has halted"),
        }
    }
}

impl From<Ended> for GuestEnd {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Exit { .. } => Self::Exited,
            Ended::Reset => Self::Reset,
            Ended::Off => Self::PoweredOff,
            Ended::Shutdown => Self::TripleFault,
            Ended::Halted => Self::Halted,
        }
    }
}

/// All that answers a guest.
#[derive(Debug)]
pub(in crate::kvm) struct Bus {
    pub(super) serial: SerialPort,
    pub(super) transports: Vec<Arc<Transport>>,
    power: Mutex<Power>,
    ended: Mutex<Option<Ended>>,
}

impl Bus {
    pub(super) fn new(serial: SerialPort, transports: Vec<Arc<Transport>>) -> Self {
        Self { serial, transports, power: Mutex::default(), ended: Mutex::default() }
    }

    /// How the guest has ended, if it has.
    pub(in crate::kvm) fn ended(&self) -> Option<Ended> {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_ended(&self, ended: Option<Ended>) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = ended;
    }

    /// The power management's registers.
    pub(super) fn power(&self) -> MutexGuard<'_, Power> {
        self.power.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest ends. The first end counts.
    pub(in crate::kvm) fn end(&self, ended: Ended) {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ended);
    }

    /// The guest reads from a port, a byte or more at a time.
    pub(in crate::kvm) fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = serial_register(port) {
            data.iter_mut().for_each(|byte| *byte = self.serial.read(offset));
        } else if Power::has(port, data.len()) {
            self.power().read(port, data);
        }
    }

    /// The guest writes to a port. It waits while the consumer of its output does not keep up, until `gate` closes.
    pub(in crate::kvm) fn write_port(&self, port: u16, data: &[u8], gate: &Gate) {
        if let Some(offset) = serial_register(port) {
            for byte in data {
                while offset == 0 && self.serial.is_full() && gate.is_open() {
                    gate.sleep(Instant::now() + OUTPUT_PAUSE);
                }
                self.serial.write(offset, *byte);
            }
        } else if Power::has(port, data.len()) {
            if self.power().write(port, data) == Written::Off {
                self.end(Ended::Off);
            }
        } else if port == DEBUG_EXIT_PORT {
            let mut value = [0; 4];
            value.iter_mut().zip(data).for_each(|(to, byte)| *to = *byte);
            self.end(Ended::Exit { value: u32::from_le_bytes(value) });
        } else if port == RESET_PORT && data == [RESET_VALUE] {
            self.end(Ended::Reset);
        }
    }

    fn transport(&self, address: u64) -> Option<(&Transport, u64)> {
        let at = address.checked_sub(DEVICES_ADDRESS)?;
        let transport = self.transports.get(usize::try_from(at / WINDOW_BYTES).ok()?)?;
        Some((transport, at % WINDOW_BYTES))
    }

    /// The guest reads memory that is none.
    pub(in crate::kvm) fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.transport(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes memory that is none.
    pub(in crate::kvm) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.transport(address) {
            transport.write(offset, data);
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL_PORT).filter(|offset| *offset < 8).map(|offset| offset as u8)
}
