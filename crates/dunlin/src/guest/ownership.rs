//! Who may run the guest, and the way there: the handover's tables with everything that moves them.
//!
//! Every message of a handover, every decision of a person and every start and stop of the vCPUs changes one [`State`] under
//! one lock. The VMM's own code runs without that lock: whoever is about to call it takes the *turn*, and gives it back
//! when the call has ended or was given up. What must stay true: a row of a table that has the vCPUs started or stopped is
//! entered only by the one that holds the turn; ownership is derived from the tables' states and stored nowhere else; a guest
//! that has ended is not started, whatever a table says, and not released.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Guest, GuestEnd, GuestEvent, Ownership, Resume, StartPermit, TakeBack};
use crate::channel::Uri;
use crate::clock::{BootInstant, Contact};
use crate::error::{Cause, GuestError, GuestPlace, MachineStep, Side};
use crate::guest::permit::Used;
use crate::handover::{
    DestinationAction, DestinationEvent, DestinationState, Illegal, SourceAction, SourceEvent, SourceState,
};
use crate::link::{CpuTime, lock};
use crate::machine::Claim;
use crate::sync::{Fault, MutexGuard, now, seeded, sleep};
use crate::wire::SessionId;

/// How long an operator's start or stop may take, and how long it waits for another.
pub(super) const OPERATOR_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to start a guest again that stays, whatever was left of the switchover's time.
const RESUME_LIMIT: Duration = Duration::from_secs(10);
/// How long vCPUs that may have begun may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How long giving up what only one machine may use may take, once the guest has gone.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(2);
/// Questions of which a destination remembers when it asked them.
const MAX_ASKED: usize = 16;
/// Sessions of which a guest remembers that their destinations have to be told.
const MAX_UNTOLD: usize = 16;
/// The part of `link-timeout` within which a Release must be acted on. The source lets nobody take its guest back before the
/// whole of it is over.
const LEASE: (u32, u32) = (3, 4);

/// What a migration's two sides tell each other with a message of the handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Heard {
    /// The sender's epoch: each decision of a person is one higher than all before.
    pub(crate) epoch: u64,
    /// With Ready the question that a Release must answer; with Release the question that it answers.
    pub(crate) question: u64,
    /// With Release: how long after the question was asked it may be acted on.
    pub(crate) lease: Duration,
}

/// Which record says who owns the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Charge {
    Here,
    Awaited,
    Leaving,
    Coming,
}

/// What happens when a person has decided, or the guest has ended.
pub(crate) type OnDecision = Arc<dyn Fn() + Send + Sync>;

/// The guest's latest way out.
struct Leaving {
    id: u64,
    state: SourceState,
    epoch: u64,
    /// The highest epoch heard of.
    seen: u64,
    /// Somebody asked for an end: it is not released any more.
    cancelled: bool,
    /// A Release is being sent.
    releasing: bool,
    /// The destination has said that it runs what was not released: that it will never run it is not believed.
    mistrusted: bool,
    /// Whether it was running when it was paused for the switchover.
    run: Resume,
    /// What the destination asked last.
    question: u64,
    contact: Arc<Contact>,
    link_timeout: Duration,
    cpu: Arc<CpuTime>,
    times: Times,
    on_decision: OnDecision,
    on_end: OnDecision,
}

/// The guest's latest way in.
struct Coming {
    id: u64,
    state: DestinationState,
    epoch: u64,
    seen: u64,
    run: Resume,
    /// The source can be heard.
    connected: bool,
    /// What was asked last, and when that and what was asked before. A source that was asked more than once answers each.
    question: u64,
    asked: VecDeque<(u64, BootInstant)>,
    /// Starts that came too late.
    expired: u32,
    /// The source has let go of everything.
    settled: bool,
    /// The source has said that the guest has ended there.
    ended: bool,
    contact: Arc<Contact>,
    link_timeout: Duration,
    cpu: Arc<CpuTime>,
    on_decision: OnDecision,
}

/// What belongs to one migration and is needed to decide.
pub(crate) struct Ground {
    /// When the other side was last heard of.
    pub(crate) contact: Arc<Contact>,
    /// `link-timeout`.
    pub(crate) link_timeout: Duration,
    /// CPU time of calls is counted there.
    pub(crate) cpu: Arc<CpuTime>,
    /// Called, without a lock held, after a person has decided.
    pub(crate) on_decision: OnDecision,
    /// Called, without a lock held, once a guest that leaves has ended. It must return at once.
    pub(crate) on_end: OnDecision,
}

/// When what happened to a guest that leaves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    /// It was stopped.
    pub(crate) stopped: Option<Instant>,
    /// It was released.
    pub(crate) released: Option<Instant>,
    /// It went on, here or there.
    pub(crate) ended: Option<Instant>,
}

/// Everything about who may run the guest.
pub(super) struct State {
    charge: Charge,
    leaving: Option<Leaving>,
    coming: Option<Coming>,
    /// The vCPUs run here, as far as is known. Those of a guest that has ended do so until the machine is paused.
    pub(super) running: bool,
    /// How the guest has ended.
    pub(super) ended: Option<GuestEnd>,
    /// What they run under, or were last to run under.
    permit: Option<StartPermit>,
    /// What the VMM is being called for, and since when. Whoever called holds the turn.
    turn: Option<(MachineStep, Instant)>,
    /// A migration, either way, is being driven.
    pub(super) migrating: bool,
    ids: u64,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("ownership", &self.ownership())
            .field("leaving", &self.leaving.as_ref().map(|leaving| leaving.state))
            .field("coming", &self.coming.as_ref().map(|coming| coming.state))
            .field("running", &self.running)
            .field("ended", &self.ended)
            .field("turn", &self.turn)
            .field("migrating", &self.migrating)
            .finish_non_exhaustive()
    }
}

