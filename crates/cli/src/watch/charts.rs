//! The charts of the screen. What they draw differs in its mark as well as in its colour.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Chart, Dataset, GraphType, Paragraph};

use super::figures::rate;
use super::theme::Theme;
use crate::scale::Scale;
use crate::series::{Series, sane};

/// Charts have no more points than this: each column of the screen has two.
const POINTS: usize = 600;
/// The rates drawn are those of this long, or of a fiftieth of the whole.
const WINDOW: f64 = 0.1;
/// The room for the names on an axis of rates, so that the chart stays where it is.
const RATE_LABEL: usize = 10;
const TIME_LABEL: usize = 6;

/// The rates over time.
pub fn rates(series: &Series, theme: Theme, frame: &mut Frame<'_>, area: Rect) {
    let window = (series.seconds() / 50.0).max(WINDOW);
    let sent = thinned(series.rates(window, |point| Some(point.transferred_bytes)));
    let dirtied = steps(&thinned(
        series.points().iter().map(|point| (point.seconds, point.dirty_bytes_per_second as f64)).collect(),
    ));
    let top = sent.iter().chain(&dirtied).map(|(_, rate)| *rate).fold(1024.0 * 1024.0, f64::max);
    let (x, y) = (Scale::growing_time(series.seconds()), Scale::bytes(top, "/s"));
    let [title, chart] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    let (word, transfer) = match series.latest() {
        Some(report) if report.status.is_final() => ("mean", series.mean_rate(report.ram.transferred_bytes)),
        _ => ("now ", series.rate_now(1.0, |point| Some(point.transferred_bytes))),
    };
    let dirty = series.latest().map_or(0, |report| report.dirty_bytes_per_second);
    let legend = Line::from(vec![
        Span::styled("⣤⣤", theme.first()),
        Span::raw(format!(" transfer {word}{}", rate(transfer))),
        Span::styled(" ••", theme.second()),
        Span::raw(format!(" dirty{}", rate(dirty as f64))),
    ]);
    frame.render_widget(Paragraph::new(legend), title);
    let sets = vec![dataset(&dirtied, Marker::Dot, theme.second()), dataset(&sent, Marker::Braille, theme.first())];
    let labels = ends_and_middle(&y).map(|label| format!("{label:>RATE_LABEL$}")).collect();
    let chart_widget = Chart::new(sets)
        .x_axis(axis(x.bounds(), x.ticks.iter().map(|(_, label)| label.clone()).collect(), theme))
        .y_axis(axis(y.bounds(), labels, theme))
        .legend_position(None);
    frame.render_widget(chart_widget, chart);
}

/// The downtime predicted after each round, against the limit.
pub fn downtime(series: &Series, theme: Theme, frame: &mut Frame<'_>, area: Rect) {
    let Some(report) = series.latest() else { return };
    let [title, chart] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    let limit = sane(report.downtime_limit_seconds).max(1e-6);
    let predicted: Vec<(f64, f64)> = series
        .rounds()
        .iter()
        .map(|timed| (f64::from(timed.round.number), timed.round.predicted_downtime_seconds))
        .collect();
    let finite = predicted.iter().map(|(_, time)| *time).filter(|time| time.is_finite() && *time > 0.0);
    let (low, high) = finite.fold((limit, limit), |(low, high), time| (low.min(time), high.max(time)));
    let y = Scale::log_seconds(low, high * 1.01);
    let [bottom, top] = y.bounds();
    let points: Vec<(f64, f64)> =
        thinned(predicted.iter().map(|(round, time)| (*round, time.max(1e-9).log10().clamp(bottom, top))).collect());
    let first = points.first().map_or(1.0, |(round, _)| *round);
    let last = points.last().map_or(1.0, |(round, _)| *round).max(first + 9.0);
    let across = [(first, limit.log10()), (last, limit.log10())];
    let legend = Line::from(vec![
        Span::styled("••", theme.first()),
        Span::raw(" predicted  "),
        Span::styled("⠤⠤", theme.second()),
        Span::raw(" limit"),
    ]);
    frame.render_widget(Paragraph::new(legend), title);
    let sets = vec![
        dataset(&across, Marker::Braille, theme.second()),
        dataset(&points, Marker::Dot, theme.first()).graph_type(GraphType::Scatter),
    ];
    let labels = y.ticks.iter().map(|(_, label)| format!("{label:>TIME_LABEL$}")).collect();
    let rounds = vec![format!("round {first:.0}"), format!("{last:.0}")];
    let chart_widget = Chart::new(sets)
        .x_axis(axis([first, last], rounds, theme))
        .y_axis(axis([bottom, top], labels, theme))
        .legend_position(None);
    frame.render_widget(chart_widget, chart);
}

/// The names that there is room for on a low axis; they must be as far apart as what they name.
fn ends_and_middle(scale: &Scale) -> impl Iterator<Item = &str> {
    let last = scale.ticks.len().saturating_sub(1);
    let is_named = move |n: usize| n == 0 || n == last || n * 2 == last;
    scale.ticks.iter().enumerate().filter(move |(n, _)| is_named(*n)).map(|(_, (_, label))| label.as_str())
}

fn dataset<'a>(points: &'a [(f64, f64)], marker: Marker, style: Style) -> Dataset<'a> {
    Dataset::default().data(points).marker(marker).graph_type(GraphType::Line).style(style)
}

fn axis(bounds: [f64; 2], labels: Vec<String>, theme: Theme) -> Axis<'static> {
    Axis::default().bounds(bounds).labels(labels).style(theme.faint())
}

fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS).max(1);
    let last = points.len().saturating_sub(1);
    points.into_iter().enumerate().filter(|(n, _)| n % step == 0 || *n == last).map(|(_, point)| point).collect()
}

/// A value holds from its point to the next.
fn steps(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut before = None;
    let mut path = Vec::with_capacity(points.len() * 2);
    for (x, y) in points {
        path.extend(before.map(|before| (*x, before)));
        path.push((*x, *y));
        before = Some(*y);
    }
    path
}
