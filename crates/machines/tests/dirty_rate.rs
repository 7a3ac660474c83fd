//! Dirty rates measured of guests whose rates are known. By itself, because guests must keep their pace.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{MIB, empty, parameters, source, until};
use dunlin::dirty_rate::{DirtyRate, DirtyRateError, DirtyRateMode, DirtyRateRequest, DirtyRateStatus};
use dunlin::{Guest, Status};

/// One at a time.
static TURN: Mutex<()> = Mutex::new(());

fn request(mode: DirtyRateMode, milliseconds: u64, sample_pages: u64) -> DirtyRateRequest {
    DirtyRateRequest { calc_time: Duration::from_millis(milliseconds), mode, sample_pages }
}

fn measure(guest: &Guest, request: DirtyRateRequest) -> DirtyRate {
    guest.calc_dirty_rate(&request).unwrap();
    let asked = Instant::now();
    let under_way = guest.dirty_rate();
    assert!(asked.elapsed() < Duration::from_millis(50), "nobody waits for a measurement");
    assert_eq!((under_way.status, under_way.dirty_bytes_per_second), (DirtyRateStatus::Measuring, None));
    until("it is measured", || guest.dirty_rate().status != DirtyRateStatus::Measuring);
    let measured = guest.dirty_rate();
    assert_eq!(measured.status, DirtyRateStatus::Measured, "{measured:?}");
    assert_eq!((measured.mode, measured.calc_time_seconds), (Some(request.mode), request.calc_time.as_secs_f64()));
    measured
}

/// What is measured is within so much of what `steps`, of a page each, says.
fn compare(
    what: &str,
    guest: &Guest,
    request: DirtyRateRequest,
    slack: f64,
    steps: &dyn Fn() -> Vec<u64>,
) -> DirtyRate {
    let (began, before) = (Instant::now(), steps());
    let measured = measure(guest, request);
    let took = began.elapsed().as_secs_f64();
    let written: u64 = steps().iter().zip(before).map(|(now, before)| now - before).sum();
    let (rate, expected) = (measured.dirty_bytes_per_second.unwrap() as f64, written as f64 * 4096.0 / took);
    println!("{what}, {:?}: {:.3} of {:.2} MB/s", request.mode, rate / expected, expected / 1e6);
    assert!((rate / expected - 1.0).abs() < slack, "{what}, {:?}: {rate} of {expected}", request.mode);
    measured
}

/// A guest that writes one page after the other dirties what it writes: counted, that is exact but for the moments at the
/// beginning and the end; by samples of a tenth of the pages within a quarter.
#[test]
fn rates_of_sequential_writers() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let side = source(256 * MIB, 2, "pattern=sequential,rate=80M/s", 1);
    let steps = || side.machine.steps();
    compare("synthetic", &side.guest, request(DirtyRateMode::DirtyBitmap, 1000, 512), 0.1, &steps);
    compare("synthetic", &side.guest, request(DirtyRateMode::PageSampling, 1000, 16384), 0.25, &steps);
    let mixed = source(256 * MIB, 3, "pattern=sequential,rate=40M/s,others=5M/s", 1);
    let steps = || mixed.machine.steps();
    let measured = compare("mixed", &mixed.guest, request(DirtyRateMode::DirtyRing, 1000, 512), 0.1, &steps);
    let each: Vec<f64> = measured.vcpus.iter().map(|vcpu| vcpu.dirty_bytes_per_second as f64 / 1e6).collect();
    let near = |rate: f64, expected: f64| (rate / (expected * 1.048_576) - 1.0).abs() < 0.15;
    assert!(each.len() == 3 && near(each[0], 40.0) && near(each[1], 5.0) && near(each[2], 5.0), "{each:?}");
    assert_eq!(
        measured.dirty_mebibytes_per_second(),
        measured.dirty_bytes_per_second.map(|bytes| bytes.div_ceil(1 << 20))
    );
    mixed.guest.stop().unwrap();
    for mode in [DirtyRateMode::PageSampling, DirtyRateMode::DirtyBitmap, DirtyRateMode::DirtyRing] {
        assert_eq!(measure(&mixed.guest, request(mode, 50, 512)).dirty_bytes_per_second, Some(0), "paused");
    }
    mixed.assert_good("measured");
}

