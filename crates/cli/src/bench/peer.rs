//! The receiving process of a measurement: started for each run, so that its memory is fresh.
//!
//! It says on standard output where it listens, and when all is there, what it took. It ends with the process that
//! started it.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dunlin::{Destination, Guest, Parameters, Status, Uri};
use dunlin_machines::Backing;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::copy::Listener;
use super::machine::Idle;
use crate::Outcome;
use crate::args::{BenchPeer, Way};
use crate::{run, terminal};

/// What the receiving process says at the end.
#[derive(Debug, Serialize, Deserialize)]
pub struct Received {
    /// CPU seconds of the whole process, from listening to the end.
    pub cpu_seconds: f64,
    /// The most memory that was not the machine's, where it can be told apart.
    pub own_bytes: Option<u64>,
    /// Memory of the host that the machine's memory takes, where known.
    pub present_bytes: Option<u64>,
    /// Of what the machine's memory holds.
    pub digest: u64,
}

/// CPU time of this process.
pub fn cpu_seconds() -> f64 {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default().as_secs_f64()
}

/// The child's side.
pub fn peer(args: &BenchPeer) -> Result<Outcome> {
    run::tie_to_parent(args.exit_with_parent)?;
    let memory = Idle::new(args.memory, args.hugepages)?;
    let (cpu, own) = match (args.bare, args.way) {
        (Some(connections), Some(way)) => {
            let listener = Listener::bind(&args.listen)?;
            let own = OwnMemory::watch()?;
            let before = cpu_seconds();
            terminal::out(&listener.local_uri(&args.listen)?.to_string())?;
            listener.receive(&memory, connections, way)?;
            (cpu_seconds() - before, own.most())
        }
        _ => {
            let mut parameters = Parameters::default();
            for setting in &args.set {
                parameters.set(setting.info.name, setting.number)?;
            }
            let guest = Guest::awaited(memory.clone());
            let own = OwnMemory::watch()?;
            let before = cpu_seconds();
            let destination = Destination::listen(&guest, &args.listen, &parameters)?;
            terminal::out(&destination.local_uri().to_string())?;
            let report = destination.wait();
            if report.status != Status::Completed {
                bail!("{}", report.error.map_or("the migration did not complete".to_owned(), |error| error.message));
            }
            drop(destination);
            (cpu_seconds() - before, own.most())
        }
    };
    let (present_bytes, digest) = (memory.present_bytes()?, memory.digest()?);
    // Memory without a file counts as the process's own.
    let own_bytes = if args.hugepages == Backing::Transparent { None } else { Some(own) };
    let received = Received { cpu_seconds: cpu, own_bytes, present_bytes, digest };
    terminal::out(&serde_json::to_string(&received)?)?;
    Ok(Outcome::Success)
}

/// What the receiving process is to do.
#[derive(Debug, Clone)]
pub enum Task {
    /// Receive a bare copy.
    Bare(u8, Way),
    /// Receive a migration, with these parameters (`NAME=VALUE`).
    Migration(Vec<String>),
}

/// The receiving process, from the one that started it.
#[derive(Debug)]
pub struct Peer {
    process: Child,
    said: BufReader<ChildStdout>,
    pub address: Uri,
}

impl Peer {
    /// Starts it and waits until it listens.
    pub fn start(memory: u64, hugepages: Backing, listen: &Uri, task: &Task) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "peer", "--memory", &memory.to_string(), "--hugepages", &hugepages.to_string()]);
        command.args(["--listen", &listen.to_string(), "--exit-with-parent", &std::process::id().to_string()]);
        match task {
            Task::Bare(connections, way) => {
                let way = clap::ValueEnum::to_possible_value(way).context("a way without a name")?;
                command.args(["--bare", &connections.to_string(), "--way", way.get_name()])
            }
            Task::Migration(set) => command.args(set.iter().flat_map(|set| ["--set", set])),
        };
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(process.stdout.take().context("no standard output")?);
        let address = line(&mut said)?.parse()?;
        Ok(Self { process, said, address })
    }

    /// Waits for its end; what it took.
    pub fn finish(mut self) -> Result<Received> {
        Ok(serde_json::from_str(&line(&mut self.said)?)?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn line(said: &mut BufReader<ChildStdout>) -> Result<String> {
    let mut line = String::new();
    if said.read_line(&mut line)? == 0 {
        bail!("the receiving process ended too soon");
    }
    Ok(line.trim().to_owned())
}

/// Watches how much memory this process has that is no file's.
#[derive(Debug)]
pub struct OwnMemory {
    before: u64,
    most: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl OwnMemory {
    const LOOK: Duration = Duration::from_millis(5);

    pub fn watch() -> Result<Self> {
        let before = anonymous_bytes().context("could not read /proc/self/status")?;
        let (most, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, stopped) = (most.clone(), stop.clone());
        let look = move || {
            while !stopped.load(Ordering::Relaxed) {
                seen.fetch_max(anonymous_bytes().unwrap_or(0), Ordering::Relaxed);
                thread::sleep(Self::LOOK);
            }
        };
        let thread = Some(thread::Builder::new().spawn(look)?);
        Ok(Self { before, most, stop, thread })
    }

    /// The most since the beginning, beyond what there was then.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed).saturating_sub(self.before)
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(kilobytes.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
}
