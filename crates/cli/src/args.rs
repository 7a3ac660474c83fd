//! What may be asked on the command line. Everything that can be checked without a machine is checked here, so that
//! a mistyped value is a usage error.

mod bench;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::ArgValueCompleter;
use dunlin::parameters::ParameterInfo;
use dunlin::units::{self, QuantityError};
use dunlin::{Parameters, Uri, UriError};
#[cfg(target_arch = "x86_64")]
use dunlin_machines::CpuModel;
use dunlin_machines::{
    Backing, DeviceConfig, DirtyTracking, DiskConfig, Fill, MemoryJob, NetConfig, Payload, SerialTarget, Workload,
};
use dunlin_monitor::{Address, parse_address};

pub use self::bench::{
    Bench, BenchAutoconverge, BenchBitmap, BenchCompression, BenchConvergence, BenchDowntime, BenchKinds, BenchPeer,
    BenchReceiver, BenchThroughput, Way,
};
use crate::completion::{self, Shell};

/// Live migration for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "dunlin", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Migrate a machine between two processes here, and verify it.
    Demo(Demo),
    /// Run a machine, or wait for one to come in.
    Run(Box<Run>),
    /// Migrate a running machine, and show how it goes.
    Migrate(Migrate),
    /// Watch a machine's migration on a screen, on either side: before it, while it goes on, and after it.
    Watch(Watch),
    /// Make a page with plots of a migration that was recorded with --record.
    Report(MakeReport),
    /// Tell what a machine and its migration are doing.
    Status(At),
    /// Cancel the migration that is running.
    Cancel(At),
    /// Check that every page of a machine holds what it must.
    Verify(At),
    /// Pause the guest.
    Stop(At),
    /// Start or restart the guest.
    Cont(Cont),
    /// End a machine's process.
    Quit(At),
    /// Talk to a machine in words: on a terminal with history and completion, or from a script.
    Monitor(Monitor),
    /// List the parameters of migrations.
    Parameters(ListParameters),
    /// Print what a shell needs to complete command lines of dunlin.
    Completion(Completion),
    /// Measure a part of the engine beside its physical limit.
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Debug, Args)]
pub struct Demo {
    /// The guest's RAM; each of the two processes has as much.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub vcpus: u32,
    /// What runs the guest [default: kvm where /dev/kvm can be used and no --workload is given].
    #[arg(long, value_enum)]
    pub machine: Option<MachineKind>,
    /// The CPU of a machine on KVM: `x86-64`, `x86-64-v2` and `x86-64-v3` are the same on every host of one vendor, `host`
    /// is all that this one can give.
    #[arg(long, value_name = "MODEL", default_value_t = CpuModel::default())]
    #[cfg(target_arch = "x86_64")]
    pub cpu: CpuModel,
    /// The guest of a machine on KVM: `counter`, `dirty:working-set=SIZE,stride=SIZE,rate=BYTES/s,others=BYTES/s`, `io`, `timer:hz=N`,
    /// or several joined by `+` [default: dirty:working-set=16M, or a quarter of a small memory].
    #[arg(long, value_name = "SPEC", value_parser = payload)]
    pub payload: Option<Payload>,
    /// How the writes of a guest on KVM are tracked: `log`, `ring` (a dirty ring for each vCPU, of as many entries as KVM
    /// allows), `ring:ENTRIES`, or `auto`, which is the log [default: auto]. In both processes.
    #[arg(long, value_name = "auto|log|ring", value_parser = dirty_tracker)]
    pub dirty_tracker: Option<DirtyTracking>,
    /// What the guest does: `idle`, or
    /// `pattern=uniform|sequential|zipf|hotcold,rate=BYTES/s,others=BYTES/s,working-set=SIZE,content=random|text|sparse|counter`
    /// [default: pattern=uniform,rate=100M/s,working-set=128M,content=random].
    #[arg(long, value_name = "SPEC", value_parser = workload)]
    pub workload: Option<Workload>,
    /// What RAM holds at first, in percent.
    #[arg(long, value_name = "MIX", default_value = DEFAULT_FILL, value_parser = fill)]
    pub fill: Fill,
    /// The host's pages that RAM is made of, in both processes: 4K, transparent (huge pages where the kernel has them), or
    /// 2M or 1G from the host's pool of huge pages.
    #[arg(long, value_name = "SIZE", default_value_t = Backing::Base)]
    pub hugepages: Backing,
    /// Go on even if the two guests will fill more memory, or take more huge pages, than the host and the cgroups have available.
    #[arg(long)]
    pub force: bool,
    /// How the two are connected.
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub transport: Transport,
    /// Set a parameter of the migration; may be repeated. `dunlin parameters` lists them.
    #[arg(long, value_name = "NAME=VALUE", value_parser = setting, add = ArgValueCompleter::new(completion::settings))]
    pub set: Vec<Setting>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    Tcp,
    Unix,
}

