//! The switchover and the handover, as the source drives them.
//!
//! `handover::SOURCE_TABLE` decides; this file carries out. What must stay true: the state is advanced, and the
//! guest's ownership with it, before a message that the state allows is sent.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::migration::Migration;
use super::setup::{self, Control};
use super::{Event, Shared};
use crate::error::{Cause, GuestError, MachineStep, Phase, Side};
use crate::guest::{GuestEvent, Resume};
use crate::handover::{SourceAction, SourceEvent, SourceState};
use crate::link::{COUNTED_HELLO_BYTES, FrameReceiver, FrameSender, contain, lock};
use crate::machine::StateSection;
use crate::parameters::Switch;
use crate::report::{Round, Status};
use crate::wire::{
    Abort, AbortReason, Done, MAX_DEVICE_STATE_BYTES, MAX_NAME_BYTES, Message, Offer, Role, RoundDone, Section,
    data_checksum,
};

/// Bytes of device state in one message.
const PIECE_BYTES: usize = 1 << 20;
/// How long a source that has taken its guest back tries to tell a destination that may be waiting.
const TELL: Duration = Duration::from_secs(2);
/// Pause between attempts to reach the destination again: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What an event has done.
struct Transition {
    /// Of these, what is to be sent is left to [`send`].
    actions: &'static [SourceAction],
    /// Whether the guest runs again, where it is to.
    resumed: Result<(), Cause>,
}

/// Advances the handover: the new state, the guest's ownership, and what is to be done to the guest.
fn transition(shared: &Shared, event: SourceEvent) -> Result<Transition, Cause> {
    let mut handover = lock(&shared.handover);
    // After this nobody can stop it.
    if event == SourceEvent::Ready && handover.state == SourceState::Offered && shared.stop.load(Ordering::Acquire) {
        return Err(Cause::Cancelled);
    }
    let (next, actions) = handover.state.on(event)?;
    if actions.contains(&SourceAction::PauseGuest) {
        handover.stopped = Some(Instant::now());
        handover.run = if shared.guest.hand_over()? { Resume::Run } else { Resume::StayPaused };
    }
    let before = std::mem::replace(&mut handover.state, next);
    match next {
        SourceState::Released => {
            handover.released.get_or_insert_with(Instant::now);
            shared.guest.undecided();
        }
        SourceState::Gone => shared.guest.gone(handover.run),
        _ => {}
    }
    let ends_downtime =
        actions.contains(&SourceAction::ResumeGuest) || (next == SourceState::Gone && before == SourceState::Released);
    let run = handover.run;
    let resumed = if actions.contains(&SourceAction::ResumeGuest) {
        contain("source", || Ok(shared.guest.own(run)?))
    } else {
        Ok(())
    };
    if let (true, Some(stopped)) = (ends_downtime, handover.stopped) {
        let now = Instant::now();
        let since = |then: Instant| now.saturating_duration_since(then).as_secs_f64();
        // However it came to this: over one connection, over several, or by a person.
        if let Some(released) = handover.released {
            shared.note_part(|parts| &mut parts.handover_seconds, since(released));
        }
        lock(&shared.report).downtime_seconds = since(stopped);
    }
    Ok(Transition { actions, resumed })
}

/// Sends what `actions` say.
fn send(
    shared: &Shared,
    actions: &[SourceAction],
    cause: Option<&Cause>,
    mut out: impl FnMut(&Message) -> Result<(), Cause>,
) -> Result<(), Cause> {
    for action in actions {
        match action {
            SourceAction::SendOffer => {
                let offer = lock(&shared.handover).offer;
                if let Some(offer) = offer {
                    out(&Message::Offer(offer))?;
                }
            }
            SourceAction::SendRelease => out(&Message::Release)?,
            SourceAction::SendQuery => out(&Message::Query)?,
            SourceAction::SendDone => {
                let (downtime, parts) = {
                    let report = lock(&shared.report);
                    (report.downtime_seconds, report.downtime_parts.unwrap_or_default().to_nanoseconds())
                };
                let downtime = Duration::try_from_secs_f64(downtime).unwrap_or_default();
                out(&Message::Done(Done { downtime, parts, cpu: shared.cpu.total() }))?;
            }
            SourceAction::SendAbort => out(&Message::Abort(abort(shared, cause)))?,
            SourceAction::PauseGuest | SourceAction::ResumeGuest | SourceAction::Reconnect => {}
        }
    }
    Ok(())
}

