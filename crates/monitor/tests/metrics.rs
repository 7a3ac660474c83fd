//! Metrics: the text, held to what was written down and to Python's parser; the server, by scrapers of every kind.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dunlin::error::Phase;
use dunlin::report::{ChannelReport, DowntimeParts, ErrorReport, PageCounts, Round};
use dunlin::{GuestPlace, Report, Side, Status};
use dunlin_monitor::metrics::{MetricsServer, exposition};

fn report() -> Report {
    let mut report = Report::new(Side::Source, GuestPlace::RunningAtDestination);
    report.status = Status::Completed;
    report.total_seconds = 2.5;
    report.setup_seconds = 0.0125;
    report.downtime_seconds = 0.0142;
    report.downtime_limit_seconds = 0.3;
    report.predicted_downtime_seconds = Some(0.0129);
    report.downtime_parts = Some(DowntimeParts { pause_seconds: 0.25, ram_seconds: 0.004, ..Default::default() });
    report.ram.total_bytes = 1 << 30;
    report.ram.transferred_bytes = 700 << 20;
    report.ram.pages = PageCounts { zero: 120_000, plain: 213_000, ..PageCounts::default() };
    report.delta.hits = 7;
    report.device_state_bytes = 9000;
    report.bandwidth_bytes_per_second = 280 << 20;
    report.dirty_bytes_per_second = 17 << 20;
    report.cpu_seconds.source = Some(1.25);
    report.rounds = vec![Round {
        number: 4,
        seconds: 0.5,
        ram_bytes: 1 << 30,
        transferred_bytes: 350 << 20,
        pages: PageCounts::default(),
        dirty_bytes: 4096,
        bandwidth_bytes_per_second: 1,
        dirty_bytes_per_second: 2,
        predicted_downtime_seconds: 0.01,
    }];
    report.vcpu_throttle_percent = vec![30, 0];
    report.channels = (0..2)
        .map(|index| ChannelReport {
            index,
            transferred_bytes: 350 << 20,
            frames: 17,
            busy_seconds: 0.75,
            ..Default::default()
        })
        .collect();
    report
}

fn failed() -> Report {
    let mut failed = report();
    failed.status = Status::Failed;
    failed.guest = GuestPlace::RunningAtSource;
    failed.predicted_downtime_seconds = None;
    failed.downtime_parts = None;
    failed.not_converging = Some("the guest is faster".to_owned());
    failed.error = Some(ErrorReport {
        message: "source, precopy: lost \"it\"\n".to_owned(),
        side: Side::Source,
        phase: Phase::Precopy,
        guest: GuestPlace::RunningAtSource,
    });
    failed
}

/// Compares with what lies there, or puts it there with `DUNLIN_UPDATE_GOLDEN=1`.
fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("DUNLIN_UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    }
    let wanted = fs::read_to_string(&path).unwrap();
    assert!(wanted == text, "{} differs; DUNLIN_UPDATE_GOLDEN=1 writes it anew. Now:\n{text}", path.display());
}

#[test]
fn the_text_is_what_was_written_down() {
    golden("metrics-completed.txt", &exposition(Some(&report())));
    golden("metrics-failed.txt", &exposition(Some(&failed())));
    assert_eq!(exposition(None).lines().count(), 3);
}

#[test]
fn a_destination_has_no_downtime_before_it_is_told() {
    let has_downtime = |report: &Report| exposition(Some(report)).contains("dunlin_migration_downtime_seconds{");
    let mut arrived = report();
    assert!(has_downtime(&arrived));
    arrived.side = Side::Destination;
    assert!(has_downtime(&arrived));
    (arrived.downtime_seconds, arrived.downtime_parts) = (0.0, None);
    assert!(!has_downtime(&arrived));
    arrived.side = Side::Source;
    assert!(has_downtime(&arrived));
}

/// Where Python's client of Prometheus is, if it is anywhere.
fn python_client() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/python");
    let found = Command::new("python3")
        .args(["-c", "import prometheus_client.parser"])
        .env("PYTHONPATH", &target)
        .output()
        .is_ok_and(|output| output.status.success());
    found.then_some(target)
}

