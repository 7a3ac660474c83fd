//! What the tests of machines on KVM share: pairs of machines with a disk and a serial port, and the check from outside.

use std::path::PathBuf;
use std::sync::Arc;

use dunlin::memory::TrackerError;
use dunlin::{Destination, Guest, Report, Source, Status};
use dunlin_machines::{
    Backing, CpuModel, DeviceConfig, DirtyTracking, DiskAccess, DiskConfig, DiskFormat, KvmConfig, KvmError, KvmGuest,
    KvmMachine, KvmReport, SerialTarget,
};

use super::{MIB, parameters, until};

/// Whether there is KVM; says so if not.
pub fn kvm() -> bool {
    match KvmMachine::available() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

/// The ways of tracking writes that there are here.
pub fn trackings() -> Vec<DirtyTracking> {
    let ring = DirtyTracking::Ring { entries: None };
    let devices = DeviceConfig::default();
    let config = KvmConfig { memory_bytes: 2 * MIB, vcpus: 1, backing: Backing::Base, dirty_tracking: ring, devices };
    match KvmMachine::empty(&config) {
        Ok(_) => vec![DirtyTracking::Log, ring],
        Err(KvmError::Tracker(TrackerError::NoDirtyRing)) => {
            println!("skipped with {ring}: KVM has none");
            vec![DirtyTracking::Log]
        }
        Err(error) => panic!("{error}"),
    }
}

/// A machine and its guest.
pub struct Side {
    pub machine: Arc<KvmMachine>,
    pub guest: Arc<Guest>,
}

/// A guest, and what it works on: a disk, and a file that its serial port leads to.
pub struct World {
    pub directory: tempfile::TempDir,
    pub memory_bytes: u64,
    pub vcpus: u32,
    pub payload: String,
    pub tracking: DirtyTracking,
    pub sectors: u64,
    pub format: DiskFormat,
    pub fill: &'static str,
}

impl World {
    pub fn new(vcpus: u32, payload: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let sectors = 200;
        std::fs::write(directory.path().join("disk"), vec![0; sectors as usize * 512]).unwrap();
        Self {
            directory,
            memory_bytes: 16 * MIB,
            vcpus,
            payload: payload.to_owned(),
            tracking: DirtyTracking::Auto,
            sectors,
            format: DiskFormat::Raw,
            fill: "zero:30,random:40,text:30",
        }
    }

    /// Makes the disk's image one in qcow2.
    pub fn make_qcow2(&mut self) {
        use imago::file::File;
        use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
        let path = self.path("disk");
        std::fs::remove_file(&path).unwrap();
        let file = File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
        imago::qcow2::Qcow2::<File>::create_builder(file).size(self.sectors * 512).create().unwrap();
        self.format = DiskFormat::Qcow2;
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn devices(&self) -> DeviceConfig {
        let disk = DiskConfig {
            path: self.path("disk"),
            format: self.format,
            access: DiskAccess::Writable,
            serial: "disk".to_owned(),
        };
        DeviceConfig { serial: SerialTarget::File(self.path("serial")), disks: vec![disk], ..DeviceConfig::default() }
    }

    pub fn config(&self, backing: Backing) -> KvmConfig {
        KvmConfig {
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            backing,
            dirty_tracking: self.tracking,
            devices: self.devices(),
        }
    }

    /// The running guest.
    pub fn source(&self, backing: Backing) -> Side {
        let (payload, fill) = (self.payload.parse().unwrap(), self.fill.parse().unwrap());
        let guest = KvmGuest::Payload { payload, fill, seed: 7 };
        let machine = KvmMachine::new(&self.config(backing), CpuModel::default(), &guest).unwrap();
        let guest = Guest::new(machine.clone());
        guest.cont().unwrap();
        Side { machine, guest }
    }

    /// A machine that waits for it.
    pub fn empty(&self, backing: Backing) -> Side {
        let machine = KvmMachine::empty(&self.config(backing)).unwrap();
        let guest = Guest::awaited(machine.clone());
        Side { machine, guest }
    }

    /// Stops the guest, which is there, checks everything from inside and outside, and lets it run on.
    pub fn check(&self, side: &Side, what: &str) -> KvmReport {
        side.guest.stop().unwrap();
        let report = side.machine.verify().unwrap();
        assert!(report.is_good(), "{what}: {report}");
        self.check_serial(report.units, what);
        if self.format == DiskFormat::Raw {
            self.check_disk(report.units, what);
        }
        side.guest.cont().unwrap();
        report
    }

    /// The numbers of all units are there, each once and in order: none lost, none twice.
    fn check_serial(&self, units: u64, what: &str) {
        let printed = std::fs::read_to_string(self.path("serial")).unwrap();
        let expected: String = (1..=units + 1).map(|unit| format!("{unit:016x}\n")).collect();
        let least = units as usize * 17;
        assert!(
            printed.len() >= least && expected.starts_with(&printed),
            "{what}: {units} units, {} bytes printed, the last of them {:?}",
            printed.len(),
            &printed[printed.len().saturating_sub(40)..]
        );
    }

    /// Every sector has the latest unit that is its number modulo their count, or the next if that is at work.
    fn check_disk(&self, units: u64, what: &str) {
        let disk = std::fs::read(self.path("disk")).unwrap();
        assert_eq!(disk.len() as u64, self.sectors * 512);
        let mut latest = vec![0; self.sectors as usize];
        (1..=units).for_each(|unit| latest[(unit % self.sectors) as usize] = unit);
        for (sector, (found, latest)) in disk.chunks(512).zip(latest).enumerate() {
            let holds = |unit: u64| found == unit.to_le_bytes().repeat(64);
            let underway = (units + 1) % self.sectors == sector as u64 && holds(units + 1);
            assert!(holds(latest) || underway, "{what}: sector {sector} is not of unit {latest}, after {units}");
        }
    }

    /// All that the guest does goes on.
    pub fn assert_goes_on(&self, side: &Side) {
        let noted = || {
            let machine = &side.machine;
            (machine.counted().unwrap(), machine.ticks().unwrap(), machine.units().unwrap())
        };
        let before = noted();
        let grow = |now: &[u64], before: &[u64]| now.iter().zip(before).all(|(now, before)| now > before);
        until("the guest goes on", || {
            let now = noted();
            let payload = &self.payload;
            (!payload.contains("dirty") || grow(&now.0, &before.0))
                && (!payload.contains("timer") || grow(&now.1, &before.1))
                && (!payload.contains("io") || now.2 > before.2 + 1)
        });
    }
}

pub fn move_guest(from: &Side, to: &Side, set: &[(&str, &str)]) -> Report {
    let parameters = parameters(set);
    let destination = Destination::listen(&to.guest, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters).unwrap();
    let source = Source::start(&from.guest, destination.local_uri(), &parameters).unwrap();
    let report = source.wait();
    assert_eq!(report.status, Status::Completed, "source: {:?}, destination: {:?}", report.error, destination.report());
    assert_eq!(destination.wait().status, Status::Completed);
    assert!(!from.guest.is_running() && to.guest.is_running());
    report
}
