//! A small microVM on KVM: RAM in memfds, vCPUs with KVM's own interrupt controllers and interval timer; Linux in it, or
//! built-in bare-metal guests of which everything in memory follows from how many steps each vCPU has done.
//!
//! What is x86-64 of it is in `x86`. What must stay true: a vCPU's state is read and written only while its thread waits at
//! the gate, out of KVM_RUN and with no instruction half done.

mod alarm;
mod devices;
mod error;
mod memory;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod time_tests;
mod tracking;
mod vcpu;
mod verify;
mod x86;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

use dunlin::memory::{DirtyBitmap, DirtyTracker, Ram, RamBlock};
use dunlin::{Claim, GuestEnd, Machine, MachineError, StartPermit, StateAge, StateSection, SwitchoverCost};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

pub use devices::Ended;
pub use error::KvmError;
pub use verify::KvmReport;
pub use x86::cpu::{CpuModel, CpuModelError};
pub use x86::{BootError, ClockDifference, Kernel};

use devices::{Description, Devices, OwnWrites};
use error::kvm;
use memory::Memory;
use tracking::Rings;
use vcpu::Vcpus;
use x86::cpu;
use x86::features::{self, Leaf};
use x86::{Host, Program, Progress, VcpuState, VmState};

use crate::device_config::DeviceConfig;
use crate::sections::{StateError, check_known, decode_profile, encode_profile, find, same, section};
use crate::synthetic::fill::fill_pages;
use crate::{Backing, DirtyTracking, Fill, Payload};

/// What a profile calls such machines.
const KIND: &str = "kvm";
/// The most vCPUs.
const MAX_VCPUS: u32 = 16;
/// How long a start, a stop or a check may wait for another: longer than each may take with storage that hangs.
const CONTROL_LIMIT: Duration = Duration::from_secs(4);
const MIN_MEMORY_BYTES: u64 = 2 << 20;
const MAX_MEMORY_BYTES: u64 = 64 << 30;

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct KvmConfig {
    /// RAM in bytes, 2 MiB to 64 GiB.
    pub memory_bytes: u64,
    /// vCPUs, 1 to 16.
    pub vcpus: u32,
    /// The host's pages that RAM is made of.
    pub backing: Backing,
    /// How its writes are tracked.
    pub dirty_tracking: DirtyTracking,
    /// What it has besides.
    pub devices: DeviceConfig,
}

impl KvmConfig {
    /// Checks that a machine can have such memory and so many vCPUs.
    ///
    /// # Errors
    /// Which of them it cannot.
    pub fn check(&self) -> Result<(), KvmError> {
        let range = MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES;
        // Memory begins again at 4 GiB, so that the hole is a multiple of all pages.
        if !range.contains(&self.memory_bytes) || !self.memory_bytes.is_multiple_of(self.backing.page_bytes()) {
            return Err(KvmError::MemorySize { bytes: self.memory_bytes });
        }
        match self.vcpus {
            1..=MAX_VCPUS => Ok(()),
            vcpus => Err(KvmError::Vcpus { vcpus }),
        }
    }
}

/// What runs in a machine.
#[derive(Debug, Clone)]
pub enum KvmGuest {
    /// A built-in guest, which can be verified.
    Payload {
        /// What it does.
        payload: Payload,
        /// What RAM holds at the start, above the first MiB.
        fill: Fill,
        /// What RAM holds follows from it.
        seed: u64,
    },
    /// Linux.
    Kernel(Kernel),
}

/// What the machine is and does, once it is known.
#[derive(Debug, Clone)]
struct Identity {
    content: Content,
    /// The CPU's features that each vCPU was given.
    cpuid: Vec<Vec<Leaf>>,
    /// How fast its time stamp counters count.
    tsc_khz: Option<u32>,
}

/// What RAM holds.
#[derive(Debug, Clone)]
enum Content {
    /// What follows from the work that a built-in guest has done.
    Known(Known),
    /// What a kernel has made of it.
    Unknown,
}

/// A built-in guest, and what its RAM held at the start.
#[derive(Debug, Clone)]
struct Known {
    program: Program,
    fill: Fill,
    seed: u64,
}

/// A virtual machine of KVM.
#[derive(Debug)]
struct Hypervisor {
    vm: Arc<VmFd>,
    rings: Rings,
    /// Something ran in it or was loaded into it: for another state there must be a new one.
    used: bool,
}

