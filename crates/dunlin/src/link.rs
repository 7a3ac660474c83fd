//! Frames over connections: numbered, checksummed, counted.
//!
//! What must stay true: frames of one direction of one connection are numbered without gaps, and a sender that failed
//! in the middle of a frame sends no more.

use std::io::IoSlice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::channel::{Connection, More, Origin};
use crate::error::Cause;
use crate::memory::{GuestSlice, PAGE_SIZE};
use crate::page::PageKind;
use crate::report::{ChannelReport, CompressionReport, DeltaCounts, PageCounts};
use crate::wire::{
    DataDigest, FrameHeader, FrameType, HEADER_BYTES, HELLO_BYTES, Message, PageRun, WireError, data_checksum,
    decode_runs, table_checksum,
};

mod greeting;
mod lateness;
mod quota;
mod watch;

pub(crate) use greeting::{answer_hello, say_hello};
pub(crate) use quota::longest_standstill as standstill;
pub(crate) use watch::{Part, Watch, Watched};

/// Figures of one channel, readable while it works.
#[derive(Debug, Default)]
pub(crate) struct ChannelCounters {
    pub(crate) bytes: AtomicU64,
    pub(crate) frames: AtomicU64,
    pages: [AtomicU64; PageKind::COUNT],
    /// What `delta` did up to the last round.
    pub(crate) delta: Mutex<DeltaCounts>,
    /// Nanoseconds that the channel's thread has used of a processor.
    busy: AtomicU64,
    /// Nanoseconds that the channel's thread stood still.
    waiting: AtomicU64,
    /// What the link carries a second, as 1 more than that, while the channel always has bytes under way; else 0.
    link_speed: AtomicU64,
    /// How far the destination has kept up of late, of [`ALL`].
    keeps_up: AtomicU64,
    /// What the compressor did so far, where there is one.
    compression: Mutex<Option<CompressionReport>>,
}

/// All of a share.
const ALL: u64 = 1 << 16;
/// A destination that has so many bytes unread is the one that is waited for.
const BEHIND_BYTES: u64 = 64 << 10;

impl ChannelCounters {
    pub(crate) fn pages(&self) -> PageCounts {
        PageCounts::from_array(self.pages.each_ref().map(|count| count.load(Ordering::Acquire)))
    }

    /// Counts the pages in `length` bytes of RAM.
    pub(crate) fn count(&self, kind: PageKind, length: u64) {
        if let Some(count) = self.pages.get(usize::from(kind.number())) {
            count.fetch_add(length / PAGE_SIZE, Ordering::Release);
        }
    }

    /// The link carries so many bytes a second; nothing where it has room.
    pub(crate) fn set_link_speed(&self, bytes_per_second: Option<u64>) {
        let speed = bytes_per_second.map_or(0, |speed| speed.saturating_add(1));
        self.link_speed.store(speed, Ordering::Relaxed);
    }

    /// The destination says how many bytes have come that it has not taken.
    pub(crate) fn heard_unread(&self, unread: u64) {
        let now = if unread < BEHIND_BYTES { ALL } else { 0 };
        let before = self.keeps_up.load(Ordering::Relaxed);
        // One thread hears of all.
        self.keeps_up.store(before.midpoint(now), Ordering::Relaxed);
    }

    /// The part of the time that a sender waits in which it waits for the link, and not for the destination. It is 0 until
    /// the destination has said how far it is.
    pub(crate) fn link_share(&self) -> f64 {
        self.keeps_up.load(Ordering::Relaxed) as f64 / ALL as f64
    }

    /// What the compressor did so far.
    pub(crate) fn set_compression(&self, counts: Option<CompressionReport>) {
        *lock(&self.compression) = counts;
    }

    pub(crate) fn report(&self, index: u8) -> ChannelReport {
        ChannelReport {
            index,
            transferred_bytes: self.bytes.load(Ordering::Relaxed),
            frames: self.frames.load(Ordering::Relaxed),
            pages: self.pages(),
            busy_seconds: self.busy.load(Ordering::Relaxed) as f64 / 1e9,
            waiting_seconds: self.waiting.load(Ordering::Relaxed) as f64 / 1e9,
            link_bytes_per_second: self.link_speed.load(Ordering::Relaxed).checked_sub(1),
            compression: *lock(&self.compression),
        }
    }
}

/// Tells a channel's time from that which its thread stands still. Of one thread, while it lives.
#[derive(Debug)]
pub(crate) struct ChannelClock {
    counters: Arc<ChannelCounters>,
    now: Instant,
    used: Duration,
}

impl ChannelClock {
    /// Starts for the calling thread.
    pub(crate) fn start(counters: Arc<ChannelCounters>) -> Self {
        Self { counters, now: Instant::now(), used: thread_cpu_time() }
    }