/// What runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MachineKind {
    /// No hypervisor: threads that write memory by a program.
    Synthetic,
    /// A small microVM on /dev/kvm, with a built-in guest.
    Kvm,
}

impl MachineKind {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Synthetic => "synthetic",
            Self::Kvm => "kvm",
        }
    }

    /// Checks that nothing is asked of a machine that is another kind's.
    pub fn check(
        self,
        workload: Option<&Workload>,
        payload: Option<&Payload>,
        dirty_tracker: Option<DirtyTracking>,
    ) -> Result<(), &'static str> {
        match (self, workload, payload, dirty_tracker) {
            (Self::Synthetic, _, Some(_), _) => Err("--payload is for --machine kvm; use --workload"),
            (Self::Synthetic, _, _, Some(_)) => {
                Err("--dirty-tracker is for --machine kvm; the synthetic machine has one way of tracking writes")
            }
            (Self::Kvm, Some(_), _, _) => Err("--workload is for --machine synthetic; use --payload or --kernel"),
            _ => Ok(()),
        }
    }
}

const DEFAULT_FILL: &str = "zero:50,random:30,text:20";

#[derive(Debug, Args)]
pub struct Run {
    /// The guest's RAM; with --incoming, as much as at the source.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: u64,
    /// Number of vCPUs; with --incoming, as many as at the source.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub vcpus: u32,
    /// What runs the guest; with --incoming, the same as at the source.
    #[arg(long, value_enum, default_value_t = MachineKind::Synthetic)]
    pub machine: MachineKind,
    /// The CPU of a machine on KVM: `x86-64`, `x86-64-v2` and `x86-64-v3` are the same on every host of one vendor, `host`
    /// is all that this one can give. Comes with the guest if it comes in.
    #[arg(long, value_name = "MODEL", default_value_t = CpuModel::default())]
    #[cfg(target_arch = "x86_64")]
    pub cpu: CpuModel,
    /// The guest of a machine on KVM: `counter`, `dirty:working-set=SIZE,stride=SIZE,rate=BYTES/s,others=BYTES/s`, `io`, `timer:hz=N`,
    /// or several joined by `+` [default: counter]. Comes with the guest if it comes in.
    #[arg(long, value_name = "SPEC", value_parser = payload)]
    pub payload: Option<Payload>,
    /// How the writes of a guest on KVM are tracked: `log`, `ring` (a dirty ring for each vCPU, of as many entries as KVM
    /// allows), `ring:ENTRIES`, or `auto`, which is the log [default: auto].
    #[arg(long, value_name = "auto|log|ring", value_parser = dirty_tracker)]
    pub dirty_tracker: Option<DirtyTracking>,
    /// A Linux kernel for a machine on KVM to start, `vmlinux` or `vmlinuz`. It comes with the guest if the guest comes in.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["payload", "workload", "fill", "incoming"])]
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// The kernel's first file system.
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// What the guest does: `idle`, or
    /// `pattern=uniform|sequential|zipf|hotcold,rate=BYTES/s,others=BYTES/s,working-set=SIZE,content=random|text|sparse|counter`
    /// [default: idle]. Comes with the guest if it comes in.
    #[arg(long, value_name = "SPEC", value_parser = workload)]
    pub workload: Option<Workload>,
    /// What RAM holds at first, in percent [default: zero:50,random:30,text:20]. Comes with the guest if it comes in.
    #[arg(long, value_name = "MIX", value_parser = fill)]
    pub fill: Option<Fill>,
    /// The host's pages that RAM is made of: 4K, transparent (huge pages where the kernel has them), or 2M or 1G from the
    /// host's pool of huge pages. The other side's may differ.
    #[arg(long, value_name = "SIZE", default_value_t = Backing::Base)]
    pub hugepages: Backing,
    /// Go on even if the guest will fill more memory, or take more huge pages, than the host and the cgroups have available;
    /// with --incoming, if it may. The kernel ends the process when it fills more than there is.
    #[arg(long)]
    pub force: bool,
    /// Seed of everything random in the guest.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Devices of a machine on KVM.
    #[command(flatten)]
    pub devices: Devices,
    /// Wait for a migration on tcp:HOST:PORT, unix:PATH, fd:N or exec:COMMAND; with `defer`, until QMP's
    /// migrate-incoming says where.
    #[arg(long, value_name = "URI|defer", value_parser = incoming)]
    pub incoming: Option<Incoming>,
    /// Where to serve QMP: unix:PATH, or tcp:HOST:PORT, where whoever can connect may run commands as this user; may be
    /// repeated.
    #[arg(long, value_name = "ADDRESS", required = true, value_parser = parse_address, add = ArgValueCompleter::new(completion::sockets))]
    pub qmp: Vec<Address>,
    /// Serve the figures of its migrations to Prometheus, at http://HOST:PORT/metrics. Whoever reaches it may read them.
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics: Option<String>,
    /// End at once when the process of this number, the parent, does.
    #[arg(long, value_name = "PID", hide = true)]
    pub exit_with_parent: Option<u32>,
}

