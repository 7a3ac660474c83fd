//! Machines in cgroups with little memory, and on hosts with less than they ask for: what cannot be is refused before it is
//! filled, and what is not filled is not allocated by being read.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

#[path = "common/cgroup.rs"]
mod cgroup;
mod common;

use std::path::Path;
use std::process::Stdio;

use cgroup::Cgroup;
use common::{Machine, dunlin, fails, turn};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// A cgroup, or nothing where none can be made.
fn cgroup(controller: &'static str) -> Option<Cgroup> {
    Cgroup::new(controller).map_err(|why| println!("skipped: {why}")).ok()
}

/// A `dunlin` in a cgroup that must fail with one line that holds all of `words`.
fn refused(cgroup: &Cgroup, arguments: &[&str], words: &[&str]) {
    let output = cgroup.dunlin().args(arguments).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    println!("dunlin {}: {:?}: {said}", arguments.join(" "), output.status);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| !line.starts_with("dunlin: machine ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is missing: {said}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn more_than_the_host_has() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let qmp = format!("unix:{}/a", directory.path().display());
    let run = ["run", "--memory", "900T", "--qmp", &qmp];
    let words = ["could not make a machine of 900.00 TiB", "this host has ", " available", "--memory", "--force"];
    for (more, takes) in [
        (&[][..], "will take 450.88 TiB"),
        (&["--fill", "zero:100", "--workload", "rate=1M/s"], "will take 901.76 TiB"),
        (&["--hugepages", "transparent"], "will take 901.76 TiB"),
        (&["--incoming", "tcp:127.0.0.1:0"], "a guest that comes in, and its process, may take 901.76 TiB"),
        (&["--incoming", "defer", "--machine", "kvm"], "may take 901.76 TiB"),
        (&["--machine", "kvm"], "will take 450.88 TiB"),
    ] {
        fails(&[&run[..], more].concat(), 1, &[&words[..], &[takes]].concat());
    }
    let words = ["two machines of 900.00 TiB", "will take 901.76 TiB", "this host has ", " available", "--force"];
    fails(&["demo", "--machine", "synthetic", "--memory", "900T"], 1, &words);
    for what in ["throughput", "kinds"] {
        fails(&["bench", what, "--memory", "900T"], 1, &["could not measure", "this host has ", "--force"]);
    }
    fails(&["bench", "bitmap", "--memory", "9000000T"], 1, &["could not measure", "this host has ", "--force"]);
    fails(&["bench", "downtime", "--memory", "900T", "--runs", "1"], 1, &["this host has ", "--force"]);
    // Huge pages that are not in the pool.
    if Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
        let words =
            ["will take 900.00 TiB of huge pages", "the host's pool of huge pages has ", "vm.nr_hugepages", "--force"];
        fails(&[&run[..], &["--hugepages", "2M"]].concat(), 1, &words);
        fails(&[&run[..], &["--hugepages", "2M", "--incoming", "defer"]].concat(), 1, &words);
    }
}

