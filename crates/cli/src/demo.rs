//! `dunlin demo`: two machines' processes, a migration between them, and the proof that nothing was lost.
//!
//! What must stay true: however this ends, the two processes end with it. They are ended and waited for when their
//! [`Machine`] is dropped; if this process is killed, the kernel kills them.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use dunlin::parameters::Applies;
use dunlin::units::format_size;
use dunlin::{Status, Uri};
use dunlin_machines::Workload;
use dunlin_monitor::{Client, ClientError, uri_of_socket_address};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::{self, Demo, MachineKind, Transport};
use crate::commands::{is_verified, summary, verify_machine};
use crate::connection;
use crate::following::{self, Ended};
use crate::interrupts::Interrupts;
use crate::print;
use crate::progress::Progress;
use crate::terminal;

/// How long making a machine may take.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the guest runs before it is migrated.
const RUN_FIRST: Duration = Duration::from_millis(500);
/// How long the destination may take to know what the source knows.
const AGREE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a process may take to end before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What there is to show at the end.
struct Shown {
    ended: Ended,
    /// The destination's finding, if the migration completed.
    verification: Option<Value>,
}

pub fn demo(args: &Demo, interrupts: &Interrupts) -> Result<Outcome> {
    args.machine.check(args.workload.as_ref(), args.payload.as_ref()).map_err(|mistake| anyhow!(mistake))?;
    let directory = tempfile::Builder::new().prefix("dunlin-demo-").tempdir();
    let directory = directory.context("could not make a temporary directory; see TMPDIR")?;
    // Dropped in reverse order: the machines end before their directory goes.
    let mut progress = Progress::new();
    progress.say(&format!("making two machines of {}", format_size(args.memory)));
    let mut destination = Machine::start("destination", directory.path(), &destination_arguments(args))?;
    let mut source = Machine::start("source", directory.path(), &source_arguments(args)?)?;
    let result = migrate(args, directory.path(), &mut source, &mut destination, interrupts, &mut progress);
    progress.finish();
    match result {
        Ok(Some(result)) => tell(args, result),
        Ok(None) => {
            terminal::note("interrupted before the migration; ending both machines");
            Ok(Outcome::Interrupted)
        }
        Err(error) => Err(with_ending(error, [&mut source, &mut destination])),
    }
}

/// An error of the conversation with a process that has died has that for its cause.
fn with_ending(error: anyhow::Error, machines: [&mut Machine; 2]) -> anyhow::Error {
    match error.downcast_ref::<ClientError>() {
        None | Some(ClientError::Refused { .. }) => error,
        Some(_) => match machines.into_iter().find_map(Machine::why_ending) {
            Some(why) => anyhow!("{why}; {}", terminal::one_line(&error)),
            None => error,
        },
    }
}

fn common_arguments(args: &Demo) -> Vec<String> {
    let (memory, vcpus, hugepages) = (args.memory.to_string(), args.vcpus.to_string(), args.hugepages.to_string());
    let arguments =
        ["--memory", &memory, "--vcpus", &vcpus, "--hugepages", &hugepages, "--machine", args.machine.name()];
    arguments.map(str::to_owned).to_vec()
}

/// It is told where to listen when it knows its parameters.
fn destination_arguments(args: &Demo) -> Vec<String> {
    let mut arguments = common_arguments(args);
    arguments.extend(["--incoming".to_owned(), "defer".to_owned()]);
    arguments
}

fn source_arguments(args: &Demo) -> Result<Vec<String>> {
    let mut arguments = common_arguments(args);
    let does = match args.machine {
        MachineKind::Synthetic => {
            let workload = args.workload.clone().map_or_else(|| usual_workload(args.memory), Ok)?;
            ["--workload".to_owned(), workload.to_string()]
        }
        MachineKind::Kvm => {
            let payload = args.payload.as_ref().map_or_else(|| usual_payload(args.memory), ToString::to_string);
            #[cfg(target_arch = "x86_64")]
            arguments.extend(["--cpu".to_owned(), args.cpu.to_string()]);
            ["--payload".to_owned(), payload]
        }
    };
    arguments.extend(does);
    arguments.extend(["--fill".to_owned(), args.fill.to_string()]);
    Ok(arguments)
}

