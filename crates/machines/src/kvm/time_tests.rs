//! A guest's clock and counters through whole migrations between hosts whose wall clocks disagree. A host's clock cannot be set
//! here, so what the source has read of it is changed on its way.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dunlin::memory::{DirtyTracker, Ram};
use dunlin::{
    Destination, Guest, Machine, MachineError, Parameters, Source, StartPermit, StateAge, StateSection, Status,
    SwitchoverCost,
};
use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};

use super::*;

/// The guest's clock, with the counter of its first vCPU at the same instant where KVM says it.
#[derive(Debug, Clone, Copy)]
struct Reading {
    clock: u64,
    counter: Option<u64>,
    /// It was read between these two.
    from: Instant,
    to: Instant,
}

fn reading(sections: &[StateSection], from: Instant) -> (Reading, kvm_clock_data) {
    let to = Instant::now();
    let clock: kvm_clock_data = find(sections, "clock", 0).unwrap();
    let vcpu: VcpuState = find(sections, "vcpu", 0).unwrap();
    let host = (clock.flags & KVM_CLOCK_HOST_TSC != 0).then_some(clock.host_tsc);
    // A paravirtual KVM gives guests the host's counter and takes no offset.
    let counter =
        host.zip(vcpu.tsc_offset.filter(|offset| *offset != 0)).map(|(host, offset)| host.wrapping_add(offset));
    (Reading { clock: clock.clock, counter, from, to }, clock)
}

/// A machine on a host whose wall clock is behind by so much, and what it has seen.
struct Behind {
    machine: Arc<KvmMachine>,
    nanoseconds: i64,
    saved: Mutex<Option<Reading>>,
    /// How old the state was when it was loaded, as of then: at least and at most.
    loaded: Mutex<Option<(Instant, Duration, Duration)>>,
}

impl Behind {
    fn new(machine: Arc<KvmMachine>, nanoseconds: i64) -> Arc<Self> {
        Arc::new(Self { machine, nanoseconds, saved: Mutex::default(), loaded: Mutex::default() })
    }
}

impl Machine for Behind {
    fn ram(&self) -> &Ram {
        self.machine.ram()
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        self.machine.dirty_tracker()
    }

