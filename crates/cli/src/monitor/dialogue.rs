//! Lines to a machine and answers from it.

use std::time::Duration;

use anyhow::{Context, Result};
use dunlin_monitor::{Address, Client, hmp};
use serde_json::{Value, json};

use crate::connection;
use crate::interrupts::Interrupts;

/// How long an answer may take: commands of QEMU's that write the machine's whole state take their time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a machine may take to end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a migration is looked at while its end is waited for.
const POLL: Duration = Duration::from_millis(50);

/// What came of a line.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was carried out, and this is what there is to say.
    Done(String),
    /// It was not.
    Failed {
        /// What there is to say all the same.
        text: String,
        /// The reason.
        why: String,
    },
    /// A person did not want to wait for its end.
    Interrupted(String),
    /// It was carried out, and the machine has ended with it.
    Ended(String),
}

/// A monitor's session with a machine.
#[derive(Debug)]
pub struct Dialogue<'a> {
    client: Client,
    interrupts: &'a Interrupts,
}

impl<'a> Dialogue<'a> {
    /// Connects to the machine at `address`.
    pub fn connect(address: &Address, interrupts: &'a Interrupts) -> Result<Self> {
        Ok(Self { client: connection::connect(address)?, interrupts })
    }

    /// What is at the other end, and its version.
    pub fn peer(&mut self) -> Result<String> {
        let version = self.client.execute("query-version", json!({}))?;
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
        let package = text(version.get("package"));
        if package.starts_with("dunlin") {
            return Ok(package);
        }
        let number = |name| version.pointer(&format!("/qemu/{name}")).and_then(Value::as_u64).unwrap_or(0);
        Ok(format!("QEMU {}.{}.{}", number("major"), number("minor"), number("micro")))
    }

    /// Carries out a line. Blank ones and those that begin with `#` say nothing.
    ///
    /// # Errors
    /// When the machine does not answer: the session is over then.
    pub fn say(&mut self, line: &str) -> Result<Answer> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return Ok(Answer::Done(String::new()));
        }
        // The machine must go on answering, so the waiting is done here.
        let detached = hmp::detached(line);
        let text = self.ask(detached.as_deref().unwrap_or(line))?;
        if let Some(why) = failure(&text) {
            return Ok(Answer::Failed { text: String::new(), why });
        }
        if detached.is_some() {
            return self.wait();
        }
        if hmp::quits(line) {
            let closed = self.client.wait_until_closed(QUIT_TIMEOUT);
            let why = format!("the machine agreed to end and has not within {QUIT_TIMEOUT:?}");
            return Ok(if closed { Answer::Ended(text) } else { Answer::Failed { text, why } });
        }
        Ok(Answer::Done(text))
    }

    fn ask(&mut self, line: &str) -> Result<String> {
        let arguments = json!({"command-line": line});
        let answer = self.client.execute_within(ANSWER_TIMEOUT, "human-monitor-command", arguments)?;
        Ok(answer.as_str().context("the machine's answer is no text")?.replace('\r', ""))
    }

    /// Waits until the migration that was started has ended, or needs somebody; tells how.
    fn wait(&mut self) -> Result<Answer> {
        loop {
            let info = self.client.execute("query-migrate", json!({}))?;
            let status = info.get("status").and_then(Value::as_str).unwrap_or("none");
            match status {
                "completed" => return Ok(Answer::Done(self.ask("info migrate")?)),
                "failed" | "cancelled" => {
                    let why = info.get("error-desc").and_then(Value::as_str);
                    let why = why.map_or_else(|| format!("the migration was {status}"), str::to_owned);
                    return Ok(Answer::Failed { text: self.ask("info migrate")?, why });
                }
                "pre-switchover" => {
                    let hint = "it waits in pre-switchover; `migrate_continue pre-switchover` has it go on\n";
                    return Ok(Answer::Done(hint.to_owned()));
                }
                "postcopy-paused" => {
                    let why = "it is paused, its link is lost".to_owned();
                    return Ok(Answer::Failed { text: self.ask("info migrate")?, why });
                }
                _ => {}
            }
            if self.interrupts.sleep(POLL) {
                self.interrupts.forget();
                let why = "the migration goes on: `info migrate` tells how, `migrate_cancel` ends it";
                return Ok(Answer::Interrupted(why.to_owned()));
            }
        }
    }
}

/// The reason, if `text` tells of a failure: ours begin with a word of their own; QEMU's have several forms.
fn failure(text: &str) -> Option<String> {
    if let Some(why) = text.strip_prefix(hmp::ERROR) {
        return Some(why.trim().to_owned());
    }
    let is_qemus = text.starts_with("unknown command: ") || text.contains("Try \"help ");
    is_qemus.then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_both() {
        for (text, why) in [
            ("Error: there is no parameter\n", Some("there is no parameter")),
            ("unknown command: 'foo'\n", Some("unknown command: 'foo'")),
            (
                "migrate: string expected\nTry \"help migrate\" for more information\n",
                Some("migrate: string expected\nTry \"help migrate\" for more information"),
            ),
            ("VM status: running\n", None),
            ("", None),
        ] {
            assert_eq!(failure(text).as_deref(), why, "{text}");
        }
    }
}
