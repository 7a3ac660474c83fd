//! What `query-migrate` says of a real migration, on both sides, against the report, whose figures are checked against
//! counts of their own elsewhere, and against each other.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, turn};
use dunlin::Report;
use serde_json::{Value, json};

const PAGE: u64 = 4096;

fn check(machine: &Machine, report: &Report, took: Duration) {
    let info = machine.execute("query-migrate", json!({}));
    let (ram, name) = (&info["ram"], machine.name);
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{name}: {value} in {info}"));
    let milliseconds = |seconds: f64| (seconds * 1e3).round() as u64;
    assert_eq!(info["status"], "completed", "{name}");
    for (figure, seconds) in [
        ("total-time", report.total_seconds),
        ("setup-time", report.setup_seconds),
        ("downtime", report.downtime_seconds),
    ] {
        assert_eq!(number(&info[figure]), milliseconds(seconds), "{name}: {figure}");
    }
    let pages = report.ram.pages;
    let compressed = pages.plain + pages.lz4 + pages.zstd;
    let last = report.rounds.last().unwrap();
    let of_channels: u64 = report.channels.iter().map(|channel| channel.transferred_bytes).sum();
    for (figure, wanted) in [
        ("total", 64 << 20),
        ("remaining", 0),
        ("transferred", report.ram.transferred_bytes),
        ("duplicate", pages.zero),
        ("normal", compressed),
        ("normal-bytes", compressed * PAGE),
        ("page-size", PAGE),
        ("dirty-pages-rate", report.dirty_bytes_per_second / PAGE),
        ("multifd-bytes", of_channels),
        ("precopy-bytes", report.precopy_bytes),
        ("downtime-bytes", report.ram.transferred_bytes - report.precopy_bytes),
    ] {
        assert_eq!(number(&ram[figure]), wanted, "{name}: {figure}");
    }
    // What went when the guest stood still are the last round's pages and the device state. The destination may hear a
    // little late that it stands still, and heartbeats count in both.
    let stopped = last.transferred_bytes + report.device_state_bytes;
    let counted = number(&ram["downtime-bytes"]);
    let early = if name == "destination" { stopped } else { 0 };
    assert!((stopped - early..stopped + 16_384).contains(&counted), "{name}: {counted} of {stopped}");
    let seconds = report.total_seconds - report.setup_seconds;
    let mbps = report.ram.transferred_bytes as f64 * 8.0 / 1e6 / seconds;
    assert!((ram["mbps"].as_f64().unwrap() / mbps - 1.0).abs() < 1e-3, "{name}: {} of {mbps}", ram["mbps"]);
    // A second of a limited link is no more than it may carry, and what it took by a clock of our own.
    assert!(mbps < 1.1 * 20.0 * 1.048_576 * 8.0, "{name}: {mbps}");
    let ours = report.ram.transferred_bytes as f64 * 8.0 / 1e6 / took.as_secs_f64();
    assert!((0.5..=1.0).contains(&(ours / mbps)), "{name}: {mbps}, {ours} by our clock");
    assert!(number(&ram["dirty-sync-count"]) > report.rounds.last().map_or(0, |round| u64::from(round.number)));
}

#[test]
fn it_has_qemus_units() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let destination = Machine::destination(directory.path(), "64M");
    let source =
        Machine::source(directory.path(), "64M", "pattern=uniform,rate=2M/s,working-set=4M,content=random", &[]);
    source.set(json!({"max-bandwidth": 20 << 20, "multifd-channels": 3}));
    let began = Instant::now();
    source.migrate(&destination.address());
    let (here, there) = (source.completed(), destination.completed());
    let took = began.elapsed();
    common::until("Done", common::PATIENCE, || destination.report().filter(|report| report.downtime_parts.is_some()));
    let there = destination.report().unwrap_or(there);
    check(&source, &here, took);
    check(&destination, &there, took);
    destination.verified();
}

