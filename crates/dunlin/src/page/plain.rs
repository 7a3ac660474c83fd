//! `plain`: the bytes as they are. Takes every page.

/// Takes any pages.
pub(super) fn encode(pages: &[u8], encoded: &mut Vec<u8>) {
    encoded.extend_from_slice(pages);
}

/// As many bytes as there are in RAM.
pub(super) fn accepts(length: u32, encoded_length: u32) -> bool {
    encoded_length == length
}
