//! Accepting connections and finding out what they are.
//!
//! One thread polls the listener and every connection that has not said hello yet, so that strangers cost a
//! descriptor each and no more, and there is a bound on them. What must stay true: whatever connects and however
//! it behaves, the right peer is still served after it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::session::{Outcome, Session};
use super::{Current, Event, Shared};
use crate::channel::{Connection, Listener};
use crate::error::Cause;
use crate::handover::DestinationState;
use crate::link::{FrameSender, answer_hello, lock, spawn};
use crate::report::Status;
use crate::wire::{HELLO_BYTES, Hello, HelloReply, Message, Role, SessionId, WireError, check_beginning};

/// Connections that may be waiting to say hello. The oldest gives way.
const MAX_WAITING: usize = 128;
/// How long a connection may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a migration waits for the one before it to be cleared away, before it is refused.
const BUSY_GRACE: Duration = Duration::from_secs(1);
/// Time between looks while something has a deadline.
const LOOK: Duration = Duration::from_millis(20);
/// Time between two runs of an `exec` command.
const EXEC_PAUSE: Duration = Duration::from_secs(1);
/// Ended sessions that are remembered, for a source that asks later.
const REMEMBERED: usize = 16;

/// A connection that has not been placed yet.
struct Waiting {
    connection: Connection,
    since: Instant,
    bytes: Vec<u8>,
    hello: Option<Hello>,
}

/// What to do with a connection that has said hello.
enum Verdict {
    /// It is placed, or refused.
    Settled,
    /// A session is being cleared away for it.
    Wait(Waiting),
}

struct Acceptor<'a> {
    shared: &'a Arc<Shared>,
    listener: Listener,
    waiting: Vec<Waiting>,
    session: Option<(SessionId, JoinHandle<()>, mpsc::Receiver<Outcome>)>,
    ended: Vec<(SessionId, Outcome)>,
    /// An `exec` or `fd` listener's next turn.
    next_turn: Instant,
    exhausted: bool,
}

/// Accepts connections until the guest is here and the source knows it, or the handle is dropped.
pub(super) fn run(shared: &Arc<Shared>, listener: Listener) {
    let mut acceptor = Acceptor {
        shared,
        listener,
        waiting: Vec::new(),
        session: None,
        ended: Vec::new(),
        next_turn: Instant::now(),
        exhausted: false,
    };
    while !acceptor.is_over() {
        acceptor.poll();
        acceptor.take_turn();
        acceptor.listen_to_waiting();
        acceptor.collect_session();
    }
    acceptor.close();
}