fn abort(shared: &Shared, cause: Option<&Cause>) -> Abort {
    let reason = match cause {
        Some(Cause::Cancelled) => AbortReason::Cancelled,
        _ => AbortReason::Failed,
    };
    let text = cause.map_or_else(|| "the source took the guest back".to_owned(), ToString::to_string);
    Abort { reason, guest: shared.guest.place(Side::Source), text }
}

impl Migration<'_> {
    /// Stops the guest, sends the rest, and hands over.
    pub(super) fn switch_over(&mut self, round: u32) -> Result<(), Cause> {
        if self.stopped() {
            return Err(Cause::Cancelled);
        }
        let shared = self.shared;
        let waits = lock(&shared.parameters).pause_before_switchover == Switch::On;
        let first = if waits { Status::PreSwitchover } else { Status::Device };
        *lock(&shared.phase) = Phase::Switchover;
        let mut clock = Clock::start();
        transition(shared, SourceEvent::Pause)?.resumed?;
        // Let go with that.
        lock(&shared.report).set_throttle(Vec::new());
        shared.note_part(|parts| &mut parts.pause_seconds, clock.lap());
        shared.set_phase(Phase::Switchover, first);
        let continued = if waits { self.await_continue() } else { Ok(()) };
        shared.note_part(|parts| &mut parts.wait_seconds, clock.lap());
        continued?;
        shared.set_phase(Phase::Switchover, Status::Device);
        shared.guest.tell(GuestEvent::Pass { number: round });
        let predicted_downtime = lock(&shared.report).predicted_downtime_seconds.unwrap_or_default();
        let dirty_rate = lock(&shared.report).dirty_bytes_per_second;
        let (last, _) = self.common.dirty.sync()?;
        self.send_round(round)?;
        self.report_last_round(round, clock.peek(), last, dirty_rate, predicted_downtime)?;
        shared.note_part(|parts| &mut parts.ram_seconds, clock.lap());
        let sections = self.send_device_state()?;
        shared.note_part(|parts| &mut parts.device_state_seconds, clock.lap());

        *lock(&shared.phase) = Phase::Handover;
        let pages = self.pages();
        {
            let mut handover = lock(&shared.handover);
            let run = handover.run == Resume::Run;
            handover.offer = Some(Offer { last_round: round, sections, pages, run });
        }
        self.apply(SourceEvent::Offer)?;
        self.await_ready()?;
        shared.note_part(|parts| &mut parts.load_seconds, clock.lap());
        self.apply(SourceEvent::Ready)?;
        self.await_running()?;
        // The guest runs over there: that Done cannot be sent changes nothing.
        if self.apply(SourceEvent::Running).is_ok() {
            self.control.finish();
        }
        Ok(())
    }

    fn apply(&self, event: SourceEvent) -> Result<(), Cause> {
        let Transition { actions, resumed } = transition(self.shared, event)?;
        resumed?;
        send(self.shared, actions, None, |message| self.control.send(message))
    }

    fn report_last_round(
        &mut self,
        number: u32,
        duration: Duration,
        dirty_bytes: u64,
        dirty_rate: u64,
        predicted_downtime: f64,
    ) -> Result<(), Cause> {
        let (transferred_bytes, pages) = self.moved();
        let downtime_limit = lock(&self.shared.parameters).downtime_limit;
        let (bandwidth, throttle) = {
            let report = lock(&self.shared.report);
            (report.bandwidth_bytes_per_second, report.throttled())
        };
        let round = RoundDone {
            number,
            duration,
            ram_bytes: dirty_bytes,
            transferred_bytes,
            pages,
            dirty_bytes: 0,
            bandwidth,
            dirty_rate,
            predicted_downtime: Duration::try_from_secs_f64(predicted_downtime).unwrap_or_default(),
            downtime_limit,
            delta: self.shared.delta_counts(),
            throttle,
            not_converging: String::new(),
        };
        lock(&self.shared.report).push_round(Round::from(&round));
        self.control.send(&Message::RoundDone(Box::new(round)))
    }

    fn send_device_state(&self) -> Result<u32, Cause> {
        let machine = self.shared.guest.machine();
        let sections = machine.save().map_err(|source| Cause::Machine { step: MachineStep::Save, source })?;
        let total: u64 = sections.iter().map(|section| section.data.len() as u64).sum();
        if total > MAX_DEVICE_STATE_BYTES {
            return Err(Cause::DeviceStateTooLarge { limit_bytes: MAX_DEVICE_STATE_BYTES });
        }
        lock(&self.shared.report).device_state_bytes = total;
        if let Some(section) = sections.iter().find(|section| section.name.len() > MAX_NAME_BYTES) {
            let source = format!("the name of section {} is longer than {MAX_NAME_BYTES} bytes", section.name).into();
            return Err(Cause::Machine { step: MachineStep::Save, source });
        }
        let count = sections.len() as u32;
        for section in sections {
            self.send_section(&section)?;
        }
        Ok(count)
    }

    fn send_section(&self, section: &StateSection) -> Result<(), Cause> {
        let mut pieces = section.data.chunks(PIECE_BYTES);
        let checksum = data_checksum(&section.data);
        // A section without data is one empty piece.
        let mut next = Some(pieces.next().unwrap_or_default());
        while let Some(piece) = next {
            let message = Message::Section(Section {
                name: section.name.clone(),
                instance: section.instance,
                version: section.version,
                need: section.need,
                checksum,
                total_bytes: section.data.len() as u64,
                piece: piece.to_vec(),
            });
            self.common.pacer.pay(piece.len() as u64, &self.shared.stop);
            self.control.send(&message)?;
            next = pieces.next();
        }
        Ok(())
    }

    /// With the guest paused, until somebody has the migration go on.
    fn await_continue(&self) -> Result<(), Cause> {
        loop {
            match self.shared.next_event(self.incoming, &self.control)? {
                Event::Continue => return Ok(()),
                Event::Message(Message::Abort(abort), _) => return Err(setup::aborted(&abort)),
                Event::Message(message, _) => {
                    return Err(Cause::Unexpected {
                        message: message.name(),
                        expected: "nothing before the switchover",
                    });
                }
                Event::Worker(_) | Event::Lost(_) | Event::Cancel => {}
            }
        }
    }

    fn await_ready(&self) -> Result<(), Cause> {
        loop {
            match self.shared.next_message(self.incoming, &self.control)? {
                Message::Ready => return Ok(()),
                Message::MarkAck(_) => {}
                Message::Abort(abort) => return Err(setup::aborted(&abort)),
                other => return Err(Cause::Unexpected { message: other.name(), expected: "Ready" }),
            }
        }
    }

    /// After Release. A cancel comes too late; only the destination's word or a lost link ends the wait.
    fn await_running(&self) -> Result<(), Cause> {
        loop {
            let message = match self.incoming.recv() {
                Ok(Event::Message(message, _)) => message,
                Ok(Event::Cancel) if !self.shared.abandoned.load(Ordering::Acquire) => continue,
                Ok(Event::Worker(_) | Event::Continue) => continue,
                Ok(Event::Lost(cause)) => return Err(self.shared.lost(&self.control, cause)),
                Ok(Event::Cancel) | Err(_) => return Err(Cause::Cancelled),
            };
            match message {
                Message::Running(running) => {
                    lock(&self.shared.report).cpu_seconds.destination = Some(running.cpu.as_secs_f64());
                    return Ok(());
                }
                Message::MarkAck(_) => {}
                Message::Abort(abort) => return Err(setup::aborted(&abort)),
                other => return Err(Cause::Unexpected { message: other.name(), expected: "Running" }),
            }
        }
    }
}

