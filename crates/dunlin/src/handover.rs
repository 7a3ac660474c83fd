//! Who owns the machine: one state machine, both sides, one transition table each.
//!
//! The source pauses, sends the last pages and the device state, and offers. The destination loads and checks
//! everything, then says Ready. Until it sends Release the source may take the guest back at any failure. Once
//! Release is sent it may not: it stays paused until it hears Running or Aborted, over this connection or another,
//! or until a person decides. The destination runs the guest only after Release.
//!
//! This file is pure: states, events and actions. The drivers in `source::switchover` and `destination::session`
//! feed it events and carry out its actions, in order; the model checker in its tests feeds the same tables with
//! lost, repeated and delayed messages and with deaths. `docs/handover.md` shows the tables; a test compares.
//!
//! What must stay true: an action that lets the guest run somewhere stands only in a row after which the other side
//! can no longer let it run.

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// The guest is here; RAM is being sent.
    Running,
    /// The guest is here, paused for the switchover.
    Paused,
    /// Everything is sent; waiting for Ready.
    Offered,
    /// Release is sent, or about to be: the guest may run at the destination.
    Released,
    /// The destination runs it.
    Gone,
    /// The guest is here for good; this session is over.
    TookBack,
    /// The guest is here, paused, and both sides have run it. A person decides which to keep.
    Kept,
}

/// What happens to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The convergence decision: switch over.
    Pause,
    /// The last page and the device state are sent.
    Offer,
    /// Heard from the destination: it has everything and waits.
    Ready,
    /// Heard from the destination: it owns the guest.
    Running,
    /// Heard from the destination: it runs the guest by a later decision than this side's.
    Overruled,
    /// Heard from the destination: it keeps the guest, paused, which may have run there.
    Kept,
    /// Heard from the destination: it has given up and will never run this guest.
    Aborted,
    /// The link was lost, the migration was cancelled, or something failed here.
    Failed,
    /// A new connection for this session stands.
    Reconnected,
    /// A person decided that the guest is here.
    TakeBack,
}

/// What the source does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Stop the vCPUs.
    PauseGuest,
    /// Let the guest go on here.
    ResumeGuest,
    /// Tell the destination that everything is sent.
    SendOffer,
    /// Give the guest away.
    SendRelease,
    /// Tell the destination that its Running was heard.
    SendDone,
    /// Tell the destination that the guest stays here.
    SendAbort,
    /// Tell the destination that the guest is kept here, paused.
    SendKept,
    /// Ask the destination where it stands.
    SendQuery,
    /// Connect again.
    Reconnect,
}

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationState {
    /// Receiving and loading.
    Loading,
    /// Everything is here and checked; waiting for Release.
    Ready,
    /// Released to this side; the vCPUs are being started.
    Starting,
    /// A person decided that the guest is here; the vCPUs are being started.
    TakingOver,
    /// The guest is here.
    Running,
    /// The guest is here, paused, and may have run. A person decides what becomes of it.
    Kept,
    /// A person decided that a guest that may have run goes on here; the vCPUs are being started.
    Retaking,
    /// This side will never run the guest of this session.
    Aborted,
}

/// What happens to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// Everything is received, loaded and checked.
    Loaded,
    /// Heard from the source: the guest is given away.
    Release,
    /// The same, but it may be too old: it does not answer what this side asked last, or came too late.
    StaleRelease,
    /// The vCPUs run.
    Started,
    /// The vCPUs could not be started; not one has run.
    StartFailed,
    /// The vCPUs were not started before the Release was too old; not one has run.
    Expired,
    /// The vCPUs could not be started, not one has run, and nothing was heard of the source meanwhile.
    Unheard,
    /// Whether a vCPU has run cannot be said; from here on none will.
    StartUnclear,
    /// Heard from the source: the guest stays there.
    Abort,
    /// Heard from the source: it runs the guest by a later decision than this side's.
    Overruled,
    /// Heard from the source, over a new connection: where do you stand?
    Query,
    /// The link was lost.
    LinkLost,
    /// Something failed here, or the migration was cancelled here.
    Failed,
    /// A person decided that the guest is here.
    TakeOver,
}

