//! `tcp:HOST:PORT`.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::{Connection, Uri};
use crate::error::Cause;

/// How often a connection attempt looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

fn resolve(uri: &Uri, host: &str, port: u16) -> Result<Vec<SocketAddr>, Cause> {
    let error = |source| Cause::Io { doing: "resolve", target: uri.to_string(), source };
    let addresses: Vec<_> = (host, port).to_socket_addrs().map_err(error)?.collect();
    if addresses.is_empty() { Err(error(io::Error::from(io::ErrorKind::NotFound))) } else { Ok(addresses) }
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
    for address in resolve(uri, host, port)? {
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
            TcpListener::bind(resolve(uri, host, port)?.as_slice())
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
