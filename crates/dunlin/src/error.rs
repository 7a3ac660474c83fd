//! What went wrong, on which side, in which phase, and where the guest is now.

use std::fmt;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::guest::GuestEnd;
use crate::machine::MachineError;
use crate::memory::{MemoryError, TrackerError};
use crate::parameters::ParameterError;
use crate::report::Status;
use crate::wire::WireError;

/// One end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// What a migration was busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Connecting, and agreeing on features and layout.
    Setup,
    /// Sending RAM while the guest runs.
    Precopy,
    /// The guest is paused; the last pages and the device state travel.
    Switchover,
    /// Deciding who owns the guest: from Offer to Running.
    Handover,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "setup",
            Self::Precopy => "precopy",
            Self::Switchover => "switchover",
            Self::Handover => "handover",
        })
    }
}

/// Where the guest is now, as far as the side that says so can know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GuestPlace {
    /// Running at the source.
    RunningAtSource,
    /// At the source, paused.
    PausedAtSource,
    /// At the source; the destination cannot know whether it runs.
    AtSource,
    /// Running at the destination.
    RunningAtDestination,
    /// At the destination, paused, as it was at the source.
    PausedAtDestination,
    /// Released by the source, with no word from the destination: it may run there. It does not run at the source.
    /// On the destination: complete there, but not released as far as is known here.
    Undecided,
    /// Nowhere: it has ended, and there is no guest to run.
    Ended,
}

impl GuestPlace {
    /// All places, for the wire's numbering.
    pub(crate) const ALL: [Self; 7] = [
        Self::RunningAtSource,
        Self::PausedAtSource,
        Self::AtSource,
        Self::RunningAtDestination,
        Self::PausedAtDestination,
        Self::Undecided,
        Self::Ended,
    ];
}

impl fmt::Display for GuestPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RunningAtSource => "running at the source",
            Self::PausedAtSource => "paused at the source",
            Self::AtSource => "at the source",
            Self::RunningAtDestination => "running at the destination",
            Self::PausedAtDestination => "paused at the destination",
            Self::Undecided => "undecided",
            Self::Ended => "ended",
        })
    }
}

/// An error of a migration.
#[derive(Debug, thiserror::Error)]
#[error("{side}, {phase}: {cause}; the guest is {guest}")]
pub struct MigrationError {
    /// Which side reports it.
    pub side: Side,
    /// What the migration was busy with.
    pub phase: Phase,
    /// Where the guest is now.
    pub guest: GuestPlace,
    /// What went wrong.
    #[source]
    pub cause: Cause,
}

/// What a peer or a VMM says, fit for a terminal: in one line, and without characters that would steer it.
pub(crate) fn one_line(text: &str) -> String {
    let fit = |c: char| match c {
        '\n' | '\r' | '\t' => ' ',
        _ if c.is_control() => char::REPLACEMENT_CHARACTER,
        _ => c,
    };
    text.chars().map(fit).collect()
}

/// A step that takes a VMM's own code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MachineStep {
    /// Making a dirty tracker.
    Track,
    /// Describing the machine to the other side.
    Profile,
    /// Checking the other side's description of the machine.
    AcceptProfile,
    /// Saying what a switchover costs.
    Cost,
    /// Pausing the guest.
    Pause,
    /// Taking over or giving up what only one machine may use, see [`Machine::claim`](crate::Machine::claim).
    Claim,
    /// Resuming the guest.
    Resume,
    /// Reading device state.
    Save,
    /// Loading device state.
    Load,
}

impl fmt::Display for MachineStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Track => "track the guest's writes",
            Self::Profile => "describe the machine",
            Self::AcceptProfile => "check the source's machine",
            Self::Cost => "say what a switchover costs",
            Self::Pause => "pause the guest",
            Self::Claim => "take over what only one machine may use",
            Self::Resume => "resume the guest",
            Self::Save => "save the device state",
            Self::Load => "load the device state",
        })
    }
}

