//! A request's buffers in guest memory, as two streams of bytes: what the device reads and what it writes.
//!
//! The guest makes them up as it likes. What must stay true: however they loop or where they point, a chain has no more than
//! [`MAX_BUFFERS`] of them, and each access is checked against guest memory.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::memory::{GuestRam, Written};

/// More buffers than that are no request.
const MAX_BUFFERS: usize = 1024;

/// What the guest has done wrong with a queue. The device stops until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest has set up a queue or a request wrongly")]
pub(super) struct Broken;

#[derive(Debug, Clone, Copy)]
struct Buffer {
    address: GuestAddress,
    length: u32,
}

/// Buffers, one after the other.
#[derive(Debug, Default)]
pub(super) struct Stream {
    buffers: Vec<Buffer>,
    length: u64,
}

impl Stream {
    fn add(&mut self, address: GuestAddress, length: u32) {
        self.buffers.push(Buffer { address, length });
        self.length = self.length.saturating_add(u64::from(length));
    }

    /// Bytes in all of them.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Calls `each` with a guest address and a part of `length` bytes from `offset` on, until all are done.
    fn pieces(
        &self,
        offset: u64,
        length: usize,
        mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        let (mut skip, mut done) = (offset, 0usize);
        for buffer in &self.buffers {
            let size = u64::from(buffer.length);
            if skip >= size {
                skip = skip.saturating_sub(size);
                continue;
            }
            let here = usize::try_from(size.saturating_sub(skip)).unwrap_or(usize::MAX);
            let end = done.saturating_add(here).min(length);
            let address = buffer.address.0.checked_add(skip).ok_or(Broken)?;
            each(GuestAddress(address), done..end)?;
            (skip, done) = (0, end);
            if done == length {
                break;
            }
        }
        if done == length { Ok(()) } else { Err(Broken) }
    }

    /// Fills `to` from `offset` on.
    pub(super) fn read(&self, ram: &GuestRam, offset: u64, to: &mut [u8]) -> Result<(), Broken> {
        self.pieces(offset, to.len(), |address, part| {
            ram.read_slice(to.get_mut(part).ok_or(Broken)?, address).map_err(|_| Broken)
        })
    }

    /// Writes `from` at `offset`.
    pub(super) fn write(&self, ram: &GuestRam, offset: u64, from: &[u8]) -> Result<(), Broken> {
        self.pieces(offset, from.len(), |address, part| {
            ram.write_slice(from.get(part).ok_or(Broken)?, address).map_err(|_| Broken)
        })
    }
}

/// A request.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// What the device reads.
    pub(super) readable: Stream,
    /// What the device writes.
    pub(super) writable: Stream,
}

impl Chain {
    /// The buffers of a chain of descriptors.
    pub(super) fn collect(descriptors: DescriptorChain<&GuestMemoryMmap<Written>>) -> Result<Self, Broken> {
        let mut chain = Self::default();
        for (number, descriptor) in descriptors.enumerate() {
            if number >= MAX_BUFFERS {
                return Err(Broken);
            }
            let stream = if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable };
            stream.add(descriptor.addr(), descriptor.len());
        }
        if chain.readable.buffers.is_empty() && chain.writable.buffers.is_empty() { Err(Broken) } else { Ok(chain) }
    }
}
