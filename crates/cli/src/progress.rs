//! The line that shows how a migration goes: in place on a terminal, once a second elsewhere.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use dunlin::{Report, Status};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::terminal;
use dunlin::units::format_seconds as seconds;
use dunlin_monitor::text::rough_size;

/// The rate shown is that of this long.
const WINDOW: Duration = Duration::from_secs(1);

/// A migration's progress on standard error.
#[derive(Debug)]
pub struct Progress {
    /// On a terminal.
    bar: Option<ProgressBar>,
    last_line: Instant,
    samples: VecDeque<(Instant, u64)>,
    /// It was said why the migration does not converge.
    warned: bool,
}

impl Progress {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            match ProgressStyle::with_template("{spinner} {wide_msg}") {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self { bar, last_line: Instant::now(), samples: VecDeque::new(), warned: false }
    }

    /// Says what is going on before there is a report. Only a terminal shows it.
    pub fn say(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
            bar.tick();
        }
    }

    /// Shows where the migration stands.
    pub fn show(&mut self, report: &Report) {
        let now = Instant::now();
        let rate = self.rate(now, report.ram.transferred_bytes);
        let line = line(report, rate);
        match &report.not_converging {
            Some(why) if !self.warned => self.note(&format!("it does not converge: {why}")),
            _ => {}
        }
        self.warned = report.not_converging.is_some();
        if let Some(bar) = &self.bar {
            bar.set_message(line);
            bar.tick();
        } else if now.duration_since(self.last_line) >= Duration::from_secs(1) {
            terminal::note(&line);
            self.last_line = now;
        }
    }

    /// Takes the line away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Says something that stays.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| terminal::note(text)),
            None => terminal::note(text),
        }
    }

    /// Bytes a second of late; the report's own figure is of the last whole round, which the first does not have.
    fn rate(&mut self, now: Instant, transferred_bytes: u64) -> f64 {
        if self.samples.back().is_some_and(|(_, bytes)| *bytes > transferred_bytes) {
            self.samples.clear();
        }
        self.samples.push_back((now, transferred_bytes));
        while self.samples.len() > 2 && self.samples.get(1).is_some_and(|(then, _)| now.duration_since(*then) >= WINDOW)
        {
            self.samples.pop_front();
        }
        match self.samples.front() {
            Some((then, bytes)) if now > *then => {
                transferred_bytes.saturating_sub(*bytes) as f64 / now.duration_since(*then).as_secs_f64()
            }
            _ => 0.0,
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn line(report: &Report, rate: f64) -> String {
    match report.status {
        Status::None | Status::Setup => "connecting".to_owned(),
        Status::Active => active_line(report, rate),
        Status::PreSwitchover => match report.stopped_seconds {
            Some(stopped) => format!("the guest is paused for {}; waiting for migrate-continue", seconds(stopped)),
            None => "the guest is paused; waiting for migrate-continue".to_owned(),
        },
        Status::Device => format!("switching over: {} left", rough_size(report.ram.remaining_bytes)),
        Status::Cancelling => "cancelling".to_owned(),
        Status::Completed | Status::Failed | Status::Cancelled => report.status.to_string(),
    }
}

fn active_line(report: &Report, rate: f64) -> String {
    let left = report.ram.remaining_bytes;
    let gain = rate - report.dirty_bytes_per_second as f64;
    let time_left = if left == 0 {
        "0 s".to_owned()
    } else if gain > 0.0 {
        seconds(left as f64 / gain)
    } else {
        "no end in sight".to_owned()
    };
    // As short as it can be, for a terminal of 80 columns.
    format!(
        "round {}: {} left, {time_left}; {}/s, dirtied {}/s; downtime {}",
        report.rounds_ended().saturating_add(1),
        rough_size(left),
        rough_size(rate as u64),
        rough_size(report.dirty_bytes_per_second),
        report.predicted_downtime_seconds.map_or("unknown".to_owned(), seconds),
    )
}

#[cfg(test)]
mod tests {
    use dunlin::{GuestPlace, Side};

    use super::*;

    #[test]
    fn lines() {
        let mut report = Report::new(Side::Source, GuestPlace::RunningAtSource);
        assert_eq!(line(&report, 0.0), "connecting");
        report.status = Status::Active;
        report.ram.remaining_bytes = 100 << 20;
        report.dirty_bytes_per_second = 30 << 20;
        report.predicted_downtime_seconds = Some(0.0456);
        assert_eq!(
            line(&report, f64::from(80 << 20)),
            "round 1: 100 MiB left, 2.00 s; 80 MiB/s, dirtied 30 MiB/s; downtime 45.6 ms"
        );
        assert!(line(&report, 1.0).contains("left, no end in sight;"));
    }

    #[test]
    fn rate_of_the_last_second() {
        let mut progress = Progress { bar: None, last_line: Instant::now(), samples: VecDeque::new(), warned: false };
        let begun = Instant::now();
        assert!(progress.rate(begun, 0) < 0.1);
        for tenth in 1..=50u32 {
            let rate = progress.rate(begun + Duration::from_millis(100) * tenth, u64::from(tenth) * 1000);
            assert!((rate - 10_000.0).abs() < 1.0, "{rate}");
        }
        assert!(progress.samples.len() < 13);
    }
}
