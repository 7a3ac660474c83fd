//! `tcp:HOST:PORT`.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::{Connection, Uri};
use crate::error::Cause;

/// How often a connection attempt looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// How long an address to listen on may take to be found, and one to connect to even if the link may be silent for longer.
const RESOLVE: Duration = Duration::from_secs(10);

/// Finds the addresses of `host`, within `timeout`, or until `stop` becomes true.
///
/// The system's resolver cannot be given up: it waits for name servers for as long as it is configured to. So it runs on a
/// thread of its own, which is left behind where it takes too long. That thread holds nothing but the name.
fn resolve(uri: &Uri, host: &str, port: u16, timeout: Duration, stop: &AtomicBool) -> Result<Vec<SocketAddr>, Cause> {
    let error = |source| Cause::Io { doing: "resolve", target: uri.to_string(), source };
    let found = |addresses: Vec<SocketAddr>| match addresses.is_empty() {
        true => Err(error(io::Error::from(io::ErrorKind::NotFound))),
        false => Ok(addresses),
    };
    // Nobody has to be asked for an address in numbers.
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (answer, answered) = mpsc::channel();
    let name = host.to_owned();
    let ask = move || {
        let addresses = (name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        // Nobody waits any more.
        let _ = answer.send(addresses);
    };
    // Never joined: it may wait for minutes.
    let thread = std::thread::Builder::new().name("dunlin resolver".to_owned()).spawn(ask);
    drop(thread.map_err(|e| Cause::Thread { thread: "resolver", what: format!("could not be started: {e}") })?);
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match answered.recv_timeout(left.min(LOOK)) {
            Ok(addresses) => return found(addresses.map_err(error)?),
            Err(_) if stop.load(Ordering::Acquire) => return Err(Cause::Cancelled),
            Err(mpsc::RecvTimeoutError::Timeout) if !left.is_zero() => {}
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let text = format!("no name server answered within {timeout:?}");
                return Err(error(io::Error::new(io::ErrorKind::TimedOut, text)));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Cause::Thread { thread: "resolver", what: "ended without an answer".into() });
            }
        }
    }
}

pub(super) fn connect(
    uri: &Uri,
    host: &str,
    port: u16,
    timeout: Duration,
    stop: &AtomicBool,
) -> Result<Connection, Cause> {
    let host = if host.is_empty() { "localhost" } else { host };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in resolve(uri, host, port, timeout.min(RESOLVE), stop)? {
        match connect_to(address, timeout, stop) {
            Ok(socket) => {
                let _ = sockopt::set_tcp_nodelay(&socket, true);
                let _ = sockopt::set_socket_keepalive(&socket, true);
                return Ok(Connection::new(socket, uri.to_string()));
            }
            Err(_) if stop.load(Ordering::Acquire) => return Err(Cause::Cancelled),
            Err(error) => last = error,
        }
    }
    Err(Cause::Io { doing: "connect to", target: uri.to_string(), source: last })
}

/// Connects without blocking for longer than it takes to notice `stop`.
fn connect_to(address: SocketAddr, timeout: Duration, stop: &AtomicBool) -> io::Result<OwnedFd> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(rustix::io::Errno::INPROGRESS) => await_connected(&socket, timeout, stop)?,
        Err(e) => return Err(e.into()),
    }
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

fn await_connected(socket: &OwnedFd, timeout: Duration, stop: &AtomicBool) -> io::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        if stop.load(Ordering::Acquire) {
            return Err(io::Error::from(io::ErrorKind::Interrupted));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        let wait = Timespec::try_from(left.min(LOOK)).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(socket, PollFlags::OUT)];
        match rustix::event::poll(&mut fds, Some(&wait)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return sockopt::socket_error(socket)?.map_err(io::Error::from),
            Err(e) => return Err(e.into()),
        }
    }
}

/// A listening TCP socket.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: TcpListener,
    host: String,
}

impl Listener {
    pub(super) fn bind(uri: &Uri, host: &str, port: u16) -> Result<Self, Cause> {
        let error = |source| Cause::Io { doing: "listen on", target: uri.to_string(), source };
        let listener = if host.is_empty() {
            // Every address of both families, or of IPv4 where there is no IPv6.
            TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        } else {
            let stop = AtomicBool::new(false);
            TcpListener::bind(resolve(uri, host, port, RESOLVE, &stop)?.as_slice())
        }
        .map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        Ok(Self { listener, host: host.to_owned() })
    }

    pub(super) fn local_uri(&self) -> Uri {
        let port = self.listener.local_addr().map_or(0, |address| address.port());
        Uri::Tcp { host: self.host.clone(), port }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The next waiting connection; `None` when there is none after all.
    pub(crate) fn accept(&self) -> io::Result<Option<Connection>> {
        match self.listener.accept() {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                let socket = OwnedFd::from(stream);
                let _ = sockopt::set_socket_keepalive(&socket, true);
                Ok(Some(Connection::new(socket, format!("tcp:{peer}"))))
            }
            Err(e) if passing(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Errors of `accept` that say something about the connection that was coming, not about the listener.
pub(super) fn passing(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::WouldBlock | Kind::Interrupted | Kind::ConnectionAborted | Kind::ConnectionReset)
}
