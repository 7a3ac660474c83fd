//! RAM on pages of any size of the host's, on either side, in any pairing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::{Arc, Mutex};

use common::{MIB, Random, empty_on, move_guest, parameters, source_on, source_with};
use dunlin::memory::{DirtyTracker, Ram, RamBlock, WriteProtectTracker};
use dunlin::{
    Destination, Guest, Machine, MachineError, Parameters, Source, StartPermit, StateSection, Status, SwitchoverCost,
};
use dunlin_machines::{Backing, SyntheticMachine};
use rustix::fs::MemfdFlags;
use vm_memory::{FileOffset, MmapRegion};

const CHUNK: u64 = 2 * MIB;

/// The pages that this host has enough of for two machines.
fn backings(memory: impl Fn(Backing) -> u64) -> Vec<Backing> {
    let all = [Backing::Base, Backing::Transparent, Backing::Huge2M, Backing::Huge1G];
    let there = all.into_iter().filter(|backing| {
        let machine = || SyntheticMachine::empty(memory(*backing), 1, *backing);
        match (machine(), machine()) {
            (Ok(_), Ok(_)) => true,
            (Err(error), _) | (_, Err(error)) => {
                println!("skipped: pages of {backing}: {error}");
                false
            }
        }
    });
    there.collect()
}

fn memory(backing: Backing) -> u64 {
    backing.page_bytes().max(16 * MIB)
}

/// The tests look at memory of the whole process.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn any_to_any() {
    let _alone = ALONE.lock();
    let backings = backings(memory);
    let mut random = Random(5);
    for from in &backings {
        for to in &backings {
            let memory = memory(*from).max(memory(*to));
            let what = format!("{from} to {to}");
            // A pool that has enough for small machines may not have enough beside a page of 1 GiB.
            let room = |backing: &Backing| SyntheticMachine::empty(memory, 1, *backing);
            if let (Err(error), _) | (_, Err(error)) = (room(from), room(to)) {
                println!("skipped: {what}: {error}");
                continue;
            }
            let workload = "rate=200M/s,working-set=8M,content=random";
            let (source, destination) =
                (source_on(*from, memory, 2, workload, random.next()), empty_on(*to, memory, 2));
            let parameters = parameters(&[
                ("multifd-compression", *random.pick(&["none", "lz4", "zstd"])),
                ("xbzrle", *random.pick(&["off", "on"])),
                ("integrity", *random.pick(&["none", "checksum"])),
            ]);
            let (report, _) = move_guest(&source, &destination, "tcp:127.0.0.1:0", &parameters);
            destination.assert_good(&what);
            println!("{what}: {}", report.ram.pages);
        }
    }
}

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

/// RAM of all zeros into a mapping that reserves no huge pages, of a pool that has too few: nothing would be touched, and
/// the guest would die of it later. It stays.
#[test]
fn a_pool_that_is_too_small_is_found_before_the_guest_moves() {
    let _alone = ALONE.lock();
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let number = |name: &str| {
        let line = meminfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)).and_then(|number| number.parse::<u64>().ok())
    };
    let Some(free) = number("HugePages_Free:").filter(|_| number("Hugepagesize:") == Some(2048)) else {
        println!("skipped: this kernel has no huge pages of 2 MiB");
        return;
    };
    let bytes = (free + 8) * CHUNK;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = std::fs::File::from(rustix::fs::memfd_create("small pool", flags).unwrap());
    file.set_len(bytes).unwrap();
    let mapping = MmapRegion::<()>::from_file(FileOffset::new(file, 0), bytes as usize).unwrap();
    let machine = |mapping| {
        let block = RamBlock::new("ram", Arc::new(mapping)).unwrap();
        Arc::new(Bare(Ram::new(vec![block]).unwrap()))
    };
    let from = Guest::new(machine(Backing::Base.map(bytes as usize).unwrap()));
    from.cont().unwrap();
    let to = Guest::awaited(machine(mapping));
    let destination = Destination::listen(&to, &"tcp:127.0.0.1:0".parse().unwrap(), &Parameters::default()).unwrap();
    let report = Source::start(&from, destination.local_uri(), &Parameters::default()).unwrap().wait();
    let error = report.error.unwrap().message;
    assert!(report.status == Status::Failed && error.contains("populate"), "{error}");
    assert!(from.is_running() && !to.is_running(), "{error}");
}

/// Bytes of this process's memory in transparent huge pages.
fn huge_bytes() -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = smaps.lines().find(|line| line.starts_with("AnonHugePages:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Every 2 MiB of a clean machine come as one run and lie in one huge page, whatever they come from.
#[test]
fn a_clean_huge_page_lands_as_one() {
    let _alone = ALONE.lock();
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if enabled.is_empty() || enabled.contains("[never]") {
        println!("skipped: this kernel has no transparent huge pages");
        return;
    }
    for from in [Backing::Base, Backing::Transparent] {
        let memory = 32 * MIB;
        let source = source_on(from, memory, 1, "idle", 3);
        // No page of zeros.
        let block = &source.machine.ram().blocks()[0];
        for page in 0..memory / 4096 {
            block.write(page * 4096 + 4000, &[1]).unwrap();
        }
        let destination = empty_on(Backing::Transparent, memory, 1);
        let before = huge_bytes();
        let (_, report) = move_guest(&source, &destination, "tcp:127.0.0.1:0", &Parameters::default());
        let frames: u64 = report.channels.iter().map(|channel| channel.frames).sum();
        assert_eq!(report.ram.pages.plain, memory / 4096, "{from}");
        assert!(frames < memory / CHUNK + 20, "{from}: {frames} frames for {} chunks", memory / CHUNK);
        // The kernel may be short of huge pages at times: most of them will do.
        let huge = huge_bytes().saturating_sub(before);
        assert!(huge >= memory / 2, "{from}: {huge} of {memory} bytes lie in huge pages");
    }
}

/// Memory of hugetlbfs, or of other files, that this process has mapped and the host has allocated.
fn file_bytes(backing: Backing) -> u64 {
    let field = if backing.page_bytes() > 4096 { "HugetlbPages:" } else { "RssShmem:" };
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// A machine that has touched little of its RAM: leaving, and being verified on either side, does not make it grow.
#[test]
fn what_was_never_touched_costs_nothing() {
    let _alone = ALONE.lock();
    // The kernel counts neither pages of zeros in anonymous memory nor a machine of a single page.
    for backing in backings(memory).into_iter().filter(|backing| [Backing::Base, Backing::Huge2M].contains(backing)) {
        let memory = memory(backing);
        let before = file_bytes(backing);
        let source = source_with(backing, memory, 1, "idle", 3, "zero:100,random:0,text:0");
        let destination = empty_on(Backing::Base, memory, 1);
        let grown = |at: &str| {
            let grown = file_bytes(backing).saturating_sub(before);
            assert!(grown <= memory / 4, "{backing}: {grown} bytes allocated of {memory} {at}");
        };
        grown("by making the machine");
        source.guest.stop().unwrap();
        source.assert_good("sparse");
        grown("by verifying it");
        source.guest.cont().unwrap();
        move_guest(&source, &destination, "tcp:127.0.0.1:0", &Parameters::default());
        grown("by moving it");
        destination.assert_good("sparse");
        grown("by verifying it at the destination");
    }
}
