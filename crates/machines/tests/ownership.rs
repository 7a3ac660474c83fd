//! Who may run the guest, with the VMM's code, the link and the people around it going wrong: never two guests, and never
//! none where one is possible. Each of these was seen to happen with tables that were right and drivers that were not.
//!
//! `DUNLIN_TEST_RUNS` sets how often the races are run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::proxy::{Harm, Moment, Proxy};
use common::{MIB, Side, empty, move_guest, parameters, runs, source, until};
use dunlin::machine::{Claim, MachineError, StateSection};
use dunlin::memory::{DirtyTracker, Ram};
use dunlin::{
    Destination, Guest, GuestError, GuestPlace, Machine, Ownership, Parameters, Report, Source, StartPermit, Status,
    SwitchoverCost, TakeBack, Uri,
};
use dunlin_machines::SyntheticMachine;

const WORKLOAD: &str = "pattern=uniform,content=random,rate=20M/s,working-set=2M";
const RELEASE: u16 = 9;
const RUNNING: u16 = 10;
const ABORT: u16 = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Pause,
    Save,
    Load,
    Claim,
    Resume,
}

/// What a machine does at a step, before or instead of the real thing.
type Act = Box<dyn FnMut(Step, &SyntheticMachine, Option<&StartPermit>) -> Result<(), MachineError> + Send>;

/// A machine whose steps can be made to go wrong.
struct Odd {
    machine: Arc<SyntheticMachine>,
    act: Mutex<Act>,
}

impl Odd {
    fn new(machine: &Arc<SyntheticMachine>) -> Arc<Self> {
        Arc::new(Self { machine: machine.clone(), act: Mutex::new(Box::new(|_, _, _| Ok(()))) })
    }

    fn set(
        &self,
        act: impl FnMut(Step, &SyntheticMachine, Option<&StartPermit>) -> Result<(), MachineError> + Send + 'static,
    ) {
        // A panicking one leaves the lock poisoned, which says nothing about what is in it.
        *self.act.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Box::new(act);
    }

    fn reach(&self, step: Step, permit: Option<&StartPermit>) -> Result<(), MachineError> {
        let mut act = self.act.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        act(step, &self.machine, permit)
    }
}

impl Machine for Odd {
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
    fn claim(&self, _: Claim) -> Result<(), MachineError> {
        self.reach(Step::Claim, None)
    }
    fn switchover_cost(&self) -> SwitchoverCost {
        self.machine.switchover_cost()
    }
    fn pause(&self) -> Result<(), MachineError> {
        self.reach(Step::Pause, None)?;
        self.machine.pause()
    }
    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        self.reach(Step::Resume, Some(permit))?;
        self.machine.resume(permit)
    }
    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        self.reach(Step::Save, None)?;
        self.machine.save()
    }
    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        self.reach(Step::Load, None)?;
        self.machine.load(sections)
    }
}

/// A pair of machines that can be made to go wrong.
struct Pair {
    from: Side,
    to: Side,
    here: Arc<Odd>,
    there: Arc<Odd>,
}

fn pair() -> Pair {
    let (mut from, mut to) = (source(4 * MIB, 1, WORKLOAD, 5), empty(4 * MIB, 1));
    let (here, there) = (Odd::new(&from.machine), Odd::new(&to.machine));
    from.guest.stop().unwrap();
    from.guest = Guest::new(here.clone());
    from.guest.cont().unwrap();
    to.guest = Guest::awaited(there.clone());
    Pair { from, to, here, there }
}

/// Whether the vCPUs really do something, whatever anybody says.
fn really_runs(machine: &SyntheticMachine) -> bool {
    let before = machine.steps();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(150) {
        if machine.steps() != before {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// Fails as soon as both guests are seen to make steps at once; until dropped.
struct Watch {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Option<String>>>,
}

impl Watch {
    fn start(pair: &Pair) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (here, there, end) = (pair.from.machine.clone(), pair.to.machine.clone(), over.clone());
        let thread = std::thread::spawn(move || {
            // What the destination did before the source did something again, or the other way round, is a handover; both
            // between one look and the next but one are two guests.
            let mut moved = [[false; 2]; 2];
            let mut last = [here.steps(), there.steps()];
            while !end.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
                let now = [here.steps(), there.steps()];
                let these = [now[0] != last[0], now[1] != last[1]];
                // State that is loaded is not a step.
                moved = [moved[1], these];
                if moved.iter().all(|both| both[0] && both[1]) {
                    return Some(format!("two guests make steps: {last:?} {now:?}"));
                }
                last = now;
            }
            None
        });
        Self { over, thread: Some(thread) }
    }

    fn end(mut self) {
        self.over.store(true, Ordering::SeqCst);
        let found = self.thread.take().unwrap().join().unwrap();
        assert_eq!(found, None);
    }
}

/// Ends what the threads of a test do, also when it fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn message(report: &Report) -> String {
    report.error.as_ref().map(|error| error.message.clone()).unwrap_or_default()
}

