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

use super::session::{Ended, Session};
use super::{Current, Event, Shared};
use crate::channel::{Connection, Listener};
use crate::clock::Contact;
use crate::error::{Cause, Side};
use crate::guest::{Ground, Heard};
use crate::handover::DestinationEvent;
use crate::link::{FrameSender, answer_hello, lock, spawn};
use crate::report::Status;
use crate::wire::{
    Abort, AbortReason, FrameHeader, FrameType, HEADER_BYTES, HELLO_BYTES, Hello, HelloReply, Message, Role, SessionId,
    Start, WireError, check_beginning, data_checksum,
};

/// Connections that may be waiting to say hello. The oldest gives way.
const MAX_WAITING: usize = 128;
/// How long a connection that anybody can make may take to say hello, and any to say what is coming after that.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a migration waits for the one before it to be cleared away, before it is refused.
const BUSY_GRACE: Duration = Duration::from_secs(1);
/// What a source is told while another one's migration comes in.
const BUSY: &str = "this destination is busy with another migration";
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
    said: Said,
    /// It was given, so that no stranger can be at its end.
    given: bool,
}

/// What a connection has said so far.
enum Said {
    /// Nothing, or part of a hello.
    Nothing,
    /// A hello that has not been answered.
    Hello(Hello),
    /// A hello that has been answered; part of the Start that comes next.
    Greeted(Hello),
    /// A Start, and the bytes that it came as.
    Start(Hello, Box<Start>, u64),
}

