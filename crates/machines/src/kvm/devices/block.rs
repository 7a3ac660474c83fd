//! virtio-blk: a disk.
//!
//! Requests are carried out one by one, in the worker. Data go through a buffer of this process, so that what the guest does
//! with its memory meanwhile does not matter. What must stay true: how much a request reads, writes, discards or zeros is
//! bounded, as a pause waits for it. A flush, and a write of a driver that takes none to be needed, take as long as the
//! host's kernel does to put what was written on the medium; nothing here bounds that.

use std::io;

use dunlin::Claim;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::chain::{Broken, Chain};
use super::device::Device;
use super::disk::{Disk, Left};
use super::memory::GuestRam;
use crate::device_config::{DiskAccess, SERIAL_BYTES};

const SECTOR: u64 = 512;
/// Descriptors besides the header and the status.
const MAX_SEGMENTS: u32 = 254;
/// Longer reads and writes are refused.
const MAX_DATA_BYTES: u64 = 16 << 20;
/// What is copied at once.
const BUFFER_BYTES: u64 = 256 << 10;
const MAX_DISCARD_SECTORS: u32 = 1 << 17;
const MAX_ZERO_SECTORS: u32 = 1 << 13;
/// Ranges in one request of discarding or writing zeros. More would add up while a pause waits.
const MAX_RANGES: u32 = 1;
const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
const UNMAP: u32 = 1;

/// Why a request is answered with an error.
enum Refusal {
    Unsupported,
    Failed,
}

impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Self::Failed
    }
}

impl From<Broken> for Refusal {
    fn from(_: Broken) -> Self {
        Self::Failed
    }
}

/// The device.
#[derive(Debug)]
pub(super) struct Block {
    disk: Disk,
    features: u64,
    buffer: Vec<u8>,
}

