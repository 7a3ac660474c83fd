//! Migrations that go wrong: cut links, flipped bits, truncated streams, strangers. Whatever happens, never two
//! running guests, and the guest that runs is right.
//!
//! `DUNLIN_TEST_RUNS` changes the number of random cuts (default 50) and flips (default 500).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::proxy::{Harm, Moment, Proxy, Way};
use common::{MIB, Random, Side, empty, parameters, runs, source, splice, until};
use dunlin::{Destination, GuestPlace, Report, Source, Status, TakeBack, Uri};

const WORKLOAD: &str = "pattern=uniform,content=random,rate=60M/s,working-set=2M";
/// Frame types of the handover, from docs/wire-format.md.
const STEPS: [(&str, u16); 6] =
    [("Section", 6), ("Offer", 7), ("Ready", 8), ("Release", 9), ("Running", 10), ("Done", 11)];

/// Watches both guests for as long as it lives: never may both run.
struct Watch<'a> {
    over: &'a AtomicBool,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

fn port(uri: &Uri) -> u16 {
    match uri {
        Uri::Tcp { port, .. } => *port,
        other => panic!("{other}"),
    }
}

/// How a harmed migration ended.
struct End {
    here: Report,
    there: Report,
    at_source: bool,
    at_destination: bool,
    /// Whether the harm was done: a migration may end before the byte that was to be harmed.
    harmed: bool,
}

fn one_line(report: &Report) -> String {
    let error = report.error.as_ref().map_or("", |error| error.message.as_str());
    assert!(!error.contains('\n'), "{error}");
    format!("{} ({}) {error}", report.status, report.guest)
}

/// Migrates through a proxy that does `harm` at `moment`, and checks what must hold after any harm.
fn harmed(from: &Side, to: &Side, changes: &[(&str, &str)], moment: Moment, harm: Harm, what: &str) -> End {
    let parameters = parameters(changes);
    let destination = to.listen("tcp:127.0.0.1:0", &parameters);
    let proxy = Proxy::start(destination.local_uri(), moment, harm);
    let over = AtomicBool::new(false);
    let end = std::thread::scope(|scope| {
        let watch = Watch { over: &over };
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                // In this order: a guest that moves in between is seen running nowhere, never twice.
                let there = to.guest.is_running();
                let here = from.guest.is_running();
                assert!(!(here && there), "{what}: two running guests");
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let end = settle(from, to, from.migrate(&proxy.uri, &parameters), &destination, what);
        drop(watch);
        end
    });
    let harmed = proxy.harmed();
    let missed = matches!(moment, Moment::Byte(..)) && end.at_destination;
    assert!(harmed || harm == Harm::None || missed, "{what}: the moment never came");
    End { harmed, ..end }
}

/// Waits until both sides know, and checks that exactly one has the guest and that it is right.
fn settle(from: &Side, to: &Side, migration: Source, destination: &Destination, what: &str) -> End {
    let here = migration.wait();
    until(&format!("{what}: the destination knows: {}", one_line(&here)), || {
        let status = destination.report().status;
        status.is_final() || (status == Status::Setup && destination.report().session.is_none())
    });
    let there = destination.report();
    let (at_source, at_destination) = (from.guest.is_running(), to.guest.is_running());
    let described = format!("{what}: source {}; destination {}", one_line(&here), one_line(&there));
    assert!(at_source != at_destination, "{described}: not exactly one guest runs");
    if at_source {
        assert!(matches!(here.status, Status::Failed | Status::Cancelled), "{described}");
        assert_eq!(here.guest, GuestPlace::RunningAtSource, "{described}");
        assert!(
            here.error.as_ref().is_some_and(|e| e.message.ends_with("the guest is running at the source")),
            "{described}"
        );
        assert!(here.downtime_seconds < 5.0, "{described}");
        from.assert_good(&described);
    } else {
        assert_eq!((here.status, there.status), (Status::Completed, Status::Completed), "{described}");
        assert!(from.guest.cont().is_err(), "{described}");
        to.assert_good(&described);
    }
    End { here, there, at_source, at_destination, harmed: false }
}

