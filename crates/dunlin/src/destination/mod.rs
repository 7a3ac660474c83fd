//! The receiving side.

use std::sync::Arc;

use crate::channel::Uri;
use crate::error::MigrationError;
use crate::guest::Guest;
use crate::parameters::{ParameterError, Parameters};
use crate::report::Report;

/// A machine waiting for, receiving, or having received a migration, on threads of its own.
/// After a failed migration it listens on for another. Dropping it ends it and waits for its threads.
#[derive(Debug)]
pub struct Destination {}

impl Destination {
    /// Listens on `uri` for a migration into `guest`.
    ///
    /// # Errors
    /// When the guest is here already, or the address cannot be listened on.
    pub fn listen(guest: &Arc<Guest>, uri: &Uri, parameters: &Parameters) -> Result<Self, MigrationError> {
        let _ = (guest, uri, parameters);
        Ok(Self {})
    }
    /// The address listened on, with the port that was chosen if it was 0.
    pub fn local_uri(&self) -> &Uri {
        loop {}
    }
    /// Where the current or latest migration stands.
    pub fn report(&self) -> Report {
        loop {}
    }
    /// Ends the incoming migration. The guest goes on at the source.
    ///
    /// # Errors
    /// When the guest is here already.
    pub fn cancel(&self) -> Result<(), MigrationError> {
        Ok(())
    }
    /// Changes parameters under way.
    ///
    /// # Errors
    /// When one of them is not live.
    pub fn set_parameters(&self, wanted: &Parameters) -> Result<(), ParameterError> {
        let _ = wanted;
        Ok(())
    }
    /// Waits until the guest is here, or no further migration can come in.
    pub fn wait(&self) -> Report {
        loop {}
    }
    /// A person's decision: the guest, complete here and not released as far as is known, is here.
    ///
    /// # Errors
    /// When nothing is undecided.
    pub fn take_over(&self) -> Result<(), MigrationError> {
        Ok(())
    }
}
