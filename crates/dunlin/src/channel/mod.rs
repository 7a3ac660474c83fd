//! Transports: what an address names, connecting to it and listening on it.
//!
//! Every transport gives [`Connection`]s: ordered, two-way byte streams over one socket. TCP and Unix sockets can have
//! as many as wanted; `fd` and `exec` have a single one, which then carries control and pages together.

mod command;
mod connection;
mod exec;
mod fd;
mod tcp;
mod unix;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub(crate) use connection::{Connection, More, Origin, Target, block_broken_pipe_signal};

use crate::error::Cause;

/// Where a migration goes to or comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Uri {
    /// `tcp:HOST:PORT`; an IPv6 address in brackets, an empty host for every local address, port 0 for any free one.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `fd:N`: a connected stream socket that this process has inherited or was given.
    Fd(i32),
    /// `exec:COMMAND`, run by `/bin/sh -c` with a socket as its standard input and output.
    Exec(String),
}

/// An address that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?} is not an address: {problem}; use tcp:HOST:PORT, unix:PATH, fd:N or exec:COMMAND")]
pub struct UriError {
    /// What was given.
    pub uri: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let error = |problem| UriError { uri: text.to_owned(), problem };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| error("it has no scheme"))?;
        match scheme {
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| error("the port is missing"))?;
                let port = port.parse().map_err(|_| error("the port is not a number from 0 to 65535"))?;
                let bracketed = host.strip_prefix('[').map(|h| h.strip_suffix(']'));
                let host = match bracketed {
                    Some(inner) => inner.ok_or_else(|| error("a bracket is not closed"))?,
                    None if host.contains(':') => return Err(error("an IPv6 address needs brackets")),
                    None => host,
                };
                Ok(Self::Tcp { host: host.to_owned(), port })
            }
            "unix" if rest.is_empty() => Err(error("the path is missing")),
            "unix" => Ok(Self::Unix(rest.into())),
            "fd" => rest.parse().ok().filter(|fd| *fd >= 0).map(Self::Fd).ok_or_else(|| error("it is not a number")),
            "exec" if rest.trim().is_empty() => Err(error("the command is missing")),
            "exec" => Ok(Self::Exec(rest.to_owned())),
            _ => Err(error("the scheme is unknown")),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
            Self::Exec(command) => write!(f, "exec:{command}"),
        }
    }
}

/// How many connections a transport can have to the same peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Connections {
    /// One: it carries everything.
    Single,
    /// As many as wanted.
    Many,
}

impl Uri {
    /// How many connections the transport can have.
    pub(crate) fn connections(&self) -> Connections {
        match self {
            Self::Tcp { .. } | Self::Unix(_) => Connections::Many,
            Self::Fd(_) | Self::Exec(_) => Connections::Single,
        }
    }

    /// Whether connecting a second time can reach the same peer.
    pub(crate) fn can_reconnect(&self) -> bool {
        !matches!(self, Self::Fd(_))
    }

    /// For an address that is a descriptor: the connection, which must be made while its number still names it.
    pub(crate) fn given(&self) -> Result<Option<Connection>, Cause> {
        match self {
            Self::Fd(number) => fd::open(self, *number).map(Some),
            _ => Ok(None),
        }
    }

    /// Connects. Gives up after `timeout`, or soon after `stop` becomes true.
    pub(crate) fn connect(&self, timeout: Duration, stop: &AtomicBool) -> Result<Connection, Cause> {
        match self {
            Self::Tcp { host, port } => tcp::connect(self, host, *port, timeout, stop),
            Self::Unix(path) => unix::connect(self, path, timeout, stop),
            Self::Fd(number) => fd::open(self, *number),
            Self::Exec(command) => exec::spawn(self, command),
        }
    }
}

/// Where connections come in.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(tcp::Listener),
    Unix(unix::Listener),
    /// Gives its connection once.
    Fd(Uri, Option<Connection>),
    /// Runs its command for every connection.
    Exec(Uri),
}

impl Listener {
    /// Listens on `uri`.
    pub(crate) fn bind(uri: &Uri) -> Result<Self, Cause> {
        match uri {
            Uri::Tcp { host, port } => tcp::Listener::bind(uri, host, *port).map(Self::Tcp),
            Uri::Unix(path) => unix::Listener::bind(uri, path).map(Self::Unix),
            Uri::Fd(number) => Ok(Self::Fd(uri.clone(), Some(fd::open(uri, *number)?))),
            Uri::Exec(_) => Ok(Self::Exec(uri.clone())),
        }
    }

    /// The address listened on, with the port that was chosen if it was 0.
    pub(crate) fn local_uri(&self) -> Uri {
        match self {
            Self::Tcp(listener) => listener.local_uri(),
            Self::Unix(listener) => listener.local_uri(),
            Self::Fd(uri, _) | Self::Exec(uri) => uri.clone(),
        }
    }
}