/// Bytes that a migration of this shape sends that way.
fn usual_bytes(way: Way, changes: &[(&str, &str)]) -> u64 {
    let (from, to) = (source(4 * MIB, 1, WORKLOAD, 1), empty(4 * MIB, 1));
    let parameters = parameters(changes);
    let destination = to.listen("tcp:127.0.0.1:0", &parameters);
    let proxy = Proxy::start(destination.local_uri(), Moment::Before(0), Harm::None);
    let migration = from.migrate(&proxy.uri, &parameters);
    assert_eq!(migration.wait().status, Status::Completed);
    proxy.bytes(way)
}

/// A cut at a random byte, either way; the link is back at once.
#[test]
fn cut_anywhere() {
    let count = runs(50);
    let mut random = Random(77);
    let limits = [("max-bandwidth", "200M/s")];
    let totals = [Way::ToDestination, Way::ToSource].map(|way| (way, usual_bytes(way, &limits)));
    let (mut stayed, mut moved) = (0, 0);
    let mut from = source(4 * MIB, 2, WORKLOAD, 3);
    for run in 0..count {
        let (way, total) = *random.pick(&totals);
        let at = random.below(total * 95 / 100);
        let what = format!("cut {run} at byte {at} {way:?}");
        let to = empty(4 * MIB, 2);
        let end = harmed(&from, &to, &limits, Moment::Byte(way, at), Harm::Cut, &what);
        let phases = [&end.here, &end.there].map(|r| r.error.as_ref().map_or("-".into(), |e| e.phase.to_string()));
        let place = if end.at_source { "source" } else { "destination" };
        println!(
            "{what:40} source {:10} in {:10} destination {:10} in {:10} running at the {place}",
            end.here.status.to_string(),
            phases[0],
            end.there.status.to_string(),
            phases[1]
        );
        if end.at_source {
            stayed += 1;
        } else {
            moved += 1;
            from = source(4 * MIB, 2, WORKLOAD, run);
        }
    }
    println!(
        "{count} cuts at random bytes: the guest stayed {stayed} times and moved {moved} times, always exactly one"
    );
}

/// A cut at every step of the handover, before and after the message; the link is back at once.
#[test]
fn cut_at_every_step() {
    println!("{:28} {:12} {:12} {}", "moment", "source", "destination", "running at");
    for (name, frame) in STEPS {
        for (when, moment) in [("before", Moment::Before(frame)), ("after", Moment::After(frame))] {
            for round in 0..3 {
                let what = format!("cut {when} {name} ({round})");
                let (from, to) = (source(4 * MIB, 2, WORKLOAD, 3), empty(4 * MIB, 2));
                let end = harmed(&from, &to, &[], moment, Harm::Cut, &what);
                let place = if end.at_source { "source" } else { "destination" };
                println!("{what:28} {:12} {:12} {place}", end.here.status.to_string(), end.there.status.to_string());
                // Once Ready has arrived, Release may be faster than the cut.
                let released = matches!(name, "Release" | "Running" | "Done");
                assert!(end.at_destination == released || (name, when) == ("Ready", "after"), "{what}");
                if end.at_source {
                    // And the same guest can be migrated after that.
                    let to = empty(4 * MIB, 2);
                    common::move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters(&[]));
                    to.assert_good(&what);
                }
            }
        }
    }
}

/// After a cut, the very destination that saw it takes the next migration.
#[test]
fn the_same_destination_again() {
    for (name, frame) in STEPS.iter().take(3) {
        let (from, to) = (source(4 * MIB, 1, WORKLOAD, 3), empty(4 * MIB, 1));
        let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
        {
            let proxy = Proxy::start(destination.local_uri(), Moment::Before(*frame), Harm::Cut);
            let migration = from.migrate(&proxy.uri, &parameters(&[]));
            assert_eq!(migration.wait().status, Status::Failed, "{name}");
        }
        let migration = from.migrate(destination.local_uri(), &parameters(&[]));
        let report = migration.wait();
        assert_eq!(report.status, Status::Completed, "{name}: {}", one_line(&report));
        assert_eq!(destination.wait().status, Status::Completed);
        to.assert_good(name);
    }
}

