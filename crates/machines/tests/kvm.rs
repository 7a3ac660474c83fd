//! Machines on KVM: the guests run, the dirty log is right, and guests move and go on. Skipped where there is no KVM.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::kvm::{kvm, trackings};
use common::{MIB, parameters, runs, until};
use dunlin::memory::DirtyBitmap;
use dunlin::{Destination, Guest, Machine, Source, StartPermit, Status};
use dunlin_machines::{Backing, CpuModel, DeviceConfig, DirtyTracking, KvmConfig, KvmGuest, KvmMachine};

const MEMORY: u64 = 32 * MIB;

/// A machine and its guest.
struct Side {
    machine: Arc<KvmMachine>,
    guest: Arc<Guest>,
}

/// A KVM that emulates the guest's code, instruction by instruction. While it does, it puts a page into the vCPU's dirty
/// ring for every write, and does not look whether there is room.
fn overfills_rings() -> bool {
    std::path::Path::new("/sys/module/kvm_pvm").exists()
}

fn config(vcpus: u32, dirty_tracking: DirtyTracking) -> KvmConfig {
    let devices = DeviceConfig::default();
    KvmConfig { memory_bytes: MEMORY, vcpus, backing: Backing::Base, dirty_tracking, devices }
}

fn machine(vcpus: u32, payload: &str, dirty_tracking: DirtyTracking) -> Arc<KvmMachine> {
    let (payload, fill) = (payload.parse().unwrap(), "zero:30,random:40,text:30".parse().unwrap());
    let guest = KvmGuest::Payload { payload, fill, seed: 7 };
    KvmMachine::new(&config(vcpus, dirty_tracking), CpuModel::default(), &guest).unwrap()
}

fn source(vcpus: u32, payload: &str, dirty_tracking: DirtyTracking) -> Side {
    let machine = machine(vcpus, payload, dirty_tracking);
    let guest = Guest::new(machine.clone());
    guest.cont().unwrap();
    Side { machine, guest }
}

fn empty(vcpus: u32, dirty_tracking: DirtyTracking) -> Side {
    let machine = KvmMachine::empty(&config(vcpus, dirty_tracking)).unwrap();
    let guest = Guest::awaited(machine.clone());
    Side { machine, guest }
}

impl Side {
    fn assert_good(&self, what: &str) -> u64 {
        let report = self.machine.verify().unwrap();
        assert!(report.is_good(), "{what}: {report}");
        report.steps
    }

    /// Every vCPU has done something since it had counted so far.
    fn assert_goes_on(&self, before: &[u64]) {
        until("every vCPU goes on", || {
            self.machine.counted().unwrap().iter().zip(before).all(|(now, before)| now > before)
        });
    }
}

fn move_guest(from: &Side, to: &Side, set: &[(&str, &str)]) -> dunlin::Report {
    let parameters = parameters(set);
    let destination = Destination::listen(&to.guest, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters).unwrap();
    let source = Source::start(&from.guest, destination.local_uri(), &parameters).unwrap();
    let mut report = source.wait();
    let error = report.error.as_ref().map(|error| error.message.clone()).unwrap_or_default();
    if error.contains("KVM put more pages into a vCPU's dirty ring") && overfills_rings() {
        // All that can be asked here: it is found, the guest goes on, and another tracker moves it.
        println!("skipped: this KVM goes over the end of dirty rings");
        assert!(from.guest.is_running());
        let counted = from.machine.counted().unwrap();
        from.assert_goes_on(&counted);
        from.assert_good("after a ring that KVM went over the end of");
        // The destination listens on.
        report = Source::start(&from.guest, destination.local_uri(), &parameters).unwrap().wait();
    }
    assert_eq!(report.status, Status::Completed, "source: {:?}, destination: {:?}", report.error, destination.report());
    assert_eq!(destination.wait().status, Status::Completed);
    assert!(!from.guest.is_running() && to.guest.is_running());
    report
}