/// What the destination does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Tell the source that everything is here.
    SendReady,
    /// Let the guest run here.
    StartGuest,
    /// Let no vCPU begin that has not begun yet.
    RevokeStart,
    /// Stop the vCPUs.
    PauseGuest,
    /// Tell the source that the guest is here.
    SendRunning,
    /// Tell the source that it will never run here.
    SendAborted,
    /// Tell the source that the guest is kept here, paused, and may have run.
    SendKept,
}

type Row<S, E, A> = (S, E, S, &'static [A]);

/// The source's table: state, event, next state, actions. What is not in it does not happen or is refused.
pub const SOURCE_TABLE: &[Row<SourceState, SourceEvent, SourceAction>] = {
    use SourceAction::*;
    use SourceEvent as On;
    use SourceState::*;
    &[
        (Running, On::Pause, Paused, &[PauseGuest]),
        (Running, On::Aborted, TookBack, &[]),
        (Running, On::Failed, TookBack, &[SendAbort]),
        (Paused, On::Offer, Offered, &[SendOffer]),
        (Paused, On::Aborted, TookBack, &[ResumeGuest]),
        (Paused, On::Failed, TookBack, &[ResumeGuest, SendAbort]),
        (Offered, On::Ready, Released, &[SendRelease]),
        (Offered, On::Aborted, TookBack, &[ResumeGuest]),
        (Offered, On::Failed, TookBack, &[ResumeGuest, SendAbort]),
        // A destination that runs what was not released is broken. Better no guest than two.
        (Offered, On::Running, Released, &[]),
        (Released, On::Ready, Released, &[SendRelease]),
        (Released, On::Running, Gone, &[SendDone]),
        (Released, On::Aborted, TookBack, &[ResumeGuest]),
        (Released, On::Kept, Released, &[]),
        (Released, On::Failed, Released, &[Reconnect]),
        (Released, On::Reconnected, Released, &[SendQuery]),
        (Released, On::TakeBack, TookBack, &[ResumeGuest]),
        (Gone, On::Ready, Gone, &[]),
        (Gone, On::Running, Gone, &[SendDone]),
        (Gone, On::Failed, Gone, &[]),
        (TookBack, On::Ready, TookBack, &[SendAbort]),
        // It runs what a person has taken back here: it hears of that, and gives way.
        (TookBack, On::Running, TookBack, &[SendAbort]),
        (TookBack, On::Overruled, Kept, &[PauseGuest, SendKept]),
        (TookBack, On::Kept, TookBack, &[]),
        (TookBack, On::Aborted, TookBack, &[]),
        (TookBack, On::Failed, TookBack, &[]),
        (TookBack, On::Reconnected, TookBack, &[SendAbort]),
        (Kept, On::Running, Kept, &[SendKept]),
        (Kept, On::Overruled, Kept, &[SendKept]),
        (Kept, On::Kept, Kept, &[]),
        (Kept, On::Failed, Kept, &[]),
        (Kept, On::Reconnected, Kept, &[SendKept]),
        (Kept, On::TakeBack, TookBack, &[ResumeGuest]),
    ]
};

/// The destination's table: state, event, next state, actions. What is not in it does not happen or is refused.
pub const DESTINATION_TABLE: &[Row<DestinationState, DestinationEvent, DestinationAction>] = {
    use DestinationAction::*;
    use DestinationEvent as On;
    use DestinationState::*;
    &[
        (Loading, On::Loaded, Ready, &[SendReady]),
        (Loading, On::Abort, Aborted, &[]),
        // The source asks over a new connection, so the stream that this side was loading from is lost.
        (Loading, On::Query, Aborted, &[SendAborted]),
        (Loading, On::LinkLost, Aborted, &[]),
        (Loading, On::Failed, Aborted, &[SendAborted]),
        (Ready, On::Release, Starting, &[StartGuest]),
        (Ready, On::Abort, Aborted, &[SendAborted]),
        (Ready, On::Query, Ready, &[SendReady]),
        (Ready, On::LinkLost, Ready, &[]),
        (Ready, On::Failed, Aborted, &[SendAborted]),
        // The source may have heard a person's decision since: it is asked again.
        (Ready, On::StaleRelease, Ready, &[SendReady]),
        (Ready, On::TakeOver, TakingOver, &[StartGuest]),
        (Starting, On::Started, Running, &[SendRunning]),
        (Starting, On::StartFailed, Aborted, &[SendAborted]),
        (Starting, On::Expired, Ready, &[SendReady]),
        // This may be the only copy: a source that lives asks, and a person may decide.
        (Starting, On::Unheard, Ready, &[SendReady]),
        (Starting, On::StartUnclear, Kept, &[SendKept]),
        // The source may be gone for good: what fails to start is not thrown away.
        (TakingOver, On::Started, Running, &[SendRunning]),
        (TakingOver, On::StartFailed, Ready, &[]),
        (TakingOver, On::StartUnclear, Kept, &[SendKept]),
        (TakingOver, On::Release, TakingOver, &[]),
        (TakingOver, On::StaleRelease, TakingOver, &[]),
        (TakingOver, On::Query, TakingOver, &[]),
        (TakingOver, On::Abort, TakingOver, &[RevokeStart]),
        (TakingOver, On::LinkLost, TakingOver, &[]),
        (Running, On::Release, Running, &[SendRunning]),
        (Running, On::StaleRelease, Running, &[SendRunning]),
        (Running, On::Query, Running, &[SendRunning]),
        (Running, On::Abort, Running, &[SendRunning]),
        (Running, On::Overruled, Kept, &[PauseGuest, SendKept]),
        (Running, On::LinkLost, Running, &[]),
        (Kept, On::Release, Kept, &[SendKept]),
        (Kept, On::StaleRelease, Kept, &[SendKept]),
        (Kept, On::Query, Kept, &[SendKept]),
        (Kept, On::Abort, Kept, &[SendKept]),
        (Kept, On::Overruled, Kept, &[SendKept]),
        (Kept, On::LinkLost, Kept, &[]),
        (Kept, On::TakeOver, Retaking, &[StartGuest]),
        (Retaking, On::Started, Running, &[SendRunning]),
        (Retaking, On::StartFailed, Kept, &[]),
        (Retaking, On::StartUnclear, Kept, &[]),
        (Retaking, On::Release, Retaking, &[]),
        (Retaking, On::StaleRelease, Retaking, &[]),
        (Retaking, On::Query, Retaking, &[]),
        (Retaking, On::Abort, Retaking, &[]),
        (Retaking, On::Overruled, Retaking, &[]),
        (Retaking, On::LinkLost, Retaking, &[]),
        (Aborted, On::Release, Aborted, &[SendAborted]),
        (Aborted, On::StaleRelease, Aborted, &[SendAborted]),
        (Aborted, On::Query, Aborted, &[SendAborted]),
        (Aborted, On::Abort, Aborted, &[]),
        (Aborted, On::LinkLost, Aborted, &[]),
        (Aborted, On::Failed, Aborted, &[]),
    ]
};

/// An event that has no place in a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event} has no place in state {state} of the handover")]
pub struct Illegal {
    /// The state.
    pub state: String,
    /// The event.
    pub event: String,
}

fn look_up<S, E, A>(table: &'static [Row<S, E, A>], state: S, event: E) -> Result<(S, &'static [A]), Illegal>
where
    S: Copy + PartialEq + std::fmt::Debug,
    E: Copy + PartialEq + std::fmt::Debug,
{
    table
        .iter()
        .find(|(from, on, _, _)| *from == state && *on == event)
        .map(|(_, _, next, actions)| (*next, *actions))
        .ok_or_else(|| Illegal { state: format!("{state:?}"), event: format!("{event:?}") })
}

impl SourceState {
    /// The next state and what to do, in order.
    ///
    /// # Errors
    /// [`Illegal`] when the table has no such row; the state stays as it is.
    pub fn on(self, event: SourceEvent) -> Result<(Self, &'static [SourceAction]), Illegal> {
        look_up(SOURCE_TABLE, self, event)
    }
}

impl DestinationState {
    /// The next state and what to do, in order.
    ///
    /// # Errors
    /// [`Illegal`] when the table has no such row; the state stays as it is.
    pub fn on(self, event: DestinationEvent) -> Result<(Self, &'static [DestinationAction]), Illegal> {
        look_up(DESTINATION_TABLE, self, event)
    }
}

#[cfg(test)]
#[path = "handover_model.rs"]
mod model;
