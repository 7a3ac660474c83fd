//! Where QMP is served: `unix:PATH`, the path alone, or `tcp:HOST:PORT`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A place where QMP is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 is any that is free.
        port: u16,
    },
}

/// A QMP address that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address:?} is not a QMP address: {problem}; use unix:PATH or tcp:HOST:PORT")]
pub struct AddressError {
    /// What was given.
    pub address: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = |problem| AddressError { address: text.to_owned(), problem };
        let path = match text.split_once(':') {
            Some(("unix", path)) => path,
            Some(("tcp", rest)) => return tcp(rest).map_err(error),
            Some(("fd" | "exec" | "vsock" | "stdio", _)) => {
                return Err(error("QMP is served on Unix sockets and TCP only"));
            }
            _ => text,
        };
        if path.is_empty() { Err(error("the path is missing")) } else { Ok(Self::Unix(path.into())) }
    }
}

fn tcp(rest: &str) -> Result<Address, &'static str> {
    let (host, port) = rest.rsplit_once(':').ok_or("the port is missing")?;
    let port = port.parse().map_err(|_| "the port is not a number from 0 to 65535")?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').ok_or("a bracket is not closed")?,
        None if host.contains(':') => return Err("an IPv6 address needs brackets"),
        // Whoever may connect may run commands as this user, so nobody from outside may unless it is asked for.
        None if host.is_empty() => "127.0.0.1",
        None => host,
    };
    Ok(Address::Tcp { host: host.to_owned(), port })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

impl From<&Address> for Address {
    fn from(address: &Address) -> Self {
        address.clone()
    }
}

impl From<PathBuf> for Address {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

impl From<&PathBuf> for Address {
    fn from(path: &PathBuf) -> Self {
        Self::Unix(path.clone())
    }
}

impl From<&Path> for Address {
    fn from(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }
}

/// Reads an address.
///
/// # Errors
/// When `text` is none.
pub fn parse_address(text: &str) -> Result<Address, AddressError> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds() {
        for (text, path) in [("unix:/a/b", "/a/b"), ("/a/b", "/a/b"), ("a.sock", "a.sock"), ("unix:x:y", "x:y")] {
            assert_eq!(parse_address(text), Ok(Address::Unix(path.into())), "{text}");
        }
        for (text, printed) in [
            ("tcp:localhost:4444", "tcp:localhost:4444"),
            ("tcp::1", "tcp:127.0.0.1:1"),
            ("tcp:[::1]:0", "tcp:[::1]:0"),
            ("tcp:0.0.0.0:9", "tcp:0.0.0.0:9"),
        ] {
            assert_eq!(parse_address(text).map(|address| address.to_string()), Ok(printed.to_owned()));
        }
        for text in ["", "unix:", "tcp:127.0.0.1", "tcp:a:b", "tcp:::1:2", "tcp:[::1:2", "fd:3", "stdio:"] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }
}
