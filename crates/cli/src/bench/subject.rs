//! The guest that a bench migrates in this process, and the process that receives it.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use dunlin::{Destination, Guest, Machine, Parameters, Status, Uri};
use dunlin_machines::{Backing, SyntheticConfig, SyntheticMachine};

use crate::Outcome;
use crate::args::{BenchReceiver, MachineKind};
use crate::{run, terminal};

/// A machine whose vCPUs count their steps.
#[derive(Debug, Clone)]
pub enum Subject {
    Synthetic(Arc<SyntheticMachine>),
    #[cfg(target_arch = "x86_64")]
    Kvm(Arc<dunlin_machines::KvmMachine>),
}

/// What it is made of.
#[derive(Debug, Clone, Copy)]
pub struct Build {
    pub kind: MachineKind,
    pub memory: u64,
    pub vcpus: u32,
}

impl Build {
    /// A machine with a guest that does what `job` says, in otherwise empty memory.
    pub fn make(self, job: &str) -> Result<Subject> {
        let fill = "zero:100".parse()?;
        match self.kind {
            MachineKind::Synthetic => {
                let config = SyntheticConfig {
                    memory_bytes: self.memory,
                    vcpus: self.vcpus,
                    workload: job.parse()?,
                    fill,
                    backing: Backing::Base,
                    seed: 1,
                };
                Ok(Subject::Synthetic(SyntheticMachine::new(&config)?))
            }
            MachineKind::Kvm => self.make_kvm(Some((job, fill))),
        }
    }

    /// A machine for it to come into.
    fn empty(self) -> Result<Subject> {
        match self.kind {
            MachineKind::Synthetic => {
                Ok(Subject::Synthetic(SyntheticMachine::empty(self.memory, self.vcpus, Backing::Base)?))
            }
            MachineKind::Kvm => self.make_kvm(None),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn make_kvm(self, job: Option<(&str, dunlin_machines::Fill)>) -> Result<Subject> {
        use dunlin_machines::{CpuModel, DeviceConfig, DirtyTracking, KvmConfig, KvmGuest, KvmMachine};
        let mut config = KvmConfig {
            memory_bytes: self.memory,
            vcpus: self.vcpus,
            backing: Backing::Base,
            // They tell which vCPU it is.
            dirty_tracking: DirtyTracking::Ring { entries: None },
            devices: DeviceConfig::default(),
        };
        let Some((payload, fill)) = job else { return Ok(Subject::Kvm(KvmMachine::empty(&config)?)) };
        let guest = KvmGuest::Payload { payload: payload.parse()?, fill, seed: 1 };
        let machine = KvmMachine::new(&config, CpuModel::default(), &guest).or_else(|error| {
            terminal::note(&format!("with the dirty log instead of rings, since {error}"));
            config.dirty_tracking = DirtyTracking::Log;
            KvmMachine::new(&config, CpuModel::default(), &guest)
        })?;
        Ok(Subject::Kvm(machine))
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn make_kvm(self, _: Option<(&str, dunlin_machines::Fill)>) -> Result<Subject> {
        bail!("machines on KVM are for x86-64 only")
    }
}

impl Subject {
    pub fn machine(&self) -> Arc<dyn Machine> {
        match self {
            Self::Synthetic(machine) => machine.clone(),
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(machine) => machine.clone(),
        }
    }

    /// Steps that each vCPU has done.
    pub fn steps(&self) -> Result<Vec<u64>> {
        Ok(match self {
            Self::Synthetic(machine) => machine.steps(),
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(machine) => machine.counted()?,
        })
    }

    /// What is wrong with it, if something is.
    fn fault(&self) -> Result<Option<String>> {
        let (good, report) = match self {
            Self::Synthetic(machine) => {
                let report = machine.verify()?;
                (report.is_good(), report.to_string())
            }
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(machine) => {
                let report = machine.verify()?;
                (report.is_good(), report.to_string())
            }
        };
        Ok((!good).then_some(report))
    }
}

/// The receiving process's side: says where it listens, and when the guest has come, that it is whole.
pub fn receiver(args: &BenchReceiver) -> Result<Outcome> {
    run::tie_to_parent(args.exit_with_parent)?;
    let subject = Build { kind: args.machine, memory: args.memory, vcpus: args.vcpus }.empty()?;
    let guest = Guest::awaited(subject.machine());
    let destination = Destination::listen(&guest, &"tcp:127.0.0.1:0".parse()?, &Parameters::default())?;
    terminal::out(&destination.local_uri().to_string())?;
    let report = destination.wait();
    if report.status != Status::Completed {
        bail!("{}", report.error.map_or("the migration did not complete".to_owned(), |error| error.message));
    }
    guest.stop()?;
    terminal::out(&subject.fault()?.unwrap_or_default())?;
    Ok(Outcome::Success)
}

/// The receiving process, from the one that started it. It ends when this is dropped.
#[derive(Debug)]
pub struct Receiver {
    process: Child,
    said: BufReader<ChildStdout>,
    pub address: Uri,
}

impl Receiver {
    pub fn start(build: Build) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "receiver", "--machine", build.kind.name(), "--memory", &build.memory.to_string()]);
        command.args(["--vcpus", &build.vcpus.to_string(), "--exit-with-parent", &std::process::id().to_string()]);
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut said = BufReader::new(process.stdout.take().context("no standard output")?);
        let address = line(&mut said)?.parse()?;
        Ok(Self { process, said, address })
    }

    /// Waits until the guest that has come was verified.
    pub fn finish(mut self) -> Result<()> {
        match line(&mut self.said)?.as_str() {
            "" => Ok(()),
            fault => bail!("the guest is not what it must be: {fault}"),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn line(said: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    if said.read_line(&mut line)? == 0 {
        bail!("the receiving process ended too soon");
    }
    Ok(line.trim().to_owned())
}
