//! The synthetic machine: RAM in a memfd, vCPUs as threads, a small device.
//!
//! Everything it does follows from a seed and the number of steps done, so [`SyntheticMachine::verify`] can prove
//! after a migration that no write was lost and none came from the future. What must stay true: a vCPU's step count
//! says exactly which writes are complete whenever the machine is paused.

mod backing;
pub(crate) mod content;
mod device;
pub(crate) mod fill;
mod program;
mod state;
mod vcpu;
mod verify;
mod workload;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use dunlin::memory::{DirtyTracker, MemoryError, Ram, RamBlock, WriteProtectTracker};
use dunlin::{Machine, MachineError, StartPermit, StateSection, SwitchoverCost};

pub use crate::sections::StateError;
pub use backing::{Backing, BackingError};
pub use fill::{Fill, FillError};
pub use verify::{Fault, FaultKind, VerifyReport};
pub use workload::{Content, Pattern, Workload, WorkloadError};

use crate::gate::Gate;
use device::Device;
use program::Program;
use vcpu::Vcpus;

/// Bytes in a page of the workload.
pub(crate) const PAGE_BYTES: usize = 4096;
/// The least memory a machine may have.
const MIN_MEMORY_BYTES: u64 = 1 << 20;
/// The most vCPUs.
const MAX_VCPUS: u32 = 64;
/// The longest pause, save, load or resume: a vCPU is in the middle of a step.
const STEP: Duration = Duration::from_micros(500);
/// The most device state: the device's log and the vCPUs' steps.
const STATE_BYTES: u64 = 68 << 10;

/// What a synthetic machine is made of.
#[derive(Debug, Clone)]
pub struct SyntheticConfig {
    /// RAM in bytes; a multiple of 4096, at least 1 MiB.
    pub memory_bytes: u64,
    /// vCPUs, 1 to 64.
    pub vcpus: u32,
    /// What the vCPUs do.
    pub workload: Workload,
    /// What RAM holds at the start.
    pub fill: Fill,
    /// The host's pages that RAM is made of.
    pub backing: Backing,
    /// Everything random follows from it.
    pub seed: u64,
}

/// What can go wrong with a synthetic machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyntheticError {
    /// The memory's size.
    #[error("{bytes} bytes of memory: it must be a multiple of 4096 and at least 1 MiB")]
    MemorySize {
        /// What was asked for.
        bytes: u64,
    },
    /// The memory's size with huge pages.
    #[error("{bytes} bytes of memory: it must be a multiple of its pages of {backing}iB")]
    Backing {
        /// What was asked for.
        bytes: u64,
        /// Of what.
        backing: Backing,
    },
    /// The host has too few huge pages.
    #[error("could not map {pages} huge pages of {backing}iB: {source}; has the host as many free (vm.nr_hugepages)?")]
    HugePages {
        /// Of what.
        backing: Backing,
        /// How many are needed.
        pages: u64,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The number of vCPUs.
    #[error("{vcpus} vCPUs: it must be 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        vcpus: u32,
    },
    /// The system refused memory or a thread.
    #[error("could not {doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// RAM could not be used.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// There is nothing to verify or run yet.
    #[error("the machine is empty: no state has been loaded into it")]
    Empty,
    /// The state of another machine does not fit.
    #[error("device state: {0}")]
    State(#[from] StateError),
}

/// What the machine is and does, once it is known.
#[derive(Debug, Clone)]
struct Identity {
    program: Program,
    fill: Fill,
}

/// A machine without a hypervisor.
#[derive(Debug)]
pub struct SyntheticMachine {
    ram: Ram,
    memory_bytes: u64,
    gate: Arc<Gate>,
    device: Arc<Device>,
    /// `None` until a state is loaded into an empty machine.
    identity: Arc<RwLock<Option<Identity>>>,
    vcpus: Vcpus,
    /// Held while somebody starts, stops or verifies.
    control: Mutex<()>,
}

fn system(doing: &'static str) -> impl Fn(std::io::Error) -> SyntheticError {
    move |source| SyntheticError::System { doing, source }
}

impl SyntheticMachine {
    /// A machine with its RAM filled, paused.
    ///
    /// # Errors
    /// When the configuration is out of range or the system refuses memory or threads.
    pub fn new(config: &SyntheticConfig) -> Result<Arc<Self>, SyntheticError> {
        let machine = Self::empty(config.memory_bytes, config.vcpus, config.backing)?;
        let program = Program::new(config.workload.clone(), config.seed, config.vcpus, config.memory_bytes);
        let block = machine.block()?;
        fill::fill(block, &config.fill, config.seed)?;
        machine.identify(Identity { program, fill: config.fill.clone() });
        Ok(machine)
    }

