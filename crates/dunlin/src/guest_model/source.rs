//! The source: its real driver over the model's links. What is not real is how connections are made and how a try follows
//! another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::{Failing, advance, begin_to_fail, note_downtime, send, settle, transition};
use super::{A, BEAT, LINK_TIMEOUT, Line, Role, World, closed};
use crate::error::{Cause, MachineStep, Phase, Side};
use crate::guest::{Ground, Heard, Resume};
use crate::handover::{SourceAction, SourceEvent, SourceState};
use crate::link::lock;
use crate::parameters::Parameters;
use crate::report::{PageCounts, Report};
use crate::source::{Shared, ThrottlePolicy};
use crate::sync::control::{note, random, spawn_on};
use crate::sync::{mpsc, now, sleep};
use crate::wire::{Message, Offer};

/// What the driving thread hears.
enum Event {
    Message(Message),
    Lost(Cause),
    Cancel,
}

/// The handle.
pub(super) struct Handle {
    shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
}

impl Handle {
    pub(super) fn cancel(&self) {
        let done = self.shared.guest.cancel_leaving(self.shared.id);
        note(|| format!("cancels: {done:?}"));
        if done.is_ok() {
            let _ = self.events.send(Event::Cancel);
        }
    }

    /// It is dropped.
    pub(super) fn abandon(&self) {
        note(|| "the source's handle is dropped".to_owned());
        self.cancel();
        self.shared.abandoned.store(true, Ordering::Release);
        let _ = self.events.send(Event::Cancel);
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.shared.abandoned.load(Ordering::Acquire)
    }
}

/// A migration, from its beginning to its end.
pub(super) fn migrate(world: &Arc<World>) {
    let guest = world.guest(A).clone();
    let (contact, cpu) = (Arc::default(), Arc::default());
    let decided: Arc<std::sync::OnceLock<std::sync::Weak<Shared>>> = Arc::default();
    let (telling, world_of) = (decided.clone(), Arc::downgrade(world));
    let (events, incoming) = mpsc::channel();
    let ending = events.clone();
    let on_end = Arc::new(move || drop(ending.send(Event::Cancel)));
    let on_decision = Arc::new(move || {
        let (Some(shared), Some(world)) = (telling.get().and_then(std::sync::Weak::upgrade), world_of.upgrade()) else {
            return;
        };
        note_downtime(&shared);
        world.tells.store(true, Ordering::Release);
        drop(spawn_on(A, "source tells", move || tell(&world, &shared, world.handover_timeout, None)));
    });
    let ground = Ground {
        contact: Arc::clone(&contact),
        link_timeout: LINK_TIMEOUT,
        cpu: Arc::clone(&cpu),
        on_decision,
        on_end,
    };
    let Ok(id) = guest.begin_outgoing(ground) else { return };
    let parameters = Parameters { link_timeout: LINK_TIMEOUT, ..Parameters::default() };
    let shared = Arc::new(Shared {
        guest: guest.clone(),
        id,
        uri: "tcp:127.0.0.1:1".parse().expect("an address"),
        given: Default::default(),
        began: std::time::Instant::now(),
        pacer: Arc::new(crate::source::pacing::Pacer::new(0)),
        parameters: parameters.into(),
        stop: AtomicBool::new(false),
        abandoned: AtomicBool::new(false),
        events: Default::default(),
        session: Default::default(),
        offer: Default::default(),
        switchover: Default::default(),
        paced_stopped: AtomicBool::new(false),
        contact,
        phase: Phase::Setup.into(),
        report: Report::new(Side::Source, guest.place(Side::Source)).into(),
        ended: Default::default(),
        control: Arc::default(),
        channels: Default::default(),
        common: Default::default(),
        cpu,
        throttling: ThrottlePolicy::ByNeed,
        greeting: Default::default(),
        round_trip: Default::default(),
        threads: Default::default(),
    });
    let _ = decided.set(Arc::downgrade(&shared));
    *lock(&world.source) = Some(Arc::new(Handle { shared: shared.clone(), events: events.clone() }));
    let mut line = None;
    let done = switch_over(world, &shared, &events, &incoming, &mut line);
    note(|| format!("the migration: {done:?}"));
    if let Err(cause) = done {
        let cause = shared.or_wanted(cause);
        let failing = begin_to_fail(&shared, &cause);
        let failed = end_failing(world, &shared, line.as_ref(), cause, failing);
        note(|| format!("which ends as {failed:?}"));
    }
    if let Some(line) = line {
        line.close();
    }
    guest.end_migration();
}

