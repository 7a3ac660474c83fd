//! RAM blocks: named pieces of guest RAM, mapped into this process by the VMM.
//!
//! Relies on the VMM keeping a mapping alive as long as anyone holds it (an `Arc`). What must stay true: every
//! access is checked against the block's size before a pointer is made, so that no offset from a peer can reach
//! outside guest RAM.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::Advice;
use vm_memory::bitmap::Bitmap;

use super::file::RamFile;
use super::mapping::{RamKind, RamMapping};
use super::{PAGE_SIZE, holes};

/// What can go wrong with guest RAM in this process.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A block's size is zero or not a multiple of the page size.
    #[error("RAM block {block}: its size of {size_bytes} bytes is not a positive multiple of {PAGE_SIZE}")]
    Size {
        /// The block's name.
        block: String,
        /// What was asked for.
        size_bytes: u64,
    },
    /// The name is empty, longer than 255 bytes, or taken.
    #[error("RAM block name {block:?} is empty, longer than 255 bytes, or used twice")]
    Name {
        /// The name.
        block: String,
    },
    /// More blocks than the wire format numbers.
    #[error("{blocks} RAM blocks are more than the {limit} that can be migrated")]
    TooManyBlocks {
        /// Blocks given.
        blocks: usize,
        /// Blocks allowed.
        limit: usize,
    },
    /// An access outside the block.
    #[error("RAM block {block}: {length} bytes at offset {offset} reach past its end")]
    OutOfRange {
        /// The block's name.
        block: String,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// The mapping is not both readable and writable.
    #[error(
        "RAM block {block}: its mapping is not readable and writable; map guest RAM with PROT_READ | PROT_WRITE, and leave \
         read-only regions (ROM) out of the machine's RAM"
    )]
    Access {
        /// The block's name.
        block: String,
    },
    /// The kernel refused.
    #[error("RAM block {block}: could not {doing}: {source}")]
    Kernel {
        /// The block's name.
        block: String,
        /// What was asked of the kernel.
        doing: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// A named piece of guest RAM. Both sides of a migration have the same blocks, by name and size.
#[derive(Clone)]
pub struct RamBlock {
    name: String,
    mapping: Arc<dyn RamMapping>,
    address: NonNull<u8>,
    size_bytes: u64,
    host_page_size: u64,
    shared: bool,
    pinned: bool,
    file: Option<Arc<RamFile>>,
}

// SAFETY: the pointer is derived from `mapping`, which is Send + Sync and keeps the memory mapped.
unsafe impl Send for RamBlock {}
// SAFETY: as above; all access goes through raw copies and system calls that tolerate concurrent guest writes.
unsafe impl Sync for RamBlock {}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("name", &self.name)
            .field("size_bytes", &self.size_bytes)
            .field("host_page_size", &self.host_page_size)
            .finish_non_exhaustive()
    }
}

