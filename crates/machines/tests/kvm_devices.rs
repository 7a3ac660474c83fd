//! Guests on KVM that work on a disk and a serial port while they move: every page, every sector and every line is accounted
//! for, none lost and none twice. Skipped where there is no KVM.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::time::Duration;

use common::kvm::{World, kvm, move_guest};
use common::{Random, runs};
use dunlin_machines::Backing;

const EVERYTHING: &str = "dirty:working-set=1M+io+timer";

/// A → B → A → B …, with everything that a guest does at once.
#[test]
fn everything_goes_on_through_round_trips() {
    if !kvm() {
        return;
    }
    for vcpus in [1, 2] {
        let world = World::new(vcpus, EVERYTHING);
        let (a, b) = (world.source(Backing::Base), world.empty(Backing::Base));
        world.assert_goes_on(&a);
        let mut random = Random(u64::from(vcpus));
        for turn in 0..2 * runs(3) {
            let what = format!("{vcpus} vCPUs, turn {turn}");
            let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
            std::thread::sleep(Duration::from_millis(random.below(30)));
            let report = move_guest(from, to, &[]);
            let found = world.check(to, &what);
            println!("{what}: {found}; downtime {:.1} ms", report.downtime_seconds * 1e3);
            world.assert_goes_on(to);
        }
    }
}
