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
    /// The guest is here.
    Running,
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
    /// The vCPUs run.
    Started,
    /// The vCPUs could not be started; not one has run.
    StartFailed,
    /// Heard from the source: the guest stays there.
    Abort,
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
    /// Tell the source that the guest is here.
    SendRunning,
    /// Tell the source that it will never run here.
    SendAborted,
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
        (Released, On::Failed, Released, &[Reconnect]),
        (Released, On::Reconnected, Released, &[SendQuery]),
        (Released, On::TakeBack, TookBack, &[ResumeGuest]),
        (Gone, On::Ready, Gone, &[]),
        (Gone, On::Running, Gone, &[SendDone]),
        (Gone, On::Failed, Gone, &[]),
        (TookBack, On::Ready, TookBack, &[SendAbort]),
        (TookBack, On::Aborted, TookBack, &[]),
        (TookBack, On::Failed, TookBack, &[]),
        (TookBack, On::Reconnected, TookBack, &[SendAbort]),
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
        (Ready, On::Abort, Aborted, &[]),
        (Ready, On::Query, Ready, &[SendReady]),
        (Ready, On::LinkLost, Ready, &[]),
        (Ready, On::Failed, Aborted, &[SendAborted]),
        (Ready, On::TakeOver, Starting, &[StartGuest]),
        (Starting, On::Started, Running, &[SendRunning]),
        (Starting, On::StartFailed, Aborted, &[SendAborted]),
        (Starting, On::Release, Starting, &[]),
        (Starting, On::Query, Starting, &[]),
        (Starting, On::LinkLost, Starting, &[]),
        (Running, On::Release, Running, &[SendRunning]),
        (Running, On::Query, Running, &[SendRunning]),
        (Running, On::LinkLost, Running, &[]),
        (Aborted, On::Release, Aborted, &[SendAborted]),
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
