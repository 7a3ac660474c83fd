//! Dirty tracking without a hypervisor: userfaultfd write protection and `PAGEMAP_SCAN`.
//!
//! Sees every write through this process's mapping: by vCPUs of any hypervisor, by the VMM's own threads and by
//! system calls. It does not see writes through another mapping of the same memfd (another process, or `pwrite`):
//! whoever writes so must tell by itself.
//!
//! A region is protected when the first of its chunks is re-armed, by the channels' workers side by side and while others
//! send already: protecting all RAM at the start took 20 ms a GiB before the first byte, and protecting chunk by chunk
//! interrupts all processors for every chunk. What must stay true: a region is protected as a whole once, before any
//! page of it has been re-armed.

use std::ops::Range;
use std::sync::{Mutex, PoisonError, RwLock};

use super::pagemap::{AfterScan, PageMap};
use super::userfault::Userfault;
use super::{DirtyBitmap, DirtyTracker, PAGE_SIZE, Ram, RamBlock, TrackerError};

/// What is protected at once, a multiple of every chunk and of huge pages up to its size.
const REGION_BYTES: u64 = if cfg!(test) { 4 << 20 } else { 64 << 20 };

/// [`DirtyTracker`] on userfaultfd `WP_ASYNC`, for anonymous, memfd and hugetlb memory. On hugetlb the kernel tracks
/// whole huge pages.
#[derive(Debug)]
pub struct WriteProtectTracker {
    ram: Ram,
    pagemap: PageMap,
    userfault: RwLock<Option<Userfault>>,
    /// Of each block, whether its regions have been protected.
    regions: Vec<Box<[Mutex<bool>]>>,
}

impl WriteProtectTracker {
    /// A tracker for `ram`. Nothing is tracked until it is started.
    ///
    /// # Errors
    /// When `/proc/self/pagemap` cannot be opened.
    pub fn new(ram: &Ram) -> Result<Self, TrackerError> {
        let pagemap = PageMap::open().map_err(|source| TrackerError::NotPermitted { source })?;
        let regions = ram.blocks().iter().map(|block| {
            let count = usize::try_from(block.size_bytes().div_ceil(region_bytes(block))).unwrap_or(usize::MAX);
            std::iter::repeat_with(|| Mutex::new(false)).take(count).collect()
        });
        Ok(Self { ram: ram.clone(), pagemap, userfault: RwLock::new(None), regions: regions.collect() })
    }

    /// Protects the regions that `range` of a block lies in, if that has not been done.
    fn protect(&self, block: usize, range: &Range<u64>) -> Result<(), TrackerError> {
        let Some((ram_block, regions)) = self.ram.blocks().get(block).zip(self.regions.get(block)) else {
            return Ok(());
        };
        let host = ram_block.host_range();
        let bytes = region_bytes(ram_block);
        for number in range.start / bytes..range.end.div_ceil(bytes) {
            let Some(region) = usize::try_from(number).ok().and_then(|number| regions.get(number)) else { break };
            // Held while it is being protected: who waits re-arms a page of it next.
            let mut protected = region.lock().unwrap_or_else(PoisonError::into_inner);
            let userfault = self.userfault.read().unwrap_or_else(PoisonError::into_inner);
            if let (false, Some(userfault)) = (*protected, &*userfault) {
                let start = host.start.saturating_add(number.saturating_mul(bytes));
                let end = start.saturating_add(bytes).min(host.end);
                userfault.protect(start..end).map_err(|source| TrackerError::Kernel {
                    doing: "write-protect",
                    block: ram_block.name().to_owned(),
                    source,
                })?;
                *protected = true;
            }
        }
        Ok(())
    }