/// What an event has done at the source.
#[derive(Debug)]
pub(crate) struct Left<'a> {
    pub(crate) state: SourceState,
    /// What is to be sent, among others.
    pub(crate) actions: &'static [SourceAction],
    /// Whether what was to be done to the guest was done.
    pub(crate) acted: Result<(), GuestError>,
    /// What goes with the messages.
    pub(crate) say: Heard,
    /// Kept until Release has been sent: nobody takes the guest back meanwhile.
    pub(crate) releasing: Option<Releasing<'a>>,
}

/// While it lives a Release is being sent, and nobody takes the guest back.
#[derive(Debug)]
pub(crate) struct Releasing<'a> {
    guest: &'a Guest,
    id: u64,
}

impl Drop for Releasing<'_> {
    fn drop(&mut self) {
        if let Ok(leaving) = self.guest.state().leaving(self.id) {
            leaving.releasing = false;
        }
    }
}

/// What an event has done at the destination.
#[derive(Debug)]
pub(crate) struct Came {
    pub(crate) before: DestinationState,
    pub(crate) state: DestinationState,
    /// What is to be sent.
    pub(crate) actions: Vec<DestinationAction>,
    /// Why what was to be done to the guest was not done.
    pub(crate) error: Option<GuestError>,
    /// What goes with the messages.
    pub(crate) say: Heard,
}

/// How a start of the vCPUs ended.
#[derive(Debug)]
enum Start {
    Done,
    /// None has run, and none will.
    Failed(GuestError),
    /// The same: it was too late for the first.
    Expired,
    /// One may have run; from here on none will.
    Unclear(GuestError),
}

impl State {
    pub(super) fn new(ownership: Ownership) -> Self {
        let charge = if ownership == Ownership::Here { Charge::Here } else { Charge::Awaited };
        Self {
            charge,
            leaving: None,
            coming: None,
            running: false,
            ended: None,
            permit: None,
            turn: None,
            migrating: false,
            ids: 0,
        }
    }

    /// What is to be done, without the lock, now that the guest has ended while it was leaving.
    fn on_end(&self) -> Option<OnDecision> {
        self.ended?;
        self.leaving.as_ref().filter(|_| self.charge == Charge::Leaving && self.migrating).map(|l| l.on_end.clone())
    }

    fn new_id(&mut self) -> u64 {
        self.ids = self.ids.wrapping_add(1);
        self.ids
    }

    fn leaving(&mut self, id: u64) -> Result<&mut Leaving, Illegal> {
        let found = self.leaving.as_mut().filter(|leaving| leaving.id == id);
        found.ok_or_else(|| Illegal { state: "an earlier migration's".into(), event: "its message".into() })
    }

    fn coming(&mut self, id: u64) -> Result<&mut Coming, Illegal> {
        let found = self.coming.as_mut().filter(|coming| coming.id == id);
        found.ok_or_else(|| Illegal { state: "an earlier migration's".into(), event: "its message".into() })
    }

    fn leaving_state(&self) -> Option<SourceState> {
        self.leaving.as_ref().map(|leaving| leaving.state).filter(|_| self.charge == Charge::Leaving)
    }

    fn coming_state(&self) -> Option<DestinationState> {
        self.coming.as_ref().map(|coming| coming.state).filter(|_| self.charge == Charge::Coming)
    }

    pub(super) fn ownership(&self) -> Ownership {
        use DestinationState as There;
        use SourceState as From;
        match (self.charge, self.leaving_state(), self.coming_state()) {
            (Charge::Here, ..) => Ownership::Here,
            (Charge::Awaited, ..) => Ownership::Awaited,
            (_, Some(From::Running | From::TookBack), _) => Ownership::Here,
            (_, Some(From::Paused | From::Offered), _) => Ownership::HandingOver,
            (_, Some(From::Released | From::Kept), _) => Ownership::Undecided,
            (_, Some(From::Gone), _) => Ownership::Gone,
            (_, _, Some(There::Loading | There::Aborted)) => Ownership::Awaited,
            (_, _, Some(There::Running)) => Ownership::Here,
            (_, _, Some(There::Starting)) if seeded(Fault::HereTooSoon) => Ownership::Here,
            (_, _, Some(There::Ready | There::Starting | There::TakingOver | There::Kept | There::Retaking)) => {
                Ownership::Undecided
            }
            (_, None, None) => Ownership::Undecided,
        }
    }

    pub(super) fn place(&self, side: Side) -> GuestPlace {
        match (self.ownership(), side, self.running) {
            (Ownership::Here | Ownership::HandingOver, ..) if self.ended.is_some() => GuestPlace::Ended,
            (Ownership::Awaited, ..) if self.ended_at_source() => GuestPlace::Ended,
            (Ownership::Undecided, ..) => GuestPlace::Undecided,
            (Ownership::Gone, ..) => match self.leaving.as_ref().map(|leaving| leaving.run) {
                Some(Resume::Run) => GuestPlace::RunningAtDestination,
                _ => GuestPlace::PausedAtDestination,
            },
            (Ownership::Awaited, ..) => GuestPlace::AtSource,
            (_, Side::Source, true) => GuestPlace::RunningAtSource,
            (_, Side::Source, false) => GuestPlace::PausedAtSource,
            (_, Side::Destination, true) => GuestPlace::RunningAtDestination,
            (_, Side::Destination, false) => GuestPlace::PausedAtDestination,
        }
    }

    /// The source of the latest migration in has said that the guest has ended there.
    fn ended_at_source(&self) -> bool {
        self.coming_state().is_some() && self.coming.as_ref().is_some_and(|coming| coming.ended)
    }

    /// The vCPUs run here, and the guest has not ended.
    pub(super) fn runs(&self) -> bool {
        self.running && !self.ended.is_some_and(GuestEnd::stops_vcpus)
    }

    fn must_not_have_ended(&self) -> Result<(), GuestError> {
        if seeded(Fault::EndForgotten) {
            return Ok(());
        }
        self.ended.map_or(Ok(()), |end| Err(GuestError::Ended { end }))
    }

