//! The receiving side.
//!
//! [`Destination`] is the handle. Behind it a thread accepts connections (`acceptor`), one drives the session of the
//! migration that is coming in (`session`), and one a channel receives (`receive`) and puts pages in their place
//! (`placement`). Queries are answered from [`Shared`] and never wait for any of them.

mod acceptor;
mod compatibility;
mod device_state;
mod links;
mod placement;
mod receive;
mod session;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::channel::{Connection, Listener, Uri};
use crate::error::{Cause, GuestError, MigrationError, Phase, Side, one_line};
use crate::guest::{Guest, GuestEvent};
use crate::handover::DestinationState;
use crate::link::{ChannelCounters, CpuTime, Place, lock, spawn};
use crate::memory::PAGE_SIZE;
use crate::parameters::{ParameterError, Parameters};
use crate::report::{CONTINUED, DECIDED, DowntimeParts, LOADED, RELEASED, REST_ARRIVES, Report, STARTED, Status};
use crate::to_go::ToGo;
use crate::wire::{Message, SessionId};

/// What the session's thread hears.
enum Event {
    /// The source said something.
    Message(Message, Place),
    /// Everything of a round has arrived on a channel.
    Mark { channel: u8, round: u32, place: Place },
    /// The connection that carried the session's messages, the one of this number, is lost, or what came on it is wrong.
    Lost { link: u32, cause: Cause },
    /// The same of a data channel.
    ChannelLost(Cause),
    /// A data channel has connected and said hello.
    Data { index: u8, connection: Connection },
    /// The source has connected again.
    Again(Connection),
    /// Somebody on this side wants an end.
    Cancel,
    /// A person has decided that the guest is here, or has tried to.
    Decided,
    /// The handle was dropped.
    Close,
}

/// The session of the migration that is coming in.
struct Current {
    id: SessionId,
    /// The migration's number at the guest, where its handover stands.
    coming: u64,
    events: Sender<Event>,
}

/// What all threads of a destination, and the handle, share.
struct Shared {
    guest: Arc<Guest>,
    parameters: Mutex<Parameters>,
    local_uri: Uri,
    session: Mutex<Option<Current>>,
    /// What the downtime was made of when everything was here, and when that was.
    ready: Mutex<Option<(DowntimeParts, Instant)>>,
    /// Since when the guest stands still for the switchover, as the source has told.
    stopped: Mutex<Option<Instant>>,
    /// When the present or latest session began.
    began: Mutex<Option<Instant>>,
    phase: Mutex<Phase>,
    report: Mutex<Report>,
    changed: Condvar,
    control: Mutex<Arc<ChannelCounters>>,
    channels: Mutex<Vec<(u8, Arc<ChannelCounters>)>>,
    /// Pages of all rounds that the source has told the end of.
    pages_in_rounds: AtomicU64,
    /// The present round, as its beginning was told.
    to_go: Mutex<ToGo>,
    cpu: Arc<CpuTime>,
    /// Written to when the acceptor has something to look at.
    wake: OwnedFd,
    stop: AtomicBool,
    /// No connection is accepted any more.
    closed: AtomicBool,
}

impl Shared {
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn error(&self, cause: Cause) -> MigrationError {
        let phase = *lock(&self.phase);
        MigrationError { side: Side::Destination, phase, guest: self.guest.place(Side::Destination), cause }
    }

    /// Records a connection that came to nothing.
    fn refused(&self, peer: &str, reason: &str) {
        let mut report = lock(&self.report);
        report.refused_connections.count += 1;
        report.refused_connections.latest = Some(one_line(&format!("{peer}: {reason}")));
    }

    /// The one place where the status changes, so that who watches hears of it.
    fn change_status(&self, report: &mut Report, status: Status) {
        if std::mem::replace(&mut report.status, status) != status {
            self.guest.tell(GuestEvent::Migration { side: Side::Destination, status });
        }
    }

    fn set_status(&self, phase: Phase, status: Status) {
        *lock(&self.phase) = phase;
        self.change_status(&mut lock(&self.report), status);
        self.changed.notify_all();
    }

    fn switchover_limit(&self) -> Duration {
        lock(&self.parameters).switchover_limit()
    }

