//! The devices of a machine on KVM, driven by a guest: they are reachable, and move with it. Skipped where there is no KVM.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{MIB, parameters, until};
use dunlin::{Claim, Destination, Guest, Machine, Source, StartPermit, Status};
use dunlin_machines::{
    Backing, CpuModel, DeviceConfig, DirtyTracking, DiskAccess, DiskConfig, DiskFormat, Ended, KvmConfig, KvmGuest,
    KvmMachine, SerialTarget,
};

const MEMORY: u64 = 32 * MIB;
const SECTORS: u64 = 2048;
/// Requests that the guest makes.
const REQUESTS: u32 = 2000;

/// A guest: it writes `!` to the serial port; writes the words of the table at 0x9000 (offset, value) to the first device's
/// registers; then puts its count into a request's sector and data, gives the request to the device, waits for the answer and
/// writes the count to the serial port, 2000 times; and ends with 0, or with 7 if something was wrong.
const GUEST: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xb0, 0x21, 0xee, 0xbe, 0x00, 0x90, 0x00, 0x00, 0xbb, 0x00, 0x00, 0x00, 0xd0, 0x8b,
    0x06, 0x83, 0xf8, 0xff, 0x74, 0x0c, 0x8b, 0x4e, 0x04, 0x89, 0x0c, 0x03, 0x48, 0x83, 0xc6, 0x08, 0xeb, 0xed, 0x83,
    0x7b, 0x70, 0x0f, 0x75, 0x62, 0x45, 0x31, 0xe4, 0x41, 0xbd, 0x00, 0x00, 0x20, 0x00, 0x41, 0xbe, 0x00, 0x00, 0x10,
    0x00, 0x41, 0xff, 0xc4, 0x4d, 0x89, 0x66, 0x08, 0x45, 0x89, 0xa6, 0x00, 0x10, 0x00, 0x00, 0x41, 0xc6, 0x86, 0x00,
    0x08, 0x00, 0x00, 0xff, 0x66, 0x45, 0x89, 0xa5, 0x02, 0x40, 0x00, 0x00, 0x0f, 0xae, 0xf0, 0xc7, 0x43, 0x50, 0x00,
    0x00, 0x00, 0x00, 0x66, 0x41, 0x8b, 0x85, 0x02, 0x60, 0x00, 0x00, 0x66, 0x41, 0x39, 0xc4, 0x75, 0xf2, 0x41, 0x80,
    0xbe, 0x00, 0x08, 0x00, 0x00, 0x00, 0x75, 0x13, 0x44, 0x89, 0xe0, 0xee, 0x41, 0x81, 0xfc, 0xd0, 0x07, 0x00, 0x00,
    0x75, 0xb3, 0x31, 0xc0, 0xe6, 0xf4, 0xeb, 0xfe, 0xb0, 0x07, 0xe6, 0xf4, 0xeb, 0xf8,
];

fn kvm() -> bool {
    match KvmMachine::available() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

fn devices(directory: &Path) -> DeviceConfig {
    let path = directory.join("disk");
    if !path.exists() {
        fs::File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    }
    let (format, access) = (DiskFormat::Raw, DiskAccess::Writable);
    DeviceConfig {
        serial: SerialTarget::File(directory.join("serial")),
        disks: vec![DiskConfig { path, format, access, serial: "a".to_owned() }],
        ..DeviceConfig::default()
    }
}

fn config(devices: &DeviceConfig) -> KvmConfig {
    let (backing, dirty_tracking, devices) = (Backing::Base, DirtyTracking::Auto, devices.clone());
    KvmConfig { memory_bytes: MEMORY, vcpus: 1, backing, dirty_tracking, devices }
}

fn machine(devices: &DeviceConfig) -> Arc<KvmMachine> {
    let (payload, fill) = ("counter".parse().unwrap(), "zero:100".parse().unwrap());
    let guest = KvmGuest::Payload { payload, fill, seed: 7 };
    KvmMachine::new(&config(devices), CpuModel::default(), &guest).unwrap()
}

/// Puts the guest in place of the built-in one.
fn install(machine: &KvmMachine) {
    let ram = &machine.ram().blocks()[0];
    ram.write(0x8000, GUEST).unwrap();
    let queue = 0x20_0000u32;
    let table = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 0xb),
        (0x30, 0),
        (0x38, 16),
        (0x80, queue),
        (0x90, queue + 0x4000),
        (0xa0, queue + 0x6000),
        (0x44, 1),
        (0x70, 0xf),
        (u32::MAX, 0),
    ];
    let table: Vec<u8> =
        table.iter().flat_map(|(o, v): &(u32, u32)| [o.to_le_bytes(), v.to_le_bytes()].concat()).collect();
    ram.write(0x9000, &table).unwrap();
    let request = 0x10_0000u64;
    let chain = [(request, 16u32, 1u16, 1u16), (request + 0x1000, 512, 1, 2), (request + 0x800, 1, 2, 0)];
    for (number, (address, length, flags, next)) in (0..).zip(chain) {
        let bytes =
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        ram.write(u64::from(queue) + number * 16, &bytes).unwrap();
    }
    // A write.
    ram.write(request, &1u32.to_le_bytes()).unwrap();
}

