//! The traits a VMM implements to have its machines migrated.
//!
//! A [`Machine`] is what the engine sees of a guest: its RAM, a way to see its writes, and its device state as
//! named sections. Which side may run it is not the machine's business but [`Guest`](crate::Guest)'s; the engine
//! calls `resume` only on the side that owns the guest.

use crate::memory::{DirtyTracker, Ram};

/// An error of the VMM's own code, carried as the cause of a migration error.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// A machine that can be migrated.
///
/// Methods are called from the engine's threads, one at a time, but for [`ram`](Self::ram).
pub trait Machine: Send + Sync {
    /// The machine's RAM. The same blocks, by name and size, on both sides; it does not change during a migration.
    fn ram(&self) -> &Ram;

    /// A tracker for this machine's RAM; each migration makes one.
    /// [`WriteProtectTracker`](crate::memory::WriteProtectTracker) serves every machine that writes its RAM
    /// through this process's mapping.
    ///
    /// # Errors
    /// When this machine's writes cannot be tracked here; the migration then fails before anything is sent.
    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError>;

    /// What the other side must agree to besides RAM: CPU model, number of vCPUs, devices, disk sizes. Any bytes
    /// up to 1 MiB; [`accept_profile`](Self::accept_profile) reads them on the other side before RAM is sent.
    fn profile(&self) -> Vec<u8>;

    /// Checks the source's profile on the destination.
    ///
    /// # Errors
    /// The reason for a refusal, in words for the operator of the source.
    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError>;

    /// Stops all vCPUs and devices. When it returns nothing writes to RAM or changes device state any more.
    ///
    /// # Errors
    /// When the machine could not be stopped; it then goes on running.
    fn pause(&self) -> Result<(), MachineError>;

    /// Starts or restarts all vCPUs and devices.
    ///
    /// # Errors
    /// Must mean that not one vCPU has run: the engine then gives the guest back to the other side.
    fn resume(&self) -> Result<(), MachineError>;

    /// The paused machine's state besides RAM.
    ///
    /// # Errors
    /// When it cannot be read; the guest then goes on at the source.
    fn save(&self) -> Result<Vec<StateSection>, MachineError>;

    /// Takes over the state that [`save`](Self::save) gave on the other side. Must check all of it: what is
    /// accepted here runs. Unknown sections are an error unless their [`Need`] is [`Need::Optional`]. That no byte of
    /// a section was changed on the way has been checked.
    ///
    /// # Errors
    /// When it does not fit this machine; the guest then goes on at the source, and this machine must be ready to
    /// load another state.
    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError>;
}

/// Whether a section of device state must be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A machine that does not know it refuses the guest, by its name.
    Required,
    /// A machine that does not know it skips it: the guest is as well without.
    Optional,
}

/// The state of one device or vCPU, in the machine's own encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSection {
    /// What it is the state of, for instance `vcpu`; at most 255 bytes.
    pub name: String,
    /// Which of several, for instance the vCPU's number.
    pub instance: u32,
    /// Version of the encoding of `data`.
    pub version: u32,
    /// Whether a machine that does not know it may go without.
    pub need: Need,
    /// The state.
    pub data: Vec<u8>,
}
