//! RAM blocks: named pieces of guest RAM, mapped into this process by the VMM.
//!
//! Relies on the VMM keeping a mapping alive as long as anyone holds it (an `Arc`). What must stay true: every
//! access is checked against the block's size before a pointer is made, so that no offset from a peer can reach
//! outside guest RAM.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::Advice;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestRegionMmap, MmapRegion};

use super::PAGE_SIZE;

/// Guest RAM mapped into this process.
///
/// Implemented for vm-memory's mappings; a VMM with memory of its own kind implements it itself.
///
/// # Safety
/// For as long as the value lives, `[host_address, host_address + size_bytes)` must stay mapped readable and
/// writable. `file`, where given, must be what is mapped there, shared, from the offset on.
pub unsafe trait RamMapping: Send + Sync {
    /// Where the mapping starts in this process.
    fn host_address(&self) -> NonNull<u8>;
    /// Its length in bytes.
    fn size_bytes(&self) -> u64;
    /// The file behind a shared mapping and the offset of its first byte.
    fn file(&self) -> Option<(BorrowedFd<'_>, u64)>;
}

// SAFETY: an `MmapRegion` unmaps only when dropped, and is mapped as long as it lives.
unsafe impl<B: Bitmap + Send + Sync> RamMapping for MmapRegion<B> {
    fn host_address(&self) -> NonNull<u8> {
        NonNull::new(self.as_ptr()).unwrap_or(NonNull::dangling())
    }

    fn size_bytes(&self) -> u64 {
        self.size() as u64
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        let offset = self.file_offset()?;
        (self.flags() & libc::MAP_SHARED != 0).then(|| (offset.file().as_fd(), offset.start()))
    }
}

// SAFETY: a `GuestRegionMmap` holds its `MmapRegion`.
unsafe impl<B: Bitmap + Send + Sync> RamMapping for GuestRegionMmap<B> {
    fn host_address(&self) -> NonNull<u8> {
        RamMapping::host_address(&**self)
    }

    fn size_bytes(&self) -> u64 {
        RamMapping::size_bytes(&**self)
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        RamMapping::file(&**self)
    }
}

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
    /// Our own open file of the memfd, so that asking it for holes does not move the VMM's file position.
    file: Option<Arc<(File, u64)>>,
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
    /// [`MemoryError::Size`] or [`MemoryError::Name`].
    pub fn new(name: impl Into<String>, mapping: Arc<dyn RamMapping>) -> Result<Self, MemoryError> {
        let name = name.into();
        if name.is_empty() || name.len() > 255 {
            return Err(MemoryError::Name { block: name });
        }
        let size_bytes = mapping.size_bytes();
        if size_bytes == 0 || !size_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size { block: name, size_bytes });
        }
        let address = mapping.host_address();
        let host_page_size = mapping.file().map_or(PAGE_SIZE, |(fd, _)| host_page_size(fd));
        let file = mapping.file().and_then(|(fd, offset)| Some(Arc::new((reopen(fd)?, offset))));
        Ok(Self { name, mapping, address, size_bytes, host_page_size, file })
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

    /// Copies guest RAM from `offset` on into `buffer`. The guest may be writing meanwhile; a page torn by that
    /// is dirty again and travels again.
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

    /// Gives every page of the block back to the host: afterwards it reads as zeros and costs no memory.
    ///
    /// # Errors
    /// [`MemoryError::Kernel`] where the mapping cannot do it.
    pub(crate) fn discard(&self) -> Result<(), MemoryError> {
        let advice = if self.mapping.file().is_some() { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        self.advise(0..self.size_bytes, advice, "give its pages back (madvise)")
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

    /// The parts of `range` (bytes, page-aligned) that may hold anything but zeros go to `parts`, in order: for a memfd
    /// what is not a hole, for other memory everything.
    ///
    /// Asks for no more than the range: the kernel's search for the end of a file's data holds the processor for as
    /// long as there is data, 30 ms a GiB.
    pub(crate) fn data_in(&self, range: Range<u64>, parts: &mut Vec<Range<u64>>) {
        parts.clear();
        let first = self.seek_data(range.start).unwrap_or(range.end);
        if first >= range.end {
            return;
        }
        let mut add = |part: Range<u64>| match parts.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => parts.push(part),
        };
        let page = rustix::param::page_size() as u64;
        let start = first / page * page;
        let Some(resident) = self.resident(start..range.end) else { return add(start.max(range.start)..range.end) };
        // A page that is not resident is a hole, or swapped out and data.
        let mut known_hole = start;
        for (at, resident) in (start..range.end).step_by(page as usize).zip(resident) {
            let end = at.saturating_add(page).min(range.end);
            if !resident && end > known_hole {
                known_hole = self.seek_data(at).unwrap_or(range.end);
            }
            if resident || known_hole < end {
                add(at.max(range.start)..end);
            }
        }
    }

    /// The first byte at or after `from` that is not in a hole; `None` when only holes follow.
    fn seek_data(&self, from: u64) -> Option<u64> {
        let Some(file) = &self.file else { return Some(from) };
        let (file, base) = &**file;
        match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(base.saturating_add(from))) {
            Ok(start) => Some(start.saturating_sub(*base).max(from)),
            Err(rustix::io::Errno::NXIO) => None,
            // A file that does not tell its holes is all data.
            Err(_) => Some(from),
        }
    }

    /// Whether each page of `range` is in the host's memory; `None` where the kernel does not say, or does not of
    /// holes.
    fn resident(&self, range: Range<u64>) -> Option<Vec<bool>> {
        self.file.as_ref()?;
        let length = range.end.saturating_sub(range.start);
        let pointer = self.pointer(range.start, length).ok()?;
        let mut pages = vec![0u8; (length as usize).div_ceil(rustix::param::page_size())];
        // SAFETY: `pointer` checked the range, and the vector has a byte for each of its pages.
        let result = unsafe { libc::mincore(pointer.cast(), length as usize, pages.as_mut_ptr()) };
        (result == 0).then(|| pages.iter().map(|page| page & 1 != 0).collect())
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
        let (file, base) = self.block.file.as_deref().filter(|_| self.block.host_page_size == PAGE_SIZE)?;
        Some((file, base.saturating_add(self.offset)))
    }

    /// Copies the bytes from `at` on into `buffer`. The guest may be writing meanwhile, as for [`RamBlock::read`].
    pub(crate) fn read(&self, at: usize, buffer: &mut [u8]) -> Result<(), MemoryError> {
        self.block.read(self.offset.saturating_add(at as u64), buffer)
    }

    /// Feeds the bytes to `digest`; only at the destination, before a vCPU runs.
    pub(crate) fn with_bytes<T>(&self, digest: impl FnOnce(&[u8]) -> T) -> T {
        // SAFETY: the range was checked. On the destination of a running migration nobody but this channel's
        // thread writes to its chunks, so the bytes do not change while the closure looks at them.
        digest(unsafe { std::slice::from_raw_parts(self.pointer, self.length) })
    }
}