#[test]
fn a_parser_that_is_not_ours_reads_it() {
    let Some(python_path) = python_client() else {
        println!("skipped: no prometheus_client; python3 -m pip install --target target/python prometheus_client");
        return;
    };
    let program = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families as parse
rows = []
for family in parse(sys.stdin.read()):
    assert family.documentation and family.type in ('counter', 'gauge'), family
    if family.type == 'gauge':
        assert not family.name.endswith('_total'), family
    for sample in family.samples:
        rows.append([family.type, sample.name, sample.labels, sample.value])
print(json.dumps(rows))
";
    for report in [report(), failed()] {
        let mut child = Command::new("python3")
            .args(["-c", program])
            .env("PYTHONPATH", &python_path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(exposition(Some(&report)).as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let rows: Vec<(String, String, serde_json::Value, f64)> = serde_json::from_slice(&output.stdout).unwrap();
        let value = |name: &str, label: &str, wanted: &str| {
            let found: Vec<f64> = rows
                .iter()
                .filter(|(_, sample, labels, _)| sample == name && (label.is_empty() || labels[label] == wanted))
                .map(|(.., value)| *value)
                .collect();
            assert_eq!(found.len(), 1, "{name} {label}={wanted}: {found:?}");
            found[0]
        };
        assert_eq!(value("dunlin_migration_transferred_bytes_total", "", ""), f64::from(700 << 20));
        assert_eq!(value("dunlin_migration_pages_total", "kind", "zero"), 120_000.0);
        assert_eq!(value("dunlin_migration_channel_frames_total", "channel", "1"), 17.0);
        assert_eq!(value("dunlin_migration_duration_seconds", "side", "source"), 2.5);
        assert_eq!(value("dunlin_migration_status", "status", &report.status.to_string()), 1.0);
        assert_eq!(value("dunlin_migration_status", "status", "active"), 0.0);
        assert_eq!(value("dunlin_migration_vcpu_throttle_ratio", "vcpu", "0"), 0.3);
        assert_eq!(value("dunlin_migration_channel_busy_seconds_total", "channel", "0"), 0.75);
        assert_eq!(value("dunlin_migration_rounds_total", "", ""), 4.0);
    }
}

fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn server(looks: &Arc<AtomicU64>) -> MetricsServer {
    let looks = Arc::clone(looks);
    let source = move || {
        looks.fetch_add(1, Ordering::Relaxed);
        Some(report())
    };
    MetricsServer::start("127.0.0.1:0", Arc::new(source)).unwrap()
}

#[test]
fn scrapers_of_every_kind() {
    let looks = Arc::default();
    let server = server(&looks);
    let address = server.address();
    for (request, wanted) in [
        ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK\r\n"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 405 "),
        ("GET /else HTTP/1.1\r\n\r\n", "HTTP/1.1 404 "),
        ("what is this\r\n\r\n", "HTTP/1.1 400 "),
    ] {
        let answer = ask(address, request);
        assert!(answer.starts_with(wanted), "{request:?}: {answer}");
    }
    let long = format!("GET /metrics HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(100_000));
    assert!(ask(address, &long).starts_with("HTTP/1.1 431 "));
    assert_eq!(looks.load(Ordering::Relaxed), 1, "a report is made for those who get it");
    let scrapers: Vec<_> =
        (0..40).map(|_| thread::spawn(move || ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))).collect();
    let first = exposition(Some(&report()));
    for scraper in scrapers {
        let answer = scraper.join().unwrap();
        assert_eq!(answer.split_once("\r\n\r\n").map(|(_, body)| body), Some(first.as_str()));
    }
}

#[test]
fn the_slow_and_the_silent_do_not_hold_it_up() {
    let server = server(&Arc::default());
    let address = server.address();
    let silent: Vec<TcpStream> = (0..10).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut slow = TcpStream::connect(address).unwrap();
    slow.write_all(b"GET /metrics HT").unwrap();
    let begun = Instant::now();
    assert!(ask(address, "GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 "));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    slow.write_all(b"TP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    for mut stream in silent {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    }
    let _open = TcpStream::connect(address).unwrap();
    let begun = Instant::now();
    drop(server);
    assert!(begun.elapsed() < Duration::from_secs(1), "its end took {:?}", begun.elapsed());
    assert!(TcpStream::connect(address).is_err(), "it still listens");
}

#[test]
fn an_address_that_cannot_be_had() {
    let server = server(&Arc::default());
    let taken = server.address().to_string();
    for (address, wanted) in [(taken.as_str(), "in use"), ("nowhere", "nowhere"), ("no.such.host.invalid:1", "no.such")]
    {
        let error = MetricsServer::start(address, Arc::new(|| None)).unwrap_err().to_string();
        assert!(error.contains("could not serve metrics on") && error.contains(wanted), "{error}");
    }
}
