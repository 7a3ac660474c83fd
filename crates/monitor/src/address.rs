//! Where QMP is served: `unix:PATH`, or the path alone.

use std::path::PathBuf;

/// A QMP address that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address:?} is not a QMP address: {problem}; use unix:PATH")]
pub struct AddressError {
    /// What was given.
    pub address: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// The path of the socket that `text` names.
///
/// # Errors
/// When it names none.
pub fn parse_address(text: &str) -> Result<PathBuf, AddressError> {
    let error = |problem| AddressError { address: text.to_owned(), problem };
    let path = match text.split_once(':') {
        Some(("unix", path)) => path,
        Some(("tcp" | "fd" | "exec" | "vsock" | "stdio", _)) => {
            return Err(error("QMP is served on Unix sockets only"));
        }
        _ => text,
    };
    if path.is_empty() { Err(error("the path is missing")) } else { Ok(path.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_and_without_scheme() {
        for (text, path) in [("unix:/a/b", "/a/b"), ("/a/b", "/a/b"), ("a.sock", "a.sock"), ("unix:x:y", "x:y")] {
            assert_eq!(parse_address(text), Ok(path.into()), "{text}");
        }
        for text in ["", "unix:", "tcp:127.0.0.1:4444"] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }
}
