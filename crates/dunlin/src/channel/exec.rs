//! `exec:COMMAND`: a command whose standard input and output are the connection.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use super::command::Command;
use super::{Connection, Uri};
use crate::error::Cause;

/// Runs `command` with `/bin/sh -c`; both its standard input and output are one end of a socket pair. What it says on its
/// standard error is for the errors of the connection.
///
/// It gets a process group of its own: Ctrl-C at a terminal must not take the link away from the migration that it
/// cancels, and what the command has started ends with it.
pub(super) fn spawn(uri: &Uri, command: &str) -> Result<Connection, Cause> {
    let run = || -> io::Result<Connection> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = std::process::Command::new("/bin/sh")
            .arg("-c")
            .arg(command)
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Connection::with_command(OwnedFd::from(ours), uri.to_string(), Command::new(child)?))
    };
    run().map_err(|source| Cause::Io { doing: "run", target: uri.to_string(), source })
}
