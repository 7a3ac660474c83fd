//! `dunlin demo`: two machines' processes, a migration between them, and the proof that nothing was lost: no page, no sector
//! of the disk, no line of the serial port.
//!
//! What must stay true: however this ends, the two processes end with it. They are ended and waited for when their
//! [`Machine`] is dropped; if this process is killed, the kernel kills them.

use std::fmt;
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
use dunlin_machines::{Payload, Workload};
use dunlin_monitor::{Client, ClientError, uri_of_socket_address};
use rustix::process::{Pid, Signal};
use serde::Serialize;
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::{self, Demo, MachineKind, Transport};
use crate::commands::{is_verified, summary, verify_machine};
use crate::connection;
use crate::following::{self, Ended};
use crate::interrupts::Interrupts;
use crate::memory_check::{self, Use};
use crate::progress::Progress;
use crate::terminal;
use dunlin_monitor::text;

/// How long making a machine may take.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the guest runs before it is migrated.
const RUN_FIRST: Duration = Duration::from_millis(500);
/// How long it runs at the destination before it is verified.
const RUN_AFTER: Duration = Duration::from_millis(200);
/// The disk of a machine on KVM.
const DISK_BYTES: u64 = 1 << 20;
/// How long the destination may take to know what the source knows.
const AGREE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a process may take to end before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What there is to show at the end.
struct Shown {
    ended: Ended,
    /// The destination's finding, if the migration completed.
    verification: Option<Value>,
    /// What the guest has printed, if it prints.
    lines: Option<Lines>,
}

/// What a guest has printed on both sides together.
#[derive(Debug, Serialize)]
struct Lines {
    /// Each line is there once and in order.
    good: bool,
    /// Lines, the last of which may be unfinished.
    lines: usize,
    /// Of these, printed at the source.
    source: usize,
    /// Units of work that the guest has done, a line each.
    units: u64,
}

impl fmt::Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { good, lines, source, units } = self;
        let verdict = if *good { "each line was printed once" } else { "not each line was printed once" };
        write!(f, "{verdict}: {lines} lines for {units} units of work, {source} of them at the source")
    }
}

