//! The commands that ask a machine for one thing: `cancel`, `verify`, `stop`, `cont`, `quit`.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dunlin::{Report, Side};
use dunlin_monitor::Client;
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::{At, Cont};
use crate::connection;
use crate::terminal;

/// How long a machine may take to check itself.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a cancelled migration may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);
const NOTHING_TO_CANCEL: &str = "no migration is running";
/// How long a machine may take to end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(20);

pub fn cancel(at: &At) -> Result<Outcome> {
    let mut client = connection::connect(&at.qmp)?;
    let before = connection::report(&mut client)?;
    client.execute("migrate_cancel", json!({})).context("could not cancel the migration")?;
    let sentence = match before {
        Some((_, report)) if !report.status.is_final() => until_ended(&mut client, &report)?,
        _ => NOTHING_TO_CANCEL.to_owned(),
    };
    if at.json {
        let report = connection::report(&mut client)?.map(|(json, _)| json);
        terminal::out(&connection::pretty(&json!(report)))?;
    } else {
        terminal::out(&sentence)?;
    }
    Ok(Outcome::Success)
}

fn until_ended(client: &mut Client, before: &Report) -> Result<String> {
    let deadline = Instant::now() + CANCEL_TIMEOUT;
    loop {
        let Some((_, report)) = connection::report(client)? else { return Ok("cancelled".to_owned()) };
        if report.status.is_final() {
            return Ok(format!("the migration has ended: {}; the guest is {}", report.status, report.guest));
        }
        // It only waits: there was nothing to end, and nothing will.
        if !connection::is_under_way(&report) {
            return Ok(NOTHING_TO_CANCEL.to_owned());
        }
        // A destination listens on for another.
        if before.side == Side::Destination && report.session != before.session {
            return Ok(match connection::is_under_way(before) {
                true => "cancelled; this side listens on".to_owned(),
                false => "no migration was running; one has begun since".to_owned(),
            });
        }
        if Instant::now() >= deadline {
            bail!(
                "the migration did not end within {CANCEL_TIMEOUT:?} ({}); look again with dunlin status",
                report.status
            );
        }
        thread::sleep(Duration::from_millis(50));
    }
}

pub fn verify(at: &At) -> Result<Outcome> {
    let mut client = connection::connect(&at.qmp)?;
    let verification = verify_machine(&mut client)?;
    if at.json {
        terminal::out(&connection::pretty(&verification))?;
    }
    if !is_verified(&verification) {
        bail!("the guest's memory is not what it must be: {}", summary(&verification));
    }
    if !at.json {
        terminal::out(&format!("verified: {}", summary(&verification)))?;
    }
    Ok(Outcome::Success)
}

/// Has a machine check itself.
pub fn verify_machine(client: &mut Client) -> Result<Value> {
    client.execute_within(VERIFY_TIMEOUT, "x-verify", json!({})).context("could not verify the guest")
}

pub fn is_verified(verification: &Value) -> bool {
    verification.get("verified") == Some(&Value::Bool(true))
}

pub fn summary(verification: &Value) -> &str {
    verification.get("summary").and_then(Value::as_str).unwrap_or("no summary")
}

pub fn stop(at: &At) -> Result<Outcome> {
    let mut client = connection::connect(&at.qmp)?;
    client.execute("stop", json!({})).context("could not pause the guest")?;
    tell_state(&mut client, at, "the guest is paused")
}

pub fn cont(args: &Cont) -> Result<Outcome> {
    let mut client = connection::connect(&args.at.qmp)?;
    let arguments = match (args.take_back, args.force) {
        (true, true) => json!({"x-take-back": true, "x-force": true}),
        (true, false) => json!({"x-take-back": true}),
        (false, true) => json!({"x-force": true}),
        (false, false) => json!({}),
    };
    client.execute("cont", arguments).context("could not start the guest")?;
    if args.take_back {
        terminal::note(
            "the guest is here by your decision; if it runs at the other side as well, its disks are being damaged now: stop it \
             there",
        );
    }
    tell_state(&mut client, &args.at, "the guest is running")
}

fn tell_state(client: &mut Client, at: &At, sentence: &str) -> Result<Outcome> {
    if at.json {
        terminal::out(&connection::pretty(&client.execute("query-status", json!({}))?))?;
    } else {
        terminal::out(sentence)?;
    }
    Ok(Outcome::Success)
}

pub fn quit(at: &At) -> Result<Outcome> {
    let mut client = connection::connect(&at.qmp)?;
    let answer = client.execute("quit", json!({})).context("could not end the machine")?;
    if !client.wait_until_closed(QUIT_TIMEOUT) {
        bail!("the machine agreed to end and has not within {QUIT_TIMEOUT:?}; if it must, kill its process");
    }
    terminal::out(&if at.json { connection::pretty(&answer) } else { "the machine has ended".to_owned() })?;
    Ok(Outcome::Success)
}
