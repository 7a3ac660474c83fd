//! The page: what it says, that nothing from a file becomes markup, and that nothing in a file can spoil it.

use std::io::Write;

use dunlin::error::Phase;
use dunlin::report::{ChannelReport, DowntimeParts, ErrorReport, PageCounts, Round};
use dunlin::{GuestPlace, Side};
use serde_json::{Value, json};

use super::*;

const MIB: u64 = 1 << 20;

fn round(number: u32) -> Round {
    Round {
        number,
        seconds: 0.5,
        ram_bytes: 64 * MIB,
        transferred_bytes: 50 * MIB,
        pages: PageCounts { zero: 10, plain: 12_000, ..PageCounts::default() },
        dirty_bytes: 8 * MIB,
        bandwidth_bytes_per_second: 100 * MIB,
        dirty_bytes_per_second: 16 * MIB,
        predicted_downtime_seconds: if number == 1 { f64::INFINITY } else { 0.08 },
    }
}

fn report(half_seconds: u32) -> Report {
    let mut report = Report::new(Side::Source, GuestPlace::RunningAtSource);
    report.status = Status::Active;
    report.summary = format!("sending RAM: round {}", half_seconds + 1);
    report.session = Some("5e55".to_owned());
    report.total_seconds = f64::from(half_seconds) / 2.0;
    report.downtime_limit_seconds = 0.3;
    report.ram.total_bytes = 1 << 30;
    report.ram.remaining_bytes = (1 << 30) / u64::from(half_seconds + 1);
    report.ram.transferred_bytes = u64::from(half_seconds) * 50 * MIB;
    report.rounds = (1..=half_seconds).map(round).collect();
    report.dirty_bytes_per_second = 16 * MIB;
    report.channels = (0..2)
        .map(|index| ChannelReport {
            index,
            transferred_bytes: u64::from(half_seconds) * 25 * MIB,
            ..Default::default()
        })
        .collect();
    report
}

fn completed() -> Vec<Report> {
    let mut reports: Vec<Report> = (0..8).map(report).collect();
    let last = reports.last_mut().unwrap();
    last.status = Status::Completed;
    last.downtime_seconds = 0.0142;
    last.downtime_parts = Some(DowntimeParts { ram_seconds: 0.0102, load_seconds: 0.004, ..Default::default() });
    reports
}

/// The page of a file that says this.
fn page_of(machine: &str, reports: impl IntoIterator<Item = Value>) -> Result<String> {
    let mut file = tempfile::NamedTempFile::new()?;
    let header =
        json!({"schema": "dunlin-recording", "version": 1, "dunlin": machine, "began": machine, "machine": machine});
    writeln!(file, "{header}")?;
    for report in reports {
        writeln!(file, "{}", json!({"seconds": 0.0, "report": report}))?;
    }
    Ok(page(&recording::read(file.path())?).into_string())
}

fn values(reports: &[Report]) -> Vec<Value> {
    reports.iter().map(|report| serde_json::to_value(report).unwrap()).collect()
}

/// Every tag is closed in its turn, and every attribute is quoted: what a page that was broken by a text is not.
fn check_markup(page: &str) {
    let mut open = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").unwrap();
    while let Some(at) = rest.find('<') {
        let end = at + rest[at..].find('>').unwrap();
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name.to_owned()), "</{name}>"),
            None => {
                let name = tag.split_whitespace().next().unwrap_or_default();
                assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric()), "<{tag}>");
                if name != "meta" {
                    open.push(name.to_owned());
                }
            }
        }
    }
    assert!(open.is_empty(), "{open:?} are never closed");
}

#[test]
fn what_it_shows() {
    let page = page_of("unix:/tmp/a.sock", values(&completed())).unwrap();
    check_markup(&page);
    for wanted in [
        "<h1 class=\"completed\">Migration completed</h1>",
        "<dd>14.2 ms</dd>",
        "limit 300.0 ms",
        "id=\"rates\"",
        "id=\"remaining\"",
        "id=\"downtime\"",
        "id=\"channels\"",
        "id=\"parts\"",
        ">71.8 %</span>",
        "The downtime predicted at each round's end, last 80.0 ms, against the limit of 300.0 ms. It was 14.2 ms.",
        "<title>round 1: predicted forever</title>",
        "<caption>Rounds</caption>",
    ] {
        assert!(page.contains(wanted), "{wanted} is not in\n{page}");
    }
    assert!(!page.contains("id=\"throttle\""), "nothing was throttled");
    for nowhere in ["NaN", "inf", "<script", "http://", "https://", "url(", "@import", "src="] {
        assert!(!page.contains(nowhere), "{nowhere}");
    }
}

#[test]
fn nothing_from_a_file_is_markup() {
    let hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></style></title></svg>&lt;\u{202e}";
    let mut reports = completed();
    for report in &mut reports {
        report.session = Some(hostile.to_owned());
        report.summary = hostile.to_owned();
        report.not_converging = Some(hostile.to_owned());
        report.refused_connections.count = 1;
        report.refused_connections.latest = Some(hostile.to_owned());
    }
    let last = reports.last_mut().unwrap();
    last.status = Status::Failed;
    last.error = Some(ErrorReport {
        message: hostile.to_owned(),
        side: Side::Destination,
        phase: Phase::Precopy,
        guest: GuestPlace::RunningAtSource,
    });
    let page = page_of(hostile, values(&reports)).unwrap();
    check_markup(&page);
    assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
    assert!(page.matches("&lt;script&gt;alert(1)").count() >= 4, "{page}");
}

#[test]
fn whatever_a_file_says() {
    let extremes = [json!(0), json!(-1e300), json!(1e300), json!(u64::MAX), json!(null), json!(5e-324)];
    let mut base = values(&completed());
    let mut pages = 0;
    for extreme in &extremes {
        for name in
            ["total_seconds", "setup_seconds", "downtime_seconds", "downtime_limit_seconds", "dirty_bytes_per_second"]
        {
            let mut reports = base.clone();
            reports.iter_mut().for_each(|report| report[name] = extreme.clone());
            pages += u32::from(page_of("a", reports).is_ok_and(|page| sound(&page)));
        }
        for path in [
            "/rounds/0/seconds",
            "/rounds/0/predicted_downtime_seconds",
            "/rounds/0/number",
            "/ram/remaining_bytes",
            "/ram/transferred_bytes",
            "/channels/0/transferred_bytes",
            "/channels/1/busy_seconds",
            "/downtime_parts/load_seconds",
        ] {
            let mut reports = base.clone();
            for report in &mut reports {
                if let Some(value) = report.pointer_mut(path) {
                    *value = extreme.clone();
                }
            }
            pages += u32::from(page_of("a", reports).is_ok_and(|page| sound(&page)));
        }
    }
    assert!(pages > 40, "only {pages} of them were read");
    // As many channels as there can be, coming and going, and many rounds.
    let channels: Vec<Value> = (0..255u8).map(|index| json!(ChannelReport { index, ..Default::default() })).collect();
    base[4]["channels"] = json!(channels);
    base[5]["channels"] = json!([]);
    base[6]["rounds"] = json!((1..=5000).map(round).collect::<Vec<_>>());
    assert!(sound(&page_of("a", base).unwrap()));
}

fn sound(page: &str) -> bool {
    check_markup(page);
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    assert!(page.len() < 4 << 20, "{} bytes", page.len());
    true
}