impl Block {
    pub(super) fn new(disk: Disk) -> Self {
        Self { disk, features: 0, buffer: vec![0; BUFFER_BYTES as usize] }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// The bytes of a range on the disk, if it is one.
    fn range(&self, sector: u64, bytes: u64) -> Result<u64, Refusal> {
        let start = sector.checked_mul(SECTOR).ok_or(Refusal::Failed)?;
        let end = start.checked_add(bytes).ok_or(Refusal::Failed)?;
        let capacity = self.disk.size / SECTOR * SECTOR;
        if bytes.is_multiple_of(SECTOR) && end <= capacity { Ok(start) } else { Err(Refusal::Failed) }
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        match self.disk.config.access {
            DiskAccess::Writable => Ok(()),
            DiskAccess::ReadOnly => Err(Refusal::Failed),
        }
    }

    /// Without the feature FLUSH the driver takes what is written for safe.
    fn settle(&mut self) -> Result<(), Refusal> {
        if self.has(VIRTIO_BLK_F_FLUSH) { Ok(()) } else { Ok(self.disk.sync()?) }
    }

    /// Moves `length` bytes in pieces that fit into the buffer.
    fn pieces(length: u64) -> Result<impl Iterator<Item = (u64, usize)>, Refusal> {
        if length > MAX_DATA_BYTES {
            return Err(Refusal::Failed);
        }
        let pieces = (0..length).step_by(BUFFER_BYTES as usize);
        Ok(pieces.map(move |at| (at, length.saturating_sub(at).min(BUFFER_BYTES) as usize)))
    }

    /// Carries out a request; tells how many bytes of data it has written.
    fn execute(&mut self, chain: &Chain, ram: &GuestRam, room: u64) -> Result<u64, Refusal> {
        let mut header = [0; HEADER_BYTES as usize];
        chain.readable.read(ram, 0, &mut header)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        let given = chain.readable.length().saturating_sub(HEADER_BYTES);
        match kind {
            VIRTIO_BLK_T_IN => {
                let start = self.range(sector, room)?;
                for (at, length) in Self::pieces(room)? {
                    let part = self.buffer.get_mut(..length).ok_or(Refusal::Failed)?;
                    self.disk.read(part, start.saturating_add(at))?;
                    chain.writable.write(ram, at, part)?;
                }
                Ok(room)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let start = self.range(sector, given)?;
                for (at, length) in Self::pieces(given)? {
                    let part = self.buffer.get_mut(..length).ok_or(Refusal::Failed)?;
                    chain.readable.read(ram, HEADER_BYTES.saturating_add(at), part)?;
                    self.disk.write(part, start.saturating_add(at))?;
                }
                self.settle()?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                if self.disk.config.access == DiskAccess::Writable {
                    self.disk.sync()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; SERIAL_BYTES];
                id.iter_mut().zip(self.disk.config.serial.bytes()).for_each(|(to, byte)| *to = byte);
                let length = room.min(SERIAL_BYTES as u64);
                chain.writable.write(ram, 0, id.get(..length as usize).unwrap_or_default())?;
                Ok(length)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                self.clear(chain, ram, kind, given)?;
                self.settle()?;
                Ok(0)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    fn clear(&mut self, chain: &Chain, ram: &GuestRam, kind: u32, given: u64) -> Result<(), Refusal> {
        let ranges = given / RANGE_BYTES;
        if !given.is_multiple_of(RANGE_BYTES) || ranges == 0 || ranges > u64::from(MAX_RANGES) {
            return Err(Refusal::Failed);
        }
        let discards = kind == VIRTIO_BLK_T_DISCARD;
        let (most, allowed) = if discards { (MAX_DISCARD_SECTORS, 0) } else { (MAX_ZERO_SECTORS, UNMAP) };
        for number in 0..ranges {
            let mut range = [0; RANGE_BYTES as usize];
            let at = HEADER_BYTES.saturating_add(number.saturating_mul(RANGE_BYTES));
            chain.readable.read(ram, at, &mut range)?;
            let [s @ .., n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let (sector, count) = (u64::from_le_bytes(s), u32::from_le_bytes([n0, n1, n2, n3]));
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !allowed != 0 {
                return Err(Refusal::Unsupported);
            }
            let bytes = u64::from(count).saturating_mul(SECTOR);
            let start = self.range(sector, bytes)?;
            if count > most {
                return Err(Refusal::Failed);
            }
            match (discards, flags & UNMAP != 0) {
                (true, _) => self.disk.discard(start, bytes)?,
                (false, true) => self.disk.zero_and_free(start, bytes)?,
                (false, false) => self.disk.zero(start, bytes)?,
            }
        }
        Ok(())
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &'static str {
        "disk"
    }

    fn features(&self) -> u64 {
        let clearing = match self.disk.config.access {
            DiskAccess::Writable => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
            DiskAccess::ReadOnly => 1 << VIRTIO_BLK_F_RO,
        };
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_SEG_MAX | clearing
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    fn config(&self) -> Vec<u8> {
        let mut config = Vec::new();
        config.extend((self.disk.size / SECTOR).to_le_bytes());
        // Segments of any size, no geometry, blocks of a sector, no topology, no cache to choose, one queue.
        let words = [0, MAX_SEGMENTS, 0, SECTOR as u32, 0, 0, 0];
        config.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        let clearing = [MAX_DISCARD_SECTORS, MAX_RANGES, 1, MAX_ZERO_SECTORS, MAX_RANGES, 1];
        config.extend(clearing.iter().flat_map(|word| word.to_le_bytes()));
        config
    }

    fn properties(&self) -> Vec<(String, String)> {
        let config = &self.disk.config;
        vec![
            ("size in bytes".to_owned(), self.disk.size.to_string()),
            ("format".to_owned(), config.format.to_string()),
            ("access".to_owned(), config.access.to_string()),
            ("serial".to_owned(), format!("{:?}", config.serial)),
        ]
    }

    fn set_features(&mut self, features: u64) {
        self.features = features;
    }

    fn handle(&mut self, _: usize, chain: &Chain, ram: &GuestRam) -> Result<u32, Broken> {
        // The status is the last byte that the device writes; where there is none nobody can be told anything.
        let room = chain.writable.length().checked_sub(1).ok_or(Broken)?;
        let (status, data) = match self.execute(chain, ram, room) {
            Ok(data) => (VIRTIO_BLK_S_OK, data),
            Err(Refusal::Failed) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        chain.writable.write(ram, room, &[status as u8])?;
        Ok(u32::try_from(data.saturating_add(1)).unwrap_or(u32::MAX))
    }

    fn pause(&mut self) -> io::Result<()> {
        self.disk.settle()
    }

    fn keep_on(&mut self) {
        self.disk.keep_on();
    }

    fn resume(&mut self) -> io::Result<()> {
        self.disk.acquire()
    }

    fn let_go(&mut self) {
        self.disk.let_go();
    }

    fn claim(&mut self, claim: Claim) -> io::Result<()> {
        self.disk.claim(claim)
    }

    fn claimed(&self) -> Claim {
        self.disk.claimed()
    }

    fn left(&self) -> Option<Left> {
        self.disk.left()
    }

    fn renew(&mut self, left: Option<Left>) -> io::Result<()> {
        self.disk.renew(left)
    }
}
