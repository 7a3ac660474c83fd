//! One connection: a socket, its name for errors, and whole reads and writes.
//!
//! All transports end in a stream socket, so there is one kind of connection. What must stay true: a short read is
//! an error; `shutdown` from any thread makes every blocked read and write return; sending never raises SIGPIPE.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};

use super::command::Command;
use crate::error::Cause;
use crate::memory::GuestSlice;

/// Linux's UIO_MAXIOV: pieces that one system call takes.
const MAX_PIECES: usize = 1024;

/// Where received bytes go.
pub(crate) enum Target<'a> {
    /// Into guest RAM.
    Guest(GuestSlice<'a>),
    /// Into a buffer.
    Buffer(&'a mut [u8]),
}

/// Where bytes to send come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin<'a> {
    /// Guest RAM, which the guest may be writing.
    Guest(&'a GuestSlice<'a>),
    /// A buffer.
    Buffer(&'a [u8]),
}

/// Whether more of the same message follows at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum More {
    Yes,
    No,
}

/// Shorter pieces are copied: a system call of their own would cost more.
const WORTH_A_CALL: usize = 64 << 10;

/// An open, two-way connection.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    name: String,
    /// The command behind an `exec` connection.
    command: Option<Command>,
    /// This side has ended it.
    ended: AtomicBool,
    traffic: Traffic,
}

/// What has gone through a connection, the hello and its answer included.
#[derive(Debug, Default)]
struct Traffic {
    /// Bytes that the kernel has taken to send.
    sent: AtomicU64,
    /// Bytes of the sending call under way that the kernel may not have taken yet.
    offered: AtomicU64,
    /// Bytes that came from the peer.
    received: AtomicU64,
}

impl Traffic {
    /// Counts what `call` sends of `length` bytes.
    fn sending<E>(&self, length: usize, call: impl FnOnce() -> Result<usize, E>) -> Result<usize, E> {
        self.offered.store(length as u64, Ordering::Relaxed);
        let result = call();
        if let Ok(sent) = &result {
            self.sent.fetch_add(*sent as u64, Ordering::Relaxed);
        }
        self.offered.store(0, Ordering::Relaxed);
        result
    }

