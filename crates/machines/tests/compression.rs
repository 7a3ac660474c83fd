//! Compression where it pays, and where it does not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use common::{MIB, empty, move_guest, parameters, source_with};
use dunlin::Report;
use dunlin_machines::Backing;

fn moved(memory: u64, fill: &str, set: &[(&str, &str)]) -> Report {
    let (source, destination) = (source_with(Backing::Base, memory, 1, "idle", 7, fill), empty(memory, 1));
    let (report, _) = move_guest(&source, &destination, "tcp:127.0.0.1:0", &parameters(set));
    destination.assert_good(&format!("{fill}, {set:?}"));
    report
}

/// Over a slow link every level saves what it can, and the level that was asked for is used.
#[test]
fn a_slow_link_is_used_to_the_full() {
    for (compression, level, most) in [("lz4", "1", 0.56), ("zstd", "1", 0.4), ("zstd", "9", 0.38)] {
        let set = [
            ("multifd-compression", compression),
            ("multifd-zstd-level", level),
            ("multifd-channels", "1"),
            ("max-bandwidth", "5M/s"),
        ];
        let report = moved(16 * MIB, "text:100", &set);
        let part = report.ram.transferred_bytes as f64 / (16 * MIB) as f64;
        println!("{compression} {level}: {:.1} % of the bytes", part * 100.0);
        assert!(part < most, "{compression} {level}: {part}");
        let used = report.channels[0].compression.unwrap();
        assert_eq!(used.level, Some(level.parse().unwrap()), "{compression}: {used:?}");
    }
}

/// Over a link without a limit trials that do not pay take at most 5 % of what a channel's thread takes of a processor,
/// whatever the level and the pages.
#[test]
fn trials_take_little_of_an_unlimited_link() {
    for (compression, level) in [("lz4", "1"), ("zstd", "1"), ("zstd", "9"), ("zstd", "22")] {
        for fill in ["text:100", "random:100", "zero:90,text:10"] {
            let set = [("multifd-compression", compression), ("multifd-zstd-level", level)];
            let report = moved(256 * MIB, fill, &set);
            for channel in &report.channels {
                let used = channel.compression.unwrap();
                let part = used.wasted_seconds / channel.busy_seconds;
                println!("{compression} {level}, {fill}: {:.2} % of the CPU time", part * 100.0);
                // And one trial, whose cost nobody knew.
                let most = channel.busy_seconds * 0.05 + 1e-3;
                assert!(used.wasted_seconds <= most, "{compression} {level}, {fill}: {used:?} of {channel:?}");
            }
        }
    }
}