/// What the guest does unless something else is asked: a working set of 128 MiB, or a quarter of a small memory.
fn usual_workload(memory_bytes: u64) -> Result<Workload> {
    let working_set = (memory_bytes / 4).min(128 << 20) & !4095;
    let text = format!("pattern=uniform,rate=100M/s,working-set={},content=random", working_set.max(4096));
    args::workload(&text).map_err(|error| anyhow!(error))
}

/// What a guest on KVM does unless something else is asked.
fn usual_payload(memory_bytes: u64) -> String {
    format!("dirty:working-set={}", ((memory_bytes / 4).min(16 << 20) & !4095).max(4096))
}

/// The whole way; nothing if interrupted before the migration began.
fn migrate(
    args: &Demo,
    directory: &Path,
    source: &mut Machine,
    destination: &mut Machine,
    interrupts: &Interrupts,
    progress: &mut Progress,
) -> Result<Option<Shown>> {
    let Some(mut at_destination) = destination.connect(interrupts)? else { return Ok(None) };
    let Some(mut at_source) = source.connect(interrupts)? else { return Ok(None) };
    connection::set(&mut at_destination, args.set.iter().filter(|set| set.info.applies != Applies::Source))?;
    connection::set(&mut at_source, args.set.iter().filter(|set| set.info.applies != Applies::Destination))?;
    let uri = listen(args.transport, directory, &mut at_destination)?;
    progress.say("letting the guest run");
    if interrupts.sleep(RUN_FIRST) {
        return Ok(None);
    }
    at_source.execute("migrate", json!({"uri": uri.to_string()})).context("could not start the migration")?;
    let ended = following::follow(&mut at_source, interrupts, progress)?;
    if ended.report.status != Status::Completed {
        return Ok(Some(Shown { ended, verification: None }));
    }
    progress.say("verifying every page at the destination");
    agree(&mut at_source, &mut at_destination)?;
    let verification = verify_machine(&mut at_destination)?;
    Ok(Some(Shown { ended, verification: Some(verification) }))
}

fn listen(transport: Transport, directory: &Path, at_destination: &mut Client) -> Result<Uri> {
    let wanted = match transport {
        Transport::Tcp => Uri::Tcp { host: "127.0.0.1".to_owned(), port: 0 },
        Transport::Unix => Uri::Unix(directory.join("migration.sock")),
    };
    let listening = at_destination.execute("migrate-incoming", json!({"uri": wanted.to_string()}));
    listening.context("the destination could not listen")?;
    let info = at_destination.execute("query-migrate", json!({}))?;
    uri_of_socket_address(&info).ok_or_else(|| anyhow!("the destination does not say where it listens: {info}"))
}

