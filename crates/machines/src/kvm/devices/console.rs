//! The outside end of the serial port: where its output goes and its input comes from.
//!
//! Output is handed over at once as long as the consumer takes it; what it does not take waits in a buffer, which a thread
//! empties whether the machine runs or not. The buffer is never part of the machine's state: what the guest has put out
//! here goes out here, once. When it is full the guest waits.
//!
//! What must stay true: bytes leave in the order in which they came, under one lock; no lock is held over a system call
//! that may take long (input is read under the port's lock, and only what is there already); input is read only as far as
//! the port takes it.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::worker::{Bell, sleep};
use crate::device_config::SerialTarget;

/// What waits to be taken before the guest has to.
const BUFFER_BYTES: usize = 64 << 10;
/// A pipe that poll(2) says can be written takes as much without making its writer wait.
const WRITE_BYTES: usize = 4096;
/// How long what is left may take to be written at the end.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// When the port has no room for input it is asked again after this.
const INPUT_PAUSE: Duration = Duration::from_millis(10);
/// What could not be written for another reason than a slow consumer is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Who takes output and gives input.
#[derive(Debug)]
enum Peer {
    /// Nobody ever: output goes nowhere.
    Gone,
    /// Nobody now.
    Absent,
    Stdio {
        input: Input,
        /// Standard input once more, as one that does not make its reader wait, where that can be had.
        source: Option<Arc<File>>,
        /// If it is a terminal, that once more, as one that does not make its writer wait.
        terminal: Option<Arc<File>>,
    },
    File(Arc<File>),
    Client(Arc<UnixStream>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    Open,
    Ended,
}

impl Peer {
    /// What output goes to.
    fn output(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Gone | Self::Absent => None,
            Self::Stdio { terminal: Some(terminal), .. } => Some(terminal.as_fd()),
            Self::Stdio { .. } => Some(stdout()),
            Self::File(file) => Some(file.as_fd()),
            Self::Client(stream) => Some(stream.as_fd()),
        }
    }

    /// Writes what is taken at once.
    fn try_write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        let Some(fd) = self.output() else { return Err(Errno::AGAIN) };
        if let Self::Stdio { terminal: None, .. } = self {
            // Others share this open file: it cannot be told not to wait.
            let mut poll = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if rustix::event::poll(&mut poll, Some(&now))? == 0 {
                return Err(Errno::AGAIN);
            }
        }
        rustix::io::write(fd, bytes.get(..WRITE_BYTES).unwrap_or(bytes))
    }
}

fn stdout<'a>() -> BorrowedFd<'a> {
    // SAFETY: nothing in this process closes its standard output.
    unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) }
}

fn stdin<'a>() -> BorrowedFd<'a> {
    // SAFETY: nothing in this process closes its standard input.
    unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) }
}

/// Standard input once more, as one that does not make its reader wait. Others share the open file itself: it cannot be
/// told not to wait. A file is not opened again, as its position would be lost; reading it does not wait for anybody.
fn reopen_stdin() -> Option<File> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(stdin()).ok()?.st_mode);
    let waits = kind == FileType::Fifo || io::stdin().is_terminal();
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let again = || OpenOptions::new().read(true).custom_flags(flags).open("/proc/self/fd/0").ok();
    waits.then(again).flatten()
}

/// Reads what standard input has now.
fn read_stdin(source: Option<&File>, to: &mut [u8]) -> rustix::io::Result<usize> {
    if let Some(source) = source {
        return rustix::io::read(source, to);
    }
    match rustix::net::recv(stdin(), &mut *to, RecvFlags::DONTWAIT) {
        Ok((count, _)) => Ok(count),
        // A reader beside this one may have taken what poll(2) has seen: only where there is more.
        Err(Errno::NOTSOCK) => {
            let mut poll = [PollFd::from_borrowed_fd(stdin(), PollFlags::IN)];
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if rustix::event::poll(&mut poll, Some(&now))? == 0 {
                return Err(Errno::AGAIN);
            }
            rustix::io::read(stdin(), to)
        }
        Err(error) => Err(error),
    }
}

#[derive(Debug)]
struct State {
    peer: Peer,
    waiting: VecDeque<u8>,
    ended: bool,
}