/// A little of much RAM is written again and again: every measurement finds it, and says between which bounds it is. What is
/// known from outside is within them, with room for the one sample in twenty that is not.
#[test]
fn a_small_hot_set_in_much_ram() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    const HOT: f64 = 2.0 * 1_048_576.0;
    let workload = "pattern=uniform,rate=400M/s,working-set=2M";
    let side = common::source_with(dunlin_machines::Backing::Base, 4096 * MIB, 1, workload, 1, "zero:100");
    for mode in [DirtyRateMode::PageSampling, DirtyRateMode::DirtyBitmap] {
        for milliseconds in [300, 1000, 300, 1000] {
            let measured = measure(&side.guest, request(mode, milliseconds, 512));
            println!("{measured:?}");
            let [rate, least, most] = [
                measured.dirty_bytes_per_second,
                measured.at_least_bytes_per_second,
                measured.at_most_bytes_per_second,
            ]
            .map(|bytes| bytes.unwrap() as f64);
            assert!(rate > 0.0 && measured.dirty_mebibytes_per_second() > Some(0), "a bare nothing: {measured:?}");
            assert!(least <= rate && rate <= most, "{measured:?}");
            let (seconds, window) = (measured.calc_time_seconds, measured.window_seconds.unwrap());
            assert!(window < seconds, "{measured:?}");
            assert!(least <= HOT / seconds * 2.0 && most >= HOT / window / 2.0, "{measured:?}");
            // It is the same set however long it is looked at.
            assert!(most <= HOT / window * 8.0, "{measured:?}");
            if mode == DirtyRateMode::DirtyBitmap {
                assert!((rate / (HOT / seconds) - 1.0).abs() < 0.25 && least == rate, "{measured:?}");
            }
        }
    }
    // Of a guest that stands still nothing is found, and how much there may be all the same.
    side.guest.stop().unwrap();
    let measured = measure(&side.guest, request(DirtyRateMode::PageSampling, 100, 512));
    assert_eq!((measured.dirty_bytes_per_second, measured.changed_samples), (Some(0), Some(0)));
    assert!(measured.at_most_bytes_per_second > Some(0), "{measured:?}");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn rates_of_guests_on_kvm() {
    use common::kvm::{World, kvm, trackings};
    use dunlin_machines::{Backing, DirtyTracking};
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if !kvm() {
        return;
    }
    for tracking in trackings() {
        let mut world = World::new(2, "dirty:working-set=14M,rate=6M/s,others=2M/s");
        world.tracking = tracking;
        let side = world.source(Backing::Base);
        world.assert_goes_on(&side);
        let steps = || side.machine.counted().unwrap();
        let what = format!("kvm with the {tracking}");
        compare(&what, &side.guest, request(DirtyRateMode::DirtyBitmap, 500, 512), 0.15, &steps);
        compare(&what, &side.guest, request(DirtyRateMode::PageSampling, 500, 16384), 0.5, &steps);
        let ring = request(DirtyRateMode::DirtyRing, 500, 512);
        if tracking == DirtyTracking::Log {
            assert!(matches!(side.guest.calc_dirty_rate(&ring), Err(DirtyRateError::NoRing)));
        } else {
            let measured = compare(&what, &side.guest, ring, 0.15, &steps);
            let [hard, other] = measured.vcpus[..] else { panic!("{measured:?}") };
            let ratio = hard.dirty_bytes_per_second as f64 / other.dirty_bytes_per_second as f64;
            assert!((2.4..3.6).contains(&ratio), "{measured:?}");
        }
        world.check(&side, &what);
    }
}

/// Beside a migration pages can be sampled, and nothing else; one that tracks makes way for a migration.
#[test]
fn beside_a_migration() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let parameters = parameters(&[("max-bandwidth", "20M/s")]);
    let (from, to) = (source(64 * MIB, 1, "pattern=sequential,rate=10M/s", 1), empty(64 * MIB, 1));
    let tracking = request(DirtyRateMode::DirtyBitmap, 60_000, 512);
    from.guest.calc_dirty_rate(&tracking).unwrap();
    assert!(matches!(from.guest.calc_dirty_rate(&DirtyRateRequest::default()), Err(DirtyRateError::Measuring)));
    let destination = to.listen("tcp:127.0.0.1:0", &parameters);
    let migration = from.migrate(destination.local_uri(), &parameters);
    let ended = from.guest.dirty_rate();
    assert_eq!(ended.status, DirtyRateStatus::Unstarted);
    assert!(ended.error.unwrap().contains("a migration began"));
    until("it is on its way", || migration.report().status == Status::Active);
    assert!(matches!(from.guest.calc_dirty_rate(&tracking), Err(DirtyRateError::Migrating)));
    let steps = || from.machine.steps();
    compare("migrating", &from.guest, request(DirtyRateMode::PageSampling, 500, 16384), 0.4, &steps);
    assert!(matches!(to.guest.calc_dirty_rate(&DirtyRateRequest::default()), Err(DirtyRateError::Guest(_))));
    assert_eq!(migration.wait().status, Status::Completed);
    assert_eq!(destination.wait().status, Status::Completed);
    assert!(matches!(from.guest.calc_dirty_rate(&DirtyRateRequest::default()), Err(DirtyRateError::Guest(_))));
    measure(&to.guest, request(DirtyRateMode::DirtyBitmap, 50, 512));
    to.assert_good("moved");
}

/// Refusals say what was wrong; and a guest that goes takes its measurement with it at once.
/// Time in which the guest stands still, or is elsewhere, is not counted as time in which it dirtied nothing.
#[test]
fn of_a_guest_that_leaves() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (from, to) = (source(32 * MIB, 1, "pattern=uniform,rate=20M/s", 3), empty(32 * MIB, 1));
    from.guest.calc_dirty_rate(&request(DirtyRateMode::PageSampling, 30_000, 512)).unwrap();
    common::move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters(&[]));
    until("it is given up", || from.guest.dirty_rate().status == DirtyRateStatus::Unstarted);
    assert!(from.guest.dirty_rate().error.unwrap().contains("the guest left"));
}

#[test]
fn refusals() {
    let side = source(8 * MIB, 1, "idle", 1);
    assert_eq!(side.guest.dirty_rate(), DirtyRate::default());
    let refused = |request| side.guest.calc_dirty_rate(&request).unwrap_err().to_string();
    assert!(refused(request(DirtyRateMode::PageSampling, 49, 512)).contains("50 ms to 60 s"));
    assert!(refused(request(DirtyRateMode::DirtyBitmap, 60_001, 512)).contains("50 ms to 60 s"));
    assert!(refused(request(DirtyRateMode::PageSampling, 1000, 127)).contains("128 to 16384"));
    assert!(refused(request(DirtyRateMode::PageSampling, 1000, 16385)).contains("128 to 16384"));
    assert_eq!(side.guest.dirty_rate(), DirtyRate::default(), "nothing has changed");
    for mode in [DirtyRateMode::PageSampling, DirtyRateMode::DirtyBitmap] {
        let guest = Guest::new(Arc::clone(side.guest.machine()));
        guest.calc_dirty_rate(&request(mode, 60_000, 512)).unwrap();
        let began = Instant::now();
        drop(guest);
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
