//! The sending side.
//!
//! [`Source`] is the handle. Behind it one thread drives the migration (`migration`: setup, precopy rounds,
//! switchover), a worker a channel sends pages, a reader listens to the destination, a watch keeps the connections alive.
//! They meet in one queue of events that the driving thread reads, and in [`Shared`], which reports are made from.

mod auto_converge;
mod contention;
mod convergence;
mod costs;
mod dirty;
mod frame;
mod marks;
mod migration;
mod pacing;
mod setup;
mod switchover;
mod throttling;
mod versions;
mod worker;
mod workers;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::channel::{Connection, Uri};
use crate::clock::Contact;
use crate::error::{Cause, GuestError, GuestPlace, MigrationError, Phase, Side};
use crate::guest::{Ground, Guest, GuestEvent};
use crate::handover::SourceState;
use crate::link::{ChannelCounters, CpuTime, Place, lock, spawn};
use crate::parameters::{ParameterError, Parameters};
use crate::report::{CONTINUED, DECIDED, DeltaCounts, DowntimeParts, LOADED, REST_ARRIVES, Report, STARTED, Status};
use crate::sync::now;
use crate::wire::{Message, Offer, SessionId};
pub(crate) use auto_converge::ThrottlePolicy;
use pacing::Pacer;
use setup::Control;
use worker::Common;

/// What the driving thread hears.
enum Event {
    /// A worker has ended its round.
    Worker(Result<Instant, Cause>),
    /// The destination said something.
    Message(Message, Place),
    /// The control connection is lost.
    Lost(Cause),
    /// Somebody asked for an end, or the guest has ended.
    Cancel,
    /// Somebody has the migration go on from pre-switchover.
    Continue,
}

/// What all threads of a migration, and the handle, share.
struct Shared {
    guest: Arc<Guest>,
    /// The migration's number at the guest, where its handover stands.
    id: u64,
    uri: Uri,
    /// Where it is a descriptor: what that named when it was given.
    given: Mutex<Option<Connection>>,
    began: Instant,
    parameters: Mutex<Parameters>,
    pacer: Arc<Pacer>,
    /// The guest is stopped, and the bandwidth limit is what it is then.
    paced_stopped: AtomicBool,
    /// Somebody asked for an end, or the guest has ended.
    stop: AtomicBool,
    /// The handle was dropped: nobody waits for an answer any more.
    abandoned: AtomicBool,
    events: Mutex<Option<Sender<Event>>>,
    session: Mutex<Option<SessionId>>,
    offer: Mutex<Option<Offer>>,
    /// When the switchover's time began to run.
    switchover: Mutex<Option<Instant>>,
    /// When the destination was last heard of.
    contact: Arc<Contact>,
    phase: Mutex<Phase>,
    report: Mutex<Report>,
    ended: Condvar,
    control: Arc<ChannelCounters>,
    channels: Mutex<Vec<Arc<ChannelCounters>>>,
    /// While pages are being sent.
    common: Mutex<Option<Arc<Common>>>,
    cpu: Arc<CpuTime>,
    throttling: ThrottlePolicy,
    /// A connection on which an answer to a hello is awaited.
    greeting: Mutex<Option<Arc<Connection>>>,
    /// The quickest answer so far.
    round_trip: Mutex<Duration>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    fn set_phase(&self, phase: Phase, status: Status) {
        *lock(&self.phase) = phase;
        let mut report = lock(&self.report);
        if report.status != Status::Cancelling {
            self.set_status(&mut report, status);
        }
    }

    /// The one place where the status changes, so that who watches hears of it.
    fn set_status(&self, report: &mut Report, status: Status) {
        if std::mem::replace(&mut report.status, status) != status {
            self.guest.tell(GuestEvent::Migration { side: Side::Source, status });
        }
    }

    /// From here on the bandwidth limit is that for a guest that is stopped.
    fn pace_stopped(&self) {
        let parameters = lock(&self.parameters);
        self.paced_stopped.store(true, Ordering::Relaxed);
        self.pace(&parameters);
    }