    pub(super) fn must_be_here(&self) -> Result<(), GuestError> {
        let starting = matches!(
            self.coming_state(),
            Some(DestinationState::Starting | DestinationState::TakingOver | DestinationState::Retaking)
        );
        match self.ownership() {
            Ownership::Here => Ok(()),
            Ownership::HandingOver => Err(GuestError::InHandover),
            Ownership::Undecided if starting => Err(GuestError::InHandover),
            Ownership::Undecided => Err(GuestError::Undecided),
            Ownership::Gone => Err(GuestError::Gone),
            Ownership::Awaited => Err(GuestError::NotHereYet),
        }
    }
}

impl Leaving {
    /// What a message means in the light of its epoch.
    fn meaning(&self, event: SourceEvent, heard: Heard) -> SourceEvent {
        let decided = matches!(self.state, SourceState::TookBack | SourceState::Kept);
        match event {
            SourceEvent::Running if decided && heard.epoch > self.epoch => SourceEvent::Overruled,
            SourceEvent::Aborted if self.mistrusted && !decided => SourceEvent::Kept,
            event => event,
        }
    }

    fn say(&self) -> Heard {
        let (part, whole) = LEASE;
        Heard { epoch: self.epoch, question: self.question, lease: self.link_timeout * part / whole }
    }

    /// Whether a person may decide now.
    fn may_decide(&self, rule: TakeBack) -> Result<(), GuestError> {
        if self.releasing {
            return Err(GuestError::InHandover);
        }
        silent_enough(rule, &self.contact, self.link_timeout)
    }
}

impl Coming {
    /// Asks anew: only a Release that answers this is acted on.
    fn ask(&mut self) {
        self.question = self.question.wrapping_add(1);
        if self.asked.len() >= MAX_ASKED {
            self.asked.pop_front();
        }
        self.asked.push_back((self.question, BootInstant::now()));
    }

    /// When the question was asked that a Release answers, if it was.
    fn asked(&self, heard: Heard) -> Option<BootInstant> {
        self.asked.iter().find(|(question, _)| *question == heard.question).map(|(_, asked)| *asked)
    }

    fn meaning(&self, event: DestinationEvent, heard: Heard) -> DestinationEvent {
        let answers = self.asked(heard).is_some_and(|asked| asked.elapsed() < heard.lease);
        let answers = answers || seeded(Fault::OldRelease);
        match event {
            DestinationEvent::Release if heard.epoch < self.epoch || !answers => DestinationEvent::StaleRelease,
            // On equal terms the source's word holds: one of the two must give way.
            DestinationEvent::Abort if heard.epoch >= self.epoch && self.overrulable() => DestinationEvent::Overruled,
            event => event,
        }
    }

    /// The guest runs, or has run, by this side's word.
    fn overrulable(&self) -> bool {
        use DestinationState::{Kept, Retaking, Running};
        matches!(self.state, Running | Kept | Retaking)
    }

    fn say(&self) -> Heard {
        Heard { epoch: self.epoch, question: self.question, lease: Duration::ZERO }
    }

    fn may_decide(&self, rule: TakeBack) -> Result<(), GuestError> {
        silent_enough(rule, &self.contact, self.link_timeout)
    }
}

fn silent_enough(rule: TakeBack, contact: &Contact, link_timeout: Duration) -> Result<(), GuestError> {
    let left = link_timeout.saturating_sub(contact.silence());
    match rule {
        TakeBack::Anyway => Ok(()),
        TakeBack::WhenSilent if left.is_zero() => {
            #[cfg(test)]
            crate::sync::control::may_decide();
            Ok(())
        }
        TakeBack::WhenSilent => Err(GuestError::StillHeard { left }),
    }
}

/// A session whose destination does not know that the guest was taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Untold {
    pub(crate) session: SessionId,
    /// Where it was.
    pub(crate) uri: String,
    /// Of the source, when it took the guest back.
    pub(crate) epoch: u64,
}

/// What becomes of vCPUs that do not stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Otherwise {
    /// They go on: the guest is this side's.
    GoesOn,
    /// They are kept out of the guest: it may be the other side's.
    MustNotRun,
}

/// What is about to be done to the vCPUs.
struct StartPlan {
    permit: StartPermit,
    claim: Option<Claim>,
    run: Resume,
    limit: Duration,
    cpu: Arc<CpuTime>,
}

impl Guest {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody starts or stops the vCPUs.
    fn wait_for_turn<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        step: MachineStep,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, State>, GuestError> {
        let left = deadline.saturating_duration_since(now());
        if let Some((at, since)) = state.turn {
            if left.is_zero() {
                return Err(GuestError::MachineBusy { step, at, since: now().saturating_duration_since(since) });
            }
            state = self.turn_ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state)
    }

