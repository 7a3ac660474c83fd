//! The file behind shared guest RAM, asked where it has holes.
//!
//! A hole that is read through the mapping is allocated; read through the file, it stays a hole. What must stay true: the
//! VMM's own descriptor keeps its file position.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use super::{PAGE_SIZE, holes};

/// Read at once in search of data.
const PIECE_BYTES: usize = 64 << 10;

/// The file behind a block.
#[derive(Debug)]
pub(super) struct RamFile {
    file: File,
    /// Where in the file the block begins.
    base: u64,
    position: Position,
}

/// Whose the file's position is. Asking a file for its holes moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// Ours: the file was opened anew. Says whether the file tells its holes.
    Own { tells_holes: bool },
    /// Also the VMM's, since the descriptor is a duplicate of the VMM's: /proc is not there to open the file anew.
    Shared,
}

impl RamFile {
    /// Opens what is behind `fd`; `None` where the process can have no more descriptors.
    pub(super) fn open(fd: BorrowedFd<'_>, base: u64, size_bytes: u64) -> Option<Self> {
        let own = File::options().read(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
        Self::with(own, fd, base, size_bytes)
    }

    /// Over `own`, if it could be opened, or a duplicate of `fd`.
    pub(super) fn with(own: Option<File>, fd: BorrowedFd<'_>, base: u64, size_bytes: u64) -> Option<Self> {
        match own {
            Some(file) => {
                // Hugetlbfs says of every byte that it is data, and so do file systems without holes.
                let hole = rustix::fs::seek(&file, SeekFrom::Hole(base));
                let tells_holes = !holes::is_hugetlbfs(fd) && hole.is_ok() && base.checked_add(size_bytes).is_some();
                Some(Self { file, base, position: Position::Own { tells_holes } })
            }
            None => {
                let file = File::from(fd.try_clone_to_owned().ok()?);
                Some(Self { file, base, position: Position::Shared })
            }
        }
    }

    /// The file, and where in it offset `offset` of the block is.
    pub(super) fn place(&self, offset: u64) -> (&File, u64) {
        (&self.file, self.base.saturating_add(offset))
    }

    /// Whether the file can be asked for its holes.
    pub(super) fn knows_holes(&self) -> bool {
        self.position == Position::Own { tells_holes: true }
    }

    /// The first byte of the block at or after `from` that is not in a hole; `None` when only holes follow.
    pub(super) fn data_from(&self, from: u64) -> Option<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(self.base.saturating_add(from))) {
            Ok(start) => Some(start.saturating_sub(self.base).max(from)),
            Err(rustix::io::Errno::NXIO) => None,
            // A file that does not tell its holes is all data.
            Err(_) => Some(from),
        }
    }

    /// Adds the pages of `range` that are not in a hole to `parts`, by asking the file.
    pub(super) fn seek_data_in(&self, range: Range<u64>, parts: &mut Vec<Range<u64>>) {
        let page = holes::page_bytes();
        let mut at = range.start;
        while let Some(data) = self.data_from(at).map(|data| data / page * page).filter(|data| *data < range.end) {
            at = data.saturating_add(page);
            holes::join(parts, data.max(range.start)..at.min(range.end));
        }
    }

    /// Adds the pages of `range` that are not all zeros to `parts`, by reading the file. A hole is not allocated by that.
    pub(super) fn find_data_in(&self, range: Range<u64>, parts: &mut Vec<Range<u64>>) {
        let mut buffer = vec![0; PIECE_BYTES];
        for start in range.clone().step_by(PIECE_BYTES) {
            let end = start.saturating_add(PIECE_BYTES as u64).min(range.end);
            let piece = buffer.get_mut(..end.saturating_sub(start) as usize).unwrap_or_default();
            if self.read(start, piece).is_err() {
                // Not a file that can be read.
                holes::join(parts, start..end);
                continue;
            }
            for (at, page) in (start..end).step_by(PAGE_SIZE as usize).zip(piece.chunks(PAGE_SIZE as usize)) {
                if page.iter().any(|byte| *byte != 0) {
                    holes::join(parts, at..at.saturating_add(PAGE_SIZE).min(end));
                }
            }
        }
    }

    /// Copies the block's bytes from `offset` on into `buffer`, without allocating holes.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (file, at) = self.place(offset);
        file.read_exact_at(buffer, at)
    }
}