    /// Sets the bandwidth limit. The parameters are locked all the while, so that the latest counts.
    fn pace(&self, parameters: &Parameters) {
        let Parameters { max_bandwidth, avail_switchover_bandwidth, .. } = *parameters;
        self.pacer.set_rate(match self.paced_stopped.load(Ordering::Relaxed) {
            true => convergence::limit_when_stopped(max_bandwidth, avail_switchover_bandwidth),
            false => max_bandwidth,
        });
    }

    /// The destination took `duration` for an answer.
    fn answered_within(&self, duration: Duration) {
        let mut round_trip = lock(&self.round_trip);
        *round_trip = round_trip.min(duration);
    }

    fn transferred_bytes(&self) -> u64 {
        let load = |counters: &ChannelCounters| counters.bytes.load(Ordering::Relaxed);
        let data = lock(&self.channels).iter().map(|counters| load(counters)).fold(0, u64::saturating_add);
        load(&self.control).saturating_add(data)
    }

    /// The next message of the destination; everything else is an error.
    fn next_message(&self, incoming: &Receiver<Event>, control: &Control) -> Result<Message, Cause> {
        loop {
            match self.next_event(incoming, control)? {
                Event::Message(message, _) => return Ok(message),
                Event::Continue => {}
                _ => return Err(Cause::Unexpected { message: "a worker's answer", expected: "a message" }),
            }
        }
    }

    /// The next event, with the ones that end a migration turned into errors.
    fn next_event(&self, incoming: &Receiver<Event>, control: &Control) -> Result<Event, Cause> {
        let stopped = lock(&self.switchover).is_some();
        let event = match stopped {
            false => incoming.recv().map_err(|_| RecvTimeoutError::Disconnected),
            true => incoming.recv_timeout(self.time_left()),
        };
        match event {
            Ok(event) => self.sorted(event, control),
            Err(RecvTimeoutError::Timeout) => Err(self.too_slow("the last pages to arrive")),
            Err(RecvTimeoutError::Disconnected) => Err(Cause::Thread { thread: "source reader", what: "ended".into() }),
        }
    }

    /// The switchover's time is over.
    fn too_slow(&self, waiting_for: &'static str) -> Cause {
        Cause::SwitchoverTimeout { waiting_for, after: self.switchover_timeout() }
    }

    /// Turns an event that ends a migration into an error.
    fn sorted(&self, event: Event, control: &Control) -> Result<Event, Cause> {
        match event {
            Event::Lost(cause) => Err(self.lost(control, cause)),
            Event::Cancel => Err(Cause::Cancelled),
            event => Ok(event),
        }
    }

