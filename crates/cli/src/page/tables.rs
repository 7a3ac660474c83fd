//! The figures of a migration as tables: for those who do not see the plots, and for those who want the digits.

use dunlin::Report;
use dunlin::report::PageCounts;
use dunlin::units::format_size;
use maud::{Markup, html};

use crate::scale::{rate, span};
use crate::series::{Series, sane};

/// As many rounds are listed, the latest.
const MAX_ROUNDS: usize = 200;
/// As many moments are listed, evenly.
const MAX_MOMENTS: usize = 60;

/// Figures that a reader looks for first.
pub fn key_figures(series: &Series, report: &Report) -> Markup {
    let ram = &report.ram;
    let limit = format!("limit {}", span(sane(report.downtime_limit_seconds)));
    let downtime = match sane(report.downtime_seconds) {
        none if none <= 0.0 => "none".to_owned(),
        some => span(some),
    };
    let predicted = report.predicted_downtime_seconds.map(|predicted| format!("predicted {}", span(predicted)));
    let pages = ram.pages.total();
    let figures = [
        ("total time", span(sane(report.total_seconds)), format!("{} of it setup", span(sane(report.setup_seconds)))),
        ("downtime", downtime, predicted.map_or(limit.clone(), |predicted| format!("{limit}\n{predicted}"))),
        ("RAM", format_size(ram.total_bytes), format!("{} to go", format_size(ram.remaining_bytes))),
        ("transferred", format_size(ram.transferred_bytes), format!("{pages} pages")),
        (
            "bandwidth",
            rate(report.bandwidth_bytes_per_second as f64),
            format!("dirty rate {}", rate(report.dirty_bytes_per_second as f64)),
        ),
        (
            "rounds",
            series.rounds().last().map_or(0, |last| last.round.number).to_string(),
            format!("and {} of device state", format_size(report.device_state_bytes)),
        ),
        ("CPU time at the source", known(report.cpu_seconds.source), String::new()),
        ("CPU time at the destination", known(report.cpu_seconds.destination), String::new()),
    ];
    html! {
        dl class="figures" {
            @for (name, value, more) in &figures {
                div {
                    dt { (name) }
                    dd { (value) }
                    @if !more.is_empty() { dd class="more" { (more) } }
                }
            }
        }
    }
}

fn known(time: Option<f64>) -> String {
    time.map_or("unknown".to_owned(), |time| span(sane(time)))
}

/// A table of text, its first column naming the rows.
fn table(caption: &str, header: &[&str], rows: &[Vec<String>]) -> Markup {
    html! {
        div class="scroll" tabindex="0" {
            table {
                caption { (caption) }
                thead { tr { @for name in header { th scope="col" { (name) } } } }
                tbody {
                    @for row in rows {
                        tr {
                            @for (n, cell) in row.iter().enumerate() {
                                @if n == 0 { th scope="row" { (cell) } } @else { td { (cell) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The kinds of pages that a column is worth.
fn kinds(pages: &PageCounts) -> Vec<&'static str> {
    let all = pages.named().into_iter();
    all.filter(|(name, count)| *count > 0 || matches!(*name, "zero" | "plain")).map(|(name, _)| name).collect()
}

fn counts(pages: &PageCounts, kinds: &[&str]) -> Vec<String> {
    let named = pages.named();
    let count = |kind: &&str| named.iter().find(|(name, _)| name == kind).map_or(0, |(_, count)| *count);
    kinds.iter().map(|kind| count(kind).to_string()).collect()
}

/// One row a round.
pub fn rounds(series: &Series, report: &Report) -> Markup {
    let all = series.rounds();
    if all.is_empty() {
        return html! {};
    }
    let kinds = kinds(&report.ram.pages);
    let listed = all.get(all.len().saturating_sub(MAX_ROUNDS)..).unwrap_or_default();
    let row = |timed: &crate::series::TimedRound| {
        let round = &timed.round;
        let mut row = vec![
            round.number.to_string(),
            span(round.seconds),
            format_size(round.ram_bytes),
            format_size(round.transferred_bytes),
        ];
        row.extend(counts(&round.pages, &kinds));
        row.extend([
            format_size(round.dirty_bytes),
            rate(round.bandwidth_bytes_per_second as f64),
            rate(round.dirty_bytes_per_second as f64),
            span(round.predicted_downtime_seconds),
        ]);
        row
    };
    let pages: Vec<String> = kinds.iter().map(|kind| format!("{kind} pages")).collect();
    let mut header = vec!["round", "time", "RAM", "transferred"];
    header.extend(pages.iter().map(String::as_str));
    header.extend(["dirty after", "bandwidth", "dirty rate", "predicted downtime"]);
    let caption = match all.len() - listed.len() {
        0 => "Rounds".to_owned(),
        more => format!("Rounds, the latest {MAX_ROUNDS}; {more} earlier ones are in the recording"),
    };
    table(&caption, &header, &listed.iter().map(row).collect::<Vec<_>>())
}

/// One row a channel.
pub fn channels(report: &Report) -> Markup {
    if report.channels.is_empty() {
        return html! {};
    }
    let kinds = kinds(&report.ram.pages);
    let seconds = sane(report.total_seconds - report.setup_seconds).max(1e-9);
    let row = |channel: &dunlin::report::ChannelReport| {
        let mut row = vec![
            channel.index.to_string(),
            format_size(channel.transferred_bytes),
            rate(channel.transferred_bytes as f64 / seconds),
            channel.frames.to_string(),
        ];
        row.extend(counts(&channel.pages, &kinds));
        row.extend([span(sane(channel.busy_seconds)), span(sane(channel.waiting_seconds))]);
        row
    };
    let pages: Vec<String> = kinds.iter().map(|kind| format!("{kind} pages")).collect();
    let mut header = vec!["channel", "transferred", "mean rate", "frames"];
    header.extend(pages.iter().map(String::as_str));
    header.extend(["busy", "waiting"]);
    table("Channels", &header, &report.channels.iter().map(row).collect::<Vec<_>>())
}

/// What the plots show, as a table.
pub fn moments(series: &Series) -> Markup {
    let points = series.points();
    let step = points.len().div_ceil(MAX_MOMENTS).max(1);
    let rates = series.rates((series.seconds() / 60.0).max(0.05), |point| Some(point.transferred_bytes));
    let last = points.len().saturating_sub(1);
    let rows: Vec<Vec<String>> = points
        .iter()
        .enumerate()
        .filter(|(n, _)| n % step == 0 || *n == last)
        .map(|(_, point)| {
            let at = rates.partition_point(|(at, _)| *at < point.seconds);
            let sent = rates.get(at).filter(|(at, _)| *at <= point.seconds).map_or(0.0, |(_, rate)| *rate);
            let ended = series.rounds().partition_point(|timed| timed.end <= point.seconds);
            vec![
                span(point.seconds),
                ended.to_string(),
                rate(sent),
                rate(point.dirty_bytes_per_second as f64),
                format_size(point.transferred_bytes),
                format_size(point.remaining_bytes),
            ]
        })
        .collect();
    let header = ["time", "rounds ended", "transfer rate", "dirty rate", "transferred", "RAM to go"];
    html! {
        details {
            summary { "The figures behind the plots, as a table" }
            (table("Over time", &header, &rows))
        }
    }
}
