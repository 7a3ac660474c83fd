//! Device state that earlier versions have written: `states/` has guests of theirs, which must go on. Skipped where there is no
//! KVM, or one whose host is too different for the guest.
//!
//! A guest of this version is added by `DUNLIN_WRITE_STATES=1 cargo test -p dunlin-machines --test kvm_states`, whenever a
//! section gets a new version. What is there stays as it is.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::path::{Path, PathBuf};

use common::kvm::{Side, World, kvm};
use dunlin::{Guest, Machine, Need, StartPermit, StateSection};
use dunlin_machines::{Backing, KvmError};
use serde::{Deserialize, Serialize};

/// A guest at rest.
#[derive(Serialize, Deserialize)]
struct Saved {
    vcpus: u32,
    payload: String,
    memory_bytes: u64,
    /// Name, instance, version, whether it is required, data.
    sections: Vec<(String, u32, u32, bool, Vec<u8>)>,
    /// Pages that are not all zeros, by their numbers.
    pages: Vec<(u64, Vec<u8>)>,
    disk: Vec<u8>,
    printed: String,
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/states")
}

fn world(vcpus: u32, payload: &str) -> World {
    let mut world = World::new(vcpus, payload);
    (world.memory_bytes, world.fill) = (2 << 20, "zero:100");
    world
}

impl Saved {
    fn of(vcpus: u32, payload: &str) -> Self {
        let world = world(vcpus, payload);
        let side = world.source(Backing::Base);
        world.assert_goes_on(&side);
        side.guest.stop().unwrap();
        let sections = side.machine.save().unwrap().into_iter();
        let sections = sections.map(|s| (s.name, s.instance, s.version, s.need == Need::Required, s.data)).collect();
        let block = &side.machine.ram().blocks()[0];
        let mut pages = Vec::new();
        for page in 0..world.memory_bytes / 4096 {
            let mut data = vec![0; 4096];
            block.read(page * 4096, &mut data).unwrap();
            if data.iter().any(|byte| *byte != 0) {
                pages.push((page, data));
            }
        }
        Self {
            vcpus,
            payload: payload.to_owned(),
            memory_bytes: world.memory_bytes,
            sections,
            pages,
            disk: std::fs::read(world.path("disk")).unwrap(),
            printed: std::fs::read_to_string(world.path("serial")).unwrap(),
        }
    }

    fn sections(&self) -> Vec<StateSection> {
        let section = |(name, instance, version, required, data): &(String, u32, u32, bool, Vec<u8>)| StateSection {
            name: name.clone(),
            instance: *instance,
            version: *version,
            need: if *required { Need::Required } else { Need::Optional },
            data: data.clone(),
        };
        self.sections.iter().map(section).collect()
    }

    /// A machine with its memory, disk and what it has printed, into which its sections are still to be loaded.
    fn prepare(&self) -> (World, Side) {
        let world = world(self.vcpus, &self.payload);
        assert_eq!(world.memory_bytes, self.memory_bytes);
        std::fs::write(world.path("disk"), &self.disk).unwrap();
        std::fs::write(world.path("serial"), &self.printed).unwrap();
        let mut side = world.empty(Backing::Base);
        side.guest = Guest::new(side.machine.clone());
        for (page, data) in &self.pages {
            side.machine.ram().blocks()[0].write(page * 4096, data).unwrap();
        }
        (world, side)
    }
}

/// Whether a guest cannot be taken over because of the host's processor and not of its state.
fn is_the_hosts(error: &KvmError) -> bool {
    let frequency = |doing: &str| doing.contains("frequency of a vCPU's time stamp counter");
    matches!(error, KvmError::Features { .. } | KvmError::CpuVendor { .. })
        || matches!(error, KvmError::Kvm { doing, .. } if frequency(doing))
}

#[test]
fn guests_of_earlier_versions_go_on() {
    if !kvm() {
        return;
    }
    if std::env::var("DUNLIN_WRITE_STATES").is_ok() {
        std::fs::create_dir_all(directory()).unwrap();
        for (vcpus, payload) in [(1, "counter"), (2, "dirty:working-set=64K+io+timer")] {
            let saved = postcard::to_stdvec(&Saved::of(vcpus, payload)).unwrap();
            let version = env!("CARGO_PKG_VERSION");
            let job = payload.split([':', '+']).next().unwrap();
            let path = directory().join(format!("{version}-{job}.zst"));
            std::fs::write(path, zstd::encode_all(&saved[..], 19).unwrap()).unwrap();
        }
    }
    let mut files: Vec<_> = std::fs::read_dir(directory()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = zstd::decode_all(&std::fs::read(&file).unwrap()[..]).unwrap();
        let saved: Saved = postcard::from_bytes(&bytes).unwrap();
        let (world, side) = saved.prepare();
        if let Err(error) = side.machine.load(saved.sections()) {
            let error = error.downcast::<KvmError>().unwrap();
            assert!(is_the_hosts(&error), "{name}: {error}");
            println!("skipped: {name}: {error}");
            continue;
        }
        side.guest.cont().unwrap();
        world.assert_goes_on(&side);
        println!("{name}: {}", world.check(&side, &name));
    }
}

#[test]
fn unknown_sections_are_skipped_or_named() {
    if !kvm() {
        return;
    }
    let saved = Saved::of(1, "counter");
    let mut sections = saved.sections();
    let unknown =
        |need| StateSection { name: "balloon".to_owned(), instance: 3, version: 9, need, data: vec![1, 2, 3] };
    let (_world, side) = saved.prepare();
    sections.push(unknown(Need::Required));
    let error = side.machine.load(sections.clone()).unwrap_err().to_string();
    assert!(error.contains("\"balloon\" (3) is unknown here"), "{error}");
    assert!(side.machine.resume(&StartPermit::unlimited()).is_err(), "nothing of it was taken over");
    *sections.last_mut().unwrap() = unknown(Need::Optional);
    side.machine.load(sections.clone()).unwrap();
    sections[0].version = 9;
    let error = side.machine.load(sections).unwrap_err().to_string();
    assert!(error.contains("\"config\" has version 9, this machine knows 1"), "{error}");
}
