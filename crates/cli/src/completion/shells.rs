//! The shells that clap's own adapters do not serve well enough: bash breaks words at `=` and `:`, of which ours are full,
//! and zsh would put a blank behind `NAME=`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;

use clap::Command;
use clap_complete::engine::{CompletionCandidate, complete};
use clap_complete::env::EnvCompleter;

/// Gets the line as it is, up to the cursor, and the part of its last word that bash will exchange.
pub struct Bash;

impl EnvCompleter for Bash {
    fn name(&self) -> &'static str {
        "bash"
    }

    fn is(&self, name: &str) -> bool {
        name == self.name()
    }

    fn write_registration(&self, variable: &str, name: &str, _: &str, _: &str, to: &mut dyn Write) -> io::Result<()> {
        to.write_all(script(include_str!("completion.bash"), variable, name).as_bytes())
    }

    fn write_complete(
        &self,
        command: &mut Command,
        arguments: Vec<OsString>,
        here: Option<&Path>,
        to: &mut dyn Write,
    ) -> io::Result<()> {
        let mut arguments = arguments.into_iter().map(|argument| argument.to_string_lossy().into_owned());
        let line = arguments.next().unwrap_or_default();
        let exchanged = arguments.next().unwrap_or_default();
        let words = words(&line);
        let kept = words.last().and_then(|word| word.strip_suffix(&exchanged)).unwrap_or_default().to_owned();
        for candidate in candidates(command, words.into_iter().map(OsString::from).collect(), here)? {
            let value = candidate.get_value().to_string_lossy();
            if let Some(rest) = value.strip_prefix(&kept) {
                writeln!(to, "{rest}")?;
            }
        }
        Ok(())
    }
}

/// The words of a line; an empty one at its end where a new one would begin.
fn words(line: &str) -> Vec<String> {
    let mut words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    if line.ends_with(char::is_whitespace) || words.is_empty() {
        words.push(String::new());
    }
    words
}

/// Gets a candidate and what it is, with a tab between them.
pub struct Zsh;

impl EnvCompleter for Zsh {
    fn name(&self) -> &'static str {
        "zsh"
    }

    fn is(&self, name: &str) -> bool {
        name == self.name()
    }

    fn write_registration(&self, variable: &str, name: &str, _: &str, _: &str, to: &mut dyn Write) -> io::Result<()> {
        to.write_all(script(include_str!("completion.zsh"), variable, name).as_bytes())
    }

    fn write_complete(
        &self,
        command: &mut Command,
        arguments: Vec<OsString>,
        here: Option<&Path>,
        to: &mut dyn Write,
    ) -> io::Result<()> {
        for candidate in candidates(command, arguments, here)? {
            let help = candidate.get_help().map(ToString::to_string).unwrap_or_default();
            let help = help.lines().next().unwrap_or_default();
            writeln!(to, "{}\t{help}", candidate.get_value().to_string_lossy())?;
        }
        Ok(())
    }
}

/// What the last of `words` may become.
fn candidates(
    command: &mut Command,
    words: Vec<OsString>,
    here: Option<&Path>,
) -> io::Result<Vec<CompletionCandidate>> {
    let last = words.len().saturating_sub(1);
    complete(command, words, last, here)
}

fn script(text: &str, variable: &str, name: &str) -> String {
    text.replace("VARIABLE", variable).replace("NAME", name)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Cli;

    /// What bash is told for a line of which it will exchange `exchanged`.
    fn told(line: &str, exchanged: &str) -> Vec<String> {
        let mut told = Vec::new();
        Bash.write_complete(&mut Cli::command(), vec![line.into(), exchanged.into()], None, &mut told).unwrap();
        String::from_utf8(told).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn words_that_bash_breaks() {
        assert_eq!(told("dunlin mig", "mig"), ["migrate"]);
        assert_eq!(told("dunlin migrate --set xbz", "xbz"), ["xbzrle=", "xbzrle-cache-size="]);
        assert_eq!(told("dunlin migrate --set xbzrle=o", "o"), ["on", "off"]);
        assert_eq!(told("dunlin migrate --set xbzrle=", ""), ["on", "off"]);
        // With COMP_WORDBREAKS as some people have it.
        assert_eq!(told("dunlin migrate --set xbzrle=of", "xbzrle=of"), ["xbzrle=off"]);
        assert_eq!(told("dunlin demo --transport ", ""), ["tcp", "unix"]);
    }
}
