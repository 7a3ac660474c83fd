//! `zstd`: a Zstandard frame. Shorter than LZ4 and slower, for slow links.

use super::{DecodeError, MAX_UNIT_BYTES};

/// A channel's compressor.
pub(super) struct Encoder {
    compressor: zstd::bulk::Compressor<'static>,
    level: i32,
}

impl Encoder {
    /// # Errors
    /// When the library has no memory for it.
    pub(super) fn new(level: i32) -> std::io::Result<Self> {
        Ok(Self { compressor: zstd::bulk::Compressor::new(level)?, level })
    }

    /// Appends the compressed `pages` to `encoded`, if that takes at most `limit` bytes. The level is negative for speed.
    pub(super) fn encode(&mut self, level: i32, pages: &[u8], limit: usize, encoded: &mut Vec<u8>) -> bool {
        if level != self.level {
            if self.compressor.set_compression_level(level).is_err() {
                return false;
            }
            self.level = level;
        }
        let begin = encoded.len();
        // The compressor gives up when the room does not do.
        encoded.resize(begin + limit, 0);
        let compressed = self.compressor.compress_to_buffer(pages, encoded.get_mut(begin..).unwrap_or_default());
        encoded.truncate(begin + compressed.as_ref().map_or(0, |length| *length));
        compressed.is_ok()
    }
}

/// A channel's decompressor.
pub(super) struct Decoder(zstd::bulk::Decompressor<'static>);

impl Decoder {
    /// # Errors
    /// When the library has no memory for it.
    pub(super) fn new() -> std::io::Result<Self> {
        zstd::bulk::Decompressor::new().map(Self)
    }

    /// Decompresses into all of `pages`.
    ///
    /// # Errors
    /// [`DecodeError::Zstd`] for anything that is not a frame of just that length.
    pub(super) fn decode(&mut self, encoded: &[u8], pages: &mut [u8]) -> Result<(), DecodeError> {
        let wanted = pages.len();
        match self.0.decompress_to_buffer(encoded, pages) {
            Ok(length) if length == wanted => Ok(()),
            _ => Err(DecodeError::Zstd),
        }
    }
}

/// Shorter than plain, and no longer than a decoder's buffer.
pub(super) fn accepts(length: u32, encoded_length: u32) -> bool {
    length as usize <= MAX_UNIT_BYTES && (1..length).contains(&encoded_length)
}
