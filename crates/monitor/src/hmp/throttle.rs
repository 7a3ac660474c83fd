//! Slowing vCPUs down, and measuring how fast they dirty RAM.

use super::error::HmpError;
use super::table::Given;
use crate::vm::Vm;

fn not_yet(given: &Given<'_>, lacking: &'static str) -> Result<String, HmpError> {
    Err(HmpError::NotYet { name: given.command.name, lacking })
}

pub(super) fn calc_dirty_rate(_: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    not_yet(given, "measuring of dirty rates")
}

pub(super) fn dirty_rate(_: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    not_yet(given, "measuring of dirty rates")
}

pub(super) fn set(_: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    not_yet(given, "throttling of vCPUs")
}

pub(super) fn cancel(_: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    not_yet(given, "throttling of vCPUs")
}

pub(super) fn throttle(_: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    not_yet(given, "throttling of vCPUs")
}