    /// Counts the time since the last look, and gives it: on a processor, and not.
    pub(crate) fn lap(&mut self) -> (Duration, Duration) {
        let (now, used) = (Instant::now(), thread_cpu_time());
        let elapsed = now.saturating_duration_since(std::mem::replace(&mut self.now, now));
        let busy = used.saturating_sub(std::mem::replace(&mut self.used, used));
        let add = |counter: &AtomicU64, time: Duration| {
            counter.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        };
        let waiting = elapsed.saturating_sub(busy);
        add(&self.counters.busy, busy);
        add(&self.counters.waiting, waiting);
        (busy, waiting)
    }

    /// Leaves out the time since the last look: nothing was under way.
    pub(crate) fn skip(&mut self) {
        self.now = Instant::now();
        self.used = thread_cpu_time();
    }
}

/// The sending direction of a connection.
#[derive(Debug)]
pub(crate) struct FrameSender {
    connection: Arc<Connection>,
    counters: Arc<ChannelCounters>,
    /// Of the channel whose pages and marks are sent here.
    pages: Arc<ChannelCounters>,
    sequence: u64,
    broken: bool,
}

/// A sender that several threads use: control messages and, on a single connection, pages.
pub(crate) type SharedSender = Arc<Mutex<FrameSender>>;

/// Locks, whatever happened to the thread that held the lock before: what is guarded is checked anyway.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FrameSender {
    pub(crate) fn new(connection: Arc<Connection>, counters: Arc<ChannelCounters>) -> Self {
        Self { connection, pages: counters.clone(), counters, sequence: 0, broken: false }
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// From here on frames of pages and marks are another channel's.
    pub(crate) fn count_pages_in(&mut self, counters: Arc<ChannelCounters>) {
        self.pages = counters;
    }

    /// Sends a control message.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), Cause> {
        let body = message.encode();
        self.send_frame(message.frame_type(), &[], &body, data_checksum(&body))
    }

    /// Sends a frame of pages: a table of runs, their encodings, and the checksum of the pages themselves.
    pub(crate) fn send_pages(&mut self, table: &[u8], data: PagesData<'_>) -> Result<(), Cause> {
        let length = match &data {
            PagesData::Encoded { bytes, .. } => bytes.len(),
            PagesData::InPlace { slices, .. } => slices.iter().map(GuestSlice::len).sum(),
        };
        self.send_with(FrameType::Pages, table, length, 0, |connection, header| {
            let beginning = [Origin::Buffer(header), Origin::Buffer(table)];
            let unchecked = 0u64.to_le_bytes();
            match data {
                PagesData::Encoded { bytes, checksum } => {
                    let checksum = checksum.to_le_bytes();
                    let pieces = [header, table, bytes, &checksum];
                    connection.send_all(&mut pieces.map(IoSlice::new))
                }
                PagesData::InPlace { slices, way: Way::Straight } => {
                    let guest = slices.iter().map(Origin::Guest);
                    let all = beginning.into_iter().chain(guest).chain([Origin::Buffer(&unchecked)]);
                    connection.send_from(&all.collect::<Vec<_>>(), More::No)
                }
                PagesData::InPlace { slices, way: Way::ZeroCopy } => {
                    connection.send_zero_copy(&beginning, slices, &unchecked)
                }
                PagesData::InPlace { slices, way: Way::Checked(buffer) } => {
                    send_checked(connection, &beginning, slices, buffer)
                }
            }
        })
    }

    fn send_frame(
        &mut self,
        frame_type: FrameType,
        table: &[u8],
        data: &[u8],
        data_checksum: u64,
    ) -> Result<(), Cause> {
        self.send_with(frame_type, table, data.len(), data_checksum, |connection, header| {
            connection.send_all(&mut [IoSlice::new(header), IoSlice::new(table), IoSlice::new(data)])
        })
    }

    /// Numbers, sends and counts a frame; `send` is given its header.
    fn send_with(
        &mut self,
        frame_type: FrameType,
        table: &[u8],
        data_length: usize,
        data_checksum: u64,
        send: impl FnOnce(&Connection, &[u8]) -> Result<(), Cause>,
    ) -> Result<(), Cause> {
        if self.broken {
            return Err(Cause::Closed { channel: self.connection.name().to_owned() });
        }
        let header = FrameHeader {
            frame_type,
            sequence: self.sequence,
            table_length: table.len() as u32,
            data_length: data_length as u32,
            table_checksum: table_checksum(table),
            data_checksum,
        };
        self.broken = true;
        send(&self.connection, &header.encode())?;
        self.broken = false;
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = HEADER_BYTES + table.len() + data_length + frame_type.trailer_bytes();
        let counters = if frame_type.is_of_pages() { &self.pages } else { &self.counters };
        counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        counters.frames.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// What a Pages frame carries.
#[derive(Debug)]
pub(crate) enum PagesData<'a> {
    /// Encodings in a buffer.
    Encoded {
        /// One behind the other.
        bytes: &'a [u8],
        /// Of the pages that they stand for.
        checksum: u64,
    },
    /// Plain pages where they are.
    InPlace {
        /// In the order of the table.
        slices: &'a [GuestSlice<'a>],
        /// How they get to the socket.
        way: Way<'a>,
    },
}

