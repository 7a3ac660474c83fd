//! Throttled vCPUs: how fast they are, that they pause as quickly as others, and that a guest that is moved and throttled
//! arrives whole. Speeds are ratios within one run. By itself, because other tests beside it would slow it too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{MIB, parameters};
use dunlin::{Guest, GuestError};

/// One at a time.
static TURN: Mutex<()> = Mutex::new(());

/// A running guest of two vCPUs, each of which counts its steps.
struct Running {
    what: String,
    guest: Arc<Guest>,
    steps: Box<dyn Fn() -> Vec<u64>>,
    verify: Box<dyn Fn() -> String>,
    /// It lives as long as this.
    _world: Box<dyn std::any::Any>,
}

fn synthetic(rate: &str) -> Running {
    let side = common::source(8 * MIB, 2, &format!("pattern=sequential,rate={rate},working-set=4M"), 3);
    let (counting, verifying) = (side.machine.clone(), side.machine.clone());
    Running {
        what: format!("synthetic at {rate}"),
        guest: side.guest,
        steps: Box::new(move || counting.steps()),
        verify: Box::new(move || {
            let report = verifying.verify().unwrap();
            if report.is_good() { String::new() } else { report.to_string() }
        }),
        _world: Box::new(()),
    }
}

#[cfg(target_arch = "x86_64")]
fn on_kvm(payload: &str) -> Option<Running> {
    if !common::kvm::kvm() {
        return None;
    }
    let world = common::kvm::World::new(2, payload);
    let side = world.source(dunlin_machines::Backing::Base);
    let (counting, verifying) = (side.machine.clone(), side.machine.clone());
    Some(Running {
        what: format!("kvm with {payload}"),
        guest: side.guest,
        steps: Box::new(move || counting.counted().unwrap()),
        verify: Box::new(move || {
            let report = verifying.verify().unwrap();
            if report.is_good() { String::new() } else { report.to_string() }
        }),
        _world: Box::new(world),
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn on_kvm(_: &str) -> Option<Running> {
    None
}

impl Running {
    /// Steps a second of each vCPU over so long.
    fn speeds(&self, duration: Duration) -> Vec<f64> {
        let (began, before) = (Instant::now(), (self.steps)());
        std::thread::sleep(duration);
        let (took, after) = (began.elapsed().as_secs_f64(), (self.steps)());
        before.iter().zip(after).map(|(before, after)| (after - before) as f64 / took).collect()
    }

    /// How much of its time each vCPU runs when the second is throttled, and how much it runs or would if a processor were
    /// free. The two differ by what a busy host takes from it, which is not the throttle's.
    fn awake(&self, percent: u8) -> Vec<[f64; 2]> {
        self.guest.set_vcpu_throttle(Some(1), percent).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let threads = vcpu_threads();
        let (began, before) = (Instant::now(), threads.each_ref().map(|thread| wants_to_run(thread)));
        let steps = (self.steps)();
        std::thread::sleep(Duration::from_millis(if percent > 90 { 2000 } else { 700 }));
        let (took, after) = (began.elapsed().as_secs_f64(), threads.each_ref().map(|thread| wants_to_run(thread)));
        let went_on = (self.steps)().iter().zip(&steps).all(|(after, before)| after > before);
        self.guest.cancel_vcpu_throttle(None).unwrap();
        assert!(went_on, "{}: a vCPU did nothing", self.what);
        let parts = |before: [u64; 2], after: [u64; 2]| {
            let [ran, waited] = [0, 1].map(|which| (after[which] - before[which]) as f64 / 1e9 / took);
            [ran, ran + waited]
        };
        before.into_iter().zip(after).map(|(before, after)| parts(before, after)).collect()
    }

    /// The speed of each vCPU when the second is throttled, as a part of its speed when it is not: the median of turns.
    fn slowed(&self, percent: u8) -> Vec<f64> {
        let mut ratios = vec![Vec::new(); 2];
        for _ in 0..3 {
            let full = self.speeds(Duration::from_millis(100));
            self.guest.set_vcpu_throttle(Some(1), percent).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            // So long that a hundredth of it is many steps.
            let slowed = self.speeds(Duration::from_millis(if percent > 90 { 800 } else { 300 }));
            self.guest.cancel_vcpu_throttle(None).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            ratios.iter_mut().zip(slowed.iter().zip(full)).for_each(|(all, (slowed, full))| all.push(slowed / full));
        }
        ratios.into_iter().map(median).collect()
    }
}

/// Where the kernel tells of the threads of the vCPUs 0 and 1 of the only machine that runs.
fn vcpu_threads() -> [std::path::PathBuf; 2] {
    let all: Vec<_> = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path()).collect();
    let named = |end: &str| {
        let found = all
            .iter()
            .filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end().ends_with(end)));
        found.max().unwrap().clone()
    };
    [named("vcpu 0"), named("vcpu 1")]
}

