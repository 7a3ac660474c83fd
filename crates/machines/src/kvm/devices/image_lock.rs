//! Who may use an image, among all processes: two locks on bytes of its file.
//!
//! The *owner's* byte allows to use the image, and the *session's* byte keeps third parties out while the owner's byte changes
//! hands. A machine that starts by itself takes both, the session's first. A guest that moves leaves one hand before it is in the
//! other: its source gives up the owner's byte and keeps the session's until the guest has arrived; its destination takes the
//! owner's byte meanwhile and the session's afterwards. So at every moment at least one byte is locked, and a third process
//! fails.
//!
//! The locks are of the open file (`F_OFD_SETLK`) and not of the process, so that two machines in one process keep each other
//! out too. An image that is only read is locked shared. What must stay true: the file stays open for as long as a byte is
//! locked; bytes are unlocked before the file is closed, because a child process that has just been forked has it open as well.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use dunlin::Claim;

use crate::device_config::{DiskAccess, DiskConfig};

/// Far behind the end of every image: some file systems do not let others read bytes that are locked.
const OWNER_BYTE: libc::off_t = 0x4000_0000_0000_0000;
const SESSION_BYTE: libc::off_t = OWNER_BYTE + 1;
/// How long a guest that changes hands may wait for a byte that the other side is about to give up.
const TAKE_LIMIT: Duration = Duration::from_secs(1);
/// A lock is tried again after this.
const TAKE_PAUSE: Duration = Duration::from_millis(1);

/// A byte of the file, and what it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Owner,
    Session,
}

impl Part {
    fn byte(self) -> libc::off_t {
        match self {
            Self::Owner => OWNER_BYTE,
            Self::Session => SESSION_BYTE,
        }
    }
}

/// The locks on an image that this machine has.
#[derive(Debug, Default)]
pub(super) struct ImageLock {
    /// Open for as long as something is locked.
    file: Option<File>,
    owner: bool,
    session: bool,
}

impl ImageLock {
    /// Whether the image is this machine's to use.
    pub(super) fn is_owner(&self) -> bool {
        self.owner
    }

    /// Whether nothing is locked.
    pub(super) fn is_free(&self) -> bool {
        !self.owner && !self.session
    }

    /// The locked file. It is the one to look at: the path may come to mean another.
    pub(super) fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// What of the two is locked.
    pub(super) fn claimed(&self) -> Claim {
        match (self.owner, self.session) {
            (true, true) => Claim::Whole,
            (true, false) => Claim::Arrived,
            (false, true) => Claim::Released,
            (false, false) => Claim::Nothing,
        }
    }

    /// Takes and gives up bytes so that those of `claim` are locked, and no others.
    ///
    /// # Errors
    /// When another machine has one of them, or the file system has no locks. Nothing has changed then.
    pub(super) fn claim(&mut self, config: &DiskConfig, claim: Claim) -> io::Result<()> {
        let (owner, session) = match claim {
            Claim::Whole => (true, true),
            Claim::Arrived => (true, false),
            Claim::Released => (false, true),
            Claim::Nothing => (false, false),
            other => return Err(io::Error::other(format!("its locks know nothing of {other:?}"))),
        };
        // A machine that starts by itself waits for nobody. One whose guest changes hands waits for the other side, and for
        // others that only try.
        let limit = if self.is_free() && claim == Claim::Whole { Duration::ZERO } else { TAKE_LIMIT };
        let deadline = Instant::now() + limit;
        let before = (self.owner, self.session);
        let taken = self.take(config, session && !before.1, Part::Session, deadline);
        let taken = taken.and_then(|()| self.take(config, owner && !before.0, Part::Owner, deadline));
        let (owner, session) = if taken.is_ok() { (owner, session) } else { before };
        // What cannot be unlocked goes when the file is closed.
        if self.owner && !owner {
            let _ = self.lock(Part::Owner, libc::F_UNLCK);
            self.owner = false;
        }
        if self.session && !session {
            let _ = self.lock(Part::Session, libc::F_UNLCK);
            self.session = false;
        }
        if self.is_free() {
            self.file = None;
        }
        taken
    }

    fn take(&mut self, config: &DiskConfig, wanted: bool, part: Part, deadline: Instant) -> io::Result<()> {
        if !wanted {
            return Ok(());
        }
        let write = config.access == DiskAccess::Writable;
        if self.file.is_none() {
            self.file = Some(OpenOptions::new().read(true).write(write).open(&config.path)?);
        }
        let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
        loop {
            match self.lock(part, kind) {
                Ok(()) => break,
                Err(error) if is_conflict(&error) && Instant::now() < deadline => thread::sleep(TAKE_PAUSE),
                Err(error) if is_conflict(&error) => return Err(io::Error::other("another machine has it")),
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("its file system refuses to lock it: {error}")));
                }
            }
        }
        match part {
            Part::Owner => self.owner = true,
            Part::Session => self.session = true,
        }
        Ok(())
    }

    /// Locks or unlocks a byte, without waiting.
    fn lock(&self, part: Part, kind: libc::c_int) -> io::Result<()> {
        let file = self.file.as_ref().ok_or_else(|| io::Error::other("the image is not open"))?;
        // SAFETY: all zeros are a valid `flock`.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = part.byte();
        lock.l_len = 1;
        loop {
            // SAFETY: the kernel reads `lock`, which lives until the call returns.
            match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
                0 => return Ok(()),
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        for (part, locked) in [(Part::Owner, self.owner), (Part::Session, self.session)] {
            if locked {
                let _ = self.lock(part, libc::F_UNLCK);
            }
        }
    }
}

fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}