/// A machine on KVM.
#[derive(Debug)]
pub struct KvmMachine {
    // Dropped in this order: first the threads, last the memory that all stand on.
    vcpus: Vcpus,
    devices: Devices,
    hypervisor: Mutex<Hypervisor>,
    kvm: Kvm,
    host: Host,
    memory: Memory,
    memory_bytes: u64,
    count: u32,
    dirty_tracking: DirtyTracking,
    /// `None` until a state is loaded into an empty machine.
    identity: RwLock<Option<Identity>>,
    clock_difference: Mutex<Option<ClockDifference>>,
    /// Held while somebody starts, stops or verifies.
    control: Mutex<()>,
}

/// What the other side must agree to. The engine itself compares memory.
#[derive(Debug, Serialize, Deserialize)]
struct Profile {
    vcpus: u32,
    cpuid: Vec<Leaf>,
    tsc_khz: Option<u32>,
    devices: Vec<Description>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Config {
    memory_bytes: u64,
    vcpus: u32,
    guest: GuestConfig,
}

/// Which guest it is, for whoever takes it over.
#[derive(Debug, Serialize, Deserialize)]
enum GuestConfig {
    Payload { payload: Payload, fill: Fill, seed: u64 },
    Kernel,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvmMachine {
    /// Whether a machine can be made here.
    ///
    /// # Errors
    /// Why not.
    pub fn available() -> Result<(), KvmError> {
        open().and_then(|kvm_fd| create_vm(&kvm_fd)).map(drop)
    }

    /// A machine with its guest in RAM, paused, which sees such a CPU.
    ///
    /// # Errors
    /// When there is no KVM, the configuration is out of range, or KVM or the system refuses something.
    pub fn new(config: &KvmConfig, model: CpuModel, guest: &KvmGuest) -> Result<Arc<Self>, KvmError> {
        let machine = Self::empty(config)?;
        let started = match guest {
            KvmGuest::Payload { payload, fill, seed } => Started::Program(machine.put_payload(payload, fill, *seed)?),
            KvmGuest::Kernel(kernel) => {
                let windows = machine.devices.windows();
                Started::Kernel(x86::load_kernel(kernel, machine.memory.map(), config.vcpus, &windows)?)
            }
        };
        let cpuid: Vec<_> =
            (0..config.vcpus).map(|vcpu| cpu::leaves(model, &machine.host.cpuid, vcpu, config.vcpus)).collect();
        if let Some(missing) = cpuid.first().and_then(|given| features::missing(given, &machine.host.cpuid)) {
            return Err(KvmError::CpuModel { model, missing });
        }
        for ((number, vcpu), leaves) in machine.vcpus.all().iter().enumerate().zip(&cpuid) {
            let fd = vcpu.fd();
            let fd = fd.as_ref().ok_or(KvmError::Empty)?;
            x86::set_cpuid(fd, leaves)?;
            match &started {
                Started::Program(known) => x86::boot(fd, number, &known.program)?,
                Started::Kernel(entry) => x86::boot_linux(fd, number, *entry)?,
            }
        }
        let content = match started {
            Started::Program(known) => Content::Known(known),
            Started::Kernel(_) => Content::Unknown,
        };
        machine.identify(Identity { content, cpuid, tsc_khz: machine.host.tsc_khz });
        Ok(machine)
    }

    /// Puts a built-in guest into RAM.
    fn put_payload(&self, payload: &Payload, fill: &Fill, seed: u64) -> Result<Known, KvmError> {
        let program = Program::new(payload.clone(), self.count, self.memory.low_bytes(), self.sectors())?;
        for (number, block) in self.memory.ram.blocks().iter().enumerate() {
            let address = self.memory.address(number);
            let pages = block.size_bytes() / 4096;
            let first = if address == 0 { x86::LOW_BYTES / 4096 } else { 0 };
            fill_pages(block, address / 4096, fill, seed, first..pages)?;
        }
        self.block()?.write(0, &program.low_memory(self.memory.end(), self.count))?;
        Ok(Known { program, fill: fill.clone(), seed })
    }

    /// A machine with untouched RAM, for a state to be loaded into.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn empty(config: &KvmConfig) -> Result<Arc<Self>, KvmError> {
        let KvmConfig { memory_bytes, vcpus, backing, dirty_tracking, ref devices } = *config;
        config.check()?;
        let kvm_fd = open()?;
        let mut host = Host::ask(&kvm_fd)?;
        let memory = Memory::new(memory_bytes, backing)?;
        let writes: OwnWrites = memory.ram.blocks().iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect();
        let devices = Devices::new(devices, memory.guest(), writes)?;
        let (vm, fds, rings) = build(&kvm_fd, &memory, vcpus, dirty_tracking)?;
        devices.connect(vm.clone());
        if let Some(fd) = fds.first() {
            host.probe(fd)?;
        }
        let threads = Vcpus::start(vcpus, devices.bus())
            .map_err(|source| KvmError::System { doing: "start a vCPU's thread", source })?;
        for (vcpu, fd) in threads.all().iter().zip(fds) {
            vcpu.replace(Some(fd), &rings);
        }
        Ok(Arc::new(Self {
            vcpus: threads,
            devices,
            hypervisor: Mutex::new(Hypervisor { vm, rings, used: false }),
            kvm: kvm_fd,
            host,
            memory,
            memory_bytes,
            count: vcpus,
            dirty_tracking,
            identity: RwLock::default(),
            clock_difference: Mutex::default(),
            control: Mutex::default(),
        }))
    }

