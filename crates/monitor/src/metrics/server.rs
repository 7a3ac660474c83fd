//! One thread that serves all scrapers: a loop over `poll`, with a bound on each of them and on their number.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dunlin::Report;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::exposition;
use super::http::{self, Answer, MAX_HEAD_BYTES};

/// As many scrapers are served at once; others wait in the system's queue.
const MAX_CONNECTIONS: usize = 16;
/// A request must have come, and its answer be taken, within this.
const TIMEOUT: Duration = Duration::from_secs(5);
/// What comes behind a request is read and forgotten for this long, so that its sender gets the answer.
const LINGER: Duration = Duration::from_millis(500);

/// Where the figures come from: the report of the latest migration, if there was one. Closures are such sources.
pub trait ReportSource: Send + Sync {
    /// The report as it is now.
    fn report(&self) -> Option<Report>;
}

impl<F: Fn() -> Option<Report> + Send + Sync> ReportSource for F {
    fn report(&self) -> Option<Report> {
        self()
    }
}

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("could not serve metrics on {address}: {source}")]
pub struct MetricsError {
    /// Where.
    pub address: String,
    /// The system's answer.
    pub source: io::Error,
}

/// Serves a report's figures over HTTP until it is dropped: `GET /metrics`, in Prometheus's text format.
///
/// Anyone who can reach the address may read them; nothing can be changed by it.
pub struct MetricsServer {
    address: SocketAddr,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for MetricsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetricsServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl MetricsServer {
    /// Starts serving on `address`, a `HOST:PORT`; port 0 is a free one.
    ///
    /// # Errors
    /// When `address` names nothing or cannot be listened on.
    pub fn start(address: &str, reports: Arc<dyn ReportSource>) -> Result<Self, MetricsError> {
        let start = || {
            let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
            let listener = TcpListener::bind(addresses.as_slice())?;
            listener.set_nonblocking(true)?;
            let local = listener.local_addr()?;
            let (wake, woken) = UnixStream::pair()?;
            let serve = move || Loop { listener, woken, reports, connections: Vec::new() }.run();
            let thread = thread::Builder::new().name("metrics".to_owned()).spawn(serve)?;
            Ok(Self { address: local, wake, thread: Some(thread) })
        };
        start().map_err(|source| MetricsError { address: address.to_owned(), source })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        let _ = self.wake.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where a scraper stands.
enum Stage {
    /// Its request is coming.
    Reading(Vec<u8>),
    /// Its answer is going; so many bytes have gone.
    Writing(Vec<u8>, usize),
    /// It has its answer; what it may still say does not matter.
    Lingering,
}

struct Connection {
    stream: TcpStream,
    stage: Stage,
    deadline: Instant,
}

struct Loop {
    listener: TcpListener,
    woken: UnixStream,
    reports: Arc<dyn ReportSource>,
    connections: Vec<Connection>,
}

impl Loop {
    fn run(mut self) {
        while self.wait() {
            let now = Instant::now();
            let reports = &self.reports;
            self.connections.retain_mut(|connection| connection.go_on(now, reports.as_ref()));
            self.accept(now);
        }
    }

    /// Waits until there is something to do; tells whether to go on.
    fn wait(&self) -> bool {
        let flags = |stage: &Stage| match stage {
            Stage::Reading(_) | Stage::Lingering => PollFlags::IN,
            Stage::Writing(..) => PollFlags::OUT,
        };
        let mut waiting = vec![PollFd::new(&self.woken, PollFlags::IN)];
        if self.connections.len() < MAX_CONNECTIONS {
            waiting.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let streams =
            self.connections.iter().map(|connection| PollFd::new(&connection.stream, flags(&connection.stage)));
        waiting.extend(streams);
        let first = self.connections.iter().map(|connection| connection.deadline).min();
        let left = first.map(|deadline| deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let polled = rustix::event::poll(&mut waiting, left.as_ref());
        let is_over = waiting.first().is_some_and(|woken| !woken.revents().is_empty());
        matches!(polled, Ok(_) | Err(rustix::io::Errno::INTR)) && !is_over
    }

    fn accept(&mut self, now: Instant) {
        while self.connections.len() < MAX_CONNECTIONS {
            match self.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    let stage = Stage::Reading(Vec::new());
                    self.connections.push(Connection { stream, stage, deadline: now + TIMEOUT });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Out of descriptors, or a scraper that went at once: others may have more luck in a while.
                Err(_) => {
                    thread::sleep(Duration::from_millis(10));
                    return;
                }
            }
        }
    }
}

impl Connection {
    /// Does what can be done without waiting; tells whether there is more to do.
    fn go_on(&mut self, now: Instant, reports: &dyn ReportSource) -> bool {
        loop {
            match &mut self.stage {
                Stage::Reading(head) => match read_some(&mut self.stream, head) {
                    Ok(Some(answer)) => self.answer(answer, now, reports),
                    Ok(None) if now >= self.deadline => self.answer(Answer::TimedOut, now, reports),
                    Ok(None) => return true,
                    Err(_) => return false,
                },
                Stage::Writing(bytes, written) => match self.stream.write(bytes.get(*written..).unwrap_or_default()) {
                    Ok(0) => {
                        let _ = self.stream.shutdown(Shutdown::Write);
                        self.deadline = now + LINGER;
                        self.stage = Stage::Lingering;
                    }
                    Ok(more) => *written += more,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return error.kind() == io::ErrorKind::WouldBlock && now < self.deadline,
                },
                // Once only: whoever talks on and on does not keep the others waiting.
                Stage::Lingering => {
                    return match self.stream.read(&mut [0; 4096]) {
                        Ok(read) => read > 0 && now < self.deadline,
                        Err(error) => error.kind() == io::ErrorKind::WouldBlock && now < self.deadline,
                    };
                }
            }
        }
    }

    fn answer(&mut self, answer: Answer, now: Instant, reports: &dyn ReportSource) {
        let bytes = answer.bytes(|| exposition(reports.report().as_ref()));
        self.stage = Stage::Writing(bytes, 0);
        self.deadline = now + TIMEOUT;
    }
}

/// Reads what has come of a request; gives the answer once it is known.
fn read_some(stream: &mut TcpStream, head: &mut Vec<u8>) -> io::Result<Option<Answer>> {
    let mut buffer = [0; 1024];
    loop {
        if let Some(answer) = http::look(head) {
            return Ok(Some(answer));
        }
        let room = buffer.get_mut(..MAX_HEAD_BYTES.saturating_sub(head.len()).min(1024)).unwrap_or_default();
        match stream.read(room) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => head.extend_from_slice(buffer.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}
