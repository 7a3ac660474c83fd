//! Small text files of the kernel.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::HostMemoryError;

/// The file's path and text.
pub(super) fn read(path: &Path) -> Result<(PathBuf, String), HostMemoryError> {
    match fs::read(path) {
        // A mount point may have any bytes in its name.
        Ok(bytes) => Ok((path.to_owned(), String::from_utf8_lossy(&bytes).into_owned())),
        Err(source) => Err(HostMemoryError::Read { path: path.to_owned(), source }),
    }
}

/// As [`read`]; `None` where there is no such file.
pub(super) fn read_if_there(path: &Path) -> Result<Option<(PathBuf, String)>, HostMemoryError> {
    match read(path) {
        Err(HostMemoryError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// The number that is all of the file's text.
pub(super) fn number(path: &Path, text: &str) -> Result<u64, HostMemoryError> {
    let text = text.trim();
    text.parse().map_err(|_| wrong(path, text, "a number"))
}

/// The number behind the name `name` at the start of a line.
pub(super) fn field(path: &Path, text: &str, name: &str) -> Result<u64, HostMemoryError> {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name));
    let line = line.ok_or_else(|| wrong(path, "", "a list with all that is needed of it"))?;
    let number = line.split_whitespace().nth(1).and_then(|number| number.parse().ok());
    number.ok_or_else(|| wrong(path, line, "a name and a number"))
}

/// Bytes in so many KiB.
pub(super) fn kib(number: u64) -> u64 {
    number.saturating_mul(1024)
}

pub(super) fn wrong(path: &Path, text: &str, expected: &'static str) -> HostMemoryError {
    /// More of a file that is not what it should be does not help anybody.
    const SHOWN: usize = 80;
    HostMemoryError::Parse { path: path.to_owned(), text: text.chars().take(SHOWN).collect(), expected }
}