    fn block(&self) -> Result<&RamBlock, KvmError> {
        self.memory.ram.blocks().first().ok_or(KvmError::Empty)
    }

    fn identity(&self) -> Result<Identity, KvmError> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(KvmError::Empty)
    }

    /// From here on the machine is that, and its vCPUs keep its pace.
    fn identify(&self, identity: Identity) {
        let memory_job = match &identity.content {
            Content::Known(known) => known.program.payload.memory.clone(),
            Content::Unknown => None,
        };
        for (number, vcpu) in self.vcpus.all().iter().enumerate() {
            vcpu.set_pace(memory_job.as_ref().and_then(|job| job.pace(number, u64::from(self.count))));
        }
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Some(identity);
    }

    /// Sectors of the first disk.
    fn sectors(&self) -> Option<u64> {
        self.devices.disk_bytes().map(|bytes| bytes / x86::SECTOR_BYTES as u64)
    }

    fn noted<T>(&self, part: impl Fn(Progress) -> T) -> Result<Vec<T>, KvmError> {
        let block = self.block()?;
        (0..self.count as usize).map(|vcpu| Ok(part(x86::noted(block, vcpu)?))).collect()
    }

    /// Steps of its memory job that each vCPU has counted in memory.
    ///
    /// # Errors
    /// When memory cannot be read.
    pub fn counted(&self) -> Result<Vec<u64>, KvmError> {
        self.noted(|progress| progress.steps)
    }

    /// Ticks of its own timer that each vCPU has counted in memory.
    ///
    /// # Errors
    /// When memory cannot be read.
    pub fn ticks(&self) -> Result<Vec<u64>, KvmError> {
        self.noted(|progress| progress.ticks)
    }

    /// Units of disk and serial work that the guest has counted in memory.
    ///
    /// # Errors
    /// When memory cannot be read.
    pub fn units(&self) -> Result<u64, KvmError> {
        Ok(self.noted(|progress| progress.units)?.into_iter().sum())
    }

    /// How the guest has ended, if it has. It does nothing from then on.
    pub fn ended(&self) -> Option<Ended> {
        let ended = self.devices.bus().ended();
        if ended.is_some() {
            // One vCPU has ended it; the others do not know yet.
            self.vcpus.interrupt();
        }
        ended
    }

    /// Whether the wall clocks of the two hosts disagreed by more than the guest can have stood still when it came here. Its
    /// clock was advanced by that then, and not by their difference.
    pub fn clock_difference(&self) -> Option<ClockDifference> {
        *lock(&self.clock_difference)
    }

    /// How often a vCPU had to wait for room in its dirty ring since the VM was made, if it has rings.
    pub fn times_ring_full(&self) -> Option<u64> {
        lock(&self.hypervisor).rings.as_ref().map(|rings| rings.times_full())
    }

    /// Compares all of RAM with what it must hold after the steps that the vCPUs' registers say. A running machine is
    /// stopped meanwhile and goes on afterwards.
    ///
    /// # Errors
    /// When the machine is empty, or RAM or registers cannot be read. What is wrong with the guest is in the report.
    pub fn verify(&self) -> Result<KvmReport, KvmError> {
        let Content::Known(known) = self.identity()?.content else { return Err(KvmError::NotVerifiable) };
        let _control = self.control()?;
        let was_running = self.halt()?;
        let report = self.found(&known).and_then(|found| {
            let image = self.devices.image()?;
            verify::verify(&self.memory, &known, found, image.as_ref())
        });
        if was_running {
            self.go_on()?;
        }
        report
    }

