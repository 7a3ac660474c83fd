//! RAM on pages of any size of the host's, on either side, in any pairing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::Mutex;

use common::{MIB, Random, empty_on, move_guest, parameters, source_on};
use dunlin::{Machine, Parameters};
use dunlin_machines::{Backing, SyntheticMachine};

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
