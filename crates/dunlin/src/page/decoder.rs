//! Decoding runs into guest RAM: a channel's decompressors and their buffer.

use super::{DecodeError, MAX_UNIT_BYTES, PageKind, delta, lz4, zstd};
use crate::memory::{MemoryError, RamBlock};

/// What can go wrong when a run is put into its place.
#[derive(Debug)]
pub(crate) enum PlaceError {
    Decode(DecodeError),
    Memory(MemoryError),
}

impl From<DecodeError> for PlaceError {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error)
    }
}

impl From<MemoryError> for PlaceError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

/// A channel's decoders. What a kind needs is made when its first page comes.
#[derive(Default)]
pub(crate) struct Decoder {
    zstd: Option<zstd::Decoder>,
    pages: Vec<u8>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Decoder {
    /// Puts the `length` bytes of RAM at `offset` of `block` that `encoded` stands for into their place.
    ///
    /// # Errors
    /// When `encoded` is nothing an encoder of that kind makes, or the run reaches outside the block.
    pub(crate) fn decode(
        &mut self,
        kind: PageKind,
        encoded: &[u8],
        block: &RamBlock,
        offset: u64,
        length: usize,
    ) -> Result<(), PlaceError> {
        match kind {
            PageKind::Delta => {
                return delta::decode(encoded, |at, bytes| Ok(block.write(offset.saturating_add(at as u64), bytes)?));
            }
            PageKind::Zero => return Ok(block.zero(offset..offset.saturating_add(length as u64))?),
            PageKind::Plain => return Ok(block.write(offset, encoded)?),
            PageKind::Lz4 | PageKind::Zstd => {}
        }
        self.pages.resize(length.min(MAX_UNIT_BYTES), 0);
        match (kind, &mut self.zstd) {
            (PageKind::Lz4, _) => lz4::decode(encoded, &mut self.pages)?,
            (_, Some(decoder)) => decoder.decode(encoded, &mut self.pages)?,
            (_, none) => {
                let decoder = none.insert(zstd::Decoder::new().map_err(|_| DecodeError::Zstd)?);
                decoder.decode(encoded, &mut self.pages)?;
            }
        }
        Ok(block.write(offset, &self.pages)?)
    }
}