    /// The turn to start, stop or verify. Waits for whoever has it.
    ///
    /// # Errors
    /// When that takes longer than it may.
    fn control(&self) -> Result<MutexGuard<'_, ()>, KvmError> {
        let deadline = Instant::now() + CONTROL_LIMIT;
        loop {
            match self.control.try_lock() {
                Ok(turn) => return Ok(turn),
                Err(TryLockError::Poisoned(turn)) => return Ok(turn.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(TryLockError::WouldBlock) => return Err(KvmError::InUse { seconds: CONTROL_LIMIT.as_secs() }),
            }
        }
    }

    /// The devices that do not answer within `limit`, because their storage hangs: they may keep this process from ending.
    /// For the end of the process: the devices do nothing from here on.
    pub fn hanging_devices(&self, limit: Duration) -> Vec<String> {
        self.devices.hanging(limit)
    }

    /// Stops vCPUs and devices; tells whether they ran. Where that fails they go on.
    fn halt(&self) -> Result<bool, KvmError> {
        // First of all no new requests: a vCPU may have to wait for a device's worker.
        self.devices.hold();
        let was_running = match self.vcpus.pause() {
            Ok(was_running) => was_running,
            Err(error) => {
                // They run on; only those that ran can fail to stop.
                if let Some(permit) = self.vcpus.permit() {
                    self.devices.keep_on(&permit);
                }
                return Err(error);
            }
        };
        if let Err(error) = self.devices.pause() {
            if let Some(permit) = self.vcpus.permit().filter(|_| was_running) {
                self.devices.keep_on(&permit);
                self.vcpus.resume(&permit);
            }
            return Err(error);
        }
        Ok(was_running)
    }

    /// Starts devices and vCPUs under the permit that they ran under.
    fn go_on(&self) -> Result<(), KvmError> {
        match self.vcpus.permit() {
            Some(permit) => self.start(&permit),
            None => Ok(()),
        }
    }

    fn start(&self, permit: &StartPermit) -> Result<(), KvmError> {
        self.devices.resume(permit)?;
        self.vcpus.resume(permit);
        Ok(())
    }

    /// What each vCPU's registers say: what it has done, or what is wrong.
    fn found(&self, known: &Known) -> Result<Vec<Result<Progress, String>>, KvmError> {
        let mut found = Vec::new();
        for (number, vcpu) in self.vcpus.all().iter().enumerate() {
            found.push(match (vcpu.stopped(), &*vcpu.fd()) {
                (Some(why), _) => Err(format!("vCPU {number} has stopped: {why}")),
                (None, Some(fd)) => x86::progress(fd, number, &known.program)?,
                (None, None) => Err(format!("vCPU {number} was never made")),
            });
        }
        Ok(found)
    }

    /// Every vCPU can run on.
    fn check_vcpus(&self) -> Result<(), KvmError> {
        let all = self.vcpus.all().iter().enumerate();
        let mut stopped = all.filter_map(|(vcpu, each)| Some(KvmError::Stopped { vcpu, why: each.stopped()? }));
        stopped.next().map_or(Ok(()), Err)
    }

    fn knows(&self, section: &StateSection) -> bool {
        match section.name.as_str() {
            "config" | "pit" | "clock" => section.instance == 0,
            "irqchip" => section.instance < x86::CHIPS.len() as u32,
            "vcpu" => section.instance < self.count,
            _ => self.devices.knows(section),
        }
    }

    /// This host has the features that a guest was given.
    fn check_features(&self, given: &[Leaf]) -> Result<(), KvmError> {
        let here = &self.host.cpuid;
        if !cpu::same_vendor(given, here) {
            return Err(KvmError::CpuVendor { theirs: cpu::vendor(given), ours: cpu::vendor(here) });
        }
        features::missing(given, here).map_or(Ok(()), |missing| Err(KvmError::Features { missing }))
    }

    /// Has a virtual machine that nothing ran in and nothing was loaded into: what ran before leaves timers and interrupts
    /// behind, and its CPU's features could not be changed any more.
    fn renew(&self, hypervisor: &mut Hypervisor) -> Result<(), KvmError> {
        if hypervisor.used {
            self.vcpus.pause()?;
            self.vcpus.all().iter().for_each(|vcpu| vcpu.replace(None, &None));
            let (vm, fds, rings) = build(&self.kvm, &self.memory, self.count, self.dirty_tracking)?;
            self.devices.connect(vm.clone());
            for (vcpu, fd) in self.vcpus.all().iter().zip(fds) {
                vcpu.replace(Some(fd), &rings);
            }
            *hypervisor = Hypervisor { vm, rings, used: false };
        }
        Ok(())
    }

