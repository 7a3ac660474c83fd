//! How long machines on KVM stand still. By itself, because other tests beside it would be measured too. Skipped where there
//! is no KVM.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::MIB;
use common::kvm::{World, kvm, move_guest};
use dunlin_machines::Backing;

/// One at a time.
static TURN: Mutex<()> = Mutex::new(());

fn median<T: PartialOrd + Copy>(mut all: Vec<T>) -> T {
    all.sort_by(|a, b| a.partial_cmp(b).unwrap());
    all[all.len() / 2]
}

/// All vCPUs out and all that devices do done in less than a millisecond, with four vCPUs and in the median: there are fewer
/// processors than threads here, and other processes.
#[test]
fn four_vcpus_pause_within_a_millisecond() {
    if !kvm() {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for payload in ["dirty:working-set=4M,rate=20M/s+io+timer", "dirty:working-set=4M+io+timer"] {
        let world = World::new(4, payload);
        let side = world.source(Backing::Base);
        world.assert_goes_on(&side);
        let mut took = Vec::new();
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(3));
            let began = Instant::now();
            side.guest.stop().unwrap();
            took.push(began.elapsed());
            side.guest.cont().unwrap();
        }
        world.check(&side, payload);
        let (median, longest) = (median(took.clone()), took.into_iter().max().unwrap());
        println!("{payload}: median {median:?}, longest {longest:?}");
        assert!(median < Duration::from_millis(1), "{payload}: median {median:?}, longest {longest:?}");
    }
}

/// An idle guest of 1 GiB stands still for at most 20 ms, in the median, and the report says of what they are made.
#[test]
fn idle_guests_stand_still_for_a_moment() {
    if !kvm() {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut world = World::new(2, "timer:hz=100");
    world.memory_bytes = 1024 * MIB;
    let (a, b) = (world.source(Backing::Base), world.empty(Backing::Base));
    let mut downtimes = Vec::new();
    for turn in 0..common::runs(6) {
        let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let report = move_guest(from, to, &[]);
        let parts = report.downtime_parts.unwrap();
        println!("downtime {:.1} ms: {parts:?}", report.downtime_seconds * 1e3);
        let sum = parts.pause_seconds
            + parts.ram_seconds
            + parts.device_state_seconds
            + parts.load_seconds
            + parts.handover_seconds;
        assert!((sum - report.downtime_seconds).abs() < 0.001 + 0.05 * report.downtime_seconds, "{parts:?}");
        downtimes.push(report.downtime_seconds * 1e3);
    }
    let median = median(downtimes);
    println!("median {median:.1} ms");
    assert!(median <= 20.0, "{median} ms");
}