impl RamBlock {
    /// A block called `name` over the whole of `mapping`.
    ///
    /// # Errors
    /// [`MemoryError::Size`], [`MemoryError::Name`] or [`MemoryError::Access`].
    pub fn new(name: impl Into<String>, mapping: Arc<dyn RamMapping>) -> Result<Self, MemoryError> {
        let name = name.into();
        if name.is_empty() || name.len() > 255 {
            return Err(MemoryError::Name { block: name });
        }
        let size_bytes = mapping.size_bytes();
        if size_bytes == 0 || !size_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size { block: name, size_bytes });
        }
        if !mapping.is_accessible() {
            return Err(MemoryError::Access { block: name });
        }
        let address = mapping.host_address();
        let (host_page_size, file) = match mapping.kind() {
            RamKind::SharedFile { file, offset } => (
                holes::huge_page_bytes(file).unwrap_or(PAGE_SIZE),
                RamFile::open(file, offset, size_bytes).map(Arc::new),
            ),
            _ => (PAGE_SIZE, None),
        };
        let shared = matches!(mapping.kind(), RamKind::SharedFile { .. } | RamKind::SharedAnonymous);
        Ok(Self { name, mapping, address, size_bytes, host_page_size, shared, pinned: false, file })
    }

    /// Forbids giving the block's pages back to the host.
    ///
    /// Needed where a device holds on to the pages themselves, as VFIO does for DMA: a page that was given back and touched
    /// again is another one, and the device goes on with the old one. A destination then writes zeros instead, which takes
    /// time and keeps the memory allocated.
    #[must_use]
    pub fn pinned(mut self) -> Self {
        self.pinned = true;
        self
    }

    /// Says that the block is backed by pages of `bytes`, for mappings whose file does not tell (anonymous huge
    /// pages). Must be a power of two of at least 4096.
    #[must_use]
    pub fn with_host_page_size(mut self, bytes: u64) -> Self {
        if bytes.is_power_of_two() && bytes >= PAGE_SIZE {
            self.host_page_size = bytes;
        }
        self
    }

    /// Asks the kernel to back the block with transparent huge pages where it can: for anonymous memory, and for a memfd
    /// where `/sys/kernel/mm/transparent_hugepage/shmem_enabled` lets it.
    ///
    /// # Errors
    /// [`MemoryError::Kernel`] where the kernel has none.
    pub fn with_transparent_huge_pages(self) -> Result<Self, MemoryError> {
        self.advise(
            0..self.size_bytes,
            Advice::LinuxHugepage,
            "ask for transparent huge pages (madvise MADV_HUGEPAGE)",
        )?;
        Ok(self)
    }

    /// The name both sides know the block by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes, a multiple of 4096.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Size of the host's pages behind the block: 4096, or 2 MiB or 1 GiB on hugetlbfs.
    pub fn host_page_size(&self) -> u64 {
        self.host_page_size
    }

    /// Addresses of the block in this process, for the kernel interfaces that take them.
    pub(super) fn host_range(&self) -> Range<u64> {
        let start = self.address.as_ptr() as u64;
        start..start.saturating_add(self.size_bytes)
    }

    fn pointer(&self, offset: u64, length: u64) -> Result<*mut u8, MemoryError> {
        match offset.checked_add(length) {
            // SAFETY: offset + length lies within the mapping, which `self.mapping` keeps alive.
            Some(end) if end <= self.size_bytes => Ok(unsafe { self.address.as_ptr().add(offset as usize) }),
            _ => Err(MemoryError::OutOfRange { block: self.name.clone(), offset, length }),
        }
    }

    /// Copies guest RAM from `offset` on into `buffer`.
    ///
    /// The guest may be writing meanwhile, as with vm-memory's accesses: the copy may then hold some of the old bytes and some
    /// of the new ones. A page torn by that is dirty again and travels again. Has the host allocate a page that it has not
    /// allocated yet; [`peek`](Self::peek) does not.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.pointer(offset, buffer.len() as u64)?;
        // SAFETY: `pointer` checked the range; `buffer` is ours and cannot overlap guest RAM, which no safe
        // reference ever points into. Concurrent guest writes give mixed bytes, which the caller allows for.
        unsafe { std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), buffer.len()) };
        Ok(())
    }

    /// As [`read`](Self::read), but leaves holes as they are: a page that the host has not allocated is not allocated by being
    /// read, and reads as zeros.
    ///
    /// Slower than [`read`](Self::read), by a system call. Not every hole can be told: in shared anonymous memory none can on a
    /// host with swap, and reading a private mapping of a file brings the file's pages into the host's page cache.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], and [`MemoryError::Kernel`] where the file behind the block has become shorter.
    pub fn peek(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        let length = buffer.len() as u64;
        self.pointer(offset, length)?;
        if let Some(file) = &self.file {
            match file.read(offset, buffer) {
                // A file system whose files cannot be read: what is left is to read the memory.
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {}
                other => {
                    let doing = "read the file behind it";
                    return other.map_err(|source| MemoryError::Kernel { block: self.name.clone(), doing, source });
                }
            }
        }
        if !self.shared {
            return self.read(offset, buffer);
        }
        let mut parts = Vec::new();
        let end = offset.saturating_add(length).next_multiple_of(PAGE_SIZE).min(self.size_bytes);
        self.data_in(offset / PAGE_SIZE * PAGE_SIZE..end, &mut parts);
        buffer.fill(0);
        for part in parts {
            let (start, end) = (part.start.max(offset), part.end.min(offset.saturating_add(length)));
            let within = start.saturating_sub(offset) as usize..end.saturating_sub(offset) as usize;
            if let Some(piece) = buffer.get_mut(within) {
                self.read(start, piece)?;
            }
        }
        Ok(())
    }

    /// Whether `range` (bytes, whole pages) is all zeros, looked at where it is. The guest may be writing meanwhile, as
    /// for [`read`](Self::read).
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub(crate) fn is_zero(&self, range: Range<u64>) -> Result<bool, MemoryError> {
        /// 256 bytes, looked at as one.
        type Piece = [u64; 32];
        let length = range.end.saturating_sub(range.start);
        let from = self.pointer(range.start, length)?.cast::<Piece>();
        let pieces = length as usize / size_of::<Piece>();
        // SAFETY: `pointer` checked the range, and all pieces lie in it. They are copied out, as in `read`.
        Ok((0..pieces)
            .all(|piece| unsafe { from.add(piece).read_unaligned() }.iter().fold(0, |all, word| all | word) == 0))
    }

    /// Copies `data` into guest RAM at `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let to = self.pointer(offset, data.len() as u64)?;
        // SAFETY: as in `read`, the other way.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }

    /// Zeroes `range` (bytes).
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn zero(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let length = range.end.saturating_sub(range.start);
        let to = self.pointer(range.start, length)?;
        // SAFETY: `pointer` checked the range.
        unsafe { std::ptr::write_bytes(to, 0, length as usize) };
        Ok(())
    }

    /// Guest RAM for a system call to read or to fill.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub(crate) fn io_slice(&self, offset: u64, length: usize) -> Result<GuestSlice<'_>, MemoryError> {
        let pointer = self.pointer(offset, length as u64)?;
        Ok(GuestSlice { pointer, length, offset, block: self })
    }

    /// Makes the pages of `range` (bytes, page-aligned) present and writable in one call. Touching them one by
    /// one costs several times as much.
    ///
    /// # Errors
    /// [`MemoryError::Kernel`]; kernels before 5.14 do not have it.
    pub fn populate(&self, range: Range<u64>) -> Result<(), MemoryError> {
        self.advise(range, Advice::LinuxPopulateWrite, "populate pages (madvise MADV_POPULATE_WRITE)")
    }

    /// Gives every page of the block back to the host, so that it reads as zeros and costs no memory. The parts that may
    /// still hold what was there go to `left`, in order: all of the block where its pages cannot be given back.
    ///
    /// What gives a page back depends on how it is mapped. `MADV_DONTNEED` drops the pages of a private mapping only: in a
    /// shared one they stay, and in a private mapping of a file the file's contents come back. `MADV_REMOVE` makes a hole in
    /// the memory behind a shared mapping, and fails for private ones.
    pub(crate) fn discard(&self, left: &mut Vec<Range<u64>>) {
        left.clear();
        let all = 0..self.size_bytes;
        let advice = match self.mapping.kind() {
            _ if self.pinned => None,
            RamKind::PrivateAnonymous => Some(Advice::LinuxDontNeed),
            RamKind::SharedAnonymous | RamKind::SharedFile { .. } => Some(Advice::LinuxRemove),
            RamKind::PrivateFile | RamKind::Unknown => None,
        };
        let given =
            advice.is_some_and(|advice| self.advise(all.clone(), advice, "give its pages back (madvise)").is_ok());
        if given { self.present_in(all, left) } else { left.push(all) }
    }

    /// The parts of `range` (bytes, page-aligned) that are in the host's memory, in order; all of it where the kernel does
    /// not say. Of a block that was [discarded](Self::discard), all else is zero.
    pub(crate) fn present_in(&self, range: Range<u64>, parts: &mut Vec<Range<u64>>) {
        /// One piece's answer takes 64 KiB.
        const PIECE: u64 = 256 << 20;
        parts.clear();
        let mut at = match self.file.as_ref().filter(|file| file.knows_holes()) {
            Some(file) => file.data_from(range.start).map_or(range.end, |data| data / PAGE_SIZE * PAGE_SIZE),
            None => range.start,
        };
        while at < range.end {
            let end = at.saturating_add(PIECE).min(range.end);
            match self.pointer(at, end.saturating_sub(at)).ok().and_then(|pointer| holes::resident(pointer, end - at)) {
                Some(resident) => {
                    let pages = (at..end).step_by(holes::page_bytes() as usize).zip(resident);
                    for (start, _) in pages.filter(|(_, resident)| *resident) {
                        holes::join(parts, start..start.saturating_add(holes::page_bytes()).min(end));
                    }
                }
                None => holes::join(parts, at..end),
            }
            at = end;
        }
    }

    fn advise(&self, range: Range<u64>, advice: Advice, doing: &'static str) -> Result<(), MemoryError> {
        let length = range.end.saturating_sub(range.start);
        let pointer = self.pointer(range.start, length)?;
        loop {
            // SAFETY: the range lies in the mapping; the callers use advice that drops contents only before a
            // migration fills the block anew.
            match unsafe { rustix::mm::madvise(pointer.cast(), length as usize, advice) } {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(MemoryError::Kernel { block: self.name.clone(), doing, source: e.into() }),
            }
        }
    }

    /// The parts of `range` (bytes, page-aligned) that may hold anything but zeros go to `parts`, in order: for shared memory
    /// what is not a hole, for private memory everything. Reading a hole of shared memory has the host allocate it.
    ///
    /// Asks for no more than the range: the kernel's search for the end of a file's data holds the processor for as
    /// long as there is data, 30 ms a GiB.
    pub(crate) fn data_in(&self, range: Range<u64>, parts: &mut Vec<Range<u64>>) {
        parts.clear();
        if !self.shared {
            return holes::join(parts, range);
        }
        let seeking = self.file.as_ref().filter(|file| file.knows_holes());
        let start = match seeking {
            Some(file) => file.data_from(range.start).unwrap_or(range.end),
            None => range.start,
        };
        if start >= range.end {
            return;
        }
        let page = holes::page_bytes();
        let start = start / page * page;
        // Without swap, a page that is not in the host's memory is a hole. Asked before and after, so that no page can have
        // been swapped out while the kernel looked.
        let without_swap = self.file.is_none() && holes::without_swap();
        let resident =
            self.pointer(start, range.end - start).ok().and_then(|at| holes::resident(at, range.end - start));
        let without_swap = without_swap && resident.is_some() && holes::without_swap();
        let resident = resident.unwrap_or_else(|| vec![false; (range.end - start).div_ceil(page) as usize]);
        let mut pages = (start..range.end).step_by(page as usize).zip(resident).peekable();
        while let Some((at, is_resident)) = pages.next() {
            let mut end = at.saturating_add(page).min(range.end);
            while let Some((next, _)) = pages.next_if(|(_, next)| *next == is_resident) {
                end = next.saturating_add(page).min(range.end);
            }
            let at = at.max(range.start);
            match (&self.file, seeking) {
                _ if is_resident => holes::join(parts, at..end),
                // Each is a hole, or swapped out and data, or not mapped yet and data.
                (_, Some(file)) => file.seek_data_in(at..end, parts),
                (Some(file), _) => file.find_data_in(at..end, parts),
                (None, _) if without_swap => {}
                (None, _) => holes::join(parts, at..end),
            }
        }
    }
}

