//! Reports and tables for people: what `info migrate` and `dunlin status` print, and `dunlin migrate` at the end.
//!
//! One text from one struct, so that all of them say the same.

use std::fmt::Write;

use dunlin::report::{ChannelReport, DeltaCounts, PageCounts, Round};
use dunlin::units::{format_seconds as seconds, format_size};
use dunlin::{Report, Status};

use crate::migration_info::downtime_seconds;

/// The report, as lines.
pub fn report(report: &Report) -> String {
    let mut text = format!("{}\n", report.summary);
    let mut line = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name:<12} {value}");
    };
    line("total", format!("{}, of it {} of setup", seconds(report.total_seconds), seconds(report.setup_seconds)));
    line("downtime", downtime(report));
    if let Some(stopped) = report.stopped_seconds {
        let waiting = report.waiting_for.as_ref().map_or_else(String::new, |what| format!(", waiting for {what}"));
        line("stopped", format!("for {}{waiting}", seconds(stopped)));
    }
    if let Some(parts) = report.downtime_parts {
        let waited = match parts.wait_seconds {
            some if some >= 1e-3 => format!(" + waiting to be continued {}", seconds(some)),
            _ => String::new(),
        };
        line(
            "",
            format!(
                "= pause {}{waited} + RAM {} + device state {} + load {} + handover {}",
                seconds(parts.pause_seconds),
                seconds(parts.ram_seconds),
                seconds(parts.device_state_seconds),
                seconds(parts.load_seconds),
                seconds(parts.handover_seconds),
            ),
        );
    }
    let ram = &report.ram;
    line("RAM", format!("{}, of it {} to go", format_size(ram.total_bytes), format_size(ram.remaining_bytes)));
    line("transferred", format_size(ram.transferred_bytes));
    line("pages", ram.pages.to_string());
    let delta = &report.delta;
    if *delta != DeltaCounts::default() {
        let saved = format_size(delta.saved_bytes);
        let DeltaCounts { hits, misses, overflows, .. } = delta;
        line("delta", format!("{hits} hits, {misses} misses, {overflows} overflows, {saved} saved"));
    }
    line("device state", format_size(report.device_state_bytes));
    line("bandwidth", format!("{}/s", format_size(report.bandwidth_bytes_per_second)));
    line("dirty rate", format!("{}/s", format_size(report.dirty_bytes_per_second)));
    if report.max_vcpu_throttle_percent.iter().any(|percent| *percent > 0) {
        let now = percentages(&report.vcpu_throttle_percent);
        line("throttle", format!("{now} (at most so far: {})", percentages(&report.max_vcpu_throttle_percent)));
    }
    let cpu = [("source", report.cpu_seconds.source), ("destination", report.cpu_seconds.destination)];
    let known: Vec<String> =
        cpu.iter().filter_map(|(side, time)| Some(format!("{} at the {side}", seconds((*time)?)))).collect();
    if !known.is_empty() {
        line("CPU time", known.join(", "));
    }
    let refused = &report.refused_connections;
    if refused.count > 0 {
        let latest = refused.latest.as_deref().unwrap_or("unknown");
        line("refused", format!("{} (connections); the latest: {latest}", refused.count));
    }
    // What the headline says is not said again.
    let said = |words: &str| report.summary.contains(words);
    if let Some(why) = report.not_converging.as_deref().filter(|why| !said(why)) {
        line("warning", format!("it does not converge: {why}"));
    }
    if let Some(error) = report.error.as_ref().filter(|error| !said(&error.message)) {
        line("error", error.message.clone());
    }
    text.push_str(&rounds(report));
    text.push_str(&channels(report));
    text
}

