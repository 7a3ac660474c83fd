//! How the writes of a guest on KVM are tracked, as a person chooses it.

use std::fmt;
use std::str::FromStr;

/// How the guest's writes are tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirtyTracking {
    /// What is best here: the log. It has room for every page, whatever the guest does, and each page that is written costs
    /// the guest one fault a round.
    #[default]
    Auto,
    /// KVM's dirty log, with manual protection.
    Log,
    /// A dirty ring for each vCPU.
    Ring {
        /// Entries of each ring, rounded up to what KVM takes, for trying what happens when rings fill: they are read only
        /// when the engine asks and when one is full. `None` for as many as KVM allows, read every few milliseconds.
        entries: Option<u32>,
    },
}

/// A way of tracking that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("dirty tracker {text:?}: write auto, log, ring, or ring:ENTRIES, such as ring:4096")]
pub struct DirtyTrackingError {
    /// What was given.
    pub text: String,
}

impl FromStr for DirtyTracking {
    type Err = DirtyTrackingError;

    fn from_str(text: &str) -> Result<Self, DirtyTrackingError> {
        let error = || DirtyTrackingError { text: text.to_owned() };
        Ok(match text.split_once(':') {
            None if text == "auto" => Self::Auto,
            None if text == "log" => Self::Log,
            None if text == "ring" => Self::Ring { entries: None },
            Some(("ring", entries)) => {
                let entries = entries.parse::<u32>().ok().filter(|entries| *entries > 0);
                Self::Ring { entries: Some(entries.ok_or_else(error)?) }
            }
            _ => return Err(error()),
        })
    }
}

impl fmt::Display for DirtyTracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Log => f.write_str("log"),
            Self::Ring { entries: None } => f.write_str("ring"),
            Self::Ring { entries: Some(entries) } => write!(f, "ring:{entries}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_write_it() {
        for text in ["auto", "log", "ring", "ring:4096"] {
            assert_eq!(text.parse::<DirtyTracking>().map(|tracking| tracking.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "rings", "ring:", "ring:0", "ring:-1", "log:4096", "ring:4096:2"] {
            assert!(text.parse::<DirtyTracking>().is_err(), "{text}");
        }
    }
}
