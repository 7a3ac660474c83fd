//! File descriptors that clients have sent along with `getfd`, by the names they gave them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many may be kept.
const MOST: usize = 256;

/// Why a descriptor cannot be kept or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// Names that begin with a digit would be numbers in `fd:`.
    #[error("Parameter 'fdname' expects a name not starting with a digit")]
    Name,
    /// There are too many.
    #[error("{MOST} file descriptors are kept already; close one with closefd")]
    TooMany,
    /// None has that name.
    #[error("File descriptor named '{name}' not found")]
    NotFound {
        /// The name given.
        name: String,
    },
}

/// The descriptors that are kept.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    named: Mutex<BTreeMap<String, OwnedFd>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Descriptors {
    /// Keeps `descriptor` under `name`, in the place of one that had that name.
    pub(crate) fn keep(&self, name: &str, descriptor: OwnedFd) -> Result<(), DescriptorError> {
        if name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(DescriptorError::Name);
        }
        let mut named = lock(&self.named);
        if named.len() >= MOST && !named.contains_key(name) {
            return Err(DescriptorError::TooMany);
        }
        named.insert(name.to_owned(), descriptor);
        Ok(())
    }

    /// Gives up the one called `name`.
    pub(crate) fn take(&self, name: &str) -> Result<OwnedFd, DescriptorError> {
        lock(&self.named).remove(name).ok_or_else(|| DescriptorError::NotFound { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bounds() {
        let descriptors = Descriptors::default();
        let any = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert_eq!(descriptors.keep("1a", any()), Err(DescriptorError::Name));
        assert_eq!(descriptors.keep("", any()), Err(DescriptorError::Name));
        for n in 0..MOST {
            descriptors.keep(&format!("fd{n}"), any()).unwrap();
        }
        assert_eq!(descriptors.keep("more", any()), Err(DescriptorError::TooMany));
        descriptors.keep("fd7", any()).unwrap();
        descriptors.take("fd7").unwrap();
        assert!(descriptors.take("fd7").is_err());
        descriptors.keep("more", any()).unwrap();
    }
}
