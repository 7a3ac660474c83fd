//! The destination: what its acceptor and its session do, as plain as can be, over the model's links.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{A, B, Incoming, LINK_TIMEOUT, Line, Role, World, closed};
use crate::clock::Contact;
use crate::error::{Cause, GuestPlace, MachineStep, Side};
use crate::guest::{Ground, Guest, Heard, Resume, StartPermit};
use crate::handover::{DestinationAction, DestinationEvent, DestinationState};
use crate::link::{CpuTime, lock};
use crate::machine::Machine;
use crate::sync::control::{note, spawn_on};
use crate::sync::{Fault, mpsc, seeded, spawn};
use crate::wire::{Abort, AbortReason, Message, Ready, Release, Running};

/// How long loading and starting may take.
const LIMIT: Duration = Duration::from_secs(5);

enum Event {
    Message(Message),
    Lost {
        link: u32,
        cause: Cause,
    },
    Again(super::End),
    Cancel,
    Decided,
    Close,
    /// What was done to a session that somebody else's took the place of.
    Evict,
}

/// The session under way.
#[derive(Clone)]
pub(super) struct Current {
    coming: u64,
    events: mpsc::Sender<Event>,
}

struct Session {
    world: Arc<World>,
    guest: Arc<Guest>,
    coming: u64,
    to_self: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    contact: Arc<Contact>,
    cpu: Arc<CpuTime>,
    link: Option<(u32, Line)>,
    links: u32,
    offered: bool,
    cause: Option<Cause>,
    epoch: u64,
    done: bool,
}

/// What became of a session.
struct Ended {
    state: DestinationState,
    epoch: u64,
}

/// Waits for migrations into the guest.
pub(super) fn start(world: &Arc<World>) {
    let _ = world.guest(B).begin_incoming();
    let (listener, incoming) = mpsc::channel();
    *lock(&world.listener) = Some(listener);
    let world = world.clone();
    drop(spawn_on(B, "acceptor", move || accept(&world, &incoming)));
}

fn accept(world: &Arc<World>, incoming: &mpsc::Receiver<Incoming>) {
    let guest = world.guest(B).clone();
    let (tell, told) = mpsc::channel::<Ended>();
    let mut ended: Option<Ended> = None;
    loop {
        let next = incoming.recv_timeout(super::BEAT);
        while let Ok(end) = told.try_recv() {
            ended = Some(end);
            lock(&world.session).take();
        }
        let Incoming { role, end, answer } = match next {
            Ok(next) => next,
            Err(mpsc::RecvTimeoutError::Timeout) => continue,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        };
        let current = lock(&world.session).clone();
        match role {
            Role::Stranger => {
                if let Some(current) = current
                    && seeded(Fault::StrangerEvicts)
                    && guest.waits_for_decision()
                {
                    let _ = current.events.send(Event::Evict);
                }
                let _ = answer.send(false);
            }
            Role::Control => {
                if current.is_some() || ended.is_some() || guest.waits_for_decision() {
                    let _ = answer.send(false);
                    continue;
                }
                if begin(world, end, &tell) {
                    let _ = answer.send(true);
                }
            }
            Role::Reconnect => match (&ended, current) {
                (Some(ended), _) => {
                    let _ = answer.send(true);
                    answer_for(world, ended, &end.sender());
                }
                (None, Some(current)) => {
                    let _ = answer.send(true);
                    let _ = current.events.send(Event::Again(end));
                }
                (None, None) => {
                    let _ = answer.send(false);
                }
            },
        }
    }
}

/// As `Ended::answers`.
fn answer_for(world: &World, ended: &Ended, line: &Line) {
    let actions = ended.state.on(DestinationEvent::Query).map(|(_, actions)| actions).unwrap_or_default();
    for action in actions {
        let message = match action {
            DestinationAction::SendRunning => running(ended.epoch),
            DestinationAction::SendAborted => abort(ended.epoch, AbortReason::Failed),
            _ => continue,
        };
        let _ = line.send(world, &message);
    }
    line.close();
}

fn running(epoch: u64) -> Message {
    Message::Running(Running { load: Duration::ZERO, resume: Duration::ZERO, cpu: Duration::ZERO, epoch })
}

fn abort(epoch: u64, reason: AbortReason) -> Message {
    Message::Abort(Abort { reason, guest: GuestPlace::AtSource, epoch, text: "the model's".into() })
}