/// Waits until both sides say that the guest is at the destination.
fn agree(at_source: &mut Client, at_destination: &mut Client) -> Result<()> {
    let deadline = Instant::now() + AGREE_TIMEOUT;
    loop {
        let there = connection::report(at_destination)?.map(|(_, report)| report.status);
        let states = [&mut *at_source, &mut *at_destination].map(|client| client.execute("query-status", json!({})));
        let [source_state, destination_state] = states
            .map(|state| state.map(|state| state.get("status").and_then(Value::as_str).unwrap_or_default().to_owned()));
        let (source_state, destination_state) = (source_state?, destination_state?);
        if there == Some(Status::Completed) && source_state == "postmigrate" && destination_state == "running" {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "the source has completed, but the two do not agree on it: source {source_state}, destination \
                 {destination_state}, migration there {}",
                there.map_or("none".to_owned(), |status| status.to_string())
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn tell(args: &Demo, result: Shown) -> Result<Outcome> {
    let Shown { mut ended, verification } = result;
    let verified = verification.as_ref().is_some_and(is_verified);
    // The error goes to standard error, once.
    let failure = following::failure(&ended.report);
    ended.report.error = None;
    if args.json {
        let object = json!({"verified": verified, "report": ended.json, "verification": verification});
        terminal::out(&connection::pretty(&object))?;
    } else {
        let mut text = print::report(&ended.report);
        if let (true, Some(verification)) = (verified, &verification) {
            text.push_str(&format!("verified: {}\n", summary(verification)));
        }
        terminal::out(&text)?;
    }
    match (verification, ended.interrupted) {
        (Some(verification), _) if !verified => {
            bail!("the guest's memory at the destination is not what it must be: {}", summary(&verification))
        }
        (Some(_), true) => {
            terminal::note("too late to cancel: the guest was at the destination; ended both machines");
            Ok(Outcome::Interrupted)
        }
        (Some(_), false) => Ok(Outcome::Success),
        (None, true) => {
            terminal::note(&format!(
                "migration {}; the guest stayed {}; ending both machines",
                ended.report.status, ended.report.guest
            ));
            Ok(Outcome::Interrupted)
        }
        (None, false) => Err(failure),
    }
}

/// One of the two processes.
#[derive(Debug)]
struct Machine {
    name: &'static str,
    process: Child,
    /// What it writes to standard error.
    log: PathBuf,
    qmp: PathBuf,
}

impl Machine {
    fn start(name: &'static str, directory: &Path, arguments: &[String]) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let qmp = directory.join(format!("{name}.qmp"));
        let failed = || format!("could not start the {name}");
        let stderr = File::create(&log).with_context(failed)?;
        let process = Command::new(std::env::current_exe().with_context(failed)?)
            .arg("run")
            .args(arguments)
            .arg("--qmp")
            .arg(format!("unix:{}", qmp.display()))
            .args(["--exit-with-parent", &std::process::id().to_string()])
            // Ctrl-C is for this process to deal with.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .with_context(failed)?;
        Ok(Self { name, process, log, qmp })
    }

    /// Connects as soon as it answers; nothing if interrupted.
    fn connect(&mut self, interrupts: &Interrupts) -> Result<Option<Client>> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(why) = self.why_ended() {
                bail!("{why}");
            }
            match Client::connect(&self.qmp) {
                Ok(client) => return Ok(Some(client)),
                Err(error) if Instant::now() >= deadline => {
                    bail!("the {} was not ready within {START_TIMEOUT:?}: {error}; try less --memory", self.name)
                }
                Err(_) if interrupts.sleep(Duration::from_millis(20)) => return Ok(None),
                Err(_) => {}
            }
        }
    }

    /// How it ended and what it said, if it has ended.
    fn why_ended(&mut self) -> Option<String> {
        let status = self.process.try_wait().ok()??;
        Some(self.ending(status))
    }

    /// The same, for one that has closed its connections and may be about to end.
    fn why_ending(&mut self) -> Option<String> {
        for _ in 0..10 {
            if let Some(why) = self.why_ended() {
                return Some(why);
            }
            thread::sleep(Duration::from_millis(10));
        }
        None
    }

    fn ending(&self, status: ExitStatus) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let said = log.lines().last().map(|line| line.trim_start_matches("dunlin: ")).unwrap_or_default();
        match said {
            "" => format!("the {} has ended ({status})", self.name),
            said => format!("the {} has ended ({status}): {said}", self.name),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(Some(_))) {
            return;
        }
        // As with `quit`, it cancels what is running and ends. If it has just ended it is not yet waited for, so the
        // number is still its own.
        let _ = rustix::process::kill_process(Pid::from_child(&self.process), Signal::TERM);
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_workload_fits() {
        for memory in [64 << 20, 1 << 30, 8 << 30] {
            assert!(usual_workload(memory).is_ok());
        }
    }
}
