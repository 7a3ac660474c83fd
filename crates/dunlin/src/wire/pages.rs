//! The table of a Pages frame: which byte ranges of which blocks it carries, and as what kind.

use super::WireError;
use super::codec::{Reader, Writer};
use crate::page::PageKind;

/// Size of an entry.
pub(crate) const ENTRY_BYTES: usize = 20;
/// Entries that a frame may have.
pub(crate) const MAX_ENTRIES: usize = 2048;

/// Bytes of encodings that a frame may have: a whole chunk of plain pages.
pub(crate) const MAX_PAGES_BYTES: u32 = 2 << 20;

/// A run of contiguous guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRun {
    /// The block's number, in the order of the Start message.
    pub(crate) block: u16,
    pub(crate) kind: PageKind,
    /// First byte in the block.
    pub(crate) offset: u64,
    /// Bytes of guest RAM.
    pub(crate) length: u32,
    /// Bytes in the frame's data.
    pub(crate) encoded_length: u32,
}

/// Appends the entry of `run` to a frame's table.
pub(crate) fn encode_run(table: &mut Vec<u8>, run: &PageRun) {
    let mut writer = Writer(std::mem::take(table));
    writer.u64(run.offset);
    writer.u32(run.length);
    writer.u32(run.encoded_length);
    writer.u16(run.block);
    writer.u8(run.kind.number());
    writer.u8(0);
    *table = writer.0;
}

/// Decodes a table into `runs`. `block_bytes` gives the sizes of this machine's blocks: no run reaches outside them.
/// Each lies behind the one before, so no frame is about more than all of RAM. The encoded lengths must add up to
/// `data_length`.
pub(crate) fn decode_runs(
    table: &[u8],
    data_length: u32,
    block_bytes: &[u64],
    runs: &mut Vec<PageRun>,
) -> Result<(), WireError> {
    runs.clear();
    let (entries, rest) = table.as_chunks::<ENTRY_BYTES>();
    if !rest.is_empty() {
        return Err(WireError::Length { what: "a frame's table" });
    }
    let mut encoded_total = 0u64;
    let mut behind = (0, 0);
    for entry in entries {
        let mut reader = Reader::new(entry, "an entry of a frame's table");
        let (offset, length, encoded_length) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let (block, kind, reserved) = (reader.u16()?, reader.u8()?, reader.u8()?);
        reader.reserved(u64::from(reserved))?;
        let kind =
            PageKind::from_number(kind).ok_or(WireError::Value { what: "a page's kind", value: u64::from(kind) })?;
        let end = offset.checked_add(u64::from(length));
        let size = block_bytes.get(usize::from(block)).copied().unwrap_or(0);
        let aligned = offset % crate::memory::PAGE_SIZE == 0 && u64::from(length) % crate::memory::PAGE_SIZE == 0;
        if length == 0 || !aligned || end.is_none_or(|end| end > size) {
            return Err(WireError::OutsideRam { block, offset, length });
        }
        if (block, offset) < behind {
            return Err(WireError::Order { block, offset });
        }
        behind = (block, offset.saturating_add(u64::from(length)));
        if !kind.accepts(length, encoded_length) {
            return Err(WireError::Length { what: "an encoded page" });
        }
        encoded_total = encoded_total.saturating_add(u64::from(encoded_length));
        runs.push(PageRun { block, kind, offset, length, encoded_length });
    }
    if encoded_total == u64::from(data_length) { Ok(()) } else { Err(WireError::Length { what: "a frame's data" }) }
}