/// What went wrong in a migration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// A call on a channel or file failed.
    #[error("could not {doing} {target}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        target: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The address cannot be used.
    #[error("{0}")]
    Uri(#[from] crate::channel::UriError),
    /// The peer closed a channel in the middle of things.
    #[error("the peer closed {channel}")]
    Closed {
        /// Which channel.
        channel: String,
    },
    /// The command behind a connection has ended, or what came from it is wrong.
    #[error("the command of {channel} {end}; {why}")]
    Command {
        /// The connection.
        channel: String,
        /// How it has ended, if it has, and what it said.
        end: String,
        /// What is wrong with the connection.
        why: String,
    },
    /// What listens at the address has taken the connection and said nothing.
    #[error(
        "{channel}: no answer in time: what listens there took the connection and said nothing for {after:?}; it may be \
         something other than a Dunlin destination"
    )]
    Mute {
        /// The connection.
        channel: String,
        /// How long.
        after: Duration,
    },
    /// What listens at the address has closed the connection and said nothing.
    #[error(
        "the peer closed {channel} without an answer; what listens there may be something other than a Dunlin destination"
    )]
    Unanswered {
        /// The connection.
        channel: String,
    },
    /// Nothing was heard from the peer for too long.
    #[error("nothing was heard from the peer for {after:?} while waiting for {waiting_for}")]
    Silent {
        /// What was expected.
        waiting_for: &'static str,
        /// How long.
        after: Duration,
    },
    /// A connection of the migration is dead, while others may be alive.
    #[error("{channel} is dead: {missed} for {after:?}")]
    Dead {
        /// Which connection.
        channel: String,
        /// What did not come.
        missed: &'static str,
        /// How long.
        after: Duration,
    },
    /// Bytes that are not what the wire format says.
    #[error("{channel}: {source}")]
    Wire {
        /// Which channel.
        channel: String,
        /// What was wrong.
        source: WireError,
    },
    /// The peer sent a message that does not belong here.
    #[error("the peer sent {message} while {expected} was expected")]
    Unexpected {
        /// What came.
        message: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// The peer refused the connection or the migration.
    #[error("the {by} refused: {reason}")]
    Refused {
        /// Who refused.
        by: Side,
        /// Why, in its words.
        reason: String,
    },
    /// This side refuses what the peer asks.
    #[error("refused: {reason}")]
    Incompatible {
        /// Why.
        reason: String,
    },
    /// The peer failed and said why.
    #[error("the {by} failed: {reason}")]
    Peer {
        /// Who failed.
        by: Side,
        /// Why, in its words.
        reason: String,
    },
    /// Cancelled on this side.
    #[error("cancelled")]
    Cancelled,
    /// Cancelled on the other side.
    #[error("cancelled at the {by}")]
    CancelledByPeer {
        /// Who cancelled.
        by: Side,
    },
    /// The guest has ended, at the source: by itself, or with its process.
    #[error("the guest ended ({end}) while it was being migrated; there is no guest to run")]
    GuestEnded {
        /// How.
        end: GuestEnd,
    },
    /// The VMM's own code failed.
    #[error("could not {step}: {source}")]
    Machine {
        /// At what.
        step: MachineStep,
        /// Its error.
        source: MachineError,
    },
    /// Device state beyond what is allowed.
    #[error("the device state is larger than {limit_bytes} bytes")]
    DeviceStateTooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// Guest memory could not be accessed.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// Dirty tracking failed.
    #[error("{0}")]
    Tracker(#[from] TrackerError),
    /// A parameter is out of range or in conflict.
    #[error("{0}")]
    Parameter(#[from] ParameterError),
    /// The guest's ownership forbids it, or its machine does.
    #[error("{0}")]
    Guest(GuestError),
    /// An event that has no place in the handover as it stands.
    #[error("{0}")]
    Handover(#[from] crate::handover::Illegal),
    /// Released, and nothing heard since.
    #[error(
        "the guest was released to the destination, which could not be reached again within {after:?} to say whether \
         it runs there ({last}); ask there, then either leave this side stopped (quit) or take the guest back \
         (cont --take-back)"
    )]
    Unreachable {
        /// What the latest attempt ended with.
        last: String,
        /// How long reconnection was tried.
        after: Duration,
    },
    /// While the destination was being asked, a person decided that the guest is here.
    #[error("the guest was taken back here by decision while the destination was being asked for it")]
    TakenBack,
    /// The switchover took longer than its limit.
    #[error("the switchover took longer than {after:?} (switchover-timeout) while it waited for {waiting_for}")]
    SwitchoverTimeout {
        /// What had not come by then.
        waiting_for: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The destination has the guest, paused, and cannot say whether it ran there.
    #[error(
        "the destination has the guest, paused, and cannot tell whether it has run there; find out, then either quit \
         here and run the guest there, or run it here (cont --take-back on the side that is to run it)"
    )]
    Unclear,
    /// The guest's start went wrong in a way that does not tell whether a vCPU has run.
    #[error(
        "{why}; this side cannot tell whether the guest has run here, and keeps it paused; decide where the guest is \
         to run, and use cont --take-back on that side only"
    )]
    MayHaveRun {
        /// What went wrong.
        why: String,
    },
    /// Both sides have run the guest, by decisions of persons that did not know of each other.
    #[error(
        "conflict: both sides have run the guest, by a person's decision; {here}; both copies are kept: compare them, \
         quit the one that is not wanted, and continue the other (cont --take-back)"
    )]
    Conflict {
        /// What this side does now.
        here: &'static str,
    },
    /// Everything has arrived, and the source was lost before it released the guest.
    #[error(
        "the whole guest has arrived, but the source was lost before it released the guest ({last}); this side waits \
         for the source to connect again; if it is gone for good, take the guest over here (cont --take-back)"
    )]
    Orphaned {
        /// How it was lost.
        last: String,
    },
    /// The address has one connection, and that has come to nothing.
    #[error("no migration can come in on {address} any more: {last}")]
    OnlyConnectionLost {
        /// The address.
        address: String,
        /// From where the connection came, and why it came to nothing.
        last: String,
    },
    /// The migration ended, and then the guest, which is here, could not be started again.
    #[error("{why}; then the guest could not be started again here: {failed}")]
    NotResumed {
        /// Why it ended.
        why: String,
        /// Why the guest does not run.
        failed: String,
    },
    /// A thread of the engine could not be started, or ended without an answer.
    #[error("a thread of the engine ({thread}) {what}")]
    Thread {
        /// Which.
        thread: &'static str,
        /// What happened to it.
        what: String,
    },
}