fn begin(world: &Arc<World>, end: super::End, tell: &mpsc::Sender<Ended>) -> bool {
    let guest = world.guest(B).clone();
    let (contact, cpu): (Arc<Contact>, Arc<CpuTime>) = (Arc::default(), Arc::default());
    let (to_self, events) = mpsc::channel();
    let deciding = to_self.clone();
    let on_decision = Arc::new(move || drop(deciding.send(Event::Decided)));
    let ground = Ground {
        contact: contact.clone(),
        link_timeout: LINK_TIMEOUT,
        cpu: cpu.clone(),
        on_decision,
        on_end: Arc::new(|| {}),
    };
    let Ok(coming) = guest.begin_session(ground) else { return false };
    *lock(&world.session) = Some(Current { coming, events: to_self.clone() });
    let mut session = Session {
        world: world.clone(),
        guest,
        coming,
        to_self,
        events,
        contact,
        cpu,
        link: None,
        links: 0,
        offered: false,
        cause: None,
        epoch: 1,
        done: false,
    };
    let tell = tell.clone();
    let _ = spawn("session", move || {
        session.link(end);
        while !session.done && session.state() != DestinationState::Aborted {
            if let Err(cause) = session.step() {
                session.fail(cause);
            }
        }
        session.guest.disconnected(session.coming);
        note(|| format!("the session ends in {:?}", session.state()));
        if let Some((_, line)) = &session.link {
            line.close();
        }
        let _ = tell.send(Ended { state: session.state(), epoch: session.epoch });
    });
    true
}

/// A person wants an end.
pub(super) fn cancel(world: &World) {
    let Some(current) = lock(&world.session).clone() else { return };
    let state = world.guest(B).coming_at(current.coming);
    if !matches!(state, Some(DestinationState::Starting | DestinationState::Running))
        && !world.guest(B).waits_for_decision()
    {
        note(|| "cancels".to_owned());
        world.gave_up.store(true, Ordering::Release);
        let _ = current.events.send(Event::Cancel);
    }
}

/// The handle is dropped.
pub(super) fn close(world: &World) {
    note(|| "the destination's handle is dropped".to_owned());
    lock(&world.listener).take();
    let current = lock(&world.session).take();
    if let Some(current) = current {
        let _ = current.events.send(Event::Close);
    }
}

impl Session {
    fn state(&self) -> DestinationState {
        self.guest.coming_at(self.coming).unwrap_or(DestinationState::Aborted)
    }

    fn link(&mut self, mut end: super::End) {
        self.links += 1;
        let (number, line) = (self.links, end.sender());
        let Some(reader) = end.reader(&self.world) else { return };
        let (events, contact) = (self.to_self.clone(), self.contact.clone());
        let _ = spawn("session reader", move || {
            loop {
                let event = match reader.next(|| contact.touch()) {
                    Ok(message) => Event::Message(message),
                    Err(cause) => Event::Lost { link: number, cause },
                };
                let last = matches!(event, Event::Lost { .. });
                if events.send(event).is_err() || last {
                    return;
                }
            }
        });
        self.link = Some((number, line));
    }

    fn step(&mut self) -> Result<(), Cause> {
        match self.events.recv_timeout(Duration::from_secs(3600)) {
            Ok(event) => self.on(event),
            Err(_) => Err(closed()),
        }
    }

    fn on(&mut self, event: Event) -> Result<(), Cause> {
        match event {
            Event::Message(message) => self.on_message(&message),
            Event::Lost { link, cause } if self.link.as_ref().is_some_and(|(number, _)| *number == link) => {
                self.without_link(cause)
            }
            Event::Lost { .. } => Ok(()),
            Event::Again(end) => {
                self.link = None;
                // What comes of answering its hello.
                if end.state.closed.load(Ordering::Acquire) {
                    if seeded(Fault::ConnectedForNothing) {
                        self.guest.reconnected(self.coming);
                        return Ok(());
                    }
                    return self.without_link(closed());
                }
                self.link(end);
                self.guest.reconnected(self.coming);
                Ok(())
            }
            Event::Evict => {
                self.cause = Some(Cause::Cancelled);
                self.advance(DestinationEvent::Failed, Heard::default())
            }
            Event::Decided if self.link.is_some() => self.advance(DestinationEvent::Query, Heard::default()),
            Event::Decided => Ok(()),
            Event::Cancel | Event::Close => match self.state() {
                DestinationState::Loading | DestinationState::Aborted => Err(Cause::Cancelled),
                DestinationState::Ready if matches!(event, Event::Cancel) && !self.guest.waits_for_decision() => {
                    Err(Cause::Cancelled)
                }
                _ if matches!(event, Event::Close) => {
                    self.done = true;
                    Ok(())
                }
                _ => Ok(()),
            },
        }
    }

