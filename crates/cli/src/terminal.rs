//! Writing to people and programs, without the panics of `println!` when nobody reads.

use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Result};

/// Writes `text` and a newline to standard output. A reader that has gone away has read enough.
pub fn out(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("could not write to standard output"),
    }
}

/// Writes one line for people to standard error.
pub fn note(text: &str) {
    // There is nowhere left to say that this failed.
    let _ = writeln!(io::stderr().lock(), "dunlin: {text}");
}

/// An error and its causes on one line. Many of our errors name their cause themselves: it is not said twice.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}

/// What was wrong with a command line, on one line, of clap's several.
pub fn usage_line(said: &str) -> String {
    let mut line = String::new();
    let said = said.strip_prefix("error: ").unwrap_or(said);
    for part in said.lines().map(str::trim).filter(|part| !part.is_empty() && !part.starts_with("Usage:")) {
        let between = match line.chars().last() {
            None => "",
            Some(':' | ';') => " ",
            Some(_) => "; ",
        };
        let part = part.strip_prefix("For more").map_or(part.to_owned(), |rest| format!("for more{rest}"));
        line = format!("{line}{between}{part}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clap_says_on_one_line() {
        let said = "error: unrecognized subcommand 'migrat'\n\n  tip: a similar one exists: 'migrate'\n\n\
                    Usage: dunlin <COMMAND>\n\nFor more information, try '--help'.\n";
        let line = "unrecognized subcommand 'migrat'; tip: a similar one exists: 'migrate'; for more information, \
                    try '--help'.";
        assert_eq!(usage_line(said), line);
    }

    #[test]
    fn causes_once_and_on_one_line() {
        let error = anyhow::anyhow!("refused\nby it").context("could not connect");
        assert_eq!(one_line(&error), "could not connect: refused by it");
        let error = anyhow::anyhow!("refused").context("could not connect: refused; try again");
        assert_eq!(one_line(&error), "could not connect: refused; try again");
    }
}
