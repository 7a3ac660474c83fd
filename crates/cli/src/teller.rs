//! What a machine's process says of its migrations on standard error: each thing once.

use std::time::{Duration, Instant};

use dunlin::{GuestPlace, Report, Side, Status};

use crate::terminal;

/// Tells each thing worth telling once.
#[derive(Debug, Default)]
pub struct Teller {
    ended: Option<EndKey>,
    refused: u64,
    undecided: bool,
    phase: Option<Stay>,
}

/// How long a migration has been in a phase.
#[derive(Debug)]
struct Stay {
    session: Option<String>,
    status: Status,
    since: Instant,
    told: bool,
}

/// How long a phase usually takes at most. One that takes longer may hang, and says what it waits for.
fn usual(report: &Report) -> Option<Duration> {
    Some(match report.status {
        // Until a destination has been found and has looked at the machine; one that listens waits for somebody.
        Status::Setup if report.side == Side::Source => Duration::from_secs(10),
        Status::Device => {
            Duration::from_secs_f64(report.downtime_limit_seconds.clamp(0.0, 3600.0)) + Duration::from_secs(5)
        }
        Status::PreSwitchover => Duration::from_secs(60),
        Status::Cancelling => Duration::from_secs(5),
        _ => return None,
    })
}

/// What tells one ended migration from another: session, side and length.
type EndKey = (Option<String>, Side, Status, u64);

impl Teller {
    /// Says what is new.
    pub fn look(&mut self, report: Option<&Report>) {
        for line in self.news(report, Instant::now()) {
            terminal::note(&line);
        }
    }

    fn news(&mut self, report: Option<&Report>, now: Instant) -> Vec<String> {
        let mut news = Vec::new();
        let Some(report) = report else { return news };
        let refused = &report.refused_connections;
        if refused.count > self.refused {
            let latest = refused.latest.as_deref().unwrap_or("no reason is known");
            news.push(match refused.count - self.refused {
                1 => format!("refused a connection: {latest}"),
                more => format!("refused {more} connections; the latest: {latest}"),
            });
        }
        // A new migration counts from zero again.
        self.refused = refused.count;
        let key = report
            .status
            .is_final()
            .then(|| (report.session.clone(), report.side, report.status, report.total_seconds.to_bits()));
        if key.is_some() && key != self.ended {
            news.push(end(report));
        }
        // A destination whose source was lost has not ended, but waits for somebody.
        let undecided = report.guest == GuestPlace::Undecided && report.error.is_some();
        if undecided && !self.undecided && key.is_none() {
            let why = report.error.as_ref().map_or("", |error| &error.message);
            news.push(format!("the guest is undecided: {why}"));
        }
        self.undecided = undecided;
        news.extend(self.hangs(report, now));
        self.ended = key;
        news
    }

    /// Once for each phase that takes longer than it usually does: what it waits for.
    fn hangs(&mut self, report: &Report, now: Instant) -> Option<String> {
        let is_same = |stay: &&mut Stay| stay.status == report.status && stay.session == report.session;
        let Some(stay) = self.phase.as_mut().filter(|stay| is_same(stay)) else {
            let (session, status) = (report.session.clone(), report.status);
            self.phase = Some(Stay { session, status, since: now, told: false });
            return None;
        };
        let long = now.saturating_duration_since(stay.since);
        if stay.told || usual(report).is_none_or(|usual| long < usual) {
            return None;
        }
        stay.told = true;
        let waits_for = report.waiting_for.as_deref().unwrap_or(match report.status {
            Status::Setup => "the destination to answer, and to accept the machine",
            Status::Cancelling => "what is under way to end",
            _ => "the other side",
        });
        Some(format!("the migration has been in {} for {} s: it waits for {waits_for}", report.status, long.as_secs()))
    }
}

fn end(report: &Report) -> String {
    let here = match (report.side, report.guest) {
        (Side::Source, GuestPlace::RunningAtSource) | (Side::Destination, GuestPlace::RunningAtDestination) => {
            "the guest is running here".to_owned()
        }
        (_, place) => format!("the guest is {place}"),
    };
    match (report.status, &report.error) {
        (Status::Completed, _) => format!("migration completed: {here}"),
        (status, Some(error)) => format!("migration {status}: {}", error.message),
        (status, None) => format!("migration {status}: {here}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_once() {
        let (mut teller, now) = (Teller::default(), Instant::now());
        assert!(teller.news(None, now).is_empty());
        let mut report = Report::new(Side::Destination, GuestPlace::AtSource);
        report.status = Status::Active;
        report.refused_connections.count = 2;
        report.refused_connections.latest = Some("127.0.0.1:9: not dunlin's protocol".to_owned());
        assert_eq!(
            teller.news(Some(&report), now),
            ["refused 2 connections; the latest: 127.0.0.1:9: not dunlin's protocol"]
        );
        assert!(teller.news(Some(&report), now).is_empty());
        report.status = Status::Completed;
        report.guest = GuestPlace::RunningAtDestination;
        assert_eq!(teller.news(Some(&report), now), ["migration completed: the guest is running here"]);
        assert!(teller.news(Some(&report), now).is_empty());
        report.total_seconds = 1.0;
        assert_eq!(teller.news(Some(&report), now).len(), 1);
    }

    #[test]
    fn a_phase_that_takes_too_long() {
        let (mut teller, now) = (Teller::default(), Instant::now());
        let after = |seconds| now + Duration::from_secs(seconds);
        let mut report = Report::new(Side::Source, GuestPlace::PausedAtSource);
        (report.status, report.downtime_limit_seconds) = (Status::Device, 2.0);
        report.waiting_for = Some("the destination to start the guest".to_owned());
        assert!(teller.news(Some(&report), now).is_empty());
        assert!(teller.news(Some(&report), after(6)).is_empty());
        assert_eq!(
            teller.news(Some(&report), after(8)),
            ["the migration has been in device for 8 s: it waits for the destination to start the guest"]
        );
        assert!(teller.news(Some(&report), after(20)).is_empty(), "once");
        report.status = Status::Active;
        assert!(teller.news(Some(&report), after(21)).is_empty());
        assert!(teller.news(Some(&report), after(4000)).is_empty(), "RAM may take as long as it takes");
        (report.status, report.waiting_for) = (Status::Cancelling, None);
        assert!(teller.news(Some(&report), after(4001)).is_empty());
        assert_eq!(
            teller.news(Some(&report), after(4007)),
            ["the migration has been in cancelling for 6 s: it waits for what is under way to end"]
        );
    }
}
