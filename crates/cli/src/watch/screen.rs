//! The screen: a pure picture of what is known.

use dunlin::report::ChannelReport;
use dunlin::{Report, Side, Status};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Wrap};

use super::charts;
use super::figures::{count, elapsed, percent, rate, size, time};
use super::theme::Theme;
use crate::headline::headline;
use crate::series::{Series, sane};

/// What is known.
#[derive(Debug)]
pub struct Watched {
    /// Where the machine is spoken to.
    pub machine: String,
    /// Its state, in QEMU's words.
    pub state: String,
    pub series: Series,
    /// Why nothing more is heard of the machine.
    pub lost: Option<String>,
    /// Why it is not recorded any more.
    pub trouble: Option<String>,
    pub theme: Theme,
}

/// The smallest screen that everything is on.
const CHART_ROWS: u16 = 6;
const LABEL: usize = 10;
/// Narrower screens have one chart, and shorter lines.
const WIDE: u16 = 76;

/// Draws everything that there is room for.
pub fn draw(watched: &Watched, frame: &mut Frame<'_>) {
    let area = frame.area();
    let rows = Rows::of(area.height);
    let [title, summary, body, charts, channels, pages, notice, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(rows.summary),
        Constraint::Length(4),
        Constraint::Length(rows.charts),
        Constraint::Length(rows.channels),
        Constraint::Length(rows.pages),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);
    draw_title(watched, frame, title);
    draw_keys(watched, frame, keys);
    draw_notice(watched, frame, notice);
    let theme = watched.theme;
    let text = Paragraph::new(Span::styled(sentence(watched), theme.strong())).wrap(Wrap { trim: true });
    frame.render_widget(text, summary);
    let Some(report) = watched.series.latest() else { return };
    draw_body(watched, report, frame, body);
    if rows.charts > 0 {
        draw_charts(watched, frame, charts);
    }
    if rows.channels > 0 {
        draw_channels(watched, report, frame, channels);
    }
    let kinds = report.ram.pages.named().map(|(name, pages)| format!("{name:<5}{}", count(pages)));
    frame.render_widget(labelled("Pages", kinds.join(" "), theme), pages);
}

/// How many rows each part has. They depend on the screen alone, so that nothing moves while a migration goes on.
struct Rows {
    summary: u16,
    charts: u16,
    channels: u16,
    pages: u16,
}

impl Rows {
    fn of(height: u16) -> Self {
        let summary = if height < 16 { 1 } else { 2 };
        let pages = u16::from(height >= 10);
        // The title, the summary, four rows of figures, pages, three rows for what is wrong, and keys.
        let notice = if height < 16 { 1 } else { 3 };
        let left = height.saturating_sub(1 + summary + 4 + pages + notice + 1);
        let channels = match left {
            0..3 => 0,
            3..6 => left.min(4),
            6 | 7 => 0,
            8..12 => left - CHART_ROWS,
            more => 4 + (more - 12) / 3,
        };
        let charts = left - channels;
        Self { summary, charts: if charts < CHART_ROWS { 0 } else { charts }, channels, pages }
    }
}

fn sentence(watched: &Watched) -> String {
    match watched.series.latest() {
        None => format!("no migration yet: waiting for one to begin; this machine: {}", watched.state),
        Some(report) => headline(report),
    }
}

fn draw_title(watched: &Watched, frame: &mut Frame<'_>, area: Rect) {
    let style = watched.theme.title();
    let (side, status, so_far) = match watched.series.latest() {
        None => ("", Status::None, 0.0),
        Some(report) => (side_name(report.side), report.status, sane(report.total_seconds)),
    };
    let right = format!("{:<14}{} ", status.to_string(), elapsed(so_far));
    let (name, right) = match area.width {
        WIDE.. => (" dunlin watch  ", format!("{side:<13}{right}")),
        _ => (" ", right),
    };
    let room = usize::from(area.width).saturating_sub(right.chars().count());
    let left: String = format!("{name}{}", watched.machine).chars().take(room).collect();
    frame.render_widget(Line::styled(format!("{left:<room$}{right}"), style), area);
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

fn labelled(label: &str, text: impl Into<String>, theme: Theme) -> Line<'static> {
    Line::from(vec![Span::styled(format!("{label:<LABEL$}"), theme.faint()), Span::raw(text.into())])
}

