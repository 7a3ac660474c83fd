//! What is on its way to one client.
//!
//! Replies and events wait here, in order, for the thread that writes them. A reply waits for room: a client that does
//! not read its replies is not read from either. An event waits for nobody: the client for which there is no room for
//! one is disconnected.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SendFlags, Shutdown};

/// A reply waits while more than this is waiting.
const REPLIES_BYTES: usize = 256 << 10;
/// A client for which more than this waits when an event comes does not read.
const EVENTS_BYTES: usize = 1 << 20;

/// The client is gone, or has been disconnected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// A line has been taken and is not yet written.
    writing: bool,
    /// No more will come.
    finished: bool,
    closed: bool,
}

/// The lines that wait for one client, and its socket.
#[derive(Debug)]
pub(crate) struct Outbox {
    socket: OwnedFd,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Outbox {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, waiting: Mutex::default(), changed: Condvar::new() }
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether the client is on this host for sure.
    pub(crate) fn is_local(&self) -> bool {
        rustix::net::sockopt::socket_domain(&self.socket).is_ok_and(|domain| domain == AddressFamily::UNIX)
    }

    /// Whether the client is gone, or has been disconnected.
    pub(crate) fn is_closed(&self) -> bool {
        self.waiting().closed
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for a reply.
    pub(crate) fn make_room(&self) -> Result<(), Gone> {
        if self.room().closed { Err(Gone) } else { Ok(()) }
    }

    /// Adds a reply, when there is room.
    pub(crate) fn reply(&self, line: Vec<u8>) -> Result<(), Gone> {
        self.add(&mut self.room(), line)
    }

    /// Adds a reply, for which there is room.
    pub(crate) fn reply_now(&self, line: Vec<u8>) -> Result<(), Gone> {
        self.add(&mut self.waiting(), line)
    }

    fn room(&self) -> MutexGuard<'_, Waiting> {
        let full = |waiting: &mut Waiting| !waiting.closed && waiting.bytes > REPLIES_BYTES;
        self.changed.wait_while(self.waiting(), full).unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event, or disconnects the client if there is no room.
    pub(crate) fn event(&self, line: Vec<u8>) {
        let mut waiting = self.waiting();
        if waiting.bytes > EVENTS_BYTES {
            self.end(&mut waiting);
        }
        // One that is gone misses nothing.
        let _ = self.add(&mut waiting, line);
    }

    fn add(&self, waiting: &mut Waiting, line: Vec<u8>) -> Result<(), Gone> {
        if waiting.closed {
            return Err(Gone);
        }
        waiting.bytes = waiting.bytes.saturating_add(line.len());
        waiting.lines.push_back(line);
        self.changed.notify_all();
        Ok(())
    }

    /// Writes what comes, until no more will or the client is gone.
    pub(crate) fn write_all(&self) {
        while let Some(line) = self.next() {
            let written = self.write(&line);
            let mut waiting = self.waiting();
            waiting.writing = false;
            waiting.bytes = waiting.bytes.saturating_sub(line.len());
            if written.is_err() {
                self.end(&mut waiting);
            }
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Vec<u8>> {
        let idle = |waiting: &mut Waiting| waiting.lines.is_empty() && !waiting.finished && !waiting.closed;
        let waiting = self.changed.wait_while(self.waiting(), idle);
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        let line = if waiting.closed { None } else { waiting.lines.pop_front() };
        waiting.writing = line.is_some();
        line
    }

    fn write(&self, mut line: &[u8]) -> io::Result<()> {
        while !line.is_empty() {
            match rustix::net::send(&self.socket, line, SendFlags::NOSIGNAL) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => line = line.get(sent..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Says that no more will come.
    pub(crate) fn finish(&self) {
        self.waiting().finished = true;
        self.changed.notify_all();
    }

    /// Disconnects the client.
    pub(crate) fn close(&self) {
        self.end(&mut self.waiting());
    }

    fn end(&self, waiting: &mut Waiting) {
        waiting.closed = true;
        waiting.lines.clear();
        waiting.bytes = 0;
        // Wakes whoever reads from it or writes to it.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        self.changed.notify_all();
    }

    /// Waits until everything is written or the client is gone, but not beyond `deadline`.
    pub(crate) fn drain(&self, deadline: Instant) {
        let busy = |waiting: &mut Waiting| !waiting.closed && (waiting.writing || !waiting.lines.is_empty());
        let left: Duration = deadline.saturating_duration_since(Instant::now());
        let _ = self.changed.wait_timeout_while(self.waiting(), left, busy);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::thread;

    use super::*;

    fn pair() -> (Arc<Outbox>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Arc::new(Outbox::new(ours.into())), theirs)
    }

    #[test]
    fn in_order_and_drained() {
        let (outbox, mut client) = pair();
        let writer = thread::spawn({
            let outbox = Arc::clone(&outbox);
            move || outbox.write_all()
        });
        outbox.reply(b"a".to_vec()).unwrap();
        outbox.event(b"b".to_vec());
        outbox.reply(b"c".to_vec()).unwrap();
        outbox.drain(Instant::now() + Duration::from_secs(10));
        let mut got = [0; 3];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"abc");
        outbox.finish();
        writer.join().unwrap();
    }

    /// A client that does not read: replies wait, events go on for a while, then it is disconnected; nothing blocks, and
    /// what is held stays within bounds.
    #[test]
    fn a_client_that_does_not_read() {
        let (outbox, mut client) = pair();
        let writer = thread::spawn({
            let outbox = Arc::clone(&outbox);
            move || outbox.write_all()
        });
        let replying = thread::spawn({
            let outbox = Arc::clone(&outbox);
            move || (0..).find(|_| outbox.reply(vec![b'r'; 10_000]).is_err())
        });
        for _ in 0..20_000 {
            outbox.event(vec![b'e'; 100]);
            assert!(outbox.waiting().bytes <= EVENTS_BYTES + 20_000);
        }
        assert!(replying.join().unwrap().is_some());
        writer.join().unwrap();
        assert_eq!(outbox.reply(Vec::new()), Err(Gone));
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // What was written before may arrive; then comes the end.
        client.read_to_end(&mut Vec::new()).unwrap();
    }
}