/// A checked range of guest RAM, for a system call to read, or to fill while no vCPU runs.
#[derive(Debug)]
pub(crate) struct GuestSlice<'a> {
    pointer: *mut u8,
    length: usize,
    offset: u64,
    block: &'a RamBlock,
}

impl GuestSlice<'_> {
    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.pointer
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The file behind it and the place there, where a file's pages can go into a socket: those of hugetlbfs cannot.
    pub(crate) fn file(&self) -> Option<(&File, u64)> {
        let file = self.block.file.as_deref().filter(|_| self.block.host_page_size == PAGE_SIZE)?;
        Some(file.place(self.offset))
    }

    /// Copies the bytes from `at` on into `buffer`. The guest may be writing meanwhile, as for [`RamBlock::read`].
    pub(crate) fn read(&self, at: usize, buffer: &mut [u8]) -> Result<(), MemoryError> {
        self.block.read(self.offset.saturating_add(at as u64), buffer)
    }

    /// Copies the bytes out, as much as `buffer` holds at a time, and gives each piece to `each`. They are not lent where they
    /// are: that nobody writes to guest RAM meanwhile is for the VMM to keep, and no promise of the type system.
    pub(crate) fn copy_out(&self, buffer: &mut [u8], mut each: impl FnMut(&[u8])) -> Result<(), MemoryError> {
        let step = buffer.len().max(1);
        for at in (0..self.length).step_by(step) {
            let length = self.length.saturating_sub(at).min(step);
            if let Some(piece) = buffer.get_mut(..length) {
                self.read(at, piece)?;
                each(piece);
            }
        }
        Ok(())
    }
}