/// With --incoming they are the same as at the source, but for where the serial port and network cards lead.
#[derive(Debug, Clone, Default, Args)]
pub struct Devices {
    /// Where the serial port of a machine on KVM leads: stdio, file:PATH (to its end), unix:PATH (listens) or null
    /// [default: null].
    #[arg(long, value_name = "WHERE", value_parser = serial)]
    pub serial: Option<SerialTarget>,
    /// A disk of a machine on KVM; may be repeated. Both sides of a migration use the same image.
    #[arg(long, value_name = "PATH[,format=raw|qcow2][,readonly=on][,serial=TEXT]", value_parser = disk)]
    pub disk: Vec<DiskConfig>,
    /// A network card of a machine on KVM, on a tap device of the host; may be repeated. The two sides of a migration have
    /// tap devices of their own.
    #[arg(long, value_name = "tap=NAME[,mac=ADDRESS]", value_parser = net)]
    pub net: Vec<NetConfig>,
    /// Give a machine on KVM a source of random numbers.
    #[arg(long)]
    pub rng: bool,
}

impl Devices {
    /// Whether none is asked for.
    pub fn is_empty(&self) -> bool {
        self.serial.is_none() && self.disk.is_empty() && self.net.is_empty() && !self.rng
    }

    /// As the machine takes them.
    pub fn config(&self) -> DeviceConfig {
        DeviceConfig {
            serial: self.serial.clone().unwrap_or_default(),
            disks: self.disk.clone(),
            nets: self.net.clone(),
            rngs: u32::from(self.rng),
        }
    }
}

impl Run {
    /// The workload asked for, or none.
    pub fn workload(&self) -> Result<Workload, String> {
        self.workload.clone().map_or_else(|| workload("idle"), Ok)
    }

    /// The payload asked for, or the usual one.
    pub fn payload(&self) -> Payload {
        self.payload.clone().unwrap_or(Payload { memory: Some(MemoryJob::Counter), io: false, timer: None })
    }

    /// The first content asked for, or the usual one.
    pub fn fill(&self) -> Result<Fill, String> {
        self.fill.clone().map_or_else(|| fill(DEFAULT_FILL), Ok)
    }
}