/// Laps of the downtime.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn peek(&self) -> Duration {
        self.0.elapsed()
    }

    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        now.saturating_duration_since(std::mem::replace(&mut self.0, now)).as_secs_f64()
    }
}

/// What a failure has done to the handover so far.
pub(super) struct Failing {
    before: SourceState,
    done: Result<Transition, Cause>,
}

/// A failure: first of all the guest, if it may, runs again; then it does so at full speed.
pub(super) fn begin_to_fail(shared: &Shared, cause: &Cause) -> Failing {
    let before = lock(&shared.handover).state;
    let event = match cause {
        Cause::Peer { .. } | Cause::Refused { .. } | Cause::CancelledByPeer { .. } => SourceEvent::Aborted,
        _ => SourceEvent::Failed,
    };
    let done = contain("source", || transition(shared, event));
    // That it cannot be let go is the machine's fault, and no reason to leave the destination without an answer.
    let _ = contain("source", || {
        shared.guest.throttle_for_migration(&[]);
        Ok(())
    });
    Failing { before, done }
}

/// Then the destination is told, or asked.
pub(super) fn end_failing(
    shared: &Shared,
    control: Option<&Control>,
    cause: Cause,
    failing: Failing,
) -> Result<(), Cause> {
    let Transition { actions, resumed } = failing.done?;
    let link_lost =
        matches!(cause, Cause::Io { .. } | Cause::Closed { .. } | Cause::Silent { .. } | Cause::Wire { .. });
    let mut told = false;
    if let Some(control) = control {
        told = send(shared, actions, Some(&cause), |message| control.send(message)).is_ok() && !link_lost;
        if told {
            control.finish();
        }
    }
    if actions.contains(&SourceAction::Reconnect) {
        return ask_again(shared);
    }
    // A destination that was sent everything may be waiting for Release, and be kept from other migrations by that.
    if failing.before == SourceState::Offered && !told && actions.contains(&SourceAction::SendAbort) {
        tell(shared, &cause);
    }
    Err(match resumed {
        Ok(()) => cause,
        Err(failed) => Cause::NotResumed { why: cause.to_string(), failed: failed.to_string() },
    })
}

