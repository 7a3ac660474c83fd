//! Setting parameters and capabilities, by their names and by the old ones. What was set is said as it can be typed back.

use dunlin::parameters::{ParameterError, ParameterInfo};

use super::error::HmpError;
use super::table::{Given, parameter};
use crate::vm::Vm;

/// A number of a row's unit, to be set.
type Setting = (&'static ParameterInfo, i64);

/// A setter of QEMU's that went before `migrate_set_parameter`.
pub(super) struct Old {
    /// What it sets.
    parameter: &'static str,
    /// What a bare number counted in it.
    bare: &'static str,
}

pub(super) static SPEED: Old = Old { parameter: "max-bandwidth", bare: "M" };
pub(super) static DOWNTIME: Old = Old { parameter: "downtime-limit", bare: "s" };
pub(super) static CACHE_SIZE: Old = Old { parameter: "xbzrle-cache-size", bare: "M" };

impl Old {
    /// The name of what it sets.
    pub(super) fn parameter(&self) -> &'static str {
        self.parameter
    }

    /// Sets what it sets; gives what was set, and what to use instead.
    pub(super) fn set(&self, vm: &Vm, given: &Given<'_>) -> Result<(String, String), HmpError> {
        let info = ParameterInfo::find(self.parameter)?;
        let word = given.word(0).unwrap_or_default();
        let is_bare = word.chars().all(|character| character.is_ascii_digit() || character == '.');
        let number = if is_bare { info.parse(&format!("{word}{}", self.bare)) } else { info.parse(word) };
        // The word as it was given is what the error is about.
        let number = number.map_err(|error| match error {
            ParameterError::Text { name, mut source } => {
                word.clone_into(&mut source.text);
                ParameterError::Text { name, source }
            }
            other => other,
        })?;
        let said = apply(vm, &[(info, number)])?;
        let instead = format!(
            "{} is an old command: use `migrate_set_parameter {} {}`",
            given.command.name,
            info.name,
            info.text(number)
        );
        Ok((said, instead))
    }
}

/// `migrate_set_parameter NAME VALUE ...`
pub(super) fn set_parameters(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let mut settings = Vec::new();
    for pair in given.words.chunks(2) {
        let &[name, value] = pair else {
            // A name without its value.
            parameter(pair.first().copied().unwrap_or_default())?;
            return Err(HmpError::Missing { missing: "VALUE", usage: given.command.usage() });
        };
        let info = parameter(name)?;
        settings.push((info, info.parse(value)?));
    }
    apply(vm, &settings)
}

/// `migrate_set_capability NAME [on|off] ...`
pub(super) fn set_capabilities(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let mut settings: Vec<Setting> = Vec::new();
    let mut words = given.words.iter().peekable();
    while let Some(name) = words.next() {
        let info = parameter(name)?;
        if !info.is_capability() {
            return Err(HmpError::NotACapability { name: info.name });
        }
        // The next word is the next capability, unless it is none.
        let value =
            words.next_if(|word| matches!(parameter(word), Err(HmpError::Parameter(_)))).copied().unwrap_or("on");
        settings.push((info, info.parse(value)?));
    }
    apply(vm, &settings)
}

/// All or none.
fn apply(vm: &Vm, settings: &[Setting]) -> Result<String, HmpError> {
    vm.set_parameters(settings.iter().map(|(info, number)| (info.name, *number)))?;
    let lines = settings.iter().map(|(info, number)| line(info, *number));
    Ok(lines.collect())
}

/// A parameter and its value, on a line.
pub(super) fn line(info: &ParameterInfo, number: i64) -> String {
    format!("{}: {}\n", info.name, info.text(number))
}
