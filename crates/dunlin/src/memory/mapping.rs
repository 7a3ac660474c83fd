//! How guest RAM is mapped into this process, as the VMM tells it.

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestRegionMmap, MmapRegion};

/// How guest RAM is mapped. It decides how pages can be given back to the host and how holes can be found.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum RamKind<'a> {
    /// `MAP_PRIVATE | MAP_ANONYMOUS`.
    PrivateAnonymous,
    /// `MAP_SHARED | MAP_ANONYMOUS`. Where the host has swap its holes cannot be told from pages that are swapped out, so a
    /// sparse guest's RAM grows to its full size when it is read; a memfd does not have that limit.
    SharedAnonymous,
    /// `MAP_SHARED` of a file: a memfd, or a file on tmpfs, hugetlbfs or a disk.
    SharedFile {
        /// The file that is mapped.
        file: BorrowedFd<'a>,
        /// Where in the file the mapping begins.
        offset: u64,
    },
    /// `MAP_PRIVATE` of a file, as of a snapshot. Its pages cannot be given back: the file's contents would appear.
    PrivateFile,
    /// Any other, or not known. Its pages are not given back.
    Unknown,
}

/// Guest RAM mapped into this process.
///
/// Implemented for vm-memory's mappings; a VMM with memory of its own kind implements it itself.
///
/// # Safety
/// For as long as the value lives, `[host_address, host_address + size_bytes)` must stay mapped, readable and writable if
/// `is_accessible` says so, and as `kind` says. The memory must be for guest RAM only: no reference may point into it. The
/// engine reads and writes it while vCPUs and devices do, without synchronization, through raw pointers and system calls.
pub unsafe trait RamMapping: Send + Sync {
    /// Where the mapping starts in this process.
    fn host_address(&self) -> NonNull<u8>;
    /// Its length in bytes.
    fn size_bytes(&self) -> u64;
    /// How it is mapped.
    fn kind(&self) -> RamKind<'_>;
    /// Whether all of it is mapped both readable and writable.
    fn is_accessible(&self) -> bool;
}

// SAFETY: an `MmapRegion` unmaps only when dropped, and is mapped as long as it lives. One that was made from a raw pointer was
// made by unsafe code, which has promised that it is what its flags say.
unsafe impl<B: Bitmap + Send + Sync> RamMapping for MmapRegion<B> {
    fn host_address(&self) -> NonNull<u8> {
        NonNull::new(self.as_ptr()).unwrap_or(NonNull::dangling())
    }

    fn size_bytes(&self) -> u64 {
        self.size() as u64
    }

    fn kind(&self) -> RamKind<'_> {
        let anonymous = self.flags() & libc::MAP_ANONYMOUS != 0;
        let shared = match self.flags() & libc::MAP_TYPE {
            libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE => true,
            libc::MAP_PRIVATE => false,
            _ => return RamKind::Unknown,
        };
        match (shared, self.file_offset()) {
            (false, _) if anonymous => RamKind::PrivateAnonymous,
            (true, _) if anonymous => RamKind::SharedAnonymous,
            (true, Some(offset)) => RamKind::SharedFile { file: offset.file().as_fd(), offset: offset.start() },
            (false, Some(_)) => RamKind::PrivateFile,
            (_, None) => RamKind::Unknown,
        }
    }

    fn is_accessible(&self) -> bool {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        self.prot() & both == both && !self.as_ptr().is_null()
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

    fn kind(&self) -> RamKind<'_> {
        RamMapping::kind(&**self)
    }

    fn is_accessible(&self) -> bool {
        RamMapping::is_accessible(&**self)
    }
}