/// The guest, RAM, the round and the downtime: a row each.
fn draw_body(watched: &Watched, report: &Report, frame: &mut Frame<'_>, area: Rect) {
    let theme = watched.theme;
    let [guest, ram, round, downtime] = Layout::vertical([Constraint::Length(1); 4]).areas(area);
    frame.render_widget(guest_row(watched, report), guest);
    let total = report.ram.total_bytes;
    frame.render_widget(progress("RAM", report.ram.remaining_bytes, total, theme, area.width), ram);
    let (number, covered) = match watched.series.rounds().last() {
        None => (1, total),
        Some(last) if report.status.is_final() => (last.round.number, last.round.ram_bytes),
        Some(last) => (last.round.number.saturating_add(1), last.round.dirty_bytes),
    };
    let label = format!("Round{number:>4}");
    frame.render_widget(progress(&label, report.ram.round_remaining_bytes, covered, theme, area.width), round);
    frame.render_widget(downtimes(report, theme, area.width), downtime);
}

/// Where the guest is, and what is taken of its time.
fn guest_row(watched: &Watched, report: &Report) -> Line<'static> {
    let theme = watched.theme;
    let text = format!("{:<27} this machine: {:<15}", report.guest.to_string(), watched.state);
    let mut row = labelled("Guest", text, theme);
    if let Some(most) = report.vcpu_throttle_percent.iter().max().filter(|most| **most > 0) {
        row.push_span(Span::styled(format!("throttle {most:>2} %"), theme.alarm()));
    }
    row
}

/// How much of `total` is done: a bar and figures.
fn progress(label: &str, left: u64, total: u64, theme: Theme, width: u16) -> Line<'static> {
    let done = if total == 0 { 0.0 } else { 1.0 - left as f64 / total as f64 };
    let of = if width < WIDE { String::new() } else { format!(" of {}", size(total)) };
    let figures = format!("{}  {} to go{of}", percent(done), size(left));
    let room = usize::from(width).saturating_sub(LABEL + 1 + figures.chars().count());
    let full = ((done.clamp(0.0, 1.0) * room as f64).floor() as usize).min(room);
    Line::from(vec![
        Span::styled(format!("{label:<LABEL$}"), theme.faint()),
        Span::styled("█".repeat(full), theme.first()),
        Span::styled("░".repeat(room - full), theme.faint()),
        Span::raw(format!(" {figures}")),
    ])
}

fn downtimes(report: &Report, theme: Theme, width: u16) -> Line<'static> {
    let limit = sane(report.downtime_limit_seconds);
    let predicted = report.predicted_downtime_seconds;
    let ended = Some(sane(report.downtime_seconds)).filter(|actual| *actual > 0.0);
    let so_far = report.stopped_seconds.map(sane);
    let actual = ended.or(so_far);
    let name = if ended.is_none() && so_far.is_some() { "so far" } else { "actual" };
    let or_none = |value: Option<f64>| value.map_or(format!("{:>10}", "-"), time);
    let actual_text = match (width, actual) {
        (..WIDE, None) => String::new(),
        _ => format!("   {name} {}", or_none(actual)),
    };
    let predicted_text = match (width, actual) {
        (..WIDE, Some(_)) => String::new(),
        _ => format!("   predicted {}", or_none(predicted)),
    };
    let judged = actual.or(predicted);
    let (word, style) = match judged {
        None => ("", theme.strong()),
        Some(value) if value <= limit => ("  within", theme.strong()),
        Some(_) => ("  ABOVE", theme.alarm()),
    };
    Line::from(vec![
        Span::styled(format!("{:<LABEL$}", "Downtime"), theme.faint()),
        Span::raw(format!("limit {}{predicted_text}{actual_text}", time(limit))),
        Span::styled(word, style),
    ])
}

fn draw_charts(watched: &Watched, frame: &mut Frame<'_>, area: Rect) {
    let (series, theme) = (&watched.series, watched.theme);
    if area.width < WIDE {
        charts::rates(series, theme, frame, area);
        return;
    }
    let parts = [Constraint::Fill(5), Constraint::Length(1), Constraint::Fill(3)];
    let [left, _, right] = Layout::horizontal(parts).areas(area);
    charts::rates(series, theme, frame, left);
    charts::downtime(series, theme, frame, right);
}

