//! Embeds the engine: a "machine" whose RAM is a buffer that a thread keeps writing moves from one side to the other.
//!
//! A VMM does the same with its vCPUs in the place of the thread. Both sides are in one process here, to keep it
//! short; in life they are on two hosts. Run it with `cargo run --release --example embed`.

#![allow(clippy::print_stdout)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use dunlin::memory::{DirtyTracker, Ram, RamBlock, WriteProtectTracker};
use dunlin::{
    Destination, Guest, Machine, MachineError, Need, Parameters, Source, StartPermit, StateSection, Status,
    SwitchoverCost, Uri,
};
use vm_memory::MmapRegion;

const MEMORY_BYTES: usize = 256 << 20;
const WORKING_SET_BYTES: u64 = 32 << 20;

/// One "vCPU" that counts, and writes each number to a place in RAM that follows from it.
struct Buffer {
    ram: Ram,
    count: Arc<Mutex<u64>>,
    stop: Arc<AtomicBool>,
    vcpu: Mutex<Option<JoinHandle<()>>>,
}

fn place_of(number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % WORKING_SET_BYTES / 8 * 8
}

impl Buffer {
    fn new() -> Result<Arc<Self>, MachineError> {
        let region: MmapRegion = MmapRegion::new(MEMORY_BYTES)?;
        let ram = Ram::new(vec![RamBlock::new("ram", Arc::new(region))?])?;
        Ok(Arc::new(Self { ram, count: Arc::default(), stop: Arc::default(), vcpu: Mutex::default() }))
    }

    fn count(&self) -> u64 {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What RAM must hold follows from the count alone: compares.
    fn verify(&self) -> Result<bool, MachineError> {
        let mut expected = vec![0u64; (WORKING_SET_BYTES / 8) as usize];
        for number in 1..=self.count() {
            if let Some(cell) = expected.get_mut((place_of(number) / 8) as usize) {
                *cell = number;
            }
        }
        let mut found = vec![0; WORKING_SET_BYTES as usize];
        self.ram.blocks().first().ok_or("no RAM")?.read(0, &mut found)?;
        Ok(expected.iter().flat_map(|number| number.to_le_bytes()).eq(found))
    }
}

impl Machine for Buffer {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        Ok(Box::new(WriteProtectTracker::new(&self.ram)?))
    }

    fn profile(&self) -> Vec<u8> {
        b"buffer machine, version 1".to_vec()
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        if profile == self.profile() { Ok(()) } else { Err("the source is not a buffer machine".into()) }
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        let step = std::time::Duration::from_millis(2);
        SwitchoverCost { pause: step, save: step, load: step, resume: step, state_bytes: 8 }
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.stop.store(true, Ordering::Release);
        if let Some(vcpu) = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner).take() {
            vcpu.join().map_err(|_| "the vCPU panicked")?;
        }
        Ok(())
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        self.stop.store(false, Ordering::Release);
        let block = self.ram.blocks().first().ok_or("no RAM")?.clone();
        let (count, stop, permit) = (self.count.clone(), self.stop.clone(), permit.clone());
        let run = move || {
            let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
            while !stop.load(Ordering::Acquire) && permit.enter() {
                for _ in 0..1000 {
                    *count += 1;
                    if block.write(place_of(*count), &count.to_le_bytes()).is_err() {
                        return;
                    }
                }
                std::thread::sleep(std::time::Duration::from_micros(500));
            }
        };
        let vcpu = std::thread::Builder::new().name("vcpu 0".into()).spawn(run)?;
        *self.vcpu.lock().unwrap_or_else(PoisonError::into_inner) = Some(vcpu);
        Ok(())
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        let data = self.count().to_le_bytes().to_vec();
        Ok(vec![StateSection { name: "vcpu".into(), instance: 0, version: 1, need: Need::Required, data }])
    }

    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        match sections.as_slice() {
            [StateSection { name, version: 1, data, .. }] if name == "vcpu" => {
                let count = data.as_slice().try_into().map_err(|_| "the vCPU's state is not 8 bytes")?;
                *self.count.lock().unwrap_or_else(PoisonError::into_inner) = u64::from_le_bytes(count);
                Ok(())
            }
            _ => Err("the device state is not a buffer machine's".into()),
        }
    }
}

fn main() -> Result<(), MachineError> {
    let (here, there) = (Buffer::new()?, Buffer::new()?);
    let (leaving, arriving) = (Guest::new(here.clone()), Guest::awaited(there.clone()));
    leaving.cont()?;
    std::thread::sleep(std::time::Duration::from_millis(200));

    let parameters = Parameters::default();
    let any_port: Uri = "tcp:127.0.0.1:0".parse()?;
    let destination = Destination::listen(&arriving, &any_port, &parameters)?;
    let source = Source::start(&leaving, destination.local_uri(), &parameters)?;
    let report = source.wait();
    if report.status != Status::Completed {
        return Err(report.error.map_or("it failed".into(), |error| error.message.into()));
    }
    destination.wait();
    std::thread::sleep(std::time::Duration::from_millis(200));
    arriving.stop()?;
    println!(
        "moved in {:.2} s and {} rounds, guest stopped for {:.1} ms; it counted to {} there, on from {}; RAM is {}",
        report.total_seconds,
        report.rounds.len(),
        report.downtime_seconds * 1e3,
        there.count(),
        here.count(),
        if there.verify()? { "right" } else { "WRONG" },
    );
    Ok(())
}