/// Nanoseconds that a thread has run, and that it has waited for a processor.
fn wants_to_run(thread: &std::path::Path) -> [u64; 2] {
    let figures = std::fs::read_to_string(thread.join("schedstat")).unwrap();
    let figures: Vec<u64> = figures.split_whitespace().take(2).map(|figure| figure.parse().unwrap()).collect();
    figures.try_into().unwrap()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

type Make = fn() -> Option<Running>;

/// A vCPU throttled by so much does that much less, with a pace and without, and the other is not slowed.
#[test]
fn a_throttled_vcpu_does_its_part() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Made one after the other: a guest that waits for its turn would run as well.
    let paced: [Make; 2] = [|| Some(synthetic("40M/s")), || on_kvm("dirty:working-set=1M,rate=16M/s")];
    // Those who would use a whole processor each do not get it on a busy host, and one that sleeps then gets more of it: how
    // much they do says little, how long they want to run says all.
    let free: [Make; 3] = [|| Some(synthetic("max")), || on_kvm("dirty:working-set=1M"), || on_kvm("counter")];
    for make in free {
        let Some(running) = make() else { continue };
        for percent in [20, 50, 80, 99] {
            let [[_, other], [ran, wanted]] = running.awake(percent)[..] else { panic!("two vCPUs") };
            let expected = 1.0 - f64::from(percent) / 100.0;
            println!("{}, {percent} %: runs {ran:.4} of its time, wants {wanted:.4}; other {other:.3}", running.what);
            // A slice may end late, by what it takes to interrupt a vCPU.
            assert!(ran < expected * 1.1 + 0.02, "{}, {percent} %: {ran} of its time", running.what);
            assert!(wanted > expected * 0.9 - 0.005, "{}, {percent} %: {wanted} of its time", running.what);
            assert!(other > 0.9, "{}, {percent} %: the other for {other} of its time", running.what);
        }
        running.guest.stop().unwrap();
        let wrong = (running.verify)();
        assert!(wrong.is_empty(), "{}: {wrong}", running.what);
    }
    let paced = paced.into_iter().map(|make| (make, 0.85..1.15));
    for (make, slack) in paced {
        let Some(running) = make() else { continue };
        for percent in [20, 50, 80, 99] {
            let [other, slowed] = running.slowed(percent)[..] else { panic!("two vCPUs") };
            let expected = 1.0 - f64::from(percent) / 100.0;
            println!("{}, {percent} %: {slowed:.4} of its speed, the other {other:.3}", running.what);
            // A slice of a hundredth of 10 ms takes a tenth of a millisecond to end.
            let range = expected * slack.start - 0.003..expected * slack.end + 0.01;
            assert!(range.contains(&slowed), "{}, {percent} %: {slowed} of its speed", running.what);
            let least = slack.start * 0.95;
            assert!(other > least, "{}, {percent} %: the other has {other} of its speed", running.what);
        }
        running.guest.stop().unwrap();
        assert_eq!((running.verify)(), "", "{}", running.what);
    }
}

