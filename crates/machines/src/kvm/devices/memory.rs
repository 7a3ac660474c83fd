//! Guest RAM as devices see it: what they write they mark.
//!
//! Relies on vm-memory marking a range after it has written it. What must stay true: no device writes guest RAM in another
//! way, because neither KVM nor the engine would see it.

use std::ops::Deref;
use std::sync::Arc;

use dunlin::memory::{DirtyBitmap, PAGE_SIZE};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// The pages that devices have written, a bitmap for each block of RAM.
pub(in crate::kvm) type OwnWrites = Arc<[DirtyBitmap]>;

/// A part of a block, from some offset on, whose written pages are marked.
#[derive(Debug, Clone)]
pub(super) struct Written {
    all: OwnWrites,
    block: usize,
    offset: usize,
}

impl WithBitmapSlice<'_> for Written {
    type S = Self;
}

impl BitmapSlice for Written {}

impl Bitmap for Written {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let page = PAGE_SIZE as usize;
        let first = self.offset.saturating_add(offset);
        if let Some(bitmap) = self.all.get(self.block)
            && len > 0
        {
            bitmap.set(first / page..first.saturating_add(len).div_ceil(page));
        }
    }

    fn dirty_at(&self, _: usize) -> bool {
        // Nobody asks devices: the engine reads the bitmaps.
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { all: self.all.clone(), block: self.block, offset: self.offset.saturating_add(offset) }
    }
}

#[derive(Debug)]
struct Parts {
    /// The same memory as the owner's, mapped by it.
    view: GuestMemoryMmap<Written>,
    _owner: GuestMemoryMmap,
}

/// Guest RAM for devices.
#[derive(Debug, Clone)]
pub(super) struct GuestRam(Arc<Parts>);

impl GuestRam {
    /// A view of `memory`, whose regions are the blocks of RAM in their order, that marks in `writes`.
    pub(super) fn new(memory: &GuestMemoryMmap, writes: &OwnWrites) -> std::io::Result<Self> {
        let mut regions = Vec::new();
        for (block, region) in memory.iter().enumerate() {
            let written = Written { all: writes.clone(), block, offset: 0 };
            let length = usize::try_from(region.len()).map_err(std::io::Error::other)?;
            let builder = MmapRegionBuilder::new_with_bitmap(length, written)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED);
            // SAFETY: the owner, which is kept beside the view, has the region mapped readable and writable, so long.
            let mapping = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) }.build();
            let region = GuestRegionMmap::new(mapping.map_err(std::io::Error::other)?, region.start_addr());
            regions.push(Arc::new(region.ok_or_else(|| std::io::Error::other("it does not fit into addresses"))?));
        }
        let view = GuestMemoryMmap::from_arc_regions(regions).map_err(std::io::Error::other)?;
        Ok(Self(Arc::new(Parts { view, _owner: memory.clone() })))
    }
}

impl Deref for GuestRam {
    type Target = GuestMemoryMmap<Written>;

    fn deref(&self) -> &Self::Target {
        &self.0.view
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn what_is_written_is_marked_in_its_block() {
        let regions = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let writes: OwnWrites = [DirtyBitmap::new(1 << 20), DirtyBitmap::new(1 << 20)].into();
        let ram = GuestRam::new(&memory, &writes).unwrap();
        let pages = |block: usize| {
            let mut pages = Vec::new();
            writes[block].drain(|run| pages.extend(run));
            pages
        };
        ram.write_slice(&[1; 2], GuestAddress(0x4fff)).unwrap();
        assert_eq!((pages(0), pages(1)), (vec![4, 5], vec![]));
        ram.write_obj(7u64, GuestAddress((4 << 30) + 0x8000)).unwrap();
        ram.store(7u16, GuestAddress((4 << 30) + 0x9002), std::sync::atomic::Ordering::Release).unwrap();
        assert_eq!((pages(0), pages(1)), (vec![], vec![8, 9]));
        let mut read = [0; 2];
        ram.read_slice(&mut read, GuestAddress(0x4fff)).unwrap();
        assert_eq!(read, [1; 2]);
        drop(memory);
        assert_eq!(ram.read_obj::<u64>(GuestAddress((4 << 30) + 0x8000)).unwrap(), 7);
        assert_eq!((pages(0), pages(1)), (vec![], vec![]));
    }
}
