//! The switchover and the handover, as the source drives them.
//!
//! `handover::SOURCE_TABLE` decides; this file carries out. What must stay true: the state is advanced, and the
//! guest's ownership with it, before a message that the state allows is sent.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::migration::Migration;
use super::setup::{self, Control};
use super::{Event, Shared};
use crate::error::{Cause, MachineStep, Phase, Side};
use crate::guest::{GuestEvent, Heard, Left, Resume};
use crate::handover::{SourceAction, SourceEvent, SourceState};
use crate::link::{COUNTED_HELLO_BYTES, FrameReceiver, FrameSender, contain, lock, spawn};
use crate::machine::StateSection;
use crate::parameters::Switch;
use crate::report::{Round, Status};
use crate::to_go::ToGo;
use crate::wire::{
    Abort, AbortReason, Done, MAX_DEVICE_STATE_BYTES, MAX_NAME_BYTES, Message, Offer, Release, Role, RoundDone,
    Section, SessionId, Stopped, data_checksum,
};

/// Bytes of device state in one message.
pub(super) const PIECE_BYTES: usize = 64 << 10;
/// How long a source that has taken its guest back tries to tell a destination that may be waiting.
const TELL: Duration = Duration::from_secs(2);
/// How long a destination that is alive may take to say where the guest is, besides the time to start it.
const ANSWER: Duration = Duration::from_secs(2);
/// How long an operator's start or stop of the guest is waited for.
const TURN: Duration = Duration::from_secs(30);
/// Pause between attempts to reach the destination again: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How a conflict was settled that this side lost.
const RUNS_THERE: &str = "the destination decided later and runs it; it is paused here";

/// Sends a message to the destination.
type Out<'a> = &'a mut dyn FnMut(&Message) -> Result<(), Cause>;

/// Advances the handover by `event`, heard with `heard`: ownership changes and what is to be done to the guest is done, then
/// what is to be sent goes `out`. Tells whether the guest does what it is to do here.
fn advance(
    shared: &Shared,
    event: SourceEvent,
    heard: Heard,
    cause: Option<&Cause>,
    out: Out<'_>,
) -> Result<SourceState, Cause> {
    let left = transition(shared, event, heard)?;
    send(shared, &left, cause, out)?;
    let Left { state, acted, releasing, .. } = left;
    drop(releasing);
    Ok(acted.map(|()| state)?)
}

/// The new state, the guest's ownership, and what is to be done to the guest.
fn transition(shared: &Shared, event: SourceEvent, heard: Heard) -> Result<Left<'_>, Cause> {
    // What gives the guest away has the switchover's time; what keeps it here is never too late.
    let limit = match event {
        SourceEvent::Pause | SourceEvent::Ready => shared.time_left(),
        _ => TURN,
    };
    let left = shared.guest.leave(shared.id, event, heard, limit)?;
    note_downtime(shared);
    if left.state == SourceState::Kept || event == SourceEvent::Kept && left.state == SourceState::TookBack {
        note_conflict(shared, left.state);
    }
    Ok(left)
}

/// Once the guest goes on, here or there: how long it stood still.
pub(super) fn note_downtime(shared: &Shared) {
    let times = shared.guest.leaving_times(shared.id);
    let (Some(stopped), Some(ended)) = (times.stopped, times.ended) else { return };
    let since = |then: Instant| ended.saturating_duration_since(then).as_secs_f64();
    // However it came to this: over one connection, over several, or by a person.
    if let Some(released) = times.released {
        shared.note_part(|parts| &mut parts.handover_seconds, since(released));
    }
    lock(&shared.report).downtime_seconds = since(stopped);
}

fn note_conflict(shared: &Shared, state: SourceState) {
    let here = match state {
        SourceState::Kept => RUNS_THERE,
        _ => "this side decided later; it is paused at the destination",
    };
    let error = shared.error(Phase::Handover, Cause::Conflict { here });
    lock(&shared.report).error = Some((&error).into());
}

