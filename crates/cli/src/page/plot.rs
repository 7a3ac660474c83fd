//! A plot: axes, bands, lines and marks as inline SVG, with a text for those who do not see it.
//!
//! Lines differ in colour and in dashes; the style sheet has both.

use maud::{Markup, PreEscaped, html};

use crate::scale::Scale;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 82.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 32.0;

/// How consecutive points are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joined {
    /// By straight lines.
    Straight,
    /// A value holds from its point to the next.
    AsSteps,
}

/// What is drawn at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Circle,
    Diamond,
    /// Beyond the top of the scale.
    Up,
}

/// A plot in the making.
#[derive(Debug)]
pub struct Plot {
    id: &'static str,
    title: &'static str,
    /// What it shows, in words and figures.
    description: String,
    x: Scale,
    y: Scale,
    legend: Vec<(usize, String)>,
    behind: Vec<Markup>,
    before: Vec<Markup>,
}

impl Plot {
    pub fn new(id: &'static str, title: &'static str, x: Scale, y: Scale) -> Self {
        Self { id, title, description: String::new(), x, y, legend: Vec::new(), behind: Vec::new(), before: Vec::new() }
    }

    /// Says what it shows.
    pub fn describe(&mut self, description: String) {
        self.description = description;
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)
    }

    /// A stretch of time: every other one is shaded, and named where there is room.
    pub fn band(&mut self, number: u32, from: f64, to: f64, about: &str) {
        let (from, to) = (self.x(from), self.x(to));
        let width = to - from;
        let shade = if number % 2 == 1 { "band odd" } else { "band" };
        let label = number.to_string();
        let is_named = width > 7.0 * label.len() as f64 + 6.0;
        self.behind.push(html! {
            rect class=(shade) x=(tenths(from)) y=(TOP) width=(tenths(width)) height=(HEIGHT - TOP - BOTTOM) {
                title { (about) }
            }
            @if is_named {
                text class="round" x=(tenths((from + to) / 2.0)) y=(TOP - 6.0) { (label) }
            }
        });
    }

    /// A line in style number `style`, which the legend calls `name`.
    pub fn line(&mut self, style: usize, name: &str, points: &[(f64, f64)], joined: Joined) {
        self.legend.push((style, name.to_owned()));
        let path = self.path(points, joined);
        self.before.push(html! { path class={ "line s" (style) } d=(path) {} });
    }

    /// The area below a line.
    pub fn area(&mut self, style: usize, points: &[(f64, f64)]) {
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return };
        let bottom = tenths(HEIGHT - BOTTOM);
        let line = self.path(points, Joined::Straight);
        let path = format!("{line}L{} {bottom}L{} {bottom}Z", tenths(self.x(last.0)), tenths(self.x(first.0)));
        self.behind.push(html! { path class={ "area s" (style) } d=(path) {} });
    }

    /// A line from side to side.
    pub fn level(&mut self, style: usize, name: &str, value: f64) {
        self.legend.push((style, name.to_owned()));
        let y = tenths(self.y(value));
        self.before.push(html! {
            line class={ "line s" (style) } x1=(LEFT) x2=(WIDTH - RIGHT) y1=(y) y2=(y) {}
        });
    }

    /// A mark; pointing at it tells `about`.
    pub fn mark(&mut self, style: usize, mark: Mark, at: (f64, f64), about: &str) {
        let (x, y) = (self.x(at.0), self.y(at.1));
        let shape = match mark {
            Mark::Circle => format!("M{} {}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0Z", tenths(x - 3.0), tenths(y)),
            Mark::Diamond => format!("M{} {}l6 6l-6 6l-6 -6Z", tenths(x), tenths(y - 6.0)),
            Mark::Up => format!("M{} {}l5 8h-10Z", tenths(x), tenths(y)),
        };
        self.before.push(html! { path class={ "mark s" (style) } d=(shape) { title { (about) } } });
    }

    /// Names a mark in the legend.
    pub fn name_mark(&mut self, style: usize, name: &str) {
        self.legend.push((style, name.to_owned()));
    }

    fn path(&self, points: &[(f64, f64)], joined: Joined) -> String {
        let mut path = String::new();
        let mut before = None;
        for (x, y) in points {
            let (x, y) = (tenths(self.x(*x)), tenths(self.y(*y)));
            match (before.replace(y.clone()), joined) {
                (None, _) => path.push_str(&format!("M{x} {y}")),
                (Some(_), Joined::Straight) => path.push_str(&format!("L{x} {y}")),
                (Some(_), Joined::AsSteps) => path.push_str(&format!("H{x}V{y}")),
            }
        }
        path
    }

    /// The whole figure.
    pub fn finish(self) -> Markup {
        let (title_id, text_id) = (format!("{}-title", self.id), format!("{}-text", self.id));
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        html! {
            figure id=(self.id) {
                h2 { (self.title) }
                (legend(&self.legend))
                svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-labelledby={ (title_id) " " (text_id) } {
                    title id=(title_id) { (self.title) }
                    desc id=(text_id) { (self.description) }
                    @for part in &self.behind { (part) }
                    @for (value, label) in &self.y.ticks {
                        @let y = self.y(*value);
                        line class="grid" x1=(LEFT) x2=(right) y1=(tenths(y)) y2=(tenths(y)) {}
                        text class="tick y" x=(LEFT - 8.0) y=(tenths(y + 4.0)) { (label) }
                    }
                    @for (value, label) in &self.x.ticks {
                        @let x = self.x(*value);
                        line class="grid" x1=(tenths(x)) x2=(tenths(x)) y1=(bottom) y2=(bottom + 4.0) {}
                        text class="tick x" x=(tenths(x)) y=(bottom + 18.0) { (label) }
                    }
                    @for part in &self.before { (part) }
                }
                figcaption { (self.description) }
            }
        }
    }
}

/// What the lines' colours and dashes mean.
fn legend(entries: &[(usize, String)]) -> Markup {
    html! {
        ul class="legend" {
            @for (style, name) in entries {
                li {
                    (sample(*style))
                    (name)
                }
            }
        }
    }
}

/// A short piece of a line, or the mark, in a style.
fn sample(style: usize) -> Markup {
    html! {
        svg class="sample" viewBox="0 0 34 12" aria-hidden="true" {
            @if style == MARK_STYLE {
                path class={ "mark s" (style) } d="M17 0l6 6l-6 6l-6 -6Z" {}
            } @else {
                line class={ "line s" (style) } x1="1" x2="33" y1="6" y2="6" {}
            }
        }
    }
}

/// The style that is of marks alone.
pub const MARK_STYLE: usize = 8;

/// Coordinates need no more digits.
pub fn tenths(value: f64) -> String {
    format!("{value:.1}")
}

/// Text that is markup already: ours alone, never from a file.
pub fn ours(text: &'static str) -> PreEscaped<&'static str> {
    PreEscaped(text)
}