/// Hugetlbfs tells its page size as the file system's block size.
fn host_page_size(fd: BorrowedFd<'_>) -> u64 {
    const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
    match rustix::fs::fstatfs(fd) {
        Ok(stat) if stat.f_type as u64 == HUGETLBFS_MAGIC => stat.f_bsize as u64,
        _ => PAGE_SIZE,
    }
}

fn reopen(fd: BorrowedFd<'_>) -> Option<File> {
    File::options().read(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()
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
mod tests {
    use proptest::prelude::*;
    use vm_memory::FileOffset;

    use super::*;

    const PAGES: u64 = 64;

    /// A memfd of 64 pages, some written through a mapping, some through the file, and all else holes.
    fn sparse(mapped: &[u64], written: &[u64]) -> RamBlock {
        let fd = rustix::fs::memfd_create("sparse", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        // Not from the file's start, as a machine with several blocks in one file has it.
        file.set_len((PAGES + 3) * PAGE_SIZE).unwrap();
        for page in written {
            std::os::unix::fs::FileExt::write_at(&file, &[7], (page + 3) * PAGE_SIZE + 100).unwrap();
        }
        let offset = FileOffset::new(file, 3 * PAGE_SIZE);
        let region = MmapRegion::<()>::from_file(offset, (PAGES * PAGE_SIZE) as usize).unwrap();
        let block = RamBlock::new("ram", Arc::new(region)).unwrap();
        for page in mapped {
            block.write(page * PAGE_SIZE + 9, &[8]).unwrap();
        }
        block
    }

    proptest! {
        /// Against the pages that were written: all of them, and no others.
        #[test]
        fn data_is_what_was_written(
            mapped in proptest::collection::vec(0..PAGES, 0..20),
            written in proptest::collection::vec(0..PAGES, 0..20),
            range in (0..PAGES, 1..=PAGES),
        ) {
            let block = sparse(&mapped, &written);
            let range = range.0..range.0.saturating_add(range.1).min(PAGES);
            let mut parts = Vec::new();
            block.data_in(range.start * PAGE_SIZE..range.end * PAGE_SIZE, &mut parts);
            let expected: Vec<u64> = range.filter(|page| mapped.contains(page) || written.contains(page)).collect();
            let found: Vec<u64> =
                parts.iter().flat_map(|part| part.start / PAGE_SIZE..part.end / PAGE_SIZE).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(parts.windows(2).all(|pair| pair[0].end < pair[1].start), "joined where they meet");
        }
    }

    #[test]
    fn memory_without_a_file_is_all_data() {
        let region = MmapRegion::<()>::new((PAGES * PAGE_SIZE) as usize).unwrap();
        let block = RamBlock::new("ram", Arc::new(region)).unwrap();
        let mut parts = Vec::new();
        block.data_in(PAGE_SIZE..5 * PAGE_SIZE, &mut parts);
        assert_eq!((parts.len(), parts.first()), (1, Some(&(PAGE_SIZE..5 * PAGE_SIZE))));
    }
}
