//! A migration from its start to its end, watched from outside.

use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use dunlin::error::Phase;
use dunlin::{GuestPlace, Report, Status};
use dunlin_monitor::Client;
use serde_json::{Value, json};

use crate::connection;
use crate::interrupts::Interrupts;
use crate::progress::Progress;
use crate::recording::{self, Recorder};
use crate::terminal;

const POLL: Duration = Duration::from_millis(100);

/// A migration that has ended.
#[derive(Debug)]
pub struct Ended {
    /// The source's report.
    pub report: Report,
    /// The same, as it came.
    pub json: Value,
    /// It was asked to end before it had.
    pub interrupted: bool,
}

/// Shows the migration of `client`'s machine until it ends, and records it. When interrupted, cancels it and goes on
/// to its end.
pub fn follow(
    client: &mut Client,
    interrupts: &Interrupts,
    progress: &mut Progress,
    mut recorder: Option<&mut Recorder>,
) -> Result<Ended> {
    let mut interrupted = false;
    loop {
        let (json, report) = connection::report(client)?.ok_or_else(|| anyhow!("the source knows of no migration"))?;
        let recorded = recorder.as_mut().map(|recorder| recorder.record(&json, &report));
        if let Some(Err(error)) = recorded {
            // The migration is worth more than its recording.
            progress.note(&format!("the recording is not whole: {}", terminal::one_line(&error)));
        }
        if report.status.is_final() {
            progress.finish();
            return Ok(Ended { report, json, interrupted });
        }
        progress.show(&report);
        if interrupts.arrived() && !interrupted {
            interrupted = true;
            progress.note("cancelling the migration");
            if let Err(error) = client.execute("migrate_cancel", json!({})) {
                progress.note(&format!("it cannot be cancelled any more: {error}"));
            }
        }
        let pause = if recorder.is_some() { recording::interval(Some(&report)) } else { POLL };
        if interrupted {
            thread::sleep(pause);
        } else {
            interrupts.sleep(pause);
        }
    }
}

/// What to say of a migration that did not complete.
pub fn failure(report: &Report) -> anyhow::Error {
    let what = if report.status == Status::Cancelled { "was cancelled" } else { "failed" };
    match &report.error {
        Some(error) => anyhow!("the migration {what}: {}; {}", error.message, advice(report.guest, Some(error.phase))),
        None => anyhow!("the migration {what}; the guest is {}; {}", report.guest, advice(report.guest, None)),
    }
}

/// What can be done about a guest that is at `guest`.
fn advice(guest: GuestPlace, phase: Option<Phase>) -> &'static str {
    match (guest, phase) {
        (GuestPlace::RunningAtSource | GuestPlace::AtSource, Some(Phase::Setup)) => {
            "once that is mended and a destination waits there, migrate again"
        }
        (GuestPlace::RunningAtSource | GuestPlace::AtSource, _) => "it can be migrated again",
        (GuestPlace::PausedAtSource, _) => "it can be migrated again, or started (dunlin cont)",
        (GuestPlace::RunningAtDestination, _) => "end the source (dunlin quit)",
        (GuestPlace::PausedAtDestination, _) => "start it there (dunlin cont)",
        (GuestPlace::Undecided, _) => "ask the destination (dunlin status) before you decide (dunlin cont --take-back)",
        _ => "run it anew",
    }
}
