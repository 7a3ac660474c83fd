//! A machine and the right to run it.
//!
//! [`Guest`] is the gate through which everybody starts and stops the machine: the VMM's own commands and the
//! migration. What must stay true: `Machine::resume` is called only here, and only while this side owns the guest.

use std::fmt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::dirty_rate::{DirtyRate, DirtyRateError, DirtyRateRequest, DirtyRateService};
use crate::error::{GuestError, GuestPlace, MachineStep, Side};
use crate::link::contain;
use crate::machine::Machine;
use crate::report::Status;
use crate::throttle::{Throttle, VcpuThrottle};

/// Who may run the guest, seen from this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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

/// Something that happened to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEvent {
    /// Its vCPUs were stopped here.
    Stopped,
    /// Its vCPUs were started here.
    Resumed,
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

#[derive(Debug)]
struct State {
    ownership: Ownership,
    /// It runs here.
    running: bool,
    /// It has gone, and runs there.
    runs_there: bool,
    migrating: bool,
}

/// A machine and the right to run it. All methods may be called from any thread.
pub struct Guest {
    machine: Arc<dyn Machine>,
    state: Mutex<State>,
    watchers: Mutex<Vec<Sender<GuestEvent>>>,
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
            machine,
            state: Mutex::new(State { ownership, running: false, runs_there: false, migrating: false }),
            watchers: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// The machine itself.
    pub fn machine(&self) -> &Arc<dyn Machine> {
        &self.machine
    }

    /// Who may run it.
    pub fn ownership(&self) -> Ownership {
        self.state().ownership
    }

    /// Whether it runs here.
    pub fn is_running(&self) -> bool {
        self.state().running
    }

    /// Where the guest is, as far as `side` of a migration can know.
    pub fn place(&self, side: Side) -> GuestPlace {
        let state = self.state();
        match (state.ownership, side, state.running) {
            (Ownership::Undecided, ..) => GuestPlace::Undecided,
            (Ownership::Gone, ..) if state.runs_there => GuestPlace::RunningAtDestination,
            (Ownership::Gone, ..) => GuestPlace::PausedAtDestination,
            (Ownership::Awaited, ..) => GuestPlace::AtSource,
            (_, Side::Source, true) => GuestPlace::RunningAtSource,
            (_, Side::Source, false) => GuestPlace::PausedAtSource,
            (_, Side::Destination, true) => GuestPlace::RunningAtDestination,
            (_, Side::Destination, false) => GuestPlace::PausedAtDestination,
        }
    }

    /// Starts or restarts the guest.
    ///
    /// # Errors
    /// When it is not this side's to run, or the machine fails to.
    pub fn cont(&self) -> Result<(), GuestError> {
        let mut state = self.state();
        Self::must_be_here(&state)?;
        self.resume(&mut state)
    }

    /// Pauses the guest. A migration under way goes on, and it arrives paused.
    ///
    /// # Errors
    /// When it is not here, or the machine fails to pause.
    pub fn stop(&self) -> Result<(), GuestError> {
        let mut state = self.state();
        Self::must_be_here(&state)?;
        self.pause(&mut state)
    }

    /// Slows `vcpu`, or every vCPU without one: it does not run for `percent` (0 to 99) of its time. To be done at any time,
    /// whether a guest is here or not, runs or is being migrated; it takes effect at once and holds until it is changed or
    /// [cancelled](Self::cancel_vcpu_throttle). A migration that asks for more (`auto-converge`) gets it. What was asked
    /// for belongs to this side and does not travel: a guest that has gone runs at full speed over there.
    ///
    /// # Errors
    /// When there is no such vCPU, the percentage is out of range, or this machine cannot throttle its vCPUs. Nothing is
    /// changed then.
    pub fn set_vcpu_throttle(&self, vcpu: Option<usize>, percent: u8) -> Result<(), GuestError> {
        self.throttle.set_operator(vcpu, percent)
    }

