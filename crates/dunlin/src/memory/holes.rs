//! Which pages of a mapping are in the host's memory, and what follows from that.

use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Adds `part` to `parts`, joined to the last where they meet.
pub(super) fn join(parts: &mut Vec<Range<u64>>, part: Range<u64>) {
    match parts.last_mut() {
        Some(last) if last.end == part.start => last.end = part.end,
        _ => parts.push(part),
    }
}

/// The unit in which the kernel maps memory.
pub(super) fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

/// Whether each page of the `length` bytes from `pointer` on, which are mapped, is in the host's memory; `None` where the
/// kernel does not say.
pub(super) fn resident(pointer: *mut u8, length: u64) -> Option<Vec<bool>> {
    let mut pages = vec![0u8; length.div_ceil(page_bytes()) as usize];
    // SAFETY: the kernel only looks at the mapping, and the vector has a byte for each page of it.
    let result = unsafe { libc::mincore(pointer.cast(), length as usize, pages.as_mut_ptr()) };
    (result == 0).then(|| pages.iter().map(|page| page & 1 != 0).collect())
}

/// Whether nothing on this host can be swapped out; `false` where the kernel does not say.
pub(super) fn without_swap() -> bool {
    // SAFETY: all zeros is a `sysinfo`, which the call then fills.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let result = unsafe { libc::sysinfo(&raw mut info) };
    result == 0 && info.totalswap == 0
}

/// Whether a file is made of huge pages.
pub(super) fn is_hugetlbfs(fd: BorrowedFd<'_>) -> bool {
    huge_page_bytes(fd).is_some()
}

/// The size of a file's huge pages, which hugetlbfs gives as the file system's block size.
pub(super) fn huge_page_bytes(fd: BorrowedFd<'_>) -> Option<u64> {
    const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
    rustix::fs::fstatfs(fd).ok().filter(|stat| stat.f_type as u64 == HUGETLBFS_MAGIC).map(|stat| stat.f_bsize as u64)
}
