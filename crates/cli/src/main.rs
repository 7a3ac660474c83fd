//! The `dunlin` command: runs, migrates and inspects machines.
//!
//! One file for each command. What they share: `args` (what was asked), `connection` (talking to a machine),
//! `following` (a migration to its end), `progress` and `print` (telling people), `interrupts` (Ctrl-C). `watch` and `page`
//! draw a `series` of reports, which come from the machine or from a `recording`.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod commands;
mod completion;
mod connection;
mod demo;
mod following;
mod headline;
mod interrupts;
mod memory_check;
mod migrate;
mod monitor;
mod page;
mod parameters;
mod progress;
mod recording;
mod run;
mod scale;
mod series;
mod status;
mod teller;
mod terminal;
mod watch;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::args::{Cli, Command};
use crate::interrupts::Interrupts;

/// How a command ended. Whatever there was to say was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Success,
    Interrupted,
    /// The process was made to end with a guest of which nobody knows which side it is on.
    UndecidedLost,
    /// The guest has ended, and this is the process's exit status.
    GuestEnded(u8),
}

fn main() -> ExitCode {
    match completion::answer_shell() {
        Ok(true) => return ExitCode::SUCCESS,
        Ok(false) => {}
        // A shell shows nothing of what is wrong.
        Err(error) => error.exit(),
    }
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) if error.use_stderr() && !error.to_string().starts_with("error: ") => error.exit(),
        Err(error) if error.use_stderr() => {
            terminal::note(&terminal::usage_line(&error.to_string()));
            return ExitCode::from(2);
        }
        Err(help) => help.exit(),
    };
    match carry_out(command) {
        Ok(Outcome::Success) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(130),
        Ok(Outcome::UndecidedLost) => ExitCode::from(4),
        Ok(Outcome::GuestEnded(status)) => ExitCode::from(status),
        Err(error) => {
            terminal::note(&terminal::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> Result<Outcome> {
    match command {
        Command::Demo(args) => demo::demo(&args, &Interrupts::install()?),
        Command::Bench(what) => bench::bench(&what),
        Command::Run(args) => run::run(&args, &Interrupts::install_with_second_chance()?),
        Command::Migrate(args) => migrate::migrate(&args, &Interrupts::install_with_second_chance()?),
        Command::Watch(args) => watch::watch(&args, &Interrupts::install()?),
        Command::Report(args) => page::report(&args),
        Command::Status(at) => status::status(&at),
        Command::Cancel(at) => commands::cancel(&at),
        Command::Verify(at) => commands::verify(&at),
        Command::Stop(at) => commands::stop(&at),
        Command::Cont(args) => commands::cont(&args),
        Command::Quit(at) => commands::quit(&at),
        Command::Monitor(args) => monitor::monitor(&args, &Interrupts::install_for_keyboard()?),
        Command::Parameters(args) => parameters::parameters(&args),
        Command::Completion(args) => completion::completion(args.shell),
    }
}
