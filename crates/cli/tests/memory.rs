//! What a migration takes of the host's memory beyond the guest's RAM, on either side.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Machine, turn};
use dunlin::Status;
use serde_json::json;

const MIB: u64 = 1 << 20;
/// The promise, on either side at 8 channels, beside the delta cache.
const LIMIT: u64 = 64 * MIB;
const CACHE: u64 = 32 * MIB;

/// Memory of a process that is no file's (a synthetic machine's RAM is a file's), and its page tables.
fn own_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let lines = status.lines().filter(|line| line.starts_with("RssAnon:") || line.starts_with("VmPTE:"));
    lines.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024).sum()
}

/// The most that both sides took at any time of a migration, beyond what they had before.
fn measure(compression: &str, level: i32, integrity: &str) -> [u64; 2] {
    let directory = tempfile::tempdir().unwrap();
    let destination = Machine::destination(directory.path(), "512M");
    let workload = "pattern=uniform,rate=200M/s,working-set=128M,content=counter";
    let source = Machine::source(directory.path(), "512M", workload, &["--fill", "random:50,text:50"]);
    let uri = destination.address();
    source.set(json!({
        "multifd-channels": 8, "multifd-compression": compression, "multifd-zstd-level": level,
        "integrity": integrity, "xbzrle": true, "xbzrle-cache-size": CACHE,
        // Slow enough for some rounds, and for the compressor to be worth it.
        "max-bandwidth": 150 * MIB,
    }));
    let pids = [source.pid(), destination.pid()];
    let before = pids.map(own_bytes);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = before;
            while !done.load(Ordering::Relaxed) {
                for (most, pid) in most.iter_mut().zip(pids) {
                    *most = own_bytes(pid).max(*most);
                }
                thread::sleep(Duration::from_millis(2));
            }
            most
        });
        source.migrate(&uri);
        thread::sleep(Duration::from_millis(2500));
        source.set(json!({"max-bandwidth": 0}));
        let report = source.completed();
        assert_eq!(report.status, Status::Completed);
        destination.completed();
        let (pages, compressed) = (report.ram.pages, report.ram.pages.lz4 + report.ram.pages.zstd);
        assert!(
            pages.delta > 0 && (compression == "none" || compressed > 0),
            "what was to take memory was not used: {pages}"
        );
        done.store(true, Ordering::Relaxed);
        let most = watch.join().unwrap();
        [most[0] - before[0], most[1] - before[1]]
    })
}

#[test]
fn a_migration_takes_little_memory() {
    let _turn = turn();
    for (compression, level, integrity) in [
        ("none", 1, "none"),
        ("none", 1, "checksum"),
        ("lz4", 1, "checksum"),
        ("zstd", 1, "checksum"),
        ("zstd", 22, "none"),
    ] {
        let [source, destination] = measure(compression, level, integrity);
        println!(
            "8 channels, {compression} {level}, integrity {integrity}, a delta cache of {} MiB: {:.1} MiB at the source, {:.1} at the destination",
            CACHE / MIB,
            source as f64 / MIB as f64,
            destination as f64 / MIB as f64
        );
        assert!(source <= LIMIT + CACHE, "{source} bytes at the source");
        assert!(destination <= LIMIT, "{destination} bytes at the destination");
    }
}