/// Sends what is to be sent.
fn send(shared: &Shared, left: &Left<'_>, cause: Option<&Cause>, out: Out<'_>) -> Result<(), Cause> {
    for action in left.actions {
        match action {
            SourceAction::SendOffer => {
                let offer = *lock(&shared.offer);
                if let Some(offer) = offer {
                    out(&Message::Offer(offer))?;
                }
            }
            SourceAction::SendRelease => {
                let Heard { epoch, question, lease } = left.say;
                out(&Message::Release(Release { epoch, question, lease }))?;
            }
            SourceAction::SendQuery => out(&Message::Query { epoch: left.say.epoch })?,
            SourceAction::SendDone => {
                let (downtime, parts) = {
                    let report = lock(&shared.report);
                    (report.downtime_seconds, report.downtime_parts.unwrap_or_default().to_nanoseconds())
                };
                let downtime = Duration::try_from_secs_f64(downtime).unwrap_or_default();
                out(&Message::Done(Done { downtime, parts, cpu: shared.cpu.total() }))?;
            }
            SourceAction::SendAbort => out(&Message::Abort(abort(shared, left.say.epoch, cause)))?,
            SourceAction::SendKept => out(&Message::Abort(Abort {
                reason: AbortReason::Kept,
                guest: shared.guest.place(Side::Source),
                epoch: left.say.epoch,
                text: "the source keeps the guest, paused, which has run there too".to_owned(),
            }))?,
            SourceAction::PauseGuest | SourceAction::ResumeGuest | SourceAction::Reconnect => {}
        }
    }
    Ok(())
}

fn abort(shared: &Shared, epoch: u64, cause: Option<&Cause>) -> Abort {
    let reason = match cause {
        Some(Cause::Cancelled | Cause::CancelledByPeer { .. }) => AbortReason::Cancelled,
        Some(Cause::GuestEnded { end }) => AbortReason::Ended(*end),
        _ => AbortReason::Failed,
    };
    let text = cause.map_or_else(|| "the source took the guest back".to_owned(), ToString::to_string);
    Abort { reason, guest: shared.guest.place(Side::Source), epoch, text }
}

/// What the destination says in the handover, as an event of the table; `None` for what belongs to an earlier phase.
fn event_of(shared: &Shared, message: &Message) -> Result<Option<(SourceEvent, Heard)>, Cause> {
    let of = |epoch| Heard { epoch, ..Heard::default() };
    Ok(Some(match message {
        Message::Ready(ready) => {
            (SourceEvent::Ready, Heard { epoch: ready.epoch, question: ready.question, ..Heard::default() })
        }
        Message::Running(running) => {
            lock(&shared.report).cpu_seconds.destination = Some(running.cpu.as_secs_f64());
            (SourceEvent::Running, of(running.epoch))
        }
        Message::Abort(abort) if abort.reason == AbortReason::Kept => (SourceEvent::Kept, of(abort.epoch)),
        Message::Abort(abort) => (SourceEvent::Aborted, of(abort.epoch)),
        Message::MarkAck(_) | Message::Heartbeat(_) => return Ok(None),
        other => return Err(Cause::Unexpected { message: other.name(), expected: "a word on where the guest is" }),
    }))
}

