//! A machine and the right to run it.
//!
//! [`Guest`] is the gate through which everybody starts and stops the machine: the VMM's own commands and the
//! migration. What must stay true: `Machine::resume` is called only here, only while this side owns the guest, and not once
//! the guest has ended.

mod calls;
mod ownership;
mod permit;
mod taken;

use std::fmt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, PoisonError};

use serde::Serialize;

use crate::dirty_rate::{DirtyRate, DirtyRateError, DirtyRateRequest, DirtyRateService};
use crate::error::{GuestError, GuestPlace, Side};
use crate::machine::{Claim, Machine};
use crate::report::Status;
use crate::sync::{Condvar, Mutex};
use crate::throttle::{Throttle, VcpuThrottle};
pub(crate) use calls::Calls;
use ownership::State;
pub(crate) use ownership::{Came, Ground, Heard, Left, Untold};
pub use permit::StartPermit;
pub(crate) use taken::Expected;

/// Who may run the guest, seen from this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub enum Ownership {
    /// This side, which starts and stops it as it likes.
    Here,
    /// This side, but it is paused for a switchover that may give it away.
    HandingOver,
    /// Nobody on this side until the other side, or a person, says so.
    Undecided,
    /// The other side, for good.
    Gone,
    /// The other side; it may come in.
    Awaited,
}

/// How a guest has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestEnd {
    /// It switched itself off.
    PoweredOff,
    /// It said that it is done, at a port for that.
    Exited,
    /// It asked for a reset, and its machine does not start it again.
    Reset,
    /// Its vCPUs halted for good.
    Halted,
    /// A vCPU met a triple fault.
    TripleFault,
    /// It told its machine that it panicked.
    Panicked,
    /// It did not end by itself: its process was told to end, and the guest ends with it.
    ProcessEnds,
}

impl GuestEnd {
    /// Whether the vCPUs do nothing from then on, without being stopped.
    fn stops_vcpus(self) -> bool {
        self != Self::ProcessEnds
    }

    /// All ends, in the order of their numbers on the wire.
    pub(crate) const ALL: [Self; 7] = [
        Self::PoweredOff,
        Self::Exited,
        Self::Reset,
        Self::Halted,
        Self::TripleFault,
        Self::Panicked,
        Self::ProcessEnds,
    ];
}

impl fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PoweredOff => "powered off",
            Self::Exited => "exited",
            Self::Reset => "reset itself",
            Self::Halted => "halted",
            Self::TripleFault => "triple fault",
            Self::Panicked => "panicked",
            Self::ProcessEnds => "its process was told to end",
        })
    }
}

/// Something that happened to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEvent {
    /// Its vCPUs were stopped here.
    Stopped,
    /// Its vCPUs were started here.
    Resumed,
    /// It has ended here. If it was running, [`Stopped`](Self::Stopped) came before.
    Ended {
        /// How.
        end: GuestEnd,
    },
    /// A migration of it has come to this status.
    Migration {
        /// Whether it is leaving or coming.
        side: Side,
        /// The status.
        status: Status,
    },
    /// A pass over its dirty RAM begins.
    Pass {
        /// Counted from 1.
        number: u32,
    },
}

/// A machine and the right to run it. All methods may be called from any thread.
pub struct Guest {
    machine: Arc<dyn Machine>,
    calls: Calls,
    state: Mutex<State>,
    turn_ended: Condvar,
    untold: std::sync::Mutex<Vec<Untold>>,
    watchers: std::sync::Mutex<Vec<Sender<GuestEvent>>>,
    throttle: Throttle,
    dirty_rate: DirtyRateService,
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("state", &*self.state()).finish_non_exhaustive()
    }
}

impl Guest {
    /// A guest that is here, paused. [`cont`](Self::cont) starts it.
    pub fn new(machine: Arc<dyn Machine>) -> Arc<Self> {
        Self::with(machine, Ownership::Here)
    }

    /// A guest that will come in by a migration.
    pub fn awaited(machine: Arc<dyn Machine>) -> Arc<Self> {
        Self::with(machine, Ownership::Awaited)
    }

    fn with(machine: Arc<dyn Machine>, ownership: Ownership) -> Arc<Self> {
        Arc::new(Self {
            throttle: Throttle::new(machine.clone()),
            dirty_rate: DirtyRateService::new(machine.clone()),
            calls: Calls::new(machine.clone()),
            machine,
            state: Mutex::new(State::new(ownership)),
            turn_ended: Condvar::new(),
            untold: std::sync::Mutex::default(),
            watchers: std::sync::Mutex::default(),
        })
    }

    /// What happens to the guest from here on, in order, for as long as the receiver is kept. What nobody receives is
    /// kept in memory.
    pub fn events(&self) -> Receiver<GuestEvent> {
        let (watcher, events) = mpsc::channel();
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(watcher);
        events
    }