fn quick(changes: &[(&str, &str)]) -> Parameters {
    let mut all = vec![("handover-timeout", "200ms"), ("link-timeout", "500ms")];
    all.extend_from_slice(changes);
    parameters(&all)
}

fn port(uri: &Uri) -> u16 {
    match uri {
        Uri::Tcp { port, .. } => *port,
        other => panic!("{other}"),
    }
}

/// A hello by docs/wire-format.md.
fn hello(role: u8, session: &[u8; 16]) -> Vec<u8> {
    let mut bytes = b"DUNLIN\r\n".to_vec();
    bytes.extend([1, 0, role, 0, 0, 0, 0, 0]);
    bytes.extend(session);
    bytes.resize(60, 0);
    let checksum = bytes.iter().fold(u32::MAX, |mut value, byte| {
        value ^= u32::from(*byte);
        for _ in 0..8 {
            value = (value >> 1) ^ (if value & 1 == 1 { 0x82F6_3B78 } else { 0 });
        }
        value
    });
    bytes.extend((!checksum).to_le_bytes());
    bytes
}

fn session_of(report: &Report) -> [u8; 16] {
    let text: String = report.session.clone().unwrap().chars().filter(char::is_ascii_hexdigit).collect();
    let bytes: Vec<u8> = (0..16).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// A destination that has everything, whose source was lost for good before it released the guest.
fn orphan(pair: &Pair, parameters: &Parameters) -> Destination {
    let destination = pair.to.listen("tcp:127.0.0.1:0", parameters);
    let proxy = Proxy::start(destination.local_uri(), Moment::Before(RELEASE), Harm::CutForGood);
    let migration = pair.from.migrate(&proxy.uri, parameters);
    assert_eq!(migration.wait().guest, GuestPlace::Undecided);
    until("it waits there", || message(&destination.report()).contains("take the guest over here"));
    destination
}

/// The destination's first start takes a while and fails, while somebody there tries to start the guest, and somebody else
/// to cancel: it goes on at the source, and only there.
#[test]
fn nobody_starts_a_guest_whose_start_fails() {
    for run in 0..runs(20) {
        let pair = pair();
        let mut left = 1;
        pair.there.set(move |step, _, _| {
            if step == Step::Resume && left > 0 {
                left -= 1;
                std::thread::sleep(Duration::from_millis(100));
                return Err("not yet".into());
            }
            Ok(())
        });
        let destination = pair.to.listen("tcp:127.0.0.1:0", &parameters(&[]));
        let over = AtomicBool::new(false);
        let watch = Watch::start(&pair);
        std::thread::scope(|scope| {
            let _end = Ending(&over);
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    assert!(pair.to.guest.cont().is_err(), "run {run}: the guest is not this side's");
                }
            });
            if run % 2 == 1 {
                scope.spawn(|| {
                    while !over.load(Ordering::SeqCst) {
                        // Not before it starts.
                        if pair.from.guest.ownership() == Ownership::Undecided {
                            drop(destination.cancel());
                        }
                    }
                });
            }
            let migration = pair.from.migrate(destination.local_uri(), &parameters(&[]));
            let report = migration.wait();
            // A cancel that comes before Release does is one.
            let cancelled = run % 2 == 1 && report.status == Status::Cancelled;
            assert_eq!(report.guest, GuestPlace::RunningAtSource, "run {run}");
            assert!(cancelled || message(&report).contains("not yet"), "{}", message(&report));
        });
        assert!(pair.from.guest.is_running() && !pair.to.guest.is_running());
        assert!(!really_runs(&pair.to.machine), "run {run}");
        watch.end();
        pair.from.assert_good("it went on");
    }
}