    /// Calls the VMM's code with the turn taken and without the lock.
    fn with_turn<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        step: MachineStep,
        act: impl FnOnce(&Self) -> T,
    ) -> (MutexGuard<'a, State>, T) {
        state.turn = Some((step, now()));
        drop(state);
        let done = act(self);
        let mut state = self.state();
        state.turn = None;
        self.turn_ended.notify_all();
        (state, done)
    }

    /// Starts the vCPUs, or only takes what belongs to the guest if it is to stay paused.
    fn start_vcpus<'a>(&'a self, mut state: MutexGuard<'a, State>, plan: StartPlan) -> (MutexGuard<'a, State>, Start) {
        let StartPlan { permit, claim, run, limit, cpu } = plan;
        state.permit = Some(permit.clone());
        let ended_before = state.ended.is_some();
        let resumes = run == Resume::Run && !state.running && !ended_before;
        let (mut state, start) = self.with_turn(state, MachineStep::Resume, |guest| {
            let deadline = now() + limit;
            let left = || deadline.saturating_duration_since(now());
            let claimed = match claim {
                Some(claim) => guest.calls.call(MachineStep::Claim, left(), &cpu, move |machine| machine.claim(claim)),
                None => Ok(()),
            };
            let started = claimed.and_then(|()| {
                if !resumes {
                    return Ok(());
                }
                let given = permit.clone();
                guest.calls.call(MachineStep::Resume, left(), &cpu, move |machine| machine.resume(&given))
            });
            match started {
                // A machine that has not asked yet is asked for.
                Ok(()) if permit.enter() => Start::Done,
                Ok(()) => {
                    let used = permit.revoke();
                    if resumes {
                        let _ = guest.calls.call(MachineStep::Pause, STOP_LIMIT, &cpu, |machine| machine.pause());
                    }
                    match used {
                        Used::TooLate => Start::Expired,
                        Used::Never => Start::Failed(GuestError::StartRevoked),
                        Used::Entered => Start::Unclear(GuestError::StartRevoked),
                    }
                }
                Err(error) => guest.not_started(&permit, error, &cpu),
            }
        });
        if matches!(start, Start::Done) && resumes {
            state.running = true;
            self.tell(GuestEvent::Resumed);
            if !state.runs() {
                self.tell(GuestEvent::Stopped);
            }
        }
        if let Some(end) = state.ended.filter(|_| !ended_before) {
            // Before the start was over.
            self.tell(GuestEvent::Ended { end });
        }
        (state, start)
    }

    /// What a failed start means. From here on no vCPU enters the guest.
    fn not_started(&self, permit: &StartPermit, error: GuestError, cpu: &Arc<CpuTime>) -> Start {
        let used = permit.revoke();
        match (&error, used) {
            // The VMM is still at it: when it has done it must take it back.
            (GuestError::MachineTooSlow { step: MachineStep::Resume, .. }, _) => {
                self.calls.follow_up(MachineStep::Pause, |machine| drop(machine.pause()));
            }
            (GuestError::MachinePanicked { .. }, _) | (_, Used::Entered) => {
                let _ = self.calls.call(MachineStep::Pause, STOP_LIMIT, cpu, |machine| machine.pause());
            }
            _ => {}
        }
        match (&error, used) {
            (GuestError::MachinePanicked { step: MachineStep::Resume, .. }, _) | (_, Used::Entered) => {
                Start::Unclear(error)
            }
            (_, Used::TooLate) => Start::Expired,
            (_, Used::Never) => Start::Failed(error),
        }
    }

    /// See [`Guest::ended`].
    pub(super) fn note_end(&self, end: GuestEnd) -> Result<(), GuestError> {
        let mut state = self.state();
        match state.must_be_here() {
            // What the guest did before it was paused may be told late.
            Err(GuestError::InHandover) | Ok(()) => {}
            Err(error) => return Err(error),
        }
        self.set_end(&mut state, end);
        let on_end = state.on_end();
        drop(state);
        on_end.iter().for_each(|act| act());
        Ok(())
    }

    /// The guest has ended; the first end counts.
    fn set_end(&self, state: &mut State, end: GuestEnd) {
        if state.ended.is_some() {
            return;
        }
        let ran = state.runs();
        state.ended = Some(end);
        if matches!(state.turn, Some((MachineStep::Resume, _))) {
            // Told when the start is.
            return;
        }
        if ran && !state.runs() {
            self.tell(GuestEvent::Stopped);
        }
        self.tell(GuestEvent::Ended { end });
    }

    /// Stops the vCPUs, and looks whether the guest has ended.
    fn stop_vcpus<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        limit: Duration,
        cpu: &Arc<CpuTime>,
        otherwise: Otherwise,
    ) -> (MutexGuard<'a, State>, Result<(), GuestError>) {
        if !state.running {
            return (state, Ok(()));
        }
        let permit = state.permit.clone();
        let (mut state, stopped) = self.with_turn(state, MachineStep::Pause, |guest| {
            guest.calls.call(MachineStep::Pause, limit, cpu, |machine| {
                machine.pause()?;
                Ok(machine.ended())
            })
        });
        let stopped = stopped.map(|end| {
            if state.runs() {
                self.tell(GuestEvent::Stopped);
            }
            state.running = false;
            if let Some(end) = end {
                self.set_end(&mut state, end);
            }
        });
        let permit = permit.unwrap_or_else(StartPermit::unlimited);
        match (&stopped, otherwise) {
            (Ok(()), _) => {}
            // If it stops after all, or has stopped before it failed, it is started again.
            (Err(GuestError::MachineTooSlow { .. } | GuestError::MachinePanicked { .. }), Otherwise::GoesOn) => {
                self.calls.follow_up(MachineStep::Resume, move |machine| drop(machine.resume(&permit)));
            }
            (Err(_), Otherwise::GoesOn) => {}
            (Err(_), Otherwise::MustNotRun) => {
                if state.runs() {
                    self.tell(GuestEvent::Stopped);
                }
                state.running = false;
                // This needs nothing of the machine but that its vCPUs ask before they enter the guest.
                drop(state);
                permit.revoke();
                self.calls.follow_up(MachineStep::Pause, |machine| drop(machine.pause()));
                state = self.state();
            }
        }
        (state, stopped)
    }

    /// An operator's start, taking `claim`, or stop without one.
    pub(super) fn operate(&self, run: Resume, claim: Claim) -> Result<(), GuestError> {
        let deadline = now() + OPERATOR_LIMIT;
        let step = if run == Resume::Run { MachineStep::Resume } else { MachineStep::Pause };
        let mut state = self.state();
        let mut looked = false;
        loop {
            if !(seeded(Fault::HereTooSoon) && std::mem::replace(&mut looked, true)) {
                state.must_be_here()?;
            }
            if state.turn.is_none() {
                break;
            }
            state = self.wait_for_turn(state, step, deadline)?;
        }
        let cpu = Arc::default();
        if run == Resume::StayPaused {
            let (state, stopped) = self.stop_vcpus(state, OPERATOR_LIMIT, &cpu, Otherwise::GoesOn);
            let on_end = state.on_end();
            drop(state);
            on_end.iter().for_each(|act| act());
            return stopped;
        }
        state.must_not_have_ended()?;
        if state.running {
            return Ok(());
        }
        // The source may still have its part: it has not been heard of since the guest came.
        let unsettled = state.coming_state().is_some() && state.coming.as_ref().is_some_and(|coming| !coming.settled);
        let claim = if unsettled && claim == Claim::Whole { Claim::Arrived } else { claim };
        let permit = StartPermit::unlimited();
        let plan = StartPlan { permit, claim: Some(claim), run, limit: OPERATOR_LIMIT, cpu };
        match self.start_vcpus(state, plan).1 {
            Start::Done => Ok(()),
            Start::Failed(error) | Start::Unclear(error) => Err(error),
            Start::Expired => Err(GuestError::StartRevoked),
        }
    }

    /// An outgoing migration begins; gives its number.
    pub(crate) fn begin_outgoing(&self, ground: Ground) -> Result<u64, GuestError> {
        let mut state = self.state();
        state.must_be_here()?;
        state.must_not_have_ended()?;
        if std::mem::replace(&mut state.migrating, true) {
            return Err(GuestError::Busy);
        }
        let id = state.new_id();
        let Ground { contact, link_timeout, cpu, on_decision, on_end } = ground;
        state.leaving = Some(Leaving {
            id,
            state: SourceState::Running,
            epoch: 1,
            seen: 0,
            cancelled: false,
            releasing: false,
            mistrusted: false,
            run: Resume::StayPaused,
            question: 0,
            contact,
            link_timeout,
            cpu,
            times: Times::default(),
            on_decision,
            on_end,
        });
        state.charge = Charge::Leaving;
        drop(state);
        // Whoever asks for one from here on is refused.
        self.dirty_rate.give_up_tracker();
        Ok(id)
    }

    /// An incoming migration may come. A guest that has gone may come back.
    pub(crate) fn begin_incoming(&self) -> Result<(), GuestError> {
        let mut state = self.state();
        match state.ownership() {
            Ownership::Awaited | Ownership::Gone if state.migrating => Err(GuestError::Busy),
            Ownership::Awaited | Ownership::Gone => {
                state.charge = Charge::Awaited;
                state.migrating = true;
                Ok(())
            }
            Ownership::Undecided => Err(GuestError::Undecided),
            Ownership::Here | Ownership::HandingOver => Err(GuestError::Occupied),
        }
    }

    /// A migration comes in; gives its number.
    pub(crate) fn begin_session(&self, ground: Ground) -> Result<u64, GuestError> {
        let mut state = self.state();
        match state.ownership() {
            Ownership::Awaited => {}
            Ownership::Undecided => return Err(GuestError::Undecided),
            _ => return Err(GuestError::Occupied),
        }
        let id = state.new_id();
        let Ground { contact, link_timeout, cpu, on_decision, on_end: _ } = ground;
        state.coming = Some(Coming {
            id,
            state: DestinationState::Loading,
            epoch: 1,
            seen: 0,
            run: Resume::StayPaused,
            connected: true,
            question: 0,
            asked: VecDeque::new(),
            expired: 0,
            settled: false,
            ended: false,
            contact,
            link_timeout,
            cpu,
            on_decision,
        });
        state.charge = Charge::Coming;
        Ok(id)
    }

    /// The driver of a migration, either way, ends.
    pub(crate) fn end_migration(&self) {
        self.throttle.set_migration(&[]);
        self.state().migrating = false;
    }

    /// The source of migration `id` asks its destination once more.
    pub(crate) fn begin_asking(&self, id: u64) -> Result<(), GuestError> {
        let mut state = self.state();
        let place = state.place(Side::Source);
        if state.leaving_state() != Some(SourceState::Released) || state.leaving(id).is_err() {
            return Err(GuestError::NothingToDecide(place));
        }
        if std::mem::replace(&mut state.migrating, true) { Err(GuestError::Busy) } else { Ok(()) }
    }

    /// From here on migration `id` is not released any more.
    ///
    /// # Errors
    /// When it was.
    pub(crate) fn cancel_leaving(&self, id: u64) -> Result<(), GuestError> {
        let mut state = self.state();
        let Ok(leaving) = state.leaving(id) else { return Ok(()) };
        if leaving.state == SourceState::Released {
            return Err(GuestError::InHandover);
        }
        leaving.cancelled = true;
        Ok(())
    }

    /// Where migration `id` out stands.
    pub(crate) fn leaving_at(&self, id: u64) -> Option<SourceState> {
        self.state().leaving(id).ok().map(|leaving| leaving.state)
    }

    /// Where migration `id` in stands.
    pub(crate) fn coming_at(&self, id: u64) -> Option<DestinationState> {
        self.state().coming(id).ok().map(|coming| coming.state)
    }

    /// The destination of `session`, which was migration `id`, could not be told that the guest is here.
    pub(crate) fn note_untold(&self, id: u64, session: SessionId, uri: &Uri) {
        let epoch = self.state().leaving(id).map_or(1, |leaving| leaving.epoch);
        self.keep_untold(Untold { session, uri: uri.to_string(), epoch });
    }

    pub(crate) fn keep_untold(&self, untold: Untold) {
        let mut all = lock(&self.untold);
        if all.len() >= MAX_UNTOLD {
            all.remove(0);
        }
        all.push(untold);
    }

    /// Destinations that have yet to be told that the guest is here.
    pub(crate) fn take_untold(&self) -> Vec<Untold> {
        std::mem::take(&mut lock(&self.untold))
    }

    /// When what happened in migration `id`.
    pub(crate) fn leaving_times(&self, id: u64) -> Times {
        self.state().leaving(id).map(|leaving| leaving.times).unwrap_or_default()
    }

    /// Whether the guest was running when migration `id` paused it.
    pub(crate) fn leaving_run(&self, id: u64) -> Resume {
        self.state().leaving(id).map_or(Resume::StayPaused, |leaving| leaving.run)
    }

    /// The guest of migration `id` in is to run, once it is here, or to stay paused.
    pub(crate) fn coming_runs(&self, id: u64, run: Resume) {
        if let Ok(coming) = self.state().coming(id) {
            coming.run = run;
        }
    }

    /// The source of migration `id` in has said that the guest has ended there.
    pub(crate) fn coming_ended(&self, id: u64) {
        if let Ok(coming) = self.state().coming(id) {
            coming.ended = true;
        }
    }

    /// The source of migration `id` in can be heard again.
    pub(crate) fn reconnected(&self, id: u64) {
        if let Ok(coming) = self.state().coming(id) {
            coming.connected = true;
        }
    }

    /// The source of migration `id` in has let go of everything: all of it is this side's.
    pub(crate) fn settle_claim(&self, id: u64) {
        let mut state = self.state();
        let Ok(cpu) = state.coming(id).map(|coming| {
            coming.settled = true;
            coming.cpu.clone()
        }) else {
            return;
        };
        if state.turn.is_some() || state.coming_state() != Some(DestinationState::Running) {
            // Whoever holds the turn takes it, or gives it up, anyway.
            return;
        }
        let (state, _) = self.with_turn(state, MachineStep::Claim, |guest| {
            guest.calls.call(MachineStep::Claim, GIVE_UP_LIMIT, &cpu, |machine| machine.claim(Claim::Whole))
        });
        drop(state);
    }

    /// The source of migration `id` in cannot be heard any more: nobody listens.
    pub(crate) fn disconnected(&self, id: u64) {
        if let Ok(coming) = self.state().coming(id) {
            coming.connected = false;
        }
    }

    /// Whether the guest of a migration in waits here for its source, or for a person.
    pub(crate) fn waits_for_decision(&self) -> bool {
        let state = self.state();
        match state.coming_state() {
            Some(DestinationState::Ready) => state.coming.as_ref().is_some_and(|coming| !coming.connected),
            Some(DestinationState::Kept | DestinationState::TakingOver | DestinationState::Retaking) => true,
            _ => false,
        }
    }

    /// An event of migration `id` out: the next state, ownership with it, and what is to be done to the guest is done.
    ///
    /// # Errors
    /// When the event has no place there, a guest that was cancelled or has ended would be released, or the machine does not
    /// give up what the other side needs. Nothing has changed then.
    pub(crate) fn leave(&self, id: u64, event: SourceEvent, heard: Heard, limit: Duration) -> Result<Left<'_>, Cause> {
        self.leave_if(id, event, heard, limit, TakeBack::WhenSilent, |_| Ok(()))
    }

    fn leave_if(
        &self,
        id: u64,
        event: SourceEvent,
        heard: Heard,
        limit: Duration,
        rule: TakeBack,
        allowed: impl Fn(&Leaving) -> Result<(), GuestError>,
    ) -> Result<Left<'_>, Cause> {
        use SourceAction::{PauseGuest, ResumeGuest, SendRelease};
        let deadline = now() + limit;
        let mut state = self.state();
        let mut claim_given_up = false;
        // What a person's decision needs is taken before it counts: without it nothing has changed, and nobody is told.
        let mut claimed = false;
        let (before, next, actions, run, cpu) = loop {
            let busy = state.turn.is_some();
            if claimed && let Err(error) = Self::still_takes_back(&mut state, id, &allowed) {
                // The destination has answered meanwhile.
                let claim = match state.leaving(id).map(|leaving| leaving.state) {
                    Ok(SourceState::Released) => Claim::Released,
                    Ok(SourceState::Gone) => Claim::Nothing,
                    // It is this side's.
                    _ => return Err(error),
                };
                let (_state, _) = self.with_turn(state, MachineStep::Claim, |guest| {
                    let cpu = Arc::default();
                    guest.calls.call(MachineStep::Claim, GIVE_UP_LIMIT, &cpu, move |machine| machine.claim(claim))
                });
                return Err(error);
            }
            let ended = state.must_not_have_ended();
            let leaving = state.leaving(id)?;
            allowed(leaving)?;
            let event = match leaving.meaning(event, heard) {
                SourceEvent::Running if leaving.state == SourceState::Offered && seeded(Fault::RunningFails) => {
                    return Err(Cause::Unexpected { message: "Running", expected: "Ready" });
                }
                event => event,
            };
            let (next, actions) = leaving.state.on(event)?;
            let gives_away = leaving.state == SourceState::Offered && actions.contains(&SendRelease);
            if gives_away {
                ended?;
            }
            if gives_away && leaving.cancelled {
                return Err(Cause::Cancelled);
            }
            let acts = [PauseGuest, ResumeGuest].iter().any(|action| actions.contains(action));
            if busy && (acts || gives_away) {
                state = self.wait_for_turn(state, MachineStep::Claim, deadline)?;
                continue;
            }
            if gives_away && !claim_given_up {
                // While the guest is still this side's: what fails here leaves it here.
                let cpu = leaving.cpu.clone();
                let left = deadline.saturating_duration_since(now());
                let (locked, given) = self.with_turn(state, MachineStep::Claim, |guest| {
                    guest.calls.call(MachineStep::Claim, left, &cpu, |machine| machine.claim(Claim::Released))
                });
                given?;
                claim_given_up = true;
                state = locked;
                continue;
            }
            if event == SourceEvent::TakeBack && !claimed {
                let cpu = leaving.cpu.clone();
                let claim = if rule == TakeBack::Anyway { Claim::Anyway } else { Claim::Whole };
                let (locked, taken) = self.with_turn(state, MachineStep::Claim, |guest| {
                    guest.calls.call(MachineStep::Claim, RESUME_LIMIT, &cpu, move |machine| machine.claim(claim))
                });
                taken.map_err(Cause::Guest)?;
                claimed = true;
                state = locked;
                continue;
            }
            let before = std::mem::replace(&mut leaving.state, next);
            leaving.seen = leaving.seen.max(heard.epoch);
            leaving.mistrusted |= before == SourceState::Offered && event == SourceEvent::Running;
            match event {
                SourceEvent::TakeBack => leaving.epoch = leaving.epoch.max(leaving.seen).saturating_add(1),
                SourceEvent::Ready => {
                    leaving.question = heard.question;
                    // A decision there that came to nothing: this Release is not older than that.
                    leaving.epoch = leaving.epoch.max(heard.epoch);
                }
                _ => {}
            }
            leaving.releasing |= actions.contains(&SendRelease);
            if next == SourceState::Released {
                leaving.times.released.get_or_insert_with(now);
            }
            break (before, next, actions, leaving.run, leaving.cpu.clone());
        };
        let left = deadline.saturating_duration_since(now());
        let acted = if actions.contains(&PauseGuest) && state.leaving_state().is_some() {
            if next == SourceState::Paused {
                let run = if state.running { Resume::Run } else { Resume::StayPaused };
                let leaving = state.leaving(id)?;
                leaving.run = run;
                leaving.times.stopped = Some(now());
            }
            let otherwise = if next == SourceState::Kept { Otherwise::MustNotRun } else { Otherwise::GoesOn };
            let (locked, stopped) = self.stop_vcpus(state, left, &cpu, otherwise);
            state = locked;
            // Also one that ended in this very moment is not handed over.
            stopped.and_then(|()| if next == SourceState::Paused { state.must_not_have_ended() } else { Ok(()) })
        } else if actions.contains(&ResumeGuest) {
            let claim = (before != SourceState::Paused && !claimed).then_some(Claim::Whole);
            let plan =
                StartPlan { permit: StartPermit::unlimited(), claim, run, limit: RESUME_LIMIT, cpu: cpu.clone() };
            // A guest that never stopped, because its pause failed, keeps what it runs under.
            let (locked, start) = if state.running { (state, Start::Done) } else { self.start_vcpus(state, plan) };
            state = locked;
            match start {
                Start::Done => Ok(()),
                Start::Failed(error) | Start::Unclear(error) => Err(error),
                Start::Expired => Err(GuestError::StartRevoked),
            }
        } else if next == SourceState::Gone && before != next && state.turn.is_none() {
            let (locked, _) = self.with_turn(state, MachineStep::Claim, |guest| {
                guest.calls.call(MachineStep::Claim, GIVE_UP_LIMIT, &cpu, |machine| machine.claim(Claim::Nothing))
            });
            state = locked;
            Ok(())
        } else {
            Ok(())
        };
        let leaving = state.leaving(id)?;
        if actions.contains(&ResumeGuest) || (next == SourceState::Gone && before != next) {
            leaving.times.ended.get_or_insert_with(now);
        }
        let say = leaving.say();
        drop(state);
        if next == SourceState::Paused {
            self.dirty_rate.give_up();
        }
        let releasing = actions.contains(&SendRelease).then_some(Releasing { guest: self, id });
        Ok(Left { state: next, actions, acted, say, releasing })
    }

    /// Whether a person may still take back a guest that is on its way.
    fn still_takes_back(
        state: &mut State,
        id: u64,
        allowed: &impl Fn(&Leaving) -> Result<(), GuestError>,
    ) -> Result<(), Cause> {
        let leaving = state.leaving(id)?;
        allowed(leaving)?;
        leaving.state.on(SourceEvent::TakeBack)?;
        Ok(())
    }

    /// An event of migration `id` in: the next state, ownership with it, and what is to be done to the guest is done.
    ///
    /// # Errors
    /// When the event has no place there. Nothing has changed then.
    pub(crate) fn come(&self, id: u64, event: DestinationEvent, heard: Heard, limit: Duration) -> Result<Came, Cause> {
        self.come_if(id, event, heard, limit, |_| Ok(()))
    }

    fn come_if(
        &self,
        id: u64,
        event: DestinationEvent,
        heard: Heard,
        limit: Duration,
        allowed: impl Fn(&Coming) -> Result<(), GuestError>,
    ) -> Result<Came, Cause> {
        use DestinationAction::{PauseGuest, RevokeStart, SendReady, StartGuest};
        let deadline = now() + limit;
        let mut state = self.state();
        let (before, next, actions) = loop {
            let busy = state.turn.is_some();
            let coming = state.coming(id)?;
            allowed(coming)?;
            let event = coming.meaning(event, heard);
            let (next, actions) = coming.state.on(event)?;
            if busy && [PauseGuest, StartGuest].iter().any(|action| actions.contains(action)) {
                state = self.wait_for_turn(state, MachineStep::Resume, deadline)?;
                continue;
            }
            let before = std::mem::replace(&mut coming.state, next);
            coming.seen = coming.seen.max(heard.epoch);
            match event {
                DestinationEvent::LinkLost => coming.connected = false,
                DestinationEvent::TakeOver => coming.epoch = coming.epoch.max(coming.seen).saturating_add(1),
                _ => {}
            }
            break (before, next, actions);
        };
        let mut all: Vec<_> = actions.to_vec();
        let mut error = None;
        let mut now = next;
        let mut revoked = None;
        for action in actions {
            match action {
                StartGuest => {
                    let (locked, more, why) = self.start_coming(state, id, next, heard, limit)?;
                    state = locked;
                    now = state.coming(id)?.state;
                    all.extend(more);
                    error = why;
                }
                PauseGuest if state.coming_state().is_some() => {
                    let cpu = state.coming(id)?.cpu.clone();
                    let (locked, stopped) = self.stop_vcpus(state, STOP_LIMIT, &cpu, Otherwise::MustNotRun);
                    state = locked;
                    error = stopped.err();
                }
                RevokeStart => revoked = state.permit.clone(),
                _ => {}
            }
        }
        let coming = state.coming(id)?;
        if all.contains(&SendReady) {
            coming.ask();
        }
        let say = coming.say();
        drop(state);
        if let Some(permit) = revoked {
            permit.revoke();
        }
        Ok(Came { before, state: now, actions: all, error, say })
    }

    /// Starts a guest that was released to this side, or that a person has taken over, and enters what came of it.
    #[allow(clippy::type_complexity)]
    fn start_coming<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        id: u64,
        starting: DestinationState,
        heard: Heard,
        limit: Duration,
    ) -> Result<(MutexGuard<'a, State>, &'static [DestinationAction], Option<GuestError>), Cause> {
        let coming = state.coming(id)?;
        let permit = match starting {
            DestinationState::Starting if !seeded(Fault::OldRelease) => {
                // One that answers nothing is too old.
                StartPermit::until(coming.asked(heard).map_or_else(BootInstant::now, |asked| asked + heard.lease))
            }
            _ => StartPermit::unlimited(),
        };
        let (run, cpu) = (coming.run, coming.cpu.clone());
        let plan = StartPlan { permit, claim: Some(Claim::Arrived), run, limit, cpu };
        let (mut state, start) = self.start_vcpus(state, plan);
        let coming = state.coming(id)?;
        // A source that may be dead must not be given back the only copy.
        let silent = coming.contact.is_lost() || coming.contact.silence() >= coming.link_timeout / 2;
        let unheard = silent && coming.state == DestinationState::Starting;
        let (event, error) = match start {
            Start::Done => (DestinationEvent::Started, None),
            Start::Failed(error) if unheard => (DestinationEvent::Unheard, Some(error)),
            Start::Failed(error) => (DestinationEvent::StartFailed, Some(error)),
            Start::Unclear(error) => (DestinationEvent::StartUnclear, Some(error)),
            Start::Expired => {
                coming.expired = coming.expired.saturating_add(1);
                // A machine that never starts in time will not do so the next time.
                let again = coming.expired == 1 && coming.state == DestinationState::Starting;
                let event = match (again, unheard) {
                    (true, _) => DestinationEvent::Expired,
                    (false, true) => DestinationEvent::Unheard,
                    (false, false) => DestinationEvent::StartFailed,
                };
                (event, Some(GuestError::StartTooLate { lease: heard.lease }))
            }
        };
        if seeded(Fault::PanicForgotten) && matches!(error, Some(GuestError::MachinePanicked { .. })) {
            return Ok((state, &[], error));
        }
        if seeded(Fault::TakeOverThrowsAway) && event == DestinationEvent::StartFailed {
            coming.state = DestinationState::Aborted;
            return Ok((state, &[], None));
        }
        let (next, actions) = coming.state.on(event)?;
        coming.state = next;
        Ok((state, actions, error))
    }

    /// A person's decision: see [`Guest::take_back`].
    pub(super) fn decide_here(&self, rule: TakeBack) -> Result<(), GuestError> {
        let nothing = |state: &State| {
            let side = if state.charge == Charge::Coming { Side::Destination } else { Side::Source };
            GuestError::NothingToDecide(state.place(side))
        };
        let (leaving, coming) = {
            let state = self.state();
            let leaving = state.leaving.as_ref().filter(|_| state.charge == Charge::Leaving).map(|leaving| leaving.id);
            let coming = state.coming.as_ref().filter(|_| state.charge == Charge::Coming).map(|coming| coming.id);
            match (state.leaving_state(), state.coming_state()) {
                (Some(SourceState::Released | SourceState::Kept), _) => (leaving, None),
                (_, Some(DestinationState::Ready | DestinationState::Kept)) => (None, coming),
                _ => return Err(nothing(&state)),
            }
        };
        let told = |error: Cause| match error {
            Cause::Guest(error) => error,
            _ => nothing(&self.state()),
        };
        let done = match (leaving, coming) {
            (Some(id), _) => {
                let before = seeded(Fault::DecisionUnlocked);
                if before {
                    let after = {
                        let mut state = self.state();
                        let leaving = state.leaving(id).map_err(|_| GuestError::InHandover)?;
                        leaving.may_decide(rule)?;
                        leaving.link_timeout
                    };
                    sleep(after);
                }
                let allowed = |leaving: &Leaving| if before { Ok(()) } else { leaving.may_decide(rule) };
                let (event, heard) = (SourceEvent::TakeBack, Heard::default());
                self.leave_if(id, event, heard, OPERATOR_LIMIT, rule, allowed).map_err(told)?.acted
            }
            (_, Some(id)) => {
                let allowed = |coming: &Coming| match coming.state {
                    DestinationState::Ready if coming.connected => Err(GuestError::SourceConnected),
                    _ => coming.may_decide(rule),
                };
                let came = self
                    .come_if(id, DestinationEvent::TakeOver, Heard::default(), OPERATOR_LIMIT, allowed)
                    .map_err(told)?;
                came.error.map_or(Ok(()), Err)
            }
            (None, None) => Err(nothing(&self.state())),
        };
        // Whoever drives the migration tells the other side, and the report.
        self.decided(leaving, coming);
        done
    }

    fn decided(&self, leaving: Option<u64>, coming: Option<u64>) {
        let act = {
            let mut state = self.state();
            let of_leaving = leaving.and_then(|id| state.leaving(id).ok().map(|leaving| leaving.on_decision.clone()));
            of_leaving.or_else(|| coming.and_then(|id| state.coming(id).ok().map(|coming| coming.on_decision.clone())))
        };
        if let Some(act) = act {
            act();
        }
    }
}