impl From<GuestError> for Cause {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Machine { step, source } => Self::Machine { step, source },
            GuestError::Ended { end } => Self::GuestEnded { end },
            error => Self::Guest(error),
        }
    }
}

impl Cause {
    /// Whether it says no more than that a connection is lost or of no use.
    pub(crate) fn is_of_link(&self) -> bool {
        matches!(
            self,
            Self::Io { .. }
                | Self::Closed { .. }
                | Self::Silent { .. }
                | Self::Wire { .. }
                | Self::Dead { .. }
                | Self::Mute { .. }
                | Self::Unanswered { .. }
                | Self::Command { .. }
                | Self::Uri(_)
        )
    }
}

/// Why a guest cannot be started, stopped or migrated here now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// It is on its way in.
    #[error("the guest is not here yet: this side waits for an incoming migration")]
    NotHereYet,
    /// It has gone.
    #[error("the guest is not here any more: it was migrated away and belongs to the destination")]
    Gone,
    /// It has ended.
    #[error("the guest has ended ({end}) and cannot be started or migrated any more: run it anew")]
    Ended {
        /// How.
        end: GuestEnd,
    },
    /// It is being handed over at this moment.
    #[error("the guest is being handed over; try again when the migration has ended")]
    InHandover,
    /// It was released and nobody knows whether it runs at the other side.
    #[error(
        "the guest was released to the other side, which may be running it; make sure that the other side does not run \
         it, then take it back here (cont --take-back)"
    )]
    Undecided,
    /// A decision was given though nothing is undecided.
    #[error("nothing is undecided here: the guest is {0}")]
    NothingToDecide(GuestPlace),
    /// A migration cannot be continued, because it is not waiting in the status that was named.
    #[error("the migration is not waiting in {expected}: its status is {actual}")]
    NotWaiting {
        /// The status that was named.
        expected: Status,
        /// The migration's status.
        actual: Status,
    },
    /// A migration is running already.
    #[error("a migration of this guest is running already")]
    Busy,
    /// The guest is here, so none can come in.
    #[error("a guest is here already: it cannot be replaced by an incoming one")]
    Occupied,
    /// The VMM's own code failed.
    #[error("could not {step}: {source}")]
    Machine {
        /// At what.
        step: MachineStep,
        /// Its error.
        source: MachineError,
    },
    /// The VMM's own code panicked.
    #[error("could not {step}: the machine {what}")]
    MachinePanicked {
        /// At what.
        step: MachineStep,
        /// Its panic.
        what: String,
    },
    /// The VMM's own code did not return in time. What it returns later is dropped.
    #[error("could not {step}: the machine has not answered within {limit:?}")]
    MachineTooSlow {
        /// At what.
        step: MachineStep,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The VMM's own code is still at an earlier call.
    #[error("could not {step}: the machine has been asked to {at} for {since:?} and has not answered yet")]
    MachineBusy {
        /// What it was to do.
        step: MachineStep,
        /// What it is at.
        at: MachineStep,
        /// For how long.
        since: Duration,
    },
    /// A start was called off before the first vCPU ran.
    #[error("the start was called off: the other side has said that the guest is there")]
    StartRevoked,
    /// A start came too late. The source may have taken the guest back since, by a person's decision.
    #[error(
        "the guest did not start within {lease:?} after this side asked the source to release it; a later start is \
         not safe, because the source may have taken the guest back"
    )]
    StartTooLate {
        /// The limit.
        lease: Duration,
    },
    /// A decision was given while the other side may be about to run the guest.
    #[error(
        "the other side was heard a moment ago and may be about to run the guest; wait another {left:.1?}, or use \
         --force if you know for certain that the other side will not run it"
    )]
    StillHeard {
        /// Until then.
        left: Duration,
    },
    /// A decision was given while the source can be heard.
    #[error("the source is connected and has not released the guest: cancel the migration there, or wait")]
    SourceConnected,
    /// The machine has no way to slow its vCPUs.
    #[error("the vCPUs of this machine cannot be throttled")]
    CannotThrottle,
    /// There is no vCPU of that number.
    #[error("there is no vCPU {vcpu}: this machine has {count}, counted from 0")]
    NoSuchVcpu {
        /// Asked for.
        vcpu: usize,
        /// How many there are.
        count: usize,
    },
    /// A throttle out of range.
    #[error("a vCPU cannot be throttled by {percent} %: it must be 0 to 99, the part of its time that it does not run")]
    ThrottlePercent {
        /// Asked for.
        percent: u8,
    },
}
