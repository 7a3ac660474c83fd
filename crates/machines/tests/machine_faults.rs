//! A VMM's own code that fails, or panics, at each of the engine's calls: the guest stays where it was, somebody is
//! told why, and both sides can do it again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::proxy::{Harm, Moment, Proxy};
use common::{MIB, empty, move_guest, parameters, source, until};
use dunlin::machine::{MachineError, StateSection};
use dunlin::memory::{DirtyTracker, Ram};
use dunlin::{Destination, Guest, GuestPlace, Machine, Report, Source, StartPermit, Status, SwitchoverCost};
use dunlin_machines::SyntheticMachine;

/// The number of the last message of a migration, by docs/wire-format.md.
const DONE: u16 = 11;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Track,
    Accept,
    Pause,
    Save,
    Load,
    Resume,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Fails,
    Panics,
    /// Until it is not armed any more.
    Waits,
}

/// A machine one of whose methods goes wrong while `armed`.
struct Brittle {
    machine: Arc<SyntheticMachine>,
    step: Step,
    how: How,
    armed: AtomicBool,
    reached: AtomicBool,
}

impl Brittle {
    fn new(machine: &Arc<SyntheticMachine>, step: Step, how: How) -> Arc<Self> {
        Arc::new(Self {
            machine: machine.clone(),
            step,
            how,
            armed: AtomicBool::new(false),
            reached: AtomicBool::new(false),
        })
    }

    fn reach(&self, step: Step) -> Result<(), MachineError> {
        if step != self.step || !self.armed.load(Ordering::SeqCst) {
            return Ok(());
        }
        match self.how {
            How::Fails => Err(format!("no {step:?} today").into()),
            How::Panics => panic!("no {step:?} today"),
            How::Waits => {
                self.reached.store(true, Ordering::SeqCst);
                until("the test goes on", || !self.armed.load(Ordering::SeqCst));
                Ok(())
            }
        }
    }
}

impl Machine for Brittle {
    fn ram(&self) -> &Ram {
        self.machine.ram()
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        self.reach(Step::Track)?;
        self.machine.dirty_tracker()
    }

    fn profile(&self) -> Vec<u8> {
        self.machine.profile()
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        self.reach(Step::Accept)?;
        self.machine.accept_profile(profile)
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        self.machine.switchover_cost()
    }
    fn pause(&self) -> Result<(), MachineError> {
        self.reach(Step::Pause)?;
        self.machine.pause()
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        self.reach(Step::Resume)?;
        self.machine.resume(permit)
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        self.reach(Step::Save)?;
        self.machine.save()
    }

    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        self.reach(Step::Load)?;
        self.machine.load(sections)
    }
}

fn message(report: &Report) -> String {
    report.error.as_ref().map(|error| error.message.clone()).unwrap_or_default()
}

fn one(step: Step, how: How) {
    let what = format!("{step:?} {how:?}");
    let at_source = matches!(step, Step::Track | Step::Pause | Step::Save);
    let mut from = source(32 * MIB, 2, "pattern=uniform,rate=20M", 7);
    let mut to = empty(32 * MIB, 2);
    let brittle = Brittle::new(if at_source { &from.machine } else { &to.machine }, step, how);
    if at_source {
        from.guest.stop().unwrap();
        from.guest = Guest::new(brittle.clone());
        from.guest.cont().unwrap();
    } else {
        to.guest = Guest::awaited(brittle.clone());
    }
    brittle.armed.store(true, Ordering::SeqCst);

    // A panic in resume says nothing of whether vCPUs run: then the other side may not.
    let undecided = (step, how) == (Step::Resume, How::Panics);
    let parameters = parameters(&[("handover-timeout", if undecided { "1s" } else { "30s" })]);
    {
        let destination = Destination::listen(&to.guest, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters).unwrap();
        let migration = Source::start(&from.guest, destination.local_uri(), &parameters).unwrap();
        if undecided {
            until(&what, || message(&destination.report()).contains("no Resume today"));
            assert!(!from.guest.is_running(), "{what}");
            assert_eq!(from.guest.place(dunlin::Side::Source), GuestPlace::Undecided, "{what}");
            println!("{what}: {}", message(&destination.report()));
            return;
        }
        let report = migration.wait();
        println!("{what}: {}", message(&report));
        assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::RunningAtSource), "{what}");
        assert!(message(&report).contains(&format!("no {step:?} today")), "{what}: {}", message(&report));
        if step != Step::Track {
            until(&what, || destination.report().status == Status::Failed);
            let there = message(&destination.report());
            assert!(there.contains(&format!("no {step:?} today")), "{what}: {there}");
        }
        assert!(!to.guest.is_running(), "{what}");
        from.assert_good(&what);
    }

    // The same machines again, with nothing in the way.
    brittle.armed.store(false, Ordering::SeqCst);
    move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters);
    to.assert_good(&what);
}