    /// A data channel failed. If the destination closed it, it says why on the control connection.
    fn reason_for(&self, cause: Cause, incoming: &Receiver<Event>) -> Cause {
        const REASON: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + REASON;
        while let Ok(event) = incoming.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            match event {
                Event::Message(Message::Abort(abort), _) => return setup::aborted(&abort),
                Event::Cancel => return Cause::Cancelled,
                // What carries everything is lost as a whole, and its reader knows more.
                Event::Lost(lost @ Cause::Command { .. }) => return lost,
                Event::Lost(_) => return cause,
                Event::Message(..) | Event::Worker(_) | Event::Continue => {}
            }
        }
        cause
    }

    /// What ended a migration that somebody wants ended, or whose guest has ended: not what became of its connections then.
    fn or_wanted(&self, cause: Cause) -> Cause {
        if let Some(end) = self.guest.end() {
            return Cause::GuestEnded { end };
        }
        if cause.is_of_link() && self.stop.load(Ordering::Acquire) { Cause::Cancelled } else { cause }
    }

    /// Has the driving thread end the migration, whatever it waits for.
    fn end_soon(&self) {
        self.stop.store(true, Ordering::Release);
        if let Some(connection) = &*lock(&self.greeting) {
            connection.shutdown();
        }
        if let Some(events) = &*lock(&self.events) {
            let _ = events.send(Event::Cancel);
        }
    }

    /// Why the control connection was lost: the watch knows better than the socket.
    fn lost(&self, control: &Control, cause: Cause) -> Cause {
        if let Some(after) = control.found_silence() {
            return Cause::Silent { waiting_for: "a sign of life on the control connection", after };
        }
        cause
    }

    /// A part of the downtime is over and took so long.
    fn note_part(&self, part: fn(&mut DowntimeParts) -> &mut f64, seconds: f64) {
        *part(lock(&self.report).downtime_parts.get_or_insert_default()) = seconds;
    }

    /// The time of the switchover runs from now.
    fn begin_switchover(&self) {
        let now = now();
        *lock(&self.switchover) = Some(now);
    }

    /// Somebody else says when the switchover goes on: no time of it runs.
    fn suspend_switchover(&self) {
        *lock(&self.switchover) = None;
    }

    fn switchover_timeout(&self) -> Duration {
        lock(&self.parameters).switchover_limit()
    }

    /// What is left of the switchover's time.
    fn time_left(&self) -> Duration {
        let began = *lock(&self.switchover);
        let passed = began.map_or(Duration::ZERO, |began| now().saturating_duration_since(began));
        self.switchover_timeout().saturating_sub(passed)
    }

    fn error(&self, phase: Phase, cause: Cause) -> MigrationError {
        MigrationError { side: Side::Source, phase, guest: self.guest.place(Side::Source), cause }
    }

    /// The end of the migration.
    fn end(&self, result: Result<(), Cause>) {
        let phase = *lock(&self.phase);
        let status = match &result {
            Ok(()) => Status::Completed,
            Err(Cause::Cancelled | Cause::CancelledByPeer { .. }) => Status::Cancelled,
            Err(_) => Status::Failed,
        };
        let snapshot = self.snapshot();
        {
            let mut report = lock(&self.report);
            report.ram.remaining_bytes = snapshot.ram.remaining_bytes;
            report.ram.round_remaining_bytes = snapshot.ram.round_remaining_bytes;
        }
        // The tracker goes first: once the migration is over somebody else may want one. It takes its time, which nobody
        // who asks for a report must wait for.
        let common = lock(&self.common).take();
        drop(common);
        // One that it has not come to.
        let given = lock(&self.given).take();
        drop(given);
        self.guest.end_migration();
        let mut report = lock(&self.report);
        report.total_seconds = self.began.elapsed().as_secs_f64();
        if status == Status::Completed {
            (report.ram.remaining_bytes, report.ram.round_remaining_bytes) = (0, 0);
            report.not_converging = None;
        }
        report.error = result.err().map(|cause| (&self.error(phase, cause)).into());
        self.set_status(&mut report, status);
        drop(report);
        self.ended.notify_all();
    }

    fn snapshot(&self) -> Report {
        // First: what there is no more of by now is in the report.
        let to_go = lock(&self.common).as_ref().map(|common| common.dirty.to_go());
        let mut report = {
            // With the lock held, so that the time does not go back when the migration ends, nor the bytes of precopy when
            // the guest is stopped.
            let mut shown = lock(&self.report);
            if !shown.status.is_final() {
                shown.total_seconds = self.began.elapsed().as_secs_f64();
            }
            let mut report = shown.clone();
            report.channels =
                lock(&self.channels).iter().enumerate().map(|(index, counters)| counters.report(index as u8)).collect();
            report.ram.transferred_bytes = self.control.bytes.load(Ordering::Relaxed);
            for channel in &report.channels {
                report.ram.pages += channel.pages;
                report.ram.transferred_bytes = report.ram.transferred_bytes.saturating_add(channel.transferred_bytes);
            }
            report.fill_in_precopy();
            report
        };
        if let Some(to_go) = to_go
            && !report.status.is_final()
        {
            report.ram.remaining_bytes = to_go.bytes();
            report.ram.round_remaining_bytes = to_go.of_round();
        }
        report.vcpu_throttle_percent =
            if report.status.is_final() { Vec::new() } else { self.guest.throttled_for_migration() };
        report.guest = self.guest.place(Side::Source);
        let times = self.guest.leaving_times(self.id);
        let runs = matches!(report.guest, GuestPlace::RunningAtSource | GuestPlace::RunningAtDestination);
        if let (Some(stopped), None, false) = (times.stopped, times.ended, runs) {
            report.stands_still(stopped, self.waiting_for(report.status));
        }
        if let Some(error) = &mut report.error {
            // A person may have decided since.
            error.moved_to(report.guest);
        }
        report.downtime_limit_seconds = lock(&self.parameters).downtime_limit.as_secs_f64();
        report.delta = self.delta_counts();
        report.cpu_seconds.source = Some(self.cpu.total().as_secs_f64());
        report.summarize();
        report
    }

    /// What is waited for while the guest stands still.
    fn waiting_for(&self, status: Status) -> Option<&'static str> {
        Some(match (status, self.guest.leaving_at(self.id)) {
            (Status::PreSwitchover, _) => CONTINUED,
            (Status::Device, Some(SourceState::Offered)) => LOADED,
            (Status::Device, Some(SourceState::Released)) => STARTED,
            (Status::Device, _) => REST_ARRIVES,
            (Status::Failed | Status::Cancelled, Some(SourceState::Released)) => DECIDED,
            _ => return None,
        })
    }

    fn delta_counts(&self) -> DeltaCounts {
        let mut total = DeltaCounts::default();
        for counters in lock(&self.channels).iter() {
            total += *lock(&counters.delta);
        }
        total
    }
}