fn switch_over(
    world: &Arc<World>,
    shared: &Arc<Shared>,
    events: &mpsc::Sender<Event>,
    incoming: &mpsc::Receiver<Event>,
    line: &mut Option<Line>,
) -> Result<(), Cause> {
    let mut end = world.connect(Role::Control, LINK_TIMEOUT)?;
    let out = line.insert(end.sender()).clone();
    if let Some(reader) = end.reader(world) {
        let (events, contact) = (events.clone(), shared.contact.clone());
        drop(spawn_on(A, "source reader", move || {
            loop {
                let event = match reader.next(|| contact.touch()) {
                    Ok(message) => Event::Message(message),
                    Err(cause) => Event::Lost(cause),
                };
                let last = matches!(event, Event::Lost(_));
                if events.send(event).is_err() || last {
                    return;
                }
            }
        }));
    }
    drop(end);
    sleep(Duration::from_millis(random(|random| random.below(400))));
    *lock(&shared.phase) = Phase::Switchover;
    shared.begin_switchover();
    transition(shared, SourceEvent::Pause, Heard::default())?.acted?;
    let (calls, left) = (shared.guest.calls(), shared.time_left());
    calls.call(MachineStep::Save, left, &shared.cpu, |machine| machine.save())?;
    let run = shared.guest.leaving_run(shared.id) == Resume::Run;
    *lock(&shared.offer) = Some(Offer { last_round: 0, sections: 0, pages: PageCounts::default(), run, parts: [0; 6] });
    let mut send = |message: &Message| out.send(world, message);
    advance(shared, SourceEvent::Offer, Heard::default(), None, &mut send)?;
    let next = || {
        let word = next_word(shared, incoming)?;
        if world.broken && matches!(word, Message::Running(_)) {
            world.broken_heard.store(true, Ordering::Release);
        }
        Ok(word)
    };
    settle(shared, None, next, send)
}

/// As `Migration::next_word`.
fn next_word(shared: &Shared, incoming: &mpsc::Receiver<Event>) -> Result<Message, Cause> {
    loop {
        let left = shared.time_left();
        let released = shared.guest.leaving_at(shared.id) == Some(SourceState::Released);
        match incoming.recv_timeout(left) {
            Ok(Event::Message(message)) => return Ok(message),
            Ok(Event::Cancel) if released && !shared.abandoned.load(Ordering::Acquire) => {}
            Ok(Event::Cancel) => return Err(Cause::Cancelled),
            Ok(Event::Lost(cause)) => return Err(cause),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(Cause::SwitchoverTimeout {
                    waiting_for: "the destination",
                    after: shared.switchover_timeout(),
                });
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(closed()),
        }
    }
}

/// As the driver's own.
fn end_failing(
    world: &Arc<World>,
    shared: &Shared,
    line: Option<&Line>,
    cause: Cause,
    failing: Failing<'_>,
) -> Result<(), Cause> {
    let left = failing.done?;
    let mut told = false;
    if let Some(line) = line {
        told = send(shared, &left, Some(&cause), &mut |message| line.send(world, message)).is_ok()
            && !matches!(cause, Cause::Closed { .. } | Cause::Silent { .. });
    }
    if left.actions.contains(&SourceAction::Reconnect) && !matches!(cause, Cause::Unclear) {
        return ask_again(world, shared);
    }
    if failing.before == Some(SourceState::Offered) && !told && left.actions.contains(&SourceAction::SendAbort) {
        tell(world, shared, Duration::from_secs(2), Some(&cause));
    }
    Err(cause)
}

/// One new connection, as `Again`.
fn once(world: &Arc<World>, shared: &Shared, limit: Duration, cause: Option<&Cause>) -> Result<(), Cause> {
    shared.begin_switchover();
    let mut end = world.connect(Role::Reconnect, limit)?;
    shared.contact.touch();
    let line = end.sender();
    let Some(reader) = end.reader(world) else { return Err(closed()) };
    drop(end);
    let mut out = |message: &Message| line.send(world, message);
    advance(shared, SourceEvent::Reconnected, Heard::default(), cause, &mut out)?;
    settle(shared, cause, || reader.next(|| shared.contact.touch()), out)
}

fn tell(world: &Arc<World>, shared: &Shared, patience: Duration, cause: Option<&Cause>) {
    let deadline = now() + patience;
    let mut pause = BEAT / 10;
    while !shared.abandoned.load(Ordering::Acquire) {
        let left = deadline.saturating_duration_since(now());
        let told = once(world, shared, LINK_TIMEOUT.min(left), cause);
        note(|| format!("told: {told:?}"));
        let lost = matches!(told, Err(Cause::Closed { .. } | Cause::Silent { .. }));
        if !lost || deadline.saturating_duration_since(now()) <= pause {
            return;
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

fn ask_again(world: &Arc<World>, shared: &Shared) -> Result<(), Cause> {
    let began = now();
    let mut pause = BEAT / 10;
    loop {
        let last = match once(world, shared, LINK_TIMEOUT, None) {
            Ok(()) => return Ok(()),
            Err(cause @ Cause::Unclear) => return Err(cause),
            Err(cause) if shared.guest.leaving_at(shared.id) != Some(SourceState::Released) => return Err(cause),
            Err(cause) => cause.to_string(),
        };
        note(|| format!("asked: {last}"));
        let over = now().saturating_duration_since(began) + pause > world.handover_timeout;
        if over || shared.abandoned.load(Ordering::Acquire) {
            return Err(Cause::Unreachable { last, after: world.handover_timeout });
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// An operator has the source ask once more.
pub(super) fn ask(world: &Arc<World>) {
    let Some(handle) = lock(&world.source).clone() else { return };
    if handle.shared.guest.begin_asking(handle.shared.id).is_ok() {
        let _ = ask_again(world, &handle.shared);
        handle.shared.guest.end_migration();
    }
}
