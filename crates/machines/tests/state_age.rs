//! How old a state is when it is loaded, as the engine measures it: that holds what is true, whatever the guest waited for before
//! its state was saved.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{MIB, parameters, until};
use dunlin::memory::{DirtyTracker, Ram};
use dunlin::{
    Destination, Guest, Machine, MachineError, Source, StartPermit, StateAge, StateSection, Status, SwitchoverCost,
};
use dunlin_machines::{Backing, SyntheticConfig, SyntheticMachine};

/// A machine that takes its time, and what it has seen.
struct Dated {
    machine: Arc<SyntheticMachine>,
    slow: Duration,
    /// When it was saved.
    saved: Mutex<Option<(Instant, Instant)>>,
    /// When it was loaded, and how old it was then at least and at most.
    loaded: Mutex<Option<(Instant, Duration, Duration)>>,
}

impl Dated {
    fn new(machine: Arc<SyntheticMachine>, slow: Duration) -> Arc<Self> {
        Arc::new(Self { machine, slow, saved: Mutex::default(), loaded: Mutex::default() })
    }
}

impl Machine for Dated {
    fn ram(&self) -> &Ram {
        self.machine.ram()
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        self.machine.dirty_tracker()
    }

    fn profile(&self) -> Vec<u8> {
        self.machine.profile()
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        self.machine.accept_profile(profile)
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        self.machine.switchover_cost()
    }

    fn pause(&self) -> Result<(), MachineError> {
        std::thread::sleep(self.slow);
        self.machine.pause()
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        self.machine.resume(permit)
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        let began = Instant::now();
        let sections = self.machine.save()?;
        *self.saved.lock().unwrap() = Some((began, Instant::now()));
        std::thread::sleep(self.slow);
        Ok(sections)
    }

    fn load(&self, _: Vec<StateSection>) -> Result<(), MachineError> {
        Err("the age of the state is not told".into())
    }

    fn load_aged(&self, sections: Vec<StateSection>, age: StateAge) -> Result<(), MachineError> {
        *self.loaded.lock().unwrap() = Some((Instant::now(), age.least(), age.most()));
        self.machine.load(sections)
    }
}

#[test]
fn the_age_of_a_state_holds_what_is_true() {
    for (channels, waits, slow) in [("1", false, 0), ("4", false, 100), ("2", true, 0), ("1", true, 100)] {
        let slow = Duration::from_millis(slow);
        let config = SyntheticConfig {
            memory_bytes: 32 * MIB,
            vcpus: 1,
            workload: "rate=20M/s,working-set=4M".parse().unwrap(),
            fill: "zero:30,random:40,text:30".parse().unwrap(),
            backing: Backing::Base,
            seed: 1,
        };
        let from = Dated::new(SyntheticMachine::new(&config).unwrap(), slow);
        let to = Dated::new(SyntheticMachine::empty(32 * MIB, 1, Backing::Base).unwrap(), Duration::ZERO);
        let (here, there) = (Guest::new(from.clone()), Guest::awaited(to.clone()));
        here.cont().unwrap();
        let switch = if waits { "on" } else { "off" };
        let parameters = parameters(&[
            ("multifd-channels", channels),
            ("pause-before-switchover", switch),
            ("max-bandwidth", "100M/s"),
            ("downtime-limit", "2s"),
        ]);
        let destination = Destination::listen(&there, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters).unwrap();
        let source = Source::start(&here, destination.local_uri(), &parameters).unwrap();
        if waits {
            until("the guest waits", || source.report().status == Status::PreSwitchover);
            std::thread::sleep(Duration::from_secs(1));
            source.resume_switchover(Status::PreSwitchover).unwrap();
        }
        let report = source.wait();
        assert_eq!(report.status, Status::Completed, "{:?}", report.error);
        let (began, ended) = from.saved.lock().unwrap().unwrap();
        let (loaded, least, most) = to.loaded.lock().unwrap().unwrap();
        let (shortest, longest) = (loaded - ended, loaded - began);
        println!("{channels} channels, waits: {waits}: {least:?} to {most:?}, in truth {shortest:?} to {longest:?}");
        assert!(least <= shortest && longest <= most, "{least:?} to {most:?}, in truth {shortest:?} to {longest:?}");
        if waits {
            let parts = report.downtime_parts.unwrap();
            let before = Duration::from_secs_f64(parts.pause_seconds + parts.wait_seconds + parts.ram_seconds);
            assert!(most < longest + before, "{most:?}: the {before:?} before it was saved are no part of it");
        }
    }
}
