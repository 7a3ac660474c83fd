//! Bytes from a client's socket, with the file descriptors that came along.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

/// How many descriptors may come with one message, and wait; the kernel closes those beyond.
const MOST: usize = 16;

/// Descriptors that came and that no command has taken yet.
///
/// What is read at once may have several commands, and it cannot be told with which of them a descriptor came: each may
/// take it, and the next that comes alone. A client may also send it ahead of its command, with a space.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    earlier: VecDeque<OwnedFd>,
    /// Those that came with what was read last.
    latest: VecDeque<OwnedFd>,
}

impl Pending {
    /// For a command that takes one.
    pub(crate) fn take(&mut self) -> Option<OwnedFd> {
        self.earlier.pop_front().or_else(|| self.latest.pop_front())
    }

    /// A command takes none: those that came before it are nobody's.
    pub(crate) fn pass_over(&mut self) {
        self.earlier.clear();
    }

    fn add(&mut self, descriptors: impl Iterator<Item = OwnedFd>) {
        let room = MOST.saturating_sub(self.earlier.len().saturating_add(self.latest.len()));
        self.latest.extend(descriptors.take(room));
    }
}

/// Reads what is there, waiting for it; 0 bytes are the end.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], pending: &mut Pending) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(received) => {
                let latest = std::mem::take(&mut pending.latest);
                pending.earlier.extend(latest);
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                        pending.add(descriptors);
                    }
                }
                return Ok(received.bytes);
            }
        }
    }
}
