//! Keeps the connections of a migration alive, and notices when one of them is dead.
//!
//! One thread watches all connections of a side. The source asks: it sends a heartbeat on a connection that has been
//! idle. The destination answers: its heartbeats say how many bytes have come on that connection. So every byte that was
//! sent is acknowledged, on every connection and both ways, whatever lies between: a relay that takes bytes and passes
//! none on acknowledges nothing.
//!
//! What must stay true: a connection is dead only if bytes are under way on it and none of them arrives for the limit.
//! One that is slow is alive. Nor is it dead while this side, or the other, has not taken what has come: that is the
//! side's fault, and has a longer limit. Time in which this thread did not run does not count.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::lateness::Lateness;
use super::quota;
use super::{ChannelCounters, SharedSender, lock, spawn};
use crate::channel::Connection;
use crate::error::Cause;
use crate::wire::{
    FrameHeader, FrameType, HEADER_BYTES, HEARTBEAT_BYTES, Heartbeat, Message, WireError, data_checksum,
};

/// How long nothing may arrive on a connection while the migration keeps the guest stopped.
const GUEST_STOPPED: Duration = Duration::from_secs(1);
/// How often an idle connection is used while the guest is stopped.
const STOPPED_BEAT: Duration = Duration::from_millis(200);
/// The other side may leave what has come for this many times the limit while the guest runs.
const BEHIND: u32 = 6;
/// How long after a lost data channel the reason for it may take on the control connection.
const REASON: Duration = Duration::from_secs(1);
/// Over how long the speed of a slow connection is measured.
const MEASURED: Duration = Duration::from_secs(2);

/// What a side does on its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// It asks for a sign of life, as the source does.
    Asks,
    /// It says what has come, as the destination does.
    Answers,
}

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carries {
    /// Messages, maybe pages too. Somebody else reads it.
    Messages,
    /// Pages.
    Pages,
}

/// Watches the connections of one side. Ends, and its thread with it, when dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// One connection, for the thread that reads it.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    shared: Arc<Shared>,
    index: usize,
}

#[derive(Debug)]
struct Shared {
    part: Part,
    limit: Duration,
    wake: OwnedFd,
    end: AtomicBool,
    state: Mutex<State>,
    /// Something was acknowledged, or a connection is dead.
    changed: Condvar,
    /// Nanoseconds of silence after which the connection for messages was given up; 0 while it was not.
    silent: AtomicU64,
    /// How late the watching thread was to run.
    lateness: Mutex<Lateness>,
}

#[derive(Debug, Default)]
struct State {
    entries: Vec<Entry>,
    /// The limit while the guest is stopped, once it is.
    stopped: Option<Duration>,
    /// Of a data channel that is dead: its name, what was missed, and for how long.
    dead: Option<(String, &'static str, Duration)>,
}

#[derive(Debug)]
struct Entry {
    carries: Carries,
    connection: Arc<Connection>,
    sender: SharedSender,
    /// Of a connection that only this thread reads.
    reader: Option<HeartbeatReader>,
    /// The speed is told here.
    counters: Option<Arc<ChannelCounters>>,
    /// Nobody needs it any more, or it was given up.
    retired: bool,
    /// How long it has been closed by the peer.
    closed: Option<Duration>,
    /// How long nothing has arrived that should have.
    quiet: Duration,
    /// How long nothing has been sent.
    idle: Duration,
    /// A heartbeat is wanted at once.
    wanted: bool,
    /// Bytes sent, as of the last look.
    sent: u64,
    /// Of bytes sent, those that have arrived, as the peer says.
    arrived: u64,
    /// When that became more.
    proven: Instant,
    /// How long ago the peer said so.
    heard: Duration,
    /// Bytes that the peer has not taken.
    unread: u64,
    /// Bytes received, as of the last look.
    received: u64,
    /// Of these, those the peer knows of.
    told: u64,
    measured: Measured,
}

/// The speed of a connection that always has bytes under way.
#[derive(Debug)]
struct Measured {
    since: Instant,
    from: u64,
    busy: bool,
}

impl Entry {
    fn new(carries: Carries, connection: Arc<Connection>, sender: SharedSender) -> Self {
        let now = Instant::now();
        // The hello and its answer have been heard.
        let (sent, received) = (connection.sent(), connection.received());
        Self {
            carries,
            connection,
            sender,
            reader: None,
            counters: None,
            retired: false,
            closed: None,
            quiet: Duration::ZERO,
            idle: Duration::ZERO,
            wanted: false,
            sent,
            arrived: sent,
            proven: now,
            heard: Duration::ZERO,
            unread: 0,
            received,
            told: received,
            measured: Measured { since: now, from: sent, busy: false },
        }
    }