#[test]
fn at_every_step() {
    for step in [Step::Track, Step::Accept, Step::Pause, Step::Save, Step::Load, Step::Resume] {
        for how in [How::Fails, How::Panics] {
            one(step, how);
        }
    }
}

/// The migration is cancelled while it waits before the switchover, and the guest cannot be started again: it is here,
/// everybody is told, and nobody waits for ever.
#[test]
fn a_guest_that_does_not_go_on() {
    for how in [How::Fails, How::Panics] {
        let mut from = source(32 * MIB, 2, "pattern=uniform,rate=20M", 7);
        let to = empty(32 * MIB, 2);
        let brittle = Brittle::new(&from.machine, Step::Resume, how);
        from.guest.stop().unwrap();
        from.guest = Guest::new(brittle.clone());
        from.guest.cont().unwrap();
        let wait = parameters(&[("pause-before-switchover", "on")]);
        {
            let destination = to.listen("tcp:127.0.0.1:0", &wait);
            let migration = from.migrate(destination.local_uri(), &wait);
            until("pre-switchover", || migration.report().status == Status::PreSwitchover);
            brittle.armed.store(true, Ordering::SeqCst);
            migration.cancel().unwrap();
            let report = migration.wait();
            println!("{how:?}: {}", message(&report));
            assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::PausedAtSource));
            assert!(message(&report).contains("cancelled") && message(&report).contains("no Resume today"));
            until("the destination knows", || destination.report().status == Status::Cancelled);
        }
        brittle.armed.store(false, Ordering::SeqCst);
        from.guest.cont().unwrap();
        move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters(&[]));
        to.assert_good("after all");
    }
}

/// Cancelled before the destination has agreed: it is cancelled there too, not a peer that was lost.
#[test]
fn cancelled_while_agreeing() {
    let from = source(4 * MIB, 1, "idle", 7);
    let slow = Brittle::new(&empty(4 * MIB, 1).machine, Step::Accept, How::Waits);
    slow.armed.store(true, Ordering::SeqCst);
    let guest = Guest::awaited(slow.clone());
    let destination = Destination::listen(&guest, &"tcp:127.0.0.1:0".parse().unwrap(), &parameters(&[])).unwrap();
    let migration = from.migrate(destination.local_uri(), &parameters(&[]));
    until("the destination looks at it", || slow.reached.load(Ordering::SeqCst));
    migration.cancel().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    slow.armed.store(false, Ordering::SeqCst);
    assert_eq!(migration.wait().status, Status::Cancelled);
    until("the destination knows", || destination.report().status.is_final());
    assert_eq!(destination.report().status, Status::Cancelled);
    assert!(from.guest.is_running() && !guest.is_running());
}

/// A destination that is let go while it waits for the last word of a guest that is on its way to elsewhere by now.
#[test]
fn the_way_in_ends_nothing_on_the_way_out() {
    let (from, middle, last) = (source(16 * MIB, 1, "idle", 7), empty(16 * MIB, 1), empty(16 * MIB, 1));
    let way_in = middle.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let proxy = Proxy::start(way_in.local_uri(), Moment::Before(DONE), Harm::CutForGood);
    let migration = from.migrate(&proxy.uri, &parameters(&[]));
    until("the guest has come", || middle.guest.is_running());
    drop(migration);
    let next = last.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let way_out = middle.migrate(next.local_uri(), &parameters(&[("max-bandwidth", "4M/s")]));
    until("it is on its way", || way_out.report().status == Status::Active);
    drop(way_in);
    let second = Source::start(&middle.guest, next.local_uri(), &parameters(&[]));
    assert!(second.is_err(), "it is migrating already");
    way_out.set_parameters(&parameters(&[])).unwrap();
    assert_eq!(way_out.wait().status, Status::Completed);
    last.assert_good("moved twice");
}