#[test]
fn payloads_run_and_pause() {
    if !kvm() {
        return;
    }
    for payload in
        ["counter", "dirty:working-set=4M", "dirty:working-set=4M,stride=12K", "dirty:working-set=2M,rate=8M/s"]
    {
        for vcpus in [1, 2, 4] {
            let side = source(vcpus, payload, DirtyTracking::Auto);
            side.assert_goes_on(&vec![0; vcpus as usize]);
            let mut longest = Duration::ZERO;
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(2));
                let began = Instant::now();
                side.guest.stop().unwrap();
                longest = longest.max(began.elapsed());
                let counted = side.machine.counted().unwrap();
                std::thread::sleep(Duration::from_micros(200));
                assert_eq!(counted, side.machine.counted().unwrap(), "nobody runs when pause has returned");
                side.guest.cont().unwrap();
            }
            let steps = side.assert_good(payload);
            println!("{payload}, {vcpus} vCPUs: {steps} steps, longest pause {longest:?}");
        }
    }
}

fn pages(bitmap: &DirtyBitmap) -> BTreeSet<usize> {
    let mut pages = BTreeSet::new();
    bitmap.drain(|run| pages.extend(run));
    pages
}

/// The tracker says the pages that the guest has written, and no others.
#[test]
fn the_dirty_pages_are_exact() {
    if kvm() {
        trackings().into_iter().for_each(is_exact);
    }
}

fn is_exact(tracking: DirtyTracking) {
    // A slow guest that visits every third page of 2 MiB from the first MiB on, and counts in page 0xa0.
    let side = source(1, "dirty:working-set=2M,stride=12K,rate=2M/s", tracking);
    let tracker = side.machine.dirty_tracker().unwrap();
    tracker.start().unwrap();
    let dirty = DirtyBitmap::new(MEMORY);
    let mut before = side.machine.counted().unwrap()[0];
    tracker.rearm(0, 0..MEMORY, &dirty).unwrap();
    // All count as written at the start. The log says so; rings have only what was written since.
    let all = pages(&dirty).len() as u64 == MEMORY / 4096;
    assert!(all || tracking != DirtyTracking::Log);
    let places = 512 / 3;
    // The processor notes in the guest's page tables what it has used of them.
    let tables = 0x10..=0x12;
    let visited = |from: u64, to: u64| (from..to).map(|step| 256 + 3 * (step % places) as usize);
    let mut total = 0;
    for turn in 0..10 {
        std::thread::sleep(Duration::from_millis(20));
        // A step that is counted while this looks may be in this look or the next.
        let at_look = side.machine.counted().unwrap()[0];
        tracker.rearm(0, 0..MEMORY, &dirty).unwrap();
        let found = pages(&dirty);
        let now = side.machine.counted().unwrap()[0];
        let allowed: BTreeSet<usize> =
            visited(before.saturating_sub(1), now + 2).chain([0xa0]).chain(tables.clone()).collect();
        assert!(
            found.is_subset(&allowed),
            "{tracking}, turn {turn}: {:?}",
            found.difference(&allowed).collect::<Vec<_>>()
        );
        total += found.len();
        before = at_look;
    }
    assert!(total > 20, "{total}");
    // Stopped, it is exact.
    side.guest.stop().unwrap();
    tracker.rearm(0, 0..MEMORY, &dirty).unwrap();
    pages(&dirty);
    let before = side.machine.counted().unwrap()[0];
    side.guest.cont().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    side.guest.stop().unwrap();
    let now = side.machine.counted().unwrap()[0];
    assert!(now > before + 1);
    for _ in 0..2 {
        tracker.sync(0, &dirty).unwrap();
        let found = pages(&dirty);
        let must: BTreeSet<usize> = visited(before + 1, now).chain([0xa0]).collect();
        let may: BTreeSet<usize> = visited(before, now + 1).chain([0xa0]).chain(tables.clone()).collect();
        assert!(must.is_subset(&found) && found.is_subset(&may), "{tracking}: {found:?} between {must:?} and {may:?}");
    }
    tracker.stop();
    // Once more from the start: what was written in between is forgotten, and what is written from now on is seen.
    side.guest.cont().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    side.guest.stop().unwrap();
    let tracker = side.machine.dirty_tracker().unwrap();
    tracker.start().unwrap();
    tracker.rearm(0, 0..MEMORY, &dirty).unwrap();
    pages(&dirty);
    let before = side.machine.counted().unwrap()[0];
    side.guest.cont().unwrap();
    std::thread::sleep(Duration::from_millis(10));
    side.guest.stop().unwrap();
    tracker.sync(0, &dirty).unwrap();
    let found = pages(&dirty);
    let must: BTreeSet<usize> = visited(before + 1, side.machine.counted().unwrap()[0]).collect();
    assert!(must.is_subset(&found), "{tracking}: {:?}", must.difference(&found).collect::<Vec<_>>());
}

