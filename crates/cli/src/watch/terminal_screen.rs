//! The terminal: taken over, drawn on, read from, and given back as it was, whatever happens.
//!
//! Keys are read here and not by crossterm: its loop takes the end of the terminal, and every error, for "nothing yet",
//! and so never ends once the terminal has gone away.

use std::fs::File;
use std::io::{self, IsTerminal, Stdin, Stdout};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};
use ratatui::{Frame, Terminal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::keys;

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
    keyboard: Keyboard,
}

impl TerminalScreen {
    pub fn open() -> Result<Self> {
        let open = || {
            let keyboard = Keyboard::open()?;
            enable_raw_mode()?;
            execute!(io::stdout(), EnterAlternateScreen)?;
            Ok(Self { terminal: Terminal::new(CrosstermBackend::new(io::stdout()))?, keyboard })
        };
        open().map_err(|error: io::Error| {
            give_back();
            anyhow::Error::new(error).context("could not take over the terminal; without one, lines are printed")
        })
    }

    /// Draws, unless the terminal takes nothing at present: a picture that is not seen is not missed.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> Result<()> {
        if takes_output(io::stdout().as_fd()).context("could not draw on the terminal")? {
            self.terminal.draw(draw).context("could not draw on the terminal")?;
        }
        Ok(())
    }

    /// Waits for a key that means something, but not for longer than `patience`.
    ///
    /// # Errors
    /// When the terminal has gone away.
    pub fn key(&self, patience: Duration) -> Result<Key> {
        let deadline = Instant::now() + patience;
        let mut bytes = [0; 1024];
        while self.keyboard.has_something(deadline.saturating_duration_since(Instant::now()))? {
            match rustix::io::read(self.keyboard.fd(), &mut bytes) {
                Ok(0) | Err(Errno::IO | Errno::NXIO) => bail!("the terminal has gone away"),
                Ok(read) if keys::leaves(bytes.get(..read).unwrap_or_default()) => return Ok(Key::Leave),
                Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error).context("could not read from the terminal"),
            }
        }
        Ok(Key::None)
    }
}

impl Drop for TerminalScreen {
    fn drop(&mut self) {
        give_back();
    }
}

fn give_back() {
    // There is nothing to be done about a terminal that has gone, and nothing to be written to one that takes nothing.
    if takes_output(io::stdout().as_fd()).unwrap_or(false) {
        let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    }
    let _ = disable_raw_mode();
}

/// Gives the terminal back as far as that can be done without writing to it.
pub fn forget() {
    let _ = disable_raw_mode();
}

/// Whether `terminal` would take some output now.
fn takes_output(terminal: BorrowedFd<'_>) -> io::Result<bool> {
    let ready = ready(terminal, PollFlags::OUT, Duration::ZERO)?;
    if ready.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
        return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the terminal has gone away"));
    }
    Ok(ready.contains(PollFlags::OUT))
}

fn ready(fd: BorrowedFd<'_>, wanted: PollFlags, patience: Duration) -> io::Result<PollFlags> {
    let mut fds = [PollFd::from_borrowed_fd(fd, wanted)];
    match poll(&mut fds, Some(&Timespec::try_from(patience).map_err(io::Error::other)?)) {
        // A signal: whoever waits looks at what it was about.
        Err(Errno::INTR) => Ok(PollFlags::empty()),
        Err(error) => Err(error.into()),
        Ok(_) => {
            let [of] = &fds;
            Ok(of.revents())
        }
    }
}

/// What keys come from: standard input, or where that is something else, the terminal of the session.
#[derive(Debug)]
enum Keyboard {
    Input(Stdin),
    Terminal(File),
}

impl Keyboard {
    fn open() -> io::Result<Self> {
        let input = io::stdin();
        if input.is_terminal() { Ok(Self::Input(input)) } else { File::open("/dev/tty").map(Self::Terminal) }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Input(input) => input.as_fd(),
            Self::Terminal(file) => file.as_fd(),
        }
    }

    /// Waits until there is something to read, the terminal's end included.
    fn has_something(&self, patience: Duration) -> Result<bool> {
        let ready = ready(self.fd(), PollFlags::IN, patience).context("could not read from the terminal")?;
        Ok(!ready.is_empty())
    }
}