struct Acceptor<'a> {
    shared: &'a Arc<Shared>,
    listener: Listener,
    waiting: Vec<Waiting>,
    session: Option<(JoinHandle<()>, mpsc::Receiver<Ended>)>,
    ended: Vec<Ended>,
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
        self.ended.iter().any(Ended::has_arrived)
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
            for waiting in self.waiting.iter().filter(|waiting| waiting.speaks()) {
                fds.push(PollFd::from_borrowed_fd(waiting.connection.as_fd(), PollFlags::IN));
            }
            if let Some(fd) = listening {
                fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
            }
            // What waits without a deadline shows itself.
            let quiet = self.waiting.iter().all(|waiting| waiting.given && matches!(waiting.said, Said::Nothing));
            let comes = listening.is_some() || !self.waiting.is_empty();
            let timeout = if quiet && comes { None } else { Some(LOOK) };
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
            Ok(Some(connection)) => self.admit(connection, false),
            Ok(None) => {}
            Err(error) => {
                // Out of descriptors, most likely: those who have not spoken make room.
                self.shared.refused(&self.shared.local_uri.to_string(), &format!("could not accept: {error}"));
                self.waiting.retain(|waiting| !waiting.speaks());
                std::thread::sleep(LOOK);
            }
        }
    }

    fn admit(&mut self, connection: Connection, given: bool) {
        if self.waiting.len() >= MAX_WAITING {
            // Who has said least gives way, and of those the oldest.
            let silent = self.waiting.iter().position(|waiting| matches!(waiting.said, Said::Nothing));
            let oldest = silent.or_else(|| self.waiting.iter().position(Waiting::speaks)).unwrap_or(0);
            let dropped = self.waiting.remove(oldest);
            self.shared.refused(dropped.connection.name(), "it said nothing, and others wait");
        }
        // The answer to a hello is small: it fits the socket's buffer, or the peer is not worth waiting for.
        let _ = connection.set_send_timeout(Some(BUSY_GRACE));
        self.waiting.push(Waiting { connection, since: Instant::now(), bytes: Vec::new(), said: Said::Nothing, given });
    }

    /// Transports that have one connection at a time get it here.
    fn take_turn(&mut self) {
        let opened = match &mut self.listener {
            Listener::Tcp(_) | Listener::Unix(_) => return,
            _ if self.exhausted || !self.waiting.is_empty() || Instant::now() < self.next_turn => return,
            _ if self.session.is_some() && !self.shared.guest.waits_for_decision() => return,
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
            Ok(connection) => self.admit(connection, true),
            Err(cause) => self.shared.refused(&self.shared.local_uri.to_string(), &cause.to_string()),
        }
    }

    /// Reads what those who wait have said, and serves those who have said enough.
    fn listen_to_waiting(&mut self) {
        for mut waiting in std::mem::take(&mut self.waiting) {
            if let Err(cause) = waiting.listen().map_err(|cause| waiting.connection.explain(cause)) {
                let reason = match &cause {
                    Cause::Wire { source, .. } => source.to_string(),
                    other => other.to_string(),
                };
                match waiting.said {
                    Said::Nothing | Said::Hello(_) => self.refuse(&waiting.connection, reason),
                    Said::Greeted(_) | Said::Start(..) => self.turn_away(waiting.connection, reason),
                }
                continue;
            }
            if let Some(waiting) = self.serve(waiting) {
                self.waiting.push(waiting);
            }
        }
    }

    /// Acts on what a connection has said; gives it back if more is to come.
    fn serve(&mut self, mut waiting: Waiting) -> Option<Waiting> {
        let late = waiting.since.elapsed() > HELLO_TIMEOUT;
        match std::mem::replace(&mut waiting.said, Said::Nothing) {
            Said::Nothing if late && !waiting.given => {
                self.refuse(&waiting.connection, format!("it said no hello within {HELLO_TIMEOUT:?}"));
                None
            }
            Said::Greeted(_) if late => {
                let reason = format!("it did not say within {HELLO_TIMEOUT:?} what is coming");
                self.turn_away(waiting.connection, reason);
                None
            }
            said @ (Said::Nothing | Said::Greeted(_)) => {
                waiting.said = said;
                Some(waiting)
            }
            Said::Hello(hello) => self.dispatch(waiting, hello),
            Said::Start(hello, start, bytes) => self.begin(waiting.connection, hello, *start, bytes),
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

    /// The same for a connection that has been greeted: it expects messages.
    fn turn_away(&self, connection: Connection, reason: String) {
        self.shared.refused(connection.name(), &reason);
        let guest = self.shared.guest.place(Side::Destination);
        let abort = Message::Abort(Abort { reason: AbortReason::Refused, guest, epoch: 0, text: reason });
        tell(connection, &[abort]);
    }

    fn dispatch(&mut self, waiting: Waiting, hello: Hello) -> Option<Waiting> {
        match hello.role {
            Role::Control | Role::Single => self.greet(waiting, hello),
            Role::Data { index } => {
                let mut connection = waiting.connection;
                connection.rename(&hello.role.to_string());
                self.hand_to_session(hello.session, connection, |connection| Event::Data { index, connection });
                None
            }
            Role::Reconnect => {
                match self.ended.iter().find(|ended| ended.id == hello.session) {
                    Some(ended) if answer_hello(&waiting.connection, &HelloReply::Welcome).is_ok() => {
                        tell(waiting.connection, &ended.answers());
                    }
                    Some(_) => {}
                    None => self.hand_to_session(hello.session, waiting.connection, Event::Again),
                }
                None
            }
        }
    }

    /// Why no migration can come in now, if that is for good.
    fn closed_to_migrations(&self) -> Option<&'static str> {
        if self.has_arrived() {
            Some("the guest of another migration is here")
        } else if self.shared.guest.waits_for_decision() {
            Some("a guest waits here for a decision, whether it goes on here or at its source (cont --take-back)")
        } else {
            None
        }
    }

    /// Someone wants to migrate. What is coming decides; until it is known this changes nothing.
    fn greet(&mut self, mut waiting: Waiting, hello: Hello) -> Option<Waiting> {
        self.collect_session();
        if let Some(reason) = self.closed_to_migrations() {
            self.refuse(&waiting.connection, reason.to_owned());
            return None;
        }
        if self.session.is_some() {
            return self.busy(waiting, hello);
        }
        waiting.connection.rename(&hello.role.to_string());
        if let Err(cause) = answer_hello(&waiting.connection, &HelloReply::Welcome) {
            self.shared.refused(waiting.connection.name(), &cause.to_string());
            return None;
        }
        waiting.bytes.clear();
        waiting.said = Said::Greeted(hello);
        waiting.since = Instant::now();
        Some(waiting)
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
    fn begin(&mut self, connection: Connection, hello: Hello, start: Start, bytes: u64) -> Option<Waiting> {
        self.collect_session();
        if let Some(reason) = self.closed_to_migrations() {
            self.turn_away(connection, reason.to_owned());
            return None;
        }
        if self.session.is_some() {
            self.turn_away(connection, BUSY.to_owned());
            return None;
        }
        let (events, incoming) = mpsc::channel();
        let (tell, outcome) = mpsc::channel();
        let contact: Arc<Contact> = Arc::default();
        let weak = Arc::downgrade(self.shared);
        let on_decision = Arc::new(move || {
            if let Some(shared) = weak.upgrade() {
                shared.on_decision();
            }
        });
        let link_timeout = lock(&self.shared.parameters).link_timeout;
        let ground = Ground {
            contact: contact.clone(),
            link_timeout,
            cpu: self.shared.cpu.clone(),
            on_decision,
            on_end: Arc::new(|| {}),
        };
        let coming = match self.shared.guest.begin_session(ground) {
            Ok(coming) => coming,
            Err(error) => {
                self.turn_away(connection, error.to_string());
                return None;
            }
        };
        *lock(&self.shared.session) = Some(Current { id: hello.session, coming, events: events.clone() });
        let shared = self.shared.clone();
        let thread = spawn("destination session", move || {
            let session = Session::new(&shared, hello.session, coming, contact, hello.role, (events, incoming));
            let _ = tell.send(session.run(connection, &start, bytes));
            shared.wake();
        });
        match thread {
            Ok(thread) => self.session = Some((thread, outcome)),
            Err(cause) => {
                lock(&self.shared.session).take();
                let limit = self.shared.switchover_limit();
                let _ = self.shared.guest.come(coming, DestinationEvent::Failed, Heard::default(), limit);
                self.shared.refused("a migration", &cause.to_string());
            }
        }
        None
    }

    fn busy(&self, mut waiting: Waiting, hello: Hello) -> Option<Waiting> {
        waiting.said = Said::Hello(hello);
        if waiting.since.elapsed() < BUSY_GRACE {
            return Some(waiting);
        }
        self.refuse(&waiting.connection, BUSY.to_owned());
        None
    }

    /// Puts away a session that has told its end. Not asked is whether its thread has ended: it wakes this one before
    /// that, and nothing would wake it again.
    fn collect_session(&mut self) {
        let Some((_, outcome)) = &self.session else { return };
        let outcome = match outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(mpsc::TryRecvError::Disconnected) => None,
            Err(mpsc::TryRecvError::Empty) => return,
        };
        if let Some((thread, _)) = self.session.take() {
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
        if let Some((thread, outcome)) = self.session.take() {
            if let Some(current) = &*lock(&self.shared.session) {
                let _ = current.events.send(Event::Close);
            }
            let _ = thread.join();
            self.ended.extend(outcome.try_recv().ok());
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

/// Sends `messages` and closes the connection.
fn tell(connection: Connection, messages: &[Message]) {
    let connection = Arc::new(connection);
    let mut sender = FrameSender::new(connection.clone(), Arc::default());
    for message in messages {
        if sender.send(message).is_err() {
            return;
        }
    }
    connection.finish(Duration::from_millis(200));
}

impl Waiting {
    /// More is awaited from it.
    fn speaks(&self) -> bool {
        matches!(self.said, Said::Nothing | Said::Greeted(_))
    }

    /// Reads what has come.
    fn listen(&mut self) -> Result<(), Cause> {
        match self.said {
            Said::Hello(_) | Said::Start(..) => Ok(()),
            Said::Nothing => {
                while self.read_up_to(HELLO_BYTES)? {
                    let wire = |source: WireError| Cause::Wire { channel: String::new(), source };
                    check_beginning(&self.bytes).map_err(wire)?;
                    if let Ok(bytes) = self.bytes.as_slice().try_into() {
                        self.said = Said::Hello(Hello::decode(bytes).map_err(wire)?);
                        break;
                    }
                }
                Ok(())
            }
            Said::Greeted(hello) => {
                let channel = self.connection.name().to_owned();
                let wire = |source: WireError| Cause::Wire { channel: channel.clone(), source };
                loop {
                    let wanted = match start_bytes(&self.bytes).map_err(wire)? {
                        Some(length) if self.bytes.len() >= length => {
                            let start = decode_start(&self.bytes).map_err(wire)?;
                            self.said = Said::Start(hello, Box::new(start), length as u64);
                            self.bytes = Vec::new();
                            return Ok(());
                        }
                        Some(length) => length,
                        None => HEADER_BYTES,
                    };
                    if !self.read_up_to(wanted)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Reads until there are `length` bytes, as far as they have come; tells whether there was anything.
    fn read_up_to(&mut self, length: usize) -> Result<bool, Cause> {
        let mut buffer = [0; 4096];
        let missing = length.saturating_sub(self.bytes.len()).min(buffer.len());
        let space = buffer.get_mut(..missing).ok_or_else(|| self.closed())?;
        match self.connection.recv_available(space)? {
            None => Ok(false),
            Some(0) => Err(self.closed()),
            Some(got) => {
                self.bytes.extend_from_slice(space.get(..got).ok_or_else(|| self.closed())?);
                Ok(true)
            }
        }
    }

    fn closed(&self) -> Cause {
        Cause::Closed { channel: self.connection.name().to_owned() }
    }
}

/// Bytes of the frame that `bytes` is the beginning of, once its header is there; it can only be a Start, the first frame.
fn start_bytes(bytes: &[u8]) -> Result<Option<usize>, WireError> {
    let Some(Ok(header)) = bytes.get(..HEADER_BYTES).map(TryInto::try_into) else { return Ok(None) };
    let header = FrameHeader::decode(header, 0)?;
    if header.frame_type != FrameType::Start || header.table_length != 0 {
        return Err(WireError::Value { what: "the first frame's type", value: u64::from(header.frame_type as u16) });
    }
    Ok(Some(HEADER_BYTES.saturating_add(header.data_length as usize)))
}

fn decode_start(bytes: &[u8]) -> Result<Start, WireError> {
    let truncated = || WireError::Checksum { what: "a message" };
    let (head, body) = bytes.split_at_checked(HEADER_BYTES).ok_or_else(truncated)?;
    let header = FrameHeader::decode(head.try_into().map_err(|_| truncated())?, 0)?;
    if data_checksum(body) != header.data_checksum {
        return Err(WireError::Checksum { what: "a message" });
    }
    match Message::decode(FrameType::Start, body)? {
        Message::Start(start) => Ok(start),
        _ => Err(truncated()),
    }
}
