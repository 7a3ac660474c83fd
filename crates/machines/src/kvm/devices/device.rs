//! What the virtio transport asks of a device behind it.

use std::io;

use dunlin::Claim;

use super::chain::{Broken, Chain};
use super::disk::Left;
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
    /// The machine has been paused: others must see what was acknowledged. Takes as long as its storage does.
    ///
    /// # Errors
    /// When they would not.
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// A pause came to nothing, before or after this device was paused: the machine runs on.
    fn keep_on(&mut self) {}
    /// The machine is about to run. Takes as long as its storage does.
    ///
    /// # Errors
    /// When it must not.
    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// A start came to nothing after this device was resumed; it has done nothing since.
    fn let_go(&mut self) {}
    /// Takes or gives up what only one machine may use.
    ///
    /// # Errors
    /// When another has it; nothing has changed then.
    fn claim(&mut self, claim: Claim) -> io::Result<()> {
        let _ = claim;
        Ok(())
    }
    /// What of that is this machine's.
    fn claimed(&self) -> Claim {
        Claim::Nothing
    }
    /// How the guest has left the image behind it, if there is one.
    fn left(&self) -> Option<Left> {
        None
    }
    /// The guest comes from elsewhere, where it has run until now and has left its image as `left` says, if that is known:
    /// what was known from before is outdated. Nothing is written yet.
    ///
    /// # Errors
    /// When it cannot be brought up to date.
    fn renew(&mut self, left: Option<Left>) -> io::Result<()> {
        let _ = left;
        Ok(())
    }
}
