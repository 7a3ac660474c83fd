//! The synthetic machine by itself: it does what its seed says, stops when told, and catches every kind of fault.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use dunlin::{Machine, StartPermit};
use dunlin_machines::synthetic::FaultKind;
use dunlin_machines::{Backing, SyntheticConfig, SyntheticMachine};

const MIB: u64 = 1 << 20;

fn machine(workload: &str, vcpus: u32) -> Arc<SyntheticMachine> {
    let config = SyntheticConfig {
        memory_bytes: 16 * MIB,
        vcpus,
        workload: workload.parse().unwrap(),
        fill: "zero:40,random:30,text:30".parse().unwrap(),
        seed: 42,
        backing: Backing::Base,
    };
    SyntheticMachine::new(&config).unwrap()
}

fn run_for(machine: &SyntheticMachine, time: Duration) {
    machine.resume(&StartPermit::unlimited()).unwrap();
    std::thread::sleep(time);
    machine.pause().unwrap();
}

fn contents(machine: &SyntheticMachine) -> Vec<u8> {
    let mut bytes = vec![0; machine.ram().total_bytes() as usize];
    machine.ram().blocks()[0].read(0, &mut bytes).unwrap();
    bytes
}

const WORKLOADS: [&str; 6] = [
    "idle",
    "pattern=uniform,content=random,rate=200M/s",
    "pattern=sequential,content=text,rate=200M/s,working-set=4M",
    "pattern=zipf,content=sparse,rate=max,working-set=8M",
    "pattern=hotcold,content=counter,rate=max",
    "pattern=uniform,content=counter,rate=10M/s,working-set=4096",
];

/// State and RAM moved by hand give a machine that is right and goes on being right.
#[test]
fn moves_by_hand() {
    for workload in WORKLOADS {
        let from = machine(workload, 2);
        run_for(&from, Duration::from_millis(60));
        assert!(from.verify().unwrap().is_good(), "{workload}: {}", from.verify().unwrap());
        let to = SyntheticMachine::empty(16 * MIB, 2, Backing::Base).unwrap();
        to.ram().blocks()[0].write(0, &contents(&from)).unwrap();
        to.load(from.save().unwrap()).unwrap();
        let before = to.verify().unwrap();
        assert!(before.is_good(), "{workload}: {before}");
        run_for(&to, Duration::from_millis(60));
        let after = to.verify().unwrap();
        assert!(after.is_good(), "{workload}: {after}");
        assert!(after.device_ticks > before.device_ticks, "{workload}: the device goes on");
        assert_eq!(after.steps > before.steps, workload != "idle", "{workload}: the vCPUs go on");
    }
}

/// Verification while the machine runs stops it and lets it go on.
#[test]
fn verifies_a_running_machine() {
    let machine = machine("rate=max", 2);
    machine.resume(&StartPermit::unlimited()).unwrap();
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(10));
        let report = machine.verify().unwrap();
        assert!(report.is_good(), "{report}");
    }
    let before = machine.steps();
    std::thread::sleep(Duration::from_millis(50));
    assert!(machine.steps() > before);
}

/// After pause nothing is written any more, however fast the machine was.
#[test]
fn pause_is_quick_and_complete() {
    for workload in ["rate=max,working-set=8M", "rate=1M/s"] {
        let machine = machine(workload, 2);
        let mut times = Vec::new();
        for _ in 0..20 {
            machine.resume(&StartPermit::unlimited()).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            let began = Instant::now();
            machine.pause().unwrap();
            times.push(began.elapsed());
            let (before, state) = (contents(&machine), machine.save().unwrap());
            std::thread::sleep(Duration::from_millis(3));
            assert!(before == contents(&machine) && state == machine.save().unwrap(), "{workload}: it went on");
        }
        times.sort();
        println!("{workload}: pause took {:?} (median), {:?} (longest)", times[10], times[19]);
        // Generous: these machines are shared.
        assert!(times[10] < Duration::from_millis(20), "{workload}: {times:?}");
    }
}

