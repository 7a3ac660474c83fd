//! The plots of a migration.

use dunlin::report::DowntimeParts;
use dunlin::units::format_size;
use dunlin::{Report, Status};
use maud::{Markup, html};

use super::plot::{Joined, MARK_STYLE, Mark, Plot, tenths};
use crate::scale::{Scale, rate, span};
use crate::series::{Point, Series, sane};

/// Lines are drawn with as many points: the figure has not many more pixels.
const POINTS: usize = 700;
/// Bands for more rounds than these would be a grey.
const MAX_BANDS: usize = 150;
/// As many channels have a line of their own; the styles are not more.
const MAX_CHANNEL_LINES: usize = 8;

/// Every plot that there is something to show in.
pub fn plots(series: &Series, report: &Report) -> Markup {
    html! {
        (rates(series, report))
        (remaining(series, report))
        @if let Some(plot) = downtime(series, report) { (plot) }
        @if let Some(bar) = parts(report) { (bar) }
        @if let Some(plot) = channels(series) { (plot) }
        @if let Some(plot) = throttle(series) { (plot) }
    }
}

/// Rates are those of this much time.
fn window(series: &Series) -> f64 {
    (series.seconds() / 60.0).max(0.1)
}

fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS).max(1);
    let last = points.len().saturating_sub(1);
    points.into_iter().enumerate().filter(|(n, _)| n % step == 0 || *n == last).map(|(_, point)| point).collect()
}

fn highest(points: &[(f64, f64)]) -> f64 {
    points.iter().map(|(_, y)| *y).fold(0.0, f64::max)
}

fn values(series: &Series, value: impl Fn(&Point) -> f64) -> Vec<(f64, f64)> {
    thinned(series.points().iter().map(|point| (point.seconds, value(point))).collect())
}

fn bands(plot: &mut Plot, series: &Series) {
    if series.rounds().len() > MAX_BANDS {
        return;
    }
    for timed in series.rounds() {
        let round = &timed.round;
        let about = format!(
            "round {}: {} of RAM in {}, {} dirty after it",
            round.number,
            format_size(round.ram_bytes),
            span(round.seconds),
            format_size(round.dirty_bytes)
        );
        plot.band(round.number, timed.begin, timed.end, &about);
    }
}

fn rates(series: &Series, report: &Report) -> Markup {
    let sent = thinned(series.rates(window(series), |point| Some(point.transferred_bytes)));
    let dirtied = values(series, |point| point.dirty_bytes_per_second as f64);
    let (most_sent, most_dirtied) = (highest(&sent), highest(&dirtied));
    let top = most_sent.max(most_dirtied);
    let mut plot = Plot::new("rates", "Rates", Scale::time(series.seconds()), Scale::bytes(top, "/s"));
    plot.describe(format!(
        "Bytes on all channels a second, at most {} and {} on average, and bytes of RAM that the guest dirtied a \
         second as of the round before, at most {}. Every other round is shaded, with its number above.",
        rate(most_sent),
        rate(report.ram.transferred_bytes as f64 / series.seconds().max(1e-9)),
        rate(most_dirtied)
    ));
    bands(&mut plot, series);
    plot.line(0, "transfer rate", &sent, Joined::Straight);
    plot.line(1, "dirty rate", &dirtied, Joined::AsSteps);
    plot.finish()
}

fn remaining(series: &Series, report: &Report) -> Markup {
    let left = values(series, |point| point.remaining_bytes as f64);
    let scale = Scale::bytes(highest(&left), "");
    let mut plot = Plot::new("remaining", "RAM to go", Scale::time(series.seconds()), scale);
    plot.describe(format!(
        "RAM that was to go, with what the guest is expected to have dirtied again: from {} to {}. Every other round is shaded, with its number above.",
        left.first().map_or("nothing".to_owned(), |(_, bytes)| format_size(*bytes as u64)),
        format_size(report.ram.remaining_bytes)
    ));
    bands(&mut plot, series);
    plot.area(0, &left);
    plot.line(0, "RAM to go", &left, Joined::Straight);
    plot.finish()
}

