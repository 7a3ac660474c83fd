//! `dunlin status`: what a machine and its migration are doing.

use anyhow::Result;
use dunlin::{GuestPlace, Report, Side, Status};
use dunlin_monitor::uri_of_socket_address;
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::At;
use crate::connection;
use crate::terminal;
use dunlin_monitor::text;

pub fn status(at: &At) -> Result<Outcome> {
    let mut client = connection::connect(&at.qmp)?;
    let state = client.execute("query-status", json!({}))?;
    let migration = connection::report(&mut client)?;
    if at.json {
        let report = migration.map(|(json, _)| json);
        terminal::out(&connection::pretty(&json!({"guest": state, "migration": report})))?;
        return Ok(Outcome::Success);
    }
    let report = migration.map(|(_, report)| report);
    let name = state.get("status").and_then(Value::as_str).unwrap_or("unknown");
    let mut text = format!("guest: {}\n", sentence(name, report.as_ref()));
    let is_waiting = |report: &Report| {
        report.side == Side::Destination && report.status == Status::Setup && report.session.is_none()
    };
    if report.as_ref().is_some_and(is_waiting) {
        let info = client.execute("query-migrate", json!({}))?;
        let address = uri_of_socket_address(&info).map_or("an open connection".to_owned(), |uri| uri.to_string());
        text.push_str(&format!("waiting for a migration on {address}\n"));
        if let Some(latest) = report.and_then(|report| report.refused_connections.latest) {
            text.push_str(&format!("refused the connection from {latest}\n"));
        }
    } else if let Some(report) = &report {
        text.push_str(&format!("migration, seen by the {}: {}", report.side, text::report(report)));
    } else {
        text.push_str("no migration yet\n");
    }
    terminal::out(&text)?;
    Ok(Outcome::Success)
}

fn sentence(state: &str, report: Option<&Report>) -> String {
    let undecided = report.is_some_and(|report| report.guest == GuestPlace::Undecided);
    match state {
        "finish-migrate" | "inmigrate" if undecided => {
            "undecided: it does not run here, and may or may not run at the other side; make sure, then decide \
             (dunlin cont --take-back, or dunlin quit)"
                .to_owned()
        }
        "running" => "running here".to_owned(),
        "paused" => "here, paused (dunlin cont starts it)".to_owned(),
        "inmigrate" => "not here: it may come in by a migration".to_owned(),
        "finish-migrate" => "paused for the switchover".to_owned(),
        "shutdown" => "here, and has ended".to_owned(),
        "postmigrate" => "gone: it was migrated away and belongs to the destination".to_owned(),
        other => other.to_owned(),
    }
}
