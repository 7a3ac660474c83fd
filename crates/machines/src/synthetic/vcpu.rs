//! The machine's threads: one a vCPU, and the device's clock.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin::memory::RamBlock;

use crate::gate::{Gate, Passage};
use crate::schedule::{Schedule, Throttle};

use super::content;
use super::device::Device;
use super::workload::Writes;
use super::{Identity, PAGE_BYTES};

/// Between two ticks of the device.
const TICK: Duration = Duration::from_millis(1);

/// All threads of a machine. They end when this is dropped.
#[derive(Debug)]
pub(super) struct Vcpus {
    steps: Vec<Arc<AtomicU64>>,
    throttles: Vec<Arc<Throttle>>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts the threads; they wait at the gate.
    pub(super) fn start(
        count: u32,
        gate: &Arc<Gate>,
        identity: &Arc<RwLock<Option<Identity>>>,
        block: &RamBlock,
        device: &Arc<Device>,
    ) -> io::Result<Self> {
        let mut vcpus = Self { steps: Vec::new(), throttles: Vec::new(), gate: gate.clone(), threads: Vec::new() };
        for index in 0..count as usize {
            let steps = Arc::new(AtomicU64::new(0));
            let throttle = Arc::new(Throttle::default());
            let (identity, block) = (identity.clone(), block.clone());
            let vcpu = Vcpu { index, steps: steps.clone(), throttle: throttle.clone(), identity, block };
            vcpus.spawn(format!("vcpu {index}"), move |gate| vcpu.run(gate))?;
            vcpus.steps.push(steps);
            vcpus.throttles.push(throttle);
        }
        let device = device.clone();
        vcpus.spawn("device".into(), move |gate| {
            let mut next = Instant::now() + TICK;
            while gate.is_open() {
                gate.sleep(next);
                if gate.is_open() {
                    device.tick();
                }
                next = (next + TICK).max(Instant::now());
            }
        })?;
        Ok(vcpus)
    }

    fn spawn(&mut self, name: String, run: impl Fn(&Gate) + Send + 'static) -> io::Result<()> {
        let gate = self.gate.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            while gate.enter() == Passage::Run {
                if gate.permit().is_some_and(|permit| permit.enter()) {
                    run(&gate);
                } else {
                    gate.sleep(Instant::now() + Duration::from_secs(3600));
                }
                gate.leave();
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    pub(super) fn count(&self) -> u32 {
        self.steps.len() as u32
    }

    pub(super) fn steps(&self) -> Vec<u64> {
        self.steps.iter().map(|steps| steps.load(Ordering::Acquire)).collect()
    }

    pub(super) fn set_steps(&self, values: &[u64]) {
        for (steps, value) in self.steps.iter().zip(values) {
            steps.store(*value, Ordering::Release);
        }
    }

    pub(super) fn set_throttle(&self, percent: &[u8]) {
        self.throttles.iter().zip(percent).for_each(|(throttle, percent)| throttle.set(*percent));
        self.gate.nudge();
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Vcpu {
    index: usize,
    /// Steps done; a step counts when its write is complete.
    steps: Arc<AtomicU64>,
    throttle: Arc<Throttle>,
    identity: Arc<RwLock<Option<Identity>>>,
    block: RamBlock,
}

impl Vcpu {
    /// Runs the program until the gate is closed.
    fn run(&self, gate: &Gate) {
        let identity = self.identity.read().unwrap_or_else(PoisonError::into_inner).clone();
        let far = || Instant::now() + Duration::from_secs(3600);
        let Some(Identity { program, .. }) = identity else { return gate.sleep(far()) };
        let slice = program.slice(self.index);
        let pages = slice.end.saturating_sub(slice.start);
        let Some(Writes { content, .. }) = program.workload.writes() else { return gate.sleep(far()) };
        if pages == 0 {
            return gate.sleep(far());
        }
        let seed = program.vcpu_seed(self.index);
        let pace = program.workload.pace(self.index, program.vcpus());
        let mut schedule = Schedule::new(gate, &self.throttle, pace);
        let mut page = [0; PAGE_BYTES];
        let written = content::written_bytes(content);
        while gate.is_open() {
            let step = self.steps.load(Ordering::Relaxed) + 1;
            let number = slice.start + program.page(seed, step, pages);
            content::write(content, seed, number, step, &mut page);
            let bytes = page.get(..written).unwrap_or_default();
            if self.block.write(number * PAGE_BYTES as u64, bytes).is_err() {
                return;
            }
            self.steps.store(step, Ordering::Release);
            schedule.step();
        }
    }
}