/// What each vCPU is slowed by: one figure where all are alike.
fn percentages(percent: &[u8]) -> String {
    match (percent.iter().min(), percent.iter().max()) {
        (None | Some(0), None | Some(0)) => "none".to_owned(),
        (Some(least), Some(most)) if least == most => format!("{most} %"),
        _ => {
            let each = percent.iter().enumerate().map(|(vcpu, percent)| format!("vCPU {vcpu} by {percent} %"));
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

fn downtime(report: &Report) -> String {
    let mut text = match downtime_seconds(report) {
        None if report.status == Status::Completed => "not told by the source".to_owned(),
        Some(some) if some > 0.0 => seconds(some),
        _ => "none yet".to_owned(),
    };
    text.push_str(&format!(" (limit {}", seconds(report.downtime_limit_seconds)));
    if let Some(predicted) = report.predicted_downtime_seconds {
        text.push_str(&format!(", predicted {}", seconds(predicted)));
    }
    text.push(')');
    text
}

/// The kinds of pages that a column is worth.
fn kinds(report: &Report) -> Vec<&'static str> {
    let all = report.ram.pages.named().into_iter();
    all.filter(|(name, count)| *count > 0 || matches!(*name, "zero" | "plain")).map(|(name, _)| name).collect()
}

fn counts(pages: &PageCounts, kinds: &[&str]) -> Vec<String> {
    let named = pages.named();
    let count = |kind: &&str| named.iter().find(|(name, _)| name == kind).map_or(0, |(_, count)| *count);
    kinds.iter().map(|kind| count(kind).to_string()).collect()
}

fn rounds(report: &Report) -> String {
    if report.rounds.is_empty() {
        return String::new();
    }
    let kinds = kinds(report);
    let row = |round: &Round| {
        let mut row = vec![
            round.number.to_string(),
            seconds(round.seconds),
            format_size(round.ram_bytes),
            format_size(round.transferred_bytes),
        ];
        row.extend(counts(&round.pages, &kinds));
        row.extend([
            format_size(round.dirty_bytes),
            format_size(round.dirty_bytes_per_second),
            seconds(round.predicted_downtime_seconds),
        ]);
        row
    };
    let mut header = vec!["round", "time", "RAM", "transferred"];
    header.extend(&kinds);
    header.extend(["dirty after", "dirtied/s", "downtime"]);
    table(Align::Right, &header, &report.rounds.iter().map(row).collect::<Vec<_>>())
}

fn channels(report: &Report) -> String {
    if report.channels.is_empty() {
        return String::new();
    }
    let kinds = kinds(report);
    let row = |channel: &ChannelReport| {
        let mut row =
            vec![channel.index.to_string(), format_size(channel.transferred_bytes), channel.frames.to_string()];
        row.extend(counts(&channel.pages, &kinds));
        row.extend([seconds(channel.busy_seconds), seconds(channel.waiting_seconds)]);
        row
    };
    let mut header = vec!["channel", "transferred", "frames"];
    header.extend(&kinds);
    header.extend(["busy", "waiting"]);
    table(Align::Right, &header, &report.channels.iter().map(row).collect::<Vec<_>>())
}

/// A size in three digits or so, where it changes too quickly for more.
pub fn rough_size(bytes: u64) -> String {
    let text = format_size(bytes);
    match text.split_once(' ') {
        Some((number, unit)) if number.contains('.') => {
            let digits: String = number.chars().take(4).collect();
            format!("{} {unit}", digits.trim_end_matches(".0").trim_end_matches('.'))
        }
        _ => text,
    }
}

/// To which side the columns of a table lean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// To the left: words.
    Left,
    /// To the right: figures.
    Right,
}

/// Rows under a header, in columns.
pub fn table(align: Align, header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize, name: &str| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([name.chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = header.iter().enumerate().map(|(column, name)| width(column, name)).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells
            .zip(&widths)
            .map(|(cell, width)| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            })
            .collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(&mut header.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

#[cfg(test)]
mod tests {
    use dunlin::error::Phase;
    use dunlin::report::{DowntimeParts, ErrorReport, RamReport};
    use dunlin::{GuestPlace, Side, Status};

    use super::*;

    fn sample() -> Report {
        let mut report = Report::new(Side::Source, GuestPlace::RunningAtDestination);
        report.status = Status::Completed;
        report.total_seconds = 2.5;
        report.setup_seconds = 0.0125;
        report.downtime_seconds = 0.0142;
        report.downtime_limit_seconds = 0.3;
        report.predicted_downtime_seconds = Some(0.0129);
        report.downtime_parts = Some(DowntimeParts { ram_seconds: 0.004, ..Default::default() });
        report.ram = RamReport {
            total_bytes: 1 << 30,
            remaining_bytes: 0,
            round_remaining_bytes: 0,
            transferred_bytes: 700 << 20,
            pages: PageCounts { zero: 120_000, plain: 213_000, ..PageCounts::default() },
        };
        report.cpu_seconds.source = Some(1.25);
        report.rounds = (1..=2)
            .map(|number| Round {
                number,
                seconds: 0.5,
                ram_bytes: 1 << 30,
                transferred_bytes: 350 << 20,
                pages: PageCounts { zero: 1, plain: 2, ..PageCounts::default() },
                dirty_bytes: 4096,
                bandwidth_bytes_per_second: 1,
                dirty_bytes_per_second: 2,
                predicted_downtime_seconds: if number == 1 { f64::INFINITY } else { 0.01 },
            })
            .collect();
        report.channels = vec![ChannelReport { frames: 17, ..Default::default() }];
        report.summary = "completed".to_owned();
        report
    }

    #[test]
    fn a_completed_migration() {
        let text = report(&sample());
        for wanted in [
            "completed\n",
            "total        2.50 s, of it 12.5 ms of setup\n",
            "downtime     14.2 ms (limit 300.0 ms, predicted 12.9 ms)\n",
            "RAM 4.0 ms",
            "pages        120000 zero, 213000 plain\n",
            "CPU time     1.25 s at the source\n",
            "    1  500.0 ms  1.00 GiB   350.00 MiB     1      2     4.00 KiB        2 B   forever\n",
        ] {
            assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
        }
        assert!(!text.contains("error"), "{text}");
    }

    #[test]
    fn what_went_wrong() {
        let mut failed = sample();
        failed.status = Status::Failed;
        failed.not_converging = Some("the guest is faster".to_owned());
        failed.refused_connections.count = 3;
        failed.error = Some(ErrorReport {
            message: "source, precopy: the peer closed the control channel; the guest is running at the source".into(),
            side: Side::Source,
            phase: Phase::Precopy,
            guest: GuestPlace::RunningAtSource,
        });
        let text = report(&failed);
        for wanted in ["it does not converge: the guest is faster", "3 (connections)", "error        source, precopy"] {
            assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
        }
    }

    #[test]
    fn throttles() {
        for (percent, text) in
            [(&[][..], "none"), (&[0, 0], "none"), (&[40, 40], "40 %"), (&[0, 75], "vCPU 0 by 0 %, vCPU 1 by 75 %")]
        {
            assert_eq!(percentages(percent), text);
        }
        let mut slowed = sample();
        slowed.max_vcpu_throttle_percent = vec![75];
        assert!(report(&slowed).contains("throttle     none (at most so far: 75 %)\n"));
    }

    #[test]
    fn reports_survive_json() {
        let json = serde_json::to_value(sample()).unwrap();
        let back: Report = serde_json::from_value(json).unwrap();
        assert_eq!(report(&back), report(&sample()));
    }

    #[test]
    fn rough_sizes() {
        for (bytes, text) in [
            (17, "17 B"),
            (1 << 30, "1.00 GiB"),
            (12_345_678, "11.7 MiB"),
            (30 << 20, "30 MiB"),
            (504 << 20, "504 MiB"),
            (1023 << 20, "1023 MiB"),
        ] {
            assert_eq!(rough_size(bytes), text);
        }
    }
}
