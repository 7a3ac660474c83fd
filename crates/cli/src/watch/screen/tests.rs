//! The screen, held to pictures that were looked at: `crates/cli/tests/golden/watch`. `DUNLIN_UPDATE_GOLDEN=1` draws them
//! anew.

use std::fs;
use std::path::Path;

use dunlin::GuestPlace;
use dunlin::error::Phase;
use dunlin::report::{ErrorReport, PageCounts, Round};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;

use super::*;

const MIB: u64 = 1 << 20;
const TOTAL: u64 = 1 << 30;

/// A migration of a guest that dirties 20 MiB/s, at 100 MiB/s, as it would be told at `seconds`.
fn report(seconds: f64, dirty_mib: u64) -> Report {
    let mut report = Report::new(Side::Source, GuestPlace::RunningAtSource);
    report.status = Status::Active;
    report.session = Some("5e55".to_owned());
    report.total_seconds = seconds;
    report.downtime_limit_seconds = 0.05;
    report.ram.total_bytes = TOTAL;
    let mut left = TOTAL;
    let mut begin = 0.0;
    loop {
        let takes = left as f64 / (100 * MIB) as f64;
        let sent = ((seconds - begin).min(takes) * (100 * MIB) as f64) as u64;
        report.ram.transferred_bytes += sent;
        report.ram.remaining_bytes = left.saturating_sub(sent);
        report.ram.round_remaining_bytes = report.ram.remaining_bytes;
        if begin + takes > seconds || left < MIB {
            break;
        }
        let dirtied = (takes * (dirty_mib * MIB) as f64) as u64;
        report.dirty_bytes_per_second = dirty_mib * MIB;
        report.bandwidth_bytes_per_second = 100 * MIB;
        let predicted = dirtied as f64 / (100 * MIB) as f64 + 0.001;
        report.predicted_downtime_seconds = Some(predicted);
        report.rounds.push(Round {
            number: report.rounds_ended() + 1,
            seconds: takes,
            ram_bytes: left,
            transferred_bytes: left,
            pages: PageCounts::default(),
            dirty_bytes: dirtied,
            bandwidth_bytes_per_second: 100 * MIB,
            dirty_bytes_per_second: dirty_mib * MIB,
            predicted_downtime_seconds: predicted,
        });
        (left, begin) = (dirtied, begin + takes);
    }
    let pages = report.ram.transferred_bytes / 4096;
    report.ram.pages = PageCounts { zero: pages / 4, plain: pages - pages / 4, ..PageCounts::default() };
    channels(&mut report, 2);
    report
}

fn channels(report: &mut Report, count: u8) {
    report.channels = (0..count)
        .map(|index| {
            let mut channel = ChannelReport { index, ..ChannelReport::default() };
            channel.transferred_bytes = report.ram.transferred_bytes / u64::from(count) + u64::from(index);
            channel.frames = channel.transferred_bytes / (2 * MIB);
            channel.pages.plain = channel.transferred_bytes / 4096;
            channel.busy_seconds = report.total_seconds / 4.0;
            channel.waiting_seconds = report.total_seconds / 2.0;
            channel
        })
        .collect();
}

fn watched(reports: impl IntoIterator<Item = Report>) -> Watched {
    let mut series = Series::default();
    reports.into_iter().for_each(|report| series.push(report));
    Watched {
        machine: "unix:/tmp/a.sock".to_owned(),
        state: "running".to_owned(),
        series,
        lost: None,
        trouble: None,
        theme: Theme::Colours,
    }
}

/// Looked at every tenth of a second until `seconds`.
fn until(seconds: u32, dirty_mib: u64) -> Vec<Report> {
    (0..=seconds * 10).map(|tenth| report(f64::from(tenth) / 10.0, dirty_mib)).collect()
}

fn ending(mut reports: Vec<Report>, end: impl FnOnce(&mut Report)) -> Watched {
    let mut last = reports.last().unwrap().clone();
    last.total_seconds += 0.05;
    end(&mut last);
    reports.push(last);
    watched(reports)
}

fn failed(report: &mut Report) {
    report.status = Status::Failed;
    report.error = Some(ErrorReport {
        message:
            "source, precopy: could not send a frame on data channel 1: connection reset by peer; the destination \
                  said before: could not place pages of RAM block ram at 0x3f600000: checksum mismatch; the guest is \
                  running at the source"
                .to_owned(),
        side: Side::Source,
        phase: Phase::Precopy,
        guest: GuestPlace::RunningAtSource,
    });
}

fn completed(report: &mut Report) {
    report.status = Status::Completed;
    report.guest = GuestPlace::RunningAtDestination;
    report.downtime_seconds = 0.0031;
    report.ram.remaining_bytes = 0;
}

fn buffer(watched: &Watched, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(watched, frame)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let row = |y| (0..buffer.area.width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..buffer.area.height).map(|y| row(y).trim_end().to_owned()).collect()
}

