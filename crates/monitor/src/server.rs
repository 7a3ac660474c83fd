//! The sockets: listening, threads for each client, and an end to all of it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::address::Address;
use crate::outbox::Outbox;
use crate::protocol::{self, Refusal};
use crate::session;
use crate::vm::Vm;

/// How many clients are served at once.
const MAX_CLIENTS: usize = 32;
/// How long, at the end, what is on its way to the clients may take.
const FAREWELL: Duration = Duration::from_millis(200);

/// Why QMP cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another process listens there.
    #[error("unix:{} is in use: another machine answers there; choose another path, or end that machine (quit)", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// Something that is no socket lies there.
    #[error("{} exists and is not a socket; choose another path, or remove it", path.display())]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// Unix sockets have short names.
    #[error("unix:{} is too long a name for a socket: the system allows 107 bytes; choose a shorter path", path.display())]
    TooLong {
        /// Where.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("could not {doing} {address}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Where.
        address: Address,
        /// The system's answer.
        source: io::Error,
    },
}

/// Serves a [`Vm`] at one address until it is dropped. Only the user who started it may connect to a Unix socket;
/// anybody who reaches it to a TCP port.
#[derive(Debug)]
pub struct Server {
    address: Address,
    /// Device and inode of our Unix socket: a path may come to mean another one.
    identity: Option<(u64, u64)>,
    wake: UnixStream,
    clients: Arc<Clients>,
    accepting: Option<JoinHandle<()>>,
}

/// The clients that are being served, so that the server's end can end them.
#[derive(Debug, Default)]
struct Clients {
    served: Mutex<Served>,
}

#[derive(Debug, Default)]
struct Served {
    next: u64,
    open: BTreeMap<u64, Arc<Outbox>>,
    closed: bool,
}

impl Clients {
    fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place among the clients, which ends with it.
struct Place {
    clients: Arc<Clients>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.served().open.remove(&self.number);
    }
}

impl Server {
    /// Starts serving `vm` at `address`, which may be a path.
    ///
    /// # Errors
    /// When `address` is taken or cannot be listened on.
    pub fn start(address: impl Into<Address>, vm: &Arc<Vm>) -> Result<Self, ServerError> {
        let (listener, address) = Listener::bind(address.into())?;
        let failed = |doing| {
            let address = address.clone();
            move |source: io::Error| ServerError::Io { doing, address, source }
        };
        let identity = match &address {
            Address::Unix(path) => identity(path),
            Address::Tcp { .. } => None,
        };
        let (wake, woken) = UnixStream::pair().map_err(failed("listen on"))?;
        let clients = Arc::new(Clients::default());
        let accepting = {
            let (clients, vm) = (Arc::clone(&clients), Arc::clone(vm));
            thread::Builder::new()
                .name("qmp".to_owned())
                .spawn(move || accept_all(&listener, &woken, &clients, &vm))
                .map_err(failed("start a thread for"))?
        };
        Ok(Self { address, identity, wake, clients, accepting: Some(accepting) })
    }

    /// Where it serves, with the port that was chosen if it was 0.
    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address
            && self.identity.is_some()
            && identity(path) == self.identity
        {
            // If it cannot be removed, the next server there finds it stale.
            let _ = fs::remove_file(path);
        }
        let open: Vec<_> = {
            let mut served = self.clients.served();
            served.closed = true;
            served.open.values().cloned().collect()
        };
        let deadline = Instant::now() + FAREWELL;
        for outbox in open {
            outbox.drain(deadline);
            outbox.close();
        }
        let _ = self.wake.shutdown(Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// A socket that clients connect to.
#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn bind(address: Address) -> Result<(Self, Address), ServerError> {
        let failed = |source| ServerError::Io { doing: "listen on", address: address.clone(), source };
        match &address {
            Address::Unix(path) => {
                let listener = listen(path)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok((Self::Unix(listener), address))
            }
            Address::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let address = Address::Tcp { host: host.clone(), port };
                Ok((Self::Tcp(listener), address))
            }
        }
    }

    /// The next client's socket, which blocks.
    fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                notice_loss(&stream)?;
                Ok(stream.into())
            }
        }
    }
}

