//! One migration over time, made of reports as they come: what the screen and the page draw.

use dunlin::report::Round;
use dunlin::{Report, Side};

/// As many points are kept of a migration, however long it takes: beyond that, every other one goes.
const MAX_POINTS: usize = 4096;
/// As many rounds, the latest.
const MAX_ROUNDS: usize = 10_000;

/// The figures of one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Point {
    /// Since the migration began.
    pub seconds: f64,
    pub transferred_bytes: u64,
    pub remaining_bytes: u64,
    pub dirty_bytes_per_second: u64,
    /// The part of their time that vCPUs are held back, at most; 0 to 1.
    pub throttle: f64,
    /// Bytes on each channel.
    pub channels: Vec<u64>,
}

impl Point {
    fn of(report: &Report) -> Self {
        Self {
            seconds: sane(report.total_seconds),
            transferred_bytes: report.ram.transferred_bytes,
            remaining_bytes: report.ram.remaining_bytes,
            dirty_bytes_per_second: report.dirty_bytes_per_second,
            throttle: report.vcpu_throttle_percent.iter().max().map_or(0.0, |most| f64::from(*most) / 100.0),
            channels: report.channels.iter().map(|channel| channel.transferred_bytes).collect(),
        }
    }
}

/// A round and when it was.
#[derive(Debug, Clone, PartialEq)]
pub struct TimedRound {
    pub round: Round,
    pub begin: f64,
    pub end: f64,
}

/// What tells one migration from another.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    side: Side,
    session: Option<String>,
    seconds: f64,
}

impl Identity {
    pub fn of(report: &Report) -> Self {
        Self { side: report.side, session: report.session.clone(), seconds: sane(report.total_seconds) }
    }

    /// Whether `report`, which is later, is of the same migration.
    pub fn goes_on_in(&self, report: &Report) -> bool {
        let same_session = self.session.is_none() || self.session == report.session;
        self.side == report.side && same_session && report.total_seconds + 1e-3 >= self.seconds
    }
}

/// A migration as far as it has been seen.
#[derive(Debug, Clone, Default)]
pub struct Series {
    latest: Option<Report>,
    points: Vec<Point>,
    rounds: Vec<TimedRound>,
}

impl Series {
    /// Takes in a report. One of another migration begins anew.
    pub fn push(&mut self, report: Report) {
        if !self.latest.as_ref().is_some_and(|latest| Identity::of(latest).goes_on_in(&report)) {
            *self = Self::default();
        }
        self.push_rounds(&report);
        let point = Point::of(&report);
        match self.points.last_mut() {
            Some(last) if last.seconds >= point.seconds => *last = Point { seconds: last.seconds, ..point },
            _ => self.points.push(point),
        }
        if self.points.len() > MAX_POINTS {
            let mut n = 0usize;
            // The first and the latest stay.
            self.points.retain(|_| {
                n += 1;
                n % 2 == 1
            });
        }
        self.latest = Some(report);
    }

    /// The rounds that ended since the last report. Reports say how long each took; when it ended is known to have
    /// been between the two reports.
    fn push_rounds(&mut self, report: &Report) {
        let known = self.rounds.last().map_or(0, |last| last.round.number);
        let fresh: Vec<&Round> = report.rounds.iter().filter(|round| round.number > known).collect();
        let now = sane(report.total_seconds);
        let then = self.points.last().map_or(0.0, |point| point.seconds);
        let lengths: f64 = fresh.iter().map(|round| sane(round.seconds)).sum();
        let first = if fresh.first().is_some_and(|round| round.number == 1) {
            sane(report.setup_seconds)
        } else {
            (now - lengths).max(0.0)
        };
        let mut begin = self.rounds.last().map_or(first, |last| last.end);
        for round in fresh {
            let end = (begin + sane(round.seconds)).max(then).min(now).max(begin);
            self.rounds.push(TimedRound { round: round.clone(), begin, end });
            begin = end;
        }
        if self.rounds.len() > MAX_ROUNDS {
            self.rounds.drain(..self.rounds.len() - MAX_ROUNDS);
        }
    }

    /// The latest report.
    pub fn latest(&self) -> Option<&Report> {
        self.latest.as_ref()
    }

    /// What was seen, in order.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The rounds that have ended.
    pub fn rounds(&self) -> &[TimedRound] {
        &self.rounds
    }

    /// From the start to the latest report.
    pub fn seconds(&self) -> f64 {
        self.points.last().map_or(0.0, |last| last.seconds)
    }

