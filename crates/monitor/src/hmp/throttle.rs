//! Slowing vCPUs down.

use std::fmt::Write;

use super::error::HmpError;
use super::table::Given;
use crate::vm::{Vm, VmError};

/// `set_vcpu_throttle PERCENT [VCPU]`
pub(super) fn set(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let word = given.word(0).unwrap_or_default();
    let percent = word.strip_suffix('%').unwrap_or(word).parse();
    let percent = percent.map_err(|_| not_that(given, word, "a whole number of percent, such as 50%"))?;
    let vcpu = vcpu(given, 1)?;
    vm.guest().set_vcpu_throttle(vcpu, percent).map_err(VmError::from)?;
    Ok(lines(vm, vcpu))
}

/// `cancel_vcpu_throttle [VCPU]`
pub(super) fn cancel(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let vcpu = vcpu(given, 0)?;
    vm.guest().cancel_vcpu_throttle(vcpu).map_err(VmError::from)?;
    Ok(lines(vm, vcpu))
}

/// `info vcpu_throttle`
pub(super) fn show(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    let lines = lines(vm, None);
    Ok(if lines.is_empty() { "this machine cannot throttle its vCPUs\n".to_owned() } else { lines })
}

fn vcpu(given: &Given<'_>, place: usize) -> Result<Option<usize>, HmpError> {
    let number = |word: &str| word.parse().map_err(|_| not_that(given, word, "the number of a vCPU, from 0"));
    given.word(place).map(number).transpose()
}

fn not_that(given: &Given<'_>, word: &str, wanted: &'static str) -> HmpError {
    HmpError::NotThat { word: word.to_owned(), wanted, usage: given.command.usage() }
}

/// How much a vCPU, or each, is slowed, and who asked for it.
fn lines(vm: &Vm, vcpu: Option<usize>) -> String {
    let mut text = String::new();
    for throttle in vm.guest().vcpu_throttle().iter().filter(|one| vcpu.is_none_or(|vcpu| one.vcpu == vcpu)) {
        // Writing to a string does not fail.
        let _ = write!(text, "vCPU {}: {}%", throttle.vcpu, throttle.effective_percent);
        let _ = match throttle.migration_percent {
            0 => writeln!(text),
            percent => writeln!(text, " ({}% set, auto-converge takes {percent}%)", throttle.operator_percent),
        };
    }
    text
}