#[test]
fn more_than_a_cgroup_has() {
    let _turn = turn();
    let Some(outer) = cgroup("memory") else { return };
    let inner = outer.nested("inner");
    let limit = outer.limit_memory(256 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let qmp = format!("unix:{}/a", directory.path().display());
    let run = ["run", "--qmp", &qmp, "--memory"];
    let figures = ["the cgroup has 2", "MiB left of 256.00 MiB", text(&limit), "--force"];
    // Fills it at once, fills it in time, waits for a guest that may.
    let sparse = ["--fill", "zero:100"];
    let fills = [&["1G"], &sparse[..], &["--workload", "pattern=sequential,rate=1M/s"]].concat();
    refused(
        &inner,
        &[&run[..], &["1G", "--fill", "text:100"]].concat(),
        &[&figures[..], &["will take 1.02 GiB"]].concat(),
    );
    refused(&inner, &[&run[..], &fills].concat(), &[&figures[..], &["will take 1.02 GiB"]].concat());
    // Little, but something of it in most pages of 2 MiB.
    let spread = ["1G", "--fill", "zero:90,text:10", "--hugepages", "transparent"];
    refused(&inner, &[&run[..], &spread].concat(), &[&figures[..], &["will take 1006."]].concat());
    let incoming = ["1G", "--incoming", "tcp:127.0.0.1:0"];
    refused(&inner, &[&run[..], &incoming].concat(), &[&figures[..], &["may take 1.02 GiB"]].concat());
    refused(
        &inner,
        &["demo", "--machine", "synthetic", "--memory", "512M"],
        &[&figures[..], &["the two guests"]].concat(),
    );
    refused(&inner, &["bench", "throughput", "--memory", "512M"], &figures);

    // Whoever insists gets it.
    let machine =
        Machine::start_by(inner.dunlin(), "forced", directory.path(), &[&["--force", "--memory"], &fills[..]].concat());
    assert!(machine.is_running());
    let said = machine.said();
    assert!(said.contains("goes on because of --force") && said.contains("1.02 GiB"), "{said}");
    machine.kill();
    // What is sparse is warned of; what fits is not.
    let machine =
        Machine::start_by(inner.dunlin(), "sparse", directory.path(), &[&["--memory", "1G"], &sparse[..]].concat());
    assert!(machine.is_running());
    let said = machine.said();
    assert!(said.contains("may take 1.02 GiB of memory") && said.contains("left of 256.00 MiB"), "{said}");
    machine.kill();
    let machine = Machine::start_by(inner.dunlin(), "small", directory.path(), &["--memory", "128M"]);
    assert!(machine.is_running());
    assert_eq!(machine.said(), "");
    machine.kill();
    drop(machine);
    drop(inner);
}

#[test]
fn more_huge_pages_than_a_cgroup_has() {
    let _turn = turn();
    let Some(cgroup) = cgroup("hugetlb") else { return };
    if !free_huge_pages(32) {
        return;
    }
    let limit = cgroup.limit_huge_pages(16 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let qmp = format!("unix:{}/a", directory.path().display());
    let run = ["run", "--qmp", &qmp, "--memory", "64M", "--hugepages", "2M"];
    let figures = ["will take 64.00 MiB of huge pages", "has 16.00 MiB left of 16.00 MiB", text(&limit), "--force"];
    refused(&cgroup, &run, &figures);
    refused(&cgroup, &[&run[..], &["--incoming", "defer"]].concat(), &figures);
    let forced = ["--memory", "64M", "--hugepages", "2M", "--force", "--fill", "zero:100"];
    let machine = Machine::start_by(cgroup.dunlin(), "forced", directory.path(), &forced);
    assert!(machine.is_running());
    machine.kill();
}

/// Without /proc and cgroups, as in a jail, the machine says that it cannot tell, and goes on.
#[test]
fn where_nobody_can_tell() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let hide = "mount -t tmpfs none /sys && mount -t tmpfs none /proc && exec \"$0\" \"$@\"";
    let in_jail = |program: &str| {
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c", hide, program]);
        command
    };
    if !in_jail("true").output().is_ok_and(|probe| probe.status.success()) {
        println!("skipped: /proc cannot be hidden from a process here");
        return;
    }
    let machine = Machine::start_by(in_jail(common::DUNLIN), "jailed", directory.path(), &["--memory", "64M"]);
    assert!(machine.is_running());
    let said = machine.said();
    assert!(said.contains("cannot tell whether there is enough memory: could not read /proc/meminfo"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// Whether the pool has so many.
fn free_huge_pages(pages: u64) -> bool {
    let number = |name: &str| -> u64 {
        let text = std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let free = number("free_hugepages").saturating_sub(number("resv_hugepages"));
    if free < pages {
        println!("skipped: the pool has {free} huge pages free, not {pages}");
    }
    free >= pages
}

/// Moves a guest that leaves most of its RAM alone, out of a cgroup that has room for little. Reading the rest, to check or
/// to send it, must not take memory: neither here nor where it goes.
fn leaves(cgroup: &Cgroup, arguments: &[&str], outside: &Cgroup, arriving: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::start_by(cgroup.dunlin(), "source", directory.path(), arguments);
    println!("{}: {}", arguments.join(" "), source.verified());
    assert!(cgroup.holds(source.pid()), "the source is not in its cgroup");
    let there = [arriving, &["--incoming", "tcp:127.0.0.1:0", "--force"]].concat();
    let destination = Machine::start_by(outside.dunlin(), "destination", directory.path(), &there);
    // All ways of reading: looking for zeros, checksums, compressing, versions for deltas.
    source.set(json!({"multifd-compression": "lz4", "xbzrle": true, "downtime-limit": 10_000}));
    source.migrate(&destination.address());
    source.completed();
    destination.completed();
    println!("{}", destination.verified());
    assert!(outside.holds(destination.pid()) && destination.is_running());
    assert!(source.is_alive(), "the source was killed");
}

#[test]
fn reading_a_sparse_guest_takes_no_memory() {
    let _turn = turn();
    /// What the guest fills, and what the processes take besides, with room to spare.
    const MOST: u64 = 200 * MIB;
    let kvm = dunlin(&["run", "--machine", "kvm", "--memory", "0", "--qmp", "unix:/nowhere/a"]);
    let kvm = !String::from_utf8(kvm.stderr).unwrap().contains("/dev/kvm");
    let synthetic = ["--workload", "pattern=uniform,rate=200M/s,working-set=32M,content=text"];
    let payload = ["--machine", "kvm", "--payload", "dirty:working-set=32M,rate=20M/s"];
    for (machine, own, kind) in [("synthetic", &synthetic[..], &[][..]), ("kvm", &payload[..], &payload[..2])] {
        if machine == "kvm" && !kvm {
            println!("skipped: machines on KVM, for there is none");
            continue;
        }
        for pages in ["4K", "transparent"] {
            let (Some(little), Some(outside)) = (cgroup("memory"), cgroup("memory")) else { return };
            little.limit_memory(300 * MIB);
            let same = ["--memory", "4G", "--hugepages", pages];
            leaves(&little, &[&same[..], &["--fill", "zero:100"], own].concat(), &outside, &[&same[..], kind].concat());
            let peaks = [little.peak(), outside.peak()];
            println!("{machine}, {pages}: at most {:?} MiB", peaks.map(|bytes| bytes / MIB));
            assert!(peaks.iter().all(|peak| *peak <= MOST), "{machine}, {pages}: {peaks:?}");
        }
    }
}

#[test]
fn reading_sparse_huge_pages_takes_none() {
    let _turn = turn();
    let (Some(little), Some(outside)) = (cgroup("hugetlb"), cgroup("memory")) else { return };
    if !free_huge_pages(32) {
        return;
    }
    little.limit_huge_pages(16 * MIB);
    let same = ["--memory", "64M"];
    let more = ["--hugepages", "2M", "--force", "--fill", "zero:100"];
    let workload = ["--workload", "pattern=uniform,rate=20M/s,working-set=8M,content=text"];
    leaves(&little, &[&same[..], &more, &workload].concat(), &outside, &same);
    let taken = little.huge_pages();
    assert!(taken <= 8 * MIB, "{taken} bytes of huge pages for 8 MiB");
}