pub fn demo(args: &Demo, interrupts: &Interrupts) -> Result<Outcome> {
    let kind = choose(args)?;
    memory_check::check(memory_use(args, kind)?, args.force)
        .with_context(|| format!("could not make two machines of {}", format_size(args.memory)))?;
    let directory = tempfile::Builder::new().prefix("dunlin-demo-").tempdir();
    let directory = directory.context("could not make a temporary directory; see TMPDIR")?;
    // Dropped in reverse order: the machines end before their directory goes.
    let mut progress = Progress::new();
    progress.say(&format!("making two machines of {}", format_size(args.memory)));
    let mut destination =
        Machine::start("destination", directory.path(), &destination_arguments(args, kind, directory.path())?)?;
    let mut source = Machine::start("source", directory.path(), &source_arguments(args, kind, directory.path())?)?;
    let result = migrate(args, kind, directory.path(), &mut source, &mut destination, interrupts, &mut progress);
    progress.finish();
    match result {
        Ok(Some(result)) => tell(args, kind, result),
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

/// What runs the guest, said to the user unless it was asked for.
fn choose(args: &Demo) -> Result<MachineKind> {
    let kind = match args.machine {
        Some(kind) => kind,
        None => {
            let (kind, why) = usual_machine(args);
            terminal::note(&format!("machine {}: {why}", kind.name()));
            kind
        }
    };
    kind.check(args.workload.as_ref(), args.payload.as_ref(), args.dirty_tracker)
        .map_err(|mistake| anyhow!(mistake))?;
    Ok(kind)
}

#[cfg(target_arch = "x86_64")]
fn usual_machine(args: &Demo) -> (MachineKind, String) {
    if args.workload.is_some() {
        return (MachineKind::Synthetic, "--workload is for it".to_owned());
    }
    let devices = dunlin_machines::DeviceConfig::default();
    let config = dunlin_machines::KvmConfig {
        memory_bytes: args.memory,
        vcpus: args.vcpus,
        backing: args.hugepages,
        dirty_tracking: args.dirty_tracker.unwrap_or_default(),
        devices,
    };
    match dunlin_machines::KvmMachine::available().and_then(|()| config.check()) {
        Ok(()) => (MachineKind::Kvm, "/dev/kvm can be used".to_owned()),
        Err(error) => (MachineKind::Synthetic, error.to_string()),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn usual_machine(_: &Demo) -> (MachineKind, String) {
    (MachineKind::Synthetic, "machines on KVM are for x86-64 only".to_owned())
}

/// What the two machines will fill of their RAM.
fn memory_use(args: &Demo, kind: MachineKind) -> Result<Use> {
    let filled = match kind {
        MachineKind::Synthetic => source_workload(args)?.filled_bytes(args.memory, &args.fill, args.hugepages),
        MachineKind::Kvm => {
            source_payload(args).parse::<Payload>()?.filled_bytes(args.memory, &args.fill, args.hugepages)
        }
    };
    let twice = |bytes: u64| bytes.saturating_mul(2);
    Ok(Use {
        who: "the two guests and their processes",
        ram_bytes: twice(args.memory),
        filled_bytes: Some(twice(filled)),
        backing: args.hugepages,
        processes: 2,
    })
}

fn source_workload(args: &Demo) -> Result<Workload> {
    args.workload.clone().map_or_else(|| usual_workload(args.memory), Ok)
}

fn source_payload(args: &Demo) -> String {
    args.payload.as_ref().map_or_else(|| usual_payload(args.memory), ToString::to_string)
}

/// A disk, which both processes share, and a file for the serial port, one each.
fn device_arguments(directory: &Path, side: &str) -> Result<Vec<String>> {
    let disk = directory.join("disk.raw");
    File::create(&disk).and_then(|file| file.set_len(DISK_BYTES)).context("could not make the guest's disk")?;
    let serial = format!("file:{}", serial_of(directory, side).display());
    Ok(vec!["--disk".to_owned(), disk.display().to_string(), "--serial".to_owned(), serial])
}

fn serial_of(directory: &Path, side: &str) -> PathBuf {
    directory.join(format!("{side}.serial"))
}

fn common_arguments(args: &Demo, kind: MachineKind, directory: &Path, side: &str) -> Result<Vec<String>> {
    let (memory, vcpus, hugepages) = (args.memory.to_string(), args.vcpus.to_string(), args.hugepages.to_string());
    let arguments = ["--memory", &memory, "--vcpus", &vcpus, "--hugepages", &hugepages, "--machine", kind.name()];
    let mut arguments = arguments.map(str::to_owned).to_vec();
    // The two were looked at together.
    arguments.push("--force".to_owned());
    if kind == MachineKind::Kvm {
        arguments.extend(device_arguments(directory, side)?);
    }
    let tracker = args.dirty_tracker.map(|tracker| ["--dirty-tracker".to_owned(), tracker.to_string()]);
    arguments.extend(tracker.into_iter().flatten());
    Ok(arguments)
}

/// It is told where to listen when it knows its parameters.
fn destination_arguments(args: &Demo, kind: MachineKind, directory: &Path) -> Result<Vec<String>> {
    let mut arguments = common_arguments(args, kind, directory, "destination")?;
    arguments.extend(["--incoming".to_owned(), "defer".to_owned()]);
    Ok(arguments)
}

fn source_arguments(args: &Demo, kind: MachineKind, directory: &Path) -> Result<Vec<String>> {
    let mut arguments = common_arguments(args, kind, directory, "source")?;
    let does = match kind {
        MachineKind::Synthetic => ["--workload".to_owned(), source_workload(args)?.to_string()],
        MachineKind::Kvm => {
            #[cfg(target_arch = "x86_64")]
            arguments.extend(["--cpu".to_owned(), args.cpu.to_string()]);
            ["--payload".to_owned(), source_payload(args)]
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
    format!("dirty:working-set={}+io+timer", ((memory_bytes / 4).min(16 << 20) & !4095).max(4096))
}

/// The whole way; nothing if interrupted before the migration began.
fn migrate(
    args: &Demo,
    kind: MachineKind,
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
    let ended = following::follow(&mut at_source, interrupts, progress, None)?;
    if ended.report.status != Status::Completed {
        return Ok(Some(Shown { ended, verification: None, lines: None }));
    }
    agree(&mut at_source, &mut at_destination)?;
    if interrupts.sleep(RUN_AFTER) {
        progress.note("interrupted after the migration; verifying all the same");
    }
    progress.say("verifying everything at the destination");
    // Stopped, so that what it has printed is what it has done.
    at_destination.execute("stop", json!({})).context("could not pause the guest to verify it")?;
    let verification = verify_machine(&mut at_destination)?;
    let lines = match kind {
        MachineKind::Kvm => count_lines(directory, &verification)?,
        MachineKind::Synthetic => None,
    };
    Ok(Some(Shown { ended, verification: Some(verification), lines }))
}

/// Checks what the guest has printed, first at the source and then at the destination, against the units of work that it has
/// done: the number of each, once and in order, and at most one more. Tells how many lines there are.
fn count_lines(directory: &Path, verification: &Value) -> Result<Option<Lines>> {
    let units = verification.get("units").and_then(Value::as_u64).unwrap_or(0);
    if units == 0 {
        return Ok(None);
    }
    let [before, after] = ["source", "destination"].map(|side| {
        let path = serial_of(directory, side);
        fs::read_to_string(&path).with_context(|| format!("could not read what the guest printed at the {side}"))
    });
    let (before, after) = (before?, after?);
    let printed = format!("{before}{after}");
    let expected: String = (1..=units.saturating_add(1)).map(|unit| format!("{unit:016x}\n")).collect();
    let lines = printed.lines().count();
    let good = expected.starts_with(&printed) && printed.matches('\n').count() as u64 >= units;
    Ok(Some(Lines { good, source: before.lines().count(), lines, units }))
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

fn tell(args: &Demo, kind: MachineKind, result: Shown) -> Result<Outcome> {
    let Shown { mut ended, verification, lines } = result;
    let verified = verification.as_ref().is_some_and(is_verified) && lines.as_ref().is_none_or(|lines| lines.good);
    let finding = |verification: &Value| match &lines {
        Some(lines) => format!("{}; {lines}", summary(verification)),
        None => summary(verification).to_owned(),
    };
    // The error goes to standard error, once.
    let failure = following::failure(&ended.report);
    ended.report.error = None;
    if args.json {
        let object = json!({
            "verified": verified,
            "machine": kind.name(),
            "report": ended.json,
            "verification": verification,
            "lines": lines,
        });
        terminal::out(&connection::pretty(&object))?;
    } else {
        let mut text = text::report(&ended.report);
        if let (true, Some(verification)) = (verified, &verification) {
            text.push_str(&format!("verified: {}\n", finding(verification)));
        }
        terminal::out(&text)?;
    }
    match (verification, ended.interrupted) {
        (Some(verification), _) if !verified => {
            bail!("the guest at the destination is not what it must be: {}", finding(&verification))
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