/// The source is dead, and the first start of the guest that is taken over fails: it is still there to be taken over.
#[test]
fn a_guest_taken_over_survives_a_start_that_fails() {
    let pair = pair();
    let destination = orphan(&pair, &quick(&[]));
    let mut left = 2;
    pair.there.set(move |step, _, _| {
        if step == Step::Resume && left > 0 {
            left -= 1;
            return Err("the image is locked".into());
        }
        Ok(())
    });
    for _ in 0..2 {
        let error = pair.to.guest.take_back(TakeBack::Anyway).unwrap_err();
        assert!(matches!(error, GuestError::Machine { .. }) && error.to_string().contains("the image is locked"));
        assert_eq!(pair.to.guest.ownership(), Ownership::Undecided);
        assert!(!pair.to.guest.is_running() && pair.to.guest.cont().is_err());
    }
    pair.to.guest.take_back(TakeBack::Anyway).unwrap();
    assert!(pair.to.guest.is_running() && really_runs(&pair.to.machine));
    assert_eq!(destination.report().status, Status::Completed);
    assert!(pair.to.guest.take_back(TakeBack::Anyway).is_err(), "nothing is undecided any more");
    pair.to.assert_good("taken over");
}

/// A guest waits for a person, for longer than `handover-timeout`: nobody who connects makes it go away.
#[test]
fn a_waiting_guest_is_not_evicted() {
    let pair = pair();
    let destination = orphan(&pair, &quick(&[]));
    std::thread::sleep(Duration::from_millis(400));
    let connect = || TcpStream::connect(("127.0.0.1", port(destination.local_uri()))).unwrap();
    for role in [0, 2] {
        let mut stream = connect();
        stream.write_all(&hello(role, &[7; 16])).unwrap();
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer));
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.contains("a guest waits here for a decision"), "{answer:?}");
    }
    let other = source(4 * MIB, 1, "idle", 6);
    let report = other.migrate(destination.local_uri(), &parameters(&[])).wait();
    assert!(message(&report).contains("a guest waits here for a decision"), "{}", message(&report));
    assert!(other.guest.is_running());
    let refused = destination.cancel().unwrap_err();
    assert!(refused.to_string().contains("undecided"), "{refused}");
    pair.to.guest.take_back(TakeBack::WhenSilent).unwrap();
    assert!(really_runs(&pair.to.machine));
    pair.to.assert_good("taken over");
}

