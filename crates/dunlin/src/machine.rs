//! The traits a VMM implements to have its machines migrated.
//!
//! A [`Machine`] is what the engine sees of a guest: its RAM, a way to see its writes, and its device state as
//! named sections. Which side may run it is not the machine's business but [`Guest`](crate::Guest)'s; the engine
//! calls `resume` only on the side that owns the guest.

use std::time::Duration;

use crate::clock::BootInstant;
use crate::guest::{GuestEnd, StartPermit};
use crate::memory::{DirtyTracker, Ram};

/// An error of the VMM's own code, carried as the cause of a migration error.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// A machine that can be migrated.
///
/// Methods are called from a thread of the engine's, one at a time, except [`ram`](Self::ram) and [`vcpus`](Self::vcpus), which
/// are called from any thread at any time. The engine holds no lock meanwhile and waits for a limited time: a method that
/// does not return fails the migration, and what it returns later is dropped.
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

    /// What a switchover costs this machine at most, besides RAM. The engine calls it once for each migration, while
    /// the guest runs, and it must not stop the guest. The engine adds these costs to the predicted downtime, and does
    /// not stop a guest whose predicted downtime is above `downtime-limit`. Costs that the engine measured in the last
    /// five minutes take precedence. A machine that does not know its costs may return [`SwitchoverCost::default`].
    fn switchover_cost(&self) -> SwitchoverCost;

    /// Stops all vCPUs and devices. When it returns nothing writes to RAM or changes device state any more.
    ///
    /// # Errors
    /// When the machine could not be stopped; it then goes on running.
    fn pause(&self) -> Result<(), MachineError>;

    /// How the guest has ended by itself, if it has: it switched itself off, say. Asked right after each
    /// [`pause`](Self::pause). An ended guest is not handed over; see [`Guest::ended`](crate::Guest::ended), which tells as soon
    /// as it happens.
    fn ended(&self) -> Option<GuestEnd> {
        None
    }

    /// Starts or restarts all vCPUs and devices under `permit`. Each vCPU calls [`StartPermit::enter`] every time right
    /// before it enters the guest, and each device before its first output. If the answer is `false`, the vCPU or
    /// device does nothing: this call may have hung, and the other side may own the guest by now. A machine that
    /// already runs keeps running under the permit that it has.
    ///
    /// # Errors
    /// When the machine could not be started. No vCPU may run from then on. If no vCPU has entered the guest under
    /// `permit`, the engine may give the guest back to the other side. Otherwise it keeps the guest, and a person
    /// decides.
    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError>;

    /// The paused machine's state besides RAM.
    ///
    /// # Errors
    /// When it cannot be read; the guest then goes on at the source.
    fn save(&self) -> Result<Vec<StateSection>, MachineError>;

    /// Loads the state that [`save`](Self::save) returned on the other side. The machine must check all of the state,
    /// because the guest runs with it. An unknown section is an error unless its [`Need`] is [`Need::Optional`]. The
    /// engine has already verified each section's checksum.
    ///
    /// # Errors
    /// When the state does not fit this machine. The guest then goes on at the source, and this machine must be ready
    /// to load another state.
    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError>;

    /// Loads the state as [`load`](Self::load) does; the state was saved `age` ago. The engine calls this method. A
    /// machine implements it to move its guest's clock forward by the time that the guest stood still. The two hosts'
    /// wall clocks measure that time only as well as they agree.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    fn load_aged(&self, sections: Vec<StateSection>, age: StateAge) -> Result<(), MachineError> {
        let _ = age;
        self.load(sections)
    }

    /// Takes or gives up what only one machine may use at a time, above all the locks on disk images. `claim` says
    /// which part belongs to this side from now on. Claiming what this side already has changes nothing. The engine
    /// calls this whenever ownership of the guest changes, before each [`resume`](Self::resume), and once more when the
    /// source of a guest that runs here has let go of everything.
    ///
    /// # Errors
    /// When another machine has what is claimed. Giving up never fails.
    fn claim(&self, claim: Claim) -> Result<(), MachineError> {
        let _ = claim;
        Ok(())
    }

    /// The vCPUs, if this machine can slow them. A machine that cannot is migrated all the same, but `auto-converge`
    /// has no effect on it. The engine calls this at any time, also while another method runs.
    fn vcpus(&self) -> Option<&dyn Vcpus> {
        None
    }
}

