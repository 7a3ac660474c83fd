//! `help`, and `info` alone: the tables as text.

use std::fmt::Write;

use dunlin::PARAMETERS;
use dunlin::parameters::ParameterInfo;

use super::error::HmpError;
use super::table::{self, COMMANDS, Command, Does, Given, Kind, TOPICS};
use crate::vm::Vm;

/// `help [COMMAND [NAME]]`
pub(super) fn help(_: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let Some(name) = given.word(0) else { return Ok(all_commands()) };
    let command = table::command(name)?;
    match given.word(1) {
        None => Ok(of_one(command)),
        Some(topic) if matches!(command.does, Does::Info) => Ok(line("info ", table::topic(topic)?)),
        Some(word) => Err(HmpError::TooMuch { word: word.to_owned(), usage: given.command.usage() }),
    }
}

fn all_commands() -> String {
    COMMANDS.iter().map(|command| line("", command)).collect()
}

/// What `info` shows.
pub(super) fn topics() -> String {
    TOPICS.iter().map(|topic| line("info ", topic)).collect()
}

fn line(before: &str, command: &Command) -> String {
    match command.does {
        Does::NotYet(qmp) => format!("{before}{} -- not there yet: {}\n", command.name, table::why(qmp)),
        _ => format!("{before}{} -- {}\n", command.usage(), command.help),
    }
}

fn of_one(command: &Command) -> String {
    let mut text = line("", command);
    if matches!(command.does, Does::Info) {
        text.push_str(&topics());
    }
    for argument in command.arguments {
        if let Kind::Parameter(which) = argument.kind {
            text.push_str(&names(which));
        }
    }
    text
}

fn names(which: fn(&ParameterInfo) -> bool) -> String {
    let mut text = String::new();
    for info in PARAMETERS.iter().filter(|info| which(info)) {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {} ({}) -- {}", info.name, info.range(), info.help);
    }
    text
}