/// The rate is what was asked for, over a second, whatever the number of vCPUs.
#[test]
fn keeps_its_rate() {
    for vcpus in [1, 4] {
        let error = (0..3)
            .map(|_| {
                let machine = machine("rate=50M/s,content=counter", vcpus);
                let began = Instant::now();
                run_for(&machine, Duration::from_secs(1));
                let rate = (machine.steps().iter().sum::<u64>() * 4096) as f64 / began.elapsed().as_secs_f64();
                (rate / (50 * MIB) as f64 - 1.0).abs()
            })
            .fold(f64::INFINITY, f64::min);
        assert!(error < 0.1, "{vcpus} vCPUs: off by {:.1} %", error * 100.0);
    }
}

/// Whatever is done to RAM behind the machine's back is found, and named for what it is.
#[test]
fn every_kind_of_fault_is_found() {
    // One page written over and over: its history is 1, 2, 3 …
    let machine = machine("pattern=sequential,working-set=4096,rate=1M/s", 1);
    let block = &machine.ram().blocks()[0];
    let mut initial = vec![0; 4096];
    block.read(0, &mut initial).unwrap();
    run_for(&machine, Duration::from_millis(30));
    let old_step = machine.steps()[0];
    let mut old = vec![0; 4096];
    block.read(0, &mut old).unwrap();
    let old_state = machine.save().unwrap();
    run_for(&machine, Duration::from_millis(30));
    let step = machine.steps()[0];
    let mut right = vec![0; 4096];
    block.read(0, &mut right).unwrap();
    assert!(machine.verify().unwrap().is_good() && step > old_step && old_step > 0);

    let mut flipped = right.clone();
    flipped[1234] ^= 0x10;
    let cases = [
        (old.clone(), FaultKind::Stale { holds_step: old_step, lost_since_step: old_step + 1 }),
        (vec![0; 4096], FaultKind::Zero { lost_since_step: 1 }),
        (initial.clone(), FaultKind::Unwritten { lost_since_step: 1 }),
        (flipped, FaultKind::Corrupt { byte: 1234, expected: right[1234], found: right[1234] ^ 0x10 }),
    ];
    for (bytes, expected) in cases {
        block.write(0, &bytes).unwrap();
        let report = machine.verify().unwrap();
        assert_eq!((report.bad_pages, report.faults.len()), (1, 1));
        let zero_fill = initial.iter().all(|b| *b == 0) && matches!(expected, FaultKind::Zero { .. });
        assert!(report.faults[0].kind == expected || zero_fill, "{report}");
        assert_eq!((report.faults[0].page, report.faults[0].last_step), (0, step));
    }
    block.write(0, &right).unwrap();
    assert!(machine.verify().unwrap().is_good());

    // A page from the future: the vCPU is taken back to where it was.
    machine.load(old_state).unwrap();
    let report = machine.verify().unwrap();
    assert_eq!(report.faults[0].kind, FaultKind::Future { holds_step: step }, "{report}");
    block.write(0, &old).unwrap();
    assert!(machine.verify().unwrap().is_good());

    // A byte in a page that no step writes.
    let mut byte = [0];
    block.read(9 * MIB + 77, &mut byte).unwrap();
    block.write(9 * MIB + 77, &[byte[0] ^ 1]).unwrap();
    let report = machine.verify().unwrap();
    assert_eq!((report.bad_pages, report.faults[0].page), (1, 9 * MIB / 4096), "{report}");
}

#[test]
fn refuses_what_makes_no_sense() {
    for (memory, vcpus) in [(0, 1), (4096, 1), (MIB + 1, 1), (MIB, 0), (MIB, 65)] {
        let error = SyntheticMachine::empty(memory, vcpus, Backing::Base).unwrap_err().to_string();
        assert!(error.contains("must be"), "{error}");
    }
    let empty = SyntheticMachine::empty(MIB, 1, Backing::Base).unwrap();
    assert!(empty.verify().is_err() && empty.resume(&StartPermit::unlimited()).is_err() && empty.save().is_err());
    let other = machine("idle", 2);
    assert!(empty.accept_profile(&other.profile()).is_err() && empty.load(other.save().unwrap()).is_err());
}