/// What a switchover costs a machine at most, besides RAM. The default is for a machine that cannot tell: 50 ms for each step
/// and 4 MiB of state. More fields may come: end a literal with `..SwitchoverCost::default()`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchoverCost {
    /// The longest [`pause`](Machine::pause).
    pub pause: Duration,
    /// The longest [`save`](Machine::save).
    pub save: Duration,
    /// The longest [`load`](Machine::load).
    pub load: Duration,
    /// The longest [`resume`](Machine::resume).
    pub resume: Duration,
    /// The most bytes of device state.
    pub state_bytes: u64,
}

impl Default for SwitchoverCost {
    fn default() -> Self {
        let step = Duration::from_millis(50);
        Self { pause: step, save: step, load: step, resume: step, state_bytes: 4 << 20 }
    }
}

/// How long ago the state that is being loaded was saved, between two bounds. The source saved the state after it
/// received a certain message from this side, and before this side received the state. This side times both with its
/// own clock. Nobody sets that clock, and it goes on while the host is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateAge {
    after: BootInstant,
    before: BootInstant,
}

impl StateAge {
    /// Saved at least and at most so long ago, as of now. For a VMM's own tests of its machine.
    pub fn between(least: Duration, most: Duration) -> Self {
        let now = BootInstant::now();
        Self::saved(now - most, now - least)
    }

    pub(crate) fn saved(after: BootInstant, before: BootInstant) -> Self {
        Self { after: after.min(before), before }
    }

    /// The state is at least this old, as of now.
    pub fn least(&self) -> Duration {
        self.before.elapsed()
    }

    /// The state is at most this old, as of now.
    pub fn most(&self) -> Duration {
        self.after.elapsed()
    }
}

/// How much of what only one machine may use (a disk image) is this side's. There are two parts: the *owner's*, which allows
/// to write, and the *session's*, which keeps third parties out while the owner's part changes hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Claim {
    /// Both parts: the guest is here, running or paused, and nobody else has to do with it.
    Whole,
    /// Both parts. The guest goes on even if somebody else has changed what it uses, a disk image for instance. Only a
    /// person's decision asks for this.
    Anyway,
    /// The owner's part: the guest has just come, or is taken over, and its source still has the session's part.
    Arrived,
    /// The session's part: the guest is about to be released to the other side, which takes the owner's part.
    Released,
    /// Neither: the guest is the other side's.
    Nothing,
}

/// The vCPUs of a machine that can be slowed, numbered from 0. Methods are called at any time, from any thread, also while
/// the machine starts, stops, loads or saves, and do not wait for the vCPUs.
///
/// What must stay true: a throttled vCPU can be paused as quickly as any other. Nothing that it does is lost or done
/// twice, because it only waits between two of its instructions. The throttle is not part of the guest's state and is
/// not saved.
pub trait Vcpus: Send + Sync {
    /// How many there are. It does not change.
    fn count(&self) -> usize;

    /// Throttles each vCPU by its percentage, from 0 (not at all) to 99. `percent` has one value for each vCPU. A vCPU
    /// that is throttled by 75 runs for a quarter of its time and sleeps for the rest. One run and one sleep take 20 ms
    /// together, because the engine measures over 50 ms. The throttle takes effect immediately, or when a paused
    /// machine resumes. It holds until it is set again.
    fn set_throttle(&self, percent: &[u8]);

    /// For each vCPU, the number of pages that it has dirtied so far. `None` if the machine cannot tell vCPUs apart. A
    /// count never falls. The engine uses only differences, as weights, so the counts need not be exact. A machine may
    /// count every write or only a page's first write, but it must count the same way for all vCPUs.
    fn dirtied(&self) -> Option<Vec<u64>>;
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
