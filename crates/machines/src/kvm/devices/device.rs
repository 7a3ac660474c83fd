//! What the virtio transport asks of a device behind it.

use std::io;

use super::chain::{Broken, Chain};
use super::memory::GuestRam;
use super::worker::Wait;

/// A device with queues. Its transport calls it from one thread at a time.
pub(super) trait Device: Send {
    /// Its number in the virtio specification.
    fn kind(&self) -> u32;
    /// What it is called where people read it, for instance `disk`.
    fn name(&self) -> &'static str;
    /// What it offers, besides what the transport does.
    fn features(&self) -> u64;
    /// The largest size of each of its queues.
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration space.
    fn config(&self) -> Vec<u8>;
    /// What both sides of a migration must have the same, by name and value.
    fn properties(&self) -> Vec<(String, String)>;
    /// What the driver has chosen of the features.
    fn set_features(&mut self, features: u64);
    /// Whether it would do something with a request from this queue now.
    fn wants(&mut self, queue: usize) -> bool {
        let _ = queue;
        true
    }
    /// Carries out a request; tells how many bytes it has written.
    ///
    /// # Errors
    /// When the request makes no sense at all.
    fn handle(&mut self, queue: usize, chain: &Chain, ram: &GuestRam) -> Result<u32, Broken>;
    /// What it waits for besides the guest, after its queues were looked at.
    fn wait(&mut self) -> Wait {
        Wait::Bell
    }
    /// The machine has been paused: others must see what was acknowledged.
    ///
    /// # Errors
    /// When they would not.
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// The machine is about to run.
    ///
    /// # Errors
    /// When it must not.
    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// The guest comes from elsewhere, where it has run until now: what was known from before is outdated. Nothing is
    /// written yet.
    ///
    /// # Errors
    /// When it cannot be brought up to date.
    fn renew(&mut self) -> io::Result<()> {
        Ok(())
    }
}
