//! Lines from a person: editing, completion and history.

use std::env;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use dunlin_monitor::hmp;
use rustyline::completion::{Completer, Pair};
use rustyline::config::Configurer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Context, Editor, Helper};

use super::dialogue::{Answer, Dialogue};
use super::print;
use crate::Outcome;
use crate::terminal;

const PROMPT: &str = "(dunlin) ";
const HISTORY_LINES: usize = 1000;

/// Reads and carries out lines until the person leaves or the machine ends.
pub fn interactive(dialogue: &mut Dialogue) -> Result<Outcome> {
    let peer = dialogue.peer()?;
    terminal::out(&format!("{peer}; `help` lists the commands, Ctrl-D leaves"))?;
    let mut editor: Editor<Words, FileHistory> = Editor::new().context("could not use the terminal")?;
    editor.set_helper(Some(Words));
    editor.set_completion_type(CompletionType::List);
    // Too many to keep is no reason not to go on.
    let _ = editor.set_max_history_size(HISTORY_LINES);
    let mut history = History::open(&mut editor);
    loop {
        let line = match editor.readline(PROMPT) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => {
                terminal::out("Ctrl-D leaves")?;
                continue;
            }
            Err(ReadlineError::Eof) => return Ok(Outcome::Success),
            Err(error) => return Err(error).context("could not read from the terminal"),
        };
        history.keep(&mut editor, line.trim());
        match dialogue.say(&line)? {
            Answer::Done(text) => print(&text)?,
            Answer::Failed { text, why } => {
                print(&text)?;
                terminal::out(&format!("{}{why}", hmp::ERROR))?;
            }
            Answer::Interrupted(why) => terminal::out(&why)?,
            Answer::Ended(text) => {
                print(&text)?;
                terminal::out("the machine has ended")?;
                return Ok(Outcome::Success);
            }
        }
    }
}

/// Lines of earlier sessions, in the user's directory of state.
struct History {
    /// Nowhere, if they cannot be kept.
    path: Option<PathBuf>,
}

impl History {
    fn open(editor: &mut Editor<Words, FileHistory>) -> Self {
        let path = history_path(|name| env::var_os(name).map(PathBuf::from));
        if let Some(path) = path.as_deref().filter(|path| path.exists())
            && let Err(error) = editor.load_history(path)
        {
            terminal::note(&format!("could not read the history in {}: {error}", path.display()));
        }
        Self { path }
    }

    fn keep(&mut self, editor: &mut Editor<Words, FileHistory>, line: &str) {
        if line.is_empty() || !editor.add_history_entry(line).unwrap_or(false) {
            return;
        }
        let Some(path) = &self.path else { return };
        let directory = path.parent().unwrap_or(path);
        // That of one user, as the lines are.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(ReadlineError::from);
        if let Err(error) = made.and_then(|()| editor.append_history(path)) {
            terminal::note(&format!("the history cannot be kept in {}: {error}", path.display()));
            self.path = None;
        }
    }
}

/// Where the history is, by the environment: as the XDG Base Directory Specification has it.
fn history_path(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let absolute = |path: &PathBuf| path.is_absolute();
    let state = variable("XDG_STATE_HOME").filter(absolute);
    let state = state.or_else(|| Some(variable("HOME").filter(absolute)?.join(".local/state")))?;
    Some(state.join("dunlin/monitor-history"))
}

/// Completes words of the monitor.
struct Words;

impl Completer for Words {
    type Candidate = Pair;

    fn complete(&self, line: &str, position: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let completion = hmp::complete(line.get(..position).unwrap_or(line));
        let pairs = completion.candidates.into_iter();
        let pairs = pairs.map(|one| Pair { replacement: format!("{} ", one.word), display: one.word });
        Ok((completion.start, pairs.collect()))
    }
}

impl Helper for Words {}
impl Highlighter for Words {}
impl Validator for Words {}
impl Hinter for Words {
    type Hint = String;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_history_is() {
        let path = |state: Option<&str>, home: Option<&str>| {
            history_path(|name| if name == "HOME" { home } else { state }.map(PathBuf::from))
        };
        let wanted = |path: &str| Some(PathBuf::from(path));
        assert_eq!(path(Some("/s"), Some("/h")), wanted("/s/dunlin/monitor-history"));
        assert_eq!(path(Some("relative"), Some("/h")), wanted("/h/.local/state/dunlin/monitor-history"));
        assert_eq!(path(None, Some("/h")), wanted("/h/.local/state/dunlin/monitor-history"));
        assert_eq!(path(None, None), None);
    }
}
