//! One machine, its migrations, and what may be asked of them.
//!
//! Two locks. `commands` is held through a command that changes something, so that such commands come one after the
//! other. `state` is held only to look at or exchange what is in it, so that a query never waits for a command.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dunlin::parameters::{Applies, ParameterError};
use dunlin::{
    Destination, Guest, GuestEnd, GuestError, MachineError, MigrationError, Ownership, PARAMETERS, Parameters, Report,
    Source, Status, TakeBack, Uri,
};
use serde_json::Value;

use crate::descriptors::{DescriptorError, Descriptors};
use crate::events::{Deliverer, Events, ShutdownCause};
use crate::migration_info;
use crate::route::Route;

/// What a machine found when it checked itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Verification {
    /// Everything is as it must be.
    pub good: bool,
    /// The finding, for programs.
    pub report: Value,
    /// The finding, in a sentence.
    pub summary: String,
}

/// A machine's way of checking itself, behind `x-verify`. Closures are such ways.
pub trait Verify: Send + Sync {
    /// Checks the machine, which is here.
    ///
    /// # Errors
    /// When it could not be checked.
    fn verify(&self) -> Result<Verification, MachineError>;
}

impl<F: Fn() -> Result<Verification, MachineError> + Send + Sync> Verify for F {
    fn verify(&self) -> Result<Verification, MachineError> {
        self()
    }
}

/// The states of a machine that QEMU has names for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RunState {
    /// It runs.
    Running,
    /// It is here, paused.
    Paused,
    /// It may come in.
    InMigrate,
    /// It is paused for a switchover, or was released and not yet heard of.
    FinishMigrate,
    /// It has gone.
    PostMigrate,
    /// It is here, and has ended.
    Shutdown,
}