fn move_guest(from: &Arc<Guest>, to: &Arc<Guest>) {
    let parameters = parameters(&[]);
    let destination = Destination::listen(to, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters).unwrap();
    let report = Source::start(from, destination.local_uri(), &parameters).unwrap().wait();
    assert_eq!(report.status, Status::Completed, "{:?}, {:?}", report.error, destination.report());
    assert_eq!(destination.wait().status, Status::Completed);
}

/// A guest that writes to its disk and its serial port moves to and fro, and every byte is where it must be, once.
#[test]
fn a_guest_moves_while_it_uses_its_devices() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let devices = devices(directory.path());
    let a = machine(&devices);
    install(&a);
    let b = KvmMachine::empty(&config(&devices)).unwrap();
    let (at_a, at_b) = (Guest::new(a.clone()), Guest::awaited(b.clone()));
    at_a.cont().unwrap();
    let serial = || fs::read(directory.path().join("serial")).unwrap();
    let mut moves = 0;
    let (mut here, mut there) = ((&a, &at_a), (&b, &at_b));
    loop {
        std::thread::sleep(Duration::from_millis(30));
        if here.0.ended().is_some() || moves == 6 {
            break;
        }
        move_guest(here.1, there.1);
        std::mem::swap(&mut here, &mut there);
        moves += 1;
    }
    until("the guest ends", || here.0.ended().is_some());
    println!("{moves} moves; the serial port got {} bytes", serial().len());
    assert_eq!(here.0.ended(), Some(Ended::Exit { value: 0 }));
    assert!(moves >= 2);
    here.1.stop().unwrap();
    let expected: Vec<u8> = std::iter::once(b'!').chain((1..=REQUESTS).map(|number| number as u8)).collect();
    assert!(serial() == expected, "{:?}", serial().len());
    let disk = fs::read(directory.path().join("disk")).unwrap();
    for (number, sector) in (0u32..).zip(disk.chunks(512)) {
        let written = if number <= REQUESTS { number } else { 0 };
        assert_eq!(sector[..4], written.to_le_bytes(), "sector {number}");
    }
}

#[test]
fn other_devices_are_refused_by_name() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let devices = devices(directory.path());
    let source = machine(&devices);
    let refusal = |change: &dyn Fn(&mut DeviceConfig)| {
        let mut changed = devices.clone();
        changed.serial = SerialTarget::Null;
        change(&mut changed);
        let other = KvmMachine::empty(&config(&changed)).unwrap();
        other.accept_profile(&source.profile()).err().map(|error| error.to_string())
    };
    assert_eq!(refusal(&|_| {}), None);
    let smaller = directory.path().join("smaller");
    fs::File::create(&smaller).unwrap().set_len(512).unwrap();
    let found = [
        refusal(&|devices| devices.rngs = 1),
        refusal(&|devices| devices.disks.clear()),
        refusal(&|devices| devices.disks[0].path = smaller.clone()),
        refusal(&|devices| devices.disks[0].access = DiskAccess::ReadOnly),
        refusal(&|devices| devices.disks[0].serial = "b".to_owned()),
    ]
    .map(Option::unwrap);
    assert_eq!(
        found,
        [
            "the source has these devices: disk; this machine has: disk, rng",
            "the source has these devices: disk; this machine has: none",
            "disk (device 0): its size in bytes is 1048576 at the source and 512 here",
            "disk (device 0): its access is writable at the source and read-only here",
            "disk (device 0): its serial is \"a\" at the source and \"b\" here",
        ]
    );
    let mut missing = devices.clone();
    missing.disks[0].path = directory.path().join("none");
    let error = KvmMachine::empty(&config(&missing)).unwrap_err().to_string();
    assert!(error.starts_with("could not open disk /") && error.contains("No such file"), "{error}");
}

/// Two machines do not run on one image by mistake, and a paused guest's image stays its own until it is given up.
#[test]
fn an_image_in_use_is_refused() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let devices = devices(directory.path());
    let (one, other) = (machine(&devices), machine(&devices));
    one.resume(&StartPermit::unlimited()).unwrap();
    let refused = || {
        let error = other.resume(&StartPermit::unlimited()).unwrap_err().to_string();
        assert!(error.starts_with("could not use disk /"), "{error}");
        assert!(error.ends_with("(device 0): another machine has it"), "{error}");
    };
    refused();
    one.pause().unwrap();
    refused();
    one.claim(Claim::Nothing).unwrap();
    other.resume(&StartPermit::unlimited()).unwrap();
    other.pause().unwrap();
}

