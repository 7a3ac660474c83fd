//! virtio-rng: random bytes from the host's kernel.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::chain::{Broken, Chain};
use super::device::Device;
use super::memory::GuestRam;

/// What one request gets at most.
const MAX_BYTES: u64 = 4096;

/// The device.
#[derive(Debug)]
pub(super) struct Rng;

impl Device for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn properties(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn set_features(&mut self, _: u64) {}

    fn handle(&mut self, _: usize, chain: &Chain, ram: &GuestRam) -> Result<u32, Broken> {
        let mut bytes = [0; MAX_BYTES as usize];
        let wanted = chain.writable.length().min(MAX_BYTES) as usize;
        let to = bytes.get_mut(..wanted).ok_or(Broken)?;
        // The guest asks again for what it does not get.
        let got = getrandom(to, GetRandomFlags::empty()).unwrap_or(0);
        chain.writable.write(ram, 0, bytes.get(..got).ok_or(Broken)?)?;
        Ok(got as u32)
    }
}