    fn on_message(&mut self, message: &Message) -> Result<(), Cause> {
        let epoch = |epoch| Heard { epoch, ..Heard::default() };
        match message {
            Message::Offer(offer) if !self.offered => {
                self.offered = true;
                self.guest.coming_runs(self.coming, if offer.run { Resume::Run } else { Resume::StayPaused });
                if self.state() != DestinationState::Loading {
                    return Ok(());
                }
                self.guest.calls().call(MachineStep::Load, LIMIT, &self.cpu, |machine| machine.load(Vec::new()))?;
                if self.world.broken && offer.run {
                    return self.run_what_was_not_released();
                }
                self.advance(DestinationEvent::Loaded, Heard::default())
            }
            Message::Release(Release { epoch, question, lease }) => {
                let heard = Heard { epoch: *epoch, question: *question, lease: *lease };
                self.advance(DestinationEvent::Release, heard)
            }
            Message::Query { epoch: theirs } => self.advance(DestinationEvent::Query, epoch(*theirs)),
            Message::Abort(abort) if abort.reason == AbortReason::Kept => Ok(()),
            Message::Abort(abort) => {
                self.world.gave_up.store(true, Ordering::Release);
                self.cause = Some(Cause::Peer { by: Side::Source, reason: abort.text.clone() });
                self.advance(DestinationEvent::Abort, epoch(abort.epoch))
            }
            Message::Done(_) if self.state() == DestinationState::Running => {
                self.guest.settle_claim(self.coming);
                self.done = true;
                Ok(())
            }
            other => Err(Cause::Unexpected { message: other.name(), expected: "what comes next" }),
        }
    }

    /// A destination that does not keep to the rules. Its source must.
    fn run_what_was_not_released(&mut self) -> Result<(), Cause> {
        note(|| "a broken destination runs it".to_owned());
        let machine = self.world.vm(B).clone();
        machine.well();
        if !self.world.vm(A).runs() {
            machine.resume(&StartPermit::unlimited()).map_err(|_| closed())?;
            if let Some((_, line)) = &self.link {
                let _ = line.send(&self.world, &running(1));
            }
        }
        Ok(())
    }

    fn without_link(&mut self, cause: Cause) -> Result<(), Cause> {
        if let Some((_, line)) = self.link.take() {
            line.close();
        }
        self.advance(DestinationEvent::LinkLost, Heard::default())?;
        if self.state() == DestinationState::Aborted {
            self.cause = Some(cause);
        }
        Ok(())
    }

    fn advance(&mut self, event: DestinationEvent, heard: Heard) -> Result<(), Cause> {
        let mut came = self.guest.come(self.coming, event, heard, LIMIT)?;
        note(|| format!("{event:?}: {:?} to {:?} {:?}", came.before, came.state, came.error));
        self.epoch = came.say.epoch;
        if let Some(error) = came.error.take()
            && matches!(came.state, DestinationState::Aborted | DestinationState::Kept)
        {
            self.cause = Some(error.into());
        }
        if came.before != came.state {
            match came.state {
                DestinationState::Running => {
                    self.world.arrived.store(true, Ordering::Release);
                    self.guest.end_migration();
                }
                // Its start has failed, and the source, which may live for all that is known, is told so.
                DestinationState::Aborted
                    if came.before == DestinationState::Ready
                        && !self.world.has_been_dead_for(A, LINK_TIMEOUT)
                        && !seeded(Fault::StrangerEvicts) =>
                {
                    self.world.gave_up.store(true, Ordering::Release);
                }
                _ => {}
            }
        }
        for action in &came.actions {
            let message = match action {
                DestinationAction::SendReady => {
                    Message::Ready(Ready { epoch: came.say.epoch, question: came.say.question })
                }
                DestinationAction::SendRunning => running(came.say.epoch),
                DestinationAction::SendAborted => abort(came.say.epoch, AbortReason::Failed),
                DestinationAction::SendKept => abort(came.say.epoch, AbortReason::Kept),
                _ => continue,
            };
            if let Some((_, line)) = &self.link {
                let _ = line.send(&self.world, &message);
            }
        }
        Ok(())
    }

    fn fail(&mut self, cause: Cause) {
        let wanted = matches!(cause, Cause::Cancelled);
        match self.state() {
            DestinationState::Loading => {}
            DestinationState::Ready if wanted => {}
            DestinationState::Aborted => return,
            _ => return drop(self.without_link(cause)),
        }
        self.cause = Some(cause);
        let _ = self.advance(DestinationEvent::Failed, Heard::default());
    }
}
