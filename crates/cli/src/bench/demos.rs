//! Whole migrations, each a `dunlin demo` in processes of its own: two machines, and every page verified.

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dunlin::{Report, Status};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Told {
    verified: bool,
    report: Report,
}

/// Runs a demo. One whose migration takes longer than `patience` is cancelled, and its report says so.
///
/// # Errors
/// When it fails, or when a page is not what it must be.
pub fn demo<'a>(arguments: impl IntoIterator<Item = &'a str>, patience: Duration) -> Result<Report> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["demo", "--json"]).args(arguments);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdout, stderr) = (drained(child.stdout.take()), drained(child.stderr.take()));
    // Making and verifying machines takes time too, before and after.
    let deadline = Instant::now() + patience + Duration::from_secs(5);
    while child.try_wait()?.is_none() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    if child.try_wait()?.is_none() {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process without a number")?;
        kill_process(pid, Signal::INT)?;
    }
    child.wait()?;
    let told = |thread: JoinHandle<String>| thread.join().unwrap_or_default();
    let (stdout, stderr) = (told(stdout), told(stderr));
    let Ok(told) = serde_json::from_str::<Told>(&stdout) else {
        bail!("dunlin demo told nothing: {}", stderr.trim());
    };
    match told.report.status {
        Status::Completed if !told.verified => bail!("not every page is what it must be"),
        Status::Completed | Status::Cancelled => Ok(told.report),
        status => bail!("the migration is {status}: {}", stderr.trim()),
    }
}

/// Reads a pipe to its end, so that nobody waits for room in it.
fn drained(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut pipe) = pipe {
            // What is no text is no report either, and is said to be missing.
            let _ = pipe.read_to_string(&mut text);
        }
        text
    })
}
