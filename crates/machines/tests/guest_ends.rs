//! A guest that ends by itself while it is being migrated: it is not started again anywhere, and both sides say how it ended.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{MIB, Side, empty, move_guest, parameters, source, until};
use dunlin::machine::{Claim, MachineError, StateSection};
use dunlin::memory::{DirtyTracker, Ram};
use dunlin::{
    Destination, Guest, GuestEnd, GuestError, GuestEvent, GuestPlace, Machine, Ownership, Report, Source, StartPermit,
    Status, SwitchoverCost,
};
use dunlin_machines::SyntheticMachine;

const WORKLOAD: &str = "pattern=uniform,rate=20M/s,working-set=4M";

fn message(report: &Report) -> String {
    report.error.as_ref().map(|error| error.message.clone()).unwrap_or_default()
}

/// The words that both sides' errors must have.
fn words(end: GuestEnd) -> String {
    format!("the guest ended ({end}) while it was being migrated; there is no guest to run; the guest is ended")
}

/// Both sides say how the guest ended, and nobody can run it.
fn check(what: &str, end: GuestEnd, from: &Arc<Guest>, to: &Guest, source: &Source, destination: &Destination) {
    until(what, || source.report().status.is_final() && destination.report().status.is_final());
    let here = source.wait();
    for report in [here, destination.report()] {
        println!("{what}: {}", report.summary);
        assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::Ended), "{what}: {}", message(&report));
        assert!(message(&report).contains(&words(end)), "{what}: {}", message(&report));
        let error = report.error.unwrap();
        assert_eq!(error.guest, GuestPlace::Ended, "{what}");
    }
    assert!(!from.is_running() && !to.is_running(), "{what}");
    assert_eq!((from.ownership(), to.ownership()), (Ownership::Here, Ownership::Awaited), "{what}");
    assert_eq!(from.end(), Some(end), "{what}");
    for refused in [from.cont(), from.cont_anyway()] {
        assert!(matches!(refused, Err(GuestError::Ended { end: how }) if how == end), "{what}: {refused:?}");
    }
    let again = Source::start(from, destination.local_uri(), &parameters(&[])).map(drop).unwrap_err().to_string();
    assert!(again.contains(&format!("the guest has ended ({end})")), "{what}: {again}");
    // What its machine holds (images, say) settles all the same.
    from.stop().unwrap();
}

/// The guest and its migration are at `status`.
fn under_way(status: Status, from: &Side, to: &Side, set: &[(&str, &str)]) -> (Source, Destination) {
    let parameters = parameters(set);
    let destination = to.listen("tcp:127.0.0.1:0", &parameters);
    let migration = from.migrate(destination.local_uri(), &parameters);
    until("the migration is under way", || migration.report().status == status);
    (migration, destination)
}

#[test]
fn in_precopy() {
    for end in [GuestEnd::PoweredOff, GuestEnd::Reset, GuestEnd::TripleFault] {
        let (from, to) = (source(32 * MIB, 2, WORKLOAD, 3), empty(32 * MIB, 2));
        let (migration, destination) = under_way(Status::Active, &from, &to, &[("max-bandwidth", "2M")]);
        let events = from.guest.events();
        from.guest.ended(end).unwrap();
        // The first end counts.
        from.guest.ended(GuestEnd::Panicked).unwrap();
        check("precopy", end, &from.guest, &to.guest, &migration, &destination);
        let told: Vec<_> = events.try_iter().filter(|event| !matches!(event, GuestEvent::Pass { .. })).collect();
        let failed = GuestEvent::Migration { side: dunlin::Side::Source, status: Status::Failed };
        assert_eq!(told, [GuestEvent::Stopped, GuestEvent::Ended { end }, failed]);

        // The destination takes another guest, and says nothing of the one before.
        let other = source(32 * MIB, 2, WORKLOAD, 4);
        let moving = other.migrate(destination.local_uri(), &parameters(&[]));
        assert_eq!(moving.wait().status, Status::Completed, "{}", message(&moving.report()));
        assert_eq!(destination.wait().guest, GuestPlace::RunningAtDestination);
        to.assert_good("another guest");
    }
}

/// Nothing has answered yet: the source does not wait for that.
#[test]
fn in_setup() {
    let from = source(16 * MIB, 1, WORKLOAD, 3);
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", mute.local_addr().unwrap()).parse().unwrap();
    let migration = from.migrate(&uri, &parameters(&[]));
    let taken = mute.accept().unwrap();
    from.guest.ended(GuestEnd::Halted).unwrap();
    let report = migration.wait();
    assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::Ended));
    assert!(message(&report).starts_with("source, setup: the guest ended (halted)"), "{}", message(&report));
    drop(taken);
}

/// It ended before it was paused, and that is told late.
#[test]
fn before_the_switchover_goes_on() {
    let (from, to) = (source(16 * MIB, 2, WORKLOAD, 3), empty(16 * MIB, 2));
    let wait = [("pause-before-switchover", "on")];
    let (migration, destination) = under_way(Status::PreSwitchover, &from, &to, &wait);
    let steps = from.machine.steps();
    let events = from.guest.events();
    from.guest.ended(GuestEnd::PoweredOff).unwrap();
    check("pre-switchover", GuestEnd::PoweredOff, &from.guest, &to.guest, &migration, &destination);
    assert_eq!(from.machine.steps(), steps, "an ended guest was started again");
    let resumed = events.try_iter().any(|event| event == GuestEvent::Resumed);
    assert!(!resumed, "nobody is told that it goes on");
}