/// Every counter that `query-migrate` has, on both sides, from the first answer to the last: none ever goes back, also
/// not while the guest is stopped, which takes a second here.
#[test]
fn no_counter_goes_back() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let destination = Machine::destination(directory.path(), "16M");
    let workload = "pattern=uniform,rate=20M/s,working-set=4M,content=random";
    let source = Machine::source(directory.path(), "16M", workload, &[]);
    source.set(json!({"max-bandwidth": 4 << 20, "downtime-limit": 5000, "xbzrle": true}));
    source.migrate(&destination.address());
    let counters = [
        "transferred",
        "duplicate",
        "normal",
        "normal-bytes",
        "dirty-sync-count",
        "multifd-bytes",
        "precopy-bytes",
        "downtime-bytes",
    ];
    let mut looks = 0;
    let mut before = [json!({}), json!({})];
    let mut growing = 0;
    loop {
        let now = [&source, &destination].map(|machine| machine.execute("query-migrate", json!({})));
        for (before, now) in before.iter().zip(&now) {
            let figures = counters.map(|name| (name, &before["ram"][name], &now["ram"][name])).into_iter();
            let times = ["total-time", "setup-time", "downtime"].map(|name| (name, &before[name], &now[name]));
            let cache = ["bytes", "pages", "cache-miss", "overflow"];
            let cache = cache.map(|name| (name, &before["xbzrle-cache"][name], &now["xbzrle-cache"][name]));
            for (name, before, after) in figures.chain(times).chain(cache) {
                let (before, after) = (before.as_u64().unwrap_or(0), after.as_u64().unwrap_or(0));
                assert!(after >= before, "{name}: {before}, then {after}: {now}");
            }
            growing += u32::from(now["ram"]["downtime-bytes"].as_u64() > before["ram"]["downtime-bytes"].as_u64());
        }
        looks += 1;
        let over = now.iter().all(|info| info["status"] == "completed" && info.get("downtime").is_some());
        before = now;
        if over {
            break;
        }
        assert!(source.report().is_none_or(|report| report.error.is_none()));
    }
    println!("{looks} looks, in {growing} of them something had gone since the guest was stopped");
    assert!(growing > 10, "{growing} of {looks}");
}

/// What is missing of an answer with this status.
fn missing(info: &Value) -> Vec<&'static str> {
    let wanted: &[&'static str] = match info["status"].as_str() {
        None => &[],
        Some("setup" | "active" | "pre-switchover" | "device" | "cancelling") => {
            &["total-time", "setup-time", "ram", "expected-downtime"]
        }
        Some("completed") => &["total-time", "setup-time", "ram", "downtime"],
        Some("failed" | "cancelled") => &["total-time", "setup-time", "ram", "error-desc"],
        Some(other) => panic!("{other}"),
    };
    wanted.iter().copied().filter(|member| info[*member].is_null()).collect()
}

/// Every answer of every moment has all that its status calls for, on both sides: of migrations that complete, that are
/// cancelled and that fail.
#[test]
fn no_answer_is_short_of_anything() {
    let _turn = turn();
    for end in ["completed", "completed", "completed", "cancelled", "failed"] {
        let directory = tempfile::tempdir().unwrap();
        let destination = Machine::destination(directory.path(), "32M");
        let source = Machine::source(directory.path(), "32M", "pattern=uniform,rate=2M/s,working-set=4M", &[]);
        let over = Arc::new(AtomicBool::new(false));
        let askers = [&source, &destination].map(|machine| {
            let (mut client, over, name) = (machine.connect(), over.clone(), machine.name);
            thread::spawn(move || {
                let (mut asked, mut short) = (0u64, Vec::new());
                while !over.load(Ordering::Acquire) {
                    let Ok(info) = client.execute("query-migrate", json!({})) else { break };
                    asked += 1;
                    let missing = missing(&info);
                    // A destination waits for a guest somewhere.
                    let is_lost =
                        name == "destination" && info["status"] == "setup" && info["socket-address"].is_null();
                    // What moved with the guest stopped has moved when it runs there.
                    let still = &info["ram"]["downtime-bytes"];
                    let unmoved = info["status"] == "completed" && still.as_u64().unwrap() == 0;
                    if !missing.is_empty() || is_lost || unmoved {
                        short.push(format!("{name}: without {missing:?}: {info}"));
                    }
                }
                (asked, short)
            })
        });
        if end != "completed" {
            source.set(json!({"max-bandwidth": 4 << 20}));
        }
        source.migrate(&destination.address());
        match end {
            "cancelled" => {
                source.execute("migrate_cancel", json!({}));
            }
            "failed" => {
                common::until("it moves", common::PATIENCE, || {
                    source.report().filter(|report| report.ram.transferred_bytes > 1 << 20)
                });
                destination.kill();
            }
            _ => drop(destination.completed()),
        }
        assert_eq!(source.ended().status.to_string(), end);
        if end == "completed" {
            common::until("Done", common::PATIENCE, || {
                destination.report().filter(|report| report.cpu_seconds.source.is_some())
            });
        }
        over.store(true, Ordering::Release);
        for asker in askers {
            let (asked, short) = asker.join().unwrap();
            println!("{end}: {asked} answers");
            assert!(short.is_empty(), "{} of {asked} answers: {}", short.len(), short[0]);
        }
    }
}