/// A row a channel; those that there is no room for are added up in the last.
fn draw_channels(watched: &Watched, report: &Report, frame: &mut Frame<'_>, area: Rect) {
    let theme = watched.theme;
    let mut lines = vec![Line::styled(
        format!(
            "{:<LABEL$}{:>10}  {:>12}  {:>10}  {:>10}  {:>9}  {:>9}",
            "Channel", "bytes", "a second", "busy", "waiting", "frames", "pages"
        ),
        theme.faint(),
    )];
    let room = usize::from(area.height).saturating_sub(1);
    let all = &report.channels;
    let alone = if all.len() > room { room.saturating_sub(1) } else { all.len() };
    let (each, others) = all.split_at_checked(alone).unwrap_or((all, &[]));
    for (n, channel) in each.iter().enumerate() {
        lines.push(channel_row(watched, &channel.index.to_string(), std::slice::from_ref(channel), n..n + 1));
    }
    if !others.is_empty() {
        lines.push(channel_row(watched, &format!("{} more", others.len()), others, alone..all.len()));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn channel_row(
    watched: &Watched,
    name: &str,
    channels: &[ChannelReport],
    places: std::ops::Range<usize>,
) -> Line<'static> {
    let sum = |value: fn(&ChannelReport) -> u64| channels.iter().map(value).fold(0, u64::saturating_add);
    let time = |value: fn(&ChannelReport) -> f64| channels.iter().map(value).map(sane).sum::<f64>();
    let (busy, waiting) = (time(|channel| channel.busy_seconds), time(|channel| channel.waiting_seconds));
    let (bytes, frames, pages) =
        (sum(|channel| channel.transferred_bytes), sum(|channel| channel.frames), sum(|channel| channel.pages.total()));
    let a_second = if watched.series.latest().is_some_and(|report| report.status.is_final()) {
        watched.series.mean_rate(bytes)
    } else {
        watched.series.rate_now(1.0, |point| {
            let channels = point.channels.get(places.clone()).unwrap_or_default();
            Some(channels.iter().fold(0, |sum, bytes| bytes.saturating_add(sum)))
        })
    };
    let name = format!("{name:>7}");
    Line::raw(format!(
        "{name:<LABEL$}{}  {}  {}  {}  {frames:>9}  {pages:>9}",
        size(bytes),
        rate(a_second),
        elapsed(busy),
        elapsed(waiting)
    ))
}

/// What is wrong, if something is: the worst of it.
fn draw_notice(watched: &Watched, frame: &mut Frame<'_>, area: Rect) {
    let report = watched.series.latest();
    let (what, text) = if let Some(error) = report.and_then(|report| report.error.as_ref()) {
        ("Error: ", error.message.clone())
    } else if let Some(lost) = &watched.lost {
        ("Lost: ", lost.clone())
    } else if let Some(trouble) = &watched.trouble {
        ("Recording: ", trouble.clone())
    } else if let Some(why) = report.and_then(|report| report.not_converging.as_ref()) {
        ("It does not converge: ", why.clone())
    } else if let Some(refused) = report.map(|report| &report.refused_connections).filter(|refused| refused.count > 0) {
        ("Refused a connection: ", refused.latest.clone().unwrap_or_else(|| "no reason is known".to_owned()))
    } else {
        return;
    };
    let line = Line::from(vec![Span::styled(what, watched.theme.alarm()), Span::raw(text)]);
    frame.render_widget(Paragraph::new(line).wrap(Wrap { trim: true }), area);
}

fn draw_keys(watched: &Watched, frame: &mut Frame<'_>, area: Rect) {
    let ended = watched.series.latest().is_some_and(|report| report.status.is_final());
    let text = match (&watched.lost, ended) {
        (Some(_), _) => "q leaves; this is the last that was seen",
        (None, true) => "q leaves; the migration has ended",
        (None, false) if watched.series.latest().is_none() => "q leaves",
        (None, false) => "q leaves; the migration goes on",
    };
    frame.render_widget(Line::styled(text, watched.theme.faint()), area);
}

#[cfg(test)]
mod tests;