/// A failure before there was anything to stop.
pub(super) fn fail(shared: &Shared, control: Option<&Control>, cause: Cause) -> Result<(), Cause> {
    let failing = begin_to_fail(shared, &cause);
    end_failing(shared, control, cause, failing)
}

/// A connection for a session whose connection was lost. While it lives, dropping the handle cuts it.
struct Again<'a> {
    shared: &'a Shared,
    sender: FrameSender,
    receiver: FrameReceiver,
}

impl<'a> Again<'a> {
    fn open(shared: &'a Shared, timeout: Duration) -> Result<Self, Cause> {
        let session = lock(&shared.handover)
            .session
            .ok_or(Cause::Unexpected { message: "a reconnection", expected: "a migration with a session" })?;
        let connection = setup::connect(shared, Role::Reconnect, session, timeout, &shared.abandoned)?;
        connection.set_receive_timeout(Some(timeout))?;
        shared.control.bytes.fetch_add(COUNTED_HELLO_BYTES, Ordering::Relaxed);
        Ok(Self {
            shared,
            sender: FrameSender::new(connection.clone(), shared.control.clone()),
            receiver: FrameReceiver::new(connection, Default::default()),
        })
    }

    fn apply(&mut self, event: SourceEvent, cause: Option<&Cause>) -> Result<(), Cause> {
        let Transition { actions, resumed } = transition(self.shared, event)?;
        resumed?;
        send(self.shared, actions, cause, |message| self.sender.send(message))
    }
}

