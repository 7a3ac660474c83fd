//! The session of a migration that comes in, from the hello to Done.
//!
//! One thread reads one queue of events and advances `handover::DESTINATION_TABLE`. What must stay true: the guest's
//! ownership is changed before a message that tells of it is sent; nothing of a session that ended as Aborted can
//! ever make the guest run.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::compatibility::{self, LOOK_LIMIT};
use super::device_state::DeviceState;
use super::links::{Channel, Link};
use super::placement::{Placement, Staging};
use super::receive::{Carries, Receiving};
use super::{Event, Shared};
use crate::channel::Connection;
use crate::clock::{BootInstant, Contact};
use crate::error::{Cause, MachineStep, Phase, Side};
use crate::guest::{Came, Expected, Heard, Resume};
use crate::handover::{DestinationAction, DestinationEvent, DestinationState};
use crate::link::{
    COUNTED_HELLO_BYTES, ChannelCounters, FrameReceiver, FrameSender, Part, Places, SharedSender, Watch, answer_hello,
    contain, lock,
};
use crate::machine::{StateAge, SwitchoverCost};
use crate::parameters::Integrity;
use crate::report::{DeltaCounts, DowntimeParts, PageCounts, Round, Status};
use crate::to_go::{self, ToGo};
use crate::wire::{
    Abort, AbortReason, Done, HelloReply, MarkAck, Message, Offer, Probe, Probed, Ready, Release, Role, RoundDone,
    Running, Section, SessionId, Start, Stopped, UNCHECKED_PAGES, data_checksum,
};

/// How long after a lost data channel the source's reason may take on the control connection.
const REASON: Duration = Duration::from_secs(1);
/// How long the last message may take to arrive before its connection is closed.
const LAST_WORD: Duration = Duration::from_secs(1);

/// An ended session, for a source that asks later.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) id: SessionId,
    state: DestinationState,
    epoch: u64,
    running: Running,
    abort: Abort,
}

impl Ended {
    /// Whether the guest came.
    pub(super) fn has_arrived(&self) -> bool {
        self.state == DestinationState::Running
    }

    /// What a source is told that asks where this side stands.
    pub(super) fn answers(&self) -> Vec<Message> {
        let actions = self.state.on(DestinationEvent::Query).map(|(_, actions)| actions).unwrap_or_default();
        let message = |action: &DestinationAction| match action {
            DestinationAction::SendRunning => Some(Message::Running(Running { epoch: self.epoch, ..self.running })),
            DestinationAction::SendAborted => Some(Message::Abort(self.abort.clone())),
            _ => None,
        };
        actions.iter().filter_map(message).collect()
    }
}

/// When rounds were acknowledged. A round begins only when the source has heard all acknowledgements of the one before.
struct Acknowledged {
    /// The last acknowledgement of the rounds before the latest, or when the session began.
    before: BootInstant,
    /// The last acknowledgement of the latest round, and its number.
    latest: (u32, BootInstant),
}

impl Acknowledged {
    /// An acknowledgement is about to be sent.
    fn note(&mut self, round: u32) {
        if round > self.latest.0 {
            self.before = self.latest.1;
        }
        if round >= self.latest.0 {
            self.latest = (round, BootInstant::now());
        }
    }

    /// The last that was sent before `round`.
    fn before(&self, round: u32) -> BootInstant {
        if self.latest.0 < round { self.latest.1 } else { self.before }
    }
}