impl State {
    /// Writes what is taken at once of what waits. Tells what keeps the rest.
    fn flush(&mut self) -> Option<Errno> {
        while !self.waiting.is_empty() {
            if matches!(self.peer, Peer::Gone) {
                self.waiting.clear();
                break;
            }
            match self.peer.try_write(self.waiting.as_slices().0) {
                Ok(count) => drop(self.waiting.drain(..count.min(self.waiting.len()))),
                Err(Errno::INTR) => {}
                // Another client may come; what else was closed nobody will ever read.
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    self.peer = if matches!(self.peer, Peer::Client(_)) { Peer::Absent } else { Peer::Gone };
                }
                Err(error) => return Some(error),
            }
        }
        None
    }
}

/// Takes the port's output.
#[derive(Debug)]
pub(super) struct Output {
    state: Mutex<State>,
    bell: Bell,
}

impl Output {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes bytes, even when it is full.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut state = self.state();
        let idle = state.waiting.is_empty();
        state.waiting.extend(bytes);
        if idle && state.flush().is_some() {
            self.bell.ring();
        }
        if matches!(state.peer, Peer::Absent) {
            // With nobody there to take them the guest does not wait: the latest are kept.
            let excess = state.waiting.len().saturating_sub(BUFFER_BYTES);
            state.waiting.drain(..excess);
        }
    }

    /// Whether the guest has to wait before it puts out more.
    pub(super) fn is_full(&self) -> bool {
        let state = self.state();
        state.waiting.len() >= BUFFER_BYTES && !matches!(state.peer, Peer::Absent | Peer::Gone)
    }

    /// There may be more to do.
    pub(super) fn ring(&self) {
        self.bell.ring();
    }
}

impl io::Write for &Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What input goes to.
pub(super) trait Sink: Send + Sync {
    /// Reads with `read` as much as it has room for, if it may have input now; tells what `read` said.
    fn take(&self, read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>) -> Option<io::Result<usize>>;
    /// Whether it has room for input now.
    fn room(&self) -> Room;
}

/// Room for input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// None until somebody rings.
    Closed,
    /// None now.
    Full,
    /// Some.
    Free,
}

/// The thread that serves the outside end. It ends when this is dropped, when what waits has been written or after a
/// while.
#[derive(Debug)]
pub(super) struct Console {
    output: Arc<Output>,
    thread: Option<JoinHandle<()>>,
    /// A socket's path, which goes with it.
    path: Option<PathBuf>,
}

/// Binds a socket, also in place of one that nobody listens on any more.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match UnixStream::connect(path) {
            Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            _ => return Err(error),
        },
        other => other?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Opens what output goes to, before there is anything to put out.
pub(super) fn open(target: &SerialTarget) -> io::Result<(Arc<Output>, Outside)> {
    let (peer, listener, path) = match target {
        SerialTarget::Null => (Peer::Gone, None, None),
        SerialTarget::Stdio => {
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            let again = || OpenOptions::new().write(true).custom_flags(flags).open("/proc/self/fd/1").ok();
            let terminal = io::stdout().is_terminal().then(again).flatten().map(Arc::new);
            (Peer::Stdio { input: Input::Open, source: reopen_stdin().map(Arc::new), terminal }, None, None)
        }
        SerialTarget::File(path) => {
            let mut options = OpenOptions::new();
            let file = options.append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            (Peer::File(Arc::new(file)), None, None)
        }
        SerialTarget::Unix(path) => (Peer::Absent, Some(listen(path)?), Some(path.clone())),
    };
    let state = Mutex::new(State { peer, waiting: VecDeque::new(), ended: false });
    Ok((Arc::new(Output { state, bell: Bell::new()? }), Outside { listener, path }))
}

/// What the console's thread needs besides the output.
#[derive(Debug)]
pub(super) struct Outside {
    listener: Option<UnixListener>,
    path: Option<PathBuf>,
}