    fn take_over(&self, sections: &[StateSection], age: Option<StateAge>) -> Result<(), KvmError> {
        check_known(sections, |section| self.knows(section))?;
        let config: Config = find(sections, "config", 0)?;
        same("bytes of memory", config.memory_bytes, self.memory_bytes)?;
        same("vCPUs", u64::from(config.vcpus), u64::from(self.count))?;
        let vcpus: Vec<VcpuState> =
            (0..self.count).map(|vcpu| find(sections, "vcpu", vcpu)).collect::<Result<_, StateError>>()?;
        vcpus.iter().try_for_each(|vcpu| self.check_features(&vcpu.cpuid))?;
        let state = VmState {
            chips: (0..x86::CHIPS.len() as u32)
                .map(|chip| find(sections, "irqchip", chip))
                .collect::<Result<_, _>>()?,
            pit: find(sections, "pit", 0)?,
            clock: find(sections, "clock", 0)?,
        };
        let content = match config.guest {
            GuestConfig::Payload { payload, fill, seed } => {
                let program = Program::new(payload, self.count, self.memory.low_bytes(), self.sectors())?;
                Content::Known(Known { program, fill, seed })
            }
            GuestConfig::Kernel => Content::Unknown,
        };
        let mut hypervisor = lock(&self.hypervisor);
        self.renew(&mut hypervisor)?;
        hypervisor.used = true;
        let fds: Vec<_> = self.vcpus.all().iter().map(|vcpu| vcpu.fd()).collect();
        let loading = fds.iter().filter_map(|fd| fd.as_ref()).zip(&vcpus);
        let difference = x86::load_time(&hypervisor.vm, &state.clock, age, loading.clone())?;
        *lock(&self.clock_difference) = difference;
        for (fd, state) in loading {
            x86::load_vcpu(fd, &self.host, state)?;
        }
        drop(fds);
        x86::load_vm(&hypervisor.vm, &state)?;
        self.devices.load(sections)?;
        let tsc_khz = vcpus.first().and_then(|vcpu| vcpu.tsc_khz);
        let cpuid = vcpus.into_iter().map(|vcpu| vcpu.cpuid).collect();
        self.identify(Identity { content, cpuid, tsc_khz });
        Ok(())
    }
}

/// A guest in RAM, and how its vCPUs start.
enum Started {
    Program(Known),
    Kernel(x86::Entry),
}

fn open() -> Result<Kvm, KvmError> {
    /// The only version that there has been since Linux 2.6.22.
    const API_VERSION: i32 = 12;
    let kvm_fd = Kvm::new().map_err(|error| KvmError::NoKvm { source: error.into() })?;
    match kvm_fd.get_api_version() {
        API_VERSION => Ok(kvm_fd),
        _ => Err(KvmError::NoKvm { source: std::io::Error::other("it is something else") }),
    }
}

fn create_vm(kvm_fd: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm_fd.create_vm() {
            // A signal may come in between.
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(kvm("create a VM")),
        }
    }
}

/// A VM over this memory with so many vCPUs, as they come out of reset.
fn build(
    kvm_fd: &Kvm,
    memory: &Memory,
    vcpus: u32,
    dirty_tracking: DirtyTracking,
) -> Result<(Arc<VmFd>, Vec<VcpuFd>, Rings), KvmError> {
    let vm = Arc::new(create_vm(kvm_fd)?);
    let ring_size = tracking::prepare(&vm, dirty_tracking)?;
    memory.attach(&vm)?;
    x86::create_chips(&vm)?;
    let fds = (0..u64::from(vcpus)).map(|number| vm.create_vcpu(number).map_err(kvm("create a vCPU")));
    let fds = fds.collect::<Result<Vec<_>, _>>()?;
    let rings = tracking::rings(&vm, &fds, ring_size, memory)?;
    Ok((vm, fds, rings))
}

impl Machine for KvmMachine {
    fn ram(&self) -> &Ram {
        &self.memory.ram
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        let hypervisor = lock(&self.hypervisor);
        let writes = self.devices.writes().clone();
        Ok(tracking::tracker(&hypervisor.vm, &hypervisor.rings, &self.memory, writes, self.dirty_tracking)?)
    }

