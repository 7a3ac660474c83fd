//! `dunlin monitor`: the human monitor of a machine, on a terminal or for scripts.
//!
//! It speaks QMP's `human-monitor-command`, so QEMU's sockets do as well. `dialogue` carries lines out, `editor` reads
//! them from a person; everything else reads them from the command line or standard input.

mod dialogue;
mod editor;

use std::io::{self, BufRead, IsTerminal};

use anyhow::{Context, Result, bail};

use crate::Outcome;
use crate::args::Monitor;
use crate::interrupts::Interrupts;
use crate::terminal;
use dialogue::{Answer, Dialogue};

pub fn monitor(args: &Monitor, interrupts: &Interrupts) -> Result<Outcome> {
    let mut dialogue = Dialogue::connect(&args.qmp, interrupts)?;
    if !args.commands.is_empty() {
        return one_after_the_other(&mut dialogue, args.commands.iter().map(|command| Ok(command.clone())));
    }
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return editor::interactive(&mut dialogue);
    }
    one_after_the_other(&mut dialogue, stdin.lock().lines())
}

/// Carries lines out up to the first that fails.
fn one_after_the_other(dialogue: &mut Dialogue, lines: impl Iterator<Item = io::Result<String>>) -> Result<Outcome> {
    for line in lines {
        let line = line.context("could not read commands from standard input")?;
        match dialogue.say(&line)? {
            Answer::Done(text) => print(&text)?,
            Answer::Failed { text, why } => {
                print(&text)?;
                bail!("{}: {why}", line.trim());
            }
            Answer::Interrupted(why) => {
                terminal::note(&why);
                return Ok(Outcome::Interrupted);
            }
            Answer::Ended(text) => {
                print(&text)?;
                return Ok(Outcome::Success);
            }
        }
    }
    Ok(Outcome::Success)
}

fn print(text: &str) -> Result<()> {
    if text.trim().is_empty() { Ok(()) } else { terminal::out(text) }
}