impl Acceptor<'_> {
    fn has_arrived(&self) -> bool {
        self.ended.iter().any(|(_, outcome)| matches!(outcome, Outcome::Running(_)))
    }

    fn is_over(&self) -> bool {
        let deaf = self.exhausted && self.session.is_none() && self.waiting.is_empty();
        self.has_arrived() || deaf || self.shared.stop.load(Ordering::Acquire)
    }

    /// Sleeps until there is something to do, and accepts what has come.
    fn poll(&mut self) {
        let mut acceptable = false;
        {
            let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
            let listening = listener_fd(&self.listener);
            for waiting in self.waiting.iter().filter(|waiting| waiting.hello.is_none()) {
                fds.push(PollFd::from_borrowed_fd(waiting.connection.as_fd(), PollFlags::IN));
            }
            if let Some(fd) = listening {
                fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
            }
            let timeout = if self.waiting.is_empty() && listening.is_some() { None } else { Some(LOOK) };
            let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            if rustix::event::poll(&mut fds, timeout.as_ref()).is_ok()
                && let (Some(_), Some(last)) = (listening, fds.last())
            {
                acceptable = !last.revents().is_empty();
            }
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        if acceptable {
            self.accept();
        }
    }

    fn accept(&mut self) {
        let accepted = match &self.listener {
            Listener::Tcp(listener) => listener.accept(),
            Listener::Unix(listener) => listener.accept(),
            Listener::Fd(..) | Listener::Exec(..) => Ok(None),
        };
        match accepted {
            Ok(Some(connection)) => self.admit(connection),
            Ok(None) => {}
            Err(error) => {
                // Out of descriptors, most likely: those who have not spoken make room.
                self.shared.refused(&self.shared.local_uri.to_string(), &format!("could not accept: {error}"));
                self.waiting.retain(|waiting| waiting.hello.is_some());
                std::thread::sleep(LOOK);
            }
        }
    }

    fn admit(&mut self, connection: Connection) {
        if self.waiting.len() >= MAX_WAITING
            && let Some(oldest) = self.waiting.iter().position(|waiting| waiting.hello.is_none())
        {
            let dropped = self.waiting.swap_remove(oldest);
            self.shared.refused(dropped.connection.name(), "it said nothing, and others wait");
        }
        // The answer to a hello is small: it fits the socket's buffer, or the peer is not worth waiting for.
        let _ = connection.set_send_timeout(Some(BUSY_GRACE));
        self.waiting.push(Waiting { connection, since: Instant::now(), bytes: Vec::new(), hello: None });
    }

    /// Transports that have one connection at a time get it here.
    fn take_turn(&mut self) {
        let opened = match &mut self.listener {
            Listener::Tcp(_) | Listener::Unix(_) => return,
            _ if self.exhausted || !self.waiting.is_empty() || Instant::now() < self.next_turn => return,
            _ if self.session.is_some() && lock(&self.shared.session).as_ref().is_none_or(|s| s.orphaned.is_none()) => {
                return;
            }
            Listener::Fd(_, connection) => {
                self.exhausted = true;
                let Some(connection) = connection.take() else { return };
                Ok(connection)
            }
            Listener::Exec(uri) => {
                self.next_turn = Instant::now() + EXEC_PAUSE;
                uri.connect(Duration::ZERO, &self.shared.stop)
            }
        };
        match opened {
            Ok(connection) => self.admit(connection),
            Err(cause) => self.shared.refused(&self.shared.local_uri.to_string(), &cause.to_string()),
        }
    }

    /// Reads what those who wait have said, and places those who have said all of it.
    fn listen_to_waiting(&mut self) {
        for mut waiting in std::mem::take(&mut self.waiting) {
            if waiting.hello.is_none() {
                match waiting.listen() {
                    Ok(hello) => waiting.hello = hello,
                    Err(cause) => {
                        let reason = match &cause {
                            Cause::Wire { source, .. } => source.to_string(),
                            other => other.to_string(),
                        };
                        self.refuse(&waiting.connection, reason);
                        continue;
                    }
                }
            }
            let verdict = match waiting.hello {
                Some(hello) => self.place(waiting, hello),
                None if waiting.since.elapsed() > HELLO_TIMEOUT => {
                    self.refuse(&waiting.connection, format!("it said no hello within {HELLO_TIMEOUT:?}"));
                    Verdict::Settled
                }
                None => Verdict::Wait(waiting),
            };
            if let Verdict::Wait(waiting) = verdict {
                self.waiting.push(waiting);
            }
        }
    }

    fn refuse(&self, connection: &Connection, reason: String) {
        self.shared.refused(connection.name(), &reason);
        let _ = answer_hello(connection, &HelloReply::Refused { reason });
        // What it said and nobody read would destroy the answer on its way when the connection is closed.
        let mut rest = [0; 4096];
        for _ in 0..16 {
            if !matches!(connection.recv_available(&mut rest), Ok(Some(1..))) {
                break;
            }
        }
    }

    fn place(&mut self, waiting: Waiting, hello: Hello) -> Verdict {
        match hello.role {
            Role::Control | Role::Single => self.begin(waiting, hello),
            Role::Data { index } => {
                let mut connection = waiting.connection;
                connection.rename(&hello.role.to_string());
                self.hand_to_session(hello.session, connection, |connection| Event::Data { index, connection });
                Verdict::Settled
            }
            Role::Reconnect => {
                let ended = self.ended.iter().find(|(id, _)| *id == hello.session).map(|(_, outcome)| outcome.clone());
                match ended {
                    Some(outcome) => tell_outcome(waiting.connection, outcome),
                    None => self.hand_to_session(hello.session, waiting.connection, Event::Again),
                }
                Verdict::Settled
            }
        }
    }

    fn hand_to_session(&self, id: SessionId, connection: Connection, event: impl FnOnce(Connection) -> Event) {
        let events = match &*lock(&self.shared.session) {
            Some(current) if current.id == id => Some(current.events.clone()),
            _ => None,
        };
        match events {
            Some(events) => {
                // A session that has just ended drops the connection, and the peer tries again.
                let _ = events.send(event(connection));
            }
            None => self.refuse(&connection, format!("this destination knows no migration {id}")),
        }
    }

    /// A new migration.
    fn begin(&mut self, waiting: Waiting, hello: Hello) -> Verdict {
        self.collect_session();
        if self.has_arrived() {
            self.refuse(&waiting.connection, "the guest of another migration is here".to_owned());
            return Verdict::Settled;
        }
        if self.session.is_some() {
            return self.busy(waiting);
        }
        let (events, incoming) = mpsc::channel();
        let (tell, outcome) = mpsc::channel();
        let current =
            Current { id: hello.session, events: events.clone(), state: DestinationState::Loading, orphaned: None };
        *lock(&self.shared.session) = Some(current);
        let shared = self.shared.clone();
        let mut connection = waiting.connection;
        connection.rename(&hello.role.to_string());
        let thread = spawn("destination session", move || {
            let session = Session::new(&shared, hello.session, hello.role, events, incoming);
            let _ = tell.send(session.run(connection));
            shared.wake();
        });
        match thread {
            Ok(thread) => self.session = Some((hello.session, thread, outcome)),
            Err(cause) => {
                lock(&self.shared.session).take();
                self.shared.refused("a migration", &cause.to_string());
            }
        }
        Verdict::Settled
    }

    fn busy(&self, waiting: Waiting) -> Verdict {
        let timeout = lock(&self.shared.parameters).handover_timeout;
        if let Some(current) = &*lock(&self.shared.session)
            && current.orphaned.is_some_and(|since| since.elapsed() > timeout)
        {
            // Its source has not come back for it; this one is here.
            let _ = current.events.send(Event::Cancel);
        }
        if waiting.since.elapsed() < BUSY_GRACE {
            return Verdict::Wait(waiting);
        }
        self.refuse(&waiting.connection, "this destination is busy with another migration".to_owned());
        Verdict::Settled
    }

    /// Puts away a session that has told its end. Not asked is whether its thread has ended: it wakes this one before
    /// that, and nothing would wake it again.
    fn collect_session(&mut self) {
        let Some((id, _, outcome)) = &self.session else { return };
        let outcome = match outcome.try_recv() {
            Ok(outcome) => Some((*id, outcome)),
            Err(mpsc::TryRecvError::Disconnected) => None,
            Err(mpsc::TryRecvError::Empty) => return,
        };
        if let Some((_, thread, _)) = self.session.take() {
            let _ = thread.join();
        }
        lock(&self.shared.session).take();
        if self.ended.len() == REMEMBERED {
            self.ended.remove(0);
        }
        self.ended.extend(outcome);
    }

    fn close(mut self) {
        self.waiting.clear();
        if let Some((id, thread, outcome)) = self.session.take() {
            if let Some(current) = &*lock(&self.shared.session) {
                let _ = current.events.send(Event::Cancel);
            }
            let _ = thread.join();
            self.ended.extend(outcome.try_recv().ok().map(|outcome| (id, outcome)));
        }
        lock(&self.shared.session).take();
        let arrived = self.has_arrived();
        drop(self.listener);
        // A guest that has arrived may be on its way to elsewhere by now.
        if !arrived {
            self.shared.guest.end_migration();
        }
        // Under the report's lock, so that nobody who waits misses it.
        let mut report = lock(&self.shared.report);
        self.shared.closed.store(true, Ordering::Release);
        // The only connection there could be came to nothing.
        if report.status == Status::Setup && !self.shared.stop.load(Ordering::Acquire) {
            let last = report.refused_connections.latest.clone().unwrap_or_default();
            let cause = Cause::OnlyConnectionLost { address: self.shared.local_uri.to_string(), last };
            report.error = Some((&self.shared.error(cause)).into());
            self.shared.change_status(&mut report, Status::Failed);
        }
        self.shared.changed.notify_all();
    }
}