    fn profile(&self) -> Vec<u8> {
        self.machine.profile()
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        self.machine.accept_profile(profile)
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        self.machine.switchover_cost()
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.machine.pause()
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        self.machine.resume(permit)
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        let from = Instant::now();
        let mut sections = self.machine.save()?;
        let (read, mut clock) = reading(&sections, from);
        *lock(&self.saved) = Some(read);
        if clock.flags & KVM_CLOCK_REALTIME == 0 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            (clock.flags, clock.realtime) = (clock.flags | KVM_CLOCK_REALTIME, now.as_nanos() as u64);
        }
        clock.realtime = clock.realtime.saturating_add_signed(self.nanoseconds.saturating_neg());
        sections.retain(|section| section.name != "clock");
        sections.push(section("clock", 0, &clock)?);
        Ok(sections)
    }

    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        self.machine.load(sections)
    }

    fn load_aged(&self, sections: Vec<StateSection>, age: StateAge) -> Result<(), MachineError> {
        *lock(&self.loaded) = Some((Instant::now(), age.least(), age.most()));
        self.machine.load_aged(sections, age)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Move {
    /// Of a guest that runs.
    Running,
    /// Of one that is paused, and stays so for a while.
    Paused,
    /// Of one that waits for a person while it is stopped for the switchover.
    Waiting,
}

/// Moves a guest from a host whose clock is behind; checks what it sees.
fn moves(seconds: i64, how: Move) {
    let config = KvmConfig {
        memory_bytes: 8 << 20,
        vcpus: 2,
        backing: crate::Backing::Base,
        dirty_tracking: crate::DirtyTracking::Auto,
        devices: DeviceConfig::default(),
    };
    let guest =
        KvmGuest::Payload { payload: "timer:hz=200".parse().unwrap(), fill: "zero:100".parse().unwrap(), seed: 1 };
    let from = Behind::new(KvmMachine::new(&config, CpuModel::default(), &guest).unwrap(), seconds * 1_000_000_000);
    let to = Behind::new(KvmMachine::empty(&config).unwrap(), 0);
    let (here, there) = (Guest::new(from.clone()), Guest::awaited(to.clone()));
    here.cont().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    if how == Move::Paused {
        here.stop().unwrap();
        std::thread::sleep(Duration::from_millis(300));
    }
    let mut parameters = Parameters::default();
    if how == Move::Waiting {
        parameters.set_text("pause-before-switchover", "on").unwrap();
    }
    let destination = Destination::listen(&there, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters).unwrap();
    let source = Source::start(&here, destination.local_uri(), &parameters).unwrap();
    if how == Move::Waiting {
        let deadline = Instant::now() + Duration::from_secs(10);
        while source.report().status != Status::PreSwitchover && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_secs(1));
        source.resume_switchover(Status::PreSwitchover).unwrap();
    }
    let report = source.wait();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert_eq!(destination.wait().status, Status::Completed);
    if how == Move::Paused {
        there.cont().unwrap();
    }
    // The guest's timers go on at their pace: none waits for an hour.
    let before = to.machine.ticks().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while to.machine.ticks().unwrap().iter().zip(&before).any(|(now, before)| now <= before) {
        assert!(Instant::now() < deadline, "{seconds} s, {how:?}: a timer has stopped");
        std::thread::sleep(Duration::from_millis(1));
    }
    there.stop().unwrap();
    let saved = lock(&from.saved).unwrap();
    let (loaded, least, most) = lock(&to.loaded).unwrap();
    let from = Instant::now();
    let now = reading(&to.machine.save().unwrap(), from).0;
    // What was measured holds what was.
    assert!(least <= loaded - saved.to && loaded - saved.from <= most, "{least:?} {most:?} {saved:?} {loaded:?}");
    let slack = most - least + Duration::from_millis(5);
    let went = Duration::from_nanos(now.clock.checked_sub(saved.clock).expect("the clock did not go back"));
    let (least_passed, most_passed) = (now.from - saved.to, now.to - saved.from);
    println!("{seconds} s, {how:?}: {least:?} to {most:?} old; the clock went {went:?} in {least_passed:?}");
    assert!(went <= most_passed + slack, "{seconds} s, {how:?}: the clock leapt: {went:?} in {most_passed:?}");
    assert!(went + slack >= least_passed, "{seconds} s, {how:?}: the clock stood still: {went:?} in {least_passed:?}");
    if how == Move::Waiting {
        assert!(slack < Duration::from_secs(1), "a wait before the state was saved is no part of its age: {slack:?}");
    }
    if let (Some(then), Some(after), Some(khz)) = (saved.counter, now.counter, to.machine.host.tsc_khz) {
        let cycles = after.wrapping_sub(then);
        let counted = Duration::from_nanos((u128::from(cycles) * 1_000_000 / u128::from(khz)) as u64);
        let apart = counted.abs_diff(went);
        assert!(apart < Duration::from_millis(2), "the counter went {counted:?}, the clock {went:?}");
    } else {
        println!(
            "skipped in part: this KVM cannot set a guest's time stamp counter, so that it is not compared with the clock"
        );
    }
    let told = to.machine.clock_difference();
    match seconds {
        0 => assert_eq!(told, None),
        _ => {
            let told = told.expect("the difference is told").ahead_nanoseconds;
            let expected = seconds * 1_000_000_000;
            assert!((told - expected).unsigned_abs() <= slack.as_nanos() as u64, "{told}, {expected}");
        }
    }
    assert!(to.machine.verify().unwrap().is_good());
}

#[test]
fn a_guest_s_clock_goes_on_by_the_time_it_stood_still() {
    if let Err(error) = KvmMachine::available() {
        println!("skipped: {error}");
        return;
    }
    for seconds in [0, 5, -5, 3600, -3600] {
        for how in [Move::Running, Move::Paused, Move::Waiting] {
            moves(seconds, how);
        }
    }
}