/// A machine that ends at some moment of its own, or waits in its load.
struct Ending {
    machine: Arc<SyntheticMachine>,
    /// From the next pause on.
    ended: AtomicBool,
    /// Loading waits.
    held: AtomicBool,
    loading: AtomicBool,
}

impl Ending {
    fn new(machine: &Arc<SyntheticMachine>) -> Arc<Self> {
        let no = || AtomicBool::new(false);
        Arc::new(Self { machine: machine.clone(), ended: no(), held: no(), loading: no() })
    }
}

impl Machine for Ending {
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

    fn ended(&self) -> Option<GuestEnd> {
        self.ended.load(Ordering::SeqCst).then_some(GuestEnd::Exited)
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        assert!(!self.ended.load(Ordering::SeqCst), "an ended guest is started");
        self.machine.resume(permit)
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        assert!(!self.ended.load(Ordering::SeqCst), "an ended guest is handed over");
        self.machine.save()
    }

    fn load(&self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        self.loading.store(true, Ordering::SeqCst);
        until("the load goes on", || !self.held.load(Ordering::SeqCst));
        self.machine.load(sections)
    }

    fn claim(&self, claim: Claim) -> Result<(), MachineError> {
        self.machine.claim(claim)
    }
}

/// A running guest whose machine can end by itself.
fn ending(seed: u64) -> (Side, Arc<Ending>) {
    let mut from = source(16 * MIB, 2, WORKLOAD, seed);
    from.guest.stop().unwrap();
    let machine = Ending::new(&from.machine);
    from.guest = Guest::new(machine.clone());
    from.guest.cont().unwrap();
    (from, machine)
}

/// In the moment of the pause, and nobody has told.
#[test]
fn as_it_is_paused() {
    for wait in ["on", "off"] {
        let ((from, machine), to) = (ending(5), empty(16 * MIB, 2));
        let set = [("pause-before-switchover", wait), ("max-bandwidth", "30M")];
        let (migration, destination) = under_way(Status::Active, &from, &to, &set);
        machine.ended.store(true, Ordering::SeqCst);
        check("pause", GuestEnd::Exited, &from.guest, &to.guest, &migration, &destination);
    }
}

/// An operator's stop finds that it has ended, in the middle of a migration.
#[test]
fn found_by_an_operators_stop() {
    let ((from, machine), to) = (ending(6), empty(16 * MIB, 2));
    let (migration, destination) = under_way(Status::Active, &from, &to, &[("max-bandwidth", "1M")]);
    machine.ended.store(true, Ordering::SeqCst);
    from.guest.stop().unwrap();
    check("stop", GuestEnd::Exited, &from.guest, &to.guest, &migration, &destination);
}

/// Everything is offered, and the destination has not said Ready yet: it is not released.
#[test]
fn before_it_is_released() {
    let from = source(16 * MIB, 2, WORKLOAD, 7);
    let mut to = empty(16 * MIB, 2);
    let machine = Ending::new(&to.machine);
    machine.held.store(true, Ordering::SeqCst);
    to.guest = Guest::awaited(machine.clone());
    let (migration, destination) = {
        let parameters = parameters(&[]);
        let destination = to.listen("tcp:127.0.0.1:0", &parameters);
        (from.migrate(destination.local_uri(), &parameters), destination)
    };
    until("the destination loads", || machine.loading.load(Ordering::SeqCst));
    let steps = from.machine.steps();
    from.guest.ended(GuestEnd::PoweredOff).unwrap();
    assert_eq!(migration.wait().status, Status::Failed);
    machine.held.store(false, Ordering::SeqCst);
    check("offered", GuestEnd::PoweredOff, &from.guest, &to.guest, &migration, &destination);
    assert_eq!(from.machine.steps(), steps, "an ended guest was started again");
}

/// What is not here ends elsewhere: once released, and before it comes.
#[test]
fn told_by_the_wrong_side() {
    let (from, to) = (source(16 * MIB, 2, WORKLOAD, 8), empty(16 * MIB, 2));
    assert!(matches!(to.guest.ended(GuestEnd::Reset), Err(GuestError::NotHereYet)));
    move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters(&[]));
    assert!(matches!(from.guest.ended(GuestEnd::Reset), Err(GuestError::Gone)));
    assert!(to.guest.is_running() && to.guest.end().is_none());
    // There it may end.
    let events = to.guest.events();
    to.guest.ended(GuestEnd::Reset).unwrap();
    assert_eq!((to.guest.end(), to.guest.place(dunlin::Side::Destination)), (Some(GuestEnd::Reset), GuestPlace::Ended));
    assert!(!to.guest.is_running() && to.guest.cont().is_err());
    to.guest.stop().unwrap();
    assert_eq!(
        events.try_iter().collect::<Vec<_>>(),
        [GuestEvent::Stopped, GuestEvent::Ended { end: GuestEnd::Reset }]
    );
}

/// A guest that is paused and has not ended goes its way: paused here, paused there.
#[test]
fn a_paused_guest_has_not_ended() {
    let ((from, _), to) = (ending(9), empty(16 * MIB, 2));
    from.guest.stop().unwrap();
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let report = from.migrate(destination.local_uri(), &parameters(&[])).wait();
    assert_eq!((report.status, report.guest), (Status::Completed, GuestPlace::PausedAtDestination));
}
