//! Guests on KVM that work on a disk and a serial port while they move: every page, every sector and every line is accounted
//! for, none lost and none twice. Skipped where there is no KVM.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::time::Duration;

use common::kvm::{World, kvm, move_guest, trackings};
use common::{MIB, Random, runs};
use dunlin_machines::Backing;

const EVERYTHING: &str = "dirty:working-set=1M+io+timer";

/// A → B → A → B …, with everything that a guest does at once.
#[test]
fn everything_goes_on_through_round_trips() {
    if !kvm() {
        return;
    }
    for (vcpus, tracking) in [1, 2].into_iter().flat_map(|vcpus| trackings().into_iter().map(move |t| (vcpus, t))) {
        let mut world = World::new(vcpus, EVERYTHING);
        world.tracking = tracking;
        let (a, b) = (world.source(Backing::Base), world.empty(Backing::Base));
        world.assert_goes_on(&a);
        let mut random = Random(u64::from(vcpus));
        for turn in 0..2 * runs(3) {
            let what = format!("{vcpus} vCPUs, {tracking}, turn {turn}");
            let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
            std::thread::sleep(Duration::from_millis(random.below(30)));
            let report = move_guest(from, to, &[]);
            let found = world.check(to, &what);
            println!("{what}: {found}; downtime {:.1} ms", report.downtime_seconds * 1e3);
            world.assert_goes_on(to);
        }
    }
}

/// At random moments, with either way of tracking, few or many vCPUs, pages of either size on either side, and whatever else
/// a migration can be asked for.
#[test]
fn random_moves() {
    if !kvm() {
        return;
    }
    let trackings = trackings();
    let mut random = Random(4);
    let vcpus = if std::thread::available_parallelism().map_or(1, usize::from) > 2 { &[1, 2, 4][..] } else { &[1, 2] };
    let backings = if Backing::Huge2M.map(64 << 20).is_ok() {
        &[Backing::Base, Backing::Huge2M][..]
    } else {
        println!("skipped: pages of 2 MiB, for the pool has none");
        &[Backing::Base]
    };
    for run in 0..runs(12) {
        // Every way of tracking on every number of vCPUs, whatever else.
        let tracking = trackings[run as usize % trackings.len()];
        let mut world = World::new(vcpus[(run / 2) as usize % vcpus.len()], EVERYTHING);
        world.tracking = tracking;
        let (from, to) = (*random.pick(backings), *random.pick(backings));
        let set = [
            ("multifd-channels", *random.pick(&["1", "2", "4"])),
            ("xbzrle", *random.pick(&["off", "on"])),
            ("multifd-compression", *random.pick(&["none", "lz4", "zstd"])),
        ];
        let what = format!("run {run}, {tracking}, {} vCPUs, {from} to {to}, {set:?}", world.vcpus);
        let (a, b) = (world.source(from), world.empty(to));
        std::thread::sleep(Duration::from_micros(random.below(100_000)));
        let report = move_guest(&a, &b, &set);
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        let found = world.check(&b, &what);
        world.assert_goes_on(&b);
        world.check(&b, &what);
        println!("{what}: {} rounds, {} units, {} ticks", report.rounds.len(), found.units, found.ticks);
    }
}

/// Long enough that what is read back was written before a move.
#[test]
fn sectors_written_before_a_move_are_read_after_it() {
    if !kvm() {
        return;
    }
    let world = World::new(1, "io");
    let (a, b) = (world.source(Backing::Base), world.empty(Backing::Base));
    common::until("the guest comes round its disk", || a.machine.units().unwrap() > 230);
    move_guest(&a, &b, &[]);
    common::until("the guest reads what it wrote at the source", || b.machine.units().unwrap() > 500);
    world.check(&b, "after a round of the disk");
}

/// RAM on both sides of the hole for devices.
#[test]
fn memory_above_the_hole() {
    if !kvm() {
        return;
    }
    let mut world = World::new(2, EVERYTHING);
    world.memory_bytes = (3 << 30) + 64 * MIB;
    world.fill = "zero:99,random:1";
    let (a, b) = (world.source(Backing::Base), world.empty(Backing::Base));
    let report = move_guest(&a, &b, &[]);
    assert!(report.ram.pages.plain > 5000, "{:?}", report.ram.pages);
    world.assert_goes_on(&b);
    println!("{}", world.check(&b, "above the hole"));
}

/// A disk whose image says where what is.
#[test]
fn disks_in_qcow2() {
    if !kvm() {
        return;
    }
    let mut world = World::new(2, EVERYTHING);
    world.make_qcow2();
    let (a, b) = (world.source(Backing::Base), world.empty(Backing::Base));
    for turn in 0..6 {
        let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
        world.assert_goes_on(from);
        move_guest(from, to, &[]);
        println!("turn {turn}: {}", world.check(to, "qcow2"));
    }
}