/// All RAM of a machine.
#[derive(Debug, Clone, Default)]
pub struct Ram {
    blocks: Vec<RamBlock>,
}

impl Ram {
    /// Blocks that a machine may have.
    pub const MAX_BLOCKS: usize = 4096;

    /// RAM made of `blocks`, whose names must differ.
    ///
    /// # Errors
    /// [`MemoryError::Name`] or [`MemoryError::TooManyBlocks`].
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, MemoryError> {
        if blocks.len() > Self::MAX_BLOCKS {
            return Err(MemoryError::TooManyBlocks { blocks: blocks.len(), limit: Self::MAX_BLOCKS });
        }
        let mut names: Vec<&str> = blocks.iter().map(RamBlock::name).collect();
        names.sort_unstable();
        for pair in names.windows(2) {
            if let [a, b] = pair
                && a == b
            {
                return Err(MemoryError::Name { block: (*a).to_owned() });
            }
        }
        Ok(Self { blocks })
    }

    /// One block a region of a vm-memory guest memory, named `ram@` and its guest address in hexadecimal.
    ///
    /// # Errors
    /// As [`RamBlock::new`] and [`Ram::new`].
    pub fn from_guest_memory<B>(memory: &vm_memory::GuestMemoryMmap<B>) -> Result<Self, MemoryError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
        let blocks = memory
            .iter()
            .map(|region| RamBlock::new(format!("ram@{:x}", region.start_addr().raw_value()), region.get_mmap()))
            .collect::<Result<_, _>>()?;
        Self::new(blocks)
    }

    /// All blocks [pinned](RamBlock::pinned).
    #[must_use]
    pub fn pinned(self) -> Self {
        Self { blocks: self.blocks.into_iter().map(RamBlock::pinned).collect() }
    }

    /// The blocks, in the machine's order.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Bytes in all blocks together.
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(RamBlock::size_bytes).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
