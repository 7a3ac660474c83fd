//! What a guest tells of itself, in order, and a migration that waits before its switchover.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::sync::mpsc::Receiver;
use std::time::Duration;

use common::{MIB, empty, move_guest, parameters, source, until};
use dunlin::{GuestEvent, GuestPlace, Side, Status};

const WORKLOAD: &str = "pattern=uniform,rate=20M/s,working-set=4M";

fn told(events: &Receiver<GuestEvent>) -> Vec<GuestEvent> {
    events.try_iter().collect()
}

fn migration(side: Side, status: Status) -> GuestEvent {
    GuestEvent::Migration { side, status }
}

/// Without the passes between the first and the last, of which there may be any number.
fn outline(events: Vec<GuestEvent>) -> Vec<GuestEvent> {
    let passes = events.iter().filter(|event| matches!(event, GuestEvent::Pass { .. }));
    for (number, pass) in (1..).zip(passes) {
        assert_eq!(*pass, GuestEvent::Pass { number });
    }
    let middle = |event: &GuestEvent| matches!(event, GuestEvent::Pass { number } if *number > 1);
    events.into_iter().filter(|event| !middle(event)).collect()
}

#[test]
fn events_of_a_migration() {
    let (from, to) = (source(16 * MIB, 1, WORKLOAD, 1), empty(16 * MIB, 1));
    let (here, there) = (from.guest.events(), to.guest.events());
    move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters(&[]));
    use Side::{Destination, Source};
    let begin = [migration(Source, Status::Setup), GuestEvent::Pass { number: 1 }, migration(Source, Status::Active)];
    let end = [GuestEvent::Stopped, migration(Source, Status::Device), migration(Source, Status::Completed)];
    assert_eq!(outline(told(&here)), [begin, end].concat());
    let wanted = [
        migration(Destination, Status::Setup),
        migration(Destination, Status::Active),
        migration(Destination, Status::Device),
        GuestEvent::Resumed,
        migration(Destination, Status::Completed),
    ];
    assert_eq!(told(&there), wanted);
    to.guest.stop().unwrap();
    to.guest.stop().unwrap();
    to.guest.cont().unwrap();
    assert_eq!(told(&there), [GuestEvent::Stopped, GuestEvent::Resumed]);
}

#[test]
fn waiting_before_the_switchover() {
    let (from, to) = (source(16 * MIB, 2, WORKLOAD, 2), empty(16 * MIB, 2));
    let wait = parameters(&[("pause-before-switchover", "on"), ("link-timeout", "500ms")]);
    let destination = to.listen("tcp:127.0.0.1:0", &wait);

    // Cancelled while it waits: the guest goes on.
    let moving = from.migrate(destination.local_uri(), &wait);
    assert!(moving.resume_switchover(Status::PreSwitchover).is_err());
    until("pre-switchover", || moving.report().status == Status::PreSwitchover);
    assert!(!from.guest.is_running() && from.guest.cont().is_err());
    moving.cancel().unwrap();
    let report = moving.wait();
    assert_eq!((report.status, report.guest), (Status::Cancelled, GuestPlace::RunningAtSource));
    assert!(report.downtime_seconds > 0.0);
    assert!(moving.resume_switchover(Status::PreSwitchover).is_err());
    until("the destination knows", || destination.report().status.is_final());
    from.assert_good("after the cancel");

    // It waits for as long as it takes, without the link being taken for lost, and is continued once.
    let events = from.guest.events();
    let moving = from.migrate(destination.local_uri(), &wait);
    until("pre-switchover", || moving.report().status == Status::PreSwitchover);
    let steps = from.machine.steps();
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(moving.report().status, Status::PreSwitchover);
    assert_eq!(from.machine.steps(), steps, "a paused guest does nothing");
    for wrong in [Status::Device, Status::Active] {
        let error = moving.resume_switchover(wrong).unwrap_err().to_string();
        assert!(error.contains("its status is pre-switchover"), "{error}");
    }
    moving.resume_switchover(Status::PreSwitchover).unwrap();
    // A second word, which may come too late, does no harm.
    let _ = moving.resume_switchover(Status::PreSwitchover);
    let report = moving.wait();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    let parts = report.downtime_parts.unwrap();
    assert!((1.2..report.downtime_seconds).contains(&parts.wait_seconds), "{parts:?}");
    let statuses: Vec<_> =
        told(&events).into_iter().filter(|event| !matches!(event, GuestEvent::Pass { .. })).collect();
    let wanted = [Status::Setup, Status::Active].map(|status| migration(Side::Source, status));
    assert_eq!(statuses[..2], wanted);
    let wanted =
        [Status::PreSwitchover, Status::Device, Status::Completed].map(|status| migration(Side::Source, status));
    assert_eq!((statuses[2], &statuses[3..]), (GuestEvent::Stopped, &wanted[..]));
    assert!(to.guest.is_running());
    to.assert_good("after the wait");
}
