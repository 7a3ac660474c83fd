//! `dunlin watch`: a machine's migration as it goes, on a terminal's screen; elsewhere as lines.

mod charts;
mod figures;
mod keys;
mod poller;
mod screen;
mod terminal_screen;
mod theme;

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Result, bail};
use dunlin::Status;
use dunlin_monitor::text;

use self::poller::{News, Pace, Poller};
use self::screen::Watched;
use self::terminal_screen::{Key, TerminalScreen};
use self::theme::Theme;
use crate::Outcome;
use crate::args::Watch;
use crate::following;
use crate::interrupts::{Interrupts, LastResort};
use crate::progress::Progress;
use crate::recording::Recorder;
use crate::series::Series;
use crate::terminal;

/// How often the screen is drawn anew.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long a terminal that takes no output may hold up the end once it was asked for.
const GRACE: Duration = Duration::from_secs(2);

pub fn watch(args: &Watch, interrupts: &Interrupts) -> Result<Outcome> {
    // To the end: what is said after the screen has gone may be taken by nobody as well.
    let _last_resort = LastResort::after(GRACE, interrupts, terminal_screen::forget)?;
    let machine = args.qmp.to_string();
    let recorder = args.record.as_ref().map(|path| Recorder::create(path, &machine)).transpose()?;
    let pace = if recorder.is_some() { Pace::Recording } else { Pace::Screen };
    let poller = match Poller::start(&args.qmp, pace) {
        Ok(poller) => poller,
        Err(error) => {
            if let Some(recorder) = recorder {
                recorder.discard();
            }
            return Err(error);
        }
    };
    let watched = Watched {
        machine,
        state: "unknown".to_owned(),
        series: Series::default(),
        lost: None,
        trouble: None,
        theme: Theme::from_environment(),
    };
    let mut watching = Watching { watched, poller, recorder };
    if std::io::stdout().is_terminal() {
        watching.on_screen(interrupts)?;
    } else {
        watching.as_lines(interrupts)?;
    }
    watching.outcome()
}

struct Watching {
    watched: Watched,
    poller: Poller,
    recorder: Option<Recorder>,
}

impl Watching {
    /// Takes in what the machine has said; tells whether it has said anything.
    fn take(&mut self, patience: Duration) -> bool {
        match self.poller.next(patience) {
            None => return false,
            Some(News::Lost(why)) => self.watched.lost = Some(why),
            Some(News::Seen { state, migration }) => {
                self.watched.state = state;
                if let Some((json, report)) = migration.map(|migration| *migration) {
                    let recorded = self.recorder.as_mut().map(|recorder| recorder.record(&json, &report));
                    if let Some(Err(error)) = recorded {
                        self.watched.trouble = Some(terminal::one_line(&error));
                    }
                    self.watched.series.push(report);
                }
            }
        }
        true
    }

    fn on_screen(&mut self, interrupts: &Interrupts) -> Result<()> {
        let mut screen = TerminalScreen::open()?;
        // The first look comes at once: no empty picture before it.
        self.take(INTERVAL);
        loop {
            screen.draw(|frame| screen::draw(&self.watched, frame))?;
            let key = screen.key(INTERVAL)?;
            if key == Key::Leave || interrupts.arrived() {
                return Ok(());
            }
            while self.take(Duration::ZERO) {}
        }
    }

    fn as_lines(&mut self, interrupts: &Interrupts) -> Result<()> {
        let mut progress = Progress::new();
        let mut waits = false;
        while !interrupts.arrived() && self.watched.lost.is_none() {
            self.take(INTERVAL);
            match self.watched.series.latest() {
                Some(report) if report.status.is_final() => return Ok(()),
                Some(report) => progress.show(report),
                None if !waits => {
                    waits = true;
                    progress.note("no migration yet: waiting for one to begin");
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Says how it stands, after the screen has gone.
    fn outcome(self) -> Result<Outcome> {
        if let Some(trouble) = &self.watched.trouble {
            terminal::note(&format!("the recording is not whole: {trouble}"));
        }
        let report = self.watched.series.latest();
        match report {
            Some(report) if report.status.is_final() => {
                let mut shown = report.clone();
                // The error goes to standard error, once.
                shown.error = None;
                terminal::out(&text::report(&shown))?;
                if report.status != Status::Completed {
                    return Err(following::failure(report));
                }
            }
            Some(report) => terminal::note(&format!("left; the migration is {}, and goes on", report.status)),
            None => terminal::note("left; there was no migration"),
        }
        if let Some(lost) = &self.watched.lost
            && !report.is_some_and(|report| report.status.is_final())
        {
            bail!("{lost}");
        }
        Ok(Outcome::Success)
    }
}
