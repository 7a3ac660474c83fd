//! `dunlin run`: a machine's process. It ends when it is told to, never because a migration did.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use dunlin::units::format_size;
use dunlin::{Guest, GuestEnd, Machine, MachineError, Ownership, Uri};
use dunlin_machines::{SyntheticConfig, SyntheticMachine};
use dunlin_monitor::metrics::MetricsServer;
use dunlin_monitor::{Server, ShutdownCause, Verification, Vm};
use rustix::process::{Pid, Signal};
use serde::Serialize;

use crate::Outcome;
use crate::args::{Incoming, MachineKind, Run};
use crate::interrupts::Interrupts;
use crate::memory_check::{self, Use};
use crate::teller::Teller;
use crate::terminal;

/// How long a migration that is running at the end may take to be cancelled.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

pub fn run(args: &Run, interrupts: &Interrupts) -> Result<Outcome> {
    if let Some(parent) = args.exit_with_parent {
        tie_to_parent(parent)?;
    }
    args.machine
        .check(args.workload.as_ref(), args.payload.as_ref(), args.dirty_tracker)
        .map_err(|mistake| anyhow!(mistake))?;
    if args.kernel.is_some() && args.machine != MachineKind::Kvm {
        bail!("--kernel is for --machine kvm");
    }
    memory_check::check(memory_use(args)?, args.force)
        .with_context(|| format!("could not make a machine of {}", size(args)))?;
    let (vm, on_kvm) = match args.machine {
        MachineKind::Synthetic if !args.devices.is_empty() => {
            bail!("--serial, --disk, --net and --rng are for --machine kvm")
        }
        MachineKind::Synthetic => (make(args)?, None),
        MachineKind::Kvm => make_kvm(args).map(|(vm, on_kvm)| (vm, Some(on_kvm)))?,
    };
    let guest_end = || on_kvm.as_ref().and_then(|machine| (machine.end)());
    let mut state = match &args.incoming {
        None => {
            vm.cont().context("could not start the guest")?;
            let does = match args.machine {
                MachineKind::Synthetic => format!("workload {}", args.workload().map_err(|error| anyhow!(error))?),
                MachineKind::Kvm => match &args.kernel {
                    Some(kernel) => format!("on KVM, kernel {}", kernel.display()),
                    None => format!("on KVM, payload {}", args.payload()),
                },
            };
            format!("guest running: {}, {does}", size(args))
        }
        Some(Incoming::Defer) => {
            format!("waiting for QMP's migrate-incoming to say where to wait for a migration: {}", size(args))
        }
        Some(Incoming::On(uri)) => {
            let address = listen(&vm, uri)?;
            format!("waiting for a migration on {address}: {}", size(args))
        }
    };
    let servers = args.qmp.iter().map(|address| Server::start(address, &vm)).collect::<Result<Vec<_>, _>>()?;
    let addresses: Vec<String> = servers.iter().map(|server| server.address().to_string()).collect();
    state.push_str(&format!("; QMP at {}", addresses.join(", ")));
    let metrics = args.metrics.as_ref().map(|address| serve_metrics(address, &vm)).transpose()?;
    if let Some(metrics) = &metrics {
        state.push_str(&format!("; metrics at http://{}/metrics", metrics.address()));
    }
    terminal::out(&state)?;
    let mut teller = Teller::default();
    let mut clocks = None;
    let mut guest_ended = None;
    let mut warned = false;
    while guest_ended.is_none() && !vm.wait_for_quit(Duration::from_millis(50)) {
        teller.look(vm.report().as_ref());
        let disagreement = on_kvm.as_ref().and_then(|machine| (machine.clocks)());
        if let Some(line) = disagreement.as_ref().filter(|_| disagreement != clocks) {
            terminal::note(line);
        }
        clocks = disagreement;
        // One that is not here has ended for whoever it goes to.
        guest_ended = guest_end().filter(|end| vm.guest().ended(end.how).is_ok() && !is_undecided(&vm));
        if interrupts.arrived() {
            if warned || !is_undecided(&vm) {
                break;
            }
            // This may be the only copy there is.
            warned = true;
            interrupts.forget();
            terminal::note(KEEPS_UNDECIDED);
        }
    }
    let undecided = is_undecided(&vm);
    if let Some(end) = &guest_ended {
        terminal::note(&end.line);
        vm.announce_shutdown(end.how.into());
    } else if interrupts.arrived() {
        vm.announce_shutdown(ShutdownCause::HostSignal);
    }
    if interrupts.arrived() {
        terminal::note("asked to end");
    }
    let hanging = |limit| on_kvm.as_ref().map(|machine| (machine.hanging)(limit)).unwrap_or_default();
    let mut hang = hanging(REQUEST_LIMIT);
    // A pause would wait for what hangs.
    let shut_down = if hang.is_empty() { Vm::shut_down } else { Vm::shut_down_running };
    let last = shut_down(&vm, CANCEL_TIMEOUT);
    teller.look(vm.report().as_ref());
    if let Some(report) = last.filter(|report| !report.status.is_final()) {
        terminal::note(&format!("ended while a migration was {}; the guest was {}", report.status, report.guest));
    }
    drop((servers, metrics));
    if hang.is_empty() {
        hang = hanging(LAST_ANSWER);
    }
    if !hang.is_empty() {
        terminal::note(&format!(
            "ended without waiting for {}: its storage hangs; what the guest wrote last may be lost, and the kernel may keep \
             this process until the storage answers",
            hang.join(", ")
        ));
    }
    if let Some(end) = guest_ended {
        return Ok(Outcome::GuestEnded(end.status));
    }
    if undecided {
        terminal::note("ended with a guest that was undecided: what was here of it is lost");
        return Ok(Outcome::UndecidedLost);
    }
    Ok(if interrupts.by_keyboard() { Outcome::Interrupted } else { Outcome::Success })
}

