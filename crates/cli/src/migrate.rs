//! `dunlin migrate`: moves a running machine and shows how it goes.

use anyhow::{Result, anyhow, bail};
use dunlin::Status;
use serde_json::json;

use crate::Outcome;
use crate::args::Migrate;
use crate::connection;
use crate::following;
use crate::interrupts::Interrupts;
use crate::progress::Progress;
use crate::recording::Recorder;
use crate::terminal;
use dunlin_monitor::text;

pub fn migrate(args: &Migrate, interrupts: &Interrupts) -> Result<Outcome> {
    let mut client = connection::connect(&args.qmp)?;
    // What is set for this migration must not change another's.
    if connection::report(&mut client)?.is_some_and(|(_, report)| connection::is_under_way(&report)) {
        bail!(
            "could not start a migration to {}: one is running already; dunlin status shows it, dunlin cancel ends it",
            args.uri
        );
    }
    let machine = args.qmp.to_string();
    // First what changes nothing at the machine when it is refused.
    let mut recorder = args.record.as_ref().map(|path| Recorder::create(path, &machine)).transpose()?;
    if let Err(error) = connection::set(&mut client, &args.set) {
        if let Some(recorder) = recorder {
            recorder.discard();
        }
        return Err(error);
    }
    if let Err(error) = client.execute("migrate", json!({"uri": args.uri.to_string()})) {
        if let Some(recorder) = recorder {
            recorder.discard();
        }
        let running = connection::report(&mut client)?.is_some_and(|(_, report)| connection::is_under_way(&report));
        let advice = if running { "; dunlin status shows it, dunlin cancel ends it" } else { "" };
        bail!("could not start a migration to {}: {error}{advice}", args.uri);
    }
    if args.detach {
        terminal::out(&format!("migrating to {}; `dunlin status --qmp {}` tells how it goes", args.uri, args.qmp))?;
        return Ok(Outcome::Success);
    }
    let followed = following::follow(&mut client, interrupts, &mut Progress::new(), recorder.as_mut());
    let mut ended = followed.map_err(|error| {
        let error = terminal::one_line(&error);
        anyhow!("the source no longer answers: {error}; ask the destination (dunlin status) whether it has the guest")
    })?;
    // The error goes to standard error, once.
    let failure = following::failure(&ended.report);
    if ended.report.error.take().is_some() {
        ended.report.summary = format!("{}; the guest is {}", ended.report.status, ended.report.guest);
    }
    terminal::out(&if args.json { connection::pretty(&ended.json) } else { text::report(&ended.report) })?;
    match (ended.report.status, ended.interrupted) {
        (Status::Completed, false) => Ok(Outcome::Success),
        (Status::Completed, true) => {
            terminal::note(&format!("too late to cancel: the guest is {}", ended.report.guest));
            Ok(Outcome::Success)
        }
        (Status::Cancelled, true) => {
            terminal::note(&format!("cancelled; the guest goes on, {}", ended.report.guest));
            Ok(Outcome::Interrupted)
        }
        _ => Err(failure),
    }
}
