//! Reaching a machine, with errors that say what to do about it.

use std::io::ErrorKind;

use anyhow::{Context, Result, anyhow};
use dunlin::{Report, Side, Status};
use dunlin_monitor::{Address, Client, ClientError};
use serde_json::{Map, Value, json};

use crate::args::Setting;

/// Connects to the machine at `address`.
pub fn connect(address: &Address) -> Result<Client> {
    Client::connect(address).map_err(|error| {
        let advice = match &error {
            ClientError::Connect { source, .. } => match source.kind() {
                ErrorKind::PermissionDenied => "; it belongs to another user: become that user".to_owned(),
                ErrorKind::ConnectionRefused => {
                    format!("; its process has ended: start one with `dunlin run --memory 1G --qmp {address}`")
                }
                _ => format!("; start one with `dunlin run --memory 1G --qmp {address}`"),
            },
            ClientError::Silent { .. } => "; see whether its process is stopped, or end it".to_owned(),
            _ => String::new(),
        };
        anyhow!("{error}{advice}")
    })
}

/// The report of a machine's latest migration, as JSON and read.
pub fn report(client: &mut Client) -> Result<Option<(Value, Report)>> {
    let json = client.execute("query-migration-report", json!({}))?;
    if json.is_null() {
        return Ok(None);
    }
    let report = serde_json::from_value(json.clone());
    let report = report.context("the machine's report cannot be read: is it of another version of dunlin?")?;
    Ok(Some((json, report)))
}

/// Whether a migration is under way: one out that has not ended, or one in that has begun. A destination that only waits
/// has none.
pub fn is_under_way(report: &Report) -> bool {
    let waits = report.side == Side::Destination && report.status == Status::Setup;
    !report.status.is_final() && !waits
}

/// Sets parameters.
pub fn set<'a>(client: &mut Client, settings: impl IntoIterator<Item = &'a Setting>) -> Result<()> {
    let mut arguments = Map::new();
    for Setting { info, number } in settings {
        arguments.insert(info.name.to_owned(), serde_json::to_value(info.value(*number))?);
    }
    if !arguments.is_empty() {
        client
            .execute("migrate-set-parameters", arguments.into())
            .context("could not set the migration's parameters")?;
    }
    Ok(())
}

/// JSON as it is printed.
pub fn pretty(value: &Value) -> String {
    format!("{value:#}")
}