/// What a throttle is changed to counts at once, for all vCPUs, also while they sleep for the old one, and who is paused is
/// throttled when it goes on.
#[test]
fn changes_count_at_once() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let makes: [Make; 2] = [|| Some(synthetic("40M/s")), || on_kvm("dirty:working-set=1M,rate=8M/s")];
    for running in makes.into_iter().filter_map(|make| make()) {
        let full = running.speeds(Duration::from_millis(200))[0];
        running.guest.stop().unwrap();
        running.guest.set_vcpu_throttle(None, 90).unwrap();
        running.guest.cont().unwrap();
        let slowed = running.speeds(Duration::from_millis(200));
        assert!(slowed.iter().all(|speed| *speed < 0.3 * full), "{}: {slowed:?} of {full}", running.what);
        for _ in 0..20 {
            running.guest.set_vcpu_throttle(None, 99).unwrap();
            std::thread::sleep(Duration::from_millis(7));
            running.guest.cancel_vcpu_throttle(None).unwrap();
            std::thread::sleep(Duration::from_millis(7));
        }
        let again = running.speeds(Duration::from_millis(200))[0];
        assert!(again > 0.7 * full, "{}: {again} of {full}", running.what);
        running.guest.stop().unwrap();
        assert_eq!((running.verify)(), "", "{}", running.what);
    }
}

/// Pausing takes no longer for a throttled guest than for another on the same host.
#[test]
fn throttled_guests_pause_at_once() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let makes: [Make; 2] = [|| Some(synthetic("40M/s")), || on_kvm("dirty:working-set=1M+timer")];
    for running in makes.into_iter().filter_map(|make| make()) {
        let mut medians = Vec::new();
        for percent in [0, 50, 99] {
            running.guest.set_vcpu_throttle(None, percent).unwrap();
            let mut took = Vec::new();
            for _ in 0..50 {
                std::thread::sleep(Duration::from_millis(3));
                let began = Instant::now();
                running.guest.stop().unwrap();
                took.push(began.elapsed().as_secs_f64());
                running.guest.cont().unwrap();
            }
            medians.push(median(took));
            println!("{}, {percent} %: paused in {:.0} us", running.what, medians[medians.len() - 1] * 1e6);
        }
        let most = f64::max(0.001, 1.5 * medians[0]);
        assert!(medians.iter().all(|median| *median < most), "{}: {medians:?} s", running.what);
        running.guest.stop().unwrap();
        assert_eq!((running.verify)(), "", "{}", running.what);
    }
}

/// A throttled guest arrives whole, and the operator's throttle stays where it was set.
#[test]
fn a_throttled_guest_moves() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let parameters = parameters(&[]);
    let here = common::source(64 * MIB, 2, "pattern=uniform,rate=100M/s,working-set=16M", 5);
    let there = common::empty(64 * MIB, 2);
    here.guest.set_vcpu_throttle(None, 60).unwrap();
    common::move_guest(&here, &there, "tcp:127.0.0.1:0", &parameters);
    there.assert_good("throttled");
    assert!(here.guest.vcpu_throttle().iter().all(|vcpu| vcpu.effective_percent == 60));
    assert!(there.guest.vcpu_throttle().iter().all(|vcpu| vcpu.effective_percent == 0));
    #[cfg(target_arch = "x86_64")]
    if common::kvm::kvm() {
        for tracking in common::kvm::trackings() {
            let mut world = common::kvm::World::new(2, "dirty:working-set=4M+io+timer");
            world.tracking = tracking;
            let (here, there) =
                (world.source(dunlin_machines::Backing::Base), world.empty(dunlin_machines::Backing::Base));
            here.guest.set_vcpu_throttle(Some(0), 70).unwrap();
            there.guest.set_vcpu_throttle(Some(1), 70).unwrap();
            common::kvm::move_guest(&here, &there, &[]);
            world.assert_goes_on(&there);
            world.check(&there, "throttled");
        }
    }
}

/// Refusals say what was wrong, and change nothing.
#[test]
fn refusals() {
    let running = synthetic("1M/s");
    let refused = |vcpu, percent| running.guest.set_vcpu_throttle(vcpu, percent).unwrap_err();
    assert!(matches!(refused(Some(2), 10), GuestError::NoSuchVcpu { vcpu: 2, count: 2 }));
    assert!(matches!(refused(None, 100), GuestError::ThrottlePercent { percent: 100 }));
    assert!(running.guest.cancel_vcpu_throttle(Some(2)).is_err());
    assert!(running.guest.vcpu_throttle().iter().all(|vcpu| vcpu.effective_percent == 0));
}