/// Guests end in their ways, and a machine that takes over an ended guest knows how it has ended.
#[test]
fn guests_end() {
    if !kvm() {
        return;
    }
    let exit: &[u8] = &[0xb8, 0x2c, 1, 0, 0, 0xe7, 0xf4, 0xeb, 0xfe];
    let reset: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
    // An empty table of interrupts, and an undefined instruction.
    let undefined: &[u8] = &[0x0f, 0x01, 0x1c, 0x25, 0, 0, 0x20, 0, 0x0f, 0x0b];
    for (code, expected) in [(exit, Ended::Exit { value: 300 }), (reset, Ended::Reset), (undefined, Ended::Shutdown)] {
        let one = machine(&DeviceConfig::default());
        one.ram().blocks()[0].write(0x8000, code).unwrap();
        assert_eq!(one.ended(), None);
        one.resume(&StartPermit::unlimited()).unwrap();
        until("the guest ends", || one.ended().is_some());
        assert_eq!(one.ended(), Some(expected));
        one.pause().unwrap();
        let other = KvmMachine::empty(&config(&DeviceConfig::default())).unwrap();
        other.load(one.save().unwrap()).unwrap();
        other.resume(&StartPermit::unlimited()).unwrap();
        assert_eq!(other.ended(), Some(expected));
        other.pause().unwrap();
        println!("{expected}");
    }
}

/// A guest that reads where there is nothing gets all ones.
#[test]
fn nothing_is_there() {
    if !kvm() {
        return;
    }
    // in al, 0x70; out 0xf4, al ends with what was read, and so with a word of memory past the devices.
    let port: &[u8] = &[0xe4, 0x70, 0xe6, 0xf4, 0xeb, 0xfe];
    let memory: &[u8] = &[0xbb, 0, 0, 0xf0, 0xd0, 0x8b, 0x03, 0x89, 0x03, 0xe7, 0xf4, 0xeb, 0xfe];
    for (code, value) in [(port, 0xff), (memory, u32::MAX)] {
        let machine = machine(&DeviceConfig::default());
        machine.ram().blocks()[0].write(0x8000, code).unwrap();
        machine.resume(&StartPermit::unlimited()).unwrap();
        until("the guest ends", || machine.ended().is_some());
        assert_eq!(machine.ended(), Some(Ended::Exit { value }));
    }
}

/// A machine that is gone has let go of its images, its serial port's file and its threads.
#[test]
fn nothing_is_left_behind() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut devices = devices(directory.path());
    let open = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.filter(|path| path.starts_with(directory.path())).count()
    };
    let one = machine(&devices);
    one.resume(&StartPermit::unlimited()).unwrap();
    assert!(open() >= 2);
    one.pause().unwrap();
    drop(one);
    assert_eq!(open(), 0);
    // A running machine too, and then others can have what it had.
    devices.serial = SerialTarget::Unix(directory.path().join("socket"));
    for _ in 0..3 {
        let running = machine(&devices);
        running.resume(&StartPermit::unlimited()).unwrap();
        assert!(directory.path().join("socket").exists());
        drop(running);
        assert!(open() == 0 && !directory.path().join("socket").exists());
    }
}

/// An instruction that reads and then writes a device's register comes out twice, and a pause may fall in between.
#[test]
fn a_pause_finishes_what_is_half_done() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let devices = devices(directory.path());
    // mov eax, 0xd0000070; or dword ptr [rax], 0; jmp back
    let guest: &[u8] = &[0xb8, 0x70, 0, 0, 0xd0, 0x83, 0x08, 0, 0xeb, 0xfb];
    let one = machine(&devices);
    one.ram().blocks()[0].write(0x8000, guest).unwrap();
    for turn in 0..300 {
        one.resume(&StartPermit::unlimited()).unwrap_or_else(|error| panic!("turn {turn}: {error}"));
        std::thread::sleep(Duration::from_micros(200));
        one.pause().unwrap();
    }
    let other = KvmMachine::empty(&config(&devices)).unwrap();
    let mut ram = vec![0; 1 << 20];
    one.ram().blocks()[0].read(0, &mut ram).unwrap();
    other.ram().blocks()[0].write(0, &ram).unwrap();
    other.load(one.save().unwrap()).unwrap();
    // Its image goes with it.
    one.claim(Claim::Nothing).unwrap();
    other.resume(&StartPermit::unlimited()).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    other.pause().unwrap();
    assert_eq!(other.ended(), None);
    other.save().unwrap();
}
