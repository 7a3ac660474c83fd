//! RAM blocks over every kind of mapping: what giving pages back leaves, where holes are found, and that reading allocates none.

use std::os::fd::AsFd;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::*;

const PAGES: u64 = 64;
const BYTES: u64 = PAGES * PAGE_SIZE;

/// How the engine finds the holes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    /// By a file of its own.
    File,
    /// By a duplicate of the VMM's descriptor, as without /proc.
    Duplicate,
    /// By asking the kernel which pages are in memory, as for shared anonymous memory.
    Memory,
}

fn memfd(bytes: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("ram", flags).unwrap());
    file.set_len(bytes).unwrap();
    file
}

fn block(region: MmapRegion) -> RamBlock {
    RamBlock::new("ram", Arc::new(region)).unwrap()
}

fn allocated_pages(file: &File) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512 / PAGE_SIZE
}

/// A memfd of so many pages, some written through a mapping, some through the file, and all else holes.
fn sparse(pages: u64, mapped: &[u64], written: &[u64], finding: Finding) -> (RamBlock, File) {
    // Not from the file's start, as a machine with several blocks in one file has it.
    let file = memfd((pages + 3) * PAGE_SIZE);
    for page in written {
        std::os::unix::fs::FileExt::write_at(&file, &[7], (page + 3) * PAGE_SIZE + 100).unwrap();
    }
    let offset = FileOffset::new(file.try_clone().unwrap(), 3 * PAGE_SIZE);
    let region = MmapRegion::<()>::from_file(offset, (pages * PAGE_SIZE) as usize).unwrap();
    let mut block = block(region);
    match finding {
        Finding::File => assert!(block.file.as_ref().unwrap().knows_holes()),
        Finding::Duplicate => {
            let duplicate = RamFile::with(None, file.as_fd(), 3 * PAGE_SIZE, pages * PAGE_SIZE).unwrap();
            assert!(!duplicate.knows_holes());
            block.file = Some(Arc::new(duplicate));
        }
        Finding::Memory => block.file = None,
    }
    for page in mapped {
        block.write(page * PAGE_SIZE + 9, &[8]).unwrap();
    }
    (block, file)
}

fn findings() -> Vec<Finding> {
    // With swap, shared memory without a file is all data.
    let memory = holes::without_swap().then_some(Finding::Memory);
    [Finding::File, Finding::Duplicate].into_iter().chain(memory).collect()
}

proptest! {
    /// Against the pages that were written: all of them, and no others.
    #[test]
    fn data_is_what_was_written(
        mapped in proptest::collection::vec(0..PAGES, 0..20),
        written in proptest::collection::vec(0..PAGES, 0..20),
        range in (0..PAGES, 1..=PAGES),
        finding in prop::sample::select(findings()),
    ) {
        let (block, _) = sparse(PAGES, &mapped, &written, finding);
        let range = range.0..range.0.saturating_add(range.1).min(PAGES);
        let mut parts = Vec::new();
        block.data_in(range.start * PAGE_SIZE..range.end * PAGE_SIZE, &mut parts);
        let expected: Vec<u64> = range.filter(|page| mapped.contains(page) || written.contains(page)).collect();
        let found: Vec<u64> =
            parts.iter().flat_map(|part| part.start / PAGE_SIZE..part.end / PAGE_SIZE).collect();
        prop_assert_eq!(found, expected);
        prop_assert!(parts.windows(2).all(|pair| pair[0].end < pair[1].start), "joined where they meet");
    }

    /// Peeking gives what reading gives, at any place, and allocates nothing.
    #[test]
    fn peeking_is_reading(
        mapped in proptest::collection::vec(0..PAGES, 0..20),
        start in 0..BYTES,
        length in 0..3 * PAGE_SIZE,
        finding in prop::sample::select(findings()),
    ) {
        let (block, file) = sparse(PAGES, &mapped, &[], finding);
        let before = allocated_pages(&file);
        let length = length.min(BYTES - start) as usize;
        let (mut peeked, mut read) = (vec![1; length], vec![2; length]);
        block.peek(start, &mut peeked).unwrap();
        prop_assert_eq!(allocated_pages(&file), before);
        block.read(start, &mut read).unwrap();
        prop_assert!(peeked == read);
    }
}

/// All of a sparse guest is read, by whatever way holes are found: nothing is allocated by it, and the VMM's file position
/// stays.
#[test]
fn holes_stay_holes() {
    for finding in findings() {
        let (block, mut file) = sparse(2048, &[77], &[], finding);
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(5)).unwrap();
        let mut parts = Vec::new();
        let (mut data, mut page) = (0, [0; PAGE_SIZE as usize]);
        for chunk in (0..block.size_bytes()).step_by(2 << 20) {
            block.data_in(chunk..chunk + (2 << 20), &mut parts);
            for part in &parts {
                data += part.end - part.start;
                block.read(part.start, &mut page).unwrap();
            }
        }
        for at in (0..block.size_bytes()).step_by(PAGE_SIZE as usize) {
            block.peek(at, &mut page).unwrap();
        }
        assert_eq!((data, allocated_pages(&file)), (PAGE_SIZE, 1), "{finding:?}");
        assert_eq!(std::io::Seek::stream_position(&mut file).unwrap(), 5, "{finding:?}");
    }
}