#[test]
fn moves_a_guest_that_is_dirtying_memory() {
    if !kvm() {
        return;
    }
    for tracking in trackings() {
        let (from, to) = (source(2, "dirty:working-set=4M", tracking), empty(2, tracking));
        from.assert_goes_on(&[1, 1]);
        let report = move_guest(&from, &to, &[]);
        let before = to.machine.counted().unwrap();
        let steps = to.assert_good("after the move");
        to.assert_goes_on(&before);
        assert!(to.assert_good("later") > steps);
        let downtime = report.downtime_seconds * 1e3;
        println!("{tracking}: {steps} steps, {} rounds, downtime {downtime:.1} ms", report.rounds.len());
    }
}

/// Rings as small as KVM allows fill all the time under a guest that writes as fast as it can, on a link that is slower.
/// DUNLIN_RING_ENTRIES chooses another size.
#[test]
fn a_tiny_ring_loses_nothing() {
    if !kvm() || trackings().len() < 2 {
        return;
    }
    let entries = std::env::var("DUNLIN_RING_ENTRIES").map_or(1, |entries| entries.parse().unwrap());
    let tracking = DirtyTracking::Ring { entries: Some(entries) };
    let (a, b) = (source(2, "dirty:working-set=16M", tracking), empty(2, tracking));
    a.assert_goes_on(&[1, 1]);
    for turn in 0..2 * runs(1) {
        let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let report = move_guest(from, to, &[("max-bandwidth", "50M/s"), ("downtime-limit", "2s")]);
        let full = from.machine.times_ring_full().unwrap();
        let steps = to.assert_good("after the move");
        println!("{tracking}, turn {turn}: full {full} times, {steps} steps, {} rounds", report.rounds.len());
        assert!(full > 0 || entries > 1 || overfills_rings(), "the ring was never full");
        let counted = to.machine.counted().unwrap();
        to.assert_goes_on(&counted);
    }
}

/// Nobody asks for what is in the rings while each vCPU writes three times as much as its ring holds. The vCPUs themselves read them
/// in time, also on a KVM that goes over their ends, and on a busy host.
#[test]
fn vcpus_read_their_rings_in_time() {
    if !kvm() || trackings().len() < 2 {
        return;
    }
    // Of the size that is the default, but without a thread that reads them.
    let side = source(2, "dirty:working-set=16M", DirtyTracking::Ring { entries: Some(1 << 16) });
    side.assert_goes_on(&[1, 1]);
    let tracker = side.machine.dirty_tracker().unwrap();
    tracker.start().unwrap();
    let dirty = DirtyBitmap::new(MEMORY);
    let before = side.machine.counted().unwrap();
    until("every vCPU has done much", || {
        side.machine.counted().unwrap().iter().zip(&before).all(|(now, before)| *now > before + 65_536)
    });
    tracker.sync(0, &dirty).unwrap();
    tracker.rearm(0, 0..MEMORY, &dirty).unwrap();
    assert!(pages(&dirty).len() as u64 >= 16 * MIB / 4096);
}

/// After a ring that KVM went over the end of every vCPU goes on, whoever was first to ask for room.
#[test]
fn a_guest_goes_on_after_an_overflow() {
    if !kvm() || trackings().len() < 2 {
        return;
    }
    let mut overflows = 0;
    for _ in 0..runs(30) {
        let side = source(2, "dirty:working-set=16M", DirtyTracking::Ring { entries: Some(1) });
        side.assert_goes_on(&[1, 1]);
        let tracker = side.machine.dirty_tracker().unwrap();
        // What goes over the end while it starts is found by the start, or by the look afterwards.
        let _ = tracker.start();
        std::thread::sleep(Duration::from_millis(3));
        overflows += u32::from(tracker.sync(0, &DirtyBitmap::new(MEMORY)).is_err());
        let counted = side.machine.counted().unwrap();
        side.assert_goes_on(&counted);
    }
    println!("{overflows} overflows");
    if overflows == 0 {
        println!("skipped: this KVM does not go over the end of dirty rings");
    }
}