/// Connections for the session of a waiting guest that come to nothing are as if they had not come.
#[test]
fn a_reconnection_that_comes_to_nothing() {
    let pair = pair();
    let destination = orphan(&pair, &quick(&[]));
    let session = session_of(&destination.report());
    for run in 0..runs(30) {
        let mut stream = TcpStream::connect(("127.0.0.1", port(destination.local_uri()))).unwrap();
        stream.write_all(&hello(3, &session)).unwrap();
        if run % 3 == 0 {
            // Closed with something unread: reset.
            std::thread::sleep(Duration::from_millis(run % 5));
        }
        if run % 3 == 1 {
            drop(stream.read(&mut [0; 10]));
        }
        drop(stream);
    }
    // The last of them is noticed when it is.
    let began = Instant::now();
    loop {
        match pair.to.guest.take_back(TakeBack::Anyway) {
            Ok(()) => break,
            Err(GuestError::SourceConnected) if began.elapsed() < Duration::from_secs(10) => {}
            Err(error) => panic!("{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(really_runs(&pair.to.machine));
    pair.to.assert_good("taken over");
}

/// Handles are dropped while the guest is undecided, on either side: the guest decides without them.
#[test]
fn handles_may_be_dropped_at_any_moment() {
    for taken_at_source in [true, false] {
        let pair = pair();
        let destination = pair.to.listen("tcp:127.0.0.1:0", &quick(&[]));
        let proxy = Proxy::start(destination.local_uri(), Moment::Before(RELEASE), Harm::CutForGood);
        // What every embedder writes.
        let report = Source::start(&pair.from.guest, &proxy.uri, &quick(&[])).unwrap().wait();
        assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::Undecided));
        drop(destination);
        for guest in [&pair.from.guest, &pair.to.guest] {
            assert_eq!(guest.ownership(), Ownership::Undecided);
            assert!(guest.cont().is_err() && guest.stop().is_err());
        }
        assert!(!really_runs(&pair.from.machine) && !really_runs(&pair.to.machine));
        let side = if taken_at_source { &pair.from } else { &pair.to };
        side.guest.take_back(TakeBack::Anyway).unwrap();
        assert!(side.guest.is_running() && really_runs(&side.machine));
        side.assert_good("decided");
        // And it can be moved again.
        let next = empty(4 * MIB, 1);
        move_guest(side, &next, "tcp:127.0.0.1:0", &parameters(&[]));
        next.assert_good("moved after the decision");
    }
}

/// The destination's handle is dropped when everything is there and the source has not been lost: that is as if it were.
#[test]
fn a_destination_dropped_while_its_source_is_there() {
    let pair = pair();
    let destination = pair.to.listen("tcp:127.0.0.1:0", &quick(&[]));
    let held = Arc::new(AtomicBool::new(true));
    let wait = held.clone();
    // The source is held up between Ready and Release.
    pair.here.set(move |step, _, _| {
        if step == Step::Claim {
            until("the test goes on", || !wait.load(Ordering::SeqCst));
        }
        Ok(())
    });
    let migration = pair.from.migrate(destination.local_uri(), &quick(&[("switchover-timeout", "10s")]));
    until("everything is there", || pair.to.guest.ownership() == Ownership::Undecided);
    drop(destination);
    held.store(false, Ordering::SeqCst);
    let report = migration.wait();
    // Whether the source was released before it noticed or not: one of them can be had, and the other not harmed.
    if report.guest == GuestPlace::Undecided {
        until("it may be decided", || pair.to.guest.take_back(TakeBack::WhenSilent).is_ok());
        assert!(really_runs(&pair.to.machine) && !really_runs(&pair.from.machine));
    } else {
        assert!(really_runs(&pair.from.machine) && !really_runs(&pair.to.machine), "{}", message(&report));
        let refused = pair.to.guest.take_back(TakeBack::WhenSilent);
        assert!(!matches!(refused, Err(GuestError::SourceConnected)), "{refused:?}");
    }
}

/// Handles are dropped at random moments of a migration: at most one guest runs, and one can be brought to.
#[test]
fn handles_dropped_anywhere() {
    let mut random = common::Random(4);
    for run in 0..runs(30) {
        let pair = pair();
        let watch = Watch::start(&pair);
        let destination = pair.to.listen("tcp:127.0.0.1:0", &quick(&[]));
        let migration = pair.from.migrate(destination.local_uri(), &quick(&[]));
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        if random.below(2) == 0 {
            drop(migration);
            drop(destination);
        } else {
            drop(destination);
            drop(migration);
        }
        let here = pair.from.guest.ownership();
        let there = pair.to.guest.ownership();
        let what = format!("run {run}: {here:?} at the source, {there:?} at the destination");
        match (here, there) {
            (Ownership::Here, Ownership::Awaited) => assert!(really_runs(&pair.from.machine), "{what}"),
            // The source goes on; what the destination has is kept until somebody says otherwise.
            (Ownership::Here, Ownership::Undecided) => assert!(really_runs(&pair.from.machine), "{what}"),
            (Ownership::Gone | Ownership::Undecided, Ownership::Here) => {
                assert!(really_runs(&pair.to.machine), "{what}");
            }
            (Ownership::Undecided, Ownership::Undecided | Ownership::Awaited) => {
                pair.from.guest.take_back(TakeBack::Anyway).unwrap();
                assert!(really_runs(&pair.from.machine), "{what}");
            }
            _ => panic!("{what}"),
        }
        watch.end();
    }
}

/// The VMM's code panics in the middle of the start, or hangs and returns when it is too late: both sides know that nobody
/// knows, and a person can decide on either.
#[test]
fn a_start_that_nobody_knows_the_end_of() {
    for taken_at_source in [true, false] {
        let pair = pair();
        pair.there.set(|step, _, _| if step == Step::Resume { panic!("no start today") } else { Ok(()) });
        let destination = pair.to.listen("tcp:127.0.0.1:0", &quick(&[]));
        let migration = pair.from.migrate(destination.local_uri(), &quick(&[]));
        let (here, there) = (migration.wait(), destination.wait());
        for report in [&here, &there] {
            assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::Undecided), "{}", message(report));
        }
        assert!(
            message(&there).contains("no start today") && message(&here).contains("cannot tell"),
            "{}",
            message(&here)
        );
        assert!(pair.to.guest.cont().is_err() && pair.from.guest.cont().is_err());
        assert!(!really_runs(&pair.from.machine) && !really_runs(&pair.to.machine));
        pair.there.set(|_, _, _| Ok(()));
        let (side, other) = if taken_at_source { (&pair.from, &pair.to) } else { (&pair.to, &pair.from) };
        side.guest.take_back(TakeBack::Anyway).unwrap();
        assert!(really_runs(&side.machine) && !really_runs(&other.machine));
        side.assert_good("decided");
    }
}