/// Acts on what the destination says until it is known where the guest is.
fn settle(
    shared: &Shared,
    cause: Option<&Cause>,
    mut next: impl FnMut() -> Result<Message, Cause>,
    mut out: impl FnMut(&Message) -> Result<(), Cause>,
) -> Result<(), Cause> {
    loop {
        let message = next()?;
        let Some((event, heard)) = event_of(shared, &message)? else { continue };
        let said = advance(shared, event, heard, cause, &mut out);
        let state = shared.guest.leaving_at(shared.id);
        match (state, &message) {
            // The guest runs over there: that Done cannot be sent changes nothing.
            (Some(SourceState::Gone), _) => return Ok(()),
            (_, Message::Abort(abort)) if abort.reason == AbortReason::Kept => {
                return Err(if state == Some(SourceState::Released) { Cause::Unclear } else { Cause::TakenBack });
            }
            (Some(SourceState::TookBack), Message::Abort(abort)) => {
                let why = setup::aborted(abort);
                return Err(match said {
                    Ok(_) => why,
                    Err(failed) => Cause::NotResumed { why: why.to_string(), failed: failed.to_string() },
                });
            }
            // A person has decided meanwhile.
            (Some(SourceState::TookBack), _) => return Err(Cause::TakenBack),
            (Some(SourceState::Kept), _) => return Err(Cause::Conflict { here: RUNS_THERE }),
            _ => drop(said?),
        }
    }
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
        shared.begin_switchover();
        transition(shared, SourceEvent::Pause, Heard::default())?.acted?;
        self.control.guest_stopped(shared);
        lock(&shared.report).stopped_after(shared.transferred_bytes());
        // Wherever it goes on, it does so at full speed. A machine that fails here has stopped all the same.
        let _ = contain("source", || {
            shared.guest.throttle_for_migration(&[]);
            Ok(())
        });
        // Let go with that.
        lock(&shared.report).set_throttle(Vec::new());
        shared.note_part(|parts| &mut parts.pause_seconds, clock.lap());
        shared.set_phase(Phase::Switchover, first);
        if waits {
            shared.suspend_switchover();
            let (dirty_bytes, _) = self.common.dirty.sync()?;
            self.tell_stopped(dirty_bytes, waits)?;
        }
        let continued = if waits { self.await_continue() } else { Ok(()) };
        // Whether every connection is still there is found out now, and not by what the guest waits for.
        let confirmed = |()| if waits { self.control.confirm(Duration::ZERO, &shared.stop) } else { Ok(()) };
        let continued = continued.and_then(confirmed);
        shared.note_part(|parts| &mut parts.wait_seconds, clock.lap());
        continued?;
        if waits {
            shared.begin_switchover();
        }
        shared.set_phase(Phase::Switchover, Status::Device);
        shared.pace_stopped();
        shared.guest.tell(GuestEvent::Pass { number: round });
        let predicted_downtime = lock(&shared.report).predicted_downtime_seconds.unwrap_or_default();
        let dirty_rate = lock(&shared.report).dirty_bytes_per_second;
        let (last, _) = self.common.dirty.sync()?;
        self.tell_stopped(last, false)?;
        self.send_round(round)?;
        self.report_last_round(round, clock.peek(), last, dirty_rate, predicted_downtime)?;
        shared.note_part(|parts| &mut parts.ram_seconds, clock.lap());
        let sections = self.send_device_state()?;
        shared.note_part(|parts| &mut parts.device_state_seconds, clock.lap());

        *lock(&shared.phase) = Phase::Handover;
        let run = shared.guest.leaving_run(shared.id) == Resume::Run;
        let parts = lock(&shared.report).downtime_parts.unwrap_or_default().to_nanoseconds();
        *lock(&shared.offer) = Some(Offer { last_round: round, sections, pages: self.pages(), run, parts });
        let mut out = |message: &Message| self.control.send(message);
        advance(shared, SourceEvent::Offer, Heard::default(), None, &mut out)?;
        let mut loading = true;
        let next = || {
            let message = self.next_word();
            if matches!(message, Ok(Message::Ready(_))) && std::mem::take(&mut loading) {
                self.common.dirty.expect(ToGo::round(0));
                shared.note_part(|parts| &mut parts.load_seconds, clock.lap());
            }
            message
        };
        settle(shared, None, next, out)?;
        self.control.finish();
        Ok(())
    }

    /// What the destination says next in the handover. Before Release a cancel and the switchover's limit end the wait;
    /// afterwards only the limit and a lost link do.
    fn next_word(&self) -> Result<Message, Cause> {
        loop {
            let released = self.shared.guest.leaving_at(self.shared.id) == Some(SourceState::Released);
            // The destination has all of its time from then on, and says so at the end of it.
            let left = match self.shared.guest.leaving_times(self.shared.id).released {
                Some(then) if released => (self.shared.switchover_timeout() + ANSWER).saturating_sub(then.elapsed()),
                _ => self.shared.time_left(),
            };
            let event = match self.incoming.recv_timeout(left) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => {
                    let waiting_for =
                        if released { "the destination to start the guest" } else { "the destination to load" };
                    return Err(self.shared.too_slow(waiting_for));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Cause::Thread { thread: "source reader", what: "ended".into() });
                }
            };
            match event {
                Event::Message(message, _) => return Ok(message),
                Event::Cancel if released && !self.shared.abandoned.load(Ordering::Acquire) => {}
                Event::Worker(_) | Event::Continue => {}
                event => drop(self.shared.sorted(event, &self.control)?),
            }
        }
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
            then_stopped: true,
        };
        lock(&self.shared.report).push_round(Round::from(&round));
        self.control.send(&Message::RoundDone(Box::new(round)))
    }

    fn send_device_state(&self) -> Result<u32, Cause> {
        let (calls, left) = (self.shared.guest.calls(), self.shared.time_left());
        let sections = calls.call(MachineStep::Save, left, &self.shared.cpu, |machine| machine.save())?;
        let total = calls.note_state(&sections);
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
            if self.shared.time_left().is_zero() {
                return Err(self.shared.too_slow("the device state to be sent"));
            }
            self.control.send(&message)?;
            next = pieces.next();
        }
        Ok(())
    }

    /// Tells the destination since when the guest stands still and what is waited for.
    fn tell_stopped(&self, dirty_bytes: u64, waits: bool) -> Result<(), Cause> {
        let times = self.shared.guest.leaving_times(self.shared.id);
        let stopped = times.stopped.map_or(Duration::ZERO, |then| then.elapsed());
        self.control.send(&Message::Stopped(Stopped { stopped, dirty_bytes, waits }))
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
pub(super) struct Failing<'a> {
    before: Option<SourceState>,
    done: Result<Left<'a>, Cause>,
}

