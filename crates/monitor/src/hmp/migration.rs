//! Commands that start, end and steer a migration, and the guest.

use dunlin::{Status, TakeBack};

use super::error::HmpError;
use super::table::Given;
use crate::route::Route;
use crate::vm::Vm;

/// Starts a migration. It never waits for the end: that is for whoever sent the line (`dunlin monitor` does).
pub(super) fn migrate(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    if given.has("-r") {
        let route = given.word(0).map(str::parse).transpose()?;
        vm.reconnect(route.as_ref())?;
        return Ok("asking for the guest again; `info migrate` tells how it goes\n".to_owned());
    }
    let (uri, route) = route(given)?;
    vm.migrate_by(route)?;
    Ok(format!("migrating to {uri}; `info migrate` tells how it goes\n"))
}

fn route<'a>(given: &'a Given<'_>) -> Result<(&'a str, Route), HmpError> {
    let missing = || HmpError::Missing { missing: "URI", usage: given.command.usage() };
    let uri = given.word(0).ok_or_else(missing)?;
    Ok((uri, uri.parse()?))
}

pub(super) fn cancel(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    vm.cancel()?;
    Ok(String::new())
}

pub(super) fn incoming(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let (uri, route) = route(given)?;
    vm.listen_at(route)?;
    let uri = vm.listening_on().map_or_else(|| uri.to_owned(), |uri| uri.to_string());
    Ok(format!("waiting for a migration on {uri}\n"))
}

pub(super) fn resume_switchover(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let wanted = Status::PreSwitchover;
    let word = given.word(0).unwrap_or_default();
    if word != wanted.to_string() {
        return Err(HmpError::NotThat {
            word: word.to_owned(),
            wanted: "a state that a migration waits in: pre-switchover",
            usage: given.command.usage(),
        });
    }
    vm.resume_switchover(wanted)?;
    Ok(String::new())
}

pub(super) fn pause(_: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    Err(HmpError::NotYet { name: given.command.name, why: "it pauses a postcopy, and there is none yet" })
}

pub(super) fn stop(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    vm.stop()?;
    Ok(String::new())
}

pub(super) fn cont(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    if given.has("-t") {
        let rule = if given.has("-f") { TakeBack::Anyway } else { TakeBack::WhenSilent };
        vm.take_back(rule)?;
    }
    if given.has("-f") {
        vm.cont_anyway()?;
    } else {
        vm.cont()?;
    }
    Ok(String::new())
}

pub(super) fn quit(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    vm.end_outgoing();
    Ok(String::new())
}