/// The link is lost for good after Release: nobody guesses. The source stays paused and says so; the destination runs.
#[test]
fn lost_for_good_after_release() {
    for (moment, runs_there) in [(Moment::Before(9), false), (Moment::After(9), true), (Moment::Before(10), true)] {
        let what = format!("{moment:?}");
        let (from, to) = (source(4 * MIB, 1, WORKLOAD, 3), empty(4 * MIB, 1));
        let short = parameters(&[("handover-timeout", "300ms")]);
        let destination = to.listen("tcp:127.0.0.1:0", &short);
        let proxy = Proxy::start(destination.local_uri(), moment, Harm::CutForGood);
        let migration = from.migrate(&proxy.uri, &short);
        let report = migration.wait();
        assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::Undecided), "{what}");
        let message = &report.error.unwrap().message;
        assert!(message.contains("take the guest back") && message.ends_with("the guest is undecided"), "{message}");
        assert!(!from.guest.is_running() && from.guest.cont().is_err() && from.guest.stop().is_err(), "{what}");
        assert!(migration.cancel().is_err(), "{what}: too late to cancel");
        if runs_there {
            until("the destination runs", || to.guest.is_running());
            // The link comes back, on another way: asking again resolves it.
            to.assert_good(&what);
            continue;
        }
        let there = destination.report();
        assert_eq!((there.status, there.guest), (Status::Device, GuestPlace::Undecided), "{}", one_line(&there));
        assert!(!to.guest.is_running() && to.guest.cont().is_err());
        drop(migration);
        drop(from);
        // The source is gone for good, and a person says so here.
        to.guest.take_back(TakeBack::Anyway).unwrap();
        assert!(to.guest.is_running());
        assert_eq!(destination.report().status, Status::Completed);
        assert!(to.guest.take_back(TakeBack::Anyway).is_err());
        to.assert_good(&what);
    }
}

/// The link is lost for longer than `handover-timeout`, then comes back, and a person asks again or decides.
#[test]
fn asked_again_later() {
    for decide in [false, true] {
        let (from, to) = (source(4 * MIB, 1, WORKLOAD, 3), empty(4 * MIB, 1));
        let short = parameters(&[("handover-timeout", "200ms")]);
        let destination = to.listen("tcp:127.0.0.1:0", &short);
        let target = destination.local_uri().clone();
        let proxy = Proxy::start(&target, Moment::Before(9), Harm::CutForGood);
        let Uri::Tcp { port: proxy_port, .. } = proxy.uri else { panic!() };
        let migration = from.migrate(&proxy.uri, &short);
        assert_eq!(migration.wait().guest, GuestPlace::Undecided);
        assert!(!from.guest.is_running() && !to.guest.is_running());
        drop(proxy);
        if decide {
            drop(destination);
            from.guest.take_back(TakeBack::Anyway).unwrap();
            assert!(from.guest.is_running());
            let report = migration.report();
            assert_eq!(report.guest, GuestPlace::RunningAtSource);
            assert!(report.summary.ends_with("; the guest is running at the source"), "{}", report.summary);
            assert!(report.downtime_seconds > 0.0 && report.downtime_seconds <= report.total_seconds);
            assert!(from.guest.take_back(TakeBack::Anyway).is_err(), "nothing is undecided any more");
            from.assert_good("taken back");
            continue;
        }
        // The same address answers again.
        let again = std::net::TcpListener::bind(("127.0.0.1", proxy_port)).unwrap();
        let Uri::Tcp { port, .. } = target else { panic!() };
        let relay = std::thread::spawn(move || {
            let (client, _) = again.accept().unwrap();
            let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
            splice(client, server);
        });
        migration.reconnect().unwrap();
        let report = migration.wait();
        assert_eq!(
            (report.status, report.guest),
            (Status::Completed, GuestPlace::RunningAtDestination),
            "{}",
            one_line(&report)
        );
        assert!(to.guest.is_running());
        to.assert_good("asked again");
        drop(migration);
        relay.join().unwrap();
    }
}