#[test]
fn moves_with_everything_on() {
    if !kvm() {
        return;
    }
    for tracking in trackings() {
        let (from, to) = (source(2, "dirty:working-set=4M,rate=40M/s", tracking), empty(2, tracking));
        from.assert_goes_on(&[1, 1]);
        move_guest(&from, &to, &[("xbzrle", "on"), ("multifd-compression", "zstd"), ("multifd-channels", "4")]);
        to.assert_good("after the move");
    }
}

/// Every vCPU's timer goes on ticking, once for each time that it is set, and the interval timer at its pace.
#[test]
fn timers_go_on() {
    if !kvm() {
        return;
    }
    for (vcpus, payload) in [(1, "timer:hz=200"), (2, "timer:hz=200+dirty:working-set=2M,rate=4M/s")] {
        let (a, b) = (source(vcpus, payload, DirtyTracking::Auto), empty(vcpus, DirtyTracking::Auto));
        let mut before = vec![0; vcpus as usize];
        for turn in 0..6 {
            let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
            until("every vCPU's timer ticks", || {
                from.machine.ticks().unwrap().iter().zip(&before).all(|(now, before)| *now > before + 10)
            });
            move_guest(from, to, &[]);
            before = to.machine.ticks().unwrap();
            let report = to.machine.verify().unwrap();
            assert!(report.is_good(), "{payload}, turn {turn}: {report}");
        }
        let began = Instant::now();
        let first = a.machine.verify().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let last = a.machine.verify().unwrap();
        let due = began.elapsed().as_secs_f64() * 200.0;
        let ticked = (last.interval_ticks - first.interval_ticks) as f64;
        println!("{payload}: {last}; {ticked} of {due:.0} interval ticks");
        assert!((ticked - due).abs() < 0.2 * due, "{ticked} interval ticks, {due} were due");
    }
}

/// A → B → A → B …, each time into a machine that has run before.
#[test]
fn round_trips() {
    if !kvm() {
        return;
    }
    let payloads = ["dirty:working-set=2M", "counter"];
    for (tracking, payload) in trackings().into_iter().flat_map(|tracking| payloads.map(|payload| (tracking, payload)))
    {
        // From one tracker to another and back, too.
        let back = if payload == "counter" { DirtyTracking::Auto } else { tracking };
        let (a, b) = (source(2, payload, tracking), empty(2, back));
        let mut steps = a.assert_good("before");
        let turns = 2 * runs(3);
        for turn in 0..turns {
            let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
            move_guest(from, to, &[]);
            let counted = to.machine.counted().unwrap();
            to.assert_goes_on(&counted);
            let now = to.assert_good(&format!("{payload}, turn {turn}"));
            assert!(now > steps);
            steps = now;
        }
        println!("{tracking}, {payload}: {turns} moves, {steps} steps");
    }
}

#[test]
fn refuses_what_does_not_fit() {
    if !kvm() {
        return;
    }
    let from = machine(2, "counter", DirtyTracking::Auto);
    let error = empty(1, DirtyTracking::Auto).machine.accept_profile(&from.profile()).unwrap_err().to_string();
    assert!(error.contains("the source has 2 vCPUs, this machine has 1"), "{error}");
    let to = empty(2, DirtyTracking::Auto);
    assert!(to.machine.accept_profile(&from.profile()).is_ok());
    assert!(to.machine.resume(&StartPermit::unlimited()).is_err(), "empty");
    let sections = from.save().unwrap();
    let mut damaged = sections.clone();
    damaged.retain(|section| section.name != "clock");
    let error = to.machine.load(damaged).unwrap_err().to_string();
    assert!(error.contains("\"clock\" (0) is there 0 times"), "{error}");
    assert!(to.machine.resume(&StartPermit::unlimited()).is_err(), "still empty");
    to.machine.load(sections).unwrap();
    let bytes: usize = from.save().unwrap().iter().map(|section| section.data.len()).sum();
    println!("device state of 2 vCPUs: {bytes} bytes");
}
