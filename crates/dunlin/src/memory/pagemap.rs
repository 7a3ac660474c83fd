//! `PAGEMAP_SCAN`: which pages of this process were written, and protecting them again in the same step.
//!
//! See `Documentation/admin-guide/mm/pagemap.rst` in Linux (6.7 and later). The ioctl's number is not in any
//! crate's constants: it is `_IOWR('f', 16, struct pm_scan_arg)`.

use std::fs::File;
use std::io;
use std::ops::Range;

use linux_raw_sys::general as sys;
use rustix::ioctl::{Opcode, ioctl, opcode};

const PAGEMAP_SCAN: Opcode = opcode::read_write::<sys::pm_scan_arg>(b'f', 16);

/// Regions fetched by one call. A fuller answer continues where it stopped.
const REGIONS: usize = 256;

/// Whether a scan protects what it reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AfterScan {
    /// Leave the pages writable: a look.
    Keep,
    /// Write-protect what is reported, atomically with reporting it.
    Protect,
}

/// This process's page map.
#[derive(Debug)]
pub(super) struct PageMap {
    file: File,
}

impl PageMap {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")? })
    }

    /// Calls `written` with each address range of `range` that was written since it was last protected.
    pub(super) fn scan(
        &self,
        range: Range<u64>,
        after: AfterScan,
        mut written: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let flags = sys::PM_SCAN_CHECK_WPASYNC
            | match after {
                AfterScan::Keep => 0,
                AfterScan::Protect => sys::PM_SCAN_WP_MATCHING,
            };
        let mut regions = [sys::page_region { start: 0, end: 0, categories: 0 }; REGIONS];
        let mut start = range.start;
        while start < range.end {
            let mut arg = sys::pm_scan_arg {
                size: size_of::<sys::pm_scan_arg>() as u64,
                flags: u64::from(flags),
                start,
                end: range.end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: u64::from(sys::PAGE_IS_WRITTEN),
                category_anyof_mask: 0,
                return_mask: u64::from(sys::PAGE_IS_WRITTEN),
            };
            let found = scan_once(&self.file, &mut arg)?;
            for region in regions.iter().take(found) {
                written(region.start..region.end);
            }
            if arg.walk_end <= start {
                // Unseen in practice; without it a kernel's oddity would be an endless loop.
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            start = arg.walk_end;
        }
        Ok(())
    }
}

/// The call returns the number of regions, which rustix's `Updater` would drop; hence an ioctl of our own.
fn scan_once(file: &File, arg: &mut sys::pm_scan_arg) -> io::Result<usize> {
    struct Scan<'a>(&'a mut sys::pm_scan_arg);
    // SAFETY: the opcode and the argument type belong together, and the answer is a plain count.
    unsafe impl rustix::ioctl::Ioctl for Scan<'_> {
        type Output = usize;
        const IS_MUTATING: bool = true;
        fn opcode(&self) -> Opcode {
            PAGEMAP_SCAN
        }
        fn as_ptr(&mut self) -> *mut std::ffi::c_void {
            std::ptr::from_mut(self.0).cast()
        }
        unsafe fn output_from_ptr(
            out: rustix::ioctl::IoctlOutput,
            _: *mut std::ffi::c_void,
        ) -> rustix::io::Result<usize> {
            Ok(usize::try_from(out).unwrap_or(0).min(REGIONS))
        }
    }
    loop {
        // SAFETY: `arg.vec` points to REGIONS regions that outlive the call.
        match unsafe { ioctl(file, Scan(arg)) } {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}