/// A session.
pub(super) struct Session<'a> {
    shared: &'a Shared,
    id: SessionId,
    /// The migration's number at the guest, where its handover stands.
    coming: u64,
    role: Role,
    to_self: Sender<Event>,
    events: Receiver<Event>,
    contact: Arc<Contact>,
    placement: Arc<Placement>,
    link: Option<Link>,
    /// Connections for messages so far.
    links: u32,
    /// Data channels announced by the source, once it has.
    expected: Option<u8>,
    channels: Vec<Channel>,
    /// On a single connection, the latest round that has arrived as a whole.
    single_round: u32,
    /// Until when all channels must have connected.
    channels_due: Instant,
    device_state: DeviceState,
    acknowledged: Acknowledged,
    /// Where the handover stood when that was looked at last.
    known: Cell<DestinationState>,
    /// When the first of the device state came.
    state_came: Option<BootInstant>,
    offer: Option<Offer>,
    /// When the offer came.
    offered: Option<Instant>,
    running: Running,
    epoch: u64,
    /// What the machine says that a switchover costs.
    cost: SwitchoverCost,
    /// What ended it.
    cause: Option<Cause>,
    /// A data channel is lost; the control connection may yet tell why.
    suspicion: Option<(Cause, Instant)>,
    done: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        id: SessionId,
        coming: u64,
        contact: Arc<Contact>,
        role: Role,
        (to_self, events): (Sender<Event>, Receiver<Event>),
    ) -> Self {
        let link_timeout = lock(&shared.parameters).link_timeout;
        Self {
            shared,
            id,
            coming,
            role,
            to_self,
            events,
            contact,
            placement: Arc::new(Placement::new(shared.guest.machine().ram())),
            link: None,
            links: 0,
            expected: None,
            channels: Vec::new(),
            single_round: 0,
            channels_due: Instant::now() + link_timeout,
            device_state: DeviceState::default(),
            acknowledged: Acknowledged { before: BootInstant::now(), latest: (0, BootInstant::now()) },
            known: Cell::new(DestinationState::Loading),
            state_came: None,
            offer: None,
            offered: None,
            running: Running { load: Duration::ZERO, resume: Duration::ZERO, cpu: Duration::ZERO, epoch: 1 },
            epoch: 1,
            cost: SwitchoverCost::default(),
            cause: None,
            suspicion: None,
            done: false,
        }
    }

    /// Where the handover stands.
    fn state(&self) -> DestinationState {
        if let Some(state) = self.shared.guest.coming_at(self.coming) {
            self.known.set(state);
        }
        // One whose guest has come and gone, and come again otherwise, answers as it did.
        self.known.get()
    }

    /// Another session has taken this one's place at the guest.
    fn is_superseded(&self) -> bool {
        self.shared.guest.coming_at(self.coming).is_none()
    }

    /// Drives the session, whose connection has brought `start` in `start_bytes` bytes, to its end.
    pub(super) fn run(mut self, control: Connection, start: &Start, start_bytes: u64) -> Ended {
        let mut meter = self.shared.cpu.meter();
        self.begin_report();
        let carries = match self.role {
            Role::Single => Carries::Everything { link: 0 },
            _ => Carries::Control { link: 0 },
        };
        // Its Start has been read.
        let begun = self
            .link(control, carries, Some(start_bytes))
            .and_then(|()| contain("destination session", || self.on_start(start)));
        if let Err(cause) = begun {
            self.fail(cause);
        }
        while !self.done && self.state() != DestinationState::Aborted && !self.is_superseded() {
            if let Err(cause) = contain("destination session", || self.step()) {
                self.fail(cause);
            }
            meter.add();
        }
        self.end()
    }

    fn begin_report(&self) {
        // Held all the while: nobody sees half of this.
        let mut report = lock(&self.shared.report);
        *lock(&self.shared.began) = Some(Instant::now());
        *lock(&self.shared.ready) = None;
        *lock(&self.shared.stopped) = None;
        *lock(&self.shared.phase) = Phase::Setup;
        *lock(&self.shared.control) = Arc::default();
        lock(&self.shared.channels).clear();
        self.shared.pages_in_rounds.store(0, std::sync::atomic::Ordering::Relaxed);
        let fresh = crate::report::Report::new(Side::Destination, report.guest);
        report.session = Some(self.id.to_string());
        report.rounds.clear();
        report.restart_precopy();
        report.error = None;
        report.device_state_bytes = 0;
        report.downtime_seconds = 0.0;
        report.setup_seconds = 0.0;
        report.predicted_downtime_seconds = None;
        report.bandwidth_bytes_per_second = 0;
        report.dirty_bytes_per_second = 0;
        report.downtime_parts = None;
        report.not_converging = None;
        report.vcpu_throttle_percent.clear();
        report.max_vcpu_throttle_percent.clear();
        report.delta = DeltaCounts::default();
        report.cpu_seconds = fresh.cpu_seconds;
        *lock(&self.shared.to_go) = ToGo::round(report.ram.total_bytes);
        self.shared.change_status(&mut report, Status::Active);
    }

    /// Takes over a connection for messages, of which a Start of `start_bytes` may have been read.
    fn link(&mut self, connection: Connection, carries: Carries, start_bytes: Option<u64>) -> Result<(), Cause> {
        let number = self.links;
        self.links = self.links.saturating_add(1);
        let timeout = lock(&self.shared.parameters).link_timeout;
        let connection = Arc::new(connection);
        connection.set_send_timeout(Some(timeout))?;
        let control = lock(&self.shared.control).clone();
        control.bytes.fetch_add(COUNTED_HELLO_BYTES, std::sync::atomic::Ordering::Relaxed);
        let mut receiver = FrameReceiver::new(connection.clone(), control.clone());
        let pages = match carries {
            Carries::Everything { .. } => self.count_channel(0),
            Carries::Control { .. } | Carries::Pages { .. } => control,
        };
        receiver.count_pages_in(pages.clone());
        if let Some(bytes) = start_bytes {
            receiver.has_read(bytes);
        }
        let places = Arc::new(Places::default());
        let sender: SharedSender = Arc::new(FrameSender::new(connection.clone(), Arc::default()).into());
        let lost = Mutex::new(self.to_self.clone());
        // Of no use to anybody when the session has ended meanwhile.
        let lost = move |cause| drop(lock(&lost).send(Event::ChannelLost(cause)));
        let watch = Watch::start(Part::Answers, connection.clone(), sender.clone(), timeout, lost)?;
        let receiving = Receiving {
            receiver,
            carries,
            placement: self.placement.clone(),
            counters: pages,
            contact: Some(self.contact.clone()),
            watched: watch.messages(),
            events: self.to_self.clone(),
            places: places.clone(),
            staging: Staging::default(),
        };
        let mut link = Link { number, connection, places, sender, watch: Some(watch), receiver: None };
        link.receiver = Some(receiving.start(&self.shared.cpu)?);
        self.link = Some(link);
        Ok(())
    }

    fn count_channel(&self, index: u8) -> Arc<ChannelCounters> {
        let counters = Arc::new(ChannelCounters::default());
        lock(&self.shared.channels).push((index, counters.clone()));
        counters
    }

    fn send(&self, message: &Message) -> Result<(), Cause> {
        match &self.link {
            Some(link) => lock(&link.sender).send(message),
            None => Err(Cause::Closed { channel: self.shared.local_uri.to_string() }),
        }
    }

    /// Waits for the next event and acts on it.
    fn step(&mut self) -> Result<(), Cause> {
        let deadline = match (&self.suspicion, self.all_connected()) {
            (Some((_, until)), _) => Some(*until),
            (None, false) => Some(self.channels_due),
            (None, true) => None,
        };
        let event = match deadline {
            None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        };
        match event {
            Ok(event) => self.on(event),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Cause::Thread { thread: "destination acceptor", what: "ended".into() })
            }
            Err(RecvTimeoutError::Timeout) => Err(match self.suspicion.take() {
                Some((cause, _)) => cause,
                None => Cause::Silent {
                    waiting_for: if self.expected.is_some() { "the data channels" } else { "Start" },
                    after: lock(&self.shared.parameters).link_timeout,
                },
            }),
        }
    }

    fn all_connected(&self) -> bool {
        self.expected.is_some_and(|expected| self.channels.len() >= usize::from(expected))
    }

    fn on(&mut self, event: Event) -> Result<(), Cause> {
        match event {
            Event::Message(message, _place) => self.on_message(message),
            Event::Mark { channel, round, place: _place } => self.on_mark(channel, round),
            Event::Lost { link, cause } if self.link.as_ref().is_some_and(|l| l.number == link) => self.on_lost(cause),
            // Another has taken its place.
            Event::Lost { .. } => Ok(()),
            Event::ChannelLost(cause) => self.on_channel_lost(cause),
            Event::Data { index, connection } => self.on_data(index, connection),
            Event::Again(connection) => self.on_again(connection),
            Event::Decided if self.link.is_some() => self.advance(DestinationEvent::Query, Heard::default()),
            Event::Decided => Ok(()),
            Event::Cancel | Event::Close => self.on_end_wanted(matches!(event, Event::Close)),
        }
    }

    /// Somebody wants an end: a person, or who dropped the handle.
    fn on_end_wanted(&mut self, dropped: bool) -> Result<(), Cause> {
        match self.state() {
            DestinationState::Loading | DestinationState::Aborted => Err(Cause::Cancelled),
            // The source can be told, and has the guest.
            DestinationState::Ready if !dropped && !self.shared.guest.waits_for_decision() => Err(Cause::Cancelled),
            // This may be the only copy: it stays with the guest, and can be decided there.
            _ if dropped => {
                self.done = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn on_message(&mut self, message: Message) -> Result<(), Cause> {
        let loading = self.state() == DestinationState::Loading;
        let epoch = |epoch| Heard { epoch, ..Heard::default() };
        match message {
            Message::RoundDone(round) if loading => {
                self.on_round(*round);
                Ok(())
            }
            Message::Stopped(stopped) if loading => {
                self.on_stopped(stopped);
                Ok(())
            }
            Message::Probe(probe) if loading => self.on_probe(&probe),
            Message::Section(section) if loading => self.on_section(section),
            Message::Offer(offer) if self.offer.is_none() => {
                *lock(&self.shared.phase) = Phase::Handover;
                self.offer = Some(offer);
                let run = if offer.run { Resume::Run } else { Resume::StayPaused };
                self.shared.guest.coming_runs(self.coming, run);
                self.offered = Some(Instant::now());
                self.load_if_complete()
            }
            Message::Release(Release { epoch, question, lease }) => {
                self.advance(DestinationEvent::Release, Heard { epoch, question, lease })
            }
            Message::Query { epoch: theirs } => self.advance(DestinationEvent::Query, epoch(theirs)),
            // The source keeps its guest, paused: what runs here goes on.
            Message::Abort(abort) if abort.reason == AbortReason::Kept => {
                self.note_conflict("the source has paused its guest and keeps it; this side decided later");
                Ok(())
            }
            Message::Abort(abort) => {
                let heard = epoch(abort.epoch);
                if matches!(abort.reason, AbortReason::Ended(_)) {
                    self.shared.guest.coming_ended(self.coming);
                }
                self.cause = Some(peer_aborted(abort));
                self.advance(DestinationEvent::Abort, heard)
            }
            Message::Done(done) if self.state() == DestinationState::Running => {
                self.on_done(done);
                Ok(())
            }
            other => Err(Cause::Unexpected { message: other.name(), expected: "what comes next in a migration" }),
        }
    }

    /// How long it took to stop this machine where it comes from is worth knowing when it goes on from here. Saving was
    /// measured together with sending, which is more.
    fn learn(&self) {
        let Some(parts) = self.offer.and_then(|offer| DowntimeParts::from_nanoseconds(offer.parts)) else { return };
        for (step, seconds) in
            [(MachineStep::Pause, parts.pause_seconds), (MachineStep::Save, parts.device_state_seconds)]
        {
            let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            self.shared.guest.calls().note(step, took.min(self.shared.switchover_limit()));
        }
    }

    /// As a piece of device state, but for what becomes of it.
    fn on_probe(&mut self, probe: &Probe) -> Result<(), Cause> {
        if data_checksum(&probe.piece) != probe.checksum {
            let reason = format!("probe {} has not the checksum that came with it", probe.number);
            return Err(Cause::Incompatible { reason });
        }
        if !probe.last {
            return Ok(());
        }
        let Expected { load, resume, claim, .. } = self.shared.guest.calls().expect(self.cost);
        let late = self.link.as_ref().and_then(|link| link.watch.as_ref()).map_or(Duration::ZERO, Watch::lateness);
        let resume = resume.saturating_add(claim);
        // The guest is not stopped before the source has heard this.
        self.acknowledged.note(self.acknowledged.latest.0);
        self.send(&Message::Probed(Probed { number: probe.number, load, resume, late }))
    }

    fn on_done(&mut self, done: Done) {
        {
            let mut report = lock(&self.shared.report);
            report.downtime_seconds = done.downtime.as_secs_f64();
            report.downtime_parts = DowntimeParts::from_nanoseconds(done.parts);
            report.cpu_seconds.source = Some(done.cpu.as_secs_f64());
        }
        self.shared.guest.settle_claim(self.coming);
        self.done = true;
    }

    fn note_conflict(&self, here: &'static str) {
        let error = self.shared.error(Cause::Conflict { here });
        lock(&self.shared.report).error = Some((&error).into());
    }

    fn on_start(&mut self, start: &Start) -> Result<(), Cause> {
        let single = self.role == Role::Single;
        if single != (start.channels == 0) {
            let reason = format!("{} data channels do not go with this kind of connection", start.channels);
            return Err(Cause::Incompatible { reason });
        }
        let features = compatibility::check(start, &self.shared.guest, &self.shared.cpu)?;
        self.cost = self.shared.guest.calls().declared_cost(LOOK_LIMIT, &self.shared.cpu)?;
        let unchecked = features.iter().any(|feature| feature == UNCHECKED_PAGES);
        self.placement.open(if unchecked { Integrity::None } else { Integrity::Checksum }, start.channels);
        self.expected = Some(start.channels);
        self.channels_due = Instant::now() + lock(&self.shared.parameters).link_timeout;
        // Where it cannot be sent, the loss of the link or the source's reason for it is on its way.
        let _ = self.send(&Message::Accepted { features });
        self.shared.set_status(Phase::Precopy, Status::Active);
        let mut report = lock(&self.shared.report);
        report.setup_seconds = lock(&self.shared.began).map_or(0.0, |began| began.elapsed().as_secs_f64());
        report.downtime_limit_seconds = start.downtime_limit.as_secs_f64();
        Ok(())
    }

    fn on_data(&mut self, index: u8, connection: Connection) -> Result<(), Cause> {
        let expected = self.expected.unwrap_or(0);
        let taken = self.channels.iter().any(|channel| channel.index == index);
        if index >= expected || taken || self.state() != DestinationState::Loading {
            let reason = format!("data channel {index} is not expected: {expected} were announced, each comes once");
            self.shared.refused(connection.name(), &reason);
            return answer_hello(&connection, &HelloReply::Refused { reason }).or(Ok(()));
        }
        answer_hello(&connection, &HelloReply::Welcome)?;
        let counters = self.count_channel(index);
        counters.bytes.fetch_add(COUNTED_HELLO_BYTES, std::sync::atomic::Ordering::Relaxed);
        let connection = Arc::new(connection);
        let places = Arc::new(Places::default());
        // Only the watch sends here.
        let sender = Arc::new(FrameSender::new(connection.clone(), Arc::default()).into());
        let Some(watch) = self.link.as_ref().and_then(|link| link.watch.as_ref()) else {
            return Err(Cause::Closed { channel: connection.name().to_owned() });
        };
        let watched = watch.add(connection.clone(), sender, counters.clone());
        let receiving = Receiving {
            receiver: FrameReceiver::new(connection.clone(), counters.clone()),
            carries: Carries::Pages { channel: index },
            placement: self.placement.clone(),
            counters,
            contact: None,
            watched,
            events: self.to_self.clone(),
            places: places.clone(),
            staging: Staging::default(),
        };
        let receiver = Some(receiving.start(&self.shared.cpu)?);
        self.channels.push(Channel { index, connection, places, receiver, round: 0 });
        Ok(())
    }

    fn on_mark(&mut self, channel: u8, round: u32) -> Result<(), Cause> {
        if self.role != Role::Single {
            let found = self.channels.iter_mut().find(|c| c.index == channel);
            found.ok_or(Cause::Unexpected { message: "Mark", expected: "a known channel" })?.round = round;
        } else {
            self.single_round = round;
        }
        self.acknowledged.note(round);
        self.send(&Message::MarkAck(MarkAck { channel, round }))?;
        self.load_if_complete()
    }

    fn on_round(&self, done: RoundDone) {
        let round = Round::from(&done);
        let mut report = lock(&self.shared.report);
        let pages = &self.shared.pages_in_rounds;
        let all = pages.load(std::sync::atomic::Ordering::Relaxed).saturating_add(done.pages.total());
        pages.store(all, std::sync::atomic::Ordering::Relaxed);
        let ram_rate = to_go::ram_rate(done.number, done.ram_bytes, done.transferred_bytes, done.bandwidth);
        *lock(&self.shared.to_go) = ToGo::round_beside(done.dirty_bytes, done.dirty_rate, ram_rate);
        report.bandwidth_bytes_per_second = round.bandwidth_bytes_per_second;
        report.dirty_bytes_per_second = round.dirty_bytes_per_second;
        report.predicted_downtime_seconds = Some(round.predicted_downtime_seconds);
        report.downtime_limit_seconds = done.downtime_limit.as_secs_f64();
        report.delta = done.delta;
        report.throttled_by(&done.throttle);
        report.not_converging = Some(done.not_converging).filter(|why| !why.is_empty());
        report.push_round(round);
        if done.then_stopped {
            let channels = lock(&self.shared.channels);
            let counters =
                channels.iter().map(|(_, counters)| counters.clone()).chain([lock(&self.shared.control).clone()]);
            let bytes = counters.map(|counters| counters.bytes.load(std::sync::atomic::Ordering::Relaxed));
            report.stopped_after(bytes.fold(0, u64::saturating_add));
        }
    }

    /// The guest stands still.
    fn on_stopped(&self, told: Stopped) {
        let now = Instant::now();
        *lock(&self.shared.stopped) = Some(now.checked_sub(told.stopped).unwrap_or(now));
        *lock(&self.shared.to_go) = ToGo::round(told.dirty_bytes);
        let status = if told.waits { Status::PreSwitchover } else { Status::Device };
        self.shared.set_status(Phase::Switchover, status);
    }

    fn on_section(&mut self, piece: Section) -> Result<(), Cause> {
        self.state_came.get_or_insert_with(BootInstant::now);
        self.device_state.add(piece)?;
        self.shared.set_status(Phase::Switchover, Status::Device);
        lock(&self.shared.report).device_state_bytes = self.device_state.bytes();
        Ok(())
    }

    /// Once the offer and everything it names are here: loads, checks, and says Ready.
    fn load_if_complete(&mut self) -> Result<(), Cause> {
        let Some(offer) = self.offer else { return Ok(()) };
        let arrived = match self.role {
            Role::Single => self.single_round >= offer.last_round,
            _ => self.all_connected() && self.channels.iter().all(|channel| channel.round >= offer.last_round),
        };
        if !arrived || self.state() != DestinationState::Loading {
            return Ok(());
        }
        // Every channel has brought all it had.
        self.suspicion = None;
        let began = Instant::now();
        self.placement.finish()?;
        let mut arrived = PageCounts::default();
        for (_, counters) in lock(&self.shared.channels).iter() {
            arrived += counters.pages();
        }
        if arrived != offer.pages {
            return Err(Cause::Incompatible {
                reason: format!("the source sent {}, but {arrived} arrived", offer.pages),
            });
        }
        let sections = self.device_state.take(offer.sections)?;
        let (calls, limit) = (self.shared.guest.calls(), self.shared.switchover_limit());
        calls.note_state(&sections);
        let age = self.age(offer);
        calls.call(MachineStep::Load, limit, &self.shared.cpu, move |machine| machine.load_aged(sections, age))?;
        self.running.load = began.elapsed();
        *lock(&self.shared.to_go) = ToGo::round(0);
        self.note_parts(offer);
        self.advance(DestinationEvent::Loaded, Heard::default())
    }

    /// When the state was saved: after the source had heard that all rounds but the last are here, by at least as much as its
    /// own clock says that the guest had stood still by then; and before any of the state came.
    fn age(&self, offer: Offer) -> StateAge {
        let [pause, wait, ram, ..] = offer.parts;
        let stood = Duration::from_nanos(pause.saturating_add(wait).saturating_add(ram));
        let before = self.state_came.unwrap_or_else(BootInstant::now);
        StateAge::saved(self.acknowledged.before(offer.last_round) + stood, before)
    }

    fn on_lost(&mut self, cause: Cause) -> Result<(), Cause> {
        let silent = self.link.as_ref().and_then(|link| link.watch.as_ref()).and_then(Watch::found_silence);
        let cause = silent
            .map_or(cause, |after| Cause::Silent { waiting_for: "a sign of life on the control connection", after });
        self.without_link(cause)
    }

    /// There is no connection for messages any more.
    fn without_link(&mut self, cause: Cause) -> Result<(), Cause> {
        self.link = None;
        self.advance(DestinationEvent::LinkLost, Heard::default())?;
        match self.state() {
            DestinationState::Ready => {
                // Not the end: the source connects again, or a person decides.
                let error = self.shared.error(Cause::Orphaned { last: cause.to_string() });
                lock(&self.shared.report).error = Some((&error).into());
            }
            DestinationState::Aborted => self.cause = self.suspicion.take().map(|(cause, _)| cause).or(Some(cause)),
            _ => {}
        }
        Ok(())
    }

    fn on_channel_lost(&mut self, cause: Cause) -> Result<(), Cause> {
        if self.state() != DestinationState::Loading || self.suspicion.is_some() {
            return Ok(());
        }
        match cause {
            Cause::Closed { .. } | Cause::Io { .. } => {
                self.suspicion = Some((cause, Instant::now() + REASON));
                Ok(())
            }
            wrong => Err(wrong),
        }
    }

    fn on_again(&mut self, connection: Connection) -> Result<(), Cause> {
        self.link = None;
        let carries = Carries::Control { link: self.links };
        let linked =
            answer_hello(&connection, &HelloReply::Welcome).and_then(|()| self.link(connection, carries, None));
        match linked {
            Ok(()) => {
                self.shared.guest.reconnected(self.coming);
                Ok(())
            }
            // As if it had not come: the source comes again, or a person decides.
            Err(cause) => self.without_link(cause),
        }
    }

    /// Advances the handover and sends what is to be sent.
    fn advance(&mut self, event: DestinationEvent, heard: Heard) -> Result<(), Cause> {
        let began = Instant::now();
        let mut came = self.shared.guest.come(self.coming, event, heard, self.shared.switchover_limit())?;
        self.epoch = came.say.epoch;
        if came.actions.contains(&DestinationAction::StartGuest) && came.state == DestinationState::Running {
            self.running.resume = began.elapsed();
        }
        if let Some(error) = came.error.take()
            && matches!(came.state, DestinationState::Aborted | DestinationState::Kept)
        {
            self.cause = Some(error.into());
        }
        if came.before != came.state {
            self.enter(&came);
        }
        for action in &came.actions {
            let message = match action {
                DestinationAction::SendReady => {
                    Message::Ready(Ready { epoch: came.say.epoch, question: came.say.question })
                }
                DestinationAction::SendRunning => {
                    self.running.cpu = self.shared.cpu.total();
                    self.running.epoch = came.say.epoch;
                    Message::Running(self.running)
                }
                DestinationAction::SendAborted => Message::Abort(self.abort()),
                DestinationAction::SendKept => Message::Abort(self.kept()),
                DestinationAction::StartGuest | DestinationAction::RevokeStart | DestinationAction::PauseGuest => {
                    continue;
                }
            };
            // A message that cannot be sent is asked for again over another connection.
            let _ = self.send(&message);
        }
        Ok(())
    }

    /// What the downtime has been made of when everything is here: the source's parts as the offer has them, the loading by
    /// this side's clock. Short of what the offer was on its way.
    fn note_parts(&self, offer: Offer) {
        let parts = DowntimeParts::from_nanoseconds(offer.parts).unwrap_or_default();
        let load_seconds = self.offered.map_or(0.0, |offered| offered.elapsed().as_secs_f64());
        *lock(&self.shared.ready) = Some((DowntimeParts { load_seconds, ..parts }, Instant::now()));
    }

    /// What a state means for the report.
    fn enter(&self, came: &Came) {
        match came.state {
            DestinationState::Ready => self.shared.set_status(Phase::Handover, Status::Device),
            DestinationState::Running => {
                self.learn();
                self.shared.note_arrival();
            }
            DestinationState::Kept if came.before == DestinationState::Running => {
                self.note_conflict("the source decided later and runs it; it is paused here");
                self.shared.changed.notify_all();
            }
            DestinationState::Kept => {
                let why = self.cause.as_ref().map_or_else(String::new, ToString::to_string);
                let error = self.shared.error(Cause::MayHaveRun { why });
                let mut report = lock(&self.shared.report);
                report.error = Some((&error).into());
                self.shared.change_status(&mut report, Status::Failed);
                self.shared.changed.notify_all();
            }
            _ => {}
        }
    }

    fn abort(&self) -> Abort {
        let reason = match &self.cause {
            Some(Cause::Incompatible { .. }) => AbortReason::Refused,
            Some(Cause::Cancelled) => AbortReason::Cancelled,
            Some(Cause::GuestEnded { end }) => AbortReason::Ended(*end),
            _ => AbortReason::Failed,
        };
        let text = match &self.cause {
            Some(Cause::Incompatible { reason }) => reason.clone(),
            Some(cause) => cause.to_string(),
            None => "the destination gave up".to_owned(),
        };
        Abort { reason, guest: self.shared.guest.place(Side::Destination), epoch: self.epoch, text }
    }

    fn kept(&self) -> Abort {
        let text = match &self.cause {
            Some(cause) => cause.to_string(),
            None => "the destination keeps the guest, paused".to_owned(),
        };
        let guest = self.shared.guest.place(Side::Destination);
        Abort { reason: AbortReason::Kept, guest, epoch: self.epoch, text }
    }

    /// Something failed on this side.
    fn fail(&mut self, cause: Cause) {
        let wanted = matches!(cause, Cause::Cancelled);
        match self.state() {
            DestinationState::Loading => {}
            DestinationState::Ready if wanted => {}
            // What a connection brings that makes no sense costs that connection, and nothing else: this may be the only
            // copy of the guest.
            DestinationState::Aborted => return,
            _ => return drop(self.without_link(cause)),
        }
        let _ = self.placement.close();
        self.cause = Some(cause);
        let _ = self.advance(DestinationEvent::Failed, Heard::default());
    }

    /// Closes everything; tells how it ended.
    fn end(mut self) -> Ended {
        let _ = self.placement.close();
        if let Some(link) = &self.link {
            link.connection.finish(LAST_WORD);
        }
        self.link = None;
        self.channels.clear();
        // What stays undecided can be decided without this session.
        self.shared.guest.disconnected(self.coming);
        let state = self.state();
        let ended = Ended { id: self.id, state, epoch: self.epoch, running: self.running, abort: self.abort() };
        if state != DestinationState::Aborted {
            return ended;
        }
        let status = match &self.cause {
            Some(Cause::Cancelled | Cause::CancelledByPeer { .. }) => Status::Cancelled,
            _ => Status::Failed,
        };
        let cause = self.cause.take().unwrap_or(Cause::Closed { channel: self.shared.local_uri.to_string() });
        let error = self.shared.error(cause);
        let mut report = lock(&self.shared.report);
        report.total_seconds = lock(&self.shared.began).map_or(0.0, |began| began.elapsed().as_secs_f64());
        let mut pages = PageCounts::default();
        lock(&self.shared.channels).iter().for_each(|(_, counters)| pages += counters.pages());
        let to_go = self.shared.to_go(pages.total());
        report.ram.remaining_bytes = to_go.bytes();
        report.ram.round_remaining_bytes = to_go.of_round();
        report.error = Some((&error).into());
        self.shared.change_status(&mut report, status);
        self.shared.changed.notify_all();
        ended
    }
}

fn peer_aborted(abort: Abort) -> Cause {
    let by = Side::Source;
    match abort.reason {
        AbortReason::Cancelled => Cause::CancelledByPeer { by },
        AbortReason::Ended(end) => Cause::GuestEnded { end },
        AbortReason::Failed | AbortReason::Kept => Cause::Peer { by, reason: abort.text },
        AbortReason::Refused => Cause::Refused { by, reason: abort.text },
    }
}