/// Has the kernel find out when a client's host is gone: it would keep its place for ever.
fn notice_loss(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(stream, 6)?;
    Ok(sockopt::set_tcp_user_timeout(stream, 120_000)?)
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Binds and listens, over a stale socket if one is in the way.
fn listen(path: &Path) -> Result<UnixListener, ServerError> {
    let failed = |doing| move |source: io::Error| ServerError::Io { doing, address: path.into(), source };
    // Held until the end: two processes must not take each other's fresh socket for a stale one.
    let _directory = lock_directory(path).map_err(failed("open the directory of"))?;
    let address = SocketAddrUnix::new(path).map_err(|error| match error {
        rustix::io::Errno::NAMETOOLONG => ServerError::TooLong { path: path.to_owned() },
        error => failed("name")(error.into()),
    })?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| failed("make a socket for")(error.into()))?;
    match rustix::net::bind(&socket, &address) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            remove_stale(path)?;
            rustix::net::bind(&socket, &address).map_err(|error| failed("listen on")(error.into()))?;
        }
        outcome => outcome.map_err(|error| failed("listen on")(error.into()))?,
    }
    // Whoever may connect may run commands as this user (`exec:`).
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(|error| failed("protect")(error.into()))?;
    rustix::net::listen(&socket, 128).map_err(|error| failed("listen on")(error.into()))?;
    Ok(UnixListener::from(socket))
}

fn lock_directory(path: &Path) -> io::Result<OwnedFd> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = OwnedFd::from(fs::File::open(directory)?);
    for _ in 0..100 {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => thread::sleep(Duration::from_millis(10)),
            // A file system without locks only loses this protection.
            _ => break,
        }
    }
    Ok(directory)
}

fn remove_stale(path: &Path) -> Result<(), ServerError> {
    let failed = |doing| move |source: io::Error| ServerError::Io { doing, address: path.into(), source };
    let is_socket = fs::symlink_metadata(path).map_err(failed("look at"))?.file_type().is_socket();
    if !is_socket {
        return Err(ServerError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        _ => Err(ServerError::InUse { path: path.to_owned() }),
    }
}

fn accept_all(listener: &Listener, woken: &UnixStream, clients: &Arc<Clients>, vm: &Arc<Vm>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    loop {
        let mut ready = [PollFd::new(listener, PollFlags::IN), PollFd::new(woken, PollFlags::IN)];
        let polled = rustix::event::poll(&mut ready, None);
        let is_over = ready.get(1).is_some_and(|woken| !woken.revents().is_empty());
        match polled {
            Ok(_) | Err(rustix::io::Errno::INTR) if !is_over => {}
            _ => break,
        }
        let (done, going): (Vec<_>, _) = threads.into_iter().partition(JoinHandle::is_finished);
        threads = going;
        for thread in done {
            let _ = thread.join();
        }
        match listener.accept() {
            Ok(socket) => threads.extend(admit(socket, clients, vm)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Out of descriptors, or a client that went at once: others may have more luck in a while.
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// Starts serving a client, if there is a place for it. One that cannot be served is closed.
fn admit(socket: OwnedFd, clients: &Arc<Clients>, vm: &Arc<Vm>) -> Option<JoinHandle<()>> {
    let (place, outbox) = {
        let mut served = clients.served();
        if served.closed {
            return None;
        }
        if served.open.len() >= MAX_CLIENTS {
            drop(served);
            let refusal = Refusal::generic(format_args!("{MAX_CLIENTS} clients are connected already"));
            let line = protocol::line(&protocol::reply(None, Err(refusal)));
            let _ = rustix::net::send(&socket, &line, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            return None;
        }
        let number = served.next;
        served.next += 1;
        let outbox = Arc::new(Outbox::new(socket));
        served.open.insert(number, Arc::clone(&outbox));
        (Place { clients: Arc::clone(clients), number }, outbox)
    };
    let vm = Arc::clone(vm);
    let serve = move || {
        let _place = place;
        // A client that goes in the middle of things is its own affair.
        let _ = session::serve(&outbox, &vm);
        outbox.close();
    };
    thread::Builder::new().name("qmp-client".to_owned()).spawn(serve).ok()
}
