//! What the fuzz targets share: RAM to decode into, and the obvious way to apply a delta.

use std::sync::Arc;

use dunlin::memory::RamBlock;
use vm_memory::MmapRegion;

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Pages of RAM.
pub const PAGES: usize = 18;

/// RAM to decode into.
pub fn ram() -> RamBlock {
    let region = MmapRegion::<()>::new(PAGES * PAGE).expect("memory");
    RamBlock::new("ram", Arc::new(region)).expect("a block")
}

/// All that RAM holds.
pub fn contents(ram: &RamBlock) -> Vec<u8> {
    let mut bytes = vec![0; PAGES * PAGE];
    ram.read(0, &mut bytes).expect("all of it");
    bytes
}

/// Applies a delta byte by byte, from its description in `docs/wire-format.md`; nothing if it is none.
pub fn apply_slowly(old: &[u8], encoded: &[u8]) -> Option<Vec<u8>> {
    let mut page = old.to_vec();
    let mut input = encoded.iter().copied();
    let mut at = 0;
    while let Some(first) = input.next() {
        at += length(first, &mut input)?;
        let second = input.next()?;
        let changed = length(second, &mut input)?;
        if changed == 0 {
            return None;
        }
        for _ in 0..changed {
            *page.get_mut(at)? = input.next()?;
            at += 1;
        }
    }
    Some(page)
}

/// LEB128 of at most two bytes.
fn length(first: u8, input: &mut dyn Iterator<Item = u8>) -> Option<usize> {
    if first & 0x80 == 0 {
        return Some(usize::from(first));
    }
    let second = input.next()?;
    (second & 0x80 == 0).then(|| usize::from(first & 0x7f) + 128 * usize::from(second))
}