/// The same of huge pages, where the host has any.
#[test]
fn huge_holes_stay_holes() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let huge = 2u64 << 20;
    let Ok(fd) = rustix::fs::memfd_create("ram", flags) else { return };
    let file = File::from(fd);
    file.set_len(4 * huge).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let Ok(region) = MmapRegion::from_file(offset, 4 * huge as usize) else { return };
    let block = block(region);
    if block.populate(2 * huge..3 * huge).is_err() {
        return;
    }
    block.write(2 * huge + 5 * PAGE_SIZE, &[1]).unwrap();
    let mut parts = Vec::new();
    block.data_in(0..4 * huge, &mut parts);
    assert_eq!((parts.len(), parts.first()), (1, Some(&(2 * huge..3 * huge))));
    let mut byte = [9];
    block.peek(3 * huge, &mut byte).unwrap();
    assert_eq!((byte, allocated_pages(&file)), ([0], huge / PAGE_SIZE));
}

#[test]
fn private_memory_is_all_data() {
    let block = block(MmapRegion::new(BYTES as usize).unwrap());
    let mut parts = Vec::new();
    block.data_in(PAGE_SIZE..5 * PAGE_SIZE, &mut parts);
    assert_eq!((parts.len(), parts.first()), (1, Some(&(PAGE_SIZE..5 * PAGE_SIZE))));
}

#[test]
fn memory_that_cannot_be_written_is_no_ram() {
    for protection in [libc::PROT_NONE, libc::PROT_READ, libc::PROT_WRITE] {
        for file in [None, Some(FileOffset::new(memfd(BYTES), 0))] {
            let flags = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
            let mut region =
                MmapRegionBuilder::<()>::new(BYTES as usize).with_mmap_prot(protection).with_mmap_flags(flags);
            if let Some(file) = file {
                region = region.with_file_offset(file);
            }
            let region = region.build().unwrap();
            let error = RamBlock::new("rom", Arc::new(region)).unwrap_err();
            assert!(matches!(&error, MemoryError::Access { block } if block == "rom"), "{error}");
        }
    }
}

/// A mapping that is not what it says.
struct Liar {
    region: MmapRegion,
    shared: bool,
}

// SAFETY: not kept, as far as `kind` is concerned; what the tests do with it harms nothing.
unsafe impl RamMapping for Liar {
    fn host_address(&self) -> NonNull<u8> {
        RamMapping::host_address(&self.region)
    }
    fn size_bytes(&self) -> u64 {
        BYTES
    }
    fn kind(&self) -> RamKind<'_> {
        if self.shared { RamKind::SharedAnonymous } else { RamKind::PrivateAnonymous }
    }
    fn is_accessible(&self) -> bool {
        true
    }
}

/// For every way of mapping memory: what was given back reads as zeros, and what was not is told.
#[test]
fn what_is_given_back_is_zero() {
    let map = |flags, file: Option<File>| {
        let mut region = MmapRegionBuilder::new(BYTES as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags);
        if let Some(file) = file {
            region = region.with_file_offset(FileOffset::new(file, 0));
        }
        region.build().unwrap()
    };
    let full = |file: File| {
        std::os::unix::fs::FileExt::write_all_at(&file, &[3; BYTES as usize], 0).unwrap();
        file
    };
    let shared_anonymous = || map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, None);
    let sealed = memfd(BYTES);
    let sealed_region = map(libc::MAP_SHARED, Some(sealed.try_clone().unwrap()));
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::FUTURE_WRITE).unwrap();
    let on_disk = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        file
    };
    let lying = |region, shared| RamBlock::new("ram", Arc::new(Liar { region, shared })).unwrap();
    let anonymous = || MmapRegion::new(BYTES as usize).unwrap();
    let cases = [
        ("private anonymous", block(anonymous()), true),
        ("shared anonymous", block(shared_anonymous()), true),
        ("memfd", block(map(libc::MAP_SHARED, Some(memfd(BYTES)))), true),
        ("memfd, sealed", block(sealed_region), false),
        ("private memfd", block(map(libc::MAP_PRIVATE, Some(full(memfd(BYTES))))), false),
        ("private file", block(map(libc::MAP_PRIVATE, Some(full(on_disk())))), false),
        ("pinned", block(anonymous()).pinned(), false),
        ("pinned memfd", block(map(libc::MAP_SHARED, Some(memfd(BYTES)))).pinned(), false),
        ("shared, but said to be private", lying(shared_anonymous(), false), false),
        ("private, but said to be shared", lying(anonymous(), true), false),
        ("a file's, but said to be anonymous", lying(map(libc::MAP_PRIVATE, Some(full(memfd(BYTES)))), false), false),
    ];
    for (what, block, given) in cases {
        for page in 1..PAGES {
            block.write(page * PAGE_SIZE + 11, &[1; 100]).unwrap();
        }
        let mut left = Vec::new();
        block.discard(&mut left);
        let is_left = |page: u64| left.iter().any(|part| part.contains(&(page * PAGE_SIZE)));
        assert_eq!(given, (0..PAGES).all(|page| !is_left(page)), "{what}: {left:?}");
        for page in 0..PAGES {
            let zero = block.is_zero(page * PAGE_SIZE..(page + 1) * PAGE_SIZE).unwrap();
            assert!(zero || is_left(page), "{what}: page {page} was not given back");
        }
    }
}
