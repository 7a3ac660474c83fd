//! Why a line was not carried out.

use dunlin::UriError;
use dunlin::dirty_rate::DirtyRateError;
use dunlin::parameters::ParameterError;

use crate::vm::VmError;

/// Why a line of the monitor was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HmpError {
    /// There is no such command.
    #[error("unknown command: '{name}'; `help` lists the commands")]
    UnknownCommand {
        /// What was asked for.
        name: String,
    },
    /// `info` of something that it does not know.
    #[error("there is nothing of the name '{name}' to show; `info` lists what there is")]
    UnknownTopic {
        /// What was asked for.
        name: String,
    },
    /// A command or parameter that QEMU has and Dunlin has not.
    #[error("{name} is not there yet: {why}")]
    NotYet {
        /// Its name.
        name: &'static str,
        /// The reason.
        why: &'static str,
    },
    /// A word is missing.
    #[error("{missing} is missing; use it as `{usage}`")]
    Missing {
        /// Which one.
        missing: &'static str,
        /// How the command is used.
        usage: String,
    },
    /// A word too many.
    #[error("'{word}' is too much; use it as `{usage}`")]
    TooMuch {
        /// The first that is.
        word: String,
        /// How the command is used.
        usage: String,
    },
    /// A flag that the command does not have.
    #[error("there is no flag '{flag}'; use it as `{usage}`")]
    UnknownFlag {
        /// What was given.
        flag: String,
        /// How the command is used.
        usage: String,
    },
    /// A word that is not what has to stand there.
    #[error("'{word}' is not {wanted}; use it as `{usage}`")]
    NotThat {
        /// What was given.
        word: String,
        /// What it should have been.
        wanted: &'static str,
        /// How the command is used.
        usage: String,
    },
    /// A quotation mark is not closed.
    #[error("a quotation mark is not closed")]
    OpenQuote,
    /// A parameter that is not a capability.
    #[error("{name} is a parameter and no capability; use `migrate_set_parameter {name} VALUE`")]
    NotACapability {
        /// The parameter.
        name: &'static str,
    },
    /// A parameter's name or value is wrong.
    #[error("{0}")]
    Parameter(#[from] ParameterError),
    /// An address is wrong.
    #[error("{0}")]
    Address(#[from] UriError),
    /// The dirty rate cannot be measured.
    #[error("{0}")]
    DirtyRate(#[from] DirtyRateError),
    /// The machine refused.
    #[error("{0}")]
    Refused(#[from] VmError),
}
