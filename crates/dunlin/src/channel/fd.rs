//! `fd:N`: a connected stream socket that this process already has.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::net::{SocketType, sockopt};

use super::{Connection, Uri};
use crate::error::Cause;

/// A connection over a duplicate of descriptor `number`, which stays the caller's.
pub(super) fn open(uri: &Uri, number: i32) -> Result<Connection, Cause> {
    let error = |source| Cause::Io { doing: "use", target: uri.to_string(), source };
    // SAFETY: the number is borrowed only for the calls below, the first of which fails if it is not open. Another
    // thread closing it meanwhile is the caller's mistake and gives an error, not undefined behaviour.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let socket = rustix::io::fcntl_dupfd_cloexec(borrowed, 3).map_err(|e| error(e.into()))?;
    match sockopt::socket_type(&socket) {
        Ok(SocketType::STREAM) => Ok(Connection::new(socket, uri.to_string())),
        _ => Err(error(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a connected stream socket, which a two-way channel needs",
        ))),
    }
}
