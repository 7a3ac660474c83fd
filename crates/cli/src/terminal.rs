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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_once_and_on_one_line() {
        let error = anyhow::anyhow!("refused\nby it").context("could not connect");
        assert_eq!(one_line(&error), "could not connect: refused by it");
        let error = anyhow::anyhow!("refused").context("could not connect: refused; try again");
        assert_eq!(one_line(&error), "could not connect: refused; try again");
    }
}