/// A failure: first of all the guest, if it may, runs again; then it does so at full speed.
pub(super) fn begin_to_fail<'a>(shared: &'a Shared, cause: &Cause) -> Failing<'a> {
    let before = shared.guest.leaving_at(shared.id);
    // An Abort that came in the handover has done its part there.
    let event = match cause {
        Cause::Peer { .. } | Cause::Refused { .. } | Cause::CancelledByPeer { .. } => SourceEvent::Aborted,
        _ => SourceEvent::Failed,
    };
    let done = transition(shared, event, Heard::default());
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
    failing: Failing<'_>,
) -> Result<(), Cause> {
    let left = failing.done?;
    let link_lost = cause.is_of_link();
    let mut told = false;
    if let Some(control) = control {
        told = send(shared, &left, Some(&cause), &mut |message| control.send(message)).is_ok() && !link_lost;
        if told {
            control.finish();
        }
    }
    if left.actions.contains(&SourceAction::Reconnect) && !matches!(cause, Cause::Unclear) {
        return ask_again(shared);
    }
    // A destination that was sent everything may be waiting for Release, and be kept from other migrations by that.
    if failing.before == Some(SourceState::Offered) && !told && left.actions.contains(&SourceAction::SendAbort) {
        tell(shared, TELL, Some(&cause));
    }
    Err(match left.acted {
        Ok(()) => cause,
        Err(failed) => Cause::NotResumed { why: cause.to_string(), failed: failed.to_string() },
    })
}

/// A failure before there was anything to stop.
pub(super) fn fail(shared: &Shared, control: Option<&Control>, cause: Cause) -> Result<(), Cause> {
    let cause = shared.or_wanted(cause);
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
    fn open(shared: &'a Shared, session: SessionId, timeout: Duration) -> Result<Self, Cause> {
        let connection = setup::connect(shared, Role::Reconnect, session, timeout, &shared.abandoned)?;
        connection.set_receive_timeout(Some(timeout))?;
        shared.contact.touch();
        shared.control.bytes.fetch_add(COUNTED_HELLO_BYTES, Ordering::Relaxed);
        Ok(Self {
            shared,
            sender: FrameSender::new(connection.clone(), shared.control.clone()),
            receiver: FrameReceiver::new(connection, Default::default()),
        })
    }

    /// Says where this side stands, and acts on the answers until it is known where the guest is.
    fn settle(&mut self, cause: Option<&Cause>) -> Result<(), Cause> {
        let Self { shared, sender, receiver } = self;
        let mut out = |message: &Message| sender.send(message);
        advance(shared, SourceEvent::Reconnected, Heard::default(), cause, &mut out)?;
        // Signs of life are no answer: it is asked again.
        let (asked, limit) = (Instant::now(), ANSWER + shared.switchover_timeout());
        let next = || {
            let message = receiver.next_message()?;
            shared.contact.touch();
            if matches!(message, Message::Heartbeat(_)) && asked.elapsed() > limit {
                return Err(Cause::Silent { waiting_for: "a word on where the guest is", after: limit });
            }
            Ok(message)
        };
        settle(shared, cause, next, out)
    }
}

