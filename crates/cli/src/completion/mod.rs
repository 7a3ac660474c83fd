//! `dunlin completion SHELL`: what a shell needs to complete `dunlin`'s command lines.
//!
//! The script that is printed has the shell run `dunlin` with [`VARIABLE`] set whenever something is to be completed, and
//! clap's engine answers from the definition of the command line: so it never is of another version than the command.

mod shells;

use std::ffi::OsStr;

use anyhow::{Context, Result};
use clap::{CommandFactory, ValueEnum};
use clap_complete::engine::{CompletionCandidate, PathCompleter, ValueCompleter};
use clap_complete::env::{CompleteEnv, EnvCompleter, Fish, Shells};
use dunlin::PARAMETERS;
use dunlin::parameters::ParameterInfo;
use dunlin_monitor::hmp;

use crate::Outcome;
use crate::args::Cli;
use crate::terminal;
use shells::{Bash, Zsh};

/// Set by the shell: to its name.
const VARIABLE: &str = "_DUNLIN_COMPLETE";
const NAME: &str = "dunlin";

/// A shell that can complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Shell {
    fn adapter(self) -> &'static dyn EnvCompleter {
        match self {
            Self::Bash => &Bash,
            Self::Zsh => &Zsh,
            Self::Fish => &Fish,
        }
    }
}

/// Prints a shell's script.
pub fn completion(shell: Shell) -> Result<Outcome> {
    let mut script = Vec::new();
    shell.adapter().write_registration(VARIABLE, NAME, NAME, NAME, &mut script).context("could not make the script")?;
    terminal::out(&String::from_utf8_lossy(&script))?;
    Ok(Outcome::Success)
}

/// Answers a shell that asks how a line may go on; tells whether one asked.
///
/// # Errors
/// When it cannot be answered, in clap's words.
pub fn answer_shell() -> clap::error::Result<bool> {
    let here = std::env::current_dir().ok();
    CompleteEnv::with_factory(Cli::command)
        .var(VARIABLE)
        .shells(Shells(&[&Bash, &Zsh, &Fish]))
        .try_complete(std::env::args_os(), here.as_deref())
}

/// What `--set` may be: a name; behind it, what it may be set to.
pub fn settings(begun: &OsStr) -> Vec<CompletionCandidate> {
    let Some(begun) = begun.to_str() else { return Vec::new() };
    let candidate = |text: String, help: &str| CompletionCandidate::new(text).help(Some(help.to_owned().into()));
    match begun.split_once('=') {
        None => {
            let fitting = PARAMETERS.iter().filter(|info| info.name.starts_with(begun));
            fitting.map(|info| candidate(format!("{}=", info.name), info.help)).collect()
        }
        Some((name, value)) => {
            let values = ParameterInfo::find(name).map(hmp::values).unwrap_or_default().into_iter();
            let fitting = values.filter(|one| one.word.starts_with(value));
            fitting.map(|one| candidate(format!("{name}={}", one.word), &one.help)).collect()
        }
    }
}

/// What `--qmp` may be: sockets, with or without `unix:` before their path.
pub fn sockets(begun: &OsStr) -> Vec<CompletionCandidate> {
    const SCHEME: &str = "unix:";
    let paths = PathCompleter::any().filter(|path| path.is_dir() || is_socket(path));
    let begun_text = begun.to_string_lossy();
    if let Some(path) = begun_text.strip_prefix(SCHEME) {
        let found = paths.complete(OsStr::new(path)).into_iter();
        return found.map(|candidate| candidate.add_prefix(SCHEME)).collect();
    }
    let mut found = paths.complete(begun);
    if SCHEME.starts_with(&*begun_text) {
        found.insert(0, CompletionCandidate::new(SCHEME));
    }
    found
}

fn is_socket(path: &std::path::Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(begun: &str) -> Vec<String> {
        let candidates = settings(OsStr::new(begun)).into_iter();
        candidates.map(|candidate| candidate.get_value().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn names_and_values_of_the_table() {
        assert_eq!(offered("").len(), PARAMETERS.len());
        assert_eq!(offered("xbz"), ["xbzrle=", "xbzrle-cache-size="]);
        assert_eq!(offered("xbzrle="), ["xbzrle=on", "xbzrle=off"]);
        assert_eq!(offered("multifd-compression=z"), ["multifd-compression=zstd"]);
        assert_eq!(offered("downtime-limit="), ["downtime-limit=300ms"]);
        assert!(offered("nonsense=").is_empty());
    }
}