impl Drop for Again<'_> {
    fn drop(&mut self) {
        lock(&self.shared.greeting).take();
        self.sender.connection().finish(Duration::from_millis(200));
    }
}

/// Tells a destination over a new connection that the guest was taken back. It finds out by itself, only later, if
/// this fails.
fn tell(shared: &Shared, cause: &Cause) {
    let deadline = Instant::now() + TELL;
    let mut pause = RETRY.0;
    while shared.uri.can_reconnect() && !shared.abandoned.load(Ordering::Acquire) {
        let left = deadline.saturating_duration_since(Instant::now());
        let told = Again::open(shared, left).and_then(|mut again| again.apply(SourceEvent::Reconnected, Some(cause)));
        if matches!(told, Ok(()) | Err(Cause::Refused { .. })) || left <= pause {
            return;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(RETRY.1);
    }
}

/// Released, and the link is lost: asks the destination over new connections where the guest is.
fn ask_again(shared: &Shared) -> Result<(), Cause> {
    let began = Instant::now();
    let mut pause = RETRY.0;
    loop {
        let last = match ask_once(shared) {
            Ok(()) => return Ok(()),
            Err(cause) if lock(&shared.handover).state != SourceState::Released => return Err(cause),
            Err(cause) => cause.to_string(),
        };
        let timeout = lock(&shared.parameters).handover_timeout;
        let over = began.elapsed() + pause > timeout;
        if over || !shared.uri.can_reconnect() || shared.abandoned.load(Ordering::Acquire) {
            return Err(Cause::Unreachable { last, after: timeout });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(RETRY.1);
    }
}

/// One attempt. `Ok` when the guest runs at the destination.
fn ask_once(shared: &Shared) -> Result<(), Cause> {
    if !shared.uri.can_reconnect() {
        return Err(Cause::Closed { channel: format!("{}, which cannot be opened again", shared.uri) });
    }
    let timeout = lock(&shared.parameters).link_timeout;
    let mut again = Again::open(shared, timeout)?;
    again.apply(SourceEvent::Reconnected, None)?;
    loop {
        match again.receiver.next_message()? {
            Message::Ready => again.apply(SourceEvent::Ready, None)?,
            Message::Running(running) => {
                lock(&shared.report).cpu_seconds.destination = Some(running.cpu.as_secs_f64());
                let _ = again.apply(SourceEvent::Running, None);
                return Ok(());
            }
            Message::Abort(abort) => {
                again.apply(SourceEvent::Aborted, None)?;
                return Err(setup::aborted(&abort));
            }
            Message::Heartbeat => {}
            other => return Err(Cause::Unexpected { message: other.name(), expected: "Ready or Running" }),
        }
    }
}

/// Asks again, on a thread of its own, after all attempts so far were in vain.
pub(super) fn resolve(shared: &Shared) {
    let _meter = shared.cpu.meter();
    shared.end(ask_again(shared));
}

/// A person's decision: the guest is here.
pub(super) fn take_back(shared: &Shared) -> Result<(), Cause> {
    let undecided = lock(&shared.handover).state == SourceState::Released && lock(&shared.report).status.is_final();
    if !undecided {
        return Err(GuestError::NothingToDecide(shared.guest.place(Side::Source)).into());
    }
    let taken = transition(shared, SourceEvent::TakeBack)?;
    shared.guest.end_migration();
    let mut report = lock(&shared.report);
    report.total_seconds = shared.began.elapsed().as_secs_f64();
    if let Some(error) = &mut report.error {
        error.moved_to(shared.guest.place(Side::Source));
    }
    taken.resumed
}