    /// The guest is here.
    fn note_arrival(&self) {
        self.guest.end_migration();
        let mut report = lock(&self.report);
        report.total_seconds = lock(&self.began).map_or(0.0, |began| began.elapsed().as_secs_f64());
        report.error = None;
        report.not_converging = None;
        // Until the source says it exactly, which it may not live to do.
        let (parts, ready) = lock(&self.ready).unwrap_or_else(|| (DowntimeParts::default(), Instant::now()));
        let parts = DowntimeParts { handover_seconds: ready.elapsed().as_secs_f64(), ..parts };
        (report.ram.remaining_bytes, report.ram.round_remaining_bytes) = (0, 0);
        report.downtime_seconds = parts.total_seconds();
        report.downtime_parts = Some(parts);
        self.change_status(&mut report, Status::Completed);
        self.changed.notify_all();
    }

    /// A person has decided that the guest is here.
    fn on_decision(&self) {
        let arrived = match &*lock(&self.session) {
            Some(current) => {
                // The source may have asked meanwhile, and still waits for the answer.
                let _ = current.events.send(Event::Decided);
                self.guest.coming_at(current.coming) == Some(DestinationState::Running)
            }
            None => false,
        };
        if arrived {
            self.note_arrival();
        }
    }

    /// What is to go after `pages` in all have come.
    fn to_go(&self, pages: u64) -> ToGo {
        let arrived = pages.saturating_sub(self.pages_in_rounds.load(Ordering::Relaxed));
        lock(&self.to_go).with_done(arrived.saturating_mul(PAGE_SIZE))
    }

    /// What is waited for while the guest stands still, as far as it is known here that it does.
    fn waiting_for(&self, status: Status, state: Option<DestinationState>) -> Option<&'static str> {
        if self.guest.waits_for_decision() {
            return Some(DECIDED);
        }
        match (status, state) {
            (Status::PreSwitchover, _) => Some(CONTINUED),
            (Status::Device, Some(DestinationState::Ready)) => Some(RELEASED),
            (Status::Device, Some(DestinationState::Starting)) => Some(STARTED),
            (Status::Device, _) if *lock(&self.phase) == Phase::Handover => Some(LOADED),
            (Status::Device, _) => Some(REST_ARRIVES),
            _ => None,
        }
    }

    fn snapshot(&self) -> Report {
        let coming = lock(&self.session).as_ref().map(|current| current.coming);
        let state = coming.and_then(|id| self.guest.coming_at(id));
        // With the lock held to the end, so that figures of one session never stand beside another's, and none goes back.
        let shown = lock(&self.report);
        let mut report = shown.clone();
        if !report.status.is_final()
            && let Some(began) = *lock(&self.began)
        {
            report.total_seconds = began.elapsed().as_secs_f64();
        }
        if report.status.is_final() {
            report.vcpu_throttle_percent.clear();
        }
        report.guest = self.guest.place(Side::Destination);
        if let Some(stopped) = *lock(&self.stopped)
            && let Some(waiting_for) = self.waiting_for(report.status, state)
        {
            report.stands_still(stopped, Some(waiting_for));
        }
        report.ram.transferred_bytes = lock(&self.control).bytes.load(Ordering::Relaxed);
        for (index, counters) in lock(&self.channels).iter() {
            let channel = counters.report(*index);
            report.ram.transferred_bytes += channel.transferred_bytes;
            report.ram.pages += channel.pages;
            report.channels.push(channel);
        }
        report.fill_in_precopy();
        if !report.status.is_final() {
            let to_go = self.to_go(report.ram.pages.total());
            report.ram.remaining_bytes = to_go.bytes();
            report.ram.round_remaining_bytes = to_go.of_round();
        }
        report.channels.sort_by_key(|channel| channel.index);
        report.cpu_seconds.destination = Some(self.cpu.total().as_secs_f64());
        report.summarize();
        report
    }
}

/// A machine waiting for, receiving, or having received a migration, on threads of its own.
///
/// After a failed migration it listens on for another, where its address can take one. Dropping it ends it and waits
/// for its threads; a guest that has arrived stays, and so does one that is complete here and undecided:
/// [`Guest::take_back`] decides it.
pub struct Destination {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination").field("uri", &self.shared.local_uri).finish_non_exhaustive()
    }
}

