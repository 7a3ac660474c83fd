//! `unix:PATH`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{Connection, Uri};
use crate::error::Cause;

/// How often it is tried again where too many wait to be accepted.
const LOOK: Duration = Duration::from_millis(50);

pub(super) fn connect(uri: &Uri, path: &Path, timeout: Duration, stop: &AtomicBool) -> Result<Connection, Cause> {
    let error = |source| Cause::Io { doing: "connect to", target: uri.to_string(), source };
    let deadline = Instant::now() + timeout;
    loop {
        match connect_at_once(path) {
            Ok(socket) => return Ok(Connection::new(socket, uri.to_string())),
            // Nothing to wait on says when there is room, and a blocking attempt could not be given up.
            Err(Errno::AGAIN) if Instant::now() < deadline => {}
            Err(Errno::AGAIN) => return Err(error(io::ErrorKind::TimedOut.into())),
            Err(e) => return Err(error(e.into())),
        }
        std::thread::sleep(LOOK);
        if stop.load(Ordering::Acquire) {
            return Err(Cause::Cancelled);
        }
    }
}

/// Connects, unless there is no room in the listener's queue.
fn connect_at_once(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// A listening Unix socket. Its file goes with it.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Inode of the file that this listener made: another's is not ours to remove.
    inode: Option<u64>,
    accepted: std::sync::atomic::AtomicU64,
}

fn inode(path: &Path) -> Option<u64> {
    std::fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

impl Listener {
    pub(super) fn bind(uri: &Uri, path: &Path) -> Result<Self, Cause> {
        let error = |source| Cause::Io { doing: "listen on", target: uri.to_string(), source };
        let listener = match UnixListener::bind(path) {
            // A socket file that nobody listens on was left by a process that was killed.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
                std::fs::remove_file(path).map_err(error)?;
                UnixListener::bind(path)
            }
            other => other,
        }
        .map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        Ok(Self { listener, path: path.to_owned(), inode: inode(path), accepted: Default::default() })
    }

    pub(super) fn local_uri(&self) -> Uri {
        Uri::Unix(self.path.clone())
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The next waiting connection; `None` when there is none after all.
    pub(crate) fn accept(&self) -> io::Result<Option<Connection>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                let number = self.accepted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let name = format!("unix:{} (connection {number})", self.path.display());
                Ok(Some(Connection::new(OwnedFd::from(stream), name)))
            }
            Err(e) if super::tcp::passing(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn is_stale(path: &Path) -> bool {
    matches!(connect_at_once(path), Err(Errno::CONNREFUSED))
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