    /// Tells who watches. The caller holds the lock of what has changed, so that the order is right.
    pub(crate) fn tell(&self, event: GuestEvent) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.send(event).is_ok());
    }

    /// Its methods, called one at a time and with a bound.
    pub(crate) fn calls(&self) -> &Calls {
        &self.calls
    }

    /// The machine itself.
    pub fn machine(&self) -> &Arc<dyn Machine> {
        &self.machine
    }

    /// Who may run it.
    pub fn ownership(&self) -> Ownership {
        self.state().ownership()
    }

    /// Whether it runs here.
    pub fn is_running(&self) -> bool {
        self.state().runs()
    }

    /// How the guest has ended here, if it has.
    pub fn end(&self) -> Option<GuestEnd> {
        self.state().ended
    }

    /// Tells the engine that the guest has ended, for instance because it switched itself off. A VMM may call this from
    /// any thread, also from a vCPU's: it does not block. After [`GuestEnd::ProcessEnds`] the vCPUs may run until the
    /// guest is [stopped](Self::stop); after any other end they must do nothing more. The guest cannot be started
    /// again, and a migration out fails on both sides with this reason. Only the first end counts.
    ///
    /// The engine also asks [`Machine::ended`] after each pause, so that a guest that ended just before is not handed
    /// over.
    ///
    /// # Errors
    /// When the guest is not here, or not here any more. The end is then part of the machine's state, and the side that
    /// gets the guest reports it.
    pub fn ended(&self, end: GuestEnd) -> Result<(), GuestError> {
        self.note_end(end)
    }

    /// Where the guest is, as far as `side` of a migration can know.
    pub fn place(&self, side: Side) -> GuestPlace {
        self.state().place(side)
    }

    /// Starts or restarts the guest.
    ///
    /// # Errors
    /// When it is not this side's to run, it has ended, or the machine fails to.
    pub fn cont(&self) -> Result<(), GuestError> {
        self.operate(Resume::Run, Claim::Whole)
    }

    /// Starts or restarts the guest as [`cont`](Self::cont) does, even if somebody else has changed what the guest
    /// uses, for instance a disk image. The guest may lose data then; the person who decides must judge that.
    ///
    /// # Errors
    /// As for [`cont`](Self::cont).
    pub fn cont_anyway(&self) -> Result<(), GuestError> {
        self.operate(Resume::Run, Claim::Anyway)
    }

    /// Pauses the guest. A migration under way goes on, and it arrives paused.
    ///
    /// # Errors
    /// When it is not here, or the machine fails to pause.
    pub fn stop(&self) -> Result<(), GuestError> {
        self.operate(Resume::StayPaused, Claim::Whole)
    }

    /// Runs an undecided guest on this side, by a person's decision. The guest goes on from where it was paused for the
    /// switchover, and stays paused if it was paused before. This works on both sides, also after the
    /// [`Source`](crate::Source) or [`Destination`](crate::Destination) was dropped.
    ///
    /// Before deciding, a person must make sure that the other side does not run the guest. If both sides run the guest
    /// and connect again, the side with the lower epoch pauses its guest and keeps it. If the epochs are equal, the
    /// destination does.
    ///
    /// # Errors
    /// When nothing is undecided here, `rule` does not allow it yet, or the guest could not be started. In the last case it
    /// stays decidable at the destination, and is here, paused, at the source.
    pub fn take_back(&self, rule: TakeBack) -> Result<(), GuestError> {
        self.decide_here(rule)
    }

    /// Slows `vcpu`, or every vCPU if `vcpu` is `None`: a slowed vCPU does not run for `percent` (0 to 99) of its time.
    /// It may be called at any time. The throttle takes effect immediately and holds until it is changed or
    /// [cancelled](Self::cancel_vcpu_throttle). If `auto-converge` asks for more, the vCPU is slowed by that much. The
    /// throttle belongs to this side: a guest that has moved runs at full speed at the destination.
    ///
    /// # Errors
    /// When there is no such vCPU, the percentage is out of range, or this machine cannot throttle its vCPUs. Nothing is
    /// changed then.
    pub fn set_vcpu_throttle(&self, vcpu: Option<usize>, percent: u8) -> Result<(), GuestError> {
        self.throttle.set_operator(vcpu, percent)
    }

    /// Ends the throttle of `vcpu`, or of every vCPU if `vcpu` is `None`. A throttle that a migration set stays.
    ///
    /// # Errors
    /// When there is no such vCPU, or this machine cannot throttle its vCPUs.
    pub fn cancel_vcpu_throttle(&self, vcpu: Option<usize>) -> Result<(), GuestError> {
        self.throttle.set_operator(vcpu, 0)
    }

    /// How much each vCPU is slowed, and who asked for it; empty where the machine cannot throttle its vCPUs.
    pub fn vcpu_throttle(&self) -> Vec<VcpuThrottle> {
        self.throttle.all()
    }

    /// Begins to measure how fast the guest dirties its RAM, and returns at once; [`dirty_rate`](Self::dirty_rate) has the
    /// result when it is there. A guest that is paused dirties nothing.
    ///
    /// # Errors
    /// When the guest is not here, `request` is out of range, a measurement is already running, or this machine cannot
    /// measure in the way that `request` names. [`DirtyRateError`] says which. Nothing is changed then.
    pub fn calc_dirty_rate(&self, request: &DirtyRateRequest) -> Result<(), DirtyRateError> {
        self.state().must_be_here()?;
        self.dirty_rate.start(&self.calls, request, || match self.state().migrating {
            true => Err(DirtyRateError::Migrating),
            false => Ok(()),
        })
    }

    /// What the latest measurement of the dirty rate has brought, or that it is under way.
    pub fn dirty_rate(&self) -> DirtyRate {
        self.dirty_rate.state()
    }

    /// Slows the vCPUs for the migration under way, each by its percentage. It is let go when the migration is over and when
    /// the guest is paused for the switchover.
    pub(crate) fn throttle_for_migration(&self, percent: &[u8]) {
        self.throttle.set_migration(percent);
    }

    /// What the migration under way asks for; empty for nothing.
    pub(crate) fn throttled_for_migration(&self) -> Vec<u8> {
        self.throttle.of_migration()
    }
}

/// Whether a guest that becomes this side's runs at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resume {
    /// It does.
    Run,
    /// It stays paused, as it was before.
    StayPaused,
}

/// When a person's decision holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TakeBack {
    /// Only once nothing was heard of the other side for `link-timeout`: until then it may be about to run the guest.
    WhenSilent,
    /// At once. For whoever knows for certain that the other side will not run the guest.
    Anyway,
}
