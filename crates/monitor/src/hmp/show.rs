//! What `info` shows.

use std::fmt::Write;

use dunlin::parameters::{Changes, ParameterInfo};
use dunlin::{PARAMETERS, Side, Status};

use super::error::HmpError;
use super::settings::{CACHE_SIZE, line};
use super::table::{Given, parameter};
use crate::text;
use crate::vm::{RunState, Vm};

pub(super) fn status(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    Ok(match vm.run_state() {
        RunState::Running => "VM status: running\n".to_owned(),
        RunState::Paused => "VM status: paused\n".to_owned(),
        other => format!("VM status: paused ({})\n", other.name()),
    })
}

pub(super) fn migration(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    let Some(report) = vm.report() else { return Ok("no migration yet\n".to_owned()) };
    let is_waiting = report.side == Side::Destination && report.status == Status::Setup && report.session.is_none();
    match vm.listening_on() {
        Some(uri) if is_waiting => {
            let mut text = format!("waiting for a migration on {uri}\n");
            if let Some(latest) = &report.refused_connections.latest {
                // Writing to a string does not fail.
                let _ = writeln!(text, "refused the connection from {latest}");
            }
            Ok(text)
        }
        _ => Ok(format!("migration, seen by the {}: {}", report.side, text::report(&report))),
    }
}

pub(super) fn capabilities(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    match given.word(0) {
        Some(name) => {
            let info = parameter(name)?;
            if info.is_capability() { one(vm, info) } else { Err(HmpError::NotACapability { name: info.name }) }
        }
        None => Ok(all(vm, ParameterInfo::is_capability)),
    }
}

pub(super) fn parameters(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    match given.word(0) {
        Some(name) => one(vm, parameter(name)?),
        None => Ok(all(vm, |info| !info.is_capability())),
    }
}

pub(super) fn cache_size(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    let info = ParameterInfo::find(CACHE_SIZE.parameter())?;
    Ok(line(info, vm.parameters().get(info)))
}

fn all(vm: &Vm, which: fn(&ParameterInfo) -> bool) -> String {
    let parameters = vm.parameters();
    PARAMETERS.iter().filter(|info| which(info)).map(|info| line(info, parameters.get(info))).collect()
}

/// All that the table has of a parameter, below its value.
fn one(vm: &Vm, info: &ParameterInfo) -> Result<String, HmpError> {
    let mut text = line(info, vm.parameters().get(info));
    let live = match info.changes {
        Changes::Live => "may change while a migration runs",
        Changes::AtStart => "a migration keeps the value it starts with",
    };
    let unit = info.unit.name();
    let range = format!("{} {unit}", info.range());
    // Writing to a string does not fail.
    let _ = writeln!(text, "  {}", info.help);
    let _ = writeln!(text, "  default: {}; may be: {}", info.text(info.default), range.trim_end());
    let _ = writeln!(text, "  read by: {}; {live}", info.applies);
    for conflict in info.conflicts() {
        let others = conflict.parties.iter().filter(|party| **party != info.name);
        for other in others {
            let _ = writeln!(text, "  conflicts with some values of {other}: {}", conflict.why);
        }
    }
    Ok(text)
}