fn downtime(series: &Series, report: &Report) -> Option<Markup> {
    let predictions: Vec<(f64, f64)> =
        series.rounds().iter().map(|timed| (timed.end, timed.round.predicted_downtime_seconds)).collect();
    if predictions.is_empty() {
        return None;
    }
    let limit = sane(report.downtime_limit_seconds);
    let actual = sane(report.downtime_seconds);
    let finite = predictions.iter().map(|(_, predicted)| *predicted).filter(|predicted| predicted.is_finite());
    let all: Vec<f64> = finite.chain([limit, actual]).filter(|value| *value > 0.0).collect();
    let low = all.iter().copied().fold(f64::INFINITY, f64::min).min(1.0);
    let high = all.iter().copied().fold(0.0, f64::max);
    let y = Scale::log_seconds(low * 0.9, high * 1.1);
    let mut plot = Plot::new("downtime", "Downtime, predicted and actual", Scale::time(series.seconds()), y);
    let last = predictions.last().map_or(0.0, |(_, predicted)| *predicted);
    plot.describe(format!(
        "The downtime predicted at each round's end, last {}, against the limit of {}. {} The scale is logarithmic.",
        span(last),
        span(limit),
        if actual > 0.0 { format!("It was {}.", span(actual)) } else { "The guest was not stopped.".to_owned() }
    ));
    bands(&mut plot, series);
    let line: Vec<(f64, f64)> = thinned(predictions.iter().map(|(at, value)| (*at, value.min(1e12))).collect());
    plot.line(0, "predicted", &line, Joined::Straight);
    if limit > 0.0 {
        plot.level(1, &format!("limit, {}", span(limit)), limit);
    }
    for (timed, (at, value)) in series.rounds().iter().zip(&predictions).take(MAX_BANDS) {
        let mark = if value.is_finite() { Mark::Circle } else { Mark::Up };
        plot.mark(
            0,
            mark,
            (*at, value.min(1e12)),
            &format!("round {}: predicted {}", timed.round.number, span(*value)),
        );
    }
    if actual > 0.0 {
        plot.name_mark(MARK_STYLE, &format!("actual, {}", span(actual)));
        plot.mark(MARK_STYLE, Mark::Diamond, (series.seconds(), actual), &format!("actual {}", span(actual)));
    }
    Some(plot.finish())
}

/// The parts that there are, each with the style that it always has.
fn named(parts: &DowntimeParts) -> Vec<(usize, &'static str, f64)> {
    let all = [
        ("pause", parts.pause_seconds),
        ("waiting to be continued", parts.wait_seconds),
        ("RAM", parts.ram_seconds),
        ("device state", parts.device_state_seconds),
        ("load", parts.load_seconds),
        ("handover", parts.handover_seconds),
    ];
    let there = |(_, name, time): &(usize, &str, f64)| *name != "waiting to be continued" || *time >= 1e-4;
    all.into_iter().enumerate().map(|(style, (name, time))| (style, name, sane(time))).filter(there).collect()
}

/// The downtime as a bar of its parts.
fn parts(report: &Report) -> Option<Markup> {
    let parts = named(report.downtime_parts.as_ref()?);
    let sum: f64 = parts.iter().map(|(_, _, time)| time).sum();
    if sum <= 0.0 {
        return None;
    }
    let (width, height) = (760.0, 44.0);
    let mut begin = 0.0;
    let mut pieces = Vec::new();
    for (n, (style, name, time)) in parts.iter().enumerate() {
        let length = time / sum * width;
        pieces.push((n, *style, *name, *time, begin, length));
        begin += length;
    }
    let limit = sane(report.downtime_limit_seconds);
    let how = if limit < 1e-6 {
        String::new()
    } else if sum <= limit {
        format!("It is {:.1} % of the limit of {}.", sum / limit * 100.0, span(limit))
    } else {
        format!("It is {:.1} times the limit of {}.", sum / limit, span(limit))
    };
    let text =
        format!("The downtime of {} and what it is made of, in the order in which it happened. {how}", span(sum));
    Some(html! {
        figure id="parts" {
            h2 { "What the downtime is made of" }
            svg viewBox={ "0 0 " (width) " " (height) } role="img" aria-labelledby="parts-title parts-text" {
                title id="parts-title" { "What the downtime is made of" }
                desc id="parts-text" { (text) }
                @for (n, style, name, time, begin, length) in &pieces {
                    @if *length > 0.0 {
                        rect class={ "part p" (style) } x=(tenths(*begin)) y="2" width=(tenths(*length)) height="40" {
                            title { (name) ": " (span(*time)) }
                        }
                    }
                    @if *length > 22.0 {
                        text class={ "piece p" (style) } x=(tenths(begin + length / 2.0)) y="27" { (n + 1) }
                    }
                }
            }
            ol class="parts" {
                @for (n, style, name, time, _, _) in &pieces {
                    li {
                        span class={ "number p" (style) } { (n + 1) }
                        span class="name" { (name) }
                        span class="value" { (span(*time)) }
                        span class="share" { (format!("{:.1} %", time / sum * 100.0)) }
                    }
                }
            }
            figcaption { (text) }
        }
    })
}

