//! `plain`: the bytes as they are. Takes every page.

/// As many bytes as there are in RAM.
pub(super) fn accepts(length: u32, encoded_length: u32) -> bool {
    encoded_length == length
}