/// A start that hangs before any vCPU ran is given up: the guest goes on at the source. When the VMM's code returns after
/// all, it starts nothing.
#[test]
fn a_late_start_starts_nothing() {
    let pair = pair();
    let gate = Arc::new(AtomicBool::new(false));
    let returned = Arc::new(AtomicBool::new(false));
    let (wait, done) = (gate.clone(), returned.clone());
    pair.there.set(move |step, machine, permit| {
        if step == Step::Resume {
            until("the test goes on", || wait.load(Ordering::SeqCst));
            machine.resume(permit.unwrap())?;
            done.store(true, Ordering::SeqCst);
        }
        Ok(())
    });
    let watch = Watch::start(&pair);
    let limit = quick(&[("switchover-timeout", "700ms"), ("link-timeout", "5s")]);
    let destination = pair.to.listen("tcp:127.0.0.1:0", &limit);
    let migration = pair.from.migrate(destination.local_uri(), &limit);
    let report = migration.wait();
    assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::RunningAtSource), "{}", message(&report));
    assert!(message(&report).contains("the machine has not answered within"), "{}", message(&report));
    assert!(report.downtime_seconds < 2.0, "{}", report.downtime_seconds);
    gate.store(true, Ordering::SeqCst);
    until("it returns after all", || returned.load(Ordering::SeqCst));
    assert!(!really_runs(&pair.to.machine), "it runs with its permit revoked");
    assert!(really_runs(&pair.from.machine));
    watch.end();
    pair.from.assert_good("it went on");
}

/// A start that hangs after vCPUs ran: they are stopped, and a person decides.
#[test]
fn a_start_that_hangs_while_the_guest_runs() {
    let pair = pair();
    let gate = Arc::new(AtomicBool::new(false));
    let wait = gate.clone();
    pair.there.set(move |step, machine, permit| {
        if step == Step::Resume && !wait.load(Ordering::SeqCst) {
            machine.resume(permit.unwrap())?;
            until("the test goes on", || wait.load(Ordering::SeqCst));
        }
        Ok(())
    });
    let limit = quick(&[("switchover-timeout", "700ms"), ("link-timeout", "5s")]);
    let destination = pair.to.listen("tcp:127.0.0.1:0", &limit);
    let migration = pair.from.migrate(destination.local_uri(), &limit);
    let (here, there) = (migration.wait(), destination.wait());
    assert_eq!((here.guest, there.guest), (GuestPlace::Undecided, GuestPlace::Undecided), "{}", message(&here));
    until("its vCPUs stop", || !really_runs(&pair.to.machine));
    assert!(!really_runs(&pair.from.machine));
    gate.store(true, Ordering::SeqCst);
    let began = Instant::now();
    // Its code has to return before it can be asked for anything.
    while let Err(error) = pair.to.guest.take_back(TakeBack::Anyway) {
        assert!(began.elapsed() < Duration::from_secs(20), "{error}");
    }
    assert!(really_runs(&pair.to.machine));
}

/// The source asks again while somebody takes the guest back there: the one or the other, never both.
#[test]
fn asking_again_and_taking_back_at_once() {
    for run in 0..runs(20) {
        let pair = pair();
        let destination = pair.to.listen("tcp:127.0.0.1:0", &quick(&[]));
        let target = destination.local_uri().clone();
        let proxy = Proxy::start(&target, Moment::Before(RELEASE), Harm::CutForGood);
        let Uri::Tcp { port: proxy_port, .. } = proxy.uri else { panic!() };
        let migration = pair.from.migrate(&proxy.uri, &quick(&[]));
        assert_eq!(migration.wait().guest, GuestPlace::Undecided);
        drop(proxy);
        let watch = Watch::start(&pair);
        // The same address answers again.
        let again = std::net::TcpListener::bind(("127.0.0.1", proxy_port)).unwrap();
        let relay = std::thread::spawn(move || {
            while let Ok((client, _)) = again.accept() {
                let server = TcpStream::connect(("127.0.0.1", port(&target)));
                let Ok(server) = server else { return };
                let mut first = [0; 1];
                if client.peek(&mut first).unwrap_or(0) == 0 {
                    return;
                }
                common::splice(client, server);
            }
        });
        std::thread::sleep(Duration::from_millis(450 + run * 7 % 100));
        let taken = std::thread::scope(|scope| {
            let asking = scope.spawn(|| migration.reconnect());
            let taking = scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(run * 200));
                pair.from.guest.take_back(TakeBack::WhenSilent)
            });
            drop(asking.join().unwrap());
            taking.join().unwrap()
        });
        let report = migration.wait();
        let what = format!("run {run}: taken back: {taken:?}; {}", message(&report));
        match taken {
            Ok(()) => assert!(really_runs(&pair.from.machine) && !pair.to.guest.is_running(), "{what}"),
            Err(_) => {
                until(&what, || migration.report().status.is_final());
                let settled = pair.from.guest.ownership();
                assert!(matches!(settled, Ownership::Gone | Ownership::Undecided), "{what}: {settled:?}");
            }
        }
        watch.end();
        drop(migration);
        drop(destination);
        drop(TcpStream::connect(("127.0.0.1", proxy_port)));
        drop(relay.join());
    }
}