/// One random bit flipped in the stream, either way: found every time.
#[test]
fn flipped_bits() {
    let count = runs(500);
    let mut random = Random(2024);
    let totals = [Way::ToDestination, Way::ToSource].map(|way| (way, usual_bytes(way, &[])));
    let (mut stayed, mut moved, mut missed) = (0, 0, 0);
    let mut from = source(4 * MIB, 1, WORKLOAD, 3);
    for run in 0..count {
        // Four of five where the RAM is; the rest in the answers.
        let (way, total) = totals[usize::from(random.below(5) == 0)];
        let (at, bit) = (random.below(total * 95 / 100), random.below(8) as u8);
        let what = format!("flip {run}: bit {bit} of byte {at} {way:?}");
        let to = empty(4 * MIB, 1);
        let end = harmed(&from, &to, &[("link-timeout", "2s")], Moment::Byte(way, at), Harm::Flip(bit), &what);
        if !end.harmed {
            missed += 1;
            from = source(4 * MIB, 1, WORKLOAD, run);
        } else if end.at_source {
            stayed += 1;
        } else {
            // Only a flip in the last words, after Release, may end so: the source asked again.
            moved += 1;
            println!("{what}: source {}; destination {}", one_line(&end.here), one_line(&end.there));
            from = source(4 * MIB, 1, WORKLOAD, run);
        }
    }
    println!(
        "{count} flipped bits: {stayed} times the guest stayed, {moved} times it moved all the same (after Release), \
         {missed} migrations ended before the bit"
    );
    assert!(missed * 20 < count.max(20), "too many bits behind the end");
    assert!(moved * 50 < count.max(50), "too many for the few bytes after Release");
}

/// One random bit flipped in a message of the handover. Up to Ready the guest stays; from Release on the source asks
/// again over a new connection, and the guest arrives.
#[test]
fn flipped_bits_in_the_handover() {
    let mut random = Random(31);
    for (name, frame) in STEPS {
        let (mut stayed, mut moved) = (0, 0);
        for run in 0..10 {
            let (at, bit) = (random.below(80) as usize, random.below(8) as u8);
            let what = format!("flip {run} in {name}: bit {bit} of byte {at}");
            let (from, to) = (source(4 * MIB, 1, WORKLOAD, 3), empty(4 * MIB, 1));
            let moment = Moment::Inside(frame, at);
            let end = harmed(&from, &to, &[("link-timeout", "2s")], moment, Harm::Flip(bit), &what);
            *(if end.at_source { &mut stayed } else { &mut moved }) += 1;
            assert_eq!(end.at_destination, matches!(name, "Release" | "Running" | "Done"), "{what}");
        }
        println!("10 flips in {name}: the guest stayed {stayed} times and moved {moved} times");
    }
}

/// Streams that end early, in either direction.
#[test]
fn truncated_streams() {
    let mut random = Random(5);
    for run in 0..12 {
        let at = if run < 4 { random.below(500) } else { random.below(2 * MIB) };
        let what = format!("truncated at byte {at}");
        let (from, to) = (source(4 * MIB, 1, "idle", 3), empty(4 * MIB, 1));
        let moment = Moment::Byte(Way::ToDestination, at);
        let end = harmed(&from, &to, &[("link-timeout", "1s")], moment, Harm::Truncate, &what);
        assert!(end.at_source, "{what}");
    }
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A hello as docs/wire-format.md has it.
fn hello(version: u16, role: u8) -> Vec<u8> {
    let mut bytes = b"DUNLIN\r\n".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend([role, 0, 0, 0, 0, 0]);
    bytes.extend([7; 16]);
    bytes.resize(60, 0);
    let mut crc = u32::MAX;
    for byte in &bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 };
        }
    }
    bytes.extend((!crc).to_le_bytes());
    bytes
}

/// What a stranger is told.
fn say(port: u16, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(bytes).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    String::from_utf8_lossy(&answer).into_owned()
}