    /// What `count` grew by in a second, at each point, over the `window` before it.
    pub fn rates(&self, window: f64, count: impl Fn(&Point) -> Option<u64>) -> Vec<(f64, f64)> {
        let mut rates = Vec::with_capacity(self.points.len());
        // Over less time than this a rate says little.
        let shortest = window.min(self.seconds()) / 2.0;
        let mut first = self.points.iter().peekable();
        let mut before = first.next();
        for point in &self.points {
            while first.peek().is_some_and(|next| point.seconds - next.seconds >= window) {
                before = first.next();
            }
            let long_enough =
                |start: &&Point| start.seconds < point.seconds && point.seconds - start.seconds >= shortest;
            let Some(start) = before.filter(long_enough) else { continue };
            let (Some(now), Some(then)) = (count(point), count(start).or(Some(0))) else { continue };
            rates.push((point.seconds, now.saturating_sub(then) as f64 / (point.seconds - start.seconds)));
        }
        rates
    }

    /// Bytes a second from the first page until now.
    pub fn mean_rate(&self, bytes: u64) -> f64 {
        let setup = self.latest.as_ref().map_or(0.0, |report| sane(report.setup_seconds));
        let time = self.seconds() - setup;
        if time > 0.0 { bytes as f64 / time } else { 0.0 }
    }

    /// The latest of [`rates`](Self::rates).
    pub fn rate_now(&self, window: f64, count: impl Fn(&Point) -> Option<u64>) -> f64 {
        let Some(last) = self.points.last() else { return 0.0 };
        let before = self.points.iter().rev().find(|point| last.seconds - point.seconds >= window);
        let Some(start) = before.or(self.points.first()).filter(|start| start.seconds < last.seconds) else {
            return 0.0;
        };
        let (now, then) = (count(last).unwrap_or(0), count(start).unwrap_or(0));
        now.saturating_sub(then) as f64 / (last.seconds - start.seconds)
    }
}

/// A time that can be computed with: files may say anything.
pub fn sane(seconds: f64) -> f64 {
    if seconds.is_finite() { seconds.clamp(0.0, 1e12) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use dunlin::GuestPlace;

    use super::*;

    fn report(seconds: f64, bytes: u64, rounds: u32) -> Report {
        let mut report = Report::new(Side::Source, GuestPlace::RunningAtSource);
        report.session = Some("a".to_owned());
        report.total_seconds = seconds;
        report.setup_seconds = 0.5;
        report.ram.transferred_bytes = bytes;
        report.rounds = (1..=rounds)
            .map(|number| Round {
                number,
                seconds: 1.0,
                ram_bytes: 0,
                transferred_bytes: 0,
                pages: Default::default(),
                dirty_bytes: 0,
                bandwidth_bytes_per_second: 0,
                dirty_bytes_per_second: 0,
                predicted_downtime_seconds: 0.0,
            })
            .collect();
        report
    }

    #[test]
    fn rates_and_rounds() {
        let mut series = Series::default();
        for tenth in 0..=50u32 {
            let seconds = f64::from(tenth) / 10.0;
            series.push(report(seconds, u64::from(tenth) * 1000, (seconds - 0.5).max(0.0) as u32));
        }
        for (at, rate) in series.rates(1.0, |point| Some(point.transferred_bytes)) {
            assert!((rate - 10_000.0).abs() < 1.0, "{rate} at {at}");
        }
        assert!((series.rate_now(1.0, |point| Some(point.transferred_bytes)) - 10_000.0).abs() < 1.0);
        let times: Vec<(f64, f64)> = series.rounds().iter().map(|timed| (timed.begin, timed.end)).collect();
        assert_eq!(times.len(), 4);
        for (n, (begin, end)) in times.iter().enumerate() {
            assert!((begin - n as f64 - 0.5).abs() < 1e-6 && (end - n as f64 - 1.5).abs() < 1e-6, "{times:?}");
        }
    }

    #[test]
    fn another_migration_begins_anew() {
        let mut series = Series::default();
        series.push(report(5.0, 10, 3));
        series.push(report(5.0, 20, 3));
        assert_eq!(series.points().len(), 1);
        assert_eq!(series.points()[0].transferred_bytes, 20);
        series.push(report(0.1, 1, 0));
        assert_eq!((series.points().len(), series.rounds().len()), (1, 0));
        let mut other = report(6.0, 1, 0);
        other.session = Some("b".to_owned());
        series.push(other);
        assert_eq!(series.points().len(), 1);
    }

    #[test]
    fn long_ones_take_no_more_room() {
        let mut series = Series::default();
        for n in 0..20_000u32 {
            series.push(report(f64::from(n), u64::from(n), 0));
        }
        assert!(series.points().len() <= MAX_POINTS && series.points().len() > MAX_POINTS / 2);
        assert_eq!(series.points()[0].seconds, 0.0);
        assert_eq!(series.seconds(), 19_999.0);
        let rates = series.rates(1.0, |point| Some(point.transferred_bytes));
        assert!(rates.iter().all(|(_, rate)| (rate - 1.0).abs() < 1e-6));
    }
}
