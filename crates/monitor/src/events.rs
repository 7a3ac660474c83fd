//! What happens to the guest, told to every client.
//!
//! An event that happened before a command's end is on its way to all clients before that command's reply: who carries
//! out a command calls [`Events::deliver`] at its end. At all other times a thread does, which waits for the next event.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use dunlin::parameters::Switch;
use dunlin::{Guest, GuestEnd, GuestEvent};
use serde_json::{Value, json};

use crate::outbox::{Gone, Outbox};
use crate::protocol;
use crate::schema::{Enum, Object, Type, required};
use crate::types::MIGRATION_STATUS;
use crate::vm::Vm;

/// How often the thread looks whether there is still somebody to tell.
const LOOK: Duration = Duration::from_millis(100);

/// One kind of event.
pub(crate) struct EventKind {
    pub(crate) name: &'static str,
    pub(crate) data: &'static Object,
    pub(crate) help: &'static str,
}

static MIGRATION_DATA: Object = Object::of("MigrationEvent", &[required("status", MIGRATION_STATUS)]);
static PASS_DATA: Object = Object::of("MigrationPassEvent", &[required("pass", Type::Int)]);
static SHUTDOWN_DATA: Object = Object::of(
    "ShutdownEvent",
    &[required("guest", Type::Bool), required("reason", Type::Enum(Enum::of("ShutdownCause", &SHUTDOWN_CAUSES)))],
);

static SHUTDOWN_CAUSES: [&str; 5] = ["host-qmp-quit", "host-signal", "guest-shutdown", "guest-reset", "guest-panic"];

/// Every event there is.
pub(crate) static EVENTS: &[EventKind] = &[
    EventKind {
        name: "STOP",
        data: &crate::schema::NOTHING,
        help: "The vCPUs were stopped here: by `stop`, for a switchover, or because the guest has ended.",
    },
    EventKind {
        name: "RESUME",
        data: &crate::schema::NOTHING,
        help: "The vCPUs were started here: by `cont`, at the end of a migration in, or after one out that came to nothing.",
    },
    EventKind {
        name: "MIGRATION",
        data: &MIGRATION_DATA,
        help: "A migration has come to this status. Only while `events` is on.",
    },
    EventKind {
        name: "MIGRATION_PASS",
        data: &PASS_DATA,
        help: "A pass over dirty RAM begins at the source. Only while `events` is on.",
    },
    EventKind {
        name: "SHUTDOWN",
        data: &SHUTDOWN_DATA,
        help: "The process ends, and why. No `STOP` and no `RESUME` comes after it.",
    },
];

/// Why the process ends, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShutdownCause {
    /// A client asked for it.
    HostQmpQuit,
    /// A signal came.
    HostSignal,
    /// The guest has ended by itself.
    GuestShutdown,
    /// The guest has asked for a reset, or met a triple fault, which is one.
    GuestReset,
    /// The guest has said that it panicked.
    GuestPanic,
}

impl From<GuestEnd> for ShutdownCause {
    fn from(end: GuestEnd) -> Self {
        match end {
            GuestEnd::Reset | GuestEnd::TripleFault => Self::GuestReset,
            GuestEnd::Panicked => Self::GuestPanic,
            GuestEnd::ProcessEnds => Self::HostSignal,
            _ => Self::GuestShutdown,
        }
    }
}

impl ShutdownCause {
    fn is_of_guest(self) -> bool {
        matches!(self, Self::GuestShutdown | Self::GuestReset | Self::GuestPanic)
    }

    fn name(self) -> &'static str {
        match self {
            Self::HostQmpQuit => "host-qmp-quit",
            Self::HostSignal => "host-signal",
            Self::GuestShutdown => "guest-shutdown",
            Self::GuestReset => "guest-reset",
            Self::GuestPanic => "guest-panic",
        }
    }
}

/// Everybody who is told.
pub(crate) struct Events {
    happened: Mutex<Receiver<GuestEvent>>,
    listeners: Mutex<Vec<Weak<Outbox>>>,
    /// Whether the migration's events are wanted.
    migration: AtomicBool,
    /// Everybody has been told that the process ends.
    ending: AtomicBool,
}