/// How pages get from where they are to the socket.
#[derive(Debug)]
pub(crate) enum Way<'a> {
    /// The kernel copies them, and nobody checks them.
    Straight,
    /// The socket gets the pages of the guest's file, and nobody checks them.
    ZeroCopy,
    /// Through this buffer, which is small enough to stay in a processor's cache, and where they are checked: the guest
    /// may write to them meanwhile, and the checksum must be that of the bytes sent.
    Checked(&'a mut [u8]),
}

/// Sends `beginning`, `slices` and their checksum, by way of `buffer`.
fn send_checked(
    connection: &Connection,
    mut beginning: &[Origin<'_>],
    slices: &[GuestSlice<'_>],
    buffer: &mut [u8],
) -> Result<(), Cause> {
    let mut digest = DataDigest::default();
    let mut filled = 0;
    for slice in slices {
        let mut at = 0;
        while at < slice.len() {
            if filled == buffer.len() {
                connection.send_from(&[beginning, &[Origin::Buffer(buffer)]].concat(), More::Yes)?;
                beginning = &[];
                filled = 0;
            }
            let length = (slice.len() - at).min(buffer.len() - filled);
            let piece = buffer.get_mut(filled..filled + length).unwrap_or_default();
            slice.read(at, piece)?;
            digest.update(piece);
            at += length;
            filled += length;
        }
    }
    let checksum = digest.value().to_le_bytes();
    let end = [Origin::Buffer(buffer.get(..filled).unwrap_or_default()), Origin::Buffer(&checksum)];
    connection.send_from(&[beginning, &end].concat(), More::No)
}

/// The receiving direction of a connection.
#[derive(Debug)]
pub(crate) struct FrameReceiver {
    connection: Arc<Connection>,
    counters: Arc<ChannelCounters>,
    /// Of the channel whose pages and marks come here.
    pages: Arc<ChannelCounters>,
    sequence: u64,
    table: Vec<u8>,
}

/// What came.
#[derive(Debug)]
pub(crate) enum Received {
    Message(Message),
    /// The table of a Pages frame, decoded and checked; its data and their checksum are still to be received.
    Pages,
}

impl FrameReceiver {
    pub(crate) fn new(connection: Arc<Connection>, counters: Arc<ChannelCounters>) -> Self {
        Self { connection, pages: counters.clone(), counters, sequence: 0, table: Vec::new() }
    }

    /// Frames of pages and marks are another channel's.
    pub(crate) fn count_pages_in(&mut self, counters: Arc<ChannelCounters>) {
        self.pages = counters;
    }

    /// The first frame, a message of `bytes`, has been read from the connection already.
    pub(crate) fn has_read(&mut self, bytes: u64) {
        self.sequence = 1;
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.counters.frames.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Says on which channel the bytes were wrong.
    pub(crate) fn wire(&self, source: WireError) -> Cause {
        Cause::Wire { channel: self.connection.name().to_owned(), source }
    }

    /// Receives the next frame. The runs of a Pages frame, checked against `block_bytes`, go to `runs`.
    pub(crate) fn next(&mut self, block_bytes: &[u64], runs: &mut Vec<PageRun>) -> Result<Received, Cause> {
        self.receive(block_bytes, runs).map_err(|cause| self.connection.explain(cause))
    }

    fn receive(&mut self, block_bytes: &[u64], runs: &mut Vec<PageRun>) -> Result<Received, Cause> {
        let mut bytes = [0; HEADER_BYTES];
        self.connection.recv_exact(&mut bytes)?;
        let header = FrameHeader::decode(&bytes, self.sequence).map_err(|e| self.wire(e))?;
        self.sequence = self.sequence.wrapping_add(1);
        let total = HEADER_BYTES as u64
            + u64::from(header.table_length)
            + u64::from(header.data_length)
            + header.frame_type.trailer_bytes() as u64;
        let counters = if header.frame_type.is_of_pages() { &self.pages } else { &self.counters };
        counters.bytes.fetch_add(total, Ordering::Relaxed);
        counters.frames.fetch_add(1, Ordering::Relaxed);
        // Within the limit of its type: `decode` saw to it.
        self.table.resize(header.table_length as usize, 0);
        self.connection.recv_exact(&mut self.table)?;
        if table_checksum(&self.table) != header.table_checksum {
            return Err(self.wire(WireError::Checksum { what: "a frame's table" }));
        }
        if header.frame_type == FrameType::Pages {
            decode_runs(&self.table, header.data_length, block_bytes, runs).map_err(|e| self.wire(e))?;
            return Ok(Received::Pages);
        }
        let mut body = vec![0; header.data_length as usize];
        self.connection.recv_exact(&mut body)?;
        if data_checksum(&body) != header.data_checksum {
            return Err(self.wire(WireError::Checksum { what: "a message" }));
        }
        Message::decode(header.frame_type, &body).map(Received::Message).map_err(|e| self.wire(e))
    }

    /// Receives a control message where pages have no place.
    pub(crate) fn next_message(&mut self) -> Result<Message, Cause> {
        match self.next(&[], &mut Vec::new())? {
            Received::Message(message) => Ok(message),
            Received::Pages => Err(Cause::Unexpected { message: "Pages", expected: "a message" }),
        }
    }
}

/// What a hello takes on the way to the destination, for the counters.
pub(crate) const COUNTED_HELLO_BYTES: u64 = HELLO_BYTES as u64;

/// How many messages of a connection may be queued: its reader waits when a peer sends faster than it is listened to,
/// and so does the peer then. Without it, a peer could fill this process's memory.
const MAX_QUEUED: usize = 16;

/// Places in a queue for one connection's messages.
#[derive(Debug, Default)]
pub(crate) struct Places {
    taken: Mutex<Taken>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    count: usize,
    closed: bool,
}

/// A place, given back when dropped: when the message that holds it has been acted on.
#[derive(Debug)]
pub(crate) struct Place(Arc<Places>);

impl Places {
    /// Waits for a place; `None` once [`close`](Self::close) was called.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Place> {
        let mut taken = lock(&self.taken);
        while taken.count >= MAX_QUEUED && !taken.closed {
            taken = self.changed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        if taken.closed {
            return None;
        }
        taken.count += 1;
        Some(Place(self.clone()))
    }

    /// Nobody listens any more: whoever waits for a place stops waiting.
    pub(crate) fn close(&self) {
        lock(&self.taken).closed = true;
        self.changed.notify_all();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.taken).count -= 1;
        self.0.changed.notify_all();
    }
}

/// Starts one of the engine's threads.
pub(crate) fn spawn(name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Cause> {
    std::thread::Builder::new()
        .name(format!("dunlin {name}"))
        .spawn(body)
        .map_err(|e| Cause::Thread { thread: name, what: format!("could not be started: {e}") })
}

/// Turns a panic of `body`, in which a VMM's own code may run, into an error: somebody waits for the thread's answer,
/// and a guest may be waiting to go on.
pub(crate) fn contain<T>(thread: &'static str, body: impl FnOnce() -> Result<T, Cause>) -> Result<T, Cause> {
    // What a panic leaves half done is a migration that fails; the locks' contents are checked anyway.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        Err(Cause::Thread { thread, what: format!("panicked: {text}") })
    })
}

/// CPU time of the calling thread so far.
pub(crate) fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// CPU time of several threads, each adding its own when it ends or at a pause.
#[derive(Debug, Default)]
pub(crate) struct CpuTime(AtomicU64);

/// Adds what the thread has used since the last call.
#[derive(Debug)]
pub(crate) struct CpuMeter {
    total: Arc<CpuTime>,
    last: Duration,
}

impl CpuTime {
    pub(crate) fn total(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    /// A meter for the calling thread.
    pub(crate) fn meter(self: &Arc<Self>) -> CpuMeter {
        CpuMeter { total: self.clone(), last: thread_cpu_time() }
    }
}

impl CpuMeter {
    pub(crate) fn add(&mut self) {
        let now = thread_cpu_time();
        let used = now.saturating_sub(self.last);
        self.last = now;
        self.total.0.fetch_add(u64::try_from(used.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl Drop for CpuMeter {
    fn drop(&mut self) {
        self.add();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A reader that is ahead waits, goes on when a message was acted on, and ends when nobody listens any more.
    #[test]
    fn places_are_few() {
        let places = Arc::new(Places::default());
        let (queue, queued) = mpsc::channel();
        let reader = std::thread::spawn({
            let places = places.clone();
            move || {
                let mut read = 0;
                while let Some(place) = places.take() {
                    read += 1;
                    queue.send(place).unwrap();
                }
                read
            }
        });
        let mut taken: Vec<Place> = (0..MAX_QUEUED).map(|_| queued.recv().unwrap()).collect();
        let nothing = queued.recv_timeout(Duration::from_millis(50));
        assert!(nothing.is_err(), "the reader went past its places");
        taken.clear();
        taken.extend((0..MAX_QUEUED).map(|_| queued.recv().unwrap()));
        assert!(queued.recv_timeout(Duration::from_millis(50)).is_err());
        places.close();
        assert_eq!(reader.join().unwrap(), 2 * MAX_QUEUED);
    }
}