/// A migration out of this process, running on threads of its own. Dropping it cancels it and waits for its threads.
pub struct Source {
    shared: Arc<Shared>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("uri", &self.shared.uri).finish_non_exhaustive()
    }
}

impl Source {
    /// Starts migrating `guest` to `uri`. Returns as soon as the migration runs; [`wait`](Self::wait) for its end.
    ///
    /// # Errors
    /// When the guest is not here, is being migrated already, or no thread can be started. Everything later is told
    /// by the report.
    pub fn start(guest: &Arc<Guest>, uri: &Uri, parameters: &Parameters) -> Result<Self, MigrationError> {
        Self::start_with(guest, uri, parameters, ThrottlePolicy::ByNeed)
    }

    pub(crate) fn start_with(
        guest: &Arc<Guest>,
        uri: &Uri,
        parameters: &Parameters,
        throttling: ThrottlePolicy,
    ) -> Result<Self, MigrationError> {
        let failed =
            |cause| MigrationError { side: Side::Source, phase: Phase::Setup, guest: guest.place(Side::Source), cause };
        parameters.check().map_err(|e| failed(e.into()))?;
        let contact: Arc<Contact> = Arc::default();
        let cpu: Arc<CpuTime> = Arc::default();
        let later: Arc<OnceLock<Weak<Shared>>> = Arc::default();
        let id = {
            let (decided, ended) = (later.clone(), later.clone());
            let on_decision = Arc::new(move || {
                if let Some(shared) = decided.get().and_then(Weak::upgrade) {
                    switchover::on_decision(&shared);
                }
            });
            let on_end = Arc::new(move || {
                if let Some(shared) = ended.get().and_then(Weak::upgrade) {
                    shared.end_soon();
                }
            });
            let (contact, cpu, link_timeout) = (contact.clone(), cpu.clone(), parameters.link_timeout);
            let ground = Ground { contact, link_timeout, cpu, on_decision, on_end };
            guest.begin_outgoing(ground).map_err(|e| failed(Cause::Guest(e)))?
        };
        let given = uri.given().map_err(|cause| {
            guest.end_migration();
            failed(cause)
        })?;
        let (sender, incoming) = mpsc::channel();
        let mut report = Report::new(Side::Source, guest.place(Side::Source));
        report.status = Status::Setup;
        guest.tell(GuestEvent::Migration { side: Side::Source, status: Status::Setup });
        report.ram.total_bytes = guest.machine().ram().total_bytes();
        report.ram.remaining_bytes = report.ram.total_bytes;
        report.ram.round_remaining_bytes = report.ram.total_bytes;
        let shared = Arc::new(Shared {
            guest: guest.clone(),
            id,
            uri: uri.clone(),
            given: Mutex::new(given),
            began: Instant::now(),
            pacer: Arc::new(Pacer::new(parameters.max_bandwidth)),
            parameters: Mutex::new(parameters.clone()),
            paced_stopped: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            events: Mutex::new(Some(sender.clone())),
            session: Mutex::default(),
            offer: Mutex::default(),
            switchover: Mutex::default(),
            contact,
            phase: Mutex::new(Phase::Setup),
            report: Mutex::new(report),
            ended: Condvar::new(),
            control: Arc::default(),
            channels: Mutex::default(),
            common: Mutex::default(),
            cpu,
            throttling,
            greeting: Mutex::default(),
            round_trip: Mutex::new(Duration::from_secs(1)),
            threads: Mutex::default(),
        });
        let _ = later.set(Arc::downgrade(&shared));
        if guest.end().is_some() {
            // In between, where nobody could be told.
            shared.end_soon();
        }
        let driver = shared.clone();
        let thread = spawn("source", move || migration::run(&driver, &sender, &incoming)).map_err(|cause| {
            guest.end_migration();
            failed(cause)
        })?;
        lock(&shared.threads).push(thread);
        Ok(Self { shared })
    }