#[derive(Debug, Clone)]
pub enum Incoming {
    Defer,
    On(Uri),
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// The machine to migrate: unix:PATH or tcp:HOST:PORT of its QMP.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address, add = ArgValueCompleter::new(completion::sockets))]
    pub qmp: Address,
    /// Where to: tcp:HOST:PORT, unix:PATH, fd:N or exec:COMMAND.
    #[arg(value_parser = uri)]
    pub uri: Uri,
    /// Set a parameter at the machine; may be repeated. It stays set there after this migration, for the next ones too.
    /// `dunlin parameters` lists them.
    #[arg(long, value_name = "NAME=VALUE", value_parser = setting, add = ArgValueCompleter::new(completion::settings))]
    pub set: Vec<Setting>,
    /// Do not wait for the end.
    #[arg(long)]
    pub detach: bool,
    /// Record the migration, for `dunlin report`, into a new file: a line of JSON for each look at it, ten a second or more.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "detach")]
    pub record: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long, conflicts_with = "detach")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Watch {
    /// The machine, on either side of the migration: unix:PATH or tcp:HOST:PORT of its QMP. Leaving (q or Ctrl-C) does
    /// nothing to it.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address, add = ArgValueCompleter::new(completion::sockets))]
    pub qmp: Address,
    /// Record what is seen, for `dunlin report`, into a new file.
    #[arg(long, value_name = "FILE.jsonl")]
    pub record: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct MakeReport {
    /// What --record has written.
    #[arg(value_name = "FILE.jsonl")]
    pub recording: PathBuf,
    /// Where the page goes, over what is there; - is standard output.
    #[arg(long, short, value_name = "PAGE.html")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct At {
    /// The machine: unix:PATH or tcp:HOST:PORT of its QMP.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address, add = ArgValueCompleter::new(completion::sockets))]
    pub qmp: Address,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Cont {
    #[command(flatten)]
    pub at: At,
    /// Decide that a guest of which neither side knows where it is belongs here. First make sure that it does not
    /// run at the other side: it must never run on both.
    #[arg(long)]
    pub take_back: bool,
    /// Go on even if a disk image is not as the guest left it. With --take-back, also do not wait until nothing was heard of
    /// the other side for `link-timeout`: for when you know for certain that it will not run the guest.
    #[arg(long)]
    pub force: bool,
}

/// On a terminal it asks for commands; `help` lists them. Otherwise it reads them from standard input, up to the first
/// that fails.
#[derive(Debug, Args)]
pub struct Monitor {
    /// The machine, or QEMU: unix:PATH or tcp:HOST:PORT of its QMP.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address, add = ArgValueCompleter::new(completion::sockets))]
    pub qmp: Address,
    /// Carry out a command and end; may be repeated: one after the other, up to the first that fails.
    #[arg(short = 'c', long = "command", value_name = "COMMAND")]
    pub commands: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ListParameters {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Print docs/parameters.md.
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,
}

/// For bash: `source <(dunlin completion bash)`. For zsh, after compinit: `source <(dunlin completion zsh)`. For fish:
/// `dunlin completion fish | source`.
#[derive(Debug, Args)]
pub struct Completion {
    /// Which shell.
    #[arg(value_enum)]
    pub shell: Shell,
}

/// A parameter and its value, in the unit of its table.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub info: &'static ParameterInfo,
    pub number: i64,
}

fn size(text: &str) -> Result<u64, QuantityError> {
    units::parse_size(text)
}

fn uri(text: &str) -> Result<Uri, UriError> {
    text.parse()
}

fn incoming(text: &str) -> Result<Incoming, UriError> {
    if text == "defer" { Ok(Incoming::Defer) } else { text.parse().map(Incoming::On) }
}

/// Reads a workload.
pub fn workload(text: &str) -> Result<Workload, String> {
    text.parse::<Workload>().map_err(|error| error.to_string())
}

fn payload(text: &str) -> Result<Payload, String> {
    text.parse::<Payload>().map_err(|error| error.to_string())
}

fn dirty_tracker(text: &str) -> Result<DirtyTracking, String> {
    text.parse::<DirtyTracking>().map_err(|error| error.to_string())
}

fn fill(text: &str) -> Result<Fill, String> {
    text.parse::<Fill>().map_err(|error| error.to_string())
}

fn serial(text: &str) -> Result<SerialTarget, String> {
    text.parse()
}

fn disk(text: &str) -> Result<DiskConfig, String> {
    text.parse()
}

fn net(text: &str) -> Result<NetConfig, String> {
    text.parse()
}

fn setting(text: &str) -> Result<Setting, String> {
    let (name, value) = text.split_once('=').ok_or("it is not NAME=VALUE, such as max-bandwidth=300M/s")?;
    let info = ParameterInfo::find(name.trim()).map_err(|error| error.to_string())?;
    let number = info.parse(value).map_err(|error| error.to_string())?;
    Parameters::default().set(info.name, number).map_err(|error| error.to_string())?;
    Ok(Setting { info, number })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        let words = std::iter::once("dunlin").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.command).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_the_documentation_shows() {
        for line in [
            "demo",
            "demo --memory 64M --vcpus 4 --workload idle --transport unix --set multifd-channels=8 --set max-bandwidth=50M/s --json",
            "demo --machine kvm --payload dirty:working-set=8M,rate=20M/s",
            "demo --machine kvm --dirty-tracker ring",
            "run --memory 64M --machine kvm --dirty-tracker ring:4096 --qmp unix:/a",
            "run --memory 64M --machine kvm --payload counter --qmp unix:/a",
            "run --memory 64M --machine kvm --serial file:/b --disk /c --disk /d,format=qcow2,readonly=on,serial=x --rng --net tap=t --qmp unix:/a",
            "run --memory 256M --machine kvm --kernel vmlinuz --initrd a.cpio --cmdline console=ttyS0 --qmp unix:/a",
            "run --memory 1.5GiB --vcpus 2 --fill zero:100 --seed 7 --qmp unix:/a",
            "run --memory 2G --incoming tcp:[::1]:0 --qmp /a",
            "run --memory 2G --incoming defer --qmp unix:/a",
            "run --memory 500G --force --qmp unix:/a",
            "demo --memory 500G --force",
            "run --memory 2G --qmp unix:/a --qmp tcp:127.0.0.1:4444",
            "status --qmp tcp:127.0.0.1:4444",
            "migrate --qmp unix:/a tcp:localhost:4444 --set downtime-limit=100ms --detach",
            "migrate --qmp unix:/a tcp:localhost:4444 --record /tmp/a.jsonl",
            "watch --qmp unix:/a --record /tmp/a.jsonl",
            "report /tmp/a.jsonl -o /tmp/a.html",
            "run --memory 1G --qmp unix:/a --metrics localhost:9100",
            "status --qmp unix:/a --json",
            "cancel --qmp unix:/a",
            "verify --qmp unix:/a",
            "stop --qmp unix:/a",
            "cont --qmp unix:/a --take-back",
            "quit --qmp unix:/a",
            "monitor --qmp unix:/a",
            "monitor --qmp /a -c stop -c cont",
            "completion bash",
            "parameters --json",
            "parameters --markdown",
            "bench bitmap --memory 64G --json",
        ] {
            assert!(parse(line).is_ok(), "{line}: {:?}", parse(line));
        }
    }

    #[test]
    fn what_another_machine_has() {
        let tracker = Some(DirtyTracking::Log);
        let mistake = MachineKind::Synthetic.check(None, None, tracker).unwrap_err();
        assert!(mistake.contains("--dirty-tracker is for --machine kvm"), "{mistake}");
        assert!(MachineKind::Synthetic.check(None, None, None).is_ok());
        assert!(MachineKind::Kvm.check(None, None, tracker).is_ok());
    }

    #[test]
    fn what_people_mistype() {
        for (line, wanted) in [
            ("demo --memory 1X", "a size in bytes, such as"),
            ("demo --vcpus 0", "0"),
            ("demo --set max-bandwidht=1M", "there is no parameter"),
            ("demo --set max-bandwidth", "NAME=VALUE"),
            ("demo --set multifd-channels=256", "1 to 255"),
            ("demo --workload walking", "walking"),
            ("demo --machine kvm --payload walking", "no payload"),
            ("demo --machine kvm --dirty-tracker rings", "auto, log, ring, or ring:ENTRIES"),
            ("run --memory 1G --machine kvm --kernel a --payload counter --qmp /a", "cannot be used with"),
            ("run --memory 1G --machine kvm --initrd a --qmp /a", "--kernel"),
            ("run --memory 1G", "--qmp"),
            ("run --memory 1G --serial tty --qmp unix:/a", "stdio, file:PATH"),
            ("run --memory 1G --disk a,format=vmdk --qmp unix:/a", "format=raw|qcow2"),
            ("run --memory 1G --disk ,format=raw --qmp unix:/a", "the image's path"),
            ("run --memory 1G --qmp tcp:localhost", "the port is missing"),
            ("run --memory 1G --qmp vsock:1:2", "Unix sockets and TCP only"),
            ("run --memory 1G --qmp unix:/a --incoming tcp:localhost", "the port is missing"),
            ("migrate --qmp unix:/a localhost:4444", "the scheme is unknown"),
            ("migrate --qmp unix:/a", "URI"),
            ("migrate --qmp unix:/a tcp:localhost:4444 --record /a --detach", "cannot be used with"),
            ("report /a", "--output"),
            ("watch", "--qmp"),
            ("status", "--qmp"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(wanted), "{line}: {error}");
        }
    }
}