/// Whatever connects, and however it behaves: a clear answer, bounded memory, and the right peer is served after it.
#[test]
fn strangers() {
    let to = empty(16 * MIB, 1);
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let port = port(destination.local_uri());
    let refused = || destination.report().refused_connections;

    for (bytes, reason) in [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: browser\r\n\r\n".to_vec(), "GET / HTTP/1.1"),
        (vec![0; 64], "not a Dunlin migration"),
        ((0..100_000u32).map(|i| (i * 31) as u8).collect(), "not a Dunlin migration"),
        (hello(0, 0), "version 0"),
        (hello(2, 0), "version 2"),
        (hello(1, 9), "role"),
        (hello(1, 1), "knows no migration"),
        (hello(1, 3), "knows no migration"),
    ] {
        let before = refused().count;
        let answer = say(port, &bytes);
        assert!(answer.contains(reason), "{reason}: {answer:?}");
        assert_eq!(refused().count, before + 1);
        assert!(refused().latest.unwrap().contains(reason), "{:?}", refused());
    }

    // A valid hello, then garbage in place of frames: nothing has begun, and nothing is reported but that.
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(&hello(1, 0)).unwrap();
    stream.write_all(&[0x5a; 4096]).unwrap();
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    until("it is turned away", || refused().latest.unwrap().contains("checksum of a frame's header"));
    let report = destination.report();
    assert_eq!((report.status, report.error.is_none(), report.session), (Status::Setup, true, None));

    // A thousand who say nothing.
    let memory = resident_kib();
    let idle: Vec<TcpStream> = (0..1000).filter_map(|_| TcpStream::connect(("127.0.0.1", port)).ok()).collect();
    assert!(idle.len() > 900, "{} connected", idle.len());
    until("most of them are let go", || refused().count > 500);
    let grown = resident_kib().saturating_sub(memory);
    println!("1000 idle connections: {grown} KiB more resident, with this test's own ends");
    assert!(grown < 16 << 10, "{grown} KiB");

    // The right peer, with all of them still there.
    let from = source(16 * MIB, 1, WORKLOAD, 8);
    let migration = from.migrate(destination.local_uri(), &parameters(&[]));
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{}", one_line(&report));
    assert_eq!(destination.wait().status, Status::Completed);
    to.assert_good("after strangers");
    drop(idle);
}

/// Another machine's size, a busy destination: refused with a reason on both sides, and the right one served after.
#[test]
fn refusals() {
    let to = empty(16 * MIB, 2);
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    for (other, reason) in [
        (source(8 * MIB, 2, "idle", 1), "(8388608 bytes) at the source and 16.00 MiB (16777216 bytes) here"),
        (source(16 * MIB, 1, "idle", 1), "the source has 1 vCPUs, this machine has 2"),
    ] {
        let report = other.migrate(destination.local_uri(), &parameters(&[])).wait();
        let message = report.error.unwrap().message;
        assert!(message.starts_with("source, setup: the destination refused:"), "{message}");
        assert!(message.contains(reason) && message.ends_with("running at the source"), "{message}");
        until("it failed there", || destination.report().status == Status::Failed);
        let message = destination.report().error.unwrap().message;
        assert!(message.contains(reason) && message.starts_with("destination, setup: refused:"), "{message}");
        assert!(other.guest.is_running());
        assert_eq!(other.machine.verify().unwrap().bad_pages, 0);
    }
    let slow = parameters(&[("max-bandwidth", "2M/s")]);
    let (from, second) = (source(16 * MIB, 2, WORKLOAD, 1), source(16 * MIB, 2, WORKLOAD, 2));
    let first = from.migrate(destination.local_uri(), &slow);
    until("it flows", || destination.report().ram.transferred_bytes > 100_000);
    let report = second.migrate(destination.local_uri(), &parameters(&[])).wait();
    let message = report.error.unwrap().message;
    assert!(message.contains("busy with another migration"), "{message}");
    assert!(second.guest.is_running());
    first.set_parameters(&parameters(&[])).unwrap();
    assert_eq!(first.wait().status, Status::Completed);
    assert_eq!(destination.wait().status, Status::Completed);
    to.assert_good("after a busy signal");
}

/// Cancel at random moments, on either side, and at once the next migration succeeds.
#[test]
fn cancelled_anywhere() {
    let mut random = Random(11);
    let from = source(16 * MIB, 2, WORKLOAD, 4);
    let mut cancelled = [0, 0];
    for run in 0..runs(50) {
        let to = empty(16 * MIB, 2);
        let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
        let migration = from.migrate(destination.local_uri(), &parameters(&[("max-bandwidth", "300M/s")]));
        std::thread::sleep(Duration::from_micros(random.below(40_000)));
        let side = random.below(2) as usize;
        let asked = Instant::now();
        let answer = if side == 0 { migration.cancel() } else { destination.cancel() };
        let what = format!("cancel {run} at the {}", if side == 0 { "source" } else { "destination" });
        let end = settle(&from, &to, migration, &destination, &what);
        if end.at_destination {
            // It was too late. Bring the guest back.
            assert!(from.guest.cont().is_err());
            drop(destination);
            common::move_guest(&to, &from, "tcp:127.0.0.1:0", &parameters(&[]));
        } else if answer.is_ok() && end.here.status == Status::Cancelled {
            cancelled[side] += 1;
            assert!(asked.elapsed() < Duration::from_secs(2), "{what}: {:?}", asked.elapsed());
            let message = end.here.error.unwrap().message;
            assert!(message.contains("cancelled"), "{message}");
        }
    }
    println!("cancelled {} times at the source", cancelled[0]);
}

