//! The sending side.

use std::sync::Arc;

use crate::channel::Uri;
use crate::error::MigrationError;
use crate::guest::Guest;
use crate::parameters::{ParameterError, Parameters};
use crate::report::Report;

/// A migration out of this process, running on threads of its own. Dropping it cancels it and waits for its threads.
#[derive(Debug)]
pub struct Source {}

impl Source {
    /// Starts migrating `guest` to `uri`. Returns as soon as the migration runs; [`wait`](Self::wait) for its end.
    ///
    /// # Errors
    /// When the guest is not here or is being migrated already.
    pub fn start(guest: &Arc<Guest>, uri: &Uri, parameters: &Parameters) -> Result<Self, MigrationError> {
        let _ = (guest, uri, parameters);
        Ok(Self {})
    }
    /// Where it stands, at any time.
    pub fn report(&self) -> Report {
        loop {}
    }
    /// Asks for an end. The guest goes on here, unless it was released already.
    ///
    /// # Errors
    /// When the guest was released to the destination, or the migration is over.
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
    /// Waits for the end; may be called by several threads, and again.
    pub fn wait(&self) -> Report {
        loop {}
    }
    /// A person's decision: the guest, released and not heard of, is here.
    ///
    /// # Errors
    /// When nothing is undecided.
    pub fn take_back(&self) -> Result<(), MigrationError> {
        Ok(())
    }
    /// Tries again to reach the destination of a released guest.
    ///
    /// # Errors
    /// When nothing is undecided.
    pub fn reconnect(&self) -> Result<(), MigrationError> {
        Ok(())
    }
}
