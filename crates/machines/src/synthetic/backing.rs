//! The pages of the host that RAM is made of.

use std::fmt;
use std::fs::File;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use dunlin::memory::{MemoryError, RamBlock};
use rustix::fs::MemfdFlags;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

/// The host's pages behind RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// The usual ones, of 4 KiB.
    #[default]
    Base,
    /// Anonymous memory that the kernel backs with transparent huge pages of 2 MiB where it has them.
    Transparent,
    /// Huge pages of 2 MiB, from the host's pool (`vm.nr_hugepages`).
    Huge2M,
    /// Huge pages of 1 GiB, from the host's pool.
    Huge1G,
}

/// No pages of that size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pages of {0:?}: 4K, transparent, 2M or 1G")]
pub struct BackingError(String);

impl Backing {
    /// Bytes in a page that RAM must be whole ones of.
    pub fn page_bytes(self) -> u64 {
        match self {
            Self::Base | Self::Transparent => 4096,
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }

    /// Bytes of the host's memory that are taken when one byte of RAM is written.
    pub(crate) fn taken_at_once(self) -> u64 {
        match self {
            Self::Transparent => 2 << 20,
            Self::Base | Self::Huge2M | Self::Huge1G => self.page_bytes(),
        }
    }

    /// A new mapping of `size` bytes of it, all zeros.
    ///
    /// # Errors
    /// The system's: no memory, or not as many huge pages as it takes.
    pub fn map(self, size: usize) -> io::Result<MmapRegion> {
        let builder = MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let flags = match self {
            Self::Transparent => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                return builder.with_mmap_flags(flags).build().map_err(io::Error::other);
            }
            Self::Base => MemfdFlags::CLOEXEC,
            Self::Huge2M => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Self::Huge1G => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        };
        let file = File::from(rustix::fs::memfd_create("dunlin-ram", flags)?);
        file.set_len(size as u64)?;
        // Without MAP_NORESERVE: where huge pages are short this fails, and not the first touch of a page.
        builder
            .with_mmap_flags(match self {
                Self::Huge2M | Self::Huge1G => libc::MAP_SHARED,
                Self::Base | Self::Transparent => libc::MAP_SHARED | libc::MAP_NORESERVE,
            })
            .with_file_offset(FileOffset::new(file, 0))
            .build()
            .map_err(io::Error::other)
    }

    /// A block over memory that was [mapped](Self::map) with it.
    ///
    /// # Errors
    /// As [`RamBlock::new`], and where the kernel has no transparent huge pages.
    pub fn block(self, name: &str, memory: Arc<MmapRegion>) -> Result<RamBlock, MemoryError> {
        let block = RamBlock::new(name, memory)?;
        if self == Self::Transparent { block.with_transparent_huge_pages() } else { Ok(block) }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Base => "4K",
            Self::Transparent => "transparent",
            Self::Huge2M => "2M",
            Self::Huge1G => "1G",
        })
    }
}

impl FromStr for Backing {
    type Err = BackingError;

    fn from_str(text: &str) -> Result<Self, BackingError> {
        let all = [Self::Base, Self::Transparent, Self::Huge2M, Self::Huge1G];
        let wanted = text.trim().trim_end_matches("iB");
        all.into_iter().find(|backing| backing.to_string() == wanted).ok_or_else(|| BackingError(text.to_owned()))
    }
}