/// Nobody there, a black hole, a peer that stops reading: an answer in time, and the guest runs.
#[test]
fn peers_that_do_not_answer() {
    let from = source(16 * MIB, 1, WORKLOAD, 4);
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    for (uri, reason) in [
        (format!("tcp:127.0.0.1:{closed}"), "Connection refused"),
        ("unix:/nonexistent/socket".to_owned(), "No such file"),
        (format!("tcp:127.0.0.1:{silent_port}"), "no answer in time"),
    ] {
        let began = Instant::now();
        let report = from.migrate(&uri.parse().unwrap(), &parameters(&[("link-timeout", "500ms")])).wait();
        let message = report.error.unwrap().message;
        assert!(message.contains(reason) && message.contains(&uri), "{message}");
        assert!(began.elapsed() < Duration::from_secs(5), "{uri}");
        assert!(from.guest.is_running());
    }
    // A cancel does not wait for an answer that does not come.
    let migration = from.migrate(&format!("tcp:127.0.0.1:{silent_port}").parse().unwrap(), &parameters(&[]));
    std::thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    migration.cancel().unwrap();
    assert_eq!(migration.wait().status, Status::Cancelled);
    assert!(began.elapsed() < Duration::from_secs(1));
}

/// A Unix socket whose queue is full: the attempt can be given up, and ends by itself.
#[test]
fn nobody_accepts() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("full");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let from = source(4 * MIB, 1, "idle", 3);
    let uri = Uri::Unix(path.clone());
    let migration = from.migrate(&uri, &parameters(&[]));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(migration.report().status, Status::Setup);
    let asked = Instant::now();
    migration.cancel().unwrap();
    assert_eq!(migration.wait().status, Status::Cancelled);
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    drop(migration);
    let migration = from.migrate(&uri, &parameters(&[("link-timeout", "1s")]));
    let report = migration.wait();
    assert_eq!(report.status, Status::Failed);
    assert!(report.error.unwrap().message.contains("timed out"));
    // Nor is it taken for one that was left behind.
    let to = empty(4 * MIB, 1);
    assert!(Destination::listen(&to.guest, &uri, &parameters(&[])).is_err());
    assert!(path.exists() && from.guest.is_running());
}

/// Another source knocks while a migration is coming in, and is heard when that one has just arrived.
#[test]
fn a_second_source_at_the_end_of_the_first() {
    for run in 0..5 {
        let (first, second) = (source(4 * MIB, 1, WORKLOAD, 3), source(4 * MIB, 1, WORKLOAD, 4));
        let to = empty(4 * MIB, 1);
        let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
        let waits = parameters(&[("pause-before-switchover", "on")]);
        let migration = first.migrate(destination.local_uri(), &waits);
        until("the first waits", || migration.report().status == Status::PreSwitchover);
        let late = second.migrate(destination.local_uri(), &parameters(&[]));
        std::thread::sleep(Duration::from_millis(100 + 40 * run));
        migration.resume_switchover(Status::PreSwitchover).unwrap();
        let (here, late) = (migration.wait(), late.wait());
        assert_eq!(here.status, Status::Completed, "{}", one_line(&here));
        assert_eq!((late.status, late.guest), (Status::Failed, GuestPlace::RunningAtSource), "{}", one_line(&late));
        assert_eq!(destination.wait().status, Status::Completed);
        until("nobody is listened for any more", || !destination.is_listening());
        assert!(to.guest.is_running() && !first.guest.is_running() && second.guest.is_running());
        to.assert_good("of the first");
        second.assert_good("of the second");
    }
}
