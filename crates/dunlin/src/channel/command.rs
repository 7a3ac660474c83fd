//! The command behind an `exec` connection: what it says on its standard error, how it ends, and its end.
//!
//! What must stay true: whatever the command says costs bounded memory and never holds the command up; nothing that it
//! leaves behind holds this process up.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::error::one_line;

/// What is kept of the command's words: the last of them.
const KEPT_BYTES: usize = 1024;
/// How long a command may take to end by itself once its connection is closed.
const LAST: Duration = Duration::from_secs(1);

/// A command that runs.
#[derive(Debug)]
pub(super) struct Command {
    child: Child,
    said: Arc<Mutex<Said>>,
    /// Written to when nobody listens any more.
    stop: OwnedFd,
    listener: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Said {
    last: VecDeque<u8>,
    all: u64,
}

impl Command {
    /// Listens to the standard error of `child`, which must be a pipe.
    pub(super) fn new(mut child: Child) -> std::io::Result<Self> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let said = Arc::new(Mutex::<Said>::default());
        let listener = match child.stderr.take() {
            None => None,
            Some(pipe) => {
                let (stopped, said) = (stop.try_clone()?, said.clone());
                let listen = move || listen(File::from(OwnedFd::from(pipe)), &stopped, &said);
                Some(std::thread::Builder::new().name("dunlin exec".to_owned()).spawn(listen)?)
            }
        };
        Ok(Self { child, said, stop, listener })
    }

    fn group(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    /// How it has ended, if it does so within `wait`.
    fn ended(&self, wait: Duration) -> Option<String> {
        let group = self.group()?;
        let deadline = Instant::now() + wait;
        // Not reaped here, its number cannot become another's before it is signalled.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        loop {
            match waitid(WaitId::Pid(group), options) {
                Ok(Some(status)) => {
                    return Some(match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => format!("exited with status {code}"),
                        (None, Some(signal)) => format!("was ended by signal {signal}"),
                        (None, None) => "ended".to_owned(),
                    });
                }
                Ok(None) | Err(Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => return None,
            }
        }
    }

    /// In words: how it has ended, if it does so within `wait`, and what it said.
    pub(super) fn tell(&self, wait: Duration) -> String {
        let ended = self.ended(wait);
        // The pipe's last bytes may still be on their way to the listener.
        let deadline = Instant::now() + wait;
        let finished = || self.listener.as_ref().is_none_or(JoinHandle::is_finished);
        while ended.is_some() && !finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let ended = ended.unwrap_or_else(|| "still runs".to_owned());
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = said.last.iter().copied().collect();
        let text = one_line(String::from_utf8_lossy(&bytes).trim());
        match (text.is_empty(), said.all > KEPT_BYTES as u64) {
            (true, _) => ended,
            (false, false) => format!("{ended}; on standard error it said: {text}"),
            (false, true) => format!("{ended}; on standard error it said, at last: …{text}"),
        }
    }
}

/// Reads what a command says until nobody can say anything any more, or `stop` is written to.
fn listen(mut pipe: File, stop: &OwnedFd, said: &Mutex<Said>) {
    let mut buffer = [0; 1024];
    loop {
        let mut fds = [PollFd::new(&pipe, PollFlags::IN), PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let [ready, stopped] = fds.map(|fd| !fd.revents().is_empty());
        if ready {
            match pipe.read(&mut buffer) {
                Ok(0) => return,
                Ok(got) => {
                    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                    said.all = said.all.saturating_add(got as u64);
                    said.last.extend(buffer.get(..got).unwrap_or_default());
                    let surplus = said.last.len().saturating_sub(KEPT_BYTES);
                    said.last.drain(..surplus);
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        } else if stopped {
            return;
        }
    }
}

impl Drop for Command {
    /// Waits for the command, whose connection must have been shut down, and ends what is left of it and of its process
    /// group.
    fn drop(&mut self) {
        if let Some(group) = self.group() {
            let _ = self.ended(LAST);
            // Fails only when nothing is left.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
        // What has left the process group may hold the pipe open for ever.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}