    /// Whether bytes are under way to the peer. What the kernel cannot take for want of room is, too.
    fn is_waiting(&self) -> bool {
        let sent = self.connection.sent();
        let offered = sent.saturating_add(self.connection.offered());
        sent > self.arrived || (offered > self.arrived && !self.connection.is_writable())
    }

    /// The peer says what has come.
    fn hear(&mut self, heartbeat: Heartbeat) {
        self.heard = Duration::ZERO;
        self.unread = heartbeat.unread;
        if let Some(counters) = &self.counters {
            counters.heard_unread(heartbeat.unread);
        }
        if heartbeat.received > self.arrived {
            self.arrived = heartbeat.received;
            self.quiet = Duration::ZERO;
            self.proven = Instant::now();
        }
    }

    /// Reads what the peer has said, where nobody else does.
    fn read(&mut self) {
        while let Some(reader) = &mut self.reader {
            match reader.read(&self.connection) {
                Ok(Some(heartbeat)) => self.hear(heartbeat),
                Ok(None) => return,
                Err(_) => {
                    self.reader = None;
                    self.closed = Some(Duration::ZERO);
                }
            }
        }
    }

    /// Sends a heartbeat, unless the connection is in use or full: then it shows life by itself.
    fn beat(&mut self) -> bool {
        let heartbeat = Heartbeat { received: self.connection.received(), unread: self.connection.unread() };
        if !self.connection.is_writable() {
            return false;
        }
        let Ok(mut sender) = self.sender.try_lock() else { return false };
        // A failure shows where the connection is read.
        let _ = sender.send(&Message::Heartbeat(heartbeat));
        (self.told, self.idle, self.wanted) = (heartbeat.received, Duration::ZERO, false);
        true
    }

    /// `elapsed` more has passed. Whether the connection is dead: what was missed, and for how long.
    fn ask(&mut self, elapsed: Duration, limit: Duration, behind: Duration, beat: Duration) -> Option<Missed> {
        let sent = self.connection.sent();
        if std::mem::replace(&mut self.sent, sent) != sent {
            self.idle = Duration::ZERO;
        }
        self.idle = self.idle.saturating_add(elapsed);
        self.heard = self.heard.saturating_add(elapsed);
        let waiting = self.is_waiting();
        self.quiet = if waiting { self.quiet.saturating_add(elapsed) } else { Duration::ZERO };
        self.measure(waiting);
        if self.wanted || (self.idle >= beat && !waiting) {
            self.beat();
        }
        if let Some(closed) = &mut self.closed {
            *closed = closed.saturating_add(elapsed);
            return (*closed > REASON).then_some(Missed::Closed);
        }
        let is_behind = self.unread > 0 && self.heard <= limit;
        match is_behind {
            true if self.quiet > behind => Some(Missed::Taken),
            false if self.quiet > limit => Some(Missed::Acknowledged),
            _ => None,
        }
    }

    /// Tells how fast a connection is that always has bytes under way.
    fn measure(&mut self, waiting: bool) {
        let Some(counters) = &self.counters else { return };
        let measured = &mut self.measured;
        measured.busy &= waiting;
        let elapsed = measured.since.elapsed();
        if elapsed < MEASURED && waiting {
            return;
        }
        let arrived = self.arrived.saturating_sub(measured.from);
        counters.set_link_speed(measured.busy.then_some((arrived as f64 / elapsed.as_secs_f64().max(1e-3)) as u64));
        *measured = Measured { since: Instant::now(), from: self.arrived, busy: true };
    }

