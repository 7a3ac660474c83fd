//! `exec:COMMAND`: a command whose standard input and output are the connection.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use super::{Connection, Uri};
use crate::error::Cause;

/// Runs `command` with `/bin/sh -c`; both its standard input and output are one end of a socket pair.
///
/// It gets a process group of its own: Ctrl-C at a terminal must not take the link away from the migration that it
/// cancels, and what the command has started ends with it.
pub(super) fn spawn(uri: &Uri, command: &str) -> Result<Connection, Cause> {
    let run = || -> io::Result<Connection> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new("/bin/sh")
            .arg("-c")
            .arg(command)
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        Ok(Connection::with_child(OwnedFd::from(ours), uri.to_string(), child))
    };
    run().map_err(|source| Cause::Io { doing: "run", target: uri.to_string(), source })
}
