//! RAM that is mapped in every way there is: a guest that moves in finds nothing of what was there before.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::{Random, parameters};
use dunlin::memory::{DirtyTracker, Ram, RamBlock, WriteProtectTracker};
use dunlin::{Destination, Guest, Machine, MachineError, Parameters, Source, StateSection, Status};
use dunlin::{StartPermit, SwitchoverCost};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

const PAGE: u64 = 4096;
/// Not whole chunks.
const PAGES: u64 = 3 * 512 + 17;
const BYTES: u64 = PAGES * PAGE;

/// RAM and nothing else.
struct Bare(Ram);

impl Machine for Bare {
    fn ram(&self) -> &Ram {
        &self.0
    }
    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        Ok(Box::new(WriteProtectTracker::new(&self.0)?))
    }
    fn profile(&self) -> Vec<u8> {
        Vec::new()
    }
    fn accept_profile(&self, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }
    fn switchover_cost(&self) -> SwitchoverCost {
        SwitchoverCost::default()
    }
    fn pause(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn resume(&self, _: &StartPermit) -> Result<(), MachineError> {
        Ok(())
    }
    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        Ok(Vec::new())
    }
    fn load(&self, _: Vec<StateSection>) -> Result<(), MachineError> {
        Ok(())
    }
}

/// A way of mapping memory, and whether its writes can be tracked, so that a guest can leave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapping {
    PrivateAnonymous,
    SharedAnonymous,
    Memfd,
    /// Whose pages cannot be given back any more.
    SealedMemfd,
    PinnedMemfd,
    PinnedAnonymous,
    /// As of a snapshot, which has pages of its own.
    PrivateMemfd,
    PrivateFile,
}

const MAPPINGS: [Mapping; 8] = [
    Mapping::PrivateAnonymous,
    Mapping::SharedAnonymous,
    Mapping::Memfd,
    Mapping::SealedMemfd,
    Mapping::PinnedMemfd,
    Mapping::PinnedAnonymous,
    Mapping::PrivateMemfd,
    Mapping::PrivateFile,
];

fn memfd() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("ram", flags).unwrap());
    file.set_len(BYTES).unwrap();
    file
}

impl Mapping {
    fn is_private_file(self) -> bool {
        matches!(self, Self::PrivateMemfd | Self::PrivateFile)
    }

    fn machine(self) -> Arc<Bare> {
        let map = |flags, file: Option<File>| -> MmapRegion {
            let region = MmapRegionBuilder::new(BYTES as usize)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags);
            match file {
                Some(file) => region.with_file_offset(FileOffset::new(file, 0)).build().unwrap(),
                None => region.build().unwrap(),
            }
        };
        let snapshot = |file: File| {
            file.write_all_at(&vec![0x5a; BYTES as usize], 0).unwrap();
            file
        };
        let region = match self {
            Self::PrivateAnonymous | Self::PinnedAnonymous => map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
            Self::SharedAnonymous => map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, None),
            Self::Memfd | Self::PinnedMemfd => map(libc::MAP_SHARED, Some(memfd())),
            Self::SealedMemfd => {
                let file = memfd();
                let region = map(libc::MAP_SHARED, Some(file.try_clone().unwrap()));
                rustix::fs::fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
                region
            }
            Self::PrivateMemfd => map(libc::MAP_PRIVATE, Some(snapshot(memfd()))),
            Self::PrivateFile => map(libc::MAP_PRIVATE, Some(snapshot(tempfile::tempfile().unwrap()))),
        };
        let block = RamBlock::new("ram", Arc::new(region)).unwrap();
        let pinned = matches!(self, Self::PinnedMemfd | Self::PinnedAnonymous);
        Arc::new(Bare(Ram::new(vec![if pinned { block.pinned() } else { block }]).unwrap()))
    }
}

fn move_over(from: &Arc<Bare>, to: &Arc<Bare>, parameters: &Parameters, what: &str) {
    let source = Guest::new(from.clone());
    source.cont().unwrap();
    let destination = Guest::awaited(to.clone());
    let incoming = Destination::listen(&destination, &"tcp:127.0.0.1:0".parse().unwrap(), parameters).unwrap();
    let report = Source::start(&source, incoming.local_uri(), parameters).unwrap().wait();
    assert_eq!(report.status, Status::Completed, "{what}: {:?}", report.error);
    assert!(incoming.wait().status == Status::Completed, "{what}");
}

fn contents(machine: &Bare) -> Vec<u8> {
    let mut ram = vec![0; BYTES as usize];
    machine.0.blocks()[0].read(0, &mut ram).unwrap();
    ram
}

/// About half of all pages are zero.
fn fill(machine: &Bare, random: &mut Random) {
    let block = &machine.0.blocks()[0];
    for page in 0..PAGES {
        let word = random.next();
        let fresh = if word.is_multiple_of(2) { vec![0; PAGE as usize] } else { word.to_le_bytes().repeat(512) };
        block.write(page * PAGE, &fresh).unwrap();
    }
}

/// A guest moves into RAM that holds something, and out again and back where its writes can be tracked: its pages and no
/// others are there, those of zeros too.
#[test]
fn nothing_of_before_is_left() {
    let mut random = Random(21);
    for mapping in MAPPINGS {
        for (integrity, channels, compression) in
            [("checksum", "1", "none"), ("none", "3", "none"), ("checksum", "2", "lz4")]
        {
            let set = parameters(&[
                ("integrity", integrity),
                ("multifd-channels", channels),
                ("multifd-compression", compression),
            ]);
            let what = format!("{mapping:?}, {integrity}, {channels} channels, {compression}");
            let (near, far) = (mapping.machine(), Mapping::Memfd.machine());
            // What was there before: in a private mapping of a file both the file's pages and others.
            for page in (0..PAGES).filter(|page| !mapping.is_private_file() || page % 3 == 0) {
                near.0.blocks()[0].write(page * PAGE, &[0xaa; PAGE as usize]).unwrap();
            }
            if !mapping.is_private_file() {
                move_over(&near, &far, &set, &what);
            }
            fill(&far, &mut random);
            let expected = contents(&far);
            move_over(&far, &near, &set, &what);
            let found = contents(&near);
            let wrong = (0..PAGES as usize).filter(|page| {
                let bytes = page * PAGE as usize..(page + 1) * PAGE as usize;
                found[bytes.clone()] != expected[bytes]
            });
            assert_eq!(wrong.count(), 0, "{what}: pages are wrong");
        }
    }
}