    /// As [`ask`](Self::ask), for a side that answers.
    fn answer(&mut self, elapsed: Duration, limit: Duration, beat: Duration) -> Option<Missed> {
        let (received, unread) = (self.connection.received(), self.connection.unread());
        let before = std::mem::replace(&mut self.received, received);
        self.quiet = if received != before || unread > 0 { Duration::ZERO } else { self.quiet.saturating_add(elapsed) };
        self.idle = self.idle.saturating_add(elapsed);
        if self.wanted || received != self.told || unread > 0 || self.idle >= beat {
            self.beat();
        }
        (self.quiet > limit).then_some(Missed::Anything)
    }
}

/// What did not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missed {
    /// An acknowledgement.
    Acknowledged,
    /// The peer's taking what has come.
    Taken,
    /// A sign of life.
    Anything,
    /// It is closed, and nobody has said why.
    Closed,
}

impl Missed {
    fn text(self) -> &'static str {
        match self {
            Self::Acknowledged => "nothing that was sent on it has been acknowledged",
            Self::Taken => "the other side has not taken what came on it",
            Self::Anything => "nothing has come on it, not even a heartbeat,",
            Self::Closed => "the peer has closed it without a reason",
        }
    }
}

impl Shared {
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Time between looks.
    fn tick(&self, stopped: bool) -> Duration {
        let usual = (self.limit / 10).min(Duration::from_millis(200));
        if stopped { usual.min(GUEST_STOPPED / 10) } else { usual }
    }

    fn run(&self, lost: &(dyn Fn(Cause) + Send)) {
        let mut looked = Instant::now();
        while !self.end.load(Ordering::Acquire) {
            let stopped = lock(&self.state).stopped.is_some();
            let tick = self.tick(stopped);
            let due = looked + tick;
            if self.sleep(tick.saturating_sub(looked.elapsed())) {
                lock(&self.lateness).note(due, Instant::now());
            }
            let mut elapsed = looked.elapsed();
            let full = elapsed >= tick;
            if full {
                looked = Instant::now();
                // This thread may have been kept from running, and the peer's signs of life with it.
                elapsed = elapsed.min(tick * 2);
            }
            for (carries, connection, missed, after) in self.look(full.then_some(elapsed)) {
                if carries == Carries::Messages {
                    let after = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
                    self.silent.store(after, Ordering::Release);
                } else {
                    // Before it is shut down, so that whoever uses it does not tell of that first.
                    lost(dead(connection.name().to_owned(), missed, after));
                }
                connection.shutdown();
            }
        }
    }

    /// Sleeps until something is to be done; whether the time has passed before there was.
    fn sleep(&self, timeout: Duration) -> bool {
        let read: Vec<Arc<Connection>> = {
            let state = lock(&self.state);
            let read = state.entries.iter().filter(|entry| entry.reader.is_some() && !entry.retired);
            read.map(|entry| entry.connection.clone()).collect()
        };
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(read.iter().map(|connection| PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN)));
        // A zero timeout looks once.
        let timeout = Timespec::try_from(timeout).ok();
        let ready = rustix::event::poll(&mut fds, timeout.as_ref());
        if ready.is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        ready == Ok(0)
    }

    /// Reads and sends what is to be; and, where `elapsed` has passed since the last full look, finds the dead.
    fn look(&self, elapsed: Option<Duration>) -> Vec<(Carries, Arc<Connection>, Missed, Duration)> {
        let mut state = lock(&self.state);
        let usual = (self.limit / 5).min(Duration::from_secs(1));
        let (limit, behind, beat) = match state.stopped {
            Some(limit) => (limit, self.limit, usual.min(STOPPED_BEAT)),
            None => (self.limit, self.limit * BEHIND, usual),
        };
        let mut found = Vec::new();
        let State { entries, dead, .. } = &mut *state;
        for entry in entries.iter_mut().filter(|entry| !entry.retired) {
            entry.read();
            let missed = match (elapsed, self.part) {
                (Some(elapsed), Part::Asks) => entry.ask(elapsed, limit, behind, beat),
                (Some(elapsed), Part::Answers) => entry.answer(elapsed, limit, beat),
                (None, _) => {
                    if entry.wanted {
                        entry.beat();
                    }
                    None
                }
            };
            let Some(missed) = missed else { continue };
            entry.retired = true;
            let after = if missed == Missed::Taken { behind } else { limit };
            if entry.carries == Carries::Pages {
                dead.get_or_insert_with(|| (entry.connection.name().to_owned(), missed.text(), after));
            }
            found.push((entry.carries, entry.connection.clone(), missed, after));
        }
        drop(state);
        self.changed.notify_all();
        found
    }
}