impl RunState {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::InMigrate => "inmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::PostMigrate => "postmigrate",
            Self::Shutdown => "shutdown",
        }
    }

    /// What it means, for people.
    fn sentence(self) -> &'static str {
        match self {
            Self::Running => "it is running",
            Self::Paused => "it is paused",
            Self::InMigrate => "it may come in by a migration",
            Self::FinishMigrate => "it is being handed over",
            Self::PostMigrate => "it was migrated away; verify it at the destination",
            Self::Shutdown => "it has ended",
        }
    }

    /// Whether the guest runs here.
    pub fn is_running(self) -> bool {
        self == Self::Running
    }
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// A migration could not be started, ended or decided.
    #[error("{0}")]
    Migration(#[from] MigrationError),
    /// A parameter was refused.
    #[error("{0}")]
    Parameter(#[from] ParameterError),
    /// The guest cannot be started or stopped.
    #[error("{0}")]
    Guest(#[from] GuestError),
    /// A descriptor that was to be used by its name.
    #[error("{0}")]
    Descriptor(#[from] DescriptorError),
    /// `migrate-continue` when the migration does not wait there.
    #[error("Migration not in expected state: {actual}")]
    NotWaiting {
        /// Where it stands.
        actual: Status,
    },
    /// `resume` without an outgoing migration.
    #[error("there is no outgoing migration to resume; start one without 'resume'")]
    NothingToResume,
    /// A machine that is not here cannot be checked.
    #[error("the guest is not here to be verified: {}", .0.sentence())]
    NotHere(RunState),
    /// The machine has no way to check itself.
    #[error("this machine cannot verify itself")]
    CannotVerify,
    /// The guest can be asked for only where it was released to.
    #[error("the guest was released to {to}: it can be asked for only there; leave the address out")]
    ResumesElsewhere {
        /// Where it was released to.
        to: Uri,
    },
    /// Nothing is begun any more.
    #[error("this machine's process is ending")]
    Ending,
    /// Checking failed.
    #[error("could not verify the guest: {0}")]
    Verify(MachineError),
}

/// The migration that began last.
#[derive(Debug, Clone)]
enum Latest {
    None,
    Outgoing(Arc<Source>),
    Incoming(Arc<Destination>),
}

#[derive(Debug)]
struct State {
    /// For the next migration.
    parameters: Parameters,
    latest: Latest,
    /// What the latest migration goes by.
    in_force: Parameters,
    /// Kept while a migration out follows one in: the previous source may still ask it how that one ended.
    earlier_destination: Option<Arc<Destination>>,
}

/// A machine under control: its guest, its latest migration, the parameters for the next.
pub struct Vm {
    guest: Arc<Guest>,
    verifier: Option<Box<dyn Verify>>,
    commands: Mutex<()>,
    /// Nothing is begun any more.
    ending: AtomicBool,
    state: Mutex<State>,
    quit: Mutex<bool>,
    quit_changed: Condvar,
    descriptors: Descriptors,
    events: Events,
    /// The last of all: its thread ends at once when what it waits for is gone.
    deliverer: OnceLock<Deliverer>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("guest", &self.guest).field("state", &self.state()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    /// Takes control of `guest`.
    pub fn new(guest: Arc<Guest>, verifier: Option<Box<dyn Verify>>) -> Arc<Self> {
        let parameters = Parameters::default();
        let (events, bell) = Events::watch(&guest, parameters.events);
        let vm = Arc::new(Self {
            guest,
            verifier,
            commands: Mutex::new(()),
            ending: AtomicBool::new(false),
            state: Mutex::new(State {
                in_force: parameters.clone(),
                parameters,
                latest: Latest::None,
                earlier_destination: None,
            }),
            quit: Mutex::new(false),
            quit_changed: Condvar::new(),
            descriptors: Descriptors::default(),
            events,
            deliverer: OnceLock::new(),
        });
        vm.deliverer.get_or_init(|| Deliverer::start(bell, Arc::downgrade(&vm)));
        vm
    }

    /// The descriptors that clients have sent.
    pub(crate) fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// Who is told of what happens.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// Tells all clients what has happened until now.
    pub(crate) fn deliver_events(&self) {
        self.events.deliver();
    }

    /// For a command that begins something, until its end.
    fn begin(&self) -> Result<MutexGuard<'_, ()>, VmError> {
        let one_at_a_time = lock(&self.commands);
        if self.ending.load(Ordering::Acquire) { Err(VmError::Ending) } else { Ok(one_at_a_time) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn latest(&self) -> Latest {
        self.state().latest.clone()
    }

    /// The machine and the right to run it.
    pub fn guest(&self) -> &Arc<Guest> {
        &self.guest
    }

    /// What the guest does, in QEMU's words.
    pub fn run_state(&self) -> RunState {
        let migrated_in = matches!(self.state().latest, Latest::Incoming(_));
        match self.guest.ownership() {
            Ownership::Here | Ownership::HandingOver if self.guest.end().is_some() => RunState::Shutdown,
            Ownership::Here if self.guest.is_running() => RunState::Running,
            Ownership::Here => RunState::Paused,
            Ownership::Awaited => RunState::InMigrate,
            Ownership::Undecided if migrated_in => RunState::InMigrate,
            Ownership::HandingOver | Ownership::Undecided => RunState::FinishMigrate,
            Ownership::Gone => RunState::PostMigrate,
            _ => RunState::FinishMigrate,
        }
    }

    /// The report of the migration, out or in, that began last.
    pub fn report(&self) -> Option<Report> {
        match self.latest() {
            Latest::None => None,
            Latest::Outgoing(source) => Some(source.report()),
            Latest::Incoming(destination) => Some(destination.report()),
        }
    }

    /// The latest migration in QEMU's fields and units.
    pub(crate) fn migration_info(&self) -> Value {
        let in_force = self.state().in_force.clone();
        let report = self.report();
        // Of one look: an answer that says `setup` also says where.
        let listening_on = self.latest_listens_on(report.as_ref());
        migration_info::migration_info(report.as_ref(), listening_on.as_ref(), &in_force)
    }

    /// Where a migration in is listened for, while one can still come.
    pub fn listening_on(&self) -> Option<Uri> {
        self.latest_listens_on(self.report().as_ref())
    }

    fn latest_listens_on(&self, report: Option<&Report>) -> Option<Uri> {
        match self.latest() {
            Latest::Incoming(destination)
                if destination.is_listening() && report.is_some_and(|report| report.status != Status::Completed) =>
            {
                Some(destination.local_uri().clone())
            }
            _ => None,
        }
    }

    /// The parameters for the next migration.
    pub fn parameters(&self) -> Parameters {
        self.state().parameters.clone()
    }

    /// Sets parameters, by name and in their units: all of them or, at the first that is refused, none. A migration
    /// under way takes them over.
    ///
    /// # Errors
    /// When one is unknown, out of range, or cannot change under the migration under way.
    pub fn set_parameters<'a>(&self, numbers: impl IntoIterator<Item = (&'a str, i64)>) -> Result<(), VmError> {
        let _one_at_a_time = lock(&self.commands);
        let (mut wanted, mut in_force, latest) = {
            let state = self.state();
            (state.parameters.clone(), state.in_force.clone(), state.latest.clone())
        };
        let changed: Vec<(&str, i64)> = numbers.into_iter().collect();
        wanted.set_all(changed.iter().copied())?;
        match latest {
            Latest::Outgoing(source) if !self.is_over(source.report().status) => {
                apply(&mut in_force, &changed, Applies::Destination)?;
                source.set_parameters(&in_force)?;
            }
            Latest::Incoming(destination) if destination.report().status != Status::Completed => {
                apply(&mut in_force, &changed, Applies::Source)?;
                destination.set_parameters(&in_force)?;
            }
            _ => {}
        }
        let mut state = self.state();
        self.events.set_migration_events(wanted.events);
        state.parameters = wanted;
        state.in_force = in_force;
        Ok(())
    }

    /// Whether a migration out with this status is over for good.
    fn is_over(&self, status: Status) -> bool {
        status.is_final() && self.guest.ownership() != Ownership::Undecided
    }

    /// Starts a migration to `uri`.
    ///
    /// # Errors
    /// When the guest is not here, or a migration is running.
    pub fn migrate(&self, uri: &Uri) -> Result<(), VmError> {
        self.migrate_by(uri.into())
    }

    /// Starts a migration by `route`. A named descriptor is used up by it, but not by one that is refused.
    ///
    /// # Errors
    /// As for [`migrate`](Self::migrate), and when there is no such descriptor.
    pub fn migrate_by(&self, route: Route) -> Result<(), VmError> {
        let _one_at_a_time = self.begin()?;
        self.by(route, |uri| {
            let parameters = self.parameters();
            let source = Arc::new(Source::start(&self.guest, uri, &parameters)?);
            let replaced = {
                let mut state = self.state();
                state.in_force = parameters;
                std::mem::replace(&mut state.latest, Latest::Outgoing(source))
            };
            if let Latest::Incoming(destination) = replaced {
                self.state().earlier_destination = Some(destination);
            }
            Ok(())
        })
    }

    /// Has `start` start a migration by `route`, of whose descriptor it takes a duplicate.
    fn by(&self, route: Route, start: impl FnOnce(&Uri) -> Result<(), VmError>) -> Result<(), VmError> {
        let name = match route {
            Route::Address(uri) => return start(&uri),
            Route::Named(name) => name,
        };
        let descriptor: OwnedFd = self.descriptors.take(&name)?;
        match start(&Uri::Fd(descriptor.as_raw_fd())) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.descriptors.keep(&name, descriptor)?;
                Err(error)
            }
        }
    }

    /// Tries again to reach the destination of a released guest, which is where it was released to: if `route` says where,
    /// it must say that.
    ///
    /// # Errors
    /// When there is no such guest, or it was released to another address.
    pub fn reconnect(&self, route: Option<&Route>) -> Result<(), VmError> {
        let _one_at_a_time = self.begin()?;
        match self.latest() {
            Latest::Outgoing(source) if route.is_some_and(|route| *route != source.uri().into()) => {
                Err(VmError::ResumesElsewhere { to: source.uri().clone() })
            }
            Latest::Outgoing(source) => Ok(source.reconnect()?),
            _ => Err(VmError::NothingToResume),
        }
    }

    /// Listens on `uri` for a migration in.
    ///
    /// # Errors
    /// When the guest is here, or another migration is awaited, or the address cannot be listened on.
    pub fn listen(&self, uri: &Uri) -> Result<(), VmError> {
        self.listen_at(uri.into())
    }

    /// Listens by `route` for a migration in. A named descriptor is used up by it, but not when that is refused.
    ///
    /// # Errors
    /// As for [`listen`](Self::listen), and when there is no such descriptor.
    pub fn listen_at(&self, route: Route) -> Result<(), VmError> {
        let _one_at_a_time = self.begin()?;
        self.by(route, |uri| {
            let parameters = self.parameters();
            if self.guest.ownership() == Ownership::Gone {
                // The guest came in and went out again; what it came in by may still hold the address.
                let earlier = self.state().earlier_destination.take();
                drop(earlier);
            }
            let destination = Arc::new(Destination::listen(&self.guest, uri, &parameters)?);
            let replaced = {
                let mut state = self.state();
                state.in_force = parameters;
                std::mem::replace(&mut state.latest, Latest::Incoming(destination))
            };
            // Waits for its threads, so not with the lock held.
            drop(replaced);
            Ok(())
        })
    }

    /// Has a migration out go on that waits in `waiting_in`.
    ///
    /// # Errors
    /// When it does not wait there.
    pub fn resume_switchover(&self, waiting_in: Status) -> Result<(), VmError> {
        let _one_at_a_time = lock(&self.commands);
        let actual = self.report().map_or(Status::None, |report| report.status);
        match self.latest() {
            Latest::Outgoing(source) if actual == waiting_in => Ok(source.resume_switchover(waiting_in)?),
            _ => Err(VmError::NotWaiting { actual }),
        }
    }

    /// Ends the migration that is running, if one is.
    ///
    /// # Errors
    /// When it can no longer be ended: the guest was released, or is here already.
    pub fn cancel(&self) -> Result<(), VmError> {
        let latest = self.latest();
        let is_over = || self.report().is_none_or(|report| report.status.is_final());
        if is_over() {
            return Ok(());
        }
        let outcome = match latest {
            Latest::None => Ok(()),
            Latest::Outgoing(source) => source.cancel(),
            Latest::Incoming(destination) => destination.cancel(),
        };
        match outcome {
            // It ended by itself in the meantime.
            Err(_) if is_over() => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    /// The process is to end. A migration out ends, if one is running and may still be ended: the guest ends with the process,
    /// so its destination is not told that it goes on here.
    pub(crate) fn end_outgoing(&self) {
        if let Latest::Outgoing(source) = self.latest()
            && !source.report().status.is_final()
        {
            // Refused once the guest is released: it is the destination's to run then, whatever becomes of this side.
            let _ = self.guest.ended(GuestEnd::ProcessEnds);
        }
    }

    /// Pauses the guest.
    ///
    /// # Errors
    /// When it is not here, or does not pause.
    pub fn stop(&self) -> Result<(), VmError> {
        Ok(self.guest.stop()?)
    }

    /// Starts or restarts the guest.
    ///
    /// # Errors
    /// When it is not this side's to run, or does not start.
    pub fn cont(&self) -> Result<(), VmError> {
        let _one_at_a_time = self.begin()?;
        Ok(self.guest.cont()?)
    }

    /// The same, also if what belongs to the guest alone (a disk image) is not as the guest left it.
    ///
    /// # Errors
    /// As for [`cont`](Self::cont).
    pub fn cont_anyway(&self) -> Result<(), VmError> {
        let _one_at_a_time = self.begin()?;
        Ok(self.guest.cont_anyway()?)
    }

    /// A person's decision: the guest, which may be on either side, is here.
    ///
    /// # Errors
    /// When nothing is undecided, or `rule` does not allow it yet.
    pub fn take_back(&self, rule: TakeBack) -> Result<(), VmError> {
        let _one_at_a_time = self.begin()?;
        Ok(self.guest.take_back(rule)?)
    }

    /// Has the machine check itself. Takes as long as that takes; other commands go on.
    ///
    /// # Errors
    /// When the guest is not here, or could not be checked.
    pub fn verify(&self) -> Result<Verification, VmError> {
        match self.run_state() {
            RunState::Running | RunState::Paused | RunState::Shutdown => {}
            elsewhere => return Err(VmError::NotHere(elsewhere)),
        }
        let verifier = self.verifier.as_ref().ok_or(VmError::CannotVerify)?;
        verifier.verify().map_err(VmError::Verify)
    }

    /// Tells all clients that the process ends, and why. What has happened comes before that; the first cause counts.
    pub fn announce_shutdown(&self, cause: ShutdownCause) {
        self.events.shutdown(cause);
    }

    /// Says that the process is to end.
    pub fn request_quit(&self) {
        *lock(&self.quit) = true;
        self.quit_changed.notify_all();
    }

    /// Waits until the process is to end, but not longer than `timeout`; tells whether it is to.
    pub fn wait_for_quit(&self, timeout: Duration) -> bool {
        let waited = self.quit_changed.wait_timeout_while(lock(&self.quit), timeout, |quit| !*quit);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Ends a migration out and waits for that, but not longer than `timeout`, then pauses the guest if it is here. For the end
    /// of the process: a guest that was being migrated cannot be started any more, and its destination hears why.
    /// Gives the report of what was ended.
    pub fn shut_down(&self, timeout: Duration) -> Option<Report> {
        let ended = self.shut_down_running(timeout);
        // A guest that is not here has nothing to pause.
        let _ = self.guest.stop();
        ended
    }

    /// Does what [`shut_down`](Self::shut_down) does, but does not pause the guest: for a machine whose storage hangs.
    pub fn shut_down_running(&self, timeout: Duration) -> Option<Report> {
        // Nothing is begun after this, and what was being begun is.
        self.ending.store(true, Ordering::Release);
        drop(lock(&self.commands));
        let deadline = Instant::now() + timeout;
        let running = |report: &Report| !report.status.is_final() && report.status != Status::None;
        match self.latest() {
            Latest::Outgoing(source) if running(&source.report()) => {
                self.end_outgoing();
                while running(&source.report()) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Some(source.report())
            }
            _ => None,
        }
    }
}

/// Takes into `parameters` what was changed, but for what only the other side reads.
fn apply(parameters: &mut Parameters, changed: &[(&str, i64)], not: Applies) -> Result<(), ParameterError> {
    for (name, number) in changed {
        if PARAMETERS.iter().any(|info| info.name == *name && info.applies != not) {
            parameters.set(name, *number)?;
        }
    }
    Ok(())
}