    /// A machine with untouched RAM, for a state to be loaded into.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn empty(memory_bytes: u64, vcpus: u32, backing: Backing) -> Result<Arc<Self>, SyntheticError> {
        if memory_bytes < MIN_MEMORY_BYTES || !memory_bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(SyntheticError::MemorySize { bytes: memory_bytes });
        }
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(SyntheticError::Vcpus { vcpus });
        }
        let page_bytes = backing.page_bytes();
        if !memory_bytes.is_multiple_of(page_bytes) {
            return Err(SyntheticError::Backing { bytes: memory_bytes, backing });
        }
        let size = usize::try_from(memory_bytes).map_err(|_| SyntheticError::MemorySize { bytes: memory_bytes })?;
        let region = backing.map(size).map_err(|source| match backing {
            Backing::Base | Backing::Transparent => SyntheticError::System { doing: "map the memory", source },
            _ => SyntheticError::HugePages { backing, pages: memory_bytes / page_bytes, source },
        })?;
        let ram = Ram::new(vec![backing.block("ram", Arc::new(region))?])?;
        let gate = Arc::new(Gate::default());
        let identity: Arc<RwLock<Option<Identity>>> = Arc::default();
        let device = Arc::new(Device::default());
        let block = ram.blocks().first().cloned().ok_or(SyntheticError::Empty)?;
        let vcpus = Vcpus::start(vcpus, &gate, &identity, &block, &device).map_err(system("start a vCPU's thread"))?;
        Ok(Arc::new(Self { ram, memory_bytes, gate, device, identity, vcpus, control: Mutex::default() }))
    }

    fn block(&self) -> Result<&RamBlock, SyntheticError> {
        self.ram.blocks().first().ok_or(SyntheticError::Empty)
    }

    fn identity(&self) -> Option<Identity> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn identify(&self, identity: Identity) {
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Some(identity);
    }

    fn control(&self) -> MutexGuard<'_, ()> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Steps that each vCPU has done.
    pub fn steps(&self) -> Vec<u64> {
        self.vcpus.steps()
    }

    /// Recomputes what every page and the device must hold, and compares. A running machine is stopped meanwhile and
    /// goes on afterwards.
    ///
    /// # Errors
    /// When the machine is empty, or its RAM cannot be read. Wrong contents are not an error but in the report.
    pub fn verify(&self) -> Result<VerifyReport, SyntheticError> {
        let identity = self.identity().ok_or(SyntheticError::Empty)?;
        let _control = self.control();
        let was_running = self.gate.close();
        let report = verify::verify(self.block()?, &identity, &self.vcpus.steps(), &self.device);
        if was_running {
            self.gate.reopen();
        }
        report
    }
}

impl Machine for SyntheticMachine {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        Ok(Box::new(WriteProtectTracker::new(&self.ram)?))
    }

    fn profile(&self) -> Vec<u8> {
        state::profile(self.vcpus.count())
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        Ok(state::accept_profile(profile, self.vcpus.count())?)
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        SwitchoverCost { pause: STEP, save: STEP, load: STEP, resume: STEP, state_bytes: STATE_BYTES }
    }

    fn pause(&self) -> Result<(), MachineError> {
        let _control = self.control();
        self.gate.close();
        Ok(())
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        let _control = self.control();
        if self.identity().is_none() {
            return Err(SyntheticError::Empty.into());
        }
        self.gate.open(permit);
        let gate = self.gate.clone();
        permit.on_revoke(move || gate.shut());
        Ok(())
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        let identity = self.identity().ok_or(SyntheticError::Empty)?;
        Ok(state::save(&identity, self.memory_bytes, &self.vcpus.steps(), &self.device)?)
    }

    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        let _control = self.control();
        self.gate.close();
        let loaded = state::load(&sections, self.memory_bytes, self.vcpus.count())?;
        // From here on nothing can fail: all of it is taken over, or none.
        self.vcpus.set_steps(&loaded.steps);
        self.device.set(loaded.ticks, loaded.log);
        self.identify(loaded.identity);
        Ok(())
    }

    fn vcpus(&self) -> Option<&dyn dunlin::Vcpus> {
        Some(self)
    }
}

impl dunlin::Vcpus for SyntheticMachine {
    fn count(&self) -> usize {
        self.vcpus.count() as usize
    }

    fn set_throttle(&self, percent: &[u8]) {
        self.vcpus.set_throttle(percent);
    }

    /// Each step writes a page.
    fn dirtied(&self) -> Option<Vec<u64>> {
        Some(self.vcpus.steps())
    }
}