/// A destination that stands still between Release and the first vCPU for longer than it may (its host was suspended, say)
/// asks again, and starts nothing when the guest was taken back meanwhile.
#[test]
fn a_release_that_is_too_old() {
    for taken_back in [false, true] {
        let pair = pair();
        let gate = Arc::new(AtomicBool::new(false));
        let reached = Arc::new(AtomicBool::new(false));
        let (wait, at) = (gate.clone(), reached.clone());
        pair.there.set(move |step, _, _| {
            if step == Step::Claim {
                at.store(true, Ordering::SeqCst);
                until("the test goes on", || wait.load(Ordering::SeqCst));
            }
            Ok(())
        });
        let watch = Watch::start(&pair);
        let long = quick(&[("switchover-timeout", "20s"), ("handover-timeout", "5s")]);
        let destination = pair.to.listen("tcp:127.0.0.1:0", &long);
        let proxy = Proxy::start(destination.local_uri(), Moment::Before(RUNNING), Harm::None);
        let migration = pair.from.migrate(&proxy.uri, &long);
        until("Release has come", || reached.load(Ordering::SeqCst));
        if taken_back {
            // The link is lost as well, as it is with a host that is suspended.
            proxy.cut();
        }
        let (proxy, migration) = if taken_back {
            drop((migration, proxy));
            (None, None)
        } else {
            (Some(proxy), Some(migration))
        };
        let refused = pair.from.guest.take_back(TakeBack::WhenSilent).unwrap_err();
        assert!(matches!(refused, GuestError::StillHeard { .. }), "{refused}");
        std::thread::sleep(Duration::from_millis(600));
        if taken_back {
            pair.from.guest.take_back(TakeBack::WhenSilent).unwrap();
        }
        gate.store(true, Ordering::SeqCst);
        if taken_back {
            std::thread::sleep(Duration::from_millis(300));
            assert!(!really_runs(&pair.to.machine) && really_runs(&pair.from.machine));
            assert_eq!(pair.to.guest.ownership(), Ownership::Undecided);
        } else {
            // The second time it is quick.
            let report = migration.as_ref().unwrap().wait();
            assert_eq!(report.status, Status::Completed, "{}", message(&report));
            assert!(really_runs(&pair.to.machine) && !pair.from.guest.is_running());
            pair.to.assert_good("asked twice");
        }
        watch.end();
        drop((destination, migration, proxy));
    }
}

/// A destination that says the guest runs there before it was released. It is broken, but may well run it: better no guest
/// than two.
#[test]
fn a_destination_that_runs_what_was_not_released() {
    let running = [0u64, 0, 0, 1].into_iter().flat_map(u64::to_le_bytes).collect();
    // Then it takes that back: failed, undecided, epoch 1, without a word. It is not believed.
    let never = [&[0, 5][..], &1u64.to_le_bytes(), &[0, 0]].concat();
    let (uri, other) = common::second::destination(vec![(RUNNING, running), (ABORT, never)]);
    let from = source(4 * MIB, 1, WORKLOAD, 5);
    let one = quick(&[("multifd-channels", "1"), ("switchover-timeout", "1s")]);
    let report = from.migrate(&uri, &one).wait();
    assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::Undecided), "{}", message(&report));
    assert!(!from.guest.is_running() && !really_runs(&from.machine), "{}", message(&report));
    let heard = other.join().unwrap();
    assert!(!heard.contains(&RELEASE), "{heard:?}");
    // Only a person can know.
    from.guest.take_back(TakeBack::Anyway).unwrap();
    assert!(really_runs(&from.machine));
    from.assert_good("taken back");
}

/// A person takes the guest back in spite of all warnings while the destination runs it. When they hear of each other, the
/// one with the earlier decision stops and keeps its guest; both say so.
#[test]
fn a_conflict_is_settled_on_contact() {
    settle_a_conflict(|_| Ok(()));
}

/// As well where the VMM of the side that gives way does not stop its machine.
#[test]
fn a_conflict_is_settled_without_the_vmm() {
    settle_a_conflict(|step| if step == Step::Pause { Err("it does not pause".into()) } else { Ok(()) });
    settle_a_conflict(|step| {
        if step == Step::Pause {
            std::thread::sleep(Duration::from_secs(4));
        }
        Ok(())
    });
}