fn dead(channel: String, missed: Missed, after: Duration) -> Cause {
    match missed {
        Missed::Closed => Cause::Closed { channel },
        _ => Cause::Dead { channel, missed: missed.text(), after },
    }
}

impl Watch {
    /// Watches a connection for messages, whose silence is found by [`found_silence`](Self::found_silence) after it was
    /// shut down. A data channel that is lost is told to `lost` before it is shut down.
    pub(crate) fn start(
        part: Part,
        connection: Arc<Connection>,
        sender: SharedSender,
        limit: Duration,
        lost: impl Fn(Cause) + Send + 'static,
    ) -> Result<Self, Cause> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Cause::Io { doing: "make", target: "an eventfd".into(), source: e.into() })?;
        let entries = vec![Entry::new(Carries::Messages, connection, sender)];
        let shared = Arc::new(Shared {
            part,
            limit,
            wake,
            end: AtomicBool::new(false),
            state: Mutex::new(State { entries, ..State::default() }),
            changed: Condvar::new(),
            silent: AtomicU64::new(0),
            lateness: Mutex::new(Lateness::new()),
        });
        let watching = shared.clone();
        let thread = spawn("watch", move || watching.run(&lost))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The connection for messages.
    pub(crate) fn messages(&self) -> Watched {
        Watched { shared: self.shared.clone(), index: 0 }
    }

    /// Watches a data channel too. Of a side that asks, nobody else reads it. Its speed is told in `counters`.
    pub(crate) fn add(
        &self,
        connection: Arc<Connection>,
        sender: SharedSender,
        counters: Arc<ChannelCounters>,
    ) -> Watched {
        let mut entry = Entry::new(Carries::Pages, connection, sender);
        if self.shared.part == Part::Asks {
            entry.reader = Some(HeartbeatReader::default());
            entry.counters = Some(counters);
        }
        let mut state = lock(&self.shared.state);
        state.entries.push(entry);
        let index = state.entries.len().saturating_sub(1);
        drop(state);
        self.shared.wake();
        Watched { shared: self.shared.clone(), index }
    }

    /// The speed of the connection for messages, which carries the pages too, is told in `counters`.
    pub(crate) fn tell_speed_in(&self, counters: Arc<ChannelCounters>) {
        if let Some(entry) = lock(&self.shared.state).entries.first_mut() {
            entry.counters = Some(counters);
        }
    }

    /// The guest is stopped for the migration's sake: from now on a dead connection is found within a second, or within
    /// some round trips where these take long.
    pub(crate) fn guest_stopped(&self, round_trip: Duration) {
        let limit = GUEST_STOPPED.max(round_trip.saturating_mul(4)).min(self.shared.limit);
        lock(&self.shared.state).stopped = Some(limit);
        self.shared.wake();
    }

    /// Waits until every connection that has proven itself for the last time more than `age` ago has done so again.
    ///
    /// # Errors
    /// When one of them is dead, or `stop` is set.
    pub(crate) fn confirm(&self, age: Duration, stop: &AtomicBool) -> Result<(), Cause> {
        const LOOK: Duration = Duration::from_millis(20);
        let shared = &self.shared;
        let mut state = lock(&shared.state);
        let deadline = Instant::now() + state.stopped.unwrap_or(shared.limit) + REASON;
        let mut asked: Vec<(usize, u64)> = Vec::new();
        for (index, entry) in state.entries.iter_mut().enumerate() {
            if !entry.retired && entry.proven.elapsed() > age {
                entry.wanted = true;
                asked.push((index, entry.connection.sent()));
            }
        }
        shared.wake();
        loop {
            if let Some((channel, missed, after)) = &state.dead {
                return Err(Cause::Dead { channel: channel.clone(), missed, after: *after });
            }
            asked.retain(|(index, before)| {
                state.entries.get(*index).is_some_and(|entry| !entry.retired && entry.arrived <= *before)
            });
            let Some((late, _)) = asked.first() else { return Ok(()) };
            if stop.load(Ordering::Acquire) {
                return Err(Cause::Cancelled);
            }
            if Instant::now() > deadline {
                let name = state.entries.get(*late).map(|entry| entry.connection.name().to_owned());
                let after = state.stopped.unwrap_or(shared.limit);
                return Err(dead(name.unwrap_or_default(), Missed::Acknowledged, after));
            }
            state = shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How late this side may be to run when it is to: as late as it has lately been, or as its part of a processor makes it.
    pub(crate) fn lateness(&self) -> Duration {
        lock(&self.shared.lateness).longest(Instant::now()).max(quota::longest_standstill())
    }

    /// How long the connection for messages was silent before it was given up for that, if it was.
    pub(crate) fn found_silence(&self) -> Option<Duration> {
        match self.shared.silent.load(Ordering::Acquire) {
            0 => None,
            nanoseconds => Some(Duration::from_nanos(nanoseconds)),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Watched {
    /// The peer has sent a heartbeat.
    pub(crate) fn hear(&self, heartbeat: Heartbeat) {
        {
            let mut state = lock(&self.shared.state);
            let Some(entry) = state.entries.get_mut(self.index) else { return };
            match self.shared.part {
                Part::Asks => entry.hear(heartbeat),
                Part::Answers => entry.wanted = true,
            }
        }
        match self.shared.part {
            Part::Asks => self.shared.changed.notify_all(),
            Part::Answers => self.shared.wake(),
        }
    }

    /// Everything has arrived: what becomes of the data channels does not matter any more.
    pub(crate) fn retire_data(&self) {
        let mut state = lock(&self.shared.state);
        state.entries.iter_mut().filter(|entry| entry.carries == Carries::Pages).for_each(|entry| entry.retired = true);
    }
}

/// Reads the heartbeats of a connection on which nothing else comes, without waiting for them.
#[derive(Debug)]
struct HeartbeatReader {
    sequence: u64,
    bytes: [u8; HEADER_BYTES + HEARTBEAT_BYTES],
    filled: usize,
}

impl Default for HeartbeatReader {
    fn default() -> Self {
        Self { sequence: 0, bytes: [0; HEADER_BYTES + HEARTBEAT_BYTES], filled: 0 }
    }
}

impl HeartbeatReader {
    /// The next one, if all of it has come.
    fn read(&mut self, connection: &Connection) -> Result<Option<Heartbeat>, Cause> {
        let wrong = |source| Cause::Wire { channel: connection.name().to_owned(), source };
        while let Some(space) = self.bytes.get_mut(self.filled..).filter(|space| !space.is_empty()) {
            match connection.recv_available(space)? {
                None => return Ok(None),
                Some(0) => return Err(Cause::Closed { channel: connection.name().to_owned() }),
                Some(got) => self.filled = self.filled.saturating_add(got),
            }
        }
        self.filled = 0;
        self.decode().map(Some).map_err(wrong)
    }

    fn decode(&mut self) -> Result<Heartbeat, WireError> {
        let what = "a heartbeat";
        let (header, body) = self.bytes.split_first_chunk::<HEADER_BYTES>().ok_or(WireError::Length { what })?;
        let header = FrameHeader::decode(header, self.sequence)?;
        self.sequence = self.sequence.wrapping_add(1);
        if header.frame_type != FrameType::Heartbeat || header.data_length as usize != HEARTBEAT_BYTES {
            return Err(WireError::Value {
                what: "what comes back on a data channel",
                value: header.frame_type as u64,
            });
        }
        if data_checksum(body) != header.data_checksum {
            return Err(WireError::Checksum { what: "a message" });
        }
        match Message::decode(header.frame_type, body)? {
            Message::Heartbeat(heartbeat) => Ok(heartbeat),
            _ => Err(WireError::Length { what }),
        }
    }
}