    /// Lets `vcpu`, or every vCPU without one, run again as fast as it can, but for what a migration asks for.
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
    /// When the guest is not here, something is out of range, one is being measured already, or its way of measuring is not
    /// to be had: [`DirtyRateError`] says why. Nothing is changed then.
    pub fn calc_dirty_rate(&self, request: &DirtyRateRequest) -> Result<(), DirtyRateError> {
        Self::must_be_here(&self.state())?;
        self.dirty_rate.start(request, || match self.state().migrating {
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

    fn must_be_here(state: &State) -> Result<(), GuestError> {
        match state.ownership {
            Ownership::Here => Ok(()),
            Ownership::HandingOver => Err(GuestError::InHandover),
            Ownership::Undecided => Err(GuestError::Undecided),
            Ownership::Gone => Err(GuestError::Gone),
            Ownership::Awaited => Err(GuestError::NotHereYet),
        }
    }

    fn resume(&self, state: &mut State) -> Result<(), GuestError> {
        if !state.running {
            self.machine.resume().map_err(|source| GuestError::Machine { step: MachineStep::Resume, source })?;
            state.running = true;
            self.tell(GuestEvent::Resumed);
        }
        Ok(())
    }

    fn pause(&self, state: &mut State) -> Result<(), GuestError> {
        if state.running {
            self.machine.pause().map_err(|source| GuestError::Machine { step: MachineStep::Pause, source })?;
            state.running = false;
            self.tell(GuestEvent::Stopped);
        }
        Ok(())
    }

    /// An outgoing migration begins.
    pub(crate) fn begin_outgoing(&self) -> Result<(), GuestError> {
        let mut state = self.state();
        Self::must_be_here(&state)?;
        if std::mem::replace(&mut state.migrating, true) {
            return Err(GuestError::Busy);
        }
        drop(state);
        // Whoever asks for one from here on is refused.
        self.dirty_rate.give_up_tracker();
        Ok(())
    }

    /// An incoming migration may come. A guest that has gone may come back.
    pub(crate) fn begin_incoming(&self) -> Result<(), GuestError> {
        let mut state = self.state();
        match state.ownership {
            Ownership::Awaited | Ownership::Gone if state.migrating => Err(GuestError::Busy),
            Ownership::Awaited | Ownership::Gone => {
                state.ownership = Ownership::Awaited;
                state.migrating = true;
                Ok(())
            }
            _ => Err(GuestError::Occupied),
        }
    }

    /// The migration, either way, is over.
    pub(crate) fn end_migration(&self) {
        self.throttle.set_migration(&[]);
        self.state().migrating = false;
    }

    /// Pauses for the switchover; tells whether the guest was running. The caller gives it back with
    /// [`own`](Self::own), or away with [`undecided`](Self::undecided).
    pub(crate) fn hand_over(&self) -> Result<bool, GuestError> {
        let mut state = self.state();
        Self::must_be_here(&state)?;
        let was_running = state.running;
        self.pause(&mut state)?;
        state.ownership = Ownership::HandingOver;
        self.dirty_rate.give_up();
        // Wherever it goes on, it does so at full speed. A machine that fails here has stopped all the same.
        let _ = contain("source", || {
            self.throttle.set_migration(&[]);
            Ok(())
        });
        Ok(was_running)
    }

    /// From here on the other side may run it: Release is about to be sent, or everything has arrived here and
    /// Ready is about to be.
    pub(crate) fn undecided(&self) {
        self.state().ownership = Ownership::Undecided;
    }

    /// The guest is this side's again, or has become so; it goes on if `run` says so. It is this side's even if the
    /// machine then fails to run.
    pub(crate) fn own(&self, run: Resume) -> Result<(), GuestError> {
        let mut state = self.state();
        state.ownership = Ownership::Here;
        match run {
            Resume::StayPaused => Ok(()),
            Resume::Run => self.resume(&mut state),
        }
    }

    /// It is the other side's for good, where it runs if `run` says so.
    pub(crate) fn gone(&self, run: Resume) {
        let mut state = self.state();
        state.ownership = Ownership::Gone;
        state.runs_there = run == Resume::Run;
    }

    /// It will not come in by this session; another may.
    pub(crate) fn await_again(&self) {
        self.state().ownership = Ownership::Awaited;
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