/// A person takes the guest back while it runs at the destination, whose VMM does `act` when it is to give way.
fn settle_a_conflict(mut act: impl FnMut(Step) -> Result<(), MachineError> + Send + 'static) {
    let pair = pair();
    // Longer than a machine that must stop is waited for.
    let set = parameters(&[("link-timeout", "3s"), ("handover-timeout", "2s")]);
    let destination = pair.to.listen("tcp:127.0.0.1:0", &set);
    let target = destination.local_uri().clone();
    let proxy = Proxy::start(&target, Moment::Before(RUNNING), Harm::CutForGood);
    let Uri::Tcp { port: proxy_port, .. } = proxy.uri else { panic!() };
    let migration = pair.from.migrate(&proxy.uri, &set);
    assert_eq!(migration.wait().guest, GuestPlace::Undecided);
    until("it runs there", || really_runs(&pair.to.machine));
    drop(proxy);
    let again = std::net::TcpListener::bind(("127.0.0.1", proxy_port)).unwrap();
    // Until the test's process ends: the source may come more than once.
    std::thread::spawn(move || {
        for client in again.incoming().flatten() {
            let target = target.clone();
            std::thread::spawn(move || {
                if let Ok(there) = TcpStream::connect(("127.0.0.1", port(&target))) {
                    common::splice(client, there);
                }
            });
        }
    });
    // Who does not get what only one machine may have has decided nothing, and nobody hears of it.
    pair.here.set(|step, _, _| if step == Step::Claim { Err("another machine has it".into()) } else { Ok(()) });
    let refused = pair.from.guest.take_back(TakeBack::Anyway).unwrap_err().to_string();
    assert!(refused.contains("another machine has it"), "{refused}");
    assert_eq!(pair.from.guest.ownership(), Ownership::Undecided);
    std::thread::sleep(Duration::from_millis(100));
    assert!(really_runs(&pair.to.machine) && !really_runs(&pair.from.machine));
    pair.here.set(|_, _, _| Ok(()));
    pair.there.set(move |step, _, _| act(step));

    pair.from.guest.take_back(TakeBack::Anyway).unwrap();
    until("the other one stops", || !pair.to.guest.is_running() && !really_runs(&pair.to.machine));
    assert!(really_runs(&pair.from.machine));
    assert_eq!(pair.to.guest.ownership(), Ownership::Undecided);
    let began = Instant::now();
    let say = || [message(&destination.report()), message(&migration.report())];
    while say().iter().any(|message| !message.contains("conflict")) {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", say());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!really_runs(&pair.to.machine));
    // Nothing was thrown away.
    pair.there.set(|_, _, _| Ok(()));
    pair.to.assert_good("kept");
    drop(migration);
}

/// VMM code that takes its time: whoever asks is answered meanwhile, and may ask from within it.
#[test]
fn no_lock_is_held_while_vmm_code_runs() {
    let pair = pair();
    let slow = |guest: &Arc<Guest>| {
        let guest = Arc::downgrade(guest);
        move |_: Step, _: &SyntheticMachine, _: Option<&StartPermit>| {
            std::thread::sleep(Duration::from_millis(300));
            if let Some(guest) = guest.upgrade() {
                let _ = (guest.is_running(), guest.ownership(), guest.place(dunlin::Side::Source));
            }
            Ok(())
        }
    };
    pair.here.set(slow(&pair.from.guest));
    pair.there.set(slow(&pair.to.guest));
    let destination = pair.to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let migration = pair.from.migrate(destination.local_uri(), &parameters(&[]));
    let mut took = Vec::new();
    while !migration.report().status.is_final() || destination.report().status != Status::Completed {
        let began = Instant::now();
        let _ = (migration.report(), destination.report());
        let _ = (pair.from.guest.ownership(), pair.to.guest.is_running());
        took.push(began.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(migration.wait().status, Status::Completed);
    took.sort();
    let p99 = took[took.len() * 99 / 100];
    println!("{} times all four questions: p99 {p99:?}, longest {:?}", took.len(), took.last().unwrap());
    assert!(p99 < Duration::from_millis(10), "{p99:?}");
    pair.to.assert_good("moved slowly");
}

/// VMM code that hangs, at every step of the switchover: the guest goes on at the source within the limit, and the error
/// says what was waited for.
#[test]
fn vmm_code_that_hangs() {
    for (step, at_source) in [(Step::Save, true), (Step::Load, false)] {
        let pair = pair();
        let gate = Arc::new(AtomicBool::new(false));
        let wait = gate.clone();
        let odd = if at_source { &pair.here } else { &pair.there };
        odd.set(move |now, _, _| {
            if now == step {
                until("the test goes on", || wait.load(Ordering::SeqCst));
            }
            Ok(())
        });
        let limit = parameters(&[("switchover-timeout", "700ms")]);
        let destination = pair.to.listen("tcp:127.0.0.1:0", &limit);
        let migration = pair.from.migrate(destination.local_uri(), &limit);
        let began = Instant::now();
        if at_source {
            // The very machine that is to go on hangs: it does so once it can.
            until("it is given up", || {
                pair.from.guest.ownership() == Ownership::Here && began.elapsed() > Duration::from_secs(1)
            });
            gate.store(true, Ordering::SeqCst);
        }
        let report = migration.wait();
        assert!(began.elapsed() < Duration::from_secs(10), "{step:?}: {:?}", began.elapsed());
        assert_eq!(
            (report.status, report.guest),
            (Status::Failed, GuestPlace::RunningAtSource),
            "{}",
            message(&report)
        );
        let named = if at_source { "save the device state" } else { "load" };
        assert!(message(&report).contains(named), "{step:?}: {}", message(&report));
        assert!(really_runs(&pair.from.machine));
        gate.store(true, Ordering::SeqCst);
        pair.from.assert_good("it went on");
    }
}

/// Strangers who know the protocol's hello, in turns: a real source gets in all the same, and nothing is reported of them
/// but that they were turned away.
#[test]
fn strangers_who_say_hello() {
    let to = empty(4 * MIB, 1);
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let events = to.guest.events();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for stranger in 0..16u8 {
            let (over, port) = (&over, port(destination.local_uri()));
            scope.spawn(move || {
                let mut held = Vec::new();
                while !over.load(Ordering::SeqCst) {
                    if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                        drop(stream.write_all(&hello(0, &[stranger; 16])));
                        held.push(stream);
                    }
                    if held.len() > 4 {
                        held.remove(0);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
        }
        let _end = Ending(&over);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!((destination.report().status, destination.report().session), (Status::Setup, None));
        assert!(events.try_iter().next().is_none(), "a stranger is announced");
        for run in 0..5 {
            let from = source(4 * MIB, 1, WORKLOAD, run);
            if run < 4 {
                // And what is reported of the last migration stays.
                let slow = parameters(&[("max-bandwidth", "1M/s")]);
                let migration = from.migrate(destination.local_uri(), &slow);
                until("it gets in", || destination.report().status == Status::Active);
                migration.cancel().unwrap();
                assert_eq!(migration.wait().status, Status::Cancelled);
                until("it is cancelled", || destination.report().status == Status::Cancelled);
                let session = destination.report().session;
                std::thread::sleep(Duration::from_millis(100));
                assert_eq!((destination.report().status, destination.report().session), (Status::Cancelled, session));
            } else {
                let report = from.migrate(destination.local_uri(), &parameters(&[])).wait();
                assert_eq!(report.status, Status::Completed, "{}", message(&report));
            }
        }
    });
    to.assert_good("in spite of strangers");
}

/// A migration that is cancelled is cancelled on both sides, whoever did it and whenever.
#[test]
fn cancelled_is_cancelled_on_both_sides() {
    let mut random = common::Random(11);
    for run in 0..runs(40) {
        let at_destination = run % 4 == 0;
        let (from, to) = (source(4 * MIB, 1, WORKLOAD, run), empty(4 * MIB, 1));
        let slow = parameters(&[("max-bandwidth", "4M/s"), ("multifd-channels", "4")]);
        let destination = to.listen("tcp:127.0.0.1:0", &slow);
        let migration = from.migrate(destination.local_uri(), &slow);
        if at_destination {
            until("it comes", || destination.report().status == Status::Active);
            destination.cancel().unwrap();
        } else {
            std::thread::sleep(Duration::from_micros(random.below(3000)));
            migration.cancel().unwrap();
        }
        let report = migration.wait();
        let what = format!("run {run}: {}", message(&report));
        assert_eq!((report.status, report.guest), (Status::Cancelled, GuestPlace::RunningAtSource), "{what}");
        until(&what, || matches!(destination.report().status, Status::Cancelled | Status::Setup));
        assert!(!to.guest.is_running() && really_runs(&from.machine), "{what}");
        // Before anything was said there is nothing to say there.
        let there = destination.report();
        assert!(there.status == Status::Cancelled || there.session.is_none(), "{what}: {}", message(&there));
    }
}
