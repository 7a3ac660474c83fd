//! `zero`: a run of zero bytes. Only its place travels.

/// Whether a page is all zeros.
pub(super) fn is(page: &[u8]) -> bool {
    // Most pages that are not zero show it in their first words; the rest is read 64 bytes at a time, which the
    // compiler turns into vector instructions.
    let (blocks, rest) = page.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// No bytes for any length.
pub(super) fn accepts(_length: u32, encoded_length: u32) -> bool {
    encoded_length == 0
}
