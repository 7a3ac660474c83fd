//! `dunlin demo`: one command that moves a machine between two processes and proves that nothing was lost.
//!
//! `DUNLIN_TEST_FULL=1`: every combination of channels, transport, vCPUs, pattern and content, and memory up to 8 GiB
//! where it fits; otherwise a sample in which every two of them meet.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::fs;
use std::time::Instant;

use common::{dunlin, fails, full, turn};
use serde_json::Value;

const CHANNELS: [&str; 4] = ["1", "2", "4", "8"];
const TRANSPORTS: [&str; 2] = ["tcp", "unix"];
const VCPUS: [&str; 2] = ["1", "4"];
const PATTERNS: [&str; 4] = ["uniform", "sequential", "zipf", "hotcold"];
const CONTENTS: [&str; 4] = ["random", "text", "sparse", "counter"];

/// Runs it; its one object on standard output.
fn demo(arguments: &[&str]) -> Value {
    let arguments = [&["demo", "--json"], arguments].concat();
    let began = Instant::now();
    let output = dunlin(&arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "dunlin {}: {:?}: {said}", arguments.join(" "), output.status.code());
    let object: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("not one JSON object ({error}): {}", String::from_utf8_lossy(&output.stdout)));
    assert_eq!(object["verified"], true, "{object:#}");
    let report = &object["report"];
    println!(
        "{:<150} {} rounds, downtime {:.1} ms (predicted {:.1} ms), {:.2} s of {:.2} s",
        arguments.join(" "),
        report["rounds"].as_array().unwrap().len(),
        report["downtime_seconds"].as_f64().unwrap() * 1e3,
        report["predicted_downtime_seconds"].as_f64().unwrap() * 1e3,
        report["total_seconds"].as_f64().unwrap(),
        began.elapsed().as_secs_f64(),
    );
    object
}

#[test]
fn the_json_object() {
    let _turn = turn();
    let object = demo(&["--memory", "64M"]);
    let report = &object["report"];
    assert_eq!(report["status"], "completed");
    for name in ["total_seconds", "setup_seconds", "downtime_seconds", "predicted_downtime_seconds"] {
        let seconds = report[name].as_f64().unwrap_or_else(|| panic!("{name}: {report:#}"));
        assert!(seconds > 0.0 && seconds < 30.0, "{name}: {seconds}");
    }
    let total = report["total_seconds"].as_f64().unwrap();
    assert!(report["downtime_seconds"].as_f64().unwrap() < total, "{report:#}");
    assert!(report["setup_seconds"].as_f64().unwrap() < total, "{report:#}");
    assert!(report["bandwidth_bytes_per_second"].as_u64().unwrap() > 0, "{report:#}");

    let ram = &report["ram"];
    let count = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("not a number: {ram:#}"));
    assert_eq!(count(&ram["total_bytes"]), 64 << 20);
    assert_eq!(count(&ram["remaining_bytes"]), 0);
    let (zero, plain) = (count(&ram["pages"]["zero"]), count(&ram["pages"]["plain"]));
    assert!(zero + plain >= (64 << 20) / 4096, "{ram:#}");
    assert!(count(&ram["transferred_bytes"]) >= plain * 4096, "{ram:#}");

    // The rounds are what the totals are made of.
    let rounds = report["rounds"].as_array().unwrap();
    assert!(rounds.len() >= 2, "{report:#}");
    let sum = |path: &str| rounds.iter().map(|round| round.pointer(path).unwrap().as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("/pages/zero"), sum("/pages/plain")), (zero, plain));
    assert!(sum("/transferred_bytes") <= count(&ram["transferred_bytes"]), "{report:#}");

    for side in ["source", "destination"] {
        let seconds = report["cpu_seconds"][side].as_f64();
        assert!(seconds.is_some_and(|seconds| seconds > 0.0 && seconds < 60.0), "{side}: {report:#}");
    }
}

#[test]
fn for_people() {
    let _turn = turn();
    let output = dunlin(&["demo", "--memory", "64M", "--workload", "idle"]);
    let text = String::from_utf8(output.stdout).unwrap();
    println!("{text}");
    assert!(output.status.success());
    for word in ["completed in ", "it is running at the destination", "downtime", "rounds", "verified:"] {
        assert!(text.contains(word) || word == "rounds" && text.contains("round"), "{word:?} is missing: {text}");
    }
}

#[test]
fn channels_transports_vcpus_patterns_and_contents() {
    let _turn = turn();
    let mut sample = Vec::new();
    if full() {
        for channels in CHANNELS {
            for transport in TRANSPORTS {
                for vcpus in VCPUS {
                    for pattern in PATTERNS {
                        sample.extend(CONTENTS.map(|content| [channels, transport, vcpus, pattern, content]));
                    }
                }
            }
        }
    } else {
        // A Latin square of channels, patterns and contents; the other two are spread over it.
        for i in 0..4 {
            sample.extend([0, 1, 2, 3].map(|j| {
                let (transport, vcpus) = (TRANSPORTS[(i + j / 2) % 2], VCPUS[(i / 2 + j) % 2]);
                [CHANNELS[i], transport, vcpus, PATTERNS[j], CONTENTS[(i + j) % 4]]
            }));
        }
    }
    for [channels, transport, vcpus, pattern, content] in &sample {
        let object = demo(&[
            "--memory",
            "64M",
            "--transport",
            transport,
            "--vcpus",
            vcpus,
            "--set",
            &format!("multifd-channels={channels}"),
            "--workload",
            &format!("pattern={pattern},rate=100M/s,working-set=16M,content={content}"),
        ]);
        let used = object["report"]["channels"].as_array().unwrap();
        assert_eq!(used.len().to_string(), **channels, "{object:#}");
        assert!(used.iter().all(|channel| channel["frames"].as_u64().unwrap() > 0), "{used:#?}");
        assert!(object["verification"]["pages_written"].as_u64().unwrap() > 0, "{object:#}");
    }
    println!("{} combinations, all verified", sample.len());
}

#[test]
fn memory_sizes() {
    let _turn = turn();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:")).unwrap();
    let available = line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
    let sizes: &[u64] = if full() { &[64, 100, 512, 1024, 2048, 4096, 8192] } else { &[64, 100, 512] };
    for mib in sizes {
        if available < (mib << 20) * 5 / 2 {
            println!("skipped: two machines of {mib} MiB do not fit in the memory that is free");
            continue;
        }
        demo(&["--memory", &format!("{mib}M"), "--vcpus", "2"]);
    }
}

#[test]
fn that_fails() {
    let _turn = turn();
    for machine in ["synthetic", "kvm"] {
        fails(&["demo", "--machine", machine, "--memory", "0"], 1, &["memory"]);
    }
    let synthetic = ["demo", "--machine", "synthetic", "--memory", "900T"];
    fails(&synthetic, 1, &["900.00 TiB", "this host has ", "--force"]);
    let forced = dunlin(&[&synthetic[..], &["--force"]].concat());
    let said = String::from_utf8(forced.stderr).unwrap();
    assert!(said.contains("goes on because of --force") && said.contains("could not map the memory"), "{said}");
    fails(&["demo", "--memory", "900T"], 1, &["900.00 TiB", "memory"]);
}
