//! virtio-net: a network card on a tap device.
//!
//! Without offloads: frames go through as they are. What there is no room for is dropped, as on any network; nothing is
//! sent or received twice, because a request is carried out once.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::chain::{Broken, Chain};
use super::device::Device;
use super::memory::GuestRam;
use super::tap::{HEADER_BYTES, Tap};
use super::worker::Wait;
use crate::device_config::{NetConfig, format_mac};

const RECEIVE: usize = 0;
/// The longest frame with its header.
const MAX_BYTES: usize = 65550 + HEADER_BYTES;

/// The device.
#[derive(Debug)]
pub(super) struct Net {
    tap: Tap,
    mac: [u8; 6],
    /// A frame that came, and its length; none if that is 0.
    received: Vec<u8>,
    length: usize,
    /// There was no frame at the last look.
    waits: bool,
}

impl Net {
    pub(super) fn new(config: &NetConfig) -> io::Result<Self> {
        let tap = Tap::open(&config.tap)?;
        Ok(Self { tap, mac: config.mac, received: vec![0; MAX_BYTES], length: 0, waits: false })
    }

    fn transmit(&mut self, chain: &Chain, ram: &GuestRam) -> Result<(), Broken> {
        let length = usize::try_from(chain.readable.length()).unwrap_or(usize::MAX);
        if length <= HEADER_BYTES || length > MAX_BYTES {
            return Ok(());
        }
        let mut frame = vec![0; length];
        chain.readable.read(ram, 0, &mut frame)?;
        // No offload was agreed on, whatever the header says.
        frame.iter_mut().take(HEADER_BYTES).for_each(|byte| *byte = 0);
        // A frame that the tap device does not take is lost.
        let _ = self.tap.send(&frame);
        Ok(())
    }
}

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn config(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn properties(&self) -> Vec<(String, String)> {
        vec![("address".to_owned(), format_mac(self.mac))]
    }

    fn set_features(&mut self, _: u64) {
        // The driver starts afresh, or goes away.
        self.length = 0;
    }

    fn wants(&mut self, queue: usize) -> bool {
        if queue != RECEIVE {
            return true;
        }
        if self.length == 0 {
            let received = self.tap.receive(&mut self.received);
            self.waits = matches!(&received, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
            self.length = received.unwrap_or(0);
        }
        self.length > 0
    }

    fn handle(&mut self, queue: usize, chain: &Chain, ram: &GuestRam) -> Result<u32, Broken> {
        if queue != RECEIVE {
            return self.transmit(chain, ram).map(|()| 0);
        }
        let length = std::mem::take(&mut self.length);
        if chain.writable.length() < length as u64 {
            // It does not fit, and is lost.
            return Ok(0);
        }
        let frame = self.received.get_mut(..length).ok_or(Broken)?;
        // No offload was agreed on here either.
        frame.iter_mut().take(HEADER_BYTES).for_each(|byte| *byte = 0);
        // The number of buffers that a frame takes, at the header's end.
        if let Some(count) = frame.get_mut(HEADER_BYTES - 2..HEADER_BYTES) {
            count.copy_from_slice(&1u16.to_le_bytes());
        }
        chain.writable.write(ram, 0, frame)?;
        Ok(length as u32)
    }

    fn wait(&mut self) -> Wait {
        // One frame at a time: with one in hand the guest has to make room first.
        if std::mem::take(&mut self.waits) { Wait::Readable(self.tap.fd()) } else { Wait::Bell }
    }
}
