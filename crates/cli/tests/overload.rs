//! A guest that dirties its memory faster than the link carries it: the migration goes on and says why it does not
//! converge, can be cancelled, and leaves the guest as it was; with more bandwidth it converges.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::time::Duration;

use common::{Machine, PATIENCE, dunlin, turn, until};
use dunlin::{GuestPlace, Report, Status};
use serde_json::json;

const MIB: u64 = 1 << 20;
const MEMORY: &str = "128M";
/// 16 MiB, dirty again many times a second: 800 ms at `SLOW`.
const WORKLOAD: &str = "pattern=uniform,rate=200M/s,working-set=16M,content=random";
const SLOW: u64 = 20 * MIB;

struct Pair {
    source: Machine,
    destination: Machine,
    uri: String,
    _directory: tempfile::TempDir,
}

/// A migration that does not converge, and knows it.
fn stuck() -> (Pair, Report) {
    let directory = tempfile::tempdir().unwrap();
    let destination = Machine::destination(directory.path(), MEMORY);
    let source = Machine::source(directory.path(), MEMORY, WORKLOAD, &["--fill", "zero:80,random:20"]);
    let uri = destination.address();
    source.set(json!({"max-bandwidth": SLOW}));
    source.migrate(&uri);
    let report = until("it is seen not to converge", PATIENCE, || {
        let report = source.report().unwrap();
        assert_eq!(report.error, None);
        report.not_converging.is_some().then_some(report)
    });
    (Pair { source, destination, uri, _directory: directory }, report)
}

#[test]
fn goes_on_says_why_and_is_cancelled() {
    let _turn = turn();
    let (pair, report) = stuck();
    let why = report.not_converging.unwrap();
    println!("{} rounds, {:.1} s: {why}", report.rounds.len(), report.total_seconds);
    assert_eq!(report.status, Status::Active);
    assert!(report.rounds.len() >= 4, "{:?}", report.rounds);
    for word in ["dirties", "can be sent", "max-bandwidth", "downtime-limit"] {
        assert!(why.contains(word), "{word:?} is missing: {why}");
    }

    // The rates: what the link carries is what it may; pages are dirtied once in a round, however often written.
    let (bandwidth, dirty) = (report.bandwidth_bytes_per_second, report.dirty_bytes_per_second);
    assert!((SLOW * 9 / 10..=SLOW).contains(&bandwidth), "bandwidth {bandwidth}");
    assert!((SLOW..=220 * MIB).contains(&dirty), "dirty rate {dirty}");
    for round in &report.rounds[1..] {
        assert!((8 * MIB..=17 * MIB).contains(&round.ram_bytes), "{round:?}");
        assert!((0.3..2.0).contains(&round.seconds), "{round:?}");
        assert!(round.predicted_downtime_seconds > report.downtime_limit_seconds, "{round:?}");
        let measured = round.transferred_bytes as f64 / round.seconds;
        assert!(measured < SLOW as f64 * 1.1, "{round:?}");
    }

    // It goes on, and says so to whoever asks.
    until("two more rounds", PATIENCE, || {
        (pair.source.report().unwrap().rounds.len() >= report.rounds.len() + 2).then_some(())
    });
    let at = format!("unix:{}", pair.source.qmp.display());
    let status = String::from_utf8(dunlin(&["status", "--qmp", &at]).stdout).unwrap();
    println!("{status}");
    assert!(status.contains("it does not converge: the guest dirties"), "{status}");
    let status = dunlin(&["status", "--qmp", &at, "--json"]).stdout;
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    assert!(status["migration"]["not_converging"].is_string(), "{status:#}");
    assert!(pair.source.is_running());

    let cancelled = dunlin(&["cancel", "--qmp", &at]);
    assert!(cancelled.status.success(), "{cancelled:?}");
    println!("{}", String::from_utf8(cancelled.stdout).unwrap().trim_end());
    let report = pair.source.ended();
    assert_eq!((report.status, report.guest), (Status::Cancelled, GuestPlace::RunningAtSource));
    assert!(pair.source.is_running());
    println!("at the source: {}", pair.source.verified());
    assert!(!pair.destination.is_running());

    // The same machine again, with nothing in its way.
    pair.source.set(json!({"max-bandwidth": 0}));
    pair.source.migrate(&pair.uri);
    let report = pair.source.completed();
    assert_eq!(report.not_converging, None);
    pair.destination.completed();
    assert!(pair.destination.is_running());
    println!("at the destination: {}", pair.destination.verified());
}

#[test]
fn more_bandwidth_under_way_makes_it_converge() {
    let _turn = turn();
    let (pair, before) = stuck();
    pair.source.set(json!({"max-bandwidth": 0}));
    let report = pair.source.completed();
    println!("{} rounds, then {} more", before.rounds.len(), report.rounds.len() - before.rounds.len());
    assert_eq!(report.not_converging, None);
    assert!(report.downtime_seconds < report.downtime_limit_seconds, "{report:?}");
    pair.destination.completed();
    println!("{}", pair.destination.verified());
}

#[test]
fn a_higher_downtime_limit_under_way_makes_it_converge() {
    let _turn = turn();
    let (pair, _) = stuck();
    pair.source.set(json!({"downtime-limit": 3000}));
    let report = pair.source.completed();
    println!("downtime {:.0} ms", report.downtime_seconds * 1e3);
    assert!(report.downtime_seconds < 3.0, "{report:?}");
    pair.destination.completed();
    println!("{}", pair.destination.verified());
}

/// As a user asks for it: `dunlin migrate`, whose progress and end are on the terminal.
#[test]
fn interrupted_on_the_command_line() {
    let _turn = turn();
    let (pair, _) = stuck();
    pair.source.execute("migrate_cancel", json!({}));
    pair.source.ended();
    let at = format!("unix:{}", pair.source.qmp.display());
    let mut command = std::process::Command::new(common::DUNLIN)
        .args(["migrate", "--qmp", &at, &pair.uri])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    until("it runs", PATIENCE, || (!pair.source.report().unwrap().rounds.is_empty()).then_some(()));
    std::thread::sleep(Duration::from_millis(200));
    let pid = rustix::process::Pid::from_child(&command);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let code = command.wait().unwrap().code();
    assert_eq!(code, Some(130));
    assert_eq!(pair.source.ended().status, Status::Cancelled);
    assert!(pair.source.is_running());
    println!("{}", pair.source.verified());
}