fn channels(series: &Series) -> Option<Markup> {
    let count = series.points().iter().map(|point| point.channels.len()).max().unwrap_or(0);
    if count == 0 {
        return None;
    }
    let line = |channel: usize| thinned(series.rates(window(series), |point| point.channels.get(channel).copied()));
    let lines: Vec<Vec<(f64, f64)>> = (0..count).map(line).collect();
    let top = lines.iter().map(|line| highest(line)).fold(0.0, f64::max);
    let y = Scale::bytes(top, "/s");
    let mut plot = Plot::new("channels", "Rate of each channel", Scale::time(series.seconds()), y);
    bands(&mut plot, series);
    if count <= MAX_CHANNEL_LINES {
        plot.describe(format!("Bytes a second on each of {count} data channels, at most {}.", rate(top)));
        for (channel, points) in lines.iter().enumerate() {
            plot.line(channel, &format!("channel {channel}"), points, Joined::Straight);
        }
    } else {
        plot.describe(format!(
            "Bytes a second on {count} data channels: the slowest, the mean and the fastest at each moment; at most {}.",
            rate(top)
        ));
        let of_all = |pick: fn(&[f64]) -> f64| -> Vec<(f64, f64)> {
            let moments = lines.first().map_or(&[][..], Vec::as_slice).iter().enumerate();
            let at = |n: usize| lines.iter().filter_map(|line| line.get(n)).map(|(_, y)| *y).collect::<Vec<f64>>();
            moments.map(|(n, (x, _))| (*x, pick(&at(n)))).collect()
        };
        let mean = of_all(|all| all.iter().sum::<f64>() / all.len().max(1) as f64);
        plot.line(1, "fastest", &of_all(|all| all.iter().copied().fold(0.0, f64::max)), Joined::Straight);
        plot.line(0, "mean", &mean, Joined::Straight);
        plot.line(2, "slowest", &of_all(|all| all.iter().copied().fold(f64::INFINITY, f64::min)), Joined::Straight);
    }
    Some(plot.finish())
}

fn throttle(series: &Series) -> Option<Markup> {
    let throttled = values(series, |point| point.throttle);
    let most = highest(&throttled);
    if most <= 0.0 {
        return None;
    }
    let mut plot = Plot::new("throttle", "Throttle", Scale::time(series.seconds()), Scale::ratio());
    plot.describe(format!(
        "The part of its time that the vCPU held back most stood still: at most {:.0} %.",
        most * 100.0
    ));
    bands(&mut plot, series);
    plot.line(0, "throttle", &throttled, Joined::AsSteps);
    Some(plot.finish())
}

/// How a migration stands, for a heading.
pub fn heading(status: Status) -> &'static str {
    match status {
        Status::None => "No migration",
        Status::Setup => "Migration being set up",
        Status::Active => "Migration under way",
        Status::PreSwitchover => "Migration waiting before the switchover",
        Status::Device => "Migration switching over",
        Status::Completed => "Migration completed",
        Status::Failed => "Migration failed",
        Status::Cancelling => "Migration being cancelled",
        Status::Cancelled => "Migration cancelled",
    }
}
