//! The human monitor: a line of words in, text out, in the words of QEMU's monitor.
//!
//! [`Session::execute`] carries a line out and [`complete`] tells what may stand at a line's end. Both, and all help, are
//! made from the two tables in `table`, and what they say of parameters is made from the engine's table. A number means
//! what it means everywhere else in Dunlin: the unit of the parameter's row, or the unit behind it.
//!
//! The way of a line: `words` → `table` (which row, its flags and words counted) → the row's function in `migration`,
//! `settings`, `show`, `throttle`, `dirty_rate` or `help` → [`Vm`].

mod complete;
mod dirty_rate;
mod error;
mod help;
mod migration;
mod settings;
mod show;
mod table;
mod throttle;
mod words;

use std::collections::BTreeSet;

pub use complete::{Candidate, Completion, complete, values};
pub use error::HmpError;

use crate::vm::Vm;
use table::{Command, Does};

/// One person's or program's dialogue: what it was told once is not told again.
#[derive(Debug, Default)]
pub struct Session {
    told: BTreeSet<&'static str>,
}

impl Session {
    /// Carries out a line; gives what there is to say. An empty line says nothing.
    ///
    /// It never waits for a migration's end, whether `migrate` is given `-d` or not. After [`quits`] the caller is to end
    /// the process, once the answer is out.
    ///
    /// # Errors
    /// When the line is not understood, or the machine refuses.
    pub fn execute(&mut self, vm: &Vm, line: &str) -> Result<String, HmpError> {
        let words = words::split(line).map_err(|_| HmpError::OpenQuote)?;
        let words: Vec<&str> = words.said.iter().map(String::as_str).collect();
        let Some((name, words)) = words.split_first() else { return Ok(String::new()) };
        self.run(vm, table::command(name)?, words)
    }

    fn run(&mut self, vm: &Vm, command: &'static Command, words: &[&str]) -> Result<String, HmpError> {
        match command.does {
            Does::NotYet(qmp) => Err(HmpError::NotYet { name: command.name, why: table::why(qmp) }),
            Does::Info => match words.split_first() {
                None => Ok(help::topics()),
                Some((topic, words)) => self.run(vm, table::topic(topic)?, words),
            },
            Does::Run(run) => run(vm, &command.take(words)?),
            Does::Old(old) => {
                let (said, instead) = old.set(vm, &command.take(words)?)?;
                Ok(if self.told.insert(command.name) { format!("{instead}\n{said}") } else { said })
            }
        }
    }

    /// Carries out a line for QMP's `human-monitor-command`, whose answer is text even if it is an error: that begins
    /// with `Error: `. Lines end as in QEMU.
    pub fn answer(&mut self, vm: &Vm, line: &str) -> String {
        let text = self.execute(vm, line).unwrap_or_else(|error| format!("{ERROR}{error}\n"));
        text.replace('\n', "\r\n")
    }
}

/// What [`Session::answer`] begins an error with.
pub const ERROR: &str = "Error: ";

/// Whether `line` is the command after which the process is to end.
pub fn quits(line: &str) -> bool {
    is(line, table::QUIT)
}

/// If `line` starts a migration whose end is to be waited for: the line that starts it without. The waiting is for the
/// sender to do.
pub fn detached(line: &str) -> Option<String> {
    const MIGRATE: &str = "migrate";
    let words = words::split(line).ok()?;
    let mut said = words.said.iter().map(String::as_str);
    let waits = said.next() == Some(MIGRATE) && !said.take_while(|word| word.starts_with('-')).any(|word| word == "-d");
    let rest = line.trim_start().strip_prefix(MIGRATE).filter(|_| waits)?;
    Some(format!("{MIGRATE} -d{rest}"))
}

fn is(line: &str, name: &str) -> bool {
    words::split(line).is_ok_and(|words| words.said.len() == 1 && words.said.iter().any(|word| word == name))
}
