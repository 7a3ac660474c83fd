//! Refusals of guests that do not fit, through a whole migration: before any RAM is sent, with the reason on both sides.
//! Here and not with the other tests because a host's features are this module's own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dunlin::memory::{DirtyTracker, Ram};
use dunlin::{
    Destination, Guest, Machine, MachineError, Parameters, Report, Source, StartPermit, StateSection, Status,
    SwitchoverCost,
};

use super::x86::features::Word;
use super::*;
use crate::{DiskConfig, SyntheticMachine};

const MEMORY: u64 = 8 << 20;

/// A machine whose guest was given other features than it was.
struct Pretends {
    machine: Arc<KvmMachine>,
    change: fn(&mut Profile),
}

impl Machine for Pretends {
    fn ram(&self) -> &Ram {
        self.machine.ram()
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        self.machine.dirty_tracker()
    }

    fn profile(&self) -> Vec<u8> {
        let mut profile: Profile = decode_profile(&self.machine.profile(), KIND).unwrap();
        (self.change)(&mut profile);
        encode_profile(KIND, &profile).unwrap()
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        self.machine.accept_profile(profile)
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        self.machine.switchover_cost()
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.machine.pause()
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        self.machine.resume(permit)
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        self.machine.save()
    }

    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        self.machine.load(sections)
    }
}

fn devices(disk: &Path, bytes: u64) -> DeviceConfig {
    std::fs::File::create(disk).unwrap().set_len(bytes).unwrap();
    let disk: DiskConfig = disk.display().to_string().parse().unwrap();
    DeviceConfig { disks: vec![disk], ..DeviceConfig::default() }
}

fn config(memory_bytes: u64, devices: &DeviceConfig) -> KvmConfig {
    let (backing, dirty_tracking, devices) = (Backing::Base, DirtyTracking::Auto, devices.clone());
    KvmConfig { memory_bytes, vcpus: 1, backing, dirty_tracking, devices }
}

fn machine(devices: &DeviceConfig) -> Arc<KvmMachine> {
    let guest = KvmGuest::Payload { payload: "counter".parse().unwrap(), fill: "random:100".parse().unwrap(), seed: 1 };
    KvmMachine::new(&config(MEMORY, devices), CpuModel::default(), &guest).unwrap()
}

fn empty(memory_bytes: u64, devices: &DeviceConfig) -> Arc<KvmMachine> {
    KvmMachine::empty(&config(memory_bytes, devices)).unwrap()
}

/// Has one refuse the other's guest, for a reason with all these words.
fn refuses(source: Arc<dyn Machine>, destination: Arc<dyn Machine>, words: &[&str]) {
    let (here, there) = (Guest::new(source), Guest::awaited(destination));
    here.cont().unwrap();
    let parameters = Parameters::default();
    let destination = Destination::listen(&there, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters).unwrap();
    let report = Source::start(&here, destination.local_uri(), &parameters).unwrap().wait();
    assert_eq!(report.status, Status::Failed);
    assert!(here.is_running() && !there.is_running());
    assert_eq!((report.ram.pages.plain, report.ram.pages.zero), (0, 0), "RAM was sent");
    let told = |report: &Report| report.error.as_ref().map(|error| error.message.clone()).unwrap_or_default();
    // The destination listens on for another, and says so a little later.
    let deadline = Instant::now() + Duration::from_secs(10);
    while told(&destination.report()).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    for report in [report, destination.report()] {
        let message = told(&report);
        for word in words {
            assert!(message.contains(word), "{word:?} is missing at the {}: {message:?}", report.side);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_on_both_sides_before_ram_is_sent() {
    if let Err(error) = KvmMachine::available() {
        println!("skipped: {error}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let none = DeviceConfig::default();
    fn leaf(profile: &mut Profile, function: u32, change: impl Fn(Leaf) -> Leaf) {
        profile.cpuid.iter_mut().filter(|leaf| leaf.function == function).for_each(|leaf| *leaf = change(*leaf));
    }
    let more = |profile: &mut Profile| leaf(profile, 7, |leaf| leaf.with(Word::Ebx, 1 << 5 | 1 << 16));
    let pretends = |change| Arc::new(Pretends { machine: machine(&none), change });
    if features::missing(&[Leaf::indexed(7, 0, [0, 1 << 5 | 1 << 16, 0, 0])], &empty(MEMORY, &none).host.cpuid)
        .is_some()
    {
        refuses(pretends(more), empty(MEMORY, &none), &["CPU features", "avx512f"]);
    } else {
        println!("skipped: this host has the features that it should lack");
    }
    let other = |profile: &mut Profile| leaf(profile, 0, |_| Leaf::new(0, 0, [0xd, 1, 2, 3]));
    refuses(pretends(other), empty(MEMORY, &none), &["was given a CPU of"]);
    let here = empty(MEMORY, &none);
    if here.host.keeps_pace(Some(1)).is_err() {
        let slow = |profile: &mut Profile| profile.tsc_khz = Some(1_000_000);
        refuses(pretends(slow), here, &["1000000 kHz", "cannot give a guest another"]);
    } else {
        println!("skipped: this host gives guests time stamp counters of any frequency");
    }
    refuses(machine(&none), empty(MEMORY / 2, &none), &["8.00 MiB", "4.00 MiB", "give both machines the same memory"]);
    let (large, small) = (devices(&path("large"), 1 << 20), devices(&path("small"), 1 << 19));
    refuses(machine(&large), empty(MEMORY, &small), &["disk", "1048576", "524288"]);
    refuses(machine(&large), empty(MEMORY, &none), &["disk", "none"]);
    let synthetic = SyntheticMachine::empty(MEMORY, 1, Backing::Base).unwrap();
    refuses(machine(&none), synthetic, &["\"kvm\"", "\"synthetic\""]);
}