fn listener_fd(listener: &Listener) -> Option<BorrowedFd<'_>> {
    match listener {
        Listener::Tcp(listener) => Some(listener.as_fd()),
        Listener::Unix(listener) => Some(listener.as_fd()),
        Listener::Fd(..) | Listener::Exec(..) => None,
    }
}

/// A source asks after the end of its session.
fn tell_outcome(connection: Connection, outcome: Outcome) {
    let message = match outcome {
        Outcome::Running(running) => Message::Running(running),
        Outcome::Aborted(abort) => Message::Abort(abort),
    };
    if answer_hello(&connection, &HelloReply::Welcome).is_ok() {
        let connection = Arc::new(connection);
        let _ = FrameSender::new(connection.clone(), Arc::default()).send(&message);
        connection.finish(Duration::from_millis(200));
    }
}

impl Waiting {
    /// Reads what has come; the hello once all of it has.
    fn listen(&mut self) -> Result<Option<Hello>, Cause> {
        let wire = |source: WireError| Cause::Wire { channel: String::new(), source };
        loop {
            let mut buffer = [0; HELLO_BYTES];
            let missing = HELLO_BYTES.saturating_sub(self.bytes.len());
            let space = buffer.get_mut(..missing).unwrap_or_default();
            match self.connection.recv_available(space)? {
                None => return Ok(None),
                Some(0) => return Err(Cause::Closed { channel: self.connection.name().to_owned() }),
                Some(got) => self.bytes.extend_from_slice(space.get(..got).unwrap_or_default()),
            }
            check_beginning(&self.bytes).map_err(wire)?;
            if let Ok(bytes) = self.bytes.as_slice().try_into() {
                return Hello::decode(bytes).map(Some).map_err(wire);
            }
        }
    }
}