impl Drop for Again<'_> {
    fn drop(&mut self) {
        lock(&self.shared.greeting).take();
        self.sender.connection().finish(Duration::from_millis(200));
    }
}

/// The session, once there is one.
fn session(shared: &Shared) -> Result<SessionId, Cause> {
    (*lock(&shared.session))
        .ok_or(Cause::Unexpected { message: "a reconnection", expected: "a migration with a session" })
}

/// Tells a destination over a new connection that the guest was taken back, for as long as `patience`. If that fails, the
/// guest's next migration tells it.
pub(super) fn tell(shared: &Shared, patience: Duration, cause: Option<&Cause>) {
    let Ok(session) = session(shared) else { return };
    let deadline = Instant::now() + patience;
    let mut pause = RETRY.0;
    while shared.uri.can_reconnect() && !shared.abandoned.load(Ordering::Acquire) {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = lock(&shared.parameters).link_timeout.min(left);
        let told = Again::open(shared, session, limit).and_then(|mut again| again.settle(cause));
        // Anything else is the destination's word.
        if !matches!(&told, Err(cause) if cause.is_of_link() || matches!(cause, Cause::Cancelled)) {
            return;
        }
        if deadline.saturating_duration_since(Instant::now()) <= pause {
            break;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(RETRY.1);
    }
    shared.guest.note_untold(shared.id, session, &shared.uri);
}

/// A destination may still hold what an earlier migration of this guest brought, because it could not be told that the guest
/// was taken back: it would take no other. It is told now, if it is the one that this migration goes to.
pub(super) fn tell_earlier(shared: &Shared) {
    if !shared.uri.can_reconnect() {
        return;
    }
    let limit = lock(&shared.parameters).link_timeout;
    for untold in shared.guest.take_untold() {
        let told = Again::open(shared, untold.session, limit)
            .and_then(|mut again| again.sender.send(&Message::Abort(abort(shared, untold.epoch, None))));
        let is_over = match told {
            Ok(()) => true,
            // One that knows nothing of it is another, or where it was, one that has been started anew.
            Err(Cause::Refused { .. }) => untold.uri == shared.uri.to_string(),
            Err(_) => false,
        };
        if !is_over {
            shared.guest.keep_untold(untold);
        }
    }
}

/// Released, and the link is lost: asks the destination over new connections where the guest is.
fn ask_again(shared: &Shared) -> Result<(), Cause> {
    let began = Instant::now();
    let mut pause = RETRY.0;
    loop {
        let last = match ask_once(shared) {
            Ok(()) => return Ok(()),
            Err(cause @ Cause::Unclear) => return Err(cause),
            Err(cause) if shared.guest.leaving_at(shared.id) != Some(SourceState::Released) => return Err(cause),
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
    shared.begin_switchover();
    Again::open(shared, session(shared)?, timeout)?.settle(None)
}

/// Asks again, on a thread of its own, after all attempts so far were in vain.
pub(super) fn resolve(shared: &Shared) {
    let _meter = shared.cpu.meter();
    shared.end(ask_again(shared));
}

/// A person has decided that the guest is here: the report says so, and the destination is told if it can be reached.
pub(super) fn on_decision(shared: &Arc<Shared>) {
    note_downtime(shared);
    lock(&shared.report).total_seconds = shared.began.elapsed().as_secs_f64();
    let telling = shared.clone();
    let patience = lock(&shared.parameters).handover_timeout;
    if let Ok(thread) = spawn("source", move || tell(&telling, patience, None)) {
        lock(&shared.threads).push(thread);
    }
}

#[cfg(test)]
#[path = "../guest_model/mod.rs"]
mod model;
