//! `lz4`: an LZ4 block without a length before it. Quick, for links that are a little too slow.

use super::{DecodeError, MAX_UNIT_BYTES};

/// Appends the compressed `pages` to `encoded`, if that takes at most `limit` bytes.
pub(super) fn encode(pages: &[u8], limit: usize, encoded: &mut Vec<u8>) -> bool {
    let begin = encoded.len();
    let room = lz4_flex::block::get_maximum_output_size(pages.len());
    encoded.resize(begin + room, 0);
    let compressed = lz4_flex::block::compress_into(pages, encoded.get_mut(begin..).unwrap_or_default());
    let length = compressed.ok().filter(|length| *length <= limit);
    encoded.truncate(begin + length.unwrap_or(0));
    length.is_some()
}

/// Decompresses into all of `pages`.
///
/// # Errors
/// [`DecodeError::Lz4`] for anything that is not a block of just that length.
pub(super) fn decode(encoded: &[u8], pages: &mut [u8]) -> Result<(), DecodeError> {
    match lz4_flex::block::decompress_into(encoded, pages) {
        Ok(length) if length == pages.len() => Ok(()),
        _ => Err(DecodeError::Lz4),
    }
}

/// Shorter than plain, and no longer than a decoder's buffer.
pub(super) fn accepts(length: u32, encoded_length: u32) -> bool {
    length as usize <= MAX_UNIT_BYTES && (1..length).contains(&encoded_length)
}