impl Destination {
    /// Listens on `uri` for a migration into `guest`.
    ///
    /// # Errors
    /// When the guest is here already, or the address cannot be listened on.
    pub fn listen(guest: &Arc<Guest>, uri: &Uri, parameters: &Parameters) -> Result<Self, MigrationError> {
        let failed = |cause| MigrationError {
            side: Side::Destination,
            phase: Phase::Setup,
            guest: guest.place(Side::Destination),
            cause,
        };
        parameters.check().map_err(|e| failed(e.into()))?;
        guest.begin_incoming().map_err(|e| failed(e.into()))?;
        Self::start(guest, uri, parameters).map_err(|cause| {
            guest.end_migration();
            failed(cause)
        })
    }

    fn start(guest: &Arc<Guest>, uri: &Uri, parameters: &Parameters) -> Result<Self, Cause> {
        let listener = Listener::bind(uri)?;
        let wake =
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK)
                .map_err(|e| Cause::Io { doing: "make", target: "an eventfd".into(), source: e.into() })?;
        let mut report = Report::new(Side::Destination, guest.place(Side::Destination));
        report.status = Status::Setup;
        report.ram.total_bytes = guest.machine().ram().total_bytes();
        report.downtime_limit_seconds = parameters.downtime_limit.as_secs_f64();
        let shared = Arc::new(Shared {
            guest: guest.clone(),
            parameters: Mutex::new(parameters.clone()),
            local_uri: listener.local_uri(),
            session: Mutex::default(),
            ready: Mutex::default(),
            stopped: Mutex::default(),
            began: Mutex::default(),
            phase: Mutex::new(Phase::Setup),
            report: Mutex::new(report),
            changed: Condvar::new(),
            control: Mutex::default(),
            channels: Mutex::default(),
            pages_in_rounds: AtomicU64::new(0),
            to_go: Mutex::new(ToGo::round(guest.machine().ram().total_bytes())),
            cpu: Arc::default(),
            wake,
            stop: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        guest.tell(GuestEvent::Migration { side: Side::Destination, status: Status::Setup });
        let accepting = shared.clone();
        let acceptor = spawn("destination acceptor", move || acceptor::run(&accepting, listener))?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }

    /// The address listened on, with the port that was chosen if it was 0.
    pub fn local_uri(&self) -> &Uri {
        &self.shared.local_uri
    }

    /// Whether a migration can still come in, or the source of one that has come in may still ask after it.
    pub fn is_listening(&self) -> bool {
        !self.shared.closed.load(Ordering::Acquire)
    }

    /// Where the current or latest migration stands.
    pub fn report(&self) -> Report {
        self.shared.snapshot()
    }

    /// Ends the incoming migration, if there is one, and returns at once. The guest goes on at the source; this side
    /// listens on.
    ///
    /// # Errors
    /// When the guest is here already, or waits here for a decision and may be the only copy.
    pub fn cancel(&self) -> Result<(), MigrationError> {
        let session = lock(&self.shared.session);
        let Some(current) = &*session else { return Ok(()) };
        match self.shared.guest.coming_at(current.coming) {
            Some(DestinationState::Starting | DestinationState::Running) => {
                Err(self.shared.error(GuestError::Occupied.into()))
            }
            _ if self.shared.guest.waits_for_decision() => Err(self.shared.error(GuestError::Undecided.into())),
            _ => {
                let _ = current.events.send(Event::Cancel);
                Ok(())
            }
        }
    }

    /// Changes parameters: all of them while a migration is only waited for, the live ones under way.
    ///
    /// # Errors
    /// When one of them has no place in its range, or is not live and a migration runs; nothing is changed then.
    pub fn set_parameters(&self, wanted: &Parameters) -> Result<(), ParameterError> {
        wanted.check()?;
        // Held, so that no migration begins in between.
        let session = lock(&self.shared.session);
        let mut parameters = lock(&self.shared.parameters);
        if session.is_none() {
            parameters.clone_from(wanted);
            return Ok(());
        }
        parameters.change_live(wanted)
    }

    /// Waits until the guest is here, or no further migration can come in, or the guest is here and only a person can say
    /// whether it is to run.
    pub fn wait(&self) -> Report {
        let mut report = lock(&self.shared.report);
        let kept = |report: &Report| report.status == Status::Failed && self.shared.guest.waits_for_decision();
        while report.status != Status::Completed && !kept(&report) && !self.shared.closed.load(Ordering::Acquire) {
            report = self.shared.changed.wait(report).unwrap_or_else(PoisonError::into_inner);
        }
        drop(report);
        self.report()
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}