impl Events {
    /// Watches `guest`, with the migration's events or without; with it comes the bell for the [`Deliverer`].
    pub(crate) fn watch(guest: &Guest, migration: Switch) -> (Self, Receiver<GuestEvent>) {
        // In this order: when the bell rings, what happened is there to be delivered.
        let happened = Mutex::new(guest.events());
        let bell = guest.events();
        let (migration, ending) = (AtomicBool::new(migration == Switch::On), AtomicBool::new(false));
        (Self { happened, listeners: Mutex::default(), migration, ending }, bell)
    }

    /// Turns the migration's events on or off.
    pub(crate) fn set_migration_events(&self, on: Switch) {
        self.migration.store(on == Switch::On, Ordering::Release);
    }

    /// Sends `outbox`'s client `reply`, and everything that happens from there on.
    pub(crate) fn listen(&self, outbox: &Arc<Outbox>, reply: Vec<u8>) -> Result<(), Gone> {
        // Nobody may be waited for with the listeners locked.
        outbox.make_room()?;
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        outbox.reply_now(reply)?;
        listeners.push(Arc::downgrade(outbox));
        Ok(())
    }

    /// Delivers what has happened until now. Never waits for a client.
    pub(crate) fn deliver(&self) {
        let happened = self.happened.lock().unwrap_or_else(PoisonError::into_inner);
        happened.try_iter().filter_map(|event| self.line(event)).for_each(|line| self.send(&line));
    }

    /// Tells that the process ends, behind all that has happened. The first cause counts; and as with QEMU nobody is told
    /// afterwards that the vCPUs stop.
    pub(crate) fn shutdown(&self, cause: ShutdownCause) {
        let happened = self.happened.lock().unwrap_or_else(PoisonError::into_inner);
        happened.try_iter().filter_map(|event| self.line(event)).for_each(|line| self.send(&line));
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        let data = json!({"guest": cause.is_of_guest(), "reason": cause.name()});
        self.send(&protocol::line(&protocol::event("SHUTDOWN", Some(data))));
    }

    fn line(&self, event: GuestEvent) -> Option<Vec<u8>> {
        let migration = self.migration.load(Ordering::Acquire);
        if self.ending.load(Ordering::Acquire) && matches!(event, GuestEvent::Stopped | GuestEvent::Resumed) {
            return None;
        }
        let (name, data): (_, Option<Value>) = match event {
            GuestEvent::Stopped => ("STOP", None),
            GuestEvent::Resumed => ("RESUME", None),
            GuestEvent::Migration { status, .. } if migration => {
                ("MIGRATION", Some(json!({"status": status.to_string()})))
            }
            GuestEvent::Pass { number } if migration => ("MIGRATION_PASS", Some(json!({"pass": number}))),
            _ => return None,
        };
        Some(protocol::line(&protocol::event(name, data)))
    }

    fn send(&self, line: &[u8]) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.upgrade().inspect(|outbox| outbox.event(line.to_vec())).is_some());
    }
}

/// The thread that delivers at all times. It ends soon after what it delivers for is gone.
pub(crate) struct Deliverer(Option<JoinHandle<()>>);

impl Deliverer {
    /// Starts it; it delivers whenever the bell rings.
    pub(crate) fn start(bell: Receiver<GuestEvent>, vm: Weak<Vm>) -> Self {
        let run = move || {
            loop {
                match bell.recv_timeout(LOOK) {
                    Ok(_) => match vm.upgrade() {
                        Some(vm) => vm.deliver_events(),
                        None => return,
                    },
                    Err(RecvTimeoutError::Timeout) if vm.strong_count() > 0 => {}
                    Err(_) => return,
                }
            }
        };
        // Without it events come with the next command.
        Self(thread::Builder::new().name("qmp-events".to_owned()).spawn(run).ok())
    }
}

impl Drop for Deliverer {
    fn drop(&mut self) {
        // The thread itself may have been the last to hold what this belongs to.
        if let Some(thread) = self.0.take()
            && thread.thread().id() != thread::current().id()
        {
            let _ = thread.join();
        }
    }
}