    fn scan(
        &self,
        block: usize,
        range: Option<Range<u64>>,
        after: AfterScan,
        dirty: &DirtyBitmap,
    ) -> Result<(), TrackerError> {
        let blocks = self.ram.blocks();
        let ram_block = blocks.get(block).ok_or(TrackerError::UnknownBlock { block, blocks: blocks.len() })?;
        let host = ram_block.host_range();
        let base = host.start;
        let addresses = match range {
            None => host,
            Some(range) => {
                // The kernel wants whole huge pages.
                let align = ram_block.host_page_size();
                let start = range.start / align * align;
                let end = range.end.div_ceil(align).saturating_mul(align).min(ram_block.size_bytes());
                base.saturating_add(start)..base.saturating_add(end)
            }
        };
        let page = |address: u64| (address.saturating_sub(base) / PAGE_SIZE) as usize;
        self.pagemap.scan(addresses, after, |written| dirty.set(page(written.start)..page(written.end))).map_err(
            |source| TrackerError::Kernel { doing: "scan the page map of", block: ram_block.name().to_owned(), source },
        )
    }
}

fn region_bytes(block: &RamBlock) -> u64 {
    block.host_page_size().max(REGION_BYTES)
}

impl DirtyTracker for WriteProtectTracker {
    fn start(&self) -> Result<(), TrackerError> {
        let userfault = Userfault::open()?;
        for region in self.regions.iter().flatten() {
            *region.lock().unwrap_or_else(PoisonError::into_inner) = false;
        }
        for block in self.ram.blocks() {
            userfault.register(block.host_range()).map_err(|source| TrackerError::Kernel {
                doing: "register with userfaultfd",
                block: block.name().to_owned(),
                source,
            })?;
        }
        *self.userfault.write().unwrap_or_else(PoisonError::into_inner) = Some(userfault);
        Ok(())
    }

    fn sync(&self, block: usize, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        self.scan(block, None, AfterScan::Keep, dirty)
    }

    fn rearm(&self, block: usize, range: Range<u64>, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        self.protect(block, &range)?;
        self.scan(block, Some(range), AfterScan::Protect, dirty)
    }

    fn stop(&self) {
        let userfault = self.userfault.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(userfault) = userfault {
            for block in self.ram.blocks() {
                userfault.unregister(block.host_range());
            }
        }
    }
}

impl Drop for WriteProtectTracker {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{FileOffset, MmapRegion};

    use super::*;
    use crate::memory::{CHUNK_SIZE, RamBlock};

    /// Two regions and a half.
    const SIZE: u64 = 10 << 20;

