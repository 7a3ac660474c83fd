//! userfaultfd, as far as asynchronous write protection needs it.
//!
//! With `WP_ASYNC` the kernel lifts the protection of a page itself at the first write and remembers it; nobody has
//! to serve faults. See `Documentation/admin-guide/mm/userfaultfd.rst` in Linux.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WRITEPROTECT};
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::mm::UserfaultfdFlags;

use super::TrackerError;

const FEATURES: [(u32, &str); 4] = [
    (sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP"),
    (sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM"),
    (sys::UFFD_FEATURE_WP_UNPOPULATED, "WP_UNPOPULATED"),
    (sys::UFFD_FEATURE_WP_ASYNC, "WP_ASYNC"),
];

/// Write protection is the second bit of `uffdio_writeprotect.mode`'s name space: `UFFDIO_WRITEPROTECT_MODE_WP`.
const WRITEPROTECT_MODE_WP: u64 = 1;

/// An open userfaultfd with asynchronous write protection.
#[derive(Debug)]
pub(super) struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Opens one and checks the kernel's features.
    pub(super) fn open() -> Result<Self, TrackerError> {
        let wanted = FEATURES.iter().fold(0, |all, (bit, _)| all | u64::from(*bit));
        let fd = open_fd().map_err(|source| TrackerError::NotPermitted { source })?;
        let mut api = sys::uffdio_api { api: u64::from(sys::UFFD_API), features: wanted, ioctls: 0 };
        // SAFETY: `api` is what UFFDIO_API takes.
        if unsafe { update::<{ UFFDIO_API as Opcode }, _>(&fd, &mut api) }.is_err() {
            return Err(TrackerError::Unsupported { missing: missing_features(wanted) });
        }
        Ok(Self { fd })
    }

    /// Registers `range` (addresses, page-aligned). Its pages count as written until they are protected.
    pub(super) fn register(&self, range: Range<u64>) -> io::Result<()> {
        let range = sys::uffdio_range { start: range.start, len: range.end.saturating_sub(range.start) };
        let mut register = sys::uffdio_register { range, mode: u64::from(sys::UFFDIO_REGISTER_MODE_WP), ioctls: 0 };
        // SAFETY: `register` is what UFFDIO_REGISTER takes; registering changes no contents.
        unsafe { update::<{ UFFDIO_REGISTER as Opcode }, _>(&self.fd, &mut register) }
    }

    /// Protects all of `range`, which is registered.
    pub(super) fn protect(&self, range: Range<u64>) -> io::Result<()> {
        let range = sys::uffdio_range { start: range.start, len: range.end.saturating_sub(range.start) };
        let mut protect = sys::uffdio_writeprotect { range, mode: WRITEPROTECT_MODE_WP };
        loop {
            // SAFETY: `protect` is what UFFDIO_WRITEPROTECT takes; writers are let through by WP_ASYNC.
            match unsafe { update::<{ UFFDIO_WRITEPROTECT as Opcode }, _>(&self.fd, &mut protect) } {
                Err(e) if e.kind() == io::ErrorKind::Interrupted || e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    /// Lifts the protection of `range`; nothing to do about a failure, closing the descriptor does it too.
    pub(super) fn unregister(&self, range: Range<u64>) {
        let mut range = sys::uffdio_range { start: range.start, len: range.end.saturating_sub(range.start) };
        // SAFETY: `range` is what UFFDIO_UNREGISTER takes.
        let _ = unsafe { update::<{ UFFDIO_UNREGISTER as Opcode }, _>(&self.fd, &mut range) };
    }
}

/// # Safety
/// `value` must be the type that ioctl `OPCODE` reads and writes.
unsafe fn update<const OPCODE: Opcode, T>(fd: &OwnedFd, value: &mut T) -> io::Result<()> {
    // SAFETY: by this function's own contract.
    unsafe { ioctl(fd, Updater::<'_, OPCODE, T>::new(value)) }.map_err(io::Error::from)
}

fn open_fd() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: an unregistered userfaultfd changes nothing about any memory.
    if let Ok(fd) = unsafe { rustix::mm::userfaultfd(flags) } {
        return Ok(fd);
    }
    // Without privilege only faults from user space may be handled. That is enough here: with WP_ASYNC nothing is
    // handled by anybody but the kernel.
    let user_only = flags | UserfaultfdFlags::from_bits_retain(sys::UFFD_USER_MODE_ONLY);
    // SAFETY: as above.
    unsafe { rustix::mm::userfaultfd(user_only) }.map_err(io::Error::from)
}

/// Asks a fresh descriptor what the kernel has, since a refused handshake does not tell.
fn missing_features(wanted: u64) -> String {
    let mut api = sys::uffdio_api { api: u64::from(sys::UFFD_API), features: 0, ioctls: 0 };
    let available = open_fd()
        // SAFETY: `api` is what UFFDIO_API takes.
        .and_then(|fd| unsafe { update::<{ UFFDIO_API as Opcode }, _>(&fd, &mut api) })
        .map_or(0, |()| api.features);
    let missing: Vec<&str> =
        FEATURES.iter().filter(|(bit, _)| wanted & !available & u64::from(*bit) != 0).map(|(_, name)| *name).collect();
    missing.join(", ")
}
