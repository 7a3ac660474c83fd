//! `plain`: the bytes as they are. Takes every page.

/// Takes any page.
pub(super) fn encode(page: &[u8], encoded: &mut Vec<u8>) -> bool {
    encoded.extend_from_slice(page);
    true
}

/// As many bytes as there are in RAM.
pub(super) fn accepts(length: u32, encoded_length: u32) -> bool {
    encoded_length == length
}