impl Console {
    /// Starts to serve.
    pub(super) fn start(output: Arc<Output>, outside: Outside, sink: Arc<dyn Sink>) -> io::Result<Self> {
        let Outside { listener, path } = outside;
        let server = Server { output: output.clone(), listener, sink, patience: None, refused: false };
        let thread = std::thread::Builder::new().name("serial".to_owned()).spawn(move || server.serve())?;
        Ok(Self { output, thread: Some(thread), path })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.output.state().ended = true;
        self.output.bell.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

struct Server {
    output: Arc<Output>,
    listener: Option<UnixListener>,
    sink: Arc<dyn Sink>,
    /// How long to wait at most the next time.
    patience: Option<Duration>,
    /// The last client could not be let in, as when there are no more file descriptors; it waits and would wake this
    /// thread at once again.
    refused: bool,
}

/// What came.
#[derive(Debug, Default)]
struct Events {
    client: bool,
    input: bool,
}

impl Server {
    fn serve(mut self) {
        let mut deadline = None;
        loop {
            let ended = self.output.state().ended;
            let left = match (ended, deadline) {
                (false, _) => None,
                (true, None) => {
                    deadline = Some(Instant::now() + END_TIMEOUT);
                    Some(END_TIMEOUT)
                }
                (true, Some(deadline)) => Some(deadline.saturating_duration_since(Instant::now())),
            };
            {
                let state = self.output.state();
                let nobody = matches!(state.peer, Peer::Absent | Peer::Gone);
                if ended && (state.waiting.is_empty() || nobody || left == Some(Duration::ZERO)) {
                    return;
                }
            }
            let events = self.wait(left);
            self.output.bell.silence();
            if events.client {
                self.accept();
            }
            if events.input {
                self.take_input();
            }
            let stuck = self.output.state().flush();
            self.patience = stuck.filter(|error| *error != Errno::AGAIN).map(|_| RETRY_PAUSE);
        }
    }

    /// Waits until there is something to do.
    fn wait(&mut self, left: Option<Duration>) -> Events {
        let room = self.sink.room();
        let state = self.output.state();
        let client = match &state.peer {
            Peer::Client(stream) => Some(stream.clone()),
            _ => None,
        };
        let file = match &state.peer {
            Peer::File(file) | Peer::Stdio { terminal: Some(file), .. } => Some(file.clone()),
            _ => None,
        };
        let source = match &state.peer {
            Peer::Stdio { source, .. } => source.clone(),
            _ => None,
        };
        let stdio = matches!(state.peer, Peer::Stdio { .. });
        let reads_stdin = matches!(state.peer, Peer::Stdio { input: Input::Open, .. });
        let is_absent = matches!(state.peer, Peer::Absent);
        let writes = !state.waiting.is_empty() && self.patience.is_none();
        drop(state);
        let mut fds = vec![PollFd::new(&self.output.bell, PollFlags::IN)];
        let (mut client_at, mut input_at) = (None, None);
        let refused = std::mem::take(&mut self.refused);
        if let Some(listener) = self.listener.as_ref().filter(|_| is_absent && !refused) {
            client_at = Some(fds.len());
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        if room == Room::Free && (client.is_some() || reads_stdin) {
            input_at = Some(fds.len());
            let fd = client.as_ref().map(AsFd::as_fd).or(source.as_ref().map(AsFd::as_fd)).unwrap_or_else(stdin);
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        let outlet = client.as_ref().map(AsFd::as_fd).or(file.as_ref().map(AsFd::as_fd)).or(stdio.then(stdout));
        if writes && let Some(fd) = outlet {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::OUT));
        }
        let reads = client.is_some() || reads_stdin;
        let mut timeout = left;
        let limits = [
            self.patience,
            (reads && room == Room::Full).then_some(INPUT_PAUSE),
            (is_absent && refused).then_some(RETRY_PAUSE),
        ];
        for limit in limits.into_iter().flatten() {
            timeout = Some(timeout.map_or(limit, |timeout| timeout.min(limit)));
        }
        sleep(&mut fds, timeout);
        let came =
            |at: Option<usize>| at.and_then(|at| fds.get(at)).is_some_and(|fd| fd.revents() != PollFlags::empty());
        Events { client: came(client_at), input: came(input_at) }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match listener.accept().and_then(|(stream, _)| stream.set_nonblocking(true).map(|()| stream)) {
            Ok(stream) => self.output.state().peer = Peer::Client(Arc::new(stream)),
            Err(_) => self.refused = true,
        }
    }

    fn take_input(&self) {
        let (client, source) = match &self.output.state().peer {
            Peer::Client(stream) => (Some(stream.clone()), None),
            Peer::Stdio { source, .. } => (None, source.clone()),
            // The guest's thread has found out meanwhile that the client is gone.
            _ => return,
        };
        let mut read = |to: &mut [u8]| match &client {
            Some(stream) => Ok(rustix::io::read(stream, to)?),
            None => Ok(read_stdin(source.as_deref(), to)?),
        };
        let end = match self.sink.take(&mut read) {
            Some(Ok(count)) => count == 0,
            Some(Err(error)) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
            None => false,
        };
        if end {
            let mut state = self.output.state();
            match &mut state.peer {
                Peer::Stdio { input, .. } => *input = Input::Ended,
                peer @ Peer::Client(_) => *peer = Peer::Absent,
                _ => {}
            }
        }
    }
}