    fn profile(&self) -> Vec<u8> {
        // An empty machine has none of its own.
        let (cpuid, tsc_khz) = self.identity().map_or((Vec::new(), None), |identity| {
            (identity.cpuid.into_iter().next().unwrap_or_default(), identity.tsc_khz)
        });
        // Encoding into a growing vector does not fail.
        let devices = self.devices.describe();
        let profile = Profile { vcpus: self.count, cpuid, tsc_khz, devices };
        encode_profile(KIND, &profile).unwrap_or_default()
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        let theirs: Profile = decode_profile(profile, KIND).map_err(KvmError::from)?;
        same("vCPUs", u64::from(theirs.vcpus), u64::from(self.count))?;
        self.devices.accept(&theirs.devices)?;
        self.check_features(&theirs.cpuid)?;
        self.host.keeps_pace(theirs.tsc_khz)?;
        let _control = self.control()?;
        let mut hypervisor = lock(&self.hypervisor);
        if hypervisor.used {
            // Now, and not while the guest stands still. Whose machine it was is over.
            *self.identity.write().unwrap_or_else(PoisonError::into_inner) = None;
            self.renew(&mut hypervisor)?;
        }
        Ok(())
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        let ms = Duration::from_millis;
        let vcpus = self.count;
        SwitchoverCost {
            pause: ms(2),
            save: ms(1).saturating_add(ms(1).saturating_mul(vcpus)),
            load: ms(1).saturating_add(ms(1).saturating_mul(vcpus)),
            resume: ms(1),
            state_bytes: (64 << 10) + (32 << 10) * u64::from(vcpus),
        }
    }

    fn pause(&self) -> Result<(), MachineError> {
        let _control = self.control()?;
        self.halt()?;
        Ok(())
    }

    fn ended(&self) -> Option<GuestEnd> {
        self.devices.bus().ended().map(GuestEnd::from)
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        let _control = self.control()?;
        self.identity()?;
        self.check_vcpus()?;
        lock(&self.hypervisor).used = true;
        Ok(self.start(permit)?)
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        let Identity { content, cpuid, .. } = self.identity()?;
        self.check_vcpus()?;
        let (memory_bytes, vcpus) = (self.memory_bytes, self.count);
        let guest = match content {
            Content::Known(Known { program, fill, seed }) => {
                GuestConfig::Payload { payload: program.payload, fill, seed }
            }
            Content::Unknown => GuestConfig::Kernel,
        };
        let config = Config { memory_bytes, vcpus, guest };
        let mut sections = vec![section("config", 0, &config)?];
        for ((number, vcpu), given) in self.vcpus.all().iter().enumerate().zip(&cpuid) {
            let state = x86::save_vcpu(vcpu.fd().as_ref().ok_or(KvmError::Empty)?, &self.host, given)?;
            sections.push(section("vcpu", number as u32, &state)?);
        }
        let VmState { chips, pit, clock } = x86::save_vm(&lock(&self.hypervisor).vm)?;
        for (number, chip) in chips.iter().enumerate() {
            sections.push(section("irqchip", number as u32, chip)?);
        }
        sections.push(section("pit", 0, &pit)?);
        sections.push(section("clock", 0, &clock)?);
        sections.extend(self.devices.save()?);
        Ok(sections)
    }

    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        Ok(self.replace(&sections, None)?)
    }

    fn load_aged(&self, sections: Vec<StateSection>, age: StateAge) -> Result<(), MachineError> {
        Ok(self.replace(&sections, Some(age))?)
    }

    fn claim(&self, claim: Claim) -> Result<(), MachineError> {
        Ok(self.devices.claim(claim)?)
    }

    fn vcpus(&self) -> Option<&dyn dunlin::Vcpus> {
        Some(self)
    }
}

impl KvmMachine {
    /// Takes over a state, of this age if that is known.
    fn replace(&self, sections: &[StateSection], age: Option<StateAge>) -> Result<(), KvmError> {
        let _control = self.control()?;
        self.vcpus.pause()?;
        self.devices.pause()?;
        // Until all of it is there the machine is nobody's: what fails half-way must not run.
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.take_over(sections, age)
    }
}

impl dunlin::Vcpus for KvmMachine {
    fn count(&self) -> usize {
        self.vcpus.all().len()
    }

    fn set_throttle(&self, percent: &[u8]) {
        self.vcpus.set_throttle(percent);
    }

    /// Pages that came out of each vCPU's dirty ring.
    fn dirtied(&self) -> Option<Vec<u64>> {
        lock(&self.hypervisor).rings.as_ref().map(|rings| rings.pages_read())
    }
}