/// Said to whoever asks this process to end while its guest is undecided.
const KEEPS_UNDECIDED: &str = "not ended: it is undecided whether the guest is here or at the other side, and this may be the only \
    copy of it; decide on one side (dunlin cont --take-back), or ask once more to end and lose what is here";

fn is_undecided(vm: &Vm) -> bool {
    vm.guest().ownership() == Ownership::Undecided
}

fn serve_metrics(address: &str, vm: &Arc<Vm>) -> Result<MetricsServer> {
    let vm = Arc::clone(vm);
    let server = MetricsServer::start(address, Arc::new(move || vm.report()))?;
    Ok(server)
}

/// How a guest on KVM has ended by itself, and what that means for the process.
struct KvmEnd {
    line: String,
    status: u8,
    how: GuestEnd,
}

/// What only a machine on KVM can tell.
struct OnKvm {
    /// Tells whether the guest has ended by itself.
    end: Box<dyn Fn() -> Option<KvmEnd>>,
    /// Names the devices that do not answer in time, because their storage hangs. The devices do nothing afterwards.
    hanging: Box<dyn Fn(Duration) -> Vec<String>>,
    /// Tells that the clock of the host from which the guest came disagrees with this one's by much.
    clocks: Box<dyn Fn() -> Option<String>>,
}

/// Disagreements of two hosts' clocks that are worth a line.
const CLOCKS_APART: Duration = Duration::from_millis(100);

/// How long a device's request may take at the end, before its storage is said to hang.
const REQUEST_LIMIT: Duration = Duration::from_secs(1);
/// How long a device may take to answer when it has been paused, or should be.
const LAST_ANSWER: Duration = Duration::from_millis(50);

fn size(args: &Run) -> String {
    let plural = if args.vcpus == 1 { "" } else { "s" };
    format!("{}, {} vCPU{plural}", format_size(args.memory), args.vcpus)
}

/// What the machine will fill of its RAM.
fn memory_use(args: &Run) -> Result<Use> {
    let wanted = |filled_bytes| Use {
        who: "the guest and its process",
        ram_bytes: args.memory,
        filled_bytes,
        backing: args.hugepages,
        processes: 1,
    };
    if args.incoming.is_some() {
        return Ok(Use { who: "a guest that comes in, and its process,", ..wanted(None) });
    }
    let fill = args.fill().map_err(|error| anyhow!(error))?;
    let filled = match (args.machine, &args.kernel) {
        (MachineKind::Synthetic, _) => {
            args.workload().map_err(|error| anyhow!(error))?.filled_bytes(args.memory, &fill, args.hugepages)
        }
        (MachineKind::Kvm, None) => args.payload().filled_bytes(args.memory, &fill, args.hugepages),
        // What it starts from; more as it uses its memory.
        (MachineKind::Kvm, Some(kernel)) => [Some(kernel), args.initrd.as_ref()]
            .into_iter()
            .flatten()
            .map(|file| std::fs::metadata(file).map_or(0, |found| found.len()))
            .fold(0, u64::saturating_add),
    };
    Ok(wanted(Some(filled)))
}

/// Has the kernel end this process when its parent ends, and ends it if that is so already.
pub fn tie_to_parent(parent: u32) -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("could not tie to the parent")?;
    let now = rustix::process::getppid().map(Pid::as_raw_pid);
    if now.and_then(|pid| u32::try_from(pid).ok()) != Some(parent) {
        bail!("the parent has ended");
    }
    Ok(())
}

fn make(args: &Run) -> Result<Arc<Vm>> {
    let failed = || format!("could not make a machine of {}", size(args));
    let machine = if args.incoming.is_some() {
        if args.workload.is_some() || args.fill.is_some() {
            terminal::note("--workload and --fill say nothing here: they come with the guest");
        }
        SyntheticMachine::empty(args.memory, args.vcpus, args.hugepages)
    } else {
        SyntheticMachine::new(&SyntheticConfig {
            memory_bytes: args.memory,
            vcpus: args.vcpus,
            workload: args.workload().map_err(|error| anyhow!(error))?,
            fill: args.fill().map_err(|error| anyhow!(error))?,
            seed: args.seed,
            backing: args.hugepages,
        })
    };
    Ok(controlled(args, machine.with_context(failed)?, |machine| {
        let report = machine.verify()?;
        finding(report.is_good(), &report)
    }))
}