#[test]
fn pictures() {
    let mut many = until(5, 20);
    many.iter_mut().for_each(|report| channels(report, 16));
    let mut waiting = Report::new(Side::Destination, GuestPlace::AtSource);
    waiting.status = Status::Setup;
    waiting.refused_connections.count = 2;
    waiting.refused_connections.latest = Some("127.0.0.1:41234: it is not dunlin's protocol".to_owned());
    let mut arriving = report(8.0, 20);
    arriving.side = Side::Destination;
    arriving.guest = GuestPlace::AtSource;
    let cancelled = |report: &mut Report| report.status = Status::Cancelled;
    let not_converging = |report: &mut Report| {
        report.not_converging = Some("the guest dirties 120.00 MiB/s, and 100.00 MiB/s get through".to_owned());
        report.vcpu_throttle_percent = vec![45, 0];
    };
    let mut lost = watched(until(3, 20));
    lost.lost = Some("the machine at unix:/tmp/a.sock closed the connection".to_owned());
    for (name, width, height, watched) in [
        ("before", 80, 24, watched([])),
        ("waiting-destination", 80, 24, watched([waiting])),
        ("round-1", 80, 24, watched(until(4, 20))),
        ("later", 80, 24, watched(until(12, 20))),
        ("throttled", 80, 24, ending(until(80, 120), not_converging)),
        ("completed", 80, 24, ending(until(13, 20), completed)),
        ("failed", 80, 24, ending(until(6, 20), failed)),
        ("cancelled", 80, 24, ending(until(60, 120), cancelled)),
        ("destination", 80, 24, watched([arriving])),
        ("lost", 80, 24, lost),
        ("narrow", 60, 20, watched(until(12, 20))),
        ("wide", 132, 43, watched(many.clone())),
        ("many-channels", 80, 24, watched(many)),
        ("tiny", 40, 8, ending(until(6, 20), failed)),
    ] {
        let text = lines(&buffer(&watched, width, height)).join("\n") + "\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/watch/{name}.txt"));
        if std::env::var_os("DUNLIN_UPDATE_GOLDEN").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let wanted = fs::read_to_string(&path).unwrap();
        assert!(wanted == text, "{} differs; DUNLIN_UPDATE_GOLDEN=1 draws it anew. Now:\n{text}", path.display());
    }
}

/// What stands in the picture other than figures and charts must stand in the same place in the next one.
#[test]
fn nothing_jumps() {
    let fixed = |watched: &Watched| -> Vec<String> {
        let all = lines(&buffer(watched, 80, 24));
        let letters = |line: &String| -> String {
            let of_words = |c: char| if c.is_ascii_alphabetic() || c == ':' { c } else { ' ' };
            line.chars().map(of_words).collect::<String>()
        };
        // Not the title, the sentence and the charts; units come and go.
        let rows = [3, 4, 5, 6, 15, 16, 17, 19];
        let units = ["MiB", "KiB", "GiB", "ms", "B", "s", "Round", "within", "ABOVE"];
        let words = |line: String| -> String {
            line.split_whitespace()
                .filter(|word| !units.contains(word))
                .map(|word| format!("{word}@{:?} ", line.find(word)))
                .collect()
        };
        rows.map(|row| words(letters(&all[row]))).to_vec()
    };
    let reports = until(12, 20);
    let first = fixed(&watched(reports[..2].to_vec()));
    for end in 3..reports.len() {
        assert_eq!(fixed(&watched(reports[..end].to_vec())), first, "after {end} looks");
    }
}

/// A migration of more than ten minutes: the time in the title and those of the channels go on from second to second.
#[test]
fn the_clock_of_a_long_migration() {
    let shown = |seconds: f64| lines(&buffer(&watched([report(seconds, 100)]), 80, 24));
    let (now, a_second_later, much_later) = (shown(622.0), shown(623.0), shown(3.0 * 3600.0));
    assert!(now[0].ends_with(" 10:22"), "{now:#?}");
    assert!(a_second_later[0].ends_with(" 10:23"), "{a_second_later:#?}");
    assert!(much_later[0].ends_with(" 3:00:00"), "{much_later:#?}");
    // Busy and waiting, in the columns that they have in a short one.
    let channels = |lines: &[String]| lines.iter().filter(|line| line.contains("      2:36        5:11 ")).count();
    assert_eq!(channels(&now), 2, "{now:#?}");
    let ends = |line: &str, of: &str| line.find(of).map(|at| at + of.len());
    let short = shown(12.0);
    let (short, long) =
        (short.iter().find(|line| line.contains("6.00 s")), now.iter().find(|line| line.contains("5:11")));
    assert_eq!(ends(short.unwrap(), "6.00 s"), ends(long.unwrap(), "5:11"));
}

/// Whatever the size, and whatever the report says.
#[test]
fn any_size() {
    let mut odd = report(1e300, 20);
    odd.ram.remaining_bytes = u64::MAX;
    odd.predicted_downtime_seconds = Some(f64::INFINITY);
    odd.downtime_limit_seconds = 0.0;
    odd.dirty_bytes_per_second = u64::MAX;
    for watched in [watched([]), ending(until(6, 20), failed), watched([report(0.0, 1), odd])] {
        for width in [1, 2, 20, 39, 71, 72, 80, 200] {
            for height in 1..40 {
                buffer(&watched, width, height);
            }
        }
    }
}

#[test]
fn no_colour_where_none_is_wanted() {
    let mut watched = ending(until(6, 20), failed);
    let colours = |watched: &Watched| {
        let buffer = buffer(watched, 80, 24);
        buffer
            .content
            .iter()
            .any(|cell| cell.fg != ratatui::style::Color::Reset || cell.bg != ratatui::style::Color::Reset)
    };
    assert!(colours(&watched));
    watched.theme = Theme::Plain;
    assert!(!colours(&watched));
}
