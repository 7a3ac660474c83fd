//! The terminal: taken over, drawn on, read from, and given back as it was, whatever happens.

use std::io::{self, Stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};
use ratatui::{Frame, Terminal};

/// What was pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Nothing that means anything.
    None,
    /// `q`, Escape or Ctrl-C.
    Leave,
}

/// The terminal, taken over. Dropping it gives it back.
#[derive(Debug)]
pub struct TerminalScreen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl TerminalScreen {
    pub fn open() -> Result<Self> {
        let open = || {
            enable_raw_mode()?;
            execute!(io::stdout(), EnterAlternateScreen)?;
            Terminal::new(CrosstermBackend::new(io::stdout()))
        };
        match open() {
            Ok(terminal) => Ok(Self { terminal }),
            Err(error) => {
                give_back();
                Err(error).context("could not take over the terminal; without one, lines are printed")
            }
        }
    }

    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> Result<()> {
        self.terminal.draw(draw).context("could not draw on the terminal")?;
        Ok(())
    }

    /// Waits for a key that means something, or for a screen of another size, but not for longer than `patience`.
    pub fn key(&self, patience: Duration) -> Result<Key> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !event::poll(left).context("could not read from the terminal")? {
                return Ok(Key::None);
            }
            match event::read().context("could not read from the terminal")? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    let is_ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                    if is_ctrl_c || matches!(key.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc) {
                        return Ok(Key::Leave);
                    }
                }
                Event::Resize(..) => return Ok(Key::None),
                _ => {}
            }
        }
    }
}

impl Drop for TerminalScreen {
    fn drop(&mut self) {
        give_back();
    }
}

fn give_back() {
    // There is nothing to be done about a terminal that has gone.
    let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    let _ = disable_raw_mode();
}
