//! A tap device of the host: a network card's other end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

/// Bytes of the header before each frame: virtio's, as of version 1.
pub(super) const HEADER_BYTES: usize = 12;

/// An open tap device.
#[derive(Debug)]
pub(super) struct Tap {
    fd: Arc<OwnedFd>,
}

impl Tap {
    /// Opens the tap device of this name, or makes it.
    ///
    /// # Errors
    /// The system's: it takes the right to administrate networks, and one that is open elsewhere is not shared.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let file: File =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: all zeros are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        let room = request.ifr_name.len().saturating_sub(1);
        for (to, byte) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
            *to = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the kernel reads and writes an `ifreq`, which it is given.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let header = HEADER_BYTES as libc::c_int;
        // SAFETY: the kernel reads an int, which it is given.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
        // A device that outlives its process keeps what another has set: frames must come without offloads.
        let none: libc::c_ulong = 0;
        // SAFETY: the kernel takes a number.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, none) })?;
        Ok(Self { fd: Arc::new(file.into()) })
    }

    /// Takes a frame with its header, if there is one.
    pub(super) fn receive(&self, to: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&*self.fd, to)?)
    }

    /// Sends a frame with its header.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        rustix::io::write(&*self.fd, frame)?;
        Ok(())
    }

    /// What is readable when there is a frame.
    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