    fn receive(&self, length: usize) {
        self.received.fetch_add(length as u64, Ordering::Relaxed);
    }
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, name: String) -> Self {
        Self { socket, name, command: None, ended: AtomicBool::new(false), traffic: Traffic::default() }
    }

    pub(super) fn with_command(socket: OwnedFd, name: String, command: Command) -> Self {
        let mut connection = Self::new(socket, name);
        connection.command = Some(command);
        connection
    }

    /// What errors call it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Says in errors what the connection is for.
    pub(crate) fn rename(&mut self, purpose: &str) {
        self.name = format!("{purpose} ({})", self.name);
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What the connection was lost by, with what there is to say of the command behind it, if there is one.
    pub(crate) fn explain(&self, cause: Cause) -> Cause {
        /// How long a command that closes its connection may take to end.
        const END: Duration = Duration::from_millis(500);
        match (&self.command, &cause) {
            (
                Some(command),
                Cause::Io { .. }
                | Cause::Closed { .. }
                | Cause::Wire { .. }
                | Cause::Mute { .. }
                | Cause::Unanswered { .. },
            ) if !self.ended.load(Ordering::Acquire) => {
                let why = match &cause {
                    Cause::Unanswered { .. } => "no answer came from it".to_owned(),
                    other => other.to_string(),
                };
                Cause::Command { channel: self.name.clone(), end: command.tell(END), why }
            }
            _ => cause,
        }
    }

    /// Bytes that the kernel has taken to send.
    pub(crate) fn sent(&self) -> u64 {
        self.traffic.sent.load(Ordering::Relaxed)
    }

    /// Bytes beyond those that it is being given at this moment.
    pub(crate) fn offered(&self) -> u64 {
        self.traffic.offered.load(Ordering::Relaxed)
    }

    /// Bytes that were received and taken.
    pub(crate) fn received(&self) -> u64 {
        self.traffic.received.load(Ordering::Relaxed)
    }

    /// Bytes that were received and that nobody has taken.
    pub(crate) fn unread(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.socket).unwrap_or(0)
    }

    /// Whether a short message can be sent without waiting.
    pub(crate) fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    fn error(&self, doing: &'static str, source: io::Error) -> Cause {
        // Of a socket that waits, this is the limit of the wait.
        let source = match source.kind() {
            io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "no answer in time"),
            _ => source,
        };
        Cause::Io { doing, target: self.name.clone(), source }
    }

    /// Sends all of `pieces`, in order.
    pub(crate) fn send_all(&self, pieces: &mut [IoSlice<'_>]) -> Result<(), Cause> {
        let mut rest = pieces;
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let now = rest.get(..rest.len().min(MAX_PIECES)).unwrap_or_default();
            let mut control = SendAncillaryBuffer::default();
            let length = now.iter().map(|piece| piece.len()).sum();
            let send = || rustix::net::sendmsg(&self.socket, now, &mut control, SendFlags::NOSIGNAL);
            match self.traffic.sending(length, send) {
                Ok(sent) => IoSlice::advance_slices(&mut rest, sent),
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.error("send to", e.into())),
            }
        }
        Ok(())
    }

    /// Sends all of `origins`, in order.
    pub(crate) fn send_from(&self, origins: &[Origin<'_>], more: More) -> Result<(), Cause> {
        let mut pieces: Vec<libc::iovec> = origins
            .iter()
            .map(|origin| match origin {
                Origin::Guest(slice) => libc::iovec { iov_base: slice.as_mut_ptr().cast(), iov_len: slice.len() },
                Origin::Buffer(bytes) => {
                    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
                }
            })
            .filter(|piece| piece.iov_len > 0)
            .collect();
        let mut rest = pieces.as_mut_slice();
        while !rest.is_empty() {
            let count = rest.len().min(MAX_PIECES);
            let follows = more == More::Yes || rest.len() > count;
            let flags = libc::MSG_NOSIGNAL | if follows { libc::MSG_MORE } else { 0 };
            // SAFETY: all zeros is an empty message, which is a valid one.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = rest.as_mut_ptr();
            message.msg_iovlen = count;
            let length = rest.iter().take(count).map(|piece| piece.iov_len).sum();
            let send = || {
                // SAFETY: every piece lies in guest RAM by `GuestSlice`'s own check, or in a buffer that `origins` borrows
                // for as long as this runs, or is the rest of such a piece. The kernel only reads them, and does not mind
                // that the guest writes meanwhile.
                let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &message, flags) };
                usize::try_from(sent).map_err(|_| io::Error::last_os_error())
            };
            match self.traffic.sending(length, send) {
                Ok(sent) => rest = advance(rest, sent),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.error("send to", e)),
            }
        }
        Ok(())
    }

    /// Sends `beginning`, `slices` and `end`. Where a slice is long and has a file, the socket gets the file's pages, and
    /// nothing is copied here. The calling thread must [block](block_broken_pipe_signal) SIGPIPE.
    pub(crate) fn send_zero_copy(
        &self,
        beginning: &[Origin<'_>],
        slices: &[GuestSlice<'_>],
        end: &[u8],
    ) -> Result<(), Cause> {
        let mut waiting = beginning.to_vec();
        for slice in slices {
            let worth = slice.len() >= WORTH_A_CALL;
            let Some((file, offset)) = slice.file().filter(|_| worth) else {
                waiting.push(Origin::Guest(slice));
                continue;
            };
            self.send_from(&waiting, More::Yes)?;
            waiting.clear();
            self.send_file(file, offset, slice)?;
        }
        waiting.push(Origin::Buffer(end));
        self.send_from(&waiting, More::No)
    }

    fn send_file(&self, file: &File, offset: u64, slice: &GuestSlice<'_>) -> Result<(), Cause> {
        let end = offset.saturating_add(slice.len() as u64);
        let mut at = offset;
        while at < end {
            let rest = end.saturating_sub(at) as usize;
            let send = || rustix::fs::sendfile(&self.socket, file, Some(&mut at), rest);
            match self.traffic.sending(rest, send) {
                // The file has become shorter: the mapping has no pages there any more.
                Ok(0) => return Err(self.error("send guest RAM to", io::ErrorKind::UnexpectedEof.into())),
                Ok(_) | Err(Errno::INTR) => {}
                // Not a file whose pages a socket takes.
                Err(Errno::INVAL) if at == offset => return self.send_from(&[Origin::Guest(slice)], More::Yes),
                Err(e) => return Err(self.error("send guest RAM to", e.into())),
            }
        }
        Ok(())
    }

    /// Receives exactly `buffer`. The peer's closing before the first byte is [`Cause::Closed`], as is closing in
    /// the middle.
    pub(crate) fn recv_exact(&self, buffer: &mut [u8]) -> Result<(), Cause> {
        let mut rest = buffer;
        while !rest.is_empty() {
            match rustix::net::recv(&self.socket, &mut *rest, RecvFlags::empty()) {
                Ok((0, _)) => return Err(Cause::Closed { channel: self.name.clone() }),
                Ok((got, _)) => {
                    self.traffic.receive(got);
                    rest = rest.get_mut(got..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.error("receive from", e.into())),
            }
        }
        Ok(())
    }

    /// Receives some bytes; none at the end.
    pub(crate) fn recv_some(&self, buffer: &mut [u8]) -> Result<usize, Cause> {
        loop {
            match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
                Ok((got, _)) => {
                    self.traffic.receive(got);
                    return Ok(got);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.error("receive from", e.into())),
            }
        }
    }

    /// Receives until every target is full, in their order.
    pub(crate) fn recv_into(&self, targets: &mut [Target<'_>]) -> Result<(), Cause> {
        let mut pieces: Vec<libc::iovec> = targets
            .iter_mut()
            .map(|target| match target {
                Target::Guest(slice) => libc::iovec { iov_base: slice.as_mut_ptr().cast(), iov_len: slice.len() },
                Target::Buffer(bytes) => libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() },
            })
            .filter(|piece| piece.iov_len > 0)
            .collect();
        let mut rest = pieces.as_mut_slice();
        while let Some(first) = rest.first_mut() {
            if first.iov_len == 0 {
                rest = rest.get_mut(1..).unwrap_or_default();
                continue;
            }
            let count = rest.len().min(MAX_PIECES);
            // SAFETY: every piece lies in guest RAM by `GuestSlice`'s own check, or in a buffer that `targets` borrows
            // for as long as this runs, or is the rest of such a piece. The kernel does the writing.
            let got = unsafe { libc::readv(self.socket.as_raw_fd(), rest.as_ptr(), count as libc::c_int) };
            match usize::try_from(got) {
                Ok(0) => return Err(Cause::Closed { channel: self.name.clone() }),
                Ok(got) => {
                    self.traffic.receive(got);
                    rest = advance(rest, got);
                }
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(self.error("receive guest RAM from", e)),
                },
            }
        }
        Ok(())
    }

    /// Receives what is there, up to `buffer`'s length, without waiting. `None` when nothing is; 0 at the end.
    pub(crate) fn recv_available(&self, buffer: &mut [u8]) -> Result<Option<usize>, Cause> {
        loop {
            match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((got, _)) => {
                    self.traffic.receive(got);
                    return Ok(Some(got));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(self.error("receive from", e.into())),
            }
        }
    }

    /// Ends the sending direction and throws away what still comes, until the peer has closed or `timeout` is over.
    /// Closing at once instead could destroy the last message on its way to the peer.
    pub(crate) fn finish(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        self.ended.store(true, Ordering::Release);
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        let _ = self.set_receive_timeout(Some(Duration::from_millis(50)));
        let mut scratch = [0; 16384];
        while Instant::now() < deadline {
            match rustix::net::recv(&self.socket, &mut scratch, RecvFlags::empty()) {
                Ok((0, _)) => break,
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => break,
            }
        }
        self.shutdown();
    }

    /// Makes reads fail that wait longer than `timeout`; `None` lets them wait.
    pub(crate) fn set_receive_timeout(&self, timeout: Option<Duration>) -> Result<(), Cause> {
        rustix::net::sockopt::set_socket_timeout(&self.socket, rustix::net::sockopt::Timeout::Recv, timeout)
            .map_err(|e| self.error("set a timeout on", e.into()))
    }

    /// Makes writes fail that wait longer than `timeout`; `None` lets them wait.
    pub(crate) fn set_send_timeout(&self, timeout: Option<Duration>) -> Result<(), Cause> {
        rustix::net::sockopt::set_socket_timeout(&self.socket, rustix::net::sockopt::Timeout::Send, timeout)
            .map_err(|e| self.error("set a timeout on", e.into()))
    }

    /// Ends the connection both ways. Every thread blocked on it returns.
    pub(crate) fn shutdown(&self) {
        self.ended.store(true, Ordering::Release);
        // Fails only when the peer was faster.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Blocks SIGPIPE for the calling thread, which must be the engine's own: `sendfile` cannot be told not to raise it.
pub(crate) fn block_broken_pipe_signal() {
    // SAFETY: `set` is initialised by `sigemptyset` before it is read, and all three calls only touch it and this
    // thread's own mask. They fail for bad arguments only.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

fn advance(pieces: &mut [libc::iovec], mut by: usize) -> &mut [libc::iovec] {
    let mut done = 0;
    for piece in pieces.iter_mut() {
        if by < piece.iov_len {
            // Stays inside the piece, as `by` is less than its length.
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(by).cast();
            piece.iov_len -= by;
            break;
        }
        by -= piece.iov_len;
        done += 1;
    }
    pieces.get_mut(done..).unwrap_or_default()
}
