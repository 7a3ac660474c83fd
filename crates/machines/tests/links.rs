//! Links that are slow, silent or changed under way: how much comes through, what is noticed and when, and what is said.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::time::{Duration, Instant};

use common::line::{Flow, Line, Which};
use common::proxy::Way;
use common::{MIB, empty, parameters, source, until};
use dunlin::Status;

/// A limit that is raised under way holds for the very next frame, and not when the time of what was paid for at the
/// old rate is over. One that is lowered holds as soon, and does not silence the link for what was sent before.
#[test]
fn a_changed_limit_holds_at_once() {
    let (from, to) = (source(64 * MIB, 1, "idle", 3), empty(64 * MIB, 1));
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    // Many channels: under a slow limit each of them waits behind all the others.
    let with = |rate: &str| parameters(&[("max-bandwidth", rate), ("multifd-channels", "32")]);
    let migration = from.migrate(destination.local_uri(), &with("50M/s"));
    let transferred = || migration.report().ram.transferred_bytes;
    let set = |rate: &str| migration.set_parameters(&with(rate)).unwrap();
    until("pages travel", || transferred() > MIB);
    set("4K/s");
    // A frame that each channel had paid for before still goes.
    std::thread::sleep(Duration::from_millis(500));
    let (before, began) = (transferred(), Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    let rate = (transferred() - before) as f64 / began.elapsed().as_secs_f64();
    println!("{rate:.0} bytes a second of 4096");
    assert!(rate < 32_768.0, "{rate:.0} bytes a second");
    let raised = Instant::now();
    set("1G/s");
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert!(raised.elapsed() < Duration::from_secs(10), "{:?}", raised.elapsed());
    destination.wait();
    to.assert_good("after limits that changed");
}

/// A destination that acknowledges one channel's marks again and again has not acknowledged the other's.
#[test]
fn a_repeated_acknowledgement_ends_no_round() {
    let (from, to) = (source(4 * MIB, 1, "idle", 3), empty(4 * MIB, 1));
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let line = Line::repeating_acks(destination.local_uri(), 0);
    // What goes on channel 1 fits the sockets on the way, so that its worker has done its part.
    line.set(Which::Data(1), Way::ToDestination, Flow::Held);
    let migration = from.migrate(&line.uri, &parameters(&[("multifd-channels", "2")]));
    let arrived = || destination.report().channels.iter().map(|channel| channel.pages.total()).collect::<Vec<_>>();
    until("all of channel 0 has come", || arrived().first().is_some_and(|pages| *pages >= 512));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(migration.report().rounds_ended(), 0, "nothing has come on channel 1");
    line.set(Which::Data(1), Way::ToDestination, Flow::Free);
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert!(report.rounds[0].seconds >= 0.5, "{:?}", report.rounds[0]);
    destination.wait();
    to.assert_good("after repeated acknowledgements");
}
