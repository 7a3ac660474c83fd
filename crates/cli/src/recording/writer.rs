//! Writing a recording as the migration goes.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use dunlin::{Report, Side, Status};
use serde_json::{Map, Value, json};

use super::{Header, SCHEMA, VERSION};
use crate::series::{Identity, sane};

/// How often a migration's first moments are looked at: many migrations are over soon.
const FIRST: Duration = Duration::from_millis(20);
const FIRST_SECONDS: f64 = 2.0;
/// Later ones; of long migrations, a thousandth of the time so far.
const LATER: Duration = Duration::from_millis(100);

/// How long until the report should be looked at again.
pub fn interval(report: Option<&Report>) -> Duration {
    match report
        .filter(|report| has_begun(report) && !report.status.is_final())
        .map(|report| sane(report.total_seconds))
    {
        Some(so_far) if so_far < FIRST_SECONDS => FIRST,
        Some(so_far) => LATER.max(Duration::from_secs_f64(so_far / 1000.0)),
        None => LATER,
    }
}

/// Whether there is more than a destination that waits.
fn has_begun(report: &Report) -> bool {
    !(report.side == Side::Destination && report.status == Status::Setup && report.session.is_none())
}

/// A file in the making.
#[derive(Debug)]
pub struct Recorder {
    file: File,
    path: PathBuf,
    began: Instant,
    last: Option<Last>,
    has_failed: bool,
}

/// What was written last.
#[derive(Debug)]
struct Last {
    at: Duration,
    migration: Identity,
    status: Status,
    rounds_ended: u32,
}

impl Recorder {
    /// Makes the file, which must not exist yet, and writes its first line.
    pub fn create(path: &Path, machine: &str) -> Result<Self> {
        let failed = || format!("could not record to {}", path.display());
        let file = match OpenOptions::new().write(true).create_new(true).open(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                bail!("{}: it exists already, and a recording writes over nothing; choose another name", failed())
            }
            opened => opened.with_context(failed)?,
        };
        let mut recorder = Self { file, path: path.to_owned(), began: Instant::now(), last: None, has_failed: false };
        let header = Header {
            schema: SCHEMA.to_owned(),
            version: VERSION,
            dunlin: env!("CARGO_PKG_VERSION").to_owned(),
            began: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            machine: machine.to_owned(),
        };
        recorder.write(&serde_json::to_value(header)?)?;
        Ok(recorder)
    }

    /// Writes the report, given as JSON too, if it is time or if it tells something new.
    /// After an error nothing more is written.
    pub fn record(&mut self, json: &Value, report: &Report) -> Result<()> {
        if self.has_failed || !has_begun(report) {
            return Ok(());
        }
        let recorded = self.try_record(json, report);
        self.has_failed = recorded.is_err();
        recorded
    }

    fn try_record(&mut self, json: &Value, report: &Report) -> Result<()> {
        let at = self.began.elapsed();
        let last = self.last.as_ref().filter(|last| last.migration.goes_on_in(report));
        let is_due = last.is_none_or(|last| {
            // A report that has ended says nothing new.
            let again = last.status.is_final() && last.status == report.status;
            let changed = last.status != report.status || last.rounds_ended != report.rounds_ended();
            !again && (changed || at.saturating_sub(last.at) + FIRST / 2 >= interval(Some(report)))
        });
        if !is_due {
            return Ok(());
        }
        let known = last.map_or(0, |last| last.rounds_ended);
        let report_json = with_rounds_after(json, known);
        self.write(&json!({"seconds": at.as_secs_f64(), "report": report_json}))?;
        let (migration, rounds_ended) = (Identity::of(report), report.rounds_ended());
        self.last = Some(Last { at, migration, status: report.status, rounds_ended });
        Ok(())
    }

    /// Takes the file away again: nothing came of what was to be recorded.
    pub fn discard(self) {
        // What stays is an empty recording, which says so when it is read.
        let _ = fs::remove_file(&self.path);
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        // One write for a line: whoever ends this process ends it between two lines.
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).with_context(|| format!("could not record to {}", self.path.display()))
    }
}

/// The report with those of its rounds that came after number `known`.
fn with_rounds_after(json: &Value, known: u32) -> Value {
    let is_new = |round: &&Value| round.get("number").and_then(Value::as_u64).is_none_or(|n| n > u64::from(known));
    let member = |(name, value): (&String, &Value)| match (name.as_str(), value) {
        ("rounds", Value::Array(rounds)) => (name.clone(), rounds.iter().filter(is_new).cloned().collect()),
        _ => (name.clone(), value.clone()),
    };
    match json {
        Value::Object(members) => Value::Object(members.iter().map(member).collect::<Map<_, _>>()),
        other => other.clone(),
    }
}