    fn memfd(flags: rustix::fs::MemfdFlags) -> Option<Ram> {
        let fd = rustix::fs::memfd_create("test", flags).ok()?;
        let file = std::fs::File::from(fd);
        file.set_len(SIZE).ok()?;
        if flags.contains(rustix::fs::MemfdFlags::HUGETLB) {
            // vm-memory maps without reserving: where there are no huge pages a touch would be a SIGBUS.
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, SIZE).ok()?;
            rustix::fs::fallocate(
                &file,
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                0,
                SIZE,
            )
            .ok()?;
        }
        let region: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0), SIZE as usize).ok()?;
        Ram::new(vec![RamBlock::new("ram", Arc::new(region)).unwrap()]).ok()
    }

    fn kinds() -> Vec<(&'static str, Ram)> {
        use rustix::fs::MemfdFlags;
        let anonymous: MmapRegion = MmapRegion::new(SIZE as usize).unwrap();
        let mut all = vec![
            ("anonymous", Ram::new(vec![RamBlock::new("ram", Arc::new(anonymous)).unwrap()]).unwrap()),
            ("memfd", memfd(MemfdFlags::CLOEXEC).unwrap()),
        ];
        match memfd(MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) {
            Some(ram) => all.push(("hugetlb", ram)),
            None => println!("skipped: hugetlb: no free 2 MiB huge pages (set vm.nr_hugepages)"),
        }
        all
    }

    fn dirty_pages(bitmap: &DirtyBitmap) -> Vec<usize> {
        let mut pages = Vec::new();
        bitmap.drain(|run| pages.extend(run));
        pages
    }

    /// What is written is reported, nothing else is, and only once.
    #[test]
    fn reports_exactly_what_was_written() {
        for (kind, ram) in kinds() {
            let block = &ram.blocks()[0];
            let unit = (block.host_page_size() / PAGE_SIZE) as usize;
            let tracker = WriteProtectTracker::new(&ram).unwrap();
            // Some pages exist before tracking starts, some come into being under it.
            block.write(0, &[1; 3 * 4096]).unwrap();
            if let Err(error) = tracker.start() {
                println!("skipped: {error}");
                return;
            }
            let bitmap = DirtyBitmap::new(SIZE);
            tracker.rearm(0, 0..SIZE, &bitmap).unwrap();
            bitmap.drain(|_| {});
            tracker.sync(0, &bitmap).unwrap();
            assert_eq!(dirty_pages(&bitmap), [0usize; 0], "{kind}: nothing written yet");

            let written = [1usize, 2, 700, 1300, 2047];
            for page in written {
                block.write(page as u64 * PAGE_SIZE + 17, &[7]).unwrap();
            }
            let mut expected: Vec<usize> =
                written.iter().flat_map(|p| p / unit * unit..p / unit * unit + unit).collect();
            expected.dedup();
            expected.sort_unstable();
            expected.dedup();
            for _ in 0..2 {
                tracker.sync(0, &bitmap).unwrap();
                assert_eq!(dirty_pages(&bitmap), expected, "{kind}: a look does not re-arm");
            }
            tracker.rearm(0, 0..CHUNK_SIZE, &bitmap).unwrap();
            let first: Vec<usize> = expected.iter().copied().filter(|p| *p < 512).collect();
            assert_eq!(dirty_pages(&bitmap), first, "{kind}");
            tracker.sync(0, &bitmap).unwrap();
            let rest: Vec<usize> = expected.iter().copied().filter(|p| *p >= 512).collect();
            assert_eq!(dirty_pages(&bitmap), rest, "{kind}: the first chunk is re-armed");
            block.write(5, &[7]).unwrap();
            tracker.rearm(0, 0..CHUNK_SIZE, &bitmap).unwrap();
            assert_eq!(dirty_pages(&bitmap), (0..unit).collect::<Vec<_>>(), "{kind}");
            tracker.stop();
            block.write(9 * PAGE_SIZE, &[7]).unwrap();
        }
    }

    /// A writer at full speed against a reader that copies after re-arming: when the writer has stopped, the copy
    /// equals the memory.
    #[test]
    fn no_write_is_lost() {
        use std::sync::atomic::{AtomicBool, Ordering};
        for (kind, ram) in kinds() {
            let block = &ram.blocks()[0];
            let tracker = WriteProtectTracker::new(&ram).unwrap();
            if let Err(error) = tracker.start() {
                println!("skipped: {error}");
                return;
            }
            let bitmap = DirtyBitmap::new(SIZE);
            bitmap.set_all();
            let copy: Vec<Mutex<Vec<u8>>> =
                (0..bitmap.chunks()).map(|_| Mutex::new(vec![0; CHUNK_SIZE as usize])).collect();
            let stop = AtomicBool::new(false);
            // As the engine does it: one looks, and then each worker takes the chunks that are its own.
            let harvest = || {
                tracker.sync(0, &bitmap).unwrap();
                std::thread::scope(|scope| {
                    for worker in 0..3 {
                        let (bitmap, tracker, copy) = (&bitmap, &tracker, &copy);
                        scope.spawn(move || {
                            for chunk in bitmap.dirty_chunks().filter(|chunk| chunk % 3 == worker) {
                                let start = chunk as u64 * CHUNK_SIZE;
                                tracker.rearm(0, start..start + CHUNK_SIZE, bitmap).unwrap();
                                let mut copy = copy[chunk].lock().unwrap();
                                for page in bitmap.take_chunk(chunk).runs().flatten() {
                                    let at = page * 4096;
                                    block.read(start + at as u64, &mut copy[at..at + 4096]).unwrap();
                                }
                            }
                        });
                    }
                });
            };
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut x = 1u64;
                    while !stop.load(Ordering::Relaxed) {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1);
                        block.write((x >> 20) % (SIZE - 8), &x.to_le_bytes()).unwrap();
                    }
                });
                for _ in 0..200 {
                    harvest();
                }
                stop.store(true, Ordering::Relaxed);
            });
            harvest();
            let copy: Vec<u8> = copy.iter().flat_map(|chunk| chunk.lock().unwrap().clone()).collect();
            let mut now = vec![0u8; SIZE as usize];
            block.read(0, &mut now).unwrap();
            assert!(copy == now, "{kind}: a write was lost");
        }
    }
}
