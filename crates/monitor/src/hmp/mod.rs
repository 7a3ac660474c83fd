//! The monitor for people.

use crate::vm::Vm;

/// Why a line could not be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HmpError {
    /// There is no monitor for people.
    #[error("there is no monitor for people yet")]
    NotYet,
}

/// Carries out one line and gives what it prints.
///
/// # Errors
/// Always, as yet.
pub fn execute(_: &Vm, _: &str, _: Option<u32>) -> Result<String, HmpError> {
    Err(HmpError::NotYet)
}
