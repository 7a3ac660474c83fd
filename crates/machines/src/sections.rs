//! Device state as named, versioned sections, encoded with postcard: what the machines here share.

use dunlin::{Need, StateSection};
use serde::Serialize;
use serde::de::DeserializeOwned;

const VERSION: u32 = 1;

/// State that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A section that must be understood and is not known.
    #[error("section {name:?} ({instance}) is unknown here, and the guest cannot do without")]
    Unknown {
        /// Its name.
        name: String,
        /// Its instance.
        instance: u32,
    },
    /// A section that must be there is not, or is there twice.
    #[error("section {name:?} ({instance}) is there {times} times, it must be once")]
    Count {
        /// Its name.
        name: &'static str,
        /// Its instance.
        instance: u32,
        /// How often it is there.
        times: usize,
    },
    /// A version that this machine does not know.
    #[error("section {name:?} has version {version}, this machine knows {VERSION}")]
    Version {
        /// Its name.
        name: &'static str,
        /// Its version.
        version: u32,
    },
    /// A section that does not decode.
    #[error("section {name:?} ({instance}) is damaged: {problem}")]
    Damaged {
        /// Its name.
        name: &'static str,
        /// Its instance.
        instance: u32,
        /// What is wrong with it.
        problem: String,
    },
    /// A guest of another kind of machine.
    #[error("the source's machine is {theirs:?}, this one is {ours:?}")]
    Kind {
        /// At the source.
        theirs: String,
        /// Here.
        ours: &'static str,
    },
    /// Another machine's.
    #[error("the source has {theirs} {what}, this machine has {ours}")]
    Different {
        /// Of what.
        what: &'static str,
        /// At the source.
        theirs: u64,
        /// Here.
        ours: u64,
    },
}

fn damaged(name: &'static str, instance: u32) -> impl Fn(postcard::Error) -> StateError {
    move |error| StateError::Damaged { name, instance, problem: error.to_string() }
}

/// Goes through the sections whose names are not `known`: those that are optional are skipped, the first of the others is
/// an error.
pub(crate) fn check_known(sections: &[StateSection], known: impl Fn(&StateSection) -> bool) -> Result<(), StateError> {
    match sections.iter().find(|section| section.need == Need::Required && !known(section)) {
        Some(section) => Err(StateError::Unknown { name: section.name.clone(), instance: section.instance }),
        None => Ok(()),
    }
}

/// A profile of a machine of that kind.
pub(crate) fn encode_profile<T: Serialize>(kind: &'static str, value: &T) -> Result<Vec<u8>, StateError> {
    postcard::to_stdvec(&(kind, value)).map_err(damaged("profile", 0))
}

/// Decodes what [`encode_profile`] has made for a machine of the same kind.
pub(crate) fn decode_profile<T: DeserializeOwned>(profile: &[u8], kind: &'static str) -> Result<T, StateError> {
    let (theirs, rest): (String, _) = postcard::take_from_bytes(profile).map_err(damaged("profile", 0))?;
    if theirs == kind { decode(rest, "profile", 0) } else { Err(StateError::Kind { theirs, ours: kind }) }
}

/// Two machines must agree on a number.
pub(crate) fn same(what: &'static str, theirs: u64, ours: u64) -> Result<(), StateError> {
    if theirs == ours { Ok(()) } else { Err(StateError::Different { what, theirs, ours }) }
}

/// Decodes all of `data`.
pub(crate) fn decode<T: DeserializeOwned>(data: &[u8], name: &'static str, instance: u32) -> Result<T, StateError> {
    match postcard::take_from_bytes(data).map_err(damaged(name, instance))? {
        (value, []) => Ok(value),
        (_, rest) => {
            let problem = format!("{} bytes too many", rest.len());
            Err(StateError::Damaged { name, instance, problem })
        }
    }
}

/// A required section of the version that this machine writes.
pub(crate) fn section<T: Serialize>(name: &'static str, instance: u32, value: &T) -> Result<StateSection, StateError> {
    let data = postcard::to_stdvec(value).map_err(damaged(name, instance))?;
    Ok(StateSection { name: name.to_owned(), instance, version: VERSION, need: Need::Required, data })
}

/// The one section of that name and instance. It must be as this machine would write it: a decoder may fill up what is too
/// short.
pub(crate) fn find<T: DeserializeOwned + Serialize>(
    sections: &[StateSection],
    name: &'static str,
    instance: u32,
) -> Result<T, StateError> {
    let mut found = sections.iter().filter(|s| s.name == name && s.instance == instance);
    match (found.next(), found.count()) {
        (Some(given), 0) if given.version == VERSION => {
            let value = decode(&given.data, name, instance)?;
            if section(name, instance, &value)?.data == given.data {
                Ok(value)
            } else {
                let problem = "it is not as this machine would write it".to_owned();
                Err(StateError::Damaged { name, instance, problem })
            }
        }
        (Some(section), 0) => Err(StateError::Version { name, version: section.version }),
        (first, more) => Err(StateError::Count { name, instance, times: usize::from(first.is_some()) + more }),
    }
}