    /// Where it stands, at any time, also after the end.
    pub fn report(&self) -> Report {
        self.shared.snapshot()
    }

    /// Asks for an end and returns at once. The guest goes on here.
    ///
    /// # Errors
    /// When the guest was released to the destination and not heard of since: then only the destination or a person
    /// can tell where it is. A migration that is over is not an error.
    pub fn cancel(&self) -> Result<(), MigrationError> {
        let shared = &self.shared;
        // Either the guest is released before, or it will not be.
        shared.guest.cancel_leaving(shared.id).map_err(|error| shared.error(Phase::Handover, error.into()))?;
        {
            let mut report = lock(&shared.report);
            if report.status.is_final() || shared.guest.leaving_at(shared.id) == Some(SourceState::Gone) {
                return Ok(());
            }
            shared.set_status(&mut report, Status::Cancelling);
        }
        shared.end_soon();
        Ok(())
    }

    /// Where it goes.
    pub fn uri(&self) -> &Uri {
        &self.shared.uri
    }

    /// Has a migration go on that waits in `waiting_in`; it may only be [`Status::PreSwitchover`].
    ///
    /// # Errors
    /// When it does not wait there.
    pub fn resume_switchover(&self, waiting_in: Status) -> Result<(), MigrationError> {
        let shared = &self.shared;
        let actual = lock(&shared.report).status;
        if waiting_in != actual || actual != Status::PreSwitchover {
            let error = GuestError::NotWaiting { expected: waiting_in, actual };
            return Err(shared.error(*lock(&shared.phase), error.into()));
        }
        if let Some(events) = &*lock(&shared.events) {
            let _ = events.send(Event::Continue);
        }
        Ok(())
    }

    /// Changes parameters under way.
    ///
    /// # Errors
    /// When one of them is not live; nothing is changed then.
    pub fn set_parameters(&self, wanted: &Parameters) -> Result<(), ParameterError> {
        let mut parameters = lock(&self.shared.parameters);
        parameters.change_live(wanted)?;
        self.shared.pace(&parameters);
        Ok(())
    }

    /// Waits for the end; may be called by several threads, and again.
    pub fn wait(&self) -> Report {
        let mut report = lock(&self.shared.report);
        while !report.status.is_final() {
            report = self.shared.ended.wait(report).unwrap_or_else(PoisonError::into_inner);
        }
        drop(report);
        self.report()
    }

    /// Tries again, for another `handover-timeout`, to reach the destination of a guest that was released and not
    /// heard of. Returns at once; [`wait`](Self::wait) for the answer.
    ///
    /// # Errors
    /// When nothing is undecided.
    pub fn reconnect(&self) -> Result<(), MigrationError> {
        let shared = &self.shared;
        shared.guest.begin_asking(shared.id).map_err(|error| shared.error(Phase::Handover, error.into()))?;
        {
            let mut report = lock(&shared.report);
            shared.set_status(&mut report, Status::Device);
            report.error = None;
        }
        let driver = shared.clone();
        match spawn("source", move || switchover::resolve(&driver)) {
            Ok(thread) => lock(&shared.threads).push(thread),
            Err(cause) => shared.end(Err(cause)),
        }
        Ok(())
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.cancel();
        // With the guest released, this must not wait for a peer that may never come back.
        self.shared.stop.store(true, Ordering::Release);
        self.shared.abandoned.store(true, Ordering::Release);
        if let Some(connection) = &*lock(&self.shared.greeting) {
            connection.shutdown();
        }
        if let Some(events) = lock(&self.shared.events).take() {
            let _ = events.send(Event::Cancel);
        }
        for thread in std::mem::take(&mut *lock(&self.shared.threads)) {
            let _ = thread.join();
        }
    }
}