#[cfg(target_arch = "x86_64")]
fn make_kvm(args: &Run) -> Result<(Arc<Vm>, OnKvm)> {
    use dunlin_machines::{Kernel, KvmConfig, KvmGuest, KvmMachine};
    let failed = || format!("could not make a machine of {} on KVM", size(args));
    let config = KvmConfig {
        memory_bytes: args.memory,
        vcpus: args.vcpus,
        backing: args.hugepages,
        dirty_tracking: args.dirty_tracker.unwrap_or_default(),
        devices: args.devices.config(),
    };
    let machine = if args.incoming.is_some() {
        if args.payload.is_some() || args.fill.is_some() {
            terminal::note("--payload and --fill say nothing here: they come with the guest");
        }
        KvmMachine::empty(&config)
    } else {
        let guest = match &args.kernel {
            Some(image) => KvmGuest::Kernel(Kernel {
                image: image.clone(),
                command_line: args.cmdline.clone(),
                initrd: args.initrd.clone(),
            }),
            None => KvmGuest::Payload {
                payload: args.payload(),
                fill: args.fill().map_err(|error| anyhow!(error))?,
                seed: args.seed,
            },
        };
        KvmMachine::new(&config, args.cpu, &guest)
    };
    let machine = machine.with_context(failed)?;
    let (ending, hanging, clocks) = (machine.clone(), machine.clone(), machine.clone());
    let end = move || ending.ended().map(kvm_end);
    let vm = controlled(args, machine, |machine| {
        let report = machine.verify()?;
        finding(report.is_good(), &report)
    });
    let hanging = move |limit| hanging.hanging_devices(limit);
    let clocks = move || {
        let apart = Duration::from_nanos(clocks.clock_difference()?.ahead_nanoseconds.unsigned_abs());
        clocks.clock_difference().filter(|_| apart >= CLOCKS_APART).map(|difference| difference.to_string())
    };
    Ok((vm, OnKvm { end: Box::new(end), hanging: Box::new(hanging), clocks: Box::new(clocks) }))
}

#[cfg(target_arch = "x86_64")]
fn kvm_end(ended: dunlin_machines::Ended) -> KvmEnd {
    use dunlin_machines::Ended;
    let status = match ended {
        Ended::Exit { value } => u8::try_from(value).unwrap_or(u8::MAX),
        Ended::Reset | Ended::Halted | Ended::Off => 0,
        _ => 1,
    };
    KvmEnd { line: ended.to_string(), status, how: ended.into() }
}

/// A machine under a monitor, with its guest here or on its way in.
fn controlled<M: Machine + 'static>(
    args: &Run,
    machine: Arc<M>,
    verify: impl Fn(&M) -> Result<Verification, MachineError> + Send + Sync + 'static,
) -> Arc<Vm> {
    let guest = Arc::clone(&machine);
    let guest = if args.incoming.is_some() { Guest::awaited(guest) } else { Guest::new(guest) };
    Vm::new(guest, Some(Box::new(move || verify(&machine))))
}

fn finding(good: bool, report: &(impl ToString + Serialize)) -> Result<Verification, MachineError> {
    Ok(Verification { good, summary: report.to_string(), report: serde_json::to_value(report)? })
}

#[cfg(not(target_arch = "x86_64"))]
fn make_kvm(_: &Run) -> Result<(Arc<Vm>, OnKvm)> {
    bail!("--machine kvm is for x86-64 only; use --machine synthetic")
}

fn listen(vm: &Vm, uri: &Uri) -> Result<Uri> {
    vm.listen(uri).map_err(|error| {
        anyhow!("could not wait for a migration on {uri}: {error}; choose an address that is free on this host")
    })?;
    Ok(vm.listening_on().unwrap_or_else(|| uri.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Statuses and QEMU's reasons.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn what_a_guests_end_means() {
        use dunlin_machines::Ended;
        for (ended, status, cause) in [
            (Ended::Off, 0, ShutdownCause::GuestShutdown),
            (Ended::Exit { value: 3 }, 3, ShutdownCause::GuestShutdown),
            (Ended::Exit { value: 300 }, 255, ShutdownCause::GuestShutdown),
            (Ended::Halted, 0, ShutdownCause::GuestShutdown),
            (Ended::Reset, 0, ShutdownCause::GuestReset),
            (Ended::Shutdown, 1, ShutdownCause::GuestReset),
        ] {
            let end = kvm_end(ended);
            assert_eq!((end.status, end.how.into()), (status, cause), "{ended:?}");
        }
    }
}
